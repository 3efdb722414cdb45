"""fully_shard (FSDP2) with one reduction for many micro-batches: whole gradients as split sums, reduced in FP32."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from tiny import GRAD_TOLERANCE, TOLERANCE, fp64_sums, relative_error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import accumkern
from accumkern import whole_gradients
from accumkern.fully_shard_private import sharded_groups, sharded_modules

pytestmark = pytest.mark.integration("fully_shard (FSDP2): reduce_in_fp32")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MICRO_BATCHES = 20


class Net(nn.Module):
    """Layers that do not divide evenly among ranks, one used twice, a weight in two of them, and one used at times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in ((12, 23), (23, 23), (23, 3)))
        self.norm = nn.LayerNorm(23)
        self.tied = nn.Linear(23, 23, bias=False)
        self.tied.weight = nn.Parameter(self.layers[1].weight.detach().clone())
        self.again = nn.Linear(23, 23, bias=False)
        self.again.weight = self.tied.weight
        self.rare = nn.Linear(23, 23)
        self.checkpoints = False

    def forward(self, x: Tensor, is_rare: bool = False) -> Tensor:
        x = torch.tanh(self.layers[0](x))
        middle = self.layers[1]
        for _ in range(2):
            x = self.norm(torch.tanh(checkpoint(middle, x, use_reentrant=False) if self.checkpoints else middle(x)))
        x = self.again(torch.tanh(self.tied(x)))
        return self.layers[2](x + self.rare(x) if is_rare else x)


def net(dtype: torch.dtype) -> Net:
    torch.manual_seed(1)
    return Net().to(device(), dtype)


def sharded(module: Any, **ways: Any) -> Any:
    for layer in (*module.layers, module.rare):
        fully_shard(layer, **ways)
    return fully_shard(module, **ways)


def micro_batch(n: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + n)
    return (torch.randn(6, 12, generator=generator) + 0.5).to(device())


def step(model: nn.Module, n: int, dtype: torch.dtype, rank: int | None = None) -> None:
    """Run forward and backward pass of a micro-batch of a rank."""
    x = micro_batch(n, dist.get_rank() if rank is None else rank).to(dtype)
    model(x, is_rare=n % 3 == 0).float().sum().backward()


def run_window(model: Any, dtype: torch.dtype, reduced: set[int], count: int = MICRO_BATCHES) -> None:
    """Run micro-batches, and reduce in some of them."""
    for n in range(count):
        model.set_requires_gradient_sync(n in reduced)
        step(model, n, dtype)
    model.set_requires_gradient_sync(True)


def fp64_means(
    dtype: torch.dtype, compute: torch.dtype, factor: Callable[[int], float] = lambda _: 1.0, count: int = MICRO_BATCHES
) -> list[Tensor]:
    """Return what one process makes of the micro-batches of all ranks: the FP64 sum of all gradients, over ranks."""
    model = net(dtype).to(compute)
    means = [torch.zeros(p.shape, dtype=torch.float64, device=device()) for p in model.parameters()]
    ranks = dist.get_world_size()
    for rank in range(ranks):
        for n in range(count):
            step(model, n, compute, rank)
            for mean, p in zip(means, model.parameters(), strict=True):
                if p.grad is not None:
                    mean += p.grad.double() * factor(n) / ranks
                p.grad = None
    return means


def gradients(model: nn.Module) -> list[Tensor]:
    return [full(p.grad) for p in model.parameters()]


def values(acc: accumkern.GradAccumulator, model: nn.Module) -> list[Tensor]:
    return [full(acc.gradient(p)) for p in model.parameters()]


LAST = {MICRO_BATCHES - 1}

# ---- the sums of one process --------------------------------------------------------------------------------------


def against_one_process(dtype: torch.dtype, ways: dict[str, Any], buffer: str, checkpoints: bool = False) -> None:
    policy = ways.get("mp_policy", MixedPrecisionPolicy())
    compute = policy.param_dtype or dtype
    truth = fp64_means(dtype, compute)
    stock = sharded(net(dtype), **ways)
    run_window(stock, compute, LAST)
    model = sharded(net(dtype), **ways)
    model.checkpoints = checkpoints
    optimizer = torch.optim.SGD(model.parameters())
    acc = accumkern.attach(optimizer, buffer)
    acc.reduce_in_fp32(model)
    for window in range(2):
        optimizer.zero_grad()
        run_window(model, compute, LAST if window else {2}, MICRO_BATCHES if window else 3)
    found = gradients(model)
    assert all(p.grad.dtype is p.dtype for p in model.parameters())
    assert relative_error(values(acc, model), truth) < TOLERANCE["fp32" if compute is dtype is FP32 else buffer]
    assert relative_error(found, truth) < GRAD_TOLERANCE[dtype] + TOLERANCE[buffer]
    of_stock = relative_error(gradients(stock), truth)
    if (policy.reduce_dtype or compute) is BF16:  # in which it adds and reduces
        assert 2 * relative_error(found, truth) < of_stock
        assert 20 * relative_error(values(acc, model), truth) < of_stock
    else:
        assert relative_error(found, truth) < 1.2 * of_stock + TOLERANCE[buffer]


@pytest.mark.parametrize("reduce_dtype", [None, BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [(BF16, None), (FP32, BF16), (FP32, FP16), (FP32, None), (BF16, FP32)], ids=str
)
def test_policies(ranks: Ranks, dtype: torch.dtype, param_dtype: Any, reduce_dtype: Any) -> None:
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    ranks.run(against_one_process, dtype, {"mp_policy": policy}, "split24")


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
@pytest.mark.parametrize(
    "ways",
    [
        {"reshard_after_forward": False},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=FP16)},
    ],
    ids=["keep", "on the CPU", "float16"],
)
def test_buffers_and_ways(ranks: Ranks, buffer: str, ways: dict[str, Any]) -> None:
    ranks.run(against_one_process, FP32 if "mp_policy" in ways else BF16, ways, buffer)


def test_float16_parameters(ranks: Ranks) -> None:
    ranks.run(against_one_process, FP16, {}, "fp32")


def test_activation_checkpointing(ranks: Ranks) -> None:
    ranks.run(against_one_process, BF16, {}, "split32", True)


def against_stock_fp32(dtype: torch.dtype, reduced: set[int]) -> None:
    """Compare bits with fully_shard's own sums in FP32, where split32 holds every number of FP32."""
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
    stock, model = (sharded(net(dtype), mp_policy=policy) for _ in range(2))
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), "split32")
    acc.reduce_in_fp32(model)
    for n in range(MICRO_BATCHES):
        for m in (stock, model):
            m.set_requires_gradient_sync(n in reduced)
            step(m, n, BF16)
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        wide, expected = full(acc.gradient(p)), full(q.grad)
        if dtype is FP32:
            assert torch.equal(wide, expected)
        elif not name.startswith("layers.1"):  # used twice, and reduced twice in a pass: stock has rounded in between
            assert torch.equal(wide.to(dtype), expected)


def test_the_bits_of_sums_in_fp32(ranks: Ranks) -> None:
    ranks.run(against_stock_fp32, BF16, LAST)
    ranks.run(against_stock_fp32, FP32, {0, 7, MICRO_BATCHES - 1})


def several_reductions(mesh_shape: tuple[int, ...]) -> None:
    """A window that begins with a reduction, and has others; with replicas, some of shards alone."""
    mesh = init_device_mesh(device().type, mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    policy = MixedPrecisionPolicy(reduce_dtype=FP32)  # torch's, of what it reduces over shards alone
    truth = fp64_means(BF16, BF16)
    model = sharded(net(BF16), mesh=mesh, mp_policy=policy)
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), "split32")
    acc.reduce_in_fp32(model)
    for window in range(2):
        model.zero_grad()
        for n in range(MICRO_BATCHES):
            is_last = n == MICRO_BATCHES - 1
            model.set_requires_gradient_sync(n in (0, 5, 6) or is_last)
            model.set_requires_all_reduce(window == 0 or is_last)
            step(model, n, BF16)
            if window == 1 and len(mesh_shape) == 2 and not is_last:
                assert all(p.grad is None for p in model.parameters())
        assert relative_error(values(acc, model), truth) < TOLERANCE["split32"]


def test_several_reductions_in_a_window(ranks: Ranks) -> None:
    ranks.run(several_reductions, (2,), at_least=2)


@pytest.mark.slow
def test_replicas(ranks: Ranks) -> None:
    ranks.run(several_reductions, (2, 2), ranks=4, at_least=4)


def scaled(dtype: torch.dtype, reduced: set[int], as_tensor: bool) -> None:
    """Each micro-batch is multiplied by the scale of its own time."""
    factors = [1 / 3, 0.75, 1.5, 0.1]
    truth = fp64_means(dtype, BF16, lambda n: factors[n % 4])
    model = sharded(net(dtype), mp_policy=MixedPrecisionPolicy(param_dtype=BF16))
    optimizer = torch.optim.SGD(model.parameters())
    acc = accumkern.attach(optimizer, "split32", average_over=3)
    acc.reduce_in_fp32(model)
    for _ in range(2):
        optimizer.zero_grad()
        for n in range(MICRO_BATCHES):
            factor = factors[n % 4]
            acc.scale = torch.tensor(factor, device=device()) if as_tensor else factor
            model.set_requires_gradient_sync(n in reduced)
            step(model, n, BF16)
        assert relative_error(values(acc, model), truth) < TOLERANCE["split32"]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("reduced", [LAST, set(range(MICRO_BATCHES)), {0, 7, 19}], ids=["once", "each", "some"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_scale_counts_once(ranks: Ranks, dtype: torch.dtype, reduced: set[int], as_tensor: bool) -> None:
    ranks.run(scaled, dtype, reduced, as_tensor)


def divided() -> None:
    truth = [mean * dist.get_world_size() / 5 for mean in fp64_means(BF16, BF16)]
    model = sharded(net(BF16))
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(5)
            module.set_force_sum_reduction_for_comms(True)
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), "split32")
    acc.reduce_in_fp32(model)
    run_window(model, BF16, LAST)
    assert relative_error(values(acc, model), truth) < TOLERANCE["split32"]


def test_gradient_divide_factor(ranks: Ranks) -> None:
    ranks.run(divided, at_least=2)  # fully_shard divides twice on a single rank


def zeroed() -> None:
    """zero_grad() does not reach whole gradients, as without accumkern."""
    truth = fp64_means(BF16, BF16)
    model = sharded(net(BF16))
    optimizer = torch.optim.SGD(model.parameters())
    acc = accumkern.attach(optimizer, "split32")
    acc.reduce_in_fp32(model)
    for n in range(MICRO_BATCHES):
        model.set_requires_gradient_sync(n == MICRO_BATCHES - 1)
        step(model, n, BF16)
        if n in (0, 7):
            optimizer.zero_grad()
    assert relative_error(values(acc, model), truth) < TOLERANCE["split32"]


def test_zero_grad_leaves_whole_gradients(ranks: Ranks) -> None:
    ranks.run(zeroed)


def of_several_optimizers() -> None:
    """A group of fully_shard has parameters of this accumulator, of another one, and of none."""
    truth = fp64_means(BF16, BF16)
    model = sharded(net(BF16))
    names, params = zip(*model.named_parameters(), strict=True)
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    others = [model.norm.bias, model.layers[0].bias]
    acc = accumkern.attach(torch.optim.SGD(weights), "split32")
    other = accumkern.attach(torch.optim.SGD(others), "split32", average_over=4)
    acc.reduce_in_fp32(model)
    run_window(model, BF16, {9, *LAST})
    for name, p, mean in zip(names, params, truth, strict=True):
        owner = acc if name.endswith("weight") else other if any(p is o for o in others) else None
        found = full(p.grad if owner is None else owner.gradient(p))
        mean = mean / 4 if owner is other else mean
        assert relative_error([found], [mean]) < (TOLERANCE["split32"] if owner is acc else 2 * GRAD_TOLERANCE[BF16])


def test_parameters_of_other_optimizers(ranks: Ranks) -> None:
    ranks.run(of_several_optimizers)


class Branches(nn.Module):
    """Two layers in one group, the second of which only the first rank uses."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor, is_used: bool) -> Tensor:
        return self.always(x) + self.sometimes(x) if is_used else self.always(x)


def used_by_one_rank() -> None:
    torch.manual_seed(1)
    alone, model = Branches().to(device(), BF16), Branches().to(device(), BF16)
    model.load_state_dict(alone.state_dict())
    model = fully_shard(model)
    model.set_reduce_scatter_unused_params(True)
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), "split32")
    acc.reduce_in_fp32(model)
    truth = fp64_sums(alone.parameters())
    for n in range(4):
        for rank in range(dist.get_world_size()):
            alone(micro_batch(n, rank).to(BF16), rank == 0).float().sum().backward()
        model.set_requires_gradient_sync(n in (0, 3))  # of the first, zeros are reduced on the other ranks
        model(micro_batch(n, dist.get_rank()).to(BF16), dist.get_rank() == 0).float().sum().backward()
    means = [total / dist.get_world_size() for total in truth]
    assert relative_error(values(acc, model), means) < TOLERANCE["split32"]


@pytest.mark.skipif(
    not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason=f"torch {torch.__version__} has no such setting"
)
def test_parameters_that_other_ranks_use(ranks: Ranks) -> None:
    ranks.run(used_by_one_rank)


def compiled() -> None:
    truth = fp64_means(BF16, BF16)
    model = sharded(net(BF16))
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), "split32")
    acc.reduce_in_fp32(model)
    run_window(model, BF16, LAST)
    assert relative_error(values(acc, model), truth) < TOLERANCE["split32"]


def test_compiled_layers(ranks: Ranks) -> None:
    ranks.run(compiled)


# ---- what is held -------------------------------------------------------------------------------------------------


def held_bytes(buffer: str | None, param_dtype: Any, expected: int) -> None:
    """Compare the bytes of tensors that come alive in micro-batches; with no buffer, of fully_shard's sums in FP32."""
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=FP32 if buffer is None else None)
    model = sharded(net(BF16 if param_dtype is None else FP32), mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters())
    acc = None if buffer is None else accumkern.attach(optimizer, buffer)
    if acc is not None:
        acc.reduce_in_fp32(model)
    run_window(model, BF16, LAST)
    optimizer.zero_grad()
    before = live_tensors()  # held, so that nothing of them goes meanwhile, such as what other tests have left
    run_window(model, BF16, set(), 4)
    numel = sum(p.numel() for p in model.parameters())
    assert bytes_beside(before) == expected * numel
    if acc is None:
        return
    memory, residuals = acc.memory(), 0 if buffer == "fp32" else expected - 2
    shards = sum(local_bytes(slot.residual) for slot in acc._attachment.slots.values() if slot.residual is not None)
    assert memory.gradients == (expected - residuals) * numel
    assert memory.residuals == residuals * numel + shards
    step(model, 0, BF16)
    optimizer.zero_grad()
    assert bytes_beside(before) == 0


def local_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [t for t in gc.get_objects() if type(t) is Tensor and t.device == device()]


def bytes_beside(before: list[Tensor]) -> int:
    """Return the bytes of what is alive and is not of these tensors, when a further collection frees nothing more."""
    known = {t.untyped_storage()._cdata for t in before}
    found, size = -1, -2
    while size != found:
        found = size
        storages = {t.untyped_storage()._cdata: local_bytes(t) for t in live_tensors()}
        size = sum(bytes_ for storage, bytes_ in storages.items() if storage not in known)
    return size


@pytest.mark.parametrize("param_dtype", [None, BF16], ids=str)
@pytest.mark.parametrize(
    ("buffer", "expected"), [("split24", 3), ("split32", 4), ("fp32", 4), (None, 4)], ids=["3", "4", "fp32", "stock"]
)
def test_bytes_between_micro_batches(ranks: Ranks, buffer: str | None, param_dtype: Any, expected: int) -> None:
    ranks.run(held_bytes, buffer, param_dtype, expected)


def checkpoints() -> None:
    model = sharded(net(BF16))
    optimizer = torch.optim.SGD(model.parameters())
    acc = accumkern.attach(optimizer)
    acc.reduce_in_fp32(model)
    state = acc.state_dict()
    model.set_requires_gradient_sync(False)
    step(model, 0, BF16)
    for ask in (acc.state_dict, lambda: acc.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=r"fully_shard keeps whole gradients that were not reduced"):
            ask()
    model.set_requires_gradient_sync(True)
    step(model, 1, BF16)
    acc.load_state_dict(acc.state_dict())


def test_a_checkpoint_of_what_is_not_reduced_is_refused(ranks: Ranks) -> None:
    ranks.run(checkpoints)


# ---- stock again --------------------------------------------------------------------------------------------------


def like_stock(reduce_dtype: Any, how: str) -> None:
    """fully_shard has its own bits when the accumulator has ended, between windows or in the middle of one."""
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    stock, model = (sharded(net(BF16), mp_policy=policy) for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters())
    acc = accumkern.attach(optimizer, "split32")
    acc.reduce_in_fp32(model)
    run_window(model, BF16, LAST)
    optimizer.zero_grad()
    if how == "detach, with one gradient":  # which neither has rounded
        for m in (stock, model):
            run_window(m, BF16, set(), 1)
    if how == "gone":
        del optimizer, acc
        gc.collect()
    else:
        acc.detach()
        acc.detach()
    for m in (stock, model):
        run_window(m, BF16, {6, *LAST})
    assert all(map(torch.equal, gradients(model), gradients(stock)))
    assert all("post_backward" not in vars(group) for group in groups_of(model))
    another = accumkern.attach(torch.optim.SGD(model.parameters()))
    another.reduce_in_fp32(model)


def groups_of(model: Any) -> list[Any]:
    return sharded_groups(sharded_modules(model))


@pytest.mark.parametrize("how", ["detach", "detach, with one gradient", "gone"])
@pytest.mark.parametrize("reduce_dtype", [None, FP32, FP16], ids=str)
def test_stock_again(ranks: Ranks, reduce_dtype: Any, how: str) -> None:
    ranks.run(like_stock, reduce_dtype, how)


def detached_in_a_window(reduce_dtype: Any) -> None:
    """What was folded is not lost."""
    truth = fp64_means(BF16, BF16)
    model = sharded(net(BF16), mp_policy=MixedPrecisionPolicy(reduce_dtype=reduce_dtype))
    acc = accumkern.attach(torch.optim.SGD(model.parameters()))
    acc.reduce_in_fp32(model)
    for n in range(MICRO_BATCHES):
        model.set_requires_gradient_sync(n == MICRO_BATCHES - 1)
        step(model, n, BF16)
        if n == 12:
            acc.detach()
    assert relative_error(gradients(model), truth) < (GRAD_TOLERANCE[BF16] if reduce_dtype is FP32 else 2e-2)


def test_detached_in_a_window(ranks: Ranks) -> None:
    ranks.run(detached_in_a_window, FP32)
    ranks.run(detached_in_a_window, None)


# ---- failures -----------------------------------------------------------------------------------------------------


def refusals() -> None:
    model = sharded(net(BF16))
    optimizer = torch.optim.SGD(model.parameters())
    acc = accumkern.attach(optimizer)
    with pytest.raises(TypeError, match=r"model is a Linear; it must be a DistributedDataParallel, or have modules"):
        acc.reduce_in_fp32(nn.Linear(2, 2))
    model.set_requires_gradient_sync(False)
    step(model, 0, BF16)
    with pytest.raises(RuntimeError, match=r"fully_shard keeps gradients of earlier passes .* before the window"):
        acc.reduce_in_fp32(model)
    model.set_requires_gradient_sync(True)
    step(model, 0, BF16)
    acc.reduce_in_fp32(model)
    with pytest.raises(RuntimeError, match=r"reduce_in_fp32\(\) was called for model by an accumulator .* detach\(\)"):
        acc.reduce_in_fp32(model)
    wide = sharded(net(torch.float64))
    acc = accumkern.attach(torch.optim.SGD(wide.parameters()))
    acc.reduce_in_fp32(wide)
    with pytest.raises(TypeError, match=r"fully_shard has a gradient of torch.float64"):
        step(wide, 0, torch.float64)


def test_refusals_name_the_reason(ranks: Ranks) -> None:
    ranks.run(refusals)


class FailingError(Exception):
    """What a test raises on purpose."""


def failed_reduction() -> None:
    """A reduction that fails leaves no gradient that is not one."""
    model = sharded(net(BF16))
    acc = accumkern.attach(torch.optim.SGD(model.parameters()))
    acc.reduce_in_fp32(model)
    run_window(model, BF16, set(), 3)
    with pytest.MonkeyPatch.context() as patch:
        for group in groups_of(model):
            patch.setattr(group, "_reduce_scatter_comm", Failing())
        with pytest.raises(FailingError):
            step(model, 3, BF16)
    assert all(p.grad is None for p in model.parameters())


def failed_pass() -> None:
    """What a backward pass leaves that failed is what fully_shard itself leaves: split32 has the bits of FP32."""
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
    stock, model = (sharded(net(FP32), mp_policy=policy) for _ in range(2))
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), "split32")
    acc.reduce_in_fp32(model)
    for m in (stock, model):
        run_window(m, BF16, set(), 4)
        m.set_requires_gradient_sync(False)
        x = micro_batch(4, dist.get_rank()).to(BF16).requires_grad_()
        x.register_hook(fail)
        with pytest.raises(FailingError):
            m(x, True).float().sum().backward()
        run_window(m, BF16, LAST)
    assert all(map(torch.equal, gradients(model), gradients(stock)))


def fail(_: Tensor) -> None:
    raise FailingError


@pytest.mark.skipif(
    torch.__version__.startswith("2.10."),
    reason="fully_shard of torch 2.10 cannot go on after a failed backward pass, without accumkern either",
)
def test_a_failed_pass_leaves_what_stock_leaves(ranks: Ranks) -> None:
    ranks.run(failed_pass)


class Failing:
    """A reduce-scatter that fails."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, *_args: Any, **_kwargs: Any) -> None:
        raise FailingError


def test_after_a_failed_reduction_there_is_no_gradient(ranks: Ranks) -> None:
    ranks.run(failed_reduction, at_least=2)


def another_torch() -> None:
    with pytest.MonkeyPatch.context() as patch:
        model = sharded(net(BF16))
        group_type = type(groups_of(model)[0])
        annotations = {name: kind for name, kind in group_type.__annotations__.items() if name != "_reduce_dtype"}
        patch.setattr(group_type, "__annotations__", annotations)
        acc = accumkern.attach(torch.optim.SGD(model.parameters()))
        with pytest.raises(RuntimeError, match=r"fully_shard of torch .* has no _reduce_dtype, which accumkern needs"):
            acc.reduce_in_fp32(model)


def torch_that_rounds() -> None:
    """As if a later torch looked elsewhere for the dtype of shards."""
    model = sharded(net(BF16))
    acc = accumkern.attach(torch.optim.SGD(model.parameters()))
    acc.reduce_in_fp32(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_gradients, "reduced_in_fp32", nullcontext)
        with pytest.raises(RuntimeError, match=r"rounds what fully_shard has reduced to torch.bfloat16 in a way that"):
            step(model, 0, BF16)
    assert all(p.grad is None for p in model.parameters())


def test_another_torch_is_an_error(ranks: Ranks) -> None:
    ranks.run(another_torch)
    ranks.run(torch_that_rounds)
