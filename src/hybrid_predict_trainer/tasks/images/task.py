"""Image classification over many epochs: networks of `networks` on little data.

Shapes: N images, B batch, S height and width (images are square), C channels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base import (
    Batch,
    TaskDefaults,
    TaskSettings,
    count_parameters,
    counter_rng,
    reject_settings,
    seeded_model,
    sent,
    torch_dtype,
    unknown_name,
)
from ..labelled import ReadsLabelled, batches_per_epoch
from .data import ImageSet, crop_and_flip, load_digits, load_images
from .networks import ConvNet, Mlp, ResNet

# (C, S, classes) -> a new network.
Build = Callable[[int, int, int], nn.Module]


@dataclass(frozen=True, kw_only=True)
class ImageRecipe:
    """What tells one image task from another.

    Attributes:
        load: `settings.data` -> images; called once.
        presets: networks by name, the default first.
        batch_size: default.
        pad: random crops shift by at most this many pixels; 0 for neither crops nor flips.
        flips: whether crops come with flips.
        defaults: how it is trained.
        preset_defaults: how a preset is trained that needs something else.
    """

    load: Callable[[str | Path | None], ImageSet]
    presets: Mapping[str, Build]
    batch_size: int
    pad: int
    defaults: TaskDefaults
    flips: bool = True
    preset_defaults: Mapping[str, TaskDefaults] = field(default_factory=dict)


def conv_nets(*stages: tuple[int, ...]) -> dict[str, Build]:
    """Return a `ConvNet` of these stages with each norm."""

    def build(norm: str, channels: int, size: int, classes: int) -> nn.Module:
        del size
        return ConvNet(channels, stages, norm, classes)

    return {norm: functools.partial(build, norm) for norm in ("groupnorm", "batchnorm")}


# Rates as in the paper (0.1 with batches of 128), decayed linearly instead of in steps.
RESNET_DEFAULTS = TaskDefaults(
    optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, steps=780, warmup_steps=39,
    lr_grid=(1e-2, 3e-2, 1e-1, 3e-1), predictor="hold",
)  # fmt: skip

RECIPES: dict[str, ImageRecipe] = {
    "digits": ImageRecipe(
        load=load_digits,
        presets=conv_nets((16, 16), (32, 32)),
        batch_size=64,
        pad=0,
        defaults=TaskDefaults(
            optimizer="adamw",
            lr=3e-3,
            weight_decay=1e-2,
            steps=690,  # 30 epochs
            lr_grid=(1e-3, 3e-3, 1e-2, 3e-2),
            predictor="hold",
        ),
    ),
    "digits-mlp": ImageRecipe(
        load=load_digits,
        presets={"2x128": lambda channels, size, classes: Mlp(channels * size * size, (128, 128), classes)},
        batch_size=64,
        pad=1,  # without shifts it has learnt the images by heart after six epochs, and longer runs end no lower
        flips=False,
        defaults=TaskDefaults(
            optimizer="adamw",
            lr=2e-2,
            weight_decay=1e-2,
            steps=690,  # 30 epochs
            lr_grid=(5e-3, 1e-2, 2e-2, 4e-2),
            predictor="hold",
        ),
    ),
    "cifar": ImageRecipe(
        load=load_images,
        presets={
            **conv_nets((32, 32), (64, 64), (128, 128)),
            "narrow": conv_nets((16, 16), (32, 32), (64, 64))["groupnorm"],  # a quarter of the cost
            "resnet18": lambda channels, size, classes: ResNet(channels, (64, 128, 256, 512), 2, classes),
            "resnet18-small": lambda channels, size, classes: ResNet(channels, (16, 32, 64, 128), 2, classes),
        },
        batch_size=128,
        pad=4,
        defaults=TaskDefaults(
            optimizer="sgd",
            lr=2e-2,
            momentum=0.9,
            weight_decay=5e-4,
            steps=780,  # 10 epochs of 10,000 images
            lr_grid=(1e-2, 2e-2, 5e-2, 1e-1),
            predictor="hold",
        ),
        preset_defaults={"resnet18": RESNET_DEFAULTS, "resnet18-small": RESNET_DEFAULTS},
    ),
}


class ImageTask(ReadsLabelled):
    """A `Task`: classification over epochs; the batch is (images (B, C, S, S), labels (B,)).

    Args:
        name: one of `RECIPES`.
        settings: preset is one of the recipe's.
    """

    deterministic = False

    def __init__(self, name: str, settings: TaskSettings) -> None:
        """Load the images and check that a batch fits into them."""
        reject_settings(name, settings, "data_bytes", "context", "gradient_checkpointing")
        self.recipe = RECIPES[name]
        self.preset = settings.preset or next(iter(self.recipe.presets))
        if self.preset not in self.recipe.presets:
            raise unknown_name(f"preset of task {name!r}", self.preset, self.recipe.presets)
        self.name = name
        self.settings = settings
        self.defaults = self.recipe.preset_defaults.get(self.preset, self.recipe.defaults)
        self.batch_size = settings.batch_size or self.recipe.batch_size
        self.dtype = torch_dtype(settings.dtype)
        images = self.recipe.load(settings.data)
        have = f"{images.source} has {len(images.train_x)} training images"
        self.steps_per_epoch = batches_per_epoch(len(images.train_x), self.batch_size, have)
        self.source = images.source
        self._fingerprint = hashlib.sha256(images.train_x.numpy().tobytes()).hexdigest()[:16]
        self.num_classes = int(images.train_y.max()) + 1
        # Statistics per channel over the training images only.
        pixels = images.train_x.flatten(0, 2).double() / 255
        self._mean, self._std = (self._place(s) for s in (pixels.mean(0), pixels.std(0).clamp_min(1e-3)))
        device = settings.device
        self._train = (images.train_x.to(device), images.train_y.to(device))
        self._valid = (images.valid_x.to(device), images.valid_y.to(device))

    def _place(self, values: Tensor) -> Tensor:
        return values.to(device=self.settings.device, dtype=self.dtype)

    def _new_model(self) -> nn.Module:
        _, size, _, channels = self._train[0].shape
        return self.recipe.presets[self.preset](channels, size, self.num_classes)

    def _read(self, stored: Tensor) -> Tensor:
        """Return images (B, S, S, C) in bytes normalised, (B, C, S, S)."""
        return ((self._place(stored) / 255 - self._mean) / self._std).permute(0, 3, 1, 2).contiguous()

    def build_model(self, seed: int) -> nn.Module:
        """Return a new network of the preset's shape."""
        return seeded_model(self._new_model, seed, self.settings, self.dtype)

    def batches(self, seed: int, start: int = 0) -> Iterator[Batch]:
        """Yield batches of one permutation per epoch, augmented; batch k depends on (seed, k) only.

        The images left over at the end of an epoch wait for another one, so that all batches have one size.
        """
        x, y = self._train
        step = start
        epoch = order = None
        while True:
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                # The 0 and 1 keep the streams of orders and of augmentations apart.
                order = sent(torch.from_numpy(counter_rng(seed, 0, epoch).permutation(len(x))), x.device)
            assert order is not None
            first = step % self.steps_per_epoch * self.batch_size
            chosen = order[first : first + self.batch_size]
            images = x[chosen]
            if self.recipe.pad:
                images = crop_and_flip(images, self.recipe.pad, counter_rng(seed, 1, step), flips=self.recipe.flips)
            yield self._read(images), y[chosen]
            step += 1

    def describe(self) -> dict[str, Any]:
        """Return variant, sizes, data provenance and precision."""
        return {
            "task": self.name,
            "preset": self.preset,
            "data": {"name": self.source, "sha256": self._fingerprint},
            "num_parameters": count_parameters(self._new_model),
            "num_train_images": len(self._train[0]),
            "num_valid_images": len(self._valid[0]),
            "batch_size": self.batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "pad": self.recipe.pad,
            "flips": bool(self.recipe.pad) and self.recipe.flips,
            "dtype": str(self.dtype).removeprefix("torch."),
            "autocast_bf16": self.settings.autocast_bf16,
        }
