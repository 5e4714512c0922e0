"""What happens around a run: to its optimizer, its data, its memory and its clock."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .material import Batch, Faulty, Subject, batches, loss_of, ours, settings
from .table import Case
from .training import STEPS, against_plain


def group_added(seed: int, _: Path) -> str | None:
    """A layer is handed to the optimizer in mid-run."""
    at = random.Random(seed).randrange(1, STEPS)

    def act(subject: Subject, number: int) -> None:
        if number == at:
            extra = nn.Parameter(torch.zeros(1))
            subject.model.register_parameter("extra", extra)
            subject.optimizer.add_param_group({"params": [extra]})
            for name in ("base_lrs", "lr_lambdas"):  # the schedule has to hear of it too: torch does not tell it
                getattr(subject.scheduler, name).append(getattr(subject.scheduler, name)[0])

    def loss(model: nn.Module, batch: Any) -> Tensor:
        extra = getattr(model, "extra", None)
        return loss_of(model, batch) + (0.0 if extra is None else (extra - 1).square().sum())

    return against_plain(seed, batches(seed, STEPS), act=act, loss=loss)


def group_taken(seed: int, _: Path) -> str | None:
    """Parameters are taken out of the optimizer in mid-run."""
    at = random.Random(seed).randrange(1, STEPS)

    def act(subject: Subject, number: int) -> None:
        if number == at:
            group = subject.optimizer.param_groups[0]
            group["params"] = group["params"][2:]

    return against_plain(seed, batches(seed, STEPS), act=act)


def layer_frozen(seed: int, _: Path) -> str | None:
    """Frozen in mid-run, under the default configuration with a schedule: it stays where it is."""
    subject = Subject.of(seed)
    trainer = subject.trainer(settings(max_lr_multiplier=50.0, lookahead__scope="all", lookahead__damping=0.25))
    data = batches(seed, 120)
    ours(trainer, subject, data[:60])
    layer: Any = subject.model[0]  # type: ignore[index]
    for p in layer.parameters():
        p.requires_grad_(False)
        p.grad = None
    before = [p.clone() for p in layer.parameters()]
    ours(trainer, subject, data[60:])
    moved = [not torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True)]
    return "a frozen weight has moved" if any(moved) else None


def rate_jumps(factor: float, seed: int, _: Path) -> str | None:
    """Somebody multiplies the rate for a while."""
    at = random.Random(seed).randrange(5, STEPS - 5)

    def act(subject: Subject, number: int) -> None:
        if number in (at, at + 5):
            times = factor if number == at else 1 / factor
            subject.scheduler.base_lrs = [lr * times for lr in subject.scheduler.base_lrs]
            for group in subject.optimizer.param_groups:
                group["lr"] *= times

    return against_plain(seed, batches(seed, STEPS), act=act, kind="sgd")


def zero_gradients(seed: int, _: Path) -> str | None:
    """For ten steps no gradient at all."""
    at = random.Random(seed).randrange(STEPS - 10)
    data = [(x, y, 0.0 if at <= i < at + 10 else 1.0) for i, (x, y) in enumerate(batches(seed, STEPS))]
    return against_plain(seed, data, loss=lambda model, batch: loss_of(model, batch) * batch[2])


def constant_loss(seed: int, _: Path) -> str | None:
    """The same loss at every step, without noise and without a slope."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        value = loss_of(model, batch)
        return value - value.detach() + 1.5

    return against_plain(seed, batches(seed, STEPS), loss=loss)


def ragged_batches(smallest: int, seed: int, _: Path) -> str | None:
    """Batches of any size; an empty one has a loss that is not finite."""
    dice = random.Random(seed)
    data = [(x[: (n := dice.randint(smallest, 16))], y[:n]) for x, y in batches(seed, STEPS)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        statistics = [m for m in model if isinstance(m, nn.BatchNorm1d)]  # type: ignore[attr-defined]
        for module in statistics:
            module.train(len(batch[0]) > 1)  # torch refuses one sample
        return loss_of(model, batch)

    return against_plain(seed, data, loss=loss)


def data_end(seed: int, _: Path) -> str | None:
    """The loader ends anywhere, and training goes on with another one: the same as in one go."""
    data, at = batches(seed, STEPS), random.Random(seed).randrange(1, STEPS)
    finals = []
    for parts in ((data,), (data[:at], data[at:])):
        subject = Subject.of(seed)
        trainer = subject.trainer(settings(), Faulty("uphill", seed))
        left: list[Batch] = []
        for part in parts:
            handed = iter([*left, *part])
            trainer.fit(handed)
            left = [part[-1]] if trainer.run.batches.free else []  # that of a refused proposal was not used
        if left:
            ours(trainer, subject, left)
        finals.append(subject.bits())
    return None if finals[0] == finals[1] else "two loaders are not the one"


def raising_loader(seed: int, _: Path) -> str | None:
    """What a loader raises passes through, and training goes on where it stood."""
    data, at = batches(seed, STEPS), random.Random(seed).randrange(1, STEPS)

    def loader() -> Iterator[Batch]:
        yield from data[:at]
        raise ConnectionError("the store is gone")

    reference = Subject.of(seed)
    ours(reference.trainer(settings(), Faulty("uphill", seed)), reference, data)
    wanted = reference.bits()
    subject = Subject.of(seed)
    trainer = subject.trainer(settings(), Faulty("uphill", seed))
    try:
        trainer.fit(loader())
    except ConnectionError:
        pass
    else:
        return "the loader's error was swallowed"
    used = trainer.num_batches
    ours(trainer, subject, data[used:])
    return None if subject.bits() == wanted else "not the run without the error"


def out_of_memory_in_the_gate(seed: int, _: Path) -> str | None:
    """Only what the gate asks for does not fit."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return loss_of(model, batch)

    return against_plain(seed, batches(seed, STEPS), loss=loss)


def out_of_memory_in_a_step(seed: int, _: Path) -> str | None:
    """The user's own step does not fit: it is told, and the run stands as before the step."""
    at = random.Random(seed).randrange(1, STEPS)
    data: list[Any] = [(x, y, False) for x, y in batches(seed, STEPS)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if batch[2]:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return loss_of(model, batch)

    reference = Subject.of(seed)
    ours(reference.trainer(settings(), Faulty("uphill", seed), loss), reference, data)
    wanted = reference.bits()
    subject = Subject.of(seed)
    trainer = subject.trainer(settings(), Faulty("uphill", seed), loss)
    ours(trainer, subject, data[:at])
    random_state = torch.get_rng_state()
    raised = False
    for _attempt in range(5):  # a proposal may come first, whose judgement is refused
        try:
            trainer.step((*data[at][:2], True))
        except torch.OutOfMemoryError:
            raised = True
            break
    if not raised:
        return "the error was swallowed"
    torch.set_rng_state(random_state)
    ours(trainer, subject, data[at:])
    return None if subject.bits() == wanted else "not the run without the error"


def clock_going_back(seed: int, _: Path) -> str | None:
    """Every reading of a clock is anywhere within an hour of the last one."""
    dice = random.Random(seed)
    names = ("time", "perf_counter", "monotonic", "process_time", "thread_time")
    real = {name: getattr(time, name) for name in names}

    def wild(clock: Callable[[], float]) -> Callable[[], float]:
        return lambda: clock() + dice.uniform(-3600, 3600)

    try:
        for name, clock in real.items():
            setattr(time, name, wild(clock))
        found = against_plain(seed, batches(seed, STEPS))
        if found is not None:
            return found
        subject = Subject.of(seed)
        trainer = subject.trainer(settings())
        trainer.fit(batches(seed, STEPS))
        summary = trainer.summary()
    finally:
        for name, clock in real.items():
            setattr(time, name, clock)
    numbers = [v for v in leaves(summary["training_summary"]) if isinstance(v, float)]
    return None if all(map(math.isfinite, numbers)) else "the summary holds an infinite time or speed"


def leaves(value: Any) -> Iterator[Any]:
    """Values of nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


def cases() -> list[Case]:
    """Of this module."""
    same = "bitwise the plain loop"
    told: list[tuple[str, str, Callable[[int, Path], str | None]]] = [
        ("optimizer gets a group in mid-run", same, group_added),
        ("optimizer loses parameters in mid-run", same, group_taken),
        ("layer frozen in mid-run", "its weights stay bit for bit", layer_frozen),
        ("learning rate times 10 for five steps", same, partial(rate_jumps, 10.0)),
        ("learning rate a hundredth for five steps", same, partial(rate_jumps, 0.01)),
        ("zero gradients", same, zero_gradients),
        ("constant loss", same, constant_loss),
        ("ragged batches", same, partial(ragged_batches, 1)),
        ("empty batches", "left out like any loss that is not finite", partial(ragged_batches, 0)),
        ("data end in mid-phase", "going on with more is the same as one go", data_end),
        ("loader raises", "passed on; going on is the run without it", raising_loader),
        ("out of memory in the gate", "refusals; bitwise the plain loop", out_of_memory_in_the_gate),
        ("out of memory in a step", "passed on; going on is the run without it", out_of_memory_in_a_step),
        ("clocks that go back", f"{same}, no infinite speed", clock_going_back),
    ]
    return [Case(name=name, survived=means, trial=trial, tries=5) for name, means, trial in told]
