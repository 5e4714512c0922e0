"""State of any Python object, as plain containers and marks, and back into a live object of the same kind.

What an optimizer remembers is not always in ``optimizer.state[parameter]``: wrappers hold another optimizer, some keep
counts as attributes, averages under a name of their own, objects with tensors inside.  ``capture`` walks whatever hangs
on a value; ``restored`` writes it back, in place where the live value has room for it.

Plain data stays as it is.  Everything else becomes a :class:`.state_tree.Mark`:

====================  ==================================================================================
``parameter``         a parameter of the model or the optimizer, by its name; its values are kept elsewhere
``identity``          ``id(parameter)``, which some optimizers use as a key: another number in another process
``same``              what was met before, by the path to it
``object``            class and attributes of an object
``items``             a dict or set with keys that are no plain data
``subclass``          a tensor subclass, by the tensors it is made of (``__tensor_flatten__``)
``shard``             this rank's part of a sharded tensor (a DTensor), and the shape of the whole
``own``               a tensor with a gradient of its own (``nn.Parameter``) that is no parameter of the model
``code``              a function or class, by its name: the live one stays
``live``              what is no state (a stream, a lock) or is kept elsewhere (a module of the model): it stays
``kept``              the same, held by reference; never in a file
``enum``              class and member
``generator``         a random generator's class and state
``tuple``             a named tuple's class and values
====================  ==================================================================================

Reading runs no code that a file names: an object is only ever made of a class that the live value has in that place,
or that is already imported from the package that the optimizer itself comes from.
"""

from __future__ import annotations

import collections
import enum
import logging
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..records import CheckpointError
from ..weights.shards import is_sharded, like_shard, local
from .plain_values import encode_value
from .state_tree import Mark, describe_path

Path = tuple[object, ...]
Copy = Callable[[Tensor, Path], Tensor]

#: What an object may hold that is no state: the live one has its own.
NO_STATE = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, type, property),
    *(weakref.ReferenceType, logging.Logger, type(threading.Lock()), type(threading.RLock()), RemovableHandle),
)
#: The same, by where their classes come from: streams, events, process groups, compiled functions.
NO_STATE_MODULES = ("torch._C", "torch.cuda", "torch._dynamo", "torch.distributed", "functools", "_io")

#: Values without parts.
VALUES = (slice, type(...), Fraction, Decimal, PurePosixPath, PureWindowsPath, PosixPath, WindowsPath)

#: Kinds of marks that put nothing into what is there.
_STAYING = ("live", "kept", "same", "code")
_SIMPLE = (type(None), bool, int, float, str)
_HOOKS = ("_optimizer_", "_hook_for_profile", "_zero_grad_profile_name", "_patched")


class OpaqueStateError(CheckpointError):
    """A value whose state cannot be told."""


def type_name(kind: type) -> str:
    """Module and qualified name of a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


@dataclass(slots=True)
class Capture:
    """One walk: which parameters are known by which name, how a tensor is copied, and what was met before."""

    names: Mapping[int, str]  # id -> name of every parameter
    copy: Copy
    met: dict[int, Path] = field(default_factory=dict)
    stay: frozenset[int] = frozenset()  # ids of what is kept elsewhere and stays
    by_reference: bool = False  # hold what is no state itself; for a capture that never leaves the process
    alive: list[object] = field(default_factory=list)  # so that no id is used twice during the walk

    def of(self, value: Any, path: Path) -> Any:
        """State of ``value``, which is met at ``path``.

        Raises:
            OpaqueStateError: something in it has no state that can be told; the message names its place.
        """
        kind = type(value)
        if kind in _SIMPLE:
            known = kind is int and value in self.names
            return Mark("identity", self.names[value]) if known else value
        if id(value) in self.names:
            return Mark("parameter", self.names[id(value)])
        if id(value) in self.stay:
            return Mark("kept", value) if self.by_reference else Mark("live", type_name(kind))
        if kind is tuple:
            return tuple(self.of(item, (*path, i)) for i, item in enumerate(value))
        if kind in VALUES or kind is frozenset or encode_value(value) is not None:
            return value if kind is not frozenset else frozenset(self.of(item, path) for item in value)
        if id(value) in self.met:
            return Mark("same", list(self.met[id(value)]))
        self.met[id(value)] = path
        self.alive.append(value)
        return self._fresh(value, path)

    def _fresh(self, value: Any, path: Path) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if kind in (list, collections.deque):
            items = [self.of(item, (*path, i)) for i, item in enumerate(value)]
            return items if kind is list else collections.deque(items, value.maxlen)
        if kind in (dict, collections.OrderedDict, collections.Counter, collections.defaultdict):
            return self._dict(value, path)
        if isinstance(value, set) and kind is set:
            plain = all(type(item) in _SIMPLE and item not in self.names for item in value)
            return set(value) if plain else Mark("items", ["set", [self.of(v, (*path, "in")) for v in value]])
        if isinstance(value, np.ndarray) and kind is np.ndarray and value.dtype.kind != "O":
            return value.copy()
        if isinstance(value, enum.Enum):
            return Mark("enum", [type_name(kind), value.name])
        if isinstance(value, torch.Generator):
            return Mark("generator", ["torch", value.get_state()])
        if isinstance(value, random.Random):
            return Mark("generator", ["python", value.getstate()])
        if isinstance(value, np.random.Generator):
            return Mark("generator", ["numpy", value.bit_generator.state])
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return Mark("tuple", [type_name(kind), [self.of(v, (*path, i)) for i, v in enumerate(value)]])
        if isinstance(value, NO_STATE) or kind.__module__.startswith(NO_STATE_MODULES):
            if self.by_reference:
                return Mark("kept", value)
            if isinstance(value, type | types.FunctionType):
                return Mark("code", f"{value.__module__}:{value.__qualname__}")
            return Mark("live", type_name(kind))
        return self._object(value, path)

    def _tensor(self, value: Tensor, path: Path) -> Any:
        if type(value) is Tensor:
            return self.copy(value, path)
        if isinstance(value, nn.Parameter) and type(value) is nn.Parameter:
            return Mark("own", self.copy(value, path))
        if is_sharded(value):
            return Mark("shard", [self.copy(local(value), path), list(value.shape)])
        if not hasattr(value, "__tensor_flatten__"):
            raise OpaqueStateError(
                f"{describe_path(path)} is a {type_name(type(value))}, a tensor subclass without __tensor_flatten__: "
                "its state cannot be told; use an optimizer whose state is plain tensors"
            )
        names, context = value.__tensor_flatten__()
        inner = {name: self.of(getattr(value, name), (*path, name)) for name in names}
        about = self.of(context, (*path, "context"))
        return Mark("subclass", [type_name(type(value)), inner, about, tuple(value.shape), tuple(value.stride())])

    def _dict(self, value: dict[Any, Any], path: Path) -> Any:
        kind = type(value).__name__
        plain = all(type(key) is str or (type(key) is int and key not in self.names) for key in value)
        if plain and kind != "defaultdict":
            return type(value)({key: self.of(item, (*path, key)) for key, item in value.items()})
        pairs = []
        for i, (key, item) in enumerate(value.items()):
            place = key if type(key) in _SIMPLE and key not in self.names else i
            pairs.append([self.of(key, (*path, i, "key")), self.of(item, (*path, place))])
        return Mark("items", [kind, pairs])

    def _object(self, value: Any, path: Path) -> Any:
        found = attributes(value)
        if found is None:
            raise OpaqueStateError(
                f"{describe_path(path)} is a {type_name(type(value))}, whose state cannot be told; "
                "give the optimizer state_dict and load_state_dict of its own"
            )
        # the groups of an optimizer come first: what its state is keyed by is met there
        found = dict(sorted(found.items(), key=lambda item: item[0] != "param_groups"))
        return Mark("object", [type_name(type(value)), {k: self.of(v, (*path, k)) for k, v in found.items()}])


def attributes(value: Any) -> dict[str, Any] | None:
    """Attributes of an object, in its ``__dict__`` and its slots; None if it has neither.

    Hooks of optimizers are left out: they are code that somebody registered.
    """
    slots = [name for kind in type(value).__mro__ for name in _slots_of(kind)]
    if not hasattr(value, "__dict__") and not slots:
        return None
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    found.update(getattr(value, "__dict__", {}))
    return {k: v for k, v in found.items() if not k.startswith(_HOOKS)}


def _slots_of(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    return [n for n in ([names] if isinstance(names, str) else names) if n not in ("__dict__", "__weakref__")]


@dataclass(slots=True)
class Restore:
    """One walk back: parameters by name, and what has been put in place so far.

    Attributes:
        parameters: Live parameters by name.
        packages: Top-level packages whose classes may be made anew.
        follows: The parameter whose memory order a tensor takes on, from the tensor and the path to it; None: its own.
        device: Where a tensor goes that nothing live has room for, from the tensor and the path to it.
        spoken_for: ids of live containers that have been put back by now and may be reached a second time, by a way
            that led elsewhere when the state was taken: what was there then is made anew, and they stay as they are.
    """

    parameters: Mapping[str, Tensor]
    packages: frozenset[str]
    follows: Callable[[Tensor, Path], Tensor | None]
    device: Callable[[Tensor, Path], torch.device]
    made: dict[Path, Any] = field(default_factory=dict)
    copies: dict[int, Tensor] = field(default_factory=dict)
    spread: Callable[[Path], Tensor | None] = lambda path: None  # the parameter whose ranks hold a shard's other parts
    in_place: bool = True  # write over live tensors that fit; no: only over parameters
    spoken_for: frozenset[int] = frozenset()

    def of(self, state: Any, live: Any, path: Path) -> Any:
        """``live`` with the state written into it, or a new value where that is not possible.

        Raises:
            CheckpointError: the state is of an object that the live one is not.
        """
        if id(live) in self.spoken_for and not (isinstance(state, Mark) and state.kind in _STAYING):
            live = None
        if isinstance(state, Mark):
            value = self._mark(state, live, path)
        elif isinstance(state, Tensor):
            value = self._tensor(state, live, path)
        elif isinstance(state, dict):
            value = self._dict(state, live, path)
        elif isinstance(state, list):
            value = self._list(state, live, path)
        elif isinstance(state, collections.deque):
            items = [self.of(item, None, (*path, i)) for i, item in enumerate(state)]
            value = collections.deque(items, state.maxlen)
        elif type(state) is tuple:
            beside = live if type(live) is tuple and len(live) == len(state) else (None,) * len(state)
            value = tuple(self.of(s, v, (*path, i)) for i, (s, v) in enumerate(zip(state, beside, strict=True)))
        elif type(state) is frozenset:
            return frozenset(self.of(item, None, path) for item in state)
        elif isinstance(state, set | np.ndarray):
            value = state.copy()
        else:
            return state
        self.made[path] = value
        return value

    def _tensor(self, state: Tensor, live: Any, path: Path) -> Any:
        pattern = self.follows(state, path)
        strides = state.stride() if pattern is None else pattern.stride()
        plain = isinstance(live, Tensor) and type(live) in (Tensor, nn.Parameter)[0 if self.in_place else 1 :]
        if plain and (live.shape, live.dtype, live.stride()) == (state.shape, state.dtype, strides):
            live.detach().copy_(state)
            return live
        if id(state) not in self.copies:
            device = self.device(state, path)
            if pattern is None:
                self.copies[id(state)] = state.to(device, copy=True)
            else:
                self.copies[id(state)] = torch.empty_like(pattern, dtype=state.dtype, device=device).copy_(state)
        return self.copies[id(state)]

    def _dict(self, state: dict[Any, Any], live: Any, path: Path) -> Any:
        known = live if isinstance(live, dict) else type(state)()
        self.made[path] = known
        values = {k: self.of(v, known.get(k) if k in known else None, (*path, k)) for k, v in state.items()}
        known.clear()
        known.update(values)
        return known

    def _list(self, state: list[Any], live: Any, path: Path) -> list[Any]:
        known = live if type(live) is list else []
        self.made[path] = known
        beside = [*known, *[None] * len(state)]
        values = [self.of(item, beside[i], (*path, i)) for i, item in enumerate(state)]
        # groups that were added to an inner optimizer since are the user's, and stay
        added = known[len(state) :] if path and path[-1] == "param_groups" else []
        known[:] = [*values, *added]
        return known

    def _mark(self, state: Mark, live: Any, path: Path) -> Any:
        match state.kind:
            case "parameter":
                return self._parameter(state.body)
            case "identity":
                return id(self._parameter(state.body))
            case "same":
                return self.made[tuple(state.body)]
            case "live":
                return live
            case "kept":
                return state.body
            case "code":
                return self._code(state.body, live, path)
            case "own":
                return self._own(state.body, live, path)
            case "items":
                return self._items(state.body, live, path)
            case "subclass":
                return self._subclass(state.body, live, path)
            case "shard":
                return self._shard(state.body, live, path)
            case "enum":
                kind, member = state.body
                return self._class(kind, type(live), path, enum.Enum)[member]  # type: ignore[index]
            case "generator":
                return _generator(state.body, live)
            case "tuple":
                kind, values = state.body
                beside = live if isinstance(live, tuple) and len(live) == len(values) else (None,) * len(values)
                items = [self.of(v, o, (*path, i)) for i, (v, o) in enumerate(zip(values, beside, strict=True))]
                return self._class(kind, type(live), path, tuple)(*items)
            case "object":
                return self._object(state.body, live, path)
        raise CheckpointError(f"{describe_path(path)} is a {state.kind!r}, which this version does not know")

    def _parameter(self, name: str) -> Tensor:
        if name not in self.parameters:
            raise CheckpointError(f"the optimizer's state belongs to a parameter {name!r} that is not there any more")
        return self.parameters[name]

    def _code(self, name: str, live: Any, path: Path) -> Any:
        if live is not None:
            return live
        found = self._found(name)
        if found is None:
            raise CheckpointError(f"{describe_path(path)} is {name}, which this run's optimizer does not have")
        return found

    def _own(self, saved: Tensor, live: Any, path: Path) -> Tensor:
        value = self._tensor(saved, live, path)
        return (
            value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=value.is_floating_point())
        )

    def _shard(self, body: list[Any], live: Any, path: Path) -> Tensor:
        saved, shape = body
        there = live if is_sharded(live) and list(live.shape) == shape else None
        pattern = there if there is not None else self.spread(path)
        if pattern is None or not is_sharded(pattern) or list(pattern.shape) != shape:
            raise CheckpointError(f"{describe_path(path)} is a part of a sharded tensor, which this run's is not")
        part = self._tensor(saved, None if there is None else local(there), path)
        if part.shape != local(pattern).shape:
            raise CheckpointError(f"{describe_path(path)} is another rank's part of its tensor, or of other ranks")
        return there if there is not None and part is local(there) else like_shard(part, pattern)

    def _items(self, body: list[Any], live: Any, path: Path) -> Any:
        kind, pairs = body
        if kind == "set":
            return {self.of(item, None, (*path, "in")) for item in pairs}
        known = live if isinstance(live, dict) else _mapping(kind)
        self.made[path] = known
        keys = list(known)
        values: dict[Any, Any] = {}
        for i, (saved_key, saved) in enumerate(pairs):
            key = self.of(saved_key, keys[i] if i < len(keys) else None, (*path, i, "key"))
            place = key if type(saved_key) in _SIMPLE else i
            values[key] = self.of(saved, known.get(key) if key in known else None, (*path, place))
        known.clear()
        known.update(values)
        return known

    def _subclass(self, body: list[Any], live: Any, path: Path) -> Any:
        kind, inner, context, shape, stride = body
        found = self._class(kind, type(live), path, Tensor)
        same = type(live) is found and tuple(getattr(live, "shape", ())) == tuple(shape)
        values = {k: self.of(v, getattr(live, k, None) if same else None, (*path, k)) for k, v in inner.items()}
        if same and all(values[name] is getattr(live, name, None) for name in values):
            assert isinstance(live, Tensor)
            return live
        about = self.of(context, None, (*path, "context"))
        made = found.__tensor_unflatten__(values, about, torch.Size(shape), tuple(stride))  # type: ignore[attr-defined]
        assert isinstance(made, Tensor)
        return made

    def _object(self, body: list[Any], live: Any, path: Path) -> Any:
        name, saved = body
        kind = self._class(name, type(live), path)
        value = live if type(live) is kind else object.__new__(kind)
        self.made[path] = value
        known = attributes(value) or {}
        values = {}
        for attribute, state in saved.items():
            code = isinstance(state, Mark) and state.kind in ("code", "live")
            if code and known.get(attribute) is None and (state.kind == "live" or self._found(state.body) is None):
                continue  # a hook or a wrapper of that process
            values[attribute] = self.of(state, known.get(attribute), (*path, attribute))
        for attribute, old in known.items():
            if attribute not in saved and not isinstance(old, NO_STATE):
                _remove(value, attribute)
        for attribute, new in values.items():
            _put(value, attribute, new)
        if isinstance(value, Optimizer) and value is not live:
            value.__setstate__({})  # the hooks that every optimizer has
        return value

    def _class(self, name: str, live: type, path: Path, base: type = object) -> type:
        found = live if type_name(live) == name else self._found(name)
        if not isinstance(found, type) or not issubclass(found, base):
            raise CheckpointError(
                f"{describe_path(path)} is a {name.replace(':', '.')} in the checkpoint and a "
                f"{type_name(live).replace(':', '.')} in this run"
            )
        return found

    def _found(self, name: str) -> Any:
        """What is already imported under a name, if it is of a package that may be trusted; else None."""
        module, _, qualified = name.partition(":")
        trusted = module.split(".")[0] in self.packages or module.startswith("torch.optim")
        if not trusted or module not in sys.modules:
            return None
        found: Any = sys.modules[module]
        for part in qualified.split("."):
            found = vars(found).get(part) if hasattr(found, "__dict__") else None
        return found


def _mapping(kind: str) -> dict[Any, Any]:
    kinds: dict[str, type[dict[Any, Any]]] = {"OrderedDict": collections.OrderedDict, "Counter": collections.Counter}
    return collections.defaultdict(dict) if kind == "defaultdict" else kinds.get(kind, dict)()


def _generator(body: list[Any], live: Any) -> Any:
    kind, state = body
    if kind == "torch":
        generator = live if isinstance(live, torch.Generator) else torch.Generator()
        generator.set_state(state)
        return generator
    if kind == "python":
        version, words, gauss = state
        source = live if isinstance(live, random.Random) else random.Random()
        source.setstate((version, tuple(words), gauss))
        return source
    drawn = live if isinstance(live, np.random.Generator) else np.random.default_rng()
    drawn.bit_generator.state = state
    return drawn


def _put(value: Any, name: str, new: Any) -> None:
    if hasattr(value, "__dict__") and not _is_slot(value, name):
        vars(value)[name] = new
    else:
        object.__setattr__(value, name, new)


def _remove(value: Any, name: str) -> None:
    if hasattr(value, "__dict__") and name in vars(value):
        del vars(value)[name]
    else:
        object.__delattr__(value, name)


def _is_slot(value: Any, name: str) -> bool:
    return isinstance(vars(type(value)).get(name), types.MemberDescriptorType)


class PlainState:
    """State of a scheduler that has no ``state_dict``: its attributes that are plain values."""

    def __init__(self, scheduler: Any) -> None:
        """Bind to it."""
        self.scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, tensors, and lists and dicts of them."""
        return {name: value for name, value in vars(self.scheduler).items() if _is_plain(value)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        vars(self.scheduler).update(state_dict)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | Tensor)


def stateful(scheduler: Any) -> HasState:
    """The scheduler, or a view of it that has a state."""
    if hasattr(scheduler, "state_dict") and hasattr(scheduler, "load_state_dict"):
        known: HasState = scheduler
        return known
    return PlainState(scheduler)


class HasState(Protocol):
    """Anything with a state: learning-rate schedulers, gradient scalers, sampler objects."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Take the state back."""
