"""Parameters that get another shape, dtype or content after attach: between windows that works as in stock PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from gradients import BF16, assert_equal, assert_fp32_sum, parameter, record, seeded, sgd
from torch.nn import Parameter
from torch.nn.utils import parametrize

import accumkern

pytestmark = pytest.mark.usefixtures("one_thread", "waiting")


def window(param: Parameter, acc: accumkern.GradAccumulator, scale: float, count: int = 6) -> None:
    arrived = record(param)
    for n in range(count):
        (param.float() * (seeded(*param.shape, seed=n).float() + 1)).sum().backward()
    assert param.grad is not None
    assert param.grad.shape == param.shape
    assert_fp32_sum(acc, param, arrived, scale)
    param._backward_hooks.popitem()  # type: ignore[union-attr]


def by_data(param: Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    param.data = torch.ones(shape, dtype=dtype)


def by_set(param: Parameter, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    param.data = param.data.to(dtype)
    with torch.no_grad():
        param.set_(torch.ones(shape, dtype=dtype))


SHAPES = [((8, 4), (12, 4)), ((12, 4), (8, 4)), ((1, 4), (12, 4)), ((1,), (300_000,)), ((0,), (8, 4)), ((4, 8), (8, 4))]


@pytest.mark.parametrize("change", [by_data, by_set])
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (torch.float32,) * 2, (torch.float32, BF16), (BF16, torch.float32)])
def test_another_shape_between_windows(
    change: Callable[..., None],
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    dtypes: tuple[torch.dtype, torch.dtype],
    average_over: int | None,
) -> None:
    param = parameter(*shapes[0], dtype=dtypes[0])
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, "split32", average_over=average_over)
    window(param, acc, 1 / (average_over or 1))
    optimizer.zero_grad()
    change(param, shapes[1], dtypes[1])
    for _ in range(2):
        window(param, acc, 1 / (average_over or 1))
        acc.finish(divide_by=2.0)
        optimizer.zero_grad()
    change(param, shapes[0], dtypes[0])
    window(param, acc, 1 / (average_over or 1))


def test_a_broadcast_gradient_does_not_come_from_a_shape_of_the_past() -> None:
    param = parameter(1, 4)
    acc = accumkern.attach(sgd(param), "split32")
    param.data = torch.ones(3, 4, dtype=BF16)
    for _ in range(2):
        (param.float() * torch.arange(12.0).view(3, 4)).sum().backward()
    assert_equal(acc.gradient(param), torch.arange(12.0).view(3, 4) * 2)


class Doubled(torch.nn.Module):
    def forward(self, half: torch.Tensor) -> torch.Tensor:
        return torch.cat([half, half])

    def right_inverse(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[: len(whole) // 2]


def test_a_parametrization_that_changes_the_shape() -> None:
    layer = torch.nn.Linear(4, 6, bias=False, dtype=BF16)
    param = layer.weight
    acc = accumkern.attach(sgd(param), "split32")
    layer(seeded(2, 4)).sum().backward()
    layer.zero_grad()
    parametrize.register_parametrization(layer, "weight", Doubled(), unsafe=True)
    assert layer.parametrizations.weight.original is param  # type: ignore[union-attr,index]
    assert param.shape == (3, 4)
    arrived = record(param)
    for n in range(4):
        layer(seeded(2, 4, seed=n)).float().square().sum().backward()
    assert_fp32_sum(acc, param, arrived)


def test_weights_that_are_swapped_out_and_back_between_windows() -> None:
    """As for an evaluation with averaged weights."""
    model = torch.nn.Linear(4, 3, dtype=BF16)
    optimizer = sgd(*model.parameters())
    acc = accumkern.attach(optimizer, "split32", average_over=2)
    averaged = copy.deepcopy(model)
    for _ in range(2):
        arrived = {p: record(p) for p in model.parameters()}
        for n in range(4):
            model(seeded(2, 4, seed=n)).float().square().sum().backward()
        for param, grads in arrived.items():
            assert_fp32_sum(acc, param, grads, 1 / 2)
            param._backward_hooks.popitem()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        arrived.clear()
        del param, grads
        for _ in range(2):
            for a, b in zip(list(model.parameters()), list(averaged.parameters()), strict=True):
                torch.utils.swap_tensors(a, b)
            model(seeded(2, 4))


def test_gradients_that_are_there_before_the_first_backward_pass(average_over: int | None) -> None:
    """And in later windows: whoever makes .grad by himself finds the sum in it."""
    param = parameter(6)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, "split32", average_over=average_over)
    for _ in range(3):
        optimizer.zero_grad()
        mine = param.grad = torch.full((6,), 256.0, dtype=BF16)
        for _ in range(3):
            (param.float() / 4).sum().backward()
        assert param.grad is mine
        assert_equal(acc.gradient(param), torch.full((6,), 256 + 0.75 / (average_over or 1)))


def test_hooks_that_were_cleared_are_put_on_again() -> None:
    param = parameter(6)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, "split32", average_over=4)
    for _ in range(3):
        param._backward_hooks.clear()  # type: ignore[union-attr]
        for _ in range(4):
            param.sum().backward()
        assert_equal(acc.gradient(param), torch.ones(6))
        optimizer.step()
        optimizer.zero_grad()
    param.sum().backward()
    param._backward_hooks.clear()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"shape \(6,\) has lost its hooks in the middle of a window"):
        param.sum().backward()
    optimizer.zero_grad()
    for _ in range(4):
        param.sum().backward()
    assert_equal(acc.gradient(param), torch.ones(6))
