"""The encoded state: fixed size, finite, scale free where it should be, cheap."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dynamics import through_bytes, turning
from hybrid_predict_trainer.observe.encoder import NUM_GROUP_FEATURES, Encoder, encode, encoding_size, symexp, symlog
from hybrid_predict_trainer.observe.loss_features import NUM_LOSS_FEATURES
from hybrid_predict_trainer.records import BasisSpec

SPEC = BasisSpec(num_displacements=4, lag=True, optimizer=True)


def windows(num: int = 8, num_groups: int = 2) -> list:
    return [step.window for step in turning(SPEC, num, num_groups=num_groups)]


def group_part(encoding: torch.Tensor, num_groups: int = 2) -> torch.Tensor:
    return symexp(encoding[-NUM_GROUP_FEATURES * num_groups :].double()).view(num_groups, NUM_GROUP_FEATURES)


@pytest.mark.parametrize("num_groups", [1, 2, 11])
def test_size_depends_on_the_groups_alone(num_groups: int) -> None:
    sizes = {len(encode(w, SPEC)) for w in windows(num_groups=num_groups)}
    assert sizes == {encoding_size(num_groups)}


def test_symlog_and_back() -> None:
    x = torch.tensor([-1e6, -1.0, 0.0, 1e-9, 3.0, 1e12], dtype=torch.float64)
    torch.testing.assert_close(symexp(symlog(x)), x)
    assert bool(torch.isfinite(symlog(torch.tensor([float("nan"), float("inf"), -float("inf")]))).all())


def test_group_features_are_what_they_say() -> None:
    window = windows()[-1]
    found = group_part(encode(window, SPEC))
    BB = window.products.BB
    length = BB.diagonal(dim1=1, dim2=2).sqrt()
    torch.testing.assert_close(found[:, 0], (length[:, 0] / 8).log().double(), atol=1e-4, rtol=1e-4)  # 64 weights each
    torch.testing.assert_close(found[:, 1], (length[:, 0] / length[:, 1]).log(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found[:, 3], BB[:, 0, 1] / (length[:, 0] * length[:, 1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 5], BB[:, 1, 2] / (length[:, 1] * length[:, 2]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[:, 8], (length[:, 0] / length[:, 4]).log(), atol=1e-4, rtol=1e-3)


def test_gradient_cosine() -> None:
    window = windows()[-1]
    products = window.products
    gg = torch.full_like(products.gg, 9.0)
    Bg = torch.zeros_like(products.Bg)
    Bg[:, 0] = -0.5 * 3.0 * products.BB[:, 0, 0].sqrt()
    found = group_part(encode(replace(window, products=replace(products, Bg=Bg, gg=gg)), SPEC))
    torch.testing.assert_close(found[:, 7], torch.full((2,), -0.5, dtype=torch.float64), atol=1e-4, rtol=1e-4)


def test_planned_learning_rate_is_seen() -> None:
    window = windows()[-1]
    start = NUM_LOSS_FEATURES
    halved = encode(replace(window, lr_ahead=0.5 * window.lr_ahead), SPEC)[start + 4]
    assert float(symexp(halved)) == pytest.approx(-0.693, abs=1e-3)
    assert float(encode(window, SPEC)[start + 4]) == 0


def test_changes_since_the_previous_window() -> None:
    first, second = windows()[-2:]
    one = encode(first, SPEC)
    alone, after = encode(second, SPEC), encode(second, SPEC, [one])
    start, n = NUM_LOSS_FEATURES, 10
    assert float(alone[start + n : start + 2 * n].abs().max()) == 0
    torch.testing.assert_close(after[start + n : start + 2 * n], alone[start : start + n] - one[start : start + n])


def test_sketch_slot() -> None:
    window = windows()[-1]
    sketch = torch.randn(100)
    filled, empty = encode(window, SPEC, sketch=sketch, sketch_size=100), encode(window, SPEC, sketch_size=100)
    assert len(filled) == len(empty) == encoding_size(2, 100)
    torch.testing.assert_close(filled[-100:], sketch / sketch.norm())
    assert float(empty[-100:].abs().max()) == 0


def test_degenerate_windows_are_finite() -> None:
    window = windows()[-1]
    p = window.products
    broken = (
        replace(window, loss=float("nan"), loss_slope=float("nan"), gradient_norm=float("inf")),
        replace(window, lr_ahead=0.0, lr_integral=0.0, learning_rate=0.0),
        replace(window, products=replace(p, BB=torch.zeros_like(p.BB), gg=torch.zeros_like(p.gg))),
        replace(window, products=replace(p, BB=p.BB + float("nan"), Bg=p.Bg + float("inf"))),
        replace(window, group_sizes=(0, 0)),
    )
    for w in broken:
        assert bool(torch.isfinite(encode(w, SPEC)).all())


def test_standardised_and_round_trip() -> None:
    encoder, resumed = Encoder(2, SPEC), Encoder(2, SPEC)
    encodings = torch.stack([encoder.observe(w) for w in windows(60)])
    standard = encoder.standardise(encodings)
    moving = encodings.std(dim=0) > 1e-3
    torch.testing.assert_close(standard[:, moving].mean(dim=0), torch.zeros(int(moving.sum())), atol=0.2, rtol=0)
    assert float(standard.abs().max()) <= 5
    assert float(standard[:, encodings.std(dim=0) == 0].abs().max()) == 0
    resumed.load_state_dict(through_bytes(encoder.state_dict()))
    window = windows(61)[-1]
    assert torch.equal(encoder.observe(window), resumed.observe(window))
    assert torch.equal(encoder.standardise(encodings), resumed.standardise(encodings))
