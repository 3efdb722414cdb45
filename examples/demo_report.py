"""What demo.py found: as a table, in sentences that follow from the numbers, and as a picture."""

from __future__ import annotations

import math
import statistics
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from designs import Autocast, Split24Masters, StockBF16

STOCK, FP32, OURS = StockBF16.key, Autocast.key, Split24Masters.key
FEWEST = 10  # steps at the end, before losses are told apart
#: What memory is for -> its color.
BYTES_FOR = {
    "weights": "#12355b",
    "masters": "#3f7cac",
    "gradients": "#e0a458",
    "AdamW state": "#d5dbe0",
}


def tenth(steps: int) -> int:
    """Return a tenth of a number of steps; the last tenth is what "the end" means."""
    return max(1, round(steps / 10))


def table(results: dict[str, Any]) -> Table:
    """Return the comparison as a table for the terminal."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("\ntraining with", no_wrap=True)
    for heading in ("loss at\nthe end", "bytes held\nper weight", "\nat the peak", "time of a step,\nstock bf16 = 1"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for entry in results["designs"].values():
        size = entry["bytes_per_parameter"]
        shown.add_row(
            entry["label"],
            f"{entry['final_loss']:.4f}",
            f"{sum(size['held'].values()):.1f}",
            f"{size['peak']:.1f}",
            f"{entry['time_over'][STOCK][1]:.2f}",
        )
    return shown


def findings(results: dict[str, Any]) -> list[str]:
    """Say what these numbers show, and what they do not."""
    stock, fp32, ours = (results["designs"][key] for key in (STOCK, FP32, OURS))
    held, peak, time_over = {}, {}, ours["time_over"]
    for key, entry in results["designs"].items():
        held[key] = sum(entry["bytes_per_parameter"]["held"].values())
        peak[key] = entry["bytes_per_parameter"]["peak"]
    lines = [_gap(results, entry, ours) for entry in (stock, fp32)]
    if stock["unmoved"]:
        a, b, c = (entry["unmoved"][-1] for entry in (stock, fp32, ours))
        count = tenth(results["options"]["steps"])
        end = count * len(stock["unmoved"])
        lines.append(
            f"In steps {end - count + 1} to {end}, {a:.0%} of the weights of {stock['label']} did not change at all, "
            f"with {fp32['label']} {b:.0%}, of the masters of {ours['label']} {c:.0%}."
            + (" bfloat16 cannot hold so small updates." if a > 2 * max(b, c) else "")
        )
    return [
        *lines,
        f"{ours['label']} holds {_more(held[OURS] / held[FP32])} memory than {fp32['label']} (at the peak "
        f"{_more(peak[OURS] / peak[FP32])}), and {_more(held[OURS] / held[STOCK])} than {stock['label']}.",
        f"{ours['label']} takes {_more(time_over[FP32][1])} time for a step than {fp32['label']} (half of the steps: "
        f"{_more(time_over[FP32][0])} to {_more(time_over[FP32][2])}), and {_more(time_over[STOCK][1])} than "
        f"{stock['label']}.",
    ]


def _gap(results: dict[str, Any], one: dict[str, Any], other: dict[str, Any]) -> str:
    """Say by how much a loss is above another at the end, and whether that is clear."""
    count = tenth(results["steps"])
    apart = one["final_loss"] - other["final_loss"]
    if round(apart, 4) == 0:
        return f"The losses of {one['label']} and {other['label']} end less than 0.0001 apart."
    agreeing = sum((a - b) * apart > 0 for a, b in zip(one["loss"][-count:], other["loss"][-count:], strict=True))
    side = "above" if apart > 0 else "below"
    line = f"The loss of {one['label']} ends {abs(apart):.4f} {side} that of {other['label']}"
    if count < FEWEST:
        return f"{line}: after so few steps that says nothing."
    clear = "" if agreeing >= 0.9 * count else "no clear difference, "
    return f"{line}: {clear}{side} it in {agreeing} of the last {count} steps."


def _more(ratio: float) -> str:
    return f"{100 * abs(ratio - 1):.1f} % {'more' if ratio >= 1 else 'less'}"


def notes(results: dict[str, Any]) -> list[str]:
    """Say what the columns mean, and how far the numbers reach."""
    options = results["options"]
    numel = results["designs"][OURS]["bytes_per_parameter"]["of_parameters"]
    return [
        f"loss: mean of the last {tenth(results['steps'])} of {results['steps']} steps; one run, one seed. The "
        f"lower the learning rate (--lr, here {options['lr']:g} at most), the smaller are the updates.",
        f"bytes: as the allocator counts them for a GPT with {numel:,} weights; at the peak, activations included.",
        f"time: medians over steps of {options['micro_batches']} micro-batches, taken in turns. The model is small "
        f"({results['parameters']:,} weights): fixed costs of a call count most. Larger ones: docs/benchmarks.md.",
    ]


def figure(results: dict[str, Any]) -> Figure:
    """Return the comparison as a picture: the losses, and the bytes per weight."""
    designs = results["designs"]
    picture = Figure(figsize=(13, 5.8), layout="constrained")
    left, right = picture.subplots(1, 2, width_ratios=(3, 2))
    # The two that should agree lie on one another: a broad light line, and a dark one with gaps.
    styles = {STOCK: ("#d1495b", "-", 2), FP32: ("#b4bcc4", "-", 7), OURS: ("#0d4a75", (0, (4, 2)), 2)}
    mean_of = (tenth(results["steps"]) + 1) // 2
    lowest, highest = math.inf, -math.inf
    for key, (color, dashes, line_width) in styles.items():
        loss = designs[key]["loss"]
        smooth = [statistics.fmean(loss[i : i + mean_of]) for i in range(len(loss) - mean_of + 1)]
        label = f"{designs[key]['label']}: {designs[key]['final_loss']:.3f} at the end"
        left.plot(range(mean_of, len(loss) + 1), smooth, color=color, ls=dashes, lw=line_width, label=label)
        shown = smooth[len(smooth) // 10 :]  # the first steps are far above
        lowest, highest = min(lowest, *shown), max(highest, *shown)
    left.set(
        title="training loss" + (f", mean of {mean_of} steps" if mean_of > 1 else ""),
        xlabel=f"optimizer step, of {results['options']['micro_batches']} micro-batches",
        ylabel="cross-entropy (nats per byte)",
    )
    left.set_ylim(lowest - 0.05 * (highest - lowest) - 1e-3, highest)
    left.legend(frameon=False, loc="upper right", fontsize=11)

    places, bottoms = range(len(designs)), [0.0] * len(designs)
    for name, color in BYTES_FOR.items():
        sizes = [entry["bytes_per_parameter"]["held"][name] for entry in designs.values()]
        bars = right.bar(places, sizes, 0.72, bottom=bottoms, color=color, label=name)
        texts = [f"{size:.1f}" if size >= 0.5 else "" for size in sizes]
        right.bar_label(bars, texts, label_type="center", color="white" if name in ("weights", "masters") else "black")
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    for place, entry, total in zip(places, designs.values(), bottoms, strict=True):
        peak = entry["bytes_per_parameter"]["peak"]
        right.hlines(peak, place - 0.36, place + 0.36, color="black", ls=":")
        right.text(place, peak + 0.2, f"{total:.1f} held\n{peak:.1f} at the peak", ha="center")
    right.set_xticks(places, [entry["label"] for entry in designs.values()], fontsize=11)
    right.set(title="memory before a step, measured", ylabel="bytes per weight")
    right.set_ylim(top=1.3 * max(entry["bytes_per_parameter"]["peak"] for entry in designs.values()))
    handles, labels = right.get_legend_handles_labels()
    right.legend(handles[::-1], labels[::-1], framealpha=1, edgecolor="none", loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
    picture.suptitle(f"A GPT of {results['parameters']:,} weights on {results['machine']}", fontsize=11)
    return picture
