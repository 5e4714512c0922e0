"""Sharded parameters (``fully_shard``): this rank's part of each, as a plain tensor.

Weights, gradients and optimizer states of FSDP2 are DTensors: every rank holds some rows.  All that is done to weights
is done to each rank's own rows, by views that share their memory; only numbers that are sums over all weights (inner
products, norms) are added up over the ranks.

What is written to a shard is seen by a forward only if the whole weights, which FSDP gathers for a forward, are not
still there from the one before: the root module keeps them.  Who has made a forward lets them go
(:meth:`.Subject.reshard`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .algebra import Tensors, gradients, norms, on_host
from .real_views import ParameterView, inner

#: What each rank has summed over its own part -> the sum over all ranks.
Total = Callable[[Tensor], Tensor]


class LocalShard(ParameterView):
    """This rank's part of a sharded parameter; without numbers where it has none."""

    _total: Total

    @staticmethod
    def of(parameter: Tensor, total: Total) -> LocalShard:
        """The view of ``parameter``, a DTensor."""
        view: LocalShard = local(parameter).detach().as_subclass(LocalShard)
        view.base = parameter
        view._spread(total)
        return view

    def _spread(self, total: Total) -> None:
        self._total = total

    @property
    def total(self) -> Total:
        """Adds up over the ranks that hold the other parts."""
        return self._total

    def _seen(self, tensor: Tensor) -> Tensor:
        return local(tensor).detach()

    def follow(self) -> None:
        """Look at the parameter's storage where that was replaced; a part without numbers has none."""
        if self.numel():
            super().follow()


_PLAIN = {Tensor}


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; told by its name, because importing the class would import half of torch."""
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter):
        return False
    return any(k.__name__ == "DTensor" and k.__module__.startswith("torch.distributed") for k in kind.__mro__)


def local(tensor: Tensor) -> Tensor:
    """The plain tensor with the numbers: this rank's part of a DTensor, what a wrapper wraps; any other one itself."""
    if not is_sharded(tensor):
        return inner(tensor)
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return part


def local_gradients(parameters: Sequence[Tensor]) -> Tensors:
    """As :func:`.algebra.gradients`, of sharded ones this rank's part; the values of a sparse one."""
    found = gradients(parameters)
    return found if set(map(type, found)) == _PLAIN else [local(g) for g in found]


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter, gathered from the ranks, which all have to come here; any other tensor itself."""
    base = tensor.base if isinstance(tensor, LocalShard) else tensor
    if not is_sharded(base):
        return tensor
    full: Tensor = base.detach().full_tensor()  # type: ignore[attr-defined]
    return full


def like_shard(part: Tensor, pattern: Tensor) -> Tensor:
    """A DTensor of this rank's ``part``, spread over the ranks as ``pattern`` is."""
    kind: Any = type(pattern)
    spec: Any = pattern
    made: Tensor = kind.from_local(
        part, spec.device_mesh, spec.placements, run_check=False, shape=pattern.shape, stride=pattern.stride()
    )
    return made


def size_of(parameter: Tensor) -> int:
    """Number of weights of a parameter, on all ranks together."""
    return parameter.base.numel() if isinstance(parameter, LocalShard) else parameter.numel()


def total_over(parameters: Sequence[Tensor]) -> Total:
    """What adds up sums over these parameters: the identity where every rank has all of them."""
    return next((p.total for p in parameters if isinstance(p, LocalShard)), itself)


def itself(values: Tensor) -> Tensor:
    """The total where every rank holds all weights."""
    return values


def rms_over(parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[float]:
    """Root mean square of one tensor per parameter, over all ranks.

    Args:
        parameters: Whose parts the tensors are of.
        tensors: One per parameter.
    """
    squares = total_over(parameters)(on_host(norms(tensors)).square())
    return [math.sqrt(s / max(size_of(p), 1)) for s, p in zip(squares.tolist(), parameters, strict=True)]


def local_cut(parameter: Tensor, cut: Any) -> Any:
    """Slices of a whole parameter as slices of this rank's part of it.

    Args:
        parameter: A part or a whole one.
        cut: ``...``, a slice, or a tuple of slices, each with a start and a stop, or of everything.
    """
    if not isinstance(parameter, LocalShard) or cut is Ellipsis:
        return cut
    placements: Any = parameter.base.placements  # type: ignore[attr-defined]
    (placement,) = placements
    at, size = int(placement.dim), parameter.base.shape[placement.dim]
    first = _first_row(parameter.base)
    slices = [*(cut if isinstance(cut, tuple) else (cut,))]
    if at >= len(slices) or slices[at] == slice(None):
        return cut
    start, stop, _ = slices[at].indices(size)
    count = parameter.shape[at]
    slices[at] = slice(min(max(start - first, 0), count), min(max(stop - first, 0), count))
    return tuple(slices)


def local_rows(tensor: Tensor, pattern: Tensor) -> Tensor:
    """This rank's part of a whole tensor, as ``pattern``, a DTensor of the same shape, is spread."""
    spec: Any = pattern
    (placement,) = spec.placements
    count = local(pattern).shape[placement.dim]
    return tensor.narrow(placement.dim, min(_first_row(pattern), tensor.shape[placement.dim] - count), count).clone()


def _first_row(base: Any) -> int:
    """Where this rank's rows begin: torch cuts chunks of equal size, and the last ones have what is left."""
    (placement,) = base.placements
    chunk = -(-base.shape[placement.dim] // base.device_mesh.size())
    return int(min(base.device_mesh.get_local_rank() * chunk, base.shape[placement.dim]))
