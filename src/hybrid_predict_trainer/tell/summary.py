"""Figures of a summary that hold for whatever floats there are: none of them raises."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def histogram(values: Iterable[float], bins: int) -> dict[str, Any]:
    """Counts and edges over bins of equal width, for whatever floats there are.

    ``numpy.histogram`` raises where values differ by less than the bins can be told apart, and where one of them is
    not finite.  Here the range is widened to what floats can divide, and what is not finite is counted beside it.
    """
    data = np.asarray(list(values), dtype=np.float64)
    finite = data[np.isfinite(data)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    size = max(abs(low), abs(high), 1e-300)
    low, high = low / size, high / size  # within [-1, 1]: no difference overflows
    least = 4 * bins * np.finfo(np.float64).eps
    if high - low < least:
        half = least if low != high or size > 0.5 / least else 0.5 / size  # around one value as numpy does
        middle = (low + high) / 2
        low, high = middle - half, middle + half
    with np.errstate(over="ignore"):  # an edge beyond the largest float is cut off
        edges = np.linspace(low, high, bins + 1)
        scaled = np.clip(size * edges, -np.finfo(np.float64).max, np.finfo(np.float64).max)
    places = np.clip(np.searchsorted(edges, finite / size, side="right") - 1, 0, bins - 1)
    found = {"counts": np.bincount(places, minlength=bins).tolist(), "edges": scaled.tolist()}
    dropped = len(data) - len(finite)
    return {**found, "num_nonfinite": dropped} if dropped else found


def mean(values: Iterable[float]) -> float | None:
    """Mean of what is finite; None if nothing is."""
    finite = [v for v in values if math.isfinite(v)]
    return sum(v / len(finite) for v in finite) if finite else None  # the sum of huge values is no float


def correlation(pairs: Iterable[tuple[float, float]]) -> float | None:
    """Pearson correlation, None below three pairs or for a constant."""
    pairs = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    if len(pairs) < 3:
        return None
    first, second = (_standardized(v) for v in zip(*pairs, strict=True))
    if first is None or second is None:
        return None
    return min(max(math.fsum(a * b for a, b in zip(first, second, strict=True)), -1.0), 1.0)


def _standardized(values: Sequence[float]) -> list[float] | None:
    """Deviations from the mean over their norm; None for a constant.  Scaled first: no square leaves the range."""
    size = max(map(abs, values)) or 1.0
    scaled = [v / size for v in values]
    center = math.fsum(scaled) / len(scaled)
    deviations = [v - center for v in scaled]
    norm = math.hypot(*deviations)
    return [v / norm for v in deviations] if norm > 0 else None
