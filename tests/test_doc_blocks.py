"""Every block of code in the documents runs, or says why not; every command they name is one the parser takes."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import runpy
import shlex
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import hybrid_predict_trainer
from cases import full_batch, loss_fn, setup
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, attach, cli
from hybrid_predict_trainer.adapters import trackers
from hybrid_predict_trainer.cli import hpt

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(name: str, *languages: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# ---- Python --------------------------------------------------------------------------------------------

#: Documents whose blocks tests/test_docs.py runs, each with what it prints.
ELSEWHERE = {"README.md", "docs/extending.md", "docs/index.md", "docs/schedules.md"}
#: Blocks that are compiled only, and why.
NOT_RUN = {
    ("docs/scale.md", 0): "several processes: python -m tests.ranks runs it",
    ("docs/scale.md", 1): "several processes: python -m tests.ranks --sharded runs it",
}


def residuals(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(batch[0]) - batch[1]
    return found


def usual() -> dict[str, Any]:
    """What a reader has at hand: a model, its optimizer, data, its loss."""
    built = setup("mlp", "adam", "lambda")
    return {
        "__name__": "page", "torch": torch, "HybridTrainer": HybridTrainer, "HybridTrainerConfig": HybridTrainerConfig,
        "model": built.model, "optimizer": built.optimizer, "scheduler": built.scheduler, "loss_fn": loss_fn,
        "loader": full_batch(8), "residuals": residuals, "config": HybridTrainerConfig(),
    }  # fmt: skip


def prepare_engine(names: dict[str, Any]) -> None:
    names["engine"] = attach(
        names["model"], names["optimizer"], HybridTrainerConfig(), loss_fn=loss_fn, lr_scheduler=names["scheduler"],
        schedule="external",
    )  # fmt: skip


def prepare_engine_after_a_step(names: dict[str, Any]) -> None:
    prepare_engine(names)
    loss = loss_fn(names["model"], names["loader"][0])
    loss.backward()
    names["engine"].note(loss, names["loader"][0])
    names["optimizer"].step()


def prepare_tracker(names: dict[str, Any]) -> None:
    """Importing TensorBoard takes seconds, and tests/test_trackers.py writes with it: the call has to fit."""
    told = mock.create_autospec(trackers.TensorBoard)
    names["patched"] = mock.patch.object(trackers, "TensorBoard", told)


def prepare_probe(names: dict[str, Any]) -> None:
    """Minutes of pilots: the call has to fit the signature, and what is read of the report has to be there."""
    from hybrid_predict_trainer.experiments.probe.run import Report

    there = [field.name for field in dataclasses.fields(Report)]
    there += [name for name, value in vars(Report).items() if isinstance(value, property)]
    told = types.SimpleNamespace(**dict.fromkeys(there, 0), to_toml=lambda: "[training]\n")
    names["patched"] = mock.patch.object(
        hybrid_predict_trainer, "probe", mock.create_autospec(hybrid_predict_trainer.probe, return_value=told)
    )


def prepare_study(names: dict[str, Any]) -> None:
    names |= {"optuna": pytest.importorskip("optuna"), "rate_of": lambda step, params: 1.0}


def prepare_stop(names: dict[str, Any]) -> None:
    """Ten thousand steps: the call has to fit the signature."""
    from hybrid_predict_trainer.forecast.stopping import StopWhen

    names |= {"trainer": mock.create_autospec(HybridTrainer, instance=True), "StopWhen": StopWhen}


PREPARE: dict[tuple[str, int], Callable[[dict[str, Any]], None]] = {
    ("docs/adapters.md", 0): prepare_tracker,
    ("docs/attach.md", 0): prepare_engine,
    ("docs/attach.md", 1): prepare_engine,
    ("docs/attach.md", 2): prepare_engine_after_a_step,
    ("docs/probe.md", 0): prepare_probe,
    ("docs/sweeps.md", 0): prepare_study,
    ("docs/sweeps.md", 1): prepare_stop,
}
PYTHON = [
    (name, i) for name in DOCUMENTS if name not in ELSEWHERE for i in range(len(blocks(name, "python")))
]  # fmt: skip


@pytest.mark.parametrize(("name", "index"), PYTHON)
def test_a_block_of_python_runs(name: str, index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = compile(blocks(name, "python")[index], f"{name}:{index}", "exec")
    if (name, index) in NOT_RUN:
        pytest.skip(NOT_RUN[name, index])
    monkeypatch.chdir(tmp_path)
    names = usual()
    PREPARE.get((name, index), lambda names: None)(names)
    with names.pop("patched", mock.MagicMock()):
        exec(code, names)


def test_every_exception_is_of_a_block_that_is_there() -> None:
    assert (set(NOT_RUN) | set(PREPARE)) <= set(PYTHON)
    assert all(blocks(name, "python") for name in ELSEWHERE)


# ---- commands ------------------------------------------------------------------------------------------


def parsers(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from parsers(inner, (*path, name))


COMMANDS = dict(parsers(hpt.build_parser()))


def command_lines(name: str) -> Iterator[list[str]]:
    """Words of every command in a document's blocks of shell."""
    for block in blocks(name, "sh", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index(";") if ";" in words else len(words)
                yield words[:end]
                words = words[end + 1 :]


SHELL = [(name, words) for name in DOCUMENTS for words in command_lines(name)]


@pytest.mark.parametrize(("name", "words"), SHELL, ids=[f"{name}: {' '.join(words)}"[:70] for name, words in SHELL])
def test_a_line_of_shell_is_understood(name: str, words: list[str]) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    else:
        assert words[0] == "hpt", f"{words}: no test knows what to do with it"
        hpt.build_parser().parse_args(words[1:])


def named(name: str) -> set[str]:
    """Commands of ``hpt`` that stand in running text."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return set(re.findall(r"`(hpt [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_in_the_text_have_the_flags_that_they_name(name: str) -> None:
    for said in sorted(named(name)):
        words = said.split()[1:]
        path = max((path for path in COMMANDS if tuple(words[: len(path)]) == path), key=len)
        options = {option for action in COMMANDS[path]._actions for option in action.option_strings}
        assert path or words[0].startswith("-"), f"{said}: no such command"
        assert set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", said)) <= options, said


def test_the_commands_that_are_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one of the site, and what is then asked about its run."""
    monkeypatch.chdir(tmp_path)
    (first,) = command_lines("docs/index.md")
    assert cli.main([*first[1:], "--out", "runs/a"]) == 0
    asked = [words for words in command_lines("docs/health.md") if words[2] == "runs/a"]
    asked += [words for words in command_lines("README.md") if words == ["hpt", "inspect", "runs/a"]]
    assert len(asked) == 3
    for words in asked:
        assert cli.main(words[1:]) == 0, words
    assert (tmp_path / "patch.toml").exists()


# ---- public names ----------------------------------------------------------------------------------------


def public() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Functions, constructors and public methods of the package's names, with the text that has to explain them."""
    for name in hybrid_predict_trainer.__all__:
        value = getattr(hybrid_predict_trainer, name)
        if not inspect.isclass(value):
            yield name, value, inspect.getdoc(value) or ""
            continue
        for key, held in vars(value).items():
            function = held.__func__ if isinstance(held, classmethod | staticmethod) else held
            if not inspect.isfunction(function):
                continue
            if key == "__init__" and not dataclasses.is_dataclass(value) and not getattr(value, "_is_protocol", False):
                yield f"{name}.{key}", function, f"{value.__doc__ or ''}\n{function.__doc__ or ''}"
            elif not key.startswith("_"):
                yield f"{name}.{key}", function, inspect.getdoc(function) or ""


def raised(function: Callable[..., Any]) -> set[str]:
    """Names of the errors that a function's own lines raise."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    errors = [error.func if isinstance(error, ast.Call) else error for error in found]
    return {error.id for error in errors if isinstance(error, ast.Name) and error.id[0].isupper()}


PUBLIC = list(public())


def test_every_public_name_is_explained() -> None:
    unexplained = [name for name in hybrid_predict_trainer.__all__ if not getattr(hybrid_predict_trainer, name).__doc__]
    assert unexplained == []
    assert len(PUBLIC) > 80


@pytest.mark.parametrize(("name", "function", "text"), PUBLIC, ids=[name for name, _, _ in PUBLIC])
def test_arguments_and_errors_of_public_names_are_explained(name: str, function: Callable[..., Any], text: str) -> None:
    assert text.strip()
    arguments = [a for a in inspect.signature(function).parameters if a not in ("self", "cls")]
    assert [a for a in arguments if not re.search(rf"\b{re.escape(a)}\b", text)] == []
    assert [error for error in sorted(raised(function)) if error not in text] == []


# ---- sources of the options --------------------------------------------------------------------------------


def test_every_option_has_its_source() -> None:
    site = runpy.run_path(str(ROOT / "docs" / "site" / "options.py"))
    headings = re.findall(r"^#+ (.*)$", (ROOT / "LOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    used = set()
    for key in site["valid_keys"]():
        source = site["source_of"](key)
        used.add(source)
        for quoted in re.findall(r'"([^"]+)"', source):
            assert any(quoted in heading for heading in headings), f"{key}: {quoted}"
    assert {source for _, source in site["SOURCE_OF"]} == used, "a row that no option needs"
    with pytest.raises(KeyError):
        site["source_of"]("no.such.option")
