"""A rank that dies or hangs in an exchange ends the others with its name, whoever notices whom first."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import accumkern
from accumkern import exchange as exchange_of_parts
from accumkern import fsdp_window, lost_rank
from accumkern.lost_rank import RollCall
from accumkern.ranks import Ranks, RanksError

TIMEOUT_S, PATIENCE_S = 4, 2
CONTEXT = get_context("forkserver")  # whose processes need not import torch
CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "accumkern", "test_lost_rank"])


def serve(outcomes: Any, number: int, count: int, store: str, function: Callable[..., str], args: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lost_rank.PATIENCE_S = PATIENCE_S
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=count, timeout=timeout)
    dist.barrier()
    began = time.monotonic()
    try:
        outcome = function(*args)
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    outcomes.put((number, outcome, time.monotonic() - began))
    outcomes.close()
    outcomes.join_thread()
    os._exit(0)


def outcomes_of(function: Callable[..., str], *args: Any, ranks: int, left: int, store: str) -> dict[int, str]:
    """Return how a function ended on the ranks of a group that are left."""
    outcomes = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=serve, args=(outcomes, number, ranks, store, function, args)) for number in range(ranks)
    ]
    for process in processes:
        process.start()
    found = [outcomes.get(timeout=90) for _ in range(left)]
    for process in processes:
        process.join()
    # The longest is that of one that hangs and comes back; what is left is for busy CPUs.
    limit = 2 * TIMEOUT_S + 2 * PATIENCE_S + 30
    assert all(seconds < limit for _, _, seconds in found), found
    return {number: outcome for number, outcome, _ in found}


def stop(how: str) -> None:
    if how == "hangs":
        time.sleep(2 * TIMEOUT_S + PATIENCE_S)
    else:
        os._exit(1)


def gone(rank: int, doing: str) -> str:
    return f"RanksError: rank {rank} is gone (its connection closed) {doing}; see its output (RuntimeError: "


def late(rank: int, doing: str) -> str:
    timeout = f"{TIMEOUT_S} s, the timeout of the group"
    return f"RanksError: rank {rank} has not come {doing} within {timeout}; see its output (RuntimeError: "


# ---- messages between all ranks ------------------------------------------------------------------------------------


class Exchange:
    """Of some ranks, of which one stops at some moment."""

    def __init__(self, stops: int, moment: str, how: str) -> None:
        self.group: Any = dist.group.WORLD
        self.roll_call = RollCall(self.group, "in the exchange")
        self._moment, self._how = moment if dist.get_rank() == stops else "", how

    def comes_to(self, moment: str) -> None:
        if moment == self._moment:
            stop(self._how)

    def __call__(self, value: Tensor, name: str) -> Tensor:
        """Return the sum of the values of all ranks, each sent to each."""
        self.comes_to(f"before the {name}")
        received = [value.clone() for _ in range(self.group.size())]
        works = []
        for peer in range(self.group.size()):
            if peer == self.group.rank():
                continue
            try:
                works.append((peer, dist.isend(value, group=self.group, group_dst=peer)))
                works.append((peer, dist.irecv(received[peer], group=self.group, group_src=peer)))
            except RuntimeError as error:
                raise self.roll_call.lost(error, peer) from error
            self.comes_to(f"in the {name}")  # when it has sent to one
        self.roll_call.wait(works)
        return torch.stack(received).sum(0)


def exchange(*stops: Any) -> str:
    exchange = Exchange(*stops)
    count = exchange.group.size()
    for _ in range(2):
        own = torch.full((1000,), float(dist.get_rank()))
        total = exchange(exchange(own, "first"), "second")
        assert torch.equal(total, torch.full_like(own, count * count * (count - 1) / 2))
    return "done"


def test_ranks_that_are_all_there_have_exchanged(tmp_path: Path) -> None:
    found = outcomes_of(exchange, -1, "", "", ranks=3, left=3, store=f"file://{tmp_path}/store")
    assert found == dict.fromkeys(range(3), "done")


@pytest.mark.parametrize(("count", "stops"), [(3, 0), (4, 3)])
@pytest.mark.parametrize("moment", ["before the first", "in the first", "before the second", "in the second"])
def test_a_rank_that_dies_is_named_by_all_others(tmp_path: Path, count: int, stops: int, moment: str) -> None:
    store = f"file://{tmp_path}/store"
    found = outcomes_of(exchange, stops, moment, "dies", ranks=count, left=count - 1, store=store)
    assert set(found) == set(range(count)) - {stops}
    for outcome in found.values():
        assert outcome.startswith(gone(stops, "in the exchange")), found


@pytest.mark.parametrize("moment", ["in the first", "in the second"])
def test_a_rank_that_hangs_is_named_after_the_timeout(tmp_path: Path, moment: str) -> None:
    store = f"file://{tmp_path}/store"
    found = outcomes_of(exchange, 2, moment, "hangs", ranks=4, left=4, store=store)
    comes_back = found.pop(2)
    for outcome in found.values():
        assert outcome.startswith(late(2, "in the exchange")), found
    assert "not waited any longer for this rank, 2, in the exchange" in comes_back


@pytest.mark.parametrize("stops", [0, 2])
def test_the_store_may_be_gone_with_the_rank_that_dies(stops: int) -> None:
    """Rank 0 has it in its process."""
    with socket.socket() as found_free:
        found_free.bind(("127.0.0.1", 0))
        store = f"tcp://127.0.0.1:{found_free.getsockname()[1]}"
    found = outcomes_of(exchange, stops, "in the second", "dies", ranks=3, left=2, store=store)
    for outcome in found.values():
        assert outcome.startswith(gone(stops, "in the exchange")), found


def exchange_after_a_while() -> str:
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == 1:
        with suppress(OSError):  # it has ended, or its parent does not know so yet
            while ") Z" not in Path(f"/proc/{pids[0]}/stat").read_text():
                time.sleep(0.1)
    return exchange(2, "before the first", "dies")


def test_who_comes_when_all_others_are_gone_names_the_first(tmp_path: Path) -> None:
    found = outcomes_of(exchange_after_a_while, ranks=3, left=2, store=f"file://{tmp_path}/store")
    assert found[0].startswith(gone(2, "in the exchange"))
    assert found[1].startswith(gone(2, "in the exchange"))


def test_who_comes_when_all_others_are_gone_and_the_store_says_so() -> None:
    with socket.socket() as found_free:
        found_free.bind(("127.0.0.1", 0))
        store = f"tcp://127.0.0.1:{found_free.getsockname()[1]}"
    found = outcomes_of(exchange_after_a_while, ranks=3, left=2, store=store)
    assert found[0].startswith(gone(2, "in the exchange"))
    assert found[1].startswith(
        "RanksError: ranks 0, 2 are gone (their connections closed) in the exchange; which of them was first is not "
        "known, as the store of the group is gone too"
    )


# ---- the mean over ranks of gradients ------------------------------------------------------------------------------


def reducing_pass(stops: int, moment: str, how: str, buffer: str) -> str:
    """Run a backward pass of three buckets; one rank stops before one of its steps."""
    layers = [nn.Linear(32, 32, bias=False, dtype=torch.bfloat16) for _ in range(3)]
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.001)
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), buffer)
    acc.reduce_in_fp32(model)
    x = torch.ones(4, 32, dtype=torch.bfloat16)
    with model.no_sync():
        model(x).sum().backward()
    if dist.get_rank() == stops:
        if moment == "before the first bucket":
            layers[2].weight.register_hook(lambda _grad: stop(how))
        elif moment == "before the second bucket":
            layers[1].weight.register_hook(lambda _grad: stop(how))
        else:
            exchange_of_parts.Exchange.gather = lambda *_: stop(how)  # type: ignore[method-assign]
    model(x).sum().backward()
    return "done"


@pytest.mark.parametrize(
    ("moment", "how", "buffer"),
    [
        ("before the first bucket", "dies", "split24"),
        ("before the second bucket", "dies", "split24"),
        ("before the means", "dies", "split24"),
        ("before the second bucket", "hangs", "split24"),
        ("before the second bucket", "dies", "fp32"),
    ],
)
def test_a_rank_that_is_gone_in_a_reduction_is_named(tmp_path: Path, moment: str, how: str, buffer: str) -> None:
    left = 3 if how == "hangs" else 2
    store = f"file://{tmp_path}/store"
    found = outcomes_of(reducing_pass, 1, moment, how, buffer, ranks=3, left=left, store=store)
    found.pop(1, None)
    told = late if how == "hangs" else gone
    for outcome in found.values():
        assert outcome.startswith(told(1, "in the mean over ranks of gradients")), found


# ---- agreements ----------------------------------------------------------------------------------------------------


def agree(stops: int, how: str, timeout_s: int = TIMEOUT_S) -> str:
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    with Ranks(group, "in the agreement") as ranks:
        ranks.meet()
        if dist.get_rank() == stops:
            stop(how)
        ranks.meet()
    return "done"


@pytest.mark.parametrize(("stops", "how"), [(0, "dies"), (2, "dies"), (2, "hangs")])
def test_an_agreement_names_the_rank_that_does_not_come(tmp_path: Path, stops: int, how: str) -> None:
    left = 4 if how == "hangs" else 3
    found = outcomes_of(agree, stops, how, ranks=4, left=left, store=f"file://{tmp_path}/store")
    comes_back = found.pop(stops, "")
    told = late if how == "hangs" else gone
    for outcome in found.values():
        assert outcome.startswith(told(stops, "in the agreement")), found
    assert how == "dies" or f"any longer for this rank, {stops}, in the agreement" in comes_back


def agree_and_stay() -> str:
    began = time.monotonic()
    try:
        return agree(2, "dies", 60)
    except RanksError as error:
        seconds = time.monotonic() - began
        time.sleep(5 * PATIENCE_S)  # nobody notices that this rank has ended, because it does not end
        return f"{'soon' if seconds < 5 * PATIENCE_S else 'late'}: RanksError: {error}"


def test_who_sees_it_lets_those_know_that_wait_for_it(tmp_path: Path) -> None:
    found = outcomes_of(agree_and_stay, ranks=4, left=3, store=f"file://{tmp_path}/store")
    for outcome in found.values():
        assert outcome.startswith("soon: " + gone(2, "in the agreement")), found


# ---- fully_shard ---------------------------------------------------------------------------------------------------


def window(stops: int, where: str, how: str) -> str:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(torch.bfloat16)
    fully_shard(model[0])
    fully_shard(model)
    acc = accumkern.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    passes = []

    def loss_fn(part: Tensor) -> Tensor:
        passes.append(part)
        if dist.get_rank() == stops and len(passes) == 3:
            if where == "pass":
                stop(how)
            fsdp_window.AgreedCollective.__call__ = stopped  # type: ignore[method-assign]
        return model(part).float().square().mean()

    def stopped(collective: Any, *args: Any, **kwargs: Any) -> Any:
        collective._meet()
        if "ReduceScatter" in type(collective._comm).__name__:
            stop(how)
        return collective._comm(*args, **kwargs)

    acc.backward(loss_fn, torch.randn(8, 8, dtype=torch.bfloat16), 2, model=model)
    return "done"


@pytest.mark.parametrize("how", ["dies", "hangs"])
@pytest.mark.parametrize("where", ["pass", "reduce-scatter"])
def test_a_window_of_fully_shard_names_the_rank_that_is_gone(tmp_path: Path, where: str, how: str) -> None:
    left = 3 if how == "hangs" else 2
    found = outcomes_of(window, 1, where, how, ranks=3, left=left, store=f"file://{tmp_path}/store")
    found.pop(1, None)
    told = late if how == "hangs" else gone
    for outcome in found.values():
        assert outcome.startswith(told(1, "in acc.backward()")), found
