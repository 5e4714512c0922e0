"""Faults: broken predictors, losses that are not finite, odd parameters.  The run goes on and says so."""

from __future__ import annotations

import copy
import json
import math
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import (
    PREDICTOR_FAULTS,
    WIDTH,
    Broken,
    Fake,
    Setup,
    assert_same,
    config,
    difference,
    full_batch,
    loss_fn,
    make_batches,
    make_model,
    put_into_subject,
    setup,
    steps_until,
)
from hybrid_predict_trainer import DivergenceError, GateConfig, HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.cost import STEP_UNITS
from hybrid_predict_trainer.observe.history import Readout
from hybrid_predict_trainer.records import BasisSpec, Level, Phase, PhasePrediction, Reason

NAN, INF = float("nan"), float("inf")

# ---------------------------------------------------------------- predictors

RAISING = {
    "ready_raises",
    "observe_raises",
    "predict_raises",
    "returns_none",
    "coefficients_none",
    "a_list",
    "a_string",
    "complex",
    "horizon_zero",
    "horizon_negative",
}
REFUSED_AS = {
    "nan": Reason.NOT_FINITE, "one_nan": Reason.NOT_FINITE, "inf": Reason.NOT_FINITE, "too_wide": Reason.WRONG_SHAPE,
    "too_flat": Reason.WRONG_SHAPE, "transposed": Reason.WRONG_SHAPE, "huge": Reason.TOO_LONG, "zero": Reason.ZERO_JUMP,
}  # fmt: skip


def test_every_fault_has_an_expected_answer() -> None:
    assert set(PREDICTOR_FAULTS) == RAISING | set(REFUSED_AS)


@pytest.mark.parametrize("data", [make_batches, full_batch], ids=["noisy", "exact"])
@pytest.mark.parametrize("fault", PREDICTOR_FAULTS)
def test_broken_predictor_leaves_plain_training(fault: str, data: Callable) -> None:
    batches = data(30)
    plain = setup("norm_dropout", "adamw", "lambda")
    wanted = plain.plain(batches)
    ours = setup("norm_dropout", "adamw", "lambda")
    predictor = Broken(fault)
    predictor.scale = 1.0  # uphill, where it gets that far
    trainer = ours.trainer(config(gate__max_relative_length=1e6), predictor=predictor)
    results = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(batches, progress_callback=results.append)
    assert [r.loss for r in results if r.phase is not Phase.PREDICT] == wanted
    assert_same(ours.everything(), plain.everything())
    told = [w for w in caught if "predictor 'fake' failed" in str(w.message)]
    counts = trainer.statistics()
    if fault in RAISING:
        assert counts["num_predictor_failures"] == 3, "three strikes and it is out"
        assert len(told) == 1, "said once"
    else:
        assert counts["num_predictor_failures"] == 0
        assert {r.verdict.reason for r in results if r.verdict} == {REFUSED_AS[fault]}
        assert counts["num_jumps_proposed"] >= 2


def test_a_predictor_that_cannot_be_saved(tmp_path: Path) -> None:
    class Unsaveable(Fake):
        def state_dict(self) -> dict[str, Any]:
            raise RuntimeError("no state")

    trainer = setup().trainer(config(), predictor=Unsaveable())
    batches = make_batches(12)
    for batch in batches[:8]:
        trainer.step(batch)
    with pytest.raises(RuntimeError, match="no state"):
        trainer.save_checkpoint(tmp_path)
    assert not list(tmp_path.glob("checkpoint_*"))
    assert trainer.step(batches[8]).loss > 0


class Adversary(Fake):
    """Always confident, always wrong: random directions with glowing promises."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.spec = BasisSpec(num_displacements=4, gradient=True)
        self.length, self.generator = scale, torch.Generator().manual_seed(3)

    def coefficients(self) -> Tensor:
        return self.length * torch.randn(
            self.num_groups, self.spec.num_columns, generator=self.generator, dtype=torch.float64
        )

    def predict(self, horizon: int) -> PhasePrediction:
        given = super().predict(horizon)
        return PhasePrediction(
            coefficients=given.coefficients,
            horizon=horizon,
            predicted_loss=-1.0,
            confidence=1.0,
            max_scale=8.0,
            predicted_reduction=1e3,
            alternatives=(2 * given.coefficients, -given.coefficients),
        )


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
@pytest.mark.parametrize("data", ["noisy", "noise-free"])
def test_adversary_costs_little(scale: float, data: str) -> None:
    """A budget of 1 % and the default back-off: at most 2 % dearer, and the end as good as the baseline's."""
    steps = 900
    batches = make_batches(steps, 16, noise=0.3 if data == "noisy" else 0.0)
    plain = setup("mlp", "adam")
    plain.plain(batches)
    ours = setup("mlp", "adam")
    settings = HybridTrainerConfig(warmup_steps=50, gate=GateConfig(overhead_budget=0.01))
    trainer = ours.trainer(settings, predictor=Adversary(scale))
    trainer.fit(batches, total_steps=steps)
    test = make_batches(1, 2000, seed=7, noise=0.3 if data == "noisy" else 0.0)[0]
    with torch.no_grad():
        loss, baseline = float(loss_fn(ours.model, test)), float(loss_fn(plain.model, test))
    counts = trainer.statistics()
    assert counts["num_jumps_proposed"] >= 2
    assert loss <= 1.1 * baseline + 1e-3
    spent = trainer.run.judge.ledger.spent_units - trainer.run.judge.ledger.returned_units
    assert spent <= 0.011 * steps * STEP_UNITS + 5 * STEP_UNITS, "one proposal over the budget at most"
    assert counts["cost_units"] <= 1.02 * STEP_UNITS * trainer.run.meter.num_attempted_steps + 5 * STEP_UNITS


# ---------------------------------------------------------------- not finite


def poison(batch: tuple[Tensor, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    x, y = (t.clone() for t in batch)
    if kind == "nan_loss":
        y[0] = NAN
    elif kind == "inf_loss":
        y[0] = INF
    elif kind == "nan_input":
        x[0, 0] = NAN
    elif kind == "nan_gradient":
        x = torch.cat([x, torch.full_like(x[:, :1], NAN)], dim=1)  # see GradientTrap
    return x, y


class GradientTrap(nn.Module):
    """Passes its input on; a column of NaN behind it spoils the gradient, not the value."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x[:, :WIDTH])
        if x.shape[1] > WIDTH and out.requires_grad:
            out.register_hook(lambda grad: grad * NAN)
        return out


def trapped(seed: int = 1, model: str = "norm_dropout") -> Setup:
    made = setup(model, "adam", "lambda", seed)
    made.model = GradientTrap(made.model)
    return made


def plain_skipping(made: Setup, batches: list[Any]) -> list[float]:
    """The plain loop that leaves out every step whose loss or gradient is not finite."""
    losses = []
    for batch in batches:
        buffers = copy.deepcopy(dict(made.model.named_buffers()))
        made.optimizer.zero_grad()
        loss = loss_fn(made.model, batch)
        loss.backward()
        grads = [p.grad for p in made.model.parameters()]
        if torch.isfinite(loss) and all(bool(torch.isfinite(g).all()) for g in grads):
            made.optimizer.step()
            losses.append(loss.item())
        else:
            with torch.no_grad():
                for name, buffer in made.model.named_buffers():
                    buffer.copy_(buffers[name])
        made.scheduler.step()
    return losses


KINDS = ("nan_loss", "inf_loss", "nan_input", "nan_gradient")
#: Index of the bad batch -> where the run is then (window 3, warm-up 4).
WHERE = {"first step": 0, "warm-up": 2, "window's last": 5, "gate": 6, "full": 7}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_bad_step_is_skipped(kind: str, where: str) -> None:
    """Bitwise the plain loop that leaves the batch out, with proposals (all refused) in between."""
    batches = make_batches(30)
    batches[WHERE[where]] = poison(batches[WHERE[where]], kind)
    plain = trapped()
    wanted = plain_skipping(plain, batches)
    ours = trapped()
    trainer = ours.trainer(config(), predictor=Fake(1.0))
    results = []
    trainer.fit(batches, progress_callback=results.append)
    assert [r.loss for r in results if r.num_backward and not r.skipped] == wanted
    assert len(wanted) == len(batches) - 1
    assert_same(ours.everything(), plain.everything())
    counts = trainer.statistics()
    assert counts["num_skipped_steps"] == 1
    assert counts["num_real_steps"] == len(batches) - 1
    assert counts["num_jumps_proposed"] >= 1
    events = trainer.summary()["divergence_events"]
    assert events[0]["severity"] == "critical"
    assert events[0]["signal"] == ("gradient_nonfinite" if kind == "nan_gradient" else "loss_nonfinite")
    assert events[0]["recovery_successful"] is True
    skipped = next(r for r in results if r.skipped)
    assert skipped.alarm.level is Level.CRITICAL
    after = results[results.index(skipped) + 1 :]
    assert all(r.phase is not Phase.PREDICT for r in after[:4]), "full steps are forced after an alarm"


@pytest.mark.parametrize("kind", KINDS[:3])
def test_bad_batch_at_the_gate(kind: str) -> None:
    """The proposal is refused; weights, statistics and generators as before."""
    made = trapped()
    trainer = made.trainer(config(), predictor=Fake())
    batches = make_batches(40)
    steps_until(trainer, batches, lambda r: trainer.run.windows.just_closed and r.phase is Phase.FULL)
    before = made.everything()
    result = trainer.step(poison(batches[0], kind))
    assert result.phase is Phase.PREDICT
    assert result.reason in (Reason.LOSS_NOT_FINITE.value, Reason.NO_DESCENT.value)
    assert_same(made.everything(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_step_on_probation_takes_the_jump_back(kind: str) -> None:
    made = trapped()
    trainer = made.trainer(config(gate__significance=0.5), predictor=Fake(-0.05))
    batches = full_batch(40)
    before = None
    for batch in batches:
        if trainer.run.judge.probation is None:
            before = made.everything()
        else:
            result = trainer.step(poison(batch, kind))
            assert (result.phase, result.skipped) == (Phase.CORRECT, True)
            assert trainer.run.judge.probation is None
            assert_same({**made.everything(), "scheduler": 0, "groups": 0}, {**before, "scheduler": 0, "groups": 0})
            assert trainer.statistics()["num_rollbacks"] == 1
            assert trainer.step(batches[0]).phase is Phase.FULL
            return
        trainer.step(batch)
    raise AssertionError("no jump was accepted")


@pytest.mark.parametrize("start", [0, 2, 9])
def test_all_nan_ends_clearly(start: int) -> None:
    made = setup("norm_dropout")
    settings = config(divergence__max_consecutive_nonfinite=5, divergence__retry_learning_rate_factor=1.0)
    trainer = made.trainer(settings, predictor=Fake(1.0))
    batches = make_batches(20)
    for batch in batches[:start]:
        trainer.step(batch)
    parameters = made.everything()
    with pytest.raises(DivergenceError, match=r"last good step.*Lower the learning rate"):
        trainer.fit([poison(batch, "nan_loss") for batch in batches])
    now = made.everything()
    for part in ("parameters", "buffers", "optimizer", "groups"):
        assert_same(now[part], parameters[part])
    assert trainer.statistics()["num_skipped_steps"] == 6
    assert trainer.statistics()["num_divergence_events"] == 6


def test_a_disabled_run_is_left_alone() -> None:
    """enabled=False is the plain loop, NaN and all."""
    made = setup("mlp", "sgd")
    trainer = made.trainer(config(enabled=False))
    trainer.step(poison(make_batches(1)[0], "nan_loss"))
    assert any(torch.isnan(p).any() for p in made.model.parameters())


def test_nan_in_a_sparse_gradient_does_not_reach_the_weights() -> None:
    made = sparse_setup()
    trainer = made.trainer(config(), loss_fn=sparse_loss)
    trainer.step((torch.tensor([0, 1]), torch.ones(2, 1)))
    before = made.everything()
    hook = made.model[0].weight.register_hook(lambda g: g * NAN)
    result = trainer.step((torch.tensor([0, 1]), torch.ones(2, 1)))
    hook.remove()
    assert result.skipped
    assert_same(made.everything(), before)


# ---------------------------------------------------------------- accelerators: the same, seen late


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[Setup, HybridTrainerConfig, Any], HybridTrainer]:
    """A trainer that believes its tensors are on an accelerator: losses are read every ``interval`` steps."""
    monkeypatch.setattr(Readout, "due", property(lambda self: len(self._pending) >= self.interval))

    def make(made: Setup, settings: HybridTrainerConfig, predictor: Any = None, **kwargs: Any) -> HybridTrainer:
        trainer = made.trainer(settings, predictor=predictor, **kwargs)
        put_into_subject(trainer, on_cpu=False)
        return trainer

    return make


def test_late_reading_is_the_plain_loop(late: Callable) -> None:
    batches = make_batches(30)
    plain = trapped()
    plain.plain(batches)
    ours = trapped()
    trainer = late(ours, config(), Fake(1.0))
    epoch = trainer.fit(batches)
    assert epoch.num_jumps_proposed >= 2
    assert_same(ours.everything(), plain.everything())
    assert trainer.run.rollback.point is None


@pytest.mark.parametrize("kind", KINDS)
def test_late_nan_goes_back_to_the_anchor(kind: str, late: Callable) -> None:
    """The state at the start of the reading interval comes back; the schedule does not lag behind."""
    made = trapped()
    trainer = late(made, config(divergence__check_interval_steps=4, warmup_steps=100))
    batches = make_batches(40)
    states = []
    bad = 10
    for index, batch in enumerate(batches[:20]):
        states.append(made.everything())
        trainer.step(poison(batch, kind) if index == bad else batch)
        if index > bad and trainer.run.rollback.point is None:
            break
        if index >= bad and trainer.statistics()["num_skipped_steps"]:
            break
    lost = trainer.statistics()["num_skipped_steps"]
    assert 1 <= lost <= 4
    now, anchor = made.everything(), states[index + 1 - lost]
    for part in ("parameters", "buffers", "optimizer"):
        assert_same(now[part], anchor[part])
    assert made.scheduler.last_epoch == trainer.run.position == index + 1
    assert trainer.statistics()["num_real_steps"] == index + 1 - lost
    result = trainer.step(batches[30])
    assert math.isfinite(result.loss)
    assert made.scheduler.last_epoch == trainer.run.position
    assert all(torch.isfinite(p).all() for p in made.model.parameters())


def test_late_nan_for_ever_ends_clearly(late: Callable) -> None:
    made = trapped()
    trainer = late(made, config(divergence__max_consecutive_nonfinite=5))
    batches = make_batches(30)
    for batch in batches[:3]:
        trainer.step(batch)
    before = made.everything()["parameters"]
    with pytest.raises(DivergenceError):
        trainer.fit([poison(batch, "nan_loss") for batch in batches])
    assert_same(made.everything()["parameters"], before)


def test_rolled_back_jump_is_not_brought_back_by_an_anchor(late: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The anchor taken on probation holds weights after the jump: it must not outlive a rollback."""
    from hybrid_predict_trainer.cycle import correct_step

    monkeypatch.setattr(correct_step, "probation_passes", lambda probation, sigma: False)
    made = trapped(model="batchnorm")  # with dropout losses are noisy, and this jump is not accepted
    trainer = late(made, config(predictor__window=8, divergence__check_interval_steps=6), Fake(-0.05))
    [clean, *_] = batches = full_batch(60)
    before = None
    for batch in batches:
        if trainer.run.judge.probation is None:
            before = made.everything()["parameters"]
        rollbacks = trainer.run.meter.num_rollbacks
        trainer.step(batch)
        if trainer.run.meter.num_rollbacks > rollbacks:
            break
    assert trainer.run.meter.num_rollbacks == 1
    bad = poison(clean, "nan_loss")
    while trainer.run.rollback.point is not None or not trainer.statistics()["num_skipped_steps"]:
        trainer.step(bad)
    assert_same(made.everything()["parameters"], before)


# ---------------------------------------------------------------- loss functions


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda loss: float(loss.detach()), "scalar tensor, not float"),
        (lambda loss: None, "scalar tensor, not NoneType"),
        (lambda loss: (loss, loss), "scalar tensor, not tuple"),
        (lambda loss: loss.expand(3), r"shape \(3,\).*mean"),
        (lambda loss: loss.detach(), "without a graph.*detach"),
    ],
    ids=["float", "none", "tuple", "vector", "detached"],
)
def test_wrong_loss_says_what_was_expected(enabled: bool, wrong: Callable, match: str) -> None:
    made = setup("norm_dropout")
    trainer = made.trainer(config(enabled=enabled), loss_fn=lambda m, b: wrong(loss_fn(m, b)))
    before = made.everything()["parameters"]
    with pytest.raises(TypeError, match=match):
        trainer.step(make_batches(1)[0])
    assert_same(made.everything()["parameters"], before)


def test_loss_of_shape_one_is_fine() -> None:
    plain, ours = setup(), setup()
    batches = make_batches(12)
    plain.plain(batches)
    trainer = ours.trainer(config(), predictor=Fake(1.0), loss_fn=lambda m, b: loss_fn(m, b).reshape(1))
    results = []
    trainer.fit(batches, progress_callback=results.append)
    assert_same(ours.everything(), plain.everything())
    assert all(r.loss_tensor.shape == () for r in results)


def test_loss_that_differentiates_inside() -> None:
    """A physics-informed loss takes derivatives of the model: the gate must give it grad mode."""

    def residual(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_(True)
        [slope] = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (slope - 1).square().mean()

    batches = full_batch(30)
    made = setup("mlp", "adam")
    trainer = made.trainer(config(), predictor=Fake(), loss_fn=residual)
    trainer.fit(batches)
    assert trainer.run.judge.evaluation.needs_grad_mode
    assert trainer.statistics()["num_jumps_accepted"] > 0


def test_step_inside_step_is_refused() -> None:
    made = setup()
    box: list[HybridTrainer] = []

    def reentrant(model: nn.Module, batch: Any) -> Tensor:
        box[0].step(batch)
        return loss_fn(model, batch)

    box.append(made.trainer(config(), loss_fn=reentrant))
    with pytest.raises(RuntimeError, match="inside step"):
        box[0].step(make_batches(1)[0])
    assert not box[0]._busy


# ---------------------------------------------------------------- odd parameters and rates


def sparse_setup() -> Setup:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    return Setup(model, torch.optim.SGD(model.parameters(), lr=0.1))


def sparse_loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def test_sparse_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randint(10, (8,), generator=generator), torch.rand(8, 1, generator=generator)) for _ in range(30)]
    plain, ours = sparse_setup(), sparse_setup()
    plain.plain(batches, loss=sparse_loss)
    trainer = ours.trainer(config(), predictor=Fake(1.0), loss_fn=sparse_loss)
    trainer.fit(batches)
    assert trainer.statistics()["num_jumps_proposed"] > 0
    assert_same(ours.everything(), plain.everything())


class Complex(nn.Module):
    """One complex and one integer parameter beside the usual ones."""

    def __init__(self) -> None:
        super().__init__()
        self.real = nn.Linear(WIDTH, 1)
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.count = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.real(x) + self.phase.abs().sum() + self.count.sum()


def test_complex_parameters_are_predicted_and_integer_ones_left() -> None:
    def made() -> Setup:
        torch.manual_seed(0)
        model = Complex()
        return Setup(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01))

    plain, ours = made(), made()
    batches = make_batches(30)
    plain.plain(batches)
    trainer = ours.trainer(config(), predictor=Fake(1.0))
    trainer.fit(batches)
    assert trainer.statistics()["num_jumps_proposed"] > 0
    assert_same(ours.everything(), plain.everything())
    assert sorted(trainer.run.windows.groups.names) == ["phase", "real.bias", "real.weight"]


def test_nan_in_a_complex_gradient_does_not_reach_the_weights() -> None:
    torch.manual_seed(0)
    model = Complex()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    made = Setup(model, optimizer)
    trainer = made.trainer(config())
    before = made.everything()
    model.phase.register_hook(lambda g: g * NAN)
    assert trainer.step(make_batches(1)[0]).skipped
    assert_same(made.everything(), before)


@pytest.mark.parametrize("predictor", ["hold", "heuristic", "linear", "secant"])
def test_zero_learning_rate(predictor: str) -> None:
    """Nothing moves, nothing fails, nothing is accepted."""
    made = setup()
    for group in made.optimizer.param_groups:
        group["lr"] = 0.0
    before = made.everything()["parameters"]
    trainer = made.trainer(config(predictor_type=predictor))
    trainer.fit(full_batch(60))
    assert_same(made.everything()["parameters"], before)
    assert trainer.statistics()["num_predictor_failures"] == 0
    assert trainer.statistics()["num_jumps_accepted"] == 0


@pytest.mark.parametrize("predictor", ["hold", "heuristic", "linear", "secant"])
@pytest.mark.parametrize("loss", ["zero", "constant"])
def test_flat_loss(predictor: str, loss: str) -> None:
    made = setup("mlp", "sgd")
    level = 0.0 if loss == "zero" else 2.0
    trainer = made.trainer(config(predictor_type=predictor), loss_fn=lambda m, b: 0 * loss_fn(m, b) + level)
    before = made.everything()["parameters"]
    trainer.fit(full_batch(60))
    assert_same(made.everything()["parameters"], before)
    assert trainer.statistics()["num_predictor_failures"] == 0
    json.dumps(trainer.summary(), allow_nan=False)


def test_learning_rate_tensor() -> None:
    def made() -> Setup:
        model = make_model("mlp")
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))
        return Setup(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)))

    plain, ours = made(), made()
    batches = make_batches(20)
    plain.plain(batches)
    trainer = ours.trainer(config(), predictor=Fake(1.0))
    trainer.fit(batches)
    assert_same(ours.everything(), plain.everything())
    assert trainer.statistics()["num_jumps_proposed"] > 0


@pytest.mark.parametrize("shape", ["scalar", "empty", "transposed"])
def test_odd_shapes(shape: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(WIDTH, 1)
            odd = {"scalar": torch.tensor(0.5), "empty": torch.zeros(0, 3), "transposed": torch.randn(3, 2).t()}[shape]
            self.odd = nn.Parameter(odd)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.odd.sum()

    torch.manual_seed(0)
    model = Odd()
    made = Setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
    trainer = made.trainer(config(), predictor=Fake())
    trainer.fit(full_batch(40))
    assert trainer.statistics()["num_jumps_accepted"] > 0
    assert trainer.statistics()["num_predictor_failures"] == 0


def test_bfloat16_weights_move() -> None:
    made = setup("mlp", "sgd")
    made.model.to(torch.bfloat16)
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in full_batch(1)] * 40
    trainer = made.trainer(config(), predictor=Fake(-0.2))
    trainer.fit(batches)
    assert trainer.statistics()["num_jumps_accepted"] > 0


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5])
def test_small_batches(size: int) -> None:
    made = setup("mlp", "adam")
    trainer = made.trainer(config(), predictor=Fake())
    batches = make_batches(30, size) if size else [(torch.zeros(0, WIDTH), torch.zeros(0, 1))] * 15
    results = []
    trainer.fit(batches, progress_callback=results.append)
    if size:
        assert trainer.statistics()["num_jumps_proposed"] > 0
    else:
        assert all(r.skipped for r in results if r.num_backward)
    if size == 1:
        assert trainer.statistics()["num_jumps_accepted"] == 0, "one sample proves nothing"


def test_empty_loader() -> None:
    epoch = setup().trainer(config()).train_epoch([])
    assert (epoch.num_steps, epoch.num_real_steps) == (0, 0)
    assert math.isnan(epoch.final_loss)


def test_raising_loader() -> None:
    def loader():
        yield from make_batches(3)
        raise OSError("the disk is gone")

    trainer = setup().trainer(config())
    with pytest.raises(OSError, match="disk"):
        trainer.fit(loader())
    assert trainer.statistics()["num_real_steps"] == 3


def test_endless_loader_ends_with_the_clock() -> None:
    def loader():
        [batch] = make_batches(1)
        while True:
            yield batch

    trainer = setup().trainer(config(), predictor=Fake())
    trainer.fit(loader(), total_steps=25)
    assert trainer.run.position >= 25
    assert trainer.run.judge.probation is None


def test_schedule_with_an_end_survives_the_last_probation() -> None:
    """OneCycleLR raises beyond its last step; a jump near the end makes a run a little longer than planned."""
    made = setup("mlp", "adam", "onecycle")
    trainer = made.trainer(config(clock="cost", correct_steps=7), predictor=Fake())
    trainer.fit(full_batch(200), total_steps=60)
    assert trainer.run.position >= 60
    assert made.scheduler.last_epoch == 60


def test_bad_data_does_not_roll_back_for_ever() -> None:
    """Every third batch is labelled wrongly: retries are bounded, the run ends."""
    made = setup("mlp", "adam")
    trainer = made.trainer(config(), predictor=Fake())
    batches = [(x, y + 50) if i % 3 == 0 else (x, y) for i, (x, y) in enumerate(make_batches(90))]
    epoch = trainer.fit(batches)
    assert epoch.num_real_steps + trainer.statistics()["num_skipped_steps"] == len(batches) - epoch.num_jumps_accepted


# ---------------------------------------------------------------- gradient scaler


def test_grad_scaler() -> None:
    """Overflow makes a skipped step, the scale shrinks as it would in the plain loop, jumps do not touch it."""
    batches = make_batches(30)
    bad = {4, 11}
    for i in bad:
        batches[i] = poison(batches[i], "inf_loss")

    plain = setup("mlp", "adam")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5)
    for batch in batches:
        plain.optimizer.zero_grad()
        scaler.scale(loss_fn(plain.model, batch)).backward()
        scaler.unscale_(plain.optimizer)
        scaler.step(plain.optimizer)
        scaler.update()

    ours = setup("mlp", "adam")
    own = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5)
    trainer = ours.trainer(config(), predictor=Fake(1.0), grad_scaler=own)
    trainer.fit(batches)
    assert trainer.statistics()["num_jumps_proposed"] > 0
    assert trainer.statistics()["num_skipped_steps"] == len(bad)
    assert own.state_dict() == scaler.state_dict()
    assert_same(ours.everything(), plain.everything())


def test_grad_scaler_does_not_step_on_an_explosion() -> None:
    """A finite gradient beyond the critical multiple is skipped, with a scaler too."""
    made = setup("mlp", "sgd")
    trainer = made.trainer(config(), grad_scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    batches = make_batches(10)
    for batch in batches[:6]:
        trainer.step(batch)
    before = made.everything()["parameters"]
    x, y = batches[6]
    result = trainer.step((x, y + 1e4))
    assert result.skipped
    assert_same(made.everything()["parameters"], before)


def test_scaler_is_rolled_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid_predict_trainer.cycle import correct_step

    monkeypatch.setattr(correct_step, "probation_passes", lambda probation, sigma: False)
    made = setup("mlp", "adam")
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    trainer = made.trainer(config(), predictor=Fake(), grad_scaler=scaler)
    before = {}
    for batch in full_batch(40):
        if trainer.run.judge.probation is None:
            before = scaler.state_dict()
        trainer.step(batch)
        if trainer.run.meter.num_rollbacks:
            break
    assert trainer.run.meter.num_rollbacks == 1
    assert scaler.state_dict() == before


# ---------------------------------------------------------------- the trainer as an object


def test_deepcopy_trains_on_independently() -> None:
    made = setup()
    trainer = made.trainer(config(), predictor=Fake())
    batches = make_batches(12)
    for batch in batches[:6]:
        trainer.step(batch)
    other = copy.deepcopy(trainer)
    before = made.everything()["parameters"]
    for batch in batches[6:]:
        other.step(batch)
    assert_same(made.everything()["parameters"], before)
    assert difference({n: p.detach() for n, p in other.run.subject.model.named_parameters()}, before) is not None


def test_clock_without_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """A timer that stands still: figures are null or zero, never infinite."""
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    trainer = setup().trainer(config(), predictor=Fake())
    epoch = trainer.fit(make_batches(20))
    assert epoch.epoch_time_s == 0
    json.dumps(trainer.summary(), allow_nan=False)
    assert 0 < trainer.speedup_factor < 10


def test_global_generators_are_not_reseeded() -> None:
    """Building a trainer draws nothing."""
    made = setup()
    torch.manual_seed(3)
    random.seed(3)
    before = made.everything()["rng"]
    made.trainer(config())
    assert_same(made.everything()["rng"], before)


def test_an_autocast_around_the_loop_does_not_show_the_gate_old_weights() -> None:
    """Autocast keeps half-precision copies of the weights and does not renew them when a weight changes in place."""
    from hybrid_predict_trainer.weights import algebra as weights

    torch.manual_seed(0)
    model, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    parameters = list(model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x).float()
        delta = [9 * p.detach() for p in parameters]
        weights.move_(parameters, weights.clone(parameters), delta, 1.0)
        moved = model(x).float()
        weights.copy_(parameters, [d / 9 for d in delta])
        back = model(x).float()
    assert torch.allclose(moved, 10 * before, rtol=0.05, atol=0.05)
    assert torch.allclose(back, before, rtol=0.05, atol=0.05)


def test_a_scale_that_overflowed_does_not_come_back_with_the_anchor(late: Callable) -> None:
    """What the scaler learnt from an overflow outlives the interval that was lost to it."""
    made = trapped()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    trainer = late(made, config(divergence__check_interval_steps=4, warmup_steps=100), grad_scaler=scaler)
    batches = make_batches(12)
    for index, batch in enumerate(batches):
        trainer.step(poison(batch, "nan_loss") if index == 5 else batch)
    assert trainer.statistics()["num_skipped_steps"] >= 1
    assert scaler.get_scale() < 2.0**8
