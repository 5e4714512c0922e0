"""Who owns which state of a run."""

from __future__ import annotations

import operator
import warnings

import pytest

from cases import config, setup
from hybrid_predict_trainer import former_names


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(former_names, "_said_attributes", set())
    return setup("norm_dropout", "adamw", "lambda").trainer(config()).run


@pytest.mark.parametrize("name", former_names.ATTRIBUTES)
def test_former_attributes_are_found_and_said_once(run, name: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.warns(DeprecationWarning, match=f"run.{name} is now run.{former_names.ATTRIBUTES[name]}"):
        found = getattr(run, name)
    assert found is operator.attrgetter(former_names.ATTRIBUTES[name])(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setattr(run, name, found)
    assert operator.attrgetter(former_names.ATTRIBUTES[name])(run) is found


def test_an_attribute_that_never_was_is_none(run) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = run.nothing
