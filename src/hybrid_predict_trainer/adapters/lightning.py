"""Lightning's Trainer by a callback, and Fabric by one line::

    from hybrid_predict_trainer.adapters.lightning import HybridCallback, ride_along

    Trainer(max_steps=1000, callbacks=[HybridCallback()]).fit(module, loader)     # Trainer

    model, optimizer = fabric.setup(model, optimizer)                             # Fabric
    engine = ride_along(fabric, model, optimizer, scheduler, loss_fn=loss_fn)

With automatic optimization forward and backward run in a closure inside ``optimizer.step``: a hook before the step
comes before the forward.  The engine's station is behind the closure; ``on_before_optimizer_step`` sees gradients
unscaled and not clipped; the loss in ``on_before_backward`` is divided by the number of micro-batches.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..config.settings import HybridTrainerConfig
from ..cycle.engine import Engine, attach
from ..distributed.processes import wrapper_of
from ..forecast.stopping import StopWhen
from ..keep.subject import LossFn
from ..notices import warn
from ..predictors import Predictor
from ..records import ConfigError, StateDict
from ..tell.account import format_text
from ..tell.sinks import Sink, Writer
from .loops import Stations, figures, schedule_of_loop
from .missing import framework
from .replaced import Replaced

framework("lightning", "lightning")

from lightning.pytorch import Callback  # noqa: E402

#: Steps of a loop with manual optimization after which Lightning's own count must have moved.
NOTICED_AFTER = 3


class HybridCallback(Callback):  # type: ignore[misc]
    """Rides along in a Lightning ``Trainer``.

    ``max_steps`` and ``global_step`` count the optimizer's steps, as always; where the clock is at its end before,
    because steps were claimed or proposals had a price, the run stops there and writes its last checkpoint.  What is
    ours is in Lightning's checkpoints.

    Attributes:
        engine: That rides along; None before training.
        report: What came of it; None before the end of training.
    """

    def __init__(
        self,
        config: HybridTrainerConfig | None = None,
        *,
        loss_fn: LossFn | None = None,
        predictor: Predictor | None = None,
        roles: dict[str, str] | None = None,
        sinks: tuple[Sink | Writer, ...] = (),
        say: bool = True,
        stop_when: StopWhen | None = None,
    ) -> None:
        """Nothing is looked at before training begins.

        Args:
            config: Defaults if None.
            loss_fn: (module, batch) -> loss; None: what ``training_step`` returns.  With manual optimization it is
                needed, because ``training_step`` makes steps there.
            predictor: One of your own instead of ``config.predictor_type``.
            roles: Overrides of parameter roles, qualified name -> role.
            sinks: Objects of your own that get every record.
            say: Print the report at the end of training.
            stop_when: Ends the run when the forecast of its final loss says that going on is not worth it.
        """
        self.config = HybridTrainerConfig() if config is None else config
        self.engine: Engine | None = None
        self.report: dict[str, Any] | None = None
        self._stop_when = stop_when
        self._loss_fn, self._say = loss_fn, say
        self._handed: dict[str, Any] = {"predictor": predictor, "roles": roles, "sinks": sinks}
        self._loaded: StateDict | None = None  # before there was an engine
        self._accumulate = 1
        self._ended = self._noticed = False

    # ---- events ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the engine.

        Raises:
            ConfigError: as :func:`hybrid_predict_trainer.attach`; several optimizers; manual optimization without a
                loss function; a step that takes an iterator.
        """
        if len(trainer.optimizers) != 1:
            raise ConfigError(
                f"HybridCallback rides along with one optimizer, and there are {len(trainer.optimizers)}: attach() to "
                "each in your own training_step"
            )
        automatic = pl_module.automatic_optimization
        if not automatic and self._loss_fn is None and self.config.enabled:
            raise ConfigError(
                "with manual optimization training_step makes steps itself: pass HybridCallback(loss_fn=...)"
            )
        self._leave()
        scheduler, interval = _schedule_of(trainer)
        self._accumulate = trainer.accumulate_grad_batches if automatic else 1
        planned = trainer.estimated_stepping_batches if automatic else trainer.max_steps
        total_steps = int(planned) if 0 < planned < float("inf") else None
        self.engine = attach(
            trainer.strategy.model if _is_ddp(trainer) else pl_module, trainer.optimizers[0], self.config,
            loss_fn=self._loss_fn or ModuleLoss(trainer, pl_module),
            lr_scheduler=scheduler, lr_interval=interval, auto=False,
            schedule=schedule_of_loop(scheduler, total_steps), total_steps=total_steps,
            grad_scaler=getattr(trainer.precision_plugin, "scaler", None), **self._handed,
        )  # fmt: skip
        self.report, self._ended = None, False
        if self._loaded is not None:
            self.engine.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the first micro-batch of a step a jump may be made, judged on it."""
        engine = self.engine
        if engine is None:
            return
        if not engine.in_step:
            engine.between_steps(batch)
        engine.note(batch=batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """The loss of a micro-batch, which automatic optimization has divided."""
        if self.engine is not None:
            self.engine.note(loss.detach() * self._accumulate)
            self.engine.before_backward()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Gradients are complete, unscaled, and not clipped."""
        if self.engine is not None and self.engine.in_step:
            self.engine.after_backward()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The log says where the run is, and a run whose clock is at its end stops."""
        engine = self.engine
        if engine is None or engine.in_step or not self.config.enabled:
            return
        self.log_dict(figures(engine), on_step=True, on_epoch=False)
        self._notice_a_raw_optimizer(trainer, engine)
        given_up = self._stop_when is not None and engine.should_stop(self._stop_when)
        if (engine.finished or given_up) and not self._ended and not 0 <= trainer.max_steps <= trainer.global_step:
            trainer.should_stop = self._ended = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach, and report; a run that was ended here writes its last checkpoint."""
        engine = self.engine
        if engine is None:
            return
        if self._ended:
            _save_last(trainer)
        self.report = engine.report()
        if self.config.enabled and self._say and trainer.is_global_zero:
            print(format_text(self.report))
        engine.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Model and optimizer are a plain loop's again."""
        self._leave()

    # ---- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """What is the engine's own."""
        return {} if self.engine is None else {"engine": self.engine.state_dict()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Kept until training begins: optimizers and loops are loaded after callbacks."""
        self._loaded = state_dict.get("engine")

    # ---- parts --------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        if self.engine is not None:
            self.engine.detach()
            self.engine = None

    def _notice_a_raw_optimizer(self, trainer: Any, engine: Engine) -> None:
        """Steps of the optimizer inside Lightning's wrapper are steps that Lightning does not count."""
        steps = engine.run.meter.num_real_steps
        if not self._noticed and steps >= NOTICED_AFTER and trainer.global_step == 0:
            self._noticed = True
            warn(
                f"the optimizer has made {steps} steps and trainer.global_step is 0, so that max_steps never ends the "
                "run: step what self.optimizers() returns, not the optimizer inside it",
            )


class ModuleLoss:
    """What ``training_step`` returns for a batch that is not trained on: logs and metrics are as before."""

    def __init__(self, trainer: Any, module: Any) -> None:
        """Bind.

        Raises:
            ConfigError: ``training_step`` takes an iterator and not a batch.
        """
        self._known = weakref.ref(trainer)  # nothing that is found through it belongs to this loss
        parameters = list(inspect.signature(module.training_step).parameters)
        if "dataloader_iter" in parameters:
            raise ConfigError("training_step takes dataloader_iter, whose batches nobody else sees: pass loss_fn=")
        self._num_arguments = min(len(parameters), 2)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of a batch."""
        with untouched(model):
            trainer: Any = self._known()
            arguments = (batch, 0)[: self._num_arguments]
            if _is_ddp(trainer):  # what wraps the module exchanges, and ranks may evaluate unequally often
                with trainer.precision_plugin.train_step_context():
                    output = trainer.lightning_module.training_step(*arguments)
            else:
                output = trainer.strategy.training_step(*arguments)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError("training_step returned no loss for this batch")
        return loss


def _is_ddp(trainer: Any) -> bool:
    model = trainer.strategy.model
    return isinstance(model, nn.Module) and wrapper_of(model) == "DistributedDataParallel"


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """A block in which a module logs nothing, and after which its metrics hold what they held before."""
    replaced = Replaced()
    for name in ("log", "log_dict"):
        if hasattr(module, name):
            replaced.put(module, name, _nothing)
    metrics = [m for m in module.modules() if hasattr(m, "_defaults") and hasattr(m, "_update_count")]  # torchmetrics'
    before = [{name: _copied(value) for name, value in vars(m).items()} for m in metrics]
    try:
        yield
    finally:
        replaced.restore()
        for metric, held in zip(metrics, before, strict=True):
            vars(metric).clear()
            vars(metric).update(held)


def _copied(value: Any) -> Any:
    """Lists and tensors may be written to in place; the rest is bound anew."""
    if isinstance(value, list):
        return list(value)
    return value.detach().clone() if type(value) is Tensor else value


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of a module's log."""


def _schedule_of(trainer: Any) -> tuple[Any, Literal["step", "epoch"] | None]:
    """The schedule, and what one step of it stands for; none where it follows a metric."""
    configs = trainer.lr_scheduler_configs
    if not configs or isinstance(configs[0].scheduler, ReduceLROnPlateau):
        return None, None
    each_step = configs[0].interval == "step" and configs[0].frequency == 1
    return configs[0].scheduler, "step" if each_step else "epoch"


def _save_last(trainer: Any) -> None:
    """A checkpoint of the end, where checkpoints are asked for and none is of this step."""
    for saver in trainer.checkpoint_callbacks:
        if saver.dirpath is not None and getattr(saver, "_last_global_step_saved", None) != trainer.global_step:
            trainer.save_checkpoint(Path(saver.dirpath) / f"ended-step={trainer.global_step}.ckpt")
            return


# ---- Fabric ----------------------------------------------------------------------------------------------


def ride_along(
    fabric: Any, model: nn.Module, optimizer: Any, scheduler: Any = None, config: HybridTrainerConfig | None = None, *,
    loss_fn: LossFn | None = None, accumulate: int = 1, total_steps: int | None = None,
    lr_interval: Literal["step", "epoch"] | None = None, **more: Any,
) -> Engine:  # fmt: skip
    """Attach an engine to what ``fabric.setup`` has returned; the loop stays as it is.

    ``fabric.save(path, {"model": model, "optimizer": optimizer, "engine": engine})`` and ``fabric.load`` take the
    engine as they take any object with a state; name it last.

    Args:
        fabric: ``lightning.Fabric``.
        model: Set up.
        optimizer: Set up.
        scheduler: Stepped by the loop; None: there is none.
        config: Defaults if None.
        loss_fn: (model, batch) -> loss, where the model does not return its loss; then the loop hands every batch over
            as well: ``engine.note(batch=batch)``.
        accumulate: What the loop divides its losses by, with ``loss_fn``.
        total_steps: Steps of the optimizer that the run has: the schedule takes what proposals cost, and the loop is to
            be left where ``engine.finished``.  None: the schedule ends with the loop, which makes all of its steps, and
            what proposals cost comes on top.
        lr_interval: What one step of the schedule stands for; None: as configured.
        more: Other arguments of :func:`hybrid_predict_trainer.attach`.

    Raises:
        ConfigError: as ``attach``; among others, prediction is on and there is more than one process.
    """
    precision = fabric.strategy.precision
    engine = attach(
        model, optimizer, config, loss_fn=loss_fn, lr_scheduler=scheduler, lr_interval=lr_interval,
        schedule=schedule_of_loop(scheduler, total_steps), total_steps=total_steps,
        grad_scaler=getattr(precision, "scaler", None), **more,
    )  # fmt: skip
    stations = Stations(
        engine, complete=lambda: True,
        unscale=lambda: precision.unscale_gradients(optimizer.optimizer),
    )  # fmt: skip
    if loss_fn is not None:
        stations.backward(fabric, times=float(accumulate))
    stations.clip(fabric, "clip_gradients")
    return engine
