"""Is a batch's predicted loss worth anything as an order of the data?  ``python benchmarks/curriculum.py``.

Every arm of a seed trains one GPT on the same batches, in blocks of ``BLOCK``; within a block the order is the given
one, the batches with the smallest predicted loss first, those with the largest first, or another random one, which is
the null.  The prediction of a batch's loss at its own step is its loss under the weights at the block's beginning.
Predicting is not charged: the ratio is a bound from above on what a curriculum can bring, and the price, one forward
per batch, is printed beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import numpy as np
import torch

from hybrid_predict_trainer.cost import FORWARD_UNITS, STEP_UNITS
from hybrid_predict_trainer.experiments.statistics import Interval, ends_words, paired_interval
from hybrid_predict_trainer.tasks import Task, TaskSettings, build_optimizer, build_scheduler, make_task

BLOCK = 16
ARMS = ("given", "small loss first", "large loss first", "another random order")


def ordered(losses: Sequence[float], arm: str, seed: int, block: int) -> list[int]:
    """Places of a block's batches in the order in which an arm trains on them.

    Args:
        losses: Predicted, one per batch.
        arm: One of ``ARMS``.
        seed: Of the run; the null's order depends on it and on the block.
        block: Which one, from 0.
    """
    if arm == "given":
        return list(range(len(losses)))
    if arm == "another random order":
        return [int(i) for i in np.random.default_rng((seed, block)).permutation(len(losses))]
    return sorted(range(len(losses)), key=losses.__getitem__, reverse=arm == "large loss first")


def trained(task: Task, arm: str, seed: int, steps: int) -> tuple[float, list[tuple[float, float]]]:
    """Train one arm.

    Returns:
        Validation loss at the end, nats; and (predicted, own) loss of every batch.
    """
    torch.manual_seed(seed)
    model = task.build_model(seed)
    recipe = replace(task.defaults, steps=steps, warmup_steps=min(task.defaults.warmup_steps, steps // 10))
    optimizer = build_optimizer(model, recipe)
    schedule = build_scheduler(optimizer, recipe.schedule, steps, recipe.warmup_steps, recipe.decay_frac)
    batches = task.batches(seed)
    pairs = []
    for block, start in enumerate(range(0, steps, BLOCK)):
        here = list(islice(batches, min(BLOCK, steps - start)))
        with torch.no_grad():
            predicted = [float(task.loss_fn(model, batch)) for batch in here]
        for place in ordered(predicted, arm, seed, block):
            optimizer.zero_grad()
            loss = task.loss_fn(model, here[place])
            loss.backward()
            if recipe.grad_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
            optimizer.step()
            schedule.step()
            pairs.append((predicted[place], float(loss.detach())))
    return task.evaluate(model), pairs


def explained(pairs: Sequence[tuple[float, float]]) -> float:
    """Correlation of predicted and own losses within blocks, over the second half of a run."""
    half = np.array(pairs[len(pairs) // (2 * BLOCK) * BLOCK :])
    parts = [part - part.mean(axis=0) for part in np.split(half, range(BLOCK, len(half), BLOCK))]
    left = np.concatenate(parts)
    return float(np.corrcoef(left.T)[0, 1])


def written(found: Interval) -> str:
    """A ratio with its 95 % interval over seeds."""
    return f"{found.mean:.4f} {ends_words(found.ends, '.4f')}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row per arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="0.3M", help="of task gpt (default 0.3M)")
    parser.add_argument("--steps", type=int, default=320, help="of each run (default 320)")
    parser.add_argument("--seeds", type=int, default=5, help="paired (default 5)")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences (default 4: few, so that batches differ)")
    parser.add_argument("--context", type=int, default=64, help="tokens of each (default 64)")
    chosen = parser.parse_args(arguments)
    settings = TaskSettings(preset=chosen.preset, batch_size=chosen.batch_size, context=chosen.context)
    task = make_task("gpt", settings)
    ends: dict[str, list[float]] = {arm: [] for arm in ARMS}
    known = []
    for seed in range(chosen.seeds):
        for arm in ARMS:
            end, pairs = trained(task, arm, seed, chosen.steps)
            ends[arm].append(end)
            if arm == "given":
                known.append(explained(pairs))
    price = FORWARD_UNITS / STEP_UNITS
    print(f"gpt {chosen.preset}, {chosen.steps} steps, {chosen.seeds} seeds, {task.describe()['data']['name']}")
    print(f"correlation of predicted and own loss within a block: {np.mean(known):.3f}")
    print(f"not charged: predicting takes {price:.2f} of a step for every batch")
    for arm in ARMS:
        mean = float(np.exp(np.mean(np.log(ends[arm]))))
        told = "" if arm == "given" else f"  {written(paired_interval(ends[arm], ends['given']))} of given"
        print(f"{arm:<22} {mean:.4f}{told}")


if __name__ == "__main__":
    main()
