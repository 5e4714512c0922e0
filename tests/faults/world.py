"""A run that anything may happen to: what somebody does with a trainer or an engine, and what has to hold after it."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cases import MODELS, OPTIMIZERS, SCHEDULERS, Broken, Fake, config, loss_fn, make_batches, model_for, setup
from hybrid_predict_trainer import CheckpointError, DivergenceError, HybridTrainer, attach
from hybrid_predict_trainer.experiments.faults import files
from hybrid_predict_trainer.experiments.faults.material import fingerprint
from hybrid_predict_trainer.keep import resume
from hybrid_predict_trainer.records import Phase
from hybrid_predict_trainer.recovery import RollbackAndRetry

KINDS = ("noisy", "same", "nan", "inf", "spike", "tiny", "one", "empty")
#: Who predicts: a name of ours, or an own one with a fault.
PREDICTORS = (
    "auto", "hold", "heuristic", "linear", "secant", "quasi_newton", "dmd", "mlp", "downhill", "uphill", "nan",
    "predict_raises", "huge",
)  # fmt: skip
#: What is done to the newest checkpoint.
DAMAGES = (
    files.truncate, files.zero, files.flip, files.remove, files.swap, files.add, files.poison, files.header_bomb,
    files.parser_bomb, files.link, files.unfinished,
)  # fmt: skip
#: Settings beside those of short phases.
MOTIONS: dict[str, dict[str, Any]] = {
    "jumps": {},
    "motion": {
        "max_lr_multiplier": 50.0, "lookahead__scope": "all", "lookahead__extrapolation": 0.5,
        "lookahead__damping": 0.25, "min_group_factor": 0.1,
    },
    "control": {"gate__holdout_fraction": 0.3},
    "segments": {"segments": 2},
    "encoder": {"encoder__low_rank": 2, "encoder__kfac": True, "encoder__health": 2},
    "off": {"enabled": False},
}  # fmt: skip
ALL_MODELS = (*MODELS, "norm_dropout")


class Interruption(BaseException):
    """What a signal's handler might raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a run is made."""

    model: str = "mlp"
    optimizer: str = "adam"
    schedule: str = "lambda"
    predictor: str = "auto"
    motion: str = "jumps"
    engine: bool = False


@dataclass
class World:
    """A run, its folder, and what is known of it from outside."""

    recipe: Recipe
    folder: Path
    seed: int = 1
    frozen: dict[str, Tensor] = field(default_factory=dict)
    saved: dict[Path, str] = field(default_factory=dict)
    before_jump: list[Tensor] | None = None  # weights that a rollback brings back; None: not known
    num_bad: int = 0  # in a row
    altered: bool = False  # the user has changed groups: what was saved before need not fit
    interrupt_in: int = -1  # calls of the loss until it raises
    finished: bool = False

    def __post_init__(self) -> None:
        self.noisy = make_batches(40, 16, seed=self.seed)
        self.build(self.seed)

    @property
    def schedule(self) -> str:
        """That of the recipe, where torch lets the optimizer have it."""
        cyclic = self.recipe.optimizer not in ("adagrad", "adafactor", "muon")
        return self.recipe.schedule if cyclic or self.recipe.schedule != "onecycle" else "lambda"

    # ---- making ------------------------------------------------------------------------------------------

    def build(self, seed: int) -> None:
        r = self.recipe
        self.made = setup(model_for(r.optimizer, r.model), r.optimizer, self.schedule, seed)
        own = {"downhill": lambda: Fake(-0.02), "uphill": lambda: Fake(1.0)}.get(r.predictor)
        if own is None and r.predictor in ("nan", "predict_raises", "huge"):
            own = lambda: Broken(r.predictor)  # noqa: E731
        changes = {} if own else {"predictor_type": r.predictor}
        settings = config(
            **changes, **MOTIONS[r.motion], checkpoint__keep_last_n=3, divergence__max_consecutive_nonfinite=6
        )
        kwargs: dict[str, Any] = {"predictor": own() if own else None}
        self.trainer: HybridTrainer | None = None
        self.engine = None
        if r.engine:
            self.engine = attach(
                self.made.model, self.made.optimizer, settings, loss_fn=self.loss, lr_scheduler=self.made.scheduler,
                **kwargs,
            )  # fmt: skip
        else:
            self.trainer = HybridTrainer(
                self.made.model, self.made.optimizer, settings, self.loss, self.made.scheduler, **kwargs
            )
        self.num_calls = 0

    @property
    def run(self) -> Any:
        return (self.engine or self.trainer).run  # type: ignore[union-attr]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if self.interrupt_in >= 0:
            self.interrupt_in -= 1
            if self.interrupt_in < 0:
                raise Interruption
        return loss_fn(model, batch)

    def bits(self) -> str:
        return fingerprint(resume.parts(self.run, self.run.recorder))

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.made.model.parameters()]

    # ---- what somebody does ------------------------------------------------------------------------------

    def batch(self, kind: str) -> Any:
        x, y = self.noisy[self.num_calls % len(self.noisy)]
        if kind == "same":
            return self.noisy[0]
        if kind in ("nan", "inf"):
            return x, y * float(kind)
        if kind == "spike":
            return x, y * 100
        return {"tiny": (x[:2], y[:2]), "one": (x[:1], y[:1]), "empty": (x[:0], y[:0])}.get(kind, (x, y))

    def step(self, kind: str) -> None:
        batch = self.batch(kind)
        if kind in ("one", "empty") and any(isinstance(m, nn.BatchNorm1d) for m in self.made.model.modules()):
            return  # torch itself refuses those
        before, calls = self.weights(), self.run.meter.num_steps
        self.num_calls += 1
        bad = kind in ("nan", "inf", "empty")
        try:
            results = self.by_engine(batch) if self.engine is not None else [self.trainer.step(batch)]  # type: ignore[union-attr]
        except DivergenceError:
            assert self.num_bad + 1 >= 6, "it gave up too early"
            assert self.is_finite()
            self.finished = True
            return
        except Interruption:
            assert self.is_finite()
            return
        if self.recipe.motion == "off":
            if bad or not self.is_finite():  # the plain loop has NaN weights now, as anybody's
                self.finished = True
            return
        for result in results:
            assert isinstance(result.phase, Phase)
            assert 0 <= result.confidence <= 1
            if result.phase is Phase.PREDICT and not result.was_predicted:
                assert not result.num_backward
            if self.engine is None:
                assert self.run.meter.num_steps == calls + 1
                self.look_at_weights(result, before)
        real = [r for r in results if r.num_backward or r.skipped]
        if real:
            self.num_bad = self.num_bad + 1 if real[-1].skipped else 0

    def look_at_weights(self, result: Any, before: list[Tensor]) -> None:
        """A refusal and a step that is left out move nothing, but where a jump on trial is taken back with it."""
        action = None if result.recovery is None else result.recovery.action
        if isinstance(action, RollbackAndRetry):
            if self.before_jump is not None:
                assert all(map(torch.equal, self.before_jump, self.weights())), "not the weights before the jump"
        elif result.skipped or (result.phase is Phase.PREDICT and not result.was_predicted):
            assert all(map(torch.equal, before, self.weights())), "a refusal has left a trace"
        if result.was_predicted and self.run.proposer.segment is None and self.recipe.motion != "segments":
            self.before_jump = before
        elif self.run.judge.probation is None:
            self.before_jump = None

    def by_engine(self, batch: Any) -> list[Any]:
        assert self.engine is not None
        self.made.optimizer.zero_grad()
        loss = self.loss(self.made.model, batch)
        loss.backward()
        self.engine.note(loss, batch)
        self.made.optimizer.step()
        return [] if self.engine.result is None else [self.engine.result]

    def save(self) -> None:
        path = (self.engine or self.trainer).save_checkpoint(self.folder)  # type: ignore[union-attr]
        self.saved[path] = self.bits()

    def save_behind(self) -> None:
        """Captured now, written after another step."""
        if self.trainer is None:
            return
        write, bits = self.trainer.capture_checkpoint(self.folder), self.bits()
        self.step("noisy")
        self.saved[write()] = bits

    def known(self) -> list[Path]:
        return [path for path in self.saved if path.is_dir()]

    def load(self, fresh: bool) -> None:
        known = self.known()
        if not known:
            return
        if fresh:
            self.anew()
        path = max(known, key=lambda p: int(p.name.rpartition("_")[2]))
        self.take(lambda: (self.engine or self.trainer).load_checkpoint(path), path)  # type: ignore[union-attr]

    def load_latest(self, damage: int) -> None:
        """The newest is damaged first, in one of several ways."""
        known = sorted(self.known(), key=lambda p: int(p.name.rpartition("_")[2]))
        if len(known) < 2:
            return
        DAMAGES[damage % len(DAMAGES)](known[-1], known[-2], random.Random(damage))
        owner = self.engine or self.trainer
        self.take(lambda: owner.load_latest(self.folder), known[-2])  # type: ignore[union-attr]

    def take(self, load: Callable[[], object], path: Path) -> None:
        before, self.before_jump = self.bits(), None
        try:
            load()
        except CheckpointError:
            assert self.altered or self.frozen, "a checkpoint of this very run was refused"
            assert self.bits() == before, "a refused checkpoint has left a trace"
            return
        if not self.altered:
            assert self.bits() == self.saved[path], "what was loaded is not what was saved"
        for name, p in self.made.model.named_parameters():
            if name in self.frozen:
                self.frozen[name] = p.detach().clone()
        self.num_bad = self.run.monitor.num_consecutive_critical

    def anew(self) -> None:
        """Another process: fresh objects, to which the user does again what was done to the old ones."""
        frozen, self.frozen = list(self.frozen), {}
        was_altered = self.altered
        # a base that was frozen from the start is no part of a checkpoint: whoever resumes loads the same one
        self.build(self.seed + (0 if self.recipe.model == "frozen" else 100))
        for name, p in self.made.model.named_parameters():
            if name in frozen:
                p.requires_grad_(False)
                self.frozen[name] = p.detach().clone()
        self.altered = was_altered

    def freeze(self, which: int) -> None:
        """A layer more, but never all."""
        # the loss knows nothing of a parameter that came later
        free = [(n, p) for n, p in self.made.model.named_parameters() if p.requires_grad and n != "extra"]
        if len(free) < 2:
            return
        self.before_jump = None
        name, p = free[which % len(free)]
        p.requires_grad_(False)
        p.grad = None
        self.frozen[name] = p.detach().clone()

    def thaw(self) -> None:
        for name, p in self.made.model.named_parameters():
            if name in self.frozen and any(p is q for g in self.made.optimizer.param_groups for q in g["params"]):
                p.requires_grad_(True)
                del self.frozen[name]
                return

    def scale_rate(self, factor: float) -> None:
        for group in self.made.optimizer.param_groups:
            group["lr"] *= factor
        if self.made.scheduler is not None and hasattr(self.made.scheduler, "base_lrs"):
            self.made.scheduler.base_lrs = [lr * factor for lr in self.made.scheduler.base_lrs]

    def write_weights(self) -> None:
        self.before_jump = None
        with torch.no_grad():
            for p in self.made.model.parameters():
                if p.requires_grad:  # a frozen base is no part of a checkpoint: over another one it is refused
                    p.mul_(0.9)

    def add_group(self) -> None:
        if self.altered or self.recipe.optimizer == "muon" or self.schedule == "onecycle":
            return  # torch itself wants matrices, and knows no group that comes later
        extra = nn.Parameter(torch.zeros(2))
        self.made.model.register_parameter("extra", extra)
        self.made.optimizer.add_param_group({"params": [extra]})
        scheduler = self.made.scheduler
        for name in ("base_lrs", "lr_lambdas"):
            if scheduler is not None and hasattr(scheduler, name):
                getattr(scheduler, name).append(getattr(scheduler, name)[0])
        self.altered = True

    def validate(self) -> None:
        """As anybody does between two steps."""
        self.made.model.eval()
        with torch.no_grad():
            loss_fn(self.made.model, self.noisy[1])
        self.made.model.train()

    def copy(self) -> None:
        if self.trainer is None or self.interrupt_in >= 0:
            return
        twin = copy.deepcopy(self.trainer)
        before = self.weights()
        twin.step(self.noisy[2])
        assert all(map(torch.equal, before, self.weights())), "a copy has moved the original"

    def force(self, steps: int) -> None:
        if self.trainer is not None:
            self.trainer.force_full_phase(steps)

    # ---- what has to hold --------------------------------------------------------------------------------

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.made.model.parameters())

    def check(self) -> None:
        run, model = self.run, self.made.model
        if not self.finished:
            assert self.is_finite(), "a weight is not finite"
        for name, p in model.named_parameters():
            if name in self.frozen:
                assert torch.equal(p, self.frozen[name]), f"{name} is frozen and has moved"
        meter = run.meter
        assert sum(meter.steps_by_phase.values()) == meter.num_steps
        assert 0 <= meter.num_real_steps <= meter.num_attempted_steps <= meter.num_steps + meter.num_jumps_accepted
        assert meter.num_jumps_accepted <= meter.num_jumps_proposed
        assert math.isfinite(meter.cost_units)
        assert meter.cost_units >= 0
        assert model.training
        owner = self.engine or self.trainer
        json.dumps(owner.statistics(), allow_nan=False)  # type: ignore[union-attr]

    def summary(self) -> None:
        owner = self.engine or self.trainer
        json.dumps(owner.summary())  # type: ignore[union-attr]

    def close(self) -> None:
        if self.engine is not None:
            self.engine.detach()
        shutil.rmtree(self.folder, ignore_errors=True)


def quietly(act: Callable[[], None]) -> None:
    """What is said is not looked at here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        act()


SCHEDULES, OPTIMIZER_NAMES = tuple(SCHEDULERS), tuple(OPTIMIZERS)
