"""States to come back to, in whole runs: what a guard's alarm, a comparison and a dead run come to."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import (
    Setup,
    assert_same,
    config,
    difference,
    loss_fn,
    make_batches,
    make_model,
    put_into_subject,
    seed_all,
    setup,
)
from hybrid_predict_trainer import DivergenceError, HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.cycle import withdrawal
from hybrid_predict_trainer.judge.guard import BLOCK_STEPS, Request
from hybrid_predict_trainer.keep.snapshot import Snapshot
from hybrid_predict_trainer.move.multiplier import Advice

SAID = "stands above its best by more than its noise"
#: The multiplier alone, which nothing raises by itself: every raise is the test's.
QUIET: dict[str, Any] = {
    "max_lr_multiplier": 1000.0, "gate__overhead_budget": 0.0, "gate__overhead_budget_exact": 0.0,
    "divergence__critical_multiplier": 1e9,
}  # fmt: skip


def runner(model: str = "mlp", optimizer: str = "adam", **more: Any) -> tuple[Setup, HybridTrainer]:
    made = setup(model, optimizer)
    made.scheduler = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda t: 1 / (1 + t / 2000))
    return made, made.trainer(config(**{**QUIET, **more}))


def never_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_predict_trainer.move.multiplier.Multiplier.decide", lambda *a: (Advice.NOTHING, True))
    monkeypatch.setattr("hybrid_predict_trainer.move.multiplier.Multiplier.watch", lambda *a: Advice.NOTHING)
    monkeypatch.setattr("hybrid_predict_trainer.move.multiplier.Multiplier.settle", lambda *a: Advice.NOTHING)


@pytest.fixture(autouse=True)
def only_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else would take a ruinous multiplier back is asleep: the guard is what is left."""
    never_raised(monkeypatch)


#: A multiplier at which a run ends far above its best without dying.
RUINOUS = {"adam": 60.0, "momentum": 6.0}


def ruin(trainer: HybridTrainer, batches: Sequence[Any], *, until: Callable[[], bool], value: float = 60.0) -> int:
    """Train well for four blocks, then with a multiplier that grows to a ruinous one; returns the steps taken."""
    multiplier = trainer.run.optimizer_step.scale.multiplier
    multiplier.value = 1.01
    for number, batch in enumerate(batches, start=1):
        if number > 4 * BLOCK_STEPS and not trainer.run.safety.guard.withdrawn:
            multiplier.value = min(1.1 * multiplier.value, value)
        trainer.step(batch)
        if until():
            return number
    raise AssertionError("it never happened")


def kept_states(monkeypatch: pytest.MonkeyPatch, made: Setup) -> list[dict[str, Any]]:
    """Everything, at each anchor."""
    found: list[dict[str, Any]] = []
    take = withdrawal.keep

    def keeping(run: Any, into: Snapshot | None = None) -> Snapshot:
        found.append(made.everything())
        return take(run, into)

    monkeypatch.setattr(withdrawal, "keep", keeping)
    return found


def states_put_back(monkeypatch: pytest.MonkeyPatch, made: Setup) -> list[dict[str, Any]]:
    """Everything, behind each return to an anchor."""
    found: list[dict[str, Any]] = []
    put_back = withdrawal.put_back

    def watched(run: Any, snapshot: Snapshot) -> None:
        put_back(run, snapshot)
        found.append(made.everything())

    monkeypatch.setattr(withdrawal, "put_back", watched)
    return found


STATE = ("parameters", "buffers", "optimizer")
MODELS = ["mlp", "batchnorm", "dropout", "norm_dropout", "frozen"]


# ---------------------------------------------------------------- a run that is ruined


@pytest.mark.parametrize(("model", "optimizer"), [*((model, "adam") for model in MODELS), ("mlp", "momentum")])
def test_a_ruined_run_gets_its_best_state_back_and_goes_on_as_the_plain_loop(
    model: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, trainer = runner(model, optimizer)
    kept, back = kept_states(monkeypatch, made), states_put_back(monkeypatch, made)
    batches = make_batches(450)
    with pytest.warns(UserWarning, match=SAID) as said:
        num = ruin(
            trainer,
            batches,
            until=lambda: trainer.run.safety.guard.withdrawn,
            value=RUINOUS[optimizer] * (3 if model == "frozen" else 1),
        )
    assert len(said) == 1
    assert "the state of real step" in str(said[0].message)
    for part in STATE:
        assert_same(back[0][part], kept[-1][part])
    assert (trainer.run.safety.raise_point, trainer.run.safety.safe_point) == (None, None)
    # the very step in which it came back is the plain one: made again from there
    again = setup(model, optimizer, seed=3)
    again.scheduler = torch.optim.lr_scheduler.LambdaLR(again.optimizer, lambda t: 1 / (1 + t / 2000))
    seed_all(5)
    for batch in batches[num : num + 30]:
        trainer.step(batch)
    assert made.scheduler.last_epoch == num + 30
    _from_there(again, made, back[0], num - 1)
    assert again.scheduler.last_epoch == num - 1
    torch.set_rng_state(back[0]["rng"]["torch"])
    again.plain(batches[num - 1 : num])
    seed_all(5)
    again.plain(batches[num : num + 30])
    for part in (*STATE, "groups", "scheduler"):
        assert_same(again.everything()[part], made.everything()[part])
    figures = trainer.statistics()
    assert (figures["num_guard_alarms"], figures["num_guard_restores"], figures["withdrawn"]) == (1, 1, True)
    assert trainer.summary()["statistics"]["num_guard_restores"] == 1


def test_a_ruined_full_batch_run_goes_on_with_smaller_steps_and_its_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact losses have judged every jump; the optimizer's own steps take the blame, once."""
    made, trainer = runner("mlp", "adam", gate__exact="always")
    kept, back = kept_states(monkeypatch, made), states_put_back(monkeypatch, made)
    batch = make_batches(1)[0]
    with pytest.warns(UserWarning, match="prediction goes on"):
        ruin(trainer, [batch] * 450, until=lambda: trainer.run.safety.guard.num_retries == 1, value=600.0)
    for part in STATE:
        assert_same(back[0][part], kept[-1][part])
    run = trainer.run
    assert not run.safety.guard.withdrawn
    assert run.safety.safe_point is not None  # the way back stays open
    assert run.optimizer_step.scale.value == 1.0
    assert run.schedule.factor == trainer.config.divergence.retry_learning_rate_factor
    assert not run.judge.ledger.switched_off
    figures = trainer.statistics()
    assert (figures["num_guard_alarms"], figures["num_guard_restores"], figures["withdrawn"]) == (1, 1, False)


def _from_there(fresh: Setup, made: Setup, state: dict[str, Any], position: int) -> None:
    """Bring freshly built objects to a state."""
    with torch.no_grad():
        for name, p in fresh.model.named_parameters():
            p.copy_(state["parameters"][name])
        for name, b in fresh.model.named_buffers():
            b.copy_(state["buffers"][name])
    order = [p for group in fresh.optimizer.param_groups for p in group["params"]]
    for i, values in copy.deepcopy(state["optimizer"]).items():
        fresh.optimizer.state[order[i]] = values
    for group, values in zip(fresh.optimizer.param_groups, state["groups"], strict=True):
        group.update(copy.deepcopy(values))
    fresh.scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None]})
    assert fresh.scheduler.last_epoch == position


@pytest.mark.parametrize("model", ["mlp", "norm_dropout"])
def test_data_that_become_harder_accuse_nobody(model: str) -> None:
    """Targets change, noise grows: the loss stands above its best, and the weights stay where they are."""
    _, trainer = runner(model, "sgd")
    batches = make_batches(450)
    harder = [(x, 3 * y.roll(1, 0) + 4) for x, y in batches]
    trainer.run.optimizer_step.scale.multiplier.value = 1.01
    num_easy = 4 * BLOCK_STEPS
    trainer.step_n(batches, num_easy)
    steps = (trainer.step(batch) for batch in harder[num_easy:])
    with pytest.warns(UserWarning, match="the weights stay, the ones at its best are no better"):
        next(result for result in steps if trainer.run.safety.guard.withdrawn)
    figures = trainer.statistics()
    assert (figures["num_guard_alarms"], figures["num_guard_restores"], figures["withdrawn"]) == (1, 0, True)


@pytest.mark.parametrize("cycled", [True, False])
@pytest.mark.parametrize("tensor_rate", [True, False])
def test_schedules_stand_where_they_stood(cycled: bool, tensor_rate: bool) -> None:
    """OneCycleLR writes momentum or betas as well, and a rate that is a tensor is written in place."""
    made = setup("mlp", "adam")
    rate = torch.tensor(0.01) if tensor_rate else 0.01
    made.optimizer = torch.optim.Adam(made.model.parameters(), lr=rate, capturable=False, foreach=not tensor_rate)
    made.scheduler = torch.optim.lr_scheduler.OneCycleLR(
        made.optimizer, max_lr=0.02, total_steps=60, cycle_momentum=cycled
    )
    trainer = made.trainer(config(**QUIET))
    for batch in make_batches(10):
        trainer.step(batch)
    point = withdrawal.keep(trainer.run)
    for batch in make_batches(30):
        trainer.step(batch)
    torch.rand(3)
    before = made.everything()
    withdrawal.put_back(trainer.run, point)
    after = made.everything()
    assert_same(after["groups"], before["groups"])
    assert_same(after["scheduler"], before["scheduler"])
    assert_same(after["rng"], before["rng"])
    assert difference(after["parameters"], before["parameters"]) is not None


# ---------------------------------------------------------------- what is compared


@pytest.mark.parametrize("model", ["norm_dropout"])
def test_a_comparison_leaves_no_trace(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, buffers, modes and random numbers are those of before it; its two forwards are counted."""
    made, trainer = runner(model)
    batches = make_batches(450)
    monkeypatch.setattr("hybrid_predict_trainer.judge.guard.Guard.compare", lambda self, a, b: Request.NOTHING)
    ruin(trainer, batches, until=lambda: trainer.run.safety.guard.comparing)
    before, forwards = made.everything(), trainer.run.meter.num_forward
    withdrawal.compare_with_anchor(trainer.run, batches[0])
    assert_same(made.everything(), before)
    assert trainer.run.meter.num_forward == forwards + 2
    trainer.step(batches[1])
    assert trainer.run.optimizer_step.scale.value == 1.0  # all motions rest
    assert trainer.run.optimizer_step.scale.learned > 1


def test_what_cannot_be_compared_withdraws_and_restores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, trainer = runner()
    batches = make_batches(450)
    ruin(trainer, batches, until=lambda: trainer.run.safety.guard.comparing)
    before = made.everything()

    def failing(*args: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(trainer.run.judge.evaluation, "losses_of", failing)
    with pytest.warns(UserWarning, match="the weights stay"):
        withdrawal.compare_with_anchor(trainer.run, batches[0])
    assert_same(made.everything(), before)
    assert trainer.run.safety.guard.withdrawn
    trainer.step(batches[1])


def test_a_failure_at_the_anchor_puts_the_present_weights_back() -> None:
    made, trainer = runner()
    batches = make_batches(450)
    ruin(trainer, batches, until=lambda: trainer.run.safety.guard.comparing)
    before, calls = made.everything(), []

    def second_fails(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("no memory")
        return loss_fn(model, batch)

    put_into_subject(trainer, loss_fn=second_fails)
    with pytest.warns(UserWarning, match="the weights stay"):
        withdrawal.compare_with_anchor(trainer.run, batches[0])
    assert len(calls) > 1
    assert_same(made.everything(), before)


# ---------------------------------------------------------------- a dead run


def deadly(trainer: HybridTrainer, num: int = 3 * BLOCK_STEPS) -> None:
    for batch in make_batches(num):
        trainer.step(batch)


NAN = (torch.full((16, 6), math.nan), torch.zeros(16, 1))


def test_a_dead_run_is_brought_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """While something of ours was on; said once; a second death is the plain loop's."""
    made, trainer = runner()
    kept = kept_states(monkeypatch, made)
    trainer.run.optimizer_step.scale.multiplier.value = 1.5
    deadly(trainer)
    assert kept
    trainer.run.optimizer_step.scale.multiplier.value = 1.5
    with pytest.warns(UserWarning, match=SAID):
        trainer.step_n([NAN] * 21, 21)
    for part in STATE:
        assert_same(made.everything()[part], kept[-1][part])
    assert trainer.statistics()["num_guard_restores"] == 1
    with pytest.raises(DivergenceError, match=r"2\d? steps in a row"):
        trainer.step_n([NAN] * 25, 25)


@pytest.mark.parametrize("ever", [False, True])
def test_a_dead_run_in_which_nothing_of_ours_was_on_ends(ever: bool) -> None:
    """Nor is one brought back in which something was, long before, and did no harm."""
    _, trainer = runner()
    if ever:
        trainer.run.optimizer_step.scale.multiplier.value = 1.5
    deadly(trainer)
    trainer.run.optimizer_step.scale.level()
    assert (trainer.run.safety.safe_point is not None) is ever
    with pytest.raises(DivergenceError, match=r"2\d? steps in a row"):
        trainer.step_n([NAN] * 25, 25)


# ---------------------------------------------------------------- what is not ours


@pytest.mark.parametrize("how", ["requires_grad", "rate 0"])
def test_what_was_frozen_since_stays_when_a_state_comes_back(how: str) -> None:
    """Bit for bit where it was frozen."""
    made = setup("mlp", "adam")
    first, rest = made.model[0], [p for m in made.model[1:] for p in m.parameters()]
    made.optimizer = torch.optim.Adam([{"params": list(first.parameters())}, {"params": rest}], lr=0.01)
    made.scheduler = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda t: 1 / (1 + t / 2000))
    trainer = made.trainer(config(**QUIET))
    trainer.run.optimizer_step.scale.multiplier.value = 1.5
    deadly(trainer, 3 * BLOCK_STEPS + 10)
    assert trainer.run.safety.safe_point is not None
    if how == "requires_grad":
        first.requires_grad_(False)
    else:
        made.optimizer.param_groups[0]["lr"] = made.optimizer.param_groups[0]["initial_lr"] = 0.0
        made.scheduler.base_lrs[0] = 0.0
    frozen = [p.detach().clone() for p in first.parameters()]
    others = [p.detach().clone() for p in rest]
    for batch in make_batches(5):
        trainer.step(batch)
    with pytest.warns(UserWarning, match=SAID):
        assert withdrawal.rescue(trainer.run)
    assert_same([p.detach() for p in first.parameters()], frozen)
    assert difference([p.detach() for p in rest], others) is not None


def test_outside_writes_make_every_point_void() -> None:
    made, trainer = runner()
    trainer.run.optimizer_step.scale.multiplier.value = 1.5
    deadly(trainer)
    trainer.run.safety.raise_point = withdrawal.keep(trainer.run)
    assert trainer.run.safety.safe_point is not None
    with torch.no_grad():
        for p in made.model.parameters():
            p.mul_(0.5)
    with pytest.warns(UserWarning, match="weights were changed between two steps"):
        trainer.step(make_batches(1)[0])
    assert (trainer.run.safety.raise_point, trainer.run.safety.safe_point, trainer.run.safety.guard.anchor_step) == (
        None,
        None,
        -1,
    )
    assert not withdrawal.rescue(trainer.run)


def test_points_are_counted_in_the_memory() -> None:
    _, trainer = runner()
    before = trainer.memory_usage()["snapshots"]
    trainer.run.safety.raise_point = withdrawal.keep(trainer.run)
    one = trainer.memory_usage()["snapshots"] - before
    trainer.run.safety.safe_point = withdrawal.keep(trainer.run)
    assert trainer.memory_usage()["snapshots"] - before == 2 * one > 0


# ---------------------------------------------------------------- resume


def _resumed(model: str, trainer: HybridTrainer, made: Setup, path: Path, batches: Sequence[Any]) -> None:
    """Go on twice, once through the file system into fresh objects, and compare all there is."""
    saved = trainer.save_checkpoint(path)
    again, resumed = runner(model)
    with torch.no_grad():
        for p in again.model.parameters():
            p.add_(1.0)
    seed_all(77)
    resumed.load_checkpoint(saved)
    results = []
    for t in (trainer, resumed):
        if t is resumed:
            resumed.load_checkpoint(saved)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            losses = [repr(t.step(batch).loss) for batch in batches]
        results.append((losses, [str(w.message) for w in said], t.run.state_dict(), t.statistics()))
    assert_same(results[1], results[0])
    assert_same(again.everything(), made.everything())


@pytest.mark.parametrize("model", ["norm_dropout", "mlp"])
def test_resume_in_the_middle_of_a_comparison(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, trainer = runner(model)
    batches = make_batches(450)
    num = ruin(trainer, batches, until=lambda: trainer.run.safety.guard.comparing)
    trainer.run.safety.guard.compare(1.0, 1.0)
    _resumed(model, trainer, made, tmp_path, batches[num : num + 20])
    assert trainer.run.safety.guard.withdrawn


def test_resume_in_the_middle_of_an_open_raise(tmp_path: Path) -> None:
    made, trainer = runner("norm_dropout")
    batches = make_batches(60)
    for batch in batches[:20]:
        trainer.step(batch)
    trainer.run.optimizer_step.scale.multiplier.value = 2.0
    withdrawal.follow_advice(trainer.run, Advice.RAISED)
    for batch in batches[20:25]:
        trainer.step(batch)
    path = tmp_path / "open"
    wanted = [t.clone() for t in trainer.run.safety.raise_point.parameters]
    _resumed("norm_dropout", trainer, made, path, batches[25:40])
    withdrawal.follow_advice(trainer.run, Advice.TAKEN_BACK)
    assert_same([p.detach() for p in made.model.parameters()], wanted)


# ---------------------------------------------------------------- advice


@pytest.mark.parametrize("advice", Advice)
def test_advice_on_a_raise(advice: Advice) -> None:
    made, trainer = runner("batchnorm")
    run = trainer.run
    for batch in make_batches(12):
        trainer.step(batch)
    withdrawal.follow_advice(run, Advice.RAISED)
    kept = made.everything()
    for batch in make_batches(6, seed=9):
        trainer.step(batch)
    before = made.everything()
    withdrawal.follow_advice(run, advice)
    wanted = kept if advice is Advice.TAKEN_BACK else before
    for part in STATE:
        assert_same(made.everything()[part], wanted[part])
    assert (run.safety.raise_point is None) is (advice in (Advice.TAKEN_BACK, Advice.SETTLED))


# ---------------------------------------------------------------- full batches under plain SGD


@pytest.mark.parametrize("rate", [0.01, 0.03, 0.1])
def test_full_batch_regression_under_plain_sgd_is_never_the_worse(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiplier that doubled on a plateau once ended fifteen of fifteen such runs."""
    monkeypatch.undo()  # here everything is awake
    for seed in (0, 1):
        ends = []
        for enabled in (True, False):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
            x = torch.randn(64, 8)
            y = torch.sin(2 * x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3]
            optimizer = torch.optim.SGD(model.parameters(), lr=rate)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - min(t, 160) / 160)
            trainer = HybridTrainer(
                model, optimizer, HybridTrainerConfig(enabled=enabled, seed=seed),
                lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), schedule,
            )  # fmt: skip
            trainer.fit([(x, y)] * 8, total_steps=160)
            with torch.no_grad():
                ends.append(float(nn.functional.mse_loss(model(x), y)))
        assert math.isfinite(ends[0])
        assert ends[0] <= 1.0 * ends[1], (seed, ends)


def test_the_models_of_these_tests_have_what_they_are_named_for() -> None:
    assert any(isinstance(m, nn.BatchNorm1d) for m in make_model("norm_dropout").modules())
