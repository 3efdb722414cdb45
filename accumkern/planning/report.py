"""A folder of results: JSON, CSV, PNG figures, and one HTML page of all that lies there."""

from __future__ import annotations

import base64
import csv
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from accumkern.out_of_memory import format_bytes
from accumkern.planning.link import exchange_rows
from accumkern.planning.plan_result import Plan
from accumkern.planning.speed import plain
from accumkern.planning.sweep_result import Sweep
from accumkern.planning.sweep_runs import Planned, write_json

_PLAN, _RESULTS, _PAGE = "plan.json", "results.json", "report.html"
_CATEGORIES = {
    "parameters": ("parameters", "#30343f"),
    "gradients": ("gradients", "#1f77b4"),
    "residuals": ("residuals", "#7fc8f8"),
    "master_residuals": ("master residuals", "#6a4c93"),
    "optimizer_state": ("optimizer state", "#2a9d8f"),
    "activations": ("activations and batch", "#f2b134"),
    "kernels": ("inside kernels", "#d9d2c0"),
}
_BLUE, _RED, _GREY = "#1f77b4", "#d1495b", "#8a8f98"
_LINES = ("#1f77b4", "#d1495b", "#2a9d8f", "#f2b134", "#6a4c93", "#30343f", "#8a8f98", "#c06c84")
_STYLES = {"none": ":", "sqrt": "-", "linear": "--"}
_SIZE = (7.2, 4.2)
_DPI = 144
_MOST_BARS = 10


def write_plan(plan: Plan, folder: Path) -> Path:
    """Write ``plan.json``, ``plan.csv``, figures and the page into a folder; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    data = plan.to_dict()
    write_json(folder / _PLAN, data)
    _write_csv(folder / "plan.csv", _plan_rows(data))
    return write_page(folder)


def write_sweep(sweep: Sweep, folder: Path) -> Path:
    """Write ``results.json``, ``results.csv``, figures and the page into a folder; return the page's path."""
    data = sweep.to_dict()
    write_json(folder / _RESULTS, data)
    _write_csv(folder / "results.csv", data["rows"])
    return write_page(folder)


def write_page(folder: Path) -> Path:
    """Draw the figures of the plan and of the sweep in a folder, and write the page that shows them; return its path.

    The page holds its images and style: it can be sent to somebody, and loads nothing.
    """
    plan, sweep = _read(folder / _PLAN, Plan), _read(folder / _RESULTS, Sweep)
    figures = (plan_figures(plan) if plan else {}) | (sweep_figures(sweep) if sweep else {})
    images = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=_DPI)
        images.append((name, base64.b64encode(path.read_bytes()).decode()))
    how: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), **how)
    filters = {"bytes": format_bytes, "rate": format_rate, "useful": format_useful, "exchange_rows": exchange_rows}
    environment.filters |= filters
    machine = plan["machine"] if plan else {}
    page = environment.get_template("report.html").render(
        title="Which batch size?",
        subtitle="Micro-batch, accumulation and effective batch: what fits, what is fast, and what helps training.",
        plan=plan,
        sweep=sweep,
        images=images,
        footer=", ".join(f"{name} {value}" for name, value in machine.items()) or "accumkern sweep",
    )
    (folder / _PAGE).write_text(page)
    return folder / _PAGE


def check_folder(folder: Path, but: type[Plan] | type[Sweep]) -> None:
    """Raise a ValueError that names it if a folder holds a result that the page cannot show, one of ``but`` aside."""
    for name, kind in ((_PLAN, Plan), (_RESULTS, Sweep)):
        if kind is not but:
            _read(folder / name, kind)


def _read(path: Path, kind: type[Plan] | type[Sweep]) -> dict[str, Any] | None:
    """Return what ``to_dict()`` of a kind has written; None where there is no file.

    Raises:
        ValueError: it is something else.
    """
    if not path.is_file():
        return None
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        problem = "" if isinstance(data, dict) else f"it holds a {type(data).__name__}"
    except ValueError as error:  # of the JSON, or of the characters
        problem = f"{type(error).__name__}: {error}"
    missing = "" if problem else ", ".join({field.name for field in dataclasses.fields(kind)} - set(data))
    if missing:
        problem = f"it has no {missing}"
    if problem:
        raise ValueError(
            f"{str(path)!r} is not a result of accumkern {kind.__name__.lower()}, or damaged ({problem}); the page of "
            "its folder would show it: remove it, or choose another folder"
        )
    return data


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
            | {f"predicted_{key}_bytes": memory.get(key) for key in (*_CATEGORIES, "total")}
            | {key: speed.get(key) for key in ("seconds", "step_seconds", "samples_per_second")}
        )
    return rows


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def format_rate(samples: float, tokens_per_sample: float | None) -> str:
    """Return a number of samples, or of their tokens, for people."""
    return plain(samples * (tokens_per_sample or 1))


def format_useful(choice: dict[str, Any]) -> str:
    """Return a range of useful effective batches for people."""
    low, high = choice["useful_low"], choice["useful_high"]
    if low is None:
        return "not measured"
    if high is None or math.isinf(high):
        return f"{low:,.0f} or more"
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def plan_figures(plan: dict[str, Any]) -> dict[str, Figure]:
    """Return the figures of a plan's ``to_dict()`` by file name."""
    figures = {"memory": _memory(plan)}
    if plan["batches"]:
        figures["batches"] = _batches(plan)
    if plan["speeds"]:
        figures["throughput"] = _throughput(plan)
    return figures


def sweep_figures(sweep: dict[str, Any]) -> dict[str, Figure]:
    """Return the figures of a sweep's ``to_dict()`` by file name."""
    tokens = sweep["tokens_per_sample"]
    unit, factor = ("tokens", tokens) if tokens else ("samples", 1)
    return {
        "loss-by-samples": _losses(sweep, f"{unit} trained", lambda point: point["samples"] * factor),
        "loss-by-time": _losses(sweep, "seconds trained", lambda point: point["seconds"]),
    }


def _memory(plan: dict[str, Any]) -> Figure:
    """Bars of memory by category, predicted, with what was measured and what is allowed."""
    figure, axes = _axes("Peak memory by micro-batch")
    predicted = {entry["micro_batch"]: entry["memory"] for entry in plan["predictions"]}
    trials = plan["fit"]["trials"] if plan["fit"] else []
    measured = {trial["micro_batch"]: trial["peak_bytes"] for trial in trials if trial["fits"]}
    sizes = sorted(predicted or measured)[-_MOST_BARS:]
    allowed = plan["memory_limit_bytes"] * (1 - plan["margin"])
    most = max(predicted[size]["total"] if predicted else measured[size] for size in sizes)
    unit, one = _byte_unit(most)
    rows = range(len(sizes))
    if predicted:
        left = [0.0] * len(sizes)
        for key, (label, color) in _CATEGORIES.items():
            widths = [predicted[size][key] / one for size in sizes]
            if any(widths):
                axes.barh(rows, widths, left=left, color=color, label=label, height=0.68)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    else:
        axes.barh(rows, [measured[size] / one for size in sizes], color=_BLUE, label="measured", height=0.68)
    if predicted and measured:
        shown = [(row, measured[size] / one) for row, size in zip(rows, sizes, strict=True) if size in measured]
        axes.plot(
            [value for _, value in shown], [row for row, _ in shown], "D", color="black", ms=5, label="measured peak"
        )
    if allowed <= 3 * most:
        axes.axvline(allowed / one, color=_RED, ls="--", lw=1.5, label="limit less margin")
    axes.set_yticks(rows, [f"{size:,}" for size in sizes])
    axes.invert_yaxis()
    axes.set_ylabel("micro-batch (samples)")
    axes.set_xlabel(f"memory ({unit})" + ("; bars are predicted" if predicted else ""))
    axes.set_xlim(0, 1.08 * (max(most, allowed) if allowed <= 3 * most else most) / one)
    axes.grid(axis="y", visible=False)
    _legend_below(figure, axes)
    return figure


def _throughput(plan: dict[str, Any]) -> Figure:
    """Speed against the micro-batch, and the time of a window of the effective batch."""
    figure = Figure(figsize=(_SIZE[0] * 1.3, _SIZE[1]), layout="constrained")
    left, right = figure.subplots(1, 2)
    speeds = plan["speeds"]
    sizes = [speed["micro_batch"] for speed in speeds]
    tokens = plan["tokens_per_sample"]
    unit, factor = ("tokens", tokens) if tokens else ("samples", 1)
    chosen = plan["choice"]["micro_batch"]

    values = [speed["samples_per_second"] * factor for speed in speeds]
    left.plot(sizes, values, "o-", color=_BLUE)
    left.axvline(plan["knee"], color=_GREY, ls=":", lw=1.5, label=f"knee: {plan['knee']}")
    ring: Any = {"marker": "o", "ms": 11, "mfc": "none", "mec": _RED, "mew": 2, "ls": "none"}
    left.plot([chosen], [values[sizes.index(chosen)]], label=f"plan: {chosen}", **ring)
    left.set_ylabel(f"{unit} per second and rank")
    left.set_title("Speed of forward and backward", loc="left")

    per_rank = chosen * plan["choice"]["accumulation_steps"]
    windows = [speed["seconds"] * per_rank / speed["micro_batch"] + speed["step_seconds"] for speed in speeds]
    fitting = [(size, window) for size, window in zip(sizes, windows, strict=True) if size <= per_rank]
    scale, seconds = (1e3, "ms") if max(window for _, window in fitting) < 1 else (1.0, "s")
    right.plot([size for size, _ in fitting], [window * scale for _, window in fitting], "o-", color="#2a9d8f")
    right.plot([chosen], [windows[sizes.index(chosen)] * scale], label=f"plan: {chosen}", **ring)
    right.set_ylabel(f"time of a window ({seconds})")
    right.set_title(f"Cost of accumulation: {per_rank:,} samples", loc="left")
    for axes in (left, right):
        _style(axes)
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.05)
        axes.set_xlabel("micro-batch (samples)")
        _log2(axes, sizes)
        axes.legend(
            facecolor="white", framealpha=1, edgecolor="none", loc="lower left" if axes is left else "upper right"
        )
    return figure


def _batches(plan: dict[str, Any]) -> Figure:
    """Time to train against the effective batch, as speed and noise scale have it."""
    figure, axes = _axes("Time to train, by speed and gradient noise scale")
    shown = [entry for entry in plan["batches"] if entry["time"] <= 8]
    sizes = [entry["effective_batch"] for entry in shown]
    lows, highs = ([min(max(entry[key], 1), 16) for entry in shown] for key in ("time_high", "time_low"))
    axes.fill_between(sizes, lows, highs, color=_BLUE, alpha=0.18, lw=0, label="80% interval of the noise scale")
    axes.plot(sizes, [entry["time"] for entry in shown], "o-", color=_BLUE, label="relative time to train")
    low, high = plan["choice"]["useful_low"], plan["choice"]["useful_high"] or sizes[-1]
    axes.axvspan(low, max(high, low * 1.1), color="#2a9d8f", alpha=0.15, lw=0, label="useful: within 10% of the best")
    batch = plan["choice"]["effective_batch"]
    axes.axvline(batch, color=_RED, lw=1.5, label=f"plan: {batch:,}")
    axes.axvline(plan["noise"]["noise_scale"], color=_GREY, ls=":", lw=1.5, label="noise scale")
    axes.set_xlabel(f"effective batch (samples), ranks: {plan['choice']['ranks']}")
    axes.set_ylabel("time to train / least")
    axes.set_ylim(0.8, min(8.2, max(3.0, *(entry["time"] for entry in shown)) * 1.05))
    _log2(axes, sizes)
    _legend_below(figure, axes)
    return figure


def _losses(sweep: dict[str, Any], label: str, x: Callable[[dict[str, Any]], float]) -> Figure:
    """Loss of every run, against samples or time; runs that did not finish end with a cross."""
    figure, axes = _axes(f"Validation loss by {label}")
    sizes = sorted({run["effective_batch"] for run in sweep["runs"]})
    color = {size: _LINES[i % len(_LINES)] for i, size in enumerate(sizes)}
    seen = set()
    for run in sweep["runs"]:
        points = [point for point in run["points"] if point["loss"] is not None]
        size, rule, decay_rule = run["effective_batch"], run["rule"], run["weight_decay_rule"]
        name = f"{size:,}"
        if size != sweep["base_batch"]:
            name += f", {Planned(size, rule, decay_rule, 0).rules}"
        axes.plot(
            [x(point) for point in points],
            [point["loss"] for point in points],
            color=color[size],
            ls="-" if size == sweep["base_batch"] else _STYLES[rule],
            lw=1.6,
            marker="" if decay_rule == "none" else ".",
            alpha=0.85,
            label=None if name in seen else name,
        )
        seen.add(name)
        if run["status"] != "finished" and points:
            axes.plot(x(points[-1]), points[-1]["loss"], "x", color=color[size], ms=9, mew=2.5)
    if sweep["target_loss"] is not None:
        axes.axhline(sweep["target_loss"], color=_GREY, ls="--", lw=1.2, label=f"target {sweep['target_loss']:.3g}")
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    _legend_below(figure, axes, title="effective batch (samples), rule of the learning rate")
    return figure


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    _style(axes)
    return figure, axes


def _style(axes: Axes) -> None:
    axes.grid(color="#e4e6ea", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_below(figure: Figure, axes: Axes, title: str | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if len(labels) > 4 else max(1, len(labels))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, title=title, fontsize="small"
    )


def _log2(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    powers = [size for size in sizes if size & (size - 1) == 0]
    ticks = powers[:: max(1, len(powers) // 7)]
    axes.set_xticks(ticks if sizes[-1] < 1.5 * ticks[-1] else [*ticks, sizes[-1]])
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _plain(value: float, _position: object) -> str:
    for one, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= one:
            divisor = 1e3 if letter == "k" else one
            return f"{value / divisor:g}{letter}"
    return f"{value:g}"


def _byte_unit(size: float) -> tuple[str, float]:
    return next(((unit, one) for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= one), ("B", 1.0))
