"""Networks that classify images.

Shapes: B images, C channels, S height and width, W width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class ConvNet(nn.Module):
    """3 x 3 convolutions, each with norm and ReLU; pooled by two between stages; mean over space; linear.

    Args:
        in_channels: of the images.
        stages: widths, one tuple per resolution.
        norm: "groupnorm" (groups of 8 channels) or "batchnorm".
        num_classes: of the output.
    """

    def __init__(self, in_channels: int, stages: Sequence[Sequence[int]], norm: str, num_classes: int) -> None:
        """Draw all weights."""
        super().__init__()
        layers: list[nn.Module] = []
        for index, stage in enumerate(stages):
            if index > 0:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                layers.append(nn.Conv2d(in_channels, width, 3, padding=1, bias=False))
                layers.append(nn.GroupNorm(width // 8, width) if norm == "groupnorm" else nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                in_channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) for images (B, C, S, S)."""
        return self.head(self.features(images).mean((2, 3)))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Linear layers with ReLU between them, on all pixels.

    Args:
        num_inputs: C S S.
        hidden: widths of the hidden layers.
        num_classes: of the output.
    """

    def __init__(self, num_inputs: int, hidden: Sequence[int], num_classes: int) -> None:
        """Draw all weights."""
        super().__init__()
        widths = (num_inputs, *hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) for images (B, C, S, S)."""
        x = images.flatten(1)
        for layer in self.layers:
            x = functional.relu(layer(x))
        return self.head(x)  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to what came in.

    Args:
        in_channels: of the input.
        width: of the output; where it or the stride changes the shape, a 1 x 1 convolution carries the input over.
        stride: of the first convolution.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        """Draw all weights."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width, S / stride, S / stride) for (B, C, S, S)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet of basic blocks for small images (He et al. 2015, arXiv 1512.03385): 3 x 3 stem, not pooled.

    Args:
        in_channels: of the images.
        widths: of the stages; each but the first halves the resolution.
        num_blocks: per stage.
        num_classes: of the output.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], num_blocks: int, num_classes: int) -> None:
        """Draw all weights, convolutions for ReLU units as in the paper's successor (arXiv 1502.01852)."""
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(num_blocks):
                blocks.append(ResidualBlock(before, width, stride=2 if stage > 0 and block == 0 else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes) for images (B, C, S, S)."""
        x = functional.relu(self.stem_norm(self.stem(images)))
        return self.head(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]
