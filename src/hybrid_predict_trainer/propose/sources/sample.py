"""Some of the rows of a least-squares problem, with weights that make up for those left out.

Early in training, and at a large damping, a move has far fewer directions than there are residuals, and a part of them
tells where it leads as well as all do.  The kernel of a part costs the square of its share.

Rows are drawn systematically, with probabilities that grow with what they weigh in the kernel and in the loss (Drineas,
Mahoney & Muthukrishnan, SIAM J. Matrix Anal. Appl. 30, 2008, on sampling by importance; Madow, Ann. Math. Stat. 20,
1949, on systematic samples): neighbours on a grid stand for one another, and a few boundary points with a large weight
are always there.

Letters: ``R`` rows, ``n`` of them in the sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: What a sum of probabilities may be off: whole numbers are passed where they are reached.
ROUNDING = 1e-9
#: Distance of the starting points of successive samples, in rows of weight one: never the same rows in turn.
GOLDEN = 0.6180339887498949
#: Passes in which probabilities above one are capped.
CAPPING = 8


def probabilities(squares: Tensor, rho: Tensor, number: int) -> Tensor:
    """(R,) probability of each row to be in a sample of about ``number`` rows.

    A third is spread evenly, a third goes by the share of the kernel's trace, a third by that of the loss.

    Args:
        squares: (R,) squared norms of the rows of the Jacobian.
        rho: (R,) residuals.
        number: n, from 1 to R.
    """
    rows = len(rho)
    weight = torch.full_like(rho, 1 / rows)
    for part in (squares, rho.square()):
        total = float(part.sum())
        weight = weight + (part / total if total > 0 else 1 / rows)
    chance = (number / 3 * weight).clamp(max=1.0)
    for _ in range(CAPPING):  # what was cut off goes to the others
        free = chance < 1.0
        left, mass = number - int((~free).sum()), float(weight[free].sum())
        if left <= 0 or mass <= 0:
            break
        spread = torch.where(free, (weight * (left / mass)).clamp(max=1.0), chance)
        if torch.equal(spread, chance):
            break
        chance = spread
    return chance


def systematic(chance: Tensor, start: float) -> Tensor:
    """(n,) rows, in order: those at which the sum of the probabilities passes ``start`` plus a whole number.

    Args:
        chance: (R,) from 0 to 1.
        start: From 0 to 1.
    """
    passed = torch.floor(chance.cumsum(0) - start + ROUNDING)
    before = torch.cat([passed.new_tensor([-1.0]), passed[:-1]])
    return (passed > before).nonzero()[:, 0]
