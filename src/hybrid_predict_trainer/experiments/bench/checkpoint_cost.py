"""``hpt bench checkpoint``: what checkpoints cost a run that goes on, written at once and in the background.

CPU seconds, which a busy machine does not stretch: of the training thread for what it has to do itself, and of the
whole process for all of it.  The share is that of a run which saves every so many steps.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...keep.background import BackgroundWriter
from ...tasks import Batch
from ...trainer import HybridTrainer
from ..report.text import aligned
from .overhead import Workload, build, prepare

#: The bar: share of a run that checkpoints may take, in percent.
BAR_PCT = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds of one checkpoint."""

    thread_s: float  # of the training thread
    process_s: float  # of all threads


def measure(
    workload: Workload, *, num_steps: int = 6, num_saves: int = 3, interval: int = 100,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Steps and checkpoints by turns.

    Args:
        workload: What is stepped.
        num_steps: Steps that are timed, after as many that are not.
        num_saves: Checkpoints of each kind.
        interval: Steps between two checkpoints of the run that the share is told of.
        note: Takes lines for a person who waits.

    Raises:
        ValueError: a setting does not fit.
    """
    prepared = prepare(workload)
    trainer = build(prepared, 10_000)
    batches: Iterator[Batch] = prepared.task.batches(0)
    steps = [_cpu(lambda: trainer.step(next(batches))) for _ in range(2 * num_steps)][num_steps:]
    note(f"step {statistics.median(steps):.3f} s of CPU")
    with tempfile.TemporaryDirectory() as folder:
        at_once, behind = [], []
        for number in range(num_saves):
            at_once.append(_at_once(trainer, Path(folder) / "at-once"))
            behind.append(_behind(trainer, Path(folder) / "behind"))
            note(f"{number + 1}/{num_saves}: {at_once[-1]}, in the background {behind[-1]}")
            steps.append(_cpu(lambda: trainer.step(next(batches))))
        path = trainer.save_checkpoint(Path(folder) / "at-once")
        size = sum(file.stat().st_size for file in path.iterdir())
    step_s = statistics.median(steps)
    run_s = interval * step_s
    shares = {
        "at_once_pct": 100 * _median(at_once, "process_s") / run_s,
        "async_thread_pct": 100 * _median(behind, "thread_s") / run_s,
        "async_pct": 100 * _median(behind, "process_s") / run_s,
    }
    return {
        "preset": workload.preset, "interval": interval, "step_cpu_s": step_s, "checkpoint_bytes": size,
        "at_once_cpu_s": _median(at_once, "process_s"), "async_thread_cpu_s": _median(behind, "thread_s"),
        "async_cpu_s": _median(behind, "process_s"), **shares, "bar_pct": BAR_PCT,
        "passed": shares["async_pct"] <= BAR_PCT,
    }  # fmt: skip


def format_text(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    rows = [
        ["written at once", f"{found['at_once_cpu_s']:.3f}", f"{found['at_once_cpu_s']:.3f}",
         f"{found['at_once_pct']:.2f} %"],
        ["in the background", f"{found['async_thread_cpu_s']:.3f}", f"{found['async_cpu_s']:.3f}",
         f"{found['async_pct']:.2f} %"],
    ]  # fmt: skip
    return "\n".join([
        f"{found['preset']}: a step takes {found['step_cpu_s']:.3f} s of CPU, a checkpoint has "
        f"{found['checkpoint_bytes'] / 1e6:.0f} MB; one every {found['interval']} steps", "",
        *aligned(("checkpoint", "training thread, s", "all threads, s", "of the run"), rows), "",
        f"bar: {found['bar_pct']:g} % of the run in the background: {'met' if found['passed'] else 'not met'}",
    ])  # fmt: skip


def _cpu(act: Callable[[], object]) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began


def _median(costs: list[Cost], field: str) -> float:
    values: list[float] = [getattr(cost, field) for cost in costs]
    return statistics.median(values)


def _at_once(trainer: HybridTrainer, folder: Path) -> Cost:
    seconds = _cpu(lambda: trainer.save_checkpoint(folder))
    return Cost(seconds, seconds)


def _behind(trainer: HybridTrainer, folder: Path) -> Cost:
    """As a run does it, but that nothing is trained while it is written: all threads' time is the checkpoint's."""
    process, thread = time.process_time(), time.thread_time()
    writer = BackgroundWriter()
    writer.start(trainer.capture_checkpoint(folder))
    thread = time.thread_time() - thread
    writer.wait()
    return Cost(thread, time.process_time() - process)
