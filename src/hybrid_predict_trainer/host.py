"""Copies of device tensors in host memory that is taken once and written over.

Memory is page-locked for tensors on CUDA: only then a copy runs while the host goes on, and what takes memory
anew for every copy pays for its pages every time.  On other devices copies are waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

CPU = torch.device("cpu")


def copied(tensor: Tensor, old: object = None, *, to_host: bool = False) -> Tensor:
    """A detached copy of a tensor.

    Args:
        tensor: What to copy.
        old: A copy that is needed no more: its memory is written over if it fits.
        to_host: Keep the copy in host memory.  From CUDA it is there once :func:`wait` has returned.
    """
    device = CPU if to_host else tensor.device
    source = tensor.detach()
    fits = isinstance(old, Tensor) and (old.shape, old.dtype, old.device) == (source.shape, source.dtype, device)
    if fits:
        place = old
    elif device == tensor.device:
        return source.clone()
    else:
        place = torch.empty_like(source, device=device, pin_memory=source.is_cuda)
    assert isinstance(place, Tensor)
    return place.copy_(source, non_blocking=source.is_cuda)


def queued(tensors: Iterable[Tensor]) -> list[torch.cuda.Event]:
    """Marks behind all copies from the tensors' devices so far."""
    devices = {t.device for t in tensors if t.is_cuda}
    return [torch.cuda.current_stream(device).record_event() for device in devices]


def wait(marks: Iterable[torch.cuda.Event]) -> None:
    """Until the copies before the marks are there."""
    for mark in marks:
        mark.synchronize()


class Landing:
    """One place in host memory per name, for tensors that are fetched again and again."""

    def __init__(self) -> None:
        """Memory is taken at the first fetch."""
        self._places: dict[int, Tensor] = {}
        self._marks: list[torch.cuda.Event] = []

    def fetch(self, tensors: Mapping[int, Tensor]) -> None:
        """Queue copies of named tensors; what was fetched before under these names is written over."""
        for name, tensor in tensors.items():
            self._places[name] = copied(tensor, self._places.get(name), to_host=True)
        self._marks = queued(tensors.values())

    def arrived(self, names: Iterable[int]) -> list[Tensor]:
        """The copies of the last fetch, once they are there."""
        wait(self._marks)
        self._marks = []
        return [self._places[name] for name in names]

    def memory_bytes(self) -> int:
        """Bytes of all places."""
        return sum(t.numel() * t.element_size() for t in self._places.values())
