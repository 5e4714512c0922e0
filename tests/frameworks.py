"""Tiny models and data for the frameworks, and what to do where one is not installed."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import config
from hybrid_predict_trainer import HybridTrainerConfig

LENGTH, VOCABULARY = 12, 24

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.setdefault(name, "1")


def framework(name: str, *, in_ci: bool = True) -> Any:
    """A framework, or a skip; where the development extra has it and this is CI, its absence is a failure."""
    if in_ci and os.environ.get("CI"):
        return importlib.import_module(name)
    return pytest.importorskip(name)


def willing(**changes: Any) -> HybridTrainerConfig:
    """Short phases, always willing to try, everything that moves weights switched on."""
    return config(**{"max_lr_multiplier": 100.0, "min_group_factor": 0.5, "clock": "cost", **changes})


def sequences(count: int, seed: int = 1) -> Tensor:
    """Arithmetic sequences modulo the vocabulary, shape (count, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, 8, (count, 1), generator=generator)
    stride = torch.randint(1, 4, (count, 1), generator=generator)
    return (first + stride * torch.arange(LENGTH)) % VOCABULARY


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of a language model's data set; with ``ragged`` some labels are left out."""

    def __init__(self, count: int = 400, *, ragged: bool = False) -> None:
        self.rows = sequences(count)
        self.labels = self.rows.clone()
        if ragged:
            for i in range(count):
                self.labels[i, LENGTH - i % 7 :] = -100

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.labels[i]}


def gpt2(dropout: float = 0.0, seed: int = 0) -> Any:
    """A GPT-2 of some 5,000 weights."""
    transformers = framework("transformers")
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, resid_pdrop=dropout,
            embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
