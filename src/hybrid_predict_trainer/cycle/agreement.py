"""Ranks decide alike: what each has seen is brought together before a step, and what is proposed is the first rank's.

Everything that decides is computed on every rank from the same figures.  Should ranks part even so, because something
was raised on one of them or because their arithmetic differs, the digest that they exchange before a step tells, and
all go on from the first rank's state.  With one process nothing in here does anything.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import torch

from ..distributed.collective import RanksDisagree
from ..keep import resume
from ..keep.failures import Place
from ..notices import warn
from ..propose.proposal import combined
from ..records import Decision, Phase, PhasePrediction, Reason, Verdict
from ..weights.algebra import Move
from . import outside
from .motions import end_motions
from .state import State

_PHASES, _REASONS = list(Phase), list(Reason)

Proposed = tuple[PhasePrediction | None, list[Move], Verdict | None]


def agree(run: State, asks: bool) -> bool:
    """A step begins: bring together what ranks have seen of their batches, and what failed on any of them.

    Args:
        run: Has looked at the batch.
        asks: Whether this rank wants to know if losses are exact.

    Returns:
        Whether that is to be measured, on all of them.

    Raises:
        RanksDisagree: they have parted, and cannot be brought together.
    """
    ranks = run.subject.ranks
    if ranks.alone or not run.config.enabled:
        return asks
    failures, batches = run.failures, run.batches
    own = [
        not batches.same_batch.same, batches.recurrence.recurs, asks, *failures.counts.values(),
        *(place in failures.dropped for place in Place),
    ]  # fmt: skip
    sums, alike = ranks.at_step([float(value) for value in own], digest(run))
    differ, recur, asking, *rest = sums
    batches.agree(differ=differ > 0, recur=recur > 0)
    counts, dropped = rest[: len(Place)], rest[len(Place) :]
    exhausted = failures.agree([math.ceil(n / ranks.size) for n in counts], [n > 0 for n in dropped])
    if not alike:
        bring_together(run)
    if Place.MOTION in exhausted:
        run.optimizer_step.end_steering()
    if Place.WEIGHTS in exhausted:
        end_motions(run)
    return asking > 0 and (batches.same or run.config.gate.exact == "always")


def digest(run: State) -> int:
    """Of what decides, and of a sample of the weights; in [0, 2^16)."""
    c, p, j, w, s, around = run.meter, run.proposer, run.judge, run.windows, run.safety, run.optimizer_step
    facts = (
        c.num_steps, c.num_real_steps, c.num_jumps_proposed, c.num_jumps_accepted, c.extra_units, c.num_outside_writes,
        *(getattr(run.phases, name) for name in ("current", *run.phases._COUNTS)),
        p.horizon, p.predictor.name, p.num_windows_since_proposal, p.refused,
        0 if p.segment is None else p.segment.num_left,
        -1 if j.probation is None else j.probation.num_steps_left, j.num_rollbacks, j.exactness.agreed,
        j.exactness.noise, *j.noise.state_dict().values(),
        j.ledger.wait_windows, j.ledger.switched_off, j.ledger.spent_units,
        w.num_closed, w.basis.num_steps, w.num_rest_steps, w.observing, w.keeping, w.loss,
        around.scale.learned, around.scale.value, around.scale.num_cuts, around.scale.shortening,
        around.lookahead.num_steps, around.switchback.num_blocks, around.switchback.moving,
        s.guard.withdrawn, s.guard.comparing, s.guard.anchor_step, s.raise_point is None,
        s.validation is not None and (s.validation.failed, *s.validation.jumps.state_dict().values()),
        s.best_point is None,
        run.schedule.num_steps, run.learning_rate, run.monitor.num_consecutive_critical,
        run.losses.history.loss_ema.mean, run.watch.trained.movable,
    )  # fmt: skip
    found = zlib.crc32(repr(facts).encode())
    found = zlib.crc32(j.generator.get_state().numpy().tobytes(), found)
    if not run.subject.ranks.sharded:
        found = zlib.crc32(run.watch.writes.digest().to_bytes(4, "big"), found)
    return (found ^ found >> 16) & 0xFFFF


def bring_together(run: State) -> None:
    """Ranks have parted: all go on from the first one's state.

    Where each holds its own part of the weights these stay as they are, and what remembers others is dropped: of these
    the first one has no copy.

    Raises:
        RanksDisagree: each holds its own part, and some have made more steps than others.
    """
    ranks = run.subject.ranks
    if ranks.sharded:
        if len(set(ranks.gathered(run.meter.num_real_steps))) > 1:
            raise RanksDisagree(
                "ranks have parted: each holds its own part of the weights, and their optimizers have made different "
                "numbers of steps; load a checkpoint"
            )
        outside.forget(run)
        found = ranks.share(resume.decisions(run) if ranks.first else None)
    else:
        found = ranks.share(resume.everything(run) if ranks.first else None)
    if not ranks.first:
        (resume.adopt_decisions if ranks.sharded else resume.adopt)(run, found)
    ranks.brought_together()
    run.watch.writes.record()
    if ranks.num_brought_together == 1:
        warn(
            f"at step {run.meter.num_steps} the ranks' states differed (something failed on one of them, or their "
            "arithmetic differs): all of them go on from the first one's",
        )


def agreed_decision(run: State, decide: Callable[[], Decision]) -> Decision:
    """The first rank's decision, where a rank could come to another one: where a predictor has a say in it."""
    ranks = run.subject.ranks
    if ranks.alone or not run.config.enabled or not (run.windows.just_closed or run.proposer.segment is not None):
        return decide()
    made: list[Decision] = []

    def told() -> list[float]:
        made.append(decide())
        d = made[0]
        return [_PHASES.index(d.phase), _REASONS.index(d.reason), d.horizon, d.confidence, d.fallback_threshold]

    phase, reason, horizon, confidence, threshold = ranks.first_of(told)
    return replace(
        made[0], phase=_PHASES[int(phase)], reason=_REASONS[int(reason)], horizon=int(horizon), confidence=confidence,
        fallback_threshold=threshold,
    )  # fmt: skip


def agreed_proposal(run: State, proposed: Proposed) -> Proposed:
    """The first rank's proposal: predictors that train for as long as there is time know different things on others.

    Raises:
        OtherRankFailed: it is of another form there, or was refused before it was made.
    """
    ranks = run.subject.ranks
    if ranks.alone:
        return proposed
    prediction = proposed[0]
    own = _numbers(proposed)
    found = ranks.first_of(lambda: own)
    if prediction is None or found == own or all(math.isnan(a) or a == b for a, b in zip(found, own, strict=True)):
        return proposed
    refused, num_deltas = int(found[0]), int(found[1])
    horizon, loss, reduction, confidence, scale = found[2:7]
    tensors = [prediction.coefficients, *prediction.alternatives]
    shape, size = prediction.coefficients.shape, prediction.coefficients.numel()
    numbers = torch.tensor(found[7:], dtype=torch.float64).to(tensors[0])
    theirs = [numbers[i * size : (i + 1) * size].reshape(shape) for i in range(len(tensors))]
    prediction = replace(
        prediction, coefficients=theirs[0], alternatives=tuple(theirs[1:]), horizon=int(horizon), predicted_loss=loss,
        predicted_reduction=reduction, confidence=confidence, max_scale=scale,
    )  # fmt: skip
    if refused >= 0:
        return prediction, [], Verdict(accepted=False, reason=_REASONS[refused])
    return prediction, [combined(run.windows, run.watch, c) for c in theirs[:num_deltas]], None


def _numbers(proposed: Proposed) -> list[float]:
    prediction, deltas, verdict = proposed
    refused = -1 if verdict is None else _REASONS.index(verdict.reason)
    if prediction is None:
        return [refused]
    p = prediction
    tensors = torch.cat([c.double().reshape(-1) for c in (p.coefficients, *p.alternatives)]).tolist()
    return [
        refused,
        len(deltas),
        p.horizon,
        p.predicted_loss,
        p.predicted_reduction,
        p.confidence,
        p.max_scale,
        *tensors,
    ]
