"""The honest ledger: what prediction cost, what it provably returned, whether it may go on.

A jump's gate gain is measured at the moment of the jump; most of it may be progress the next real
steps would have made anyway.  So every approved jump opens an *account*, a random share of approved
jumps is skipped (the holdout), and N real steps later each account is settled: the averaged
loss then, against what windows without a jump did lately.  All in shares of the loss:

    left_i      = usual_i - loss_later_i / loss_before_i             what is still there
    persistence = sum(left of jumps - mean left of the holdout) / sum(gate gain of jumps)
    credit_i    = gain_i * persistence / pace_i                      in steps, within [0, Y]

``usual`` is the median ratio of successive windows without a jump; a promise from the slope of the
loss would be too high on every curve that flattens.  Subtracting the holdout's mean takes out what is
left of that.  The gain that is credited is the proven one: the confidence bound where losses are noisy.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np

from ..config.settings import GateConfig
from ..cost import STEP_UNITS
from ..numerics.quantiles import t_quantile
from ..numerics.tail import Array, Tail, running_sum
from ..records import Account, StateDict

#: Persistence before anything is known, as mean and standard deviation of a normal prior.  With noisy
#: losses most of a gate gain is progress that the next steps would have made anyway; with exact ones most stays.
PRIOR_EXACT = (0.5, 0.3)
PRIOR_NOISY = (0.1, 0.1)

#: Windows without a jump that say what is usual.
NUM_FREE_WINDOWS = 16
#: Settled accounts that are kept.
SETTLED = 512
#: Settled jumps that persistence is judged by.
NUM_RECENT = 32


class Ledger:
    """What jumps cost and returned: accounts, persistence, budget, and the waiting after refusals.

    Costs are in units of a forward (:mod:`..cost`), gains in shares of the loss, credits in real steps.

    Attributes:
        spent_units, watched_units: What prediction has cost, and the part of it that observing has.
        returned_units: What its credits are worth.
        num_credited_steps: Real steps that accepted jumps have proved to be worth.
        wait_windows: Windows before the next proposal.
        switched_off: Prediction has been found not to pay.
    """

    def __init__(self, config: GateConfig) -> None:
        """Args: config: budget, back-off and off-switch settings."""
        self.config = config
        self.spent_units = 0.0
        self.watched_units = 0.0  # of these, for watching
        self.returned_units = 0.0
        self.num_credited_steps = 0.0
        self.open: list[Account] = []
        self._free_ratios: deque[float] = deque(maxlen=NUM_FREE_WINDOWS)
        self.settled: deque[Account] = deque(maxlen=SETTLED)
        self._jumps: deque[Account] = deque()  # of these, those with finite numbers: asked for many times a step
        self._controls: deque[Account] = deque()  # likewise
        #: What is left of them, by whether they were skipped: the newest numbers are those of the deques.
        self._left = {skipped: Tail(1, SETTLED) for skipped in (False, True)}
        self.wait_windows = 0  # before the next proposal
        self._backoff = 0
        self._losing_checks = 0
        self._usual_price = 0.0
        self.switched_off = False
        self.exact = False  # whether the gate's losses are free of noise
        self._persistence: float | None = None  # None: something that it depends on has changed since it was asked for

    # ---- settings and circumstances ------------------------------------------------------------

    def follow(self, config: GateConfig) -> None:
        """Other settings from here on."""
        self.config = config

    def losses_are(self, *, exact: bool) -> None:
        """Whether the gate's losses are free of noise from here on."""
        if self.exact is not exact:
            self.exact, self._persistence = exact, None

    def switch_off(self) -> None:
        """No more proposals in this run."""
        self.switched_off = True

    # ---- budget --------------------------------------------------------------------------------

    def affordable(
        self, price_units: float, total_units: float, reserve: float = 0.0, planned_units: float = 0.0
    ) -> bool:
        """Whether a proposal of that price (or of the dearest lately) fits the budget.

        All that prediction has cost may exceed what it has returned by at most ``overhead_budget``
        of the run: as planned, where its length is known, else so far.
        """
        share = self.config.overhead_budget_exact if self.exact else self.config.overhead_budget
        allowance = share * max(total_units, planned_units) + self.returned_units
        return self.spent_units + reserve + max(price_units, self._usual_price) <= allowance

    def observe(self, units: float) -> None:
        """Book the cost of watching a window: it counts against the budget, not into a proposal's price."""
        self.spent_units += units
        self.watched_units += units

    def spend(self, units: float) -> None:
        """Book the cost of a proposal, its forwards and snapshots, or of lost probation steps."""
        self.spent_units += units
        self._usual_price = 0.8 * self._usual_price + 0.2 * units

    def on_verdict(self, accepted: bool) -> None:
        """After a refusal the next proposal waits, twice as long each time."""
        if accepted:
            self._backoff = 0
        else:
            self._backoff = min(max(1, 2 * self._backoff), self.config.max_backoff)
        self.wait_windows = self._backoff

    def on_window(self, ratio: float, *, jumped: bool) -> None:
        """A window closed; ``ratio`` is its averaged loss over that of the window before."""
        self.wait_windows = max(0, self.wait_windows - 1)
        if not jumped and math.isfinite(ratio):
            self._free_ratios.append(ratio)
            self._persistence = None

    @property
    def usual_ratio(self) -> float:
        """Median ratio of the averaged losses of successive windows without a jump; 1 if unknown."""
        ratios = sorted(self._free_ratios)
        return ratios[len(ratios) // 2] if ratios else 1.0

    # ---- accounts -------------------------------------------------------------------------------

    def open_account(self, account: Account) -> None:
        """Remember an approved jump until it is due."""
        self.open.append(account)

    def cancel_account(self) -> list[Account]:
        """The latest jump was taken back: its account is void (several, if it was checked in segments)."""
        applied = [a.step for a in self.open if not a.skipped]
        void = [a for a in self.open if not a.skipped and a.step >= applied[-1]] if applied else []
        self.open = [a for a in self.open if a not in void]
        return void

    def settle(self, step: int, loss: float) -> list[Account]:
        """Settle the accounts that are due at ``step`` with the averaged training loss there.

        Returns:
            The settled accounts.  Credits and the off-switch follow from them.
        """
        due = [a for a in self.open if step >= a.due]
        self.open = [a for a in self.open if step < a.due]
        done = []
        for account in due:
            left = account.usual - loss / account.loss if account.loss else math.nan
            account = replace(account, left=left)
            self._remember(account)
            if not account.skipped:
                account = replace(account, credited=self._credit(account))
                self.settled[-1] = account
                if account.known:
                    self._jumps[-1] = account
            done.append(account)
        if done:
            self._check_switch()
        return done

    def _credit(self, account: Account) -> float:
        worth = max(account.gain, 0.0) * self.persistence
        if not worth > 0:
            return 0.0
        steps = min(worth / account.pace, float(account.horizon)) if account.pace > 0 else float(account.horizon)
        self.num_credited_steps += steps
        self.returned_units += steps * STEP_UNITS
        return steps

    def _remember(self, account: Account) -> None:
        self._persistence = None
        if len(self.settled) == self.settled.maxlen:
            oldest = self.settled[0]
            if oldest.known:
                self._pool(oldest).popleft()
        self.settled.append(account)
        if account.known:
            self._pool(account).append(account)
            self._left[account.skipped].push((account.left,))

    def _pool(self, account: Account) -> deque[Account]:
        return self._controls if account.skipped else self._jumps

    @property
    def usual_spread(self) -> float:
        """Standard deviation of those ratios from their interquartile range; infinite if unknown."""
        ratios = sorted(self._free_ratios)
        n = len(ratios)
        return max((ratios[3 * n // 4] - ratios[n // 4]) / 1.349, 1e-6) if n >= 4 else math.inf

    @property
    def persistence(self) -> float:
        """Share of a gate gain that is still there N real steps later, in [0, 1]; see :meth:`_estimate`."""
        if self._persistence is None:  # asked for several times between two accounts
            self._persistence = self._estimate()
        return self._persistence

    def _estimate(self) -> float:
        """Share of a gate gain that is still there N real steps later, in [0, 1].

        Posterior mean of p in left_i = p * gain_i + noise, with a normal prior and the spread of
        windows without a jump as the noise.  A few jumps of 0.5 % under a noise of 2 % say next to
        nothing, and a plain ratio of sums would be 0 or 1 by luck.
        """
        settled = self._jumps  # recent ones: a run's early gains are not its late ones
        jumps = list(islice(settled, max(len(settled) - NUM_RECENT, 0), None))
        controls = [a.left for a in self._controls]
        drift = sum(controls) / len(controls) if len(controls) >= 3 else 0.0
        mean, std = PRIOR_EXACT if self.exact else PRIOR_NOISY
        weight = 1 / self.usual_spread**2
        precision = 1 / std**2 + weight * sum([a.gain * a.gain for a in jumps])
        value = (mean / std**2 + weight * sum([a.gain * (a.left - drift) for a in jumps])) / precision
        return min(max(value, 0.0), 1.0)

    @property
    def known(self) -> bool:
        """Whether any jump has been settled."""
        return bool(self._jumps)

    def effect(self) -> tuple[float, float, float] | None:
        """Mean share of the loss that a jump has taken off N steps later, with a 95 % interval.

        Jumps against the control group; None with fewer than three settled accounts in either.
        """
        if len(self._jumps) < 3 or len(self._controls) < 3:
            return None
        jumps, controls = self._left[False].newest(len(self._jumps))[0], self._left[True].newest(len(self._controls))[0]
        (m1, v1), (m0, v0) = _moments(jumps), _moments(controls)
        error = math.sqrt(v1 / len(jumps) + v0 / len(controls))
        half = t_quantile(0.025, min(len(jumps), len(controls)) - 1) * error
        return m1 - m0, m1 - m0 - half, m1 - m0 + half

    def steps_gained(self) -> dict[str, Any]:
        """Steps gained by all settled jumps, from the controlled comparison, with its interval."""
        jumps = [a for a in self._jumps if a.pace > 0]
        effect = self.effect()
        if effect is None or not jumps:
            return {
                "steps_gained": None,
                "steps_gained_ci95": None,
                "reason": "fewer than 3 jumps or 3 controls settled",
            }
        steps_per_share = sum(1 / a.pace for a in jumps)
        mean, low, high = effect
        return {
            "steps_gained": mean * steps_per_share,
            "steps_gained_ci95": [low * steps_per_share, high * steps_per_share],
        }

    def _check_switch(self) -> None:
        effect = self.effect()
        if effect is None:
            return
        self._losing_checks = self._losing_checks + 1 if effect[2] < 0 else 0
        self.switched_off = self.switched_off or self._losing_checks >= self.config.switch_off_after

    # ---- state -------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """What a report shows."""
        effect = self.effect()
        return {
            **self.steps_gained(),
            "effect_per_jump": None if effect is None else effect[0],
            "effect_per_jump_ci95": None if effect is None else list(effect[1:]),
            "persistence": self.persistence if self.known else None,
            "num_controls": sum(a.skipped for a in self.settled),
            "num_treated": sum(not a.skipped for a in self.settled),
            "returned_units": self.returned_units,
            "spent_units": self.spent_units,
            "state": "off" if self.switched_off else "on",
        }

    def state_dict(self) -> StateDict:
        """Plain containers."""
        return {
            "spent_units": self.spent_units, "returned_units": self.returned_units, "watched_units": self.watched_units,
            "num_credited_steps": self.num_credited_steps, "wait_windows": self.wait_windows,
            "backoff": self._backoff, "usual_price": self._usual_price,
            "exact": self.exact,
             "losing_checks": self._losing_checks, "switched_off": self.switched_off,
            "free_ratios": list(self._free_ratios), "open": [asdict(a) for a in self.open],
            "settled": [asdict(a) for a in self.settled],
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.spent_units, self.returned_units = state["spent_units"], state["returned_units"]
        self.watched_units = state["watched_units"]
        self.num_credited_steps, self.wait_windows = state["num_credited_steps"], state["wait_windows"]
        self._backoff, self._losing_checks = state["backoff"], state["losing_checks"]
        self._usual_price = state["usual_price"]
        self.exact, self._persistence = state["exact"], None
        self.switched_off = state["switched_off"]
        self._free_ratios = deque(state["free_ratios"], maxlen=NUM_FREE_WINDOWS)
        self.open = [Account(**a) for a in state["open"]]
        self.settled.clear()
        self._jumps.clear()
        self._controls.clear()
        for left in self._left.values():
            left.refill(())
        for values in state["settled"]:
            self._remember(Account(**values))


@np.errstate(over="ignore", invalid="ignore")  # infinite where a loss was next to nothing
def _moments(values: Array) -> tuple[float, float]:
    mean = running_sum(values) / len(values)
    away = values - mean
    return mean, running_sum(away * away) / max(len(values) - 1, 1)
