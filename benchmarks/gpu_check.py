"""What `gpu_check.sh` runs: short checks on a device, each with what was measured and whether it holds."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, with_values
from hybrid_predict_trainer.experiments.arms.environment import environment
from hybrid_predict_trainer.experiments.bench import memory, overhead
from hybrid_predict_trainer.tasks import TaskSettings, make_task
from hybrid_predict_trainer.tell.sinks import jsonable

Found = dict[str, Any]
LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large things are.

    Attributes:
        preset: Of the gpt task's model, for what compares runs bit for bit.
        large: Of the model whose price and memory are measured.
        batch: Examples per step.
        context: Tokens per example.
        steps: Per run that is compared.
        pairs: Of the overhead.
        ratio: Most that a full step may cost over the bare loop's; None: too small to say.
        held: Most that may be held on the device by default and with offload, over the bare loop's.
    """

    preset: str = "0.9M"
    large: str = "10M"
    batch: int = 8
    context: int = 128
    steps: int = 60
    pairs: int = 40
    ratio: float | None = 1.010
    held: tuple[float, float] | None = (1.5, 1.05)


TINY = Size(preset="0.3M", large="0.3M", batch=2, context=16, steps=24, pairs=30, ratio=None, held=None)


class Check:
    """The device, and what every check needs."""

    def __init__(self, device: str, size: Size) -> None:
        """Find the data."""
        self.device, self.size = torch.device(device), size
        settings = TaskSettings(preset=size.preset, batch_size=size.batch, context=size.context, device=device)
        self.task = make_task("gpt", settings)

    def batches(self) -> Iterator[Any]:
        """The same ones every time."""
        return self.task.batches(0)

    def parts(self, kind: str = "adamw") -> tuple[nn.Module, Optimizer, CosineAnnealingLR]:
        """Model, optimizer, schedule; always the same."""
        model = self.task.build_model(0)
        made: Callable[..., Optimizer] = AdamW if kind != "sgd" else SGD
        more: dict[str, Any] = {"momentum": 0.9} if kind == "sgd" else {"fused": kind == "fused"}
        optimizer = made(model.parameters(), lr=1e-3, **more)
        return model, optimizer, CosineAnnealingLR(optimizer, 10 * self.size.steps)

    def trainer(
        self, model: nn.Module, optimizer: Optimizer, schedule: Any, loss_fn: LossFn | None = None, **settings: Any
    ) -> HybridTrainer:
        """With short phases; settings have ``__`` for dots."""
        values = {"training.warmup_steps": 4, "predictor.window": 4, "training.gradient_clip_norm": 1.0}
        values |= {name.replace("__", "."): value for name, value in settings.items()}
        config = with_values(HybridTrainerConfig(), values)
        return HybridTrainer(model, optimizer, config, loss_fn or self.task.loss_fn, schedule)

    def ran(self, batches: Sequence[Any], **settings: Any) -> tuple[HybridTrainer, list[Tensor]]:
        """A trainer after these batches, and its weights."""
        model, optimizer, schedule = self.parts()
        trainer = self.trainer(model, optimizer, schedule, **settings)
        for batch in batches:
            trainer.step(batch)
        trainer.summary()  # reads what is held back
        return trainer, weights_of(model)

    def some(self, num: int) -> list[Any]:
        """The first batches."""
        return [batch for _, batch in zip(range(num), self.batches(), strict=False)]

    @property
    def on_cpu(self) -> bool:
        """Whether there is no accelerator."""
        return self.device.type == "cpu"


def weights_of(model: nn.Module) -> list[Tensor]:
    """Copies of the weights."""
    return [p.detach().clone() for p in model.parameters()]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- checks ------------------------------------------------------------------------------------------------


def off(check: Check) -> Found:
    """A disabled trainer is the plain loop, for three optimizers, with clipping."""
    kinds = ["adamw", "sgd", *(["fused"] if not check.on_cpu else [])]
    agreed = {}
    for kind in kinds:
        ends = []
        for ours in (False, True):
            model, optimizer, schedule = check.parts(kind)
            trainer = check.trainer(model, optimizer, schedule, training__enabled=False) if ours else None
            for batch in check.some(check.size.steps // 2):
                if trainer is not None:
                    trainer.step(batch)
                    continue
                optimizer.zero_grad(set_to_none=True)
                check.task.loss_fn(model, batch).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            ends.append(weights_of(model))
        agreed[kind] = same(*ends)
    return {"ok": all(agreed.values()), "bitwise_the_plain_loop": agreed}


def resume(check: Check) -> Found:
    """A run that goes on from a checkpoint is the run that never stopped."""
    batches = check.some(check.size.steps)
    middle = 2 * len(batches) // 3
    _, whole = check.ran(batches)
    with tempfile.TemporaryDirectory() as folder:
        first, _ = check.ran(batches[:middle])
        path = first.save_checkpoint(folder)
        model, optimizer, schedule = check.parts()
        second = check.trainer(model, optimizer, schedule)
        second.load_checkpoint(path)
    for batch in batches[middle:]:
        second.step(batch)
    second.summary()
    # to save is to read what is held back, so the run that is compared reads there as well
    model, optimizer, schedule = check.parts()
    stopped = check.trainer(model, optimizer, schedule)
    for index, batch in enumerate(batches):
        if index == middle:
            stopped.summary()
        stopped.step(batch)
    stopped.summary()
    agreed = same(weights_of(second.run.subject.model), weights_of(stopped.run.subject.model))
    return {"ok": agreed, "bitwise_the_run_that_read_there": agreed,
            "bitwise_the_run_that_never_stopped": same(weights_of(second.run.subject.model), whole)}  # fmt: skip


def nan(check: Check) -> Found:
    """A loss that is not a number is found late, its interval undone, and training goes on."""
    steps, index = check.size.steps, 0
    model, optimizer, schedule = check.parts()

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        loss = check.task.loss_fn(m, batch)
        return loss * math.nan if index == steps // 2 else loss

    trainer = check.trainer(model, optimizer, schedule, loss_fn)
    for index, batch in enumerate(check.some(steps)):  # noqa: B007 - the loss looks at it
        trainer.step(batch)
    trainer.summary()
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    told = trainer.statistics()
    skipped = told["num_skipped_steps"]
    return {"ok": finite and skipped >= 1, "weights_finite": finite, "num_skipped_steps": skipped,
            "num_real_steps": told["num_real_steps"]}  # fmt: skip


def offload(check: Check) -> Found:
    """With copies in host memory the run is the same, and the copies are there."""
    batches = check.some(check.size.steps)
    plain, here = check.ran(batches)
    parked, there = check.ran(batches, predictor__offload=True)
    quiet = all(t.statistics()["num_jumps_accepted"] == 0 for t in (plain, parked))
    run = parked.run
    points = [p for p in (run.rollback.point, run.rollback.spare, run.safety.raise_point, run.safety.safe_point) if p]
    places = sorted({t.device.type for p in points for t in p.parameters})
    usage = parked.memory_usage()
    left = memory.on_training_device(usage, check.device.type, offload=True)
    # sums on the host round otherwise: where a jump was accepted the runs need not agree to the last bit
    agreed = same(here, there) or not quiet
    return {"ok": agreed and places in ([], ["cpu"]), "bitwise": same(here, there), "any_jump_accepted": not quiet,
            "copies_lie_on": places, "bytes_left_on_device": left}  # fmt: skip


def reading(check: Check) -> Found:
    """Between two readings no step of ours waits for the device; torch itself says so where it can."""
    trainer, _ = check.ran(check.some(check.size.steps))
    interval = trainer.config.divergence.check_interval_steps
    batches = check.some(4 * interval)
    waits = []
    with overhead.counted_reads() as reads:
        for batch in batches:
            before = sum(reads.values())
            trainer.step(batch)
            waits.append(sum(reads.values()) - before)
    quiet_steps = sum(n == 0 for n in waits)
    found: Found = {"reads_per_step": sum(waits) / len(waits), "steps_without_a_read": quiet_steps, "steps": len(waits),
                    "reading_interval": interval}  # fmt: skip
    if check.on_cpu:  # a read costs nothing here: every step reads its own loss
        return {"ok": len(waits) == 4 * interval, **found}
    found["waits_that_torch_saw"] = _seen_by_torch(trainer, batches) if check.device.type == "cuda" else None
    return {"ok": quiet_steps >= len(waits) // 2, **found}


def _seen_by_torch(trainer: HybridTrainer, batches: Sequence[Any]) -> int:
    """Steps in which CUDA was waited for, by torch's own watch."""
    seen = 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            try:
                trainer.step(batch)
            except RuntimeError:
                seen += 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return seen


def price(check: Check) -> Found:
    """A full step over the bare loop's."""
    size = check.size
    workload = overhead.Workload(
        preset=size.large, batch_size=size.batch, context=size.context, device=str(check.device), num_pairs=size.pairs
    )
    found = overhead.measure(overhead.prepare(workload), note=say)
    ratio = found["full_step_ratio_median"]
    names = ("full_step_ratio_median", "full_step_ratio_mean", "ratio_p10", "ratio_p90", "host_syncs_per_step")
    return {"ok": size.ratio is None or ratio <= size.ratio, "bound": size.ratio, **{n: found[n] for n in names}}


def held(check: Check) -> Found:
    """What lies on the device between steps, counted, and the peak that torch measured."""
    if check.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(check.device)
    rows = memory.held(preset=check.size.large, device=str(check.device))
    bounds = check.size.held
    ok = bounds is None or all(row["ratio"] <= most for row, most in zip(rows, bounds, strict=True))
    found: Found = {"ok": ok, "bounds": bounds, **{row["settings"]: row["ratio"] for row in rows},
                    "in_weights": [row["in_weights"] for row in rows]}  # fmt: skip
    if check.device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(check.device)
    return found


CHECKS: dict[str, Callable[[Check], Found]] = {
    "off": off, "resume": resume, "nan": nan, "offload": offload, "reading": reading, "overhead": price, "memory": held,
}  # fmt: skip


# ---- program -----------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Progress for a person."""
    print(line, file=sys.stderr, flush=True)


def markdown(results: dict[str, Found]) -> str:
    """A row per check."""
    rows = ["| check | holds | measured |", "|---|---|---|"]
    for name, found in results.items():
        told = ", ".join(f"{k} {_short(v)}" for k, v in found.items() if k not in ("ok", "seconds"))
        rows.append(f"| {name} | {'yes' if found['ok'] else 'no'} | {told} |")
    return "\n".join(rows) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + ")"
    return "(" + ", ".join(map(_short, value)) + ")" if isinstance(value, list | tuple) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default=None, help="cuda; with --tiny the cpu")
    parser.add_argument("--only", default=",".join(CHECKS), metavar="A,B", help=", ".join(CHECKS))
    parser.add_argument("--limit-s", type=float, default=470.0, help="no check begins later")
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args(arguments)
    names = chosen.only.split(",")
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        print(f"gpu_check: unknown check {unknown[0]!r}: {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    device = chosen.device or ("cpu" if chosen.tiny else "cuda")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print("gpu_check: there is no CUDA device here: --tiny takes the same path on the CPU", file=sys.stderr)
        return 1
    torch.use_deterministic_algorithms(True, warn_only=True)
    began, results = time.monotonic(), dict[str, Found]()
    check = Check(device, TINY if chosen.tiny else Size())
    for name in names:
        started = time.monotonic()
        if started - began > chosen.limit_s:
            results[name] = {"ok": False, "why": "no time left"}
            continue
        try:
            results[name] = CHECKS[name](check)
        except Exception as error:  # the others are still worth having
            results[name] = {"ok": False, "why": f"{type(error).__name__}: {error}"}
        results[name]["seconds"] = time.monotonic() - started
        say(f"{name}: {'holds' if results[name]['ok'] else 'DOES NOT HOLD'} ({results[name]['seconds']:.0f} s)")
        write(chosen.out, {"schema": 1, "what": "gpu_check", "environment": environment(device), "checks": results})
    print(markdown(results), end="")
    return 0 if all(found["ok"] for found in results.values()) else 1


def write(out: Path, result: Found) -> None:
    """Whole after every check: a run that is stopped leaves what it has."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_check.json").write_text(json.dumps(jsonable(result), indent=1) + "\n", encoding="utf-8")
    (out / "gpu_check.md").write_text(markdown(result["checks"]), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
