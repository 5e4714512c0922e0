r"""The law: the loss of a run as a function of the learning rates of all its steps.

With u_n the rate of step n over the largest rate of the run, S_n = u_1 + ... + u_n the progress, x = S_n / 10,000,

    L(n) = L0 + A x^-a + b (S_n / S_0)^-2 - r a A x^-m sum_k (u_{k-1}^p - u_k^p) G(S_n - S_k)
    G(s) = [1 - (1 + C s)^-c] / [1 - (1 + C 5000)^-c]

It is a multi-power law (Luo et al., ICLR 2025, arXiv 2503.12811, equation 2: a power law of the summed rate, and a
sum over the drops of the rate), changed in three places, each because it transfers better between model sizes on
published curves (docs/forecast.md has the figures):

* a drop counts as the difference of u^p, not of u with a rate-dependent speed: the loss that noise causes falls with a
  power of the rate, and a rate of zero is no singularity;
* what lowering the rate gains is measured in units of the slope of the power law, dL/dlnS = -a A x^-a at x = 1: one
  number r of about 1 serves models whose losses and slopes differ;
* the first steps after the warm-up have a term of their own, b, so that they do not bend the power law.

S_0 is the progress where the curve begins that is fitted.  Rates that rise again after it are drops of negative size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..records import ConfigError
from .curve import Array

#: Names and order of the law's parameters, and where they stand in a vector of them.
NAMES = (
    "floor", "ln_scale", "ln_decay", "ln_gain", "ln_speed", "ln_tail", "rate_power", "gain_decay", "transient"
)  # fmt: skip
FLOOR, SCALE, DECAY, GAIN, SPEED, TAIL, RATE_POWER, GAIN_DECAY, TRANSIENT = range(len(NAMES))
#: Parameters that are alike in models of one kind (the transient as a share of the first loss); the others are a run's.
SHAPE = (DECAY, GAIN, SPEED, TAIL, RATE_POWER, GAIN_DECAY, TRANSIENT)

#: Progress at which scale and gain are told, and after how much of it a drop's gain is.
REFERENCE, SETTLED = 1e4, 5e3
#: Bound of logarithms on the way of a fit: a step of it may try anything.
LARGEST = 3.0
#: Groups that the drops of a schedule are gathered into.
MAX_DROPS = 96
#: Share of a run that is left out at its start, however short the warm-up: the law is one of what follows.
EARLY = 0.02
#: A rate this near the largest one counts as the largest.
NEAR_PEAK = 0.999


@dataclass(frozen=True, slots=True)
class Plan:
    """The learning rates of a run, brought into the form that the law needs.

    Attributes:
        progress: (T + 1,) summed rate after each step in units of the largest, 0 before the first.
        warmup: steps until the rate first reaches its peak.
        drops_at: (K,) progress at the drops of the rate, gathered into at most :data:`MAX_DROPS` groups.
        before, after: (K,) rates around each, over the peak.
        peak: the largest rate.
    """

    progress: Array
    warmup: int
    drops_at: Array
    before: Array
    after: Array
    peak: float

    @staticmethod
    def of(rates: Sequence[float] | Array) -> Plan:
        """From the rates of steps 1 to T, (T,), each at least 0.

        Raises:
            ConfigError: no rate, none above 0, or one that is no number or negative.
        """
        rate = np.asarray(rates, dtype=np.float64)
        if rate.ndim != 1 or rate.size == 0:
            raise ConfigError("a forecast needs the planned learning rate of every step of the run")
        if not np.isfinite(rate).all() or (rate < 0).any():
            raise ConfigError("a planned learning rate is negative or no number")
        peak = float(rate.max())
        if peak == 0.0:
            raise ConfigError("all planned learning rates are 0: nothing would be learnt")
        u = rate / peak
        progress = np.concatenate([[0.0], np.cumsum(u)])
        first = int(np.argmax(u >= NEAR_PEAK))
        drops = u[first:-1] - u[first + 1 :]
        at = np.flatnonzero(np.abs(drops) > 1e-12)
        groups = _gathered(drops[at])
        members = [at[groups == g] for g in np.unique(groups)]
        weights = [np.abs(drops[m]) for m in members]
        where = [float(np.average(progress[first + 1 + m], weights=w)) for m, w in zip(members, weights, strict=True)]
        return Plan(
            progress=progress, warmup=first + 1, peak=peak, drops_at=np.array(where),
            before=np.array([u[first + m[0]] for m in members]),
            after=np.array([u[first + m[-1] + 1] for m in members]),
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """T."""
        return len(self.progress) - 1

    @property
    def first(self) -> int:
        """The first step that the law is meant for."""
        return max(self.warmup, math.ceil(EARLY * self.steps))

    def at(self, steps: Array) -> Array:
        """Progress after each of the steps, which need not be whole."""
        found: Array = np.interp(steps, np.arange(len(self.progress)), self.progress)
        return found


def _gathered(drops: Array) -> Array:
    """A group for each drop, so that each group holds an equal part of the way that the rate goes."""
    if len(drops) <= MAX_DROPS:
        every: Array = np.arange(len(drops), dtype=np.float64)
        return every
    way = np.cumsum(np.abs(drops))
    turned = np.cumsum(np.concatenate([[0.0], np.sign(drops[1:]) != np.sign(drops[:-1])]))
    found: Array = np.floor((MAX_DROPS - 1e-9) * way / way[-1]) + turned * MAX_DROPS
    return found


def losses(theta: Array, plan: Plan, steps: Array, start: float) -> Array:
    """L at steps after the warm-up.

    Args:
        theta: (9,) parameters in the order of :data:`NAMES`.
        plan: Of the run.
        steps: (n,).
        start: S_0, above 0.

    Returns:
        (n,).
    """
    progress = np.maximum(plan.at(steps), 1e-9)
    x = progress / REFERENCE
    decay, scale = math.exp(min(theta[DECAY], LARGEST)), math.exp(min(theta[SCALE], 30 * LARGEST))
    found: Array = theta[FLOOR] + scale * x**-decay + theta[TRANSIENT] * (progress / start) ** -2
    if len(plan.drops_at):
        sizes = plan.before ** theta[RATE_POWER] - plan.after ** theta[RATE_POWER]
        gain = math.exp(min(theta[GAIN] + theta[DECAY] + theta[SCALE], 30 * LARGEST))
        found = found - gain * x ** -min(theta[GAIN_DECAY], LARGEST) * (settled(theta, plan, progress) @ sizes)
    return found


def settled(theta: Array, plan: Plan, progress: Array) -> Array:
    """G: the share of each drop's gain that is there at each progress, (n, K); 0 before the drop."""
    speed, tail = math.exp(theta[SPEED]), math.exp(theta[TAIL])
    since = np.maximum(progress[:, None] - plan.drops_at, 0.0)
    full = -math.expm1(-tail * math.log1p(SETTLED * speed))
    found: Array = -np.expm1(-tail * np.log1p(speed * since)) / full
    return found
