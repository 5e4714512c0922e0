"""Whole runs of ``hpt train`` in processes of their own: killed, stopped, and with disks that refuse.

Processes are forked from a server that has loaded everything and computed nothing, which takes milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from ...keep import checkpoint, housekeeping
from ...records import CheckpointError, DivergenceError
from ..arms.options import InputError, Options
from ..train import Request, train
from .table import Case

#: Steps of a run that is killed again and again, and of one that is stopped once.
LONG, SHORT = 200, 4000
#: Most CPU seconds that a process lives before it is killed: some thirty steps, fifteen checkpoints.
LIFE_S = 0.3
#: What a process may take to begin, and to end, on a machine that does other things.
PATIENCE_S = 1800.0

#: As ``hpt`` reports errors.
STATUS: tuple[tuple[type[Exception], int], ...] = ((InputError, 2), (CheckpointError, 3), (DivergenceError, 4))


def request(steps: int, seed: int, *, behind: bool = False) -> Request:
    """A small physics-informed network, a checkpoint every other step; ``behind``: written while training goes on."""
    kept = ("checkpoint.save_interval=2", f"checkpoint.async_save={str(behind).lower()}")
    options = Options(task="pinn-poisson", batch_size=16, steps=steps, threads=1, set=kept)
    return Request(options=options, seed=seed)


def run(asked: Request, out: str, resume: bool, file_size: int | None, log: str) -> None:
    """Of a process: a command, its exit status, and what it says in a file.

    Args:
        asked: What to train.
        out: Folder of the run.
        resume: Go on with it.
        file_size: The disk is full where a file would be longer, bytes.
        log: File for what is said.
    """
    torch.set_num_threads(1)
    with open(log, "a", buffering=1) as told:  # noqa: PTH123 (it stays open for the life of the process)
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
        sys.stdout = sys.stderr = told
        if file_size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
        try:
            said = Request(options=Options(task=asked.options.task)) if resume else asked
            _, status = train(said, Path(out), resume=resume)
        except tuple(kind for kind, _ in STATUS) as error:
            told.write(f"error: {error}\n")
            status = next(code for kind, code in STATUS if isinstance(error, kind))
    os._exit(status)


class Runs:
    """The processes of one try."""

    def __init__(self, folder: Path, seed: int, steps: int, *, behind: bool = False) -> None:
        """Args: folder: of the try.  seed: of the run.  steps: of the run.  behind: see :func:`request`."""
        self.out, self.log = folder / "run", folder / "log"
        self.asked = request(steps, seed, behind=behind)

    def start(self, *, resume: bool, file_size: int | None = None, out: Path | None = None) -> ForkServerProcess:
        """Begin one."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        process = context.Process(
            target=run, args=(self.asked, str(out or self.out), resume, file_size, str(self.log)), daemon=True
        )
        process.start()
        return process

    def ended(self, process: ForkServerProcess) -> int | None:
        """Wait for its end; its exit status, or None if it does not come."""
        process.join(PATIENCE_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None
        return process.exitcode

    def finish(self) -> str | None:
        """Go on to the end; None, or what went wrong."""
        status = self.ended(self.start(resume=self.out.exists()))
        return None if status == 0 else f"--resume ended with {status}: {self.told()}"

    def told(self) -> str:
        """The end of what was said."""
        return self.log.read_text()[-200:] if self.log.exists() else ""

    def steps(self) -> list[int]:
        """Of its checkpoints that verify, oldest first.

        Raises:
            CheckpointError: one of them does not.
        """
        return [checkpoint.load(path).step for path in housekeeping.checkpoints(self.out / "checkpoints")]

    def last_step(self) -> int:
        """That was taken, a refused proposal included; 0 before the first."""
        lines = (self.out / "metrics.jsonl").read_bytes().splitlines()
        return max((int(json.loads(line)["step"]) for line in lines), default=0)

    def state(self) -> dict[str, Any]:
        """The library's, model's and optimizer's of the newest checkpoint.

        The global random state is not the run's: the command line does not seed it.  Times differ between any two runs.
        """
        parts = checkpoint.load(housekeeping.latest(self.out / "checkpoints")).parts
        return {"model": parts["model"], "optimizer": parts["optimizer"], "meter": parts["trainer"]["run"]["meter"]}


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, in steps of a hundredth; none where it has gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def kill_after(process: ForkServerProcess, seconds: float) -> None:
    """SIGKILL once it has used so much CPU time; where that cannot be read, once so much time has passed."""
    assert process.pid is not None
    began = time.monotonic()
    while process.exitcode is None and time.monotonic() - began < PATIENCE_S:
        used = cpu_s(process.pid) if Path("/proc").is_dir() else time.monotonic() - began
        if used >= seconds:
            time.sleep(random.random() * 0.01)
            break
        time.sleep(0.001)
    process.kill()
    process.join()


def killed(kills: int, behind: bool, seed: int, folder: Path) -> str | None:
    """Killed at random moments, resumed after each, and bitwise the run that nobody touched.

    Every checkpoint that is left verifies, and the newest is never older than before.
    """
    dice, runs = random.Random(seed), Runs(folder, seed, LONG, behind=behind)
    newest = -1
    for number in range(kills):
        process = runs.start(resume=runs.out.exists() and (runs.out / "run.json").exists())
        kill_after(process, 0.05 + dice.random() * LIFE_S)
        steps = runs.steps()
        if steps and steps[-1] < newest:
            return f"kill {number}: the newest checkpoint is of step {steps[-1]}, it was {newest}"
        newest = steps[-1] if steps else newest
    if (wrong := runs.finish()) is not None:
        return wrong
    straight = Runs(folder / "straight", seed, LONG)
    straight.out.parent.mkdir()
    if (wrong := straight.finish()) is not None:
        return wrong
    if hidden := [p.name for p in (runs.out / "checkpoints").iterdir() if p.name.startswith(".tmp")]:
        return f"{hidden[0]} was left behind"
    return None if same(runs.state(), straight.state()) else "not the run that nobody touched"


def same(a: Any, b: Any) -> bool:
    """Whether two nested states agree to the last bit."""
    from .material import fingerprint

    return fingerprint(a) == fingerprint(b)


def stopped(number: int, behind: bool, seed: int, folder: Path) -> str | None:
    """A signal at a random moment: the step is finished, a checkpoint written, and the status says which signal."""
    runs = Runs(folder, seed, SHORT, behind=behind)
    process = runs.start(resume=False)
    if not until(lambda: (runs.out / "checkpoints" / "latest").exists()):
        return "it never began"
    time.sleep(random.Random(seed).random() * 0.3)
    assert process.pid is not None
    os.kill(process.pid, number)
    status = runs.ended(process)
    if status != 128 + number:
        return f"ended with {status}: {runs.told()}"
    steps, last = runs.steps(), runs.last_step()
    return None if steps[-1] >= last else f"step {last} was taken, the newest checkpoint is of {steps[-1]}"


def until(there: Callable[[], bool]) -> bool:
    """Wait for something, for as long as a busy machine may take."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE_S:
        if there():
            return True
        time.sleep(0.002)
    return False


def full_disk(seed: int, folder: Path) -> str | None:
    """No file may be longer than a few kilobytes: a clear end, nothing half written, and no dead end."""
    runs = Runs(folder, seed, 30)
    status = runs.ended(runs.start(resume=False, file_size=random.Random(seed).randrange(500, 40_000)))
    if status not in (0, 3):
        return f"ended with {status}: {runs.told()}"
    runs.steps()
    if runs.out.exists() and (left := [p.name for p in runs.out.rglob(".tmp-*")]):
        return f"{left[0]} was left behind"
    if status == 0:
        return None
    resumed = (runs.out / "run.json").exists()
    status = runs.ended(runs.start(resume=resumed))
    return None if status == 0 else f"with room again it ended with {status}: {runs.told()}"


def read_only(seed: int, folder: Path) -> str | None:
    """A folder that cannot be written to: said before anything is trained."""
    runs = Runs(folder, seed, 30)
    places = [Path("/proc/hpt-run"), Path("/sys/hpt-run"), folder / "file" / "run"]
    (folder / "file").write_text("in the way")
    if os.geteuid() != 0:  # root may write anywhere
        (folder / "closed").mkdir(mode=0o500)
        places.append(folder / "closed" / "run")
    out = random.Random(seed).choice(places)
    status = runs.ended(runs.start(resume=False, out=out))
    return None if status == 2 else f"{out}: ended with {status}: {runs.told()}"


def two_processes(seed: int, folder: Path) -> str | None:
    """The second one in a folder is turned away, the first goes on."""
    runs = Runs(folder, seed, SHORT)
    first = runs.start(resume=False)
    if not until(lambda: (runs.out / "checkpoints" / "latest").exists()):
        return "it never began"
    for resume in (False, True):
        status = runs.ended(runs.start(resume=resume))
        if status != 2:
            first.kill()
            return f"a second one ended with {status}"
    if not first.is_alive():
        return f"the first one ended with {first.exitcode}"
    first.terminate()
    status = runs.ended(first)
    runs.steps()
    return None if status == 143 else f"the first one ended with {status}"


def vanished(seed: int, folder: Path) -> str | None:
    """Its checkpoints are deleted under it: it goes on, and the last one is there at the end."""
    import shutil

    runs = Runs(folder, seed, 200)
    process = runs.start(resume=False)
    if not until(lambda: (runs.out / "checkpoints" / "latest").exists()):
        return "it never began"
    time.sleep(random.Random(seed).random() * 0.3)
    with contextlib.suppress(OSError):
        shutil.rmtree(runs.out / "checkpoints")
    status = runs.ended(process)
    if status != 0:
        return f"ended with {status}: {runs.told()}"
    # what was half deleted may still be there
    newest, last = housekeeping.latest(runs.out / "checkpoints"), runs.last_step()
    return None if newest.name == f"checkpoint_step_{last}" else f"{newest.name} is the newest, the last step is {last}"


def cases() -> list[Case]:
    """Of this module."""
    resumed = "no checkpoint unreadable, never older than before, end bitwise as without"
    saved = "the step is finished, one checkpoint, exit status 128 + n"
    return [
        Case(name="kill -9 at 10 random moments of training and saving, resumed after each", survived=resumed,
             tries=5, trial=partial(killed, 10, False), quick=0),
        Case(name="kill -9 likewise, checkpoints written in the background", survived=resumed,
             tries=2, trial=partial(killed, 10, True), quick=0),
        *(Case(name=f"{name} at a random moment", survived=saved, tries=3, quick=0,
               trial=partial(stopped, number, False)) for name, number in (
            ("SIGTERM", signal.SIGTERM), ("SIGINT", signal.SIGINT), ("SIGHUP", signal.SIGHUP))),
        Case(name="SIGTERM likewise, checkpoints written in the background", survived=saved, tries=3, quick=0,
             trial=partial(stopped, signal.SIGTERM, True)),
        Case(name="disk full (RLIMIT_FSIZE)", survived="status 3 or the run goes on, nothing half written, no dead end",
             tries=8, quick=0, trial=full_disk),
        Case(name="folder that cannot be written to", survived="status 2 before training", tries=5, trial=read_only,
             quick=0),
        Case(name="two processes in one folder", survived="the second is turned away, the first goes on", tries=3,
             trial=two_processes, quick=0),
        Case(name="checkpoints deleted under a run", survived="it goes on, the last is there at the end", tries=3,
             trial=vanished, quick=0),
    ]  # fmt: skip
