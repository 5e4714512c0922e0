"""Metrics: valid JSON line by line, a published summary, and a full disk that does not end a run."""

from __future__ import annotations

import errno
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import Fake, config, full_batch, make_batches, setup
from hybrid_predict_trainer.keep.failures import MAX_FAILURES
from hybrid_predict_trainer.records import ConfigError, Phase, Reason, StepResult
from hybrid_predict_trainer.tell import recorder as metrics
from hybrid_predict_trainer.tell.sinks import JsonlSink, NullSink, jsonable


def strict(text: str) -> Any:
    """JSON without NaN or Infinity."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def recorded(tmp_path: Path, data: list, **changes: Any) -> tuple[list[dict[str, Any]], Any, list[StepResult]]:
    path = tmp_path / "deep" / "metrics.jsonl"
    made = setup("mlp", "adam")
    trainer = made.trainer(config(metrics__path=str(path), **changes), predictor=Fake())
    results = [trainer.step(batch) for batch in data]
    trainer.metrics.sink.close()
    return [strict(line) for line in path.read_text(encoding="utf-8").splitlines()], trainer, results


# ---------------------------------------------------------------- JSON


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(), v, max_size=4) | st.tuples(v, v), max_leaves=20,
)  # fmt: skip


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_anything_becomes_json(value: Any) -> None:
    strict(json.dumps(jsonable(value), allow_nan=False))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(math.nan, None), (math.inf, None), (-math.inf, None), (1.5, 1.5), (Phase.FULL, "full"), (np.float64(2.0), 2.0),
     (np.array([1.0, math.nan]), [1.0, None]), (torch.tensor([1.0, math.inf]), [1.0, None]), (Path("x"), "x"),
     ({1: (True, None)}, {"1": [True, None]})],
    ids=repr,
)  # fmt: skip
def test_jsonable(value: Any, wanted: Any) -> None:
    assert jsonable(value) == wanted
    assert strict(json.dumps(jsonable(value))) == wanted


# ---------------------------------------------------------------- records


def test_lines_tell_what_happened(tmp_path: Path) -> None:
    lines, trainer, results = recorded(tmp_path, full_batch(60))
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 61))
    assert [line["phase"] for line in steps] == [r.phase.value for r in results]
    assert [line["loss"] for line in steps] == pytest.approx([r.loss for r in results])
    assert {line["schema"] for line in lines} == {1}
    jumps = [line for line in lines if line["event"] == "jump"]
    assert len(jumps) == trainer.statistics()["num_jumps_proposed"]
    assert sum(j["accepted"] for j in jumps) == trainer.statistics()["num_jumps_accepted"] > 0
    for jump in jumps:
        assert jump["reason"] in {r.value for r in Reason}
        assert (jump["coefficients"] is None) is not jump["accepted"]
        if jump["accepted"]:
            assert jump["measured_reduction"] == pytest.approx(jump["loss_before"] - jump["loss_after"])
    changes = [line for line in lines if line["event"] == "transition"]
    phases = [r.phase.value for r in results]
    assert [(c["from"], c["to"]) for c in changes] == [(a, b) for a, b in pairwise(phases) if a != b]
    corrections = [line for line in lines if line["event"] == "correction"]
    assert len(corrections) == sum(j["accepted"] for j in jumps)
    assert all(isinstance(c["kept"], bool) for c in corrections)
    costs = [line["cost_units"] for line in steps]
    assert costs == sorted(costs)


def test_nan_losses_are_null(tmp_path: Path) -> None:
    batches = make_batches(8)
    batches[5] = (batches[5][0] * math.nan, batches[5][1])
    lines, trainer, _ = recorded(tmp_path, batches)
    [skipped] = [line for line in lines if line.get("skipped")]
    assert (skipped["loss"], skipped["step"]) == (None, 6)
    [event] = [line for line in lines if line["event"] == "divergence"]
    assert (event["severity"], event["action"], event["value"], event["step"]) == ("critical", "skip_step", None, 6)
    strict(json.dumps(trainer.summary(), allow_nan=False))


def test_metrics_append(tmp_path: Path) -> None:
    """A resumed run goes on in the same file."""
    path = tmp_path / "m.jsonl"
    for _ in range(2):
        sink = JsonlSink(path)
        sink.write({"event": "x"})
        sink.close()
    assert len(path.read_text().splitlines()) == 2


def test_collecting_may_be_off(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    trainer = setup().trainer(config(collect_metrics=False, metrics__path=str(path)))
    trainer.step(make_batches(1)[0])
    assert isinstance(trainer.metrics.sink, NullSink)
    assert not path.exists()


# ---------------------------------------------------------------- a failing sink


class FullDisk:
    """A file on a disk that fills up after some lines."""

    def __init__(self, room: int) -> None:
        self.room, self.lines = room, 0

    def write(self, text: str) -> int:
        if self.lines >= self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.lines += 1
        return len(text)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("room", [0, 3])
def test_a_full_disk_does_not_end_the_run(room: int, tmp_path: Path) -> None:
    batches = make_batches(20)
    plain = setup()
    wanted = plain.plain(batches)
    trainer = setup().trainer(config(metrics__path=str(tmp_path / "m.jsonl")), predictor=Fake(1.0))
    sink = trainer.metrics.sink
    assert isinstance(sink, JsonlSink)
    sink._file.close()
    sink._file = FullDisk(room)
    results = []
    with pytest.warns(UserWarning, match=r"m\.jsonl: No space left.*training goes on") as caught:
        trainer.fit(batches, progress_callback=results.append)
    assert len(caught) == 1, "said once"
    assert [r.loss for r in results if r.num_backward] == wanted
    assert trainer.summary()["metrics_incomplete"] is True
    sink.close()


# ---------------------------------------------------------------- sinks of the user's own


class Kept:
    """Keeps what it gets; raises at the first ``failing`` records."""

    def __init__(self, failing: int = 0) -> None:
        self.failing, self.records, self.closed = failing, [], False

    def write(self, record: Any) -> None:
        if self.failing > 0:
            self.failing -= 1
            raise RuntimeError("no network")
        self.records.append(record)

    def close(self) -> None:
        self.closed = True
        raise RuntimeError("closing failed, too")


class OnlyWrites:
    def __init__(self) -> None:
        self.events: list[str] = []

    def write(self, record: Any) -> None:
        self.events.append(record["event"])


def test_sinks_get_what_the_file_gets(tmp_path: Path) -> None:
    path, one, other = tmp_path / "m.jsonl", Kept(), OnlyWrites()
    trainer = setup("mlp", "adam").trainer(config(metrics__path=str(path)), predictor=Fake(), sinks=[one, other])
    for batch in full_batch(60):
        trainer.step(batch)
    assert trainer.summary()["metrics_incomplete"] is False
    trainer.metrics.sink.close()
    assert one.closed
    lines = [strict(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [jsonable(record) for record in one.records] == lines
    assert other.events == [line["event"] for line in lines]
    assert {"step", "transition", "jump"} <= set(other.events)


def test_a_sink_alone_needs_no_file() -> None:
    sink = OnlyWrites()
    trainer = setup().trainer(config(), sinks=[sink])
    trainer.step(make_batches(1)[0])
    assert sink.events == ["step"]
    off = setup().trainer(config(collect_metrics=False), sinks=[sink])
    off.step(make_batches(1)[0])
    assert isinstance(off.metrics.sink, NullSink)
    assert sink.events == ["step"]


@pytest.mark.parametrize("failing", [1, MAX_FAILURES - 1, MAX_FAILURES, 100])
def test_a_sink_that_fails_takes_nobody_along(failing: int) -> None:
    batches, plain = make_batches(20), setup()
    wanted = plain.plain(batches)
    bad, good = Kept(failing), OnlyWrites()
    trainer = setup().trainer(config(enabled=False), sinks=[bad, good])
    with pytest.warns(UserWarning, match=r"sink Kept failed \(RuntimeError: no network\).*training goes on") as caught:
        losses = [trainer.step(batch).loss for batch in batches]
    assert len(caught) == 1, "said once"
    assert losses == wanted
    assert good.events.count("step") == 20
    assert len(bad.records) == (len(good.events) - failing if failing < MAX_FAILURES else 0)
    assert trainer.summary()["metrics_incomplete"] is True
    assert trainer.summary()["failures"] == {}
    trainer.metrics.sink.close()


@pytest.mark.parametrize("sink", [print, object(), "file.jsonl"])
def test_what_is_no_sink_is_refused(sink: Any) -> None:
    with pytest.raises(ConfigError, match=r"sinks holds .*: pass objects with a method write\(record\)"):
        setup().trainer(config(), sinks=[sink])


# ---------------------------------------------------------------- summary


def shape_of(value: Any) -> Any:
    return {k: shape_of(v) for k, v in value.items()} if isinstance(value, dict) else None


#: The published schema; more keys are allowed.
SCHEMA = {
    "training_summary": dict.fromkeys((
        "total_steps", "warmup_steps", "full_steps", "predict_steps", "correct_steps", "backward_reduction_pct",
        "wall_clock_speedup", "final_loss", "baseline_loss_estimate", "loss_gap_pct",
    )),
    "phase_statistics": {
        **dict.fromkeys(("avg_predict_length", "max_predict_length", "avg_confidence")),
        "prediction_accuracy": dict.fromkeys(("loss_mae", "loss_correlation", "weight_cosine_similarity")),
    },
    "predictor_overhead": dict.fromkeys((
        "encode_time_ms_avg", "predict_time_ms_avg", "update_time_ms_avg", "memory_used_mb", "pct_of_step_time",
    )),
}  # fmt: skip
EVENT_KEYS = {"step", "severity", "action", "recovery_successful"}


def contains(found: Any, wanted: Any, path: str = "") -> None:
    for key, inner in wanted.items():
        assert key in found, f"{path}.{key}"
        if inner:
            contains(found[key], inner, f"{path}.{key}")


@pytest.mark.parametrize("when", ["before", "after"])
def test_summary_has_the_published_schema(when: str) -> None:
    trainer = setup("mlp", "adam").trainer(config(), predictor=Fake())
    if when == "after":
        for i, batch in enumerate(full_batch(60)):
            trainer.step((batch[0] * math.nan, batch[1]) if i == 40 else batch)
    summary = trainer.summary()
    strict(json.dumps(summary, allow_nan=False))
    contains(shape_of(summary), SCHEMA)
    assert isinstance(summary["divergence_events"], list)
    for event in summary["divergence_events"]:
        assert set(event) >= EVENT_KEYS
        assert event["severity"] in ("caution", "warning", "critical")
    assert bool(summary["divergence_events"]) is (when == "after")
    assert summary["metrics_incomplete"] is False


def test_summary_is_computed(tmp_path: Path) -> None:
    lines, trainer, results = recorded(tmp_path, full_batch(80))
    summary = trainer.summary()
    own, phases = summary["training_summary"], summary["phase_statistics"]
    assert own["total_steps"] == 80
    for phase in Phase:
        assert own[f"{phase.value}_steps"] == sum(r.phase is phase for r in results)
    accepted = [r for r in results if r.was_predicted]
    claimed, backward = sum(r.num_claimed_steps for r in accepted), sum(r.num_backward for r in results)
    assert own["backward_reduction_pct"] == pytest.approx(100 * claimed / (claimed + backward) if claimed else 0.0)
    lengths = [r.num_claimed_steps for r in accepted]
    assert phases["max_predict_length"] == max(lengths)
    assert phases["avg_predict_length"] == pytest.approx(np.mean(lengths))
    errors = [abs(j["predicted_loss"] - j["loss_after"]) for j in lines if j["event"] == "jump" and j["accepted"]]
    assert phases["prediction_accuracy"]["loss_mae"] == pytest.approx(np.mean(errors))
    assert (own["wall_clock_speedup"], own["baseline_loss_estimate"], own["loss_gap_pct"]) == (None, None, None), (
        "not known to one run"
    )
    assert 0 < summary["predictor_overhead"]["pct_of_step_time"] < 100
    assert summary["statistics"] == trainer.statistics()
    assert lines


def test_statistics_names() -> None:
    wanted = {
        "num_real_steps",
        "num_claimed_steps",
        "num_credited_steps",
        "num_forward",
        "num_backward",
        "num_jumps_proposed",
        "num_jumps_accepted",
        "num_rollbacks",
        "cost_units",
        "backward_reduction_pct",
        "steps_gained",
        "steps_gained_ci95",
    }
    assert wanted <= set(setup().trainer(config()).statistics())


def test_correlation_and_mean() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=50)
    b = 0.5 * a + generator.normal(size=50)
    assert metrics.correlation(list(zip(a, b, strict=True))) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert metrics.correlation([(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)]) is None
    assert metrics.correlation([(1.0, 2.0), (2.0, 3.0)]) is None
    assert metrics.correlation([(1.0, math.nan)] * 5) is None
    assert metrics.mean([1.0, math.nan, 3.0]) == 2.0
    assert metrics.mean([]) is None


def test_recovery_is_noted_once_training_is_quiet() -> None:
    trainer = setup().trainer(config())
    batches = make_batches(6)
    for batch in batches:
        trainer.step(batch)
    bad = (batches[0][0] * math.nan, batches[0][1])
    trainer.step(bad)
    trainer.step(bad)
    assert [e["recovery_successful"] for e in trainer.summary()["divergence_events"]] == [None, None]
    trainer.step(batches[0])
    assert [e["recovery_successful"] for e in trainer.summary()["divergence_events"]] == [True, True]


def test_step_result_fields() -> None:
    result = setup().trainer(config()).step(make_batches(1)[0])
    assert (result.phase, result.was_predicted, result.prediction_error, result.step) == (Phase.WARMUP, False, None, 1)
    assert result.gradient_norm is not None
    assert 0 <= result.confidence <= 1
    assert result.step_time_ms > 0
    assert (result.num_forward, result.num_backward, result.consumed) == (1, 1, True)


def test_epoch_result() -> None:
    trainer = setup("mlp", "adam").trainer(config(), predictor=Fake())
    data, seen = full_batch(40), []
    first = trainer.train_epoch(data, progress_callback=seen.append)
    assert first.num_steps == len(seen) == sum(first.phase_counts.values())
    assert first.num_jumps_accepted > 0
    real = [r for r in seen if r.num_backward or r.was_predicted]
    assert first.mean_loss == pytest.approx(np.mean([r.loss for r in real]))
    assert first.final_loss == pytest.approx(real[-1].loss)
    before = trainer.statistics()
    second = trainer.train_epoch(data)
    after = trainer.statistics()
    for name in (
        "num_real_steps",
        "num_claimed_steps",
        "num_forward",
        "num_backward",
        "num_jumps_proposed",
        "cost_units",
    ):
        assert getattr(second, name) == pytest.approx(after[name] - before[name]), name
    assert first.epoch_time_s > 0
    assert not first.stopped_early


def test_stopping_between_steps() -> None:
    trainer = setup().trainer(config())
    epoch = trainer.fit(make_batches(20), should_stop=lambda: trainer.current_step >= 7)
    assert (epoch.num_steps, epoch.stopped_early) == (7, True)
