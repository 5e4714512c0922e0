"""A plain run with everything that the experiments look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...forecast.curve import Array
from ...records import ConfigError
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
        data: of the task; None: its own.
        snapshot_every: steps between two snapshots of the weights, and the shortest horizon of a displacement.
        horizons: of displacements, in steps, multiples of ``snapshot_every``.
        num_twins: places of a run from which it is continued with other data, for the ceiling that noise sets.
        jump_steps: Y by predicted share of the steps, in percent.
        warmup: share of a run before its first forced jump.
        correct_steps: real steps after a jump that count as its correction.
        forced: the predictor of forced jumps.
    """

    task: str = "gpt"
    preset: str | None = "0.3M"
    batch_size: int | None = 8
    context: int | None = 32
    steps: int = 600
    sketch: int = 1024
    data: str | None = None
    snapshot_every: int = 50
    horizons: tuple[int, ...] = (50, 100, 200)
    num_twins: int = 3
    jump_steps: tuple[tuple[int, int], ...] = ((25, 10), (50, 20), (80, 80))
    warmup: float = 0.1
    correct_steps: int = 5
    forced: str = "linear"


#: Snapshots of larger models are not kept in memory.
KEPT_WEIGHTS = 20_000_000
#: Presets that no processor trains in days.
ON_ACCELERATOR = ("124M",)
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
        gradient_norms: (T,), before clipping.
        snapshots: step -> all weights as one vector.
    """

    losses: Array
    rates: Array
    gradients: Array
    updates: Array
    sketch_error: float
    gradient_norms: Array = field(default_factory=lambda: np.zeros(0))
    snapshots: Mapping[int, Tensor] = field(default_factory=dict)


class Sketch:
    """A seeded count sketch of all weights: inner products are kept in the mean (Charikar et al., ICALP 2002)."""

    def __init__(self, total: int, width: int, seed: int) -> None:
        """Draw the buckets and signs."""
        generator = torch.Generator().manual_seed(seed)
        self._bucket = torch.randint(width, (total,), generator=generator)
        self._sign = 2.0 * torch.randint(2, (total,), generator=generator) - 1.0
        self._width = width

    def of(self, flat: Tensor) -> Array:
        """(D,) of a flat vector, computed where it lies."""
        if self._bucket.device != flat.device:
            self._bucket, self._sign = self._bucket.to(flat.device), self._sign.to(flat.device)
        sums = torch.zeros(self._width, device=flat.device).index_add_(0, self._bucket, self._sign * flat)
        found: Array = sums.cpu().double().numpy()
        return found


def settings_of(scale: Scale) -> TaskSettings:
    """Settings of a scale's task, with the device that it is trained on.

    Raises:
        ConfigError: it needs an accelerator, and there is none.
    """
    device = "cpu"
    if scale.preset in ON_ACCELERATOR:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is None:
            raise ConfigError(
                f"--scale 100m trains a model of {scale.preset} weights for {scale.steps:,} steps, a dozen times for "
                "each seed: that needs an accelerator, and none is found here; use --scale small"
            )
        device = found.type
    return TaskSettings(
        preset=scale.preset, batch_size=scale.batch_size, context=scale.context, data=scale.data, device=device
    )


def record(scale: Scale, seed: int, tell: Callable[[str], None]) -> Recorded:
    """Train once by the plain loop.

    Args:
        scale: Sizes.
        seed: Of weights and data.
        tell: Takes a line now and then.

    Raises:
        ConfigError: the scale needs an accelerator, and there is none.
    """
    task = make_task(scale.task, settings_of(scale))
    recipe: TaskDefaults = with_steps(task.defaults, scale.steps)
    model = task.build_model(seed)
    optimizer = build_optimizer(model, recipe)
    scheduler = build_scheduler(optimizer, recipe.schedule, recipe.steps, recipe.warmup_steps, recipe.decay_frac)
    weights = [p for p in model.parameters() if p.requires_grad]
    sketch = Sketch(sum(p.numel() for p in weights), scale.sketch, seed)
    losses, rates, gradients, updates, exact, norms = [], [], [], [], [], []
    snapshots: dict[int, Tensor] = {}
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
        norms.append(float(gradient.norm()))
        if (step + 1) % (2 * scale.snapshot_every) == 0 and len(moved) <= KEPT_WEIGHTS:
            snapshots[step + 1] = moved
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
    return Recorded(
        np.array(losses), np.array(rates), told, np.array(updates), error, gradient_norms=np.array(norms),
        snapshots=snapshots,
    )  # fmt: skip
