"""`summary()` never raises, whatever losses a run has seen."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.records import Account, DivergenceError
from hybrid_predict_trainer.tell.sinks import jsonable
from hybrid_predict_trainer.tell.summary import correlation, histogram, mean

MAX = float(np.finfo(np.float64).max)
TINY = 5e-324


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0] * 5,
        [3.0] * 5,
        [0.1234567 + k * 1.4e-17 for k in range(5)],
        [1e30, 1e30 * (1 + 2e-16)],
        [1e30] * 3,
        [MAX, -MAX],
        [MAX, MAX],
        [TINY, 0.0, 2 * TINY],
        [1.0, math.nan, 2.0],
        [math.nan] * 3,
        [math.inf, -math.inf, 1.0],
        [1e-300, 1e300],
    ],
    ids=str,
)
def test_a_histogram_of_whatever_floats_there_are(values: list[float]) -> None:
    found = histogram(values, 20)
    finite = [v for v in values if math.isfinite(v)]
    counts, edges = found["counts"], found["edges"]
    assert (len(counts), len(edges)) == (20, 21)
    assert sum(counts) == len(finite)
    assert found.get("num_nonfinite", 0) == len(values) - len(finite)
    assert all(math.isfinite(e) for e in edges)
    assert edges == sorted(edges)
    if finite:
        assert edges[0] <= min(finite)
        assert edges[-1] >= max(finite) * (1 - 1e-15)


def test_an_ordinary_histogram_is_numpys() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, 256)
    counts, edges = np.histogram(values, bins=20)
    found = histogram(values.tolist(), 20)
    assert found["counts"] == counts.tolist()
    assert found["edges"] == pytest.approx(edges.tolist())
    assert histogram([2.0, 2.0], 4)["edges"] == pytest.approx([1.5, 1.75, 2.0, 2.25, 2.5])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(), max_size=40), st.integers(1, 40))
def test_no_floats_make_a_figure_raise(values: list[float], bins: int) -> None:
    found = histogram(values, bins)
    assert sum(found["counts"]) == sum(map(math.isfinite, values))
    pairs = list(zip(values, reversed(values), strict=True))
    related, middle = correlation(pairs), mean(values)
    assert related is None or -1 <= related <= 1
    assert middle is None or math.isfinite(middle)


def test_the_correlation_of_huge_and_tiny_numbers() -> None:
    for scale in (1e-200, 1.0, 1e200):
        pairs = [(scale * x, 2 * scale * x + scale) for x in (1.0, 2.0, 4.0)]
        assert correlation(pairs) == pytest.approx(1.0)
    assert correlation([(1.0, 2.0)] * 5) is None


def trained(losses: list[float], dtype: torch.dtype = torch.float64) -> HybridTrainer:
    """A trainer that is told those losses, one per step; the gradient is zero."""
    model = nn.Linear(2, 1).to(dtype)
    given_ = iter(losses)

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value = next(given_, losses[-1])
        return model(batch).sum() * 0 + torch.tensor(value, dtype=dtype)

    config = HybridTrainerConfig(warmup_steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = HybridTrainer(model, optimizer, config, loss_fn=loss_fn, lr_scheduler=schedule)
    batch = torch.ones(4, 2, dtype=dtype)
    with warnings.catch_warnings(), contextlib.suppress(DivergenceError):  # which ends a run as it should
        warnings.simplefilter("ignore")
        for _ in range(len(losses)):
            trainer.step(batch)
    return trainer


@pytest.mark.parametrize(
    "losses",
    [
        [0.1234567 + (k % 5) * 1.4e-17 for k in range(40)],
        [1e30 * (1 + (k % 3) * 3e-16) for k in range(40)],
        [0.0] * 40,
        [-3.0] * 40,
        [1e300 * (1 - k / 100) for k in range(40)],
        [1e-310 * (40 - k) for k in range(40)],
        [(-1) ** k * 1e308 for k in range(40)],
        [math.nan if k % 7 == 3 else 1.0 for k in range(40)],
        [math.inf if k % 9 == 5 else 2.0 - k / 100 for k in range(40)],
        [10.0 ** (k * 7) for k in range(40)],
        [10.0 ** (-k * 8) for k in range(40)],
    ],
    ids=["constant", "huge", "zero", "negative", "1e300", "subnormal", "swinging", "nan", "inf", "rising", "falling"],
)
def test_a_summary_of_whatever_losses_there_were(losses: list[float]) -> None:
    found = trained(losses).summary()
    assert "notes" not in found
    assert sum(found["histograms"]["loss"]["counts"]) > 0
    json.dumps(jsonable(found), allow_nan=False)


def test_a_figure_that_fails_is_null_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained([1.0] * 8)
    whole = trainer.summary()

    def broken(*_: Any) -> int:
        raise RuntimeError("no memory of that")

    monkeypatch.setattr(type(trainer.run.proposer.predictor), "memory_bytes", broken)
    monkeypatch.setattr(type(trainer.run.windows.observer), "summary", broken)
    found = trainer.summary()
    assert found["predictor_overhead"] is None
    assert [n.split(" ")[0] for n in found["notes"]] == ["predictor_overhead", "observer"]
    assert "no memory of that" in found["notes"][0]
    rest = {k: v for k, v in whole.items() if k in found and k != "predictor_overhead"}
    assert {k: found[k] for k in rest} == rest


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(), min_size=6, max_size=12))
def test_the_ledger_of_whatever_gains_there_were(gains: list[float]) -> None:
    trainer = trained([1.0] * 2)
    for k, gain in enumerate(gains):
        account = Account.__new__(Account)
        values = {"gain": gain, "left": gains[-1 - k], "pace": abs(gain), "skipped": k % 2 == 0}
        for name in Account.__dataclass_fields__:
            object.__setattr__(account, name, values.get(name, 1.0))
        trainer.run.judge.ledger.settled.append(account)
    found = trainer.summary()
    json.dumps(jsonable(found), allow_nan=False)
    assert trainer.statistics() is not None
