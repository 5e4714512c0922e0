"""``python -m tests.faults --scenarios N``: random scenarios; the first that breaks something is shown, shortened."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.stateful import run_state_machine_as_test

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults.machine import Scenario


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--scenarios", type=int, default=10_000, metavar="N", help="how many (default 10,000)")
    parser.add_argument("--steps", type=int, default=12, metavar="K", help="things that happen in each (default 12)")
    parser.add_argument("--seed", type=int, metavar="S", help="of the search; none: another one every time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tried = 0

    class Counted(Scenario):
        def teardown(self) -> None:
            nonlocal tried
            tried += 1
            super().teardown()

    if args.seed is not None:
        Counted._hypothesis_internal_use_seed = args.seed
    chosen = settings(
        max_examples=args.scenarios, stateful_step_count=args.steps, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), verbosity=Verbosity.normal, print_blob=True,
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    began = time.process_time()
    run_state_machine_as_test(Counted, settings=chosen)
    print(f"{tried} scenarios, 0 failures, {time.process_time() - began:.0f} s of CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
