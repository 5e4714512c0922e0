"""The forecast of a final loss: the law, its fit, schedules, logs of others, and what a wrong input is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cases import loss_fn
from hybrid_predict_trainer import ConfigError, HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.cli import main
from hybrid_predict_trainer.cycle.foretell import rates_ahead
from hybrid_predict_trainer.experiments.forecasts import recorded, scores
from hybrid_predict_trainer.experiments.forecasts.published import Run
from hybrid_predict_trainer.forecast import PRIORS, Curve, Plan, forecast, law, logs, planned_rates
from hybrid_predict_trainer.forecast.curve import latest
from hybrid_predict_trainer.forecast.fit import fit
from hybrid_predict_trainer.forecast.logs import Columns, Log, read_log
from hybrid_predict_trainer.forecast.prior import WIDE, learnt, shipped
from hybrid_predict_trainer.forecast.schedules import agree, continued
from hybrid_predict_trainer.numerics.thinned import CAPACITY, ThinnedCurve

TRUE = np.array([2.8, math.log(0.35), math.log(0.47), 0.0, math.log(0.3), math.log(0.15), 0.74, 0.16, 0.0])
SCHEDULE = "cosine:warmup=400,final=0.1"
TOTAL = 8000


def made_up(schedule: str = SCHEDULE, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, losses and rates of a run that follows the law."""
    rates = planned_rates(schedule, TOTAL)
    steps = np.arange(400.0, TOTAL + 1, 40.0)
    losses = law.losses(TRUE, Plan.of(rates), steps, 200.0)
    return steps, losses * np.exp(noise * np.random.default_rng(seed).normal(size=len(steps))), rates


def table(path: Path, steps: np.ndarray, losses: np.ndarray, head: str = "step,loss") -> Path:
    path.write_text(head + "\n" + "".join(f"{s:g},{v:.8g}\n" for s, v in zip(steps, losses, strict=True)))
    return path


# ---------------------------------------------------------------- the law


def test_the_law_is_the_sum_it_says() -> None:
    """Against a plain loop over every drop."""
    rates = planned_rates("linear:warmup=10,final=0.2", 60)
    plan, step = Plan.of(rates), 45
    u = rates / rates.max()
    S = np.concatenate([[0.0], np.cumsum(u)])
    x, gain = S[step] / law.REFERENCE, math.exp(TRUE[law.GAIN] + TRUE[law.DECAY] + TRUE[law.SCALE])
    C, c = math.exp(TRUE[law.SPEED]), math.exp(TRUE[law.TAIL])
    full = 1 - (1 + C * law.SETTLED) ** -c
    total = 0.0
    for k in range(10, step):  # the drop from the rate of step k to that of step k + 1
        total += (u[k - 1] ** 0.74 - u[k] ** 0.74) * (1 - (1 + C * (S[step] - S[k])) ** -c) / full
    expected = 2.8 + 0.35 * x**-0.47 - gain * x**-0.16 * total
    assert law.losses(TRUE, plan, np.array([float(step)]), 1.0)[0] == pytest.approx(expected, rel=1e-12)


def test_drops_are_gathered_without_moving_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, steps = planned_rates(SCHEDULE, TOTAL), np.array([1000.0, 3000.0, 8000.0])
    plan = Plan.of(rates)
    assert len(plan.drops_at) <= law.MAX_DROPS
    assert plan.before[0] == 1.0
    assert plan.after[-1] == pytest.approx(0.1, abs=1e-6)
    assert plan.warmup == 400
    gathered = law.losses(TRUE, plan, steps, 200.0)
    monkeypatch.setattr(law, "MAX_DROPS", TOTAL)
    every = Plan.of(rates)
    assert len(every.drops_at) == TOTAL - 400
    assert gathered == pytest.approx(law.losses(TRUE, every, steps, 200.0), rel=1e-4)


def test_a_step_of_the_rate_stays_a_drop_of_its_own() -> None:
    plan = Plan.of(np.concatenate([planned_rates("cosine:final=0.5", 3000), np.full(1000, 0.1)]))
    jumps = plan.before - plan.after
    assert jumps.max() == pytest.approx(0.4, abs=0.01)
    assert plan.drops_at[int(jumps.argmax())] == pytest.approx(plan.progress[3000], rel=0.01)


def test_the_rate_of_zero_is_no_singularity() -> None:
    rates = planned_rates("linear", 500)
    assert rates[-1] == 0.0
    assert np.isfinite(law.losses(TRUE, Plan.of(rates), np.array([500.0]), 10.0)).all()


# ---------------------------------------------------------------- the forecast


@pytest.mark.parametrize("schedule", [
    SCHEDULE, "constant:warmup=400", "wsd:warmup=400,decay=0.3", "stages:warmup=400,3000=0.3",
])  # fmt: skip
def test_a_run_of_the_law_is_foretold_from_a_quarter(schedule: str) -> None:
    steps, losses, rates = made_up(schedule, noise=0.001)
    known = steps <= TOTAL / 4
    said = forecast(steps[known], losses[known], rates, priors=[learnt("true", [TRUE])])
    truth = losses[-5:].mean()
    assert said.final_loss == pytest.approx(truth, rel=0.005)
    assert said.low < truth < said.high
    assert abs(said.last_value / truth - 1) > 5 * abs(said.final_loss / truth - 1)
    assert said.power_law is not None
    assert abs(said.power_law / truth - 1) > abs(said.final_loss / truth - 1)
    assert said.points[0][0] == 2000
    assert said.points[-1][:2] == (TOTAL, pytest.approx(said.final_loss))


def test_intervals_shrink_as_the_run_goes_on_and_grow_with_the_level() -> None:
    steps, losses, rates = made_up(noise=0.003)
    widths = []
    for share in (0.25, 0.5, 0.9):
        known = steps <= share * TOTAL
        said = forecast(steps[known], losses[known], rates)
        widths.append(said.high / said.low)
    assert widths == sorted(widths, reverse=True)
    wide = forecast(steps[known], losses[known], rates, level=0.99)
    assert wide.high > said.high


def test_noise_of_single_rows_is_measured() -> None:
    steps, losses, _ = made_up(noise=0.02)
    assert Curve.of(steps, losses).noise == pytest.approx(0.02, rel=0.25)
    assert Curve.of(steps, made_up()[1]).noise < 1e-4


def test_rows_of_a_resumed_run_count_once() -> None:
    curve = Curve.of([1, 2, 3, 2, 3], [5.0, 4.0, 9.0, 3.0, 2.0])
    assert curve.steps.tolist() == [1, 2, 3]
    assert curve.losses.tolist() == [5.0, 3.0, 2.0]


#: Steps as logs hold them, and the rows that count.
ORDERS = {
    "resumed": ([10, 20, 30, 40, 30, 40, 50], [0, 1, 4, 5, 6]),
    "resumed between its rows": ([10, 20, 30, 40, 50, 60, 70, 25, 35, 45, 55, 65, 75], [0, 1, 7, 8, 9, 10, 11, 12]),
    "begun again": ([10, 20, 30, 40, 50, 60, 10, 20, 30], [6, 7, 8]),
    "resumed twice": ([1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10, 4, 5, 6], [0, 1, 2, 13, 14, 15]),
    "newest first": ([50, 40, 30, 20, 10], [4, 3, 2, 1, 0]),
    "in no order": ([50, 10, 40, 20, 30], [1, 3, 4, 2, 0]),
    "one step": ([5, 5, 5], [2]),
    "none": ([], []),
}


@pytest.mark.parametrize("name", ORDERS)
def test_what_a_resumed_run_wrote_before_counts_no_more(name: str) -> None:
    steps, kept = ORDERS[name]
    assert latest(np.array(steps, dtype=np.float64)).tolist() == kept


def test_steps_that_begin_anew_in_every_epoch_are_refused() -> None:
    """And not those of a run that broke off twice at the same place."""
    epoch = [float(s) for s in range(10, 110, 10)]
    for steps in (3 * epoch, 2 * epoch + epoch[:4]):
        with pytest.raises(ConfigError, match="within each epoch"):
            Curve.of(steps, [1.0] * len(steps))
    broken = [*epoch, *epoch[4:], *epoch[4:], *epoch[4:8]]
    assert len(Curve.of(broken, [1.0] * len(broken)).steps) == 8
    further = [*epoch, *epoch, *epoch, 110.0, 120.0]
    assert len(Curve.of(further, [1.0] * len(further)).steps) == 12


def test_blocks_keep_the_mean() -> None:
    curve = Curve.of(np.arange(1, 1001), np.linspace(3, 2, 1000))
    small = curve.blocks(64)
    assert len(small.steps) == 64
    assert (small.losses @ small.sizes) / 1000 == pytest.approx(2.5)


def test_a_fit_of_whole_curves_finds_the_shape() -> None:
    curves = [(Curve.of(s, v), Plan.of(r)) for s, v, r in map(made_up, (SCHEDULE, "constant:warmup=400"))]
    found = fit(curves, WIDE, discrepancy=1e-4)
    told = found.losses(curves[0][1], curves[0][0].steps)
    assert np.abs(told / curves[0][0].losses - 1).max() < 2e-3


def test_priors_that_are_shipped_are_whole() -> None:
    for name in PRIORS:
        prior = shipped(name)
        assert prior.name == name
        assert np.isfinite(prior.mean).all()
        assert (prior.spread > 0).all()
        assert 0.2 < prior.widening < 10
    with pytest.raises(ConfigError, match="unknown prior"):
        shipped("nothing")


BAD = {
    "too few": (lambda s, v: (s[:6], v[:6]), "at least 8"),
    "not finite": (lambda s, v: (s, np.where(s == s[50], np.nan, v)), "is not finite"),
    "negative": (lambda s, v: (s, v - 10), "positive losses"),
    "unequal": (lambda s, v: (s, v[:-1]), "cannot be paired"),
    "beyond": (lambda s, v: (s + 9000, v), "beyond"),
    "nothing": (lambda s, v: (s[:0], v[:0]), "no losses"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_foretold_is_said(name: str) -> None:
    spoil, said = BAD[name]
    steps, losses, rates = made_up()
    with pytest.raises(ConfigError, match=said):
        forecast(*spoil(steps, losses), rates)


@pytest.mark.parametrize("unit", [1e-13, 1e-9, 1e6, 1e300])
def test_a_loss_in_other_units_is_foretold_alike(unit: float) -> None:
    steps, losses, rates = made_up(noise=0.002)
    usual = forecast(steps[:100], losses[:100], rates)
    found = forecast(steps[:100], unit * losses[:100], rates)
    for name in ("final_loss", "low", "high", "last_value", "power_law", "log_line"):
        assert getattr(found, name) == pytest.approx(unit * getattr(usual, name), rel=1e-4)
    assert found.points[-1][1] == found.final_loss


def test_steps_that_are_counted_otherwise_are_told() -> None:
    """Micro-batches, eight to a step: the law's constants are those of steps."""
    steps, losses, rates = made_up(noise=0.002)
    assert not forecast(steps[:100], losses[:100], rates).notes
    for counts in (8.0, 1 / 8):
        total = round(counts * TOTAL)
        told = np.interp(np.arange(1, total + 1) / counts, np.arange(1, TOTAL + 1), rates)
        notes = forecast(counts * steps[:100], losses[:100], told).notes
        assert sum("times as steeply" in note for note in notes) == 1


def test_a_curve_that_the_law_does_not_describe_is_told_or_refused() -> None:
    steps, losses, rates = made_up(noise=0.002)
    assert not forecast(steps[:100], losses[:100], rates).notes
    spikes = losses[:100].copy()
    spikes[::25] *= 1.3
    assert not forecast(steps[:100], spikes, rates).notes
    rise = 1 + 3e-5 * np.maximum(steps[:100] - 2000, 0)
    assert any("too narrow" in note for note in forecast(steps[:100], losses[:100] * rise, rates).notes)
    flat = np.where(steps < 3000, 6.0, 6.0 - (steps - 3000) / 2000)
    with pytest.raises(ConfigError, match="does not describe"):
        forecast(steps[:100], flat[:100], rates)
    with pytest.raises(ConfigError, match="never moves"):
        forecast(steps[:100], np.full(100, 3.0), rates)


@pytest.mark.parametrize("num_rows", [10, 20, 50])
def test_few_noisy_rows_of_a_curve_that_the_law_describes_are_not_taken_for_another(num_rows: int) -> None:
    steps, losses, rates = made_up(noise=0.0)
    every, draws = 100 // num_rows, np.random.default_rng(0)
    refused = []
    for _ in range(20):
        noisy = losses[:100:every] * np.exp(0.2 * draws.normal(size=len(losses[:100:every])))
        try:
            forecast(steps[:100:every], noisy, rates)
        except ConfigError as error:
            refused.append(str(error))
    assert len(refused) <= 1, refused


def test_rates_that_teach_nothing_are_refused() -> None:
    steps, losses, rates = made_up()
    for wrong in (0 * rates, -rates, rates[:0]):
        with pytest.raises(ConfigError):
            forecast(steps, losses, wrong)


# ---------------------------------------------------------------- schedules


def test_schedules_go_where_they_say() -> None:
    cosine = planned_rates("cosine:warmup=10,final=0.1", 110)
    assert cosine[9] == 1.0
    assert cosine[59] == pytest.approx(0.55)
    assert cosine[-1] == pytest.approx(0.1)
    wsd = planned_rates("wsd:decay=0.5,shape=exp,final=0.01", 100)
    assert (wsd[:50] == 1).all()
    assert wsd[74] == pytest.approx(0.1)
    stages = planned_rates("stages:3=0.5,6=0.25", 8)
    assert stages.tolist() == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert planned_rates("constant:peak=0.2", 3).tolist() == [0.2, 0.2, 0.2]
    assert planned_rates("wsd:decay=0.5,shape=sqrt", 4)[2] == pytest.approx(1 - math.sqrt(0.5))


@pytest.mark.parametrize(("schedule", "said"), [
    ("cosin", "did you mean 'cosine'"), ("cosine:warm=3", "no use for 'warm'"), ("wsd:shape=round", "unknown shape"),
    ("cosine:final=2", "from 0 to 1"), ("cosine:final=x", "no number"), ("cosine:warmup", "KEY=VALUE"),
    ("linear:warmup=100", "does not end"), ("cosine:warmup=0.05", "whole steps"),
    ("stages:warmup=50,20=0.1", "within the warm-up"),
    ("stages:warmup=3", "at least one"), ("constant:final=0.5", "no use for"),
])  # fmt: skip
def test_a_wrong_schedule_is_told_in_one_line(schedule: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        planned_rates(schedule, 100)
    assert "\n" not in str(caught.value)


def test_a_log_is_continued_at_its_own_rates() -> None:
    plan = planned_rates("linear:warmup=10", 100)
    found = continued(np.array([20.0, 40.0]), np.array([8e-4, 6e-4]), plan)
    assert found[19] == pytest.approx(8e-4)
    assert found[29] == pytest.approx(7e-4)
    assert found[40:].tolist() == pytest.approx((plan[40:] * 6e-4 / plan[39]).tolist())
    assert found[0] == pytest.approx(plan[0] * 6e-4 / plan[39])


def test_a_last_row_with_the_rate_of_the_next_step_does_not_move_the_plan() -> None:
    """Nor one that was rounded to 0: what is ahead is scaled by all rows."""
    plan, steps = planned_rates("stages:warmup=10,100=0.1", 200), np.arange(10.0, 101, 5)
    for last in (1e-4, 0.0):
        rates = np.full(len(steps), 1e-3)
        rates[-1] = last
        assert continued(steps, rates, plan)[100:].tolist() == pytest.approx([1e-4] * 100)
        assert agree(steps, rates, plan)
    assert not agree(steps, np.linspace(1e-3, 1e-4, len(steps)), plan)
    assert not agree(steps, -steps, plan)
    with pytest.raises(ConfigError, match="above 0"):
        continued(steps, np.zeros(len(steps)), plan)


# ---------------------------------------------------------------- logs


def rows_of(steps: np.ndarray, losses: np.ndarray) -> list[tuple[int, float]]:
    return [(int(s), float(v)) for s, v in zip(steps, losses, strict=True)]


def as_csv(folder: Path, rows: list[tuple[int, float]]) -> Path:
    path = folder / "log.csv"
    path.write_text("step,lr,loss\n" + "".join(f"{s},0.001,{v!r}\n" for s, v in rows))
    return path


def as_wandb(folder: Path, rows: list[tuple[int, float]]) -> Path:
    path = folder / "wandb_export.csv"
    head = '"Step","bold-sun-3 - train/loss","bold-sun-3 - train/loss__MIN","bold-sun-3 - train/loss__MAX"'
    path.write_text(head + "\n" + "".join(f'"{s}","{v!r}","{v!r}","{v!r}"\n' for s, v in rows))
    return path


def as_jsonl(folder: Path, rows: list[tuple[int, float]]) -> Path:
    path = folder / "metrics.jsonl"
    lines = [{"event": "transition", "step": 1}]
    lines += [{"event": "step", "step": s, "phase": "full", "lr": 0.001, "loss": v} for s, v in rows]
    lines.insert(4, {"event": "step", "step": rows[2][0], "phase": "predict", "was_predicted": True, "loss": 0.001})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def as_trainer_state(folder: Path, rows: list[tuple[int, float]]) -> Path:
    path = folder / "trainer_state.json"
    history = [{"step": s, "loss": v, "learning_rate": 1e-3, "epoch": 0.1} for s, v in rows]
    history.insert(3, {"step": rows[2][0], "eval_loss": 9.0, "eval_runtime": 1.0})
    path.write_text(json.dumps({"max_steps": TOTAL, "log_history": history}))
    return path


@pytest.mark.parametrize("write", [as_csv, as_wandb, as_jsonl, as_trainer_state])
def test_a_curve_is_the_same_from_every_kind_of_log(tmp_path: Path, write: object) -> None:
    steps, losses, _ = made_up()
    log = read_log(write(tmp_path, rows_of(steps, losses)))  # type: ignore[operator]
    assert log.steps.tolist() == steps.tolist()
    assert log.losses.tolist() == losses.tolist()


def test_tensorboard_event_files(tmp_path: Path) -> None:
    """With tensorboard's own writer where it is installed; the line that says what to install where it is not."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        (tmp_path / "events.out.tfevents.1").write_bytes(b"")
        with pytest.raises(ConfigError, match=r"hybrid-predict-trainer\[tensorboard\]"):
            read_log(tmp_path)
        return
    steps, losses, _ = made_up()
    with SummaryWriter(str(tmp_path)) as writer:
        for step, loss in rows_of(steps, losses):
            writer.add_scalar("train/loss", loss, step)
            writer.add_scalar("train/lr", 1e-3, step)
    log = read_log(tmp_path)
    assert log.steps.tolist() == steps.tolist()
    assert log.losses.tolist() == pytest.approx(losses.tolist(), rel=1e-6)
    assert log.rates.tolist() == pytest.approx([1e-3] * len(steps), rel=1e-6)


def test_event_files_of_several_runs_are_not_one_curve(tmp_path: Path) -> None:
    """A run that was resumed goes on in a file of its own; two that begin alike are two runs."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    steps, losses, _ = made_up()

    def write(folder: Path, number: int, kept: slice, off: float = 0.0) -> None:
        name = folder / f"events.out.tfevents.{number}.host"
        with tensorboard.SummaryWriter(str(folder / "new")) as writer:
            writer.add_scalar("loss", float(losses[kept][0] + off), int(steps[kept][0]))
            for step, loss in zip(steps[kept][1:], losses[kept][1:], strict=True):
                writer.add_scalar("loss", float(loss + off), int(step))
        (written,) = (folder / "new").glob("events*")
        written.rename(name)

    write(tmp_path / "resumed", 1, slice(0, 60), 0.5)
    write(tmp_path / "resumed", 2, slice(40, 100))
    log = read_log(tmp_path / "resumed")
    assert log.steps.tolist() == steps[:100].tolist()
    assert log.losses[40:].tolist() == pytest.approx(losses[40:100].tolist(), rel=1e-6)
    assert "goes back from step 2760 to 2000: 20 losses" in log.notes[0]
    write(tmp_path / "two", 1, slice(0, 100), 0.5)
    write(tmp_path / "two", 2, slice(0, 60))
    with pytest.raises(ConfigError, match=r"several runs.*tfevents\.1.*tfevents\.2"):
        read_log(tmp_path / "two")
    assert len(read_log(tmp_path / "two" / "events.out.tfevents.2.host").steps) == 60


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> float:
    """Final loss that the command foretells."""
    assert main(["forecast", *arguments, "--schedule", SCHEDULE, "--json"]) == 0
    return float(json.loads(capsys.readouterr().out)["final_loss"])


def test_logs_of_others_are_foretold_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that the programs' own writers made, half of a run each, beside other figures of the same run."""
    steps, losses, rates = made_up()
    half = len(steps) // 2
    rows = rows_of(steps[:half], losses[:half])
    expected = told(capsys, str(table(tmp_path / "log.csv", steps[:half], losses[:half])), "--steps", str(TOTAL))
    export = as_wandb(tmp_path, rows)
    assert told(capsys, str(export), "--steps", str(TOTAL)) == pytest.approx(expected, rel=1e-6)
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path / "events")) as writer:
        writer.add_text("config", "a run")
        for step, loss in rows:
            writer.add_scalar("train/loss", loss, step)
            writer.add_scalar("train/learning_rate", float(rates[step - 1]), step)
            writer.add_scalar("train/grad_norm", 1.0, step)
    assert told(capsys, str(tmp_path / "events"), "--steps", str(TOTAL)) == pytest.approx(expected, rel=1e-4)
    trainer = pytest.importorskip("transformers.trainer_callback")
    history = [{"step": s, "epoch": s / 100, "loss": v, "learning_rate": float(rates[s - 1])} for s, v in rows]
    state = trainer.TrainerState(max_steps=TOTAL, log_history=history)
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert told(capsys, str(tmp_path / "trainer_state.json")) == pytest.approx(expected, rel=1e-4)


def test_a_torn_last_line_is_left_out_and_one_before_it_is_refused(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path, rows_of(*made_up()[:2]))
    whole = path.read_text()
    path.write_text(whole + '{"event": "step", "st')
    assert "torn" in read_log(path).notes[0]
    path.write_text(whole.replace('{"event": "transition"', '{"event": "trans', 1))
    with pytest.raises(ConfigError, match="line 1"):
        read_log(path)


def test_losses_that_are_not_finite_are_left_out_where_the_run_went_on() -> None:
    """A step that a gradient scaler skipped, or a filled cell: nothing finite follows a divergence."""
    steps, losses, _ = made_up()
    holed = losses.copy()
    holed[[3, 50, 51]] = [math.nan, math.inf, math.nan]
    found = read_rows(steps, holed)
    assert found.steps.tolist() == np.delete(steps, [3, 50, 51]).tolist()
    assert found.notes == ("3 of 191 losses are not finite and have been left out: the run went on after them",)
    holed[-1] = math.nan
    assert math.isnan(read_rows(steps, holed).losses[-1])


def read_rows(steps: np.ndarray, losses: np.ndarray) -> Log:
    rows = [{"step": float(s), "loss": float(v)} for s, v in zip(steps, losses, strict=True)]
    return logs._log("a.csv", ("step", "loss", None), rows)


#: Tables as programs and people write them: head and the form of a row; x is a figure that is no loss.
TABLES = {
    "spaces": ("Step, LR, Loss", "{s}, 0.001, {v}"),
    "tabs": ("step\tloss", "{s}\t{v}"),
    "tensorboard's tutorial": ("iter,Loss/train,Accuracy/train", "{s},{v},0.5"),
    "a person's": ("Iteration,Train Loss", "{s},{v}"),
    "byte-order mark": ("\ufeffstep,loss", "{s},{v}"),
    "no usual name": ("num_steps,my_loss,x", "{s},{v},1"),
    "lightning": ("epoch,step,train_loss_step", "0,{s},{v}"),
    "pandas": (",step,loss,val_loss", "7,{s},{v},"),
    "quoted": ('"global_step","train/loss"', '"{s}","{v}"'),
    "wandb's axis": ('"trainer/global_step","bold-sun - train/loss","bold-sun - train/loss__MIN"', '"{s}","{v}","1"'),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_with_other_heads(tmp_path: Path, name: str) -> None:
    head, row = TABLES[name]
    steps, losses, _ = made_up()
    path = tmp_path / "log.csv"
    lines = [row.format(s=int(s), v=repr(float(v))) for s, v in zip(steps, losses, strict=True)]
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    found = read_log(path)
    assert found.steps.tolist() == steps.tolist()
    assert found.losses.tolist() == losses.tolist()


def test_a_decimal_comma_is_one_where_semicolons_set_cells_apart(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step;loss\n1;2,5\n2;2,25\n")
    assert read_log(path).losses.tolist() == [2.5, 2.25]


#: Tables with a mark that is no number's, and what is said of it.
MARKS = {
    "comma between thousands": ('step,loss\n900,3\n"1,000",2\n', "'1,000', which is no number"),
    "point between thousands": ("step;loss\n900;3,5\n1.040;2,5\n", "1.04 is no whole number"),
    "epochs": ("step,loss\n0.5,3\n1,2\n", "0.5 is no whole number"),
    "a word": ("step,loss\n1,3\n2,diverged\n", "'diverged', which is no number"),
}


@pytest.mark.parametrize("name", MARKS)
def test_cells_that_are_no_numbers_are_not_passed_over(tmp_path: Path, name: str) -> None:
    content, said = MARKS[name]
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_log(tmp_path / "a.csv")


def test_empty_cells_and_a_head_in_the_middle_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("step,loss\n1,3\n2,\n3,None\n4,N/A\nstep,loss\n5,2\n")
    assert read_log(tmp_path / "a.csv").steps.tolist() == [1, 5]


def test_a_torn_row_of_a_table_is_left_out(tmp_path: Path) -> None:
    whole = "step,loss,lr\n10,3.125,0.001\n20,2.875,0.001\n30,2.75"
    for tail, count in (("", 2), ("0,0.001", 3), ("0,0.0", 2), ("0,0.001\n", 3)):
        (tmp_path / "a.csv").write_text(whole + tail)
        log = read_log(tmp_path / "a.csv")
        assert len(log.steps) == count
        assert ("torn" in "".join(log.notes)) == (count == 2)


def test_a_count_of_all_steps_comes_before_one_within_the_epoch(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("epoch,step,global_step,loss\n0,1,1,3\n1,1,2,2\n")
    assert read_log(tmp_path / "a.csv").steps.tolist() == [1, 2]
    (tmp_path / "a.csv").write_text('"Step","train/global_step","train/loss"\n0,50,3\n1,100,2\n')
    assert read_log(tmp_path / "a.csv").steps.tolist() == [50, 100]


def test_rows_of_evaluation_are_no_training_losses(tmp_path: Path) -> None:
    """As transformers writes them: two rows of one step, a row of sums at the end."""
    steps, losses, _ = made_up()
    history: list[dict[str, float]] = []
    for s, v in rows_of(steps, losses):
        history += [{"step": s, "loss": v, "learning_rate": 1e-3}, {"step": s, "eval_loss": v + 1, "eval_runtime": 1.0}]
    history.append({"step": int(steps[-1]), "train_loss": 9.0, "train_runtime": 1.0})
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"max_steps": TOTAL, "log_history": history}))
    assert read_log(path).losses.tolist() == losses.tolist()
    assert read_log(path, Columns(loss="eval_loss")).losses.tolist() == (losses + 1).tolist()


def test_folders_that_programs_leave(tmp_path: Path) -> None:
    steps, losses, _ = made_up()
    for number in (500, 1500):  # an output folder of transformers: the newest checkpoint counts
        (tmp_path / "out" / f"checkpoint-{number}").mkdir(parents=True)
        as_trainer_state(tmp_path / "out" / f"checkpoint-{number}", rows_of(steps, losses)[: number // 50])
    assert len(read_log(tmp_path / "out").steps) == 30
    (tmp_path / "lightning" / "version_0").mkdir(parents=True)
    table(tmp_path / "lightning" / "version_0" / "metrics.csv", steps, losses)
    assert len(read_log(tmp_path / "lightning" / "version_0").steps) == len(steps)
    with pytest.raises(ConfigError, match=r"give one of .*version_0"):
        read_log(tmp_path / "lightning")


UNREADABLE = {
    "two losses": ("a.csv", "step,x/loss,y/loss\n1,2,3\n", "--loss-column"),
    "no loss": ("a.csv", "step,accuracy\n1,2\n", "called like a loss"),
    "two that speak of it": ("a.csv", "step,a_loss,b_loss\n1,2,3\n", "2 columns could be the loss"),
    "diverged": ("a.csv", "step,loss\n1,2\n2,nan\n", "not finite"),
    "not text": ("a.csv", "\0\1", "a.csv"),
    "no step": ("a.csv", "time,loss\n1,2\n", "called like a step"),
    "empty": ("a.csv", "", "is empty"),
    "no number": ("a.csv", "step,loss\n1,many\n", "holds no number"),
    "other json": ("a.json", "{}", "log_history"),
    "other kind": ("a.pdf", "x", "must be"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_logs_that_cannot_be_read(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, said = UNREADABLE[name]
    (tmp_path / file).write_text(content)
    assert main(["forecast", str(tmp_path / file), "--schedule", "constant", "--steps", "100"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_column_can_be_named(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", *made_up()[:2], head="when,Valid")
    assert len(read_log(path, Columns(loss="Valid", step="when")).steps) == len(made_up()[0])
    with pytest.raises(ConfigError, match="no column 'valid'"):
        read_log(path, Columns(loss="valid", step="when"))


# ---------------------------------------------------------------- the command


def test_the_command_tells_the_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, losses, _ = made_up(noise=0.001)
    known = steps <= TOTAL / 2
    path = table(tmp_path / "a.csv", steps[known], losses[known])
    arguments = ["forecast", str(path), "--schedule", SCHEDULE, "--steps", str(TOTAL)]
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["final_loss"] == pytest.approx(losses[-1], rel=0.01)
    assert said["low"] < said["final_loss"] < said["high"]
    assert main([*arguments, "--until", "2000"]) == 0
    text = capsys.readouterr().out
    assert "step 2,000 of 8,000" in text
    assert "power law without learning rates" in text


def test_rates_that_do_not_follow_the_schedule_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, losses, rates = made_up()
    for logged, count in ((rates, 0), (np.ones(TOTAL), 1)):
        rows = [f"{s:g},{v:.8g},{logged[int(s) - 1]:.8g}" for s, v in zip(steps[:100], losses[:100], strict=True)]
        (tmp_path / "a.csv").write_text("\n".join(["step,loss,lr", *rows]) + "\n")
        command = ["forecast", str(tmp_path / "a.csv"), "--schedule", SCHEDULE, "--steps", str(TOTAL), "--json"]
        assert main(command) == 0
        assert sum("do not follow" in note for note in json.loads(capsys.readouterr().out)["notes"]) == count


def test_the_command_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = table(tmp_path / "a.csv", *made_up()[:2])
    assert main(["forecast", str(path)]) == 2
    assert "give --schedule" in capsys.readouterr().err
    assert main(["forecast", str(path), "--schedule", "cosine"]) == 2
    assert "give --steps" in capsys.readouterr().err
    assert main(["forecast", str(tmp_path / "none.csv")]) == 2
    assert "no such file" in capsys.readouterr().err


# ---------------------------------------------------------------- scores


def family(name: str, shift: float) -> list[Run]:
    found = []
    for schedule in (SCHEDULE, "wsd:warmup=400,decay=0.2"):
        steps, losses, rates = made_up(schedule, noise=0.001)
        found.append(Run(schedule, name, name, Curve.of(steps, losses + shift), rates))
    return found


def test_scores_leave_the_own_family_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = scores.learnt
    monkeypatch.setattr(scores, "learnt", lambda name, shapes, **kw: (seen.append(len(shapes)), real(name, shapes))[1])
    runs = [*family("a", 0.0), *family("b", 0.4), *family("c", 0.2)]
    found = scores.leave_family_out(runs, shares=(0.25,))
    assert seen == [2, 2, 2]
    assert len(found) == 6
    assert max(abs(s.error) for s in found) < 0.005
    (row,) = scores.summary(found)
    assert row["median"] < row["last_value"]


def test_a_run_is_the_same_however_its_steps_are_counted() -> None:
    run = family("a", 0.0)[0]
    fourfold = scores.counted(run, 4.0)
    assert fourfold.curve.steps.tolist() == (4 * run.curve.steps).tolist()
    assert fourfold.plan.steps == 4 * run.plan.steps
    at = np.array([500.0, 4000.0, 7999.0])
    assert fourfold.plan.at(4 * at) == pytest.approx(4 * run.plan.at(at), rel=3e-3)
    assert scores.counted(run, 1.0) is run


def test_widening_brings_intervals_to_their_level() -> None:
    rng = np.random.default_rng(0)
    base = {
        "run": "r",
        "share": 0.25,
        "truth": 1.0,
        "error": 0.0,
        "last_value": 0.0,
        "power_law": None,
        "log_line": None,
    }
    found = []
    for family_name in "ab":
        for z in rng.normal(size=200):  # intervals half as wide as they should be
            width = 0.5 * 0.01 * 1.645
            found.append(scores.Score(**base, family=family_name, low=math.exp(0.01 * z - width),
                                      high=math.exp(0.01 * z + width), deviations=2 * z))  # fmt: skip
    assert scores.widening_of(found) == pytest.approx(2.0, rel=0.1)
    assert 0.45 < np.mean([s.covered for s in found]) < 0.7
    assert 0.85 < np.mean([s.covered for s in scores.calibrated(found)]) < 0.95


def test_recorded_runs_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "WIDTHS", (4,))
    monkeypatch.setattr(recorded, "LENGTHS", (10, 20))
    monkeypatch.setattr(recorded, "NUM_ROWS", 5)
    monkeypatch.setattr(recorded, "NUM_VALID", 64)
    text = torch.randint(256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(recorded, "load_corpus", lambda *_: SimpleNamespace(train=text, valid=text[:999]))
    said: list[str] = []
    files = recorded.record(tmp_path, said.append)
    assert len(files) == len(said) == 16
    before = {path: path.read_text() for path in files}
    files[3].unlink()
    again: list[str] = []
    assert recorded.record(tmp_path, again.append) == files
    assert len(again) == 1
    assert files[3].read_text().count("\n") == before[files[3]].count("\n") == 6


# ---------------------------------------------------------------- runs of our own


def test_a_thinned_curve_keeps_every_point_in_a_mean() -> None:
    curve = ThinnedCurve()
    for n in range(1, 3001):
        curve.push(n, 2.0 * n, 0.5)
    points = np.array(curve.points())
    assert len(points) <= CAPACITY
    assert points[:, 1].tolist() == (2 * points[:, 0]).tolist()
    assert points[-1, 0] > 2990
    sizes = np.full(len(points), curve.block)
    sizes[-1] = 3000 % curve.block or curve.block
    assert points[:, 0] @ sizes == pytest.approx(sum(range(1, 3001)))
    other = ThinnedCurve()
    other.load_state_dict(json.loads(json.dumps(curve.state_dict())))
    for one in (curve, other):
        one.push(3001, 1.0, 0.1)
    assert curve.points() == other.points()


def trained(num_steps: int, schedule: str = "cosine") -> HybridTrainer:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    lr = torch.optim.lr_scheduler
    scheduler = {
        "cosine": lambda: lr.CosineAnnealingLR(optimizer, 200), "none": lambda: None,
        "cycle": lambda: lr.OneCycleLR(optimizer, 1e-2, total_steps=200),
        "chain": lambda: lr.SequentialLR(
            optimizer, [lr.LinearLR(optimizer, 0.1, 1.0, 20), lr.ExponentialLR(optimizer, 0.99)], [20]
        ),
    }[schedule]()  # fmt: skip
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(), loss_fn=loss_fn, lr_scheduler=scheduler)
    draw = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        x = torch.randn(16, 4, generator=draw)
        trainer.step((x, x.sum(1, keepdim=True).sin() + 0.3 * torch.randn(16, 1, generator=draw)))
    return trainer


@pytest.mark.parametrize("schedule", ["cosine", "cycle", "chain", "none"])
def test_rates_ahead_are_those_that_the_schedule_will_set(schedule: str) -> None:
    trainer = trained(30, schedule)
    ahead = rates_ahead(trainer.run, 40)
    scheduler, group = trainer.run.schedule.scheduler, trainer.run.subject.optimizer.param_groups[0]
    before = (group["lr"], None if scheduler is None else scheduler.last_epoch)
    real = []
    for _ in range(40):
        real.append(group["lr"])
        if scheduler is not None:
            scheduler.step()
    assert before[0] == real[0]
    assert ahead.tolist() == pytest.approx(real, rel=1e-12)


def test_a_trainer_foretells_its_own_end_and_nothing_changes() -> None:
    trainer, other = trained(60), trained(60)
    said = trainer.forecast(200)
    assert said.total_steps == 200
    assert 0 < said.low < said.final_loss < said.high
    for one, two in zip(trainer.run.subject.model.parameters(), other.run.subject.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert trainer.run.schedule.scheduler.last_epoch == other.run.schedule.scheduler.last_epoch
    assert trainer.run.state_dict().keys() == other.run.state_dict().keys()


def test_what_a_trainer_cannot_foretell() -> None:
    trainer = trained(30)
    with pytest.raises(ConfigError, match="call forecast"):
        trainer.forecast()
    with pytest.raises(ConfigError, match="beyond"):
        trainer.forecast(10)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    off = HybridTrainer(model, optimizer, HybridTrainerConfig(enabled=False), loss_fn=loss_fn)
    with pytest.raises(ConfigError, match="no losses are kept"):
        off.forecast(10)


def test_the_curve_survives_a_checkpoint_and_older_ones_begin_anew(tmp_path: Path) -> None:
    trainer = trained(40)
    folder = trainer.save_checkpoint(tmp_path)
    other = trained(1)
    other.load_checkpoint(folder)
    assert other.run.losses.curve.points() == trainer.run.losses.curve.points()
    assert other.forecast(200) == trainer.forecast(200)
    state = trainer.run.state_dict()
    del state["losses"]["curve"]
    from hybrid_predict_trainer.keep.migration import with_later

    filled = with_later(state, trained(1).run.state_dict())
    assert len(filled["losses"]["curve"]["sums"]) == 3
