"""``hpt sweep``: paused trials are the uninterrupted ones, nothing is trained twice, and bad input is one line."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

optuna = pytest.importorskip("optuna")

from tests.storage import KILLED, nothing_is_lost  # noqa: E402

from hybrid_predict_trainer.cli import main, names  # noqa: E402
from hybrid_predict_trainer.experiments.arms.options import InputError, Options  # noqa: E402
from hybrid_predict_trainer.experiments.report import sweep as page  # noqa: E402
from hybrid_predict_trainer.experiments.run_folder import Request  # noqa: E402
from hybrid_predict_trainer.experiments.sweep import plan as plans  # noqa: E402
from hybrid_predict_trainer.experiments.sweep import storage as storages  # noqa: E402
from hybrid_predict_trainer.experiments.sweep import trials as runs  # noqa: E402
from hybrid_predict_trainer.experiments.sweep.proposals import proposed  # noqa: E402
from hybrid_predict_trainer.experiments.sweep.space import OPTIONS, read_space, with_params  # noqa: E402
from hybrid_predict_trainer.experiments.sweep.worker import Turn, Worker  # noqa: E402
from hybrid_predict_trainer.experiments.train import train  # noqa: E402
from hybrid_predict_trainer.records import ConfigError  # noqa: E402
from hybrid_predict_trainer.sweeps.allocate import wants_new  # noqa: E402
from hybrid_predict_trainer.sweeps.curves import LOOKS, TrialCurve  # noqa: E402
from hybrid_predict_trainer.sweeps.ends import UNKNOWN, End  # noqa: E402

STEPS = 40
SPACE = 'lr = { low = 1e-3, high = 1e-1, log = true }\nschedule = ["linear", "wsd"]\n'


def plan_of(folder: Path, space: str = SPACE, **kwargs: Any) -> plans.Plan:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "space.toml").write_text(space)
    options = Options(task="pinn-poisson", steps=STEPS, threads=1)
    return plans.Plan(**{"options": options, "space": read_space(folder / "space.toml"), "first": 2, **kwargs})


def worker_of(tmp_path: Path, plan: plans.Plan, *, trials: int = 2, **kwargs: Any) -> Worker:
    setup = plans.checked(plan)
    plans.agreed(tmp_path / "out", plan)
    return Worker(plan, setup, plans.Allowance(budget=10.0, trials=trials, **kwargs), tmp_path / "out")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(folder, step) of every step that is trained."""
    seen: list[tuple[str, int]] = []

    def counting(request: Request, out: Path, **kwargs: Any) -> Any:
        def watch(label: str, trainer: Any, steps: int) -> Any:
            return lambda result: seen.append((out.name, trainer.run.meter.num_steps))

        return train(request, out, watch=watch, **kwargs)

    monkeypatch.setattr(runs, "train", counting)
    return seen


# ---- a search ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [True, False])
def test_a_paused_trial_is_bitwise_the_uninterrupted_one(tmp_path: Path, plain: bool) -> None:
    plan = plan_of(tmp_path, plain=plain)
    params = {"lr": 0.01, "schedule": "wsd"}
    for until in (5, 17, math.inf):
        part = runs.advance(plan, tmp_path / "out", 0, params, until)
    request = Request(options=with_params(plan.options, params), seed=0, plain=plain)
    whole, _ = train(request, tmp_path / "whole", resume=False)
    assert part.final == whole["final_val_loss"]
    found = [max((p / "checkpoints").glob("checkpoint_step_*"), key=lambda f: int(f.name[16:]))
             for p in (runs.folder_of(tmp_path / "out", 0), tmp_path / "whole")]  # fmt: skip
    assert found[0].name == found[1].name
    weights = [torch.cat([p.flatten() for p in _weights(folder)]) for folder in found]
    assert torch.equal(*weights)


def _weights(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    file = next(p for p in sorted(folder.rglob("*.safetensors")) if "model" in p.name)
    return [value for _, value in sorted(load_file(file).items())]


def test_an_interrupted_search_goes_on_and_trains_nothing_twice(
    tmp_path: Path, counted: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, plain=True)
    whole = worker_of(tmp_path / "whole", plan)
    for _ in range(6):
        whole.turn()
    once = list(counted)
    assert len(set(once)) == len(once), "no step is trained twice"
    counted.clear()
    for _ in range(2):  # each turn under a new worker: what it needs is in folder and journal
        assert worker_of(tmp_path / "parts", plan).turn() is Turn.WORKED
    again = worker_of(tmp_path / "parts", plan)
    with monkeypatch.context() as gone:
        gone.setattr(optuna.trial.Trial, "report", _away)  # it has trained, and the storage does not hear of it
        with pytest.raises(storages.StorageError):
            again.turn()
    last = worker_of(tmp_path / "parts", plan)
    for _ in range(4):  # the first one only reports
        last.turn()
    assert counted == once
    result = [[(t.number, t.state, t.value, t.params, t.intermediate_values) for t in w.standing()]
              for w in (whole, worker_of(tmp_path / "parts", plan))]  # fmt: skip
    assert result[0] == result[1]


def _away(*args: Any, **kwargs: Any) -> None:
    raise optuna.exceptions.StorageInternalError("the server has closed the connection")


def test_every_turn_goes_on_whatever_the_steps_between_validations(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, plain=True, options=Options(task="pinn-poisson", steps=61, threads=1))
    worker, last = worker_of(tmp_path, plan, trials=1), 0
    for look in LOOKS[:3]:
        assert worker.turn() is Turn.WORKED
        step = worker.standing()[0].last_step
        assert step >= look * 61 > last
        last = step


def test_the_budget_holds_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, plain=True)
    setup = plans.checked(plan)
    plans.agreed(tmp_path / "out", plan)
    Worker(plan, setup, plans.Allowance(budget=0.1), tmp_path / "out").work(lambda w: None)
    small = Worker(plan, setup, plans.Allowance(budget=0.2), tmp_path / "out")
    before = small.spent(small.standing())
    assert 0.1 <= before < 0.2
    assert small.turn() is Turn.WORKED
    assert small.spent(small.standing()) > before
    assert Worker(plan, setup, plans.Allowance(budget=0.05), tmp_path / "out").turn() is Turn.DONE


@pytest.mark.parametrize(("workers", "budget"), [(1, 1.05), (2, 1.3)])
def test_a_budget_of_a_run_completes_one_whoever_takes_turns(tmp_path: Path, workers: int, budget: float) -> None:
    plan = plan_of(tmp_path, plain=True)
    setup = plans.checked(plan)
    plans.agreed(tmp_path / "out", plan)
    joined = [Worker(plan, setup, plans.Allowance(budget=budget), tmp_path / "out") for _ in range(workers)]
    for k in range(60):
        if joined[k % workers].turn() is Turn.DONE:
            break
    assert any(t.state.name == "COMPLETE" for t in joined[0].standing())


def test_while_another_worker_has_the_one_trial_that_can_end_nobody_spends_its_rest(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, plain=True)
    plans.agreed(tmp_path / "out", plan)
    worker = Worker(plan, plans.checked(plan), plans.Allowance(budget=1.0), tmp_path / "out")
    assert worker.turn() is Turn.WORKED
    with runs.claimed(tmp_path / "out", "00000"):
        assert worker.turn() is Turn.WAITING
    assert len(worker.standing()) == 1
    assert worker.turn() is Turn.WORKED


@pytest.mark.filterwarnings("ignore:Adam leaves")
def test_a_trial_that_diverges_fails_and_the_search_goes_on(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "lr = [1e30, 0.01]\n", plain=True, sampler="random", seed=9)
    worker = worker_of(tmp_path, plan, trials=3)
    seen = set()
    while worker.turn() is Turn.WORKED and len(seen) < 2:
        seen = {t.state.name for t in worker.standing()} & {"FAIL", "RUNNING"}
    failed = [t for t in worker.standing() if t.state.name == "FAIL"]
    assert failed[0].params == {"lr": 1e30}
    assert "diverged" in failed[0].user_attrs["why"]
    account = page.account(worker.standing(), STEPS)
    assert (account.failed, account.alive) == (len(failed), len(worker.standing()) - len(failed))
    assert "diverged" in page.page("here", account)


@pytest.mark.filterwarnings("ignore:Adam leaves")
def test_where_every_first_trial_fails_the_search_ends(tmp_path: Path) -> None:
    worker = worker_of(tmp_path, plan_of(tmp_path, "lr = [1e30, 1e31]\n", plain=True), trials=2)
    with pytest.raises(InputError, match="all of the first 2 trials have failed, the last one: diverged") as told:
        worker.work(lambda w: None)
    assert "\n" not in str(told.value)


def test_a_journal_that_is_gone_is_made_anew(tmp_path: Path, counted: list[tuple[str, int]]) -> None:
    plan = plan_of(tmp_path, plain=True)
    worker = worker_of(tmp_path, plan)
    for _ in range(3):
        worker.turn()
    worker._stop(worker.standing()[1])
    before = worker.standing()
    (tmp_path / "out" / storages.JOURNAL).unlink()
    with pytest.raises(InputError, match=r"journal\.log: is gone; the same command makes it anew"):
        worker.turn()
    again = worker_of(tmp_path, plan)
    keep = ("state", "params", "intermediate_values")
    assert [[getattr(t, k) for k in keep] for t in again.standing()] == [[getattr(t, k) for k in keep] for t in before]
    again.turn()
    assert len(set(counted)) == len(counted)


@pytest.mark.parametrize("torn", ["{", '{"op_code": "' + "x" * 200_000, '{"op_code": "whole, but for its end"}'])
def test_half_a_line_of_the_journal_is_cut_off_before_the_next_one(
    tmp_path: Path, counted: list[tuple[str, int]], torn: str
) -> None:
    """A full disk or a power cut leaves one; Optuna's own backend would write on behind it."""
    plan = plan_of(tmp_path, plain=True)
    worker_of(tmp_path, plan).turn()
    journal = tmp_path / "out" / storages.JOURNAL
    whole = journal.read_bytes()
    with journal.open("a") as file:
        file.write(torn)
    worker = worker_of(tmp_path, plan)
    for _ in range(4):
        worker.turn()
    assert journal.read_bytes().startswith(whole + b"{")
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    again = worker_of(tmp_path, plan)
    assert [t.intermediate_values for t in again.standing()] == [t.intermediate_values for t in worker.standing()]
    assert len(set(counted)) == len(counted)  # nothing was trained twice


@pytest.mark.parametrize("size", [-17, 0])
def test_a_journal_that_was_cut_off_loses_nothing(tmp_path: Path, counted: list[tuple[str, int]], size: int) -> None:
    """By a process that was killed while it wrote, whose part of a line the next would go on with; and altogether."""
    plan = plan_of(tmp_path)
    worker = worker_of(tmp_path, plan)
    for _ in range(3):
        worker.turn()
    before = [(t.params, t.intermediate_values) for t in worker.standing()]
    journal = tmp_path / "out" / storages.JOURNAL
    journal.write_bytes(journal.read_bytes()[:size])
    seen = len(counted)
    for _ in range(2):  # the second reads what the first has written behind the cut
        again = worker_of(tmp_path, plan)
        again.turn()
    assert journal.read_bytes().endswith(b"\n")
    assert len(set(counted)) == len(counted) > seen
    after = [(t.params, t.intermediate_values) for t in again.standing()]
    assert len(after) == len(before) == 2
    for (params, shown), (params_then, shown_then) in zip(after, before, strict=True):
        assert params == params_then
        assert shown.items() >= shown_then.items()


@pytest.mark.parametrize("junk", [b"junk\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b'{"op_code": 99}\n'])
def test_a_journal_that_is_damaged_is_one_line_and_can_be_made_anew(tmp_path: Path, junk: bytes) -> None:
    plan = plan_of(tmp_path)
    worker_of(tmp_path, plan).turn()
    journal = tmp_path / "out" / storages.JOURNAL
    whole = journal.read_bytes()
    at = whole.index(b"\n") + 1
    journal.write_bytes(whole[:at] + junk + whole[at:])
    with pytest.raises(InputError, match=r"journal\.log: is damaged") as found:
        worker_of(tmp_path, plan)
    assert "\n" not in str(found.value)
    journal.rename(tmp_path / "aside")
    assert [len(t.intermediate_values) > 0 for t in worker_of(tmp_path, plan).standing()] == [True]


@pytest.mark.parametrize("directions", [["maximize"], ["minimize", "minimize"], ["minimize"]])
def test_another_programs_study_is_left_alone(tmp_path: Path, directions: list[str]) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    theirs = optuna.create_study(study_name="theirs", storage=url, directions=directions)
    theirs.add_trial(optuna.trial.create_trial(values=[1.0] * len(directions)))
    plan = plan_of(tmp_path)
    setup, allowance = plans.checked(plan), plans.Allowance(budget=1.0)
    plans.agreed(tmp_path / "out", plan)
    with pytest.raises(InputError, match="'theirs' is not one of hpt sweep"):
        Worker(plan, setup, allowance, tmp_path / "out", url=url, name="theirs")
    assert theirs.user_attrs == {}
    assert len(theirs.trials) == 1


def test_a_storage_may_be_away_for_a_while_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(tmp_path, plan_of(tmp_path, plain=True), patience=0.05)
    monkeypatch.setattr("hybrid_predict_trainer.experiments.sweep.worker.PAUSE_S", 0.03)
    kept, answers = worker.study.get_trials, iter([False, True, True])
    monkeypatch.setattr(worker.study, "get_trials", lambda **kw: kept(**kw) if next(answers, False) else _away())
    with pytest.raises(InputError, match=r"does not answer: the server has closed .*: the same command goes on"):
        worker.work(lambda w: None)
    assert next(answers, None) is None, "it was asked again"


def test_a_trial_nobody_introduced_is_buried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(tmp_path, plan_of(tmp_path, plain=True))
    worker.study.ask()  # by a worker that was killed then and there
    assert worker._may_begin(worker.standing())
    monkeypatch.setattr("hybrid_predict_trainer.experiments.sweep.worker.ORPHANED_S", -1.0)
    worker.turn()
    assert [t.state.name for t in worker.standing()] == ["FAIL", "RUNNING"]
    assert worker._begun(worker.standing()) == 1


def test_other_machines_trials_are_theirs(tmp_path: Path) -> None:
    worker = worker_of(tmp_path, plan_of(tmp_path, plain=True), trials=1)
    trial = worker.study.ask(fixed_distributions=dict(worker._plan.space))
    worker._introduce(trial)
    trial.set_user_attr("host", "elsewhere")
    assert worker.turn() is Turn.WAITING
    trial.set_user_attr("host", plans.host())
    assert worker.turn() is Turn.WORKED


def test_another_process_has_the_trial(tmp_path: Path) -> None:
    worker = worker_of(tmp_path, plan_of(tmp_path, plain=True), trials=1)
    worker.turn()
    with runs.claimed(tmp_path / "out", "00000") as ours:
        assert ours
        assert worker.turn() is Turn.WAITING
    assert worker.turn() is Turn.WORKED


def test_samplers_go_on_where_they_were(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)

    def drawn(begun: int, **kwargs: Any) -> dict[str, Any]:
        study = optuna.create_study(sampler=plans.sampler_of(plan, begun, **kwargs))
        return dict(study.ask(fixed_distributions=dict(plan.space)).params)

    assert drawn(3, shared=False) == drawn(3, shared=False)
    assert drawn(3, shared=False) != drawn(4, shared=False)
    assert drawn(3, shared=False) != drawn(3, shared=True)
    assert plans.SAMPLERS == names.SAMPLERS


def test_the_forecast_proposes_what_is_near_the_best_and_was_not_tried(tmp_path: Path) -> None:
    """The loss ends at |log10(lr) + 2|: low in the middle of the range."""
    plan = plan_of(tmp_path, sampler="joint")
    setup = plans.checked(plan)

    def run(key: int, lr: float) -> TrialCurve:
        reports = [(s, abs(math.log10(lr) + 2) + (s / STEPS) ** -0.5) for s in range(2, STEPS + 1, 2)]
        params = {"lr": lr, "schedule": "linear"}
        return TrialCurve.of(key, reports, lr * np.ones(STEPS), params=params, complete=True)

    curves = [run(k, lr) for k, lr in enumerate((1e-3, 3e-3, 3e-2, 1e-1))]
    found = [proposed(plan, setup, [], curves, seed) for seed in range(5)]
    assert all(params is not None and 4e-3 < params["lr"] < 2.5e-2 for params in found), found
    assert found[0] == proposed(plan, setup, [], curves, 0) != found[1]
    assert proposed(plan, setup, [], [], 0) is None, "nothing has been shown"
    few = plan_of(tmp_path, 'schedule = ["linear", "wsd"]\n', sampler="joint")
    left = proposed(few, setup, [{"schedule": "wsd"}], curves, 0)
    assert left == {"schedule": "linear"}
    assert proposed(few, setup, [{"schedule": "wsd"}, left], curves, 0) is None, "all were tried"


def test_a_search_begins_what_the_forecast_proposes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def watched(*args: Any) -> dict[str, Any] | None:
        asked.append(proposed(*args))
        return asked[-1]

    monkeypatch.setattr("hybrid_predict_trainer.experiments.sweep.worker.proposed", watched)
    plan = plan_of(tmp_path, plain=True, sampler="joint")
    worker = worker_of(tmp_path, plan, trials=4)
    worker.study.enqueue_trial({"lr": 0.05, "schedule": "wsd"})
    while worker.turn() is Turn.WORKED:
        pass
    found = [t.params for t in worker.standing()]
    assert len(found) == 4
    assert found[0] == {"lr": 0.05, "schedule": "wsd"}, "what was asked for before goes first"
    assert found[2:] == asked
    assert len({t["lr"] for t in found}) == 4


def test_a_new_trial_goes_before_one_that_is_expected_to_end_above_a_quarter() -> None:
    ends = [End(float(k), 0.1, 5.0, 0.5) for k in range(8)]
    assert not wants_new(ends, 1)
    assert wants_new(ends, 2)
    assert wants_new([], None)
    assert not wants_new([*ends, UNKNOWN], 8)


# ---- several workers -------------------------------------------------------------------------------------------


def test_two_workers_and_one_is_killed_in_mid_trial(tmp_path: Path) -> None:
    command = [*ask(tmp_path, "--budget", "9", "--trials", "2", "--first", "2", "--set", "checkpoint.save_interval=3")]
    env = {**os.environ, "HPT_SWEEP_WORKER": "1", "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([sys.executable, "-c", KILLED, "7", *command], env=env, stderr=subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-m", "hybrid_predict_trainer.cli", *command], env=env)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert other.wait(timeout=240) == 0
    nothing_is_lost(storages.opened(None, tmp_path / "out"), tmp_path / "out", num_trials=2, saved_every=3)


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the space is empty"),
        ("learning_rate = [1.0]", "unknown parameter 'learning_rate'"),
        ("lrr = [0.1]", "did you mean 'lr'"),
        ("predictor.windw = [4]", "did you mean 'predictor.window'"),
        ("lr = 0.1", "neither a range"),
        ("lr = []", "lr: has no choices"),
        ("lr = {}", "lr: is empty"),
        ('lr = ["fast"]', "must be a number"),
        ("lr = [0.1, 0.1]", "a choice is there twice"),
        ("lr = { low = 0.1 }", "high is missing"),
        ('lr = { low = "a", high = 1.0 }', "low = a must be a number"),
        ("lr = { low = nan, high = 1.0 }", "must be a number"),
        ("lr = { low = true, high = 1.0 }", "must be a number"),
        ("lr = { low = 1.0, high = 0.1 }", "must be below high"),
        ("lr = { low = 0.0, high = 0.1 }", "out of range"),
        ("weight_decay = { low = 0.0, high = 0.1, log = true }", "must be above 0 where log = true"),
        ("lr = { low = 0.1, high = 0.2, log = 1 }", "log = 1 must be true or false"),
        ("lr = { low = 0.1, high = 0.2, log = true, step = 0.1 }", "either log or step"),
        ("lr = { low = 0.1, high = 0.2, step = 1.0 }", "at most high - low"),
        ("lr = { low = 0.1, high = 0.2, base = 2 }", "unknown key base"),
        ("batch_size = { low = 1.5, high = 8 }", "must be a whole number"),
        ("batch_size = { low = 0, high = 8 }", "out of range"),
        ('schedule = { low = "a", high = "b" }', "has no range"),
        ("predictor.window = [[1]]", "must be a number, a text, true or false"),
        ("lr = [", "not valid TOML"),
    ],
)
def test_a_space_that_cannot_be_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "space.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told.replace("(", r"\(")) as found:
        read_space(path)
    assert "space.toml" in str(found.value)
    assert "\n" not in str(found.value)


def test_a_space_is_read(tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(
        "lr = { low = 1, high = 10 }\nbatch_size = { low = 2, high = 9, step = 3 }\nseed = [1, 2]\n"
        'training.recipe = ["off", "auto"]\n[predictor]\nwindow = { low = 4, high = 16 }\n'
        "[training.gradient_clip_norm]\nlow = 1\nhigh = 2.5\n"
    )
    found = read_space(path)
    dist = optuna.distributions
    assert found == {
        "lr": dist.FloatDistribution(1.0, 10.0), "batch_size": dist.IntDistribution(2, 8, step=3),
        "seed": dist.CategoricalDistribution((1, 2)), "training.recipe": dist.CategoricalDistribution(("off", "auto")),
        "predictor.window": dist.IntDistribution(4, 16),
        "training.gradient_clip_norm": dist.FloatDistribution(1.0, 2.5),
    }  # fmt: skip
    options = with_params(Options(task="gpt", set=("a=1",)), {"lr": 2.0, "seed": 1, "predictor.window": 5})
    assert (options.lr, options.set) == (2.0, ("a=1", "predictor.window=5"))
    assert set(OPTIONS) - {"seed"} <= set(Options.__dataclass_fields__)


def ask(tmp_path: Path, *more: str, space: str = SPACE) -> list[str]:
    (tmp_path / "space.toml").write_text(space)
    return ["sweep", "--task", "pinn-poisson", "--steps", "40", "--plain", "--space", str(tmp_path / "space.toml"),
            "--out", str(tmp_path / "out"), *more]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "space", "told"),
    [
        (["--budget", "0"], SPACE, "out of range: must be a number > 0"),
        (["--budget", "much"], SPACE, "must be a number"),
        ([], SPACE, "--budget"),
        (["--budget", "1", "--workers", "0"], SPACE, "must be a whole number >= 1"),
        (["--budget", "1", "--sampler", "grid"], SPACE, "invalid choice"),
        (["--budget", "1"], "predictor.window = { low = -3, high = 5 }", "space: predictor.window = -3"),
        (["--budget", "1", "--set", "training.clock=claimed"], SPACE, "training.clock must be 'cost'"),
        (["--budget", "1"], 'schedule = ["liner"]', "space: schedule = liner"),
        (["--budget", "1"], 'preset = ["huge", 1]', "must be a text"),
        (["--budget", "1", "--storage", "nonsense"], SPACE, "--storage nonsense"),
        (["--budget", "1", "--storage", "sqlite:////no/where/x.db", "--patience", "0"], SPACE, "does not answer"),
        (["settings.toml", "--budget", "1", "--config", "x.toml"], SPACE, "name settings twice"),
        (["missing.toml", "--budget", "1"], SPACE, "missing.toml"),
    ],
)
def test_what_cannot_be_searched_is_one_line_and_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], space: str, told: str
) -> None:
    assert main(ask(tmp_path, *more, space=space)) == 2
    said = capsys.readouterr()
    assert told in said.err, said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_the_command_searches_and_its_page_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--budget", "0.3", "--first", "2", "--trials", "2"]
    assert main(ask(tmp_path, *small, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["alive"], found["best"]) == (2, None)
    assert 0.3 <= found["spent"] < 0.5
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Ranking" in html
    assert "<script" not in html
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == html  # nothing is trained for it
    capsys.readouterr()
    for more, said in (
        (["--sampler", "random"], "was started with sampler"), (["--lr", "0.5"], "was started without lr"),
        (["--study", "other", "--confidence", "0.9"], "confidence"),
    ):  # fmt: skip
        assert main(ask(tmp_path, *small, *more)) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "out" / "sweep.json").unlink()
    assert main(ask(tmp_path, *small)) == 2
    assert "holds something else than a search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("plan", "journal", "told"),
    [
        ("[1", None, "not valid JSON"), ("{}", None, "has no journal.log"), ("{}", "junk", "no trial has begun"),
        ("{}", "", "no trial has begun"), ("{}", '{"op_code": 0}\n', "is damaged"),
    ],
)  # fmt: skip
def test_a_search_without_trials_has_no_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plan: str, journal: str | None, told: str
) -> None:
    (tmp_path / "sweep.json").write_text(plan)
    if journal is not None:
        (tmp_path / "journal.log").write_text(journal)
    assert main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_secrets_of_a_storage_are_not_shown() -> None:
    url = "postgresql://me" + ":secret@db:5432/x"  # pragma: allowlist secret
    assert storages.without_secrets(url) == "postgresql://db:5432/x"
    assert storages.without_secrets("sqlite:///x.db") == "sqlite:///x.db"


def test_the_page_of_a_search_that_is_over() -> None:
    rows = [
        page.Row(number=k, state="complete", params={"lr": 0.1}, share=1.0, value=1.0 + k, last=1.0 + k, low=math.nan,
                 expected=math.nan, high=math.nan, chance=0.5, seconds=1.0, why="", curve=((1, 3.0), (2, 2.0)),
                 forecasts=((0.5, 0.9 + k, 1.1 + k, 1.3 + k),))
        for k in range(2)
    ]  # fmt: skip
    html = page.page("<b>", page.Account(rows=rows, spent=2.0, saved=0.25))
    assert "2 of 2 outcomes" in html
    assert "25&nbsp;%" in html
    assert "<b></h1>" not in html
