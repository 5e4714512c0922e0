"""Lightning's Trainer and Fabric: automatic and manual optimization, accumulation, ends, checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import assert_same, difference
from frameworks import framework, weights_of, willing
from hybrid_predict_trainer import ConfigError, Engine, HybridTrainerConfig
from hybrid_predict_trainer.forecast.stopping import StopWhen

lightning = framework("lightning")

from hybrid_predict_trainer.adapters.lightning import HybridCallback, ride_along  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
STEPS = 20


def data(count: int) -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator)
    y = torch.tanh(x.sum(1, keepdim=True)) + 0.1 * torch.randn(count, 1, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, interval: str | None = "step") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 1))
        self.interval, self.seen = interval, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if self.interval is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


class Manual(Module):
    def __init__(self, *, raw: bool = False) -> None:
        super().__init__(None)
        self.automatic_optimization, self.raw = False, raw

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=not self.raw)
        optimizer.zero_grad()
        self.manual_backward(mean_square(self, batch))
        optimizer.step()


def mean_square(module: Any, batch: Any) -> Tensor:
    return nn.functional.mse_loss(module.net(batch[0]), batch[1])


def fit(module: Any, callback: Any = None, *, resume: str | None = None, **changes: Any) -> Any:
    settings = {
        "max_steps": STEPS, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, **changes,
    }  # fmt: skip
    callbacks = [*settings.pop("callbacks", []), *([] if callback is None else [callback])]
    trainer = lightning.Trainer(callbacks=callbacks, **settings)
    trainer.fit(module, data(8 * 200), ckpt_path=resume)
    return trainer


def state_of(trainer: Any) -> dict[str, Any]:
    module, optimizer = trainer.lightning_module, trainer.optimizers[0]
    schedules = [c.scheduler.last_epoch for c in trainer.lr_scheduler_configs]
    return {
        "weights": weights_of(module), "steps": trainer.global_step, "schedule": schedules,
        "optimizer": [dict(optimizer.state[p]) for p in module.parameters()], "rng": torch.get_rng_state(),
    }  # fmt: skip


QUIET = {"max_predict_steps": 0, "max_lr_multiplier": 1.0, "min_group_factor": 1.0}


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (3, 0.1)], ids=["plain", "accumulated-clipped"])
@pytest.mark.parametrize("settings", [HybridTrainerConfig(enabled=False), willing(**QUIET)], ids=["off", "no-jumps"])
def test_without_a_jump_it_is_the_plain_trainer(settings: Any, accumulate: int, clip: float | None) -> None:
    changes: dict[str, Any] = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    torch.manual_seed(3)
    plain = fit(Module(), **changes)
    torch.manual_seed(3)
    callback = HybridCallback(settings, say=False)
    ours = fit(Module(), callback, **changes)
    assert_same(state_of(ours), state_of(plain))
    assert callback.engine is not None
    assert callback.engine.statistics()["num_real_steps"] == STEPS
    assert float(ours.callback_metrics["train_loss"]) == float(plain.callback_metrics["train_loss"])


def test_jumps_are_made_and_the_run_ends_on_its_clock_with_a_checkpoint(tmp_path: Path, capsys: Any) -> None:
    saver = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)
    callback = HybridCallback(willing())
    trainer = fit(Module(), callback, enable_checkpointing=True, callbacks=[saver])
    assert callback.report is not None
    assert callback.report["num_jumps_proposed"] > 0
    assert callback.report["num_real_steps"] == trainer.global_step < STEPS
    assert trainer.global_step < trainer.lr_scheduler_configs[0].scheduler.last_epoch <= STEPS
    assert (tmp_path / f"ended-step={trainer.global_step}.ckpt").is_file()
    assert "steps gained by jumps" in capsys.readouterr().out
    assert trainer.callback_metrics["hpt/full_steps"] > 0


def test_a_run_that_is_not_worth_going_on_with_stops() -> None:
    callback = HybridCallback(HybridTrainerConfig(warmup_steps=10), say=False, stop_when=StopWhen(target=1e-9))
    assert STEPS / 4 <= fit(Module(), callback).global_step < STEPS
    kept = HybridCallback(HybridTrainerConfig(warmup_steps=10), say=False, stop_when=StopWhen(target=1e9))
    assert fit(Module(), kept).global_step == STEPS


def test_the_comparison_can_fail() -> None:
    assert (
        difference(state_of(fit(Module(), HybridCallback(willing(), say=False))), state_of(fit(Module()))) is not None
    )


@pytest.mark.parametrize("at", [7, 14])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, at: int) -> None:
    class Ordered(Module):
        """Reads its batch by the step: Lightning does not forward a loader when it resumes within an epoch."""

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return self.batches[self.trainer.fit_loop.epoch_loop.batch_idx + 1]

    Ordered.batches = list(data(8 * 60))  # type: ignore[attr-defined]
    saver = lambda: lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)  # noqa: E731
    straight = fit(Ordered(), HybridCallback(willing(), say=False), enable_checkpointing=True, callbacks=[saver()])
    callback = HybridCallback(willing(), say=False)
    found = str(tmp_path / f"epoch=0-step={at}.ckpt")
    resumed = fit(Ordered(), callback, enable_checkpointing=True, callbacks=[saver()], resume=found)
    assert callback.report is not None
    assert callback.report["num_jumps_proposed"] > 0
    assert_same(state_of(resumed), state_of(straight))


def test_a_schedule_in_epochs_is_left_to_the_epochs() -> None:
    callback = HybridCallback(willing(), say=False)
    trainer = fit(Module("epoch"), callback, limit_train_batches=5)
    assert callback.report is not None
    assert callback.report["num_jumps_proposed"] > 0
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == trainer.global_step // 5


def test_losses_are_those_of_the_module_and_its_metrics_stay(tmp_path: Path) -> None:
    torchmetrics = framework("torchmetrics")

    class Measured(Module):
        def __init__(self) -> None:
            super().__init__()
            self.error = torchmetrics.MeanSquaredError()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            found = self.net(batch[0])
            self.error.update(found, batch[1])
            self.log("error", self.error)
            return nn.functional.mse_loss(found, batch[1])

        def on_train_batch_end(self, *args: Any) -> None:
            self.seen = int(self.error.total)

    callback, module = HybridCallback(willing(), say=False), Measured()
    trainer = fit(module, callback)
    assert callback.report is not None
    assert callback.report["num_jumps_proposed"] > 0
    assert module.seen == 8 * trainer.global_step


def test_manual_optimization_needs_a_loss_and_ends_where_it_should() -> None:
    with pytest.raises(ConfigError, match="loss_fn="):
        fit(Manual(), HybridCallback(willing()))
    callback = HybridCallback(willing(), loss_fn=mean_square, say=False)
    trainer = fit(Manual(), callback)
    assert callback.report is not None
    assert callback.report["num_jumps_proposed"] > 0
    assert callback.report["num_real_steps"] == trainer.global_step <= STEPS


def test_a_raw_optimizer_is_named() -> None:
    callback = HybridCallback(willing(), loss_fn=mean_square, say=False)
    with pytest.warns(UserWarning, match="max_steps never ends the run"):
        fit(Manual(raw=True), callback, max_steps=4, limit_train_batches=8, max_epochs=1)


def test_several_optimizers_are_refused() -> None:
    class Two(Manual):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.SGD(self.net[2].parameters(), 0.1)]

    with pytest.raises(ConfigError, match="one optimizer, and there are 2"):
        fit(Two(), HybridCallback(willing(), loss_fn=mean_square))


# ---------------------------------------------------------------- Fabric


class Fabricated:
    def __init__(
        self, settings: Any, *, accumulate: int = 1, precision: str = "32-true", total_steps: int | None = STEPS
    ) -> None:
        self.fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / STEPS))
        self.bare, self.accumulate = optimizer, accumulate
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.engine: Engine | None = None
        if settings is not None:
            self.engine = ride_along(
                self.fabric, self.model, self.optimizer, self.schedule, settings, loss_fn=self.loss,
                accumulate=accumulate, total_steps=total_steps,
            )  # fmt: skip

    @staticmethod
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def train(self, start: int = 0, stop: int | None = None) -> Fabricated:
        for i, batch in enumerate(list(data(8 * STEPS * self.accumulate))):
            if i < start * self.accumulate:
                continue
            complete = (i + 1) % self.accumulate == 0
            if self.engine is not None:
                self.engine.note(batch=batch)
            with self.fabric.no_backward_sync(self.model, enabled=not complete):
                self.fabric.backward(self.loss(self.model, batch) / self.accumulate)
            if not complete:
                continue
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=0.1)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            if (i + 1) // self.accumulate == stop or (self.engine is not None and self.engine.finished):
                break
        return self

    def everything(self) -> dict[str, Any]:
        states = [dict(self.bare.state[p]) for p in self.bare.param_groups[0]["params"]]
        return {"weights": weights_of(self.model), "schedule": self.schedule.last_epoch, "optimizer": states}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("settings", [HybridTrainerConfig(enabled=False), willing(**QUIET)], ids=["off", "no-jumps"])
def test_without_a_jump_it_is_the_plain_fabric_loop(settings: Any, accumulate: int) -> None:
    plain, ours = Fabricated(None, accumulate=accumulate).train(), Fabricated(settings, accumulate=accumulate).train()
    assert_same(ours.everything(), plain.everything())
    assert ours.engine is not None
    assert ours.engine.statistics()["num_real_steps"] == STEPS


def test_the_fabric_loop_of_two_lines_makes_all_steps_and_its_schedule_ends_with_it() -> None:
    run = Fabricated(willing(), total_steps=None).train()
    assert run.engine is not None
    assert run.engine.statistics()["num_jumps_proposed"] > 0
    assert run.engine.position > STEPS == run.engine.statistics()["num_real_steps"] == run.schedule.last_epoch


def test_a_trainer_without_a_planned_end_makes_all_its_steps_on_its_own_schedule() -> None:
    class Stop(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= STEPS

    callback = HybridCallback(willing(), say=False)
    trainer = fit(Module(), callback, callbacks=[Stop()], max_steps=-1, max_epochs=-1)
    assert callback.report is not None
    assert callback.report["num_jumps_proposed"] > 0
    assert [trainer.global_step] == [STEPS] == [c.scheduler.last_epoch for c in trainer.lr_scheduler_configs]


def test_fabric_saves_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = Fabricated(willing()).train()
    first = Fabricated(willing()).train(stop=9)
    held = lambda run: {"model": run.model, "optimizer": run.optimizer, "schedule": run.schedule, "engine": run.engine}  # noqa: E731
    first.fabric.save(tmp_path / "state.ckpt", held(first))
    second = Fabricated(willing())
    second.fabric.load(tmp_path / "state.ckpt", held(second))
    second.train(start=9)
    assert second.engine is not None
    assert second.engine.statistics()["num_jumps_proposed"] > 0
    assert second.engine.position == STEPS >= second.schedule.last_epoch > second.engine.statistics()["num_real_steps"]
    assert_same(second.everything(), straight.everything())


def test_fabric_in_bfloat16() -> None:
    run = Fabricated(willing(), precision="bf16-mixed").train()
    assert run.engine is not None
    assert run.engine.statistics()["num_jumps_proposed"] > 0


# ---- two processes -------------------------------------------------------------------------------------------


def _of_two(folder: str, rank: int, size: int) -> Any:
    import os

    from lightning.pytorch.strategies import DDPStrategy

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), NODE_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip

    def trained(callback: Any = None, **changes: Any) -> Any:
        torch.manual_seed(3)
        strategy = DDPStrategy(process_group_backend="gloo")
        return fit(Module(), callback, devices=size, strategy=strategy, **changes)

    plain = trained(max_steps=6)
    off = trained(HybridCallback(HybridTrainerConfig(enabled=False), say=False), max_steps=6)
    callback = HybridCallback(willing(), say=False)
    trainer = trained(callback)
    trainer.save_checkpoint(Path(folder) / "at.ckpt")
    assert callback.report is not None
    assert callback.engine is not None
    return {
        "together": callback.engine.run.subject.ranks.num_brought_together,
        "world": trainer.world_size, "off": difference(state_of(off), state_of(plain)),
        "weights": [w.tolist() for w in weights_of(trainer.lightning_module).values()], "steps": trainer.global_step,
        "proposed": callback.report["num_jumps_proposed"],
    }  # fmt: skip


def test_two_processes_stay_alike_and_without_a_jump_they_are_the_plain_trainers(tmp_path: Path) -> None:
    from ranks.drive import with_ranks

    first, second = with_ranks(2, tmp_path, _of_two, str(tmp_path))
    assert first == second
    assert first["world"] == 2
    assert first["together"] == 0, "they had parted"
    assert first["off"] is None
    assert first["proposed"] > 0
    assert (tmp_path / "at.ckpt").is_file()
