"""What is summed: bit for bit a sequence of FP32 additions, in memory of the right size."""

from __future__ import annotations

import functools
import math

import gradients
import pytest
import torch
from gradients import (
    ACCURATE_CASES,
    BF16,
    CASES,
    assert_correctly_rounded,
    assert_same_bits,
    backward,
    backward_of_all,
    fp32_sum,
    gradient,
    parameter,
    sgd,
    stored_sum,
)
from tiny import relative_error
from torch.nn import Parameter

import accumkern
from accumkern.formats import BUFFERS, decode, encode

micro_gradients = functools.partial(gradients.micro_gradients, mean=3.0)


# ---- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("buffer", "dtype"), CASES)
def test_grad_is_visible_and_correctly_rounded_after_every_backward(
    buffer: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    param = parameter(3, 41, dtype=dtype, device=device)
    acc = accumkern.attach(sgd(param), buffer, backend=backend)
    grads = micro_gradients(24, 3, 41, dtype=dtype, mean=1.0, device=device)
    for n, grad in enumerate(grads, 1):
        backward(param, grad)
        total, x = stored_sum(buffer, grads[:n])
        assert_same_bits(param.grad, total)
        assert_same_bits(acc.gradient(param), x)
        assert_correctly_rounded(param.grad, x)


@pytest.mark.parametrize(("buffer", "dtype"), ACCURATE_CASES)
def test_sum_is_bit_for_bit_the_sequential_fp32_sum(
    buffer: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    param = parameter(1000, dtype=dtype, device=device)
    acc = accumkern.attach(sgd(param), buffer, backend=backend)
    grads = micro_gradients(48, 1000, dtype=dtype, mean=0.3, device=device)
    for grad in grads:
        backward(param, grad)
    assert_same_bits(acc.gradient(param), fp32_sum(grads))


def errors_of_accumulation(count: int, buffer: str) -> tuple[float, float, float]:
    """Return the errors of a buffer, of FP32 and of stock bfloat16 against the FP64 sum of unrounded gradients."""
    attached, stock = parameter(4096), parameter(4096)
    acc = accumkern.attach(sgd(attached), buffer)
    generator = torch.Generator().manual_seed(count)
    truth = torch.zeros(4096, dtype=torch.float64)
    fp32 = torch.zeros(4096)
    for _ in range(count):
        micro_gradient = torch.randn(4096, generator=generator, dtype=torch.float64) + 3
        truth += micro_gradient
        fp32 += micro_gradient.to(BF16)
        for param in (attached, stock):
            backward(param, micro_gradient.to(BF16))
    assert stock.grad is not None
    return (
        relative_error([gradient(acc, attached)], [truth]),
        relative_error([fp32], [truth]),
        relative_error([stock.grad], [truth]),
    )


@pytest.mark.parametrize("count", [8, 64])
def test_split24_is_as_accurate_as_fp32_up_to_64_micro_batches(count: int) -> None:
    split24, fp32, stock = errors_of_accumulation(count, "split24")
    assert split24 < 1.5 * fp32
    assert stock > 4 * fp32


def test_split24_is_accurate_after_512_micro_batches_where_stock_is_not() -> None:
    split24, _, stock = errors_of_accumulation(512, "split24")
    assert split24 < 5e-4
    assert stock > 1e-1


@pytest.mark.parametrize("buffer", ["split32", "fp32"])
def test_split32_and_fp32_have_the_error_of_fp32_after_512_micro_batches(buffer: str) -> None:
    found, fp32, _ = errors_of_accumulation(512, buffer)
    assert found == fp32


@pytest.mark.parametrize("average_over", [None, 4], ids=["sum", "average"])
@pytest.mark.parametrize(("buffer", "dtype"), CASES)
def test_grad_keeps_dtype_shape_strides_and_identity(buffer: str, dtype: torch.dtype, average_over: int | None) -> None:
    param = parameter(5, 7, dtype=dtype)
    optimizer = sgd(param)  # it keeps the accumulator alive
    accumkern.attach(optimizer, buffer, average_over=average_over)
    first = None
    for grad in micro_gradients(5, 5, 7, dtype=dtype):
        backward(param, grad)
        first = first if first is not None else param.grad
        assert param.grad is first
        assert param.grad is not None
        assert (param.grad.dtype, param.grad.shape, param.grad.stride()) == (dtype, param.shape, param.stride())
        assert not param.grad.requires_grad


@pytest.mark.parametrize("buffer", BUFFERS)
def test_special_values_do_what_they_do_in_fp32(buffer: str) -> None:
    inf, nan, tiny = math.inf, math.nan, 2.0**-133
    first = torch.tensor([inf, -inf, inf, nan, 1.0, 3e38, 0.0, -0.0, tiny, -tiny, 1.0], dtype=BF16)
    then = torch.tensor([1.0, -1.0, -inf, 1.0, nan, 3e38, -0.0, -0.0, tiny, tiny, -1.0], dtype=BF16)
    param = parameter(first.numel())
    acc = accumkern.attach(sgd(param), buffer)
    for _ in range(2):  # the second window must not remember the first
        param.grad = None
        backward(param, first)
        backward(param, then)
        expected = first.float() + then.float()
        assert_same_bits(gradient(acc, param).isnan(), expected.isnan())
        finite = ~expected.isnan()
        assert_same_bits(gradient(acc, param)[finite], expected[finite])
        assert param.grad is not None
        assert_same_bits(param.grad[finite], expected[finite].to(BF16))


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (1, 1, 5, 1)], ids=str)
def test_any_shape(shape: tuple[int, ...], buffer: str, backend: str, device: torch.device) -> None:
    param, other = parameter(*shape, device=device), parameter(3, device=device)
    acc = accumkern.attach(sgd(param, other), buffer, backend=backend)
    grads = micro_gradients(6, *shape, device=device)
    for grad in grads:
        backward_of_all([param, other], [grad, torch.ones(3, device=device)])
    assert_same_bits(acc.gradient(param), stored_sum(buffer, grads)[1])
    assert param.grad is not None
    assert param.grad.shape == param.shape
    assert (gradient(acc, other) == 6).all()


# ---- average_over --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("buffer", "dtype"), CASES)
@pytest.mark.parametrize("average_over", [8, 3, 7, 2.5, 0.75, 1])
def test_average_over_multiplies_inside_the_fused_addition(
    average_over: float, buffer: str, dtype: torch.dtype
) -> None:
    param = parameter(500, dtype=dtype)
    acc = accumkern.attach(sgd(param), buffer, average_over=average_over)
    grads = micro_gradients(7, 500, dtype=dtype, mean=0.5)
    for n, grad in enumerate(grads, 1):
        backward(param, grad)
        total, x = stored_sum(buffer, grads[:n], 1 / average_over)
        assert_same_bits(param.grad, total)
        assert_same_bits(acc.gradient(param), x)
    if buffer != "split24" or dtype is torch.float32:
        expected = fp32_sum(grads, float(torch.tensor(1 / average_over)))
        assert_same_bits(acc.gradient(param), expected)


@pytest.mark.parametrize(("buffer", "dtype"), CASES)
def test_average_over_a_power_of_two_on_every_backend(
    buffer: str, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    param = parameter(500, dtype=dtype, device=device)
    acc = accumkern.attach(sgd(param), buffer, average_over=8, backend=backend)
    grads = micro_gradients(8, 500, dtype=dtype, device=device)
    for grad in grads:
        backward(param, grad)
    total, x = stored_sum(buffer, grads, 1 / 8)
    assert_same_bits(param.grad, total)
    assert_same_bits(acc.gradient(param), x)


def test_average_over_three_with_eager_is_within_an_ulp_a_step() -> None:
    param = parameter(500)
    acc = accumkern.attach(sgd(param), "split32", average_over=3, backend="eager")
    grads = micro_gradients(3, 500)
    for grad in grads:
        backward(param, grad)
    torch.testing.assert_close(acc.gradient(param), fp32_sum(grads, 1 / 3), rtol=3 * 2.0**-23, atol=0)


@pytest.mark.parametrize(("buffer", "dtype"), CASES)
@pytest.mark.parametrize("average_over", [4, 3])
def test_single_micro_batch_is_averaged_too(average_over: int, buffer: str, dtype: torch.dtype) -> None:
    param = parameter(100, dtype=dtype)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, buffer, average_over=average_over)
    for grad in micro_gradients(3, 100, dtype=dtype):
        backward(param, grad)
        x = grad.float() * torch.tensor(1 / average_over)
        total, residual = encode(BUFFERS[buffer][dtype], x)
        assert_same_bits(param.grad, total)
        assert_same_bits(acc.gradient(param), decode(BUFFERS[buffer][dtype], total, residual))
        optimizer.zero_grad()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_short_last_window_is_summed_with_the_same_factor_and_nothing_else(set_to_none: bool) -> None:
    param = parameter(100)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, "split32", average_over=8)
    for length in (8, 8, 3):
        optimizer.zero_grad(set_to_none=set_to_none)
        grads = micro_gradients(length, 100)
        for grad in grads:
            backward(param, grad)
        assert_same_bits(acc.gradient(param), fp32_sum(grads, 1 / 8))


@pytest.mark.parametrize("average_over", [None, 4], ids=["sum", "average"])
def test_gradients_that_share_memory_are_scaled_once(average_over: int | None) -> None:
    """Autograd may give views of one tensor to two parameters, and to the caller who passed it to backward()."""
    a, b = parameter(2, 3), parameter(2, 3)
    optimizer = sgd(a, b)  # it keeps the accumulator alive
    accumkern.attach(optimizer, average_over=average_over)
    given = torch.arange(6.0).to(BF16).view(3, 2)
    kept = given.clone()
    (a.view(3, 2) + b.view(3, 2)).backward(given)
    expected = kept.view(2, 3) / (average_over or 1)
    assert_same_bits(a.grad, expected)
    assert_same_bits(b.grad, expected)
    assert_same_bits(given, kept)


# ---- memory that grows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
@pytest.mark.parametrize("sizes", [((8, 4), (700, 400)), ((700, 400), (8, 4))], ids=["grows", "shrinks"])
def test_a_parameter_of_another_size_gets_a_residual_of_that_size(
    buffer: str, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    """``set_`` leaves the hooks where they are; a kernel must not write beyond the memory that there was."""
    before, after = sizes
    param = parameter(*before)
    acc = accumkern.attach(torch.optim.SGD([param], lr=1.0), buffer, stats=True)  # folds leave partial sums too
    for _ in range(2):
        backward(param, 1.0)
    param.grad = None
    with torch.no_grad():
        param.set_(torch.zeros(after, dtype=torch.bfloat16))
    for value in (1.0, 2.0**-9, 2.0**-9):
        backward(param, value)
    parts = acc.parts(param)
    assert parts is not None
    assert parts.residual is not None
    assert parts.residual.shape == after
    assert (acc.gradient(param) == 1 + 2.0**-8).all()
    count = param.numel()
    torch.testing.assert_close(acc.finish().norm, torch.tensor((1 + 2.0**-8) * count**0.5))


@pytest.mark.parametrize("size", [2, 90000])
def test_a_sum_that_is_replaced_while_it_waits_is_not_written_beyond(size: int, waiting: bool) -> None:
    first, second = parameter(8), parameter(8)
    optimizer = torch.optim.SGD([first, second], lr=1.0)
    accumkern.attach(optimizer, "split32")
    for _ in range(2):
        (first.float() + second.float()).sum().backward()

    arrived: list[Parameter] = []

    def arrive(param: Parameter) -> None:
        for waiting in arrived:  # small gradients wait for the end of the backward pass
            assert waiting.grad is not None
            waiting.grad.data = torch.zeros(size, dtype=torch.bfloat16)
        arrived.append(param)

    for param in (first, second):
        param.register_hook(lambda _, param=param: arrive(param))
    if not waiting:
        (first.float() + second.float()).sum().backward()  # the first is folded already
        return
    with pytest.raises(ValueError, match="given another size in the middle of a window"):
        (first.float() + second.float()).sum().backward()
