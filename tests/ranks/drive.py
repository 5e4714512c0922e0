"""One rank's run, compared with the others' at every step; and the same run by one process."""

from __future__ import annotations

import hashlib
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hybrid_predict_trainer import HybridTrainer, attach
from hybrid_predict_trainer.weights.shards import whole

from .material import CASES, Case, batches, loss_fn, network, optimizer_of, schedule_of, share

Facts = dict[str, Any]


def facts_of(run: Any, result: Any, model: nn.Module) -> Facts:
    """What a step came to: all of it is to be the same on every rank."""
    weights = torch.cat([whole(p).detach().reshape(-1) for p in model.parameters()])
    return {
        "phase": result.phase.value, "reason": result.reason, "skipped": result.skipped, "kept": result.was_predicted,
        "loss": result.loss, "norm": result.gradient_norm,
        "multiplier": run.optimizer_step.scale.learned, "blocks": run.optimizer_step.switchback.num_blocks,
        "horizon": run.proposer.horizon, "position": run.position,
        "generator": hashlib.blake2b(run.judge.generator.get_state().numpy().tobytes()).hexdigest(),
        "weights": weights.tolist(),
    }  # fmt: skip


def trained(case: Case, driver: str, whole: Sequence[Any], model: nn.Module, each: Callable[[Facts], None]) -> Any:
    """Train; ``each`` is called after every step with what it came to.  Returns the run."""
    inner = getattr(model, "module", model)
    optimizer = optimizer_of(model, case.lr)
    schedule = schedule_of(optimizer, len(whole))
    if driver == "trainer":
        trainer = HybridTrainer(model, optimizer, case.settings(), loss_fn, schedule)
        trainer.run.meter.plan(len(whole))
        for batch in whole:
            each(facts_of(trainer.run, trainer.step(batch), inner))
        return trainer.run
    engine = attach(model, optimizer, case.settings(), loss_fn=loss_fn, lr_scheduler=schedule, total_steps=len(whole))
    for batch in whole:
        if engine.finished:
            break
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        engine.note(loss, batch)
        optimizer.step()
        each(facts_of(engine.run, engine.result, inner))
    run = engine.run
    engine.detach()
    return run


def spread(model: nn.Module, *, sharded: bool) -> nn.Module:
    """In what several processes train it: under DDP, or with weights that ``fully_shard`` has spread."""
    if not sharded:
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    fully_shard(model[0], mesh=mesh)  # type: ignore[index]
    fully_shard(model, mesh=mesh)  # the root keeps what it has gathered of the others
    return model


def alone(name: str, driver: str, steps: int, hidden: int = 8) -> list[Facts]:
    """The run of one process with the whole batches."""
    case, found = CASES[name], list[Facts]()
    whole = batches(steps, full=case.full, noise=case.noise)
    trained(case, driver, share(whole, 0, 1), network(hidden=hidden), found.append)
    return found


def rank_run(
    name: str,
    driver: str,
    steps: int,
    rank: int,
    size: int,
    *,
    compare: bool = True,
    sharded: bool = False,
    hidden: int = 8,
) -> tuple[list[Facts], Any]:
    """One rank's run of a case, within a process group.

    Raises:
        AssertionError: ``compare``, and a step is another one elsewhere.
    """
    case, found = CASES[name], list[Facts]()
    whole = batches(steps, full=case.full, noise=case.noise)

    def each(facts: Facts) -> None:
        found.append(facts)
        if not compare:
            return
        everywhere: list[Any] = [None] * size
        distributed.all_gather_object(everywhere, facts)
        for key, value in facts.items():
            others = [theirs[key] for theirs in everywhere]
            assert all(repr(v) == repr(value) for v in others), f"step {len(found) - 1}: {key} is {others}"

    run = trained(case, driver, share(whole, rank, size), spread(network(hidden=hidden), sharded=sharded), each)
    return found, run


# ---- processes ---------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _entered(
    rank: int, size: int, port: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as every launcher sets it; accelerate warns where none has
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        result, failed = work(*arguments, rank=rank, size=size), ""
    except BaseException:
        result, failed = None, traceback.format_exc()
    torch.save((result, failed), Path(folder) / f"{rank}.pt")
    if failed:
        os._exit(1)  # the others may wait in a collective: the first line that failed is what matters
    distributed.destroy_process_group()


def with_ranks(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(*arguments, rank=, size=)`` returns on every rank, each in a process of its own.

    Raises:
        AssertionError: it raised on one.
    """
    try:
        torch.multiprocessing.start_processes(
            _entered, args=(size, free_port(), str(folder), work, arguments), nprocs=size, start_method="fork"
        )
    except Exception as error:
        told = [f"rank {p.stem}: {text}" for p in sorted(folder.glob("*.pt")) if (text := _read(p)[1])]
        raise AssertionError("\n".join(told) or str(error)) from None
    return [_read(folder / f"{rank}.pt")[0] for rank in range(size)]


def _read(path: Path) -> tuple[Any, str]:
    try:
        found: tuple[Any, str] = torch.load(path, weights_only=False)  # written by our own processes a moment ago
    except (EOFError, RuntimeError):  # ended by the others' failure while it was writing
        return None, ""
    return found


def apart(a: Sequence[Facts], b: Sequence[Facts], tolerance: float) -> str | None:
    """The first step at which two runs are not the same one, up to rounding; None: there is none."""
    for step, (x, y) in enumerate(zip(a, b, strict=True)):
        for key in ("phase", "reason", "skipped", "kept", "multiplier", "blocks", "horizon", "position", "generator"):
            if x[key] != y[key]:
                return f"step {step}: {key} is {x[key]!r} and {y[key]!r}"
        left, right = torch.tensor(x["weights"]), torch.tensor(y["weights"])
        if not torch.allclose(left, right, rtol=0, atol=tolerance):
            return f"step {step}: weights differ by {float((left - right).abs().max()):.2g}"
    return None


def as_tensor(facts: Facts) -> Tensor:
    return torch.tensor(facts["weights"])
