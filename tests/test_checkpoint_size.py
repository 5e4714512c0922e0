"""How large checkpoints are in multiples of the weights, and that what is not stored comes back all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import assert_same
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, cli, with_values
from hybrid_predict_trainer.cycle import predictor_choice, state
from hybrid_predict_trainer.keep import checkpoint, merged, migration, state_tree
from hybrid_predict_trainer.move import optimizer_step
from hybrid_predict_trainer.move.drift_storage import Storage
from hybrid_predict_trainer.weights import algebra as weights
from test_whole_state import of_an_older_build, unpacked

Batch = tuple[Tensor, Tensor]
#: By then the guard has a copy of the state, and windows have been closed.
NUM_STEPS = 100


def batches(count: int, *, same: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(8, 128, generator=generator) for _ in range(1 if same else count)]
    noise = [0.5 * torch.randn(8, 128, generator=generator) for _ in xs]
    return [(x, x.sin() + n) for x, n in zip(xs, noise, strict=True)] * (count if same else 1)


def mean_square(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def trainer_for(seed: int = 0, **settings: Any) -> HybridTrainer:
    """Blocks of 66,000 weights: beside them random states and inner products count for little."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    values = {"lookahead.scope": "all", **{name.replace("__", "."): value for name, value in settings.items()}}
    return HybridTrainer(model, optimizer, with_values(HybridTrainerConfig(), values), mean_square, schedule)


def as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a model of over a million weights."""
    for module in (predictor_choice, state, optimizer_step, weights):
        monkeypatch.setattr(module, "LARGE", 0)


#: Name -> (large, same batch, settings, most times the weights).
TABLE: dict[str, tuple[bool, bool, dict[str, Any], float]] = {
    "default": (True, False, {}, 12.0),
    "without predictor": (True, False, {"checkpoint__include_predictor": False}, 6.0),
    "small, without predictor": (False, False, {"checkpoint__include_predictor": False}, 6.0),
    # weights and moments 3, lookahead 2, copy to come back to 5; in float64: x, g and open sums 8, 4 displacements 8
    "small": (False, False, {}, 3 + 2 + 5 + 8 + 8),
    # in float64: x and g 4, s and y of each pair 4, two columns more 4
    "pairs": (False, True, {"predictor__type": "quasi_newton", "predictor__quasi_newton__history": 8}, 3 + 4 + 36.5),
}


@pytest.mark.parametrize("name", TABLE)
def test_checkpoints_are_at_most_so_large(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    large, same, settings, most = TABLE[name]
    if large:
        as_large(monkeypatch)
    trainer = trainer_for(**settings)
    for batch in batches(NUM_STEPS, same=same):
        trainer.step(batch)
    path = trainer.save_checkpoint(tmp_path)
    assert cli.main(["inspect", str(path), "--json"]) == 0
    held = json.loads(capsys.readouterr().out)["held"]
    sizes = {item["purpose"]: item["times_weights"] for item in held}
    total = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    assert sum(item["bytes"] for item in held) == pytest.approx(total, rel=0.05), "every byte has an owner"
    assert sizes["weights and buffers"] == 1
    assert sizes["optimizer state"] == pytest.approx(2, rel=0.01)
    assert most / 2 < sum(sizes.values()) <= most, sizes
    copies = [purpose for purpose in sizes if purpose.startswith("guard")]
    assert bool(copies) == (name in ("default", "small")), "the guard has a copy by then"
    if name == "pairs":
        assert sizes["basis: displacements, differences of gradients"] == pytest.approx(36, rel=0.01)
        assert "basis: sums of the open window" not in sizes, "a window of one step is closed"


@pytest.mark.parametrize("settings", [{}, {"predictor__type": "quasi_newton", "predictor__quasi_newton__history": 40}])
@pytest.mark.parametrize("stop", [7, 50])
def test_what_is_left_out_changes_nothing(settings: dict[str, Any], stop: int, tmp_path: Path) -> None:
    """Empty columns, sums of nothing and equal tensors: the run goes on bit for bit."""
    data = batches(80, same=bool(settings))
    whole = trainer_for(**settings)
    for batch in data[:stop]:
        whole.step(batch)
    path = whole.save_checkpoint(tmp_path)
    resumed = trainer_for(seed=3, **settings)
    resumed.load_checkpoint(path)
    for batch in data[stop:]:
        whole.step(batch)
        resumed.step(batch)
    assert_same(resumed.run.state_dict(), whole.run.state_dict())
    assert_same(resumed.run.windows.basis.state_dict(), whole.run.windows.basis.state_dict())
    assert_same(dict(resumed.run.subject.model.state_dict()), dict(whole.run.subject.model.state_dict()))


# ---------------------------------------------------------------- equal tensors


def through(value: Any) -> tuple[Any, dict[str, Tensor]]:
    tree, tensors = merged.merged(*state_tree.encode(value))
    return state_tree.decode(json.loads(json.dumps(tree)), {k: t.clone() for k, t in tensors.items()}), tensors


def test_equal_tensors_are_stored_once_and_come_back_apart() -> None:
    t = torch.randn(50, 40)
    value = {"a": t, "b": [t.clone()], "tied": t, "other": t + 1, "small": torch.ones(3), "small too": torch.ones(3)}
    found, stored = through(value)
    assert set(stored) == {"a", "other", "small", "small too"}
    for key in ("a", "other", "small", "small too", "tied"):
        assert torch.equal(found[key], value[key])  # type: ignore[arg-type]
    assert found["tied"] is found["a"], "what was one object is one"
    found["b"][0].zero_()
    assert torch.equal(found["a"], t), "what was two is two"


def test_tied_copies_stay_tied_among_themselves() -> None:
    t = torch.randn(50, 40)
    copy = t.clone()
    found, stored = through({"a": t, "b": copy, "c": copy})
    assert set(stored) == {"a"}
    assert found["b"] is found["c"]
    assert found["b"] is not found["a"]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2000), -torch.zeros(2000)),
        (torch.zeros(2000), torch.zeros(2000, dtype=torch.int32)),
        (torch.zeros(2000), torch.zeros(1000, 2)),
        (torch.zeros(2000), torch.zeros(2000).index_fill_(0, torch.tensor([1999]), 1e-45)),
    ],
    ids=["sign of zero", "type", "shape", "last bit"],
)
def test_what_differs_in_a_bit_is_stored_twice(a: Tensor, b: Tensor) -> None:
    found, stored = through([a, b])
    assert len(stored) == 2
    assert all(torch.equal(f.view(torch.int32), t.view(torch.int32)) for f, t in zip(found, [a, b], strict=True))


def test_nan_equals_itself_and_strides_are_kept() -> None:
    t = torch.full((40, 50), float("nan"))
    found, stored = through([t, t.clone().t().contiguous().t()])
    assert len(stored) == 1
    assert found[1].stride() == (1, 40)
    assert found[1].isnan().all()


def test_a_small_file_does_not_ask_for_all_memory() -> None:
    """As many copies as may be read are merged, and no more."""
    found, stored = through([torch.zeros(2000) for _ in range(100)])
    assert len(stored) == -(-100 // (merged.MAX_GROWTH + 1))
    assert len({t.data_ptr() for t in found}) == 100


def test_the_weights_file_holds_every_name(tmp_path: Path) -> None:
    state_dict = {"a": torch.zeros(2000), "b": torch.zeros(2000)}
    path = checkpoint.save(tmp_path, 1, {"model": state_dict, "trainer": dict(state_dict)})
    assert set(state_tree.read_tensors(path / "model_weights.safetensors")) == {"a", "b"}
    assert set(state_tree.read_tensors(path / "trainer_state.safetensors")) == {"a"}
    assert_same(checkpoint.load(path).parts["trainer"], state_dict)


# ---------------------------------------------------------------- format 4


def test_a_checkpoint_of_format_4_goes_on_as_it_did(tmp_path: Path) -> None:
    """Its basis is full of empty columns; the state at step 40 is what the build that wrote it came to."""
    trainer = of_an_older_build(**{"predictor.secant.num_displacements": 6})
    with unpacked(tmp_path, "format_4.zip") as path:
        loaded = checkpoint.load(path)
        trainer.load_checkpoint(path)
        wanted = state_tree.read_tensors(path.with_name("weights_40.safetensors"))
    assert loaded.manifest.format_version == 4
    columns = loaded.parts["predictor"]["basis"]["columns"]
    assert len(columns[0]) > trainer.run.windows.basis.num_columns >= 2
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        x = torch.randn(8, 2, generator=generator)
        trainer.step((x, x.sum(1, keepdim=True).sin()))
    for name, value in trainer.run.subject.model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("narrow", [True, False])
def test_a_drift_comes_in_either_form(narrow: bool) -> None:
    drift = torch.randn(100, generator=torch.Generator().manual_seed(0))
    small, large = Storage(narrow=False), Storage(narrow=True)
    stored = large.put_drift(drift)
    wide = stored.wide()  # type: ignore[union-attr]
    forms = (wide, stored.state_dict())  # type: ignore[union-attr]
    live = forms[narrow]
    for form in forms:
        run = {"optimizer_step": {"lookahead": {"theta_0": [], "b": [form]}, "of_settings": {}}, "safety": [
            {"others": [{"theta_0": [], "b": [form]}]}]}  # fmt: skip
        found = migration.with_later(run, {"optimizer_step": {"lookahead": {"b": [live]}}})
        for place in (found["optimizer_step"]["lookahead"], found["safety"][0]["others"][0]):
            assert_same(place["b"][0], live)
        assert torch.equal(large.put_state(form).wide(), wide)  # type: ignore[union-attr]
        assert torch.equal(small.put_state(form), wide)  # type: ignore[arg-type]
