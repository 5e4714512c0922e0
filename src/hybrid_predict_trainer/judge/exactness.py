"""Whether losses are exact: measured by evaluating the same batch more than once, not guessed from the data.

The same batch at every step is not enough: dropout, random numbers inside the loss or noise that the user adds make two
losses of one batch differ, and a candidate without dropout would be held against a loss with it.  So two evaluations
under the conditions of the real steps, random numbers running on, must agree bit for bit.  Where they do not, a third
with the random numbers of the first tells why: on an accelerator without deterministic kernels it differs by rounding,
and that difference is the noise that a gain has to exceed; otherwise losses are noisy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from ..keep.walk import modules_of
from ..records import StateDict

#: Real steps after which the same is asked again: a user may switch dropout on in mid-run.
RECHECK_STEPS = 500
#: The same where a loss was not finite.
RETRY_STEPS = 20
#: Largest relative difference of two evaluations that passes for rounding on an accelerator.
ROUNDING = 1e-4


@dataclass(frozen=True, slots=True)
class Agreement:
    """What evaluations of one batch had in common."""

    exact: bool
    noise: float = 0.0  # largest difference of evaluations that count as exact
    num_forward: int = 2
    finite: bool = True


def measure(evaluate: Callable[[], float], rewind: Callable[[], None], *, on_cpu: bool) -> Agreement:
    """Evaluate a batch twice, a third time if the losses differ.

    Args:
        evaluate: Loss at the present weights, as a real step computes it; random numbers run on.
        rewind: Random numbers and carried state as they were at first.
        on_cpu: Kernels are deterministic there.
    """
    first = evaluate()
    second = evaluate()
    if first == second:
        return Agreement(exact=math.isfinite(first), finite=math.isfinite(first))
    rewind()
    again = evaluate()
    noise = max(abs(second - first), abs(again - first))
    rounding = not on_cpu and again != first and noise <= ROUNDING * abs(first)
    return Agreement(exact=rounding, noise=noise if rounding else 0.0, num_forward=3, finite=math.isfinite(first))


def conditions(model: nn.Module) -> int:
    """What two evaluations depend on besides weights and batch: modes and dropout rates, as one number."""
    return hash(tuple([(m.training, _rate(m)) for m in modules_of(model)]))


def _rate(module: nn.Module) -> float | None:
    kind: Any = type(module)
    p = module.__dict__.get("p", _NOTHING)
    if p is _NOTHING:  # asking a module for what it has not takes as long as an addition
        p = _asked(module) if _of_class(kind) else None
    return p if isinstance(p, float | int) else None


_NOTHING = object()


@lru_cache(maxsize=256)
def _of_class(module_type: Any) -> bool:
    return hasattr(module_type, "p")


def _asked(module: nn.Module) -> Any:
    try:
        return module.p
    except Exception:  # a property of the user's own
        return None


class Exactness:
    """What was measured last, and when.

    Attributes:
        agreed: None while nothing was measured.
        noise: Difference of two evaluations that a gain has to exceed.
    """

    def __init__(self) -> None:
        """Nothing measured yet."""
        self.agreed: bool | None = None
        self.noise = 0.0
        self.num_measured = 0
        self._due = 0  # real steps at which to measure again
        self._conditions: int | None = None  # not saved: hashes differ from process to process

    def due(self, num_real_steps: int, model: nn.Module) -> bool:
        """Whether to measure now: never done, long ago, or under other conditions."""
        if self.agreed is None or num_real_steps >= self._due:
            return True
        return self._conditions is not None and self._conditions != conditions(model)

    def note(self, agreement: Agreement, num_real_steps: int, model: nn.Module) -> None:
        """Take a measurement."""
        self.agreed, self.noise = agreement.exact, agreement.noise
        self.num_measured += 1
        self._due = num_real_steps + (RECHECK_STEPS if agreement.finite else RETRY_STEPS)
        self._conditions = conditions(model)

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {"agreed": self.agreed, "noise": self.noise, "num_measured": self.num_measured, "due": self._due}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.agreed, self.noise = state["agreed"], state["noise"]
        self.num_measured, self._due = state["num_measured"], state["due"]
        self._conditions = None
