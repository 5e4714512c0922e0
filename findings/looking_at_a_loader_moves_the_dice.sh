#!/usr/bin/env bash
# Asking a data loader that does not shuffle for an iterator draws from torch's global generator.
#
# Version: torch 2.13.0.
# Done: torch.manual_seed(0), iter(DataLoader([1, 2, 3])) with shuffle=False, no worker processes and no batch read, then torch.rand(1);
# once more with a generator of the loader's own.
# Seen: rand gives 0.0885 instead of 0.4963: one number was drawn for seeds of worker processes that do not exist.  Reading batches
# draws nothing more.  With generator=torch.Generator() the global one stays where it was.
# Why it surprises: nothing about this loader is random.
# To whoever wraps training: peeking at one batch, counting a loader by going through it, or starting a pass earlier or once more
# changes every dropout mask and every noise after it, so a run is no longer the plain one bit for bit although it sees the
# same data in the same order.  Take the state of the generator before and put it back.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 || exit 2
PYTHONPATH=$folder "$python" -W ignore - <<'END'
import sys

import torch
from torch.utils.data import DataLoader


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


def hold(what, seen, expected):
    print(f"{what}: {seen}")
    if seen != expected:
        sys.exit(f"changed: {what}: {seen}, was {expected}")


sys.excepthook = one_line


def after(look):
    torch.manual_seed(0)
    look()
    return round(torch.rand(1).item(), 4)


hold("untouched", after(lambda: None), 0.4963)
hold("an iterator, no batch", after(lambda: iter(DataLoader([1, 2, 3]))), 0.0885)
hold("an iterator, all batches", after(lambda: list(DataLoader([1, 2, 3]))), 0.0885)
hold("with a generator of its own", after(lambda: iter(DataLoader([1, 2, 3], generator=torch.Generator()))), 0.4963)
END
