"""What matrix work costs, in forwards of the model, from counts alone: a resumed run is charged the same.

The unit is a multiplication in the forward of a wide network, about 0.05 ns on the machine of the measurements.  Narrow
networks spend most of a forward on calls, not on arithmetic, so a forward counts as its multiplications and a constant
beside them.  ``benchmarks/matrix_price.py`` measures all of it (LOG.md).
"""

from __future__ import annotations

import math

#: Multiplications that the calls of a forward take as long as.
CALLS = 1.1e7
#: Price of a multiplication: in a matrix times its own transpose, in a product of a Jacobian with a vector, in a
#: Cholesky factor, in passes over a dense inverse, and over the pairs of a limited one; the last ones wait for memory.
GRAM, PRODUCT, FACTOR, PASS, PAIRS = 1.1, 2.0, 2.5, 1.6, 8.0


def least_squares(
    rows: int, weights: int, of_product: float, of_matrix: float, *, num_products: int, num_factors: int
) -> float:
    """Forwards that a linearisation's matrices are worth.

    Args:
        rows: R.
        weights: P.
        of_product: Multiplications of a product with the Jacobian, and of a forward.
        of_matrix: Multiplications of the smaller of A A' and A'A; 0 where it was not formed.
        num_products: Products with the Jacobian.
        num_factors: Factorisations of that matrix.
    """
    matrix = PRODUCT * num_products * of_product + GRAM * of_matrix
    matrix += FACTOR * num_factors * min(rows, weights) ** 3 / 6
    return matrix / (CALLS + of_product)


def rows_one_by_one(rows: int, weights: int, at_a_time: int) -> float:
    """Backwards that a Jacobian is worth of which every row takes one of its own, batched."""
    arithmetic = float(rows) * weights
    return math.ceil(rows / at_a_time) + rows * arithmetic / (CALLS + arithmetic)


def dense_steps(num_steps: int, weights: int, samples: int) -> float:
    """Forwards that steps with a dense inverse are worth: H g and a correction of rank 3."""
    return PASS * num_steps * 4 * float(weights) ** 2 / (CALLS + float(weights) * samples)


def limited_steps(num_steps: int, num_pairs: int, weights: int, samples: int) -> float:
    """Forwards that steps of limited memory are worth: two passes over the pairs."""
    return PAIRS * num_steps * 4 * num_pairs * float(weights) / (CALLS + float(weights) * samples)
