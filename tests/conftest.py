"""One thread and fixed seeds, so that bitwise comparisons mean something."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

# Under CI the same examples every time: a new one found there would fail a change that did not cause it.  Elsewhere
# the search goes on.  No deadlines: a busy machine is not a wrong program.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "search")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """From before the first fixture of a module: what it computes is compared with what tests compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _repeatable(_one_thread: None) -> Iterator[None]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32, "later tests would train in other numbers"


class _Collecting(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def notices() -> Iterator[list[str]]:
    """What would have been warned of within a step where warnings are errors: it goes to the log and does not raise.

    A test that expects some takes them out; all others must have none.
    """
    handler, logger = _Collecting(), logging.getLogger("hybrid_predict_trainer.notices")
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)
    assert not handler.messages
