"""A loop of your own with ``accelerate``: one import and one line, the loop stays as it is::

    from hybrid_predict_trainer.adapters.accelerate import ride_along

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    engine = ride_along(accelerator, model, optimizer, scheduler)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

Steps are those of the optimizer: micro-batches whose gradients are only accumulated are none.  The schedule stays the
loop's and ends with it, and what proposals cost comes on top.  With ``total_steps=`` what claimed steps and the price
of proposals have put the clock ahead by is taken from the schedule before the next step; leave the loop where
``engine.finished``.
``accelerator.save_state`` and ``load_state`` include what is ours.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from ..config.settings import HybridTrainerConfig
from ..cycle.engine import Engine, attach
from ..keep.subject import LossFn
from ..notices import warn
from .loops import Stations, schedule_of_loop
from .missing import framework

framework("accelerate", "transformers")

#: Folder of ours in a state that accelerate has saved; of a second engine with ``_1`` behind it, and so on.
FOLDER = "hybrid_predict_trainer"

#: Places of the engines that ride along with an accelerator.
_TAKEN: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()


def ride_along(
    accelerator: Any, model: nn.Module, optimizer: Optimizer, scheduler: Any = None,
    config: HybridTrainerConfig | None = None, *, loss_fn: LossFn | None = None, total_steps: int | None = None,
    lr_interval: Literal["step", "epoch"] | None = None, **more: Any,
) -> Engine:  # fmt: skip
    """Attach an engine to what ``accelerator.prepare`` has returned.

    Args:
        accelerator: ``accelerate.Accelerator``.
        model: Prepared.
        optimizer: Prepared.
        scheduler: Prepared or not, stepped by the loop; None: there is none.
        config: Defaults if None.
        loss_fn: (model, batch) -> loss, where the model does not return its loss; then the loop hands every batch over
            as well: ``engine.note(batch=batch)``.
        total_steps: Steps of the optimizer that the run has: the schedule takes what proposals cost, and the loop is to
            be left where ``engine.finished``.  None: the schedule ends with the loop, which makes all of its steps, and
            what proposals cost comes on top.
        lr_interval: What one step of the schedule stands for; None: as configured.
        more: Other arguments of :func:`hybrid_predict_trainer.attach`.

    Raises:
        ConfigError: as ``attach``; among others, prediction is on and there are several processes without DDP.
    """
    engine = attach(
        model, optimizer, config, loss_fn=loss_fn, lr_scheduler=scheduler, lr_interval=lr_interval,
        schedule=schedule_of_loop(scheduler, total_steps), total_steps=total_steps,
        grad_scaler=getattr(accelerator, "scaler", None), **more,
    )  # fmt: skip
    stations = Stations(
        engine, complete=lambda: bool(accelerator.sync_gradients), unscale=accelerator.unscale_gradients
    )
    if loss_fn is not None:
        stations.backward(accelerator)
    stations.clip(accelerator, "clip_grad_norm_", of=optimizer)
    stations.clip(accelerator, "clip_grad_value_", of=optimizer)
    state = _Kept(engine, _folder_for(accelerator, engine))
    stations.replaced.wrap(accelerator, "load_state", state.load)
    engine.on_detach(accelerator.register_save_state_pre_hook(state.save).remove)
    engine.on_detach(accelerator.register_load_state_pre_hook(state.find).remove)
    return engine


def _folder_for(accelerator: Any, engine: Engine) -> str:
    """A name that no other engine has which rides along now: numbered in the order of ``ride_along``."""
    taken = _TAKEN.setdefault(accelerator, set())
    place = next(i for i in count() if i not in taken)
    taken.add(place)
    engine.on_detach(lambda: taken.discard(place))
    return f"{FOLDER}_{place}" if place else FOLDER


class _Kept:
    """What is the engine's own, in a folder of a saved state.

    It is no registered object of accelerate's: those are read back by unpickling, and a state that was saved without
    one could not be loaded at all.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self._name = engine, name
        self._folder: Path | None = None

    def save(self, models: Any, weights: Any, output_dir: str) -> None:
        """Write, before accelerate does."""
        self._engine.save_state(Path(output_dir) / self._name)

    def find(self, models: Any, input_dir: str) -> None:
        """Remember where the state comes from: accelerate chooses the newest where it is not told."""
        self._folder = Path(input_dir) / self._name

    def load(self, load: Any, *args: Any, **kwargs: Any) -> Any:
        """Read, after accelerate has."""
        found = load(*args, **kwargs)
        folder, self._folder = self._folder, None
        if folder is not None and folder.is_dir():
            self._engine.load_state(folder)
        elif folder is not None:
            warn(f"{folder.parent} was saved without {self._name}: prediction begins anew")
        return found
