"""Which function takes the step of which phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..records import Decision, Execution, Phase
from .correct_step import run_correct
from .predict_step import run_predict
from .real_step import run_full
from .state import Run

Executor = Callable[[Run, Any, Decision], Execution]


EXECUTORS: dict[Phase, Executor] = {
    Phase.WARMUP: run_full,
    Phase.FULL: run_full,
    Phase.PREDICT: run_predict,
    Phase.CORRECT: run_correct,
}
