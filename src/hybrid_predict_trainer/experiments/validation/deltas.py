"""Experiment 3: can the change of the weights over the next steps be told?

At every snapshot each predictor that watches the run tells the displacement over the horizons; it is held against what
the run then does, of the raw weights and of their means over a window.  Three frames stand around the figures: ``hold``
(what the last window did, again), zero (no displacement: an error of 1), and the ceiling that the noise of the data
sets for anybody, from runs that go on from the same state with other data.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...weights.algebra import Tensors
from .criteria import Criterion
from .loop import FORECASTERS, WINDOW, Loop
from .plain import Scale

#: Below it the seeds fall back to predicting the loss alone.
LEAST_COSINE = 0.5
LOSS_BAR = 0.9
COSINE_BAR, ERROR_BAR, LAYER_BAR, CORRELATION_BAR = 0.8, 0.2, 0.75, 0.9
#: Predictors are chosen on what was seen before this share of the run, and judged on what came after.
CHOSEN_BY = 0.6
Point = dict[str, Any]


@dataclass(slots=True)
class _Asked:
    """A forecast that waits for its future: by predictor, the displacement told; where the run stood."""

    due: int
    horizon: int
    step: int
    told: dict[str, Tensors]
    losses: dict[str, float]
    confidences: dict[str, float]
    loss: float
    raw: Tensors
    mean: Tensors


def compare(told: Tensors, actual: Tensors) -> tuple[float, float, float]:
    """Cosine, relative error |told - actual| / |actual| over all weights, and the share of layers above the bar.

    Args:
        told: One tensor per parameter.
        actual: The same shapes.
    """
    dots = [(float((a * b).sum()), float(a.square().sum()), float(b.square().sum()))
            for a, b in zip(_double(told), _double(actual), strict=True)]  # fmt: skip
    cross, fitted, total = (sum(d[k] for d in dots) for k in range(3))
    cosines = [_cosine(*d) for d in dots]
    layers = sum(c > COSINE_BAR for c in cosines) / len(cosines)
    error = math.sqrt(max(total - 2 * cross + fitted, 0.0) / total) if total > 0 else 0.0
    return _cosine(cross, fitted, total), error, layers


def _double(tensors: Tensors) -> list[Tensor]:
    return [t.detach().double() for t in tensors]


def _cosine(cross: float, fitted: float, total: float) -> float:
    length = math.sqrt(fitted * total)
    return cross / length if length > 0 else 0.0


def measure(scale: Scale, seed: int, tell: Callable[[str], None], loop: Loop | None = None) -> dict[str, Any]:
    """Train once with all predictors watching.

    Args:
        scale: Sizes.
        seed: Of the run.
        tell: Takes a line now and then.
        loop: Not yet begun; None: the scale's.

    Returns:
        By predictor, kind of weights and horizon: cosine, relative error, share of layers, number of forecasts; the
        ceilings; every single forecast as ``points``.
    """
    loop = loop or Loop(scale, seed, FORECASTERS)
    waiting: list[_Asked] = []
    points: list[Point] = []
    losses: list[Point] = []
    ceilings: dict[int, list[dict[str, float]]] = defaultdict(list)
    total = loop.total
    origins = {_snapped(total * (k + 1) / (scale.num_twins + 1), scale.snapshot_every) for k in range(scale.num_twins)}
    twins: list[tuple[int, dict[int, tuple[Tensors, Tensors, Tensors, Tensors]]]] = []
    for step in range(1, total + 1):
        loop.step()
        if step % scale.snapshot_every:
            continue
        mean, raw = [x.clone() for x in loop.basis.average()], loop.weights()
        for asked in [a for a in waiting if a.due == step]:
            points += _points(asked, raw, mean)
            assert loop.window is not None
            losses += [
                {"step": asked.step, "horizon": asked.horizon, "predictor": name, "told": told,
                 "actual": loop.window.loss, "last": asked.loss}
                for name, told in asked.losses.items()
            ]  # fmt: skip
        waiting = [a for a in waiting if a.due != step]
        for origin, futures in twins:
            if step - origin in futures:
                ceilings[step - origin].append(_agreement(futures[step - origin], (raw, mean)))
        waiting += _ask(loop, scale, step, raw, mean)
        if step in origins:
            twins.append((step, _futures(loop, scale, seed, raw, mean)))
            tell(f"seed {seed}: step {step} of {total}, continued with other data")
    return {
        **_table(points, total), "ceilings": _ceilings(ceilings), "points": points, "losses": losses,
        "loss_r2": _loss_fits([p for p in losses if p["step"] >= CHOSEN_BY * total] or losses),
    }  # fmt: skip


def _loss_fits(losses: list[Point]) -> dict[str, float | None]:
    """R2 of the losses that each predictor told, over all horizons, and of the last window's loss."""
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(p["predictor"] for p in losses):
        own = [p for p in losses if p["predictor"] == name]
        mean = sum(p["actual"] for p in own) / len(own)
        spread = sum((p["actual"] - mean) ** 2 for p in own)
        for who, key in ((name, "told"), ("last window", "last")):
            missed = sum((p[key] - p["actual"]) ** 2 for p in own)
            found[who] = 1 - missed / spread if spread > 0 else None
    return found


def _snapped(step: float, every: int) -> int:
    return max(every, round(step / every) * every)


def _ask(loop: Loop, scale: Scale, step: int, raw: Tensors, mean: Tensors) -> list[_Asked]:
    found = []
    for horizon in scale.horizons:
        if step + horizon > loop.total:
            continue
        told, losses, confidences = {}, {}, {}
        for name in loop.predictors:
            prediction = loop.predict(name, horizon)
            if prediction is not None:
                told[name] = [d.clone() for d in loop.basis.combine(prediction.coefficients)]
                losses[name], confidences[name] = prediction.predicted_loss, prediction.confidence
        assert loop.window is not None
        found.append(_Asked(step + horizon, horizon, step, told, losses, confidences, loop.window.loss, raw, mean))
    return found


def _points(asked: _Asked, raw: Tensors, mean: Tensors) -> list[Point]:
    found: list[Point] = []
    for kind, now, then in (("raw", raw, asked.raw), ("averaged", mean, asked.mean)):
        actual = [a - b for a, b in zip(now, then, strict=True)]
        for name, told in asked.told.items():
            cosine, error, layers = compare(told, actual)
            found.append({"step": asked.step, "horizon": asked.horizon, "weights": kind, "predictor": name,
                          "cosine": cosine, "error": error, "layers": layers,
                          "confidence": asked.confidences[name]})  # fmt: skip
    return found


def _futures(
    loop: Loop, scale: Scale, seed: int, raw: Tensors, mean: Tensors
) -> dict[int, tuple[Tensors, Tensors, Tensors, Tensors]]:
    """Where a run with other data stands after each horizon: (raw, mean) there, beside (raw, mean) here."""
    twin = loop.twin(data_seed=seed + 500_009)
    found, sums = {}, [torch.zeros_like(w) for w in raw]
    for ahead in range(1, max(scale.horizons) + 1):
        if loop.position + ahead > loop.total:
            break
        into = (ahead - 1) % scale.snapshot_every >= scale.snapshot_every - WINDOW
        if into:  # the mean of a window is that of the weights before its steps
            sums = [s + w for s, w in zip(sums, twin.weights(), strict=True)]
        twin.step()
        if ahead % scale.snapshot_every == 0:
            if ahead in scale.horizons:
                found[ahead] = (twin.weights(), [s / WINDOW for s in sums], raw, mean)
            sums = [torch.zeros_like(s) for s in sums]
    return found


def _agreement(
    future: tuple[Tensors, Tensors, Tensors, Tensors], here: tuple[Tensors, Tensors]
) -> dict[str, float]:  # fmt: skip
    """Cosine of two displacements from the same state with different data, of raw and of averaged weights."""
    found = {}
    for kind, at in (("raw", 0), ("averaged", 1)):
        start = future[2 + at]
        one, other = ([a - b for a, b in zip(w, start, strict=True)] for w in (future[at], here[at]))
        found[kind] = compare(one, other)[0]
    return found


def _ceilings(seen: Mapping[int, list[dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """The best cosine and the least error that a predictor without the data's future can have in the mean.

    Two continuations D + e and D + e' with independent noise have a cosine of r = |D|^2 / (|D|^2 + |e|^2); the expected
    displacement D itself has one of sqrt(r) with either, and misses sqrt(1 - r) of its length.
    """
    found: dict[str, dict[str, dict[str, float]]] = {"raw": {}, "averaged": {}}
    for horizon, pairs in sorted(seen.items()):
        for kind, by_horizon in found.items():
            r = min(max(sum(p[kind] for p in pairs) / len(pairs), 0.0), 1.0)
            by_horizon[str(horizon)] = {"cosine": math.sqrt(r), "error": math.sqrt(1 - r), "num_twins": len(pairs)}
    return found


def _table(points: list[Point], total: int) -> dict[str, Any]:
    """Means over the judged part, and which predictor the part before it chose."""
    judged = [p for p in points if p["step"] >= CHOSEN_BY * total] or points
    others = [p for p in points if p["predictor"] != "hold"] or points
    learnt = _means([p for p in others if p["step"] + p["horizon"] <= CHOSEN_BY * total] or others)
    shortest = min(p["horizon"] for p in points)
    cosines = {n: row["cosine"] for (n, kind, h), row in learnt.items() if (kind, h) == ("averaged", shortest)}
    rows = [{"predictor": n, "weights": kind, "horizon": h, **row}
            for (n, kind, h), row in sorted(_means(judged).items())]  # fmt: skip
    return {"chosen": max(cosines, key=lambda n: cosines[n]), "shortest": shortest, "rows": rows}


def _means(points: list[Point]) -> dict[tuple[str, str, int], dict[str, float]]:
    cells: dict[tuple[str, str, int], list[Point]] = defaultdict(list)
    for p in points:
        cells[p["predictor"], p["weights"], p["horizon"]].append(p)
    return {
        key: {**{f: sum(p[f] for p in cell) / len(cell) for f in ("cosine", "error", "layers")}, "n": len(cell)}
        for key, cell in cells.items()
    }


def criteria(found: Mapping[str, Any]) -> list[Criterion]:
    """The bars at the shortest horizon, of raw and of averaged weights, beside ``hold``."""
    bars: list[Criterion] = []
    rows = {(r["predictor"], r["weights"], r["horizon"]): r for r in found["rows"]}
    for kind in ("raw", "averaged"):
        ours, held = (rows[name, kind, found["shortest"]] for name in (found["chosen"], "hold"))
        ceiling = found["ceilings"][kind].get(str(found["shortest"]), {})
        asked: tuple[tuple[str, str, float, Literal["above", "below"]], ...] = (
            ("cosine of told and actual displacement", "cosine", COSINE_BAR, "above"),
            ("relative error of the displacement", "error", ERROR_BAR, "below"),
            (f"share of layers with a cosine above {COSINE_BAR:g}", "layers", LAYER_BAR, "above"),
            ("correlation of told and actual displacement", "cosine", CORRELATION_BAR, "above"),
        )
        for name, key, bar, sense in asked:
            bars.append(Criterion(
                name=f"{name}, {kind} weights, {found['shortest']} steps", value=ours[key], bar=bar, sense=sense,
                control=held[key], control_name="hold", ceiling=ceiling.get(key),
            ))  # fmt: skip
    fits = found["loss_r2"]
    told = fits.get("rssm")
    if told is not None and fits["last window"] is not None:
        bars.append(Criterion(
            name="R2 of the loss told by the recurrent state-space model", value=told, bar=LOSS_BAR, sense="above",
            control=fits["last window"], control_name="the last window's loss",
        ))  # fmt: skip
    return bars


def decision(found: Mapping[str, Any]) -> str:
    """The protocol's: on above 0.8, another look above 0.5, below it only the loss is worth predicting."""
    bar = next(b for b in criteria(found) if b.name.startswith("cosine") and "averaged" in b.name)
    return "continue" if bar.passed else "refine" if bar.value >= LEAST_COSINE else "stop"
