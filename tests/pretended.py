"""An accelerator for machines without one: tensors on ``meta``, and a mode that notes what would wait for the device.

Operations that mix devices raise there as they do elsewhere.  What is read from the device is ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")


class Accelerator(TorchDispatchMode):
    """Counts reads and blocking copies between host and device, and what is widened to float64 on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.wide: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal") and on_device(args[0]):
            self.waits.append(name)
            return name == "equal" or torch.ones((), dtype=args[0].dtype).item()
        if name == "_to_copy" and kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]) == DEVICE
            self._copied(name, args[0], there, kwargs.get("non_blocking"))
            if on_device(args[0]) and not there:
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy_":
            self._copied(name, args[1], on_device(args[0]), args[2:3] == (True,))
            if on_device(args[1]) and not on_device(args[0]):
                return args[0].fill_(1)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and on_device(result) and result.dtype is torch.float64:
            self.wide.append(name)
        return result

    def _copied(self, name: str, source: Tensor, there: bool, non_blocking: object) -> None:
        if on_device(source) is not there and not non_blocking:
            self.waits.append(name)


def on_device(value: object) -> bool:
    return isinstance(value, Tensor) and value.device == DEVICE
