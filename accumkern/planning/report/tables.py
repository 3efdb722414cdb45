"""Tables of a plan and of a sweep in the terminal, and how their numbers are written."""

from __future__ import annotations

import math
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from accumkern.planning.memory import format_bytes
from accumkern.planning.outcome import Row, Sweep
from accumkern.planning.result import Plan


def format_rate(samples: float, tokens_per_sample: float | None) -> str:
    """Return a number of samples, or of their tokens, for people."""
    value = samples * (tokens_per_sample or 1)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_useful(choice: dict[str, Any]) -> str:
    """Return a range of useful effective batches for people."""
    low, high = choice["useful_low"], choice["useful_high"]
    if low is None:
        return "not measured"
    if high is None or math.isinf(high):
        return f"{low:,.0f} or more"
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def plan_table(plan: Plan) -> RenderableType:
    """Return the plan for each number of ranks, and the reasons."""
    unit = "tokens" if plan.tokens_per_sample else "samples"
    columns = (
        "ranks",
        "micro-batch",
        "accumulate",
        "effective batch",
        "memory per rank",
        f"{unit}/s",
        "useful batches",
    )
    table = _table("the plan", columns)
    for choice in plan.by_ranks:
        speed = choice.samples_per_second
        table.add_row(
            f"{choice.ranks}",
            f"{choice.micro_batch:,}",
            f"{choice.accumulation_steps:,}",
            f"{choice.effective_batch:,}",
            format_bytes(choice.memory_bytes),
            "-" if speed is None else format_rate(speed, plan.tokens_per_sample),
            format_useful({"useful_low": choice.useful_low, "useful_high": choice.useful_high}),
            style="bold" if choice.ranks == plan.choice.ranks else "",
        )
    lines: list[RenderableType] = [table]
    lines += [_bullet(reason, "") for reason in plan.reasons]
    lines += [_bullet(f"Warning: {warning}", "yellow") for warning in plan.warnings]
    if plan.attach:
        steps = plan.choice.accumulation_steps
        lines.append(Text(f"\naccumkern.attach(optimizer, {plan.buffer!r}, average_over={steps})", style="bold"))
    return Group(*lines)


def sweep_table(sweep: Sweep) -> RenderableType:
    """Return a row for each effective batch and rule, and the findings."""
    unit = "tokens" if sweep.tokens_per_sample else "samples"
    target = "" if sweep.target_loss is None else f" {sweep.target_loss:.4g}"
    columns = (
        "batch",
        "rule",
        "learning rate",
        "accumulate",
        "runs",
        f"{unit} to loss{target}",
        "seconds",
        "last loss",
    )
    table = _table("the sweep", (*columns, "memory"))
    for row in sweep.rows:
        table.add_row(*_cells(row, sweep.tokens_per_sample))
    return Group(table, *(_bullet(finding, "") for finding in sweep.findings))


def _cells(row: Row, tokens_per_sample: float | None) -> list[str]:
    reached = row.samples_to_target is not None and row.seconds_to_target is not None
    return [
        f"{row.effective_batch:,}",
        row.rule,
        f"{row.learning_rate:.3g}",
        f"{row.accumulation_steps:,}",
        f"{row.runs} ({row.failed})" if row.failed else f"{row.runs}",
        format_rate(row.samples_to_target or 0, tokens_per_sample) if reached else "not reached",
        f"{row.seconds_to_target:.3g}" if reached else "not reached",
        "-" if row.last_loss is None else f"{row.last_loss:.4g}",
        format_bytes(row.peak_bytes),
    ]


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _bullet(text: str, style: str) -> RenderableType:
    head, colon, rest = text.partition(": ")
    line = Text.assemble("• ", (head + colon, "bold"), rest) if colon and len(head) < 60 else Text(f"• {text}")
    line.stylize(style)
    return Padding(line, (0, 0, 0, 1))
