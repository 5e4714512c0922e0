"""The time budget of training: chosen once from measured times, part of the state, kept from then on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cases import Fake, assert_same, config, full_batch, seed_all, setup
from dynamics import through_bytes, turning
from hybrid_predict_trainer import HybridTrainer
from hybrid_predict_trainer.config.settings import MlpConfig, RssmConfig
from hybrid_predict_trainer.experiments.arms.recording import Recorder
from hybrid_predict_trainer.predictors import Hold, Mlp, Paced, Rssm
from hybrid_predict_trainer.predictors.pacing import MAX_INTERVAL, NUM_MEASURED, Pace, update_interval


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that goes on by so much at every look."""
    return itertools.count(0.0, seconds).__next__


def update_all(pace: Pace, windows: list[float]) -> None:
    for seconds in windows:
        pace.on_window(seconds)
        with pace.measured():
            pass


@pytest.mark.parametrize(
    ("update", "window", "budget", "k"),
    [
        (0.005, 1.0, 0.01, 1), (0.01, 1.0, 0.01, 1), (0.0101, 1.0, 0.01, 2), (0.02, 1.0, 0.01, 2),
        (0.021, 1.0, 0.01, 4), (0.1, 0.01, 0.01, 1024), (0.1, 0.01, 10.0, 1), (0.0, 1.0, 0.01, 1),
        (1.0, 1e-300, 0.01, MAX_INTERVAL), (math.inf, 1.0, 0.01, MAX_INTERVAL),
    ],
)  # fmt: skip
def test_interval(update: float, window: float, budget: float, k: int) -> None:
    assert update_interval(update, window, budget) == k
    if 1 < k < MAX_INTERVAL:
        assert update / k <= budget * window < update / (k // 2)


def test_it_is_chosen_from_medians_and_kept() -> None:
    pace = Pace(0.01, ticking(0.07))
    update_all(pace, [30.0, 1.0])  # the first window compiled something
    assert (pace.update_every, pace.settled) == (1, False)
    update_all(pace, [1.0])
    assert (pace.update_every, pace.settled) == (8, True)
    update_all(pace, [1e-6] * 10)
    assert pace.update_every == 8
    assert [i for i in range(20) if pace.due(i)] == [0, 8, 16]


def test_who_is_not_paced_has_no_budget() -> None:
    pace = Pace(0.01, ticking(1e6))
    for seconds in (math.nan, math.inf, 0.0, -1.0, math.nan):
        pace.on_window(seconds)
        with pace.measured():
            pass
    assert (pace.update_every, pace.settled) == (1, False)
    assert pace.state_dict()["updates"] == [], "times of no use are not in the state: they differ from run to run"


def test_no_bound() -> None:
    pace = Pace(0.0, ticking(1e6))
    update_all(pace, [1e-6] * 5)
    assert pace.update_every == 1
    slow = Pace(0.01, ticking(1e6))
    update_all(slow, [1e-6] * 5)
    pace.load_state_dict(slow.state_dict())
    assert pace.update_every == 1, "the setting of the run that goes on counts"


def test_a_resume_while_measuring_takes_the_times_along() -> None:
    half = Pace(0.01, ticking(0.07))
    update_all(half, [1.0] * (NUM_MEASURED - 1))
    resumed = Pace(0.01, ticking(0.07))
    resumed.load_state_dict(through_bytes(half.state_dict()))
    update_all(resumed, [1.0])
    assert resumed.update_every == 8


# ---------------------------------------------------------------- in the predictors

TINY_RSSM = RssmConfig(
    deterministic_dim=16, stochastic_dim=4, num_categoricals=4, hidden_dim=16, ensemble_size=2, sequence_length=4
)


def paced(name: str, update_seconds: float) -> Mlp | Rssm:
    """A learned predictor whose updates seem to take so long, 1 % of the time allowed."""
    predictor = Mlp(MlpConfig(hidden=(16,)), 2, 0, 0.01) if name == "mlp" else Rssm(TINY_RSSM, 2, 0, 0.01)
    predictor.schedule.clock = ticking(update_seconds)
    return predictor


def weights(predictor: Mlp | Rssm) -> torch.Tensor:
    networks = [predictor.network] if isinstance(predictor, Mlp) else [m.model for m in predictor.members]
    return torch.cat([p.detach().flatten() for n in networks for p in n.parameters()])


@pytest.mark.parametrize("name", ["mlp", "rssm"])
def test_trains_at_every_kth_window_only(name: str) -> None:
    predictor = paced(name, 0.04)
    trained = []
    for step in turning(predictor.spec, 24):
        before = weights(predictor)
        predictor.pace(1.0)
        predictor.observe(step.window)
        if not torch.equal(before, weights(predictor)):
            trained.append(step.window.index)
    assert predictor.update_every == 4
    first = trained[0]  # measured at the first ones, whichever they are
    assert trained[:NUM_MEASURED] == [first, first + 1, first + 2]
    later = [t for t in range(first + NUM_MEASURED, 24) if t % 4 == 0]
    assert trained[NUM_MEASURED:] == later
    assert len(later) >= 3


@pytest.mark.parametrize("name", ["mlp", "rssm"])
def test_resumed_run_keeps_the_interval_whatever_its_clock_says(name: str) -> None:
    whole = paced(name, 0.04)
    windows = [step.window for step in turning(whole.spec, 24)]
    for window in windows[:12]:
        whole.pace(1.0)
        whole.observe(window)
    assert whole.update_every == 4
    resumed = paced(name, 100.0)
    resumed.load_state_dict(through_bytes(whole.state_dict()))
    for window in windows[12:]:
        whole.pace(1.0)
        whole.observe(window)
        resumed.pace(math.nan if window is windows[12] else 50.0)
        resumed.observe(window)
    assert torch.equal(weights(whole), weights(resumed))
    assert torch.equal(whole.predict(20).coefficients, resumed.predict(20).coefficients)


@pytest.mark.parametrize("name", ["mlp", "rssm"])
def test_without_a_pace_every_window_trains(name: str) -> None:
    predictor = paced(name, 1e6)
    for step in turning(predictor.spec, 16):
        before = weights(predictor)
        predictor.observe(step.window)
        assert step.window.index < 5 or not torch.equal(before, weights(predictor))


# ---------------------------------------------------------------- in a run


class Listening(Fake):
    """Writes down how long its windows took."""

    update_every = 1

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[float] = []

    def pace(self, window_seconds: float) -> None:
        self.heard.append(window_seconds)


def test_a_run_tells_the_time_of_its_real_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(perf_counter=ticking(1.0))
    monkeypatch.setattr("hybrid_predict_trainer.cycle.loop.time", clock)
    monkeypatch.setattr("hybrid_predict_trainer.cycle.learning.time", clock)
    predictor = Listening()
    made = setup("mlp", "adam")
    trainer = made.trainer(config(predictor__window=3), predictor=predictor)
    for batch in full_batch(30):
        trainer.step(batch)
    assert trainer.statistics()["num_jumps_proposed"] > 0, "steps that are no real ones are not counted"
    assert len(predictor.heard) >= 5
    assert predictor.heard == [6.0] * len(predictor.heard), "a look at the batch and a step, one tick of the clock each"
    while trainer.run.windows.basis.num_steps != 1:
        trainer.step(full_batch(1)[0])
    heard = len(predictor.heard)
    trainer.load_checkpoint(trainer.save_checkpoint(tmp_path))
    for batch in full_batch(8):
        trainer.step(batch)
    first, *rest = predictor.heard[heard:]
    assert math.isnan(first), "half of that window was timed by another process"
    assert set(rest) <= {6.0}


def test_who_is_paced() -> None:
    assert isinstance(Mlp(MlpConfig(), 2), Paced)
    assert isinstance(Rssm(TINY_RSSM, 2), Paced)
    assert not isinstance(Hold(), Paced)
    assert not isinstance(Fake(), Paced)


def test_a_recorder_passes_the_pace_on() -> None:
    inner = paced("mlp", 0.04)
    recorder = Recorder(inner)
    for _ in range(NUM_MEASURED):
        recorder.pace(1.0)
        with inner.schedule.measured():
            pass
    assert recorder.update_every == inner.update_every == 4
    Recorder(Hold()).pace(1.0)


def test_resume_of_a_run_with_a_measured_interval(tmp_path: Path) -> None:
    """Bit for bit through a checkpoint, though the second process is a hundred times slower."""
    batches = full_batch(96)

    def trainer(update_seconds: float, seed: int) -> tuple[HybridTrainer, list[torch.nn.Parameter]]:
        made = setup("mlp", "adam", "lambda", seed)
        built = made.trainer(config(predictor_type="mlp"))
        assert isinstance(built.run.proposer.predictor, Mlp)
        built.run.proposer.predictor.schedule.clock = ticking(update_seconds)
        return built, list(made.model.parameters())

    whole, parameters = trainer(1.0, 1)
    path = None
    for index, batch in enumerate(batches):
        whole.step(batch)
        if path is None and whole.run.proposer.predictor.state_dict()["schedule"]["settled"]:
            path, start = whole.save_checkpoint(tmp_path), index + 1
    assert path is not None
    interval = whole.summary()["predictor_overhead"]["update_every"]
    assert interval > 1
    seed_all(99)
    resumed, again = trainer(1e-9, 5)
    resumed.load_checkpoint(path)
    for batch in batches[start:]:
        resumed.step(batch)
    assert resumed.summary()["predictor_overhead"]["update_every"] == interval
    assert_same(resumed.run.proposer.predictor.state_dict(), whole.run.proposer.predictor.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again, parameters, strict=True))
