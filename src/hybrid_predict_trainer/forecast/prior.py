"""What is known of the law's parameters before a run has shown anything: learnt from whole curves of other models."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from ..records import ConfigError
from .curve import Array
from .law import NAMES, SCALE, SHAPE, TRANSIENT

#: Priors that come with the package.
PRIORS = ("language-models",)

#: Least standard deviations of the shape between models: a handful of them shows less spread than there is.
LEAST_SPREAD = {
    "ln_decay": 0.08, "ln_gain": 0.1, "ln_speed": 0.3, "ln_tail": 0.15, "rate_power": 0.05, "gain_decay": 0.05,
    "transient": 0.02,
}  # fmt: skip
#: A run's own scale: as a share of the last loss, and the spread of its logarithm.
SCALE_SHARE, SCALE_SPREAD = 0.11, 1.0
#: The floor is left to the data: spread in units of the last loss.
FLOOR_SPREAD = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prior:
    """Normal distributions of the shape parameters, in the order of ``law.SHAPE``; the transient per first loss.

    Attributes:
        name: for tables.
        mean, spread: (7,) means and standard deviations.
        discrepancy: how far the law itself is off, as a standard deviation of the logarithm of a loss.
        widening: factor of a forecast's standard deviation that makes its 90 % interval hold 90 % of the final
            losses of models left out.
    """

    name: str
    mean: Array
    spread: Array
    discrepancy: float = 0.002
    widening: float = 1.0

    def around(self, first: float, last: float) -> tuple[Array, Array]:
        """Means and standard deviations of all nine parameters for a run with these losses, (9,) each."""
        mean, spread = np.zeros(len(NAMES)), np.zeros(len(NAMES))
        mean[list(SHAPE)], spread[list(SHAPE)] = self.mean, self.spread
        mean[0], spread[0] = (1 - SCALE_SHARE) * last, FLOOR_SPREAD * last
        mean[SCALE], spread[SCALE] = np.log(SCALE_SHARE * last), SCALE_SPREAD
        mean[TRANSIENT] *= first
        spread[TRANSIENT] *= first
        return mean, spread

    def to_json(self) -> dict[str, Any]:
        """Plain data with the parameters' names."""
        named = {NAMES[k]: [float(m), float(s)] for k, m, s in zip(SHAPE, self.mean, self.spread, strict=True)}
        return {"name": self.name, "shape": named, "discrepancy": self.discrepancy, "widening": self.widening}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Prior:
        """What :meth:`to_json` wrote."""
        pairs = np.array([value["shape"][NAMES[k]] for k in SHAPE], dtype=np.float64)
        return Prior(
            name=value["name"], mean=pairs[:, 0], spread=pairs[:, 1],
            discrepancy=value["discrepancy"], widening=value["widening"],
        )  # fmt: skip


#: Before any curve has been seen: wide, about where published fits of language models lie.
WIDE = Prior(
    name="wide", mean=np.array([np.log(0.48), 0.0, np.log(0.3), np.log(0.15), 0.75, 0.15, 0.0]),
    spread=np.array([0.3, 0.7, 1.0, 0.5, 0.2, 0.1, 0.05]),
)  # fmt: skip


def learnt(name: str, shapes: Sequence[Array], *, widening: float = 1.0) -> Prior:
    """A prior from the shapes of several models, each fitted to whole curves.

    Args:
        name: For tables.
        shapes: Parameter vectors (9,), one per model, their transients as shares of the first loss.
        widening: See :class:`Prior`.

    Raises:
        ConfigError: none.
    """
    if not shapes:
        raise ConfigError("a prior needs at least one model whose curves are whole")
    found = np.array([[shape[k] for k in SHAPE] for shape in shapes])
    least = np.array([LEAST_SPREAD[NAMES[k]] for k in SHAPE])
    count = len(found)
    seen = found.std(axis=0, ddof=1) * np.sqrt(1 + 1 / count) if count > 1 else np.zeros(len(SHAPE))
    return Prior(name=name, mean=found.mean(axis=0), spread=np.maximum(seen, least), widening=widening)


@functools.cache
def shipped(name: str) -> Prior:
    """One of :data:`PRIORS`, as ``hpt bench forecast --write-priors`` computed it.

    Raises:
        ConfigError: unknown.
    """
    if name not in PRIORS:
        raise ConfigError(f"unknown prior {name!r} (valid: {', '.join(PRIORS)})")
    text = resources.files(__package__).joinpath("priors.json").read_text(encoding="utf-8")
    return Prior.from_json(json.loads(text)[name])
