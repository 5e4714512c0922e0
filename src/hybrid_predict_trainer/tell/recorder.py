"""What is recorded: one JSON object per line while the run goes, one summary at its end.

Every figure is computed from what was counted or measured.  A sink that fails (a full disk) must
not end a run: it is switched off, said once, and the summary carries ``metrics_incomplete``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..keep.failures import Failures, Place
from ..numerics.running import RunningMoments
from ..predictors import Paced
from ..records import Alarm, Decision, Phase, Reason, StateDict, StepResult
from ..weights import algebra as weights
from .figures import histograms, statistics
from .sinks import SCHEMA, NullSink, Sink, jsonable
from .summary import correlation, mean

if TYPE_CHECKING:
    from ..cycle.state import State
    from ..records import StepOutcome


#: Jumps and windows whose times and errors enter the averages: the last ones, or a long run's memory would grow.
KEPT = 1000


class Metrics:
    """Turns steps into records, and counts into the summary."""

    def __init__(self, sink: Sink, *, log_interval: int, failures: Failures | None = None) -> None:
        """Bind.

        Args:
            sink: Where records go; what it raises is counted, and after three times nothing more is written.
            log_interval: Steps between flushes of device scalars.
            failures: Of the run, where that is counted.
        """
        self.sink = sink
        self.failures = Failures() if failures is None else failures
        self.log_interval = log_interval
        self.divergence_events: list[dict[str, Any]] = []
        self.jump_lengths: deque[int] = deque(maxlen=KEPT)
        self.confidences = RunningMoments(decay=0.999)
        self.loss_pairs: deque[tuple[float, float]] = deque(maxlen=KEPT)  # (predicted, measured)
        self.cosines: deque[float] = deque(maxlen=KEPT)
        self.step_ms = RunningMoments(decay=0.99)
        self.predict_ms: deque[float] = deque(maxlen=KEPT)
        self.encode_ms: deque[float] = deque(maxlen=KEPT)
        self.update_ms: deque[float] = deque(maxlen=KEPT)
        self.total_ms = 0.0
        self.overhead_ms = 0.0
        self._last_phase = Phase.WARMUP
        self._pending: list[tuple[dict[str, Any], Tensor, Tensor | None]] = []  # step records not yet written

    def write_to(self, sink: Sink) -> None:
        """Records go there from here on."""
        self.sink = sink

    def record(self, run: State, decision: Decision, outcome: StepOutcome, result: StepResult) -> None:
        """Record one step and whatever happened in it; what raises in that is counted and said."""
        if self.failures.exhausted(Place.RECORD):
            return
        try:
            self._record(run, decision, outcome, result)
        except Exception as error:
            self.failures.note(Place.RECORD, error)

    def _record(self, run: State, decision: Decision, outcome: StepOutcome, result: StepResult) -> None:
        self.total_ms += result.step_time_ms
        if result.phase is not self._last_phase:
            self._write(run, "transition", {"from": self._last_phase, "to": result.phase, "reason": decision.reason})
            self._last_phase = result.phase
        if result.phase is Phase.FULL:
            self.step_ms.push(result.step_time_ms)
        if outcome.verdict is not None:
            self._jump(run, decision, outcome)
        if outcome.probation is not None:
            before, after = outcome.probation
            reason = Reason.KEPT if outcome.kept else Reason.DEGRADED
            self._write(
                run,
                "correction",
                {"kept": outcome.kept, "reason": reason, "loss_before": before, "loss_after": after},
            )
        if self.heard:
            self._step(run, decision, result)

    @property
    def heard(self) -> bool:
        """Whether anybody gets the records; else they are not even made."""
        return not isinstance(self.sink, NullSink)

    def _step(self, run: State, decision: Decision, result: StepResult) -> None:
        """Queue the record of one step; on an accelerator its scalars are fetched together, later."""
        c = run.meter
        record = {
            "schema": SCHEMA, "event": "step", "step": c.num_steps, "phase": result.phase,
            "lr": run.learning_rate, "cost_units": c.cost_units, "num_real_steps": c.num_real_steps,
            "confidence": result.confidence, "was_predicted": result.was_predicted,
            "step_time_ms": result.step_time_ms, "skipped": result.skipped, "reason": decision.reason,
        }  # fmt: skip
        self._pending.append((record, result.loss_tensor, result.gradient_norm_tensor))
        if run.subject.on_cpu or len(self._pending) >= run.losses.readout.interval:
            self.flush()

    def flush(self) -> None:
        """Write the queued step records: one transfer for all of them."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        scalars = [t.detach().reshape(()) for _, *pair in pending for t in pair if t is not None]
        values: Iterator[float] = iter(weights.on_host(scalars).tolist())
        for record, loss, norm in pending:
            record["loss"] = next(values) if loss is not None else None
            record["gradient_norm"] = next(values) if norm is not None else None
            self._emit(record)

    def _jump(self, run: State, decision: Decision, outcome: StepOutcome) -> None:
        verdict, prediction = outcome.verdict, outcome.prediction
        assert verdict is not None
        self.predict_ms.append(outcome.prediction_ms)
        self.overhead_ms += outcome.prediction_ms
        self.confidences.push(decision.confidence)
        if verdict.accepted and prediction is not None:
            self.jump_lengths.append(prediction.horizon)
            self.loss_pairs.append((prediction.predicted_loss, verdict.loss_after))
        if not self.heard:
            return
        self._write(
            run,
            "jump",
            {
                "cost_units": run.meter.cost_units, "accepted": verdict.accepted, "reason": verdict.reason,
                "horizon": decision.horizon, "scale": verdict.scale, "candidate": verdict.candidate,
                "origin": verdict.origin, "loss_before": verdict.loss_before, "loss_after": verdict.loss_after,
                "predicted_loss": None if prediction is None else prediction.predicted_loss,
                "predicted_reduction": None if prediction is None else prediction.predicted_reduction,
                "measured_reduction": verdict.gain, "upper_bound": verdict.upper_bound, "price": verdict.price,
                "confidence": decision.confidence, "predictor": run.proposer.predictor.name,
                "num_forward": verdict.num_forward,
                "epistemic": None if prediction is None else prediction.epistemic,
                "aleatoric": None if prediction is None else prediction.aleatoric,
                **self._saved_prediction(run, outcome),
            },
        )  # fmt: skip

    @staticmethod
    def _saved_prediction(run: State, outcome: StepOutcome) -> dict[str, Any]:
        """Coefficients of an accepted jump, scale included; the forecast too if ``save_predictions`` asks for it."""
        correction = run.proposer.correction
        saved: dict[str, Any] = {
            "correction_magnitude": 0.0 if correction is None else correction.magnitude,
            "num_similar": 0 if correction is None else correction.num_similar,
            "similarity_weights": () if correction is None else correction.weights,
        }
        saved["coefficients"] = None if outcome.applied is None else outcome.applied.tolist()
        if run.config.metrics.save_predictions and outcome.prediction is not None:
            saved["proposed"] = outcome.prediction.coefficients.tolist()
            saved["loss_trajectory"] = outcome.prediction.loss_trajectory
            saved["loss_interval"] = outcome.prediction.loss_interval
        return saved

    def on_alarm(self, run: State, alarm: Alarm) -> None:
        """Record a divergence alarm of any level above normal."""
        event = {
            "step": run.meter.num_steps, "severity": alarm.level.name.lower(), "signal": alarm.signal,
            "action": alarm.action.value, "value": alarm.value, "threshold": alarm.threshold,
        }  # fmt: skip
        run.meter.divergence_event()
        if len(self.divergence_events) < 1000:
            self.divergence_events.append({**event, "recovery_successful": None})
        self._write(run, "divergence", {**event, "level": event["severity"]})

    def on_recovery(self) -> None:
        """A finite, quiet step: the alarms so far are over."""
        for event in reversed(self.divergence_events):
            if event["recovery_successful"] is not None:
                break
            event["recovery_successful"] = True

    def on_outcomes(self, run: State, accounts: list[Any]) -> None:
        """Record settled ledger accounts."""
        for a in accounts if self.heard else ():
            self._write(
                run, "outcome",
                {
                    "skipped": a.skipped, "gate_gain": a.gain, "gain_left": a.left,
                    "persistence": run.judge.ledger.persistence,
                },
            )  # fmt: skip

    def on_health(self, run: State) -> None:
        """Record the report on gradient health of the window that has just closed, if one was due."""
        report = run.windows.observer.new_health()
        if report is not None:
            self._write(run, "health", report)

    def on_window(self, encode_ms: float, update_ms: float, cosine: float | None) -> None:
        """Time spent closing a window and learning from it, and how well its displacement was forecast."""
        self.encode_ms.append(encode_ms)
        self.update_ms.append(update_ms)
        self.overhead_ms += encode_ms + update_ms
        if cosine is not None:
            self.cosines.append(cosine)

    def validation(self, run: State, val_loss: float, wall_s: float, solution_error: float | None = None) -> None:
        """Record a validation loss measured outside the run's cost, and the error of the solution if there is one."""
        c = run.meter
        error = {} if solution_error is None else {"solution_error": solution_error}
        self._write(
            run, "validation",
            {"cost_units": c.cost_units, "num_real_steps": c.num_real_steps, "wall_s": wall_s, "val_loss": val_loss,
             **error},
        )  # fmt: skip

    def _write(self, run: State, event: str, values: Mapping[str, Any]) -> None:
        self.flush()  # records stay in order
        self._emit({"schema": SCHEMA, "event": event, "step": run.meter.num_steps, **values})

    def _emit(self, record: Mapping[str, Any]) -> None:
        """Hand a record to the sink, unless it failed too often."""
        if self.failures.exhausted(Place.RECORD):
            return
        try:
            self.sink.write(record)
        except Exception as error:  # a sink of the user's own, a file that was closed
            self.failures.note(Place.RECORD, error)

    # ---- summary ----------------------------------------------------------------------------------------

    def summary(self, run: State) -> dict[str, Any]:
        """Summary in the published schema, plus ``ledger`` and ``statistics``.

        ``wall_clock_speedup`` and ``baseline_loss_estimate`` are null: one run cannot know them; only
        a comparison against a baseline can (``hpt compare``).
        """
        notes: list[str] = []
        found: dict[str, Any] = {}
        for name, figures in self._figures(run).items():
            try:
                told = {name: figures()}
            except Exception as error:  # the training behind it is done: one figure must not take the rest along
                told = {name: None}
                notes.append(f"{name} is not known: {type(error).__name__}: {error}")
            found |= told.get("observer") or {} if name == "observer" else told
        return {**found, "metrics_incomplete": self._incomplete, **({"notes": notes} if notes else {})}

    @property
    def _incomplete(self) -> bool:
        return self.sink.incomplete or self.failures.counts[Place.RECORD] > 0

    def _figures(self, run: State) -> dict[str, Callable[[], Any]]:
        """Parts of the summary, each by itself; those of the observer stand beside the others."""
        c = run.meter
        return {
            "training_summary": lambda: {
                "total_steps": c.num_steps, **{f"{phase}_steps": n for phase, n in c.steps_by_phase.items()},
                "backward_reduction_pct": c.backward_reduction_pct, "wall_clock_speedup": None,
                "final_loss": jsonable(run.losses.history.loss_ema.mean), "baseline_loss_estimate": None,
                "loss_gap_pct": None,
            },
            "phase_statistics": self._phase_statistics,
            "divergence_events": lambda: [jsonable(e) for e in self.divergence_events],
            "divergence_exits_per_100_steps": lambda: 100 * c.num_divergence_events / c.num_steps
            if c.num_steps
            else 0.0,
            "predictor_overhead": lambda: self._overhead(run),
            "calibration": lambda: jsonable(run.proposer.feedback.confidence.report()),
            "observer": lambda: jsonable(run.windows.observer.summary()),
            "histograms": lambda: histograms(run),
            "ledger": lambda: {k: jsonable(v) for k, v in run.judge.ledger.summary().items()},
            "statistics": lambda: statistics(run),
            "failures": lambda: jsonable(run.failures.summary()),
        }  # fmt: skip

    def _phase_statistics(self) -> dict[str, Any]:
        lengths = self.jump_lengths
        return {
            "avg_predict_length": sum(lengths) / len(lengths) if lengths else None,
            "max_predict_length": max(lengths) if lengths else None,
            "avg_confidence": jsonable(self.confidences.mean),
            "prediction_accuracy": {
                "loss_mae": mean([abs(p - m) for p, m in self.loss_pairs]),
                "loss_correlation": correlation(self.loss_pairs),
                "weight_cosine_similarity": mean(self.cosines),
            },
        }

    def _overhead(self, run: State) -> dict[str, Any]:
        return {
            "encode_time_ms_avg": mean(self.encode_ms),
            "predict_time_ms_avg": mean(self.predict_ms),
            "update_time_ms_avg": mean(self.update_ms),
            "memory_used_mb": run.proposer.predictor.memory_bytes() / 2**20,
            "basis_mb": sum(run.windows.basis.memory_bytes().values()) / 2**20,
            "update_every": run.proposer.predictor.update_every if isinstance(run.proposer.predictor, Paced) else None,
            "pct_of_step_time": 100 * self.overhead_ms / self.total_ms if self.total_ms else None,
        }

    def state_dict(self) -> StateDict:
        """What a summary after a resume needs."""
        return {
            "divergence_events": list(self.divergence_events), "jump_lengths": list(self.jump_lengths),
            "confidences": self.confidences.state_dict(), "loss_pairs": [list(p) for p in self.loss_pairs],
            "cosines": list(self.cosines), "step_ms": self.step_ms.state_dict(), "predict_ms": list(self.predict_ms),
            "encode_ms": list(self.encode_ms),
            "update_ms": list(self.update_ms), "total_ms": self.total_ms, "overhead_ms": self.overhead_ms,
            "last_phase": self._last_phase.value,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in ("divergence_events", "jump_lengths", "cosines", "predict_ms", "encode_ms", "update_ms"):
            kept = list(state[name])
            setattr(self, name, kept if name == "divergence_events" else deque(kept, maxlen=KEPT))
        self.loss_pairs = deque(((p, m) for p, m in state["loss_pairs"]), maxlen=KEPT)
        self.confidences.load_state_dict(state["confidences"])
        self.step_ms.load_state_dict(state["step_ms"])
        self.total_ms, self.overhead_ms = state["total_ms"], state["overhead_ms"]
        self._last_phase = Phase(state["last_phase"])
