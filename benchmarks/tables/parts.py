"""What tables are made of: sections, numbers and Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

Content = dict[str, Any]  # of a result file: provenance, method, results
Result = dict[str, Any]

SURE = 0.9  # intervals of less confidence prove nothing
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Section:
    """What is shown of a benchmark.

    Attributes:
        title: its heading in docs/benchmarks.md.
        full: all tables, for docs/benchmarks.md and the terminal.
        summary: the few lines at the head of the machine there; None leaves it out.
    """

    title: str
    full: Callable[[Content], list[str]]
    summary: Callable[[Content], list[str]] | None = None


def table(header: list[str], rows: list[list[str]], numbers: bool = True) -> list[str]:
    """Return a table and an empty line behind it; columns but the first stand to the right if they are numbers."""
    marks = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return [*("| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)), ""]


def paragraph(text: str) -> list[str]:
    """Return prose as lines of the width that the repository keeps to, with an empty line behind it."""
    return [*textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False), ""]


def number(value: float) -> str:
    """Return a number to two or three digits: ``1,234``, ``12.3``, ``1.23``, ``0.012``."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def spread(result: Result) -> str:
    """Return a result's median, and in brackets its 20th and 80th percentile, with their unit."""
    unit, scale = ("ms", 1.0) if result["median_ms"] >= 0.1 else ("µs", 1e3)
    median, low, high = (number(scale * result[key]) for key in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} {unit} ({low}-{high})"


def taken(result: Result) -> str:
    """Return the same, and whether a GPU was faster than what queued its work."""
    return spread(result) + (", by the host" if result["how"] == "host" else "")


def host_time(result: Result) -> str:
    """Return the microseconds until Python goes on after a call; nothing where they were not measured."""
    return f"{number(1e3 * result['host_ms'])} µs" if result.get("host_ms") else ""


def interval(found: Result | None) -> str:
    """Return a ratio's median, and in brackets the interval that holds it; nothing where there is none."""
    return f"{found['median']:.3f} ({found['low']:.3f}-{found['high']:.3f})" if found else ""


def millions(result: Result) -> str:
    """Return how many weights were trained."""
    return f"{number(result['parameters'] / 1e6)} million weights"


def number_of_tensors(number: Hashable) -> str:
    """Return a number of tensors in words."""
    return "1 tensor" if number == 1 else f"{number} tensors"


def fastest(results: list[Result]) -> Result | None:
    """Return the result of the smallest median, or None where none was measured."""
    return min((r for r in results if "median_ms" in r), key=lambda r: float(r["median_ms"]), default=None)


def grouped(results: list[Result], *keys: str) -> dict[Hashable, list[Result]]:
    """Return the results by their value of a key, or by the tuple of their values of several keys."""
    groups: dict[Hashable, list[Result]] = {}
    for result in results:
        values = tuple(result[key] for key in keys)
        groups.setdefault(values[0] if len(keys) == 1 else values, []).append(result)
    return groups


def on_cpu(content: Content) -> bool:
    """Return whether a CPU was measured."""
    return str(content["provenance"]["machine"]).startswith("CPU ")


def times(result: Result, other: Result) -> float:
    """Return the median time of a result over that of another."""
    return float(result["median_ms"] / other["median_ms"])


def design_name(result: Result) -> str:
    """Return the label of a design, accumkern's own in bold."""
    return f"**{result['label']}**" if result["label"].startswith("accumkern") else str(result["label"])


def side_of(found: Result, middle: float, above: str, below: str, neither: str) -> str:
    """Return which word fits an interval that lies above or below a number, or that does not tell."""
    if found["confidence"] < SURE or found["low"] <= middle <= found["high"]:
        return neither
    return above if found["low"] > middle else below
