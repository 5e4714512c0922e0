"""Loops of the shape that torchvision's and timm's training scripts have, with the engine of ``attach``.

Neither library is needed: what matters is who calls backward, clips, steps and moves the rates, and in which order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cases import assert_same
from frameworks import weights_of, willing
from hybrid_predict_trainer import Engine, HybridTrainerConfig, attach

EPOCHS, BATCHES, CLASSES = 4, 12, 5
Batch = tuple[Tensor, Tensor]


def images() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * 16, 3, 8, 8, generator=generator)
    return list(zip(x.split(16), x.mean(dim=(2, 3)).sum(1).mul(20).long().remainder(CLASSES).split(16), strict=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)
    )


criterion = nn.CrossEntropyLoss(label_smoothing=0.1)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return criterion(model(batch[0]), batch[1])


def torchvision_like(settings: HybridTrainerConfig | None, *, scaled: bool) -> dict[str, Any]:
    """One pass per epoch, the scaler's order where there is one, clipping, an average of weights, a step per epoch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    engine: Engine | None = None
    if settings is not None:
        engine = attach(
            model, optimizer, settings, loss_fn=loss_of, lr_scheduler=lr_scheduler, lr_interval="epoch",
            schedule="external", grad_scaler=scaler, total_steps=EPOCHS * BATCHES,
        )  # fmt: skip
    for _ in range(EPOCHS):
        for image, target in images():
            if engine is not None and engine.finished:
                break
            loss = criterion(model(image), target)
            optimizer.zero_grad()
            if engine is not None:
                engine.note(loss, (image, target))
            if scaler is not None:
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
            else:
                loss.backward()
            if engine is not None:
                engine.after_backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            ema.update_parameters(model)
        lr_scheduler.step()
    return {
        "engine": engine, "rate": optimizer.param_groups[0]["lr"], "epochs": lr_scheduler.last_epoch,
        "trained": {"weights": weights_of(model), "average": weights_of(ema), "buffers": dict(model.named_buffers())},
    }  # fmt: skip


def timm_like(settings: HybridTrainerConfig | None, *, accumulate: int) -> dict[str, Any]:
    """An object that goes backward, clips and steps; rates are written into the groups; gradients are accumulated."""

    class Steps:
        def __call__(self, loss: Tensor, optimizer: Any, *, parameters: Any, need_update: bool) -> None:
            loss.backward()
            if need_update:
                if engine is not None:
                    engine.after_backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = None if settings is None else attach(model, optimizer, settings, loss_fn=loss_of)
    loss_scaler, updates, total = Steps(), 0, EPOCHS * BATCHES // accumulate
    for _ in range(EPOCHS):
        for i, batch in enumerate(images()):
            need_update = (i + 1) % accumulate == 0
            loss = loss_of(model, batch)
            if engine is not None:
                engine.note(loss, batch)
            loss_scaler(loss / accumulate, optimizer, parameters=model.parameters(), need_update=need_update)
            if need_update:
                optimizer.zero_grad()
                updates += 1
                for group in optimizer.param_groups:  # what a schedule that is no LRScheduler does
                    group["lr"] = 0.01 * (1 - updates / total)
    return {
        "engine": engine, "rate": optimizer.param_groups[0]["lr"], "updates": updates,
        "trained": {"weights": weights_of(model), "buffers": dict(model.named_buffers())},
    }  # fmt: skip


QUIET = {"max_predict_steps": 0, "max_lr_multiplier": 1.0, "min_group_factor": 1.0}


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "scaler"])
def test_torchvisions_loop(scaled: bool) -> None:
    plain = torchvision_like(None, scaled=scaled)
    for settings in (HybridTrainerConfig(enabled=False), willing(**QUIET)):
        quiet = torchvision_like(settings, scaled=scaled)
        assert_same(quiet["trained"], plain["trained"])
        assert quiet["rate"] == plain["rate"]
    ours = torchvision_like(willing(), scaled=scaled)
    assert ours["engine"].report()["num_jumps_proposed"] > 0
    assert ours["engine"].why_not == ""
    assert (ours["epochs"], ours["rate"]) == (EPOCHS, plain["rate"])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_timms_loop(accumulate: int) -> None:
    plain = timm_like(None, accumulate=accumulate)
    for settings in (HybridTrainerConfig(enabled=False), willing(**QUIET)):
        assert_same(timm_like(settings, accumulate=accumulate)["trained"], plain["trained"])
    ours = timm_like(willing(), accumulate=accumulate)
    assert ours["engine"].report()["num_jumps_proposed"] > 0
    assert ours["engine"].statistics()["num_real_steps"] == ours["updates"] == EPOCHS * BATCHES // accumulate
    assert (ours["engine"].why_not, ours["rate"]) == ("", plain["rate"])
