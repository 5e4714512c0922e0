"""Half precision, batch statistics, averages, compilation and checkpointed activations, across jumps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from cases import Fake, assert_same, config, full_batch, loss_fn, make_batches, setup
from hybrid_predict_trainer import AverageFollower, CheckpointError, ConfigError, HybridTrainer, attach
from hybrid_predict_trainer.weights import algebra

# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [1.0, -3.0, 0.01, 0.0])
def test_a_small_delta_is_not_lost_to_rounding(dtype: torch.dtype, base: float) -> None:
    """A twentieth of the spacing: to the nearest, not one weight would move."""
    origin = torch.full((20_000,), base, dtype=dtype)
    spacing = float(torch.finfo(dtype).eps) * 2.0 ** torch.frexp(torch.tensor(abs(base))).exponent.item() / 2
    delta = torch.full((20_000,), (spacing if base else 1e-3) / 20)
    nearest = (origin.float() + delta).to(dtype)
    assert torch.equal(nearest, origin) == (base != 0)
    moved = torch.empty_like(origin)
    algebra.move_([moved], [origin], [delta], 1.0, seed=3)
    gone = (moved.double() - origin.double()).mean().item()
    assert gone == pytest.approx(delta[0].item(), rel=0.1)
    again, other = torch.empty_like(origin), torch.empty_like(origin)
    algebra.move_([again], [origin], [delta], 1.0, seed=3)
    algebra.move_([other], [origin], [delta], 1.0, seed=4)
    assert torch.equal(again, moved)
    assert not torch.equal(other, moved)


def test_what_does_not_move_is_not_rounded() -> None:
    torch.manual_seed(0)
    origin = [torch.randn(1000).bfloat16(), torch.tensor([2.0**k for k in range(-20, 20)]).half()]
    moved = [torch.empty_like(o) for o in origin]
    state = torch.get_rng_state()
    algebra.move_(moved, origin, [torch.zeros_like(o) for o in origin], 1.0, seed=5)
    assert_same(moved, origin)
    algebra.move_(moved, origin, [torch.ones_like(o) for o in origin], 0.0)
    assert_same(moved, origin)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_weights_that_were_judged_are_those_that_are_taken() -> None:
    """With random rounding too: the loss after an accepted jump is bitwise the one that the gate measured there."""
    made = setup("mlp", "sgd")
    made.model.to(torch.bfloat16)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in full_batch(1)] * 40
    trainer = made.trainer(config(), predictor=Fake(-0.2))
    jumps = 0
    for batch in batches:
        result = trainer.step(batch)
        if result.was_predicted:
            jumps += 1
            assert result.verdict is not None
            assert loss_fn(made.model, batch).item() == result.verdict.loss_after
    assert jumps


# ---------------------------------------------------------------- batch statistics


@pytest.mark.parametrize("by", ["trainer", "engine"])
def test_batch_statistics_are_estimated_anew(by: str) -> None:
    made = setup("norm_dropout", "adam")
    batches = make_batches(6)
    owner: Any = (
        made.trainer(config()) if by == "trainer" else attach(made.model, made.optimizer, config(), loss_fn=loss_fn)
    )
    before = made.everything()
    assert owner.reestimate_batch_norm(batches) == 1
    after = made.everything()
    norm = made.model[1]
    with torch.no_grad():
        means = torch.stack([made.model[0](x).mean(0) for x, _ in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked == 6
    for key in ("parameters", "optimizer", "rng", "modes"):
        assert_same(after[key], before[key])
    made.model.eval()
    with pytest.raises(ValueError, match="no batch"):
        owner.reestimate_batch_norm([])
    with pytest.raises(IndexError):
        owner.reestimate_batch_norm([batches[0], (1,)])
    torch.testing.assert_close(norm.running_mean, means)
    assert not made.model.training
    plain = setup("mlp", "adam")
    assert plain.trainer(config()).reestimate_batch_norm([]) == 0


# ---------------------------------------------------------------- averages


def averaged(made: Any) -> AveragedModel:
    return AveragedModel(made.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))


def test_an_average_moves_along_with_jumps_and_back(tmp_path: Path) -> None:
    made = setup("mlp", "sgd")
    average = averaged(made)
    trainer = made.trainer(
        config(), predictor=Fake(-0.02), modifiers=[AverageFollower(made.model, made.optimizer, average)]
    )
    batches, jumps = full_batch(40), 0
    for batch in batches:
        weights = [p.detach().clone() for p in made.model.parameters()]
        held = [q.detach().clone() for q in average.module.parameters()]
        result = trainer.step(batch)
        moved = zip(made.model.parameters(), weights, average.module.parameters(), held, strict=True)
        if result.was_predicted:
            jumps += 1
            for p, old, q, was in moved:
                torch.testing.assert_close(q - was, p - old, rtol=1e-4, atol=1e-6)
        elif result.num_backward:
            assert trainer.run.failures.summary() == {}
    assert jumps > 1
    path, wanted = trainer.save_checkpoint(tmp_path), copy.deepcopy(average.state_dict())
    again = setup("mlp", "sgd", seed=5)
    other = averaged(again)
    resumed = again.trainer(
        config(), predictor=Fake(-0.02), modifiers=[AverageFollower(again.model, again.optimizer, other)]
    )
    resumed.load_checkpoint(path)
    assert_same(dict(other.state_dict()), dict(wanted))


def test_an_average_of_another_model_is_refused() -> None:
    made, other = setup("mlp", "sgd"), setup("tied", "sgd")
    with pytest.raises(ConfigError, match="another model"):
        AverageFollower(made.model, made.optimizer, averaged(other))


# ---------------------------------------------------------------- compilation, activations


def test_no_phase_compiles_anew() -> None:
    """One graph with gradients and one without, in the first cycle; then none for as long as the run goes on."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    made = setup("mlp", "sgd")
    compiled = torch.compile(made.model, backend=counter)
    trainer = HybridTrainer(compiled, made.optimizer, config(), loss_fn, predictor=Fake(-0.02))
    counts, phases = [], set()
    for batch in full_batch(60):
        phases.add(trainer.step(batch).phase)
        counts.append(counter.frame_count)
    assert len(phases) == 4
    assert trainer.statistics()["num_jumps_accepted"] > 1
    assert counts[-1] <= 2
    assert counts[20] == counts[-1]
    torch._dynamo.reset()


class Checkpointed(nn.Module):
    """Computes the activations of its inner model again in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("data", [full_batch, make_batches])
def test_checkpointed_activations_are_the_same_run(data: Any) -> None:
    finals = []
    for wrap in (False, True):
        made = setup("dropout", "adam", "lambda")
        if wrap:
            made.model = Checkpointed(made.model)
        trainer = made.trainer(config(), predictor=Fake(-0.02))
        losses = [trainer.step(batch).loss for batch in data(40)]
        finals.append((losses, [p.detach().clone() for p in made.model.parameters()], trainer.statistics()))
    assert repr(finals[0][0]) == repr(finals[1][0])
    assert_same(finals[0][1], finals[1][1])
    assert finals[0][2]["num_jumps_proposed"] == finals[1][2]["num_jumps_proposed"] > 0


# ---------------------------------------------------------------- accumulation


def test_no_checkpoint_in_the_middle_of_an_accumulated_step(tmp_path: Path) -> None:
    made = setup("mlp", "adam")
    engine = attach(made.model, made.optimizer, config(), loss_fn=loss_fn)
    batches = make_batches(12)
    for number, batch in enumerate(batches, 1):
        loss = loss_fn(made.model, batch)
        (loss / 3).backward()
        engine.note(loss, batch)
        if number % 3:
            with pytest.raises(CheckpointError, match="in the middle of a step"):
                engine.save_checkpoint(tmp_path)
            continue
        made.optimizer.step()
        engine.save_checkpoint(tmp_path)
        made.optimizer.zero_grad(set_to_none=number % 2 == 0)
        engine.save_checkpoint(tmp_path)


def test_a_loss_that_is_noted_after_the_step_is_no_open_step(tmp_path: Path, notices: list[str]) -> None:
    made = setup("mlp", "adam")
    engine = attach(made.model, made.optimizer, config(), loss_fn=loss_fn)
    for batch in make_batches(4):
        made.optimizer.zero_grad()
        loss = loss_fn(made.model, batch)
        loss.backward()
        engine.note(loss, batch)
        made.optimizer.step()
        engine.note(loss)
        engine.save_checkpoint(tmp_path)
    assert [text for text in notices if "came behind optimizer.step()" in text] == notices[:1]
    notices.clear()
