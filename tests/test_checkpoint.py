"""Checkpoints: exact round trips, and every kind of damage found before it does harm."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import stat
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

from cases import config, setup
from hybrid_predict_trainer.keep import checkpoint, housekeeping, manifest, state_tree
from hybrid_predict_trainer.keep.failures import Place
from hybrid_predict_trainer.records import CheckpointError, StateDict

#: hypothesis prints what it draws, and torch cannot print float4: that one has a test of its own.
DTYPES = sorted((state_tree.STORED_DTYPES | state_tree.PAIRED_DTYPES) - {torch.float4_e2m1fn_x2}, key=str)


# ---------------------------------------------------------------- helpers


def bits(tensor: Tensor) -> bytes:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)  # whatever the strides were
    return bytes(plain.flatten().view(torch.uint8).tolist())


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, dict):
        keys = [(type(k), k) for k in a] == [(type(k), k) for k in b]
        return keys and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    return bool(a == b)


def through_bytes(state: Any, path: Path) -> Any:
    """Encode, write, read and decode."""
    tree, tensors = state_tree.encode(state)
    text = json.dumps(tree, allow_nan=False)
    if not tensors:
        return state_tree.decode(json.loads(text), {})
    state_tree.write_tensors(path, tree, tensors)
    return state_tree.decode(json.loads(text), state_tree.read_tensors(path))


def small_parts(value: float = 1.0) -> dict[str, StateDict]:
    return {
        "model": {"weight": torch.full((2, 2), value), "bias": torch.zeros(2)},
        "trainer": {"value": value, "seen": (1, 2)},
    }


def value_of(path: Path) -> float:
    loaded = checkpoint.load(path)
    value = loaded.parts["trainer"]["value"]
    assert bool((loaded.parts["model"]["weight"] == value).all()), "parts of different saves"
    assert isinstance(value, float)
    return value


def reseal(path: Path, *, rehash: bool = True, **changes: Any) -> None:
    """Forge a manifest that fits the files as they are, with some fields changed."""
    fields = json.loads((path / "MANIFEST.json").read_text())
    del fields["sha256"]
    if rehash:
        fields["files"] = {
            file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            for file in path.iterdir()
            if file.name != "MANIFEST.json"
        }
    fields.update(changes)
    dump = json.dumps(fields, indent=1, sort_keys=True) + "\n"
    fields["sha256"] = hashlib.sha256(dump.encode()).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")


def leftovers(directory: Path) -> list[str]:
    return [p.name for p in directory.iterdir() if p.name.startswith(".tmp") or p.name.endswith(".old")]


def names(directory: Path) -> list[str]:
    return [path.name.removeprefix("checkpoint_step_") for path in housekeeping.checkpoints(directory)]


# ---------------------------------------------------------------- state trees


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    num_bytes = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    raw = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
    if dtype is torch.bool:
        raw = bytes(byte % 2 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype) if raw else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    kind = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded"]))
    if tensor.ndim and kind == "transposed":
        return tensor.transpose(0, -1)
    if tensor.ndim and kind == "sliced":
        return tensor[::2]
    return tensor.expand(2, *shape) if kind == "expanded" else tensor


@st.composite
def states(draw: st.DrawFn) -> StateDict:
    pool = draw(st.lists(tensors(), min_size=1, max_size=3))
    views = [view for t in pool for view in (t, t.detach(), t[:1] if t.ndim else t)]
    leaves = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.integers(min_value=2**52)
        | st.floats()
        | st.text(st.characters())
        | st.text("\ud83d\ude00$a", max_size=3)
        | st.sampled_from(views)
    )
    keys: st.SearchStrategy[Any] = (
        st.text(max_size=4) | st.integers() | st.sampled_from(["a", "a.b", "b", "$tuple", "1", "__metadata__"])
    )
    inner = st.recursive(
        leaves,
        lambda node: (
            st.lists(node, max_size=4) | st.lists(node, max_size=4).map(tuple) | st.dictionaries(keys, node, max_size=4)
        ),
        max_leaves=20,
    )
    return draw(st.dictionaries(keys, inner, max_size=5))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(state=states())
def test_round_trip_is_exact(state: StateDict, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    assert same(through_bytes(state, path), state)


def test_round_trip_of_the_hard_cases(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    state = {
        "python_rng": random.Random(1).getstate(),
        "torch_rng": torch.get_rng_state(),
        "floats": [float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 0.1],
        "nan_payload": struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0],
        "huge": -(10**5000),
        "surrogates": ["\ud83d" + "\ude00", {"\ud83d": 1}],  # two characters, not one emoji
        "__metadata__": torch.ones(1),
        "keys": {0: "int", "0": "str", -1: {}, "$tensor": "no tag"},
        "meets": {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)},
        "overlapping": [base[:4], base[2:], base.view(2, 3), base.view(2, 3).t()],
        "zero_dim": torch.tensor(3),
        "counters": [Counter({"a": 1, 2: 0}), Counter()],
        "empty": [torch.empty(0), torch.empty(0, 3, dtype=torch.int64)],
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex128).conj(),
    }
    assert same(through_bytes(state, tmp_path / "x"), state)


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    _, stored = state_tree.encode({"a": base, "b": [base.detach()], "c": base[1:]})
    assert sorted(stored) == ["a", "c"]
    state = through_bytes({"a": base, "b": [base.detach()], "c": base[1:]}, tmp_path / "x")
    state["a"].add_(1)
    assert state["b"][0] is state["a"]
    assert torch.equal(state["c"], base[1:])


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    state = through_bytes({"a": torch.ones(4096)}, path)
    path.write_bytes(bytes(path.stat().st_size))
    assert bool((state["a"] == 1).all())


def test_parameters_and_ordered_dicts_become_plain() -> None:
    tree, stored = state_tree.encode(OrderedDict(weight=nn.Parameter(torch.ones(2))))
    state = state_tree.decode(tree, stored)
    assert type(state) is dict
    assert type(state["weight"]) is Tensor
    assert not state["weight"].requires_grad


@pytest.mark.parametrize("name", ["MultiStepLR", "OneCycleLR", "SequentialLR", "ReduceLROnPlateau"])
def test_scheduler_states_round_trip(name: str, tmp_path: Path) -> None:
    make: dict[str, Any] = {
        "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 3, 3]),
        "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=9),
        "SequentialLR": lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
        ),
        "ReduceLROnPlateau": lr_scheduler.ReduceLROnPlateau,
    }
    state = make[name](torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)).state_dict()
    assert same(through_bytes(state, tmp_path / "x"), state)


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (object(), "object"),
        (np.array([object()]), "numpy.ndarray"),
        (np.zeros(2, dtype=[("a", "f4")]), "numpy.ndarray"),
        (Path("x"), "pathlib"),
        (Colour, "EnumType"),
        (len, "builtin_function"),
        (defaultdict(lambda: 1), "defaultdict of"),
        ({Colour.RED: 1}, "key <Colour.RED"),
        ({frozenset(): 1}, "key frozenset"),
        (Colour.RED, r"str\(value\)"),
        (torch.ones(2, device="meta"), "device meta"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, dtype=torch.bits8), "bits8"),
        (nn.Linear(1, 1), "Linear"),
    ],
)
def test_what_is_not_plain_data_is_refused_by_its_place(value: object, words: str) -> None:
    with pytest.raises(TypeError, match=rf"^state\['outer'\]\[1\]\[7\] .*{words}"):
        state_tree.encode({"outer": [0, {7: value}]})


@pytest.mark.parametrize(
    "value",
    [
        *({1, 2}, {"b", "a"}, set(), frozenset({(1, 2)}), b"raw", 1 - 2j, complex("nan"), range(3, 9, 2)),
        *(np.float32(1 / 3), np.float64("nan"), np.int8(-3), np.bool_(True), np.complex64(1j)),
        np.datetime64("2026-01-01"),
        *(np.arange(6, dtype=">i2").reshape(2, 3), np.zeros((0, 3)), np.array(2.5), np.asfortranarray(np.eye(3)[:2])),
        *(np.array(["a", "bc"]), np.dtype("float32"), np.dtype("<U3")),
        *(torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.channels_last, torch.strided),
        *(torch.Size([1, 2]), torch.device("cpu"), torch.device("cuda", 1)),
        *(float, dict, np.float32, deque([1, [2]], maxlen=3), deque()),
        *({True: 1}, {1.5: 1}, {None: 1}, {(1, "a"): 1}, {b"k": 1}),
        *(defaultdict(dict, {"a": {}}), defaultdict(None, {1: 2})),
        state_tree.Mark("object", ["a:B", {"t": torch.ones(2)}]),
    ],
    ids=lambda value: repr(sorted(value)) if isinstance(value, set) else repr(value),
)  # fmt: skip
def test_plain_values_come_back_exactly(value: Any, tmp_path: Path) -> None:
    found = through_bytes({"outer": [0, {7: value}]}, tmp_path / "x")["outer"][1][7]
    assert type(found) is type(value)
    if isinstance(value, np.ndarray):
        assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())
    elif isinstance(value, state_tree.Mark):
        assert (found.kind, found.body[0]) == ("object", "a:B")
        assert torch.equal(found.body[1]["t"], torch.ones(2))
    elif isinstance(value, deque | defaultdict):
        assert (found, getattr(found, "maxlen", 0)) == (value, getattr(value, "maxlen", 0))
        assert getattr(found, "default_factory", 0) is getattr(value, "default_factory", 0)
    elif isinstance(value, set | frozenset):  # its order hangs on what was put in first
        assert found == value
    else:
        assert repr(found) == repr(value)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float4_e2m1fn_x2, torch.complex128, torch.uint16])
def test_types_that_are_stored_and_hardly_computed_with(dtype: torch.dtype, tmp_path: Path) -> None:
    if dtype not in state_tree.STORED_DTYPES | state_tree.PAIRED_DTYPES:
        with pytest.raises(TypeError, match=r"state\['t'\] is a tensor of type .* a newer one can"):
            through_bytes({"t": torch.zeros(8, dtype=torch.uint8).view(dtype)}, tmp_path / "x")
        return
    raw = torch.arange(6 * dtype.itemsize, dtype=torch.uint8)
    tensor = raw.view(dtype).reshape(2, 3)
    found = through_bytes({"t": tensor}, tmp_path / "x")["t"]
    assert (found.dtype, found.shape) == (dtype, (2, 3))
    assert bits(found) == bytes(raw.tolist())


def test_a_safetensors_of_old_stores_complex_numbers_in_pairs_and_names_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks = frozenset({torch.complex64, torch.uint16})
    monkeypatch.setattr(state_tree, "STORED_DTYPES", state_tree.STORED_DTYPES - lacks)
    monkeypatch.setattr(state_tree, "PAIRED_DTYPES", frozenset({torch.complex64, torch.complex128}))
    value = torch.randn(2, 3, dtype=torch.complex64)
    found = through_bytes({"t": value}, tmp_path / "x")["t"]
    assert found.dtype is torch.complex64
    assert torch.equal(found, value)
    stored = state_tree.read_tensors(tmp_path / "x")
    assert [t.dtype for t in stored.values()] == [torch.float32]
    with pytest.raises(TypeError, match=r"is a tensor of type torch.uint16, which a checkpoint cannot hold with"):
        state_tree.encode({"t": torch.zeros(2, dtype=torch.uint16)})


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "permuted", "column of one"])
def test_dense_tensors_keep_their_memory_order(layout: str, tmp_path: Path) -> None:
    tensor = {
        "transposed": torch.randn(3, 4).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "permuted": torch.randn(2, 3, 4).permute(1, 2, 0),
        "column of one": torch.randn(1, 3, 1, 2).permute(1, 0, 3, 2),
    }[layout]
    found = through_bytes({"a": tensor, "tied": tensor, "part": tensor[:1]}, tmp_path / "x")
    assert found["a"].stride() == tensor.stride()
    assert torch.equal(found["a"], tensor)
    assert found["tied"] is found["a"]
    assert torch.equal(found["part"], tensor[:1])


def test_a_container_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="holds itself"):
        state_tree.encode({"loop": loop})
    deep = "x"
    for _ in range(state_tree.MAX_DEPTH + 1):
        deep = [deep]  # type: ignore[assignment]
    with pytest.raises(ValueError, match="too deep"):
        state_tree.decode(deep, {})


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": "absent"},
        {"$tensor": ["x"]},
        {"$tensor": "x", "more": 1},
        {"$eval": "1"},
        {"$int": 5},
        {"$int": "nonsense"},
        {"$float": "00"},
        {"$str": "zz"},
        {"$items": [[[1], 2]]},
        {"$items": [1]},
        {"$items": [[{"$tensor": "x"}, 1]]},
        {"$tuple": 3},
        {"$complex": "x"},
        {"$equal": ["absent", "y"]},
        {"$equal": ["x", "x"]},
        {"$equal": []},
        {"$equal": 3},
        [{"$tensor": "x"}, *({"$equal": ["x", f"y{i}"]} for i in range(17))],
        {"$strided": [{"$tensor": "x"}, [1, 1]]},
        {"$strided": [{"$tensor": "x"}, [3]]},
        {"$strided": [{"$tensor": "x"}, [-1, 3]]},
        {"$array": [{"$tensor": "x"}, "O", [9]]},
        {"$array": [{"$tensor": "x"}, "<f4", [10]]},
        {"$numpy": ["O", "00"]},
        {"$numpy": ["<f4", "0000"]},
        {"$numpy_dtype": "f4,f4"},
        {"$dtype": "load"},
        {"$type": "os.system"},
        {"$range": [0, 1, 0]},
        {"$set": [[1]]},
        {"$deque": [[1], "x"]},
        {"$defaultdict": ["print", []]},
        {"$mark": [1, 2]},
        {"nothing": "uses x"},
    ],
)
def test_malformed_trees_raise_value_error(tree: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        state_tree.decode(tree, {"x": torch.ones(3, 3)})


# ---------------------------------------------------------------- save and load


def test_save_and_load_give_everything_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    parts = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "predictor": {"moments": {"m": torch.ones(2, dtype=torch.bfloat16)}},
        "trainer": {"rng": random.Random(0).getstate(), "counts": {3: 4}},
    }
    summary = {"loss": float("nan"), "phase": "predict", "phase_step": 32, "confidence": 0.92}
    config = "# ü\r\n[training]\nwarmup_steps = 3\n"
    path = checkpoint.save(
        tmp_path / "run",
        7,
        parts,
        config_toml=config,
        summary=summary,
        texts={"metrics_history.jsonl": "{}\n"},
    )
    assert path == tmp_path / "run" / "checkpoint_step_7"
    assert sorted(p.name for p in path.iterdir()) == [
        "MANIFEST.json",
        "config.toml",
        "metrics_history.jsonl",
        "model_weights.safetensors",
        "optimizer_state.safetensors",
        "predictor_state.safetensors",
        "training_state.json",
    ]
    loaded = checkpoint.load(path)
    expected = {**parts, "model": dict(parts["model"])}
    assert same(loaded.parts, expected)
    assert loaded.config_toml == config
    assert (loaded.step, loaded.path) == (7, path)
    assert loaded.summary == {**summary, "loss": None, "step": 7}
    assert (path.parent / "latest").read_text() == "checkpoint_step_7\n"
    assert housekeeping.latest(path.parent) == path
    document = json.loads((path / "training_state.json").read_text())
    assert {k: document[k] for k in ("step", "phase", "phase_step")} == {
        "step": 7,
        "phase": "predict",
        "phase_step": 32,
    }


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_the_model_part_is_a_plain_weights_file(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    path = checkpoint.save(tmp_path, 0, {"model": model.state_dict()})
    file = path / "model_weights.safetensors"
    assert sorted(safetensors.torch.load_file(file)) == ["embed.weight"]
    with safetensors.safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    safetensors.torch.load_model(other, file)
    assert torch.equal(other.head.weight, model.head.weight)
    third = Tied()
    third.load_state_dict(checkpoint.load(path).parts["model"])
    assert torch.equal(third.head.weight, model.head.weight)


def test_describe_sums_up_as_json(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 3, small_parts(), summary={"loss": 0.5, "phase": "full"})
    told = json.loads(json.dumps(checkpoint.describe(path)))
    assert (told["step"], told["loss"], told["phase"], told["verified"]) == (3, 0.5, "full", True)
    assert told["num_parameters"] == 6
    assert told["torch_version"] == torch.__version__
    assert told["part_bytes"] == {"model": (path / "model_weights.safetensors").stat().st_size}
    (path / "config.toml").write_text("x")
    with pytest.raises(CheckpointError, match=r"config\.toml"):
        checkpoint.describe(path)


def test_describe_tells_of_a_run_that_was_withdrawn(tmp_path: Path) -> None:
    made = setup()
    trainer = made.trainer(config())
    trainer.run.safety.guard.num_alarms = 1
    trainer.run.safety.guard.withdraw()
    with pytest.warns(UserWarning, match="no room"):
        trainer.run.failures.note(Place.GATE, MemoryError("no room"))
    told = checkpoint.describe(trainer.save_checkpoint(tmp_path))
    assert (told["withdrawn"], told["num_guard_alarms"], told["num_guard_restores"], told["num_failures"]) == (
        True, 1, 0, 1,
    )  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="no umask")
def test_all_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = checkpoint.save(tmp_path, 0, small_parts())
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


@pytest.mark.parametrize(
    ("step", "options", "words"),
    [
        (-1, {}, "step must be"),
        (True, {}, "step must be"),
        (0, {"keep_last_n": 0}, "keep_last_n"),
        (0, {"texts": {"../x": ""}}, "cannot be the name"),
        (0, {"texts": {"Config.TOML": ""}}, "cannot be the name"),
        (0, {"texts": {"x.safetensors": ""}}, "cannot be the name"),
        (0, {"summary": {"trees": 1}}, "summary"),
        (0, {"summary": {"step": 5}}, "summary"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, step: int, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        checkpoint.save(tmp_path / "run", step, small_parts(), **options)
    with pytest.raises(ValueError, match="part names"):
        checkpoint.save(tmp_path / "run", 0, {"../model": {}})
    with pytest.raises(TypeError, match="object"):
        checkpoint.save(tmp_path / "run", 0, {"model": {"x": object()}})
    assert not (tmp_path / "run").exists()


def test_check_compatible_lists_the_differences() -> None:
    live = nn.Linear(2, 3).state_dict()
    checkpoint.check_compatible(live, live)
    checkpoint.check_compatible({"weight": checkpoint.TensorSpec("float32", (3, 2))}, {"weight": torch.ones(3, 2)})
    saved = {"weight": torch.ones(3, 9), **{f"extra{i}": torch.ones(1) for i in range(7)}}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_compatible(saved, live)
    message = str(caught.value)
    assert "missing in the checkpoint: bias;" in message
    assert "extra4 and 2 more" in message
    assert "extra5" not in message
    assert "weight (saved float32 [3, 9], model float32 [3, 2])" in message
    with pytest.raises(CheckpointError, match="bfloat16"):
        checkpoint.check_compatible({"w": torch.ones(1, dtype=torch.bfloat16)}, {"w": torch.ones(1)})


# ---------------------------------------------------------------- damage


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "run", 5, small_parts(), config_toml="a = 1\n")


def damaged(path: Path, words: str = ".") -> None:
    with pytest.raises(CheckpointError, match=words):
        checkpoint.verify(path)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(path)


def each_file(path: Path) -> Iterator[tuple[Path, bytes]]:
    for file in sorted(path.iterdir()):
        raw = file.read_bytes()
        yield file, raw
        file.write_bytes(raw)
    checkpoint.verify(path)  # all is put back


def test_every_truncation_is_found(small: Path) -> None:
    for file, raw in each_file(small):
        for length in range(len(raw)):
            file.write_bytes(raw[:length])
            with pytest.raises(CheckpointError):
                checkpoint.verify(small, hashes=False)


def test_every_flipped_byte_is_found(small: Path) -> None:
    for file, raw in each_file(small):
        for i in range(len(raw)):
            flipped = bytearray(raw)
            flipped[i] ^= 1 << (i % 8)
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError):
                checkpoint.verify(small)


def test_zero_filled_missing_and_extra_files_are_found(small: Path) -> None:
    for file, raw in each_file(small):
        file.write_bytes(bytes(len(raw)))
        damaged(small, "MANIFEST" if file.name == "MANIFEST.json" else "SHA-256")
        file.unlink()
        damaged(small, "has no MANIFEST" if file.name == "MANIFEST.json" else f"incomplete: {file.name}")
    (small / "extra").mkdir()
    damaged(small, "holds extra")


def test_a_missing_path_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint directory at"):
        checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "checkpoint_step_3.old").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint_step_3\.old"):
        checkpoint.load(tmp_path / "checkpoint_step_3")
    with pytest.raises(CheckpointError, match="no intact checkpoint in"):
        housekeeping.latest(tmp_path / "nowhere")


def test_a_newer_format_is_refused_with_advice(small: Path) -> None:
    reseal(small, format_version=manifest.FORMAT_VERSION + 1)
    damaged(small, rf"format {manifest.FORMAT_VERSION + 1}, newer than {manifest.FORMAT_VERSION}; upgrade")
    reseal(small, format_version=manifest.OLDEST_VERSION - 1)
    damaged(small, rf"older than {manifest.OLDEST_VERSION}; load it with the version that wrote it")
    for version in ("1", None, True):
        reseal(small, format_version=version)
        damaged(small, "MANIFEST")


def test_a_renamed_step_is_refused_but_any_other_name_loads(small: Path) -> None:
    other = small.rename(small.with_name("best"))
    assert checkpoint.load(other).step == 5
    damaged(other.rename(small.with_name("checkpoint_step_6")), "holds step 5")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b", "..", ".", "", "MANIFEST.json", "a\\b"])
def test_manifest_names_cannot_leave_the_directory(small: Path, name: str) -> None:
    outside = small.parent / "outside"
    outside.write_text("secret")
    record = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    fields = json.loads((small / "MANIFEST.json").read_text())
    reseal(small, rehash=False, files={**fields["files"], name: record})
    damaged(small, "not the name of a plain file")


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {}},
        {"files": []},
        {"files": {"config.toml": {}}},
        {"tensors": {"absent": {}}},
        {"tensors": 3},
        {"step": "5"},
    ],
)
def test_malformed_manifests_are_refused(small: Path, changes: dict[str, Any]) -> None:
    reseal(small, **changes)
    damaged(small, "MANIFEST")


def test_links_are_refused_and_never_followed(small: Path) -> None:
    file = small / "config.toml"
    target = small.parent / "abc"
    file.rename(target)
    file.symlink_to("../abc")
    assert file.lstat().st_size == target.stat().st_size, "neither size nor hash may give it away"
    damaged(small, "link")
    file.unlink()
    target.rename(file)
    link = small.with_name("checkpoint_step_9")
    link.symlink_to(small)
    damaged(link, "symbolic link")
    assert housekeeping.latest(small.parent) == small


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.marker}",))


def test_pickles_are_never_run(small: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = pickle.dumps(Payload(marker))
    pickle.loads(evil)
    assert marker.exists(), "the payload is harmless, the test proves nothing"
    marker.unlink()
    torch.save({"x": Payload(marker)}, tmp_path / "evil.pt")
    for raw in (evil, (tmp_path / "evil.pt").read_bytes()):
        for name in ("model_weights.safetensors", "training_state.json", "MANIFEST.json"):
            before = {file: file.read_bytes() for file in small.iterdir()}
            (small / name).write_bytes(raw)
            if name != "MANIFEST.json":
                reseal(small)
            with pytest.raises(CheckpointError):
                checkpoint.load(small)
            for file, content in before.items():
                file.write_bytes(content)
    assert not marker.exists()


def test_header_bombs_are_refused(small: Path) -> None:
    weights = small / "model_weights.safetensors"
    huge = {"weight": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}}
    header = json.dumps(huge).encode()
    for raw in (struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", len(header)) + header):
        weights.write_bytes(raw)
        reseal(small)
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load(small)


def test_parser_bombs_are_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = small / "training_state.json"
    for text in ("[" * 100_000, "1" * 10_000, "[]", '{"trees": 1}', '{"trees": {"model": {"$x": 1}}}'):
        state.write_text(text)
        reseal(small)
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load(small)
    monkeypatch.setattr(manifest, "MAX_STATE_BYTES", 10)
    damaged(small, "larger than 10")
    with (small / "MANIFEST.json").open("wb") as file:
        file.truncate(manifest.MAX_MANIFEST_BYTES + 1)
    damaged(small, "at most")


# ---------------------------------------------------------------- several checkpoints


def test_latest_falls_back_and_an_explicit_load_does_not(tmp_path: Path) -> None:
    first, second, third = (checkpoint.save(tmp_path, step, small_parts(step)) for step in (9, 10, 11))
    (third / "config.toml").write_text("x")
    (second / "MANIFEST.json").unlink()
    with pytest.warns(UserWarning, match="skipping a checkpoint"):
        assert housekeeping.latest(tmp_path) == first
    assert third.exists()
    with pytest.raises(CheckpointError, match="checkpoint_step_11"):
        checkpoint.load(third)
    with pytest.warns(UserWarning, match="skipping"):
        assert housekeeping.latest(tmp_path, quarantine=True) == first
    assert names(tmp_path) == ["9"]
    assert third.with_name("checkpoint_step_11.corrupt").is_dir()
    assert housekeeping.latest(tmp_path) == first  # and no warning any more


def test_rotation_keeps_n_intact_and_touches_nothing_else(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    run = tmp_path / "run"
    checkpoint.save(outside, 1, small_parts())
    for step in (2, 3, 4, 5):
        checkpoint.save(run, step, small_parts())
    (run / "checkpoint_step_1").symlink_to(outside / "checkpoint_step_1")
    (run / "checkpoint_step_0").mkdir()
    (run / "checkpoint_step_0" / "precious").write_text("x")
    (run / "checkpoint_step_01").mkdir()
    (run / "checkpoint_step_3" / "note").write_text("not ours: this one is not deleted")
    (run / "checkpoint_step_5" / "config.toml").write_text("damaged: does not count")
    checkpoint.save(run, 6, small_parts(), keep_last_n=2)
    assert names(run) == ["0", "3", "4", "5", "6"]
    assert (run / "checkpoint_step_01").exists()
    assert checkpoint.verify(run / "checkpoint_step_1" / ".." / "checkpoint_step_1").step == 1
    checkpoint.save(run, 1000, small_parts(), keep_last_n=1)
    assert names(run) == ["0", "3", "5", "1000"]
    checkpoint.save(run, 7, small_parts(), keep_last_n=1)
    assert "7" in names(run), "the one just written is never rotated away"


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, small_parts(1.0))
    inode = (path / "config.toml").stat().st_ino
    with (path / "config.toml").open() as held:  # keeps the inode taken
        checkpoint.save(tmp_path, 1, small_parts(2.0))
        assert (path / "config.toml").stat().st_ino != inode, "rewritten in place"
        held.read()
    assert value_of(path) == 2.0
    (path / "MANIFEST.json").unlink()
    checkpoint.save(tmp_path, 1, small_parts(3.0))
    assert value_of(path) == 3.0
    assert path.with_name("checkpoint_step_1.corrupt").exists(), "what does not verify is kept aside"
    assert leftovers(tmp_path) == []


def test_stale_temporary_directories_are_swept(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    prefix, host, mine = ".tmp-checkpoint_step_4-", housekeeping._host(), housekeeping._PROCESS
    stays = {
        f"{prefix}{child.pid}-{host}{'0' * 16}": False,
        f"{prefix}{os.getppid()}-{host}{'0' * 16}": True,
        f"{prefix}{os.getpid()}-{host}{mine}{'0' * 8}": True,  # another thread, say
        f"{prefix}{os.getpid()}-{host}{'0' * 16}": False,  # pid 1 of the last run
        f"{prefix}{child.pid}-{'f' * 6}{'0' * 16}": True,  # another host
        f"{prefix}{child.pid}-{'f' * 6}{'1' * 16}": False,  # another host, long ago
        ".tmp-something": True,
    }
    for name in stays:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    os.utime(tmp_path / f"{prefix}{child.pid}-{'f' * 6}{'1' * 16}", (0, 0))
    checkpoint.save(tmp_path, 4, small_parts())
    assert {name: (tmp_path / name).exists() for name in stays} == stays


# ---------------------------------------------------------------- faults while saving


def test_disk_full_leaves_nothing_behind(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, small_parts())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot save checkpoint .*checkpoint_step_2: .*(?i:file too large)"):
            checkpoint.save(tmp_path, 2, {"model": {"w": torch.ones(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_step_1", "latest"]
    checkpoint.verify(tmp_path / "checkpoint_step_1")


@pytest.mark.parametrize("function", ["fsync", "rename", "mkdir", "chmod"])
@pytest.mark.parametrize("again", [True, False])
def test_an_error_at_any_call_keeps_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notices: list[str], function: str, again: bool
) -> None:
    real = getattr(os, function)
    checkpoint.save(tmp_path, 1, small_parts(1.0))
    failed_saves = 0
    for fail_at in range(100):
        calls = 0

        def failing(*args: Any, fail_at: int = fail_at, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fail_at + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        step, value = (1 if again else 2 + fail_at), 2.0 + fail_at
        before = value_of(housekeeping.latest(tmp_path))
        monkeypatch.setattr(os, function, failing)
        try:
            checkpoint.save(tmp_path, step, small_parts(value))
        except CheckpointError as error:
            assert "No space left" in str(error)  # noqa: PT017
            failed_saves += 1
            assert value_of(housekeeping.latest(tmp_path)) in (before, value)
            assert function == "fsync" or leftovers(tmp_path) == [], "the old one is not back in place"
        else:
            assert value_of(housekeeping.latest(tmp_path)) == value
        assert all("is saved, but tidying up failed" in line for line in notices)
        notices.clear()
        monkeypatch.setattr(os, function, real)
        assert not [name for name in leftovers(tmp_path) if name.startswith(".tmp")]
        if calls <= fail_at:
            break
    else:
        pytest.fail("never got through")
    assert failed_saves
    checkpoint.save(tmp_path, 1, small_parts())
    assert leftovers(tmp_path) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 1, small_parts())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        log.append("tmp/" if path.name.startswith(".tmp") and path.is_dir() else path.name)
        fsync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        log.append("RENAME")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    path = checkpoint.save(tmp_path, 1, small_parts())
    at = log.index("RENAME")
    assert set(log[: at - 2]) == {file.name for file in path.iterdir()} - {"MANIFEST.json"}
    assert log[at - 2 : at + 2] == ["MANIFEST.json", "tmp/", "RENAME", tmp_path.name]


# One process that forks: importing torch anew for every kill would take minutes.
KILLER = """
import os, shutil, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import checkpoint, housekeeping, leftovers, small_parts, value_of

CALLS = ("mkdir", "chmod", "fsync", "rename", "replace", "unlink", "rmdir")

def armed(name, real, left):
    def call(*args, **options):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return real(*args, **options)
    return call

def scenario(root, steps, new_step, keep):
    for step in steps:
        checkpoint.save(root / "template", step, small_parts(float(step)))
    for kill_at in range(200):
        run = root / f"run{kill_at}"
        shutil.copytree(root / "template", run)
        pid = os.fork()
        if pid == 0:
            left = [kill_at]
            for name in CALLS:
                setattr(os, name, armed(name, getattr(os, name), left))
            checkpoint.save(run, new_step, small_parts(100.0), keep_last_n=keep)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        value = value_of(housekeeping.latest(run))
        assert value in (float(steps[-1]), 100.0), (kill_at, value)
        for path in housekeeping.checkpoints(run):
            checkpoint.verify(path)
        if status == 0:
            assert value == 100.0
            return kill_at
        assert os.WIFSIGNALED(status), status
        before = {path.name.removesuffix(".old") for path in housekeeping.checkpoints(run)}
        checkpoint.save(run, 50, small_parts(50.0))
        assert before < {path.name for path in housekeeping.checkpoints(run)}, kill_at
        assert leftovers(run) == [], (kill_at, leftovers(run))
        assert value_of(housekeeping.latest(run)) == 50.0
        shutil.rmtree(run)

root = Path(sys.argv[1])
print(scenario(root / "rotating", [1, 2], 3, 2), scenario(root / "again", [1], 1, None))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_every_call_of_a_save_leaves_good_checkpoints(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLER, str(tmp_path), str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rotating, again = map(int, done.stdout.split())
    assert min(rotating, again) > 15, "the kills did not hit the save"
