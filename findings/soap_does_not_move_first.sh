#!/usr/bin/env bash
# SOAP's first step changes no weight, although it uses up a gradient and counts as a step.
#
# Versions: pytorch_optimizer 4.1.0, torch 2.13.0.
# Done: SOAP, Shampoo, SPlus and AdamW, lr 0.01, on a small network; the largest change of its weights at each of three steps.
# Seen: SOAP 0, then 0.019 and 0.014: the first gradient only starts the eigenbases.  All others move from the first step.
# Why it surprises: there is no error and no setting for it; the loss of step two is that of step one on other data.
# To whoever accelerates training: a direction, cosine or norm taken from the first step is 0/0; a schedule that warms up from its
# first step spends it on nothing; on a fixed batch the loss stands still once, which looks like convergence; and a check "did
# the optimizer move the weights" calls a healthy run broken.
# Here: tests/test_step_scale.py holds that a cosine is zero where nothing moved.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 || exit 2
"$python" -m pip install -qq --no-deps --target "$folder" pytorch_optimizer==4.1.0 numpy==2.4.6 || exit 2
PYTHONPATH=$folder "$python" -W ignore - <<'END'
import sys

import pytorch_optimizer
import torch


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


def hold(what, seen, expected):
    print(f"{what}: {seen}")
    if seen != expected:
        sys.exit(f"changed: {what}: {seen}, was {expected}")


sys.excepthook = one_line


def moved(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = kind(model.parameters(), lr=0.01)
    changes = []
    for i in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()
        changes.append(max((p - b).abs().max().item() for p, b in zip(model.parameters(), before)))
    print(kind.__name__, *(f"{change:.4f}" for change in changes))
    return [change > 0 for change in changes]


hold("SOAP moves", moved(pytorch_optimizer.SOAP), [False, True, True])
for kind in (pytorch_optimizer.Shampoo, pytorch_optimizer.SPlus, torch.optim.AdamW):
    hold(f"{kind.__name__} moves", moved(kind), [True, True, True])
END
