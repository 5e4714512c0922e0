"""Data that come round again: samples and stretches of text are known again; what then becomes of the multiplier."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import assert_same, config, loss_fn, make_batches, rng, setup
from hybrid_predict_trainer import ConfigError, HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.judge.validation import LEAST_STEPS, Validation
from hybrid_predict_trainer.move.lr_multiplier import LrMultiplier
from hybrid_predict_trainer.observe.recurrence import CAPACITY, GRAM, RECENT, Recurrence, hashes

# ---------------------------------------------------------------- samples


def epochs_until_known(num: int, size: int, order: str, most: float = 3.0) -> float | None:
    """Passes over ``num`` samples in batches of ``size`` until they are known to come round; None: not within most."""
    g = torch.Generator().manual_seed(num + size)
    x, seen, recurrence = torch.randn(num, 12, generator=g), 0, Recurrence()
    while seen < most * num:
        places = torch.arange(num) if order == "same" else torch.randperm(num, generator=g)
        for at in range(0, num - size + 1, size):
            recurrence.see((x[places[at : at + size]], torch.zeros(size)))
            seen += size
            if recurrence.recurs:
                return seen / num
    return None


@pytest.mark.parametrize("order", ["same", "shuffled"])
@pytest.mark.parametrize("size", [4, 8, 16, 32, 50, 100])
@pytest.mark.parametrize("num", [200, 2000])
def test_epochs_are_known_early_in_the_second(num: int, size: int, order: str) -> None:
    """Whatever the order: 250 batches to an epoch are no other than 251."""
    found = epochs_until_known(num, size, order)
    assert found is not None
    assert 1 < found <= 1.31 + size / num


def test_batches_in_the_same_order_are_known_whatever_their_number() -> None:
    """A regular pattern of batches that are looked at would meet others in every epoch."""
    for num_batches in (2001, 2002):
        found = epochs_until_known(100 * num_batches, 100, "same", most=2.0)
        assert found is not None
        assert found < 1.3


def test_new_batches_never_come_round() -> None:
    g, recurrence = torch.Generator().manual_seed(0), Recurrence()
    for _ in range(20_000):
        recurrence.see(torch.randn(4, 3, generator=g))
    assert not recurrence.recurs
    assert len(recurrence.state_dict()["known"]) <= CAPACITY
    assert sum(recurrence.state_dict()["recent"]) == 0


def test_memory_is_bounded_and_the_share_is_not_biased() -> None:
    """50,000 samples are more than are remembered; in the second pass they are known all the same."""
    g = torch.Generator().manual_seed(0)
    x, recurrence = torch.randn(50_000, 4, generator=g), Recurrence()
    for number in range(2):
        for batch in x[torch.randperm(50_000, generator=g)].split(100):
            recurrence.see(batch)
            state = recurrence.state_dict()
            assert len(state["known"]) <= CAPACITY
            assert len(state["recent"]) <= RECENT
        assert recurrence.recurs is (number == 1)
    assert state["classes"] > 1


# ---------------------------------------------------------------- text


def text(num: int, *, repeats: float = 0.0) -> Tensor:
    """Tokens; a share of them in stretches copied from earlier on, as code and licences have them."""
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(500, (num,), generator=g)
    for at in range(4000, num - 200, 200):
        if float(torch.rand((), generator=g)) < repeats:
            source = int(torch.randint(at - 200, (), generator=g))
            tokens[at : at + 200] = tokens[source : source + 200].clone()
    return tokens


def passes_until_known(tokens: Tensor, length: int, size: int, most: float) -> float | None:
    g, recurrence, seen = torch.Generator().manual_seed(2), Recurrence(), 0
    while seen < most * len(tokens):
        starts = torch.randint(len(tokens) - length, (size,), generator=g)
        batch = torch.stack([tokens[s : s + length] for s in starts.tolist()])
        recurrence.see({"input_ids": batch, "attention_mask": torch.ones_like(batch)})
        seen += batch.numel()
        if recurrence.recurs:
            return seen / len(tokens)
    return None


@pytest.mark.parametrize(("length", "size"), [(64, 4), (64, 16), (256, 16), (512, 32)])
def test_windows_of_a_text_are_known_after_about_a_pass(length: int, size: int) -> None:
    """Drawn at random, no two of them are equal."""
    found = passes_until_known(text(60_000), length, size, 3.0)
    assert found is not None
    assert 0.2 < found < 1.5


def test_a_text_that_repeats_a_part_of_itself_is_not_known_before_half_a_pass() -> None:
    found = passes_until_known(text(300_000, repeats=0.1), 128, 16, 0.5)
    assert found is None


# ---------------------------------------------------------------- kinds of batches

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
KINDS: dict[str, tuple[Any, int]] = {
    "tensor": (X, 6),
    "tuple": ((X, torch.zeros(6)), 6),
    "labels first": ([torch.zeros(6), X], 6),
    "dict": ({"x": X, "name": "a", "none": None, "number": 3}, 6),
    "nested": ({"a": [{"b": (X,)}]}, 6),
    "images": (X.reshape(6, 1, 5, 1).expand(6, 3, 5, 5), 6),
    "equal samples": (X[:1].expand(4, 5), 1),
    "int samples": (torch.arange(12).reshape(6, 2), 6),
    "short sequences": (torch.arange(6 * GRAM).reshape(6, GRAM), 6),
    "complex": (torch.complex(X, -X), 6),
    "bool": (X > 0, len({tuple(row) for row in (X > 0).tolist()})),
    "half": (X.bfloat16(), 6),
    "double": (X.double(), 6),
    "float8": (X.to(torch.float8_e4m3fn), 6),
    "nan": (X * math.nan, 1),
    "needs a graph": (X.clone().requires_grad_(), 6),
    "0-dim": (torch.tensor(3.0), 0),
    "one number": (torch.tensor([3.0]), 0),
    "empty": (torch.empty(0, 5), 0),
    "no columns": (torch.empty(6, 0), 0),
    "sparse": (X.to_sparse(), 0),
    "meta": (X.to("meta"), 0),
    "no tensors": ({"x": [1.0, 2.0], "y": "text"}, 0),
    "None": (None, 0),
    "a string": ("text", 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_batches(kind: str) -> None:
    """As many hashes as there are different samples; the same again; none where there is nothing to go by."""
    batch, num = KINDS[kind]
    found = hashes(batch)
    assert len(found) == len(set(found)) == num
    assert hashes(batch) == found
    assert all(h >= 0 for h in found)
    recurrence = Recurrence()
    for _ in range(60):
        recurrence.see(batch)
    assert recurrence.recurs is (num > 0)


def test_a_sample_is_known_wherever_it_stands() -> None:
    assert set(hashes(X[[3, 1]])) < set(hashes((X.flip(0), torch.ones(6))))
    assert not set(hashes(X + 1e-3)) & set(hashes(X))


def test_a_stretch_is_known_wherever_it_stands() -> None:
    tokens = text(2000)
    a, b = hashes(tokens[None, 100:1100]), hashes(tokens[None, 357:1357])
    assert len(a) > 20
    assert len(set(a) & set(b)) > 0.5 * len(a)


def test_looking_changes_nothing() -> None:
    before, batch = rng(), X.clone()
    hashes(batch)
    assert_same(rng(), before)
    assert torch.equal(batch, X)


def test_the_state_goes_through_at_every_step() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 3, generator=g)
    original, copy = Recurrence(), Recurrence()
    for step in range(150):
        batch = x[torch.randint(1200, (16,), generator=g)]
        renewed = Recurrence()
        renewed.load_state_dict(copy.state_dict())
        copy = renewed
        original.see(batch)
        copy.see(batch)
        assert copy.state_dict() == original.state_dict(), step
    assert original.recurs


def test_announced_is_known_for_good() -> None:
    recurrence = Recurrence()
    recurrence.announce()
    recurrence.see(torch.randn(4, 4))
    assert recurrence.recurs
    again = Recurrence()
    again.load_state_dict(recurrence.state_dict())
    assert again.recurs


# ---------------------------------------------------------------- what a run makes of it

#: Raises are on; jumps, cuts and the lookahead are not.
RAISING: dict[str, Any] = {"max_lr_multiplier": 100.0, "gate__overhead_budget": 0.0}


def runner(val_fn: Callable[[nn.Module], float] | None = None, *, num: int = 85, **more: Any) -> HybridTrainer:
    """A run at a hundredth of a good rate, which raises where it may; the rate falls after ``num`` steps."""
    made = setup("mlp", "sgd")
    made.optimizer.param_groups[0]["lr"] = 5e-4
    made.scheduler = torch.optim.lr_scheduler.LambdaLR(made.optimizer, lambda t: 1.0 if t < num else 0.01)
    return made.trainer(config(**RAISING), val_fn=val_fn, **more)


def values(trainer: HybridTrainer, batches: Any, **more: Any) -> list[float]:
    """The multiplier after every step of ``fit``."""
    found: list[float] = []
    trainer.fit(
        batches, progress_callback=lambda result: found.append(trainer.run.optimizer_step.scale.learned), **more
    )
    return found


def test_on_new_data_such_a_run_is_raised() -> None:
    """Or nothing below says anything."""
    trainer = runner()
    assert max(values(trainer, make_batches(90, 64, noise=0.02))) > 1
    assert not trainer.run.batches.recurrence.recurs


def test_a_loader_that_fit_goes_round_is_known_before_the_first_step() -> None:
    trainer = runner()
    batches = make_batches(30, 64, noise=0.02)
    assert values(trainer, batches, total_steps=90) == [1.0] * 90
    assert trainer.run.batches.recurrence.recurs


@pytest.mark.parametrize(("num_batches", "total_steps", "known"), [(30, 30, False), (30, 31, True), (30, None, False)])
def test_what_is_announced(num_batches: int, total_steps: int | None, known: bool) -> None:
    trainer = runner()
    trainer.fit(make_batches(num_batches, 4), total_steps=total_steps)
    assert trainer.run.batches.recurrence.recurs is known


def test_an_iterator_that_ends_is_not_announced() -> None:
    trainer = runner()
    with pytest.warns(UserWarning, match=r"the loader ended after 2\d steps"):
        trainer.fit(iter(make_batches(20, 4)), total_steps=40)
    assert not trainer.run.batches.recurrence.recurs


def test_the_same_loader_in_a_second_epoch_is_known_at_its_first_step() -> None:
    """``train_epoch`` cannot know that it will be called again; in the second epoch m is 1 again."""
    g = torch.Generator().manual_seed(3)
    samples = [(x, y) for x, y in make_batches(1, 64 * 90, noise=0.02)]
    data = torch.utils.data.TensorDataset(*samples[0])
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, generator=g)
    trainer = runner()
    found: list[float] = []
    for _ in range(2):
        trainer.train_epoch(loader, lambda result: found.append(trainer.run.optimizer_step.scale.learned))
    assert max(found[:90]) > 1
    assert found[90:] == [1.0] * 90
    assert trainer.run.safety.raise_point is None
    assert not trainer.run.optimizer_step.scale.may_grow
    assert trainer.statistics()["withdrawn"] is False


def test_another_loader_is_not_announced() -> None:
    trainer = runner()
    for seed in (1, 2, 3):
        data = torch.utils.data.TensorDataset(*make_batches(1, 80, seed=seed)[0])
        trainer.train_epoch(torch.utils.data.DataLoader(data, batch_size=8))
    assert not trainer.run.batches.recurrence.recurs


def test_samples_that_come_round_are_known_without_fit() -> None:
    """A loop of the user's own around ``step``: m goes back to 1 early in the second epoch, and stays there."""
    trainer = runner()
    batches = make_batches(60, 64, noise=0.02)
    found = []
    for batch in [*batches, *batches]:
        trainer.step((batch[0].clone(), batch[1].clone()))
        found.append(trainer.run.optimizer_step.scale.learned)
    assert max(found[:60]) > 1
    assert found[70:] == [1.0] * 50
    assert trainer.run.batches.recurrence.recurs


def test_where_nothing_can_be_raised_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recurrence, "see", lambda self, batch: pytest.fail("looked"))
    made = setup("mlp", "sgd", "flat")
    trainer = made.trainer(config())
    for batch in make_batches(4):
        trainer.step(batch)


def test_a_batch_that_is_given_again_is_no_recurrence() -> None:
    """A refused proposal leaves its batch for the next step."""
    trainer = runner()
    seen: list[Any] = []
    trainer.run.batches.recurrence.see = seen.append
    batches = make_batches(6)
    for batch in batches:
        trainer.step(batch)
        trainer.run.batches.free = True
        trainer.step(batch)
    assert len(seen) == 6


# ---------------------------------------------------------------- a validation loss

BATCHES = make_batches(30, 64, noise=0.02)
HELD_OUT = make_batches(1, 64, seed=8, noise=0.02)[0]


def held_out(model: nn.Module) -> float:
    with torch.no_grad():
        return float(loss_fn(model, HELD_OUT))


def test_on_the_word_of_a_validation_loss_data_that_come_round_are_raised() -> None:
    trainer = runner(held_out, num=140, val_cost=4.0)
    found = values(trainer, BATCHES, total_steps=150)
    assert max(found) > 1
    asked = trainer.run.safety.validation.num_asked
    assert 2 <= asked <= 2 * trainer.run.optimizer_step.scale.multiplier.num_raises + 150 / LEAST_STEPS
    free = runner(held_out, num=140, val_cost=0.0)
    values(free, BATCHES, total_steps=150)
    difference = trainer.run.meter.num_forward - free.run.meter.num_forward
    assert difference == 4.0 * asked
    assert trainer.statistics()["cost_units"] - free.statistics()["cost_units"] == difference


def test_without_a_raise_nobody_asks() -> None:
    """Nor where data do not come round."""
    asked: list[int] = []
    trainer = runner(lambda model: asked.append(1) or 1.0)
    values(trainer, make_batches(90, 64, noise=0.02))
    assert trainer.run.optimizer_step.scale.learned > 1
    assert asked == []
    made = setup("mlp", "sgd", "flat")
    still = made.trainer(config(**RAISING), val_fn=lambda model: asked.append(1) or 1.0)
    still.fit(BATCHES, total_steps=60)
    assert asked == []


def test_a_validation_loss_that_is_worse_after_a_raise_takes_it_back_for_good() -> None:
    """m is 1 from then on, and the weights are those of the raise's start."""
    answers = iter(range(100))
    trainer = runner(lambda model: float(next(answers)), num=140)
    run, starts, ends = trainer.run, [], []

    def look(result: Any) -> None:
        now = [p.detach().clone() for p in run.subject.parameters]
        if run.optimizer_step.scale.learned > 1 and not starts:
            starts.append(now)
        if starts and run.optimizer_step.scale.learned == 1 and not ends:
            ends.append(now)

    trainer.fit(BATCHES, total_steps=150, progress_callback=look)
    assert starts
    assert_same(ends, starts)
    assert run.optimizer_step.scale.learned == 1
    assert not run.optimizer_step.scale.may_grow
    assert run.safety.validation.num_asked == 2
    assert run.safety.raise_point is None


def test_a_validation_loss_that_rises_later_ends_the_multiplier() -> None:
    """The raise is settled; two answers above the best are enough."""
    trainer = runner(lambda model: level[0], num=320)
    level, found = [1.0], []

    def look(result: Any) -> None:
        found.append(trainer.run.optimizer_step.scale.learned)
        if trainer.run.optimizer_step.scale.multiplier.account is None and found[-1] > 1:
            level[0] += 0.01

    trainer.fit(BATCHES, total_steps=330, progress_callback=look)
    assert max(found) > 1
    assert found[-1] == 1
    assert not trainer.run.optimizer_step.scale.may_grow


def disturbing(model: nn.Module) -> float:
    """Leaves everything else than it was, and does not undo it."""
    torch.rand(5)
    model.eval()
    for module in model.modules():
        module.training = not module.training
    return 1.0


def failing(model: nn.Module) -> float:
    model.eval()
    torch.rand(3)
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("fn", "answer"),
    [(disturbing, 1.0), (lambda m: math.nan, math.inf), (lambda m: -math.inf, math.inf), (failing, None),
     (lambda m: "a word", None), (lambda m: None, None)],
)  # fmt: skip
def test_whatever_it_does_is_contained(fn: Callable[[nn.Module], Any], answer: float | None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model[1].eval()
    modes, before = [m.training for m in model.modules()], rng()
    validation = Validation(fn)
    if answer is None:
        with pytest.warns(UserWarning, match="val_fn failed .* is not asked again; training goes on"):
            assert validation.ask(model, 0) == math.inf
    else:
        assert validation.ask(model, 0) == answer
    assert validation.failed is (answer is None)
    assert [m.training for m in model.modules()] == modes
    assert_same(rng(), before)


def test_the_users_defaults_hold_inside_it() -> None:
    seen: list[torch.dtype] = []
    trainer = runner(lambda model: seen.append(torch.zeros(1).dtype) or 1.0)
    torch.set_default_dtype(torch.float64)
    try:
        trainer.fit(BATCHES, total_steps=90)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen
    assert set(seen) == {torch.float64}


def test_one_that_fails_takes_every_raise_back() -> None:
    trainer = runner(failing)
    with pytest.warns(UserWarning, match="val_fn failed"):
        found = values(trainer, BATCHES, total_steps=90)
    assert found[-1] == 1
    assert trainer.run.safety.validation.num_asked == 1


def test_on_the_word_of_one_that_is_not_finite_nothing_is_raised() -> None:
    trainer = runner(lambda model: math.nan)
    assert values(trainer, BATCHES, total_steps=90) == [1.0] * 90
    assert not trainer.run.optimizer_step.scale.may_grow


def test_one_that_becomes_infinite_takes_the_raise_back() -> None:
    answers = iter([1.0, math.nan, math.nan, math.nan])
    trainer = runner(lambda model: next(answers), num=120)
    found = values(trainer, BATCHES, total_steps=125)
    assert max(found) > 1
    assert found[-1] == 1
    assert not trainer.run.optimizer_step.scale.may_grow


@pytest.mark.parametrize("cost", [-1.0, math.nan])
def test_its_cost_is_a_number(cost: float) -> None:
    made = setup()
    with pytest.raises(ConfigError, match=r"val_cost = .* out of range: forwards of a training batch, at least 0"):
        made.trainer(HybridTrainerConfig(), val_fn=held_out, val_cost=cost)


def test_answers_go_through_a_checkpoint() -> None:
    answers = iter([3.0, 2.0, 2.5, 2.6])
    validation = Validation(lambda model: next(answers), 2.0)
    for step in (10, 70, 130):
        validation.ask(nn.Linear(1, 1), step)
    again = Validation(lambda model: next(answers), 2.0)
    again.load_state_dict(validation.state_dict())
    assert again.state_dict() == validation.state_dict()
    assert (again.best, again.num_asked, again.rising) == (2.0, 3, False)
    assert (again.due(130 + LEAST_STEPS - 1), again.due(130 + LEAST_STEPS)) == (False, True)
    again.ask(nn.Linear(1, 1), 200)
    assert again.rising


def test_the_scale_of_such_a_run_is_a_learned_one() -> None:
    assert isinstance(runner().run.optimizer_step.scale, LrMultiplier)
