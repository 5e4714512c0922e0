"""The benchmark of regimes: cases, runs, their store, summary and report."""

from ...former_names import lookup

__getattr__ = lookup("experiments.regimes")
