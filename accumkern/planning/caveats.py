"""What a plan warns of: another device than the one meant, a machine that others used, lone ranks, and BatchNorm."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch.distributed as dist

from accumkern.out_of_memory import format_bytes
from accumkern.planning.protocol import Setup
from accumkern.planning.speed import UNEVEN, Speed, plain
from accumkern.torch_private import BatchNorm

_BUSY_LOAD = 1.5  # processes that want to run, per core
_STARVED = 0.7  # of a core


def load() -> tuple[float, int]:
    """Return how many processes wanted to run in the last minute, on average, and how many cores there are."""
    return os.getloadavg()[0], os.cpu_count() or 1


def busy_warnings(setup: Setup, speeds: Sequence[Speed], load_before: tuple[float, int]) -> list[str]:
    """Return a warning where others seem to have used the device while ``speeds`` were measured, with what was seen.

    On a GPU it is only that times of equal micro-batches differ, where the setup does not say that samples do; on the
    CPU also that the process had less than a core, unless it waits for other ranks, or that the load was high before
    anything was measured.
    """
    seen = []
    uneven = max(speeds, key=lambda speed: speed.spread)
    if uneven.spread > UNEVEN and setup.longest_batch is None:
        seen.append(
            f"some micro-batches of {uneven.micro_batch} took {plain(uneven.spread)} times as long as others (unless "
            "samples differ in length: see longest_batch)"
        )
    if setup.device.type == "cpu":
        processes, cores = load_before
        starved = min(speeds, key=lambda speed: speed.cpu_seconds)
        if starved.cpu_seconds < _STARVED and not setup.is_sharded:  # whose ranks wait for each other
            seen.append(
                f"with micro-batches of {starved.micro_batch} this process had {starved.cpu_seconds:.2g} of a core "
                "(unless the loss waits for something, such as a disk)"
            )
        if processes > _BUSY_LOAD * cores:
            seen.append(f"the load before was {processes:.3g} processes on {cores} {'core' if cores == 1 else 'cores'}")
    if not seen:
        return []
    return [
        f"the machine seems to have been busy with other things while speed was measured: {'; '.join(seen)}. Speeds, "
        "and what was chosen by them, may be far off; plan again when it is idle"
    ]


def cpu_warnings(setup: Setup, limit: int) -> list[str]:
    """Return a warning where a limit of memory was given, of a GPU perhaps, and what is measured is the CPU."""
    if setup.device.type != "cpu":
        return []
    return [
        f"setup() puts the model on the CPU, so this is a plan for this machine's CPU with {format_bytes(limit)}, its "
        "speed and all; for a GPU that is not here, predict (--predict, measure=False)"
    ]


def rank_warnings() -> list[str]:
    """Return a warning where torchrun has started several processes that no process group joins."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2 or not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        return []
    return [
        f"torchrun has started {count} processes, and they are in no process group: each makes a plan of its own, "
        "while the others use the machine; let the script call torch.distributed.init_process_group() at its import"
    ]


def batch_norm_warnings(setup: Setup, micro_batch: int) -> list[str]:
    """Return a warning where the model has BatchNorm in training mode: its statistics are those of a micro-batch."""
    names = [name for name, module in setup.model.named_modules() if isinstance(module, BatchNorm) and module.training]
    if not names:
        return []
    return [
        f"the model has BatchNorm ({names[0] or 'the model itself'}{' and others' if len(names) > 1 else ''}): its "
        f"statistics are those of a micro-batch of {micro_batch}, not of the effective batch, however many are "
        "accumulated; keep the micro-batch that it was tuned for, or use GroupNorm or LayerNorm, or SyncBatchNorm over "
        "ranks"
    ]
