"""``hpt bench predictors``: each predictor on trajectories with a known answer, or on recorded windows.

Every prediction is made before the future it is compared with is seen; only the latter half of a
trajectory counts, after the predictor has had the first half to learn.  Errors are of the
displacement of the window mean, x(t + Y) - x(t), over all weights.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..calibration import calibration_error, reliability_curve
from ..config import HybridTrainerConfig
from ..predictors import Predictor, build
from ..records import BasisSpec
from ..toml_io import with_values
from .recording import Recording, future_products, narrow
from .trajectories import CASES, flat, generate, observe

#: References that are not predictors: no jump at all, and the expected continuation.
REFERENCES = ("zero", "optimum")
DEFAULT_PREDICTORS = ("hold", "linear", "dmd", "mlp", "rssm", *REFERENCES)
#: Horizons in windows.
HORIZONS = (1, 2, 4)

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

    def row(self, case: str, predictor: str, horizon: int) -> Row:
        """One line of the table; None where a reference has no such number."""

        def mean(values: list[float]) -> float | None:
            return statistics.fmean(values) if values else None

        squared = mean(self.squared_errors)
        absolute = [math.sqrt(e) * length for e, length in zip(self.squared_errors, self.lengths, strict=True)]
        return {
            "case": case,
            "predictor": predictor,
            "horizon_windows": horizon,
            "displacement_cosine": mean(self.cosines),
            "displacement_rel_err": None if squared is None else math.sqrt(squared),
            "displacement_abs_err": mean(absolute),
            "loss_mae_rel": mean(self.loss_errors),
            "ece": raw_calibration_error(self.outcomes) if self.outcomes else None,
            "update_ms": statistics.median(self.update_ms) if self.update_ms else None,
            "predict_ms": statistics.median(self.predict_ms) if self.predict_ms else None,
            "num_predictions": len(self.squared_errors),
        }


def raw_calibration_error(outcomes: Sequence[tuple[float, bool]]) -> float:
    """ECE of the raw confidences."""
    return calibration_error(reliability_curve([c for c, _ in outcomes], [float(kept) for _, kept in outcomes]))


def make_predictor(name: str, num_groups: int, seed: int = 0) -> Predictor:
    """Predictor by name with default settings."""
    config = with_values(HybridTrainerConfig(), {"predictor.type": name, "training.seed": seed})
    return build(config, num_groups)


def rows(
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
    table = []
    seeds = list(seeds)
    for case in cases:
        for name in predictors:
            scores = {m: Scores() for m in horizons}
            for seed in seeds:
                _run_case(case, name, seed, scores, num_windows=80 if quick else 160)
            table += [scores[m].row(case, name, m) for m in horizons]
    return table


def _run_case(case: str, name: str, seed: int, scores: dict[int, Scores], *, num_windows: int) -> None:
    trajectory = generate(CASES[case], seed, num_windows=num_windows, ahead=max(scores))
    means, losses = trajectory.means, trajectory.window_losses
    predictor = None if name in REFERENCES else make_predictor(name, 2, seed)
    spec = BasisSpec() if predictor is None else predictor.spec
    for window, basis in observe(trajectory, spec):
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
                continue
            if not predictor.ready:
                continue
            began = time.perf_counter()
            prediction = predictor.predict(m * window.num_steps)
            score.predict_ms.append(1e3 * (time.perf_counter() - began))
            error = score.add(flat(basis.combine(prediction.coefficients)), actual)
            score.outcomes.append((prediction.confidence, error < 1))
            after = float(losses[t + m])
            score.loss_errors.append(abs(prediction.predicted_loss - after) / max(abs(after), 1e-300))


# ---- recorded runs ---------------------------------------------------------------------------------


def replay(
    recording: Recording, predictors: Sequence[str], case: str, *, horizons: Sequence[int] = HORIZONS
) -> list[Row]:
    """The same table on the recorded windows of a real run, from inner products alone.

    Later than one window ahead the lag and the optimizer's direction are not in the recorded Gram
    matrices, so a predictor that uses them has rows for one window only.  Stretches across an accepted
    jump are not scored.
    """
    table = []
    for name in predictors:
        scores = {m: Scores() for m in horizons}
        _replay_one(recording, name, scores)
        table += [scores[m].row(case, name, m) for m in horizons]
    return table


def _replay_one(recording: Recording, name: str, scores: dict[int, Scores]) -> None:
    windows = recording.windows
    if not windows:
        return
    G = windows[0].products.num_groups
    predictor = None if name in REFERENCES else make_predictor(name, G)
    spec = BasisSpec(num_displacements=1) if predictor is None else predictor.spec
    for t, window in enumerate(windows):
        if predictor is not None:
            began = time.perf_counter()
            predictor.observe(narrow(window, recording.spec, spec))
            for score in scores.values():
                score.update_ms.append(1e3 * (time.perf_counter() - began))
        if t < len(windows) // 2 or (predictor is not None and not predictor.ready) or name == "optimum":
            continue
        for m, score in scores.items():
            ahead = windows[t + 1 : t + 1 + m]
            actual = future_products(window, ahead, recording.spec, spec) if len(ahead) == m else None
            if actual is None:
                continue
            dots, gram, total = actual
            prediction, c = None, torch.zeros_like(dots)
            if predictor is not None:
                began = time.perf_counter()
                prediction = predictor.predict(m * window.num_steps)
                score.predict_ms.append(1e3 * (time.perf_counter() - began))
                c = prediction.coefficients
            score.add_products(float((c * dots).sum()), float(torch.einsum("gk,gkl,gl->", c, gram, c)), total)
            if prediction is not None:
                after = ahead[-1].loss
                score.outcomes.append((prediction.confidence, score.squared_errors[-1] < 1))
                if math.isfinite(after):
                    score.loss_errors.append(abs(prediction.predicted_loss - after) / max(abs(after), 1e-300))
