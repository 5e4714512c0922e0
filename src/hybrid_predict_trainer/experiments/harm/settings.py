"""What ``hpt bench harm`` trains: pure data, edited here and nowhere else.

A setting is a model, data, an optimizer with its schedule, a batch size and a length, as somebody would choose them who
never heard of this library.  No constant of the method may be chosen by looking at these runs; a setting that shows
harm stays in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...tasks.base import unknown_name

#: Of the judged runs; long settings have fewer.
NUM_SEEDS, NUM_SEEDS_LONG = 5, 3

Source = Literal[
    "glyphs", "glyphs-turned", "digits", "teacher", "drift", "friedman", "automaton", "arithmetic",
    "stdlib", "manual", "regression", "poisson", "oscillator",
]  # fmt: skip
Model = Literal[
    "mlp", "logistic", "cnn", "cnn-bn", "gru", "lstm", "gpt", "gpt-tied", "gpt-modern", "gpt-torch", "encoder",
    "mlp-lora", "gpt-lora", "gpt-trained", "pinn", "mlp-bf16", "gpt-bf16",
]  # fmt: skip
Optimizer = Literal["sgd", "adam", "adamw", "muon", "schedule-free"]
Schedule = Literal["none", "constant", "wsd", "cosine", "linear", "onecycle", "step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table.

    Attributes:
        name: unique.
        source: of the data; all are made, or come with Python or scikit-learn.
        samples: training samples that the run passes over again and again in a new order each time; 0: every batch is
            new.  For equations: the points are drawn anew every so many steps, 0 for never.
        full: every step sees the same batch.
        batch: samples per step; for equations, points.
        model: by name.
        dropout: probability, where the model has such layers.
        optimizer: by name.
        lr: peak rate.
        momentum: of SGD.
        weight_decay: of matrices only for language models, of everything elsewhere.
        schedule: "none": the trainer gets no schedule.
        warmup: steps of linear warm-up.
        clip: largest global norm of the gradient; 0: no clipping.
        label_smoothing: of the training loss; validation is without.
        residuals: the trainer is handed what the loss is the mean square of.
        accumulate: micro-batches whose mean loss is one step's, each of ``batch`` samples.
        steps: length.
        num_seeds: judged runs.
        rate: what a user who tunes would say of ``lr``: "usual", "low" (a third of it) or "high" (twice).
        quick_steps: length with ``--quick``; None: left out there.
        quick_seeds: runs with ``--quick``.
        ms: of a plain step on one core, for the estimate of the time left.
        about: what is special.
    """

    name: str
    source: Source
    model: Model
    batch: int
    lr: float
    steps: int
    samples: int = 0
    full: bool = False
    dropout: float = 0.0
    optimizer: Optimizer = "adamw"
    momentum: float = 0.0
    weight_decay: float = 0.01
    schedule: Schedule = "cosine"
    warmup: int = 0
    clip: float = 0.0
    label_smoothing: float = 0.0
    residuals: bool = False
    accumulate: int = 1
    num_seeds: int = NUM_SEEDS
    rate: Literal["usual", "low", "high"] = "usual"
    quick_steps: int | None = None
    quick_seeds: int = 2
    ms: float = 0.5
    about: str = ""

    @property
    def full_batch(self) -> bool:
        """Whether every step sees the same data: then there is no order to change."""
        return self.full or self.source == "regression" or (self.is_equation and self.samples == 0)

    @property
    def is_equation(self) -> bool:
        """Whether the loss is the residual of a differential equation."""
        return self.source in ("poisson", "oscillator")

    @property
    def is_text(self) -> bool:
        """Whether the data are bytes of text."""
        return self.source in ("stdlib", "manual")


def _mlp(name: str, **changes: object) -> Setting:
    base = Setting(name=name, source="glyphs", model="mlp", batch=64, lr=1e-3, steps=1000, ms=0.45)
    return replace(base, **changes)  # type: ignore[arg-type]


def _gpt(name: str, **changes: object) -> Setting:
    base = Setting(
        name=name, source="stdlib", model="gpt-modern", batch=4, lr=3e-3, steps=1000, weight_decay=0.1, warmup=30,
        clip=1.0, schedule="wsd", ms=5.5,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def _finetune(name: str, **changes: object) -> Setting:
    values = {"source": "manual", "model": "gpt-trained", "schedule": "linear", "weight_decay": 0.0, "steps": 600}
    return _gpt(name, **(values | changes))


def _equation(name: str, **changes: object) -> Setting:
    base = Setting(
        name=name, source="poisson", model="pinn", batch=64, lr=2e-3, steps=1000, optimizer="adam", weight_decay=0.0,
        ms=1.2,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def _regression(name: str, lr: float, **changes: object) -> Setting:
    base = Setting(
        name=name, source="regression", model="mlp", batch=64, lr=lr, steps=400, optimizer="sgd", weight_decay=0.0,
        schedule="linear", ms=0.3,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


_IMAGES = (
    _mlp("mlp-b8-wsd", batch=8, schedule="wsd", steps=4000, about="fresh small batches", quick_steps=2000),
    _mlp("mlp-b8-wsd-half-rate", batch=8, lr=5e-4, schedule="wsd", steps=4000),
    _mlp("mlp-b8-cosine-long", batch=8, steps=20_000, num_seeds=NUM_SEEDS_LONG),
    _mlp("mlp-b64-wsd", schedule="wsd", steps=4000),
    _mlp("mlp-epochs", samples=2000, about="32 epochs over 2,000 images", quick_steps=1000),
    _mlp("mlp-b16-dropout-smoothing", batch=16, lr=2e-3, dropout=0.3, label_smoothing=0.1),
    _mlp(
        "mlp-b128-sgd-momentum", batch=128, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, quick_steps=1000
    ),
    _mlp("mlp-b64-sgd", optimizer="sgd", lr=0.1, weight_decay=0.0, schedule="constant", steps=4000),
    _mlp("mlp-b4-sgd-momentum", batch=4, optimizer="sgd", lr=1e-2, momentum=0.9, schedule="linear", steps=4000),
    _mlp("mlp-b256-decay", batch=256, weight_decay=0.3, lr=3e-3, schedule="linear", ms=0.8),
    _mlp("mlp-accumulate", batch=16, accumulate=4, lr=3e-3, schedule="wsd", ms=1.0),
    _mlp("mlp-no-schedule", schedule="none", lr=3e-3),
    _mlp("mlp-low-rate", lr=3e-4, rate="low", steps=4000, batch=32),
    _mlp("mlp-high-rate", batch=32, lr=6e-3, rate="high", schedule="wsd", steps=4000),
    _mlp("mlp-schedule-free", batch=16, optimizer="schedule-free", schedule="none", lr=3e-3, steps=4000, ms=0.6),
    _mlp("mlp-muon", batch=128, optimizer="muon", lr=3e-3, schedule="linear", weight_decay=0.1, ms=4.5),
    _mlp("mlp-bf16", model="mlp-bf16", about="weights and their moments in bfloat16"),
    _mlp("mlp-lora", source="glyphs-turned", model="mlp-lora", batch=32, lr=5e-3, ms=0.6),
    _mlp("cnn-onecycle", model="cnn", batch=32, lr=5e-3, schedule="onecycle", ms=2.5),
    _mlp(
        "cnn-bn-step", model="cnn-bn", samples=4000, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4,
        schedule="step", about="16 epochs, the rate falls twice", ms=4.5,
    ),
    _mlp("cnn-bn-adamw", model="cnn-bn", batch=128, lr=3e-3, weight_decay=0.05, ms=7.0, quick_steps=150),
    _mlp("mlp-full-batch", full=True, batch=1000, lr=3e-3, steps=300, about="few labels for so many weights", ms=4.0),
    _mlp("mlp-full-batch-decay", full=True, batch=1000, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4,
         steps=300, about="full batch, decay that is added to the gradient", ms=4.0),
    _mlp("logistic-full-batch", full=True, model="logistic", batch=4000, lr=1e-2, steps=300, ms=2.0,
         about="few labels still"),
    _mlp("digits-epochs", source="digits", samples=1400, batch=32, lr=3e-3, weight_decay=0.1, schedule="step"),
)  # fmt: skip

_TABLES = (
    _mlp("teacher-b8", source="teacher", batch=8, lr=5e-4, schedule="wsd", warmup=100, steps=6000),
    _mlp("teacher-b32", source="teacher", batch=32, lr=5e-4, schedule="wsd", warmup=100, steps=6000),
    _mlp("drift-b32", source="drift", batch=32, schedule="wsd", steps=4000, about="the target changes every 200 steps"),
    _mlp("logistic-sgd-long", model="logistic", batch=32, optimizer="sgd", lr=0.05, weight_decay=1e-4,
         schedule="linear", steps=20_000, num_seeds=NUM_SEEDS_LONG, ms=0.2),
    _mlp("friedman-high-rate", source="friedman", batch=32, lr=3e-2, rate="high", schedule="linear", clip=1.0),
    _mlp("friedman-onecycle", source="friedman", samples=1000, batch=16, lr=2e-2, schedule="onecycle", steps=1000,
         optimizer="sgd", momentum=0.9),
    _regression("regression-sgd-.01", 0.01, about="full batch", rate="low", quick_steps=400),
    _regression("regression-sgd-.03", 0.03, about="full batch", quick_steps=400),
    _regression("regression-sgd-.1", 0.1, about="full batch"),
)  # fmt: skip

_SEQUENCES = (
    _mlp(
        "gru-linear", source="automaton", model="gru", batch=32, lr=3e-3, schedule="linear", clip=1.0, ms=4.7,
        quick_steps=200,
    ),
    _gpt("lstm-text", model="lstm", batch=16, lr=3e-3, schedule="cosine", weight_decay=0.0, ms=5.5),
    _gpt("gpt-b8-cosine", model="gpt", batch=8, lr=1e-3, dropout=0.1, schedule="cosine", warmup=100, ms=7.5),
    _gpt("gpt-modern-b4-wsd", steps=3000, quick_steps=300),
    _gpt("gpt-modern-low-rate", batch=8, lr=3e-4, schedule="cosine", about="a tenth of the best"),
    _gpt("gpt-modern-arithmetic-low-rate", source="arithmetic", batch=16, lr=1e-3, schedule="linear", steps=600,
         ms=5.0),
    _mlp("encoder-b64-cosine", model="encoder", weight_decay=0.01, ms=6.0, about="its only table holds positions"),
    _mlp("encoder-b64-low-rate", model="encoder", lr=1e-4, weight_decay=0.01, schedule="linear", ms=6.0),
    _gpt("gpt-torch", model="gpt-torch", batch=8, lr=1e-3, schedule="cosine", ms=7.5,
         about="torch's layers and initial values"),
    _gpt("gpt-torch-adam", model="gpt-torch", batch=16, optimizer="adam", lr=3e-4, schedule="linear", dropout=0.1,
         warmup=0, clip=0.0, steps=600),
    _gpt("gpt-bf16", model="gpt-bf16", batch=8, schedule="cosine", steps=600, about="the same of a GPT", ms=9.0),
    _gpt("gpt-modern-muon", batch=8, optimizer="muon", ms=15.0),
    _gpt("gpt-muon", model="gpt", batch=8, optimizer="muon", lr=1e-2, schedule="cosine", warmup=100, ms=11.0),
    _gpt("gpt-tied-muon", model="gpt-tied", batch=8, optimizer="muon", lr=1e-2, schedule="linear", warmup=0,
         about="the head is the embedding", ms=11.0),
    _gpt("gpt-muon-arithmetic", source="arithmetic", model="gpt", batch=16, optimizer="muon", schedule="linear",
         warmup=0, clip=0.0, weight_decay=0.01, steps=600, about="two tokens tell the next", ms=9.0),
    _gpt("gpt-schedule-free", model="gpt", batch=8, optimizer="schedule-free", schedule="none", clip=0.0, ms=6.0),
    _gpt("gpt-arithmetic", source="arithmetic", model="gpt", batch=16, schedule="linear", warmup=0, clip=0.0,
         weight_decay=0.01, steps=600, about="two tokens tell the next", ms=5.0),
    _gpt("gpt-arithmetic-short", source="arithmetic", model="gpt", batch=16, schedule="linear", warmup=0, clip=0.0,
         weight_decay=0.01, steps=150, about="ends before it has learned the rule", ms=5.0),
    _gpt("gpt-tied-arithmetic-short", source="arithmetic", model="gpt-tied", batch=16, schedule="linear", warmup=0,
         clip=0.0, weight_decay=0.01, dropout=0.1, steps=150, about="the same, the head is the embedding", ms=5.0),
    _gpt("gpt-tied-b8-cosine", model="gpt-tied", batch=8, dropout=0.1, schedule="cosine", warmup=100,
         about="the head is the embedding", ms=7.5),
    _gpt("gpt-modern-arithmetic", source="arithmetic", batch=16, schedule="wsd", steps=600, ms=5.0),
    _finetune("gpt-finetune-b2", batch=2, lr=1e-3, rate="low", about="all weights of a trained model", ms=4.0),
    _finetune("gpt-finetune-b2-low-rate", batch=2, lr=1e-4, rate="low", about="a thirtieth of the best", ms=4.0),
    _finetune("gpt-finetune-b2-high-rate", batch=2, lr=1e-2, rate="high", about="three times the best", ms=4.0),
    _finetune("gpt-finetune-b8", batch=8, lr=6e-3, ms=9.0),
    _gpt("gpt-lora", source="manual", model="gpt-lora", batch=8, lr=1e-3, schedule="linear", weight_decay=0.0, ms=9.0),
)  # fmt: skip

_EQUATIONS = (
    _equation("pinn-fixed", about="the same points at every step"),
    _equation("pinn-fixed-residuals", residuals=True, about="and residuals are handed in", quick_steps=300),
    _equation("pinn-resampled-residuals", source="oscillator", samples=50, lr=4e-3, residuals=True,
              about="new points every 50 steps"),
    _regression("regression-residuals", 0.03, residuals=True, about="full batch, residuals are handed in"),
    _equation("pinn-resampled", source="oscillator", samples=50, lr=4e-3, about="new points every 50 steps"),
    _equation("pinn-fresh", samples=1, about="new points at every step", quick_steps=600),
)  # fmt: skip

SETTINGS: dict[str, Setting] = {s.name: s for s in (*_IMAGES, *_TABLES, *_SEQUENCES, *_EQUATIONS)}


def select(wanted: Sequence[str], *, quick: bool = False) -> tuple[Setting, ...]:
    """The settings to run: those that are named, else all, or with ``quick`` the quick ones, at their quick length.

    Raises:
        ValueError: a name is not one of the table's.
    """
    for name in wanted:
        if name not in SETTINGS:
            raise unknown_name("setting of 'hpt bench harm'", name, SETTINGS)
    chosen = [SETTINGS[name] for name in dict.fromkeys(wanted)] or list(SETTINGS.values())
    if not quick:
        return tuple(chosen)
    return tuple(
        replace(s, steps=s.quick_steps or s.steps, num_seeds=s.quick_seeds)
        for s in chosen
        if wanted or s.quick_steps is not None
    )
