#!/usr/bin/env bash
# RAdam's first five steps are as large as the gradient, not as the learning rate; Rprop looks at the learning rate once.
#
# Version: torch 2.13.0.
# Done: one weight, RAdam with lr 0.001 and constant gradients 1 and 1000, eight steps.  Rprop with lr 0.01, constant gradient, whose
# rate is set to 0 after two steps.
# Seen: RAdam moves by 0.001 and by 1.0 in each of steps 1 to 5, then by 0.000026 in either case: 40 times, and 40,000 times, less
# from one step to the next.  Rprop goes on at rate 0 as before: 0.01, 0.012, 0.0144, 0.01728.
# Why it surprises: both are listed as adaptive, where a step has about the size of the rate whatever the gradient's scale; and every
# schedule drives Rprop without an error, and without any effect.
# To whoever accelerates training: what is learned from the first steps (a scale, a direction, a norm to compare with) is off by orders of
# magnitude under RAdam from the sixth step on; and a multiplier on the rate cannot be tested, tuned or taken back under Rprop.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 || exit 2
PYTHONPATH=$folder "$python" -W ignore - <<'END'
import sys

import torch


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


def hold(what, seen, expected):
    print(f"{what}: {seen}")
    if seen != expected:
        sys.exit(f"changed: {what}: {seen}, was {expected}")


sys.excepthook = one_line


def sizes(kind, rate, gradient, count, still=None):
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = kind([weight], lr=rate)
    seen = []
    for i in range(count):
        if i == still:
            optimizer.param_groups[0]["lr"] = 0.0
        weight.grad = torch.full_like(weight, gradient)
        before = weight.item()
        optimizer.step()
        seen.append(round(before - weight.item(), 6))
    return seen


RAdam, Rprop = torch.optim.RAdam, torch.optim.Rprop
hold("RAdam, gradient 1", sizes(RAdam, 0.001, 1.0, 8), [0.001] * 5 + [2.6e-05, 3.3e-05, 3.9e-05])
hold("RAdam, gradient 1000", sizes(RAdam, 0.001, 1000.0, 8), [1.0] * 5 + [2.6e-05, 3.3e-05, 3.9e-05])
hold("Rprop, rate 0 after two steps", sizes(Rprop, 0.01, 1.0, 4, still=2), [0.01, 0.012, 0.0144, 0.01728])
END
