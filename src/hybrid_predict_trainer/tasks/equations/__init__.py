"""Physics-informed networks and regression."""

from ...former_names import lookup

__getattr__ = lookup("tasks.equations")
