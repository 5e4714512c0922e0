#!/usr/bin/env bash
# The learned scale of Mechanic is saved under the old run's tensors themselves, and no new optimizer can find it.
#
# Versions: mechanic-pytorch 0.0.1, torch 2.13.0.
# Done: mechanize(SGD) trains a small network for five steps; state_dict goes through torch.save and torch.load into a second optimizer of
# the same kind on an equal model.
# Seen: below state["_mechanic"], beside its scalars, stand four entries whose keys are the four parameters.  Saved and loaded without
# complaint, the keys become four new tensors that belong to nobody: none of them is a parameter of the new model.
# The reference point from which every weight is computed (weight = reference + scale * sum of updates) is lost to them.
# Why it surprises: torch turns parameters into numbers in state_dict so that another run can match them, but only at the top of
# the state; one level down they stay tensors, equal in value and useless as names.
# To whoever wraps training: copying what stands under each parameter copies nothing here, and loading a state_dict is no proof that it
# was understood.  It also computes weights from a reference of its own, so anything that moves weights beside it is undone.
# Here: tests/test_optimizer_memory.py holds that optimizers which compute weights from a copy are recognised and left alone.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 || exit 2
"$python" -m pip install -qq --no-deps --target "$folder" mechanic-pytorch==0.0.1 || exit 2
PYTHONPATH=$folder "$python" -W ignore - <<'END'
import sys

import io


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


def hold(what, seen, expected):
    print(f"{what}: {seen}")
    if seen != expected:
        sys.exit(f"changed: {what}: {seen}, was {expected}")


sys.excepthook = one_line

import torch
from mechanic_pytorch import mechanize


def made():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return model, mechanize(torch.optim.SGD)(model.parameters(), lr=0.01)


def owners(model, optimizer):
    keys = [key for key in optimizer.state["_mechanic"] if isinstance(key, torch.Tensor)]
    return len(keys), sum(any(key is p for p in model.parameters()) for key in keys)


model, optimizer = made()
for i in range(5):
    optimizer.zero_grad()
    model(torch.randn(8, 4, generator=torch.Generator().manual_seed(i))).square().mean().backward()
    optimizer.step()
hold("tensors as keys, and those that are parameters", owners(model, optimizer), (4, 4))
file = io.BytesIO()
torch.save(optimizer.state_dict(), file)
file.seek(0)
model, optimizer = made()
optimizer.load_state_dict(torch.load(file, weights_only=False))
hold("the same after save and load", owners(model, optimizer), (4, 0))
END
