"""Processes that cannot agree are refused while prediction is on, and the plain loop runs there."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn

from hybrid_predict_trainer import ConfigError, HybridTrainer, HybridTrainerConfig, preset_config, with_values
from hybrid_predict_trainer.distributed.processes import shared_by, wrapper_of

gloo = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()) or sys.platform == "win32",
    reason="needs the gloo backend",
)


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


def built(model: nn.Module, config: HybridTrainerConfig | None = None) -> HybridTrainer:
    return HybridTrainer(model, torch.optim.SGD(model.parameters(), lr=0.1), config, loss_fn)


def batches(rank: int, n: int = 6) -> list[Any]:
    generator = torch.Generator().manual_seed(rank)
    return [(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)) for _ in range(n)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def join(rank: int, size: int, port: int) -> None:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    join(0, 1, free_port())
    yield
    distributed.destroy_process_group()


# ---- two processes -----------------------------------------------------------------------------------


def _rank(rank: int, port: int) -> None:
    """What each of two ranks checks; an assertion that fails here fails the test."""
    torch.set_num_threads(1)
    early = built(network())  # before there is a group
    join(rank, 2, port)
    with pytest.raises(ConfigError, match=r"2 processes.*built for 1.*enabled=False"):
        early.step(batches(rank)[0])
    with pytest.raises(ConfigError, match=r"2 processes.*not wrapped in DistributedDataParallel"):
        built(network())
    with pytest.raises(ConfigError, match="2 processes"):  # watches and skips by its own losses, too
        built(network(), HybridTrainerConfig(max_predict_steps=0))
    own = distributed.new_group([0]), distributed.new_group([1])
    with pytest.raises(ConfigError, match="joins 1 of 2 processes"):
        built(nn.parallel.DistributedDataParallel(network(), process_group=own[rank]))
    wrapped = nn.parallel.DistributedDataParallel(network())

    trainer = built(wrapped, HybridTrainerConfig(enabled=False))
    assert trainer.fit(batches(rank), total_steps=6).num_real_steps == 6
    mine = torch.cat([p.detach().reshape(-1) for p in wrapped.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(theirs, mine)
    assert torch.equal(theirs[0], theirs[1]), "the plain loop keeps the ranks alike"

    plain = nn.parallel.DistributedDataParallel(network())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in batches(rank):
        optimizer.zero_grad()
        loss_fn(plain, batch).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(wrapped.parameters(), plain.parameters(), strict=True))
    distributed.destroy_process_group()


# ---- one process -----------------------------------------------------------------------------------------


@gloo
@pytest.mark.usefixtures("alone")
def test_a_model_with_a_wrapped_part_is_refused_whatever_the_number_of_processes() -> None:
    model = nn.Sequential(nn.parallel.DistributedDataParallel(network()))
    with pytest.raises(ConfigError, match="wrapped in DistributedDataParallel"):
        built(model)
    assert built(model, HybridTrainerConfig(enabled=False)).fit(batches(0)).num_real_steps == 6


@gloo
@pytest.mark.usefixtures("alone")
def test_a_dtensor_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    model = network()
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(0)]))  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"parameter 0\.weight is sharded \(DTensor\)"):
        shared_by(model, (), predicts=True)
    foreign = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Shard(0)]))
    with pytest.raises(ConfigError, match="number 0 of the optimizer is sharded"):
        shared_by(network(), [foreign], predicts=True)


@gloo
@pytest.mark.usefixtures("alone")
def test_a_wrapped_model_of_one_process_is_the_model() -> None:
    wrapped, plain = nn.parallel.DistributedDataParallel(network()), network()
    one, other = built(wrapped), built(plain)
    for batch in batches(0, 12):
        assert one.step(batch).loss == other.step(batch).loss
    assert all(torch.equal(a, b) for a, b in zip(wrapped.parameters(), plain.parameters(), strict=True))
    assert one.run.subject.ranks.exchanged == (0, 0)
    assert one.run.subject.groups == other.run.subject.groups, "names and roles are those of the model inside"


@gloo
@pytest.mark.usefixtures("alone")
def test_a_group_of_one_is_no_matter() -> None:
    assert built(network()).fit(batches(0)).num_steps >= 6


class FullyShardedDataParallel(nn.Linear):
    """FSDP's first kind needs an accelerator: a class of its name and place stands in for it."""


def test_wrappers_are_known_by_name_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrapper_of(FullyShardedDataParallel(1, 1)) == "", "it is of this test's own"
    monkeypatch.setattr(FullyShardedDataParallel, "__module__", "torch.distributed.fsdp.fully_sharded_data_parallel")
    assert wrapper_of(FullyShardedDataParallel(1, 1)) == "FullyShardedDataParallel"
    derived = type("MyFSDP", (FullyShardedDataParallel,), {})
    with pytest.raises(ConfigError, match=r"part 'body' is wrapped in FullyShardedDataParallel.*one process"):
        built(_with_body(derived(4, 1)))


def _with_body(body: nn.Module) -> nn.Module:
    model = nn.Module()
    model.body = body
    return model


@pytest.mark.parametrize("name", ["world size", "preset", "segments"])
def test_every_way_to_predict_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    config = {
        "world size": None,
        "preset": preset_config("full_batch"),
        "segments": with_values(HybridTrainerConfig(), {"training.segments": 3}),
    }[name]
    with pytest.raises(ConfigError, match="4 processes"):
        built(network(), config)


@gloo
def test_two_processes_that_cannot_agree_are_refused_and_run_plainly() -> None:
    torch.multiprocessing.start_processes(_rank, args=(free_port(),), nprocs=2, start_method="fork")
