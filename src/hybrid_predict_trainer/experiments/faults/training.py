"""Numbers that are not finite, spikes, and predictors that cannot be relied on."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config.settings import GateConfig, HybridTrainerConfig
from ...cost import STEP_UNITS
from ...keep.failures import Place
from ...propose.time_budget import MAX_CALL_SECONDS
from ...records import BasisSpec, DivergenceError, PhasePrediction
from .material import PREDICTOR_FAULTS, Act, Faulty, Loss, Subject, batches, loss_of, ours, plain, settings
from .table import Case

STEPS = 40
#: Steps within which the loss is back after a spike (F50), and what "back" means: over what it was before.
RECOVERY_STEPS, BACK = 50, 1.1


def against_plain(
    seed: int, data: list[Any], *, predictor: Any = None, loss: Loss = loss_of, act: Act | None = None,
    kind: str = "adam",
) -> str | None:  # fmt: skip
    """A run whose proposals are all refused is bitwise the plain loop, whatever happens to both."""
    reference, subject = Subject.of(seed, kind), Subject.of(seed, kind)
    random_state = torch.get_rng_state()
    plain(reference, data, loss, act)
    wanted = reference.bits()
    torch.set_rng_state(random_state)
    trainer = subject.trainer(settings(), predictor or Faulty("uphill", seed), loss)
    ours(trainer, subject, data, act)
    if trainer.statistics()["num_jumps_accepted"]:
        return "a proposal that leads uphill was accepted"
    if subject.bits() != wanted:
        return "weights, moments, rates or random state are not those of the plain loop"
    trainer.summary()
    return None


# ---- numbers -------------------------------------------------------------------------------------------------


def spoilt_batch(value: float, where: str, seed: int, _: Path) -> str | None:
    """A number in the inputs or targets of a batch."""
    data, dice = batches(seed, STEPS), random.Random(seed)
    for at in dice.sample(range(STEPS), 3):
        x, y = data[at][0].clone(), data[at][1].clone()
        (x if where == "inputs" else y).view(-1)[dice.randrange(x.shape[0])] = value
        data[at] = (x, y)
    return against_plain(seed, data)


def spoilt_loss(value: float, seed: int, _: Path) -> str | None:
    """A loss that is not finite though the batch is: every batch says itself whether it is to be so."""
    data: list[Any] = [(x, y, 1.0) for x, y in batches(seed, STEPS)]
    for at in random.Random(seed).sample(range(STEPS), 3):
        data[at] = (*data[at][:2], value)
    return against_plain(seed, data, loss=lambda model, batch: loss_of(model, batch) * batch[2])


class SpoiltGradient(torch.autograd.Function):
    """Passes a value on, and a gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        """The value."""
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient times the factor."""
        return gradients[0] * ctx.factor, None


def spoilt_gradient(value: float, seed: int, _: Path) -> str | None:
    """A gradient that is not finite though the loss is."""
    data: list[Any] = [(x, y, 1.0) for x, y in batches(seed, STEPS)]
    for at in random.Random(seed).sample(range(STEPS), 3):
        data[at] = (*data[at][:2], value)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = SpoiltGradient.apply(loss_of(model, batch), batch[2])  # type: ignore[no-untyped-call]
        return found

    return against_plain(seed, data, loss=loss)


def for_ever(seed: int, _: Path) -> str | None:
    """Nothing but NaN from some step on: a clear end, with the weights of the last good step."""
    good = random.Random(seed).randrange(1, STEPS)
    subject = Subject.of(seed)
    trainer = subject.trainer(settings(), Faulty("uphill", seed))
    data = batches(seed, STEPS)
    ours(trainer, subject, data[:good])
    wanted = fingerprint_of_weights(subject)
    bad = (data[0][0], data[0][1] * float("nan"))
    try:
        for _step in range(200):
            trainer.step(bad)
    except DivergenceError:
        return None if fingerprint_of_weights(subject) == wanted else "the weights have moved"
    return "200 steps of NaN, and no end"


def fingerprint_of_weights(subject: Subject) -> list[bytes]:
    """Weights and buffers as bytes."""
    return [t.detach().numpy().tobytes() for t in subject.model.state_dict().values()]


def poked_weight(seed: int, _: Path) -> str | None:
    """Somebody writes NaN into a weight: a typed end, not a loop without one."""
    subject = Subject.of(seed)
    trainer = subject.trainer(settings(), Faulty("uphill", seed))
    data = batches(seed, STEPS)
    ours(trainer, subject, data[:20])
    parameters = list(subject.model.parameters())
    with torch.no_grad():
        random.Random(seed).choice(parameters).view(-1)[0] = float("nan")
    try:
        for batch in data * 10:
            trainer.step(batch)
    except DivergenceError as error:
        return None if "NaN" in str(error) or "nan" in str(error).lower() or "finite" in str(error) else str(error)
    return "no end"


# ---- spikes ---------------------------------------------------------------------------------------------------


def spike(factor: float, where: str, kind: str, seed: int, _: Path) -> str | None:
    """One batch's targets, or one gradient, a multiple of what they should be.

    The loss on data that are kept aside is back within 50 steps, or no later than the plain loop's.
    """
    warm, after = 120, RECOVERY_STEPS
    data: list[Any] = [(x, y, 1.0) for x, y in batches(seed, warm + after + 1)]
    x, y, _ = data[warm]
    data[warm] = (x, y * factor, 1.0) if where == "loss" else (x, y, factor)
    test = batches(seed, 1, 512)[0]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found: Tensor = SpoiltGradient.apply(loss_of(model, batch), batch[2])  # type: ignore[no-untyped-call]
        return found

    def measured(model: nn.Module) -> float:
        twin = copy.deepcopy(model).eval()
        with torch.no_grad():
            return float(loss_of(twin, test))

    def steps_until_back(drive: Callable[[Subject], Callable[[Any], object]]) -> float:
        subject = Subject.of(seed, kind)
        step = drive(subject)
        for batch in data[:warm]:
            step(batch)
        before = measured(subject.model)
        step(data[warm])
        for number, batch in enumerate(data[warm + 1 :], 1):
            step(batch)
            if measured(subject.model) <= BACK * before + 1e-3:
                return number
        return float("inf")

    config = HybridTrainerConfig(warmup_steps=20, predictor=replace(settings().predictor, window=5))
    found = steps_until_back(lambda s: s.trainer(config, loss=loss).step)
    if found <= RECOVERY_STEPS:
        return None
    alone = steps_until_back(lambda s: lambda batch: plain(s, [batch], loss))
    return None if found <= alone else f"not back after {after} steps, the plain loop after {alone:g}"


# ---- predictors ----------------------------------------------------------------------------------------------


def faulty_predictor(fault: str, seed: int, _: Path) -> str | None:
    """It ends as plain training, to the last bit."""
    return against_plain(seed, batches(seed, STEPS), predictor=Faulty(fault, seed))


class Slow(Faulty):
    """Takes its time, as one of the user's own: those of this package are held to less."""

    __module__ = "of_the_user"

    def __init__(self, seed: int, seconds: float) -> None:
        """Args: seed: of what it says.  seconds: that a call takes."""
        super().__init__("uphill", seed)
        self._seconds = seconds

    def predict(self, horizon: int) -> PhasePrediction:
        """After a nap."""
        time.sleep(self._seconds)
        return super().predict(horizon)


def hanging_predictor(seed: int, _: Path) -> str | None:
    """It is dropped after the call, or the hundred steps, that show it: naps of many steps, or one over a second."""
    subject = Subject.of(seed)
    seconds = 1.1 * MAX_CALL_SECONDS if seed % 2 else 0.1
    trainer = subject.trainer(settings(), Slow(seed, seconds))
    ours(trainer, subject, batches(seed, 130))
    if Place.PREDICTOR not in trainer.run.failures.dropped:
        return "it is still asked after 130 steps"
    calls = trainer.statistics()["num_jumps_proposed"]
    return None if calls <= 1 or seconds < MAX_CALL_SECONDS else f"it was asked {calls} times"


class Confident(Faulty):
    """Always confident, always wrong: random directions with glowing promises."""

    def __init__(self, seed: int, length: float) -> None:
        """Args: seed: of the directions.  length: of them."""
        super().__init__("uphill", seed)
        self.spec = BasisSpec(num_displacements=4, gradient=True)
        self._length, self._generator = length, torch.Generator().manual_seed(seed)

    def predict(self, horizon: int) -> PhasePrediction:
        """Somewhere else."""
        size = (self.num_groups, self.spec.num_columns)
        given = self._length * torch.randn(size, generator=self._generator, dtype=torch.float64)
        return PhasePrediction(
            coefficients=given, horizon=horizon, predicted_loss=-1.0, confidence=1.0, max_scale=8.0,
            predicted_reduction=1e3, alternatives=(2 * given, -given),
        )  # fmt: skip


def confident_predictor(length: float, seed: int, _: Path) -> str | None:
    """At most 2 % dearer than plain training, and no worse at its end."""
    steps = 600
    data, test = batches(seed, steps), batches(seed, 1, 1000)[0]
    reference, subject = Subject.of(seed), Subject.of(seed)
    plain(reference, data)
    config = HybridTrainerConfig(warmup_steps=50, gate=GateConfig(overhead_budget=0.01))
    trainer = subject.trainer(config, Confident(seed, length))
    trainer.fit(data, total_steps=steps)
    with torch.no_grad():
        wanted, found = (float(loss_of(s.model.eval(), test)) for s in (reference, subject))
    if found > 1.1 * wanted + 1e-3:
        return f"loss {found:.4g}, plain {wanted:.4g}"
    allowed = 1.02 * STEP_UNITS * trainer.run.meter.num_attempted_steps + 5 * STEP_UNITS
    spent = trainer.statistics()["cost_units"]
    return None if spent <= allowed else f"cost {spent / allowed:.3f} of what is allowed"


def own_predictors(seed: int, _: Path) -> str | None:
    """Every predictor of the package through three bad batches: it goes on, finite, and says how often."""
    dice = random.Random(seed)
    name = dice.choice(("hold", "heuristic", "linear", "secant", "quasi_newton", "dmd", "mlp"))
    data = batches(seed, 80)
    bad = dice.sample(range(10, 80), 3)
    for at in bad:
        data[at] = (data[at][0] * dice.choice((float("nan"), float("inf"))), data[at][1])
    subject = Subject.of(seed)
    trainer = subject.trainer(settings(predictor_type=name))
    ours(trainer, subject, data)
    if not all(bool(torch.isfinite(p).all()) for p in subject.model.parameters()):
        return f"{name}: a weight is not finite"
    skipped = trainer.statistics()["num_skipped_steps"]
    return None if skipped == len(bad) else f"{name}: {skipped} of {len(bad)} bad steps were left out"


def cases() -> list[Case]:
    """Of this module."""
    same = "bitwise the plain loop that leaves the step out"
    found = [
        *(
            Case(name=f"{value} in a batch's {where}", survived=same, tries=5, quick=1,
                 trial=partial(spoilt_batch, float(value), where))
            for value in ("nan", "inf") for where in ("inputs", "targets")
        ),
        *(Case(name=f"{value} as loss", survived=same, tries=5, trial=partial(spoilt_loss, float(value)))
          for value in ("nan", "inf", "-inf")),
        *(Case(name=f"{value} in the gradient", survived=same, tries=5, trial=partial(spoilt_gradient, float(value)))
          for value in ("nan", "inf")),
        Case(name="NaN for ever", survived="DivergenceError, weights of the last good step", tries=5, trial=for_ever),
        Case(name="NaN written into a weight", survived="DivergenceError that says where", tries=5,
             trial=poked_weight),
        *(
            Case(name=f"{where} {factor:g}x for a step, {kind}",
                 survived=f"back within {RECOVERY_STEPS} steps, or no later than the plain loop", tries=5,
                 quick=1 if factor == 100 else 0, trial=partial(spike, factor, where, kind))
            for where in ("loss", "gradient") for factor in (10.0, 100.0) for kind in ("adam", "sgd")
        ),
        *(Case(name=f"predictor: {fault}", survived="bitwise plain training", tries=3,
               trial=partial(faulty_predictor, fault)) for fault in PREDICTOR_FAULTS),
        Case(name="predictor that hangs", survived="dropped within 100 steps", tries=5, quick=0,
             trial=hanging_predictor),
        *(Case(name=f"predictor always confident and wrong, length {length:g}",
               survived="at most 2 % dearer, loss as good", tries=5, quick=0,
               trial=partial(confident_predictor, length)) for length in (0.1, 3.0, 100.0)),
        Case(name="bad batches, every predictor of the package", survived="left out, weights finite", tries=10,
             quick=2, trial=own_predictors),
    ]  # fmt: skip
    return found
