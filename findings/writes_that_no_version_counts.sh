#!/usr/bin/env bash
# BatchNorm writes its running statistics in every forward, and the tensors' version counters do not move.
#
# Version: torch 2.13.0.
# Done: one forward in train mode of BatchNorm1d, with and without gradients; one of Embedding(max_norm=1) in eval mode below
# inference_mode.
# Seen: running_mean and running_var get new values, their _version stays where it was; only num_batches_tracked counts (by 1).
# Embedding is the opposite case: its forward shortens the rows it looks up, in place, in eval mode and in inference
# mode too, so that a forward that was to judge weights changes them.
# Why it surprises: _version is what autograd itself relies on to notice writes in place, and "eval" and "inference" read as
# "nothing moves".
# To whoever wraps training: "has anybody written to this tensor since?" cannot be answered by _version for buffers, values must be
# compared; and a forward that only measures has to be followed by putting back weights as well as buffers.
# Here: tests/test_whole_state.py holds that buffers come back however a forward changes them.
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

for gradients in (True, False):
    norm = torch.nn.BatchNorm1d(3)
    names = [name for name, _ in norm.named_buffers()]
    before = [(buffer.clone(), buffer._version) for buffer in norm.buffers()]
    with torch.set_grad_enabled(gradients):
        norm(torch.tensor([[1.0, 2.0, 3.0], [3.0, 5.0, 9.0]]))
    changed = [name for name, b, (old, _) in zip(names, norm.buffers(), before) if not torch.equal(b, old)]
    counted = [name for name, b, (_, version) in zip(names, norm.buffers(), before) if b._version != version]
    hold(f"gradients {gradients}: changed", changed, ["running_mean", "running_var", "num_batches_tracked"])
    hold(f"gradients {gradients}: counted", counted, ["num_batches_tracked"])

table = torch.nn.Embedding(3, 2, max_norm=1.0).eval()
with torch.no_grad():
    table.weight.fill_(2.0)
with torch.inference_mode():
    table(torch.tensor([1]))
hold("rows of 2 after a look at the second", [round(row.norm().item(), 3) for row in table.weight.detach()], [2.828, 1.0, 2.828])
END
