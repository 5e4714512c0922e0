"""A loop with ``accelerate`` and gradient accumulation: one import and one line.

``python examples/accelerate_loop.py`` needs no network.  Install with
``pip install 'hybrid-predict-trainer[transformers]'``.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from hybrid_predict_trainer import HybridTrainerConfig, with_values
from hybrid_predict_trainer.adapters.accelerate import ride_along

STEPS, ACCUMULATE = 200, 2
SETTINGS = with_values(HybridTrainerConfig(), {"training.warmup_steps": 20, "predictor.window": 5})


class Regressor(nn.Module):
    """Returns its loss, as the model libraries' models do."""

    def __init__(self) -> None:
        """A small network."""
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """Output and mean squared error; x has shape (B, 8), y (B, 1)."""
        output = self.net(x)
        return {"loss": nn.functional.mse_loss(output, y), "output": output}


def train(*, ride: bool) -> float:
    """Train; returns the loss over all data."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    x = torch.randn(16 * ACCUMULATE * STEPS, 8)
    y = torch.sin(x.sum(1, keepdim=True)) + 0.1 * torch.randn(len(x), 1)
    rows = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    model = Regressor()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / STEPS))
    loader = torch.utils.data.DataLoader(rows, batch_size=16)  # type: ignore[arg-type]
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    engine = ride_along(accelerator, model, optimizer, scheduler, SETTINGS, total_steps=STEPS) if ride else None
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if engine is not None and engine.finished:
            break
    if engine is not None:
        engine.detach()
        print(engine.report_text())
    with torch.no_grad():
        return float(model(x=x, y=y)["loss"])


if __name__ == "__main__":
    plain, ours = train(ride=False), train(ride=True)
    print(f"loss after {STEPS} steps' cost: {plain:.4f} plainly, {ours:.4f} with the engine")
