"""Named starting points, as dotted TOML keys over the defaults.

The numbers are those the specification gives for model sizes and uses.  What it also names per
preset and this version does not have (RSSM sizes, ensembles) is left to the predictor's table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: The same data many times; set predictor.window to the batches of an epoch: noise repeats with the data, so that
#: what is left between the means of two epochs is drift, and a jump every epoch costs next to nothing to test.
EPOCHS: Mapping[str, Any] = {
    "predictor.type": "hold", "predictor.rest_windows": 0, "training.correct_steps": 0, "lookahead.extrapolation": 0.0,
    "lookahead.damping": 0.0, "training.confidence_threshold": 0.0, "gate.overhead_budget": 0.05,
    "gate.significance": 0.5, "gate.holdout_fraction": 0.0, "gate.min_persistence": 0.5,
}  # fmt: skip

#: What comes with a source of closed-form moves: few real steps, and no budget that would stop it.
CLOSED_FORM: Mapping[str, Any] = {
    "predictor.type": "gauss_newton", "predictor.window": 1, "training.warmup_steps": 20,
    "training.correct_steps": 0, "training.confidence_threshold": 0.0, "gate.overhead_budget_exact": 1.0,
    "gate.holdout_fraction": 0.0, "gate.max_backoff": 1,
}  # fmt: skip

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # by size of the model (methodology document, section "Presets")
    "small": {
        "training.warmup_steps": 100, "training.full_steps": 20, "training.max_predict_steps": 60,
        "training.divergence_threshold": 3.0,
    },
    "medium": {
        "training.warmup_steps": 200, "training.full_steps": 30, "training.max_predict_steps": 80,
        "training.divergence_threshold": 2.5,
    },
    "large": {
        "training.warmup_steps": 500, "training.full_steps": 50, "training.max_predict_steps": 100,
        "training.divergence_threshold": 2.0, "predictor.basis_dtype": "bfloat16", "predictor.offload": True,
    },
    # every batch is the whole data set, so that losses are exact and every step may bring a proposal
    "full_batch": {
        "predictor.type": "quasi_newton", "predictor.window": 1, "training.warmup_steps": 20,
        "training.correct_steps": 0, "training.confidence_threshold": 0.0, "gate.overhead_budget_exact": 1.0,
        "gate.holdout_fraction": 0.02, "gate.max_backoff": 64,
    },
    "epochs": EPOCHS,
    # Adam's steps have the same length whatever the gradient, so they oscillate, and damping helps; SGD with momentum
    # gets worse (LOG.md)
    "epochs_adam": {
        **EPOCHS, "lookahead.damping": 0.25, "lookahead.drift": 0.0, "lookahead.scope": "all",
    },
    # short fine-tuning: too few steps to know the drift; damping helps as much as Lookahead (LOG.md)
    "finetune": {
        "lookahead.extrapolation": 0.0, "lookahead.damping": 0.4, "lookahead.drift": 0.0, "lookahead.scope": "all",
    },
    # orthogonal steps do not oscillate, group warm-up only slows them down, and extrapolating their drift gains more
    # (EMA-Nesterov was published with 0.6 for them; twice that is better here)
    "muon": {
        "lookahead.extrapolation": 1.2, "lookahead.damping": 0.0, "training.min_group_factor": 1.0,
        "lookahead.scope": "all",
    },
    # by breadth of the data
    "specialist": {
        "training.warmup_steps": 100, "training.full_steps": 15, "training.max_predict_steps": 120,
    },
    "generalist": {
        "training.warmup_steps": 500, "training.full_steps": 50, "training.max_predict_steps": 80,
    },
}  # fmt: skip
