"""Names that a command line may choose from, so that help and a wrong name need neither torch nor numpy.

The tables they stand for import torch.  ``tests/test_cli_help.py`` holds every tuple equal to its table: whoever adds a
task, a predictor or a preset adds its name here as well.
"""

from __future__ import annotations

#: Keys of ``tasks.TASKS``.
TASKS = (
    "gpt", "gpt-modern", "finetune", "bert", "digits", "digits-mlp", "cifar", "regression", "pinn-poisson",
    "pinn-burgers", "oscillator", "pinn-allen-cahn", "pinn-klein-gordon", "pinn-inverse",
)  # fmt: skip

#: ``experiments.sweep.plan.SAMPLERS``.
SAMPLERS = ("tpe", "random", "joint")

#: Values of ``tasks.base.OptimizerName`` and ``tasks.base.ScheduleName``.
OPTIMIZERS = ("adamw", "adamw8bit", "adam", "sgd", "muon")
SCHEDULES = ("wsd", "linear", "cosine", "constant")

#: Keys of ``predictors.PREDICTORS``, and what ``hpt bench predictors`` measures them against.
PREDICTORS = ("hold", "heuristic", "linear", "secant", "quasi_newton", "dmd", "mlp", "rssm")
#: Keys of ``config.settings.SOURCES``: proposals from residuals, for tasks that hand them out.
SOURCES = ("gauss_newton", "ntk", "portfolio")
REFERENCES = ("zero", "optimum")

#: Keys of ``config.presets.PRESETS``.
CONFIG_PRESETS = (
    "100M", "1B", "7B", "debug", "epochs", "epochs_adam", "finetune", "full_batch", "generalist", "large", "medium",
    "muon", "small", "specialist",
)  # fmt: skip
#: What stands for a choice between them: ``config.presets.AUTO``.
AUTO = "auto"

#: Regimes of ``hpt bench regimes`` that a person would run.
REGIMES = ("pinn", "epochs", "finetune", "lm", "lm-lowlr", "lm-muon")
#: And the one that has no loss to compare by: ``experiments.rollouts``.
ROLLOUTS = "rl"

#: Arms and settings of ``hpt bench harm``.
HARM_ARMS = ("plain", "other-order", "ours")
HARM_SETTINGS = (
    "mlp-b8-wsd", "mlp-b8-wsd-half-rate", "mlp-b8-cosine-long", "mlp-b64-wsd", "mlp-epochs",
    "mlp-b16-dropout-smoothing", "mlp-b128-sgd-momentum", "mlp-b64-sgd", "mlp-b4-sgd-momentum", "mlp-b256-decay",
    "mlp-accumulate", "mlp-no-schedule", "mlp-low-rate", "mlp-high-rate", "mlp-schedule-free", "mlp-muon",
    "mlp-bf16", "mlp-lora", "cnn-onecycle", "cnn-bn-step", "cnn-bn-adamw",
    "mlp-full-batch", "mlp-full-batch-decay", "logistic-full-batch", "digits-epochs", "teacher-b8",
    "teacher-b32", "drift-b32", "logistic-sgd-long", "friedman-high-rate", "friedman-onecycle",
    "regression-sgd-.01", "regression-sgd-.03", "regression-sgd-.1", "gru-linear", "lstm-text", "gpt-b8-cosine",
    "gpt-modern-b4-wsd", "gpt-modern-low-rate", "gpt-modern-arithmetic-low-rate", "encoder-b64-cosine",
    "encoder-b64-low-rate", "gpt-torch", "gpt-torch-adam",
    "gpt-bf16", "gpt-modern-muon", "gpt-muon", "gpt-tied-muon", "gpt-muon-arithmetic", "gpt-schedule-free",
    "gpt-arithmetic",
    "gpt-arithmetic-short", "gpt-tied-arithmetic-short", "gpt-tied-b8-cosine", "gpt-modern-arithmetic",
    "gpt-finetune-b2", "gpt-finetune-b2-low-rate", "gpt-finetune-b2-high-rate", "gpt-finetune-b8", "gpt-lora",
    "pinn-fixed", "pinn-fixed-residuals", "pinn-resampled-residuals", "regression-residuals",
    "pinn-resampled", "pinn-fresh",
)  # fmt: skip

#: Small models of ``hpt bench overhead`` and ``hpt bench profile``.
SMALL_MODELS = ("tiny", "mlp")

#: Keys of ``experiments.sweep.grids.GRIDS``.
SWEEP_GRIDS = ("gpt-source", "gpt-stories", "cnn", "pinn")

#: What ``hpt forecast`` may be told to know before: ``forecast.prior.PRIORS``.
PRIORS = ("language-models",)

#: Kinds of training whose speed-up was measured (``probe.of_task.KNOWN``).
PROBED = ("pinn", "epochs", "finetune", "lm-lowlr", "lm")

#: What ``hpt validate --ablation`` changes.
ABLATIONS = ("horizon", "frequency", "predictor", "confidence")
