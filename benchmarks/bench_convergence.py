"""Do sums and master weights show in the loss? One small model, the same tokens, several N, learning rates and seeds.

``python benchmarks/bench_convergence.py [--device cpu|cuda] [--quick] [--micro-batches 32768] [--seeds 5]
[--workers 2]``

A tiny GPT learns the source text of Python's standard library from micro-batches of one short sequence. For each number
N of micro-batches in a window, learning rate and seed, every design starts from the same FP32 weights, as far as it can
hold them, and sees the same text, so that their validation losses can be compared in pairs. Nothing is timed: several
runs go on at once, in processes of one thread. Writes ``benchmarks/results/<machine>/convergence.json``.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from harness import parser, steps, write_results
from paired import summary
from timing import describe
from torch import Tensor

from accumkern import backends
from designs import (
    DESIGNS,
    Autocast,
    Split24,
    Split24Masters,
    Split24Masters24,
    StockBF16,
    StockFP32Masters,
)
from train_gpt import GPT, random_batch, read_text

WIDTH, LAYERS, HEADS, CONTEXT = 64, 1, 2, 32
WINDOWS = (1, 8, 64)  # micro-batches of a window
MICRO_BATCHES = 3072  # of a run
SEEDS = 5
# Adam's step does not grow with the batch. Fewer steps are made larger, by the usual square root.
LEARNING_RATES, LEARNING_RATE_OF = (2e-4, 1e-3), 8
WARM_UP = 0.1  # of all steps
MAX_NORM = 1.0
VALIDATION_SEQUENCES, VALIDATION_BATCH = 2048, 256
REFERENCE = StockFP32Masters.key  # what the others are compared with
DESIGN_KEYS = (StockBF16.key, Split24.key, Split24Masters24.key, Split24Masters.key, REFERENCE, Autocast.key)


@dataclass(frozen=True)
class Run:
    """One training run."""

    design: str
    micro_batches: int  # of a window
    learning_rate: float  # of a window of LEARNING_RATE_OF micro-batches
    seed: int
    total: int  # micro-batches of the whole run
    device: str


def main() -> None:
    """Train everything and write the file."""
    options = parser(__doc__)
    options.add_argument(
        "--micro-batches", type=int, default=MICRO_BATCHES, help=f"of a run (default: {MICRO_BATCHES})"
    )
    options.add_argument("--seeds", type=int, default=SEEDS, help=f"default: {SEEDS}")
    options.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: as many as cores)")
    arguments = options.parse_args()
    windows = WINDOWS[:2] if arguments.quick else WINDOWS
    total, seeds = (256, 2) if arguments.quick else (arguments.micro_batches, arguments.seeds)
    if total < max(windows):
        options.error(f"--micro-batches is {total}; a window of {max(windows)} needs as many")
    runs = [
        Run(design, count, rate, seed, total, arguments.device)
        for seed in range(seeds)
        for count in windows
        for rate in LEARNING_RATES
        for design in DESIGN_KEYS
    ]
    losses: dict[Run, float | str] = {}
    # A fresh process each, and of one thread: the losses are the same whatever runs beside them.
    with (
        steps("convergence") as on_step,
        ProcessPoolExecutor(arguments.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
    ):
        futures = {pool.submit(train, run): run for run in runs}
        for future in as_completed(futures):
            try:
                losses[futures[future]] = future.result()
            except Exception as error:  # any run's any failure is a result
                losses[futures[future]] = describe(error)
            on_step(len(losses), len(runs))

    results = []
    for count, rate, design in itertools.product(windows, LEARNING_RATES, DESIGN_KEYS):
        of_design, of_reference = (
            [losses[run] for run in runs if (run.design, run.micro_batches, run.learning_rate) == (key, count, rate)]
            for key in (design, REFERENCE)
        )
        results.append(result(design, count, rate, total, of_design, of_reference))
    method = {
        "model": f"GPT over bytes, width {WIDTH}, {LAYERS} layer, context {CONTEXT}",
        "text": "source text of Python's standard library; its last twentieth is for validation",
        "micro_batch": f"one sequence of {CONTEXT} tokens",
        "optimizer": f"AdamW, learning rate * sqrt(N / {LEARNING_RATE_OF}), linear warm-up over {WARM_UP:.0%} of the "
        f"steps and linear decay to zero, gradients clipped to a norm of {MAX_NORM}",
        "validation_loss": f"of {VALIDATION_SEQUENCES} sequences after the last step, one for each seed",
        "difference": f"validation loss less that of {DESIGNS[REFERENCE].label} with the same seed: median over seeds, "
        "and the interval from the least to the greatest that holds it with the confidence that stands beside it",
        "backend": backends.choose(None, torch.device(arguments.device)),
    }
    write_results(arguments, "convergence", method, results)


def result(
    design: str,
    micro_batches: int,
    learning_rate: float,
    total: int,
    losses: list[float | str],
    reference: list[float | str],
) -> dict[str, Any]:
    """Return what came out for a design and an N: one loss for each seed, and the reference's."""
    made: dict[str, Any] = {
        "design": design,
        "label": DESIGNS[design].label,
        "masters": DESIGNS[design].masters,
        "micro_batches": micro_batches,
        "learning_rate": learning_rate,
        "steps": total // micro_batches,
        "tokens": total // micro_batches * micro_batches * CONTEXT,
    }
    failed = [loss for loss in losses if isinstance(loss, str)]
    if failed:
        return made | {"error": failed[0]}
    values = [loss for loss in losses if not isinstance(loss, str)]
    made |= {"validation_loss": values, "median_loss": statistics.median(values)}
    pairs = [(mine, other) for mine, other in zip(values, reference, strict=True) if not isinstance(other, str)]
    if design != REFERENCE and len(pairs) == len(values):
        made["difference"] = summary([mine - other for mine, other in pairs])
    return made


@cache
def split_text() -> tuple[Tensor, Tensor]:
    """Return the text for training and that for validation."""
    text = read_text()
    cut = len(text) - len(text) // 20
    return text[:cut], text[cut:]


def train(run: Run) -> float:
    """Train once, and return the validation loss."""
    text, held_out = split_text()
    device = torch.device(run.device)
    torch.manual_seed(run.seed)
    kind = DESIGNS[run.design]
    model = kind.cast(GPT(WIDTH, LAYERS, HEADS, CONTEXT).to(device))
    rate = run.learning_rate * (run.micro_batches / LEARNING_RATE_OF) ** 0.5
    design = kind(model, learning_rate=rate, max_norm=MAX_NORM)
    design.begin()
    count = run.total // run.micro_batches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        design.optimizer, lambda step: min((step + 1) / (WARM_UP * count), 1.0) * (1 - step / count)
    )
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(count):
        for number in range(run.micro_batches):
            batch = random_batch(text, 1, generator, CONTEXT).to(device)
            design.backward(model(batch) / run.micro_batches, last=number == run.micro_batches - 1)
        design.step()
        schedule.step()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        losses = [
            model(random_batch(held_out, VALIDATION_BATCH, generator, CONTEXT).to(device)).item()
            for _ in range(VALIDATION_SEQUENCES // VALIDATION_BATCH)
        ]
    return statistics.fmean(losses)


if __name__ == "__main__":
    main()
