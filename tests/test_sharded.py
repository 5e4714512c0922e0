"""Weights that ``fully_shard`` (FSDP2) has spread: the same run as with whole ones, on one rank and on several."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hybrid_predict_trainer import CheckpointError, ConfigError, HybridTrainer, HybridTrainerConfig, with_values
from hybrid_predict_trainer.distributed.collective import RanksDisagree
from hybrid_predict_trainer.distributed.processes import SHARDED, reshard, wrapper_of
from hybrid_predict_trainer.experiments.faults import files
from hybrid_predict_trainer.experiments.faults.files import payload
from hybrid_predict_trainer.experiments.faults.material import fingerprint
from hybrid_predict_trainer.keep import checkpoint, resume, sharded
from hybrid_predict_trainer.keep.failures import Place
from hybrid_predict_trainer.keep.manifest import MANIFEST, STATE, manifest_text
from hybrid_predict_trainer.weights.shards import LocalShard, local, rms_over, whole
from ranks.drive import alone, apart, rank_run, spread, trained, with_ranks
from ranks.material import CASES, batches, loss_fn, network, optimizer_of, schedule_of, share

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()) or sys.platform == "win32",
    reason="needs the gloo backend",
)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def trainer_of(model: nn.Module, name: str = "full", **more: Any) -> HybridTrainer:
    case = CASES[name]
    optimizer = optimizer_of(model, case.lr)
    config = with_values(case.settings(), more.pop("values", {}))
    found = more.pop("loss_fn", loss_fn)
    return HybridTrainer(model, optimizer, config, found, schedule_of(optimizer, 100), **more)


def data(rank: int, size: int, steps: int, name: str = "full") -> list[Any]:
    case = CASES[name]
    return share(batches(steps, full=case.full, noise=case.noise), rank, size)


def weights_of(model: nn.Module) -> list[float]:
    found: list[float] = torch.cat([whole(p).detach().reshape(-1) for p in model.parameters()]).tolist()
    return found


# ---- one rank ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("name", "driver"), [("full", "trainer"), ("eager", "attach")])
def test_weights_sharded_over_one_rank_are_the_whole_ones(name: str, driver: str) -> None:
    case, found = CASES[name], list[Any]()
    run = trained(case, driver, data(0, 1, 25, name), spread(network(), sharded=True), found.append)
    assert all(isinstance(p, LocalShard) for p in run.subject.parameters)
    assert apart(found, alone(name, driver, 25), 0.0) is None, "bit for bit"
    assert "predict" in {f["phase"] for f in found}


@pytest.mark.usefixtures("one_rank")
def test_a_jump_changes_the_next_loss() -> None:
    model, twin = spread(network(), sharded=True), network()
    batch = data(0, 1, 1)[0]
    # the trap: the root keeps what it has gathered, so that a forward does not see what is written to the shards
    with torch.no_grad():
        last = local(list(model.parameters())[2])
        before = float(loss_fn(model, batch))
        last.add_(1.0)
        assert float(loss_fn(model, batch)) == before
        reshard([module for module in model.modules() if wrapper_of(module) == SHARDED])
        assert float(loss_fn(model, batch)) != before
        reshard([model])
        last.sub_(1.0)

    trainer = trainer_of(model)
    jumps = 0
    for _ in range(20):
        with torch.no_grad():
            loss_fn(model, batch)  # of the caller's own: a validation
        result = trainer.step(batch)
        jumps += result.was_predicted
        with torch.no_grad():
            for mine, theirs in zip(twin.parameters(), trainer.run.subject.parameters, strict=True):
                mine.copy_(theirs)
            seen = float(loss_fn(model, batch))
            assert seen == float(loss_fn(twin, batch)), f"step {trainer.current_step}: a forward saw other weights"
    assert jumps > 3


@pytest.mark.usefixtures("one_rank")
def test_compute_in_bfloat16_leaves_the_shards_as_wide_as_they_are() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = network().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy)
    whole_batches = [(x.float(), y.float()) for x, y in data(0, 1, 30)]
    trainer = trainer_of(model, values={"gate.exact": "always"})
    losses = [trainer.step(whole_batches[0]).loss for _ in range(30)]
    assert {p.dtype for p in trainer.run.subject.parameters} == {torch.float32}
    assert losses[-1] < losses[0]
    assert trainer.run.meter.num_jumps_proposed > 0


@pytest.mark.usefixtures("one_rank")
def test_what_cannot_be_agreed_on_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    wide = network()
    fully_shard(wide, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard")))
    with pytest.raises(ConfigError, match=r"is spread as .*not in one dimension"):
        trainer_of(wide)
    half = network()
    fully_shard(half[0])  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"2\.weight is not sharded, and others are"):
        trainer_of(half)
    mixed = network()
    fully_shard(mixed[0])  # type: ignore[index]
    mixed[2] = DistributedDataParallel(mixed[2])  # type: ignore[index, operator]
    with pytest.raises(ConfigError, match=r"part '2' is wrapped in DistributedDataParallel"):
        trainer_of(mixed)
    with pytest.raises(ConfigError, match=r"gradient scaler with sharded weights"):
        trainer_of(spread(network(), sharded=True), grad_scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigError, match=r"look at whole matrices"):
        trainer_of(spread(network(), sharded=True), "eager", values={"encoder.health": 1})
    plain = HybridTrainerConfig(enabled=False)
    for model in (wide, half):
        optimizer = optimizer_of(model, 0.1)
        assert HybridTrainer(model, optimizer, plain, loss_fn).fit(data(0, 1, 4)).num_real_steps == 4


# ---- several ranks ---------------------------------------------------------------------------------------------


def _facts(name: str, driver: str, steps: int, hidden: int, rank: int, size: int) -> Any:
    found, run = rank_run(name, driver, steps, rank, size, compare=False, sharded=True, hidden=hidden)
    parts = [p.numel() for p in run.subject.parameters]
    wanted = [float(whole(p).square().mean().sqrt()) for p in run.subject.parameters]
    assert rms_over(run.subject.parameters, list(run.subject.parameters)) == pytest.approx(wanted)
    return found, parts, {place.value: n for place, n in run.failures.counts.items() if n}


@pytest.mark.parametrize(
    ("ranks", "name", "driver", "steps"),
    [(2, "eager", "trainer", 40), (2, "full", "attach", 20), (4, "full", "trainer", 14)],
)
def test_ranks_with_parts_are_one_process_with_the_whole_batch(
    ranks: int, name: str, driver: str, steps: int, tmp_path: Path
) -> None:
    found = with_ranks(ranks, tmp_path, _facts, name, driver, steps, 7)  # parts of unequal size, and without numbers
    (first, parts, failures), *others = found
    assert [sum(n) for n in zip(parts, *(p for _, p, _ in others), strict=True)] == [28, 7, 7, 1]
    assert others[-1][1][2:] == [0, 0]
    assert all(repr(facts) == repr(first) for facts, _, _ in others), "the ranks have parted"
    assert not failures
    assert apart(first, alone(name, driver, steps, 7), 1e-6) is None
    assert "predict" in {f["phase"] for f in first}
    assert name != "full" or sum(f["kept"] for f in first) > 1, "no jump was made"


# ---- what befalls one rank -----------------------------------------------------------------------------------


class FailsBehindTheForward:
    """A loss that raises on one rank whenever nothing is differentiated, once weights have been gathered."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        loss = loss_fn(model, batch)
        if self.rank == 1 and not torch.is_grad_enabled():
            raise RuntimeError("no memory")
        return loss


def _one_fails(kind: str, rank: int, size: int) -> dict[str, Any]:
    model = spread(network(hidden=7), sharded=True)
    if kind == "frozen":
        model.get_parameter("0.bias").requires_grad_(False)
    at_first = whole(model.get_parameter("0.bias")).tolist()
    name, steps = ("full", 20) if kind in ("gate", "frozen") else ("eager", 50)
    trainer = trainer_of(model, name, **({"loss_fn": FailsBehindTheForward(rank)} if kind == "gate" else {}))
    run = trainer.run
    if rank == 1 and kind == "snapshot":
        run.take_snapshot = _no_memory  # type: ignore[method-assign]
    if rank == 1 and kind == "lookahead":
        run.optimizer_step.look_ahead = _no_memory  # type: ignore[method-assign]
    said = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for i, batch in enumerate(data(rank, 2, steps, name)):
                if kind == "outside" and rank == 1 and i == 20:
                    run.judge.ledger.spend(1.0)  # ranks part
                if kind == "steps" and rank == 1 and i == 20:
                    run.meter.real_step()
                bad = kind == "not finite" and rank == 1 and i in (12, 13)
                trainer.step((batch[0] * float("nan"), batch[1]) if bad else batch)
        except RanksDisagree as error:
            said = str(error)
    return {
        "weights": weights_of(model), "failures": {place: n for place, n in run.failures.counts.items() if n},
        "proposed": run.meter.num_jumps_proposed, "accepted": run.meter.num_jumps_accepted, "said": said,
        "skipped": run.meter.num_attempted_steps - run.meter.num_real_steps, "step": trainer.current_step,
        "together": run.subject.ranks.num_brought_together, "lookahead": run.optimizer_step.lookahead.num_steps,
        "bias": at_first == whole(model.get_parameter("0.bias")).tolist(),
    }  # fmt: skip


def _no_memory(*args: Any, **kwargs: Any) -> Any:
    raise MemoryError("none left")


KINDS = ("gate", "snapshot", "lookahead", "not finite", "frozen", "outside", "steps")


def _all_kinds(rank: int, size: int) -> dict[str, Any]:
    return {kind: _one_fails(kind, rank, size) for kind in KINDS}  # starting processes takes longer than the runs


@pytest.fixture(scope="module")
def befallen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, what became of every kind of run."""
    return with_ranks(2, tmp_path_factory.mktemp("ranks"), _all_kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_what_befalls_one_rank_befalls_all(kind: str, befallen: list[dict[str, Any]]) -> None:
    first, second = (found[kind] for found in befallen)
    assert first == second, "the ranks have parted"
    assert first["step"] == (20 if kind in ("gate", "frozen", "steps") else 50)
    assert ("different numbers of steps" in first["said"]) == (kind == "steps")
    assert first["together"] == {"outside": 1, "lookahead": 3}.get(kind, 0)
    assert first["skipped"] == (2 if kind == "not finite" else 0)
    assert first["bias"] == (kind == "frozen")
    if kind in ("gate", "snapshot"):
        assert first["failures"][Place.GATE] >= 1
        assert first["accepted"] == 0
    elif kind == "lookahead":
        assert first["failures"] == {Place.MOTION: 3}
        assert first["lookahead"] == 0
    else:
        assert not first["failures"]
    if kind == "frozen":
        assert first["accepted"] > 1


# ---- checkpoints ---------------------------------------------------------------------------------------------


def _saved_and_gone_on(folder: str, rank: int, size: int) -> dict[str, Any]:
    """Two ranks save in mid-run; a fresh pair goes on from there, bit for bit."""
    steps = data(rank, size, 24, "eager")
    trainer = trainer_of(spread(network(hidden=7), sharded=True), "eager", values={"checkpoint.async_save": True})
    for batch in steps[:14]:
        trainer.step(batch)
    saved = weights_of(trainer.run.subject.model)
    path = trainer.save_checkpoint(folder)
    for batch in steps[14:]:
        trainer.step(batch)
    again = trainer_of(spread(network(1, hidden=7), sharded=True), "eager")
    again.load_latest(folder)
    results = [again.step(batch).loss for batch in steps[14:]]
    left, right = trainer.run.state_dict(), again.run.state_dict()
    parted = [name for name in left if name != "batches" and repr(left[name]) != repr(right[name])]

    broken = trainer_of(spread(network(1, hidden=7), sharded=True), "eager")
    if rank == 0:
        with (Path(folder) / path.name / "rank_1.tensors").open("r+b") as file:
            file.write(b"\0")
    distributed.barrier()
    with pytest.raises(CheckpointError, match="damaged"):
        broken.load_checkpoint(Path(folder) / path.name)
    (Path(folder) / "in the way").touch()
    with pytest.raises(CheckpointError):
        trainer.save_checkpoint(Path(folder) / "in the way")
    return {
        "same": weights_of(trainer.run.subject.model) == weights_of(again.run.subject.model), "losses": results[-1],
        "files": sorted(p.name for p in path.iterdir()), "saved": saved, "parted": parted,
    }  # fmt: skip


def test_ranks_go_on_from_what_each_has_written(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    first, second = with_ranks(2, tmp_path, _saved_and_gone_on, str(tmp_path / "run"))
    assert first == second
    assert first["same"], "bit for bit"
    assert not first["parted"]
    assert {"MANIFEST.json", "rank_0.tensors", "rank_1.tensors"} < set(first["files"])
    assert not [name for name in first["files"] if name.startswith(".") or name.endswith(".pkl")]


def _written(folder: str, rank: int, size: int) -> Any:
    trainer = trainer_of(spread(network(hidden=7), sharded=True))
    for batch in data(rank, size, 12):
        trainer.step(batch)
    trainer.save_checkpoint(folder)
    return weights_of(trainer.run.subject.model), _moments(trainer)


def _read(folder: str, rank: int, size: int) -> Any:
    trainer = trainer_of(spread(network(1, hidden=7), sharded=True))
    trainer.load_latest(folder)
    found = weights_of(trainer.run.subject.model), _moments(trainer), trainer.current_step
    losses = [trainer.step(batch).loss for batch in data(rank, size, 12)]
    return found, losses


def _moments(trainer: HybridTrainer) -> list[float]:
    state = trainer.run.subject.optimizer.state
    found: list[float] = torch.cat([whole(s["exp_avg"]).reshape(-1) for s in state.values()]).tolist()
    return found


def test_two_ranks_become_one_and_one_becomes_two(tmp_path: Path) -> None:
    for name in ("two", "one", "plain"):
        (tmp_path / name).mkdir()
    (saved, moments), _ = with_ranks(2, tmp_path, _written, str(tmp_path / "two"))
    told = checkpoint.describe(tmp_path / "two" / "checkpoint_step_12")
    assert told["num_parameters"] == len(saved) == 43
    sizes = {(held["part"], held["purpose"]): held["bytes"] for held in told["held"]}
    assert sizes["model", "weights and buffers"] == 43 * 8
    assert sizes["optimizer", "optimizer state"] == 2 * 43 * 8 + 2 * 4 * 4, "moments once, counts of steps per rank"
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "two" / "checkpoint_step_12").iterdir()}
    assert len(modes) == 1, "some files are for their owner alone"
    plain = trainer_of(network(1, hidden=7))
    plain.load_latest(tmp_path / "two")
    assert (weights_of(plain.run.subject.model), _moments(plain), plain.current_step) == (saved, moments, 12)
    more = [plain.step(batch).loss for batch in data(0, 1, 12)]
    assert more[-1] < more[0]
    plain.save_checkpoint(tmp_path / "plain")
    for found, losses in with_ranks(2, tmp_path, _read, str(tmp_path / "plain")):
        assert found == (weights_of(plain.run.subject.model), _moments(plain), 24)
        assert losses[-1] < losses[0]


def _disk_of_one_fails(folder: str, rank: int, size: int) -> dict[str, Any]:
    """The second rank cannot write its own file, then not its shards, then cannot read: both hear of it."""
    values = {"checkpoint.directory": folder, "checkpoint.save_interval": 6}
    trainer = trainer_of(spread(network(hidden=7), sharded=True), values=values)
    steps, said = data(rank, size, 24), list[str]()
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patched:
        warnings.simplefilter("always")
        for i, batch in enumerate(steps):
            if i == 6 and rank == 1:  # that of step 6 was written
                patched.setattr(sharded, "write_tensors", _no_room)
            if i == 12 and rank == 1:
                patched.undo()
                patched.setattr("torch.distributed.checkpoint.filesystem._write_files_from_queue", _no_room)
            if i == 18 and rank == 1:
                patched.undo()
            trainer.step(batch)
        said = [str(w.message) for w in caught]
    there = sorted(p.name for p in Path(folder).iterdir())
    before = weights_of(trainer.run.subject.model), trainer.run.meter.num_steps
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1:
            patched.setattr(sharded, "load_file", _no_room)
        with pytest.raises(CheckpointError) as refused:
            trainer.load_checkpoint(Path(folder) / "checkpoint_step_6")
        patched.undo()
        if rank == 1:  # as late as that
            patched.setattr("hybrid_predict_trainer.keep.resume._apply_own_rank", _no_room)
        with pytest.raises(CheckpointError):
            trainer.load_checkpoint(Path(folder) / "checkpoint_step_6")
    assert (weights_of(trainer.run.subject.model), trainer.run.meter.num_steps) == before
    after = [trainer.step(batch).loss for batch in steps[:4]]
    return {
        "step": before[1], "said": sum("training goes on" in line for line in said), "there": there,
        "refused": str(refused.value), "after": after, "together": trainer.run.subject.ranks.num_brought_together,
    }  # fmt: skip


def _no_room(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


def test_a_disk_that_fails_one_rank_fails_all_and_ends_none(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    first, second = with_ranks(2, tmp_path, _disk_of_one_fails, str(tmp_path / "run"))
    for found in (first, second):
        assert found["step"] == 24
        assert found["said"] == 1, "two failures in a row are said once"
        assert found["there"] == ["checkpoint_step_24", "checkpoint_step_6", "latest"], "nothing is left behind"
        assert found["together"] == 0
    assert first["after"] == second["after"]
    assert "another rank failed" in first["refused"]
    assert "No space left" in second["refused"]


#: What may be done to a checkpoint of ranks, with a manifest that vouches for it; and what is said.
HOSTILE: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]] = {
    "no file of a rank's own": (lambda at, tree: at.joinpath("rank_0.tensors").unlink(), "cannot be read"),
    "no shards": (lambda at, tree: shards_of(at).unlink(), "cannot be read"),
    "shards that are a pickle": (lambda at, tree: _put(shards_of(at), payload(at.parent / "ran")), "cannot be read"),
    "a rank's own file that is a pickle": (
        lambda at, tree: _put(at / "rank_0.tensors", payload(at.parent / "ran")), "cannot be read"),
    "a header of exabytes": (lambda at, tree: _put(shards_of(at), b"\xff" * 7 + b"\x3f{}"), "header too large"),
    "shards of other weights": (lambda at, tree: _put(shards_of(at), save({"x": torch.zeros(3)})), "cannot be read"),
    "no tree": (lambda at, tree: tree.update(rank0=1), "cannot be read"),
    "a name for shards that are not there": (lambda at, tree: _mark(tree).__setitem__(0, "model.x"), "cannot be read"),
    "a type that is none": (lambda at, tree: _mark(tree).__setitem__(2, "load"), "cannot be read"),
    "a shape of another model": (lambda at, tree: _mark(tree).__setitem__(1, [10**9, 10**9]), "another shape"),
}  # fmt: skip


def shards_of(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


def _put(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _mark(tree: dict[str, Any]) -> Any:
    """Name, shape and type of the first weight, in the tree of the first rank."""
    return next(iter(tree["rank0"]["model"].values()))["$mark"][1]


@pytest.mark.usefixtures("one_rank")
def test_a_hostile_checkpoint_of_ranks_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    _written(str(tmp_path / "run"), 0, 1)
    live = trainer_of(spread(network(1, hidden=7), sharded=True))
    live.step(data(0, 1, 1)[0])
    before = fingerprint(resume.parts(live.run, live.run.recorder))
    for kind, (act, said) in HOSTILE.items():
        path = tmp_path / kind / "checkpoint_step_12"
        shutil.copytree(tmp_path / "run" / "checkpoint_step_12", path)
        document = json.loads((path / STATE).read_text())
        act(path, document["trees"])
        (path / STATE).write_text(json.dumps(document))
        fields = files.read(path)
        fields["files"] = {name: fields["files"][name] for name in fields["files"] if (path / name).exists()}
        (path / MANIFEST).write_text(manifest_text(fields))
        files.reseal(path)
        with pytest.raises(CheckpointError, match=said):
            live.load_checkpoint(path)
        assert fingerprint(resume.parts(live.run, live.run.recorder)) == before, kind
        assert not (path.parent / "ran").exists(), kind
        if "shape" not in kind and "type" not in kind and "name" not in kind and "other" not in kind:
            with contextlib.suppress(CheckpointError):
                checkpoint.describe(path)
    live.load_checkpoint(tmp_path / "run" / "checkpoint_step_12")


@pytest.mark.usefixtures("one_rank")
def test_everything_of_a_rank_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged(descriptor: int) -> None:
        log.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", logged)
    monkeypatch.setattr(os, "rename", lambda *names: (log.append("RENAME"), rename(*names)))
    _written(str(tmp_path), 0, 1)
    path = tmp_path / "checkpoint_step_12"
    assert {file.name for file in path.iterdir()} <= set(log[: log.index("RENAME")])
    assert "rank_0.tensors" in log[: log.index(STATE)], "by its own rank: the first one may be on another machine"


@pytest.mark.usefixtures("one_rank")
def test_one_rank_that_was_sharded_becomes_two_and_a_plain_process(tmp_path: Path) -> None:
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    saved, moments = _written(str(tmp_path / "run"), 0, 1)
    (found, losses) = _read(str(tmp_path / "run"), 0, 1)
    assert found == (saved, moments, 12)
    assert losses[-1] < losses[0]
    plain = trainer_of(network(1, hidden=7))
    plain.load_latest(tmp_path / "run")
    assert (weights_of(plain.run.subject.model), _moments(plain)) == (saved, moments)
    other = trainer_of(network(1, hidden=5))
    with pytest.raises(CheckpointError, match="shape"):
        other.load_latest(tmp_path / "run")
