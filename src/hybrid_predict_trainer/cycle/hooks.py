"""Hooks on an optimizer's step and on a model's forward, for loops that somebody else owns.

A hook is an object of its own that neither copies nor pickles what it is bound to: a copy of the model (an average of
its weights, say) has hooks that do nothing, and ``torch.save(model)`` works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
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

    Some wrappers are optimizers by class whose ``register_step_..._hook`` raises (they have no table of hooks, or one
    that no handle can refer to); others hand over the table of the one inside, which is the one that fires them.
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
        except (AttributeError, TypeError):
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


#: What the compiler says where a loop asks for one graph of a model with hooks of ours inside.
INSIDE = "hybrid_predict_trainer looks at this model's forward: attach the compiled model instead, or pass loss_fn="


def on_forward(module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> list[RemovableHandle]:
    """Call functions around every forward: ``before(args, kwargs)`` and ``after(args, kwargs, output)``.

    Where the loop calls what ``torch.compile`` has made of the module they lie inside of what is traced: the compiler
    is told to leave them out, and compiles the module's forward alone.
    """
    hook = _untraced()
    return [
        module.register_forward_pre_hook(hook(module, before), with_kwargs=True),
        module.register_forward_hook(hook(module, after), with_kwargs=True),
    ]


@cache
def _untraced() -> type[Hook]:
    """Hooks that the compiler leaves out; made late, because the compiler is a heavy import (an optimizer makes it)."""

    class Untraced(Hook):
        __call__ = torch.compiler.disable(Hook.__call__, reason=INSIDE)

    return Untraced


class OwnForwards:
    """Whether a forward is one of ours: no hook looks at those.

    Attributes:
        under_way: An evaluation of our own is under way.
    """

    def __init__(self) -> None:
        """None is."""
        self.under_way = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Forwards in here are our own."""
        self.under_way = True
        try:
            yield
        finally:
            self.under_way = False
