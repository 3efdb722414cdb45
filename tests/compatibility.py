"""The compatibility matrix: what the tests marked ``integration`` have shown, with which versions.

Mark a test, a class or a module (``pytestmark``) that runs against a real library::

    @pytest.mark.integration("HF Trainer", version_of="transformers")
    @pytest.mark.integration("DDP: static_graph")                                          # of torch itself
    @pytest.mark.integration("HF Trainer: SomeOption", version_of="transformers", refused="why it can't be right")

The feature is a literal string; all tests of one feature make one line of the matrix. ``version_of`` is the name under
which pip knows the library. ``refused`` is the reason, in a few words, why accumkern refuses: the test then shows that
it does so with a clear error. Then run::

    python -m pytest -m integration --write-compatibility

It writes docs/compatibility.json and the README's table, if no test failed. Lines of other versions of torch or of the
library, or of another device, stay. A feature of which every test was skipped is written as not run, with the reason,
unless it has a line from elsewhere. Commit both files; tests/test_compatibility.py checks that they fit together.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "compatibility.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"

Line: TypeAlias = dict[str, Any]


class Recorder:
    """A pytest plugin that notes what the marked tests show, and writes it at the end of the session."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        """Count a test for its features."""
        report = yield
        for marker in item.iter_markers("integration"):
            line = self.lines.setdefault(marker.args[0], new_line(*marker.args, **marker.kwargs))
            if report.skipped and not hasattr(report, "wasxfail"):
                line["reason"] = line["reason"] or report.longrepr[2].removeprefix("Skipped: ")
            elif report.when == "call" and report.passed:
                line["tests"] += 1
        return report

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the record and the README's table, unless a test failed."""
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        if exitstatus != pytest.ExitCode.OK:
            reporter.write_line("\ncompatibility: nothing is written, for something failed", red=True)
            return
        RECORD.write_text(json.dumps(merge(load(), list(self.lines.values())), indent=1) + "\n")
        README.write_text(with_table(README.read_text(), load()))
        reporter.write_line(f"\ncompatibility: {len(self.lines)} features written to {RECORD.relative_to(ROOT)}")


def new_line(feature: str, version_of: str = "torch", refused: str | None = None) -> Line:
    """Return the line of a feature before any test of it has run."""
    try:
        version = importlib.metadata.version(version_of)
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "feature": feature,
        "library": version_of,
        "version": version.partition("+")[0],
        "torch": torch.__version__.partition("+")[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "result": "works" if refused is None else "refused",
        "reason": refused,
        "tests": 0,
    }


def merge(known: list[Line], new: list[Line]) -> list[Line]:
    """Return the lines of both in order of feature, new ones in the place of old ones of the same versions."""

    def key(line: Line) -> tuple[str, ...]:
        return tuple(line[name] for name in ("feature", "library", "version", "torch", "device"))

    lines = {key(line): line for line in known if line["tests"]}
    lines |= {key(line): line for line in new if line["tests"]}
    run = {line["feature"] for line in lines.values()}
    for line in [*known, *new]:
        if not line["tests"] and line["feature"] not in run:
            lines[key(line)] = {**line, "result": "not run"}
    for line in lines.values():
        if line["result"] == "works":
            line["reason"] = None  # of a test among them that was skipped
    return sorted(lines.values(), key=lambda line: (line["feature"].lower(), key(line)))


def load() -> list[Line]:
    """Return the committed lines."""
    lines: list[Line] = json.loads(RECORD.read_text()) if RECORD.exists() else []
    return lines


def with_table(readme: str, lines: list[Line]) -> str:
    """Return the README with the table of ``lines`` between its markers."""
    table = ["| feature | tested with | on | result | tests |", "|---|---|---|---|---|"]
    for line in lines:
        versions = [f"torch {line['torch']}"]
        if line["library"] != "torch":
            versions.insert(0, f"{line['library']} {line['version']}")
        result = line["result"] if line["reason"] is None else f"{line['result']}: {line['reason']}"
        where = line["device"] if line["tests"] else "-"
        table.append(f"| {line['feature']} | {', '.join(versions)} | {where} | {result} | {line['tests']} |")
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"README.md lacks {BEGIN} or {END}")
    return f"{before}{BEGIN}\n" + "\n".join(table) + f"\n{END}{after}"
