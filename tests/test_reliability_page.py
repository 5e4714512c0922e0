"""What docs/reliability.md says is held by a test is held by one that exists."""

from __future__ import annotations

import re
from pathlib import Path

from hybrid_predict_trainer.experiments.faults import program

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_case_is_held_by_something_that_exists() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", PAGE, re.M)
    assert [int(number) for number, _, _ in rows] == list(range(1, 51))
    tests = {p.stem: re.findall(r"^def (test_\w+)", p.read_text(), re.M) for p in (ROOT / "tests").glob("test_*.py")}
    for number, _, held in rows:
        named = re.findall(r"`(test_\w+)::(test_\w+)`", held)
        assert named or held.endswith("table"), number
        assert [(file, name) for file, name in named if name not in tests.get(file, ())] == [], number


def test_the_table_has_the_cases_of_today() -> None:
    _, _, rest = PAGE.partition("<!-- faults: begin -->")
    table, _, _ = rest.partition("<!-- faults: end -->")
    there = re.findall(r"^\| ([^|*]+?) \| [^|]+ \| \d+ \| \d+ \| 0 \|$", table, re.M)
    assert there == [case.name for case in program.all_cases()], "a case is missing, or one was lost"
