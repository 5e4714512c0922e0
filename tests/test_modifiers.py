"""What a user puts around the optimizer's step: its turns, and what it hears of jumps, rollbacks and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import Fake, assert_same, config, full_batch, loss_fn, make_batches, setup
from hybrid_predict_trainer import CheckpointError, HybridTrainerConfig, StepModifier, attach
from hybrid_predict_trainer.keep.failures import Place


class Average(StepModifier):
    """An exponential moving average of the weights that follows jumps."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay, self.average, self.heard = decay, [], []

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        self.heard.append("before")
        return 0

    def after_step(self, parameters: Sequence[Tensor]) -> int:
        self.heard.append("after")
        if not self.average:
            self.average = [p.detach().clone() for p in parameters]
        for mean, parameter in zip(self.average, parameters, strict=True):
            mean.lerp_(parameter.detach(), 1 - self.decay)
        return 1

    def on_jump(self, delta: Sequence[Tensor], scale: float) -> None:
        self.heard.append("jump")
        if self.average:
            torch._foreach_add_(self.average, list(delta), alpha=scale)

    def on_restore(self) -> None:
        self.heard.append("restore")

    def forget(self) -> None:
        self.heard.append("forget")
        self.average = []

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = [t.clone() for t in state["average"]]

    def memory_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.average)


class Noting(StepModifier):
    def __init__(self, name: str, into: list[str]) -> None:
        self.name, self.into = name, into

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        self.into.append(f"{self.name} before")
        return 0

    def after_step(self, parameters: Sequence[Tensor]) -> int:
        self.into.append(f"{self.name} after")
        return 0


class Clipping(StepModifier):
    """Clips every gradient to [-limit, limit]."""

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.clamp_(-1e-2, 1e-2)
        return 1


def test_they_take_turns_like_brackets_and_never_where_prediction_is_off() -> None:
    heard: list[str] = []
    pair = [Noting("outer", heard), Noting("inner", heard)]
    setup().trainer(config(), modifiers=pair).fit(make_batches(2))
    assert heard == ["outer before", "inner before", "inner after", "outer after"] * 2
    heard.clear()
    setup().trainer(HybridTrainerConfig(enabled=False), modifiers=pair).fit(make_batches(2))
    assert not heard


def test_what_it_does_to_gradients_is_what_the_optimizer_steps_with() -> None:
    batches = make_batches(6)
    ours, plain = setup(optimizer="sgd"), setup(optimizer="sgd")
    ours.trainer(config(predictor_type="hold"), modifiers=[Clipping()]).fit(batches)
    for batch in batches:
        plain.optimizer.zero_grad()
        loss_fn(plain.model, batch).backward()
        for parameter in plain.model.parameters():
            parameter.grad.clamp_(-1e-2, 1e-2)
        plain.optimizer.step()
    assert_same(ours.everything()["parameters"], plain.everything()["parameters"])


def test_its_passes_are_charged() -> None:
    costs = []
    for modifiers in ([], [Average()]):
        trainer = setup().trainer(config(predictor_type="hold"), modifiers=modifiers)
        trainer.fit(make_batches(4))
        costs.append(trainer.run.meter.cost_units)
    assert costs[1] > costs[0]


def test_an_average_moves_along_with_jumps() -> None:
    made, kept = setup("mlp", "adam", "lambda"), Average()
    trainer = made.trainer(config(), predictor=Fake(-0.02), modifiers=[kept])
    for batch in full_batch(30):
        before = [t.clone() for t in kept.average]
        weights = [p.detach().clone() for p in made.model.parameters()]
        if trainer.step(batch).was_predicted:
            moved = [p.detach() - w for p, w in zip(made.model.parameters(), weights, strict=True)]
            for mean, old, move in zip(kept.average, before, moved, strict=True):
                torch.testing.assert_close(mean - old, move, rtol=1e-4, atol=1e-6)
            break
    else:
        pytest.fail("no jump was accepted")
    assert "jump" in kept.heard


def test_a_rollback_puts_back_what_it_held() -> None:
    made, kept = setup("mlp", "adam", "lambda"), Average()
    trainer = made.trainer(config(), predictor=Fake(-0.02), modifiers=[kept])
    trainer.fit(full_batch(12))
    snapshot, held = trainer.run.take_snapshot(), [t.clone() for t in kept.average]
    trainer.fit(full_batch(5))
    assert any(not torch.equal(a, b) for a, b in zip(kept.average, held, strict=True))
    trainer.run.restore(snapshot)
    trainer.run.restored()
    assert_same(kept.average, held)
    assert kept.heard[-1] == "restore"


def test_weights_that_somebody_else_wrote_make_it_begin_anew(notices: list[str]) -> None:
    made, kept = setup("mlp", "adam", "lambda"), Average()
    trainer = made.trainer(config(), predictor=Fake(-0.02), modifiers=[kept])
    trainer.fit(full_batch(8))
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.zero_()
    trainer.step(full_batch(1)[0])
    assert "forget" in kept.heard
    assert len(notices) == 1
    assert "weights were changed between two steps" in notices.pop()


@pytest.mark.parametrize("place", [7, 13, 22])
def test_a_run_is_continued_bit_for_bit(tmp_path: Path, place: int) -> None:
    batches = full_batch(40)
    straight, whole = setup("mlp", "adam", "lambda"), Average()
    straight.trainer(config(), predictor=Fake(-0.02), modifiers=[whole]).fit(batches)
    first = setup("mlp", "adam", "lambda")
    trainer = first.trainer(config(), predictor=Fake(-0.02), modifiers=[Average()])
    trainer.fit(batches[:place])
    saved = trainer.save_checkpoint(tmp_path)
    second, kept = setup("mlp", "adam", "lambda", seed=5), Average()
    resumed = second.trainer(config(), predictor=Fake(-0.02), modifiers=[kept])
    resumed.load_checkpoint(saved)
    resumed.fit(batches[place:])
    assert_same(second.everything(), straight.everything())
    assert_same(kept.average, whole.average)


@pytest.mark.parametrize("number", [0, 2])
def test_a_checkpoint_of_other_modifiers_is_refused_and_nothing_is_changed(tmp_path: Path, number: int) -> None:
    trainer = setup().trainer(config(), modifiers=[Average()])
    trainer.fit(make_batches(5))
    saved = trainer.save_checkpoint(tmp_path)
    other = setup(seed=5)
    resumed = other.trainer(config(), modifiers=[Average() for _ in range(number)])
    before = other.everything()
    with pytest.raises(CheckpointError, match="1 step modifiers"):
        resumed.load_checkpoint(saved)
    assert_same(other.everything(), before)


@pytest.mark.parametrize("method", ["before_step", "after_step"])
@pytest.mark.parametrize("always", [False, True])
def test_one_that_raises_ends_no_run(method: str, always: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, calls = make_batches(12), []

    def failing(self: StepModifier, parameters: Sequence[Tensor]) -> int:
        calls.append(1)
        if always or len(calls) == 2:
            raise RuntimeError("it broke")
        return 0

    monkeypatch.setattr(Average, method, failing)
    made, plain = setup(), setup()
    trainer = made.trainer(config(warmup_steps=100), modifiers=[Average()])
    with pytest.warns(UserWarning, match="it broke"):
        trainer.fit(batches)
    plain.plain(batches)
    assert_same(made.everything()["parameters"], plain.everything()["parameters"])
    assert trainer.run.failures.counts[Place.MOTION] == (3 if always else 1)
    assert len(calls) == (3 if always else len(batches))


def test_riding_along_it_has_the_same_turns() -> None:
    batches = full_batch(30)
    stepped, own = setup("mlp", "adam", "lambda"), Average()
    trainer = stepped.trainer(config(), predictor=Fake(-0.02), modifiers=[own])
    results = [trainer.step(batch) for batch in batches]
    made, kept = setup("mlp", "adam", "lambda"), Average()
    with attach(
        made.model, made.optimizer, config(), loss_fn=loss_fn, lr_scheduler=made.scheduler, predictor=Fake(-0.02),
        modifiers=[kept],
    ) as engine:  # fmt: skip
        while engine.run.meter.num_real_steps < trainer.run.meter.num_real_steps:
            made.optimizer.zero_grad()
            loss = loss_fn(made.model, batches[0])
            loss.backward()
            engine.note(loss, batches[0])
            made.optimizer.step()
    if not results[-1].was_predicted and kept.heard[-1] == "jump":
        pytest.skip("the loop ends with a jump that the trainer has not made yet")
    assert_same(kept.average, own.average)
    assert kept.heard == own.heard


def test_the_memory_it_holds_is_in_the_books() -> None:
    kept = Average()
    trainer = setup().trainer(config(), modifiers=[kept])
    trainer.fit(make_batches(3))
    assert trainer.run.optimizer_step.memory_bytes()["modifiers"] == kept.memory_bytes() > 0
