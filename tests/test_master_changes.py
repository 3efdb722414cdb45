"""Whoever changes a weight is right: what it lacked before counts as zero, and the new master is what is there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from masters import Masters, adamw, assert_equal, backward, fp32_model, own_adamw
from pinned import pinned
from torch import Tensor, nn, optim
from torch.nn.utils import parametrizations, prune

import accumkern

pytestmark = pytest.mark.usefixtures("one_thread")


def swap(weight: nn.Parameter, new: Tensor) -> None:
    torch.utils.swap_tensors(weight, nn.Parameter(new.clone()))


def through_inference_mode(weight: nn.Parameter, new: Tensor) -> None:
    with torch.inference_mode():
        weight.copy_(new)


CHANGES: dict[str, Callable[[nn.Parameter, Tensor], Any]] = {
    "copy_": lambda weight, new: weight.copy_(new),
    "data": lambda weight, new: setattr(weight, "data", new.clone()),
    "set_": lambda weight, new: weight.set_(new.clone()),
    "assignment": lambda weight, new: weight.__setitem__(slice(None), new),
    "foreach": lambda weight, new: torch._foreach_copy_([weight], [new]),
    "inference mode": through_inference_mode,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_new_master_starts_from_what_was_written(change: Callable[[nn.Parameter, Tensor], Any]) -> None:
    mine = Masters(adamw)
    mine.window(0)
    weight = mine.params[0]
    assert not torch.equal(mine.acc.master_weight(weight), weight.detach().float())
    others = mine.masters()[1:]
    new = torch.randn_like(weight)
    with torch.no_grad():
        change(weight, new)
    assert torch.equal(mine.acc.master_weight(weight), new.float())
    assert_equal(mine.masters()[1:], others)
    stepped = nn.Parameter(new.float())
    stock = pinned(optim.AdamW([stepped], lr=mine.optimizer.param_groups[0]["lr"]))
    saved = stock.state_dict() | {"state": {0: copy.deepcopy(mine.optimizer.state_dict()["state"][0])}}
    stock.load_state_dict(saved)
    backward(mine.model, 1)
    stepped.grad = mine.acc.gradient(weight)
    mine.optimizer.step()
    stock.step()
    assert torch.equal(mine.acc.master_weight(weight), stepped.detach())


@pytest.mark.parametrize("how", ["max_norm", "clamp_", "swap"])
def test_writing_what_is_there_keeps_masters(how: str) -> None:
    """After the second time, when a copy of the weight is kept; elements that do change begin again."""
    table = nn.Embedding(50, 16, max_norm=100.0 if how == "max_norm" else None).bfloat16()
    weight = table.weight
    stock = nn.Parameter(weight.detach().float())
    optimizer, reference = optim.SGD([weight], lr=1e-4), optim.SGD([stock], lr=1e-4)
    acc = accumkern.attach(optimizer, "split32", master_weights="split32")
    for _ in range(100):
        table(torch.arange(50)).sum().backward()
        stock.grad = acc.gradient(weight)
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
        with torch.no_grad():
            if how == "clamp_":
                weight.clamp_(-10, 10)
            if how == "swap":
                kept = weight.clone()
                weight.copy_(torch.zeros_like(weight))
                assert not acc.master_weight(weight).any()
                weight.copy_(kept)
    # Two times what was left out was half a unit in the last place at most.
    assert bool(((acc.master_weight(weight) - stock).abs() <= 2**-8 * stock.abs() + 1e-3).all())
    moved = acc.master_weight(weight) - weight.detach().float()
    assert float(moved.abs().max()) > 0
    before = acc.master_weight(weight)
    with torch.no_grad():
        weight[3] = 5.0
    assert bool((acc.master_weight(weight)[3] == 5.0).all())
    assert torch.equal(acc.master_weight(weight)[4:], before[4:])
    assert acc.memory().master_residuals == 4 * weight.numel()


def test_writing_what_is_there_before_the_first_step_keeps_what_was_cut_off() -> None:
    """DistributedDataParallel does so when it is made after attach()."""
    mine = Masters(adamw)
    with torch.no_grad():
        for param in mine.params:
            param.copy_(param.clone())
    assert_equal(mine.masters(), [param.detach() for param in fp32_model().parameters()])
    mine.window(0)
    assert mine.acc.memory().master_residuals == 2 * sum(param.numel() for param in mine.params)


def test_what_is_written_through_data_is_at_most_half_a_unit_off() -> None:
    mine = Masters(adamw)
    mine.window(0)
    for weight in mine.params:
        new = torch.randn_like(weight)
        weight.data.copy_(new)
        half_a_unit = (2.0**-8 * new.float().abs()).clamp(min=2.0**-134)  # of zero and what is subnormal
        assert bool(((mine.acc.master_weight(weight) - new.float()).abs() <= half_a_unit).all())
    for value in (0.0, -0.0):
        weight.data.fill_(value)
        assert not mine.acc.master_weight(weight).any() or mine.acc.master_weight(weight).abs().max() < 1e-38


def test_swapping_averages_in_and_out_through_data_brings_the_masters_back() -> None:
    mine = Masters(adamw)
    mine.window(0)
    before, kept = mine.masters(), [param.data for param in mine.params]
    for param in mine.params:
        param.data = torch.zeros_like(param)
    assert_equal(mine.masters(), [torch.zeros_like(master) for master in before])
    for param, data in zip(mine.params, kept, strict=True):
        param.data = data
    assert_equal(mine.masters(), before)


def test_load_state_dict_of_the_model() -> None:
    mine = Masters(adamw)
    saved = copy.deepcopy(mine.model.state_dict())
    mine.window(0)
    mine.model.load_state_dict(saved)
    assert_equal(mine.masters(), [value.float() for value in saved.values()])
    mine.window(1)
    mine.model.load_state_dict({key: value.float() * 2 for key, value in saved.items()})
    assert_equal(mine.masters(), [value.float() * 2 for value in saved.values()])


def test_casts() -> None:
    mine = Masters(adamw)
    mine.window(0)
    mine.model.float()
    weight = mine.params[0]
    assert torch.equal(mine.acc.master_weight(weight), weight)
    mine.optimizer.zero_grad()
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    mine.optimizer.step()  # as any FP32 weight
    assert float((weight - before).abs().max()) > 0
    mine.model.bfloat16()
    assert torch.equal(mine.acc.master_weight(weight), weight.float())


def test_a_cast_to_float16_is_found_at_the_step() -> None:
    mine = Masters(adamw, "fp32")
    mine.model.half()
    mine.params[0].grad = torch.ones_like(mine.params[0])
    with pytest.raises(TypeError, match="which has no master_weights"):
        mine.optimizer.step()


def test_frozen_weights_keep_their_masters() -> None:
    mine = Masters(adamw)
    mine.window(0)
    before = mine.masters()
    mine.params[0].requires_grad_(False)
    mine.window(1)
    assert torch.equal(mine.masters()[0], before[0])
    mine.params[0].requires_grad_(True)
    mine.window(2)
    assert not torch.equal(mine.masters()[0], before[0])


def test_pruned_weights() -> None:
    model = fp32_model().bfloat16()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    acc = accumkern.attach(adamw(list(model.parameters())), master_weights="split32")
    optimizer = acc._optimizer
    for step in range(3):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    prune.remove(model[0], "weight")
    weight = model[0].weight
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_parametrized_weights() -> None:
    layer = parametrizations.weight_norm(nn.Linear(24, 24).bfloat16())
    optimizer = adamw(list(layer.parameters()))
    acc = accumkern.attach(optimizer, master_weights="split32")
    layer(torch.ones(2, 24, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    for param in layer.parameters():
        assert torch.equal(acc.master_weight(param).bfloat16(), param)


@pytest.mark.parametrize("with_holes", [False, True])
def test_weights_of_any_strides(with_holes: bool) -> None:
    base = torch.randn(6, 8, 5, 10)
    values = base[..., ::2] if with_holes else base.to(memory_format=torch.channels_last)
    weight = nn.Parameter(base.bfloat16()[..., ::2] if with_holes else values.bfloat16())
    stock = nn.Parameter(weight.detach().float())
    optimizer, reference = adamw([weight]), adamw([stock])
    if not with_holes:  # the others are stepped by torch
        pinned(reference)
    acc = accumkern.attach(optimizer, "split32", master_weights="split32")
    strides = weight.stride()
    for step in range(5):
        torch.manual_seed(step)
        for _ in range(2):
            (weight * torch.randn(weight.shape).bfloat16()).sum().backward()
        stock.grad = acc.gradient(weight)
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
        assert weight.stride() == strides
        assert torch.equal(acc.master_weight(weight), stock)


def test_sparse_gradients() -> None:
    table = nn.Embedding(50, 8, sparse=True).bfloat16()
    stock = nn.Parameter(table.weight.detach().float())
    optimizer, reference = optim.SparseAdam([table.weight], lr=1e-2), optim.SparseAdam([stock], lr=1e-2)
    acc = accumkern.attach(optimizer, master_weights="split32")
    for step in range(5):
        for row in (1, 3):
            table(torch.tensor([row, step])).float().square().sum().backward()
        assert table.weight.grad is not None
        stock.grad = table.weight.grad.float().coalesce()
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    assert torch.equal(acc.master_weight(table.weight), stock)


def test_gradients_of_float32() -> None:
    weight = nn.Parameter(torch.randn(100).bfloat16())
    weight.grad_dtype = None
    stock = nn.Parameter(weight.detach().float())
    optimizer, reference = adamw([weight]), adamw([stock])
    acc = accumkern.attach(optimizer, master_weights="split32")
    weight.grad, stock.grad = torch.randn(100), None
    stock.grad = weight.grad.clone()
    optimizer.step()
    reference.step()
    assert torch.equal(acc.master_weight(weight), stock)


def test_complex_float64_and_empty_parameters_beside() -> None:
    params = [
        nn.Parameter(torch.randn(7, dtype=torch.complex64)),
        nn.Parameter(torch.randn(7, dtype=torch.float64)),
        nn.Parameter(torch.empty(0, 3, dtype=torch.bfloat16)),
        nn.Parameter(torch.randn(7).bfloat16()),
    ]
    twins = [nn.Parameter(p.detach().clone() if i < 2 else p.detach().float()) for i, p in enumerate(params)]
    optimizer, references = adamw(params), [adamw(twins[:2]), pinned(adamw(twins[2:]))]
    acc = accumkern.attach(optimizer, master_weights="split32")
    for _ in range(3):
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn_like(param)
            twin.grad = param.grad.to(twin.dtype)
        optimizer.step()
        for reference in references:
            reference.step()
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(acc.master_weight(param), twin)


@pytest.mark.parametrize("in_buckets", [True, False])
def test_views_of_one_tensor_which_have_one_version(in_buckets: bool) -> None:
    flat = torch.randn(300).bfloat16()
    params = [nn.Parameter(part) for part in flat.split(100)]
    assert params[0]._version == params[1]._version
    twins = [nn.Parameter(param.detach().float()) for param in params]
    make = own_adamw if in_buckets else adamw
    optimizer, reference = make(params), pinned(make(twins))
    acc = accumkern.attach(optimizer, master_weights="split32", bucket=1)
    for step in range(4):
        version = params[0]._version
        for param, twin in zip(params[: 3 - step % 2], twins, strict=False):
            param.grad = torch.randn(100).bfloat16()
            twin.grad = param.grad.float()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()
        assert params[0]._version > version
        assert_equal([acc.master_weight(param) for param in params], [twin.detach() for twin in twins])


def test_a_step_between_forward_and_backward_pass_is_noticed() -> None:
    mine = Masters(adamw)
    loss = mine.model(torch.randn(2, 24).bfloat16()).square().mean()
    loss.backward(retain_graph=True)
    mine.optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_that_leaves_the_groups_lets_its_residual_go() -> None:
    mine = Masters(adamw)
    mine.window(0)
    held = mine.acc.memory().master_residuals
    gone = mine.optimizer.param_groups[0]["params"].pop()
    mine.window(1)
    assert held - mine.acc.memory().master_residuals == 2 * gone.numel()
