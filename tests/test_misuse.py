"""A loop that uses the engine otherwise than it is meant: said once, at the user's line, with what to call."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hybrid_predict_trainer
from cases import Setup, config, full_batch, loss_fn, make_batches, setup
from hybrid_predict_trainer import CheckpointError, Engine, HybridTrainer, HybridTrainerConfig, StepModifier, attach
from hybrid_predict_trainer.config.toml import load, with_values
from hybrid_predict_trainer.cycle import state as state_module
from hybrid_predict_trainer.judge.validation import Validation
from hybrid_predict_trainer.keep.failures import Place

BATCH = full_batch(1)[0]
ROOT = Path(hybrid_predict_trainer.__file__).parent


def riding(built: Setup, settings: HybridTrainerConfig | None = None, **kwargs: Any) -> Engine:
    return attach(built.model, built.optimizer, settings or config(), **{"loss_fn": loss_fn, **kwargs})


def step(built: Setup, engine: Engine, optimizer: Any = None, loss_of: Callable[..., Tensor] = loss_fn) -> None:
    optimizer = optimizer or built.optimizer
    optimizer.zero_grad()
    loss = loss_of(built.model, BATCH)
    loss.backward()
    engine.note(loss, BATCH)
    optimizer.step()


@contextmanager
def recorded() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield told


# ---------------------------------------------------------------- an optimizer that is replaced


class OfData:
    """Writes past the version counters, as optimizers of before 2019 do."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = list(parameters)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        for p in self.parameters:
            p.data.add_(p.grad, alpha=-0.01)


class WithLoss(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.inner(x), y)}


@pytest.mark.parametrize("other", [lambda ps: torch.optim.SGD(ps, lr=0.01), OfData], ids=["in place", ".data"])
def test_an_optimizer_that_is_replaced_is_said_once_and_nothing_is_held(other: Any) -> None:
    built = setup("mlp", "adam")
    engine = riding(built)
    for _ in range(5):
        step(built, engine)
    assert engine.why_not == ""
    replacement = other(built.model.parameters())
    with pytest.warns(UserWarning, match=r"without a step of the Adam .* engine.detach\(\) and attach") as told:  # noqa: PT031
        for _ in range(20):
            step(built, engine, replacement)
            assert len(engine._intake.loop._batches) <= 2
            assert len(engine._intake.loop._losses) <= 2
    assert len(told) == 1
    assert "engine.detach() and attach" in engine.why_not
    with warnings.catch_warnings():  # the weights are others than the run left, which is said elsewhere
        warnings.simplefilter("ignore")
        step(built, engine)
    assert engine.why_not == ""


def test_an_optimizer_that_is_replaced_is_seen_by_the_hook_on_the_model() -> None:
    model = WithLoss(setup("mlp").model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    engine = attach(model, optimizer, config())
    x, y = make_batches(1)[0]
    replacement = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.warns(UserWarning, match="without a step of the Adam"):  # noqa: PT031
        for _ in range(10):
            replacement.zero_grad()
            model(x=x, y=y)["loss"].backward()
            replacement.step()
            assert len(engine._intake.seen._batches) <= 2


@pytest.mark.parametrize("writes", [False, True], ids=["as they are", "clipped after every step"])
def test_accumulation_is_no_other_optimizer(writes: bool) -> None:
    built = setup("mlp", "adam")
    engine = riding(built, HybridTrainerConfig(enabled=True))
    with recorded() as told:
        for i, batch in enumerate(make_batches(24), 1):
            loss = loss_fn(built.model, batch)
            (loss / 4).backward()
            engine.note(loss, batch)
            if i % 4 == 0:
                built.optimizer.step()
                built.optimizer.zero_grad()
                if writes:
                    for p in built.model.parameters():
                        p.data.mul_(0.999)
    assert not [w for w in told if "without a step" in str(w.message)]
    assert engine.run.meter.num_real_steps == 6


# ---------------------------------------------------------------- losses that come late


def _late(built: Setup, engine: Engine) -> None:
    built.optimizer.zero_grad()
    loss = loss_fn(built.model, BATCH)
    loss.backward()
    built.optimizer.step()
    engine.note(loss, BATCH)


def _before_backward(built: Setup, engine: Engine) -> None:
    built.optimizer.zero_grad()
    loss = loss_fn(built.model, BATCH)
    engine.note(loss, BATCH)
    loss.backward()
    built.optimizer.step()


def _before_zero_grad(built: Setup, engine: Engine) -> None:
    loss = loss_fn(built.model, BATCH)
    engine.note(loss, BATCH)
    built.optimizer.zero_grad()
    loss.backward()
    built.optimizer.step()


def test_a_loss_that_is_noted_behind_its_step_is_said_once() -> None:
    built = setup("mlp", "adam")
    engine = riding(built)
    with recorded() as told:
        for _ in range(8):
            _late(built, engine)
    said = [str(w.message) for w in told]
    assert len(said) == 2
    assert "no loss was handed over" in said[0]
    assert "behind optimizer.step()" in said[1]
    assert "call it before optimizer.step()" in said[1]


@pytest.mark.parametrize("loop", [step, _before_backward, _before_zero_grad])
def test_a_loss_in_time_is_not_called_late(loop: Callable[[Setup, Engine], None]) -> None:
    built = setup("mlp", "adam")
    engine = riding(built)
    with recorded() as told:
        for _ in range(8):
            loop(built, engine)
    assert not told
    assert engine.why_not == ""


# ---------------------------------------------------------------- why nothing is proposed


def _broken_gate(model: nn.Module, batch: Any) -> Tensor:
    raise ValueError("a loss that cannot be had")


@pytest.mark.parametrize("place", [Place.GATE, Place.PREDICTOR, Place.FEEDBACK, Place.WEIGHTS])
def test_why_not_says_what_has_failed_too_often(place: Place) -> None:
    built = setup("mlp", "adam")
    engine = riding(built)
    step(built, engine)
    with pytest.warns(UserWarning, match="training goes on"):
        engine.run.failures.note(place, ValueError("it cannot be had"), name="secant")
    engine.run.failures.note(place, ValueError("nor that"))
    assert engine.why_not == ""
    engine.run.failures.note(place, ValueError("nor that"))
    assert "ValueError: it cannot be had" in engine.why_not
    assert "''" not in engine.why_not
    assert engine.why_not in engine.report_text()


def test_why_not_says_that_jumps_were_switched_off() -> None:
    built = setup("mlp", "adam")
    engine = riding(built)
    step(built, engine)
    assert engine.why_not == ""
    engine.run.judge.ledger.switch_off()
    assert "switched off" in engine.why_not


# ---------------------------------------------------------------- states of the middle of a step


def _backward(built: Setup, engine: Engine) -> None:
    built.optimizer.zero_grad()
    loss = loss_fn(built.model, BATCH)
    loss.backward()
    engine.note(loss, BATCH)


def _looked_at(built: Setup, engine: Engine) -> None:
    _backward(built, engine)
    engine.after_backward()


@pytest.mark.parametrize("middle", [_backward, _looked_at])
def test_a_save_in_the_middle_of_a_step_is_not_silent(
    tmp_path: Path, middle: Callable[[Setup, Engine], None], notices: list[str]
) -> None:
    built = setup("mlp", "adam")
    engine = riding(built, config(checkpoint__directory=str(tmp_path / "own"), checkpoint__save_interval=1))
    step(built, engine)
    saved = sorted((tmp_path / "own").iterdir())
    middle(built, engine)
    with pytest.raises(CheckpointError, match="middle of a step"):
        engine.save_checkpoint(tmp_path / "asked")
    engine.save_if_due()
    assert sorted((tmp_path / "own").iterdir()) == saved
    assert not notices
    engine.state_dict()
    engine.save_state(tmp_path / "state")
    assert len(notices) == 1
    assert "middle of a step" in notices.pop()
    built.optimizer.step()
    engine.save_checkpoint(tmp_path / "asked")
    engine.state_dict()
    assert not notices


# ---------------------------------------------------------------- what a setting puts around the step


class Counts(StepModifier):
    def __init__(self) -> None:
        self.num = 0

    def before_step(self, parameters: Any) -> int:
        self.num += 1
        return 0

    def state_dict(self) -> dict[str, Any]:
        return {"num": self.num}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num = state["num"]


class Others(Counts):
    pass


def _with(monkeypatch: pytest.MonkeyPatch, kinds: list[Any], handed_in: Counts) -> HybridTrainer:
    monkeypatch.setattr(state_module, "modifiers_for", lambda *_: [kind() for kind in kinds])
    built = setup("mlp", "adam")
    return HybridTrainer(built.model, built.optimizer, config(), loss_fn=loss_fn, modifiers=[handed_in])


@pytest.mark.parametrize(
    ("saved", "continued", "wanted"),
    [([Counts], [Counts], [3]), ([], [Counts], [0]), ([Others], [Counts, Others], [0, 3])],
    ids=["as before", "switched on", "a second one"],
)
def test_a_setting_may_put_more_around_the_step_at_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: list[Any], continued: list[Any], wanted: list[int]
) -> None:
    first = _with(monkeypatch, saved, Counts())
    for batch in full_batch(3):
        first.step(batch)
    folder = first.save_checkpoint(tmp_path)
    mine = Counts()
    second = _with(monkeypatch, continued, mine)
    second.load_checkpoint(folder)
    assert [m.num for m in second.run.optimizer_step.modifiers] == [*wanted, 3]  # type: ignore[attr-defined]
    assert mine.num == 3


def test_what_a_setting_has_switched_off_since_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _with(monkeypatch, [Counts, Others], Counts()).save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"saved with Others around .* this version does not know"):
        _with(monkeypatch, [Counts], Counts()).load_checkpoint(folder)


# ---------------------------------------------------------------- warnings point to the user's line


class NoHooks:
    def __init__(self, parameters: Any) -> None:
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), "lr": 0.05}]
        self.state: dict[Any, Any] = {}
        self.defaults: dict[str, Any] = {}

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def step(self) -> None: ...


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, lambda _: 1.0)


class BrokenSink:
    def write(self, record: Any) -> None:
        raise ValueError("full")


def _no_hooks(folder: Path) -> None:
    built = setup("mlp")
    attach(built.model, NoHooks(built.model.parameters()), config(), loss_fn=loss_fn)  # type: ignore[arg-type]


def _no_loss(folder: Path) -> None:
    built = setup("mlp", "adam")
    riding(built)
    loss_fn(built.model, BATCH).backward()
    built.optimizer.step()


def _gate(folder: Path) -> None:
    built = setup("mlp", "adam")
    engine = riding(built, loss_fn=_broken_gate)
    for _ in range(40):
        step(built, engine)


def _gate_of_a_trainer(folder: Path) -> None:
    built = setup("mlp", "adam")
    trainer = HybridTrainer(built.model, built.optimizer, config(), loss_fn=loss_fn, sinks=[BrokenSink()])
    trainer.fit(full_batch(3))


def _written_to(folder: Path) -> None:
    trainer = setup("mlp", "adam").trainer(config())
    for batch in full_batch(3):
        trainer.step(batch)
        trainer.run.subject.parameters[0].data.add_(0.1)


def _scheduled_twice(folder: Path) -> None:
    built = setup("mlp", "adam")
    schedule = Schedule(built.optimizer)
    engine = riding(built, lr_scheduler=schedule)
    for _ in range(4):
        step(built, engine)
        schedule.step()


def _former_key(folder: Path) -> None:
    (folder / "old.toml").write_text("[training]\nlookahead = 0.3\n")
    load(folder / "old.toml")


def _former_argument(folder: Path) -> None:
    with_values(HybridTrainerConfig(), {"training.max_learned_scale": 3.0})


def _damaged(folder: Path) -> None:
    trainer = setup("mlp", "adam").trainer(config())
    for batch in full_batch(2):
        trainer.step(batch)
        newest = trainer.save_checkpoint(folder)
    for file in newest.iterdir():
        file.write_bytes(b"")
    trainer.load_latest(folder)


def _validation(folder: Path) -> None:
    Validation(lambda model: 1 / 0, 1.0).ask(setup("mlp").model, 0)


def _position(folder: Path) -> None:
    built = setup("mlp", "adam")
    trainer = built.trainer(config())
    trainer.fit(iter(full_batch(2)), total_steps=20)


KINDS = {
    f.__name__.strip("_").replace("_", " "): f
    for f in (
        _no_hooks, _no_loss, _gate, _gate_of_a_trainer, _written_to, _scheduled_twice, _former_key, _former_argument,
        _damaged, _validation, _position,
    )
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_warning_points_to_the_users_line(kind: str, tmp_path: Path) -> None:
    with recorded() as told:
        KINDS[kind](tmp_path)
    ours = [w for w in told if "lr_scheduler.step" not in str(w.message)]  # torch's own
    assert ours, "nothing was said"
    for w in ours:
        assert Path(w.filename).name in ("test_misuse.py", "cases.py"), f"{w.filename}:{w.lineno}: {w.message}"


def _fixed_levels(source: str) -> list[str]:
    return re.findall(r"stacklevel=\d", source)


def test_no_warning_counts_its_frames() -> None:
    outer = ("tasks", "experiments", "cli", "former_names.py")  # users of the core; names are read by import machinery
    core = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in outer]
    assert {str(p): found for p in core if (found := _fixed_levels(p.read_text(encoding="utf-8")))} == {}
    assert _fixed_levels("warnings.warn('x', stacklevel=2)") == ["stacklevel=2"]
