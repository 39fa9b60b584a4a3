"""`compress` that times the models of a report for a moment: on a busy machine it would take 20 seconds for each.

No test that uses it judges a latency; tests/measure/test_latency.py says how long sessions go on.
"""

from compressor.cli.main import main
from compressor.measure.latency import time_models

MAX_SECONDS = 0.2
"""Per model, after the ten rounds that are always taken."""


def time_briefly() -> None:
    """Let `time_models` take `MAX_SECONDS` in this process where its caller does not say how long."""
    time_models.__kwdefaults__["max_seconds"] = MAX_SECONDS


if __name__ == "__main__":
    time_briefly()
    main()
