"""The compatibility matrix: what the tests marked ``integration`` have shown, with which versions.

Mark a test, a class or a module (``pytestmark``) that runs against a real library::

    @pytest.mark.integration("HF Trainer", version_of="transformers")
    @pytest.mark.integration("DDP: static_graph")                                          # of torch itself
    @pytest.mark.integration("HF Trainer: SomeOption", version_of="transformers", refused="why it can't be right")

The feature is a literal string; all tests of one feature make one row of the matrix. ``version_of`` is the name under
which pip knows the library. ``refused`` is the reason, in a few words, why accumkern refuses: the test then shows that
it does so with a clear error. Then run::

    python -m pytest -m integration --write-compatibility

It writes docs/compatibility.json, and docs/compatibility.md from it, if no test failed. Lines of other versions of
torch or of the library, or of another device, stay. A feature of which every test was skipped is written as not run,
with the reason, unless it has a line from elsewhere. Commit both; tests/test_compatibility.py checks that they fit.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "compatibility.json"
PAGE = ROOT / "docs" / "compatibility.md"
HEAD = """# What it was tested with

Made by `python -m pytest -m integration --write-compatibility` from `compatibility.json` beside it; do not edit. Each
cell is of tests against the real library, with the torch and on the device of its column: whether it works or is
refused, with a clear error, and the number of tests. Where a cell is empty, nothing was run.

"""

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
        """Write the record and the page of it, unless a test failed."""
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        assert reporter is not None
        if exitstatus != pytest.ExitCode.OK:
            reporter.write_line("\ncompatibility: nothing is written, for something failed", red=True)
            return
        RECORD.write_text(json.dumps(merge(load(), list(self.lines.values())), indent=1) + "\n")
        PAGE.write_text(page(load()))
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


def page(lines: list[Line]) -> str:
    """Return docs/compatibility.md: a row for each feature, a column for each torch and device."""
    columns = sorted({(line["torch"], line["device"]) for line in lines}, key=lambda c: (c[1], _numbers(c[0])))
    rows = [
        ["feature", "with", *(f"torch {torch_version}, {device}" for torch_version, device in columns)],
        ["---"] * (2 + len(columns)),
    ]
    by_feature: dict[str, list[Line]] = {}
    for line in lines:
        by_feature.setdefault(line["feature"], []).append(line)
    for feature, of_feature in by_feature.items():
        reasons = dict.fromkeys(f"{line['result']}: {line['reason']}" for line in of_feature if line["reason"])
        versions = sorted({line["version"] for line in of_feature}, key=_numbers)
        library = of_feature[0]["library"]
        cells = [
            "; ".join(
                _cell(line, names_version=library != "torch" and len(versions) > 1)
                for line in of_feature
                if (line["torch"], line["device"]) == column
            )
            for column in columns
        ]
        used = "" if library == "torch" else f"{library} {', '.join(versions)}"
        rows.append(["<br>".join([feature, *reasons]), used, *cells])
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(line: Line, names_version: bool) -> str:
    version = f" ({line['version']})" if names_version else ""
    return f"{line['result']}, {line['tests']}{version}" if line["tests"] else f"{line['result']}{version}"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
