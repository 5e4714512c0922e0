"""Full batches whose training loss says little of new data: plain, ours, ours with ``val_fn``.

``python benchmarks/held_out.py``: regression of a smooth function of five inputs with and without noise in its targets,
and ten classes of small images, all with more weights than samples; Adam with a cosine, loss on 4,000 samples without
noise that no arm has seen, five seeds.  Ours has as many steps as plain on the clock of cost, the price of validation
included.  What ``val_fn`` is given is a third sample, with noise as the training samples have it.  ``--noise 0.5
--samples 300`` and so on choose rows.
"""

from __future__ import annotations

import argparse
import itertools
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

ARMS = ("plain", "ours", "with val_fn")
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
        trainer.fit(itertools.repeat(samples), total_steps=case.steps)
        num_jumps = trainer.statistics()["num_jumps_accepted"]
    with torch.no_grad():
        return End(float(loss_fn(model, samples)), float(loss_fn(model, test)), num_jumps, num_asked)


def row(*cells: object) -> str:
    """One line of the table."""
    widths = (12, 8, 7, 13, 11, 11, 30, 7, 7)
    return "".join(f"{cell!s:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row per case and arm."""
    lengths = [num for num, _ in LENGTHS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="*", default=[0.0, 0.1, 0.5], help="deviation of the targets'")
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 300], help="of the regression")
    parser.add_argument("--steps", type=int, nargs="+", default=lengths, choices=lengths)
    parser.add_argument("--no-classes", action="store_true", help="regression only")
    parser.add_argument("--seeds", type=int, default=5, help="paired (default 5)")
    parser.add_argument("--first-seed", type=int, default=0, help="of these (default 0)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    chosen = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="jumps took the training loss down")
    print("means over seeds; of plain's: ratio of the means, then the geometric mean of ratios with its 95 % interval")
    print(row("case", "samples", "steps", "arm", "training", "test", "test, of plain's", "jumps", "asked"))
    for case in cases(chosen.noise, chosen.samples, chosen.steps, not chosen.no_classes):
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
