"""A plain run with everything that the experiments look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...forecast.curve import Array
from ...tasks import TaskSettings, make_task
from ...tasks.base import TaskDefaults, with_steps
from ...tasks.recipes import build_optimizer, build_scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes of the experiments.

    Attributes:
        task, preset, batch_size, context: of the model.
        steps: of a run.
        sketch: numbers that a gradient is projected to.
    """

    task: str = "gpt"
    preset: str = "0.3M"
    batch_size: int = 8
    context: int = 32
    steps: int = 400
    sketch: int = 1024


SCALES = {
    "tiny": Scale(),
    "small": Scale(preset="0.9M", batch_size=16, context=128, steps=2000, sketch=4096),
    "100m": Scale(preset="124M", batch_size=16, context=512, steps=10_000, sketch=16_384),
}


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a run leaves.

    Attributes:
        losses, rates: (T,).
        gradients, updates: (T, D) sketches.
        sketch_error: largest difference of an adjacent cosine of sketches from that of the gradients themselves.
    """

    losses: Array
    rates: Array
    gradients: Array
    updates: Array
    sketch_error: float


class Sketch:
    """A seeded count sketch of all weights: inner products are kept in the mean (Charikar et al., ICALP 2002)."""

    def __init__(self, total: int, width: int, seed: int) -> None:
        """Draw the buckets and signs."""
        generator = torch.Generator().manual_seed(seed)
        self._bucket = torch.randint(width, (total,), generator=generator)
        self._sign = 2.0 * torch.randint(2, (total,), generator=generator) - 1.0
        self._width = width

    def of(self, flat: Tensor) -> Array:
        """(D,) of a flat vector."""
        found: Array = torch.zeros(self._width).index_add_(0, self._bucket, self._sign * flat).double().numpy()
        return found


def record(scale: Scale, seed: int, tell: Callable[[str], None]) -> Recorded:
    """Train once by the plain loop.

    Args:
        scale: Sizes.
        seed: Of weights and data.
        tell: Takes a line now and then.
    """
    task = make_task(scale.task, TaskSettings(preset=scale.preset, batch_size=scale.batch_size, context=scale.context))
    recipe: TaskDefaults = with_steps(task.defaults, scale.steps)
    model = task.build_model(seed)
    optimizer = build_optimizer(model, recipe)
    scheduler = build_scheduler(optimizer, recipe.schedule, recipe.steps, recipe.warmup_steps, recipe.decay_frac)
    weights = [p for p in model.parameters() if p.requires_grad]
    sketch = Sketch(sum(p.numel() for p in weights), scale.sketch, seed)
    losses, rates, gradients, updates, exact = [], [], [], [], []
    flat = torch.nn.utils.parameters_to_vector(weights).detach().clone()
    last: Tensor | None = None
    for step, batch in zip(range(scale.steps), task.batches(seed), strict=False):
        optimizer.zero_grad()
        loss = task.loss_fn(model, batch)
        loss.backward()
        gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in weights])
        if recipe.grad_clip:
            torch.nn.utils.clip_grad_norm_(weights, recipe.grad_clip)
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
        moved = torch.nn.utils.parameters_to_vector(weights).detach().clone()
        losses.append(loss.item())
        gradients.append(sketch.of(gradient))
        updates.append(sketch.of(moved - flat))
        if last is not None:
            exact.append(float(torch.nn.functional.cosine_similarity(gradient, last, dim=0)))
        flat, last = moved, gradient
        if (step + 1) % max(1, scale.steps // 4) == 0:
            tell(f"seed {seed}: step {step + 1} of {scale.steps}, loss {losses[-1]:.4f}")
    told = np.array(gradients)
    from .gradients import adjacent_cosines

    error = float(np.abs(adjacent_cosines(told) - np.array(exact)).max())
    return Recorded(np.array(losses), np.array(rates), told, np.array(updates), error)
