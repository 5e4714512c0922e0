"""Who owns which state of a run: only an owner's own methods assign what it holds."""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

import hybrid_predict_trainer
from cases import Fake, config, full_batch, make_batches, setup
from hybrid_predict_trainer import former_names
from hybrid_predict_trainer.cycle import inputs as inputs_module
from hybrid_predict_trainer.cycle.inputs import inputs, preview_proposal
from hybrid_predict_trainer.cycle.state import State
from hybrid_predict_trainer.move.optimizer_step import OptimizerStep
from hybrid_predict_trainer.observe.window import WindowRecorder
from hybrid_predict_trainer.records import Phase

ROOT = Path(hybrid_predict_trainer.__file__).parent
#: What is built on the core keeps its own records.
OUTER = ("integrations", "tasks", "experiments", "cli", "__main__.py")
CORE = [p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0] not in OUTER]

#: What may be assigned on something else than ``self``: torch's own, or a record that its maker fills in.
ALLOWED = {
    "optimizer.grad_scale": "torch's own, from a scaler to a fused optimizer",
    ".grad": "of a parameter", ".training": "of a module", "drawn.bit_generator.state": "numpy's",
    "view.base": "where a view is made", "made.": "a fingerprint, where it is made", "current.digest": "likewise",
    "walk.": "a walk over an object, by whoever walks", "self._walk.stay": "likewise",
    "self._pending[-1].": "a forecast that waits to be scored, in the list of the one that assigns",
    "account.checks_left": "a raise under way, in the list of the one that assigns",
    "arm.": "an arm, in the table of the one that assigns", "self.arms[name].": "likewise", "former.due": "likewise",
    "outcome.": "what came of the step under way, by the functions that take it",
    "control.should_": "transformers' way for a callback to ask",
    "setattr(trainer, name, value)": "a framework's own figures are put back",
    "setattr(owner, name, ": "a method of a framework's object is replaced, and put back",
    "delattr(owner, name)": "likewise",
    "setattr(holder, name, value)": "a memento puts back what was there",
    "object.__setattr__(value, name, new)": "a checkpoint is read into an object of the user's",
    "setattr(home, name, value)": "a former module sets a name where it is today",
    "norm.momentum": "torch's own, while batch statistics are estimated anew, and put back",
    "trainer.args.average_tokens_across_devices": "transformers' own, put back behind the block",
    "trainer.should_stop": "Lightning's, which stops its own loop by it",
    "stand_in.param_groups": "of the stand-in that a schedule is asked ahead with, where it is made",
    "setattr(cls, former, ": "a class of settings is given its former names where it is decorated",
    "setattr(operator.attrgetter(owner)(self) if owner else self, last, value)": "a former name of an attribute",
}  # fmt: skip


def _attributes(target: ast.AST) -> Iterator[ast.Attribute]:
    if isinstance(target, ast.Tuple | ast.List):
        for element in target.elts:
            yield from _attributes(element)
    elif isinstance(target, ast.Starred):
        yield from _attributes(target.value)
    elif isinstance(target, ast.Attribute):
        yield target


def assigned_elsewhere(source: str) -> list[str]:
    """Attributes that a module assigns on anything but ``self`` and ``cls``, as they stand there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets: list[ast.AST] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets += node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.NamedExpr):
            targets.append(node.target)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            targets.append(node.optional_vars)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "object.__setattr__", "delattr"):
            found += [ast.unparse(node)] if ast.unparse(node.args[0]) != "self" else []
        attributes = [a for target in targets for a in _attributes(target)]
        found += [ast.unparse(a) for a in attributes if ast.unparse(a.value) not in ("self", "cls")]
    return found


def is_allowed(place: str) -> bool:
    return any(place.endswith(a) if a[0] == "." else place.startswith(a) for a in ALLOWED)


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(ROOT)))
def test_nobody_assigns_what_another_owns(path: Path) -> None:
    strange = [place for place in assigned_elsewhere(path.read_text(encoding="utf-8")) if not is_allowed(place)]
    assert not strange, f"{path.relative_to(ROOT)} assigns {strange}: give the owner a method that says what happened"


def test_every_exception_is_needed() -> None:
    places = [place for path in CORE for place in assigned_elsewhere(path.read_text(encoding="utf-8"))]
    assert {a for a in ALLOWED if not any(p.endswith(a) if a[0] == "." else p.startswith(a) for p in places)} == set()


@pytest.mark.parametrize(
    "line",
    [
        "run.phases.current = 1", "run.meter.num_steps += 1", "run.probation = None", "self.run.horizon = 3",
        "a, run.windows.loss = 1, 2", "*run.rest, b = x", "run.judge.ledger.spent_units: float = 0.0",
        "for run.phases.current in x: pass", "with x as run.held: pass", "del run.held", "setattr(run, 'held', [])",
        "probation.claimed += 1", "self.judge.probation = None",
    ],
)  # fmt: skip
def test_an_assignment_to_another_owner_is_seen(line: str) -> None:
    (place,) = assigned_elsewhere(line)
    assert not is_allowed(place)


# ---------------------------------------------------------------- events


class Told:
    """Counts how often each event reaches a part."""

    EVENTS = ("on_jump", "on_restore", "on_overwrite")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: State) -> None:
        self.heard: list[tuple[str, str]] = []
        for part in (run.windows, run.optimizer_step):
            for event in self.EVENTS:
                monkeypatch.setattr(part, event, partial(self._tell, getattr(part, event), type(part).__name__, event))

    def _tell(self, inner: Callable[..., None], part: str, event: str, *args: object) -> None:
        self.heard.append((part, event))
        inner(*args)


PARTS = (WindowRecorder.__name__, OptimizerStep.__name__)


def test_everything_that_remembers_weights_hears_of_a_jump_and_of_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = setup("mlp").trainer(config(), predictor=Fake())
    told = Told(monkeypatch, trainer.run)
    monkeypatch.setattr("hybrid_predict_trainer.cycle.correct_step.probation_passes", lambda probation, sigma: False)
    for batch in full_batch(40):
        trainer.step(batch)
        if trainer.run.meter.num_rollbacks:
            break
    assert told.heard == [(part, event) for event in ("on_jump", "on_restore") for part in PARTS]


def test_everything_that_remembers_weights_hears_of_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = setup("mlp").trainer(config())
    batches = make_batches(4)
    for batch in batches[:3]:
        trainer.step(batch)
    told = Told(monkeypatch, trainer.run)
    trainer.run.subject.parameters[0].data.add_(1.0)
    with pytest.warns(UserWarning, match="changed between two steps"):
        trainer.step(batches[3])
    assert set(told.heard) >= {(part, "on_overwrite") for part in PARTS}


# ---------------------------------------------------------------- order in time


def test_the_predictor_is_asked_once_before_a_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = setup("mlp").trainer(config(), predictor=Fake())
    run, asked = trainer.run, []
    inner = run.proposer.predictor.predict
    monkeypatch.setattr(run.proposer.predictor, "predict", lambda horizon: asked.append(horizon) or inner(horizon))
    for batch in full_batch(40):
        due = run.phases.num_real_steps_since_predict >= inputs_module.num_full_steps_due(run)
        if run.windows.just_closed and run.phases.current is Phase.FULL and due and run.judge.ledger.wait_windows == 0:
            break
        trainer.step(batch)
    asked.clear()
    preview = preview_proposal(run)
    assert len(asked) == 1
    first, second = inputs(run, preview), inputs(run, preview)
    assert (first, len(asked)) == (second, 1), "a query changes nothing"


@pytest.mark.parametrize("changes_at", [6, 7, 8, 9, 10])
def test_a_step_has_one_answer_to_whether_every_batch_is_the_same(
    changes_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the data change from one batch to many, decision and execution go by the same answer."""
    trainer = setup("mlp").trainer(config(), predictor=Fake())
    run, decided = trainer.run, []

    def noted(run: State):  # type: ignore[no-untyped-def]
        decided.append(run.full_batch)
        return preview_proposal(run)

    monkeypatch.setattr("hybrid_predict_trainer.cycle.loop.preview_proposal", noted)
    same, other = full_batch(1)[0], make_batches(20)
    for i in range(16):
        trainer.step(same if i < changes_at else other[i])
        assert decided[-1] is run.full_batch, i
    assert {True, False} == set(decided)


def test_a_proposal_that_is_not_made_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = setup("mlp").trainer(config(horizon_rule="bandit"), predictor=Fake())
    considered = inputs_module._considered
    seen: list[bool] = []

    def never(run: State, horizon: int) -> tuple[int, bool]:
        considered(run, horizon)
        seen.append(run.proposer.feedback.evidence is not None)
        return 0, False

    monkeypatch.setattr(inputs_module, "_considered", never)
    for batch in full_batch(20):
        trainer.step(batch)
        assert trainer.run.proposer.feedback.evidence is None
        assert trainer.run.proposer.feedback.state_dict()["choice"] is None
    assert any(seen)


# ---------------------------------------------------------------- former names


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.setattr(former_names, "_said_attributes", set())
    return setup("norm_dropout", "adamw", "lambda").trainer(config()).run


#: Read from others, or bound for good: nothing that can be set.
READ_ONLY = {"deterministic", "same_batch", "views", "evaluate_loss", "on_predictor_failure", "add_time"}


@pytest.mark.parametrize("name", former_names.ATTRIBUTES)
def test_former_attributes_are_found_and_said_once(run: State, name: str) -> None:
    place = former_names.ATTRIBUTES[name]
    with pytest.warns(DeprecationWarning, match=f"run.{name} is now run.{place}"):
        found = getattr(run, name)
    assert found == operator.attrgetter(place)(run) or found != found
    if name in READ_ONLY or place.startswith("subject."):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setattr(run, name, found)
    assert operator.attrgetter(place)(run) is found
    assert name not in vars(run)


def test_an_attribute_that_never_was_is_none(run: State) -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = run.nothing  # type: ignore[attr-defined]
