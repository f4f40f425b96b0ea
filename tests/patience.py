"""How long a test waits for what must happen: long, for a machine may be slow, shared, or stopped for a while."""

HANGS_S = 600.0
"""Seconds. Only what hangs waits for so long; nothing is held to be fast."""
