"""Fair timing of variants of one operation, against each other in one run.

* Variants take turns, forwards and backwards through the list, so that a change of clock or load meets all of them.
* A variant works on several sets of buffers in turn, more bytes together than four times the last cache, so that none
  of its data is read from cache.
* CPU: one measurement is a batch of calls between two readings of ``perf_counter``.
* GPU: one measurement is a batch of calls between two CUDA events on one stream. Calls that take less than 100 us are
  captured in a CUDA graph once and replayed, so that the launches of Python are not in the number; the gap between two
  kernels of a graph, about 1 us, is. A spin kernel keeps the GPU busy until the graph is queued. What many kernels
  and much Python make longer than that, like the eager backend on small tensors, is timed as it runs, Python included.
* Compilation, allocation and warm-up happen before the first measurement. Each number is a median over rounds, with
  20th and 80th percentile.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

GRAPH_BELOW_MS = 0.1  # calls shorter than this are captured
GRAPH_BYTES = 4 * 2**30  # moved by one replay, about: a millisecond or more
MAX_GRAPH_CALLS = 1024  # unless the sets of buffers are more
SPIN_CYCLES = 2_000_000  # about 1 ms
BATCH_MS = {"cuda": 2.0, "cpu": 50.0}  # a batch that is not captured has as many calls as last this long
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Variant:
    """One way of doing the operation.

    Attributes:
        run: does it once, on the set of buffers of this number.
        sets: how many sets of buffers there are.
        bytes_moved: what one call reads and writes.
    """

    run: Callable[[int], object]
    sets: int
    bytes_moved: int


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile of ``n`` measurements."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    n: int
    how: str  # "graph" or "batch"
    calls: int  # in one measurement


def percentile(values: list[float], fraction: float) -> float:
    """Return the value that ``fraction`` of the values do not exceed, between neighbours by interpolation."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last cache before memory; 64 MiB where the machine does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if size.exists() and (text := size.read_text().strip()).endswith("K"):
        return int(text[:-1]) * 1024
    return 64 * 2**20


def sets_of(set_bytes: int, device: torch.device) -> int:
    """Return how many sets of buffers of ``set_bytes`` are four times the last cache."""
    return max(1, math.ceil(4 * cache_bytes(device) / set_bytes))


def describe(error: Exception) -> str:
    """Return an error as a result: ``OOM``, or its kind and first line."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
        return "OOM"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def time_variants(
    makers: dict[str, Callable[[], Variant]], device: torch.device, rounds: int, seconds_each: float
) -> dict[str, Timing | str]:
    """Time variants against each other.

    Args:
        makers: name -> function that allocates a variant's buffers and returns it.
        device: where they run.
        rounds: measurements of each variant.
        seconds_each: a variant that has used up this time on the CPU is left out of further rounds, after at least
            ``MIN_ROUNDS``.

    Returns:
        Name -> timing, or a description of the error that ended it; the other variants go on.
    """
    if device.type == "cuda":
        return _time_on_gpu(makers, rounds)
    return _time_on_cpu(makers, rounds, seconds_each)


def _rounds(names: list[str], rounds: int) -> Iterator[tuple[int, list[str]]]:
    """Yield each round's order, forwards and backwards by turns."""
    for number in range(rounds):
        yield number, names if number % 2 == 0 else names[::-1]


def _time_on_cpu(makers: dict[str, Callable[[], Variant]], rounds: int, seconds_each: float) -> dict[str, Timing | str]:
    outcome: dict[str, Timing | str] = {}
    batches: dict[str, tuple[Callable[[], None], int]] = {}
    for name, make in makers.items():
        try:
            variant = make()
            batches[name] = _batch(variant, "cpu", _warm_up_ms(variant))
        except Exception as error:  # any variant's any failure is a result
            outcome[name] = describe(error)
    seconds: dict[str, list[float]] = {name: [] for name in batches}
    for number, order in _rounds(list(batches), rounds):
        for name in order:
            if number >= MIN_ROUNDS and sum(seconds[name]) > seconds_each:
                continue
            begin = time.perf_counter()
            batches[name][0]()
            seconds[name].append(time.perf_counter() - begin)
    for name, measured in seconds.items():
        calls = batches[name][1]
        outcome[name] = _timing([1e3 * s / calls for s in measured], "batch", calls)
    return outcome


def _time_on_gpu(makers: dict[str, Callable[[], Variant]], rounds: int) -> dict[str, Timing | str]:
    outcome: dict[str, Timing | str] = {}
    queues: dict[str, tuple[Callable[[], None], str, int]] = {}
    for name, make in makers.items():
        try:
            variant = make()
            call_ms = _warm_up_ms(variant, torch.cuda.synchronize)
            if call_ms < GRAPH_BELOW_MS:
                replay, calls = _graph(variant)
                queues[name] = replay, "graph", calls
            else:
                queue, calls = _batch(variant, "cuda", call_ms)
                queues[name] = queue, "batch", calls
        except Exception as error:  # any variant's any failure is a result
            outcome[name] = describe(error)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in queues}
    for number, order in _rounds(list(queues), rounds + 1):
        for name in order:
            queue, how, _ = queues[name]
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if how == "graph":
                torch.cuda._sleep(SPIN_CYCLES)
            begin.record()
            queue()
            end.record()
            if number > 0:  # the first round uploads the graphs
                events[name].append((begin, end))
        torch.cuda.synchronize()
    for name, pairs in events.items():
        _, how, calls = queues[name]
        outcome[name] = _timing([begin.elapsed_time(end) / calls for begin, end in pairs], how, calls)
    return outcome


def _warm_up_ms(variant: Variant, synchronize: Callable[[], None] = lambda: None) -> float:
    """Run a variant a few times; return about how many milliseconds a call takes, as the fastest tell."""
    calls = min(variant.sets, 5)
    seconds = []
    for _ in range(3):  # the first time compiles and allocates
        begin = time.perf_counter()
        for i in range(calls):
            variant.run(i)
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return 1e3 * min(seconds) / calls


def _batch(variant: Variant, device_type: str, call_ms: float) -> tuple[Callable[[], None], int]:
    """Return (a function that makes one measurement's calls, on the sets in turn; how many)."""
    calls = math.ceil(BATCH_MS[device_type] / call_ms)
    numbers = itertools.cycle(range(variant.sets))

    def run_calls() -> None:
        for i in itertools.islice(numbers, calls):
            variant.run(i)

    return run_calls, calls


def _graph(variant: Variant) -> tuple[Callable[[], None], int]:
    """Return (a function that replays one measurement's calls, on the sets in turn; how many)."""
    calls = max(variant.sets, min(math.ceil(GRAPH_BYTES / variant.bytes_moved), MAX_GRAPH_CALLS))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            variant.run(i % variant.sets)
    return graph.replay, calls


def _timing(values_ms: list[float], how: str, calls: int) -> Timing:
    return Timing(
        statistics.median(values_ms), percentile(values_ms, 0.2), percentile(values_ms, 0.8), len(values_ms), how, calls
    )
