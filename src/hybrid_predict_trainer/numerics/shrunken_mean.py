"""Means of noisy windows, shrunk by what the window itself says of its noise.

Under small batches and in reinforcement learning much of what a window of steps has gone is noise, and a displacement
that goes on in its direction multiplies that noise.  The window is cut into chunks; their scatter says how much of the
mean is noise, and the mean of a tensor is multiplied by the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Steps that a window has to have at least, and the share of it that may be gone on for at most: what is gone on for
#: has to be little beside what the direction was averaged over.
LEAST_WINDOW, MOST_SHARE = 40, 1 / 4


def shrunken_mean(chunks: Tensor) -> Tensor:
    """Mean over chunks times the positive part of one minus the share of noise in its square (James and Stein 1961).

    With K chunks the expected square of the mean is that of the drift plus the variance of a chunk over K, summed over
    entries; the latter is estimated from the scatter of the chunks.  One factor serves for the whole tensor.

    Args:
        chunks: (K, ...) displacements of as many equally long chunks, K at least 2, in units of the weights.

    Returns:
        (...) displacement of a chunk; zeros where there is nothing but noise.

    Raises:
        ValueError: there are fewer than two chunks.
    """
    if chunks.dim() == 0 or len(chunks) < 2:
        raise ValueError(
            f"at least two chunks are needed to tell drift from noise, and there are {tuple(chunks.shape)}"
        )
    mean = chunks.mean(dim=0)
    noise = (chunks - mean).square().sum() / ((len(chunks) - 1) * len(chunks))
    square = mean.square().sum()
    if not square > 0:
        return torch.zeros_like(mean)
    return mean * (1 - noise / square).clamp(min=0)


def shrunken_step(chunks: Sequence[Tensor], *, chunk_steps: int, horizon: int) -> Tensor:
    """Displacement of ``horizon`` further steps along a window, shrunk by the scatter of its chunks.

    Args:
        chunks: K displacements of one tensor, each over ``chunk_steps`` steps.
        chunk_steps: Steps of a chunk.
        horizon: Y, at most a quarter of the window.

    Raises:
        ValueError: the window has fewer than 40 steps, or the horizon is more than a quarter of it.
    """
    window = chunk_steps * len(chunks)
    if window < LEAST_WINDOW:
        raise ValueError(f"a window of {window} steps is too short: take at least {LEAST_WINDOW}")
    if not 0 < horizon <= MOST_SHARE * window:
        raise ValueError(
            f"horizon = {horizon} must be at least 1 and at most a quarter of the window of {window} steps"
        )
    return shrunken_mean(torch.stack(list(chunks))) * (horizon / chunk_steps)


def factors_of(product: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the best rank-r approximation of ``b @ a + product`` (Eckart and Young 1936), balanced.

    A jump of low-rank adapters goes along the product of their factors: along the factors themselves it has a term of
    second order, which ruins a trained adapter.

    Args:
        product: (m, n) displacement of the product.
        b: (m, r) factor.
        a: (r, n) factor.

    Returns:
        New factors of the shapes of ``b`` and ``a``, in their dtypes.
    """
    rank = a.shape[0]
    u, s, v = torch.linalg.svd(b.double() @ a.double() + product.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(b.dtype), (root[:, None] * v[:rank]).to(a.dtype)


def importance_weighted_gain(rewards: Tensor, log_ratios: Tensor, group: int) -> Tensor:
    """Per sample, what a move of the weights would add to the expected reward, from rollouts that exist anyway.

    (r - mean of the group's other rewards) (pi_new / pi_old - 1): its mean estimates the gain without bias where the
    rollouts are the old policy's; no sample is generated for it.  Its variance grows
    with the distance of the two policies.

    Args:
        rewards: (N,) of samples, groups of the same prompt one after the other.
        log_ratios: (N,) log pi_new - log pi_old of whole answers, nats.
        group: Samples of a prompt, at least 2; divides N.

    Raises:
        ValueError: the shapes do not fit.
    """
    if rewards.shape != log_ratios.shape or rewards.dim() != 1 or group < 2 or len(rewards) % group:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and log_ratios {tuple(log_ratios.shape)} must have the same shape (N,), "
            f"and group = {group} be at least 2 and divide N"
        )
    grouped = rewards.view(-1, group)
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).flatten() * torch.expm1(log_ratios)
