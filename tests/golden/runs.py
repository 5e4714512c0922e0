"""The golden runs: what each is there for, and what must have happened in it."""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import material
from .drive import DEFAULTS, Driver, Run
from .material import adamw, decay, fast_adamw, mean_square, momentum, noisy, slow_adamw, stable_decay
from .trace import Trace, digest, flat

JUMPS = {"num_jumps_accepted": 2}
ONE_JUMP = {"num_jumps_accepted": 1}
ASKED = {"num_jumps_proposed": 2}
#: The mean of the paired losses decides, not a test of it.
EASY = {"gate.significance": 0.5, "gate.overhead_budget": 1.0}


# ---------------------------------------------------------------- how batches are gone through


def in_epochs(driver: Driver) -> None:
    """Through ``fit``, several rounds over the loader."""
    driver.trainer.fit(driver.batches[:20], total_steps=len(driver.batches), progress_callback=driver.note)


def once_through(driver: Driver) -> None:
    """Through ``train_epoch``, which uses the batch of a refused proposal again."""
    driver.trainer.train_epoch(driver.batches, progress_callback=driver.note)


def resumed(driver: Driver) -> None:
    """A checkpoint after three quarters, into freshly built objects."""
    middle = 3 * len(driver.batches) // 4
    for batch in driver.batches[:middle]:
        driver.step(batch)
    path = driver.trainer.save_checkpoint(driver.own / "checkpoint")
    driver.trace.end |= flat(driver.trainer.statistics(), "middle")
    driver.build(seed=5)
    driver.trainer.load_checkpoint(path)
    for batch in driver.batches[middle:]:
        driver.step(batch)


def resumed_across(driver: Driver) -> None:
    """The build that comes first saves; either goes on from that checkpoint."""
    middle = len(driver.batches) // 2
    if not any(driver.shared.iterdir()):
        driver.shared.joinpath("by").write_text("the build that came first\n", encoding="utf-8")
        for batch in driver.batches[:middle]:
            driver.trainer.step(batch)
        driver.trainer.save_checkpoint(driver.shared)
    (path,) = (p for p in driver.shared.iterdir() if p.is_dir())
    (driver.own / "metrics.jsonl").unlink(missing_ok=True)
    driver.build(seed=5)
    driver.trainer.load_checkpoint(path)
    for batch in driver.batches[middle:]:
        driver.step(batch)


def degraded(driver: Driver) -> None:
    """After the first accepted jump the targets move away, so that it fails on probation."""
    left = 0
    for index, (x, y) in enumerate(driver.batches):
        result = driver.step((x, y + 4.0 * (left > 0)))
        left = 6 if result.was_predicted and index < 40 else left - 1


def poisoned(driver: Driver) -> None:
    """NaN in the inputs, infinity in the targets, and a loss that explodes."""
    for index, (x, y) in enumerate(driver.batches):
        wrong = {9: (x * float("nan"), y), 17: (x, y + float("inf")), 26: (x, y + 1e4), 27: (x, y + 1e4)}
        driver.step(wrong.get(index, (x, y)))


def written_to(driver: Driver) -> None:
    """Somebody else writes to the weights between two steps, and asks for full steps."""
    for index, batch in enumerate(driver.batches):
        if index in (12, 22):
            with torch.no_grad():
                next(iter(driver.model.parameters())).mul_(1.1)
        if index == 30:
            driver.trainer.force_full_phase(7)
        driver.step(batch)


# ---------------------------------------------------------------- what must be seen


def sees(field: str, text: str) -> Any:
    """A step whose ``field`` holds ``text``."""
    return lambda trace: any(text in str(row.get(field)) for row in trace.steps)


def tells(event: str) -> Any:
    """A line of this event in the JSONL file."""
    return lambda trace: any(row["event"] == event for row in trace.records)


def ends_with(figure: str, value: Any) -> Any:
    """A figure of ``statistics()``."""
    return lambda trace: trace.figure(figure) == value


def clipped(trace: Trace) -> bool:
    return sum((row["gradient_norm"] or 0.0) > 0.3 for row in trace.steps) >= 5


def still(name: str) -> Any:
    """These weights are in the end what they were after the first step: the digest of one that never moved."""
    torch.manual_seed(1)
    wanted = digest(material.frozen().state_dict()[name])
    return lambda trace: trace.end[f"weights.{name}"] == wanted


class HeldOut:
    """A validation loss that counts how often it is asked."""

    def __init__(self) -> None:
        self.batch, self.calls = noisy(1, 64, seed=8)[0], 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        with torch.no_grad():
            return float(mean_square(model, self.batch))


def scaler() -> dict[str, Any]:
    return {"grad_scaler": torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5)}


def own(**changes: Any) -> Any:
    """A predictor of our own."""

    def make(hpt: ModuleType) -> Any:
        return material.downhill(hpt, **changes)

    return make


# ---------------------------------------------------------------- the runs


def full(kind: str, count: int = 40, about: str = "", **more: Any) -> Run:
    """Full-batch training with one predictor."""
    settings = {"predictor.type": kind, **more.pop("settings", {})}
    given = {"least": JUMPS, "batches": partial(material.full_batch, count), **more}
    return Run(about=about or f"predictor {kind}, full batch", settings=settings, **given)


def stochastic(kind: str, count: int = 48, about: str = "", **more: Any) -> Run:
    """Always new batches with one predictor."""
    settings = {"predictor.type": kind, **EASY, **more.pop("settings", {})}
    given = {"least": ASKED, "batches": partial(noisy, count), "schedule": decay, **more}
    return Run(about=about or f"predictor {kind}, noisy losses", settings=settings, **given)


def ordinary(about: str, num: int, size: int = 32, noise: float = 0.3, **more: Any) -> Run:
    """Nearly the default settings, always new batches, a rate that is far too small."""
    given = {"base": DEFAULTS, "optimizer": slow_adamw, "schedule": stable_decay, **more}
    return Run(about=about, batches=partial(noisy, num, size, noise), **given)


SMALL_RSSM = {
    "predictor.rssm.deterministic_dim": 16, "predictor.rssm.stochastic_dim": 4, "predictor.rssm.num_categoricals": 4,
    "predictor.rssm.hidden_dim": 16, "predictor.rssm.ensemble_size": 2, "predictor.rssm.num_samples": 2,
}  # fmt: skip
SMALL_MLP = {"predictor.mlp.hidden": [32, 16]}
WATCHED = {"encoder.low_rank": 2, "encoder.kfac": True, "encoder.health": 2}

PREDICTORS = {
    "hold-full": full("hold", least=ASKED),
    "heuristic-full": full("heuristic"),
    "secant-full": full("secant", optimizer=momentum),
    "quasi-newton-full": full("quasi_newton"),
    "linear-full": full("linear", 44),
    "dmd-full": full("dmd", 60, optimizer=momentum, least=ONE_JUMP),
    "mlp-full": full("mlp", settings=SMALL_MLP, least=ONE_JUMP),
    "rssm-full": full("rssm", 32, settings=SMALL_RSSM, least=ONE_JUMP),
    "heuristic-noisy": stochastic("heuristic"),
    "secant-noisy": stochastic("secant", optimizer=adamw, model=material.norm_dropout),
    "linear-noisy": stochastic("linear", settings=WATCHED, shows=tells("health")),
    "mlp-noisy": stochastic("mlp", settings=SMALL_MLP),
    "rssm-noisy": stochastic("rssm", 40, settings=SMALL_RSSM),
    "auto-full": full("auto", schedule=decay, base=DEFAULTS, shows=ends_with("predictor", "quasi_newton")),
    "auto-noisy": stochastic("auto", shows=ends_with("predictor", "secant")),
}

JUMPING = {
    "bandit": full(
        "heuristic", about="the bandit chooses the horizon", without={"training.horizon_rule": "doubling"},
        settings={"training.horizon_rule": "bandit", "training.clock": "cost"},
    ),
    "segments": full(
        "heuristic", about="jumps in three segments, on the credited clock",
        settings={"training.segments": 3, "training.clock": "credited"},
    ),
    "control": stochastic(
        "hold", about="approved jumps that are skipped as controls", predictor=own(), optimizer=material.plain_sgd,
        settings={"gate.control_fraction": 0.5}, batches=partial(noisy, 48, 64, 0.02), least={"num_controls": 1},
    ),
    "gate-exact": stochastic(
        "heuristic", about="noisy losses, judged as exact ones", settings={"gate.exact": "always"}, least=JUMPS
    ),
    "gate-noisy": full(
        "heuristic", about="exact losses, judged as noisy ones", settings={"gate.exact": "never", **EASY}, least=JUMPS
    ),
    "gate-average": full(
        "secant", about="judged at the window's mean weights", settings={"gate.judge_at": "average"}, optimizer=momentum
    ),
    "offload": full(
        "secant", about="the basis in host memory, in bfloat16",
        settings={"predictor.offload": True, "predictor.basis_dtype": "bfloat16"},
    ),
    "complex": full("heuristic", about="complex weights", model=material.Spectral),
    "frozen": full("quasi_newton", about="a frozen layer", model=material.frozen, shows=still("0.weight")),
    "tied": full("secant", about="tied weights, RMSprop", model=material.Tied, optimizer=material.rmsprop),
    "bfloat16": full("heuristic", about="bfloat16 weights", model=material.half, loss=material.half_mean_square),
}  # fmt: skip

MOVING = {
    "multiplier": ordinary("the learned multiplier is raised", 120, 64, least={"learned_scale": 1.5}),
    "blocks": ordinary(
        "early cuts in blocks that were never trained, which begin with a group warm-up", 36, model=material.Blocks,
        optimizer=fast_adamw, least={"num_early_cuts": 1}, without={"training.min_learned_scale": 1.0},
    ),
    "lookahead": ordinary(
        "lookahead between steps", 60, optimizer=adamw, without={"training.lookahead": 0.0, "training.smoothing": 0.0},
        settings={"training.lookahead_scope": "all", "gate.control_fraction": 0.2},
    ),
    "accumulated": stochastic("secant", about="four micro-batches in one loss", loss=material.accumulated),
    "clipped": stochastic(
        "secant", about="gradients are clipped", settings={"training.gradient_clip_norm": 0.3}, shows=clipped,
        without={"training.gradient_clip_norm": 0.0},
    ),
    "one-cycle": full("secant", about="a schedule that also moves momentum", schedule=material.one_cycle),
    "epochs": ordinary(
        "several passes, a schedule in epochs, and a validation loss that has a raise taken back", 120, act=in_epochs,
        settings={"training.lr_interval": "epoch"}, schedule=partial(decay, rate=0.2),
        more=lambda: {"val_fn": HeldOut(), "val_cost": 2.0}, least={"num_raises_taken_back": 1},
        shows=lambda trace: trace.end["val_fn_calls"] >= 1,
    ),
    "off": stochastic(
        "secant", about="prediction is off", settings={"training.enabled": False}, model=material.norm_dropout,
        least={"num_real_steps": 48}, shows=lambda trace: trace.figure("num_jumps_proposed") == 0,
    ),
}  # fmt: skip

GOING_WRONG = {
    "resumed": full("secant", about="a resume between jumps", act=resumed, schedule=decay, model=material.norm),
    "resumed-blocks": ordinary(
        "a resume with lookahead and group warm-up under way", 32, act=resumed, model=material.Blocks,
        optimizer=fast_adamw,
        least={"num_early_cuts": 1},
    ),
    "resumed-raised": ordinary(
        "a resume with a raised multiplier and lookahead", 100, 64, 0.02, act=resumed,
        settings={"training.lookahead_scope": "all"}, shows=lambda trace: trace.end["middle.learned_scale"] > 1,
    ),
    "resumed-across": full(
        "quasi_newton", about="the earlier build saves, this one goes on", act=resumed_across, schedule=decay
    ),
    "not-finite": stochastic(
        "secant", about="NaN, infinity and an explosion in the batches", act=poisoned,
        least={"num_skipped_steps": 2, "num_divergence_events": 1},
    ),
    "grad-scaler": stochastic(
        "secant", about="the same with a gradient scaler", more=scaler, act=poisoned, least={"num_skipped_steps": 2}
    ),
    "predictor-raises": full(
        "hold", about="a predictor that raises", predictor=own(fault="raises"),
        least={"num_predictor_failures": 1, **ONE_JUMP},
    ),
    "predictor-nan": full(
        "hold", about="a predictor that proposes NaN", predictor=own(fault="nan"), shows=sees("reason", "NaN"),
        least=JUMPS,
    ),
    "rollback": stochastic(
        "hold", about="jumps that fail on probation", predictor=own(), act=degraded, least={"num_rollbacks": 1}
    ),
    "written-to": full(
        "secant", about="weights written to from outside, full steps on request", act=written_to,
        least={"num_outside_writes": 2}, shows=sees("reason", "forced"),
    ),
    "train-epoch": stochastic("heuristic", about="the batch of a refused proposal is used again", act=once_through),
}  # fmt: skip

RUNS: dict[str, Run] = {**PREDICTORS, **JUMPING, **MOVING, **GOING_WRONG}
