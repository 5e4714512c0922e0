"""One function per illness of the founding document's troubleshooting: a finding, or None.

The document's bounds are kept where they are relative or where the loss is in nats of next-token prediction.  Where it
counts what noise alone does (more than three changes of sign in ten steps: independent noise makes six), the
bound here is one that noise does not reach, and says so.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ..observe.gradient_health import VARIANCE_FACTOR, Zone, norm_variance, zone_of
from .record import RunRecord

#: Real steps that the first gradient norms are the baseline of, and the least that anything is said of.
BASELINE, LEAST = 10, 20
#: Of the baseline: a warning; critical; vanished.
EXPLODED, CRITICAL, VANISHED = 10.0, 100.0, 0.01
#: Steps without a new best that are a plateau, and the share of a run where it is shorter than that.
PLATEAU_STEPS, PLATEAU_SHARE = 500, 0.5
#: Relative fall that counts as progress, gap of overfitting and loss of underfitting in nats.
PROGRESS, GAP, HIGH_LOSS = 0.01, 0.5, 1.5
#: Of losses that are not in nats: validation above training, and the least fall that is learning.
RELATIVE_GAP, LEARNT = 1.5, 0.25
#: Alarms per step that are frequent; share of full steps that means no prediction; error of predicted losses.
OFTEN, MOSTLY_FULL, ERROR = 1 / 50, 0.9, 0.1
#: Correlation of neighbouring detrended losses below which they swing, and how wide, of the loss.
SWING, WIDE = -0.55, 0.05


class Severity(StrEnum):
    """How bad it is: the zone of the signal."""

    NOTICE = "notice"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One illness: what was seen, what it means, what to do.

    ``patch`` are settings by dotted key; ``flags`` options of ``hpt train``, for what is not a setting of the trainer.
    """

    name: str
    severity: Severity
    seen: str
    healthy: str
    meaning: str
    remedy: str
    patch: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


def not_finite(run: RunRecord) -> Finding | None:
    """Losses or gradients that are NaN or infinite."""
    bad = sum(not math.isfinite(x) for x in run.losses) + sum(not math.isfinite(x) for x in run.norms)
    if not (bad or run.skipped):
        return None
    back = f"go back to {run.checkpoint}, " if run.checkpoint else "go back to the last checkpoint, "
    return Finding(
        name="NaN or infinity", severity=Severity.CRITICAL,
        seen=f"{run.skipped} steps skipped, {bad} values not finite", healthy="none",
        meaning="the numbers have left the range of the format; a step made with them loses the weights",
        remedy=f"{back}divide the learning rate by 10, clip gradients at 1.0; under float16 pass a GradScaler",
        patch={"training.gradient_clip_norm": 1.0}, flags=_rate(run, 0.1),
    )  # fmt: skip


def explosion(run: RunRecord) -> Finding | None:
    """A gradient norm far above its first ones."""
    base, norms = _baseline(run.norms)
    if not norms or not base > 0 or max(norms) <= EXPLODED * base:
        return None
    ratio = max(norms) / base
    return Finding(
        name="gradient explosion", severity=Severity.CRITICAL if ratio > CRITICAL else Severity.WARNING,
        seen=f"largest norm {max(norms):.3g}, {ratio:.3g} times the first ones", healthy=f"at most {EXPLODED:g} times",
        meaning="the learning rate is too high, or a batch is unlike the others",
        remedy="clip gradients at 1.0 and halve the learning rate",
        patch={"training.gradient_clip_norm": 1.0}, flags=_rate(run, 0.5),
    )  # fmt: skip


def vanishing(run: RunRecord) -> Finding | None:
    """A gradient norm far below its first ones while the loss has not fallen."""
    base, norms = _baseline(run.norms)
    tail = norms[-LEAST:]
    if len(norms) < LEAST or not base > 0 or statistics.median(tail) >= VANISHED * base:
        return None
    first, last = _ends(run.losses)
    if last < 0.1 * first:
        return None
    return Finding(
        name="vanishing gradient", severity=Severity.CRITICAL,
        seen=f"norm {statistics.median(tail):.3g}, {statistics.median(tail) / base:.2g} of the first ones",
        healthy=f"at least {VANISHED:g} of them, unless the loss has fallen to a tenth",
        meaning="units are saturated or dead, or the signal is lost on its way through the layers",
        remedy="lower the rate of the start, look at the initialisation, add normalisation or residual connections",
        patch={"encoder.health": 1}, flags=_rate(run, 0.3),
    )  # fmt: skip


def oscillation(run: RunRecord) -> Finding | None:
    """Losses that swing from step to step, wider than a twentieth of themselves, or wide enough for the monitor."""
    losses = _finite(run.losses)[-200:]
    if len(losses) < 2 * LEAST:
        return None
    middles = [statistics.fmean(losses[i : i + 5]) for i in range(len(losses) - 4)]
    off = [x - m for x, m in zip(losses[2:-2], middles, strict=True)]
    width = statistics.pstdev(off) / max(abs(statistics.fmean(losses)), 1e-30)
    # of independent noise less its mean of five, neighbours correlate by -0.3; of a swing by nearly -1
    together = _correlation(off[:-1], off[1:])
    alarms = sum(alarm.get("signal") == "oscillation" for alarm in run.alarms)
    if (together > SWING or width < WIDE) and alarms < 2:
        return None
    changes = sum(a * b < 0 for a, b in itertools.pairwise(off)) / (len(off) - 1) * 10
    return Finding(
        name="oscillation", severity=Severity.WARNING,
        seen=f"{changes:.1f} changes of sign in 10 steps, {width:.0%} of the loss wide, "
        f"neighbours correlate {together:.2f}",
        healthy=f"narrower than {WIDE:.0%}, or not from step to step (noise alone: 6 changes, correlation -0.3)",
        meaning="steps jump across the valley: the learning rate is at the edge of stability or above",
        remedy="multiply the learning rate by 0.3, make more full steps, clip gradients at 1.0",
        patch={"training.full_steps": 2 * run.config.full_steps, "training.gradient_clip_norm": 1.0},
        flags=_rate(run, 0.3),
    )  # fmt: skip


def plateau(run: RunRecord) -> Finding | None:
    """No lower loss for 500 steps, or for half of a shorter run."""
    losses = _finite(run.losses)
    length = min(PLATEAU_STEPS, int(PLATEAU_SHARE * len(losses)))
    if length < 2 * LEAST:
        return None
    width = max(length // 4, 5)
    before = statistics.fmean(losses[-length : -length + width])
    after = statistics.fmean(losses[-width:])
    noise = statistics.pstdev(losses[-length:]) / math.sqrt(width)
    if before - after > max(PROGRESS * abs(before), 2 * noise):
        return None
    first = _ends(losses)[0]
    if after < (1 - PROGRESS) * before or after < 0.01 * first:
        return None
    return Finding(
        name="plateau", severity=Severity.WARNING, seen=f"loss {before:.4g}, {length} steps later {after:.4g}",
        healthy=f"a fall by more than {PROGRESS:.0%}, or to a hundredth of the first loss",
        meaning="the learning rate is too low, or the end of what this rate can reach; or the gradient has vanished",
        remedy="double the learning rate, with a warm-up; look at the norms per layer; near the end of a run: decay",
        patch={"encoder.health": 1}, flags=_rate(run, 2.0),
    )  # fmt: skip


def overfitting(run: RunRecord) -> Finding | None:
    """A validation loss that has risen from its best and stands far above the training loss."""
    found = [(step, loss) for step, loss in run.validation if math.isfinite(loss)]
    if len(found) < 3:
        return None
    at, best = min(found, key=lambda pair: pair[1])
    last, train = found[-1][1], _ends(run.losses)[1]
    bound = train + GAP if run.is_language else RELATIVE_GAP * train
    if last < 1.02 * best or last <= bound:
        return None
    return Finding(
        name="overfitting", severity=Severity.WARNING,
        seen=f"validation loss {last:.4g} (best {best:.4g} after {at} steps), training loss {train:.4g}",
        healthy=f"a gap below {GAP} nats" if run.is_language else f"below {RELATIVE_GAP} times the training loss",
        meaning="the model learns its data by heart",
        remedy=f"stop after {at} steps, or: weight decay times 10, dropout 0.2, a smaller model, more data",
        patch={}, flags=(f"--steps {max(at, 1)}",),
    )  # fmt: skip


def underfitting(run: RunRecord) -> Finding | None:
    """A loss that has stayed high although gradients are healthy."""
    first, last = _ends(run.losses)
    found = [loss for _, loss in run.validation if math.isfinite(loss)]
    level = found[-1] if found else last
    high = level > HIGH_LOSS and last > (1 - LEARNT) * first if run.is_language else last > (1 - LEARNT) * first
    norms = _finite(run.norms)[-LEAST:]
    healthy = norms and zone_of(statistics.median(norms)) in (Zone.HEALTHY, Zone.LOW, Zone.HIGH)
    if len(run.losses) < 2 * LEAST or not high or not healthy or not math.isfinite(last):
        return None
    return Finding(
        name="underfitting", severity=Severity.WARNING, seen=f"training loss {first:.4g}, at the end {last:.4g}",
        healthy=f"a fall by more than {LEARNT:.0%}" + (f", or a loss below {HIGH_LOSS}" if run.is_language else ""),
        meaning="model, rate or length of the run are too small for the task",
        remedy="three times the learning rate, a longer run, a larger model, less weight decay and dropout",
        flags=(*_rate(run, 3.0), f"--steps {5 * len(run.losses)}"),
    )  # fmt: skip


def frequent_divergence(run: RunRecord) -> Finding | None:
    """Alarms of the divergence monitor every fifty steps or oftener."""
    num = len(run.alarms)
    if num < 3 or num < OFTEN * len(run.phases):
        return None
    kinds = sorted({str(alarm.get("signal")) for alarm in run.alarms})
    config = run.config
    return Finding(
        name="frequent divergence", severity=Severity.WARNING,
        seen=f"{num} alarms in {len(run.phases)} steps: {', '.join(kinds)}", healthy="fewer than one in 50 steps",
        meaning="the learning rate is too high, batches are too different, or the threshold is too low for this noise",
        remedy="a higher threshold, half the learning rate, twice the batch, shorter predictions",
        patch={
            "training.divergence_threshold": max(4.0, config.divergence_threshold),
            "training.max_predict_steps": min(40, config.max_predict_steps),
        },
        flags=_rate(run, 0.5),
    )  # fmt: skip


def low_confidence(run: RunRecord) -> Finding | None:
    """More than nine of ten steps are full ones because confidence is too low."""
    after = [(p, r) for p, r in zip(run.phases, run.reasons, strict=True) if p != "warmup"]
    full = [reason for phase, reason in after if phase == "full"]
    low = sum("confidence is below" in reason for reason in full)
    if len(after) < LEAST or len(full) < MOSTLY_FULL * len(after) or low < 0.1 * len(after):
        return None
    config = run.config
    return Finding(
        name="low confidence", severity=Severity.NOTICE,
        seen=f"{len(full)} of {len(after)} steps after the warm-up were full ones, {low} because of confidence",
        healthy=f"at most {MOSTLY_FULL:.0%}",
        meaning="the predictor has not shown that its jumps are kept; nothing is lost but what asking costs",
        remedy="a longer warm-up, more full steps; over new data in one pass jumps find nothing, and all is well",
        patch={
            "training.warmup_steps": max(2 * config.warmup_steps, 20), "training.full_steps": 2 * config.full_steps,
            "training.confidence_threshold": min(config.confidence_threshold, 0.15),
        },
    )  # fmt: skip


def prediction_divergence(run: RunRecord) -> Finding | None:
    """Accepted jumps whose loss is not the predicted one."""
    errors = [
        abs(float(j["loss_after"]) - float(j["predicted_loss"])) / max(abs(float(j["loss_after"])), 1e-30)
        for j in run.jumps
        if j.get("accepted") and _is_number(j.get("loss_after")) and _is_number(j.get("predicted_loss"))
    ]
    if len(errors) < 3 or statistics.median(errors) <= ERROR:
        return None
    config = run.config
    return Finding(
        name="prediction divergence", severity=Severity.NOTICE,
        seen=f"losses after {len(errors)} jumps are {statistics.median(errors):.0%} off (median)",
        healthy=f"at most {ERROR:.0%}",
        meaning="what the predictor believes of the loss is wrong; jumps were accepted because measured losses fell",
        remedy="more full steps between predictions, or more confidence asked for",
        patch={"training.full_steps": 2 * config.full_steps,
               "training.confidence_threshold": min(0.9, max(0.3, 2 * config.confidence_threshold))},
    )  # fmt: skip


def rising_variance(run: RunRecord) -> Finding | None:
    """Gradient norms that scatter more and more."""
    norms = _finite(run.norms)
    middle = len(norms) // 2
    if len(norms) < 64:
        return None
    before, after = norm_variance(norms[:middle]), norm_variance(norms[middle:])
    first, last = _ends(run.losses)
    if not before > 0 or after <= VARIANCE_FACTOR * before or last < 0.1 * first:  # near a minimum only noise is left
        return None
    return Finding(
        name="rising gradient variance", severity=Severity.WARNING,
        seen=f"relative variance {before:.3g}, in the second half {after:.3g}",
        healthy=f"less than {VARIANCE_FACTOR:g} times",
        meaning="noise outweighs the signal more and more", remedy="a larger batch or a lower learning rate",
        flags=_rate(run, 0.5),
    )  # fmt: skip


def norm_zone(run: RunRecord) -> Finding | None:
    """Gradient norms outside the document's absolute zones."""
    norms = _finite(run.norms)[-LEAST:]
    zone = zone_of(statistics.median(norms)) if norms else Zone.HEALTHY
    first, last = _ends(run.losses)
    learnt = zone in (Zone.LOW, Zone.CRITICAL) and last < 0.1 * first  # a small gradient near a minimum is no illness
    if zone is Zone.HEALTHY or learnt or len(norms) < LEAST:
        return None
    norm = statistics.median(norms)
    remedy = "reduce the learning rate or clip gradients" if norm > 1 else "raise the rate, look at the initialisation"
    return Finding(
        name="gradient norm out of its zone", severity=Severity.CRITICAL if zone is Zone.CRITICAL else Severity.WARNING,
        seen=f"norm {norm:.3g} (median of {len(norms)} steps): {zone.value}", healthy="0.1 to 10",
        meaning="depends on how the loss is scaled: a sign, not a verdict", remedy=remedy,
        patch={"training.gradient_clip_norm": 1.0} if norm > 1 else {"encoder.health": 1},
    )  # fmt: skip


def failed_checks(run: RunRecord) -> Finding | None:
    """The newest checklist (after the first step, and every so many windows) that did not pass."""
    failed = [c for report in run.health[-1:] for c in report.get("checks", ()) if not c.get("passed")]
    if not failed:
        return None
    return Finding(
        name="checklist", severity=Severity.WARNING,
        seen="; ".join(f"{c.get('name')} {c.get('value')}" for c in failed),
        healthy="; ".join(f"{c.get('name')} {c.get('legal')}" for c in failed),
        meaning="layers, ratio of gradient to weights or their variance are outside their zones",
        remedy="; ".join(str(c.get("advice")) for c in failed), patch={},
    )  # fmt: skip


#: In the order of the founding document's emergency table, then its warning signs.
SIGNALS: tuple[Callable[[RunRecord], Finding | None], ...] = (
    not_finite, explosion, vanishing, frequent_divergence, low_confidence, prediction_divergence, overfitting,
    underfitting, plateau, oscillation, rising_variance, norm_zone, failed_checks,
)  # fmt: skip


# ---- numbers --------------------------------------------------------------------------------------------


def _rate(run: RunRecord, factor: float) -> tuple[str, ...]:
    return (f"--lr {run.lr * factor:.3g}",) if math.isfinite(run.lr) and run.lr > 0 else ()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _finite(values: Sequence[float]) -> list[float]:
    return [x for x in values if math.isfinite(x)]


def _baseline(norms: Sequence[float]) -> tuple[float, list[float]]:
    """Median of the first norms, and those after."""
    known = _finite(norms)
    return (statistics.median(known[:BASELINE]) if known else math.nan), known[BASELINE:]


def _ends(losses: Sequence[float]) -> tuple[float, float]:
    """Mean loss of the first steps and of the last tenth."""
    known = _finite(losses)
    if not known:
        return math.nan, math.nan
    width = max(len(known) // 10, 1)
    return statistics.fmean(known[: min(5, len(known))]), statistics.fmean(known[-width:])


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    try:
        return statistics.correlation(a, b)
    except statistics.StatisticsError:  # all the same
        return 0.0
