"""From what was asked for to cases that can run: settings checked, arms chosen, missing data found, nothing run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...config.settings import SOURCES
from ...predictors import PREDICTORS
from ...tasks.base import unknown_name
from ..arms.options import InputError, Options, as_input_error, build_experiment, config_of
from ..baselines import BASELINES, baseline_of
from ..compare.run import SWEEP_SEED_OFFSET
from ..run_arm import Arm, Experiment, Kind
from . import catalogue as regimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line said; None or empty where it said nothing.

    Attributes:
        regime: its name.
        out: folder of runs and results; shared by regimes, so that they can share runs.
        cases, arms, predictors: names to restrict to (arms) or to add (predictors; ``("all",)`` for all).
        options: fields of ``setup.Options`` that override those of every case (device, preset, ...).
        jobs: worker processes of a sweep; 1: none.
        tune_budgets: runs of other budgets than 1 that S is read off choose their own rate, among that of budget 1
            and its neighbours in the grid.
    """

    regime: str
    out: Path
    quick: bool = False
    seeds: int | None = None
    first_seed: int | None = None
    sweep_seeds: int | None = None
    jobs: int | None = None
    fresh: bool = False
    cases: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()
    predictors: tuple[str, ...] = ()
    steps: int | None = None
    budgets: tuple[float, ...] = ()
    lr_grid: tuple[float, ...] = ()
    tune_budgets: bool = False
    set: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExperimentSpec:
    """What a setup is built from: small and hashable, so that it can be sent to a worker."""

    options: Options
    recipe: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UntunedArm:
    """An arm before its rate is known."""

    name: str
    kind: Kind
    blueprint: ExperimentSpec
    grid: tuple[float, ...]  # empty: it shares another arm's rate
    weights_only: bool = False


@dataclass(slots=True, kw_only=True)
class PreparedCase:
    """A case with everything checked and nothing run."""

    case: regimes.Case
    setup: Experiment
    threads: int
    budgets: tuple[float, ...]
    sweep_seeds: tuple[int, ...]
    contestants: list[UntunedArm]
    notes: list[str]
    tune_budgets: bool = False

    @property
    def curves(self) -> list[UntunedArm]:
        """Arms that are run at all budgets: plain, and the bases that are there."""
        return [self.contestant("plain"), *(c for c in self.contestants if c.name in self.case.bases)]

    def contestant(self, name: str) -> UntunedArm:
        """By name."""
        return next(c for c in self.contestants if c.name == name)


@functools.lru_cache(maxsize=16)
def build(blueprint: ExperimentSpec) -> Experiment:
    """The setup of a blueprint; leaves the number of threads alone."""
    threads = torch.get_num_threads()
    setup = build_experiment(blueprint.options)
    torch.set_num_threads(threads)
    return replace(setup, recipe=replace(setup.recipe, **dict(blueprint.recipe)))


def prepare(request: Request, case: regimes.Case) -> PreparedCase:
    """Build and check what a case needs.

    Raises:
        InputError: a setting or name is wrong, or data are missing and the case has no fallback.
    """
    notes: list[str] = []
    try:
        blueprint, threads = _blueprint(request, case, case.options)
    except InputError as error:
        if case.fallback is None or not isinstance(error.__cause__, FileNotFoundError):
            raise
        notes.append(f"{case.name}: {error}; run on the embedded data instead")
        blueprint, threads = _blueprint(request, case, case.fallback)
    setup = build(blueprint)
    budgets = request.budgets or (case.quick_budgets if request.quick else case.budgets)
    contestants, why_not = _contestants(request, case, blueprint, setup)
    return PreparedCase(
        case=case, setup=setup, threads=threads, budgets=tuple(sorted({1.0, *budgets})),
        sweep_seeds=sweep_seeds_of(request, case), contestants=contestants, notes=[*notes, *why_not],
        tune_budgets=request.tune_budgets and case.rate is None,
    )  # fmt: skip


def _blueprint(request: Request, case: regimes.Case, own: Mapping[str, Any]) -> tuple[ExperimentSpec, int]:
    """The case's blueprint, and how many threads suit its model."""
    total = torch.get_num_threads()
    options = Options(**{"task": case.task, **own, **request.options, "set": request.set})
    setup = build_experiment(replace(options, steps=request.steps))
    threads = torch.get_num_threads()
    torch.set_num_threads(total)
    if request.steps is None:
        options = replace(options, steps=regimes.num_steps(case, setup.task.steps_per_epoch, quick=request.quick))
    else:
        options = replace(options, steps=request.steps)
    recipe = dict(case.recipe)
    if request.lr_grid:
        recipe["lr_grid"] = request.lr_grid
    return ExperimentSpec(options, tuple(sorted(recipe.items()))), threads


def _contestants(
    request: Request, case: regimes.Case, blueprint: ExperimentSpec, setup: Experiment
) -> tuple[list[UntunedArm], list[str]]:
    """Plain, hybrids, jump of zero and peers, those that were asked for; and why others are left out."""
    recipe, fixed = setup.recipe, case.rate is not None
    grid = recipe.lr_grid or (recipe.lr,)
    if request.quick and not request.lr_grid:
        grid = case.quick_grid or regimes.trimmed(grid, recipe.lr, regimes.NUM_RATES_QUICK)
    shared = () if fixed else grid
    found = [UntunedArm(name="plain", kind="plain", blueprint=blueprint, grid=grid)]
    found.append(UntunedArm(name="hybrid", kind="hybrid", blueprint=blueprint, grid=shared))
    own_predictor = recipe.predictor if not request.options.get("predictor") else ""
    for name in dict.fromkeys((*case.sources, *predictors_of(request, own_predictor))):
        options = replace(blueprint.options, predictor=name)
        with as_input_error():
            config_of(options, recipe)
        found.append(
            UntunedArm(name=f"hybrid-{name}", kind="hybrid", blueprint=replace(blueprint, options=options), grid=shared)
        )
    found.append(UntunedArm(name="jump-of-zero", kind="jump-of-zero", blueprint=blueprint, grid=()))
    named = tuple(name for name in request.arms if name in BASELINES)
    notes = []
    for name in dict.fromkeys((*(case.quick_peers if request.quick else case.peers), *named)):
        peer = baseline_of(name)
        if why_not := peer.why_not(setup.task):
            notes.append(f"{case.name}: {name} left out: {why_not}")
            continue
        own = tuple(peer.grid(replace(recipe, lr_grid=grid)))
        kept = own if not fixed or name in regimes.RATE_FREE else ()
        found.append(UntunedArm(name=name, kind="peer", blueprint=blueprint, grid=kept, weights_only=peer.weights_only))
    if request.arms:
        known = {c.name for c in found} | set(BASELINES)
        for name in request.arms:
            if name not in known:
                raise InputError(str(unknown_name("arm", name, sorted(known))))
        found = [c for c in found if c.name == "plain" or c.name in request.arms]
    return found, notes


def predictors_of(request: Request, default: str) -> tuple[str, ...]:
    """Predictors that get an arm of their own beside ``hybrid``, which has the case's default.

    Raises:
        InputError: there is no such predictor.
    """
    named = tuple(name.removeprefix("hybrid-") for name in request.arms if name.startswith("hybrid-"))
    wanted = tuple(PREDICTORS) if "all" in request.predictors else request.predictors
    known = (*PREDICTORS, *SOURCES)
    for name in wanted:
        if name not in known:
            raise InputError(str(unknown_name("predictor", name, known)))
    asked = dict.fromkeys((*wanted, *(n for n in named if n in known)))
    return tuple(n for n in asked if n != default or n in named)


def seeds_of(request: Request, case: regimes.Case) -> tuple[int, ...]:
    """Of the judged runs of a case.

    Raises:
        InputError: one of them is a sweep's.
    """
    count = request.seeds or (regimes.NUM_SEEDS_QUICK if request.quick else regimes.NUM_SEEDS)
    first = case.first_seed if request.first_seed is None else request.first_seed
    if first + count > SWEEP_SEED_OFFSET:
        raise InputError(
            f"seeds {first} to {first + count - 1}: must be below {SWEEP_SEED_OFFSET}, from where sweeps take theirs"
        )
    return tuple(range(first, first + count))


def sweep_seeds_of(request: Request, case: regimes.Case) -> tuple[int, ...]:
    """Of a case's sweeps: from a fixed start, so that more judged seeds later leave the sweeps as they are."""
    default = case.sweep_seeds or (regimes.NUM_SWEEP_SEEDS_QUICK if request.quick else regimes.NUM_SWEEP_SEEDS)
    return tuple(SWEEP_SEED_OFFSET + i for i in range(request.sweep_seeds or default))


def tuned_budgets(p: PreparedCase) -> tuple[float, ...]:
    """Budgets of the plain arm at its tuned rate, where the case has another."""
    return () if p.case.rate is None else regimes.TUNED_BUDGETS


def arms_of(p: PreparedCase, chosen: Mapping[str, float]) -> list[tuple[Arm, UntunedArm, str]]:
    """All arms with their rates: (arm, contestant, kind as in the rows).

    Where the case's rate is a multiple of the tuned one, it serves every arm that has no sweep of its own
    and plain, whose sweep found the tuned one.
    """
    plain = p.contestant("plain")
    rate = chosen["plain"] * (p.case.rate or 1.0)
    found: list[tuple[Arm, UntunedArm, str]] = [(Arm(name="plain", kind="plain", lr=rate), plain, "plain")]
    for c in p.contestants:
        if c.kind != "plain":
            lr = chosen.get(c.name, rate)
            if c.kind == "jump-of-zero":
                lr = chosen.get("hybrid", rate)
            found.append((Arm(name=c.name, kind=c.kind, lr=lr), c, c.kind))
    for c, budget in itertools.product(p.curves, p.budgets):
        if budget != 1.0:
            name, own = f"{c.name}@{budget:g}", rate if c is plain else chosen.get(c.name, rate)
            found.append((Arm(name=name, kind=c.kind, lr=chosen.get(name, own), budget=budget), c, c.kind))
    for budget in tuned_budgets(p):
        arm = Arm(name=f"tuned@{budget:g}", kind="plain", lr=chosen["plain"], budget=budget)
        found.append((arm, plain, "tuned"))
    return found
