"""What predictions got wrong, with the state they were made in: extraction, storage, retrieval.

After a window the displacement T that really happened is known through the basis it was predicted
on.  Its best coefficients (ridge, shrunk to the *predicted* ones, so that a direction nothing was
learnt about has no residual) minus the predicted ones are the residual:

    c* = argmin_c  |T - sum_k c_k b_k|^2 + l2 |c - c_predicted|^2        r = c* - c_predicted

Letters: ``G`` groups, ``K`` columns, ``F`` features, ``C`` capacity, ``n`` residuals held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics.ridge import solve_ridge
from ..records import BasisSpec, Hindsight, PhasePrediction, Residual, StateDict

#: Capacities by size of the model (small, medium, large) and retrieval rule of the specification.
CAPACITIES = {"small": 100, "medium": 200, "large": 500}
SIMILARITY_THRESHOLD = 0.7
NUM_SIMILAR = 5


def hindsight_coefficients(hindsight: Hindsight, l2: float, prior: Tensor | None = None) -> Tensor:
    """(G, K) coefficients that would have hit the last displacement, ridge shrunk to ``prior``.

    Args:
        hindsight: The displacement through the earlier basis.
        l2: Strength relative to the mean squared length of a group's columns.
        prior: (G, K), zero if None.  A group whose columns are all zero keeps it.
    """
    G, K = hindsight.BT.shape
    start = torch.zeros(G, K, dtype=torch.float64) if prior is None else prior.double()
    rows = []
    for BB, BT, row in zip(hindsight.BB, hindsight.BT, start, strict=True):
        size = float(BB.diagonal().sum())
        # unit scale: solve_ridge has an absolute floor, late displacements are tiny
        rows.append(solve_ridge(BB / size, BT / size, l2, prior=row) if size > 0 else row)
    return torch.stack(rows)


def extract(
    hindsight: Hindsight, prediction: PhasePrediction, features: Tensor, loss: float, l2: float = 0.01
) -> Residual:
    """Residual of a prediction for exactly the window that has just closed.

    Args:
        hindsight: Of that window.
        prediction: Made at its beginning, for its number of steps.
        features: (F,) encoded state the prediction was made in.
        loss: Averaged loss at its end.
        l2: Ridge strength.
    """
    best = hindsight_coefficients(hindsight, l2, prediction.coefficients)
    return Residual(
        features=features,
        coefficients=best - prediction.coefficients.double(),
        loss=loss - prediction.predicted_loss,
        horizon=prediction.horizon,
    )


def growth(spec: BasisSpec, ratio: float) -> Tensor:
    """(K,) factors that take coefficients to a horizon ``ratio`` times as long.

    Drift grows; the lag x - theta is a correction of the starting point and does not.
    """
    factors = torch.full((spec.num_columns,), ratio, dtype=torch.float64)
    if spec.lag:
        factors[spec.num_displacements + spec.extras.index("lag")] = 1.0
    return factors


def cosine(features: Tensor, stored: Tensor) -> Tensor:
    """(n,) cosines of features (F,) with stored ones (n, F), after standardising with what is stored.

    Loss-curve features have means far from zero, which would make every pair look alike.  One stored
    entry has no spread and is compared as it is.  Zero vectors are similar to nothing.
    """
    query, rows = features.double(), stored.double()
    if len(rows) > 1:
        mean, std = rows.mean(dim=0), rows.std(dim=0)
        floor = 1e-3 * rows.square().mean(dim=0).sqrt() + 1e-12  # a constant feature says nothing
        query = ((query - mean) / torch.maximum(std, floor)).clamp(-5.0, 5.0)
        rows = ((rows - mean) / torch.maximum(std, floor)).clamp(-5.0, 5.0)
    lengths = rows.norm(dim=1) * query.norm()
    return torch.where(lengths > 0, rows @ query / lengths.clamp(min=1e-300), torch.zeros_like(lengths))


class ResidualStore:
    """Ring buffer of residuals, in float32, with retrieval by similarity of the state."""

    def __init__(self, capacity: int = CAPACITIES["medium"]) -> None:
        """Args: capacity: residuals kept; memory is taken with the first one."""
        if capacity < 1:
            raise ValueError(f"capacity = {capacity} is out of range: must be >= 1")
        self.capacity = capacity
        self._features = torch.zeros(0, 0)  # (C, F)
        self._coefficients = torch.zeros(0, 0, 0)  # (C, G, K)
        self._losses = torch.zeros(0, dtype=torch.float64)  # (C,)
        self._horizons = torch.zeros(0, dtype=torch.int64)  # (C,)
        self._next = 0
        self._count = 0

    def __len__(self) -> int:
        """Residuals held."""
        return self._count

    def add(self, residual: Residual) -> bool:
        """Keep a residual, over the oldest if full.

        Returns:
            False if it was left out because it is not finite.

        Raises:
            ValueError: its shapes differ from those held.
        """
        features, coefficients = residual.features.float(), residual.coefficients.float()
        loss = torch.tensor(residual.loss, dtype=torch.float64)
        if not all(bool(torch.isfinite(t).all()) for t in (features, coefficients, loss)):
            return False
        if not len(self._losses):
            self._features = torch.zeros(self.capacity, *features.shape)
            self._coefficients = torch.zeros(self.capacity, *coefficients.shape)
            self._losses = torch.zeros(self.capacity, dtype=torch.float64)
            self._horizons = torch.zeros(self.capacity, dtype=torch.int64)
        held = (self._features.shape[1:], self._coefficients.shape[1:])
        if held != (features.shape, coefficients.shape):
            got = (tuple(features.shape), tuple(coefficients.shape))
            raise ValueError(f"residual of shapes {got}, the store holds {tuple(tuple(s) for s in held)}")
        i = self._next
        self._features[i], self._coefficients[i] = features, coefficients
        self._losses[i], self._horizons[i] = loss, residual.horizon
        self._next = (i + 1) % self.capacity
        self._count = min(self._count + 1, self.capacity)
        return True

    def __getitem__(self, slot: int) -> Residual:
        """Residual of a slot of the ring."""
        if not 0 <= slot < self._count:
            raise IndexError(f"slot {slot} of {self._count}")
        return Residual(
            features=self._features[slot].clone(), coefficients=self._coefficients[slot].double(),
            loss=float(self._losses[slot]), horizon=int(self._horizons[slot]),
        )  # fmt: skip

    def find_similar(
        self, features: Tensor, *, threshold: float = SIMILARITY_THRESHOLD, limit: int = NUM_SIMILAR
    ) -> list[tuple[float, Residual]]:
        """(weight, residual) of the most similar states above the threshold, best first.

        Weights are similarities over their sum, so they sum to 1; an empty list if nothing is similar.
        """
        if not self._count:
            return []
        similarity = cosine(features, self._features[: self._count])
        values, slots = torch.topk(similarity, min(limit, self._count))
        chosen = values > threshold
        values, slots = values[chosen], slots[chosen]
        total = float(values.sum())
        return [(float(v) / total, self[int(i)]) for v, i in zip(values, slots, strict=True)]

    def memory_bytes(self) -> int:
        """Bytes held."""
        held = (self._features, self._coefficients, self._losses, self._horizons)
        return sum(t.numel() * t.element_size() for t in held)

    def state_dict(self) -> StateDict:
        """The filled slots and where the next residual goes."""
        n = self._count
        return {
            "features": self._features[:n].clone(), "coefficients": self._coefficients[:n].clone(),
            "losses": self._losses[:n].clone(), "horizons": self._horizons[:n].clone(), "next": self._next,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            ValueError: more residuals than this store has room for.
        """
        count = len(state["losses"])
        if count > self.capacity:
            raise ValueError(f"{count} residuals do not fit a store of {self.capacity}")

        def padded(name: str) -> Tensor:
            saved: Tensor = state[name]
            room = torch.zeros(self.capacity if count else 0, *saved.shape[1:], dtype=saved.dtype)
            room[:count] = saved
            return room

        self._features, self._coefficients = padded("features"), padded("coefficients")
        self._losses, self._horizons = padded("losses"), padded("horizons")
        self._next, self._count = state["next"], count
