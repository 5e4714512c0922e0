"""The engine that rides along: off it is the plain loop, on it is the trainer's run, detached it was never there."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cases import (
    OPTIMIZERS,
    Fake,
    Setup,
    assert_same,
    config,
    difference,
    full_batch,
    loss_fn,
    make_batches,
    model_for,
    seed_all,
    setup,
)
from hybrid_predict_trainer import CheckpointError, ConfigError, Engine, HybridTrainer, HybridTrainerConfig, attach
from hybrid_predict_trainer.cost import STEP_UNITS
from hybrid_predict_trainer.cycle import correct_step
from hybrid_predict_trainer.records import Phase

#: Everything that moves weights beside the optimizer.
ALL = {"max_lr_multiplier": 100.0, "min_group_factor": 0.01, "lookahead__extrapolation": 0.3,
       "lookahead__damping": 0.25, "lookahead__scope": "all"}  # fmt: skip
SGD12 = {**OPTIMIZERS, "adamax": lambda ps: torch.optim.Adamax(ps, lr=0.01)}


def ride(built: Setup, **kwargs: Any) -> Engine:
    """Attach to what ``setup`` has built."""
    settings = kwargs.pop("settings", None) or config(**kwargs.pop("changes", {}))
    return attach(
        built.model, built.optimizer, settings, loss_fn=kwargs.pop("loss_fn", loss_fn),
        lr_scheduler=kwargs.pop("lr_scheduler", built.scheduler), **kwargs,
    )  # fmt: skip


def drive(
    built: Setup, engine: Engine | None, batches: Iterable[Any], *, accumulate: int = 1, clip: float = 0.0,
    scaler: Any = None, own_schedule: bool = False,
) -> list[float]:  # fmt: skip
    """The loop that everybody writes, with the engine's lines in it; without one the plain loop."""
    losses = []
    seed_all(11)
    built.optimizer.zero_grad()
    for i, batch in enumerate(batches, 1):
        loss = loss_fn(built.model, batch)
        share = loss / accumulate
        (share if scaler is None else scaler.scale(share)).backward()
        losses.append(loss.item())
        if engine is not None:
            engine.note(loss, batch)
        if i % accumulate:
            continue
        if clip:
            if scaler is not None:
                scaler.unscale_(built.optimizer)
            if engine is not None:
                engine.after_backward()
            nn.utils.clip_grad_norm_([p for p in built.model.parameters() if p.requires_grad], clip)
        if scaler is None:
            built.optimizer.step()
        else:
            scaler.step(built.optimizer)
            scaler.update()
        if built.scheduler is not None and (engine is None or own_schedule):
            built.scheduler.step()
        built.optimizer.zero_grad()
    return losses


# ---------------------------------------------------------------- off is off


@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
@pytest.mark.parametrize("optimizer", SGD12)
def test_off_is_the_plain_loop(optimizer: str, scaled: bool, accumulate: int, clip: float) -> None:
    def build() -> tuple[Setup, Any]:
        made = setup(model_for(optimizer, "batchnorm"), "sgd", "constant")
        made.optimizer = SGD12[optimizer](p for p in made.model.parameters() if p.requires_grad)
        made.scheduler = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda t: 1 / (1 + 0.1 * t))
        return made, torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3) if scaled else None

    batches = make_batches(12)
    (plain, scaler), (ours, other) = build(), build()
    wanted = drive(plain, None, batches, accumulate=accumulate, clip=clip, scaler=scaler)
    engine = ride(ours, settings=HybridTrainerConfig(enabled=False), grad_scaler=other)
    assert drive(ours, engine, batches, accumulate=accumulate, clip=clip, scaler=other) == wanted
    assert_same(ours.everything(), plain.everything())
    assert engine.statistics()["num_real_steps"] == 12 // accumulate
    assert "enabled" in engine.why_not
    if scaled:
        assert other.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("changes", [{"max_predict_steps": 0}, {"gate__overhead_budget": 0.0,
                                                               "gate__overhead_budget_exact": 0.0}])  # fmt: skip
@pytest.mark.parametrize("optimizer", ["momentum", "adamw_fused", "adafactor"])
def test_without_a_jump_an_observed_run_is_the_plain_loop(optimizer: str, changes: dict[str, Any]) -> None:
    batches = make_batches(24)
    plain, ours = setup("norm_dropout", optimizer, "lambda"), setup("norm_dropout", optimizer, "lambda")
    wanted = drive(plain, None, batches, accumulate=2, clip=0.1)
    state = plain.everything()
    engine = ride(ours, changes=changes)
    assert drive(ours, engine, batches, accumulate=2, clip=0.1) == wanted
    assert_same(ours.everything(), state)


def test_the_comparison_can_fail() -> None:
    plain, ours = setup("mlp", "sgd"), setup("mlp", "sgd")
    drive(plain, None, make_batches(4))
    drive(ours, ride(ours, settings=HybridTrainerConfig(enabled=False)), make_batches(4, seed=8))
    assert difference(ours.everything(), plain.everything()) is not None


# ---------------------------------------------------------------- one path: the trainer's run, bit for bit

#: Model, optimizer, schedule, data, settings.
RUNS: dict[str, tuple[str, str, str, str, dict[str, Any]]] = {
    "full batch": ("mlp", "adam", "constant", "full", {}),
    "full batch, running statistics": ("batchnorm", "adamw", "lambda", "full", {}),
    "noisy": ("norm_dropout", "momentum", "onecycle", "noisy", {}),
    "noisy, clipped": ("dropout", "adamw", "lambda", "noisy", {"gradient_clip_norm": 0.05}),
    "multiplier and lookahead": ("dropout", "adamw", "lambda", "noisy", ALL),
    "multiplier raised": ("mlp", "sgd", "lambda", "full", ALL),
}


def by_trainer(trainer: HybridTrainer, batches: list[Any], kind: str, num_steps: int) -> None:
    """So many steps; a batch that a jump has used is not trained on where batches differ."""
    i = 0
    while trainer.current_step < num_steps:
        result = trainer.step(batches[min(i, len(batches) - 1)])
        i += bool(result.num_backward) or (kind == "noisy" and result.was_predicted)


def by_engine(built: Setup, engine: Engine, batches: list[Any], kind: str, *, seeded: bool = True) -> None:
    if seeded:
        seed_all(11)
    for batch in batches:
        if kind == "noisy":
            result = engine.between_steps(batch)
            if result is not None and result.consumed:
                continue
        built.optimizer.zero_grad()
        loss = loss_fn(built.model, batch)
        loss.backward()
        engine.note(loss, batch)
        built.optimizer.step()


@pytest.mark.parametrize("name", RUNS)
def test_the_same_run_as_the_trainers(name: str) -> None:
    model, optimizer, scheduler, kind, changes = RUNS[name]
    batches = full_batch(70) if kind == "full" else make_batches(70)
    ours = setup(model, optimizer, scheduler)
    engine = ride(ours, changes=changes, auto=kind == "full")
    by_engine(ours, engine, batches, kind)
    state = ours.everything()
    theirs = setup(model, optimizer, scheduler)
    trainer = theirs.trainer(config(**changes))
    by_trainer(trainer, batches, kind, engine.statistics()["num_steps"])
    assert_same(state, theirs.everything())
    assert_same(engine.statistics(), trainer.statistics())
    assert engine.statistics()["num_jumps_proposed"] > 0
    if kind == "full":
        assert engine.statistics()["num_jumps_accepted"] > 0


def test_a_raise_is_the_trainers_too() -> None:
    """At a hundredth of a good rate the multiplier rises."""
    batches = make_batches(1, 64, noise=0.0) * 130
    changes = {"max_lr_multiplier": 100.0}

    def build() -> Setup:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        return Setup(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 ** (t / 100)))

    ours = build()
    engine = ride(ours, changes=changes)
    by_engine(ours, engine, batches, "full")
    state = ours.everything()
    theirs = build()
    seed_all(11)
    trainer = theirs.trainer(config(**changes))
    by_trainer(trainer, batches, "full", engine.statistics()["num_steps"])
    assert_same(state, theirs.everything())
    assert engine.run.optimizer_step.scale.value == trainer.run.optimizer_step.scale.value > 1


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "taken back"])
@pytest.mark.filterwarnings('ignore:gate.exact = "always"')
def test_probation_ends_as_the_trainers(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correct_step, "probation_passes", lambda probation, threshold: kept)
    batches, changes = full_batch(40), {"gate__exact": "always"}
    ours = setup("norm_dropout", "adamw", "lambda")
    engine = ride(ours, changes=changes)
    by_engine(ours, engine, batches, "full")
    state = ours.everything()
    theirs = setup("norm_dropout", "adamw", "lambda")
    trainer = theirs.trainer(config(**changes))
    by_trainer(trainer, batches, "full", engine.statistics()["num_steps"])
    assert_same(state, theirs.everything())
    assert engine.statistics()["num_jumps_accepted"] > 0
    assert bool(engine.statistics()["num_rollbacks"]) is not kept


# ---------------------------------------------------------------- what is handed over


class WithLoss(nn.Module):
    """Returns its loss, as model libraries do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        out = self.inner(x)
        return {"out": out} if y is None else {"out": out, "loss": nn.functional.mse_loss(out, y)}


def test_a_model_that_returns_its_loss_needs_no_note() -> None:
    """Batch and loss are seen by a hook, and a jump is judged before the forward, on the batch that comes."""
    batches = [{"x": x, "y": y} for x, y in make_batches(60)]
    theirs = WithLoss()
    trainer = HybridTrainer(theirs, torch.optim.Adam(theirs.parameters(), lr=0.01), config(), None)
    model = WithLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    engine = attach(model, optimizer, config())
    for batch in batches:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
        with torch.no_grad():
            model(**batch)  # validation
        model(batch["x"])  # no loss, and a graph that nobody uses
    i = 0
    while i < len(batches):
        i += bool(trainer.step(batches[i]).num_backward)
    stats = engine.statistics()
    assert stats["num_real_steps"] == 60
    assert stats["num_jumps_proposed"] > 0
    assert engine.why_not == ""
    if not stats["num_jumps_accepted"]:
        assert_same([p.detach() for p in model.parameters()], [p.detach() for p in theirs.parameters()])


def test_positional_batches_of_a_model_that_returns_its_loss() -> None:
    model = WithLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    engine = attach(model, optimizer, config())
    for x, y in full_batch(40):
        optimizer.zero_grad()
        model(x, y)["loss"].backward()
        optimizer.step()
    assert engine.statistics()["num_jumps_accepted"] > 0


MISSING: dict[str, tuple[dict[str, Any], Callable[[Engine, Tensor, Any], None], str]] = {
    "nothing": ({}, lambda e, loss, batch: None, "no loss was handed over"),
    "no batch": ({}, lambda e, loss, batch: e.note(loss), "no batch was handed over"),
    "no loss function": ({"loss_fn": None}, lambda e, loss, batch: e.note(loss, batch), "there is no loss_fn"),
    "never asked": ({"auto": False}, lambda e, loss, batch: e.note(loss, batch), "does not call"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_said_once_and_nothing_is_proposed(name: str) -> None:
    kwargs, hand_over, said = MISSING[name]
    plain, built = setup("mlp", "adam"), setup("mlp", "adam")
    engine = ride(built, **kwargs)
    with pytest.warns(UserWarning, match=said) as told:  # noqa: PT031 - all steps
        for batch in full_batch(30):
            built.optimizer.zero_grad()
            loss = loss_fn(built.model, batch)
            loss.backward()
            hand_over(engine, loss, batch)
            built.optimizer.step()
    assert len(told) == 1
    assert said in str(told[0].message)
    if name != "nothing":
        assert said in engine.why_not
    assert engine.statistics()["num_jumps_proposed"] == 0
    assert engine.statistics()["num_real_steps"] == 30
    drive(plain, None, full_batch(30))
    assert_same(built.everything()["parameters"], plain.everything()["parameters"])


def test_accumulated_batches_are_judged_together() -> None:
    built = setup("mlp", "adam")
    engine = ride(built)
    x, y = full_batch(1, 32)[0]
    halves = [(x[:16], y[:16]), (x[16:], y[16:])] * 40
    drive(built, engine, halves, accumulate=2)
    stats = engine.statistics()
    assert stats["num_real_steps"] == 40
    assert stats["num_jumps_accepted"] > 0
    assert engine.run.full_batch


def test_a_wrong_loss_is_one_line() -> None:
    engine = ride(setup("mlp"))
    with pytest.raises(TypeError, match=r"real scalar, not of shape \(3,\)"):
        engine.note(torch.zeros(3))
    engine.note(1.5)


CLIPS: dict[str, tuple[float, bool, str]] = {
    "clipped": (0.05, False, "gradients were multiplied by 0.0"),
    "clipped, and the engine has looked before": (0.05, True, ""),
    "a limit that is never reached": (100.0, False, ""),
    "not clipped": (0.0, False, ""),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
@pytest.mark.parametrize("name", CLIPS)
def test_clipping_that_the_engine_does_not_see_is_said(name: str, scaled: bool) -> None:
    limit, looks, said = CLIPS[name]
    built = setup("mlp", "adam")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    engine = ride(built, grad_scaler=scaler, changes={"gate__overhead_budget": 0.0})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for batch in make_batches(20):
            built.optimizer.zero_grad()
            loss = loss_fn(built.model, batch)
            (loss if scaler is None else scaler.scale(loss)).backward()
            engine.note(loss, batch)
            if limit:
                if scaler is not None:
                    scaler.unscale_(built.optimizer)
                if looks:
                    engine.after_backward()
                nn.utils.clip_grad_norm_(built.model.parameters(), limit)
            if scaler is None:
                built.optimizer.step()
            else:
                scaler.step(built.optimizer)
                scaler.update()
    assert [str(w.message)[: len(said)] for w in told] == ([said] if said else [])
    assert engine.result is not None
    assert (float(engine.result.gradient_norm_tensor) > 0.06) is (said == ""), "the norm before clipping"


# ---------------------------------------------------------------- what loops do


def overflowing(count: int) -> list[Any]:
    """Labels so large that gradients times 2**127 are not finite."""
    return [(x, 100 * y) for x, y in make_batches(count)]


def test_scaler_overflow_is_noticed_and_skipped() -> None:
    """A scale that is far too large: steps are left out until it fits, and no hook tells."""
    built = setup("batchnorm", "adam")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    engine = ride(built, grad_scaler=scaler)
    drive(built, engine, overflowing(30), scaler=scaler)
    stats = engine.statistics()
    assert stats["num_skipped_steps"] > 3
    assert stats["num_real_steps"] + stats["num_skipped_steps"] == 30
    assert engine.run.monitor.num_consecutive_critical == 0, "a search is no divergence"


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # torch's, of a first step that is left out
def test_scaler_is_the_trainers_run() -> None:
    batches = overflowing(40)
    theirs, ours = setup("batchnorm", "adamw", "lambda"), setup("batchnorm", "adamw", "lambda")
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=5) for _ in range(2)]
    changes = {"max_predict_steps": 0}
    trainer = theirs.trainer(config(**changes), grad_scaler=scalers[0])
    for batch in batches:
        trainer.step(batch)
    engine = ride(ours, changes=changes, grad_scaler=scalers[1])
    drive(ours, engine, batches, scaler=scalers[1])
    assert engine.statistics()["num_skipped_steps"] == trainer.statistics()["num_skipped_steps"] > 0
    assert_same(ours.everything()["parameters"], theirs.everything()["parameters"])
    assert_same(ours.everything()["scheduler"], theirs.everything()["scheduler"])


def test_a_fused_optimizer_that_unscales_itself() -> None:
    plain, built = setup("mlp", "adamw_fused"), setup("mlp", "adamw_fused")
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    drive(plain, None, make_batches(10), scaler=scalers[0])
    engine = ride(built, changes={"max_predict_steps": 0}, grad_scaler=scalers[1])
    drive(built, engine, make_batches(10), scaler=scalers[1])
    assert engine.result is not None
    assert float(engine.result.gradient_norm_tensor) < 100, "the norm is that of the gradients, not of scaled ones"
    assert_same(built.everything(), plain.everything())


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_fused"])
def test_a_step_that_overflows_counts_once(optimizer: str, enabled: bool) -> None:
    """A scaler calls a fused optimizer all the same, and lowers its scale after it."""
    built = setup("mlp", optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine = ride(built, changes={"enabled": enabled}, grad_scaler=scaler)
    for i, batch in enumerate(make_batches(8)):
        built.optimizer.zero_grad()
        loss = loss_fn(built.model, batch)
        scaler.scale(loss).backward()
        if i == 4:
            next(p for p in built.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        engine.note(loss, batch)
        scaler.step(built.optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert engine.run.meter.num_attempted_steps == 8
    assert engine.statistics()["num_skipped_steps"] == (1 if enabled else 0)
    assert not engine.why_not or not enabled


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_is_not_finite_is_left_out(set_to_none: bool) -> None:
    built = setup("batchnorm", "adamw", "lambda")
    engine = ride(built)
    before: dict[str, Any] = {}
    for i, (x, y) in enumerate(make_batches(20)):
        built.optimizer.zero_grad(set_to_none=set_to_none)
        loss = loss_fn(built.model, (x, y * (float("nan") if i == 10 else 1)))
        if i == 10:
            before = built.everything()
        loss.backward()
        engine.note(loss, (x, y))
        built.optimizer.step()
        if i == 10:
            assert_same(built.everything()["parameters"], before["parameters"])
            assert_same(built.everything()["optimizer"], before["optimizer"])
            assert all(p.grad is not None for p in built.model.parameters()), "the loop's gradients are there again"
    assert engine.statistics()["num_skipped_steps"] == 1


def raising(*args: Any) -> None:
    raise ValueError("no")


def test_an_exception_between_backward_and_step() -> None:
    """The step that never was leaves nothing behind, and the loop goes on."""
    built = setup("mlp", "adam", "lambda")
    engine = ride(built, changes=ALL)
    for i, batch in enumerate(make_batches(40)):
        built.optimizer.zero_grad()
        loss = loss_fn(built.model, batch)
        loss.backward()
        engine.note(loss, batch)
        if i % 7 == 3:
            engine.after_backward()
            continue  # as a loop that catches the exception would
        built.optimizer.step()
    assert engine.statistics()["num_real_steps"] == 40 - 6


def test_an_exception_in_the_optimizers_step_puts_the_rate_back() -> None:
    built = setup("mlp", "adam", "lambda")
    engine = ride(built, changes={"max_lr_multiplier": 100.0})
    engine.run.schedule.lower(0.5)
    rate = built.optimizer.param_groups[0]["lr"]
    drive(built, engine, make_batches(1))
    handle = built.optimizer.register_step_pre_hook(raising)
    with pytest.raises(ValueError, match="no"):
        drive(built, engine, make_batches(1))
    handle.remove()
    drive(built, engine, make_batches(3))
    engine.detach()
    assert built.optimizer.param_groups[0]["lr"] == rate / (1 + 0.1 * 4)
    assert engine.statistics()["num_real_steps"] == 4


def test_a_closure_has_its_station_behind_it() -> None:
    plain, built = setup("mlp", "adam"), setup("mlp", "adam")
    drive(plain, None, make_batches(12))
    engine = ride(built, changes={"max_predict_steps": 0})
    for i, batch in enumerate(make_batches(12)):

        def closure(batch: Any = batch) -> Tensor:
            built.optimizer.zero_grad()
            loss = loss_fn(built.model, batch)
            loss.backward()
            return loss

        engine.note(batch=batch)
        built.optimizer.step(closure) if i % 2 else built.optimizer.step(closure=closure)
    assert engine.statistics()["num_real_steps"] == 12
    assert engine.result is not None
    assert engine.result.gradient_norm_tensor is not None
    assert engine.result.loss > 0
    assert_same(built.everything(), plain.everything())


def test_two_steps_per_batch_and_two_optimizers_on_one_model() -> None:
    """A second step has a loss of its own or is only counted; another optimizer's weights are left alone."""
    built = setup("mlp", "adam")
    first, last = built.model[0], built.model[-1]
    generator = torch.optim.Adam(first.parameters(), lr=0.01)
    other = torch.optim.Adam(last.parameters(), lr=0.01)
    engine = attach(built.model, generator, config(), loss_fn=loss_fn)
    both = attach(built.model, other, config(), loss_fn=loss_fn)
    with pytest.warns(UserWarning, match="no loss was handed over"):  # noqa: PT031 - all steps
        for batch in full_batch(30):
            built.model.zero_grad()
            loss = loss_fn(built.model, batch)
            loss.backward(retain_graph=True)
            engine.note(loss, batch)
            both.note(loss, batch)
            generator.step()
            other.step()
            generator.step()
    assert engine.statistics()["num_real_steps"] == 60
    assert both.statistics()["num_real_steps"] == 30


def test_evaluation_mode_compiled_models_and_freed_batches() -> None:
    model = WithLoss().eval()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    engine = attach(compiled, optimizer, config())
    for x, y in make_batches(12):
        optimizer.zero_grad()
        compiled(x=x, y=y)["loss"].backward()
        optimizer.step()
    assert engine.statistics()["num_real_steps"] == 12
    assert engine.run.losses.history.loss_ema.mean > 0


@pytest.mark.filterwarnings("ignore:no batch was handed over")
def test_a_batch_that_the_loop_writes_to_or_frees() -> None:
    built = setup("mlp", "adam")
    engine = ride(built)
    for x, y in make_batches(40):
        x, y = x.clone(), y.clone()
        built.optimizer.zero_grad()
        loss = loss_fn(built.model, (x, y))
        loss.backward()
        engine.note(loss, (x, y))
        x.zero_()
        y.untyped_storage().resize_(0)
        built.optimizer.step()
    assert engine.statistics()["num_real_steps"] == 40


def test_a_loss_that_is_noted_after_the_step_counts_for_the_next() -> None:
    built = setup("mlp", "adam")
    engine = ride(built)
    with pytest.warns(UserWarning, match=r"no loss was handed over|behind optimizer.step\(\)") as told:  # noqa: PT031 - all steps
        for batch in full_batch(30):
            built.optimizer.zero_grad()
            loss = loss_fn(built.model, batch)
            loss.backward()
            built.optimizer.step()
            engine.note(loss, batch)
    assert len(told) == 2, "that there was none, and that it came late"
    assert engine.statistics()["num_real_steps"] == 30


def test_between_steps_in_the_middle_of_a_step() -> None:
    built = setup("mlp", "adam")
    engine = ride(built, auto=False)
    engine.note(1.0)
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        engine.between_steps()


# ---------------------------------------------------------------- wrappers, and what has no hooks


class Wrapper(Optimizer):
    """As accelerate's: an optimizer by class, whose hooks raise."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def defaults(self) -> Any:  # type: ignore[override]
        return self.optimizer.defaults

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)


class NoHooks:
    """An optimizer of somebody who knows nothing of torch's."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": 0.05}]
        self.state: dict[Any, Any] = {}
        self.defaults: dict[str, Any] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p -= self.param_groups[0]["lr"] * p.grad


def test_the_optimizer_inside_a_wrapper_is_taken() -> None:
    built, plain = setup("mlp", "adam"), setup("mlp", "adam")
    drive(plain, None, make_batches(10))
    wrapper = Wrapper(built.optimizer)
    engine = attach(built.model, wrapper, config(max_predict_steps=0), loss_fn=loss_fn)
    assert engine.run.subject.optimizer is built.optimizer
    built.optimizer = wrapper
    drive(built, engine, make_batches(10))
    assert engine.statistics()["num_real_steps"] == 10


def test_where_no_hook_fires_the_loop_calls_the_stations() -> None:
    built = setup("mlp", "sgd")
    optimizer = NoHooks(built.model.parameters())
    with pytest.warns(UserWarning, match=r"has no step hooks: call engine.before_step\(\).*engine.after_step\(\)"):
        engine = attach(built.model, optimizer, config(), loss_fn=loss_fn)  # type: ignore[arg-type]
    assert len(engine.missing) == 2
    for batch in full_batch(30):
        optimizer.zero_grad()
        loss = loss_fn(built.model, batch)
        loss.backward()
        engine.note(loss, batch)
        engine.before_step()
        optimizer.step()
        engine.after_step()
    assert engine.statistics()["num_real_steps"] == 30
    assert engine.statistics()["num_jumps_accepted"] > 0


REFUSED: dict[str, tuple[Callable[[Setup], Any], str]] = {
    "closures": (
        lambda s: attach(s.model, torch.optim.LBFGS(s.model.parameters()), loss_fn=loss_fn), "LBFGS",
    ),
    "twice": (lambda s: (ride(s), ride(s)), "rides along with this optimizer already"),
    "plateau": (
        lambda s: ride(s, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(s.optimizer)), "ReduceLROnPlateau",
    ),
    "schedule": (lambda s: ride(s, schedule="mine"), "must be owned, external or shared"),
    "unseen": (lambda s: ride(s, schedule="external"), "pass lr_scheduler="),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said):
        make(setup("mlp", "adam"))


# ---------------------------------------------------------------- the schedule


def test_a_schedule_that_the_loop_steps_too_is_noticed() -> None:
    built = setup("mlp", "adam", "lambda")
    engine = ride(built, changes={"max_predict_steps": 0})
    with pytest.warns(UserWarning, match="was stepped outside the trainer"):
        drive(built, engine, make_batches(10), own_schedule=True)
    assert built.scheduler is not None
    assert built.scheduler.last_epoch <= 11


def test_an_external_schedule_is_the_loops_and_what_is_owed_can_be_asked_for() -> None:
    built = setup("mlp", "adam", "lambda")
    assert built.scheduler is not None
    engine = ride(built, schedule="external", changes={"clock": "claimed"})
    assert engine.clock == "loop"
    batches, before, after = full_batch(60), [], []
    for batch in batches:
        drive(built, engine, [batch])
        before.append(engine.owed_schedule_steps())
        built.scheduler.step()
        after.append(engine.owed_schedule_steps())
        assert before[-1] == after[-1], "before or after its own step"
        for _ in range(after[-1]):
            built.scheduler.step()
        assert engine.owed_schedule_steps() == 0
    stats = engine.statistics()
    assert stats["num_jumps_accepted"] > 0
    assert sum(after) == stats["num_claimed_steps"]
    assert built.scheduler.last_epoch == engine.position


def test_a_rollback_leaves_an_external_schedule_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correct_step, "probation_passes", lambda probation, threshold: False)
    built = setup("mlp", "adam")
    # computes its rate from the last one: a rate of before the jump would stay wrong for ever
    built.scheduler = torch.optim.lr_scheduler.ExponentialLR(built.optimizer, 0.99)
    engine = ride(built, schedule="external")
    drive(built, engine, full_batch(40), own_schedule=True)
    assert engine.statistics()["num_rollbacks"] > 0
    assert built.scheduler.last_epoch == 40
    assert built.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.99**40)


# ---------------------------------------------------------------- the end


def test_detached_the_loop_is_the_plain_loop() -> None:
    plain, built = setup("norm_dropout", "adamw", "lambda"), setup("norm_dropout", "adamw", "lambda")
    hooks = [dict(built.optimizer._optimizer_step_pre_hooks), dict(built.optimizer._optimizer_step_post_hooks)]
    batches = make_batches(30)
    with ride(built, changes={**ALL, "encoder__kfac": True, "predictor_type": "linear"}) as engine:
        drive(built, engine, batches[:20])
    assert [dict(built.optimizer._optimizer_step_pre_hooks), dict(built.optimizer._optimizer_step_post_hooks)] == hooks
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in built.model.modules())
    plain.model.load_state_dict(built.model.state_dict())
    plain.optimizer.load_state_dict(copy.deepcopy(built.optimizer.state_dict()))
    assert plain.scheduler is not None
    assert built.scheduler is not None
    plain.scheduler.load_state_dict({**built.scheduler.state_dict(), "lr_lambdas": [None]})
    drive(built, None, batches[20:])
    state = built.everything()
    drive(plain, None, batches[20:])
    assert_same(state, plain.everything())
    engine.detach()
    with pytest.raises(RuntimeError, match="detached"):
        engine.note(1.0)
    attach(built.model, built.optimizer, config(), loss_fn=loss_fn).detach()


def test_copies_of_model_and_optimizer_do_not_ride_along() -> None:
    model = WithLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    engine = attach(model, optimizer, config())
    average = copy.deepcopy(model)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    own = torch.optim.Adam(average.parameters(), lr=0.01)
    copied = copy.deepcopy(optimizer)
    for other in (average, loaded):
        x, y = make_batches(1)[0]
        other(x=x, y=y)["loss"].backward()
    own.step()
    copied.step()
    assert engine.statistics()["num_steps"] == 0
    assert engine._intake.seen.empty


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("kind", ["full", "noisy"])
@pytest.mark.parametrize("where", [17, 33])
def test_resume_from_the_engines_state_is_bitwise(kind: str, where: int) -> None:
    batches = full_batch(60) if kind == "full" else make_batches(60)
    straight = setup("mlp", "adam", "lambda")
    engine = ride(straight, changes=ALL, auto=kind == "full")
    by_engine(straight, engine, batches, kind)
    state = straight.everything()
    first = setup("mlp", "adam", "lambda")
    engine1 = ride(first, changes=ALL, auto=kind == "full")
    by_engine(first, engine1, batches[:where], kind)
    assert first.scheduler is not None
    stream = io.BytesIO()
    torch.save(
        {
            "model": first.model.state_dict(), "optimizer": first.optimizer.state_dict(),
            "scheduler": first.scheduler.state_dict(), "engine": engine1.state_dict(), "rng": torch.get_rng_state(),
        },
        stream,
    )  # fmt: skip
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    second = setup("mlp", "adam", "lambda", seed=4)
    assert second.scheduler is not None
    engine2 = ride(second, changes=ALL, auto=kind == "full")
    second.model.load_state_dict(saved["model"])
    second.optimizer.load_state_dict(saved["optimizer"])
    second.scheduler.load_state_dict(saved["scheduler"])
    engine2.load_state_dict(saved["engine"])
    torch.set_rng_state(saved["rng"])
    by_engine(second, engine2, batches[where:], kind, seeded=False)
    assert_same(second.everything(), state)
    assert_same(engine2.statistics(), engine.statistics())


BROKEN: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "no engine": lambda s: {k: v for k, v in s.items() if k != "engine"},
    "no tree": lambda s: {**s, "tree": "{"},
    "no tensors": lambda s: {**s, "tensors": {}},
    "another phase": lambda s: {**s, "engine": {**s["engine"], "decision": {"phase": "none"}}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_changes_nothing(name: str) -> None:
    built = setup("mlp", "adam")
    engine = ride(built)
    drive(built, engine, full_batch(20))
    before, own = built.everything(), engine.state_dict()
    with pytest.raises(CheckpointError):
        engine.load_state_dict(BROKEN[name](own))
    assert_same(built.everything(), before)
    assert_same(engine.state_dict()["tree"], own["tree"])


def test_the_engine_writes_checkpoints_and_goes_on_from_them(tmp_path: Any) -> None:
    batches = full_batch(40)
    changes = {"checkpoint__save_interval": 10, "checkpoint__keep_last_n": 2}
    straight = setup("dropout", "adamw", "lambda")
    by_engine(straight, ride(straight, changes=changes), batches, "full")
    state = straight.everything()
    first = setup("dropout", "adamw", "lambda")
    changes["checkpoint__directory"] = str(tmp_path)
    engine = ride(first, changes=changes)
    by_engine(first, engine, batches[:35], "full")
    written = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert len(written) == 2
    second = setup("dropout", "adamw", "lambda", seed=3)
    again = ride(second, changes=changes)
    again.load_checkpoint(tmp_path / max(written, key=lambda name: int(name.rpartition("_")[2])))
    done = again.run.meter.num_attempted_steps
    assert 0 < done <= 35
    by_engine(second, again, batches[done:], "full", seeded=False)
    assert_same(second.everything(), state)


def test_what_the_loop_updates_after_the_step_is_saved_where_it_says(tmp_path: Any) -> None:
    built = setup("mlp", "adam", "lambda")
    changes = {"checkpoint__save_interval": 5, "checkpoint__directory": str(tmp_path), "max_predict_steps": 0}
    engine = ride(built, schedule="external", changes=changes)
    drive(built, engine, make_batches(7), own_schedule=True)
    assert not list(tmp_path.iterdir())
    engine.save_if_due()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["checkpoint_step_7"]


def test_phases_are_reported() -> None:
    built = setup("mlp", "adam")
    engine = ride(built, predictor=Fake())
    assert engine.result is None
    drive(built, engine, full_batch(3))
    assert engine.result is not None
    assert engine.result.phase is Phase.WARMUP
    assert engine.summary()["training_summary"]["total_steps"] == 3


# ---------------------------------------------------------------- drivers


def test_a_closures_loss_is_not_handed_over_twice() -> None:
    """A framework whose closure calls ``after_backward``: the step that was looked at is the one that is taken."""
    plain, ours = setup("mlp", "adam"), setup("mlp", "adam")
    engine = ride(ours, auto=False, predictor=Fake())
    for batch in make_batches(12):

        def closure(built: Setup, riding: Engine | None, batch: Any = batch) -> Tensor:
            built.optimizer.zero_grad()
            loss = loss_fn(built.model, batch)
            loss.backward()
            if riding is not None:
                riding.note(loss, batch)
                riding.after_backward()
            return loss

        engine.between_steps(batch)
        ours.optimizer.step(lambda: closure(ours, engine))
        plain.optimizer.step(lambda: closure(plain, None))
    assert engine.statistics()["num_jumps_proposed"] > 0
    assert engine.statistics()["num_real_steps"] == 12
    assert engine.why_not == ""


class _Sharing(torch.optim.Adam):
    """A wrapper that is an optimizer by class and hands over everything of the one inside, its hooks too."""

    def __init__(self, inner: Optimizer) -> None:
        self.optimizer = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step()


def test_of_a_wrapper_that_shares_its_hooks_the_optimizer_inside_is_taken() -> None:
    built = setup("mlp", "adam")
    engine = attach(built.model, _Sharing(built.optimizer), config(), loss_fn=loss_fn)
    drive(built, engine, make_batches(3))
    assert engine.statistics()["num_real_steps"] == 3


def test_a_shared_schedule_takes_what_it_is_owed_before_the_next_step() -> None:
    built = setup("mlp", "adam", "lambda")
    engine = ride(built, schedule="shared", changes={"clock": "claimed"})
    assert built.scheduler is not None
    drive(built, engine, full_batch(40), own_schedule=True)
    claimed = engine.statistics()["num_claimed_steps"]
    assert claimed > 0
    assert built.scheduler.last_epoch + engine.owed_schedule_steps() == engine.position
    assert built.scheduler.last_epoch > 40  # more than the loop's own steps


def test_a_schedule_in_epochs_is_owed_nothing() -> None:
    built = setup("mlp", "adam", "lambda")
    engine = ride(built, schedule="external", changes={"clock": "claimed"}, lr_interval="epoch")
    drive(built, engine, full_batch(40))
    assert engine.statistics()["num_claimed_steps"] > 0
    assert engine.owed_schedule_steps() == 0


class _Opaque:
    """A loss of somebody's own that holds what nobody can copy."""

    def __init__(self) -> None:
        self.stream = (i for i in range(3))
        self.teacher = nn.Linear(2, 2)
        self.teacher.stream = self.stream  # type: ignore[assignment]

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return loss_fn(model, batch)


def test_the_state_in_a_folder_goes_on_bit_for_bit(tmp_path: Any) -> None:
    batches = make_batches(30)
    straight = setup("mlp", "adam", "lambda")
    drive(straight, ride(straight, loss_fn=_Opaque()), batches)
    first = setup("mlp", "adam", "lambda")
    engine = ride(first, loss_fn=_Opaque())
    drive(first, engine, batches[:17])
    engine.save_state(tmp_path)
    engine.save_state(tmp_path)  # the later one replaces the earlier
    second = setup("mlp", "adam", "lambda", seed=2)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert second.scheduler is not None
    assert first.scheduler is not None
    second.scheduler.load_state_dict(first.scheduler.state_dict())
    other = ride(second, loss_fn=_Opaque())
    other.load_state(tmp_path)
    assert other.report()["refused"] == engine.report()["refused"]
    drive(second, other, batches[17:])
    assert_same(second.everything()["parameters"], straight.everything()["parameters"])


def test_a_folder_without_a_state_is_refused(tmp_path: Any) -> None:
    built = setup("mlp", "adam")
    engine = ride(built)
    with pytest.raises(CheckpointError):
        engine.load_state(tmp_path)
    drive(built, engine, make_batches(2))
    trainer = setup("mlp", "adam").trainer(config())
    trainer.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no state of an engine"):
        engine.load_state(tmp_path)


def test_the_report_says_what_came_of_it() -> None:
    built = setup("mlp", "adam", "lambda")
    engine = ride(built, predictor=Fake(), changes=ALL)
    drive(built, engine, make_batches(60))
    report, said = engine.report(), engine.report_text()
    statistics = engine.statistics()
    assert report["num_jumps_proposed"] == statistics["num_jumps_proposed"] > 0
    kept = report["num_jumps_accepted"] + sum(report["refused"].values())
    assert kept == report["num_jumps_proposed"]  # every proposal was accepted, or refused for a reason
    assert report["cost_steps"] == pytest.approx(statistics["cost_units"] / STEP_UNITS)
    assert 0 < report["own_seconds"] < report["seconds"]
    assert all(f"refused {n} times: {reason}" in said for reason, n in report["refused"].items())
    assert "hpt compare" in said
    assert repr(engine).startswith("Engine(Sequential, Adam, attached, ")
