"""Backward passes that fail: what arrived counts as in stock PyTorch, and zero_grad() repairs the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gradients import (
    assert_equal,
    assert_fp32_sum,
    backward,
    fail,
    micro_gradients,
    parameter,
    record,
    sgd,
)
from torch import Tensor
from torch.nn import Parameter

import accumkern

pytestmark = pytest.mark.usefixtures("one_thread", "waiting")

# ---- backward passes that fail -------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches_before", [0, 1, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_repairs_what_a_failed_backward_left(
    set_to_none: bool, micro_batches_before: int, average_over: int | None
) -> None:
    params = [parameter(5), parameter(257, 256), parameter(2, 3)]
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer, "split32", average_over=average_over)
    arrived = record(params[0])
    for grad in micro_gradients(5, 5)[:micro_batches_before]:
        sum((p.float() * grad[0]).sum() for p in params).backward()
    fail(params[:2], late=params[2])
    assert (arrived[-1] == 3).all()  # it did fail in the middle
    optimizer.zero_grad(set_to_none=set_to_none)
    grads = [micro_gradients(4, *p.shape) for p in params]
    for _ in range(2):
        for micro_batch in zip(*grads, strict=True):
            sum((p.float() * g).sum() for p, g in zip(params, micro_batch, strict=True)).backward()
        for param, of_param in zip(params, grads, strict=True):
            assert_fp32_sum(acc, param, of_param, 1 / (average_over or 1))
        optimizer.zero_grad(set_to_none=set_to_none)


LOOKS: dict[str, Callable[[accumkern.GradAccumulator, Parameter], Tensor | None]] = {
    "gradient()": lambda acc, p: acc.gradient(p),
    "state_dict()": lambda acc, p: acc.state_dict()["sums"]["0"],
    "detach()": lambda acc, p: acc.detach(),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_was_zeroed_after_a_failed_backward_stays_zero(set_to_none: bool, look: str) -> None:
    params = [parameter(5), parameter(2, 3)]
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer, "split32")
    for _ in range(3):
        sum(p.float().sum() for p in params).backward()
    fail(params[:1], late=params[1])
    optimizer.zero_grad(set_to_none=set_to_none)
    found = LOOKS[look](acc, params[0])
    assert found is None or not found.any()
    assert params[0].grad is None or not params[0].grad.any()


def test_failed_backward_without_zero_grad_counts_what_arrived_as_stock_does(average_over: int | None) -> None:
    sets = [[parameter(5), parameter(257, 256), parameter(2, 3)] for _ in range(2)]
    optimizer = sgd(*sets[0])  # it keeps the accumulator alive
    accumkern.attach(optimizer, average_over=average_over)
    for params, scale in zip(sets, (1, 1 / (average_over or 1)), strict=True):
        for p in params:
            if scale != 1:
                p.register_hook(lambda grad, scale=scale: grad * scale)
        sum(p.float().sum() for p in params).backward()
        fail(params[:2], late=params[2])
        sum(p.float().sum() for p in params).backward()
    for attached, stock in zip(*sets, strict=True):
        assert_equal(attached.grad, stock.grad)


def test_gradient_after_a_failed_backward_counts_what_arrived() -> None:
    params = [parameter(5), parameter(2, 3)]
    acc = accumkern.attach(sgd(*params))
    sum(p.float().sum() for p in params).backward()
    fail(params[:1], late=params[1])
    assert (acc.gradient(params[0]) == 4).all()
    assert (params[0].grad == 4).all()
    assert (acc.gradient(params[1]) == 1).all()


@pytest.mark.parametrize("when", ["before attach", "after attach"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_post_accumulate_hook_that_raises(set_to_none: bool, when: str) -> None:
    param, fails = parameter(5), [False]
    optimizer = sgd(param)

    def raise_sometimes(_: Tensor) -> None:
        if fails[0]:
            raise ArithmeticError

    if when == "before attach":
        param.register_post_accumulate_grad_hook(raise_sometimes)
    acc = accumkern.attach(optimizer, "split32")
    if when == "after attach":
        param.register_post_accumulate_grad_hook(raise_sometimes)
    grads = micro_gradients(5, 5)
    for _ in range(2):
        for grad in grads:
            backward(param, grad)
        fails[0] = True
        with pytest.raises(ArithmeticError):
            backward(param, 100.0)
        fails[0] = False
        optimizer.zero_grad(set_to_none=set_to_none)
        for grad in grads:
            backward(param, grad)
        assert_fp32_sum(acc, param, grads)
        optimizer.zero_grad()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_tensor_hook_that_raises(set_to_none: bool) -> None:
    param, fails = parameter(5), [False]

    def raise_sometimes(_: Tensor) -> None:
        if fails[0]:
            raise ArithmeticError

    param.register_hook(raise_sometimes)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, "split32")
    grads = micro_gradients(5, 5)
    for grad in grads[:3]:
        backward(param, grad)
    fails[0] = True
    with pytest.raises(ArithmeticError):
        backward(param, 100.0)
    fails[0] = False
    assert_fp32_sum(acc, param, grads[:3])  # nothing had happened to the parameter yet
    optimizer.zero_grad(set_to_none=set_to_none)
    for grad in grads:
        backward(param, grad)
    assert_fp32_sum(acc, param, grads)
