"""What the closed form's matrices cost, in forwards, and what is charged for them.

``python benchmarks/matrix_price.py``: per task and size the CPU time of the residuals' forward, of kernel, factor and a
product, their ratio, and what ``propose/sources/price.py`` makes of the counts; then steps with a dense inverse and
with a limited one; one thread, least of the repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from hybrid_predict_trainer.numerics.dense_inverse import DenseInverse
from hybrid_predict_trainer.propose.sources import price
from hybrid_predict_trainer.propose.sources.jacobian import Linearizer
from hybrid_predict_trainer.propose.sources.least_squares import LeastSquares
from hybrid_predict_trainer.propose.sources.limited_inverse import LimitedInverse
from hybrid_predict_trainer.propose.sources.solve import Linearized
from hybrid_predict_trainer.tasks import TaskSettings, make_task

TASKS = ("pinn-poisson", "oscillator", "regression", "pinn-burgers", "pinn-klein-gordon", "pinn-inverse")
SIZES = {"": TASKS, **dict.fromkeys(("10k", "50k", "200k"), ("pinn-poisson", "regression", "pinn-burgers"))}


def least_seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """CPU time of the fastest repeat."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def row(name: str, size: str) -> str:
    """Of a task in a size."""
    task = make_task(name, TaskSettings(preset=size) if size else TaskSettings())
    model, batch = task.build_model(0), next(iter(task.batches(0)))
    assert task.residual_fn is not None
    problem = LeastSquares(task.residual_fn)
    linearizer = Linearizer([p for p in model.parameters() if p.requires_grad], chunk_rows=256, memory_mb=2048)
    point = problem.at(model, batch)
    A = linearizer.jacobian(point.outputs, point.cotangents, check=False)
    form = "kernel" if A.num_rows <= A.num_weights else "weight"

    def solved() -> Linearized:
        linearized = Linearized(A, form, rank=0, max_iterations=0, seed=0)  # type: ignore[arg-type]
        linearized.move(point.rho, 1e-3)
        return linearized

    model_ = solved()
    with torch.no_grad():
        forward_s = least_seconds(lambda: problem.at(model, batch))
    matrix_s = least_seconds(solved)
    charged = price.least_squares(A.counts, model_.num_matrix_products, num_products=1, num_factors=1)
    return (
        f"{name + ' ' + size:22} {A.num_rows:9} {A.num_weights:8} {1e3 * forward_s:7.2f} {1e3 * matrix_s:10.2f} "
        f"{matrix_s / forward_s:9.1f} {charged:8.1f}"
    )


def dense_s(weights: int) -> float:
    """CPU time of a step with a dense inverse."""
    g = torch.randn(weights, dtype=torch.float64)
    inverse = DenseInverse(g, "ssbroyden")
    inverse.learn(-0.1 * g, -g, g, 0.9 * g, 0.1)
    s = -0.1 * inverse.Hg
    return least_seconds(lambda: inverse.learn(s, 2 * s, g, g + 2 * s, 0.1))


def limited_s(weights: int, num_pairs: int) -> float:
    """CPU time of a step with an inverse of so many pairs, on a quadratic."""
    x, curvature = torch.randn(weights), torch.rand(weights) + 0.1
    inverse = LimitedInverse(curvature * x, num_pairs, scaled=True)

    def step() -> None:
        nonlocal x
        g, s = curvature * x, -0.1 * inverse.Hg
        x = x + s
        inverse.learn(s, curvature * s, g, curvature * x, 0.1)

    for _ in range(num_pairs):
        step()
    return least_seconds(step)


def main() -> None:
    """Print a line per task and size."""
    torch.set_num_threads(1)
    print(f"{'task':22} {'residuals':>9} {'weights':>8} {'fwd ms':>7} {'matrix ms':>10} {'forwards':>9} {'charged':>8}")
    for size, names in SIZES.items():
        for name in names:
            print(row(name, size), flush=True)
    for weights in (1000, 2209, 4897):
        print(
            f"dense inverse, {weights} weights: {1e3 * dense_s(weights):.2f} ms, "
            f"charged {price.dense_steps(1, weights, 256):.1f} forwards of 256 samples"
        )
    for weights, num_pairs in ((2209, 400), (10151, 400), (50084, 400), (200026, 100)):
        print(
            f"{num_pairs} pairs, {weights} weights: {1e3 * limited_s(weights, num_pairs):.2f} ms, "
            f"charged {price.limited_steps(1, num_pairs, weights, 256):.1f} forwards of 256 samples"
        )


if __name__ == "__main__":
    main()
