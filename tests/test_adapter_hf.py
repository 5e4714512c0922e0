"""transformers.Trainer with the callback: off it is the plain Trainer, on it counts, resumes and reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import assert_same, difference
from frameworks import Sequences, framework, gpt2, weights_of, willing
from hybrid_predict_trainer import ConfigError, HybridTrainerConfig
from hybrid_predict_trainer.forecast.stopping import StopWhen

transformers = framework("transformers")
framework("accelerate")

from hybrid_predict_trainer.adapters.hf import REPORT, HybridCallback, TrainerLoss  # noqa: E402

transformers.logging.set_verbosity_error()

STEPS = 20


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path


def trainer_of(out: Path, callback: Any = None, *, kind: Any = None, model: Any = None, data: Any = None,
               eval_data: Any = None, **changes: Any) -> Any:  # fmt: skip
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "report_to": [], "seed": 1,
        "logging_steps": 6, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "output_dir": str(out),
        "dataloader_pin_memory": False, **changes,
    }  # fmt: skip
    return (kind or transformers.Trainer)(
        model=gpt2(dropout=0.1) if model is None else model, args=transformers.TrainingArguments(**settings),
        train_dataset=Sequences() if data is None else data, eval_dataset=eval_data,
        callbacks=[] if callback is None else [callback],
    )  # fmt: skip


def state_of(trainer: Any) -> dict[str, Any]:
    order = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return {
        "weights": weights_of(trainer.model), "schedule": trainer.lr_scheduler.last_epoch,
        "optimizer": [dict(trainer.optimizer.state[p]) for p in order], "rng": torch.get_rng_state(),
        "steps": trainer.state.global_step,
    }  # fmt: skip


def logged(trainer: Any) -> list[dict[str, Any]]:
    times = ("runtime", "per_second")
    return [
        {k: v for k, v in sorted(line.items()) if not any(t in k for t in times)} for line in trainer.state.log_history
    ]


# ---------------------------------------------------------------- off, and without a jump


@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (3, 0.05)], ids=["plain", "accumulated-clipped"])
@pytest.mark.parametrize(
    "settings", [HybridTrainerConfig(enabled=False),
                 willing(max_predict_steps=0, max_lr_multiplier=1.0, min_group_factor=1.0)], ids=["off", "no-jumps"],
)  # fmt: skip
def test_without_a_jump_it_is_the_plain_trainer(out: Path, settings: Any, clip: float, accumulate: int) -> None:
    plain = trainer_of(out, gradient_accumulation_steps=accumulate, max_grad_norm=clip)
    plain.train()
    callback = HybridCallback(settings, say=False)
    ours = trainer_of(out, callback, gradient_accumulation_steps=accumulate, max_grad_norm=clip)
    ours.train()
    assert_same(state_of(ours), state_of(plain))
    mine = [{k: v for k, v in line.items() if not k.startswith("hpt/")} for line in logged(ours)]
    assert_same(mine, logged(plain))
    assert callback.engine is not None
    assert callback.engine.statistics()["num_real_steps"] == STEPS


def test_the_comparison_can_fail(out: Path) -> None:
    plain, ours = trainer_of(out), trainer_of(out, HybridCallback(willing(), say=False))
    plain.train()
    ours.train()
    assert difference(state_of(ours), state_of(plain)) is not None


# ---------------------------------------------------------------- on


def test_jumps_are_made_and_the_run_ends_on_its_clock_with_a_checkpoint(out: Path, capsys: Any) -> None:
    callback = HybridCallback(willing())
    trainer = trainer_of(out, callback, save_strategy="steps", save_steps=1000)
    trainer.train()
    report = callback.report
    assert report is not None
    assert report["num_jumps_proposed"] > 0
    steps = trainer.state.global_step
    assert report["num_real_steps"] == steps < STEPS  # what proposals cost was taken from the run
    assert steps < trainer.lr_scheduler.last_epoch <= STEPS  # and the schedule has followed
    assert (out / f"checkpoint-{steps}" / "hybrid_predict_trainer").is_dir()
    assert json.loads((out / REPORT).read_text())["num_jumps_proposed"] == report["num_jumps_proposed"]
    assert "steps gained by jumps" in capsys.readouterr().out
    figures = [line for line in trainer.state.log_history if "hpt/full_steps" in line]
    assert len(figures) == steps // 6
    last = figures[-1]
    phases = sum(last[f"hpt/{phase}_steps"] for phase in ("warmup", "full", "correct"))
    assert phases == last["step"]  # every step of the optimizer is of one phase


def test_a_run_that_is_not_worth_going_on_with_stops_and_saves(out: Path) -> None:
    callback = HybridCallback(HybridTrainerConfig(warmup_steps=10), say=False, stop_when=StopWhen(target=1e-9))
    trainer = trainer_of(out, callback, save_strategy="steps", save_steps=1000)
    trainer.train()
    assert STEPS / 4 <= trainer.state.global_step < STEPS
    assert (out / f"checkpoint-{trainer.state.global_step}").is_dir()
    kept = HybridCallback(HybridTrainerConfig(warmup_steps=10), say=False, stop_when=StopWhen(target=1e9))
    assert trainer_of(out, kept).train().global_step == STEPS


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_of_training_and_of_judging_are_on_one_scale(out: Path, accumulate: int, ragged: bool) -> None:
    pairs: list[tuple[float, float]] = []

    class Look(HybridCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.engine is not None
            with torch.no_grad():
                judged = TrainerLoss(self._trainer)(self._trainer.model, self._batch)
            pairs.append((float(self.engine._step.pending.step.loss), float(judged)))  # type: ignore[union-attr]

    model, data = gpt2(), Sequences(ragged=ragged)
    trainer_of(
        out, Look(willing(), say=False), model=model, data=data, gradient_accumulation_steps=accumulate, max_steps=5
    ).train()
    assert pairs
    assert all(trained == pytest.approx(judged, rel=1e-5) for trained, judged in pairs)


def test_accumulation_is_one_step_with_the_mean_of_its_losses(out: Path) -> None:
    losses = {}
    for accumulate, batch in ((1, 12), (3, 4)):
        sink: list[dict[str, Any]] = []
        callback = HybridCallback(
            willing(max_predict_steps=0),
            say=False,
            sinks=(type("Sink", (), {"write": lambda _, r, s=sink: s.append(r)})(),),
        )
        trainer_of(
            out, callback, model=gpt2(), gradient_accumulation_steps=accumulate, per_device_train_batch_size=batch,
            max_steps=8,
        ).train()  # fmt: skip
        losses[accumulate] = [record["loss"] for record in sink if record["event"] == "step"]
    assert len(losses[1]) == len(losses[3]) == 8
    assert losses[3] == pytest.approx(losses[1], rel=1e-4)


def test_interrupted_and_resumed_is_uninterrupted(out: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 6, "logging_steps": 6, "gradient_accumulation_steps": 2}
    straight = trainer_of(out, HybridCallback(willing(), say=False), **settings)
    straight.train()
    for step in (6, 12):  # before the first jump, and after it
        callback = HybridCallback(willing(), say=False)
        resumed = trainer_of(out, callback, **settings)
        resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
        assert callback.report is not None
        assert callback.report["num_jumps_proposed"] > 0
        assert_same(state_of(resumed), state_of(straight))
        assert_same(logged(resumed)[:-1], logged(straight)[:-1])


def test_a_checkpoint_moved_elsewhere_is_found_and_one_without_ours_is_said(out: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 7, "max_steps": 12}
    straight = trainer_of(out / "a", HybridCallback(willing(), say=False), **settings)
    straight.train()
    (out / "a" / "checkpoint-7").rename(out / "moved")
    resumed = trainer_of(out / "b", HybridCallback(willing(), say=False), **settings)
    resumed.train(resume_from_checkpoint=str(out / "moved"))
    assert_same(state_of(resumed), state_of(straight))

    trainer_of(out / "c", **settings).train()
    with pytest.warns(UserWarning, match="prediction begins anew"):
        trainer_of(out / "c", HybridCallback(willing(), say=False), **settings).train(
            resume_from_checkpoint=str(out / "c" / "checkpoint-7")
        )


def test_judging_leaves_no_trace_in_the_trainers_own_figures(out: Path) -> None:
    class Counting(transformers.Trainer):  # type: ignore[misc]
        num_losses = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.seen: dict[str, list[float]] = {"loss": []}

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.num_losses += 1
            self.seen["loss"].append(float(loss.detach()))
            return loss

    callback = HybridCallback(willing(), say=False)
    trainer = trainer_of(out, callback, kind=Counting)
    trainer.train()
    assert callback.report is not None
    assert callback.report["num_jumps_proposed"] > 0
    assert trainer.num_losses == len(trainer.seen["loss"]) == trainer.state.global_step


def test_evaluation_in_the_middle_changes_nothing(out: Path) -> None:
    without = trainer_of(out, HybridCallback(willing(), say=False), model=gpt2())
    without.train()
    trainer = trainer_of(
        out, HybridCallback(willing(), say=False), eval_strategy="steps", eval_steps=5, eval_data=Sequences(8),
        model=gpt2(),
    )  # fmt: skip
    trainer.train()
    assert_same(weights_of(trainer.model), weights_of(without.model))


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_model_is_judged_as_what_it_is_made_of(out: Path) -> None:
    """What judging sets (modes, a hook on all modules) would have it compiled anew, and its compiler refuses that."""
    compiled: list[bool] = []

    class Counts(transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            compiled.append(hasattr(model, "_orig_mod"))
            return super().compute_loss(model, *args, **kwargs)

    callback = HybridCallback(willing(), say=False)
    torch.compiler.set_stance("force_eager")
    try:
        trainer = trainer_of(out, callback, kind=Counts, torch_compile=True, torch_compile_backend="eager")
        trainer.train()
    finally:
        torch.compiler.set_stance("default")
    assert callback.report is not None
    assert callback.report["num_jumps_proposed"] > 0
    assert compiled.count(True) == trainer.state.global_step < len(compiled)


def test_a_schedule_that_follows_a_metric_is_left_alone(out: Path) -> None:
    callback = HybridCallback(willing(), say=False)
    trainer = trainer_of(
        out, callback, lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 0, "threshold": 10.0},
        eval_strategy="steps", eval_steps=8, eval_data=Sequences(8), metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    assert callback.report is not None
    assert callback.report["num_jumps_proposed"] > 0
    assert trainer.lr_scheduler.last_epoch == sum("eval_loss" in line for line in trainer.state.log_history) > 1
    assert trainer.optimizer.param_groups[0]["lr"] < 3e-3


def test_nothing_is_left_behind_and_training_can_go_on(out: Path) -> None:
    callback = HybridCallback(willing(), say=False)
    trainer = trainer_of(out, callback)
    before = set(vars(trainer)), set(vars(trainer.accelerator))
    trainer.train()
    added = set(vars(trainer)) - before[0]
    assert not {"training_step", "log", "get_batch_samples"} & added
    assert not {"clip_grad_norm_", "backward"} & set(vars(trainer.accelerator))
    first = callback.engine
    trainer.train()
    assert callback.engine is not first
    assert callback.report is not None
    assert callback.report["num_real_steps"] > 0


def test_a_run_that_ended_with_an_error_is_forgotten(out: Path) -> None:
    class Fails(transformers.TrainerCallback):  # type: ignore[misc]
        armed = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.armed and state.global_step == 3:
                raise OSError("the disk is full")

    callback, fails = HybridCallback(willing(), say=False), Fails()
    trainer = trainer_of(out, callback)
    trainer.add_callback(fails)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()
    fails.armed = False
    trainer.train()
    assert trainer.state.global_step > 3


def test_only_a_trainer_may_call_it(out: Path) -> None:
    with pytest.raises(ConfigError, match="callbacks="):
        HybridCallback().on_train_begin(None, None, None)


# ---------------------------------------------------------------- two processes


def _of_two(folder: str, rank: int, size: int) -> Any:
    import os

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    plain = trainer_of(Path(folder), max_steps=6)
    plain.train()
    off = trainer_of(Path(folder), HybridCallback(HybridTrainerConfig(enabled=False), say=False), max_steps=6)
    off.train()
    callback = HybridCallback(willing(), say=False)
    trainer = trainer_of(Path(folder), callback, model=gpt2(), save_strategy="steps", save_steps=10)
    assert trainer.args.world_size == 2
    trainer.train()
    saved = str(Path(folder) / "checkpoint-10")
    again = trainer_of(Path(folder), HybridCallback(willing(), say=False), model=gpt2(seed=1), max_steps=11)
    try:
        again.train(resume_from_checkpoint=saved)
    except RuntimeError as error:  # of transformers 5.0 on processors: does the plain trainer say the same?
        with pytest.raises(RuntimeError, match=re.escape(str(error))):
            trainer_of(Path(folder), model=gpt2(seed=1), max_steps=11).train(resume_from_checkpoint=saved)
        again.model = trainer.model
    report = callback.report
    assert report is not None
    assert callback.engine is not None
    return {
        "off": difference(state_of(off), state_of(plain)), "proposed": report["num_jumps_proposed"],
        "together": callback.engine.run.subject.ranks.num_brought_together,
        "weights": [w.tolist() for w in weights_of(trainer.model).values()], "steps": trainer.state.global_step,
        "again": [w.tolist() for w in weights_of(again.model).values()],
    }  # fmt: skip


def test_two_processes_stay_alike_and_without_a_jump_they_are_the_plain_trainers(tmp_path: Path) -> None:
    from ranks.drive import with_ranks

    first, second = with_ranks(2, tmp_path, _of_two, str(tmp_path / "out"))
    assert first["off"] is None
    assert second["off"] is None
    assert first["weights"] == second["weights"]
    assert first["again"] == second["again"]
    assert first["steps"] == second["steps"]
    assert first["proposed"] == second["proposed"] > 0
    assert first["together"] == second["together"] == 0, "they had parted"
    assert (tmp_path / "out" / "checkpoint-10" / "hybrid_predict_trainer").is_dir()
