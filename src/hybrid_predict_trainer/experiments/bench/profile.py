"""``hpt bench profile``: where the CPU time of a step goes, and how many tensors it makes.

Two runs of the same steps.  The first asks the interpreter at every call whose code runs: time belongs to the folder of
this package whose code was entered last, or to the user's forward, backward and optimizer step inside of it.  Asking
costs several times what is measured, so shares count and absolute times don't; short functions look dearer than they
are.  The second counts torch's operations and the memory that they take anew, which is exact.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ...config.settings import HybridTrainerConfig
from ...trainer import HybridTrainer
from ..report.text import aligned
from .workloads import Workload, workload

PACKAGE = Path(__file__).resolve().parents[2]
#: What is not ours: any loop has it.
FORWARD, BACKWARD, OPTIMIZER, SCHEDULE = "user: forward", "user: backward", "user: optimizer", "user: schedule"


class _Stations:
    """Whose code runs, call by call."""

    def __init__(self, work: Workload) -> None:
        """Nothing has run yet."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.num_calls: Counter[str] = Counter()
        self._known: dict[CodeType, str | None] = {work.loss_fn.__code__: FORWARD}
        self._stack: list[str] = ["elsewhere"]
        self._since = 0.0

    @property
    def now(self) -> str:
        """The station that runs."""
        return self._stack[-1]

    def _of(self, code: CodeType) -> str | None:
        """The station of a function; None: that of its caller."""
        if code not in self._known:
            self._known[code] = _station(code)
        return self._known[code]

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """What ``sys.setprofile`` calls."""
        if event == "call":
            station = self._of(frame.f_code) or self._stack[-1]
            if self._stack[-1] in (FORWARD, OPTIMIZER, BACKWARD):
                station = self._stack[-1]
            self.num_calls[station] += 1
            if station != self._stack[-1]:
                self._switch()
            self._stack.append(station)
        elif event == "return" and len(self._stack) > 1:
            if self._stack[-2] != self._stack[-1]:
                self._switch()
            self._stack.pop()

    def begin(self) -> None:
        """From here on."""
        self._since = time.process_time()
        sys.setprofile(self)

    def end(self) -> None:
        """Up to here."""
        sys.setprofile(None)
        self._switch()


def _station(code: CodeType) -> str | None:
    file = Path(code.co_filename)
    if file.is_relative_to(PACKAGE):
        inside = file.relative_to(PACKAGE)
        return inside.parts[0].removesuffix(".py") if inside.parts[0] != "experiments" else None
    if code is Tensor.backward.__code__:
        return BACKWARD
    if "torch/optim/lr_scheduler" in file.as_posix():
        return SCHEDULE
    return OPTIMIZER if "torch/optim" in file.as_posix() else None


class _Counted(TorchDispatchMode):
    """Counts operations, and results that are memory of their own, by the station that runs."""

    def __init__(self, stations: _Stations) -> None:
        """Nothing counted yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_ops: Counter[str] = Counter()
        self.num_tensors: Counter[str] = Counter()
        self._stations = stations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        asked = sys.getprofile()
        sys.setprofile(None)  # what is done here is nobody's
        try:
            return self._count(func, args, kwargs or {})
        finally:
            sys.setprofile(asked)

    def _count(self, func: Any, args: Any, kwargs: Any) -> Any:
        found = func(*args, **kwargs)
        here = self._stations.now
        self.num_ops[here] += 1
        given = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        made = [t for t in tree_flatten(found)[0] if isinstance(t, Tensor)]
        self.num_tensors[here] += sum(t.untyped_storage().data_ptr() not in given for t in made)
        return found


def measure(name: str, *, num_steps: int = 300, skip: int = 100) -> dict[str, Any]:
    """Profile a run with default settings.

    Args:
        name: Of the workload.
        num_steps: Calls of ``step`` that count.
        skip: Calls before them.

    Raises:
        ValueError: no such workload.
    """
    work = workload(name)
    timed, counted = _Stations(work), _Stations(work)
    trainer = _run(work, skip, num_steps, timed.begin, timed.end)
    counts = _Counted(counted)

    def begin() -> None:
        counted.begin()
        counts.__enter__()  # type: ignore[no-untyped-call]

    def end() -> None:
        counts.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        counted.end()

    _run(work, skip, num_steps, begin, end)
    total = sum(timed.seconds.values())
    stations = sorted(timed.seconds, key=lambda s: -timed.seconds[s])
    rows = [
        {
            "station": s, "share_pct": 100 * timed.seconds[s] / total,
            "us_per_step": 1e6 * timed.seconds[s] / num_steps, "calls_per_step": timed.num_calls[s] / num_steps,
            "torch_ops_per_step": counts.num_ops[s] / num_steps,
            "new_tensors_per_step": counts.num_tensors[s] / num_steps,
        }
        for s in stations
    ]  # fmt: skip
    return {"workload": work.name, "about": work.about, "num_steps": num_steps, "rows": rows,
            "num_real_steps": trainer.statistics()["num_real_steps"]}  # fmt: skip


def _run(
    work: Workload, skip: int, num_steps: int, begin: Callable[[], None], end: Callable[[], None]
) -> HybridTrainer:
    model, optimizer, schedule = work.parts()
    assert isinstance(optimizer, Optimizer)
    trainer = HybridTrainer(model, optimizer, HybridTrainerConfig(), work.loss_fn, schedule)
    batches = work.batches()
    for _ in range(skip):
        trainer.step(next(batches))
    ready = [next(batches) for _ in range(num_steps)]
    begin()
    try:
        for batch in ready:
            trainer.step(batch)
    finally:
        end()
    return trainer


def format_text(result: Mapping[str, Any]) -> str:
    """The figures for a person."""
    cells = [[f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()] for row in result["rows"]]
    sums = ["all"] + [f"{sum(row[k] for row in result['rows']):.1f}" for k in list(result["rows"][0])[1:]]
    head = f"{result['workload']}: {result['about']}; {result['num_steps']} steps, the interpreter asked at every call"
    return "\n".join([head, *aligned(tuple(result["rows"][0]), [*cells, sums])])
