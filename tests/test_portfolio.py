"""The choice between sources by what they bring per second: turns, prices, refusals, checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import full_batch, loss_fn, make_model
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.config.presets import PRESETS
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.cost import STEP_UNITS
from hybrid_predict_trainer.cycle import predictor_choice
from hybrid_predict_trainer.propose.sources.arms import BLOCK, CALLS, EARLY_WAIT, FIRST_SHARE, PLAIN, SHARE_BESIDE, Arms
from hybrid_predict_trainer.propose.sources.base import Material
from hybrid_predict_trainer.propose.sources.portfolio import Portfolio
from hybrid_predict_trainer.tasks import TaskSettings, make_task

Batch = tuple[Tensor, Tensor]


def residuals(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1])[:, 0]


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second at every look."""

    def clock_for(device: torch.device) -> Callable[[], float]:
        numbers = itertools.count()
        return lambda: float(next(numbers))

    monkeypatch.setattr(predictor_choice, "clock_for", clock_for)


def built(model: nn.Module, *, residual_fn: Any = residuals, **values: Any) -> HybridTrainer:
    config = with_values(HybridTrainerConfig(), {
        "predictor.type": "portfolio", "training.warmup_steps": 5,
        **{key.replace("__", "."): value for key, value in values.items()},
    })  # fmt: skip
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return HybridTrainer(model, optimizer, config, loss_fn=loss_fn, residual_fn=residual_fn)


def portfolio_of(trainer: HybridTrainer) -> Portfolio:
    source = trainer.run.proposer.source
    assert isinstance(source, Portfolio)
    return source


#: Settings of the preset of this name.
FULL_BATCH = {key.replace(".", "__"): value for key, value in PRESETS["full_batch"].items() if key != "predictor.type"}


def batch64() -> Batch:
    (x, y), *_ = full_batch(1)
    return x.double(), y.double()


def loss_at(model: nn.Module, batch: Batch) -> float:
    return loss_fn(model, batch).item()


# ---- turns -----------------------------------------------------------------------------------------------


def played(rates: dict[str, Callable[[float], float]], cost: dict[str, float], until: float) -> Arms:
    """Arms whose proposals take so many seconds and lower log L at these rates, at these times."""
    arms = Arms([name for name in rates if name != PLAIN])
    for name in rates:
        for _ in range(CALLS):
            arms.add_seconds(name, 1.0, 1.0)
        if name != PLAIN:
            arms.expect(name, cost[name])
    while arms.elapsed < until:
        name = arms.choose()
        arms.note(rates[name](arms.elapsed) * cost[name], cost[name])
    return arms


def steady(rate: float) -> Callable[[float], float]:
    return lambda elapsed: rate


@pytest.mark.parametrize("best", ["a", "b", PLAIN])
def test_the_better_arm_gets_nearly_all_of_the_time(best: str) -> None:
    rates = {name: steady(3.0 if name == best else 1.0) for name in ("a", "b", PLAIN)}
    arms = played(rates, {"a": 1.0, "b": 2.0, PLAIN: 0.5}, until=2000)
    assert arms.leader == best
    assert arms.arms[best].spent > 0.85 * arms.elapsed
    assert all(arm.spent > 0 for arm in arms.arms.values())


def test_an_arm_that_becomes_the_better_one_is_found() -> None:
    rates = {"a": lambda t: 3.0 if t < 500 else 0.1, "b": steady(1.0), PLAIN: steady(0.0)}
    arms = played(rates, {"a": 1.0, "b": 1.0, PLAIN: 1.0}, until=3000)
    assert arms.leader == "b"
    assert arms.arms["b"].spent > 0.7 * 2500


@pytest.mark.parametrize("dear", [50.0, 400.0])
def test_a_dear_try_is_bounded(dear: float) -> None:
    rates = {"cheap": steady(1.0), "dear": steady(0.0), PLAIN: steady(0.1)}
    cost = {"cheap": 1.0, "dear": dear, PLAIN: 1.0}
    before = played(rates, cost, until=0.9 * dear / FIRST_SHARE)
    assert before.arms["dear"].spent == 0
    arms = played(rates, cost, until=20 * dear)
    assert 0 < arms.arms["dear"].spent <= (FIRST_SHARE + BLOCK) * arms.elapsed
    assert arms.leader == "cheap"


def test_a_trial_that_was_lost_comes_later_every_time() -> None:
    arms = Arms(["a"])
    for name in ("a", PLAIN):
        arms.add_seconds(name, 1.0, 1.0)
    arms.expect("a", 1.0)
    begun: list[float] = []
    while arms.elapsed < 5000:
        name = arms.choose()
        if name == "a" and (not begun or arms.elapsed - begun[-1] > EARLY_WAIT):
            begun.append(arms.elapsed)
        arms.note(1.0 if name == PLAIN else 0.0, 1.0)
    assert arms.arms["a"].spent < 0.1 * arms.elapsed


def test_a_first_trial_that_was_chosen_before_its_price_was_known_has_room_for_it() -> None:
    arms = Arms(["gauss_newton"], timed=False)
    arms.on_idle(3.0)
    assert arms.choose() == "gauss_newton", "nothing is known of its price, and it may be tried"
    assert arms.room_forwards == 3
    arms.on_idle(60.0)
    arms.expect("gauss_newton", 50.0)
    assert arms.pass_over()
    assert arms.room_forwards == 63
    other = Arms(["gauss_newton"], timed=False)
    other.on_idle(3.0)
    other.choose()
    other.expect("gauss_newton", 50.0)
    assert not other.pass_over(), "now it is known to be too dear"


@pytest.mark.parametrize(("left", "tried"), [(1000.0, True), (220.0, True), (180.0, False), (math.inf, True)])
def test_nobody_is_tried_first_at_the_end_of_a_run(left: float, tried: bool) -> None:
    arms = Arms(["a", "b"], timed=False)
    arms.on_idle(400.0)
    arms.expect("a", 10.0)
    arms.expect("b", 50.0)
    assert arms.choose() == "a"
    arms.plan(400.0 + left)
    arms.note(5.0, 400.0)  # it leads
    assert (arms.current == "b") is tried


def test_the_price_is_the_least_of_the_first_calls_and_held() -> None:
    arms = Arms(["a"])
    for seconds in (9.0, 2.0, 4.0, 0.1):
        arms.add_seconds("a", seconds, 2.0)
    assert arms.price("a") == 1.0
    assert not arms.measures("a")


def test_an_arm_of_advantage_that_goes_well_is_not_interrupted_early_and_one_that_stalls_is() -> None:
    falls = {"well": lambda t: 1.0, "stalls": lambda t: 1.0 if t < 200 else 0.01}
    begun = {}
    for name, rate in falls.items():
        rates = {"gauss_newton": rate, "other": steady(0.5), PLAIN: steady(0.0)}
        arms = Arms(["gauss_newton", "other"], timed=False)
        cost = {"gauss_newton": 5.0, "other": 60.0, PLAIN: 3.0}
        arms.expect("gauss_newton", 20.0)
        arms.expect("other", cost["other"])
        while arms.arms["other"].rate is None and arms.elapsed < 5000:
            turn = arms.choose()
            arms.note(rates[turn](arms.elapsed) * cost[turn], cost[turn])
        begun[name] = arms.elapsed
    assert 60.0 / FIRST_SHARE <= begun["stalls"] < 60.0 / SHARE_BESIDE <= begun["well"] < 1000


def test_what_closed_form_gained_is_not_credited_to_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = built(make_model("mlp").double()), batch64()
    source, gains = portfolio_of(trainer), list[float]()
    trainer.fit([batch], total_steps=4)
    monkeypatch.setattr(source.arms, "note", lambda gain, forwards, over=False: gains.append(gain))

    def plain_step(loss: float) -> None:
        source.arms.current = PLAIN
        source.observe(SimpleNamespace(num_steps=1, loss=loss))  # type: ignore[arg-type]

    plain_step(1.0)
    plain_step(0.5)
    source.arms.current = "gauss_newton"
    subject = trainer.run.subject
    source.propose(Material(
        model=subject.model, parameters=subject.parameters, movable=[True] * len(subject.parameters), batch=batch,
        exact=True,
    ))  # fmt: skip
    plain_step(1e-6)
    plain_step(5e-7)
    assert gains == pytest.approx([0.0, math.log(2), 0.0, math.log(2)])


def test_what_was_dropped_has_no_turn() -> None:
    arms = Arms(["a", "b"])
    arms.add_seconds(PLAIN, 1.0, 1.0)
    assert arms.choose() == "a"
    arms.drop("a")
    for _ in range(200):
        assert arms.choose() != "a"
        arms.note(1.0, 1.0)
    assert arms.left == ["b"]


def test_turns_survive_a_checkpoint() -> None:
    rates, cost = {"a": steady(2.0), "b": steady(1.0), PLAIN: steady(0.5)}, {"a": 1.0, "b": 2.0, PLAIN: 0.5}
    arms, other = played(rates, cost, until=77), Arms(["a", "b"])
    other.load_state_dict(arms.state_dict())
    seen: list[list[str]] = [[], []]
    for turns, names in zip((arms, other), seen, strict=True):
        for _ in range(300):
            names.append(turns.choose())
            turns.note(rates[names[-1]](0) * cost[names[-1]], cost[names[-1]])
    assert seen[0] == seen[1]


# ---- in a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("price", ["measured", "counted"])
def test_it_ends_far_below_the_optimizer_alone(price: str, ticks: None) -> None:
    batch, model, plain = batch64(), make_model("mlp").double(), make_model("mlp").double()
    trainer = built(model, predictor__source_price=price)
    trainer.fit([batch], total_steps=150)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss_fn(plain, batch).backward()
        optimizer.step()
    assert loss_at(model, batch) < 1e-6 * loss_at(plain, batch)
    assert list(portfolio_of(trainer).sources) == ["gauss_newton", "wolfe", "dense"]
    assert trainer.statistics()["num_predictor_failures"] == 0


def test_without_residuals_it_is_quasi_newton_bit_for_bit() -> None:
    ends = []
    for name in ("portfolio", "quasi_newton"):
        model = make_model("mlp").double()
        trainer = built(model, residual_fn=None, predictor__type=name, **FULL_BATCH)
        trainer.fit([batch64()], total_steps=80)
        assert trainer.statistics()["predictor"] == "quasi_newton"
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


def test_what_is_counted_does_not_hang_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for speed in (1.0, 1e-3):
        numbers = itertools.count()
        monkeypatch.setattr("time.process_time", lambda speed=speed, numbers=numbers: speed * next(numbers))
        monkeypatch.setattr("time.perf_counter", lambda speed=speed, numbers=numbers: speed * next(numbers))
        model = make_model("mlp").double()
        trainer = built(model)
        trainer.fit([batch64()], total_steps=80)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("price", ["measured", "counted"])
@pytest.mark.parametrize("at", [4, 9, 30])
def test_a_resumed_run_is_the_whole_one(at: int, price: str, tmp_path: Path, ticks: None) -> None:
    batch, values = batch64(), {"predictor__source_price": price}
    whole, other = built(make_model("mlp").double(), **values), built(make_model("mlp", seed=9).double(), **values)
    for _ in range(at):
        whole.step(batch)
    other.load_checkpoint(whole.save_checkpoint(tmp_path))
    for _ in range(25):
        assert whole.step(batch).reason == other.step(batch).reason
    for p, q in zip(whole.run.subject.parameters, other.run.subject.parameters, strict=True):
        assert torch.equal(p, q)
    states = [repr(portfolio_of(t).arms.state_dict()) for t in (whole, other)]  # nan is not itself
    assert states[0] == states[1]


@pytest.mark.parametrize("when", ["least_price", "propose", "on_verdict"])
def test_a_source_that_raises_is_dropped_and_the_others_go_on(when: str, ticks: None) -> None:
    batch, model = batch64(), make_model("mlp").double()
    trainer, before = built(model), loss_at(model, batch)
    source = portfolio_of(trainer)

    def broken(*args: Any) -> Any:
        raise RuntimeError("broken")

    setattr(source.sources["gauss_newton"], when, broken)
    trainer.fit([batch], total_steps=120)
    assert source.arms.arms["gauss_newton"].dropped
    assert "gauss_newton" not in source.arms.left
    assert loss_at(model, batch) < 0.01 * before
    assert trainer.statistics()["num_jumps_accepted"] > 0


def test_residuals_of_another_loss_are_dropped(ticks: None) -> None:
    trainer = built(make_model("mlp").double(), residual_fn=lambda model, batch: 2 * residuals(model, batch))
    trainer.fit([batch64()], total_steps=100)
    assert portfolio_of(trainer).arms.left == ["wolfe", "dense"]


def test_a_run_does_not_end_where_a_real_step_has_left_it(ticks: None) -> None:
    model, batch = make_model("mlp").double(), batch64()
    trainer, seen = built(model), []
    for total in range(60, 90, 3):
        trainer.fit([batch], total_steps=total)
        seen.append(loss_at(model, batch))
    assert max(seen[3:]) <= seen[0]


def test_new_batches_are_left_to_closed_form(ticks: None) -> None:
    torch.manual_seed(0)
    model, teacher = make_model("mlp").double(), make_model("mlp", seed=4).double()

    def batches() -> Any:
        while True:
            x = torch.randn(64, full_batch(1)[0][0].shape[1], dtype=torch.float64)
            yield x, teacher(x).detach()

    trainer = built(model)
    trainer.fit(batches(), total_steps=150)
    assert trainer.statistics()["num_jumps_accepted"] > 0
    assert math.isfinite(loss_at(model, next(batches())))


@pytest.mark.parametrize("name", ["portfolio", "gauss_newton", "dense", "wolfe"])
@pytest.mark.parametrize("at_rest", [range(10), range(40, 60), range(50, 1000)], ids=["begins", "pauses", "ends"])
def test_a_rate_of_zero_is_no_failure_of_a_source(name: str, at_rest: range, recwarn: pytest.WarningsRecorder) -> None:
    model, batch = make_model("mlp").double(), batch64()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step in at_rest else 1.0)
    source = {"predictor.type": name}
    if name in ("dense", "wolfe"):
        source = {"predictor.type": "quasi_newton", "predictor.quasi_newton.form": name}
    config = with_values(HybridTrainerConfig(), {"training.warmup_steps": 5, **source})
    trainer = HybridTrainer(model, optimizer, config, loss_fn=loss_fn, lr_scheduler=schedule, residual_fn=residuals)
    before = loss_at(model, batch)
    for _ in range(200):
        trainer.step(batch)
    assert trainer.statistics()["num_predictor_failures"] == 0
    assert [w for w in recwarn if "failed" in str(w.message)] == []
    assert loss_at(model, batch) < 0.1 * before
    if name == "portfolio":
        assert portfolio_of(trainer).arms.left == ["gauss_newton", "wolfe", "dense"]


@pytest.mark.parametrize("name", ["portfolio", "gauss_newton", "dense", "wolfe"])
@pytest.mark.parametrize("steps", [40, 83, 150])
def test_a_run_costs_what_was_planned(name: str, steps: int) -> None:
    source: dict[str, Any] = {"predictor__type": name}
    if name in ("dense", "wolfe"):
        source = {"predictor__type": "quasi_newton", "predictor__quasi_newton__form": name}
    trainer = built(make_model("mlp").double(), **source)
    trainer.fit([batch64()], total_steps=steps)
    beyond = trainer.run.meter.cost_units - steps * STEP_UNITS
    assert beyond < (25 if name in ("dense", "wolfe") else 10), "a few steps of their own; a trial and the way back"


@pytest.mark.parametrize("name", ["portfolio", "gauss_newton", "dense", "wolfe"])
@pytest.mark.parametrize(("task", "steps"), [("pinn-burgers", 40), ("pinn-burgers", 77), ("regression", 200)])
def test_a_move_that_is_dearer_than_what_is_left_is_not_made(name: str, task: str, steps: int) -> None:
    """A linearisation of 1,217 residuals costs what 30 real steps do, a step over 4,897 weights what five do."""
    problem, source = make_task(task, TaskSettings()), {"predictor.type": name}
    if name in ("dense", "wolfe"):
        source = {"predictor.type": "quasi_newton", "predictor.quasi_newton.form": name}
    model = problem.build_model(0)
    trainer = HybridTrainer(
        model, torch.optim.Adam(model.parameters(), lr=problem.defaults.lr),
        with_values(HybridTrainerConfig(), source), loss_fn=problem.loss_fn, residual_fn=problem.residual_fn,
    )  # fmt: skip
    trainer.fit(itertools.repeat(next(iter(problem.batches(0)))), total_steps=steps)
    beyond = trainer.run.meter.cost_units - steps * STEP_UNITS
    assert beyond < (25 if name in ("dense", "wolfe") else 10)


@pytest.mark.parametrize("name", ["portfolio", "gauss_newton"])
def test_a_plan_that_is_over_binds_no_proposal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, batch = built(make_model("mlp").double(), predictor__type=name), batch64()
    trainer.fit([batch], total_steps=20)
    rooms: list[float] = []
    source = trainer.run.proposer.source
    assert source is not None
    propose = source.propose

    def seen(material: Material) -> Any:
        rooms.append(material.room)
        return propose(material)

    monkeypatch.setattr(source, "propose", seen)
    for _ in range(20):
        trainer.step(batch)
    assert rooms
    assert set(rooms) == {math.inf}
    trainer.fit([batch], total_steps=trainer.run.position + 20)
    assert rooms[-1] < math.inf
