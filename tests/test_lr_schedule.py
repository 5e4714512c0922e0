"""Schedules of every class: recovery, clocks, epochs, a loop that steps them too, and the end of a run."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from hybrid_predict_trainer import ConfigError, HybridTrainer, HybridTrainerConfig, with_values
from hybrid_predict_trainer.move.schedule import count_of

Batch = tuple[torch.Tensor, torch.Tensor]


class Halving:
    """A callable object, as LambdaLR takes one."""

    def __call__(self, step: int) -> float:
        return 0.98**step


class OnlyStep:
    """A schedule of somebody's own: nothing but ``step()``."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.rate = optimizer, 0.1

    def step(self) -> None:
        self.rate *= 0.97
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate


def _sequential(o: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
    return lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 100)], [5]
    )


def _chained(o: torch.optim.Optimizer) -> lr_scheduler.ChainedScheduler:
    inner = lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5, 8), lr_scheduler.ExponentialLR(o, 0.97)])
    return lr_scheduler.ChainedScheduler([inner, lr_scheduler.LinearLR(o, 0.2, total_iters=9)])


TABLE: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, Halving()),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.98),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4, 0.8),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [6, 14, 21], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 19),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=22),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.97),
    "SequentialLR": _sequential,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 60, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 60),
    "ChainedScheduler": _chained,
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=5, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=60, cycle_momentum=False),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=20),
    "only step()": OnlyStep,
}
REFUSED = {"ReduceLROnPlateau"}
#: Never predicts, but watches: the clock is the number of steps.
SETTINGS = with_values(HybridTrainerConfig(), {"training.max_predict_steps": 0, "training.max_lr_multiplier": 1.0})


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))


def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def data(n: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(n)]


def bad() -> Batch:
    return torch.full((8, 4), torch.nan), torch.zeros(8, 1)


def made(
    schedule: Callable[[Any], Any] | None, config: HybridTrainerConfig = SETTINGS, *, lr: float = 0.1, **rest: Any
) -> tuple[HybridTrainer, list[float]]:
    """A trainer, and the list that the rate of every optimizer step is written to."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: rates.append(float(o.param_groups[0]["lr"])))
    built = None if schedule is None else schedule(optimizer)
    return HybridTrainer(model, optimizer, config, loss_fn, built, **rest), rates


def planned(schedule: Callable[[Any], Any] | None, num_steps: int) -> list[float]:
    """The rates of a plain loop."""
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1, momentum=0.9)
    built, rates = None if schedule is None else schedule(optimizer), []
    for _ in range(num_steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if built is not None:
            built.step()
    return rates


# ---- recovery -----------------------------------------------------------------------------------------


def test_no_class_is_forgotten() -> None:
    found = {
        name
        for name, cls in vars(lr_scheduler).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler) and not name.endswith("LRScheduler")
    }
    assert found - REFUSED == set(TABLE) - {"SWALR", "only step()"}


@pytest.mark.parametrize("name", [*TABLE, "none"])
def test_recovery_lowers_a_factor_beside_the_schedule(name: str, tmp_path: Path) -> None:
    schedule = TABLE.get(name)
    want = planned(schedule, 30)
    batches = data(30)
    trainer, rates = made(schedule)
    for batch in [*batches[:12], *[bad()] * 5, *batches[17:22]]:
        trainer.step(batch)
    assert rates == want[:12] + [0.5 * rate for rate in want[17:22]]
    assert trainer.run.learning_rate == 0.5 * want[22]
    own = trainer.run.subject.optimizer.param_groups[0]
    assert float(own["lr"]) == want[22], "between steps the groups hold the schedule's own rate"
    if hasattr(trainer.run.schedule.scheduler, "get_last_lr"):
        assert trainer.run.schedule.scheduler.get_last_lr() == [want[22]]

    path = trainer.save_checkpoint(tmp_path)
    resumed, later = made(schedule)
    resumed.load_checkpoint(path)
    for batch in [*batches[22:24], *[bad()] * 5, batches[29]]:
        resumed.step(batch)
    assert later == [0.5 * rate for rate in want[22:24]] + [0.25 * want[29]]


@pytest.mark.parametrize("name", ["SequentialLR", "OneCycleLR", "only step()"])
def test_a_rollback_takes_the_schedule_back_and_not_the_factor(name: str) -> None:
    trainer, rates = made(TABLE[name])
    run, batches = trainer.run, data(12)
    for batch in batches[:4]:
        trainer.step(batch)
    snapshot, position = run.take_snapshot(), run.schedule.num_steps
    for batch in [*batches[4:6], *[bad()] * 5]:
        trainer.step(batch)
    run.restore(snapshot)
    run.schedule.num_steps = position
    want = planned(TABLE[name], 14)
    assert float(run.subject.optimizer.param_groups[0]["lr"]) == want[4]
    run.step_scheduler()
    assert float(run.subject.optimizer.param_groups[0]["lr"]) == want[11], "the lost steps were spent"
    trainer.step(batches[6])
    assert rates[-1] == 0.5 * want[11]


def test_a_tensor_as_rate_stays_the_same_object() -> None:
    model = network()
    rate = torch.tensor(0.125)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=False, foreach=False)
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(float(o.param_groups[0]["lr"])))
    trainer = HybridTrainer(model, optimizer, SETTINGS, loss_fn)
    for batch in [*data(2), *[bad()] * 5, *data(2)]:
        trainer.step(batch)
    assert seen == [0.125, 0.125, 0.0625, 0.0625]
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == 0.125


def test_an_old_checkpoint_knows_no_factor() -> None:
    trainer, _ = made(TABLE["StepLR"])
    trainer.run.schedule.lower(0.5)
    state = copy.deepcopy(trainer.run.state_dict())
    state["schedule"] = {name: state["schedule"][name] for name in ("num_steps", "peak")}
    trainer.run.load_state_dict(state)
    assert trainer.run.schedule.factor == 1.0


@pytest.mark.parametrize("name", TABLE)
def test_off_and_on_follow_the_schedule_as_a_plain_loop_does(name: str) -> None:
    want = planned(TABLE[name], 12)
    for config in (SETTINGS, HybridTrainerConfig(enabled=False)):
        trainer, rates = made(TABLE[name], config)
        for batch in data(12):
            trainer.step(batch)
        assert rates == want


# ---- a loop that steps the schedule too ------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in TABLE if n != "only step()"])
def test_a_schedule_that_is_stepped_outside_is_named_and_not_stepped_twice(name: str) -> None:
    trainer, _ = made(TABLE[name])
    scheduler = trainer.run.schedule.scheduler

    def loop() -> None:
        for batch in data(20):
            trainer.step(batch)
            scheduler.step()

    with pytest.warns(UserWarning, match=f"{name} was stepped outside the trainer") as caught:
        loop()
    assert len([w for w in caught if "outside" in str(w.message)]) == 1
    first = count_of(scheduler)
    assert first is not None
    assert first <= 21, "20 steps, and the one after the last"


def test_a_schedule_stepped_per_epoch_as_well_keeps_to_the_clock() -> None:
    trainer, _ = made(TABLE["ExponentialLR"])

    def loop() -> None:
        for i, batch in enumerate(data(16), start=1):
            trainer.step(batch)
            if i % 5 == 0:
                trainer.run.schedule.scheduler.step()

    with pytest.warns(UserWarning, match="lr_interval"):
        loop()
    assert trainer.run.schedule.scheduler.last_epoch == 16


def test_a_state_that_is_loaded_is_no_step() -> None:
    trainer, _ = made(TABLE["ExponentialLR"])
    scheduler = trainer.run.schedule.scheduler
    for batch in data(5):
        trainer.step(batch)
    state = copy.deepcopy(scheduler.state_dict())
    for batch in data(5):
        trainer.step(batch)
    scheduler.load_state_dict(state)
    trainer.step(data(1)[0])
    assert scheduler.last_epoch == 6


# ---- epochs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("name", TABLE)
def test_a_schedule_in_epochs_is_stepped_per_pass(name: str, how: str) -> None:
    want = planned(TABLE[name], 5)
    config = SETTINGS if how == "argument" else with_values(SETTINGS, {"training.lr_interval": "epoch"})
    trainer, rates = made(TABLE[name], config, **({"lr_interval": "epoch"} if how == "argument" else {}))
    for _ in range(2):
        trainer.train_epoch(data(3))
    for batch in data(3):
        trainer.step(batch)
    trainer.end_epoch()
    trainer.fit(data(3), total_steps=14)
    assert rates == [rate for rate in want for _ in range(3)][:14]
    assert trainer.run.planned_lr(10) == pytest.approx(10 * want[4])


def test_a_run_in_epochs_resumes_in_the_middle_of_one(tmp_path: Path) -> None:
    batches, found = data(4), []
    for cut in (None, 2, 4):  # saved in the middle of the second epoch, or in its last batch
        trainer, rates = made(TABLE["StepLR"], lr_interval="epoch")
        before: list[float] = []
        if cut is not None:
            for batch in [*batches, *batches[:cut]]:
                if trainer.current_step == 4:
                    trainer.end_epoch()
                trainer.step(batch)
            path = trainer.save_checkpoint(tmp_path / str(cut))
            before = rates
            trainer, rates = made(TABLE["StepLR"], lr_interval="epoch")
            trainer.load_checkpoint(path)
            trainer.fit(Resuming(batches, cut), total_steps=24)
        else:
            trainer.fit(batches, total_steps=24)
        trainer.fit(batches, total_steps=26)
        found.append((before + rates, trainer.run.schedule.scheduler.last_epoch))
    assert found[0] == found[1] == found[2]
    assert found[0][1] == 6


class Resuming:
    """A loader that goes on where its state was saved, in its first pass."""

    def __init__(self, batches: list[Batch], start: int) -> None:
        self.batches, self.start = batches, start

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        start, self.start = self.start, 0
        return iter(self.batches[start:])


def test_a_rollback_does_not_lose_the_end_of_an_epoch() -> None:
    trainer, _ = made(TABLE["ExponentialLR"], lr_interval="epoch")
    run = trainer.run
    trainer.train_epoch(data(3))
    snapshot, position = run.take_snapshot(), run.schedule.num_steps
    trainer.train_epoch(data(3))
    run.restore(snapshot)
    run.schedule.num_steps = position
    trainer.step(data(1)[0])
    assert (run.schedule.scheduler.last_epoch, run.schedule.num_steps) == (2, 2)


def test_an_interval_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr_interval"):
        made(TABLE["StepLR"], lr_interval="batch")
    with pytest.raises(ConfigError, match="did you mean 'epoch'"):
        with_values(SETTINGS, {"training.lr_interval": "epochs"})


def test_a_rate_that_vanishes_in_the_first_epochs_is_doubted_once() -> None:
    trainer, _ = made(lambda o: lr_scheduler.StepLR(o, 10, 0.1))
    with pytest.warns(UserWarning, match=r'StepLR counts epochs, pass lr_interval="epoch"') as caught:
        _ = [trainer.train_epoch(data(40)) for _ in range(4)]
    assert len(caught) == 1


# ---- the end of a run -----------------------------------------------------------------------------------------


class Dividing(torch.optim.SGD):
    """Divides by its rate, as FTRL does: every weight is NaN after a step at rate 0."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_((group["lr"] * (group["lr"] * p.grad)) / group["lr"])


ENDS = {
    "linear to 0": lambda o: lr_scheduler.LambdaLR(o, lambda t: max(0.0, 1 - t / 10)),
    "below 0": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 - t / 10),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 10),
}


@pytest.mark.parametrize("name", ENDS)
def test_steps_beyond_the_planned_end_are_made_at_the_last_rate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A jump on probation keeps a run going: made longer by three here, as one in the last window would."""
    from hybrid_predict_trainer import trainer as module

    ended = module.has_ended
    monkeypatch.setattr(module, "has_ended", lambda run, total: ended(run, None if total is None else total + 3))
    model = network()
    optimizer = Dividing(model.parameters(), lr=0.1)
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: rates.append(o.param_groups[0]["lr"]))
    trainer = HybridTrainer(model, optimizer, SETTINGS, loss_fn, ENDS[name](optimizer))
    trainer.fit(data(20), total_steps=10)
    assert len(rates) == 13
    assert min(rates) > 0
    assert set(rates[10:]) == {rates[9]}
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert trainer.run.schedule.scheduler.last_epoch == 13


def test_a_schedule_that_begins_at_zero_is_followed() -> None:
    schedule = lambda o: lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 4))  # noqa: E731
    trainer, rates = made(schedule)
    trainer.fit(data(8), total_steps=8)
    assert rates == planned(schedule, 8)
    assert rates[0] == 0


def test_no_warning_on_an_ordinary_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer, _ = made(TABLE["OneCycleLR"])
        trainer.fit(data(10), total_steps=30)
