"""Full-batch training on noisy numbers: no jump learns the noise, which shows where samples are left out."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, attach
from hybrid_predict_trainer.config.presets import PRESETS
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.cycle import noise_check
from hybrid_predict_trainer.cycle.handover import MicroBatches
from hybrid_predict_trainer.cycle.inputs import why_ended
from hybrid_predict_trainer.cycle.withdrawal import end_by_noise
from hybrid_predict_trainer.judge.noise import (
    DECISIVE,
    FURTHER,
    HARM,
    LEARNT,
    MARGIN,
    MATTERS,
    MOST_FALL,
    MOST_JUMPS,
    NEAR,
    NOISE,
    NoiseCheck,
    residuals_of,
)  # fmt: skip
from hybrid_predict_trainer.numerics.leave_one_out import left_out_error

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

# ---- leaving one out -------------------------------------------------------------------------------------------


def _kernel(num_samples: int, num_features: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(num_samples, num_features, dtype=torch.float64, generator=generator)
    return A @ A.T, torch.randn(num_samples, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("num_features", [3, 40])
def test_it_is_what_refitting_without_each_one_gives(num_features: int, damping: float) -> None:
    K, rho = _kernel(12, num_features)
    strength = damping * float(K.diagonal().sum())
    squares = 0.0
    for i in range(12):
        others = torch.arange(12) != i
        fitted = torch.linalg.solve(K[others][:, others] + strength * torch.eye(11, dtype=K.dtype), rho[others])
        squares += float(rho[i] - K[i, others] @ fitted) ** 2
    assert left_out_error(K, rho, damping) == pytest.approx(squares / float(rho.square().sum()), rel=1e-7)


def test_residuals_without_relation_tell_nothing_of_one_another() -> None:
    assert left_out_error(torch.eye(7, dtype=torch.float64), _kernel(7, 2)[1], 0.3) == pytest.approx(1.0)


def test_residuals_that_are_alike_tell_all_of_one_another() -> None:
    ones = torch.ones(9, dtype=torch.float64)
    assert left_out_error(torch.outer(ones, ones), ones, 1e-9) < 1e-12


@pytest.mark.parametrize("K", [-torch.eye(3, dtype=torch.float64), torch.full((3, 3), math.nan, dtype=torch.float64)])
def test_what_is_no_kernel_is_said(K: Tensor) -> None:
    with pytest.raises(ArithmeticError):
        left_out_error(K, torch.ones(3, dtype=torch.float64), 1e-3)


# ---- residuals of a loss ---------------------------------------------------------------------------------------

WEIGHT = nn.Parameter(torch.tensor([[0.3], [-0.2]]))
X = torch.tensor([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0]])
Y = torch.tensor([0.1, -0.4, 0.7])

OF_DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "squares": lambda o: functional.mse_loss(o, Y),
    "sum": lambda o: functional.mse_loss(o, Y, reduction="sum"),
    "by hand": lambda o: ((o - Y) ** 2).mean(),
    "the other way round": lambda o: (Y - o).square().mean(),
    "times itself": lambda o: (lambda r: (r * r).mean())(o - Y),
    "half": lambda o: 0.5 * (o - Y).pow(2).sum() / len(o),
    "scaled": lambda o: ((o - Y) / 3).square().mean(),
    "absolute": lambda o: (o - Y).abs().mean(),
    "l1": lambda o: functional.l1_loss(o, Y),
    "huber": lambda o: functional.huber_loss(o, Y),
    "smooth l1": lambda o: functional.smooth_l1_loss(o, Y),
    "root": lambda o: functional.mse_loss(o, Y).sqrt(),
    "norm": lambda o: torch.linalg.vector_norm(o - Y),
    "with a penalty": lambda o: functional.mse_loss(o, Y) + 1e-3 * WEIGHT.square().sum(),
    "reshaped": lambda o: functional.mse_loss(o[:, None], Y[:, None]),
    "in double": lambda o: functional.mse_loss(o.double(), Y.double()).float(),
}  # fmt: skip
OF_ELSE: dict[str, Callable[[Tensor], Tensor]] = {
    "weighted": lambda o: (torch.tensor([1.0, 2.0, 0.5]) * (o - Y) ** 2).mean(),
    "masked": lambda o: (torch.tensor([1.0, 1.0, 0.0]) * (o - Y) ** 2).sum() / 2,
    "distances, masked": lambda o: (torch.tensor([1.0, 1.0, 0.0]) * (o - Y).abs()).sum() / 2,
    "huber, masked": lambda o: (torch.tensor([1.0, 1.0, 0.0]) * functional.huber_loss(o, Y, reduction="none")).sum(),
    "two terms": lambda o: (o - Y).square().mean() + o[:1].square().mean(),
    "of outputs alone": lambda o: o.square().mean(),
    "of two networks": lambda o: functional.mse_loss(o, (X @ WEIGHT)[:, 0].tanh()),
    "cubes": lambda o: (o - Y).abs().pow(3).mean(),
    "a variance that is learned": lambda o: ((o - Y) / WEIGHT.exp().sum()).square().mean(),
    "labels": lambda o: functional.binary_cross_entropy_with_logits(o, (Y > 0).float()),
    "counts": lambda o: functional.poisson_nll_loss(o, Y.abs()),
    "mean": lambda o: o.mean(),
}


@pytest.mark.parametrize("name", OF_DATA)
def test_differences_of_outputs_and_data_are_read_off_a_loss(name: str) -> None:
    outputs = (X @ WEIGHT)[:, 0]
    found = residuals_of(OF_DATA[name](outputs))
    assert found is not None
    assert found.requires_grad
    expected = (outputs - Y).detach() / (3 if name == "scaled" else 1)
    torch.testing.assert_close(found.detach().abs().flatten().float(), expected.abs())


@pytest.mark.parametrize("name", OF_ELSE)
def test_what_is_no_difference_from_data_is_left_alone(name: str) -> None:
    assert residuals_of(OF_ELSE[name]((X @ WEIGHT)[:, 0])) is None


# ---- bookkeeping -----------------------------------------------------------------------------------------------


def _told(*answers: tuple[float, float, float]) -> tuple[NoiseCheck, list[bool]]:
    check, through = NoiseCheck(), []
    for number, answer in enumerate(answers):  # a jump before each
        check.see(answer[0], number)
        through.append(check.take(*answer))
    return check, through


def _due_at(check: NoiseCheck, loss: float, num_jumps: int = 0) -> bool:
    check.see(loss, num_jumps)
    return check.due


def test_questions_come_closer_the_less_samples_tell_of_one_another() -> None:
    """One costs as much as some steps: where all is told there are two or three of them."""
    check = NoiseCheck()
    assert _due_at(check, 2.0)
    for untold, fall in ((0.01, MARGIN * 0.01), (0.5, MOST_FALL), (0.8, MOST_FALL)):
        check.see(2.0, 0)
        check.take(2.0, untold, untold)
        assert not _due_at(check, 2.0 * fall * 1.01)
        assert _due_at(check, 2.0 * fall * 0.99)


def test_many_jumps_that_gain_little_are_asked_about() -> None:
    """They may learn the noise while the loss hardly falls: a network that was wide enough did so in 90 jumps."""
    check = NoiseCheck()
    check.see(1.0, 5)
    check.take(1.0, 0.5, 0.5)
    assert not _due_at(check, 0.99, 5 + MOST_JUMPS - 1)
    assert _due_at(check, 0.99, 5 + MOST_JUMPS)


def test_two_answers_in_a_row_find_noise_and_one_that_leaves_no_doubt() -> None:
    harm = HARM + 0.1
    check, _ = _told((1.0, 0.3, 0.3), (0.3, 1.0, harm))
    assert not check.found
    assert _due_at(check, 0.3 * NEAR)
    assert not check.take(0.27, 1.0, harm / NEAR)
    assert check.found
    assert not check.due
    assert _told((1.0, 0.3, 0.3), (0.3, 1.0, DECISIVE))[0].found
    assert not _told((1.0, 0.3, 0.3), (0.3, 1.0, harm), (0.27, NOISE - 0.01, 0.5), (0.2, 1.0, harm))[0].found


def test_where_nothing_was_ever_told_there_has_to_be_no_doubt() -> None:
    """Sixty-four samples of eight inputs tell nothing of one another without any noise: what is wanted is their fit."""
    harm, most = HARM + 0.1, DECISIVE / LEARNT
    assert not _told((1.0, 1.0, harm), (0.5, 1.0, 2 * harm), (0.45, 1.0, 2 * harm))[0].found
    assert _told((1.0, 1.0, harm), (LEARNT, 1.0, most))[0].found
    assert not _told((1.0, 1.0, most), (LEARNT + 0.01, 1.0, most))[0].found  # nor has anything been learnt


def test_what_samples_do_not_tell_but_does_no_harm_is_learnt() -> None:
    """Details too fine for the samples: what is left of one that is left out stays what it was as the loss falls."""
    answers = [(loss, 1.0, 0.3 / loss) for loss in (0.3, 0.27, 0.21, 0.15, 0.09)]
    check, _ = _told((1.0, 0.4, 0.4), *answers)
    assert not check.found
    check, _ = _told((1.0, 0.4, 0.4), *answers[:3])
    assert not _due_at(check, 0.21 * (NEAR - 2 * FURTHER) * 1.01)  # and questions become rare
    assert _due_at(check, 0.21 * (NEAR - 2 * FURTHER) * 0.99)


def test_where_little_is_left_to_lose_nobody_stops() -> None:
    """Fitted to the end there would be less than a tenth of what there was."""
    assert MATTERS > 0.02 * 4.5
    assert not _told((1.0, 0.1, 0.1), (0.02, 0.95, 4.5), (0.018, 0.95, 4.5))[0].found
    check, _ = _told((1.0, 0.1, 0.1), (3e-3, 0.5, 0.5))
    assert not _due_at(check, 0.0, 1000)  # not for ever


def test_a_jump_through_the_noise_leads_back_only_where_much_was_expected() -> None:
    assert _told((1.0, 0.5, 0.5), (1e-9, 0.2, 0.2))[1] == [False, True]
    check, through = _told((1.0, 0.05, 0.05), (1e-9, 0.2, 0.2))
    assert through == [False, False]
    assert not check.found


def test_what_no_jump_has_done_is_no_jump_through_the_noise() -> None:
    check, _ = _told((1.0, 0.5, 0.5))
    assert not check.take(1e-9, 0.2, 0.2)
    assert not check.found


def test_a_loss_below_zero_is_asked_about_as_it_falls() -> None:
    """Squares and a constant: bookkeeping is of the squares."""
    check = NoiseCheck()
    check.see(-4.5, 0)
    check.take(0.5, 0.3, 0.3)
    assert not check.found
    assert not _due_at(check, -4.6)
    assert _due_at(check, -4.5 - (1 - MOST_FALL) * 4.51)


def test_its_state_is_plain_numbers() -> None:
    check, _ = _told((1.0, 0.3, 0.3), (0.4, 0.95, 2.0))
    other = NoiseCheck()
    other.load_state_dict(check.state_dict())
    assert other.state_dict() == check.state_dict()
    assert other.take(0.36, 0.95, 2.0) == check.take(0.36, 0.95, 2.0)
    assert other.found
    assert check.found


# ---- runs ------------------------------------------------------------------------------------------------------


def _data(noise: float = 0.5, count: int = 96, num_outputs: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.rand(count, 2, generator=generator) - 1
    y = torch.sin(3 * x[:, :1]) * x[:, 1:]
    return x, y + noise * torch.randn(count, num_outputs, generator=generator)


def _mlp(*, num_outputs: int = 1, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    between = nn.BatchNorm1d(32) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(2, 32), between, nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, num_outputs))


def _squares(model: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def _residuals(model: nn.Module, batch: Batch) -> Tensor:
    difference: Tensor = model(batch[0]) - batch[1]
    return difference[:, 0]


def _equation(model: nn.Module, batch: Batch) -> Tensor:
    """u' = f at points: nothing in it was measured."""
    x = batch[0].detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope[:, :1] - batch[1]).square().mean()


def _run(
    batch: Batch | None = None, model: nn.Module | None = None, loss_fn: Any = _squares, steps: int = 150,
    settings: dict[str, Any] | None = None, **options: Any,
) -> HybridTrainer:  # fmt: skip
    model = _mlp() if model is None else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    config = with_values(HybridTrainerConfig(), settings or {})
    trainer = HybridTrainer(model, optimizer, config, loss_fn=loss_fn, **options)
    trainer.fit(itertools.repeat(_data() if batch is None else batch), total_steps=steps)
    return trainer


NOISY: dict[str, dict[str, Any]] = {
    "one output": {},
    "several outputs": {"batch": _data(num_outputs=3), "model": _mlp(num_outputs=3)},
    "decay in the gradient": {"decay": 1e-4},
    "in double": {"batch": tuple(t.double() for t in _data()), "model": _mlp().double()},
    "distances": {"loss_fn": lambda model, batch: functional.smooth_l1_loss(model(batch[0]), batch[1])},
}


@pytest.mark.parametrize("name", NOISY)
def test_jumps_end_at_the_noise(name: str, notices: list[str]) -> None:
    options = dict(NOISY[name])
    model = copy.deepcopy(options.pop("model", None) or _mlp())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=options.pop("decay", 0.0))
    loss_fn, batch = options.pop("loss_fn", _squares), options.pop("batch", _data())
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(), loss_fn=loss_fn)
    trainer.fit(itertools.repeat(batch), total_steps=150)
    assert trainer.run.judge.noise.found
    assert "looks like noise" in why_ended(trainer.run)
    assert len(notices) == 1
    assert "val_fn=" in notices[0]
    notices.clear()


def test_without_noise_jumps_go_on() -> None:
    trainer = _run(_data(0.0))
    assert not trainer.run.judge.noise.found
    assert trainer.run.judge.noise.num_asked > 0
    assert trainer.statistics()["num_jumps_accepted"] > 20


@pytest.mark.parametrize("offset", [-5.0, 5.0])
def test_a_constant_in_the_loss_changes_nothing(offset: float, notices: list[str]) -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return _squares(model, batch) + offset

    clean = _run(_data(0.0), loss_fn=loss_fn)
    assert not clean.run.judge.noise.found
    assert clean.statistics()["num_jumps_accepted"] > 20
    assert not notices
    assert _run(loss_fn=loss_fn, steps=300).run.judge.noise.found
    notices.clear()


def test_from_there_the_run_is_the_plain_loop_to_the_last_bit(notices: list[str]) -> None:
    model = _mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(), loss_fn=_squares, lr_scheduler=schedule)
    while not trainer.run.judge.noise.found:
        trainer.step(_data())
    # the answer came before a step that is as plain as those that follow
    before, num_before = copy.deepcopy((model, optimizer.state_dict())), trainer.statistics()["num_jumps_accepted"]
    passes, rates = trainer.run.meter.num_passes, []
    for _ in range(30):
        rates.append(optimizer.param_groups[0]["lr"])
        trainer.step(_data())
    other, state = before
    plain = torch.optim.Adam(other.parameters(), lr=1e-2)
    plain.load_state_dict(state)
    for rate in rates:
        plain.param_groups[0]["lr"] = rate
        plain.zero_grad()
        _squares(other, _data()).backward()
        plain.step()
    assert trainer.statistics()["num_jumps_accepted"] == num_before > 0
    assert trainer.statistics()["learned_scale"] == 1
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert trainer.run.meter.num_passes - passes < 60 * 30  # and nothing is kept of its windows any more
    notices.clear()


def test_a_validation_loss_that_comes_with_a_resume_has_the_word(notices: list[str], tmp_path: Path) -> None:
    """Noise stays found in a run that goes on as it was."""
    saved = _run().save_checkpoint(tmp_path / "saved")
    for options, ended in (
        ({}, True),
        ({"val_fn": lambda model: float(_squares(model, _data(count=50)).detach())}, False),
    ):
        again = _run(steps=0, **options)
        again.load_checkpoint(saved)
        again.fit(itertools.repeat(_data()), total_steps=160)
        assert again.run.judge.noise.found
        assert again.run.proposes_nothing == ended
    notices.clear()


def test_closed_form_that_went_through_the_noise_comes_back(notices: list[str]) -> None:
    """To the state of the last question that found none, whatever a chain of moves has made of it since."""
    trainer = _run(_data(0.0), residual_fn=_residuals, steps=20)
    run = trainer.run
    point = run.safety.best_point
    assert point is not None
    trainer.step(_data(0.0))
    now = [p.detach() for p in run.subject.model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(point.parameters, now, strict=True))
    end_by_noise(run, 1.0, back=True)
    assert "came back" in notices[0]
    assert run.safety.best_point is None
    assert all(torch.equal(a, b) for a, b in zip(point.parameters, now, strict=True))
    notices.clear()


def test_closed_form_learns_no_noise_either(notices: list[str]) -> None:
    trainer = _run(_data(0.3, count=64), residual_fn=_residuals, steps=200)
    assert trainer.run.judge.noise.found
    assert float(_squares(trainer.run.subject.model, _data(0.3, count=64)).detach()) > 0.03  # of 0.09 that are noise
    notices.clear()


def test_some_of_the_samples_are_enough(notices: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_check, "MOST_ROWS", 128)
    assert _run(_data(count=200), steps=300).run.judge.noise.found
    notices.clear()


NOT_ASKED: dict[str, dict[str, Any]] = {
    "validation": {"val_fn": lambda model: float(_squares(model, _data(count=50)).detach())},
    "a predictor that was chosen": {"settings": {**PRESETS["full_batch"], "predictor.type": "quasi_newton"}},
    "asked for": {"settings": {"gate.exact": "always"}},
    "many samples": {"batch": _data(count=4000), "model": nn.Linear(2, 1)},
    "scores": {"judge_fn": lambda model, batch: -(model(batch[0]) - batch[1]).square()[:, 0]},
    "no jumps": {"settings": {"training.max_predict_steps": 0}},
}


@pytest.mark.parametrize("name", NOT_ASKED)
def test_nobody_asks_where_somebody_else_says_so(name: str) -> None:
    trainer = _run(steps=40, **copy.deepcopy(NOT_ASKED[name]))
    assert trainer.run.judge.noise.num_asked == 0
    assert not trainer.run.judge.noise.unable


def _table() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(200_000, 8), nn.Tanh(), nn.Linear(8, 1))


def _of_table(model: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(model((batch[0][:, 0] > 0).long()), batch[1])


def test_samples_of_a_small_micro_batch_are_not_asked() -> None:
    """Four samples left out of one another say nothing, however many of such there are."""
    run = _run(_data(0.0), steps=20).run
    x, y = _data()
    run.judge.noise.load_state_dict(NoiseCheck().state_dict())
    run.judge.noise.see(1.0, 0)
    noise_check.ask_if_due(run, MicroBatches([(x[i : i + 4], y[i : i + 4]) for i in range(0, 96, 4)]))
    assert run.judge.noise.unable


UNABLE: dict[str, dict[str, Any]] = {
    "an equation": {"loss_fn": _equation},
    "samples that depend on one another": {"model": _mlp(norm=True)},
    "no difference from data": {"loss_fn": lambda model, batch: torch.cosh(model(batch[0]) - batch[1]).log().mean()},
    "two terms": {"loss_fn": lambda model, batch: _squares(model, batch) + model(batch[0]).square().mean()},
    "samples that are masked": {
        "loss_fn": lambda model, batch: ((model(batch[0]) - batch[1]) ** 2 * (batch[0][:, :1] > 0)).mean()
    },
    "a table that does not fit": {"model": _table(), "loss_fn": _of_table},
}


@pytest.mark.parametrize("name", UNABLE)
def test_where_residuals_cannot_be_had_jumps_are_judged_by_the_loss(name: str) -> None:
    trainer = _run(_data(0.0), steps=60, **copy.deepcopy(UNABLE[name]))
    assert trainer.run.judge.noise.unable
    assert trainer.run.judge.noise.num_asked == 0
    assert trainer.statistics()["num_jumps_accepted"] > 0


def test_hooks_of_the_user_hear_of_no_question() -> None:
    model, heard = _mlp(), 0

    def hear(gradient: Tensor) -> None:
        nonlocal heard
        heard += 1

    next(model.parameters()).register_hook(hear)
    trainer = _run(_data(0.0), model=model, steps=40)
    assert trainer.run.judge.noise.unable
    assert heard == trainer.run.meter.num_real_steps


@pytest.mark.parametrize("when", [3, 12, 30])
def test_a_run_that_asks_is_resumed_bit_for_bit(when: int, notices: list[str], tmp_path: Path) -> None:
    """Its questions after a resume are those that it would have asked, at the same price."""

    def begun() -> HybridTrainer:
        model = _mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
        return HybridTrainer(model, optimizer, loss_fn=_squares, lr_scheduler=schedule)

    whole, first, again = begun(), begun(), begun()
    for trainer, steps in ((whole, when), (first, when)):
        for _ in range(steps):
            trainer.step(_data())
    again.load_checkpoint(first.save_checkpoint(tmp_path / "saved"))
    for _ in range(120):
        a, b = whole.step(_data()), again.step(_data())
        assert a.loss == b.loss
    assert whole.run.judge.noise.state_dict() == again.run.judge.noise.state_dict()
    assert whole.run.judge.noise.found
    assert whole.run.meter.num_forward == again.run.meter.num_forward
    notices.clear()


def test_the_last_proposal_that_a_run_owes_is_made_after_a_resume(tmp_path: Path) -> None:
    """It was stopped behind its last step."""

    def begun() -> HybridTrainer:
        model = _mlp()
        return HybridTrainer(model, torch.optim.Rprop(model.parameters(), lr=1e-3), loss_fn=_squares)

    for total in range(25, 40):
        whole, first, again = begun(), begun(), begun()
        whole.fit(itertools.repeat(_data(0.0)), total_steps=total)
        first.fit(
            itertools.repeat(_data(0.0)), total_steps=total,
            should_stop=lambda run=first.run, end=total: run.position >= end,
        )  # fmt: skip
        again.load_checkpoint(first.save_checkpoint(tmp_path / str(total)))
        again.fit(itertools.repeat(_data(0.0)), total_steps=total)
        assert again.current_step == whole.current_step
        for a, b in zip(whole.run.subject.model.parameters(), again.run.subject.model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_a_question_leaves_no_trace_and_is_charged() -> None:
    trainer = _run(_data(0.0), steps=30)
    run = trainer.run
    model, noise = run.subject.model, run.judge.noise
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy((model.state_dict(), [p.grad for p in model.parameters()], torch.get_rng_state()))
    noise.__init__()  # type: ignore[misc]
    noise.see(1.0, 0)
    spent = run.meter.num_forward
    forwards = noise_check.ask_if_due(run, _data(0.0))
    assert noise.num_asked == 1
    assert forwards > 1
    assert run.meter.num_forward == pytest.approx(spent + forwards)
    after = (model.state_dict(), [p.grad for p in model.parameters()], torch.get_rng_state())
    for a, b in zip(before[0].values(), after[0].values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(before[1], after[1], strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    assert torch.equal(before[2], after[2])


def test_what_fails_in_a_question_ends_the_questions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> float:
        raise ArithmeticError("no memory for a kernel")

    monkeypatch.setattr(noise_check, "left_out_error", fails)
    trainer = _run(steps=60)
    assert trainer.run.judge.noise.unable
    assert trainer.statistics()["num_jumps_accepted"] > 0


def test_a_loop_of_the_user_s_own_is_protected(notices: list[str]) -> None:
    model, batch = _mlp(), _data()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    hybrid = attach(model, optimizer, HybridTrainerConfig(), loss_fn=_squares)
    for _ in range(150):
        loss = _squares(model, batch)
        optimizer.zero_grad()
        loss.backward()
        hybrid.note(loss, batch)
        optimizer.step()
    assert hybrid.run.judge.noise.found
    assert hybrid.statistics()["num_jumps_accepted"] > 0
    hybrid.detach()
    notices.clear()
