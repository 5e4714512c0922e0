"""A validation loss, asked rarely, where the training loss cannot judge: when the same data come round again.

It has the last word on raises of the learning rate (:class:`Validation`) and on jumps (:class:`JumpCheck`), each with
answers of its own: what jumps have done to the loss is not held against the multiplier, nor the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum

from torch import Tensor, nn

from ..distributed.collective import ALONE, Collective
from ..keep.buffers import Buffers
from ..keep.rng import rng_state, set_rng_state
from ..notices import warn
from ..records import StateDict
from ..weights.offload import users_defaults

ValFn = Callable[[nn.Module], float]

#: Real steps between two questions at least, and as a share of the run so far.
LEAST_STEPS, SHARE = 50, 1 / 8
#: Answers in a row above the best one after which a multiplier has done harm.
PATIENCE = 2

#: Of the training loss at the last question about jumps, what it has to fall to before the next one: one jump can take
#: it down by decades, and the least validation loss of noisy targets is passed within one of them.
FALL = 0.7
#: Share of the best answer by which another stands above it where jumps have done harm beyond doubt; and from which on
#: it counts, where so many in a row do.  On targets without noise a run of 50 answers rose by 6 % on its way down.
HARM, EXCESS, JUMP_PATIENCE = 0.1, 0.02, 4


class Validation:
    """Asks for the validation loss, and remembers the best answer."""

    def __init__(self, fn: ValFn, cost: float = 1.0) -> None:
        """Bind.

        Args:
            fn: model -> validation loss; what it does to modes, buffers and random states is undone.
            cost: Of one answer, in forwards of a training batch.
        """
        self.fn, self.cost = fn, cost
        self.failed = False  # it raised: there is none any more
        self.best = math.inf
        self.before_raise = math.inf
        self.num_asked = 0
        self._num_above = 0
        self._next_step = 0
        self.jumps = JumpCheck()

    @property
    def guards_jumps(self) -> bool:
        """Whether jumps are held against it."""
        return not self.failed and not self.jumps.over

    @property
    def answers(self) -> bool:
        """Whether it says something of jumps, or has said what there was to say."""
        return not self.failed and not self.jumps.mute

    def ask(self, model: nn.Module, step: int, ranks: Collective = ALONE) -> float:
        """Return the validation loss at the present weights, the mean over ranks; infinite if it cannot be had."""
        self._next_step = step + max(LEAST_STEPS, int(SHARE * step))
        value = self.value(model, ranks)
        if self.failed:
            return math.inf
        value = value if math.isfinite(value) else math.inf
        self._num_above = self._num_above + 1 if value > self.best else 0
        self.best = min(self.best, value)
        return value

    def value(self, model: nn.Module, ranks: Collective = ALONE) -> float:
        """Return what ``fn`` says, whatever that is, the mean over ranks; NaN if it raised.  No answer about raises."""
        self.num_asked += 1
        modes = {m: m.training for m in model.modules()}
        random_states = rng_state()
        buffers: Buffers | None = None
        try:
            buffers = Buffers.of(model)
            with users_defaults():
                return ranks.means(lambda: [_number(self.fn(model))])[0]
        except Exception as error:
            self.failed = True
            warn(
                f"val_fn failed ({type(error).__name__}: {error}) and is not asked again; training goes on",
            )
            return math.nan
        finally:
            set_rng_state(random_states)
            if buffers is not None:
                buffers.put_back(model)
            for module, training in modes.items():
                module.training = training

    def begin_raise(self, answer: float) -> None:
        """The multiplier is raised at this loss."""
        self.before_raise = answer

    def due(self, step: int) -> bool:
        """Whether it is time for another question."""
        return step >= self._next_step

    @property
    def rising(self) -> bool:
        """Whether the last answers all stood above the best."""
        return self._num_above >= PATIENCE

    _NAMES = ("failed", "best", "before_raise", "num_asked", "_num_above", "_next_step")

    def state_dict(self) -> StateDict:
        """Plain numbers."""
        state: StateDict = {name.lstrip("_"): getattr(self, name) for name in self._NAMES}
        return {**state, "jumps": self.jumps.state_dict()}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in self._NAMES:
            setattr(self, name, state[name.lstrip("_")])
        if state["jumps"] is None:  # of an older build
            self.jumps = JumpCheck()
        else:
            self.jumps.load_state_dict(state["jumps"])


def _number(value: float | Tensor) -> float:
    """The answer without its graph."""
    return float(value.detach() if isinstance(value, Tensor) else value)


class Finding(StrEnum):
    """What an answer about jumps says."""

    BEST = "best"  # keep the state as it is now
    NOTHING = "nothing"
    HARM = "harm"  # the best answer's state comes back, and there are no more jumps
    MUTE = "mute"  # it is no number: nobody is asked about jumps any more


class JumpCheck:
    """Holds the answers since the best one against the jumps since then.

    Bookkeeping only: when to ask, and what an answer says.  The state of the best answer is kept, and put back, by the
    owner of the weights (:mod:`..cycle.jump_check`).  Questions of a run are at most as many as its training loss falls
    by :data:`FALL`, and one per ``LEAST_STEPS`` real steps.

    Attributes:
        best: The lowest answer since the last time that no jump was to blame, in the units of the loss; infinite: none.
        best_step: Real steps at that answer.
        ended_jumps: Jumps did harm, and have ended.
        mute: Answers are no numbers, or states cannot be kept.
    """

    def __init__(self) -> None:
        """Nobody was asked."""
        self.best, self.best_step = math.inf, 0
        self.ended_jumps = self.mute = False
        self._at_best = self._at_last = 0  # jumps accepted until then
        self._loss = math.inf  # training loss at the last question
        self._num_above = 0
        self._next_step = 0

    @property
    def over(self) -> bool:
        """Whether nobody will be asked any more."""
        return self.ended_jumps or self.mute

    def due_before_jump(self, num_jumps: int, step: int) -> bool:
        """Whether a proposal has to wait for an answer to compare with: one that no jump is to blame for.

        Args:
            num_jumps: Accepted so far.
            step: Real steps so far.
        """
        return self.best == math.inf or (num_jumps == self._at_best and step >= self._next_step)

    def due(self, loss: float, num_jumps: int, step: int) -> bool:
        """Whether it is time to ask what jumps have done.

        Args:
            loss: Training loss, as well as it is known.
            num_jumps: Accepted so far.
            step: Real steps so far.
        """
        if self.best == math.inf or num_jumps == self._at_last:
            return False
        return step >= self._next_step or self._loss - loss >= (1 - FALL) * abs(self._loss)

    def take(self, answer: float, loss: float, num_jumps: int, step: int) -> Finding:
        """Take an answer.

        Args:
            answer: Of :meth:`Validation.value`.
            loss: Training loss, as well as it is known.
            num_jumps: Accepted so far.
            step: Real steps so far.
        """
        self._loss, self._at_last = loss, num_jumps
        self._next_step = step + max(LEAST_STEPS, int(SHARE * step))
        innocent = self.best == math.inf or num_jumps == self._at_best
        if math.isnan(answer) or answer == -math.inf or (innocent and answer == math.inf):
            self.give_up()
            return Finding.MUTE
        if innocent or answer <= self.best:
            self.best, self.best_step, self._at_best, self._num_above = answer, step, num_jumps, 0
            return Finding.BEST
        excess = answer - self.best
        self._num_above = self._num_above + 1 if excess > EXCESS * abs(self.best) else 0
        if excess > HARM * abs(self.best) or self._num_above >= JUMP_PATIENCE:
            self.ended_jumps = True
            return Finding.HARM
        return Finding.NOTHING

    def give_up(self) -> None:
        """There is nothing to hold jumps against, or no way back from them."""
        self.mute = True

    def forget(self) -> None:
        """The state of the best answer is gone: begin anew before the next jump."""
        self.best, self._num_above = math.inf, 0

    _NAMES = (
        "best", "best_step", "ended_jumps", "mute", "_at_best", "_at_last", "_loss", "_num_above", "_next_step",
    )  # fmt: skip

    def state_dict(self) -> StateDict:
        """Plain numbers; the state of the best answer is saved by its owner."""
        return {name.lstrip("_"): getattr(self, name) for name in self._NAMES}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in self._NAMES:
            setattr(self, name, state[name.lstrip("_")])
