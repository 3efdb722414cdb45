"""For tests of the hook: parameters, micro-gradients that are made up, their FP32 sums, and comparisons of bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import accumkern
from accumkern.formats import BUFFERS, decode, encode, fma

BF16 = torch.bfloat16
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CASES = [
    pytest.param(buffer, dtype, id=f"{buffer}-{str(dtype)[6:]}")
    for buffer, formats in BUFFERS.items()
    for dtype in formats
]
LOW_PRECISION_CASES = [case for case in CASES if case.values[1] is not torch.float32]
ACCURATE_CASES = [case for case in CASES if case.values != ("split24", BF16)]  # those that hold FP32 exactly


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


def stored_sum(buffer: str, grads: list[Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return .grad and the accumulated FP32 value as the formats have them after these micro-gradients."""
    format_ = BUFFERS[buffer][grads[0].dtype]
    x = grads[0].float() * torch.tensor(scale)
    total, residual = encode(format_, x)
    for grad in grads[1:]:
        total, residual = encode(format_, fma(scale, grad, decode(format_, total, residual)))
    return total, decode(format_, total, residual)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


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


class Give(torch.autograd.Function):
    """A zero whose gradient for `param` is the very tensor that `make` returns: its layout survives."""

    @staticmethod
    def forward(ctx, param, make):  # type: ignore[no-untyped-def]
        ctx.make = make
        return param.new_zeros(())

    @staticmethod
    def backward(ctx, _grad):  # type: ignore[no-untyped-def]
        return ctx.make(), None


def record(param: Tensor) -> list[Tensor]:
    """Return a list to which every gradient is added that arrives at `param`."""
    arrived: list[Tensor] = []
    param.register_hook(lambda grad: arrived.append(grad.detach().clone()))
    return arrived


class Fails(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Raise.apply(x)


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


def assert_correctly_rounded(grad: Tensor | None, x: Tensor) -> None:
    """Assert that no value of grad's dtype is nearer to x. At a tie two are as near, and either is right."""
    assert grad is not None
    nearest = (x.to(grad.dtype).double() - x.double()).abs()
    assert torch.equal((grad.double() - x.double()).abs(), nearest)


def half_ulp(values: Tensor) -> Tensor:
    """Return half a unit in the last place of bfloat16 values, FP64."""
    return torch.ldexp(torch.ones_like(values, dtype=torch.float64), values.float().frexp().exponent - 9)


def gradient(acc: accumkern.GradAccumulator, param: Tensor) -> Tensor:
    found = acc.gradient(param)
    assert found is not None
    return found


def assert_equal(found: Tensor | None, expected: Tensor | None) -> None:
    """Assert that two gradients are equal in values, dtype, layout and strides."""
    if expected is None or found is None:
        assert found is None
        assert expected is None
        return
    assert found.dtype is expected.dtype
    assert found.layout is expected.layout
    if found.layout is torch.strided:
        assert found.stride() == expected.stride()
    else:
        found, expected = found.to_dense(), expected.to_dense()
    assert torch.equal(found, expected), f"{found} is not {expected}"


def assert_fp32_sum(acc: accumkern.GradAccumulator, param: Tensor, arrived: list[Tensor], scale: float = 1) -> None:
    """Assert that .grad is the correctly rounded FP32 sum of what arrived."""
    assert arrived
    x = fp32_sum(arrived, scale)
    assert_equal(acc.gradient(param), x)
    assert param.grad is not None
    assert torch.equal((param.grad.double() - x.double()).abs(), (x.to(param.dtype).double() - x.double()).abs())


def is_hooked(param: Tensor) -> bool:
    return bool(param._post_accumulate_grad_hooks)


def assert_attached(param: Parameter) -> None:
    """Assert that additions lose nothing."""
    param.grad = None
    for grad in (256.0, 1.0, 1.0):
        backward(param, grad)
    assert param.grad is not None
    assert (param.grad == 258).all()


def is_averaged(param: Tensor) -> bool:
    """Return whether average_over=2 is at work."""
    param.grad = None
    backward(param, 4.0)
    assert param.grad is not None
    averaged = bool((param.grad == 2).all())
    assert averaged or bool((param.grad == 4).all())
    param.grad = None
    return averaged
