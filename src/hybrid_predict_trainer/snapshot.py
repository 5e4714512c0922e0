"""Exact take and restore of everything a step can change."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from . import host
from .records import State


class HasState(Protocol):
    """Anything with a state: learning-rate schedulers, gradient scalers, sampler objects."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Take the state back."""


def rng_state() -> State:
    """States of the global generators of torch (all devices), numpy and Python."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: State = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: State) -> None:
    """Inverse of :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        # of another machine's: as many as there are here
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


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
    (fused buffers, CUDA graphs, a parameter list) stay valid.
    """

    parameters: list[Tensor]
    buffers: list[Tensor]
    optimizer_state: dict[int, dict[str, Any]]
    optimizer_groups: list[dict[str, Any]]
    others: list[dict[str, Any]]
    rng: State

    @classmethod
    @torch.no_grad()
    def take(
        cls, model: nn.Module, optimizer: Optimizer, others: Sequence[HasState] = (), *, offload: bool = False,
        into: Snapshot | None = None,
    ) -> Snapshot:  # fmt: skip
        """Copy everything.

        Args:
            model: Its parameters (with those only the optimizer holds) and buffers are copied.
            optimizer: State and settings of every group.
            others: Schedulers, scalers.
            offload: Keep the copies in host memory.
            into: A snapshot that is needed no more: its memory is written over.
        """

        def kept(value: Any, name: str) -> Any:
            return paired(value, getattr(into, name, None), lambda t, old: host.copied(t, old, to_host=offload))

        parameters = all_parameters(model, optimizer)
        state = {
            i: dict(optimizer.state[p])
            for i, p in enumerate(optimizer_parameters(optimizer))
            if p in optimizer.state
        }  # fmt: skip
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        taken = cls(
            parameters=kept(parameters, "parameters"),
            buffers=kept(list(model.buffers()), "buffers"),
            optimizer_state=kept(state, "optimizer_state"),
            optimizer_groups=kept(groups, "optimizer_groups"),
            others=kept([o.state_dict() for o in others], "others"),
            rng=rng_state(),
        )
        if offload:
            host.wait(host.queued(parameters))
        return taken

    @torch.no_grad()
    def restore(
        self, model: nn.Module, optimizer: Optimizer, others: Sequence[HasState] = (), *, rng: bool = True
    ) -> None:
        """Put everything back, bit for bit."""
        for live, saved in zip(all_parameters(model, optimizer), self.parameters, strict=True):
            live.copy_(saved)
        for live, saved in zip(model.buffers(), self.buffers, strict=True):
            live.copy_(saved)
        restore_optimizer(optimizer, self.optimizer_state, self.optimizer_groups)
        for other, state in zip(others, self.others, strict=True):
            other.load_state_dict(paired(state, other.state_dict(), _beside))
        if rng:
            set_rng_state(self.rng)

    def memory_bytes(self) -> int:
        """Bytes held by tensors."""
        tensors: list[Tensor] = []

        def note(tensor: Tensor, _: Any) -> Tensor:
            tensors.append(tensor)
            return tensor

        for part in (self.parameters, self.buffers, self.optimizer_state, self.others):
            paired(part, None, note)
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> State:
        """Plain containers and tensors."""
        return {
            "parameters": list(self.parameters), "buffers": list(self.buffers),
            "optimizer_state": self.optimizer_state, "optimizer_groups": self.optimizer_groups,
            "others": self.others, "rng": self.rng,
        }  # fmt: skip

    @classmethod
    def from_state_dict(cls, state: State) -> Snapshot:
        """Inverse of :meth:`state_dict`."""
        return cls(**state)


def optimizer_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Parameters in group order, as ``optimizer.state_dict`` numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def all_parameters(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Parameters of the model, then those only the optimizer holds."""
    unique: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    for p in optimizer_parameters(optimizer):
        unique.setdefault(id(p), p)
    return list(unique.values())


@torch.no_grad()
def restore_optimizer(optimizer: Optimizer, state: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Write optimizer state back in place, key by key, with exact dtypes.

    ``Optimizer.load_state_dict`` is not used because it casts state to the parameter's dtype (wrong
    for float32 moments of bfloat16 weights) and replaces every tensor object.
    """
    settings = [g for g, group in zip(groups, optimizer.param_groups, strict=True) for _ in group["params"]]
    for i, p in enumerate(optimizer_parameters(optimizer)):
        if i not in state:
            optimizer.state.pop(p, None)
            continue
        live = optimizer.state[p]
        for key in [k for k in live if k not in state[i]]:
            del live[key]
        # scalar step counters live on the CPU unless the optimizer is fused or capturable
        counts_there = bool(settings[i].get("fused") or settings[i].get("capturable"))
        for key, saved in state[i].items():
            live[key] = paired(saved, live.get(key), _writing(p.device, scalars=counts_there))
    for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
        for key in [k for k in group if k != "params" and k not in saved_group]:
            del group[key]
        for key, saved in saved_group.items():
            group[key] = paired(saved, group.get(key), _writing(None))


def _writing(device: torch.device | None, *, scalars: bool = False) -> Callable[[Tensor, Any], Tensor]:
    """Write a saved tensor over the live one; where there is none it goes to ``device``, scalars only if told so."""

    def written(saved: Tensor, live: Any) -> Tensor:
        if isinstance(live, Tensor) and live.shape == saved.shape and live.dtype == saved.dtype:
            return live.copy_(saved)
        return saved.clone() if device is None or not (saved.dim() or scalars) else saved.to(device, copy=True)

    return written


def _beside(saved: Tensor, live: Any) -> Tensor:
    """A copy of a saved tensor on the device of the live one."""
    return saved.to(live.device, copy=True) if isinstance(live, Tensor) else saved.clone()


@contextmanager
def quiet_forward(model: nn.Module) -> Iterator[None]:
    """Forward passes inside leave no trace: dropout off, all buffers and RNG restored.

    BatchNorm stays in training mode (batch statistics): its running statistics belong to the weights
    before the jump and would judge the candidate by the wrong ones.
    """
    modes = {m: m.training for m in model.modules()}
    norms = [m for m in modes if isinstance(m, _BatchNorm) and m.training]
    saved = [(b, b.detach().clone()) for b in model.buffers()]
    rng = rng_state()
    for m in modes:
        m.training = m in norms
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training
        with torch.no_grad():
            for live, old in saved:  # all of them: without grad mode BatchNorm does not count versions
                live.copy_(old)
        set_rng_state(rng)


class BufferGuard:
    """Undoes what one forward did to buffers, if the step turns out not to count.

    Which buffers a forward changes is learned from one forward, so that constant ones (a causal mask,
    a rotary table) are copied once and never again.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch the buffers of ``model``."""
        self._model = model
        self._mutable: list[Tensor] | None = None  # None: not known yet, copy all
        self._saved: list[tuple[Tensor, Tensor, int]] = []

    @torch.no_grad()
    def before(self) -> None:
        """Remember the buffers that a forward is known (or may be about) to change."""
        watched = list(self._model.buffers()) if self._mutable is None else self._mutable
        self._saved = [(b, b.detach().clone(), b._version) for b in watched]

    def after(self) -> None:
        """The forward was fine: learn which buffers it changed, drop the copies."""
        if self._mutable is None:
            # BatchNorm's running statistics change without their version being counted
            self._mutable = [b for b, old, version in self._saved if b._version != version or not torch.equal(b, old)]
        self._saved = []

    def forget(self) -> None:
        """Learn anew (buffers may have been registered or replaced since)."""
        self._mutable = None

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the copies."""
        for live, saved, _ in self._saved:
            live.copy_(saved)
        self._saved = []
