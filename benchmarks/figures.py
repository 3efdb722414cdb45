"""The figures of every benchmark: each is a function of a result file's content.

They become PNGs in docs/figures/benchmarks/. A PNG carries a digest of the content that it was drawn from, so that a
stale one can be told.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MultipleLocator, NullFormatter
from PIL import Image
from tables.convergence import COMPARED_WITH
from tables.kernels import COPY, MUL, SUMMARY_CASES
from tables.parts import Content, Result, grouped
from tables.scale import flat
from tables.step import HELD

COLORS = {
    "split24": "#1f77b4",
    "split32": "#2a9d8f",
    "fp32": "#7b5ea7",
    "stock": "#d1495b",
    "roof": "#8d929c",
}
CONVERGENCE_COLORS = {
    "stock_bf16": "#d1495b",
    "split24": "#1f77b4",
    "split24_masters24": "#e9a23b",
    "split24_masters": "#2a9d8f",
    "autocast": "#30343f",
}
HELD_COLORS = {
    "weights": "#1f77b4",
    "masters": "#2a9d8f",
    "gradients": "#d1495b",
    "residuals": "#7b5ea7",
    "optimizer_state": "#8d929c",
    "bucket": "#e9a23b",
}
WAY_STYLES = {
    "bf16 ring": ("-", "#d1495b"),
    "bf16 tree": ("--", "#d1495b"),
    "bf16 all-to-all": (":", "#d1495b"),
    "FP32 ring": ("-", "#8d929c"),
    "split24 all-to-all": ("--", "#1f77b4"),
    "split24 two levels": (":", "#e9a23b"),
}
Pair = tuple[str, str]
LINEAR_BELOW = 1e-3  # differences of the loss: those of seeds that went the same way, and no more


@dataclass(frozen=True)
class Drawing:
    """One figure of a benchmark.

    Attributes:
        name: of its file, behind the machine's.
        alt: what it shows, in a line.
        draw: makes it from the machine's name and the content of the result file; None where there is nothing to show.
        in_readme: whether the README shows it too.
    """

    name: str
    alt: str
    draw: Callable[[str, Content], Figure | None]
    in_readme: bool = False


def roofline(machine: str, content: Content) -> Figure | None:
    """Draw each operation's bandwidth as a fraction of that of a copy, at the largest tensor that the summary shows."""
    by_case = grouped([r for r in content["results"] if r["tensors"] == 1], "case")
    cases = [case for case in SUMMARY_CASES if case in by_case]
    if not cases:
        return None
    results = [r for r in by_case[cases[-1]] if "fraction_of_copy" in r]
    figure = Figure(figsize=(8, 0.6 + 0.36 * len(results)), layout="constrained")
    axes = figure.subplots()
    values = [r["fraction_of_copy"] for r in results]
    bars = axes.barh([r["variant"] for r in results], values, color=[COLORS[_kind(r)] for r in results], height=0.7)
    labels = [f"{r['fraction_of_copy']:.2f}   {r['median_ms']:.3g} ms" for r in results]
    axes.bar_label(bars, labels, padding=4, fontsize=8, bbox={"color": "white", "pad": 1})
    axes.axvline(1.0, color=COLORS["roof"], linestyle="--", linewidth=1, zorder=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(*values, 1.0))
    axes.set_xlabel("bytes moved per second, as a fraction of copy_'s; beside it the time")
    _finish(axes, f"One fold of {results[0]['numel']:,} elements\n{machine}", "x")
    return figure


def sizes(machine: str, content: Content) -> Figure | None:
    """Draw the time of each way over that of split24, against the size of the tensor."""
    single = [r for r in content["results"] if r["tensors"] == 1 and "time_over_split24" in r]
    if len({r["numel"] for r in single}) < 2:
        return None
    backend = content["method"]["backend"]
    lines = {
        f"split24 {backend}": "split24",
        f"split32 {backend}": "split32",
        f"fp32 {backend}": "fp32",
        "bf16.add_(bf16)": "stock",
        "fp32.add_(bf16)": "stock",
        "torch.compile(fp32 += bf16)": "stock",
        COPY: "roof",
    }
    styles = {"fp32.add_(bf16)": "--", "torch.compile(fp32 += bf16)": ":"}
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for variant, kind in lines.items():
        points = sorted((r["numel"], r["time_over_split24"]) for r in single if r["variant"] == variant)
        style = styles.get(variant, "-")
        axes.plot(*zip(*points, strict=True), style, color=COLORS[kind], label=variant, marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("elements of the tensor")
    axes.set_ylabel("time / split24's")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _finish(axes, f"Time of one fold over split24's\n{machine}", "both")
    return figure


def error_against_n(machine: str, content: Content) -> Figure:
    """Draw the error of each accumulator's sum against the number of micro-batches."""
    x, y = ("micro_batches", "micro-batches N"), ("error_of_sum", "relative L2 error of the sum")
    kinds = {"split24": "-", "split32": "-", "fp32": "--"}  # fp32 lies on split32's line
    styles = {"stock bf16": ("-", COLORS["stock"])} | {kind: (style, COLORS[kind]) for kind, style in kinds.items()}
    return _errors("Error of the accumulated gradient against FP64", content["results"], "accumulator", x, y, styles)


def error_against_ranks(machine: str, content: Content) -> Figure:
    """Draw the error of what a step reads after each mean of split24 sums, against the number of ranks."""
    x, y = ("ranks", "ranks"), ("error_of_step", "relative L2 error of the mean, as it is kept")
    results = [r for r in flat(content["results"]) if r["held"] == "split24"]
    return _errors("Error of the mean over ranks against FP64, simulated", results, "way", x, y, WAY_STYLES)


def _errors(title: str, results: list[Result], line: str, x: Pair, y: Pair, styles: dict[str, Pair]) -> Figure:
    """Draw errors side by side for each kind of gradients, with a line for each value of the key ``line``.

    ``x`` and ``y`` are the key and the label of an axis, ``styles`` the style and the color of each line.
    """
    by_ratio = grouped(results, "mean_over_std")
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(by_ratio), sharey=True, squeeze=False)[0]
    for axes, (ratio, of_ratio) in zip(all_axes, by_ratio.items(), strict=True):
        for name, of_line in grouped(of_ratio, line).items():
            points = sorted((r[x[0]], r[y[0]]) for r in of_line)
            style, color = styles[str(name)]
            axes.plot(*zip(*points, strict=True), style, color=color, label=name, marker="o", markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(x[1])
        _finish(axes, f"mean / std of a gradient about {ratio:g}", "both")
    all_axes[0].set_ylabel(y[1])
    all_axes[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=10)
    return figure


def training_time(machine: str, content: Content) -> Figure | None:
    """Draw the time of each design's micro-batch over that of stock bf16, with its interval, for each regime."""
    by_regime = {
        regime: measured
        for regime, results in grouped(content["results"], "regime").items()
        if (measured := [r for r in results if "stock_bf16" in r.get("micro_batch_over", {})])
    }
    if not by_regime:
        return None
    heights = [len(results) for results in by_regime.values()]
    figure = Figure(figsize=(8, 0.8 + 0.26 * sum(heights) + 0.5 * len(heights)), layout="constrained")
    all_axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (regime, results) in zip(all_axes, by_regime.items(), strict=True):
        for result in results:
            found = result["micro_batch_over"]["stock_bf16"]
            errors = [[found["median"] - found["low"]], [found["high"] - found["median"]]]
            color = _design_color(result)
            axes.errorbar(found["median"], result["label"], xerr=errors, fmt="o", color=color, markersize=4, capsize=2)
        axes.axvline(1.0, color=COLORS["roof"], linestyle="--", linewidth=1, zorder=0)
        axes.set_ylim(len(results) - 0.5, -0.5)
        _finish(axes, f"{regime}: {results[0]['what']}", "x")
    all_axes[-1].set_xlabel("time of a micro-batch / stock bf16: median and interval")
    figure.suptitle(f"Training: {machine}", fontsize=10)
    return figure


def training_memory(machine: str, content: Content) -> Figure | None:
    """Draw what each design holds of gradients for a weight, and what it takes at the peak and in the step."""
    by_regime = grouped([r for r in content["results"] if "gradient_bytes_per_parameter" in r], "regime")
    results = next(iter(by_regime.values()), None)
    if results is None:
        return None
    figure = Figure(figsize=(8, 0.9 + 0.4 * len(results)), layout="constrained")
    axes = figure.subplots()
    for row, (key, name, alpha) in enumerate(
        (("held", "held", 1.0), ("peak", "at the peak of the window", 0.6), ("in_step", "most in the step", 0.3))
    ):
        values = [r["gradient_bytes_per_parameter"][key] for r in results]
        places = [i + 0.27 * (row - 1) for i in range(len(results))]
        bars = axes.barh(places, values, 0.25, color=[_design_color(r) for r in results], alpha=alpha, label=name)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], fontsize=6, padding=2)
    axes.set_yticks(range(len(results)), [r["label"] for r in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlabel("gradient bytes per weight")
    axes.margins(x=0.08)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    _finish(axes, f"Gradient memory of {results[0]['parameters']:,} weights\n{machine}", "x")
    return figure


def convergence(machine: str, content: Content) -> Figure | None:
    """Draw, for each learning rate, N, design and seed, the validation loss less the reference's with the same seed."""
    measured = [r for r in content["results"] if "error" not in r]
    reference = {
        (r["learning_rate"], r["micro_batches"]): r["validation_loss"] for r in measured if r["design"] == COMPARED_WITH
    }
    compared = grouped([r for r in measured if "difference" in r], "learning_rate")
    if not compared:
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(compared), sharey=True, squeeze=False)[0]
    for axes, (rate, results) in zip(all_axes, compared.items(), strict=True):
        counts = sorted({r["micro_batches"] for r in results})
        by_design = grouped(results, "label")
        for i, (label, of_design) in enumerate(by_design.items()):
            color = CONVERGENCE_COLORS.get(of_design[0]["design"], COLORS["roof"])
            for r in of_design:
                place = counts.index(r["micro_batches"]) + 0.15 * (i - (len(by_design) - 1) / 2)
                pairs = zip(r["validation_loss"], reference[rate, r["micro_batches"]], strict=True)
                values = [mine - other for mine, other in pairs]
                axes.plot([place] * len(values), values, "o", color=color, markersize=3.5, alpha=0.6)
                axes.hlines(r["difference"]["median"], place - 0.06, place + 0.06, color=color, linewidth=2)
            axes.plot([], [], "o", color=color, label=label)
        axes.axhline(0.0, color=COLORS["roof"], linestyle="--", linewidth=1, zorder=0)
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW, linscale=1.0)
        axes.set_xticks(range(len(counts)), [f"N = {count}" for count in counts])
        _finish(axes, f"learning rate {rate:g}", "y")
    label = next(r["label"] for r in measured if r["design"] == COMPARED_WITH)
    all_axes[0].set_ylabel(f"validation loss less that of {label}", fontsize=9)
    figure.legend(
        *all_axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=3
    )
    figure.suptitle(
        f"Validation loss by N: a point for each seed, and the median; linear between ±{LINEAR_BELOW:g}\n{machine}",
        fontsize=10,
    )
    return figure


def step_memory(machine: str, content: Content) -> Figure | None:
    """Draw the bytes that each design holds for a weight, by what they are for, as stacked bars.

    Of all designs in the file, for weights in many tensors and the first end of a window that stands there.
    """
    results = [r for r in content["results"] if r["bucket_bytes"] is None and r["tensors"] > 1 and "error" not in r]
    results = [of_design[0] for of_design in grouped(results, "design").values()]
    if not results:
        return None
    figure = Figure(figsize=(9.5, 1.5 + 0.4 * len(results)), layout="constrained")
    axes = figure.subplots()
    longest = max(sum(r["held_bytes"].values()) / r["numel"] for r in results)
    ends = [0.0] * len(results)
    for key, name in HELD.items():
        values = [r["held_bytes"][key] / r["numel"] for r in results]
        bars = axes.barh(range(len(results)), values, 0.7, left=ends, color=HELD_COLORS[key], label=name)
        inside = [f"{value:.2g}" if value >= longest / 30 else "" for value in values]
        axes.bar_label(bars, inside, label_type="center", fontsize=9, color="white")
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    for place, end in enumerate(ends):
        axes.text(end + longest / 100, place, f"{end:.2f}".rstrip("0").rstrip("."), va="center", weight="bold")
    axes.set_yticks(range(len(results)), [r["label"] for r in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.set_xlim(0, 1.08 * longest)
    axes.xaxis.set_major_locator(MultipleLocator(2))
    axes.set_xlabel("bytes", fontsize=9)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=len(HELD))
    of = f"{results[0]['numel']:,} weights in {results[0]['tensors']} tensors"
    _finish(axes, f"Bytes held for a weight at the end of a window\n{of}\n{machine}", "x")
    axes.tick_params(axis="y", labelsize=9)
    return figure


def _design_color(result: Result) -> str:
    return COLORS[next((kind for kind in ("split24", "split32") if result["design"].startswith(kind)), "stock")]


def _kind(result: Result) -> str:
    if result["buffer"] is not None:
        return str(result["buffer"])
    return "roof" if result["variant"] in (COPY, MUL) else "stock"


def _finish(axes: Axes, title: str, grid: Literal["both", "x", "y"]) -> None:
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(axis=grid, linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


#: Benchmark -> its figures, in this order.
FIGURES: dict[str, list[Drawing]] = {
    "kernels": [
        Drawing("roofline", "bandwidth of one fold as a fraction of copy bandwidth", roofline),
        Drawing("sizes", "time of one fold over split24, against the size of the tensor", sizes),
    ],
    "training": [
        Drawing("training-time", "time of a training micro-batch over stock bf16", training_time),
        Drawing("training-memory", "gradient bytes per weight of every design", training_memory),
    ],
    "step": [
        Drawing(
            "step-memory",
            "bytes held for a weight: weights, masters, gradients, residuals, optimizer state, bucket",
            step_memory,
            in_readme=True,
        )
    ],
    "convergence": [Drawing("convergence", "validation loss less that of FP32 masters, by N", convergence)],
    "accuracy": [Drawing("error", "error of the accumulated gradient against N", error_against_n)],
    "scale": [Drawing("error-ranks", "error of the mean over ranks against their number", error_against_ranks)],
}


def save(figure: Figure, path: Path, content: Content) -> None:
    """Write a figure as PNG, with the digest of the content in it."""
    figure.savefig(path, dpi=110, metadata={"Software": None, "Source": digest(content)})


def is_drawn_from(path: Path, content: Content) -> bool:
    """Return whether the PNG is there and was drawn from this content."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        return bool(image.info.get("Source") == digest(content))


def digest(content: Content) -> str:
    """Return the SHA-256 of a result file's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
