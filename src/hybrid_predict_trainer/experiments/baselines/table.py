"""All baselines by name, with the hyper-parameters their papers give."""

from __future__ import annotations

from . import flat, lbfgs
from .averaging import ema, lawa
from .base import Baseline, in_loop, recipe_grid
from .optimizers import (
    lookahead,
    lookahead_optimizer,
    prodigy,
    prodigy_grid,
    prodigy_optimizer,
    schedule_free,
    schedule_free_optimizer,
    soap,
    soap_optimizer,
)
from .outer import ema_nesterov, snoo
from .roles import default_rate, muon, mup, newton_schulz, normuon, role_rates, taken_home
from .second_order import METHODS
from .warmup import block_warmup, long_warmup
from .wnn import wnn_plus


def _role_rates(rates: str, factors: dict[str, float], source: str = "-") -> Baseline:
    return Baseline(
        about=f"the plain recipe, {rates}",
        source=source,
        family="schedule",
        weights_only=False,
        values=factors,
        grid=recipe_grid,
        train=in_loop(optimizer=role_rates),
    )


def _taken_home(times: int) -> Baseline:
    return Baseline(
        about=f"a plain loop with the recipe of a run of ours of 1/{times} of the length, at the task's default rate",
        source="-",
        family="schedule",
        weights_only=False,
        values={"times_longer": times},
        grid=default_rate,
        train=taken_home,
    )


def _lbfgs(history: int) -> Baseline:
    return Baseline(
        about=f"L-BFGS, strong Wolfe, {history} pairs; every evaluation counted",
        source="Liu and Nocedal 1989; torch.optim.LBFGS",
        family="quasi-Newton",
        weights_only=False,
        deterministic_only=True,
        values={"history": history},
        grid=lbfgs.grid,
        train=lbfgs.train,
    )


def _full_batch(about: str, source: str, iterations: flat.Iterations, *, residuals: bool = False) -> Baseline:
    return Baseline(
        about=about,
        source=source,
        family="Gauss-Newton" if residuals else "quasi-Newton",
        weights_only=False,
        deterministic_only=True,
        needs_residuals=residuals,
        values={},
        grid=flat.one_rate,
        train=flat.train(iterations),
    )


BASELINES: dict[str, Baseline] = {
    "snoo": Baseline(
        about="outer Nesterov momentum on the displacement of every 28 steps",
        source="arXiv 2510.15830",
        family="outer loop",
        weights_only=True,
        values={"every": 28, "eta": 0.68, "mu": 0.37},
        grid=recipe_grid,
        train=in_loop(snoo),
    ),
    "lookahead": Baseline(
        about="slow weights go half of the way that five steps went",
        source="arXiv 1907.08610; pytorch_optimizer",
        family="outer loop",
        weights_only=True,
        values={"every": 5, "alpha": 0.5},
        grid=recipe_grid,
        train=in_loop(lookahead, optimizer=lookahead_optimizer),
    ),
    "ema-nesterov": Baseline(
        about="steps from a point ahead along the mean displacement, off in the decay",
        source="arXiv 2605.25395",
        family="outer loop",
        weights_only=True,
        values={"gamma": 0.99, "beta": 0.3, "beta_muon": 0.6},
        grid=recipe_grid,
        train=in_loop(ema_nesterov),
    ),
    "lawa": Baseline(
        about="validated at the mean of the last 5 checkpoints, 1 % of the run apart",
        source="arXiv 2209.14981, 2502.06761",
        family="averaging",
        weights_only=True,
        values={"num_checkpoints": 5, "spacing_frac": 0.01},
        grid=recipe_grid,
        train=in_loop(lawa),
    ),
    "ema": Baseline(
        about="validated at an exponential average of the weights over 1 % of the run",
        source="arXiv 2502.06761; torch.optim.swa_utils",
        family="averaging",
        weights_only=True,
        values={"tau_frac": 0.01},
        grid=recipe_grid,
        train=in_loop(ema),
    ),
    "wnn+": Baseline(
        about="a pretrained network forecasts every weight from its last five states, up to five times a run",
        source="arXiv 2409.04434, nino_mlp.pt",
        family="forecast",
        weights_only=True,
        values={"max_forecasts": 5, "cost_frac": 0.05},
        grid=recipe_grid,
        train=in_loop(wnn_plus),
    ),
    "long-warmup": Baseline(
        about="the plain recipe, warmed up over 2 / (1 - beta_2) steps: what a better recipe would have won",
        source="arXiv 1910.04209",
        family="schedule",
        weights_only=False,
        values={},
        grid=recipe_grid,
        train=in_loop(changed=long_warmup),
    ),
    "block-warmup": Baseline(
        about="the plain recipe, attention and MLP matrices warmed up over 100 steps: the fixed part of the early cuts",
        source="-",
        family="schedule",
        weights_only=False,
        values={"steps": 100},
        grid=recipe_grid,
        train=in_loop(block_warmup),
    ),
    "schedule-free": Baseline(
        about="Schedule-Free AdamW: averaging in place of a schedule",
        source="arXiv 2405.15682; schedulefree",
        family="optimizer",
        weights_only=False,
        values={"beta1": 0.9, "warmup_frac": 0.05},
        grid=recipe_grid,
        train=in_loop(schedule_free, optimizer=schedule_free_optimizer, scheduled=False),
    ),
    "prodigy": Baseline(
        about="Adam that finds its own step size; the rate is a multiple of it",
        source="arXiv 2306.06101; prodigyopt",
        family="optimizer",
        weights_only=False,
        values={"d_coef": 1.0},
        grid=prodigy_grid,
        train=in_loop(prodigy, optimizer=prodigy_optimizer),
    ),
    "soap": Baseline(
        about="Adam in the eigenbasis of Shampoo's preconditioner, renewed every 10 steps",
        source="arXiv 2409.11321; pytorch_optimizer",
        family="optimizer",
        weights_only=False,
        values={"beta1": 0.95, "beta2": 0.95, "every": 10, "max_dim": 10_000},
        grid=recipe_grid,
        train=in_loop(soap, optimizer=soap_optimizer),
    ),
    "two-rates": _role_rates(
        "embedding and head at four times the blocks' rate", {"embedding": 4.0, "head": 4.0}, "arXiv 2502.19002"
    ),
    "four-rates": _role_rates(
        "head at eight, embedding at four, queries and keys at three times the others' rate",
        {"head": 8.0, "embedding": 4.0, "attention_q": 3.0, "attention_k": 3.0},
    ),
    "embedding-rate": _role_rates("embedding at eight times the others' rate: beside Muon", {"embedding": 8.0}),
    "taken-home-3": _taken_home(3),
    "taken-home-10": _taken_home(10),
    "mup": Baseline(
        about="the plain recipe, embedding and vectors faster by the width over a base width of 32",
        source="arXiv 2203.03466",
        family="schedule",
        weights_only=False,
        values={"base_width": 32.0},
        grid=recipe_grid,
        train=in_loop(optimizer=mup),
    ),
    "muon": Baseline(
        about="Muon for hidden matrices, AdamW for the rest, one rate for both",
        source="Jordan et al. 2024, arXiv 2502.16982; torch.optim.Muon",
        family="optimizer",
        weights_only=False,
        values={"iterations": 5},
        grid=recipe_grid,
        train=in_loop(newton_schulz, optimizer=muon),
    ),
    "normuon": Baseline(
        about="Muon with a second moment per row of its step, AdamW for the rest, one rate for both",
        source="arXiv 2510.05491; pytorch_optimizer",
        family="optimizer",
        weights_only=False,
        values={"iterations": 5},
        grid=recipe_grid,
        train=in_loop(newton_schulz, optimizer=normuon),
    ),
    "lbfgs-20": _lbfgs(20),
    "lbfgs-100": _lbfgs(100),
    "lbfgs-400": _full_batch(
        "100 steps of Adam, then self-scaled L-BFGS, strong Wolfe, 400 pairs, lean",
        "Al-Baali 1998; own",
        METHODS["lean-lbfgs"],
    ),
    "ssbfgs": _full_batch(
        "100 steps of Adam, then dense self-scaled BFGS, strong Wolfe",
        "Al-Baali 1998, arXiv 2405.04230; own",
        METHODS["ssbfgs"],
    ),
    "ssbroyden": _full_batch(
        "100 steps of Adam, then dense self-scaled Broyden, strong Wolfe",
        "Al-Baali 1998, arXiv 2405.04230; own",
        METHODS["ssbroyden"],
    ),
    "nysnewton-cg": _full_batch(
        "100 steps of Adam, 100 of L-BFGS, then Newton's method by sketched conjugate gradients",
        "arXiv 2402.01868; own",
        METHODS["nysnewton-cg"],
    ),
    "lm": _full_batch(
        "Levenberg-Marquardt on the residuals",
        "Levenberg 1944, Marquardt 1963; own",
        METHODS["lm"],
        residuals=True,
    ),
}
