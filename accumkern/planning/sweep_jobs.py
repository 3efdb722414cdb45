"""Runs of a sweep several at a time: processes of ``concurrent.futures``, each with a GPU or a share of the cores.

The pool holds the queue, starts the processes, and notices when one dies. What is trained already is known from the
files of the runs alone.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from accumkern.checks import describe
from accumkern.planning.checkpoint import Checkpoint
from accumkern.planning.protocol import SetupFunction
from accumkern.planning.sweep_runs import Planned, Run, write_json
from accumkern.planning.sweep_training import Runner

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Work:
    """What a worker needs beside the run that it trains.

    Attributes:
        setup: a function in pickle's words.
        settings: of the sweep.
        start: path of a checkpoint, or None.
        limit_bytes: of memory, for each worker.
        folder: for the files of runs.
        jobs: how many workers there are.
        threads: of torch in each.
        devices: what each may see of the GPUs; empty on a CPU.
    """

    setup: bytes
    settings: dict[str, Any]
    start: Path | None
    limit_bytes: int
    folder: Path
    jobs: int
    threads: int
    devices: tuple[str, ...]


def portable(setup: SetupFunction, jobs: int) -> bytes:
    """Return a setup as it can be handed to another process.

    Raises:
        ValueError: it is a function that another process cannot import.
    """
    try:
        return pickle.dumps(setup)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"jobs is {jobs}, and other processes cannot import setup ({describe(error)}); it must be a function at "
            "the top level of a module, or text such as 'train.py:setup'"
        ) from error


def shares(jobs: int, device: torch.device) -> tuple[int, tuple[str, ...]]:
    """Return torch's threads in each of several processes, and the GPU that each may see.

    Raises:
        ValueError: there are fewer GPUs, or on a CPU fewer cores, than ``jobs``.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    is_gpu = device.type == "cuda"
    most, kind = (torch.cuda.device_count(), "GPUs") if is_gpu else (cores, "cores")
    if jobs > most:
        raise ValueError(f"jobs is {jobs}, and this process has {most} {kind}; it must be {most} at most")
    threads = max(1, min(torch.get_num_threads(), cores // jobs))
    if not is_gpu:
        return threads, ()
    visible = [name.strip() for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()]
    return threads, tuple((visible or list(map(str, range(most))))[:jobs])


def run_at_once(planned: Sequence[Planned], work: Work) -> Generator[Run, None, None]:
    """Train runs in ``work.jobs`` processes; yield each when it has ended and its file is written.

    After an error, or when this process ends in whatever way, the other workers end at once, in the middle of a run.

    Raises:
        RuntimeError: the training of a run failed, or a worker was ended from outside.
    """
    if not planned:
        return
    context = get_context("spawn")
    # A pipe that this process alone holds open at one end: when that is closed, by it or by its death, workers see it.
    alive, held = context.Pipe(duplex=False)
    numbers = context.SimpleQueue()
    for number in range(work.jobs):
        numbers.put(number)
    with ProcessPoolExecutor(work.jobs, context, _begin, (alive, numbers, work.threads, work.devices)) as pool:
        try:
            futures = {pool.submit(_train, work, one): one for one in planned}
            for future in as_completed(futures):
                yield _result(future, futures, work.jobs)
        except BaseException:
            held.close()
            raise
    held.close()


def _result(future: Future[Run], futures: dict[Future[Run], Planned], jobs: int) -> Run:
    try:
        return future.result()
    except BrokenProcessPool as error:
        unfinished = [one.words for future, one in futures.items() if not _is_trained(future)]
        raise RuntimeError(
            f"a worker was ended from outside, or did not start, while these runs were trained: "
            f"{'; '.join(unfinished[:jobs])}. Look for what it printed and whether the system ran out of memory; a "
            "script that calls sweep() must do so under if __name__ == '__main__'. Runs that had ended are kept"
        ) from error
    except Exception as error:
        raise RuntimeError(f"the run of {futures[future].words} failed: {error}; jobs=1 shows where") from error


def _is_trained(future: Future[Run]) -> bool:
    return future.done() and future.exception() is None


# ---- in a worker -------------------------------------------------------------------------------------------------

_runner: Callable[[Planned], Run] | None = None


def _begin(alive: Connection, numbers: Any, threads: int, devices: tuple[str, ...]) -> None:
    """Take a share of the machine, and end when the process that started this one does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for that process to deal with
    number = numbers.get()
    if devices:
        os.environ[_VISIBLE] = devices[number]  # before anything uses CUDA
    torch.set_num_threads(threads)

    def watch() -> None:
        alive.poll(None)  # until the other end is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train(work: Work, planned: Planned) -> Run:
    """Train a run, write its file, and return it."""
    global _runner
    try:
        if _runner is None:
            setup = pickle.loads(work.setup)
            start = None if work.start is None else Checkpoint(work.start)
            if start is not None and start.sha256 != work.settings["start_sha256"]:
                raise ValueError(f"{work.start} was changed since the sweep began")
            _runner = Runner(setup, work.settings, start, work.limit_bytes, work.jobs).run
        run = _runner(planned)
    except Exception as error:  # in words: not every error can be handed to another process
        raise RuntimeError(describe(error)) from error
    write_json(work.folder / planned.file_name, run.to_dict())
    return run
