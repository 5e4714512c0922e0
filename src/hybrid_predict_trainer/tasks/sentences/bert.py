"""BERT (Devlin et al. 2018, arXiv 1810.04805) and the task of classifying sentences or pairs of them.

Modules are named as in the published files, so that those load without a table of names.

Shapes: B examples, T tokens, W width, H heads. Inputs are (B, 2, T): tokens and segments.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ..base import (
    DATA_DIR_VARIABLE,
    Batch,
    TaskDefaults,
    TaskSettings,
    count_parameters,
    counter_rng,
    data_dir,
    reject_settings,
    seeded_model,
    sent,
    torch_dtype,
    unknown_name,
)
from ..labelled import ReadsLabelled, batches_per_epoch
from .data import load_sentences
from .wordpieces import PAD, HashedWords, WordTokenizer, encode_examples, read_vocabulary

NORM_EPS = 1e-12
INIT_STD = 0.02
MODEL_FOLDER = "models/bert-base-uncased"


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """A model's shape and how it is trained.

    Attributes:
        num_layers: of the encoder.
        width: of the residual stream.
        num_heads: divides width.
        hidden: width of the MLP.
        vocab_size: tokens the model knows.
        num_positions: most tokens an example may have.
        dropout: of embeddings, attention and outputs.
        context: default number of tokens per example; longer ones are cut.
        batch_size: default.
        pretrained: start from the weights under `HPT_DATA_DIR`.
        lr: peak rate for AdamW.
        lr_grid: rates a tuned baseline is chosen from.
    """

    num_layers: int
    width: int
    num_heads: int
    hidden: int
    vocab_size: int
    num_positions: int
    dropout: float
    context: int
    batch_size: int
    pretrained: bool = False
    lr: float
    lr_grid: tuple[float, ...]


BASE = BertConfig(
    num_layers=12, width=768, num_heads=12, hidden=3072, vocab_size=30522, num_positions=512, dropout=0.1,
    context=128, batch_size=32, lr=1e-4, lr_grid=(1e-5, 3e-5, 1e-4, 3e-4),
)  # fmt: skip
PRESETS: dict[str, BertConfig] = {
    # No dropout: with it two runs differ by more than what is compared, at this size.
    "bert-tiny": BertConfig(
        num_layers=2, width=64, num_heads=2, hidden=256, vocab_size=4096, num_positions=128, dropout=0.0,
        context=32, batch_size=32, lr=1e-3, lr_grid=(3e-4, 1e-3, 3e-3, 1e-2),
    ),
    "bert-base": BASE,
    # The paper's own grid for GLUE (appendix A.3), at batches of 32.
    "bert-base-pretrained": replace(BASE, pretrained=True, lr=3e-5, lr_grid=(2e-5, 3e-5, 4e-5, 5e-5)),
}  # fmt: skip
DEFAULT_PRESET = "bert-tiny"


class BertLayer(nn.Module):
    """Attention and MLP, each added to its input and normalised behind it."""

    def __init__(self, config: BertConfig) -> None:
        """Draw the layer's weights."""
        super().__init__()
        width = config.width
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.attention = nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
            "output": _dense_and_norm(width, width),
        })  # fmt: skip
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.hidden)})
        self.output = _dense_and_norm(config.hidden, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Return (B, T, W) for (B, T, W); visible is (B, 1, 1, T), false for padding."""
        heads = (*x.shape[:2], self.num_heads, -1)
        inner: Any = self.attention["self"]
        q, k, v = (inner[name](x).view(heads).transpose(1, 2) for name in ("query", "key", "value"))
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)
        x = self._add(self.attention["output"], mixed.transpose(1, 2).reshape(x.shape), x)
        return self._add(self.output, functional.gelu(self.intermediate["dense"](x)), x)

    def _add(self, output: Any, change: Tensor, x: Tensor) -> Tensor:
        change = functional.dropout(output["dense"](change), self.dropout, self.training)
        return output["LayerNorm"](x + change)  # type: ignore[no-any-return]


def _dense_and_norm(inputs: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, width), "LayerNorm": nn.LayerNorm(width, eps=NORM_EPS)})


class Bert(nn.Module):
    """Encoder, pooler and classifier.

    Args:
        config: its shape.
        num_classes: of the output.
    """

    def __init__(self, config: BertConfig, num_classes: int) -> None:
        """Draw all weights: normal 0.02, biases zero."""
        super().__init__()
        width = config.width
        self.dropout = config.dropout
        self.bert = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "word_embeddings": nn.Embedding(config.vocab_size, width),
                "position_embeddings": nn.Embedding(config.num_positions, width),
                "token_type_embeddings": nn.Embedding(2, width),
                "LayerNorm": nn.LayerNorm(width, eps=NORM_EPS),
            }),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(BertLayer(config) for _ in range(config.num_layers))}),
            "pooler": nn.ModuleDict({"dense": nn.Linear(width, width)}),
        })  # fmt: skip
        self.classifier = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, classes) for inputs (B, 2, T), T at most the number of positions."""
        tokens, segments = inputs.unbind(1)
        embeddings: Any = self.bert["embeddings"]
        encoder: Any = self.bert["encoder"]
        pooler: Any = self.bert["pooler"]
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        summed = embeddings["word_embeddings"](tokens) + embeddings["position_embeddings"](positions)
        x = embeddings["LayerNorm"](summed + embeddings["token_type_embeddings"](segments))
        x = functional.dropout(x, self.dropout, self.training)
        visible = (tokens != PAD)[:, None, None, :]
        for layer in encoder["layer"]:
            x = layer(x, visible)
        pooled = functional.dropout(torch.tanh(pooler["dense"](x[:, 0])), self.dropout, self.training)
        return self.classifier(pooled)  # type: ignore[no-any-return]


def read_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the encoder's weights from a published file; the classifier and what belongs to pretraining are left out.

    Args:
        path: .safetensors, names with or without "bert." before them, norms as weight and bias or gamma and beta.
        model: whose weights are wanted.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    try:
        raw = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no .safetensors file: {error}") from error
    found: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        full = name if name.startswith(("bert.", "cls.", "classifier.")) else f"bert.{name}"
        found[full.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = tensor
    wanted = {name: p.shape for name, p in model.state_dict().items() if not name.startswith("classifier.")}
    for name, shape in wanted.items():
        if name not in found or found[name].shape != shape:
            have = tuple(found[name].shape) if name in found else "nothing"
            raise ValueError(f"{path} should hold {name} of shape {tuple(shape)}, it has {have}")
    return {name: found[name] for name in wanted}


def find_tokenizer(config: BertConfig, data: str | Path | None) -> WordTokenizer:
    """Return the pieces of a vocab.txt of the right length in the data's folder or beside the weights, else hashes.

    Raises:
        FileNotFoundError: weights are wanted, and there is no vocabulary: hashes mean nothing to them.
    """
    folders = [Path(data)] if data is not None and Path(data).is_dir() else []
    if config.pretrained or os.environ.get(DATA_DIR_VARIABLE):
        folders.append(data_dir("the pretrained BERT") / MODEL_FOLDER)
    for folder in folders:
        path = folder / "vocab.txt"
        if path.is_file() and len(path.read_text(encoding="utf-8").splitlines()) == config.vocab_size:
            return read_vocabulary(path)
    if config.pretrained:
        wanted = f"a vocab.txt of {config.vocab_size} word pieces"
        raise FileNotFoundError(f"{wanted} is not in {DATA_DIR_VARIABLE}/{MODEL_FOLDER}; put bert-base-uncased there")
    return HashedWords(config.vocab_size)


class BertTask(ReadsLabelled):
    """A `Task`: sentence classification; the batch is (inputs (B, 2, T), labels (B,)).

    Args:
        settings: preset is one of `PRESETS`; data as in `load_sentences`.
    """

    name = "bert"
    deterministic = False

    def __init__(self, settings: TaskSettings) -> None:
        """Load and encode the examples."""
        reject_settings(self.name, settings, "data_bytes", "gradient_checkpointing", "ternary")
        self.preset = settings.preset or DEFAULT_PRESET
        if self.preset not in PRESETS:
            raise unknown_name(f"preset of task {self.name!r}", self.preset, PRESETS)
        self.config = PRESETS[self.preset]
        self.settings = settings
        self.dtype = torch_dtype(settings.dtype)
        self.batch_size = settings.batch_size or self.config.batch_size
        self.context = settings.context or self.config.context
        if not 4 <= self.context <= self.config.num_positions:
            raise ValueError(f"context must be in [4, {self.config.num_positions}] for preset {self.preset!r}")
        self.defaults = TaskDefaults(
            lr=self.config.lr,
            lr_grid=self.config.lr_grid,
            weight_decay=0.01,
            steps=600,
            warmup_steps=60,
            schedule="linear",
            grad_clip=1.0,
            predictor="hold",
        )
        tokenizer = find_tokenizer(self.config, settings.data)
        sentences = load_sentences(settings.data)
        self.labels = sentences.labels
        self.source = {**sentences.source, "tokens": tokenizer.name}
        have = f"{self.source['name']} has {len(sentences.train)} training examples"
        self.steps_per_epoch = batches_per_epoch(len(sentences.train), self.batch_size, have)
        classes = {label: index for index, label in enumerate(self.labels)}
        device = settings.device
        self._train, self._valid = (
            (
                encode_examples(part, tokenizer, self.context).to(device),
                torch.tensor([classes[label] for _, _, label in part], device=device),
            )
            for part in (sentences.train, sentences.valid)
        )
        self._weights = self._read_weights() if self.config.pretrained else {}

    def _read_weights(self) -> dict[str, Tensor]:
        path = data_dir("the pretrained BERT") / MODEL_FOLDER / "model.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{DATA_DIR_VARIABLE}/{MODEL_FOLDER}/model.safetensors is not there; put it there")
        with torch.device("meta"):
            return read_weights(path, self._new_model())

    def _new_model(self) -> nn.Module:
        return Bert(self.config, len(self.labels))

    def _started_model(self) -> nn.Module:
        model = self._new_model()
        model.load_state_dict(self._weights, strict=False)  # all but the classifier; `read_weights` saw to it
        return model

    def build_model(self, seed: int) -> nn.Module:
        """Return a new `Bert`; where it is pretrained, the seed decides the classifier only."""
        return seeded_model(self._started_model, seed, self.settings, self.dtype)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches of one permutation per epoch; batch k depends on (seed, k) only.

        The examples left over at the end of an epoch wait for another one, so that all batches have one size.
        """
        inputs, labels = self._train
        step = start
        while True:
            epoch, within = divmod(step, self.steps_per_epoch)
            order = sent(torch.from_numpy(counter_rng(seed, epoch).permutation(len(inputs))), inputs.device)
            for first in range(within * self.batch_size, self.steps_per_epoch * self.batch_size, self.batch_size):
                chosen = order[first : first + self.batch_size]
                yield self._read(inputs[chosen]), labels[chosen]
                step += 1

    def _read(self, stored: Tensor) -> Tensor:
        """Return tokens and segments (B, 2, T) as indices."""
        return stored.long()

    def describe(self) -> dict[str, Any]:
        """Return preset, start, sizes, data provenance and precision."""
        return {
            "task": self.name,
            "preset": self.preset,
            "data": self.source,
            "pretrained": self.config.pretrained,
            "num_parameters": count_parameters(self._new_model),
            "num_layers": self.config.num_layers,
            "width": self.config.width,
            "context": self.context,
            "batch_size": self.batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "encoded_sha256": hashlib.sha256(self._train[0].cpu().numpy().tobytes()).hexdigest()[:16],
            "dtype": str(self.dtype).removeprefix("torch."),
            "autocast_bf16": self.settings.autocast_bf16,
        }
