"""What a probe says where rewards of rollouts are maximized: pilots there are ruled by chance, so it was measured once.

The score of a policy-gradient run differs more between two orders of its prompts than any rule of jumps has earned, and
its loss says nothing of the policy.  A probe of some minutes would be a coin; the figures below are five paired seeds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

COMMAND = "hpt bench regimes --regime rl"
SETTING = "three-digit addition, 0.1 M weights, policy gradient at its tuned rate, 300 rollouts, 5 paired seeds"


@dataclass(frozen=True, slots=True)
class Measured:
    """S by rollouts against a plain run at its tuned rate, with its 95 % interval."""

    what: str
    speedup: float
    low: float | None
    high: float | None


#: As ``COMMAND`` has printed them (docs/benchmarks.md).
JUMPS = (
    Measured("window of 40 shrunken by its scatter, 10 steps further", 0.98, 0.89, 1.07),
    Measured("the same, judged by importance weights: none of 30 kept, S by tokens", 0.96, 0.96, 0.96),
    Measured("null: the same window with random signs", 0.98, 0.95, 1.02),
    Measured("null: the same window of another seed", 1.10, 1.04, 1.16),
)
SIZES = (
    Measured("the trainer's defaults (no jump proposed)", 1.08, 1.01, 1.16),
    Measured("the same, S by tokens", 1.04, 0.97, 1.11),
    Measured("twice the rate (a bound)", 0.67, None, None),
    Measured("linear decay instead of wsd", 0.93, 0.89, 0.97),
)


def verdicts() -> dict[str, Any]:
    """Plain numbers and texts: no-go for jumps, and what step sizes are worth."""
    return {
        "regime": "rewards", "setting": SETTING, "command": COMMAND,
        "jumps": {"verdict": "no-go", "measured": [asdict(m) for m in JUMPS]},
        "sizes": {"verdict": "go", "measured": [asdict(m) for m in SIZES]},
    }  # fmt: skip


def format_verdicts() -> str:
    """What a person reads."""

    def line(m: Measured) -> str:
        return f"  {m.what}: S {m.speedup:.2f}" + ("" if m.low is None else f" [{m.low:.2f}, {m.high:.2f}]")

    return "\n".join([
        "regime: rewards (no pilots: what was measured once)", "jumps: no-go", *map(line, JUMPS),
        "step sizes: go by rollouts, not shown by tokens", *map(line, SIZES),
        "tune rate and schedule first: both are worth more than any jump",
        f"measured on {SETTING}; '{COMMAND}' repeats it",
    ])  # fmt: skip
