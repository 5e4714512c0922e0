"""Fine-tuning: a language model that has learned one kind of text learns another, whole or by LoRA."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base import (
    DATA_DIR_VARIABLE,
    TaskDefaults,
    TaskSettings,
    count_parameters,
    data_dir,
    reject_settings,
    seeded_model,
    torch_dtype,
    unknown_name,
)
from ..recipes import build_optimizer, build_scheduler
from . import pretrained
from .batches import NUM_VALID_WINDOWS, ReadsWindows, TokenWindows
from .gpt import PRESETS as GPT_PRESETS
from .gpt import Gpt, GptTask
from .llama import Llama, read_config, read_weights
from .lora import ALPHA, RANK, add_lora
from .text import MANUAL, MANUAL_PACKAGE, STDLIB_BYTES, load_corpus, load_stdlib
from .tokens import ScoredVocabulary, Tokenizer, encode_corpus, read_pieces

FINETUNE_BYTES = 4_000_000  # encoded in two seconds; 400 steps of 16 x 128 tokens see a fifth of it
DEFAULT_SET = "tinyshakespeare"
STORIES = "stories260K"


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How the model of the presets "stdlib" comes about.

    Attributes:
        preset: of task "gpt".
        steps: optimizer steps, with the recipe of task "gpt".
        data_bytes: of the standard library's source text.
        seed: of weights and batches.
    """

    preset: str = "0.3M"
    steps: int = 1500
    data_bytes: int = STDLIB_BYTES
    seed: int = 0


PRETRAINING = Pretraining()


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pretrained model.

    Attributes:
        name: where its weights come from, for reports.
        architecture: gradient checkpointing or not -> a new model without its weights.
        weights: its state dict.
        context: most tokens a sequence may have.
        tokenizer: `None` for bytes.
    """

    name: str
    architecture: Callable[[bool], nn.Module]
    weights: dict[str, Tensor]
    context: int
    tokenizer: Tokenizer | None = None


def load_stories() -> Base:
    """Return the 260,000-parameter Llama trained on TinyStories (llama2.c), from `HPT_DATA_DIR`/models/stories260K.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its files are not what they should be.
    """
    folder = data_dir(f"the pretrained model {STORIES} (models/{STORIES})") / "models" / STORIES
    config = read_config(folder / "config.json")
    vocabulary = ScoredVocabulary(read_pieces(folder / "tok512.bin"))
    return Base(
        name=f"{DATA_DIR_VARIABLE}/models/{STORIES}",
        architecture=lambda checkpointing: Llama(config, gradient_checkpointing=checkpointing),
        weights=read_weights(folder / f"{STORIES}.safetensors", config),
        context=config.context,
        tokenizer=vocabulary,
    )


def load_pretrained_gpt() -> Base:
    """Return a small GPT trained on the standard library's source text: from the cache, or trained now."""
    plan = PRETRAINING
    # Without the manual, which is what it may be tuned to.
    corpus = load_stdlib(plan.data_bytes, without=frozenset({MANUAL_PACKAGE}))
    # In float32 on the CPU whatever the run's own device and precision are: one file serves all of them.
    task = GptTask(TaskSettings(preset=plan.preset), corpus)
    recipe = replace(task.defaults, steps=plan.steps, warmup_steps=min(task.defaults.warmup_steps, plan.steps // 10))
    key = {
        "pretraining": asdict(plan),
        "model": asdict(task.config),
        "recipe": asdict(recipe),
        "task": task.describe(),
        "torch": torch.__version__,
    }
    name = f"gpt-{plan.preset}-stdlib"
    weights = pretrained.cached_weights(name, key, functools.partial(pretrain, task, recipe, plan.seed))
    config = GPT_PRESETS[plan.preset]
    return Base(
        name=f"gpt {plan.preset}, {plan.steps} steps on the {task.source['name']}",
        architecture=lambda checkpointing: Gpt(config, gradient_checkpointing=checkpointing),
        weights=weights,
        context=config.context,
    )


def pretrain(task: GptTask, recipe: TaskDefaults, seed: int) -> dict[str, Tensor]:
    """Return the weights of the task's model after a plain run of the recipe, and say how it goes."""
    model = task.build_model(seed)
    optimizer = build_optimizer(model, recipe)
    schedule = build_scheduler(optimizer, recipe.schedule, recipe.steps, recipe.warmup_steps, recipe.decay_frac)
    progress = pretrained.ProgressLine(f"pretraining gpt {task.preset} for {pretrained.cache_dir()}", recipe.steps)
    for step, batch in zip(range(1, recipe.steps + 1), task.batches(seed), strict=False):
        optimizer.zero_grad()
        loss = task.loss_fn(model, batch)
        loss.backward()
        if recipe.grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
        schedule.step()
        progress(step, loss.item())
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A preset: which model, whether only low-rank corrections are trained, and the rates that suit that."""

    base: Callable[[], Base]
    lora: bool
    lr: float
    lr_grid: tuple[float, ...]


PRESETS: dict[str, Variant] = {
    "stdlib": Variant(base=load_pretrained_gpt, lora=False, lr=3e-3, lr_grid=(1e-3, 2e-3, 4e-3, 8e-3)),
    "stdlib-lora": Variant(base=load_pretrained_gpt, lora=True, lr=2e-2, lr_grid=(5e-3, 1e-2, 2e-2, 4e-2)),
    "stories260k": Variant(base=load_stories, lora=False, lr=3e-3, lr_grid=(3e-4, 1e-3, 3e-3, 1e-2)),
    "stories260k-lora": Variant(base=load_stories, lora=True, lr=1e-2, lr_grid=(1e-3, 3e-3, 1e-2, 3e-2)),
}
DEFAULT_PRESET = "stdlib"
DEFAULT_CONTEXT = 128


def default_data() -> str:
    """Return what is fine-tuned to by default: Tiny Shakespeare where it is under `HPT_DATA_DIR`, else the manual."""
    folder = os.environ.get(DATA_DIR_VARIABLE)
    return DEFAULT_SET if folder and (Path(folder) / "text" / DEFAULT_SET).exists() else MANUAL


class FinetuneTask(ReadsWindows):
    """A `Task`: next-token prediction that starts from a pretrained model, the same one for every seed.

    Args:
        settings: all but ternary apply; preset is one of `PRESETS`.
    """

    name = "finetune"
    deterministic = False
    steps_per_epoch = None

    def __init__(self, settings: TaskSettings) -> None:
        """Get the model and load the text it is to learn."""
        reject_settings(self.name, settings, "ternary")
        self.preset = settings.preset or DEFAULT_PRESET
        if self.preset not in PRESETS:
            raise unknown_name(f"preset of task {self.name!r}", self.preset, PRESETS)
        self.variant = PRESETS[self.preset]
        self.settings = settings
        self.dtype = torch_dtype(settings.dtype)
        self.defaults = TaskDefaults(
            lr=self.variant.lr,
            lr_grid=self.variant.lr_grid,
            betas=(0.9, 0.98),
            momentum=0.95,
            steps=400,
            warmup_steps=10,
            schedule="linear",
            grad_clip=1.0,
        )
        # Data first: a wrong name should not be found out after two minutes of pretraining.
        corpus = load_corpus(settings.data or default_data(), settings.data_bytes or FINETUNE_BYTES)
        self.base = self.variant.base()
        if self.base.tokenizer is not None:
            corpus = encode_corpus(corpus, self.base.tokenizer)
        self.source = corpus.source
        context = settings.context or DEFAULT_CONTEXT
        if context > self.base.context:
            raise ValueError(f"the model of preset {self.preset!r} knows {self.base.context} positions, not {context}")
        self._windows = TokenWindows(
            corpus,
            context=context,
            batch_size=settings.batch_size or 16,
            device=settings.device,
            autocast_bf16=settings.autocast_bf16,
        )

    def _new_model(self) -> nn.Module:
        model = self.base.architecture(self.settings.gradient_checkpointing)
        return add_lora(model) if self.variant.lora else model

    def _pretrained_model(self) -> nn.Module:
        model = self.base.architecture(self.settings.gradient_checkpointing)
        model.load_state_dict(self.base.weights)
        return add_lora(model) if self.variant.lora else model

    def build_model(self, seed: int) -> nn.Module:
        """Return the pretrained model; the seed decides the corrections of a LoRA preset only."""
        return seeded_model(self._pretrained_model, seed, self.settings, self.dtype)

    def describe(self) -> dict[str, Any]:
        """Return preset, start, sizes, data provenance and precision."""
        with torch.device("meta"):
            num_trained = sum(p.numel() for p in self._new_model().parameters() if p.requires_grad)
        return {
            "task": self.name,
            "preset": self.preset,
            "data": self.source,
            "pretrained": {"name": self.base.name, "sha256": pretrained.fingerprint(self.base.weights)},
            "num_parameters": count_parameters(self._new_model),
            "num_trained_parameters": num_trained,
            "lora": {"rank": RANK, "alpha": ALPHA} if self.variant.lora else None,
            "context": self._windows.context,
            "batch_size": self._windows.batch_size,
            "num_valid_windows": NUM_VALID_WINDOWS,
            "dtype": str(self.dtype).removeprefix("torch."),
            "autocast_bf16": self.settings.autocast_bf16,
        }
