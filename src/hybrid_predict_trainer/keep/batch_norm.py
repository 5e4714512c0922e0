"""Running statistics of BatchNorm, estimated anew for the weights as they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .rng import rng_state, set_rng_state


@torch.no_grad()
def reestimate(model: nn.Module, forward: Callable[[Any], object], batches: Iterable[Any]) -> int:
    """Replace the running statistics by the mean over some batches, as ``torch.optim.swa_utils.update_bn`` does.

    Modes, momentum, the other buffers and the random states are left as they were; if a forward raises, the
    statistics too.

    Args:
        model: In any mode.
        forward: Makes one forward of a batch.
        batches: At least one, of the training data.

    Returns:
        The number of modules whose statistics are new.

    Raises:
        ValueError: there is no batch.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return 0
    own = {id(b) for m in norms for b in m.buffers(recurse=False)}
    buffers = [(b, b.clone()) for b in model.buffers()]
    modes = [(m, m.training) for m in model.modules()]
    momenta, random = [m.momentum for m in norms], rng_state()
    done = False
    try:
        model.train()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for the mean over all batches
        waiting = iter(batches)
        first = next(waiting, none := object())
        if first is none:
            raise ValueError("batch statistics cannot be estimated from no batch: pass some of the training data")
        for batch in itertools.chain([first], waiting):
            forward(batch)
        done = True
    finally:
        for buffer, before in buffers:
            if not (done and id(buffer) in own):
                buffer.copy_(before)
        for module, training in modes:
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        set_rng_state(random)
    return len(norms)
