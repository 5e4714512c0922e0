"""What the closed form's matrices cost, in forwards, and what is charged for them.

``python benchmarks/matrix_price.py``: per task the CPU time of the residuals' forward and of kernel and factor, their
ratio, and what ``propose/sources/price.py`` makes of the counts; then a step with a dense inverse; one thread, least of
the repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hybrid_predict_trainer.numerics.dense_inverse import DenseInverse
from hybrid_predict_trainer.propose.sources import price
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
    print(f"{'task':14} {'residuals':>9} {'weights':>8} {'fwd ms':>7} {'matrix ms':>10} {'forwards':>9} {'charged':>8}")
    for name in ("pinn-poisson", "oscillator", "regression", "pinn-burgers", "pinn-klein-gordon", "pinn-inverse"):
        task = make_task(name, TaskSettings())
        model, batch = task.build_model(0), next(iter(task.batches(0)))
        assert task.residual_fn is not None
        problem = LeastSquares(task.residual_fn)
        linearizer = Linearizer([p for p in model.parameters() if p.requires_grad], chunk_rows=256, memory_mb=2048)
        point = problem.at(model, batch)
        A = linearizer.jacobian(point.outputs, point.cotangents, check=False)
        form = "kernel" if A.num_rows <= A.num_weights else "weight"

        def solved(A=A, form=form, rho=point.rho) -> object:
            linearized = Linearized(A, form, rank=0, max_iterations=0, seed=0)
            return linearized.move(rho, 1e-3)

        with torch.no_grad():
            forward_s = least_seconds(lambda: problem.at(model, batch))  # noqa: B023
        matrix_s = least_seconds(solved)
        charged = price.least_squares(
            A.num_rows, A.num_weights, float(A.num_products), num_products=1, factorised=True
        )  # fmt: skip
        print(
            f"{name:14} {A.num_rows:9} {A.num_weights:8} {1e3 * forward_s:7.2f} {1e3 * matrix_s:10.2f} "
            f"{matrix_s / forward_s:9.1f} {charged:8.1f}"
        )
    for weights in (1000, 2209, 4897):
        g = torch.randn(weights, dtype=torch.float64)
        inverse = DenseInverse(g, "ssbroyden")
        inverse.learn(-0.1 * g, -g, g, 0.9 * g, 0.1)
        s = -0.1 * inverse.Hg
        step_s = least_seconds(lambda: inverse.learn(s, 2 * s, g, g + 2 * s, 0.1))  # noqa: B023
        print(
            f"dense inverse, {weights} weights: {1e3 * step_s:.2f} ms, "
            f"charged {price.dense_steps(1, weights, 256):.1f} forwards of 256 samples"
        )


if __name__ == "__main__":
    main()
