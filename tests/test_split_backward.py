"""Gradients of weights that a pipeline's schedule takes apart from the backward pass, as its stages do."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device, full
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import stage as stage_module
from torch.distributed.pipelining._backward import stage_backward_input
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import accumkern

split = pytest.mark.integration("Pipeline parallel: zero bubble, whose schedules split the backward pass")

BF16 = torch.bfloat16


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 5)).to(BF16)


def micro_batch(n: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(n)).to(BF16)


def whole_pass(module: nn.Module, x: Tensor) -> None:
    module(x).float().square().sum().backward()


def split_pass(module: nn.Module, x: Tensor, without: str = "") -> None:
    """Run a backward pass in two parts, as a stage of a pipeline on two ranks does."""
    stage = SimpleNamespace(submod=module, num_stages=2, group_size=2)
    x = x.clone().requires_grad_()
    _, groups = stage_backward_input([module(x).float().square().sum()], None, [x], module.parameters())
    for group in groups:
        group.pop(without, None)
    _PipelineStageBase.backward_maybe_with_nosync(stage, "weight", {"param_groups": groups})


def gradients(acc: accumkern.GradAccumulator, module: nn.Module) -> list[Any]:
    return [acc.gradient(p) for p in module.parameters()]


@split
@pytest.mark.parametrize("kinds", ["split", "mixed, whole first", "mixed, split first"])
@pytest.mark.parametrize("average_over", [None, 6], ids=["sum", "average"])
@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
@pytest.mark.usefixtures("waiting")
def test_bits_are_those_of_whole_passes(buffer: str, average_over: float | None, kinds: str) -> None:
    found, right = net(), net()
    accs = [
        accumkern.attach(torch.optim.SGD(m.parameters()), buffer, average_over=average_over) for m in (found, right)
    ]
    for _ in range(2):
        for n in range(6):
            is_whole = kinds != "split" and n % 2 == int(kinds == "mixed, split first")
            (whole_pass if is_whole else split_pass)(found, micro_batch(n))
            whole_pass(right, micro_batch(n))
            for p, q in zip(found.parameters(), right.parameters(), strict=True):
                assert torch.equal(p.grad, q.grad)
        assert all(map(torch.equal, gradients(accs[0], found), gradients(accs[1], right)))
        for m in (found, right):
            m.zero_grad()


@split
def test_parameters_without_hooks_are_left_to_torch() -> None:
    module, stock = net(), net()
    acc = accumkern.attach(torch.optim.SGD(module[0].parameters()), average_over=4)
    for n in range(4):
        split_pass(module, micro_batch(n))
        split_pass(stock, micro_batch(n))
    for p, q in zip(module[1:].parameters(), stock[1:].parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for p, q in zip(module[0].parameters(), stock[0].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad / 4, rtol=0.02, atol=0.02 * float(q.grad.abs().max()))
    acc.detach()
    for m in (module, stock):
        m.zero_grad()
        for n in range(4):
            split_pass(m, micro_batch(n))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(module.parameters(), stock.parameters(), strict=True))


@split
def test_after_an_error_gradients_that_have_not_come_are_as_before() -> None:
    found, right = net(), net()
    accs = [accumkern.attach(torch.optim.SGD(m.parameters()), "split32") for m in (found, right)]
    for n in range(4):
        split_pass(found, micro_batch(n))
        split_pass(right, micro_batch(n))
        with pytest.raises(KeyError, match="grads"):
            split_pass(found, micro_batch(n), without="grads")
    assert all(map(torch.equal, gradients(accs[0], found), gradients(accs[1], right)))


@split
def test_a_gradient_is_let_go_when_it_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a whole stage at a time would need their memory once more."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters())
    accumkern.attach(optimizer)
    split_pass(module, micro_batch(0))
    arrived: list[weakref.ref[Tensor]] = []
    most = []
    grad = torch.autograd.grad

    def watched_grad(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        new = grad(*args, **kwargs)
        most.append(sum(reference() is not None for reference in arrived))
        arrived.extend(map(weakref.ref, new))
        return new

    monkeypatch.setattr(torch.autograd, "grad", watched_grad)
    split_pass(module, micro_batch(1))
    assert len(arrived) == 1 + 6  # of the input, and of the weights
    assert max(most) <= 1


@split
def test_what_comes_after_a_deferred_finish_is_noticed() -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    acc = accumkern.attach(optimizer, master_weights="split32")
    for n in range(3):
        split_pass(module, micro_batch(n))
    acc.finish(max_norm=1.0, defer=True)
    split_pass(module, micro_batch(3))
    with pytest.raises(RuntimeError, match="was followed by 1 backward pass before step"):
        optimizer.step()


@split
@pytest.mark.parametrize("run", [split_pass, whole_pass], ids=["split", "several stages"])
def test_the_noise_scale_is_unknown(run: Callable[..., None]) -> None:
    module = net()
    acc = accumkern.attach(torch.optim.SGD(module.parameters()), stats=True)
    for n in range(6):
        if n == 3:
            module.zero_grad()
        if run is split_pass:
            split_pass(module, micro_batch(n))
        else:
            stage = SimpleNamespace(submod=module, num_stages=4, group_size=2)
            loss = module(micro_batch(n)).float().square().sum()
            kwargs = {"stage_output": loss, "output_grads": None, "input_values": []}
            _PipelineStageBase.backward_maybe_with_nosync(stage, "full", kwargs)
        if n % 3 == 2:
            with pytest.raises(RuntimeError, match="noise scale is unknown: a pipeline with several stages on a rank"):
                acc.noise_scale()
    module.zero_grad()
    for n in range(3):
        whole_pass(module, micro_batch(n))
    assert acc.noise_scale().micro_batches == 3


@split
def test_pipelining_that_was_imported_after_attach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = net()
    optimizer = torch.optim.SGD(module.parameters())
    accumkern.attach(optimizer, average_over=2)
    monkeypatch.delattr(_PipelineStageBase, "accumkern_watches")
    monkeypatch.setattr(stage_module, "stage_backward_weight", stage_module.stage_backward_weight.__wrapped__)
    torch.autograd.grad(module(micro_batch(0)).sum(), list(module.parameters()))  # somebody's own
    with pytest.raises(RuntimeError, match=r"was imported after attach\(\); import it before"):
        split_pass(module, micro_batch(0))
    assert all(p.grad is None for p in module.parameters())


@split
def test_pipelining_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_PipelineStageBase, "accumkern_watches")
    monkeypatch.delattr(stage_module, "stage_backward_weight")
    with pytest.raises(RuntimeError, match=r"not as torch 2\.10 to 2\.13 have it: .*stage_backward_weight"):
        accumkern.attach(torch.optim.SGD(net().parameters()))


def tensor_parallel(sequence: bool) -> None:
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    plan: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if sequence:
        plan = {
            "0": SequenceParallel(),
            "2": ColwiseParallel(input_layouts=Shard(1)),
            "4": RowwiseParallel(output_layouts=Shard(1)),
        }
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)]
        module = nn.Sequential(*([nn.LayerNorm(6), nn.Identity()] if sequence else []), *layers)
        models.append(parallelize_module(module.to(device(), BF16), mesh, plan))
    accs = [accumkern.attach(torch.optim.SGD(m.parameters()), "split32", average_over=5) for m in models]
    for n in range(5):
        x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(n)).to(device(), BF16)
        split_pass(models[0], x)
        whole_pass(models[1], x)
    for found, right in zip(*map(gradients, accs, models), strict=True):
        assert found.placements == right.placements
        assert torch.equal(full(found), full(right))


@split
@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
def test_tensor_parallel_stages(ranks: Ranks, sequence: bool) -> None:
    ranks.run(tensor_parallel, sequence)


def replicated() -> None:
    module = net().to(device())
    model, alone = DistributedDataParallel(module), DistributedDataParallel(copy.deepcopy(module))
    optimizer = torch.optim.SGD(module.parameters())
    accumkern.attach(optimizer)
    x = micro_batch(0).to(device())
    with pytest.raises(RuntimeError, match=r"would never reduce the gradients of its weights\. Use fully_shard"):
        split_pass(model, x)
    split_pass(alone, x)  # which is not attached


@pytest.mark.integration(
    "Pipeline parallel: zero bubble with DistributedDataParallel",
    refused="torch would never reduce gradients of weights",
)
def test_replicas_that_torch_does_not_reduce_are_refused(ranks: Ranks) -> None:
    ranks.run(replicated, at_least=2)
