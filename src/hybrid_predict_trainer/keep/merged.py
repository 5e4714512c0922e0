"""Tensors that are equal bit for bit are stored once, and come back as tensors of their own.

A run holds copies of its state to come back to, and much in them is what it was: momentum that is zero, weights as of
the same step.  What is merged here is never shared after it was read: every place gets memory of its own, as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

#: Smaller tensors are not worth a comparison.
MIN_BYTES = 4096
#: Bytes by which candidates are told apart before they are compared in full.
NUM_SAMPLED = 256
#: Most bytes that come back for each byte that is stored: a small file must not ask for all of the memory.
MAX_GROWTH = 16

Tree = Any


def merged(tree: Tree, tensors: Mapping[str, Tensor]) -> tuple[Tree, dict[str, Tensor]]:
    """A state tree and its tensors, each content once; ``state_tree.decode`` undoes it.

    Args:
        tree: JSON, from ``state_tree.encode``; left as it is.
        tensors: Contiguous and in host memory, by name.

    Returns:
        The tree, in which a leaf ``{"$tensor": name}`` may have become ``{"$equal": [stored, name]}``, and what is
        stored.
    """
    # a complex tensor is stored in another form and stays
    named = {leaf["$tensor"] for leaf in _leaves(tree, "$tensor")}
    kept: dict[str, Tensor] = {}
    instead: dict[str, str] = {}
    alike: dict[tuple[object, ...], list[str]] = {}
    num_kept = num_merged = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        candidates = alike.setdefault(_traits(tensor), []) if size >= MIN_BYTES else []
        twin = next((other for other in candidates if _same_bits(kept[other], tensor)), None)
        if twin is not None and name in named and num_merged + size <= MAX_GROWTH * num_kept:
            instead[name] = twin
            num_merged += size
        else:
            kept[name] = tensor
            candidates.append(name)
            num_kept += size
    return (_renamed(tree, instead) if instead else tree), kept


def grows_too_much(tree: Tree, tensors: Mapping[str, Tensor], num_stored: int) -> bool:
    """Whether equal tensors come to over ``MAX_GROWTH`` times the bytes of the file.

    Raises:
        KeyError: the tree names a tensor that is not there.
    """
    wanted = sum(tensors[leaf["$equal"][0]].nbytes for leaf in _leaves(tree, "$equal"))
    return wanted > MAX_GROWTH * num_stored


def check_growth(tree: Tree, tensors: Mapping[str, Tensor], num_stored: int) -> None:
    """Refuse a tree that asks for far more memory than its file holds.

    Args:
        tree: Of a state.
        tensors: By name, as they come back.
        num_stored: Bytes of them in the file.

    Raises:
        ValueError: it does.
        KeyError: it names a tensor that is not there.
    """
    if grows_too_much(tree, tensors, num_stored):
        raise ValueError(f"malformed state tree: equal tensors of over {MAX_GROWTH} times what is stored")


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _traits(tensor: Tensor) -> tuple[object, ...]:
    content = _bytes_of(tensor)
    return tensor.dtype, tensor.shape, content[:: max(len(content) // NUM_SAMPLED, 1)].numpy().tobytes()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(_bytes_of(a), _bytes_of(b))


def _leaves(tree: Tree, tag: str) -> Iterator[dict[str, Any]]:
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if node.keys() == {tag}:
                yield node
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def _renamed(node: Tree, instead: Mapping[str, str]) -> Tree:
    if isinstance(node, dict):
        if node.keys() == {"$tensor"}:
            name = node["$tensor"]
            return {"$equal": [instead[name], name]} if name in instead else node
        return {key: _renamed(value, instead) for key, value in node.items()}
    return [_renamed(item, instead) for item in node] if isinstance(node, list) else node
