"""The table that the doctor prints: a line a finding, its remedy below it."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import replace

from bge_ds.doctor.checks import ALL, FAILED, OK, SKIPPED, WARNING, Finding

WIDTH = 118
MANY_HOSTS = 4  # up to so many hosts that pass a check have a line each; more share one
_COLOURS = {OK: "32", WARNING: "33", FAILED: "31", SKIPPED: "36"}


class Table:
    """Prints findings as they come, and counts them by status."""

    def __init__(self, hosts: Iterable[str]):
        self.hosts = list(hosts)
        self.column = min(24, max(map(len, [*self.hosts, ALL])))
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.counts = dict.fromkeys((OK, WARNING, FAILED, SKIPPED), 0)

    @property
    def failed(self) -> bool:
        return self.counts[FAILED] > 0

    def add(self, findings: Iterable[Finding]) -> None:
        """The findings of one check. What several hosts share is one line that names them."""
        groups: dict[Finding, list[str]] = {}
        for finding in findings:
            self.counts[finding.status] += 1
            groups.setdefault(replace(finding, host=""), []).append(finding.host)
        merged = [self._merge(finding, names) for finding, names in groups.items()]
        passed = [finding for finding in merged if finding.status == OK and finding.host != ALL]
        if len(passed) > MANY_HOSTS:
            one = replace(passed[0], host=f"{len(passed)} hosts", text=f"such as {passed[0].text}")
            merged = [one if finding is passed[0] else finding for finding in merged if finding not in passed[1:]]
        for finding in merged:
            self._print(finding)

    def _merge(self, finding: Finding, names: list[str]) -> Finding:
        if len(names) == 1:
            return replace(finding, host=names[0])
        if len(names) == len(self.hosts):
            return replace(finding, host=ALL)
        return replace(finding, host=f"{len(names)} hosts", text=f"{', '.join(names)}: {finding.text}")

    def _print(self, finding: Finding) -> None:
        status = f"{finding.status:<8}"
        if self.colour:
            status = f"\033[{_COLOURS[finding.status]}m{status}\033[0m"
        indent = " " * (8 + 11 + self.column + 2)
        lines = _wrap(finding.text, WIDTH - len(indent), "    ")
        if finding.remedy:
            lines += _wrap(f"-> {finding.remedy}", WIDTH - len(indent), "   ")
        print(f"{status}{finding.check:<11}{finding.host:<{self.column}}  {lines[0]}", flush=True)
        for line in lines[1:]:
            print(indent + line, flush=True)
        for line in finding.printed:
            print(f"    | {line}"[:WIDTH], flush=True)

    def close(self) -> None:
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        print(f"{counts}: {'not ready' if self.failed else 'ready'}", flush=True)


def _wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False) or [""]
