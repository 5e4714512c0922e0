"""Gradient health: what is measured, the zones, the two checklists, the table."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from cases import Tied, assert_same, everything, loss_fn, make_batches, setup
from hybrid_predict_trainer.observe import gradient_health as health
from hybrid_predict_trainer.observe.gradient_health import HealthReport, LayerHealth, Zone


def backward(made):
    loss_fn(made.model, make_batches(1)[0]).backward()
    return made.model


def report(gradient_norm=1.0, parameter_norm=1000.0, layers=()):
    return HealthReport(
        gradient_norm=gradient_norm, parameter_norm=parameter_norm, layers=tuple(layers),
        ratio=health.gradient_to_parameter(gradient_norm, parameter_norm), zone=health.zone_of(gradient_norm),
    )  # fmt: skip


def layer(norm, name="layer"):
    return LayerHealth(
        name=name, num_parameters=3, gradient_norm=norm, parameter_norm=1.0, ratio=norm, zone=health.zone_of(norm)
    )


def failed(checked):
    return [check.name for check in checked.checks if not check.passed]


# ---------------------------------------------------------------- measuring


def test_norms_of_layers_and_of_all():
    made = setup("batchnorm")
    model = backward(made)
    found = health.measure(model)
    assert [item.name for item in found.layers] == ["0", "1", "3"]
    first = model[0]
    flat = torch.cat([first.weight.grad.flatten(), first.bias.grad])
    assert found.layers[0].gradient_norm == pytest.approx(float(flat.norm()), rel=1e-5)
    weights = torch.cat([first.weight.flatten(), first.bias]).detach()
    assert found.layers[0].parameter_norm == pytest.approx(float(weights.norm()), rel=1e-5)
    assert found.layers[0].ratio == pytest.approx(float(flat.norm() / weights.norm()), rel=1e-5)
    assert found.layers[0].num_parameters == 6 * 8 + 8
    every = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert found.gradient_norm == pytest.approx(float(every.norm()), rel=1e-5)


def test_measuring_changes_nothing():
    made = setup("norm_dropout")
    backward(made)
    gradients = [p.grad.clone() for p in made.model.parameters()]
    before = made.everything()
    health.measure(made.model)
    assert_same(everything(made.model, made.optimizer), before)
    assert_same([p.grad for p in made.model.parameters()], gradients)


def test_frozen_is_left_out_and_shared_counts_once():
    assert [item.name for item in health.measure(backward(setup("frozen"))).layers] == ["0", "2"]
    assert health.measure(backward(setup("frozen"))).layers[0].num_parameters == 8  # its bias
    tied = Tied()
    loss_fn(tied, make_batches(1)[0]).backward()
    found = health.measure(tied)
    assert [item.name for item in found.layers] == ["first", "head"]
    assert sum(item.num_parameters for item in found.layers) == sum(p.numel() for p in tied.parameters())


def test_half_precision_and_weights_of_zero_and_no_gradient_at_all():
    model = nn.Linear(4, 4, bias=False).half()
    model.weight.grad = torch.full_like(model.weight, 6e4)  # the norm of 16 such entries is no float16
    assert health.measure(model).gradient_norm == pytest.approx(2.4e5, rel=1e-2)
    nn.init.zeros_(model.weight)
    found = health.measure(model)
    assert found.ratio is None
    assert "gradient / weights" in failed(health.pre_training(found))
    model.weight.grad = None
    assert health.measure(model).layers == ()
    assert not health.pre_training(health.measure(model)).ok


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_found_by_name(bad):
    model = backward(setup("mlp"))
    model[2].bias.grad[0] = bad
    found = health.pre_training(health.measure(model))
    assert [item.zone is Zone.NOT_FINITE for item in found.layers] == [False, True]
    assert "gradients finite" in failed(found)
    assert {c.name: c.value for c in found.checks}["gradients finite"] == "2"


# ---------------------------------------------------------------- zones and checklists


@pytest.mark.parametrize(
    ("norm", "zone"),
    [
        (0.0, "critical"), (0.0099, "critical"), (0.01, "low"), (0.099, "low"), (0.1, "healthy"), (10.0, "healthy"),
        (10.1, "high"), (100.0, "high"), (100.1, "critical"), (math.inf, "not finite"), (math.nan, "not finite"),
    ],
)  # fmt: skip
def test_zones(norm, zone):
    assert health.zone_of(norm) == zone


@pytest.mark.parametrize(
    ("found", "names"),
    [
        (report(), []),
        (report(11.0, 2000.0), ["gradient norm"]),
        (report(0.05, 50.0), ["gradient norm"]),
        (report(layers=[layer(0.5), layer(0.005)]), ["layer norms"]),
        (report(layers=[layer(101.0)]), ["layer norms"]),
        (report(parameter_norm=50.0), ["gradient / weights"]),
        (report(parameter_norm=20_000.0), ["gradient / weights"]),
        (report(math.nan), ["gradient norm", "gradient / weights", "gradients finite"]),
    ],
)
def test_checklist_before_training(found, names):
    checked = health.pre_training(found)
    assert failed(checked) == names
    assert checked.ok is (not names)
    assert all(bool(c.advice) is not c.passed for c in checked.checks)


def test_advice_points_the_right_way():
    def advice(found):
        return " ".join(c.advice for c in health.pre_training(found).checks)

    assert "reduce the learning rate" in advice(report(50.0, 50_000.0))
    assert "raise the learning rate" in advice(report(0.05, 50.0))
    assert "reduce" in advice(report(parameter_norm=50.0))
    assert "raise" in advice(report(parameter_norm=20_000.0))


STEADY = [1.0, 1.1, 0.9, 1.0] * 16


@pytest.mark.parametrize(
    ("found", "baseline", "norms", "names"),
    [
        (report(), 1.0, STEADY, []),
        (report(), 0.55, STEADY, []),
        (report(), 0.45, STEADY, ["norm / baseline"]),
        (report(), 2.1, STEADY, ["norm / baseline"]),
        (report(), 0.0, [], []),
        (report(), 1.0, STEADY[:32] + [1.0, 1.5, 0.5, 1.0] * 8, ["norm variance, growth"]),
        (report(), 1.0, [1.0] * 32 + STEADY[:32], []),  # nothing to compare with
        (report(layers=[layer(200.0)]), 1.0, STEADY, ["layer norms"]),
    ],
)
def test_checklist_of_every_hundred_steps(found, baseline, norms, names):
    assert failed(health.periodic(found, baseline=baseline, norms=norms)) == names


def test_variance_is_relative_and_blind_to_a_trend():
    generator = np.random.default_rng(0)
    noise = 1 + 0.1 * generator.standard_normal(20_000)
    assert health.norm_variance(noise.tolist()) == pytest.approx(0.01, rel=0.05)
    assert health.norm_variance((7 * noise).tolist()) == pytest.approx(0.01, rel=0.05)
    falling = np.linspace(3, 1, 20_000)
    assert health.norm_variance((falling + 0.2 * (noise - 1) / 0.1).tolist()) == pytest.approx(0.01, rel=0.05)
    assert math.isnan(health.norm_variance([1.0]))


def test_healthy_noise_is_hardly_ever_called_rising():
    generator = np.random.default_rng(0)
    norms = np.exp(0.2 * generator.standard_normal((1000, 64)))
    assert sum(not health.check_variance(row.tolist()).passed for row in norms) <= 10


# ---------------------------------------------------------------- text


def test_table_has_every_layer_and_check():
    found = health.pre_training(health.measure(backward(setup("mlp"))))
    lines = health.as_text(found).splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["layer", "0", "2", "all"]
    assert sum(line.startswith(("ok", "FAIL")) for line in lines) == len(found.checks) == 4
    json.dumps(found.as_dict())


def test_many_bad_layers_are_named_briefly():
    found = report(layers=[layer(0.001, f"block.{i}") for i in range(20)])
    text = next(c for c in health.pre_training(found).checks if c.name == "layer norms").value
    assert text.endswith("and 17 more")
