"""Synthetic windows whose next displacement depends on a state a predictor has to read and remember.

The displacement turns round or goes on at random, so that no fixed coefficients are any good: what the
closed-form base makes of it is no better than no jump at all.  Which it will be is told one window
ahead of time.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from hybrid_predict_trainer.keep.state_tree import decode, encode
from hybrid_predict_trainer.predictors import Predictor
from hybrid_predict_trainer.records import BasisSpec, Hindsight, PhasePrediction, Products, StateDict, Window


@dataclass
class Step:
    window: Window
    columns: Tensor  # (G, K, P) the basis
    ahead: Tensor  # (4, G, P) displacements of the next four windows


def turning(
    spec: BasisSpec, num_windows: int, *, seed: int = 0, num_groups: int = 2, noise: float = 0.1, num_steps: int = 10,
    turns: bool = True,
) -> Iterator[Step]:  # fmt: skip
    """d[t+1] = sign[t] d[t] + noise; the gradient norm at t tells sign[t + 1], the loss falls where it is positive.

    Without turns the sign is always positive, and the noise is all there is to miss.
    """
    generator = torch.Generator().manual_seed(seed)
    P, D = 64, spec.num_displacements
    sign = (2 * torch.randint(2, (num_windows + 8,), generator=generator) - 1).tolist()
    sign = sign if turns else [1] * len(sign)
    d = [torch.randn(num_groups, P, generator=generator, dtype=torch.float64)]
    for t in range(num_windows + 4):
        fresh = torch.randn(num_groups, P, generator=generator, dtype=torch.float64)
        step = sign[t] * d[-1] + noise * fresh
        d.append(step * (8 / torch.linalg.vector_norm(step, dim=1, keepdim=True)))
    loss, earlier, log_loss = 1.0, None, 0.0
    for t in range(num_windows):
        columns = torch.zeros(num_groups, spec.num_columns, P, dtype=torch.float64)
        for k in range(min(D, t + 1)):
            columns[:, k] = d[t - k]
        for i in range(len(spec.extras)):
            columns[:, D + i] = torch.randn(num_groups, P, generator=generator, dtype=torch.float64)
        BB = columns @ columns.mT
        hindsight = None
        if earlier is not None:
            BT = (earlier @ d[t][:, :, None])[:, :, 0]
            hindsight = Hindsight(BB=earlier @ earlier.mT, BT=BT, TT=d[t].square().sum(dim=1))
        loss = math.exp(log_loss)
        features, zero = torch.zeros(32), torch.zeros_like(BB[:, 0])
        window = Window(
            index=t, num_steps=num_steps, num_columns=min(D, t + 1), step=(t + 1) * num_steps,
            loss=loss, loss_slope=-1e-3, gradient_norm=10.0 if sign[t + 1] > 0 else 1.0,
            learning_rate=0.1, lr_integral=1.0, lr_ahead=1.0,
            jumped=False, features=features,
            products=Products(BB=BB, BY=zero[:, :, None] * BB, Bg=zero, gg=torch.ones(num_groups).double()),
            hindsight=hindsight, group_sizes=(P,) * num_groups,
        )  # fmt: skip
        log_loss += -0.05 if sign[t] > 0 else 0.03
        earlier = columns
        yield Step(window, columns, torch.stack(d[t + 1 : t + 5]))


def relative_error(step: Step, prediction: PhasePrediction) -> float:
    """|p - T|^2 / |T|^2 over the prediction's horizon."""
    m = prediction.horizon // step.window.num_steps
    T = step.ahead[:m].sum(dim=0)
    p = (prediction.coefficients[:, :, None] * step.columns).sum(dim=1)
    return float((p - T).square().sum() / T.square().sum().clamp(min=1e-12))


# ---------------------------------------------------------------- checks every predictor is put through


def run(predictor: Predictor, num_windows: int, *, seed: int = 0) -> tuple[list[float], list[float]]:
    """Relative squared errors and misses of the log loss, of predictions made before their future was seen."""
    found, misses, expected = [], [], math.nan
    for step in turning(predictor.spec, num_windows, seed=seed):
        if math.isfinite(expected):
            misses.append(abs(math.log(step.window.loss / expected)))
        predictor.observe(step.window)
        if predictor.ready:
            prediction = predictor.predict(step.window.num_steps)
            found.append(relative_error(step, prediction))
            expected = prediction.predicted_loss
    return found, misses


def errors(predictor: Predictor, num_windows: int, *, seed: int = 0) -> list[float]:
    """The first of :func:`run`."""
    return run(predictor, num_windows, seed=seed)[0]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def through_bytes(state: StateDict) -> StateDict:
    """Saved and loaded as a checkpoint does it, without pickle."""
    tree, tensors = encode(state)
    return decode(json.loads(json.dumps(tree, allow_nan=False)), load(save(tensors)))


def assert_same_prediction(a: Predictor, b: Predictor, horizon: int = 20) -> None:
    first, second = a.predict(horizon), b.predict(horizon)
    assert torch.equal(first.coefficients, second.coefficients)
    assert first.predicted_loss == second.predicted_loss
    assert (first.epistemic, first.aleatoric) == (second.epistemic, second.aleatoric)
    assert first.confidence == second.confidence


def assert_resumes_bitwise(make: Callable[[], Predictor], num_windows: int = 16) -> None:
    """Half, bytes, a fresh predictor, the other half: the same as in one go."""
    whole = make()
    windows = [step.window for step in turning(whole.spec, num_windows)]
    for window in windows:
        whole.observe(window)
    half, resumed = make(), make()
    for window in windows[: num_windows // 2]:
        half.observe(window)
    resumed.load_state_dict(through_bytes(half.state_dict()))
    for window in windows[num_windows // 2 :]:
        half.observe(window)  # a state that shares memory would be changed by this
        resumed.observe(window)
    assert_same_prediction(whole, resumed)


def assert_global_random_state_untouched(make: Callable[[], Predictor]) -> None:
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    predictor = make()
    for step in turning(predictor.spec, 10):
        predictor.observe(step.window)
    predictor.predict(20)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def assert_degenerate_windows_are_harmless(make: Callable[[], Predictor]) -> None:
    """Zero displacement, constant loss, NaN and infinite losses, negative losses, NaN products."""
    for name in ("still", "constant", "nan", "inf", "negative", "broken", "no_rate", "mixed"):
        predictor = make()
        for step in turning(predictor.spec, 12):
            window = step.window
            kind = ("still", "nan", "broken", "constant")[window.index % 4] if name == "mixed" else name
            p, zero = window.products, torch.zeros_like(window.products.BB)
            if kind == "still":
                hindsight = window.hindsight
                if hindsight is not None:
                    hindsight = Hindsight(BB=zero, BT=torch.zeros_like(p.Bg), TT=torch.zeros_like(p.gg))
                window = replace(window, products=replace(p, BB=zero, gg=torch.zeros_like(p.gg)), hindsight=hindsight)
            elif kind == "broken":
                window = replace(window, products=replace(p, BB=zero + math.nan, Bg=p.Bg + math.nan), hindsight=None)
            elif kind == "no_rate":
                window = replace(window, learning_rate=0.0, lr_integral=0.0, lr_ahead=0.0)
            else:
                loss = {"constant": 1.0, "nan": math.nan, "inf": math.inf, "negative": -3.0}[kind]
                window = replace(window, loss=loss, loss_slope=0.0 if kind == "constant" else window.loss_slope)
            predictor.observe(window)
            if predictor.ready:
                prediction = predictor.predict(25)
                assert bool(torch.isfinite(prediction.coefficients).all()), name
                assert 0 <= prediction.confidence <= 1, name
                assert prediction.predicted_reduction >= 0, name
