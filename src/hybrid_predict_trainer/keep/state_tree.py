"""State <-> (JSON tree, named tensors), exactly and without pickle.

``encode`` splits a nested state into a tree that JSON can hold and a flat dict of tensors that
safetensors can hold; ``decode`` puts them together again.  What JSON cannot say is wrapped in an
object with one key that starts with ``$``::

    {"$tensor": "layer.weight"}           a tensor, by its name in the safetensors file
    {"$complex": "layer.phase"}           the same, stored as pairs of reals
    {"$equal": ["stored", "own"]}         a tensor of its own with the contents of one that is stored (``merged``)
    {"$narrow": [tree, {name: shape}]}    at the root alone: float64 tensors in fewer bytes (``narrowed``)
    {"$strided": [tensor, [1, 4]]}        a dense tensor whose memory is in another order, by its strides
    {"$array": [tensor, "<f4", [2, 3]]}   a numpy array: its bytes, its dtype and its shape
    {"$tuple": [...]}                     a tuple; likewise $set, $frozenset
    {"$deque": [[...], 5]}                a collections.deque and its maxlen
    {"$items": [[key, value]]}            a dict with a key that is no string or starts with "$"
    {"$counter": [[key, value]]}          a collections.Counter, which MultiStepLR keeps in its state
    {"$defaultdict": ["dict", [...]]}     a collections.defaultdict and the name of its factory
    {"$int": "0x..."}                     an int beyond 2**53, which other JSON readers would round
    {"$float": "7ff8..."}                 nan, inf: the eight bytes of the IEEE double, big end first
    {"$str": "..."}                       a string with lone surrogates, as hexadecimal UTF-8
    {"$mark": ["object", ...]}            a :class:`Mark`, whose meaning is its writer's

and the values of ``plain_values`` by their own tags.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..records import CheckpointError
from .merged import check_growth
from .narrowed import widened
from .plain_values import NUMPY_KINDS, TYPES, decode_value, encode_value, numpy_dtype

#: What ``json.dumps(..., allow_nan=False)`` takes.
Json = Any

#: Deeper nesting is a mistake (a container that holds itself) or an attack on the parser; arbitrary.
MAX_DEPTH = 100

#: Beyond this a JSON reader that knows only doubles no longer keeps an int apart from its neighbours.
MAX_JSON_INT = 2**53

#: Types that safetensors stores as they are, its newest version all of them.
NEWEST_DTYPES = frozenset(
    {
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    }
)
#: Those that the installed version stores: 0.4.5 knows neither complex numbers nor most of the unsigned ones.
STORED_DTYPES = NEWEST_DTYPES & frozenset(getattr(safetensors.torch, "_SIZE", NEWEST_DTYPES))
#: Types that it lacks and that are stored as pairs of reals.
PAIRED_DTYPES = frozenset({torch.complex64, torch.complex128}) - STORED_DTYPES

#: Types of keys that come back exactly.
KEY_TYPES = (str, int, bool, float, type(None), bytes, tuple)


@dataclass(frozen=True, slots=True)
class Mark:
    """What stands in a state for something that is not plain data: its writer gives it back its meaning."""

    kind: str
    body: Any


def encode(state: object) -> tuple[Json, dict[str, Tensor]]:
    """Split a state into a JSON tree and contiguous CPU tensors that share no storage.

    Values and types come back exactly from :func:`decode`, but for three things which are not state:
    an ``OrderedDict`` comes back as a dict, a ``Parameter`` as a plain tensor, and every tensor on
    the CPU without a gradient history.  A tensor that appears twice (tied weights) is stored once
    and comes back as one object; views that merely overlap are copied.

    Raises:
        TypeError: a value or key that is not plain data, named by its place in the tree.
        ValueError: nesting deeper than ``MAX_DEPTH``.
    """
    tensors = _Tensors()
    return _encode(state, (), tensors), tensors.named


def decode(tree: Json, tensors: Mapping[str, Tensor]) -> Any:
    """Put a tree and its tensors together again: the inverse of :func:`encode`.

    The tree may come from an untrusted file: it can only ever build the plain types above.

    Raises:
        ValueError: the tree is malformed, or a tensor is missing or left over.
    """
    used: dict[str, Tensor] = {}
    try:
        num_stored = sum(tensor.nbytes for tensor in tensors.values())
        tree, tensors = widened(tree, tensors)
        check_growth(tree, tensors, num_stored)
        state = _decode(tree, tensors, used, 0)
    except (TypeError, LookupError, OverflowError, RuntimeError, struct.error) as error:
        raise ValueError(f"malformed state tree: {error}") from error
    if left_over := sorted(tensors.keys() - used.keys()):
        raise ValueError(f"tensors that the state tree does not mention: {', '.join(left_over[:5])}")
    return state


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Type and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """What a manifest says of ``tensor``."""
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def write_tensors(path: Path, tree: Json, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file that other programs can load as a plain state dict.

    The header records ties of a flat dict as ``safetensors.torch.save_model`` does: the name left
    out -> the name that holds the data.

    Raises:
        OSError, SafetensorError: the disk refused.
    """
    ties = {
        name: leaf["$tensor"]
        for name, leaf in ((name, _unstrided(leaf)) for name, leaf in (tree.items() if isinstance(tree, dict) else ()))
        if isinstance(leaf, dict) and leaf.keys() == {"$tensor"} and leaf["$tensor"] != name
    }
    save_file(dict(tensors), path, metadata={**ties, "format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into memory of its own, free of the file.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def check_compatible(saved: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    """Compare names, shapes and types of a saved model state with those of the live model.

    What is no tensor, a module's extra state, is the module's own to judge: only its name must be there.

    Raises:
        CheckpointError: they differ; the message lists at most five differences of each kind.
    """
    both = [(name, _spec_text(saved[name]), _spec_text(live[name])) for name in live if name in saved]
    both = [(name, old, new) for name, old, new in both if old is not None and new is not None]
    differences = {
        "missing in the checkpoint": [name for name in live if name not in saved],
        "unknown to the model": [name for name in saved if name not in live],
        "different": [f"{name} (saved {old}, model {new})" for name, old, new in both if old != new],
    }
    lines = [
        f"{kind}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for kind, names in differences.items()
        if names
    ]
    if lines:
        raise CheckpointError("the checkpoint belongs to another model; " + "; ".join(lines))


def check_plain(state: object) -> None:
    """Raise as :func:`encode` would, without copying a tensor.

    Raises:
        TypeError, ValueError: see :func:`encode`.
    """
    _encode(state, (), _Names())


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps or overlaps, in whatever order of dimensions."""
    return _are_dense(tensor.shape, tensor.stride())


def describe_path(path: tuple[object, ...]) -> str:
    """How a reader would index the value: ``state['optimizer'][0]``."""
    return "state" + "".join(f"[{key!r}]" for key in path)


class _Names:
    """Names for tensors that are only checked."""

    def add(self, tensor: Tensor, path: tuple[object, ...]) -> str:
        return ""


class _Tensors(_Names):
    """Collects the tensors of one state under unique names, each once."""

    def __init__(self) -> None:
        self.named: dict[str, Tensor] = {}
        self._names: dict[tuple[object, ...], str] = {}
        self._storages: set[int] = set()

    def add(self, tensor: Tensor, path: tuple[object, ...]) -> str:
        view = (
            *(tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()),
            *(tensor.is_conj(), tensor.is_neg()),
        )
        # Empty tensors all have the null pointer; they are not tied.
        if tensor.numel() and view in self._names:
            return self._names[view]
        # Bytes of an overlapping view would otherwise be refused by safetensors.
        stored = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        storage = stored.untyped_storage().data_ptr()
        if stored.numel() and storage in self._storages:
            stored = stored.clone(memory_format=torch.contiguous_format)
            storage = stored.untyped_storage().data_ptr()
        name = self._unique(".".join(map(str, path)))
        self.named[name] = torch.view_as_real(stored) if stored.dtype in PAIRED_DTYPES else stored
        self._names[view] = name
        self._storages.add(storage)
        return name

    def _unique(self, name: str) -> str:
        # {"a": {"b": t}} and {"a.b": t} meet here; a flat dict of tensors keeps its names, because
        # its keys differ from each other.  "__metadata__" is taken by the safetensors header.
        name = name.encode("utf-8", "replace").decode("utf-8")
        unique, count = name, 1
        while unique in self.named or unique == "__metadata__":
            count += 1
            unique = f"{name}#{count}"
        return unique


def _encode(value: object, path: tuple[object, ...], tensors: _Names) -> Json:
    if len(path) > MAX_DEPTH:
        raise ValueError(f"{describe_path(path[:5])}... is nested deeper than {MAX_DEPTH}, or holds itself")
    # Exact types: a subclass (an enum, np.float64, a namedtuple) would come back as its base.
    kind = type(value)
    if value is None or kind is bool:
        return value
    if isinstance(value, str) and kind is str:
        return value if _is_utf8(value) else {"$str": value.encode("utf-8", "surrogatepass").hex()}
    if isinstance(value, int) and kind is int:
        return value if abs(value) <= MAX_JSON_INT else {"$int": hex(value)}
    if isinstance(value, float) and kind is float:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        _check_tensor(value, path)
        tag = "$complex" if value.dtype in PAIRED_DTYPES else "$tensor"
        leaf = {tag: tensors.add(value, path)}
        usual = value.stride() == _usual_strides(value.shape) or not is_dense(value)
        return leaf if usual else {"$strided": [leaf, list(value.stride())]}
    if isinstance(value, list | tuple | deque) and kind in (list, tuple, deque):
        items = [_encode(item, (*path, i), tensors) for i, item in enumerate(value)]
        if isinstance(value, deque):
            return {"$deque": [items, value.maxlen]}
        return items if kind is list else {"$tuple": items}
    if isinstance(value, dict) and kind in (dict, OrderedDict, Counter, defaultdict):
        return _encode_dict(value, path, tensors)
    if isinstance(value, set | frozenset) and kind in (set, frozenset):
        items = sorted((_encode(item, path, tensors) for item in value), key=json.dumps)
        return {f"${kind.__name__}": items}
    if isinstance(value, np.ndarray) and kind is np.ndarray and value.dtype.kind in NUMPY_KINDS:
        content = torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
        return {"$array": [{"$tensor": tensors.add(content, path)}, value.dtype.str, list(value.shape)]}
    if isinstance(value, Mark) and kind is Mark:
        return {"$mark": [value.kind, _encode(value.body, (*path, value.kind), tensors)]}
    if (plain := encode_value(value)) is not None:
        return plain
    hint = _hint(value)
    raise TypeError(f"{describe_path(path)} is a {_type_name(kind)}, which a checkpoint cannot hold{hint}")


def _encode_dict(value: dict[Any, Any], path: tuple[object, ...], tensors: _Names) -> Json:
    for key in value:
        if not _is_key(key):
            raise TypeError(
                f"{describe_path(path)} has the key {_short(key)}; only text, numbers and tuples of them can be keys"
            )
    plain = all(type(key) is str and _is_utf8(key) and not key.startswith("$") for key in value)
    items = [(key, _encode(item, (*path, key), tensors)) for key, item in value.items()]
    if plain and type(value) in (dict, OrderedDict):
        return dict(items)
    pairs = [[_encode(key, path, tensors), item] for key, item in items]
    if isinstance(value, defaultdict):
        factory = value.default_factory
        name = None if factory is None else getattr(factory, "__name__", "")
        if factory is not None and TYPES.get(name or "") is not factory:
            raise TypeError(f"{describe_path(path)} is a defaultdict of {_short(factory)}; use a dict")
        return {"$defaultdict": [name, pairs]}
    return {"$counter" if type(value) is Counter else "$items": pairs}


def _is_key(key: object) -> bool:
    if isinstance(key, tuple) and type(key) is tuple:
        return all(map(_is_key, key))
    return type(key) in KEY_TYPES


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _usual_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _are_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1):
        if stride != step:
            return False
        step *= size
    return all(size > 0 for size in shape)


def _unstrided(leaf: Json) -> Json:
    return leaf["$strided"][0] if isinstance(leaf, dict) and leaf.keys() == {"$strided"} else leaf


def _restrided(stored: Tensor, strides: Sequence[int]) -> Tensor:
    if len(strides) != stored.dim() or any(type(s) is not int or s < 0 for s in strides):
        raise ValueError("malformed state tree: strides of another tensor")
    if not _are_dense(stored.shape, strides):
        raise ValueError("malformed state tree: strides with gaps")
    return torch.empty_strided(stored.shape, strides, dtype=stored.dtype).copy_(stored)


def _array(stored: Tensor, dtype: object, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    content = stored.numpy().tobytes()
    return np.frombuffer(content, numpy_dtype(dtype)).reshape(tuple(map(int, shape))).copy()


def _check_tensor(tensor: Tensor, path: tuple[object, ...]) -> None:
    def refuse(what: str) -> TypeError:
        return TypeError(f"{describe_path(path)} is {what}, which a checkpoint cannot hold")

    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise refuse(f"a {_type_name(type(tensor))}, a subclass of Tensor")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise refuse("a sparse or nested tensor")
    if tensor.device.type == "meta":
        raise refuse("a tensor without data (device meta)")
    if tensor.dtype not in STORED_DTYPES | PAIRED_DTYPES:
        newer = f" with safetensors {safetensors.__version__}; a newer one can" if tensor.dtype in NEWEST_DTYPES else ""
        raise TypeError(f"{refuse(f'a tensor of type {tensor.dtype}')}{newer}")


def _decode(tree: Json, tensors: Mapping[str, Tensor], used: dict[str, Tensor], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("state tree nested too deep")
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, list):
        return [_decode(item, tensors, used, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        raise ValueError(f"malformed state tree: {_type_name(type(tree))}")
    if not any(key.startswith("$") for key in tree):
        return {key: _decode(item, tensors, used, depth + 1) for key, item in tree.items()}
    ((tag, body),) = tree.items()

    def items_of(trees: Any) -> list[Any]:
        return [_decode(item, tensors, used, depth + 1) for item in trees]

    match tag:
        case "$tensor" | "$complex":
            if body not in used:
                stored = tensors[body]
                used[body] = torch.view_as_complex(stored) if tag == "$complex" else stored
            return used[body]
        case "$equal":
            stored_as, own = body
            if own in tensors:
                raise ValueError(f"malformed state tree: {own!r} is stored and equal to another one")
            if own not in used:  # a tied one comes back as one object
                used[own] = tensors[stored_as].clone()
            return used[own]
        case "$strided":
            name = json.dumps(tree)  # a tied one comes back as one object, too
            if name not in used:
                used[name] = _restrided(_decode(body[0], tensors, used, depth), body[1])
            return used[name]
        case "$array":
            return _array(_decode(body[0], tensors, used, depth), body[1], body[2])
        case "$tuple":
            return tuple(items_of(body))
        case "$set" | "$frozenset":
            return (set if tag == "$set" else frozenset)(items_of(body))
        case "$deque":
            return deque(items_of(body[0]), maxlen=body[1])
        case "$items" | "$counter" | "$defaultdict":
            return _decode_items(tag, body, tensors, used, depth)
        case "$mark":
            kind, inner = body
            if not isinstance(kind, str):
                raise ValueError("malformed state tree: a mark without a kind")
            return Mark(kind, _decode(inner, tensors, used, depth + 1))
        case "$int":
            return int(body, 16)
        case "$float":
            (number,) = struct.unpack(">d", bytes.fromhex(body))
            return number
        case "$str":
            return bytes.fromhex(body).decode("utf-8", "surrogatepass")
    return decode_value(tag, body)


def _decode_items(
    tag: str, body: Any, tensors: Mapping[str, Tensor], used: dict[str, Tensor], depth: int
) -> dict[Any, Any]:
    factory, pairs = body if tag == "$defaultdict" else (None, body)
    items = {}
    for key_tree, item in pairs:
        key = _decode(key_tree, {}, {}, depth + 1)
        if not _is_key(key):
            raise ValueError(f"malformed state tree: a {_type_name(type(key))} as a key")
        items[key] = _decode(item, tensors, used, depth + 1)
    if tag == "$defaultdict":
        return defaultdict(None if factory is None else TYPES[factory], items)
    return items if tag == "$items" else Counter(items)


def _spec_text(value: object) -> str | None:
    spec = TensorSpec.of(value) if isinstance(value, Tensor) else value
    return f"{spec.dtype} {list(spec.shape)}" if isinstance(spec, TensorSpec) else None


def _is_utf8(text: str) -> bool:
    # json would write a surrogate pair of two characters and read it back as one.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _hint(value: object) -> str:
    for base in (str, float, int, tuple, dict, list):
        if isinstance(value, base):
            return f"; use {base.__name__}(value)"
    return ""


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
