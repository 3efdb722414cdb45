"""Fair timing of variants of one operation, against each other in one run.

* Variants take turns, forwards and backwards through the list, so that a change of clock or load meets all of them.
* A variant works on several sets of buffers in turn, more bytes together than four times the last cache, so that none
  of its data is read from cache.
* CPU: one measurement is a batch of calls between two readings of ``perf_counter``.
* GPU: one measurement is a batch of calls between two CUDA events on one stream, behind a spin kernel that keeps the
  GPU busy, and its clock up, until the whole batch is queued: that Python launches slowly is not in the number. That it
  was so is looked up each time: the first event must not have happened when the last call is queued. Where the GPU was
  faster, the spin becomes longer, and the measurement does not count. What launches more than a GPU's queue takes never
  comes to that, like the eager backend on a list of tensors; it is said to be timed by the "host". Calls that take less
  than 100 us are captured in a CUDA graph once and replayed; the gap between two kernels of a graph, about 1 us, is in
  the number. What Python takes for one call is measured apart (``host_ms``), when the GPU has nothing to do.
* Compilation, allocation and warm-up happen before the first measurement. Each number is a median over rounds, with
  20th and 80th percentile.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

GRAPH_BELOW_MS = 0.1  # calls shorter than this are captured
GRAPH_BYTES = 4 * 2**30  # moved by one replay, about: a millisecond or more
MAX_GRAPH_CALLS = 1024  # unless the sets of buffers are more
CYCLES_OF_A_MS = 2_000_000  # or more: no clock is faster
MIN_SPIN_MS, MAX_SPIN_MS = 1.0, 50.0
HOST_CALLS = 15
BATCH_MS = {"cuda": 2.0, "cpu": 50.0}  # a batch that is not captured has as many calls as last this long
MIN_ROUNDS = 3
WARM_UP_SECONDS = 0.5  # a variant that takes longer is warm after two times, others after three
# Small sets of buffers are not more than this: 64 MiB of the smallest that is measured, 2^10 elements. Where that is
# less than four times the last cache, they are read from it.
MAX_SETS = 2**14
FREE_BYTES = 2**31  # of the CPU's memory, which are left to everybody else

Key = TypeVar("Key")


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
    """Milliseconds of one call: median, 20th and 80th percentile of ``n`` measurements.

    Attributes:
        how: ``graph`` or ``batch``; ``host`` is a batch that a GPU worked off faster than it was queued.
        calls: in one measurement.
        host_ms: of one call on a GPU that has nothing to do, until Python goes on; None on a CPU.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    n: int
    how: str
    calls: int
    host_ms: float | None = None


@dataclass
class Queue:
    """What queues the calls of one measurement on a GPU.

    Attributes:
        run: queues them.
        how, calls, host_ms: see :class:`Timing`.
        spin_ms: how long the GPU is kept busy meanwhile.
        measured: milliseconds of a measurement, and whether the GPU has waited for Python in it.
    """

    run: Callable[[], None]
    how: str
    calls: int
    host_ms: float
    spin_ms: float = MIN_SPIN_MS
    measured: list[tuple[float, bool]] = field(default_factory=list)


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
    """Return how many sets of buffers of ``set_bytes`` are four times the last cache, at most ``MAX_SETS``."""
    return min(MAX_SETS, math.ceil(4 * cache_bytes(device) / set_bytes))


def allocate(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of random numbers, or integers, a few million of them again and again.

    Raises:
        MemoryError: on a CPU, where the memory that is available would not do; Linux itself would end some process when
            the tensor is written.
        torch.OutOfMemoryError: on a GPU.
    """
    if device.type == "cpu" and numel * dtype.itemsize > _available_bytes() - FREE_BYTES:
        raise MemoryError(f"{numel * dtype.itemsize:,} bytes")
    flat = torch.empty(numel, dtype=dtype, device=device)
    some = torch.randn(min(numel, 2**22), device=device)
    some = some.to(dtype) if dtype.is_floating_point else some.mul(30).to(dtype)
    for piece in flat.split(max(1, some.numel())):
        piece.copy_(some[: piece.numel()])
    return flat


def _available_bytes() -> float:
    """Return the memory that a program can have without swapping; infinite where the machine does not say."""
    information = Path("/proc/meminfo")
    if information.exists():
        found = re.search(r"^MemAvailable:\s*(\d+) kB", information.read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    return math.inf


def describe(error: Exception) -> str:
    """Return an error as a result: ``OOM``, or its kind and first line."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
        return "OOM"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def time_variants(
    makers: Mapping[Key, Callable[[], Variant]],
    device: torch.device,
    rounds: int,
    seconds_each: float,
    on_step: Callable[[int, int], None],
) -> dict[Key, Timing | str]:
    """Time variants against each other.

    Args:
        makers: name -> function that allocates a variant's buffers and returns it.
        device: where they run.
        rounds: measurements of each variant.
        seconds_each: a variant that has used up this time on the CPU is left out of further rounds, after at least
            ``MIN_ROUNDS``.
        on_step: is told of progress, between measurements: steps done, and all steps.

    Returns:
        Name -> timing, or a description of the error that ended it; the other variants go on.
    """
    time_them = _time_on_gpu if device.type == "cuda" else _time_on_cpu
    measured, errors = time_them(makers, rounds, seconds_each, on_step)
    outcome: dict[Key, Timing | str] = {}
    for name in makers:
        outcome[name] = errors[name] if name in errors else measured[name]
    return outcome


def _rounds(names: Iterable[Key], rounds: int) -> Iterator[tuple[int, list[Key]]]:
    """Yield each round's number and order, forwards and backwards by turns."""
    forwards = list(names)
    for number in range(rounds):
        yield number, forwards if number % 2 == 0 else forwards[::-1]


def _time_on_cpu(
    makers: Mapping[Key, Callable[[], Variant]], rounds: int, seconds_each: float, on_step: Callable[[int, int], None]
) -> tuple[dict[Key, Timing], dict[Key, str]]:
    """Return (timing of each variant that ran, what ended each of the others)."""
    errors: dict[Key, str] = {}
    batches: dict[Key, tuple[Callable[[], None], int]] = {}
    total = len(makers) + rounds
    for done, (name, make) in enumerate(makers.items()):
        on_step(done, total)
        try:
            variant = make()
            batches[name] = _batch(variant, "cpu", _warm_up_ms(variant))
        except Exception as error:  # any variant's any failure is a result
            errors[name] = describe(error)
    seconds: dict[Key, list[float]] = {name: [] for name in batches}
    for number, order in _rounds(batches, rounds):
        on_step(len(makers) + number, total)
        for name in order:
            if name in errors or (number >= MIN_ROUNDS and sum(seconds[name]) > seconds_each):
                continue
            begin = time.perf_counter()
            try:
                batches[name][0]()
            except Exception as error:  # likewise
                errors[name] = describe(error)
            seconds[name].append(time.perf_counter() - begin)
    calls = {name: calls for name, (_, calls) in batches.items()}
    timings = {name: _timing([1e3 * s / calls[name] for s in seconds[name]], "batch", calls[name]) for name in batches}
    return timings, errors


def _time_on_gpu(
    makers: Mapping[Key, Callable[[], Variant]], rounds: int, _: float, on_step: Callable[[int, int], None]
) -> tuple[dict[Key, Timing], dict[Key, str]]:
    """Return (timing of each variant that ran, what ended each of the others)."""
    errors: dict[Key, str] = {}
    queues: dict[Key, Queue] = {}
    total = len(makers) + rounds + 1
    for done, (name, make) in enumerate(makers.items()):
        on_step(done, total)
        try:
            queues[name] = _queue(make())
        except Exception as error:  # any variant's any failure is a result
            errors[name] = describe(error)
    for number, order in _rounds(queues, rounds + 1):
        on_step(len(makers) + number, total)
        for name in order:
            if name in errors:
                continue
            try:
                measured = _measure_on_gpu(queues[name])
            except Exception as error:  # likewise; a kernel that fails takes everything on the GPU with it
                errors[name] = describe(error)
                continue
            if number > 0:  # the first round uploads the graphs, and finds out how long queueing takes
                queues[name].measured.append(measured)
    return {name: _timing_of(queue) for name, queue in queues.items() if name not in errors}, errors


def _queue(variant: Variant) -> Queue:
    """Return what queues the calls of a variant, which is warm then."""
    call_ms = _warm_up_ms(variant, torch.cuda.synchronize)
    host_ms = _host_ms(variant)
    if call_ms < GRAPH_BELOW_MS:
        replay, calls = _graph(variant)
        return Queue(replay, "graph", calls, host_ms)
    run, calls = _batch(variant, "cuda", call_ms)
    return Queue(run, "batch", calls, host_ms)


def _measure_on_gpu(queue: Queue) -> tuple[float, bool]:
    """Return the milliseconds of all calls, and whether the GPU has waited for Python; the next spin fits the queueing.

    Raises:
        Exception: whatever the calls raise, at once or on the GPU.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(queue.spin_ms * CYCLES_OF_A_MS))
    begin.record()
    seconds = time.perf_counter()
    queue.run()
    queueing_ms = 1e3 * (time.perf_counter() - seconds)
    waited = begin.query()
    end.record()
    torch.cuda.synchronize()
    queue.spin_ms = min(MAX_SPIN_MS, max(queue.spin_ms, 2 * queueing_ms))
    return begin.elapsed_time(end), waited


def _timing_of(queue: Queue) -> Timing:
    """Return the timing of measurements in which the GPU has not waited, or of all, by the host, if they are few."""
    alone = [ms for ms, waited in queue.measured if not waited]
    if len(alone) >= min(MIN_ROUNDS, len(queue.measured)):
        return _timing([ms / queue.calls for ms in alone], queue.how, queue.calls, queue.host_ms)
    return _timing([ms / queue.calls for ms, _ in queue.measured], "host", queue.calls, queue.host_ms)


def _host_ms(variant: Variant) -> float:
    """Return the milliseconds until Python goes on after a call, the median of some, each on a GPU that is idle."""
    seconds = []
    for i in range(HOST_CALLS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        variant.run(i % variant.sets)
        seconds.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return 1e3 * statistics.median(seconds)


def _warm_up_ms(variant: Variant, synchronize: Callable[[], None] = lambda: None) -> float:
    """Run a variant a few times; return about how many milliseconds a call takes, as the fastest tell."""
    calls = min(variant.sets, 5)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 3 and seconds[1] < WARM_UP_SECONDS):  # the first compiles and allocates
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


def _timing(values_ms: list[float], how: str, calls: int, host_ms: float | None = None) -> Timing:
    low, high = (percentile(values_ms, fraction) for fraction in (0.2, 0.8))
    return Timing(statistics.median(values_ms), low, high, len(values_ms), how, calls, host_ms)
