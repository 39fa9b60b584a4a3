"""`python -m compressor`, the same as `compress`."""

from compressor.cli import main

main()
