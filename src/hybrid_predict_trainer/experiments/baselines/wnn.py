"""WNN+: a small pretrained MLP forecasts every weight from five past values (Knyazev et al., arXiv 2409.04434).

A torch-only forward for the released ``nino_mlp.pt``.  Per tensor, P weights and C = 5 states: standardise all P x C
values with one mean and deviation, map each weight's states by a linear layer, add an embedding of the tensor's type,
four linear layers with SiLU; output k - 1 is the change from the last state to k states ahead.  Adam's moments are
not touched, and nothing checks a forecast but that it is a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ...cost import FORWARD_UNITS, PASS_UNITS, STEP_UNITS
from ...records import DivergenceError
from ...tasks.base import data_dir
from ...weights import algebra as weights
from ...weights.algebra import Tensors
from ..arms.drive import Hooks
from .base import BaselineRun
from .flops import forward_flops, mlp_flops

CHECKPOINT = "nino_mlp.pt"
NUM_STATES = 5
HIDDEN = 128
NUM_AHEAD = 40
#: Steps between states it was trained with: further apart is out of its distribution.
SPACING = 200
#: How far the first forecast looks, as a share of the run: 40 states of 200 steps in 10,000.
REACH_FRAC = 0.8
#: A long look and a short one: with one forecast there would be no falling horizon.
MIN_FORECASTS = 2
EPS = 1e-6
#: Weights per forward: 128 activations each.
CHUNK = 1 << 16

#: Tensor types of the released model.
LINEAR, OTHER, CONVOLUTION, NORM, TOKENS, POSITIONS, QUERY, KEY, VALUE = 1, 2, 3, 4, 5, 6, 7, 8, 9
_TYPES = {"attention_q": QUERY, "attention_k": KEY, "attention_v": VALUE}

State = dict[str, Tensor]


def load(path: Path | None = None) -> State:
    """Weights of the released model.

    Args:
        path: None: ``peers/nino_mlp.pt`` under ``HPT_DATA_DIR``.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is another file.
    """
    path = path or data_dir(f"the WNN+ checkpoint (peers/{CHECKPOINT})") / "peers" / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: the baseline wnn+ needs the released {CHECKPOINT} of NiNo")
    state: State = torch.load(path, map_location="cpu", weights_only=True).get("state_dict", {})
    shapes = {"edge_proj.fc.0.weight": (HIDDEN, NUM_STATES), "edge_mlp.fc.6.weight": (NUM_AHEAD, HIDDEN)}
    if any(tuple(state[k].shape) != shape if k in state else True for k, shape in shapes.items()):
        raise ValueError(f"{path} is not the WNN+ model: {CHECKPOINT} of the NiNo release is wanted")
    return state


def tensor_type(name: str, role: str, dim: int) -> int:
    """Type of a tensor as the model was trained to see it.

    Args:
        name: Qualified name.
        role: From ``weights.role_of``.
        dim: Number of dimensions.
    """
    if role == "embedding":
        return POSITIONS if re.search(r"pos|wpe", name) else TOKENS
    if dim == 1:
        return NORM if name.endswith("weight") else OTHER
    if dim == 2:
        return _TYPES.get(role, LINEAR)
    return CONVOLUTION if dim == 4 else OTHER


@torch.no_grad()
def forecast(model: State, states: Tensor, kind: int, ahead: int) -> Tensor:
    """Weights ``ahead`` states after the last one.

    Args:
        model: From :func:`load`, on the device of ``states``.
        states: (P, 5), oldest first.
        kind: Tensor type.
        ahead: k, 1 to 40.

    Returns:
        (P,).
    """
    mean, std = states.mean(), states.std()
    x = (states - mean) / (std + EPS)
    moved = torch.empty_like(x[:, 0])
    for part, out in zip(x.split(CHUNK), moved.split(CHUNK), strict=True):
        h = functional.linear(part, model["edge_proj.fc.0.weight"], model["edge_proj.fc.0.bias"])
        h = h + model["layer_embed.weight"][kind]
        for layer in (0, 2, 4):
            h = functional.silu(
                functional.linear(h, model[f"edge_mlp.fc.{layer}.weight"], model[f"edge_mlp.fc.{layer}.bias"])
            )
        out.copy_(h @ model["edge_mlp.fc.6.weight"][ahead - 1] + model["edge_mlp.fc.6.bias"][ahead - 1])
    # by std and not by std + eps, as released
    return (x[:, -1] + moved) * std + mean


@dataclass(frozen=True, slots=True)
class ForecastPlan:
    """When a run forecasts, and how far."""

    spacing: int  # real steps between two states
    ahead: tuple[int, ...]  # k of each forecast


def forecast_plan(num_steps: int, price_steps: float, max_forecasts: int, cost_frac: float) -> ForecastPlan:
    """Forecasts spread over a run, their states evenly spaced and at most 200 steps apart.

    As published, 10,000 steps have ten forecasts that look 40, 33, ... 3, 1 states of 200 steps ahead: the square
    of a line from sqrt(40) to 1, never further than 0.8 of the run.  Shorter runs keep that proportion, and
    have no more forecasts than ``cost_frac`` of their budget pays for, because a forecast costs as much for a small
    batch as for a large one.

    Args:
        num_steps: Budget in steps.
        price_steps: Of one forecast, in steps.
        max_forecasts: Unless states would be more than 200 steps apart.
        cost_frac: Share of the budget; two forecasts are made in any case, if they can be paid at all.
    """
    affordable = int(cost_frac * num_steps / price_steps) if price_steps > 0 else max_forecasts
    count = min(max(affordable, MIN_FORECASTS), max_forecasts)
    spacing = min(SPACING, int((num_steps - count * price_steps) / (count * NUM_STATES)))
    if spacing < 1:
        return ForecastPlan(num_steps + 1, (1,))
    count = max(1, int(num_steps / (spacing * NUM_STATES + price_steps)))
    first = math.sqrt(max(1, min(NUM_AHEAD, int(REACH_FRAC * num_steps / spacing))))
    line = [first + (1 - first) * i / max(count - 1, 1) for i in range(count)]
    return ForecastPlan(spacing, tuple(round(v**2) for v in line))


def wnn_plus(session: BaselineRun) -> Hooks:
    """Forecast all weights after every fifth state.

    The original forecasts in place of an optimizer step, which costs no gradient; here the forecast lies between
    two steps, which is the same for the weights and for the cost.
    """
    run, order = session.run, session.order
    model = {k: v.to(run.subject.parameters[0].device) for k, v in load().items()}
    num_weights = sum(p.numel() for p in run.subject.parameters)
    flops = num_weights * mlp_flops((NUM_STATES, HIDDEN, HIDDEN, HIDDEN, HIDDEN, 1))
    price = flops / forward_flops(order.setup, run.subject.model, order.seed) * FORWARD_UNITS
    price += PASS_UNITS * (2 * NUM_STATES + 1)  # states read twice, weights written
    budget = session.recipe.steps * STEP_UNITS
    planned = forecast_plan(
        session.recipe.steps, price / STEP_UNITS, int(session.values["max_forecasts"]), session.values["cost_frac"]
    )
    kinds = [
        tensor_type(name, run.windows.groups.roles[g], p.dim())
        for name, g, p in zip(run.windows.groups.names, run.windows.groups.index, run.subject.parameters, strict=True)
    ]
    states: list[list[Tensor]] = []
    horizons = iter(planned.ahead)

    def after_step() -> None:
        if run.meter.num_real_steps % planned.spacing:
            return
        states.append(weights.clone(run.subject.parameters))
        session.charge_passes(2)
        if len(states) < NUM_STATES:
            return
        k = next(horizons, 1)
        if run.meter.cost_units + price <= budget:  # a budget is not to be overdrawn by its last forecast
            move(model, run.subject.parameters, states, kinds, k)
            session.charge_forwards(price / FORWARD_UNITS)
        states.clear()

    return Hooks(after_step=after_step)


@torch.no_grad()
def move(model: State, parameters: Tensors, states: Sequence[Tensors], kinds: Sequence[int], ahead: int) -> None:
    """Put the weights where they are forecast to be.

    Raises:
        DivergenceError: a forecast is not a number, the one thing the original checks.
    """
    for i, (p, kind) in enumerate(zip(parameters, kinds, strict=True)):
        past = torch.stack([state[i].flatten() for state in states], dim=1).float()
        new = forecast(model, past, kind, ahead)
        if torch.isnan(new).any():
            raise DivergenceError("WNN+ forecast weights that are not numbers")
        p.copy_(new.view_as(p))
