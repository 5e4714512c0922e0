"""A stronger step for hidden matrices around an optimizer that treats every weight by itself.

Adam scales each weight alone; a matrix has directions.  Muon (Jordan et al. 2024) makes a matrix' step orthogonal, SOAP
(Vyas et al. 2024, arXiv 2409.11321) runs Adam in the eigenbasis of Shampoo's preconditioner.  Both come from packages;
here is only who steps what: hidden matrices go to the package's optimizer at the rate and the weight decay of the
user's group that holds them, everything else stays with the user's Adam or AdamW.  Muon's step is brought to the length
of Adam's (Liu et al. 2025, arXiv 2502.16982), so that one rate serves for both.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..keep.subject import Subject
from ..records import CheckpointError, ConfigError, StateDict
from ..recovery import IntegrationError
from ..weights.parameters import role_of
from ..weights.shards import is_sharded
from .modifier import StepModifier
from .recipe import decay_of

#: Roles whose matrices stay with the user's optimizer: they are tables of rows, not maps between directions.
NOT_HIDDEN = ("embedding", "head")
#: Optimizers whose rate means the same to both steps, by name.
SERVES = ("Adam", "AdamW")
#: Passes over the stepped weights that a package's step reads and writes: gradient, momentum, weights.
STEP_PASSES = 4


def hidden_matrices(subject: Subject) -> list[int]:
    """Places of the maps between hidden directions, among ``subject.parameters``.

    Left out are tables of rows, also those that another layer shares, and the head: what a name, a module or an
    override calls one, or a shared table; where the model has neither, its last layer, whether it trains or not.
    """
    groups, parameters = subject.groups, subject.parameters
    roles = [groups.roles[groups.index[i]] for i in range(len(parameters))]
    outer = {id(p) for p in _tables(subject.model)} | {id(p) for p in _heads(subject, roles)}
    return [
        i
        for i, p in enumerate(parameters)
        if p.ndim == 2 and not p.is_complex() and min(p.shape) > 1
        if roles[i] not in NOT_HIDDEN and id(p) not in outer
    ]


def _tables(model: nn.Module) -> list[Tensor]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]


def _heads(subject: Subject, roles: Sequence[str]) -> list[Tensor]:
    """Weights of the last layer, in the order in which the model registers them: the optimizer may hold any order."""
    if "head" in roles:
        return []  # known by its role
    tables = {id(p) for p in _tables(subject.model)}
    holders: dict[int, int] = {}
    layers: list[list[Tensor]] = []
    for prefix, module in subject.model.named_modules():
        own = [(f"{prefix}.{leaf}", p) for leaf, p in module.named_parameters(recurse=False) if p.ndim > 1]
        if any(role_of(name, p, module) == "head" for name, p in own):
            return []  # it does not train, or is none of the optimizer's
        for _, p in own:
            holders[id(p)] = holders.get(id(p), 0) + 1
        layers += [[p for _, p in own]] if own else []
    shared = any(count > 1 for place, count in holders.items() if place in tables)
    return [] if shared or not layers else layers[-1]


class MatrixStep(StepModifier):
    """Hidden matrices step by Muon or SOAP, everything else by the user's optimizer.

    The gradients of the matrices are laid aside while the user's optimizer steps, so that it neither moves them nor
    keeps moments of them, and are back where they were afterwards.
    """

    def __init__(
        self, subject: Subject, kind: str, around: Callable[[], float] = lambda: 1.0,
        decays_by: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        """Bind.

        Args:
            subject: What is trained.
            kind: ``"muon"`` or ``"soap"``.
            around: What the schedule's rate is multiplied by in the next step.
            decays_by: The same for the rate times decoupled decay; None: as the rate.

        Raises:
            ConfigError: the optimizer, or the network, is none for it.
            IntegrationError: SOAP's package is not installed.
        """
        name = type(subject.optimizer).__name__
        if name not in SERVES:
            raise ConfigError(
                f'training.step = "{kind}" takes over the matrices of Adam or AdamW, not of {name}: '
                'set it to "optimizer", or train with AdamW'
            )
        if any(group.get("maximize") for group in subject.optimizer.param_groups):
            raise ConfigError(
                f'training.step = "{kind}" takes steps down the loss, and {name} was built with maximize=True: '
                "negate the loss"
            )
        self._optimizer, self._around, self._kind = subject.optimizer, around, kind
        self._decays_by = around if decays_by is None else decays_by
        self._parameters = subject.parameters
        self._at = hidden_matrices(subject)
        if not self._at:
            raise ConfigError(f'training.step = "{kind}" steps hidden matrices, and this network has none')
        if any(is_sharded(p) for group in self._optimizer.param_groups for p in group["params"]):
            raise ConfigError(f'training.step = "{kind}" needs whole matrices, and parameters are sharded here')
        self._aside: dict[int, Tensor] = {}
        self._rates: list[float] = []
        self._inner = _built(kind, [{"params": [p]} for p in self._matrices])

    @property
    def _matrices(self) -> list[Tensor]:
        return [self._parameters[i] for i in self._at]

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """Lay the matrices' gradients aside, and note the rate that they are to step with."""
        self.on_skip()
        # a load replaces the groups, so they are looked up anew
        held = {id(p): g for g in self._optimizer.param_groups for p in g["params"]}
        for i, group in zip(self._at, self._inner.param_groups, strict=True):
            parameter = parameters[i]
            own = held.get(id(parameter))
            if parameter.grad is None or own is None:  # unused in this step, or the user no longer trains it
                continue
            times = self._around()
            group["lr"] = float(own["lr"]) * times
            group["weight_decay"] = decay_of(self._optimizer, own) * (self._decays_by() / times if times else 1.0)
            self._aside[i], parameter.grad = parameter.grad, None
        return 0

    @torch.no_grad()
    def after_step(self, parameters: Sequence[Tensor]) -> int:
        """Put the gradients back and step the matrices."""
        if not self._aside:
            return 0
        others = [p for i, p in zip(self._at, self._matrices, strict=True) if i not in self._aside]
        self.on_skip()
        gradients = [p.grad for p in others]
        for p in others:
            p.grad = None
        self._inner.step()
        for p, gradient in zip(others, gradients, strict=True):
            p.grad = gradient
        return STEP_PASSES

    def on_skip(self) -> None:
        """The step is left out: the gradients are back where backward left them."""
        for i, gradient in self._aside.items():
            self._parameters[i].grad = gradient
        self._aside = {}

    def forget(self) -> None:
        """Momentum stays, as the user's optimizer's does; a step under way is over."""
        self.on_skip()

    def end(self) -> None:
        """It is the step that the user has asked for, and no motion of ours: it goes on."""

    def state_dict(self) -> StateDict:
        """Of the package's optimizer; its rates are the user's groups'."""
        steps = [group.get("step", 0) for group in self._inner.param_groups]  # SOAP counts by group
        return {"kind": self._kind, "state": self._inner.state_dict()["state"], "steps": steps}

    @classmethod
    def saved_with(cls, state: StateDict) -> str:
        """The setting."""
        return f'training.step = "{state["kind"]}"'

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: the run was saved with another step.
        """
        if state["kind"] != self._kind:
            raise CheckpointError(f'the run was saved with training.step = "{state["kind"]}": set it to that')
        self.on_skip()
        whole = {**self._inner.state_dict(), "state": copy.deepcopy(state["state"])}
        self._inner.load_state_dict(whole)
        for group, steps in zip(self._inner.param_groups, state["steps"], strict=True):
            if steps:
                group["step"] = steps
            else:
                group.pop("step", None)

    def memory_bytes(self) -> int:
        """Bytes of what the package's optimizer remembers."""
        return sum(_bytes_of(value) for value in self._inner.state.values())


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes_of(item) for item in value.values())
    return sum(_bytes_of(item) for item in value) if isinstance(value, list | tuple) else 0


def _built(kind: str, groups: list[dict[str, Any]]) -> Optimizer:
    if kind == "muon":
        return torch.optim.Muon(groups, lr=1e-3, adjust_lr_fn="match_rms_adamw")
    try:
        package = importlib.import_module("pytorch_optimizer")
    except ImportError as error:
        raise IntegrationError(
            "pytorch_optimizer",
            'training.step = "soap" takes SOAP from pytorch_optimizer: pip install "hybrid-predict-trainer[bench]"',
        ) from error
    built: Optimizer = package.SOAP(groups, lr=1e-3)
    return built
