"""From criteria to the three hypotheses: supported, refuted, or undecided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..statistics import Equivalence, equivalent, holm, paired_tests
from .hybrid import BARS


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A hypothesis and the criteria that speak of it.

    Attributes:
        name, statement: as the protocol has them.
        prediction: (experiment, beginning of the criterion's name) of what would falsify it.
        evidence: the same of what else it asks for.
    """

    name: str
    statement: str
    prediction: tuple[str, str]
    evidence: tuple[tuple[str, str], ...]


HYPOTHESES = (
    Hypothesis(
        name="H1", statement="training is predictable: the loss up to 50 steps ahead within 5 %",
        prediction=("2", "relative error up to 50"),
        evidence=(("1", "mean cosine of adjacent gradients"), ("1", "share of updates"), ("3", "R2 of the loss told")),
    ),
    Hypothesis(
        name="H2", statement="half of the steps predicted, final loss within 2 %",
        prediction=("4", "50 % predicted: final loss above"),
        evidence=(("3", "correlation of told"), ("4", "50 % predicted: difference in minimal pairs"),
                  ("4", "50 % predicted: processor time")),
    ),
    Hypothesis(
        name="H3", statement="corrections take back more than half of the accumulated error",
        prediction=("5", "error of forecasts taken back"),
        evidence=(("5", "p that the loss does not fall"), ("5", "rank correlation"), ("5", "loss lost against")),
    ),
)  # fmt: skip


def verdicts(experiments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A verdict per hypothesis, by the criterion that could falsify it; the evidence is counted beside it.

    Args:
        experiments: Number -> ``criteria`` over seeds.
    """
    found = []
    for h in HYPOTHESES:
        bar = _find(experiments, h.prediction)
        evidence = [(key, _find(experiments, key)) for key in h.evidence]
        verdict, why = _verdict(bar)
        known = [b for _, b in evidence if b is not None]
        met = [b for b in known if b["passed"] and not b["control_passes"]]
        if known:
            why += f"; of {len(known)} pieces of evidence {len(met)} hold against their controls"
        found.append({"name": h.name, "statement": h.statement, "verdict": verdict, "why": why,
                      "evidence": [b["name"] + ": " + b["verdict"] for b in known]})  # fmt: skip
    return found


def _find(experiments: Mapping[str, Any], key: tuple[str, str]) -> dict[str, Any] | None:
    bars = experiments.get(key[0], {}).get("criteria", [])
    return next((bar for bar in bars if bar["name"].startswith(key[1])), None)


def _verdict(bar: Mapping[str, Any] | None) -> tuple[str, str]:
    """Refuted where the mean misses the bar and the interval too; supported where both meet it and the control does
    not; undecided between."""
    if bar is None:
        return "not tested", "its experiment was not run"
    figures = f"{bar['name']} {bar['value']:.3g}, bar {bar['sense']} {bar['bar']:.3g}"
    ends = bar["interval"]
    if not math.isfinite(bar["value"]):
        return "undecided", f"{figures}: a run has no figure"
    inside = [e > bar["bar"] if bar["sense"] == "above" else e < bar["bar"] for e in ends or [bar["value"]]]
    if bar["passed"] and bar["control_passes"]:
        return "undecided", f"{figures}; {bar['control_name']} meets it as well ({bar['control']:.3g})"
    if not any(inside):
        return "refuted", figures
    if all(inside):
        return "supported", figures
    told = f"{figures}, interval {ends[0]:.3g} to {ends[1]:.3g} holds the bar: more seeds are needed"
    return "undecided", told if bar["passed"] else f"{told}; the mean misses it"


def equivalences(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tests over seeds of experiment 4: is the final loss within the margin (TOST), and does it differ at all.

    p values of "differs" are adjusted over the shares by Holm's method.
    """
    rows = []
    for percent, margin in BARS.items():
        name = f"{percent} % predicted"
        if any(name not in r["runs"] for r in results):
            continue
        pairs = [(r["runs"]["baseline"]["loss"], r["runs"][name]["loss"]) for r in results]
        if not all(v is not None and math.isfinite(v) and v > 0 for pair in pairs for v in pair):
            continue
        tests, same = paired_tests(pairs), equivalent(pairs, margin)
        rows.append({**_row(name, margin, same), "n": len(pairs), "t": tests.t, "wilcoxon": tests.wilcoxon,
                     "permutation": tests.permutation, "least_permutation": tests.least})  # fmt: skip
    tested = [row for row in rows if row["t"] is not None]
    for row, p in zip(tested, holm([row["t"] for row in tested]), strict=True):
        row["holm"] = p
    return rows


def _row(name: str, margin: float, same: Equivalence) -> dict[str, Any]:
    return {"name": name, "margin": margin, "equal": same.equal, "p_equivalence": same.p,
            "ratio": same.interval.mean, "interval": same.interval.ends}  # fmt: skip


def equivalence_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per share."""
    lines = []
    for row in rows:
        ends = row["interval"]
        interval = "" if ends is None else f" [{ends[0]:.4g}, {ends[1]:.4g}]"
        said = "equal" if row["equal"] else "not shown to be equal"
        p = "" if row["p_equivalence"] is None else f", p {row['p_equivalence']:.3g}"
        differs = "" if row.get("holm") is None else f"; p that nothing differs, Holm: {row['holm']:.3g}"
        lines.append(
            f"{row['name']}: loss {row['ratio']:.4g} times the baseline's{interval} (90 %), {said} within "
            f"{100 * row['margin']:g} %{p}{differs}"
        )
    return lines
