"""A training loop of one's own, and the engine that rides along: accumulation, clipping, a schedule.

``python examples/attach_loop.py`` trains the same network twice, plainly and with the engine, for the same number of
optimizer steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybrid_predict_trainer import Engine, HybridTrainerConfig, attach, with_values

STEPS, ACCUMULATE, CLIP = 200, 2, 1.0
SETTINGS = with_values(
    HybridTrainerConfig(), {"training.warmup_steps": 10, "training.clock": "claimed", "predictor.window": 5}
)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def train(*, ride: bool) -> tuple[float, Engine | None]:
    """Train; returns the loss over all data, and the engine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.linspace(-2, 2, 64)[:, None]
    y = torch.sin(3 * x)
    micro_batches = [(x[::2], y[::2]), (x[1::2], y[1::2])]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.02, 1 - step / STEPS))

    engine = attach(model, optimizer, SETTINGS, loss_fn=loss_fn, lr_scheduler=scheduler) if ride else None
    for _ in range(STEPS):
        optimizer.zero_grad()
        for batch in micro_batches:
            loss = loss_fn(model, batch)
            (loss / ACCUMULATE).backward()
            if engine is not None:
                engine.note(loss, batch)
        if engine is not None:
            engine.after_backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if engine is None:
            scheduler.step()
    if engine is not None:
        engine.detach()
    with torch.no_grad():
        return float(loss_fn(model, (x, y))), engine


if __name__ == "__main__":
    plain, _ = train(ride=False)
    ours, engine = train(ride=True)
    assert engine is not None
    print(f"loss after {STEPS} steps: {plain:.2e} plainly, {ours:.2e} with the engine")
    print("num_jumps_accepted:", engine.statistics()["num_jumps_accepted"])
