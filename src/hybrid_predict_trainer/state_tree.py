"""State <-> (JSON tree, named tensors), exactly and without pickle.

``encode`` splits a nested state into a tree that JSON can hold and a flat dict of tensors that
safetensors can hold; ``decode`` puts them together again.  What JSON cannot say is wrapped in an
object with one key that starts with ``$``::

    {"$tensor": "layer.weight"}    a tensor, by its name in the safetensors file
    {"$complex": "layer.phase"}    the same, stored as pairs of reals
    {"$tuple": [...]}              a tuple
    {"$items": [[key, value]]}     a dict with a key that is an int or starts with "$"
    {"$counter": [[key, value]]}   a collections.Counter, which MultiStepLR keeps in its state
    {"$int": "0x..."}              an int beyond 2**53, which other JSON readers would round
    {"$float": "7ff8..."}          nan, inf: the eight bytes of the IEEE double, big end first
    {"$str": "..."}                a string with lone surrogates, as hexadecimal UTF-8
"""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .records import CheckpointError

#: What ``json.dumps(..., allow_nan=False)`` takes.
Json = Any

#: Deeper nesting is a mistake (a container that holds itself) or an attack on the parser; arbitrary.
MAX_DEPTH = 100

#: Beyond this a JSON reader that knows only doubles no longer keeps an int apart from its neighbours.
MAX_JSON_INT = 2**53

#: Types that safetensors stores as they are.
STORED_DTYPES = frozenset(
    {
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    }
)
#: Types that safetensors lacks and that are stored as pairs of reals.
PAIRED_DTYPES = frozenset({torch.complex128})

_HINTS = {
    "set": "use a sorted list",
    "frozenset": "use a sorted list",
    "bytes": "use a uint8 tensor",
    "ndarray": "use torch.from_numpy(value)",
    "Size": "use tuple(value)",
    "dtype": "use its name",
    "device": "use str(value)",
}


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
        state = _decode(tree, tensors, used, 0)
    except (TypeError, KeyError, OverflowError, RuntimeError, struct.error) as error:
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
        for name, leaf in (tree.items() if isinstance(tree, dict) else ())
        if isinstance(leaf, dict) and leaf.keys() == {"$tensor"} and leaf["$tensor"] != name
    }
    save_file(dict(tensors), path, metadata={**ties, "format": "pt"})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into memory of its own, free of the file.

    Raises:
        OSError, SafetensorError: the file cannot be read.
    """
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def check_compatible(saved: Mapping[str, Tensor | TensorSpec], live: Mapping[str, Tensor | TensorSpec]) -> None:
    """Compare names, shapes and types of a saved model state with those of the live model.

    Raises:
        CheckpointError: they differ; the message lists at most five differences of each kind.
    """
    both = [(name, _spec_text(saved[name]), _spec_text(live[name])) for name in live if name in saved]
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


def describe_path(path: tuple[object, ...]) -> str:
    """How a reader would index the value: ``state['optimizer'][0]``."""
    return "state" + "".join(f"[{key!r}]" for key in path)


class _Tensors:
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


def _encode(value: object, path: tuple[object, ...], tensors: _Tensors) -> Json:
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
        name = tensors.add(value, path)
        return {"$complex" if value.dtype in PAIRED_DTYPES else "$tensor": name}
    if isinstance(value, list | tuple) and kind in (list, tuple):
        items = [_encode(item, (*path, i), tensors) for i, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if isinstance(value, dict) and kind in (dict, OrderedDict, Counter):
        return _encode_dict(value, path, tensors)
    hint = _hint(value)
    raise TypeError(f"{describe_path(path)} is a {_type_name(kind)}, which a checkpoint cannot hold{hint}")


def _encode_dict(value: dict[Any, Any], path: tuple[object, ...], tensors: _Tensors) -> Json:
    for key in value:
        if type(key) not in (str, int):
            raise TypeError(f"{describe_path(path)} has the key {key!r}; only str and int keys can be saved")
    plain = all(type(key) is str and _is_utf8(key) and not key.startswith("$") for key in value)
    items = [(key, _encode(item, (*path, key), tensors)) for key, item in value.items()]
    if plain and type(value) is not Counter:
        return dict(items)
    return {
        "$counter" if type(value) is Counter else "$items": [[_encode(key, path, tensors), item] for key, item in items]
    }


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
        raise refuse(f"a tensor of type {tensor.dtype}")


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
    match tag:
        case "$tensor" | "$complex":
            if body not in used:
                stored = tensors[body]
                used[body] = torch.view_as_complex(stored) if tag == "$complex" else stored
            return used[body]
        case "$tuple":
            return tuple(_decode(item, tensors, used, depth + 1) for item in body)
        case "$items" | "$counter":
            items = {}
            for key_tree, item in body:
                key = _decode(key_tree, {}, {}, depth + 1)
                if type(key) not in (str, int):
                    raise ValueError(f"malformed state tree: a {_type_name(type(key))} as a key")
                items[key] = _decode(item, tensors, used, depth + 1)
            return items if tag == "$items" else Counter(items)
        case "$int":
            return int(body, 16)
        case "$float":
            (number,) = struct.unpack(">d", bytes.fromhex(body))
            return number
        case "$str":
            return bytes.fromhex(body).decode("utf-8", "surrogatepass")
    raise ValueError(f"malformed state tree: unknown tag {tag!r}")


def _spec_text(tensor: Tensor | TensorSpec) -> str:
    spec = TensorSpec.of(tensor) if isinstance(tensor, Tensor) else tensor
    return f"{spec.dtype} {list(spec.shape)}"


def _is_utf8(text: str) -> bool:
    # json would write a surrogate pair of two characters and read it back as one.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _hint(value: object) -> str:
    if hint := _HINTS.get(type(value).__name__):
        return f"; {hint}"
    for base in (str, float, int, tuple, dict, list):
        if isinstance(value, base):
            return f"; use {base.__name__}(value)"
    return ""


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
