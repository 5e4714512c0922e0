"""What a run watches: encodings, factors, health; null where nothing is asked for, gone where nothing is observed."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from cases import Fake, config, full_batch, loss_fn, make_batches, setup
from dynamics import through_bytes, turning
from hybrid_predict_trainer import ConfigError, HybridTrainer
from hybrid_predict_trainer.config.settings import EncoderConfig
from hybrid_predict_trainer.experiments.bench import encoding_cost
from hybrid_predict_trainer.observe.basis import Basis
from hybrid_predict_trainer.observe.kfac import KfacFactors
from hybrid_predict_trainer.observe.window_encoder import (
    NUM_KFAC_FEATURES,
    PCA_BLOCK,
    NullObserver,
    StateObserver,
    kfac_features,
    low_rank_features,
    observer_for,
)
from hybrid_predict_trainer.records import BasisSpec, Window
from hybrid_predict_trainer.weights.parameters import predicted_parameters

SPEC = BasisSpec(num_displacements=3, lag=True)


class Wanting(Fake):
    """Wants encodings, keeps its windows."""

    wants_encoding = True


def trained(num_steps: int = 30, predictor: Any = None, batches: Any = None, **changes: Any) -> HybridTrainer:
    settings = config(gate__overhead_budget=0.0, gate__overhead_budget_exact=0.0, **changes)
    trainer = setup("batchnorm", "adam").trainer(settings, predictor=predictor)
    for batch in make_batches(num_steps) if batches is None else batches:
        trainer.step(batch)
    return trainer


def observed(**settings: Any) -> tuple[StateObserver, Basis, list[Window]]:
    """An observer on a small model's basis, and windows to complete."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1))
    parameters, groups = predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=1.0))
    basis = Basis(parameters, groups, SPEC)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        basis.accumulate()
        with torch.no_grad():
            for p in parameters:
                p += torch.randn(p.shape)
        basis.close_window()
    observer = StateObserver(EncoderConfig(**settings), model, parameters, groups, SPEC)
    windows = [step.window for step in turning(SPEC, 60, num_groups=groups.num_groups)]
    return observer, basis, windows


# ---------------------------------------------------------------- what is built


def test_null_unless_asked_for() -> None:
    model = setup().model
    parameters, groups = predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=1.0))
    for settings, predictor, wanted in (
        ({}, Fake(), NullObserver), ({}, Wanting(), StateObserver), ({"health": 3}, Fake(), StateObserver),
        ({"kfac": True}, Fake(), StateObserver), ({"low_rank": 2}, Fake(), StateObserver),
        ({"sketch_size": 7, "latent_dim": 5}, Fake(), NullObserver),
    ):  # fmt: skip
        found = observer_for(EncoderConfig(**settings), predictor, model, parameters, groups, SPEC)
        assert type(found) is wanted, settings


@pytest.mark.parametrize(
    "settings", [{"sketch_size": -1}, {"latent_dim": 2000}, {"low_rank": -1}, {"kfac_memory_mb": 0.0}, {"health": -1}]
)
def test_ranges(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"encoder\.{next(iter(settings))}"):
        EncoderConfig(**settings)


# ---------------------------------------------------------------- encodings


@pytest.mark.parametrize("low_rank", [0, 2])
@pytest.mark.parametrize("kfac", [False, True])
def test_the_layout_covers_the_encoding(low_rank: int, kfac: bool) -> None:
    observer, basis, windows = observed(low_rank=low_rank, kfac=kfac, sketch_size=9, latent_dim=5)
    encoding = observer.complete(windows[0], basis).encoding
    assert encoding is not None
    stops = [0]
    for part in observer.layout.values():
        assert part.start == stops[-1]
        stops.append(part.stop)
    assert stops[-1] == len(encoding)
    sizes = [part.stop - part.start for part in observer.layout.values()]
    G = windows[0].products.num_groups
    assert sizes[1:] == [G * low_rank, G * NUM_KFAC_FEATURES * kfac, 9, 5]


def test_latent_joins_after_the_first_block_and_has_an_error() -> None:
    observer, basis, windows = observed(sketch_size=0, latent_dim=5)
    latents = []
    for window in windows:
        encoding = observer.complete(window, basis).encoding
        assert encoding is not None
        assert bool(torch.isfinite(encoding).all())
        latents.append(encoding[observer.layout["latent"]])
    assert float(torch.stack(latents[: PCA_BLOCK - 1]).abs().max()) == 0
    assert float(torch.stack(latents[PCA_BLOCK:]).abs().max()) > 0
    report = observer.summary()["encoder"]
    assert report["latent_dim"] == 5
    assert 0 < report["reconstruction_error"] < 1
    more, _, _ = observed(sketch_size=0, latent_dim=40)
    for window in windows:
        more.complete(window, basis)
    assert more.summary()["encoder"]["reconstruction_error"] < report["reconstruction_error"]


def test_constant_memory_over_ten_thousand_steps() -> None:
    """A thousand windows of ten steps: what is held after the principal directions are full stays as it is."""
    observer, basis, windows = observed(sketch_size=8, latent_dim=8, low_rank=2)
    sizes = set()
    for i in range(1000):
        observer.complete(windows[i % len(windows)], basis)
        if i >= 2 * PCA_BLOCK:
            sizes.add(observer.memory_bytes())
    assert len(sizes) == 1


def test_windows_of_a_run_are_encoded_for_who_wants_it() -> None:
    for predictor, wanted in ((Wanting(), True), (Fake(), False)):
        trained(20, predictor)
        assert {w.encoding is not None for w in predictor.observed} == {wanted}
    encodings = torch.stack([w.encoding for w in predictor.observed if w.encoding is not None] or [torch.zeros(1)])
    assert bool(torch.isfinite(encodings).all())


def test_low_rank_features_are_shares_of_a_group() -> None:
    energies = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = low_rank_features(energies, [0, 0, 2], 3)
    torch.testing.assert_close(found[0], torch.tensor([0.5, 0.25], dtype=torch.float64))
    assert float(found[1:].abs().max()) == 0


def test_kfac_features_are_means_over_layers() -> None:
    spectra = {"a": torch.tensor([6.0, 2.0, 1.0, 1.0]), "b": torch.tensor([6.0, 4.0, 1.0, 1.0]), "c": torch.ones(4)}
    found = kfac_features(spectra, {"a": 3, "b": 6, "c": 1}, {"a": 1, "b": 1}, 2)
    wanted = [0.5 * math.log(2.0), 0.5 * math.log(8.0), 0.0, 0.0]
    # order: mean square of the inputs, of the gradients, shares of either
    torch.testing.assert_close(found[1], torch.tensor([wanted[0], 0.0, wanted[1], 0.0], dtype=torch.float64))
    assert float(found[0].abs().max()) == 0


# ---------------------------------------------------------------- factors in a run


def test_factors_are_those_of_the_last_step_of_a_window() -> None:
    batches = make_batches(3)
    trainer = trained(3, Fake(), batches, encoder__kfac=True, predictor__window=3)
    reference = setup("batchnorm", "adam")
    reference.plain(batches[:2])
    with KfacFactors(reference.model) as wanted:
        loss_fn(reference.model, batches[2]).backward()
    found = trainer.run.windows.observer.state_dict()["parts"]["kfac"]
    assert found["A"].keys() == wanted.A.keys()
    for kind in ("A", "G"):
        for name, factor in getattr(wanted, kind).items():
            torch.testing.assert_close(found[kind][name], factor)


def test_gate_forwards_are_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jumps are judged between windows: the factors have seen one pass per window, no more."""
    counts = []
    original = KfacFactors.commit
    monkeypatch.setattr(KfacFactors, "commit", lambda self: (counts.append(len(self._pending)), original(self))[1])
    made = setup("mlp", "adam")
    trainer = made.trainer(config(encoder__kfac=True), predictor=Fake())
    for batch in full_batch(40):
        trainer.step(batch)
        assert all(not m._forward_hooks for m in made.model.modules())
    assert trainer.statistics()["num_jumps_proposed"] > 3
    assert set(counts) == {2}, "two layers, one pass each"
    assert len(counts) == trainer.run.windows.num_closed


def test_gradient_scaler_does_not_show() -> None:
    plain = trained(9, Fake(), encoder__kfac=True)
    made = setup("batchnorm", "adam")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=True)
    settings = config(encoder__kfac=True, gate__overhead_budget=0.0, gate__overhead_budget_exact=0.0)
    trainer = made.trainer(settings, predictor=Fake(), grad_scaler=scaler)
    for batch in make_batches(9):
        trainer.step(batch)
    a, b = (t.run.windows.observer.state_dict()["parts"]["kfac"]["G"] for t in (plain, trainer))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-8)


def test_a_loss_function_that_raises_takes_the_hooks_with_it() -> None:
    made = setup("mlp", "adam")

    def raising(model: nn.Module, batch: Any) -> torch.Tensor:
        model(batch[0])
        raise ValueError("no")

    trainer = made.trainer(config(encoder__kfac=True, predictor__window=1), loss_fn=raising)
    with pytest.raises(ValueError, match="no"):
        trainer.step(make_batches(1)[0])
    assert all(not m._forward_hooks for m in made.model.modules())


def test_factors_cost_what_they_cost() -> None:
    """Watching is charged: the counters of a run with factors are higher by the observer's passes per window."""
    bare, full = trained(12, Fake()), trained(12, Fake(), encoder__kfac=True, encoder__low_rank=2)
    assert full.run.windows.observer.passes > 0
    difference = full.run.meter.num_passes - bare.run.meter.num_passes
    assert difference == pytest.approx(full.run.windows.num_closed * full.run.windows.observer.passes)


# ---------------------------------------------------------------- health


def test_health_is_reported_every_so_many_windows(tmp_path: Any) -> None:
    path = tmp_path / "m.jsonl"
    trainer = trained(27, Fake(), encoder__health=2, metrics__path=str(path))
    trainer.metrics.sink.close()
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    reports = [e for e in events if e["event"] == "health"]
    assert len(reports) == 5  # windows 0, 2, 4, 6, 8 of nine
    names = [{c["name"] for c in report["checks"]} for report in reports]
    assert "gradient norm" in names[0], "the first is the checklist for after the first backward pass"
    assert all("norm / baseline" in n for n in names[1:])
    summary = trainer.summary()["health"]
    assert summary["num_reports"] == 5
    assert summary["num_failed"] == sum(not r["ok"] for r in reports)
    assert summary["layers"]


def test_no_health_unless_asked_for() -> None:
    assert "health" not in trained(9, Wanting()).summary()
    assert "encoder" in trained(9, Wanting()).summary()
    assert not {"health", "encoder"} & set(trained(9, Fake()).summary())


# ---------------------------------------------------------------- state


def test_round_trip() -> None:
    settings = {"sketch_size": 8, "latent_dim": 6, "low_rank": 2, "kfac": True, "health": 1}
    (source, basis, windows), (target, _, _) = observed(**settings), observed(**settings)
    for window in windows[:20]:
        source.complete(window, basis)
    target.load_state_dict(through_bytes(source.state_dict()))
    for window in windows[20:]:
        a, b = source.complete(window, basis).encoding, target.complete(window, basis).encoding
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


# ---------------------------------------------------------------- cost


def test_every_part_has_a_row_of_cost() -> None:
    rows = encoding_cost.measure("0.3M", num_windows=24)
    assert [row["variant"] for row in rows] == list(encoding_cost.VARIANTS)
    held = {row["variant"]: row["bytes"] for row in rows}
    assert held["state"] < held["sketch"] < held["default"] < held["low_rank"]
    assert all(row["encode_ms_median"] >= 0 for row in rows)
