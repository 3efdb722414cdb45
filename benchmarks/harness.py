"""What every benchmark script shares: its options, its progress bar, and the file that it writes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from provenance import folder_name, provenance
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tables import SECTIONS
from tables.parts import Content

from accumkern import backends

RESULTS = Path(__file__).resolve().parent / "results"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark has; ``doc`` is the script's docstring.

    ``--device`` is a CPU or a GPU, ``--quick`` shows that a script runs, ``--results`` is where the file goes.
    """
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    made.add_argument("--quick", action="store_true", help="little work, to see that it runs; not to be kept")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of results, one folder in it per machine")
    return made


def at_least_one(text: str) -> int:
    """Return the number of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: it must be at least 1")
    return number


def backends_on(device: torch.device) -> list[str]:
    """Return the backends that take tensors on a device here."""
    return [name for name in backends.BACKENDS if _runs_on(name, device)]


def _runs_on(backend: str, device: torch.device) -> bool:
    try:
        backends.choose(backend, device)
    except RuntimeError:
        return False
    return True


@contextmanager
def steps(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, and yield what moves it on: a function of the steps done and of all steps.

    The bar is drawn only when it moves: a thread that redraws it would take time from what is being measured.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, console=console, auto_refresh=False, transient=True, disable=quiet) as bar:
        task = bar.add_task(title, total=None)

        def on_step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, refresh=True)

        yield on_step


def save_results(
    arguments: argparse.Namespace, name: str, method: dict[str, Any], results: list[dict[str, Any]]
) -> Content:
    """Write ``<--results>/<machine>/<name>.json`` and return its content; whoever reads it finds all of it or the last.

    Args:
        arguments: what :func:`parser` parsed.
        name: the benchmark, which has a schema in ``schemas/`` and a section in ``tables/``.
        method: how it was measured.
        results: one dictionary for each measurement.
    """
    content: Content = {"provenance": provenance(torch.device(arguments.device)), "method": method, "results": results}
    folder = arguments.results / folder_name(content["provenance"]["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f"{name}.json.part"
    written.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    written.replace(folder / f"{name}.json")
    return content


def write_results(
    arguments: argparse.Namespace, name: str, method: dict[str, Any], results: list[dict[str, Any]]
) -> None:
    """Write the same, and print its tables."""
    write_growing(arguments, name, method, [results])


def write_growing(
    arguments: argparse.Namespace, name: str, method: dict[str, Any], growing: Iterable[list[dict[str, Any]]]
) -> None:
    """Write the file anew with each list of results, and print the tables of the last.

    Whatever ends the script takes only what is being measured. Ctrl-C, or SIGINT, ends the measuring: what has been
    measured by then stands in the file, and its tables are printed.

    Args:
        arguments: what :func:`parser` parsed.
        name: the benchmark.
        method: how it is measured.
        growing: yields all results until then whenever some are there; each holds those before it.

    Raises:
        SystemExit: it was interrupted before there were any results.
    """
    content: Content | None = None
    try:
        for results in growing:
            content = save_results(arguments, name, method, results)
    except KeyboardInterrupt:
        if content is None:
            sys.exit("interrupted before anything was measured: nothing is written")
        print("interrupted: what had been measured by then is written", flush=True)
    if content is None:
        raise ValueError(f"growing: nothing was measured of {name}; it must yield one or more lists of results")
    Console(width=140).print(Markdown("\n".join(SECTIONS[name].full(content))))
    print(f"wrote {folder_name(content['provenance']['machine'])}/{name}.json")
