"""For tests of the hook: parameters, micro-gradients that are made up, their FP32 sums, and comparisons of bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from accumkern.formats import fma

BF16 = torch.bfloat16
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def parameter(*shape: int, dtype: torch.dtype = BF16, device: torch.device | str = "cpu") -> Parameter:
    return Parameter(torch.zeros(shape, dtype=dtype, device=device))


def sgd(*params: Tensor, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5, momentum=momentum)


def micro_gradients(
    count: int, *shape: int, dtype: torch.dtype = BF16, mean: float = 1.0, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Return gradients that agree in sign when their mean is a few times their standard deviation, which is 1."""
    generator = torch.Generator().manual_seed(count)
    return [(torch.randn(shape, generator=generator) + mean).to(dtype).to(device) for _ in range(count)]


def fp32_sum(grads: list[Tensor], scale: float = 1.0) -> Tensor:
    """Return the sum that FP32 arithmetic gives, one micro-gradient after another."""
    total = grads[0].float() * scale
    for grad in grads[1:]:
        total = total + grad.float() if scale == 1 else fma(scale, grad, total)
    return total


# ---- backward passes ---------------------------------------------------------------------------------------------


def backward(param: Tensor, grad: Tensor | float) -> None:
    """Run a backward pass whose gradient for `param` is exactly `grad`."""
    (param.float() * grad).sum().backward()


def backward_of_all(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Run one backward pass whose gradients are exactly `grads`."""
    sum((param.float() * grad).sum() for param, grad in zip(params, grads, strict=True)).backward()  # type: ignore[union-attr]


class Raise(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> Tensor:
        raise ArithmeticError("this backward pass fails")


def fail(arrives: list[Parameter], late: Parameter) -> None:
    """Run a backward pass in which some parameters get gradients of 3, and which fails before `late` gets one."""
    failing = Raise.apply((late.float() * 3).sum())  # autograd begins with what the forward pass ended with
    with pytest.raises(ArithmeticError):
        (failing + sum((p.float() * 3).sum() for p in arrives)).backward()


# ---- comparisons -------------------------------------------------------------------------------------------------


def bits_of(x: Tensor) -> Tensor:
    return x.detach().resolve_neg().contiguous().view(INTEGERS[x.element_size()])


def assert_same_bits(found: Tensor | None, expected: Tensor | None, what: object = "") -> None:
    """Assert that two tensors of one dtype and shape, on any devices, have the same bits, or that both are None."""
    if found is None or expected is None:
        assert found is expected, what
        return
    assert found.dtype is expected.dtype, what
    assert found.shape == expected.shape, what
    found = found.to(expected.device)
    differ = bits_of(found) != bits_of(expected)
    assert not differ.any(), (
        f"{what}: {differ.sum()} of {differ.numel()} differ, the first at {differ.flatten().nonzero()[0].item()}: "
        f"{found[differ][:4]} should be {expected[differ][:4]}"
    )


def assert_stock(param: Parameter) -> None:
    """Assert that nothing is hooked, and that three additions lose what bfloat16 cannot hold."""
    assert not param._post_accumulate_grad_hooks
    param.grad = None
    for grad in (256.0, 1.0, 1.0):
        backward(param, grad)
    assert param.grad is not None
    assert (param.grad == 256).all()
