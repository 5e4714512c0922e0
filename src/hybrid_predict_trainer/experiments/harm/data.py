"""Small data sets that need no download: made ones, scikit-learn's digits, text that every Python carries.

Shapes: N samples, D inputs, T tokens, S states.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...tasks.base import missing_extra
from ...tasks.language.text import Corpus, load_corpus

Samples = tuple[Tensor, Tensor]
#: (count, generator) -> that many new samples.
Draw = Callable[[int, torch.Generator], Samples]

#: Samples drawn at once: a batch of eight by itself would cost more than the step it is for.
CHUNK = 4096
NUM_VALID = 4000


def generator(seed: int) -> torch.Generator:
    """A generator of its own: torch's global one belongs to initial weights and dropout."""
    return torch.Generator().manual_seed(seed)


def fresh(draw: Draw, batch: int, order: int) -> Iterator[Samples]:
    """Batches of samples that never come again, without end."""
    source = generator(order)
    while True:
        x, y = draw(CHUNK // batch * batch, source)
        yield from zip(x.split(batch), y.split(batch), strict=True)


def epochs(samples: Samples, batch: int, order: int) -> Iterator[Samples]:
    """Batches of the same samples in a new order at every pass, without end; a last batch that is short is left out."""
    source = generator(order)
    x, y = samples
    while True:
        for chosen in torch.randperm(len(x), generator=source).split(batch):
            if len(chosen) == batch:
                yield x[chosen], y[chosen]


# ---- images ---------------------------------------------------------------------------------------------

GLYPH_SIDE, NUM_CLASSES, NUM_STYLES, SHIFTS = 12, 10, 3, (-1, 0, 1)


@functools.cache
def _glyph_table() -> Tensor:
    """(classes * styles * shifts, side * side): smooth random shapes, each in every position."""
    noise = torch.randn(NUM_CLASSES * NUM_STYLES, 1, 6, 6, generator=generator(11))
    shapes = functional.interpolate(noise, size=(GLYPH_SIDE, GLYPH_SIDE), mode="bicubic", align_corners=False)
    shapes = shapes / shapes.std(dim=(2, 3), keepdim=True)
    moved = [shapes.roll((dy, dx), dims=(2, 3)) for dy in SHIFTS for dx in SHIFTS]
    return torch.stack(moved, dim=1).reshape(-1, GLYPH_SIDE * GLYPH_SIDE)


def draw_glyphs(count: int, source: torch.Generator, *, turned: bool = False) -> Samples:
    """Images of ten classes: a shape of the class, a fainter one of any class over it, noise, 3 % wrong labels.

    Args:
        count: how many.
        source: of all random numbers.
        turned: the images are mirrored along the diagonal and of other contrast, for a model to adapt to.
    """
    table = _glyph_table()
    per_class = len(table) // NUM_CLASSES
    y = torch.randint(NUM_CLASSES, (count,), generator=source)
    own = table[y * per_class + torch.randint(per_class, (count,), generator=source)]
    other = table[torch.randint(len(table), (count,), generator=source)]
    strength = 0.6 + 0.8 * torch.rand(count, 1, generator=source)
    x = strength * own + 0.5 * other + 0.5 * torch.randn(count, own.shape[1], generator=source)
    if turned:
        x = 0.7 * x.view(-1, GLYPH_SIDE, GLYPH_SIDE).transpose(1, 2).reshape(x.shape) + 0.3
    wrong = torch.rand(count, generator=source) < 0.03
    return x, torch.where(wrong, torch.randint(NUM_CLASSES, (count,), generator=source), y)


@functools.cache
def digits() -> tuple[Samples, Samples]:
    """scikit-learn's 1,797 digits, 64 pixels in [0, 1]: (training, validation), 1,400 and 397 of them.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise missing_extra("sklearn", "experiments") from error
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=generator(12))
    train, valid = order[:1400], order[1400:]
    return (x[train], y[train]), (x[valid], y[valid])


# ---- tables ---------------------------------------------------------------------------------------------

TEACHER_INPUTS = 32
#: Steps between two changes of the target, and how far each moves the teacher's weights.
DRIFT_STEPS, DRIFT_SIZE = 200, 0.12


@functools.cache
def teacher(stage: int = 0) -> tuple[Tensor, ...]:
    """Weights and biases of a network of 64 tanh units; each later stage is the one before, moved a little."""
    shapes = ((64, TEACHER_INPUTS), (64,), (NUM_CLASSES, 64), (NUM_CLASSES,))
    source = generator(13 + 1000 * stage)
    noise = tuple(torch.randn(shape, generator=source) for shape in shapes)
    if stage == 0:
        return tuple(0.6 * z for z in noise)
    return tuple(w + DRIFT_SIZE * z for w, z in zip(teacher(stage - 1), noise, strict=True))


def draw_taught(count: int, source: torch.Generator, *, stage: int = 0) -> Samples:
    """Normal inputs with the class that the teacher says, every tenth label drawn by chance."""
    w1, b1, w2, b2 = teacher(stage)
    x = torch.randn(count, TEACHER_INPUTS, generator=source)
    y = functional.linear(torch.tanh(functional.linear(x, w1, b1)), w2, b2).argmax(1)
    wrong = torch.rand(count, generator=source) < 0.1
    return x, torch.where(wrong, torch.randint(NUM_CLASSES, (count,), generator=source), y)


def drifting(batch: int, order: int, num_stages: int) -> Iterator[Samples]:
    """Fresh batches of a teacher that moves on every :data:`DRIFT_STEPS` batches, ``num_stages - 1`` times."""
    source = generator(order)
    stage = 0
    while True:
        x, y = draw_taught(DRIFT_STEPS * batch, source, stage=min(stage, num_stages - 1))
        yield from zip(x.split(batch), y.split(batch), strict=True)
        stage += 1


def draw_friedman(count: int, source: torch.Generator) -> Samples:
    """Friedman's first function of ten uniform inputs, five of them without meaning (1991), with noise; unit scale."""
    x = torch.rand(count, 10, generator=source)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = (y + torch.randn(count, generator=source) - 14.4) / 5
    return 2 * x - 1, y[:, None]


def draw_surface(count: int, source: torch.Generator) -> Samples:
    """A smooth function of eight normal inputs, without noise."""
    x = torch.randn(count, 8, generator=source)
    return x, (torch.tanh(x[:, :1] + 0.5 * x[:, 1:2]) + 0.3 * x[:, 2:3] - 0.2 * x[:, 3:4])


# ---- sequences --------------------------------------------------------------------------------------------

NUM_SYMBOLS, NUM_STATES, SEQUENCE = 8, 12, 24


def draw_automaton(count: int, source: torch.Generator) -> Samples:
    """Walks of a machine of twelve states that says one of eight symbols at each step: (N, T) and the next (N, T)."""
    fixed = generator(14)
    moves = torch.randint(NUM_STATES, (NUM_STATES, NUM_SYMBOLS), generator=fixed)
    says = torch.softmax(2.5 * torch.randn(NUM_STATES, NUM_SYMBOLS, generator=fixed), dim=1)
    state = torch.randint(NUM_STATES, (count,), generator=source)
    told = []
    for _ in range(SEQUENCE + 1):
        symbol = torch.multinomial(says[state], 1, generator=source)[:, 0]
        told.append(symbol)
        state = moves[state, symbol]
    tokens = torch.stack(told, dim=1)
    return tokens[:, :-1], tokens[:, 1:]


ARITHMETIC_TOKENS, ARITHMETIC_SYMBOLS, LARGEST_STRIDE = 24, 64, 11


def draw_arithmetic(count: int, source: torch.Generator) -> Samples:
    """Arithmetic sequences modulo 64: (N, T) and the next (N, T); two tokens tell the next one, one does not."""
    first, stride = (torch.randint(1, LARGEST_STRIDE + 1, (count, 1), generator=source) for _ in range(2))
    tokens = (first + stride * torch.arange(ARITHMETIC_TOKENS + 1)) % ARITHMETIC_SYMBOLS
    return tokens[:, :-1], tokens[:, 1:]


TEXT_BYTES = 2_000_000
CONTEXT = 64


@functools.cache
def corpus(name: str) -> Corpus:
    """Text that comes with Python: "stdlib", its library's source, or "manual", the prose of its manual."""
    return load_corpus(name, TEXT_BYTES)


def draw_windows(text: Tensor, count: int, source: torch.Generator) -> Samples:
    """Windows of a text at random places: (N, T) tokens and the next (N, T)."""
    start = torch.randint(len(text) - CONTEXT - 1, (count, 1), generator=source)
    tokens = text[start + torch.arange(CONTEXT + 1)].long()
    return tokens[:, :-1], tokens[:, 1:]


# ---- differential equations -------------------------------------------------------------------------------

#: loss of a network at points (N, 1)
Residual = Callable[[nn.Module, Tensor], Tensor]


def _derivatives(net: nn.Module, x: Tensor, bounded: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
    """u, u', u'' at the points, with a graph to the weights."""
    with torch.enable_grad():
        x = x.requires_grad_(True)
        u = bounded(x, net(x))
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    return u, du, ddu


def poisson_residuals(net: nn.Module, x: Tensor) -> Tensor:
    """Residuals (N, 1) of u'' = f on (0, 1), u = 0 at both ends, f of two frequencies."""
    _, _, ddu = _derivatives(net, x.detach(), lambda x, n: x * (1 - x) * n)
    f = -(math.pi**2) * (torch.sin(math.pi * x) + 3 * torch.sin(3 * math.pi * x))
    return ddu - f


def poisson(net: nn.Module, x: Tensor) -> Tensor:
    """Their mean square."""
    return poisson_residuals(net, x).square().mean()


def oscillator_residuals(net: nn.Module, x: Tensor) -> Tensor:
    """Residuals (N, 1) of u'' + 2 u' + 40 u = 0 on (0, 1), u(0) = 1, u'(0) = 0."""
    u, du, ddu = _derivatives(net, x.detach(), lambda x, n: 1 + x * x * n)
    return ddu + 2 * du + 40 * u


def oscillator(net: nn.Module, x: Tensor) -> Tensor:
    """A fortieth of their mean square."""
    return oscillator_residuals(net, x).square().mean() / 40


def points(batch: int, order: int, every: int) -> Iterator[Tensor]:
    """Uniform points of (0, 1), drawn anew every so many steps; 0: the same tensor for ever."""
    source = generator(order)
    while True:
        x = torch.rand(batch, 1, generator=source)
        if not every:
            while True:
                yield x
        for _ in range(every):
            yield x
