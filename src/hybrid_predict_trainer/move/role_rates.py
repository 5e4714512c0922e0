"""Step sizes per role around an optimizer that knows only one: every role's step is multiplied by its factor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..keep.subject import Subject
from ..records import CheckpointError, ConfigError, StateDict
from ..weights.algebra import Move, without_graph
from ..weights.real_views import owner
from ..weights.shards import local_cut, size_of
from .modifier import StepModifier
from .prior import PRIORS_ORIGIN
from .recipe import Recipe, TableStep, decay_of

#: A factor of the embedding that the rate asks for is taken where it is below this share of the present one.
FALLEN = 0.99


class RoleRates(StepModifier):
    """Multiplies the step of every role by its factor in a recipe.

    For optimizers whose step is proportional to the rate (Adam's family, SGD, LAMB, Muon) this is what groups with
    rates of their own do, without touching the optimizer's groups, its schedule or its state.  Decoupled weight decay
    is left out of the factor: what pulls weights back stays what the user has set.

    Attributes:
        recipe: Factors by role.
    """

    remembers = False

    @classmethod
    def saved_with(cls, state: StateDict) -> str:
        """The setting."""
        return "step sizes by role (training.recipe)"

    def __init__(
        self, subject: Subject, recipe: Recipe, decays_by: Callable[[], float] = lambda: 1.0, *, adopts: str = "off"
    ) -> None:
        """Bind.

        Args:
            subject: What is trained.
            recipe: Factors by role.
            decays_by: What the schedule's rate times decoupled decay is multiplied by in the next step.
            adopts: The setting.  Where it leaves the choice to us, a run that is continued keeps the recipe that it was
                begun with: with ``"auto"`` any, with ``"prior"`` what that was then.
        """
        self._subject, self._decays_by, self._adopts = subject, decays_by, adopts
        self._optimizer = subject.optimizer
        self._before: dict[int, Tensor] = {}
        self._pull: dict[int, float] = {}  # share of a weight that decay takes away in this step
        self.recipe, self._ended = recipe, False
        self._parts: dict[int, list[tuple[Any, float]]] = {}  # by place of the parameter; factor 1 is left out
        self._take(recipe)

    @property
    def active(self) -> bool:
        """Whether a step is multiplied by anything but 1."""
        return bool(self._parts)

    def end(self) -> None:
        """Every role steps at the schedule's rate from here on."""
        self._ended, self._before, self._parts, self._passes = True, {}, {}, 0

    def _take(self, recipe: Recipe) -> None:
        """Go by a recipe from the next step on."""
        subject = self._subject
        self.recipe = recipe
        self._parts = {}
        for i, parameter in enumerate(subject.parameters):
            parts = recipe.parts_of(owner(parameter), subject.groups.roles[subject.groups.index[i]])
            if any(factor != 1.0 for _, factor in parts):
                self._parts[i] = [(local_cut(parameter, at), factor) for at, factor in parts if factor != 1.0]
        self._group_of = self._places()
        share = sum(size_of(subject.parameters[i]) for i in self._parts) / max(subject.groups.num_weights, 1)
        self._passes = 0 if not self._parts else round(2 * share) if share >= 0.25 else 1

    def _places(self) -> dict[int, int]:
        """Number of the optimizer's group of every parameter; the groups themselves are replaced by a load."""
        held = {id(p): g for g, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        parameters = self._subject.parameters
        owners = {i: id(owner(parameters[i])) for i in self._parts}
        return {i: held[of] for i, of in owners.items() if of in held}

    @without_graph
    def before_step(self, parameters: Sequence[Tensor]) -> int:
        """Keep the weights whose step is to be another."""
        self._follow_the_rate()
        self._before = {i: parameters[i].detach().clone() for i in self._parts}
        self._pull = {i: self._pull_of(i) for i in self._parts}
        return self._passes

    def _follow_the_rate(self) -> None:
        """The embedding's factor falls where the rate rises above the peak that it was chosen for, and stays there.

        No group tells the peak of rates that a loop writes, of a cycle, of a factor above 1, or of a schedule that is
        made after us.
        """
        table, groups = self.recipe.table, self._subject.groups
        if table is None or not self._parts:
            return
        held = {g for i, g in self._group_of.items() if groups.roles[groups.index[i]] == "embedding"}
        rate = max((float(self._optimizer.param_groups[g].get("lr", 0.0)) for g in held), default=0.0)
        if rate > 0 and table.factor(rate) < FALLEN * self.recipe.rate_of("embedding"):
            self._take(replace(self.recipe, rates={**self.recipe.rates, "embedding": table.factor(rate)}))

    def _pull_of(self, i: int) -> float:
        if i not in self._group_of:
            return 0.0
        group = self._optimizer.param_groups[self._group_of[i]]
        rate = group.get("lr", 0.0)
        return float(rate) * self._decays_by() * decay_of(self._optimizer, group)

    @without_graph
    def after_step(self, parameters: Sequence[Tensor]) -> int:
        """theta <- before + m (theta - before + pull before) - pull before, part by part."""
        before, self._before = self._before, {}
        for i, old in before.items():
            new = parameters[i]
            pull = self._pull.get(i, 0.0)
            for at, factor in self._parts[i]:
                kept = old[at]
                step = new[at] - kept
                if pull:
                    step.add_(kept, alpha=pull).mul_(factor).add_(kept, alpha=-pull)
                else:
                    step.mul_(factor)
                torch.add(kept, step, out=new[at])  # in one operation: an interruption finds a part moved or not
        return self._passes + 1 if before else 0

    def on_jump(self, delta: Move, scale: float) -> None:
        """No copy is held between steps."""

    def forget(self) -> None:
        """Nothing is remembered of the step under way."""
        self._before = {}

    def state_dict(self) -> StateDict:
        """The factors, so that a run goes on with those it was begun with, and whether they are still applied."""
        table = self.recipe.table
        return {
            "rates": {role: float(rate) for role, rate in self.recipe.rates.items()},  # a file has whole numbers
            "origin": self.recipe.origin,
            "ended": self._ended,
            "table_least": 0.0 if table is None else table.least,
            "table_length": 0.0 if table is None else table.length,
            "table_most": 0.0 if table is None else table.most,
        }

    def not_saved(self) -> None:
        """A run that was begun before there were recipes goes on without one, unless the user asks for it."""
        if self._adopts == "auto":
            self._take(Recipe({}, "no recipe: the run was begun without one"))

    def load_state_dict(self, state: StateDict) -> None:
        """Check that the run is continued with the same recipe.

        Raises:
            CheckpointError: it is another one.
        """
        self._before = {}
        same = dict(state["rates"]) == dict(self.recipe.rates)
        chosen = self._adopts == "auto" or (self._adopts == "prior" and str(state["origin"]).startswith(PRIORS_ORIGIN))
        if not same and not chosen:
            raise CheckpointError(
                f"the run was saved with the recipe {dict(state['rates'])} and is continued with "
                f"{dict(self.recipe.rates)}: set training.recipe to the one it was begun with"
            )
        self._ended = False
        least, length, most = (float(state[f"table_{name}"]) for name in ("least", "length", "most"))
        table = TableStep(least, length, most or math.inf) if least > 0 else None
        try:
            taken = self.recipe if same else Recipe(dict(state["rates"]), str(state["origin"]))
        except ConfigError as error:
            raise CheckpointError(f"the recipe of the run that was saved cannot be used: {error}") from error
        self._take(replace(taken, table=table))
        if state.get("ended", False):
            self.end()
