"""fully_shard (FSDP2), unchanged: gradients are folded on the shards of each rank, in every policy."""

from __future__ import annotations

import copy
import io
import types
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from tiny import relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

import accumkern
from accumkern.fold import Fold
from accumkern.formats import divide
from accumkern.sharded import RunningShard

pytestmark = pytest.mark.integration("fully_shard (FSDP2)")

BF16 = torch.bfloat16
MICRO_BATCHES = 20


class Net(nn.Module):
    """Layers whose first dimensions do not divide evenly among the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in ((12, 23), (23, 23), (23, 3)))
        self.norm = nn.LayerNorm(23)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.norm(torch.tanh(layer(x)))
        return self.layers[-1](x)


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(1)
    return Net().to(device(), dtype)


def sharded(module: Net, **ways: Any) -> Net:
    for layer in module.layers:
        fully_shard(layer, **ways)
    return fully_shard(module, **ways)


def micro_batch(n: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * (dist.get_rank() if rank is None else rank) + n)
    return (torch.randn(6, 12, generator=generator) + 0.5).to(device())


def run_window(model: nn.Module, dtype: torch.dtype, count: int, first: int = 0, no_sync: bool = False) -> None:
    for n in range(first, first + count):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(not no_sync or n == first + count - 1)
        model(micro_batch(n).to(dtype)).float().sum().backward()


# ---- a window -----------------------------------------------------------------------------------------------------


def reduced_gradients(dtype: torch.dtype, ways: dict[str, Any], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the FP64 sum and the stock sum of what fully_shard reduces from each micro-batch."""
    model = sharded(net(dtype), **ways)
    params = list(model.parameters())
    truth = [torch.zeros(p.shape, dtype=torch.float64, device=device()) for p in params]
    for n in range(count):
        run_window(model, dtype, 1, n)
        for total, p in zip(truth, params, strict=True):
            total += full(p.grad)
            p.grad = None
    run_window(model, dtype, count)
    return truth, [full(p.grad) for p in params]


def each_micro_batch(dtype: torch.dtype, ways: dict[str, Any], buffer: str, offload: bool) -> None:
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    ways = {**ways, **policy}
    truth, stock = reduced_gradients(dtype, ways, MICRO_BATCHES)
    model = sharded(net(dtype), **ways)
    params = list(model.parameters())
    acc = accumkern.attach(torch.optim.AdamW(params), buffer)
    for window in range(2):
        for n in range(MICRO_BATCHES if window else 3):
            run_window(model, dtype, 1, n)
            assert all(isinstance(p.grad, DTensor) and p.grad.dtype is p.dtype for p in params)
        if window == 0:
            model.zero_grad()
            continue
        found = [full(p.grad) for p in params]
        wide = [full(acc.gradient(p)) for p in params]
        if dtype is torch.float32:
            assert all(map(torch.equal, found, stock))
        else:
            assert relative_error(found, truth) * 2 < relative_error(stock, truth)
            assert relative_error(wide, truth) < (1e-4 if buffer == "split24" else 1e-7)
            assert all(bool(((w - f).abs() <= 2**-8 * w.abs()).all()) for w, f in zip(wide, found, strict=True))


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
def test_bfloat16(ranks: Ranks, buffer: str, reshard: bool) -> None:
    ranks.run(each_micro_batch, BF16, {"reshard_after_forward": reshard}, buffer, False)


@pytest.mark.parametrize("policy", [(None, torch.float32), (BF16, torch.float32), (BF16, BF16), (None, None)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_mixed_precision_policies(ranks: Ranks, dtype: torch.dtype, policy: tuple[Any, Any]) -> None:
    mp_policy = MixedPrecisionPolicy(param_dtype=policy[0], reduce_dtype=policy[1], cast_forward_inputs=True)
    ranks.run(each_micro_batch, dtype, {"mp_policy": mp_policy}, "split24", False)


def test_parameters_on_the_cpu(ranks: Ranks) -> None:
    """Without pinned memory, which needs a GPU; CPUOffloadPolicy's default is in test_gpu.py."""
    ranks.run(each_micro_batch, BF16, {}, "split24", True)


def copies_waited_for(is_pinned: bool, average_over: float | None) -> list[str]:
    """Return, in order, each fold of a first micro-batch and each wait for a copy from a GPU, which is not there."""
    events: list[str] = []
    stream = types.SimpleNamespace(synchronize=lambda: events.append("wait"))
    many = Fold.many
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_stream", lambda *_: stream)
        if is_pinned:  # as fully_shard's copies are, of a gradient that a GPU has made
            patch.setattr(Tensor, "is_pinned", lambda *_: True)
        patch.setattr(Fold, "many", lambda *args: (events.append(str(args[-1].name)), many(*args))[1])
        model = sharded(net(BF16), offload_policy=CPUOffloadPolicy(pin_memory=False))
        acc = accumkern.attach(torch.optim.SGD(model.parameters()), average_over=average_over)
        run_window(model, BF16, 2)
        acc.detach()
    return events


@pytest.mark.parametrize("is_pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("average_over", [2, None], ids=["average", "sum"])
def test_a_gradient_on_its_way_from_a_gpu_is_waited_for(
    ranks: Ranks, is_pinned: bool, average_over: float | None
) -> None:
    """Under torch 2.10 and 2.11 the copy is under way when fully_shard calls the hooks."""
    if ranks.backend != "gloo":
        pytest.skip("gradients that are never on a GPU need gloo")
    wait = ["wait"] if is_pinned else []
    first = [*wait, "FROM_ZERO"] if average_over else []
    second = ["CONTINUE" if average_over else "FROM_SUM"]
    for events in ranks.run(copies_waited_for, is_pinned, average_over):
        params = len(list(Net().parameters()))
        assert sorted(events) == sorted((first + second) * params)
        assert events[: len(first) * params] == first * params


# ---- no sync: fully_shard accumulates whole gradients by itself ---------------------------------------------------


def without_sync(reduce_dtype: torch.dtype | None) -> tuple[float, float]:
    """Return the errors of the gradient after a window in which only the last micro-batch reduces: stock, attached."""
    ways = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce_dtype)}
    truth, _ = reduced_gradients(BF16, ways, MICRO_BATCHES)
    errors = []
    for attached in (False, True):
        model = sharded(net(BF16), **ways)
        optimizer = torch.optim.AdamW(model.parameters())
        acc = accumkern.attach(optimizer) if attached else None
        for _ in range(2):
            optimizer.zero_grad()
            run_window(model, BF16, MICRO_BATCHES, no_sync=True)
        errors.append(relative_error([full(p.grad) for p in model.parameters()], truth))
        del acc
    return errors[0], errors[1]


def test_without_sync_the_reduce_dtype_decides(ranks: Ranks) -> None:
    """fully_shard then adds whole gradients itself, in `reduce_dtype`, and what it reduces is added by us."""
    for stock, ours in ranks.run(without_sync, torch.float32):
        assert ours == stock < 3e-3  # one rounding to bfloat16
    for stock, ours in ranks.run(without_sync, None):
        assert ours == stock  # no better and no worse: its sum is stock PyTorch's, in bfloat16


def windows_in_parts() -> None:
    """A window of four reductions, each of sixteen micro-batches."""
    ways = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    model, plain = sharded(net(BF16), **ways), sharded(net(BF16), **ways)
    acc = accumkern.attach(torch.optim.AdamW(model.parameters()), "split32")
    sums = [torch.zeros(p.shape, device=device()) for p in plain.parameters()]
    for part in range(4):
        run_window(model, BF16, 16, 16 * part, no_sync=True)
        run_window(plain, BF16, 16, 16 * part, no_sync=True)
        for total, p in zip(sums, plain.parameters(), strict=True):
            total += full(p.grad)
            p.grad = None
    assert all(map(torch.equal, [full(acc.gradient(p)) for p in model.parameters()], sums))


def test_several_reductions_in_a_window_add_up_in_fp32(ranks: Ranks) -> None:
    ranks.run(windows_in_parts)


# ---- what belongs to the promise ----------------------------------------------------------------------------------


def scaled_sums(zero: str) -> None:
    model, plain = sharded(net(BF16)), sharded(net(BF16))
    optimizer = torch.optim.SGD(model.parameters())
    acc = accumkern.attach(optimizer, "split32", average_over=3)
    for window in range(3):
        if window == 2:
            acc.scale = torch.tensor(0.75, device=device())
        factor = torch.tensor(1 / 3 if window < 2 else 0.75)
        sums = [torch.zeros(p.shape, device=device()) for p in plain.parameters()]
        for n in range(5):
            run_window(model, BF16, 1, n)
            run_window(plain, BF16, 1, n)
            for total, p in zip(sums, plain.parameters(), strict=True):
                total.copy_(total.double() + full(p.grad).double() * factor.double())  # fma, to the last bit or nearly
                p.grad = None
        for p, total in zip(model.parameters(), sums, strict=True):
            torch.testing.assert_close(full(acc.gradient(p)), total, rtol=3e-7, atol=1e-7)
        if zero == "optimizer":
            optimizer.zero_grad()
        elif zero == "model, to zero":
            model.zero_grad(set_to_none=False)
        else:
            for p in model.parameters():
                p.grad.zero_()


@pytest.mark.parametrize("zero", ["optimizer", "model, to zero", "by hand"])
def test_scale_and_every_way_to_begin_a_window(ranks: Ranks, zero: str) -> None:
    ranks.run(scaled_sums, zero)


def edits() -> None:
    model = sharded(net(BF16))
    acc = accumkern.attach(torch.optim.SGD(model.parameters()))
    params = list(model.parameters())
    for edit in (
        lambda g: g.mul_(0.5),
        lambda g: g.to_local().mul_(0.5),
        lambda g: g.to_local().__imul__(0.5),
        lambda g: g.copy_(g * 2),
    ):
        model.zero_grad()
        run_window(model, BF16, 3)
        assert any(not torch.equal(full(acc.gradient(p)), full(p.grad).float()) for p in params)
        with torch.no_grad():
            for p in params:
                edit(p.grad)
        assert all(torch.equal(full(acc.gradient(p)), full(p.grad).float()) for p in params)
    local = params[0].grad.to_local()
    before = local.clone()
    local += 1
    assert torch.equal(local, before + 1)
    acc.scale = 0.5  # of the micro-gradients, and not of what is added by hand
    before = local.clone()
    local += 1
    assert torch.equal(local, before + 1)


def test_edits_of_the_gradient_count(ranks: Ranks) -> None:
    ranks.run(edits)


def like_stock_elsewhere() -> None:
    model, stock = sharded(net(BF16)), sharded(net(BF16))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, stock)]
    acc = accumkern.attach(optimizers[0], "fp32")
    for m in (model, stock):
        run_window(m, BF16, 2)  # of two, stock and FP32 round alike
    params = list(model.parameters())
    grads = [p.grad for p in params]
    assert all(type(copy.deepcopy(g.to_local())) is Tensor for g in grads)
    file = io.BytesIO()
    torch.save([g.to_local() for g in grads], file)
    file.seek(0)
    for loaded, g in zip(torch.load(file, weights_only=True), grads, strict=True):
        assert type(loaded) is Tensor
        assert torch.equal(loaded, g.to_local())
    norms = [torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5).full_tensor() for m in (model, stock)]
    assert torch.equal(*norms)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, map(full, model.parameters()), map(full, stock.parameters())))
    # The shards do not keep what they fold with alive, and are tensors like others after detach().
    run_window(model, BF16, 2)
    kept = params[0].grad.to_local()
    reference = weakref.ref(acc._attachment.slots[params[0]])
    acc.detach()
    assert reference() is None
    kept += 1
    for m in (model, stock):
        m.zero_grad()
        run_window(m, BF16, 3)
    assert all(map(torch.equal, (full(p.grad) for p in model.parameters()), (full(p.grad) for p in stock.parameters())))


def test_everything_else_is_as_without(ranks: Ranks) -> None:
    ranks.run(like_stock_elsewhere)


def a_failed_backward() -> None:
    model, stock = sharded(net(BF16)), sharded(net(BF16))
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), "fp32")
    params = [list(m.parameters()) for m in (model, stock)]
    for m in (model, stock):
        run_window(m, BF16, 3)
        x = micro_batch(7).to(BF16).requires_grad_()
        x.register_hook(raise_on_purpose)
        with pytest.raises(ValueError, match="on purpose"):
            m(x).float().sum().backward()
        m.zero_grad()
        run_window(m, BF16, 2)  # of two, stock and FP32 round alike
    for p, q in zip(*params, strict=True):
        assert (p.grad is None) == (q.grad is None)  # fully_shard itself forgets some
        if p.grad is None:
            continue
        assert torch.equal(full(p.grad), full(q.grad))
        assert not torch.equal(full(acc.gradient(p)), full(p.grad).float())


def raise_on_purpose(_: Tensor) -> None:
    raise ValueError("on purpose")


@pytest.mark.skipif(
    torch.__version__.startswith("2.10."),
    reason="fully_shard of torch 2.10 cannot go on after a failed backward pass, without accumkern either",
)
def test_after_a_failed_backward_pass_zero_grad_repairs(ranks: Ranks) -> None:
    ranks.run(a_failed_backward)


# ---- the end of a window ------------------------------------------------------------------------------------------


def norms(dtype: torch.dtype, mesh_shape: tuple[int, ...]) -> None:
    mesh = init_device_mesh(device().type, mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    model = sharded(net(dtype), mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters())
    acc = accumkern.attach(optimizer, "split32")
    for norm_type in (2.0, 1.0, 3.0, float("inf")):
        for max_norm in (None, 0.25):
            optimizer.zero_grad()
            run_window(model, dtype, 5)
            wide = [divide(full(acc.gradient(p)), 7.0) for p in model.parameters()]
            truth = torch.linalg.vector_norm(torch.cat([w.flatten() for w in wide]).double(), norm_type)
            finished = acc.finish(divide_by=torch.tensor(7, device=device()), max_norm=max_norm, norm_type=norm_type)
            torch.testing.assert_close(finished.norm.double(), truth, rtol=1e-6, atol=0)
            for p, w in zip(model.parameters(), wide, strict=True):
                assert torch.equal(full(p.grad), (w * finished.clip_coefficient).to(dtype))
    optimizer.zero_grad()
    run_window(model, dtype, 2)
    if mesh.get_local_rank("shard") == mesh.size(-1) - 1:
        next(model.parameters()).grad.to_local()[-1] = float("nan")
    for norm_type in (2.0, float("inf")):
        acc._rooms.finished_at = -1
        assert bool(acc.finish(norm_type=norm_type).found_nonfinite)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_the_norm_is_of_all_shards(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks.run(norms, dtype, (2,), at_least=2)


def test_the_norm_counts_replicas_once(ranks: Ranks) -> None:
    ranks.run(norms, BF16, (2, 2), ranks=4, at_least=4)


# ---- what is refused ----------------------------------------------------------------------------------------------


def refusals() -> None:
    model = sharded(net(BF16))
    optimizer = torch.optim.SGD(model.parameters())
    for argument in ("stats", "report"):
        with pytest.raises(TypeError, match=rf"parameter 0 .* is a DTensor.*without {argument}=True"):
            accumkern.attach(optimizer, **{argument: True})
    for flat in (True, False):
        older = FullyShardedDataParallel(net(BF16), use_orig_params=not flat, device_id=device())
        with pytest.raises(TypeError, match="fully_shard"):
            accumkern.attach(torch.optim.SGD(older.parameters()))
    run_window(model, BF16, 1)
    assert all(p._post_accumulate_grad_hooks in (None, {}) for p in model.parameters())


def test_refusals_name_the_reason(ranks: Ranks) -> None:
    ranks.run(refusals)


def another_torch() -> None:
    model = sharded(net(BF16))
    optimizer = torch.optim.SGD(model.parameters())  # it keeps the accumulator alive
    accumkern.attach(optimizer)
    run_window(model, BF16, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningShard, "__iadd__", Tensor.add_)
        with pytest.raises(RuntimeError, match=r"in a way that accumkern does not know"):
            run_window(model, BF16, 1)


def test_an_addition_that_was_not_folded_is_an_error(ranks: Ranks) -> None:
    """As if a later torch added in another way."""
    ranks.run(another_torch)
