"""What a run needs of a multiplier of its optimizer's steps, and the null object (the other: :mod:`.lr_multiplier`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from ..records import StateDict
from .multiplier import Advice, Reading


class Multiplier(Protocol):
    """What a run needs of a multiplier of its optimizer's steps."""

    @property
    def value(self) -> float:
        """The multiplier m, at least 1."""
        ...

    @property
    def learned(self) -> float:
        """The learned multiplier, whether or not the next step has it."""
        ...

    @property
    def may_grow(self) -> bool:
        """Whether there is, or may ever be, a multiplier above 1."""
        ...

    @property
    def num_cuts(self) -> int:
        """Times that a group's early steps were cut."""
        ...

    @property
    def num_steps(self) -> int:
        """Real steps that :meth:`after_step` is done with."""
        ...

    @property
    def shortening(self) -> bool:
        """Whether steps of some groups are being cut."""
        ...

    @property
    def taken_back(self) -> int:
        """Times that the multiplier went back."""
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
    def applied(self, optimizer: Optimizer, *, decay_follows: bool = False) -> Iterator[None]:
        """The block in which the optimizer steps."""
        ...

    def after_step(self, parameters: Sequence[Tensor]) -> int:
        """Right after the optimizer's step: shorten it where it has to be; returns passes over the weights.

        Interrupted, it may be called again, and has to be while ``num_steps`` has not risen.
        """
        ...

    def forget(self) -> None:
        """Weights were moved by something else: the last step cannot be measured, nor this block compared."""
        ...

    def rest(self, resting: bool) -> None:
        """Whether the next steps are to be the schedule's own."""
        ...

    def level(self) -> None:
        """m is 1 from here on: not because it did harm, but because nobody could tell."""
        ...

    def begin_anew(self) -> None:
        """Weights of before have come back, and it was not the multiplier: no loss since is a measure of it."""
        ...

    def end_cuts(self) -> None:
        """Every group steps as it is, from here on."""
        ...

    def check(self, reading: Reading) -> Advice:
        """After a real step: every few steps decide on the multiplier."""
        ...

    def withdraw(self, *, for_good: bool = False) -> Advice:
        """Something went wrong at this multiplier: back to the one before the open raise, or to 1."""
        ...

    def memory_bytes(self) -> int:
        """Bytes held between steps."""
        ...

    def state_dict(self) -> StateDict:
        """Everything a resume needs."""
        ...

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        ...


class UnitMultiplier:
    """The null object: steps are the optimizer's own."""

    value = learned = 1.0
    num_cuts = num_steps = taken_back = 0
    growing = shortening = may_grow = False
    held: Sequence[Tensor] = ()

    def measure(self, parameters: Sequence[Tensor]) -> int:
        """Nothing."""
        return 0

    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """Nothing."""
        return 0

    @contextmanager
    def applied(self, optimizer: Optimizer, *, decay_follows: bool = False) -> Iterator[None]:
        """The block as it is."""
        yield

    def after_step(self, parameters: Sequence[Tensor]) -> int:
        """Nothing."""
        return 0

    def forget(self) -> None:
        """Nothing."""

    def rest(self, resting: bool) -> None:
        """Nothing."""

    def level(self) -> None:
        """Nothing."""

    def begin_anew(self) -> None:
        """Nothing."""

    def end_cuts(self) -> None:
        """Nothing."""

    def check(self, reading: Reading) -> Advice:
        """Nothing."""
        return Advice.NOTHING

    def withdraw(self, *, for_good: bool = False) -> Advice:
        """Nothing."""
        return Advice.NOTHING

    def memory_bytes(self) -> int:
        """None."""
        return 0

    def state_dict(self) -> StateDict:
        """Nothing."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Nothing."""
