"""A proposal: asked of the predictor, corrected, checked, judged.  Nothing here is applied."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..config.settings import HybridTrainerConfig
from ..cost import BACKWARD_UNITS, FORWARD_UNITS, CostMeter
from ..observe.window import WindowRecorder
from ..records import PhasePrediction, Reason, Verdict
from ..weights import algebra as weights
from ..weights.algebra import Move
from ..weights.shards import itself, rms_over, total_over
from ..weights.trained import Watch
from . import corrector
from .proposer import Proposer
from .sources.base import Material


def propose(
    proposer: Proposer, windows: WindowRecorder, watch: Watch, meter: CostMeter, config: HybridTrainerConfig, *,
    horizon: int, exact: bool,
) -> tuple[PhasePrediction | None, list[Move], Verdict | None]:  # fmt: skip
    """Ask the predictor and check what comes back; a verdict means it is refused already.

    Args:
        proposer: Its predictor is asked, or goes on with what is left of a jump in pieces.
        windows: What was observed.
        watch: Which weights may be moved.
        meter: Counts the passes over the weights.
        config: Settings of the run.
        horizon: Steps that the proposal is for.
        exact: Losses are exact.
    """
    segment = proposer.segment
    try:
        prediction = segment.prediction if segment is not None else _asked(proposer, windows, horizon, config.segments)
        if prediction.horizon < 1 or prediction.coefficients.is_complex():
            raise ValueError(f"a prediction for {prediction.horizon} steps, of {prediction.coefficients.dtype} numbers")
        candidates = [prediction.coefficients]
        if exact:  # where losses are exact, more candidates cost forwards but no luck
            candidates += prediction.alternatives
        expected = _shape(windows)
        if any(tuple(c.shape) != expected for c in candidates):
            return prediction, [], Verdict(accepted=False, reason=Reason.WRONG_SHAPE)
        if not all(map(weights.finite, candidates)):
            return prediction, [], Verdict(accepted=False, reason=Reason.NOT_FINITE)
        if prediction.first_fit:  # shorter pieces of the same step: made when they are tried
            candidates = candidates[:1]
        deltas = [combined(windows, watch, c) for c in candidates]
    except Exception as error:  # whatever a predictor raises must not end a run
        proposer.on_failure(error)
        return None, [], Verdict(accepted=False, reason=Reason.PREDICTOR_FAILED)
    meter.add_passes(len(candidates) * windows.basis.num_filled)
    lengths = [_lengths(windows.basis.parameters, d) for d in deltas]
    if not all(map(math.isfinite, itertools.chain.from_iterable(lengths))):  # one such number makes its length one
        return prediction, [], Verdict(accepted=False, reason=Reason.NOT_FINITE)
    if not any(lengths[0]):
        return prediction, [], Verdict(accepted=False, reason=Reason.ZERO_JUMP)
    spans, rho = windows.basis.displacement_rms().tolist(), config.gate.max_relative_length
    num_inside = 0  # bolder candidates are longer: the first one outside ends the list
    while num_inside < len(deltas) and within_radius(lengths[num_inside], spans, rho):
        num_inside += 1
    if not num_inside:
        return prediction, [], Verdict(accepted=False, reason=Reason.TOO_LONG)
    return prediction, deltas[:num_inside], None


def propose_move(
    proposer: Proposer, material: Material, meter: CostMeter
) -> tuple[PhasePrediction | None, list[Move], Verdict | None]:
    """Ask a source for a move, book what it took, and check what comes back.

    Args:
        proposer: Its source is asked.
        material: What the source may look at.
        meter: Counts what it took.
    """
    source = proposer.source
    assert source is not None, "no source of proposals"
    try:
        with proposer.time.call():
            move = source.propose(material)
    except Exception as error:  # whatever it raises must not end a run
        proposer.on_failure(error)
        return None, [], Verdict(accepted=False, reason=Reason.PREDICTOR_FAILED)
    meter.add_forwards(move.num_forward)
    meter.add_priced(move.num_backward * BACKWARD_UNITS + move.num_matrix_forwards * FORWARD_UNITS)
    if not weights.all_finite(move.delta):
        return move.prediction, [], Verdict(accepted=False, reason=Reason.NOT_FINITE)
    if not any(weights.per_tensor_rms(move.delta)):
        return move.prediction, [], Verdict(accepted=False, reason=Reason.NO_DESCENT)
    return move.prediction, [move.delta], None


def _lengths(parameters: Sequence[Tensor], delta: Move) -> list[float]:
    """Root mean square of a move per parameter, over all ranks that hold a part of it."""
    if total_over(parameters) is itself:
        return weights.per_tensor_rms(delta)
    return rms_over(parameters, delta)


def combined(
    windows: WindowRecorder, watch: Watch, coefficients: Tensor, like: tuple[Tensor, Move] | None = None
) -> Move:
    """The move that coefficients stand for, zero where only the optimizer may move the weights, or nobody.

    Args:
        windows: Their basis.
        watch: Which weights may be moved.
        coefficients: (G, K).
        like: Coefficients that this was asked of before, and the answer.
    """
    return watch.trained.masked(windows.basis.combine(coefficients, like))


def fits(windows: WindowRecorder, prediction: PhasePrediction) -> bool:
    """Whether the coefficients have the basis's shape and are finite: anything else is refused, not corrected."""
    c = prediction.coefficients
    return tuple(c.shape) == _shape(windows) and weights.finite(c)


def _shape(windows: WindowRecorder) -> tuple[int, int]:
    """Of coefficients: groups, columns of the basis."""
    return windows.groups.num_groups, windows.basis.spec.num_columns


def _asked(proposer: Proposer, windows: WindowRecorder, horizon: int, segments: int) -> PhasePrediction:
    """The predictor's answer, corrected by what similar answers got wrong, cut into segments."""
    with proposer.time.call():
        prediction = proposer.predictor.predict(horizon)
    window = windows.last
    if window is not None and proposer.feedback.forecasts and fits(windows, prediction):
        correction = proposer.feedback.corrector.correct(prediction, window.features, window.products.BB)
        proposer.on_correction(correction)
        prediction = corrector.apply(prediction, correction)
    # a step from x cannot be taken in pieces from theta
    in_pieces = segments > 1 and not prediction.first_fit
    return _first_piece(prediction, segments) if in_pieces else prediction


def _first_piece(prediction: PhasePrediction, segments: int) -> PhasePrediction:
    """One of ``segments`` equal pieces of a jump."""
    return replace(
        prediction,
        coefficients=prediction.coefficients / segments,
        alternatives=tuple(c / segments for c in prediction.alternatives),
        horizon=max(1, prediction.horizon // segments),
        predicted_reduction=prediction.predicted_reduction / segments,
    )


def within_radius(jump_rms: Sequence[float], span_rms: Sequence[float], rho: float) -> bool:
    """Whether no tensor's jump is longer than ``rho`` times what the basis spans there."""
    return all(jump <= rho * span for jump, span in zip(jump_rms, span_rms, strict=True))
