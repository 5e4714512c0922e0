"""Learning-rate schedules: warm-up, stable, decay; linear to zero; cosine; cyclic.

Each is an ordinary :class:`torch.optim.lr_scheduler.LambdaLR` over the rates that the optimizer's groups have: those
are the peaks.  A rate is the peak times a factor of the step, counted from 0, and beyond its end a schedule stays at
its last factor.  The factors are partials of module-level functions, so that ``state_dict`` holds the position alone
and a run can be resumed with a longer schedule.

With a trainer, a schedule follows the run's clock (``training.clock``): an accepted jump advances it by what the jump
is credited with or has cost, so that the decay ends where the run ends, and a jump that is taken back takes the
schedule back.  docs/schedules.md says which choice suits what.

>>> import torch
>>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
>>> scheduler = wsd(optimizer, warmup_steps=500, stable_steps=10_000, decay_steps=5_000, initial=0.01, final=0.01)
>>> factor = scheduler.lr_lambdas[0]
>>> [round(factor(step), 4) for step in (0, 500, 10_499, 13_000, 15_500, 1_000_000)]
[0.01, 1.0, 1.0, 0.505, 0.01, 0.01]
"""

from __future__ import annotations

import functools
import math
from typing import Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .notices import warn
from .records import ConfigError

DecayShape = Literal["cosine", "linear", "sqrt"]
CyclicMode = Literal["triangular", "triangular2", "exp_range"]


def wsd(
    optimizer: Optimizer, *, warmup_steps: int, stable_steps: int, decay_steps: int,
    initial: float | None = None, final: float = 0.0, shape: DecayShape = "cosine",
) -> LambdaLR:  # fmt: skip
    """Warm-up, stable, decay (Hu et al., 2024, arXiv 2404.06395, section 4).

    Args:
        optimizer: Its groups' rates are the peaks.
        warmup_steps: Steps from ``initial`` to the peak, in a line.
        stable_steps: Steps at the peak.
        decay_steps: Steps from the peak to ``final``; beyond, the rate stays there.
        initial: Share of the peak at step 0, in [0, 1]; None: ``1 / (warmup_steps + 1)``, so that no step is lost.
        final: Share of the peak at the end, in [0, 1].
        shape: Of the decay: "cosine", "linear", or "sqrt" (1 - sqrt of the way, Hägele et al., 2024).

    Raises:
        ConfigError: a length below 0, a share outside [0, 1], an unknown shape.
    """
    _lengths(warmup_steps=warmup_steps, stable_steps=stable_steps, decay_steps=decay_steps)
    begin = 1 / (warmup_steps + 1) if initial is None else initial
    _shares(initial=begin, final=final)
    if shape not in get_args(DecayShape):
        raise ConfigError(f"shape = {shape!r} is unknown: must be one of {', '.join(get_args(DecayShape))}")
    return LambdaLR(optimizer, functools.partial(
        _wsd, warmup_steps=warmup_steps, stable_steps=stable_steps, decay_steps=decay_steps,
        initial=begin, final=final, shape=shape,
    ))  # fmt: skip


def linear(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> LambdaLR:
    """In a line from the peak to ``final``, zero unless said (Defazio et al., 2023, arXiv 2310.07831).

    Args:
        optimizer: Its groups' rates are the peaks.
        total_steps: Steps of the whole run; beyond, the rate stays at ``final``.
        warmup_steps: Of these, steps of linear warm-up.
        final: Share of the peak at the end, in [0, 1].

    Raises:
        ConfigError: lengths that do not fit together, a share outside [0, 1].
    """
    return _to_the_end(optimizer, total_steps, warmup_steps, final, "linear")


def cosine(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> LambdaLR:
    """Half a cosine from the peak to ``final`` (Loshchilov and Hutter, 2017, arXiv 1608.03983, without restarts).

    Args:
        optimizer: Its groups' rates are the peaks.
        total_steps: Steps of the whole run; beyond, the rate stays at ``final`` and does not rise again.
        warmup_steps: Of these, steps of linear warm-up.
        final: Share of the peak at the end, in [0, 1].

    Raises:
        ConfigError: lengths that do not fit together, a share outside [0, 1].
    """
    return _to_the_end(optimizer, total_steps, warmup_steps, final, "cosine")


def cyclic(
    optimizer: Optimizer, *, cycle_steps: int = 1000, lowest: float = 0.1, mode: CyclicMode = "triangular",
    gamma: float = 0.9999,
) -> LambdaLR:  # fmt: skip
    """Up and down again in a triangle (Smith, 2017, arXiv 1506.01186); not recommended with prediction.

    A rate that rises again undoes what the last fall has settled: what the trainer has learnt of the trajectory in one
    half of a cycle does not hold in the other, and losses of before and after a jump differ by the rate.  It warns.

    Args:
        optimizer: Its groups' rates are the peaks.
        cycle_steps: Steps of a whole cycle, at least 2.
        lowest: Share of the peak at the foot of a cycle, in [0, 1].
        mode: "triangular"; "triangular2" halves the height with every cycle; "exp_range" by ``gamma`` per step.
        gamma: Of "exp_range", in (0, 1].

    Raises:
        ConfigError: a length below 2, a share outside [0, 1], an unknown mode.
    """
    _lengths(cycle_steps=cycle_steps, least=2)
    _shares(lowest=lowest, gamma=gamma)
    if mode not in get_args(CyclicMode):
        raise ConfigError(f"mode = {mode!r} is unknown: must be one of {', '.join(get_args(CyclicMode))}")
    warn(
        "a cyclic schedule is not recommended with prediction: what is learnt while the rate falls does not hold "
        "while it rises; take schedules.wsd, linear or cosine",
    )
    return LambdaLR(
        optimizer, functools.partial(_cyclic, cycle_steps=cycle_steps, lowest=lowest, mode=mode, gamma=gamma)
    )


def _to_the_end(optimizer: Optimizer, total_steps: int, warmup_steps: int, final: float, shape: DecayShape) -> LambdaLR:
    _lengths(total_steps=total_steps, least=1)
    _lengths(warmup_steps=warmup_steps)
    _shares(final=final)
    if warmup_steps > total_steps:
        raise ConfigError(f"warmup_steps = {warmup_steps} is out of range: must be at most total_steps = {total_steps}")
    return LambdaLR(optimizer, functools.partial(
        _wsd, warmup_steps=warmup_steps, stable_steps=0, decay_steps=total_steps - warmup_steps,
        initial=1 / (warmup_steps + 1), final=final, shape=shape,
    ))  # fmt: skip


# ---- factors ------------------------------------------------------------------------------------------


def _wsd(
    step: int, *, warmup_steps: int, stable_steps: int, decay_steps: int, initial: float, final: float,
    shape: DecayShape,
) -> float:  # fmt: skip
    """The factor of a step from 0."""
    if step < warmup_steps:
        return initial + (1.0 - initial) * step / warmup_steps
    decayed = step - warmup_steps - stable_steps
    if decayed < 0:
        return 1.0
    way = min(1.0, decayed / decay_steps) if decay_steps else 1.0  # beyond its end a cosine would rise again
    height = {
        "cosine": 0.5 + 0.5 * math.cos(math.pi * way), "linear": 1.0 - way, "sqrt": 1.0 - math.sqrt(way),
    }[shape]  # fmt: skip
    return final + (1.0 - final) * height


def _cyclic(step: int, *, cycle_steps: int, lowest: float, mode: CyclicMode, gamma: float) -> float:
    """The factor of a step from 0."""
    cycle, place = divmod(step, cycle_steps)
    height = 1.0 - abs(2.0 * place / cycle_steps - 1.0)
    scale = {"triangular": 1.0, "triangular2": 0.5**cycle, "exp_range": gamma**step}[mode]
    return lowest + (1.0 - lowest) * height * scale


# ---- checks -------------------------------------------------------------------------------------------


def _lengths(*, least: int = 0, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} = {value!r} is not a whole number")
        if value < least:
            raise ConfigError(f"{name} = {value} is out of range: must be >= {least}")


def _shares(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise ConfigError(f"{name} = {value!r} is out of range: must be in [0, 1]")
