"""What a run learns about its own predictions: corrections, confidence, and which horizon pays.

A forecast for one window is made at every window's close and held against what happened: that is
the residual the corrector learns from, and the cosine in the metrics.  The outcome of every jump
teaches the confidence: a refused or taken-back one at once, a kept one when its account in the ledger
is settled, because only then is it known whether it paid.  The same accounts reward the bandit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import update_wrapper
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..config.settings import HybridTrainerConfig
from ..cost import STEP_UNITS
from ..keep.failures import Failures, Place
from ..observe.loss_features import NUM_LOSS_FEATURES
from ..records import Account, BasisSpec, Hindsight, PhasePrediction, StateDict, Window
from .confidence import Confidence, Evidence, TrackRecord
from .corrector import Corrector, NoCorrection, ResidualCorrector
from .horizon import Bandit, Choice, LinUCB, context_features, horizons, reward
from .residuals import extract


def corrector_for(config: HybridTrainerConfig, spec: BasisSpec, num_groups: int) -> Corrector:
    """Residual correction for forecasts; none for a predictor that aims elsewhere than plain training."""
    if spec.curvature or config.corrector.max_magnitude == 0:
        return NoCorrection()
    c = config.corrector
    return ResidualCorrector(
        spec, num_groups, NUM_LOSS_FEATURES, capacity=c.capacity, max_magnitude=c.max_magnitude,
        threshold=c.similarity, limit=c.num_similar,
    )  # fmt: skip


P = ParamSpec("P")
T = TypeVar("T")


def harmless(method: Callable[Concatenate[Feedback, P], T]) -> Callable[Concatenate[Feedback, P], T | None]:
    """A method that learns from an outcome: what it raises is counted, and nothing is learnt."""

    def guarded(self: Feedback, /, *args: P.args, **kwargs: P.kwargs) -> T | None:
        if self.failures.exhausted(Place.FEEDBACK):
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.failures.note(Place.FEEDBACK, error)
            return None

    update_wrapper(guarded, method)
    return guarded


class Feedback:
    """Corrector, confidence and bandit of one run."""

    def __init__(
        self, config: HybridTrainerConfig, spec: BasisSpec, num_groups: int, failures: Failures | None = None
    ) -> None:
        """Nothing is known yet; what fails is counted in ``failures``."""
        self.failures = Failures() if failures is None else failures
        self.corrector = corrector_for(config, spec, num_groups)
        self.record = TrackRecord()
        self.confidence = Confidence()
        most = config.max_predict_steps
        self.horizons = horizons(config.predictor.window, config.min_predict_steps, most)
        self.bandit: Bandit = LinUCB(len(self.horizons), discount=0.98, seed=config.seed)
        self.uses_bandit = config.horizon_rule == "bandit"
        self._forecasts = not isinstance(self.corrector, NoCorrection)
        self.forecast: PhasePrediction | None = None  # for the window that is open
        self.features = torch.zeros(NUM_LOSS_FEATURES)  # state it was made in
        self.evidence: Evidence | None = None  # of the proposal under way
        self._choice: Choice | None = None  # horizon chosen for the next proposal
        self._open: dict[int, Choice] = {}  # by the real step of the account
        self._approved: dict[int, Evidence] = {}  # of jumps whose worth is not known yet, likewise

    # ---- windows: residuals and forecasts -------------------------------------------------------

    @property
    def forecasts(self) -> bool:
        """Whether a forecast is wanted at every window's close."""
        return self._forecasts

    @harmless
    def learn(self, window: Window) -> float | None:
        """Hold the last forecast against the window that has just closed; returns its cosine."""
        forecast, self.forecast = self.forecast, None
        if forecast is None or window.hindsight is None or window.jumped or not math.isfinite(window.loss):
            return None
        self.corrector.observe(extract(window.hindsight, forecast, self.features, window.loss))
        return displacement_cosine(forecast.coefficients, window.hindsight)

    @harmless
    def on_forecast(self, window: Window, forecast: PhasePrediction) -> None:
        """Remember what is forecast for the next window."""
        self.forecast, self.features = forecast, window.features

    # ---- outcomes: confidence --------------------------------------------------------------------

    def state_confidence(self, evidence: Evidence) -> float:
        """Probability that the jump this evidence speaks of is kept and pays."""
        self.evidence = evidence
        return self.confidence.predict(evidence)

    def drop_preview(self) -> None:
        """The proposal that was considered is not made."""
        self.evidence = self._choice = None

    @harmless
    def on_outcome(self, kept: bool) -> None:
        """A jump was refused, kept or taken back; whether a kept one pays comes with its account."""
        self.record.record(kept)
        if self.evidence is not None:
            self.confidence.observe(self.evidence, kept)
            self.evidence = None

    def _note_worth(self, account: Account, pays: bool) -> None:
        """Teach the confidence what became of an approved jump; one skipped as a control says nothing."""
        evidence = self._approved.pop(account.step, None)
        if evidence is not None and not account.skipped:
            self.confidence.observe(evidence, pays)

    # ---- accounts: the horizon --------------------------------------------------------------------

    def choose_horizon(self, window: Window, *, confidence: float, persistence: float, spread: float) -> int:
        """Horizon for a proposal now, 0 for none."""
        context = context_features(window, confidence=confidence, persistence=persistence, spread=spread)
        self._choice = self.bandit.choose(context)
        horizon = self.horizons[self._choice.arm]
        if horizon == 0:
            self.bandit.observe(self._choice, 0.0)
            self._choice = None
        return horizon

    @harmless
    def on_refusal(self, price_units: float, window_steps: int) -> None:
        """The proposal at the chosen horizon was refused: its price is its reward."""
        if self._choice is not None:
            self.bandit.observe(self._choice, reward(0.0, price_units / STEP_UNITS, window_steps))
            self._choice = None

    @harmless
    def on_approval(self, step: int) -> None:
        """The proposal was approved: its reward and its worth come with its account."""
        if self._choice is not None:
            self._open[step] = self._choice
            self._choice = None
        if self.evidence is not None:
            self._approved[step] = self.evidence
            self.evidence = None

    @harmless
    def on_settled(self, account: Account, window_steps: int, *, exact: bool = False) -> None:
        """Reward the horizon of a settled account; controls say nothing of a jump's reward.

        Where losses are exact a kept jump counts as one that pays: its gain was measured without noise, and
        what a window later is left of it drowns in what the next jumps did.
        """
        self._note_worth(account, exact or pays(account))
        choice = self._open.pop(account.step, None)
        if choice is not None and not account.skipped:
            self.bandit.observe(choice, reward(account.credited, account.price / STEP_UNITS, window_steps))

    @harmless
    def on_taken_back(self, account: Account, lost_steps: int, window_steps: int) -> None:
        """The jump was rolled back: its price and the lost steps are its reward."""
        self._note_worth(account, False)
        choice = self._open.pop(account.step, None)
        if choice is not None:
            self.bandit.observe(choice, reward(0.0, account.price / STEP_UNITS + lost_steps, window_steps))

    # ---- report and state ---------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        """Bytes of the residual store and its model."""
        return self.corrector.memory_bytes()

    def state_dict(self) -> StateDict:
        """Plain containers and tensors."""
        return {
            "corrector": self.corrector.state_dict(), "record": self.record.state_dict(),
            "confidence": self.confidence.state_dict(), "bandit": self.bandit.state_dict(),
            "forecast": forecast_state(self.forecast), "features": self.features,
            "evidence": None if self.evidence is None else asdict(self.evidence),
            "choice": None if self._choice is None else self._choice.state_dict(),
            "open": {step: choice.state_dict() for step, choice in self._open.items()},
            "approved": {step: asdict(evidence) for step, evidence in self._approved.items()},
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.corrector.load_state_dict(state["corrector"])
        self.record.load_state_dict(state["record"])
        self.confidence.load_state_dict(state["confidence"])
        self.bandit.load_state_dict(state["bandit"])
        self.forecast = None if state["forecast"] is None else PhasePrediction(**state["forecast"])
        self.features = state["features"].clone()
        self.evidence = None if state["evidence"] is None else Evidence(**state["evidence"])
        self._choice = None if state["choice"] is None else Choice.from_state_dict(state["choice"])
        self._open = {int(step): Choice.from_state_dict(choice) for step, choice in state["open"].items()}
        self._approved = {int(step): Evidence(**evidence) for step, evidence in state["approved"].items()}


def pays(account: Account) -> bool:
    """Whether a kept jump was worth its price: credited steps against the steps its proposal cost.

    An account that was settled with a loss that is not finite says nothing of worth: then kept is enough.
    """
    return not account.known or account.credited * STEP_UNITS >= account.price


def displacement_cosine(coefficients: Tensor, hindsight: Hindsight) -> float | None:
    """Cosine of sum_k c_k b_k with the displacement T that happened, from inner products."""
    c = coefficients.double()
    size = float(torch.einsum("gk,gkl,gl->", c, hindsight.BB, c))
    total = float(hindsight.TT.sum())
    if not (size > 0 and total > 0):
        return None
    return float(torch.einsum("gk,gk->", c, hindsight.BT)) / math.sqrt(size * total)


def forecast_state(prediction: PhasePrediction | None) -> dict[str, Any] | None:
    """The parts of a prediction that a resume needs, as plain values."""
    if prediction is None:
        return None
    plain = replace(prediction, loss_trajectory=(), alternatives=())
    return {
        "coefficients": plain.coefficients, "horizon": plain.horizon, "predicted_loss": plain.predicted_loss,
        "predicted_reduction": plain.predicted_reduction, "confidence": plain.confidence, "max_scale": plain.max_scale,
    }  # fmt: skip
