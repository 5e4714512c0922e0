"""How what the lookahead remembers is stored between its applications: as it is, narrower, or in host memory.

Two copies of the weights are half of what AdamW's own run holds.  On a large model the drift, which is a mean over
seventy steps, needs no 24 bits: it is kept in 11 with one scale per tensor.  With ``predictor.offload`` both copies
stay in host memory and are fetched when they are used, every third step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..records import StateDict
from ..weights import offload as host


@dataclass(frozen=True, slots=True)
class Narrow:
    """A tensor as float16 multiples of one number, its largest magnitude."""

    numbers: Tensor
    unit: Tensor  # shape ()

    def state_dict(self) -> StateDict:
        """As plain tensors."""
        return {"numbers": self.numbers, "unit": self.unit}

    def wide(self) -> Tensor:
        """In float32."""
        return self.numbers.float().mul_(self.unit)


Stored = Tensor | Narrow


@dataclass(frozen=True, slots=True)
class Storage:
    """A way of storing.

    Attributes:
        narrow: Keep drifts in float16.
        to_host: Keep everything in host memory.
    """

    narrow: bool = False
    to_host: bool = False

    def put(self, tensor: Tensor, old: object = None) -> Tensor:
        """Store a tensor as it is; where it goes to the host, in the memory of one that is needed no more."""
        return host.copied(tensor, old, to_host=True) if self.to_host else tensor

    def put_state(self, state: Tensor | StateDict) -> Stored:
        """Store a drift from a state, as a copy: wide, as of a small model or of format 4, or narrow."""
        if isinstance(state, Tensor):
            return self.put_drift(state.detach().clone())
        narrow = Narrow(*(self.put(state[name].detach().clone()) for name in ("numbers", "unit")))
        return narrow if self.narrow else self.put(narrow.wide())

    def put_drift(self, drift: Tensor, old: object = None) -> Stored:
        """Store a drift; a wide one that was narrow before becomes the same again, bit for bit."""
        if not self.narrow or drift.dtype is not torch.float32:
            return self.put(drift, old)
        before = old if isinstance(old, Narrow) else Narrow(drift, drift)
        unit = drift.abs().amax() if drift.numel() else drift.new_zeros(())
        numbers = (drift / unit.clamp(min=torch.finfo(torch.float32).tiny)).half()
        return Narrow(self.put(numbers, before.numbers), self.put(unit, before.unit))


def fetched(stored: Stored, device: torch.device) -> Tensor:
    """A stored tensor as one computes with it, on a device."""
    if isinstance(stored, Narrow):
        return Narrow(stored.numbers.to(device, non_blocking=True), stored.unit.to(device, non_blocking=True)).wide()
    return stored.to(device, non_blocking=True)


def size_of(stored: Stored) -> int:
    """Bytes."""
    tensors = (stored.numbers, stored.unit) if isinstance(stored, Narrow) else (stored,)
    return sum(t.numel() * t.element_size() for t in tensors)
