"""Losses of candidates: measured without a trace, on the whole batch or on pieces that are known to be pieces.

A batch is cut only after a look whether it may be: the losses of two halves, weighted by what they hold, must give the
loss of the whole to rounding.  That fails where inputs would be paired with the wrong labels, where time and not the
batch comes first, where samples are compared with one another or the loss counts on its batch size; such a batch is
looked at as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..cost import FORWARD_UNITS
from ..keep.failures import Place
from ..keep.isolation import Isolation, Mode, is_compiled, isolated, uses_batch_statistics
from ..keep.loss_modules import modules_beside
from ..notices import warn
from ..observe import batches
from ..records import Reason
from .exactness import Agreement, measure

if TYPE_CHECKING:
    from ..cycle.state import Run

T = TypeVar("T")

#: Relative difference of the whole's loss and that of its pieces that is rounding; the second in half precision.
ROUNDING, ROUNDING_HALF = 1e-4, 1e-2
#: Layouts of batches that are looked at: with more of them a batch is never cut.
MAX_LAYOUTS = 16
#: Labels that most losses leave out of their mean.
IGNORED = -100


def loss_of(run: Run, batch: Any) -> Tensor:
    """Loss of a batch, shape (): the function gets containers of its own, and tensors too if it writes into them.

    Raises:
        TypeError: it is not a scalar tensor.
    """
    own = batches.copied(batch, tensors_too=run.judge.evaluation.loss_writes is not False)
    loss = run.judge.evaluation.loss(own)
    if run.judge.evaluation.loss_writes is None:
        run.judge.evaluation.note_writes(any(not t.is_inference() and t._version > 0 for t in batches.tensors(own)))
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError("loss_fn must return a scalar tensor")
    return loss.reshape(())


def losses_of(run: Run, pieces: Sequence[Any], isolation: Isolation) -> list[float]:
    """Losses of pieces one after the other, each call of this function under the same random numbers."""
    isolation.rewind()
    known = run.judge.evaluation.needs_grad_mode
    losses = [loss_of(run, piece) for piece in pieces]
    if (
        run.judge.evaluation.needs_grad_mode is not known
    ):  # found out half-way: those before it drew other random numbers
        isolation.rewind()
        losses = [loss_of(run, piece) for piece in pieces]
    found: list[float] = torch.stack(losses).tolist()
    return found


@contextmanager
def _isolated(run: Run, mode: Mode) -> Iterator[Isolation]:
    """A block without a trace, in what the loss function uses beside a compiled model as well: no hook sees that."""
    with isolated(run.subject.model, mode) as isolation:
        for module in modules_beside(run.subject.loss_fn, run.subject.model) if is_compiled(run.subject.model) else ():
            isolation.met(module, ())
        yield isolation


def is_memory_error(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def attempt(run: Run, work: Callable[[Isolation], T]) -> T:
    """Do ``work`` in a block without a trace.

    Where losses are exact it runs in the modes of the real steps.  Where they are noisy dropout is off, which takes out
    noise; a model that cannot be evaluated so (auxiliary heads that are there in training only) is left in its modes.
    """
    modes: tuple[Mode, ...] = (
        ("training",) if run.full_batch or run.judge.evaluation.quiet_fails else ("quiet", "training")
    )
    for mode in modes:
        try:
            with _isolated(run, mode) as isolation:
                result = work(isolation)
        except Exception as error:
            if mode == modes[-1] or is_memory_error(error):
                raise
        else:
            if mode != modes[0]:
                run.judge.evaluation.note_quiet_fails()
            return result
    raise AssertionError("unreachable")


def check_exactness(run: Run, batch: Any) -> float:
    """Measure whether losses are exact where that is about to matter; returns forwards spent."""
    setting = run.config.gate.exact
    if not run.windows.observing or setting == "never" or run.config.gate.overhead_budget_exact == 0:
        return 0.0
    asked = run.judge.exactness.agreed is None if setting == "always" else run.batches.same
    if not asked or run.failures.exhausted(Place.GATE):
        return 0.0
    if not run.judge.exactness.due(run.meter.num_attempted_steps, run.subject.model):
        return 0.0
    try:
        with _isolated(run, "training") as isolation:
            agreement = measure(lambda: float(loss_of(run, batch)), isolation.rewind, on_cpu=run.subject.on_cpu)
    except Exception as error:
        run.failures.note(Place.GATE, error)
        agreement = Agreement(exact=False)
    run.judge.exactness.note(agreement, run.meter.num_attempted_steps, run.subject.model)
    run.meter.add_forwards(agreement.num_forward)
    run.judge.ledger.observe(agreement.num_forward * FORWARD_UNITS)
    if setting == "always" and not agreement.exact:
        warn(
            'gate.exact = "always", but two losses of the same batch differ: dropout, random numbers in the loss or '
            "noise are taken for progress",
            stacklevel=3,
        )
    return agreement.num_forward


# ---- pieces ---------------------------------------------------------------------------------------


def pieces_of(run: Run, batch: Any) -> tuple[list[Any], list[Any], bool] | None:
    """What the noisy gate chooses a length on, what it judges on, and whether these are two halves.

    None: fewer than two pieces to judge on, which no test could say anything of.
    """
    size = batches.num_samples(batch)
    least = 2 if uses_batch_statistics(run.subject.model) else 1
    split = size >= 4 * least
    middle = size // 2 if split else 0
    judged = batches.chunks(batch, middle, size, run.config.gate.max_chunks, least) if size >= 2 * least else []
    if len(judged) < 2:
        return None
    return [batches.narrow(batch, 0, middle) if split else batch], judged, split


def objection(run: Run, batch: Any) -> tuple[Reason | None, float]:
    """Why the pieces of a batch cannot be judged, and forwards spent: it is measured once per layout, with two."""
    layout = batches.layout(batch)
    forwards = 0.0
    if layout not in run.judge.evaluation.cuts and len(run.judge.evaluation.cuts) < MAX_LAYOUTS:
        measured, forwards = _measure_cut(run, batch), 2.0
        if measured is None:
            return Reason.LOSS_NOT_FINITE, forwards
        run.judge.evaluation.note_cut(layout, measured)
    return None if run.judge.evaluation.cuts.get(layout, False) else Reason.CANNOT_CUT, forwards


def _measure_cut(run: Run, batch: Any) -> bool | None:
    """Whether the halves of a batch have its loss; None where that is not finite and tells nothing."""
    size = batches.num_samples(batch)
    halves = [batches.narrow(batch, 0, size // 2), batches.narrow(batch, size // 2, size)]
    try:  # in evaluation a loss has no batch statistics and no random numbers
        whole, parts = _losses(run, batch, halves, "evaluation")
    except Exception as error:
        if is_memory_error(error):
            raise
        whole, parts = _losses(run, batch, halves, "training")
    if not math.isfinite(whole):
        return None
    if parts is None:
        return False
    tolerance = (ROUNDING_HALF if _in_half(run) else ROUNDING) * max(abs(whole), *(abs(p) for p in parts))
    means = [sum(w * p for w, p in zip(ws, parts, strict=True)) / sum(ws) for ws in _weights(halves) if sum(ws) > 0]
    return any(abs(found - whole) <= tolerance for found in (*means, sum(parts)))


def _losses(run: Run, batch: Any, halves: list[Any], mode: Mode) -> tuple[float, list[float] | None]:
    """Loss of the whole and of the halves; None where halves alone raise."""
    with _isolated(run, mode) as isolation:
        whole = losses_of(run, [batch], isolation)[0]
        try:
            parts = losses_of(run, halves, isolation)
        except Exception as error:
            if is_memory_error(error):
                raise
            run.failures.note(Place.PIECES, error)
            return whole, None
        return whole, parts


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


def _in_half(run: Run) -> bool:
    half = (torch.float16, torch.bfloat16)
    device = run.subject.parameters[0].device.type
    return torch.is_autocast_enabled(device) or any(p.dtype in half for p in run.subject.parameters)
