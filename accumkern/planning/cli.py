"""``accumkern plan`` and ``accumkern sweep``: live progress, a table or JSON, and a folder of results."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from accumkern.out_of_memory import format_bytes
from accumkern.planning.link import exchange_rows
from accumkern.planning.plan import plan
from accumkern.planning.plan_result import Plan
from accumkern.planning.report import check_folder, format_rate, format_useful, write_plan, write_sweep
from accumkern.planning.scaling_laws import format_count
from accumkern.planning.script import Script, ScriptSetup
from accumkern.planning.sweep import sweep
from accumkern.planning.sweep_result import Sweep
from accumkern.planning.sweep_runs import Run
from accumkern.planning.token_budget import Schedule
from accumkern.ranks import is_first

_OWN = ("command", "setup", "output", "json", "predict")  # options of the command line; the others are arguments
_NOT_THE_SCRIPTS = (Path(__file__).parent.parent, Path(torch.__file__).parent)
_LEAST_WIDTH = 100  # where there is no terminal to fit into


def run(args: argparse.Namespace, script_arguments: Sequence[str] = ()) -> int:
    """Run a command; return its exit status: 1 where nothing was learnt, 2 where it failed.

    Of several ranks, the first prints and writes the result, and every rank its own error. The result alone goes to
    stdout.

    Args:
        args: from the command line.
        script_arguments: what the script is to see in ``sys.argv``.
    """
    errors = _console(stderr=True)
    script = None
    folder: Any = args.output
    arguments = {name: value for name, value in vars(args).items() if name not in _OWN}
    try:
        script = Script(args.setup, script_arguments)
        if arguments.get("start") is not None:
            arguments["start"] = arguments["start"].expanduser().resolve()
        if folder is not None:
            folder = folder.expanduser().resolve()  # before the script changes directory, and hours of measuring
            folder.mkdir(parents=True, exist_ok=True)
            check_folder(folder, Plan if args.command == "plan" else Sweep)
        with script.running(), _Live(errors) as live:
            result: Plan | Sweep
            setup = ScriptSetup(script, in_place=args.command == "plan")
            if args.command == "plan":
                result = plan(setup, **arguments, measure=not args.predict, progress=live.tell)
            else:
                result = sweep(setup, **arguments, folder=folder, progress=live.tell_of_run)
            live.finish()
        if not is_first():
            return 0
        if args.json:
            print(json.dumps(result.to_dict(), indent=1, allow_nan=False))
        else:
            _console().print(_plan_table(result) if isinstance(result, Plan) else _sweep_table(result))
        if folder is not None:  # last: a full disk does not keep the result from being seen
            page = write_plan(result, folder) if isinstance(result, Plan) else write_sweep(result, folder)
            errors.print(f"\nreport: {page}", markup=False, highlight=False)
    except (AttributeError, OSError, TypeError, ValueError, RuntimeError) as error:
        errors.print(f"accumkern {args.command}: {error}", style="red", markup=False, highlight=False)
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        frame = script and script.last_frame(cause, _NOT_THE_SCRIPTS)
        if frame:
            errors.print(f"  raised at {frame.filename}:{frame.lineno}: {frame.line}", markup=False, highlight=False)
        return 2
    return 0 if isinstance(result, Plan) or result.learnt else 1


class _Live(Progress):
    """A line for each stage, with what came of it last; on anything but a terminal, a line for each thing told."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}", style="bold"),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._stages: dict[str, TaskID] = {}

    def tell(self, stage: str, detail: str) -> None:
        """Show what came of a stage."""
        if not is_first():
            return
        if self.disable:
            self.console.print(f"{stage}: {detail}", markup=False, highlight=False)
        if stage not in self._stages:
            self.finish()
            self._stages[stage] = self.add_task(stage, total=1, detail="")
        self.update(self._stages[stage], detail=detail)

    def tell_of_run(self, run: Run) -> None:
        """Show what came of a run of a sweep."""
        loss = f"last loss {run.points[-1].loss:.4g}" if run.points else "no loss"
        self.tell(run.planned.words, f"{run.status}: {loss} in {run.seconds:.3g} s")

    def finish(self) -> None:
        """Mark all stages as done."""
        for task in self.task_ids:
            self.update(task, completed=1)


def _console(stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_LEAST_WIDTH)


def _plan_table(plan: Plan) -> RenderableType:
    """Return the plan for each number of ranks, and the reasons."""
    tokens = plan.tokens_per_sample
    unit = "tokens" if tokens else "samples"
    rows = [
        {
            "ranks": f"{choice.ranks}",
            "micro-batch": f"{choice.micro_batch:,}",
            "accumulate": f"{choice.accumulation_steps:,}",
            "effective batch": f"{choice.effective_batch:,}",
            "memory per rank": format_bytes(choice.memory_bytes),
            f"{unit}/s": "-" if (speed := choice.samples_per_second) is None else format_rate(speed, tokens),
            "useful batches": format_useful({"useful_low": choice.useful_low, "useful_high": choice.useful_high}),
        }
        for choice in plan.by_ranks
    ]
    lines: list[RenderableType] = [Text(plan.basis), _table("the plan", rows, chosen=plan.by_ranks.index(plan.choice))]
    lines += [_bullet(reason, "") for reason in plan.reasons]
    lines += [_bullet(f"Warning: {warning}", "yellow") for warning in plan.warnings]
    if plan.exchange is not None:
        title = f"what {plan.exchange.ranks} ranks exchange in a window of micro-batches of {plan.exchange.micro_batch}"
        lines += [Text(), _table(title, exchange_rows(dataclasses.asdict(plan.exchange)))]
    if plan.schedule is not None and len(plan.schedule.stages) > 1:
        lines += [Text(), _table("when to raise the batch", _stage_rows(plan.schedule))]
        lines.append(Text(plan.schedule.line, style="bold"))
    lines.append(Text(f"\nWhat to set: {plan.headline}", style="bold"))
    for setting in plan.settings:
        is_code = setting == plan.attach_line
        lines.append(Text(setting, style="bold", no_wrap=True, overflow="ignore") if is_code else _bullet(setting, ""))
    return Group(*lines)


def _stage_rows(schedule: Schedule) -> list[dict[str, str]]:
    return [
        {
            "from tokens": format_count(stage.from_tokens),
            "from samples": f"{stage.from_samples:,}",
            "accumulate": f"{stage.accumulation_steps:,}",
            "effective batch": f"{stage.effective_batch:,}",
            "learning rate": f"x {stage.lr_factor:.3g}",
        }
        for stage in schedule.stages
    ]


def _sweep_table(sweep: Sweep) -> RenderableType:
    """Return a row for each effective batch and rule, and the findings."""
    tokens = sweep.tokens_per_sample
    target = "" if sweep.target_loss is None else f" {sweep.target_loss:.4g}"
    scaled = any(row.weight_decay_rule != "none" for row in sweep.rows)
    rows = [
        {
            "batch": f"{row.effective_batch:,}",
            "rule": f"{row.rule}, {row.weight_decay_rule}" if scaled else row.rule,
            "learning rate": f"{row.learning_rate:.3g}",
            **({"weight decay": f"{row.weight_decay:.3g}"} if scaled else {}),
            "accumulate": f"{row.accumulation_steps:,}",
            "runs": f"{row.runs} ({row.failed})" if row.failed else f"{row.runs}",
            f"{'tokens' if tokens else 'samples'} to loss{target}": "not reached"
            if row.samples_to_target is None
            else format_rate(row.samples_to_target, tokens),
            "seconds": "not reached" if row.seconds_to_target is None else f"{row.seconds_to_target:.3g}",
            "last loss": "-" if row.last_loss is None else f"{row.last_loss:.4g}",
            "memory": format_bytes(row.peak_bytes),
        }
        for row in sweep.rows
    ]
    return Group(_table("the sweep", rows), *(_bullet(finding, "") for finding in sweep.findings))


def _table(title: str, rows: list[dict[str, str]], chosen: int | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=column in ("rule", "way"))
    for number, row in enumerate(rows):
        table.add_row(*row.values(), style="bold" if number == chosen else "")
    return table


def _bullet(text: str, style: str) -> RenderableType:
    head, colon, rest = text.partition(": ")
    line = Text.assemble("• ", (head + colon, "bold"), rest) if colon and len(head) < 60 else Text(f"• {text}")
    line.stylize(style)
    return Padding(line, (0, 0, 0, 1))
