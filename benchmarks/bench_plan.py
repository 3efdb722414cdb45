"""Memory of training as ``accumkern.plan`` predicts it on fake tensors, and as it is.

``python benchmarks/bench_plan.py [--device cpu|cuda] [--quick] [--models GPT,Llama] [--seconds 70]``

For each model of ``plan_models.py`` a process plans for a limit of memory without running anything (``measure=False``);
for a GPU another one does so with the model on the CPU, as on a machine without a GPU. Then a process of its own trains
the model in a loop as users write it, and the allocator says how much it took: for the fewest samples that were
predicted, for the micro-batch that the plan chose, and for one between them. Under the limit it looks for the largest
micro-batch that trains. On a GPU all models are measured at once. Writes ``benchmarks/results/<machine>/plan.json``
whenever a model is done.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from harness import at_least_one, parser, steps, write_growing
from plan_models import MODELS
from regimes import names_of
from timing import describe

import accumkern
from accumkern.out_of_memory import forget_failed_pass, gpu_limit, is_out_of_memory, parse_bytes
from accumkern.planning.memory import interpolated
from measure import AllocatorMeter

Returned = TypeVar("Returned")

BUFFER, MASTERS = "split24", "split32"
MARGIN = 0.1
MICRO_BATCHES = 2  # of a window: the second allocates what the first does not need
WARM_WINDOWS = 1  # in the first the optimizer's states appear, and what libraries keep for themselves
QUICK = {"cpu": "20MB", "cuda": "4GB"}  # the limit, of one model


class Job(NamedTuple):
    """A model, by the kind of device whose list has it, and by name, the limit of memory, and the seconds it has."""

    kind: str
    name: str
    limit: str
    seconds: float = math.inf


class Predicted(NamedTuple):
    """What a plan says: bytes at the peak by micro-batch, the micro-batch that it takes, and how many weights."""

    peaks: dict[int, int]
    chosen: int
    numel: int


class Peak(NamedTuple):
    """What the allocator says: bytes of tensors at the peak and, on a GPU, those that it had taken of the device."""

    allocated: int
    reserved: int | None


def main() -> None:
    """Predict and measure every model, print the table and write the file."""
    options = parser(__doc__)
    known = sorted({name for models in MODELS.values() for name in models})
    options.add_argument("--models", type=names_of(known), default=known, help="default: all")
    options.add_argument(
        "--seconds", type=at_least_one, help="of a model, after which no further micro-batch is tried (default: all)"
    )
    arguments = options.parse_args()
    kind = arguments.device
    seconds = arguments.seconds or math.inf
    jobs = [Job(kind, name, model.limit, seconds) for name, model in MODELS[kind].items() if name in arguments.models]
    if arguments.quick:
        jobs = [job._replace(limit=QUICK[kind]) for job in jobs[:1]]
    device = "GPU: torch's caching allocator" if kind == "cuda" else "CPU: allocations that torch.profiler records"
    method = {job.name: f"{MODELS[kind][job.name].what}; limit {job.limit}" for job in jobs} | {
        "training": f"bfloat16 weights, AdamW, {MASTERS} masters and {BUFFER} sums, windows of {MICRO_BATCHES} "
        "micro-batches",
        "predicted": "accumkern.plan(measure=False), in a process that runs nothing",
        "measured": f"{device}: everything that is allocated, model and batch too, at the peak of the second window",
        "chosen": f"by that plan, with a margin of {MARGIN:.0%}",
        "largest": "micro-batch that trains under the limit without a margin, up to twice the chosen one: on a GPU "
        "torch's allocator is limited, on a CPU peaks are compared with it",
    }
    try:
        with steps("plan") as on_step:
            write_growing(arguments, "plan", method, found(jobs, len(jobs) if kind == "cuda" else 1, on_step))
    finally:
        for process in multiprocessing.active_children():  # there are some only where this was interrupted
            process.kill()


def found(jobs: list[Job], at_once: int, on_step: Callable[[int, int], None]) -> Iterator[list[dict[str, Any]]]:
    """Yield the results of all models until then, in their order, whenever one is done."""
    of: dict[Job, list[dict[str, Any]]] = {}
    models = ThreadPoolExecutor(at_once)
    try:
        under_way = {models.submit(results_of, job): job for job in jobs}
        for done, future in enumerate(as_completed(under_way)):
            of[under_way[future]] = future.result()
            on_step(done + 1, len(jobs))
            yield [result for job in jobs for result in of.get(job, [])]
    finally:
        models.shutdown(wait=False, cancel_futures=True)


def results_of(job: Job) -> list[dict[str, Any]]:
    """Return the results of a model; what fails in a process, or ends it, is a result, and the others go on."""
    until = time.time() + job.seconds  # a clock that processes share
    plans: dict[str, Predicted] = {}
    results: list[dict[str, Any]] = []
    with ThreadPoolExecutor() as processes:
        made = {on: processes.submit(in_process, predicted, job, on) for on in dict.fromkeys((job.kind, "cpu"))}
        for on, future in made.items():
            try:
                plans[on] = future.result()
            except Exception as error:
                results.append({"kind": "model", "model": job.name, "planned_on": on, "error": describe(error)})
    if not plans:
        return results
    sizes = sizes_of(next(iter(plans.values())))
    try:
        peaks, most = in_process(measured, job, sizes, until)
    except Exception as error:
        return [*results, {"kind": "model", "model": job.name, "error": describe(error)}]
    for on, plan in plans.items():
        about = {"model": job.name, "parameters": plan.numel, "planned_on": on}
        for size, peak in peaks.items():
            if size <= max(plan.peaks):
                bytes_ = interpolated(plan.peaks, size)
                result = {"kind": "peak", **about, "micro_batch": size, "predicted_bytes": bytes_}
                results.append(result | ({"error": peak} if isinstance(peak, str) else compared(bytes_, peak)))
        chosen = {"kind": "choice", **about, "limit_bytes": parse_bytes(job.limit), "chosen": plan.chosen}
        results.append(chosen | ({"error": most} if isinstance(most, str) else {"largest": most}))
    return results


def compared(predicted_bytes: int, peak: Peak) -> dict[str, Any]:
    """Return what was measured, and how far the prediction is off."""
    result = {"measured_bytes": peak.allocated, "error_of_prediction": predicted_bytes / peak.allocated - 1}
    return result if peak.reserved is None else result | {"reserved_bytes": peak.reserved}


def in_process(function: Callable[..., Returned], *arguments: Any) -> Returned:
    """Return what a function returns in a process of its own, or raise what it raises."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def sizes_of(plan: Predicted) -> list[int]:
    """Return the smallest micro-batch that was predicted, the chosen one, and the one that is next to halfway."""
    sizes = [size for size in sorted(plan.peaks) if size <= plan.chosen]
    halfway = min(sizes, key=lambda size: abs(size * size / (sizes[0] * plan.chosen) - 1))
    return sorted({sizes[0], halfway, plan.chosen})


# ---- in processes of their own -----------------------------------------------------------------------------------


def predicted(job: Job, on: str) -> Predicted:
    """Plan for the device of the job without running anything; ``setup()`` puts the model on another one perhaps."""
    plan = accumkern.plan(
        partial(MODELS[job.kind][job.name].setup, torch.device(on)),
        memory=job.limit,
        margin=MARGIN,
        buffer=BUFFER,
        master_weights=MASTERS,
        measure=False,
        device=job.kind,
    )
    peaks = {prediction.micro_batch: prediction.memory.total for prediction in plan.predictions}
    return Predicted(peaks, plan.largest_micro_batch, plan.bfloat16_numel)


def measured(job: Job, sizes: list[int], until: float = math.inf) -> tuple[dict[int, Peak | str], int | str]:
    """Train a model with micro-batches of some sizes, of which a plan has chosen the last.

    Returns:
        The peak, or what went wrong, of each; and what :func:`largest` returns.
    """
    device, limit = torch.device(job.kind, 0), parse_bytes(job.limit)
    if device.type == "cuda":
        torch.cuda.init()
    peaks: dict[int, Peak | str] = {}
    for size in sizes:
        try:
            peaks[size] = peak_of(job, size, device)
        except RuntimeError as error:
            peaks[size] = describe(error)
            forget_failed_pass()

    def fits(size: int) -> bool:
        if device.type == "cpu":
            known = peaks.get(size)
            return (known if isinstance(known, Peak) else peak_of(job, size, device)).allocated <= limit
        try:
            with gpu_limit(device, limit):
                peak_of(job, size, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        forget_failed_pass()
        return False

    try:
        return peaks, largest(fits, sizes[0], sizes[-1], until)
    except RuntimeError as error:
        return peaks, describe(error)


def largest(fits: Callable[[int], bool], first: int, chosen: int, until: float) -> int | str:
    """Return the largest micro-batch that fits, up to twice the chosen one; in words what is known where none is found.

    It should be little more than the chosen one, whose plan has a margin: from there it goes up by an eighth of it,
    then twice as far each time, and halves what lies between one that fits and one that does not.

    Args:
        fits: tries a size.
        first: the least.
        chosen: the size to begin with.
        until: the ``time.time()`` from which no further size is tried.
    """
    fitting, failing = first - 1, 2 * chosen + 1
    size, step = chosen, max(1, chosen // 8)
    while failing - fitting > 1:
        if time.time() > until:
            known = [f"{fitting} trains"] if fitting >= first else []
            known += [f"{failing} does not"] if failing <= 2 * chosen else []
            return f"not found in time: {', '.join(known) or 'none was tried'}"
        if fits(size):
            fitting = size
        else:
            failing = size
        size = (fitting + failing) // 2 if failing <= 2 * chosen else min(fitting + step, 2 * chosen)
        step *= 2
    return fitting if fitting >= first else f"{first}, the fewest that were predicted, do not train"


def peak_of(job: Job, size: int, device: torch.device) -> Peak:
    """Train a new model and return the peak of a window that is like all later ones."""
    gc.collect()
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)  # what libraries keep for themselves
    with AllocatorMeter(device) as meter:
        train(job, size, device, meter.mark)
    reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    return Peak(before + meter.peak_bytes[-1], reserved)


def train(job: Job, size: int, device: torch.device, when_warm: Callable[[], None]) -> None:
    """Train a few windows, and call a function before the last."""
    model, optimizer, make_batch, loss = MODELS[job.kind][job.name].setup(device)
    accumkern.attach(optimizer, BUFFER, master_weights=MASTERS, average_over=MICRO_BATCHES)
    for window in range(WARM_WINDOWS + 1):
        if window == WARM_WINDOWS:
            when_warm()
        for _ in range(MICRO_BATCHES):
            loss(model, make_batch(size)).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
