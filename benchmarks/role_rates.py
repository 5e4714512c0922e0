"""Step sizes per role as groups of a plain loop and in the trainer: text, arithmetic sequences, and images by a ViT.

``python benchmarks/role_rates.py --task tied --steps 150 --lr 3e-3`` prints held-out losses (LOG.md).  Needs
transformers for the sequences and the ViT, and CIFAR-10 in ``HPT_DATA_DIR`` for the latter; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from group_warmup import VOCABULARY, sequences
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, Recipe, with_values
from hybrid_predict_trainer.move.prior import PRIOR
from hybrid_predict_trainer.tasks import TaskSettings, build_optimizer, build_scheduler, make_task, with_steps

PLAIN_ARMS = {"plain": {}, "head": {"head": PRIOR["head"]}, "prior": PRIOR}
TRAINER_ARMS = {
    "defaults": {},
    "no-recipe": {"training.recipe": "off"},
    "recipe": {"training.recipe": "prior"},
    "recipe-no-warmup": {"training.recipe": "prior", "training.min_group_factor": 1.0},
}


class Classifier(nn.Module):
    """A small ViT (2 blocks of width 64, patches of 8 x 8) that returns logits (B, 10) for images (B, 3, 32, 32)."""

    def __init__(self) -> None:
        """Draw all weights."""
        super().__init__()
        config = ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                           image_size=32, patch_size=8, num_labels=10)  # fmt: skip
        self.vit = ViTForImageClassification(config).train()

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.vit(pixel_values=images).logits


class Run:
    """One problem: model, batches, loss, rates and held-out loss."""

    def __init__(self, task: str, steps: int, lr: float, seed: int) -> None:
        """Build it."""
        self.steps, self.lr, self.clip = steps, lr, 0.0
        ways = {"text": self._text, "text-tied": self._text, "vit": self._images}
        ways.get(task, self._sequences)(task, seed)

    def _text(self, task: str, seed: int) -> None:
        made = make_task("gpt", TaskSettings(preset="0.3M"))
        recipe = with_steps(replace(made.defaults, lr=self.lr), self.steps)
        torch.manual_seed(seed)
        self.model = made.build_model(seed)
        if task == "text-tied":
            self.model.lm_head.weight = self.model.embed_tokens.weight
        self.make: Callable[[Any], Any] = lambda model: build_optimizer(model, recipe)
        self.schedule: Callable[[Any], Any] = lambda o: build_scheduler(
            o, recipe.schedule, self.steps, recipe.warmup_steps, recipe.decay_frac
        )
        self.batches = list(islice(iter(made.batches(seed)), self.steps))
        self.loss_fn, self.clip = made.loss_fn, recipe.grad_clip
        self.held_out = lambda: made.evaluate(self.model)

    def _sequences(self, task: str, seed: int) -> None:
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=24, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
                            eos_token_id=0, tie_word_embeddings=task == "tied")  # fmt: skip
        self.model = GPT2LMHeadModel(config).train()
        data, generator = sequences(20_000, 1 + seed), torch.Generator().manual_seed(seed)
        rows = [data[torch.randint(len(data), (16,), generator=generator)] for _ in range(self.steps)]
        self.batches = [{"input_ids": each, "labels": each} for each in rows]
        self.make = lambda model: torch.optim.AdamW(model.parameters(), lr=self.lr)
        self.schedule = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: max(0.0, 1 - t / self.steps))
        self.loss_fn = lambda model, batch: model(**batch).loss
        held_out = sequences(256, 99)

        @torch.no_grad()
        def loss() -> float:
            self.model.eval()
            return float(self.model(input_ids=held_out, labels=held_out).loss)

        self.held_out = loss

    def _images(self, task: str, seed: int) -> None:
        made = make_task("cifar", TaskSettings(batch_size=64))
        torch.manual_seed(seed)
        self.model = Classifier()
        self.make = lambda model: torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.05)
        self.schedule = lambda o: torch.optim.lr_scheduler.LambdaLR(
            o, lambda t: min((t + 1) / 30, 1.0, (self.steps - t) / self.steps)
        )
        self.batches = list(islice(iter(made.batches(seed)), self.steps))
        self.loss_fn, self.clip = made.loss_fn, 1.0
        self.held_out = lambda: made.evaluate(self.model)

    def plain(self, rates: dict[str, float]) -> float:
        """The plain loop with groups of a recipe."""
        first = self.make(self.model).param_groups[0]
        groups = Recipe(rates).param_groups(self.model, self.lr, weight_decay=first["weight_decay"])
        optimizer = torch.optim.AdamW(groups, betas=first["betas"], eps=first["eps"])
        schedule = self.schedule(optimizer)
        for batch in self.batches:
            optimizer.zero_grad()
            self.loss_fn(self.model, batch).backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            optimizer.step()
            schedule.step()
        return self.held_out()

    def hybrid(self, settings: dict[str, Any]) -> float:
        """The trainer."""
        optimizer = self.make(self.model)
        config = with_values(HybridTrainerConfig(), {"training.gradient_clip_norm": self.clip, **settings})
        trainer = HybridTrainer(
            self.model, optimizer, config, loss_fn=self.loss_fn, lr_scheduler=self.schedule(optimizer)
        )
        trainer.fit(iter(self.batches), total_steps=self.steps)
        return self.held_out()


def main() -> None:
    """Print a line per seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=("text", "text-tied", "tied", "untied", "vit"), default="tied")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--arms", default="plain,head,prior", help=f"of {', '.join((*PLAIN_ARMS, *TRAINER_ARMS))}")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a plain run of transformers says more than the table
    for seed in (int(s) for s in args.seeds.split(",")):
        found = []
        for arm in (name.strip() for name in args.arms.split(",")):
            run = Run(args.task, args.steps, args.lr, seed)
            loss = run.plain(PLAIN_ARMS[arm]) if arm in PLAIN_ARMS else run.hybrid(TRAINER_ARMS[arm])
            found.append(f"{arm} {loss:.4f}")
        print(f"{args.task}, {args.steps} steps, rate {args.lr:g}, seed {seed}: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
