"""The honest ledger: what prediction cost, what it provably returned, whether it may go on.

A jump's gate gain is measured at the moment of the jump; most of it may be progress the next real
steps would have made anyway.  So every approved jump opens an *account*, a random share of approved
jumps is skipped (the control group), and N real steps later each account is settled: the change of
the averaged loss, against what the loss slope before the jump had promised.

    left_i      = (loss_before_i + slope_i * steps_i) - loss_later_i        what is still there
    persistence = sum(left of jumps - mean left of controls) / sum(gate gain of jumps)

Subtracting the controls' mean takes out what the slope promised wrongly.  Loss differences are in
units of the loss before the jump, so that the early, large ones do not drown the rest.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, replace
from typing import Any

from .config import GateConfig
from .gate import t_quantile
from .records import State

#: Cost of one optimizer step in forwards: forward 1, backward 2, update 0.1 (specification).
FORWARD_UNITS = 1.0
BACKWARD_UNITS = 2.0
UPDATE_UNITS = 0.1
STEP_UNITS = FORWARD_UNITS + BACKWARD_UNITS + UPDATE_UNITS
#: One pass over the weights (read or write of every weight): an Adam update makes seven.
PASS_UNITS = UPDATE_UNITS / 7

#: Persistence assumed before the first account is settled, and its weight in jumps.
PRIOR_PERSISTENCE = 0.5
PRIOR_WEIGHT = 4.0


@dataclass(frozen=True, slots=True)
class Account:
    """One approved jump, applied or skipped as a control."""

    step: int  # real steps when it was approved
    due: int  # real steps when it is settled
    skipped: bool
    horizon: int
    loss: float  # averaged training loss before
    slope: float  # of the loss per real step before
    gain: float  # the gate's
    left: float = math.nan  # gain still there when settled


class Ledger:
    """Accounts, costs, the budget and the waiting after refusals."""

    def __init__(self, config: GateConfig) -> None:
        """Args: config: budget, back-off and off-switch settings."""
        self.config = config
        self.spent_units = 0.0
        self.returned_units = 0.0
        self.num_credited_steps = 0.0
        self.open: list[Account] = []
        self.settled: deque[Account] = deque(maxlen=512)
        self.wait_windows = 0  # before the next proposal
        self._backoff = 0
        self._losing_checks = 0
        self.switched_off = False

    # ---- budget --------------------------------------------------------------------------------

    def affordable(self, price_units: float, total_units: float) -> bool:
        """Whether a proposal of that price fits the budget.

        All that prediction has cost may exceed what it has returned by at most ``overhead_budget``
        of the whole run so far.
        """
        allowance = self.config.overhead_budget * total_units + self.returned_units
        return self.spent_units + price_units <= allowance

    def spend(self, units: float) -> None:
        """Book the cost of proposals, forwards, snapshots and lost probation steps."""
        self.spent_units += units

    def note_verdict(self, accepted: bool) -> None:
        """After a refusal the next proposal waits, twice as long each time."""
        if accepted:
            self._backoff = 0
        else:
            self._backoff = min(max(1, 2 * self._backoff), self.config.max_backoff)
        self.wait_windows = self._backoff

    def note_window(self) -> None:
        """A window closed without a proposal."""
        self.wait_windows = max(0, self.wait_windows - 1)

    # ---- accounts -------------------------------------------------------------------------------

    def open_account(self, account: Account) -> None:
        """Remember an approved jump until it is due."""
        self.open.append(account)

    def cancel_account(self) -> None:
        """The latest jump was taken back: its account is void."""
        if self.open and not self.open[-1].skipped:
            self.open.pop()

    def settle(self, step: int, loss: float) -> list[Account]:
        """Settle the accounts that are due at ``step`` with the averaged training loss there.

        Returns:
            The settled accounts.  Credits and the off-switch follow from them.
        """
        due = [a for a in self.open if step >= a.due]
        self.open = [a for a in self.open if step < a.due]
        done = []
        for account in due:
            expected = account.loss + min(account.slope, 0.0) * (step - account.step)
            account = replace(account, left=expected - loss)
            self.settled.append(account)
            done.append(account)
            if not account.skipped:
                self._credit(account)
        if done:
            self._check_switch()
        return done

    def _credit(self, account: Account) -> None:
        pace = -account.slope
        if pace <= 0 or not math.isfinite(account.left):
            return
        steps = min(max(account.gain, 0.0) * self.persistence / pace, float(account.horizon))
        self.num_credited_steps += steps
        self.returned_units += steps * STEP_UNITS

    @property
    def persistence(self) -> float:
        """Share of a gate gain that is still there N real steps later, in [0, 1]."""
        jumps = [a for a in self.settled if not a.skipped and math.isfinite(a.left) and a.loss > 0]
        controls = [a.left / a.loss for a in self.settled if a.skipped and math.isfinite(a.left) and a.loss > 0]
        drift = sum(controls) / len(controls) if len(controls) >= 3 else 0.0
        # recent jumps count more: a run's early gains are not its late ones
        recent = jumps[-32:]
        gains = sum(a.gain / a.loss for a in recent)
        left = sum(a.left / a.loss - drift for a in recent)
        prior = PRIOR_WEIGHT * (gains / len(recent)) if recent else 1.0
        value = (left + PRIOR_PERSISTENCE * prior) / (gains + prior) if gains + prior > 0 else 0.0
        return min(max(value, 0.0), 1.0)

    @property
    def known(self) -> bool:
        """Whether any jump has been settled."""
        return any(not a.skipped for a in self.settled)

    def effect(self) -> tuple[float, float, float] | None:
        """Mean effect of a jump on the loss N steps later, relative, with a 95 % interval.

        Jumps against the control group; None with fewer than three settled accounts in either.
        """
        jumps = [a.left / a.loss for a in self.settled if not a.skipped and math.isfinite(a.left) and a.loss > 0]
        controls = [a.left / a.loss for a in self.settled if a.skipped and math.isfinite(a.left) and a.loss > 0]
        if len(jumps) < 3 or len(controls) < 3:
            return None
        (m1, v1), (m0, v0) = _moments(jumps), _moments(controls)
        error = math.sqrt(v1 / len(jumps) + v0 / len(controls))
        freedom = min(len(jumps), len(controls)) - 1
        half = t_quantile(0.025, freedom) * error
        return m1 - m0, m1 - m0 - half, m1 - m0 + half

    def steps_gained(self) -> dict[str, Any]:
        """Steps gained by all settled jumps, from the controlled comparison, with its interval."""
        jumps = [a for a in self.settled if not a.skipped and a.slope < 0 and a.loss > 0]
        effect = self.effect()
        if effect is None or not jumps:
            return {"steps_gained": None, "steps_gained_ci95": None, "reason": "fewer than 3 jumps or 3 controls settled"}
        steps_per_unit = sum(a.loss / -a.slope for a in jumps)
        mean, low, high = effect
        return {"steps_gained": mean * steps_per_unit, "steps_gained_ci95": [low * steps_per_unit, high * steps_per_unit]}

    def _check_switch(self) -> None:
        effect = self.effect()
        if effect is None:
            return
        self._losing_checks = self._losing_checks + 1 if effect[2] < 0 else 0
        self.switched_off = self.switched_off or self._losing_checks >= self.config.switch_off_after

    # ---- state -------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What a report shows."""
        return {
            **self.steps_gained(),
            "persistence": self.persistence if self.known else None,
            "num_controls": sum(a.skipped for a in self.settled),
            "num_treated": sum(not a.skipped for a in self.settled),
            "returned_units": self.returned_units,
            "spent_units": self.spent_units,
            "state": "off" if self.switched_off else "on",
        }

    def state_dict(self) -> State:
        """Plain containers."""
        return {
            "spent_units": self.spent_units, "returned_units": self.returned_units,
            "num_credited_steps": self.num_credited_steps, "wait_windows": self.wait_windows,
            "backoff": self._backoff, "losing_checks": self._losing_checks, "switched_off": self.switched_off,
            "open": [asdict(a) for a in self.open], "settled": [asdict(a) for a in self.settled],
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.spent_units, self.returned_units = state["spent_units"], state["returned_units"]
        self.num_credited_steps, self.wait_windows = state["num_credited_steps"], state["wait_windows"]
        self._backoff, self._losing_checks = state["backoff"], state["losing_checks"]
        self.switched_off = state["switched_off"]
        self.open = [Account(**a) for a in state["open"]]
        self.settled = deque((Account(**a) for a in state["settled"]), maxlen=512)


def _moments(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
