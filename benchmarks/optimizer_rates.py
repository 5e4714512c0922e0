"""What the learning-rate multiplier does beside other optimizers: small images, batches of 32, cosine, by optimizer.

``python benchmarks/optimizer_rates.py --optimizers adopt,tiger --seeds 3 [--factor 0.333] [--steps 1500]``

Every optimizer at a rate that its users would begin with, times the factor; held-out loss of ours (defaults) over that
of the bare loop, and the multiplier at the end.  Needs ``pytorch_optimizer``.
"""

from __future__ import annotations

import argparse
import warnings
from itertools import islice
from typing import Any

import pytorch_optimizer as others
import torch
from torch import Tensor, nn

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig
from hybrid_predict_trainer.experiments.harm import data

#: Class, rate and further options.
OPTIMIZERS: dict[str, tuple[Any, float, dict[str, Any]]] = {
    "adopt": (others.ADOPT, 1e-3, {}), "tiger": (others.Tiger, 3e-4, {}), "signsgd": (others.SignSGD, 3e-4, {}),
    "lion": (others.Lion, 2e-4, {}), "soap": (others.SOAP, 3e-3, {}), "prodigy": (others.Prodigy, 1.0, {}),
    "dadapt": (others.DAdaptAdam, 1.0, {}), "aggmo": (others.AggMo, 0.01, {}), "adam": (torch.optim.Adam, 1e-3, {}),
    "sgd-m": (torch.optim.SGD, 0.03, {"momentum": 0.9}), "adan": (others.Adan, 1e-3, {}),
    "adabelief": (others.AdaBelief, 1e-3, {}), "adamax": (torch.optim.Adamax, 2e-3, {}),
}  # fmt: skip

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def final(name: str, factor: float, steps: int, seed: int, *, ours: bool) -> tuple[float, float]:
    """Held-out loss at the end, and the multiplier."""
    kind, rate, options = OPTIMIZERS[name]
    torch.manual_seed(seed)
    side = data.GLYPH_SIDE**2
    model = nn.Sequential(nn.Linear(side, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = kind(list(model.parameters()), lr=rate * factor, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = data.fresh(data.draw_glyphs, 32, seed)
    torch.manual_seed(1000 + seed)
    scale = 1.0
    if ours:
        trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(), loss_fn, schedule)
        trainer.fit(batches, total_steps=steps)
        scale = float(trainer.statistics()["learned_scale"])
    else:
        for batch in islice(batches, steps):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return float(loss_fn(model, data.draw_glyphs(data.NUM_VALID, data.generator(2)))), scale


def main() -> None:
    """Print a line per optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factor", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=1500)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in asked.optimizers.split(","):
        for seed in range(asked.seeds):
            plain, _ = final(name, asked.factor, asked.steps, seed, ours=False)
            ours, scale = final(name, asked.factor, asked.steps, seed, ours=True)
            print(f"{name:10s} {seed}  plain {plain:.4f}  ratio {ours / plain:.3f}  multiplier {scale:.3g}", flush=True)


if __name__ == "__main__":
    main()
