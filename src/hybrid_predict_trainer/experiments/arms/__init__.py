"""One arm of an experiment: what it is, how it is driven, what is recorded."""

from ...former_names import lookup

__getattr__ = lookup("experiments.arms")
