"""What was wrong and what was done, typed; every kind of error from what really causes it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import Broken, Fake, config, full_batch, make_batches, setup
from hybrid_predict_trainer import (
    CheckpointError,
    CheckpointFailed,
    DivergenceError,
    HybridError,
    IntegrationError,
    NumericalInstability,
    PredictionDivergence,
    PredictorTrainingFailed,
)
from hybrid_predict_trainer.adapters.missing import framework
from hybrid_predict_trainer.records import StepResult
from hybrid_predict_trainer.recovery import Abort, Continue, ForceFullPhase, ReducePredictRatio, RollbackAndRetry

NAN = float("nan")


def drive(batches: list[Any], predictor: Any = None, **changes: Any) -> tuple[Any, list[StepResult]]:
    made = setup("mlp", "adam", "lambda")
    trainer = made.trainer(config(**changes), predictor=predictor)
    return trainer, [trainer.step(batch) for batch in batches]


def test_where_nothing_is_wrong_nothing_is_told() -> None:
    _, results = drive(make_batches(12), Fake(1.0))
    assert [r.recovery for r in results] == [None] * 12


def test_a_step_that_is_not_finite() -> None:
    batches = make_batches(12)
    batches[8] = (batches[8][0], batches[8][1] * NAN)
    _, results = drive(batches, max_predict_steps=0)
    told = results[8].recovery
    assert told is not None
    assert isinstance(told.error, NumericalInstability)
    assert (told.step, told.error.step) == (9, 9)
    assert "loss_nonfinite" in told.error.detail
    assert told.action == told.error.action == ForceFullPhase(4)
    assert results[9].recovery is None
    with pytest.raises(DivergenceError):
        raise told.error


def test_the_same_rate_is_not_tried_again() -> None:
    batches = make_batches(12)
    bad = [(x, y * NAN) for x, y in batches[:5]]
    trainer, results = drive([*batches, *bad], max_predict_steps=0)
    rates = [r.recovery.action for r in results[-5:] if r.recovery is not None]
    assert len(rates) == 5
    assert isinstance(rates[-1], RollbackAndRetry)
    assert rates[-1].new_learning_rate == trainer.run.learning_rate
    assert rates[-1].checkpoint_step == 12
    assert not any(isinstance(a, RollbackAndRetry) for a in rates[:-1])


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_nothing_but_nan_is_the_end() -> None:
    bad = (make_batches(1)[0][0], make_batches(1)[0][1] * NAN)
    with pytest.raises(NumericalInstability) as ended:
        drive([bad] * 10, divergence__max_consecutive_nonfinite=4)
    assert ended.value.step == 5
    assert isinstance(ended.value, DivergenceError)
    assert ended.value.action == Abort(ended.value.detail)


def test_a_jump_that_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is made to take a jump that leads uphill; probation finds out."""
    batches = full_batch(60)
    made = setup("mlp", "sgd")
    trainer = made.trainer(config(divergence__prediction_error_critical=0.1), predictor=Fake(-0.02))
    results = []
    moved = False
    for batch in batches:
        if trainer.run.judge.probation is not None and not moved:
            moved = True
            with torch.no_grad():  # as if the jump had led there
                for p in made.model.parameters():
                    p.add_(3.0)
            trainer.run.watch.writes.record()
        results.append(trainer.step(batch))
        if results[-1].recovery is not None and isinstance(results[-1].recovery.error, PredictionDivergence):
            break
    told = results[-1].recovery
    assert told is not None
    assert isinstance(told.error, PredictionDivergence)
    assert isinstance(told.action, RollbackAndRetry)
    assert told.error.actual > 2 * told.error.predicted
    assert math.isfinite(told.error.predicted)
    assert told.error.step == results[-1].step
    assert told.action.checkpoint_step == trainer.run.meter.num_real_steps


def test_a_jump_that_is_kept_and_was_promised_to_be_better() -> None:
    """Within the noise it helped, and much less than was said: the next one is half as long as it would have been."""
    changes = {"prediction_error_caution": 0.1, "prediction_error_threshold": 0.2, "prediction_error_critical": 1e9}
    made = setup("mlp", "sgd")
    settings = config(**{f"divergence__{k}": v for k, v in changes.items()})
    trainer = made.trainer(settings, predictor=Fake(-0.02))
    told, lengths = None, [trainer.run.proposer.horizon]
    doubled = trainer.run.proposer.double_horizon
    for batch in full_batch(60):
        if trainer.run.judge.probation is not None:
            trainer.run.judge.probation.predicted_loss = 1e-3
        trainer.run.proposer.double_horizon = lambda: (doubled(), lengths.append(trainer.run.proposer.horizon))
        told = trainer.step(batch).recovery
        if told is not None:
            break
    assert told is not None
    assert isinstance(told.error, PredictionDivergence)
    assert told.error.actual > told.error.predicted
    assert told.action == ReducePredictRatio(0.5)
    assert trainer.run.meter.num_rollbacks == 0
    assert trainer.run.proposer.horizon == max(lengths[-1] // 2, 1) < lengths[-1]


def test_a_predictor_that_raises() -> None:
    with pytest.warns(UserWarning, match="predictor 'fake' failed"):
        _, results = drive(make_batches(30), Broken("predict_raises"))
    told = [r.recovery for r in results if r.recovery is not None]
    assert told
    assert all(isinstance(t.error, PredictorTrainingFailed) for t in told)
    assert all(t.action == Continue() for t in told)
    assert "predict went wrong" in told[0].error.detail  # type: ignore[attr-defined]


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    trainer, _ = drive(make_batches(3))
    with pytest.raises(CheckpointFailed) as failed:
        trainer.save_checkpoint(tmp_path / "file" / "folder")
    assert failed.value.path.endswith("checkpoint_step_3")
    assert "irectory" in failed.value.detail
    assert isinstance(failed.value, CheckpointError)


def test_a_library_that_is_not_there() -> None:
    with pytest.raises(IntegrationError) as missing:
        framework("no_such_library", "extra")
    assert missing.value.library == "no_such_library"
    assert "pip install" in missing.value.detail
    assert isinstance(missing.value, ImportError)
    assert isinstance(missing.value, HybridError)
