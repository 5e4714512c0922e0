"""A few dozen random scenarios; ``make scenarios`` runs ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import Scenario
from .world import Recipe, World, quietly


def test_random_scenarios() -> None:
    run_state_machine_as_test(
        Scenario,
        settings=settings(
            max_examples=24, stateful_step_count=6, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_a_broken_invariant_is_seen(tmp_path: Path) -> None:
    """The scenarios can fail."""
    world = World(Recipe(), tmp_path / "run")
    quietly(lambda: [world.step("noisy") for _ in range(6)])
    world.check()
    world.freeze(0)
    name = next(iter(world.frozen))
    with torch.no_grad():
        dict(world.made.model.named_parameters())[name].add_(1.0)
    with pytest.raises(AssertionError, match="is frozen and has moved"):
        world.check()
    world.frozen.clear()
    world.check()
    world.save()
    path = next(iter(world.saved))
    world.saved[path] = "another"
    with pytest.raises(AssertionError, match="not what was saved"):
        world.load(fresh=True)
