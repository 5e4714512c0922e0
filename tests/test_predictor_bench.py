"""The table of the predictors, its trajectories, and recorded runs."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

from dynamics import through_bytes
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, predictors
from hybrid_predict_trainer.experiments import train as single
from hybrid_predict_trainer.experiments.arms.options import Options
from hybrid_predict_trainer.experiments.arms.recording import (
    Recorder,
    Recording,
    best_coefficients,
    column_map,
    narrow,
)
from hybrid_predict_trainer.experiments.bench.predictors import (
    RealRun,
    Row,
    make_predictor,
    measure,
    raw_calibration_error,
    real_runs,
    recorded_rows,
    replay,
)
from hybrid_predict_trainer.experiments.bench.trajectories import CASES, flat, generate, observe
from hybrid_predict_trainer.predictors import Hold, Linear, Mlp
from hybrid_predict_trainer.records import BasisSpec, CheckpointError, ConfigError

KEYS = (
    "case", "predictor", "horizon", "displacement_cosine", "displacement_rel_err", "loss_mae_rel", "ece",
    "update_ms", "predict_ms",
)  # fmt: skip


def by_horizon(table: list[Row], predictor: str) -> dict[int, Row]:
    return {row["horizon_windows"]: row for row in table if row["predictor"] == predictor}


@pytest.mark.parametrize("case", CASES)
def test_what_each_predictor_must_reach(case: str) -> None:
    table = measure(["hold", "linear", "dmd", "mlp", "zero", "optimum"], [case], [0], quick=True)
    assert all(set(KEYS) <= row.keys() for row in table)
    one = {name: by_horizon(table, name)[1] for name in ("hold", "linear", "dmd", "mlp", "zero", "optimum")}
    assert one["zero"]["displacement_rel_err"] == pytest.approx(1)
    for name in ("linear", "dmd", "mlp"):
        assert one[name]["displacement_rel_err"] < 1.02, "never worse than no jump"
        best = one["optimum"]["displacement_rel_err"]
        assert one[name]["displacement_rel_err"] > best - 0.02, "nobody beats the optimum"
    if CASES[case].noise_free:
        assert one["optimum"]["displacement_cosine"] == pytest.approx(1, abs=1e-9)
        assert one["linear"]["displacement_cosine"] > 0.99
        assert one["dmd"]["displacement_cosine"] > 0.99
        assert one["mlp"]["displacement_cosine"] > 0.95
        assert one["mlp"]["displacement_rel_err"] < one["hold"]["displacement_rel_err"]
        four = {name: by_horizon(table, name)[4]["displacement_rel_err"] for name in ("hold", "mlp")}
        assert four["mlp"] < four["hold"]
    for name in ("hold", "linear", "mlp"):
        errors = [row["displacement_abs_err"] for _, row in sorted(by_horizon(table, name).items())]
        assert errors[0] < errors[-1], f"the error of {name} does not grow with the horizon"


def test_rssm_on_a_linear_system() -> None:
    table = measure(["rssm", "hold"], ["two_scales"], [0], quick=True)
    rssm, hold = by_horizon(table, "rssm"), by_horizon(table, "hold")
    assert rssm[1]["displacement_cosine"] > 0.95
    for m in (1, 2, 4):
        assert rssm[m]["displacement_rel_err"] < hold[m]["displacement_rel_err"]


def test_trajectories_are_real_training() -> None:
    case = CASES["momentum"]
    trajectory = generate(case, 3, num_windows=4)
    h = torch.tensor(case.curvatures, dtype=torch.float64)[torch.arange(case.num_weights) % len(case.curvatures)]
    theta = nn.Parameter(trajectory.thetas[0].clone())
    optimizer = torch.optim.SGD([theta], lr=case.learning_rate, momentum=case.momentum)
    for _ in range(40):
        optimizer.zero_grad()
        (0.5 * (h * theta.square()).sum()).backward()
        optimizer.step()
    torch.testing.assert_close(theta.detach(), trajectory.thetas[-1])
    longer = generate(case, 3, num_windows=8)
    torch.testing.assert_close(trajectory.expected[3, 3], longer.means[7] - longer.means[3])


def test_windows_are_what_the_basis_says() -> None:
    trajectory = generate(CASES["noisy"], 0, num_windows=6)
    for window, basis in observe(trajectory, BasisSpec(num_displacements=2, lag=True)):
        if window.index == 0:
            continue
        c = torch.tensor([[1.0, 0.0, 0.0]] * 2, dtype=torch.float64)
        newest = trajectory.means[window.index] - trajectory.means[window.index - 1]
        torch.testing.assert_close(flat(basis.combine(c)), newest)
        lag = trajectory.means[window.index] - trajectory.thetas[10 * (window.index + 1)]
        torch.testing.assert_close(flat(basis.combine(c.roll(2, dims=1))), lag)


def test_calibration_error() -> None:
    assert raw_calibration_error([(0.75, True)] * 3 + [(0.75, False)]) == pytest.approx(0)
    assert raw_calibration_error([(0.9, False)] * 10) == pytest.approx(0.9)
    assert raw_calibration_error([(1.0, True), (0.0, False)]) == 0


# ---------------------------------------------------------------- recorded runs


def recorded(tmp_path: Path, predictor: object = None) -> Recording:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(32, 6)
    recorder = Recorder(Hold() if predictor is None else predictor)
    trainer = HybridTrainer(
        model, torch.optim.Adam(model.parameters(), lr=1e-3),
        HybridTrainerConfig(warmup_steps=20, max_predict_steps=40),
        loss_fn=lambda m, b: nn.functional.mse_loss(m(b), b.sum(dim=1, keepdim=True)), predictor=recorder,
    )  # fmt: skip
    for _ in range(300):
        trainer.step(x)
    recorder.recording.save(tmp_path / "run")
    return Recording.load(tmp_path / "run")


def test_a_recorded_run_gives_the_same_table(tmp_path: Path) -> None:
    recording = recorded(tmp_path)
    assert len(recording.windows) >= 20
    table = replay(recording, ["hold", "linear", "dmd", "mlp", "secant", "zero"], "small")
    assert all(set(KEYS) <= row.keys() for row in table)
    one = {row["predictor"]: row for row in table if row["horizon_windows"] == 1}
    assert one["zero"]["displacement_rel_err"] == pytest.approx(1)
    assert one["linear"]["displacement_cosine"] > 0.7
    assert one["mlp"]["displacement_cosine"] > 0.7
    assert one["hold"]["num_predictions"] > 5


def test_recording_survives_the_disk_bit_for_bit(tmp_path: Path) -> None:
    recording = recorded(tmp_path)
    recording.save(tmp_path / "again")
    again = Recording.load(tmp_path / "again")
    assert again.spec == recording.spec
    for a, b in zip(recording.windows, again.windows, strict=True):
        assert torch.equal(a.products.BB, b.products.BB)
        assert (a.loss, a.step, a.lr_ahead) == (b.loss, b.step, b.lr_ahead)


def test_a_damaged_recording_is_one_clear_error(tmp_path: Path) -> None:
    recorded(tmp_path)
    (tmp_path / "run" / "windows.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a readable recording"):
        Recording.load(tmp_path / "run")


def test_inner_products_agree_with_weights() -> None:
    """What the replay of a recording scores is what the weights would have said."""
    trajectory, name = generate(CASES["noisy"], 1, num_windows=40), "dmd"
    wide = BasisSpec(num_displacements=16, lag=True, optimizer=True, curvature=True)
    recording = Recording(wide, tuple(window for window, _ in observe(trajectory, wide)))
    replayed = replay(recording, [name], "noisy")
    predictor, cosines = make_predictor(name, 2), []
    for window, basis in observe(trajectory, predictor.spec):
        predictor.observe(window)
        if 20 <= window.index < 38:
            p = flat(basis.combine(predictor.predict(20).coefficients))
            actual = trajectory.means[window.index + 2] - trajectory.means[window.index]
            cosines.append(float(p @ actual / (p.norm() * actual.norm())))
    assert by_horizon(replayed, name)[2]["displacement_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)


@pytest.mark.parametrize("name", ["linear", "mlp", "secant"])
def test_extra_and_old_columns_are_scored_four_windows_ahead(name: str) -> None:
    """Lag and optimizer columns, and the oldest of sixteen, are gone from the basis by then; not from the recording."""
    trajectory, recorder = generate(CASES["noisy"], 2, num_windows=32), Recorder(Hold())
    for window, basis in observe(trajectory, recorder.spec):
        recorder.attach(basis)
        recorder.observe(window)
    found = {m: row["displacement_cosine"] for m, row in by_horizon(replay(recorder.recording, [name]), name).items()}
    predictor, means = make_predictor(name, 2), trajectory.means
    cosines: dict[int, list[float]] = {1: [], 2: [], 4: []}
    for window, basis in observe(trajectory, predictor.spec):
        predictor.observe(window)
        for m, seen in cosines.items():
            if 16 <= window.index < 32 - m:
                p = flat(basis.combine(predictor.predict(m * 10).coefficients))
                actual = means[window.index + m] - means[window.index]
                seen.append(float(p @ actual / (p.norm() * actual.norm())))
    assert found == pytest.approx({m: sum(seen) / len(seen) for m, seen in cosines.items()}, abs=1e-5)


def test_without_a_basis_extra_columns_are_scored_one_window_ahead() -> None:
    trajectory, recorder = generate(CASES["noisy"], 2, num_windows=24), Recorder(Hold())
    for window, _ in observe(trajectory, recorder.spec):
        recorder.observe(window)
    table = by_horizon(replay(recorder.recording, ["linear"]), "linear")
    assert [table[m]["num_predictions"] > 0 for m in (1, 2, 4)] == [True, False, False]


def test_hindsight_is_the_least_squares_answer() -> None:
    torch.manual_seed(0)
    columns, T = torch.randn(2, 5, 30, dtype=torch.float64), torch.randn(2, 30, dtype=torch.float64)
    columns[1, 4] = 2 * columns[1, 3]  # dependent: no column of its own
    columns[0, 2] = 0.0
    c = best_coefficients((columns @ T[:, :, None])[:, :, 0], columns @ columns.mT)
    for g in range(2):
        exact = torch.linalg.lstsq(columns[g].T, T[g][:, None], driver="gelsd").solution[:, 0]
        torch.testing.assert_close(c[g] @ columns[g], exact @ columns[g])


def test_references_frame_a_recorded_run(tmp_path: Path) -> None:
    table = replay(recorded(tmp_path), ["hold", "secant"], "small")
    assert {row["predictor"] for row in table} == {"hold", "secant", "zero", "optimum"}
    by_name = {row["predictor"]: row for row in table if row["horizon_windows"] == 1}
    assert by_name["zero"]["displacement_rel_err"] == pytest.approx(1)
    for row in table:
        assert row["horizon"] == 10 * row["horizon_windows"]
        if row["num_predictions"]:
            best = next(r for r in table if r["predictor"] == "optimum" and r["horizon"] == row["horizon"])
            if row["num_predictions"] == best["num_predictions"]:
                assert row["displacement_rel_err"] >= best["displacement_rel_err"] - 1e-6, "nobody beats hindsight"
    assert by_name["secant"]["note"] == "aims elsewhere"
    assert by_name["secant"]["loss_mae_rel"] is None
    assert by_name["hold"]["loss_mae_rel"] is not None


def test_memory_of_a_recorder_is_bounded() -> None:
    trajectory, recorder = generate(CASES["quadratic"], 0, num_windows=12), Recorder(Hold())
    for window, basis in observe(trajectory, recorder.spec):
        recorder.attach(basis)
        recorder.observe(window)
    state = recorder.state_dict()
    assert len(state["extras"]) == 4
    again = Recorder(Hold())
    again.load_state_dict(through_bytes(state))
    again.attach(basis)
    assert torch.equal(again.recording.extras_ahead[3], recorder.recording.extras_ahead[3])
    assert bool(torch.isfinite(recorder.recording.extras_ahead[3]).all())
    assert bool(torch.isnan(recorder.recording.extras_ahead[-1]).all())  # its future is not known


def test_a_plain_run_is_recorded_undisturbed(tmp_path: Path) -> None:
    """Window by window the losses of the loop that a recorded plain run stands for; no jump is ever proposed."""
    options = Options(task="regression", steps=60, set=("training.warmup_steps=5",))
    runs = {}
    for record in (False, True):
        request = single.Request(options=options, plain=True, record=record)
        runs[record] = single.train(request, tmp_path / str(record), resume=False)[0]
    assert runs[True]["statistics"]["num_jumps_proposed"] == 0
    assert runs[True]["statistics"]["num_real_steps"] == 60
    assert runs[True]["final_val_loss"] == runs[False]["final_val_loss"]
    recording = Recording.load(tmp_path / "True" / "recording")
    assert [w.step for w in recording.windows] == [10, 20, 30, 40, 50, 60]
    assert not (tmp_path / "False" / "recording").exists()
    case = RealRun(case="True", options=options)
    assert recorded_rows(tmp_path, ["hold"], [case])[0]["case"] == "True"  # what is there is not recorded again


def test_real_runs_take_what_data_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPT_DATA_DIR", raising=False)
    assert [run.options.task for run in real_runs()] == ["gpt", "pinn-poisson", "digits"]
    (tmp_path / "images").mkdir()
    monkeypatch.setenv("HPT_DATA_DIR", str(tmp_path))
    assert real_runs()[2].options.task == "cifar"


def test_recording_does_not_change_the_inner_predictor(tmp_path: Path) -> None:
    trajectory = generate(CASES["quadratic"], 0, num_windows=12)
    inner, alone = make_predictor("linear", 2), make_predictor("linear", 2)
    recorder = Recorder(inner)
    both = zip(observe(trajectory, recorder.spec), observe(trajectory, alone.spec), strict=True)
    for (recorded_window, wide), (window, basis) in both:  # noqa: B007 - the last ones are used below
        recorder.observe(recorded_window)
        alone.observe(window)
    ours = flat(wide.combine(recorder.predict(20).coefficients))
    torch.testing.assert_close(ours, flat(basis.combine(alone.predict(20).coefficients)))
    assert isinstance(inner, Linear)


def test_a_basis_that_is_too_narrow_is_refused() -> None:
    mlp = make_predictor("mlp", 2)
    assert isinstance(mlp, Mlp)
    with pytest.raises(ValueError, match="lacks columns"):
        column_map(BasisSpec(num_displacements=4), mlp.spec)
    with pytest.raises(ValueError, match="lacks columns"):
        Recorder(mlp, BasisSpec(num_displacements=8))
    wide, spec = BasisSpec(num_displacements=4, lag=True, gradient=True), BasisSpec(num_displacements=2, gradient=True)
    assert column_map(wide, spec) == [0, 1, 5]
    trajectory = generate(CASES["quadratic"], 0, num_windows=5)
    for window, _ in observe(trajectory, wide):
        assert narrow(window, wide, spec).products.BB.shape == (2, 3, 3)


# ---------------------------------------------------------------- predictors of other packages


class Installed:
    """Stands for the entry points of installed packages."""

    names = ("mean_of_two",)

    def __getitem__(self, name: str) -> EntryPoint:
        return EntryPoint(name, "custom_predictor:build_mean_of_two", predictors.ENTRY_POINTS)


def test_a_custom_predictor_is_named_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    monkeypatch.setattr(predictors, "entry_points", lambda group: Installed())
    predictor = predictors.build(HybridTrainerConfig(predictor_type="mean_of_two"), 2)
    assert predictor.name == "mean_of_two"
    trajectory = generate(CASES["quadratic"], 0, num_windows=6)
    for window, basis in observe(trajectory, predictor.spec):  # noqa: B007 - the last basis is used below
        predictor.observe(window)
    means = trajectory.means
    expected = means[-1] - means[-3]
    torch.testing.assert_close(flat(basis.combine(predictor.predict(20).coefficients)), expected)


def test_an_import_string_is_not_a_name() -> None:
    for name in ("custom_predictor:build_mean_of_two", "os.system", "linaer"):
        with pytest.raises(ConfigError, match="is unknown"):
            predictors.build(HybridTrainerConfig(predictor_type=name), 2)
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        predictors.build(HybridTrainerConfig(predictor_type="linaer"), 2)


def test_a_predictor_on_other_columns_is_refused_in_one_line(tmp_path: Path) -> None:
    options = Options(task="regression", steps=20, predictor="quasi_newton")
    with pytest.raises(ConfigError, match="--predictor secant, or --plain"):
        single.train(single.Request(options=options, record=True), tmp_path / "a", resume=False)
