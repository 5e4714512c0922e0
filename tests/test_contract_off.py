"""Off is off: without an accepted jump a run is, bit for bit, the loop one would have written by hand."""

from __future__ import annotations

import pytest
import torch

from cases import (
    BATCH_KINDS,
    MODELS,
    OPTIMIZERS,
    SCHEDULERS,
    Fake,
    assert_same,
    config,
    full_batch,
    make_batches,
    make_model,
    setup,
)
from hybrid_predict_trainer import ConfigError, HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.observe.window_encoder import NullObserver
from hybrid_predict_trainer.records import Phase

NUM_STEPS = 14

#: Ways to get no jump: settings, and a predictor if the run observes.
OFF = {
    "disabled": ({"enabled": False}, None),
    "no_horizon": ({"max_predict_steps": 0}, None),
    "threshold_one": ({"confidence_threshold": 1.0}, None),
    "never_ready": ({}, lambda: Fake(ready=False)),
    "never_affordable": ({"gate__overhead_budget": 0.0, "gate__overhead_budget_exact": 0.0}, Fake),
    "never_confident": ({"confidence_threshold": 0.99, "explore_outcomes": 0, "gate__max_backoff": 10**9}, Fake),
}


def check(setup_args: tuple, changes: dict, predictor=None, batches=None, clip: float = 0.0) -> HybridTrainer:
    batches = make_batches(NUM_STEPS) if batches is None else batches
    plain = setup(*setup_args)
    wanted = plain.plain(batches, clip=clip)
    state = plain.everything()
    ours = setup(*setup_args)
    trainer = ours.trainer(
        config(clock="cost", gradient_clip_norm=clip, **changes), predictor=None if predictor is None else predictor()
    )
    got = [trainer.step(batch).loss for batch in batches]
    assert got == wanted
    assert_same(ours.everything(), state)
    assert trainer.statistics()["num_real_steps"] == len(batches)
    return trainer


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer: str, off: str) -> None:
    trainer = check(("batchnorm", optimizer), *OFF[off])
    assert trainer.statistics()["num_jumps_proposed"] == 0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_model_and_optimizer_observed(optimizer: str, model: str) -> None:
    trainer = check((model, optimizer), *OFF["never_affordable"])
    assert trainer.run.windows.num_closed == NUM_STEPS // 3, "the run must have been observed"


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["unclipped", "clipped"])
def test_schedules_and_clipping(scheduler: str, clip: float, off: str) -> None:
    check(("dropout", "adamw", scheduler), *OFF[off], clip=clip)


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("kind", BATCH_KINDS)
def test_batch_kinds(kind: str, off: str) -> None:
    check(("mlp", "sgd"), *OFF[off], batches=[BATCH_KINDS[kind](x, y) for x, y in make_batches(NUM_STEPS)])


@pytest.mark.parametrize("off", OFF)
def test_full_batch(off: str) -> None:
    check(("mlp", "adam"), *OFF[off], batches=full_batch(NUM_STEPS))


@pytest.mark.parametrize("predictor", ["hold", "heuristic", "linear", "secant"])
@pytest.mark.parametrize("storage", ["param", "float32", "bfloat16", "offload"])
def test_every_predictor_observes_without_a_trace(predictor: str, storage: str) -> None:
    changes = {"predictor__offload": True} if storage == "offload" else {"predictor__basis_dtype": storage}
    trainer = check(("dropout", "momentum"), {"predictor_type": predictor, **changes, **OFF["never_affordable"][0]})
    assert trainer.run.windows.num_closed >= 2


def test_a_disabled_run_remembers_nothing() -> None:
    trainer = check(("mlp", "adam"), {"enabled": False})
    assert trainer.memory_usage() == {
        "predictor": 0,
        "corrector": trainer.run.proposer.feedback.memory_bytes(),
        "snapshots": 0,
    }


#: Everything the encoder can keep.
ENCODER = {"encoder__low_rank": 2, "encoder__kfac": True, "encoder__health": 1}


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("model", MODELS)
def test_all_of_the_encoder_leaves_no_trace(model: str, off: str) -> None:
    trainer = check((model, "adamw"), {**OFF[off][0], **ENCODER}, OFF[off][1])
    assert all(not m._forward_hooks and not m._backward_hooks for m in trainer.run.subject.model.modules())
    assert bool(trainer.run.windows.observer.summary()) is trainer.run.windows.observing


def test_the_default_keeps_nothing_of_the_encoder() -> None:
    for changes in ({}, {"enabled": False, **ENCODER}, {"max_predict_steps": 0, **ENCODER}):
        observer = setup().trainer(config(**changes)).run.windows.observer
        assert isinstance(observer, NullObserver)
        assert observer.memory_bytes() == 0


def test_plain_loop_is_sensitive() -> None:
    """The comparison can fail: another seed, another loss."""
    a, b = setup("dropout", "adam"), setup("dropout", "adam")
    a.plain(make_batches(3))
    b.plain(make_batches(3, seed=8))
    with pytest.raises(AssertionError, match="parameters"):
        assert_same(a.everything(), b.everything())


def test_lbfgs_is_refused() -> None:
    model = make_model("mlp")
    with pytest.raises(ConfigError, match=r"LBFGS.*closure"):
        HybridTrainer(model, torch.optim.LBFGS(model.parameters()), HybridTrainerConfig())


def test_plateau_schedule_is_refused() -> None:
    built = setup()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(built.optimizer)
    with pytest.raises(ConfigError, match="ReduceLROnPlateau"):
        HybridTrainer(built.model, built.optimizer, lr_scheduler=plateau)


def test_nothing_to_train_is_refused() -> None:
    model = make_model("mlp").requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable"):
        HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_default_loss_takes_mappings_only() -> None:
    built = setup()
    trainer = HybridTrainer(built.model, built.optimizer)
    with pytest.raises(TypeError, match="loss_fn"):
        trainer.step(make_batches(1)[0])


def test_default_loss_reads_attribute_or_key() -> None:
    class WithLoss(torch.nn.Module):
        def __init__(self, as_mapping: bool) -> None:
            super().__init__()
            self.inner, self.as_mapping = make_model("mlp"), as_mapping

        def forward(self, x, y):
            loss = torch.nn.functional.mse_loss(self.inner(x), y)
            return {"loss": loss} if self.as_mapping else type("Out", (), {"loss": loss})()

    losses = []
    for as_mapping in (True, False):
        model = WithLoss(as_mapping)
        trainer = HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), config())
        losses.append([trainer.step({"x": x, "y": y}).loss for x, y in make_batches(5)])
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_warmup_then_full() -> None:
    built = setup()
    trainer = built.trainer(config(max_predict_steps=0))
    phases = [trainer.step(b).phase for b in make_batches(8)]
    assert phases == [Phase.WARMUP] * 4 + [Phase.FULL] * 4
