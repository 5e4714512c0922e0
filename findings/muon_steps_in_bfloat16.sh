#!/usr/bin/env bash
# torch's Muon computes its step in bfloat16 whatever the weights are, and the step is the shorter the lower the gradient's rank.
#
# Versions: torch 2.13.0.
# Done: one step of torch.optim.Muon (no momentum, no decay) on float64 matrices, beside the same five iterations of the published
# polynomial in float64; the step of a square matrix beside that of its transpose; the step's root mean square with
# adjust_lr_fn="match_rms_adamw" for gradients of full and of low rank.
# Seen: 1.2 to 1.4 % off the float64 result, a square matrix and its transpose 1.4 to 1.7 % apart; a 64 x 64 gradient of rank 64
# steps 0.17 (0.2 is promised, as Adam's), of rank 4 a quarter of 0.2, of rank 1 an eighth and a little.
# Why it surprises: no setting, no warning and no dtype of the state says bfloat16: the momentum buffer is float64 as the weights;
# and "a rate tuned for AdamW can be taken over" holds for full rank only.
# To whoever accelerates training: differences of two runs, secants and cosines of steps carry a noise of a percent that float64
# does not take away; a matrix that is stored transposed trains differently; and the first steps, batches of a few samples and adapters
# have gradients of low rank, so the same rate means steps several times shorter there.
# Here: docs/optimizers.md says it beside Muon; a learned multiplier is never raised with Muon (tests/test_matrix_step.py, test_multiplier.py).
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 numpy==2.4.6 || exit 2
PYTHONPATH=$folder "$python" -W ignore - <<'END'
import math
import sys

import torch


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


def hold(what, seen, low, high):
    print(f"{what}: {seen:.4f}")
    if not low <= seen <= high:
        sys.exit(f"changed: {what}: {seen:.4f}, was between {low} and {high}")


sys.excepthook = one_line
generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def step_of(gradient, **options):
    """Minus what one step does to weights of zero, and the dtype of the momentum."""
    p = torch.nn.Parameter(torch.zeros_like(gradient))
    optimizer = torch.optim.Muon([p], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **options)
    p.grad = gradient.clone()
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float64
    return -p.detach()


def in_float64(gradient):
    a, b, c = 3.4445, -4.775, 2.0315
    x = gradient / gradient.norm()
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


for size in (64, 256):
    gradient = normal(size, size)
    exact, step = in_float64(gradient), step_of(gradient)
    hold(f"{size} x {size}, relative error", ((step - exact).norm() / exact.norm()).item(), 0.008, 0.02)
    turned = step_of(gradient.T.contiguous()).T
    hold(f"{size} x {size}, its transpose, relative difference", ((step - turned).norm() / exact.norm()).item(), 0.008, 0.025)
for rank in (64, 4, 1):
    gradient = normal(64, rank) @ normal(rank, 64)
    size = step_of(gradient, adjust_lr_fn="match_rms_adamw").square().mean().sqrt().item()
    promised = 0.2 * math.sqrt(rank / 64)
    hold(f"rank {rank} of 64, root mean square of a step at rate 1", size, 0.8 * promised, 1.4 * promised)
END
