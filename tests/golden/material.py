"""Models, optimizers, schedules, data and predictors of the golden runs; nothing here imports the package."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

WIDTH = 6

# ---------------------------------------------------------------- models


def mlp(*middle: nn.Module, hidden: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, hidden), *middle, nn.Tanh(), nn.Linear(hidden, 1))


def norm_dropout() -> nn.Module:
    return mlp(nn.BatchNorm1d(8), nn.Dropout(0.3))


def norm() -> nn.Module:
    return mlp(nn.BatchNorm1d(8))


def frozen() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def half() -> nn.Module:
    return mlp().to(torch.bfloat16)


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


class Spectral(nn.Module):
    """A layer in the Fourier domain, with a complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.weight = nn.Parameter(torch.view_as_complex(0.5 * torch.randn(WIDTH // 2 + 1, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.fft.irfft(torch.fft.rfft(torch.tanh(self.into(x))) * self.weight, n=WIDTH))


class Block(nn.Module):
    """Attention over three places, then an MLP, both residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        scores = self.q_proj(h) @ self.k_proj(h).transpose(1, 2) / x.shape[-1] ** 0.5
        x = x + self.o_proj(scores.softmax(-1) @ self.v_proj(h))
        return x + self.down_proj(torch.tanh(self.up_proj(self.norm2(x))))


class Blocks(nn.Module):
    """A transformer in small: embedding of pairs of numbers, two blocks, norm, head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x.view(-1, WIDTH // 2, 2)))).mean(1))


# ---------------------------------------------------------------- optimizers and schedules

Maker = Callable[[nn.Module], Optimizer]


def _made(kind: type[Optimizer], **settings: Any) -> Maker:
    return lambda model: kind((p for p in model.parameters() if p.requires_grad), **settings)


adam = _made(torch.optim.Adam, lr=0.01)
adamw = _made(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
slow_adamw = _made(torch.optim.AdamW, lr=3e-4)
fast_adamw = _made(torch.optim.AdamW, lr=0.03)
momentum = _made(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
plain_sgd = _made(torch.optim.SGD, lr=0.05)
rmsprop = _made(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True)


def decay(optimizer: Optimizer, rate: float = 0.02) -> LambdaLR:
    return LambdaLR(optimizer, lambda t: 1 / (1 + rate * t))


def one_cycle(optimizer: Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=0.02, total_steps=200)


def stable_decay(optimizer: Optimizer, steps: int = 200) -> LambdaLR:
    return LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 10, max(0.0, steps - t) / (steps / 4)))


# ---------------------------------------------------------------- data and losses

Batch = tuple[Tensor, Tensor]


def noisy(count: int = 80, size: int = 32, noise: float = 0.3, seed: int = 7) -> list[Batch]:
    """Regression on a fixed map, every batch a new one."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(WIDTH, 1, generator=generator)
    found = []
    for _ in range(count):
        x = torch.randn(size, WIDTH, generator=generator)
        found.append((x, torch.tanh(x @ truth) + noise * torch.randn(size, 1, generator=generator)))
    return found


def full_batch(count: int = 60, size: int = 32) -> list[Batch]:
    """The very same tensors every time."""
    return noisy(1, size, 0.0) * count


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def half_mean_square(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0].to(torch.bfloat16)).float(), batch[1])


def accumulated(model: nn.Module, batch: Any) -> Tensor:
    """Four micro-batches whose losses are added up."""
    parts = zip(batch[0].chunk(4), batch[1].chunk(4), strict=True)
    return torch.stack([mean_square(model, part) for part in parts]).mean()


# ---------------------------------------------------------------- a predictor of one's own


def downhill(hpt: ModuleType, scale: float = -0.05, fault: str = "") -> Any:
    """A predictor that proposes ``scale`` times the mean gradient; ``fault`` says what goes wrong, and from when on."""

    class Downhill:
        name = "downhill"

        def __init__(self) -> None:
            self.spec = hpt.BasisSpec(num_displacements=1, gradient=True)
            self.num_groups = self.num_calls = 0

        @property
        def ready(self) -> bool:
            return self.num_groups > 0

        def observe(self, window: Any) -> None:
            self.num_groups = window.products.num_groups

        def predict(self, horizon: int) -> Any:
            self.num_calls += 1
            wrong = 5 <= self.num_calls < 10
            if fault == "raises" and wrong:
                raise RuntimeError("predict went wrong")
            c = torch.zeros(self.num_groups, self.spec.num_columns, dtype=torch.float64)
            c[:, -1] = float("nan") if fault == "nan" and wrong else scale
            return hpt.PhasePrediction(coefficients=c, horizon=horizon, predicted_loss=0.1, predicted_reduction=100.0)

        def memory_bytes(self) -> int:
            return 0

        def state_dict(self) -> dict[str, Any]:
            return {"num_groups": self.num_groups, "num_calls": self.num_calls}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.num_groups, self.num_calls = state["num_groups"], state["num_calls"]

    return Downhill()
