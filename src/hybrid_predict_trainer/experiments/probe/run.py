"""``probe``: what prediction would bring on a model, an optimizer and data, from some minutes of pilots."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from ...config.presets import PRESETS
from ...config.settings import HybridTrainerConfig
from ...config.toml import to_toml, with_values
from ...records import ConfigError
from ...tasks.base import unknown_name
from ...tasks.recipes import lr_factor
from ..extras import require
from ..statistics import t_quantile
from .observe import LAZY_CHANGE, Displacements, is_deterministic, is_pretrained, noise_scale
from .pilots import NO_JUMPS, PARTS, Pilot, PilotPlan, Replicate, displacements, rates, replicate, train
from .subject import NUM_HELD, LossFn, Schedule, Subject, checked_loss, mean_loss, untouched

Regime = Literal["deterministic", "many epochs", "fine-tuning", "one pass"]
ScheduleName = Literal["wsd", "linear", "cosine", "constant"]
MINUTES = 5.0
#: Fewer steps say nothing; more than these are not needed.
MIN_STEPS, MAX_STEPS = 60, 2000
#: Pilots of a replicate, in lengths of a pilot, and how many replicates there are to be.
USUAL_LENGTHS, REPLICATES = 8.0, 2
TRIAL_STEPS = 8
LEVEL = 0.9
#: What S differs by between seeds of short runs (standard deviation of its logarithm, benchmarks of docs/benchmarks.md:
#: 0.03 to 0.15), counted as so many seeds; and what it may change by where a run is e times as long as a pilot.
USUAL_SPREAD, USUAL_SEEDS, LENGTH_SPREAD = 0.1, 4, 0.1
#: A rate that ends so much lower is a better one.
RATE_MARGIN = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Expected S: cost of a plain run that ends at the same loss, over the predicted run's.

    Attributes:
        speedup: geometric mean over replicates.
        low, high: 90 % interval; ``high`` None: no plain pilot reached the loss, ``speedup`` is a lower bound.
        verdict: "go" where the interval lies above 1, "no-go" where S is at most 1, else "unclear".
        jumps: accepted in the pilots.
    """

    speedup: float
    low: float
    high: float | None
    verdict: Literal["go", "no-go", "unclear"]
    jumps: int

    def contains(self, speedup: float) -> bool:
        """Whether a measured S lies in the interval."""
        return self.low <= speedup and (self.high is None or speedup <= self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a probe has found.

    Attributes:
        regime: of the data and the model.
        dynamics: "lazy" where a pilot's weights stay within a tenth of their length, else "feature learning".
        noise_scale, gradient_cosine: in batches, before training.
        predictability: window (steps) -> mean cosine of successive displacements of the mean weights.
        learning_rate: "too small", "too large", "about right" or "not tested", from pilots at a third and three times.
        total, jumps, sizes: expected gains of everything, of jumps alone, of step sizes alone.
        steps, planned_steps: of a pilot, and of the run that is asked about.
        config: recommended settings.
        seconds: that the probe took.
        pilots: every short run, for the record.
    """

    regime: Regime
    dynamics: str
    noise_scale: float | None
    gradient_cosine: float
    predictability: dict[int, float]
    learning_rate: str
    total: Gain
    jumps: Gain
    sizes: Gain
    steps: int
    planned_steps: int
    config: HybridTrainerConfig
    seconds: float
    pilots: list[dict[str, Any]]

    def to_toml(self) -> str:
        """Recommended settings; prediction is off where nothing is expected of it."""
        config = self.config
        if self.total.verdict == "no-go":
            config = replace(config, enabled=False)
        elif self.jumps.verdict == "no-go" and not self.jumps.jumps:
            config = with_values(config, NO_JUMPS)
        return to_toml(config)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and texts."""
        plain = {name: getattr(self, name) for name in self.__slots__ if name != "config"}
        gains = {name: asdict(plain[name]) for name in ("total", "jumps", "sizes")}
        return {**plain, **gains, "config_toml": self.to_toml()}


def probe(
    model: nn.Module, optimizer: Optimizer, loader: Iterable[Any] | Callable[[int], Iterator[Any]], loss_fn: LossFn,
    *, total_steps: int | None = None, minutes: float = MINUTES, options: Options | None = None,
) -> Report:  # fmt: skip
    """Train short pilots on copies of a model and say what prediction is worth there.

    The model, the optimizer, the loader's generators and all random states are left as they are, bit for bit.

    Args:
        model: As it is to be trained.
        optimizer: Over its parameters, with the rate that is to be used.
        loader: Batches that can be gone through again, or seed -> iterator without end.
        loss_fn: (model, batch) -> scalar loss.
        total_steps: Of the run that is asked about; None: ten times a pilot.
        minutes: Wall-clock; the pilots are made as long as fits.
        options: Schedule and more.

    Raises:
        ConfigError: something cannot be copied or gone through again, the loss is not finite or has no gradient, or
            there is time for too few steps.
        IntegrationError: scipy is not installed.
    """
    require("scipy")
    if not minutes > 0:
        raise ConfigError(f"minutes = {minutes} must be above 0")
    options = options or Options()
    counts = {"total_steps": total_steps, "pilot_steps": options.pilot_steps, "replicates": options.replicates}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name} = {count} must be at least 1")
    subject = Subject(
        model=model, optimizer=optimizer, loss_fn=loss_fn, loader=loader, schedule=options.factor(),
        grad_clip=options.grad_clip, val_fn=options.val_fn, num_batches=options.steps_per_epoch,
    )  # fmt: skip
    with untouched(subject):
        return _run(subject, total_steps, minutes, options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a probe may be told beside the four things it needs.

    Attributes:
        schedule: of the pilots and the run: a name, or share of a run -> factor on the rate.
        warmup, decay: shares of a run.
        grad_clip: largest gradient norm; 0: no clipping.
        val_fn: model -> validation loss; None: the loss of batches kept apart.
        pilot_steps: of a pilot; None: as many as the time allows.
        replicates: orders of the data.
        steps_per_epoch: of a loader that does not say it itself.
        rates: whether a third of the rate and three times it are tried too.
        tell: takes a line about every pilot.
    """

    schedule: ScheduleName | Schedule = "linear"
    warmup: float = 0.05
    decay: float = 0.25
    grad_clip: float = 0.0
    val_fn: Callable[[nn.Module], float] | None = None
    pilot_steps: int | None = None
    replicates: int = REPLICATES
    steps_per_epoch: int | None = None
    rates: bool = True
    tell: Callable[[str], None] = lambda _: None

    def factor(self) -> Schedule:
        """Share of a run -> factor on the rate.

        Raises:
            ConfigError: an unknown schedule, or a share that is none.
        """
        if callable(self.schedule):
            return self.schedule
        if self.schedule not in get_args(ScheduleName):
            raise ConfigError(str(unknown_name("schedule", str(self.schedule), get_args(ScheduleName))))
        for part in ("warmup", "decay"):
            if not 0 <= getattr(self, part) <= 1:
                raise ConfigError(f"{part} = {getattr(self, part)} is a share of a run: 0 to 1")
        name, fine = self.schedule, 100_000
        return lambda share: lr_factor(
            round(share * fine), schedule=name, total_steps=fine, warmup_steps=round(self.warmup * fine),
            decay_frac=self.decay,
        )  # fmt: skip


def _run(subject: Subject, total_steps: int | None, minutes: float, options: Options) -> Report:
    began = time.perf_counter()
    model, _, loss_fn = subject.copy()
    checked_loss(model, loss_fn, next(subject.batches(0)), subject.model)
    exact = is_deterministic(subject, model, loss_fn)
    held_from = subject.batches(987_654)
    held = [next(held_from) for _ in range(1 if exact else NUM_HELD)]
    judged = mean_loss(subject, model, loss_fn, held)
    if not math.isfinite(judged):
        raise ConfigError(
            f"the validation loss of the model as it is is {judged:g}: no two runs could be compared by it"
        )
    regime = _regime(subject, exact, total_steps, held)
    noise = noise_scale(model, loss_fn, subject.batches(0))
    config = recommended(regime, subject.optimizer, subject.steps_per_epoch)
    steps = options.pilot_steps or _pilot_steps(subject, config, held, minutes * 60, total_steps)
    config = replace(config, warmup_steps=min(config.warmup_steps, max(1, steps // 10)))
    deadline = math.inf if options.pilot_steps else began + 60 * minutes
    plan = PilotPlan(steps=steps, replicates=options.replicates, deadline=deadline, exact=exact, config=config)
    seen: list[Displacements] = []
    runs: list[Replicate] = []
    for seed in range(1, plan.replicates + 1):
        if runs and plan.late:
            break
        runs.append(replicate(subject, plan, seed, held, options.tell, displacements(seen)))
    if options.rates:
        rates(subject, plan, 1, held, runs[0])
    planned = total_steps or 10 * steps
    gains = {name: gain(runs, name, planned / steps) for name in PARTS}
    scale = noise["batches"]
    return Report(
        regime=regime, dynamics="lazy" if seen[0].change() < LAZY_CHANGE else "feature learning", noise_scale=scale,
        gradient_cosine=noise["cosine"] or 0.0, predictability=seen[0].table(), learning_rate=_rate_verdict(runs[0]),
        total=gains["all"], jumps=gains["jumps"], sizes=gains["sizes"], steps=steps, planned_steps=planned,
        config=config, seconds=time.perf_counter() - began, pilots=_record(runs),
    )  # fmt: skip


def _regime(subject: Subject, exact: bool, total_steps: int | None, held: Sequence[Any]) -> Regime:
    if exact:
        return "deterministic"
    per_epoch = subject.steps_per_epoch
    if per_epoch is not None and total_steps is not None and total_steps >= 3 * per_epoch:
        return "many epochs"
    return "fine-tuning" if is_pretrained(subject, list(held)) else "one pass"


def recommended(regime: Regime, optimizer: Optimizer, steps_per_epoch: int | None) -> HybridTrainerConfig:
    """The settings that suit a regime: a preset, its window fitted to the data."""
    name = type(optimizer).__name__.lower()
    config = HybridTrainerConfig()
    if regime == "deterministic":
        return with_values(config, PRESETS["full_batch"])
    if regime == "many epochs" and steps_per_epoch is not None and steps_per_epoch > 1:
        preset = "epochs_adam" if "adam" in name else "epochs"
        return with_values(config, {**PRESETS[preset], "predictor.window": steps_per_epoch})
    if regime == "fine-tuning":
        return with_values(config, PRESETS["finetune"])
    return with_values(config, PRESETS["muon"]) if "muon" in name else config


def _pilot_steps(
    subject: Subject, config: HybridTrainerConfig, held: list[Any], seconds: float, total_steps: int | None
) -> int:
    """Steps of a pilot that all of them fit into the time with.

    Raises:
        ConfigError: there would be too few.
    """
    began = time.perf_counter()
    train(subject, replace(config, enabled=False), TRIAL_STEPS, 0, held)
    each = (time.perf_counter() - began) / TRIAL_STEPS
    fitting = int(seconds / (each * (REPLICATES * USUAL_LENGTHS + 2)))
    if fitting < MIN_STEPS:
        needed = MIN_STEPS * each * (REPLICATES * USUAL_LENGTHS + 2) / 60
        raise ConfigError(
            f"a step takes {each:.3g} s: pilots of {fitting} steps say nothing; give {needed:.0f} minutes, "
            "or probe a smaller model of the same kind"
        )
    return min(fitting, MAX_STEPS, total_steps or MAX_STEPS)


def gain(runs: Sequence[Replicate], name: str, longer: float) -> Gain:
    """S of one part over replicates, with the interval of its logarithm.

    The variance is the sample's, pooled with what is usual between seeds; the length of the run that is asked about,
    where it is another than the pilots', adds to it.

    Args:
        runs: Replicates.
        name: "all", "jumps" or "sizes".
        longer: Planned steps over those of a pilot.
    """
    found = [r.speedups()[name] for r in runs if name in r.parts]
    known = [s for s in found if s.kind != "unknown" and s.value > 0]
    jumps = sum(r.parts[name].jumps for r in runs if name in r.parts)
    if not known:
        return Gain(speedup=math.nan, low=0.0, high=None, verdict="unclear", jumps=jumps)
    logs = [math.log(s.value) for s in known]
    count, mean = len(logs), sum(logs) / len(logs)
    squares = sum((v - mean) ** 2 for v in logs)
    freedom = USUAL_SEEDS + count - 1
    variance = (USUAL_SEEDS * USUAL_SPREAD**2 + squares) / freedom
    error = math.sqrt(variance * (1 + 1 / count) + (LENGTH_SPREAD * abs(math.log(max(longer, 1e-9)))) ** 2)
    half = t_quantile((1 - LEVEL) / 2, freedom) * error
    kinds = {s.kind for s in known}
    low = 0.0 if "at most" in kinds else math.exp(mean - half)
    high = None if "at least" in kinds else math.exp(mean + half)
    verdict: Literal["go", "no-go", "unclear"] = "unclear"
    if mean <= 1e-3 or (name == "jumps" and not jumps):
        verdict = "no-go"
    elif low > 1:
        verdict = "go"
    return Gain(speedup=math.exp(mean), low=low, high=high, verdict=verdict, jumps=jumps)


def _rate_verdict(run: Replicate) -> str:
    """Which of the three rates ends lowest by more than the margin."""
    if len(run.rates) < 2:
        return "not tested"
    smaller, larger = (_loss(run.rates[r]) for r in sorted(run.rates))
    here = _loss(run.plain[1.0])
    if not math.isfinite(here):
        return "too large"
    best = here - RATE_MARGIN * abs(here)
    if larger < best and larger <= smaller:
        return "too small"
    return "too large" if smaller < best else "about right"


def _loss(pilot: Pilot) -> float:
    return pilot.loss if math.isfinite(pilot.loss) else math.inf


def _record(runs: Sequence[Replicate]) -> list[dict[str, Any]]:
    rows = []
    for number, run in enumerate(runs):
        named: list[tuple[str, Pilot]] = [(f"plain {length:g}", p) for length, p in sorted(run.plain.items())]
        named += [*run.parts.items(), *((f"rate {r:.3g}", p) for r, p in run.rates.items())]
        rows += [{"replicate": number, "run": name, **asdict(pilot)} for name, pilot in named]
    return rows


def format_text(report: Report) -> str:
    """What a person reads."""

    def line(what: str, found: Gain) -> str:
        if math.isnan(found.speedup):
            return f"{what}: {found.verdict}; S is not known, pilots diverged"
        high = "and more" if found.high is None else f"to {found.high:.2f}"
        bound = "at least " if found.high is None else ""
        return f"{what}: {found.verdict}; S {bound}{found.speedup:.2f}, 90 % interval {found.low:.2f} {high}"

    windows = ", ".join(f"{n} steps {c:.2f}" for n, c in report.predictability.items()) or "too few steps"
    scale = "not to be told from noise" if report.noise_scale is None else f"{report.noise_scale:.3g} batches"
    return "\n".join([
        line("everything", report.total), line("jumps alone", report.jumps) + f", {report.jumps.jumps} jumps taken",
        line("step sizes alone", report.sizes), f"regime: {report.regime}, {report.dynamics}",
        f"gradient noise scale: {scale} (cosine of two gradients {report.gradient_cosine:.2f})",
        f"cosine of successive displacements of window means: {windows}", f"learning rate: {report.learning_rate}",
        f"{len(report.pilots)} pilots of about {report.steps} steps in {report.seconds:.0f} s, for a run of "
        f"{report.planned_steps}",
    ])  # fmt: skip
