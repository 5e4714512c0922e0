"""One process only: what is decided from the losses of one rank must not move the weights of one rank.

A jump, a skipped step or a raised rate is decided by what a process sees of its own batch.  With several processes
each would decide for itself: their weights drift apart in silence, or one waits for ever in a collective that the
other never enters.  So a run with prediction on is refused as soon as there is more than one.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, distributed, nn

from ..records import ConfigError

#: What can be done about it, at the end of every refusal.
ADVICE = "train in one process, or set enabled=False (the plain loop, which steps on every rank alike)"

#: Classes that share gradients or shard weights, by module and name: importing them would import half of torch.
_WRAPPERS = {
    "DistributedDataParallel": "torch.nn.parallel.distributed",
    "FullyShardedDataParallel": "torch.distributed.fsdp",
    "FSDPModule": "torch.distributed.fsdp",
}


def num_processes() -> int:
    """World size of the default process group, 1 where there is none."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def refuse_several_processes() -> None:
    """Refuse more than one process; cheap enough for every step.

    Raises:
        ConfigError: there is more than one.
    """
    size = num_processes()
    if size > 1:
        raise ConfigError(
            f"torch.distributed has {size} processes, and each would predict by its own losses: their weights would "
            f"drift apart; {ADVICE}"
        )


def refuse_distributed(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Refuse whatever means that weights or gradients are shared between processes.

    Args:
        model: May be wrapped, or hold wrapped modules.
        parameters: That the optimizer holds.

    Raises:
        ConfigError: more than one process, DistributedDataParallel, FSDP (either kind) or a DTensor.
    """
    refuse_several_processes()
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
