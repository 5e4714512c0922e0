"""Resume is bitwise: from a checkpoint of every phase, through the file system, into freshly built objects."""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import (
    Fake,
    Setup,
    assert_same,
    config,
    difference,
    full_batch,
    loss_fn,
    make_batches,
    seed_all,
    setup,
)
from hybrid_predict_trainer import CheckpointError, Engine, HybridTrainer, HybridTrainerConfig, attach
from hybrid_predict_trainer.cost import CostMeter
from hybrid_predict_trainer.judge import candidates
from hybrid_predict_trainer.judge.ledger import Ledger
from hybrid_predict_trainer.numerics.running import Baseline, RunningMoments
from hybrid_predict_trainer.observe.divergence import Monitor
from hybrid_predict_trainer.observe.history import History, Reading
from hybrid_predict_trainer.predictors import PREDICTORS
from hybrid_predict_trainer.propose.confidence import TrackRecord
from hybrid_predict_trainer.records import Level, Phase, StepResult
from hybrid_predict_trainer.tell.recorder import Metrics
from hybrid_predict_trainer.tell.sinks import NullSink

NUM_STEPS = 44
DATA = {"exact": full_batch, "noisy": make_batches}

#: Where a checkpoint is taken: name -> whether the state after this step is such a place.
PLACES: dict[str, Callable[[HybridTrainer, StepResult], bool]] = {
    "warmup": lambda t, r: r.phase is Phase.WARMUP and t.current_step == 2,
    "mid-window": lambda t, r: (
        r.phase is Phase.FULL and t.run.windows.basis.num_steps == 2 and t.run.windows.num_closed > 2
    ),
    "window-closed": lambda t, r: r.phase is Phase.FULL and t.run.windows.just_closed and t.run.windows.num_closed > 2,
    "accepted": lambda t, r: r.was_predicted and t.run.proposer.segment is None,
    "between-segments": lambda t, r: r.was_predicted and t.run.proposer.segment is not None,
    "probation": lambda t, r: r.phase is Phase.CORRECT and t.run.judge.probation is not None,
    "after-probation": lambda t, r: r.phase is Phase.CORRECT and t.run.judge.probation is None,
    "refused": lambda t, r: r.phase is Phase.PREDICT and not r.was_predicted,
}


#: Everything the encoder can keep.
ENCODER = {"encoder__low_rank": 2, "encoder__kfac": True, "encoder__health": 2}


def built(predictor: str, segments: int, seed: int = 1, **more: Any) -> tuple[Setup, HybridTrainer]:
    made = setup("norm_dropout", "adamw", "lambda", seed)
    own = {"fake": Fake}.get(predictor)
    changes: dict[str, Any] = {} if own else {"predictor_type": predictor}
    settings = config(
        segments=segments, clock="cost", checkpoint__keep_last_n=100, gate__holdout_fraction=0.2,
        predictor__update_budget=0.0,  # what is measured differs between two runs: test_pacing has the resume with it
        **changes, **more,
    )  # fmt: skip
    return made, made.trainer(settings, predictor=own and own())


def state(made: Setup, trainer: HybridTrainer) -> dict[str, Any]:
    run = trainer.run
    return copy.deepcopy(
        {
            **made.everything(),
            "run": run.state_dict(),
            "predictor": run.proposer.predictor.state_dict(),
            "basis": run.windows.basis.state_dict(),
            "observer": run.windows.observer.state_dict(),
            "statistics": trainer.statistics(),
        }
    )


def outcome(result: StepResult) -> tuple[Any, ...]:
    return result.phase, repr(result.loss), result.reason, repr(result.gradient_norm), result.was_predicted, result.step


#: Predictors without networks: every value of their state is a number or a tensor of numbers.
CLOSED_FORM = ("hold", "heuristic", "linear", "secant")
RUNS = [(name, data, segments) for name in (*CLOSED_FORM, "fake") for data in DATA for segments in (1, 2)]
RUNS += [(name, "exact", 1) for name in PREDICTORS if name not in CLOSED_FORM]
RUNS = [(*run, {}) for run in RUNS] + [(name, data, 1, ENCODER) for name in ("secant", "linear") for data in DATA]
#: What moves the weights besides jumps, at rates where it does.
MOTION = {
    "max_lr_multiplier": 50.0,
    "lookahead__scope": "all",
    "lookahead__extrapolation": 0.5,
    "lookahead__damping": 0.25,
}
RUNS += [("secant", data, 1, MOTION) for data in DATA]


@pytest.mark.parametrize(
    ("predictor", "data", "segments", "more"),
    RUNS, ids=["-".join([*map(str, run[:3]), *list(run[3])[:1]]) for run in RUNS],
)  # fmt: skip
def test_resume_everywhere(
    predictor: str, data: str, segments: int, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "price", lambda ledger, slope: lambda forwards: 0.0)
    batches = DATA[data](NUM_STEPS, 32)
    made, trainer = built(predictor, segments, **more)
    saved: dict[str, tuple[Path, int]] = {}
    outcomes = []
    for index, batch in enumerate(batches):
        result = trainer.step(batch)
        outcomes.append(outcome(result))
        for name, here in PLACES.items():
            if name not in saved and here(trainer, result):
                saved[name] = (trainer.save_checkpoint(tmp_path / name), index + 1)
    wanted = state(made, trainer)
    if more is MOTION and data == "noisy":
        assert trainer.run.optimizer_step.lookahead.num_steps > 0
        assert trainer.run.safety.guard.anchor_step > 0
    assert {"warmup", "mid-window", "window-closed"} <= set(saved)
    if predictor == "fake" and data == "exact":
        missing = {"between-segments"} if segments == 1 else set()
        assert set(PLACES) - set(saved) - {"refused"} == missing
    for name, (path, start) in saved.items():
        again, resumed = built(predictor, segments, seed=5, **more)
        seed_all(99)
        resumed.load_checkpoint(path)
        got = [outcome(resumed.step(batch)) for batch in batches[start:]]
        assert got == outcomes[start:], name
        found = difference(state(again, resumed), wanted)
        assert found is None, f"{name}: {found}"


def test_places_are_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place of the table is one that some run comes to, or the test above says nothing."""
    monkeypatch.setattr(candidates, "price", lambda ledger, slope: lambda forwards: 0.0)
    seen = set()
    for segments, data in ((1, "noisy"), (2, "exact")):
        _, trainer = built("fake", segments)
        for batch in DATA[data](80, 32):
            result = trainer.step(batch)
            seen |= {name for name, here in PLACES.items() if here(trainer, result)}
    assert seen == set(PLACES)


def test_adjacent_steps_differ() -> None:
    """The comparison can fail: one step more and the states are different."""
    made, trainer = built("secant", 1)
    batches = make_batches(12)
    previous = state(made, trainer)
    for batch in batches:
        result = trainer.step(batch)
        now = state(made, trainer)
        for part in ("run", "statistics", *(("parameters", "optimizer", "rng") if result.num_backward else ())):
            assert difference(now[part], previous[part]) is not None
        previous = now


def test_resume_at_the_start_and_twice(tmp_path: Path) -> None:
    batches = make_batches(10)
    made, trainer = built("secant", 1)
    first = trainer.save_checkpoint(tmp_path)
    for batch in batches:
        trainer.step(batch)
    for _ in range(2):
        again, resumed = built("secant", 1, seed=3)
        resumed.load_checkpoint(first)
        for batch in batches:
            resumed.step(batch)
        assert_same(state(again, resumed), state(made, trainer))


def test_loading_into_a_used_trainer(tmp_path: Path) -> None:
    """What the trainer had learnt elsewhere is gone after loading."""
    batches = full_batch(40)
    made, trainer = built("secant", 1)
    for batch in batches[:20]:
        trainer.step(batch)
    path = trainer.save_checkpoint(tmp_path)
    before = state(made, trainer)
    for batch in batches[20:]:
        trainer.step(batch)
    assert difference(state(made, trainer), before) is not None
    trainer.load_checkpoint(path)
    assert_same(state(made, trainer), before)


def test_other_predictor_is_refused(tmp_path: Path) -> None:
    _, trainer = built("secant", 1)
    path = trainer.save_checkpoint(tmp_path)
    made, other = built("hold", 1)
    before = made.everything()
    with pytest.raises(CheckpointError, match=r"secant.*hold"):
        other.load_checkpoint(path)
    assert_same(made.everything(), before)


def test_other_encoder_is_refused(tmp_path: Path) -> None:
    _, trainer = built("linear", 1)
    path = trainer.save_checkpoint(tmp_path)
    made, other = built("linear", 1, encoder__low_rank=3)
    before = made.everything()
    with pytest.raises(CheckpointError, match=r"encoder\.low_rank is 0 in the checkpoint, 3 in this run"):
        other.load_checkpoint(path)
    assert_same(made.everything(), before)


def test_resume_without_the_predictor(tmp_path: Path) -> None:
    made = setup("mlp", "adam")
    settings = config(checkpoint__include_predictor=False)
    trainer = made.trainer(settings)
    batches = full_batch(30)
    for batch in batches:
        trainer.step(batch)
    path = trainer.save_checkpoint(tmp_path)
    again = setup("mlp", "adam", seed=4)
    resumed = again.trainer(settings)
    for batch in batches:  # it has observed windows of its own
        resumed.step(batch)
    assert resumed.run.windows.basis.ready
    with pytest.warns(UserWarning, match="a new window begins"):
        resumed.load_checkpoint(path)
    assert_same(again.everything(), made.everything())
    windows = resumed.run.windows
    assert (windows.basis.ready, windows.basis.num_steps, windows.just_closed, windows.lr_integral) == (
        False, 0, False, 0.0,
    )  # fmt: skip
    for batch in batches:
        resumed.step(batch)
    assert windows.basis.ready


def test_metrics_go_on(tmp_path: Path) -> None:
    """Counts and lists of the summary are those of the whole run, not of its last part."""
    batches = full_batch(40)
    _, whole = built("fake", 1)
    for batch in batches:
        whole.step(batch)
    _, first = built("fake", 1)
    for batch in batches[:25]:
        first.step(batch)
    path = first.save_checkpoint(tmp_path)
    _, second = built("fake", 1, seed=2)
    second.load_checkpoint(path)
    for batch in batches[25:]:
        second.step(batch)
    a, b = whole.summary(), second.summary()
    for part in ("training_summary", "phase_statistics", "divergence_events", "ledger", "statistics"):
        assert a[part] == b[part], part


# ---------------------------------------------------------------- distinct values, component by component


class Numbers:
    """Distinct non-default values, one after the other."""

    def __init__(self) -> None:
        self.last = 1.25

    def __call__(self, like: Any) -> Any:
        self.last += 1.5
        if isinstance(like, bool):
            return not like
        if isinstance(like, Level):
            return Level.CAUTION
        if isinstance(like, int):
            return round(self.last * 2)
        if isinstance(like, float):
            return self.last
        if isinstance(like, torch.Tensor):
            return torch.arange(like.numel(), dtype=like.dtype).reshape(like.shape) + self.last
        if isinstance(like, dict):
            return {k: self(v) for k, v in like.items()}
        if isinstance(like, list):
            return [self(v) for v in like]
        return like


def _history() -> History:
    history = History()
    for i in range(5):
        history.push(Reading(i, 3.0 - i / 7, 1.0 + i), warming_up=i < 3)
        history.close_window(i, 2)
    return history


COMPONENTS: dict[str, Callable[[], Any]] = {
    "moments": lambda: RunningMoments(decay=0.5, count=3, _mean=1.0, _square=4.0),
    "baseline": lambda: Baseline(2, 3.0, 4.0, 5.0, 6.0),
    "history": _history,
    "record": TrackRecord,
    "meter": CostMeter,
    "monitor": lambda: Monitor(HybridTrainerConfig().divergence, 3.0),
    "ledger": lambda: Ledger(HybridTrainerConfig().gate),
    "metrics": lambda: Metrics(NullSink(), log_interval=1),
    **{name: (lambda name=name: PREDICTORS[name](HybridTrainerConfig(), 2)) for name in CLOSED_FORM},
    "basis": lambda: built("secant", 1)[1].run.windows.basis,
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_distinct_values_round_trip(name: str) -> None:
    """A forgotten or swapped field shows: every value of the state is different and not the default."""
    source = COMPONENTS[name]()
    distinct = Numbers()(source.state_dict())
    target = COMPONENTS[name]()
    target.load_state_dict(distinct)
    assert_same(target.state_dict(), distinct)


@pytest.mark.parametrize("name", CLOSED_FORM)
def test_learnt_state_round_trips(name: str) -> None:
    """The predictor that loads predicts what the one that saved would have."""
    _, trainer = built(name, 1)
    for batch in full_batch(40):
        trainer.step(batch)
    source = trainer.run.proposer.predictor
    target = PREDICTORS[name](trainer.config, trainer.run.windows.groups.num_groups)
    assert source.ready
    assert not target.ready
    target.load_state_dict(source.state_dict())
    assert target.ready
    a, b = source.predict(7), target.predict(7)
    assert difference(a.coefficients, b.coefficients) is None
    assert (a.predicted_loss, a.loss_trajectory, a.confidence) == (b.predicted_loss, b.loss_trajectory, b.confidence)


def test_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    _, trainer = built("secant", 1)
    for batch in full_batch(12):
        trainer.step(batch)
    files = {p.name for p in trainer.save_checkpoint(tmp_path).iterdir()}
    assert {Path(f).suffix for f in files} <= {".json", ".safetensors", ".toml"}
    for file in trainer.save_checkpoint(tmp_path / "two").glob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))


#: Owners -> what of theirs is not in their state: bound again from the settings, saved beside it, or of one step only.
NOT_SAVED: dict[str, set[str]] = {
    "windows": {"basis", "groups", "observer", "observing", "seconds", "_closing", "_kept", "_settings", "_failures"},
    "losses": {"readout"},
    "proposer": {
        "settings",
        "chooses",
        "time",
        "paced",
        "correction",
        "_least",
        "_most",
        "_longest_chain",
        "_failures",
    },
    "judge": {"held", "_settings", "_subject", "_failures", "_spare"},  # memory that is written over
    "judge.evaluation": {"_subject", "_failures", "_score", "_asked", "_known", "_of_loss", "_of_score"},
    "optimizer_step": {
        "scale_search",
        "_subject",
        "_watch",
        "_schedule",
        "_failures",
        "_decay_follows",
        "_drifts",
        "_awaited",
        "_handed_in",
    },
    "phases": {"controller"},
    "rollback": {"spare"},
    "safety": set(),
    "batches": {"_views", "_failures", "_differs_elsewhere"},  # asked of the other ranks at every step
    "schedule": {
        "scheduler",
        "interval",
        "end",
        "_seen",
        "_under_way",
        "_annealing",
        "_warned",
        "_doubted",
        "owned",
        "_first",
        "_num_beyond",  # the last two are saved where a loop of its own steps the schedule
    },
    "watch": {"writes", "hands_off"},
    "monitor": {"config", "sigma"},
}


@pytest.mark.parametrize("owner", NOT_SAVED)
def test_every_field_of_an_owner_is_saved(owner: str) -> None:
    """A new attribute must be saved or named above as one that need not be."""
    _, trainer = built("secant", 1)
    held = operator.attrgetter(owner)(trainer.run)
    state = held.state_dict()
    # of two owners the whole state is that of their parts
    known = {"losses": {"history", "curve"}, "watch": {"trained"}}.get(owner, set(state))
    assert {n if n in NOT_SAVED[owner] else n.lstrip("_") for n in vars(held)} - known == NOT_SAVED[owner]


def test_every_owner_is_saved() -> None:
    """A new attribute of the state is an owner that is saved, or is bound again."""
    _, trainer = built("secant", 1)
    assert set(vars(trainer.run)) - set(trainer.run.state_dict()) == {
        "subject",
        "decay",  # looks at the optimizer's groups
        "origin",
        "config",
        "recorder",
        "buffers",
    }


def test_every_field_of_the_ledger_is_saved() -> None:
    ledger = Ledger(HybridTrainerConfig().gate)
    derived = {"known", "jumps", "controls", "left", "persistence"}  # made again from what is settled
    names = {name.lstrip("_") for name in vars(ledger)} - {"config", *derived}
    assert names == set(ledger.state_dict())


@pytest.mark.parametrize("name", ["momentum", "adamw_fused", "adafactor", "muon", "rmsprop"])
def test_optimizer_state_is_exact(name: str, tmp_path: Path) -> None:
    batches = make_batches(20)
    made, again = setup("norm_dropout", name), setup("norm_dropout", name, seed=8)
    trainer, resumed = made.trainer(config()), again.trainer(config())
    for batch in batches[:9]:
        trainer.step(batch)
    path = trainer.save_checkpoint(tmp_path)
    losses = [trainer.step(batch).loss for batch in batches[9:]]
    wanted = made.everything()
    resumed.load_checkpoint(path)
    assert [resumed.step(batch).loss for batch in batches[9:]] == losses
    assert_same(again.everything(), wanted)


class StatefulLoader:
    """As torchdata's: it can say where it stands, and goes on there the next time it is gone through."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.num_given, self.epoch, self._start = batches, 0, 0, 0

    def __iter__(self) -> Iterator[Any]:
        start, self._start = self._start, 0
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for self.num_given, place in list(enumerate(order, 1))[start:]:
            yield self.batches[place]
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        return {"num_given": self.num_given, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start, self.epoch = state["num_given"], state["epoch"]


@pytest.mark.parametrize("predictor", ["fake", "secant"])
@pytest.mark.parametrize("stop", range(9, 26, 2))
def test_a_loader_that_can_tell_goes_on_where_it_stood(predictor: str, stop: int, tmp_path: Path) -> None:
    """At any step, that of a refused proposal too, whose batch the loader has already given."""
    batches = make_batches(16, 32)
    made, trainer = built(predictor, 1)
    trainer.fit(StatefulLoader(batches), total_steps=40)
    wanted = state(made, trainer)
    _, first = built(predictor, 1)
    seen: list[StepResult] = []
    first.fit(
        StatefulLoader(batches), total_steps=40, progress_callback=seen.append, should_stop=lambda: len(seen) == stop
    )
    path = first.save_checkpoint(tmp_path)
    again, resumed = built(predictor, 1, seed=5)
    seed_all(99)
    resumed.load_checkpoint(path)
    resumed.fit(StatefulLoader(batches), total_steps=40)
    found = difference(state(again, resumed), wanted)
    assert found is None, found


def test_a_position_that_is_no_plain_data_is_left_out(tmp_path: Path) -> None:
    class Odd(StatefulLoader):
        def state_dict(self) -> dict[str, Any]:
            return {"lock": object()}

    _, trainer = built("secant", 1)
    trainer.fit(Odd(make_batches(4, 32)))
    with pytest.warns(UserWarning, match="count batches instead"):
        trainer.save_checkpoint(tmp_path)
    assert trainer.num_batches == 4


# ---------------------------------------------------------------- the engine


def ridden(predictor: str, segments: int, seed: int = 1, **more: Any) -> tuple[Setup, Engine]:
    """As :func:`built`, by the engine."""
    made, trainer = built(predictor, segments, seed, **more)
    settings, own = trainer.config, {"fake": Fake}.get(predictor)
    made = setup("norm_dropout", "adamw", "lambda", seed)
    return made, attach(
        made.model, made.optimizer, settings, loss_fn=loss_fn, lr_scheduler=made.scheduler, predictor=own and own()
    )


def ride(made: Setup, engine: Engine, batch: Any) -> float:
    made.optimizer.zero_grad()
    loss = loss_fn(made.model, batch)
    loss.backward()
    engine.note(loss, batch)
    made.optimizer.step()
    return loss.item()


def place_of(engine: Engine) -> str:
    """Where the engine stands after a step, and after what it did behind it."""
    run, result = engine.run, engine.result
    if run.phases.current is Phase.WARMUP:
        return "warmup"
    if run.judge.probation is not None:
        segment = "" if run.proposer.segment is None else " between segments"
        return f"probation{segment}, {run.judge.probation.num_steps_left} left"
    if result is not None and result.phase is Phase.PREDICT:
        return "accepted" if result.was_predicted else "refused"
    return f"{run.windows.basis.num_steps} steps of a window"


ENGINE_RUNS = [
    ("fake", "exact", 1, {}),
    ("fake", "exact", 2, {}),
    ("fake", "noisy", 1, {}),
    ("secant", "noisy", 1, MOTION),
]
ENGINE_RUNS += [(name, "exact", 1, {}) for name in ("linear", "secant", "quasi_newton", "dmd", "mlp")]


@pytest.mark.parametrize(
    ("predictor", "data", "segments", "more"), ENGINE_RUNS,
    ids=["-".join([*map(str, run[:3]), *list(run[3])[:1]]) for run in ENGINE_RUNS],
)  # fmt: skip
def test_the_engine_resumes_everywhere(
    predictor: str, data: str, segments: int, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "price", lambda ledger, slope: lambda forwards: 0.0)
    batches = DATA[data](NUM_STEPS, 32)
    made, engine = ridden(predictor, segments, **more)
    saved: dict[str, tuple[Path, int]] = {}
    losses = []
    for index, batch in enumerate(batches):
        losses.append(ride(made, engine, batch))
        if (name := place_of(engine)) not in saved:
            saved[name] = (engine.save_checkpoint(tmp_path / str(len(saved))), index + 1)
    wanted, figures = made.everything(), engine.statistics()
    assert {"warmup"} < set(saved)
    if predictor == "fake" and data == "exact":
        assert any(name.startswith("probation") for name in saved)
    for name, (path, start) in saved.items():
        again, resumed = ridden(predictor, segments, seed=5, **more)
        seed_all(99)
        resumed.load_checkpoint(path)
        assert [ride(again, resumed, batch) for batch in batches[start:]] == losses[start:], name
        found = difference(again.everything(), wanted)
        assert found is None, f"{name}: {found}"
        assert resumed.statistics() == figures, name
