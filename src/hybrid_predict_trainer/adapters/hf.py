"""``transformers.Trainer``, and the trainers that are built on it (TRL's SFTTrainer and DPOTrainer)::

    from hybrid_predict_trainer.adapters.hf import HybridCallback

    trainer = Trainer(..., callbacks=[HybridCallback()])
    trainer.train()

A jump happens between two steps of the optimizer, so that a callback is enough.  What it needs and no event tells:

* The trainer itself, whose ``compute_loss`` is the loss that a jump is judged by.  Callbacks do not get it: it is found
  among the callers of ``on_train_begin``.
* Gradients before clipping: at ``on_pre_optimizer_step`` they are clipped already.
* All micro-batches of the coming step: the trainer fetches them together.
* Where a run is resumed from: an argument of the loop.

Losses of training and of judging are on one scale: with ``num_items_in_batch`` the trainer divides a micro-batch's sum
by the count of the whole step, as it counts; a judged batch or piece of one is divided by its own count, found by the
same function.
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..config.settings import HybridTrainerConfig
from ..cycle.engine import Engine, attach
from ..cycle.handover import MicroBatches, StepLoss
from ..distributed.processes import wrapper_of
from ..forecast.stopping import StopWhen
from ..notices import warn
from ..predictors import Predictor
from ..records import ConfigError
from ..tell.account import format_text
from ..tell.sinks import Sink, Writer, jsonable
from .loops import figures
from .missing import framework
from .replaced import Replaced

framework("transformers", "transformers")

from transformers import TrainerCallback  # noqa: E402

#: Folder of ours in a checkpoint of the trainer's, and the report beside the checkpoints.
FOLDER, REPORT = "hybrid_predict_trainer", "hybrid_report.json"

#: Callers that are looked through for the trainer.
MAX_FRAMES = 16


class HybridCallback(TrainerCallback):  # type: ignore[misc]
    """Rides along in a ``transformers.Trainer``.

    ``max_steps``, ``global_step``, the trainer's logs and its checkpoints keep their meaning.  Where the clock reaches
    ``max_steps`` before ``global_step`` does, because steps were claimed or proposals had a price, the run ends there
    and writes its last checkpoint.

    Example::

        Trainer(model=model, args=args, train_dataset=data, callbacks=[HybridCallback()]).train()

    Attributes:
        engine: That rides along; None before training.
        report: What came of it; None before the end of training.
    """

    def __init__(
        self,
        config: HybridTrainerConfig | None = None,
        *,
        predictor: Predictor | None = None,
        roles: dict[str, str] | None = None,
        sinks: tuple[Sink | Writer, ...] = (),
        say: bool = True,
        stop_when: StopWhen | None = None,
    ) -> None:
        """Nothing is looked at before training begins.

        Args:
            config: Defaults if None.
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
        self._handed: dict[str, Any] = {"predictor": predictor, "roles": roles, "sinks": sinks}
        self._say = say
        self._trainer: Any = None
        self._replaced = Replaced()
        self._batch: Any = None  # of the coming step, as the trainer has fetched it
        self._num_micro = 1
        self._losses: list[Tensor] = []  # of the step's micro-batches so far, each its share of the step's loss

    # ---- events ------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the engine.

        Raises:
            ConfigError: as :func:`hybrid_predict_trainer.attach`; or the trainer is not among the callers.
        """
        self._leave()  # an earlier run that ended with an error has said nothing
        trainer, resumed_from = _caller(self)
        self._trainer, self.report = trainer, None
        scaler = getattr(trainer.accelerator, "scaler", None)
        self.engine = attach(
            _trained(trainer), trainer.optimizer, self.config, loss_fn=TrainerLoss(trainer),
            lr_scheduler=trainer.lr_scheduler, auto=False, schedule="shared", total_steps=state.max_steps,
            grad_scaler=scaler, **self._handed,
        )  # fmt: skip
        wrap = self._replaced.wrap
        wrap(trainer, "get_batch_samples", self._fetch)
        wrap(trainer, "training_step", self._training_step)
        wrap(trainer, "log", self._log)
        wrap(trainer.accelerator, "backward", self._backward)
        wrap(trainer.accelerator, "clip_grad_norm_", self._clip)
        if state.global_step:
            self._resume(args, state, resumed_from)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A run whose clock is at its end stops, evaluates and saves."""
        engine = self.engine
        if engine is None or not self.config.enabled:
            return control
        given_up = self._stop_when is not None and engine.should_stop(self._stop_when)
        if (engine.finished or given_up) and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_evaluate = control.should_evaluate or args.eval_strategy != "no"
            control.should_save = control.should_save or args.save_strategy in ("steps", "epoch")
        return control

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is ours goes into the checkpoint that was just written."""
        folder = _checkpoint_folder(args, state)
        if self.engine is None or args.save_only_model:
            return
        # several processes write together, one of them to the disk
        if not self.engine.run.subject.ranks.alone or (args.should_save and folder.is_dir()):
            self.engine.save_state(folder / FOLDER)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach, and report."""
        engine = self.engine
        if engine is None:
            return
        self.report = engine.report()
        if self.config.enabled and args.should_save:
            path = Path(args.output_dir) / REPORT
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(jsonable(self.report), indent=2), encoding="utf-8")
            except OSError as error:
                warn(f"{path} was not written: {error.strerror}")
        if self.config.enabled and self._say and state.is_world_process_zero:
            print(format_text(self.report))
        self._leave()

    # ---- what no event tells ---------------------------------------------------------------------------

    def _fetch(self, fetch: Any, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the coming step are fetched: what they hold is what a jump is judged on."""
        found = fetch(*args, **kwargs)
        micro = list(found[0])
        if _is_paired(self._trainer):
            micro = [split_pairs(batch) for batch in micro]
        self._num_micro = len(micro)
        self._batch = micro[0] if len(micro) == 1 else MicroBatches(micro)
        return found

    def _training_step(self, step: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Before the first micro-batch a jump may be made; after the last one its loss is known."""
        engine = self.engine
        if engine is None:
            return step(model, inputs, *args, **kwargs)
        if not self._losses:
            engine.between_steps(self._batch)
        loss = step(model, inputs, *args, **kwargs)
        self._losses.append(loss.detach())
        if len(self._losses) >= self._num_micro:
            engine.note(torch.stack(self._losses).sum(), self._batch)
            self._losses = []
        return loss

    def _backward(self, backward: Any, *args: Any, **kwargs: Any) -> Any:
        if self.engine is not None:
            self.engine.before_backward()
        return backward(*args, **kwargs)

    def _clip(self, clip: Any, *args: Any, **kwargs: Any) -> Any:
        """Gradients are complete and not clipped: look at them, unscaled."""
        engine, accelerator = self.engine, self._trainer.accelerator
        if engine is not None and engine.in_step and self.config.enabled:
            accelerator.unscale_gradients()
            engine.after_backward()
        return clip(*args, **kwargs)

    def _log(self, write: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        """Phases and jumps stand in every line of the training's log."""
        if self.engine is not None and self.config.enabled and "loss" in logs:
            logs.update(figures(self.engine))
        return write(logs, *args, **kwargs)

    # ---- checkpoints -------------------------------------------------------------------------------------

    def _resume(self, args: Any, state: Any, resumed_from: str | None) -> None:
        """Go on from where the trainer does."""
        assert self.engine is not None, "attached"
        folder = Path(resumed_from) if resumed_from else _checkpoint_folder(args, state)
        if (folder / FOLDER).is_dir():
            self.engine.load_state(folder / FOLDER)
        elif self.config.enabled:
            warn(f"{folder} was saved without {FOLDER}: training goes on, and prediction begins anew")

    def _leave(self) -> None:
        self._replaced.restore()
        if self.engine is not None:
            self.engine.detach()
        self._batch, self._losses = None, []
        self._trainer = None


class TrainerLoss(StepLoss):
    """The loss that a trainer trains on, for batches and pieces of batches that are not trained on."""

    def __init__(self, trainer: Any) -> None:
        """Bind."""
        super().__init__(self._of_one)
        self._known = weakref.ref(trainer)  # nothing that is found through it belongs to this loss

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Of a whole step, a batch, or a piece of either."""
        return self._of_step(list(batch) if isinstance(batch, MicroBatches) else [batch])

    @property
    def _trainer(self) -> Any:
        return self._known()

    def _of_one(self, model: nn.Module, batch: Any) -> Tensor:
        return self._of_step([batch])

    def _of_step(self, batches: list[Any]) -> Tensor:
        """As the trainer adds it up: shares of one count of items, or a mean over micro-batches."""
        trainer = self._trainer
        with untouched(trainer), _by_itself(trainer):
            return self._total(batches)

    def _total(self, batches: list[Any]) -> Tensor:
        trainer = self._trainer
        if _is_paired(trainer):
            batches = [joined_pairs(batch) for batch in batches]
        given, num_items = _originally(trainer, "get_batch_samples")(iter(batches), len(batches), trainer.args.device)
        shares = [self._share(batch, num_items) for batch in given]
        total = torch.stack(shares).sum()
        return total if self._is_scaled(num_items) else total / len(shares)

    def _share(self, batch: Mapping[str, Any], num_items: Any) -> Tensor:
        trainer = self._trainer
        # a compiled one would be compiled anew for every mode and hook that judging sets
        inner = _is_ddp(trainer) or hasattr(trainer.model_wrapped, "_orig_mod")
        model = trainer.model if inner else trainer.model_wrapped
        inputs = trainer._prepare_inputs(dict(batch))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs, num_items_in_batch=num_items)
        assert isinstance(loss, Tensor), "return_outputs is False"
        return loss.mean() if loss.numel() > 1 else loss.reshape(())

    def _is_scaled(self, num_items: Any) -> bool:
        """Whether losses of micro-batches are shares already, as the trainer decides it."""
        trainer = self._trainer
        told = getattr(trainer, "loss_is_scaled_for_ga", None)
        if told is not None:
            return bool(told)
        counted = getattr(trainer, "model_accepts_loss_kwargs", False) and num_items is not None
        return bool(counted or trainer.compute_loss_func is not None)


def _is_ddp(trainer: Any) -> bool:
    return wrapper_of(trainer.model_wrapped) == "DistributedDataParallel"


def _trained(trainer: Any) -> nn.Module:
    """The model in what several processes train it in."""
    found: nn.Module = trainer.model_wrapped if _is_ddp(trainer) else trainer.model
    return found


@contextmanager
def _by_itself(trainer: Any) -> Iterator[None]:
    """A block in which a process counts its own items: the ranks' mean is taken behind it, where all of them are."""
    if not _is_ddp(trainer):
        yield
        return
    before = trainer.args.average_tokens_across_devices
    trainer.args.average_tokens_across_devices = False
    try:
        yield
    finally:
        trainer.args.average_tokens_across_devices = before


def _is_paired(trainer: Any) -> bool:
    """Whether a batch holds answers that were chosen and, after them, those that were not (TRL's preference data)."""
    return type(getattr(trainer, "data_collator", None)).__name__ == "DataCollatorForPreference"


def split_pairs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of pairs so that its first dimension is pairs everywhere, and a piece of it is made of whole pairs."""
    rows = len(batch["input_ids"])
    doubled = {k for k, v in batch.items() if isinstance(v, Tensor) and v.dim() and len(v) == rows}
    halves = [{k: batch[k][i * rows // 2 : (i + 1) * rows // 2] for k in batch if k in doubled} for i in (0, 1)]
    return {**{k: v for k, v in batch.items() if k not in doubled}, "chosen": halves[0], "rejected": halves[1]}


def joined_pairs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`split_pairs`."""
    rest = {k: v for k, v in batch.items() if k not in ("chosen", "rejected")}
    chosen, rejected = batch["chosen"], batch["rejected"]
    return {**rest, **{k: torch.cat([chosen[k], rejected[k]]) for k in chosen}}


@contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    """A block after which the trainer's own figures are as before: losses that are judged are nobody's metrics."""
    plain = (int, float, str, bool, type(None))
    numbers = {name: value for name, value in vars(trainer).items() if isinstance(value, plain)}
    tables = {name: _copied(value) for name, value in vars(trainer).items() if _is_table(value)}
    try:
        yield
    finally:
        for name, value in numbers.items():
            if getattr(trainer, name) is not value:
                setattr(trainer, name, value)
        for name, value in tables.items():
            if getattr(trainer, name) != value:
                setattr(trainer, name, value)


def _is_table(value: Any, depth: int = 0) -> bool:
    """Whether a value is made of plain containers and numbers only, and small."""
    if isinstance(value, int | float | str | bool | type(None)):
        return depth > 0
    if depth > 3 or not isinstance(value, dict | list | tuple | deque) or len(value) > 10_000:
        return False
    return all(_is_table(v, depth + 1) for v in (value.values() if isinstance(value, dict) else value))


def _copied(value: Any) -> Any:
    """New containers of the same classes."""
    if isinstance(value, dict):
        fresh = value.copy()  # of a defaultdict its factory too
        for key, inner in value.items():
            fresh[key] = _copied(inner)
        return fresh
    return type(value)(_copied(inner) for inner in value) if isinstance(value, list | tuple | deque) else value


def _caller(callback: HybridCallback) -> tuple[Any, str | None]:
    """The trainer that calls a callback, and the folder that its run is resumed from.

    Raises:
        ConfigError: no caller is a trainer that holds it.
    """
    frame: FrameType | None = inspect.currentframe()
    resumed_from: str | None = None
    for _ in range(MAX_FRAMES):
        frame = None if frame is None else frame.f_back
        if frame is None:
            break
        found = frame.f_locals.get("resume_from_checkpoint")
        resumed_from = found if isinstance(found, str) else resumed_from
        owner = frame.f_locals.get("self")
        handler = getattr(owner, "callback_handler", None)
        if handler is not None and any(known is callback for known in handler.callbacks):
            return owner, resumed_from
    raise ConfigError("HybridCallback is to be called by a transformers.Trainer: pass it in callbacks=[...]")


def _originally(trainer: Any, name: str) -> Any:
    """A method of the trainer as its class has it, without what was put in its place."""
    return getattr(type(trainer), name).__get__(trainer)


def _checkpoint_folder(args: Any, state: Any) -> Path:
    """Where the trainer writes the checkpoint of the present step, outside a search over hyperparameters."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
