"""What a run watches besides the basis: the encoded state, factors of displacement and curvature, gradient health.

One object per run, asked for by the predictor (``wants_encoding``) or by ``[encoder]``.  Where nothing
is asked for, :class:`NullObserver` stands in its place and nothing is kept.  Hooks are on the model only
during the last step of a window, and gather only in the backward pass of its loss.

Letters: ``G`` groups, ``F`` encoded features, ``D`` latent dimensions, ``R`` rank, ``X`` extra numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..config.settings import EncoderConfig
from ..cost import PASS_UNITS
from ..numerics.streaming import CountSketch, LowRankFactors, StreamingPca
from ..records import BasisSpec, CheckpointError, StateDict, Window
from ..weights.parameters import Groups
from . import gradient_health as health
from .basis import Basis
from .encoder import Encoder
from .history import History
from .kfac import KfacFactors

#: Encoded windows that enter the principal directions together: one decomposition of some 100 x 300
#: numbers takes milliseconds, and is not worth one per window.
PCA_BLOCK = 16
#: Numbers per group from Kronecker factors: logs of mean squared input and of squared output gradient,
#: and of how many eigenvalues share each.
NUM_KFAC_FEATURES = 4
#: Passes over the weights of one power iteration with error feedback: two products, the rest, the sum.
LOW_RANK_PASSES = 8

_TINY = 1e-30  # keeps logarithms of vanished factors finite


class Observer(Protocol):
    """What the steps of the cycle and the recorder ask of it."""

    def watching(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a real step; ``last`` if it closes a window."""

    def before_backward(self) -> None:
        """The backward pass of the loss comes next."""

    def after_backward(self, history: History, *, usable: bool) -> None:
        """Gradients are there, unscaled and not yet clipped; ``usable`` if the step will be taken."""

    def complete(self, window: Window, basis: Basis) -> Window:
        """The window with its encoding."""

    def new_health(self) -> dict[str, Any] | None:
        """The health report of the window that has just closed, if there is one."""

    @property
    def passes(self) -> float:
        """Cost per window in passes over the weights."""

    def summary(self) -> dict[str, Any]:
        """``encoder`` and ``health`` for the run's summary, as far as there are any."""

    def memory_bytes(self) -> int:
        """Bytes held."""

    def state_dict(self) -> StateDict:
        """Everything learnt."""

    def check_state(self, state: StateDict) -> None:
        """Raise if the state is one that :meth:`load_state_dict` cannot take."""

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""


class NullObserver:
    """Watches nothing."""

    passes = 0.0
    _nothing = nullcontext()

    def watching(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing around it."""
        return self._nothing

    def before_backward(self) -> None:
        """Nothing to do."""

    def after_backward(self, history: History, *, usable: bool) -> None:
        """Nothing to do."""

    def complete(self, window: Window, basis: Basis) -> Window:
        """The window as it is."""
        return window

    def new_health(self) -> dict[str, Any] | None:
        """None."""
        return None

    def summary(self) -> dict[str, Any]:
        """Nothing to report."""
        return {}

    def memory_bytes(self) -> int:
        """Nothing is held."""
        return 0

    def state_dict(self) -> StateDict:
        """Nothing learnt."""
        return {}

    def check_state(self, state: StateDict) -> None:
        """Whatever another run had learnt can be left."""

    def load_state_dict(self, state: StateDict) -> None:
        """Nothing to take back."""


def observer_for(
    config: EncoderConfig, predictor: object, model: nn.Module, parameters: Sequence[Tensor], groups: Groups,
    spec: BasisSpec, grad_scaler: Any = None,
) -> Observer:  # fmt: skip
    """The observer that predictor and settings ask for."""
    encodes = bool(getattr(predictor, "wants_encoding", False)) or config.low_rank > 0 or config.kfac
    if not encodes and config.health == 0:
        return NullObserver()
    return StateObserver(config, model, parameters, groups, spec, encodes=encodes, grad_scaler=grad_scaler)


# ---- numbers per group ------------------------------------------------------------------------------


def low_rank_features(energies: Tensor, index: Sequence[int], num_groups: int) -> Tensor:
    """(G, R) share of a group's displacement along each of its R directions.

    Args:
        energies: (tensors, R + 1) as :meth:`.streaming.LowRankFactors.energies` has them.
        index: Group of each tensor.
        num_groups: G.
    """
    sums = torch.zeros(num_groups, energies.shape[1], dtype=torch.float64)
    if index:
        sums.index_add_(0, torch.tensor(index), energies)
    return sums[:, :-1] / sums.sum(dim=1, keepdim=True).clamp(min=_TINY)


def kfac_features(
    spectra: Mapping[str, Tensor], sizes: Mapping[str, int], index: Mapping[str, int], num_groups: int
) -> Tensor:
    """(G, 4) means over the layers of a group, zero where it has none.

    Args:
        spectra: (4,) per layer as :meth:`.kfac.KfacFactors.spectra` has them.
        sizes: I per layer, so that the trace of A is a mean square.
        index: Group of each layer.
        num_groups: G.
    """
    sums, counts = torch.zeros(num_groups, NUM_KFAC_FEATURES, dtype=torch.float64), torch.zeros(num_groups, 1)
    for name, (trace_a, share_a, trace_g, share_g) in spectra.items():
        if name in index:
            row = torch.stack([trace_a / sizes[name], trace_g, share_a, share_g])
            sums[index[name]] += (row + _TINY).log()
            counts[index[name]] += 1
    return sums / counts.clamp(min=1)


# ---- the observer -----------------------------------------------------------------------------------


class StateObserver:
    """Encoder, sketch, factors, latent and health reports of one run, as far as they are asked for."""

    def __init__(
        self, config: EncoderConfig, model: nn.Module, parameters: Sequence[Tensor], groups: Groups, spec: BasisSpec, *,
        encodes: bool = True, grad_scaler: Any = None,
    ) -> None:  # fmt: skip
        """Nothing is known yet, and no hook installed.

        Args:
            config: What to keep.
            model: Whose layers have Kronecker factors and whose gradients are reported on.
            parameters: As the basis has them.
            groups: Their groups.
            spec: Columns of the basis.
            encodes: Whether windows get an encoding.
            grad_scaler: Scales the gradients of a backward pass.
        """
        self.config, self.encodes = config, encodes
        self._model, self._groups, self._grad_scaler = model, groups, grad_scaler
        self._shapes = [p.shape for p in parameters]
        self._matrices = [i for i, p in enumerate(parameters) if p.dim() > 1]
        self._device = parameters[0].device
        num_extras = groups.num_groups * (config.low_rank + NUM_KFAC_FEATURES * config.kfac)
        self._encoder = Encoder(groups.num_groups, spec, config.sketch_size, num_extras) if encodes else None
        self._sketch = CountSketch(self._shapes, config.sketch_size) if encodes and config.sketch_size else None
        self._pca = StreamingPca(config.latent_dim) if encodes and config.latent_dim else None
        self._block: list[Tensor] = []  # encodings not yet in the principal directions
        self._low_rank = LowRankFactors(config.low_rank) if config.low_rank else None
        self._kfac: KfacFactors | None = None
        if config.kfac:
            self._kfac = KfacFactors(model, max_bytes=int(config.kfac_memory_mb * 2**20))
            place = {id(p): g for p, g in zip(parameters, groups.index, strict=True)}
            layers = self._kfac.layers
            self._layer_groups = {n: place[id(m.weight)] for n, m in layers.items() if id(m.weight) in place}
        self._num_windows = self._num_reports = self._num_failed = 0
        self._health: dict[str, Any] | None = None  # the last report
        self._last = False  # the step under way closes a window

    @property
    def layout(self) -> dict[str, slice]:
        """Where the parts of an encoding stand."""
        if self._encoder is None:
            return {}
        total, G = self._encoder.num_features, self._groups.num_groups
        sketch = total - self.config.sketch_size
        kfac = sketch - G * NUM_KFAC_FEATURES * self.config.kfac
        low_rank = kfac - G * self.config.low_rank
        return {
            "state": slice(0, low_rank), "low_rank": slice(low_rank, kfac), "kfac": slice(kfac, sketch),
            "sketch": slice(sketch, total), "latent": slice(total, total + self.config.latent_dim),
        }  # fmt: skip

    # ---- real steps --------------------------------------------------------------------------------

    def watching(self, *, last: bool) -> AbstractContextManager[None]:
        """Hooks on the model, if this step's factors are wanted."""
        self._last = last
        return self._hooked(self._kfac) if last and self._kfac is not None else nullcontext()

    @contextmanager
    def _hooked(self, factors: KfacFactors) -> Iterator[None]:
        factors.discard()
        try:
            factors.attach(armed=False)
            yield
        finally:
            factors.detach()

    def before_backward(self) -> None:
        """From here on gradients are those of the loss."""
        if not self._last or self._kfac is None:
            return
        scale = None
        if self._grad_scaler is not None:  # as a tensor: reading the scale would wait for the device
            scale = self._grad_scaler.scale(torch.ones((), device=self._device))
        self._kfac.arm(scale)

    def after_backward(self, history: History, *, usable: bool) -> None:
        """Keep what the pass gave if the step is taken; report on the gradients every ``health`` windows."""
        if not self._last:
            return
        if self._kfac is not None:
            (self._kfac.commit if usable else self._kfac.discard)()
        if usable and self.config.health and self._num_windows % self.config.health == 0:
            self._report_health(history)

    def _report_health(self, history: History) -> None:
        measured = health.measure(self._model)
        if self._num_reports == 0:
            checked = health.pre_training(measured)
        else:
            checked = health.periodic(measured, baseline=history.norm_baseline.mean, norms=list(history.norms))
        self._num_reports += 1
        self._num_failed += not checked.ok
        self._health = checked.as_dict()

    def new_health(self) -> dict[str, Any] | None:
        """The last report, if it is of the window that has just closed."""
        due = self.config.health and (self._num_windows - 1) % self.config.health == 0
        return self._health if due else None

    def complete(self, window: Window, basis: Basis) -> Window:
        """Encode it; the latent joins once the first block of windows has been decomposed."""
        self._num_windows += 1
        if self._encoder is None:
            return window
        known = basis.num_columns > 0
        sketch = self._sketch(basis.newest()) if known and self._sketch is not None else None
        raw = self._encoder.observe(window, sketch, self._extras(basis) if known else None)
        encoding = self._encoder.standardise(raw)
        if self._pca is not None:
            self._block.append(encoding)
            if len(self._block) == PCA_BLOCK:
                self._pca.observe(torch.stack(self._block))
                self._block.clear()
            encoding = torch.cat([encoding, self._pca.coordinates(encoding).float()])
        return replace(window, encoding=encoding)

    def _extras(self, basis: Basis) -> Tensor | None:
        parts = []
        if self._low_rank is not None:
            newest = basis.newest()
            self._low_rank.observe([newest[i].reshape(self._shapes[i]) for i in self._matrices])
            index = [self._groups.index[i] for i in self._matrices]
            parts.append(low_rank_features(self._low_rank.energies(), index, self._groups.num_groups).reshape(-1))
        if self._kfac is not None:
            parts.append(self._kfac_features().reshape(-1))
        return torch.cat(parts) if parts else None

    def _kfac_features(self) -> Tensor:
        assert self._kfac is not None
        sizes = {name: len(A) for name, A in self._kfac.A.items()}
        return kfac_features(self._kfac.spectra(), sizes, self._layer_groups, self._groups.num_groups)

    # ---- cost, report, state -------------------------------------------------------------------------

    @property
    def passes(self) -> float:
        """Power iteration reads the weights; factors cost matrix products, told in forwards, of one step."""
        passes = LOW_RANK_PASSES * float(self._low_rank is not None)
        return passes + (0.0 if self._kfac is None else self._kfac.forwards_per_step / PASS_UNITS)

    def summary(self) -> dict[str, Any]:
        """Sizes, reconstruction error of the newest windows, factors; the last health report."""
        found: dict[str, Any] = {}
        if self._encoder is not None:
            found["num_features"] = self._encoder.num_features
        if self._pca is not None:
            found["latent_dim"] = len(self._pca.directions)
            # of a block before it was learnt; None until there was a second one
            found["reconstruction_error"] = self._pca.error if self._pca.count > PCA_BLOCK else None
        if self._low_rank is not None:
            energies = self._low_rank.energies().sum(dim=0)
            total = float(energies.sum())
            found["low_rank_share"] = float(energies[:-1].sum()) / total if total > 0 else None
        if self._kfac is not None:
            names = ("trace_A", "eigenvalues_A", "trace_G", "eigenvalues_G")
            found["kfac"] = {
                name: dict(zip(names, row.tolist(), strict=True)) for name, row in self._kfac.spectra().items()
            }
        summary = {"encoder": found} if found else {}
        if self._health is not None:
            summary["health"] = {**self._health, "num_reports": self._num_reports, "num_failed": self._num_failed}
        return summary

    def memory_bytes(self) -> int:
        """Bytes of every part and of the block of encodings."""
        parts = (self._encoder, self._sketch, self._pca, self._low_rank, self._kfac)
        waiting = PCA_BLOCK * 4 * self._encoder.num_features if self._pca is not None and self._encoder else 0
        return waiting + sum(part.memory_bytes() for part in parts if part is not None)

    def _settings(self) -> dict[str, Any]:
        """What must agree between a checkpoint and the run that reads it."""
        return {**{k: v for k, v in asdict(self.config).items() if k != "health"}, "encodes": self.encodes}

    def state_dict(self) -> StateDict:
        """Everything learnt."""
        parts = {"encoder": self._encoder, "pca": self._pca, "low_rank": self._low_rank, "kfac": self._kfac}
        return {
            "settings": self._settings(),
            "parts": {name: part.state_dict() for name, part in parts.items() if part is not None},
            "block": list(self._block),
            "num_windows": self._num_windows, "num_reports": self._num_reports, "num_failed": self._num_failed,
            "health": self._health,
        }  # fmt: skip

    def check_state(self, state: StateDict) -> None:
        """Refuse the state of an observer with other settings, before anything is changed.

        Raises:
            CheckpointError: it has none, or another one; the message names the setting.
        """
        saved = state.get("settings", {})
        for name, value in self._settings().items():
            if saved.get(name) != value:
                raise CheckpointError(
                    f"encoder.{name} is {saved.get(name)!r} in the checkpoint, {value!r} in this run: set it to match"
                )

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: saved with other settings.
        """
        self.check_state(state)
        parts = {"encoder": self._encoder, "pca": self._pca, "low_rank": self._low_rank, "kfac": self._kfac}
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(state["parts"][name])
        self._block = [t.clone() for t in state["block"]]
        self._num_windows = state["num_windows"]
        self._num_reports, self._num_failed = state["num_reports"], state["num_failed"]
        self._health = state["health"]
