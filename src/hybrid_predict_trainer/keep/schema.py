"""Whether a state has the form of a live one: checked leaf by leaf before anything is changed.

A state says what it is by example: the live object's own ``state_dict``.  A number must be a number of the same kind, a
text a text, a tensor one of the same type and number of dimensions.  What is None on either side may be anything, since
much is None until it is known; lists may have any length, their items must be of one kind.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from ..records import CheckpointError
from ..version import PACKAGE
from .object_state import attributes
from .state_tree import Mark, describe_path

Path = tuple[object, ...]

#: States of the user's own objects: there a count may have become a fraction.
LOOSE = ("optimizer", "scheduler", "scaler")


#: Declared types of fields that are checked, and what they may hold.
DECLARED: dict[str, tuple[type, ...]] = {
    "int": (int, np.integer), "float": (int, float, np.number), "bool": (bool, np.bool_), "str": (str,),
    "Tensor": (Tensor,),
}  # fmt: skip
#: How deep objects are looked into: run, a component, its list, a record, a record of that.
MAX_LEVELS = 8

#: A list of so many items at most has a place for each: a step and its loss.
RECORD = 8


def check(saved: Any, live: Any, path: Path, *, free: Collection[str] = ()) -> None:
    """Compare the form of two states.

    Args:
        saved: As read.
        live: As the live object would be saved.
        path: Where this is, for the message.
        free: Keys whose dicts hold whatever was learnt: only what both have is compared.

    Raises:
        CheckpointError: they differ; the message names the first place.
    """
    if saved is None or live is None:
        return
    if isinstance(live, dict):
        _check_dict(saved, live, path, free)
    elif isinstance(live, list | tuple):
        if not isinstance(saved, list | tuple):
            raise _error(path, _word(saved), "a list")
        _check_items(saved, live, path, free)
    elif isinstance(live, Tensor):
        if path[0] in LOOSE and live.dim() == 0 and _kind(saved) == "a number":
            return
        if not isinstance(saved, Tensor):
            raise _error(path, _word(saved), "a tensor")
        if (saved.dtype, saved.dim()) != (live.dtype, live.dim()):
            raise _error(path, f"{saved.dtype} {list(saved.shape)}", f"{live.dtype} {list(live.shape)}")
    elif path[0] in LOOSE and isinstance(saved, Tensor) and saved.dim() == 0 and _kind(live) == "a number":
        return
    elif _kind(saved) != _kind(live) or (type(live) is int and path[0] not in LOOSE and not _is_whole(saved)):
        raise _error(path, _word(saved), _word(live))


def _check_dict(saved: Any, live: Mapping[Any, Any], path: Path, free: Collection[str]) -> None:
    if not isinstance(saved, dict):
        raise _error(path, _word(saved), "a table")
    # groups get more settings at the first step
    if path[0] != "optimizer" and path[-1] not in free and live and saved:
        texts = all(type(key) is str for key in live)
        for key in live if texts else ():
            if key not in saved:
                raise _error((*path, key), "missing", _word(live[key]))
        for key in saved if texts else ():
            if key not in live:
                raise _error((*path, key), _word(saved[key]), "nothing")
    for key, value in live.items():
        if key in saved:
            check(saved[key], value, (*path, key), free=free)


def _check_items(saved: Any, live: Any, path: Path, free: Collection[str]) -> None:
    if path[0] == "optimizer" and type(live) is tuple and len(saved) != len(live):
        raise _error(path, f"{len(saved)} values", f"{len(live)} values")
    records = len(saved) == len(live) <= RECORD or (live and type(live) is tuple)
    if records or (len(saved) == len(live) and any(isinstance(item, Tensor) for item in live)):
        for i, (item, beside) in enumerate(zip(saved, live, strict=False)):
            check(item, beside, (*path, i), free=free)
        return
    example = next((item for item in live if item is not None), None)
    kinds = [_kind(item) for item in (*live, *saved) if item is not None]
    usual = max(kinds, key=kinds.count, default=None)
    for i, item in enumerate(saved):
        if item is not None and _kind(item) != usual and len({_kind(item) for item in live} - {None}) < 2:
            raise _error((*path, i), _word(item), f"like its neighbours ({usual})")
        if item is None and usual == "a number" and None not in live:
            raise _error((*path, i), "missing", "a number")
        if isinstance(item, dict | list | tuple) and isinstance(example, dict | list | tuple):
            check(item, example, (*path, i), free=free)


def form(state: Any) -> str:
    """Digest of what a state is made of: keys, types, lengths, and shapes of tensors, but no values.

    It is written beside the state, so that a checkpoint in which something was exchanged or left out after it was
    written is found out, whatever the live objects look like.
    """
    digest = hashlib.sha256()
    for piece in _pieces(state):
        digest.update(piece.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield "{"
        for key in sorted(value, key=repr):
            yield f"{key!r}:"
            yield from _pieces(value[key])
        yield "}"
    elif isinstance(value, list | tuple | deque):
        yield type(value).__name__
        for item in value:
            yield from _pieces(item)
        yield ")"
    elif isinstance(value, Tensor | np.ndarray):
        yield f"{value.dtype}{list(value.shape)}"
    elif isinstance(value, Mark):
        yield value.kind
        yield from _pieces(value.body)
    elif isinstance(value, set | frozenset):
        yield f"{type(value).__name__}{len(value)}"
    else:
        yield f"{type(value).__name__};"


def check_fields(value: Any, path: Path = ("run",), seen: set[int] | None = None, depth: int = 0) -> None:
    """Check the numbers and texts of all records that hang on an object against their declared types.

    Args:
        value: An object of the library; its attributes and their items are looked at, a few levels deep.
        path: Where it is, for the message.
        seen: Objects looked at so far.
        depth: Levels so far.

    Raises:
        TypeError: a field is not what it is declared as.
    """
    seen = set() if seen is None else seen
    if id(value) in seen or depth > MAX_LEVELS or isinstance(value, Tensor | np.ndarray | str | int | float):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list | tuple | deque):
        items = list(enumerate(value))
    elif type(value).__module__.partition(".")[0] == PACKAGE:
        items = list((attributes(value) or {}).items())
        if dataclasses.is_dataclass(value):
            _check_record(value, path)
    else:
        return
    for key, item in items:
        check_fields(item, (*path, key), seen, depth + 1)


def _check_record(value: Any, path: Path) -> None:
    for field in dataclasses.fields(value):
        declared = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        legal = DECLARED.get(declared.removesuffix(" | None"))
        found = getattr(value, field.name, None)
        if legal is None or (found is None and declared.endswith(" | None")):
            continue
        if not isinstance(found, legal) or (declared[:3] in ("int", "flo") and isinstance(found, bool)):
            raise TypeError(f"{describe_path((*path, field.name))} is {_word(found)}, declared {declared}")


def _kind(value: Any) -> str | None:
    """What a value is; numbers are numbers, of whatever library (a schedule of numpy's makes a rate one of numpy's)."""
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        return "true or false"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int | float | np.number):
        return "a number"
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer)


def _word(value: Any) -> str:
    kind = _kind(value)
    return f"{value!r:.40}" if isinstance(value, bool | int | float | str) else str(kind)


def _error(path: Path, saved: str, live: str) -> CheckpointError:
    return CheckpointError(f"{describe_path(path)} is {saved} in the checkpoint and {live} in this run")
