"""What faults are put to: a small regression, its plain loop, and a predictor that can have any fault."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...keep import resume
from ...keep.state_tree import encode
from ...records import BasisSpec, PhasePrediction, StateDict, Window
from ...trainer import HybridTrainer

WIDTH = 6

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Any], Tensor]
#: Something that somebody does to a run before its n-th step.
Act = Callable[["Subject", int], None]


class WentWrong(Exception):  # noqa: N818 (an outcome of a try, not an error of the product)
    """A try was not survived; the message says why."""


@dataclass(slots=True)
class Subject:
    """A model with its optimizer and its schedule; the same seed makes the same one."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Any

    @classmethod
    def of(cls, seed: int, kind: str = "adam") -> Subject:
        """A network of two layers, batch statistics and dropout between them."""
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
        makers: dict[str, Callable[[], Optimizer]] = {
            "adam": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
            "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        }
        optimizer = makers[kind]()
        subject = cls(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + 0.02 * t)))
        torch.manual_seed(seed + 1)
        return subject

    def trainer(self, config: HybridTrainerConfig, predictor: Any = None, loss: Loss | None = None) -> HybridTrainer:
        """A trainer around it."""
        return HybridTrainer(self.model, self.optimizer, config, loss or loss_of, self.scheduler, predictor=predictor)

    def bits(self) -> str:
        """Fingerprint of weights, buffers, moments, rates and the random state."""
        held = {
            "model": dict(self.model.state_dict()),
            "optimizer": [dict(self.optimizer.state[p]) for g in self.optimizer.param_groups for p in g["params"]],
            "rates": [float(g["lr"]) for g in self.optimizer.param_groups],
            "random": torch.get_rng_state(),
        }
        return fingerprint(held)


def fingerprint(state: object) -> str:
    """SHA-256 of a nested state, to the last bit; whether two places hold one tensor or equal ones makes no odds."""
    tree, tensors = encode(state)
    bits = {name: _bits_of(tensor) for name, tensor in tensors.items()}

    def by_content(item: Any) -> Any:
        if isinstance(item, dict):
            return {k: bits[v] if k == "$tensor" and v in bits else by_content(v) for k, v in item.items()}
        return [by_content(v) for v in item] if isinstance(item, list) else item

    return hashlib.sha256(json.dumps(by_content(tree), sort_keys=True).encode()).hexdigest()


def _bits_of(tensor: Tensor) -> str:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def bits_of(trainer: HybridTrainer) -> str:
    """Fingerprint of all that a checkpoint of this moment would hold."""
    return fingerprint(resume.parts(trainer.run, trainer.metrics))


def batches(seed: int, count: int, size: int = 16, noise: float = 0.3) -> list[Batch]:
    """Regression on a fixed map; every batch is another one."""
    generator = torch.Generator().manual_seed(1000 + seed)
    truth = torch.randn(WIDTH, 1, generator=generator)
    made = []
    for _ in range(count):
        x = torch.randn(size, WIDTH, generator=generator)
        made.append((x, torch.tanh(x @ truth) + noise * torch.randn(size, 1, generator=generator)))
    return made


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error."""
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def settings(**changes: Any) -> HybridTrainerConfig:
    """Short phases, always willing to try, jumps alone; keys of TOML with ``__`` for the dot."""
    base = HybridTrainerConfig(
        warmup_steps=4, full_steps=2, max_predict_steps=20, correct_steps=3, explore_outcomes=1000, clock="claimed",
        max_lr_multiplier=1.0, min_group_factor=1.0,
    )  # fmt: skip
    values: dict[str, Any] = {
        "predictor.window": 3, "gate.overhead_budget": 1.0, "gate.overhead_budget_exact": 1.0, "gate.max_backoff": 1,
        "gate.holdout_fraction": 0.0, "lookahead.extrapolation": 0.0, "lookahead.damping": 0.0, "gate.max_chunks": 4,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in changes.items() if "__" in key}
    return with_values(replace(base, **{k: v for k, v in changes.items() if "__" not in k}), values)


def is_finite(subject: Subject, loss: Tensor) -> bool:
    """Whether a step of the plain loop may be taken."""
    gradients = [p.grad for p in subject.model.parameters() if p.grad is not None]
    return bool(torch.isfinite(loss).all()) and all(bool(torch.isfinite(g).all()) for g in gradients)


def plain(subject: Subject, data: Iterable[Any], loss: Loss = loss_of, act: Act | None = None) -> None:
    """The loop that everybody writes; a step that is not finite is left out, and its buffers are put back."""
    for number, batch in enumerate(data):
        if act is not None:
            act(subject, number)
        buffers = {name: b.clone() for name, b in subject.model.named_buffers()}
        subject.optimizer.zero_grad()
        value = loss(subject.model, batch)
        value.backward()
        if is_finite(subject, value.detach()):
            subject.optimizer.step()
        else:
            with torch.no_grad():
                for name, buffer in subject.model.named_buffers():
                    buffer.copy_(buffers[name])
        subject.scheduler.step()


def ours(trainer: HybridTrainer, subject: Subject, data: Sequence[Any], act: Act | None = None) -> None:
    """The same by the trainer: a batch that a refused proposal was judged on is used for a real step after it."""
    for number, batch in enumerate(data):
        if act is not None:
            act(subject, number)
        for _ in range(100):
            if trainer.step(batch).consumed:
                break
        else:
            raise WentWrong(f"batch {number} was refused a hundred times")


#: Faults of a predictor; what they are is told by :meth:`Faulty.predict`.
PREDICTOR_FAULTS = (
    "uphill", "nan", "inf", "huge", "wrong shape", "none", "raises", "raises in ready", "raises in observe",
    "out of memory", "horizon -5",
)  # fmt: skip


class Faulty:
    """Proposes a step uphill along the mean gradient, and has one thing wrong with it besides."""

    def __init__(self, fault: str = "uphill", seed: int = 0) -> None:
        """Args: fault: one of :data:`PREDICTOR_FAULTS`.  seed: which of its calls have it; about half do."""
        self.name, self.fault = "faulty", fault
        self.spec = BasisSpec(num_displacements=1, gradient=True)
        self.num_groups = 0
        self._dice = random.Random(seed)

    @property
    def ready(self) -> bool:
        """After the first window."""
        self._raise("raises in ready")
        return self.num_groups > 0

    def observe(self, window: Window) -> None:
        """Remember how many groups there are."""
        self.num_groups = window.products.num_groups
        self._raise("raises in observe")

    def predict(self, horizon: int) -> PhasePrediction:
        """Uphill, or worse."""
        if self.fault == "out of memory" and self._now():
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        self._raise("raises")
        if self.fault == "none" and self._now():
            return None  # type: ignore[return-value]
        given = torch.zeros(self.num_groups, self.spec.num_columns, dtype=torch.float64)
        given[:, -1] = 1.0
        if self._now():
            given = {
                "nan": given * math.nan, "inf": given * math.inf, "huge": given * 1e30, "wrong shape": given[:, :-1],
            }.get(self.fault, given)  # fmt: skip
        return PhasePrediction(
            coefficients=given, horizon=-5 if self.fault == "horizon -5" and self._now() else horizon,
            predicted_loss=0.0, predicted_reduction=100.0, confidence=1.0,
        )  # fmt: skip

    def memory_bytes(self) -> int:
        """None to speak of."""
        return 0

    def state_dict(self) -> StateDict:
        """The number of groups."""
        return {"num_groups": self.num_groups}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.num_groups = state["num_groups"]

    def _now(self) -> bool:
        return self._dice.random() < 0.5

    def _raise(self, fault: str) -> None:
        if self.fault == fault and self._now():
            raise RuntimeError(f"a predictor that {fault}")
