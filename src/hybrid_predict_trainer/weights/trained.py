"""Which weights may be moved now, and whether somebody else has moved them.

Only what the optimizer trains may be moved by anything else of ours: a parameter that is frozen, has no gradient, has
left the optimizer or stands in a group with rate 0 is left where it is, bit for bit, from the step it happens on.
What is remembered of it is of no use any more: when it is trained again, it begins anew.

And weights that change between two steps were changed by the user: best weights loaded back, a projection, an average
swapped in.  What is remembered of the weights before is wrong then.  Three signs tell, without a pass over the weights:
the version that every in-place operation counts up, the address (``p.data = ...`` changes it and no version), and a
sample of values (``p.data.clamp_()`` changes neither).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from ..records import StateDict
from .algebra import Move, Tensors, without_graph
from .real_views import owner
from .shards import local

#: Times that a parameter may stop being trained and come back with a fresh memory: one that comes and goes (an expert
#: that few batches reach) would never have any, and is left to the optimizer alone.
MAX_RETURNS = 3
#: Values per tensor that are compared.
SAMPLE = 16
_OF_NUMPY = frozenset({torch.float32, torch.float64})
_PLAIN_KINDS = {nn.Parameter}
#: Versions and addresses of parameters.
Signs = tuple[list[int], list[int]]
#: Samples of one dtype on one device, as views; arrays where numpy reads them, in a tenth of the time.
Views = Tensors | list[NDArray[Any]]


class Trained:
    """Which parameters the optimizer trains, step by step."""

    def __init__(self, parameters: Sequence[Tensor], optimizer: Optimizer) -> None:
        """Nothing was trained yet; all may be moved.

        Args:
            parameters: Of the run, in its order; the optimizer may hold more.
            optimizer: Whose groups are asked at every step: they may change.
        """
        n = len(parameters)
        self._parameters, self._optimizer = [owner(p) for p in parameters], optimizer
        self.movable = [True] * n  # by us, after the step that was looked at last
        self._trained: list[bool] | None = None  # at the last step that trained anything; None: there was none
        self._ever = [False] * n
        self._num_returns = [0] * n
        self._rates: dict[int, tuple[int, int, bool]] = {}  # rates on a device: id -> address, version, whether not 0

    @property
    def num_left_alone(self) -> int:
        """Parameters that only the optimizer moves, or nobody."""
        return self.movable.count(False)

    def look(self) -> list[int]:
        """After a backward pass: find out what the optimizer is about to train.

        Returns:
            Places of the parameters whose memory is of no use any more: trained once and not now, or now again.
        """
        rates = self._members()
        trained = [p.grad is not None and p.requires_grad and rates.get(id(p), False) for p in self._parameters]
        return self._changed(trained)

    def look_ahead(self) -> list[int]:
        """Before a step: as :meth:`look`, as far as can be told without gradients."""
        before = self._trained
        if before is None:
            return []
        rates = self._members()
        trained = [
            was and p.requires_grad and rates.get(id(p), False) for was, p in zip(before, self._parameters, strict=True)
        ]
        return self._changed(trained)

    def _changed(self, trained: list[bool]) -> list[int]:
        before = self._trained
        if trained == before:
            if not any(self.movable):
                self._allow(trained)
            return []
        if not any(trained):  # a rate that is 0 for all, or a loss of other weights: a pause, nothing is forgotten
            self.movable = trained
            return []
        changed = []
        for i, now in enumerate(trained):
            if before is not None and now != before[i] and self._ever[i]:
                changed.append(i)
                self._num_returns[i] += now
            self._ever[i] = self._ever[i] or now
        self._trained = trained
        self._allow(trained)
        return [i for i in changed if self._num_returns[i] <= MAX_RETURNS]

    def _allow(self, trained: list[bool]) -> None:
        self.movable = [now and n <= MAX_RETURNS for now, n in zip(trained, self._num_returns, strict=True)]

    def _members(self) -> dict[int, bool]:
        """id of every parameter of the optimizer -> whether its group has a rate."""
        found: dict[int, bool] = {}
        for group in self._optimizer.param_groups:
            rate = group.get("lr", 1.0)
            moves = self._read(rate) if isinstance(rate, Tensor) else rate != 0
            found.update(dict.fromkeys(map(id, group["params"]), moves))
        return found

    def _read(self, rate: Tensor) -> bool:
        """Whether a rate that is a tensor differs from 0; a device is asked when the rate has changed."""
        sign = (rate.data_ptr(), rate._version)
        known = self._rates.get(id(rate))
        if known is None or known[:2] != sign or rate.device.type == "cpu":
            known = self._rates[id(rate)] = (*sign, bool(rate != 0))
        return known[2]

    # ---- lists of tensors, one per parameter --------------------------------------------------------

    def only(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of one tensor per parameter those whose parameter may be moved."""
        if all(self.movable):
            return tensors
        return [t for t, may in zip(tensors, self.movable, strict=True) if may]

    def masked(self, deltas: Move) -> Move:
        """A move with zeros where nothing may be moved."""
        if all(self.movable):
            return deltas
        return [d if may else torch.zeros_like(d) for d, may in zip(deltas, self.movable, strict=True)]

    # ---- state ----------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Who is trained, was ever, and how often it came back."""
        return {
            "movable": list(self.movable), "trained": None if self._trained is None else list(self._trained),
            "ever": list(self._ever), "num_returns": list(self._num_returns),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.movable, self._ever = [bool(v) for v in state["movable"]], [bool(v) for v in state["ever"]]
        self._trained = None if state["trained"] is None else [bool(v) for v in state["trained"]]
        self._num_returns = [int(v) for v in state["num_returns"]]


class Write(IntEnum):
    """What has become of the weights since they were recorded."""

    NONE = 0
    #: Every parameter was written to, and the sample is as before: an average was swapped in and out again.
    SWAPPED = 1
    #: Some were written to, the sample is as before: perhaps changed in few places.
    TOUCHED = 2
    #: They are others.
    CHANGED = 3


class Writes:
    """Notices what is written to weights between two steps of a run."""

    def __init__(self, parameters: Sequence[Tensor], every: int = 1) -> None:
        """Nothing is recorded yet.

        Args:
            parameters: All that are watched.
            every: Looks per comparison of values where neither version nor address has changed: on an accelerator
                the comparison waits for the device.
        """
        self._owners, self._every = [owner(p) for p in parameters], every
        self._signs: Signs | None = None
        self._views: list[Views] = []  # samples that share the weights' memory, by dtype and device
        self._sample: list[Tensor | bytes] = []
        self._num_looks = 0

    @without_graph
    def record(self) -> None:
        """The weights are as the run left them."""
        signs = signs_of(self._owners)
        if self._signs is None or signs[1] != self._signs[1]:
            self._views = _views([local(p) for p in self._owners])
        self._signs, self._sample = signs, [_values(views) for views in self._views]

    def digest(self) -> int:
        """Of the sample as it was recorded, where it is in host memory."""
        found = 0
        for values in self._sample:
            found = zlib.crc32(values, found) if isinstance(values, bytes) else found
        return found

    @without_graph
    def look(self) -> Write:
        """Before a step: what has been written since :meth:`record`."""
        self._num_looks += 1
        if self._signs is None:
            return Write.NONE
        now = signs_of(self._owners)
        num_touched = 0
        if now != self._signs:
            num_touched = sum(
                [a != b for a, b in zip(zip(*now, strict=True), zip(*self._signs, strict=True), strict=True)]
            )
        if not num_touched and self._num_looks % self._every:
            return Write.NONE
        views = _views([local(p) for p in self._owners]) if now[1] != self._signs[1] else self._views
        if any(not _same(_values(now), old) for now, old in zip(views, self._sample, strict=True)):
            return Write.CHANGED
        if num_touched == len(self._owners):
            return Write.SWAPPED
        return Write.TOUCHED if num_touched else Write.NONE


def signs_of(parameters: Sequence[Tensor]) -> Signs:
    """:func:`sign` of every parameter: all versions, all addresses."""
    if set(map(type, parameters)) == _PLAIN_KINDS:  # of plain ones, in a third of the time
        return [p._version for p in parameters], [p.data_ptr() for p in parameters]
    signs = [sign(p) for p in parameters]
    return [version for version, _ in signs], [address for _, address in signs]


def sign(parameter: Tensor) -> tuple[int, int]:
    """Version and address; of a sharded parameter, which counts what goes through it alone, its part's as well."""
    part = local(parameter)
    if part is parameter:
        return parameter._version, parameter.data_ptr()
    return parameter._version + part._version, part.data_ptr()


def _views(parameters: Sequence[Tensor]) -> list[Views]:
    """Up to ``SAMPLE`` values of each tensor, spread over its memory, as views; those of one kind together."""
    found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in parameters:
        if type(p.data) is not Tensor or p.numel() == 0:  # a subclass says itself what its values are
            continue
        last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
        step = max(p.numel() // SAMPLE, 1) if last + 1 == p.numel() else last + 1  # with gaps: the first value alone
        count = min(SAMPLE, p.numel()) if last + 1 == p.numel() else 1
        view = p.detach().as_strided((count,), (step,), p.storage_offset())
        found.setdefault((p.dtype, p.device), []).append(view)
    return [_as_numpy(views) if kind in _OF_NUMPY and device.type == "cpu" else views
            for (kind, device), views in found.items()]  # fmt: skip


def _as_numpy(views: Tensors) -> Views:
    return views if any(v.is_neg() for v in views) else [v.numpy() for v in views]


def _values(views: Views) -> Tensor | bytes:
    """What the views show; as bytes, which are compared in no time, where numpy can read them."""
    if isinstance(views[0], np.ndarray):
        return b"".join([v.tobytes() for v in views])
    values = torch.cat(views)
    return values.numpy().tobytes() if values.device.type == "cpu" and values.dtype in _OF_NUMPY else values


def _same(a: Tensor | bytes, b: Tensor | bytes) -> bool:
    """Bit for bit: NaN is NaN."""
    if isinstance(a, bytes) or isinstance(b, bytes):
        return a == b
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Watch:
    """Which weights may be moved, and whether somebody else has moved them.

    Attributes:
        trained: Which of them the optimizer trains now.
        writes: What others wrote to them.
        hands_off: Why only the optimizer may move weights; None: it is not so.
    """

    def __init__(
        self, parameters: Sequence[Tensor], optimizer: Optimizer, look_every: int = 1, hands_off: str | None = None
    ) -> None:
        """Nothing was trained yet.

        Args:
            parameters: Of the run.
            optimizer: That trains them.
            look_every: Looks for writes are so many steps apart: on an accelerator they wait for the device.
            hands_off: A reason, or None.
        """
        self.trained = Trained(parameters, optimizer)
        self.writes = Writes(parameters, look_every)
        self.hands_off = hands_off

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return self.trained.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`, after the weights: they are the run's own."""
        self.trained.load_state_dict(state)
        self.writes.record()
