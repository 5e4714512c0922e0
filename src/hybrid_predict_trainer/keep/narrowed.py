"""Numbers in float64 are stored in the fewest bytes that hold the very same bits.

Small models are predicted in float64, and most of what is kept there is zero (places of a basis that are not filled
yet) or is a number of float32 (differences of weights that are).  Of such a tensor two bits are stored per number,
which say what it is, and then the numbers of either kind.  What is read is what was written, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .merged import MAX_GROWTH, grows_too_much

#: Smaller tensors are not worth it.
MIN_BYTES = 4096
#: Narrowed where it takes at most this share of the bytes.
WORTH = 0.9

_ZERO, _SINGLE, _DOUBLE = 0, 1, 2
_PARTS = ("#kinds", "#float32", "#float64")

Tree = Any


def narrowed(tree: Tree, tensors: Mapping[str, Tensor]) -> tuple[Tree, dict[str, Tensor]]:
    """A state tree and its tensors, each in three pieces where that is less; :func:`widened` undoes it.

    Args:
        tree: JSON; left as it is.
        tensors: Contiguous and in host memory, by name.

    Returns:
        The tree, as ``{"$narrow": [tree, {name: shape}]}`` where something was narrowed, and what is stored.
    """
    kept: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    taken = set(tensors)
    for name, tensor in tensors.items():
        free = taken.isdisjoint(name + part for part in _PARTS)
        pieces = _pieces(tensor) if free and tensor.dtype is torch.float64 and tensor.nbytes >= MIN_BYTES else None
        if pieces is None:
            kept[name] = tensor
            continue
        shapes[name] = list(tensor.shape)
        kept |= {name + part: piece for part, piece in zip(_PARTS, pieces, strict=True)}
    if not shapes or grows_too_much(tree, tensors, sum(tensor.nbytes for tensor in kept.values())):
        return tree, dict(tensors)
    return {"$narrow": [tree, shapes]}, kept


def widened(tree: Tree, tensors: Mapping[str, Tensor]) -> tuple[Tree, dict[str, Tensor]]:
    """Inverse of :func:`narrowed`; the tree may come from an untrusted file.

    Raises:
        ValueError: pieces that do not fit together, or that ask for far more memory than their file holds.
        KeyError, TypeError: the tree is malformed, or names a tensor that is not there.
    """
    found = dict(tensors)
    if not isinstance(tree, dict) or tree.keys() != {"$narrow"}:
        return tree, found
    body = tree["$narrow"]
    if not isinstance(body, list) or len(body) != 2 or not isinstance(body[1], dict):
        raise ValueError("malformed state tree: what is narrowed")
    inner, shapes = body
    if 8 * sum(_size(shape) for shape in shapes.values()) > MAX_GROWTH * sum(t.nbytes for t in tensors.values()):
        raise ValueError(f"malformed state tree: narrowed tensors of over {MAX_GROWTH} times what is stored")
    for name, shape in shapes.items():
        if name in tensors:
            raise ValueError(f"malformed state tree: {name!r} is stored and narrowed")
        kinds, single, double = (found.pop(name + part) for part in _PARTS)
        found[name] = _whole(kinds, single, double, _size(shape)).reshape(shape)
    return inner, found


def _pieces(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Kinds, four per byte, and the numbers of each; None where that is not less."""
    flat = tensor.detach().reshape(-1)
    bits, single = flat.view(torch.int64), flat.float()
    zero = bits == 0
    exact = (single.double().view(torch.int64) == bits) & ~zero  # by their bits: -0.0 and NaN are what they are
    rest = ~(zero | exact)
    num_bytes = -(-len(flat) // 4) + 4 * int(exact.sum()) + 8 * int(rest.sum())
    if not tensor.nbytes / MAX_GROWTH <= num_bytes <= WORTH * tensor.nbytes:
        return None
    kinds = torch.zeros(4 * -(-len(flat) // 4), dtype=torch.uint8)
    kinds[: len(flat)] = exact.to(torch.uint8) * _SINGLE + rest.to(torch.uint8) * _DOUBLE
    a, b, c, d = kinds.view(-1, 4).unbind(1)
    return a | b << 2 | c << 4 | d << 6, single[exact], flat[rest]


def _whole(kinds: Tensor, single: Tensor, double: Tensor, size: int) -> Tensor:
    if (kinds.dtype, single.dtype, double.dtype) != (torch.uint8, torch.float32, torch.float64):
        raise ValueError("malformed state tree: narrowed tensors of other types")
    if kinds.dim() != 1 or len(kinds) != -(-size // 4):
        raise ValueError("malformed state tree: narrowed tensors of another size")
    kind = torch.stack([kinds >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).reshape(-1)[:size]
    exact, rest = kind == _SINGLE, kind == _DOUBLE
    if (int(exact.sum()), int(rest.sum())) != (single.numel(), double.numel()):
        raise ValueError("malformed state tree: narrowed tensors with numbers too few or too many")
    found = torch.zeros(size, dtype=torch.float64)
    found[exact] = single.double()
    found[rest] = double
    return found


def _size(shape: Sequence[int]) -> int:
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError("malformed state tree: the shape of a narrowed tensor")
    return math.prod(shape)
