"""What is left of a full batch of numbers is asked about by leaving samples out, before jumps would learn its noise.

Where there is a ``val_fn`` it says so itself (:mod:`.jump_check`), and nobody asks here.  A question is a forward and a
backward on the batch, and the kernel of some of its samples; it leaves no trace, and its price is charged.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import BACKWARD_UNITS, FORWARD_UNITS
from ..judge.noise import DAMPINGS, NOISE, residuals_of
from ..keep.isolation import Isolation
from ..numerics.leave_one_out import left_out_error
from ..observe.batches import copied, num_samples, picked
from ..propose.sources import price
from ..propose.sources.graph import nodes_of
from ..propose.sources.jacobian import Linearizer
from ..records import StepOutcome
from ..weights.real_views import all_differentiable
from .handover import MicroBatches
from .state import State
from .withdrawal import end_by_noise, keep

#: Samples of a batch from which on leaving one out says something of all.
ENOUGH_SAMPLES = 48
#: Samples that are looked at: at least, at most, and by what factor fewer where a question would cost more forwards of
#: the whole batch, or hold more memory.
FEWEST_ROWS, MOST_ROWS, FEWER, MOST_FORWARDS, MEMORY_MB = 128, 512, 0.8, 16.0, 128.0
#: Share of a run that questions may cost, and forwards besides where nobody knows how long it is.
SHARE, ALLOWANCE = 0.08, 40.0
#: Factorisations that an inverse is worth, with its own.
FACTORS_OF_INVERSE = 3
#: Kinds of nodes that a model leaves behind which is differentiated inside its loss.
DIFFERENTIATED = "BackwardBackward"


def after_step(run: State, outcome: StepOutcome) -> None:
    """After a step of any phase: remember the loss, as far as it is on the host."""
    verdict = outcome.verdict
    jumped = verdict is not None and verdict.accepted and run.judged_exactly
    loss = verdict.loss_after if jumped and verdict is not None else run.losses.history.loss_ema.mean
    run.judge.noise.see(loss, run.meter.num_jumps_accepted)


def ask_if_due(run: State, batch: Any) -> float:
    """Before a step is decided: ask whether there is more than noise to be learnt, if it is time.

    Returns:
        Forwards spent.
    """
    if not _concerns(run) or not run.judge.noise.due or not _affordable(run):
        return 0.0
    square, usual, once, untold, fitted = _answer(run, batch)
    forwards = usual + once
    run.subject.reshard()
    run.judge.noise.spend(usual)
    run.meter.add_forwards(forwards)
    run.judge.ledger.observe(forwards * FORWARD_UNITS)
    if not (math.isfinite(square) and math.isfinite(untold)):
        run.judge.noise.give_up()
        run.safety.drop_best()
        return forwards
    through = run.judge.noise.take(square, untold, fitted)
    if run.judge.noise.found:
        end_by_noise(run, untold, back=through)
    elif run.subject.can_solve and untold < NOISE:  # closed form may go through decades of the loss at once
        run.safety.keep_best(keep(run, run.safety.best_point))
    return forwards


def _concerns(run: State) -> bool:
    """Whether jumps are judged by the loss of the same numbers again and again, and by nothing else."""
    judge = run.judge
    if not (run.full_batch and run.windows.observing and run.proposer.chooses) or run.config.gate.exact != "auto":
        return False
    if judge.of_labels or judge.ledger.switched_off or run.config.never_predicts or run.validated:
        return False
    enough = judge.num_samples is not None and judge.num_samples >= ENOUGH_SAMPLES
    return enough and run.few_samples and run.subject.judge_fn is None and not run.subject.ranks.sharded


def _affordable(run: State) -> bool:
    """Whether one more question is within its share of the run, as far as its length is known."""
    noise, meter = run.judge.noise, run.meter
    planned = meter.planned_units if run.schedule.end is not None else 0.0
    allowed = SHARE * max(planned, meter.cost_units) / FORWARD_UNITS
    return noise.num_forward + noise.usual <= allowed + (0.0 if planned else ALLOWANCE)


def _answer(run: State, batch: Any) -> list[float]:
    """Mean square of the residuals, forwards spent, those spent only once, the least ratio, that of the last damping.

    With several ranks these are the means over them; NaN where they cannot be had.
    """
    none = [math.nan, 1.0, 0.0, math.nan, math.nan]

    def own() -> list[float]:
        try:
            return run.judge.evaluation.attempt(lambda isolation: _measured(run, batch, isolation), exact=True) or none
        except Exception:  # what a model does in here may fail in many ways, none of which is a fault of the run's
            return none

    return run.subject.ranks.means(own)


@torch.enable_grad()
def _measured(run: State, batch: Any, isolation: Isolation) -> list[float] | None:
    """See :func:`_answer`; on this rank, and None where the residuals of samples cannot be had."""
    subject, movable = run.subject, run.watch.trained.movable
    weights = [p for p, may in zip(subject.parameters, movable, strict=True) if may]
    batch = batch[0] if isinstance(batch, MicroBatches) else batch
    size = num_samples(batch)
    most = _most_rows(subject.model, weights)
    if size < ENOUGH_SAMPLES or min(size, FEWEST_ROWS) > most:  # of the first micro-batch, of this rank's share
        return None
    if not weights or not all_differentiable(weights) or _hooked(subject.model):
        return None
    chosen = _chosen(run, size, most)
    isolation.begin()
    writes = run.judge.evaluation.loss_writes is not False  # into what all samples share as well
    loss = subject.loss_fn(subject.model, copied(picked(batch, chosen), tensors_too=writes))
    residuals = residuals_of(loss)
    if residuals is None or not residuals.is_floating_point() or residuals.dim() == 0:
        return None
    if len(residuals) != len(chosen) or _is_differentiated(residuals, weights):
        return None
    K, rho, counts = _kernel(run, weights, residuals)
    errors: list[float] = []
    for damping in DAMPINGS:  # until one tells enough of the residuals
        errors.append(left_out_error(K, rho, damping))
        if errors[-1] < NOISE:
            break
    share = len(chosen) / size
    backward = share * BACKWARD_UNITS / FORWARD_UNITS
    usual = share + 2 * backward + _price(counts, share, len(errors))
    once = 0.0 if run.judge.noise.num_asked else math.ceil(math.log2(len(chosen)) + 1) * backward  # digits of the rows
    square = float(residuals.detach().double().square().mean())
    return [square, usual, once, min(errors), errors[-1]]


def _most_rows(model: nn.Module, weights: list[Tensor]) -> int:
    """Samples whose Jacobian fits into the memory for it, where it is written out, and takes no longer than it must."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    kernels = sum(p.numel() for p in weights if p.dim() > 2)  # each meets a row of the data per pixel
    written = kernels + sum(p.numel() for p in weights if id(p) in tables)
    most = FEWEST_ROWS if kernels else MOST_ROWS
    return most if not written else min(most, int(MEMORY_MB * 2**20 / (8 * written)))


def _hooked(model: nn.Module) -> bool:
    """Whether a user's code hears of backwards: those of a question are not his."""
    names = ("_backward_hooks", "_backward_pre_hooks")
    on_modules = any(getattr(m, name, None) for m in model.modules() for name in names)
    return on_modules or any(p._backward_hooks for p in model.parameters())


def _chosen(run: State, size: int, most: int) -> Tensor:
    """The samples that are looked at, the same ones at every question."""
    rows = min(size, most)
    weights = float(run.subject.groups.num_weights)
    while rows > FEWEST_ROWS:
        counts = price.Counts(rows, int(weights), weights * rows, weights * rows, 0.0)
        counts = replace(counts, num_gram_products=rows**2 * weights**0.5)
        if _price(counts, rows / size, len(DAMPINGS)) <= MOST_FORWARDS:
            break
        rows = max(round(FEWER * rows), FEWEST_ROWS)
    generator = torch.Generator().manual_seed(run.config.seed)
    return torch.randperm(size, generator=generator)[:rows].sort().values


def _kernel(run: State, weights: list[Tensor], residuals: Tensor) -> tuple[Tensor, Tensor, price.Counts]:
    """The kernel of the samples' residuals, these, and counts of their Jacobian.

    Raises:
        NotSeparableError: a backward tells not every sample's gradient.
    """
    outputs = residuals if residuals.dim() == 1 else residuals.flatten(1)
    signs = torch.ones(outputs.shape, dtype=torch.float64)
    if outputs.dim() == 2:  # of several outputs of a sample one sum with random signs stands for all
        generator = torch.Generator().manual_seed(run.config.seed)
        signs = (2.0 * torch.randint(2, outputs.shape[1:], generator=generator) - 1).expand(outputs.shape)
    signs = signs.to(outputs)
    linearizer = run.judge.noise.rows_of(weights, lambda: Linearizer(weights, chunk_rows=1, memory_mb=0.0))
    A = linearizer.read_off(outputs, [signs], check=True)  # at every question: after a resume as before it
    wide = (outputs.detach() * signs).double()
    return A.gram().double(), wide if wide.dim() == 1 else wide.sum(1), A.counts


def _price(counts: price.Counts, share: float, number: int) -> float:
    """Forwards on the whole batch that a kernel and so many of its inverses are worth.

    Args:
        counts: Of the samples that are looked at.
        share: They are of the batch.
        number: Of inverses.
    """
    whole = replace(counts, num_products=counts.num_products / share, num_units=counts.num_units / share)
    return price.least_squares(whole, counts.num_gram_products, num_products=0, num_factors=FACTORS_OF_INVERSE * number)


def _is_differentiated(residuals: Tensor, weights: list[Tensor]) -> bool:
    """Whether outputs are differentiated inside the loss: those of an equation are no data, and have no noise."""
    known = set(map(id, weights))
    for node in nodes_of(residuals):
        if DIFFERENTIATED in node.name():
            return True
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known and not isinstance(leaf, torch.nn.Parameter):
            return True
    return False
