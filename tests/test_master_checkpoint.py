"""Master weights in torch.distributed.checkpoint: resumed runs have the bits of those that were not interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fp32_twin import BF16, bits
from ranks import Ranks, device, full
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

import accumkern

pytestmark = pytest.mark.integration("Master weights: torch.distributed.checkpoint")

WINDOW, STEPS = 3, 6
KINDS = ["fully_shard", "DDP"]


class Run:
    """A training run that can be saved after any micro-batch."""

    def __init__(self, kind: str, master_weights: str = "split32") -> None:
        torch.manual_seed(1)
        net: Any = nn.Sequential(nn.Linear(12, 23), nn.Tanh(), nn.Linear(23, 1)).to(device())
        accumkern.to_bfloat16(net)
        if kind == "fully_shard":
            for layer in net:
                fully_shard(layer)
            self.model: Any = fully_shard(net)
        else:
            self.model = DistributedDataParallel(net)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.acc = accumkern.attach(self.optimizer, "split32", master_weights=master_weights, bucket=500)

    def train(self, first: int, last: int) -> None:
        """Train with micro-batches that are the same on any number of ranks."""
        for n in range(first, last):
            x = torch.randn(6, 12, generator=torch.Generator().manual_seed(n)).to(device(), BF16)
            (self.model(x) ** 2).float().sum().backward()
            if n % WINDOW == WINDOW - 1:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def result(self) -> list[Tensor]:
        """Return masters, weights, states and sums of gradients."""
        found: list[Any] = []
        for param in self.model.parameters():
            found += [self.acc.master_weight(param), param, *self.optimizer.state.get(param, {}).values()]
            gradient = self.acc.gradient(param)
            found += [] if gradient is None else [gradient]
        return [full(tensor.detach()).clone() for tensor in found]

    def save(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "acc": self.acc.state_dict()}
        checkpoint.save(state, checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "acc": self.acc.empty_state_dict()}
        checkpoint.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.acc.load_state_dict(state["acc"])


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(
        a.dtype is b.dtype and torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True)
    )


def saved(kind: str, folder: Path, at: int, master_weights: str) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a run is when it is saved, and what it ends with."""
    run = Run(kind, master_weights)
    run.train(0, at)
    run.save(folder)
    now = run.result()
    run.train(at, STEPS * WINDOW)
    return now, run.result()


def resumed(kind: str, folder: Path, at: int, master_weights: str) -> tuple[list[Tensor], list[Tensor]]:
    run = Run(kind, master_weights)
    run.load(folder)
    now = run.result()
    run.train(at, STEPS * WINDOW)
    return now, run.result()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("master_weights", ["split32", "split24"])
@pytest.mark.parametrize("at", [0, WINDOW + 2, 3 * WINDOW, 3 * WINDOW + 1], ids="after {}".format)
def test_resumed_bit_for_bit(ranks: Ranks, tmp_path: Path, kind: str, master_weights: str, at: int) -> None:
    if kind == "DDP" and at % WINDOW:
        pytest.skip("each rank has a sum of its own: docs/distributed.md")
    outcomes = [ranks.run(f, kind, tmp_path, at, master_weights) for f in (saved, resumed)]
    for (now, end), (now_too, end_too) in zip(*outcomes, strict=True):
        assert same(now_too, now)
        assert same(end_too, end)


@pytest.mark.parametrize("at", [3 * WINDOW, 3 * WINDOW + 1], ids="after {}".format)
def test_other_numbers_of_ranks_take_the_masters_over(ranks: Ranks, tmp_path: Path, at: int) -> None:
    now = ranks.run(saved, "fully_shard", tmp_path, at, "split32", ranks=2)[0][0]
    for count in (1, 3):
        for found, _ in ranks.run(resumed, "fully_shard", tmp_path, at, "split32", ranks=count):
            assert same(found, now)


# ---- states that differ from rank to rank -------------------------------------------------------------------------


def changed_on_one_rank(folder: Path) -> tuple[bool, list[Tensor], list[Tensor]]:
    """Save after the last rank alone has changed its shard of a weight, and so let go of what that lacked."""
    run = Run("fully_shard")
    run.train(0, WINDOW)
    weight = next(run.model.parameters())
    is_last = dist.get_rank() == dist.get_world_size() - 1
    if is_last:
        with torch.no_grad():
            weight.to_local().mul_(2)
    has_none = run.acc._rooms.masters.residual(weight) is None
    run.save(folder)
    other = Run("fully_shard")
    other.load(folder)
    return has_none is is_last, run.result(), other.result()


def test_a_weight_that_one_rank_has_changed(ranks: Ranks, tmp_path: Path) -> None:
    for as_meant, now, found in ranks.run(changed_on_one_rank, tmp_path):
        assert as_meant
        assert same(found, now)


def wrong_order(kind: str, folder: Path) -> None:
    run = Run(kind)
    run.train(0, WINDOW)
    run.save(folder)
    other = Run(kind)
    before = other.result()
    state = {"acc": other.acc.empty_state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    with pytest.raises(ValueError, match=r"residuals\[0\] .* load the state of the model before this one"):
        other.acc.load_state_dict(state["acc"])
    assert same(other.result(), before)
    other.load(folder)
    assert same(other.result(), run.result())


@pytest.mark.parametrize("kind", KINDS)
def test_masters_before_the_model_are_an_error_on_all_ranks(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    ranks.run(wrong_order, kind, tmp_path)


def wrong_on_one_rank() -> list[bool]:
    """Return which states are an error where one of the last rank does not fit."""
    run = Run("fully_shard")
    run.train(0, WINDOW)
    is_last = dist.get_rank() == dist.get_world_size() - 1
    refused = []
    for change in ("sums", "dtype", "missing", "weight"):
        state = run.acc.state_dict()
        masters = {
            key: dict(value) if isinstance(value, dict) else value for key, value in state["master_weights"].items()
        }
        if is_last and change == "sums":
            del state["sums"]
        elif is_last and change == "dtype":
            masters["residuals"]["1"] = masters["residuals"]["1"].to(torch.int8)
        elif is_last and change == "missing":
            masters["residuals"]["1"] = None
        elif is_last:
            with torch.no_grad():
                run.model[0].weight.to_local()[0] += 1
        try:
            run.acc.load_state_dict({**state, "master_weights": masters})
        except (TypeError, ValueError):
            refused.append(True)
        else:
            refused.append(False)
    return refused


def test_a_wrong_state_on_one_rank_lets_no_other_wait(ranks: Ranks) -> None:
    *others, last = ranks.run(wrong_on_one_rank)
    assert last == [True, True, False, True]
    assert all(refused == [False, False, False, True] for refused in others)  # the weight is one of all ranks


# ---- states of the optimizer --------------------------------------------------------------------------------------


def optimizer_states(kind: str, options: StateDictOptions) -> None:
    run, other = Run(kind), Run(kind)
    run.train(0, 3 * WINDOW)
    state = get_optimizer_state_dict(run.model, run.optimizer, options=options)
    assert any(isinstance(value, Tensor) for value in tree_leaves(state))
    assert all(value.dtype is torch.float32 for value in tree_leaves(state) if isinstance(value, Tensor))
    set_optimizer_state_dict(other.model, other.optimizer, state, options=options)
    for param, twin in zip(run.model.parameters(), other.model.parameters(), strict=True):
        for key, value in run.optimizer.state[param].items():
            found = other.optimizer.state[twin][key]
            assert found.dtype is torch.float32
            assert torch.equal(bits(found), bits(value)), key


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        StateDictOptions(),
        StateDictOptions(full_state_dict=True),
        StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        StateDictOptions(flatten_optimizer_state_dict=True),
    ],
    ids=["sharded", "full", "broadcast", "flat"],
)
def test_states_stay_in_fp32(ranks: Ranks, kind: str, options: StateDictOptions) -> None:
    ranks.run(optimizer_states, kind, options)
