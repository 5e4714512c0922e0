"""What the regimes of `hpt bench regimes` are: pure data, edited here and nowhere else.

A regime is a tuple of cases.  A case is a task with its settings and recipe, a length, a rule for the
learning rate, the arms that make sense there and the budgets of the plain arm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...tasks.base import unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """Length of a run at budget 1: full, and with ``--quick`` (None: the case is left out there)."""

    full: int
    quick: int | None = None
    unit: Literal["steps", "epochs"] = "steps"


#: Step counts, all in one place.  Quick ones are chosen so that a regime takes at most ten minutes on two
#: cores, from milliseconds per step there: pinn-poisson 1.3, gpt 0.3M 30 (2 threads), cifar over 100.
LENGTHS: dict[str, Length] = {
    "pinn-poisson": Length(full=4000, quick=2000),
    "pinn-burgers": Length(full=4000, quick=1000),
    "oscillator": Length(full=4000, quick=1500),
    "regression": Length(full=4000, quick=2000),
    "pinn-allen-cahn": Length(full=4000, quick=1000),
    "pinn-klein-gordon": Length(full=4000, quick=1000),
    "pinn-inverse": Length(full=4000, quick=1000),
    "cifar": Length(full=12, unit="epochs"),
    "digits-mlp": Length(full=12, quick=12, unit="epochs"),
    "finetune": Length(full=600, quick=100),
    "lm": Length(full=1000, quick=300),
    "lm-300": Length(full=300, quick=300),
    "lm-1000": Length(full=1000, quick=1000),
    "lm-3000": Length(full=3000, quick=3000),
    "lm-6000": Length(full=6000, quick=6000),
    "lm-20000": Length(full=20_000, quick=20_000),
    "lm-lowlr": Length(full=1000, quick=200),
    "lm-muon": Length(full=1000, quick=200),
    "self-test": Length(full=40, quick=24),
}

#: Peers that change nothing but the weights between steps, or what is read out at the end.
WEIGHT_PEERS = ("snoo", "lookahead", "ema-nesterov", "ema", "lawa", "wnn+")
#: The plain optimizer with a longer warm-up, of everything or of the blocks: no competitors, but what a user wins who
#: mends the recipe by hand.
CONTROLS = ("long-warmup", "block-warmup")
#: Optimizers that need no rate to be set well: where the rate is fixed on purpose they are tuned all the same.
RATE_FREE = ("schedule-free", "prodigy")

NOISY_BUDGETS = (0.5, 1.0, 2.0, 4.0)
#: A lower bound of S = 4 was what full-batch tasks ran into with budgets up to 4.
EXACT_BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
#: A third of the time of a quick run would go into the plain run of sixteen lengths.
EXACT_BUDGETS_QUICK = (0.5, 1.0, 2.0, 4.0, 8.0)
#: Of the plain arm at its tuned rate, where the case's own rate is a multiple of it.
TUNED_BUDGETS = (0.125, 0.25, 0.5, 1.0, 2.0)

NUM_SEEDS, NUM_SEEDS_QUICK = 3, 2
#: One sweep seed has tuned the plain arm to a rate at which a judged seed got stuck (LOG.md).
NUM_SWEEP_SEEDS, NUM_SWEEP_SEEDS_QUICK = 2, 2
#: Rates of a sweep with ``--quick``, where the case names none: those of the grid nearest to the recipe's own.
NUM_RATES_QUICK = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One column of figures.

    Attributes:
        name: unique within its regime.
        task: as in ``tasks.TASKS``.
        length: key of :data:`LENGTHS`.
        options: fields of ``setup.Options``: preset, data, dtype, optimizer, schedule.
        fallback: options that replace these where the data are not there; None: the case is skipped then.
        recipe: fields of ``TaskDefaults`` that no option sets, such as ``lr_grid``.
        quick_grid: rates of every sweep with ``--quick``; empty: :data:`NUM_RATES_QUICK` of the grid.
        rate: None: every arm tunes its rate.  Else all arms train at this multiple of the plain arm's
            tuned rate, but for :data:`RATE_FREE`.
        peers: beside plain, hybrid and jump-of-zero.
        quick_peers: the same with ``--quick``.
        budgets: of the plain arm, in lengths of the case.
        quick_budgets: the same with ``--quick``.
        quick_too: whether ``--quick`` runs the case.
        sweep_seeds: of every sweep's trial, where the usual number is too few to tell rates apart; 0: the usual.
        bases: peers that are run at all budgets of the plain arm, so that S is known over them, too.
        sources: closed-form sources that get an arm of their own beside the hybrid's predictor.
        first_seed: of the judged runs, where the first ones have been looked at while constants were chosen.
    """

    name: str
    task: str
    length: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fallback: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    quick_grid: tuple[float, ...] = ()
    rate: float | None = None
    peers: tuple[str, ...] = WEIGHT_PEERS
    quick_peers: tuple[str, ...] = ("snoo",)
    budgets: tuple[float, ...] = NOISY_BUDGETS
    quick_budgets: tuple[float, ...] = NOISY_BUDGETS
    quick_too: bool = False
    sweep_seeds: int = 0
    bases: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    first_seed: int = 0

    def __post_init__(self) -> None:
        """Check what a typing error would break hours later."""
        assert self.length in LENGTHS, self.length
        assert not self.quick_too or LENGTHS[self.length].quick is not None, f"{self.name} has no quick length"
        assert set(self.quick_peers) <= set(self.peers), self.name
        assert set(self.bases) <= set(self.peers), self.name
        assert 1.0 in self.budgets, f"{self.name}: budget 1 is what gaps are measured against"
        assert 1.0 in self.quick_budgets, f"{self.name}: budget 1 is what gaps are measured against"
        assert set(self.quick_grid) <= set(self.recipe.get("lr_grid", ())), f"{self.name}: not of its grid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """Cases that share a question."""

    name: str
    about: str
    cases: tuple[Case, ...]
    hidden: bool = False


# ---- pinn: deterministic -----------------------------------------------------------------------------

#: What experts use on full batches; they search their steps, and have no rate to tune.
_SECOND_ORDER = ("lm", "ssbroyden", "ssbfgs", "lbfgs-400", "nysnewton-cg")
_PINN_PEERS = (*WEIGHT_PEERS, "soap", "lbfgs-20", "lbfgs-100", *_SECOND_ORDER)


def _exact(name: str, task: str, *, quick: bool = False, **options: Any) -> Case:
    """A full-batch task: with what a run without residuals takes, and with what one that hands them in does."""
    return Case(
        name=name, task=task, length=task, options={"predictor": "quasi_newton", **options}, peers=_PINN_PEERS,
        quick_peers=("soap", "lbfgs-20", "lbfgs-100", *_SECOND_ORDER), budgets=EXACT_BUDGETS,
        quick_budgets=EXACT_BUDGETS_QUICK, quick_too=quick, sources=("portfolio", "gauss_newton"),
    )  # fmt: skip


_PINN = (
    _exact("pinn-poisson", "pinn-poisson", quick=True),
    _exact("pinn-burgers", "pinn-burgers"),
    _exact("oscillator", "oscillator", quick=True),
    _exact("regression", "regression"),
    _exact("regression-float64", "regression", dtype="float64"),
    _exact("pinn-allen-cahn", "pinn-allen-cahn", dtype="float64"),
    _exact("pinn-klein-gordon", "pinn-klein-gordon", dtype="float64"),
    _exact("pinn-inverse", "pinn-inverse", dtype="float64"),
)

# ---- epochs: many epochs over small data ----------------------------------------------------------------

_EPOCHS = (
    Case(name="cifar", task="cifar", length="cifar", peers=(*WEIGHT_PEERS, "schedule-free")),
    Case(
        name="cifar-narrow", task="cifar", length="cifar", options={"preset": "narrow"},
        peers=(*WEIGHT_PEERS, "schedule-free"), budgets=(0.5, 1.0, 1.5, 2.0), quick_budgets=(1.0, 1.5, 2.0),
    ),
    Case(
        name="digits-mlp", task="digits-mlp", length="digits-mlp", peers=(*WEIGHT_PEERS, "schedule-free"),
        quick_peers=("snoo", "lookahead", "ema"), quick_too=True,
        sweep_seeds=12,  # 299 images to validate on: two seeds have chosen rates by luck (LOG.md); a run takes a second
    ),
)  # fmt: skip

# ---- finetune --------------------------------------------------------------------------------------------


def _finetune(preset: str, rate: float | None, *, quick: bool = False) -> Case:
    suffix = "" if rate is None else f"-x{rate:.3g}"
    base = preset.removesuffix("-lora")
    # the model's weights and the text it is tuned to come with the data sets; the embedded pair needs neither
    embedded = {"preset": preset.replace("stories260k", "stdlib")} if base == "stories260k" else None
    return Case(
        name=f"{preset}{suffix}", task="finetune", length="finetune", options={"preset": preset}, fallback=embedded,
        rate=rate, peers=(*WEIGHT_PEERS, *RATE_FREE, *CONTROLS),
        quick_peers=("lookahead",) if rate is None else ("prodigy",),
        quick_budgets=(0.5, 1.0, 2.0), quick_too=quick,
    )  # fmt: skip


_FINETUNE = tuple(
    _finetune(preset, rate, quick=preset == "stdlib")
    for preset in ("stories260k", "stories260k-lora", "stdlib", "stdlib-lora")
    for rate in (None, 0.1)
)

# ---- lm: one pass over new data ----------------------------------------------------------------------------


def _lm(data: str | None, schedule: str, length: str = "lm", rate: float | None = None, **changes: Any) -> Case:
    suffix = "" if rate is None else f"-x{rate:.3g}"
    case = Case(
        name=f"{data or 'embedded'}-{schedule}{suffix}", task="gpt", length=length, rate=rate,
        options={"preset": "0.3M", "schedule": schedule, **({"data": data} if data else {})},
        peers=(*WEIGHT_PEERS, "schedule-free", "soap", *CONTROLS), quick_budgets=(0.5, 1.0, 2.0),
    )  # fmt: skip
    return replace(case, **changes)


#: Plain training is at its best at 2.1e-3 here, the hybrid at 6e-3 (LOG.md): every arm is tuned over both.
_LM_GRID = (1.5e-3, 2.1e-3, 3e-3, 4.2e-3, 6e-3)

_LM = tuple(
    _lm(
        data, schedule, recipe={"lr_grid": _LM_GRID}, quick_grid=_LM_GRID[1:],
        quick_too=(data, schedule) == (None, "wsd"), quick_peers=("lookahead", "block-warmup"),
    )
    for data in ("tinystories", "novels", None)
    for schedule in ("wsd", "linear")
)  # fmt: skip

#: What a user can have by hand, each with a sweep of as many trials as ours.
_BASES = ("two-rates", "four-rates")
_STRONG = (*_BASES, "block-warmup", "mup", "muon", "normuon", "soap", "schedule-free")
#: Corpora take turns.  Tiny Shakespeare is not among them, so that one is left that no constant was looked at on.
_CORPORA = ("tinystories", "novels", "wikitext-2")


def _modern(length: str, turn: int, preset: str = "0.3M") -> Case:
    """A case with today's model; corpus and schedule by its turn, so that lengths together see all of both."""
    data, schedule = _CORPORA[turn % len(_CORPORA)], ("wsd", "linear")[turn % 2]
    variant = preset.removeprefix("0.3M").removeprefix("-")
    name = "-".join(filter(None, ("modern", str(LENGTHS[length].full), data, schedule, variant)))
    return Case(
        name=name, task="gpt-modern", length=length,
        options={"preset": preset, "schedule": schedule, "data": data},
        fallback={"preset": preset, "schedule": schedule}, peers=_STRONG, quick_peers=_BASES, bases=_BASES,
        budgets=(0.5, 1.0, 2.0), quick_budgets=(0.7, 1.0, 1.7),
        quick_grid=(1.5e-3, 3e-3, 6e-3, 1.2e-2), recipe={"lr_grid": (1.5e-3, 3e-3, 6e-3, 1.2e-2)},
        first_seed=100,  # seeds 0 to 21 have been looked at while factors were chosen
    )  # fmt: skip


#: 300 steps are one byte per weight, 6,000 are about 20 of them, and so are 20,000 of the larger model.
_LM_MODERN = (
    *(_modern("lm-300", turn) for turn in range(3)),
    *(_modern("lm-1000", turn) for turn in range(3, 6)),
    *(_modern("lm-3000", turn) for turn in range(1, 4)),
    _modern("lm-300", 1, "0.3M-drawn"),
    _modern("lm-300", 2, "0.3M-swiglu"),
    _modern("lm-1000", 4, "0.3M-drawn"),
    _modern("lm-1000", 5, "0.3M-swiglu"),
    _modern("lm-6000", 1),
    _modern("lm-20000", 2, "0.9M"),
)

#: As fractions, so that a rate is exactly the tuned one's tenth and thirtieth.
LOW_RATES = (1 / 10, 1 / 30, 3.0)

_LM_LOWLR = tuple(
    _lm(
        data,
        "wsd",
        "lm-lowlr",
        rate,
        peers=(*WEIGHT_PEERS, *RATE_FREE, *CONTROLS),
        quick_peers=("prodigy",) if rate < 1 else ("lookahead", "prodigy"),
        budgets=EXACT_BUDGETS if rate < 1 else NOISY_BUDGETS,
        quick_budgets=(1.0, 2.0, 4.0) if rate < 1 else (0.5, 1.0, 2.0),
        quick_too=data is None and rate < 1,
    )
    for data in ("tinystories", None)
    for rate in LOW_RATES
)

#: From how far off the tuned rate ours still ends where it ends from the tuned one.
_OFF_RATES = (1 / 3, 3.0)


def _modern_off(rate: float) -> Case:
    """Today's model from a rate that is a multiple of plain training's tuned one."""
    case = _modern("lm-1000", 4)
    return replace(
        case, name=f"{case.name}-x{rate:.3g}", rate=rate, peers=("four-rates",), quick_peers=(), bases=(),
        budgets=(1.0, 2.0), quick_budgets=(1.0, 2.0),
    )  # fmt: skip


_LM_LOWLR = (*_LM_LOWLR, *(_modern_off(rate) for rate in _OFF_RATES))

_MUON_OPTIONS: dict[str, Any] = {"preset": "0.3M", "optimizer": "muon"}

_LM_MUON = tuple(
    replace(
        _lm(data, schedule, "lm-muon", peers=WEIGHT_PEERS, quick_peers=("snoo", "ema")),
        options={**_MUON_OPTIONS, "schedule": schedule, **({"data": data} if data else {})},
        # wider than AdamW's grid: nothing is known of Muon's best rate beforehand
        recipe={"lr_grid": (1.5e-3, 3e-3, 6e-3, 1.2e-2)},
        quick_too=(data, schedule) == (None, "wsd"),
    )
    for data in ("tinystories", None)
    for schedule in ("wsd", "linear")
)


def _modern_muon(turn: int) -> Case:
    """Today's model with Muon for its matrices, in all arms."""
    case = _modern("lm-1000", turn)
    options = {"optimizer": "muon"}
    return replace(
        case, options={**case.options, **options}, fallback={**(case.fallback or {}), **options},
        peers=("embedding-rate",), quick_peers=("embedding-rate",), bases=("embedding-rate",),
    )  # fmt: skip


_LM_MUON = (*_LM_MUON, *(_modern_muon(turn) for turn in range(3, 6)))

# ---- for the tests --------------------------------------------------------------------------------------

_EAGER_POINTS = {"batch_size": 32}
_SELF_TEST = (
    Case(
        name="tuned", task="regression", length="self-test", options=_EAGER_POINTS, peers=(), quick_peers=(),
        quick_budgets=(0.5, 1.0, 2.0), quick_too=True,
    ),
    Case(
        name="slow", task="regression", length="self-test", options=_EAGER_POINTS, peers=(), quick_peers=(), rate=0.1,
        quick_budgets=(0.5, 1.0, 2.0), quick_too=True,
    ),
    Case(
        name="missing", task="gpt", length="self-test", options={"data": "tinystories"}, peers=(), quick_peers=(),
        quick_too=True,
    ),
)  # fmt: skip

REGIMES: dict[str, Regime] = {
    r.name: r
    for r in (
        Regime(name="pinn", about="deterministic: full-batch training, losses are exact", cases=_PINN),
        Regime(name="epochs", about="many epochs over small data", cases=_EPOCHS),
        Regime(
            name="finetune", about="fine-tuning, full and LoRA, at the tuned rate and a tenth of it", cases=_FINETUNE
        ),
        Regime(name="lm", about="one pass over new text at a tuned rate", cases=(*_LM, *_LM_MODERN)),
        Regime(
            name="lm-lowlr", about="the same with the rate at 1/10, 1/30 and 3 times the tuned one", cases=_LM_LOWLR
        ),
        Regime(name="lm-muon", about="the same with Muon for the matrices", cases=_LM_MUON),
        Regime(name="self-test", about="seconds only: for the tests of this command", cases=_SELF_TEST, hidden=True),
    )
}


def names() -> tuple[str, ...]:
    """Of the regimes a person would run."""
    return tuple(r.name for r in REGIMES.values() if not r.hidden)


def regime_of(name: str) -> Regime:
    """The regime called ``name``.

    Raises:
        ValueError: there is none.
    """
    if name not in REGIMES:
        raise unknown_name("regime", name, (*names(), "rl"))
    return REGIMES[name]


def select(regime: Regime, wanted: tuple[str, ...], *, quick: bool) -> tuple[Case, ...]:
    """The cases to run: those that are named, whatever ``quick`` says, else all, or the quick ones.

    Raises:
        ValueError: a name is not one of the regime's.
    """
    known = {case.name: case for case in regime.cases}
    for name in wanted:
        if name not in known:
            raise unknown_name(f"case of regime {regime.name!r}", name, known)
    if wanted:
        return tuple(known[name] for name in dict.fromkeys(wanted))
    return tuple(case for case in regime.cases if case.quick_too or not quick)


def num_steps(case: Case, steps_per_epoch: int | None, *, quick: bool) -> int:
    """Length of the case in optimizer steps.

    Args:
        case: whose length.
        steps_per_epoch: of its task.
        quick: take the short one, where there is one.
    """
    length = LENGTHS[case.length]
    count = length.quick if quick and length.quick is not None else length.full
    return count * (steps_per_epoch or 1) if length.unit == "epochs" else count


def trimmed(grid: tuple[float, ...], middle: float, count: int) -> tuple[float, ...]:
    """The ``count`` rates of a grid nearest to ``middle`` (by ratio), in the grid's order."""
    kept = sorted(grid, key=lambda lr: max(lr / middle, middle / lr))[:count]
    return tuple(lr for lr in grid if lr in kept)
