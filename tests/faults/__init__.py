"""Faults: the short table, and random scenarios (``python -m tests.faults --scenarios N``)."""
