"""Everything an optimizer remembers: taken, and put back bit for bit.

``optimizer.state[parameter]`` and the settings of the groups are kept as they always were, by the parameter's place.
What hangs on the optimizer besides (an inner optimizer, counts and averages under names of their own, attributes) is
walked by :mod:`.object_state`.  Where that walk meets something whose state it cannot tell, the optimizer's own
``state_dict`` and ``load_state_dict`` are used, if its class wrote them itself.

``Optimizer.load_state_dict`` is not used otherwise: it casts state to the parameter's dtype (wrong for float32 moments
of bfloat16 weights), makes every tensor anew, and knows nothing of what is kept outside ``state`` and groups.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..records import CheckpointError, StateDict
from ..weights.parameters import optimizer_parameters, parameter_names
from .object_state import Capture, OpaqueStateError, Path, Restore, attributes
from .state_tree import Mark, is_dense


@torch.no_grad()
def taken(
    model: nn.Module,
    optimizer: Optimizer,
    copied: Callable[[Tensor, Tensor | None], Tensor],
    old: StateDict | None = None,
) -> StateDict:
    """The state of an optimizer: plain containers, tensors and marks.

    Args:
        model: Names its parameters.
        optimizer: Any.
        copied: (tensor, an old copy of it or None) -> a copy.
        old: What an earlier call returned and is needed no more: its memory is written over.

    Raises:
        CheckpointError: it holds something whose state cannot be told; the message names it.
    """
    names = parameter_names(model, optimizer)
    before: Mapping[Path, Tensor] = {} if old is None else dict(_tensors(old))
    elsewhere: list[list[object]] = []

    def copy_of(tensor: Tensor, path: Path) -> Tensor:
        if tensor.device.type != "cpu":
            elsewhere.append(list(path))
        return copied(tensor, before.get(path))

    parameters = optimizer_parameters(optimizer)
    walk = Capture(names, copy_of)
    walk.stay = frozenset(map(id, model.modules()))
    state = {
        i: walk.of(optimizer.state[p], ("state", i)) for i, p in enumerate(parameters) if p in optimizer.state
    }  # fmt: skip
    groups = [
        {k: walk.of(v, ("groups", i, k)) for k, v in group.items() if k != "params"}
        for i, group in enumerate(optimizer.param_groups)
    ]
    rest, own = _rest(optimizer, walk)
    return {
        "state": state, "groups": groups, "names": [names[id(p)] for p in parameters],
        "sizes": [len(group["params"]) for group in optimizer.param_groups],
        "strides": [list(p.stride()) for p in parameters], "elsewhere": elsewhere,
        "on_cpu": [p.device.type == "cpu" for p in parameters], "rest": rest, "own": own,
    }  # fmt: skip


#: Without these attributes no optimizer steps, whatever a checkpoint lacks.
EVERY_OPTIMIZER_HAS = {"state", "param_groups", "defaults"}


def _rest(optimizer: Optimizer, walk: Capture) -> tuple[Any, Any]:
    """What hangs on the optimizer besides state and groups of its parameters; or its own state where that is hidden."""
    parameters = set(map(id, optimizer_parameters(optimizer)))
    keys = [key for key in optimizer.state if id(key) not in parameters]
    # what has been walked by now stays where another part of the optimizer holds the same object
    walk.stay |= _containers(optimizer, parameters)
    walk.alive += [optimizer, optimizer.state, optimizer.param_groups, *optimizer.param_groups]
    found = attributes(optimizer) or {}
    try:
        return {
            "keys": [[walk.of(k, ("keys", i, "key")), walk.of(optimizer.state[k], ("keys", i))]
                     for i, k in enumerate(keys)],
            "attributes": {name: walk.of(value, ("attributes", name)) for name, value in found.items()},
        }, None  # fmt: skip
    except OpaqueStateError:
        if not _has_its_own(optimizer):
            raise
        return None, copy.deepcopy(optimizer.state_dict())


def _containers(optimizer: Optimizer, parameters: set[int]) -> frozenset[int]:
    """Ids of the optimizer and of what holds its state and groups; ``parameters``: ids of its parameters."""
    held: list[Any] = [optimizer, optimizer.state, optimizer.param_groups, *optimizer.param_groups]
    held += [group["params"] for group in optimizer.param_groups]
    held += [value for key, value in optimizer.state.items() if id(key) in parameters]
    return frozenset(map(id, held))


def _has_its_own(optimizer: Optimizer) -> bool:
    kind = type(optimizer)
    return kind.state_dict is not Optimizer.state_dict and kind.load_state_dict is not Optimizer.load_state_dict


@torch.no_grad()
def restore(model: nn.Module, optimizer: Optimizer, saved: StateDict) -> None:
    """Write a state back in place, key by key, with exact dtypes and memory order.

    Groups and parameters that were added since are the user's: they keep what they have.

    Args:
        model: Names its parameters.
        optimizer: Of the same class, over parameters of the same names.
        saved: From :func:`taken`; one of format 2 has ``state`` and ``groups`` only.

    Raises:
        CheckpointError: it holds what the live optimizer does not.
    """
    parameters = optimizer_parameters(optimizer)
    names = parameter_names(model, optimizer)
    by_name = {names[id(p)]: p for p in [*model.parameters(), *parameters]}
    order = saved.get("names") or [names[id(p)] for p in parameters]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    walk = Restore(by_name, packages(optimizer), _follows(saved, order, by_name), _device(saved, order, by_name, sizes))
    walk.spread = lambda path: by_name.get(order[path[1]]) if path[0] == "state" and type(path[1]) is int else None
    if saved.get("own") is not None:
        optimizer.load_state_dict(copy.deepcopy(saved["own"]))
    for i, name in enumerate(order):
        p = by_name.get(name)
        if p is None:
            continue
        if i in saved["state"]:
            optimizer.state[p] = walk.of(saved["state"][i], optimizer.state.get(p), ("state", i))
        else:
            optimizer.state.pop(p, None)
    for i, live in matched_groups(optimizer, saved, names):
        settings = saved["groups"][i]
        for key in [k for k in live if k != "params" and k not in settings]:
            del live[key]
        for key, value in settings.items():
            live[key] = walk.of(value, live.get(key), ("groups", i, key))
    if saved.get("rest") is not None:
        _restore_rest(optimizer, saved["rest"], walk, set(map(id, parameters)))


def _restore_rest(optimizer: Optimizer, rest: StateDict, walk: Restore, parameters: set[int]) -> None:
    # an inner optimizer may hold the same groups by now, and had groups of its own when the state was taken
    walk.spoken_for = _containers(optimizer, parameters)
    found = attributes(optimizer) or {}
    live_keys = [key for key in optimizer.state if id(key) not in parameters]
    keys: dict[Any, Any] = {}
    for i, (saved_key, value) in enumerate(rest["keys"]):
        key = walk.of(saved_key, live_keys[i] if i < len(live_keys) else None, ("keys", i, "key"))
        keys[key] = walk.of(value, optimizer.state.get(key), ("keys", i))
    for key in live_keys:
        del optimizer.state[key]
    for key, value in keys.items():
        optimizer.state[key] = value
    for name, value in rest["attributes"].items():
        if name not in found and isinstance(value, Mark) and value.kind in ("code", "live"):
            continue
        new = walk.of(value, found.get(name), ("attributes", name))
        if new is not found.get(name) or name not in found:
            vars(optimizer)[name] = new
    for name in found.keys() - rest["attributes"].keys() - EVERY_OPTIMIZER_HAS:
        vars(optimizer).pop(name, None)


def matched_groups(
    optimizer: Optimizer, saved: StateDict, names: Mapping[int, str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Place of a saved group and the live one that holds one of its parameters; those that are gone are left out."""
    if saved.get("names") is None:  # format 2: by place
        yield from zip(range(len(saved["groups"])), optimizer.param_groups, strict=False)
        return
    start = 0
    for i, size in enumerate(saved["sizes"]):
        members = set(saved["names"][start : start + size])
        start += size
        for j, group in enumerate(optimizer.param_groups):
            held = {names[id(p)] for p in group["params"]}
            if members & held or (not members and not held and i == j):
                yield i, group
                break


def packages(optimizer: Optimizer) -> frozenset[str]:
    """Top-level packages that an optimizer and those inside it come from."""
    found, left = set(), [optimizer]
    seen: set[int] = set()
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        found |= {kind.__module__.split(".")[0] for kind in type(value).__mro__} - {"builtins", "torch"}
        left += [v for v in vars(value).values() if isinstance(v, Optimizer)]
    return frozenset(found)


def _follows(
    saved: StateDict, order: Sequence[str], live: Mapping[str, Tensor]
) -> Callable[[Tensor, Path], Tensor | None]:
    """State in its parameter's memory order stays in that order: fused kernels go by memory, not by strides."""
    strides = saved.get("strides")

    def follows(tensor: Tensor, path: Path) -> Tensor | None:
        if path[0] != "state" or not isinstance(path[1], int):
            return None
        p = live[order[path[1]]]
        if tensor.shape != p.shape or not is_dense(p) or type(p) not in (Tensor, nn.Parameter):
            return None
        # one with an order of its own, such as a basis of eigenvectors, keeps that
        return p if strides is None or tuple(strides[path[1]]) == tensor.stride() else None

    return follows


def _device(
    saved: StateDict, order: Sequence[str], live: Mapping[str, Tensor], sizes: Sequence[int]
) -> Callable[[Tensor, Path], torch.device]:
    elsewhere = {tuple(path) for path in saved.get("elsewhere", ())}
    on_cpu = saved.get("on_cpu") or [True] * len(order)
    first = next(iter(live.values()), torch.empty(0)).device
    settings = [group for group, size in zip(saved["groups"], sizes, strict=False) for _ in range(size)]

    def device(tensor: Tensor, path: Path) -> torch.device:
        own = path[0] == "state" and isinstance(path[1], int)
        there = live[order[int(path[1])]].device if own else first  # type: ignore[call-overload]
        if path in elsewhere:
            return there
        if own and not on_cpu[int(path[1])]:  # type: ignore[call-overload]
            return torch.device("cpu")
        # from a run on the CPU: scalar step counters stay there unless the optimizer is fused or capturable
        group = settings[int(path[1])] if own and settings else {}  # type: ignore[call-overload]
        return there if tensor.dim() or group.get("fused") or group.get("capturable") else torch.device("cpu")

    return device


def _tensors(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors of a state with the path that :func:`taken` had for them."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, (*path, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, (*path, i))


def tensors_of(saved: StateDict) -> list[Tensor]:
    """All tensors of a state, marks included."""

    def walk(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mark):
            yield from walk(value.body)
        elif isinstance(value, dict):
            for item in value.values():
                yield from walk(item)
        elif isinstance(value, list | tuple | set | frozenset):
            for item in value:
                yield from walk(item)

    return list(walk(saved))


def check_names(saved: StateDict, model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse the state of an optimizer over other parameters, or over the same in another order.

    Raises:
        CheckpointError: names differ; the message names the first place.
    """
    if saved.get("names") is None:
        return
    names = parameter_names(model, optimizer)
    live = [names[id(p)] for p in optimizer_parameters(optimizer)]
    for i, (old, new) in enumerate(zip(saved["names"], live, strict=False)):
        if old != new:
            raise CheckpointError(
                f"parameter {i} of the optimizer is {old} in the checkpoint and {new} in this run: "
                "give the optimizer its parameters in the same order"
            )
