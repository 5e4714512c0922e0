"""What a large model's run holds between steps: a basis where it is worth it, copies narrow, sampled or on the host."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import assert_same
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, with_values
from hybrid_predict_trainer.cycle import predictor_choice, state
from hybrid_predict_trainer.experiments.bench import memory
from hybrid_predict_trainer.move import optimizer_step
from hybrid_predict_trainer.move.drift_storage import Narrow, Storage, fetched
from hybrid_predict_trainer.move.lookahead import DriftLookahead
from hybrid_predict_trainer.move.lr_multiplier import LrMultiplier
from hybrid_predict_trainer.observe import sketch
from hybrid_predict_trainer.observe.sketch import MAX_REFUSED, PAUSE, PREDICTABLE, Sketch
from hybrid_predict_trainer.weights import algebra as weights
from hybrid_predict_trainer.weights.parameters import Groups

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as a large one."""
    for module in (predictor_choice, state, optimizer_step, weights):
        monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(weights, "sampled", lambda t: t if t.numel() < 8 else t.reshape(-1)[::3])


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def fresh(num: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(16, 6, generator=generator) for _ in range(num)]
    return [(x, x[:, :2] + 0.5 * torch.randn(16, 2, generator=generator)) for x in xs]


def mean_square(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def trainer_for(model: nn.Module, num_steps: int = 200, **settings: Any) -> HybridTrainer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    values = {"training.warmup_steps": 3, "lookahead.scope": "all", "predictor.window": 4}
    values |= {name.replace("__", "."): value for name, value in settings.items()}
    return HybridTrainer(model, optimizer, with_values(HybridTrainerConfig(), values), mean_square, schedule)


# ---- the sketch --------------------------------------------------------------------------------------


def seen(path: list[Tensor]) -> Sketch:
    """A sketch of weights that take these values, one per window."""
    p = nn.Parameter(path[0].clone())
    sketch = Sketch([p])
    for value in path:
        with torch.no_grad():
            p.copy_(value)
        sketch.add_step()
        sketch.close_window(1, jumped=False)
    return sketch


def walk(num: int, drift: float, noise: float, settled: float) -> list[Tensor]:
    """Weights that drift, wander by ``noise`` a window, and are seen under a noise that does not add up."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(3000, generator=generator)
    at, path = torch.zeros(3000), []
    for _ in range(num):
        at = at + drift * direction + noise * torch.randn(3000, generator=generator)
        path.append(at + settled * torch.randn(3000, generator=generator))
    return path


@pytest.mark.parametrize(
    ("drift", "noise", "settled", "predictable"),
    [
        (1.0, 0.0, 0.0, True),  # a full batch
        (1.0, 0.3, 0.1, True),
        (0.1, 1.0, 0.0, False),  # text: a cosine of 0.1 to 0.2
        (0.0, 1.0, 0.0, False),
        (0.0, 0.0, 1.0, False),  # neighbours agree against their common mean: that is no drift
    ],
)
def test_displacements_that_go_on_are_predictable(
    drift: float, noise: float, settled: float, predictable: bool
) -> None:
    assert seen(walk(12, drift, noise, settled)).predictable is predictable


def test_a_sample_says_what_all_weights_say() -> None:
    path = [torch.cat([piece] * 20) for piece in walk(9, 1.0, 1.5, 0.0)]  # 60,000 weights, of which 4,096 are seen
    s = [b - a for a, b in itertools.pairwise(path)]
    whole = torch.cosine_similarity(s[-1], sum(s[-6:-2], torch.zeros(())), dim=0)
    assert seen(path).cosines[-1] == pytest.approx(float(whole), abs=0.06)


def test_too_few_windows_say_nothing() -> None:
    assert not seen(walk(8, 1.0, 0.0, 0.0)).predictable
    assert seen(walk(9, 1.0, 0.0, 0.0)).predictable


def test_a_basis_that_does_not_pay_is_given_back_for_a_while() -> None:
    made = seen(walk(12, 1.0, 0.0, 0.0))
    for _ in range(MAX_REFUSED - 1):
        made.on_verdict(False)
    made.on_verdict(True)
    assert not made.disappoints
    for _ in range(MAX_REFUSED):
        made.on_verdict(False)
    assert made.disappoints
    made.pause()
    waited = 0
    while not made.predictable:
        made.add_step()
        made.close_window(1, jumped=True)
        waited += 1
    assert waited == PAUSE


def test_a_sketch_goes_through_a_file() -> None:
    path = walk(14, 1.0, 0.5, 0.0)
    whole, first = seen(path), seen(path[:9])
    p = first._parameters[0]
    other = Sketch([p])
    other.load_state_dict(first.state_dict())
    for value in path[9:]:
        with torch.no_grad():
            p.copy_(value)
        other.add_step()
        other.close_window(1, jumped=False)
    assert list(other.cosines) == list(whole.cosines)


# ---- runs ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("large")
def test_no_basis_on_noisy_batches() -> None:
    trainer = trainer_for(network())
    for batch in fresh(60):
        trainer.step(batch)
    run = trainer.run
    assert run.windows.num_closed >= 5
    assert len(run.windows.sketch.cosines) > 0
    assert max(run.windows.sketch.cosines) < PREDICTABLE
    assert run.windows.basis.memory_bytes() == {}
    assert trainer.statistics()["num_jumps_proposed"] == 0
    kept = trainer_for(network(), predictor__keep_basis=True)
    for batch in fresh(60):
        kept.step(batch)
    assert sum(kept.run.windows.basis.memory_bytes().values()) > 0


@pytest.mark.usefixtures("large")
def test_a_full_batch_run_is_the_same_with_and_without_the_trial() -> None:
    ends = []
    for keep in (False, True):
        model = network()
        trainer = trainer_for(model, predictor__keep_basis=keep, lookahead__extrapolation=0.0, lookahead__damping=0.0)
        batch = fresh(1)[0]
        for _ in range(60):
            trainer.step(batch)
        assert trainer.statistics()["num_jumps_accepted"] > 5
        ends.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert_same(*ends)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("predictor", ["secant", "hold", "linear"])
def test_exact_losses_wake_the_basis(predictor: str) -> None:
    trainer = trainer_for(network(), predictor__type=predictor, predictor__rest_windows=0)
    batch = fresh(1)[0]
    for _ in range(40):
        trainer.step(batch)
    assert trainer.run.windows.keeping
    assert trainer.run.windows.basis.num_columns > 0
    assert trainer.statistics()["num_jumps_proposed"] > 0


@pytest.mark.usefixtures("large")
def test_a_basis_is_taken_where_displacements_go_on_and_released_where_they_stop() -> None:
    trainer = trainer_for(network(), predictor__rest_windows=0, gate__overhead_budget=0.0)
    recorder = trainer.run.windows
    recorder.sketch.cosines.extend([0.9, 0.9, 0.9])
    batches = iter(fresh(80))
    for _ in range(12):
        trainer.step(next(batches))
    assert recorder.keeping
    assert sum(recorder.basis.memory_bytes().values()) > 0
    recorder.sketch.cosines.extend([0.1, 0.1, 0.1])
    for _ in range(8):
        trainer.step(next(batches))
    assert not recorder.keeping
    assert recorder.basis.memory_bytes() == {}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("steps", [7, 22, 41])
def test_resume_is_bitwise(steps: int, tmp_path: Path) -> None:
    batches = fresh(60)
    models = [network(), network(5)]
    whole = trainer_for(models[0])
    for batch in batches[:steps]:
        whole.step(batch)
    path = whole.save_checkpoint(tmp_path)
    second = trainer_for(models[1])
    second.load_checkpoint(path)
    for batch in batches[steps:]:
        whole.step(batch)
        second.step(batch)
    assert_same(*({n: p.detach() for n, p in model.named_parameters()} for model in models))
    assert list(second.run.windows.sketch.cosines) == list(whole.run.windows.sketch.cosines)


@pytest.mark.usefixtures("large")
def test_what_is_held_is_within_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "NUM_SAMPLED", 256)  # the same share of this model as 4,096 of one of five million
    monkeypatch.setattr(weights, "sampled", lambda t: t.reshape(-1)[::17])
    default, offload = memory.held(preset="0.3M", num_steps=30)
    assert 1 < default["ratio"] <= 1.5
    assert 1 < offload["ratio"] <= 1.05
    assert "lookahead 1.5" in default["in_weights"]
    assert "lookahead_host" in offload["in_weights"]


def test_what_counts_as_gone_from_the_training_device() -> None:
    usage = {"basis_cpu": 5, "lookahead": 2, "snapshots_host": 7}
    assert memory.on_training_device(usage, "cpu", offload=False) == 7
    assert memory.on_training_device(usage, "cpu", offload=True) == 2
    assert memory.on_training_device(usage, "cuda", offload=False) == 2


# ---- how the lookahead is stored -------------------------------------------------------------------------


def stepped(storage: Storage) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(40, 3, generator=generator)),
        nn.Parameter(torch.randn(7, generator=generator)),
    ]
    lookahead = DriftLookahead(0.3, 0.2, storage=storage)
    for _ in range(30):
        lookahead.before_step(parameters)
        with torch.no_grad():
            for p in parameters:
                p.add_(0.02 + 0.01 * torch.randn(p.shape, generator=generator))
        lookahead.after_step(parameters, 0.1, pull=1.0, strength=1.0)
    return [p.detach() for p in parameters]


def test_on_the_host_it_is_the_same() -> None:
    for a, b in zip(stepped(Storage()), stepped(Storage(to_host=True)), strict=True):
        assert torch.equal(a, b)


def test_narrow_it_is_nearly_the_same() -> None:
    for a, b, start in zip(
        stepped(Storage()), stepped(Storage(narrow=True)), stepped(Storage(narrow=True)), strict=True
    ):
        assert torch.equal(b, start)
        assert not torch.equal(a, b)
        assert (a - b).abs().max() < 1e-3 * a.abs().max()


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20, 0.0])
def test_a_narrow_drift_comes_back_as_it_was(size: float) -> None:
    drift = size * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    storage = Storage(narrow=True)
    once = storage.put_drift(drift)
    assert isinstance(once, Narrow)
    wide = fetched(once, drift.device)
    assert (wide - drift).abs().max() <= 2**-11 * drift.abs().max()
    assert torch.equal(fetched(storage.put_drift(wide), drift.device), wide)


def test_whole_copies_are_made_of_the_groups_that_are_shortened_only(large: None) -> None:
    groups = Groups(("block", "table"), (0, 1), ("attention matrix", "embedding"), (32, 32))
    before = [torch.arange(32.0), torch.arange(32.0)]
    after = [before[0] + 1, before[1] + 1]
    scale = LrMultiplier(groups, 100.0, 0.25, untrained=True)
    assert scale.cuts.factors == [0.25, 1.0]
    weights_now = [t.clone() for t in before]
    scale.before_step(weights_now)
    assert [t.numel() for t in scale.held] == [32, 11]  # the second is shortened by nobody
    for now, t in zip(weights_now, after, strict=True):
        now.copy_(t)
    scale.after_step(weights_now)
    assert torch.equal(weights_now[0], before[0] + 0.25)
    assert torch.equal(weights_now[1], after[1])
    assert [t.tolist() for t in scale.held] == [before[0][::3].tolist(), before[1][::3].tolist()]


def test_a_sample_covers_every_column() -> None:
    t = torch.arange(64 * 512).view(64, 512)
    places = weights.sampled(t)
    assert places.numel() == -(-t.numel() // 17)
    assert len(set((places % 512).tolist())) == 512
    small = torch.ones(5)
    assert weights.sampled(small) is small
