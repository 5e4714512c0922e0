"""The part ``model`` of a checkpoint: what is written, what may be left out, and what a forward made of the buffers.

Weights are stored as plain tensors under the names of ``state_dict``.  Parameters that are frozen, stand as they did
when the trainer was built and outweigh what trains (the base under an adapter) are left out unless
``checkpoint.include_frozen`` says otherwise: a fingerprint of them is stored and compared on load.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..records import CheckpointError, StateDict
from ..weights import offload as host
from ..weights.parameters import optimizer_parameters
from ..weights.shards import is_sharded, like_shard
from .buffers import BufferGuard, Place, places, put
from .object_state import Capture, Restore
from .state_tree import Mark, TensorSpec, check_compatible

#: Numbers of a frozen tensor that its fingerprint reads, evenly spaced; all of them in smaller ones.
SAMPLED = 4096


@dataclass(frozen=True, slots=True)
class Origin:
    """What the model was when the trainer was built.

    Attributes:
        frozen: Name -> fingerprint and version counter of every parameter that neither trained nor was optimized.
        buffers: Name -> kind of every buffer, None where it was None.
    """

    frozen: Mapping[str, tuple[str, int]]
    buffers: Mapping[str, str | None]

    @classmethod
    def of(cls, model: nn.Module, optimizer: Optimizer, include_frozen: str) -> Origin:
        """Look at a model; its frozen weights are only read where they may be left out of a checkpoint."""
        frozen = frozen_parameters(model, optimizer)
        # a rank sees its own part: what is left out would have to be compared by all
        if any(map(is_sharded, frozen.values())) or not _may_be_left_out(model, frozen, include_frozen):
            frozen = {}
        return cls(
            {name: (fingerprint(p), version(p)) for name, p in frozen.items()},
            {name: kind_of(module._buffers[key]) for name, (module, key) in places(model).items()},
        )

    def untouched(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        """Name -> parameter, of the frozen ones that still are, and that hold what they held."""
        frozen = frozen_parameters(model, optimizer)
        return {
            name: p
            for name, p in frozen.items()
            if name in self.frozen and self.frozen[name] == (fingerprint(p), version(p))
        }


def frozen_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Name -> parameter, of those that need no gradient and that no optimizer holds; tied ones by all names."""
    held = set(map(id, optimizer_parameters(optimizer)))
    named = model.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if not p.requires_grad and id(p) not in held}


def _may_be_left_out(model: nn.Module, frozen: Mapping[str, Tensor], include_frozen: str) -> bool:
    if include_frozen != "auto":
        return include_frozen == "never"
    size = sum(p.numel() for p in {id(p): p for p in frozen.values()}.values())
    return 2 * size > sum(p.numel() for p in model.parameters())


def version(tensor: Tensor) -> int:
    """How often torch has seen a tensor written to."""
    return 0 if tensor.is_inference() else tensor._version


def kind_of(tensor: Tensor | None) -> str | None:
    """Type and shape of a buffer, as text."""
    return None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


@torch.no_grad()
def fingerprint(tensor: Tensor) -> str:
    """Digest of type, shape and at most ``SAMPLED`` evenly spaced numbers of a tensor."""
    digest = hashlib.sha256(f"{kind_of(tensor)}".encode())
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        digest.update("".join(fingerprint(getattr(tensor, name)) for name in names).encode())
    elif tensor.numel():
        flat = tensor.detach().resolve_conj().resolve_neg()
        count = tensor.numel()
        if count > SAMPLED:
            index = torch.linspace(0, count - 1, SAMPLED, dtype=torch.float64).long().to(tensor.device)
            flat = flat[torch.unravel_index(index, flat.shape)]
        digest.update(host.plain_bytes(flat))
    return digest.hexdigest()


def saved_state(
    model: nn.Module, optimizer: Optimizer, origin: Origin, guard: BufferGuard
) -> tuple[StateDict, StateDict]:
    """The part ``model``, and what has to be known to take it back.

    Returns:
        The state without untouched frozen weights; and ``frozen`` (name -> fingerprint of what was left out),
        ``buffers`` (name -> kind at the start, of those that have another kind now) and ``hidden`` (name -> value of
        buffers that forwards change but ``state_dict`` leaves out).
    """
    state = dict(model.state_dict())
    left_out = {n: f for n, (f, _) in origin.frozen.items() if n in origin.untouched(model, optimizer) and n in state}
    live = {name: module._buffers[key] for name, (module, key) in places(model).items()}
    grown = {n: origin.buffers.get(n) for n, t in live.items() if kind_of(t) != origin.buffers.get(n)}
    hidden = {n: live[n] for n in guard.changing & live.keys() if n not in state and live[n] is not None}
    kept = {name: _plain(value, name) for name, value in state.items() if name not in left_out}
    return kept, {"frozen": left_out, "buffers": grown, "hidden": hidden}


def _plain(value: Any, name: str) -> Any:
    """Tensor subclasses by their parts; everything else as it is."""
    if not isinstance(value, Tensor) or type(value) in (Tensor, nn.Parameter):
        return value
    return Capture({}, lambda tensor, path: tensor.detach()).of(value, (name,))


def check(model: nn.Module, state: StateDict, about: StateDict) -> None:
    """Refuse the state of another model, or of one over another frozen base.

    Raises:
        CheckpointError: the message names what differs; nothing has been changed.
    """
    live = dict(model.state_dict())
    now = {name: module._buffers[key] for name, (module, key) in places(model).items()}
    for name, at_start in about["buffers"].items():
        if name in now and kind_of(now[name]) == at_start:
            live.pop(name, None)
            if name in state:
                live[name] = state[name]
    for name in about["frozen"]:
        if name in live and name not in state:
            live.pop(name)
    check_compatible({n: _spec(v) for n, v in state.items()}, {n: _spec(v) for n, v in live.items()})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, saved in about["frozen"].items():
        if name not in parameters or fingerprint(parameters[name]) != saved:
            raise CheckpointError(
                f"the frozen weight {name} is not the one that this checkpoint was trained over, and was left out of "
                "it: load the same base first (checkpoint.include_frozen = \"always\" stores it, too)"
            )  # fmt: skip
    for name in about["hidden"]:
        if name not in now:
            raise CheckpointError(f"the checkpoint belongs to another model; the buffer {name} is not there")


def _spec(value: Any) -> Any:
    if isinstance(value, Mark) and value.kind == "shard":
        return TensorSpec(TensorSpec.of(value.body[0]).dtype, tuple(value.body[1]))
    if is_sharded(value):
        return TensorSpec.of(value)
    if isinstance(value, Mark) and value.kind == "subclass":
        return value.body[0], tuple(value.body[3])
    if isinstance(value, Tensor) and type(value) not in (Tensor, nn.Parameter):
        return type(value).__qualname__, tuple(value.shape)
    return TensorSpec.of(value) if isinstance(value, Tensor) else value


@torch.no_grad()
def load(model: nn.Module, state: StateDict, about: StateDict) -> None:
    """Write a state that :func:`check` has passed into the model."""
    found = places(model)
    for name in about["buffers"]:
        if name in found:
            _give(found[name], state.get(name))
    for name, value in about["hidden"].items():
        _give(found[name], value)
    live = dict(model.state_dict())
    whole: StateDict = {}
    for name, value in state.items():
        whole[name] = _rebuilt(value, live.get(name), name) if isinstance(value, Mark) else value
    # a frozen weight that was left out is not written to, not even with itself: it would count as changed from here on
    told = model.load_state_dict(whole, strict=not about["frozen"])
    if about["frozen"] and (told.unexpected_keys or set(told.missing_keys) - about["frozen"].keys()):
        odd = [*told.unexpected_keys, *sorted(set(told.missing_keys) - about["frozen"].keys())]
        raise CheckpointError(f"the model did not take {odd[0]} as it gives it in state_dict")


def _give(place: Place, value: Tensor | None) -> None:
    module, key = place
    put(module, key, value, None)


def _rebuilt(value: Mark, live: Any, name: str) -> Any:
    here: Callable[[Tensor, Any], torch.device] = lambda tensor, path: tensor.device  # noqa: E731
    if value.kind == "shard":
        return like_shard(value.body[0], live)
    kinds: Iterable[str] = [type(live).__module__.split(".")[0]]
    return Restore({}, frozenset(kinds), lambda tensor, path: None, here).of(value, host.copied(live), (name,))
