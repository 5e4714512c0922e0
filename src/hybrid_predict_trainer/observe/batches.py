"""What the gate needs of a batch: how many samples it holds, pieces of it, copies of its containers.

A batch is a tensor, or a tuple, list or mapping of batches.  Tensors and arrays that hold samples share their first
dimension; what has none, or a first dimension of 1 (a temperature, a mask for all samples), belongs to every sample.
Lists of plain values (labels, names) that are as long as the batch are cut with it.  What cannot be cut truly (ragged,
sparse and nested tensors, packed sequences, graphs, objects of unknown classes) makes a batch of no samples: the gate
then looks at it as a whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

#: Values that say the same of every sample.
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, np.generic)


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch's containers, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors(value)


def is_plain(value: Any) -> bool:
    """Whether a value is plain, or a list or tuple of plain values at any depth."""
    if isinstance(value, tuple | list):
        return all(is_plain(item) for item in value)
    return isinstance(value, PLAIN)


def num_samples(batch: Any) -> int:
    """Common first dimension of what holds samples, 0 if there is none or the batch cannot be cut."""
    sizes: set[int] = set()
    if not _collect(batch, sizes):
        return 0
    if len(sizes) > 1:
        sizes.discard(1)  # a first dimension of 1 belongs to every sample
    return sizes.pop() if len(sizes) == 1 else 0


def _collect(batch: Any, sizes: set[int]) -> bool:
    """Gather first dimensions; False: something in it cannot be cut."""
    if isinstance(batch, Tensor):
        if batch.layout is not torch.strided or batch.is_nested:
            return False
        sizes.update(batch.shape[:1])
        return True
    if isinstance(batch, np.ndarray):
        sizes.update(batch.shape[:1])
        return True
    if isinstance(batch, PackedSequence):
        return False
    if isinstance(batch, Mapping):
        return all(_collect(value, sizes) for value in batch.values())
    if isinstance(batch, tuple | list):
        return is_plain(batch) or all(_collect(value, sizes) for value in batch)
    return isinstance(batch, PLAIN)


def narrow(batch: Any, start: int, stop: int) -> Any:
    """Samples ``start .. stop - 1`` as a batch of the same structure (views of tensors, no copies)."""
    size = num_samples(batch)

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor | np.ndarray):
            return leaf[start:stop] if leaf.shape[:1] == (size,) else leaf
        if isinstance(leaf, tuple | list) and len(leaf) == size:
            return _like(leaf, list(leaf[start:stop]))
        return leaf

    return rebuilt(batch, cut)


def picked(batch: Any, index: Tensor) -> Any:
    """Samples of these numbers, on the CPU, as a batch of the same structure (copies)."""
    size, numbers = num_samples(batch), index.tolist()

    def chosen(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[index.to(leaf.device)] if leaf.shape[:1] == (size,) else leaf
        if isinstance(leaf, np.ndarray):
            return leaf[numbers] if leaf.shape[:1] == (size,) else leaf
        if isinstance(leaf, tuple | list) and len(leaf) == size:
            return _like(leaf, [leaf[i] for i in numbers])
        return leaf

    return rebuilt(batch, chosen)


def rebuilt(batch: Any, leaf: Callable[[Any], Any]) -> Any:
    """The same structure in new containers, ``leaf`` of everything else; lists of plain values are leaves."""
    if isinstance(batch, Mapping):
        pieces = {k: rebuilt(v, leaf) for k, v in batch.items()}
        if type(batch) is dict:
            return pieces
        try:
            return type(batch)(pieces)  # type: ignore[call-arg]
        except TypeError:  # mappings with another constructor, such as BatchEncoding subclasses
            return pieces
    if isinstance(batch, PackedSequence) or not isinstance(batch, tuple | list):
        return leaf(batch)
    if batch and is_plain(batch):
        return leaf(batch)
    return _like(batch, [rebuilt(v, leaf) for v in batch])


def _like(old: Any, items: list[Any]) -> Any:
    """A list, tuple or named tuple of the same type."""
    return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)


def copied(batch: Any, *, tensors_too: bool) -> Any:
    """New containers around the same leaves: a loss function that takes its labels out changes the copy.

    Args:
        batch: Any; objects of unknown classes are copied one level deep where they can be.
        tensors_too: Copy tensors and arrays as well, for loss functions that write into them.
    """
    if type(batch) is tuple and not tensors_too and all(isinstance(value, Tensor) for value in batch):
        return batch  # nothing can be taken out of it

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone() if tensors_too else value
        if isinstance(value, np.ndarray):
            return value.copy() if tensors_too else value
        if isinstance(value, tuple | list):
            return copy.copy(value)
        if isinstance(value, (*PLAIN, PackedSequence)) or callable(value):
            return value
        try:
            return copy.copy(value)
        except Exception:  # handles, iterators: nothing that could be copied
            return value

    return rebuilt(batch, leaf)


def chunks(batch: Any, start: int, stop: int, num_chunks: int, least: int = 1) -> list[Any]:
    """Cut samples ``start .. stop - 1`` into at most ``num_chunks`` equal pieces of at least ``least`` samples.

    Equal sizes, so that the mean over pieces is the mean over samples; up to ``num_chunks - 1``
    samples at the end are left out for that.
    """
    count = stop - start
    num_chunks = max(1, min(num_chunks, count // max(least, 1)))
    size = count // num_chunks
    return [narrow(batch, start + i * size, start + (i + 1) * size) for i in range(num_chunks)]


def layout(batch: Any) -> str:
    """What cutting a batch depends on: names, kinds and dimensions, not how many samples or how long they are."""
    size = num_samples(batch)

    def walk(value: Any) -> str:
        if isinstance(value, Tensor | np.ndarray):
            first = "n" if value.shape[:1] == (size,) else "1"
            return f"{value.dtype}{value.ndim}{first}"
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{k}:{walk(v)}" for k, v in value.items()) + "}"
        if isinstance(value, tuple | list) and not is_plain(value):
            return "[" + ",".join(walk(v) for v in value) + "]"
        if isinstance(value, tuple | list):
            return f"plain{'n' if len(value) == size else ''}"
        return type(value).__name__

    return walk(batch)
