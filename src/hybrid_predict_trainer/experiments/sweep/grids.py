"""Grids of real training runs, each trained to its end once and kept: what ``hpt bench sweep`` replays.

A small GPT on the standard library's source text and on TinyStories, and a convolutional network on a CIFAR-10 subset
(32 runs each), and a physics-informed network (48 runs).  In each, the peak rate, the schedule, the width and one more
setting vary; the largest rate is meant to be too large.  All runs of a grid share their seed, so they read the same
batches.

A grid is one file, ``grids/NAME.json.gz``: ``steps``, the rows' ``at``, and per trial ``params``, ``cpu_s`` (of the
training steps alone, on the machine that recorded them), ``num_parameters``, the validation loss of each row in
``valid`` and the mean training loss since the row before in ``train``.  A run whose loss stops being finite ends there.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...forecast.curve import Array
from ...records import ConfigError
from ...tasks import TaskSettings, make_task
from ...tasks.base import Task, counter_rng, undisturbed
from ...tasks.equations.mlp import TanhMLP
from ...tasks.images.networks import ConvNet
from ...tasks.language.gpt import Gpt, GptConfig
from ...tasks.language.text import load_corpus
from ...tasks.recipes import decay_groups, lr_factor

FOLDER = Path(__file__).parent / "grids"
NUM_ROWS = 60
WARMUP_SHARE, DECAY_SHARE = 0.05, 0.25
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What varies, and how a trial is trained.

    Attributes:
        name: of the file.
        steps: of every trial.
        space: values by name; every combination is a trial.
    """

    name: str
    steps: int
    space: dict[str, tuple[Any, ...]]

    def params(self) -> Iterator[dict[str, Any]]:
        """Of all trials, in a fixed order."""
        for values in itertools.product(*self.space.values()):
            yield dict(zip(self.space, values, strict=True))


GRIDS = {
    "gpt-source": Grid(
        name="gpt-source", steps=300,
        space={
            "lr": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (0.0, 0.3), "width": (16, 32),
            "schedule": ("linear", "wsd"),
        },
    ),
    "gpt-stories": Grid(
        name="gpt-stories", steps=300,
        space={
            "lr": (1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (0.0, 0.3), "width": (16, 32),
            "schedule": ("linear", "wsd"),
        },
    ),
    "cnn": Grid(
        name="cnn", steps=240,
        space={
            "lr": (1e-2, 3e-2, 1e-1, 3e-1), "weight_decay": (0.0, 5e-3), "width": (8, 16),
            "schedule": ("linear", "wsd"),
        },
    ),
    "pinn": Grid(
        name="pinn", steps=2400,
        space={
            "lr": (2.5e-3, 5e-3, 1e-2, 2e-2), "beta2": (0.99, 0.999), "width": (16, 32),
            "schedule": ("linear", "cosine", "wsd"),
        },
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A run of a grid.

    Attributes:
        params: its own values.
        at: (n,) steps of its rows; fewer than the grid's where it diverged.
        valid, train: (n,) losses.
        steps: planned.
        cost: CPU seconds of all planned steps.
    """

    params: dict[str, Any]
    at: Array
    valid: Array
    train: Array
    steps: int
    cost: float
    rates: Array = field(repr=False)

    @property
    def final(self) -> float:
        """The validation loss at the end; infinite where the run did not come so far."""
        return float(self.valid[-1]) if len(self.at) and self.at[-1] == self.steps else math.inf


def load(name: str) -> list[Trial]:
    """The recorded trials of a grid.

    Raises:
        ConfigError: unknown.
    """
    path = FOLDER / f"{name}.json.gz"
    if name not in GRIDS or not path.is_file():
        raise ConfigError(f"unknown grid {name!r} (valid: {', '.join(GRIDS)})")
    found = json.loads(gzip.decompress(path.read_bytes()))
    trials = []
    for row in found["trials"]:
        count = len(row["valid"])
        trials.append(
            Trial(
                params=row["params"], at=np.array(found["at"][:count], dtype=np.float64),
                valid=np.array(row["valid"]), train=np.array(row["train"]), steps=found["steps"],
                cost=row["cpu_s"], rates=rates(row["params"], found["steps"]),
            )
        )  # fmt: skip
    return trials


def rates(params: dict[str, Any], steps: int) -> Array:
    """Learning rate of every step of a trial, (T,)."""
    found: Array = params["lr"] * np.array([
        lr_factor(
            n, schedule=params["schedule"], total_steps=steps, warmup_steps=round(WARMUP_SHARE * steps),
            decay_frac=DECAY_SHARE,
        )
        for n in range(steps)
    ])  # fmt: skip
    return found


# ---- recording ----------------------------------------------------------------------------------------------


class Subject(Protocol):
    """What is trained in a grid."""

    def model(self, params: dict[str, Any]) -> nn.Module:
        """With the same weights for the same width."""

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """On the batch of a step."""

    def evaluate(self, model: nn.Module) -> float:
        """On the fixed validation set."""


class Language:
    """A two-layer GPT on bytes."""

    CONTEXT, BATCH_SIZE, NUM_VALID = 32, 8, 64

    def __init__(self, data: str | None) -> None:
        """Load the text."""
        self._corpus = load_corpus(data, 4_000_000)
        at = np.linspace(0, len(self._corpus.valid) - self.CONTEXT - 1, self.NUM_VALID).astype(np.int64)
        self._valid = self._windows(self._corpus.valid, at)

    def _windows(self, tokens: Tensor, at: Any) -> Tensor:
        return tokens[torch.from_numpy(at)[:, None] + torch.arange(self.CONTEXT + 1)].long()

    def model(self, params: dict[str, Any]) -> nn.Module:
        """See :class:`Subject`."""
        config = GptConfig(num_layers=2, width=params["width"], num_heads=2, context=self.CONTEXT, lr=params["lr"])
        return _seeded(lambda: Gpt(config))

    def _loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        logits = model(windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """See :class:`Subject`."""
        at = counter_rng(SEED, step).integers(len(self._corpus.train) - self.CONTEXT - 1, size=self.BATCH_SIZE)
        return self._loss(model, self._windows(self._corpus.train, at))

    def evaluate(self, model: nn.Module) -> float:
        """See :class:`Subject`."""
        with undisturbed(model):
            return float(self._loss(model, self._valid))


class FromTask:
    """A task's data and loss with networks of several widths."""

    def __init__(self, task: Task, build: Callable[[int], nn.Module]) -> None:
        """Args: task: of the package.  build: width -> network."""
        self._task, self._build = task, build
        self._batches, self._next = task.batches(SEED), 0

    def model(self, params: dict[str, Any]) -> nn.Module:
        """See :class:`Subject`."""
        self._batches, self._next = self._task.batches(SEED), 0
        return _seeded(lambda: self._build(params["width"]))

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """See :class:`Subject`."""
        assert step == self._next, "batches are read in order"
        self._next += 1
        return self._task.loss_fn(model, next(self._batches))

    def evaluate(self, model: nn.Module) -> float:
        """See :class:`Subject`."""
        return self._task.evaluate(model)


def subject_of(name: str) -> Subject:
    """What a grid trains."""
    if name.startswith("gpt-"):
        return Language({"gpt-source": None, "gpt-stories": "tinystories"}[name])
    if name == "cnn":
        task = make_task("cifar", TaskSettings(batch_size=32))
        task._valid = tuple(part[::4] for part in task._valid)  # type: ignore[attr-defined]  # every fourth image
        return FromTask(task, _conv_net)
    task = make_task("pinn-poisson", TaskSettings())
    orders = task.problem.orders  # type: ignore[attr-defined]
    return FromTask(task, lambda width: TanhMLP((1, width, width), orders))


def _conv_net(width: int) -> nn.Module:
    """On images of half the size."""
    return nn.Sequential(nn.AvgPool2d(2), ConvNet(3, ((width,), (2 * width,), (4 * width,)), "groupnorm", 10))


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        return build()


def _optimizer(name: str, model: nn.Module, params: dict[str, Any]) -> torch.optim.Optimizer:
    if name == "pinn":
        return torch.optim.Adam(model.parameters(), lr=params["lr"], betas=(0.9, params["beta2"]))
    groups = decay_groups(model, params["weight_decay"])
    if name == "cnn":
        return torch.optim.SGD(groups, lr=params["lr"], momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=params["lr"], betas=(0.9, 0.98))


def train(grid: Grid, subject: Subject, params: dict[str, Any]) -> dict[str, Any]:
    """One run to its end, as its entry in the file."""
    model = subject.model(params)
    optimizer = _optimizer(grid.name, model, params)
    planned = rates(params, grid.steps)
    apart = grid.steps // NUM_ROWS
    valid: list[float] = []
    means: list[float] = []
    since, spent = 0.0, 0.0
    for step in range(grid.steps):
        started = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = float(planned[step])
        optimizer.zero_grad()
        loss = subject.loss(model, step)
        loss.backward()
        optimizer.step()
        since += float(loss.detach())
        spent += time.process_time() - started
        if (step + 1) % apart == 0:
            found = subject.evaluate(model)
            if not math.isfinite(found) or not math.isfinite(since):
                spent *= grid.steps / (step + 1)
                break
            valid.append(float(f"{found:.6g}"))
            means.append(float(f"{since / apart:.5g}"))
            since = 0.0
    return {
        "params": params, "cpu_s": round(spent, 3), "num_parameters": sum(p.numel() for p in model.parameters()),
        "valid": valid, "train": means,
    }  # fmt: skip


def record(name: str, tell: Callable[[str], None], folder: Path = FOLDER) -> Path:
    """Train a whole grid and write its file.

    Args:
        name: Of the grid.
        tell: Takes a line about every run.
        folder: Of the file.
    """
    grid = GRIDS[name]
    subject = subject_of(name)
    rows = []
    for params in grid.params():
        rows.append(train(grid, subject, params))
        last = rows[-1]["valid"][-1] if rows[-1]["valid"] else math.nan
        tell(f"{name}: {params}: {len(rows[-1]['valid'])} rows, {last:.5g}, {rows[-1]['cpu_s']:.1f} s")
    apart = grid.steps // NUM_ROWS
    whole = {"steps": grid.steps, "at": [apart * (k + 1) for k in range(NUM_ROWS)], "trials": rows}
    path = folder / f"{name}.json.gz"
    text = json.dumps(whole, separators=(",", ":")).encode()
    part = path.with_suffix(".part")
    part.write_bytes(gzip.compress(text, 9, mtime=0))
    part.replace(path)
    return path
