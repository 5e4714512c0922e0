"""Help, the version and wrong options: answered at once, without torch, from names that are the library's own."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import hybrid_predict_trainer
from hybrid_predict_trainer.cli import bench, bench_arguments, hpt, names
from hybrid_predict_trainer.config.presets import PRESETS
from hybrid_predict_trainer.config.settings import SOURCES
from hybrid_predict_trainer.experiments.bench import predictors as predictor_bench
from hybrid_predict_trainer.experiments.harm.runs import ARMS
from hybrid_predict_trainer.experiments.harm.settings import SETTINGS
from hybrid_predict_trainer.experiments.regimes import catalogue
from hybrid_predict_trainer.predictors import PREDICTORS
from hybrid_predict_trainer.tasks import TASKS
from hybrid_predict_trainer.tasks.base import OptimizerName, ScheduleName

ROOT = Path(hybrid_predict_trainer.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT.parent)}


def parsers(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every command line that ends in a parser, and the parser."""
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from parsers(inner, (*path, name))


COMMANDS = dict(parsers(hpt.build_parser()))
WRONG = (["--speed"], ["trian"], [], ["train", "--task", "gtp"], ["train", "--steps", "0"], ["train"], ["compare"],
         ["train", "--resume"], ["train", "--predictor", "sekant"], ["bench", "speed"],
         ["bench", "overhead", "--steps", "3"])  # fmt: skip

ASK = """
import contextlib, io, json, sys
from hybrid_predict_trainer.cli import main
said = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    heavy = sorted({"torch", "numpy", "scipy", "matplotlib", "jinja2", "filelock", "tqdm"} & set(sys.modules))
    said.append((status, out.getvalue(), err.getvalue(), heavy))
print(json.dumps(said))
"""


def asked(lines: list[list[str]]) -> list[tuple[int, str, str, list[str]]]:
    """What a fresh process answers to command lines, and what heavy it had to import by then."""
    command = [sys.executable, "-c", ASK, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=ENVIRONMENT)
    return [(status, out, err, heavy) for status, out, err, heavy in json.loads(done.stdout)]


def test_help_the_version_and_wrong_options_need_no_torch() -> None:
    helps = [[*path, "--help"] for path in COMMANDS]
    assert len(helps) >= 1 + len(hpt.COMMANDS) + len(bench.MEASUREMENTS)
    answers = asked([*helps, ["--version"], *WRONG])
    for line, (status, out, err, heavy) in zip([*helps, ["--version"]], answers, strict=False):
        assert (status, err, heavy) == (0, "", []), line
        assert out
    for line, (status, out, err, heavy) in zip(WRONG, answers[len(helps) + 1 :], strict=True):
        assert (status, out, heavy, err.count("\n")) == (2, "", [], 1), line


def test_help_takes_less_than_a_third_of_a_second_of_processor_time() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "hybrid_predict_trainer.cli", "--help"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: "-".join(("hpt", *path)))
def test_every_help_has_a_sentence_units_and_an_example_that_parses(path: tuple[str, ...]) -> None:
    parser = COMMANDS[path]
    assert isinstance(parser, argparse.ArgumentParser)
    assert re.match(r"[A-Z].*\.$", (parser.description or "").strip(), re.DOTALL)
    for action in parser._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), action.option_strings
    lines = re.search(r"examples?:\n((?:  hpt .*\n?)+)", parser.epilog or "")
    assert lines is not None
    for line in lines[1].splitlines():
        found = hpt.build_parser().parse_args(shlex.split(line)[1:])
        assert (found.command, *([found.what] if found.command == "bench" else []))[: len(path)] == path
    assert max(map(len, (parser.description or "").splitlines())) <= 100


def test_exit_statuses_are_told_once() -> None:
    assert "exit status" in hpt.EPILOG
    for status in (0, 1, 2, 3, 4, 129, 130, 143):
        assert re.search(rf"\b{status}\b", hpt.STATUSES)
    told = [path for path, parser in COMMANDS.items() if "exit status" in (getattr(parser, "epilog", "") or "")]
    assert told == [()]


def test_names_are_those_of_the_library() -> None:
    assert tuple(TASKS) == names.TASKS
    assert get_args(OptimizerName) == names.OPTIMIZERS
    assert get_args(ScheduleName) == names.SCHEDULES
    assert tuple(PREDICTORS) == names.PREDICTORS
    assert tuple(SOURCES) == names.SOURCES
    assert tuple(predictor_bench.REFERENCES) == names.REFERENCES
    assert tuple(PRESETS) == names.CONFIG_PRESETS
    assert catalogue.names() == names.REGIMES
    assert names.HARM_ARMS == ARMS
    assert tuple(SETTINGS) == names.HARM_SETTINGS


def test_every_command_has_what_it_calls() -> None:
    listed = {path[0] for path in COMMANDS if path}
    assert listed == set(hpt.COMMANDS)
    for module in hpt.COMMANDS.values():
        assert callable(importlib.import_module(module, "hybrid_predict_trainer.cli").run)
    assert {path[1] for path in COMMANDS if len(path) == 2} == set(bench.MEASUREMENTS)
    parsed = bench_arguments.argparse.Namespace(**vars(hpt.build_parser().parse_args(["bench", "stack"])))
    assert all(hasattr(parsed, name) for name in bench.STACK_OPTIONS)


# ---------------------------------------------------------------- the package's own names

LAZY = """
import sys
import hybrid_predict_trainer as package
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert {"HybridTrainer", "load_config", "__version__"} <= set(dir(package))
from hybrid_predict_trainer import *
for name in package.__all__:
    assert globals()[name] is getattr(package, name) is vars(package)[name], name
assert HybridTrainer is package.trainer.HybridTrainer and load_config is package.config.toml.load
for inner in sorted(package._INNER):
    assert getattr(package, inner).__name__ == f"hybrid_predict_trainer.{inner}"
try:
    package.HybridTrainr
except AttributeError as error:
    assert "no attribute 'HybridTrainr'" in str(error)
else:
    raise AssertionError
"""


def test_public_names_are_imported_when_they_are_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["cycle.real_step", "weights.products", "tasks.language.gpt"])
def test_a_module_can_be_the_first_that_is_imported(module: str) -> None:
    command = [sys.executable, "-W", "error", "-c", f"import hybrid_predict_trainer.{module}"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_type_checker_sees_the_names_that_are_imported() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.asname: f"{node.module}:{alias.name}"
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    table = {name: home if ":" in home else f"{home}:{name}" for name, home in hybrid_predict_trainer._HOMES.items()}
    assert typed == table
    assert sorted(table) == sorted(hybrid_predict_trainer.__all__)
