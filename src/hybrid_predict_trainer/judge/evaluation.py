"""Losses of candidates, or their negated scores: measured without a trace, on the whole batch or on pieces of it.

A batch is cut only after a look whether it may be: the losses of two halves, weighted by what they hold, must give the
loss of the whole to rounding.  That fails where inputs would be paired with the wrong labels, where time and not the
batch comes first, where samples are compared with one another or the loss counts on its batch size; such a batch is
looked at as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..keep.failures import Failures, Place
from ..keep.isolation import Isolation, Known, Mode, isolated, uses_batch_statistics
from ..keep.loss_modules import Reach
from ..keep.subject import LossFn, NegatedScore, Subject
from ..observe import batches
from ..records import Reason, StateDict
from ..weights.algebra import without_graph
from .exactness import Agreement, measure

T = TypeVar("T")

#: Relative difference of the whole's loss and that of its pieces that is rounding; the second in half precision.
ROUNDING, ROUNDING_HALF = 1e-4, 1e-2
#: Layouts of batches that are looked at: with more of them a batch is never cut.
MAX_LAYOUTS = 16
#: Labels that most losses leave out of their mean.
IGNORED = -100


class Evaluation:
    """How losses of this run can be had without a trace; found out when the first ones are asked for.

    Attributes:
        needs_grad_mode: The loss function differentiates inside (physics-informed losses).
        quiet_fails: The loss can be had in the modes of training only.
        loss_writes: The loss function writes into its batch; None: nobody looked yet.
        cuts: Whether the pieces of a batch of that layout are pieces of its loss.
    """

    def __init__(self, subject: Subject, failures: Failures) -> None:
        """Nothing was evaluated yet; what raises is counted in ``failures``."""
        self._subject, self._failures = subject, failures
        self._score: LossFn | None = None if subject.judge_fn is None else NegatedScore(subject.judge_fn)
        self._known: Known = {}  # what is lasting of the last block
        self._asked: LossFn | None = None  # in place of what is judged by, while something else is evaluated
        self._of_loss, self._of_score = Reach(subject.loss_fn), Reach(self._score)
        self.needs_grad_mode = False
        self.quiet_fails = False
        self.loss_writes: bool | None = None
        self.cuts: dict[str, bool] = {}

    @property
    def _judged(self) -> LossFn:
        """What candidates are compared by: the loss, or where the user has handed in a score the negated one."""
        return self._subject.loss_fn if self._score is None else self._score

    @property
    def _fn(self) -> LossFn:
        return self._judged if self._asked is None else self._asked

    @property
    def _reach(self) -> Reach:
        return self._of_loss if self._fn is self._subject.loss_fn else self._of_score

    def loss(self, batch: Any) -> Tensor:
        """Loss of a batch without a graph; falls back on grad mode for losses that differentiate inside."""
        if not self.needs_grad_mode:
            try:
                return self._loss_without_graph(batch)
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                self.needs_grad_mode = True
        return self._loss_with_graph(batch)

    @without_graph  # not a block: an interruption at its end would leave grad mode off
    def _loss_without_graph(self, batch: Any) -> Tensor:
        return self._fn(self._subject.model, batch).detach()

    @torch.enable_grad()
    def _loss_with_graph(self, batch: Any) -> Tensor:
        return self._fn(self._subject.model, batch).detach()

    def loss_of(self, batch: Any) -> Tensor:
        """Loss of a batch, shape (): the function gets containers of its own, and tensors too if it writes into them.

        Raises:
            TypeError: it is not a scalar tensor.
        """
        try:
            return self._mean_loss_of(batch) if self._subject.ranks.sharded else self._loss_of(batch)
        finally:
            self._subject.reshard()

    def _mean_loss_of(self, batch: Any) -> Tensor:
        """A forward gathers weights from all ranks: they make equally many, and what one raises all of them raise."""
        found: list[Tensor] = []

        def value() -> list[float]:
            found.append(self._loss_of(batch))
            return [float(found[0])]

        (mean,) = self._subject.ranks.means(value)
        return torch.full_like(found[0], mean)

    def _loss_of(self, batch: Any) -> Tensor:
        own = batches.copied(batch, tensors_too=self.loss_writes is not False)
        loss = self.loss(own)
        if self.loss_writes is None:
            self.on_writes(any(not t.is_inference() and t._version > 0 for t in batches.tensors(own)))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError("loss_fn must return a scalar tensor")
        return loss.reshape(())

    def losses_of(self, pieces: Sequence[Any], isolation: Isolation) -> list[float]:
        """Losses of pieces one after the other, each call of this function under the same random numbers."""
        isolation.begin()
        known = self.needs_grad_mode
        losses = [self.loss_of(piece) for piece in pieces]
        if self.needs_grad_mode is not known:  # found out half-way: those before it drew other random numbers
            isolation.rewind()
            losses = [self.loss_of(piece) for piece in pieces]
        if len(losses) == 1:
            return [losses[0].item()]
        found: list[float] = torch.stack(losses).tolist()
        return found

    def shared_losses_of(
        self, pieces: Sequence[Any], isolation: Isolation, before: Callable[[], None] = lambda: None
    ) -> list[float]:
        """Means over ranks of :meth:`losses_of`, once ``before`` was called; raises on all ranks if one raises."""

        def losses() -> list[float]:
            before()
            return self.losses_of(pieces, isolation)

        return self._subject.ranks.means(losses)

    @contextmanager
    def _isolated(self, mode: Mode) -> Iterator[Isolation]:
        """A block without a trace."""
        with isolated(self._subject.model, mode, self._known, self._reach) as isolation:
            self._known = isolation.lasting
            yield isolation

    def attempt(self, work: Callable[[Isolation], T], *, exact: bool) -> T:
        """Do ``work`` in a block without a trace.

        Where losses are exact it runs in the modes of the real steps.  Where they are noisy dropout is off, which takes
        out noise; a model that cannot be evaluated so (auxiliary heads that are there in training only) is left in its
        modes.
        """
        modes: tuple[Mode, ...] = ("training",) if exact or self.quiet_fails else ("quiet", "training")
        for mode in modes:
            try:
                with self._isolated(mode) as isolation:
                    result = work(isolation)
            except Exception as error:
                if mode == modes[-1] or is_memory_error(error):
                    raise
            else:
                if mode != modes[0]:
                    self.on_quiet_fails()
                return result
        raise AssertionError("unreachable")

    # ---- pieces -------------------------------------------------------------------------------------

    def objection(self, batch: Any) -> tuple[Reason | None, float]:
        """Why the pieces of a batch cannot be judged, and forwards spent: it is measured once per layout, with two."""
        layout = batches.layout(batch)
        forwards = 0.0
        unknown = layout not in self.cuts and len(self.cuts) < MAX_LAYOUTS
        if self._subject.ranks.sharded:
            unknown = self._subject.ranks.any(unknown)
        if unknown:
            measured, forwards = self._measure_cut(batch), 2.0
            if measured is None:
                return Reason.LOSS_NOT_FINITE, forwards
            self.on_cut(layout, measured)
        return None if self.cuts.get(layout, False) else Reason.CANNOT_CUT, forwards

    def _measure_cut(self, batch: Any) -> bool | None:
        """Whether the halves of a batch have its loss; None where that is not finite and tells nothing."""
        size = batches.num_samples(batch)
        halves = [batches.narrow(batch, 0, size // 2), batches.narrow(batch, size // 2, size)]
        try:  # in evaluation a loss has no batch statistics and no random numbers
            whole, parts = self._losses(batch, halves, "evaluation")
        except Exception as error:
            if is_memory_error(error):
                raise
            whole, parts = self._losses(batch, halves, "training")
        if not math.isfinite(whole):
            return None
        if parts is None:
            return False
        tolerance = (ROUNDING_HALF if self._in_half() else ROUNDING) * max(abs(whole), *(abs(p) for p in parts))
        means = [sum(w * p for w, p in zip(ws, parts, strict=True)) / sum(ws) for ws in _weights(halves) if sum(ws) > 0]
        return any(abs(found - whole) <= tolerance for found in (*means, sum(parts)))

    def _losses(self, batch: Any, halves: list[Any], mode: Mode) -> tuple[float, list[float] | None]:
        """Loss of the whole and of the halves; None where halves alone raise."""
        with self._isolated(mode) as isolation:
            whole = self.losses_of([batch], isolation)[0]
            try:
                parts = self.losses_of(halves, isolation)
            except Exception as error:
                if is_memory_error(error):
                    raise
                self._failures.note(Place.PIECES, error)
                return whole, None
            return whole, parts

    def _in_half(self) -> bool:
        half = (torch.float16, torch.bfloat16)
        device = self._subject.parameters[0].device.type
        return torch.is_autocast_enabled(device) or any(p.dtype in half for p in self._subject.parameters)

    # ---- what was found out, and state ---------------------------------------------------------------

    def agreement(self, batch: Any) -> Agreement:
        """Evaluate a batch more than once, as the real steps do, and say what the losses have in common.

        Where jumps are judged by scores, these have to be exact, too.
        """
        if self._subject.judge_fn is not None:
            trained = self._agreement_by(self._subject.loss_fn, batch)
            if not trained.exact:
                return trained
            judged = self._agreement_by(self._judged, batch)
            return replace(judged, num_forward=trained.num_forward + judged.num_forward)
        return self._agreement_by(self._judged, batch)

    def _agreement_by(self, fn: LossFn, batch: Any) -> Agreement:
        self._asked = fn
        try:
            return self._agreement(batch)
        finally:
            self._asked = None

    def _agreement(self, batch: Any) -> Agreement:
        with self._isolated("training") as isolation:
            evaluate = lambda: float(self.loss_of(batch))  # noqa: E731
            return measure(evaluate, isolation.rewind, on_cpu=self._subject.on_cpu)

    def on_quiet_fails(self) -> None:
        """A quiet forward raised where one in the modes of training did not."""
        self.quiet_fails = True

    def on_writes(self, writes: bool) -> None:
        """The loss function was seen to write into its batch, or not to."""
        self.loss_writes = writes

    def on_cut(self, layout: str, holds: bool) -> None:
        """The losses of two halves of a batch of this layout give the whole's, or do not."""
        self.cuts[layout] = holds

    _NAMES = ("needs_grad_mode", "quiet_fails", "loss_writes")

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {"cuts": dict(self.cuts), **{name: getattr(self, name) for name in self._NAMES}}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.cuts = dict(state["cuts"])
        for name in self._NAMES:
            setattr(self, name, state[name])


def is_memory_error(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


# ---- pieces ---------------------------------------------------------------------------------------


def pieces_of(model: nn.Module, batch: Any, max_chunks: int) -> tuple[list[Any], list[Any], bool] | None:
    """What the noisy gate chooses a length on, what it judges on, and whether these are two halves.

    None: fewer than two pieces to judge on, which no test could say anything of.
    """
    size = batches.num_samples(batch)
    least = 2 if uses_batch_statistics(model) else 1
    split = size >= 4 * least
    middle = size // 2 if split else 0
    judged = batches.chunks(batch, middle, size, max_chunks, least) if size >= 2 * least else []
    if len(judged) < 2:
        return None
    return [batches.narrow(batch, 0, middle) if split else batch], judged, split


def _weights(halves: list[Any]) -> list[list[float]]:
    """What a loss may weigh its halves by: samples, labels that are not ignored, entries of a mask."""
    found = [[float(batches.num_samples(half)) for half in halves]]
    for labels in zip(*(list(batches.tensors(half)) for half in halves), strict=True):
        if labels[0].is_floating_point() or labels[0].is_complex():
            masks = [t for t in labels if t.dim() and bool(((t == 0) | (t == 1)).all())]
        else:
            masks = [t != IGNORED if bool((t == IGNORED).any()) else t for t in labels if t.dim()]
            masks = masks if all(bool(((m == 0) | (m == 1)).all()) for m in masks) else []
            masks = masks or [t != IGNORED for t in labels if t.dim()]
        if len(masks) == len(labels):
            found.append([float(m.sum()) for m in masks])
            if masks[0].dim() > 1:  # models that predict the next token leave the first one out
                found.append([float(m[:, 1:].sum()) for m in masks])
    return found
