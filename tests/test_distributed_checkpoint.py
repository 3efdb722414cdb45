"""Runs on several processes that are killed in the middle of a window, and go on from a checkpoint bit for bit."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import accumkern

pytestmark = pytest.mark.integration("torch.distributed.checkpoint in a window")

WINDOW = 6  # micro-batches
KILLED_AT = 2 * WINDOW + 4  # in the third window


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 23), nn.Tanh(), nn.Linear(23, 3)).to(device(), torch.bfloat16)


def micro_batch(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * dist.get_rank() + n)
    return torch.randn(6, 12, generator=generator).to(device(), torch.bfloat16)


class Run:
    """A training run that can be saved after any micro-batch."""

    def __init__(self, kind: str, buffer: str) -> None:
        self.model: nn.Module = net()
        if kind == "fully_shard":
            fully_shard(self.model[0])
            fully_shard(self.model)
        else:
            self.model = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.acc = accumkern.attach(self.optimizer, buffer)

    def train(self, first: int, last: int) -> None:
        for n in range(first, last):
            ends = n % WINDOW == WINDOW - 1
            with nullcontext() if ends or isinstance(self.model, FSDPModule) else self.model.no_sync():
                (self.model(micro_batch(n)) ** 2).float().sum().backward()
            if ends:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def result(self) -> list[Tensor]:
        return [full(p.detach()) for p in self.model.parameters()]


def save(run: Run, folder: Path) -> None:
    if isinstance(run.model, FSDPModule):
        model, optimizer = get_state_dict(run.model, run.optimizer)
        state = {"model": model, "optimizer": optimizer, "accumulator": run.acc.state_dict()}
        checkpoint.save(state, checkpoint_id=folder)
    else:  # each rank has a sum of its own until the reduction
        parts = (run.model, run.optimizer, run.acc)
        torch.save([part.state_dict() for part in parts], folder / f"{dist.get_rank()}.pt")


def load(run: Run, folder: Path) -> None:
    if isinstance(run.model, FSDPModule):
        model, optimizer = get_state_dict(run.model, run.optimizer)
        state = {"model": model, "optimizer": optimizer, "accumulator": run.acc.empty_state_dict()}
        checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(run.model, run.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        run.acc.load_state_dict(state["accumulator"])
    else:
        states = torch.load(folder / f"{dist.get_rank()}.pt", weights_only=True)
        for part, state in zip((run.model, run.optimizer, run.acc), states, strict=True):
            part.load_state_dict(state)


def uninterrupted(kind: str, buffer: str) -> list[Tensor]:
    run = Run(kind, buffer)
    run.train(0, 3 * WINDOW)
    return run.result()


def until_it_is_killed(kind: str, buffer: str, folder: Path) -> None:
    run = Run(kind, buffer)
    run.train(0, KILLED_AT)
    save(run, folder)
    run.train(KILLED_AT, KILLED_AT + 1)
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def resumed(kind: str, buffer: str, folder: Path) -> list[Tensor]:
    run = Run(kind, buffer)
    load(run, folder)
    run.train(KILLED_AT, 3 * WINDOW)
    return run.result()


@pytest.mark.parametrize(("kind", "buffer"), [("fully_shard", "split24"), ("DDP", "split32")])
def test_a_killed_run_ends_as_if_it_had_not_been(ranks: Ranks, tmp_path: Path, kind: str, buffer: str) -> None:
    expected = ranks.run(uninterrupted, kind, buffer)
    outcomes = ranks.outcomes(until_it_is_killed, kind, buffer, tmp_path, ranks=len(expected))
    assert outcomes == [(False, "the process died")] * len(expected)
    for a, b in zip(ranks.run(resumed, kind, buffer, tmp_path), expected, strict=True):
        assert all(map(torch.equal, a, b))


def saved(buffer: str, folder: Path, without: int | None) -> list[Tensor | None]:
    run = Run("fully_shard", buffer)
    run.train(0, WINDOW + 3)
    params = list(run.model.parameters())
    if without is not None:
        params[without].grad = None
    save(run, folder)
    return gradients(run)


def loaded(buffer: str, folder: Path) -> list[Tensor | None]:
    run = Run("fully_shard", buffer)
    load(run, folder)
    return gradients(run)


def gradients(run: Run) -> list[Tensor | None]:
    found: list[Any] = [run.acc.gradient(p) for p in run.model.parameters()]
    return [None if gradient is None else full(gradient) for gradient in found]


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
def test_other_numbers_of_ranks_take_the_sums_over(ranks: Ranks, tmp_path: Path, buffer: str) -> None:
    expected = ranks.run(saved, buffer, tmp_path, None, ranks=2)[0]
    for count in (1, 3):
        for found in ranks.run(loaded, buffer, tmp_path, ranks=count):
            assert all(map(torch.equal, found, expected))


def saved_at_any_moment(folder: Path) -> list[list[Tensor | None]]:
    """Where all sums are None, where all residuals are, and where only some are."""
    found = []
    for micro_batches, finishes in ((0, False), (1, False), (2, False), (2, True)):
        run, other = Run("fully_shard", "split24"), Run("fully_shard", "split24")
        run.train(0, micro_batches)
        if finishes:
            run.acc.finish()
        at = folder / f"{micro_batches}-{finishes}"
        checkpoint.save({"accumulator": run.acc.state_dict()}, checkpoint_id=at)
        state = {"accumulator": other.acc.empty_state_dict()}
        checkpoint.load(state, checkpoint_id=at)
        other.acc.load_state_dict(state["accumulator"])
        found += [gradients(run), gradients(other)]
    return found


def test_a_checkpoint_may_be_made_at_any_moment(ranks: Ranks, tmp_path: Path) -> None:
    for found in ranks.run(saved_at_any_moment, tmp_path):
        assert len(found) == 8
        for wanted, loaded_ in zip(found[::2], found[1::2], strict=True):
            for a, b in zip(wanted, loaded_, strict=True):
                assert a is b is None if a is None or b is None else torch.equal(a, b)


def test_a_gradient_that_was_none_is_none(ranks: Ranks, tmp_path: Path) -> None:
    expected = ranks.run(saved, "split24", tmp_path, 1)[0]
    for found in ranks.run(loaded, "split24", tmp_path):
        assert found[1] is None is expected[1]
        assert torch.equal(found[0], expected[0])


def mismatches() -> None:
    sharded, plain = Run("fully_shard", "split24"), Run("DDP", "split24")
    for run in (sharded, plain):
        run.train(0, 2)
    with pytest.raises(TypeError, match=r"sums\[0\] of state_dict is a plain tensor; parameter 0 is a DTensor"):
        sharded.acc.load_state_dict(plain.acc.state_dict())
    with pytest.raises(TypeError, match=r"sums\[0\] of state_dict is a DTensor; parameter 0 is a plain tensor"):
        plain.acc.load_state_dict(sharded.acc.state_dict())
    state = sharded.acc.state_dict()
    state["sums"]["0"] = state["sums"]["0"].redistribute(placements=[dist.tensor.Replicate()])
    with pytest.raises(ValueError, match=r"sums\[0\] of state_dict is laid out as \(Replicate\(\),\)"):
        sharded.acc.load_state_dict(state)


def test_a_state_of_another_layout_is_an_error(ranks: Ranks) -> None:
    ranks.run(mismatches)
