"""``hpt bench scale``: what several processes cost, as functions of the number of weights and of ranks.

Measured here: how long ranks take to exchange a block (processes of this machine, gloo), how many blocks and bytes a
real step and a proposal exchange, how many passes over the weights and forwards a proposal takes, how long a pass over
a weight takes, and how many copies of the weights are held.  Computed from these: the table up to 70 B weights and
1,024 ranks.  Two assumptions stand in it and are said: an exchange takes log2(ranks) times what two processes take,
and a pass is bound by memory.
"""

from __future__ import annotations

import math
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...distributed.collective import Ranks
from ...records import Phase
from ...tasks import TaskSettings, build_optimizer, build_scheduler, make_task
from ...trainer import HybridTrainer
from ...weights import algebra as weights
from ..report.text import aligned

#: Sizes and numbers of ranks of the table.
SIZES: tuple[float, ...] = (1e7, 1.24e8, 1.3e9, 7e9, 7e10)
RANKS = (1, 2, 8, 64, 1024)
#: Bytes of a weight and of its gradient.
WIDE = 4
#: Blocks that are timed.
NUM_BLOCKS = 300
#: Always willing to propose, so that there is something to count.
SETTINGS: dict[str, Any] = {
    "training.warmup_steps": 2, "training.full_steps": 2, "training.explore_outcomes": 1000, "predictor.window": 2,
    "predictor.keep_basis": True, "gate.overhead_budget": 1.0, "gate.max_backoff": 1, "gate.significance": 0.4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What was measured; numbers per real step and per proposal are means.

    Attributes:
        num_weights: Of the model that was run.
        exchange_s: Seconds of one block by number of processes, the first decile of many.
        step_blocks, step_bytes: Of a real step.
        proposal_blocks, proposal_bytes: Of a proposal.
        step_passes, proposal_passes: Over the weights.
        proposal_forwards: Of a whole batch.
        pass_s: Seconds of one pass over one weight, read and written.
        copies: Of the weights that are held beside model and optimizer.
        num_proposals: That the means are over.
        proposal_calls: Forwards of batches or pieces of them: with sharded weights each gathers all of them.
        sharded: Weights are spread over the ranks (``fully_shard``), instead of copied (DDP).
    """

    num_weights: int
    exchange_s: dict[int, float]
    step_blocks: float
    step_bytes: float
    proposal_blocks: float
    proposal_bytes: float
    step_passes: float
    proposal_passes: float
    proposal_forwards: float
    pass_s: float
    copies: float
    num_proposals: int
    proposal_calls: float = 0.0
    sharded: bool = False


def measure(
    *, preset: str = "0.3M", num_steps: int = 60, processes: Sequence[int] = (2, 4),
    note: Callable[[str], None] = lambda line: None, sharded: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Coefficients, and the table that follows from them.

    Args:
        preset: Size of the gpt task's model.
        num_steps: Steps of the run that is counted, proposals included.
        processes: Numbers of processes whose exchanges are timed; the run is one of the first number.
        note: Takes lines for a person who waits.
        sharded: Spread the weights by ``fully_shard``, instead of a copy on each rank.

    Raises:
        RuntimeError: there is no gloo here, or nothing was proposed.
    """
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise RuntimeError("torch was built without gloo: several processes cannot be run here")
    exchange = {n: float(_run(n, _timed)) for n in processes}
    note("exchange of a block: " + ", ".join(f"{1e6 * s:.0f} us with {n} processes" for n, s in exchange.items()))
    counted = _run(processes[0], _counted, preset, num_steps, sharded)
    if not counted["num_proposals"]:
        raise RuntimeError(f"nothing was proposed in {num_steps} steps: take more")
    note(f"{counted['num_proposals']} proposals in {num_steps} steps")
    found = Coefficients(exchange_s=exchange, pass_s=pass_seconds(), **counted)
    table = [estimate(found, size, n) for size in SIZES for n in RANKS]
    return {"preset": preset, "coefficients": asdict(found), "table": table}


def estimate(found: Coefficients, num_weights: float, num_ranks: int) -> dict[str, float]:
    """What a model of that size costs on so many ranks, beside its own steps.

    Args:
        found: As measured.
        num_weights: P.
        num_ranks: n; each has a copy of the weights, or a part of them where they are sharded.

    Returns:
        ``gradient_bytes``: that the gradients' ring all-reduce sends per rank and step, 2 P (n - 1) / n floats, which
        plain training does, too; with sharded weights it is gathering them twice and scattering gradients,
        3 P (n - 1) / n, and every forward of a proposal gathers them once more; ``step_bytes``, ``proposal_bytes``:
        that ours send; ``step_exchange_s``, ``proposal_exchange_s``: time in which ranks wait for one another;
        ``proposal_passes_s``: time of the passes over the weights, with ``proposal_forwards`` forwards beside it;
        ``held_bytes``: held per rank beside model and optimizer.
    """
    several = num_ranks > 1
    there = (num_ranks - 1) / num_ranks
    held = num_weights / num_ranks if found.sharded else num_weights
    gathered = found.proposal_calls * WIDE * num_weights * there if found.sharded else 0.0
    latency = found.exchange_s[min(found.exchange_s)] * math.log2(num_ranks) if several else 0.0
    return {
        "num_weights": num_weights, "num_ranks": num_ranks,
        "gradient_bytes": (3 if found.sharded else 2) * WIDE * num_weights * there,
        "step_bytes": found.step_bytes * several, "proposal_bytes": found.proposal_bytes * several + gathered,
        "step_exchange_s": found.step_blocks * latency, "proposal_exchange_s": found.proposal_blocks * latency,
        "proposal_passes_s": found.proposal_passes * found.pass_s * held,
        "proposal_forwards": found.proposal_forwards, "held_bytes": found.copies * WIDE * held,
    }  # fmt: skip


def pass_seconds(num_weights: int = 1 << 22, repeats: int = 7) -> float:
    """CPU seconds that a pass over one weight takes, from moves of weights too many for the caches."""
    base, delta = [torch.randn(num_weights)], [torch.randn(num_weights)]
    live = [torch.empty(num_weights)]
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        weights.move_(live, base, delta, 0.5, 0)
        taken.append(time.process_time() - began)
    return statistics.median(taken) / (3 * num_weights)  # base and delta are read, the weights written


# ---- what a rank does --------------------------------------------------------------------------------------------


def _timed() -> float:
    ranks = Ranks()
    taken = []
    for _ in range(NUM_BLOCKS):
        began = time.perf_counter()
        ranks.means(lambda: [1.0])
        taken.append(time.perf_counter() - began)
    return statistics.quantiles(taken, n=10)[0]  # of a busy machine the exchanges that nothing came between


def _counted(preset: str, num_steps: int, sharded: bool) -> dict[str, Any]:
    task = make_task("gpt", TaskSettings(preset=preset, batch_size=4, context=32))
    model = task.build_model(0)
    if sharded:
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    calls = [0]

    def loss_fn(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        calls[0] += not torch.is_grad_enabled()
        return task.loss_fn(model, batch)

    optimizer = build_optimizer(model, task.defaults)
    schedule = build_scheduler(optimizer, task.defaults.schedule, 10 * num_steps)
    config = with_values(HybridTrainerConfig(), SETTINGS)
    wrapped = model if sharded else DistributedDataParallel(model)
    trainer = HybridTrainer(wrapped, optimizer, config, loss_fn, schedule)
    meter, ranks = trainer.run.meter, trainer.run.subject.ranks
    sums = {True: [0.0] * 6, False: [0.0] * 6}  # of proposals and of real steps
    held = 0
    for _, batch in zip(range(num_steps), task.batches(0), strict=False):
        before = (*ranks.exchanged, meter.num_passes, meter.num_forward - meter.num_attempted_steps, calls[0])
        result = trainer.step(batch)
        after = (*ranks.exchanged, meter.num_passes, meter.num_forward - meter.num_attempted_steps, calls[0])
        into = sums[result.phase is Phase.PREDICT]
        into[:] = [s + b - a for s, a, b in zip(into, (*before, 0), (*after, 1), strict=True)]
        held = max(held, sum(trainer.memory_usage().values()))
    number, here = trainer.run.subject.groups.num_weights, sum(p.numel() for p in trainer.run.subject.parameters)
    proposals, steps = sums[True], sums[False]
    asked, real = max(proposals[5], 1), max(steps[5], 1)
    return {
        "num_weights": number, "step_blocks": steps[0] / real, "step_bytes": steps[1] / real,
        "proposal_blocks": proposals[0] / asked, "proposal_bytes": proposals[1] / asked,
        "step_passes": steps[2] / real, "proposal_passes": proposals[2] / asked,
        "proposal_forwards": proposals[3] / asked, "copies": held / (WIDE * here), "num_proposals": int(proposals[5]),
        "proposal_calls": proposals[4] / asked, "sharded": sharded,
    }  # fmt: skip


def _run(size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns on the first of so many processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.start_processes(  # type: ignore[attr-defined,no-untyped-call]
        _enter, args=(size, port, answers, work, arguments), nprocs=size, start_method="spawn"
    )
    return answers.get()


def _enter(rank: int, size: int, port: int, answers: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    found = work(*arguments)
    if rank == 0:
        answers.put(found)
    distributed.barrier()
    distributed.destroy_process_group()


# ---- text ----------------------------------------------------------------------------------------------------------

_HEAD = (
    "weights", "ranks", "gradients, bytes/step", "ours, bytes/step", "ours, bytes/proposal", "waiting, s/step",
    "waiting, s/proposal", "passes, s/proposal", "held per rank, bytes",
)  # fmt: skip


def cells(table: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Of the table, one row per size and number of ranks."""
    return [
        [
            _si(row["num_weights"]), f"{row['num_ranks']:,.0f}", _si(row["gradient_bytes"]), _si(row["step_bytes"]),
            _si(row["proposal_bytes"]), f"{row['step_exchange_s']:.1e}", f"{row['proposal_exchange_s']:.1e}",
            f"{row['proposal_passes_s']:.2g}", _si(row["held_bytes"]),
        ]
        for row in table
    ]  # fmt: skip


def format_text(found: Mapping[str, Any]) -> str:
    """For a terminal."""
    c = found["coefficients"]
    exchange = ", ".join(f"{1e6 * s:.0f} us with {n} processes" for n, s in c["exchange_s"].items())
    return "\n".join([
        f"measured on {found['preset']} ({c['num_weights']:,} weights{', sharded' if c['sharded'] else ''}, "
        f"{c['num_proposals']} proposals):",
        f"  exchange of a block: {exchange}",
        f"  real step: {c['step_blocks']:.1f} blocks, {c['step_bytes']:.0f} bytes, {c['step_passes']:.1f} passes",
        f"  proposal: {c['proposal_blocks']:.1f} blocks, {c['proposal_bytes']:.0f} bytes, {c['proposal_passes']:.1f} "
        f"passes, {c['proposal_forwards']:.1f} forwards in {c['proposal_calls']:.1f} calls",
        f"  pass over a weight: {1e9 * c['pass_s']:.2f} ns; copies of the weights held: {c['copies']:.1f}", "",
        *aligned(_HEAD, cells(found["table"])),
    ])  # fmt: skip


def markdown(found: Mapping[str, Any]) -> str:
    """For a page: what was measured, and the table."""
    said, _, _ = format_text(found).partition("\n\n")
    rows = [list(_HEAD), ["---:"] * len(_HEAD), *cells(found["table"])]
    return "\n".join(["```text", said, "```", "", *(f"| {' | '.join(row)} |" for row in rows)])


def _si(value: float) -> str:
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"
