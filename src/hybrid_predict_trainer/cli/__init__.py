"""The command ``hpt``.

Reading order: `hpt` (parses, calls, prints), `bench` (the benchmarks' commands), `progress` (the line on a terminal).
"""

from .hpt import main as main
