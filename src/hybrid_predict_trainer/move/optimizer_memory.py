"""Which optimizers compute weights from a copy of their own, so that whatever else moves a weight is undone.

Adam, SGD or Muon add a step to the weights they find: what a jump or the lookahead has moved stays moved.  MADGRAD,
FTRL or D-Feedback's AdaGrad compute the weights anew from where they began; Ranger and Lookahead go back half of
the way to a slow copy; Schedule-Free keeps a second point that is not moved along; Nero puts every row back on its
sphere.  There a motion of ours is undone, or becomes another one than was judged.

Nothing in an optimizer's interface tells, so it is tried: an optimizer of the same class and settings takes a few steps
on small weights of its own, 1 is added to them, and after some more steps without a gradient it is compared
with one whose weights were left alone,

    share = mean(w_with - w_without):   1 where additions stay, less where they are undone.

The optimizer that trains, its weights and the global random states are not touched.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import random
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..notices import users_line

#: Steps with random gradients before the addition, and without a gradient after it.
NUM_STEPS, NUM_STILL = 5, 20
#: Least and largest share left of an optimizer that takes additions as they are.  Trust ratios (LARS, LAMB) leave 0.9
#: to 1.1 at large rates; those to be recognised leave 0.0 to 0.5 (docs/optimizers.md).
LEAST_SHARE, LARGEST_SHARE = 0.75, 1.25
#: Known by name, whatever the settings: with a long period the probe would end before a slow copy is used.
KNOWN = frozenset({
    "A2Grad", "AccSGD", "AdamWScheduleFree", "AdamWScheduleFreeClosure", "AdamWScheduleFreePaper",
    "AdamWScheduleFreeReference", "DAdaptAdaGrad", "DAdaptSGD", "FTRL", "Lookahead", "MADGRAD", "MirrorMADGRAD", "Nero",
    "RAdamScheduleFree", "RAdamScheduleFreeClosure", "Ranger", "Ranger21", "Ranger25", "SGDScheduleFree",
    "SGDScheduleFreeClosure", "SGDScheduleFreeReference", "SRMM", "ScheduleFreeAdamW", "ScheduleFreeRAdam",
    "ScheduleFreeSGD", "ScheduleFreeWrapper", "TRAC",
})  # fmt: skip
#: Settings that differ only in how or where a step is computed.
_PLACEMENT = frozenset({"fused", "foreach", "capturable", "differentiable", "compile", "use_triton"})
#: Weights that are tried, the first set that the optimizer takes: some take matrices alone, some no matrices.
_SHAPES = (((2, 2), (4,)), ((2, 2),), ((4,),))
#: A decay of the weights is not an undoing: it is left out of the probe.
_DECAY = ("weight_decay", "wd", "cautious_wd")


_Shapes = tuple[tuple[int, ...], ...]
_Build = Callable[[Any, int, list[nn.Parameter]], Any]


def reason_to_leave_alone(optimizer: Optimizer) -> str | None:
    """Why nothing but the optimizer may move the weights, as half a sentence; None: it may."""
    names = [type(o).__name__ for o in _layers(optimizer)]
    known = next((name for name in names if name in KNOWN), None)
    if known is not None:
        return f"{known} computes weights from a copy of its own"
    left = share_left(optimizer)
    if left is None or LEAST_SHARE <= left <= LARGEST_SHARE:
        return None
    return f"{names[0]} leaves {left:.2f} of what is added to a weight"


def left_alone(optimizer: Optimizer) -> str | None:
    """As :func:`reason_to_leave_alone`, said in a warning."""
    reason = reason_to_leave_alone(optimizer)
    if reason is not None:
        warnings.warn(
            f"{reason}: no jumps, no lookahead and no early cuts, which it would undo (docs/optimizers.md)",
            stacklevel=users_line(),
        )
    return reason


def share_left(optimizer: Optimizer) -> float | None:
    """Share of an addition to a weight that is left after ``NUM_STILL`` steps without a gradient.

    The least of all kinds of groups, or one above ``LARGEST_SHARE``; None where it cannot be tried: the class cannot
    be built again from its settings, or its step needs a closure.  Infinite and NaN weights count as untried.
    """
    shares: list[float] = []
    with _in_private():
        for position in _kinds_of_groups(optimizer):
            tries = (_tried(optimizer, position, shapes) for shapes in _SHAPES)
            shares += next((found for found in tries if found), [])
    if not shares:
        return None
    largest = max(shares)
    return largest if largest > LARGEST_SHARE else min(shares)


def _layers(optimizer: Any) -> list[Any]:
    """A wrapper, and what it wraps, to the innermost."""
    found: list[Any] = []
    while optimizer is not None and all(optimizer is not o for o in found):
        found.append(optimizer)
        optimizer = next((value for value in vars(optimizer).values() if isinstance(value, Optimizer)), None)
    return found


def _kinds_of_groups(optimizer: Optimizer, at_most: int = 3) -> list[int]:
    """Positions of groups that are stepped differently (a flag such as ``use_muon``): one of each kind."""
    kinds: dict[str, int] = {}
    for position, group in enumerate(optimizer.param_groups):
        flags = sorted((k, v) for k, v in group.items() if isinstance(v, bool | str) and k not in _PLACEMENT)
        kinds.setdefault(repr(flags), position)
    return list(kinds.values())[:at_most]


def _tried(optimizer: Optimizer, position: int, shapes: _Shapes) -> list[float]:
    """Shares of weights of these shapes; none where it cannot be tried with them."""
    for build in (_built, _cloned):
        try:
            ends = [_run(build, optimizer, position, shapes, added) for added in (1.0, 0.0)]
        except Exception:  # an optimizer that cannot be tried this way raises whatever it likes
            continue
        shares = [float((a - b).mean()) for a, b in zip(*ends, strict=True)]
        if all(math.isfinite(share) for share in shares):
            return shares
    return []


def _run(build: _Build, optimizer: Any, position: int, shapes: _Shapes, added: float) -> list[Tensor]:
    """The weights at the end, with ``added`` put on them between the steps."""
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    _seed()
    twin = build(optimizer, position, ours)
    if callable(train := getattr(twin, "train", None)):  # Schedule-Free refuses to step before
        train()
    for t in range(NUM_STEPS + NUM_STILL):
        if t == NUM_STEPS:
            with torch.no_grad():
                torch._foreach_add_(list[Tensor](ours), added)
        for weight in ours:
            moving = t < NUM_STEPS
            weight.grad = torch.randn(weight.shape, generator=generator) if moving else torch.zeros_like(weight)
        twin.step()
    return [weight.detach().double() for weight in ours]


def _rate(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """A rate of the usual size: a schedule may have put it at 0 already."""
    for value in (group.get("initial_lr"), optimizer.defaults.get("lr"), group.get("lr")):
        if value is not None and float(value) > 0:
            return float(value)
    return 1e-2


def _settings(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of a group, on the host, without decay."""
    settings = {k: v for k, v in {**optimizer.defaults, **group}.items() if k not in {"params", "initial_lr"}}
    for name, value in settings.items():
        if name in _PLACEMENT:
            settings[name] = False if isinstance(value, bool) else None
        elif name in _DECAY and isinstance(value, int | float) and not isinstance(value, bool):
            settings[name] = 0.0
        elif isinstance(value, Tensor):
            settings[name] = value.item() if value.numel() == 1 else value.detach().cpu().clone()
    if "lr" in settings:
        settings["lr"] = _rate(optimizer, group)
    return settings


def _built(optimizer: Any, position: int, ours: list[nn.Parameter]) -> Any:
    """A new optimizer of the same class over our weights, by its constructor.

    Raises:
        Exception: the constructor asks for something that is not to be found in the old one.
    """
    settings = _settings(optimizer, optimizer.param_groups[position])
    known = {**vars(optimizer), **settings}
    arguments: dict[str, Any] = {}
    taken: set[str] = set()
    for name, parameter in inspect.signature(type(optimizer).__init__).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        taken.add(name)
        inner = vars(optimizer).get(name)
        if isinstance(inner, Optimizer):
            arguments[name] = _built(inner, position, ours)
        elif name in known and name != "params":
            arguments[name] = copy.deepcopy(known[name])
    if "params" in taken:
        flags = {
            k: v for k, v in settings.items() if k not in taken and isinstance(v, bool | str) and k != "train_mode"
        }
        arguments["params"] = [{"params": ours, **flags}]
    return type(optimizer)(**arguments)


def _cloned(optimizer: Any, position: int, ours: list[nn.Parameter]) -> Any:
    """A copy of all attributes, without state and with our weights in its one group, where it cannot be built."""
    memo: dict[int, Any] = {id(p): ours[0] for group in optimizer.param_groups for p in group["params"]}
    for layer in reversed(_layers(optimizer)):
        memo[id(layer.state)] = memo.get(id(layer.state), defaultdict(dict))
        memo[id(layer)] = twin = object.__new__(type(layer))
        own = {k: v for k, v in vars(layer).items() if k != "step" and "hooks" not in k}
        vars(twin).update({k: OrderedDict() for k in vars(layer) if "hooks" in k})
        vars(twin).update(copy.deepcopy(own, memo))
        groups = twin.param_groups
        if groups[0]["params"] is not ours:  # a wrapper has those of what it wraps
            groups[:] = [{**groups[position], **_settings(layer, layer.param_groups[position]), "params": ours}]
    return twin


def _seed() -> None:
    """The same draws in both runs, for optimizers that add noise."""
    torch.default_generator.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@contextmanager
def _in_private() -> Iterator[None]:
    """Random states as before, no warning, no gradient mode of the caller, nothing compiled."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
