"""Whether the displacements of windows can be predicted, told from a few thousand of the weights.

A basis of K displacements is K copies of the weights.  Where no displacement says anything of the next, as on one pass
over text, they are kept for nothing.  So on large models a window is at first seen through ``NUM_SAMPLED`` weights
drawn once, and asked one thing: does the displacement that has just been made go on with those before it?

    c = cos(s_w, s_(w-2) + s_(w-3) + s_(w-4) + s_(w-5))

The neighbour s_(w-1) is left out because it shares a mean with s_w, whose noise would count as agreement against it.
Displacements are predictable where the mean of the last three c is at least ``PREDICTABLE``, that is, where half of
their square goes along the drift.  Sampling adds noise of 1 / sqrt(NUM_SAMPLED) = 0.016 to a cosine.  On text c is 0.1
to 0.2 (gpt 0.3M), on full batches above 0.9.

Shape letters: ``S`` weights sampled.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import StateDict
from ..weights import algebra as weights
from ..weights.shards import total_over

#: Weights that are looked at.
NUM_SAMPLED = 4096
#: Least mean of the last NUM_COSINES cosines at which a basis is worth its memory; below RELEASED it is given back.
PREDICTABLE, RELEASED, NUM_COSINES = 0.7, 0.5, 3
#: Proposals in a row that were not accepted, after which a basis does not pay.
MAX_REFUSED = 8
#: Windows that then pass before it may be taken again.
PAUSE = 20
#: Displacements before the last one that make the drift, and the one that is left out.
_FIRST, _LAST = 5, 1


class Sketch:
    """Window means of a sample of the weights, and what their displacements have in common."""

    def __init__(self, parameters: Sequence[Tensor], seed: int = 0) -> None:
        """Draw the sample; each tensor has its share of it, and one number at least.

        Args:
            parameters: Whose weights are seen.
            seed: Of the draw: the same for every run of a model.
        """
        generator = torch.Generator().manual_seed(seed)
        self._parameters = list(parameters)
        total = max(sum(p.numel() for p in parameters), 1)
        shares = [min(p.numel(), max(1, round(NUM_SAMPLED * p.numel() / total))) for p in parameters]
        self._places = [
            torch.randint(p.numel(), (n,), generator=generator, device="cpu").to(p.device) if n else torch.zeros(0)
            for p, n in zip(parameters, shares, strict=True)
        ]
        self._sum: Tensor | None = None  # (S,) over the open window
        self._mean: Tensor | None = None  # (S,) of the last one
        self._displacements: deque[Tensor] = deque(maxlen=_FIRST)
        self.cosines: deque[float] = deque(maxlen=NUM_COSINES)
        self._num_refused = 0
        self._num_pause = 0

    @torch.no_grad()
    def add_step(self) -> None:
        """Add the weights as they are."""
        pieces = [
            torch.take(p, place).to(torch.float32)
            for p, place in zip(self._parameters, self._places, strict=True)
            if len(place)
        ]
        sample = torch.cat([piece.to(pieces[0].device) for piece in pieces]) if pieces else torch.zeros(0)
        self._sum = sample if self._sum is None else self._sum.add_(sample)

    @torch.no_grad()
    def close_window(self, num_steps: int, *, jumped: bool) -> None:
        """A window is full: compare its displacement with those before.

        Args:
            num_steps: Of the window.
            jumped: The weights were moved since the window before by a jump: that is no displacement of training.
        """
        self._num_pause = max(self._num_pause - 1, 0)
        if self._sum is None:
            return
        mean, before = self._sum / num_steps, self._mean
        self._sum, self._mean = None, mean
        if before is None or jumped:
            return
        s = mean - before
        if len(self._displacements) == _FIRST:
            drift = torch.stack(list(self._displacements)[:-_LAST]).sum(dim=0)
            found = weights.on_host([torch.dot(s, drift), torch.dot(s, s), torch.dot(drift, drift)])
            dots = total_over(self._parameters)(found).tolist()
            size = math.sqrt(dots[1] * dots[2])
            self.cosines.append(dots[0] / size if size > 0 and math.isfinite(size) else 0.0)
        self._displacements.append(s)

    def on_verdict(self, accepted: bool) -> None:
        """A proposal was judged."""
        self._num_refused = 0 if accepted else self._num_refused + 1

    @property
    def predictable(self) -> bool:
        """Whether a basis would be worth its memory."""
        return self._num_pause == 0 and len(self.cosines) == NUM_COSINES and self._mean_cosine >= PREDICTABLE

    @property
    def disappoints(self) -> bool:
        """Whether a basis that was taken is not worth its memory any more."""
        unlike = len(self.cosines) == NUM_COSINES and self._mean_cosine < RELEASED
        return unlike or self._num_refused >= MAX_REFUSED

    @property
    def _mean_cosine(self) -> float:
        return sum(self.cosines) / len(self.cosines)

    def pause(self) -> None:
        """The basis was given back: for some windows nothing is promised."""
        self._num_pause, self._num_refused = PAUSE, 0

    def restart_window(self) -> None:
        """Forget the open window."""
        self._sum = None

    def restart(self) -> None:
        """Forget everything: the weights are others than those that were seen."""
        self._sum = self._mean = None
        self._displacements.clear()
        self.cosines.clear()

    def memory_bytes(self) -> int:
        """Bytes on the weights' devices."""
        held = [*self._places, *self._displacements, *(t for t in (self._sum, self._mean) if t is not None)]
        return sum(t.numel() * t.element_size() for t in held)

    def state_dict(self) -> StateDict:
        """Plain containers; the sample is drawn again."""
        return {
            "sum": self._sum, "mean": self._mean, "displacements": list(self._displacements),
            "cosines": list(self.cosines), "num_refused": self._num_refused, "num_pause": self._num_pause,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        device = self._places[0].device

        def placed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, copy=True)

        self._sum, self._mean = placed(state["sum"]), placed(state["mean"])
        self._displacements = deque((t.to(device, copy=True) for t in state["displacements"]), maxlen=_FIRST)
        self.cosines = deque(state["cosines"], maxlen=NUM_COSINES)
        self._num_refused, self._num_pause = state["num_refused"], state["num_pause"]
