"""`hpt bench harm`: its settings, its loops, its bar, its files, and a slice of it in seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.cli import hpt as cli
from hybrid_predict_trainer.experiments.arms.options import InputError
from hybrid_predict_trainer.experiments.harm import models, program, runs, table
from hybrid_predict_trainer.experiments.harm.runs import Parts, Result
from hybrid_predict_trainer.experiments.harm.settings import SETTINGS, Setting, select
from hybrid_predict_trainer.experiments.harm.table import Trio, judge, order_quantile, overall

TINY = replace(SETTINGS["friedman-high-rate"], name="tiny", steps=30)


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPT_DATA_DIR", raising=False)


# ---------------------------------------------------------------- settings


def test_the_table_covers_what_people_do() -> None:
    every = SETTINGS.values()
    assert len(every) >= 24
    assert {s.model for s in every} >= {"mlp", "cnn", "cnn-bn", "gru", "lstm", "gpt", "gpt-modern", "mlp-lora", "pinn"}
    assert {s.optimizer for s in every} == {"sgd", "adam", "adamw", "muon", "schedule-free"}
    assert {s.schedule for s in every} == {"none", "constant", "wsd", "cosine", "linear", "onecycle", "step"}
    assert {s.rate for s in every} == {"usual", "low", "high"}
    assert {s.momentum for s in every if s.optimizer == "sgd"} == {0.0, 0.9}
    assert {1000, 4000, 20_000} <= {s.steps for s in every}
    assert min(s.batch for s in every) <= 4
    assert max(s.batch for s in every) >= 256
    assert max(s.weight_decay for s in every) >= 0.3
    equations = [s for s in every if s.is_equation]
    assert {min(s.samples, 2) for s in equations} == {0, 1, 2}, "fixed, fresh and resampled points"
    assert any(s.dropout and s.label_smoothing for s in every)
    assert any(s.clip for s in every)
    assert any(s.accumulate > 1 for s in every)
    assert any(s.source == "drift" for s in every)
    assert all(s.num_seeds == (3 if s.steps >= 20_000 else 5) for s in every)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "BASE_STEPS", 2)
    setting = replace(SETTINGS[name], steps=3)
    parts = Parts.build(setting, 0, "plain")
    before = parts.problem.validate(parts.model)
    weights = [p.detach().clone() for p in parts.model.parameters()]
    runs.plain_steps(setting, parts, 3)
    assert any(not torch.equal(a, b) for a, b in zip(weights, parts.model.parameters(), strict=True))
    runs._mode(parts.optimizer, "eval")
    assert math.isfinite(before)
    assert math.isfinite(parts.problem.validate(parts.model))
    models._trained_gpt.cache_clear()
    models._trained_mlp.cache_clear()


def test_quick_settings_are_few_and_short() -> None:
    quick = select((), quick=True)
    assert 0 < len(quick) < 12
    assert sum(program.Job(setting=s, seed=0, arm=a).weight * s.num_seeds for s in quick for a in runs.ARMS) < 100


# ---------------------------------------------------------------- the loops


def test_the_bare_loop_is_the_one_that_users_write() -> None:
    setting = replace(TINY, dropout=0.2)
    found = Parts.build(setting, 3, "plain")
    runs.plain_steps(setting, found, 20)
    by_hand = Parts.build(setting, 3, "plain")
    for _ in range(20):
        x, y = next(by_hand.batches)
        by_hand.optimizer.zero_grad()
        torch.nn.functional.mse_loss(by_hand.model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.model.parameters(), 1.0)
        by_hand.optimizer.step()
        by_hand.schedule.step()
    for a, b in zip(found.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_trainer_that_is_off_ends_where_the_bare_loop_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def switched_off(setting: Setting, parts: Parts, _changes: object) -> HybridTrainer:
        config = HybridTrainerConfig(enabled=False, gradient_clip_norm=setting.clip)
        return HybridTrainer(parts.model, parts.optimizer, config, parts.problem.loss, parts.schedule)

    setting = replace(TINY, dropout=0.2)
    plain = runs.run(setting, 0, "plain")
    monkeypatch.setattr(runs, "build_trainer", switched_off)
    ours = runs.run(setting, 0, "ours")  # with the companion, which must not draw from the run's random numbers
    assert ours.loss == plain.loss
    assert ours.cost == plain.cost == 30
    assert ours.time_ratio is not None
    assert ours.error is None


def test_another_order_begins_with_the_same_weights() -> None:
    one, other = Parts.build(TINY, 0, "plain"), Parts.build(TINY, 0, "other-order")
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(one.batches)[0], next(other.batches)[0])


def test_seeds_begin_with_other_weights_and_share_their_data() -> None:
    setting = replace(SETTINGS["mlp-epochs"], steps=3, samples=64)
    one, other = (Parts.build(setting, seed, "plain") for seed in (0, 1))
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))
    sums = [next(p.batches)[0].sum(dim=1).sort().values for p in (one, other)]
    assert torch.equal(*sums)


def test_whatever_ends_a_run_of_ours_is_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(setting: Setting, parts: Parts, _changes: object) -> HybridTrainer:
        def loss(_model: object, _batch: object) -> Any:
            raise RuntimeError("two\nlines")

        return HybridTrainer(parts.model, parts.optimizer, HybridTrainerConfig(), loss, parts.schedule)

    monkeypatch.setattr(runs, "build_trainer", failing)
    found = runs.run(TINY, 0, "ours")
    assert found.error == "RuntimeError: two lines"
    assert math.isnan(found.loss)


# ---------------------------------------------------------------- the bar


def made(loss: float, cost: float = 1000.0, error: str | None = None) -> Result:
    return Result(loss=loss, cost=cost, seconds=1.0, time_ratio=2.0, error=error)


def verdict(
    ratios: list[float],
    *,
    order: float = 1.02,
    cost: float = 1000.0,
    lost: tuple[int, ...] = (),
    plain_lost: tuple[int, ...] = (),
    full_batch: bool = False,
) -> dict[str, Any]:
    setting = SETTINGS["pinn-fixed" if full_batch else "mlp-epochs"]
    trios = [
        Trio(
            seed=i,
            plain=made(0.5) if i not in plain_lost else made(math.nan, error="not finite"),
            ours=made(0.5 * r, cost) if i not in lost else made(math.nan, 100.0, "DivergenceError: gone"),
            other=None if full_batch else made(0.5 * order),
        )
        for i, r in enumerate(ratios)
    ]
    return judge(replace(setting, steps=1000), trios)


GOOD = [0.99, 0.995, 1.0, 1.005, 0.99]


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []),
        ({"ratios": [1.009] * 5}, []),  # within 1.01
        ({"ratios": [1.011] * 5}, ["mean"]),
        ({"ratios": [1.02, 1.021, 1.019, 1.02, 1.022]}, ["mean"]),
        ({"ratios": [0.97, 1.049, 0.98, 1.049, 1.03]}, []),  # 1.015, and as much noise
        ({"ratios": [0.98, 0.98, 0.98, 0.98, 1.051]}, ["seed"]),
        ({"ratios": [0.98, 0.98, 0.98, 0.98, 1.051], "order": 1.06}, []),  # the order alone does that
        ({"ratios": [0.98, 0.98, 0.98, 0.98, 1.051], "order": 1 / 1.06}, []),  # in the other direction, too
        ({"ratios": [0.98, 0.98, 0.98, 0.98, 1.051], "full_batch": True}, ["seed"]),
        ({"lost": (2,)}, ["lost"]),
        ({"lost": (0, 1, 2, 3, 4)}, ["lost"]),
        ({"lost": (2,), "plain_lost": (2,)}, ["plain lost"]),
        ({"plain_lost": (2,)}, ["plain lost"]),
        ({"cost": 1011.0}, ["cost"]),
        ({"cost": 989.0}, ["cost"]),
        ({"cost": 1009.0}, []),
        ({"ratios": [1.2] * 5, "cost": 1020.0}, ["mean", "seed", "cost"]),
    ],
)
def test_each_criterion_fails_alone(changes: dict[str, Any], failed: list[str]) -> None:
    found = verdict(**{"ratios": GOOD, **changes})
    assert found["failed"] == failed
    assert found["passed"] is (not failed)


def test_means_and_bounds_are_those_of_paired_logarithms() -> None:
    found = verdict([1.0, 1.1, 1.21])
    assert found["ratio"] == pytest.approx(1.1)
    # t of 2 degrees of freedom at 95 %, one-sided: 2.919986; standard error log(1.1) / sqrt(3)
    assert found["ratio_at_least"] == pytest.approx(1.1 ** (1 - 2.919986 / math.sqrt(3)), rel=1e-6)
    assert found["worst"] == pytest.approx(1.21)
    assert verdict([1.3])["ratio_at_least"] is None
    assert verdict([1.3])["failed"] == ["mean", "seed"], "one seed has no noise to be within"


def test_what_another_order_does_is_taken_in_both_directions() -> None:
    assert order_quantile([]) is None
    assert order_quantile([(1.0, 1.0)]) == 1.0
    # 0.5, 2: 95 % of the way by numpy's linear rule
    assert order_quantile([(2.0, 1.0)]) == pytest.approx(0.5 + 0.95 * 1.5)


def test_a_table_is_judged_by_settings_and_their_mean() -> None:
    good, better, bad = verdict([0.999] * 5), verdict([0.97] * 5), verdict([1.2] * 5)
    assert overall([good, better])["passed"] is True
    assert overall([good, good])["passed"] is False, "nothing is won"
    assert overall([good, good])["failed"] == []
    assert overall([better, better, bad])["passed"] is False
    assert overall([better, better, bad])["failed"] == ["mlp-epochs"]
    # a tenth of the loss in one setting does not pay for twice the loss in another
    assert overall([verdict([0.1] * 5), verdict([2.0] * 5)])["mean"] == pytest.approx(1.05)
    assert overall([])["passed"] is None


def test_a_table_that_is_not_finished_is_not_passed() -> None:
    setting = SETTINGS["mlp-epochs"]
    one = Trio(seed=0, plain=made(1.0), ours=made(0.9), other=made(1.0))
    row = judge(setting, [one, replace(one, ours=None)])
    assert (row["passed"], row["num_missing"]) == (None, 1)
    assert judge(setting, [replace(one, ours=None)])["plain"] == pytest.approx(1.0), "known before ours is"
    assert judge(setting, [replace(one, other=None)])["num_missing"] == 0, "below the fixed bar nobody has to know"
    over = replace(one, ours=made(1.06))
    assert judge(setting, [replace(over, other=None)])["num_missing"] == 1
    assert judge(setting, [over])["num_missing"] == 0
    assert judge(SETTINGS["pinn-fixed"], [replace(one, other=None)])["num_missing"] == 0
    assert overall([row])["passed"] is None
    assert "1 runs missing" in table.format_text({"settings": [row], "overall": overall([row])})


# ---------------------------------------------------------------- the command


def command(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["bench", "harm", *(str(a) for a in argv)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """Runs that are really made from now on, with made-up results."""
    found: list[tuple[str, int, str]] = []

    def counted(setting: Setting, seed: int, arm: runs.Arm, _changes: object) -> Result:
        found.append((setting.name, seed, arm))
        loss = {"plain": 1.0, "other-order": 1.01, "ours": 0.9}[arm] + 0.001 * seed
        return Result(loss=loss, cost=float(setting.steps), seconds=0.1, source="made")

    monkeypatch.setattr(program, "run", counted)
    return found


def test_a_run_that_is_there_is_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: list[tuple[str, int, str]]
) -> None:
    ask = ("--settings", "gru-linear,pinn-fixed", "--seeds", "2", "--out", tmp_path)
    status, out, err = command(capsys, *ask)
    assert status == 0
    assert len(trained) == 2 * 2 + 2 * 2, "what another order does matters only where a seed is above the fixed bar"
    assert "PASS" in out
    assert "[8/8] pinn-fixed, seed 1, ours: 0.901" in err
    trained.clear()
    again = command(capsys, *ask)
    assert (again[0], again[1], trained) == (0, out, [])
    assert "8 of 8 runs are there already" in again[2]

    next(tmp_path.glob("gru-linear-plain-s1-*.json")).write_text("{")  # damaged
    command(capsys, *ask)
    assert trained == [("gru-linear", 1, "plain")]
    trained.clear()
    command(capsys, *ask, "--tag", "changed")
    assert {arm for _, _, arm in trained} == {"ours"}, "plain runs outlive a change of ours"
    trained.clear()
    command(capsys, *ask[:2], "--seeds", "3", *ask[4:])
    assert {seed for _, seed, _ in trained} == {2}


def test_a_setting_that_is_changed_is_run_again(tmp_path: Path, trained: list[tuple[str, int, str]]) -> None:
    request = program.Request(out=tmp_path, settings=("gru-linear",), seeds=1)
    program.run_table(request, tell=lambda line: None)
    trained.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "gru-linear", replace(SETTINGS["gru-linear"], about="other words", ms=9.0))
        program.run_table(request, tell=lambda line: None)
        assert trained == []
        patch.setitem(SETTINGS, "gru-linear", replace(SETTINGS["gru-linear"], lr=1e-3))
        program.run_table(request, tell=lambda line: None)
        assert len(trained) == 2


def test_report_runs_nothing_and_writes_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: list[tuple[str, int, str]]
) -> None:
    command(capsys, "--settings", "gru-linear", "--seeds", "1", "--out", tmp_path / "runs")
    trained.clear()
    page = tmp_path / "table.md"
    ask = ("--report", tmp_path / "runs", "--settings", "gru-linear,lstm-text", "--seeds", "1", "--markdown", page)
    status, out, _ = command(capsys, *ask, "--json")
    found = json.loads(out)
    assert (status, trained) == (0, [])
    assert [(row["setting"], row["passed"]) for row in found["settings"]] == [("gru-linear", True), ("lstm-text", None)]
    assert found["overall"]["passed"] is None
    lines = page.read_text().splitlines()
    assert lines[0].startswith("| setting | plain | ours | ratio |")
    assert lines[2].startswith("| gru-linear | 1 | 0.9 | 0.900 |")
    assert lines[2].endswith("| PASS | made |")


def test_a_table_that_fails_ends_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(setting: Setting, seed: int, arm: runs.Arm, _changes: object) -> Result:
        error = "DivergenceError: gone" if arm == "ours" and seed == 1 else None
        return Result(loss=1.2 if arm == "ours" else 1.0, cost=float(setting.steps), seconds=0.1, error=error)

    monkeypatch.setattr(program, "run", worse)
    status, out, _ = command(capsys, "--settings", "gru-linear", "--seeds", "2", "--out", tmp_path)
    assert status == 1
    assert "FAIL: mean, seed, lost 1 of 2" in out
    assert "lost: gru-linear, seed 1: DivergenceError: gone" in out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--settings", "mlp-epoch"), "did you mean 'mlp-epochs'"),
        (("--settings", "nothing"), "unknown setting of 'hpt bench harm' 'nothing'"),
        (("--arms", "hours"), "unknown arm of 'hpt bench harm' 'hours'"),
        (("--seeds", "0"), "must be a whole number >= 1"),
        (("--jobs", "0"), "must be a whole number >= 1"),
        (("--report", "missing-folder"), "missing-folder: no such folder"),
        (("--settings", "pinn-fixed", "--seeds", "1", "--out", "blocked"), "blocked"),
        (("--report", ".", "--markdown", "blocked/table.md"), "blocked"),
    ],
)
def test_bad_input_is_one_line(
    argv: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, trained: list[tuple[str, int, str]],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blocked").write_text("a file")
    status, out, err = command(capsys, *argv)
    assert (status, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 1


# ---------------------------------------------------------------- a slice in seconds


def slice_of(name: str, steps: int, tmp_path: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, name, replace(SETTINGS[name], steps=steps))
        request = program.Request(out=tmp_path, settings=(name,), seeds=1)
        row: dict[str, Any] = program.run_table(request, tell=lambda line: None)["settings"][0]
    return row


@pytest.mark.parametrize(("name", "steps"), [("mlp-no-schedule", 150), ("regression-sgd-.1", 120)])
def test_a_slice_of_the_table_passes(name: str, steps: int, tmp_path: Path) -> None:
    row = slice_of(name, steps, tmp_path)
    assert row["failed"] == [], row


def test_the_order_of_the_data_is_asked_where_a_seed_is_above_the_fixed_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_runs = []

    def close(setting: Setting, seed: int, arm: runs.Arm, _changes: object) -> Result:
        made_runs.append((setting.name, arm))
        high = setting.name == "gru-linear" or setting.full_batch
        loss = {"plain": 1.0, "other-order": 1.1, "ours": 1.06 if high else 0.9}[arm]
        return Result(loss=loss, cost=float(setting.steps), seconds=0.1, source="made")

    monkeypatch.setattr(program, "run", close)
    command(capsys, "--settings", "gru-linear,mlp-epochs,pinn-fixed", "--seeds", "2", "--out", tmp_path)
    assert {setting for setting, arm in made_runs if arm == "other-order"} == {"gru-linear"}


def test_changed_settings_are_other_runs(tmp_path: Path) -> None:
    request = program.Request(
        out=tmp_path, settings=("mlp-no-schedule",), seeds=1, tag="t", set=("lookahead.extrapolation=0",)
    )
    assert program._tag(request) == "t+lookahead.extrapolation=0"
    assert program._tag(replace(request, set=())) == "t"
    with pytest.raises(InputError, match=r"lookahead\.extrapolation"):
        program.run_table(replace(request, set=("lookahead.extrapolatoin=0",)), tell=print)
    assert not list(tmp_path.iterdir())


def test_a_trainer_that_harms_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the slice is for: a learning rate thirty times too high must show."""
    honest = runs.build_trainer

    def harmful(setting: Setting, parts: Parts, changes: Mapping[str, Any]) -> HybridTrainer:
        for group in parts.optimizer.param_groups:
            group["lr"] *= 30
        return honest(setting, parts, changes)

    monkeypatch.setattr(runs, "build_trainer", harmful)
    assert set(slice_of("mlp-no-schedule", 150, tmp_path)["failed"]) >= {"mean", "seed"}
