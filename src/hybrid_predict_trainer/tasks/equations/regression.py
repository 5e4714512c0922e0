"""Full-batch regression of a smooth function of two variables."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..base import (
    Batch,
    TaskDefaults,
    TaskSettings,
    count_parameters,
    counter_rng,
    mean_loss,
    reject_settings,
    seeded_model,
    torch_dtype,
)
from .mlp import TanhMLP, hidden_layers

HIDDEN = (48, 48, 48)
NUM_TRAIN, NUM_VALID = 512, 2048


def surface(points: Tensor) -> Tensor:
    """Return sin(3 x) cos(2 y) + exp(-4 (x^2 + y^2)) / 2 at (N, 2) points."""
    x, y = points[:, 0], points[:, 1]
    return torch.sin(3 * x) * torch.cos(2 * y) + 0.5 * torch.exp(-4 * (x * x + y * y))


def uniform_points(number: int, seed: int) -> Tensor:
    """Return (number, 2) points in [-1, 1]^2, float64, the same for the same seed."""
    return torch.from_numpy(counter_rng(seed).uniform(-1, 1, (number, 2)))


class RegressionTask:
    """A `Task`: MLP 2-48-48-48-1 on a fixed sample without noise; the batch is (points (N, 2), values (N,)).

    Args:
        settings: batch_size is the number of training points, preset a size of `SIZES`.
    """

    name = "regression"
    deterministic = True
    steps_per_epoch = 1
    defaults = TaskDefaults(
        optimizer="adam", lr=2e-2, steps=4000, lr_grid=(5e-3, 1e-2, 2e-2, 4e-2), predictor="portfolio"
    )

    def __init__(self, settings: TaskSettings) -> None:
        """Draw the points."""
        unused = ("data", "data_bytes", "context", "autocast_bf16", "gradient_checkpointing", "ternary")
        reject_settings(self.name, settings, *unused)
        self.settings = settings
        self._hidden = hidden_layers(HIDDEN, settings.preset)
        self.dtype = torch_dtype(settings.dtype)
        self._train = self._place(uniform_points(settings.batch_size or NUM_TRAIN, seed=0))
        self._valid = self._place(uniform_points(NUM_VALID, seed=1))

    def _place(self, points: Tensor) -> tuple[Tensor, Tensor]:
        device, dtype = self.settings.device, self.dtype
        return points.to(device, dtype), surface(points).to(device, dtype)

    def _new_model(self) -> nn.Module:
        return TanhMLP((2, *self._hidden))

    def build_model(self, seed: int) -> nn.Module:
        """Return a new tanh MLP."""
        return seeded_model(self._new_model, seed, self.settings, self.dtype)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield the training sample for ever; the seed decides the model only."""
        del seed, start
        return itertools.repeat(self._train)

    def new_batches(self, seed: int, every: int = 1) -> Iterator[Batch]:
        """Yield as many points as `batches` does, drawn afresh every so many steps."""
        for number in itertools.count():
            unit = torch.from_numpy(counter_rng(seed, number).uniform(-1, 1, (len(self._train[0]), 2)))
            yield from itertools.repeat(self._place(unit), every)

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean squared error."""
        assert isinstance(batch, tuple)
        points, values = batch
        prediction: Tensor = model(points)[0]
        return nn.functional.mse_loss(prediction, values)

    def residual_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return residuals (R,) whose mean square is the loss."""
        assert isinstance(batch, tuple)
        points, values = batch
        residuals: Tensor = model(points)[0] - values
        return residuals

    def solution_error(self, model: nn.Module) -> float:
        """Return |prediction - surface| / |surface| (L2 over the held-out points)."""
        points, values = self._valid
        with torch.no_grad():
            difference: Tensor = model(points)[0] - values
            return float(difference.double().norm() / values.double().norm())

    def evaluate(self, model: nn.Module) -> float:
        """Return the mean squared error on held-out points."""
        return mean_loss(self.loss_fn, model, [(self._valid, 1)])

    def describe(self) -> dict[str, Any]:
        """Return function, sizes and precision."""
        return {
            "task": self.name,
            "data": "sin(3 x) cos(2 y) + exp(-4 (x^2 + y^2)) / 2 on [-1, 1]^2, no noise",
            "num_parameters": count_parameters(self._new_model),
            "hidden": list(self._hidden),
            "num_train_points": len(self._train[0]),
            "num_valid_points": len(self._valid[0]),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
