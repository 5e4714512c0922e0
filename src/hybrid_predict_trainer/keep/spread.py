"""A checkpoint that ranks have written together, as one: what its files are called, and which tensors are in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open

from .state_tree import Json, TensorSpec

#: Types in a safetensors header -> names in torch.
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def name_of(rank: int) -> str:
    """Name of a rank's tree."""
    return f"rank{rank}"


def file_of(rank: int) -> str:
    """Name of the file with a rank's own tensors; not that of a file for ``torch.distributed.checkpoint``."""
    return f"rank_{rank}.tensors"


def tensors_of(path: Path, trees: Mapping[str, Json]) -> dict[str, dict[str, TensorSpec]]:
    """Part -> name -> type and shape, of all ranks together; nothing for a checkpoint of one process.

    What is spread counts once and whole, as it was in the run; what every rank has of its own counts for each.

    Args:
        path: Of a checkpoint that verifies.
        trees: From its ``training_state.json``.

    Raises:
        OSError, SafetensorError, ValueError, KeyError, TypeError: it is not what was written.
    """
    found: dict[str, dict[str, TensorSpec]] = {}
    rank = 0
    while name_of(rank) in trees:
        file = path / file_of(rank)
        if file.exists():
            with safe_open(file, framework="pt") as own:
                for full in own.keys():  # noqa: SIM118 (it is no dict)
                    part, _, name = full.partition(".")
                    tensor = own.get_slice(full)
                    kind = tensor.get_dtype()
                    spec = TensorSpec(DTYPES.get(kind, kind.lower()), tuple(tensor.get_shape()))
                    found.setdefault(part, {})[name if rank == 0 else f"{name} of {name_of(rank)}"] = spec
        rank += 1
    for full, shape, dtype in _spread(trees.get(name_of(0))):
        part, _, name = full.partition(".")
        found.setdefault(part, {})[name] = TensorSpec(dtype, tuple(map(int, shape)))
    return found


def _spread(tree: Json) -> Iterator[tuple[str, list[int], str]]:
    """Name, shape and type of everything that a rank's tree says is in the files for all ranks."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            mark = node.get("$mark")
            if isinstance(mark, list) and mark[0] == "spread":
                name, shape, dtype = mark[1]
                yield name, shape, dtype
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)
