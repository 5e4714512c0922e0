"""What matrix work costs, in forwards of the model, from counts alone: a resumed run is charged the same.

The unit is a multiplication in the forward of a wide network, about 0.05 ns on the machine of the measurements.  Narrow
networks spend most of a forward on calls and on their units' functions, so a forward counts as its multiplications, its
units and a constant.  ``benchmarks/matrix_price.py`` measures all of it (LOG.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Multiplications that the calls of a forward take as long as, those of a matrix and its moves, and a unit's function.
CALLS, MATRIX_CALLS, UNIT = 1.1e7, 3e7, 50.0
#: Price of a multiplication: in a matrix times its own transpose, in a product of a Jacobian with a vector, in a
#: Cholesky factor, in passes over a dense inverse, and over the pairs of a limited one; the last ones wait for memory.
GRAM, PRODUCT, FACTOR, PASS, PAIRS = 1.1, 2.0, 2.5, 1.6, 8.0


@dataclass(frozen=True, slots=True)
class Counts:
    """What is known of a Jacobian, and what its matrices take, in multiplications.

    Attributes:
        num_rows, num_weights: R and P.
        num_products: Of a product with a vector, and of a forward.
        num_gram_products: Of A A'.
        num_normal_products: Of A'A.
        num_units: Outputs of layers in a forward, as far as they are known.
        double: The model is in float64, in which a multiplication takes twice as long; matrices are in any case.
    """

    num_rows: int
    num_weights: int
    num_products: float
    num_gram_products: float
    num_normal_products: float
    num_units: float = 0.0
    double: bool = False


def least_squares(counts: Counts, of_matrix: float, *, num_products: float, num_factors: int) -> float:
    """Forwards that a linearisation's matrices are worth.

    Args:
        counts: What is known of the Jacobian.
        of_matrix: Multiplications of the smaller of A A' and A'A; 0 where it was not formed.
        num_products: Products with the Jacobian.
        num_factors: Factorisations of that matrix.
    """
    matrix = MATRIX_CALLS + PRODUCT * num_products * counts.num_products + GRAM * of_matrix
    matrix += FACTOR * num_factors * min(counts.num_rows, counts.num_weights) ** 3 / 6
    return matrix / (CALLS + (1 + counts.double) * (counts.num_products + UNIT * counts.num_units))


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
