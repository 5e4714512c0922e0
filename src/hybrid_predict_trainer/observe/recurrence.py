"""Whether the data come round again: several epochs over the same samples.

Where they do, the training loss cannot tell a faster start from a faster overfitting, so nothing may be raised on its
word.  A sample is known again by a hash of its own numbers, whatever batch it comes in and in whatever order.  Only
samples whose hash falls into a class are remembered, and when there are too many the class is halved, so that memory
and time are bounded and the share of samples seen again is estimated without bias.  Sequences of tokens are known by
their stretches of ``GRAM`` tokens, wherever in a sequence they stand: windows drawn at random from a text come round
without ever being equal.

What is not seen: samples that are changed every time (augmentation), data that never pass through the batch as
tensors, and batches that are on an accelerator already, because reading them would make every step wait.  There
:meth:`~hybrid_predict_trainer.HybridTrainer.fit` still knows the length of a loader that it goes round.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..records import StateDict
from .batches import tensors

#: Hashes remembered at most; from there on the class is halved.
CAPACITY = 4096
#: Samples of one batch that are hashed, sequences of one batch that are, and numbers of a sample.
MAX_SAMPLES, MAX_SEQUENCES, MAX_NUMBERS = 1024, 16, 32
#: Tokens of a stretch: long enough that ordinary text hardly repeats one by chance; and one of so many that counts.
GRAM, ONE_OF = 48, 16
#: Batches that are looked at one by one, and hashes until which all are; later one of ``EVERY``, without a pattern: a
#: regular one would meet other batches in each epoch for as long as an epoch is no multiple of it.
NUM_FIRST, FIRST_HASHES, EVERY = 8, 1024, 4
#: Share of the newest ``RECENT`` hashes that were known, from which on data come round.  In a second epoch it is the
#: share of the first that was looked at, 1 / EVERY; code repeats a tenth of its stretches by itself.
SHARE, RECENT = 0.2, 256

_MASK = (1 << 62) - 1


class Recurrence:
    """Hashes of samples seen, and how many were seen before."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self.recurs = False  # data come round again; stays
        self._known: set[int] = set()
        self._classes = 1  # a hash is remembered if it is 0 modulo this
        self._recent: list[bool] = []  # newest last: was it known?
        self._num_batches = self._num_hashed = 0

    def see(self, batch: Any) -> None:
        """Look at a batch, if it is its turn."""
        if self.recurs:
            return
        first = self._num_batches < NUM_FIRST or self._num_hashed < FIRST_HASHES
        turn = first or _scattered(self._num_batches) % EVERY == 0
        self._num_batches += 1
        if not turn:
            return
        found = hashes(batch, self._classes)
        self._num_hashed += len(found)
        known = [h in self._known for h in found]
        self._recent = [*self._recent, *known][-RECENT:]
        self._known.update(found)
        while len(self._known) > CAPACITY:
            self._classes *= 2
            self._known = {h for h in self._known if h % self._classes == 0}
        self.recurs = sum(self._recent) >= SHARE * RECENT

    def announce(self) -> None:
        """Whoever holds the loader says that it goes round."""
        self.recurs = True

    def state_dict(self) -> StateDict:
        """Plain numbers."""
        return {
            "recurs": self.recurs, "known": sorted(self._known), "classes": self._classes,
            "recent": list(self._recent), "num_batches": self._num_batches,
            "num_hashed": self._num_hashed,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.recurs, self._classes = state["recurs"], state["classes"]
        self._num_batches, self._num_hashed = state["num_batches"], state["num_hashed"]
        self._known, self._recent = set(state["known"]), list(state["recent"])


def hashes(batch: Any, classes: int = 1) -> list[int]:
    """Different hashes of a batch's samples, or of their stretches of tokens; none where there is nothing to go by.

    Args:
        batch: As for the gate; the largest tensor stands for the samples.
        classes: Only hashes that are 0 modulo this.
    """
    candidates = [t for t in tensors(batch) if t.dim() >= 1 and t.numel() > 1 and t.layout is torch.strided]
    if not candidates:
        return []
    largest = max(candidates, key=Tensor.numel).detach()
    if largest.device.type != "cpu":  # reading it would make every step wait for the device
        return []
    tokens = not (largest.is_floating_point() or largest.is_complex() or largest.dtype is torch.bool)
    try:
        stretches = tokens and largest.dim() == 2 and largest.shape[1] > GRAM
        found = _of_stretches(largest) if stretches else _of_samples(largest)
        return list(dict.fromkeys(found[found % classes == 0].tolist()))
    except (RuntimeError, TypeError, NotImplementedError):  # a tensor of another kind, without the operations needed
        return []


@torch.no_grad()
def _of_samples(t: Tensor) -> Tensor:
    """One hash per sample, of some of its numbers."""
    t = torch.view_as_real(t) if t.is_complex() else t
    flat = t[:MAX_SAMPLES].reshape(min(t.shape[0], MAX_SAMPLES), -1)
    some = flat[:, :: max(1, flat.shape[1] // MAX_NUMBERS)].cpu()
    bits = some.double().view(torch.int64) if some.is_floating_point() else some.long()
    return _mixed((bits * _factors(bits.shape[1])).sum(1))


@torch.no_grad()
def _of_stretches(t: Tensor) -> Tensor:
    """Hashes of the stretches of a few sequences, wherever they stand."""
    rows = t[:MAX_SEQUENCES].cpu().long()
    hashed = _mixed((rows.unfold(1, GRAM, 1) * _factors(GRAM)).sum(2)).reshape(-1)
    return hashed[hashed % ONE_OF == 0] // ONE_OF


def _mixed(h: Tensor) -> Tensor:
    """Non-negative, the high bits brought down."""
    return (h ^ (h >> 31) ^ (h >> 17)) & _MASK


def _scattered(n: int) -> int:
    """A number without a pattern from n (the finalizer of splitmix64)."""
    n = (n * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    n = ((n ^ (n >> 30)) * 0xBF58476D1CE4E5B9) & ((1 << 64) - 1)
    return n ^ (n >> 31)


@lru_cache(maxsize=64)
def _factors(num: int) -> Tensor:
    """(num,) odd numbers without a pattern; the same for ever."""
    generator = torch.Generator().manual_seed(num)
    return torch.randint(1 << 40, 1 << 62, (num,), generator=generator) | 1
