"""Baseline methods: each wrapper against a naive reference on a small problem, what it costs, and when it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer.config.settings import HybridTrainerConfig
from hybrid_predict_trainer.cost import PASS_UNITS, STEP_UNITS
from hybrid_predict_trainer.experiments.baselines import (
    BASELINES,
    baseline_of,
    baselines_for,
    optimizers,
    run_baseline,
    wnn,
)
from hybrid_predict_trainer.experiments.baselines.flops import (
    forward_flops,
    mlp_flops,
    soap_basis_flops,
    soap_first_flops,
    soap_step_flops,
)
from hybrid_predict_trainer.experiments.baselines.outer import snoo_step_
from hybrid_predict_trainer.experiments.baselines.warmup import long_warmup
from hybrid_predict_trainer.experiments.run_arm import COUNTS, Arm, ArmRun, Experiment, run_arm
from hybrid_predict_trainer.tasks import TaskDefaults, TaskSettings

STEPS = 40
#: What needs no rate, or has one already.
ONE_RATE = ("taken-home-3", "taken-home-10", "lbfgs-400", "ssbfgs", "ssbroyden", "nysnewton-cg", "lm")
IN_LOOP = [name for name, peer in BASELINES.items() if not peer.deterministic_only]


class Quadratic(nn.Module):
    """Weights w (4,) and a matrix v (2, 3): the loss is sum c (w - target)^2 + |v|^2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]))
        self.v = nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))


class Points:
    """A quadratic whose target is drawn anew for every batch, or stays where it is."""

    name = "quadratic"
    steps_per_epoch = None
    defaults = TaskDefaults(optimizer="sgd", lr=0.05, momentum=0.0, steps=STEPS, lr_grid=(0.025, 0.05, 0.1))

    def __init__(self, *, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self.given: list[Tensor] = []

    def build_model(self, seed: int) -> nn.Module:
        return Quadratic()

    def batches(self, seed: int, start: int = 0) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        fixed = torch.randn(1, 4, generator=generator)
        while True:
            batch = fixed if self.deterministic else torch.randn(1, 4, generator=generator)
            self.given.append(batch)
            yield batch

    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        assert isinstance(model, Quadratic)
        c = torch.tensor([1.0, 0.5, 2.0, 0.1])
        return (c * (model.w - batch) ** 2).sum() + (model.v @ model.v.T).trace()

    def evaluate(self, model: nn.Module) -> float:
        assert isinstance(model, Quadratic)
        return float(model.w.detach().square().sum() + model.v.detach().square().sum())

    def describe(self) -> dict[str, Any]:
        return {}


def setup_for(task: Points, **recipe: Any) -> Experiment:
    """A setup without the flags of the command line."""
    defaults = replace(task.defaults, **recipe)
    return Experiment(
        task=task, settings=TaskSettings(), recipe=defaults, config=HybridTrainerConfig(), steps=defaults.steps
    )  # type: ignore[arg-type]


def run_with(setup: Experiment, name: str, lr: float | None = None, **values: float) -> ArmRun:
    peer = baseline_of(name)
    peer = replace(peer, values={**peer.values, **values})
    return run_baseline(setup, Arm(name=name, kind="peer", lr=lr or setup.recipe.lr), seed=3, peer=peer)


def plain(setup: Experiment) -> ArmRun:
    return run_arm(setup, Arm(name="plain", kind="plain", lr=setup.recipe.lr), seed=3)


def losses(run: ArmRun) -> list[float]:
    return [loss for _, loss in run.curve]


def sgd(task: Points, lr: Any, steps: int, seed: int = 3, model: Quadratic | None = None) -> Iterator[Quadratic]:
    """The loop a user would write, step by step; ``lr`` is a function of the step."""
    model = model or Quadratic()
    for i, batch in zip(range(steps), task.batches(seed), strict=False):
        model.zero_grad()
        task.loss_fn(model, batch).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr(i) * p.grad
        yield model


def linear(i: int) -> float:
    return 0.05 * (1 - i / STEPS)


# ---- the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_a_peer_says_what_it_is_and_has_as_many_rates_as_the_recipe(name: str) -> None:
    peer = BASELINES[name]
    assert peer.about
    assert "\n" not in peer.about
    for grid in ((), (0.1,), (0.1, 0.2, 0.4, 0.8)):
        rates = peer.grid(replace(Points.defaults, lr_grid=grid))
        assert len(rates) == (1 if name in ONE_RATE else max(len(grid), 1))
        assert list(rates) == sorted(set(rates))
        assert min(rates) > 0


def test_peers_that_need_one_batch_are_not_offered_others() -> None:
    assert set(baselines_for(Points())) == set(IN_LOOP)  # type: ignore[arg-type]
    assert set(baselines_for(Points(deterministic=True))) == set(BASELINES) - {"lm"}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same batch at every step") as told:
        run_with(setup_for(Points()), "lbfgs-20")
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="it needs residuals") as told:
        run_with(setup_for(Points(deterministic=True)), "lm")
    assert "\n" not in str(told.value)


def test_names_may_carry_a_budget_and_must_exist() -> None:
    assert baseline_of("snoo@2") is BASELINES["snoo"]
    with pytest.raises(ValueError, match="did you mean 'snoo'"):
        baseline_of("snooo")


# ---- wrappers against references ------------------------------------------------------------------------


def test_snoo_is_its_formula() -> None:
    task, every, eta, mu = Points(), 7, 0.68, 0.37
    w_old = b = None
    for i, model in enumerate(sgd(task, linear, STEPS), start=1):
        if w_old is None:
            w_old, b = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.zeros(4)
            v_old, bv = torch.linspace(-1, 1, 6).reshape(2, 3), torch.zeros(2, 3)
        if i % every == 0:
            with torch.no_grad():
                s, sv = w_old - model.w, v_old - model.v
                b, bv = mu * b + s, mu * bv + sv
                model.w.copy_(w_old - eta * (mu * b + s))
                model.v.copy_(v_old - eta * (mu * bv + sv))
                w_old, v_old = model.w.clone(), model.v.clone()
    found = run_with(setup_for(Points()), "snoo", every=every, eta=eta, mu=mu)
    assert found.final_val_loss == pytest.approx(task.evaluate(model), rel=1e-5)
    assert found.final_val_loss != plain(setup_for(Points())).final_val_loss


def test_an_outer_step_of_one_without_momentum_moves_nothing() -> None:
    w, w_old, b = torch.tensor([0.1, 0.7]), torch.tensor([0.3, -1e8]), torch.zeros(2)
    snoo_step_([w], [w_old], [b], eta=1.0, mu=0.0)
    assert torch.equal(w, torch.tensor([0.1, 0.7]))
    assert torch.equal(w_old, w)


def test_lookahead_is_its_formula() -> None:
    pytest.importorskip("pytorch_optimizer")
    task = Points()
    slow = [p.detach().clone() for p in Quadratic().parameters()]
    for i, model in enumerate(sgd(task, linear, STEPS), start=1):
        if i % 5 == 0:
            with torch.no_grad():
                for p, q in zip(model.parameters(), slow, strict=True):
                    q += 0.5 * (p - q)
                    p.copy_(q)
    found = run_with(setup_for(Points()), "lookahead")
    assert found.final_val_loss == pytest.approx(task.evaluate(model), rel=1e-5)


def test_ema_nesterov_is_the_loop_of_its_record() -> None:
    """x += beta_t e before the forward, step from there, e = gamma e + (1 - gamma)(x - previous x)."""
    task, gamma, beta = Points(), 0.9, 0.3
    start, end = STEPS // 10, round(2 / 3 * STEPS)
    model = Quadratic()
    x_old = [p.detach().clone() for p in model.parameters()]
    e = [torch.zeros_like(p) for p in x_old]
    for i, batch in zip(range(STEPS), task.batches(3), strict=False):
        with torch.no_grad():
            for p, d in zip(model.parameters(), e, strict=True):
                p += (beta * linear(i) / 0.05 if start <= i < end else 0.0) * d
        model.zero_grad()
        task.loss_fn(model, batch).backward()
        with torch.no_grad():
            for p, d, q in zip(model.parameters(), e, x_old, strict=True):
                p -= linear(i) * p.grad
                d.mul_(gamma).add_((1 - gamma) * (p - q))
                q.copy_(p)
    # passes would move the end of the run; at no price the reference's step numbers hold
    found = run_with(setup_for(Points()), "ema-nesterov", gamma=gamma, beta=beta)
    assert found.counts["num_real_steps"] == STEPS
    assert found.final_val_loss == pytest.approx(task.evaluate(model), rel=1e-5)


def test_ema_nesterov_ends_with_the_stable_phase_of_wsd_and_pushes_harder_with_muon() -> None:
    wsd = setup_for(Points(), schedule="wsd", decay_frac=0.25)
    run = run_with(wsd, "ema-nesterov")
    tracked, ahead = 0.75 * STEPS - 1, 0.75 * STEPS - STEPS // 10  # after the last move nobody needs the mean
    assert run.cost_units == pytest.approx(STEPS * STEP_UNITS + PASS_UNITS * (5 * tracked + 3 * ahead))
    assert BASELINES["ema-nesterov"].values["beta_muon"] > BASELINES["ema-nesterov"].values["beta"]


def test_lawa_validates_the_mean_of_its_checkpoints_and_trains_on_as_if_nothing_were() -> None:
    task = Points()
    weights = [[p.detach().clone() for p in m.parameters()] for m in sgd(task, linear, STEPS)]
    run = run_with(setup_for(Points()), "lawa", num_checkpoints=3, spacing_frac=0.1)
    taken = [weights[i - 1] for i in (STEPS - 8, STEPS - 4, STEPS)]
    means = [sum(w[j] for w in taken) / 3 for j in range(2)]
    assert run.final_val_loss == pytest.approx(float(sum(m.square().sum() for m in means)), rel=1e-5)


def test_ema_validates_its_average() -> None:
    task, tau = Points(), 0.1 * STEPS
    average: list[Tensor] | None = None
    for model in sgd(task, linear, STEPS):
        now = [p.detach().clone() for p in model.parameters()]
        average = now if average is None else [a + (p - a) / tau for a, p in zip(average, now, strict=True)]
    assert average is not None
    run = run_with(setup_for(Points()), "ema", tau_frac=0.1)
    assert run.final_val_loss == pytest.approx(float(sum(a.square().sum() for a in average)), rel=1e-5)


NO_STRENGTH: dict[str, dict[str, float]] = {
    "snoo": {"eta": 1.0, "mu": 0.0, "every": 3},
    "ema-nesterov": {"beta": 0.0},
    "lawa": {"num_checkpoints": 1, "spacing_frac": 1e-9},
    "ema": {"tau_frac": 1e-9},
}


@pytest.mark.parametrize("name", NO_STRENGTH)
def test_a_wrapper_without_strength_is_the_plain_run_bit_for_bit(name: str) -> None:
    expected = plain(setup_for(Points()))
    found = run_with(setup_for(Points()), name, **NO_STRENGTH[name])
    assert found.counts["num_real_steps"] == STEPS
    assert losses(found) == losses(expected)
    assert found.final_val_loss == expected.final_val_loss


@pytest.mark.parametrize("name", ["snoo", "ema", "schedule-free", "soap"])
def test_every_arm_sees_the_same_batches(name: str) -> None:
    if name == "schedule-free":
        pytest.importorskip("schedulefree")
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    ours, theirs = Points(), Points()
    run_with(setup_for(ours), name)
    plain(setup_for(theirs))
    skipped = 1 if name == "soap" else 0  # one batch was looked at to measure a forward
    given = ours.given[skipped:]
    assert len(given) > 5
    assert all(torch.equal(a, b) for a, b in zip(given, theirs.given, strict=False))


# ---- costs ----------------------------------------------------------------------------------------------

#: Passes over the weights of a run of 40 steps with the published settings.
PASSES = {"snoo": 6, "lookahead": 4 * 8, "lawa": 2 * 40, "ema": 3 * 40}


@pytest.mark.parametrize("name", PASSES)
def test_passes_over_the_weights_are_booked(name: str) -> None:
    if name == "lookahead":
        pytest.importorskip("pytorch_optimizer")
    run = run_with(setup_for(Points()), name)
    assert set(run.counts) == set(COUNTS)
    assert run.counts["num_jumps_proposed"] == 0
    assert run.cost_units == pytest.approx(STEPS * STEP_UNITS + PASSES[name] * PASS_UNITS)
    assert run.curve[-1] == (run.cost_units, run.final_val_loss)


def test_an_arm_with_dearer_steps_takes_fewer_and_its_schedule_ends_with_them() -> None:
    pytest.importorskip("pytorch_optimizer")
    setup = setup_for(Points(), steps=80)
    run = run_with(setup, "soap")
    unit = forward_flops(setup, Quadratic(), 3)
    shapes = [(4,), (2, 3)]
    each, basis = soap_step_flops(shapes, 10_000) / unit, soap_basis_flops(shapes, 10_000) / unit
    n = int(run.counts["num_real_steps"])
    expected = n * STEP_UNITS + each / 4 + soap_first_flops(shapes, 10_000) / unit
    expected += (n - 1) * each + (n - 1) // 10 * basis
    assert run.cost_units == pytest.approx(expected)
    assert n < 80 / 2
    assert 80 <= run.cost_units / STEP_UNITS < 80 + 1 + (each + basis) / STEP_UNITS


def test_flops_have_known_values() -> None:
    setup = setup_for(Points())
    model = Quadratic()
    assert forward_flops(setup, model, 0) == 2 * 2 * 3 * 2  # v v' is the only product of matrices
    assert mlp_flops((5, 128, 1)) == 2 * (5 * 128 + 128)
    assert soap_step_flops([(4,), (2, 3)], 10) == 8 * 6 * 5
    assert soap_step_flops([(2, 30)], 10) == 8 * 60 * 2  # the long side is left alone
    assert soap_basis_flops([(2, 3), (7,)], 10) == pytest.approx(14 / 3 * (8 + 27))
    assert soap_first_flops([(2, 3)], 10) == 9 * 35


# ---- optimizers -----------------------------------------------------------------------------------------


def test_schedule_free_validates_the_average_and_trains_on_from_where_it_was() -> None:
    module = pytest.importorskip("schedulefree")
    task, lr = Points(), 0.1
    model = Quadratic()
    optimizer = module.AdamWScheduleFree(model.parameters(), lr=lr, betas=(0.9, 0.999), warmup_steps=2)
    optimizer.train()
    for _, batch in zip(range(STEPS), task.batches(3), strict=False):
        optimizer.zero_grad()
        task.loss_fn(model, batch).backward()
        optimizer.step()
    at_y = task.evaluate(model)
    optimizer.eval()
    run = run_with(setup_for(Points()), "schedule-free", lr=lr)
    assert run.final_val_loss == pytest.approx(task.evaluate(model), rel=1e-5)
    assert run.final_val_loss != pytest.approx(at_y, rel=1e-3)


def test_prodigy_finds_its_step_size(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prodigyopt")
    task = Points(deterministic=True)
    run = run_with(setup_for(task, steps=300, weight_decay=0.01), "prodigy", lr=1.0)
    fixed = task.given[0]
    assert run.final_val_loss == pytest.approx(float(fixed.square().sum()), rel=0.2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["lookahead", "schedule-free", "prodigy", "soap"])
def test_a_missing_package_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(optimizers.importlib, "import_module", absent)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .hybrid-predict-trainer\[bench\]") as told:
        run_with(setup_for(Points()), name, lr=0.1)
    assert "\n" not in str(told.value)


def test_a_run_that_diverges_says_so() -> None:
    run = run_with(setup_for(Points(), schedule="constant", steps=200), "snoo", lr=1e9)
    assert run.error
    assert math.isnan(run.final_val_loss)


# ---- WNN+ -----------------------------------------------------------------------------------------------


def random_model(seed: int = 0) -> wnn.State:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "layer_embed.weight": (15, 128), "edge_proj.fc.0.weight": (128, 5), "edge_proj.fc.0.bias": (128,),
        "edge_mlp.fc.6.weight": (40, 128), "edge_mlp.fc.6.bias": (40,),
    }  # fmt: skip
    shapes |= {f"edge_mlp.fc.{i}.weight": (128, 128) for i in (0, 2, 4)}
    shapes |= {f"edge_mlp.fc.{i}.bias": (128,) for i in (0, 2, 4)}
    return {k: 0.1 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}


class Reference(nn.Module):
    """The released architecture, one weight at a time, all 40 outputs."""

    def __init__(self, state: wnn.State) -> None:
        super().__init__()
        self.embed = nn.Embedding(15, 128)
        self.proj = nn.Linear(5, 128)
        layers: list[nn.Module] = []
        for width in (128, 128, 128, 40):
            layers += [nn.Linear(128, width), nn.SiLU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.embed.weight.data = state["layer_embed.weight"]
        self.proj.load_state_dict({k: state[f"edge_proj.fc.0.{k}"] for k in ("weight", "bias")})
        self.mlp.load_state_dict({k.removeprefix("edge_mlp.fc."): v for k, v in state.items() if "edge_mlp" in k})

    def forward(self, states: Tensor, kind: int, ahead: int) -> Tensor:
        mean = states.sum() / states.numel()
        std = ((states - mean).square().sum() / (states.numel() - 1)).sqrt()
        out = []
        for row in (states - mean) / (std + 1e-6):
            moved = self.mlp(self.proj(row) + self.embed(torch.tensor(kind)))
            out.append((row[-1] + moved[ahead - 1]) * std + mean)
        return torch.stack(out)


@pytest.mark.parametrize(("kind", "ahead"), [(wnn.LINEAR, 1), (wnn.OTHER, 40), (wnn.QUERY, 17)])
def test_a_forecast_is_that_of_the_released_architecture(
    kind: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wnn, "CHUNK", 7)  # several chunks
    model, states = random_model(), torch.randn(20, 5)
    expected = Reference(model)(states, kind, ahead).detach()
    torch.testing.assert_close(wnn.forecast(model, states, kind, ahead), expected)


def test_the_published_plan_and_shorter_ones() -> None:
    published = wnn.forecast_plan(10_000, price_steps=0.0, max_forecasts=10, cost_frac=0.05)
    assert published == wnn.ForecastPlan(200, (40, 33, 26, 21, 16, 11, 8, 5, 3, 1))
    assert wnn.forecast_plan(10_000, 0.0, 5, 0.05).spacing == 200  # never further apart, so there are more of them
    short = wnn.forecast_plan(1000, price_steps=10.0, max_forecasts=5, cost_frac=0.05)
    assert len(short.ahead) == 5
    assert short.ahead[0] * short.spacing <= 800
    assert 5 * (5 * short.spacing + 10) <= 1000
    assert len(wnn.forecast_plan(1000, price_steps=40.0, max_forecasts=5, cost_frac=0.05).ahead) == 2
    assert wnn.forecast_plan(20, price_steps=40.0, max_forecasts=5, cost_frac=0.05).spacing > 20  # none can be paid


@pytest.mark.parametrize(
    ("name", "role", "dim", "kind"),
    [
        ("embed_tokens.weight", "embedding", 2, wnn.TOKENS),
        ("embed_positions.weight", "embedding", 2, wnn.POSITIONS),
        ("blocks.0.attention.q_proj.weight", "attention_q", 2, wnn.QUERY),
        ("blocks.0.attention.out_proj.weight", "attention_out", 2, wnn.LINEAR),
        ("final_norm.weight", "norm_bias", 1, wnn.NORM),
        ("fc.bias", "norm_bias", 1, wnn.OTHER),
        ("conv.weight", "other", 4, wnn.CONVOLUTION),
    ],
)
def test_tensor_types(name: str, role: str, dim: int, kind: int) -> None:
    assert wnn.tensor_type(name, role, dim) == kind


def test_wnn_plus_moves_the_weights_where_they_are_forecast_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {k: torch.zeros_like(v) for k, v in random_model().items()}
    model["edge_mlp.fc.6.bias"] += 0.25  # every weight moves by a quarter of its tensor's deviation
    monkeypatch.setattr(wnn, "load", lambda: model)
    setup = setup_for(Points(), steps=400, schedule="constant")
    run = run_with(setup, "wnn+", max_forecasts=2, cost_frac=1.0)
    unit = forward_flops(setup, Quadratic(), 3)
    price = 10 * mlp_flops((5, 128, 128, 128, 128, 1)) / unit / STEP_UNITS
    assert price > 400  # ten weights, 24 FLOPs: a forecast costs more than the run, and is not made
    assert losses(run) == losses(plain(setup))
    monkeypatch.setattr(wnn, "forward_flops", lambda *_: 1e6)
    assert losses(run_with(setup, "wnn+")) != losses(plain(setup))

    weights = [torch.tensor([0.0, 1.0]), torch.tensor([[3.0]])]
    states = [[w.clone() for w in weights] for _ in range(5)]
    wnn.move(model, weights, states, [1, 2], 40)
    std = torch.tensor([0.0, 1.0] * 5).std()
    torch.testing.assert_close(weights[0], torch.tensor([0.0, 1.0]) + 0.25 * std, atol=1e-5, rtol=0)


def test_a_forecast_that_is_not_a_number_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    model["edge_mlp.fc.6.bias"][:] = math.nan
    monkeypatch.setattr(wnn, "load", lambda: model)
    monkeypatch.setattr(wnn, "forward_flops", lambda *_: 1e9)
    run = run_with(setup_for(Points()), "wnn+")
    assert "WNN+" in run.error
    assert math.isnan(run.final_val_loss)


def test_a_missing_checkpoint_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HPT_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nino_mlp\.pt"):
        run_with(setup_for(Points()), "wnn+")
    monkeypatch.delenv("HPT_DATA_DIR")
    with pytest.raises(FileNotFoundError, match="HPT_DATA_DIR"):
        run_with(setup_for(Points()), "wnn+")


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"edge_proj.fc.0.weight": torch.zeros(2, 2)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not the WNN"):
        wnn.load(tmp_path / "x.pt")
    torch.save({"state_dict": random_model()}, tmp_path / "y.pt")
    assert set(wnn.load(tmp_path / "y.pt")) == set(random_model())


# ---- what is written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["snoo", "lbfgs-20"])
def test_a_run_leaves_its_summary(name: str, tmp_path: Path) -> None:
    setup = setup_for(Points(deterministic=True))
    run = run_arm(setup, Arm(name=name, kind="peer", lr=0.05), seed=1, folder=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["arm"], summary["seed"], summary["final_val_loss"]) == (name, 1, run.final_val_loss)


@pytest.mark.parametrize(
    ("beta_2", "steps", "own", "wanted"),
    [(0.98, 400, 40, 100), (0.98, 100, 10, 50), (0.95, 1000, 50, 50), (0.999, 900, 90, 450)],
)
def test_long_warmup_is_two_memories_of_the_second_moment(beta_2: float, steps: int, own: int, wanted: int) -> None:
    """Half of the run at most, and never shorter than the recipe's own."""
    recipe = TaskDefaults(lr=1e-3, steps=steps, betas=(0.9, beta_2), warmup_steps=own)
    assert long_warmup(recipe) == replace(recipe, warmup_steps=wanted)


def test_block_warmup_slows_the_blocks_and_nothing_else() -> None:
    """By its name v is a value matrix inside a block; w is not."""
    num = 16
    task = Points(deterministic=True)
    run = run_with(setup_for(task, schedule="constant"), "block-warmup", steps=num)
    *_, end = sgd(Points(deterministic=True), lambda _: 0.05, STEPS)
    v = Quadratic().v.detach()
    for i in range(STEPS):
        v = v - min((i + 1) / num, 1.0) * 0.05 * 2 * v
    assert run.final_val_loss == pytest.approx(float(end.w.detach().square().sum() + v.square().sum()), rel=1e-5)
    assert run.cost_units == pytest.approx(STEPS * STEP_UNITS + 5 * num * PASS_UNITS)
