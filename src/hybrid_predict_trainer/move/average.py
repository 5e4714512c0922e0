"""Averages of the weights that somebody keeps beside a run (EMA, SWA): they move along with jumps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from ..records import ConfigError, StateDict
from ..weights.algebra import Move
from ..weights.parameters import predicted_parameters
from .modifier import StepModifier


class AverageFollower(StepModifier):
    """Keeps an ``AveragedModel`` in step with a run.

    It is updated after every real step.  A jump shifts it by as much as the weights, so that it stands to them as it
    did before; one that is taken back takes it back too, and a checkpoint holds it.

    Example::

        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        trainer = HybridTrainer(model, optimizer, modifiers=[AverageFollower(model, optimizer, average)])
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, average: AveragedModel, *, update: bool = True) -> None:
        """Bind.

        Args:
            model: That is trained.
            optimizer: Of its weights.
            average: Of that model.
            update: False: the caller updates it after its steps.

        Raises:
            ConfigError: it is the average of another model, or a weight is complex or sharded.
        """
        self._model, self._average, self._update = model, average, update
        theirs = list(average.module.parameters())
        mine = list(model.parameters())
        if [p.shape for p in mine] != [p.shape for p in theirs]:
            raise ConfigError("the averaged model is one of another model: its weights have other shapes")
        pairs = {id(p): q for p, q in zip(mine, theirs, strict=True)}
        order, _ = predicted_parameters(model, optimizer)
        if any(id(p) not in pairs for p in order):
            raise ConfigError(
                "an average of complex or sharded weights, or of weights that are not the model's, is not followed"
            )
        self._followed = [pairs[id(p)] for p in order]

    def after_step(self, parameters: Sequence[Tensor]) -> int:
        """Take the step that ``parameters`` have made into the average; returns passes over the weights."""
        if not self._update:
            return 0
        self._average.update_parameters(self._model)
        return 3

    @torch.no_grad()
    def on_jump(self, delta: Move, scale: float) -> None:
        """Shift it by the jump, ``scale * delta``."""
        for average, d in zip(self._followed, delta, strict=True):
            average.add_(d.to(device=average.device, dtype=average.dtype), alpha=scale)

    def state_dict(self) -> StateDict:
        """Of the averaged model."""
        return dict(self._average.state_dict())

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`, which made ``state``."""
        self._average.load_state_dict(state)

    def memory_bytes(self) -> int:
        """Nothing that the caller does not hold anyway."""
        return 0
