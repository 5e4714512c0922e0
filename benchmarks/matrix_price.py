"""What a multiplication in the closed form's matrices costs, in multiplications of a forward.

``python benchmarks/matrix_price.py``: per task the CPU time of the residuals' forward and of kernel and factor, each
over the multiplications that ``propose/sources/gauss_newton.py`` counts for it, and their ratio; one thread, least of
the repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hybrid_predict_trainer.propose.sources.gauss_newton import MATRIX_PRICE
from hybrid_predict_trainer.propose.sources.jacobian import Linearizer
from hybrid_predict_trainer.propose.sources.least_squares import LeastSquares
from hybrid_predict_trainer.propose.sources.solve import Linearized
from hybrid_predict_trainer.tasks import TaskSettings, make_task

REPEATS = 20


def least_seconds(work: Callable[[], object]) -> float:
    """CPU time of the fastest repeat."""
    found = []
    for _ in range(REPEATS):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    """Print a line per task."""
    torch.set_num_threads(1)
    print(f"{'task':14} {'residuals':>9} {'weights':>8} {'forward ms':>11} {'matrix ms':>10} {'price':>7}")
    for name in ("pinn-poisson", "oscillator", "regression", "pinn-burgers"):
        task = make_task(name, TaskSettings())
        model, batch = task.build_model(0), next(iter(task.batches(0)))
        assert task.residual_fn is not None
        problem = LeastSquares(task.residual_fn)
        linearizer = Linearizer([p for p in model.parameters() if p.requires_grad], chunk_rows=256, memory_mb=2048)
        point = problem.at(model, batch)
        A = linearizer.jacobian(point.outputs, point.cotangents, check=False)
        form = "kernel" if A.num_rows <= A.num_weights else "weight"
        side = min(A.num_rows, A.num_weights)
        matrix = side * A.num_rows * A.num_weights / 2 + side**3 / 6

        def solved(A=A, form=form, rho=point.rho) -> object:
            linearized = Linearized(A, form, rank=0, max_iterations=0, seed=0)
            return linearized.move(rho, 1e-3)

        forward_s = least_seconds(lambda: problem.at(model, batch))  # noqa: B023
        matrix_s = least_seconds(solved)
        price = (matrix_s / matrix) / (forward_s / max(float(A.num_products), 1.0))
        print(f"{name:14} {A.num_rows:9} {A.num_weights:8} {1e3 * forward_s:11.2f} {1e3 * matrix_s:10.2f} {price:7.3f}")
    print(f"in use: {MATRIX_PRICE:.3f}")


if __name__ == "__main__":
    main()
