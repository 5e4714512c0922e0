#!/usr/bin/env bash
# A fused AdamW pairs each weight with another weight's moments after a checkpoint through safetensors, without a word.
#
# Versions: torch 2.13.0 (CPU), safetensors 0.8.0.
# Done: a convolution weight in channels_last order takes three AdamW steps; its moments are in the same order.
# safetensors stores contiguous tensors only, so they are made contiguous, saved, read back and given to
# load_state_dict of a new AdamW on an equal weight.  Then both make one step with the same gradient.
# Seen: load_state_dict keeps the order it is given, and all values are equal, compared element by element.  The next step of
# the default implementation is equal bit for bit.  That of fused=True differs by about the learning rate (0.01).
# Why it surprises: values are equal, shapes are equal, no error; the fused step reads both tensors as they lie in memory.
# To whoever wraps training: a snapshot that clones contiguously, or any checkpoint format without strides, changes training
# silently; a test on equal values passes.  Give moments their weight's strides when they are put back.
# Here: tests/test_whole_state.py holds that moments keep their weight's order in memory, for fused, foreach and plain steps.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 || exit 2
"$python" -m pip install -qq --no-deps --target "$folder" safetensors==0.8.0 numpy==2.4.6 || exit 2
PYTHONPATH=$folder "$python" -W ignore - <<'END'
import sys

import pathlib
import tempfile


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


def hold(what, seen, expected):
    print(f"{what}: {seen}")
    if seen != expected:
        sys.exit(f"changed: {what}: {seen}, was {expected}")


sys.excepthook = one_line

import torch
from safetensors.torch import load_file, save_file

LAST = torch.channels_last
gradients = [torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(i)).to(memory_format=LAST) for i in range(4)]
for fused in (False, True):
    weight = torch.nn.Parameter(gradients[3].clone())
    optimizer = torch.optim.AdamW([weight], lr=0.01, fused=fused)
    for gradient in gradients[:3]:
        weight.grad = gradient.clone()
        optimizer.step()
    state = optimizer.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "moments.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in state["state"][0].items()}, file)
        state = {"state": {0: load_file(file)}, "param_groups": state["param_groups"]}
    again = torch.nn.Parameter(weight.detach().clone())
    resumed = torch.optim.AdamW([again], lr=0.01, fused=fused)
    resumed.load_state_dict(state)
    moments = [o.state[p]["exp_avg"] for o, p in ((optimizer, weight), (resumed, again))]
    hold(f"fused={fused}: moments are equal", torch.equal(*moments), True)
    hold(f"fused={fused}: strides of weight and moment", (again.stride(), moments[1].stride()), ((12, 1, 6, 3), (12, 4, 2, 1)))
    for p, o in ((weight, optimizer), (again, resumed)):
        p.grad = gradients[3].clone()
        o.step()
    difference = (weight - again).abs().max().item()
    print(f"fused={fused}: largest difference after one step {difference:.4f}")
    hold(f"fused={fused}: the next step is the same", difference < 1e-3, not fused)
END
