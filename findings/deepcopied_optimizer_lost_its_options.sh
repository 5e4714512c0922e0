#!/usr/bin/env bash
# copy.deepcopy of an optimizer succeeds, and the copy cannot make a step.
#
# Versions: pytorch_optimizer 4.1.0, torch 2.13.0.
# Done: each optimizer that takes a learning rate and nothing else trains a linear layer for two steps; then model and optimizer are
# copied together by copy.deepcopy, and the copy is asked for one more step.
# Seen: 106 of the 111 optimizers of the library that train so raise AttributeError (no attribute 'foreach', 'maximize' ...);
# torch's own AdamW goes on, though without the hook that was registered for its steps.
# Why it surprises: nothing is refused when the copy is made, state and groups are complete, and state_dict shows no difference.
# torch.optim.Optimizer is copied and pickled as three things (defaults, state, param_groups); whatever else a subclass
# keeps on itself is left behind, step hooks included, and this library keeps its switches there.
# To whoever wraps training: a trial run on a copy, or sending an optimizer to another process, needs the attributes carried
# over by hand, or a new optimizer with the state loaded into it.
# Here: tests/test_whole_state.py holds that snapshots and checkpoints are exact for every optimizer of this library.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 || exit 2
"$python" -m pip install -qq --no-deps --target "$folder" pytorch_optimizer==4.1.0 numpy==2.4.6 || exit 2
PYTHONPATH=$folder "$python" -W ignore - <<'END'
import sys

import collections
import copy


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


def hold(what, seen, expected):
    print(f"{what}: {seen}")
    if seen != expected:
        sys.exit(f"changed: {what}: {seen}, was {expected}")


sys.excepthook = one_line

import torch
from pytorch_optimizer.optimizer import OPTIMIZERS


def step(model, optimizer):
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


def after_copying(kind):
    torch.manual_seed(0)
    model, hooks = torch.nn.Linear(4, 3), []
    try:
        optimizer = kind(model.parameters(), lr=1e-3)
        optimizer.register_step_post_hook(lambda *_: hooks.append(1))
        step(model, optimizer)
        step(model, optimizer)
    except Exception:
        return "needs more than a learning rate"
    copies = copy.deepcopy((model, optimizer))
    try:
        step(*copies)
    except AttributeError:
        return "no step after copying"
    return f"a step after copying, {len(hooks)} calls of the hook in three steps"


results = collections.Counter(after_copying(kind) for kind in OPTIMIZERS.values())
print(dict(results))
hold("cannot step after copying", results["no step after copying"], 106)
hold("torch.optim.AdamW", after_copying(torch.optim.AdamW), "a step after copying, 2 calls of the hook in three steps")
END
