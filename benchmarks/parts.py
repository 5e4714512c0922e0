"""What `gpu.sh` needs beside the commands of `hpt`: each prints one JSON object; what a person reads goes to stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hybrid_predict_trainer.experiments.arms.environment import environment
from hybrid_predict_trainer.experiments.arms.options import InputError, Options, as_input_error, check_device
from hybrid_predict_trainer.experiments.bench import accelerator, acceptance, equal_time, stack
from hybrid_predict_trainer.records import ConfigError
from hybrid_predict_trainer.tell.sinks import jsonable

Shown = tuple[Any, str]


def say(line: str) -> None:
    """Progress for a person."""
    print(line, file=sys.stderr, flush=True)


def read(path: Path | None) -> Any:
    """A JSON file; None where there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None


def show_environment(args: argparse.Namespace) -> Shown:
    """Versions, processor, accelerator."""
    check_device(args.device)
    found = {"schema": 1, "what": "environment", **environment(args.device)}
    if torch.device(args.device).type == "cuda":
        about = torch.cuda.get_device_properties(args.device)
        found |= {
            "gpu_memory_bytes": about.total_memory, "gpu_multiprocessors": about.multi_processor_count,
            "gpu_capability": [about.major, about.minor], "bf16": torch.cuda.is_bf16_supported(),
        }  # fmt: skip
    return found, ", ".join(f"{k} {v}" for k, v in found.items() if k in ("torch", "cpu", "gpu", "device", "commit"))


def show_stack(args: argparse.Namespace) -> Shown:
    """Every factor against conventional training."""
    result = stack.measure(
        preset=args.preset, steps=args.steps, seeds=range(args.seeds), device=args.device, rounds=args.rounds,
        batch_size=args.batch_size, context=args.context, data=args.data, data_bytes=args.data_bytes,
        without=args.without, note=say,
    )  # fmt: skip
    return result, stack.format_text(result)


def show_accelerator(args: argparse.Namespace) -> Shown:
    """Late reading and peak memory."""
    result = accelerator.measure(
        preset=args.preset, device=args.device, batch_size=args.batch_size or 8, context=args.context or 128,
        pairs=args.pairs, note=say,
    )  # fmt: skip
    return result, accelerator.format_text(result)


def show_equal_time(args: argparse.Namespace) -> Shown:
    """Today's GPT at equal wall-clock: one rate, four rates, ours."""
    options = Options(
        task="gpt-modern", preset=args.preset, device=args.device, batch_size=args.batch_size, context=args.context,
        data=args.data, data_bytes=args.data_bytes, bf16=args.bf16, fused=args.fused, compile=args.compile,
        schedule="wsd",
    )  # fmt: skip
    result = equal_time.measure(options, seconds=args.seconds, seed=args.seed, pilot_steps=args.pilot_steps, note=say)
    return result, equal_time.format_text(result)


def show_acceptance(args: argparse.Namespace) -> Shown:
    """Comparisons against the published criteria."""
    with as_input_error():
        found = [read(path) for path in args.comparisons]
        result = acceptance.judge([c for c in found if c is not None], read(args.stack), read(args.memory))
    return result, acceptance.format_text(result)


def build_parser() -> argparse.ArgumentParser:
    """All parts and their flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)

    def part(name: str, run: Callable[[argparse.Namespace], Shown]) -> argparse.ArgumentParser:
        found = parts.add_parser(name, help=run.__doc__)
        found.set_defaults(run=run)
        return found

    part("environment", show_environment).add_argument("--device", default="cpu")
    sized = (("stack", show_stack), ("accelerator", show_accelerator), ("equal-time", show_equal_time))
    for name, run in sized:
        found = part(name, run)
        found.add_argument("--preset", default="0.9M")
        found.add_argument("--device", default="cpu")
        found.add_argument("--batch-size", type=int)
        found.add_argument("--context", type=int)
        found.add_argument("--steps", type=int, default=200)
        found.add_argument("--seeds", type=int, default=1)
        found.add_argument("--rounds", type=int, default=10)
        found.add_argument("--pairs", type=int, default=40)
        found.add_argument("--data")
        found.add_argument("--data-bytes", type=int)
        found.add_argument("--without", action="append", default=[])
    timed = parts.choices["equal-time"]
    timed.add_argument("--seconds", type=float, default=150.0)
    timed.add_argument("--seed", type=int, default=0)
    timed.add_argument("--pilot-steps", type=int, default=equal_time.PILOT_STEPS)
    for name in ("bf16", "fused", "compile"):
        timed.add_argument(f"--{name}", action="store_true", default=None)
    judged = part("acceptance", show_acceptance)
    judged.add_argument("comparisons", type=Path, nargs="+")
    judged.add_argument("--stack", type=Path)
    judged.add_argument("--memory", type=Path)
    return parser


def main() -> int:
    """Run one part; 2 means bad input, said in one line."""
    args = build_parser().parse_args()
    try:
        value, told = args.run(args)
    except (InputError, ConfigError) as error:
        say(f"error: {error}")
        return 2
    say(told)
    print(json.dumps(jsonable(value), allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
