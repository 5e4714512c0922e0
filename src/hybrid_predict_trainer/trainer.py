"""``HybridTrainer``: decide -> execute -> monitor -> observe -> record."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence, Sized
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from .config.settings import HybridTrainerConfig
from .cost import STEP_UNITS
from .cycle import outside
from .cycle.construction import Handed, build_run
from .cycle.construction import default_loss as default_loss
from .cycle.foretell import foretell, planned
from .cycle.learning import settle_readings
from .cycle.loop import take_step
from .cycle.passes import Rounds, Tally, goes_round, has_ended, owes_proposal, replaying
from .cycle.transaction import interrupted
from .distributed.processes import refuse_other_processes
from .forecast.final_loss import Forecast
from .forecast.stopping import StopWhen
from .judge.validation import ValFn
from .keep import resume as persistence
from .keep.background import Write
from .keep.batch_norm import reestimate
from .keep.data_position import DataPosition
from .keep.finiteness import trained_weights_finite, whereabouts
from .keep.housekeeping import newest_good
from .keep.periodic import PeriodicSaver
from .keep.subject import JudgeFn, LossFn, OutputFn, ResidualFn
from .move.modifier import StepModifier
from .move.recipe import Recipe
from .notices import users_line
from .predictors import Predictor
from .records import ConfigError, EpochResult, StateDict, StepResult
from .recovery import NumericalInstability
from .tell.figures import statistics
from .tell.recorder import Metrics
from .tell.sinks import Sink, Writer
from .weights.offload import own_defaults


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
        lr_interval: Literal["step", "epoch"] | None = None,
        val_fn: ValFn | None = None,
        val_cost: float = 1.0,
        sinks: Sequence[Sink | Writer] = (),
        modifiers: Sequence[StepModifier] = (),
        residual_fn: ResidualFn | None = None,
        output_fn: OutputFn | None = None,
        judge_fn: JudgeFn | None = None,
    ) -> None:
        """Wrap a model and its optimizer; neither is changed until the first step.

        Args:
            model: Any module.
            optimizer: Any optimizer whose step needs no closure.
            config: Defaults if None.
            loss_fn: (model, batch) -> scalar tensor; or a loss of (output, target), such as ``nn.MSELoss()``, for
                batches (input, target).
            lr_scheduler: Stepped by the trainer, on the configured clock.  Do not step it yourself.
            grad_scaler: ``torch.amp.GradScaler`` for float16.
            predictor: One of your own instead of ``config.predictor_type``.
            roles: Overrides of parameter roles, qualified name -> role.
            lr_interval: What one step of the schedule stands for: a step, or a pass over the data; None: as configured.
            val_fn: model -> validation loss, a number or a scalar tensor in the units of the loss, of samples that no
                step is trained on.  Where the same data come round again (several epochs, a full batch) the learning
                rate is raised on its word only, and jumps end for good, with the state of its best answer put back,
                where it rises on them.  It is asked rarely; one that raises is told and not asked again.
            val_cost: What one answer of it costs, in forwards of a training batch.
            sinks: Objects of your own that get every record, beside the file that ``metrics.path`` names.
            modifiers: Of your own, around every step of the optimizer (:class:`.StepModifier`).
            residual_fn: (model, batch) -> residuals (R,) or (R, C) whose mean square is the loss, for
                ``predictor.type = "gauss_newton"``.
            output_fn: Instead, (model, batch) -> outputs (N,) or (N, C) and the loss as a convex function of them.
            judge_fn: (model, batch) -> score of each sample (N,), higher is better, by which jumps are judged instead
                of the loss: where that says nothing of how good the model is, as in reinforcement learning.

        Raises:
            ConfigError: the optimizer needs a closure (LBFGS), the schedule a metric, nothing can be trained, or
                prediction is on and ranks cannot agree (several processes without DistributedDataParallel or
                ``fully_shard``, FSDP of the first kind).
        """
        handed = Handed(
            loss_fn=loss_fn, lr_scheduler=lr_scheduler, grad_scaler=grad_scaler, predictor=predictor, roles=roles,
            lr_interval=lr_interval, val_fn=val_fn, val_cost=val_cost, sinks=sinks, modifiers=modifiers,
            residual_fn=residual_fn, output_fn=output_fn, judge_fn=judge_fn,
        )  # fmt: skip
        self.run = build_run(model, optimizer, config, handed)
        self.config = self.run.proposer.settings
        self._busy = False
        self._data = DataPosition()
        own = self.config.checkpoint
        self._saver: PeriodicSaver | None = None
        if own.directory:
            capture = self.capture_checkpoint if own.async_save else None
            ranks = self.run.subject.ranks
            self._saver = PeriodicSaver(own.directory, own.save_interval, self.save_checkpoint, capture, ranks)

    def __repr__(self) -> str:
        """What is trained, how, and where the run is."""
        subject, run = self.run.subject, self.run
        weights = sum(p.numel() for p in subject.parameters)
        state = f"predictor {run.proposer.predictor.name}" if self.config.enabled else "switched off"
        return (
            f"HybridTrainer({type(subject.model).__name__} with {weights:,} trained weights, "
            f"{type(subject.optimizer).__name__}, {state}, {run.phases.current.value}, step {self.current_step})"
        )

    @property
    def metrics(self) -> Metrics:
        """The recorder of this run."""
        return self.run.recorder

    # ---- one step ----------------------------------------------------------------------------------

    def step(self, batch: Any) -> StepResult:
        """Take one step with one batch: real, or a predicted jump judged on it.

        Raises:
            TypeError: ``loss_fn`` did not return a scalar tensor with a graph.
            DivergenceError: too many consecutive steps were not finite.
            ConfigError: prediction is on, and since construction more processes have come into play.
            RanksDisagree: several processes have lost each other.
            RuntimeError: it is called from inside itself, by a loss function say.
        """
        if self._busy:
            raise RuntimeError("step() was called from inside step()")
        try:
            self._busy = True
            if self.config.enabled:
                refuse_other_processes(self.run.subject.ranks)
            result = take_step(self.run, batch)
            outside.remember(self.run)
            self._busy = False
            self._save_if_due()
        except BaseException:
            self._busy = False
            interrupted(self.run)
            outside.remember(self.run)
            raise
        return result

    def _save_if_due(self) -> None:
        """Every ``save_interval`` steps a checkpoint is written where a directory is set; one that fails warns."""
        if self._saver is not None and self._saver.due(self.current_step):
            self._saver.keep_up(self.current_step)

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
        """One pass over a loader; the batch of a refused proposal is used for the next real step.

        Args:
            dataloader: Batches.
            progress_callback: Called with every result.

        Raises:
            DivergenceError: too many consecutive steps were not finite, or the weights are not at the end.
        """
        return self._go_through(dataloader, None, progress_callback, None)

    def fit(
        self,
        loader: Iterable[Any],
        total_steps: int | None = None,
        progress_callback: Callable[[StepResult], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        stop_when: StopWhen | None = None,
    ) -> EpochResult:
        """Train until the clock reaches ``total_steps``, round after round over the loader, or once through it.

        Where ``checkpoint.directory`` is set a checkpoint is written every ``save_interval`` steps and at the end.  A
        loader with ``state_dict`` and ``load_state_dict`` is part of it, and goes on there after ``load_checkpoint``.

        Args:
            loader: Batches.  A list or a data loader is gone through again (``set_epoch`` of its sampler is called);
                an iterator can be used once, and if it ends before ``total_steps`` a warning says so.
            total_steps: End of the run on the configured clock (``config.clock``); None: one pass.
            progress_callback: Called with every result.
            should_stop: Asked between steps; True ends the loop in a consistent state.
            stop_when: Ends the loop when the forecast of the final loss says that going on is not worth it.

        Raises:
            DivergenceError: too many consecutive steps were not finite, or the weights are not at the end.
            ConfigError: there is no batch, or prediction is on and more processes have come into play.
            TypeError: the loader is none.
        """
        if not isinstance(loader, Iterable):
            raise TypeError(
                f"fit takes the batches first, fit(loader, total_steps=...); this is a {type(loader).__name__}"
            )
        if stop_when is not None:
            should_stop = self._not_worth_it(stop_when, total_steps, should_stop)
        result = self._go_through(loader, total_steps, progress_callback, should_stop)
        if self._saver is not None and result.num_steps:
            self._saver.attempt(self.current_step)
        return result

    def _not_worth_it(
        self, rule: StopWhen, total_steps: int | None, should_stop: Callable[[], bool] | None
    ) -> Callable[[], bool]:
        """The caller's question, and the forecast's answer."""
        if total_steps is None:
            raise ConfigError("stop_when needs the end of the run: fit(loader, total_steps=...)")
        if not self.config.enabled:
            raise ConfigError("stop_when needs losses, and with enabled = False none are kept")
        run, end = self.run, total_steps

        def foretold(level: float) -> Forecast:
            return self.forecast(end, level=level)

        def asked() -> bool:
            if should_stop is not None and should_stop():
                return True
            return rule.ask(run.position, end, foretold, lambda: planned(run, end))

        return asked

    def _go_through(
        self,
        loader: Iterable[Any],
        total_steps: int | None,
        progress_callback: Callable[[StepResult], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> EpochResult:
        run, tally = self.run, Tally(self.run)
        stopped = False
        if total_steps is not None:
            run.meter.plan(total_steps)
        run.schedule.plan(total_steps)
        passes = Rounds(loader, self._end_pass, endless=total_steps is not None)
        if goes_round(loader, total_steps, run.position) or self._seen_before(loader):
            run.batches.recurrence.announce()
        try:
            left = self._data.follow(loader)
            over = has_ended(run, total_steps) and not owes_proposal(run, stopped=False)
            for batch in () if over else replaying(chain(left, passes), self._unused):
                self._last_batch = batch
                result = self.step(batch)
                tally.count_step()
                if result.num_backward or result.was_predicted:  # a refused proposal learnt nothing: no loss of its own
                    tally.losses.append(result.loss_tensor)
                if progress_callback is not None:
                    progress_callback(result)
                stopped = should_stop is not None and run.subject.ranks.any(should_stop())
                if (stopped or has_ended(run, total_steps)) and not owes_proposal(run, stopped=stopped):
                    break
        finally:
            run.schedule.plan(None)
        if passes.at_end:
            self._end_pass()
        settle_readings(self.run, self.metrics)
        if total_steps is not None and not stopped and not has_ended(run, total_steps):
            stopped = True
            warnings.warn(
                f"the loader ended after {tally.num_steps} steps, at {run.position} of {total_steps} on the clock, and "
                "can't be gone through again: pass a list or a data loader, or call fit again with more batches",
                stacklevel=users_line(),
            )
        if tally.num_steps and not trained_weights_finite(run.subject.optimizer):
            where = whereabouts(run.subject.model, run.subject.optimizer)
            raise NumericalInstability(f"training diverged: {where}.  Lower the learning rate", self.current_step)
        return tally.result(stopped_early=stopped)

    def end_epoch(self) -> None:
        """A pass over the data has ended: a schedule in epochs (``lr_interval="epoch"``) takes its step.

        ``fit`` and ``train_epoch`` call it; a loop of your own around ``step`` has to.
        """
        schedule = self.run.schedule
        schedule.end_epoch()
        self.run.step_scheduler()

    def _seen_before(self, loader: Iterable[Any]) -> bool:
        """Whether this very loader was gone through before, and remember it."""
        again = self._last_loader is not None and self._last_loader() is loader
        try:
            self._last_loader = weakref.ref(loader) if isinstance(loader, Sized) else None
        except TypeError:  # a plain list: its batches are known by their content
            self._last_loader = None
        return again

    def _end_pass(self) -> None:
        if self.run.schedule.in_epoch:
            self.end_epoch()

    def _with_position(self, extra: dict[str, StateDict] | None) -> dict[str, StateDict]:
        """The caller's parts, and where the loader stands if it can tell."""
        return {**self._data.parts(self._unused()), **(extra or {})}

    def _unused(self) -> Any:
        """The batch to use again, or None."""
        return self._last_batch if self.run.batches.free else None

    _last_loader: weakref.ref[Any] | None = None
    _last_batch: Any = None

    # ---- questions and requests -----------------------------------------------------------------------------

    @property
    def backward_reduction(self) -> float:
        """Percentage of backward passes avoided if every claimed step were a real one (a diagnostic)."""
        return self.run.meter.backward_reduction_pct

    @property
    def speedup_factor(self) -> float:
        """(real + credited steps) over the cost in steps; 1 without prediction.

        Credited steps are what the ledger's persistence and the loss slope support.  It is the run's
        own estimate; the measured figure needs a baseline (``hpt compare``).
        """
        c = self.run.meter
        cost = c.cost_units / STEP_UNITS
        return (c.num_attempted_steps + self.run.judge.ledger.num_credited_steps) / cost if cost else 1.0

    @property
    def current_step(self) -> int:
        """Calls of :meth:`step` so far."""
        return self.run.meter.num_steps

    def current_confidence(self) -> float:
        """Probability that the next jump is kept, in [0, 1]."""
        return self.run.proposer.confidence

    def statistics(self) -> dict[str, Any]:
        """Counts and the ledger's estimate, JSON-able."""
        return statistics(self.run)

    def summary(self) -> dict[str, Any]:
        """Metrics summary in the published schema."""
        settle_readings(self.run, self.metrics)
        return self.metrics.summary(self.run)

    def recipe(self) -> Recipe:
        """Step sizes of this run to take home: factors by role, and the learned multiplier of all of them.

        ``recipe().param_groups(model, lr)`` are parameter groups for a plain script, and ``recipe().save(path)`` is a
        file that ``training.recipe`` of another run takes.
        """
        return self.run.optimizer_step.recipe

    def forecast(self, total_steps: int | None = None, *, level: float = 0.9) -> Forecast:
        """The training loss at the end of the run under the rest of its schedule, with an interval; changes nothing.

        Args:
            total_steps: End of the run on its clock; None: as ``fit`` was told.
            level: Of the interval, the share of such intervals that hold the final loss.

        Raises:
            ConfigError: the end is not known, there are fewer than 8 losses after the warm-up, prediction is off, or
                scipy is missing.
        """
        settle_readings(self.run, self.metrics)
        return foretell(self.run, total_steps, level)

    def force_full_phase(self, steps: int) -> None:
        """No proposals for the next ``steps`` real steps.

        Raises:
            ValueError: negative.
        """
        if steps < 0:
            raise ValueError(f"force_full_phase needs a number of steps >= 0, got {steps}")
        self.run.phases.force_full(steps, by_alarm=False)

    def reestimate_batch_norm(self, batches: Iterable[Any]) -> int:
        """Running statistics of BatchNorm for the weights as they are now, from some batches of the training data.

        After a jump they are those of earlier weights until real steps have caught up: before an evaluation right
        after one this is worth its forwards.  Nothing else changes.

        Returns:
            The number of modules whose statistics are new.

        Raises:
            ValueError: there is no batch.
        """
        subject = self.run.subject
        found = reestimate(subject.model, lambda batch: subject.loss_fn(subject.model, batch), batches)
        subject.reshard()
        return found

    def memory_usage(self) -> dict[str, int]:
        """Bytes held by predictor, basis and snapshots."""
        return persistence.memory_usage(self.run)

    # ---- checkpoints -----------------------------------------------------------------------------------------

    @property
    def num_batches(self) -> int:
        """Batches used up so far: where the data go on after a resume.

        That of a refused proposal is not, because nothing was learnt from it.
        """
        return self.run.meter.num_attempted_steps + self.run.meter.num_jumps_accepted

    def keep_no_checkpoints(self) -> None:
        """Write none while training goes on, whatever ``checkpoint.directory`` says: the caller does."""
        self._saver = None

    def save_checkpoint(self, path: str | Path, *, extra: dict[str, StateDict] | None = None) -> Path:
        """Write a checkpoint folder below ``path``; returns it.

        Args:
            path: Made if missing.
            extra: More parts, such as the position in the data; plain data and tensors.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched.
        """
        settle_readings(self.run, self.metrics)
        with own_defaults():
            return persistence.save(self.run, self.metrics, Path(path), extra=self._with_position(extra))

    def capture_checkpoint(self, path: str | Path, *, extra: dict[str, StateDict] | None = None) -> Write:
        """Copy what a checkpoint of this moment holds; the write is left to whoever calls what is returned.

        The copy is apart from the live objects: it may be written from another thread while training goes on.

        Args:
            path: Made if missing.
            extra: As for :meth:`save_checkpoint`.

        Raises:
            CheckpointError: something cannot be held by a checkpoint.
        """
        settle_readings(self.run, self.metrics)
        with own_defaults():
            return persistence.captured(self.run, self.metrics, Path(path), extra=self._with_position(extra))

    def load_latest(self, directory: str | Path) -> dict[str, StateDict]:
        """Continue from the newest good checkpoint of a folder, bit for bit.

        A damaged one is set aside as ``*.corrupt`` with a warning, and the one before it is taken; one that is
        whole and does not fit this run is refused, as by :meth:`load_checkpoint`.

        Args:
            directory: Folder of checkpoints.

        Returns:
            As :meth:`load_checkpoint`.

        Raises:
            CheckpointError: there is none, or it is of another model; nothing has been changed then.
        """
        return newest_good(self.run.subject.ranks, directory, self.load_checkpoint)

    def load_checkpoint(self, path: str | Path) -> dict[str, StateDict]:
        """Continue from a checkpoint folder, bit for bit.

        Args:
            path: Folder of one checkpoint.

        Returns:
            All parts, for what was saved beside the trainer's own.

        Raises:
            CheckpointError: missing, damaged, or of another model; nothing has been changed then.
        """
        with own_defaults():
            parts = persistence.load(self.run, self.metrics, Path(path), self._data.check)
        self._data.found(parts)
        if self._saver is not None:
            self._saver.loaded(Path(path), self.current_step)
        return parts
