"""``HybridTrainer``: decide -> execute -> monitor -> observe -> record."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from . import persistence, weights
from .config import HybridTrainerConfig
from .cycle import describe, enter, judge_lookahead, monitor, observe, rescale, settle_readings, signals
from .executors import EXECUTORS, run_plain
from .ledger import STEP_UNITS
from .metrics import JsonlSink, Metrics, NullSink, Sink, statistics
from .predictors import Predictor
from .records import (
    ConfigError,
    EpochResult,
    Phase,
    StepResult,
)
from .responses import force_full
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
            decision = run.controller.decide(signals(run))
            enter(run, decision)
            began = time.perf_counter()
            run.note_batch(batch)
            run.ledger.exact = run.deterministic
            executor = EXECUTORS[decision.phase] if self.config.enabled else run_plain
            execution = executor(run, batch, decision)
            run.batch_free = not execution.consumed
            alarm = monitor(run, self.metrics, execution)
            rescale(run, execution)
            judge_lookahead(run, execution)
            observe(run, self.metrics, execution, began)
            result = describe(run, decision, execution, alarm, started)
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
            if (
                total_steps is not None
                and run.position >= total_steps
                and run.probation is None
                and run.segment is None
            ):
                break
        settle_readings(self.run, self.metrics)
        after = statistics(run)
        mean = float(weights.on_host([v.detach() for v in losses]).float().mean()) if losses else float("nan")
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
        return self.run.stated_confidence

    def statistics(self) -> dict[str, Any]:
        """Counts and the ledger's estimate, JSON-able."""
        return statistics(self.run)

    def summary(self) -> dict[str, Any]:
        """Metrics summary in the published schema."""
        settle_readings(self.run, self.metrics)
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
        settle_readings(self.run, self.metrics)
        return persistence.save(self.run, self.metrics, Path(path))

    def load_checkpoint(self, path: str | Path) -> None:
        """Continue from a checkpoint folder, bit for bit.

        Raises:
            CheckpointError: missing, damaged, or of another model; nothing has been changed then.
        """
        persistence.load(self.run, self.metrics, Path(path))


def _replaying(loader: Iterable[Any], unused: Callable[[], Any]) -> Iterator[Any]:
    """Batches of a loader, each given again for as long as ``unused`` returns it."""
    for batch in loader:
        yield batch
        while (again := unused()) is not None:
            yield again
