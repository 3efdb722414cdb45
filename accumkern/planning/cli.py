"""``accumkern plan`` and ``accumkern sweep``: live progress, a table or JSON, and a folder of results."""

from __future__ import annotations

import argparse
import itertools
import json
import traceback
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

import accumkern
from accumkern.planning.outcome import Run, Sweep
from accumkern.planning.plan import plan
from accumkern.planning.protocol import load_setup
from accumkern.planning.ranks import is_first
from accumkern.planning.report.folder import write_plan, write_sweep
from accumkern.planning.report.tables import plan_table, sweep_table
from accumkern.planning.result import Plan
from accumkern.planning.sweep import sweep

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
        _console().print(plan_table(result) if isinstance(result, Plan) else sweep_table(result))
    if page is not None:
        errors.print(f"\nreport: {page}", markup=False, highlight=False)
    return 0 if isinstance(result, Plan) or result.learnt else 1


def _plan(args: argparse.Namespace, live: _Live) -> Plan:
    return plan(
        load_setup(args.setup),
        effective_batch=args.effective_batch,
        memory=args.memory,
        margin=args.margin,
        buffer=args.buffer,
        largest_micro_batch=args.largest_micro_batch,
        noise_windows=args.noise_windows,
        measure=not args.predict,
        progress=live.tell,
    )


def _sweep(args: argparse.Namespace, live: _Live) -> Sweep:
    def tell(run: Run) -> None:
        loss = f"loss {run.best_loss:.4g}" if run.points else "no loss"
        live.tell(
            f"batch {run.effective_batch}, {run.rule}, seed {run.seed}", f"{run.status}: {loss} in {run.seconds:.3g} s"
        )

    return sweep(
        load_setup(args.setup),
        args.effective_batches,
        args.samples,
        args.output,
        rules=args.rules,
        seeds=args.seeds,
        base_batch=args.base_batch,
        micro_batch=args.micro_batch,
        memory=args.memory,
        margin=args.margin,
        buffer=args.buffer,
        target_loss=args.target_loss,
        evaluations=args.evaluations,
        validation_samples=args.validation_samples,
        progress=tell,
    )


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
