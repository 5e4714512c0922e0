"""accelerate: the loop stays as it is, optimizer steps are counted, the schedule ends where the run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cases import assert_same, difference
from frameworks import framework, gpt2, sequences, weights_of, willing
from hybrid_predict_trainer import Engine, HybridTrainerConfig

accelerate = framework("accelerate")

from hybrid_predict_trainer.adapters.accelerate import ride_along  # noqa: E402

STEPS = 20


@pytest.fixture(autouse=True)
def fresh() -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


class Run:
    """The loop that accelerate's documentation shows."""

    def __init__(self, settings: HybridTrainerConfig | None, *, accumulate: int = 1, precision: str = "no",
                 dropout: float = 0.1, total_steps: int | None = STEPS) -> None:  # fmt: skip
        self.accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision
        )
        model = gpt2(dropout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / STEPS))
        rows = [{"input_ids": row, "labels": row} for row in sequences(12 * STEPS)]
        loader = torch.utils.data.DataLoader(rows, batch_size=12 // accumulate)  # type: ignore[arg-type]
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        self.bare = scheduler
        self.engine: Engine | None = None
        if settings is not None:
            self.engine = ride_along(
                self.accelerator, self.model, self.optimizer, self.scheduler, settings, total_steps=total_steps
            )
        self.losses: list[float] = []
        self.rates: list[float] = []

    def train(self, *, skip: int = 0, stop: int | None = None, clip: float = 0.5, leave: bool = True) -> Run:
        for i, batch in enumerate(self.loader):
            if i < skip:
                continue
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.losses.append(float(loss.detach()))
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            if i + 1 == stop:
                break
            if leave and self.engine is not None and self.engine.finished:
                break
        return self

    def everything(self) -> dict[str, Any]:
        inner = self.optimizer.optimizer
        return {
            "weights": weights_of(self.model), "schedule": self.bare.last_epoch, "rng": torch.get_rng_state(),
            "optimizer": [dict(inner.state[p]) for p in self.model.parameters()],
        }  # fmt: skip


QUIET = {"max_predict_steps": 0, "max_lr_multiplier": 1.0, "min_group_factor": 1.0}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("settings", [HybridTrainerConfig(enabled=False), willing(**QUIET)], ids=["off", "no-jumps"])
def test_without_a_jump_it_is_the_plain_loop(settings: HybridTrainerConfig, accumulate: int) -> None:
    torch.manual_seed(3)
    plain = Run(None, accumulate=accumulate).train()
    torch.manual_seed(3)
    ours = Run(settings, accumulate=accumulate).train()
    assert ours.losses == plain.losses
    assert_same(ours.everything(), plain.everything())
    assert ours.engine is not None
    assert ours.engine.statistics()["num_real_steps"] == STEPS  # of the optimizer, not of micro-batches


@pytest.mark.parametrize("accumulate", [1, 3])
def test_jumps_are_made_and_the_schedule_ends_with_the_clock(accumulate: int) -> None:
    ours = Run(willing(), accumulate=accumulate, dropout=0.0).train()
    engine = ours.engine
    assert engine is not None
    assert engine.report()["num_jumps_proposed"] > 0
    assert engine.position == STEPS >= ours.bare.last_epoch > engine.statistics()["num_real_steps"]
    assert "steps gained by jumps" in engine.report_text()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loop_of_two_lines_makes_all_steps_and_its_schedule_ends_with_it(accumulate: int) -> None:
    ours, plain = (Run(s, accumulate=accumulate, dropout=0.0, total_steps=None).train() for s in (willing(), None))
    engine = ours.engine
    assert engine is not None
    assert engine.report()["num_jumps_proposed"] > 0
    assert engine.position > STEPS == engine.statistics()["num_real_steps"], "what proposals cost comes on top"
    assert ours.rates == plain.rates
    assert ours.rates[-accumulate - 1] > 0.0


def test_a_loop_that_goes_on_behind_its_end_is_told_so_once() -> None:
    run = Run(willing(), dropout=0.0)
    with pytest.warns(UserWarning, match=r"total_steps=20 is at its end .* leave it where engine.finished") as told:
        run.train(leave=False)
    assert len(told) == 1
    assert len(run.losses) == STEPS
    assert run.rates[-1] == 0.0


def test_accumulated_losses_are_the_mean_of_their_micro_batches() -> None:
    whole, parts = (Run(willing(**QUIET), accumulate=a, dropout=0.0).train() for a in (1, 3))
    assert [sum(parts.losses[i : i + 3]) / 3 for i in range(0, 3 * STEPS, 3)] == pytest.approx(whole.losses, rel=1e-3)
    results = [run.engine.result for run in (whole, parts) if run.engine is not None]
    assert results[0] is not None
    assert results[1] is not None
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-3)


@pytest.mark.parametrize("at", [6, 14])
def test_a_saved_state_goes_on_bit_for_bit(tmp_path: Path, at: int) -> None:
    straight = Run(willing(), dropout=0.0).train()
    first = Run(willing(), dropout=0.0).train(stop=at)
    first.accelerator.save_state(str(tmp_path))
    second = Run(willing(), dropout=0.0)
    second.accelerator.load_state(str(tmp_path))
    second.train(skip=at)
    assert second.engine is not None
    assert second.engine.statistics()["num_jumps_proposed"] > 0
    without_dice = [{k: v for k, v in run.everything().items() if k != "rng"} for run in (second, straight)]
    assert_same(*without_dice)  # going through the loader again draws from the dice


def test_a_state_without_ours_is_said(tmp_path: Path) -> None:
    plain = Run(None)
    plain.accelerator.save_state(str(tmp_path))
    ours = Run(willing())
    with pytest.warns(UserWarning, match="prediction begins anew"):
        ours.accelerator.load_state(str(tmp_path))


def test_two_engines_keep_their_gradients_and_states_apart(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    batches, made = sequences(12 * 6).split(12), []
    for seed, lr in ((0, 3e-3), (1, 1e-3)):
        model = accelerator.prepare(gpt2(seed=seed))
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=lr))
        norms: list[float] = []
        sink = type("Sink", (), {"write": lambda _, r, n=norms: n.append(r["gradient_norm"])
                                 if r["event"] == "step" else None})()  # fmt: skip
        engine = ride_along(accelerator, model, optimizer, config=willing(**QUIET), sinks=[sink])
        made.append((model, optimizer, engine, norms))
    for batch in batches:
        losses = [model(input_ids=batch, labels=batch).loss for model, *_ in made]  # both under way at the first clip
        for (model, optimizer, *_), loss in zip(made, losses, strict=True):
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters=model.parameters(), max_norm=1e-3)
            optimizer.step()
            optimizer.zero_grad()
    assert all(len(norms) == len(batches) and min(norms) > 1e-2 for *_, norms in made)  # as before they are clipped
    accelerator.save_state(str(tmp_path))
    rates = [engine.run.schedule.peak for _, _, engine, _ in made]
    assert rates == [3e-3, 1e-3]
    for _, _, engine, _ in made:
        engine.run.schedule.update_peak(1.0)
    accelerator.load_state(str(tmp_path))
    assert [engine.run.schedule.peak for _, _, engine, _ in made] == rates
    for _, _, engine, _ in made:
        engine.detach()
    again = ride_along(accelerator, made[0][0], made[0][1], config=willing())
    accelerator.load_state(str(tmp_path))
    assert again.run.schedule.peak == rates[0]


@pytest.mark.filterwarnings("ignore:the run of total_steps")
def test_a_schedule_that_follows_a_metric_stays_the_loops() -> None:
    run = Run(None)
    followed = torch.optim.lr_scheduler.ReduceLROnPlateau(run.optimizer.optimizer, patience=STEPS - 4)
    engine = ride_along(run.accelerator, run.model, run.optimizer, followed, willing(), total_steps=STEPS)
    run.scheduler = type("Worse", (), {"step": lambda _: followed.step(1.0)})()
    run.train()
    assert engine.statistics()["num_jumps_proposed"] > 0
    assert engine.owed_schedule_steps() == 0
    assert followed.last_epoch == STEPS
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(3e-4)


def test_a_loss_function_of_ones_own(tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(480, 3)
    data = torch.utils.data.TensorDataset(x, torch.tanh(x.sum(1, keepdim=True)) + 0.1 * torch.randn(480, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=6))
    loss_fn = lambda m, b: nn.functional.mse_loss(m(b[0]), b[1])  # noqa: E731
    engine = ride_along(accelerator, model, optimizer, config=willing(), loss_fn=loss_fn)
    for batch in loader:
        with accelerator.accumulate(model):
            engine.note(batch=batch)
            accelerator.backward(loss_fn(model, batch))
            optimizer.step()
            optimizer.zero_grad()
    assert engine.why_not == ""
    assert engine.statistics()["num_real_steps"] == 40
    assert engine.statistics()["num_jumps_proposed"] > 0


def test_detached_it_was_never_there() -> None:
    run = Run(willing())
    assert run.engine is not None
    before = set(vars(run.accelerator))
    assert "clip_grad_norm_" in before
    run.engine.detach()
    assert not {"clip_grad_norm_", "clip_grad_value_", "backward"} & set(vars(run.accelerator))
    assert not run.accelerator._save_model_state_pre_hook


def test_bfloat16(tmp_path: Path) -> None:
    run = Run(willing(), precision="bf16", dropout=0.0).train()
    assert run.engine is not None
    assert run.engine.statistics()["num_jumps_proposed"] > 0
    assert all(p.dtype is torch.float32 and bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_the_comparison_can_fail() -> None:
    torch.manual_seed(3)
    plain = Run(None).train()
    torch.manual_seed(3)
    ours = Run(willing()).train()
    assert difference(ours.everything(), plain.everything()) is not None


# ---- two processes -------------------------------------------------------------------------------------------


def _of_two(folder: str, rank: int, size: int) -> Any:
    import os

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    run = Run(willing(), dropout=0.0)
    assert run.accelerator.num_processes == 2
    run.train(stop=STEPS // 2)
    run.accelerator.save_state(folder)
    assert run.engine is not None
    engine = run.engine
    state = engine.run
    return {
        "weights": [w.tolist() for w in weights_of(run.model).values()], "proposed": state.meter.num_jumps_proposed,
        "steps": state.meter.num_real_steps, "exchanged": state.subject.ranks.exchanged[0],
        "together": state.subject.ranks.num_brought_together,
    }  # fmt: skip


def test_two_processes_stay_alike(tmp_path: Path) -> None:
    from ranks.drive import with_ranks

    (tmp_path / "state").mkdir()
    first, second = with_ranks(2, tmp_path, _of_two, str(tmp_path / "state"))
    assert first == second
    assert first["steps"] == STEPS // 2
    assert first["exchanged"] > 2 * STEPS // 2
    assert first["together"] == 0
    assert (tmp_path / "state" / "hybrid_predict_trainer").is_dir()
