"""Functions that a benchmark runs on several ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from processes import outcome_of_ranks


def added(device: torch.device, start: int) -> int:
    total = torch.tensor(start + dist.get_rank(), device=device)
    dist.all_reduce(total)
    return 10 * int(total) + dist.get_rank()


def raised_by_the_last(device: torch.device) -> None:
    if dist.get_rank() == 1:
        raise ValueError("of rank 1")
    dist.all_reduce(torch.zeros(1, device=device))


def large(_: torch.device) -> bytes:
    return bytes(2**20)  # more than a pipe holds


def test_rank_0_brings_its_result() -> None:
    assert outcome_of_ranks(added, 2, "cpu", 5) == 110
    assert len(outcome_of_ranks(large, 1, "cpu")) == 2**20


def test_a_rank_that_raises_is_told() -> None:
    with pytest.raises(ProcessRaisedException, match=r"Process 1 [\s\S]*ValueError: of rank 1"):
        outcome_of_ranks(raised_by_the_last, 2, "cpu")
