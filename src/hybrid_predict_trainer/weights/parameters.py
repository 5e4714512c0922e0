"""Which parameters are predicted, their groups by role, the order of the optimizer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..notices import users_line
from ..records import ConfigError
from .algebra import Tensors, on_host
from .real_views import InnerView, RealView, wraps_one
from .shards import LocalShard, Total, is_sharded, itself, size_of, whole

#: Roles in the order of the coefficient rows; ``other`` takes what no rule names.
ROLES = (
    "embedding", "attention_q", "attention_k", "attention_v", "attention_qkv", "attention_qkv_by_head", "attention_out",
    "mlp_up", "mlp_down", "head", "norm_bias", "other",
)  # fmt: skip


# First match wins.  Names cover GPT-2 (c_attn, c_proj, c_fc), Llama (q_proj, gate_proj, w1..w3),
# BERT (query, key, value), nn.TransformerEncoder (in_proj, linear1, linear2), and GPT-NeoX, BLOOM and Falcon, whose
# query_key_value holds the three of one head after the other.  Heads come first where they hold what a block may hold,
# too (classifier.out_proj), and are no heads of attention (multi_head_attention).
_NAME_RULES = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("other", r"((^|\.)(classifier|lm_head)\.dense\.|pre_classifier)"),  # hidden layers before a head
        ("head", r"(^|\.)(classifier|lm_head|score|qa_outputs|embed_out|to_logits|output_projection)\."),
        ("head", r"(^|\.)(predictions\.decoder|generator\.proj)\."),
        ("attention_qkv_by_head", r"query_key_value"),
        ("attention_qkv", r"(c_attn|in_proj|qkv)"),
        ("attention_q", r"(^|[._])(q|wq|q_proj|query)([._]|$)"),
        ("attention_k", r"(^|[._])(k|wk|k_proj|key)([._]|$)"),
        ("attention_v", r"(^|[._])(v|wv|v_proj|value)([._]|$)"),
        (
            "attention_out",
            r"(attn|attention)[\w.]*(out|c_proj|o_proj|dense)|(^|[._])(o_proj|wo|out_proj)([._]|$)"
            r"|(SelfAttention|EncDecAttention)\.o\.|attn\.proj\.",
        ),
        (
            "mlp_up",
            r"(up_proj|gate_proj|c_fc|fc1|linear1|intermediate|(^|[._])(w1|w3)([._]|$)"
            r"|dense_h_to_4h|mlp\.fc_in|ffn\.lin1|Dense\w*\.wi(_\d)?\.)",
        ),
        (
            "mlp_down",
            r"(down_proj|mlp[\w.]*c_proj|fc2|linear2|(^|[._])w2([._]|$)|output\.dense"
            r"|dense_4h_to_h|mlp\.fc_out|ffn\.lin2)",
        ),
        ("head", r"(lm_head|(^|(?<!multi)[._])head([._]|$)|classifier|unembed)"),
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
    model: nn.Module, optimizer: Optimizer, roles: dict[str, str] | None = None, total: Total = itself
) -> tuple[Tensors, Groups]:
    """Parameters the optimizer moves that can be predicted, with their groups.

    Taken from ``optimizer.param_groups``, not from the model: that is what really moves (frozen,
    tied and sharded parameters fall out right).  Integer parameters are left alone, complex ones are given as their
    real views, sharded ones as this rank's part, wrappers as what they wrap.

    Args:
        model: Supplies the names.
        optimizer: Supplies the parameters.
        roles: Overrides, qualified parameter name -> role name of the user's choice.
        total: Adds up over the ranks that hold the other parts of sharded parameters.

    Raises:
        ConfigError: nothing to train, or an override names an unknown parameter.
    """
    owner: dict[int, tuple[str, nn.Module]] = {}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            owner.setdefault(id(parameter), (f"{prefix}.{leaf}" if prefix else leaf, module))
    tables = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding)}
    unnamed_head = _unnamed_head(owner, tables)
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
            warnings.warn(f"parameter {name} has dtype {parameter.dtype} and is not predicted", stacklevel=users_line())
            continue
        parameters.append(_seen(parameter, total))
        names.append(name)
        own = "head" if id(parameter) == unnamed_head else role_of(name, parameter, tables.get(id(parameter), module))
        found.append(overrides.get(name) or own)
    if not parameters:
        raise ConfigError("the optimizer holds no trainable floating-point or complex parameter")
    present = [role for role in ROLES if role in found] + sorted(set(found) - set(ROLES))
    index = tuple(present.index(role) for role in found)
    sizes = [0] * len(present)
    for g, parameter in zip(index, parameters, strict=True):
        sizes[g] += size_of(parameter)
    return parameters, Groups(tuple(names), index, tuple(present), tuple(sizes))


def check_values(parameters: Sequence[Tensor]) -> None:
    """Weights that are to be trained have values, which a lazy layer's have not before its first forward.

    Raises:
        ConfigError: some have none.
    """
    if any(is_lazy(p) for p in parameters):
        raise ConfigError(
            "the model has lazy layers without a shape: run one batch through it, then make the optimizer"
        )


#: Names at the top of a model that are its head's if the model has blocks and nothing else is called one; others put
#: names of their own before them.
_AT_THE_TOP = re.compile(
    r"^((module|_orig_mod|_fsdp_wrapped_module|model)\.)*"
    r"(output|output_layer|decoder|out|out_proj|fc_out|logits|generator)\.weight$"
)


def _unnamed_head(owner: dict[int, tuple[str, nn.Module]], tables: dict[int, nn.Embedding]) -> int | None:
    """``id`` of the head's weight in a network of blocks where no name tells it for sure.

    It is what a common name stands at the top for, or what gives every row of a table a logit and so has its shape.  A
    model of language has one of them, whatever it is called.  Where there are several none is taken.
    """
    layers = {
        place: (name, module, role_of(name, module.weight, module))
        for place, (name, module) in owner.items()
        if place not in tables and isinstance(module, nn.Linear) and name.rpartition(".")[2] == "weight"
    }
    roles = {role for _, _, role in layers.values()}
    if "head" in roles or not any(role.startswith(("attention", "mlp")) for role in roles):
        return None
    shapes = {(m.num_embeddings, m.embedding_dim) for m in tables.values() if m.num_embeddings != m.embedding_dim}
    at_the_top = [place for place, (name, _, _) in layers.items() if _AT_THE_TOP.match(name)]
    of_the_shape = [
        place
        for place, (_, module, role) in layers.items()
        if role == "other" and (module.out_features, module.in_features) in shapes
    ]
    for found in (at_the_top, of_the_shape):
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _seen(parameter: Tensor, total: Total) -> Tensor:
    if is_sharded(parameter):
        return LocalShard.of(parameter, total)
    if wraps_one(parameter):
        return InnerView.of(parameter)
    return RealView.of(parameter) if parameter.is_complex() else parameter


def untrained(parameters: Sequence[Tensor], names: Sequence[str]) -> bool:
    """Whether a network is as it was drawn: no gain of its norms differs from the others of the same norm.

    Gains begin at one (or zero) and differ after the first optimizer step; biases may be drawn at random, so they
    say nothing.  A network without gains is taken for a trained one, and so is one whose gains are in half precision,
    where small steps are rounded away.

    Args:
        parameters: That are trained.
        names: Qualified, one per parameter.
    """
    gains = [whole(p).detach() for p, name in zip(parameters, names, strict=True) if _is_gain(p, name)]
    if not gains or any(g.dtype in (torch.bfloat16, torch.float16) for g in gains):
        return False
    return bool(on_host([(g == g[0]).all() for g in gains]).all())


def table_is_shared(model: nn.Module) -> bool:
    """Whether a layer that is no table holds a table of embeddings as well: a head, whatever other heads there are."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    others = [m for m in model.modules() if not isinstance(m, nn.Embedding)]
    return any(id(p) in tables for m in others for p in m.parameters(recurse=False))


def head_is_table(model: nn.Module) -> bool:
    """Whether the head of a network is its table of embeddings: another layer holds it, or no other matrix can be one.

    Tables that share a weight among themselves, as encoder and decoder do, are no head.  Layers that do not train count
    as well: a frozen head is one.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    other = False
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in tables:
                if not isinstance(module, nn.Embedding):
                    return True
            elif parameter.dim() > 1 and role_of(f"{prefix}.{leaf}", parameter, module) in ("head", "other"):
                other = True
    return bool(tables) and not other


def pretrained(model: nn.Module) -> bool:
    """Whether a network is known to have been trained before: gains of one of its norms differ, frozen ones included.

    They are all one (or zero) as drawn, and no optimizer moves them alike.  A network without gains, or with gains in
    half precision that no step has moved, is not *known* to be.
    """
    gains = [whole(p).detach() for name, p in model.named_parameters() if _is_gain(p, name)]
    return bool(gains) and bool(on_host([(g != g[0]).any() for g in gains]).any())


def _is_gain(parameter: Tensor, name: str) -> bool:
    return parameter.dim() == 1 and size_of(parameter) > 1 and "bias" not in name.rpartition(".")[2]


def optimizer_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Parameters in group order, as ``optimizer.state_dict`` numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def parameter_names(model: nn.Module, optimizer: Optimizer) -> dict[int, str]:
    """``id`` -> name, of the model's parameters and then of those only the optimizer holds."""
    names = {id(p): name for name, p in model.named_parameters()}
    for i, p in enumerate(q for q in optimizer_parameters(optimizer) if id(q) not in names):
        names.setdefault(id(p), f"optimizer:{i}")
    return names


def all_parameters(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Parameters of the model, then those only the optimizer holds."""
    return list(named_parameters(model, optimizer).values())


def named_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Name -> parameter, of the model and then of those only the optimizer holds."""
    names = parameter_names(model, optimizer)
    return {names[id(p)]: p for p in [*model.parameters(), *optimizer_parameters(optimizer)]}


def trained_parameters(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Name -> parameter, of those that require a gradient or that the optimizer holds."""
    held = set(map(id, optimizer_parameters(optimizer)))
    return {n: p for n, p in named_parameters(model, optimizer).items() if p.requires_grad or id(p) in held}
