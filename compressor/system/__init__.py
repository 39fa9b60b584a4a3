"""The machine: its disk and the processes that share the work."""
