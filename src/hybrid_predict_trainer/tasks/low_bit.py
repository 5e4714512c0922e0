"""Low-precision training from torchao: AdamW with moments in 8 bits, and layers whose weights are ternary."""

from __future__ import annotations

import importlib
import os
import shutil
import warnings
from typing import Any

import torch
from torch import nn

from .extras import missing_extra

#: What the BitNet layers were tried with; they are a prototype, which torchao may move or drop.
TRIED = "0.18"
COMPILERS = ("g++", "clang++", "c++", "cl")


def adamw_8bit(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """Return torchao's AdamW, whose moments are codes of 8 bits with one scale per 256 (Dettmers et al., 2110.02861).

    Tensors of fewer than 4,096 numbers, or of no multiple of 256, keep moments in float32. Its first step is compiled,
    which takes some seconds; under `torch.compiler.set_stance("force_eager")` it is not.

    Args:
        groups: of parameters, as for every optimizer.
        lr: of all groups.
        betas: as AdamW's.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        ValueError: there is no compiler for its step.
    """
    _module("torchao")
    optim = _module("torchao.optim")
    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    if on_cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), *COMPILERS))):
        raise ValueError("adamw8bit compiles its step, and there is no C++ compiler: install g++, or take adamw")
    found: torch.optim.Optimizer = optim.AdamW8bit(groups, lr=lr, betas=betas)
    return found


def ternary(model: nn.Module) -> nn.Module:
    """Return the model, its hidden linear layers with weights of -1, 0 and 1 times their mean size (BitNet b1.58).

    Forwards see rounded weights and inputs in 8 bits, backwards the weights themselves (2402.17764, straight-through).
    The last linear layer, frozen ones and those that share a weight with an embedding are left as they are, as there.
    Weights, gradients and moments stay in full precision: what is saved is inputs, kept in 8 bits for the backward.

    Args:
        model: changed in place, before its optimizer is built: weights are new objects.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        ValueError: this torchao has no such layers, or there is no hidden linear layer.
    """
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    hidden = {name for name, m in linears[:-1] if id(m.weight) not in embeddings and m.weight.requires_grad}
    if not hidden:
        raise ValueError("ternary layers need at least one hidden nn.Linear, and this model has none")
    torchao = _module("torchao")
    try:
        prototype, quantization = _module("torchao.prototype.quantized_training"), _module("torchao.quantization")
        kind, convert = prototype.bitnet_training, quantization.quantize_
    except (ImportError, AttributeError) as error:
        version = getattr(torchao, "__version__", "of unknown version")
        raise ValueError(f"torchao {version} has no BitNet layers to train ({error}): install {TRIED}") from error
    convert(model, kind(), filter_fn=lambda _, name: name in hidden)
    return model


def _module(name: str) -> Any:
    """A module of torchao, without what its import warns of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "torchao":
            raise missing_extra("torchao", "torchao") from error
        raise
