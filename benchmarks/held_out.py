"""Full batches whose training loss says little of new data: plain, ours, ours with ``val_fn``.

``--kinds`` has other data with and without noise; arm ``unasked`` is ours without the question whether what is left is
noise (:mod:`hybrid_predict_trainer.judge.noise`).

``python benchmarks/held_out.py``: regression of a smooth function of five inputs with and without noise in its targets,
and ten classes of small images, all with more weights than samples; Adam with a cosine, loss on 4,000 samples without
noise that no arm has seen, five seeds.  Ours has as many steps as plain on the clock of cost, the price of validation
included.  What ``val_fn`` is given is a third sample, with noise as the training samples have it.  ``--noise 0.5
--samples 300`` and so on choose rows.
"""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_predict_trainer import HybridTrainer
from hybrid_predict_trainer.experiments.harm.data import Samples, draw_glyphs, generator
from hybrid_predict_trainer.experiments.statistics import ends_words, paired_interval

ARMS = ("plain", "unasked", "ours", "with val_fn")
#: Steps and the peak of the learning rate.
LENGTHS = ((300, 1e-3), (1500, 3e-3))
#: Samples of ``val_fn`` and of the test; one answer costs so many forwards of a training batch.
NUM_HELD_OUT, NUM_TEST = 300, 4000


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: As printed.
        num_samples: Of training; every step sees all of them.
        steps: On the clock.
        rate: Peak learning rate.
        draw: (how many, source, whether targets are free of noise) -> samples.
        build: An untrained model.
        loss: (outputs, targets) -> scalar.
    """

    name: str
    num_samples: int
    steps: int
    rate: float
    draw: Callable[[int, torch.Generator, bool], Samples]
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]


def draw_smooth(noise: float, count: int, source: torch.Generator, clean: bool) -> Samples:
    """(count, 5) inputs in [-1, 1] and (count, 1) targets with normal noise of that deviation."""
    x = torch.rand(count, 5, generator=source) * 2 - 1
    y = torch.sin(3 * x[:, :1] * x[:, 1:2]) + x[:, 2:3] ** 2 - 0.5 * x[:, 3:4]
    return x, y if clean else y + noise * torch.randn(count, 1, generator=source)


def images(count: int, source: torch.Generator, clean: bool) -> Samples:
    """Ten classes, 3 % of the labels wrong, those of the test as well."""
    return draw_glyphs(count, source)


def network(*widths: int, bend: type[nn.Module] = nn.Tanh) -> nn.Module:
    """Dense layers of these widths."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), bend()]
    return nn.Sequential(*layers[:-1])


# ---- other data --------------------------------------------------------------------------------------------------


def with_noise(x: Tensor, y: Tensor, noise: float, source: torch.Generator, clean: bool) -> Samples:
    """Inputs as they are, targets with normal noise of that deviation."""
    return x, y if clean else y + noise * torch.randn(y.shape, generator=source)


def draw_wave(noise: float, count: int, source: torch.Generator, clean: bool) -> Samples:
    """A sine of four periods."""
    x = 2 * torch.rand(count, 1, generator=source) - 1
    return with_noise(x, torch.sin(4 * math.pi * x), noise, source, clean)


def draw_steps(noise: float, count: int, source: torch.Generator, clean: bool) -> Samples:
    """Jumps between -1 and 1."""
    x = 2 * torch.rand(count, 1, generator=source) - 1
    return with_noise(x, torch.sign(torch.sin(5 * x)), noise, source, clean)


def draw_outliers(share: float, count: int, source: torch.Generator, clean: bool) -> Samples:
    """The wave, where so many targets are something else altogether."""
    x, y = draw_wave(0.0, count, source, True)
    wrong = (torch.rand(count, 1, generator=source) < share) & torch.tensor(not clean)
    return x, torch.where(wrong, 3 * torch.randn(count, 1, generator=source), y)


def draw_friedman(noise: float, count: int, source: torch.Generator, clean: bool) -> Samples:
    """Five of ten inputs matter (Friedman, Annals of Statistics 19, 1991, equation 61), scaled to variance 1."""
    x = torch.rand(count, 10, generator=source)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    return with_noise(2 * x - 1, ((y - 14.4) / 4.9)[:, None], noise, source, clean)


def draw_parity(noise: float, count: int, source: torch.Generator, clean: bool) -> Samples:
    """The product of three of eight signs."""
    x = 2.0 * torch.randint(2, (count, 8), generator=source) - 1
    return with_noise(x, x[:, :3].prod(1, keepdim=True), noise, source, clean)


def draw_series(noise: float, count: int, source: torch.Generator, clean: bool) -> Samples:
    """Twelve values of two sines, and the next one; all of them with noise."""
    t = 100 * torch.rand(count, 1, generator=source) + torch.arange(13.0)
    values = torch.sin(t / 3) + 0.5 * torch.sin(0.71 * t)
    values = values if clean else values + noise * torch.randn(values.shape, generator=source)
    return values[:, :12], values[:, 12:]


def draw_linear(noise: float, count: int, source: torch.Generator, clean: bool) -> Samples:
    """Fifty inputs with weights of their own."""
    weights = torch.randn(50, 1, generator=generator(5)) / 50**0.5
    x = torch.randn(count, 50, generator=source)
    return with_noise(x, x @ weights, noise, source, clean)


def draw_teacher(inputs: int, noise: float, count: int, source: torch.Generator, clean: bool) -> Samples:
    """What a network of 32 by 32 units answers."""
    g = generator(99)
    A, B, C = (torch.randn(a, b, generator=g) / a**0.5 for a, b in ((inputs, 32), (32, 32), (32, 1)))
    x = torch.randn(count, inputs, generator=source)
    return with_noise(x, torch.tanh(torch.tanh(1.5 * x @ A) @ (1.5 * B)) @ C, noise, source, clean)


def draw_sum(noise: float, count: int, source: torch.Generator, clean: bool) -> Samples:
    """The sine of a sum of eight inputs: too fine for the samples."""
    x = torch.randn(count, 8, generator=source)
    return with_noise(x, torch.sin(x.sum(1, keepdim=True)), noise, source, clean)


def draw_images(noise: float, count: int, source: torch.Generator, clean: bool) -> Samples:
    """Small images, with noise, and themselves."""
    x = draw_glyphs(count, source)[0].flatten(1)
    return (x if clean else x + noise * torch.randn(x.shape, generator=source)), x


#: Name -> samples, widths, how they are drawn with that noise, and noises.
KINDS: dict[str, tuple[int, tuple[int, ...], Callable[..., Samples], tuple[float, ...]]] = {
    "wave": (100, (1, 64, 64, 1), draw_wave, (0.0, 0.3)), "steps": (200, (1, 64, 64, 1), draw_steps, (0.0, 0.5)),
    "outliers": (150, (1, 64, 64, 1), draw_outliers, (0.1,)),
    "friedman": (300, (10, 64, 64, 1), draw_friedman, (0.0, 0.5)),
    "parity": (120, (8, 64, 1), draw_parity, (0.0,)), "series": (200, (12, 64, 64, 1), draw_series, (0.0, 0.3)),
    "linear": (80, (50, 1), draw_linear, (0.0, 1.0)),
    "teacher 10": (256, (10, 64, 64, 1), partial(draw_teacher, 10), (0.0, 0.5)),
    "teacher 20": (1000, (20, 64, 64, 1), partial(draw_teacher, 20), (0.0, 0.5)),
    "sum": (256, (8, 64, 64, 1), draw_sum, (0.0, 0.5)),
    "autoencoder": (200, (144, 64, 16, 64, 144), draw_images, (0.0, 0.5)),
}  # fmt: skip
KINDS_RATE = 1e-3


def other_cases(steps: Sequence[int]) -> list[Case]:
    """Rows of :data:`KINDS`."""
    return [
        Case(f"{name} {noise:g}", count, num, KINDS_RATE, partial(draw, noise), partial(network, *widths), F.mse_loss)
        for name, (count, widths, draw, noises) in KINDS.items() for noise in noises for num in steps
    ]  # fmt: skip


def cases(noises: Sequence[float], samples: Sequence[int], steps: Sequence[int], labelled: bool) -> list[Case]:
    """The rows that are asked for."""
    lengths = [length for length in LENGTHS if length[0] in steps]
    found = [
        Case(f"noise {noise:g}", n, num, rate, partial(draw_smooth, noise), lambda: network(5, 64, 64, 1), F.mse_loss)
        for noise in noises for n in samples for num, rate in lengths
    ]  # fmt: skip
    if labelled:
        found += [
            Case("ten classes", 200, num, rate, images, lambda: network(144, 64, 10, bend=nn.ReLU), F.cross_entropy)
            for num, rate in lengths
        ]
    return found


@dataclass(frozen=True)
class End:
    """How a run ended: loss on the training samples and on the test's, jumps, answers of ``val_fn``."""

    training: float
    test: float
    num_jumps: int = 0
    num_asked: int = 0


def trained(case: Case, arm: str, seed: int) -> End:
    """One run."""
    samples = case.draw(case.num_samples, generator(1 + seed), False)
    held_out = case.draw(NUM_HELD_OUT, generator(1000 + seed), False)
    test = case.draw(NUM_TEST, generator(2000), True)
    torch.manual_seed(seed)
    model = case.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=case.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, case.steps)
    num_asked = num_jumps = 0

    def loss_fn(model: nn.Module, batch: Samples) -> Tensor:
        return case.loss(model(batch[0]), batch[1])

    def val_fn(model: nn.Module) -> Tensor:
        nonlocal num_asked
        num_asked += 1
        return loss_fn(model, held_out)

    if arm == "plain":
        for _ in range(case.steps):
            optimizer.zero_grad()
            loss_fn(model, samples).backward()
            optimizer.step()
            schedule.step()
    else:
        price = NUM_HELD_OUT / case.num_samples
        asked = {"val_fn": val_fn, "val_cost": price} if arm == "with val_fn" else {}
        trainer = HybridTrainer(model, optimizer, loss_fn=loss_fn, lr_scheduler=schedule, **asked)
        if arm == "unasked":
            trainer.run.judge.noise.give_up()
        trainer.fit(itertools.repeat(samples), total_steps=case.steps)
        num_jumps = trainer.statistics()["num_jumps_accepted"]
    with torch.no_grad():
        return End(float(loss_fn(model, samples)), float(loss_fn(model, test)), num_jumps, num_asked)


def row(*cells: object) -> str:
    """One line of the table."""
    widths = (16, 8, 7, 13, 11, 11, 30, 7, 7)
    return "".join(f"{cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row per case and arm."""
    lengths = [num for num, _ in LENGTHS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="*", default=[0.0, 0.1, 0.5], help="deviation of the targets'")
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 300], help="of the regression")
    parser.add_argument("--steps", type=int, nargs="+", default=lengths, choices=lengths)
    parser.add_argument("--kinds", action="store_true", help="other data instead")
    parser.add_argument("--no-classes", action="store_true", help="regression only")
    parser.add_argument("--seeds", type=int, default=5, help="paired (default 5)")
    parser.add_argument("--first-seed", type=int, default=0, help="of these (default 0)")
    parser.add_argument("--arms", nargs="+", default=["plain", "ours", "with val_fn"], choices=ARMS)
    chosen = parser.parse_args(arguments)
    for message in ("jumps took the training loss down", "what is left of the training loss"):
        warnings.filterwarnings("ignore", message=message)
    print("means over seeds; of plain's: ratio of the means, then the geometric mean of ratios with its 95 % interval")
    print(row("case", "samples", "steps", "arm", "training", "test", "test, of plain's", "jumps", "asked"))
    rows = cases(chosen.noise, chosen.samples, chosen.steps, not chosen.no_classes)
    for case in other_cases(chosen.steps) if chosen.kinds else rows:
        plain: list[float] = []
        for arm in chosen.arms:
            ends = [trained(case, arm, seed) for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds)]
            tests = [end.test for end in ends]
            plain = tests if arm == "plain" else plain
            means = [float(np.mean([getattr(end, field.name) for end in ends])) for field in fields(End)]
            told = ""
            if plain and arm != "plain":
                ratio = paired_interval(tests, plain)
                told = f"{np.mean(tests) / np.mean(plain):.3f}; {ratio.mean:.3f} {ends_words(ratio.ends, '.3f')}"
            losses, counts = [f"{m:.3g}" for m in means[:2]], [f"{m:.0f}" for m in means[2:]]
            print(row(case.name, case.num_samples, case.steps, arm, *losses, told, *counts), flush=True)


if __name__ == "__main__":
    main()
