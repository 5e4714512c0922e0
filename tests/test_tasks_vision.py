"""The networks of the image tasks: sizes as published, parts as PyTorch's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hybrid_predict_trainer.tasks import TaskSettings, build_optimizer
from hybrid_predict_trainer.tasks.base import count_parameters
from hybrid_predict_trainer.tasks.images.networks import Mlp, ResidualBlock, ResNet
from hybrid_predict_trainer.tasks.images.task import RECIPES, ImageTask


@pytest.mark.parametrize(
    ("task", "preset", "shape", "expected"),
    [
        ("cifar", "resnet18", (3, 32, 10), 11_173_962),  # as in every repository of CIFAR-10 baselines
        ("cifar", "resnet18-small", (3, 32, 10), 701_466),
        ("digits-mlp", "2x128", (1, 8, 10), 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
    ],
)
def test_sizes(task: str, preset: str, shape: tuple[int, int, int], expected: int) -> None:
    assert count_parameters(lambda: RECIPES[task].presets[preset](*shape)) == expected


def test_resnet18_keeps_resolution_until_the_second_stage() -> None:
    with torch.device("meta"):
        model = ResNet(3, (64, 128, 256, 512), 2, 10)
        shapes = [model.stem(torch.empty(2, 3, 32, 32)).shape[1:]]
        x = torch.empty(2, 64, 32, 32)
        for block in model.blocks:
            x = block(x)
            shapes.append(x.shape[1:])
    assert [tuple(shape) for shape in shapes] == [
        (64, 32, 32), (64, 32, 32), (64, 32, 32), (128, 16, 16), (128, 16, 16),
        (256, 8, 8), (256, 8, 8), (512, 4, 4), (512, 4, 4),
    ]  # fmt: skip
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 18 + 3, "and three shortcuts"


def test_a_block_adds_to_what_came_in() -> None:
    block = ResidualBlock(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), x.relu())
    wider = ResidualBlock(4, 8, 2).eval()
    nn.init.zeros_(wider.conv2.weight)
    expected = nn.functional.conv2d(x[:, :, ::2, ::2], wider.shortcut[0].weight) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(wider(x), expected.relu(), rtol=1e-4, atol=1e-5)


def test_mlp_is_linear_layers_and_relu() -> None:
    model = Mlp(4, (3,), 2)
    x = torch.randn(5, 1, 2, 2)
    hidden = (x.flatten(1) @ model.layers[0].weight.T + model.layers[0].bias).clamp_min(0)
    torch.testing.assert_close(model(x), hidden @ model.head.weight.T + model.head.bias)


def test_resnet_learns_with_its_own_recipe(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) // 7 % 2
    x = (rng.integers(128, size=(60, 8, 8, 3)) + 100 * y[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    task = ImageTask("cifar", TaskSettings(data=tmp_path / "a.npz", batch_size=10, preset="resnet18-small"))
    assert (task.defaults.optimizer, task.defaults.lr) == ("sgd", 0.1)
    assert ImageTask("cifar", TaskSettings(data=tmp_path / "a.npz", batch_size=10)).defaults.lr != 0.1
    model = task.build_model(0)
    optimizer = build_optimizer(model, replace(task.defaults, lr=0.02))
    losses = []
    for _, batch in zip(range(12), task.batches(0), strict=False):
        optimizer.zero_grad()
        loss = task.loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_digits_for_two_networks_are_the_same_images() -> None:
    pytest.importorskip("sklearn")
    cnn, mlp = (ImageTask(name, TaskSettings(batch_size=64)) for name in ("digits", "digits-mlp"))
    assert cnn.describe()["data"] == mlp.describe()["data"]
    assert cnn.steps_per_epoch == mlp.steps_per_epoch == 23
    (images, labels), (shifted, same_labels) = next(cnn.batches(0)), next(mlp.batches(0))
    assert torch.equal(labels, same_labels)
    assert images.shape == shifted.shape


def test_digits_are_shifted_for_the_mlp_and_never_mirrored() -> None:
    """Every image the MLP sees is one of the nine shifts of that image by a pixel, edges mirrored."""
    pytest.importorskip("sklearn")
    cnn, mlp = (ImageTask(name, TaskSettings(batch_size=64)) for name in ("digits", "digits-mlp"))
    (images, _), (shifted, _) = next(cnn.batches(0)), next(mlp.batches(0))
    wide = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    size = images.shape[-1]
    shifts = [wide[..., i : i + size, j : j + size] for i in range(3) for j in range(3)]
    found = [any(torch.equal(shifted[n], candidate[n]) for candidate in shifts) for n in range(len(images))]
    assert all(found)
    assert not torch.equal(images, shifted)


def test_digits_have_no_other_presets() -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="unknown preset of task 'digits-mlp' 'groupnorm'"):
        ImageTask("digits-mlp", TaskSettings(preset="groupnorm"))
