"""Quantiles of Student's t and of the normal distribution, and an upper bound of a mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

# One-sided 95 % quantiles of Student's t for 1 .. 30 degrees of freedom (NIST/SEMATECH e-Handbook
# of Statistical Methods, section 1.3.6.7.2); other levels are scaled from the normal quantile.
_T95 = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753,
    1.746, 1.740, 1.734, 1.729, 1.725, 1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697,
)  # fmt: skip


def t_quantile(level: float, freedom: int) -> float:
    """One-sided upper quantile of Student's t, exact in the table at level 0.05.

    Other levels use the Cornish-Fisher expansion of the normal quantile (Abramowitz & Stegun
    26.7.5), good to 1 % from 4 degrees of freedom on at levels from 0.01; 1 and 2 degrees are closed forms.
    """
    if freedom < 1:
        return math.inf
    if math.isclose(level, 0.05) and freedom <= len(_T95):
        return _T95[freedom - 1]
    if freedom == 1:
        return 1 / math.tan(math.pi * level)
    if freedom == 2:
        return (1 - 2 * level) / math.sqrt(2 * level * (1 - level))
    z = normal_quantile(level)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3


@lru_cache(maxsize=64)
def normal_quantile(level: float) -> float:
    """Upper one-sided quantile of the standard normal by bisection on erfc.

    ``statistics.NormalDist().inv_cdf`` differs in the last bit at most levels, and a run would decide by other bits.
    """
    low, high = -10.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.erfc(middle / math.sqrt(2)) > level else (low, middle)
    return (low + high) / 2


def upper_bound(differences: Sequence[float], level: float) -> float:
    """Upper one-sided confidence bound of the mean paired difference; infinite below two pairs."""
    n = len(differences)
    if n < 2:
        return math.inf
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return mean + t_quantile(level, n - 1) * math.sqrt(variance / n)
