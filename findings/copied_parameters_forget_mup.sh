#!/usr/bin/env bash
# A copy of a model scaled by muP no longer runs, because copying a parameter drops what was written on it.
#
# Versions: mup 1.0.0, torch 2.13.0.
# Done: set_base_shapes on a three-layer network, which notes each parameter's scaling as an attribute of the parameter
# itself; then copy.deepcopy(model) and torch's AveragedModel(model).
# Seen: the original runs; the copy's parameters have no such attribute and its forward raises AssertionError, and so does that of
# the averaged model.  A pickled model keeps the attribute, and so does an ordinary tensor under deepcopy; only a
# Parameter under deepcopy does not.
# Why it surprises: tensors and modules keep their attributes when copied, parameters alone do not; and averaging weights is meant for
# any module.
# To whoever wraps training: a model that is judged on a copy loses marks of this kind (optimizers that sort parameters by
# a mark see none, with or without an error).  Move weights within the one model and put them back, or carry __dict__ over.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 || exit 2
"$python" -m pip install -qq --no-deps --target "$folder" mup==1.0.0 numpy==2.4.6 pyyaml==6.0.3 tqdm==4.67.1 \
    pandas==2.3.3 python-dateutil==2.9.0.post0 pytz==2025.2 six==1.17.0 || exit 2
PYTHONPATH=$folder "$python" -W ignore - <<'END'
import sys

import copy
import io


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


def hold(what, seen, expected):
    print(f"{what}: {seen}")
    if seen != expected:
        sys.exit(f"changed: {what}: {seen}, was {expected}")


sys.excepthook = one_line

import mup
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Network(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.readout = mup.MuReadout(width, 1)

    def forward(self, x):
        return self.readout(self.body(x))


def runs(model):
    try:
        model(torch.ones(2, 4))
    except AssertionError:
        return False
    return True


model = Network(64)
mup.set_base_shapes(model, Network(8), delta=Network(16))
file = io.BytesIO()
torch.save(model, file)
file.seek(0)
hold("the model runs", runs(model), True)
hold("read back from a file it runs", runs(torch.load(file, weights_only=False)), True)
hold("its deepcopy runs", runs(copy.deepcopy(model)), False)
hold("its average runs", runs(AveragedModel(model)), False)
tensor, parameter = torch.ones(2), nn.Parameter(torch.ones(2))
tensor.mark = parameter.mark = 1
hold("marks kept: tensor, parameter", tuple(hasattr(copy.deepcopy(t), "mark") for t in (tensor, parameter)), (True, False))
END
