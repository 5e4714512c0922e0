"""Per-group step sizes for the first steps: multiplicative back-off beyond the edge of stability, additive recovery.

A learning rate is one number, the edge of stability is not: in the first steps of a transformer the hidden
matrices are beyond it while embeddings and head are far below.  What those steps break is not mended later:
in trials half the rate for the hidden matrices in the first 40 steps was worth as much as half of it throughout
(LOG.md).  Longer warm-ups and Lookahead get most of what they gain at high rates here.

So in the first ``EARLY_STEPS`` real steps, and for some after a raise of the common multiplier, the cosine
h_g = cos(g, u) of every group's step with its next gradient is watched: positive, the loss along the step
already rises where it ended.  As in congestion control (additive increase, multiplicative decrease; Chiu & Jain 1989)

    f_g <- f_g / 2       when the newest ``NUM_COSINES`` h_g are above ``BEYOND`` on the mean, by more than their noise,
    f_g <- f_g + 1/100   at every step, up to 1,

and the step of the group is shortened to f_g of itself.  In an untrained network attention and MLP matrices start at
f_g = ``least`` and ramp up over 100 steps, because their first steps destroy more than they gain.  When m is raised
before the edge is reached, their f_g is divided by the same factor, so that their steps do not jump.  Where the head is
the table of embeddings, and step sizes by role let it step further, ``least`` is ``LEAST_BEHIND_TABLE`` or more.  In a
network that has been trained every f_g starts at 1, because the same ramp loses more than it saves there (LOG.md).

Is it harm?  Where the blocks alone could lower the loss, a slow beginning only costs: if the loss has not fallen by
the ``MUST_FALL``-th step, group warm-up ends and every group takes its whole step.

No cuts later: a run at a tuned rate spends its stable phase at slightly positive h_g, and cutting there only slows
it down.  And only where attention or MLP blocks are trained together with what is around them: a plain MLP and
adapters inside frozen blocks (LoRA) are none the worse for such steps, and ended higher with shorter ones (LOG.md).

Letters: ``G`` groups, ``g`` one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import StateDict
from ..weights import algebra as weights

#: Real steps in which a cut may be made: the first ones, and those after a raise of the common multiplier.
EARLY_STEPS, AFTER_RAISE = 50, 25
#: Real steps in which a group comes back from nothing.
RECOVERY_STEPS = 100
#: Cosines that a cut is decided on, and the least mean of them.
NUM_COSINES, BEYOND = 3, 0.05
CUT = 0.5
#: No f_g is less where the head is the table of embeddings and has the larger steps of a recipe by role.
LEAST_BEHIND_TABLE = 0.3
#: Real steps by which the loss must have fallen below its beginning; in the language runs it has after five.
MUST_FALL = 30


class GroupWarmup:
    """Group warm-up: one factor f_g in (0, 1] per group, by which the group's step is shortened.

    Attributes:
        least: Bound on every f_g from below; 1: no group warm-up.
        factors: (G,) f_g of the next step, dimensionless.
        num_cuts: Back-offs so far.
        num_steps: Real steps counted.
    """

    def __init__(self, roles: Sequence[str], least: float, *, untrained: bool = False) -> None:
        """Start; in a network without blocks, and inside frozen ones, there will be no cuts.

        Args:
            roles: (G,) of the groups.
            least: Bound on f_g from below; 1: no cuts.
            untrained: Whether the weights are as they were drawn.
        """
        inside = [is_inside_a_block(role) for role in roles]
        self.least = least if any(inside) and not all(inside) else 1.0
        self._ramped = [untrained and block for block in inside]
        self.factors = [self.least if ramped else 1.0 for ramped in self._ramped]
        self.num_cuts = 0
        self._num_left = EARLY_STEPS if self.least < 1 else 0  # real steps in which a cut may still be made
        self.num_steps = 0  # real steps counted
        self._cosines: list[list[float]] = [[] for _ in roles]  # newest last, since the group's last cut
        # of a step that is being counted: number, steps left, factors, shortened weights by place
        self._landing: tuple[int, int, list[float], dict[int, Tensor]] | None = None

    @property
    def watching(self) -> bool:
        """Whether the next step's cosines are asked for."""
        return self._num_left > 0

    @property
    def active(self) -> bool:
        """Whether a step is to be shortened."""
        return min(self.factors) < 1.0

    def observe(self, cosines: Sequence[float]) -> None:
        """Decide on the cosines of one step.

        Args:
            cosines: (G,) h_g.
        """
        for g, h in enumerate(cosines):
            newest = [*self._cosines[g], h][-NUM_COSINES:]
            if beyond_the_edge(newest):
                self.factors[g], newest = max(self.factors[g] * CUT, self.least), []
                self.num_cuts += 1
            self._cosines[g] = newest

    def lengthened(self, factor: float) -> None:
        """All steps are to become longer by ``factor``: cuts may be needed again, unless there are none at all."""
        if self.least == 1.0:
            return
        self._num_left = max(self._num_left, AFTER_RAISE)
        pairs = zip(self.factors, self._ramped, strict=True)
        self.factors = [max(f / factor, self.least) if ramped else f for f, ramped in pairs]

    def count_step(
        self, parameters: Sequence[Tensor] = (), before: Sequence[Tensor] = (), index: Sequence[int] = ()
    ) -> int:
        """A real step was made: shorten it, and let every group come back a little.

        Where this is interrupted it may be done again: ``num_steps`` rises when all of it is done.

        Args:
            parameters: Weights after the step, written in place.
            before: Those before it; none given: nothing is shortened.
            index: Group of every parameter.

        Returns:
            Passes over the weights.
        """
        if self._landing is None:  # built first, then written from what was built
            moved = shortened(parameters, before, index, self.factors) if before and self.active else {}
            recovered = [min(1.0, f + 1 / RECOVERY_STEPS) for f in self.factors]
            self._landing = (self.num_steps + 1, max(self._num_left - 1, 0), recovered, moved)
        num_steps, num_left, factors, moved = self._landing
        if moved:
            weights.copy_([parameters[i] for i in moved], list(moved.values()))
        self._num_left, self.factors = num_left, factors
        self.num_steps, self._landing = num_steps, None
        return 5 if moved else 0

    def on_loss(self, *, fallen: bool) -> None:
        """Take whether the loss has ever been below its beginning: if not by now, the cuts end."""
        if self.num_steps >= MUST_FALL and not fallen and self.least < 1:
            self.end()

    def end(self) -> None:
        """No cuts any more: every group steps as it is."""
        self.least, self._num_left = 1.0, 0
        self.factors, self._ramped = [1.0 for _ in self.factors], [False for _ in self._ramped]

    def state_dict(self) -> StateDict:
        """Factors and what they are decided on."""
        return {
            "factors": list(self.factors), "ramped": list(self._ramped), "num_cuts": self.num_cuts,
            "num_left": self._num_left, "num_steps": self.num_steps, "least": self.least,
            "cosines": [list(values) for values in self._cosines],
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.factors, self.num_cuts, self._num_left = list(state["factors"]), state["num_cuts"], state["num_left"]
        self.num_steps, self.least, self._landing = state["num_steps"], state["least"], None
        self._cosines, self._ramped = [list(values) for values in state["cosines"]], list(state["ramped"])


def is_inside_a_block(role: str) -> bool:
    """Whether a role of :data:`.weights.ROLES` is that of a matrix between the residual stream and itself."""
    return role.startswith(("attention", "mlp"))


def beyond_the_edge(cosines: Sequence[float]) -> bool:
    """Whether that many cosines, and not fewer, are above ``BEYOND`` on the mean by more than one standard error."""
    n = len(cosines)
    if n < NUM_COSINES:
        return False
    h = sum(cosines) / n
    error = math.sqrt(sum((v - h) ** 2 for v in cosines) / (n - 1) / n)
    return h > max(BEYOND, error)


@torch.no_grad()
def shortened(
    parameters: Sequence[Tensor], before: Sequence[Tensor], index: Sequence[int], factors: Sequence[float]
) -> dict[int, Tensor]:
    """``before + f_g (theta - before)`` by place, for the parameters of the groups with f_g < 1; nothing is written.

    Args:
        parameters: theta, after a step.
        before: The weights before it.
        index: Group of every parameter.
        factors: (G,) f_g.
    """
    found: dict[int, Tensor] = {}
    for g, f in enumerate(factors):
        chosen = [i for i, row in enumerate(index) if row == g]
        if f < 1 and chosen:
            moved = torch._foreach_lerp([parameters[i] for i in chosen], [before[i] for i in chosen], 1 - f)
            found.update(zip(chosen, moved, strict=True))
    return found


def shorten(
    parameters: Sequence[Tensor], before: Sequence[Tensor], index: Sequence[int], factors: Sequence[float]
) -> None:
    """:func:`shortened`, written in place."""
    moved = shortened(parameters, before, index, factors)
    if moved:
        weights.copy_([parameters[i] for i in moved], list(moved.values()))
