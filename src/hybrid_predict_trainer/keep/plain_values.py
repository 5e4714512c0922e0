"""Values that a state may hold beside numbers, strings and tensors, as JSON and back.

Each is wrapped in an object with one key that starts with ``$``::

    {"$bytes": "0aff"}                   bytes, as hexadecimal text
    {"$number": ["<real>", "<imag>"]}    a complex number: two IEEE doubles, big end first
    {"$numpy": ["<f4", "0000803f"]}      a numpy scalar: its dtype and its bytes
    {"$numpy_dtype": "<f4"}              a numpy dtype
    {"$dtype": "float32"}                a torch dtype, layout or memory format
    {"$device": "cuda:0"}                a torch device
    {"$size": [2, 3]}                    a torch.Size
    {"$range": [0, 10, 2]}               a range
    {"$type": "float"}                   a class from ``TYPES``; no other class is ever named in a file

Nothing is imported or called to read them: what a file may name is in the tables below.
"""

from __future__ import annotations

import builtins
import struct
from typing import Any

import numpy as np
import torch

#: Kinds of numpy dtypes whose bytes are their value: no objects, no fields.
NUMPY_KINDS = "biufcSUmM"

#: Classes that a state may name.  A name is looked up here, and nowhere else.
TYPES: dict[str, type] = {
    **{t.__name__: t for t in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)},
    **{
        f"numpy.{t.__name__}": t
        for t in (
            *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
            *(np.float16, np.float32, np.float64, np.complex64, np.complex128),
        )
    },
}
_TYPE_NAMES = {t: name for name, t in TYPES.items()}

_TORCH_CONSTANTS: dict[str, Any] = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
}
_CONSTANT_NAMES = {str(value): name for name, value in _TORCH_CONSTANTS.items()}


def encode_value(value: object) -> dict[str, Any] | None:
    """The object that stands for a value, or None if it is none of those above."""
    kind = type(value)
    if isinstance(value, bytes) and kind is bytes:
        return {"$bytes": value.hex()}
    if isinstance(value, complex) and kind is complex:
        return {"$number": [struct.pack(">d", part).hex() for part in (value.real, value.imag)]}
    if isinstance(value, np.generic) and value.dtype.kind in NUMPY_KINDS and kind is value.dtype.type:
        return {"$numpy": [value.dtype.str, value.tobytes().hex()]}
    if isinstance(value, np.dtype) and value.kind in NUMPY_KINDS:
        return {"$numpy_dtype": value.str}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format) and str(value) in _CONSTANT_NAMES:
        return {"$dtype": _CONSTANT_NAMES[str(value)]}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    if isinstance(value, torch.Size):
        return {"$size": list(value)}
    if isinstance(value, range):
        return {"$range": [value.start, value.stop, value.step]}
    if isinstance(value, type) and value in _TYPE_NAMES:
        return {"$type": _TYPE_NAMES[value]}
    return None


def decode_value(tag: str, body: Any) -> Any:
    """Inverse of :func:`encode_value`.

    Raises:
        ValueError, TypeError, KeyError: the object is malformed or of an unknown tag.
    """
    match tag:
        case "$bytes":
            return bytes.fromhex(body)
        case "$number":
            real, imag = (struct.unpack(">d", bytes.fromhex(part))[0] for part in body)
            return complex(real, imag)
        case "$numpy":
            dtype, content = body
            (scalar,) = np.frombuffer(bytes.fromhex(content), numpy_dtype(dtype))
            return scalar
        case "$numpy_dtype":
            return numpy_dtype(body)
        case "$dtype":
            return _TORCH_CONSTANTS[body]
        case "$device":
            return torch.device(body)
        case "$size":
            return torch.Size(body)
        case "$range":
            start, stop, step = body
            return builtins.range(start, stop, step)
        case "$type":
            return TYPES[body]
    raise ValueError(f"malformed state tree: unknown tag {tag!r}")


def numpy_dtype(text: object) -> np.dtype[Any]:
    """A dtype of plain numbers or texts from its ``str``.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(text, str):
        raise ValueError(f"malformed state tree: {text!r} as a dtype")
    dtype = np.dtype(text)
    if dtype.kind not in NUMPY_KINDS or dtype.fields is not None or dtype.subdtype is not None:
        raise ValueError(f"malformed state tree: {text!r} as a dtype")
    return dtype
