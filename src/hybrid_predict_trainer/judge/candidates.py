"""Losses at x + a d: weights and random states are left as they were."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..keep.failures import Place
from ..keep.isolation import Isolation
from ..propose.proposal import combined
from ..records import Origin, PhasePrediction, Reason, Verdict
from ..weights import algebra as weights
from ..weights import offload as host
from ..weights.algebra import Move
from . import gate
from .budget import price
from .evaluation import pieces_of
from .gate import Part

if TYPE_CHECKING:
    from ..cycle.state import State


def judge(run: State, batch: Any, prediction: PhasePrediction, deltas: list[Move], saved: Move) -> Verdict:
    """Measure losses at x + a d and let the gate decide."""
    exact, only, evaluation = run.judged_exactly, run.watch.trained.only, run.judge.evaluation
    pieces, spent = None if exact else pieces_of(run.subject.model, batch, run.config.gate.max_chunks), 0.0
    if not exact:
        failed = run.failures.counts[Place.PIECES]
        reason, spent = _objection(run, batch, pieces)
        if reason is Reason.CANNOT_CUT and run.failures.counts[Place.PIECES] == failed:  # nothing was raised
            run.failures.note(Place.PIECES, reason.value, quiet=True)
        if reason is not None:
            return Verdict(accepted=False, reason=reason, num_forward=spent)
    length, judged, split = pieces or ([batch], [batch], False)
    parts: dict[Part, list[Any]] = {"whole": [batch], "length": length, "judge": judged}
    kind = Origin.CURRENT if exact else Origin.AVERAGE
    if run.config.gate.judge_at != "auto":
        kind = Origin(run.config.gate.judge_at)
    origin = saved if kind is Origin.CURRENT else run.windows.basis.average()

    def make(candidate: int) -> None:
        while len(deltas) <= candidate:
            with host.own_defaults():
                first = prediction.coefficients, deltas[0]
                deltas.append(combined(run.windows, run.watch, prediction.alternatives[len(deltas) - 1], first))
            run.meter.add_passes(run.windows.basis.num_filled)

    def work(isolation: Isolation) -> Verdict:
        def evaluate(candidate: int, scale: float, part: Part) -> list[float]:
            def move() -> None:
                make(candidate)
                # the same rounding as that of the move itself, where it comes to that
                rounding = run.meter.num_jumps_proposed
                weights.move_(only(run.subject.parameters), only(origin), only(deltas[candidate]), scale, rounding)
                run.meter.add_passes(3)

            losses = evaluation.shared_losses_of(parts[part], isolation, move)
            added = run.added_by_decay if exact else 0.0
            return [loss + added for loss in losses] if added else losses

        if exact:
            return _judge_exactly(run, evaluate, prediction, len(deltas))
        settings = run.config.gate
        scored = run.subject.judge_fn is not None  # what the training loss predicts is of another unit
        return gate.judge_noisy(
            evaluate, max_scale=min(prediction.max_scale, 2.0), level=settings.significance,
            price=price(run.judge.ledger, 0.0 if scored else run.windows.slope),
            split=split,
            predicted_reduction=0.0 if scored else prediction.predicted_reduction,
            min_ratio=settings.min_reduction_ratio,
        )  # fmt: skip

    verdict = evaluation.attempt(work, exact=exact)
    if verdict.accepted:
        make(verdict.candidate)
    if verdict.origin is kind and not spent:
        return verdict
    return replace(verdict, origin=kind, num_forward=verdict.num_forward + spent)


def _objection(run: State, batch: Any, pieces: tuple[list[Any], list[Any], bool] | None) -> tuple[Reason | None, float]:
    """Why no rank can judge by pieces, and forwards spent: there are none, on some rank, or not equally many."""

    if run.subject.ranks.sharded and run.subject.ranks.any(pieces is None):
        return Reason.CANNOT_CUT, 0.0

    def found() -> list[float]:
        reason, spent = (Reason.CANNOT_CUT, 0.0) if pieces is None else run.judge.evaluation.objection(batch)
        number = 0 if pieces is None else 64 * len(pieces[1]) + len(pieces[0])
        return [reason is not None, reason is Reason.LOSS_NOT_FINITE, spent, number, number * number]

    objections, not_finite, spent, number, squares = run.subject.ranks.means(found)
    if objections == 0 and squares == number * number:
        return None, spent
    return Reason.LOSS_NOT_FINITE if not_finite > 0 else Reason.CANNOT_CUT, spent


def _judge_exactly(run: State, evaluate: gate.Evaluate, prediction: PhasePrediction, num_deltas: int) -> Verdict:
    num_candidates = 1 + len(prediction.alternatives) if prediction.first_fit else num_deltas
    # with windows of one step the origin's loss is the one the last real step had at x, under the same conditions
    scored = run.subject.judge_fn is not None  # the last step's loss, and what was predicted of it, say nothing there
    measured = run.judge.exactness.agreed is True and run.judge.exactness.noise == 0 and not scored
    known = measured and prediction.first_fit and run.windows.last is not None and run.windows.last.num_steps == 1
    verdict = gate.judge_exact(
        evaluate, num_candidates - prediction.way_back, known_before=run.windows.loss if known else None,
        way_back=num_candidates - 1 if known and prediction.way_back else None, max_scale=prediction.max_scale,
        predicted_reduction=0.0 if scored else prediction.predicted_reduction,
        min_ratio=run.config.gate.min_reduction_ratio,
        first_fit=prediction.first_fit,
    )  # fmt: skip
    return gate.beyond_noise(verdict, run.judge.exactness.noise)
