"""``hpt bench costs``: what each part of the machinery takes, on the objects of real runs.

Every predictor gets a trainer of its own on the gpt task, with windows of one small step, so that the basis
is soon full; what is timed (closing a window, encoding it, learning from it, predicting, moving the weights)
depends on the number of weights and not on the batch.  Shares are of the time of a usual window: N full
steps at the usual batch.  Times of the first windows, before everything has its memory, do not count.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from ...config.settings import HybridTrainerConfig
from ...config.toml import with_values
from ...observe.encoder import Encoder
from ...observe.loss_features import loss_features
from ...predictors import PREDICTORS, Predictor, build
from ...propose.horizon import context_features
from ...records import PhasePrediction, StateDict, Window
from ...tasks import Batch, Task, TaskSettings, build_optimizer, make_task
from ...trainer import HybridTrainer
from ...weights import algebra as weights
from ...weights.algebra import Tensors
from ...weights.parameters import predicted_parameters
from ..report.text import aligned

Row = dict[str, Any]
Times = dict[str, list[float]]
T = TypeVar("T")

#: Targets of the specification at 10 M weights on two cores, in milliseconds; the RSSM's is a share of the window.
ENCODE_MS, BANDIT_MS, PREDICT_MS = 1.0, 0.1, 5.0
RSSM_UPDATE_SHARE = 0.01
#: Steps of the timed window at the usual batch, and windows before times count.
NUM_STEPS, NUM_WARM = 8, 4
#: A run that is only watched.
FOR_EVER = 10**9


def timed(function: Callable[[], T], times: list[float]) -> T:
    """Call and note the milliseconds."""
    started = time.perf_counter()
    result = function()
    times.append(1e3 * (time.perf_counter() - started))
    return result


class Timed:
    """A predictor whose updates are timed."""

    def __init__(self, inner: Predictor) -> None:
        """Args: inner: what is timed."""
        self.inner, self.name, self.spec = inner, inner.name, inner.spec
        self.update_ms: list[float] = []

    @property
    def ready(self) -> bool:
        """The inner predictor's."""
        return self.inner.ready

    def observe(self, window: Window) -> None:
        """Time the update."""
        timed(lambda: self.inner.observe(window), self.update_ms)

    def predict(self, horizon: int) -> PhasePrediction:
        """The inner predictor's."""
        return self.inner.predict(horizon)

    def memory_bytes(self) -> int:
        """The inner predictor's."""
        return self.inner.memory_bytes()

    def state_dict(self) -> StateDict:
        """The inner predictor's."""
        return self.inner.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.inner.load_state_dict(state)


def measure(
    preset: str = "10M", predictors: Sequence[str] = tuple(PREDICTORS), *, num_repeats: int = 20,
    batch_size: int = 8, context: int = 128, note: Callable[[str], None] = lambda line: None,
) -> list[Row]:  # fmt: skip
    """Medians and 90th percentiles of every part.

    Args:
        preset: Size of the gpt task's model.
        predictors: Names; shared parts are timed on all of them.
        num_repeats: Windows that count, per predictor.
        batch_size: Of a usual step.
        context: Tokens per example of a usual step.
        note: Takes lines for a person who waits.

    Returns:
        Rows ``{"part", "median_ms", "p90_ms", "share_of_window", "target_ms"}``; no target: None.

    Raises:
        ValueError: a name is unknown.
    """
    N = HybridTrainerConfig().predictor.window
    note(f"timing {NUM_STEPS} full steps of the {preset} model")
    step_ms = _step_ms(make_task("gpt", TaskSettings(preset=preset, batch_size=batch_size, context=context)))
    window_ms = N * statistics.median(step_ms)
    small = make_task("gpt", TaskSettings(preset=preset, batch_size=1, context=min(context, 16)))
    times: Times = defaultdict(list)
    for name in predictors:
        note(f"timing {name}")
        for part, found in _of_predictor(small, name, num_repeats).items():
            times[part] += found
    targets = {
        "encode: loss features": ENCODE_MS, "encode: state": ENCODE_MS, "bandit decision": BANDIT_MS,
        "update rssm": RSSM_UPDATE_SHARE * window_ms, **{f"predict {name}": PREDICT_MS for name in predictors},
    }  # fmt: skip
    order = sorted(times, key=lambda part: (part.split()[-1] in predictors, list(times).index(part)))
    return [
        row("full step", step_ms, window_ms), row("window, usual length", [N * v for v in step_ms], window_ms),
        *(row(part, times[part], window_ms, targets.get(part)) for part in order),
    ]  # fmt: skip


def row(part: str, times_ms: Sequence[float], window_ms: float, target_ms: float | None = None) -> Row:
    """One line from the times of one part."""
    ranked = sorted(times_ms)
    median = statistics.median(ranked)
    return {
        "part": part, "median_ms": median, "p90_ms": ranked[min(int(0.9 * len(ranked)), len(ranked) - 1)],
        "share_of_window": median / window_ms, "target_ms": target_ms,
    }  # fmt: skip


def _trainer(task: Task, name: str, settings: Mapping[str, Any]) -> tuple[HybridTrainer, Timed]:
    """A trainer that watches and never proposes."""
    model = task.build_model(0)
    optimizer = build_optimizer(model, task.defaults)
    values = {"predictor.type": name, "predictor.rest_windows": 0, "training.warmup_steps": 0, **settings}
    config = with_values(HybridTrainerConfig(), values)
    groups = predicted_parameters(model, optimizer)[1]
    predictor = Timed(build(config, groups.num_groups, groups.num_weights))
    trainer = HybridTrainer(model, optimizer, config, loss_fn=task.loss_fn, predictor=predictor)
    trainer.force_full_phase(FOR_EVER)
    return trainer, predictor


def _step_ms(task: Task) -> list[float]:
    """Milliseconds of full steps that close no window."""
    trainer, _ = _trainer(task, "hold", {"predictor.window": FOR_EVER // 10**3})
    batches: Iterator[Batch] = task.batches(0)
    times: list[float] = []
    for _ in range(NUM_STEPS + 2):
        timed(functools.partial(trainer.step, next(batches)), times)
    return times[2:]


def _of_predictor(task: Task, name: str, num_repeats: int) -> Times:
    """Milliseconds of every part with one predictor, its own parts under its own name."""
    trainer, predictor = _trainer(task, name, {"predictor.window": 1})
    run = trainer.run
    encoder = Encoder(run.windows.groups.num_groups, predictor.spec)
    times: Times = defaultdict(list)
    num_filling = predictor.spec.num_displacements + NUM_WARM
    saved: Tensors = []
    for count, batch in zip(range(num_filling + num_repeats), task.batches(0), strict=False):
        trainer.step(batch)
        window = run.windows.last
        assert window is not None, "a window closes at every step"
        found: Times = defaultdict(list)
        _time_shared(trainer, window, encoder, found)
        if predictor.ready and run.windows.basis.ready:
            saved = saved or weights.clone(run.subject.parameters)
            _time_jump(trainer, predictor, window, saved, found)
        if count >= num_filling:
            for part, values in found.items():
                times[part] += values
    times[f"window close {name}"] = list(trainer.metrics.encode_ms)[-num_repeats:]
    times[f"update {name}"] = predictor.update_ms[-num_repeats:]
    return times


def _time_shared(trainer: HybridTrainer, window: Window, encoder: Encoder, found: Times) -> None:
    """Parts that do not depend on the predictor."""
    run = trainer.run
    timed(lambda: loss_features(run.losses.history.losses, window.step), found["encode: loss features"])
    timed(lambda: encoder.standardise(encoder.observe(window)), found["encode: state"])
    bandit = run.proposer.feedback.bandit

    def decide() -> None:
        bandit.choose(context_features(window, confidence=0.5, persistence=run.judge.ledger.persistence, spread=0.1))

    timed(decide, found["bandit decision"])


def _time_jump(trainer: HybridTrainer, predictor: Timed, window: Window, saved: Tensors, found: Times) -> None:
    """Predict, form the jump, move the weights, and put them back."""
    run, name = trainer.run, predictor.name
    prediction = timed(lambda: predictor.predict(window.num_steps), found[f"predict {name}"])
    deltas = timed(lambda: run.windows.basis.combine(prediction.coefficients), found[f"combine {name}"])
    timed(lambda: weights.copy_(saved, run.subject.parameters), found["copy the weights"])
    timed(lambda: weights.move_(run.subject.parameters, saved, deltas, 1e-3), found["move the weights"])
    weights.copy_(run.subject.parameters, saved)


def format_text(rows: Sequence[Row]) -> str:
    """The table for a person, times in milliseconds."""

    def verdict(line: Row) -> str:
        target = line["target_ms"]
        return "-" if target is None else f"{target:.3g} {'met' if line['median_ms'] <= target else 'MISSED'}"

    head = ("part", "median ms", "p90 ms", "share of window", "target ms")
    cells = [
        (r["part"], f"{r['median_ms']:.3f}", f"{r['p90_ms']:.3f}", f"{r['share_of_window']:.3%}", verdict(r))
        for r in rows
    ]
    return "\n".join([*aligned(head, cells), f"{torch.get_num_threads()} threads"])
