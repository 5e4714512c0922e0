"""Buffers and extra state of a model's modules: remembered, and put back as they were.

A forward may change a buffer in place (BatchNorm), but also bind the name to another tensor (``self.mean = 0.9 *
self.mean + ...``), let it grow (``torch.cat``) or set what was None.  So a buffer is known by its module and its name,
and the tensor that stood there is held: where the forward bound another, the old one goes back to its place.  It is not
the new one that is written over, which may be the caller's own batch.

Modules with ``get_extra_state`` are asked for it, and given it back.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..weights import offload as host
from ..weights.algebra import without_graph
from .walk import modules_of

Place = tuple[nn.Module, str]


def places(model: nn.Module) -> dict[str, Place]:
    """Qualified name -> module and name of every registered buffer, those that are None included."""
    if not any(m._buffers for m in modules_of(model)):
        return {}
    return {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules()
        for name in module._buffers
    }


def stateful(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> module, of those that have an extra state."""
    if not any(map(has_extra_state, modules_of(model))):
        return {}
    return {prefix: module for prefix, module in model.named_modules() if has_extra_state(module)}


def has_extra_state(module: nn.Module) -> bool:
    """Whether a module has a state beside parameters and buffers."""
    return type(module).get_extra_state is not nn.Module.get_extra_state


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
            return False
        if a.numel() == 0 or a.device.type == "meta":
            return True
        try:
            return torch.equal(a, b)
        except (NotImplementedError, RuntimeError):  # types that are stored and not computed with
            return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    try:
        return bool(a == b)
    except (ValueError, TypeError, RuntimeError):  # an array, say: then it counts as changed
        return False


@dataclass(slots=True)
class Buffers:
    """Copies of buffers and extra states, and the tensors that they are copies of.

    Attributes:
        tensors: Qualified name -> copy, or None where the buffer was None.
        extra: Qualified name of a module -> its extra state.
        bound: Qualified name -> the tensor that stood there; empty once it has been through a file.
    """

    tensors: dict[str, Tensor | None]
    extra: dict[str, Any]
    bound: dict[str, Tensor | None] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, old: Buffers | None = None, *, offload: bool = False) -> Buffers:
        """Of all modules of ``model``; the memory of ``old`` is written over."""
        before: Mapping[str, Tensor | None] = {} if old is None else old.tensors
        bound = {name: module._buffers[key] for name, (module, key) in places(model).items()}
        return cls(
            {
                name: None if t is None else host.copied(t, before.get(name), to_host=offload)
                for name, t in bound.items()
            },
            {name: copy.deepcopy(module.get_extra_state()) for name, module in stateful(model).items()},
            bound,
        )

    @torch.no_grad()
    def put_back(self, model: nn.Module) -> None:
        """Every buffer and extra state as it was; buffers that are new since are taken out."""
        live = places(model)
        for name, (module, key) in live.items():
            if name not in self.tensors:
                del module._buffers[key]
        modules = dict(model.named_modules())
        for name, saved in self.tensors.items():
            prefix, _, key = name.rpartition(".")
            if prefix in modules:
                put(modules[prefix], key, saved, self.bound.get(name))
        for name, state in self.extra.items():
            if name in modules:
                modules[name].set_extra_state(copy.deepcopy(state))


def put(module: nn.Module, key: str, saved: Tensor | None, bound: Tensor | None) -> None:
    """Give one buffer its saved value.

    Args:
        module: Owner of the buffer.
        key: Its name there.
        saved: Its value; None: it was None.
        bound: The tensor that stood there and goes back; None: not known, then the live one is written over if it fits.
    """
    place = bound if bound is not None else module._buffers.get(key)
    if saved is None:
        module._buffers[key] = None
    elif place is not None and (place.shape, place.dtype) == (saved.shape, saved.dtype):
        host.write(place, saved)
        module._buffers[key] = place
    else:
        device = place.device if place is not None else next(module.parameters(), saved).device
        module._buffers[key] = host.copied(saved).to(device)


class BufferGuard:
    """Undoes what one forward did to buffers and extra states, if the step turns out not to count.

    Which buffers a forward changes in place is learned from one forward, so that constant ones (a causal mask,
    a rotary table) are copied once and never again.  One that is bound anew later needs no copy to come back.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch the buffers of ``model``."""
        self._model = model
        self._mutable: set[str] | None = None  # names; None: not known yet, copy all
        self._places: dict[str, Place] = {}
        self._modules: dict[str, nn.Module] = {}
        self._bound: dict[str, Tensor | None] = {}
        self._saved: dict[str, tuple[Tensor, int]] = {}
        self._extra: dict[str, Any] = {}

    def modules(self) -> list[nn.Module]:
        """All that are watched, the model's and those beside it."""
        return list(self._model.modules())

    @property
    def changing(self) -> frozenset[str]:
        """Names of the buffers that a forward is known to change."""
        return frozenset(self._mutable or ())

    @without_graph
    def before(self) -> None:
        """Remember the buffers that a forward is known (or may be about) to change."""
        if self._mutable is None:
            self._places, self._modules = places(self._model), stateful(self._model)
        self._bound = {name: module._buffers.get(key) for name, (module, key) in self._places.items()}
        self._saved = {
            name: (host.copied(t), _version(t))
            for name, t in self._bound.items()
            if t is not None and (self._mutable is None or name in self._mutable)
        }
        self._extra = {
            name: copy.deepcopy(module.get_extra_state())
            for name, module in self._modules.items()
            if self._mutable is None or f"{name}:extra" in self._mutable
        }

    def after(self) -> None:
        """The forward was fine: learn which buffers it changed, drop the copies."""
        if self._mutable is None:
            self._mutable = {
                # BatchNorm's running statistics change without their version being counted
                *(n for n, (old, version) in self._saved.items() if self._changed(n, old, version)),
                *(n for n, t in self._bound.items() if self._live(n) is not t),
                *(f"{n}:extra" for n, old in self._extra.items() if not same(self._modules[n].get_extra_state(), old)),
            }
        self._saved, self._bound, self._extra = {}, {}, {}

    def _changed(self, name: str, old: Tensor, version: int) -> bool:
        tensor = self._bound[name]
        return tensor is not None and (_version(tensor) != version or not same(tensor, old))

    def _live(self, name: str) -> Tensor | None:
        module, key = self._places[name]
        return module._buffers.get(key)

    def forget(self) -> None:
        """Learn anew (buffers may have been registered or replaced since)."""
        self._mutable = None

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the copies."""
        for name, tensor in self._bound.items():
            module, key = self._places[name]
            module._buffers[key] = tensor
            if tensor is not None and name in self._saved:
                host.write(tensor, self._saved[name][0])
        for name, state in self._extra.items():
            self._modules[name].set_extra_state(state)
        self._saved, self._bound, self._extra = {}, {}, {}


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
