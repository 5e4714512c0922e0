"""Device tensors in host memory: copies that are taken once and written over, and activations until their backward.

On CUDA host copies are pinned, because only then are copies asynchronous.  The buffers are reused, because pinning
memory is slow.  On other devices copies are synchronous.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .real_views import owner
from .shards import local

CPU = torch.device("cpu")


class own_defaults:  # noqa: N801 - it reads as a function, as nullcontext does
    """Around code of this package: new tensors are float32 in host memory, whatever defaults the user has set.

    ``torch.set_default_dtype`` and ``torch.set_default_device`` are meant for the user's own tensors; what predictors
    and the encoder compute with would be of another type, or elsewhere, than what it meets.  A step enters this several
    times, so where the defaults are torch's own it costs next to nothing.
    """

    __slots__ = ("_stack",)

    def __enter__(self) -> None:
        """Set the defaults."""
        self._stack: ExitStack | None = None
        # a default device is a mode, so where there is no mode there is none
        if torch.get_default_dtype() is torch.float32 and not torch._C._len_torch_function_stack():
            return
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        if dtype is torch.float32 and device.type == "cpu":
            return
        self._stack = ExitStack()
        _users.append((dtype, device))
        self._stack.callback(_users.pop)
        torch.set_default_dtype(torch.float32)
        self._stack.callback(torch.set_default_dtype, dtype)
        if device.type != "cpu":
            self._stack.enter_context(CPU)

    def __exit__(self, *error: object) -> None:
        """Set them back."""
        if self._stack is not None:
            self._stack.close()


@contextmanager
def users_defaults() -> Iterator[None]:
    """Within :func:`own_defaults`, around code of the user's: new tensors are what they are outside."""
    if not _users:
        yield
        return
    dtype, device = _users[0]
    own = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(own)


#: The user's defaults, by every :func:`own_defaults` that has changed them.
_users: list[tuple[torch.dtype, torch.device]] = []


def copied(tensor: Tensor, old: object = None, *, to_host: bool = False) -> Tensor:
    """A detached copy of a tensor; of a sharded one, of this rank's part.

    Args:
        tensor: What to copy.
        old: A copy that is needed no more: its memory is written over if it fits.
        to_host: Keep the copy in host memory.  From CUDA it is there once :func:`wait` has returned.
    """
    tensor = local(tensor)
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        return _copied_by_parts(tensor, old, to_host)
    device = CPU if to_host else tensor.device
    source = tensor.detach()
    fits = isinstance(old, Tensor) and type(old) is Tensor
    if isinstance(old, Tensor) and fits:  # strides too: a product in another memory order rounds differently
        fits = (old.shape, old.dtype, old.device, old.stride()) == (source.shape, source.dtype, device, source.stride())
    if fits:
        place = old
    elif device == tensor.device:
        return source.clone()
    else:
        place = torch.empty_like(source, device=device, pin_memory=source.is_cuda)
    assert isinstance(place, Tensor)
    return place.copy_(source, non_blocking=source.is_cuda)


def _copied_by_parts(tensor: Tensor, old: object, to_host: bool) -> Tensor:
    """A copy of a tensor subclass, which need not know how to clone itself (quantized optimizer state does not)."""
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    before = old if type(old) is type(tensor) else None
    parts = {name: copied(getattr(tensor, name), getattr(before, name, None), to_host=to_host) for name in names}
    made = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
    assert isinstance(made, Tensor)
    return made


def write(live: Tensor, saved: Tensor) -> None:
    """Write a saved tensor of the same kind and shape over a live one, in place; of a sharded one over its part."""
    live = local(live)
    if type(live) in (Tensor, nn.Parameter) or not hasattr(live, "__tensor_flatten__"):
        live.copy_(saved)
        return
    if type(saved) is type(live):
        for name in live.__tensor_flatten__()[0]:
            write(getattr(live, name), getattr(saved, name))
    else:
        live.copy_(saved)


class activations_on_host(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801 - it reads as a function
    """Around a forward: what its backward will need lies in host memory until then, bit for bit.

    As ``torch.autograd.graph.save_on_cpu``, which would copy the weights as well, at every step: they stay where they
    are.  Copies of weights in another type, as autocast makes them, do not.
    """

    def __init__(
        self, parameters: Iterable[Tensor], moving: torch.autograd.graph.saved_tensors_hooks | None = None
    ) -> None:
        """Nothing is copied yet.

        Args:
            parameters: That stay.
            moving: What is done with the rest; None: torch's ``save_on_cpu``.
        """
        weights = [local(owner(p)) for p in parameters]
        staying = {w.untyped_storage()._cdata for w in weights}
        move = moving or torch.autograd.graph.save_on_cpu(pin_memory=any(w.is_cuda for w in weights))

        def pack(tensor: Tensor) -> Any:
            return tensor if local(tensor).untyped_storage()._cdata in staying else move.pack_hook(tensor)

        def unpack(packed: Any) -> Tensor:
            found: Tensor = packed if isinstance(packed, Tensor) else move.unpack_hook(packed)
            return found

        super().__init__(pack, unpack)


def queued(tensors: Iterable[Tensor]) -> list[torch.cuda.Event]:
    """Marks behind all copies from the tensors' devices so far."""
    devices = {t.device for t in tensors if t.is_cuda}
    return [torch.cuda.current_stream(device).record_event() for device in devices]


def wait(marks: Iterable[torch.cuda.Event]) -> None:
    """Until the copies before the marks are there."""
    for mark in marks:
        mark.synchronize()


class StagingBuffers:
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


def plain_bytes(tensor: Tensor) -> bytes:
    """Bytes of a tensor's numbers in row-major order."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
