"""Learning-rate schedules by name, and rates of a whole run from a log and a plan.

A schedule is written ``NAME:KEY=VALUE,...``: ``cosine:warmup=2000,final=0.1``, ``wsd:warmup=500,decay=0.2,shape=exp``,
``stages:warmup=100,8000=0.3,12000=0.1``, ``constant``, ``linear``.  Only the rate's course counts, not its size, so
that ``peak`` is needed only where a log holds rates too and does not reach its peak.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

import numpy as np

from ..records import ConfigError
from .curve import Array

NAMES = ("constant", "cosine", "linear", "stages", "wsd")
SHAPES = ("linear", "exp", "cosine", "sqrt")
#: Longest plan: a vector of rates of this length takes 800 MB.
MAX_STEPS = 100_000_000
#: Logged rates follow a schedule where they are off by less than this share of its peak, but for this share of rows.
ALIKE, NOT_ALIKE = 0.05, 0.1
#: Rate at the end of an exponential decay where none is said: it has no zero.
LEAST_FINAL = 0.01


def planned_rates(schedule: str, total_steps: int) -> Array:
    """The rate of every step 1 to T of a schedule, (T,), over its peak unless ``peak`` is said.

    Args:
        schedule: As described at the top of this module.
        total_steps: T.

    Raises:
        ConfigError: an unknown schedule, a key that it has no use for, or a value out of range.
    """
    if not 1 <= total_steps <= MAX_STEPS:
        raise ConfigError(f"the run must have 1 to {MAX_STEPS:,} steps, not {total_steps:,}")
    name, _, rest = schedule.strip().partition(":")
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown schedule {name!r}{hint} (valid: {', '.join(NAMES)})")
    said, stages, shape = _parsed(name, rest)
    warmup = int(said.get("warmup", 0))
    if warmup != said.get("warmup", 0):
        raise ConfigError(f"schedule {schedule!r}: warmup is told in whole steps, not {said['warmup']:g}")
    early = [step for step in stages if step < warmup]
    if early:
        raise ConfigError(f"schedule {schedule!r}: step {early[0]} lies within the warm-up of {warmup} steps")
    if warmup >= total_steps:
        raise ConfigError(f"schedule {schedule!r}: a warm-up of {warmup} steps does not end within {total_steps}")
    after = np.arange(1, total_steps + 1 - warmup, dtype=np.float64)
    final = said.get("final", 0.0)
    if name == "constant":
        factor = np.ones_like(after)
    elif name == "stages":
        factor = np.ones_like(after)
        for step, rate in sorted(stages.items()):
            factor[max(0, step - warmup) :] = rate
    elif name == "wsd":
        length = max(1.0, said.get("decay", 0.25) * total_steps)
        way = np.clip((after - (len(after) - length)) / length, 0.0, 1.0)
        factor = _WAYS[shape](way, max(final, LEAST_FINAL) if shape == "exp" else final)
    else:
        factor = _WAYS[name](after / len(after), final)
    rising = np.arange(1, warmup + 1, dtype=np.float64) / max(warmup, 1)
    found: Array = np.concatenate([rising, factor]) * said.get("peak", 1.0)
    return found


def _parsed(name: str, rest: str) -> tuple[dict[str, float], dict[int, float], str]:
    """Values by key, rates by step, and the shape of a decay."""
    said: dict[str, float] = {}
    stages: dict[int, float] = {}
    shape = "linear"
    for piece in filter(None, (p.strip() for p in rest.split(","))):
        key, equals, text = (p.strip() for p in piece.partition("="))
        if not equals:
            raise ConfigError(f"schedule {name}: {piece!r} must be KEY=VALUE, such as warmup=1000")
        if key == "shape" and name == "wsd":
            if text not in SHAPES:
                raise ConfigError(f"schedule wsd: unknown shape {text!r} (valid: {', '.join(SHAPES)})")
            shape = text
        elif name == "stages" and key.isdecimal():
            stages[int(key)] = _value(name, key, text, 0.0, 1.0)
        elif key in _KEYS and (name in _KEYS[key][2]):
            said[key] = _value(name, key, text, *_KEYS[key][:2])
        else:
            valid = [k for k, (_, _, names) in _KEYS.items() if name in names] + ["shape"] * (name == "wsd")
            raise ConfigError(f"schedule {name} has no use for {key!r} (valid: {', '.join(valid)})")
    if name == "stages" and not stages:
        raise ConfigError("schedule stages: needs at least one STEP=SHARE, such as 8000=0.3")
    return said, stages, shape


def _value(name: str, key: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"schedule {name}: {key}={text!r} is no number") from None
    if not low <= value <= high:
        raise ConfigError(f"schedule {name}: {key}={text} must be from {low:g} to {high:g}")
    return value


#: Key -> least and largest value, and the schedules that read it.
_KEYS: dict[str, tuple[float, float, tuple[str, ...]]] = {
    "warmup": (0, MAX_STEPS, NAMES),
    "peak": (1e-30, 1e30, NAMES),
    "final": (0.0, 1.0, ("cosine", "linear", "wsd")),
    "decay": (0.0, 1.0, ("wsd",)),
}

#: Rate over its peak, from 1 at way 0 to ``final`` at way 1.
_WAYS: dict[str, Callable[[Array, float], Array]] = {
    "linear": lambda way, final: 1 - (1 - final) * way,
    "cosine": lambda way, final: final + (1 - final) * (0.5 + 0.5 * np.cos(math.pi * way)),
    "exp": lambda way, final: np.exp(way * math.log(final)),
    "sqrt": lambda way, final: 1 - (1 - final) * np.sqrt(way),
}


def continued(steps: Array, rates: Array, plan: Array) -> Array:
    """Rates of a whole run: those that were logged as far as they go, the plan from there on.

    Args:
        steps: (n,) of the log, rising.
        rates: (n,) logged at them; between rows they are taken to change evenly.
        plan: (T,) of the whole run; scaled to the log where both overlap.

    Raises:
        ConfigError: the log goes beyond the plan, or has no rate above 0.
    """
    last = int(steps[-1])
    if last > len(plan):
        raise ConfigError(f"the log is at step {last}, beyond the {len(plan)} steps of the plan")
    at = np.arange(1, last + 1)
    logged = np.interp(at, steps, rates)
    first = int(steps[0])
    before = plan[: max(0, first - 1)]
    if rates.max() <= 0:
        raise ConfigError("no logged learning rate is above 0")
    scale = _scale(steps, rates, plan)
    logged[: len(before)] = before * scale
    found: Array = np.concatenate([logged, plan[last:] * scale])
    return found


def _scale(steps: Array, rates: Array, plan: Array) -> float:
    """Rate of the log over that of the plan.

    The middle of all rows where the two go alike: the last row alone may have the rate of the step after it, or one
    that was rounded to 0.  Where they do not go alike the plan goes on from the last row.
    """
    ahead = float(plan[int(steps[-1]) - 1])
    if agree(steps, rates, plan):
        return _middle(steps, rates, plan)
    return float(rates[-1] / ahead if ahead > 0 and rates[-1] > 0 else rates.max() / plan.max())


def _middle(steps: Array, rates: Array, plan: Array) -> float:
    """Median of the logged rates over the plan's, where both are above 0; 0 where they nowhere are."""
    there = plan[np.clip(steps.astype(np.intp), 1, len(plan)) - 1]
    both = (there > 0) & (rates > 0)
    return float(np.median(rates[both] / there[both])) if both.any() else 0.0


def agree(steps: Array, rates: Array, plan: Array) -> bool:
    """Whether logged rates follow a plan but for their size: nine rows in ten within a twentieth of the peak.

    Args:
        steps: (n,) of the log.
        rates: (n,) logged at them.
        plan: (T,).
    """
    scale = _middle(steps, rates, plan)
    there = scale * plan[np.clip(steps.astype(np.intp), 1, len(plan)) - 1]
    off = np.abs(rates - there) > ALIKE * scale * plan.max()
    return scale > 0 and float(np.mean(off)) <= NOT_ALIKE
