"""Images: data, networks, the task."""

from ...former_names import lookup

__getattr__ = lookup("tasks.images")
