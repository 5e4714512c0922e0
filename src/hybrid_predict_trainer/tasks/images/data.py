"""Images in memory: where they come from and how they are augmented.

Shapes: N images, B batch, S height and width (images are square), C channels.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..base import DATA_DIR_VARIABLE, data_dir, missing_extra, sent

VALID_EVERY = 6  # images of a single file: the share CIFAR-10 itself holds out


@dataclass(frozen=True)
class ImageSet:
    """Images for training and validation.

    Attributes:
        train_x, valid_x: (N, S, S, C) uint8.
        train_y, valid_y: (N,) int64.
        source: provenance.
    """

    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor
    source: str


def load_digits(data: str | Path | None) -> ImageSet:
    """Return scikit-learn's 1797 handwritten digits (8 x 8, values 0 to 16), every sixth for validation."""
    if data is not None:
        raise ValueError("a task on digits brings its own data; leave --data unset, or use task 'cifar'")
    try:
        digits = importlib.import_module("sklearn.datasets").load_digits()
    except ModuleNotFoundError as error:
        raise missing_extra("scikit-learn", "experiments") from error
    x = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))[..., None]
    return hold_out(x, torch.from_numpy(digits.target.astype(np.int64)), "scikit-learn digits")


def load_images(data: str | Path | None) -> ImageSet:
    """Return images from .npz files with arrays x (N, S, S, C) uint8 and y (N,) integer.

    Args:
        data: one file (every sixth image is held out) or a folder with one file called *train*.npz and one
            called *test*.npz or *valid*.npz; `None` for `HPT_DATA_DIR`/images.

    Raises:
        FileNotFoundError: no such file or folder, or not set.
        ValueError: the files are not what they should be.
    """
    path = data_dir("the CIFAR-10 subset (images/*.npz)") / "images" if data is None else Path(data)
    if path.is_file():
        return hold_out(*read_images(path), str(path))
    train = sorted(path.glob("*train*.npz"))
    valid = sorted([*path.glob("*test*.npz"), *path.glob("*valid*.npz")])
    if len(train) != 1 or len(valid) != 1:
        wanted = "an .npz file nor a folder with one *train*.npz and one *test*.npz or *valid*.npz"
        raise FileNotFoundError(f"{path} is neither {wanted}")
    # Without the environment's path: reports are compared between machines.
    source = f"{DATA_DIR_VARIABLE}/images" if data is None else str(path)
    return ImageSet(*read_images(train[0]), *read_images(valid[0]), source)


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Return x (N, S, S, C) uint8 and y (N,) int64 of one .npz file."""
    if not path.is_file():
        raise ValueError(f"{path} is no .npz file with arrays x (images) and y (labels): it is no regular file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (KeyError, ValueError, OSError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no .npz file with arrays x (images) and y (labels): {error}") from error
    if x.ndim != 4 or x.dtype != np.uint8 or x.shape[1] != x.shape[2] or y.shape != (len(x),) or len(x) == 0:
        found = f"x {x.dtype} {x.shape}, y {y.dtype} {y.shape}"
        raise ValueError(f"{path} should hold x uint8 (N, S, S, C) and y (N,), N > 0, but has {found}")
    return torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))


def hold_out(x: Tensor, y: Tensor, source: str) -> ImageSet:
    """Return every sixth image for validation, the others for training."""
    held = torch.arange(len(x)) % VALID_EVERY == VALID_EVERY - 1
    return ImageSet(x[~held], y[~held], x[held], y[held], source)


def crop_and_flip(images: Tensor, pad: int, rng: np.random.Generator, *, flips: bool = True) -> Tensor:
    """Return the images shifted by up to `pad` pixels (edges mirrored), half of them flipped, in one gather.

    Args:
        images: (B, S, S, C).
        pad: at least 1, below S.
        rng: drawn from on the CPU, so that a seed means the same on every device.
        flips: whether a mirrored image shows the same thing.
    """
    num, size = images.shape[:2]
    shift = torch.from_numpy(rng.integers(-pad, pad + 1, size=(num, 2)))
    flip = torch.from_numpy(rng.integers(2, size=(num, 1))) if flips else torch.zeros(num, 1)
    along = torch.arange(size)
    rows = shift[:, :1] + along
    columns = shift[:, 1:] + torch.where(flip == 1, size - 1 - along, along)
    rows, columns = (sent(mirror(index, size), images.device) for index in (rows, columns))
    which = torch.arange(num, device=images.device)
    return images[which[:, None, None], rows[:, :, None], columns[:, None, :]]


def mirror(index: Tensor, size: int) -> Tensor:
    """Return indices reflected into [0, size), the edge not repeated: -1 -> 1, size -> size - 2."""
    return (size - 1) - (size - 1 - index.abs()).abs()
