"""Presets as text: the file that ships, what it changes with the source of every number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .keys import with_values
from .presets import about, preset_table
from .settings import HybridTrainerConfig
from .toml import flatten, literal, preset_config, to_toml


def file_text(title: str, said: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """A preset's file.

    Args:
        title: What it is for.
        said: The rest of ``[about]``: ``sources``, and perhaps ``not_taken`` and ``run``.
        values: What it sets, by dotted key; all other settings are written with their defaults.
    """
    lines = ["# Written by 'make presets', which keeps [about] and the values that have a source there.", "[about]"]
    lines.append(f"title = {literal(title)}")
    if said.get("not_taken"):
        lines += ["not_taken = [", *(f"    {literal(text)}," for text in said["not_taken"]), "]"]
    lines += ["", "[about.sources]", *(f"{literal(k)} = {literal(v)}" for k, v in said["sources"].items())]
    if said.get("run"):
        lines += ["", "[about.run]", *(f"{k} = {literal(v)}" for k, v in said["run"].items())]
    return "\n".join(lines) + "\n\n" + to_toml(with_values(HybridTrainerConfig(), values))


def rewritten(name: str) -> str:
    """A preset's file with the settings and defaults of today."""
    said, flat = about(name), flatten(preset_table(name))
    return file_text(said["title"], said, {key: flat[key] for key in said["sources"]})


def format_preset(name: str) -> str:
    """What a preset sets, with the source of every number, and what of its source it does not follow."""
    said, values = about(name), flatten(preset_table(name))
    lines = [f"preset {name}: {said['title']}"]
    width = max((len(f"{key} = {literal(values[key])}") for key in said["sources"]), default=0)
    for key, source in said["sources"].items():
        lines.append(f"  {f'{key} = {literal(values[key])}':<{width}}  # {source}")
    lines += [f"  not taken: {text}" for text in said.get("not_taken", ())]
    num_others = len(flatten(preset_table(name))) - len(flatten({"about": said})) - len(said["sources"])
    return "\n".join([*lines, f"  the other {num_others} settings are the defaults"])


def whole(name: str) -> str:
    """All settings of a preset as TOML."""
    return to_toml(preset_config(name))
