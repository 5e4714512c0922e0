"""Classification of labelled examples: what a task needs besides its model and its order of the data.

Letters: ``B`` examples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from .base import Batch, TaskSettings, mean_loss


def batches_per_epoch(num_examples: int, batch_size: int, have: str) -> int:
    """Return how many whole batches there are in an epoch.

    Args:
        num_examples: for training.
        batch_size: B.
        have: what there is, for the message.

    Raises:
        ValueError: not one.
    """
    if num_examples < batch_size:
        raise ValueError(f"{have}, fewer than batch_size = {batch_size}; lower --batch-size")
    return num_examples // batch_size


def share_right(model: nn.Module, batch: Batch) -> Tensor:
    """Return the share of a batch (inputs, labels) that a classifier gets right."""
    assert isinstance(batch, tuple)
    inputs, labels = batch
    logits: Tensor = model(inputs)
    return logits.argmax(1).eq(labels).cpu().double().mean()  # widened on the host: not every device has float64


class ReadsLabelled:
    """What every classifier's task shares; a subclass sets the attributes and says what its model reads."""

    settings: TaskSettings
    batch_size: int
    _valid: tuple[Tensor, Tensor]  # inputs as they are stored, labels

    def _read(self, stored: Tensor) -> Tensor:
        """Return what the model reads."""
        raise NotImplementedError

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of an example, nats; the batch is (inputs, labels (B,))."""
        logits, loss = self.output_fn(model, batch)
        return loss(logits)

    def output_fn(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return logits (B, classes) and the loss as a function of them, which is convex."""
        assert isinstance(batch, tuple)
        inputs, labels = batch
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.settings.autocast_bf16):
            logits: Tensor = model(inputs)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        return logits, lambda z: functional.cross_entropy(z, labels)

    def _valid_parts(self) -> Iterator[tuple[Batch, int]]:
        for stored, labels in zip(*(torch.split(part, 4 * self.batch_size) for part in self._valid), strict=True):
            yield (self._read(stored), labels), len(stored)

    def evaluate(self, model: nn.Module) -> float:
        """Return the loss on the validation examples, as they are."""
        return mean_loss(self.loss_fn, model, self._valid_parts())

    def accuracy(self, model: nn.Module) -> float:
        """Return the share of validation examples classified right."""
        return mean_loss(share_right, model, self._valid_parts())
