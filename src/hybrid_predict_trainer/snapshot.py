"""Exact take and restore of everything a step can change."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

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
    return state


def set_rng_state(state: State) -> None:
    """Inverse of :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


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
        cls, model: nn.Module, optimizer: Optimizer, others: Sequence[HasState] = (), *, offload: bool = False
    ) -> Snapshot:
        """Copy everything.

        Args:
            model: Its parameters (with those only the optimizer holds) and buffers are copied.
            optimizer: State and settings of every group.
            others: Schedulers, scalers.
            offload: Keep the copies in host memory.
        """

        def kept(t: Tensor) -> Tensor:
            return t.detach().to("cpu", copy=True) if offload else t.detach().clone()

        def kept_value(value: Any) -> Any:
            return kept(value) if isinstance(value, Tensor) else copy.deepcopy(value)

        return cls(
            parameters=[kept(p) for p in all_parameters(model, optimizer)],
            buffers=[kept(b) for b in model.buffers()],
            optimizer_state={
                i: {k: kept_value(v) for k, v in optimizer.state[p].items()}
                for i, p in enumerate(optimizer_parameters(optimizer))
                if p in optimizer.state
            },
            optimizer_groups=[
                {k: kept_value(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups
            ],
            others=[copy.deepcopy(o.state_dict()) for o in others],
            rng=rng_state(),
        )

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
            other.load_state_dict(copy.deepcopy(state))
        if rng:
            set_rng_state(self.rng)

    def memory_bytes(self) -> int:
        """Bytes held by tensors."""
        tensors = [*self.parameters, *self.buffers]
        tensors += [v for state in self.optimizer_state.values() for v in state.values() if isinstance(v, Tensor)]
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
    for i, p in enumerate(optimizer_parameters(optimizer)):
        if i not in state:
            optimizer.state.pop(p, None)
            continue
        live = optimizer.state[p]
        for key in [k for k in live if k not in state[i]]:
            del live[key]
        for key, saved in state[i].items():
            live[key] = _written(live.get(key), saved, p.device)
    for group, saved_group in zip(optimizer.param_groups, groups, strict=True):
        for key in [k for k in group if k != "params" and k not in saved_group]:
            del group[key]
        for key, saved in saved_group.items():
            group[key] = _written(group.get(key), saved, None)


def _written(live: Any, saved: Any, device: torch.device | None) -> Any:
    if not isinstance(saved, Tensor):
        return copy.deepcopy(saved)
    if isinstance(live, Tensor) and live.shape == saved.shape and live.dtype == saved.dtype:
        return live.copy_(saved)
    # scalar step counters live on the CPU unless the optimizer is fused or capturable
    return saved.clone() if device is None or saved.dim() == 0 else saved.to(device, copy=True)


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
