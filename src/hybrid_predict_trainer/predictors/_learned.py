"""What the learned predictors share: targets, a closed-form base and a replay.

What a network learns is only the residual of a closed-form base: per window ahead a ridge on all
columns whose prior is ``hold``.  Base and correction are each trusted as far as past ones explained
what they were to explain.

Letters: ``G`` groups, ``K`` columns, ``J`` windows ahead, ``F`` encoded features, ``C`` capacity of
the replay.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..observe.encoder import Encoder
from ..observe.window import window_from_state, window_state
from ..records import BasisSpec, StateDict, Window
from ._frame import MAX_AHEAD, Frame, drift_rates, known_targets

#: Targets beyond this multiple of the last displacement are outliers (a step on a spike).
MAX_TARGET = 3.0
#: Weight of a window one window later in the base and in the record of errors.
FORGETTING = 0.95
#: The same in the trust in the base, which must fall fast when the base goes wrong.
TRUST_FORGETTING = 0.9
#: Strength of the base's prior, relative to the mean diagonal of its system.
BASE_L2 = 1e-3
#: Weight of the all-groups base against one group's own data.
SHRINKAGE = 0.5
#: Squared relative miss below which a prediction counts as exact; arbitrary, a tenth of a percent.
MIN_MISS = 1e-6
#: Numbers of the planned learning rate given to a transition model as its action.
NUM_ACTIONS = 2


def log_change(before: float, after: float) -> float:
    """Change of the log loss; of the loss relative to its size where it is not positive.  NaN if unknown."""
    if not (math.isfinite(before) and math.isfinite(after)):
        return math.nan
    if min(before, after) > 0:
        return max(min(math.log(after / before), 5.0), -5.0)
    return max(min((after - before) / max(abs(before), abs(after), 1e-300), 5.0), -5.0)


def changed_loss(loss: float, change: float) -> float:
    """Inverse of :func:`log_change` in its second argument."""
    change = max(min(change, 5.0), -5.0)
    return loss * math.exp(change) if loss > 0 else loss + change * abs(loss)


@dataclass(slots=True)
class Pending:
    """A past window whose future is still being observed."""

    slot: int
    frame: Frame
    gram: Tensor  # (G, K, K)
    rates: Tensor  # (J,)
    loss: float
    raw: Tensor  # (J, G, K) base in the frame, per unit of planned drift
    base: Tensor  # (J, G, K) the same, as far as it was trusted
    corrections: Tensor | None = None  # (J, G, K) what was to be added to the base
    change: float = 0.0  # of the log loss predicted one window ahead


class Experience:
    """Everything observed, as tensors to train on.  Rows are windows; see the field comments."""

    def __init__(self, num_groups: int, spec: BasisSpec, capacity: int) -> None:
        """Args: num_groups: G.  spec: displacement columns come first.  capacity: C."""
        G, K, J = num_groups, spec.num_columns, MAX_AHEAD
        self.spec, self.capacity = spec, capacity
        self.encoder = Encoder(num_groups, spec)
        F = self.encoder.num_features
        self.known = known_targets(spec)
        self.count = 0  # windows so far; row = index % C
        self.encodings = torch.zeros(capacity, F)
        self.actions = torch.zeros(capacity, NUM_ACTIONS)
        self.residuals = torch.zeros(capacity, J, G, K)  # what the base left, per unit of planned drift
        self.beyond = torch.zeros(capacity, J, G)  # squared length outside the frame, per unit of planned drift
        self.shares = torch.zeros(capacity, J, G)  # of each group in the squared displacement; 0: not known
        self.changes = torch.full((capacity, J), math.nan)  # of the log loss, in total
        self.base = torch.zeros(J, G, K, dtype=torch.float64)  # of the last window, like Pending.base
        self._A = torch.zeros(J, G, K, K, dtype=torch.float64)
        self._b = torch.zeros(J, G, K, dtype=torch.float64)
        self.change_base = torch.zeros(J, dtype=torch.float64)
        self.change_scale = torch.zeros(J, dtype=torch.float64)  # mean square
        self._change_weight = torch.zeros(J, dtype=torch.float64)
        self.miss_base = torch.ones(J, G, dtype=torch.float64)  # forgotten mean of the base's squared misses
        self._miss_weight = torch.zeros(J, dtype=torch.float64)
        self.window: Window | None = None
        self.frame: Frame | None = None
        self.rates = torch.ones(J, dtype=torch.float64)
        self._pending: deque[Pending] = deque(maxlen=J)
        self._lr_before = 0.0
        # forgotten sums over |T|^2 of base . T and |base|^2; hold is believed until windows say otherwise
        self._agreed = torch.full((J,), 0.5, dtype=torch.float64)
        self._based = torch.full((J,), 0.5, dtype=torch.float64)
        self._left = torch.zeros(J, dtype=torch.float64)  # of (T - base) . correction
        self._gained = torch.zeros(J, dtype=torch.float64)  # of |correction|^2
        self.error = 1.0  # prequential |T - p|^2 / |T|^2 one window ahead, forgotten mean
        self.base_error = 1.0  # the same of the base alone
        self.loss_error = 0.0  # prequential mean square of the log loss change
        self._num_errors = self._num_changes = 0

    @property
    def num_targets(self) -> int:
        """Windows whose next displacement is known."""
        return int((self.shares[: self.count, 0].sum(dim=1) > 0).sum())

    @property
    def change_std(self) -> Tensor:
        """(J,) standard deviation of the changes of the log loss."""
        return (self.change_scale - self.change_base.square()).clamp(min=1e-12).sqrt()

    @property
    def trust(self) -> Tensor:
        """(J,) least-squares multiple of past corrections, in [0, 1]; 0 until one was scored."""
        return _share(self._left, self._gained)

    @property
    def base_trust(self) -> Tensor:
        """(J,) the same for past bases: a ridge on few windows promises too much."""
        return _share(self._agreed, self._based)

    def observe(self, window: Window) -> None:
        """Fill in what earlier windows were waiting for, then add this one."""
        finite = bool(torch.isfinite(window.products.BB).all())
        if window.jumped or not finite:
            self._pending.clear()
        for ahead, past in enumerate(reversed(self._pending)):
            self._fill(past, ahead, window)
        slot = self.count % self.capacity
        self.encodings[slot] = self.encoder.observe(window)
        self.rates = drift_rates(self._lr_before, window)
        # what drives the step to the next window, as far as it is planned
        self.actions[slot] = torch.stack([self.rates[0].log1p(), self.rates[1].log1p()]).float()
        self.residuals[slot], self.beyond[slot], self.shares[slot], self.changes[slot] = 0.0, 0.0, 0.0, math.nan
        self.count += 1
        self._lr_before = window.lr_integral
        self.window = window
        self.frame = Frame.of(window.products.BB) if finite else None
        if self.frame is not None and window.num_columns > 0:
            raw = self.frame.express(self._base_coefficients()).clamp(-MAX_TARGET, MAX_TARGET)
            raw = raw * self.known[:, None, :]
            self.base = self.base_trust[:, None, None] * raw
            past = Pending(slot, self.frame, window.products.BB, self.rates, window.loss, raw, self.base)
            self._pending.append(past)
        else:
            self._pending.clear()

    def _base_coefficients(self) -> Tensor:
        """(J, G, K) ridge per window ahead and group, shrunk to all groups and, all groups, to ``hold``."""
        K = self.spec.num_columns
        eye = torch.eye(K, dtype=torch.float64)
        hold = torch.zeros(K, dtype=torch.float64)
        hold[0] = 1.0
        total, right = self._A.sum(dim=1), self._b.sum(dim=1)
        # normalised columns, so that the prior weighs the same for long and short ones
        scale = _scale(total)
        total = scale[:, :, None] * total * scale[:, None, :]
        ridge = (BASE_L2 * total.diagonal(dim1=1, dim2=2).mean(dim=1) + 1e-12)[:, None]
        prior = torch.where(scale > 0, hold / scale.clamp(min=1e-300), torch.zeros_like(scale))
        shared = torch.linalg.solve(total + ridge[:, :, None] * eye, scale * right + ridge * prior)
        A = scale[:, None, :, None] * self._A * scale[:, None, None, :]
        trace = A.diagonal(dim1=2, dim2=3).sum(dim=2)
        kappa = SHRINKAGE * trace / trace.sum(dim=1, keepdim=True).clamp(min=1e-300)
        A = A + kappa[:, :, None, None] * total[:, None] + ridge[:, :, None, None] * eye
        b = scale[:, None, :] * self._b + kappa[:, :, None] * (total @ shared[:, :, None])[:, None, :, 0]
        c = torch.linalg.solve(A, b + ridge[:, :, None] * shared[:, None, :]) * scale[:, None, :]
        unseen = (right.abs().sum(dim=1) == 0)[:, None, None]
        return torch.nan_to_num(torch.where(unseen, hold, c))

    def expect(self, corrections: Tensor, change: float) -> None:
        """Note the corrections (J, G, K), and the log loss change one window ahead, to be scored."""
        if self._pending:
            self._pending[-1].corrections = corrections.double() * self.known[:, None, :]
            self._pending[-1].change = change

    def _fill(self, past: Pending, ahead: int, window: Window) -> None:
        self._fill_change(past, ahead, window)
        BB = window.products.BB
        squared = BB[:, 0, 0]
        total = float(squared.sum())
        if not total > 0:
            return
        dots = torch.zeros_like(past.gram[:, :, 0])
        if ahead > 0:
            held = self.spec.num_displacements - 1 - ahead
            dots[:, :held] = BB[:, 0, ahead + 1 : self.spec.num_displacements]
        elif window.hindsight is not None and bool(torch.isfinite(window.hindsight.BT).all()):
            dots = window.hindsight.BT
        else:
            return
        rate = float(past.rates[ahead].clamp(min=1e-3))
        target = past.frame.project(dots) * self.known[ahead] / rate
        self._score(past, ahead, target * rate, total)
        residual = (target - past.base[ahead]).clamp(-MAX_TARGET, MAX_TARGET)
        self.residuals[past.slot, ahead] = residual.float()
        whole = squared / (past.frame.length.clamp(min=1e-150) * rate).square()
        beyond = (whole - target.square().sum(dim=1)).clamp(0.0, MAX_TARGET**2)
        self.beyond[past.slot, ahead] = beyond.float()
        self._miss_weight[ahead] = FORGETTING * self._miss_weight[ahead] + 1
        missed = (residual.square().sum(dim=1) + beyond).clamp(min=MIN_MISS)
        self.miss_base[ahead] += (missed - self.miss_base[ahead]) / self._miss_weight[ahead]
        self.shares[past.slot, ahead] = (squared / total * (past.frame.length > 0)).float()
        known = self.known[ahead].double()
        # every window counts the same
        gram = past.gram * known[:, None] * known / total
        self._A[ahead] = FORGETTING * self._A[ahead] + gram
        self._b[ahead] = FORGETTING * self._b[ahead] + dots * known / (rate * total)

    def _fill_change(self, past: Pending, ahead: int, window: Window) -> None:
        change = log_change(past.loss, window.loss)
        if math.isfinite(past.loss) and not math.isfinite(window.loss):
            change = math.inf  # diverged: nothing to regress on, but it happened
        self.changes[past.slot, ahead] = change
        if not math.isfinite(change):
            return
        if ahead == 0:
            self._num_changes += 1
            self.loss_error += ((change - past.change) ** 2 - self.loss_error) / min(self._num_changes, 20)
        self._change_weight[ahead] = FORGETTING * self._change_weight[ahead] + 1
        share = 1 / self._change_weight[ahead]
        self.change_base[ahead] += share * (change - self.change_base[ahead])
        self.change_scale[ahead] += share * (change * change - self.change_scale[ahead])

    def _score(self, past: Pending, ahead: int, target: Tensor, total: float) -> None:
        """|T - p|^2 = |T|^2 - 2 p.T + |p|^2 in the (nearly orthonormal) frame, relative to |T|^2."""
        area = past.frame.length.square()[:, None] / total
        base = past.base[ahead] * past.rates[ahead]
        correction = torch.zeros_like(base)
        if past.corrections is not None:
            correction = past.corrections[ahead] * past.rates[ahead]
        if ahead == 0:
            self._num_errors += 1
            weight = 1 / min(self._num_errors, 20)
            for name, p in (("error", base + self.trust[0] * correction), ("base_error", base)):
                error = 1 + float((area * (p * p - 2 * p * target)).sum())
                setattr(self, name, getattr(self, name) + weight * (min(max(error, 0.0), 4.0) - getattr(self, name)))
        left, gained = (area * (target - base) * correction).sum(), (area * correction * correction).sum()
        raw = past.raw[ahead] * past.rates[ahead]
        agreed, based = (area * target * raw).sum(), (area * raw * raw).sum()
        bound = based.clamp(min=1.0)  # a wild one counts as one window, not as fifty
        self._agreed[ahead] = TRUST_FORGETTING * self._agreed[ahead] + agreed / bound
        self._based[ahead] = TRUST_FORGETTING * self._based[ahead] + based / bound
        self._left[ahead] = FORGETTING * self._left[ahead] + left
        self._gained[ahead] = FORGETTING * self._gained[ahead] + gained

    @property
    def explained(self) -> float:
        """Share of displacement the last predictions explained before they were learnt from, in [0, 1]."""
        return min(max(1 - self.error, 0.0), 1.0) if self._num_errors else 0.0

    def memory_bytes(self) -> int:
        """Bytes of the replay and the statistics."""
        rows: list[Tensor] = [getattr(self, name) for name in self._ROWS]
        tensors = (*rows, self.base, self._A, self._b)
        return sum(t.numel() * t.element_size() for t in tensors) + self.encoder.memory_bytes()

    # ---- state ---------------------------------------------------------------------------------

    _TENSORS = (
        "base", "_A", "_b", "change_base", "change_scale", "_change_weight", "miss_base", "_miss_weight", "rates",
        "_left", "_gained", "_agreed", "_based",
    )  # fmt: skip
    _ROWS = ("encodings", "actions", "residuals", "beyond", "shares", "changes")
    _NUMBERS = (
        "count", "_lr_before", "error", "base_error", "loss_error", "_num_errors", "_num_changes",
    )  # fmt: skip

    def state_dict(self) -> StateDict:
        """Filled rows and everything else."""
        filled = min(self.count, self.capacity)
        return {
            "tensors": {name: getattr(self, name) for name in self._TENSORS},
            "rows": {name: getattr(self, name)[:filled] for name in self._ROWS},
            "numbers": {name: getattr(self, name) for name in self._NUMBERS},
            "encoder": self.encoder.state_dict(),
            "window": window_state(self.window),
            "pending": [
                {
                    "slot": p.slot, "gram": p.gram, "rates": p.rates, "loss": p.loss, "raw": p.raw, "base": p.base,
                    "corrections": p.corrections, "change": p.change,
                }
                for p in self._pending
            ],
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        for name in self._TENSORS:
            setattr(self, name, state["tensors"][name].clone())
        for name in self._ROWS:
            rows = state["rows"][name]
            getattr(self, name)[: len(rows)] = rows
        for name in self._NUMBERS:
            setattr(self, name, state["numbers"][name])
        self.encoder.load_state_dict(state["encoder"])
        self.window = window_from_state(state["window"])
        self._pending.clear()
        for p in state["pending"]:
            corrections = None if p["corrections"] is None else p["corrections"].clone()
            tensors = {name: p[name].clone() for name in ("gram", "rates", "raw", "base")}
            self._pending.append(
                Pending(slot=p["slot"], frame=Frame.of(p["gram"]), loss=p["loss"], corrections=corrections,
                        change=p["change"], **tensors)
            )  # fmt: skip
        self.frame = None
        if self.window is not None and bool(torch.isfinite(self.window.products.BB).all()):
            self.frame = Frame.of(self.window.products.BB)


def _share(cross: Tensor, squared: Tensor) -> Tensor:
    """Least-squares multiple cross / squared in [0, 1], 0 where nothing is known."""
    return torch.where(squared > 0, (cross / squared.clamp(min=1e-300)).clamp(0.0, 1.0), torch.zeros_like(cross))


def _scale(A: Tensor) -> Tensor:
    """(..., K, K) -> (..., K) inverse roots of the diagonal, 0 where it is 0."""
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    return torch.where(diagonal > 0, diagonal.clamp(min=1e-300).rsqrt(), torch.zeros_like(diagonal))


def initialised(generator: torch.Generator, module: nn.Module) -> None:
    """Draw every weight of a module anew from a generator, the global random state untouched.

    Matrices uniform with variance 1 / fan-in (torch's own bound for Linear), vectors zero.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                bound = math.sqrt(3 / parameter[0].numel())
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
            else:
                parameter.zero_()
        for part in module.modules():
            if isinstance(part, nn.RMSNorm):
                part.reset_parameters()  # ones
