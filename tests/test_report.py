"""The report page: parses, loads nothing, escapes everything, says what it does not know."""

from __future__ import annotations

import json
import math
import random
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cases import config, setup
from hybrid_predict_trainer.experiments.compare.run import in_percent
from hybrid_predict_trainer.experiments.report import charts as svg
from hybrid_predict_trainer.experiments.report import confidence
from hybrid_predict_trainer.experiments.report import page as page_module
from hybrid_predict_trainer.experiments.report.confidence import Point, pooled, pooled_error, reliability_chart
from hybrid_predict_trainer.experiments.report.data import load
from hybrid_predict_trainer.experiments.report.page import build_report, format_value, mean_std, number, write_report
from hybrid_predict_trainer.experiments.report.parts import html_table
from hybrid_predict_trainer.experiments.report_withdrawn import COUNTS

HOSTILE = "<script>alert('x')</script>\"&\x00\u202e"
VOID = {"meta", "br", "hr", "img", "input", "link"}
REFUSALS = (
    "no length of the jump lowers the loss",
    "the improvement is not significant at its price",
    "approved, but held out to measure what jumps are worth",
    "the jump leaves the trust radius",
)
Row = dict[str, Any]


# ---------------------------------------------------------------------------------------- made-up data


def fake_run(folder: Path, arm: str, seed: int, num_steps: int, budget: float = 1.0, lead: float = 0.0) -> None:
    """Write one run with a decaying loss; ``lead`` > 0 makes it a hybrid run that is that far ahead."""
    rng = random.Random(f"{arm}{seed}")
    rows: list[Row] = []
    cost, phase, hybrid = 0.0, "warmup", arm in ("hybrid", "jump-of-zero")
    stop = int(num_steps * budget)
    for step in range(stop):
        phase = "warmup" if step < num_steps // 10 else "full"
        if hybrid and phase == "full":
            phase = {0: "predict", 1: "correct", 2: "correct", 3: "correct"}.get(step % 25, "full")
        cost += 0.4 if phase == "predict" else 1.0
        decay = 0.25 * max(0.0, step / stop - 0.8)
        true = 2.2 + 3.3 * math.exp(-(1 + lead) * step / (0.16 * num_steps)) - decay - 0.04 * lead
        loss = true + rng.gauss(0, 0.05) + (1.5 if step == num_steps // 2 else 0.0)
        spent = {"step": step, "cost_units": cost, "num_real_steps": step}
        rows.append({"event": "step", "phase": phase, "loss": loss, "gradient_norm": None, "lr": 3e-3,
                     "confidence": 0.9, "was_predicted": phase == "predict", "step_time_ms": 12.0,
                     "skipped": False, **spent})  # fmt: skip
        if phase == "predict":
            gain = rng.uniform(-0.02, 0.12) * lead
            accepted = gain > 0.015
            skipped = accepted and rng.random() < 0.15
            reason = "the loss fell enough" if accepted else rng.choice(REFUSALS[:2] * 3 + REFUSALS)
            after = None if reason == REFUSALS[3] else true - gain
            rows.append({"event": "jump", "accepted": accepted and not skipped, "horizon": 20, "scale": 1.0,
                         "reason": REFUSALS[2] if skipped else reason, "loss_before": true,
                         "loss_after": after,
                         "predicted_loss": true - abs(gain) * rng.uniform(0.5, 2),
                         "upper_bound": -gain / 2,
                         "price": 0.003, "num_forward": 1.2, "confidence": 0.8, "predictor": "secant",
                         **spent})  # fmt: skip
            if accepted:
                left = 0.3 * gain * (not skipped) + rng.gauss(0, 0.01)
                rows.append({"event": "outcome", "step": step, "skipped": skipped, "gate_gain": gain,
                             "gain_left": left, "persistence": 0.3})  # fmt: skip
                rows.append({"event": "correction", "step": step, "kept": rng.random() < 0.9, "reason": "",
                             "loss_before": true, "loss_after": after})  # fmt: skip
        if step % (num_steps // 20) == 0 or step == stop - 1:
            measured = {"val_loss": true + rng.gauss(0, 0.015), "wall_s": cost / 80}
            rows.append({"event": "validation", **measured, **spent})
        if step == num_steps // 2 and hybrid:
            rows.append({"event": "divergence", "step": step, "signal": "loss above EMA", "level": 2,
                         "action": "force_full_phase", "value": 4.5, "threshold": 3.0})  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    ledger = {"steps_gained": 41.5 + seed, "steps_gained_ci95": [12.0, 70.25], "persistence": 0.31,
              "num_controls": 4, "num_treated": 31, "returned_units": 52.5, "spent_units": 17.25,
              "effect_per_jump": 0.0213, "effect_per_jump_ci95": [0.011, 0.032], "state": "paying"}  # fmt: skip
    summary: Row = {"training_summary": {"num_steps": stop}, "predictor_overhead": {"frac": 0.004}}
    bins = [{"center": c, "confidence": c + 0.02, "accuracy": c - 0.03, "count": 5} for c in (0.25, 0.45, 0.75)]
    summary["calibration"] = {"num_outcomes": 15 if hybrid else 0, "temperature": 1.25, "ece": 0.05, "ece_sweep": 0.04,
                              "ece_by_chance": 0.06, "log_loss": 0.61, "log_loss_raw": 0.93,
                              "reliability": bins if hybrid else []}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary | ({"ledger": ledger} if hybrid else {})))


def fake_compare(root: Path, num_steps: int = 200, seeds: int = 2, **changes: object) -> Path:
    """Write a comparison of five arms; ``changes`` replace keys of compare.json."""
    leads = {"plain": 0.0, "hybrid": 0.6, "jump-of-zero": 0.0, "plain@0.5": 0.0, "plain@0.75": 0.0}
    arms: list[Row] = []
    for k, (name, lead) in enumerate(leads.items()):
        budget = float(name.partition("@")[2] or 1)
        for seed in range(seeds):
            fake_run(root / "runs" / f"{name}-s{seed}", name, seed, num_steps, budget, lead)
        arms.append({"name": name, "final_val_loss": 2.15432 + 0.01 * k, "final_val_loss_std": 0.0123,
                     "n": seeds, "cost_units": 1234.5 * budget,
                     "wall_s": 61.7, "num_forward": 1300, "num_backward": 1187,
                     "num_real_steps": 1187, "num_claimed_steps": 240 if lead else 0,
                     "num_credited_steps": 41.5,
                     "num_jumps_proposed": 48, "num_jumps_accepted": 31, "odd": [1]})  # fmt: skip
    compare = {
        "task": "tiny language model, bytes", "seeds": list(range(seeds)), "arms": arms,
        "speedup_at_equal_loss": 1.37, "speedup_ci95": [1.21, 1.52], "speedup_per_seed": [1.33, 1.41],
        "speedup_reason": "interpolated between plain budgets", "loss_gap_at_equal_cost_pct": -1.84,
        "backward_reduction_pct": 4.25,
        "verdict": "The hybrid run reached the same loss at 0.73 of the cost.",
        "environment": {"torch": "2.13.0", "python": "3.11.2", "num_threads": 2, "commit": "abc123"},
        "settings": {"warmup_steps": 100, "gate": {"overhead_budget": 0.01}, "lrs": [0.001, 0.003]},
        "unknown_key": {"a": None},
    }  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    (root / "compare.json").write_text(json.dumps(compare | changes), encoding="utf-8")
    return root


class Page(HTMLParser):
    """Checks that tags balance and collects tags, attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"doubled attribute in {tag}"
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """The words, white space folded."""
        return re.sub(r"\s+", " ", " ".join(self.words)).replace("\u202f", " ").replace("\xa0", " ")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison, made once."""
    return fake_compare(tmp_path_factory.mktemp("data") / "demo")


# ------------------------------------------------------------------------------------------- the page


def test_page_is_well_formed_and_loads_nothing(compared: Path) -> None:
    text = build_report(compared)
    page = Page(text)
    assert "script" not in page.tags
    assert not re.search(r"https?:|url\(|@import|src=|href=|nan|inf[^o]", text.lower().replace("final", ""))
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert len(text) < 400_000


def test_page_shows_the_numbers_in_order(compared: Path) -> None:
    text = Page(build_report(compared)).text
    at = 0
    for expected in (
        "Comparison: demo", "tiny language model, bytes", "at 0.73 of the cost", "1.37\u00d7", "1.21 to 1.52",
        "1.33, 1.41", "interpolated between plain budgets", "\u22121.84 %", "4.25 %", "2.154 ± 0.012",
        "1 234",
        "1 187", "31 of 48", "1. Loss against cost", "plain@0.75", "2. Phases", "jumps accepted", "3. Jumps",
        "no length of the jump lowers the loss", "4. The ledger", "52.5", "41.5", "12 to 70.25", "2.13 %",
        "1.1 to 3.2", "paying", "5. Confidence", "calibration error 0.050 over 30 outcomes", "hybrid-s0",
        "1.25", "0.93", "Divergence", "loss above EMA", "warning",
        "How to read this page", "Jump of zero", "Environment",
        "abc123", "gate.overhead_budget", "0.001, 0.003",
    ):  # fmt: skip
        found = text.find(expected, at)
        assert found >= 0, f"{expected!r} missing after {text[max(0, at - 40) : at]!r}"
        at = found


def test_reliability_is_pooled_by_counts_and_drawn_where_it_belongs() -> None:
    few = {"center": 0.25, "confidence": 0.2, "accuracy": 0.0, "count": 1}
    many = {"center": 0.25, "confidence": 0.3, "accuracy": 1.0, "count": 3}
    (point,) = pooled([[few], [many, {"center": 0.75}, "no bin", {**few, "accuracy": 7}, {**few, "count": 0}]])
    assert (point.stated, point.kept, point.count) == pytest.approx((0.275, 0.75, 4))
    assert pooled_error([point]) == pytest.approx(0.475)
    assert math.isnan(pooled_error([]))
    drawn = reliability_chart([("a<b", "c1", [Point(0.0, 0.0, 1), Point(1.0, 1.0, 3)])], 470)
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', drawn)
    guide = re.search(r'<path d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)" class="guide"', drawn)
    assert guide is not None
    ends = [guide.group(1, 2), guide.group(3, 4)]
    assert [(x, y) for x, y, _ in circles] == ends, "honest points lie on the diagonal"
    assert [float(r) ** 2 for _, _, r in circles] == pytest.approx([16.0**2 / 4, 16.0**2 * 3 / 4], rel=0.01)
    assert "a&lt;b" in drawn


def test_a_run_without_outcomes_draws_no_curve(tmp_path: Path) -> None:
    fake_run(tmp_path / "mine", "plain", 0, 40)
    text = build_report(tmp_path / "mine")
    assert "no figure of jumps, of the ledger and of confidence" in text
    assert "5. Confidence" not in text
    assert "share that was kept and paid" not in text


def test_spread_of_the_predictor_is_shown_where_it_has_one(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    fake_run(folder, "hybrid", 0, 60, lead=0.5)
    assert "Epistemic" in build_report(folder)
    assert "0.438" not in build_report(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [line | {"epistemic": 0.4375, "aleatoric": 0.0} if line["event"] == "jump" else line for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, told)))
    assert "0.438 not measured" in Page(build_report(folder)).text


def test_unknown_speedup_is_said_plainly(tmp_path: Path) -> None:
    why = "no plain run reached the hybrid run's loss"
    fake_compare(tmp_path, 60, 1, speedup_at_equal_loss=None, speedup_ci95=None, speedup_reason=why, arms=[])
    text = Page(build_report(tmp_path)).text
    assert "Equal-loss speed-up unknown No plain run reached the hybrid run's loss" in text
    assert "jump-of-zero" in text  # the arms come from the runs instead


def test_interval_that_includes_one_claims_nothing(tmp_path: Path) -> None:
    fake_compare(tmp_path, 40, 1, speedup_at_equal_loss=1.02, speedup_ci95=[0.97, 1.06])
    assert "the interval includes 1, so no speed-up has been shown" in Page(build_report(tmp_path)).text


def test_missing_keys_are_not_measured(tmp_path: Path) -> None:
    text = '{"arms": [{"name": "plain", "cost_units": NaN}, 3], "seeds": null}'
    (tmp_path / "compare.json").write_text(text)
    page = Page(build_report(tmp_path))
    assert page.text.count("not measured") > 10
    assert "nan" not in page.text.lower()
    assert "No validation losses were recorded" in page.text


QUIET = {
    "withdrawn": False, "num_guard_alarms": 0, "num_guard_restores": 0, "num_guard_retries": 0,
    "num_raises_taken_back": 0, "num_rollbacks": 0, "num_outside_writes": 0,
}  # fmt: skip
FAILED = {"record": {"count": 3, "first": "OSError: <b>no space</b>", "left_alone": True}}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, ["Withdrawn and taken back Not recorded."]),
        ({"statistics": QUIET}, ["The guard raised no alarm, nothing was taken back, and nothing failed."]),
        (
            {"statistics": QUIET | {"withdrawn": True, "num_guard_alarms": 1, "num_guard_restores": 1}},
            ["Withdrawn: demo.", "went on as the plain loop", "yes 1 1 0 0 0 0 nothing"],
        ),
        ({"statistics": QUIET | {"num_raises_taken_back": 2}}, ["no 0 0 0 2 0 0 nothing"]),
        (
            {"statistics": QUIET, "failures": FAILED},
            ["no 0 0 0 0 0 0 record, 3 times, left alone since: OSError: <b>no space</b>"],
        ),
        ({"statistics": QUIET | {"num_guard_alarms": None, "num_rollbacks": 1}}, ["no not measured 0 0 0 1 0 nothing"]),
        ({"statistics": QUIET, "failures": {"gate": 7}}, ["gate, not measured times: None"]),
    ],
    ids=["older", "quiet", "withdrawn", "taken back", "failed", "unknown", "odd"],
)
def test_what_was_withdrawn_is_told(told: Row, words: list[str], tmp_path: Path) -> None:
    fake_run(tmp_path / "demo", "hybrid", 0, 40)
    path = tmp_path / "demo" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    text = Page(build_report(tmp_path / "demo")).text
    for word in words:
        assert word in text


def test_the_page_asks_for_counts_that_there_are() -> None:
    trainer = setup().trainer(config())
    assert set(COUNTS) < set(trainer.statistics())
    assert "failures" in trainer.summary()


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    arms = [{"name": HOSTILE, "n": HOSTILE, "final_val_loss": "0"}]
    fake_compare(tmp_path, 40, 1, arms=arms, task=HOSTILE, verdict=HOSTILE, speedup_reason=HOSTILE,
                 environment={HOSTILE: {HOSTILE: [HOSTILE, "\ud800"]}},
                 speedup_at_equal_loss=None)  # fmt: skip
    bad = tmp_path / "runs" / '<img src=x onerror="a">-s0'
    bad.mkdir()
    rows = [
        {"event": "validation", "step": 1, "cost_units": 1, "val_loss": 2},
        {"event": "validation", "step": 2, "cost_units": 2, "val_loss": 1},
        {"event": "step", "step": 1, "phase": HOSTILE, "loss": 10**400},
        {"event": "jump", "step": HOSTILE, "reason": HOSTILE, "predicted_loss": 1, "loss_after": 1},
        {"event": "divergence", "signal": HOSTILE, "level": HOSTILE, "action": HOSTILE, "value": [HOSTILE]},
        {"event": "outcome", "step": HOSTILE, "gate_gain": 1e300, "gain_left": True},
    ]
    (bad / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (bad / "summary.json").write_text(json.dumps({"ledger": {"state": HOSTILE}, "x": {HOSTILE: HOSTILE}}))
    out = write_report(tmp_path)
    assert out == tmp_path / "report.html"
    page = Page(out.read_text(encoding="utf-8"))
    assert not {"script", "img"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert HOSTILE[:-2] in "".join(page.words)
    assert "\x00" not in "".join(page.words)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values that are no containers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return [path] if items is None else [p for key, inner in items for p in leaves(inner, (*path, key))]


def test_every_leaf_of_a_comparison_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (page_module, confidence):  # a hundred pages: what the charts escape is tested above and below
        monkeypatch.setattr(module, "figure", lambda title, caption, *_: f"{title}{caption}")
    bounds = [{"value": 2.0, "kind": "at least"}, {"value": 1.5, "kind": "exact"}]
    fake_compare(tmp_path, 20, 1, speedup_bounds=bounds, sweep=None)
    path = tmp_path / "compare.json"
    whole = json.loads(path.read_text())
    assert len(leaves(whole)) > 20
    for leaf in leaves(whole):
        changed = json.loads(json.dumps(whole))
        at = changed
        for key in leaf[:-1]:
            at = at[key]
        at[leaf[-1]] = HOSTILE
        path.write_text(json.dumps(changed))
        html = build_report(tmp_path)
        assert "<script" not in html, leaf


@pytest.mark.parametrize(
    ("ends", "words"),
    [([1.2, None], "interval from 1.2 on"), ([None, 0.9], "interval up to 0.9"),
     ([None, None], "o confidence interval: too few"),
     ([None, 1.2], "the interval includes 1"), ([0.9, None], "the interval includes 1")],
)  # fmt: skip
def test_open_ends_of_an_interval(ends: list[float | None], words: str, tmp_path: Path) -> None:
    fake_compare(tmp_path, 40, 1, speedup_ci95=ends)
    text = Page(build_report(tmp_path)).text
    assert words in text
    includes = ends != [None, None] and (ends[0] is None or ends[0] <= 1) and (ends[1] is None or ends[1] >= 1)
    assert ("includes 1, so no" in text) == includes


# ------------------------------------------------------------------------------------------- bad input


def test_one_run_without_comparison(tmp_path: Path) -> None:
    fake_run(tmp_path / "mine", "hybrid", 0, 100, lead=0.5)
    text = Page(build_report(tmp_path / "mine")).text
    assert "Run: mine" in text
    assert "no speed-up is claimed" in text
    assert "Steps gained, mine 41.5 95 % confidence interval 12 to 70.25 steps" in text


def test_a_folder_of_runs_needs_no_folder_named_runs(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        fake_run(tmp_path / name, "plain", seed, 40)
    (tmp_path / "notes").mkdir()
    text = Page(build_report(tmp_path)).text
    assert f"Runs: {tmp_path.name}" in text
    assert [run.name for run in load(tmp_path).runs] == ["a", "b"]


def test_a_hundred_runs_stay_readable(tmp_path: Path) -> None:
    for k in range(100):
        fake_run(
            tmp_path / f"{'hybrid' if k < 50 else 'plain'}-{k:02}", "hybrid" if k < 50 else "plain", k, 40, lead=1.0
        )
    html = build_report(tmp_path)
    page = Page(html)
    assert "80 more" in page.text, "rows beyond twenty are folded up"
    assert "and 80 more" in page.text, "names of a legend are counted"
    assert "The first 12 of 50 runs." in page.text
    assert "the first 12 of 50 arms" in page.text
    charts = re.findall(r'<svg viewBox="0 0 [\d.]+ ([\d.]+)" role="img"(.*?)</svg>', html, re.DOTALL)
    named = [(float(height), re.findall(r'y="(-?[\d.]+)" class="direct', inside)) for height, inside in charts]
    assert sum(len(places) > 10 for _, places in named) >= 2
    for height, places in named:
        assert all(0 < float(y) < height for y in places), "a name has left its chart"


def test_torn_tail_is_left_out_with_a_notice(tmp_path: Path) -> None:
    fake_run(tmp_path / "runs" / "plain-s0", "plain", 0, 40)
    file = tmp_path / "runs" / "plain-s0" / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    assert "plain-s0: the last line of metrics.jsonl was torn and has been left out" in build_report(tmp_path)


@pytest.mark.parametrize("torn", [b'{"event": "st', b"[1]", b"\xff\xfe\x00", b"[" * 100_000])
def test_torn_middle_names_file_and_line(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"event": "step"}\n' + torn + b'\n{"event": "step"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: ") as caught:
        build_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_resumed_run_shows_the_later_attempt(tmp_path: Path) -> None:
    steps = [(0, 9.0), (1, 8.0), (2, 77.0), (2, 7.0), (3, 6.0)]
    lines = [json.dumps({"event": "step", "phase": "full", "step": s, "loss": x}) for s, x in steps]
    late = {"event": "validation", "step": 3, "cost_units": 3, "val_loss": 55.0}
    lines.insert(3, json.dumps(late))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    text = build_report(tmp_path)
    assert "resumed: 2 records of an abandoned attempt" in text
    assert "No validation losses were recorded" in text


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing to report"):
        build_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        build_report(tmp_path / "absent")


@pytest.mark.parametrize("content", ["", "[]", "{", "\ufeff{]"])
def test_damaged_compare_is_one_clear_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "compare.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"compare\.json: ") as caught:
        build_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_empty_metrics_file_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    text = Page(build_report(tmp_path)).text
    for expected in (
        "No validation losses",
        "No run predicted",
        "None.",
    ):
        assert expected in text


# -------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("lo", "hi", "expected"),
    [
        (0, 10, (0, 2, 4, 6, 8, 10)),
        (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (-1, 1, (-1, -0.5, 0, 0.5, 1)),
        (0, 97, (0, 20, 40, 60, 80)),
        (1e6, 3e6, (1e6, 1.5e6, 2e6, 2.5e6, 3e6)),
    ],
)
def test_ticks_are_round_and_inside(lo: float, hi: float, expected: tuple[float, ...]) -> None:
    assert svg.ticks_of(lo, hi) == pytest.approx(expected)


def test_ticks_of_a_logarithmic_scale() -> None:
    assert svg.ticks_of(1, 100, 6, log=True) == (1, 2, 5, 10, 20, 50, 100)
    assert svg.ticks_of(0.5, 3e5, 6, log=True) == (1, 10, 100, 1000, 1e4, 1e5)
    assert 2 <= len(svg.ticks_of(1e-90, 1e90, 6, log=True)) <= 9


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        ((0, 0.5, 1), ("0", "0.5", "1.0")),
        ((0, 5000, 10000), ("0", "5k", "10k")),
        ((-2, 0, 2), ("\u22122", "0", "2")),
        ((1e-5, 1e-4), ("1e-5".replace("-", "\u2212"), "1e-4".replace("-", "\u2212"))),
        ((1, 10, 100), ("1", "10", "100")),
        ((), ()),
    ],
)
def test_tick_labels(ticks: tuple[float, ...], expected: tuple[str, ...]) -> None:
    assert svg.tick_labels(ticks) == expected


def test_a_scale_is_logarithmic_beyond_a_decade() -> None:
    assert not svg.logarithmic([1, 9])
    assert svg.logarithmic([1, 11])
    assert not svg.logarithmic([0, 11])
    assert not svg.logarithmic([])
    for values in ([3.0], [], [1e-9, 1e9], [-5, 5]):
        low, high = svg.limits(values, log=svg.logarithmic(values))
        assert low < high
        assert all(low <= v <= high for v in values)
        assert svg.ticks_of(low, high, log=svg.logarithmic(values))


def test_envelope_keeps_the_spikes() -> None:
    points = [(float(k), 1.0) for k in range(100_000)]
    points[54_321], points[70_000] = (54_321.0, 99.0), (70_000.0, -3.0)
    kept = svg.envelope(points, 1000)
    assert len(kept) <= 1000
    assert {99.0, -3.0} <= {y for _, y in kept}
    assert list(kept) == sorted(kept)
    assert svg.envelope(points[:10]) == tuple(points[:10])


CURVES = [
    svg.Curve("a<b", "c1", ((0.0, 4.0), (10.0, 1.0)), ((0.0, 3.5), (10.0, 0.9)), ((0.0, 4.5), (10.0, 1.1))),
    svg.Curve("ends early", "c0 d1", ((0.0, 4.0), (5.0, 2.0))),
    svg.Curve("a little later", "c3", ((0.0, 4.0), (5.2, 2.05))),
    svg.Curve("$\\frac{", "c2", ((0.0, 4.0), (10.0, 1.01))),
]


def test_a_chart_has_classes_for_colours_and_no_definitions() -> None:
    drawn = svg.line_chart(CURVES, 860, "cost", "loss")
    assert not re.search(r"style=|#[0-9a-f]{3}|url|href|<defs|<use| id=", drawn)
    for part in ('class="line c1"', 'class="band c1"', 'class="line c0 d1"', 'class="direct c1"', 'class="grid"',
                 'class="axis"', ">a&lt;b<", "<title>a&lt;b: 4 at 0</title>", "$\\frac{", ">loss<", ">cost<",
                 ):  # fmt: skip
        assert part in drawn, part
    assert svg.line_chart(CURVES, 860, "cost", "loss") == drawn, "the same data, the same text"
    assert "<title>" not in svg.line_chart(CURVES, 380, "cost", "loss"), "phones have no pointer"


@pytest.mark.parametrize("width", [380, 860])
def test_words_of_a_chart_do_not_overlap_and_stay_inside(width: int) -> None:
    drawn = svg.line_chart(CURVES, width, "cost", "loss")
    boxes = []
    for x, y, class_, text in re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)"(?: class="([^"]*)")?>([^<]*)<', drawn):
        long = 6.7 * len(text.replace("&lt;", "<"))
        left = float(x) - (long if "end" in class_.split() else long / 2 if "mid" in class_.split() else 0)
        boxes.append((left, left + long, float(y) - 9, float(y) + 2, text))
        assert left >= -6, text
        assert left + long <= width + 6, text
    assert len(boxes) > 8
    for k, (a0, a1, a2, a3, one) in enumerate(boxes):
        for b0, b1, b2, b3, other in boxes[k + 1 :]:
            assert a1 <= b0 or b1 <= a0 or a3 <= b2 or b3 <= a2, f"{one!r} lies over {other!r}"


def test_a_timeline_joins_equal_phases_and_marks() -> None:
    spans_ = ((0.0, 5.0, "p-full"), (5.0, 6.0, "p-predict"), (6.0, 10.0, "p-full"))
    strip = svg.Strip("run", "1 of 3", spans_, ((0.0, 2.0), (9.0, 1.0)), (5.0,), (7.0, 8.0))
    drawn = svg.strip_chart([strip], 860, "step")
    assert drawn.count('class="p-full"') == drawn.count('class="p-predict"') == 1
    assert drawn.count('class="solid c1"') == drawn.count('class="ring c0"') == 1
    (boxes,) = re.findall(r'<path d="([^"]*)" class="p-full"', drawn)
    assert boxes.count("M") == 2


def test_a_library_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, compared: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "hybrid-predict-trainer\[report\]"'):
        build_report(compared)


def test_spread_keeps_a_gap() -> None:
    placed = svg.spread([50, 50, 51, 5], 10, 0, 70)
    assert sorted(placed) == [5, 50, 60, 70]
    assert svg.spread([], 10, 0, 70) == ()


def test_over_seeds() -> None:
    a, b = [(0.0, 1.0), (2.0, 3.0)], [(0.0, 3.0), (4.0, 5.0)]
    assert svg.over_seeds([a, b]) == (((0, 2), (3, 4)), ((0, 1), (3, 3)), ((0, 3), (3, 5)))
    mean, low, high = svg.over_seeds([a, [(1.0, 0.0), (1.5, 0.0), (3.0, 3.0)]])
    assert [x for x, _ in mean] == [1.0, 1.5, 2.0]
    assert [y for _, y in low] == pytest.approx([0, 0, 1])
    assert [y for _, y in high] == pytest.approx([2, 2.5, 3])
    assert svg.over_seeds([[], a]) == (tuple(a), (), ())
    assert svg.over_seeds([]) == ((), (), ())


def test_spans_join_and_vote() -> None:
    steps = [(float(k), "a" if k < 6 else "b") for k in range(10)]
    assert svg.spans(steps) == ((0, 6, "a"), (6, 10, "b"))
    busy = [(float(k), "b" if k % 25 == 0 else "a") for k in range(100_000)]
    assert len(svg.spans(busy, 400)) <= 401
    assert svg.spans([]) == ()


def test_numbers_are_shown_as_measured() -> None:
    assert [number(v) for v in (True, "1", None, math.nan, math.inf, 10**400, 2)] == [None] * 6 + [2.0]
    assert format_value(1234567) == "1&#8239;234&#8239;567"
    assert format_value(-0.00123456) == "&minus;0.001235"
    assert mean_std(2.15432, 0.0123) == "2.154 &plusmn; 0.012"
    assert mean_std(3.554e-9, 4.8e-9) == "3.6e&minus;09 &plusmn; 4.8e&minus;09"  # full batches end there
    assert mean_std(3.554e-7, 4.8e-9) == "3.554e&minus;07 &plusmn; 4.8e&minus;09"
    assert mean_std(0.0, 4.8e-9) == "0.0e+00 &plusmn; 4.8e&minus;09"
    assert mean_std(1.5e12, 2e10) == "1.500e+12 &plusmn; 2.0e+10"
    assert mean_std(2.5, None) == "2.5"
    assert "not measured" in mean_std(None, 0.1)


def test_the_head_of_a_column_of_words_stands_above_their_beginning() -> None:
    html = html_table(["Run", "Times", "Why"], [["a", "1", "text:first"], ["b", "text:2", "text:second"]])
    assert '<th>Run</th><th>Times</th><th class="text">Why</th>' in html
    assert html_table(["Why"], []).count('class="text"') == 0


def test_a_run_without_jumps_says_what_was_done_instead_and_has_no_empty_section(tmp_path: Path) -> None:
    fake_run(tmp_path / "mine", "plain", 0, 40)
    path = tmp_path / "mine" / "summary.json"
    counts = {"learned_scale": 4.0, "num_raises_taken_back": 1, "num_early_cuts": 12, "lookahead_effect": -0.25,
              "lookahead_switched_off": False, "cost_units": 310.0}  # fmt: skip
    peaks = {"head": 0.024, "attention_q": 0.009, "attention_k": 0.009, "<b>": "x", "others": 0.003}
    told = {"arm": "hybrid", "statistics": counts, "wall_s": 12.3, "peak_rates": peaks}
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}))
    text = Page(build_report(tmp_path / "mine")).text
    assert "Steps of the optimizer" in text
    assert "4\u00d7 1 12 \u22120.25 in use head 0.024; attention q, attention k 0.009; others 0.003" in text
    assert "Wall time, mine 12.3 s at the cost of 100.0 plain steps" in text
    assert not any(head in text for head in ("3. Jumps", "4. The ledger", "5. Confidence"))


@pytest.mark.parametrize(
    ("share", "words"),
    [(-99.98, "100 %"), (99.77, "99.8 %"), (-1.2345, "1.2 %"), (12.345, "12.3 %"), (1234.0, "1234 %")],
)
def test_a_percentage_is_no_power_of_ten(share: float, words: str) -> None:
    assert in_percent(share) == words
