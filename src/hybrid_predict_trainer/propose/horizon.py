"""Which horizon to try next: a bandit over {no jump, N/4, N/2, N, 2N, 4N}, N steps a window.

LinUCB with one ridge per arm (Li et al., WWW 2010, algorithm 1), discounted for runs that change
(Russac et al., NeurIPS 2019), and UCB1 (Auer et al., 2002) as the one without context.  A decision
reads cached inverses; they are renewed when a reward comes in.

Letters: ``A`` arms, ``F`` features of the context x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..records import StateDict, Window

Array = NDArray[np.float64]

NUM_CONTEXT_FEATURES = 7


# ---- arms, rewards, contexts --------------------------------------------------------------------


def horizons(window: int, minimum: int, maximum: int) -> tuple[int, ...]:
    """Horizons of the arms, rising, the first one 0 (no jump).

    Quarter, half, one, two and four windows, brought within [minimum, maximum]; what falls together
    is one arm.
    """
    if maximum < 1:
        return (0,)
    low = min(max(minimum, 1), maximum)
    wanted = (window // 4, window // 2, window, 2 * window, 4 * window)
    return (0, *sorted({min(max(y, low), maximum) for y in wanted}))


def reward(credited_steps: float, price_steps: float, window_steps: float = 1.0) -> float:
    """Net effective steps per unit of cost of one cycle: (credited - price) / (window + price).

    A proposal comes at most once in a window of real steps, which are part of the cycle's cost: by
    its own price alone a cheap short jump would beat a long one that gains more.  No jump is 0, a
    refused one lies in (-1, 0), an accepted one below horizon / window.

    Args:
        credited_steps: Real steps the ledger credits; 0 for a refused or taken-back jump.
        price_steps: Cost of asking (and of lost probation) in real steps.
        window_steps: Real steps between two decisions.
    """
    cost = window_steps + price_steps
    return (credited_steps - price_steps) / cost if cost > 0 else 0.0


def context_features(window: Window, *, confidence: float, persistence: float, spread: float) -> Array:
    """(7,) state a horizon is chosen in, each within [-1, 1], the last one constant.

    Args:
        window: The one that has just closed.
        confidence: Probability that a jump is kept.
        persistence: Share of a gate gain that stays, from the ledger.
        spread: Standard deviation of the loss around its EMA.
    """
    scale = abs(window.loss) or 1.0
    ahead = window.lr_ahead / window.lr_integral if window.lr_integral > 0 else 1.0
    values = (
        2 * confidence - 1,
        2 * persistence - 1,
        math.tanh(-10 * window.loss_slope * window.num_steps / scale),  # loss a window takes off
        math.tanh(10 * spread / scale),
        min(ahead, 2.0) - 1,  # a schedule that decays shortens what can be jumped
        math.tanh(window.step / 1000),
        1.0,
    )
    return np.array([v if math.isfinite(v) else 0.0 for v in values])


# ---- formulas -----------------------------------------------------------------------------------


def linucb_scores(theta: Array, inverse: Array, x: Array, alpha: float) -> Array:
    """(A,) upper confidence bounds  theta_a . x + alpha * sqrt(x' V_a^-1 x).

    Args:
        theta: (A, F) ridge solutions V_a^-1 b_a.
        inverse: (A, F, F) inverses V_a^-1.
        x: (F,) context.
        alpha: Width of the bound.
    """
    width: Array = np.sqrt(np.maximum((inverse @ x) @ x, 0.0))
    return np.asarray(theta @ x + alpha * width)


def ucb1_scores(counts: Array, sums: Array, scale: float) -> Array:
    """(A,) mean reward + scale * sqrt(2 ln n / n_a); infinite for an arm never tried.

    Args:
        counts: (A,) plays, discounted.
        sums: (A,) rewards, discounted likewise.
        scale: Range of the rewards.
    """
    tried = np.maximum(counts, 1e-12)
    bonus = np.sqrt(2 * math.log(max(float(counts.sum()), 1.0)) / tried)
    return np.where(counts > 0, sums / tried + scale * bonus, np.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An arm with the context it was chosen in, to be kept until its reward is known."""

    arm: int
    context: Array  # (F,)
    score: float

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {"arm": self.arm, "context": self.context.tolist(), "score": self.score}

    @classmethod
    def from_state_dict(cls, state: StateDict) -> Choice:
        """Inverse of :meth:`state_dict`."""
        return cls(arm=state["arm"], context=np.array(state["context"]), score=state["score"])


class Bandit(Protocol):
    """Chooses an arm, learns from its reward, which may come much later."""

    def choose(self, context: Array) -> Choice:
        """The most promising arm."""

    def observe(self, choice: Choice, reward: float) -> None:
        """Learn the reward of a choice."""

    def state_dict(self) -> StateDict:
        """Everything learnt."""

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""


class _Ties:
    """Breaks ties, with a generator of its own: nothing else is random here."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def best(self, scores: Array) -> int:
        top = np.flatnonzero(scores == scores.max())
        if len(top) == 1:
            return int(top[0])
        return int(top[int(torch.randint(len(top), (), generator=self.generator))])


class LinUCB:
    """Disjoint linear models: reward of arm a ~ theta_a . x."""

    def __init__(
        self, num_arms: int, num_features: int = NUM_CONTEXT_FEATURES, *,
        alpha: float = 0.5, l2: float = 1.0, discount: float = 1.0, seed: int = 0,
    ) -> None:  # fmt: skip
        """No data.

        Args:
            num_arms: A.
            num_features: F.
            alpha: Width of the confidence bound, in units of the rewards.
            l2: Ridge strength.
            discount: Weight of a reward one reward later, of whichever arm; 1 never forgets.
            seed: For ties.
        """
        self.alpha, self.l2, self.discount = alpha, l2, discount
        self._gram = np.zeros((num_arms, num_features, num_features))  # sum of x x'
        self._moment = np.zeros((num_arms, num_features))  # sum of r x
        self._ties = _Ties(seed)
        self._renew()

    def _renew(self) -> None:
        V = self._gram + self.l2 * np.eye(self._gram.shape[1])
        self._inverse: Array = np.asarray(np.linalg.inv(V), dtype=np.float64)
        self.theta = np.einsum("aij,aj->ai", self._inverse, self._moment)  # (A, F)

    def choose(self, context: Array) -> Choice:
        """The arm with the highest upper confidence bound."""
        scores = linucb_scores(self.theta, self._inverse, context, self.alpha)
        arm = self._ties.best(scores)
        return Choice(arm=arm, context=context, score=float(scores[arm]))

    def observe(self, choice: Choice, reward: float) -> None:
        """Add x x' and r x to the arm, forgetting a little of all; a reward that is not finite is left out."""
        if not math.isfinite(reward):
            return
        x = choice.context
        self._gram *= self.discount
        self._moment *= self.discount
        self._gram[choice.arm] += np.outer(x, x)
        self._moment[choice.arm] += reward * x
        self._renew()

    def state_dict(self) -> StateDict:
        """Sums and the generator."""
        return {
            "gram": torch.from_numpy(self._gram.copy()), "moment": torch.from_numpy(self._moment.copy()),
            "generator": self._ties.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._gram, self._moment = state["gram"].numpy().copy(), state["moment"].numpy().copy()
        self._ties.generator.set_state(state["generator"])
        self._renew()


class UCB1:
    """One mean per arm, the same in every context."""

    def __init__(self, num_arms: int, *, scale: float = 1.0, discount: float = 1.0, seed: int = 0) -> None:
        """No data.

        Args:
            num_arms: A.
            scale: Range of the rewards.
            discount: Weight of a reward one reward later, of whichever arm; 1 never forgets.
            seed: For ties.
        """
        self.scale, self.discount = scale, discount
        self._counts, self._sums = np.zeros(num_arms), np.zeros(num_arms)
        self._ties = _Ties(seed)

    def choose(self, context: Array) -> Choice:
        """The arm with the highest bound; every arm once before any twice."""
        scores = ucb1_scores(self._counts, self._sums, self.scale)
        arm = self._ties.best(scores)
        return Choice(arm=arm, context=context, score=float(scores[arm]))

    def observe(self, choice: Choice, reward: float) -> None:
        """Count the reward, forgetting a little of all; one that is not finite is left out."""
        if not math.isfinite(reward):
            return
        self._counts *= self.discount
        self._sums *= self.discount
        self._counts[choice.arm] += 1
        self._sums[choice.arm] += reward

    def state_dict(self) -> StateDict:
        """Counts, sums and the generator."""
        return {
            "counts": self._counts.tolist(), "sums": self._sums.tolist(), "generator": self._ties.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._counts, self._sums = np.array(state["counts"]), np.array(state["sums"])
        self._ties.generator.set_state(state["generator"])
