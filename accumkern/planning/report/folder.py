"""A folder of results: JSON, CSV, PNG figures, and one HTML page of all that lies there."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from accumkern.planning.files import write_json
from accumkern.planning.memory import format_bytes
from accumkern.planning.outcome import Sweep
from accumkern.planning.report.figures import plan_figures, save, sweep_figures
from accumkern.planning.report.tables import format_rate, format_useful
from accumkern.planning.result import Plan

PLAN, RESULTS, PAGE = "plan.json", "results.json", "report.html"


def write_plan(plan: Plan, folder: Path) -> Path:
    """Write ``plan.json``, ``plan.csv``, figures and the page into a folder; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    data = plan.to_dict()
    write_json(folder / PLAN, data)
    _write_csv(folder / "plan.csv", _plan_rows(data))
    return write_page(folder)


def write_sweep(sweep: Sweep, folder: Path) -> Path:
    """Write ``results.json``, ``results.csv``, figures and the page into a folder; return the page's path."""
    data = sweep.to_dict()
    write_json(folder / RESULTS, data)
    _write_csv(folder / "results.csv", data["rows"])
    return write_page(folder)


def write_page(folder: Path) -> Path:
    """Draw the figures of the plan and of the sweep in a folder, and write the page that shows them; return its path.

    The page holds its images and style: it can be sent to somebody, and loads nothing.
    """
    plan, sweep = (_read(folder / name) for name in (PLAN, RESULTS))
    figures = (plan_figures(plan) if plan else {}) | (sweep_figures(sweep) if sweep else {})
    save(figures, folder)
    images = [(name, base64.b64encode((folder / f"{name}.png").read_bytes()).decode()) for name in figures]
    environment = Environment(
        loader=PackageLoader("accumkern.planning", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": format_bytes, "rate": format_rate, "useful": format_useful}
    machine = plan["machine"] if plan else {}
    page = environment.get_template("page.html").render(
        title="Which batch size?",
        subtitle="Micro-batch, accumulation and effective batch: what fits, what is fast, and what helps training.",
        plan=plan,
        sweep=sweep,
        images=images,
        footer=", ".join(f"{name} {value}" for name, value in machine.items()) or "accumkern sweep",
    )
    path = folder / PAGE
    path.write_text(page)
    return path


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _plan_rows(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each micro-batch: what was tried, predicted and timed."""
    trials = {trial["micro_batch"]: trial for trial in plan["fit"]["trials"]} if plan["fit"] else {}
    predictions = {entry["micro_batch"]: entry["memory"] for entry in plan["predictions"]}
    speeds = {entry["micro_batch"]: entry for entry in plan["speeds"]}
    rows = []
    for size in sorted({*trials, *predictions, *speeds}):
        trial, memory, speed = (of.get(size, {}) for of in (trials, predictions, speeds))
        rows.append(
            {"micro_batch": size, "fits": trial.get("fits"), "measured_peak_bytes": trial.get("peak_bytes")}
            | {f"predicted_{key}_bytes": memory.get(key) for key in _CATEGORIES}
            | {key: speed.get(key) for key in ("seconds", "step_seconds", "samples_per_second")}
        )
    return rows


_CATEGORIES = ("parameters", "gradients", "residuals", "optimizer_state", "activations", "total")


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
