"""Train the GPT of train_gpt.py several times at once, each time accumulating gradients in another way, and compare.

    python examples/demo.py                                    # on the source text of Python's standard library
    python examples/demo.py --text my/folder --output demo     # writes demo/demo.png and demo/demo.json

All designs start from the same weights and see the same micro-batches. They take turns, a step each, so that whatever
else the machine does slows down all of them.
"""

from __future__ import annotations

import argparse
import gc
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
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

START = time.perf_counter()


def _stop_at_once(*_: object) -> None:
    print("\ndemo: stopped by Ctrl-C", file=sys.stderr, flush=True)
    os._exit(130)


# Importing torch takes seconds, and may swallow the KeyboardInterrupt that Ctrl-C means otherwise.
ctrl_c = signal.signal(signal.SIGINT, _stop_at_once)
# torch's threads else spin while they wait for one another, and crawl where another program keeps a core busy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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
    from train_gpt import CONTEXT, GPT, random_batch, read_text

    import accumkern
    from accumkern.backends import choose
except ModuleNotFoundError as error:
    sys.exit(f"demo: {error.name} is not installed; install what the demo needs with: pip install accumkern[demo]")
signal.signal(signal.SIGINT, ctrl_c)

LEARNING_RATE = 1e-3
ERROR_WINDOWS = 4  # the error is followed over so many times the micro-batches of a step
MEMORY_MICRO_BATCHES = 3  # the first keeps the gradient, the second allocates what is missing, the third is like all


# ---- the designs -------------------------------------------------------------------------------------------------


class StockBF16:
    """What PyTorch does by itself: ``.grad += gradient`` in bfloat16."""

    key = "stock_bf16"
    label = "stock bf16"
    color = "#d1495b"

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.params = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.stepped(), lr=LEARNING_RATE, fused=True)

    def stepped(self) -> list[torch.nn.Parameter]:
        """Return the parameters that AdamW steps."""
        return self.params

    def begin(self) -> None:
        """Make ready to accumulate; called once, when there is no gradient yet."""

    def sums(self) -> list[Tensor]:
        """Return the accumulated gradients."""
        return self.gradients_for_step()

    def gradients_for_step(self) -> list[Tensor]:
        """Return the gradients that AdamW would read now."""
        return [grad for param in self.params if (grad := param.grad) is not None]

    def step(self) -> None:
        """Update the weights and begin a new window."""
        self.optimizer.step()
        self.optimizer.zero_grad()


class StockFP32(StockBF16):
    """The strongest that stock PyTorch can do: autograd adds to an FP32 ``.grad``, in place.

    AdamW refuses an FP32 gradient of a bfloat16 weight, so it gets the sum rounded to bfloat16.
    """

    key = "stock_fp32"
    label = "stock fp32"
    color = "#30343f"

    def begin(self) -> None:
        """Make the FP32 buffer, and have autograd add to it."""
        sizes = [param.numel() for param in self.params]
        self.flat = torch.zeros(sum(sizes), device=self.params[0].device)
        self.buffers = [v.view_as(p) for v, p in zip(self.flat.split(sizes), self.params, strict=True)]
        for param in self.params:
            param.grad_dtype = None  # .grad may have any dtype
        self.put(self.buffers)

    def put(self, grads: list[Tensor]) -> None:
        """Make these the ``.grad`` of the weights."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad

    def sums(self) -> list[Tensor]:
        """Return the FP32 buffers."""
        return self.buffers

    def gradients_for_step(self) -> list[Tensor]:
        """Return the sums in bfloat16."""
        return [buffer.to(param.dtype) for buffer, param in zip(self.buffers, self.params, strict=True)]

    def step(self) -> None:
        """Lend AdamW the sums in bfloat16, and begin a new window."""
        self.put(self.gradients_for_step())
        self.optimizer.step()
        self.put(self.buffers)
        self.flat.zero_()


class StockFP32Masters(StockFP32):
    """The same with FP32 copies of the weights ("masters"), which AdamW steps with the FP32 sums as they are."""

    key = "stock_fp32_masters"
    label = "stock fp32 + masters"
    color = "#a5a9b4"

    def stepped(self) -> list[torch.nn.Parameter]:
        """Return FP32 copies of the weights."""
        self.masters = [torch.nn.Parameter(param.detach().float()) for param in self.params]
        return self.masters

    def begin(self) -> None:
        """Let the FP32 buffers be the gradients of the masters too."""
        super().begin()
        for master, buffer in zip(self.masters, self.buffers, strict=True):
            master.grad = buffer

    def gradients_for_step(self) -> list[Tensor]:
        """Return the FP32 buffers."""
        return self.buffers

    @torch.no_grad()
    def step(self) -> None:
        """Step the masters, round them to the weights, and begin a new window."""
        self.optimizer.step()
        for param, master in zip(self.params, self.masters, strict=True):
            param.copy_(master)
        self.flat.zero_()


class Split24(StockBF16):
    """Stock PyTorch and one line."""

    key = buffer = "split24"
    label = "accumkern split24"
    color = "#1f77b4"

    def begin(self) -> None:
        """Attach."""
        self.accumulator = accumkern.attach(self.optimizer, self.buffer)

    def sums(self) -> list[Tensor]:
        """Return ``.grad`` and residual, put together in FP32."""
        return [grad for param in self.params if (grad := self.accumulator.gradient(param)) is not None]


class Split32(Split24):
    """The same with a wider residual."""

    key = buffer = "split32"
    label = "accumkern split32"
    color = "#2a9d8f"


DESIGNS: tuple[type[StockBF16], ...] = (StockBF16, StockFP32, StockFP32Masters, Split24, Split32)


def new_model(device: torch.device, seed: int) -> GPT:
    """Return the model, with the weights that belong to ``seed``."""
    torch.manual_seed(seed)
    return GPT().to(device, torch.bfloat16)


# ---- measuring ---------------------------------------------------------------------------------------------------


class AllocatorMeter:
    """What a piece of code allocates on a device, as the device's allocator reports it.

    On a GPU these are the counters of torch's caching allocator; on the CPU every single allocation and release, from
    the memory events of torch.profiler.

    Attributes:
        held_bytes: allocated when :meth:`mark` was called, less what was allocated at the beginning.
        peak_bytes: the most that was allocated at any time, less what was allocated at the beginning.
        peak_after_mark_bytes: the same after :meth:`mark`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.held_bytes = self.peak_bytes = self.peak_after_mark_bytes = 0

    def __enter__(self) -> AllocatorMeter:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start and end to stderr otherwise
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            )
            self._profile.__enter__()
        return self

    def mark(self) -> None:
        """Note what is allocated now."""
        if self.device.type == "cuda":
            self.held_bytes = torch.cuda.memory_allocated(self.device) - self._before
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with torch.profiler.record_function("AllocatorMeter.mark"):
                pass

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.peak_after_mark_bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            self.peak_bytes = max(self.peak_bytes, self.peak_after_mark_bytes)
            return
        self._profile.__exit__(kind, value, traceback)
        if kind is not None:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        marked = min(event["ts"] for event in events if event["name"] == "AllocatorMeter.mark")
        changes = sorted(
            (event["ts"], event["args"]["Bytes"])
            for event in events
            if event["name"] == "[memory]" and event["args"]["Device Type"] == 0
        )
        totals = list(accumulate((size for _, size in changes), initial=0))
        at_mark = sum(ts <= marked for ts, _ in changes)
        self.held_bytes = totals[at_mark]
        self.peak_bytes = max(totals)
        self.peak_after_mark_bytes = max(totals[at_mark:])


def measure_bytes(
    design_type: type[StockBF16], batches: list[Tensor], device: torch.device, seed: int, keep: bool = True
) -> AllocatorMeter:
    """Run one window in a fresh state, step included, and return what it allocated.

    Weights, the state of AdamW and FP32 masters are there before. The mark is set after the last backward pass, when
    all activations are gone.

    Args:
        design_type: how gradients are accumulated.
        batches: the micro-batches.
        device: where to run.
        seed: of the weights.
        keep: False throws every gradient away as soon as it is there.
    """
    design = design_type(new_model(device, seed))
    design.model(batches[0]).backward()  # libraries allocate their workspaces on first use
    for param in design.params:
        param.grad = None
    for stepped in design.optimizer.param_groups[0]["params"]:
        stepped.grad = torch.zeros_like(stepped)
    design.optimizer.step()  # makes the state of AdamW
    design.optimizer.zero_grad()
    if not keep:
        for param in design.params:
            param.register_post_accumulate_grad_hook(_throw_away)
    with AllocatorMeter(device) as meter:
        design.begin()
        for batch in batches:
            (design.model(batch) / len(batches)).backward()
        meter.mark()
        design.step()
    return meter


def _throw_away(param: Tensor) -> None:
    param.grad = None


@torch.no_grad()
def relative_error(tensors: list[Tensor], truths: list[Tensor]) -> float:
    """Return ``||tensors - truths|| / ||truths||``, over all elements of all tensors, in FP64."""
    difference = sum((t.double() - s).square().sum().item() for t, s in zip(tensors, truths, strict=True))
    total = sum(s.square().sum().item() for s in truths)
    return float((difference / total) ** 0.5)


def measure_error(design: StockBF16, batches: list[Tensor], micro_batches: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Accumulate all of ``batches``, and compare with an FP64 sum of the very gradients that autograd handed over.

    Returns:
        ``sum``: relative error of the sum after ``micro_batches``; ``optimizer``: that of what AdamW would read then;
        ``by_micro_batches``: the error of the sum after 2, 4, 8, ... micro-batches. And the FP64 sums.
    """
    truths = [torch.zeros_like(param, dtype=torch.float64) for param in design.params]
    for param, truth in zip(design.params, truths, strict=True):
        param.register_hook(_add_to(truth))  # a tensor's hook sees its new gradient before it is accumulated
    design.begin()
    errors: dict[str, Any] = {"by_micro_batches": {}}
    for count, batch in enumerate(batches, start=1):
        (design.model(batch) / micro_batches).backward()
        if count == micro_batches:
            errors["sum"] = relative_error(design.sums(), truths)
            errors["optimizer"] = relative_error(design.gradients_for_step(), truths)
        if count == micro_batches or (count > 1 and count & (count - 1) == 0):
            errors["by_micro_batches"][count] = relative_error(design.sums(), truths)
    return errors, truths


def _add_to(truth: Tensor) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        truth.add_(grad)

    return hook


def train_step(design: StockBF16, batches: list[Tensor], device: torch.device) -> tuple[float, list[float]]:
    """Train one step; return its mean loss and the milliseconds that micro-batches took, forward and backward.

    On a GPU, which works behind the program's back, the time of the whole window is divided by its micro-batches.
    """
    losses, times = [], []
    _synchronize(device)
    begin = time.perf_counter()
    for batch in batches:
        loss = design.model(batch)
        (loss / len(batches)).backward()
        losses.append(loss.detach())
        if device.type == "cpu":
            end = time.perf_counter()
            times.append((end - begin) * 1e3)
            begin = end
    if device.type != "cpu":
        _synchronize(device)
        times.append((time.perf_counter() - begin) * 1e3 / len(batches))
    design.step()
    return torch.stack(losses).mean().item(), times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
        without = measure_bytes(StockBF16, memory_batches, device, args.seed, keep=False)
        progress.advance(task)
        meters = []
        for design_type in DESIGNS:
            meters.append(measure_bytes(design_type, memory_batches, device, args.seed))
            progress.advance(task)
        progress.remove_task(task)

        designs = [design_type(new_model(device, args.seed)) for design_type in DESIGNS]
        numel = sum(param.numel() for param in designs[0].params)
        for design in designs:
            design.begin()
        losses: list[list[float]] = [[] for _ in designs]
        times: list[list[float]] = [[] for _ in designs]
        task = progress.add_task("training", total=args.steps * len(designs), loss="")
        began = time.perf_counter()
        for step in range(args.steps):
            batches = draw(count)
            for turn in range(len(designs)):
                i = (step + turn) % len(designs)
                loss, milliseconds = train_step(designs[i], batches, device)
                losses[i].append(loss)
                times[i] += milliseconds
                progress.update(task, advance=1, loss=f"loss {loss:.3f}")
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
        "peak_bytes_per_parameter_without_gradients": without.peak_bytes / numel,
        "designs": {
            design.key: {
                "label": design.label,
                "relative_error": error,
                "gradient_bytes_per_parameter": {
                    "held": meter.held_bytes / numel,
                    "peak": (meter.peak_bytes - without.peak_bytes) / numel,
                    "in_step": meter.peak_after_mark_bytes / numel,
                },
                "ms_per_micro_batch": {
                    "median": statistics.median(milliseconds),
                    "p90": sorted(milliseconds)[int(0.9 * (len(milliseconds) - 1))],
                },
                "loss": loss,
                "final_loss": statistics.fmean(loss[-5:]),
            }
            for design, error, meter, milliseconds, loss in zip(DESIGNS, errors, meters, times, losses, strict=True)
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

    def times_closer(which: str) -> str:
        ours, theirs = split["relative_error"][which], stock["relative_error"][which]
        ratio = theirs / ours if ours else float("inf")
        return f"{_number(ratio)} times closer" if ratio >= 1 else f"{_number(1 / ratio)} times farther off"

    lines = [
        f"After {count} micro-batches {split['label']} is {times_closer('sum')} to the FP64 sum than {stock['label']}, "
        f"and what AdamW reads is {times_closer('optimizer')}."
    ]
    split32 = designs[Split32.key]
    if split32["relative_error"]["by_micro_batches"] == fp32["relative_error"]["by_micro_batches"]:
        lines.append(f"{split32['label']} and {fp32['label']} have the same error to the last digit.")
    held, fp32_held = (e["gradient_bytes_per_parameter"]["held"] for e in (split, fp32))
    lines.append(f"{split['label']} holds {held:.2f} gradient bytes per weight, {fp32['label']} {fp32_held:.2f}.")

    median, stock_median, fp32_median = (e["ms_per_micro_batch"]["median"] for e in (split, stock, fp32))
    lines.append(
        f"{split['label']} takes {_more(median / stock_median)} time for a micro-batch than {stock['label']} and "
        f"{_more(median / fp32_median)} than {fp32['label']}. These are medians; its slowest tenth took "
        f"{_more(split['ms_per_micro_batch']['p90'] / median)} than its median."
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
    _bars(
        axes,
        labels,
        colors,
        {
            "the sum": [entry["relative_error"]["sum"] for entry in designs],
            "what AdamW reads": [entry["relative_error"]["optimizer"] for entry in designs],
        },
        "{:.0e}",
    )
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
