"""Physics-informed networks: full-batch training on the equations of `equations`."""

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
from .mlp import TanhMLP, hidden_layers, jet_channels
from .problems import PROBLEMS

DEFAULTS: dict[str, TaskDefaults] = {
    # at 4e-2 one run in three loses all its units to saturation, predicted or not: not in the grid
    "pinn-poisson": TaskDefaults(
        optimizer="adam", lr=2e-2, steps=4000, lr_grid=(2.5e-3, 5e-3, 1e-2, 2e-2), predictor="portfolio"
    ),
    "pinn-burgers": TaskDefaults(
        optimizer="adam", lr=1e-2, steps=4000, lr_grid=(5e-3, 1e-2, 2e-2, 4e-2), predictor="portfolio"
    ),
    "oscillator": TaskDefaults(
        optimizer="adam", lr=1e-2, steps=4000, lr_grid=(2.5e-3, 5e-3, 1e-2, 2e-2), predictor="portfolio"
    ),
    **dict.fromkeys(("pinn-allen-cahn", "pinn-klein-gordon", "pinn-inverse"), TaskDefaults(
        optimizer="adam", lr=1e-2, steps=4000, lr_grid=(2.5e-3, 5e-3, 1e-2, 2e-2), predictor="portfolio"
    )),
}  # fmt: skip


class PinnTask:
    """A `Task` on one `Problem`; the batch is the (N, D) tensor of all training points, always the same.

    Args:
        name: one of `PROBLEMS`.
        settings: batch_size is the number of training points, preset a size of `SIZES`.
    """

    deterministic = True
    steps_per_epoch = 1

    def __init__(self, name: str, settings: TaskSettings) -> None:
        """Place the points."""
        # bfloat16 has 8 bits: second derivatives through four layers would be noise.
        unused = ("data", "data_bytes", "context", "autocast_bf16", "gradient_checkpointing", "ternary")
        reject_settings(name, settings, *unused)
        self.name = name
        self.defaults = DEFAULTS[name]
        self.settings = settings
        self.problem = PROBLEMS[name]
        self._hidden = hidden_layers(self.problem.hidden, settings.preset)
        self.dtype = torch_dtype(settings.dtype, self.problem.dtype)
        self._train = self._place(self.problem.train_points(settings.batch_size or self.problem.num_points))
        self._valid = self._place(self.problem.valid_points)
        self._edge = self._place(self.problem.edge)

    def _place(self, points: Tensor) -> Tensor:
        return points.to(device=self.settings.device, dtype=self.dtype)

    def _new_model(self) -> nn.Module:
        sizes = len(self.problem.orders), *self._hidden
        return TanhMLP(sizes, self.problem.orders, len(self.problem.coefficients))

    def build_model(self, seed: int) -> nn.Module:
        """Return a new tanh MLP whose forward gives the problem's jet."""
        return seeded_model(self._new_model, seed, self.settings, self.dtype)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield the training points for ever; the seed decides the model only."""
        del seed, start
        return itertools.repeat(self._train)

    def new_batches(self, seed: int, every: int = 1) -> Iterator[Batch]:
        """Yield as many points as `batches` does, drawn afresh from the whole region every so many steps."""
        low, high = (getattr(torch.cat([self.problem.valid_points, self.problem.edge]), side)(0).values
                     for side in ("min", "max"))  # fmt: skip
        for number in itertools.count():
            unit = torch.from_numpy(counter_rng(seed, number).uniform(size=(len(self._train), len(low))))
            yield from itertools.repeat(self._place(low + (high - low) * unit), every)

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return mean squared residual plus mean squared edge residual."""
        assert isinstance(batch, Tensor)
        # One forward for both kinds of points: at this size a call costs more than its arithmetic.
        jet: Tensor = model(torch.cat([batch, self._edge]))
        interior, edge = jet[:, : len(batch)], jet[:, len(batch) :]
        inside = self.problem.residual(batch, interior).square().mean()
        return inside + self.problem.edge_residual(self._edge, edge).square().mean()

    def residual_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return residuals (R,) whose mean square is the loss, each of one point of its own."""
        assert isinstance(batch, Tensor)
        edge, count = self._edge, len(batch)
        channels = len(jet_channels(self.problem.orders)) + len(self.problem.coefficients)
        shape = self.problem.edge_residual(edge, torch.zeros(channels, len(edge), dtype=edge.dtype)).shape
        kinds = shape[0] if len(shape) == 2 else 1
        jet: Tensor = model(torch.cat([batch, *[edge] * kinds]))
        inside = self.problem.residual(batch, jet[:, :count])
        parts = [self.problem.edge_residual(edge, part) for part in jet[:, count:].split(len(edge), dim=1)]
        outside = torch.cat([part.reshape(kinds, -1)[k] for k, part in enumerate(parts)])
        total = count + len(outside)
        return torch.cat([inside * (total / count) ** 0.5, outside * (total / len(outside)) ** 0.5])

    def evaluate(self, model: nn.Module) -> float:
        """Return the same loss on denser points that are not trained on."""
        return mean_loss(self.loss_fn, model, [(self._valid, 1)])

    def solution_error(self, model: nn.Module) -> float:
        """Return |u - solution| / |solution| (L2 over the validation points)."""

        def relative_error(model: nn.Module, points: Batch) -> Tensor:
            assert isinstance(points, Tensor)
            value: Tensor = model(points)[0].cpu().double()
            exact = self.problem.solution(points.cpu().double())
            return (value - exact).square().sum().sqrt() / exact.square().sum().sqrt()

        return mean_loss(relative_error, model, [(self._valid, 1)])

    def describe(self) -> dict[str, Any]:
        """Return equation, sizes and precision."""
        return {
            "task": self.name,
            "data": self.problem.equation,
            "num_parameters": count_parameters(self._new_model),
            "hidden": list(self._hidden),
            "num_train_points": len(self._train),
            "num_valid_points": len(self._valid),
            "num_edge_points": len(self._edge),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
