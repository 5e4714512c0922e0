"""A search over PostgreSQL: four workers, one is killed in mid-trial, and the server is restarted meanwhile.

``make test-storage``, or ``python -m tests.storage``; ``--measure N`` prints what N trials ask of journal and server.
Needs the server's programs (Debian: ``postgresql-15``) and
``psycopg``.  The server is one of its own, on loopback, in a temporary folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybrid_predict_trainer.experiments.sweep import storage as storages
from hybrid_predict_trainer.experiments.sweep import trials as runs

NUM_WORKERS, NUM_TRIALS, STEPS, SAVED_EVERY = 4, 6, 60, 3
PROGRAMS = "/usr/lib/postgresql/15/bin"
SPACE = 'lr = { low = 1e-3, high = 1e-1, log = true }\nschedule = ["linear", "wsd"]\n'

#: A worker that is killed in the step that its first argument says, whichever trial it is in.
KILLED = """
import os, signal, sys
from hybrid_predict_trainer.cli import main
from hybrid_predict_trainer.experiments.sweep import trials
trained = trials.train
def killing(request, out, **kwargs):
    def watch(label, trainer, steps):
        return lambda result: os.kill(os.getpid(), signal.SIGKILL) if trainer.run.position == int(sys.argv[1]) else None
    return trained(request, out, watch=watch, **kwargs)
trials.train = killing
main(sys.argv[2:])
"""


def nothing_is_lost(storage: Any, out: Path, *, num_trials: int, saved_every: int) -> dict[str, int]:
    """Hold a search that is over against what it should be, and count.

    Args:
        storage: Of the study, which is named as the folder.
        out: Folder of the search.
        num_trials: That it should have.
        saved_every: Steps between two checkpoints: no more may be trained twice for the one kill.
    """
    import optuna

    found = optuna.load_study(study_name=out.name, storage=storage).get_trials(deepcopy=False)
    states = [t.state.name for t in found]
    assert len(found) == num_trials, states
    assert set(states) <= {"COMPLETE", "PRUNED"}, states
    assert "COMPLETE" in states
    trained, repeated = 0, 0
    for t in found:
        lines = (runs.folder_of(out, t.number) / "metrics.jsonl").read_text().splitlines()
        steps = [e["step"] for e in map(json.loads, lines) if e["event"] == "step"]
        assert sorted(set(steps)) == list(range(min(steps), max(steps) + 1)), "a gap in the steps of a trial"
        assert steps.count(max(steps)) == 1, "a trial came to its end twice"
        trained += len(set(steps))
        repeated += len(steps) - len(set(steps))
    assert repeated <= saved_every, f"{repeated} steps were trained twice"
    return {"complete": states.count("COMPLETE"), "stopped": states.count("PRUNED"), "steps": trained,
            "repeated": repeated}  # fmt: skip


class Server:
    """PostgreSQL on loopback."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._data, self._prefix = folder / "data", []
        if os.getuid() == 0:  # the server refuses to be root's
            shutil.chown(folder, pwd.getpwnam("postgres").pw_uid)
            folder.parent.chmod(0o755)
            self._prefix = ["runuser", "-u", "postgres", "--"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._do("initdb", "-D", str(self._data), "-U", "search", "-A", "trust", "--no-sync")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://search@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        self._do("pg_ctl", "-D", str(self._data), "-w", "-l", str(self._data / "log"), "-o", options, "start")

    def stop(self) -> None:
        self._do("pg_ctl", "-D", str(self._data), "-w", "-m", "immediate", "stop")

    def _do(self, name: str, *arguments: str) -> None:
        program = shutil.which(name) or f"{PROGRAMS}/{name}"
        done = subprocess.run([*self._prefix, program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              cwd="/", text=True, timeout=120)  # fmt: skip
        if done.returncode:
            sys.exit(f"{name}: {done.stdout.strip().splitlines()[-1] if done.stdout else done.returncode}")


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Server]:
    found = Server(folder)
    try:
        yield found
    finally:
        with contextlib.suppress(SystemExit):
            found.stop()


def reported(storage: Any, name: str) -> int:
    """Reports of all trials so far."""
    import optuna

    with contextlib.suppress(KeyError):
        study = optuna.load_study(study_name=name, storage=storage)
        return sum(len(t.intermediate_values) for t in study.get_trials(deepcopy=False))
    return 0


def price(storage: Any, num_trials: int, num_reports: int = 40) -> dict[str, float]:
    """What a search of that many trials asks of a storage: milliseconds of this process, and of the clock."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(seed=0), study_name="price")
    spent = dict.fromkeys(("begin", "report", "tell"), 0.0)
    began = time.perf_counter()

    def timed(what: str, do: Any) -> Any:
        started = time.process_time()
        found = do()
        spent[what] += time.process_time() - started
        return found

    def begin() -> optuna.Trial:
        trial = study.ask(fixed_distributions={"lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)})
        for name, value in (("schedule", "wsd:decay=0.25"), ("total_steps", 1000), ("host", "here")):
            trial.set_user_attr(name, value)
        return trial

    for _ in range(num_trials):
        trial = timed("begin", begin)
        for step in range(1, num_reports + 1):
            timed("report", lambda trial=trial, step=step: trial.report(1.0 / step, step))
        timed("tell", lambda trial=trial: study.tell(trial, 1.0 / num_reports))
    wall = 1000 * (time.perf_counter() - began) / num_trials
    started = time.process_time()
    study.get_trials(deepcopy=False)
    again = time.process_time()
    optuna.load_study(study_name="price", storage=storage).get_trials(deepcopy=False)
    return {
        "begin_ms": 1000 * spent["begin"] / num_trials,
        "report_ms": 1000 * spent["report"] / num_trials / num_reports,
        "tell_ms": 1000 * spent["tell"] / num_trials,
        "read_again_ms_per_1000": 1e6 * (again - started) / num_trials,
        "wall_ms_per_trial": wall,
    }


def measure(num_trials: int) -> None:
    """The coefficients of docs/scale.md."""
    with tempfile.TemporaryDirectory(prefix="hpt-storage-") as name:
        folder = Path(name)
        journal = price(storages.opened(None, folder), num_trials)
        journal["bytes_per_trial"] = (folder / storages.JOURNAL).stat().st_size / num_trials
        started = time.process_time()
        fresh = storages.opened(None, folder)
        fresh.get_all_trials(fresh.get_study_id_from_name("price"), deepcopy=False)
        journal["open_ms_per_1000"] = 1e6 * (time.process_time() - started) / num_trials
        print("journal", json.dumps({k: round(v, 3) for k, v in journal.items()}), flush=True)
        with server(folder / "server") as found:
            import psycopg

            url = found.url.replace("+psycopg", "")

            def size() -> int:
                with psycopg.connect(url) as connection:
                    return int(connection.execute("select pg_database_size('postgres')").fetchone()[0])

            storage = storages.opened(found.url, folder)
            before = size()
            postgresql = price(storage, num_trials)
            postgresql["bytes_per_trial"] = (size() - before) / num_trials
            started = time.process_time()
            fresh = storages.opened(found.url, folder)
            fresh.get_all_trials(fresh.get_study_id_from_name("price"), deepcopy=False)
            postgresql["open_ms_per_1000"] = 1e6 * (time.process_time() - started) / num_trials
            print("PostgreSQL", json.dumps({k: round(v, 3) for k, v in postgresql.items()}), flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="hpt-storage-") as name, server(Path(name) / "server") as found:
        folder = Path(name)
        (folder / "space.toml").write_text(SPACE)
        out = folder / "search"
        command = ["sweep", "--task", "pinn-poisson", "--steps", str(STEPS), "--plain", "--budget", "99"]
        command += ["--first", "4", "--trials", str(NUM_TRIALS), "--patience", "120", "--out", str(out)]
        command += ["--set", f"checkpoint.save_interval={SAVED_EVERY}", "--space", str(folder / "space.toml")]
        command += ["--storage", found.url]
        env = {**os.environ, "HPT_SWEEP_WORKER": "1", "OMP_NUM_THREADS": "1"}
        plain = [sys.executable, "-m", "hybrid_predict_trainer.cli", *command]
        workers = [subprocess.Popen(plain, env=env) for _ in range(NUM_WORKERS - 1)]
        killed = subprocess.Popen([sys.executable, "-c", KILLED, "7", *command], env=env)
        storage = storages.opened(found.url, out)
        while reported(storage, out.name) < 4 * NUM_TRIALS and any(w.poll() is None for w in workers):
            time.sleep(2.0)
        going = sum(w.poll() is None for w in workers)
        found.stop()
        time.sleep(3.0)
        found.start()
        print(f"server restarted with {going} workers of {NUM_WORKERS - 1} under way", flush=True)
        statuses = [w.wait(timeout=900) for w in workers]
        assert killed.wait(timeout=900) == -signal.SIGKILL, killed.returncode
        assert statuses == [0] * len(workers), statuses
        assert going, "the search was over before the server was restarted"
        counts = nothing_is_lost(storages.opened(found.url, out), out, num_trials=NUM_TRIALS, saved_every=SAVED_EVERY)
    print(f"nothing lost, nothing trained twice to its end: {counts}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(int(sys.argv[2]))
    else:
        main()
