"""Sinks for experiment trackers: every number of a run's records, under one name in all of them::

    from hybrid_predict_trainer.adapters.trackers import TensorBoard

    trainer = HybridTrainer(model, optimizer, loss_fn=loss_fn, sinks=[TensorBoard("runs/a")])

Names are ``hpt/<event>/<number>``: ``hpt/step/loss``, ``hpt/step/phase`` (0 warm-up, 1 full, 2 predict, 3 correct),
``hpt/step/confidence``, ``hpt/jump/predicted_loss`` beside ``hpt/jump/loss_after``, ``hpt/outcome/persistence``.  A
tracker that raises three times gets no more records, and training goes on (:class:`~..tell.sinks.Sinks`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..records import Level, Phase
from .missing import framework

#: Of no interest as curves.
LEFT_OUT = ("schema", "step")
#: Strings that have an order.
ORDERED = {
    "phase": [phase.value for phase in Phase], "from": [phase.value for phase in Phase],
    "to": [phase.value for phase in Phase], "severity": [level.name.lower() for level in Level],
}  # fmt: skip


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Finite numbers of one record, by name; truth values are 0 and 1, phases and severities their place."""
    event, found = record["event"], {}
    for name, value in record.items():
        if name in LEFT_OUT:
            continue
        if name in ORDERED and str(value) in ORDERED[name]:
            value = ORDERED[name].index(str(value))
        if isinstance(value, bool | int | float) and math.isfinite(value):
            found[f"hpt/{event}/{name}"] = float(value)
    return found


class TensorBoard:
    """Event files that ``tensorboard --logdir`` shows."""

    def __init__(self, folder: str | Path) -> None:
        """Open a file of events in a folder, which is made if needed.

        Raises:
            ImportError: tensorboard is not installed.
        """
        framework("tensorboard", "tensorboard")
        writer: Any = framework("torch.utils.tensorboard", "tensorboard")
        self._writer = writer.SummaryWriter(str(folder))

    def write(self, record: Mapping[str, Any]) -> None:
        """One scalar per number."""
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases: one that you have begun, or one that is begun here."""

    def __init__(self, run: Any = None, **settings: Any) -> None:
        """Take a run, or begin one.

        Args:
            run: What ``wandb.init`` has returned; None: begin one.
            settings: For ``wandb.init``, such as ``project=`` and ``mode="offline"``.

        Raises:
            ImportError: wandb is not installed.
        """
        wandb: Any = framework("wandb", "wandb")
        self._own = run is None
        self._run = wandb.init(**settings) if run is None else run
        self._run.define_metric("hpt/*", step_metric="hpt/at_step")  # its own steps go up only, whoever logs

    def write(self, record: Mapping[str, Any]) -> None:
        """One row."""
        found = numbers(record)
        if found:
            self._run.log({**found, "hpt/at_step": record["step"]})

    def close(self) -> None:
        """End the run that was begun here."""
        if self._own:
            self._run.finish()


class Trackio:
    """A run of trackio, kept on this machine."""

    def __init__(self, project: str, **settings: Any) -> None:
        """Begin a run.

        Args:
            project: Of the run.
            settings: For ``trackio.init``, such as ``name=``.

        Raises:
            ImportError: trackio is not installed.
        """
        self._trackio: Any = framework("trackio", "trackio")
        self._trackio.init(project=project, **settings)

    def write(self, record: Mapping[str, Any]) -> None:
        """One row."""
        found = numbers(record)
        if found:
            self._trackio.log({**found, "hpt/at_step": record["step"]})

    def close(self) -> None:
        """End the run."""
        self._trackio.finish()
