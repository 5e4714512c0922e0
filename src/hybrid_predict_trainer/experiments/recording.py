"""Recording the windows of a real run, and reading them back to try predictors on.

A recording is a directory with ``windows.json`` (structure and numbers) and ``windows.safetensors``
(inner products).  It holds no weights: whatever a prediction is worth follows from inner products.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..predictors import Predictor
from ..predictors._common import window_from_state, window_state
from ..records import BasisSpec, CheckpointError, Hindsight, PhasePrediction, Products, State, Window
from ..state_tree import decode, encode, read_tensors, write_tensors

#: Wide enough for every built-in predictor, with four windows to look ahead at eight columns.
WIDE = BasisSpec(num_displacements=16, lag=True, optimizer=True, curvature=True)


@dataclass(frozen=True, slots=True)
class Recording:
    """Windows of one run, oldest first, and the basis they were observed in."""

    spec: BasisSpec
    windows: tuple[Window, ...]

    def save(self, directory: str | Path) -> None:
        """Write the two files; the directory is made if need be."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        state = {"spec": asdict(self.spec), "windows": [window_state(w) for w in self.windows]}
        tree, tensors = encode(state)
        (path / "windows.json").write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")
        write_tensors(path / "windows.safetensors", tree, tensors)

    @classmethod
    def load(cls, directory: str | Path) -> Recording:
        """Inverse of :meth:`save`.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        path = Path(directory)
        try:
            tree = json.loads((path / "windows.json").read_text(encoding="utf-8"))
            state = decode(tree, read_tensors(path / "windows.safetensors"))
            windows = tuple(w for w in map(window_from_state, state["windows"]) if w is not None)
            return cls(BasisSpec(**state["spec"]), windows)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a readable recording: {error}") from error


class Recorder:
    """Wraps a predictor, asks for a wide basis and keeps every window: the hook for recording a run."""

    def __init__(self, inner: Predictor, spec: BasisSpec = WIDE) -> None:
        """Args: inner: what really predicts.  spec: the basis recorded; must hold what inner needs."""
        column_map(spec, inner.spec)
        self.inner, self.name, self.spec = inner, inner.name, spec
        self.windows: list[Window] = []

    @property
    def recording(self) -> Recording:
        """Everything observed so far."""
        return Recording(self.spec, tuple(self.windows))

    @property
    def ready(self) -> bool:
        """The inner predictor's."""
        return self.inner.ready

    def observe(self, window: Window) -> None:
        """Keep the window, pass on what the inner predictor asked for."""
        self.windows.append(window)
        self.inner.observe(narrow(window, self.spec, self.inner.spec))

    def predict(self, horizon: int) -> PhasePrediction:
        """The inner predictor's, on the wide basis."""
        prediction = self.inner.predict(horizon)
        columns = column_map(self.spec, self.inner.spec)

        def widened(c: Tensor) -> Tensor:
            wide = torch.zeros(c.shape[0], self.spec.num_columns, dtype=c.dtype)
            wide[:, columns] = c
            return wide

        return replace(
            prediction,
            coefficients=widened(prediction.coefficients),
            alternatives=tuple(widened(c) for c in prediction.alternatives),
        )

    def memory_bytes(self) -> int:
        """The inner predictor's: the record is not part of a normal run."""
        return self.inner.memory_bytes()

    def state_dict(self) -> State:
        """The inner predictor's, and the windows so far."""
        return {"inner": self.inner.state_dict(), "windows": [window_state(w) for w in self.windows]}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.inner.load_state_dict(state["inner"])
        self.windows = [w for w in map(window_from_state, state["windows"]) if w is not None]


def column_map(wide: BasisSpec, spec: BasisSpec) -> list[int]:
    """Where the columns of a basis stand in a wider one.

    Raises:
        ValueError: the wider one lacks a column.
    """
    missing = [name for name in spec.extras if name not in wide.extras]
    if missing or spec.num_displacements > wide.num_displacements or (spec.curvature and not wide.curvature):
        raise ValueError(f"the recorded basis {wide} lacks columns of {spec}")
    return [
        *range(spec.num_displacements),
        *(wide.num_displacements + wide.extras.index(name) for name in spec.extras),
    ]


def narrow(window: Window, wide: BasisSpec, spec: BasisSpec) -> Window:
    """The window as a run with a smaller basis would have seen it."""
    columns = torch.tensor(column_map(wide, spec))
    products, hindsight = window.products, window.hindsight

    def square(matrix: Tensor) -> Tensor:
        return matrix[:, columns][:, :, columns]

    BY, Bg = square(products.BY), products.Bg[:, columns]
    if not spec.curvature:
        BY, Bg = torch.zeros_like(BY), torch.zeros_like(Bg)
    if hindsight is not None:
        hindsight = Hindsight(BB=square(hindsight.BB), BT=hindsight.BT[:, columns], TT=hindsight.TT)
    return replace(
        window,
        num_columns=min(window.num_columns, spec.num_displacements),
        products=Products(BB=square(products.BB), BY=BY, Bg=Bg, gg=products.gg),
        hindsight=hindsight,
    )


def future_products(
    window: Window, ahead: Sequence[Window], wide: BasisSpec, spec: BasisSpec
) -> tuple[Tensor, Tensor, float] | None:
    """The displacement over the windows ahead, T, seen through the basis of ``window``.

    Returns:
        B'T (G, K), B'B (G, K, K) and T'T, or None if the recording does not hold them: across a jump,
        beyond the recorded columns, or for lag and optimizer columns more than one window ahead.
    """
    m, D = len(ahead), wide.num_displacements
    if any(w.jumped or w.hindsight is None for w in ahead) or m > D:
        return None
    columns = torch.tensor(column_map(wide, spec))
    gram = window.products.BB[:, columns][:, :, columns]
    total = float(ahead[-1].products.BB[:, :m, :m].sum())
    if m == 1:
        hindsight = ahead[0].hindsight
        assert hindsight is not None
        return hindsight.BT[:, columns], gram, total
    K = spec.num_displacements
    if spec.extras or K + m > D:
        return None
    # j windows later the column that was k-th is the (k + j)-th, the new displacement the first
    dots = sum((w.products.BB[:, 0, j : j + K] for j, w in enumerate(ahead, start=1)), torch.zeros(gram.shape[:2]))
    return dots, gram, total
