"""The learned scale: a multiplier of the base optimizer's own steps, learned from gradients training computes anyway.

After a step u the next batch's gradient g says whether the step could have been longer.  Its noise is
independent of u, so the mean of

    h = cos(g, u) = g . u / (|g| |u|)

is negative while the loss still falls at the end of a step, zero where the step ended at the bottom
along its own line, and slightly positive on the edge of stability, where a run with a tuned learning
rate spends its stable phase (Cohen et al., arXiv 2103.00065; the same product drives hypergradient
descent, Baydin et al., arXiv 1703.04782).  So

    slow start: while h is negative beyond its own noise the multiplier m doubles at every check (``GROWTH``);
    once it is not (the edge was touched) one step per check is measured, and m creeps on only while
    the schedule does not fall: a decay is meant to go below the edge, and must not be worked against;
    while the schedule rises (warm-up) nothing is learned.

Cosines are collected until their mean is two standard errors from zero, or until there are so many that
it may be called zero: a sequential test, short where the rate is far too small, patient near the edge.

m never falls below 1 through h: over all weights h cannot tell a tuned rate from one three times too
large.  Group by group it can, in the first steps: :mod:`.early_cuts` shortens the steps of groups that are
beyond the edge there.  What m can do wrong is judged by what is left after further real steps: every raise is an
account that is settled ``PATIENCE`` checks later; if the smoothed loss stands higher than before the raise by
more than its noise, the raises since are taken back and m has found its cap.

m is applied as a factor of the optimizer groups' ``lr`` around one step, so decoupled weight decay scales with
it, as it would with a larger rate, and the schedule never sees it.  A cut shortens the step that was made
instead: the groups it is about are not the optimizer's, and it soon ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import weights
from .early_cuts import EarlyCuts, shorten
from .records import State
from .weights import Groups, Tensors

#: Factor of one raise in the slow start, and real steps between checks.  At 2 per 5 steps a rate that is 10 times too
#: small is made up for in 20 steps; what that overshoots the early cuts take back, group by group.
GROWTH = 2.0
CHECK_STEPS = 5
#: Cosines a decision needs at least, and at which their mean is taken for zero, and how many standard errors decide.
#: At a tuned rate h is 0.01 to 0.05, at three times that 0.01, at a tenth -0.2, one step's noise 0.03 to 0.05 (LOG.md).
MIN_COSINES, MAX_COSINES = 4, 24
CONFIDENCE = 2.0
#: Where the rate was below the edge at the start, the edge itself moves: a network trained at it grows flatter.
#: There m follows, one raise per so many cosines that do not show it beyond the edge.
CREEP_COSINES = 8
CREEP = 1.3
#: Steps per check that are measured once the edge was touched.
MEASURED_AT_EDGE = 1
#: Checks after which a raise is settled, and how many standard errors of the smoothed loss count as worse.
PATIENCE = 4
SIGMAS = 2.0
#: A rate that moves by less than this share between checks is constant.
STILL = 1e-3


class StepScale(Protocol):
    """What a run needs of a multiplier of its optimizer's steps."""

    @property
    def value(self) -> float:
        """The multiplier m, at least 1."""
        ...

    @property
    def num_cuts(self) -> int:
        """Times that a group's early steps were cut."""
        ...

    @property
    def growing(self) -> bool:
        """Whether the steps have proved too short and the edge has not been seen yet."""
        ...

    @property
    def held(self) -> Sequence[Tensor]:
        """The weights before the last step, where it is to be measured."""
        ...

    def measure(self, parameters: Sequence[Tensor]) -> int:
        """Between backward and step: hold the last step against the new gradients; returns passes over the weights."""
        ...

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """Right before the optimizer's step: remember the weights if the step is to be measured."""
        ...

    @contextmanager
    def applied(self, optimizer: Optimizer) -> Iterator[None]:
        """The block in which the optimizer steps."""
        ...

    def after_step(self, parameters: Sequence[Tensor]) -> int:
        """Right after the optimizer's step: shorten it where it has to be; returns passes over the weights."""
        ...

    def forget(self) -> None:
        """Weights were moved by something else: the last step cannot be measured any more."""
        ...

    def check(self, learning_rate: float, loss: float, noise: float) -> None:
        """After a real step: every few steps decide on the multiplier."""
        ...

    def halve(self) -> None:
        """Something went wrong at this scale: half of it from here, and no more growth."""
        ...

    def memory_bytes(self) -> int:
        """Bytes held between steps."""
        ...

    def state_dict(self) -> State:
        """Everything a resume needs."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        ...


class UnitScale:
    """The null object: steps are the optimizer's own."""

    value = 1.0
    num_cuts = 0
    growing = False
    held: Sequence[Tensor] = ()

    def measure(self, parameters: Sequence[Tensor]) -> int:
        """Nothing."""
        return 0

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """Nothing."""
        return 0

    @contextmanager
    def applied(self, optimizer: Optimizer) -> Iterator[None]:
        """The block as it is."""
        yield

    def after_step(self, parameters: Sequence[Tensor]) -> int:
        """Nothing."""
        return 0

    def forget(self) -> None:
        """Nothing."""

    def check(self, learning_rate: float, loss: float, noise: float) -> None:
        """Nothing."""

    def halve(self) -> None:
        """Nothing."""

    def memory_bytes(self) -> int:
        """None."""
        return 0

    def state_dict(self) -> State:
        """Nothing."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Nothing."""


@torch.no_grad()
def step_cosines(
    gradients: Sequence[Tensor | None], before: Sequence[Tensor], after: Sequence[Tensor], groups: Groups
) -> Tensor:
    """cos(g, u) with u = after - before, (1 + G,) on the weights' device: of all weights, then of every group.

    0 where either vanishes.

    Args:
        gradients: One per parameter; None and sparse ones are left out.
        before: Weights before the step.
        after: Weights after it.
        groups: Of the parameters.
    """
    device = after[0].device
    wide = weights.accumulate_dtype(device)
    sums = [[torch.zeros(3, dtype=wide, device=device)] for _ in range(groups.num_groups)]  # g'u, |g|^2 and |u|^2
    for g, b, a, row in zip(gradients, before, after, groups.index, strict=True):
        if g is None or g.is_sparse:
            continue
        u = (a - b.to(a.device)).reshape(-1).float()
        flat = g.reshape(-1).float()
        sums[row].append(torch.stack([torch.dot(flat, u), torch.dot(flat, flat), torch.dot(u, u)]).to(device, wide))
    of_group = torch.stack([torch.stack(pieces).sum(0) for pieces in sums])
    dot, g_squared, u_squared = torch.cat([of_group.sum(0, keepdim=True), of_group]).unbind(1)
    size = (g_squared * u_squared).sqrt()
    cosines: Tensor = torch.where(size > 0, dot / size, torch.zeros_like(size))
    return cosines


class LearnedScale:
    """Slow start up to the edge of stability, with every raise on account."""

    def __init__(
        self, groups: Groups, maximum: float, minimum: float = 1.0, check_steps: int = CHECK_STEPS, *,
        untrained: bool = False,
    ) -> None:  # fmt: skip
        """Bind to the groups.

        Args:
            groups: Of the parameters.
            maximum: Bound on m; 1: no raises.
            minimum: Bound on the early cuts' factors; 1: no cuts.
            check_steps: Real steps between checks.
            untrained: Whether the weights are as they were drawn.
        """
        self.groups, self.maximum, self.check_steps = groups, maximum, check_steps
        self.cuts = EarlyCuts(groups.roles, minimum, untrained=untrained)
        self.value = 1.0
        self.touched = False  # the edge of stability has been seen
        self.num_raises = 0
        self.num_taken_back = 0
        self._cap = maximum
        self._num_steps = 0  # since the last check
        self._learning = False  # the rate does not rise, and there is room to grow
        self._cosines: list[Tensor] = []  # scalars on the weights' device: read at a check, together
        self._before: Tensors = []  # weights before the last step, if it is to be measured or shortened
        self._collecting = False  # whether h of the last step counts for m
        self._last_rate = math.nan
        self._account: tuple[int, float, float] | None = None  # (checks left, value before the raise, loss before)
        self.last_cosine = math.nan

    @property
    def num_cuts(self) -> int:
        """Times that a group's early steps were cut."""
        return self.cuts.num_cuts

    @property
    def growing(self) -> bool:
        """From the first raise to the edge, or to the bound."""
        return 1 < self.value < self._cap and not self.touched

    @property
    def held(self) -> Sequence[Tensor]:
        """The weights before the last step, where it is to be measured."""
        return self._before if self._collecting or self.cuts.watching else []

    # ---- measuring ---------------------------------------------------------------------------------

    def measure(self, parameters: Sequence[Tensor]) -> int:
        """Take cos(g, u) of the last step; 6 passes over the weights."""
        if not self._before or not (self._collecting or self.cuts.watching):
            return 0
        cosines = step_cosines(
            [p.grad for p in parameters], self._before, [p.detach() for p in parameters], self.groups
        )
        if self._collecting:
            self._cosines.append(cosines[0])
        if self.cuts.watching:
            self.cuts.observe(cosines[1:].tolist())  # a transfer per step, in the first steps only
        self._before = []
        return 6

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """Keep the weights while there is something to learn: at every step before the edge, then at one per check."""
        self._collecting = self._learning and not (self.touched and self._num_steps >= MEASURED_AT_EDGE)
        if not (self._collecting or self.cuts.watching or self.cuts.active):
            self._before = []
            return 0
        self._before = weights.clone(parameters)
        return 2

    @contextmanager
    def applied(self, optimizer: Optimizer) -> Iterator[None]:
        """Multiply every group's ``lr`` by m for the block."""
        if self.value == 1.0:
            yield
            return
        rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
        try:
            for group, rate in rates:
                group["lr"] = rate * self.value
            yield
        finally:
            for group, rate in rates:
                group["lr"] = rate

    def after_step(self, parameters: Sequence[Tensor]) -> int:
        """Shorten the step where a cut stands; 3 passes over the weights."""
        passes = 0
        if self.cuts.active and self._before:
            shorten(parameters, self._before, self.groups.index, self.cuts.factors)
            passes = 3
        self.cuts.count_step()
        return passes

    def forget(self) -> None:
        """Drop the remembered weights."""
        self._before = []

    # ---- deciding -----------------------------------------------------------------------------------

    def check(self, learning_rate: float, loss: float, noise: float) -> None:
        """Count a real step; at every ``check_steps``-th decide.

        Args:
            learning_rate: The schedule's, without the scale.
            loss: Smoothed training loss.
            noise: Its standard error.
        """
        self._num_steps += 1
        if self._num_steps < self.check_steps:
            return
        self._num_steps = 0
        self._settle(loss, noise)
        before, self._last_rate = self._last_rate, learning_rate
        rising = not learning_rate <= before * (1 + STILL)  # at the first check too
        falling = learning_rate < before * (1 - STILL)
        if not rising and not (self.touched and falling):
            self._decide(loss)
        self._learning = not rising and not (self.touched and falling) and self.value < self._cap

    def _decide(self, loss: float) -> None:
        """Raise m, call the edge touched, or wait for more cosines."""
        n = len(self._cosines)
        creeping = self.touched and self.value > 1
        if n < (CREEP_COSINES if creeping else MIN_COSINES):
            return
        values: list[float] = weights.on_host(self._cosines).tolist()  # one transfer
        h = self.last_cosine = sum(values) / n
        variance = sum((v - h) ** 2 for v in values) / (n - 1)
        error = math.sqrt(variance / n)
        far = abs(h) > CONFIDENCE * error
        if (far and h < 0) or (creeping and h < error):
            self._raise(loss)
        elif far or n >= MAX_COSINES or not math.isfinite(h):
            self.touched = True
        else:
            return
        self._cosines = []

    def _raise(self, loss: float) -> None:
        if self._account is None:
            self._account = (PATIENCE, self.value, loss)
        before = self.value
        self.value = min(before * (CREEP if self.touched else GROWTH), self._cap)
        self.num_raises += 1
        if not self.touched:
            self.cuts.lengthened(self.value / before)

    def _settle(self, loss: float, noise: float) -> None:
        """Judge the raises of the open account by the loss that is left some checks later."""
        if self._account is None:
            return
        left, value, before = self._account
        if left > 1:
            self._account = (left - 1, value, before)
            return
        self._account = None
        if not loss <= before + SIGMAS * noise:  # also when it is not a number
            self._cap = self.value = value
            self.num_taken_back += 1

    def halve(self) -> None:
        """Half of m, and never more."""
        self._cap = self.value = max(1.0, self.value / 2)
        self._account = None
        self.num_taken_back += 1

    # ---- report and state ------------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        """One copy of the weights while steps are measured."""
        return sum(t.numel() * t.element_size() for t in self._before)

    _SCALARS = ("value", "touched", "num_raises", "num_taken_back", "last_cosine")
    _PRIVATE = ("_cap", "_num_steps", "_last_rate", "_learning", "_collecting")

    def state_dict(self) -> State:
        """Scalars, the open account and the step that waits to be measured."""
        state: State = {name.lstrip("_"): getattr(self, name) for name in (*self._SCALARS, *self._PRIVATE)}
        return {
            **state,
            "account": None if self._account is None else list(self._account),
            "cosines": weights.on_host(self._cosines).tolist(),
            "before": list(self._before),
            "cuts": self.cuts.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`; tensors are copied and go to their parameters' devices when they are used."""
        for name in (*self._SCALARS, *self._PRIVATE):
            setattr(self, name, state[name.lstrip("_")])
        account = state["account"]
        self._account = None if account is None else (int(account[0]), float(account[1]), float(account[2]))
        self._cosines = [torch.tensor(c, dtype=torch.float64) for c in state["cosines"]]
        self._before = [t.clone() for t in state["before"]]
        self.cuts.load_state_dict(state["cuts"])
