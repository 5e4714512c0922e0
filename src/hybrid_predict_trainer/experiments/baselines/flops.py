"""FLOPs, to price matrix work in forwards.  A multiplication and an addition are two FLOPs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...tasks.base import undisturbed
from ..arms.drive import Experiment


def forward_flops(setup: Experiment, model: nn.Module, seed: int) -> float:
    """FLOPs of one training forward, measured on the first batch; leaves model and random state as they were.

    Attention runs unfused for it: the counter does not know every fused kernel.
    """
    batch = next(iter(setup.task.batches(seed)))
    with undisturbed(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        setup.task.loss_fn(model, batch)
    return float(max(1, counter.get_total_flops()))


def mlp_flops(widths: Sequence[int]) -> int:
    """FLOPs of one input through linear layers of these widths."""
    return sum(2 * a * b for a, b in itertools.pairwise(widths))


def soap_step_flops(shapes: Iterable[Sequence[int]], max_dim: int) -> float:
    """FLOPs of a step of SOAP beyond Adam's, without the eigenbases.

    For a tensor of N weights, a product with a d x d matrix along a dimension d is 2 N d.  Along each dimension of
    at most ``max_dim`` there are four: gradient, momentum and update are rotated, and the statistics G G' updated.
    Vectors are not preconditioned.
    """
    return sum(8.0 * math.prod(s) * sum(d for d in s if d <= max_dim) for s in shapes if len(s) > 1)


def soap_basis_flops(shapes: Iterable[Sequence[int]], max_dim: int) -> float:
    """FLOPs of one renewal of all eigenbases: a d x d product (2 d^3) and a Householder QR with Q (8/3 d^3)."""
    return sum((2 + 8 / 3) * d**3 for s in shapes if len(s) > 1 for d in s if d <= max_dim)


def soap_first_flops(shapes: Iterable[Sequence[int]], max_dim: int) -> float:
    """FLOPs of the first eigenbases: a symmetric eigenproblem with vectors, 9 d^3 (Golub and Van Loan, 8.3)."""
    return sum(9.0 * d**3 for s in shapes if len(s) > 1 for d in s if d <= max_dim)
