"""Lightning's ``Trainer`` with one import and one callback.

``python examples/lightning_trainer.py`` needs no network.  Install with
``pip install 'hybrid-predict-trainer[lightning]'``.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import nn

from hybrid_predict_trainer import HybridTrainerConfig, with_values
from hybrid_predict_trainer.adapters.lightning import HybridCallback

STEPS = 200
SETTINGS = with_values(HybridTrainerConfig(), {"training.warmup_steps": 20, "predictor.window": 5})


class Regression(lightning.LightningModule):
    """A small network with automatic optimization."""

    def __init__(self) -> None:
        """Draw its weights."""
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Mean squared error."""
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, linear to zero, one step of the schedule per step of the optimizer."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(*callbacks: HybridCallback) -> float:
    """Train; returns the loss over all data."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16 * 2 * STEPS, 8, generator=generator)
    y = torch.sin(x.sum(1, keepdim=True)) + 0.1 * torch.randn(len(x), 1, generator=generator)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    module = Regression()
    lightning.Trainer(
        max_steps=STEPS, accumulate_grad_batches=2, gradient_clip_val=1.0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    ).fit(module, loader)  # fmt: skip
    with torch.no_grad():
        return float(nn.functional.mse_loss(module.net(x), y))


if __name__ == "__main__":
    plain, ours = train(), train(HybridCallback(SETTINGS))
    print(f"loss after {STEPS} steps' cost: {plain:.4f} plainly, {ours:.4f} with the callback")
