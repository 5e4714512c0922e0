"""States of the global random generators, taken and put back."""

from __future__ import annotations

import ctypes
import random
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..records import StateDict


class RandomStates:
    """States of all global generators as they are now, to be put back within the same process."""

    def __init__(self) -> None:
        """Take them; nothing is converted to what a file can hold."""
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy = _NumpyState()
        self._cuda = (
            torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() and torch.cuda.is_available() else None
        )
        self._mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def put_back(self) -> None:
        """Every generator as it was."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        self._numpy.put_back()
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)


class _NumpyState:
    """State of numpy's global generator.

    Reading and writing it take as long as a forward of a small model, so its words are compared where they lie.  While
    no normal number waits in the generator nothing can be drawn from it that leaves them as they are.
    """

    def __init__(self) -> None:
        """Take it; what was taken last is taken again if no word has changed."""
        self._words = _words()
        self._state = _state_with.__wrapped__(None) if self._words is None else _state_with(self._words)
        self._waits = bool(self._state[3])
        if self._waits:
            _state_with.cache_clear()

    def put_back(self) -> None:
        """The generator as it was."""
        if self._waits or self._words is None or _words() != self._words:
            np.random.set_state(self._state)


@lru_cache(maxsize=1)
def _state_with(words: bytes | None) -> Any:
    """The state that these words, the present ones, belong to; None: nobody knows its words."""
    return np.random.get_state(legacy=True)


def _words() -> bytes | None:
    """Words and position of numpy's global generator; None where it is not the Mersenne twister."""
    generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(_address_of(generator), 4 * (624 + 1))


@lru_cache(maxsize=1)
def _address_of(generator: Any) -> Any:
    """Where the words of a generator are; asking takes longer than reading them."""
    return generator.ctypes.state_address


def rng_state() -> StateDict:
    """States of the global generators of torch (all devices), numpy and Python."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: StateDict = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: StateDict) -> None:
    """Inverse of :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        # of another machine's: as many as there are here
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
