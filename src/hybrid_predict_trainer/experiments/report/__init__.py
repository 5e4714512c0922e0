"""The page: data, charts, parts, text."""

from ...former_names import lookup

__getattr__ = lookup("experiments.report")
