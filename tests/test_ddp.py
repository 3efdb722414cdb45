"""DistributedDataParallel, unchanged, with accumulated gradients: every way to set it up, against stock and FP64."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device
from tiny import fp64_sums, relative_error
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import accumkern
from accumkern import ddp_window
from accumkern.formats import divide

pytestmark = pytest.mark.integration("DistributedDataParallel")

BF16 = torch.bfloat16
WAYS = {
    "default": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "static graph, bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
    "find unused": {"find_unused_parameters": True},
    "find unused, bucket views": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 0.001},
    "small buckets, views": {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True},
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
syncs = pytest.mark.parametrize("no_sync", [True, False], ids=["no_sync", "sync each"])
set_to_none = pytest.mark.parametrize("set_to_none", [True, False], ids=["set to None", "set to zero"])


class Net(nn.Module):
    """Some layers, one of them tied, one that only even micro-batches use, one that none uses."""

    def __init__(self, has_unused: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 3)
        self.sometimes, self.never = (nn.Linear(24, 24), nn.Linear(2, 2)) if has_unused else (None, None)

    def forward(self, x: Tensor, use: bool = True) -> Tensor:
        y = self.b(torch.tanh(self.b(torch.tanh(self.a(x)))))
        if self.sometimes is not None and use:
            y = y + self.sometimes(y)
        return self.c(y)


def micro_batch(window: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * dist.get_rank() + 100 * window + n)
    return (torch.randn(6, 12, generator=generator) + 0.5).to(device())


def net(dtype: torch.dtype, way: dict[str, Any]) -> Net:
    torch.manual_seed(1)
    return Net("find_unused_parameters" in way).to(device(), dtype)


def wrap(module: Net, way: dict[str, Any], hook: str | None = None) -> DistributedDataParallel:
    """Return the wrapped module; a static graph is learnt in a first backward pass, which has to reduce."""
    model = DistributedDataParallel(module, **way)
    register(model, hook)
    run_window(model, module, 0, 1, no_sync=False)
    model.zero_grad()
    return model


def run_window(model: nn.Module, module: Net, window: int, micro_batches: int, no_sync: bool) -> None:
    dtype = module.a.weight.dtype
    for n in range(micro_batches):
        with model.no_sync() if no_sync and n < micro_batches - 1 else nullcontext():
            model(micro_batch(window, n).to(dtype), n % 2 == 0 or module.sometimes is None).float().sum().backward()


# ---- float32: the bits of stock -----------------------------------------------------------------------------------


def same_bits_as_stock(way: dict[str, Any], no_sync: bool, set_to_none: bool) -> None:
    results = []
    for attached in (False, True):
        module = net(torch.float32, way)
        model = wrap(module, way)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        if attached:
            accumkern.attach(optimizer)
        grads: list[Tensor | None] = []
        for window in range(3):
            run_window(model, module, window, 4, no_sync)
            grads += [None if p.grad is None else p.grad.clone() for p in module.parameters()]
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        results.append((grads, list(module.parameters())))
    (stock, stock_params), (ours, params) = results
    assert any(grad is not None and bool(grad.any()) for grad in stock)
    for a, b in zip(stock, ours, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert all(map(torch.equal, stock_params, params))


@ways
@syncs
@set_to_none
def test_float32_gradients_have_the_bits_of_stock(
    ranks: Ranks, way: dict[str, Any], no_sync: bool, set_to_none: bool
) -> None:
    ranks.run(same_bits_as_stock, way, no_sync, set_to_none)


# ---- bfloat16: closer to FP64 -------------------------------------------------------------------------------------


def errors(way: dict[str, Any], no_sync: bool, set_to_none: bool, hook: str | None) -> tuple[float, float]:
    """Return the relative L2 error of ``.grad``, stock and attached, after the second window of 64 micro-batches."""
    found = []
    for attached in (False, True):
        module = net(BF16, way)
        model = wrap(module, way, hook)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        if attached:
            accumkern.attach(optimizer)
        truth = fp64_sums(module.parameters())
        for window in range(2):
            optimizer.zero_grad(set_to_none=set_to_none)
            for total in truth:
                total.zero_()
            run_window(model, module, window, 64, no_sync)
        grads = []
        for p, total in zip(module.parameters(), truth, strict=True):
            dist.all_reduce(total)
            total /= dist.get_world_size()
            grads.append(torch.zeros_like(total) if p.grad is None else p.grad)
        found.append(relative_error(grads, truth))
    return found[0], found[1]


def sum_hook(state, bucket):  # DDP does not take annotations that are strings
    """Reduce in place by a collective alone, which no tensor's version tells of."""
    dist.all_reduce(bucket.buffer())
    bucket.buffer().data.div_(dist.get_world_size())
    devices = None if bucket.buffer().is_cpu else [bucket.buffer().device]
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
    future.set_result(bucket.buffer())
    return future


def register(model: DistributedDataParallel, hook: str | None) -> None:
    if hook == "allreduce":
        model.register_comm_hook(None, default_hooks.allreduce_hook)
    elif hook == "fp16":
        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif hook == "powerSGD":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=1000)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif hook == "in place":
        model.register_comm_hook(None, sum_hook)


@ways
@set_to_none
def test_bfloat16_sums_are_at_least_twice_closer_to_fp64(ranks: Ranks, way: dict[str, Any], set_to_none: bool) -> None:
    for stock, ours in ranks.run(errors, way, True, set_to_none, None):
        assert stock > 4e-3
        assert ours * 2 < stock


@pytest.mark.parametrize("hook", ["allreduce", "fp16", "powerSGD", "in place"])
@pytest.mark.parametrize("way", [{}, {"gradient_as_bucket_view": True}], ids=["buckets apart", "bucket views"])
@set_to_none
def test_communication_hooks(ranks: Ranks, way: dict[str, Any], hook: str, set_to_none: bool) -> None:
    for stock, ours in ranks.run(errors, way, True, set_to_none, hook):
        assert ours * 2 < stock


@ways
def test_a_reduction_after_each_micro_batch_is_no_worse_than_stock(ranks: Ranks, way: dict[str, Any]) -> None:
    """Then the gradients are rounded to bfloat16 in each reduction, and there is little to gain."""
    for stock, ours in ranks.run(errors, way, False, True, None):
        assert ours < 1.3 * stock  # ties are rounded away from zero, which shows most on a single rank


# ---- what the residual belongs to ---------------------------------------------------------------------------------


def sums_up_to_the_reduction(way: dict[str, Any], set_to_none: bool) -> None:
    module = net(BF16, way)
    alone = copy.deepcopy(module)
    model = wrap(module, way)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (module, alone)]
    acc, acc_alone = (accumkern.attach(optimizer, "split32") for optimizer in optimizers)
    in_hook: dict[Tensor, tuple[Tensor, Tensor]] = {}
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(lambda p: in_hook.update({p: (p.grad.clone(), acc.gradient(p))}))
    for window in range(3):
        run_window(model, module, window, 5, True)
        run_window(alone, alone, window, 5, False)
        for p, q in zip(module.parameters(), alone.parameters(), strict=True):
            if p not in in_hook:
                continue
            # What DDP got is the exact sum of this rank, rounded; and in FP32 it is exact up to the last micro-batch.
            assert torch.equal(in_hook[p][0], q.grad)
            assert torch.equal(in_hook[p][1], acc_alone.gradient(q))
            # What it has left is the mean of the ranks, and the residual of the sum does not count any more.
            assert torch.equal(acc.gradient(p), p.grad.float())
            mean = q.grad.float() / dist.get_world_size()
            dist.all_reduce(mean)
            torch.testing.assert_close(p.grad.float(), mean, rtol=2**-7, atol=1e-3 * float(mean.abs().max()))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("way", [w for w in WAYS.values() if "find_unused_parameters" not in w])
@set_to_none
def test_residuals_count_until_the_reduction_and_not_after(
    ranks: Ranks, way: dict[str, Any], set_to_none: bool
) -> None:
    ranks.run(sums_up_to_the_reduction, way, set_to_none)


# ---- the mean in FP32 ---------------------------------------------------------------------------------------------


def mean_in_fp32(way: dict[str, Any], set_to_none: bool, buffer: str) -> None:
    module = net(BF16, way)
    alone = copy.deepcopy(module)
    model = DistributedDataParallel(module, **way)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (module, alone)]
    acc, acc_alone = (accumkern.attach(optimizer, buffer) for optimizer in optimizers)
    acc.reduce_in_fp32(model)
    run_window(model, module, 0, 1, no_sync=False)
    for window in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
        run_window(model, module, window, 9, True)
        run_window(alone, alone, window, 9, False)
        for p, q in zip(module.parameters(), alone.parameters(), strict=True):
            mean = torch.zeros(p.shape, device=device()) if q.grad is None else acc_alone.gradient(q)
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
            if p.grad is None:
                assert not mean.any()
                continue
            tolerance = 2**-15 if buffer == "split24" else 0
            torch.testing.assert_close(acc.gradient(p), mean, rtol=tolerance, atol=0)
            torch.testing.assert_close(p.grad.float(), mean, rtol=2**-8, atol=0)
        if window == 1:
            means = [acc.gradient(p) for p in module.parameters()]
            acc.finish(divide_by=3.0)
            for p, mean in zip(module.parameters(), means, strict=True):
                assert p.grad is None or torch.equal(p.grad, divide(mean, 3.0).to(BF16))


@pytest.mark.integration("DistributedDataParallel: reduce_in_fp32")
@ways
@set_to_none
def test_mean_in_fp32(ranks: Ranks, way: dict[str, Any], set_to_none: bool) -> None:
    ranks.run(mean_in_fp32, way, set_to_none, "split32")


@pytest.mark.integration("DistributedDataParallel: reduce_in_fp32")
@pytest.mark.parametrize("buffer", ["split24", "fp32"])
@pytest.mark.parametrize("way", [{}, {"gradient_as_bucket_view": True}], ids=["buckets apart", "bucket views"])
def test_mean_in_fp32_of_other_buffers(ranks: Ranks, way: dict[str, Any], buffer: str) -> None:
    ranks.run(mean_in_fp32, way, True, buffer)


def mean_of_what_one_rank_uses(way: dict[str, Any], buffer: str) -> None:
    """Every rank has the mean to the same precision, whoever has used the parameter: replicas stay alike."""
    module = net(BF16, way)
    model = DistributedDataParallel(module, **way)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    acc = accumkern.attach(optimizer, buffer, master_weights="split32")
    acc.reduce_in_fp32(model)
    weight = module.sometimes.weight
    for window in range(3):
        truth = fp64_sums([weight])
        for n in range(5):
            with model.no_sync() if n < 4 else nullcontext():
                model(micro_batch(window, n).to(BF16), dist.get_rank() == 0).float().sum().backward()
        dist.all_reduce(truth[0])
        assert relative_error([acc.gradient(weight) * dist.get_world_size()], truth) < 1e-5
        acc.finish(max_norm=1.0)
        optimizer.step()
        for param in module.parameters():
            masters = [torch.empty_like(param, dtype=torch.float32) for _ in range(dist.get_world_size())]
            dist.all_gather(masters, acc.master_weight(param))
            assert all(torch.equal(masters[0], other) for other in masters)
        optimizer.zero_grad()
    assert module.never.weight.grad is None


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
@pytest.mark.parametrize("way", [w for w in WAYS.values() if "find_unused_parameters" in w])
def test_mean_in_fp32_of_what_one_rank_uses(ranks: Ranks, way: dict[str, Any], buffer: str) -> None:
    ranks.run(mean_of_what_one_rank_uses, way, buffer)


def mean_over_ranks_of_bucket_views() -> None:
    """Gradients of several buckets may be views of one tensor of DistributedDataParallel: of one version."""
    ddp_window.BUCKET_BYTES, before = 600, ddp_window.BUCKET_BYTES
    try:
        module = net(BF16, {})
        model = DistributedDataParallel(module, gradient_as_bucket_view=True)
        acc = accumkern.attach(torch.optim.SGD(module.parameters()), "split32")
        acc.reduce_in_fp32(model)
        run_window(model, module, 9, 1, no_sync=False)
        model.zero_grad(set_to_none=False)
        truth = fp64_sums(module.parameters())
        with model.no_sync():
            run_window(model, module, 0, 8, no_sync=False)
        acc.mean_over_ranks(model)
    finally:
        ddp_window.BUCKET_BYTES = before
    for p, total in zip(module.parameters(), truth, strict=True):
        assert p.grad._is_view()
        dist.all_reduce(total)
        assert relative_error([acc.gradient(p) * dist.get_world_size()], [total]) < 1e-6


def test_mean_over_ranks_of_bucket_views(ranks: Ranks) -> None:
    ranks.run(mean_over_ranks_of_bucket_views)


def mean_in_fp32_beside_sparse_gradients() -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Linear(8, 4)).to(device(), BF16)
    model = DistributedDataParallel(module)
    acc = accumkern.attach(torch.optim.SGD(module.parameters()), "split32")
    acc.reduce_in_fp32(model)
    truth = fp64_sums(module[1].parameters())
    rows = torch.tensor([3, 4 + dist.get_rank(), 9], device=device())
    model(rows).float().sum().backward()
    for p, total in zip(module[1].parameters(), truth, strict=True):
        dist.all_reduce(total)
        assert relative_error([acc.gradient(p) * dist.get_world_size()], [total]) < 1e-6
    used = module[0].weight.grad.to_dense().any(1).nonzero().flatten()
    assert used.tolist() == [3, *range(4, 4 + dist.get_world_size()), 9]


def test_mean_in_fp32_beside_sparse_gradients(ranks: Ranks) -> None:
    if ranks.backend == "nccl":
        pytest.skip("NCCL reduces no sparse tensors, without accumkern either")
    ranks.run(mean_in_fp32_beside_sparse_gradients)


def mean_in_fp32_again_in_a_window(way: dict[str, Any], uses: tuple[bool, ...], buffer: str) -> None:
    """Several reductions in a window: what one of them does not use keeps its residual, and so do its neighbours."""
    module = net(BF16, way)
    model = DistributedDataParallel(module, **way)
    acc = accumkern.attach(torch.optim.SGD(module.parameters(), lr=0.0), buffer)
    acc.reduce_in_fp32(model)
    params = [p for name, p in module.named_parameters() if "never" not in name]
    truth = fp64_sums(params)
    for n, use in enumerate(uses):
        model(micro_batch(0, n).to(BF16), use).float().sum().backward()
    for p, total in zip(params, truth, strict=True):
        dist.all_reduce(total)
        assert relative_error([acc.gradient(p) * dist.get_world_size()], [total]) < 2e-5


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
@pytest.mark.parametrize("uses", [(True, True), (True, False), (True, True, False)], ids=str)
@pytest.mark.parametrize("way", [w for w in WAYS.values() if "find_unused_parameters" in w])
def test_mean_in_fp32_again_in_a_window(ranks: Ranks, way: dict[str, Any], uses: tuple[bool, ...], buffer: str) -> None:
    ranks.run(mean_in_fp32_again_in_a_window, way, uses, buffer)


def mean_in_fp32_beside_another_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        mean_in_fp32({}, True, "split32")
    finally:
        torch.set_default_dtype(torch.float32)


def test_mean_in_fp32_whatever_the_default_dtype(ranks: Ranks) -> None:
    ranks.run(mean_in_fp32_beside_another_default)


def mean_in_fp32_of_another_layout() -> None:
    """A gradient may lie in memory in another order than its parameter and its bucket; so does its residual."""
    module = net(BF16, {})
    model = DistributedDataParallel(module)
    acc = accumkern.attach(torch.optim.SGD(module.parameters()), "split32")
    acc.reduce_in_fp32(model)
    weight = module.a.weight
    weight.grad = torch.zeros(weight.shape[::-1], dtype=BF16, device=device()).t()
    truth = fp64_sums([weight])
    for n in range(3):
        with model.no_sync() if n < 2 else nullcontext():
            model(micro_batch(0, n).to(BF16)).float().sum().backward()
    dist.all_reduce(truth[0])
    assert weight.grad.stride() == (1, weight.shape[0])
    assert relative_error([acc.gradient(weight) * dist.get_world_size()], truth) < 1e-6


def test_mean_in_fp32_of_another_layout(ranks: Ranks) -> None:
    ranks.run(mean_in_fp32_of_another_layout)


def mean_in_fp32_of_channels_last(gradient_as_bucket_view: bool) -> None:
    """A bucket holds a gradient in the memory order of its parameter."""
    torch.manual_seed(1)
    module = nn.Conv2d(3, 4, 3).to(device(), BF16, memory_format=torch.channels_last)
    model = DistributedDataParallel(module, gradient_as_bucket_view=gradient_as_bucket_view)
    acc = accumkern.attach(torch.optim.SGD(module.parameters()), "split32")
    acc.reduce_in_fp32(model)
    truth = fp64_sums(module.parameters())
    for n in range(3):
        generator = torch.Generator().manual_seed(10 * dist.get_rank() + n)
        with model.no_sync() if n < 2 else nullcontext():
            model(torch.randn(2, 3, 6, 6, generator=generator).to(device(), BF16)).float().sum().backward()
    for p, total in zip(module.parameters(), truth, strict=True):
        dist.all_reduce(total)
        assert relative_error([acc.gradient(p) * dist.get_world_size()], [total]) < 1e-6


@pytest.mark.parametrize("gradient_as_bucket_view", [False, True], ids=["buckets apart", "bucket views"])
def test_mean_in_fp32_of_channels_last(ranks: Ranks, gradient_as_bucket_view: bool) -> None:
    ranks.run(mean_in_fp32_of_channels_last, gradient_as_bucket_view)


def reduction_of_others() -> None:
    """float32 parameters have the bits of stock, parameters of no accumulator are reduced too."""
    results = []
    for attached in (False, True):
        module = net(torch.float32, {})
        model = DistributedDataParallel(module)
        optimizer = torch.optim.SGD(module.a.parameters())
        if attached:
            accumkern.attach(optimizer).reduce_in_fp32(model)
        run_window(model, module, 0, 4, True)
        results.append([p.grad for p in module.parameters()])
    assert all(map(torch.equal, *results))
    module = net(BF16, {})
    acc = accumkern.attach(torch.optim.SGD(module.a.parameters()))
    model = DistributedDataParallel(module)
    with pytest.raises(TypeError, match="model is a Net; it must be a DistributedDataParallel"):
        acc.reduce_in_fp32(module)
    acc.reduce_in_fp32(model)
    with pytest.raises(RuntimeError, match=r"model has a communication hook already: reduce_in_fp32\(\) was called"):
        acc.reduce_in_fp32(model)
    truth = fp64_sums(module.parameters())
    run_window(model, module, 0, 2, True)
    for total in truth:
        dist.all_reduce(total)
    assert relative_error([p.grad * dist.get_world_size() for p in module.parameters()], truth) < 1e-2


def test_reduction_of_other_parameters(ranks: Ranks) -> None:
    ranks.run(reduction_of_others)


# ---- bucket views and a backward pass inside another --------------------------------------------------------------


class Checkpointed(nn.Module):
    """Segments that are computed again in a backward pass of their own, inside the one that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.segments = nn.ModuleList(nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)) for _ in range(3))
        self.last = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for segment in self.segments:
            y = y + checkpoint(segment, y, use_reentrant=True)
        return self.last(y)


def checkpointed(way: dict[str, Any], in_fp32: bool) -> None:
    torch.manual_seed(1)
    module = Checkpointed().to(device(), BF16)
    model = DistributedDataParallel(module, **way)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    acc = accumkern.attach(optimizer, "split32")
    if in_fp32:
        acc.reduce_in_fp32(model)
    model(micro_batch(9, 0).to(BF16)).float().sum().backward()
    truth = fp64_sums(module.parameters())
    in_hook: dict[Tensor, Tensor] = {}  # this rank's sum, right before it is reduced
    for p in module.parameters():
        p.register_post_accumulate_grad_hook(lambda p: in_hook.update({p: acc.gradient(p)}))
    for window in range(3):
        optimizer.zero_grad(set_to_none=False)  # .grad stays a view of the bucket
        for total in truth:
            total.zero_()
        for n in range(6):
            with model.no_sync() if n < 5 else nullcontext():
                model(micro_batch(window, n).to(BF16)).float().sum().backward()
            errors = [relative_error([in_hook[p]], [t]) for p, t in zip(module.parameters(), truth, strict=True)]
            assert max(errors) < 1e-6, (window, n, errors)
        if in_fp32:
            for total in truth:
                dist.all_reduce(total)
                total /= dist.get_world_size()
            assert relative_error([acc.gradient(p) for p in module.parameters()], truth) < 1e-6, window


@pytest.mark.parametrize("in_fp32", [False, True], ids=["bfloat16", "FP32"])
@pytest.mark.parametrize("static_graph", [False, True], ids=["", "static graph"])
def test_bucket_views_and_reentrant_checkpointing(ranks: Ranks, in_fp32: bool, static_graph: bool) -> None:
    way = {"gradient_as_bucket_view": True, "static_graph": static_graph}
    ranks.run(checkpointed, way, in_fp32)


# ---- report -------------------------------------------------------------------------------------------------------


def reports(way: dict[str, Any], in_fp32: bool, set_to_none: bool) -> None:
    """The report is of this rank's sum, whatever DistributedDataParallel puts into ``.grad``."""
    module = net(BF16, way)
    alone = copy.deepcopy(module)
    model = wrap(module, way) if not in_fp32 else DistributedDataParallel(module, **way)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.0) for m in (module, alone)]
    acc, acc_alone = (accumkern.attach(optimizer, "split32", report=True) for optimizer in optimizers)
    if in_fp32:
        acc.reduce_in_fp32(model)
        run_window(model, module, 0, 1, no_sync=False)
    for window in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
        run_window(model, module, window, 9, True)
        run_window(alone, alone, window, 9, False)
        ours, theirs = acc.report(), acc_alone.report()
        assert ours.error < 1e-6
        assert [row.micro_batches for row in ours.parameters] == [row.micro_batches for row in theirs.parameters]
        assert ours == theirs


@pytest.mark.parametrize("in_fp32", [False, True], ids=["bfloat16", "FP32"])
@ways
@set_to_none
def test_report_is_of_this_ranks_sum(ranks: Ranks, way: dict[str, Any], in_fp32: bool, set_to_none: bool) -> None:
    ranks.run(reports, way, in_fp32, set_to_none)


# ---- ranks of unequal numbers of windows: join() ------------------------------------------------------------------


def join_windows(way: dict[str, Any], join: dict[str, Any], left: str) -> list[float]:
    """Return the error of each window's mean on this rank, of four windows on rank 0 and two on rank 1.

    A rank that has joined contributes zeros to the windows of the other: not what it left in ``.grad``.
    """
    module = net(BF16, way)
    model = DistributedDataParallel(module, **way)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    acc = accumkern.attach(optimizer, "split32")
    acc.reduce_in_fp32(model)
    truth = fp64_sums(module.parameters())
    own, found = [], []
    windows = 2 if dist.get_rank() == 1 else 4
    with model.join(**join):
        for window in range(windows):
            run_window(model, module, window, 5 + window, True)
            own.append([total.clone() for total in truth])
            found.append([None if p.grad is None else acc.gradient(p) for p in module.parameters()])
            for total in truth:
                total.zero_()
            if left != "means" or window < windows - 1:
                optimizer.zero_grad()
        if left == "sums" and dist.get_rank() == 1:  # of a window that has no end
            with model.no_sync():
                run_window(model, module, 2, 3, False)
        last = [None if p.grad is None else (p.grad.clone(), acc.gradient(p)) for p in module.parameters()]
    for p, before in zip(module.parameters(), last, strict=True):
        assert (p.grad is None) == (before is None)
        if before is not None:  # nothing of a rank that has joined is changed
            assert torch.equal(p.grad, before[0])
            assert torch.equal(acc.gradient(p), before[1])
    errors = []
    for window in range(4):
        sums = own[window] if window < len(own) else [torch.zeros_like(total) for total in truth]
        there = torch.tensor(float(window < len(own)), device=device())
        dist.all_reduce(there)
        divide_by = dist.get_world_size() if join.get("divide_by_initial_world_size", True) else int(there)
        for total in sums:
            dist.all_reduce(total)
        if window < len(found):
            grads = [torch.zeros_like(t) if g is None else g for g, t in zip(found[window], sums, strict=True)]
            errors.append(relative_error(grads, [total / divide_by for total in sums]))
    return errors


@pytest.mark.parametrize("left", ["nothing", "means", "sums"])
@pytest.mark.parametrize("join", [{}, {"divide_by_initial_world_size": False}], ids=["all ranks", "ranks there"])
@pytest.mark.parametrize("way", [w for w in WAYS.values() if "static_graph" not in w], ids=str)
def test_ranks_of_unequal_numbers_of_windows(
    ranks: Ranks, way: dict[str, Any], join: dict[str, Any], left: str
) -> None:
    for errors in ranks.run(join_windows, way, join, left):
        assert max(errors) < 1e-6, errors


# ---- after detach() -----------------------------------------------------------------------------------------------


def stock_after_detach(dtype: torch.dtype, way: dict[str, Any], ending: str) -> None:
    results = []
    for attached in (False, True):
        module = net(dtype, way)
        model = DistributedDataParallel(module, **way)
        optimizer = torch.optim.SGD(module.parameters())
        if attached:
            acc = accumkern.attach(optimizer)
            acc.reduce_in_fp32(model)
        run_window(model, module, 0, 3, True)
        optimizer.zero_grad()
        if attached and ending == "detach":
            acc.detach()
        if attached and ending == "garbage":
            del acc
            optimizer = None
            gc.collect()
        run_window(model, module, 1, 5, True)
        results.append([None if p.grad is None else p.grad.clone() for p in module.parameters()])
        if attached and ending == "detach":
            again = accumkern.attach(optimizer, "split32")
            again.reduce_in_fp32(model)
            optimizer.zero_grad()
            truth = fp64_sums(module.parameters())
            run_window(model, module, 2, 5, True)
            for total in truth:
                dist.all_reduce(total)
            means = [total / dist.get_world_size() for total in truth]
            found = [
                torch.zeros_like(m) if p.grad is None else again.gradient(p)
                for p, m in zip(module.parameters(), means, strict=True)
            ]
            assert relative_error(found, means) < 1e-6
    for stock, ours in zip(*results, strict=True):
        assert (stock is None) == (ours is None)
        assert stock is None or torch.equal(stock, ours)


@pytest.mark.parametrize("ending", ["detach", "garbage"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("way", [WAYS["default"], WAYS["find unused, bucket views"]], ids=["default", "views"])
def test_a_detached_accumulator_leaves_the_bits_of_stock(
    ranks: Ranks, dtype: torch.dtype, way: dict[str, Any], ending: str
) -> None:
    """With three ranks, because 1 / 3 rounds."""
    ranks.run(stock_after_detach, dtype, way, ending, ranks=3)


def copies() -> None:
    """Copies and pickles of a model have no communication hook, and know of none."""
    module = net(BF16, {})
    model = DistributedDataParallel(module)
    accumkern.attach(torch.optim.SGD(module.parameters())).reduce_in_fp32(model)
    copied = copy.deepcopy(model)
    for other in (copied, pickle.loads(pickle.dumps(model))):
        acc = accumkern.attach(torch.optim.SGD(other.parameters()))
        x = micro_batch(0, 0).to(BF16)
        acc.backward(lambda part, other=other: other(part).float().mean(), x, model=other)
        acc.reduce_in_fp32(other)
        run_window(other, other.module, 0, 3, True)


def test_copies_of_a_model_have_no_hook(ranks: Ranks) -> None:
    ranks.run(copies)


def without_buckets() -> None:
    module = net(BF16, {})
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        model = DistributedDataParallel(module)
    acc = accumkern.attach(torch.optim.SGD(module.parameters()))
    with pytest.raises(RuntimeError, match="python_reducer', whose hooks get no buckets; reduce_in_fp32"):
        acc.reduce_in_fp32(model)


def test_a_reducer_without_buckets_is_refused(ranks: Ranks) -> None:
    ranks.run(without_buckets)


def other_hooks() -> None:
    module = net(BF16, {})
    model = DistributedDataParallel(module)
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    acc = accumkern.attach(torch.optim.SGD(module.parameters()))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="model has a communication hook already"):
            acc.reduce_in_fp32(model)
    model = DistributedDataParallel(module)
    acc.reduce_in_fp32(model)
    models = weakref.ref(model)
    del model
    assert models() is None  # no circle


def test_a_communication_hook_of_somebody_else_is_an_error(ranks: Ranks) -> None:
    ranks.run(other_hooks)


# ---- a rank that dies ---------------------------------------------------------------------------------------------


def survive(in_fp32: bool) -> str:
    """Return the error of the rank that is left, after seeing that zero_grad() repairs."""
    module = net(BF16, {})
    model = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(module.parameters())
    acc = accumkern.attach(optimizer, "split32")
    if in_fp32:
        acc.reduce_in_fp32(model)
    run_window(model, module, 0, 3, True)
    if dist.get_rank() == 1:
        os._exit(1)
    optimizer.zero_grad()
    message = ""
    try:
        run_window(model, module, 1, 3, True)
    except RuntimeError as error:
        message = str(error)
    optimizer.zero_grad()
    alone = net(BF16, {})
    acc_alone = accumkern.attach(torch.optim.SGD(alone.parameters()), "split32")
    run_window(module, module, 2, 5, False)
    run_window(alone, alone, 2, 5, False)
    for p, q in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.equal(acc.gradient(p), acc_alone.gradient(q))
    raise RuntimeError(f"as it should: {message}")


@pytest.mark.parametrize("in_fp32", [False, True], ids=["bfloat16", "FP32"])
def test_a_rank_that_dies_is_an_error_and_zero_grad_repairs(in_fp32: bool) -> None:
    processes = Ranks("gloo")
    (_, left), dead = processes.outcomes(survive, in_fp32, ranks=2)
    assert dead == (False, "the process died")
    assert re.search(r"RuntimeError: as it should: .*(closed by peer|reset by peer|Broken pipe)", left), left


def dies(folder: str, times: int) -> int:
    """End the process of rank 1 as a crash does, so many times."""
    dist.barrier()
    seen = len(os.listdir(folder))
    dist.barrier()
    if dist.get_rank() == 1 and seen < times:
        with open(os.path.join(folder, str(seen)), "w"):
            os._exit(1)
    dist.barrier()
    return seen


def test_ranks_begin_again_after_a_crash(tmp_path: Path) -> None:
    processes = Ranks("gloo")
    with pytest.warns(UserWarning, match="a rank died in dies, which was begun again"):
        assert processes.run(dies, str(tmp_path), 1) == [1, 1]
    processes.stop()


@pytest.mark.filterwarnings("ignore:a rank died in dies")
def test_ranks_that_crash_again_have_failed(tmp_path: Path) -> None:
    processes = Ranks("gloo")
    with pytest.raises(pytest.fail.Exception, match="rank 1: the process died"):
        processes.run(dies, str(tmp_path), 2)


def dies_later() -> None:
    """End the process when its call is over."""
    threading.Timer(0.5, os._exit, [1]).start()


def test_ranks_begin_again_after_a_crash_between_two_calls() -> None:
    processes = Ranks("gloo")
    processes.run(dies_later)
    for process in processes._processes:
        process.join(60)
    with pytest.warns(UserWarning, match="a rank died after its last call"):
        assert processes.run(dist.get_world_size) == [2, 2]
    processes.stop()
