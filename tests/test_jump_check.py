"""The validation loss has the last word on jumps: known answers, faults, what is put back, and what is left alone."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cases import Fake, assert_same, config, difference, make_batches, rng, setup
from hybrid_predict_trainer import Engine, HybridTrainer, HybridTrainerConfig, attach, with_values
from hybrid_predict_trainer.cycle import jump_check
from hybrid_predict_trainer.judge import candidates
from hybrid_predict_trainer.judge.guard import NO_ANCHOR, Guard
from hybrid_predict_trainer.judge.noise import NoiseCheck
from hybrid_predict_trainer.judge.safety import Safety
from hybrid_predict_trainer.judge.validation import (
    FALL,
    HARM,
    JUMP_PATIENCE,
    LEAST_STEPS,
    Finding,
    JumpCheck,
    Validation,
)
from hybrid_predict_trainer.move.multiplier import Account, Multiplier

ENDED = "jumps took the training loss down and the validation loss up"
STEPS = 200
Samples = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def training_samples_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they say of noise where there is no validation loss has tests of its own, in test_noise.py."""
    monkeypatch.setattr(NoiseCheck, "due", False)


def samples(num: int, seed: int, noise: float) -> Samples:
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(num, 5, generator=g) * 2 - 1
    y = torch.sin(3 * x[:, :1] * x[:, 1:2]) + x[:, 2:3] ** 2 - 0.5 * x[:, 3:4]
    return x, y + noise * torch.randn(num, 1, generator=g)


def squares(model: nn.Module, batch: Samples) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


class Problem:
    """A full batch of a smooth function with noise in its targets, and samples that no training step sees."""

    def __init__(self, noise: float = 0.5, seed: int = 0, steps: int = STEPS) -> None:
        self.train, self.held_out = samples(200, 1 + seed, noise), samples(300, 100 + seed, noise)
        self.test, self.steps = samples(2000, 1000, 0.0), steps
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def validated(self, model: nn.Module) -> Tensor:
        return squares(model, self.held_out)

    def plain(self) -> float:
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            squares(self.model, self.train).backward()
            self.optimizer.step()
            self.schedule.step()
        return self.end()

    def end(self) -> float:
        with torch.no_grad():
            return float(squares(self.model, self.test))

    def trainer(self, val_fn: Any = None, settings: HybridTrainerConfig | None = None, **more: Any) -> HybridTrainer:
        return HybridTrainer(
            self.model,
            self.optimizer,
            settings,
            squares,
            self.schedule,
            **({"val_fn": val_fn} if val_fn else {}),
            **more,
        )

    def fitted(self, trainer: HybridTrainer) -> float:
        trainer.fit(itertools.repeat(self.train), total_steps=self.steps)
        return self.end()

    def attached(self, val_fn: Any = None, **more: Any) -> Engine:
        return attach(
            self.model, self.optimizer, loss_fn=squares, lr_scheduler=self.schedule, val_fn=val_fn,
            total_steps=self.steps, **more,
        )  # fmt: skip

    def ridden(self, engine: Engine, steps: int | None = None) -> float:
        for _ in range(10**6 if steps is None else steps):
            if engine.finished:
                break
            self.optimizer.zero_grad()
            loss = squares(self.model, self.train)
            loss.backward()
            engine.note(loss, self.train)
            self.optimizer.step()
        return self.end()


class Recorded:
    """A validation loss that remembers the weights it was asked at."""

    def __init__(self, fn: Callable[[nn.Module], Any]) -> None:
        self.fn, self.answers, self.states = fn, [], []

    def __call__(self, model: nn.Module) -> Any:
        value = self.fn(model)
        self.answers.append(float(value.detach() if isinstance(value, Tensor) else value))
        self.states.append([p.detach().clone() for p in model.parameters()])
        return value


# ---------------------------------------------------------------- known answers


@pytest.mark.parametrize("driver", ["trainer", "attach"])
def test_on_noisy_targets_a_run_with_it_ends_no_higher_than_the_plain_loop(driver: str) -> None:
    plain = Problem().plain()
    without, run = Problem(), Problem()
    if driver == "trainer":
        assert without.fitted(without.trainer()) > 2 * plain, "or nothing here says anything"
        with pytest.warns(UserWarning, match=ENDED):
            assert run.fitted(run.trainer(run.validated)) < 1.05 * plain
        return
    assert without.ridden(without.attached()) > 2 * plain
    engine = run.attached(run.validated)
    with pytest.warns(UserWarning, match=ENDED):
        assert run.ridden(engine) < 1.05 * plain
    assert "the validation loss (val_fn) rose" in engine.why_not
    assert engine.report()["why_not"] == engine.why_not


def test_where_targets_have_no_noise_jumps_stay() -> None:
    plain, without, run = Problem(0.0).plain(), Problem(0.0), Problem(0.0)
    free = without.fitted(without.trainer())
    assert free < plain / 3, "or there is nothing to lose"
    trainer = run.trainer(run.validated)
    assert run.fitted(trainer) < 1.1 * free
    assert not trainer.run.judge.ledger.switched_off


def test_what_comes_back_is_the_state_of_the_best_answer() -> None:
    """Weights and the optimizer's own; from there on there are no jumps, and nobody asks."""
    problem = Problem()
    asked, optimizers = Recorded(problem.validated), []
    trainer = problem.trainer(
        lambda model: (optimizers.append(copy.deepcopy(problem.optimizer.state_dict())), asked(model))[1]
    )
    run, found = trainer.run, []

    def look(result: Any) -> None:
        if run.safety.validation.jumps.ended_jumps and not found:
            found.append(([p.detach().clone() for p in problem.model.parameters()], run.meter.num_jumps_proposed))
            found.append(copy.deepcopy(problem.optimizer.state_dict()["state"]))
            assert not run.losses.history.losses, "losses of what did harm are no measure of what follows"
            assert run.optimizer_step.scale.multiplier.best == math.inf

    with pytest.warns(UserWarning, match=ENDED) as told:
        trainer.fit(itertools.repeat(problem.train), total_steps=STEPS, progress_callback=look)
    best = min(range(len(asked.answers)), key=asked.answers.__getitem__)
    (weights, num_proposed), optimizer = found
    assert 0 < best < len(asked.answers) - 1
    assert_same(weights, asked.states[best])
    assert_same(optimizer, optimizers[best]["state"])
    assert run.meter.num_jumps_proposed == num_proposed
    assert asked.answers[-1] > asked.answers[best]
    assert len([w for w in told if ENDED in str(w.message)]) == 1
    assert str(run.safety.validation.jumps.best_step) in str(told[0].message)
    assert run.safety.best_point is None, "its memory is free again"


def test_nobody_takes_what_was_put_back_for_a_divergence() -> None:
    """The training loss is a hundred times its lowest from there on: guard, monitor and multiplier begin anew."""
    problem = Problem(steps=500)
    trainer = problem.trainer(problem.validated)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        problem.fitted(trainer)
    assert [ENDED in str(w.message) for w in told] == [True]
    statistics = trainer.statistics()
    assert statistics["num_guard_alarms"] == statistics["num_divergence_events"] == 0
    assert not statistics["withdrawn"]
    assert trainer.run.optimizer_step.scale.taken_back == 0


def test_frozen_weights_stay() -> None:
    problem = Problem()
    problem.model[2].weight.requires_grad_(False)
    frozen = problem.model[2].weight.detach().clone()
    with pytest.warns(UserWarning, match=ENDED):
        problem.fitted(problem.trainer(problem.validated))
    assert_same(problem.model[2].weight.detach(), frozen)


def test_what_is_frozen_since_the_best_answer_does_not_go_back() -> None:
    problem, answers = Problem(), itertools.chain([3.0, 1.0], itertools.repeat(9.0))
    trainer = problem.trainer(lambda model: next(answers))
    weight, since, at_best = problem.model[2].weight, [], []

    def look(result: Any) -> None:
        if trainer.run.safety.validation.num_asked != 2 or since:
            return
        at_best.append(weight.detach().clone())
        if len(at_best) == 3:
            since.append(at_best[-1])
            weight.requires_grad_(False)

    with pytest.warns(UserWarning, match=ENDED):
        trainer.fit(itertools.repeat(problem.train), total_steps=80, progress_callback=look)
    assert not torch.equal(since[0], at_best[0]), "or nothing here says anything"
    assert_same(weight.detach(), since[0])


# ---------------------------------------------------------------- how often it is asked, and what it costs


def test_questions_are_few_and_charged() -> None:
    """One where the training loss has fallen by so much, and one in so many steps."""
    runs = []
    for cost in (0.0, 4.0):
        problem = Problem(0.0)
        asked = Recorded(problem.validated)
        trainer = problem.trainer(asked, config(clock="claimed", predictor_type="quasi_newton"), val_cost=cost)
        losses = [trainer.step(problem.train).loss for _ in range(120)]
        runs.append((trainer, len(asked.answers), max(losses) / float(squares(problem.model, problem.train).detach())))
    (free, num, fall), (charged, same, _) = runs
    assert num == same == free.run.safety.validation.num_asked
    assert 4 <= num <= 2 + math.log(fall) / -math.log(FALL) + 120 / LEAST_STEPS
    assert num < free.statistics()["num_jumps_accepted"] / 2
    assert charged.statistics()["num_forward"] - free.statistics()["num_forward"] == 4.0 * num


def test_one_that_never_rises_changes_nothing() -> None:
    """Bit for bit, where it costs nothing: the questions leave no trace."""
    bare, run = Problem(), Problem()
    answers = itertools.count(0, -1)
    bare.fitted(bare.trainer())
    trainer = run.trainer(lambda model: (torch.rand(3), float(next(answers)))[1], val_cost=0.0)
    run.fitted(trainer)
    assert trainer.run.safety.validation.num_asked > 3
    assert_same(run.model.state_dict(), bare.model.state_dict())
    assert_same(run.optimizer.state_dict(), bare.optimizer.state_dict())


def test_without_it_nothing_is_asked_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jump_check, "keep", lambda *_: pytest.fail("a state was kept"))
    problem = Problem(steps=60)
    problem.fitted(problem.trainer())
    assert problem.trainer().run.safety.best_point is None


def test_off_nobody_asks() -> None:
    problem = Problem(steps=30)
    plain = Problem(steps=30)
    plain.plain()
    trainer = problem.trainer(lambda model: pytest.fail("asked"), HybridTrainerConfig(enabled=False))
    trainer.fit(itertools.repeat(problem.train), total_steps=30)
    assert_same(problem.model.state_dict(), plain.model.state_dict())


def test_on_new_data_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "price", lambda ledger, slope: lambda forwards: 0.0)
    made = setup()
    trainer = made.trainer(config(), predictor=Fake(), val_fn=lambda model: pytest.fail("asked"))
    for batch in make_batches(60):
        trainer.step(batch)
    assert trainer.statistics()["num_jumps_accepted"] > 0


def test_over_several_epochs_jumps_answer_to_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are noisy there, and jumps are on probation."""
    monkeypatch.setattr(candidates, "price", lambda ledger, slope: lambda forwards: 0.0)
    made, answers = setup(), itertools.chain([1.0], itertools.repeat(2.0))
    trainer = made.trainer(config(), predictor=Fake(), val_fn=lambda model: next(answers))
    with pytest.warns(UserWarning, match=ENDED):
        trainer.fit(make_batches(20), total_steps=200)
    assert not trainer.run.full_batch
    assert trainer.statistics()["num_jumps_accepted"] > 0
    assert trainer.run.judge.ledger.switched_off
    assert trainer.run.judge.probation is None


def test_over_several_epochs_without_a_schedule_samples_are_known_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "price", lambda ledger, slope: lambda forwards: 0.0)
    made, asked = setup(), []
    trainer = made.trainer(config(), predictor=Fake(), val_fn=lambda model: asked.append(1) or 1.0)
    for batch in make_batches(20) * 8:
        trainer.step(batch)
    assert asked


# ---------------------------------------------------------------- faults


def without_it(problem: Problem) -> HybridTrainer:
    trainer = problem.trainer()
    problem.fitted(trainer)
    return trainer


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("kind", ["raises", "nan", "-inf"])
def test_one_that_fails_is_told_once_and_jumps_go_on_as_without_it(kind: str, when: int) -> None:
    """The run is that without it, bit for bit, where answers cost nothing."""
    bare, problem, asked = Problem(), Problem(), []

    def val_fn(model: nn.Module) -> float:
        asked.append(1)
        if len(asked) <= when:
            return 10.0 - len(asked)
        if kind == "raises":
            raise KeyError("no such column")
        return math.nan if kind == "nan" else -math.inf

    bare.fitted(bare.trainer())
    trainer = problem.trainer(val_fn, val_cost=0.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        problem.fitted(trainer)
    said = [str(w.message) for w in told]
    assert len(said) == 1
    assert "is not asked again" in said[0] or "jumps are judged without val_fn from here on" in said[0]
    assert len(asked) == when + 1
    assert trainer.run.safety.best_point is None
    assert_same(problem.model.state_dict(), bare.model.state_dict())


def test_one_that_becomes_infinite_says_that_jumps_did_harm() -> None:
    problem, answers = Problem(), itertools.chain([2.0], itertools.repeat(math.inf))
    with pytest.warns(UserWarning, match="val_fn says that it is infinite, and said 2 at real step"):
        problem.fitted(problem.trainer(lambda model: next(answers)))


def test_a_state_that_cannot_be_kept_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise MemoryError("no room")

    problem = Problem(steps=60)
    trainer = problem.trainer(problem.validated)
    monkeypatch.setattr(jump_check, "keep", fails)
    with pytest.warns(UserWarning, match=r"cannot be kept \(MemoryError: no room\)") as told:
        problem.fitted(trainer)
    assert len(told) == 1
    assert trainer.statistics()["num_jumps_accepted"] > 3
    assert trainer.run.safety.validation.num_asked == 1


def test_an_interrupted_question_leaves_the_run_whole() -> None:
    problem, asked = Problem(steps=60), []

    def val_fn(model: nn.Module) -> float:
        asked.append(1)
        if len(asked) in (1, 3):
            raise KeyboardInterrupt
        return 9.0 - len(asked)

    trainer = problem.trainer(val_fn)
    num = 0
    for _ in range(60):
        try:
            trainer.step(problem.train)
        except KeyboardInterrupt:
            num += 1
    assert num == 2
    assert len(asked) > 3
    assert all(p.isfinite().all() for p in problem.model.parameters())


def test_weights_that_somebody_else_changed_are_no_harm_of_jumps() -> None:
    """What was kept before is void; before the next jump there is a new answer to compare with."""
    problem = Problem(steps=80)
    asked = Recorded(problem.validated)
    trainer = problem.trainer(asked)
    run, at = trainer.run, []

    def look(result: Any) -> None:
        if run.safety.best_point is not None and len(asked.answers) == 2 and not at:
            with torch.no_grad():
                for p in problem.model.parameters():
                    p.mul_(0.5)
            at.append(1)
        elif at and len(at) == 1:
            assert run.safety.best_point is None
            assert run.safety.validation.jumps.best == math.inf
            at.append(2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(itertools.repeat(problem.train), total_steps=80, progress_callback=look)
    assert at == [1, 2]
    assert len(asked.answers) > 2


# ---------------------------------------------------------------- what it does to the model


def test_an_answer_with_a_graph_is_taken_without_it() -> None:
    model, kept = nn.Linear(2, 1), []

    def val_fn(model: nn.Module) -> Tensor:
        value = model(torch.ones(1, 2)).square().mean()
        kept.append(weakref.ref(value))
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(Validation(val_fn).ask(model, 0), float)
    gc.collect()
    assert kept[0]() is None


def test_one_that_forgets_evaluation_mode_leaves_statistics_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    before = copy.deepcopy(model.state_dict())
    Validation(lambda m: m(torch.randn(8, 2)).mean()).ask(model, 0)
    assert_same(model.state_dict(), before)


def test_forwards_of_it_are_no_forwards_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that returns its loss, and a validation in training mode with a graph: hooks see the loop's alone."""
    monkeypatch.setattr("hybrid_predict_trainer.judge.validation.FALL", 0.0)  # it is asked after real steps then
    monkeypatch.setattr("hybrid_predict_trainer.judge.validation.LEAST_STEPS", 3)

    class WithLoss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": F.mse_loss(self.inner(x), y)}

    def ridden(*, asks: bool) -> tuple[Problem, Engine]:
        problem, falling = Problem(steps=60), itertools.count()
        model = WithLoss(problem.model)
        x, y = problem.train

        def val_fn(model: nn.Module) -> Tensor:
            return model(*problem.held_out)["loss"] * 0 - next(falling)

        engine = attach(
            model, problem.optimizer, lr_scheduler=problem.schedule, val_fn=val_fn if asks else None, val_cost=0.0,
            total_steps=60,
        )  # fmt: skip
        while not engine.finished:
            problem.optimizer.zero_grad()
            model(x, y)["loss"].backward()
            problem.optimizer.step()
        return problem, engine

    bare, engine = ridden(asks=False)
    problem, asked = ridden(asks=True)
    assert asked.run.safety.validation.num_asked > 2
    assert engine.statistics()["num_jumps_accepted"] > 3
    assert_same(problem.model.state_dict(), bare.model.state_dict())


# ---------------------------------------------------------------- resume


def portrait(problem: Problem, trainer: HybridTrainer) -> dict[str, Any]:
    return copy.deepcopy({
        "model": problem.model.state_dict(), "optimizer": problem.optimizer.state_dict()["state"],
        "run": trainer.run.state_dict(), "statistics": trainer.statistics(), "rng": rng(),
    })  # fmt: skip


#: Where a checkpoint is taken: before the first question, with a best state kept, with an answer above it, at the end.
PLACES: dict[str, Callable[[JumpCheck], bool]] = {
    "before": lambda check: check.best == math.inf,
    "kept": lambda check: check.best < math.inf and check._num_above == 0,
    "above": lambda check: check._num_above > 0 and not check.ended_jumps,
    "ended": lambda check: check.ended_jumps,
}


def answers_by(problem: Problem) -> Callable[[nn.Module], float]:
    """A validation loss with noise of its own in the fourth digit, that depends on the weights alone."""
    return lambda model: float(squares(model, problem.held_out).detach())


@pytest.mark.parametrize("lean", [False, True], ids=["whole", "lean"])
def test_a_resumed_run_is_the_run_that_went_on(lean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_predict_trainer.judge.validation.HARM", 0.3)  # so that some stand above without harm
    settings = with_values(HybridTrainerConfig(), {
        "checkpoint.keep_last_n": 100, "predictor.update_budget": 0.0, "checkpoint.include_predictor": not lean,
    })  # fmt: skip
    problem = Problem()
    trainer = problem.trainer(answers_by(problem), settings)
    check, saved = trainer.run.safety.validation.jumps, {}
    num = 150
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(num):
            for name, here in PLACES.items():
                if name not in saved and step > 2 and here(check):
                    saved[name] = (trainer.save_checkpoint(tmp_path / name), step, copy.deepcopy(check.state_dict()))
            trainer.step(problem.train)
    assert set(saved) == set(PLACES)
    wanted = portrait(problem, trainer)
    for name, (path, step, checked) in saved.items():
        again = Problem(seed=5)
        again.train, again.held_out = problem.train, problem.held_out
        resumed = again.trainer(answers_by(again), settings)
        with pytest.warns(UserWarning, match="include_predictor = false") if lean else nullcontext():
            resumed.load_checkpoint(path)
        assert resumed.run.safety.validation.jumps.state_dict() == checked
        if lean:  # its basis begins anew; what the validation knows does not
            kept = resumed.run.safety.best_point
            assert (kept is None) == (name in ("before", "ended"))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(step, num):
                resumed.step(again.train)
        found = difference(portrait(again, resumed), wanted)
        assert found is None, f"{name}: {found}"


def test_an_attached_run_is_resumed_with_its_answers(tmp_path: Path) -> None:
    runs = []
    for cut in (None, 45):
        problem = Problem()
        engine = problem.attached(answers_by(problem))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if cut is not None:
                problem.ridden(engine, cut)
                assert engine.run.safety.best_point is not None
                path = engine.save_checkpoint(tmp_path)
                problem = Problem(seed=4)
                problem.train, problem.held_out = Problem().train, Problem().held_out
                engine = problem.attached(answers_by(problem))
                engine.load_checkpoint(path)
            problem.ridden(engine, None)
        assert engine.run.safety.validation.jumps.ended_jumps
        runs.append((problem.model.state_dict(), engine.run.safety.state_dict()))
    assert_same(runs[1], runs[0])


def test_a_checkpoint_of_before_begins_the_check_anew(tmp_path: Path) -> None:
    """It knows nothing of jumps, nor of a state to come back to."""
    problem, former = Problem(), Safety.state_dict
    trainer = problem.trainer(problem.validated)
    for _ in range(40):
        trainer.step(problem.train)
    assert trainer.run.safety.best_point is not None

    def of_before(safety: Safety) -> dict[str, Any]:
        state = former(safety)
        del state["best_point"], state["validation"]["jumps"]
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Safety, "state_dict", of_before)
        path = trainer.save_checkpoint(tmp_path)
    trainer.load_checkpoint(path)
    safety = trainer.run.safety
    assert safety.best_point is None
    assert safety.validation.jumps.state_dict() == JumpCheck().state_dict()
    assert safety.validation.num_asked > 0, "the rest is read"
    for _ in range(5):
        trainer.step(problem.train)
    assert safety.best_point is not None


def test_a_checkpoint_of_a_run_without_it_begins_the_check_anew(tmp_path: Path) -> None:
    bare, problem = Problem(), Problem()
    path = bare.trainer().save_checkpoint(tmp_path)
    trainer = problem.trainer(problem.validated)
    for _ in range(40):
        trainer.step(problem.train)
    assert trainer.run.safety.validation.jumps.best < math.inf
    trainer.load_checkpoint(path)
    assert trainer.run.safety.validation.jumps.best == math.inf
    assert trainer.run.safety.best_point is None


# ---------------------------------------------------------------- the bookkeeping


def asked(*answers: tuple[float, int], loss: float = 1.0) -> tuple[JumpCheck, list[Finding]]:
    """Take (answer, jumps so far), one question each."""
    check = JumpCheck()
    return check, [check.take(answer, loss, jumps, 10 * i) for i, (answer, jumps) in enumerate(answers)]


def test_what_an_answer_says() -> None:
    _, found = asked((2.0, 0), (1.0, 1), (1.0, 2), (1 + 0.9 * HARM, 3), (1 + 1.1 * HARM, 4))
    assert found == [Finding.BEST, Finding.BEST, Finding.BEST, Finding.NOTHING, Finding.HARM]
    _, found = asked((1.0, 0), *((1.05, n) for n in range(1, JUMP_PATIENCE + 1)))
    assert found == [Finding.BEST, *[Finding.NOTHING] * (JUMP_PATIENCE - 1), Finding.HARM]
    check, found = asked((1.0, 0), *((1.01, n) for n in range(1, 20)))
    assert set(found[1:]) == {Finding.NOTHING}, "so little is noise, however often"
    assert not check.over
    check, found = asked((-2.0, 0), (-1.9, 1), (-1.7, 2))
    assert found == [Finding.BEST, Finding.NOTHING, Finding.HARM]
    assert check.over


def test_where_no_jump_was_made_since_nothing_is_held_against_them() -> None:
    check, found = asked((1.0, 3), (9.0, 3), (9.5, 4), (10.5, 5))
    assert found == [Finding.BEST, Finding.BEST, Finding.NOTHING, Finding.HARM]
    assert (check.best, check.best_step) == (9.0, 10)


@pytest.mark.parametrize("answer", [math.nan, -math.inf, math.inf])
def test_a_first_answer_that_is_no_number_ends_the_questions(answer: float) -> None:
    check, found = asked((answer, 0))
    assert found == [Finding.MUTE]
    assert check.over
    assert not check.ended_jumps


def test_when_it_is_asked() -> None:
    check = JumpCheck()
    assert check.due_before_jump(0, 0)
    assert not check.due(0.0, 5, 1000), "there is nothing to compare with yet"
    check.take(1.0, 8.0, 0, 100)
    assert not check.due_before_jump(0, 100 + LEAST_STEPS - 1)
    assert check.due_before_jump(0, 100 + LEAST_STEPS)
    assert not check.due_before_jump(1, 100 + LEAST_STEPS)
    assert not check.due(0.1, 0, 10_000), "no jump since"
    assert not check.due(FALL * 8.0 + 0.01, 1, 101)
    assert check.due(FALL * 8.0 - 0.01, 1, 101)
    assert check.due(9.0, 1, 100 + LEAST_STEPS)
    check.take(1.0, -1.0, 1, 1000)
    assert not check.due(-1.2, 2, 1001)
    assert check.due(-1.4, 2, 1001), "losses below zero fall too"
    assert not check.due(math.nan, 2, 1001)
    check.forget()
    assert check.due_before_jump(2, 1001)


def test_the_guard_forgets_what_it_saw_since() -> None:
    guard = Guard()
    for step in range(32 * 8):
        guard.watch(0.01, step, exact=True, moving=True)
    assert guard.anchor_step != NO_ANCHOR
    guard.begin_anew()
    assert guard.anchor_step == NO_ANCHOR
    found = {guard.watch(1.0, 300 + step, exact=True, moving=True).value for step in range(32 * 12)}
    assert "compare" not in found
    assert guard.num_alarms == 0


def test_a_raise_that_is_not_settled_was_not_made() -> None:
    m = Multiplier(100.0)
    m.value, m.best, m.account = 8.0, 0.01, Account(3, 4.0, 0.02, 0.03)
    m.begin_anew()
    assert (m.value, m.best, m.account, m.num_taken_back) == (4.0, math.inf, None, 0)
    m.begin_anew()
    assert m.value == 4.0
