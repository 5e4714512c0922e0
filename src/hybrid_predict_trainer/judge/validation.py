"""A validation loss, asked rarely, where the training loss cannot judge: when the same data come round again."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from ..distributed.collective import ALONE, Collective
from ..keep.rng import rng_state, set_rng_state
from ..notices import warn
from ..records import StateDict
from ..weights.offload import users_defaults

ValFn = Callable[[nn.Module], float]

#: Real steps between two questions at least, and as a share of the run so far.
LEAST_STEPS, SHARE = 50, 1 / 8
#: Answers in a row above the best one after which a multiplier has done harm.
PATIENCE = 2


class Validation:
    """Asks for the validation loss, and remembers the best answer."""

    def __init__(self, fn: ValFn, cost: float = 1.0) -> None:
        """Bind.

        Args:
            fn: model -> validation loss; what it does to modes and random states is undone.
            cost: Of one answer, in forwards of a training batch.
        """
        self.fn, self.cost = fn, cost
        self.failed = False  # it raised: there is none any more
        self.best = math.inf
        self.before_raise = math.inf
        self.num_asked = 0
        self._num_above = 0
        self._next_step = 0

    def ask(self, model: nn.Module, step: int, ranks: Collective = ALONE) -> float:
        """Return the validation loss at the present weights, the mean over ranks; infinite if it cannot be had."""
        self.num_asked += 1
        self._next_step = step + max(LEAST_STEPS, int(SHARE * step))
        modes = {m: m.training for m in model.modules()}
        random_states = rng_state()
        try:
            with users_defaults():
                value = ranks.means(lambda: [float(self.fn(model))])[0]
        except Exception as error:
            self.failed = True
            warn(
                f"val_fn failed ({type(error).__name__}: {error}) and is not asked again; training goes on",
            )
            return math.inf
        finally:
            set_rng_state(random_states)
            for module, training in modes.items():
                module.training = training
        value = value if math.isfinite(value) else math.inf
        self._num_above = self._num_above + 1 if value > self.best else 0
        self.best = min(self.best, value)
        return value

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
        return {name.lstrip("_"): getattr(self, name) for name in self._NAMES}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in self._NAMES:
            setattr(self, name, state[name.lstrip("_")])
