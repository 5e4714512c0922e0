"""Checkpoints of weights that are spread over ranks: every rank writes its own part, and any number of ranks reads.

::

    checkpoint_step_10000/
        shard-0000N-model-...safetensors  weights and optimizer state of rank N - 1, by ``torch.distributed.checkpoint``
        rank_N.tensors                    what rank N remembers besides (a safetensors file)
        training_state.json, config.toml, MANIFEST.json as ever; the trees are those of ``rank0``, ``rank1``, ...

It is committed as every checkpoint is: built aside, hashed, renamed by the first rank once all have written.  No pickle
is involved: weights go through the storage of ``torch.distributed.checkpoint`` that writes safetensors.

On as many ranks as wrote it a resume is exact.  On another number, and in one process without ``fully_shard``, weights,
optimizer, schedule and counts are taken; what else is remembered is made of parts of another size, and begins anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..distributed.collective import OtherRankFailed
from ..records import CheckpointError, StateDict
from ..recovery import CheckpointFailed
from ..weights.parameters import named_parameters
from ..weights.shards import is_sharded, like_shard, local, local_rows
from . import checkpoint
from .manifest import CONFIG, MALFORMED, read_document, refusal, unchanged, unreadable, verify
from .spread import file_of, name_of
from .state_tree import Mark, decode, encode, write_tensors

if TYPE_CHECKING:
    from ..cycle.state import State

#: Parts whose shards go into files that any number of ranks can read.
SPREAD = ("model", "optimizer")


# ---- writing ---------------------------------------------------------------------------------------------------


def save(run: State, saved: dict[str, StateDict], directory: Path, drafted: Callable[..., checkpoint.Draft]) -> Path:
    """Write a checkpoint together; every rank has to come here.

    Args:
        run: Between two steps.
        saved: Its parts on this rank.
        directory: Made if missing; all ranks see it.
        drafted: Encoded trees by name -> what the first rank commits.

    Raises:
        CheckpointError: it could not be written, here or on another rank; older checkpoints stand.
    """
    ranks, shards = run.subject.ranks, dict[str, Tensor]()
    patterns = _patterns(run)
    own = {part: _taken_out(state, (part,), _Names(saved, patterns), shards) for part, state in saved.items()}
    tree, tensors = encode(own)
    trees = ranks.gathered(tree)
    temporary: Path = ranks.alone_does(lambda: checkpoint.begin(directory, run.meter.num_steps))
    try:
        ranks.together(lambda: _write_own(temporary / file_of(ranks.rank), tensors))
        ranks.together(lambda: _write_shards(run, temporary, shards))
        named: dict[str, tuple[Any, dict[str, Tensor]]] = {
            name_of(rank): (found, {}) for rank, found in enumerate(trees)
        }
        return ranks.alone_does(lambda: checkpoint.write(directory, drafted(named), temporary))
    except BaseException as error:
        if ranks.first:
            checkpoint.give_up(temporary)
        if isinstance(error, OSError | SafetensorError | OtherRankFailed):
            raise CheckpointFailed(str(directory), str(error)) from error
        raise


def _write_own(path: Path, tensors: Mapping[str, Tensor]) -> None:
    write_tensors(path, {}, tensors)
    checkpoint.sync(path)  # here: the first rank may be on another machine


def _write_shards(run: State, folder: Path, shards: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own use of what torch has deprecated
            save(shards, storage_writer=writer, process_group=run.subject.ranks.group, no_dist=run.subject.ranks.alone)
    except (OSError, CheckpointException) as error:  # the latter is no Exception
        raise CheckpointFailed(str(folder), str(error).strip().splitlines()[-1]) from error


def _patterns(run: State) -> dict[str, Tensor]:
    """Parameters by name, tied ones by all of theirs."""
    tied = dict(run.subject.model.named_parameters(remove_duplicate=False))
    return {**tied, **named_parameters(run.subject.model, run.subject.optimizer)}


class _Names:
    """How a shard of the model or the optimizer is called, and the parameter that it is spread as."""

    def __init__(self, parts: Mapping[str, StateDict], patterns: Mapping[str, Tensor]) -> None:
        self._order, self._patterns = parts["optimizer"].get("names") or [], patterns

    def of(self, path: tuple[object, ...]) -> tuple[str, Tensor] | None:
        if path[0] == "model":
            parameter = str(path[1])
        elif path[:2] == ("optimizer", "state") and isinstance(path[2], int):
            parameter = self._order[path[2]]
        else:
            return None
        pattern = self._patterns.get(parameter)
        if pattern is None:
            return None
        rest = path[3:] if path[0] == "optimizer" else ()
        return ".".join(map(str, (path[0], parameter, *rest))), pattern


def _taken_out(value: Any, path: tuple[object, ...], names: _Names, shards: dict[str, Tensor]) -> Any:
    """A state with names where its shards were, which go into ``shards``."""
    if path[0] not in SPREAD:
        return value
    if isinstance(value, Mark) and value.kind == "shard":
        named = names.of(path)
        if named is None or list(named[1].shape) != value.body[1] or not is_sharded(named[1]):
            return value
        shards[named[0]] = like_shard(value.body[0], named[1])
        dtype = str(value.body[0].dtype).removeprefix("torch.")
        return Mark("spread", [named[0], value.body[1], dtype])
    if type(value) is dict:
        return {key: _taken_out(item, (*path, key), names, shards) for key, item in value.items()}
    if type(value) is list:
        return [_taken_out(item, (*path, i), names, shards) for i, item in enumerate(value)]
    return value


# ---- reading ---------------------------------------------------------------------------------------------------


def load(run: State, path: Path) -> tuple[checkpoint.LoadedCheckpoint, bool]:
    """Read any checkpoint in the form of this run.

    Returns:
        The checkpoint with this rank's parts, and whether it is of as many ranks: only then all of it holds.

    Raises:
        CheckpointError: missing, damaged, or of parameters of other shapes.
    """
    with unchanged(path):
        return _loaded(run, path)


def _loaded(run: State, path: Path) -> tuple[checkpoint.LoadedCheckpoint, bool]:
    manifest = verify(path)
    document = read_document(path)
    trees = document["trees"]
    if name_of(0) not in trees:
        loaded = checkpoint.load(path)
        if not run.subject.gathering:
            return loaded, True
        if loaded.parts.get("trainer", {}).get("model", {}).get("frozen"):
            raise CheckpointError(
                f'{path} leaves frozen weights out: write it with checkpoint.include_frozen = "always" to go on sharded'
            )
        return replace(loaded, parts=_filled(run, path, loaded.parts)), False
    ranks = run.subject.ranks
    same = bool(run.subject.gathering) and len(trees) == ranks.size
    number = ranks.rank if same else 0
    try:
        file = path / file_of(number)
        own = decode(trees[name_of(number)], load_file(file) if file.name in manifest.files else {})
        parts = {part: state for part, state in own.items() if same or part in (*SPREAD, "trainer")}
        parts = _filled(run, path, parts)
        config = (path / CONFIG).read_bytes().decode()
    except OSError as error:
        raise unreadable(path, error) from error
    except (*MALFORMED, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise refusal(path, f"cannot be read: {error}") from error
    summary = {key: value for key, value in document.items() if key not in ("format_version", "trees")}
    return checkpoint.LoadedCheckpoint(
        step=manifest.step, parts=parts, summary=summary, config_toml=config, manifest=manifest, path=path
    ), same


def _filled(run: State, path: Path, parts: dict[str, StateDict]) -> dict[str, StateDict]:
    """Names of shards replaced by what is in the files, as this run is sharded; whole weights cut."""
    patterns, wanted = _patterns(run), dict[str, Tensor]()
    names = _Names(parts, patterns)

    def visit(value: Any, at: tuple[object, ...]) -> Any:
        if isinstance(value, Mark) and value.kind == "spread":
            name, shape, dtype = value.body
            named = names.of(at)
            if named is None or list(named[1].shape) != shape:
                raise CheckpointError(f"{path}: {name} has shape {shape}, and this run's is of another shape")
            part = torch.empty(local(named[1]).shape, dtype=getattr(torch, dtype), device="cpu")
            if not is_sharded(named[1]):
                wanted[name] = part
                return part
            wanted[name] = like_shard(part, named[1])
            return Mark("shard", [part, shape])
        if isinstance(value, Tensor):
            named = names.of(at)
            if named is not None and is_sharded(named[1]) and value.shape == named[1].shape:
                return Mark("shard", [local_rows(value, named[1]), list(value.shape)])
            return value
        if type(value) is dict:
            return {key: visit(item, (*at, key)) for key, item in value.items()}
        return [visit(item, (*at, i)) for i, item in enumerate(value)] if type(value) is list else value

    found = {part: visit(state, (part,)) if part in SPREAD else state for part, state in parts.items()}
    if wanted:
        _read_shards(path, wanted)
    return found


def _read_shards(path: Path, wanted: dict[str, Tensor]) -> None:
    """Fill tensors from the files that any number of ranks can read."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    for file in path.glob("*.safetensors"):  # its headers are bounded here: there they are taken at their word
        with safe_open(file, framework="pt"):
            pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise refusal(path, f"cannot be read: {str(error).strip().splitlines()[-1]}") from error
