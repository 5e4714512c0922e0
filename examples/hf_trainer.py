"""``transformers.Trainer`` with one import and one callback: a tiny GPT-2, plainly and with the callback.

``python examples/hf_trainer.py`` needs no network.  Install with
``pip install 'hybrid-predict-trainer[transformers]'``.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hybrid_predict_trainer import HybridTrainerConfig, with_values
from hybrid_predict_trainer.adapters.hf import HybridCallback

LENGTH, VOCABULARY, STEPS = 24, 64, 150
#: A run of 150 steps is short, the defaults are for longer ones.  Shorter first steps of the blocks gain on text
#: and are a loss on these sequences (LOG.md), so group warm-up is left out.
SETTINGS = with_values(
    HybridTrainerConfig(), {"training.warmup_steps": 20, "predictor.window": 5, "training.min_group_factor": 1.0}
)


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Arithmetic sequences: the next token follows from two."""

    def __init__(self, count: int, seed: int) -> None:
        """Draw ``count`` of them."""
        generator = torch.Generator().manual_seed(seed)
        first, stride = (torch.randint(1, 12, (count, 1), generator=generator) for _ in range(2))
        self.rows = (first + stride * torch.arange(LENGTH)) % VOCABULARY

    def __len__(self) -> int:
        """Rows."""
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """As a causal language model takes it."""
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def train(*callbacks: HybridCallback) -> float:
    """Train; returns the loss on held-out sequences."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2,
                                       bos_token_id=0, eos_token_id=0))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=8, gradient_accumulation_steps=2, learning_rate=1e-3,
            report_to=[], save_strategy="no", logging_steps=50, use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=Sequences(4000, 1), callbacks=list(callbacks),
                          eval_dataset=Sequences(64, 2))  # fmt: skip
        trainer.train()
        return float(trainer.evaluate()["eval_loss"])


if __name__ == "__main__":
    plain, ours = train(), train(HybridCallback(SETTINGS))
    print(f"held-out loss after {STEPS} steps' cost: {plain:.4f} plainly, {ours:.4f} with the callback")
