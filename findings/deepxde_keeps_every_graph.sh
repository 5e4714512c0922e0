#!/usr/bin/env bash
# DeepXDE's derivatives keep the graph of every network output they were taken of, until dde.grad.clear() is called.
#
# Versions: deepxde 1.15.0 with its PyTorch backend, torch 2.13.0.
# Done: the residual of a heat equation from dde.grad.jacobian and dde.grad.hessian at new outputs of a small network, with backward,
# twenty times, in a loop of one's own; nothing of an evaluation is kept by the loop.  The same with plain torch.autograd.grad.
# Seen: all twenty outputs, and their graphs, are still alive; after dde.grad.clear() none is.  With autograd.grad none ever is.
# Why it surprises: the derivatives look like functions and are a table with tensors as its keys.  dde.Model clears it itself, so that
# only who evaluates the equations elsewhere (a validation loss, an optimizer that asks for losses at other weights, a loop of one's
# own) sees memory grow by one graph per evaluation, with no error until it runs out.
# To whoever accelerates training: judging a step takes evaluations beside the loop's own, and each of them leaks.
# Here: examples/pinn_deepxde.py clears the table at each evaluation; tests/test_adapter_deepxde.py holds that nothing stays alive.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 || exit 2
"$python" -m pip install -qq --target "$folder" deepxde==1.15.0 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.8.0 \
    scikit-optimize==0.10.2 matplotlib==3.11.2 || exit 2
DDE_BACKEND=pytorch PYTHONPATH=$folder "$python" -W ignore - <<'END'
import contextlib
import gc
import io
import sys
import weakref

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    import deepxde as dde
import torch


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


sys.excepthook = one_line
torch.manual_seed(0)
net = dde.nn.FNN([2, 16, 16, 1], "tanh", "Glorot normal")
x = torch.rand(100, 2, requires_grad=True)


def by_deepxde(u):
    return dde.grad.jacobian(u, x, i=0, j=1) - dde.grad.hessian(u, x, i=0, j=0)


def by_torch(u):
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return first[:, 1:] - second[:, :1]


def outputs_of(residual):
    seen = []
    for _ in range(20):
        u = net(x)
        seen.append(weakref.ref(u))
        residual(u).square().mean().backward()
        del u
    return seen


def alive(seen):
    gc.collect()
    return sum(ref() is not None for ref in seen)


def hold(what, seen, expected):
    print(f"{what}: {seen}")
    if seen != expected:
        sys.exit(f"changed: {what}: {seen}, was {expected}")


u = net(x)
hold("both give the same residual", torch.allclose(by_deepxde(u), by_torch(u), atol=1e-6), True)
del u
dde.grad.clear()
hold("outputs alive after twenty evaluations, autograd.grad", alive(outputs_of(by_torch)), 0)
seen = outputs_of(by_deepxde)
hold("the same, dde.grad", alive(seen), 20)
dde.grad.clear()
hold("the same after dde.grad.clear()", alive(seen), 0)
END
