"""Loops over loaders: round after round, iterators that end, empty passes; weights that are not finite at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from cases import put_into_subject
from hybrid_predict_trainer import ConfigError, DivergenceError, HybridTrainer, HybridTrainerConfig, with_values
from hybrid_predict_trainer.cycle.passes import next_epoch
from hybrid_predict_trainer.keep.finiteness import not_finite, trained_weights_finite, whereabouts

Batch = Any
SETTINGS = with_values(HybridTrainerConfig(), {"training.max_predict_steps": 0})


def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def data(n: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(n)]


def trainer_of(config: HybridTrainerConfig = SETTINGS, lr: float = 0.01, model: Any = None) -> HybridTrainer:
    torch.manual_seed(0)
    model = model or torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    return HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), config, loss_fn)


class Loader:
    """Gives its batches pass after pass; the first pass begins at ``start``, as after a resume."""

    def __init__(self, batches: list[Batch], start: int = 0) -> None:
        self.batches, self.start = batches, start

    def __iter__(self) -> Iterator[Batch]:
        start, self.start = self.start, 0
        return iter(self.batches[start:])


def _dataloader() -> DataLoader[Any]:
    x, y = (torch.cat(parts) for parts in zip(*data(4), strict=True))
    return DataLoader(TensorDataset(x, y), 8, shuffle=True)


ROUND: dict[str, Callable[[], Any]] = {
    "list": lambda: data(4),
    "tuple": lambda: tuple(data(4)),
    "DataLoader": _dataloader,
    "without a length": lambda: Loader(data(4)),
    "resumed in the middle": lambda: Loader(data(4), 2),
    "resumed in its last batch": lambda: Loader(data(4), 4),
}


@pytest.mark.parametrize("name", ROUND)
@pytest.mark.parametrize("enabled", [True, False])
def test_a_loader_is_gone_through_until_the_clock_ends(name: str, enabled: bool) -> None:
    config = SETTINGS if enabled else HybridTrainerConfig(enabled=False)
    trainer = trainer_of(config)
    epoch = trainer.fit(ROUND[name](), total_steps=11)
    assert (epoch.num_steps, epoch.num_real_steps, epoch.stopped_early) == (11, 11, False)


def test_a_run_at_its_end_takes_no_step() -> None:
    trainer = trainer_of()
    trainer.fit(data(4), total_steps=5)
    assert trainer.fit(data(4), total_steps=5).num_steps == 0


ONCE: dict[str, Callable[[], Any]] = {
    "generator": lambda: (batch for batch in data(4)),
    "iterator": lambda: iter(data(4)),
    "zip": lambda: zip(*[[b[i] for b in data(4)] for i in (0, 1)], strict=True),
}


@pytest.mark.parametrize("name", ONCE)
def test_an_iterator_that_ends_early_says_so(name: str) -> None:
    trainer = trainer_of()
    with pytest.warns(UserWarning, match=r"ended after 4 steps, at 4 of 11 on the clock.*call fit again") as caught:
        epoch = trainer.fit(ONCE[name](), total_steps=11)
    assert (epoch.num_steps, epoch.stopped_early, len(caught)) == (4, True, 1)
    assert trainer.fit(data(4), total_steps=11).num_steps == 7


def test_one_pass_needs_no_word() -> None:
    trainer = trainer_of()
    assert trainer.train_epoch(iter(data(4))).num_steps == 4
    assert trainer.fit(data(4), should_stop=lambda: True).stopped_early


@pytest.mark.parametrize("loader", [[], iter(()), Loader([])], ids=["list", "iterator", "loader"])
def test_nothing_to_train_on_is_an_error(loader: Any) -> None:
    with pytest.raises(ConfigError, match="no batch in two passes"):
        trainer_of().fit(loader, total_steps=3)


def test_samplers_are_told_of_every_epoch() -> None:
    x, y = (torch.cat(parts) for parts in zip(*data(4), strict=True))
    sampler = DistributedSampler(TensorDataset(x, y), num_replicas=1, rank=0, shuffle=True)  # type: ignore[var-annotated]
    sampler.set_epoch(3)
    seen: list[tuple[int, list[float]]] = []

    def note(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        seen.append((sampler.epoch, batch[0][:, 0].tolist()))
        return loss_fn(model, batch)

    trainer = trainer_of()
    put_into_subject(trainer, loss_fn=note)
    trainer.fit(DataLoader(TensorDataset(x, y), 8, sampler=sampler), total_steps=12)
    assert [epoch for epoch, _ in seen] == [3] * 4 + [4] * 4 + [5] * 4
    assert seen[0][1] != seen[4][1]


class Counting:
    """A data set that shuffles by a number it does not show."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def set_epoch(self, number: int) -> None:
        self.told.append(number)


@pytest.mark.parametrize("place", ["dataset", "sampler", "batch_sampler"])
def test_whoever_shuffles_is_told_once(place: str) -> None:
    counting = Counting()
    loader = type("Some", (), {place: counting, "dataset": counting})()
    next_epoch(loader, 2)
    assert counting.told == [2]


# ---- weights that are not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["fit", "train_epoch"])
def test_a_plain_run_that_diverges_ends_with_an_error(loop: str) -> None:
    model = torch.nn.Linear(4, 1)
    trainer = trainer_of(HybridTrainerConfig(enabled=False), lr=1e4, model=model)
    run = trainer.train_epoch if loop == "train_epoch" else lambda b: trainer.fit(b, total_steps=200)
    with pytest.raises(DivergenceError, match=r"diverged: NaN or infinity has reached weights \(weight and 1 more\)"):
        run(data(200))


@pytest.mark.parametrize("where", ["weight", "moment", "rate", "nowhere"])
def test_the_last_word_is_true(where: str) -> None:
    trainer = trainer_of(with_values(SETTINGS, {"divergence.max_consecutive_nonfinite": 4}))
    model, optimizer = trainer.run.subject.model, trainer.run.subject.optimizer
    for batch in data(3):
        trainer.step(batch)
    if where == "weight":
        model[0].weight.data[0, 0] = torch.nan
    elif where == "moment":
        optimizer.state[model[0].weight]["momentum_buffer"][0, 0] = torch.inf
    elif where == "rate":
        optimizer.param_groups[0]["lr"] = float("nan")
    bad = [(b[0] * (torch.nan if where == "nowhere" else 1.0), b[1]) for b in data(8)]
    words = {
        "weight": r"reached weights \(0\.weight",
        "moment": r"reached weights .* optimizer state \(momentum_buffer of 0",
        "rate": r"reached the learning rate of group 0, weights",
        "nowhere": "weights are those of the last good step",
    }

    def loop() -> None:
        for batch in bad:
            trainer.step(batch)

    with pytest.raises(DivergenceError, match=words[where]):
        loop()


def test_a_statistic_that_is_not_a_number_is_named_and_a_mask_is_not() -> None:
    model = torch.nn.BatchNorm1d(3)
    model.register_buffer("mask", torch.full((2,), -torch.inf))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not_finite(model, optimizer) == []
    model.running_mean[0] = torch.nan  # type: ignore[index]
    assert not_finite(model, optimizer) == ["buffers (running_mean)"]
    assert whereabouts(model, optimizer).startswith("NaN or infinity has reached buffers")
    assert trained_weights_finite(optimizer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_every_kind_of_weight_is_looked_at(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    assert trained_weights_finite(optimizer)
    weight.data[1] = torch.inf
    assert not trained_weights_finite(optimizer)
