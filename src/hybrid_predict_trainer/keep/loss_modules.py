"""Modules that a loss function uses beside the model: the other network of a GAN, a teacher, a perceptual loss.

Where a step is skipped, or the gate's forwards leave no trace, what was done to their buffers has to be undone as well.
They are looked for where Python keeps what a function uses: its closure, its defaults, the globals it names, the object
it is a method of, and what these hold.  A hook on all modules finds every one, but is a cost at every step, and a
compiled model would be traced anew with it.

The same search finds what ``torch.compile`` has made of the model or of a function, where the loss calls that.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

#: Objects looked at, and how far apart they may be: a loss function may reach a whole data set.
MAX_OBJECTS, MAX_DEPTH = 2000, 6
#: Entries of one container that are looked at.
MAX_ENTRIES = 64


def with_modules_beside(loss_fn: Any, model: nn.Module) -> nn.Module:
    """The model, or a list of it and of what its loss function uses beside it."""
    beside = modules_beside(loss_fn, model)
    return nn.ModuleList([model, *beside]) if beside else model


def modules_beside(loss_fn: Any, model: nn.Module) -> list[nn.Module]:
    """Modules that ``loss_fn`` reaches and ``model`` does not hold: the outermost ones, in the order they are found."""
    try:
        return _found(loss_fn, model)
    except Exception:  # objects may answer as they like to being looked at, and nothing here may end a run
        return []


class Reach:
    """What a function calls beside the model, looked for when it is asked for.

    Attributes:
        fn: The function.
    """

    def __init__(self, fn: Any) -> None:
        """Nothing is looked for yet.

        Args:
            fn: Of the loss, the residuals, a score; or an object that holds it.
        """
        self.fn = fn
        self._compiled: bool | None = None

    def compiled(self, model: nn.Module) -> bool:
        """Whether it calls something that ``torch.compile`` has made; looked for once."""
        if self._compiled is None:
            try:
                self._compiled = any(map(_holds_compiled, _reached(self.fn, model)))
            except Exception:  # as above
                self._compiled = False
        return self._compiled

    def on_compiled(self) -> None:
        """It was seen to call something compiled, further away than was looked."""
        self._compiled = True

    def beside(self, model: nn.Module) -> list[nn.Module]:
        """See :func:`modules_beside`."""
        return modules_beside(self.fn, model)


def is_compiled(value: Any) -> bool:
    """Whether calls of a module or function are traced by ``torch.compile``."""
    if isinstance(value, nn.Module):
        return type(value).__name__ == "OptimizedModule" or getattr(value, "_compiled_call_impl", None) is not None
    return isinstance(value, types.FunctionType) and hasattr(value, "_torchdynamo_orig_callable")


def _holds_compiled(value: Any) -> bool:
    return any(map(is_compiled, value.modules() if isinstance(value, nn.Module) else (value,)))


def _found(loss_fn: Any, model: nn.Module) -> list[nn.Module]:
    own = set(map(id, model.modules()))
    found = [v for v in _reached(loss_fn, model) if isinstance(v, nn.Module) and id(v) not in own]
    inner = {id(m) for outer in found for m in outer.modules() if m is not outer}
    return [m for m in found if id(m) not in inner]


def _reached(fn: Any, model: nn.Module) -> Iterator[Any]:
    """Objects that a function reaches, the nearest first; those inside a module that is none of the model's are not."""
    own = set(map(id, model.modules()))
    seen: set[int] = set()
    front: list[Any] = [fn]
    for _ in range(MAX_DEPTH):
        reached: list[Any] = []
        for value in front:
            if id(value) in seen or len(seen) >= MAX_OBJECTS:
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module) and id(value) not in own:
                seen.update(map(id, value.modules()))
            yield value
            reached += _held_by(value)
        front = reached


def _held_by(value: Any) -> Iterator[Any]:
    """What an object holds, as far as a loss function could use it."""
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.FunctionType):
        yield from _used_by(value)
    elif isinstance(value, Mapping):
        yield from list(value.values())[:MAX_ENTRIES]
    elif isinstance(value, list | tuple | set | frozenset):
        yield from list(value)[:MAX_ENTRIES]
    elif not isinstance(value, type | types.ModuleType) and type(value).__module__ not in _OPAQUE:
        yield from list(getattr(value, "__dict__", {}).values())[:MAX_ENTRIES]
        call = vars(type(value)).get("__call__")  # an object that is called as a function
        if isinstance(call, types.FunctionType):
            yield call


#: Types of these modules hold no networks.
_OPAQUE = frozenset({"builtins", "torch", "torch.nn.parameter", "numpy"})


def _used_by(function: types.FunctionType) -> Iterator[Any]:
    """Closure, defaults and named globals of a function, those of functions inside it too."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield wrapped
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for name in code.co_names:
            if name in function.__globals__:
                yield function.__globals__[name]
