"""Small language models trained by the plain loop, their loss curves kept: runs to measure forecasts on.

The model reads eight bytes and tells the next one (Bengio et al., JMLR 3, 2003): a step takes a millisecond, so that
thousands of steps, and with them the part of a curve that a forecast is asked about, cost seconds.  Five sizes, two
peak rates, four schedules and two lengths make 80 runs.  Each is one CSV file with a row every hundredth of the run:
``step, lr, loss, train_loss``, where lr is the rate of the step just taken, loss the validation loss after it and
train_loss the mean over the steps since the row before.  Runs of one width are trained side by side and written when
they have ended, so a recording that was stopped goes on with the widths that are missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...forecast.curve import Array
from ...safe_files import write_text
from ...tasks.base import ScheduleName, counter_rng
from ...tasks.language.text import NUM_BYTE_TOKENS, Corpus, load_corpus
from ...tasks.recipes import lr_factor

#: Rows of a curve.
NUM_ROWS = 100
WIDTHS = (24, 32, 48, 64, 96)
PEAK_RATES = (1e-3, 4e-3)
SCHEDULES: tuple[ScheduleName, ...] = ("constant", "cosine", "linear", "wsd")
LENGTHS = (3000, 6000)
WARMUP_SHARE, DECAY_SHARE = 0.05, 0.25
#: Bytes that the model reads, examples per batch, and numbers per embedded byte.
CONTEXT, BATCH_SIZE, EMBEDDING = 8, 32, 8
#: Examples of the fixed validation set, and bytes of text.
NUM_VALID, DATA_BYTES = 4096, 4_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run; those of one width share their start and the order of their batches, those of two widths neither."""

    width: int
    lr: float
    schedule: ScheduleName
    steps: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"mlp-w{self.width}-lr{self.lr:g}-{self.schedule}-{self.steps}"

    @property
    def warmup_steps(self) -> int:
        """Of the linear warm-up."""
        return round(WARMUP_SHARE * self.steps)


def recipes() -> Iterator[Recipe]:
    """All 80, small ones first."""
    for width, lr, schedule, steps in itertools.product(WIDTHS, PEAK_RATES, SCHEDULES, LENGTHS):
        yield Recipe(width=width, lr=lr, schedule=schedule, steps=steps)


def record(folder: Path, tell: Callable[[str], None]) -> list[Path]:
    """Run what is missing in a folder.

    Args:
        folder: Made if missing.
        tell: Takes a line about every run.

    Returns:
        All files, in the order of :func:`recipes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {recipe: folder / f"{recipe.name}.csv" for recipe in recipes()}
    corpus: Corpus | None = None
    for width in WIDTHS:
        missing = [recipe for recipe, path in files.items() if recipe.width == width and not path.exists()]
        if not missing:
            continue
        corpus = corpus or load_corpus(None, DATA_BYTES)
        for recipe, text in zip(missing, run(corpus, missing), strict=True):
            write_text(files[recipe], text)
            tell(f"{recipe.name}: validation loss {text.splitlines()[-1].split(',')[2]}")
    return list(files.values())


def run(corpus: Corpus, together: Sequence[Recipe]) -> list[str]:
    """Train models of one width side by side, each by its own recipe: their matrices are multiplied in one call.

    Returns:
        The curve of each as CSV.
    """
    models = Models(together)
    valid = examples(corpus.valid, np.linspace(0, len(corpus.valid) - CONTEXT - 1, NUM_VALID).astype(np.int64))
    rows: list[list[str]] = [["step,lr,loss,train_loss"] for _ in together]
    since = torch.zeros(len(together))
    for step in range(1, max(recipe.steps for recipe in together) + 1):
        going = [k for k, recipe in enumerate(together) if step <= recipe.steps]
        lr = [models.optimizer.param_groups[k]["lr"] for k in range(len(together))]
        at = counter_rng(together[0].width, step).integers(len(corpus.train) - CONTEXT, size=BATCH_SIZE)
        since[going] += models.step(examples(corpus.train, at), going)
        due = [k for k in going if step % (together[k].steps // NUM_ROWS) == 0]
        if due:
            with torch.no_grad():
                losses = models.losses(valid, due).tolist()
            for k, loss in zip(due, losses, strict=True):
                mean = float(since[k]) / (together[k].steps // NUM_ROWS)
                rows[k].append(f"{step},{lr[k]:.9g},{loss:.6f},{mean:.6f}")
            since[due] = 0.0
    return ["\n".join(lines) + "\n" for lines in rows]


class Models:
    """Models of one shape that read the same batches, each with its own rate and schedule."""

    def __init__(self, together: Sequence[Recipe]) -> None:
        """All begin with the same weights, which belong to the width."""
        width = together[0].width
        shapes = ((CONTEXT * EMBEDDING, width), (width, width), (width, NUM_BYTE_TOKENS))
        generator = torch.Generator().manual_seed(width)
        drawn = [torch.randn(NUM_BYTE_TOKENS, EMBEDDING, generator=generator)]
        drawn += [torch.randn(shape, generator=generator) / shape[0] ** 0.5 for shape in shapes]
        self._weights = [[w.clone().requires_grad_() for w in drawn] for _ in together]
        groups = [{"params": own, "lr": recipe.lr} for own, recipe in zip(self._weights, together, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.1, foreach=True)
        self._factors = [rates(recipe) for recipe in together]
        self._peaks = [recipe.lr for recipe in together]
        self._num_steps = 0
        self._set_rates()

    def _set_rates(self) -> None:
        for group, factors, peak in zip(self.optimizer.param_groups, self._factors, self._peaks, strict=True):
            group["lr"] = peak * float(factors[min(self._num_steps, len(factors) - 1)])

    def losses(self, batch: tuple[Tensor, Tensor], which: Sequence[int]) -> Tensor:
        """Mean cross-entropy of some of the models, (len(which),)."""
        embedding, *matrices = (torch.stack([self._weights[k][i] for k in which]) for i in range(4))
        x = embedding[:, batch[0]].flatten(2)
        for matrix in matrices[:-1]:
            x = functional.gelu(torch.bmm(x, matrix))
        logits = torch.bmm(x, matrices[-1])
        targets = batch[1].expand(len(which), -1)
        each = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return each.view(len(which), -1).mean(1)

    def step(self, batch: tuple[Tensor, Tensor], which: Sequence[int]) -> Tensor:
        """One step of some of the models; their losses before it.  The others have no gradient, and stay."""
        self.optimizer.zero_grad()
        losses = self.losses(batch, which)
        losses.sum().backward()
        self.optimizer.step()
        self._num_steps += 1
        self._set_rates()
        return losses.detach()


def examples(tokens: Tensor, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Bytes (B, CONTEXT) and the one that follows each, (B,), from positions (B,)."""
    at = torch.from_numpy(positions)[:, None] + torch.arange(CONTEXT + 1)
    taken = tokens[at].long()
    return taken[:, :-1], taken[:, -1]


def rates(recipe: Recipe) -> Array:
    """Over the peak, of every step of a run, (T,)."""
    return np.array([
        lr_factor(
            n, schedule=recipe.schedule, total_steps=recipe.steps, warmup_steps=recipe.warmup_steps,
            decay_frac=DECAY_SHARE,
        )
        for n in range(recipe.steps)
    ])  # fmt: skip
