"""Train the GPT of train_gpt.py in three ways, and compare loss, memory and time.

    python examples/demo.py                                    # on the source text of Python's standard library
    python examples/demo.py --text my/folder --output demo     # writes demo/demo.png and demo/demo.json

Stock PyTorch with bfloat16 weights, FP32 weights with autocast, and accumkern: exact sums and master weights inside
bfloat16 weights. All start from the same weights, as far as they can hold them, and see the same text. They take turns,
a step each, so that whatever else the machine does slows down all of them, and times are compared for the same step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
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
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from torch import Tensor

    import accumkern
    from accumkern.backends import choose
    from accumkern.memory import storage_bytes, tensors_in
    from demo_report import BYTES_FOR, figure, findings, notes, table, tenth
    from designs import Autocast, Split24Masters, StockBF16
    from measure import measure_memory, run_micro_batches, synchronize
    from train_gpt import CONTEXT, GPT, random_batch, read_text
except ModuleNotFoundError as error:
    sys.exit(f"demo: {error.name} is not installed; install what the demo needs with: pip install accumkern[demo]")
signal.signal(signal.SIGINT, ctrl_c)

LABELS: dict[type[StockBF16], str] = {
    StockBF16: "stock bf16",
    Autocast: "FP32 + autocast",
    Split24Masters: "accumkern",
}
MAX_NORM = 1.0
WARM_UP = 0.05  # of all steps
# A larger one: some memory does not grow with the model, and would be much of a small one's.
MEMORY_MODEL, MEMORY_MICRO_BATCHES = {"width": 512, "layers": 8, "heads": 8}, 2


# ---- the comparison ----------------------------------------------------------------------------------------------


def make_design(kind: type[StockBF16], args: argparse.Namespace, **size: int) -> StockBF16:
    """Return a design with a model whose weights belong to the seed."""
    torch.manual_seed(args.seed)
    return kind(kind.cast(GPT(**size).to(args.device)), args.lr, MAX_NORM)


class Training:
    """The training of one design, step by step.

    Attributes:
        losses: the mean loss of each step's micro-batches.
        milliseconds: that each step took, micro-batches included.
        unmoved: for each tenth of the training, the share of the weights that it left as they were.
    """

    def __init__(self, kind: type[StockBF16], args: argparse.Namespace) -> None:
        self.design = make_design(kind, args)
        self.design.begin()
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.design.optimizer,
            lambda step: min((step + 1) / (WARM_UP * args.steps), (1 + math.cos(math.pi * step / args.steps)) / 2),
        )
        self._tenth = tenth(args.steps)
        self._before = self.stepped_weights()
        self.losses: list[float] = []
        self.milliseconds: list[float] = []
        self.unmoved: list[float] = []

    def stepped_weights(self) -> Tensor:
        """Return a copy of what AdamW steps: the weights, or their masters."""
        accumulator = accumkern.accumulator_of(self.design.optimizer)
        weights = [accumulator.master_weight(p) if accumulator else p.detach() for p in self.design.params]
        return torch.cat([weight.flatten() for weight in weights])

    def step(self, batches: list[Tensor]) -> None:
        """Train on the micro-batches of a step."""
        synchronize(batches[0].device)
        begin = time.perf_counter()
        losses, _ = run_micro_batches(self.design, batches, range(len(batches)))
        self.design.step()
        synchronize(batches[0].device)
        self.milliseconds.append((time.perf_counter() - begin) * 1e3)
        self.losses.append(torch.stack(losses).mean().item())
        self._schedule.step()
        if len(self.losses) % self._tenth == 0:
            weights = self.stepped_weights()
            self.unmoved.append((weights == self._before).float().mean().item())
            self._before = weights


def measure_bytes(kind: type[StockBF16], args: argparse.Namespace, batches: list[Tensor]) -> dict[str, Any]:
    """Return bytes per weight: those held before a step, by what they are for, and the most at any time.

    The allocator says what there is in all. Weights and the state of AdamW are counted from tensors, and what is left
    of all that outlives a step belongs to the masters.
    """
    made: list[StockBF16] = []

    def make() -> StockBF16:
        made.append(make_design(kind, args, **MEMORY_MODEL))
        return made[0]

    memory = measure_memory(make, batches, torch.device(args.device))
    params, optimizer = made[0].params, made[0].optimizer
    weights, state = storage_bytes(params), storage_bytes(tensors_in(dict(optimizer.state)))
    sizes = (weights, memory.resident - weights - state, memory.held, state)
    numel = sum(param.numel() for param in params)
    held = {name: size / numel for name, size in zip(BYTES_FOR, sizes, strict=True)}
    return {"held": held, "peak": memory.peak / numel, "of_parameters": numel}


def compare(args: argparse.Namespace, text: Tensor, console: Console) -> dict[str, Any]:
    """Run everything, and return all numbers."""
    generator = torch.Generator().manual_seed(args.seed)

    def draw(number: int) -> list[Tensor]:
        return [random_batch(text, args.batch_size, generator).to(args.device) for _ in range(number)]

    batches = draw(MEMORY_MICRO_BATCHES)
    sizes = [measure_bytes(kind, args, batches) for kind in LABELS]
    trainings = [Training(kind, args) for kind in LABELS]
    fifth = max(1, args.steps // 5)
    began = time.perf_counter()
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for step in progress.track(range(1, args.steps + 1)):
            batches = draw(args.micro_batches)
            for k in range(len(trainings)):
                trainings[(step + k) % len(trainings)].step(batches)
            if step % fifth == 0:
                means = [f"{statistics.fmean(training.losses[-fifth:]):.3f}" for training in trainings]
                found = ", ".join(f"{label} {mean}" for label, mean in zip(LABELS.values(), means, strict=True))
                console.print(f"loss, steps {step + 1 - fifth} to {step}: {found}")
            now = time.perf_counter()
            if now - START + (now - began) / step > args.time_limit:
                break

    steps = len(trainings[0].losses)
    return {
        "parameters": sum(param.numel() for param in trainings[0].design.params),
        "steps": steps,
        "designs": {
            kind.key: {
                "label": label,
                "final_loss": statistics.fmean(training.losses[-tenth(steps) :]),
                "bytes_per_parameter": size,
                "ms_per_step": statistics.median(training.milliseconds),
                "time_over": {
                    other.design.key: quartiles(list(map(truediv, training.milliseconds, other.milliseconds)))
                    for other in trainings
                },
                "unmoved": training.unmoved,
                "loss": training.losses,
            }
            for (kind, label), training, size in zip(LABELS.items(), trainings, sizes, strict=True)
        },
    }


def quartiles(values: list[float]) -> list[float]:
    """Return the values below which a quarter, half and three quarters of all lie."""
    ordered = sorted(values)
    return [ordered[(len(ordered) - 1) * quarter // 4] for quarter in (1, 2, 3)]


def provenance(args: argparse.Namespace, text: Tensor) -> dict[str, Any]:
    """Return what the numbers depend on: machine, versions, options."""
    device, cpu_info = torch.device(args.device), Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = next(iter(names), platform.processor() or platform.machine())
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu}, {os.cpu_count()} cores",
        "versions": {"accumkern": accumkern.__version__, "torch": torch.__version__, "python": sys.version.split()[0]},
        "backend": choose(None, device),
        "options": {key: value for key, value in vars(args).items() if key != "output"},
        "text_bytes": len(text),
    }


# ---- the program -------------------------------------------------------------------------------------------------


def parse_arguments() -> tuple[argparse.Namespace, Tensor]:
    """Return the options and the text; a bad one ends the program with a message and exit code 2."""
    parser = argparse.ArgumentParser(prog="demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", metavar="PATH", help="a folder or file of text (default: Python's standard library)")
    parser.add_argument("--output", metavar="FOLDER", default="demo", help="for demo.png and demo.json (default: demo)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    parser.add_argument("--steps", type=_positive(int), help="optimizer steps (default: 1400)")
    parser.add_argument("--micro-batches", type=_positive(int), default=4, help="micro-batches per step (default: 4)")
    parser.add_argument("--batch-size", type=_positive(int), default=1, help="sequences per micro-batch (default: 1)")
    parser.add_argument("--lr", type=_positive(float), default=2e-4, help="the highest learning rate (default: 2e-4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--time-limit",
        type=_positive(float),
        default=150,
        help="seconds; training ends early to keep it (default: 150)",
    )
    parser.add_argument("--quick", action="store_true", help="20 steps")
    args = parser.parse_args()
    args.steps = args.steps or (20 if args.quick else 1400)
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
            f"Training a GPT in {len(LABELS)} ways on {len(text):,} bytes of text, on {args.device}, "
            f"with {args.micro_batches} micro-batches of {args.batch_size} x {CONTEXT} bytes per step."
        )
        if args.device == "cpu":
            torch.set_num_threads(1)  # so small a model gains nothing from more
        results = provenance(args, text) | compare(args, text, console)
        results["seconds"] = round(time.perf_counter() - START, 1)
        if results["steps"] < args.steps:
            console.print(
                f"Training ended after {results['steps']} of {args.steps} steps, for --time-limit {args.time_limit:g}."
            )
        console.print(table(results))
        for line in findings(results):
            console.print(f"- {line}")
        console.print()
        for line in notes(results):
            console.print(line, style="dim")
        output = Path(args.output)
        figure(results).savefig(output / "demo.png", dpi=120)
        (output / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
        console.print(
            f"\nWrote {output / 'demo.png'} (the loss of every step, and what the bytes are for) and "
            f"{output / 'demo.json'} after {time.perf_counter() - START:.0f} s.",
            soft_wrap=True,
        )
    except KeyboardInterrupt:
        print("\ndemo: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk
        sys.exit(f"demo: {error}")


if __name__ == "__main__":
    main()
