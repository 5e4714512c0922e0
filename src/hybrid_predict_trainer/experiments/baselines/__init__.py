"""Baseline methods as arms of a comparison.

Reading order: ``base`` (what a baseline is), ``outer``, ``averaging``, ``optimizers``, ``wnn``, ``own_loop``,
``lbfgs``, ``second_order``, ``flat``, ``table``.
Packages come with ``pip install "hybrid-predict-trainer[bench]"`` and are imported when a baseline that needs one runs.
"""

from __future__ import annotations

from pathlib import Path

from ...tasks import Task
from ...tasks.base import unknown_name
from ..arms.drive import Arm, ArmRun, Experiment, Watch
from .base import Baseline, BaselineJob
from .table import BASELINES

__all__ = ["BASELINES", "Baseline", "baseline_of", "baselines_for", "run_baseline"]


def baseline_of(name: str) -> Baseline:
    """The peer of an arm: the name up to an ``@``, behind which a budget may stand.

    Raises:
        ValueError: there is none.
    """
    key = name.partition("@")[0]
    if key not in BASELINES:
        raise unknown_name("peer", key, BASELINES)
    return BASELINES[key]


def baselines_for(task: Task) -> tuple[str, ...]:
    """Names of the baselines that make sense on a task."""
    return tuple(name for name, peer in BASELINES.items() if not peer.why_not(task))


def run_baseline(
    setup: Experiment, arm: Arm, seed: int, *, peer: Baseline | None = None,
    folder: Path | None = None, watch: Watch | None = None, label: str = "",
) -> ArmRun:  # fmt: skip
    """Train a baseline from one seed to the end of the arm's budget.

    Args:
        setup: What the arms share; its trainer settings count only for gradient clipping and metrics.
        arm: Its name is the baseline's.
        seed: Of model, data order and dropout.
        peer: One with other hyper-parameters than those of the table.
        folder: Where ``metrics.jsonl`` and ``summary.json`` go; None: nowhere.
        watch: Asked once for something to call after every step; not by those with loops of their own.
        label: What ``watch`` is to call the run.

    Raises:
        ValueError: no such peer, or one that does not make sense on the task.
        ModuleNotFoundError: its package is not installed.
        FileNotFoundError: its checkpoint is not there.
    """
    peer = peer or baseline_of(arm.name)
    if why_not := peer.why_not(setup.task):
        fit = ", ".join(baselines_for(setup.task))
        raise ValueError(f"peer {arm.name!r} does not fit: {why_not} (peers that fit: {fit})")
    return peer.train(
        BaselineJob(setup=setup, arm=arm, seed=seed, values=peer.values, folder=folder, watch=watch, label=label)
    )
