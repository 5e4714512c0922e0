"""``HybridTrainer``: decide -> execute -> monitor -> observe -> record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from . import persistence
from .config import HybridTrainerConfig
from .executors import EXECUTORS, Execution, force_full, respond, run_plain, settle_anchor
from .history import Reading
from .ledger import PASS_UNITS, STEP_UNITS
from .metrics import JsonlSink, Metrics, NullSink, Sink, statistics
from .phases import Signals, validate_transition
from .predictors import Predictor
from .records import (
    Action,
    Alarm,
    ConfigError,
    Decision,
    DivergenceError,
    EpochResult,
    Level,
    Phase,
    StepResult,
)
from .run import LossFn, Run


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """``model(**batch).loss`` for mappings, as the model libraries return it.

    Raises:
        TypeError: the batch is not a mapping: then a ``loss_fn`` is needed.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches are {type(batch).__name__}: pass loss_fn=lambda model, batch: ... (the default needs mappings)"
        )
    output = model(**batch)
    loss = output["loss"] if isinstance(output, Mapping) else output.loss
    assert isinstance(loss, Tensor), "the model's output has no loss: pass loss_fn"
    return loss


class HybridTrainer:
    """Trains any module with any optimizer, predicting where it pays.

    Example::

        trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(), loss_fn=loss_fn, lr_scheduler=scheduler)
        for batch in loader:
            result = trainer.step(batch)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: HybridTrainerConfig | None = None,
        loss_fn: LossFn | None = None,
        lr_scheduler: Any = None,
        *,
        grad_scaler: Any = None,
        predictor: Predictor | None = None,
        roles: dict[str, str] | None = None,
    ) -> None:
        """Wrap a model and its optimizer; neither is changed until the first step.

        Args:
            model: Any module.
            optimizer: Any optimizer whose step needs no closure.
            config: Defaults if None.
            loss_fn: (model, batch) -> scalar tensor.
            lr_scheduler: Stepped by the trainer, on the configured clock.  Do not step it yourself.
            grad_scaler: ``torch.amp.GradScaler`` for float16.
            predictor: One of your own instead of ``config.predictor_type``.
            roles: Overrides of parameter roles, qualified name -> role.

        Raises:
            ConfigError: the optimizer needs a closure (LBFGS), the schedule a metric, or nothing can be trained.
        """
        self.config = config if config is not None else HybridTrainerConfig()
        if isinstance(optimizer, LBFGS):
            raise ConfigError(
                "LBFGS evaluates the loss several times per step through a closure and cannot be wrapped; "
                "use Adam or SGD: the secant predictor supplies the curvature"
            )
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            raise ConfigError(
                "ReduceLROnPlateau needs a metric at every step and cannot follow the trainer's clock; use another "
                "schedule, or step it yourself and pass lr_scheduler=None"
            )
        self.run = Run(
            model, optimizer, self.config, loss_fn or default_loss, lr_scheduler, grad_scaler, roles, predictor
        )
        wanted = self.config.collect_metrics and self.config.metrics.path
        sink: Sink = JsonlSink(self.config.metrics.path) if wanted else NullSink()
        self.metrics = Metrics(sink, log_interval=self.config.metrics.log_interval)
        self._busy = False

    # ---- one step ----------------------------------------------------------------------------------

    def step(self, batch: Any) -> StepResult:
        """Take one step with one batch: real, or a predicted jump judged on it.

        Raises:
            TypeError: ``loss_fn`` did not return a scalar tensor with a graph.
            DivergenceError: too many consecutive steps were not finite.
        """
        if self._busy:
            raise RuntimeError("step() was called from inside step()")
        self._busy = True
        started = time.perf_counter()
        try:
            run = self.run
            decision = run.controller.decide(self._signals())
            self._enter(decision)
            run.note_batch(batch)
            run.ledger.exact = run.deterministic
            executor = EXECUTORS[decision.phase] if self.config.enabled else run_plain
            execution = executor(run, batch, decision)
            run.batch_free = not execution.consumed
            alarm = self._monitor(execution)
            self._observe(execution)
            result = self._result(decision, execution, alarm, started)
            self.metrics.record(run, decision, execution, result)
            return result
        finally:
            self._busy = False

    def step_n(self, batches: Sequence[Any], n: int) -> list[StepResult]:
        """Take ``n`` steps with the first ``n`` batches.

        Raises:
            ValueError: fewer than ``n`` batches.
        """
        if len(batches) < n:
            raise ValueError(f"step_n needs {n} batches, got {len(batches)}")
        return [self.step(batch) for batch in batches[:n]]

    def _signals(self) -> Signals:
        run = self.run
        s = run.probation
        return Signals(
            phase=run.phase,
            num_real_steps=run.counters.num_attempted_steps,
            num_real_steps_since_predict=run.num_real_steps_since_predict,
            loss_ema_stable=run.history.loss_ema_stable,
            baseline_known=run.history.norm_baseline.count > 0,
            window_just_closed=run.window_just_closed,
            predictor_ready=self._predictor_ready(),
            confidence=run.record.confidence,
            num_outcomes=run.record.num_outcomes,
            num_windows_since_proposal=run.num_windows_since_proposal,
            horizon=min(run.horizon, max(self.config.max_predict_steps, 1)),
            affordable=self._affordable() if run.window_just_closed else False,
            num_windows_to_wait=run.ledger.wait_windows,
            switched_off=run.ledger.switched_off,
            num_forced_full_steps=run.num_forced_full_steps,
            forced_by_alarm=run.forced_by_alarm,
            num_probation_steps=0 if s is None or run.segment is not None else s.num_steps_left,
            num_segments_left=0 if run.segment is None else run.segment.num_left,
            fallback_threshold=2 * run.window_loss,
        )

    def _predictor_ready(self) -> bool:
        run = self.run
        try:
            return run.observing and run.basis.ready and run.num_predictor_failures < 3 and run.predictor.ready
        except Exception as error:
            run.note_predictor_failure(error)
            return False

    def _affordable(self) -> bool:
        run = self.run
        # what a proposal costs: the gate's forwards and the passes over the weights (see ledger)
        price = 5.0 if run.deterministic else 3.0
        return run.ledger.affordable(price, run.counters.cost_units)

    def _enter(self, decision: Decision) -> None:
        run = self.run
        if decision.phase is not run.phase:
            validate_transition(run.phase, decision.phase)
        run.phase = decision.phase
        run.window_just_closed = False
        run.counters.num_steps += 1
        name = f"{decision.phase.value}_steps"
        setattr(run.counters, name, getattr(run.counters, name) + 1)

    # ---- monitor and observe --------------------------------------------------------------------------

    def _monitor(self, execution: Execution) -> Alarm:
        """Read the losses that are due, check them, respond to the worst alarm."""
        run = self.run
        if not self.config.enabled or run.phase is Phase.PREDICT:
            return Alarm()
        run.readout.push(run.counters.num_attempted_steps, execution.loss, execution.gradient_norm)
        window_full = run.observing and run.basis.num_steps >= self.config.predictor.window
        readings = run.readout.read(force=window_full)
        alarms = [self._check(reading) for reading in readings]
        if readings and not run.on_cpu:
            settle_anchor(run, finite=all(r.finite for r in readings))
        alarm = max(alarms, key=lambda a: a.level, default=Alarm())
        if alarm.action is Action.ABORT:
            raise DivergenceError(
                f"{int(alarm.value)} steps in a row had no finite loss or gradient ({alarm.signal}); the weights are those "
                "of the last good step. Lower the learning rate, check the data of these batches, or load a checkpoint"
            )
        if alarm.level >= Level.WARNING:
            respond(run, alarm)
        return alarm

    def _check(self, reading: Reading) -> Alarm:
        run = self.run
        warming_up = run.phase is Phase.WARMUP
        alarm = run.monitor.check(reading, run.history, warming_up=warming_up)
        if alarm.level < Level.CRITICAL and reading.finite:
            run.history.push(reading, warming_up=warming_up)
            run.norm_sum += reading.gradient_norm or 0.0
        if alarm.level >= Level.WARNING:
            self.metrics.note_alarm(run, alarm)
        elif alarm.quiet:
            self.metrics.note_recovery()
        return alarm

    def _observe(self, execution: Execution) -> None:
        """Close the window when it is full: the predictor learns, the ledger settles."""
        run = self.run
        if not run.observing or run.phase is Phase.PREDICT or run.basis.num_steps < self.config.predictor.window:
            return
        started = time.perf_counter()
        loss_before = run.window_loss
        window = run.close_window()
        self._learn(window)
        run.ledger.note_window(window.loss / loss_before if loss_before else float("nan"), jumped=window.jumped)
        self.metrics.note_outcomes(run, run.ledger.settle(run.counters.num_real_steps, window.loss))
        # per step two sums of three passes each; at the close one displacement, two rows of products
        passes = 6 * window.num_steps + 10 + (2 if run.basis.spec.curvature else 1) * run.basis.num_columns
        run.counters.num_passes += passes
        run.ledger.observe(passes * PASS_UNITS)
        run.window_just_closed = True
        run.buffers.forget()
        self.metrics.note_window(1e3 * (time.perf_counter() - started), None)

    def _learn(self, window: Any) -> None:
        run = self.run
        if run.num_predictor_failures >= 3:
            return
        try:
            run.predictor.observe(window)
        except Exception as error:
            run.note_predictor_failure(error)

    def _result(self, decision: Decision, execution: Execution, alarm: Alarm, started: float) -> StepResult:
        run = self.run
        verdict, prediction = execution.verdict, execution.prediction
        error = None
        if verdict is not None and verdict.accepted and prediction is not None:
            error = abs(verdict.loss_after - prediction.predicted_loss) / max(abs(verdict.loss_after), 1e-12)
        return StepResult(
            loss_tensor=execution.loss,
            phase=decision.phase,
            was_predicted=verdict is not None and verdict.accepted,
            prediction_error=error,
            confidence=run.record.confidence,
            step_time_ms=1e3 * (time.perf_counter() - started),
            step=run.counters.num_steps,
            reason=(verdict.reason if verdict is not None else decision.reason).value,
            gradient_norm_tensor=execution.gradient_norm,
            skipped=execution.skipped,
            num_forward=execution.forwards,
            num_backward=execution.backwards,
            num_claimed_steps=execution.claimed,
            verdict=verdict,
            alarm=alarm,
            consumed=execution.consumed,
        )

    # ---- loops -------------------------------------------------------------------------------------------

    def train_epoch(
        self, dataloader: Iterable[Any], progress_callback: Callable[[StepResult], None] | None = None
    ) -> EpochResult:
        """One pass over a loader; the batch of a refused proposal is used for the next real step."""
        return self.fit(dataloader, progress_callback=progress_callback)

    def fit(
        self,
        loader: Iterable[Any],
        total_steps: int | None = None,
        progress_callback: Callable[[StepResult], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> EpochResult:
        """Train until the clock reaches ``total_steps`` or the loader ends.

        Args:
            loader: Batches.
            total_steps: End of the run on the configured clock (``config.clock``); None: the loader's end.
            progress_callback: Called with every result.
            should_stop: Asked between steps; True ends the loop in a consistent state.
        """
        run = self.run
        before = statistics(run)
        phases_before = self._phase_counts()
        started = time.perf_counter()
        losses: list[Tensor] = []
        num_steps = 0
        stopped = False
        if total_steps is not None:
            run.ledger.planned_units = total_steps * STEP_UNITS
        for batch in _replaying(loader, self._unused):
            self._last_batch = batch
            result = self.step(batch)
            self._batch_free = not result.consumed
            num_steps += 1
            if result.num_backward or result.was_predicted:  # a refused proposal learnt nothing: no loss of its own
                losses.append(result.loss_tensor)
            if progress_callback is not None:
                progress_callback(result)
            if should_stop is not None and should_stop():
                stopped = True
                break
            if total_steps is not None and run.position >= total_steps and run.probation is None and run.segment is None:
                break
        self._settle_readings()
        after = statistics(run)
        mean = float(torch.stack([v.detach().float().cpu() for v in losses]).mean()) if losses else float("nan")
        counts = {k: v - phases_before[k] for k, v in self._phase_counts().items()}
        claimed = after["num_claimed_steps"] - before["num_claimed_steps"]
        backward = after["num_backward"] - before["num_backward"]
        return EpochResult(
            num_steps=num_steps,
            mean_loss=mean,
            final_loss=float(losses[-1]) if losses else float("nan"),
            phase_counts=counts,
            num_real_steps=after["num_real_steps"] - before["num_real_steps"],
            num_claimed_steps=claimed,
            num_credited_steps=after["num_credited_steps"] - before["num_credited_steps"],
            num_forward=after["num_forward"] - before["num_forward"],
            num_backward=backward,
            num_jumps_proposed=after["num_jumps_proposed"] - before["num_jumps_proposed"],
            num_jumps_accepted=after["num_jumps_accepted"] - before["num_jumps_accepted"],
            backward_reduction_pct=100.0 * claimed / (claimed + backward) if claimed + backward else 0.0,
            cost_units=after["cost_units"] - before["cost_units"],
            epoch_time_s=time.perf_counter() - started,
            stopped_early=stopped,
        )

    def _unused(self) -> Any:
        """The batch to use again, or None."""
        return self._last_batch if self._batch_free else None

    _last_batch: Any = None
    _batch_free: bool = False

    def _phase_counts(self) -> dict[str, int]:
        return {phase.value: getattr(self.run.counters, f"{phase.value}_steps") for phase in Phase}

    def _settle_readings(self) -> None:
        """Read what an accelerator still holds back."""
        run = self.run
        readings = run.readout.read(force=True)
        for reading in readings:
            self._check(reading)
        if readings and not run.on_cpu:
            settle_anchor(run, finite=all(r.finite for r in readings))

    # ---- questions and requests -----------------------------------------------------------------------------

    @property
    def backward_reduction(self) -> float:
        """Percentage of backward passes avoided if every claimed step were a real one (a diagnostic)."""
        return self.run.counters.backward_reduction_pct

    @property
    def speedup_factor(self) -> float:
        """(real + credited steps) over the cost in steps; 1 without prediction.

        Credited steps are what the ledger's persistence and the loss slope support.  It is the run's
        own estimate; the measured figure needs a baseline (``hpt compare``).
        """
        c = self.run.counters
        cost = c.cost_units / STEP_UNITS
        return (c.num_attempted_steps + self.run.ledger.num_credited_steps) / cost if cost else 1.0

    @property
    def current_step(self) -> int:
        """Calls of :meth:`step` so far."""
        return self.run.counters.num_steps

    def current_confidence(self) -> float:
        """Probability that the next jump is kept, in [0, 1]."""
        return self.run.record.confidence

    def statistics(self) -> dict[str, Any]:
        """Counts and the ledger's estimate, JSON-able."""
        return statistics(self.run)

    def summary(self) -> dict[str, Any]:
        """Metrics summary in the published schema."""
        self._settle_readings()
        return self.metrics.summary(self.run)

    def force_full_phase(self, steps: int) -> None:
        """No proposals for the next ``steps`` real steps.

        Raises:
            ValueError: negative.
        """
        if steps < 0:
            raise ValueError(f"force_full_phase needs a number of steps >= 0, got {steps}")
        force_full(self.run, steps, by_alarm=False)

    def memory_usage(self) -> dict[str, int]:
        """Bytes held by predictor, basis and snapshots."""
        return persistence.memory_usage(self.run)

    # ---- checkpoints -----------------------------------------------------------------------------------------

    def save_checkpoint(self, path: str | Path) -> Path:
        """Write a checkpoint folder below ``path``; returns it.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched.
        """
        self._settle_readings()
        return persistence.save(self, Path(path))

    def load_checkpoint(self, path: str | Path) -> None:
        """Continue from a checkpoint folder, bit for bit.

        Raises:
            CheckpointError: missing, damaged, or of another model; nothing has been changed then.
        """
        persistence.load(self, Path(path))


def _replaying(loader: Iterable[Any], unused: Callable[[], Any]) -> Iterator[Any]:
    """Batches of a loader, each given again for as long as ``unused`` returns it."""
    for batch in loader:
        yield batch
        while (again := unused()) is not None:
            yield again
