#!/usr/bin/env bash
# If the first score is NaN, Ignite's Checkpoint keeps that model as its best for ever; for its EarlyStopping a NaN is an improvement.
#
# Versions: pytorch-ignite 0.5.5, torch 2.13.0.
# Done: Checkpoint(n_saved=1, score_function=...) sees scores NaN, 1, 2, 3; a new one sees 1, NaN, 2; EarlyStopping(patience=2)
# sees 1, 2, NaN, 0.
# Seen: of NaN, 1, 2, 3 only m_nan.pt is ever written.  A NaN later on is passed over: m_1.0000.pt, m_2.0000.pt.
# EarlyStopping takes NaN as its new best score with a patience of 0 used, and after it the 0 as better still: the 2 is forgotten.
# Why it surprises: every comparison with NaN is false, and the two ask opposite questions ("is it greater?", "is it no greater?"),
# so that the same number is the worst for one and the best for the other.
# To whoever accelerates training: an attempt that diverges may score NaN once and come back by a rollback; whatever keeps best
# scores must ask isfinite first, not only compare.
# Here: tests/test_faults.py holds that a step whose loss is not finite is skipped and leaves the weights of the last good one.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 || exit 2
"$python" -m pip install -qq --no-deps --target "$folder" pytorch-ignite==0.5.5 packaging==25.0 || exit 2
PYTHONPATH=$folder "$python" -W ignore - <<'END'
import sys

import logging


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


def hold(what, seen, expected):
    print(f"{what}: {seen}")
    if seen != expected:
        sys.exit(f"changed: {what}: {seen}, was {expected}")


sys.excepthook = one_line

import torch
from ignite.engine import Engine
from ignite.handlers import Checkpoint, EarlyStopping

logging.disable(logging.CRITICAL)


class Names:
    def __init__(self):
        self.written = []

    def __call__(self, checkpoint, filename, metadata=None):
        self.written.append(filename)

    def remove(self, filename):
        pass


def engine():
    return Engine(lambda engine, batch: None)


def written(scores):
    names, evaluator = Names(), engine()
    best = Checkpoint({"m": torch.nn.Linear(1, 1)}, names, n_saved=1, score_function=lambda e: e.state.score)
    for evaluator.state.score in scores:
        best(evaluator)
    return names.written


nan = float("nan")
hold("written for nan 1 2 3", written([nan, 1.0, 2.0, 3.0]), ["m_nan.pt"])
hold("written for 1 nan 2", written([1.0, nan, 2.0]), ["m_1.0000.pt", "m_2.0000.pt"])
evaluator = engine()
stopping = EarlyStopping(patience=2, score_function=lambda e: e.state.score, trainer=engine())
best = []
for evaluator.state.score in (1.0, 2.0, nan, 0.0):
    stopping(evaluator)
    best.append((str(stopping.best_score), stopping.counter))
hold("best score and patience used after 1 2 nan 0", best, [("1.0", 0), ("2.0", 0), ("nan", 0), ("0.0", 0)])
END
