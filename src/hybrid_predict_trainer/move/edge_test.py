"""Where on its line a step ended: still above the bottom, at it, or beyond, and whether the noise lets one see it.

The mean of h = cos(g, u), a step u held against the next gradient g, is negative while the loss still falls at the
end of a step.  Two questions are asked of what was measured:

* Is the mean negative at all?  By an always-valid interval (:mod:`..numerics.sequential`), because it is asked again
  and again.
* Is h of a *single* step negative beyond its own noise?  Where it is, curvature bounds the rate and h says how far
  away the bound is.  Where it takes dozens of steps to see a mean at all, the noise of the gradient bounds the rate,
  and that shows in the loss a run settles at and not in h: at batches of 8 to 16 the mean of h is negative for
  hundreds of steps from a tenth to ten times the best rate (LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import torch
from torch import Tensor

from ..numerics.sequential import Moments, mean_interval
from ..weights import algebra as weights
from ..weights.parameters import Groups
from ..weights.shards import Total, itself

#: |mean| / spread of h from which on the sign shows in single steps.  Measured: 2.5 to 8 at a tenth of the tuned rate
#: with batches of 64 images or 2,048 tokens, 1.0 to 1.7 with batches of 8 to 16 whatever the rate.
VISIBLE = 1.8
#: Added to it for n cosines as a share of SURE / n: few cosines that decide a test are those that happened to agree.
SURE = 4.0
#: Cosines at which an undecided mean is taken for zero.
MAX_COSINES = 24
#: Prior precisions of the effect mean / spread: about 3 is looked for at first, about 1 later.
PRECISION_AT_FIRST, PRECISION_LATER = 0.1, 1.0


@torch.no_grad()
def step_cosines(
    gradients: Sequence[Tensor | None], before: Sequence[Tensor], after: Sequence[Tensor], groups: Groups,
    total: Total = itself,
) -> Tensor:  # fmt: skip
    """cos(g, u) with u = after - before, (1 + G,) on the weights' device: of all weights, then of every group.

    0 where either vanishes.

    Args:
        gradients: One per parameter; None and sparse ones are left out.
        before: Weights before the step.
        after: Weights after it.
        groups: Of the parameters.
        total: Adds up over ranks that hold parts of them.
    """
    device = after[0].device
    wide = weights.accumulate_dtype(device)
    sums = [[torch.zeros(3, dtype=wide, device=device)] for _ in range(groups.num_groups)]  # g'u, |g|^2 and |u|^2
    for g, b, a, row in zip(gradients, before, after, groups.index, strict=True):
        if g is None or g.is_sparse:
            continue
        u = (a - b.to(a.device)).reshape(-1).float()
        flat = g.reshape(-1).float()
        sums[row].append(torch.stack([torch.dot(flat, u), torch.dot(flat, flat), torch.dot(u, u)]).to(device, wide))
    of_group = total(torch.stack([torch.stack(pieces).sum(0) for pieces in sums]))
    dot, g_squared, u_squared = torch.cat([of_group.sum(0, keepdim=True), of_group]).unbind(1)
    size = (g_squared * u_squared).sqrt()
    cosines: Tensor = torch.where(size > 0, dot / size, torch.zeros_like(size))
    return cosines


class Edge(StrEnum):
    """Where steps end."""

    UNKNOWN = "unknown"  # more cosines are wanted
    SHORT = "short"  # above the bottom, seen in single steps
    SHORT_IN_NOISE = "short_in_noise"  # above the bottom on the mean only
    NEAR = "near"  # no difference from the bottom was found
    BEYOND = "beyond"  # on the way up again


def locate(cosines: Moments, alpha: float, *, patient: bool = False) -> Edge:
    """Decide on all cosines since the last decision.

    Args:
        cosines: Of h of as many steps: a patient test may take all of a long run's.
        alpha: Level of the test.
        patient: Wait for a decision however long it takes, instead of calling an undecided mean zero.
    """
    h = mean_interval(cosines, alpha, PRECISION_LATER if patient else PRECISION_AT_FIRST)
    if h.high < 0:
        visible = VISIBLE * (1 + SURE / cosines.num)
        return Edge.SHORT if h.mean < -visible * h.spread else Edge.SHORT_IN_NOISE
    if h.low > 0:
        return Edge.BEYOND
    if cosines.num and not math.isfinite(h.mean):  # a gradient or a step was not finite
        return Edge.NEAR
    return Edge.NEAR if cosines.num >= MAX_COSINES and not patient else Edge.UNKNOWN
