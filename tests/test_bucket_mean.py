"""The mean over ranks of split sums: its bits, its bytes, and what travels when."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device
from tiny import relative_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import accumkern
from accumkern.bucket_mean import BucketMean
from accumkern.exchange import Exchange
from accumkern.formats import BUFFERS, decode, divide, encode

pytestmark = pytest.mark.integration("DistributedDataParallel: reduce_in_fp32")

BF16 = torch.bfloat16
SHAPES = [(1,), (3,), (7, 11), (1000,), (64, 33), (5,)]
several = pytest.mark.parametrize("count", [1, 2, 3, 5, 8], ids=lambda count: f"{count} ranks")


class Given(nn.Module):
    """Parameters whose gradients are given."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.params = nn.ParameterList(torch.zeros(shape, dtype=BF16, device=device()) for shape in shapes)

    def forward(self, grads: list[Tensor]) -> Tensor:
        return torch.stack([(p * grad).sum() for p, grad in zip(self.params, grads, strict=True)]).sum()


def gradients(rank: int, n: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + n)
    return [(torch.randn(shape, generator=generator) + 0.5).to(device(), BF16) for shape in shapes]


def run_window(model: Any, window: int, shapes: list[tuple[int, ...]]) -> None:
    for n in range(4):
        with model.no_sync() if n < 3 else nullcontext():
            model(gradients(dist.get_rank(model.process_group), 10 * window + n, shapes)).backward()


def gathered(tensor: Tensor, group: Any = None) -> list[Tensor]:
    of_ranks = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, tensor, group=group)
    return of_ranks


def bits(group: Any, buffer: str, **way: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the means; they have the bits of the sums, decoded and added in the order of ranks, divided, encoded."""
    model, alone = DistributedDataParallel(Given(SHAPES), process_group=group, **way), Given(SHAPES)
    optimizers = [torch.optim.SGD(module.parameters()) for module in (model, alone)]
    acc, acc_alone = (accumkern.attach(optimizer, buffer) for optimizer in optimizers)
    acc.reduce_in_fp32(model)
    means = []
    format_ = BUFFERS[buffer][BF16]
    for window in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        run_window(model, window, SHAPES)
        for n in range(4):
            alone(gradients(dist.get_rank(group), 10 * window + n, SHAPES)).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            total, *others = gathered(acc_alone.gradient(q), group)
            for other in others:
                total = total + other
            half, low = encode(format_, divide(total, dist.get_world_size(group)))
            assert torch.equal(p.grad, half)
            assert torch.equal(acc.gradient(p), decode(format_, half, low))
            means.append((p.grad.clone(), acc.gradient(p)))
    return means


def bits_twice(buffer: str, way: dict[str, Any]) -> None:
    first, again = bits(None, buffer, **way), bits(None, buffer, **way)
    for pair, same in zip(first, again, strict=True):
        for value, other in zip(pair, same, strict=True):
            assert torch.equal(value, other)
            assert all(torch.equal(value, of_rank) for of_rank in gathered(value))


@several
@pytest.mark.parametrize("buffer", ["split24", "split32"])
def test_every_rank_has_the_bits_of_sums_added_in_the_order_of_ranks(ranks: Ranks, count: int, buffer: str) -> None:
    ranks.run(bits_twice, buffer, {"bucket_cap_mb": 0.001}, ranks=count)


@pytest.mark.parametrize("buffer", ["split24", "split32"])
def test_gradients_that_are_views_of_the_bucket(ranks: Ranks, buffer: str) -> None:
    ranks.run(bits_twice, buffer, {"gradient_as_bucket_view": True}, ranks=3)


def two_groups() -> None:
    pairs = [dist.new_group(pair) for pair in ([0, 1], [3, 2])]
    bits(pairs[dist.get_rank() // 2], "split24", bucket_cap_mb=0.001)


def test_several_process_groups(ranks: Ranks) -> None:
    ranks.run(two_groups, ranks=4, at_least=4)


# ---- error and bytes ----------------------------------------------------------------------------------------------


def error(way: Any) -> tuple[float, float]:
    """Return the errors of `.grad` and of what the accumulator knows, against the FP64 mean of all micro-gradients."""
    model = DistributedDataParallel(Given([(2**14,)]))
    acc = accumkern.attach(torch.optim.SGD(model.parameters()))
    acc.reduce_in_fp32(model)
    with mock.patch.object(BucketMean, "steps", way):
        run_window(model, 0, [(2**14,)])
    count = dist.get_world_size()
    truth = sum(gradients(rank, n, [(2**14,)])[0].double() for rank in range(count) for n in range(4)) / count
    (param,) = model.parameters()
    return relative_error([param.grad], [truth]), relative_error([acc.gradient(param)], [truth])


def errors() -> None:
    ours, all_reduced = error(BucketMean.steps), error(BucketMean.all_reduced)
    for mine, theirs in zip(ours, all_reduced, strict=True):
        assert mine <= 1.1 * theirs
    assert ours[1] < 2e-5


@several
def test_the_error_is_that_of_an_all_reduce_in_fp32(ranks: Ranks, count: int) -> None:
    ranks.run(errors, ranks=count)


def sent(numel: int) -> int:
    """Return the bytes that this rank sends for a window."""
    model = DistributedDataParallel(Given([(numel,)]))
    acc = accumkern.attach(torch.optim.SGD(model.parameters()))
    acc.reduce_in_fp32(model)
    real, total = dist.batch_isend_irecv, 0

    def count(ops: list[Any]) -> Any:
        nonlocal total
        total += sum(op.tensor.numel() * op.tensor.itemsize for op in ops if op.op is dist.isend)
        return real(ops)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an all-reduce is left")

    run = [gradients(dist.get_rank(), n, [(numel,)]) for n in range(2)]
    with model.no_sync():
        model(run[0]).backward()
    loss = model(run[1])
    with mock.patch.object(dist, "batch_isend_irecv", count), mock.patch.object(dist, "all_reduce", refuse):
        loss.backward()
    return total


@pytest.mark.parametrize("count", [2, 8])
def test_a_rank_sends_three_bytes_of_each_element_to_its_owner_and_three_to_all(ranks: Ranks, count: int) -> None:
    numel = 8 * 500
    # An all-reduce of bfloat16 in a ring sends 2 * (n - 1) / n * 2 bytes per element; this is that and a half.
    of_ranks = ranks.run(sent, numel, ranks=count)
    count = len(of_ranks)
    assert of_ranks == [2 * (count - 1) * numel // count * 3] * count


def messages_on(hosts: list[str]) -> int:
    """Return how many messages this rank sends and receives for a window, with a mean that is right."""
    model = DistributedDataParallel(Given([(40,)]))
    acc = accumkern.attach(torch.optim.SGD(model.parameters()))
    acc.reduce_in_fp32(model)
    real, total = dist.batch_isend_irecv, 0

    def count(ops: list[Any]) -> Any:
        nonlocal total
        total += len(ops)
        return real(ops)

    with (
        mock.patch("socket.gethostname", return_value=hosts[dist.get_rank()]),
        mock.patch.object(dist, "batch_isend_irecv", count),
    ):
        run_window(model, 0, [(40,)])
    (param,) = model.parameters()
    assert all(torch.equal(param.grad, of_rank) for of_rank in gathered(param.grad))
    truth = sum(gradients(rank, n, [(40,)])[0].double() for rank in range(4) for n in range(4)) / 4
    assert relative_error([acc.gradient(param)], [truth]) < 2e-5
    return total


@pytest.mark.parametrize(("hosts", "are_direct"), [("aaaa", True), ("abcd", True), ("aabb", False), ("aaab", False)])
def test_between_machines_of_several_ranks_sums_are_all_reduced(ranks: Ranks, hosts: str, are_direct: bool) -> None:
    for messages in ranks.run(messages_on, list(hosts), ranks=4, at_least=4):
        assert (messages > 0) == are_direct


# ---- what travels when --------------------------------------------------------------------------------------------


def order_of_events() -> list[str]:
    """Return what happens in a backward pass of three layers with a bucket each."""
    layers = [nn.Linear(64, 64, bias=False, device=device(), dtype=BF16) for _ in range(3)]
    model = DistributedDataParallel(nn.Sequential(*layers), bucket_cap_mb=0.001)
    acc = accumkern.attach(torch.optim.SGD(model.parameters()))
    acc.reduce_in_fp32(model)
    x = torch.ones(2, 64, device=device(), dtype=BF16)
    model(x).sum().backward()  # after it buckets are in the order in which gradients come
    events: list[str] = []
    for i, layer in enumerate(layers):
        layer.weight.register_hook(lambda _, i=i: events.append(f"gradient {i}"))
    real = Exchange.scatter, Exchange.gather, Exchange.rows
    rows: list[Any] = []

    def scatter(self: Exchange, *args: Any) -> Any:
        events.append("parts")
        return real[0](self, *args)

    def gather(self: Exchange, *args: Any) -> Any:
        events.append("means")
        return real[1](self, *args)

    def of_ranks(self: Exchange, flat: Tensor) -> Tensor:
        made = real[2](self, flat)
        rows.append(torch.multiprocessing.reductions.StorageWeakRef(made.untyped_storage()))
        assert sum(not ref.expired() for ref in rows) <= 2, "more than one bucket's parts are held"
        return made

    with mock.patch.multiple(Exchange, scatter=scatter, gather=gather, rows=of_ranks):
        model(x).sum().backward()
    return events


def test_a_bucket_travels_while_the_backward_pass_goes_on(ranks: Ranks) -> None:
    hidden = ["gradient 2", "parts", "gradient 1", "means", "parts", "gradient 0", "means", "parts", "means"]
    at_once = ["gradient 2", "parts", "means", "gradient 1", "parts", "means", "gradient 0", "parts", "means"]
    for events in ranks.run(order_of_events):
        assert events == (hidden if ranks.backend == "gloo" else at_once)


# ---- messages of others -------------------------------------------------------------------------------------------


def beside_other_messages() -> None:
    """The other message comes before those of the exchange on one rank, and after them on the other."""
    rank = dist.get_rank()
    other, theirs = torch.full((8,), 77, dtype=torch.uint8), torch.full((8,), float(rank), dtype=BF16)
    if rank == 0:
        message = dist.isend(other, 1)
    exchange = Exchange(dist.group.WORLD, theirs.numel(), "in this test")
    rows = exchange.rows(theirs)
    exchange.scatter([theirs], [rows]).wait()
    if rank == 1:
        other.zero_()
        message = dist.irecv(other, 0)
    message.wait()
    assert rows.tolist() == [[0.0] * 4, [1.0] * 4]
    assert other.tolist() == [77] * 8


def test_messages_of_others_in_the_same_group_are_not_taken_for_its_own(ranks: Ranks) -> None:
    if ranks.backend == "nccl":
        pytest.skip("its messages have no tags")
    ranks.run(beside_other_messages)
