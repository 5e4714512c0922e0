"""A plain training loop whose windows predictors can watch, and whose weights can be moved by force.

The trainer takes a jump only where a measurement says that it pays.  The protocol asks something else: what becomes of
a run in which a given share of the steps is predicted, whatever that does.  This loop answers it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...config.settings import EncoderConfig
from ...observe.basis import Basis
from ...observe.history import History, Reading
from ...observe.loss_features import loss_features
from ...observe.window_encoder import Observer, observer_for
from ...predictors import Predictor
from ...records import BasisSpec, PhasePrediction, Window
from ...tasks import make_task
from ...tasks.base import Task, with_steps
from ...tasks.recipes import build_optimizer, build_scheduler, lr_factor
from ...weights.algebra import Tensors
from ...weights.parameters import predicted_parameters
from ..arms.recording import column_map, narrow
from ..bench.predictors import make_predictor
from .plain import Scale, settings_of

#: Every column that a forecaster may ask for.
WIDE = BasisSpec(num_displacements=8, lag=True, optimizer=True, gradient=True)
#: Predictors of where training goes; those that aim elsewhere (secant, quasi_newton) have no displacement to be right.
FORECASTERS = ("hold", "heuristic", "linear", "dmd", "mlp", "rssm")
WINDOW = 10


def task_of(scale: Scale) -> Task:
    """The task of a scale."""
    return make_task(scale.task, settings_of(scale))


class Loop:
    """Plain training, one step or one jump at a time.

    Attributes:
        task, model, optimizer: as the task makes them.
        position: of the schedule: real steps and those that jumps have claimed.
        num_real, num_claimed: of these.
        losses: of real steps.
        basis: window means and displacements.
        predictors: name -> what watches.
        window: the last one closed; None before the first.
    """

    def __init__(
        self, scale: Scale, seed: int, predictors: Sequence[str] = (), *, steps: int | None = None,
        task: Task | None = None,
    ) -> None:  # fmt: skip
        """Draw weights and data.

        Args:
            scale: Sizes.
            seed: Of weights, data and predictors.
            predictors: Names that watch.
            steps: Length of the schedule; None: the scale's.
            task: Made before, to save its reading.
        """
        self.task = task or task_of(scale)
        self._recipe = with_steps(self.task.defaults, steps or scale.steps)
        torch.manual_seed(seed)
        self.model = self.task.build_model(seed)
        self.optimizer = build_optimizer(self.model, self._recipe)
        recipe = self._recipe
        self._scheduler = build_scheduler(
            self.optimizer, recipe.schedule, recipe.steps, recipe.warmup_steps, recipe.decay_frac
        )
        self.parameters, self.groups = predicted_parameters(self.model, self.optimizer)
        self._seed, self._batches = seed, iter(self.task.batches(seed))
        self.position = self.num_real = self.num_claimed = 0
        self.losses: list[float] = []
        self.window: Window | None = None
        self.basis = Basis(self.parameters, self.groups, WIDE)
        self.predictors: dict[str, Predictor] = {
            name: make_predictor(name, self.groups.num_groups, seed) for name in predictors
        }
        self._history, self._norms, self._rates = History(), [0.0], [0.0]
        self._observer: Observer = observer_for(
            EncoderConfig(), self.predictors.get("linear"), self.model, self.parameters, self.groups, WIDE
        )

    @property
    def total(self) -> int:
        """Length of the schedule."""
        return self._recipe.steps

    def step(self) -> float:
        """One real step; closes a window after every :data:`WINDOW` of them.  Returns the loss before it."""
        self.window = None
        self.optimizer.zero_grad()
        loss = self.task.loss_fn(self.model, next(self._batches))
        loss.backward()
        limit = self._recipe.grad_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if self.predictors:
            self.basis.accumulate()
            self.basis.before_step(last=self.basis.num_steps == WINDOW)
        self._rates.append(float(self.optimizer.param_groups[0]["lr"]))
        self._norms.append(norm)
        self.optimizer.step()
        self._scheduler.step()
        self.position += 1
        self.num_real += 1
        self.losses.append(loss.item())
        if self.predictors:
            self._history.push(Reading(self.num_real, self.losses[-1], norm), warming_up=False)
            if self.basis.num_steps == WINDOW:
                self._close()
        return self.losses[-1]

    def _close(self) -> None:
        jumped = self.basis.jumped
        hindsight = self.basis.close_window()
        last = self.num_real
        window = Window(
            index=last // WINDOW, num_steps=WINDOW, num_columns=self.basis.num_columns, step=last,
            loss=self._history.close_window(last, WINDOW), loss_slope=self._history.loss_slope(),
            gradient_norm=sum(self._norms[-WINDOW:]) / WINDOW, learning_rate=self._rates[-1],
            lr_integral=sum(self._rates[-WINDOW:]), lr_ahead=sum(self._planned(WINDOW)), jumped=jumped,
            features=loss_features(self._history.losses, last), products=self.basis.products(),
            hindsight=hindsight, group_sizes=self.groups.sizes,
        )  # fmt: skip
        self.window = self._observer.complete(window, self.basis)
        for predictor in self.predictors.values():
            predictor.observe(narrow(self.window, WIDE, predictor.spec))

    def _planned(self, count: int) -> list[float]:
        recipe = self._recipe
        return [
            recipe.lr * lr_factor(
                self.position + n, schedule=recipe.schedule, total_steps=recipe.steps,
                warmup_steps=recipe.warmup_steps, decay_frac=recipe.decay_frac,
            )
            for n in range(count)
        ]  # fmt: skip

    def predict(self, name: str, horizon: int) -> PhasePrediction | None:
        """A watcher's forecast on the wide basis; None before it is ready."""
        predictor = self.predictors[name]
        if not predictor.ready or not self.basis.ready:
            return None
        found = predictor.predict(horizon)
        wide = torch.zeros(self.groups.num_groups, WIDE.num_columns, dtype=torch.float64)
        wide[:, column_map(WIDE, predictor.spec)] = found.coefficients.double()
        return replace(found, coefficients=wide)

    @torch.no_grad()
    def jump(self, deltas: Sequence[Tensor] | None, horizon: int) -> None:
        """Move the weights, and the schedule by ``horizon`` steps.  None: only the schedule."""
        if deltas is not None:
            for parameter, delta in zip(self.parameters, deltas, strict=True):
                parameter.add_(delta.to(parameter.dtype))
            self.basis.translate(deltas, 1.0)
        for _ in range(horizon):
            self._scheduler.step()
        self.position += horizon
        self.num_claimed += horizon

    def evaluate(self) -> float:
        """Validation loss."""
        return self.task.evaluate(self.model)

    @torch.no_grad()
    def loss_on(self, batches: Sequence[Any]) -> float:
        """Mean loss on given batches."""
        return sum(float(self.task.loss_fn(self.model, batch)) for batch in batches) / len(batches)

    def probe_batches(self, count: int) -> list[Any]:
        """Batches that no run trains on: of a seed far from all others."""
        found: Iterator[Any] = iter(self.task.batches(1_000_003 + self._seed))
        return [next(found) for _ in range(count)]

    def weights(self) -> Tensors:
        """A copy."""
        return [p.detach().clone() for p in self.parameters]

    def twin(self, data_seed: int | None = None, skip: int = 0) -> Loop:
        """The same state, without watchers, on the same data from here or on others.

        Args:
            data_seed: Of other data; None: the same from here on.
            skip: Batches of the other data to leave out.
        """
        other = copy.copy(self)
        other.model, other.optimizer, other._scheduler = copy.deepcopy((self.model, self.optimizer, self._scheduler))
        model, optimizer = other.model, other.optimizer
        other.parameters, _ = predicted_parameters(model, optimizer)
        other.predictors, other.losses = {}, []
        other._rates, other._norms = [0.0], [0.0]
        seed = self._seed if data_seed is None else data_seed
        other._batches = iter(self.task.batches(seed, self.num_real if data_seed is None else skip))
        return other
