"""The guard's second try where losses are exact: with a loop of somebody else's, a scaler, averages, and a resume."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cases import Setup, assert_same, config, difference, loss_fn, make_batches, seed_all, setup
from hybrid_predict_trainer import AverageFollower, Engine, HybridTrainer, attach
from hybrid_predict_trainer.cycle import withdrawal
from hybrid_predict_trainer.judge.guard import BLOCK_STEPS, Request
from hybrid_predict_trainer.keep.snapshot import Snapshot
from hybrid_predict_trainer.move.multiplier import Advice
from test_modifiers import Average

STATE = ("parameters", "buffers", "optimizer")
SAID = "prediction goes on"
SETTINGS: dict[str, Any] = {
    "max_lr_multiplier": 1000.0, "gate__overhead_budget": 0.0, "gate__overhead_budget_exact": 0.0,
    "divergence__critical_multiplier": 1e9, "gate__exact": "always",
}  # fmt: skip


@pytest.fixture(autouse=True)
def only_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else would take a ruinous multiplier back is asleep."""
    for name, told in (("decide", (Advice.NOTHING, True)), ("watch", Advice.NOTHING), ("settle", Advice.NOTHING)):
        monkeypatch.setattr(f"hybrid_predict_trainer.move.multiplier.Multiplier.{name}", lambda *a, told=told: told)


@dataclass
class Run:
    """A run that is led off its best, and what was kept of it."""

    made: Setup
    ours: HybridTrainer | Engine
    scaler: Any = None
    own_schedule: bool = False
    average: Average | None = None
    ema: AveragedModel | None = None
    kept: dict[str, Any] = field(default_factory=dict)  # at the newest anchor
    rates: list[float] = field(default_factory=list)  # that the optimizer has stepped with

    @property
    def guard(self) -> Any:
        return self.ours.run.safety.guard

    def everything(self) -> dict[str, Any]:
        found = self.made.everything()
        found["average"] = [] if self.average is None else [t.clone() for t in self.average.average]
        found["ema"] = {} if self.ema is None else copy.deepcopy(dict(self.ema.state_dict()))
        return found

    def step(self, batch: Any) -> float:
        """One step of the loop, by whoever owns it; returns its loss."""
        if isinstance(self.ours, HybridTrainer):
            return self.ours.step(batch).loss
        optimizer = self.made.optimizer
        optimizer.zero_grad()
        loss = loss_fn(self.made.model, batch)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.ours.note(loss, batch)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        if self.own_schedule:
            self.made.scheduler.step()
        return loss.item()

    def ruin(self, until: Callable[[], bool], batches: Any = None, value: float = 600.0) -> int:
        """Four good blocks, then a multiplier that grows to a ruinous one; returns the steps taken."""
        multiplier = self.ours.run.optimizer_step.scale.multiplier
        multiplier.value = 1.01
        for number in range(1, 450):
            if number > 4 * BLOCK_STEPS and not (self.guard.num_retries or self.guard.withdrawn):
                multiplier.value = min(1.1 * multiplier.value, value)
            self.step(BATCH if batches is None else batches[number])
            if until():
                return number
        raise AssertionError("it never happened")


BATCH = make_batches(1)[0]
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t / 2000)),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9995),  # each rate from the last one
}


def begin(
    monkeypatch: pytest.MonkeyPatch, how: str, model: str = "mlp", *, optimizer: str = "adam", schedule: str = "lambda",
    scaled: bool = False, around: bool = False, settings: dict[str, Any] | None = None,
) -> Run:  # fmt: skip
    """``how``: "trainer", or to whom the schedule of an attached loop belongs."""
    made = setup(model, optimizer)
    made.scheduler = SCHEDULES[schedule](made.optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    average, ema, modifiers = None, None, []
    if around:
        average, ema = Average(), AveragedModel(made.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        modifiers = [average, AverageFollower(made.model, made.optimizer, ema)]
    found, more = config(**{**SETTINGS, **(settings or {})}), {"grad_scaler": scaler, "modifiers": modifiers}
    if how == "trainer":
        ours: HybridTrainer | Engine = made.trainer(found, **more)
    else:
        ours = attach(
            made.model, made.optimizer, found, loss_fn=loss_fn, lr_scheduler=made.scheduler, schedule=how, **more
        )
    run = Run(made, ours, scaler, how in ("external", "shared"), average, ema)
    take = withdrawal.keep

    def keeping(state: Any, into: Snapshot | None = None) -> Snapshot:
        run.kept = run.everything()
        return take(state, into)

    monkeypatch.setattr(withdrawal, "keep", keeping)
    made.optimizer.register_step_pre_hook(lambda o, *_: run.rates.append(float(o.param_groups[0]["lr"])))
    return run


@pytest.fixture
def ridden(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """Runs whose engines are detached in the end."""
    runs: list[Run] = []

    def make(*args: Any, **kwargs: Any) -> Run:
        runs.append(begin(monkeypatch, *args, **kwargs))
        return runs[-1]

    yield make
    for run in runs:
        if isinstance(run.ours, Engine):
            run.ours.detach()


def assert_at_the_anchor(run: Run, *more: str) -> None:
    now = run.everything()
    for part in (*STATE, *more):
        assert_same(now[part], run.kept[part])


HOW = ["trainer", "owned", "external", "shared"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("how", HOW)
def test_rates_clock_and_summary_stay_true(how: str, schedule: str, ridden: Callable[..., Run]) -> None:
    """No gradient of the weights that were left is stepped with, and no number of the schedule's changes."""
    run = ridden(how, schedule=schedule)
    made, ours = run.made, run.ours
    with pytest.warns(UserWarning, match=SAID) as said:
        number = run.ruin(lambda: run.guard.num_retries == 1)
    assert len(said) == 1
    if how != "trainer":  # whose step is made from there at once
        assert_at_the_anchor(run)
    alone = setup("mlp", "adam")
    alone.scheduler = SCHEDULES[schedule](alone.optimizer)
    wanted = []
    for _ in range(number + 20):
        wanted.append(alone.optimizer.param_groups[0]["lr"])
        alone.optimizer.step()
        alone.scheduler.step()
    del run.rates[:]
    for k in range(20):
        assert made.scheduler.last_epoch == number + k
        assert made.scheduler.get_last_lr() == [made.optimizer.param_groups[0]["lr"]] == [wanted[number + k]]
        run.step(BATCH)
    assert run.rates == [pytest.approx(0.5 * rate, rel=1e-12) for rate in wanted[number:]]
    assert ours.run.schedule.factor == 0.5
    assert ours.position == number + 20 if isinstance(ours, Engine) else ours.run.position == number + 20
    if isinstance(ours, Engine):
        assert ours.owed_schedule_steps() == 0
        assert ours.report()["num_guard_retries"] == 1
        assert "times 0.5 by recovery" in ours.report_text()
    found = ours.summary()["statistics"]
    told = ("num_guard_alarms", "num_guard_restores", "num_guard_retries", "withdrawn", "learning_rate_factor")
    assert [found[name] for name in told] == [1, 1, 1, False, 0.5]
    assert (found["num_real_steps"], found["num_skipped_steps"]) == (number + 20, 0)


def test_jumps_and_what_is_owed_for_them_go_on(ridden: Callable[..., Run]) -> None:
    """Claimed steps are owed before and after, and the loop that takes them keeps to the clock."""
    run = ridden("external", settings={"clock": "claimed", "gate__overhead_budget_exact": 1.0})
    schedule, engine = run.made.scheduler, run.ours
    assert isinstance(engine, Engine)

    def step() -> None:
        run.step(BATCH)
        for _ in range(engine.owed_schedule_steps()):
            schedule.step()
        assert schedule.last_epoch == engine.position
        assert schedule.get_last_lr() == [run.made.optimizer.param_groups[0]["lr"]]

    while run.guard.anchor_step < 0:
        step()
    claimed, proposed = (engine.statistics()[name] for name in ("num_claimed_steps", "num_jumps_proposed"))
    assert claimed > 0
    with pytest.warns(UserWarning, match=SAID):
        withdrawal.follow_request(engine.run, Request.RETRY)
    for _ in range(40):
        step()
    assert engine.statistics()["num_jumps_proposed"] > proposed
    assert engine.why_not == ""


@pytest.mark.parametrize(("model", "optimizer"), [("batchnorm", "adam"), ("mlp", "momentum")])
def test_a_noisy_run_that_rides_along_gets_exactly_its_best_state_back(
    model: str, optimizer: str, ridden: Callable[..., Run]
) -> None:
    """Not moved by the gradients that the loop has just computed at the weights that are given up."""
    run = ridden("owned", model, optimizer=optimizer, settings={"gate__exact": "never"})
    with pytest.warns(UserWarning, match="stands above its best"):
        run.ruin(lambda: run.guard.withdrawn, make_batches(450), value={"momentum": 6.0, "adam": 60.0}[optimizer])
    assert run.guard.num_restored == 1
    assert_at_the_anchor(run)


@pytest.mark.parametrize("how", ["trainer", "owned", "external"])
def test_with_a_scaler(how: str, ridden: Callable[..., Run]) -> None:
    """The scale is the scaler's own and stays; no step is taken for one that overflowed."""
    run = ridden(how, scaled=True)
    scale = run.scaler.get_scale()
    with pytest.warns(UserWarning, match=SAID):
        number = run.ruin(lambda: run.guard.num_retries == 1)
    if how != "trainer":
        assert_at_the_anchor(run)
    for _ in range(20):
        run.step(BATCH)
    assert run.scaler.get_scale() == scale
    found = run.ours.summary()["statistics"]
    assert (found["num_real_steps"], found["num_skipped_steps"]) == (number + 20, 0)
    assert run.made.scheduler.last_epoch == number + 20


@pytest.mark.parametrize("exact", ["always", "never"])
@pytest.mark.parametrize("how", ["trainer", "owned"])
def test_averages_come_back_with_the_weights(
    how: str, exact: str, ridden: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a user keeps beside the weights is of the state that came back, not of the one that was given up."""
    run = ridden(how, "batchnorm", around=True, settings={"gate__exact": exact})
    assert run.average is not None
    back: list[dict[str, Any]] = []
    put_back = withdrawal.put_back

    def watched(state: Any, snapshot: Snapshot) -> None:
        put_back(state, snapshot)
        back.append(run.everything())

    monkeypatch.setattr(withdrawal, "put_back", watched)
    batches = None if exact == "always" else make_batches(450)
    with pytest.warns(UserWarning, match="stands above its best"):
        run.ruin(lambda: bool(back), batches, value=600.0 if exact == "always" else 60.0)
    for part in (*STATE, "average", "ema"):
        assert_same(back[0][part], run.kept[part])
    assert run.average.heard.count("restore") == 1
    assert "forget" not in run.average.heard


def test_a_raise_that_is_taken_back_takes_averages_back(ridden: Callable[..., Run]) -> None:
    run = ridden("trainer", around=True)
    for batch in make_batches(12):
        run.step(batch)
    withdrawal.follow_advice(run.ours.run, Advice.RAISED)
    for batch in make_batches(6, seed=9):
        run.step(batch)
    assert difference(run.everything()["ema"], run.kept["ema"]) is not None
    withdrawal.follow_advice(run.ours.run, Advice.TAKEN_BACK)
    assert_at_the_anchor(run, "average", "ema")


def test_a_copy_of_before_has_no_averages_and_they_begin_anew(ridden: Callable[..., Run]) -> None:
    """A checkpoint of an earlier version holds copies without what was handed in."""
    run = ridden("trainer", around=True)
    assert run.average is not None
    for batch in make_batches(12):
        run.step(batch)
    point = withdrawal.keep(run.ours.run)
    del point.others[-2:]
    for batch in make_batches(6, seed=9):
        run.step(batch)
    withdrawal.put_back(run.ours.run, point)
    assert_at_the_anchor(run)
    assert run.average.heard[-1] == "forget"


@pytest.mark.parametrize("when", ["comparing", "after"])
@pytest.mark.parametrize("how", ["trainer", "owned", "external"])
def test_resume_in_the_middle_is_bitwise(how: str, when: str, ridden: Callable[..., Run], tmp_path: Path) -> None:
    """Between the alarm and the verdict, and behind the second try: fresh objects go on as the first ones did."""
    run = ridden(how, "norm_dropout", around=True, settings={"gate__exact": "always"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        until = (lambda: run.guard.comparing) if when == "comparing" else (lambda: run.guard.num_retries == 1)
        run.ruin(until, value=6000.0)
    saved = run.ours.save_checkpoint(tmp_path)
    again = ridden(how, "norm_dropout", around=True, settings={"gate__exact": "always"})
    with torch.no_grad():
        for p in again.made.model.parameters():
            p.add_(1.0)
    seed_all(77)
    again.ours.load_checkpoint(saved)  # random numbers of the process included
    ends = []
    for each in (run, again):
        if each is again:
            again.ours.load_checkpoint(saved)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            losses = [repr(each.step(BATCH)) for _ in range(25)]
        ends.append((losses, [str(w.message) for w in said], each.ours.statistics(), each.everything()))
    assert_same(ends[1], ends[0])
    assert run.guard.num_retries == 1
    assert isinstance(run.made.model, nn.Module)
