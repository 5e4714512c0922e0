"""Tables shared by the tests: models, optimizers, batches, fake predictors; and exact comparison."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.records import BasisSpec, Phase, PhasePrediction, StateDict, StepResult, Window

WIDTH = 6


def put_into_subject(trainer: HybridTrainer, **values: Any) -> None:
    """Other values of what is trained, which nothing outside a test ever changes."""
    for name, value in values.items():
        object.__setattr__(trainer.run.subject, name, value)


# ---------------------------------------------------------------- models


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


class Counting(nn.Module):
    """A buffer that every forward changes, in training mode or not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def _linear(*middle: nn.Module, hidden: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, hidden), *middle, nn.Tanh(), nn.Linear(hidden, 1))


def _frozen() -> nn.Module:
    model = _linear()
    model[0].weight.requires_grad_(False)
    return model


def _matrices() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _linear,
    "batchnorm": lambda: _linear(nn.BatchNorm1d(8)),
    "dropout": lambda: _linear(nn.Dropout(0.3)),
    "tied": Tied,
    "frozen": _frozen,
}
EXTRA_MODELS: dict[str, Callable[[], nn.Module]] = {
    "matrices": _matrices,
    "norm_dropout": lambda: _linear(nn.BatchNorm1d(8), nn.Dropout(0.3)),
    "counting": lambda: _linear(Counting()),
}


def make_model(name: str, seed: int = 1) -> nn.Module:
    """A model with weights that depend on the seed alone; the global generator is left seeded too."""
    torch.manual_seed(seed)
    return (MODELS | EXTRA_MODELS)[name]()


# ---------------------------------------------------------------- optimizers

OptimizerMaker = Callable[[Iterable[Tensor]], Optimizer]
OPTIMIZERS: dict[str, OptimizerMaker] = {
    "sgd": partial(torch.optim.SGD, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "adamw_fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "nadam": partial(torch.optim.NAdam, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "adafactor": partial(torch.optim.Adafactor, lr=0.05),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = partial(torch.optim.Muon, lr=0.01)


def model_for(optimizer: str, model: str) -> str:
    """Muon takes matrices only."""
    return "matrices" if optimizer == "muon" and model not in ("tied",) else model


def make_optimizer(name: str, model: nn.Module) -> Optimizer:
    return OPTIMIZERS[name](p for p in model.parameters() if p.requires_grad)


Scheduler = torch.optim.lr_scheduler.LRScheduler
SCHEDULERS: dict[str, Callable[[Optimizer], Scheduler] | None] = {
    "constant": None,
    "flat": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1.0),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + 0.1 * t)),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=60),
}

# ---------------------------------------------------------------- batches and losses


def make_batches(count: int, size: int = 16, seed: int = 7, noise: float = 0.3) -> list[tuple[Tensor, Tensor]]:
    """Noisy regression on a fixed map; every batch is different."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(WIDTH, 1, generator=generator)
    batches = []
    for _ in range(count):
        x = torch.randn(size, WIDTH, generator=generator)
        batches.append((x, torch.tanh(x @ truth) + noise * torch.randn(size, 1, generator=generator)))
    return batches


def full_batch(count: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """The very same tensors every time: full-batch training."""
    return make_batches(1, size, noise=0.0) * count


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error of a batch of any of the kinds below."""
    if isinstance(batch, Tensor):
        x, y = batch[:, :WIDTH], batch[:, WIDTH:]
    elif isinstance(batch, Mapping):
        x, y = batch["x"], batch["y"]
    else:
        x, y = batch[0], batch[1]
    return nn.functional.mse_loss(model(x), y)


class Output(OrderedDict[str, Any]):
    """A mapping whose constructor takes keywords only and whose items are attributes too."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


BATCH_KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda x, y: torch.cat([x, y], dim=1),
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "mapping": lambda x, y: {"x": x, "y": y, "name": "a batch", "none": None},
    "output": lambda x, y: Output(x=x, y=y),
}

# ---------------------------------------------------------------- plain training

LossFn = Callable[[nn.Module, Any], Tensor]


def plain_loop(
    model: nn.Module, optimizer: Optimizer, batches: Iterable[Any], scheduler: Scheduler | None = None,
    clip: float = 0.0, loss: LossFn = loss_fn,
) -> list[float]:  # fmt: skip
    """The loop everybody writes: the reference of every bitwise comparison."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        if clip > 0:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(value.item())
    return losses


@dataclass
class Setup:
    """A freshly built model with optimizer and schedule."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler | None = None

    def trainer(self, config: HybridTrainerConfig, **kwargs: Any) -> HybridTrainer:
        return HybridTrainer(
            self.model, self.optimizer, config, kwargs.pop("loss_fn", loss_fn), self.scheduler, **kwargs
        )

    def plain(self, batches: Iterable[Any], **kwargs: Any) -> list[float]:
        return plain_loop(self.model, self.optimizer, batches, self.scheduler, **kwargs)

    def everything(self) -> StateDict:
        return everything(self.model, self.optimizer, self.scheduler)


def setup(model: str = "mlp", optimizer: str = "adam", scheduler: str = "constant", seed: int = 1) -> Setup:
    built = make_model(model_for(optimizer, model), seed)
    optim = make_optimizer(optimizer, built)
    maker = SCHEDULERS[scheduler]
    result = Setup(built, optim, None if maker is None else maker(optim))
    seed_all(11)
    return result


def config(**changes: Any) -> HybridTrainerConfig:
    """Short phases, always willing to try.  Keys are dotted TOML names with ``__`` for the dot."""
    base = HybridTrainerConfig(
        warmup_steps=4, full_steps=2, max_predict_steps=20, correct_steps=3, explore_outcomes=1000, clock="claimed",
        max_lr_multiplier=1.0, min_group_factor=1.0,  # jumps alone
    )  # fmt: skip
    values = {
        "predictor.window": 3,
        "gate.overhead_budget": 1.0,
        "gate.overhead_budget_exact": 1.0,
        "gate.max_backoff": 1,
        "gate.holdout_fraction": 0.0,
        "lookahead.extrapolation": 0.0,
        "lookahead.damping": 0.0,
        "gate.max_chunks": 4,
    }
    flat = {k: v for k, v in changes.items() if "__" not in k}
    values.update({k.replace("__", "."): v for k, v in changes.items() if "__" in k})
    return with_values(replace(base, **flat), values)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


# ---------------------------------------------------------------- exact comparison


def rng() -> StateDict:
    """States of all three global generators."""
    name, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "numpy": [name, keys.tolist(), *rest], "python": random.getstate()}


def everything(model: nn.Module, optimizer: Optimizer, scheduler: Scheduler | None = None) -> StateDict:
    """A deep copy of all a step can change."""
    order = [p for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy(
        {
            "parameters": {n: p.detach() for n, p in model.named_parameters()},
            "held_by_optimizer": [p.detach() for p in order],
            "buffers": dict(model.named_buffers()),
            "modes": {n: m.training for n, m in model.named_modules()},
            "optimizer": {i: dict(optimizer.state[p]) for i, p in enumerate(order) if p in optimizer.state},
            "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
            "scheduler": None
            if scheduler is None
            else {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"},
            "rng": rng(),
        }
    )


def difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two nested values first differ, bit for bit; None if they do not."""
    if type(a) is not type(b):
        return f"{path}: {type(a).__name__} and {type(b).__name__}"
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{path}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        same = torch.equal(
            a.contiguous().view(torch.uint8) if a.dim() else a, b.contiguous().view(torch.uint8) if b.dim() else b
        )
        return None if same or (a.dim() == 0 and repr(a.tolist()) == repr(b.tolist())) else f"{path}: values"
    if isinstance(a, Mapping):
        if list(a) != list(b):
            return f"{path}: keys {list(a)} and {list(b)}"
        return next((d for k in a if (d := difference(a[k], b[k], f"{path}.{k}"))), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return f"{path}: {len(a)} and {len(b)} entries"
        return next(
            (d for i, (p, q) in enumerate(zip(a, b, strict=True)) if (d := difference(p, q, f"{path}[{i}]"))), None
        )
    return None if a == b or (a != a and b != b) else f"{path}: {a!r} and {b!r}"


def assert_same(a: Any, b: Any) -> None:
    found = difference(a, b)
    assert found is None, found


# ---------------------------------------------------------------- fake predictors


class Fake:
    """Proposes ``scale`` times the mean gradient (downhill for a negative one), whatever it observes."""

    name = "fake"

    def __init__(
        self, scale: float = -0.02, *, reduction: float = 100.0, ready: bool = True, horizon: int | None = None
    ) -> None:
        self.spec = BasisSpec(num_displacements=1, gradient=True)
        self.scale, self.reduction, self.is_ready, self.horizon = scale, reduction, ready, horizon
        self.num_groups = 0
        self.observed: list[Window] = []
        self.num_predictions = 0

    @property
    def ready(self) -> bool:
        return self.is_ready and self.num_groups > 0

    def observe(self, window: Window) -> None:
        self.observed.append(window)
        self.num_groups = window.products.num_groups

    def coefficients(self) -> Any:
        c = torch.zeros(self.num_groups, self.spec.num_columns, dtype=torch.float64)
        c[:, -1] = self.scale
        return c

    def predict(self, horizon: int) -> PhasePrediction:
        self.num_predictions += 1
        return PhasePrediction(
            coefficients=self.coefficients(), horizon=self.horizon if self.horizon is not None else horizon,
            predicted_loss=0.1, predicted_reduction=self.reduction,
        )  # fmt: skip

    def memory_bytes(self) -> int:
        return 0

    def state_dict(self) -> StateDict:
        return {"num_groups": self.num_groups}

    def load_state_dict(self, state: StateDict) -> None:
        self.num_groups = state["num_groups"]


class Broken(Fake):
    """A predictor with one thing wrong; ``fault`` names it."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    @property
    def ready(self) -> bool:
        if self.fault == "ready_raises":
            raise RuntimeError("ready went wrong")
        return super().ready

    def observe(self, window: Window) -> None:
        super().observe(window)
        if self.fault == "observe_raises":
            raise RuntimeError("observe went wrong")

    def predict(self, horizon: int) -> PhasePrediction:
        prediction = super().predict(horizon)
        if self.fault == "predict_raises":
            raise RuntimeError("predict went wrong")
        if self.fault == "returns_none":
            return None  # type: ignore[return-value]
        good = prediction.coefficients
        wrong: dict[str, Any] = {
            "nan": good * float("nan"),
            "one_nan": good.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan"), dtype=good.dtype)),
            "inf": good * float("inf"),
            "too_wide": torch.zeros(good.shape[0], good.shape[1] + 1),
            "too_flat": good.flatten(),
            "transposed": good.T if good.shape[0] != good.shape[1] else good[:1],
            "coefficients_none": None,
            "a_list": good.tolist(),
            "a_string": "north",
            "complex": good.to(torch.complex128),
            "huge": good * 1e30,
            "zero": good * 0.0,
        }
        if self.fault == "horizon_zero":
            return replace(prediction, horizon=0)
        if self.fault == "horizon_negative":
            return replace(prediction, horizon=-50)
        return replace(prediction, coefficients=wrong[self.fault])


PREDICTOR_FAULTS = (
    "ready_raises",
    "observe_raises",
    "predict_raises",
    "returns_none",
    "nan",
    "one_nan",
    "inf",
    "too_wide",
    "too_flat",
    "transposed",
    "coefficients_none",
    "a_list",
    "a_string",
    "complex",
    "huge",
    "zero",
    "horizon_zero",
    "horizon_negative",
)


# ---------------------------------------------------------------- driving


def steps_until(trainer: HybridTrainer, batches: Iterable[Any], wanted: Callable[[StepResult], bool]) -> StepResult:
    """Step until a result is as wanted."""
    for batch in batches:
        result = trainer.step(batch)
        if wanted(result):
            return result
    raise AssertionError("it never happened")


def proposals(results: Iterable[StepResult]) -> list[StepResult]:
    return [r for r in results if r.phase is Phase.PREDICT]
