"""Between which processes a model is trained, and in what it is wrapped for that.

With several processes each sees losses of its own batches.  Under ``DistributedDataParallel``, and with weights that
``fully_shard`` (FSDP2) has spread over all of them, all decide alike, from values that they have exchanged
(:mod:`.collective`).  Whatever else spreads weights or gradients over processes
is refused with prediction on: decided by each for itself, their weights would drift apart in silence, or one would wait
for ever in a collective that the other never enters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed, nn

from ..records import ConfigError
from .collective import ALONE, Collective, Ranks

#: What can be done about it, at the end of every refusal.
ADVICE = "train in one process, or set enabled=False (the plain loop, which steps on every rank alike)"

#: Classes that share gradients or shard weights, by module and name: importing them would import half of torch.
_WRAPPERS = {
    "DistributedDataParallel": "torch.nn.parallel.distributed",
    "FullyShardedDataParallel": "torch.distributed.fsdp",
    "FSDPModule": "torch.distributed.fsdp",
}
#: What ``fully_shard`` makes of a module.
SHARDED = "FSDPModule"


@dataclass(frozen=True, slots=True)
class Shared:
    """How a model is trained by several processes.

    Attributes:
        ranks: That agree.
        model: Inside its wrapper; None: it is in none.
        wrapped: In its wrapper, for real steps; None likewise.
        gathering: Its modules that gather sharded weights for a forward (FSDP2).
    """

    ranks: Collective = ALONE
    model: nn.Module | None = None
    wrapped: nn.Module | None = None
    gathering: Sequence[Any] = ()


#: One process, and a model in no wrapper.
NOT_SHARED = Shared()


def num_processes() -> int:
    """World size of the default process group, 1 where there is none."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def refuse_other_processes(ranks: Collective) -> None:
    """Refuse processes that came into play after a run was bound; cheap enough for every step.

    Raises:
        ConfigError: there are others than the run was built for.
    """
    size = num_processes()
    if size != ranks.size:
        raise ConfigError(
            f"torch.distributed has {size} processes, and this run was built for {ranks.size}: build it after "
            f"init_process_group, around DistributedDataParallel; or {ADVICE}"
        )


def shared_by(model: nn.Module, parameters: Iterable[Tensor], *, predicts: bool) -> Shared:
    """Between which processes a model is trained.

    Args:
        model: May be wrapped, or hold wrapped modules.
        parameters: That the optimizer holds.
        predicts: Prediction is on; if not, whatever cannot be agreed on need not be.

    Raises:
        ConfigError: prediction is on, and ranks cannot agree: several processes and neither DistributedDataParallel nor
            ``fully_shard``, one of these for some of the processes or for a part of what is trained, FSDP of the first
            kind, or weights that are spread in another way (tensor and pipeline parallelism, meshes of two dimensions).
    """
    outer = getattr(model, "_orig_mod", model)  # of a compiled one
    if wrapper_of(outer) == "DistributedDataParallel" and isinstance(outer.module, nn.Module):
        inner = outer.module
        size = distributed.get_world_size(outer.process_group)  # type: ignore[arg-type]
        if size == num_processes():
            if predicts:
                _refuse_wrapped(inner, parameters)
            return Shared(Ranks() if size > 1 else ALONE, inner, model)
        if predicts:
            raise ConfigError(
                f"the model's DistributedDataParallel joins {size} of {num_processes()} processes, where prediction is "
                f"not supported; {ADVICE}"
            )
    gathering = [module for module in model.modules() if wrapper_of(module) == SHARDED]
    if gathering:
        reshard(gathering)  # or some parameters are the gathered ones
        reason = _not_sharded_alike(model, parameters)
        if reason is None:
            ranks = Ranks(sharded=True) if num_processes() > 1 else ALONE
            return Shared(ranks, gathering=gathering)
        if predicts:
            raise ConfigError(f"{reason}, where prediction is not supported; {ADVICE}")
        return NOT_SHARED
    if predicts:
        _refuse_wrapped(model, parameters)
        size = num_processes()
        if size > 1:
            raise ConfigError(
                f"torch.distributed has {size} processes, and the model is not wrapped in DistributedDataParallel "
                "(nor sharded by fully_shard): each would predict by its own losses, and their weights would drift "
                f"apart; wrap it and pass the wrapped model, {ADVICE}"
            )
    return NOT_SHARED


def reshard(gathering: Iterable[Any]) -> None:
    """Have modules of ``fully_shard`` let go of the weights that they gathered for a forward; nobody is waited for."""
    for module in gathering:
        module.reshard()


def _not_sharded_alike(model: nn.Module, parameters: Iterable[Tensor]) -> str | None:
    """Why weights of a model that is sharded are not all spread over all processes, each once; None: they are."""
    inside = {name: wrapper_of(module) for name, module in model.named_modules()}
    other = next((name for name, wrapper in inside.items() if wrapper not in ("", SHARDED)), None)
    if other is not None:
        return f"the model's part {other!r} is wrapped in {inside[other]}"
    names = {id(p): name for name, p in model.named_parameters()}
    for i, parameter in enumerate(parameters):
        name = names.get(id(parameter), f"number {i} of the optimizer")
        if not _is_sharded(parameter):
            if parameter.requires_grad:
                return f"parameter {name} is not sharded, and others are"
            continue
        spread: Any = parameter
        placements = tuple(getattr(spread, "placements", ()))
        if len(placements) != 1 or not placements[0].is_shard() or parameter.is_complex():
            return f"parameter {name} is spread as {placements} (not in one dimension of the mesh by fully_shard)"
        if spread.device_mesh.size() != num_processes():
            return f"parameter {name} is sharded over {spread.device_mesh.size()} of {num_processes()} processes"
    return None


def _refuse_wrapped(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    for name, module in model.named_modules():
        wrapper = wrapper_of(module)
        if wrapper:
            where = f"the model's part {name!r}" if name else "the model"
            raise ConfigError(f"{where} is wrapped in {wrapper}, where prediction is not supported; {ADVICE}")
    named = [*model.named_parameters(), *((f"number {i} of the optimizer", p) for i, p in enumerate(parameters))]
    for name, parameter in named:
        if _is_sharded(parameter):
            kind = type(parameter).__name__
            raise ConfigError(f"parameter {name} is sharded ({kind}), where prediction is not supported; {ADVICE}")


def wrapper_of(module: nn.Module) -> str:
    """Name of the class that spreads a module over processes, empty if none does."""
    for cls in type(module).__mro__:
        home = _WRAPPERS.get(cls.__name__)
        if home is not None and cls.__module__.startswith(home):
            return cls.__name__
    return ""


def _is_sharded(parameter: Tensor) -> bool:
    if type(parameter) in (Tensor, nn.Parameter):
        return False
    names = {cls.__name__ for cls in type(parameter).__mro__} | {type(parameter.detach()).__name__}
    return bool(names & {"DTensor", "ShardedTensor"})
