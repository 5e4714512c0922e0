"""Which numbers of a training are not finite: what a divergence has reached."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..weights.parameters import optimizer_parameters


def trained_weights_finite(optimizer: Optimizer) -> bool:
    """Whether every weight that is trained is a finite number; of sharded ones the local share."""
    found = [torch.isfinite(t).all() for t in map(_local, optimizer_parameters(optimizer)) if _has_numbers(t)]
    places: dict[torch.device, list[Tensor]] = {}
    for flag in found:
        places.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(flags).all()) for flags in places.values())  # one transfer per device


def not_finite(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """One phrase per kind of number that is not finite: learning rate, weights, optimizer state, buffers.

    Of buffers NaN only: a mask holds infinities on purpose.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    weights = [(names.get(id(p), f"weight {i}"), p) for i, p in enumerate(optimizer_parameters(optimizer))]
    rates = [f"the learning rate of group {i}" for i, g in enumerate(optimizer.param_groups) if not _good_rate(g)]
    bad = [name for name, p in weights if not _is_finite(p)]
    tensors = [(name, key, t) for name, p in weights for key, t in _tensors(optimizer.state.get(p))]
    states = [f"{key} of {name}" for name, key, t in tensors if not _is_finite(t)]
    buffers = [name for name, b in model.named_buffers() if _has_numbers(b) and bool(torch.isnan(_local(b)).any())]
    return [
        *rates[:1],
        *_counted("weights", bad),
        *_counted("optimizer state", states),
        *_counted("buffers", buffers),
    ]


def whereabouts(model: nn.Module, optimizer: Optimizer) -> str:
    """What the weights are after a run of steps that could not be used, as the end of a sentence."""
    bad = not_finite(model, optimizer)
    if not bad:
        return "the weights are those of the last good step"
    return f"NaN or infinity has reached {', '.join(bad)}, which only a checkpoint brings back"


def _counted(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{kind} ({names[0]}{more})"]


def _tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Mapping):
        yield from ((str(key), value) for key, value in state.items() if isinstance(value, Tensor))


def _good_rate(group: Mapping[str, Any]) -> bool:
    rate = group.get("lr")
    return not isinstance(rate, float | int | Tensor) or math.isfinite(float(rate))


def _has_numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _local(tensor: Tensor) -> Tensor:
    """The share of a sharded tensor that this process holds; any other as it is."""
    to_local = getattr(tensor, "to_local", None)
    local: Tensor = tensor.detach() if to_local is None else to_local().detach()
    return local


def _is_finite(tensor: Tensor) -> bool:
    return not _has_numbers(tensor) or bool(torch.isfinite(_local(tensor)).all())
