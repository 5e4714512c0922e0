"""Signs of a straight trajectory, beside what the same steps give with random signs.

The share of the first principal direction and the fit of its coefficient on the step are published as evidence that
training is a line (references and figures in docs/benchmarks.md).  A walk without any drift has both: of Brownian
motion the first direction holds 81 %.  What seeds share is drift; what they do not share is noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: Steps of windows whose neighbours are compared.
WINDOWS = (5, 10, 20, 50)


def straightness(path: Tensor) -> dict[str, float]:
    """How much a trajectory looks like a line.

    Args:
        path: (T+1, P) weights before and after every step.

    Returns:
        ``rank_1``: share of the squared displacements from the start in their first direction; ``r2``: of its
        coefficient on the step; ``r2_weights``: median over weights of the same; ``cos_N``: of neighbouring windows.
    """
    moved = (path[1:] - path[0]).double()
    values, vectors = torch.linalg.eigh(moved @ moved.T)
    clock = torch.arange(1.0, len(moved) + 1, dtype=torch.float64)
    centred = moved - moved.mean(0)
    trained = centred.square().sum(0) > 0
    found = {
        "rank_1": (values[-1] / values.sum()).item(),
        "r2": _r2(clock, vectors[:, -1:]).item(),
        "r2_weights": _r2(clock, moved[:, trained]).median().item(),
    }
    for size in WINDOWS:
        if 2 * size < len(path):
            windows = path[size::size] - path[:-size:size][: len(path[size::size])]
            unit = windows / windows.norm(dim=1, keepdim=True)
            found[f"cos_{size}"] = (unit[1:] * unit[:-1]).sum(1).mean().item()
    return found


def _r2(clock: Tensor, columns: Tensor) -> Tensor:
    """(C,) share of every column's variance that a straight line in the clock explains."""
    x, y = clock - clock.mean(), columns - columns.mean(0)
    return (x @ y).square() / (x.square().sum() * y.square().sum(0))


def with_random_signs(path: Tensor, generator: torch.Generator) -> Tensor:
    """The same steps, each forwards or backwards by a coin: a trajectory of the same lengths without drift."""
    signs = torch.randint(0, 2, (len(path) - 1, 1), generator=generator) * 2.0 - 1
    steps = (path[1:] - path[:-1]) * signs
    return torch.cat([path[:1], path[0] + steps.cumsum(0)])


def shared_drift(windows: Sequence[Mapping[int, Tensor]]) -> dict[int, float]:
    """Share of a window's squared displacement that other seeds make as well, by the step that the window ends with.

    Args:
        windows: Of every seed, displacements (P,) by step; at least two seeds.
    """
    found = {}
    for step in sorted(set.intersection(*(set(w) for w in windows))):
        d = torch.stack([w[step] for w in windows])
        gram = d @ d.T
        n = len(d)
        mean_square = gram.diag().mean()
        found[step] = ((gram.sum() - gram.diag().sum()) / (n * (n - 1)) / mean_square).item()
    return found
