"""Two processes under DistributedDataParallel decide alike; what befalls one neither parts nor hangs them."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hybrid_predict_trainer import CheckpointError, ConfigError, HybridTrainer, with_values
from hybrid_predict_trainer.distributed.collective import BLOCK, HEAD, OtherRankFailed, Ranks
from hybrid_predict_trainer.keep.failures import Place
from hybrid_predict_trainer.predictors import Secant
from ranks import __main__ as command
from ranks.drive import alone, apart, rank_run, with_ranks
from ranks.material import CASES, batches, loss_fn, network, optimizer_of, schedule_of, share

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()) or sys.platform == "win32",
    reason="needs the gloo backend",
)


def _facts(name: str, driver: str, steps: int, rank: int, size: int) -> list[Any]:
    return rank_run(name, driver, steps, rank, size, compare=False)[0]


@pytest.mark.parametrize(
    ("name", "driver", "steps"),
    [("default", "attach", 40), ("eager", "trainer", 40), ("full", "trainer", 20), ("full", "attach", 20)],
)
def test_two_ranks_are_one_process_with_the_whole_batch(name: str, driver: str, steps: int, tmp_path: Path) -> None:
    first, second = with_ranks(2, tmp_path, _facts, name, driver, steps)
    assert repr(first) == repr(second), "the ranks have parted"
    assert apart(first, alone(name, driver, steps), 1e-6) is None
    phases = {f["phase"] for f in first}
    assert name == "default" or "predict" in phases, "nothing was proposed"
    assert name != "full" or sum(f["kept"] for f in first) > 3, "no jump was made"
    assert name != "default" or max(f["multiplier"] for f in first) > 1, "nothing was raised"


def test_what_a_clock_decides_is_the_first_ranks(tmp_path: Path) -> None:
    first, second = with_ranks(2, tmp_path, _facts, "network", "trainer", 50)
    assert [f["weights"] for f in first] == [f["weights"] for f in second]
    assert sum(f["phase"] == "predict" for f in first) > 1


class OfAnotherMind(Secant):
    """Has learnt something else on one rank, as a network that trains for as long as there is time has."""

    def __init__(self, rank: int) -> None:
        super().__init__(CASES["full"].settings().predictor.secant)
        self.rank = rank

    def predict(self, horizon: int) -> Any:
        own = super().predict(horizon)
        return replace(own, coefficients=1.3 * own.coefficients) if self.rank else own


def _of_two_minds(rank: int, size: int) -> tuple[list[float], int, int]:
    trainer = trainer_of(rank, "full", predictor=OfAnotherMind(rank))
    for batch in data(rank, 30, "full"):
        trainer.step(batch)
    accepted = trainer.statistics()["num_jumps_accepted"]
    return _weights(trainer).tolist(), accepted, trainer.run.subject.ranks.num_brought_together


def test_where_predictors_say_different_things_the_first_ranks_counts(tmp_path: Path) -> None:
    first, second = with_ranks(2, tmp_path, _of_two_minds)
    assert first == second
    assert first[1] > 2, "no jump was made"
    assert first[2] == 0, "they never parted"


# ---- what befalls one rank -------------------------------------------------------------------------------------


def trainer_of(rank: int, name: str = "eager", **more: Any) -> HybridTrainer:
    case, model = CASES[name], DistributedDataParallel(network())
    optimizer = optimizer_of(model, case.lr)
    config = with_values(case.settings(), more.pop("values", {}))
    return HybridTrainer(model, optimizer, config, more.pop("loss_fn", loss_fn), schedule_of(optimizer, 100), **more)


def data(rank: int, steps: int, name: str = "eager") -> list[Any]:
    case = CASES[name]
    return share(batches(steps, full=case.full, noise=case.noise), rank, 2)


def _weights(trainer: HybridTrainer) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.run.subject.model.parameters()])


def _everywhere(value: Any) -> list[Any]:
    held: list[Any] = [None, None]
    distributed.all_gather_object(held, value)
    return held


def _same_weights(trainer: HybridTrainer) -> bool:
    mine, theirs = _everywhere(_weights(trainer).tolist())
    return bool(mine == theirs)


def _warned(work: Callable[[], None]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in caught]


class FailsInTheGate:
    """A loss that raises on one rank whenever nothing is differentiated."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if self.rank == 1 and not torch.is_grad_enabled():
            raise RuntimeError("no memory")
        return loss_fn(model, batch)


class FailsToPredict(Secant):
    """Raises on one rank."""

    def __init__(self, rank: int) -> None:
        super().__init__(CASES["eager"].settings().predictor.secant)
        self.rank, self.asked = rank, 0

    def predict(self, horizon: int) -> Any:
        self.asked += 1
        if self.rank == 1 and self.asked % 2 == 0:
            raise ValueError("nothing to say")
        return super().predict(horizon)


def _one_fails(kind: str, rank: int, size: int) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if kind == "gate":
        more["loss_fn"] = FailsInTheGate(rank)
    elif kind == "predictor":
        more["predictor"] = FailsToPredict(rank)
    trainer = trainer_of(rank, **more)
    run = trainer.run
    if rank == 1 and kind == "snapshot":
        type(run).take_snapshot = _no_memory  # type: ignore[method-assign]
    if rank == 1 and kind == "lookahead":
        run.optimizer_step.look_ahead = _no_memory  # type: ignore[method-assign]

    def train() -> None:
        for i, batch in enumerate(data(rank, 50)):
            if kind == "outside" and rank == 1 and i == 20:
                with torch.no_grad():
                    next(run.subject.model.parameters()).add_(0.1)
            bad = kind == "not finite" and rank == 1 and i in (12, 13)
            trainer.step((batch[0] * float("nan"), batch[1]) if bad else batch)

    said = _warned(train)
    return {
        "weights": _same_weights(trainer),
        "failures": {place.value: n for place, n in run.failures.counts.items() if n},
        "said": said, "together": run.subject.ranks.num_brought_together, "proposed": run.meter.num_jumps_proposed,
        "accepted": run.meter.num_jumps_accepted, "skipped": run.meter.num_attempted_steps - run.meter.num_real_steps,
        "lookahead": run.optimizer_step.lookahead.num_steps, "first": run.failures.first,
    }  # fmt: skip


def _no_memory(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError("none left")


@pytest.mark.parametrize("kind", ["gate", "predictor", "snapshot", "lookahead", "outside", "not finite"])
def test_what_fails_on_one_rank_is_refused_on_all(kind: str, tmp_path: Path) -> None:
    first, second = with_ranks(2, tmp_path, _one_fails, kind)
    for found in (first, second):
        assert found["weights"], "the ranks have parted"
    assert first["failures"] == second["failures"]
    if kind in ("gate", "snapshot"):
        assert first["failures"][Place.GATE] >= 1
        assert first["accepted"] == second["accepted"] == 0
    if kind == "predictor":
        assert first["failures"]
    if kind == "lookahead":
        assert first["failures"] == {Place.MOTION: 3}
        assert first["first"][Place.MOTION] == "it failed on another rank"
        assert first["lookahead"] == second["lookahead"] == 0, "it has ended on both"
    if kind == "outside":
        assert first["together"] == second["together"] == 1
        assert any("states differed" in line for line in second["said"])
    if kind == "not finite":
        assert first["skipped"] == second["skipped"] == 2
        assert first["together"] == 0


def _stopped(folder: str, rank: int, size: int) -> Any:
    """A late signal on one rank ends both, with one checkpoint, which both go on from."""
    asked: list[bool] = []
    trainer = trainer_of(rank, "full")
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))

    def progress(result: Any) -> None:
        if rank == 1 and trainer.current_step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = data(rank, 40, "full")
    trainer.fit(whole[:1], 40, progress, lambda: bool(asked))
    signal.signal(signal.SIGTERM, before)
    stopped = trainer.current_step
    torch.manual_seed(100 + rank)
    written, saved = trainer.save_checkpoint(folder), _weights(trainer).tolist()
    drawn = torch.rand(3).tolist()
    torch.manual_seed(rank)
    for batch in data(rank, 10, "full"):
        trainer.step(batch)

    again = trainer_of(rank, "full")
    again.load_latest(folder)
    assert again.current_step == stopped
    assert torch.rand(3).tolist() == drawn, "dice of its own"
    for batch in data(rank, 10, "full"):
        again.step(batch)
    found = _weights(trainer).tolist() == _weights(again).tolist()
    return stopped, found, written.name, sorted(p.name for p in Path(folder).glob("checkpoint*")), saved


def test_a_signal_on_one_rank_ends_all_with_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    first, second = with_ranks(2, tmp_path, _stopped, str(tmp_path / "run"))
    assert first[:4] == second[:4] == (12, True, "checkpoint_step_12", ["checkpoint_step_12"])
    # one process goes on from what two have written
    case = CASES["full"]
    model = network()
    optimizer = optimizer_of(model, case.lr)
    one = HybridTrainer(model, optimizer, case.settings(), loss_fn, schedule_of(optimizer, 100))
    one.load_checkpoint(tmp_path / "run" / "checkpoint_step_12")
    assert _weights(one).tolist() == first[4], "bit for bit"
    losses = [one.step(batch).loss for batch in share(batches(20, full=True, noise=0.0), 0, 1)]
    assert losses[-1] < losses[0]


def _full_disk(folder: str, rank: int, size: int) -> Any:
    trainer = trainer_of(rank, values={"checkpoint.directory": folder, "checkpoint.save_interval": 10})
    said = _warned(lambda: [trainer.step(batch) for batch in data(rank, 25)])
    with pytest.raises(CheckpointError):
        trainer.save_checkpoint(folder)
    return trainer.current_step, said, _same_weights(trainer)


def test_a_disk_that_fails_where_it_is_written_to_hangs_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    first, second = with_ranks(2, tmp_path, _full_disk, str(tmp_path / "file"))
    for step, said, same in (first, second):
        assert (step, same) == (25, True)
        assert any("training goes on" in line for line in said)


def _saved_at_intervals(folder: str, rank: int, size: int) -> Any:
    values = {"checkpoint.directory": folder, "checkpoint.save_interval": 10, "checkpoint.async_save": True}
    records = Path(folder) / "metrics.jsonl"
    trainer = trainer_of(rank, values={**values, "metrics.path": str(records)})
    trainer.fit(data(rank, 35))
    return sorted(p.name for p in Path(folder).glob("checkpoint*")), records.read_text().count("\n")


def test_one_rank_writes_checkpoints_and_records(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    first, second = with_ranks(2, tmp_path, _saved_at_intervals, str(tmp_path / "run"))
    assert len(first[0]) == 3
    assert first == second
    assert first[1] == second[1] >= 35
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)), "both have written"


# ---- the exchange itself ---------------------------------------------------------------------------------------


def _exchanges(rank: int, size: int) -> None:
    ranks = Ranks()
    assert ranks.means(lambda: [rank, 2.0]) == [0.5, 2.0]
    assert ranks.first_of(lambda: [float(rank), 7.0 + rank]) == [0.0, 7.0]
    assert ranks.first_of(lambda: [float("nan") if rank else 1.0]) == [1.0], "what another rank has is not looked at"
    assert ranks.any(rank == 1)
    long = [float(i + rank) for i in range(3 * BLOCK)]
    assert ranks.means(lambda: long) == [i + 0.5 for i in range(3 * BLOCK)]
    assert ranks.means(lambda: long[: BLOCK - HEAD]) == [i + 0.5 for i in range(BLOCK - HEAD)]
    assert ranks.at_step([1.0], 77) == ([2.0], True)
    assert ranks.at_step([], 77 + rank)[1] is False
    mean = ranks.mean_of(torch.tensor([1.0 + rank, float("nan") if rank else 0.0]))
    assert mean[0] == 1.5
    assert bool(mean[1].isnan())

    def one_raises() -> list[float]:
        if rank == 1:
            raise KeyError("here")
        return [1.0]

    with pytest.raises(KeyError if rank == 1 else OtherRankFailed):
        ranks.means(one_raises)
    with pytest.raises(OtherRankFailed):
        ranks.means(lambda: [1.0] * (1 + rank))

    def one_leaves() -> None:
        ranks.means(lambda: [1.0])
        if rank == 1:
            raise KeyError("before the others have exchanged")
        ranks.means(lambda: [2.0])
        ranks.first_of(lambda: [3.0])

    with pytest.raises(KeyError if rank == 1 else OtherRankFailed):
        ranks.together(one_leaves)
    assert ranks.together(lambda: ranks.means(lambda: [float(rank)])) == [0.5], "they are together again"

    def fails() -> int:
        raise CheckpointError("disk")

    with pytest.raises(CheckpointError, match="disk"):
        ranks.alone_does(fails)
    assert ranks.alone_does(lambda: 3 + rank) == 3
    model = network()
    optimizer = optimizer_of(model, 0.1)
    with pytest.raises(ConfigError, match=r"2 processes.*not wrapped"):
        HybridTrainer(model, optimizer, None, loss_fn)
    with pytest.raises(ConfigError, match=r"solves for the residuals.*2 processes"):
        trainer_of(rank, values={"predictor.type": "gauss_newton"}, residual_fn=lambda m, b: m(b[0]) - b[1])
    with pytest.raises(ConfigError, match=r"form = .dense. steps on one process.*2 processes"):
        trainer_of(rank, values={"predictor.type": "quasi_newton", "predictor.quasi_newton.form": "dense"})


def test_ranks_exchange_and_find_together_again(tmp_path: Path) -> None:
    with_ranks(2, tmp_path, _exchanges)


@pytest.mark.parametrize(("differs", "status"), [(None, 0), ("step 3: phase is 'full' and 'predict'", 1)])
def test_the_command_fails_where_one_process_is_another_run(
    differs: str | None, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = [{"phase": "full", "kept": False, "multiplier": 1.0}]
    monkeypatch.setattr(command, "with_ranks", lambda *_: [(facts, (1, 8), 0)])
    monkeypatch.setattr(command, "alone", lambda *_: facts)
    monkeypatch.setattr(command, "apart", lambda *_: differs)
    assert command.main(["--only", "default", "--steps", "1"]) == status
    assert f"one process with the whole batch: {differs or 'the same'}" in capsys.readouterr().out


def _validated(rank: int, size: int) -> dict[str, Any]:
    """Ranks of two minds about a full batch: the mean of their answers rises from the fourth one on."""
    answers = iter([4.0 - rank, 3.0 + rank, 1.0, *(2.0 + 8 * rank for _ in range(100))])
    asked: list[float] = []
    trainer = trainer_of(rank, "full", val_fn=lambda model: asked.append(next(answers)) or asked[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in data(rank, 60, "full"):
            trainer.step(batch)
    check = trainer.run.safety.validation.jumps
    return {
        "weights": _weights(trainer).tolist(), "best": check.best, "ended": check.ended_jumps, "asked": len(asked),
        "parted": trainer.run.subject.ranks.num_brought_together,
    }  # fmt: skip


def test_what_jumps_do_is_judged_by_the_mean_of_the_ranks_answers(tmp_path: Path) -> None:
    first, second = with_ranks(2, tmp_path, _validated)
    assert first == second
    assert first["ended"]
    assert first["best"] == 1.0
    assert first["asked"] == 4
    assert first["parted"] == 0


def _noisy(rank: int, size: int) -> dict[str, Any]:
    """A full batch of noise around a smooth function, half of it on either rank, until jumps have ended."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(192, 2, generator=generator) * 2 - 1
    y = torch.sin(3 * x[:, :1]) * x[:, 1:] + 0.5 * torch.randn(192, 1, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    trainer = HybridTrainer(model, optimizer, loss_fn=lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(250):
            trainer.step((x[rank::2], y[rank::2]))
    run = trainer.run
    return {
        "weights": _weights(trainer).tolist(), "check": run.judge.noise.state_dict(),
        "jumps": run.meter.num_jumps_accepted, "parted": run.subject.ranks.num_brought_together,
    }  # fmt: skip


def test_noise_is_found_on_all_ranks_at_once(tmp_path: Path) -> None:
    first, second = with_ranks(2, tmp_path, _noisy)
    assert first == second
    assert first["check"]["found"]
    assert first["jumps"] > 0
    assert first["parted"] == 0
