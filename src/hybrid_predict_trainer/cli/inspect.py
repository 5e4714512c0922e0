"""``hpt inspect``: what a checkpoint holds, and whether it is intact."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from ..experiments.arms.options import InputError
from ..keep import checkpoint, housekeeping
from .arguments import OK, show


def run(args: argparse.Namespace) -> int:
    """Verify and describe.

    Raises:
        InputError: there is no checkpoint.
        CheckpointError: it is damaged.
    """
    path: Path = args.checkpoint
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    inner = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if housekeeping.checkpoints(inner):
        path = housekeeping.latest(inner)
    elif not any(path.glob("*.safetensors")) and not any(path.glob("*.json")):
        raise InputError(f"{path}: is no checkpoint and holds none")
    found = checkpoint.describe(path)

    def text() -> str:
        rows = [(k, f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else v) for k, v in found.items()]
        flat = [(k, v) for k, v in rows if not isinstance(v, dict | list)]
        sizes = found["file_bytes"]
        assert isinstance(sizes, Mapping)
        files = [(f"  {k}", f"{v:,} bytes") for k, v in sizes.items()]
        held = found["held"]
        assert isinstance(held, list)
        lines = [f"{k:<32} {v}" for k, v in [*flat, ("files", ""), *files]]
        total = sum(item["bytes"] for item in held)
        weights = sum(item["bytes"] for item in held if item["part"] == "model")
        lines += ["tensors, in multiples of the weights"] if weights else ["tensors, bytes"]
        for item in [*held, {"part": "all", "purpose": "", "bytes": total}]:
            size = f"{item['bytes'] / weights:8.2f}" if weights else f"{item['bytes']:12,}"
            lines.append(f"  {size}  {item['part']:<10} {item['purpose']}")
        return "\n".join(line.rstrip() for line in lines)

    show(args, found, text)
    return OK
