"""``accumkern plan`` and ``accumkern sweep``: live progress, a table or JSON, and a folder of results."""

from __future__ import annotations

import argparse
import itertools
import json
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import accumkern
from accumkern.planning.memory import format_bytes
from accumkern.planning.plan import plan
from accumkern.planning.plan_result import Plan
from accumkern.planning.protocol import load_setup
from accumkern.planning.ranks import is_first
from accumkern.planning.report import format_rate, format_useful, write_plan, write_sweep
from accumkern.planning.sweep import sweep
from accumkern.planning.sweep_result import Row, Run, Sweep

_OWN = ("command", "setup", "output", "json", "predict")  # options of the command line; the others are arguments
_LEAST_WIDTH = 100  # where there is no terminal to fit into


def run(args: argparse.Namespace) -> int:
    """Run a command; return its exit status: 1 where nothing was learnt, 2 where it failed.

    Of several ranks, the first prints and writes the result, and every rank its own error.
    """
    errors = _console(stderr=True)
    try:
        if args.output is not None:
            args.output = args.output.expanduser()
            args.output.mkdir(parents=True, exist_ok=True)  # before hours of measuring
        with _Live(errors) as live:
            result = _plan(args, live) if args.command == "plan" else _sweep(args, live)
            if not is_first():
                return 0
            page = _write(result, args)
    except (AttributeError, OSError, TypeError, ValueError, RuntimeError) as error:
        errors.print(f"accumkern {args.command}: {error}", style="red", markup=False, highlight=False)
        for frame in _frames_of_script(error.__cause__ or error, args.setup.rpartition(":")[0])[-1:]:
            errors.print(f"  raised at {frame.filename}:{frame.lineno}: {frame.line}", markup=False, highlight=False)
        return 2
    if args.json:
        print(json.dumps(result.to_dict(), indent=1, allow_nan=False))
    else:
        _console().print(_plan_table(result) if isinstance(result, Plan) else _sweep_table(result))
    if page is not None:
        errors.print(f"\nreport: {page}", markup=False, highlight=False)
    return 0 if isinstance(result, Plan) or result.learnt else 1


def _plan(args: argparse.Namespace, live: _Live) -> Plan:
    return plan(load_setup(args.setup), **_arguments(args), measure=not args.predict, progress=live.tell)


def _sweep(args: argparse.Namespace, live: _Live) -> Sweep:
    def tell(run: Run) -> None:
        loss = f"loss {run.best_loss:.4g}" if run.points else "no loss"
        live.tell(
            f"batch {run.effective_batch}, {run.rule}, seed {run.seed}", f"{run.status}: {loss} in {run.seconds:.3g} s"
        )

    return sweep(load_setup(args.setup), folder=args.output, **_arguments(args), progress=tell)


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line has in common with the function: all but what is its own."""
    return {name: value for name, value in vars(args).items() if name not in _OWN}


def _write(result: Plan | Sweep, args: argparse.Namespace) -> Any:
    if args.output is None:
        return None
    return write_plan(result, args.output) if isinstance(result, Plan) else write_sweep(result, args.output)


def _frames_of_script(error: BaseException, script: str) -> list[traceback.FrameSummary]:
    """Return where an error passed through the code in a script's folder, called from accumkern."""
    own, of_torch = (Path(str(package.__file__)).parent for package in (accumkern, torch))
    frames = [(frame, Path(frame.filename).parents) for frame in traceback.extract_tb(error.__traceback__)]
    called = itertools.dropwhile(lambda frame: own not in frame[1], frames)
    folder = Path(script).expanduser().resolve().parent
    return [frame for frame, parents in called if folder in parents and not {own, of_torch} & set(parents)]


class _Live:
    """A line for each stage, with what came of it last; on anything but a terminal, a line for each thing told."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", style="bold"),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> _Live:
        self._progress.__enter__()
        return self

    def tell(self, stage: str, detail: str) -> None:
        """Show what came of a stage."""
        if not is_first():
            return
        if not self._console.is_terminal:
            self._console.print(f"{stage}: {detail}", markup=False, highlight=False)
        if stage not in self._tasks:
            self._finish()
            self._tasks[stage] = self._progress.add_task(stage, total=1, detail="")
        self._progress.update(self._tasks[stage], detail=detail)

    def _finish(self) -> None:
        for task in self._tasks.values():
            self._progress.update(task, completed=1)

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None:
            self._finish()
        self._progress.__exit__(*exception)


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_LEAST_WIDTH)


def _plan_table(plan: Plan) -> RenderableType:
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


def _sweep_table(sweep: Sweep) -> RenderableType:
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
        "memory",
    )
    table = _table("the sweep", columns)
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
