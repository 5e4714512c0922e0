"""The optimizer's step, and what of ours is around it: multiplier and lookahead, and the end of both.

In this order: the multiplier keeps the weights and shortens groups, the lookahead keeps the weights, modifiers that
were handed in have their turn; the optimizer steps at the schedule's rate times the multiplier; modifiers again, the
multiplier measures the step, the lookahead moves on along the drift.

What raises in them (no memory for a copy of the weights, say) ends no run: the step is the optimizer's own then, and
after three times it is so for the rest of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Generator, Tensor

from ..config.settings import HybridTrainerConfig
from ..judge.switchback import NUM_LOSSES, Switchback
from ..keep.failures import Failures, Place
from ..keep.object_state import HasState
from ..keep.subject import Subject
from ..observe.history import Losses
from ..records import CheckpointError, StateDict
from ..weights.algebra import LARGE, Move
from ..weights.parameters import head_is_table, pretrained, table_is_shared, untrained
from ..weights.trained import Watch
from .drift_storage import Storage
from .group_warmup import LEAST_BEHIND_TABLE, is_inside_a_block
from .lookahead import DriftLookahead, Lookahead, NoLookahead
from .lr_multiplier import CHECK_STEPS, LrMultiplier
from .matrix_step import MatrixStep
from .modifier import StepModifier
from .multiplier import UNTOLD_BY_SGD, chooses_its_rate, orthogonalizes
from .overflow import ScaleSearch
from .prior import for_run
from .recipe import Recipe
from .role_rates import RoleRates
from .schedule import LrSchedule
from .unit_multiplier import Multiplier, UnitMultiplier


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What is around the optimizer's step.

    Attributes:
        scale: The multiplier, or one that stays at 1.
        lookahead: Or one that does nothing.
        switchback: Its trial.
        drifts: The lookahead replaces a part of a step by the drift, beside shortening all steps.
        of_settings: What else the settings ask for, in the order of their turns before the step; after it they come in
            reverse.
        modifiers: What was handed in, whose turn is after those.
        decay_follows: Decoupled weight decay is multiplied with the rate.
    """

    scale: Multiplier
    lookahead: Lookahead
    switchback: Switchback
    drifts: bool
    of_settings: Sequence[StepModifier] = ()
    modifiers: Sequence[StepModifier] = ()
    decay_follows: bool = False


class OptimizerStep:
    """One step of the optimizer, with what is around it.

    Attributes:
        scale: Learned multiple of the schedule's rate, and shorter first steps by group.
        lookahead: Slow drift carried on between steps.
        switchback: The lookahead's trial.
        scale_search: Whether a gradient scaler is still looking for its scale.
        modifiers: What else is around the step.
    """

    def __init__(
        self, subject: Subject, watch: Watch, schedule: LrSchedule, around: Around, failures: Failures
    ) -> None:
        """Bind; no memory is taken before the first step.

        Args:
            subject: What is trained.
            watch: Which of its parameters may be moved.
            schedule: Of the learning rate.
            around: What has its turn before and after.
            failures: Count what raises.
        """
        self.scale, self.lookahead, self.switchback = around.scale, around.lookahead, around.switchback
        self.scale_search = ScaleSearch(subject.grad_scaler)
        self._subject, self._watch, self._schedule, self._failures = subject, watch, schedule, failures
        self._drifts, self._decay_follows = around.drifts, around.decay_follows
        self.modifiers = (*around.of_settings, *around.modifiers)
        self._of_settings = {type(m).__name__: m for m in around.of_settings}
        self._handed_in = tuple(around.modifiers)
        self._awaited: list[StepModifier] = []  # had their turn before the optimizer's step, not yet after it

    @property
    def _idle(self) -> bool:
        """Whether the lookahead moves nothing, and what it would remember of a large model is not worth its memory."""
        return self._subject.groups.num_weights > LARGE and not self._schedule.anneals

    # ---- the step ---------------------------------------------------------------------------------------

    def before(self, *, exact: bool) -> int:
        """Between backward and the optimizer's step; returns passes over the weights.

        Args:
            exact: Losses are exact.

        Raises:
            Exception: whatever a copy of the weights raises; :meth:`forget` is to follow.
        """
        if self._failures.exhausted(Place.MOTION):
            return 0
        parameters = self._subject.parameters
        passes = self.scale.measure(parameters) + self.scale.before_step(parameters)
        if not exact and not self.switchback.switched_off and not self._idle:
            passes += self.lookahead.before_step(parameters)
        self._awaited = []
        for modifier in self.modifiers:
            passes += modifier.before_step(parameters)
            self._awaited.append(modifier)
        return passes

    def step(self, position: int) -> None:
        """The optimizer steps, at the schedule's rate times the multiplier.

        Args:
            position: Of the run on its clock, before this step.
        """
        optimizer, scaler = self._subject.optimizer, self._subject.grad_scaler
        with (
            self._schedule.applied(optimizer, position),
            self.scale.applied(optimizer, decay_follows=self._decay_follows),
        ):
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()

    def rates(self, position: int) -> ExitStack:
        """The same rates, for a loop that steps the optimizer itself: they stand until the stack is closed."""
        stack = ExitStack()
        with stack:
            stack.enter_context(self._schedule.applied(self._subject.optimizer, position))
            stack.enter_context(self.scale.applied(self._subject.optimizer, decay_follows=self._decay_follows))
            return stack.pop_all()

    def after(self, rate: float, *, exact: bool, resting: bool) -> int:
        """After the optimizer's step; returns passes over the weights.

        Args:
            rate: The schedule's, of this step.
            exact: Losses are exact.
            resting: All motions are to rest, because the guard compares.

        Raises:
            Exception: whatever a copy of the weights raises; :meth:`forget` is to follow.
        """
        if self._failures.exhausted(Place.MOTION):
            return 0
        return self.measure() + self.look_ahead(rate, exact=exact, resting=resting)

    def measure(self) -> int:
        """Let the modifiers have their turn and the multiplier look at the step; returns passes over the weights."""
        passes = 0
        while self._awaited:  # an interrupted step is carried to its end: nobody has two turns
            passes += self._awaited.pop().after_step(self._subject.parameters)
        return passes + self.scale.after_step(self._subject.parameters)

    def look_ahead(self, rate: float, *, exact: bool, resting: bool) -> int:
        """Replace part of what was computed by the drift, and move on along it; returns passes over the weights.

        Where losses are exact the gate finds longer jumps than this at once.  A rate that still rises has no drift
        worth going on with, and one that the learned scale is making up for, because it is far too small, no swing to
        take out.  Without the drift kappa shortens all steps, which is not what a scale lengthened them for.
        """
        if self.switchback.switched_off or self._idle or (exact and self.lookahead.num_steps <= 1):
            self.lookahead.forget()  # of the first batch nobody could tell that all are the same
            return 0
        rising, peak = rate > self._schedule.peak, max(rate, self._schedule.peak)
        lengthened = self.scale.growing if self._drifts else self.scale.value > 1
        pull = 0.0 if lengthened or exact else 1.0
        strength = 0.0 if rising or exact or peak <= 0 else rate / peak
        if pull > 0 or strength > 0:
            self.switchback.on_motion()
        if not self.switchback.moving or resting or not self._schedule.anneals:
            pull = strength = 0.0
        passes = self.lookahead.after_step(
            self._subject.parameters, rate * self.scale.value, pull=pull, strength=strength, along=self.scale.held,
            movable=self._watch.trained.movable,
        )  # fmt: skip
        self._schedule.update_peak(rate)  # not before: an interrupted application is done again with the same numbers
        return passes

    # ---- what happens ------------------------------------------------------------------------------------

    def on_jump(self, delta: Move, scale: float) -> None:
        """The weights have moved by ``scale * delta``."""
        self.lookahead.translate(delta, scale)
        for modifier in self.modifiers:
            modifier.on_jump(delta, scale)
        self._forget_steps()

    def on_restore(self, mark: StateDict | None) -> None:
        """The weights are earlier ones again: the lookahead's own memory came back with them, and the modifiers'."""
        for modifier in self.modifiers:
            modifier.on_restore()
        self._forget_steps()

    def on_overwrite(self) -> None:
        """The weights are others than any that were seen."""
        for modifier in self.modifiers:
            modifier.forget()
        self._forget_steps()

    def _forget_steps(self) -> None:
        """No test may span this moment."""
        self.switchback.on_jump()
        self.scale.forget()

    def on_touch(self) -> None:
        """The weights were written to and are the same, as far as can be told."""
        self.scale.forget()
        self.lookahead.follow(self._subject.parameters)

    def on_skip(self) -> None:
        """The step is left out."""
        for modifier in self._awaited:
            modifier.on_skip()
        self._awaited = []
        self.scale.forget()

    def on_loss(self, losses: Losses, generator: Generator) -> None:
        """A real step was read: the lookahead's trial looks at it.

        Where losses are read late a block ends when all of its own are there.
        """
        if self.lookahead.num_steps and self.switchback.count_step() and not losses.readout.waiting:
            self.switchback.close_block(losses.newest(NUM_LOSSES), generator)

    def forget(self) -> None:
        """Multiplier, lookahead or a modifier failed: all begin anew, the multiplier at 1."""
        self._awaited = []
        for modifier in self.modifiers:
            modifier.forget()
        self.scale.forget()
        self.scale.level()
        self.lookahead.forget()
        self.switchback.on_jump()

    def end_steering(self) -> None:
        """No multiplier, no cuts, no step sizes by role and no lookahead from here on."""
        for modifier in self._of_settings.values():
            modifier.end()
        self.scale.withdraw(for_good=True)
        self.scale.end_cuts()
        self.lookahead.forget()
        self.switchback.switch_off()

    @property
    def with_weights(self) -> list[HasState]:
        """What a copy of weights and optimizer state is not whole without."""
        return [self.lookahead, *(m for m in self.modifiers if m.remembers)]

    @property
    def recipe(self) -> Recipe:
        """Step sizes by role, and what the multiplier makes of all of them."""
        own = Recipe({}, "one rate for all roles") if self._rates is None else self._rates.recipe
        return replace(own, multiplier=self.scale.learned)

    @property
    def _rates(self) -> RoleRates | None:
        return next((m for m in self._of_settings.values() if isinstance(m, RoleRates)), None)

    @property
    def moving(self) -> bool:
        """Whether anything here has a hand in the weights or in their rate."""
        drifting = self.lookahead.num_steps > 0 and not self.switchback.switched_off
        by_role = self._rates is not None and self._rates.active
        return drifting or by_role or self.scale.learned > 1 or self.scale.shortening

    # ---- state --------------------------------------------------------------------------------------------

    def memory_bytes(self) -> dict[str, int]:
        """Bytes by part; nothing of a part that holds none."""
        parked = "_host" if isinstance(self.lookahead, DriftLookahead) and self.lookahead.storage.to_host else ""
        found = {"scale": self.scale.memory_bytes(), f"lookahead{parked}": self.lookahead.memory_bytes()}
        found["modifiers"] = sum(m.memory_bytes() for m in self.modifiers)
        return {name: size for name, size in found.items() if size}

    def state_dict(self) -> StateDict:
        """Plain containers and tensors."""
        return {
            "scale": self.scale.state_dict(), "lookahead": self.lookahead.state_dict(),
            "switchback": self.switchback.state_dict(), "modifiers": [m.state_dict() for m in self._handed_in],
            "of_settings": {name: m.state_dict() for name, m in self._of_settings.items()},
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`.

        What a setting has switched on since begins anew.

        Raises:
            CheckpointError: other modifiers were handed in, or a setting has switched one off since.
        """
        found = state.get("modifiers", [])
        if len(found) != len(self._handed_in):
            raise CheckpointError(
                f"the run was saved with {len(found)} step modifiers and is continued with {len(self._handed_in)}: "
                "hand in the same ones, in the same order (modifiers=[...])"
            )
        for modifier, own in zip(self._handed_in, found, strict=True):
            modifier.load_state_dict(own)
        saved = state.get("of_settings", {})
        gone = sorted(saved.keys() - self._of_settings.keys())
        if gone:
            since = {name: own for name, own in self._of_settings.items() if name not in saved}
            raise CheckpointError(" ".join(_asked_for_no_more(name, saved[name], since) for name in gone))
        for name, own in self._of_settings.items():
            if name in saved:
                own.load_state_dict(saved[name])
            else:
                own.not_saved()
        self.scale.load_state_dict(state["scale"])
        self.lookahead.load_state_dict(_placed(state["lookahead"], self._subject.parameters))
        self.switchback.load_state_dict(state["switchback"])


def recipe_for(subject: Subject, watch: Watch, config: HybridTrainerConfig) -> Recipe | None:
    """Step sizes by role that the settings ask for; None where only the optimizer may move weights.

    Raises:
        ConfigError: ``training.recipe`` names a file that cannot be read, or that is not of this network.
    """
    nothing_of_ours = config.never_predicts and config.recipe == "auto"
    if not config.enabled or watch.hands_off is not None or config.recipe == "off" or nothing_of_ours:
        return None
    return for_run(
        config.recipe, subject.optimizer, subject.parameters, subject.groups, config.step,
        shared=table_is_shared(subject.model),
    )  # fmt: skip


def modifiers_for(
    subject: Subject, recipe: Recipe | None, config: HybridTrainerConfig, scale: Multiplier, schedule: LrSchedule
) -> list[StepModifier]:
    """What is around every step beside multiplier and lookahead, in the order of their turns.

    Each is of a class of its own, whose name its state goes by in a checkpoint.

    Args:
        subject: What is trained.
        recipe: Step sizes by role; None: they are not asked for.
        config: Settings.
        scale: The multiplier of all steps.
        schedule: Whose rates recovery may have lowered.
    """
    found: list[StepModifier] = []

    def decays_by() -> float:
        return schedule.factor * (scale.value if config.decay_follows_multiplier else 1.0)

    if recipe is not None:
        found.append(RoleRates(subject, recipe, decays_by, adopts=config.recipe))
    if config.enabled and config.step != "optimizer":
        found.append(MatrixStep(subject, config.step, lambda: scale.value * schedule.factor, decays_by))
    return found


def multiplier_for(
    subject: Subject, watch: Watch, config: HybridTrainerConfig, recipe: Recipe | None, generator: Generator, *,
    anneals: bool,
) -> Multiplier:  # fmt: skip
    """The learned multiplier, or one that stays at 1.

    It raises the noise that weights settle with, and counts on a schedule to take it out again.

    Args:
        subject: What is trained.
        watch: Where only the optimizer may move weights no group is shortened.
        config: Settings.
        recipe: Step sizes by role; None: there are none.
        generator: Draws its controls.
        anneals: There is a schedule.
    """
    least = config.min_group_factor if watch.hands_off is None else 1.0
    if config.never_predicts or not anneals or not (config.max_lr_multiplier > 1 or least < 1):
        return UnitMultiplier()
    groups, by_role = subject.groups, recipe is not None and not recipe.empty
    drawn = untrained(subject.parameters, groups.names)
    if least < 1 and drawn and by_role and "head" not in groups.roles and head_is_table(subject.model):
        # a table that is the head steps further by the recipe, and blocks that begin too slowly behind it lose (LOG.md)
        least = max(least, LEAST_BEHIND_TABLE)
    # on an accelerator a check waits for the device: as often as losses are read, no more
    steps = CHECK_STEPS if subject.on_cpu else max(CHECK_STEPS, config.divergence.check_interval_steps)
    most = config.max_lr_multiplier
    if config.step == "muon" or orthogonalizes(subject.optimizer):
        # what is equally long in every direction does not tell how long it should be: it is neither raised nor cut
        most = least = 1.0
    elif chooses_its_rate(subject.optimizer):
        most = 1.0  # its estimate grows by itself where steps are too short
    made = LrMultiplier(
        groups, most, least, steps, untrained=drawn,
        pretrained=pretrained(subject.model), holdout_fraction=config.block_holdout, generator=generator,
    )  # fmt: skip
    if type(subject.optimizer).__name__ == "SGD":
        made.halve_down_to(UNTOLD_BY_SGD)
    return made


def lookahead_for(subject: Subject, config: HybridTrainerConfig, *, observing: bool, anneals: bool) -> Lookahead:
    """The lookahead, or one that does nothing; it counts on a schedule as the multiplier does."""
    # it gains on networks of blocks; physics-informed ones, and SGD over epochs, are the worse for it (LOG.md)
    suited = config.lookahead.scope == "all" or any(is_inside_a_block(role) for role in subject.groups.roles)
    asked = config.lookahead.extrapolation > 0 or config.lookahead.damping > 0
    if config.never_predicts or not anneals or not (observing and suited and asked):
        return NoLookahead()
    storage = Storage(narrow=subject.groups.num_weights > LARGE, to_host=config.predictor.offload)
    asked_for = config.lookahead
    return DriftLookahead(asked_for.extrapolation, asked_for.damping, asked_for.drift, storage=storage)


#: What settings ask for, by the name under which a checkpoint holds its state.
_ASKED_FOR: dict[str, type[StepModifier]] = {kind.__name__: kind for kind in (RoleRates, MatrixStep)}


def _asked_for_no_more(name: str, saved: StateDict, present: Mapping[str, StepModifier]) -> str:
    """What to set, in the user's words; what has taken its place is named as well."""
    kind = _ASKED_FOR.get(name)
    if kind is None:
        return f"the run was saved with {name} around the optimizer's step, which this version does not know"
    instead = [m.saved_with(m.state_dict()) for m in present.values()]
    line = f"the run was saved with {kind.saved_with(saved)}, and is continued without"
    return line + (f" but with {' and '.join(instead)}" if instead else "") + ": set what its settings said"


def _placed(state: StateDict, parameters: Sequence[Tensor]) -> StateDict:
    """Lists of one tensor per parameter brought to its device: those of a checkpoint are in host memory."""

    def moved(value: Any) -> Any:
        per_parameter = isinstance(value, list) and len(value) == len(parameters)
        if not per_parameter:
            return value
        return [
            {name: part.to(p.device) for name, part in t.items()} if isinstance(t, dict) else t.to(p.device)
            for t, p in zip(value, parameters, strict=True)
        ]

    return {name: moved(value) for name, value in state.items()}
