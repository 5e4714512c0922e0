"""Weight space: which parameters are predicted, their groups by role, and in-place algebra.

Everything here works on lists of tensors, one entry per parameter; the model is never flattened
into one vector.  Shape letters: ``G`` groups.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..records import ConfigError
from .real_views import RealView

Tensors = list[Tensor]

#: Devices that cannot hold float64.
WITHOUT_FLOAT64 = frozenset({"mps"})

#: Roles in the order of the coefficient rows; ``other`` takes what no rule names.
ROLES = (
    "embedding", "attention_q", "attention_k", "attention_v", "attention_qkv", "attention_out",
    "mlp_up", "mlp_down", "head", "norm_bias", "other",
)  # fmt: skip

# First match wins.  Names cover GPT-2 (c_attn, c_proj, c_fc), Llama (q_proj, gate_proj, w1..w3),
# BERT (query, key, value) and nn.TransformerEncoder (in_proj, linear1, linear2).
_NAME_RULES = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("attention_qkv", r"(c_attn|in_proj|qkv)"),
        ("attention_q", r"(^|[._])(q|wq|q_proj|query)([._]|$)"),
        ("attention_k", r"(^|[._])(k|wk|k_proj|key)([._]|$)"),
        ("attention_v", r"(^|[._])(v|wv|v_proj|value)([._]|$)"),
        ("attention_out", r"(attn|attention)[\w.]*(out|c_proj|o_proj|dense)|(^|[._])(o_proj|wo|out_proj)([._]|$)"),
        ("mlp_up", r"(up_proj|gate_proj|c_fc|fc1|linear1|intermediate|(^|[._])(w1|w3)([._]|$))"),
        ("mlp_down", r"(down_proj|mlp[\w.]*c_proj|fc2|linear2|(^|[._])w2([._]|$)|output\.dense)"),
        ("head", r"(lm_head|(^|[._])head([._]|$)|classifier|unembed)"),
    )
)


@dataclass(frozen=True, slots=True)
class Groups:
    """Parameters that are predicted, and the row of coefficients each belongs to."""

    names: tuple[str, ...]  # one per parameter
    index: tuple[int, ...]  # group of each parameter
    roles: tuple[str, ...]  # G role names
    sizes: tuple[int, ...]  # number of weights per group

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.roles)

    @property
    def num_weights(self) -> int:
        """Of all groups."""
        return sum(self.sizes)

    def pooled(self) -> Groups:
        """The same parameters in one group."""
        return Groups(self.names, (0,) * len(self.index), ("all",), (self.num_weights,))


def role_of(name: str, parameter: Tensor, module: nn.Module) -> str:
    """Role of one parameter from its qualified name and the type of the module that holds it."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if parameter.dim() < 2:
        return "norm_bias"
    for role, pattern in _NAME_RULES:
        if pattern.search(name):
            return role
    return "other"


def predicted_parameters(
    model: nn.Module, optimizer: Optimizer, roles: dict[str, str] | None = None
) -> tuple[Tensors, Groups]:
    """Parameters the optimizer moves that can be predicted, with their groups.

    Taken from ``optimizer.param_groups``, not from the model: that is what really moves (frozen,
    tied and sharded parameters fall out right).  Integer parameters are left alone, complex ones are given as their
    real views.

    Args:
        model: Supplies the names.
        optimizer: Supplies the parameters.
        roles: Overrides, qualified parameter name -> role name of the user's choice.

    Raises:
        ConfigError: nothing to train, or an override names an unknown parameter.
    """
    owner: dict[int, tuple[str, nn.Module]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owner.setdefault(id(parameter), (f"{prefix}.{leaf}" if prefix else leaf, module))
    overrides = roles or {}
    unknown = sorted(set(overrides) - {name for name, _ in owner.values()})
    if unknown:
        raise ConfigError(f"roles: the model has no parameter {unknown[0]!r}")

    parameters: Tensors = []
    names: list[str] = []
    found: list[str] = []
    seen: set[int] = set()
    for position, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if id(parameter) in seen or not parameter.requires_grad:
            continue
        seen.add(id(parameter))
        name, module = owner.get(id(parameter), (f"optimizer.{position}", nn.Identity()))
        if not (parameter.is_floating_point() or parameter.is_complex()):
            warnings.warn(f"parameter {name} has dtype {parameter.dtype} and is not predicted", stacklevel=2)
            continue
        parameters.append(RealView.of(parameter) if parameter.is_complex() else parameter)
        names.append(name)
        found.append(overrides.get(name) or role_of(name, parameter, module))
    if not parameters:
        raise ConfigError("the optimizer holds no trainable floating-point or complex parameter")
    present = [role for role in ROLES if role in found] + sorted(set(found) - set(ROLES))
    index = tuple(present.index(role) for role in found)
    sizes = [0] * len(present)
    for g, parameter in zip(index, parameters, strict=True):
        sizes[g] += parameter.numel()
    return parameters, Groups(tuple(names), index, tuple(present), tuple(sizes))


def untrained(parameters: Sequence[Tensor], names: Sequence[str]) -> bool:
    """Whether a network is as it was drawn: no gain of its norms differs from the others of the same norm.

    Gains begin at one (or zero) and differ after the first optimizer step; biases may be drawn at random, so they
    say nothing.  A network without gains is taken for a trained one, and so is one whose gains are in half precision,
    where small steps are rounded away.

    Args:
        parameters: That are trained.
        names: Qualified, one per parameter.
    """
    gains = [
        p.detach()
        for p, name in zip(parameters, names, strict=True)
        if p.dim() == 1 and p.numel() > 1 and "bias" not in name.rpartition(".")[2]
    ]
    if not gains or any(g.dtype in (torch.bfloat16, torch.float16) for g in gains):
        return False
    return bool(on_host([(g == g[0]).all() for g in gains]).all())


def clone(tensors: Iterable[Tensor]) -> Tensors:
    """Detached copies with the same dtype, device and layout."""
    return [t.detach().clone() for t in tensors]


@torch.no_grad()
def copy_(destination: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """``destination <- source`` in place, keeping storages (never rebinds ``.data``)."""
    torch._foreach_copy_(list(destination), list(source))
    _forget_casts()


@torch.no_grad()
def move_(destination: Sequence[Tensor], origin: Sequence[Tensor], delta: Sequence[Tensor], scale: float) -> None:
    """``destination <- origin + scale * delta`` in place, summed in the wider of the two dtypes.

    Half-precision weights would swallow a small delta if it were rounded before the addition.
    """
    for p, o, d in zip(destination, origin, delta, strict=True):
        wide = torch.promote_types(o.dtype, d.dtype)
        p.copy_(torch.add(o.to(wide), d.to(device=o.device, dtype=wide), alpha=scale))
    _forget_casts()


def _forget_casts() -> None:
    """Drop the half-precision copies of weights that an autocast around the caller's loop keeps.

    They are made once per region and not renewed when a weight changes in place: every loss the gate
    measured would be that of the weights before the move.
    """
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()


@torch.no_grad()
def gradients(parameters: Sequence[Tensor]) -> Tensors:
    """Gradients that exist, in parameter order; of sparse ones their values."""
    found = [p.grad for p in parameters if p.grad is not None]
    return [g.coalesce().values() if g.is_sparse else g for g in found]


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """What long sums are taken in on a device: float64, or float32 where there is none."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


@torch.no_grad()
def on_host(tensors: Sequence[Tensor]) -> Tensor:
    """(n, ...) small tensors of one shape, float64 in host memory, in their order; one transfer per device."""
    places: dict[torch.device, list[int]] = {}
    for i, t in enumerate(tensors):
        places.setdefault(t.device, []).append(i)
    # widened only there: not every device has float64
    fetched = [torch.stack([tensors[i] for i in where]).cpu().double() for where in places.values()]
    if len(fetched) < 2:
        return fetched[0] if fetched else torch.zeros(0, dtype=torch.float64)
    found = torch.empty(len(tensors), *tensors[0].shape, dtype=torch.float64)
    for where, values in zip(places.values(), fetched, strict=True):
        found[where] = values
    return found


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, shape (), on their device."""
    return torch.nn.utils.get_total_norm(tensors)


@torch.no_grad()
def per_tensor_rms(tensors: Sequence[Tensor]) -> list[float]:
    """Root mean square of each tensor, read in one transfer."""
    means = [
        t.to(accumulate_dtype(t.device)).square().mean() if t.numel() else torch.zeros((), device=t.device)
        for t in tensors
    ]
    roots: list[float] = on_host(means).sqrt().tolist()
    return roots


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    return bool(on_host([torch.isfinite(t).all() for t in tensors]).all())
