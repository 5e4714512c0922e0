"""Recording the windows of a real run, and reading them back to try predictors on.

A recording is a directory with ``windows.json`` (structure and numbers) and ``windows.safetensors``
(inner products).  It holds no weights: whatever a prediction is worth follows from inner products.

A displacement column is still in the Gram matrices of later windows, one place older in each.  The extra
columns (lag, optimizer, gradient) are not: they are overwritten at every close, so while recording their
last :data:`MAX_AHEAD` versions are kept and multiplied with every new displacement.

Letters: ``G`` groups, ``K`` columns, ``E`` extra columns, ``J`` windows ahead.
"""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...config.settings import FOR_EXACT, HybridTrainerConfig, PredictorConfig
from ...keep.state_tree import decode, encode, read_tensors, write_tensors
from ...observe.basis import Basis
from ...observe.window import window_from_state, window_state
from ...predictors import Paced, Predictor
from ...predictors._frame import MAX_AHEAD
from ...records import BasisSpec, CheckpointError, ConfigError, Hindsight, PhasePrediction, Products, StateDict, Window
from ...safe_files import read_json, write_text
from ...weights.algebra import Tensors
from ...weights.products import paired_dots

#: Wide enough for every built-in predictor: the secant model's 16 displacements and as many more as windows are
#: looked ahead.  With the extra columns kept, 35 copies of the weights.
WIDE = BasisSpec(num_displacements=16 + MAX_AHEAD, lag=True, optimizer=True, gradient=True, curvature=True)
#: Windows kept, the last ones: some 0.1 MB each at ten groups.
MAX_WINDOWS = 2000
#: Full steps a plain recorded run is forced to take: more than any run has.
FOR_EVER = 10**9


@dataclass(frozen=True, slots=True)
class Recording:
    """Windows of one run, oldest first, and the basis they were observed in."""

    spec: BasisSpec
    windows: tuple[Window, ...]
    #: Per window (J, G, E): inner products of its extra columns with the j-th displacement after it; NaN unknown.
    extras_ahead: tuple[Tensor, ...] = ()

    def save(self, directory: str | Path) -> None:
        """Write the two files; the directory is made if need be."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        state = {
            "spec": asdict(self.spec), "windows": [window_state(w) for w in self.windows],
            "extras_ahead": list(self.extras_ahead),
        }  # fmt: skip
        tree, tensors = encode(state)
        write_text(path / "windows.json", json.dumps(tree, allow_nan=False))
        write_tensors(path / "windows.safetensors", tree, tensors)

    @classmethod
    def load(cls, directory: str | Path) -> Recording:
        """Inverse of :meth:`save`.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        path = Path(directory)
        try:
            tree = read_json(path / "windows.json")
            state = decode(tree, read_tensors(path / "windows.safetensors"))
            windows = tuple(w for w in map(window_from_state, state["windows"]) if w is not None)
            return cls(BasisSpec(**state["spec"]), windows, tuple(state["extras_ahead"]))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a readable recording: {error}") from error


class Recorder:
    """Wraps a predictor, asks for a wide basis and keeps every window: the hook for recording a run."""

    wants_encoding = True  # whoever is replayed may

    def __init__(self, inner: Predictor, spec: BasisSpec = WIDE) -> None:
        """Args: inner: what really predicts.  spec: the basis recorded; must hold what inner needs."""
        column_map(spec, inner.spec)
        self.inner, self.name, self.spec = inner, inner.name, spec
        self.windows: deque[Window] = deque(maxlen=MAX_WINDOWS)
        self._ahead: deque[Tensor] = deque(maxlen=MAX_WINDOWS)  # (J, G, E) per window
        self._basis: Basis | None = None
        self._extras: deque[list[Tensors]] = deque(maxlen=MAX_AHEAD)  # of the last windows, one list per column

    def attach(self, basis: Basis) -> None:
        """Read the columns from here; without it extra columns can be scored one window ahead only."""
        self._basis = basis

    @property
    def recording(self) -> Recording:
        """Everything observed so far."""
        return Recording(self.spec, tuple(self.windows), tuple(self._ahead))

    @property
    def ready(self) -> bool:
        """The inner predictor's."""
        return self.inner.ready

    def observe(self, window: Window) -> None:
        """Keep the window, pass on what the inner predictor asked for."""
        self.windows.append(window)
        shape = (MAX_AHEAD, window.products.num_groups, len(self.spec.extras))
        self._ahead.append(torch.full(shape, math.nan, dtype=torch.float64))
        if self._basis is not None:
            self._look_back(self._basis, window)
        self.inner.observe(narrow(window, self.spec, self.inner.spec))

    def _look_back(self, basis: Basis, window: Window) -> None:
        """Multiply the newest displacement with the extra columns of the windows before, then keep the present ones."""
        if window.jumped or window.hindsight is None:
            self._extras.clear()
        if window.num_columns == 0:
            return
        shape, index = (basis.groups.num_groups, self.spec.num_columns), torch.tensor(basis.groups.index)

        def column(k: int) -> Tensors:
            unit = torch.zeros(shape, dtype=torch.float64)
            unit[:, k] = 1.0
            return list(basis.combine(unit))

        newest = column(0)
        for j, extras in enumerate(reversed(self._extras)):
            for e, column_then in enumerate(extras):
                earlier = [t.to(n.device) for t, n in zip(column_then, newest, strict=True)]  # on the host if resumed
                dots = torch.zeros(shape[0], dtype=torch.float64).index_add_(0, index, paired_dots(earlier, newest))
                self._ahead[-2 - j][j, :, e] = dots
        self._extras.append([column(k) for k in range(self.spec.num_displacements, self.spec.num_columns)])

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

    @property
    def update_every(self) -> int:
        """The inner predictor's."""
        return self.inner.update_every if isinstance(self.inner, Paced) else 1

    def pace(self, window_seconds: float) -> None:
        """Passed on to an inner predictor that trains."""
        if isinstance(self.inner, Paced):
            self.inner.pace(window_seconds)

    def memory_bytes(self) -> int:
        """The inner predictor's: the record is not part of a normal run."""
        return self.inner.memory_bytes()

    def state_dict(self) -> StateDict:
        """The inner predictor's, the windows so far and the columns that are still looked at."""
        return {
            "inner": self.inner.state_dict(), "windows": [window_state(w) for w in self.windows],
            "ahead": list(self._ahead), "extras": [list(extras) for extras in self._extras],
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.inner.load_state_dict(state["inner"])
        windows = (w for w in map(window_from_state, state["windows"]) if w is not None)
        self.windows = deque(windows, maxlen=MAX_WINDOWS)
        self._ahead = deque((t.clone() for t in state["ahead"]), maxlen=MAX_WINDOWS)
        self._extras = deque(([list(c) for c in extras] for extras in state["extras"]), maxlen=MAX_AHEAD)


def recording_settings(config: HybridTrainerConfig, *, plain: bool) -> HybridTrainerConfig:
    """Settings of a recorded run: every window observed; a plain one follows real steps and nothing moves it.

    What watching costs would let the schedule of the cost clock run ahead of the plain loop's.

    Raises:
        ConfigError: the predictor lives on columns that are not recorded.
    """
    config = replace(config, predictor=replace(config.predictor, rest_windows=0))
    if config.predictor_type in FOR_EXACT:
        if not plain:
            raise ConfigError(
                f"--record keeps displacements, and not what {config.predictor_type} goes by: "
                "add --predictor secant, or --plain"
            )
        usual = PredictorConfig()
        config = replace(
            config, predictor_type="secant", predictor=replace(config.predictor, window=usual.window)
        )  # fmt: skip
    if not plain:
        return config
    still = replace(config.lookahead, extrapolation=0.0, damping=0.0)
    return replace(config, clock="credited", max_lr_multiplier=1.0, recipe="off", lookahead=still)


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
    recording: Recording, t: int, num_windows: int, spec: BasisSpec
) -> tuple[Tensor, Tensor, float] | None:
    """The displacement over the windows after ``t``, T, seen through the basis of window ``t``.

    Args:
        recording: Of a run.
        t: Position in ``recording.windows``.
        num_windows: m, how far ahead.
        spec: Columns wanted, part of the recorded ones.

    Returns:
        B'T (G, K), B'B (G, K, K) and T'T, or None if the recording does not hold them: beyond its end, across
        a jump, or beyond the recorded columns.
    """
    wide, window, D, K = recording.spec, recording.windows[t], recording.spec.num_displacements, spec.num_displacements
    ahead = recording.windows[t + 1 : t + 1 + num_windows]
    if len(ahead) < num_windows or num_windows > D or any(w.jumped or w.hindsight is None for w in ahead):
        return None
    columns = torch.tensor(column_map(wide, spec))
    gram = window.products.BB[:, columns][:, :, columns]
    total = float(ahead[-1].products.BB[:, :num_windows, :num_windows].sum())
    hindsight = ahead[0].hindsight
    assert hindsight is not None
    if num_windows == 1:
        return hindsight.BT[:, columns], gram, total
    if K + num_windows > D:
        return None
    # j windows later the column that was k-th is the (k + j)-th, the new displacement the first
    parts = [w.products.BB[:, 0, j : j + K] for j, w in enumerate(ahead, start=1)]
    dots = torch.stack(parts).sum(dim=0)
    if spec.extras:
        if num_windows > MAX_AHEAD or not recording.extras_ahead:
            return None
        chosen = [wide.extras.index(name) for name in spec.extras]
        extras = recording.extras_ahead[t][:num_windows, :, chosen].sum(dim=0)
        if not bool(torch.isfinite(extras).all()):
            return None
        dots = torch.cat([dots, extras], dim=1)
    return dots, gram, total


def best_coefficients(dots: Tensor, gram: Tensor) -> Tensor:
    """(G, K) coefficients argmin |T - sum_k c_k b_k|^2 per group: what hindsight would have answered.

    Args:
        dots: B'T (G, K).
        gram: B'B (G, K, K); directions shorter than a millionth (squared) of the longest are rounding noise.
    """
    squared = gram.diagonal(dim1=1, dim2=2).clamp(min=0)
    inverse = torch.where(squared > 0, squared.clamp(min=1e-300).rsqrt(), torch.zeros_like(squared))
    normal = inverse[:, :, None] * gram * inverse[:, None, :]
    c: Tensor = torch.linalg.pinv(normal, hermitian=True, rtol=1e-6) @ (inverse * dots)[:, :, None]
    return c[:, :, 0] * inverse
