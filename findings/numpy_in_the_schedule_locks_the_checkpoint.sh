#!/usr/bin/env bash
# A cosine written with numpy in LambdaLR makes a checkpoint that torch.save writes and torch.load refuses.
#
# Versions: torch 2.13.0, numpy 2.4.6.
# Done: LambdaLR whose function returns numpy's cos, then torch.save of the optimizer's state_dict and torch.load with its defaults; the
# same with math.cos.
# Seen: group["lr"] becomes numpy.float64, which prints and counts as a float.  Saving says nothing.  Loading raises
# UnpicklingError, "Weights only load failed", for optimizer and schedule.  With math.cos both load.
# Why it surprises: the user never put anything but a number in; the refusal comes in the next session, when the run is to go on,
# and names a type that stands nowhere in the script.
# To whoever wraps training: rates and losses handed in by others are numbers of any library; make them plain floats before
# they are stored, and read a checkpoint back once when it is written, not when it is needed.
# Here: tests/test_whole_state.py holds that rates of any library are stored and come back.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 || exit 2
"$python" -m pip install -qq --no-deps --target "$folder" numpy==2.4.6 || exit 2
PYTHONPATH=$folder "$python" -W ignore - <<'END'
import sys

import io
import math
import pickle


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


def hold(what, seen, expected):
    print(f"{what}: {seen}")
    if seen != expected:
        sys.exit(f"changed: {what}: {seen}, was {expected}")


sys.excepthook = one_line

import numpy
import torch


def loads(cosine):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + cosine(math.pi * step / 10)))
    results = [type(optimizer.param_groups[0]["lr"]).__name__]
    for thing in (optimizer, schedule):
        file = io.BytesIO()
        torch.save(thing.state_dict(), file)
        file.seek(0)
        try:
            torch.load(file)
            results.append("loads")
        except pickle.UnpicklingError:
            results.append("refused")
    return results


hold("math.cos: rate, optimizer, schedule", loads(math.cos), ["float", "loads", "loads"])
hold("numpy.cos: rate, optimizer, schedule", loads(numpy.cos), ["float64", "refused", "refused"])
END
