"""The two hooks beside the user's, on parameters that come, go, are frozen, moved or cast."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from gradients import (
    BF16,
    assert_equal,
    assert_fp32_sum,
    backward,
    fp32_sum,
    micro_gradients,
    parameter,
    record,
    seeded,
    sgd,
)
from torch import Tensor
from torch.nn import Parameter

import accumkern
from accumkern.formats import BUFFERS, encode

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- parameters that take part now and then ------------------------------------------------------------------------


def test_unused_parameters_keep_grad_none(average_over: int | None) -> None:
    used, unused = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(used, unused), average_over=average_over)
    for _ in range(3):
        backward(used, 1.0)
        assert unused.grad is None
        assert acc.gradient(unused) is None


def test_parameters_used_in_some_micro_batches_only(average_over: int | None) -> None:
    often, rarely = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(often, rarely), "split32", average_over=average_over)
    grads = micro_gradients(9, 4)
    for n, grad in enumerate(grads):
        loss = (often.float() * grad).sum()
        if n % 3 == 1:
            loss = loss + (rarely.float() * grad).sum()
        loss.backward()
    assert_fp32_sum(acc, often, grads, 1 / (average_over or 1))
    assert_fp32_sum(acc, rarely, grads[1::3], 1 / (average_over or 1))


class Nothing(torch.autograd.Function):
    """The identity of `x`, which uses `param` and has no gradient for it."""

    @staticmethod
    def forward(ctx, x, param):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None


def test_undefined_gradient_leaves_grad_alone(average_over: int | None) -> None:
    param, other = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(param, other), "split32", average_over=average_over)
    grads = micro_gradients(4, 4)
    for grad in grads:
        Nothing.apply(other * 1, param).sum().backward()
        backward(param, grad)
        Nothing.apply(other * 1, param).sum().backward()
    assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))
    param.grad = None
    Nothing.apply(other * 1, param).sum().backward()
    assert param.grad is None


def test_parameters_unfrozen_after_attach_and_frozen_again(average_over: int | None) -> None:
    param, other = parameter(4), parameter(4)
    param.requires_grad_(False)
    acc = accumkern.attach(sgd(param, other), "split32", average_over=average_over)
    assert not param.requires_grad
    grads = micro_gradients(8, 4)
    scale = 1 / (average_over or 1)

    def micro_batch(grad: Tensor) -> None:
        ((param + other).float() * grad).sum().backward()

    micro_batch(grads[0])
    assert param.grad is None
    param.requires_grad_(True)
    for grad in grads[1:4]:
        micro_batch(grad)
    assert_fp32_sum(acc, param, grads[1:4], scale)
    param.requires_grad_(False)
    micro_batch(grads[4])
    assert_fp32_sum(acc, param, grads[1:4], scale)
    param.requires_grad_(True)
    for grad in grads[5:]:
        micro_batch(grad)
    assert_fp32_sum(acc, param, grads[1:4] + grads[5:], scale)
    assert_fp32_sum(acc, other, grads, scale)


def test_parameter_frozen_between_forward_and_backward_keeps_its_grad() -> None:
    param, other = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(param, other), "split32")
    grads = micro_gradients(4, 4)
    for grad in grads[:3]:
        backward(param, grad)
    loss = ((param + other).float() * 2).sum()
    param.requires_grad_(False)
    loss.backward()
    assert_fp32_sum(acc, param, grads[:3])
    param.requires_grad_(True)
    backward(param, grads[3])
    assert_fp32_sum(acc, param, grads)


def test_parameters_added_by_add_param_group(average_over: int | None) -> None:
    first, later = parameter(4), parameter(4)
    optimizer = sgd(first)
    acc = accumkern.attach(optimizer, "split32", average_over=average_over)
    grads = micro_gradients(6, 4)
    for n, grad in enumerate(grads):
        if n == 2:
            optimizer.add_param_group({"params": [later], "lr": 0.25})
        ((first + later).float() * grad).sum().backward()
        if n < 2:
            later.grad = None
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert_fp32_sum(acc, first, grads, 1 / (average_over or 1))
    assert_fp32_sum(acc, later, grads[2:], 1 / (average_over or 1))


def frozen_in_inference_mode() -> Parameter:
    with torch.inference_mode():
        return Parameter(torch.zeros(3, dtype=BF16), requires_grad=False)


@pytest.mark.parametrize(
    "make",
    [lambda: Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False), frozen_in_inference_mode],
    ids=["integer", "made in inference mode"],
)
def test_parameters_that_can_have_no_gradient_are_passed_over(make: Callable[[], Parameter]) -> None:
    param, never = parameter(4), make()
    acc = accumkern.attach(sgd(param, never), "split32")
    assert not never._post_accumulate_grad_hooks
    grads = micro_gradients(5, 4)
    for grad in grads:
        backward(param, grad)
    assert_fp32_sum(acc, param, grads)
    state = acc.state_dict()
    assert state["sums"]["1"] is None
    acc.load_state_dict(copy.deepcopy(state))
    assert_fp32_sum(acc, param, grads)


def test_attach_without_grad_mode() -> None:
    param, frozen = parameter(4), parameter(4)
    frozen.requires_grad_(False)
    with torch.no_grad():
        acc = accumkern.attach(sgd(param, frozen), "split32")
    frozen.requires_grad_(True)
    grads = micro_gradients(5, 4)
    for grad in grads:
        ((param + frozen).float() * grad).sum().backward()
    assert_fp32_sum(acc, param, grads)
    assert_fp32_sum(acc, frozen, grads)


# ---- hooks of the user ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before attach", "after attach", "both"])
@pytest.mark.parametrize("shape", [(5,), (257, 256)], ids=["small", "large"])
def test_post_accumulate_hook_of_the_user_sees_the_sum(shape: tuple[int, ...], when: str) -> None:
    param, other = parameter(*shape), parameter(5)
    optimizer, seen = sgd(param, other), []

    def look(p: Tensor) -> None:
        assert p is param
        assert p.grad is not None
        seen.append(p.grad.clone())

    if when != "after attach":
        param.register_post_accumulate_grad_hook(look)
    acc = accumkern.attach(optimizer, "split32")
    if when != "before attach":
        param.register_post_accumulate_grad_hook(look)
    grads = micro_gradients(5, *shape)
    for n, grad in enumerate(grads, 1):
        ((param.float() * grad).sum() + other.float().sum()).backward()
        assert len(seen) == (2 if when == "both" else 1)
        for s in seen:
            assert_equal(s, param.grad)
        assert_fp32_sum(acc, param, grads[:n])
        seen.clear()


@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_order_of_the_users_hooks_stays_what_it_was(when: str) -> None:
    param, calls = parameter(3), []
    optimizer = sgd(param)
    if when == "after attach":
        accumkern.attach(optimizer)
    handles = [param.register_post_accumulate_grad_hook(lambda _, n=n: calls.append(n)) for n in range(3)]
    if when == "before attach":
        accumkern.attach(optimizer)
    backward(param, 1.0)
    assert calls == [0, 1, 2]
    handles[1].remove()
    backward(param, 1.0)
    assert calls == [0, 1, 2, 0, 2]


@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_optimizer_in_backward(when: str, average_over: int | None) -> None:
    """A hook that steps every other micro-batch and drops the gradient, as in torch's own tutorial."""
    params = [Parameter(seeded(5)), Parameter(seeded(70000))]
    start = [p.detach().clone() for p in params]
    optimizers = {p: sgd(p) for p in params}
    arrivals = {p: record(p) for p in params}

    def step(p: Parameter) -> None:
        if len(arrivals[p]) % 2 == 0:
            optimizers[p].step()
            p.grad = None

    if when == "before attach":
        for p in params:
            p.register_post_accumulate_grad_hook(step)
    for p in params:
        accumkern.attach(optimizers[p], "split32", average_over=average_over)
    if when == "after attach":
        for p in params:
            p.register_post_accumulate_grad_hook(step)
    for n in range(6):
        sum((p.float() ** 2).sum() * (1 + n / 64) for p in params).backward()
    for p, expected in zip(params, start, strict=True):
        assert p.grad is None
        for a, b in zip(arrivals[p][::2], arrivals[p][1::2], strict=True):
            scale = 1 / (average_over or 1)
            total = encode(BUFFERS["split32"][BF16], fp32_sum([a, b], scale))[0]
            expected.add_(total, alpha=-0.5)
        assert_equal(p.detach(), expected)


def test_tensor_hook_of_the_user_that_changes_the_gradient(average_over: int | None) -> None:
    params = [parameter(6), parameter(257, 256)]
    params[0].register_hook(lambda grad: grad * 3)
    acc = accumkern.attach(sgd(*params), "split32", average_over=average_over)
    params[1].register_hook(lambda grad: grad * 3)
    grads = [micro_gradients(5, *p.shape) for p in params]
    for micro_batch in zip(*grads, strict=True):
        sum((p.float() * g).sum() for p, g in zip(params, micro_batch, strict=True)).backward()
    for param, of_param in zip(params, grads, strict=True):
        assert_fp32_sum(acc, param, [grad * 3 for grad in of_param], 1 / (average_over or 1))


def test_tensor_hook_registered_later_does_not_see_the_sum() -> None:
    param, seen = parameter(6), []
    optimizer = sgd(param)  # it keeps the accumulator alive
    accumkern.attach(optimizer)
    param.register_hook(lambda grad: seen.append(grad.clone()))
    grads = micro_gradients(4, 6)
    for grad in grads:
        backward(param, grad)
    for found, grad in zip(seen, grads, strict=True):
        assert_equal(found, grad)


# ---- a model that is moved or cast after attach --------------------------------------------------------------------


class Two(torch.nn.Module):
    """A small weight that is used several times, so that autograd adds its gradients before it delivers them."""

    def __init__(self) -> None:
        super().__init__()
        self.small = torch.nn.Linear(5, 4)
        self.large = Parameter(torch.ones(257, 256))

    def loss(self, n: int) -> Tensor:
        x, weight = torch.cos(torch.arange(5) + float(n)), self.small.weight
        used_thrice = self.small(x.to(weight.dtype)).square().sum() + (weight * 3).sum() + (weight * 0.7).sum()
        return used_thrice.float() + (self.large.float() * (1 + n / 64)).sum()


@pytest.mark.parametrize("casts_back", [False, True], ids=["once", "there and back"])
def test_model_cast_after_attach_accumulates(casts_back: bool, average_over: int | None) -> None:
    """A cast gives each parameter a new node in autograd's graph. Here the windows begin after it."""
    model = Two() if not casts_back else Two().bfloat16()
    optimizer = sgd(*model.parameters())
    acc = accumkern.attach(optimizer, "split32", average_over=average_over)
    if casts_back:
        for n in range(3):
            model.loss(n).backward()
        optimizer.zero_grad()
        model.float()
        model.loss(0).backward()
        optimizer.zero_grad()
    model.bfloat16()
    arrived = {p: record(p) for p in model.parameters()}
    for window in range(3):
        for n in range(4):
            model.loss(n).backward()
        for param, grads in arrived.items():
            assert len(grads) == 4
            assert_fp32_sum(acc, param, grads, 1 / (average_over or 1))
            grads.clear()
        optimizer.zero_grad(set_to_none=window != 1)


def test_model_cast_in_the_middle_of_a_sum_goes_on_from_the_cast_gradient() -> None:
    model = Two().bfloat16()
    optimizer = sgd(*model.parameters())
    acc = accumkern.attach(optimizer, "split32")
    for n in range(4):
        model.loss(n).backward()
    model.float()
    arrived = {p: record(p) for p in model.parameters()}
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    for param, grad in before.items():
        assert grad.dtype is torch.float32
        assert_equal(acc.gradient(param), grad)
    for n in range(4):
        model.loss(n).backward()
    for param, grads in arrived.items():
        assert_fp32_sum(acc, param, [before[param], *grads])


def test_gradient_of_a_model_cast_to_float64() -> None:
    model = Two().bfloat16()
    acc = accumkern.attach(sgd(*model.parameters()), "split32")
    for n in range(4):
        model.loss(n).backward()
    expected = {p: p.grad.float() for p in model.parameters() if p.grad is not None}
    model.double()
    for param, grad in expected.items():
        assert_equal(acc.gradient(param), grad)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_model_cast_in_the_middle_of_an_average_goes_on_from_the_cast_gradient(set_to_none: bool) -> None:
    model = Two().bfloat16()
    optimizer = sgd(*model.parameters())
    acc = accumkern.attach(optimizer, "split32", average_over=4)
    for n in range(2):
        model.loss(n).backward()
    model.float()
    arrived = {p: record(p) for p in model.parameters()}
    before = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    for n in range(2):
        model.loss(n).backward()
    for param, grads in arrived.items():
        assert_fp32_sum(acc, param, [before[param] * 4, *grads], 1 / 4)
    optimizer.zero_grad(set_to_none=set_to_none)
    arrived = {p: record(p) for p in model.parameters()}
    for n in range(4):
        model.loss(n).backward()
    for param, grads in arrived.items():
        assert_fp32_sum(acc, param, grads, 1 / 4)


def test_model_cast_while_its_parameters_are_frozen() -> None:
    model = Two().requires_grad_(False)
    acc = accumkern.attach(sgd(*model.parameters()), "split32")
    model.bfloat16()
    model.requires_grad_(True)
    arrived = {p: record(p) for p in model.parameters()}
    for n in range(4):
        model.loss(n).backward()
    for param, grads in arrived.items():
        assert_fp32_sum(acc, param, grads)
