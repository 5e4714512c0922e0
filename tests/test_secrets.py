"""No secret is in a file of the project: what is committed stays in its history."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Forms of keys that services give out, and of key files; each with a made-up one in two halves, so that this file
#: holds none.
SECRETS = {
    r"-----BEGIN (RSA |EC |OPENSSH |DSA |ENCRYPTED )?PRIVATE KEY": ("-----BEGIN ", "PRIVATE KEY-----"),
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b": ("AKIA", "ABCDEFGHIJKLMNOP"),
    r"\bgh[pousr]_[A-Za-z0-9]{36}": ("ghp_", "a" * 36),
    r"\bhf_[A-Za-z]{34}\b": ("hf_", "a" * 34),
    r"\bsk-[A-Za-z0-9_-]{32,}": ("sk-", "a" * 40),
    r"\bxox[abprs]-[A-Za-z0-9-]{10,}": ("xoxb-", "1234567890-abc"),
    r"\bpypi-[A-Za-z0-9_-]{50,}": ("pypi-", "a" * 60),
    r"://[^/\s:@'\"{}]+:[^/\s:@'\"{}]+@": ("https://user:", "word@host"),
}
ANY = re.compile("|".join(f"(?:{pattern})" for pattern in SECRETS))


def tracked() -> list[Path]:
    """Files of the project that are text; all files where this is no checkout."""
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        return [p for folder in ("src", "tests", "docs") for p in (ROOT / folder).rglob("*") if p.is_file()]
    return [ROOT / name for name in found.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_no_file_holds_a_secret() -> None:
    files = tracked()
    assert len(files) > 100
    hits = [f"{p.relative_to(ROOT)}: {m[0][:12]}..." for p in files if (m := ANY.search(p.read_text(errors="replace")))]
    assert not hits


@pytest.mark.parametrize("pattern", SECRETS)
def test_every_form_is_known(pattern: str) -> None:
    assert re.search(pattern, 'x = "' + "".join(SECRETS[pattern]) + '"')
