"""A hybrid arm against plain arms at several budgets: plan, runs, the figure at equal loss."""

from ...former_names import lookup

__getattr__ = lookup("experiments.compare")
