"""Are known faults in what is installed?  ``make check`` asks; ``make audit`` also insists on an answer.

pip-audit itself ends well where the service that it asks answers nothing: every package is skipped then.  What could
not be looked up is said here, and is never taken for a clean bill.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

#: Seconds; some hundred packages take half a minute.
PATIENCE_S = 300
#: How many names are told.
TOLD = 5


def asked(patience_s: float = PATIENCE_S) -> tuple[int, str, str]:
    """Status, output and errors of pip-audit, over all that is installed."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--skip-editable", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patience_s)
    except subprocess.TimeoutExpired:
        return 1, "", f"no answer within {patience_s:g} s"
    return done.returncode, done.stdout, done.stderr


def verdict(status: int, output: str, errors: str, *, strict: bool) -> tuple[int, list[str]]:
    """What to say of it.

    Args:
        status: Of pip-audit.
        output: Its JSON.
        errors: What it said beside.
        strict: What could not be looked up fails.

    Returns:
        An exit status and lines.
    """
    try:
        packages: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (errors.strip().splitlines() or [f"pip-audit ended with {status}"])[-1]
        return int(strict), [f"dependencies NOT audited: {last[:300]}"]
    faulty = [(p["name"], p["version"], fault) for p in packages for fault in p.get("vulns", ())]
    lines = [
        f"{name} {version}: {f['id']}, fixed in {_words(f.get('fix_versions', ()))}" for name, version, f in faulty
    ]
    own = [p for p in packages if "editable" in p.get("skip_reason", "")]
    skipped = [p["name"] for p in packages if "skip_reason" in p and p not in own]
    known = len(packages) - len(own) - len(skipped)
    lines.append(f"dependencies audited: {known}, with known faults: {len({name for name, _, _ in faulty})}")
    if skipped or not known:
        more = f" and {len(skipped) - TOLD} more" if len(skipped) > TOLD else ""
        told = f" ({', '.join(skipped[:TOLD])}{more})" if skipped else ""
        lines.append(f"dependencies NOT audited: {len(skipped)}{told}: the advisory service did not know them")
    return int(bool(faulty) or (strict and (bool(skipped) or not known))), lines


def _words(versions: Any) -> str:
    return ", ".join(versions or ()) or "no version"


def main() -> int:
    """Ask and tell."""
    status, lines = verdict(*asked(), strict="--strict" in sys.argv[1:])
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
