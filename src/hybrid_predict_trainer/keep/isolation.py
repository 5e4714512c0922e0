"""Forward passes that leave no trace, and that can be compared with one another.

Inside, a loss function may be called as often as one likes: modes, buffers (rebound ones included), attributes that a
forward writes, gradients, grad mode and the random states come back as they were, those of modules that the loss
function uses besides the model as well.  Between two evaluations :meth:`Isolation.begin` puts back what the first one
changed, so that both see the same random numbers and the same carried state.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.hooks import RemovableHandle

from ..weights import offload as host
from ..weights.algebra import without_graph
from .buffers import has_extra_state, same
from .loss_modules import Reach, is_compiled
from .rng import RandomStates
from .walk import modules_of

#: ``quiet``: dropout and everything else in evaluation, norms with batch statistics in training mode: their running
#: ones belong to the weights before a jump.  ``training``: as the real steps run.  ``evaluation``: all in evaluation.
Mode = Literal["quiet", "training", "evaluation"]

#: Attributes of a module that are kept apart from the rest, or that hold nothing of a forward's.
_OWN = frozenset({"_parameters", "_buffers", "_modules", "training"})
_CONTAINERS = frozenset({list, dict, set, deque})
#: Most of a module's attributes: nothing that could be written in place.
_PLAIN = frozenset({bool, int, float, str, type(None), OrderedDict})


def uses_batch_statistics(model: nn.Module) -> bool:
    """Whether a norm takes its statistics from the batch in a training step: it needs two samples at least."""
    return any(isinstance(m, _BatchNorm) and (m.training or m.running_mean is None) for m in model.modules())


class _Kept:
    """What one module holds that a forward may change."""

    __slots__ = ("all", "buffers", "contents", "lasting", "module", "modules", "tensors", "training", "values")

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training
        self.buffers = dict(module._buffers)
        self.modules = dict(module._modules)
        self.values = {k: host.copied(b.detach()) for k, b in self.buffers.items() if b is not None}
        self.all = vars(module).copy()
        self.contents: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.lasting = not self.buffers  # it holds plain values and empty containers, and so no memory of a forward
        for key in [k for k, v in self.all.items() if type(v) not in _PLAIN and k not in _OWN]:
            value = self.all[key]
            if type(value) in _CONTAINERS:
                self.contents[key] = value.copy()
            elif isinstance(value, Tensor):
                self.tensors[key] = host.copied(value.detach())
            self.lasting = self.lasting and type(value) in _CONTAINERS and not value

    def still(self) -> bool:
        """Whether all of a lasting one is as it was kept."""
        own, module = vars(self.module), self.module
        return (
            not module._buffers
            and own.keys() == self.all.keys()
            and all(map(operator.is_, own.values(), self.all.values()))
            and not any(map(self.all.__getitem__, self.contents))
            and _same_items(module._modules, self.modules)
        )

    def put_back(self, *, values: bool) -> None:
        """Everything as it was; ``values``: numbers that are changed in place as well."""
        own = vars(self.module)
        if own.keys() != self.all.keys() or not all(map(operator.is_, own.values(), self.all.values())):
            for key in own.keys() - self.all.keys() - _OWN:
                del own[key]
            own.update({k: v for k, v in self.all.items() if k not in _OWN})
        for key, content in self.contents.items():
            live = self.all[key]
            if not _same_items(live, content):
                live.clear()
                (live.update if isinstance(live, dict | set) else live.extend)(content)
        if self.buffers or self.module._buffers:
            _rebind(self.module._buffers, self.buffers)
        if self.modules or self.module._modules:
            _rebind(self.module._modules, self.modules)
        if values and self.writable:
            for live, old in self._pairs():
                host.write(live, old)

    @property
    def writable(self) -> bool:
        """Whether it holds numbers that could be changed in place."""
        return bool(self.values or self.tensors)

    def put_back_changed(self) -> None:
        """Numbers changed in place: only those that differ are written, and running statistics of norms are left."""
        if isinstance(self.module, _NormBase):
            return
        for live, old in self._pairs():
            if not same(live, old):
                host.write(live, old)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        for key, old in self.values.items():
            yield self.buffers[key], old  # type: ignore[misc]
        for key, old in self.tensors.items():
            yield self.all[key].detach(), old


def _same_items(live: Any, old: Any) -> bool:
    """Whether two containers of one type hold the very same objects."""
    if len(live) != len(old):
        return False
    if isinstance(live, dict):
        return all(key in live and live[key] is item for key, item in old.items())
    return live == old if isinstance(live, set) else all(a is b for a, b in zip(live, old, strict=True))


def _set_mode(module: nn.Module, training: bool) -> None:
    if module.training is not training:  # a module asks for long what is set on it
        module.training = training


def _rebind(live: dict[str, Any], old: dict[str, Any]) -> None:
    if live.keys() != old.keys() or any(live[k] is not v for k, v in old.items()):
        live.clear()
        live.update(old)


Known = dict[nn.Module, _Kept]


class Isolation:
    """One block of evaluations; made by :func:`isolated`.

    Attributes:
        compiled: Calls of the model, or what is evaluated of it, are traced by ``torch.compile``.
    """

    def __init__(self, model: nn.Module, known: Known | None = None, reach: Reach | None = None) -> None:
        """Keep what a forward of ``model`` may change.

        Args:
            model: All its modules are looked at.
            known: What :attr:`lasting` was of an earlier block: it is kept again where it is still so.
            reach: Of the function that is evaluated.
        """
        known = known or {}
        self._kept: Known = {}
        for module in modules_of(model):
            old = known.get(module)
            self._kept[module] = old if old is not None and old.still() else _Kept(module)
        self.compiled = any(map(is_compiled, self._kept)) or (reach is not None and reach.compiled(model))
        self._gradients: list[tuple[Tensor, Tensor | None]] = [
            (p, grad) for p in self._parameters() if (grad := p.grad) is not None
        ]
        self._extra = {m: copy.deepcopy(m.get_extra_state()) for m in self._kept if has_extra_state(m)}
        self._random = RandomStates()
        self._fresh = True  # nothing was evaluated yet
        self._carries: list[_Kept] | None = None  # modules that carry numbers from forward to forward

    def _parameters(self) -> list[Tensor]:
        """Those that the modules have now; one that two modules share comes twice."""
        return [p for m in self._kept if m._parameters for p in m._parameters.values() if p is not None]

    @property
    def lasting(self) -> Known:
        """What was kept of modules that hold plain values only; it keeps no memory of a forward alive."""
        return {module: kept for module, kept in self._kept.items() if kept.lasting}

    def enter(self, mode: Mode) -> None:
        """Set the modes of the model's modules; gradients are put aside."""
        for module, kept in self._kept.items():
            _set_mode(module, kept.training and (
                mode == "training" or (mode == "quiet" and isinstance(module, _NormBase))
            ))  # fmt: skip
        for p, _ in self._gradients:
            p.grad = None

    def met(self, module: nn.Module) -> bool:
        """A module is about to be called: keep what it holds if it is not one of the model's; whether that is so."""
        if module in self._kept:
            return False
        for m in module.modules():
            if m not in self._kept:
                self._kept[m] = _Kept(m)
                self._gradients += [(p, p.grad) for p in m.parameters(recurse=False)]
        return True

    def begin(self) -> None:
        """Before an evaluation that is to see what the first one saw."""
        if self._fresh:  # there is nothing to put back, nor anything that a forward is known to carry on
            self._fresh = False
        else:
            self.rewind()

    @without_graph
    def rewind(self) -> None:
        """After an evaluation: random states and carried state as they were before the first one."""
        self._random.put_back()
        for kept in self._kept.values():
            training = kept.module.training
            kept.put_back(values=False)
            _set_mode(kept.module, training)
        if self._carries is None:
            moved = (k for k in self._kept.values() if k.writable and not isinstance(k.module, _NormBase))
            self._carries = [k for k in moved if any(not same(live, old) for live, old in k._pairs())]
        for kept in self._carries:
            kept.put_back_changed()

    @without_graph
    def leave(self) -> None:
        """Everything as it was."""
        for module, kept in self._kept.items():
            kept.put_back(values=True)  # all of them: without grad mode BatchNorm does not count versions
            _set_mode(module, kept.training)
        for module, state in self._extra.items():
            if not same(module.get_extra_state(), state):
                module.set_extra_state(state)
        for parameter in self._parameters():
            if parameter.grad is not None:  # to ask takes a quarter of the time
                parameter.grad = None
        for held, grad in self._gradients:
            held.grad = grad
        self._random.put_back()


@contextmanager
def isolated(
    model: nn.Module, mode: Mode = "quiet", known: Known | None = None, reach: Reach | None = None
) -> Iterator[Isolation]:
    """A block whose forward passes leave no trace in ``model``, in modules called beside it, or in random states.

    Args:
        model: Any.
        mode: Of its modules.
        known: What was lasting in the last block, which spares a part of the work.
        reach: Of the function that is evaluated: where something in it is compiled, modules beside the model are those
            that it is seen to hold.
    """
    isolation = Isolation(model, known, reach)
    grad_enabled = torch.is_grad_enabled()
    hook: RemovableHandle | None = None

    def met(module: nn.Module, args: Any) -> None:
        if isolation.met(module) and is_compiled(module) and hook is not None:
            hook.remove()  # before its forward is traced, or it would be traced with this hook
            if reach is not None:
                reach.on_compiled()

    try:  # twice: where leaving is interrupted it is done again
        try:
            isolation.enter(mode)
            if not isolation.compiled:  # a hook on all modules would have everything compiled anew
                hook = nn.modules.module.register_module_forward_pre_hook(met)
            elif reach is not None:
                for module in reach.beside(model):
                    isolation.met(module)
            yield isolation
        finally:
            _leave(isolation, hook, grad_enabled=grad_enabled)
    except BaseException:
        _leave(isolation, hook, grad_enabled=grad_enabled)
        raise


def _leave(isolation: Isolation, hook: RemovableHandle | None, *, grad_enabled: bool) -> None:
    """Everything as it was before the block; may be done again."""
    if hook is not None:
        hook.remove()
    isolation.leave()
    torch.set_grad_enabled(grad_enabled)


@contextmanager
def side_effect_free(model: nn.Module) -> Iterator[None]:
    """Forward passes inside leave no trace: dropout off, norms with their batch statistics, all restored after."""
    with isolated(model, "quiet"):
        yield
