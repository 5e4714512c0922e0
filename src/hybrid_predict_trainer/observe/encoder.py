"""Windows -> encoded state: what the learned predictors, the bandit and the residual store look at.

Only the small matrices of a :class:`~.records.Window` are touched, never a weight, so the cost does
not depend on the model.  Every number goes through symlog (DreamerV3, arXiv 2301.04104, eq. 1):
norms span decades, and a single one must not drown the others.

Letters: ``G`` parameter groups, ``K`` basis columns, ``F`` encoded features, ``S`` sketch size, ``X`` extras.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..records import BasisSpec, StateDict, Window
from .loss_features import NUM_LOSS_FEATURES

#: Numbers of the run as a whole, see :func:`_run_features`.
NUM_RUN_FEATURES = 10
#: Numbers per parameter group, see :func:`_group_features`.
NUM_GROUP_FEATURES = 10
#: A standardised feature beyond this means the run left what was seen: extrapolate no further.
MAX_DEVIATIONS = 5.0

_TINY = 1e-30  # keeps logarithms of vanished norms finite


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|); NaN becomes 0 and infinities the largest finite number."""
    x = torch.nan_to_num(x.double(), nan=0.0, posinf=1e300, neginf=-1e300)
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """Inverse of :func:`symlog`."""
    return x.sign() * x.abs().expm1()


def encoding_size(num_groups: int, sketch_size: int = 0, num_extras: int = 0) -> int:
    """F for G groups, a count sketch of S numbers and X more numbers."""
    return NUM_LOSS_FEATURES + 2 * NUM_RUN_FEATURES + NUM_GROUP_FEATURES * num_groups + num_extras + sketch_size


def encode(
    window: Window, spec: BasisSpec, previous: Sequence[Tensor] = (), *,
    sketch: Tensor | None = None, sketch_size: int = 0, extras: Tensor | None = None, num_extras: int = 0,
) -> Tensor:  # fmt: skip
    """Encode one window.

    Args:
        window: A closed window, degenerate or not.
        spec: The basis it was observed in: says which columns are displacements.
        previous: Encodings of earlier windows, oldest first; the last one gives the changes.
        sketch: (S,) count sketch of the newest displacement (:func:`.streaming.sketch_tensors`); only
            its direction is used.  None leaves the slot zero.
        sketch_size: S, fixed for a run.
        extras: (X,) more numbers, of Kronecker or low-rank factors say.  None leaves their slot zero.
        num_extras: X, fixed for a run.

    Returns:
        (F,) float32, in order: 32 loss features, 10 numbers of the run, their change since the
        previous window, 10 numbers per group, the extras, the sketch.
    """
    run = symlog(_run_features(window))
    start = NUM_LOSS_FEATURES
    before = previous[-1][start : start + NUM_RUN_FEATURES].double() if previous else run
    slot = torch.zeros(sketch_size, dtype=torch.float64)
    if sketch is not None and sketch_size:
        length = float(torch.linalg.vector_norm(sketch.double()))
        if 0 < length < math.inf:
            slot = sketch.double().cpu() / length
    parts = (
        symlog(window.features[:NUM_LOSS_FEATURES]),
        run,
        run - before,
        symlog(_group_features(window, spec)).reshape(-1),
        torch.zeros(num_extras, dtype=torch.float64) if extras is None else symlog(extras),
        slot,
    )
    return torch.cat(parts).float()


def _log(value: float) -> float:
    return math.log(value + _TINY) if 0 <= value < math.inf else 0.0


def _run_features(window: Window) -> Tensor:
    """(10,).

    Log loss, its relative slope, log gradient norm, log learning rate, the planned and the present rate
    against the window's, log window length, jump, log step, log displacement.
    """
    loss = window.loss if math.isfinite(window.loss) else 0.0
    total = float(window.products.BB[:, 0, 0].sum())
    values = [
        _log(loss) if loss > 0 else loss,
        window.loss_slope * window.num_steps / max(abs(loss), _TINY),
        _log(window.gradient_norm),
        _log(window.learning_rate),
        _log(window.lr_ahead) - _log(window.lr_integral),
        _log(window.learning_rate * window.num_steps) - _log(window.lr_integral),
        math.log(max(window.num_steps, 1)),
        float(window.jumped),
        math.log1p(max(window.step, 0)),
        0.5 * _log(total),
    ]
    return torch.tensor(values, dtype=torch.float64)


def _group_features(window: Window, spec: BasisSpec) -> Tensor:
    """(G, 10) per group.

    Log RMS of the newest displacement, log ratio to the two before it, cosines (0,1), (0,2), (1,2)
    between those three, log RMS of the gradient, cosine of gradient and displacement, and the lengths
    of the lag and optimizer columns against the displacement (0 where the basis has none).
    """
    products = window.products
    BB = torch.nan_to_num(products.BB)
    G = BB.shape[0]
    sizes = torch.tensor(window.group_sizes, dtype=torch.float64).clamp(min=1)
    squared = BB.diagonal(dim1=1, dim2=2).clamp(min=0)  # (G, K)
    logs = 0.5 * (squared + _TINY).log()
    lengths = squared.sqrt()

    def cosine(i: int, j: int) -> Tensor:
        scale = lengths[:, i] * lengths[:, j]
        return torch.where(scale > 0, BB[:, i, j] / scale.clamp(min=1e-300), torch.zeros_like(scale))

    zero = torch.zeros(G, dtype=torch.float64)

    def ratio(i: int) -> Tensor:
        known = (squared[:, 0] > 0) & (squared[:, i] > 0)
        return torch.where(known, logs[:, 0] - logs[:, i], zero)

    last = min(spec.num_displacements, BB.shape[1]) - 1
    first, second = min(1, last), min(2, last)
    gg = torch.nan_to_num(products.gg).clamp(min=0)
    along = lengths[:, 0] * gg.sqrt()
    gradient = torch.where(along > 0, torch.nan_to_num(products.Bg[:, 0]) / along.clamp(min=1e-300), zero)
    extras = {name: ratio(spec.first_extra + i) for i, name in enumerate(spec.extras)}
    columns = [
        logs[:, 0] - 0.5 * sizes.log(),
        ratio(first),
        ratio(second),
        cosine(0, first),
        cosine(0, second),
        cosine(first, second),
        0.5 * ((gg + _TINY).log() - sizes.log()),
        gradient,
        extras.get("lag", zero),
        extras.get("optimizer", zero),
    ]
    return torch.stack(columns, dim=1)


class Encoder:
    """:func:`encode` with its memory: the previous encoding and running moments to standardise with."""

    def __init__(self, num_groups: int, spec: BasisSpec, sketch_size: int = 0, num_extras: int = 0) -> None:
        """Args: num_groups: G.  spec: columns of the basis.  sketch_size: S, 0 for none.  num_extras: X."""
        self.spec, self.sketch_size, self.num_extras = spec, sketch_size, num_extras
        self.num_features = encoding_size(num_groups, sketch_size, num_extras)
        self._previous: Tensor | None = None
        self._count = 0
        self._mean = torch.zeros(self.num_features, dtype=torch.float64)
        self._m2 = torch.zeros(self.num_features, dtype=torch.float64)

    def observe(self, window: Window, sketch: Tensor | None = None, extras: Tensor | None = None) -> Tensor:
        """(F,) encoding of the next window; its moments are updated (Welford)."""
        previous = () if self._previous is None else (self._previous,)
        encoding = encode(
            window, self.spec, previous,
            sketch=sketch, sketch_size=self.sketch_size, extras=extras, num_extras=self.num_extras,
        )  # fmt: skip
        self._previous = encoding
        self._count += 1
        delta = encoding.double() - self._mean
        self._mean = self._mean + delta / self._count
        self._m2 = self._m2 + delta * (encoding.double() - self._mean)
        return encoding

    def standardise(self, encodings: Tensor) -> Tensor:
        """(..., F) -> the same in deviations from the run so far, clipped; constant features become 0."""
        std = (self._m2 / max(self._count - 1, 1)).sqrt()
        scale = torch.where(std > 1e-6, 1 / std.clamp(min=1e-6), torch.zeros_like(std))
        return ((encodings.double() - self._mean) * scale).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS).float()

    def memory_bytes(self) -> int:
        """Bytes of the moments and the previous encoding."""
        return 20 * self.num_features

    def state_dict(self) -> StateDict:
        """Moments and the previous encoding."""
        return {"previous": self._previous, "count": self._count, "mean": self._mean, "m2": self._m2}

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self._previous = None if state["previous"] is None else state["previous"].clone()
        self._count, self._mean, self._m2 = state["count"], state["mean"].clone(), state["m2"].clone()
