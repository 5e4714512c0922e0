"""Weight decay that an optimizer adds to the gradient is a part of what jumps are judged by, where losses are exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer import ConfigError, HybridTrainer, HybridTrainerConfig, attach
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.weights.decay import CoupledDecay, coupled_decay, has_coupled_decay

DECAY, LR = 0.3, 0.05
COUPLED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "momentum": lambda p, **k: torch.optim.SGD(p, momentum=0.9, nesterov=True, **k),
    "Adam": torch.optim.Adam, "NAdam": torch.optim.NAdam, "RAdam": torch.optim.RAdam, "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad, "Adadelta": torch.optim.Adadelta, "Adamax": torch.optim.Adamax,
    "ASGD": torch.optim.ASGD,
}  # fmt: skip
OTHERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW, "Adafactor": torch.optim.Adafactor,
    "Adam, decoupled": lambda p, **k: torch.optim.Adam(p, decoupled_weight_decay=True, **k),
    "NAdam, decoupled": lambda p, **k: torch.optim.NAdam(p, decoupled_weight_decay=True, **k),
    "RAdam, decoupled": lambda p, **k: torch.optim.RAdam(p, decoupled_weight_decay=True, **k),
    "maximize": lambda p, **k: torch.optim.SGD(p, maximize=True, **k),
}  # fmt: skip


def _after(optimizer: Callable[..., Any], decay: float, added: float) -> Tensor:
    """A weight after five steps along its own gradient, to which ``added`` times the weight is added by hand."""
    weight = nn.Parameter(torch.linspace(-1, 2, 6, dtype=torch.float64))
    held = optimizer([weight], lr=LR, weight_decay=decay)
    for _ in range(5):
        weight.grad = torch.sin(weight.detach()) + added * weight.detach()
        held.step()
    return weight.detach()


@pytest.mark.parametrize("name", [*COUPLED, *OTHERS])
def test_which_decay_is_a_gradient_s_is_what_the_optimizer_does(name: str) -> None:
    """By its steps: decay in the groups is the same as a gradient of decay times weight, or it is not."""
    optimizer = (COUPLED | OTHERS)[name]
    held = optimizer([nn.Parameter(torch.ones(2))], lr=LR, weight_decay=DECAY)
    same = torch.allclose(_after(optimizer, DECAY, 0.0), _after(optimizer, 0.0, DECAY), rtol=1e-12, atol=1e-12)
    assert has_coupled_decay(held) == same == (name in COUPLED)
    assert coupled_decay(held, held.param_groups[0]) == (DECAY if same else 0.0)


def test_packages_say_of_their_decay_what_kind_it_is() -> None:
    package = pytest.importorskip("pytorch_optimizer")
    for decoupled in (True, False):
        held = package.AdaBelief([nn.Parameter(torch.ones(2))], lr=LR, weight_decay=DECAY, weight_decouple=decoupled)
        assert has_coupled_decay(held) != decoupled
    assert not has_coupled_decay(package.Lamb([nn.Parameter(torch.ones(2))], lr=LR, weight_decay=DECAY))


def test_what_decay_adds_is_half_of_it_times_the_squares() -> None:
    a, b, c = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.ones(5))
    groups: list[dict[str, Any]] = [{"params": [a], "weight_decay": 0.2}, {"params": [b, c], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=LR)
    decay = CoupledDecay(optimizer, [a, b, c])
    assert float(decay.value().detach()) == pytest.approx(0.5 * 0.2 * 25)
    assert decay.factors() == [0.2, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(decay.value(), [a])
    torch.testing.assert_close(gradient, 0.2 * a.detach())
    optimizer.load_state_dict(optimizer.state_dict())  # makes new groups
    optimizer.param_groups[1]["weight_decay"] = 2.0
    assert float(decay.value().detach()) == pytest.approx(0.5 * 0.2 * 25 + 4 + 5)
    optimizer.param_groups[0]["weight_decay"] = optimizer.param_groups[1]["weight_decay"] = 0.0
    assert not decay.present
    assert float(decay.value()) == 0


# ---- ridge regression: the answer is known ----------------------------------------------------------------

NUM_SAMPLES, NUM_INPUTS = 12, 20


def _ridge(dtype: torch.dtype = torch.float64) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """More weights than samples, so that loss alone goes to zero; and the minimum of loss + 1/2 DECAY |w|^2."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(NUM_SAMPLES, NUM_INPUTS, generator=generator, dtype=dtype)
    y = torch.randn(NUM_SAMPLES, 1, generator=generator, dtype=dtype)
    # gradient of mean square / 2 per sample plus DECAY w
    matrix = x.T @ x / NUM_SAMPLES + DECAY * torch.eye(NUM_INPUTS, dtype=dtype)
    return (x, y), torch.linalg.solve(matrix, x.T @ y / NUM_SAMPLES).T


def _half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return 0.5 * nn.functional.mse_loss(model(x), y)


def _linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(NUM_INPUTS, 1, bias=False).double()


def _objective(model: nn.Linear, batch: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float(_half_square(model, batch) + 0.5 * DECAY * model.weight.square().sum())


FORMS: dict[str, dict[str, Any]] = {
    "auto": {}, "limited": {"predictor.type": "quasi_newton", "predictor.quasi_newton.form": "limited"},
    "wolfe": {"predictor.type": "quasi_newton", "predictor.quasi_newton.form": "wolfe"},
    "dense": {"predictor.type": "quasi_newton", "predictor.quasi_newton.form": "dense"},
    "secant": {"predictor.type": "secant"}, "linear": {"predictor.type": "linear"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "form"),
    [*itertools.product(["SGD", "Adam"], ["auto", "limited", "wolfe", "dense"]), ("SGD", "secant"), ("SGD", "linear")],
)
def test_jumps_lead_to_the_minimum_with_decay(optimizer: str, form: str) -> None:
    """And every one that is made lowers what the optimizer lowers; the loss that is told is the user's own."""
    batch, answer = _ridge()
    model = _linear()
    held = COUPLED[optimizer](model.parameters(), lr=LR, weight_decay=DECAY)
    trainer = HybridTrainer(model, held, with_values(HybridTrainerConfig(), FORMS[form]), loss_fn=_half_square)
    before, num_jumps = _objective(model, batch), 0
    last = before  # where the last real step began: a proposal from there may be judged against it
    for _ in range(300):
        result = trainer.step(batch)
        after = _objective(model, batch)
        if not result.was_predicted:
            last = before
        else:
            num_jumps += 1
            assert after <= max(before, last) * (1 + 1e-9)
            assert result.loss == pytest.approx(float(_half_square(model, batch).detach()), rel=1e-6, abs=1e-9)
        before = after
    assert num_jumps > 0
    own_steps = form not in ("secant", "linear")  # those two need a trajectory, and come close
    torch.testing.assert_close(model.weight.detach(), answer, rtol=0, atol=1e-5 if own_steps else 3e-2)


def test_without_decay_the_same_run_interpolates() -> None:
    batch, answer = _ridge()
    model = _linear()
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=LR), loss_fn=_half_square)
    for _ in range(300):
        trainer.step(batch)
    assert float(_half_square(model, batch).detach()) < 1e-9
    assert float((model.weight.detach() - answer).norm()) > 0.1


def test_a_loop_of_the_user_s_own_has_it_too() -> None:
    batch, answer = _ridge()
    model = _linear()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=DECAY)
    engine = attach(model, optimizer, loss_fn=_half_square)
    for _ in range(300):
        optimizer.zero_grad()
        loss = _half_square(model, batch)
        loss.backward()
        engine.note(loss, batch)
        optimizer.step()
    engine.detach()
    torch.testing.assert_close(model.weight.detach(), answer, rtol=0, atol=1e-4)


def test_what_is_frozen_or_without_decay_is_counted_by_its_own_group() -> None:
    """The bias is drawn to nothing by nobody."""
    (x, y), _ = _ridge()
    y = y + 5.0
    torch.manual_seed(0)
    model = nn.Linear(NUM_INPUTS, 1).double()
    groups: list[dict[str, Any]] = [{"params": [model.weight], "weight_decay": 10.0}, {"params": [model.bias]}]
    trainer = HybridTrainer(model, torch.optim.Adam(groups, lr=LR), loss_fn=_half_square)
    for _ in range(300):
        trainer.step((x, y))
    centred = x - x.mean(0)
    matrix = centred.T @ centred / NUM_SAMPLES + 10.0 * torch.eye(NUM_INPUTS, dtype=torch.float64)
    weight = torch.linalg.solve(matrix, centred.T @ (y - y.mean()) / NUM_SAMPLES).T
    torch.testing.assert_close(model.weight.detach(), weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.bias.detach(), (y.mean() - x.mean(0) @ weight.T).flatten(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("jumps", [True, False])
def test_the_run_s_own_loss_is_in_the_curve_and_the_judged_one_in_the_history(jumps: bool) -> None:
    batch, _ = _ridge()
    model = _linear()
    held = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    settings = {} if jumps else {"max_predict_steps": 0}
    trainer = HybridTrainer(model, held, HybridTrainerConfig(**settings), loss_fn=_half_square)
    told = []
    for _ in range(20):
        before, raw = _objective(model, batch), float(_half_square(model, batch).detach())
        result = trainer.step(batch)
        if not result.was_predicted:
            told.append((raw, before))
            assert result.loss == pytest.approx(raw)
    penalized = trainer.run.penalized
    assert penalized == jumps
    assert trainer.run.losses.curve.points()[-1][1] == pytest.approx(told[-1][0])
    newest = trainer.run.losses.newest(1)[0]
    assert newest == pytest.approx(told[-1][1] if penalized else told[-1][0])


def test_a_jump_on_trial_is_judged_by_what_is_minimized_too() -> None:
    batch, _ = _ridge()
    model = _linear()
    held = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    config = HybridTrainerConfig(predictor_type="secant", correct_steps=4)
    trainer, num_seen = HybridTrainer(model, held, config, loss_fn=_half_square), 0
    for _ in range(120):
        before = _objective(model, batch)
        trainer.step(batch)
        trial = trainer.run.judge.probation
        if trial is not None and trial.unread:
            assert float(trial.unread[-1]) == pytest.approx(before)
            assert float(trial.under_way) == pytest.approx(before)
            num_seen += 1
    assert num_seen > 0


def test_decoupled_decay_changes_nothing_that_is_judged() -> None:
    batch, _ = _ridge()
    model = _linear()
    trainer = HybridTrainer(
        model, torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY), loss_fn=_half_square
    )
    for _ in range(30):
        trainer.step(batch)
    assert trainer.run.full_batch
    assert not trainer.run.penalized
    assert trainer.run.added_by_decay == 0


def test_matrices_that_another_step_moves_have_no_decay_to_be_judged_by() -> None:
    """Adam's decay is in the gradient, which Muon in its place makes orthogonal."""
    batch, _ = _ridge()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(NUM_INPUTS, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    held = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=DECAY)
    trainer = HybridTrainer(model, held, HybridTrainerConfig(step="muon"), loss_fn=_half_square)
    for _ in range(5):
        trainer.step(batch)
    assert trainer.run.full_batch
    assert (trainer.run.decay.present, trainer.run.penalized) == (True, False)


def test_noisy_losses_are_judged_as_they_are() -> None:
    (x, y), _ = _ridge()
    model = _linear()
    trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY), loss_fn=_half_square)
    for i in range(30):
        trainer.step((x[i % 6 :: 2], y[i % 6 :: 2]))
    assert not trainer.run.penalized


def _errors(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]) / math.sqrt(2)


def test_closed_form_which_knows_nothing_of_decay_is_left_out(notices: list[str]) -> None:
    batch, answer = _ridge()
    model = _linear()
    held = torch.optim.Adam(model.parameters(), lr=LR, weight_decay=DECAY)
    trainer = HybridTrainer(model, held, loss_fn=_half_square, residual_fn=_errors)
    assert len(notices) == 1
    assert "residuals are not solved for" in notices.pop()
    trainer.step(batch)
    trainer.step(batch)
    assert trainer.run.full_batch
    assert trainer.run.proposer.predictor.name == "quasi_newton"
    for _ in range(300):
        trainer.step(batch)
    torch.testing.assert_close(model.weight.detach(), answer, rtol=0, atol=1e-4)


def test_closed_form_that_is_asked_for_is_refused() -> None:
    model = _linear()
    held = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    with pytest.raises(ConfigError, match="closed form would leave out"):
        HybridTrainer(
            model, held, HybridTrainerConfig(predictor_type="gauss_newton"), loss_fn=_half_square, residual_fn=_errors
        )
