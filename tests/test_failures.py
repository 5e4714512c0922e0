"""Whatever raises in what prediction adds to a step is one warning: training goes on as if it were not there.

Every place is made to raise once, and always where warnings are errors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cases import Fake, assert_same, config, full_batch, make_batches, setup
from hybrid_predict_trainer import HybridTrainer
from hybrid_predict_trainer.cycle import predictor_choice
from hybrid_predict_trainer.keep.failures import MAX_FAILURES, Failures, Place
from hybrid_predict_trainer.numerics.streaming import CountSketch, LowRankFactors, StreamingPca
from hybrid_predict_trainer.observe import gradient_health as health
from hybrid_predict_trainer.observe import kfac, recurrence, same_batch
from hybrid_predict_trainer.observe import window_encoder as observer
from hybrid_predict_trainer.observe.encoder import Encoder
from hybrid_predict_trainer.observe.kfac import KfacFactors
from hybrid_predict_trainer.observe.window_encoder import StateObserver
from hybrid_predict_trainer.propose.confidence import TrackRecord
from hybrid_predict_trainer.tell.recorder import Metrics

NUM_STEPS = 27
TRAINED = {
    "max_lr_multiplier": 8.0,
    "lookahead__extrapolation": 0.3,
    "lookahead__damping": 0.25,
    "lookahead__scope": "all",
}


class Wanting(Fake):
    """Wants encodings; goes uphill, so that every proposal is refused."""

    wants_encoding = True

    def __init__(self) -> None:
        super().__init__(1.0)


class Failing:
    """Raises at the first call, or at every one."""

    def __init__(self, inner: Callable[..., Any], *, always: bool) -> None:
        self.inner, self.always, self.num_calls = inner, always, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        if self.always or self.num_calls == 1:
            raise RuntimeError("it broke")
        return self.inner(*args, **kwargs)

    def __get__(self, holder: Any, kind: type) -> Callable[..., Any]:
        return lambda *args, **kwargs: self(holder, *args, **kwargs)


class Sink:
    """Takes records."""

    incomplete = False

    def write(self, record: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def on(holder: Any, name: str) -> Callable[[HybridTrainer], tuple[Any, str]]:
    """A class or a module, and a name in it."""
    return lambda trainer: (holder, name)


def at(path: str, name: str) -> Callable[[HybridTrainer], tuple[Any, str]]:
    """An object of a run, as a dotted path from the trainer, and a method of it."""

    def found(trainer: HybridTrainer) -> tuple[Any, str]:
        holder: Any = trainer
        for part in path.split("."):
            holder = getattr(holder, part)
        return holder, name

    return found


#: name -> (what raises, where that is counted, settings beside those of all)
PLACES: dict[str, tuple[Callable[[HybridTrainer], tuple[Any, str]], Place, dict[str, Any]]] = {
    "watching": (on(StateObserver, "watching"), Place.OBSERVER, {}),
    "hooks": (on(KfacFactors, "attach"), Place.OBSERVER, {}),
    "hooks taken off": (on(KfacFactors, "detach"), Place.OBSERVER, {}),
    "hook, forward": (on(kfac, "layer_inputs"), Place.OBSERVER, {}),
    "hook, backward": (on(kfac, "second_moment"), Place.OBSERVER, {}),
    "before backward": (on(KfacFactors, "arm"), Place.OBSERVER, {}),
    "after backward": (on(StateObserver, "after_backward"), Place.OBSERVER, {}),
    "factors": (on(KfacFactors, "_average"), Place.OBSERVER, {}),
    "spectra": (on(KfacFactors, "spectra"), Place.OBSERVER, {}),
    "low rank": (on(LowRankFactors, "observe"), Place.OBSERVER, {}),
    "features of factors": (on(observer, "kfac_features"), Place.OBSERVER, {}),
    "sketch": (on(CountSketch, "__call__"), Place.OBSERVER, {}),
    "encoder": (on(Encoder, "observe"), Place.OBSERVER, {}),
    "latent": (on(StreamingPca, "coordinates"), Place.OBSERVER, {}),
    "gradient health": (on(health, "measure"), Place.OBSERVER, {}),
    "checklist": (on(health, "pre_training"), Place.OBSERVER, {}),
    "health report": (on(StateObserver, "new_health"), Place.OBSERVER, {}),
    "fingerprint": (on(same_batch, "_sample"), Place.DATA, {}),
    "digest": (on(same_batch, "digest_of"), Place.DATA, {}),
    "recurrence": (on(recurrence, "hashes"), Place.DATA, {"max_lr_multiplier": 8.0}),
    "track record": (on(TrackRecord, "record"), Place.FEEDBACK, {}),
    "confidence": (at("run.proposer.feedback.confidence", "observe"), Place.FEEDBACK, {}),
    "bandit": (at("run.proposer.feedback.bandit", "observe"), Place.FEEDBACK, {"horizon_rule": "bandit"}),
    "corrector": (at("run.proposer.feedback.corrector", "observe"), Place.FEEDBACK, {}),
    "verdict in the books": (at("run.judge.ledger", "on_verdict"), Place.GATE, {}),
    "multiplier, cosines": (at("run.optimizer_step.scale", "measure"), Place.MOTION, TRAINED),
    "multiplier, before": (at("run.optimizer_step.scale", "before_step"), Place.MOTION, TRAINED),
    "multiplier, after": (at("run.optimizer_step.scale", "after_step"), Place.MOTION, TRAINED),
    "multiplier, decision": (at("run.optimizer_step.scale", "check"), Place.MOTION, TRAINED),
    "lookahead, before": (at("run.optimizer_step.lookahead", "before_step"), Place.MOTION, TRAINED),
    "lookahead, after": (at("run.optimizer_step.lookahead", "after_step"), Place.MOTION, TRAINED),
    "lookahead, trial": (at("run.optimizer_step.switchback", "count_step"), Place.MOTION, TRAINED),
    "guard": (at("run.safety.guard", "watch"), Place.MOTION, TRAINED),
    "outside writes": (at("run.watch.writes", "look"), Place.WEIGHTS, TRAINED),
    "own writes": (at("run.watch.writes", "record"), Place.WEIGHTS, TRAINED),
    "what trains": (at("run.watch.trained", "look"), Place.WEIGHTS, TRAINED),
    "what will train": (at("run.watch.trained", "look_ahead"), Place.WEIGHTS, TRAINED),
    "sink": (at("metrics.sink", "write"), Place.RECORD, {}),
    "record": (on(Metrics, "_record"), Place.RECORD, {}),
    "record of a step": (on(Metrics, "_step"), Place.RECORD, {}),
    "record of a jump": (on(Metrics, "_jump"), Place.RECORD, {}),
}  # fmt: skip


WATCHED = {"encoder__low_rank": 2, "encoder__kfac": True, "encoder__health": 1}


def watched(place: Place, settings: dict[str, Any]) -> tuple[Any, HybridTrainer]:
    made = setup("batchnorm", "adam", "lambda")
    if place is Place.OBSERVER:
        trainer = made.trainer(config(**WATCHED, **settings), predictor=Wanting())
    else:
        trainer = made.trainer(config(**settings), predictor=Fake(1.0))
    trainer.metrics.sink = Sink()
    return made, trainer


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    made = setup("batchnorm", "adam", "lambda")
    made.plain(make_batches(NUM_STEPS, 32))
    return made.everything()


@pytest.mark.parametrize("mode", ["once", "always"])
@pytest.mark.parametrize("name", PLACES)
def test_what_raises_in_a_step_is_one_warning(
    name: str, mode: str, plain: dict[str, Any], notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, place, settings = PLACES[name]
    made, trainer = watched(place, settings)
    holder, attribute = where(trainer)
    failing = Failing(getattr(holder, attribute), always=mode != "once")
    monkeypatch.setattr(holder, attribute, failing)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("error" if mode == "always" else "always")
        trainer.fit(make_batches(NUM_STEPS, 32))
    said = [str(w.message) for w in told] or list(notices)
    notices.clear()
    assert failing.num_calls, "never asked: this place is tested elsewhere or nowhere"
    counts = trainer.run.failures.counts
    wanted = 1 if mode == "once" else min(failing.num_calls, MAX_FAILURES)
    assert {p: n for p, n in counts.items() if n} == {place: wanted}
    assert len(said) == 1
    assert "it broke" in said[0]
    assert trainer.run.meter.num_real_steps == NUM_STEPS
    # a hook is called for every layer, and a proposal under way is carried to its end
    assert mode == "once" or failing.num_calls <= 2 * MAX_FAILURES, "after three times nobody asks"
    moves = settings.get("max_lr_multiplier", 1.0) > 1
    if not moves or (mode == "always" and place is not Place.DATA):
        assert_same(made.everything(), plain)
    if name != "hooks taken off":
        assert all(not m._forward_hooks for m in made.model.modules()), "no hook is left behind"


def test_what_fails_in_going_over_to_another_predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup("mlp")
    trainer = made.trainer(config(predictor__type="auto"))

    def none_left(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(predictor_choice, "Feedback", none_left)
    before = trainer.run.proposer.predictor
    with pytest.warns(UserWarning, match="quasi_newton.*no room"):
        trainer.fit(full_batch(NUM_STEPS))
    run = trainer.run
    assert run.proposer.predictor is before
    assert (run.windows.basis.spec, run.config.predictor_type) == (before.spec, "secant")
    assert run.meter.num_real_steps > NUM_STEPS / 2


# ---------------------------------------------------------------- batches that cannot be looked at


class Batch:
    """Holds its tensors where nobody looks."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.pair = (x, y)


class Hiding(Batch):
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("nothing to see")


class Slotted:
    __slots__ = ("broken", "pair")

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.pair = (x, y)

    def __getattribute__(self, name: str) -> Any:
        if name == "broken":
            raise ValueError("not that one")
        return object.__getattribute__(self, name)


class Lazy(Mapping[str, torch.Tensor]):
    """A mapping that reads its file when it is asked."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.pair = (x, y)

    def __getitem__(self, key: str) -> torch.Tensor:
        raise OSError("the file has gone")

    def __iter__(self) -> Iterator[str]:
        return iter(("x", "y"))

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("kind", [Hiding, Slotted, Lazy])
def test_a_batch_that_cannot_be_looked_at(kind: type) -> None:
    data = make_batches(NUM_STEPS, 32)
    ours, bare = setup("batchnorm", "adam", "lambda"), setup("batchnorm", "adam", "lambda")
    bare.plain(data)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch.pair[0]), batch.pair[1])

    trainer = ours.trainer(config(), predictor=Fake(1.0), loss_fn=loss)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit([kind(x, y) for x, y in data])
    assert trainer.run.failures.counts[Place.DATA] == MAX_FAILURES
    assert sum("compared with others" in str(w.message) for w in told) == 1
    assert len(told) <= 2, "the gate may say something of its own"
    assert_same(ours.everything(), bare.everything())


# ---------------------------------------------------------------- what is said


def test_a_notice_is_a_warning_or_a_line_of_the_log(notices: list[str]) -> None:
    from hybrid_predict_trainer.notices import warn

    with pytest.warns(UserWarning, match="a word") as told:
        warn("a word")
    assert told[0].filename == __file__, "it names who called"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("another")
    assert notices == ["another"]
    notices.clear()


def test_every_place_says_what_and_what_comes_of_it(notices: list[str]) -> None:
    failures = Failures()
    for place in Place:
        with pytest.warns(UserWarning, match=r"\(RuntimeError: it broke\); training goes on, after 3 times "):
            failures.note(place, RuntimeError("it broke"), name="mine")
        failures.note(place, "again")
        assert not failures.exhausted(place)
        failures.note(place, "again")
        assert failures.exhausted(place)
    again = Failures()
    again.load_state_dict(failures.state_dict())
    assert again.summary() == failures.summary()
    again.load_state_dict({"counts": {"gate": 1}, "first": {}, "dropped": {}})
    assert again.counts[Place.RECORD] == 0, "of an older checkpoint"


def test_places_of_another_build_are_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"counts": {"gate": 2, "a place of its own": 1}, "first": {"a place of its own": "it broke"}, "dropped": {}}
    old, new = setup().trainer(config()), setup().trainer(config())
    with monkeypatch.context() as patch:
        patch.setattr(old.run.failures, "state_dict", lambda: told)
        path = old.save_checkpoint(tmp_path)
    with pytest.warns(UserWarning, match="no room"):
        new.run.failures.note(Place.RECORD, MemoryError("no room"))
    new.load_checkpoint(path)
    assert {p: n for p, n in new.run.failures.counts.items() if n} == {Place.GATE: 2}
    assert new.run.failures.first == {}
