"""A setting's data with its losses: what a run draws from, trains on and is judged by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import data
from .settings import Setting

#: Windows or sequences of a validation loss.
NUM_VALID_WINDOWS = 128
#: Points of the dense grid that a differential equation is judged on.
NUM_GRID = 512
SEED_TRAIN, SEED_VALID = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What to train on.

    Attributes:
        source: of the data, for the table.
        batches: seed of the order -> batches without end.
        loss: (model, batch) -> scalar with a graph.
        valid: batch of the validation loss.
        valid_loss: without label smoothing.
        residuals: (model, batch) -> (R,), whose mean square is the loss; None: nobody has said.
    """

    source: str
    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    valid: Any
    valid_loss: Callable[[nn.Module, Any], Tensor]
    residuals: Callable[[nn.Module, Any], Tensor] | None = None

    def validate(self, model: nn.Module) -> float:
        """The final validation loss; the model is left in training mode."""
        model.eval()
        with torch.no_grad():
            found = float(self.valid_loss(model, self.valid))
        model.train()
        return found


def build_problem(setting: Setting) -> Problem:
    """Data and losses of a setting.

    Raises:
        ValueError: its text is not there.
        ModuleNotFoundError: its package is not there.
    """
    if setting.is_equation:
        return _equation(setting)
    batches, valid, told = _batches(setting)
    train_loss = functools.partial(_loss, label_smoothing=setting.label_smoothing)
    if setting.accumulate > 1:
        one = batches

        def grouped(order: int) -> Iterator[Any]:
            stream = one(order)
            while True:
                yield [next(stream) for _ in range(setting.accumulate)]

        def mean_loss(model: nn.Module, group: Any) -> Tensor:
            return torch.stack([train_loss(model, piece) for piece in group]).mean()

        return Problem(source=told, batches=grouped, loss=mean_loss, valid=valid, valid_loss=_loss)
    residuals = _errors if setting.residuals else None
    return Problem(
        source=told, batches=batches, loss=train_loss, valid=valid, valid_loss=_loss, residuals=residuals
    )  # fmt: skip


def _loss(model: nn.Module, batch: Any, label_smoothing: float = 0.0) -> Tensor:
    x, y = batch
    out = model(x)
    if y.is_floating_point():
        return functional.mse_loss(out, y)
    return functional.cross_entropy(out.flatten(0, -2), y.flatten(), label_smoothing=label_smoothing)


def _errors(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    errors: Tensor = model(x) - y
    return errors.flatten()


def _batches(setting: Setting) -> tuple[Callable[[int], Iterator[Any]], data.Samples, str]:
    """Batches by seed of the order, validation data, where they come from."""
    if setting.source == "digits":
        train, valid = data.digits()
        return functools.partial(data.epochs, train, setting.batch), valid, "scikit-learn digits"
    if setting.source == "drift":
        stages = max(setting.steps // data.DRIFT_STEPS, 1)
        valid = data.draw_taught(data.NUM_VALID, data.generator(SEED_VALID), stage=stages - 1)
        return lambda order: data.drifting(setting.batch, order, stages), valid, "made: drifting teacher"
    draw, draw_valid, num_valid, told = _draws(setting)
    valid = draw_valid(num_valid, data.generator(SEED_VALID))
    if setting.full_batch:
        whole = draw(setting.batch, data.generator(SEED_TRAIN))
        return lambda _order: _forever(whole), valid, told
    if setting.samples:
        kept = draw(setting.samples, data.generator(SEED_TRAIN))
        return functools.partial(data.epochs, kept, setting.batch), valid, told
    return functools.partial(data.fresh, draw, setting.batch), valid, told


def _forever(batch: Any) -> Iterator[Any]:
    while True:
        yield batch


def _draws(setting: Setting) -> tuple[data.Draw, data.Draw, int, str]:
    """How training and validation samples are drawn, how many of the latter, where they come from."""
    if setting.is_text:
        text = data.corpus(setting.source)
        train, valid = (functools.partial(data.draw_windows, part) for part in (text.train, text.valid))
        return train, valid, NUM_VALID_WINDOWS, text.source["name"]
    draws: dict[str, data.Draw] = {
        "glyphs": data.draw_glyphs,
        "glyphs-turned": functools.partial(data.draw_glyphs, turned=True),
        "teacher": data.draw_taught,
        "friedman": data.draw_friedman,
        "regression": data.draw_surface,
        "automaton": data.draw_automaton,
        "arithmetic": data.draw_arithmetic,
    }
    draw = draws[setting.source]
    count = NUM_VALID_WINDOWS * 4 if setting.source in ("automaton", "arithmetic") else data.NUM_VALID
    return draw, draw, count, f"made: {setting.source}"


def _equation(setting: Setting) -> Problem:
    residual = data.poisson if setting.source == "poisson" else data.oscillator

    def residuals(net: nn.Module, x: Tensor) -> Tensor:
        errors, scale = (
            (data.poisson_residuals, 1.0) if setting.source == "poisson" else (data.oscillator_residuals, 40.0)
        )
        found: Tensor = errors(net, x) / scale**0.5
        return found

    grid = torch.linspace(0, 1, NUM_GRID)[:, None]
    return Problem(
        source=f"equation: {setting.source}",
        batches=lambda order: data.points(setting.batch, order, setting.samples),
        loss=residual,
        valid=grid,
        valid_loss=residual,
        residuals=residuals if setting.residuals else None,
    )
