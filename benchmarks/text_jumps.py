"""Jumps on one pass over text along shrunken means of hundreds of steps: what is got, and what hindsight would get.

``python benchmarks/text_jumps.py`` trains today's GPT of 0.3 M weights on novels with plain AdamW and WSD.  In the
stable phase, fifty steps apart, it goes on along the window of the last real steps and trains on; every arm sees
the same batches, and no jump is charged.  S: length of the plain run of the same seed that ends at the same loss
(LOG.md).  Runs are kept in ``--out`` and not made again.  Needs ``HPT_DATA_DIR``.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_predict_trainer.experiments.baselines.roles import by_role
from hybrid_predict_trainer.experiments.compare.equal_loss import Point, over_seeds, seed_speedup
from hybrid_predict_trainer.move.prior import PRIOR
from hybrid_predict_trainer.numerics.shrunken_mean import shrunken_mean
from hybrid_predict_trainer.tasks import TaskSettings, build_scheduler, make_task, with_steps

#: A window has so many chunks, and a proposal comes so many steps after the last.
NUM_CHUNKS = 8
#: Batches of a judgement; hindsight's candidates in steps, and the steps that it trains each of them to zero in.
NUM_JUDGED, CANDIDATES, COOLDOWN = 8, (0, 25, 50, 100), 40
#: Data that no arm trains on: judgements take theirs from here.
JUDGED_FROM = 10**6
LENGTHS = (0.8, 1.0, 1.25)


@dataclass(frozen=True, slots=True)
class Arm:
    """What is compared: (window, horizon) in steps, which direction, and who decides."""

    name: str
    window: int = 0
    horizon: int = 0
    direction: str = "shrunken"
    decides: str = "always"
    length: float = 1.0

    @property
    def every(self) -> int:
        """Steps between proposals."""
        return min(self.window, 50)


ARMS = (
    *(Arm(f"plain, {length:g} of the length", length=length) for length in LENGTHS),
    Arm("shrunken, 40, Y 10", 40, 10),
    Arm("shrunken, 200, Y 50", 200, 50),
    Arm("null: random signs", 200, 50, "random-signs"),
    Arm("shrunken, 200, Y 50, judged", 200, 50, decides="judged"),
    Arm("shrunken, 200, Y 50, half held out", 200, 50, decides="coin"),
    Arm("shrunken, 200, best Y in hindsight", 200, 50, decides="hindsight"),
)


class Run:
    """One run: the plain loop, with proposals in its stable phase."""

    def __init__(self, args: argparse.Namespace, arm: Arm, seed: int) -> None:
        """Build it."""
        self.task = make_task("gpt-modern", TaskSettings(data=args.data, batch_size=args.batch, context=args.context))
        self.steps = round(args.steps * arm.length)
        self.recipe = with_steps(replace(self.task.defaults, lr=args.lr), self.steps)
        self.model, self.arm, self.seed = self.task.build_model(seed), arm, seed
        self.rates = PRIOR if args.four_rates else {}
        self.optimizer = by_role(self.model, self.recipe, self.rates)
        recipe = self.recipe
        self.schedule = build_scheduler(
            self.optimizer, recipe.schedule, self.steps, recipe.warmup_steps, recipe.decay_frac
        )
        self.parameters = list(self.model.parameters())
        self.coin = random.Random(seed)
        self.losses: list[float] = []
        self.jumps: list[dict[str, Any]] = []

    def step(self, batch: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        """One step of the plain loop."""
        optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss_fn(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), self.recipe.grad_clip)
        optimizer.step()
        return float(loss.detach())

    def train(self) -> dict[str, Any]:
        """To the end; returns what is kept."""
        first, last = self.recipe.warmup_steps + self.arm.window, self.steps * (1 - self.recipe.decay_frac)
        size = self.arm.window // NUM_CHUNKS
        chunks: deque[list[Tensor]] = deque(maxlen=NUM_CHUNKS)
        before = self.weights()
        for t, batch in enumerate(islice(self.task.batches(self.seed), self.steps), start=1):
            self.losses.append(self.step(batch, self.model, self.optimizer))
            self.schedule.step()
            if size and t % size == 0:
                now = self.weights()
                chunks.append([b - a for a, b in zip(before, now, strict=True)])
                if len(chunks) == NUM_CHUNKS and t >= first and t % self.arm.every == 0 and t <= last:
                    self.propose(t, list(chunks), size)
                before = self.weights()
        self.credit()
        return {"loss": self.task.evaluate(self.model), "jumps": self.jumps}

    def weights(self) -> list[Tensor]:
        """A copy."""
        return [p.detach().clone() for p in self.parameters]

    def direction(self, chunks: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Displacement of a chunk that is gone on along."""
        own = [torch.stack([chunk[i] for chunk in chunks]) for i in range(len(self.parameters))]
        shrunken = [shrunken_mean(c) for c in own]
        if self.arm.direction == "shrunken":
            return shrunken
        signs = torch.tensor([self.coin.choice((-1.0, 1.0)) for _ in chunks])
        found = [torch.tensordot(signs, c, dims=1) / len(chunks) for c in own]
        lengths = [sum(float(m.square().sum()) for m in moves) ** 0.5 for moves in (shrunken, found)]
        return [m * (lengths[0] / max(lengths[1], 1e-30)) for m in found]

    @torch.no_grad()
    def move(self, moves: Sequence[Tensor], scale: float) -> None:
        """Go on along a displacement."""
        for p, m in zip(self.parameters, moves, strict=True):
            p.add_(m, alpha=scale)

    def propose(self, t: int, chunks: Sequence[Sequence[Tensor]], size: int) -> None:
        """A proposal after ``t`` steps, and whether it stands."""
        moves, scale = self.direction(chunks), self.arm.horizon / size
        told: dict[str, Any] = {"t": t, "kept": True, "horizon": self.arm.horizon}
        kept = self.weights()
        judged = list(islice(self.task.batches(self.seed, JUDGED_FROM + NUM_JUDGED * t), NUM_JUDGED))
        now = self.losses_on(judged)
        self.move(moves, scale)
        told["judged"] = [after - own for after, own in zip(self.losses_on(judged), now, strict=True)]
        if self.arm.decides == "judged":  # over all proposals so far: one is never resolved by itself
            pooled = [d for jump in (*self.jumps, told) for d in jump["judged"]]
            told["kept"] = fmean(pooled) < 0
        elif self.arm.decides == "coin":
            told["kept"] = self.coin.random() < 0.5
        elif self.arm.decides == "hindsight":
            self.restore(kept)
            told["horizon"] = min(CANDIDATES, key=lambda y: self.after_cooldown(moves, y / size, t))
            self.move(moves, told["horizon"] / size)
            told["kept"] = told["horizon"] > 0
        if not told["kept"]:
            self.restore(kept)
        self.jumps.append(told)

    @torch.no_grad()
    def restore(self, kept: Sequence[Tensor]) -> None:
        """Put weights back."""
        for p, old in zip(self.parameters, kept, strict=True):
            p.copy_(old)

    @torch.no_grad()
    def losses_on(self, batches: Sequence[Any]) -> list[float]:
        """Loss per batch."""
        return [float(self.task.loss_fn(self.model, batch)) for batch in batches]

    def after_cooldown(self, moves: Sequence[Tensor], scale: float, t: int) -> float:
        """Validation loss of a copy that goes there and is trained to a rate of zero on the batches that follow."""
        model = copy.deepcopy(self.model)
        optimizer = by_role(model, self.recipe, self.rates)
        optimizer.load_state_dict(self.optimizer.state_dict())
        with torch.no_grad():
            for p, m in zip(model.parameters(), moves, strict=True):
                p.add_(m, alpha=scale)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        for k, batch in enumerate(islice(self.task.batches(self.seed, t), COOLDOWN)):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - k / COOLDOWN)
            self.step(batch, model, optimizer)
        return self.task.evaluate(model)

    def credit(self) -> None:
        """Training loss of the steps after a proposal less that of as many before it."""
        for jump in self.jumps:
            t, n = jump["t"], self.arm.every // 2
            jump["credit"] = fmean(self.losses[t : t + n]) - fmean(self.losses[t - n : t])


def kept_runs(path: Path) -> dict[str, Any]:
    """Runs of earlier calls by their keys."""
    if not path.exists():
        return {}
    return {row["key"]: row["run"] for row in map(json.loads, path.read_text().splitlines())}


def table(args: argparse.Namespace, found: Callable[[Arm, int], dict[str, Any]]) -> list[str]:
    """Rows of markdown."""
    seeds = args.seeds
    plain = [a for a in ARMS if not a.window]
    base = next(a for a in plain if a.length == 1)
    lines = [
        "| arm | final loss | less plain's | S by steps | kept | judged at once | credit: kept less held out |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        runs = {s: found(arm, s) for s in seeds}
        gaps = [runs[s]["loss"] - found(base, s)["loss"] for s in seeds]
        cells = [arm.name, f"{fmean(r['loss'] for r in runs.values()):.4f}", spread(gaps) if arm is not base else "-"]
        if arm.window:
            each = [
                seed_speedup(
                    Point(args.steps, runs[s]["loss"]),
                    [Point(args.steps * p.length, found(p, s)["loss"]) for p in plain],
                )
                for s in seeds
            ]
            s = over_seeds(each)
            jumps = [j for r in runs.values() for j in r["jumps"]]
            ends = "" if s.ci95 is None else f" [{', '.join('-' if e is None else f'{e:.3f}' for e in s.ci95)}]"
            bound = "" if s.kind == "exact" else f"{s.kind} "
            per_seed = [fmean(d for j in r["jumps"] for d in j["judged"]) for r in runs.values()]
            cells += [f"{bound}{s.value:.3f}{ends}", f"{sum(j['kept'] for j in jumps)}/{len(jumps)}", spread(per_seed)]
            groups = [[j["credit"] for j in jumps if j["kept"] is kept] for kept in (True, False)]
            cells.append(credit_of(*groups) if arm.decides == "coin" else "-")
        else:
            cells += [f"{arm.length:g}", "-", "-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean and its t interval over five or so seeds."""
    from scipy.stats import t

    if len(values) < 2:
        return f"{fmean(values):+.4f}"
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"{fmean(values):+.4f} [{fmean(values) - half:+.4f}, {fmean(values) + half:+.4f}]"


def credit_of(kept: Sequence[float], held: Sequence[float]) -> str:
    """Difference of two means and its standard error."""
    if min(len(kept), len(held)) < 2:
        return "-"
    error = (stdev(kept) ** 2 / len(kept) + stdev(held) ** 2 / len(held)) ** 0.5
    return f"{fmean(kept) - fmean(held):+.4f}, s.e. {error:.4f}"


def main() -> None:
    """Make what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="novels")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--four-rates", action="store_true", help="with the prior's rates per role")
    parser.add_argument(
        "--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[100, 101, 102, 103, 104]
    )
    parser.add_argument("--out", type=Path, default=Path("results/text_jumps.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    runs = kept_runs(args.out)

    def found(arm: Arm, seed: int) -> dict[str, Any]:
        told = {k: v for k, v in vars(args).items() if k not in ("seeds", "out")}
        key = json.dumps({**asdict(arm), **told, "seed": seed}, sort_keys=True)
        if key not in runs:
            runs[key] = Run(args, arm, seed).train()
            with args.out.open("a") as file:
                file.write(json.dumps({"key": key, "run": runs[key]}) + "\n")
            print(f"{arm.name}, seed {seed}: {runs[key]['loss']:.4f}", flush=True)
        return runs[key]

    for seed in args.seeds:
        for arm in ARMS:
            found(arm, seed)
    print("\n".join(table(args, found)))


if __name__ == "__main__":
    main()
