"""The recurrent state-space model: every part is trained, every part is needed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from dynamics import (
    assert_degenerate_windows_are_harmless,
    assert_global_random_state_untouched,
    assert_resumes_bitwise,
    errors,
    mean,
    relative_error,
    run,
    turning,
)
from hybrid_predict_trainer import HybridTrainerConfig
from hybrid_predict_trainer.config.settings import RssmConfig
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.predictors import build
from hybrid_predict_trainer.predictors._frame import MAX_AHEAD
from hybrid_predict_trainer.predictors.rssm import Rssm
from hybrid_predict_trainer.predictors.rssm_model import Latent, RssmModel
from hybrid_predict_trainer.records import ConfigError

SMALL = {
    "deterministic_dim": 64, "stochastic_dim": 8, "num_categoricals": 8, "hidden_dim": 64, "ensemble_size": 2,
    "batch_size": 8, "learning_rate": 3e-3,
}  # fmt: skip
TINY = SMALL | {"deterministic_dim": 16, "hidden_dim": 16, "batch_size": 2, "sequence_length": 4}
NUM_TRAINING, NUM_HELD_OUT = 170, 40


def tiny() -> Rssm:
    return Rssm(RssmConfig(**TINY), 2)


@cache
def trained() -> tuple[Rssm, dict[str, torch.Tensor], list[float], list[float]]:
    """A predictor that has seen a long stream, its weights before, its prequential errors and loss misses."""
    torch.set_num_threads(1)
    predictor = Rssm(RssmConfig(**SMALL), 2)
    before = {
        f"{i}.{name}": p.detach().clone()
        for i, member in enumerate(predictor.members)
        for name, p in member.model.named_parameters()
    }
    return predictor, before, *run(predictor, NUM_TRAINING)


def held_out(predictor: Rssm, *, windows_ahead: int = 1) -> float:
    """Mean error on windows of another seed, without training on them."""
    predictor = copy.deepcopy(predictor)
    for member in predictor.members:
        member.update = lambda: 0.0  # type: ignore[method-assign]
    found = []
    for i, step in enumerate(turning(predictor.spec, NUM_HELD_OUT, seed=5)):
        predictor.observe(step.window)
        if i >= 12:  # the state has forgotten the other stream
            found.append(relative_error(step, predictor.predict(10 * windows_ahead)))
    return mean(found)


def broken(change: Callable[[RssmModel], None]) -> Rssm:
    predictor = copy.deepcopy(trained()[0])
    for member in predictor.members:
        change(member.model)
    return predictor


# ---------------------------------------------------------------- the pre-validation checklist


def test_every_weight_matrix_has_changed() -> None:
    predictor, before, *_ = trained()
    for i, member in enumerate(predictor.members):
        for name, p in member.model.named_parameters():
            assert not torch.equal(before[f"{i}.{name}"], p), f"member {i}: {name} was never trained"


def test_held_out_error_has_fallen() -> None:
    untrained = Rssm(RssmConfig(**SMALL, updates_per_window=0), 2)
    errors(untrained, 60)
    assert held_out(untrained) > 0.9
    assert held_out(trained()[0]) < 0.5
    errors_so_far = trained()[2]
    assert mean(errors_so_far[-30:]) < 0.6 * mean(errors_so_far[20:60])


def test_the_recurrent_state_is_needed() -> None:
    class Detached(nn.Module):
        def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(h)

    def cut(model: RssmModel) -> None:
        model.gru = Detached()  # type: ignore[assignment]

    assert held_out(broken(cut)) > 0.7


def test_the_coefficient_head_is_needed() -> None:
    def cut(model: RssmModel) -> None:
        for p in model.coefficients.parameters():
            nn.init.zeros_(p)

    assert held_out(broken(cut)) > 0.9


def test_the_stochastic_path_is_needed() -> None:
    def cut(model: RssmModel) -> None:
        model.sample = lambda p: torch.zeros(p.shape[0], p[0].numel())  # type: ignore[method-assign]

    assert held_out(broken(cut)) > 0.7


def test_rollouts_are_sampled() -> None:
    predictor = copy.deepcopy(trained()[0])
    first, second = (member.imagine(64).corrections for member in predictor.members)
    assert not torch.equal(first[0], first[1])
    assert float(first.mean(dim=0).sub(second.mean(dim=0)).norm()) > 0


def test_a_window_is_rolled_out_once() -> None:
    """What was considered is what is proposed: asking again, or for another horizon, draws nothing new."""
    predictor = copy.deepcopy(trained()[0])
    before = [member.generator.get_state() for member in predictor.members]
    first, _, second = predictor.predict(40), predictor.predict(10), predictor.predict(40)
    assert torch.equal(first.coefficients, second.coefficients)
    assert all(torch.equal(m.generator.get_state(), s) for m, s in zip(predictor.members, before, strict=True))
    assert first.epistemic > 0
    assert first.aleatoric > 0


def test_several_windows_are_predicted_in_one_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = copy.deepcopy(trained()[0])
    steps = []
    advance = RssmModel.advance
    monkeypatch.setattr(RssmModel, "advance", lambda *args: steps.append(1) or advance(*args))
    for member in predictor.members:
        member.imagine(2)
    assert len(steps) == MAX_AHEAD * len(predictor.members)
    prediction = predictor.predict(40)
    assert [step for step, _ in prediction.loss_trajectory] == [10, 20, 30, 40]
    assert len({round(loss, 9) for _, loss in prediction.loss_trajectory}) == 4
    # two windows ahead is told too: worse than one, better than nothing
    assert held_out(trained()[0]) < held_out(trained()[0], windows_ahead=2)


def test_learns_the_loss() -> None:
    misses = trained()[3]
    assert mean(misses[20:60]) > 0.03, "the log loss changes by -0.05 or 0.03"
    assert mean(misses[-20:]) < 0.7 * mean(misses[20:60])


# ---------------------------------------------------------------- the ensemble


def test_members_are_separate() -> None:
    predictor = trained()[0]
    first, second = predictor.members
    assert {p.data_ptr() for p in first.model.parameters()}.isdisjoint(p.data_ptr() for p in second.model.parameters())
    assert first.optimizer is not second.optimizer
    assert first.generator is not second.generator
    assert not torch.equal(first.mask, second.mask)
    weights = [torch.cat([p.detach().flatten() for p in m.model.parameters()]) for m in (first, second)]
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) > 0.1


def test_training_one_member_leaves_the_others_alone() -> None:
    predictor = tiny()
    errors(predictor, 12)
    first, second = predictor.members
    before = [p.detach().clone() for p in second.model.parameters()]
    first.update()
    assert all(torch.equal(a, b) for a, b in zip(before, second.model.parameters(), strict=True))


# ---------------------------------------------------------------- details of the model


def test_probabilities_have_their_uniform_share() -> None:
    model = tiny().members[0].model
    logits = torch.zeros(3, 64)
    logits[:, ::8] = 100.0
    p = model.probabilities(logits)
    assert float(p.min()) == pytest.approx(0.01 / 8, rel=1e-4)
    torch.testing.assert_close(p.sum(dim=2), torch.ones(3, 8))


def test_samples_are_one_hot_and_let_gradients_through() -> None:
    model = tiny().members[0].model
    logits = torch.randn(5, 64, requires_grad=True)
    z = model.sample(model.probabilities(logits)).view(5, 8, 8)
    torch.testing.assert_close(z.sum(dim=2), torch.ones(5, 8))
    torch.testing.assert_close(z.max(dim=2).values, torch.ones(5, 8))
    (z * torch.randn(5, 8, 8)).sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) > 0


def test_sampling_frequencies() -> None:
    model = tiny().members[0].model
    logits = torch.randn(1, 64).expand(4000, -1)
    p = model.probabilities(logits)
    frequency = model.sample(p).view(4000, 8, 8).mean(dim=0)
    torch.testing.assert_close(frequency, p[0], atol=0.04, rtol=0)


def test_free_bits_and_balancing() -> None:
    model = tiny().members[0].model
    same = torch.log_softmax(torch.randn(4, 8, 8), dim=2)
    assert float(model._divergence(same, same)) == pytest.approx(1.1)  # one free nat in each half
    q, p = (torch.log_softmax(5 * torch.randn(4, 8, 8), dim=2).requires_grad_() for _ in range(2))
    value = model._divergence(q, p)
    exact = float((q.exp() * (q - p)).sum(dim=(1, 2)).mean().detach())
    assert float(value.detach()) == pytest.approx(1.1 * exact, rel=1e-5)
    (grad_p,) = torch.autograd.grad(value, [p], retain_graph=True)
    (full,) = torch.autograd.grad((q.detach().exp() * (q.detach() - p)).sum(dim=(1, 2)).mean(), [p])
    torch.testing.assert_close(grad_p, 1.0 * full)


def test_unrolling_carries_gradients_through_time() -> None:
    model = tiny().members[0].model
    state, encoding = model.initial(1), torch.randn(1, 6, model.embed[0][0].in_features, requires_grad=True)
    embedded = model.embed(encoding)
    for t in range(6):
        state, _ = model.observe(state, torch.zeros(1, 2), embedded[:, t])
    assert isinstance(state, Latent)
    state.h.sum().backward()
    assert encoding.grad is not None
    assert float(encoding.grad[:, 0].abs().sum()) > 0


# ---------------------------------------------------------------- behaviour


def test_resumes_bitwise() -> None:
    assert_resumes_bitwise(tiny)


def test_global_random_state_is_untouched() -> None:
    assert_global_random_state_untouched(tiny)


def test_degenerate_windows() -> None:
    assert_degenerate_windows_are_harmless(tiny)


def test_memory_budget() -> None:
    default = build(HybridTrainerConfig(predictor_type="rssm"), 11)
    assert 30 * 2**20 < default.memory_bytes() < 50 * 2**20
    config = with_values(HybridTrainerConfig(), {"predictor.type": "rssm", "predictor.memory_budget_mb": 20.0})
    with pytest.raises(ConfigError, match=r"rssm needs [\d.]+ MB"):
        build(config, 11)


def test_memory_is_what_is_held() -> None:
    predictor = tiny()
    errors(predictor, 8)
    held = 0
    for member in predictor.members:
        held += sum(p.numel() * 4 for p in member.model.parameters())
        held += sum(v.numel() * 4 for s in member.optimizer.state.values() for v in s.values() if v.dim())
    held += sum(p.numel() * 4 for p in predictor.members[0].model.parameters())
    rows = predictor.experience
    held += sum(getattr(rows, name).numel() * 4 for name in rows._ROWS)
    assert held <= predictor.memory_bytes() <= 1.1 * held
