"""Step sizes per role: what groups with rates of their own do, a file, and a ladder that leaves no trace."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import assert_same, config
from hybrid_predict_trainer import CheckpointError, ConfigError, HybridTrainer, Recipe, attach, find_recipe
from hybrid_predict_trainer.cycle.motions import end_motions
from hybrid_predict_trainer.experiments.baselines.roles import by_role
from hybrid_predict_trainer.keep import migration
from hybrid_predict_trainer.move.head_ladder import _climb, shape, with_head
from hybrid_predict_trainer.move.prior import PRIOR, PRIOR_BESIDE_MUON, for_run, measured_factors, peak_rate_of, prior
from hybrid_predict_trainer.move.recipe import decay_of, thirds
from hybrid_predict_trainer.move.role_rates import RoleRates
from hybrid_predict_trainer.tasks.base import TaskDefaults
from hybrid_predict_trainer.tasks.recipes import MuonAdamW, muon_adamw
from hybrid_predict_trainer.weights.parameters import predicted_parameters

VOCABULARY, WIDTH, LENGTH = 11, 8, 6
LANGUAGE = TaskDefaults(lr=1e-2, steps=12, betas=(0.9, 0.95))


class Block(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = self.qkv(n).chunk(3, -1) if self.fused else (self.q_proj(n), self.k_proj(n), self.v_proj(n))
        x = x + torch.softmax(q @ k.transpose(-1, -2) / WIDTH**0.5, -1) @ v
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class Small(nn.Module):
    def __init__(self, fused: bool = False, zero_head: bool = False) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(VOCABULARY, WIDTH), Block(fused)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def batches(count: int, seed: int = 0, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = [torch.randint(VOCABULARY, (size, 1), generator=generator) for _ in range(count)]
    return [(start + 3 * torch.arange(LENGTH)) % VOCABULARY for start in first]


def made(fused: bool = False, optimizer: Any = torch.optim.AdamW, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Small(fused)
    return model, optimizer(model.parameters(), **({"lr": 1e-2} | options))


STILL = {
    "max_predict_steps": 0, "recipe": "off", "max_lr_multiplier": 1.0, "min_group_factor": 1.0,
    "lookahead__extrapolation": 0.0, "lookahead__damping": 0.0,
}  # fmt: skip
OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}), (torch.optim.Adam, {"lr": 1e-2}),
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.3}), (torch.optim.NAdam, {"lr": 1e-2}),
    (torch.optim.RMSprop, {"lr": 1e-2}), (torch.optim.Adagrad, {"lr": 1e-2}), (torch.optim.RAdam, {"lr": 1e-2}),
]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS, ids=[o.__name__ for o, _ in OPTIMIZERS])
def test_a_recipe_is_groups_with_rates_of_their_own(optimizer: Any, options: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe({"head": 8.0, "embedding": 4.0, "attention_q": 3.0, "attention_k": 0.5})
    model, held = made(optimizer=optimizer, **options)
    model.double()  # RMSprop divides by gradients of its first steps, and makes of rounding what processors differ in
    trainer = HybridTrainer(
        model, held, config(**{**STILL, "recipe": str(recipe.save(tmp_path / "recipe.toml"))}),
        loss_fn=loss_fn,
    )  # fmt: skip
    plain = made()[0].double()
    decay = options.get("weight_decay", 0.0)
    groups = recipe.param_groups(plain, options["lr"], weight_decay=decay)
    rest = {k: v for k, v in options.items() if k not in ("lr", "weight_decay")}
    by_hand = optimizer(groups, **rest)
    for batch in batches(20):
        trainer.step(batch)
        by_hand.zero_grad()
        loss_fn(plain, batch).backward()
        by_hand.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8, msg=name)


def test_a_fused_matrix_is_cut_by_thirds() -> None:
    apart, fused = Small(), Small(fused=True)
    fused.load_state_dict({**fused.state_dict(), **{k: v for k, v in apart.state_dict().items() if "_proj" not in k
                           or "up" in k or "down" in k}})  # fmt: skip
    with torch.no_grad():
        fused.block.qkv.weight.copy_(torch.cat([apart.block.q_proj.weight, apart.block.k_proj.weight,
                                                apart.block.v_proj.weight]))  # fmt: skip
    for model in (apart, fused):
        trainer = HybridTrainer(
            model, torch.optim.SGD(model.parameters(), lr=0.1),
            config(**{**STILL, "recipe": "prior"}), loss_fn=loss_fn,
        )  # fmt: skip
        assert dict(trainer.recipe().rates) == PRIOR
        for batch in batches(5):
            trainer.step(batch)
    together = torch.cat([apart.block.q_proj.weight, apart.block.k_proj.weight, apart.block.v_proj.weight])
    torch.testing.assert_close(fused.block.qkv.weight, together)


@pytest.mark.parametrize(("rows", "columns", "axis"), [(12, 4, 0), (4, 12, 1), (12, 12, None), (8, 4, None)])
def test_where_a_fused_matrix_is_cut(rows: int, columns: int, axis: int | None) -> None:
    cuts = thirds(torch.zeros(rows, columns))
    assert [tuple(torch.zeros(rows, columns)[cut].shape) for cut in cuts] == ([] if axis is None else [(4, 4)] * 3)


def test_off_is_the_plain_loop_and_the_prior_is_for_untrained_blocks_alone() -> None:
    model, _ = made()
    assert dict(prior(*predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=1.0))).rates) == PRIOR
    with torch.no_grad():
        model.block.norm.weight[0] += 0.1  # it has been trained
    assert prior(*predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=1.0))).empty
    mlp = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    assert prior(*predicted_parameters(mlp, torch.optim.SGD(mlp.parameters(), lr=1.0))).empty


def muon(model: nn.Module, adjusted: str = "match_rms_adamw", **options: Any) -> MuonAdamW:
    """Muon for the block's matrices, whose step is of Adam's length or of another, and AdamW for the rest."""
    recipe = replace(LANGUAGE, **{"lr": 1e-2, "optimizer": "muon"} | options)
    optimizer = muon_adamw(model, [{"params": list(model.parameters()), "weight_decay": recipe.weight_decay}], recipe)
    for group in optimizer.param_groups:
        if group["use_muon"]:
            group["adjust_lr_fn"] = adjusted
    return optimizer


WHOSE_PRIOR: list[tuple[str, Any, str, Any]] = [
    ("Adam", lambda m: torch.optim.Adam(m.parameters(), lr=1e-2), "optimizer", PRIOR),
    ("AdamW", lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), "optimizer", PRIOR),
    ("SGD", lambda m: torch.optim.SGD(m.parameters(), lr=1e-2), "optimizer", None),
    ("NAdam", lambda m: torch.optim.NAdam(m.parameters(), lr=1e-2), "optimizer", None),
    ("Muon beside AdamW", muon, "optimizer", PRIOR_BESIDE_MUON),
    ("Muon's own length", lambda m: muon(m, "original"), "optimizer", None),
    ("Muon alone", lambda m: torch.optim.Muon([m.block.q_proj.weight], adjust_lr_fn="match_rms_adamw"),
     "optimizer", None),
    ("AdamW, matrices by Muon", lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), "muon", PRIOR_BESIDE_MUON),
    ("AdamW, matrices by SOAP", lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), "soap", None),
    ("Muon, matrices by Muon", muon, "muon", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "step", "expected"), [w[1:] for w in WHOSE_PRIOR], ids=[w[0] for w in WHOSE_PRIOR]
)
def test_factors_are_those_that_were_measured_with_the_optimizer(optimizer: Any, step: str, expected: Any) -> None:
    model = Small()
    held = optimizer(model)
    assert measured_factors(held, step) == expected
    asked = for_run("auto", held, *predicted_parameters(model, held), step)
    present = set(predicted_parameters(model, held)[1].roles)
    assert dict(asked.rates) == {role: rate for role, rate in (expected or {}).items() if role in present}


@pytest.mark.parametrize(
    ("deviation", "rate", "expected"),
    [
        pytest.param(1.0, 1e-3, 10.0, id="short steps: a hundredth of its size"),
        pytest.param(1.0, 1e-4, 16.0, id="no further than this"),
        pytest.param(1.0, 3e-3, 4.0, id="long enough"),
        pytest.param(0.02, 1e-4, 4.0, id="a small table"),
        pytest.param(0.0, 1e-4, 4.0, id="a table of zeros"),
        pytest.param(float("nan"), 1e-4, 4.0, id="no numbers"),
        pytest.param(1.0, 0.0, 4.0, id="a rate of zero"),
    ],
)
def test_a_table_steps_by_a_hundredth_of_its_size_at_least(deviation: float, rate: float, expected: float) -> None:
    model, optimizer = made(lr=rate)
    with torch.no_grad():
        model.embedding.weight.fill_(deviation)
    recipe = for_run("auto", optimizer, *predicted_parameters(model, optimizer))
    assert dict(recipe.rates) == PRIOR | {"embedding": pytest.approx(expected)}
    assert ("hundredth" in recipe.origin) == (expected > 4)
    asked = for_run("prior", optimizer, *predicted_parameters(model, optimizer))
    assert dict(asked.rates) == PRIOR  # which is asked for by its name
    model.head.weight = model.embedding.weight
    tied = for_run("auto", optimizer, *predicted_parameters(model, optimizer))
    assert tied.rate_of("embedding") == 4.0


SCHEDULES: list[tuple[str, Any, float]] = [
    ("none", lambda o: None, 0.01),
    ("warm-up", lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min((t + 1) / 100, 1.0)), 0.01),
    ("one cycle", lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.03, total_steps=50), 0.03),
    ("from a tenth", lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 20), 0.01),
]


@pytest.mark.parametrize(("schedule", "expected"), [s[1:] for s in SCHEDULES], ids=[s[0] for s in SCHEDULES])
def test_the_peak_of_a_schedule_is_known_before_its_warm_up(schedule: Any, expected: float) -> None:
    _, optimizer = made()
    schedule(optimizer)
    assert peak_rate_of(optimizer) == pytest.approx(expected)


@pytest.mark.parametrize("held", [None, "a word", [1.0, 2.0], torch.ones(2)], ids=["none", "word", "list", "tensor"])
@pytest.mark.parametrize("key", ["max_lr", "initial_lr"])
def test_a_group_may_hold_anything_by_a_schedules_names(key: str, held: Any) -> None:
    model = Small()
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), key: held}], lr=1e-3)
    assert peak_rate_of(optimizer) == 1e-3
    assert HybridTrainer(model, optimizer, config(recipe="auto"), loss_fn=loss_fn).recipe().rate_of("embedding") > 4


def by_the_loop(peak: float) -> Any:
    """A warm-up that a loop writes itself, from next to nothing."""
    return lambda optimizer, step: optimizer.param_groups[0].update(lr=peak * (step + 1) / 10)


BEYOND: list[tuple[str, float, Any, Any, float]] = [
    ("a cycle", 1e-5, lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-5, 5e-3, 5, cycle_momentum=False), None, 4.0),
    ("a factor above one", 1e-5, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 10.0 * min(t + 1, 50)), None,
     10.0),
    ("a range test", 1e-4, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 1.5), None, 4.0),
    ("the loop's own", 1e-7, None, by_the_loop(2e-3), 5.0),
    ("the loop's own, at a low rate", 1e-7, None, by_the_loop(1e-4), 16.0),
    ("made afterwards", 1e-3, None, lambda o, t: torch.optim.lr_scheduler.OneCycleLR(o, 5e-3, 9) if t == 3 else
     o.param_groups[0].update(lr=5e-3) if t == 8 else None, 4.0),
    ("as it was read", 1e-3, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, 30), None, 10.0),
]  # fmt: skip


@pytest.mark.parametrize("rides", [False, True], ids=["trainer", "attached"])
@pytest.mark.parametrize(("rate", "schedule", "write", "expected"), [b[1:] for b in BEYOND], ids=[b[0] for b in BEYOND])
def test_a_table_steps_no_further_where_the_rate_rises_above_its_peak(
    rate: float, schedule: Any, write: Any, expected: float, rides: bool, tmp_path: Path
) -> None:
    """Its factor is that of the highest rate so far; a run that is continued has the same."""

    def begun(to: Path | None = None) -> tuple[Any, Any, Any]:
        model, optimizer = made(lr=rate)
        with torch.no_grad():
            model.embedding.weight.copy_(torch.where(model.embedding.weight > 0, 1.0, -1.0))
        made_for = None if schedule is None else schedule(optimizer)
        build = attach if rides else HybridTrainer
        run = build(model, optimizer, config(max_predict_steps=1), loss_fn=loss_fn, lr_scheduler=made_for)
        if to is not None:
            run.load_checkpoint(to)
        return model, optimizer, run

    model, optimizer, run = begun()
    for step, batch in enumerate(batches(10)):
        if write is not None:
            write(optimizer, step)
        if rides:
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            run.note(loss, batch)
            optimizer.step()
        else:
            run.force_full_phase(1)
            run.step(batch)
    assert run.recipe().rate_of("embedding") == pytest.approx(expected, rel=0.02)
    again = begun(run.save_checkpoint(tmp_path))[2]
    assert (again.recipe(), again.recipe().table) == (run.recipe(), run.recipe().table)
    assert Recipe.load(run.recipe().save(tmp_path / "recipe.toml")) == run.recipe()


def test_a_table_follows_the_rate_of_its_own_group() -> None:
    """Another group may rise above it, and one that comes later may begin there."""
    torch.manual_seed(0)
    model = Small()
    later = list(model.block.up_proj.parameters())
    rest = [p for n, p in model.named_parameters() if "embedding" not in n and "up_proj" not in n]
    optimizer = torch.optim.AdamW([{"params": model.embedding.weight}, {"params": rest}], lr=1e-3)
    trainer = HybridTrainer(model, optimizer, config(recipe="auto", max_predict_steps=1), loss_fn=loss_fn)
    begun = trainer.recipe().rate_of("embedding")
    assert begun > 8
    optimizer.param_groups[1]["lr"] = 0.01
    optimizer.add_param_group({"params": later, "lr": 0.02})
    trainer.step(batches(1)[0])
    assert trainer.recipe().rate_of("embedding") == begun
    optimizer.param_groups[0]["lr"] = 0.01
    trainer.step(batches(1)[0])
    assert trainer.recipe().rate_of("embedding") == 4.0


def test_a_run_from_before_there_was_a_peak_goes_on_as_it_was() -> None:
    then = {"rates": {"head": 8.0, "embedding": 4.0}, "origin": "then", "ended": False}
    saved = {"optimizer_step": {"of_settings": {"RoleRates": then}}}
    model, optimizer = made(lr=1e-3)
    live = HybridTrainer(model, optimizer, config(recipe="auto"), loss_fn=loss_fn)
    assert live.recipe().table is not None
    upgraded = migration.with_later(saved, live.run.state_dict())
    (rates,) = [m for m in live.run.optimizer_step.modifiers if isinstance(m, RoleRates)]
    rates.load_state_dict(upgraded["optimizer_step"]["of_settings"]["RoleRates"])
    assert (dict(live.recipe().rates), live.recipe().table) == ({"head": 8.0, "embedding": 4.0}, None)


def test_the_prior_of_an_earlier_version_is_continued_by_its_name(tmp_path: Path) -> None:
    """With Muon it had other factors; a file that says otherwise is still refused."""

    def begun(asked: str) -> HybridTrainer:
        torch.manual_seed(0)
        model = Small()
        return HybridTrainer(model, muon(model), config(**{**STILL, "recipe": asked}), loss_fn=loss_fn)

    first = begun("prior")
    (rates,) = [m for m in first.run.optimizer_step.modifiers if isinstance(m, RoleRates)]
    rates._take(replace(first.recipe(), rates=PRIOR))
    first.step(batches(1)[0])
    saved = first.save_checkpoint(tmp_path)
    again = begun("prior")
    again.load_checkpoint(saved)
    assert dict(again.recipe().rates) == PRIOR
    with pytest.raises(CheckpointError, match=r"set training\.recipe to the one it was begun with"):
        begun(str(Recipe({"embedding": 2.0}).save(tmp_path / "other.toml"))).load_checkpoint(saved)
    state = rates.state_dict()
    with pytest.raises(CheckpointError, match="cannot be used"):
        again.run.optimizer_step.modifiers[0].load_state_dict({**state, "rates": {"head": "x"}})


def test_a_run_is_continued_with_the_file_of_its_own_recipe(tmp_path: Path) -> None:
    """Its factors are whole numbers there."""
    model, optimizer = made()
    first = HybridTrainer(model, optimizer, config(recipe="prior"), loss_fn=loss_fn)
    first.step(batches(1)[0])
    saved, file = first.save_checkpoint(tmp_path), first.recipe().save(tmp_path / "recipe.toml")
    model, optimizer = made()
    again = HybridTrainer(model, optimizer, config(recipe=str(file)), loss_fn=loss_fn)
    again.load_checkpoint(saved)
    assert again.recipe().rates == first.recipe().rates


def test_a_run_goes_on_with_the_rate_that_its_table_began_with(tmp_path: Path) -> None:
    """What is trained by then has another size."""

    def run(scale: float) -> HybridTrainer:
        model, optimizer = made(lr=1e-3)
        with torch.no_grad():
            model.embedding.weight.mul_(scale)
        return HybridTrainer(model, optimizer, config(recipe="auto"), loss_fn=loss_fn)

    first, again = run(1.0), run(0.1)
    assert first.recipe().rate_of("embedding") > 4 == again.recipe().rate_of("embedding")
    again.load_checkpoint(first.save_checkpoint(tmp_path))
    assert again.recipe().rates == first.recipe().rates


@pytest.mark.parametrize(("rate", "expected"), [(1e-2, 8.0), (2.5e-2, 4.0), (0.2, 1.0)])
def test_beside_muon_a_table_steps_by_a_tenth_at_most(rate: float, expected: float) -> None:
    model = Small()
    held = muon(model, lr=rate)
    assert dict(for_run("auto", held, *predicted_parameters(model, held)).rates) == {"embedding": expected}


@pytest.mark.parametrize("begins", [0.0, 1e-4, 1e-2])
def test_beside_muon_a_table_steps_by_a_tenth_at_most_at_a_peak_that_no_group_tells(
    begins: float, tmp_path: Path
) -> None:
    """A warm-up that the loop writes; a run that is continued has the same bound."""

    def begun() -> tuple[Any, HybridTrainer]:
        torch.manual_seed(0)
        model = Small()
        held = two_inside(model)
        for group in held.param_groups:
            group["lr"] = begins
        return held, HybridTrainer(model, held, config(recipe="auto", max_predict_steps=1), loss_fn=loss_fn)

    def step(held: Any, trainer: HybridTrainer, rate: float) -> float:
        for group in held.param_groups:
            group["lr"] = rate
        trainer.force_full_phase(1)
        trainer.step(batches(1)[0])
        return trainer.recipe().rate_of("embedding")

    held, trainer = begun()
    assert step(held, trainer, 1e-2) == pytest.approx(8.0)
    saved = trainer.save_checkpoint(tmp_path)
    other, again = begun()
    again.load_checkpoint(saved)
    for one, run in ((held, trainer), (other, again)):
        assert step(one, run, 2e-2) == pytest.approx(5.0)
        assert step(one, run, 0.5) == 1.0


def test_a_bound_on_tables_adds_no_role_to_a_network_without_one() -> None:
    model = Small()
    model.embedding = nn.EmbeddingBag(VOCABULARY, WIDTH)
    held = muon(model, lr=0.2)
    assert not for_run("auto", held, *predicted_parameters(model, held)).rates


def test_the_ladder_turns_at_the_head_alone_where_the_prior_has_no_factor_for_it() -> None:
    assert dict(with_head(Recipe(PRIOR_BESIDE_MUON), 3.0).rates) == {"embedding": 8.0, "head": 3.0}
    assert dict(with_head(Recipe(PRIOR), 2.0).rates) == {
        "head": 2.0, "embedding": 1.0, "attention_q": 1.0, "attention_k": 1.0,
    }  # fmt: skip
    model = Small()
    found = find_recipe(model, muon(model), loss_fn, batches(14), num_steps=12)
    assert found.recipe.rate_of("embedding") == 8.0


def test_beside_muon_a_table_that_is_the_head_has_no_rate_of_its_own() -> None:
    model = Small()
    model.head.weight = model.embedding.weight
    held = muon(model)
    assert for_run("auto", held, *predicted_parameters(model, held)).empty
    assert not for_run("prior", held, *predicted_parameters(model, held)).empty


class TwoHeads(Small):
    """The table is the head of language, and there is another head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 2)
        self.head.weight = self.embedding.weight


def test_a_table_that_is_a_head_is_known_beside_another_head() -> None:
    """What steps it further than the prior was measured with tables that are none."""
    model = TwoHeads()
    held = two_inside(model)
    assert "head" in predicted_parameters(model, held)[1].roles
    assert HybridTrainer(model, held, config(recipe="auto"), loss_fn=loss_fn).recipe().empty
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert dict(HybridTrainer(model, adam, config(recipe="auto"), loss_fn=loss_fn).recipe().rates) == PRIOR


@pytest.mark.parametrize("of", ["embedding", "head"])
def test_a_table_or_a_head_that_muon_steps_has_no_rate_of_its_own(of: str) -> None:
    """All matrices handed to Muon: nothing of that was measured."""
    model = Small()
    held = two_inside(model, also=getattr(model, of).weight)
    recipe = HybridTrainer(model, held, config(recipe="auto"), loss_fn=loss_fn).recipe()
    assert recipe.empty
    assert "embedding or the head" in recipe.origin


class TwoInside(torch.optim.Optimizer):
    """Muon and AdamW in a class of any name; groups are theirs."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        self.inner = list(inner)
        super().__init__([group for one in inner for group in one.param_groups], {})
        self.param_groups = [group for one in inner for group in one.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.inner:
            one.step()


def two_inside(model: nn.Module, also: Tensor | None = None) -> TwoInside:
    """Muon for the block's matrices, and for one more."""
    hidden = [p for p in model.block.parameters() if p.ndim == 2] + ([] if also is None else [also])
    held = set(map(id, hidden))
    rest = [p for p in model.parameters() if id(p) not in held]
    return TwoInside(
        torch.optim.Muon(hidden, lr=1e-2, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, lr=1e-2)
    )


def test_muon_inside_any_class_has_its_prior_and_no_multiplier() -> None:
    model = Small()
    held = two_inside(model)
    schedule = torch.optim.lr_scheduler.LinearLR(held, 1.0, 0.1, 40)
    settings = config(recipe="auto", max_lr_multiplier=100.0, min_group_factor=0.01)
    trainer = HybridTrainer(model, held, settings, loss_fn=loss_fn, lr_scheduler=schedule)
    assert dict(trainer.recipe().rates) == PRIOR_BESIDE_MUON
    scale = trainer.run.optimizer_step.scale
    assert (scale.may_grow, scale.shortening) == (False, False)


def test_muon_has_its_prior_by_default_and_it_is_groups_with_rates_of_their_own() -> None:
    """In the user's optimizer, in the step of the trainer's own, and by hand: one and the same run."""
    still = STILL | {"recipe": "auto", "max_predict_steps": 1}

    def run(how: str) -> nn.Module:
        torch.manual_seed(0)
        model = Small()
        if how == "by hand":
            recipe = replace(LANGUAGE, lr=1e-2, optimizer="muon", momentum=0.95, weight_decay=0.0)
            optimizer = by_role(model, recipe, PRIOR_BESIDE_MUON)
            for batch in batches(2):  # Muon computes in bfloat16: later steps are apart by its rounding
                optimizer.zero_grad()
                loss_fn(model, batch).backward()
                optimizer.step()
            return model
        if how == "optimizer":
            optimizer = muon(model, momentum=0.95, weight_decay=0.0, betas=LANGUAGE.betas)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=LANGUAGE.betas, weight_decay=0.0)
        trainer = HybridTrainer(model, optimizer, config(**still, step=how if how == "muon" else "optimizer"),
                                loss_fn=loss_fn)  # fmt: skip
        assert dict(trainer.recipe().rates) == PRIOR_BESIDE_MUON
        for batch in batches(2):
            trainer.step(batch)
        return model

    expected = run("by hand").state_dict()
    for how in ("optimizer", "muon"):
        for name, value in run(how).state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=f"{how}: {name}")


def test_nothing_frozen_moves_and_weight_decay_stays_what_it_was() -> None:
    model, optimizer = made(weight_decay=0.5, lr=0.1)
    model.head.weight.requires_grad_(False)
    before = model.head.weight.detach().clone()
    trainer = HybridTrainer(model, optimizer, config(**{**STILL, "recipe": "prior"}), loss_fn=loss_fn)
    for batch in batches(3):
        trainer.step(batch)
    assert torch.equal(model.head.weight, before)


def test_decay_pulls_by_the_rate_and_not_by_the_factor() -> None:
    weight = nn.Embedding(4, WIDTH)
    block = Small()
    block.embedding = weight
    unused = torch.tensor([[0, 1, 0, 1, 0, 1]])  # rows 2 and 3 have a gradient of zero
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1, weight_decay=0.5)
    before = weight.weight.detach().clone()
    trainer = HybridTrainer(block, optimizer, config(**{**STILL, "recipe": "prior"}), loss_fn=loss_fn)
    trainer.step(unused)
    torch.testing.assert_close(weight.weight[2:], before[2:] * (1 - 0.1 * 0.5))


def test_groups_that_a_load_has_replaced_are_looked_at_anew() -> None:
    def run(load: bool) -> nn.Module:
        model, optimizer = made(weight_decay=0.5)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12)
        trainer = HybridTrainer(model, optimizer, config(**{**STILL, "recipe": "prior"}), loss_fn=loss_fn,
                                lr_scheduler=schedule)  # fmt: skip
        for step, batch in enumerate(batches(12)):
            if load and step == 5:
                optimizer.load_state_dict(optimizer.state_dict())
            trainer.step(batch)
        return model

    assert_same(run(load=False).state_dict(), run(load=True).state_dict())


def test_a_run_with_a_recipe_goes_on_bit_for_bit_and_rides_along_the_same_way(tmp_path: Path) -> None:
    def trainer() -> HybridTrainer:
        model, optimizer = made()
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 40)
        return HybridTrainer(model, optimizer, config(recipe="prior"), loss_fn=loss_fn, lr_scheduler=schedule)

    whole, first = trainer(), trainer()
    data = batches(40)
    for batch in data:
        whole.step(batch)
    for batch in data[:17]:
        first.step(batch)
    half = first.save_checkpoint(tmp_path)
    second = trainer()
    second.load_checkpoint(half)
    for batch in data[17:]:
        second.step(batch)
    assert_same(whole.run.subject.model.state_dict(), second.run.subject.model.state_dict())

    model, optimizer = made()
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 40)
    engine = attach(model, optimizer, config(recipe="prior", max_predict_steps=0), loss_fn=loss_fn,
                    lr_scheduler=schedule)  # fmt: skip
    assert dict(engine.recipe().rates) == PRIOR


def test_a_chosen_recipe_is_the_one_that_the_run_was_begun_with(tmp_path: Path) -> None:
    def trainer(steps: int, asked: str) -> HybridTrainer:
        model, optimizer = made()
        begun = HybridTrainer(model, optimizer, config(recipe=asked), loss_fn=loss_fn)
        for batch in batches(steps):
            begun.step(batch)
        return begun

    begun = trainer(5, "auto")
    assert dict(begun.recipe().rates) == PRIOR
    saved = begun.save_checkpoint(tmp_path)
    trained, _ = made()
    trained.load_state_dict(begun.run.subject.model.state_dict())  # its norms have moved: no prior for it
    other = HybridTrainer(trained, torch.optim.AdamW(trained.parameters(), lr=1e-2), config(), loss_fn=loss_fn)
    assert other.recipe().empty
    other.load_checkpoint(saved)
    assert dict(other.recipe().rates) == PRIOR
    without = trainer(5, "off").save_checkpoint(tmp_path / "without")
    later = trainer(0, "auto")
    later.load_checkpoint(without)
    assert later.recipe().empty


@pytest.mark.parametrize(
    ("changes", "optimizer", "chosen"),
    [({}, torch.optim.AdamW, True), ({}, torch.optim.Adam, True), ({}, torch.optim.SGD, False),
     ({"enabled": False}, torch.optim.AdamW, False), ({"max_predict_steps": 0}, torch.optim.AdamW, False),
     ({"recipe": "off"}, torch.optim.AdamW, False)],
)  # fmt: skip
def test_where_a_recipe_is_chosen(changes: dict[str, Any], optimizer: Any, chosen: bool) -> None:
    model, held = made(optimizer=optimizer)
    trainer = HybridTrainer(model, held, config(**changes), loss_fn=loss_fn)
    assert trainer.recipe().empty is not chosen


class TableIsHead(Small):
    """Its head is the embedding: the same parameter, or ``by_hand`` its transpose."""

    def __init__(self, by_hand: bool = False, positions: bool = False, trains: bool = True) -> None:
        super().__init__()
        if by_hand:
            del self.head
        else:
            self.head.weight = self.embedding.weight
        self.positions = nn.Parameter(torch.zeros(LENGTH - 1, WIDTH)) if positions else None
        self.embedding.weight.requires_grad_(trains)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.block(x if self.positions is None else x + self.positions) @ self.embedding.weight.T


class TwoTables(Small):
    """Encoder and decoder share a table, and the head is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Embedding(VOCABULARY, WIDTH)
        self.second.weight = self.embedding.weight


class FrozenHead(Small):
    def __init__(self) -> None:
        super().__init__()
        self.head.requires_grad_(False)


@pytest.mark.parametrize(
    ("build", "changes", "least"),
    [(Small, {}, 0.01), (TwoTables, {}, 0.01), (FrozenHead, {}, 0.01), (TableIsHead, {}, 0.3),
     (lambda: TableIsHead(by_hand=True), {}, 0.3), (lambda: TableIsHead(positions=True), {}, 0.3),
     (lambda: TableIsHead(trains=False), {}, 0.3), (TableIsHead, {"recipe": "off"}, 0.01),
     (TableIsHead, {"min_group_factor": 0.5}, 0.5)],
    ids=["own", "two tables", "frozen", "tied", "by hand", "positions", "frozen table", "no recipe", "asked for more"],
)  # fmt: skip
def test_blocks_begin_slowly_and_less_so_behind_a_table_that_is_the_head(
    build: Any, changes: Any, least: float
) -> None:
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    settings = config(**{"max_lr_multiplier": 100.0, "min_group_factor": 0.01, **changes})
    cuts = HybridTrainer(model, optimizer, settings, loss_fn, schedule).run.optimizer_step.scale.cuts
    assert (min(cuts.factors), cuts.least) == (least, least)
    assert cuts.watching


@pytest.mark.parametrize("asked", ["auto", "prior"])
def test_what_withdraws_all_motions_withdraws_the_recipe_too(asked: str, tmp_path: Path) -> None:
    model, optimizer = made()
    trainer = HybridTrainer(
        model, optimizer, config(**{**STILL, "max_predict_steps": 8, "recipe": asked}), loss_fn=loss_fn
    )
    data = batches(20)
    trainer.step(data[0])
    assert trainer.run.moving
    end_motions(trainer.run)
    assert not trainer.run.moving
    saved = trainer.save_checkpoint(tmp_path)
    plain, by_hand = made()
    plain.load_state_dict(model.state_dict())
    by_hand.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again, held = made()
    resumed = HybridTrainer(again, held, config(**{**STILL, "max_predict_steps": 8, "recipe": asked}), loss_fn=loss_fn)
    resumed.load_checkpoint(saved)
    for batch in data[1:]:
        for run in (trainer, resumed):
            run.force_full_phase(1)
            run.step(batch)
        by_hand.zero_grad()
        loss_fn(plain, batch).backward()
        by_hand.step()
    assert_same(model.state_dict(), plain.state_dict())
    assert_same(again.state_dict(), plain.state_dict())


def test_rates_that_the_user_has_set_by_role_are_his() -> None:
    model, _ = made()
    own = [{"params": model.head.parameters(), "lr": 5e-2}, {"params": [*model.embedding.parameters(),
           *model.block.parameters()], "lr": 1e-2}]  # fmt: skip
    assert HybridTrainer(model, torch.optim.AdamW(own), config(), loss_fn=loss_fn).recipe().empty


def test_another_recipe_is_not_the_same_run(tmp_path: Path) -> None:
    model, optimizer = made()
    first = HybridTrainer(model, optimizer, config(recipe="prior"), loss_fn=loss_fn)
    first.step(batches(1)[0])
    saved = first.save_checkpoint(tmp_path)
    other = Recipe({"head": 2.0}).save(tmp_path / "other.toml")
    for asked in ("off", str(other)):
        model, optimizer = made()
        second = HybridTrainer(model, optimizer, config(recipe=asked), loss_fn=loss_fn)
        with pytest.raises(CheckpointError, match=r"recipe|step modifiers"):
            second.load_checkpoint(saved)


def test_a_file_is_what_was_saved_and_a_bad_one_is_one_clear_line(tmp_path: Path) -> None:
    for recipe in (
        Recipe({"head": 7.5, "my role": 0.25}, 'by "hand"\\', 2.5),
        Recipe({"a\x01\tb\nc\x7f": 3 * 3**0.5, "\u00fc": 1 / 3}, "two\nlines\r", 1.3**3),
    ):
        assert Recipe.load(recipe.save(tmp_path / "good.toml")) == recipe
    for text, says in (
        ("[rates]\nhead = -1", "head"), ("[rates]\nhead = 'x'", "head"), ("rates = 3", "table"),
        ("factor = 2", "unknown key"),
        ("[rates", "TOML"), ("multiplier = nan", "multiplier"), ("[rates]\nhead = true", "head"),
        (f"[rates]\nhead = 1{'0' * 400}", "head"), (f"[rates]\nhead = 1{'0' * 9000}", "TOML"),
        ("[rates]\nhead = inf", "head"),
    ):  # fmt: skip
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ConfigError, match=says):
            Recipe.load(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Recipe.load(tmp_path / "none.toml")
    model, optimizer = made()
    foreign = Recipe({"elbow": 2.0}).save(tmp_path / "foreign.toml")
    with pytest.raises(ConfigError, match="elbow"):
        HybridTrainer(model, optimizer, config(recipe=str(foreign)), loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("best", "found"), [(1.0, 1.0), (3.0, 3.0), (9.0, 9.0), (5.2, 3 * 3**0.5), (1 / 9, 1 / 9), (1000.0, 81 * 3**0.5)]
)
def test_the_ladder_climbs_to_the_best_rung(best: float, found: float) -> None:
    losses = lambda factor: 1 + 0.1 * (torch.log(torch.tensor(factor / best)).item()) ** 2  # noqa: E731
    assert _climb(losses) == pytest.approx(found)
    assert _climb(lambda factor: float("inf") if factor != 1 else 1.0) == 1.0


def test_the_search_leaves_no_trace_and_says_what_it_cost() -> None:
    model, optimizer = made(lr=1e-3)
    data = batches(18)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    generator = torch.get_rng_state()
    found = find_recipe(model, optimizer, loss_fn, data, num_steps=16)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert all(p.grad is None for p in model.parameters())
    assert found.recipe.rate_of("head") > 1  # the base rate is far too low
    assert len(found.tries) >= 2
    assert found.cost <= len(found.tries) * (16 / 4 + 1)
    with pytest.raises(ConfigError, match="18 batches are needed"):
        find_recipe(model, optimizer, loss_fn, data[:17], num_steps=16)
    with pytest.raises(ConfigError, match="at least 12"):
        find_recipe(model, optimizer, loss_fn, data, num_steps=3)


@pytest.mark.parametrize(
    ("deviation", "rate", "optimizer"),
    [
        pytest.param(1.0, 1e-4, torch.optim.AdamW, id="too low a rate for a table of this size"),
        pytest.param(0.02, 1e-2, torch.optim.AdamW, id="far enough"),
        pytest.param(1.0, 1e-4, torch.optim.SGD, id="SGD"),
    ],
)  # fmt: skip
def test_the_search_raises_a_table_as_the_trainer_does(deviation: float, rate: float, optimizer: Any) -> None:
    """By the size that it has before the search, which moves it."""
    model, held = made(optimizer=optimizer, lr=rate)
    with torch.no_grad():
        model.embedding.weight.mul_(deviation / model.embedding.weight.std())
    recipe = find_recipe(model, held, loss_fn, batches(14), num_steps=12).recipe
    unraised = max(1.0, PRIOR["embedding"] * recipe.rate_of("head") / PRIOR["head"])
    size = float(model.embedding.weight.detach().square().mean().sqrt())
    raised = min(16.0, 0.01 * size / rate) if optimizer is torch.optim.AdamW else 0.0
    assert recipe.rate_of("embedding") == pytest.approx(max(unraised, raised), rel=1e-2)
    assert ("hundredth" in recipe.origin) == (raised > unraised)


def test_a_loss_that_raises_in_the_search_leaves_everything_as_it_was() -> None:
    model, optimizer = made()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    calls = 0

    def failing(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise RuntimeError("no more")
        return loss_fn(model, batch)

    with pytest.raises(RuntimeError, match="no more"):
        find_recipe(model, optimizer, failing, batches(18), num_steps=16)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_miniature_is_a_complete_run() -> None:
    factors = [shape(step, 30) for step in range(30)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[15] == 1
    assert factors[-1] < 0.1


def test_peak_rates_are_factor_times_multiplier_times_rate() -> None:
    assert Recipe({"head": 8.0}, multiplier=2.0).peak_rates(0.1) == {"head": pytest.approx(1.6), "others": 0.2}


def test_the_command_line_takes_a_recipe_home(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hybrid_predict_trainer import cli

    run = ["train", "--task", "gpt", "--preset", "0.3M", "--steps", "2"]
    assert cli.main([*run, "--out", str(tmp_path / "first")]) == 0
    capsys.readouterr()
    assert cli.main(["recipe", str(tmp_path / "first"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rates"] == PRIOR
    told = json.loads((tmp_path / "first" / "summary.json").read_text())
    wanted = {role: factor * told["lr"] for role, factor in PRIOR.items()}
    assert told["peak_rates"] == pytest.approx(wanted | {"others": told["lr"]})
    assert cli.main(["recipe", str(tmp_path)]) == 2
    file = tmp_path / "first" / "recipe.toml"
    assert cli.main([*run, "--out", str(tmp_path / "second"), "--set", f"training.recipe={file}"]) == 0
    assert cli.main([*run, "--out", str(tmp_path / "third"), "--set", "training.recipe=nowhere.toml"]) == 2
    assert "nowhere.toml" in capsys.readouterr().err


def test_what_the_command_line_says_of_a_recipe_beside_muon_is_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not AdamW alone, which would have the embedding's factor and Muon's step nowhere."""
    from hybrid_predict_trainer import cli

    torch.manual_seed(0)
    model = Small()
    still = STILL | {"recipe": "auto", "max_predict_steps": 1}
    trainer = HybridTrainer(model, muon(model, momentum=0.95), config(**still), loss_fn=loss_fn)
    file = trainer.recipe().save(tmp_path / "recipe.toml")
    assert cli.main(["recipe", str(file)]) == 0
    said = [line[4:] for line in capsys.readouterr().out.splitlines() if line.startswith("#   ")]
    torch.manual_seed(0)
    plain = Small()
    matrices = [p for p in plain.block.parameters() if p.ndim == 2]
    held = set(map(id, matrices))
    names: dict[str, Any] = {
        "torch": torch, "model": plain, "LR": LANGUAGE.lr, "DECAY": LANGUAGE.weight_decay, "MATRICES": matrices,
        "THE_REST": [p for p in plain.parameters() if id(p) not in held],
    }  # fmt: skip
    exec("\n".join(said), names)
    for group in names["adamw"].param_groups:
        group["betas"] = LANGUAGE.betas
    for batch in batches(2):
        trainer.step(batch)
        plain.zero_grad()
        loss_fn(plain, batch).backward()
        names["muon"].step()
        names["adamw"].step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


# ---- the multiplier leaves decoupled decay alone ---------------------------------------------------------------


def _decay_in_one_step(factor: float, optimizer: Any = torch.optim.AdamW, **changes: Any) -> tuple[float, Any]:
    """Share of an embedding's unused rows that one step at ``factor`` times the rate takes away, and the optimizer."""
    model = Small()
    held = optimizer(model.parameters(), lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(held, 1.0, 0.1, 100)
    settings = config(**{**STILL, "max_predict_steps": 8, "max_lr_multiplier": 100.0, **changes})
    trainer = HybridTrainer(model, held, settings, loss_fn=loss_fn, lr_scheduler=schedule)
    trainer.run.optimizer_step.scale.multiplier.value = factor
    before = model.embedding.weight.detach()[2:].clone()
    trainer.step(torch.tensor([[0, 1, 0, 1, 0, 1]]))  # the rows from 2 on have a gradient of zero
    return float((1 - model.embedding.weight.detach()[2:] / before).mean()), held


@pytest.mark.parametrize("recipe", ["off", "prior"])
@pytest.mark.parametrize(("follows", "pulled"), [(False, 0.05), (True, 0.2)])
def test_decoupled_decay_is_multiplied_only_if_asked_for(recipe: str, follows: bool, pulled: float) -> None:
    share, held = _decay_in_one_step(4.0, recipe=recipe, decay_follows_multiplier=follows)
    assert share == pytest.approx(pulled, rel=1e-4)
    group = held.param_groups[0]
    assert (group["weight_decay"], group["lr"] <= 0.1) == (0.5, True)  # both are put back
    assert _decay_in_one_step(1.0, recipe=recipe)[0] == pytest.approx(0.05, rel=1e-4)


def test_decay_that_is_part_of_the_gradient_is_part_of_the_step() -> None:
    assert _decay_in_one_step(4.0, torch.optim.SGD, recipe="off")[0] == pytest.approx(0.2, rel=1e-4)


def test_decay_that_no_rate_multiplies_stays_as_it_is() -> None:
    package = pytest.importorskip("pytorch_optimizer")
    fixed = functools.partial(package.Lion, weight_decouple=True, fixed_decay=True)
    assert _decay_in_one_step(4.0, fixed, recipe="off")[0] == pytest.approx(0.5, rel=1e-4)
    assert _decay_in_one_step(1.0, fixed, recipe="off")[0] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("follows", [False, True])
def test_a_step_from_a_package_decays_as_the_users_own(follows: bool) -> None:
    model = Small()
    held = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(held, 1.0, 0.1, 100)
    settings = config(**{**STILL, "max_predict_steps": 8, "step": "soap", "max_lr_multiplier": 100.0,
                         "decay_follows_multiplier": follows})  # fmt: skip
    pytest.importorskip("pytorch_optimizer")
    trainer = HybridTrainer(model, held, settings, loss_fn=loss_fn, lr_scheduler=schedule)
    trainer.run.optimizer_step.scale.multiplier.value = 4.0
    trainer.step(batches(1)[0])
    (inner,) = [m._inner for m in trainer.run.optimizer_step.modifiers if hasattr(m, "_inner")]
    assert [g["lr"] * g["weight_decay"] for g in inner.param_groups] == pytest.approx(
        [0.2 if follows else 0.05] * len(inner.param_groups)
    )


@pytest.mark.parametrize(
    ("name", "keys", "decoupled"),
    [("AdamW", {}, True), ("Adam", {}, False), ("Adam", {"decoupled_weight_decay": True}, True), ("SGD", {}, False),
     ("AdamW8bit", {}, True), ("MuonAdamW", {}, True), ("Lion", {}, True), ("Lamb", {"weight_decouple": True}, True),
     ("SOAP", {"weight_decouple": False}, False), ("Lion", {"weight_decouple": True, "fixed_decay": True}, False)],
)  # fmt: skip
def test_whose_decay_is_decoupled(name: str, keys: dict[str, Any], decoupled: bool) -> None:
    held = type(name, (), {})()
    assert decay_of(held, {"weight_decay": 0.5, **keys}) == (0.5 if decoupled else 0.0)


def test_a_recipe_taken_home_pulls_as_the_run_did() -> None:
    groups = Recipe({"head": 8.0}, multiplier=2.0).param_groups(Small(), 0.1, weight_decay=0.5)
    assert [g["lr"] for g in groups] == pytest.approx([0.2, 1.6])
    assert [g["lr"] * g["weight_decay"] for g in groups] == pytest.approx([0.05, 0.05])


def test_groups_of_ones_own_are_split_and_keep_what_they_say() -> None:
    model, recipe = Small(), Recipe({"head": 8.0, "embedding": 4.0}, multiplier=2.0)
    vectors = [(n, p) for n, p in model.named_parameters() if p.ndim < 2]  # pairs, as torch takes them
    matrices = (p for p in model.block.parameters() if p.ndim > 1)
    model.head.weight.requires_grad_(False)
    own = [
        {"params": matrices, "weight_decay": 0.1, "betas": (0.9, 0.95)}, {"params": vectors},
        {"params": model.embedding.weight, "lr": 0.5, "weight_decay": 0.2},
        {"params": model.head.weight},
    ]  # fmt: skip
    groups = recipe.param_groups(model, 0.1, weight_decay=0.3, groups=own)
    assert [g["rate_factor"] for g in groups] == [1.0, 1.0, 4.0]  # the head does not train
    assert [g["lr"] for g in groups] == pytest.approx([0.2, 0.2, 4.0])
    assert [g["weight_decay"] for g in groups] == pytest.approx([0.05, 0.15, 0.025])
    assert groups[0]["betas"] == (0.9, 0.95)
    assert groups[1]["params"] == vectors
    assert len(groups[0]["params"]) == 5
    assert isinstance(own[1]["params"], list)  # what was handed in is as it was
    assert "lr" not in own[0]
    with pytest.raises(ConfigError, match="a group is a dictionary"):
        recipe.param_groups(model, 0.1, groups=[{"parameters": []}])


def test_groups_hold_the_parameters_themselves() -> None:
    model = nn.Module()
    model.wave = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    model.head = nn.Linear(2, 2)
    groups = Recipe({"head": 8.0}).param_groups(model, 0.1)
    held = {id(p) for g in groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
