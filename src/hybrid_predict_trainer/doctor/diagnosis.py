"""All signals of a run, as data, as text and as a patch in TOML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..config.toml import literal, with_values
from .record import RunRecord
from .signals import SIGNALS, Finding, Severity

#: Said where the remedies of two findings differ: the founding document's conclusion.
RULE = "when in doubt: more full steps and a longer warm-up; stability before speed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found, worst first."""

    findings: tuple[Finding, ...]
    num_steps: int
    num_unread: int = 0  # lines of the record that are none

    @property
    def patch(self) -> dict[str, Any]:
        """Settings of all findings by dotted key; of two values the worse finding's."""
        found: dict[str, Any] = {}
        for finding in reversed(self.findings):
            found |= finding.patch
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        findings = [{**asdict(f), "severity": f.severity.value, "patch": dict(f.patch)} for f in self.findings]
        return {
            "num_steps": self.num_steps,
            "num_unread": self.num_unread,
            "findings": findings,
            "patch": self.patch,
            "toml": self.as_toml(),
        }

    def as_toml(self) -> str:
        """The patch, to be saved and passed to ``--config``; what is no setting of the trainer stands as a comment."""
        tables: dict[str, list[str]] = {}
        for key, value in self.patch.items():
            table, _, name = key.rpartition(".")
            tables.setdefault(table, []).append(f"{name} = {literal(value)}")
        flags = dict.fromkeys(f"# hpt train {flag}   ({f.name})" for f in self.findings for flag in f.flags)
        blocks = ["\n".join([f"[{table}]", *lines]) for table, lines in tables.items()]
        return "\n\n".join([*(["\n".join(flags)] if flags else []), *blocks])

    def as_text(self) -> str:
        """For a person."""
        if not self.findings:
            return f"nothing is wrong in {self.num_steps} steps, as far as their records tell{self._unread()}"
        parts = [f"{len(self.findings)} found in {self.num_steps} steps{self._unread()}"]
        for f in self.findings:
            rows = (("seen", f.seen), ("healthy", f.healthy), ("means", f.meaning), ("do", f.remedy))
            parts.append("\n".join([f"{f.severity.value.upper()}: {f.name}", *(f"  {k:<8}{v}" for k, v in rows)]))
        patch = self.as_toml()
        if patch:
            parts.append(f"# patch: save as patch.toml, then --config patch.toml\n{patch}")
        return "\n\n".join([*parts, RULE])

    def _unread(self) -> str:
        if not self.num_unread:
            return ""
        if self.num_unread == 1:
            return "; a line of the record is torn and was left out, as a kill leaves the last one"
        return f"; {self.num_unread} lines of the record cannot be read and were left out: the file is damaged"


def diagnose(run: RunRecord) -> Diagnosis:
    """Ask every signal; the patch is checked against the run's settings.

    Raises:
        ConfigError: a remedy does not fit the settings: a mistake of ours.
    """
    worst: Mapping[Severity, int] = {Severity.CRITICAL: 0, Severity.WARNING: 1, Severity.NOTICE: 2}
    found = sorted((f for signal in SIGNALS if (f := signal(run)) is not None), key=lambda f: worst[f.severity])
    result = Diagnosis(findings=tuple(found), num_steps=len(run.phases), num_unread=run.num_unread)
    with_values(run.config, result.patch)
    return result
