"""A proposal: asked of the predictor, corrected, checked, judged.  Nothing here is applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..judge import gate
from ..judge.evaluation import attempt, losses_of, objection, pieces_of
from ..judge.gate import Part
from ..judge.ledger import FORWARD_UNITS, STEP_UNITS
from ..judge.probation import Segment
from ..keep.failures import Place
from ..keep.isolation import Isolation
from ..records import Decision, Origin, PhasePrediction, Reason, Verdict
from ..weights import algebra as weights
from ..weights import offload as host
from ..weights.algebra import Tensors
from . import corrector

if TYPE_CHECKING:
    from ..cycle.state import Run


def propose(
    run: Run, decision: Decision, segment: Segment | None
) -> tuple[PhasePrediction | None, list[Tensors], Verdict | None]:
    """Ask the predictor and check what comes back; a verdict means it is refused already."""
    try:
        prediction = segment.prediction if segment is not None else _asked(run, decision.horizon)
        if prediction.horizon < 1 or prediction.coefficients.is_complex():
            raise ValueError(f"a prediction for {prediction.horizon} steps, of {prediction.coefficients.dtype} numbers")
        candidates = [prediction.coefficients]
        if run.deterministic:  # where losses are exact, more candidates cost forwards but no luck
            candidates += prediction.alternatives
        expected = (run.groups.num_groups, run.predictor.spec.num_columns)
        if any(tuple(c.shape) != expected for c in candidates):
            return prediction, [], Verdict(accepted=False, reason=Reason.WRONG_SHAPE)
        if not all(bool(torch.isfinite(c).all()) for c in candidates):
            return prediction, [], Verdict(accepted=False, reason=Reason.NOT_FINITE)
        if prediction.first_fit:  # shorter pieces of the same step: made when they are tried
            candidates = candidates[:1]
        deltas = [_combined(run, c) for c in candidates]
    except Exception as error:  # whatever a predictor raises must not end a run
        run.note_predictor_failure(error)
        return None, [], Verdict(accepted=False, reason=Reason.PREDICTOR_FAILED)
    run.counters.num_passes += len(candidates) * run.basis.num_filled
    if not all(weights.all_finite(d) for d in deltas):
        return prediction, [], Verdict(accepted=False, reason=Reason.NOT_FINITE)
    lengths = [weights.per_tensor_rms(d) for d in deltas]
    if not any(lengths[0]):
        return prediction, [], Verdict(accepted=False, reason=Reason.ZERO_JUMP)
    spans, rho = run.basis.displacement_rms().tolist(), run.config.gate.max_relative_length
    num_inside = 0  # bolder candidates are longer: the first one outside ends the list
    while num_inside < len(deltas) and gate.within_radius(lengths[num_inside], spans, rho):
        num_inside += 1
    if not num_inside:
        return prediction, [], Verdict(accepted=False, reason=Reason.TOO_LONG)
    return prediction, deltas[:num_inside], None


def _combined(run: Run, coefficients: Tensor) -> Tensors:
    """The move that coefficients stand for, zero where only the optimizer may move the weights, or nobody."""
    return run.trained.masked(run.basis.combine(coefficients))


def fits(run: Run, prediction: PhasePrediction) -> bool:
    """Whether the coefficients have the basis's shape and are finite: anything else is refused, not corrected."""
    c = prediction.coefficients
    return tuple(c.shape) == (run.groups.num_groups, run.predictor.spec.num_columns) and bool(torch.isfinite(c).all())


def _asked(run: Run, horizon: int) -> PhasePrediction:
    """The predictor's answer, corrected by what similar answers got wrong, cut into segments."""
    with run.time.call():
        prediction = run.predictor.predict(horizon)
    window = run.window
    if window is not None and fits(run, prediction):
        correction = run.adaptation.corrector.correct(prediction, window.features, window.products.BB)
        run.correction = correction
        prediction = corrector.apply(prediction, correction)
    # a step from x cannot be taken in pieces from theta
    in_pieces = run.config.segments > 1 and not prediction.first_fit
    return _first_piece(prediction, run.config.segments) if in_pieces else prediction


def _first_piece(prediction: PhasePrediction, segments: int) -> PhasePrediction:
    """One of ``segments`` equal pieces of a jump."""
    return replace(
        prediction,
        coefficients=prediction.coefficients / segments,
        alternatives=tuple(c / segments for c in prediction.alternatives),
        horizon=max(1, prediction.horizon // segments),
        predicted_reduction=prediction.predicted_reduction / segments,
    )


def judge(run: Run, batch: Any, prediction: PhasePrediction, deltas: list[Tensors], saved: Tensors) -> Verdict:
    """Measure losses at x + a d and let the gate decide."""
    exact, only = run.deterministic, run.trained.only
    pieces, spent = None if exact else pieces_of(run, batch), 0.0
    if not exact:
        failed = run.failures.counts[Place.PIECES]
        reason, spent = (Reason.CANNOT_CUT, 0.0) if pieces is None else objection(run, batch)
        if reason is Reason.CANNOT_CUT and run.failures.counts[Place.PIECES] == failed:  # nothing was raised
            run.failures.note(Place.PIECES, reason.value, quiet=True)
        if reason is not None:
            return Verdict(accepted=False, reason=reason, num_forward=spent)
    length, judged, split = pieces or ([batch], [batch], False)
    parts: dict[Part, list[Any]] = {"whole": [batch], "length": length, "judge": judged}
    kind = Origin.CURRENT if exact else Origin.AVERAGE
    if run.config.gate.judge_at != "auto":
        kind = Origin(run.config.gate.judge_at)
    origin = saved if kind is Origin.CURRENT else run.basis.average()

    def make(candidate: int) -> None:
        while len(deltas) <= candidate:
            with host.own_defaults():
                deltas.append(_combined(run, prediction.alternatives[len(deltas) - 1]))
            run.counters.num_passes += run.basis.num_filled

    def work(isolation: Isolation) -> Verdict:
        def evaluate(candidate: int, scale: float, part: Part) -> list[float]:
            make(candidate)
            weights.move_(only(run.parameters), only(origin), only(deltas[candidate]), scale)
            run.counters.num_passes += 3
            return losses_of(run, parts[part], isolation)

        if exact:
            return _judge_exactly(run, evaluate, prediction, len(deltas))
        settings = run.config.gate
        return gate.judge_noisy(
            evaluate, max_scale=min(prediction.max_scale, 2.0), level=settings.significance, price=price(run),
            split=split,
            predicted_reduction=prediction.predicted_reduction, min_ratio=settings.min_reduction_ratio,
        )  # fmt: skip

    verdict = attempt(run, work)
    if verdict.accepted:
        make(verdict.candidate)
    return replace(verdict, origin=kind, num_forward=verdict.num_forward + spent)


def _judge_exactly(run: Run, evaluate: gate.Evaluate, prediction: PhasePrediction, num_deltas: int) -> Verdict:
    num_candidates = 1 + len(prediction.alternatives) if prediction.first_fit else num_deltas
    # with windows of one step the origin's loss is the one the last real step had at x, under the same conditions
    measured = run.exactness.agreed is True and run.exactness.noise == 0
    known = measured and prediction.first_fit and run.window is not None and run.window.num_steps == 1
    verdict = gate.judge_exact(
        evaluate, num_candidates - prediction.way_back, known_before=run.window_loss if known else None,
        way_back=num_candidates - 1 if known and prediction.way_back else None, max_scale=prediction.max_scale,
        predicted_reduction=prediction.predicted_reduction, min_ratio=run.config.gate.min_reduction_ratio,
        first_fit=prediction.first_fit,
    )  # fmt: skip
    return gate.beyond_noise(verdict, run.exactness.noise)


Accept = Callable[[PhasePrediction, list[Tensors], Tensors, Verdict], Verdict]


def transact(
    run: Run, batch: Any, decision: Decision, segment: Segment | None, accept: Accept
) -> tuple[PhasePrediction | None, Verdict]:
    """Propose, judge, and let ``accept`` move the weights.

    Whatever raises on the way is a refusal, and everything is as it was before; so it is where the program is
    interrupted, which is passed on.

    Args:
        run: Between two real steps.
        batch: Judged on.
        decision: To predict.
        segment: What is left of a jump in pieces.
        accept: Applies an accepted jump; may still refuse it.
    """
    prediction: PhasePrediction | None = None
    saved: Tensors = []
    done = False
    try:
        with host.own_defaults():
            prediction, deltas, verdict = propose(run, decision, segment)
        if verdict is None and prediction is not None:
            saved = run.held = weights.clone(run.parameters)
            verdict = judge(run, batch, prediction, deltas, saved)
            weights.copy_(run.parameters, saved)
            run.counters.num_passes += 4
            verdict = accept(prediction, deltas, saved, verdict)
        assert verdict is not None
        done = True
        return prediction, verdict
    except Exception as error:
        run.failures.note(Place.GATE, error)
        forwards = 1.0 if saved else 0.0
        return None, Verdict(accepted=False, reason=Reason.CANNOT_EVALUATE, num_forward=forwards)
    finally:
        if saved and not done:
            weights.copy_(run.parameters, saved)


def price(run: Run) -> Callable[[float], float]:
    """Forwards -> loss that the same cost in real training would have bought, over the persistence."""
    pace = max(-run.loss_slope, 0.0)
    persistence = max(run.ledger.persistence, run.config.gate.min_persistence)
    return lambda forwards: forwards * FORWARD_UNITS / STEP_UNITS * pace / persistence
