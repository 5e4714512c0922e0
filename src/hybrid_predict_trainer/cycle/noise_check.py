"""What is left of a full batch of numbers is asked about by leaving samples out, before jumps would learn its noise.

Where there is a ``val_fn`` it says so itself (:mod:`.jump_check`), and nobody asks here.  A question is a forward and a
backward on the batch, and the kernel of some of its samples; it leaves no trace, and its price is charged.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..cost import BACKWARD_UNITS, FORWARD_UNITS
from ..judge.labels import SAMPLES_PER_WEIGHT
from ..judge.noise import DAMPINGS, NOISE, residuals_of
from ..keep.isolation import Isolation
from ..numerics.leave_one_out import left_out_error
from ..observe.batches import copied, num_samples
from ..propose.sources import price
from ..propose.sources.graph import NotSeparableError, nodes_of
from ..propose.sources.jacobian import Linearizer
from ..records import StepOutcome
from ..weights.real_views import all_differentiable
from .handover import MicroBatches
from .state import State
from .withdrawal import end_by_noise, keep

#: Samples of a batch from which on leaving one out says something of all.
ENOUGH_SAMPLES = 48
#: Samples that are looked at: at least, at most, and by what factor fewer where inverses would cost more forwards.
FEWEST_ROWS, MOST_ROWS, FEWER, MOST_FORWARDS = 128, 512, 0.8, 12.0
#: Share of a run that questions may cost, and forwards besides where nobody knows how long it is.
SHARE, ALLOWANCE = 0.08, 40.0
#: Factorisations that an inverse is worth, with its own.
FACTORS_OF_INVERSE = 3
#: Rows that are differentiated at a time, and memory: not needed, because only what can be read off is asked about.
CHUNK_ROWS, MEMORY_MB = 64, 512.0
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
    loss, forwards, untold, fitted = _answer(run, batch)
    run.subject.reshard()
    run.judge.noise.spend(forwards)
    run.meter.add_forwards(forwards)
    run.judge.ledger.observe(forwards * FORWARD_UNITS)
    if not (math.isfinite(loss) and math.isfinite(untold)):
        run.judge.noise.give_up()
        run.safety.drop_best()
        return forwards
    through = run.judge.noise.take(loss, untold, fitted)
    if run.judge.noise.found:
        end_by_noise(run, untold, back=through)
    elif run.subject.can_solve and untold < NOISE:  # closed form may go through decades of the loss at once
        run.safety.keep_best(keep(run, run.safety.best_point))
    return forwards


def _concerns(run: State) -> bool:
    """Whether jumps are judged by the loss of the same numbers again and again, and by nothing else."""
    judge, validation = run.judge, run.safety.validation
    if not (run.full_batch and run.windows.observing and run.proposer.chooses) or run.config.gate.exact != "auto":
        return False
    if judge.of_labels or judge.num_samples is None or judge.ledger.switched_off or run.config.never_predicts:
        return False
    if judge.num_samples < ENOUGH_SAMPLES:
        return False
    asked = validation is not None and not validation.failed and not validation.jumps.mute
    few = judge.num_samples < SAMPLES_PER_WEIGHT * run.subject.groups.num_weights
    return few and not asked and run.subject.judge_fn is None and not run.subject.ranks.sharded


def _affordable(run: State) -> bool:
    """Whether one more question is within its share of the run, as far as its length is known."""
    noise, meter = run.judge.noise, run.meter
    planned = meter.planned_units if run.schedule.end is not None else 0.0
    usual = noise.num_forward / noise.num_asked if noise.num_asked else 0.0
    allowed = SHARE * max(planned, meter.cost_units) / FORWARD_UNITS
    return noise.num_forward + usual <= allowed + (0.0 if planned else ALLOWANCE)


def _answer(run: State, batch: Any) -> list[float]:
    """Loss, forwards spent, the least ratio and that of the last damping, means over ranks; NaN: they cannot be had."""
    none = [math.nan, 1.0, math.nan, math.nan]

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
    isolation.begin()
    loss = subject.loss_fn(subject.model, copied(batch, tensors_too=run.judge.evaluation.loss_writes is not False))
    residuals = residuals_of(loss) if weights and all_differentiable(weights) else None
    if residuals is None or not residuals.is_floating_point() or residuals.dim() == 0:
        return None
    if len(residuals) < 2 or len(residuals) != num_samples(batch) or _is_differentiated(residuals, weights):
        return None
    K, rho, counts, passes = _kernel(run, weights, residuals)
    errors: list[float] = []
    for damping in DAMPINGS:  # until one tells enough of the residuals
        errors.append(left_out_error(K, rho, damping))
        if errors[-1] < NOISE:
            break
    return [float(loss.detach()), passes + _price(counts, len(rho), len(errors)), min(errors), errors[-1]]


def _kernel(run: State, weights: list[Tensor], residuals: Tensor) -> tuple[Tensor, Tensor, price.Counts, float]:
    """The kernel of some samples' residuals, these, counts of the Jacobian of all, and forwards that were made."""
    noise = run.judge.noise
    generator = torch.Generator().manual_seed(run.config.seed + noise.num_asked)
    outputs = residuals if residuals.dim() == 1 else residuals.flatten(1)
    signs = torch.ones(outputs.shape, dtype=torch.float64)
    if outputs.dim() == 2:  # of several outputs of a sample one sum with random signs stands for all
        signs = (2.0 * torch.randint(2, outputs.shape[1:], generator=generator) - 1).expand(outputs.shape)
    signs = signs.to(outputs)
    linearizer = noise.rows_of(weights, lambda: Linearizer(weights, chunk_rows=CHUNK_ROWS, memory_mb=MEMORY_MB))
    new = linearizer.separable is None
    if new:
        linearizer.counted(outputs, [signs])
    if linearizer.separable is False:
        raise NotSeparableError(linearizer.why_not)
    A = linearizer.jacobian(outputs, [signs], check=new)
    wide = (outputs.detach() * signs).double()
    rows, of_all = min(A.num_rows, MOST_ROWS), A.counts
    while rows > FEWEST_ROWS and _price(of_all, rows, len(DAMPINGS)) > MOST_FORWARDS:
        rows = max(round(FEWER * rows), FEWEST_ROWS)
    chosen = torch.randperm(A.num_rows, generator=generator)[:rows].sort().values.to(outputs.device)
    rho = (wide if wide.dim() == 1 else wide.sum(1))[chosen]
    passes = 1 + (1 if noise.num_asked else 3) * BACKWARD_UNITS / FORWARD_UNITS
    return A.weighted(chosen, torch.ones_like(rho)).gram().double(), rho, of_all, passes


def _price(counts: price.Counts, rows: int, number: int) -> float:
    """Forwards on the whole batch, of these counts, that the kernel of some rows and its inverses are worth."""
    of_gram = counts.num_gram_products * (rows / counts.num_rows) ** 2
    some = replace(counts, num_rows=rows)
    return price.least_squares(some, of_gram, num_products=0, num_factors=FACTORS_OF_INVERSE * number)


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
