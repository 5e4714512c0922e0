"""`hpt bench overhead`: what one FULL step of the trainer costs beside the loop a user would write.

Two copies of one model take the same batches, the bare loop and the trainer by turns, and the order
turns round with every pair: what slows the machine slows both.  Figures are ratios within a pair.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...move.group_warmup import RECOVERY_STEPS
from ...records import Phase
from ...tasks import Batch, Task, TaskSettings, build_optimizer, build_scheduler, make_task
from ...tell.sinks import JsonlSink
from ...trainer import HybridTrainer
from ..arms.drive import wait_for_device
from ..arms.environment import environment
from ..arms.options import check_device
from .memory import on_training_device, state_bytes

#: Before anything is timed warm-up has to end, two windows to close, so that the basis has its memory and the
#: predictor has observed, and the early cuts to end; a trainer that is not there by MAX_PREPARING_STEPS never will be.
WARMUP_STEPS = 2
MIN_WINDOWS = 2
MAX_PREPARING_STEPS = 500

#: Ways in which Python code reads a tensor and so waits for an accelerator.
READS = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__", "numpy", "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is stepped: the gpt task at some size, and the predictor whose basis is observed."""

    preset: str = "10M"
    batch_size: int = 8
    context: int = 128
    device: str = "cpu"
    predictor: str = "secant"
    num_pairs: int = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedWorkload:
    """A workload whose data have been found."""

    workload: Workload
    task: Task
    config: HybridTrainerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Seconds of one step of either, by the wall and of the processor; whether the trainer closed a window in it."""

    bare_s: float
    trainer_s: float
    window: bool
    bare_cpu_s: float = math.nan
    trainer_cpu_s: float = math.nan

    @property
    def ratio(self) -> float:
        """Trainer over bare loop."""
        return self.trainer_s / self.bare_s

    @property
    def cpu_ratio(self) -> float:
        """The same by processor time, which other work on the machine does not count in."""
        return self.trainer_cpu_s / self.bare_cpu_s


class BareLoop:
    """The loop a user would write, with the loss logged at every step."""

    def __init__(self, task: Task, num_steps: int) -> None:
        """Build model, optimizer and schedule as the trainer gets them."""
        self.model = task.build_model(0)
        self.optimizer = build_optimizer(self.model, task.defaults)
        self._schedule = build_scheduler(self.optimizer, task.defaults.schedule, num_steps)
        self._task = task
        self._clip = task.defaults.grad_clip
        self.losses: list[float] = []

    def step(self, batch: Batch) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._task.loss_fn(self.model, batch)
        loss.backward()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self.optimizer.step()
        self._schedule.step()
        self.losses.append(loss.item())

    def state_bytes(self) -> int:
        """What any loop holds on its device."""
        return state_bytes(self.model, self.optimizer)


def prepare(workload: Workload) -> PreparedWorkload:
    """Find data and check settings.

    Raises:
        ValueError: a setting does not fit.
    """
    check_device(workload.device)
    settings = TaskSettings(
        preset=workload.preset, batch_size=workload.batch_size, context=workload.context, device=workload.device
    )
    task = make_task("gpt", settings)
    values = {
        "training.warmup_steps": WARMUP_STEPS, "training.gradient_clip_norm": task.defaults.grad_clip or 0.0,
        "predictor.type": workload.predictor,
    }  # fmt: skip
    config = with_values(HybridTrainerConfig(), values)
    small = replace(workload, preset="0.3M")
    HybridTrainer(*_parts(make_task("gpt", replace(settings, preset=small.preset))), config)  # is the predictor known?
    return PreparedWorkload(workload=workload, task=task, config=config)


def _parts(task: Task) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = task.build_model(0)
    return model, build_optimizer(model, task.defaults)


def build(prepared: PreparedWorkload, num_steps: int, *, offload: bool = False) -> HybridTrainer:
    """A trainer in the FULL phase that will propose nothing."""
    task, config = prepared.task, prepared.config
    model, optimizer = _parts(task)
    schedule = build_scheduler(optimizer, task.defaults.schedule, num_steps)
    config = replace(config, predictor=replace(config.predictor, offload=offload))
    trainer = HybridTrainer(model, optimizer, config, loss_fn=task.loss_fn, lr_scheduler=schedule)
    trainer.force_full_phase(10**9)
    return trainer


def measure(prepared: PreparedWorkload, note: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        prepared: What to step.
        note: Takes lines for a person who waits.
    """
    workload, task = prepared.workload, prepared.task
    num_steps = MAX_PREPARING_STEPS + workload.num_pairs
    batches = task.batches(0)
    with tempfile.TemporaryDirectory() as folder:
        bare, trainer = BareLoop(task, num_steps), build(prepared, num_steps)
        trainer.metrics.sink = JsonlSink(Path(folder) / "metrics.jsonl")
        note(f"{RECOVERY_STEPS} steps or more before measuring, until {MIN_WINDOWS} windows have closed")
        bring_up(trainer, bare, batches)
        pairs = []
        for k in range(workload.num_pairs):
            pairs.append(timed_pair(bare, trainer, next(batches), trainer_first=k % 2 == 1))
            if (k + 1) % 10 == 0:
                note(
                    f"{k + 1}/{workload.num_pairs} pairs, median ratio {statistics.median(p.ratio for p in pairs):.3f}"
                )
        syncs = count_syncs(bare, trainer, [next(batches), next(batches)])
        trainer.metrics.sink.close()
    memory = memory_ratios(prepared, bare.state_bytes(), trainer)
    return {**figures(pairs), **syncs, **memory, "workload": asdict(workload), "task": task.describe(),
            "environment": environment(workload.device)}  # fmt: skip


def bring_up(trainer: HybridTrainer, bare: BareLoop | None, batches: Iterator[Batch]) -> None:
    """Step until the trainer is in the FULL phase with all it will ever hold, and has let the blocks go."""
    run = trainer.run
    for _ in range(MAX_PREPARING_STEPS):
        settled = run.windows.num_closed >= MIN_WINDOWS and run.meter.num_real_steps >= RECOVERY_STEPS
        if run.phases.current is Phase.FULL and settled:
            return
        batch = next(batches)
        trainer.step(batch)
        if bare is not None:
            bare.step(batch)
    raise AssertionError(f"no {MIN_WINDOWS} windows have closed in {MAX_PREPARING_STEPS} steps")


def timed_pair(bare: BareLoop, trainer: HybridTrainer, batch: Batch, *, trainer_first: bool) -> Pair:
    """One step of either with the same batch."""

    def timed(step: Callable[[Batch], object]) -> tuple[float, float]:
        wait_for_device(trainer)
        started, cpu = time.perf_counter(), time.process_time()
        step(batch)
        wait_for_device(trainer)
        return time.perf_counter() - started, time.process_time() - cpu

    found = timed(trainer.step) if trainer_first else None
    bare_s, bare_cpu_s = timed(bare.step)
    trainer_s, trainer_cpu_s = found or timed(trainer.step)
    return Pair(
        bare_s=bare_s, trainer_s=trainer_s, window=trainer.run.windows.just_closed, bare_cpu_s=bare_cpu_s,
        trainer_cpu_s=trainer_cpu_s,
    )  # fmt: skip


def figures(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Ratios of the pairs; the mean is of total times and so includes the steps that close a window."""
    ratios = sorted(p.ratio for p in pairs)
    deciles = statistics.quantiles(ratios, n=10, method="inclusive")
    closing = [p.ratio for p in pairs if p.window]
    return {
        "full_step_ratio_median": statistics.median(ratios),
        "full_step_ratio_mean": sum(p.trainer_s for p in pairs) / sum(p.bare_s for p in pairs),
        "cpu_ratio_median": statistics.median(p.cpu_ratio for p in pairs),
        "cpu_ratio_mean": sum(p.trainer_cpu_s for p in pairs) / sum(p.bare_cpu_s for p in pairs),
        "ratio_p10": deciles[0],
        "ratio_p90": deciles[-1],
        "window_step_ratio_median": statistics.median(closing) if closing else None,
        "num_pairs": len(pairs),
        "num_windows": len(closing),
        "bare_step_ms_median": 1e3 * statistics.median(p.bare_s for p in pairs),
    }


def memory_ratios(prepared: PreparedWorkload, state_bytes: int, trainer: HybridTrainer) -> dict[str, Any]:
    """Bytes on the training device over those of the bare loop, by adding up tensors.

    Activations are the same for both and left out, which makes the ratio larger than it is in truth.
    """
    device = torch.device(prepared.workload.device).type
    usage = trainer.memory_usage()
    ratio = 1 + on_training_device(usage, device, offload=False) / state_bytes
    offloading = build(prepared, MAX_PREPARING_STEPS, offload=True)
    bring_up(offloading, None, prepared.task.batches(0))
    left = on_training_device(offloading.memory_usage(), device, offload=True)
    return {
        "memory_ratio_training_device": ratio,
        "memory_ratio_training_device_offload": 1 + left / state_bytes,
        "memory_bare_bytes": state_bytes,
        "memory_trainer_bytes": usage,
        "memory_note": (
            "counted, not measured: tensors held between steps, without activations"
            + ("; on the CPU host and training device are one memory, so the offload figure counts what would leave an "
               "accelerator as gone" if device == "cpu" else "")
        ),
    }  # fmt: skip


def count_syncs(bare: BareLoop, trainer: HybridTrainer, batches: Sequence[Batch]) -> dict[str, Any]:
    """How often a step reads a tensor from Python, which is where an accelerator would be waited for.

    The optimizers' step counts are not looked at: they are in host memory wherever the weights are.
    """
    counts = {}
    optimizers = (bare.optimizer, trainer.run.subject.optimizer)
    clocks = {id(state["step"]) for o in optimizers for state in o.state.values() if "step" in state}
    for name, step in (("bare", bare.step), ("trainer", trainer.step)):
        with counted_reads(clocks) as reads:
            for batch in batches:
                step(batch)
        counts[name] = sum(reads.values()) / len(batches)
    on_cpu = trainer.run.subject.on_cpu
    return {
        "host_syncs_per_step": None if on_cpu else counts["trainer"],
        "host_syncs_per_step_bare": None if on_cpu else counts["bare"],
        "tensor_reads_per_step": counts["trainer"],
        "tensor_reads_per_step_bare": counts["bare"],
        "host_syncs_note": (
            "the CPU has no host synchronisation; tensor_reads_per_step counts the calls that would wait for an "
            "accelerator (on the CPU the trainer reads loss and norm at every step, elsewhere once per check interval)"
            if on_cpu
            else "calls from Python that read a tensor of the accelerator"
        ),
    }


@contextmanager
def counted_reads(ignored: Collection[int] = ()) -> Iterator[dict[str, int]]:
    """Count the calls of :data:`READS` on tensors; one that calls another counts once.

    Args:
        ignored: Ids of tensors that do not count.
    """
    counts = dict.fromkeys(READS, 0)
    inside = False

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside or id(self) in ignored:
                return original(self, *args, **kwargs)
            counts[name] += self.device.type != "cpu" or not any_accelerator
            inside = True
            try:
                return original(self, *args, **kwargs)
            finally:
                inside = False

        return wrapper

    any_accelerator = torch.cuda.is_available() and torch.cuda.is_initialized()
    originals = {name: getattr(Tensor, name) for name in READS}
    own = {name: name in vars(Tensor) for name in READS}
    try:
        for name, original in originals.items():
            setattr(Tensor, name, counting(name, original))
        yield counts
    finally:
        for name, original in originals.items():
            if own[name]:
                setattr(Tensor, name, original)
            else:
                delattr(Tensor, name)


def format_text(result: Mapping[str, Any]) -> str:
    """The figures for a person."""
    w = result["workload"]
    return "\n".join([
        f"gpt {w['preset']}, batch {w['batch_size']} x {w['context']}, predictor {w['predictor']}, "
        f"{result['num_pairs']} pairs, {result['num_windows']} window closes, "
        f"bare step {result['bare_step_ms_median']:.1f} ms",
        f"FULL step over bare step  median {result['full_step_ratio_median']:.4f}  p10 {result['ratio_p10']:.4f}  "
        f"p90 {result['ratio_p90']:.4f}",
        f"with window closes        mean   {result['full_step_ratio_mean']:.4f}",
        f"by processor time         median {result['cpu_ratio_median']:.4f}  mean {result['cpu_ratio_mean']:.4f}",
        f"memory on the device      {result['memory_ratio_training_device']:.3f}, with offload "
        f"{result['memory_ratio_training_device_offload']:.3f} ({result['memory_note']})",
        f"tensor reads per step     {result['tensor_reads_per_step']:g}, "
        f"bare loop {result['tensor_reads_per_step_bare']:g}",
    ])  # fmt: skip
