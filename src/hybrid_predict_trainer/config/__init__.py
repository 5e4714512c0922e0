"""Settings.

Reading order: `settings` (the tables), `presets` (named starting points), `toml` (files in and out, strict).
"""

from .settings import *  # noqa: F403
from .settings import Clock as Clock
