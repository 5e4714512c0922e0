"""The last safety of a load: everything it may change, remembered before and put back if it fails half-way."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..weights import offload as host
from ..weights.parameters import named_parameters, parameter_names
from ..weights.trained import Write
from . import optimizer_state
from .buffers import Buffers
from .object_state import Capture, OpaqueStateError, Restore
from .object_state import Path as Place
from .rng import rng_state, set_rng_state

if TYPE_CHECKING:
    from ..cycle.state import State


class Backup:
    """A copy of a run in host memory: model, optimizer, schedule, scaler, library state and random states."""

    @torch.no_grad()
    def __init__(self, run: State, *more: object) -> None:
        """Copy ``run`` and the objects in ``more``."""
        self._run, self._objects = run, [run, *more]
        self._devices: dict[Place, torch.device] = {}
        self._rng = rng_state()
        self._untouched = run.watch.writes.look() is Write.NONE  # nobody has written to the weights since the last step
        run.subject.reshard()
        named = named_parameters(run.subject.model, run.subject.optimizer)
        self._parameters = {name: host.copied(p, to_host=True) for name, p in named.items()}
        self._buffers = Buffers.of(run.subject.model, offload=True)
        self._optimizer = optimizer_state.taken(
            run.subject.model, run.subject.optimizer, lambda tensor, old: host.copied(tensor, to_host=True)
        )
        host.wait(host.queued(self._parameters.values()))
        self._walk = Capture(parameter_names(run.subject.model, run.subject.optimizer), self._copied, by_reference=True)
        stay = [
            run.subject.model,
            run.subject.loss_fn,  # the user's own, which no load changes: it may hold anything
            None if run.safety.validation is None else run.safety.validation.fn,
            run.recorder.sink,
            run.config,
            run.subject.optimizer,
            run.subject.optimizer.state,
            run.subject.optimizer.param_groups,
        ]
        self._walk.stay = frozenset(
            id(v)
            for v in [
                *stay,
                *run.subject.views,
                *run.subject.optimizer.param_groups,
                *run.subject.model.modules(),
                *run.buffers.modules(),
            ]
            if v is not None
        )
        self._own: dict[str, Any] = {}
        try:
            self._state = self._walk.of(self._objects, ("run",))
        except OpaqueStateError:  # a predictor of the user's own with something inside that cannot be told
            self._own = {"predictor": run.proposer.predictor.state_dict()}
            self._walk.stay |= frozenset([id(run.proposer.predictor)])
            self._walk.met.clear()
            self._state = self._walk.of(self._objects, ("run",))

    def _copied(self, tensor: Tensor, path: Place) -> Tensor:
        self._devices[path] = tensor.device
        return host.copied(tensor, to_host=True)

    @torch.no_grad()
    def put_back(self) -> None:
        """Everything as it was, bit for bit."""
        run = self._run
        live = named_parameters(run.subject.model, run.subject.optimizer)
        for name, saved in self._parameters.items():
            host.write(live[name], saved)
        self._buffers.put_back(run.subject.model)
        optimizer_state.restore(run.subject.model, run.subject.optimizer, self._optimizer)
        # the objects are those of this process: any class that is there may be made again
        every = frozenset(name.partition(".")[0] for name in sys.modules)
        back = Restore(live, every, lambda tensor, path: None, lambda tensor, path: self._devices[path], in_place=False)
        back.of(self._state, self._objects, ("run",))
        if self._own:
            run.proposer.predictor.load_state_dict(self._own["predictor"])
        set_rng_state(self._rng)
        if self._untouched:
            run.watch.writes.record()  # what was just written is what the run had left
