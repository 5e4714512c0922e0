"""An exception at any line of a step leaves the run whole: as before that step, or as after it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import hybrid_predict_trainer
from hybrid_predict_trainer import Engine, HybridTrainer, HybridTrainerConfig, Phase, StepResult, attach, with_values
from hybrid_predict_trainer.cycle import correct_step
from hybrid_predict_trainer.keep.memento import Memento
from hybrid_predict_trainer.move import lookahead
from hybrid_predict_trainer.move.lr_multiplier import LrMultiplier
from hybrid_predict_trainer.propose.confidence import Confidence, Evidence

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="every try runs in a fork of its own")

PACKAGE = str(Path(hybrid_predict_trainer.__file__).parent)
#: Tries per kind of step, spread evenly over its lines.
NUM_TRIES = 20
EAGER = {
    "training.warmup_steps": 4, "training.full_steps": 3, "predictor.window": 3, "training.correct_steps": 3,
    "training.confidence_threshold": 0.0, "gate.overhead_budget": 1.0, "gate.overhead_budget_exact": 1.0,
    "gate.max_backoff": 1, "predictor.rest_windows": 0, "gate.holdout_fraction": 0.0, "gate.max_chunks": 2,
    "predictor.type": "secant",
}  # fmt: skip
Batch = tuple[torch.Tensor, torch.Tensor]


def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def batches(n: int, noise: float) -> list[Batch]:
    generator, out = torch.Generator().manual_seed(0), []
    for _ in range(n):
        x = torch.randn(16, 4, generator=generator)
        out.append((x, x.sum(1, keepdim=True).sin() + noise * torch.randn(16, 1, generator=generator)))
    return out


def built(*, norm: bool = False, cut: bool = False, **settings: Any) -> HybridTrainer:
    torch.manual_seed(0)
    inner = [torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.1)] if norm else []
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), *inner, torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.05, 1 - t / 2000))
    values = {**EAGER, **{k.replace("__", "."): v for k, v in settings.items()}}
    settings = with_values(HybridTrainerConfig(), values)
    roles = {"0.weight": "mlp_up", "0.bias": "mlp_up"} if cut else None
    trainer = HybridTrainer(model, optimizer, settings, loss_fn, schedule, roles=roles)
    if cut:  # none of it is left after a hundred steps
        scale = trainer.run.optimizer_step.scale
        assert isinstance(scale, LrMultiplier)
        scale.cuts.factors = [0.1 if role == "mlp_up" else 1.0 for role in trainer.run.windows.groups.roles]
        assert scale.shortening
    return trainer


def in_a_fork(work: Callable[[], Any]) -> Any:
    """What a function returns, run in a copy of this process; None where it died."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(data) if data else None


def weights_of(trainer: HybridTrainer) -> list[list[float]]:
    return [p.detach().reshape(-1).tolist() for p in trainer.run.subject.model.parameters()]


def stepped(trainer: HybridTrainer, batch: Batch, later: list[Batch], line: int) -> dict[str, Any]:
    """Take a step that is interrupted at its n-th line (-1: it is not), and go on."""
    count, where = 0, ""

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        def inside(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal count, where
            if event == "line":
                count += 1
                if count == line:
                    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                    raise KeyboardInterrupt
            return inside

        return inside if frame.f_code.co_filename.startswith(PACKAGE) else None

    run, raised = trainer.run, False
    sys.settrace(trace)
    try:
        trainer.step(batch)
    except KeyboardInterrupt:
        raised = True
    finally:
        sys.settrace(None)
    found: dict[str, Any] = {
        "raised": raised, "num_lines": count, "where": where, "weights": weights_of(trainer),
        "modes": [m.training for m in run.subject.model.modules()], "grad": torch.is_grad_enabled(),
        "rates": [g["lr"] for g in run.subject.optimizer.param_groups] == run.schedule.scheduler.get_last_lr(),
    }  # fmt: skip
    found["losses"] = [trainer.step(b).loss for b in later]
    found["schedule"] = run.schedule.scheduler.last_epoch - run.schedule.num_steps
    found["behind"] = run.judge.probation is None and run.schedule.num_steps < run.position - 1
    found["lengths"] = len(
        {len(run.proposer.feedback.confidence.state_dict()[k]) for k in ("evidence", "kept", "stated")}
    )
    return found


def before(trainer: HybridTrainer, data: list[Batch], wanted: Callable[[HybridTrainer, StepResult], bool]) -> int:
    """Train until the next step is a wanted one; returns its number."""
    for i, batch in enumerate(data):
        if in_a_fork(lambda batch=batch: wanted(trainer, trainer.step(batch))):  # type: ignore[misc]
            return i
        trainer.step(batch)
    raise AssertionError("no such step")


def accepted(trainer: HybridTrainer, result: StepResult) -> bool:
    return result.phase is Phase.PREDICT and result.was_predicted


def refused(trainer: HybridTrainer, result: StepResult) -> bool:
    return result.phase is Phase.PREDICT and not result.was_predicted


def concluded(trainer: HybridTrainer, result: StepResult) -> bool:
    return result.phase is Phase.CORRECT and trainer.run.judge.probation is None


def full(trainer: HybridTrainer, result: StepResult) -> bool:
    return result.phase is Phase.FULL and trainer.current_step > 8


def applied(trainer: HybridTrainer, result: StepResult) -> bool:
    """A step after which the lookahead moves the weights."""
    num_steps = trainer.run.optimizer_step.lookahead.num_steps
    return full(trainer, result) and num_steps > 0 and num_steps % lookahead.EVERY == 0


def shortened(trainer: HybridTrainer, result: StepResult) -> bool:
    return full(trainer, result) and trainer.run.optimizer_step.scale.shortening


KINDS: dict[str, tuple[bool, Callable[..., bool], dict[str, Any]]] = {
    "accepted": (True, accepted, {}),
    "kept": (True, concluded, {}),
    "rolled back": (True, concluded, {}),
    "refused": (False, refused, {"norm": True, "gate__significance": 0.5}),
    "full, noisy": (False, full, {"norm": True}),
    "full, low-pass": (False, applied, {"norm": True, "lookahead__scope": "all"}),
    "full, cut": (False, shortened, {"cut": True, "lookahead__scope": "all"}),
    "full, exact": (True, full, {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_step_leaves_the_run_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact, wanted, settings = KINDS[kind]
    trainer = built(**settings)
    data = batches(1, 0.0) * 120 if exact else batches(120, 0.3)
    if kind == "rolled back":
        monkeypatch.setattr(correct_step, "probation_passes", lambda probation, sigma: False)
    i = before(trainer, data, wanted)
    later, start, modes = (
        data[i + 1 : i + 9],
        weights_of(trainer),
        [m.training for m in trainer.run.subject.model.modules()],
    )
    whole = in_a_fork(lambda: stepped(trainer, data[i], later, -1))
    faults = []
    for line in range(1, whole["num_lines"], max(1, whole["num_lines"] // NUM_TRIES)):
        found = in_a_fork(lambda line=line: stepped(trainer, data[i], later, line))  # type: ignore[misc]
        good = (
            found is not None
            and found["weights"] in (start, whole["weights"])
            and (found["modes"], found["grad"], found["rates"], found["schedule"]) == (modes, True, True, 0)
            and (found["behind"], found["lengths"]) == (False, 1)
        )
        if not good:
            faults.append((line, found and found["where"]))
    assert faults == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("late", [False, True])
def test_a_step_interrupted_before_its_cut_is_shortened_once(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the optimizer and the cut, and between the cut and what follows."""
    ends = []
    for interrupts in (False, True):
        trainer, data = built(cut=True), batches(4, 0.3)
        for batch in data[:3]:
            trainer.step(batch)
        scale = trainer.run.optimizer_step.scale
        if interrupts:
            original = scale.after_step

            def after_step(parameters: Any, original: Any = original, scale: Any = scale) -> int:
                monkeypatch.setattr(scale, "after_step", original)
                if late:
                    original(parameters)
                raise KeyboardInterrupt

            monkeypatch.setattr(scale, "after_step", after_step)
            with pytest.raises(KeyboardInterrupt):
                trainer.step(data[3])
        else:
            trainer.step(data[3])
        ends.append((weights_of(trainer), scale.num_steps, trainer.run.meter.num_real_steps))
    assert ends[0] == ends[1]


# ---- the parts ---------------------------------------------------------------------------------------------


def test_a_memento_brings_back_values_and_contents() -> None:
    class Holder:
        def __init__(self) -> None:
            self.number, self.items, self.table, self.tensor = 1, [1, 2], {"a": 1}, torch.zeros(2)

    holder = Holder()
    items, tensor = holder.items, holder.tensor
    memento = Memento([holder, None])
    for _ in range(2):
        holder.number, holder.tensor = 2, torch.ones(2)
        holder.items.append(3)
        holder.table = {}
        memento.restore()
        assert (holder.number, holder.items, holder.table) == (1, [1, 2], {"a": 1})
        assert holder.items is items
        assert holder.tensor is tensor


def test_an_outcome_is_learnt_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    confidence = Confidence(capacity=2)
    evidence = Evidence(raw=0.5, record=0.5, reduction=0.1, price=1.0, noise=0.1)

    def interrupted(*args: Any) -> float:
        raise KeyboardInterrupt

    confidence.observe(evidence, True)
    monkeypatch.setattr(confidence, "_stated_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        confidence.observe(evidence, True)
    state = confidence.state_dict()
    assert {len(state[k]) for k in ("evidence", "kept", "logits", "stated")} == {1}
    monkeypatch.undo()
    for _ in range(3):
        confidence.observe(evidence, False)
    assert confidence.state_dict()["kept"] == [0.0, 0.0]


# ---- a loop of the user's own --------------------------------------------------------------------------------


def ridden(**settings: Any) -> tuple[Engine, torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.05, 1 - t / 2000))
    values = with_values(HybridTrainerConfig(), {**EAGER, **{k.replace("__", "."): v for k, v in settings.items()}})
    return attach(model, optimizer, values, loss_fn=loss_fn, lr_scheduler=schedule), model, optimizer


def gone_round(made: Any, batch: Batch, line: int | None = None) -> tuple[int, bool]:
    """One iteration, interrupted at its n-th line of ours (0: they are counted); how many, and whether it was."""
    engine, model, optimizer = made
    count, raised = 0, False

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        def inside(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal count
            count += event == "line"
            if event == "line" and count == line:
                raise KeyboardInterrupt
            return inside

        return inside if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(None if line is None else trace)
    try:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        engine.note(loss, batch)
        optimizer.step()
    except KeyboardInterrupt:
        raised = True
    finally:
        sys.settrace(None)
    return count, raised


def numbers_of(model: torch.nn.Module) -> list[list[float]]:
    return [p.detach().reshape(-1).tolist() for p in model.parameters()]


def interrupted(made: Any, batch: Batch, later: list[Batch], line: int) -> dict[str, Any]:
    engine, model, optimizer = made
    num_lines, raised = gone_round(made, batch, line)
    found = {
        "num_lines": num_lines, "raised": raised, "weights": numbers_of(model),
        "grad": torch.is_grad_enabled(), "training": model.training,
        "rates": [g["lr"] for g in optimizer.param_groups] == engine.run.schedule.scheduler.get_last_lr(),
    }  # fmt: skip
    for each in later:
        gone_round(made, each)
    found["finite"] = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    found["schedule"] = engine.run.schedule.scheduler.last_epoch - engine.run.schedule.num_steps
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["jump", "lookahead"])
def test_a_loop_of_the_users_own_may_be_interrupted_anywhere(kind: str) -> None:
    """The weights are those before the iteration, after the optimizer's step, or after the jump behind it."""
    made = ridden(**({"lookahead__scope": "all"} if kind == "lookahead" else {}))
    data = batches(1, 0.0) * 60 if kind == "jump" else batches(60, 0.3)
    meter = made[0].run.meter
    for i, batch in enumerate(data):  # up to the iteration before the one that is wanted
        if kind == "lookahead" and i == 20:
            break
        before = meter.num_jumps_accepted
        if kind == "jump" and in_a_fork(lambda b=batch: [gone_round(made, b), meter.num_jumps_accepted])[1] > before:  # type: ignore[misc]
            break
        gone_round(made, batch)
    start = numbers_of(made[1])
    whole = in_a_fork(lambda: interrupted(made, data[i], data[i + 1 : i + 9], 0))
    assert (whole["raised"], whole["schedule"]) == (False, 0)
    seen: list[Any] = []
    for line in range(1, whole["num_lines"], max(1, whole["num_lines"] // 8)):
        found = in_a_fork(lambda line=line: interrupted(made, data[i], data[i + 1 : i + 5], line))
        assert found is not None, f"line {line}"
        told = [found[key] for key in ("raised", "grad", "training", "rates", "finite", "schedule")]
        assert told == [True, True, True, True, True, 0], f"line {line}: {told}"
        if found["weights"] not in (start, whole["weights"], *seen):
            seen.append(found["weights"])
    assert len(seen) == (1 if kind == "jump" else 0), "weights of no station"
