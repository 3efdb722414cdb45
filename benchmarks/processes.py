"""The same function on several ranks, each a process of this machine."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

OUTCOME = "outcome"  # the file of what rank 0 has returned: a pipe holds 64 KB until somebody reads


def outcome_of_ranks(function: Callable[..., Any], world_size: int, device_type: str, *args: Any) -> Any:
    """Call ``function(device, *args)`` on every rank, and return what rank 0 returns.

    The processes have begun anew, and are in one process group: gloo on a CPU, NCCL with a GPU for each.

    Args:
        function: of the top level of a module.
        world_size: how many processes.
        device_type: ``"cpu"`` or ``"cuda"``.
        args: what can be pickled.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of a rank that raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run_rank, (function, world_size, device_type, folder, args), nprocs=world_size)
        return pickle.loads(Path(folder, OUTCOME).read_bytes())


def _run_rank(
    rank: int,
    function: Callable[..., Any],
    world_size: int,
    device_type: str,
    folder: str,
    args: tuple[Any, ...],
) -> None:
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=world_size)
    outcome = function(device, *args)
    if rank == 0:
        Path(folder, OUTCOME).write_bytes(pickle.dumps(outcome))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without Python's end: gloo's threads outlive the group where a model under fully_shard has been, and abort the
    # process if they let go of a tensor while Python ends (https://github.com/pytorch/pytorch/issues/190489).
    os._exit(0)
