"""``hpt plan``: which settings a model fits a card's memory with."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

from ..experiments import plan, plan_check
from ..experiments.arms.options import InputError, as_input_error
from .arguments import NOT_MET, OK, show

#: The hardware table of the founding document: card, memory in GB, weights in M that it says fit without and with.
CARDS = (
    ("RTX 3060", 12, 350, 1000), ("RTX 3080", 10, 300, 800), ("RTX 4080", 16, 500, 1500), ("RTX 5080", 16, 500, 2000),
    ("RTX 4090", 24, 1000, 3000),
)  # fmt: skip
#: What each column of the table is trained with; one sequence of 1,024 tokens per step.
_LEAST = plan.Setup(batch_size=1, bf16=True, checkpointing=True, offload=True)
COLUMNS = {
    "plain float32": plan.Setup(batch_size=1, ours=False),
    "plain, least": replace(_LEAST, offload=False, eight_bit=True, ours=False),
    "ours float32": plan.Setup(batch_size=1),
    "ours bf16, offload, checkpointing": _LEAST,
    "ours, least (8 bit too)": replace(_LEAST, eight_bit=True),
}
_UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


def run(args: argparse.Namespace) -> int:
    """Estimate, check or print the table.

    Raises:
        InputError: a size that cannot be read, or nothing to plan.
        ConfigError: no such task or preset.
    """
    if args.check:
        return _check(args)
    if args.table:
        return _table(args)
    if (args.params is None) == (args.task is None):
        raise InputError("give a size (--params 1B) or a task's model (--task gpt --preset 10M), one of both")
    memory = size_of(args.gpu, "--gpu")
    with as_input_error():
        subject = (
            plan.of_task(args.task, preset=args.preset, context=args.context)
            if args.params is None
            else plan.of_size(round(size_of(args.params, "--params")), context=args.context or 1024)
        )
        setup = plan.Setup(batch_size=args.batch_size, ternary=args.ternary)
        tried, fits = plan.first_that_fits(plan.options(subject, setup), memory * plan.USABLE)
    value = {
        "subject": subject.name, "gpu_bytes": memory, "usable_bytes": memory * plan.USABLE, "fits": fits,
        "estimates": [_row(one) for one in tried],
    }  # fmt: skip
    show(args, value, lambda: _text(subject, tried, memory, fits))
    return OK


def size_of(text: str, flag: str) -> float:
    """``1B``, ``350M``, ``16GB`` or a number.

    Raises:
        InputError: it is none of these.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)([KMGBT]?)B?", text.strip(), re.IGNORECASE)
    value = float(found[1]) * _UNITS.get(found[2].upper(), 1) if found else 0.0
    if not 1e3 <= value <= 1e14:
        raise InputError(f"{flag} {text}: a size such as 350M, 1B or 16GB is needed")
    return value


def _row(one: plan.Estimate) -> dict[str, object]:
    setup = one.setup
    return {
        "num_parameters": one.num_parameters, "batch_size": setup.batch_size, "bf16": setup.bf16,
        "gradient_checkpointing": setup.checkpointing, "activation_offload": setup.activation_offload,
        "ternary": setup.ternary, "offload": setup.offload, "eight_bit": setup.eight_bit,
        "total_bytes": one.total, "host_bytes": one.host, "parts": one.parts,
    }  # fmt: skip


def _words(setup: plan.Setup) -> str:
    on = {
        "ternary": setup.ternary, "bf16": setup.bf16, "offload": setup.offload, "checkpointing": setup.checkpointing,
        "activation offload": setup.activation_offload, "8 bit": setup.eight_bit,
    }  # fmt: skip
    return ", ".join([f"batch {setup.batch_size}", *(name for name, there in on.items() if there)])


def _text(subject: plan.Subject, tried: list[plan.Estimate], memory: float, fits: bool) -> str:
    usable = memory * plan.USABLE
    lines = [subject.name, f"of {memory / 1e9:.3g} GB {usable / 1e9:.3g} are counted on", ""]
    for one in tried:
        lines.append(f"{one.total / 1e9:8.2f} GB  host {one.host / 1e9:6.2f} GB  {_words(one.setup)}")
    last = tried[-1]
    lines += ["", f"the last one, {'which fits' if fits else 'which does not fit either'}:"]
    lines += [f"{size / 1e9:8.2f} GB  {name}" for name, size in last.parts.items() if size]
    return "\n".join([*lines, "", *_patch(last.setup)]) if fits else "\n".join(lines)


def _patch(setup: plan.Setup) -> list[str]:
    """Settings as TOML; what is no setting of the trainer is a comment."""
    flags = {
        "--bf16": setup.bf16, "--gradient-checkpointing": setup.checkpointing, "--ternary": setup.ternary,
        "--optimizer adamw8bit": setup.eight_bit,
    }  # fmt: skip
    named = " ".join([f"--batch-size {setup.batch_size}", *(flag for flag, there in flags.items() if there)])
    lines = [f"# hpt train {named} --config FILE, with FILE:"]
    if setup.activation_offload:
        lines += ["[training]", "activation_offload = true"]
    return [*lines, "[predictor]", f"offload = {str(setup.offload).lower()}"]


def _check(args: argparse.Namespace) -> int:
    rows = []
    if not args.json:
        print(f"{'model':<6} {'loop':<6} {'settings':<18} {'estimated':>10} {'measured':>10} {'error':>7}", flush=True)
    for row in plan_check.rows():
        rows.append(row)
        if not args.json:  # minutes in all: each as soon as it is known
            print(_check_line(row), flush=True)
    if args.json:
        show(args, {"tolerance": plan_check.TOLERANCE, "rows": rows}, str)
    return OK if all(row["within"] for row in rows) else NOT_MET


def _check_line(row: plan_check.Row) -> str:
    remedies = ("bf16", "checkpointing", "activation_offload", "ternary")
    settings = next((name for name in remedies if row[name]), "-").replace("_", " ")
    sizes = f"{row['estimated_bytes'] / 1e6:>7.2f} MB {row['measured_bytes'] / 1e6:>7.2f} MB"
    return f"{row['preset']:<6} {'ours' if row['ours'] else 'plain':<6} {settings:<18} {sizes} {row['error']:>+7.1%}"


def _table(args: argparse.Namespace) -> int:
    if not args.json:
        heads = ["card", "GB", "said: standard", "said: ours", *COLUMNS]
        print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|", flush=True)
    rows = []
    for card, gigabytes, plain, with_ours in CARDS:
        usable = gigabytes * 1e9 * plan.USABLE
        found = {name: plan.largest_that_fits(usable, setup, context=1024) for name, setup in COLUMNS.items()}
        said = {"said_plain": plain * 10**6, "said_ours": with_ours * 10**6}
        rows.append({"card": card, "gigabytes": gigabytes, **said, "largest": found})
        if not args.json:
            sizes = " | ".join(f"{n / 1e6:,.0f} M" for n in (*said.values(), *found.values()))
            print(f"| {card} | {gigabytes} | {sizes} |", flush=True)
    if args.json:
        show(args, {"rows": rows}, str)
    return OK
