"""Complex parameters are predicted through their real view: a run is that of the same weights written as real ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Fake, config, full_batch, make_batches, seed_all
from hybrid_predict_trainer import HybridTrainer
from hybrid_predict_trainer.predictors import Predictor
from hybrid_predict_trainer.weights.parameters import predicted_parameters
from hybrid_predict_trainer.weights.real_views import RealView, owner


class Spectral(nn.Module):
    """A layer in the Fourier domain, its weight complex or written as pairs of real numbers."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.real = real
        self.into = nn.Linear(4, 6)
        self.out = nn.Linear(6, 1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        weight = torch.randn(4, 6, 2, generator=generator)
        self.weight = nn.Parameter(weight if real else torch.view_as_complex(weight))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight) if self.real else self.weight
        hidden = torch.fft.rfft(torch.tanh(self.into(x)))
        return self.out(torch.fft.irfft(hidden * weight.sum(0)[:4], n=6))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0][:, :4]), batch[1])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-2, foreach=False),
}


def trained(real: bool, optimizer: str, data: list[Any], predictor: Predictor | None = None, **changes: Any) -> Any:
    seed_all(5)
    model = Spectral(real)
    made = OPTIMIZERS[optimizer](model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda t: 1 / (1 + 0.02 * t))
    roles = {"weight": "other"}
    trainer = HybridTrainer(model, made, config(**changes), loss_fn, schedule, predictor=predictor, roles=roles)
    trainer.fit(data)
    return model, trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["hold", "linear", "secant", "quasi_newton", "fake"])
@pytest.mark.parametrize("kind", ["noisy", "exact"])
def test_as_if_it_were_real(kind: str, name: str, optimizer: str) -> None:
    data = make_batches(40) if kind == "noisy" else full_batch(40)
    changes = {"gate__significance": 0.5} | ({} if name == "fake" else {"predictor_type": name})
    runs = [trained(real, optimizer, data, Fake() if name == "fake" else None, **changes) for real in (True, False)]
    (model, trainer), (other, ours) = runs
    for key, value in other.named_parameters():
        wanted = dict(model.named_parameters())[key].detach()
        found = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6), key
    counts = ours.statistics()["num_jumps_accepted"]
    assert counts == trainer.statistics()["num_jumps_accepted"]
    if name == "fake":
        assert counts > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "max_lr_multiplier": 10.0,
            "min_group_factor": 0.1,
            "lookahead__extrapolation": 0.5,
            "lookahead__damping": 0.3,
        },
    ],
)
def test_everything_that_moves_weights_moves_them_alike(settings: dict[str, Any]) -> None:
    runs = [trained(real, "sgd", make_batches(60), **settings)[0] for real in (True, False)]
    assert torch.allclose(torch.view_as_real(runs[1].weight.detach()), runs[0].weight.detach(), rtol=1e-4, atol=1e-6)


def test_the_view_is_the_parameter() -> None:
    model = Spectral(False)
    parameters, groups = predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))
    view = parameters[list(groups.names).index("weight")]
    assert isinstance(view, RealView)
    assert owner(view) is model.weight
    assert owner(model.out.weight) is model.out.weight
    assert view.shape == (4, 6, 2)
    assert sum(groups.sizes) == sum(p.numel() * (1 + p.is_complex()) for p in model.parameters())
    with torch.no_grad():
        view.mul_(2.0)
    assert torch.equal(torch.view_as_real(model.weight.detach()), view.detach())
    assert view.grad is None
    loss_fn(model, make_batches(1)[0]).backward()
    assert torch.equal(view.grad, torch.view_as_real(model.weight.grad))
    model.weight.requires_grad_(False)
    assert view.requires_grad is False
    assert type(view + 1) is type(view.detach()) is type(copy.deepcopy(view)) is Tensor


def test_storages_that_are_replaced_are_followed() -> None:
    model, trainer = trained(False, "sgd", make_batches(3), Fake())
    model.weight.data = model.weight.detach().clone() + 1.0
    with pytest.warns(UserWarning, match="weights were changed between two steps"):
        trainer.fit(make_batches(3))
    view = trainer.run.subject.views[0]
    assert view.data_ptr() == model.weight.data_ptr()
    assert torch.equal(view.detach(), torch.view_as_real(model.weight.detach()))
