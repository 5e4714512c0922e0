"""What matrix work costs, in forwards of the model, from counts alone: a resumed run is charged the same.

Networks small enough for these sources spend most of a forward on calls, not on arithmetic, so a forward counts as its
multiplications and a constant beside them.  ``benchmarks/matrix_price.py`` measures all of it; the charges are within a
factor of two of what it found for 66 to 1,217 residuals and 2,209 to 4,897 weights (LOG.md).
"""

from __future__ import annotations

#: Multiplications that the calls of a forward take as long as.
CALLS = 3.2e6
#: Price of a multiplication in those of a forward: in a matrix times its own transpose and in products with it, in a
#: Cholesky factor, and in passes over a dense inverse, which wait for memory.
GRAM, FACTOR, PASS = 0.32, 0.9, 2.0


def least_squares(rows: int, weights: int, of_forward: float, *, num_products: int, factorised: bool) -> float:
    """Forwards that a linearisation's matrices are worth.

    Args:
        rows: R.
        weights: P.
        of_forward: Multiplications of a product with the Jacobian, and of a forward.
        num_products: Such products.
        factorised: The smaller matrix was formed and factorised.
    """
    side = min(rows, weights)
    matrix = GRAM * num_products * of_forward
    if factorised:
        matrix += GRAM * side * rows * weights / 2 + FACTOR * side**3 / 6
    return matrix / (CALLS + of_forward)


def dense_steps(num_steps: int, weights: int, samples: int) -> float:
    """Forwards that steps with a dense inverse are worth: H g and a correction of rank 3."""
    return PASS * num_steps * 4 * float(weights) ** 2 / (CALLS + float(weights) * samples)


def limited_steps(num_steps: int, num_pairs: int, weights: int, samples: int) -> float:
    """Forwards that steps of limited memory are worth: two passes over the pairs."""
    return PASS * num_steps * 4 * num_pairs * float(weights) / (CALLS + float(weights) * samples)
