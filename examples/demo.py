"""Train the GPT of train_gpt.py several times at once, each time accumulating gradients in another way, and compare.

    python examples/demo.py                                    # on the source text of Python's standard library
    python examples/demo.py --text my/folder --output demo     # writes demo/demo.png and demo/demo.json

All designs start from the same weights and see the same micro-batches. They take turns, a few micro-batches each, so
that whatever else the machine does slows down all of them, and times are compared for the same micro-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from itertools import pairwise
from operator import truediv
from pathlib import Path
from typing import Any

START = time.perf_counter()


def _stop_at_once(*_: object) -> None:
    print("\ndemo: stopped by Ctrl-C", file=sys.stderr, flush=True)
    os._exit(130)


# Importing torch takes seconds, and may swallow the KeyboardInterrupt that Ctrl-C means otherwise.
ctrl_c = signal.signal(signal.SIGINT, _stop_at_once)
try:
    import torch
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from torch import Tensor

    import accumkern
    from accumkern.backends import choose
    from designs import Split24, Split32, StockBF16, StockFP32, StockFP32Masters
    from measure import Memory, measure_error, measure_memory, run_micro_batches
    from train_gpt import CONTEXT, GPT, random_batch, read_text
except ModuleNotFoundError as error:
    sys.exit(f"demo: {error.name} is not installed; install what the demo needs with: pip install accumkern[demo]")
signal.signal(signal.SIGINT, ctrl_c)

TURN = 8  # micro-batches that a design trains on before the next has its turn
DESIGNS: tuple[type[StockBF16], ...] = (StockBF16, StockFP32, StockFP32Masters, Split24, Split32)
ERROR_WINDOWS = 4  # the error is followed over so many times the micro-batches of a step
MEMORY_MICRO_BATCHES = 2  # the first keeps the gradient, the second allocates what is missing


def new_model(device: torch.device, seed: int) -> GPT:
    """Return the model, with the weights that belong to ``seed``."""
    torch.manual_seed(seed)
    return GPT().to(device, torch.bfloat16)


# ---- the comparison ----------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, text: Tensor, console: Console) -> dict[str, Any]:
    """Run everything, and return all numbers."""
    device, count = torch.device(args.device), args.micro_batches
    generator = torch.Generator().manual_seed(args.seed)

    def draw(number: int) -> list[Tensor]:
        return [random_batch(text, args.batch_size, generator).to(device) for _ in range(number)]

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
        transient=True,
        refresh_per_second=4,
        disable=not console.is_terminal,
    )
    with progress:
        # Memory first, in a fresh process.
        memory_batches = draw(MEMORY_MICRO_BATCHES)
        task = progress.add_task("measuring memory", total=len(DESIGNS) + 1, loss="")

        def memory_of(design_type: type[StockBF16], keep: bool = True) -> Memory:
            memory = measure_memory(lambda: design_type(new_model(device, args.seed)), memory_batches, device, keep)
            progress.advance(task)
            return memory

        without = memory_of(StockBF16, keep=False)
        memories = [memory_of(design_type) for design_type in DESIGNS]
        progress.remove_task(task)

        designs = [design_type(new_model(device, args.seed)) for design_type in DESIGNS]
        numel = sum(param.numel() for param in designs[0].params)
        for design in designs:
            design.begin()
        losses: list[list[float]] = [[] for _ in designs]
        times: list[list[float]] = [[] for _ in designs]
        task = progress.add_task("training", total=args.steps * count * len(designs), loss="")
        began = time.perf_counter()
        for step in range(args.steps):
            batches = draw(count)
            of_step: list[list[Tensor]] = [[] for _ in designs]
            for turn, first in enumerate(range(0, count, TURN)):
                numbers = range(first, min(first + TURN, count))
                for k in range(len(designs)):
                    i = (step + turn + k) % len(designs)
                    found, milliseconds = run_micro_batches(designs[i], batches, numbers)
                    of_step[i] += found
                    times[i] += milliseconds
                    progress.update(task, advance=len(numbers))
            for i, design in enumerate(designs):
                design.step()
                losses[i].append(torch.stack(of_step[i]).mean().item())
            progress.update(task, loss=f"loss {losses[0][-1]:.3f}")
            if not console.is_terminal and (step + 1) % max(1, args.steps // 5) == 0:
                console.print(f"step {step + 1} of {args.steps}, loss {losses[0][-1]:.3f}")
            now = time.perf_counter()
            per_step = (now - began) / (step + 1)
            if now - START + per_step * (1 + ERROR_WINDOWS) > args.time_limit:
                break
        progress.remove_task(task)

        # One and the same checkpoint for all: that of the stock FP32 run.
        weights = designs[DESIGNS.index(StockFP32)].model.state_dict()
        batches = draw(ERROR_WINDOWS * count)
        task = progress.add_task("measuring errors", total=len(designs), loss="")
        errors = []
        first_truths: list[Tensor] = []
        same = True
        for design_type in DESIGNS:
            model = new_model(device, args.seed)
            model.load_state_dict(weights)
            error, truths = measure_error(design_type(model), batches, count)
            errors.append(error)
            first_truths = first_truths or truths
            same = same and all(torch.equal(a, b) for a, b in zip(truths, first_truths, strict=True))
            progress.advance(task)

    return {
        "parameters": numel,
        "steps": len(losses[0]),
        "same_micro_gradients": same,
        "peak_bytes_per_parameter_without_gradients": (without.peak - without.resident) / numel,
        "designs": {
            design.key: {
                "label": design.label,
                "relative_error": error,
                "gradient_bytes_per_parameter": {
                    "held": memory.held / numel,
                    "peak": (memory.peak - memory.resident - without.peak + without.resident) / numel,
                    "in_step": memory.peak_in_step / numel,
                },
                "ms_per_micro_batch": {
                    "median": statistics.median(milliseconds),
                    "p90": sorted(milliseconds)[int(0.9 * (len(milliseconds) - 1))],
                    "over": {
                        other.key: _quartiles(list(map(truediv, milliseconds, theirs)))
                        for other, theirs in zip(DESIGNS, times, strict=True)
                    },
                },
                "loss": loss,
                "final_loss": statistics.fmean(loss[-5:]),
            }
            for design, error, memory, milliseconds, loss in zip(DESIGNS, errors, memories, times, losses, strict=True)
        },
    }


def provenance(args: argparse.Namespace, text: Tensor) -> dict[str, Any]:
    """Return what the numbers depend on: machine, versions, options."""
    device = torch.device(args.device)
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "system": platform.platform(),
            "cpu": cpu,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": {
            "accumkern": accumkern.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "backend": choose(None, device),
        "options": {key: value for key, value in vars(args).items() if key != "output"},
        "text_bytes": len(text),
    }


# ---- showing it --------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> Table:
    """Return the comparison as a table for the terminal."""
    shown = Table(
        title=f"{results['parameters']:,} bfloat16 weights, {results['steps']} steps "
        f"of {results['options']['micro_batches']} micro-batches",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown.add_column("\n\naccumulation", no_wrap=True)
    for heading in (
        "error\nof the\nsum",
        "error of\nwhat AdamW\nreads",
        "gradient\nbytes per\nweight",
        "\nat the\npeak",
        "ms per\nmicro-\nbatch",
        "\nloss at\nthe end",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for entry in results["designs"].values():
        size = entry["gradient_bytes_per_parameter"]
        shown.add_row(
            entry["label"],
            f"{entry['relative_error']['sum']:.1e}",
            f"{entry['relative_error']['optimizer']:.1e}",
            f"{size['held']:.2f}",
            f"{size['peak']:.2f}",
            f"{entry['ms_per_micro_batch']['median']:.2f}",
            f"{entry['final_loss']:.4f}",
        )
    return shown


def notes(results: dict[str, Any]) -> list[str]:
    """Say what the columns mean."""
    lines = [
        "error: relative L2 distance from an FP64 sum of the same "
        f"{results['options']['micro_batches']} micro-gradients. All designs accumulate from the same weights for it.",
        "bytes: as the allocator counts them. Left, held between two micro-batches. Right, by how much the highest "
        "memory of a whole window, step included, exceeds that of a window that throws every gradient away; what it "
        "has more than the left is temporary.",
        f"{StockFP32Masters.label}: AdamW steps FP32 copies of the weights (4 bytes more per weight, not counted as "
        "gradients), so its loss is that of another optimizer.",
    ]
    for entry in results["designs"].values():
        size = entry["gradient_bytes_per_parameter"]
        if size["in_step"] > size["held"] + 0.5:
            lines.append(
                f"{entry['label']}: makes bfloat16 copies of its sums for AdamW, {size['in_step']:.2f} bytes per "
                "weight during the step, when there are no activations."
            )
    return lines


def findings(results: dict[str, Any]) -> list[str]:
    """Say what these numbers show, and what they do not."""
    designs, count = results["designs"], results["options"]["micro_batches"]
    stock, fp32, split = designs[StockBF16.key], designs[StockFP32.key], designs[Split24.key]

    def closer(which: str) -> str:
        ours, theirs = split["relative_error"][which], stock["relative_error"][which]
        if ours == theirs:  # both are zero after a single micro-batch
            return "as close"
        low, high = sorted((ours, theirs))
        ratio = _number(high / low) if low else "infinitely many"
        return f"{ratio} times {'closer' if ours < theirs else 'farther off'}"

    lines = [
        f"Compared with {stock['label']} after {count} micro-batches, {split['label']} is {closer('sum')} to the FP64 "
        f"sum, and what AdamW reads is {closer('optimizer')}."
    ]
    split32 = designs[Split32.key]
    if split32["relative_error"]["by_micro_batches"] == fp32["relative_error"]["by_micro_batches"]:
        lines.append(f"{split32['label']} and {fp32['label']} have the same error to the last digit.")
    held, fp32_held = (e["gradient_bytes_per_parameter"]["held"] for e in (split, fp32))
    lines.append(f"{split['label']} holds {held:.2f} gradient bytes per weight, {fp32['label']} {fp32_held:.2f}.")

    over = split["ms_per_micro_batch"]["over"]
    (low, median, high), (_, fp32_median, _) = over[StockBF16.key], over[StockFP32.key]
    lines.append(
        f"{split['label']} takes {_more(median)} time for a micro-batch than {stock['label']} and {_more(fp32_median)} "
        f"than {fp32['label']}. These are medians over pairs of the same micro-batch; half of the first lie between "
        f"{_more(low)} and {_more(high)}."
    )

    same_optimizer = [e for key, e in designs.items() if key != StockFP32Masters.key]
    ends = [e["final_loss"] for e in same_optimizer]
    apart = max(ends) - min(ends)
    late = stock["loss"][len(stock["loss"]) // 2 :]
    if len(late) > 1:
        moves = statistics.median(abs(b - a) for a, b in pairwise(late))
        lines.append(
            f"The losses of the {len(ends)} designs with the same AdamW end {apart:.4f} apart, "
            + (
                f"less than the {moves:.4f} by which one moves from step to step: so short a run does not show which "
                "trains better. The gradient error is what differs."
                if apart < moves
                else f"more than the {moves:.4f} by which one moves from step to step. It is one run with one seed."
            )
        )
    if not results["same_micro_gradients"]:
        lines.append("The micro-gradients differed from design to design; each error is against its own FP64 sum.")
    return lines


def _quartiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[(len(ordered) - 1) * quarter // 4] for quarter in (1, 2, 3)]


def _more(ratio: float) -> str:
    return f"{100 * abs(ratio - 1):.1f} % {'more' if ratio >= 1 else 'less'}"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.1f}"


def figure(results: dict[str, Any]) -> Figure:
    """Return the comparison as a picture."""
    designs = list(results["designs"].values())
    colors = [design.color for design in DESIGNS]
    labels = [entry["label"].replace(" ", "\n", 1) for entry in designs]
    count = results["options"]["micro_batches"]
    picture = Figure(figsize=(15, 9), layout="constrained")
    picture.suptitle(
        f"Gradient accumulation over {count} micro-batches: a GPT with {results['parameters']:,} bfloat16 weights, "
        f"{results['machine']['gpu'] or results['machine']['cpu']}, torch {results['versions']['torch']}",
        fontsize=13,
    )
    grid = picture.add_gridspec(2, 6)

    axes = picture.add_subplot(grid[0, :3])
    for i, (entry, color) in enumerate(zip(designs, colors, strict=True)):
        steps = range(1, len(entry["loss"]) + 1)
        axes.plot(steps, entry["loss"], color=color, label=entry["label"], lw=5 - 0.9 * i, alpha=0.9)
    axes.set(title="training loss (the curves lie on one another where they agree)", xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)

    axes = picture.add_subplot(grid[0, 3:])
    for i, (entry, color) in enumerate(zip(designs, colors, strict=True)):
        points = {int(k): v for k, v in entry["relative_error"]["by_micro_batches"].items() if v > 0}
        axes.plot(
            list(points), list(points.values()), "o-", color=color, label=entry["label"], lw=5 - 0.9 * i, ms=9 - 1.2 * i
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.axvline(count, color="#999999", lw=1, ls=":")
    axes.set(title="relative error of the accumulated sum against FP64", xlabel="micro-batches accumulated")

    axes = picture.add_subplot(grid[1, :2])
    errors = {
        "the sum": [entry["relative_error"]["sum"] for entry in designs],
        "what AdamW reads": [entry["relative_error"]["optimizer"] for entry in designs],
    }
    _bars(axes, labels, colors, errors, "{:.0e}")
    if any(map(any, errors.values())):
        axes.set_yscale("log")
    axes.set(title=f"relative error after {count} micro-batches")

    axes = picture.add_subplot(grid[1, 2:4])
    sizes = [entry["gradient_bytes_per_parameter"] for entry in designs]
    _bars(
        axes, labels, colors, {"held": [s["held"] for s in sizes], "at the peak": [s["peak"] for s in sizes]}, "{:.2f}"
    )
    axes.set(title="gradient bytes per weight, measured")

    axes = picture.add_subplot(grid[1, 4:])
    times = [entry["ms_per_micro_batch"] for entry in designs]
    _bars(axes, labels, colors, {"median": [t["median"] for t in times], "p90": [t["p90"] for t in times]}, "{:.1f}")
    axes.set(title="ms per micro-batch, forward and backward")

    for axes in picture.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", lw=0.8)
        axes.set_axisbelow(True)
    return picture


def _bars(axes: Axes, labels: list[str], colors: list[str], groups: dict[str, list[float]], form: str) -> None:
    """Draw two bars for each design: the first group in full colour, the second lighter."""
    for shift, alpha, values in zip((-0.2, 0.2), (1.0, 0.45), groups.values(), strict=True):
        places = [i + shift for i in range(len(values))]
        bars = axes.bar(places, values, 0.38, color=colors, alpha=alpha)
        axes.bar_label(bars, [form.format(v) for v in values], fontsize=8, padding=2)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.margins(y=0.15)
    keys = [Patch(color="#555555", alpha=alpha, label=name) for name, alpha in zip(groups, (1.0, 0.45), strict=True)]
    axes.legend(handles=keys, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


# ---- the program -------------------------------------------------------------------------------------------------


def parse_arguments() -> tuple[argparse.Namespace, Tensor]:
    """Return the options and the text; a bad one ends the program with a message and exit code 2."""
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", metavar="PATH", help="a folder or file of text (default: Python's standard library)")
    parser.add_argument("--output", metavar="FOLDER", default="demo", help="for demo.png and demo.json (default: demo)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--steps", type=_positive(int), help="optimizer steps (default: 24)")
    parser.add_argument("--micro-batches", type=_positive(int), help="micro-batches per step (default: 64)")
    parser.add_argument("--batch-size", type=_positive(int), default=2, help="sequences per micro-batch (default: 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--time-limit",
        type=_positive(float),
        default=120,
        help="seconds; training ends early to keep it (default: 120)",
    )
    parser.add_argument("--quick", action="store_true", help="4 steps of 16 micro-batches")
    args = parser.parse_args()
    args.steps = args.steps or (4 if args.quick else 24)
    args.micro_batches = args.micro_batches or (16 if args.quick else 64)
    try:
        torch.empty(0, device=args.device)
        if torch.device(args.device).type not in ("cpu", "cuda"):
            parser.error(f"--device is {args.device!r}; it must be cpu or cuda")
        choose(None, torch.device(args.device))
    except (RuntimeError, AssertionError, ValueError) as error:
        parser.error(f"--device {args.device!r} cannot be used: {str(error).splitlines()[0]}")
    try:
        text = read_text(args.text)
    except (OSError, ValueError) as error:
        parser.error(f"--text: {error}")
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()
    except OSError as error:
        parser.error(f"--output: cannot write into {args.output!r}: {error.strerror}")
    return args, text


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(value: str) -> Any:
        number = kind(value)
        if not number > 0:
            raise ValueError
        return number

    parse.__name__ = f"positive {'whole ' if kind is int else ''}number"  # argparse: invalid <name> value: '0'
    return parse


def main() -> None:
    """Compare, and show and write the results."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, 110)
    try:
        args, text = parse_arguments()
        console.print(
            f"Training a GPT {len(DESIGNS)} times on {len(text):,} bytes of text, on {args.device}, "
            f"with {args.micro_batches} micro-batches of {args.batch_size} x {CONTEXT} bytes per step."
        )
        results = provenance(args, text) | compare(args, text, console)
        results["seconds"] = round(time.perf_counter() - START, 1)
        if results["steps"] < args.steps:
            console.print(
                f"Training ended after {results['steps']} of {args.steps} steps, for --time-limit {args.time_limit:g}."
            )
        console.print(table(results))
        for line in notes(results):
            console.print(line, style="dim")
        console.print()
        for line in findings(results):
            console.print(line)
        output = Path(args.output)
        figure(results).savefig(output / "demo.png", dpi=120)
        (output / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
        console.print(
            f"\nWrote {output / 'demo.png'} and {output / 'demo.json'} after {time.perf_counter() - START:.0f} s.",
            soft_wrap=True,
        )
    except KeyboardInterrupt:
        print("\ndemo: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    main()
