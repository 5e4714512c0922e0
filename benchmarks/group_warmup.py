"""A small GPT-2 that learns arithmetic sequences: plainly, with the defaults, without group warm-up, without lookahead.

``python benchmarks/group_warmup.py --steps 600 --lr 3e-3 --seeds 0,1`` prints held-out losses.  It is the case in which
group warm-up is a loss (LOG.md).  Needs transformers; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, with_values

LENGTH, VOCABULARY, BATCH = 24, 64, 16
NO_WARMUP = {"training.min_group_factor": 1.0}
ARMS = {
    "plain": None,
    "defaults": {},
    "no group warm-up": NO_WARMUP,
    "no lookahead, too": NO_WARMUP | {"lookahead.extrapolation": 0.0, "lookahead.damping": 0.0},
}


def sequences(count: int, seed: int) -> Tensor:
    """(count, LENGTH) tokens; the next one follows from two."""
    generator = torch.Generator().manual_seed(seed)
    first, stride = (torch.randint(1, 12, (count, 1), generator=generator) for _ in range(2))
    return (first + stride * torch.arange(LENGTH)) % VOCABULARY


def train(steps: int, lr: float, seed: int, settings: dict[str, float] | None) -> float:
    """Held-out loss; None: the plain loop."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2,
                                       bos_token_id=0, eos_token_id=0)).train()  # fmt: skip
    data, generator = sequences(20_000, 1 + seed), torch.Generator().manual_seed(seed)
    rows = [data[torch.randint(len(data), (BATCH,), generator=generator)] for _ in range(steps)]
    batches = [{"input_ids": each, "labels": each} for each in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    if settings is None:
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
    else:
        config = with_values(HybridTrainerConfig(), settings)
        HybridTrainer(model, optimizer, config, lr_scheduler=schedule).fit(batches, total_steps=steps)
    model.eval()
    held_out = sequences(256, 99)
    with torch.no_grad():
        return float(model(input_ids=held_out, labels=held_out).loss)


def main() -> None:
    """Print a line per seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", default="0,1")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a plain run of transformers says more than the table
    for seed in (int(s) for s in args.seeds.split(",")):
        losses = ", ".join(f"{arm} {train(args.steps, args.lr, seed, s):.4f}" for arm, s in ARMS.items())
        print(f"{args.steps} steps, rate {args.lr:g}, seed {seed}: {losses}", flush=True)


if __name__ == "__main__":
    main()
