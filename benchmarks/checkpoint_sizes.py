"""How large checkpoints are, in multiples of the weights: ``python benchmarks/checkpoint_sizes.py``.

Every preset trains a byte-level GPT with AdamW, ``full_batch`` the Poisson problem, with a warm-up of ``WARMUP`` steps
at most, so that it is over sooner.  A checkpoint is written every ``EVERY`` steps, once with everything and once with
``checkpoint.include_predictor = false``; shown are the largest and the last of each, all files of the folder counted,
over the bytes of the weights.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, with_values
from hybrid_predict_trainer.config import presets
from hybrid_predict_trainer.tasks import Task, TaskSettings, build_optimizer, build_scheduler, make_task

EVERY, WARMUP = 20, 40
#: Settings without a preset.
DEFAULTS = "(defaults)"


def times_weights(path: Path) -> float:
    """Bytes of a checkpoint's folder over those of its weights."""
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    return sum(sizes.values()) / sizes["model_weights.safetensors"]


def trainer_of(task: Task, config: HybridTrainerConfig, steps: int) -> HybridTrainer:
    """As `hpt train` would build it."""
    model = task.build_model(0)
    recipe = replace(task.defaults, steps=steps, warmup_steps=min(task.defaults.warmup_steps, steps // 10))
    optimizer = build_optimizer(model, recipe)
    schedule = build_scheduler(optimizer, recipe.schedule, steps, recipe.warmup_steps, recipe.decay_frac)
    return HybridTrainer(
        model, optimizer, config, task.loss_fn, schedule, residual_fn=getattr(task, "residual_fn", None)
    )


def measured(task: Task, preset: str, beyond: int) -> dict[str, list[float]]:
    """Sizes with everything and without the predictor's part, one of each per ``EVERY`` steps."""
    config = HybridTrainerConfig() if preset == DEFAULTS else HybridTrainerConfig.preset(preset)
    config = with_values(config, {"training.warmup_steps": min(config.warmup_steps, WARMUP)})
    steps = config.warmup_steps + beyond
    whole = trainer_of(task, config, 4 * steps)
    slim_config = with_values(config, {"checkpoint.include_predictor": False})
    found: dict[str, list[float]] = {"all": [], "without predictor": []}
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, batch in enumerate(islice(task.batches(0), steps), 1):
            whole.step(batch)
            if number % EVERY:
                continue
            path = whole.save_checkpoint(Path(name) / "all")
            found["all"].append(times_weights(path))
            slim = trainer_of(task, slim_config, 4 * steps)
            slim.load_checkpoint(path)
            found["without predictor"].append(times_weights(slim.save_checkpoint(Path(name) / "slim")))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3M", help="of task gpt (default 3M)")
    parser.add_argument("--beyond", type=int, default=80, help="steps after the warm-up (default 80)")
    parser.add_argument("--preset", action="append", help="one or more (default: all)")
    chosen = parser.parse_args(arguments)
    text = make_task("gpt", TaskSettings(preset=chosen.size, batch_size=2, context=16))
    print("| preset | task | weights | largest | last | largest without the predictor's part | last |")
    print("|---|---|---|---|---|---|---|")
    for preset in chosen.preset or [DEFAULTS, *presets.names()]:
        task = make_task("pinn-poisson", TaskSettings()) if preset == "full_batch" else text
        found = measured(task, preset, chosen.beyond)
        shown = " | ".join(f"{max(sizes):.1f} | {sizes[-1]:.1f}" for sizes in found.values())
        weights = sum(p.numel() for p in task.build_model(0).parameters())
        print(f"| `{preset}` | {task.name} | {weights:,} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
