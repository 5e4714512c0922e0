"""Whether what is left of a loss of numbers is noise, found out from its training samples alone.

The loss of a full batch of noisy numbers goes to nothing in some dozen jumps, its noise included, while the loss on new
data rises.  The noise shows when samples are left out: as long as a network has something to learn, a sample's
residual can be told from those of the others, by the kernel of the network's own Jacobian; what is noise cannot
(:mod:`..numerics.leave_one_out`).  Here are the bookkeeping, and how residuals are read off the graph of a loss;
who asks is :mod:`..cycle.noise_check`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..records import StateDict
from .labels import PASSED, is_a_square, is_of_a_weight, name_of

T = TypeVar("T")

#: Dampings at which samples are left out, as shares of the kernel's trace; the last one leaves next to nothing.
DAMPINGS = (1e-4, 1e-2, 1e-6, 1e-8)
#: Share of the residuals that the best damping leaves, from which on samples tell no more of one another.
NOISE = 0.9
#: What fitting the rest to the end would leave of samples that were left out: over what there was left of them when
#: they first told no more, where it does harm, and where one answer is enough; and over the loss at the first question,
#: where it matters.  Details that are too fine for the samples do less, 1.1 to 1.9, than noise, 2 to 9.
HARM, DECISIVE, MATTERS = 1.6, 4.0, 0.1
#: Answers in a row that have to say so, where an earlier one told something: noise is what is left of it.
IN_A_ROW = 2
#: Where none did the loss has to have fallen to this share first: a network that has learnt nothing tells nothing.
LEARNT = 0.5
#: To what share the loss falls until the next question: so many times the share that cannot be told, in these bounds.
MARGIN, LEAST_FALL, MOST_FALL = 4.0, 1e-3, 0.7
#: The same where samples tell no more of one another: at first, how much less after each answer that it does no harm,
#: and at least.
NEAR, FURTHER, FAR = 0.9, 0.1, 0.5
#: Jumps after which it is asked in any case: the noise may be learnt while the loss hardly falls.
MOST_JUMPS = 24
#: Share of the loss at the first question below which nobody asks any more.
ENOUGH = 3e-3
#: Of the loss at which noise was to be expected: below that a jump has gone through it, if so much of the loss at the
#: first question was expected to be noise.  What is left then tells nothing any more.
THROUGH, DOUBT = 0.5, 0.3

#: Nodes that compare outputs and targets themselves, by the beginnings of their names.
COMPARING = ("MseLoss", "SmoothL1Loss", "HuberLoss")
#: Nodes of losses by hand: squares, distances, norms of a difference.
MEASURING = ("AbsBackward", "LinalgVectorNorm")
#: What such a loss is wrapped in besides what :data:`.labels.PASSED` names.
WRAPPED = ("Sqrt",)
#: Nodes of a difference that are looked through for a scale.
SCALES = ("MulBackward", "DivBackward", "NegBackward")
#: Nodes above the terms of a loss that are looked at.
MOST_NODES = 64
#: Ratio of the weights of two residuals that is rounding; of those above this share of their root mean square.
ALIKE, LARGE = 1.02, 1e-2


def residuals_of(loss: Tensor) -> Tensor | None:
    """Differences of outputs and data of which a loss is the mean square, distance or the like, with their graph.

    Args:
        loss: Shape (), with a graph that no backward has been through.

    Returns:
        Of any shape, samples first as the loss had them; None where the loss is nothing of the kind, has several such
        terms, as that of a differential equation with its boundary has, or weighs (masks) them.
    """
    terms = list(_terms(loss))
    if len(terms) != 1:
        return None
    found = _residuals(terms[0])
    return None if found is None or not _weighs_alike(loss, terms[0], found) else found


def _terms(loss: Tensor) -> Iterator[Any]:
    """Nodes at which a loss measures something that is no weight by itself."""
    waiting, seen = deque([loss.grad_fn]), 0
    while waiting and seen < MOST_NODES:
        node, seen = waiting.popleft(), seen + 1
        if node is None:
            continue
        name = name_of(node)
        if _measures(node, name):
            if not is_of_a_weight(node):
                yield node
        elif name.partition("Backward")[0] in (*PASSED, *WRAPPED):
            waiting.extend(before for before, _ in node.next_functions)


def _measures(node: Any, name: str) -> bool:
    if name.startswith("PowBackward0"):
        return float(node._saved_exponent) == 2
    if name.startswith("MulBackward"):
        return is_a_square(node)
    return name.startswith((*COMPARING, *MEASURING))


def _residuals(node: Any) -> Tensor | None:
    if name_of(node).startswith(COMPARING):
        outputs, targets = node._saved_self, node._saved_target
        return None if targets.requires_grad or not outputs.requires_grad else outputs - targets
    return node._saved_self if _is_from_data(node.next_functions[0][0]) else None


def _weighs_alike(loss: Tensor, node: Any, residuals: Tensor) -> bool:
    """Whether a loss treats all residuals alike: its derivative by one is the same function of it for all."""
    base = node._saved_self  # of outputs where the node compares, else the residuals themselves
    (slope,) = torch.autograd.grad(loss, base, retain_graph=True)
    size, name = residuals.detach().abs().double(), name_of(node)
    if name.startswith(("AbsBackward", "SmoothL1Loss", "HuberLoss")):  # at least alike on either side of zero
        size = torch.ones_like(size)
    large = size > LARGE * size.square().mean().sqrt()
    weights = (slope.detach().abs().double() / size)[large]
    if name.startswith(("SmoothL1Loss", "HuberLoss")):
        return bool((weights > 0).all())
    return bool(weights.numel()) and bool(weights.max() <= ALIKE * weights.min())


def _is_from_data(node: Any) -> bool:
    """Whether it is a difference of something trained and something that is not, up to a scale."""
    for _ in range(MOST_NODES):
        trained = [] if node is None else [before for before, _ in node.next_functions if before is not None]
        if len(trained) != 1:
            return False
        name = name_of(node)
        if name.startswith(("SubBackward", "RsubBackward")):
            return len(node.next_functions) == 2
        if not name.startswith(SCALES) and name.partition("Backward")[0] not in PASSED:
            return False
        node = trained[0]
    return False


class NoiseCheck:
    """Holds what leaving samples out has said against how far the loss has fallen.

    Bookkeeping only.  A question costs as much as some steps, so the next one is asked when the loss comes near what
    could not be told at the last one: without noise that is up to some fifteen times in a run.

    Attributes:
        found: What is left is noise.
        unable: Residuals cannot be had: nobody asks.
        num_asked: Questions so far.
        num_forward: Forwards that they were worth, what only the first one takes left out.
        usual: Those of the last one.
    """

    def __init__(self) -> None:
        """Nobody has asked."""
        self.found = self.unable = False
        self.num_asked = 0
        self.num_forward = self.usual = 0.0
        self._first = math.inf  # mean square of the residuals at the first question
        self._loss = math.inf  # as far as it is known
        self._next = math.inf  # loss at which to ask next
        self._expected = 0.0  # mean square at which noise was to be met, by the last question that found none
        self._in_a_row = 0  # answers that found it
        self._told = False  # an answer told something
        self._harmless = 0  # answers that samples tell no more of one another, and that it does no harm
        self._num_jumps = self._at_last = 0  # now, and at the last question
        self._best = math.inf  # what was left of samples that were left out when they first told no more
        self._rows: tuple[tuple[int, ...], Any] | None = None  # how rows of weights lie; after a resume seen anew

    def see(self, loss: float, num_jumps: int) -> None:
        """The training loss now, as well as it is known, and jumps accepted so far."""
        self._loss, self._num_jumps = loss, num_jumps

    @property
    def due(self) -> bool:
        """Whether it is time to ask."""
        if self.found or self.unable or self._next == -math.inf:
            return False
        return self._loss <= self._next or self._num_jumps - self._at_last >= MOST_JUMPS

    def rows_of(self, weights: Sequence[Tensor], build: Callable[[], T]) -> T:
        """What was found out about the rows of these weights, or what ``build`` makes of them."""
        which = tuple(map(id, weights))
        if self._rows is None or self._rows[0] != which:
            self._rows = (which, build())
        found: T = self._rows[1]
        return found

    def spend(self, usual: float) -> None:
        """A question was worth so many forwards, what only the first one takes left out."""
        self.usual = usual
        self.num_forward += usual

    def take(self, square: float, untold: float, fitted: float) -> bool:
        """Take an answer, of :func:`~..numerics.leave_one_out.left_out_error`.

        Args:
            square: Mean square of the residuals, of which the loss may be any increasing function.
            untold: The least ratio, at least as far as it is known that it is below :data:`NOISE`.
            fitted: The one of the least damping, where it is not.

        Returns:
            Whether jumps have gone through the noise since the question before.
        """
        self.num_asked += 1
        jumped = self._num_jumps > self._at_last
        self._at_last = self._num_jumps
        self._first = square if self._first == math.inf else self._first
        plain = self._best == math.inf  # samples told something at the question before
        if jumped and plain and square < THROUGH * self._expected and self._expected >= DOUBT * self._first:
            self.found = True
            return True
        if untold < NOISE:
            self._in_a_row, self._harmless, self._best = 0, 0, math.inf
            self._expected = untold * square
            fall = min(max(MARGIN * untold, LEAST_FALL), MOST_FALL)
            self._told = True
        else:
            self._best = untold * square if self._best == math.inf else self._best
            end = fitted * square
            learnt = self._told or square <= LEARNT * self._first
            harms = learnt and end >= max(HARM * self._best, MATTERS * self._first)
            self._in_a_row = self._in_a_row + 1 if harms and self._told else 0
            self.found = self._in_a_row >= IN_A_ROW or (harms and end >= DECISIVE * self._best)
            if learnt:
                fall = NEAR if harms else max(NEAR - FURTHER * self._harmless, FAR)
                self._harmless += not harms
            else:
                fall = MOST_FALL
        self._next = self._loss - (1 - fall) * abs(self._loss)
        if fall * square < ENOUGH * self._first:
            self._next = -math.inf
        return False

    def give_up(self) -> None:
        """Residuals cannot be had."""
        self.unable = True

    _NAMES = (
        "found", "unable", "num_asked", "_first", "_loss", "_next", "_expected", "_in_a_row", "_harmless", "_num_jumps",
        "_at_last", "_best", "_told", "num_forward", "usual",
    )  # fmt: skip

    def state_dict(self) -> StateDict:
        """Plain numbers."""
        return {name.lstrip("_"): getattr(self, name) for name in self._NAMES}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in self._NAMES:
            setattr(self, name, state[name.lstrip("_")])
