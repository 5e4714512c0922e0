"""What a task is: a model, its data, its loss and the recipe it is trained with.

Everything that must be the same for every arm of a comparison lives here or behind these names, so that
arms can differ in nothing but the trainer. This package imports nothing from the rest of the library.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from .extras import missing_extra as missing_extra
from .low_bit import ternary

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
OptimizerName = Literal["adamw", "adamw8bit", "adam", "sgd", "muon"]
ScheduleName = Literal["wsd", "linear", "cosine", "constant"]

DATA_DIR_VARIABLE = "HPT_DATA_DIR"
#: Devices that take a copy from page-locked memory while the host goes on.
QUEUEING = frozenset({"cuda"})


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What the command line sets; `None` means the task's own value.

    A setting a task has no use for is an error.

    Attributes:
        preset: a named size or variant of the task's model.
        data: a local text file, folder or .npz, a named set under `HPT_DATA_DIR`, or `hf:<owner>/<name>`.
        data_bytes: read at most this many bytes of text (training part).
        batch_size: examples per batch; for full-batch tasks the number of training points.
        context: tokens per example, language tasks only.
        dtype: of parameters and inputs.
        autocast_bf16: run the forward under bfloat16 autocast.
        compile: `torch.compile` the model's forward.
        gradient_checkpointing: recompute block activations in the backward, language tasks only.
        ternary: hidden linear layers have ternary weights (`low_bit.ternary`), tasks that train networks of their own.
        device: where model and batches live.
        fused: use the optimizer's fused kernel where it has one; read by whoever calls `build_optimizer`.
    """

    preset: str | None = None
    data: str | Path | None = None
    data_bytes: int | None = None
    batch_size: int | None = None
    context: int | None = None
    dtype: Literal["float32", "float64"] | None = None
    autocast_bf16: bool = False
    compile: bool = False
    gradient_checkpointing: bool = False
    ternary: bool = False
    device: str = "cpu"
    fused: bool = False

    def __post_init__(self) -> None:
        """Check ranges, so that no task has to."""
        for name in ("batch_size", "context", "data_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.data is not None and not str(self.data).strip():  # an unset variable; as a path, the working directory
            raise ValueError("data is an empty name: leave it out, or name a file, a folder or a set")
        if self.ternary and self.autocast_bf16 and not self.device.startswith("cuda"):
            raise ValueError(f"torchao's ternary layers know of autocast on CUDA only: leave out bf16 on {self.device}")
        if self.dtype not in (None, "float32", "float64"):
            raise unknown_name("dtype", str(self.dtype), ("float32", "float64"))


@dataclass(frozen=True, kw_only=True)
class TaskDefaults:
    """The recipe a task is trained with when nobody says otherwise; override with `dataclasses.replace`.

    Attributes:
        optimizer: name understood by `build_optimizer`.
        lr: peak learning rate.
        betas: Adam's, ignored by SGD.
        momentum: SGD's (Nesterov) and Muon's.
        weight_decay: applied to matrices only (see `decay_groups`).
        steps: optimizer steps of a run.
        warmup_steps: linear warm-up at the start.
        schedule: name understood by `build_scheduler`.
        decay_frac: share of the run spent decaying, schedule "wsd" only.
        grad_clip: largest global gradient norm; `None` for no clipping.
        lr_grid: the rates a tuned baseline is chosen from.
        predictor: the predictor kind measured to suit this task best.
    """

    lr: float
    steps: int
    optimizer: OptimizerName = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: ScheduleName = "linear"
    decay_frac: float = 0.25
    grad_clip: float | None = None
    lr_grid: tuple[float, ...] = ()
    predictor: str = "secant"


def with_steps(recipe: TaskDefaults, steps: int) -> TaskDefaults:
    """Return the recipe for a run of another length; its warm-up is at most a tenth of the run."""
    return replace(recipe, steps=steps, warmup_steps=min(recipe.warmup_steps, steps // 10))


class Task(Protocol):
    """A model, its data and its loss."""

    @property
    def name(self) -> str:
        """As in the registry."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether the batch is the whole data set, so that every step sees the same function."""
        ...

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps per pass over the data; `None` where batches are drawn afresh."""
        ...

    @property
    def defaults(self) -> TaskDefaults:
        """The recipe it is trained with when nobody says otherwise."""
        ...

    def build_model(self, seed: int) -> nn.Module:
        """Return a new model, the same for the same seed, without touching the global random state."""
        ...

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches `start`, `start + 1`, ... of the infinite sequence that belongs to `seed`.

        Batch k depends on (seed, k) only, so a resumed run sees exactly what the interrupted one would have.
        """
        ...

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scalar training loss; works under `torch.no_grad()` too."""
        ...

    def evaluate(self, model: nn.Module) -> float:
        """Return the validation loss on a fixed set; leaves random state and training mode as they were."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what a report must say about the task, JSON-able: sizes, data provenance, parameters."""
        ...


@runtime_checkable
class HasSolution(Protocol):
    """A task whose true solution is known."""

    def solution_error(self, model: nn.Module) -> float:
        """Return the relative L2 error of the model against it."""
        ...


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> ValueError:
    """Return a one-line error naming the nearest valid name, if there is one, and all of them."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint} (valid: {', '.join(names)})")


def reject_settings(task: str, settings: TaskSettings, *names: str) -> None:
    """Raise `ValueError` if a named setting is set: ignoring one in silence would mislabel a result."""
    for name in names:
        if getattr(settings, name) not in (None, False):
            raise ValueError(f"task {task!r} has no use for the setting {name!r}; leave it unset")


def data_dir(wanted: str) -> Path:
    """Return the folder `HPT_DATA_DIR` names, or raise `FileNotFoundError` saying that `wanted` needs it."""
    value = os.environ.get(DATA_DIR_VARIABLE)
    if not value:
        raise FileNotFoundError(
            f"{wanted} is looked for under {DATA_DIR_VARIABLE}, which is not set; set it to its folder"
        )
    return Path(value)


def torch_dtype(name: str | None, default: torch.dtype = torch.float32) -> torch.dtype:
    """Return the torch dtype called `name`, or the default for `None`."""
    return {None: default, "float32": torch.float32, "float64": torch.float64}[name]


def counter_rng(seed: int, *counter: int) -> np.random.Generator:
    """Return a generator that depends on its arguments only (all >= 0): random access, nothing to replay."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    return np.random.default_rng((seed, *counter))


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """Return what was drawn on the host on the device; where that is possible nobody waits for what is queued there.

    A plain copy would wait for all of the step before: at every batch, if that is what it is made from.
    """
    if device.type not in QUEUEING:
        return drawn.to(device)
    return drawn.pin_memory().to(device, non_blocking=True)


def seeded_model(build: Callable[[], nn.Module], seed: int, settings: TaskSettings, dtype: torch.dtype) -> nn.Module:
    """Return `build()` initialised from `seed`, moved to device and dtype, compiled if asked for.

    Weights are drawn on the CPU in float32: a seed means the same model on every device and in every dtype.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would reach the accelerators' generators too, which are not restored.
        torch.default_generator.manual_seed(seed)
        model = build()
    model = model.to(device=settings.device, dtype=dtype)
    if settings.ternary:
        model = ternary(model)
    if settings.compile:
        model.compile()  # in place: parameter names keep no "_orig_mod." prefix
    return model


def count_parameters(build: Callable[[], nn.Module]) -> int:
    """Return the number of parameters of `build()`, shared ones once, without allocating or drawing them."""
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode and without gradients; then restore each module's mode and random state."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


def mean_loss(
    loss_fn: Callable[[nn.Module, Batch], Tensor], model: nn.Module, parts: Iterable[tuple[Batch, int]]
) -> float:
    """Return the mean of `loss_fn` over parts (batch, number of examples) of a validation set."""
    total, count = 0.0, 0
    with undisturbed(model):
        for batch, size in parts:
            total += loss_fn(model, batch).item() * size
            count += size
    return total / count
