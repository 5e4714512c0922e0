"""Numbers in float64 that take fewer bytes on the disk come back to the last bit, and no file asks for all memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_predict_trainer.keep import checkpoint, narrowed
from hybrid_predict_trainer.keep.merged import merged
from hybrid_predict_trainer.keep.state_tree import decode, encode

generator = torch.Generator().manual_seed(0)
DOUBLE = torch.randn(2000, dtype=torch.float64, generator=generator)
SINGLE = DOUBLE.float().double()
ODD = torch.tensor(
    [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-310, 1e300, 2.0**-149, 1 + 2.0**-52], dtype=torch.float64
)
PAYLOAD = torch.tensor([0x7FF8000000000001, -1], dtype=torch.int64).view(torch.float64)  # two NaNs that are not torch's
HALF = torch.where(torch.arange(2000) % 2 == 0, SINGLE, DOUBLE)

#: Tensor -> most bytes, as a share.
TABLE: dict[str, tuple[Tensor, float]] = {
    "of float32": (SINGLE, 0.54),
    "half of float32": (HALF, 0.79),
    "of float64": (DOUBLE, 1.0),
    "few": (torch.cat([DOUBLE[:400], torch.zeros(1601, dtype=torch.float64)]), 0.25),
    "odd ones": (torch.cat([ODD, PAYLOAD, SINGLE]), 0.55),
    "a table": (torch.block_diag(DOUBLE.view(40, 50), torch.zeros(40, 50, dtype=torch.float64)), 0.3),
    "turned": (HALF.view(40, 50).T, 0.79),
    "zeros": (torch.zeros(2000, dtype=torch.float64), 1.0),
    "small": (SINGLE[:100], 1.0),
    "float32": (SINGLE.float(), 1.0),
}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", TABLE)
def test_what_is_read_is_what_was_written(name: str, tmp_path: Path) -> None:
    tensor, share = TABLE[name]
    path = checkpoint.save(tmp_path, 1, {"trainer": {"x": [tensor], "n": 1}})
    found = checkpoint.load(path).parts["trainer"]["x"][0]
    assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert torch.equal(bits(found), bits(tensor))
    stored = (path / "trainer_state.safetensors").stat().st_size - 600  # of the header
    assert stored <= share * tensor.nbytes


def test_equal_ones_and_ties_stay_what_they_are(tmp_path: Path) -> None:
    state = {"a": SINGLE, "tied": SINGLE, "equal": SINGLE.clone()}
    path = checkpoint.save(tmp_path, 1, {"trainer": state})
    assert (path / "trainer_state.safetensors").stat().st_size < 0.6 * SINGLE.nbytes + 600
    found = checkpoint.load(path).parts["trainer"]
    assert found["a"] is found["tied"]
    assert found["equal"] is not found["a"]
    assert all(torch.equal(value, SINGLE) for value in found.values())


def test_weights_and_states_of_optimizers_are_plain_files(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"model": {"w": SINGLE}, "optimizer": {"m": SINGLE}})
    for file in ("model_weights", "optimizer_state"):
        assert (path / f"{file}.safetensors").stat().st_size > SINGLE.nbytes


def test_names_that_are_taken_are_left_alone() -> None:
    state = {"x": SINGLE, "x#kinds": torch.ones(1), "y": SINGLE * 2}
    tree, tensors = narrowed.narrowed(*encode(state))
    assert {"x", "x#kinds", "y#kinds", "y#float32"} <= tensors.keys()
    found = decode(tree, tensors)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_copies_of_what_was_narrowed_can_be_read_again() -> None:
    """However many equal ones there are, what is written can be read."""
    few = torch.cat([DOUBLE[:150], torch.zeros(1850, dtype=torch.float64)])
    state = {f"x{i}": few.clone() for i in range(15)}
    tree, tensors = narrowed.narrowed(*merged(*encode(state)))
    assert all(torch.equal(value, few) for value in decode(tree, tensors).values())


def spoilt(how: str) -> tuple[Any, dict[str, Tensor]]:
    tree, tensors = narrowed.narrowed(*encode({"x": HALF}))
    match how:
        case "huge":
            tree["$narrow"][1]["x"] = [10**12]
        case "negative":
            tree["$narrow"][1]["x"] = [-2000]
        case "no shape":
            tree["$narrow"][1]["x"] = "2000"
        case "another shape":
            tree["$narrow"][1]["x"] = [1000]
        case "other types":
            tensors["x#float32"] = tensors["x#float32"].double()
        case "too few":
            tensors["x#float64"] = tensors["x#float64"][:-1]
        case "missing":
            del tensors["x#kinds"]
        case "twice":
            tensors["x"] = HALF
        case "no pair":
            tree["$narrow"] = [1]
        case "within":
            tree = {"a": tree}
    return tree, tensors


@pytest.mark.parametrize(
    "how",
    [
        "huge",
        "negative",
        "no shape",
        "another shape",
        "other types",
        "too few",
        "missing",
        "twice",
        "no pair",
        "within",
    ],
)
def test_hostile_files_are_refused(how: str) -> None:
    with pytest.raises(ValueError, match=r"malformed state tree|not mention"):
        decode(*spoilt(how))
