"""``hpt bench predictors``: each predictor on trajectories with a known answer, or on recorded windows.

Every prediction is made before the future it is compared with is seen; only the latter half of a
trajectory counts, after the predictor has had the first half to learn.  Errors are of the
displacement of the window mean, x(t + Y) - x(t), over all weights.

Two references frame them: ``zero`` (no jump, the loss stays) and ``optimum``, which on a trajectory with a
known answer is the expected continuation and on a recorded run what hindsight would have answered in the
span of the recorded columns.  ``secant`` goes to a minimum and not to where training goes: its displacement
is measured like any other, its loss forecast is left out.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...numerics.calibration import calibration_error, reliability_curve
from ...predictors import Predictor, build
from ...records import BasisSpec
from ...tasks.base import DATA_DIR_VARIABLE
from .. import train as single
from ..arms.options import Options, as_input_error
from ..arms.recording import Recording, best_coefficients, future_products, narrow
from .trajectories import CASES, flat, generate, observe

#: References that are not predictors: no jump at all, and the best that could be known.
REFERENCES = ("zero", "optimum")
DEFAULT_PREDICTORS = ("hold", "linear", "dmd", "mlp", "rssm", *REFERENCES)
RECORDED_PREDICTORS = ("hold", "linear", "dmd", "mlp", "rssm", "secant")
#: Horizons in windows.
HORIZONS = (1, 2, 4)
#: What hindsight may combine on a recorded run.
HINDSIGHT_SPEC = BasisSpec(num_displacements=16, lag=True, optimizer=True)

Row = dict[str, Any]


@dataclass(slots=True)
class Scores:
    """Measurements of one predictor on one case and horizon."""

    cosines: list[float] = field(default_factory=list)
    squared_errors: list[float] = field(default_factory=list)  # over squared displacement
    lengths: list[float] = field(default_factory=list)  # of the displacement
    loss_errors: list[float] = field(default_factory=list)
    outcomes: list[tuple[float, bool]] = field(default_factory=list)  # (confidence, better than no jump)
    update_ms: list[float] = field(default_factory=list)
    predict_ms: list[float] = field(default_factory=list)

    def add(self, predicted: Tensor, actual: Tensor) -> float:
        """Compare two displacements (P,); returns the relative squared error."""
        return self.add_products(
            float(predicted @ actual), float(predicted.square().sum()), float(actual.square().sum())
        )

    def add_products(self, cross: float, fitted: float, total: float) -> float:
        """The same from inner products: p . T, p . p and T . T."""
        error = max(total - 2 * cross + fitted, 0.0) / total if total > 0 else 0.0
        length = math.sqrt(max(fitted * total, 0.0))
        self.cosines.append(cross / length if length > 0 else 0.0)
        self.squared_errors.append(error)
        self.lengths.append(math.sqrt(total))
        return error

    def add_loss(self, predicted: float, actual: float) -> None:
        """Compare two losses; one that is not finite says nothing."""
        if math.isfinite(actual):
            self.loss_errors.append(abs(predicted - actual) / max(abs(actual), 1e-300))

    def row(self, case: str, predictor: str, num_windows: int, num_steps: int, note: str | None = None) -> Row:
        """One line of the table; None where there is no such number.

        Args:
            case: Trajectory or run.
            predictor: Name.
            num_windows: Horizon in windows.
            num_steps: N, real steps of a window.
            note: What a reader has to know.
        """

        def mean(values: list[float]) -> float | None:
            return statistics.fmean(values) if values else None

        squared = mean(self.squared_errors)
        absolute = [math.sqrt(e) * length for e, length in zip(self.squared_errors, self.lengths, strict=True)]
        return {
            "case": case,
            "predictor": predictor,
            "horizon": num_windows * num_steps,
            "horizon_windows": num_windows,
            "displacement_cosine": mean(self.cosines),
            "displacement_rel_err": None if squared is None else math.sqrt(squared),
            "displacement_abs_err": mean(absolute),
            "loss_mae_rel": mean(self.loss_errors),
            "ece": raw_calibration_error(self.outcomes) if self.outcomes else None,
            "update_ms": statistics.median(self.update_ms) if self.update_ms else None,
            "predict_ms": statistics.median(self.predict_ms) if self.predict_ms else None,
            "num_predictions": len(self.squared_errors),
            "note": note,
        }


def raw_calibration_error(outcomes: Sequence[tuple[float, bool]]) -> float:
    """ECE of the raw confidences."""
    return calibration_error(reliability_curve([c for c, _ in outcomes], [float(kept) for _, kept in outcomes]))


def make_predictor(name: str, num_groups: int, seed: int = 0) -> Predictor:
    """Predictor by name with default settings."""
    config = with_values(HybridTrainerConfig(), {"predictor.type": name, "training.seed": seed})
    return build(config, num_groups)


def measure(
    predictors: Sequence[str] = DEFAULT_PREDICTORS, cases: Sequence[str] = tuple(CASES),
    seeds: Iterable[int] = range(3), *, quick: bool = False, horizons: Sequence[int] = HORIZONS,
) -> list[Row]:  # fmt: skip
    """The table on trajectories with a known answer, pooled over seeds.

    Args:
        predictors: Names, or ``zero`` and ``optimum``.
        cases: Names in :data:`.trajectories.CASES`.
        seeds: Of the trajectory and the predictor.
        quick: Half as many windows.
        horizons: In windows.
    """
    table, num_steps = [], 0
    seeds = list(seeds)
    for case in cases:
        for name in predictors:
            scores = {m: Scores() for m in horizons}
            for seed in seeds:
                num_steps = _run_case(case, name, seed, scores, num_windows=80 if quick else 160)
            table += [scores[m].row(case, name, m, num_steps) for m in horizons]
    return table


def _run_case(case: str, name: str, seed: int, scores: dict[int, Scores], *, num_windows: int) -> int:
    """Add to the scores per horizon; returns N."""
    trajectory = generate(CASES[case], seed, num_windows=num_windows, ahead=max(scores))
    means, losses = trajectory.means, trajectory.window_losses
    predictor = None if name in REFERENCES else make_predictor(name, 2, seed)
    spec = BasisSpec() if predictor is None else predictor.spec
    for window, basis in observe(trajectory, spec, predictor=predictor):
        if predictor is not None:
            began = time.perf_counter()
            predictor.observe(window)
            for score in scores.values():
                score.update_ms.append(1e3 * (time.perf_counter() - began))
        t = window.index
        if t < num_windows // 2:
            continue
        for m, score in scores.items():
            if t + m >= num_windows:
                continue
            actual = means[t + m] - means[t]
            if predictor is None:
                expected = trajectory.expected[t, m - 1]
                score.add(expected if name == "optimum" else torch.zeros_like(actual), actual)
                if name == "zero":
                    score.add_loss(float(losses[t]), float(losses[t + m]))
                continue
            if not predictor.ready:
                continue
            began = time.perf_counter()
            prediction = predictor.predict(m * window.num_steps)
            score.predict_ms.append(1e3 * (time.perf_counter() - began))
            error = score.add(flat(basis.combine(prediction.coefficients)), actual)
            score.outcomes.append((prediction.confidence, error < 1))
            score.add_loss(prediction.predicted_loss, float(losses[t + m]))
    return trajectory.num_steps


# ---- recorded runs ---------------------------------------------------------------------------------


def replay(
    recording: Recording, predictors: Sequence[str] = RECORDED_PREDICTORS, case: str = "recording", *,
    horizons: Sequence[int] = HORIZONS,
) -> list[Row]:  # fmt: skip
    """The same table on the recorded windows of a real run, from inner products alone.

    Both references are in it, asked for or not.  Stretches across an accepted jump are not scored.

    Args:
        recording: Of a run.
        predictors: Names.
        case: What to call the run.
        horizons: In windows.
    """
    table: list[Row] = []
    for name in dict.fromkeys([*predictors, *REFERENCES]):
        scores = {m: Scores() for m in horizons}
        aims_elsewhere = _replay_one(recording, name, scores)
        num_steps = recording.windows[0].num_steps if recording.windows else 0
        note = "aims elsewhere" if aims_elsewhere else None
        table += [scores[m].row(case, name, m, num_steps, note) for m in horizons]
    return table


def _replay_one(recording: Recording, name: str, scores: dict[int, Scores]) -> bool:
    """Add to the scores per horizon; returns whether the predictor aims elsewhere than where training goes."""
    windows = recording.windows
    if not windows:
        return False
    predictor = None if name in REFERENCES else make_predictor(name, windows[0].products.num_groups)
    spec = HINDSIGHT_SPEC if predictor is None else predictor.spec
    for t, window in enumerate(windows):
        if predictor is not None:
            began = time.perf_counter()
            predictor.observe(narrow(window, recording.spec, spec))
            for score in scores.values():
                score.update_ms.append(1e3 * (time.perf_counter() - began))
        if t < len(windows) // 2 or (predictor is not None and not predictor.ready):
            continue
        for m, score in scores.items():
            seen = future_products(recording, t, m, spec)
            if seen is None:
                continue
            dots, gram, total = seen
            prediction, c = None, best_coefficients(dots, gram) if name == "optimum" else torch.zeros_like(dots)
            if predictor is not None:
                began = time.perf_counter()
                prediction = predictor.predict(m * window.num_steps)
                score.predict_ms.append(1e3 * (time.perf_counter() - began))
                c = prediction.coefficients
            error = score.add_products(float((c * dots).sum()), float(torch.einsum("gk,gkl,gl->", c, gram, c)), total)
            if prediction is not None:
                score.outcomes.append((prediction.confidence, error < 1))
            if prediction is not None and not spec.curvature:
                score.add_loss(prediction.predicted_loss, windows[t + m].loss)
            elif name == "zero":
                score.add_loss(window.loss, windows[t + m].loss)
    return spec.curvature


@dataclass(frozen=True, slots=True, kw_only=True)
class RealRun:
    """A run that is recorded plainly and replayed."""

    case: str
    options: Options


def real_runs() -> tuple[RealRun, ...]:
    """The language task, a PINN and a CNN: on CIFAR-10 images where ``HPT_DATA_DIR`` has them, else on digits."""
    folder = os.environ.get(DATA_DIR_VARIABLE)
    cifar = folder is not None and (Path(folder) / "images").is_dir()
    # recorded under the secant model's settings: windows of ten steps in all three
    cnn = (
        Options(task="cifar", preset="narrow", predictor="secant")
        if cifar
        else Options(task="digits", predictor="secant")
    )
    return (
        RealRun(case="gpt 0.3M", options=Options(task="gpt", preset="0.3M", steps=300)),
        RealRun(case="pinn-poisson", options=Options(task="pinn-poisson", steps=1500, lr=0.005, predictor="secant")),
        RealRun(case=cnn.task, options=cnn),
    )


def recorded_rows(
    out: Path, predictors: Sequence[str] = RECORDED_PREDICTORS, runs: Sequence[RealRun] | None = None, *,
    seed: int = 0, note: Callable[[str], None] = lambda line: None,
) -> list[Row]:  # fmt: skip
    """Record real runs without prediction and replay them: one table.

    Args:
        out: Folder; a run whose recording is already below it is not trained again.
        predictors: Names.
        runs: :func:`real_runs` if None.
        seed: Of the runs.
        note: Takes lines for a person who waits.

    Raises:
        InputError: a run cannot be made, or a name is unknown.
        CheckpointError: a recording is damaged.
    """
    table: list[Row] = []
    for run in real_runs() if runs is None else runs:
        folder = out / run.case.replace(" ", "-")
        if not (folder / "recording" / "windows.json").exists():
            note(f"recording {run.case}")
            single.train(single.Request(options=run.options, seed=seed, plain=True, record=True), folder, resume=False)
        note(f"replaying {run.case}")
        with as_input_error():
            table += replay(Recording.load(folder / "recording"), predictors, run.case)
    return table
