"""Models and data for `hpt train`, `compare`, `validate` and `bench`, by name.

Reading order: `base` (what a task is), `optim` (optimizers and schedules by name); language: `text`, `tokens`,
`language`, `gpt` and `modern`, then `llama`, `lora`, `pretrained` and `finetune`, then `sentences`, `wordpieces` and
`bert`; images: `images`, `networks` and `vision`; equations: `mlp`, `regression`, `equations` and `pinn`. A leaf of the
package: it imports nothing from the rest of the library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from .base import Batch, Task, TaskDefaults, TaskSettings, unknown_name, with_steps
from .equations.pinn import PinnTask
from .equations.problems import PROBLEMS
from .equations.regression import RegressionTask
from .images.task import RECIPES, ImageTask
from .language.finetune import FinetuneTask
from .language.gpt import GptTask
from .language.modern import ModernGptTask
from .recipes import build_optimizer, build_scheduler, lr_factor
from .sentences.bert import BertTask

TASKS: dict[str, Callable[[TaskSettings], Task]] = {
    "gpt": GptTask,
    "gpt-modern": ModernGptTask,
    "finetune": FinetuneTask,
    "bert": BertTask,
    **{name: functools.partial(ImageTask, name) for name in RECIPES},
    "regression": RegressionTask,
    **{name: functools.partial(PinnTask, name) for name in PROBLEMS},
}


def make_task(name: str, settings: TaskSettings | None = None) -> Task:
    """Return the task called `name`.

    Args:
        name: a key of `TASKS`.
        settings: what differs from the task's own values.

    Raises:
        ValueError: unknown name, or settings that do not fit the task or its data.
        FileNotFoundError: the data are not there.
        ModuleNotFoundError: the task needs an optional library that is not installed.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name](settings or TaskSettings())


__all__ = [
    "TASKS",
    "Batch",
    "Task",
    "TaskDefaults",
    "TaskSettings",
    "build_optimizer",
    "build_scheduler",
    "lr_factor",
    "make_task",
    "with_steps",
]
