"""Runs by several processes: what every rank decided, step by step, and what it is held against."""
