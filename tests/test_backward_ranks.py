"""``acc.backward`` on several ranks, where memory runs out on one of them: nobody waits, nothing is lost or doubled."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from scarce import Scarce
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import accumkern

BF16, FP32 = torch.bfloat16, torch.float32
PLENTY = 10**9
wheres = pytest.mark.parametrize("where", ["forward", "backward"])


class Net(nn.Module):
    """Layers around one that takes so many samples and no more; one that only the first rank uses, one that none does.

    Gradients arrive after memory has run out in its backward pass, and before.
    """

    def __init__(self, scarce: Scarce, has_unused: bool = False, has_norm: bool = False) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 1)
        self.scarce, self.drop = scarce, nn.Dropout(0.2)
        self.norm = nn.BatchNorm1d(9) if has_norm else nn.Identity()
        self.sometimes, self.never = (nn.Linear(9, 9), nn.Linear(2, 2)) if has_unused else (None, None)
        self.checkpoints = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(torch.tanh(self.first(x)))
        y = checkpoint(self.body, y, use_reentrant=False) if self.checkpoints else self.body(y)
        if self.sometimes is not None and dist.get_rank() == 0:
            y = y + self.sometimes(y)
        return self.last(y)

    def body(self, y: Tensor) -> Tensor:
        return torch.tanh(self.middle(self.scarce(torch.tanh(self.middle(self.norm(y))))))


def net(most: int = PLENTY, where: str = "forward", dtype: torch.dtype = FP32, rank: int = 1, **has: bool) -> Net:
    """Return a network that takes `most` samples on one rank, and all on the others."""
    torch.manual_seed(1)
    return Net(Scarce(most if dist.get_rank() == rank else PLENTY, where), **has).to(device(), dtype)


def batch_of(samples: int, dtype: torch.dtype = FP32, rank: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * (dist.get_rank() if rank is None else rank) + samples)
    x, y = torch.randn(samples, 6, generator=generator), torch.randn(samples, 1, generator=generator)
    return x.to(device(), dtype), y.to(device())


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda part: F.mse_loss(model(part[0]).float(), part[1])


def attached(model: nn.Module, buffer: str = "split24") -> accumkern.GradAccumulator:
    return accumkern.attach(torch.optim.SGD(model.parameters(), lr=0.1), buffer)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def bits(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else full(p.grad).clone() for p in model.parameters()]


def assert_equal(found: list[Tensor | None], right: list[Tensor | None]) -> None:
    for one, other in zip(found, right, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def assert_same_on_all_ranks(tensors: list[Tensor | None]) -> None:
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, tensors)
    for other in of_ranks:
        assert_equal(other, of_ranks[0])


def of_all(samples: list[int]) -> tuple[list[Tensor | None], Tensor]:
    """Return gradient and loss of the batches of all ranks as one, in FP64."""
    model = net().double().eval()
    batches = [batch_of(of_rank, rank=rank) for rank, of_rank in enumerate(samples)]
    x, y = (torch.cat(parts).double() for parts in zip(*batches, strict=True))
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return [p.grad for p in model.parameters()], loss.detach()


def assert_near_all(model: nn.Module, loss: Tensor, samples: list[int]) -> None:
    gradients, loss_of_all = of_all(samples)
    for found, right in zip(bits(model), gradients, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-7)
    dist.all_reduce(loss)
    torch.testing.assert_close(loss.double() / dist.get_world_size(), loss_of_all, rtol=1e-6, atol=0)


# ---- DistributedDataParallel -------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "bucket views": {"gradient_as_bucket_view": True},
    "find unused": {"find_unused_parameters": True},
    "static graph": {"static_graph": True},
    "static graph, bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 0.001},
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def replicated(module: Net, **way: Any) -> DistributedDataParallel:
    """Return the wrapped module, after a window as in stock PyTorch: its buckets wait to be made anew."""
    model = DistributedDataParallel(module, **way)
    scarce, module.scarce = module.scarce, Scarce(PLENTY)
    model(batch_of(2, next(module.parameters()).dtype)[0]).float().sum().backward()
    model.zero_grad()
    module.scarce = scarce
    return model


def ddp_against_one_process(where: str) -> None:
    samples = [12, 7]
    module = net(3, where)
    model = replicated(module)
    module.eval()
    acc = attached(module)
    for _ in range(2):
        loss = acc.backward(loss_of(model), batch_of(samples[dist.get_rank()]), model=model)
        assert max(module.scarce.seen[-3:]) == (3 if dist.get_rank() else 12)  # each as its own memory has it
        assert_near_all(model, loss, samples)
        assert_same_on_all_ranks(bits(model))
        model.zero_grad()
        module.scarce.seen.clear()


@wheres
def test_ddp_has_the_gradient_of_all_samples(ranks: Ranks, where: str) -> None:
    ranks.run(ddp_against_one_process, where, at_least=2)


def ddp_against_stock(way: dict[str, Any], dtype: torch.dtype, in_fp32: bool, where: str) -> None:
    samples, most = 8, 2
    models = [replicated(net(most, where, dtype), **way), replicated(net(PLENTY, where, dtype), **way)]
    accs = [attached(m, "split32") for m in models]
    for acc, model in zip(accs, models, strict=True):
        if in_fp32:
            acc.reduce_in_fp32(model)
    for _ in range(3):  # the last two with gradients of the one before
        torch.manual_seed(5)
        accs[0].backward(
            loss_of(models[0]), batch_of(samples, dtype), 2 if dist.get_rank() == 0 else "auto", model=models[0]
        )
        torch.manual_seed(5)
        x, y = batch_of(samples, dtype)
        for i in range(0, samples, 2):
            with models[1].no_sync() if i + 2 < samples else nullcontext():
                (loss_of(models[1])((x[i : i + 2], y[i : i + 2])) * (2 / samples)).backward()
        assert_equal(bits(models[0]), bits(models[1]))
        wide = [[acc.gradient(p) for p in m.parameters()] for acc, m in zip(accs, models, strict=True)]
        assert_equal(*wide)
        if dtype is BF16:
            assert in_fp32 != all(map(torch.equal, wide[0], [g.float() for g in bits(models[0])]))
        assert_same_on_all_ranks(wide[0])
    for model in models:  # and goes on as in stock PyTorch
        model.zero_grad()
        torch.manual_seed(6)
        loss_of(model)(batch_of(2, dtype)).backward()
    assert_equal(bits(models[0]), bits(models[1]))


@ways
@wheres
def test_ddp_has_the_bits_of_stock(ranks: Ranks, way: dict[str, Any], where: str) -> None:
    ranks.run(ddp_against_stock, way, FP32, False, where)


@pytest.mark.parametrize("in_fp32", [False, True], ids=["in bfloat16", "in FP32"])
@pytest.mark.parametrize("views", [False, True], ids=["", "bucket views"])
def test_ddp_has_the_bits_of_a_reduction_in_the_backward_pass(ranks: Ranks, in_fp32: bool, views: bool) -> None:
    ranks.run(ddp_against_stock, {"gradient_as_bucket_view": views}, BF16, in_fp32, "backward", at_least=2)


def ddp_collectives() -> None:
    module = net(2, "backward")
    model = replicated(module, broadcast_buffers=False)
    acc = attached(module)
    calls = []
    real = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(kwargs.get("group")), real(*args, **kwargs))[1]
    try:
        for _ in range(2):
            acc.backward(loss_of(model), batch_of(8), model=model)
    finally:
        dist.all_reduce = real
    assert calls.count(model.process_group) == 2  # of one bucket in two windows


def test_ddp_reduces_once_in_a_window(ranks: Ranks) -> None:
    ranks.run(ddp_collectives, at_least=2)


def ddp_in_no_sync() -> None:
    results = []
    for no_sync in (True, False):
        module = net(2, "backward")
        model = replicated(module)
        acc = attached(module)
        for n in range(2):
            torch.manual_seed(n)
            with model.no_sync() if no_sync and n == 0 else nullcontext():
                acc.backward(loss_of(model), batch_of(8), model=model)
            if no_sync and n == 0:
                own = bits(module)
                of_ranks: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(of_ranks, own)
                assert dist.get_world_size() == 1 or not torch.equal(of_ranks[0][0], of_ranks[1][0])
        results.append(bits(module))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_ddp_in_no_sync_leaves_the_mean_to_a_later_window(ranks: Ranks) -> None:
    ranks.run(ddp_in_no_sync)


class Step(nn.Module):
    """A whole training step inside of a forward pass, as DistributedDataParallel has it in Lightning."""

    def __init__(self, module: Net) -> None:
        super().__init__()
        self.module, self.acc = module, attached(module)

    def forward(self, batch: Any) -> Tensor:
        loss = self.acc.backward(loss_of(self.module), batch, model=self.module)
        self.ddp().require_backward_grad_sync = False  # as Lightning, where a step optimizes by itself
        return loss


def ddp_around() -> None:
    results = []
    for inside in (True, False):
        module = net(2, "backward")
        torch.manual_seed(dist.get_rank())
        if inside:
            step = Step(module)
            model = DistributedDataParallel(step)
            step.ddp = weakref.ref(model)
            model(batch_of(8))
        else:
            model = DistributedDataParallel(module)
            attached(module).backward(loss_of(model), batch_of(8), model=model)
        results.append(bits(module))
    assert_equal(*results)
    assert_same_on_all_ranks(results[0])


def test_ddp_around_the_whole_step(ranks: Ranks) -> None:
    ranks.run(ddp_around)


def lightning() -> None:
    """Train two windows in Lightning, whose DistributedDataParallel is around the step; memory is short on one rank."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(3, "backward").eval()
            self.automatic_optimization = False
            self.batches: list[Any] = []
            self.grads: list[list[Tensor | None]] = []

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
            self.acc = accumkern.attach(optimizer)
            return optimizer

        def training_step(self, batch: Any, _index: int) -> Tensor:
            optimizer = self.optimizers()
            self.batches.append(batch)
            loss = self.acc.backward(loss_of(self.net), batch, model=self, backward=self.manual_backward)
            self.grads.append(bits(self.net))
            optimizer.step()
            optimizer.zero_grad()
            return loss

    model = Model()
    data = torch.utils.data.TensorDataset(*batch_of(48, rank=0))
    whole = copy.deepcopy(model.net)
    whole.scarce = Scarce(PLENTY)
    os.environ["NODE_RANK"] = str(dist.get_rank())
    try:
        strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment())
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="cpu", devices=1, num_nodes=2, strategy=strategy, max_epochs=1, **quiet)
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=12))
    finally:
        del os.environ["NODE_RANK"]
    assert model.net.scarce.seen == ([12, 6, *8 * [3]] if dist.get_rank() else [12, 12])
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, model.batches[0])
    loss_of(whole)([torch.cat(parts) for parts in zip(*of_ranks, strict=True)]).backward()
    for found, right in zip(model.grads[0], bits(whole), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-7)
    assert_same_on_all_ranks(model.grads[1])


def test_ddp_in_lightning(ranks: Ranks) -> None:
    pytest.importorskip("lightning")
    if ranks.backend == "nccl":
        pytest.skip("runs on CPUs")
    ranks.run(lightning)


def ddp_with_unused(dtype: torch.dtype, in_fp32: bool) -> None:
    module = net(3, dtype=dtype, has_unused=True)
    model = DistributedDataParallel(module, find_unused_parameters=True)
    module.eval()
    acc = attached(module)
    if in_fp32:
        acc.reduce_in_fp32(model)
    for _ in range(2):
        acc.backward(loss_of(model), batch_of(6, dtype), model=model)
    assert module.never.weight.grad is None
    assert module.sometimes.weight.grad.any()
    wide = [acc.gradient(p) for p in module.parameters()]
    assert_same_on_all_ranks(wide)
    if dtype is FP32:  # on one rank the layer counts, on the other it adds nothing to the mean
        whole = copy.deepcopy(module)
        whole.zero_grad()
        whole.scarce = Scarce(PLENTY)
        loss_of(whole)(batch_of(6)).backward()
        own = torch.zeros(9, 9, device=device()) if whole.sometimes.weight.grad is None else whole.sometimes.weight.grad
        dist.all_reduce(own)
        torch.testing.assert_close(module.sometimes.weight.grad, own * 2 / dist.get_world_size())


@pytest.mark.parametrize(("dtype", "in_fp32"), [(FP32, False), (BF16, False), (BF16, True)])
def test_ddp_parameters_that_one_rank_uses(ranks: Ranks, dtype: torch.dtype, in_fp32: bool) -> None:
    ranks.run(ddp_with_unused, dtype, in_fp32, at_least=2)


def ddp_buffers() -> None:
    results = []
    for most, lags in ((4, True), (PLENTY, True), (PLENTY, False)):
        module = net(most, has_norm=True)
        model = replicated(module)
        acc = attached(module)
        for _ in range(2):
            torch.manual_seed(7 + dist.get_rank())
            if lags:  # what the first rank has counts, when a window begins
                module.norm.running_mean += dist.get_rank()
            acc.backward(loss_of(model), batch_of(8), "auto" if most == 4 else 8 - 4 * dist.get_rank(), model=model)
        results.append([*bits(model), *(b.clone() for b in module.buffers())])
        with torch.no_grad():
            model.eval()(batch_of(4)[0])  # hands them on, as in stock PyTorch
        assert_same_on_all_ranks(list(module.buffers()))
    for other in results[1:]:
        assert_equal(results[0], other)


def test_ddp_buffers_of_the_failed_try_go_back(ranks: Ranks) -> None:
    ranks.run(ddp_buffers, at_least=2)


def tokens(wrap: str, on_other: int) -> None:
    """Five samples count on the first rank, and so many on the other, whose last parts count nothing."""
    module = net(2, "backward")
    model: Any = sharded(module) if wrap == "fully_shard" else DistributedDataParallel(module)
    module.eval()
    acc = attached(module)
    x, y = batch_of(6)
    mask = torch.zeros(6, 1)
    mask[: (5, on_other)[dist.get_rank()]] = 1

    def loss(part: Any) -> Tensor:
        return ((model(part[0]) - part[1]).square() * part[2]).sum() / part[2].sum()

    found = acc.backward(loss, (x, y, mask.to(device())), model=model, count=lambda part: part[2].sum())
    whole = net().eval()
    parts = [(*batch_of(6, rank=rank), n) for rank, n in zip(range(dist.get_world_size()), (5, on_other), strict=False)]
    right = sum((whole(x[:n]) - y[:n]).square().sum() for x, y, n in parts) / sum(n for *_, n in parts)
    right.backward()
    for one, other in zip(bits(module), bits(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    dist.all_reduce(found)
    torch.testing.assert_close(found / dist.get_world_size(), right.detach())


@pytest.mark.parametrize(
    ("wrap", "on_other"), [("DistributedDataParallel", 1), ("DistributedDataParallel", 0), ("fully_shard", 1)]
)
def test_means_over_what_all_ranks_count(ranks: Ranks, wrap: str, on_other: int) -> None:
    ranks.run(tokens, wrap, on_other, at_least=2)


# ---- fully_shard -------------------------------------------------------------------------------------------------

POLICIES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (FP32, {}),
    "bfloat16": (BF16, {}),
    "mixed": (FP32, {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)}),
    "not resharded": (FP32, {"reshard_after_forward": False}),
    "layers alone": (FP32, {"has_root": False}),
    "in one group": (FP32, {"is_grouped": True}),
    "on the CPU": (FP32, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
}
policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


def sharded(module: Net, has_root: bool = True, is_grouped: bool = False, **way: Any) -> Net:
    layers: list[Any] = [module.first, module.middle, module.last]
    for layer in [layers[:2], layers[2]] if is_grouped else layers:
        fully_shard(layer, **way)
    return fully_shard(module, **way) if has_root else module


def fsdp_against_explicit(
    where: str, policy: Any, checkpoints: bool = False, after: int = 0, is_once: bool = False
) -> None:
    """Compare with a window whose micro-batches were given, which nothing interrupts."""
    dtype, way = policy
    results = []
    for auto in (True, False):
        model = sharded(net(2 if auto else PLENTY, where, dtype), **way)
        model.checkpoints = checkpoints
        model.scarce.after = after
        acc = attached(model, "split32")
        if auto and after:
            acc.micro_batch = 4
        if is_once:
            acc.reduce_in_fp32(model)
        found: list[Tensor | None] = []
        for window in range(3):
            torch.manual_seed(5)
            # what is there from the window before has to go back as well
            samples = "auto" if auto else 2
            acc.backward(loss_of(model), batch_of(8, dtype), samples, model=model, reduce_once=is_once)
            acc.state_dict()  # nothing is left to be reduced
            found += [*bits(model), *(full(acc.gradient(p)) for p in model.parameters())]
            if window == 1:
                model.zero_grad()
        if auto:
            assert acc.micro_batch == 2  # on all ranks
            assert len(model.scarce.seen) > 12 or dist.get_rank() != 1
        results.append(found)
    assert_equal(*results)


@wheres
@policies
def test_fully_shard_has_the_bits_of_micro_batches_that_fit(ranks: Ranks, where: str, policy: Any) -> None:
    ranks.run(fsdp_against_explicit, where, policy, at_least=2)


@wheres
def test_fully_shard_with_checkpointing(ranks: Ranks, where: str) -> None:
    ranks.run(fsdp_against_explicit, where, POLICIES["float32"], True, at_least=2)


WHOLE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bfloat16": POLICIES["bfloat16"],
    "mixed": (FP32, {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16)}),
    "float32": POLICIES["float32"],
}


@wheres
@pytest.mark.parametrize("policy", WHOLE.values(), ids=WHOLE.keys())
@pytest.mark.parametrize("after", [0, 1], ids=["first part", "second part"])
def test_fully_shard_reduces_split_sums_once(ranks: Ranks, where: str, policy: Any, after: int) -> None:
    ranks.run(fsdp_against_explicit, where, policy, False, after, True, at_least=2)


def fsdp_against_one_process(where: str) -> None:
    samples = [12, 6]
    model = sharded(net(3, where)).eval()
    acc = attached(model)
    for _ in range(2):
        loss = acc.backward(loss_of(model), batch_of(samples[dist.get_rank()]), model=model)
        assert_near_all(model, loss, samples)
        model.zero_grad()


@wheres
def test_fully_shard_has_the_gradient_of_all_samples(ranks: Ranks, where: str) -> None:
    ranks.run(fsdp_against_one_process, where, at_least=2)


def fsdp_with_replicas(where: str) -> None:
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("replicate", "shard"))
    samples = [8] * 4
    model = sharded(net(3, where, rank=2), mesh=mesh).eval()
    acc = attached(model)
    for _ in range(2):
        loss = acc.backward(loss_of(model), batch_of(8), model=model)
        assert acc.micro_batch == 2
        assert_near_all(model, loss, samples)
        model.zero_grad()


@pytest.mark.slow
@wheres
def test_fully_shard_with_replicas(ranks: Ranks, where: str) -> None:
    if ranks.backend == "nccl" and torch.cuda.device_count() < 4:
        pytest.skip("needs 4 GPUs")
    ranks.run(fsdp_with_replicas, where, ranks=4)


def fsdp_collectives() -> list[int]:
    """Return how often gradients were reduced, with a reduction in each part, and in the last alone."""
    counts, results = [], []
    for once in (False, True):
        model = sharded(net(2, "backward"))
        acc = attached(model)
        torch.manual_seed(5)
        acc.backward(loss_of(model), batch_of(8), model=model)  # 2 samples fit
        model.zero_grad()
        real, calls = dist.reduce_scatter_tensor, []
        name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        real = getattr(dist, name)
        setattr(dist, name, lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1])  # noqa: B023
        try:
            torch.manual_seed(5)
            acc.backward(loss_of(model), batch_of(8), model=model, reduce_once=once)
        finally:
            setattr(dist, name, real)
        counts.append(len(calls))
        results.append(bits(model))
        model.zero_grad()
        acc.backward(loss_of(model), batch_of(8), model=model)  # as before
        assert all(grad is not None for grad in bits(model))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    return counts


def test_fully_shard_reduces_in_each_part_or_once(ranks: Ranks) -> None:
    for counts in ranks.run(fsdp_collectives, at_least=2):
        # Four parts, three layers; the one that is used twice reduces what it has before its own gradient, and that.
        assert counts == [4 * 3, 3 + 1]


# ---- what is not memory ------------------------------------------------------------------------------------------


def failing(wrap: str, where: str, kind: str) -> tuple[str, str]:
    """Return how a window ends on this rank, and the next one, that nothing interrupts."""
    module = net({"one sample": 0, "given size": 1}.get(kind, PLENTY), where)
    model = sharded(module) if wrap == "fully_shard" else replicated(module)
    acc = attached(module)
    module.scarce.after = 1
    acc.backward(loss_of(model), batch_of(4), model=model)
    before = bits(module)

    def loss(part: Any) -> Tensor:
        found = loss_of(model)(part)
        if dist.get_rank() == 1 and kind == "in loss_fn":
            raise ZeroDivisionError("on purpose")
        if dist.get_rank() == 1 and kind == "in a hook":
            found.register_hook(raise_on_purpose)
        return found

    x, y = batch_of(4)
    if kind == "in an argument" and dist.get_rank() == 1:
        y = y[:3]
    found = error_of(lambda: acc.backward(loss, (x, y), 2 if kind == "given size" else "auto", model=model))
    assert_equal(bits(module), before)
    module.scarce = Scarce(PLENTY)
    kind = "well"
    again = error_of(lambda: acc.backward(loss, batch_of(4), model=model))
    assert_same_on_all_ranks(bits(module))
    return found, again


def raise_on_purpose(_: Tensor) -> None:
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "fully_shard"])
@pytest.mark.parametrize("kind", ["in loss_fn", "in a hook", "in an argument"])
def test_another_error_on_one_rank_ends_all(ranks: Ranks, wrap: str, kind: str) -> None:
    (one, again), (other, again_too) = ranks.run(failing, wrap, "forward", kind, at_least=2)
    own = "ValueError: batch[1] is " if kind == "in an argument" else "ZeroDivisionError: on purpose"
    assert other.startswith(own)
    assert one.startswith(f"RanksError: rank 1 failed in acc.backward() with {own}")
    assert again == again_too == "no error"


@wheres
@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "fully_shard"])
@pytest.mark.parametrize(("kind", "samples"), [("one sample", 1), ("given size", 2)])
def test_memory_that_is_never_enough_on_one_rank_ends_all(
    ranks: Ranks, wrap: str, where: str, kind: str, samples: int
) -> None:
    (one, again), (other, again_too) = ranks.run(failing, wrap, where, kind, at_least=2)
    own = f"OutOfMemoryError: CUDA out of memory. Tried to allocate {samples} samples."
    assert other.startswith(own)
    told = (
        "OutOfMemoryElsewhereError: rank 1 ran out of memory ("
        if wrap == "fully_shard"
        else "RanksError: rank 1 failed in acc.backward() with "
    )
    assert one.startswith(told + own)
    assert again == again_too == "no error"


# ---- memory that runs out anywhere -------------------------------------------------------------------------------


class RunsOut(TorchDispatchMode):
    """Counts the operations between the first forward pass and the end; memory runs out at one of them."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count, self.has_begun = at, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.has_begun and func.namespace != "c10d":  # what a collective allocates itself is not torch's
            self.count += 1
            if self.count == self.at:
                raise torch.OutOfMemoryError(f"out of memory in {func}")
        return func(*args, **(kwargs or {}))


def anywhere(wrap: str, checkpoints: bool, points: int) -> None:
    """Let memory run out at one operation after another, on one rank."""
    module = net(dtype=BF16).eval()
    module.checkpoints = checkpoints
    way = {"mp_policy": MixedPrecisionPolicy(reduce_dtype=FP32)}
    model: Any = sharded(module, **way) if wrap == "fully_shard" else replicated(module)
    acc = attached(module, "split32")
    if wrap != "fully_shard":
        acc.reduce_in_fp32(model)

    def window(at: int, micro_batch: Any) -> tuple[str, int, list[Tensor | None]]:
        module.zero_grad()
        acc.micro_batch = None
        mode = RunsOut(at if dist.get_rank() == 1 else -1)

        def loss(part: Any) -> Tensor:
            mode.has_begun = True
            return loss_of(model)(part)

        with mode:
            found = error_of(lambda: acc.backward(loss, batch_of(8, BF16), micro_batch, model=model))
        return (
            found,
            mode.count,
            [*bits(module), *(None if p.grad is None else full(acc.gradient(p)) for p in module.parameters())],
        )

    none = [None] * 2 * len(list(module.parameters()))
    for _ in range(2):  # the first makes what is kept
        _, count, _ = window(-1, 8)
    smaller = 4 if wrap == "fully_shard" or dist.get_rank() == 1 else 8
    _, _, right = window(-1, smaller)
    again = 0
    for i in range(points):
        at = 1 + i * (count - 1) // (points - 1)
        found, seen, grads = window(at, "auto")
        again += found == "no error"
        if found == "no error":
            assert seen > count or dist.get_rank() != 1, at
            assert_equal(grads, right)
        else:  # while the mean over ranks was taken, after all passes
            assert wrap == "DistributedDataParallel"
            assert "out of memory in" in found
            assert_equal(grads, none)
    assert again > points * 0.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "checkpoints"),
    [("DistributedDataParallel", False), ("fully_shard", False), ("fully_shard", True)],
    ids=["DistributedDataParallel", "fully_shard", "fully_shard, checkpointing"],
)
def test_memory_may_run_out_anywhere(ranks: Ranks, wrap: str, checkpoints: bool) -> None:
    ranks.run(anywhere, wrap, checkpoints, 30, at_least=2)


def never_enough(wrap: str) -> str:
    """Return how a window ends where one rank has no more samples to split, and the other one has."""
    module = net(0)
    model = sharded(module) if wrap == "fully_shard" else replicated(module)
    acc = attached(module)
    return error_of(lambda: acc.backward(loss_of(model), batch_of((8, 2)[dist.get_rank()]), model=model))


@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "fully_shard"])
def test_what_ends_one_rank_is_not_this_ones_memory(ranks: Ranks, wrap: str) -> None:
    one, other = ranks.run(never_enough, wrap, at_least=2)
    assert other.startswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 1 samples.")
    assert one.startswith(f"RanksError: rank 1 failed in acc.backward() with {other}")


def under_a_limit(wrap: str) -> None:
    """Let a limit be what makes memory run out, on one rank."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(6, 2000), nn.Tanh(), nn.Linear(2000, 1))
    model: Any = fully_shard(module) if wrap == "fully_shard" else DistributedDataParallel(module)
    acc = attached(model)
    limit = "600kB" if dist.get_rank() == 1 else None
    acc.backward(loss_of(model), batch_of(64), model=model, memory=limit)
    grads = bits(model)
    model.zero_grad()
    assert (acc.micro_batch is not None) == (dist.get_rank() == 1 or wrap == "fully_shard")
    acc.backward(loss_of(model), batch_of(64), acc.micro_batch or 64, model=model)
    assert_equal(grads, bits(model))


@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "fully_shard"])
def test_a_limit_on_one_rank(ranks: Ranks, wrap: str) -> None:
    if ranks.backend == "nccl":
        pytest.skip("a limit on a GPU's memory is at least what CUDA takes")
    ranks.run(under_a_limit, wrap)


# ---- what is refused ---------------------------------------------------------------------------------------------


def refusals(way: dict[str, Any], spoil: str) -> list[str]:
    """Return errors of what cannot be run on several ranks, and what comes of the next try without it."""
    module = net()
    model: Any = module
    if spoil == "tensor parallel":
        mesh = init_device_mesh(device().type, (dist.get_world_size(),))
        parallelize_module(module, mesh, {"first": ColwiseParallel(), "middle": ColwiseParallel()})
    elif spoil in ("no sync", "reduce_once", "few samples", "counts nothing", "SyncBatchNorm", "not reduced"):
        module.norm = nn.SyncBatchNorm(9) if spoil == "SyncBatchNorm" else module.norm
        model = sharded(module.to(BF16 if spoil == "reduce_once" else FP32))
    elif spoil == "both":
        module.last = DistributedDataParallel(module.last)
        fully_shard(module.first)
    else:
        model = DistributedDataParallel(module, **way)
    acc = attached(module)
    if spoil == "hook":
        model.register_comm_hook(None, default_hooks.allreduce_hook)
    if spoil == "no sync":
        model.set_requires_gradient_sync(False)
    if spoil == "not reduced":
        model.set_requires_gradient_sync(False)
        loss_of(model)(batch_of(2)).backward()
        model.set_requires_gradient_sync(True)
    dtype = module.first.weight.dtype
    x, y = batch_of(4 if spoil != "few samples" or dist.get_rank() == 0 else 1, dtype)
    ways: dict[str, Any] = {"model": None if spoil == "no model" else model, "reduce_once": spoil == "reduce_once"}
    if spoil == "counts nothing":
        ways["count"] = lambda part: 4 * (1 - dist.get_rank())
    with model.join() if spoil == "join" else nullcontext():
        return [error_of(lambda: acc.backward(loss_of(model), (x, y), 1 if spoil == "few samples" else 4, **ways))]


REFUSED = {
    "hook": ({}, "ValueError: model has a communication hook"),
    "static graph": ({"static_graph": True}, "ValueError: model is a DistributedDataParallel with static_graph=True"),
    "join": ({}, "ValueError: model is a DistributedDataParallel with join()"),
    "SyncBatchNorm": ({}, "ValueError: norm is a SyncBatchNorm"),
    "no model": ({}, "ValueError: model is None, and there are 2 ranks"),
    "both": ({}, "ValueError: model has 1 DistributedDataParallel in it, and parameters under fully_shard on 1 meshes"),
    "tensor parallel": ({}, "ValueError: first.weight is spread over ranks as "),
    "no sync": ({}, "ValueError: set_requires_gradient_sync(False) or set_requires_all_reduce(False) is set"),
    "not reduced": ({}, "ValueError: fully_shard keeps gradients of earlier passes that were not reduced"),
    "reduce_once": ({}, "ValueError: reduce_once is True, and fully_shard would add up gradients in torch.bfloat16"),
    "few samples": ({}, "ValueError: the ranks have [4, 1] samples, and one of them needs 4 parts"),
}


@pytest.mark.parametrize("spoil", REFUSED)
def test_refusals(ranks: Ranks, spoil: str) -> None:
    way, right = REFUSED[spoil]
    for (found,) in ranks.run(refusals, way, spoil, at_least=2):
        assert found.startswith(right)


def test_what_counts_nothing_on_one_rank_under_fully_shard_is_refused(ranks: Ranks) -> None:
    (one,), (other,) = ranks.run(refusals, {}, "counts nothing", at_least=2)
    assert other.startswith("ValueError: count returned 0.0 for part 0 of 1; with fully_shard every rank runs the same")
    assert one.startswith("RanksError: rank 1 failed in acc.backward() with ValueError: count returned 0.0")


def sparse() -> str:
    model = DistributedDataParallel(nn.Embedding(4, 3, sparse=True).to(device()))
    acc = attached(model)
    x = torch.zeros(4, dtype=torch.int64, device=device())
    return error_of(lambda: acc.backward(lambda part: model(part).mean(), x, model=model))


def test_sparse_gradients_are_refused(ranks: Ranks) -> None:
    for found in ranks.run(sparse):
        assert found.startswith(
            "TypeError: the gradient of weight is torch.float32 and torch.sparse_coo, and the param"
        )


def alone() -> None:
    """A model that is on no other rank is run as in one process."""
    module = net(2)
    acc = attached(module)
    if dist.get_rank() == 1:
        acc.backward(loss_of(module), batch_of(8), model=module)
        assert acc.micro_batch == 2


def test_a_model_of_one_rank_asks_no_other(ranks: Ranks) -> None:
    ranks.run(alone)


# ---- the last, because it ends processes -------------------------------------------------------------------------


def dying(wrap: str) -> str:
    module = net()
    model: Any = sharded(module) if wrap == "fully_shard" else replicated(module)
    acc = attached(module)

    def loss(part: Any) -> Tensor:
        found = loss_of(model)(part)
        if dist.get_rank() == 1:
            os._exit(1)
        return found

    return error_of(lambda: acc.backward(loss, batch_of(4), model=model))


@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "fully_shard"])
def test_a_rank_that_dies_is_missed(ranks: Ranks, wrap: str) -> None:
    if ranks.backend == "nccl":
        pytest.skip("NCCL ends the other processes")
    (_, one), _ = ranks.outcomes(dying, wrap, ranks=2)
    assert one.startswith("RanksError: rank 1 is gone (its connection closed) in acc.backward(); see its output")
