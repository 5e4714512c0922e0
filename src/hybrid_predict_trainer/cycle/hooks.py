"""Hooks on an optimizer's step and on a model's forward, for loops that somebody else owns.

A hook is an object of its own that neither copies nor pickles what it is bound to: a copy of the model (an average of
its weights, say) has hooks that do nothing, and ``torch.save(model)`` works.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

#: Wrappers around an optimizer that are looked into.
MAX_DEPTH = 8


class Stations(Protocol):
    """What the hooks call."""

    def before_step(self, loss: Any = None) -> None:
        """The optimizer is about to step."""

    def after_step(self) -> None:
        """The optimizer has stepped."""


class Hook:
    """Calls a function, and only for the object that it was made for."""

    def __init__(self, owner: object, call: Callable[..., Any]) -> None:
        """Bind.

        Args:
            owner: Optimizer or module whose hook it is.
            call: What is called with the hook's arguments.
        """
        self.owner: object | None = owner
        self._call = call

    def __call__(self, caller: object, *args: Any) -> Any:
        """Do nothing for a copy."""
        return self._call(*args) if caller is self.owner else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        """The same: it knows its owner from a copy of it."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process there is nobody to call."""
        return Hook, (None, _nothing)


def _nothing(*args: Any) -> None:
    """Called in the place of a hook that was pickled."""


def with_hooks(optimizer: Any) -> Optimizer | None:
    """The optimizer whose step fires hooks: itself, or the one that a wrapper holds; None where there is none.

    Some wrappers are optimizers by class whose ``register_step_..._hook`` raises ``AttributeError``; others hand over
    the table of hooks of the one inside, which is the one that fires them.
    """
    for _ in range(MAX_DEPTH):
        inner = getattr(optimizer, "optimizer", None)
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
        if hooks is not None and hooks is getattr(inner, "_optimizer_step_pre_hooks", None):
            optimizer = inner
            continue
        try:
            optimizer.register_step_pre_hook(_nothing).remove()
            optimizer.register_step_post_hook(_nothing).remove()
        except AttributeError:
            optimizer = getattr(optimizer, "optimizer", None)
        else:
            found: Optimizer = optimizer
            return found
    return None


def is_attached(optimizer: Optimizer) -> bool:
    """Whether there is a hook of ours on its step."""
    return any(isinstance(hook, Hook) for hook in optimizer._optimizer_step_pre_hooks.values())


def on_step(optimizer: Optimizer, stations: Stations) -> list[RemovableHandle]:
    """Call the stations around every step of an optimizer.

    A step with a closure has its forward and backward inside: there the station is behind the closure.
    """

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            stations.before_step()
            return None
        behind = _Once(closure, stations)
        if len(args) > 1:
            return (args[0], behind, *args[2:]), kwargs
        return args, {**kwargs, "closure": behind}

    def after(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stations.after_step()

    return [
        optimizer.register_step_pre_hook(Hook(optimizer, before)),
        optimizer.register_step_post_hook(Hook(optimizer, after)),
    ]


class _Once:
    """A closure, and the station behind it."""

    def __init__(self, closure: Callable[[], Any], stations: Stations) -> None:
        self._closure, self._stations, self._called = closure, stations, False

    def __call__(self) -> Any:
        if self._called:
            raise RuntimeError(
                "the optimizer calls its closure more than once per step, which the engine cannot follow: detach() it"
            )
        self._called = True
        loss = self._closure()
        self._stations.before_step(loss if isinstance(loss, Tensor) else None)
        return loss


def on_forward(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> list[RemovableHandle]:
    """Call functions around every forward: ``before(args, kwargs)`` and ``after(args, kwargs, output)``."""
    return [
        module.register_forward_pre_hook(Hook(module, before), with_kwargs=True),
        module.register_forward_hook(Hook(module, after), with_kwargs=True),
    ]


class GradientWitness:
    """Looks whether gradients reach the optimizer as the backward has left them, by one small parameter.

    Clipped gradients have other norms than the loss, and differences of them are no curvature.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        """Watch the smallest leaf.

        Args:
            parameters: That are trained.
        """
        leaves = [p for p in parameters if p.is_leaf and p.requires_grad and p.is_floating_point() and p.numel()]
        self._parameter = min(leaves, key=lambda p: p.numel(), default=None)
        self._left: Tensor | None = None
        self._handle: RemovableHandle | None = None
        if self._parameter is not None:
            self._handle = self._parameter.register_post_accumulate_grad_hook(self._note)

    @torch.no_grad()
    def _note(self, parameter: Tensor) -> None:
        self._left = None if parameter.grad is None else parameter.grad.detach().clone()

    @torch.no_grad()
    def factor(self) -> float:
        """By what the gradient was multiplied since the backward; 1 where that cannot be told."""
        left, now = self._left, None if self._parameter is None else self._parameter.grad
        if left is None or now is None or now.layout is not torch.strided or left.shape != now.shape:
            return 1.0
        before = float(left.double().norm())
        ratio = float(now.double().norm()) / before if before > 0 else 1.0
        return ratio if math.isfinite(ratio) and ratio > 0 else 1.0

    def remove(self) -> None:
        """Look no more."""
        if self._handle is not None:
            self._handle.remove()
        self._left = self._handle = None
