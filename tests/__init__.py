"""The tests. None depends on the processor, on speed or on load."""

HANGS = 600
"""Seconds after which what a test waits for hangs: far above what it takes on a machine full of other work."""
