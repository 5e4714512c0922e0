"""What a loop of somebody else's hands over during one step: losses, and the batches they are of.

With gradient accumulation a step has several of both.  Its loss is their mean, and its batch all of them, of which the
gate takes the mean loss in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..judge.labels import is_of_labels
from ..keep.subject import JudgeFn, LossFn, ResidualFn
from ..observe.batches import tensors
from ..weights.trained import Write, Writes
from .construction import default_loss, of_model_and_batch

#: Looks per comparison of values, on an accelerator and where nothing else tells that weights were written to.
LOOK_EVERY = 8


class MicroBatches(list[Any]):
    """The batches of one step of the optimizer, in order."""


class Call(NamedTuple):
    """What a model's forward was called with, where that is not by name alone."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class StepLoss:
    """Loss of all that one step of the optimizer is trained on."""

    def __init__(self, loss_fn: LossFn | None) -> None:
        """Bind.

        Args:
            loss_fn: (model, one batch) -> loss; None: the model returns it.
        """
        self.loss_fn, self.is_default = of_model_and_batch(loss_fn) or default_loss, loss_fn is None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean over the micro-batches, or the loss of a single batch."""
        if isinstance(batch, MicroBatches):
            return torch.stack([self(model, each) for each in batch]).mean()
        if isinstance(batch, Call):
            loss = loss_in(model(*batch.args, **batch.kwargs))
            if loss is None:
                raise TypeError("the model returned no loss: pass loss_fn")
            return loss
        return self.loss_fn(model, batch)


class StepResiduals:
    """Residuals of all that one step of the optimizer is trained on, whose mean square is the mean of the losses."""

    def __init__(self, residual_fn: ResidualFn) -> None:
        """Bind.

        Args:
            residual_fn: (model, one batch) -> residuals.
        """
        self.residual_fn = residual_fn

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Of all micro-batches, weighted as their losses are; or of a single batch."""
        if not isinstance(batch, MicroBatches):
            return self.residual_fn(model, batch)
        parts = [self.residual_fn(model, each) for each in batch]
        total = sum(r.numel() for r in parts)
        return torch.cat([r * (total / (len(parts) * r.numel())) ** 0.5 for r in parts])


class StepScores:
    """Scores of all samples that one step of the optimizer is trained on."""

    def __init__(self, judge_fn: JudgeFn) -> None:
        """Bind.

        Args:
            judge_fn: (model, one batch) -> scores.
        """
        self.judge_fn = judge_fn

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Of all micro-batches one after the other, or of a single batch."""
        if not isinstance(batch, MicroBatches):
            return self.judge_fn(model, batch)
        return torch.cat([self.judge_fn(model, each) for each in batch])


def loss_in(output: Any) -> Tensor | None:
    """The scalar loss in what a model has returned; None if there is none."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss.reshape(()) if isinstance(loss, Tensor) and loss.numel() == 1 else None


def is_whole(batch: Any) -> bool:
    """Whether the memory of a batch is still there: a loop may have freed it, and reading it would crash."""
    return not any(_is_freed(tensor) for tensor in tensors(batch))


def _is_freed(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.numel() == 0:
        return False
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() < needed


def graphs_so_far() -> int:
    """Number of the next node of an autograd graph: those of a graph that is built from here on are not below it."""
    return int(torch._C._autograd._get_sequence_nr())


def was_built_before(loss: Any, number: int) -> bool:
    """Whether the graph of a loss is older than a moment; False where that cannot be told (a float, no graph)."""
    node = loss.grad_fn if isinstance(loss, Tensor) else None
    return node is not None and int(node._sequence_nr()) < number


class Handover:
    """Losses and batches since the last step of the optimizer."""

    def __init__(self) -> None:
        """Nothing was handed over yet."""
        self._losses: list[Tensor] = []
        self._batches: list[Any] = []
        self.of_labels: bool | None = None  # whether the losses are; found out from the first one with a graph

    @property
    def empty(self) -> bool:
        """Whether nothing was handed over since the last step."""
        return not self._losses and not self._batches

    @property
    def has_loss(self) -> bool:
        """Whether a loss was handed over since the last step."""
        return bool(self._losses)

    def take_loss(self, loss: Any) -> None:
        """Add the loss of a batch.

        Args:
            loss: Scalar, with or without a graph, before it is divided by the number of micro-batches.

        Raises:
            TypeError: it is not a scalar.
        """
        if not isinstance(loss, Tensor | float | int | np.number) or isinstance(loss, bool):
            raise TypeError(f"note(loss, batch) takes the loss first, a scalar; this is a {type(loss).__name__}")
        value = loss.detach() if isinstance(loss, Tensor) else torch.as_tensor(loss, device="cpu")
        if value.numel() != 1 or value.is_complex():
            raise TypeError(f"the loss must be a real scalar, not of shape {tuple(value.shape)}: take its mean")
        self._losses.append(value if value.dim() == 0 else value.reshape(()))
        if self.of_labels is None and isinstance(loss, Tensor) and loss.grad_fn is not None:
            self.of_labels = is_of_labels(loss)

    def take_batch(self, batch: Any) -> None:
        """Add a batch; it is kept until the next step, not copied."""
        self._batches.append(batch)

    def take(self) -> tuple[Tensor | None, Any]:
        """Loss and batch of the step, None for what was not handed over; forgets both."""
        losses, batches = self._losses, self._batches
        self._losses, self._batches = [], []
        loss = None if not losses else losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        batch = None if not batches else batches[0] if len(batches) == 1 else MicroBatches(batches)
        return loss, batch


class Intake:
    """All that was handed over since the last step of the optimizer.

    Attributes:
        loop: By the loop.
        seen: By the hook on the model's forward.
        aside: By that hook in evaluation mode: a validation with gradients says nothing of the step, unless nothing
            else does.
    """

    def __init__(self, parameters: Sequence[Tensor], *, on_cpu: bool = True) -> None:
        """Nothing was handed over yet.

        Args:
            parameters: That are trained.
            on_cpu: Nobody has to wait for their values.
        """
        self.loop, self.seen, self.aside = Handover(), Handover(), Handover()
        self._writes: Writes | None = Writes(parameters, 1 if on_cpu else LOOK_EVERY)
        self._several = False  # more than one thing was ever handed over for one step
        self._graphs = 0  # when the last step had been made

    @property
    def of_labels(self) -> bool | None:
        """Whether the losses are of labels; None: none has come with a graph."""
        known = (self.loop.of_labels, self.seen.of_labels)
        return None if known == (None, None) else True in known

    @property
    def empty(self) -> bool:
        """Whether no step is under way, as far as what was handed over tells."""
        return self.loop.empty and self.seen.empty

    @property
    def has_loss(self) -> bool:
        """Whether the loss of the step is known."""
        return self.loop.has_loss or self.seen.has_loss

    def arrives(self) -> bool:
        """Something is handed over; returns whether the weights were trained since the first thing of this step.

        The losses that were handed over until now are of that step then, which was not the optimizer's: they are
        forgotten.
        """
        first, known = self.empty, self._several
        self._several = known or not first
        if not self._several or self._writes is None:
            return False
        try:
            trained = known and not first and self._writes.look() is Write.CHANGED
            if trained:
                self.take()
            if trained or first or not known:
                self._writes.record()
        except Exception:  # weights that cannot be looked at
            self._writes = None
            return False
        return trained

    def is_late(self, loss: Any) -> bool:
        """Whether a loss is of the step that was made last."""
        return was_built_before(loss, self._graphs)

    def on_step(self) -> None:
        """The optimizer has stepped: what is built from here on belongs to the next step."""
        self._graphs = graphs_so_far()

    def take(self) -> tuple[Tensor | None, Any]:
        """Loss and batch of the step: the loop's, else what the hook has seen; forgets everything."""
        found = [h.take() for h in (self.loop, self.seen, self.aside)]
        losses = [loss for loss, _ in found if loss is not None]
        batches = [batch for _, batch in found if batch is not None and is_whole(batch)]
        return (losses[0] if losses else None), (batches[0] if batches else None)
