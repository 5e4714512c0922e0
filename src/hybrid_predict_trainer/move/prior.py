"""Which recipe a run has: the prior that was measured with its optimizer, or what the settings name.

The prior is a table of factors by role for networks of blocks that were never trained (LOG.md).  What the size of a
table of embeddings, or the peak of the schedule, makes of its factor is worked out here, before any step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..records import ConfigError
from ..weights.parameters import Groups, untrained
from ..weights.real_views import owner
from ..weights.shards import rms_over, size_of
from .group_warmup import is_inside_a_block
from .recipe import Recipe, TableStep, roles_in

#: Factors for networks whose blocks were never trained; every other role keeps the schedule's rate.
PRIOR = {"head": 8.0, "embedding": 4.0, "attention_q": 3.0, "attention_k": 3.0}
#: The same where Muon steps the hidden matrices as far as Adam would, and Adam the rest at the same rate.  The head
#: needs no more there, and queries and keys bear more only where they are normalised (LOG.md).
PRIOR_BESIDE_MUON = {"embedding": 8.0}
#: With which a table steps by no more than this at the peak of the schedule, in units of its weights (LOG.md).
MOST_TABLE_STEP_BESIDE_MUON = 0.1
#: At the peak of the schedule a table of embeddings steps by at least this share of its root mean square: a rate that
#: is too low for the whole network is so for the table first, and can be told there before any step (LOG.md).
LEAST_TABLE_STEP = 0.01
#: Where the prior's numbers are from, and what follows there where it is the one beside Muon.
PRIORS_ORIGIN, BESIDE_MUON = "prior of untrained networks of blocks", ", beside Muon"
#: Optimizers with which the prior was measured, by name.
MEASURED_WITH = ("Adam", "AdamW")


def measured_factors(optimizer: Optimizer, step: str = "optimizer") -> Mapping[str, float] | None:
    """The prior's factors that were measured with an optimizer; None: none were.

    Args:
        optimizer: Adam and AdamW go by their names.  Muon is known by its groups: torch's say that its step is brought
            to the length of Adam's (``adjust_lr_fn``), and all others must be Adam's (``betas``), at least one.  Of any
            other length nothing was measured.
        step: Who steps the hidden matrices in Adam's place (``training.step``).
    """
    if type(optimizer).__name__ in MEASURED_WITH:
        return {"optimizer": PRIOR, "muon": PRIOR_BESIDE_MUON}.get(step)
    if step != "optimizer":
        return None
    of_muon = [_is_muons(group) for group in optimizer.param_groups]
    of_adam = ["betas" in group for group in optimizer.param_groups]
    known = all(muon != adam for muon, adam in zip(of_muon, of_adam, strict=True))
    return PRIOR_BESIDE_MUON if known and any(of_muon) and any(of_adam) else None


def prior(parameters: list[Tensor], groups: Groups, factors: Mapping[str, float] = PRIOR) -> Recipe:
    """The recipe for a network of blocks that was never trained; for any other all factors are 1.

    Measured on language models with a head of its own, drawn or of zeros, and on one whose head is its embedding, which
    then has the factor of an embedding (LOG.md).

    Args:
        parameters: That are trained.
        groups: Their names and roles.
        factors: By role (:func:`measured_factors`).
    """
    inside = [is_inside_a_block(role) for role in groups.roles]
    if not any(inside) or all(inside):
        return Recipe({}, "no recipe: the network has no attention or MLP blocks that are trained with what is around")
    if not untrained(parameters, groups.names):
        return Recipe({}, "no recipe: the network has been trained before, or nothing tells that it has not")
    present = roles_in(groups)
    rates = {role: rate for role, rate in factors.items() if role in present}
    return Recipe(rates, PRIORS_ORIGIN + (BESIDE_MUON if factors is PRIOR_BESIDE_MUON else ""))


def with_moving_table(
    recipe: Recipe, parameters: list[Tensor], groups: Groups, peak_rate: float, most: float = math.inf
) -> Recipe:
    """The embedding's factor where its steps would be too short for its size, or too long; any other recipe as it is.

    A step of Adam is as long as the rate, whatever the size of what it moves.  Tables drawn with deviation 1, as
    ``nn.Embedding`` draws them, need more than those of deviation 0.02.

    Args:
        recipe: The prior, or its ratios around another head.
        parameters: That are trained, on any device; of sharded ones all ranks come here.
        groups: Their names and roles.  Where no head trains beside the table nothing was measured.
        peak_rate: Largest learning rate of the schedule; 0: not known, and nothing is raised.
        most: Bound on a step at the peak, in units of the weights.
    """
    if "embedding" not in recipe.rates or "head" not in groups.roles:
        return recipe
    if not peak_rate > 0:
        bounded = TableStep(recipe.rates["embedding"], 0.0, most)
        return replace(recipe, table=bounded) if most < math.inf else recipe
    role = groups.roles.index("embedding")
    tables = [p for p, row in zip(parameters, groups.index, strict=True) if row == role and size_of(p)]
    sizes = [rms_over([table], [table.detach()])[0] for table in tables]
    drawn = [size for size in sizes if size > 0]  # positions may begin at zero
    table = TableStep(recipe.rates["embedding"], LEAST_TABLE_STEP * min(drawn, default=0.0), most)
    factor = table.factor(peak_rate)
    raised = factor > table.least  # or not a number
    if not raised and most == math.inf:
        return recipe
    origin = recipe.origin + ("; the embedding steps by up to a hundredth of its size" if raised else "")
    return replace(recipe, rates={**recipe.rates, "embedding": factor}, origin=origin, table=table)


def with_table_for(
    recipe: Recipe, optimizer: Optimizer, parameters: list[Tensor], groups: Groups, factors: Mapping[str, float]
) -> Recipe:
    """:func:`with_moving_table` for the peak that an optimizer's groups tell.

    Args:
        recipe: A prior, or its ratios around another head.
        optimizer: Whose schedule it is.
        parameters: That are trained.
        groups: Their names and roles.
        factors: What was measured with this optimizer (:func:`measured_factors`).
    """
    most = MOST_TABLE_STEP_BESIDE_MUON if factors is PRIOR_BESIDE_MUON else math.inf
    return with_moving_table(recipe, parameters, groups, peak_rate_of(optimizer), most)


def peak_rate_of(optimizer: Optimizer) -> float:
    """Largest learning rate of the schedule that was put on an optimizer, as far as its groups say; else its rate.

    A schedule may rise above it: its factor may be above 1, and a cycle's upper end is in no group.
    """
    known = ("max_lr", "initial_lr", "lr")  # OneCycleLR's peak; where any other began; no schedule
    said = [group.get(key) for group in optimizer.param_groups for key in known]
    # keys of the user's own may hold anything
    rates = [float(rate) for rate in said if isinstance(rate, Real) or (isinstance(rate, Tensor) and rate.numel() == 1)]
    return max(rates, default=0.0)


def _beside_muon(optimizer: Optimizer, parameters: list[Tensor], groups: Groups, shared: bool) -> str:
    """What in a network that Muon trains is not as it was measured; nothing: it is."""
    if "head" not in groups.roles or shared:  # it ended 1 % higher (LOG.md)
        return "Muon steps the matrices, and no head trains that is not the embedding"
    held = {id(p) for group in optimizer.param_groups if _is_muons(group) for p in group["params"]}
    roles = {groups.roles[row] for p, row in zip(parameters, groups.index, strict=True) if id(owner(p)) in held}
    return "Muon steps the embedding or the head as well" if roles & {"embedding", "head"} else ""


def _is_muons(group: Mapping[str, Any]) -> bool:
    return bool(group.get("adjust_lr_fn") == "match_rms_adamw")


def for_run(
    asked: str, optimizer: Optimizer, parameters: list[Tensor], groups: Groups, step: str = "optimizer", *,
    shared: bool = False,
) -> Recipe:  # fmt: skip
    """What ``training.recipe`` names: ``"auto"``, ``"off"``, ``"prior"``, or a file.

    ``"auto"`` is the prior where it was measured: with Adam or AdamW at one rate for all of its groups, and with Muon
    beside them (:func:`measured_factors`).

    Args:
        asked: The setting.
        optimizer: Its groups are looked at, and its name.
        parameters: That are trained.
        groups: Their names and roles.
        step: Who steps the hidden matrices in the optimizer's place (``training.step``).
        shared: Another layer holds the table of embeddings as well (:func:`.table_is_shared`).

    Raises:
        ConfigError: the file cannot be read, or names a role that this network has not.
    """
    if asked == "off":
        return Recipe({}, "off")
    factors = measured_factors(optimizer, step)
    if asked == "prior":
        return prior(parameters, groups, factors or PRIOR)
    if asked == "auto":
        if factors is None:
            stepped = "" if step == "optimizer" else f' and training.step = "{step}"'
            return Recipe({}, f"no recipe: not measured with {type(optimizer).__name__}{stepped}")
        if len({float(group["lr"]) for group in optimizer.param_groups if "lr" in group}) != 1:
            return Recipe({}, "no recipe: the optimizer's groups have rates of their own")
        unlike = _beside_muon(optimizer, parameters, groups, shared) if factors is PRIOR_BESIDE_MUON else ""
        if unlike:
            return Recipe({}, f"no recipe: {unlike}")
        found = prior(parameters, groups, factors)
        return found if shared else with_table_for(found, optimizer, parameters, groups, factors)
    found = Recipe.load(asked)
    foreign = sorted(set(found.rates) - roles_in(groups))
    if foreign:
        there = ", ".join(groups.roles)
        raise ConfigError(f"recipe {asked}: this network has no parameters of the role {foreign[0]!r}; it has {there}")
    return found
