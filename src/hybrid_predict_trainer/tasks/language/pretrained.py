"""Weights that are trained once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

CACHE_VARIABLE = "HPT_CACHE_DIR"
FORMAT = 1  # raise it when the meaning of a key changes

Weights = dict[str, Tensor]


def cache_dir() -> Path:
    """Return the folder `HPT_CACHE_DIR` names, or ~/.cache/hybrid-predict-trainer."""
    value = os.environ.get(CACHE_VARIABLE)
    return Path(value) if value else Path.home() / ".cache" / "hybrid-predict-trainer"


def cached_weights(name: str, key: Mapping[str, Any], train: Callable[[], Weights]) -> Weights:
    """Return the weights that belong to `key`: from the cache, or by `train`, which then fills it.

    Args:
        name: the file's name begins with it.
        key: JSON-able; everything that decides the weights. Another key is another file.
        train: called if there is no intact file.

    Raises:
        OSError: the cache cannot be written; found out before anything is trained.
    """
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    path = cache_dir() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_suffix(".lock")):
        kept = read_intact(path)
        if kept is None:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    kept = train()
                    file.write(save(kept, metadata={"key": text, "sha256": fingerprint(kept)}))
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).replace(path)
            finally:
                Path(temporary).unlink(missing_ok=True)
    return kept


def read_intact(path: Path) -> Weights | None:
    """Return the file's tensors, or `None` if it is not there or not what was written."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            expected = (file.metadata() or {}).get("sha256")
    except safetensors.SafetensorError:
        return None
    return weights if fingerprint(weights) == expected else None


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits that change with any name, type, shape or bit of the weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    # Runs of a benchmark start together: one trains, the others wait for its file.
    with path.open("w") as lock:
        try:
            import fcntl
        except ImportError:  # not a POSIX system: both train, and the last to end is kept
            yield
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class ProgressLine:
    """Says on standard error how far something is that takes a minute or two.

    Rewritten in place on a terminal; elsewhere one line at the beginning and one at the end.

    Args:
        what: what is done, for a person.
        total: steps.
    """

    def __init__(self, what: str, total: int) -> None:
        """Say that it begins."""
        self._what, self._total = what, total
        self._started = time.perf_counter()
        self._tty = sys.stderr.isatty()
        self._last = 0.0
        print(f"{what}: {total} steps, once", file=sys.stderr)

    def __call__(self, step: int, loss: float) -> None:
        """Report after step `step`, counted from 1."""
        seconds = time.perf_counter() - self._started
        done = step == self._total
        if done or (self._tty and seconds - self._last > 0.5):
            self._last = seconds
            start, end = ("\r\x1b[2K", "\n" if done else "") if self._tty else ("", "\n")
            line = f"{self._what}: step {step} of {self._total}, loss {loss:.3f}, {seconds:.0f} s"
            print(f"{start}{line}", end=end, file=sys.stderr, flush=True)
