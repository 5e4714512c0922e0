"""What became of one unit of `gpu.sh`, as JSON on stdout: record.py UNIT KIND RC SECONDS LIMIT LOG COMMAND...

KIND is required or optional.  Nothing is imported that takes time: this runs after every unit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

#: Exit status -> word; `timeout` ends with 124, or 137 where the command had to be killed.
WORDS = {0: "done", 124: "timeout", 137: "timeout", 130: "stopped", 143: "stopped"}
BAD_INPUT = 2


def record(unit: str, kind: str, rc: int, seconds: int, limit: int, log: Path, command: list[str]) -> dict[str, object]:
    """The record; the log's last line says why a unit did not end well."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    told = [line.strip() for line in lines if line.strip()]
    status = WORDS.get(rc, "failed")
    if kind == "optional" and rc == BAD_INPUT:
        status = "skipped"
    return {
        "schema": 1, "what": "unit", "unit": unit, "status": status, "rc": rc, "seconds": seconds, "limit_s": limit,
        "command": command, "told": told[-1] if told and status != "done" else "",
    }  # fmt: skip


if __name__ == "__main__":
    name, kind, rc, seconds, limit, log, *command = sys.argv[1:]
    found = record(name, kind, int(rc), int(seconds), int(limit), Path(log), command)
    print(json.dumps(found))
    why = f": {found['told']}" if found["told"] else ""
    print(f"{name}: {found['status']}, {seconds} s{why}", file=sys.stderr)
