"""What the gate needs of a batch: its size, pieces of it, and whether it is the batch of last time.

A batch is a tensor, or a tuple, list or mapping of batches; tensors share their first dimension.
Anything else in it (strings, numbers, None) is handed on unchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors(value)


def num_samples(batch: Any) -> int:
    """Common first dimension of the batch's tensors, 0 if there is none."""
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors(batch)}
    return sizes.pop() if len(sizes) == 1 else 0


def narrow(batch: Any, start: int, stop: int) -> Any:
    """Samples ``start .. stop - 1`` as a batch of the same structure (views, no copies)."""
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if isinstance(batch, Mapping):
        pieces = {k: narrow(v, start, stop) for k, v in batch.items()}
        try:
            return type(batch)(pieces)  # type: ignore[call-arg]
        except TypeError:  # mappings with another constructor, such as BatchEncoding subclasses
            return pieces
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(narrow(v, start, stop) for v in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(narrow(v, start, stop) for v in batch)
    return batch


def chunks(batch: Any, start: int, stop: int, num_chunks: int) -> list[Any]:
    """Cut samples ``start .. stop - 1`` into at most ``num_chunks`` equal pieces.

    Equal sizes, so that the mean over pieces is the mean over samples; up to ``num_chunks - 1``
    samples at the end are left out for that.
    """
    count = stop - start
    num_chunks = max(1, min(num_chunks, count))
    size = count // num_chunks
    return [narrow(batch, start + i * size, start + (i + 1) * size) for i in range(num_chunks)]


class Fingerprint:
    """Identity of a batch's tensors, held weakly and without reading them.

    Equality in successive steps means the very same tensors were passed, unchanged: full-batch
    training.  References and not addresses are compared, because a freed batch's address is soon
    another batch's.
    """

    __slots__ = ("_tensors",)

    def __init__(self, batch: Any) -> None:
        """Remember the tensors of ``batch`` and their version counters."""
        # inference tensors have no version counter (and cannot be changed in place outside inference mode)
        self._tensors = [(weakref.ref(t), 0 if t.is_inference() else t._version) for t in tensors(batch)]

    def matches(self, other: Fingerprint) -> bool:
        """Whether both are the same living, unchanged tensors; False for batches without tensors."""
        if not self._tensors or len(self._tensors) != len(other._tensors):
            return False
        return all(
            a() is not None and a() is b() and va == vb
            for (a, va), (b, vb) in zip(self._tensors, other._tensors, strict=True)
        )
