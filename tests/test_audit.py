"""What is said of an audit of the dependencies: what was not looked up is no clean bill."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

import audit

GOOD = {"name": "torch", "version": "2.13.0", "vulns": []}
BAD = {"name": "numpy", "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": ["1.1", "2.0"]}]}
MANY = [{"name": f"p{i}", "skip_reason": "not found"} for i in range(9)]
UNKNOWN = {"name": "own-thing", "skip_reason": "Dependency not found on PyPI and could not be audited"}
OURS = {"name": "hybrid-predict-trainer", "skip_reason": "distribution marked as editable"}


def said(*packages: Any, strict: bool = False) -> tuple[int, str]:
    status, lines = audit.verdict(0, json.dumps({"dependencies": packages, "fixes": []}), "", strict=strict)
    return status, "; ".join(lines)


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_known_is_told(strict: bool) -> None:
    assert said(GOOD, OURS, strict=strict) == (0, "dependencies audited: 1, with known faults: 0")
    status, told = said(GOOD, BAD, strict=strict)
    assert status == 1
    assert told == "numpy 1.0: CVE-1, fixed in 1.1, 2.0; dependencies audited: 2, with known faults: 1"


@pytest.mark.parametrize("packages", [[UNKNOWN], [OURS], [UNKNOWN, GOOD], MANY])
def test_what_was_not_looked_up_is_no_clean_bill(packages: list[Any]) -> None:
    status, told = said(*packages)
    assert status == 0
    assert "NOT audited" in told
    assert said(*packages, strict=True)[0] == 1


@pytest.mark.parametrize("output", ["", "nonsense", "[]", "{}"])
def test_a_service_that_cannot_be_reached_is_one_line(output: str) -> None:
    errors = "Traceback ...\nConnectionError: name or service not known\n"
    for strict in (False, True):
        status, lines = audit.verdict(1, output, errors, strict=strict)
        assert status == int(strict)
        assert lines == ["dependencies NOT audited: ConnectionError: name or service not known"]
    assert audit.verdict(7, output, "", strict=False)[1] == ["dependencies NOT audited: pip-audit ended with 7"]


def test_an_answer_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*args: Any, **kwargs: Any) -> Any:
        raise subprocess.TimeoutExpired(sys.executable, kwargs["timeout"])

    monkeypatch.setattr(subprocess, "run", hangs)
    assert audit.verdict(*audit.asked(2), strict=False)[1] == ["dependencies NOT audited: no answer within 2 s"]
