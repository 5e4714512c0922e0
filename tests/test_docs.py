"""What the documents show has to run, and what they name has to exist."""

from __future__ import annotations

import doctest
import importlib
import re
import runpy
import subprocess
import sys
import tomllib
from functools import reduce
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import hybrid_predict_trainer
from cases import full_batch, loss_fn, setup
from hybrid_predict_trainer import HybridTrainerConfig, Phase
from hybrid_predict_trainer.config.former import FORMER_KEYS
from hybrid_predict_trainer.config.toml import valid_keys
from hybrid_predict_trainer.experiments.regimes import readme_rows
from hybrid_predict_trainer.tasks import TASKS

ROOT = Path(__file__).parents[1]


def blocks(name: str) -> list[str]:
    """The Python examples of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, as a reader would paste them."""
    first, *others = blocks("README.md")
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(first, "README.md", "exec"), names)
    accepted, loss = capsys.readouterr().out.split()
    assert int(accepted) > 0
    assert 0 < float(loss) < 1e-3
    assert len(others) == 2
    for block in others:
        exec(compile(block, "README.md", "exec"), names)


def test_the_readme_has_one_table_of_gains_with_at_most_eight_rows() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- table -->")[2].partition("<!-- end of table -->")[0].strip().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert 0 < len(rows) <= 8
    assert head == list(readme_rows.SHORT_HEAD)
    assert {len(row) for row in rows} == {len(head)}
    assert all(row[-1] for row in rows)


def test_the_pictures_of_the_cycle_say_the_same() -> None:
    light, dark = (ElementTree.parse(ROOT / "docs" / "images" / f"cycle-{name}.svg") for name in ("light", "dark"))
    words = [[e.text for e in tree.iter() if e.tag.endswith(("text", "desc"))] for tree in (light, dark)]
    assert words[0] == words[1]
    assert {phase.name for phase in Phase} <= set(words[0])
    places = [[(e.tag, e.get("x"), e.get("y"), e.get("d")) for e in tree.iter()] for tree in (light, dark)]
    assert places[0] == places[1]


def test_the_example_predictor_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "custom_predictor.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "num_jumps_accepted" in done.stdout


def test_the_example_of_a_loop_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "attach_loop.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rpartition("num_jumps_accepted:")[2]) > 0


def test_the_lines_that_attach_adds_to_a_loop_run() -> None:
    text = (ROOT / "docs" / "attach.md").read_text(encoding="utf-8")
    lines = text.partition("```diff\n")[2].partition("```")[0].splitlines()
    loop = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    built = setup("mlp", "adam", "lambda")
    names: dict[str, object] = {
        "attach": hybrid_predict_trainer.attach, "torch": torch, "model": built.model, "optimizer": built.optimizer,
        "scheduler": built.scheduler, "loss_fn": loss_fn, "loader": full_batch(5),
    }  # fmt: skip
    exec(compile(loop, "attach.md", "exec"), names)
    assert names["engine"].statistics()["num_real_steps"] == 5  # type: ignore[attr-defined]
    assert built.scheduler is not None
    assert built.scheduler.last_epoch == 5


def test_the_examples_of_extending_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {"__name__": "extending"}
    predictor, modifier, sink, task = blocks("docs/extending.md")
    exec(compile(predictor, "extending.md", "exec"), names)
    assert int(capsys.readouterr().out.split()[0]) > 0
    exec(compile(modifier, "extending.md", "exec"), names)
    gradients = [p.grad for p in names["model"].parameters() if p.grad is not None and p.dim() > 1]
    assert gradients
    assert all(float(g.mean(dim=1).abs().max()) < 1e-6 for g in gradients)
    exec(compile(sink, "extending.md", "exec"), names)
    assert capsys.readouterr().out.startswith("step ")
    monkeypatch.chdir(tmp_path)
    try:
        exec(compile(task, "extending.md", "exec"), names)
    finally:
        TASKS.pop("sine", None)
    assert capsys.readouterr().out.startswith("sine, hybrid, seed 0: validation loss")


def changes(text: str) -> dict[str, list[tuple[str, str]]]:
    """Of a diff: file -> (lines as they are, lines as they will be) of every hunk."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^--- ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        for hunk in re.split(r"^@@\n", body, flags=re.MULTILINE):
            lines = [line or " " for line in hunk.splitlines()]
            assert {line[0] for line in lines} <= set(" +-"), hunk
            before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
            found.setdefault(name, []).append((before, after))
    return found


def test_the_changes_that_extending_shows_fit_the_files() -> None:
    diffs = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.DOTALL)
    assert diffs
    for diff in diffs:
        files = changes(diff)
        assert 0 < len(files) <= 3
        for name, hunks in files.items():
            text = (ROOT / name).read_text(encoding="utf-8") if (ROOT / name).exists() else ""
            for before, after in hunks:
                assert not before or text.count(before) == 1, f"{name}:\n{before}"
                text = text.replace(before, after) if before else after
            compile(text, name, "exec")


def documented() -> dict[str, object]:
    """Key -> default, of every row of docs/configuration.md; `.name` shares the table of the key before it."""
    found: dict[str, object] = {}
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for line in text.partition("## Settings")[2].partition("## Former names")[0].splitlines():
        if not line.startswith("| `"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`([a-z_.*0-9]+)`", cells[0])
        table = names[0].rpartition(".")[0]
        values = tomllib.loads(f"x = [{cells[1]}]")["x"] if cells[1] else [None] * len(names)
        assert len(names) == len(values), line
        found |= {table + n if n.startswith(".") else n: v for n, v in zip(names, values, strict=True)}
    return found


def test_every_former_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").partition("## Former names")[2]
    pairs = {
        former: today
        for row in re.findall(r"^\| (`.*`) \| (`.*`) \|$", text, re.MULTILINE)
        for former, today in zip(*(re.findall(r"`([\w.]+)`", cell) for cell in row), strict=True)
    }
    assert pairs == FORMER_KEYS


def test_every_key_is_documented_with_its_default() -> None:
    rows, keys = documented(), valid_keys()
    tables = [key.removesuffix("*") for key in rows if key.endswith(".*")]
    assert {key for key in rows if not key.endswith("*")} <= set(keys)
    assert [key for key in keys if key not in rows and not key.startswith(tuple(tables))] == []
    for key, default in rows.items():
        if not key.endswith("*"):
            value = reduce(getattr, keys[key], HybridTrainerConfig())
            assert (list(value) if isinstance(value, tuple) else value) == default, key


def test_every_folder_has_its_row() -> None:
    root = Path(hybrid_predict_trainer.__file__).parent
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").partition("## Folders")[2]
    told = set()
    for row in re.findall(r"^\| (the root|`\w+/`) \|.*\| (.*) \|$", text, re.MULTILINE):
        folder = root if row[0] == "the root" else root / row[0].strip("`/")
        told.add(folder)
        names = re.findall(r"`(\w+)`", row[1])
        assert names
        for name in names:
            assert (folder / f"{name}.py").exists() or (folder / name).is_dir(), f"{folder.name}/{name}"
    assert told == {root, *(p.parent for p in root.glob("*/__init__.py"))}


def heads(name: Path) -> set[str]:
    """Anchors of a document's headings."""
    titles = re.findall(r"^#+ (.*)$", name.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "name", ["README.md", "LOG.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r"src(?:set)?=\"([^\"]+)\"", text):
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent.joinpath(path) if path else ROOT / name
        assert found.exists(), target
        assert not anchor or anchor in heads(found), target


@pytest.mark.parametrize("name", ["docs/index.md", "docs/schedules.md"])
def test_the_examples_of_a_page_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(name):
        exec(compile(block, name, "exec"), {"__name__": "page"})
    if name == "docs/index.md":
        assert int(capsys.readouterr().out.split()[0]) > 0


def test_the_table_of_options_is_the_one_of_today() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "site" / "options.py"))["page"]()
    assert page == (ROOT / "docs" / "options.md").read_text(encoding="utf-8"), "run 'make options'"
    assert page.count("\n| `") == len(valid_keys())


def test_every_page_is_in_the_site() -> None:
    listed = set(re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_examples_in_docstrings_hold() -> None:
    package = Path(hybrid_predict_trainer.__file__).parent
    found = [path for path in package.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")]
    assert found
    for path in found:
        name = ".".join(("hybrid_predict_trainer", *path.relative_to(package).with_suffix("").parts))
        result = doctest.testmod(importlib.import_module(name))
        assert (result.failed, result.attempted > 0) == (0, True), name
