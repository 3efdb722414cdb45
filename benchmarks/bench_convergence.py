"""Do sums and master weights show in the loss? One model, the same tokens, several N, learning rates and seeds.

``python benchmarks/bench_convergence.py [--device cpu|cuda] [--quick] [--micro-batches 32768] [--seeds 5]
[--seconds 90] [--workers 2]``

A GPT learns the source text of Python's standard library: a tiny one from micro-batches of one short sequence, on a GPU
a larger one. For each number N of micro-batches in a window, learning rate and seed, every design starts from the same
FP32 weights, as far as it can hold them, and sees the same text, so that their validation losses can be compared in
pairs. Nothing is timed: several runs go on at once, seed by seed, in processes of one thread. Writes
``benchmarks/results/<machine>/convergence.json`` whenever all runs of a seed have ended, so that whatever ends the
script takes only the seeds that are not complete.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import torch
from harness import at_least_one, parser, save_results, steps, write_results
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


@dataclass(frozen=True)
class Regime:
    """What is trained.

    Attributes:
        width, layers, heads, context: of the GPT.
        batch_size: sequences of ``context`` bytes in a micro-batch.
        windows: N, micro-batches of a window.
        learning_rates: of a window of LEARNING_RATE_OF micro-batches.
        micro_batches: of a run.
        seeds: of weights and text.
        workers: processes at most.
    """

    width: int
    layers: int
    heads: int
    context: int
    batch_size: int
    windows: tuple[int, ...]
    learning_rates: tuple[float, ...]
    micro_batches: int
    seeds: int
    workers: int


CORES = os.cpu_count() or 1
REGIMES = {
    "cpu": Regime(64, 1, 2, 32, 1, (1, 8, 64), (2e-4, 1e-3), micro_batches=3072, seeds=5, workers=CORES),
    # 28.8 million weights in few layers, whose kernels are worth their launch. Two processes for each design keep the
    # GPU busy; more would wait for it.
    "cuda": Regime(768, 4, 12, 128, 8, (8,), (3e-4,), micro_batches=2048, seeds=5, workers=min(CORES, 12)),
}
QUICK_MICRO_BATCHES, QUICK_SEEDS = 256, 2
# Adam's step does not grow with the batch. Fewer steps are made larger, by the usual square root.
LEARNING_RATE_OF = 8
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
    regime: Regime


def main() -> None:
    """Train everything and write the file."""
    begun = time.monotonic()
    options = parser(__doc__)
    options.add_argument("--micro-batches", type=at_least_one, help="of a run (default: 3072; on a GPU 2048)")
    options.add_argument("--seeds", type=at_least_one, help="default: 5")
    options.add_argument(
        "--seconds", type=at_least_one, help="begin no seed whose runs would not have ended by then (default: all)"
    )
    options.add_argument("--workers", type=at_least_one, help="processes (default: a core each; on a GPU 12 at most)")
    arguments = options.parse_args()
    regime = REGIMES[arguments.device]
    windows = regime.windows[:2] if arguments.quick else regime.windows
    total = arguments.micro_batches or (QUICK_MICRO_BATCHES if arguments.quick else regime.micro_batches)
    seeds = arguments.seeds or (QUICK_SEEDS if arguments.quick else regime.seeds)
    if total < max(windows):
        options.error(f"--micro-batches is {total}; a window of {max(windows)} needs as many")
    runs = [
        Run(design, count, rate, seed, total, arguments.device, regime)
        for seed in range(seeds)
        for count in windows
        for rate in regime.learning_rates
        for design in DESIGN_KEYS
    ]
    method = {
        "model": f"GPT over bytes, {parameters_of(regime):,} weights: width {regime.width}, layers {regime.layers}, "
        f"context {regime.context}",
        "text": "source text of Python's standard library; its last twentieth is for validation",
        "micro_batch": f"{regime.batch_size} x {regime.context} tokens",
        "optimizer": f"AdamW, learning rate * sqrt(N / {LEARNING_RATE_OF}), linear warm-up over {WARM_UP:.0%} of the "
        f"steps and linear decay to zero, gradients clipped to a norm of {MAX_NORM}",
        "validation_loss": f"of {VALIDATION_SEQUENCES} sequences after the last step, one for each seed",
        "difference": f"validation loss less that of {DESIGNS[REFERENCE].label} with the same seed: median over seeds, "
        "and the interval from the least to the greatest that holds it with the confidence that stands beside it",
        "backend": backends.choose(None, torch.device(arguments.device)),
    }

    losses: dict[Run, float | str] = {}
    workers = arguments.workers or regime.workers
    with steps("convergence") as on_step, processes(workers) as pool:
        for run, outcome in trained(runs, pool, workers, begun, arguments.seconds or math.inf):
            losses[run] = outcome
            on_step(len(losses), len(runs))
            ended = Counter(run.seed for run in losses)
            whole = [run for run in runs if ended[run.seed] * seeds == len(runs)]
            if run in whole:  # its seed's last
                method["seeds"] = f"{len(whole) * seeds // len(runs)} of {seeds}"
                save_results(arguments, "convergence", method, results_of(whole, losses))
                print(f"convergence: {method['seeds']} seeds after {time.monotonic() - begun:.0f} s", flush=True)
    write_results(arguments, "convergence", method, results_of(whole, losses))


# ---- the processes -----------------------------------------------------------------------------------------------


@contextmanager
def processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes end with this one, in the middle of a run, however it ends.

    Each has one thread: on a CPU the losses are the same whatever runs beside them.
    """
    context = get_context("spawn")
    # A pipe that this process alone holds open at one end: when that is closed, by it or by its death, workers see it.
    alive, held = context.Pipe(duplex=False)
    with held, ProcessPoolExecutor(workers, context, begin, (alive,)) as pool:
        try:
            yield pool
        except BaseException:
            held.close()
            raise


def begin(alive: Connection) -> None:
    """Be a process of the pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that started this one
    torch.set_num_threads(1)

    def watch() -> None:
        alive.poll(None)  # until the other end is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def trained(
    runs: list[Run], pool: Executor, workers: int, begun: float, seconds: float
) -> Iterator[tuple[Run, float | str]]:
    """Train runs in their order, as many at once as there are workers; yield each with its outcome when it has ended.

    The first seed is trained in any case. A further one begins only where a run that takes as long as the longest so
    far would end within ``seconds`` after ``begun``.

    Raises:
        BrokenProcessPool: a process was ended from outside.
    """
    waiting, seeds, longest = runs[::-1], {runs[0].seed}, 0.0
    under_way: dict[Future[tuple[float, float]], Run] = {}
    while waiting or under_way:
        while waiting and len(under_way) < workers:
            seed = waiting[-1].seed
            if seed not in seeds and time.monotonic() - begun + longest > seconds:
                waiting.clear()
                break
            seeds.add(seed)
            run = waiting.pop()
            under_way[pool.submit(train_and_time, run)] = run
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            run = under_way.pop(future)
            try:
                loss, taken = future.result()
            except BrokenProcessPool:
                raise
            except Exception as error:  # any run's any failure is a result
                yield run, describe(error)
            else:
                longest = max(longest, taken)
                yield run, loss


# ---- the results -------------------------------------------------------------------------------------------------


def results_of(runs: list[Run], losses: Mapping[Run, float | str]) -> list[dict[str, Any]]:
    """Return a result for each N, learning rate and design, of what came out of runs: whole seeds, in order."""
    groups: dict[Run, list[float | str]] = {}
    for run in runs:
        groups.setdefault(replace(run, seed=0), []).append(losses[run])
    return [result(run, of_run, groups[replace(run, design=REFERENCE)]) for run, of_run in groups.items()]


def result(run: Run, losses: list[float | str], reference: list[float | str]) -> dict[str, Any]:
    """Return what came out for the design, N and learning rate of a run.

    Args:
        run: of any seed.
        losses: for each seed the loss, or what ended the run.
        reference: the same of the reference.
    """
    count = run.total // run.micro_batches
    made: dict[str, Any] = {
        "design": run.design,
        "label": DESIGNS[run.design].label,
        "masters": DESIGNS[run.design].masters,
        "parameters": parameters_of(run.regime),
        "micro_batches": run.micro_batches,
        "learning_rate": run.learning_rate,
        "steps": count,
        "tokens": count * run.micro_batches * run.regime.batch_size * run.regime.context,
    }
    failed = [loss for loss in losses if isinstance(loss, str)]
    if failed:
        return made | {"error": failed[0]}
    values = [loss for loss in losses if not isinstance(loss, str)]
    made |= {"validation_loss": values, "median_loss": statistics.median(values)}
    pairs = [(mine, other) for mine, other in zip(values, reference, strict=True) if not isinstance(other, str)]
    if run.design != REFERENCE and len(pairs) == len(values):
        made["difference"] = summary([mine - other for mine, other in pairs])
    return made


# ---- a run -------------------------------------------------------------------------------------------------------


def new_model(regime: Regime, device: torch.device) -> GPT:
    """Return the model, with FP32 weights that are drawn on the device."""
    with device:
        return GPT(regime.width, regime.layers, regime.heads, regime.context)


@cache
def parameters_of(regime: Regime) -> int:
    """Return the number of weights."""
    return sum(param.numel() for param in new_model(regime, torch.device("meta")).parameters())


@cache
def split_text() -> tuple[Tensor, Tensor]:
    """Return the text for training and that for validation."""
    text = read_text()
    cut = len(text) - len(text) // 20
    return text[:cut], text[cut:]


def train_and_time(run: Run) -> tuple[float, float]:
    """Train once, and return the validation loss and the seconds that it took."""
    begun = time.monotonic()
    return train(run), time.monotonic() - begun


def train(run: Run) -> float:
    """Train once, and return the validation loss."""
    text, held_out = split_text()
    regime, device, kind = run.regime, torch.device(run.device), DESIGNS[run.design]
    torch.manual_seed(run.seed)
    model = kind.cast(new_model(regime, device))
    rate = run.learning_rate * (run.micro_batches / LEARNING_RATE_OF) ** 0.5
    design = kind(model, learning_rate=rate, max_norm=MAX_NORM)
    design.begin()
    count = run.total // run.micro_batches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        design.optimizer, lambda step: min((step + 1) / (WARM_UP * count), 1.0) * (1 - step / count)
    )
    generator = torch.Generator().manual_seed(run.seed)
    for _ in range(count):
        # On a GPU a copy waits for what is queued: one for all of a window.
        window = random_batch(text, run.micro_batches * regime.batch_size, generator, regime.context).to(device)
        for number, batch in enumerate(window.split(regime.batch_size)):
            design.backward(model(batch) / run.micro_batches, last=number == run.micro_batches - 1)
        design.step()
        schedule.step()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        losses = [
            model(random_batch(held_out, VALIDATION_BATCH, generator, regime.context).to(device)).item()
            for _ in range(VALIDATION_SEQUENCES // VALIDATION_BATCH)
        ]
    return statistics.fmean(losses)


if __name__ == "__main__":
    main()
