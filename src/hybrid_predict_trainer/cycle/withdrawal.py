"""States to come back to: taken before something is tried, put back when it did harm.

Three are kept.  ``raise_point`` is the start of a raise of the learned multiplier until the raise is settled;
``safe_point`` is the guard's anchor, ``best_point`` that of the validation's best answer about jumps.
All are weights, buffers, optimizer state and what the lookahead remembers, and not the schedule, the clock or random
numbers: the steps since were spent, and the data go on.  What a user has put around the step goes back too: an average
of the weights is one of those that came back.
"""

from __future__ import annotations

from typing import Any

import torch

from ..judge.guard import Request
from ..keep.snapshot import Snapshot
from ..move.multiplier import Advice
from ..move.schedule import scheduled_settings_stay
from ..notices import warn
from ..weights import algebra as weights
from ..weights.parameters import named_parameters
from ..weights.shards import local
from .motions import end_motions
from .state import State

#: Passes over the weights that a copy of weights and two moments costs, read and written; and a swap of the weights.
COPY_PASSES, SWAP_PASSES = 8, 4


def keep(run: State, into: Snapshot | None = None) -> Snapshot:
    """Copy what training has changed, in the memory of a copy that is needed no more."""
    run.meter.add_passes(COPY_PASSES)
    offload = run.parks_copies
    return Snapshot.take(
        run.subject.model, run.subject.optimizer, run.optimizer_step.with_weights, offload=offload, into=into
    )


def put_back(run: State, kept: Snapshot) -> None:
    """Weights, buffers and optimizer as they were; rates, schedule and clock as they are."""
    with scheduled_settings_stay(run.subject.optimizer):
        around = run.optimizer_step.with_weights
        whole = len(kept.others) == len(around)  # a copy in a checkpoint of before has not what was handed in
        kept.restore(run.subject.model, run.subject.optimizer, around[: len(kept.others)], rng=False)
    run.meter.add_passes(COPY_PASSES)
    if whole:
        run.came_back()
    else:
        run.overwritten()
    run.rollback.drop()  # it holds the weights that did harm


def follow_advice(run: State, advice: Advice) -> None:
    """Keep or put back the state of a raise's start."""
    if advice is Advice.RAISED:
        run.safety.begin_raise(keep(run, run.safety.raise_point))
    elif advice is Advice.TAKEN_BACK:
        point = run.safety.raise_point
        if point is None and run.full_batch:  # long settled: exact losses leave no doubt whose doing it is
            point = run.safety.safe_point
        if point is not None:
            put_back(run, point)
        run.safety.end_raise()
    elif advice is Advice.SETTLED:
        run.safety.end_raise()


def follow_request(run: State, request: Request) -> None:
    """Carry out what the guard asks for."""
    if request is Request.ANCHOR:
        run.safety.keep_safe(keep(run, run.safety.safe_point))
    elif request is Request.RETRY:
        _retry(run)
    elif request is Request.RESTORE:
        assert run.safety.safe_point is not None
        put_back(run, run.safety.safe_point)
        _end_motions(run, f"the state of real step {run.safety.guard.anchor_step} came back")
    elif request is Request.WITHDRAW:
        _end_motions(run, "the weights stay, the ones at its best are no better on the same batches")


def _retry(run: State) -> None:
    """The optimizer's own steps from here on, smaller ones; jumps stay, exact losses have judged each."""
    assert run.safety.safe_point is not None
    put_back(run, run.safety.safe_point)
    run.optimizer_step.end_steering()
    factor = run.config.divergence.retry_learning_rate_factor
    run.schedule.lower(factor)
    warn(
        "the training loss stands above its best, and the optimizer's own steps took it there: the state of real step "
        f"{run.safety.guard.anchor_step} came back, the learning rate is {factor:g} times the schedule's from here on, "
        "learned multiplier and lookahead are off, and prediction goes on",
    )


def _end_motions(run: State, outcome: str) -> None:
    end_motions(run)
    warn(
        "the training loss stands above its best by more than its noise: prediction, learned multiplier and lookahead "
        f"are off from here on, and the run goes on as the plain loop; {outcome}",
    )


def end_jumps(run: State, why: str) -> None:
    """Validation says that jumps did harm: its best state comes back, and none are made from here on.

    Multiplier, lookahead and the guard stay, and begin anew at the losses of that state.

    Args:
        run: Between two steps; holds the state.
        why: What was found.
    """
    _go_back_to_best(run)
    run.judge.ledger.switch_off()
    warn(
        f"jumps took the training loss down and the validation loss up ({why}): the state of that step came back, and "
        "the rest of the run has no jumps.  The training loss says little of new data here: more data, a smaller model "
        "or weight decay help; enabled = False is the plain loop from the start",
    )


def _go_back_to_best(run: State) -> None:
    """The best point's state, if there is one; guard, multiplier and lookahead begin anew at the losses there."""
    if run.safety.best_point is not None:
        put_back(run, run.safety.best_point)
    run.safety.begin_anew()
    run.optimizer_step.scale.begin_anew()
    run.losses.history.begin_losses_anew()


def end_by_noise(run: State, untold: float, *, back: bool) -> None:
    """What is left of the training loss is noise: no jumps and no raises are made from here on.

    Args:
        run: Between two steps.
        untold: Share of the residuals that leaving samples out could not tell.
        back: Jumps have gone through the noise: the state of the question before comes back, if there is one.
    """
    point = run.safety.best_point
    found = f"{min(untold, 1.0):.0%} of a residual cannot be told from those of the other samples"
    outcome = "the weights stay"
    if back:
        found = "it fell through what could not be told of samples that were left out"
    if back and point is not None:
        _go_back_to_best(run)
        outcome = "the state before it fell came back"
    run.safety.drop_best()
    warn(
        f"what is left of the training loss looks like noise ({found}): the rest of the run has neither jumps nor "
        f'raised rates, and {outcome}.  Pass val_fn= to have new data judge instead; gate.exact = "always" takes the '
        "training loss down all the same",
    )


#: Losses of one batch at the present weights and at the anchor's; None: they cannot be evaluated.
Pair = tuple[float, float] | None


def compare_with_anchor(run: State, batch: Any) -> None:
    """While the guard compares: measure a pair of losses and do what it says.  Between two steps only."""
    if run.safety.guard.comparing:
        judge_pair(run, measured_pair(run, batch))


def measured_pair(run: State, batch: Any) -> Pair:
    """Losses of one batch at the present weights and at the anchor's, side by side; nothing is moved.

    Args:
        run: Whose guard compares.
        batch: That the weights have not been trained on yet.
    """
    point = run.safety.safe_point
    if point is None:
        return None
    try:
        pair = run.subject.ranks.together(lambda: (_loss(run, batch), _loss_at(run, point, batch)))
    except Exception:
        return None
    run.meter.add_forwards(2)
    return pair


def judge_pair(run: State, pair: Pair) -> None:
    """Let the guard take a pair, and carry out what it asks for.

    The weights may be others afterwards: no gradient of before may be waiting for a step.

    Args:
        run: Its guard may have ended the comparison since the pair was measured.
        pair: Of :func:`measured_pair`.
    """
    guard = run.safety.guard
    if not guard.comparing or run.safety.safe_point is None:
        return
    # what cannot be evaluated cannot accuse; the motions end all the same
    follow_request(run, guard.withdraw() if pair is None else guard.compare(*pair))


def _loss(run: State, batch: Any) -> float:
    evaluation = run.judge.evaluation
    loss = evaluation.attempt(
        lambda isolation: evaluation.shared_losses_of([batch], isolation)[0], exact=run.full_batch
    )
    return loss + run.added_by_decay


@torch.no_grad()
def _loss_at(run: State, kept: Snapshot, batch: Any) -> float:
    found = named_parameters(run.subject.model, run.subject.optimizer)
    pairs = [
        (local(found[n]), saved) for n, saved in zip(kept.names or (), kept.parameters, strict=False) if n in found
    ]
    live, saved = [p for p, _ in pairs], [s for _, s in pairs]
    present = weights.clone(live)
    run.meter.add_passes(SWAP_PASSES)
    try:
        weights.copy_(live, saved)
        return _loss(run, batch)
    finally:
        weights.copy_(live, present)


def rescue(run: State) -> bool:
    """Before a run is given up as diverged: bring back the anchor, if motions may have brought this about.

    Returns:
        Whether training can go on.
    """
    if not (run.moving or run.optimizer_step.scale.taken_back) or not run.safety.guard.rescue():
        return False
    follow_request(run, Request.RESTORE)
    return True
