"""Exact take and restore of everything a step can change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..records import StateDict
from ..weights import offload as host
from ..weights.parameters import (
    all_parameters,
    named_parameters,
    trained_parameters,
)
from ..weights.shards import local
from . import optimizer_state
from .buffers import Buffers, places
from .object_state import HasState
from .rng import rng_state, set_rng_state


def paired(value: Any, other: Any, leaf: Callable[[Tensor, Any], Tensor]) -> Any:
    """A copy of nested dicts and lists, every tensor by ``leaf`` from it and what stands in its place in ``other``."""
    if isinstance(value, Tensor):
        return leaf(value, other)
    if type(value) is dict:
        known = other if isinstance(other, dict) else {}
        return {key: paired(item, known.get(key), leaf) for key, item in value.items()}
    if type(value) is list:
        beside = other if isinstance(other, list) and len(other) == len(value) else [None] * len(value)
        return [paired(item, place, leaf) for item, place in zip(value, beside, strict=True)]
    return copy.deepcopy(value)


@dataclass(slots=True)
class Snapshot:
    """A bitwise copy of a run's mutable state.

    The tensors of model and optimizer are written back in place, so that references held elsewhere
    (fused buffers, CUDA graphs, a parameter list) stay valid.  A frozen parameter that no optimizer holds does not
    change and is not copied: of an adapter over a large model only the adapter is.

    Attributes:
        parameters: Copies of what trains.
        names: Their names, in the same order; None: all parameters, by place (format 2).
        buffers: Qualified name -> copy of every buffer; a list by place in format 2.
        optimizer: From :func:`.optimizer_state.taken`.
        others: States of schedulers, scalers.
        rng: From :func:`.rng.rng_state`.
        extra: Extra states of modules, by name.
        bound: The tensors that the buffers' copies are of; not in :meth:`state_dict`.
    """

    parameters: list[Tensor]
    names: list[str] | None
    buffers: dict[str, Tensor | None] | list[Tensor]
    optimizer: StateDict
    others: list[dict[str, Any]]
    rng: StateDict
    extra: dict[str, Any] = field(default_factory=dict)
    bound: dict[str, Tensor | None] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def take(
        cls, model: nn.Module, optimizer: Optimizer, others: Sequence[HasState] = (), *, offload: bool = False,
        into: Snapshot | None = None,
    ) -> Snapshot:  # fmt: skip
        """Copy everything.

        Args:
            model: Its parameters that train (with those only the optimizer holds) and buffers are copied.
            optimizer: State and settings of every group, and whatever else it remembers.
            others: Schedulers, scalers.
            offload: Keep the copies in host memory.
            into: A snapshot that is needed no more: its memory is written over.

        Raises:
            CheckpointError: the optimizer holds something whose state cannot be told; the message names it.
        """

        def copied(tensor: Tensor, old: Any) -> Tensor:
            return host.copied(tensor, old, to_host=offload)

        trained = trained_parameters(model, optimizer)
        before = {} if into is None or into.names is None else dict(zip(into.names, into.parameters, strict=True))
        old_buffers = into.buffers if into is not None and isinstance(into.buffers, dict) else {}
        buffers = Buffers.of(model, Buffers(old_buffers, {}), offload=offload)
        taken = cls(
            parameters=[copied(p, before.get(name)) for name, p in trained.items()],
            names=list(trained),
            buffers=buffers.tensors,
            optimizer=optimizer_state.taken(model, optimizer, copied, None if into is None else into.optimizer),
            others=paired([o.state_dict() for o in others], None if into is None else into.others, copied),
            rng=rng_state(),
            extra=buffers.extra,
            bound=buffers.bound,
        )
        if offload:
            host.wait(host.queued(trained.values()))
        return taken

    @torch.no_grad()
    def restore(
        self, model: nn.Module, optimizer: Optimizer, others: Sequence[HasState] = (), *, rng: bool = True
    ) -> None:
        """Put everything back, bit for bit; parameters and groups that are new since are left alone."""
        if self.names is None:
            for live, saved in zip(all_parameters(model, optimizer), self.parameters, strict=True):
                host.write(live, saved)
        else:
            found = named_parameters(model, optimizer)
            for name, saved in zip(self.names, self.parameters, strict=True):
                if name in found and local(found[name]).shape == saved.shape:
                    host.write(found[name], saved)
        self._buffers(model).put_back(model)
        optimizer_state.restore(model, optimizer, self.optimizer)
        for other, state in zip(others, self.others, strict=True):
            other.load_state_dict(paired(state, other.state_dict(), _beside))
        if rng:
            set_rng_state(self.rng)

    def _buffers(self, model: nn.Module) -> Buffers:
        if isinstance(self.buffers, dict):
            return Buffers(self.buffers, self.extra, self.bound)
        there = [name for name, (module, key) in places(model).items() if module._buffers[key] is not None]
        return Buffers(dict(zip(there, self.buffers, strict=True)), {})

    def memory_bytes(self) -> int:
        """Bytes held by tensors."""
        tensors = optimizer_state.tensors_of(
            {"parameters": self.parameters, "buffers": self.buffers, "optimizer": self.optimizer, "others": self.others}
        )
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> StateDict:
        """Plain containers and tensors."""
        return {
            "parameters": list(self.parameters), "names": self.names, "buffers": self.buffers,
            "optimizer": self.optimizer, "others": self.others, "rng": self.rng, "extra": self.extra,
        }  # fmt: skip

    @classmethod
    def from_state_dict(cls, state: StateDict) -> Snapshot:
        """Inverse of :meth:`state_dict`; takes format 2 as well."""
        values = dict(state)
        if "optimizer_state" in values:
            values["optimizer"] = {"state": values.pop("optimizer_state"), "groups": values.pop("optimizer_groups")}
            values["names"] = None
        return cls(**values)


def _beside(saved: Tensor, live: Any) -> Tensor:
    """A copy of a saved tensor on the device of the live one."""
    return saved.to(live.device, copy=True) if isinstance(live, Tensor) else saved.clone()


def snapshot_state(snapshot: Snapshot | None) -> StateDict | None:
    """State of a snapshot that there may be."""
    return None if snapshot is None else snapshot.state_dict()


def snapshot_from(state: StateDict | None) -> Snapshot | None:
    """Inverse of :func:`snapshot_state`."""
    return None if state is None else Snapshot.from_state_dict(state)
