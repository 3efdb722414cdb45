"""What the hook accumulates: sums are compared, bit for bit, with the formats and with a sequence of FP32 additions.

Truth is a plain FP32 (for errors: FP64) sum of micro-gradients that the tests choose themselves. The training loop is
always the stock one; what autograd does besides adding is in test_autograd.py, and what outlives a window in
test_state.py.
"""

import functools
import gc
import math
import re
from collections.abc import Callable

import gradients
import pytest
import torch
from gradients import BF16, assert_same_bits, assert_stock, backward, backward_of_all, fp32_sum, parameter, sgd
from tiny import relative_error
from torch import Tensor
from torch.nn import Parameter

import accumkern
from accumkern import backends
from accumkern.formats import BUFFERS, decode, encode, fma

micro_gradients = functools.partial(gradients.micro_gradients, mean=3.0)
CASES = [
    pytest.param(buffer, dtype, id=f"{buffer}-{str(dtype)[6:]}")
    for buffer, formats in BUFFERS.items()
    for dtype in formats
]
LOW_PRECISION_CASES = [case for case in CASES if case.values[1] is not torch.float32]
ACCURATE_CASES = [case for case in CASES if case.values != ("split24", BF16)]  # those that hold FP32 exactly


# ---- helpers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record each launch of a kernel: the numbers of elements of its tensors."""
    recorded: list[list[int]] = []
    original = backends.kernels

    def kernels(name: str) -> backends.Kernels:
        found = original(name)

        def fold_and_record(format_, start, grads, *others):  # type: ignore[no-untyped-def]
            recorded.append([grad.numel() for grad in grads])
            found.fold(format_, start, grads, *others)

        return found._replace(fold=fold_and_record)

    monkeypatch.setattr(backends, "kernels", kernels)
    return recorded


class Give(torch.autograd.Function):
    """A zero whose gradient for `param` is the very tensor that `make` returns: its layout survives."""

    @staticmethod
    def forward(ctx, param, make):  # type: ignore[no-untyped-def]
        ctx.make = make
        return param.new_zeros(())

    @staticmethod
    def backward(ctx, _grad):  # type: ignore[no-untyped-def]
        return ctx.make(), None


def stored_sum(buffer: str, grads: list[Tensor], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return .grad and the accumulated FP32 value as the formats have them after these micro-gradients."""
    format_ = BUFFERS[buffer][grads[0].dtype]
    x = grads[0].float() * torch.tensor(scale)
    total, residual = encode(format_, x)
    for grad in grads[1:]:
        total, residual = encode(format_, fma(scale, grad, decode(format_, total, residual)))
    return total, decode(format_, total, residual)


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


# ---- sums --------------------------------------------------------------------------------------------------------


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


# ---- windows -----------------------------------------------------------------------------------------------------


def test_first_micro_batch_keeps_the_gradient_that_autograd_made(launches: list[list[int]]) -> None:
    param = parameter(12347)
    acc = accumkern.attach(sgd(param))
    address = []

    def make() -> Tensor:
        made = torch.ones(12347, dtype=BF16)
        address.append(made.data_ptr())
        return made

    Give.apply(param, make).backward()
    assert param.grad is not None
    assert param.grad.data_ptr() == address[0]
    assert launches == []
    assert acc.state_dict()["residuals"] == {"0": None}
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is Tensor and t.dtype is torch.int8 and t.numel() == 12347]


@pytest.mark.parametrize("average_over", [None, 4], ids=["sum", "average"])
@pytest.mark.parametrize(("buffer", "dtype"), LOW_PRECISION_CASES)
def test_residual_is_allocated_once_and_stays_where_it_is(
    buffer: str, dtype: torch.dtype, average_over: int | None
) -> None:
    param = parameter(300, dtype=dtype)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, buffer, average_over=average_over)
    addresses = set()
    for window in range(5):
        for n, grad in enumerate(micro_gradients(4, 300, dtype=dtype)):
            backward(param, grad)
            residual = acc.state_dict()["residuals"]["0"]
            if n > 0 or average_over is not None:
                assert residual.dtype is BUFFERS[buffer][dtype].residual_dtype
                addresses.add(residual.data_ptr())
        optimizer.zero_grad(set_to_none=window % 2 == 0)
    assert len(addresses) == 1


def test_float32_parameters_have_no_residual() -> None:
    param = parameter(300, dtype=torch.float32)
    acc = accumkern.attach(sgd(param), average_over=3)
    for grad in micro_gradients(3, 300, dtype=torch.float32):
        backward(param, grad)
        assert acc.state_dict()["residuals"] == {"0": None}


NEW_WINDOW: dict[str, Callable[[torch.nn.Module, torch.optim.Optimizer], object]] = {
    "optimizer.zero_grad()": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer.zero_grad(set_to_none=False)": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda model, optimizer: model.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "p.grad = None": lambda model, optimizer: setattr(model.weight, "grad", None),
    "del p.grad": lambda model, optimizer: delattr(model.weight, "grad"),
    "p.grad.zero_()": lambda model, optimizer: model.weight.grad.zero_(),
    "p.grad.detach().zero_()": lambda model, optimizer: model.weight.grad.detach().zero_(),
    "p.grad.data.zero_()": lambda model, optimizer: model.weight.grad.data.zero_(),
    "p.grad = zeros": lambda model, optimizer: setattr(model.weight, "grad", torch.zeros_like(model.weight)),
    "p.grad.data = zeros": lambda model, optimizer: setattr(model.weight.grad, "data", torch.zeros_like(model.weight)),
    "p.grad.mul_(0)": lambda model, optimizer: model.weight.grad.mul_(0),
    "p.grad = 0 * p.grad": lambda model, optimizer: setattr(model.weight, "grad", model.weight.grad * 0),
}


@pytest.mark.parametrize("start", NEW_WINDOW)
@pytest.mark.parametrize("average_over", [None, 8], ids=["sum", "average"])
@pytest.mark.parametrize("buffer", BUFFERS)
def test_every_way_of_zeroing_begins_a_new_window(buffer: str, average_over: int | None, start: str) -> None:
    model = torch.nn.Linear(64, 3, bias=False, dtype=BF16)
    optimizer = sgd(model.weight)
    acc = accumkern.attach(optimizer, buffer, average_over=average_over)
    for length in (5, 1, 8):
        grads = micro_gradients(length, 3, 64, mean=0.0)
        for grad in grads:
            backward(model.weight, grad)
        total, x = stored_sum(buffer, grads, 1 / (average_over or 1))
        assert_same_bits(model.weight.grad, total)
        assert_same_bits(acc.gradient(model.weight), x)
        NEW_WINDOW[start](model, optimizer)
        assert model.weight.grad is None or not model.weight.grad.any()


@pytest.mark.parametrize("buffer", BUFFERS)
def test_zeros_written_through_data_beside_any_residual_count_as_zero(buffer: str) -> None:
    param = parameter(4096)
    acc = accumkern.attach(sgd(param), buffer)
    for grad in micro_gradients(3, 4096, mean=0.0):
        backward(param, grad * torch.linspace(0.01, 3, 4096, dtype=BF16))
    if buffer != "fp32":  # a borrow from the sum, and none
        residual = acc.state_dict()["residuals"]["0"]
        assert (residual < 0).any()
        assert (residual > 0).any()
    assert param.grad is not None
    for zero in (0.0, -0.0):
        param.grad.data.fill_(zero)
        assert gradient(acc, param).abs().max() < 2.0**-133  # less than the smallest bfloat16
        backward(param, torch.zeros(4096))
        assert not param.grad.any()
        grads = micro_gradients(4, 4096)
        for grad in grads:
            backward(param, grad)
        assert_same_bits(acc.gradient(param), stored_sum(buffer, grads)[1])


def test_windows_may_be_swapped(backend: str, device: torch.device) -> None:
    """Two windows in turn, as methods do that combine the gradients of several tasks."""
    param = parameter(200, device=device)
    acc = accumkern.attach(sgd(param), "split32", backend=backend)
    a, b = micro_gradients(6, 200, device=device), micro_gradients(5, 200, device=device)
    for grad in a[:3]:
        backward(param, grad)
    kept, param.grad = param.grad, None
    for grad in b:
        backward(param, grad)
    assert_same_bits(acc.gradient(param), fp32_sum(b))
    param.grad = kept
    assert kept is not None
    x = kept.float()  # of a gradient that was put away only .grad is left
    for grad in a[3:]:
        backward(param, grad)
        x = x + grad.float()
    assert_same_bits(acc.gradient(param), x)


# ---- edits of .grad ----------------------------------------------------------------------------------------------


def unscale(param: Parameter, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler(param.device.type, init_scale=4.0)
    scaler.scale(torch.zeros(()))
    scaler.unscale_(optimizer)


EDITS: dict[str, Callable[[Parameter], object]] = {
    "mul_": lambda p: p.grad.mul_(0.7),
    "add_": lambda p: p.grad.add_(1),
    "copy_": lambda p: p.grad.copy_(torch.full_like(p.grad, 0.3)),
    "fill_": lambda p: p.grad.fill_(-2),
    "one element": lambda p: p.grad.view(-1)[5:6].fill_(9),
    "through a view": lambda p: p.grad.view(-1).mul_(3),
    "through detach()": lambda p: p.grad.detach().mul_(3),
    "set_": lambda p: p.grad.set_(torch.full_like(p.grad, 0.3)),
    "foreach": lambda p: torch._foreach_mul_([p.grad], 0.7),
    "clip_grad_norm_": lambda p: torch.nn.utils.clip_grad_norm_([p], 1.0),
    "clip_grad_norm_, not foreach": lambda p: torch.nn.utils.clip_grad_norm_([p], 1.0, foreach=False),
    "clip_grad_value_": lambda p: torch.nn.utils.clip_grad_value_([p], 0.5),
    "product assigned": lambda p: setattr(p, "grad", p.grad * 0.7),
    "clone assigned": lambda p: setattr(p, "grad", p.grad.clone()),
    "other tensor assigned": lambda p: setattr(p, "grad", torch.full_like(p.grad, 0.3)),
    "product assigned, the old tensor kept": lambda p: (p.grad, setattr(p, "grad", p.grad * 0.7)),
    "to nan": lambda p: p.grad.fill_(math.nan),
    "to inf": lambda p: p.grad.fill_(math.inf),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(("buffer", "dtype"), LOW_PRECISION_CASES)
def test_edit_of_grad_wins(buffer: str, dtype: torch.dtype, edit: str) -> None:
    param = parameter(7, 31, dtype=dtype)
    acc = accumkern.attach(sgd(param), buffer)
    grads = micro_gradients(9, 7, 31, dtype=dtype, mean=0.5)
    for grad in grads[:5]:
        backward(param, grad)
    kept = EDITS[edit](param)  # what an edit returns stays alive
    assert param.grad is not None
    edited = param.grad.clone()
    assert_same_bits(acc.gradient(param), edited.float())
    format_ = BUFFERS[buffer][dtype]
    x = edited.float()
    for grad in grads[5:]:
        backward(param, grad)
        total, residual = encode(format_, x + grad.float())
        x = decode(format_, total, residual)
        assert_same_bits(param.grad, total)
        assert_same_bits(acc.gradient(param), x)
    del kept


@pytest.mark.parametrize("average_over", [None, 4], ids=["sum", "average"])
@pytest.mark.parametrize("when", [1, 2], ids=["after the first micro-batch", "after the second"])
def test_edit_early_in_a_window_wins(when: int, average_over: int | None, backend: str, device: torch.device) -> None:
    param = parameter(50, device=device)
    acc = accumkern.attach(sgd(param), "split32", average_over=average_over, backend=backend)
    grads = micro_gradients(4, 50, device=device)
    for grad in grads[:when]:
        backward(param, grad)
    assert param.grad is not None
    param.grad.mul_(0.7)
    x = param.grad.float()
    for grad in grads[when:]:
        backward(param, grad)
        x = x + grad.float() / (average_over or 1)
    assert_same_bits(acc.gradient(param), x)


SILENT_EDITS: dict[str, Callable[[Parameter, torch.optim.Optimizer], object]] = {
    "data.mul_": lambda p, optimizer: p.grad.data.mul_(0.7),
    "data.mul_ by -3": lambda p, optimizer: p.grad.data.mul_(-3),
    "data.add_": lambda p, optimizer: p.grad.data.add_(1),
    "data.copy_": lambda p, optimizer: p.grad.data.copy_(torch.full_like(p.grad, 0.3)),
    "data.fill_ a power of two": lambda p, optimizer: p.grad.data.fill_(0.5),
    "data =": lambda p, optimizer: setattr(p.grad, "data", p.grad.data * 0.7),
    "numpy": lambda p, optimizer: p.grad.view(torch.int16).numpy().__iadd__(3),
    "GradScaler.unscale_": lambda p, optimizer: unscale(p, optimizer),
}


@pytest.mark.parametrize("edit", SILENT_EDITS)
@pytest.mark.parametrize("buffer", BUFFERS)
def test_edit_that_leaves_no_trace_wins_to_half_an_ulp(buffer: str, edit: str) -> None:
    """What is written through .data or numpy changes no version, so a stale residual may be added to it."""
    param = parameter(7, 31)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, buffer)
    grads = micro_gradients(9, 7, 31, mean=0.5)
    for grad in grads[:5]:
        backward(param, grad)
    SILENT_EDITS[edit](param, optimizer)
    assert param.grad is not None
    edited = param.grad.clone()
    bound = half_ulp(edited)
    assert ((gradient(acc, param).double() - edited.double()).abs() <= bound).all()
    truth = edited.double()
    for grad in grads[5:]:
        backward(param, grad)
        truth = truth + grad.double()
        bound = bound + truth.abs() * 2.0 ** (-16 if buffer == "split24" else -24)
    assert ((gradient(acc, param).double() - truth).abs() <= bound).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.t().contiguous().t(),
        lambda g: g.repeat_interleave(2, 1)[:, ::2],
        lambda g: torch._neg_view(-g),
    ],
    ids=["transposed", "strided", "lazily negated"],
)
def test_grad_data_of_another_layout_wins(change: Callable[[Tensor], Tensor]) -> None:
    """An assignment to .grad.data changes neither the tensor's identity nor its version, but its layout."""
    param = parameter(2, 3)
    acc = accumkern.attach(sgd(param), "split32")
    for _ in range(3):
        backward(param, torch.ones(2, 3))
    assert param.grad is not None
    param.grad.data = change(torch.tensor([[1.0, 2.0, 4.0], [1.0, 3.0, 5.0]]).to(BF16))
    backward(param, torch.arange(6.0).view(2, 3))
    expected = torch.tensor([[1.0, 3.0, 6.0], [4.0, 7.0, 10.0]])
    assert_same_bits(param.grad.resolve_neg(), expected.to(BF16))
    assert_same_bits(acc.gradient(param), expected)


def test_grad_data_that_is_a_slice_keeps_its_neighbours() -> None:
    param = parameter(4)
    acc = accumkern.attach(sgd(param), "split32")
    for _ in range(3):
        backward(param, torch.ones(4))
    memory = torch.full((8,), 5.0, dtype=BF16)
    assert param.grad is not None
    param.grad.data = memory[::2]
    backward(param, torch.ones(4))
    assert memory.tolist() == [6, 5] * 4
    assert (gradient(acc, param) == 6).all()


def test_gradscaler_loop_with_float32_parameters() -> None:
    param, stock = parameter(9, dtype=torch.float32), parameter(9, dtype=torch.float32)
    accumkern.attach(attached_sgd := sgd(param))
    for p, optimizer in ((param, attached_sgd), (stock, sgd(stock))):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for grad in micro_gradients(6, 9, dtype=torch.float32):
            scaler.scale((p * grad).sum()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert_same_bits(param, stock)


# ---- average_over ------------------------------------------------------------------------------------------------


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


# ---- gradient() --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("buffer", "dtype"), CASES)
def test_gradient_is_a_new_fp32_tensor_of_the_shape_of_the_parameter(buffer: str, dtype: torch.dtype) -> None:
    param = parameter(2, 3, dtype=dtype)
    acc = accumkern.attach(sgd(param), buffer)
    grads = micro_gradients(4, 2, 3, dtype=dtype)
    for n, grad in enumerate(grads, 1):
        backward(param, grad)
        found = gradient(acc, param)
        assert found.dtype is torch.float32
        assert found.shape == (2, 3)
        assert not found.requires_grad
        found.fill_(-1)
        assert_same_bits(acc.gradient(param), stored_sum(buffer, grads[:n])[1])


def test_gradient_is_none_where_grad_is_none() -> None:
    param, unused = parameter(2), parameter(2)
    acc = accumkern.attach(sgd(param, unused))
    assert acc.gradient(param) is None
    for _ in range(2):
        backward(param, torch.ones(2))
    assert acc.gradient(unused) is None
    param.grad = None
    assert acc.gradient(param) is None


def test_gradient_refuses_what_is_no_parameter_of_the_optimizer() -> None:
    param = parameter(2)
    acc = accumkern.attach(sgd(param))
    for foreign in (parameter(2), torch.zeros(2), None, "weight"):
        with pytest.raises(ValueError, match="param is not a parameter of the attached optimizer"):
            acc.gradient(foreign)  # type: ignore[arg-type]


def test_repr_names_buffer_scale_and_parameters() -> None:
    acc = accumkern.attach(sgd(parameter(2), parameter(3)), "split32", average_over=8)
    assert repr(acc) == "GradAccumulator(buffer='split32', scale=0.125, 2 parameters)"
    acc.detach()
    assert repr(acc) == "GradAccumulator(buffer='split32', scale=0.125, detached)"


# ---- layouts -----------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels_last": lambda: torch.zeros(4, 3, 5, 2).to(memory_format=torch.channels_last),
    "channels_last of one channel": lambda: torch.zeros(4, 1, 5, 2).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.zeros(2, 3, 4, 2, 3).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: torch.zeros(6, 4).t(),
    "permuted": lambda: torch.zeros(3, 4, 5).permute(1, 2, 0),
    "strided": lambda: torch.zeros(4, 10)[:, ::2],
}


def laid_out(layout: str, backend_device: str) -> Parameter:
    return Parameter(LAYOUTS[layout]().to(BF16).to(backend_device))


@pytest.mark.parametrize("average_over", [None, 4], ids=["sum", "average"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_any_layout(layout: str, average_over: int | None, backend: str, device: torch.device) -> None:
    param = laid_out(layout, device)
    acc = accumkern.attach(sgd(param), "split32", average_over=average_over, backend=backend)
    grads = micro_gradients(5, *param.shape, device=device)
    scale = 1 / (average_over or 1)
    for n, grad in enumerate(grads, 1):
        backward(param, grad)
        assert_same_bits(acc.gradient(param), fp32_sum(grads[:n], scale))
        assert_correctly_rounded(param.grad, fp32_sum(grads[:n], scale))
    stock = laid_out(layout, device)
    backward(stock, grads[0])
    assert param.grad is not None
    assert stock.grad is not None
    assert param.grad.stride() == stock.grad.stride()


INCOMING: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda g: g.contiguous(),
    "transposed": lambda g: g.t().contiguous().t(),
    "strided": lambda g: g.repeat_interleave(2, 1)[:, ::2],
    "lazily negated": lambda g: torch._neg_view(-g),
    "lazily negated, transposed": lambda g: torch._neg_view((-g).t().contiguous().t()),
    "unaligned": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
}


@pytest.mark.parametrize("average_over", [None, 4], ids=["sum", "average"])
@pytest.mark.parametrize("running", ["transposed", "contiguous"])
@pytest.mark.parametrize("incoming", INCOMING)
def test_incoming_gradients_of_any_layout(incoming: str, running: str, average_over: int | None) -> None:
    param = parameter(3, 7) if running == "contiguous" else Parameter(torch.zeros(7, 3, dtype=BF16).t())
    acc = accumkern.attach(sgd(param), "split32", average_over=average_over)
    grads = micro_gradients(5, 3, 7)
    for n, grad in enumerate(grads, 1):
        Give.apply(param, lambda grad=grad: INCOMING[incoming](grad)).backward()
        assert_same_bits(acc.gradient(param), fp32_sum(grads[:n], 1 / (average_over or 1)))


@pytest.mark.parametrize("average_over", [None, 4], ids=["sum", "average"])
def test_expanded_gradients(average_over: int | None, backend: str, device: torch.device) -> None:
    param = parameter(4, 6, device=device)
    acc = accumkern.attach(sgd(param), "split32", average_over=average_over, backend=backend)
    rows = micro_gradients(5, 6, device=device)
    for row in rows:
        Give.apply(param, lambda row=row: row.expand(4, 6)).backward()
    assert_same_bits(acc.gradient(param), fp32_sum(rows, 1 / (average_over or 1)).expand(4, 6))
    param.grad = None
    param.sum().backward()
    param.sum().backward()
    assert (gradient(acc, param) == 2 / (average_over or 1)).all()


USER_GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda g: g.clone(),
    "transposed": lambda g: g.t().contiguous().t(),
    "strided": lambda g: g.repeat_interleave(2, 1)[:, ::2],
    "strided both ways": lambda g: g.t().repeat_interleave(2, 1)[:, ::2].t(),
    "lazily negated": lambda g: torch._neg_view(-g),
    "lazily negated, transposed": lambda g: torch._neg_view((-g).t().contiguous().t()),
    "lazily negated, strided": lambda g: torch._neg_view((-g).repeat_interleave(2, 1)[:, ::2]),
    "unaligned": lambda g: torch.cat([g.new_zeros(1), g.flatten()])[1:].view(g.shape),
}


@pytest.mark.parametrize("user_grad", USER_GRADS)
@pytest.mark.parametrize("of_parameter", ["contiguous", "transposed"])
@pytest.mark.parametrize("buffer", BUFFERS)
def test_grad_set_by_the_user_in_any_layout(
    buffer: str, of_parameter: str, user_grad: str, backend: str, device: torch.device
) -> None:
    param = parameter(3, 7, device=device)
    if of_parameter == "transposed":
        param = Parameter(param.detach().t().contiguous().t())
    acc = accumkern.attach(sgd(param), buffer, backend=backend)
    grads = micro_gradients(6, 3, 7, device=device)
    param.grad = mine = USER_GRADS[user_grad](grads[0])
    for n, grad in enumerate(grads[1:], 2):
        backward(param, grad)
        total, x = stored_sum(buffer, grads[:n])
        assert param.grad is mine
        assert_same_bits(mine.resolve_neg(), total)
        assert_same_bits(acc.gradient(param), x)


def test_grad_that_is_a_slice_leaves_its_neighbours_alone(backend: str, device: torch.device) -> None:
    param = parameter(4, 5, device=device)
    acc = accumkern.attach(sgd(param), "split32", backend=backend)
    memory = torch.full((6, 12), 77.0, dtype=BF16, device=device)
    param.grad = memory[1:5, 1:11:2]
    param.grad.zero_()
    grads = micro_gradients(6, 4, 5, device=device)
    for grad in grads:
        backward(param, grad)
    assert_same_bits(acc.gradient(param), fp32_sum(grads))
    memory[1:5, 1:11:2] = 77
    assert (memory == 77).all()


@pytest.mark.parametrize(
    ("buffer", "average_over"),
    [("split32", None), ("split32", 4), ("fp32", None)],
    ids=["split32", "split32-average", "fp32"],
)
def test_gradients_that_are_views_of_one_flat_buffer_keep_their_residuals(
    buffer: str, average_over: int | None, backend: str, device: torch.device
) -> None:
    """Views of one tensor share one version counter, so writing one looks like an edit of all."""
    shapes = [(3, 5), (7,), (257, 256), (), (2, 2)]
    params = [parameter(*shape, device=device) for shape in shapes]
    flat = torch.zeros(sum(p.numel() for p in params), dtype=BF16, device=device)
    for param, view in zip(params, flat.split([p.numel() for p in params]), strict=True):
        param.grad = view.view_as(param)
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer, buffer, average_over=average_over, backend=backend)
    for zero in (lambda: optimizer.zero_grad(set_to_none=False), flat.zero_):
        zero()
        assert not flat.any()
        grads = [micro_gradients(3, *shape, device=device) for shape in shapes]
        for micro_batch in zip(*grads, strict=True):
            backward_of_all(params, micro_batch)
        for param, of_param in zip(params, grads, strict=True):
            x = fp32_sum([torch.zeros_like(of_param[0]), *of_param], 1 / (average_over or 1))
            assert_same_bits(acc.gradient(param), x)
            assert_correctly_rounded(param.grad, x)
        assert_same_bits(flat, torch.cat([p.grad.flatten() for p in params]))  # type: ignore[union-attr]


def test_gradients_that_are_columns_of_one_matrix_keep_their_residuals() -> None:
    """The same for views with holes in their memory, which are written by an ordinary copy."""
    params = [parameter(8, 3), parameter(8, 2), parameter(8, 4)]
    matrix = torch.zeros(8, 9, dtype=BF16)
    for param, columns in zip(params, matrix.split([3, 2, 4], dim=1), strict=True):
        param.grad = columns
    acc = accumkern.attach(sgd(*params), "split32")
    grads = [micro_gradients(12, *param.shape) for param in params]
    for micro_batch in zip(*grads, strict=True):
        backward_of_all(params, micro_batch)
    for param, of_param in zip(params, grads, strict=True):
        assert_same_bits(acc.gradient(param), fp32_sum([torch.zeros_like(of_param[0]), *of_param]))


# ---- small and large tensors -------------------------------------------------------------------------------------


def test_large_tensors_are_folded_at_once_and_small_ones_together(launches: list[list[int]]) -> None:
    params = [parameter(65536), parameter(65537), parameter(10), parameter(90000), parameter(3, 4)]
    acc = accumkern.attach(sgd(*params), "split32")
    grads = [micro_gradients(4, *p.shape) for p in params]
    for micro_batch in zip(*grads, strict=True):
        launches.clear()
        backward_of_all(params, micro_batch)
    assert sorted(map(sorted, launches)) == [[10, 12, 65536], [65537], [90000]]
    for param, of_param in zip(params, grads, strict=True):
        assert_same_bits(acc.gradient(param), fp32_sum(of_param))


def test_small_gradients_wait_only_until_they_are_many(
    launches: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting gradients are memory that stock PyTorch would have freed."""
    monkeypatch.setattr(accumkern.passes, "MAX_WAITING_NUMEL", 100)
    params = [parameter(30) for _ in range(10)]
    acc = accumkern.attach(sgd(*params), "split32")
    grads = [micro_gradients(4, 30) for _ in params]
    for micro_batch in zip(*grads, strict=True):
        launches.clear()
        backward_of_all(params, micro_batch)
    assert launches == [[30] * 4, [30] * 4, [30] * 2]
    for param, of_param in zip(params, grads, strict=True):
        assert_same_bits(acc.gradient(param), fp32_sum(of_param))


def test_large_tensors_take_part_in_windows_and_averages(backend: str, device: torch.device) -> None:
    params = [parameter(257, 256, device=device), parameter(257, device=device)]
    optimizer = sgd(*params)
    acc = accumkern.attach(optimizer, "split24", average_over=4, backend=backend)
    for length in (3, 1):
        optimizer.zero_grad()
        grads = [micro_gradients(length, *p.shape, device=device) for p in params]
        for micro_batch in zip(*grads, strict=True):
            backward_of_all(params, micro_batch)
        for param, of_param in zip(params, grads, strict=True):
            total, x = stored_sum("split24", of_param, 1 / 4)
            assert_same_bits(param.grad, total)
            assert_same_bits(acc.gradient(param), x)


def test_parameters_of_several_dtypes_in_one_optimizer() -> None:
    params = [parameter(20, dtype=dtype) for dtype in (BF16, torch.float16, torch.float32, BF16)]
    acc = accumkern.attach(sgd(*params), "fp32")
    grads = [micro_gradients(5, 20, dtype=p.dtype) for p in params]
    for micro_batch in zip(*grads, strict=True):
        backward_of_all(params, micro_batch)
    for param, of_param in zip(params, grads, strict=True):
        assert_same_bits(acc.gradient(param), fp32_sum(of_param))


# ---- errors of attach --------------------------------------------------------------------------------------------


BAD_ARGUMENTS: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "unknown buffer": ({"buffer": "split16"}, ValueError, r"buffer is 'split16'; .* split24, split32, fp32"),
    "buffer of another kind": ({"buffer": torch.int8}, ValueError, r"buffer is torch.int8; .* split24"),
    "buffer is a list": ({"buffer": ["split24"]}, ValueError, r"buffer is \['split24'\]; .* split24"),
    "unknown backend": ({"backend": "vulkan"}, ValueError, r"backend is 'vulkan'; .* triton, cuda, cpu, eager"),
    "average over 0": ({"average_over": 0}, ValueError, "average_over is 0; .* positive number, or None"),
    "average over -1": ({"average_over": -1}, ValueError, "average_over is -1; .* positive"),
    "average over nan": ({"average_over": math.nan}, ValueError, "average_over is nan; .* positive"),
    "average over inf": ({"average_over": math.inf}, ValueError, "average_over is inf; .* positive"),
    "average over a string": ({"average_over": "8"}, ValueError, "average_over is '8'; .* positive"),
    "average over True": ({"average_over": True}, ValueError, "average_over is True; .* positive"),
    "average over a tensor": ({"average_over": torch.ones(2)}, ValueError, r"average_over is tensor.*; .* positive"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_attach_refuses_a_bad_argument_and_hooks_nothing(case: str) -> None:
    arguments, error, message = BAD_ARGUMENTS[case]
    param = parameter(4)
    optimizer = sgd(param)
    with pytest.raises(error, match=message):
        accumkern.attach(optimizer, **arguments)  # type: ignore[arg-type]
    assert "add_param_group" not in vars(optimizer)
    assert_stock(param)


@pytest.mark.parametrize(
    "not_an_optimizer",
    [torch.nn.Linear(2, 2), [parameter(2)], None, parameter(2), torch.optim.SGD],
    ids=["module", "list", "None", "parameter", "class"],
)
def test_attach_refuses_what_is_no_optimizer(not_an_optimizer: object) -> None:
    kind = type(not_an_optimizer).__name__
    with pytest.raises(TypeError, match=f"optimizer is a {kind}; it must be a torch.optim.Optimizer"):
        accumkern.attach(not_an_optimizer)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_attach_refuses_a_backend_that_cannot_run_on_the_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    param = parameter(4)
    reason = accumkern.available_backends()[name] or backends.refusal(name, "cpu")
    assert reason is not None
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run on device 'cpu': {re.escape(reason)}"):
        accumkern.attach(sgd(param), backend=name)
    assert_stock(param)


@pytest.mark.parametrize("wanted", ["nonsense", "cuda"])
def test_attach_refuses_a_bad_default_backend(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ACCUMKERN_BACKEND is refused when the hooks are made, not in the middle of the first backward pass."""
    monkeypatch.setenv("ACCUMKERN_BACKEND", wanted)
    param = parameter(4)
    with pytest.raises((ValueError, RuntimeError), match=f"ACCUMKERN_BACKEND .*'{wanted}'"):
        accumkern.attach(sgd(param))
    assert_stock(param)


def test_default_backend_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    original = backends.kernels
    monkeypatch.setattr(backends, "kernels", lambda name: used.append(name) or original(name))
    monkeypatch.setenv("ACCUMKERN_BACKEND", "eager")
    param = parameter(4)
    optimizer = sgd(param)  # it keeps the accumulator alive
    accumkern.attach(optimizer)
    for _ in range(2):
        backward(param, torch.ones(4))
    assert set(used) == {"eager"}


@pytest.mark.parametrize("buffer", ["split24", "split32"])
def test_attach_refuses_float16_with_a_split_buffer(buffer: str) -> None:
    good, bad = parameter(4), parameter(3, 2, dtype=torch.float16)
    message = rf"parameter 1 of optimizer \(shape \(3, 2\)\) is torch.float16, .*buffer='{buffer}'.* buffer='fp32'"
    with pytest.raises(TypeError, match=message):
        accumkern.attach(sgd(good, bad), buffer)
    assert_stock(good)
    assert not bad._post_accumulate_grad_hooks


def test_attach_refuses_tensor_subclasses_that_wrap_other_tensors() -> None:
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    good, bad = parameter(4), Parameter(two_tensor.TwoTensor(torch.zeros(3), torch.zeros(3)))
    with pytest.raises(TypeError, match=r"parameter 1 of optimizer \(shape \(3,\)\) is a TwoTensor; .* in place"):
        accumkern.attach(sgd(good, bad))
    assert_stock(good)


def test_second_attach_is_refused_and_changes_nothing() -> None:
    param, other = parameter(4), parameter(4)
    acc = accumkern.attach(sgd(param), "split32")
    for optimizer in (sgd(other, param), acc._optimizer):
        with pytest.raises(ValueError, match=r"parameter . of optimizer \(shape \(4,\)\) is attached already; detach"):
            accumkern.attach(optimizer)
    grads = micro_gradients(5, 4)
    for grad in grads:
        backward(param, grad)
    assert_same_bits(acc.gradient(param), fp32_sum(grads))
    assert_stock(other)


def test_add_param_group_that_is_refused_adds_nothing() -> None:
    param, half, added = parameter(4), parameter(4, dtype=torch.float16), parameter(4)
    optimizer = sgd(param)
    acc = accumkern.attach(optimizer, "split32")
    with pytest.raises(TypeError, match=r"torch.float16, .* use buffer='fp32'"):
        optimizer.add_param_group({"params": [added, half]})
    assert len(optimizer.param_groups) == 1
    assert_stock(added)
    assert not half._post_accumulate_grad_hooks
    grads = micro_gradients(5, 4)
    for grad in grads:
        backward(param, grad)
    assert_same_bits(acc.gradient(param), fp32_sum(grads))
