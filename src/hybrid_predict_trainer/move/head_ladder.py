"""The head's rate, found before a run by miniature complete runs from its own initial weights.

A miniature run is ``num_steps`` steps on a quarter of every batch, with a warm-up over the first third and a decay to
zero over the last.  It is complete because the loss of a run that is cut off ranks rates by how fast they begin.  All
miniatures see the same batches and are judged on the same held-out ones.  The head's factor goes up by threes while the
held-out loss falls by more than a hundredth, and down by threes if the first step up does not pay.  One try at the
square root of three beyond what was found is the last.  Embedding, queries and keys follow by the ratios of the prior,
and a table whose steps would be too short for its size steps further (:func:`.prior.with_moving_table`).

Model, optimizer and random numbers are afterwards what they were before, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..keep.snapshot import Snapshot
from ..keep.subject import LossFn, Subject
from ..observe import batches as data
from ..records import ConfigError
from ..weights.parameters import check_values, optimizer_parameters, table_is_shared
from .prior import PRIOR, measured_factors, prior, with_table_for
from .recipe import Recipe
from .role_rates import RoleRates

#: A rung of the ladder, and the last half rung.
RUNG, HALF_RUNG = 3.0, math.sqrt(3.0)
#: Rungs up or down at most.
MAX_RUNGS = 4
#: Relative fall of the held-out loss that a rung has to be worth.
WORTH = 0.01
#: A miniature whose mean loss of five steps stands so far above the incumbent's is ended.
HOPELESS, LOOK_EVERY = 1.06, 5
#: Share of a batch that a miniature is trained on.
SHARE = 4
#: Held-out batches.
NUM_HELD_OUT = 2


@dataclass(frozen=True, slots=True)
class Found:
    """What the ladder found.

    Attributes:
        recipe: Factors by role.
        cost: Of the search, in steps of the run (forward and backward of a whole batch).
        tries: (factor of the head, held-out loss) in the order in which they were tried; infinity: ended early.
    """

    recipe: Recipe
    cost: float
    tries: tuple[tuple[float, float], ...]


def find_recipe(
    model: nn.Module, optimizer: Optimizer, loss_fn: LossFn, batches: Iterable[Any], *, num_steps: int = 40,
    clip_norm: float = 0.0, roles: dict[str, str] | None = None,
) -> Found:  # fmt: skip
    """Find the head's factor by miniature complete runs; see the module.

    Args:
        model: As it is to be trained; it is put back.
        optimizer: With the base rate in its groups; it is put back.
        loss_fn: (model, batch) -> scalar loss.
        batches: At least ``num_steps + 2``; the last two are held out.
        num_steps: Of one miniature, at least 12; fewer than 24 have missed the head.
        clip_norm: Limit of the gradient's norm; 0: none.
        roles: Overrides, as for :class:`.HybridTrainer`.

    Raises:
        ConfigError: too few batches; ``num_steps`` is below 12; weights have no values yet.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 12:
        raise ConfigError(f"find_recipe: num_steps = {num_steps!r} must be a whole number of at least 12")
    taken = list(islice(batches, num_steps + NUM_HELD_OUT))
    if len(taken) < num_steps + NUM_HELD_OUT:
        raise ConfigError(f"find_recipe: {num_steps + NUM_HELD_OUT} batches are needed, and there are {len(taken)}")
    check_values(optimizer_parameters(optimizer))
    subject = Subject.of(model, optimizer, loss_fn, None, roles)
    parameters, groups = subject.parameters, subject.groups
    measured = measured_factors(optimizer)
    ratios = prior(parameters, groups, measured or PRIOR)
    if ratios.empty:
        return Found(ratios, 0.0, ())

    def around(head: float) -> Recipe:
        """A table is raised as it would be without a search; its size is that of the weights as they are now."""
        recipe = with_head(ratios, head)
        if measured is None or table_is_shared(model):
            return recipe
        return with_table_for(recipe, optimizer, parameters, groups, measured)

    def loss_at(head: float) -> float:
        start.restore(model, optimizer)
        return minis.run(around(head))

    minis = _Miniatures(subject, taken[:num_steps], taken[num_steps:], clip_norm)
    start = Snapshot.take(model, optimizer)
    try:
        head = _climb(loss_at)
    finally:
        start.restore(model, optimizer)
        for parameter in optimizer_parameters(optimizer):
            parameter.grad = None
    return Found(around(head), minis.cost, tuple(minis.tries))


def with_head(ratios: Recipe, head: float) -> Recipe:
    """The prior's ratios around another factor of the head; no role is slower than the schedule's rate but the head.

    Where the prior has none for the head (with Muon) the others do not follow it.
    """
    along = head / ratios.rates["head"] if "head" in ratios.rates else 1.0
    rates = {role: max(1.0, rate * along) for role, rate in ratios.rates.items()} | {"head": head}
    return Recipe(rates, f"head ladder: miniature runs chose {head:g}, the others follow by the prior's ratios")


def _climb(loss_at: Callable[[float], float]) -> float:
    """The best factor of the ladder.

    Args:
        loss_at: Held-out loss of a factor; not finite: worse than anything.
    """
    best_factor, best = 1.0, loss_at(1.0)

    def better(factor: float) -> bool:
        nonlocal best_factor, best
        loss = loss_at(factor)
        if not loss < (1 - WORTH) * best:
            return False
        best_factor, best = factor, loss
        return True

    direction = RUNG
    if not better(RUNG):
        direction = 1 / RUNG
    for _ in range(MAX_RUNGS - 1):
        if not better(best_factor * direction):
            break
    if best_factor != 1.0:
        better(best_factor * (HALF_RUNG if direction > 1 else 1 / HALF_RUNG))
    return best_factor


class _Miniatures:
    """Miniature runs on common batches.

    Attributes:
        cost: So far, in steps of the run.
        tries: (factor of the head, held-out loss).
    """

    def __init__(self, subject: Subject, training: Sequence[Any], held_out: Sequence[Any], clip_norm: float) -> None:
        self._subject, self._clip = subject, clip_norm
        self._training, self._shares = zip(*(_quarter(batch) for batch in training), strict=True)
        self._held_out = held_out
        self._incumbent: list[float] = []
        self._best = math.inf
        self.cost = 0.0
        self.tries: list[tuple[float, float]] = []

    def run(self, recipe: Recipe) -> float:
        """Held-out loss after one miniature from where the model is; infinity if it was ended."""
        subject = self._subject
        rates = RoleRates(subject, recipe)
        bases = [group["lr"] for group in subject.optimizer.param_groups]
        losses: list[float] = []
        for step, batch in enumerate(self._training):
            losses.append(self._step(batch, rates, bases, shape(step, len(self._training))))
            self.cost += self._shares[step]
            if self._hopeless(losses):
                break
        loss = self._loss() if len(losses) == len(self._training) else math.inf
        if loss < self._best:
            self._best, self._incumbent = loss, losses
        self.tries.append((recipe.rate_of("head"), loss))
        return loss

    def _step(self, batch: Any, rates: RoleRates, bases: Sequence[Any], factor: float) -> float:
        optimizer, parameters = self._subject.optimizer, self._subject.parameters
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * factor
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self._subject.loss_fn(self._subject.model, data.copied(batch, tensors_too=True))
        loss.backward()
        if self._clip > 0:
            torch.nn.utils.clip_grad_norm_(optimizer_parameters(optimizer), self._clip)
        rates.before_step(parameters)
        optimizer.step()
        rates.after_step(parameters)
        return float(loss.detach())

    def _hopeless(self, losses: list[float]) -> bool:
        done = len(losses)
        if not math.isfinite(losses[-1]):
            return True
        if not self._incumbent or done % LOOK_EVERY or done < len(self._training) // 3:
            return False
        return fmean(losses[-LOOK_EVERY:]) > HOPELESS * fmean(self._incumbent[done - LOOK_EVERY : done])

    @torch.no_grad()
    def _loss(self) -> float:
        model, loss_fn = self._subject.model, self._subject.loss_fn
        losses = [float(loss_fn(model, data.copied(batch, tensors_too=True))) for batch in self._held_out]
        self.cost += len(losses) / 3
        return fmean(losses)


def shape(step: int, num_steps: int) -> float:
    """Factor on the rate of one step of a miniature: up over the first third, level, to zero over the last."""
    third = num_steps / 3
    return min(1.0, (step + 1) / third, (num_steps - step) / (third + 1))


def _quarter(batch: Any) -> tuple[Any, float]:
    """A part of a batch, and its share; the whole where its samples cannot be told apart."""
    size = data.num_samples(batch)
    if size < 2:
        return batch, 1.0
    part = max(size // SHARE, 1)
    return data.narrow(batch, 0, part), part / size
