"""Processes that run functions of tests as the ranks of a process group: started once, used by many tests.

A test defines a function at the top of its module and calls ``run(function, *args)``. Every rank calls it inside a
process group that lives as long as the call, and what they return comes back in the order of the ranks.
"""

import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.tensor import DTensor

DIED = "the process died"
_TIMEOUT = timedelta(minutes=2)  # of a collective: the first waits until every rank has imported the test


class Ranks:
    """Processes, as many as some test has asked for; they live until :meth:`stop`."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        # Of the stores of process groups. It lies there as long as the processes: they end a group after its outcome
        # has come, NCCL makes a connection as late as that, and a store that goes then ends the process.
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._calls = 0

    def run(self, function: Callable[..., Any], *args: Any, ranks: int = 2, at_least: int = 1) -> list[Any]:
        """Return what ``function(*args)`` returns on each rank; fail with the tracebacks of those where it raised.

        With NCCL every rank has a GPU of its own: where there are fewer, there are fewer ranks, but at least so many.
        """
        if self.backend == "nccl":
            ranks = min(ranks, torch.cuda.device_count())
        if ranks < at_least:
            pytest.skip(f"needs {at_least} GPUs; torch finds {ranks}")
        outcomes = self.outcomes(function, *args, ranks=ranks)
        if (False, DIED) in outcomes:
            # Seen twice in some ten thousand calls with torch 2.13: gloo's thread had a segmentation fault in malloc.
            # Nobody knows why; a fault that comes again is a failure.
            warnings.warn(
                f"a rank died in {getattr(function, '__name__', function)}, which was begun again", stacklevel=2
            )
            outcomes = self.outcomes(function, *args, ranks=ranks)
        failures = [f"rank {rank}: {outcome}" for rank, (ok, outcome) in enumerate(outcomes) if not ok]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        return [outcome for _, outcome in outcomes]

    def outcomes(self, function: Callable[..., Any], *args: Any, ranks: int) -> list[tuple[bool, Any]]:
        """Return (True, result) or (False, what went wrong) of each rank."""
        if not all(process.is_alive() for process in self._processes):
            warnings.warn("a rank died after its last call", stacklevel=3)
            self.stop()
        context = torch.multiprocessing.get_context("spawn")
        while len(self._processes) < ranks:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._folder = self._folder or tempfile.TemporaryDirectory()
        self._calls += 1
        connections = self._connections[:ranks]
        outcomes: dict[Any, tuple[bool, Any]] = {}
        for rank, connection in enumerate(connections):
            store = f"file://{self._folder.name}/{self._calls}"
            group = {"backend": self.backend, "init_method": store, "rank": rank, "world_size": ranks}
            connection.send_bytes(pickle.dumps((function, args, group)))
        while len(outcomes) < ranks:
            for connection in wait([c for c in connections if c not in outcomes]):
                try:
                    outcomes[connection] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    outcomes[connection] = False, DIED
        if not all(ok for ok, _ in outcomes.values()):
            self.stop()  # who knows in which state they are
        return [outcomes[connection] for connection in connections]

    def stop(self) -> None:
        """End the processes; the next call starts others."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes.clear()
        self._connections.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def device() -> torch.device:
    """Return where the tensors of this rank are."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def full(tensor: Tensor | None) -> Tensor:
    """Return the whole of a tensor that may be spread over the ranks; of shards on the CPU, where NCCL is not, too."""
    assert tensor is not None
    return tensor.to(device()).full_tensor() if isinstance(tensor, DTensor) else tensor


def _serve(connection: Connection) -> None:
    """Run what comes until the other side is gone."""
    torch.set_num_threads(1)
    while True:
        try:
            function, args, group = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        if group["backend"] == "nccl":
            torch.cuda.set_device(group["rank"])
        torch.manual_seed(0)
        dist.init_process_group(**group, timeout=_TIMEOUT)
        try:
            outcome = True, function(*args)
        except BaseException:
            outcome = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(outcome))
        if not outcome[0]:
            os._exit(1)  # the group may hang in its end
        dist.barrier()
        dist.destroy_process_group()
