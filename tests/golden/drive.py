"""How a run is made from its description, with whichever build is handed in."""

from __future__ import annotations

import math
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from . import material
from .trace import Trace, flat, records_of, weights_digest

#: Short phases, always willing to try, and nothing that depends on the time a step takes; jumps alone.
BASE: dict[str, Any] = {
    "training.warmup_steps": 4, "training.full_steps": 2, "training.max_predict_steps": 20,
    "training.correct_steps": 3, "training.explore_outcomes": 1000, "training.clock": "claimed",
    "training.max_learned_scale": 1.0, "training.min_learned_scale": 1.0,
    "training.lookahead": 0.0, "training.smoothing": 0.0,
    "predictor.window": 3, "predictor.update_budget": 0.0,
    "gate.overhead_budget": 1.0, "gate.overhead_budget_exact": 1.0, "gate.max_backoff": 1,
    "gate.control_fraction": 0.0, "gate.max_chunks": 4,
}  # fmt: skip
#: As users have it, but for what depends on the time.
DEFAULTS: dict[str, Any] = {"training.warmup_steps": 10, "predictor.update_budget": 0.0}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One golden run.

    Attributes:
        about: What it is there to hold fast.
        model, optimizer, schedule, batches, loss: From :mod:`.material`.
        settings: Dotted TOML keys beside ``base``.
        predictor: build -> a predictor of our own.
        more: Further arguments of the trainer.
        act: How the batches are gone through; one ``step`` each by default.
        least: Figures of ``statistics()`` and the least that must have come of them, or the trace would prove nothing.
        shows: What else must be true of the trace.
        without: Settings that take away what the run is there for: with them, it must come out differently.
    """

    about: str
    model: Callable[[], nn.Module] = material.mlp
    optimizer: Callable[[nn.Module], Optimizer] = material.adam
    schedule: Callable[[Optimizer], Any] | None = None
    batches: Callable[[], list[Any]] = material.full_batch
    loss: Callable[[nn.Module, Any], torch.Tensor] = material.mean_square
    base: Mapping[str, Any] = field(default_factory=lambda: BASE)
    settings: Mapping[str, Any] = field(default_factory=dict)
    predictor: Callable[[ModuleType], Any] | None = None
    more: Callable[[], dict[str, Any]] = dict
    act: Callable[[Driver], None] | None = None
    least: Mapping[str, float] = field(default_factory=dict)
    shows: Callable[[Trace], bool] = lambda trace: True
    without: Mapping[str, Any] = field(default_factory=dict)


class Driver:
    """A run under way: the present trainer, and the trace so far."""

    def __init__(self, run: Run, hpt: ModuleType, own: Path, shared: Path) -> None:
        """Args: own: folder of this run with this build.  shared: of this run with either build."""
        self.run, self.hpt, self.own, self.shared = run, hpt, own, shared
        self.trace = Trace()
        self.batches = run.batches()
        self.more: dict[str, Any] = {}
        self.build(seed=1)

    def build(self, seed: int) -> None:
        """Model, optimizer, schedule and trainer, all new."""
        run, hpt = self.run, self.hpt
        self.close()
        torch.manual_seed(seed)
        self.model = run.model()
        self.optimizer = run.optimizer(self.model)
        self.schedule = None if run.schedule is None else run.schedule(self.optimizer)
        settings = {**run.base, **run.settings, "metrics.path": str(self.own / "metrics.jsonl")}
        config = settings_of(hpt, settings)
        self.more = run.more()
        if run.predictor is not None:
            self.more["predictor"] = run.predictor(hpt)
        self.trainer = hpt.HybridTrainer(self.model, self.optimizer, config, run.loss, self.schedule, **self.more)
        torch.manual_seed(seed + 10)
        np.random.seed(seed)
        random.seed(seed)

    def step(self, batch: Any) -> Any:
        """One step, written down."""
        result = self.trainer.step(batch)
        self.note(result)
        return result

    def note(self, result: Any) -> None:
        """Write a result down."""
        verdict = result.verdict
        told = {
            "phase": str(result.phase.value), "loss": result.loss, "gradient_norm": result.gradient_norm,
            "was_predicted": result.was_predicted, "reason": result.reason, "step": result.step,
            "confidence": result.confidence, "prediction_error": result.prediction_error,
            "skipped": result.skipped, "consumed": result.consumed, "num_forward": result.num_forward,
            "num_backward": result.num_backward, "num_claimed_steps": result.num_claimed_steps,
            "alarm": result.alarm.signal, "alarm_level": int(result.alarm.level),
            "lr": float(self.optimizer.param_groups[0]["lr"]), "weights": weights_digest(self.model),
        }  # fmt: skip
        if verdict is not None:
            names = ("scale", "candidate", "loss_before", "loss_after", "upper_bound", "price")
            told |= {name: getattr(verdict, name) for name in names} | {"origin": str(verdict.origin.value)}
        self.trace.steps.append(flat(told))

    def end(self) -> None:
        """Write down how it ended."""
        trainer = self.trainer
        self.trace.end |= {
            **flat({n: t.detach() for n, t in self.model.state_dict().items()}, "weights"),
            **flat(self.optimizer.state_dict(), "optimizer"),
            **flat(trainer.statistics(), "statistics"),
            **flat(trainer.summary(), "summary"),
            **flat({"backward_reduction": trainer.backward_reduction, "speedup_factor": trainer.speedup_factor}),
            **flat({"torch": torch.get_rng_state(), "numpy": np.random.get_state()[1].tolist()}, "generator"),
        }  # fmt: skip
        if self.schedule is not None:
            self.trace.end |= flat(self.schedule.state_dict(), "schedule")
        if "grad_scaler" in self.more:
            self.trace.end |= flat(self.more["grad_scaler"].state_dict(), "grad_scaler")
        if "val_fn" in self.more:
            self.trace.end["val_fn_calls"] = self.more["val_fn"].calls

    def close(self) -> None:
        """The trainer's file is open until the trainer is gone."""
        trainer = getattr(self, "trainer", None)
        sink = getattr(getattr(trainer, "metrics", None), "sink", None)
        if sink is not None:
            sink.close()


def settings_of(hpt: ModuleType, settings: Mapping[str, Any]) -> Any:
    """A build's configuration; settings are named as in the earlier build, which today's reads with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*former keys go")
        return hpt.with_values(hpt.HybridTrainerConfig(), settings)


def play(run: Run, hpt: ModuleType, shared: Path) -> Trace:
    """The trace of a run with one build."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as own, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver = Driver(run, hpt, Path(own), shared)
        try:
            if run.act is not None:
                run.act(driver)
            else:
                for batch in driver.batches:
                    driver.step(batch)
            driver.end()
        except Exception as error:  # a build that fails where the other doesn't: a difference, and the other runs go on
            driver.trace.error = f"raised {type(error).__name__}: {error}"
        driver.close()
        driver.trace.records = records_of(Path(own) / "metrics.jsonl")
    driver.trace.seconds = time.perf_counter() - started
    return driver.trace


def unmet(run: Run, trace: Trace) -> str | None:
    """What the trace should have shown and does not, or None."""
    if trace.error:
        return trace.error
    for name, least in run.least.items():
        value = trace.figure(name)
        if not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            return f"{name} is {value}, not at least {least}"
    return None if run.shows(trace) else "what it is there for did not happen: " + run.about
