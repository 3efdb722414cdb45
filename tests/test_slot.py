"""Windows, edits and what is read back: whether residual and ``.grad`` belong together."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable

import gradients
import pytest
import torch
from gradients import (
    BF16,
    CASES,
    LOW_PRECISION_CASES,
    Give,
    assert_same_bits,
    backward,
    fp32_sum,
    gradient,
    half_ulp,
    parameter,
    sgd,
    stored_sum,
)
from torch import Tensor
from torch.nn import Parameter

import accumkern
from accumkern.formats import BUFFERS, Format, decode, encode

micro_gradients = functools.partial(gradients.micro_gradients, mean=3.0)


# ---- windows -------------------------------------------------------------------------------------------------------


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


# ---- edits of .grad ------------------------------------------------------------------------------------------------


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


# ---- gradient() ----------------------------------------------------------------------------------------------------


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


# ---- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buffer", "format_"),
    [("split24", Format.SPLIT24), ("split32", Format.SPLIT32), ("fp32", Format.MAIN_GRAD_BFLOAT16)],
    ids=["split24", "split32", "fp32"],
)
def test_parts_are_what_is_stored(buffer: str, format_: Format) -> None:
    param = Parameter(torch.zeros(3, 5, 2, 2, dtype=torch.bfloat16).to(memory_format=torch.channels_last))
    acc = accumkern.attach(torch.optim.SGD([param], lr=1.0), buffer)
    assert acc.parts(param) is None
    backward(param, 1.0)
    first = acc.parts(param)
    assert first is not None
    assert first.residual is None  # the first gradient is kept as it came
    for n in range(3):
        backward(param, 1 / (n + 3))
    parts = acc.parts(param)
    assert parts is not None
    assert parts.sum is param.grad
    assert parts.format is format_
    assert parts.residual is not None
    assert (parts.residual.shape, parts.residual.stride()) == (param.grad.shape, param.grad.stride())
    assert torch.equal(decode(parts.format, parts.sum, parts.residual), acc.gradient(param))
    param.grad.mul_(2)  # an edit: the residual counts as zero
    edited = acc.parts(param)
    assert edited is not None
    assert edited.residual is None


@pytest.mark.parametrize("size", [2, 90000])
def test_a_sum_of_another_size_has_no_residual(size: int) -> None:
    """``.grad.data`` was replaced, which no version tells: nothing is read beyond the residual."""
    param = parameter(8)
    acc = accumkern.attach(torch.optim.SGD([param], lr=1.0), "split32")
    for value in (1.0, 2.0**-9):
        backward(param, value)
    assert param.grad is not None
    param.grad.data = torch.full((size,), 3.0, dtype=torch.bfloat16)
    parts = acc.parts(param)
    assert parts is not None
    assert parts.residual is None
    assert (acc.gradient(param) == 3).all()
    acc.finish(2.0)
    assert (param.grad == 1.5).all()


def test_parts_of_what_torch_adds_by_itself_have_no_format() -> None:
    param = Parameter(torch.zeros(4, dtype=torch.complex64))
    acc = accumkern.attach(torch.optim.SGD([param], lr=1.0))
    param.real.sum().backward()
    parts = acc.parts(param)
    assert parts is not None
    assert parts.sum is param.grad
    assert (parts.residual, parts.format) == (None, None)
    with pytest.raises(ValueError, match="not a parameter of the attached optimizer"):
        acc.parts(torch.zeros(1))
