"""Experiment 1: have gradients a structure that could be predicted?

A sequence of vectors is looked at three ways, each beside a control of the same shape: cosines of neighbours, the share
of the variance in ten principal components, and the correlation over 50 steps.  Sequences are (T, D), T steps in time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...forecast.curve import Array
from .criteria import Criterion

NUM_COMPONENTS, LAG = 10, 50
NUM_SHUFFLES = 200
#: Deviations from 0 that a cosine of pure noise stays within.
NOISE_DEVIATIONS = 3.0


def adjacent_cosines(vectors: Array) -> Array:
    """Cosine of each vector with the next, (T - 1,)."""
    return lagged_cosines(vectors, 1)


def lagged_cosines(vectors: Array, lag: int) -> Array:
    """Cosine of each vector with the one ``lag`` later, (T - lag,)."""
    size = np.linalg.norm(vectors, axis=1)
    unit = vectors / np.where(size > 0, size, 1.0)[:, None]
    found: Array = np.einsum("td,td->t", unit[:-lag], unit[lag:])
    return found


def component_share(vectors: Array, count: int = NUM_COMPONENTS) -> float:
    """Share of the variance about the mean in the first principal components."""
    values = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False) ** 2
    return float(values[:count].sum() / values.sum()) if values.sum() > 0 else 0.0


def spectrum(vectors: Array, count: int = 2 * NUM_COMPONENTS) -> list[float]:
    """Share of the variance about the mean in each of the first principal components."""
    values = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False) ** 2
    return [float(v) for v in values[:count] / values.sum()] if values.sum() > 0 else [0.0] * count


def order_p(vectors: Array, lag: int, seed: int = 0) -> float:
    """p of the hypothesis that the order in time means nothing: share of shuffles whose mean cosine is as large."""
    size = np.linalg.norm(vectors, axis=1)
    unit = vectors / np.where(size > 0, size, 1.0)[:, None]
    products = unit @ unit.T
    rng, count = np.random.default_rng(seed), len(vectors)
    seen = float(products[np.arange(count - lag), np.arange(lag, count)].mean())
    least = 0
    for _ in range(NUM_SHUFFLES):
        order = rng.permutation(count)
        least += float(products[order[:-lag], order[lag:]].mean()) >= seen - 1e-12
    return (least + 1) / (NUM_SHUFFLES + 1)


def random_walk(count: int, width: int, seed: int = 0) -> Array:
    """Positions (count, width) of a walk with independent normal steps."""
    found: Array = np.cumsum(np.random.default_rng(seed).normal(size=(count, width)), axis=0)
    return found


def verdict(vectors: Array) -> str:
    """ "noise", "partly predictable" or "predictable", by the cosine of neighbours alone.

    Noise of T vectors in D dimensions has a mean cosine of 0 with a standard deviation of 1 / sqrt(T D).
    """
    mean = float(adjacent_cosines(vectors).mean())
    if mean < NOISE_DEVIATIONS / math.sqrt(vectors.size):
        return "noise"
    return "predictable" if mean > 0.7 else "partly predictable"


def criteria(gradients: Array, updates: Array, seed: int = 0) -> list[Criterion]:
    """The bars on raw gradients and on the optimizer's updates."""
    count, width = gradients.shape
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, width))
    momentum = np.zeros((count, width))
    for t in range(count):  # what an optimizer with a momentum of 0.9 makes of pure noise
        momentum[t] = 0.9 * momentum[t - 1] * (t > 0) + 0.1 * noise[t]
    walk = random_walk(count, width, seed)
    lag = min(LAG, count // 2)
    shuffled = gradients[rng.permutation(count)]
    return [
        Criterion(name="mean cosine of adjacent gradients", value=float(adjacent_cosines(gradients).mean()), bar=0.7,
                  sense="above", control=float(adjacent_cosines(shuffled).mean()), control_name="shuffled in time"),
        Criterion(name="mean cosine of adjacent updates", value=float(adjacent_cosines(updates).mean()), bar=0.8,
                  sense="above", control=float(adjacent_cosines(momentum).mean()),
                  control_name="momentum 0.9 on pure noise"),
        Criterion(name="share of gradients in 10 components", value=component_share(gradients), bar=0.7,
                  sense="above", control=component_share(noise), control_name="pure noise of the same shape"),
        Criterion(name="share of updates in 10 components", value=component_share(updates), bar=0.8,
                  sense="above", control=component_share(momentum), control_name="momentum 0.9 on pure noise"),
        Criterion(name="share of positions in 10 components", value=component_share(np.cumsum(updates, axis=0)),
                  bar=0.8, sense="above", control=component_share(walk), control_name="random walk"),
        Criterion(name=f"p of the correlation at lag {lag}", value=order_p(gradients, lag), bar=0.05, sense="below",
                  control=order_p(noise, lag), control_name="pure noise of the same shape"),
    ]  # fmt: skip


def figures(gradients: Array, updates: Array, batch_size: int) -> Mapping[str, Any]:
    """What no bar is held against: the noise scale, cosines by lag, the verdict."""
    cosine = float(adjacent_cosines(gradients).mean())
    noise = np.random.default_rng(0).normal(size=gradients.shape)
    lags = [lag for lag in (1, 2, 5, 10, 20, 50) if lag < len(gradients) // 2]
    return {
        "verdict": verdict(gradients),
        # E cos = 1 / (1 + B_noise / B) for independent batches about a slowly changing mean gradient
        "noise_scale": batch_size * (1 / cosine - 1) if cosine > 0 else None,
        "spectra": {
            "gradients": spectrum(gradients),
            "updates": spectrum(updates),
            "pure noise": spectrum(noise),
            "positions": spectrum(np.cumsum(updates, axis=0)),
            "random walk": spectrum(np.cumsum(noise, axis=0)),
        },
        "cosine_by_lag": {lag: float(lagged_cosines(gradients, lag).mean()) for lag in lags},
        "update_cosine_by_lag": {lag: float(lagged_cosines(updates, lag).mean()) for lag in lags},
    }


def decision(bars: Mapping[str, Criterion]) -> str:
    """On above the bar on raw gradients; from 0.5 shorter horizons, else another optimizer or architecture."""
    bar = bars["mean cosine of adjacent gradients"]
    return "continue" if bar.passed else "refine" if bar.value >= 0.5 else "stop"
