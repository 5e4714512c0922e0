"""Weight space: which parameters are predicted, their groups by role, and in-place algebra.

Everything here works on lists of tensors, one entry per parameter; the model is never flattened
into one vector.  Shape letters: ``G`` groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from itertools import accumulate
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Tensors = list[Tensor]
#: One tensor per parameter, which nobody adds to.
Move = Sequence[Tensor]
_set_grad_enabled = torch._C._set_grad_enabled
P = ParamSpec("P")
T = TypeVar("T")


def without_graph(function: Callable[P, T]) -> Callable[P, T]:
    """``torch.no_grad`` around a function, or nothing where there is no graph already: a small step comes by dozens.

    Torch's own decorator makes an object at every call, which takes as long as two additions of small tensors.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        try:  # twice: where switching back is interrupted it is done again
            try:
                _set_grad_enabled(False)
                return function(*args, **kwargs)
            finally:
                _set_grad_enabled(True)
        except BaseException:
            _set_grad_enabled(True)
            raise

    return wrapped


class Together(Sequence[Tensor]):
    """One tensor per parameter, all of them views of one vector: where torch's calls cost more than their arithmetic.

    The views are made when one is asked for: eight of them take as long as twenty additions of the vectors.

    Attributes:
        vector: All numbers, parameter after parameter.
        lengths: How many of them each parameter has.
    """

    __slots__ = ("_like", "_moved", "_pieces", "lengths", "vector")

    def __init__(self, vector: Tensor, like: Sequence[Tensor], lengths: Sequence[int] | None = None) -> None:
        """Cut a vector.

        Args:
            vector: As many numbers as the tensors of ``like``.
            like: Their shapes.
            lengths: Their numbers, where these are known.
        """
        self.vector = vector
        self.lengths = [t.numel() for t in like] if lengths is None else lengths
        self._like = like
        self._pieces: Tensors | None = None
        self._moved: Together | None = None  # memory to compute in, made when it is asked for

    @property
    def pieces(self) -> Tensors:
        """The views."""
        if self._pieces is None:
            self._pieces = list(torch._C._nn.unflatten_dense_tensors(self.vector, list(self._like)))
        return self._pieces

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether plain tensors are of the shapes and the kind that these views have."""
        dtype, device = self.vector.dtype, self.vector.device
        return len(tensors) == len(self) and all(
            t.shape == p.shape and t.dtype is dtype and t.device == device and type(t) in (nn.Parameter, Tensor)
            for t, p in zip(tensors, self.pieces, strict=True)
        )

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        """A view, or a list of some."""
        return self.pieces[index]

    def __iter__(self) -> Iterator[Tensor]:
        """The views, made when the first one is asked for."""
        yield from self.pieces

    def plus(self, delta: Tensor, scale: float) -> Together:
        """``self + scale * delta`` in this one's dtype, in memory that the next call writes over.

        Args:
            delta: As many numbers, in any type.
            scale: Of the delta.
        """
        if self._moved is None:
            self._moved = Together(torch.empty_like(self.vector), self.pieces, self.lengths)
        torch.add(self.vector, delta, alpha=scale, out=self._moved.vector)
        return self._moved


#: Up to so many weights a call of torch costs more than its arithmetic.
SMALL = 1 << 16
#: Above so many weights a copy of all of them is something to do without.
LARGE = 1 << 20
#: Types whose spacing is so wide that a step of training may be below it.
HALF = frozenset({torch.float16, torch.bfloat16})
_OF_NUMPY = frozenset({torch.float32, torch.float64})
#: Devices that cannot hold float64.
WITHOUT_FLOAT64 = frozenset({"mps"})


def clone(tensors: Iterable[Tensor]) -> Tensors:
    """Detached copies with the same dtype, device and layout."""
    return [t.detach().clone() for t in tensors]


@without_graph
def copied_together(tensors: Sequence[Tensor], old: Sequence[Tensor] = ()) -> Sequence[Tensor]:
    """:func:`clone`, in one vector where the tensors are few numbers of one plain kind.

    Args:
        tensors: To copy.
        old: A copy of them that is needed no more: its memory is written over if it fits.
    """
    if isinstance(old, Together) and old.fits(tensors):
        torch._foreach_copy_(old.pieces, list(tensors))
        return old
    found = [t.detach() for t in tensors]
    one_kind = len(found) > 1 and len({(t.dtype, t.device, type(t)) for t in found}) == 1 and type(found[0]) is Tensor
    if not one_kind or found[0].dtype in HALF or sum(map(Tensor.numel, found)) > SMALL:
        return clone(found)
    return Together(torch._C._nn.flatten_dense_tensors(found), found)


@without_graph
def copy_(destination: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """``destination <- source`` in place, keeping storages (never rebinds ``.data``)."""
    torch._foreach_copy_(list(destination), list(source))
    _forget_casts()


def sampled(tensor: Tensor) -> Tensor:
    """Every 17th number of a tensor, as a flat view where it is dense; small tensors as they are."""
    return tensor if tensor.numel() <= SMALL // 4 else tensor.reshape(-1)[::17]


def like_sampled(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor``, or its sample where ``other`` is one."""
    return tensor if tensor.shape == other.shape else sampled(tensor)


@without_graph
def move_(
    destination: Sequence[Tensor], origin: Sequence[Tensor], delta: Sequence[Tensor], scale: float, seed: int = 0
) -> None:
    """``destination <- origin + scale * delta`` in place, summed in the wider of the two dtypes.

    Half-precision weights are rounded stochastically (arXiv 1502.02551): a delta below half their spacing, which
    rounding to the nearest would lose in every single weight, is made by the right share of them.

    Args:
        destination: Written to.
        origin: Shapes as destination.
        delta: Likewise, in any type.
        scale: Of the delta.
        seed: Of the rounding; the same one makes the same move.  The global random state is left alone.
    """
    if isinstance(origin, Together) and isinstance(delta, Together) and origin.vector.device == delta.vector.device:
        torch._foreach_copy_(list(destination), origin.plus(delta.vector, scale).pieces)
        _forget_casts()
        return
    together = len({t.device for t in (*destination, *origin, *delta)}) == 1
    if together and not any(p.dtype in HALF for p in destination):  # one call, which widens as the loop does
        copy_(destination, torch._foreach_add(list(origin), list(delta), alpha=scale))
        return
    for i, (p, o, d) in enumerate(zip(destination, origin, delta, strict=True)):
        narrow = p.dtype in HALF
        wide = torch.float32 if narrow and d.dtype in HALF else torch.promote_types(o.dtype, d.dtype)
        moved = torch.add(o.to(wide), d.to(device=o.device, dtype=wide), alpha=scale)
        p.copy_(_dithered(moved, p.dtype, seed + 1009 * i) if narrow else moved)
    _forget_casts()


def _dithered(value: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """``value`` rounded to one of its two neighbours in ``dtype``, the nearer it is the more likely: right on average.

    What is a number of that type stays as it is.
    """
    generator = torch.Generator(device=value.device).manual_seed(seed)
    chance = torch.rand(value.shape, generator=generator, device=value.device, dtype=torch.float32)
    nearest = value.to(dtype)
    missed = value - nearest.to(value.dtype)
    # bits of such a number, read as an integer, count its magnitudes
    outwards = torch.where(missed * value.sign() > 0, 1, -1).to(torch.int16)
    other = (nearest.view(torch.int16) + outwards).view(dtype)
    gap = other.to(value.dtype) - nearest.to(value.dtype)
    return torch.where(chance * gap.abs() < missed.abs(), other, nearest)


def _forget_casts() -> None:
    """Drop the half-precision copies of weights that an autocast around the caller's loop keeps.

    They are made once per region and not renewed when a weight changes in place: every loss the gate
    measured would be that of the weights before the move.
    """
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()


@without_graph
def gradients(parameters: Sequence[Tensor]) -> Tensors:
    """Gradients that exist, in parameter order; of sparse ones their values."""
    found = [grad for p in parameters if (grad := p.grad) is not None]
    if not any(g.is_sparse for g in found):
        return found
    return [g.coalesce().values() if g.is_sparse else g for g in found]


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """What long sums are taken in on a device: float64, or float32 where there is none."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


@without_graph
def on_host(tensors: Sequence[Tensor]) -> Tensor:
    """(n, ...) small tensors of one shape, float64 in host memory, in their order; one transfer per device."""
    places: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        places.setdefault(t.device, []).append(i)
    # widened only there: not every device has float64
    fetched = [torch.stack([tensors[i] for i in where]).cpu().double() for where in places.values()]
    if len(fetched) < 2:
        return fetched[0] if fetched else torch.zeros(0, dtype=torch.float64)
    found = torch.empty(len(tensors), *tensors[0].shape, dtype=torch.float64)
    for where, values in zip(places.values(), fetched, strict=True):
        found[where] = values
    return found


@without_graph
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, shape (), on their device."""
    if len({(t.device, t.dtype) for t in tensors}) != 1 or any(type(t) is not Tensor for t in tensors):
        return torch.nn.utils.get_total_norm(tensors)
    # what torch does for tensors of one kind, without its passage through the compiler's front door
    norms: tuple[Tensor, ...] = torch._foreach_norm(list(tensors), 2.0)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), 2.0)
    return total


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> list[Tensor]:
    """Norm of each tensor, shape () on its device, as wide as it has numbers for; 0 for one without numbers."""
    if len({t.device for t in tensors}) == 1 and all(t.numel() for t in tensors):
        found: tuple[Tensor, ...] = torch._foreach_norm(list(tensors), order, dtype=accumulate_dtype(tensors[0].device))
        return list(found)
    return [
        torch.linalg.vector_norm(t, order, dtype=accumulate_dtype(t.device))
        if t.numel()
        else torch.zeros((), dtype=accumulate_dtype(t.device), device=t.device)
        for t in tensors
    ]


@without_graph
def per_tensor_rms(tensors: Sequence[Tensor]) -> list[float]:
    """Root mean square of each tensor, read in one transfer."""
    if isinstance(tensors, Together) and tensors.vector.dtype is torch.float64:
        if tensors.vector.device.type == "cpu" and 0 not in tensors.lengths:
            return rms_of_pieces(tensors.vector.numpy(), tensors.lengths)
        sizes = torch.tensor(tensors.lengths, device=tensors.vector.device)
        squares = torch.segment_reduce(tensors.vector.square(), "sum", lengths=sizes, unsafe=True)
        found: list[float] = (squares / sizes.clamp(min=1)).sqrt().tolist()
        return found
    lengths: list[float] = on_host(norms(tensors)).tolist()
    return [length / math.sqrt(max(t.numel(), 1)) for length, t in zip(lengths, tensors, strict=True)]


@np.errstate(over="ignore")  # a length that overflows is infinite, and its move is refused
def rms_of_pieces(vector: NDArray[np.float64], lengths: Sequence[int]) -> list[float]:
    """Root mean square of every piece of a vector.

    Args:
        vector: (P,).
        lengths: Of its pieces, one after the other; none is 0.
    """
    ends = list(accumulate(lengths))
    squares = np.add.reduceat(vector * vector, [0, *ends[:-1]])
    return [math.sqrt(total / length) for total, length in zip(squares.tolist(), lengths, strict=True)]


def finite(tensor: Tensor) -> bool:
    """Whether no number of one tensor is NaN or infinite."""
    if tensor.device.type == "cpu" and tensor.dtype in _OF_NUMPY and type(tensor) is Tensor and not tensor.is_neg():
        return bool(np.isfinite(tensor.detach().numpy()).all())
    return bool(torch.isfinite(tensor).all())


@without_graph
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    return bool(torch.isfinite(on_host(norms(tensors, math.inf))).all())
