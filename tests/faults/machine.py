"""Random scenarios: Hypothesis draws a run and what happens to it, and shortens what breaks it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .world import ALL_MODELS, KINDS, MOTIONS, OPTIMIZER_NAMES, PREDICTORS, SCHEDULES, Recipe, World, quietly


class Scenario(RuleBasedStateMachine):
    """One run, from its making to wherever it gets."""

    world: World | None = None

    @initialize(
        recipe=st.builds(
            Recipe, model=st.sampled_from(ALL_MODELS), optimizer=st.sampled_from(OPTIMIZER_NAMES),
            schedule=st.sampled_from(SCHEDULES), predictor=st.sampled_from(PREDICTORS),
            motion=st.sampled_from(tuple(MOTIONS)), engine=st.booleans(),
        ),
        seed=st.integers(1, 50),
    )  # fmt: skip
    def begin(self, recipe: Recipe, seed: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix="scenario-"))
        self.folder = folder
        quietly(lambda: setattr(self, "world", World(recipe, folder / "run", seed)))

    def _do(self, name: str, *args: Any) -> None:
        assert self.world is not None
        world = self.world
        if not world.finished:
            quietly(lambda: getattr(world, name)(*args))

    @rule(kind=st.sampled_from(KINDS))
    def step(self, kind: str) -> None:
        self._do("step", kind)

    @rule(count=st.integers(2, 12), kind=st.sampled_from(("noisy", "same")))
    def steps(self, count: int, kind: str) -> None:
        for _ in range(count):
            self._do("step", kind)

    @rule(calls=st.integers(0, 6))
    def interrupt(self, calls: int) -> None:
        assert self.world is not None
        self.world.interrupt_in = calls
        for _ in range(3):
            self._do("step", "noisy")
        self.world.interrupt_in = -1

    @rule()
    def save(self) -> None:
        self._do("save")

    @rule()
    def save_behind(self) -> None:
        self._do("save_behind")

    @rule(fresh=st.booleans())
    def load(self, fresh: bool) -> None:
        self._do("load", fresh)

    @rule(damage=st.integers(0, 20))
    def load_latest(self, damage: int) -> None:
        self._do("load_latest", damage)

    @rule(which=st.integers(0, 5))
    def freeze(self, which: int) -> None:
        self._do("freeze", which)

    @rule()
    def thaw(self) -> None:
        self._do("thaw")

    @rule(factor=st.sampled_from((0.1, 0.5, 2.0, 10.0)))
    def scale_rate(self, factor: float) -> None:
        self._do("scale_rate", factor)

    @rule()
    def write_weights(self) -> None:
        self._do("write_weights")

    @rule()
    def add_group(self) -> None:
        self._do("add_group")

    @rule()
    def validate(self) -> None:
        self._do("validate")

    @rule()
    def copy(self) -> None:
        self._do("copy")

    @rule(steps=st.integers(0, 5))
    def force(self, steps: int) -> None:
        self._do("force", steps)

    @rule()
    def summary(self) -> None:
        self._do("summary")

    @precondition(lambda self: self.world is not None)
    @invariant()
    def what_has_to_hold(self) -> None:
        assert self.world is not None
        self.world.check()

    def teardown(self) -> None:
        if self.world is not None:
            quietly(self.world.close)
        if getattr(self, "folder", None) is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
