"""Today's GPT, its recipe, and what a user can set around it by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer.config.settings import HybridTrainerConfig
from hybrid_predict_trainer.experiments.baselines import baseline_of, run_baseline
from hybrid_predict_trainer.experiments.baselines.roles import by_role, found_recipe, muon_flops, mup
from hybrid_predict_trainer.experiments.run_arm import Arm, Experiment
from hybrid_predict_trainer.move.prior import PRIOR, for_run
from hybrid_predict_trainer.move.recipe import Recipe
from hybrid_predict_trainer.tasks import TaskSettings, make_task
from hybrid_predict_trainer.tasks.base import count_parameters
from hybrid_predict_trainer.tasks.language.modern import PRESETS, ModernGpt
from hybrid_predict_trainer.weights.parameters import predicted_parameters

SMALL = TaskSettings(context=16, batch_size=2)


def small_model(**changes: Any) -> ModernGpt:
    torch.manual_seed(0)
    return ModernGpt(replace(PRESETS["0.3M"], num_layers=1, width=12, num_heads=2, context=16, **changes))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_size_they_say(preset: str) -> None:
    num = count_parameters(lambda: ModernGpt(PRESETS[preset]))
    assert num == pytest.approx(float(preset.partition("M")[0]) * 1e6, rel=0.1)


def test_swiglu_has_as_many_weights_as_relu2() -> None:
    one, other = (count_parameters(lambda mlp=mlp: small_model(mlp=mlp)) for mlp in ("relu2", "swiglu"))
    assert one == other


@pytest.mark.parametrize("mlp", ["relu2", "swiglu"])
def test_it_sees_no_later_token_and_tells_positions_apart(mlp: str) -> None:
    model = small_model(mlp=mlp, head="drawn")
    for module in model.modules():
        if isinstance(module, nn.Linear):  # what is zero hides every fault
            nn.init.normal_(module.weight, std=0.3)
    x = torch.randint(256, (2, 16))
    changed = x.clone()
    changed[:, 9] += 1
    before, after = model(x), model(changed % 256)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])
    swapped = x.clone()
    swapped[:, [2, 3]] = x[:, [3, 2]]
    assert not torch.allclose(model(swapped)[:, 8], before[:, 8], atol=1e-4)


def test_queries_and_keys_are_normalised() -> None:
    model = small_model(head="drawn")
    nn.init.normal_(model.blocks[0].attention.out_proj.weight)
    x = torch.randint(256, (2, 16))
    before = model(x)
    with torch.no_grad():
        model.blocks[0].attention.q_proj.weight.mul_(7.0)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)


def test_the_head_begins_at_zero_or_drawn() -> None:
    assert not small_model().lm_head.weight.any()
    assert small_model(head="drawn").lm_head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not small_model(head="drawn").blocks[0].mlp.down_proj.weight.any()


@pytest.mark.parametrize("preset", ["0.3M", "0.3M-drawn", "0.3M-swiglu"])
def test_the_prior_of_untrained_blocks_applies(preset: str) -> None:
    model = make_task("gpt-modern", replace(SMALL, preset=preset)).build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # far enough for its table
    parameters, groups = predicted_parameters(model, optimizer)
    assert dict(for_run("auto", optimizer, parameters, groups).rates) == PRIOR


def test_settings_without_use_are_refused_in_one_line() -> None:
    for changes in ({"preset": "0.4M"}, {"gradient_checkpointing": True}):
        with pytest.raises(ValueError, match="gpt-modern") as caught:
            make_task("gpt-modern", replace(SMALL, **changes))
        assert "\n" not in str(caught.value)


# ---- by hand --------------------------------------------------------------------------------------------------


def experiment(**recipe: Any) -> Experiment:
    task = make_task("gpt-modern", SMALL)
    defaults = replace(task.defaults, steps=6, warmup_steps=1, **recipe)
    return Experiment(task=task, settings=SMALL, recipe=defaults, config=HybridTrainerConfig(), steps=6)


def moved(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Steps of all parameters under a gradient of ones."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_four_rates_are_the_factors_they_say_and_decay_stays(optimizer: Any) -> None:
    model = small_model(head="drawn")
    recipe = replace(experiment().recipe, optimizer=optimizer, momentum=0.0, lr=1e-3, weight_decay=0.0)
    steps = moved(model, by_role(model, recipe, PRIOR))
    size = {name: float(step.abs().mean()) / 1e-3 for name, step in steps.items()}
    found = {name.removesuffix(".weight").rpartition(".")[2]: round(value, 3) for name, value in size.items()}
    assert (found["lm_head"], found["embed_tokens"], found["q_proj"], found["k_proj"]) == (8, 4, 3, 3)
    assert {found[name] for name in ("v_proj", "out_proj", "up_proj", "down_proj", "final_norm")} == {1}
    decayed = by_role(model, replace(recipe, weight_decay=0.1), PRIOR)
    pulls = {round(g["lr"] * g["weight_decay"], 9) for g in decayed.param_groups}
    assert pulls == {0.0, 1e-4}
    with pytest.raises(ValueError, match="AdamW"):
        by_role(model, replace(recipe, optimizer="adamw8bit"), PRIOR)


def test_mup_speeds_up_what_does_not_grow_with_the_width() -> None:
    setup = experiment()
    model = setup.task.build_model(0)
    values = {**baseline_of("mup").values}
    rates = {id(p): g["lr"] for g in mup(model, setup.recipe, SMALL, values).param_groups for p in g["params"]}
    base = setup.recipe.lr
    found = {n: round(rates[id(p)] / base, 6) for n, p in model.named_parameters()}
    assert found["embed_tokens.weight"] == found["final_norm.weight"] == 3.0
    assert found["lm_head.weight"] == found["blocks.0.attention.q_proj.weight"] == 1.0
    with pytest.raises(ValueError, match="embedding"):
        mup(nn.Linear(2, 2), setup.recipe, SMALL, values)


def test_a_recipe_found_by_a_short_run_is_taken_home(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def counted(setup: Experiment, lr: float, steps: int, seed: int) -> Recipe:
        asked.append((steps, seed))
        return replace(found_recipe(setup, lr, steps, seed), multiplier=2.0)

    monkeypatch.setattr("hybrid_predict_trainer.experiments.baselines.roles.found_recipe", counted)
    found = run_baseline(experiment(), Arm(name="taken-home-3", kind="peer", lr=3e-3), seed=3)
    assert asked == [(2, 2003)]
    half = replace(experiment().recipe, weight_decay=experiment().recipe.weight_decay / 2)  # it pulls as at 3e-3
    by_hand = run_baseline(replace(experiment(), recipe=half), Arm(name="four-rates", kind="peer", lr=6e-3), seed=3)
    assert found.final_val_loss == by_hand.final_val_loss
    assert baseline_of("taken-home-10").grid(experiment().recipe) == (3e-3,)


@pytest.mark.parametrize("name", ["two-rates", "four-rates", "embedding-rate", "mup", "muon", "normuon", "soap"])
def test_they_run_with_clipping_and_schedule_and_are_charged(name: str) -> None:
    if name in ("normuon", "soap"):
        pytest.importorskip("pytorch_optimizer")
    run = run_baseline(experiment(), Arm(name=name, kind="peer", lr=1e-3), seed=3)
    assert not run.error
    assert run.final_val_loss < 5.6  # log 256 is 5.545
    matrix_work = name in ("muon", "normuon", "soap")
    assert (run.counts["num_real_steps"] < 6) == matrix_work  # dearer steps are fewer steps
    assert run.cpu_s > 0


def test_newton_schulz_flops_have_known_values() -> None:
    assert muon_flops([(2, 3)], 1) == 2 * 2 * 2 * (2 * 3 + 2)
    assert muon_flops([(3, 2), (2, 3)], 5) == 10 * 2 * 2 * 2 * (2 * 3 + 2)
