"""Weight space: which parameters, their roles, and the in-place algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cases import make_model
from hybrid_predict_trainer import ConfigError
from hybrid_predict_trainer.weights import algebra as weights
from hybrid_predict_trainer.weights.parameters import ROLES, predicted_parameters, role_of, untrained

# names as in the common architectures
NAMES = {
    "transformer.h.0.attn.c_attn.weight": "attention_qkv",
    "layers.0.self_attn.in_proj_weight": "attention_qkv",
    "model.layers.0.self_attn.q_proj.weight": "attention_q",
    "layers.3.attention.wk.weight": "attention_k",
    "bert.encoder.layer.0.attention.self.value.weight": "attention_v",
    "bert.encoder.layer.0.attention.self.query.weight": "attention_q",
    "transformer.h.0.attn.c_proj.weight": "attention_out",
    "model.layers.0.self_attn.o_proj.weight": "attention_out",
    "bert.encoder.layer.0.attention.output.dense.weight": "attention_out",
    "transformer.h.0.mlp.c_fc.weight": "mlp_up",
    "model.layers.0.mlp.gate_proj.weight": "mlp_up",
    "layers.0.linear1.weight": "mlp_up",
    "transformer.h.0.mlp.c_proj.weight": "mlp_down",
    "layers.0.feed_forward.w2.weight": "mlp_down",
    "layers.0.linear2.weight": "mlp_down",
    "lm_head.weight": "head",
    "head.weight": "head",
    "score.weight": "head",
    "classifier.out_proj.weight": "head",
    "module.classifier.dense.weight": "other",
    "lm_head.dense.weight": "other",
    "lm_head.decoder.weight": "head",
    "pre_classifier.weight": "other",
    "gpt_neox.layers.0.mlp.dense_h_to_4h.weight": "mlp_up",
    "gpt_neox.layers.0.mlp.dense_4h_to_h.weight": "mlp_down",
    "transformer.h.0.mlp.fc_in.weight": "mlp_up",
    "transformer.h.0.mlp.fc_out.weight": "mlp_down",
    "distilbert.transformer.layer.0.ffn.lin1.weight": "mlp_up",
    "distilbert.transformer.layer.0.ffn.lin2.weight": "mlp_down",
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "mlp_up",
    "encoder.block.0.layer.0.SelfAttention.o.weight": "attention_out",
    "blocks.0.attn.proj.weight": "attention_out",
    "cls.predictions.decoder.weight": "head",
    "qa_outputs.weight": "head",
    "embed_out.weight": "head",
    "generator.proj.weight": "head",
    "decoder.layers.0.fc1.weight": "mlp_up",
    "decoder.layers.0.self_attn.out_proj.weight": "attention_out",
    "layers.0.out_proj.weight": "attention_out",
    "layers.0.output.weight": "other",
    "layers.0.multi_head_attention.fc.weight": "other",
    "heads.head.weight": "head",
    "transformer.h.0.self_attention.query_key_value.weight": "attention_qkv_by_head",
    "gpt_neox.layers.0.attention.query_key_value.weight": "attention_qkv_by_head",
    "blocks.0.attn.qkv.weight": "attention_qkv",
    "lin1.weight": "other",
    "out.weight": "other",
    "features.0.conv.weight": "other",
    "0.weight": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_roles_by_name(name: str) -> None:
    assert role_of(name, torch.zeros(2, 2), nn.Linear(2, 2)) == NAMES[name]


@pytest.mark.parametrize(
    ("parameter", "module", "role"),
    [(torch.zeros(3, 2), nn.Embedding(3, 2), "embedding"), (torch.zeros(3), nn.LayerNorm(3), "norm_bias"),
     (torch.zeros(()), nn.Identity(), "norm_bias"), (torch.zeros(2, 2, 3, 3), nn.Conv2d(2, 2, 3), "other")],
)  # fmt: skip
def test_roles_by_type(parameter: torch.Tensor, module: nn.Module, role: str) -> None:
    assert role_of("lm_head.weight" if role == "embedding" else "x", parameter, module) == role


def test_groups_partition_the_parameters() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 7))
    parameters, groups = predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [id(p) for p in parameters] == [id(p) for p in model.parameters()]
    assert groups.names == tuple(n for n, _ in model.named_parameters())
    assert sum(groups.sizes) == sum(p.numel() for p in model.parameters())
    assert sorted(set(groups.index)) == list(range(groups.num_groups))
    order = [ROLES.index(r) for r in groups.roles]
    assert order == sorted(order)
    for g, role in enumerate(groups.roles):
        assert groups.sizes[g] == sum(p.numel() for p, i in zip(parameters, groups.index, strict=True) if i == g), role


def test_what_the_optimizer_holds_is_predicted() -> None:
    """Frozen and tied parameters, parameters the model does not have, and those the optimizer does not."""
    model = make_model("tied")
    own = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())[:1]}, {"params": [own]}], lr=0.1)
    parameters, groups = predicted_parameters(model, optimizer)
    assert [id(p) for p in parameters] == [id(model.first.weight), id(own)]
    assert groups.names == ("first.weight", "optimizer.1")


def test_frozen_parameters_are_not_predicted() -> None:
    model = make_model("frozen")
    parameters, groups = predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "0.weight" not in groups.names
    assert all(p.requires_grad for p in parameters)


def test_overrides() -> None:
    model = make_model("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, groups = predicted_parameters(model, optimizer, {"0.weight": "my role", "2.weight": "head"})
    assert groups.roles == ("head", "norm_bias", "my role")
    with pytest.raises(ConfigError, match=r"no parameter '0\.weigth'"):
        predicted_parameters(model, optimizer, {"0.weigth": "head"})


# ---------------------------------------------------------------- algebra


def test_clone_and_copy_keep_storages() -> None:
    model = make_model("mlp")
    live = list(model.parameters())
    saved = weights.clone(live)
    pointers = [p.data_ptr() for p in live]
    with torch.no_grad():
        for p in live:
            p.zero_()
    weights.copy_(live, saved)
    assert [p.data_ptr() for p in live] == pointers
    assert all(torch.equal(a, b) for a, b in zip(live, saved, strict=True))
    assert not any(s.requires_grad for s in saved)


@given(
    st.floats(-3, 3), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([torch.float32, torch.float64])
)
@settings(max_examples=30, deadline=None)
def test_move(scale: float, own: torch.dtype, other: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    origin = [torch.randn(3, 4, generator=generator, dtype=own)]
    delta = [torch.randn(3, 4, generator=generator, dtype=other)]
    target = [torch.zeros(3, 4, dtype=own)]
    weights.move_(target, origin, delta, scale)
    assert torch.allclose(target[0].double(), origin[0].double() + scale * delta[0].double(), atol=1e-6)
    assert target[0].dtype == own


def test_move_by_nothing_is_exact() -> None:
    origin = [torch.randn(5), torch.randn(2, 2).bfloat16()]
    target = weights.clone(origin)
    weights.move_(target, origin, [torch.ones(5).double(), torch.ones(2, 2)], 0.0)
    assert all(torch.equal(a, b) for a, b in zip(target, origin, strict=True))


def several(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in ((5, 7), (5,), (3, 2, 4), ())]


@pytest.mark.parametrize("scale", [1.0, 0.37, 0.0])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_move_in_one_vector_has_the_same_bits(scale: float, wide: torch.dtype) -> None:
    parameters = [nn.Parameter(t) for t in several()]
    saved, delta = weights.copied_together(parameters), several(wide)
    assert isinstance(saved, weights.Together)
    together = weights.Together(torch.cat([d.reshape(-1) for d in delta]), delta)
    weights.move_(parameters, weights.clone(saved), delta, scale)
    expected = weights.clone(parameters)
    for _ in range(2):  # the second time in memory that is there already
        weights.copy_(parameters, saved)
        weights.move_(parameters, saved, together, scale)
        assert all(torch.equal(p, e) for p, e in zip(parameters, expected, strict=True))


def test_copies_in_one_vector_are_copies() -> None:
    tensors = [torch.randn(4, 6).T, torch.randn(3)]  # one of them is no stretch of memory
    before = weights.clone(tensors)
    copies = weights.copied_together(tensors)
    for t in tensors:
        t.zero_()
    assert all(torch.equal(c, b) for c, b in zip(copies, before, strict=True))


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.ones(3), torch.ones(3, dtype=torch.float64)],
        [torch.ones(3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)],
        [torch.ones(weights.SMALL), torch.ones(1)],
        [torch.ones(3)],
    ],
    ids=["two kinds", "half", "many", "one"],
)
def test_what_does_not_lie_in_one_vector(tensors: list[torch.Tensor]) -> None:
    copies = weights.copied_together(tensors)
    assert not isinstance(copies, weights.Together)
    assert all(torch.equal(c, t) and c is not t for c, t in zip(copies, tensors, strict=True))


def test_rms_in_one_vector() -> None:
    delta = several(torch.float64)
    delta[1][0] = float("inf")
    together = weights.Together(torch.cat([d.reshape(-1) for d in delta]), delta)
    assert weights.per_tensor_rms(together) == pytest.approx(weights.per_tensor_rms(delta))


@pytest.mark.parametrize("enabled", [True, False])
def test_without_graph(enabled: bool) -> None:
    seen = []

    @weights.without_graph
    def work(error: bool) -> None:
        seen.append(torch.is_grad_enabled())
        if error:
            raise KeyError

    with torch.set_grad_enabled(enabled):
        work(False)
        with pytest.raises(KeyError):
            work(True)
        assert torch.is_grad_enabled() is enabled
    assert seen == [False, False]


def test_small_deltas_of_half_precision_weights_are_not_lost() -> None:
    """Half a step of the format, 2^-8 at 1: each weight goes to one of its neighbours, and the mean is the delta's."""
    delta, count = 2.0**-8 + 2.0**-10, 4096
    target = [torch.ones(count, dtype=torch.bfloat16)]
    weights.move_(target, [torch.ones(count, dtype=torch.bfloat16)], [torch.full((count,), delta)], 1.0)
    assert set(target[0].tolist()) == {1.0, 1 + 2.0**-7}
    moved = target[0].double().mean().item() - 1
    assert abs(moved - delta) < 4 * 2.0**-8 / count**0.5, "four standard errors"


def test_gradients_and_norm() -> None:
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert weights.global_norm(weights.gradients([a, b, c])).item() == 5.0
    c.grad = torch.sparse_coo_tensor([[0, 0]], [6.0, 6.0], (2,), check_invariants=True)
    assert weights.global_norm(weights.gradients([a, b, c])).item() == 13.0
    assert weights.global_norm([]).item() == 0.0


def test_rms_and_finiteness() -> None:
    tensors = [torch.tensor([3.0, -3.0]), torch.zeros(0), torch.tensor(2.0)]
    assert weights.per_tensor_rms(tensors) == pytest.approx([3.0, 0.0, 2.0], rel=1e-15, abs=0)
    assert weights.all_finite(tensors)
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not weights.all_finite([*tensors, torch.tensor([1.0, bad])])


class Normed(nn.Module):
    """A norm's gain, and a linear layer whose bias is drawn at random."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_a_network_with_even_gains_is_untrained(gain: float) -> None:
    model = Normed()
    nn.init.constant_(model.norm.weight, gain)
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert untrained(parameters, names)
    with torch.no_grad():
        model.norm.weight[2] += 1e-6
    assert not untrained(parameters, names)


def test_one_that_does_not_tell_is_taken_for_trained() -> None:
    for model in (nn.Linear(3, 3), nn.LayerNorm(1)):
        names, parameters = zip(*model.named_parameters(), strict=True)
        assert not untrained(parameters, names)


def test_half_precision_gains_do_not_tell() -> None:
    """A step of a thousandth from one is rounded away: trained or not, they are all alike."""
    model = Normed().to(torch.bfloat16)
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert not untrained(parameters, names)


def test_recurrent_biases_are_biases() -> None:
    model = nn.ModuleDict({"rnn": nn.GRU(3, 3), "norm": nn.LayerNorm(3)})
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert untrained(parameters, names)


class Speaks(nn.Module):
    """A table and, under a name that tells nothing, what gives every row of it a logit."""

    def __init__(
        self, *, first: bool = False, tied: bool = False, twice: bool = False, named: bool = False,
        blocks: bool = True, top: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        if first:
            self.vocab = nn.Linear(4, 7, bias=False)
        self.table, self.inside = nn.Embedding(7, 4), nn.Linear(4, 4)
        if not first:
            self.vocab = nn.Linear(4, 7, bias=False)
        if tied:
            self.vocab.weight = self.table.weight
        if twice:
            self.vocab_too = nn.Linear(4, 7)
        if named:
            self.lm_head = nn.Linear(4, 7)
        if blocks:
            self.q_proj = nn.Linear(4, 4)
        if top:
            self.add_module(top, nn.Linear(4, 3))


def roles_of(model: nn.Module) -> dict[str, str]:
    _, groups = predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return {name: groups.roles[g] for name, g in zip(groups.names, groups.index, strict=True)}


@pytest.mark.parametrize(
    ("options", "role"),
    [({}, "head"), ({"first": True}, "head"), ({"twice": True}, "other"), ({"named": True}, "other"),
     ({"blocks": False}, "other"), ({"top": "decoder"}, "other")],
)  # fmt: skip
def test_a_head_without_a_name_is_known_by_its_shape(options: dict[str, Any], role: str) -> None:
    found = roles_of(Speaks(**options))
    assert (found["vocab.weight"], found["inside.weight"]) == (role, "other")
    assert roles_of(nn.ModuleDict({"module": Speaks(**options)}))["module.vocab.weight"] == role


@pytest.mark.parametrize("top", ["output", "decoder", "out", "out_proj", "fc_out", "logits", "generator"])
def test_a_head_by_a_common_name_is_one_at_the_top_of_a_network_of_blocks(top: str) -> None:
    assert roles_of(Speaks(top=top))[f"{top}.weight"] == "head"
    assert roles_of(nn.DataParallel(Speaks(top=top)))[f"module.{top}.weight"] == "head"
    assert roles_of(Speaks(top=top, named=True))[f"{top}.weight"] != "head"
    assert roles_of(Speaks(top=top, blocks=top == "out_proj"))["vocab.weight"] == "other"
    inside = nn.ModuleDict({"layers": nn.ModuleList([Speaks(top=top)])})
    assert roles_of(inside)[f"layers.0.{top}.weight"] != "head"


@pytest.mark.parametrize("first", [False, True])
def test_a_table_that_is_the_head_is_a_table_whichever_comes_first(first: bool) -> None:
    found = roles_of(Speaks(first=first, tied=True))
    assert found["vocab.weight" if first else "table.weight"] == "embedding"
    assert "head" not in found.values()
