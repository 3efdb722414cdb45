"""Parameters and gradients of any layout: permuted, expanded, with holes, views of one buffer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import gradients
import pytest
import torch
from gradients import (
    BF16,
    Give,
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
from torch import Tensor
from torch.nn import Parameter

import accumkern
from accumkern.formats import BUFFERS

micro_gradients = functools.partial(gradients.micro_gradients, mean=3.0)


# ---- layouts -------------------------------------------------------------------------------------------------------


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
