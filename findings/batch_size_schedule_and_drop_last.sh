#!/usr/bin/env bash
# A batch-size schedule does nothing for a whole pass, and then leaves the next pass empty, if the loader drops its last batch.
#
# Versions: bs-scheduler 1.0.2, torch 2.13.0.
# Done: 64 samples, batches of 4, StepBS doubles the size after every two batches; the scheduler is stepped once per batch.
# Seen: with drop_last=False the sizes are 4 4 8 8 16 16 8, each change being felt by the very next batch.
# With drop_last=True the pass runs through with 16 batches of 4, the schedule counts all of them, and the size at its end is 65:
# the scheduler's own upper bound is one more than there are samples.  len(loader) is 0 and the second pass gives no batch,
# without an error or a warning.
# Why it surprises: drop_last is about the last batch only, and the scheduler's documentation asks for the same calls either way.
# The two differ because torch's BatchSampler looks at its size once per pass in one case and once per batch in the other.
# To whoever accelerates training: what a step costs and how noisy its loss is may change inside a pass or only at its end, so
# losses of neighbouring steps are comparable in one setting and not in the other; and a training loop that reads passes
# until a number of steps is reached would read empty ones for ever.
# Here: tests/test_passes.py holds that empty passes end a run in words.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch; raise SystemExit(torch.__version__.split("+")[0] != "2.13.0")' 2>/dev/null ||
    "$python" -m pip install -qq --target "$folder" torch==2.13.0 || exit 2
"$python" -m pip install -qq --no-deps --target "$folder" bs-scheduler==1.0.2 || exit 2
PYTHONPATH=$folder "$python" -W ignore - <<'END'
import sys

from bs_scheduler import StepBS
from torch.utils.data import DataLoader


def one_line(kind, error, trace):
    print(f"changed: {kind.__name__}: {error}".splitlines()[0], file=sys.stderr)


def hold(what, seen, expected):
    print(f"{what}: {seen}")
    if seen != expected:
        sys.exit(f"changed: {what}: {seen}, was {expected}")


sys.excepthook = one_line

for drop_last, first, size, second in ((False, [4, 4, 8, 8, 16, 16, 8], 32, [32, 32]), (True, [4] * 16, 65, [])):
    loader = DataLoader(list(range(64)), batch_size=4, drop_last=drop_last)
    schedule = StepBS(loader, step_size=2, gamma=2.0)
    sizes = []
    for batch in loader:
        sizes.append(len(batch))
        schedule.step()
    hold(f"drop_last={drop_last}, first pass", sizes, first)
    hold(f"drop_last={drop_last}, size after it", loader.batch_size, size)
    hold(f"drop_last={drop_last}, second pass", [len(batch) for batch in loader], second)
END
