"""The learning-rate multiplier: a factor m of the optimizer's own steps, learned from gradients that training computes.

After a step u the next batch's gradient g says whether the step could have been longer.  Its noise is
independent of u, so the mean of

    h = cos(g, u) = g . u / (|g| |u|)

is negative while the loss still falls at the end of a step, zero where the step ended at the bottom
along its own line, and slightly positive on the edge of stability, where a run with a tuned learning
rate spends its stable phase (Cohen et al., arXiv 2103.00065; the same product drives hypergradient
descent, Baydin et al., arXiv 1703.04782).  So

    slow start: while single steps show that h is negative (:mod:`.edge_test`), m doubles at every check (``GROWTH``);
    of a network that was trained before, while the mean shows it.  Beyond fourfold the loss is asked in between.
    arrival: after the slow start, and after every later raise, all steps are measured until h is no longer negative;
    for as long as it is positive then, m is halved, to 2 at least (1 with SGD): h cannot tell 2 from 1.
    edge: once they do not, one step per check is measured and m grows by ``CREEP``, only on significant evidence that
    h is negative, only while the schedule stands at its peak (a decay is meant to go below the edge), and to at most
    ``ROOM`` times its value at the edge.
    While the schedule rises (warm-up), m does not change.

Ignorance is no reason for a raise: every test is valid however often it is looked at, and all tests after the edge
share one level.  Nothing is raised before the loss has fallen once, nor where the same data come round again
(:mod:`..observe.recurrence`): there the training loss cannot tell a faster start from a faster overfitting.

What m does wrong is judged by loss, three times.  The state at the start of a raise is kept until the raise is settled
``PATIENCE`` checks later; if the smoothed loss then stands above the one before or above its best by more
than its noise (where losses are exact: above the largest of the last steps before, at once), m and the state go back.
Later, blocks with m are compared with a random holdout of blocks at the schedule's own rate
(:mod:`..judge.switchback`).  The guard (:mod:`..judge.guard`) watches the run as a whole.  After ``MAX_TAKEN_BACK``
takebacks m is 1 for good.

m never falls below 1 through h: over all weights h cannot tell a tuned rate from one three times too
large.  Group by group it can, in the first steps: :mod:`.group_warmup` shortens the steps of groups that are
beyond the edge there.

m is applied as a factor of the optimizer groups' ``lr`` around one step, and the schedule never sees it.  Decoupled
weight decay is divided by it for that step, so that it pulls as hard as the user's own rate and decay say, unless it is
asked to follow.  Group warm-up shortens the step after it was made, because its groups are not those of the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..judge.switchback import NUM_LOSSES, Switchback
from ..numerics.sequential import Moments
from ..records import StateDict
from ..weights import algebra as weights
from ..weights.algebra import Tensors
from ..weights.parameters import Groups
from ..weights.shards import total_over
from .edge_test import step_cosines
from .group_warmup import GroupWarmup
from .multiplier import Advice, Multiplier, Reading
from .recipe import decay_of

#: Real steps between checks.
CHECK_STEPS = 5
#: Steps per check that are measured once the edge was touched.
MEASURED_AT_EDGE = 1


class LrMultiplier:
    """The learning-rate multiplier m >= 1, and the group warm-up factors f_g in (0, 1].

    Slow start up to the edge of stability (Cohen et al., arXiv 2103.00065) by the sign of cos(g, u); a raise that the
    loss does not bear out is taken back.  Dimensionless: the step is that of the schedule's rate times m.

    Attributes:
        last_cosine: h of the last measured step over all weights, in [-1, 1]; NaN before the first.
    """

    def __init__(
        self, groups: Groups, maximum: float, minimum: float = 1.0, check_steps: int = CHECK_STEPS, *,
        untrained: bool = False, pretrained: bool = False, holdout_fraction: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        """Bind to the groups.

        Args:
            groups: Of the parameters.
            maximum: Bound on m; 1: no raises.
            minimum: Bound from below on the group warm-up factors; 1: no group warm-up.
            check_steps: Real steps between checks.
            untrained: Whether the weights are as they were drawn.
            pretrained: Whether they are known to have been trained before.
            holdout_fraction: Share of later blocks that step at the schedule's own rate, to compare with.
            generator: The run's own, for the draw of those blocks; one of its own if None.
        """
        self.groups, self.check_steps = groups, check_steps
        self.multiplier = Multiplier(maximum, pretrained=pretrained)
        self.cuts = GroupWarmup(groups.roles, minimum, untrained=untrained)
        self.trial = Switchback(holdout_fraction)
        self._num_steps = 0  # since the last check
        self._cosines: list[Tensor] = []  # scalars on the weights' device: read at a check, together
        self._moments = Moments()  # of those that were read since the last decision
        self._before: Tensors = []  # weights before the last step, if it is to be measured or shortened
        self._collecting = False  # whether h of the last step counts for m
        self._resting = False
        self._generator = torch.Generator() if generator is None else generator
        self.last_cosine = math.nan

    def halve_down_to(self, least: float) -> None:
        """Bound from below on an m that is halved; see :data:`.multiplier.UNTOLD`."""
        self.multiplier.halve_down_to(least)

    @property
    def value(self) -> float:
        """Of the next step: m, or 1 in a block that is compared with."""
        return self.multiplier.value if self.trial.moving and not self._resting else 1.0

    @property
    def learned(self) -> float:
        """m."""
        return self.multiplier.value

    @property
    def may_grow(self) -> bool:
        """Whether m is above 1 or may be."""
        return self.multiplier.cap > 1

    @property
    def num_steps(self) -> int:
        """Real steps that were counted, and shortened where that was wanted."""
        return self.cuts.num_steps

    @property
    def shortening(self) -> bool:
        """Whether a cut stands."""
        return self.cuts.active

    @property
    def taken_back(self) -> int:
        """Times that m went back."""
        return self.multiplier.num_taken_back

    @property
    def touched(self) -> bool:
        """Whether the edge of stability has been seen."""
        return self.multiplier.touched

    @property
    def num_cuts(self) -> int:
        """Times that a group's early steps were cut."""
        return self.cuts.num_cuts

    @property
    def growing(self) -> bool:
        """From the first raise to the edge, or to the bound."""
        return 1 < self.multiplier.value < self.multiplier.cap and not self.touched

    @property
    def held(self) -> Sequence[Tensor]:
        """The weights before the last step, where it is to be measured."""
        return self._before if self._collecting or self.cuts.watching else []

    # ---- measuring ---------------------------------------------------------------------------------

    def measure(self, parameters: Sequence[Tensor]) -> int:
        """Take cos(g, u) of the last step; 6 passes over the weights."""
        if not self._before or not (self._collecting or self.cuts.watching):
            return 0
        pairs = list(zip(parameters, self._before, strict=True))
        gradients = [g if g is None or g.is_sparse else weights.like_sampled(g, b) for g, b in _gradients(pairs)]
        after = [weights.like_sampled(p.detach(), b) for p, b in pairs]
        cosines = step_cosines(gradients, self._before, after, self.groups, total_over(parameters))
        if self._collecting:
            self._cosines.append(cosines[0])
        if self.cuts.watching:
            self.cuts.observe(cosines[1:].tolist())  # a transfer per step, in the first steps only
        self._before = []
        return 6

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """Keep the weights while there is something to learn: at every step before the edge, then at one per check."""
        learning = self.multiplier.learning and self.trial.moving and not self._resting
        enough = self.touched and self.multiplier.arrived and self._num_steps >= MEASURED_AT_EDGE
        self._collecting = learning and not enough
        if not (self._collecting or self.cuts.watching or self.cuts.active):
            self._before = []
            return 0
        self._before = self._kept(parameters)
        return 2

    @torch.no_grad()
    def _kept(self, parameters: Sequence[Tensor]) -> Tensors:
        """Copies: of large models a sample is enough for a cosine, and the whole is for groups that are shortened."""
        if sum(self.groups.sizes) <= weights.LARGE:
            return weights.clone(parameters)
        cut = [factor < 1 for factor in self.cuts.factors]
        pairs = zip(parameters, self.groups.index, strict=True)
        return [(p if cut[row] else weights.sampled(p)).detach().clone() for p, row in pairs]

    @contextmanager
    def applied(self, optimizer: Optimizer, *, decay_follows: bool = False) -> Iterator[None]:
        """Multiply every group's ``lr`` by m for the block.

        Args:
            optimizer: Whose groups are put back afterwards.
            decay_follows: Decoupled decay is multiplied as well; else it is divided by what the rate is multiplied by.
        """
        value = self.value
        if value == 1.0:
            yield
            return
        rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
        decays = [] if decay_follows else [g for g, _ in rates if decay_of(optimizer, g) != 0]
        own = [(group, group["weight_decay"]) for group in decays]
        try:
            for group, rate in rates:
                group["lr"] = rate * value
            for group, decay in own:
                group["weight_decay"] = decay / value
            yield
        finally:
            for group, rate in rates:
                group["lr"] = rate
            for group, decay in own:
                group["weight_decay"] = decay

    def after_step(self, parameters: Sequence[Tensor]) -> int:
        """Shorten the step where a cut stands; 5 passes over the weights."""
        passes = self.cuts.count_step(parameters, self._before, self.groups.index)
        if self._before and sum(self.groups.sizes) > weights.LARGE:  # a cosine needs no more than a sample of them
            samples = [
                weights.sampled(b) if b.shape == p.shape else b for p, b in zip(parameters, self._before, strict=True)
            ]
            self._before = [b if s is b else s.clone() for s, b in zip(samples, self._before, strict=True)]
        return passes

    def forget(self) -> None:
        """Drop the remembered weights; the present block of the trial says nothing."""
        self._before = []
        self.trial.on_jump()

    def rest(self, resting: bool) -> None:
        """Leave m out of the next steps, or take it up again."""
        self._resting = resting

    def level(self) -> None:
        """m is 1 from here on."""
        self._begin_test()
        self.multiplier.level()

    def begin_anew(self) -> None:
        """Weights of before have come back: a raise that is not settled was not made, and no loss is the lowest."""
        self._begin_test()
        self.multiplier.begin_anew()

    def end_cuts(self) -> None:
        """Every group steps as it is, from here on."""
        self.cuts.end()

    # ---- deciding -----------------------------------------------------------------------------------

    def check(self, reading: Reading) -> Advice:
        """Count a real step; at every ``check_steps``-th decide."""
        advice = self.multiplier.watch(reading)
        if advice is Advice.TAKEN_BACK:
            self._begin_test()
            self._num_steps = 0
            return advice
        if self._compare(reading) is Advice.TAKEN_BACK:
            return Advice.TAKEN_BACK
        self._num_steps += 1
        if self._num_steps < self.check_steps:
            return Advice.NOTHING
        self._num_steps = 0
        self.cuts.on_loss(fallen=self.multiplier.has_fallen(reading))
        advice = self.multiplier.settle(reading)
        if advice is Advice.TAKEN_BACK:
            self._begin_test()
            return advice
        allowed = self.multiplier.follow(reading.lr)
        if self._cosines and (allowed or not self.multiplier.arrived):
            raised = self._decide(reading, allowed=allowed)
            return advice if raised is Advice.NOTHING else raised  # a new raise keeps a state of its own
        return advice

    def _compare(self, reading: Reading) -> Advice:
        """Blocks with m against blocks at the schedule's own rate, where losses are noisy; no state goes back."""
        if self.multiplier.value == 1.0 or reading.exact:
            return Advice.NOTHING
        self.trial.on_motion()
        if self.trial.count_step():
            self.trial.close_block(list(reading.newest)[-NUM_LOSSES:], self._generator)
            if self.trial.switched_off:
                return self.withdraw(for_good=True)
        return Advice.NOTHING

    def _decide(self, reading: Reading, *, allowed: bool) -> Advice:
        cosines = weights.on_host(self._cosines).tolist()  # one transfer
        self._cosines = []
        before, touched = self.multiplier.value, self.touched
        self.multiplier.arrive(cosines)
        if self.multiplier.value < before:  # what was measured so far is of longer steps
            self._begin_test()
            self.trial.restart()
            return Advice.NOTHING
        self._moments.push(cosines[:MEASURED_AT_EDGE] if touched else cosines)
        self.last_cosine = self._moments.mean
        advice, decided = self.multiplier.decide(self._moments, reading) if allowed else (Advice.NOTHING, False)
        if decided:
            self._begin_test()
        if self.multiplier.value > before:
            self.trial.restart()
            if not touched:
                self.cuts.lengthened(self.multiplier.value / before)
        return advice

    def _begin_test(self) -> None:
        self._cosines, self._moments = [], Moments()

    def withdraw(self, *, for_good: bool = False) -> Advice:
        """m as it was before the open raise (without one: 1), and never more."""
        self._begin_test()
        if self.multiplier.value > 1:
            return self.multiplier.take_back(for_good=for_good)
        if for_good:
            self.multiplier.level()  # nothing is measured any more either
        return Advice.NOTHING

    # ---- report and state ------------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        """A copy of the weights while steps are measured, of large models a sample of it."""
        return sum(t.numel() * t.element_size() for t in self._before)

    def state_dict(self) -> StateDict:
        """Scalars, the open account and the step that waits to be measured."""
        return {
            "multiplier": self.multiplier.state_dict(),
            "trial": self.trial.state_dict(),
            "num_steps": self._num_steps,
            "resting": self._resting,
            "collecting": self._collecting,
            "last_cosine": self.last_cosine,
            "cosines": weights.on_host(self._cosines).tolist(),
            "moments": [self._moments.num, self._moments.mean, self._moments.squares],
            "before": list(self._before),
            "cuts": self.cuts.state_dict(),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`; tensors are copied and go to their parameters' devices when they are used."""
        if "multiplier" not in state:  # inside a snapshot of format 2: what m was then has no counterpart today
            return
        self.multiplier.load_state_dict(state["multiplier"])
        self.trial.load_state_dict(state["trial"])
        self._num_steps, self._collecting = state["num_steps"], state["collecting"]
        self._resting = state["resting"]
        self.last_cosine = state["last_cosine"]
        self._cosines = [torch.tensor(c, dtype=torch.float64) for c in state["cosines"]]
        self._moments = Moments(*state["moments"])
        self._before = [t.clone() for t in state["before"]]
        self.cuts.load_state_dict(state["cuts"])


def _gradients(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor | None, Tensor]]:
    """The gradient of every parameter, beside what the parameter is paired with."""
    return [(p.grad, beside) for p, beside in pairs]
