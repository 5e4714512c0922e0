"""What a user hands in by mistake: one line each, which names the argument and says what is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cases import full_batch, loss_fn, make_batches, setup
from hybrid_predict_trainer import ConfigError, HybridTrainer, HybridTrainerConfig, attach, find_recipe
from hybrid_predict_trainer.predictors import Hold

Make = Callable[..., Any]


def _named(name: str, value: Any) -> Callable[[Any, Make], Any]:
    return lambda s, make: make(s.model, s.optimizer, **{"loss_fn": loss_fn, name: value})


def _without_values(make: Make, model: nn.Module) -> Any:
    return make(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda model, batch: model(batch).mean())


#: name -> (what is done, what the line says)
SLIPS: dict[str, tuple[Callable[[Any, Make], Any], str]] = {
    "order": (lambda s, make: make(s.optimizer, s.model, loss_fn=loss_fn), "the model comes first"),
    "loss function as config": (lambda s, make: make(s.model, s.optimizer, loss_fn), "pass it by name"),
    "dictionary as config": (lambda s, make: make(s.model, s.optimizer, {"training.clock": "cost"}), "with_values"),
    "path as config": (lambda s, make: make(s.model, s.optimizer, "run.toml"), "load_config"),
    "parameters as optimizer": (lambda s, make: make(s.model, s.model.parameters()), "not an optimizer"),
    "another model": (lambda s, make: make(setup().model, s.optimizer, loss_fn=loss_fn), "none of the optimizer's"),
    "lazy": (lambda s, make: _without_values(make, nn.Sequential(nn.LazyLinear(2))), "lazy layers"),
    "loss": (_named("loss_fn", 3.0), "loss_fn is a float"),
    "schedule by name": (_named("lr_scheduler", "cosine"), "lr_scheduler is 'cosine'"),
    "class of a schedule": (_named("lr_scheduler", torch.optim.lr_scheduler.StepLR), "the class StepLR"),
    "optimizer as schedule": (_named("lr_scheduler", setup().optimizer), "lr_scheduler is a Adam"),
    "schedule of another": (_named("lr_scheduler", setup(scheduler="lambda").scheduler), "belongs to another"),
    "scaler": (_named("grad_scaler", True), "grad_scaler is a bool"),
    "predictor by name": (_named("predictor", "hold"), 'predictor_type="hold"'),
    "class of a predictor": (_named("predictor", Hold), "the class Hold"),
    "half a predictor": (_named("predictor", object()), "has no observe"),
    "validation": (_named("val_fn", 3), "val_fn is a int"),
    "a sink alone": (_named("sinks", print), "pass a list of objects with a method write"),
    "a function as sink": (_named("sinks", [print]), "sinks holds"),
    "a function as modifier": (_named("modifiers", [print]), "StepModifier"),
}  # fmt: skip


@pytest.mark.parametrize("make", [HybridTrainer, attach], ids=["trainer", "attach"])
@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_one_line_that_says_what_is_wanted(name: str, make: Make) -> None:
    slip, said = SLIPS[name]
    made = setup()
    with pytest.raises(ConfigError, match=said) as raised:
        slip(made, make)
    assert "\n" not in str(raised.value)
    assert not made.optimizer._optimizer_step_pre_hooks, "nothing was hooked"


def test_a_search_for_a_recipe_wants_values_too() -> None:
    search = lambda *given, loss_fn: find_recipe(*given, loss_fn, [torch.ones(1, 2)] * 14, num_steps=12)  # noqa: E731
    with pytest.raises(ConfigError, match="lazy layers"):
        _without_values(search, nn.Sequential(nn.LazyLinear(2)))


def test_what_is_frozen_may_have_no_values() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    trainer = HybridTrainer(model, optimizer, loss_fn=lambda model, batch: model[0](batch).mean())
    assert trainer.step(torch.ones(1, 2)).step == 1


def test_the_trainer_is_refused_on_an_optimizer_with_an_engine() -> None:
    made = setup()
    with attach(made.model, made.optimizer, loss_fn=loss_fn), pytest.raises(ConfigError, match="detach"):
        made.trainer(HybridTrainerConfig())
    made.trainer(HybridTrainerConfig())


def test_fit_wants_batches_first() -> None:
    trainer = setup().trainer(HybridTrainerConfig())
    with pytest.raises(TypeError, match="takes the batches first"):
        trainer.fit(3, full_batch(1))


@pytest.mark.parametrize("loss", [make_batches(1)[0], {"loss": 1.0}, "0.3", None.__class__, True])
def test_note_wants_the_loss_first(loss: Any) -> None:
    made = setup()
    with (
        attach(made.model, made.optimizer, loss_fn=loss_fn) as engine,
        pytest.raises(TypeError, match="the loss first"),
    ):
        engine.note(loss, make_batches(1)[0])


def test_looking_at_gradients_after_every_micro_batch_is_said_once(notices: list[str]) -> None:
    made = setup()
    with attach(made.model, made.optimizer, loss_fn=loss_fn) as engine:
        for batch in make_batches(8):
            loss = loss_fn(made.model, batch)
            (loss / 8).backward()
            engine.note(loss, batch)
            engine.after_backward()
    assert len(notices) == 1
    assert "once per step" in notices.pop()


def test_what_was_noted_for_a_step_that_was_given_up_is_in_no_other() -> None:
    made = setup()
    with attach(made.model, made.optimizer, loss_fn=loss_fn) as engine:
        for i, batch in enumerate(make_batches(6)):
            loss = loss_fn(made.model, batch)
            engine.note(loss, batch)
            if i % 2:
                engine.give_up_step()
                continue
            made.optimizer.zero_grad()
            loss.backward()
            made.optimizer.step()
            assert engine.result is not None
            assert engine.result.loss == loss.item()
    assert engine.run.meter.num_real_steps == 3
