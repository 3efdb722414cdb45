"""Gradients that torch adds by itself: sparse, complex, float64, create_graph; as in stock PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
from torch.nn import functional as F  # noqa: N812

import accumkern
from accumkern.formats import BUFFERS

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- gradients that are left to stock PyTorch ----------------------------------------------------------------------


def embedding_loss(weight: Tensor, n: int) -> Tensor:
    tokens = torch.tensor([n % 5, 2, 2])
    return F.embedding(tokens, weight, sparse=True).float().mul(1 + n / 128).sum()


def sparse_then_dense_loss(weight: Tensor, n: int) -> Tensor:
    return embedding_loss(weight, n) if n % 2 == 0 else (weight.float() * (1 + n / 128)).sum()


def dense_then_sparse_loss(weight: Tensor, n: int) -> Tensor:
    return sparse_then_dense_loss(weight, n + 1)


STOCK: dict[str, tuple[torch.dtype, Callable[[Tensor, int], Tensor]]] = {
    "sparse bfloat16": (BF16, embedding_loss),
    "sparse float32": (torch.float32, embedding_loss),
    "sparse, then dense": (torch.float32, sparse_then_dense_loss),
    "dense, then sparse": (torch.float32, dense_then_sparse_loss),
    "complex64": (torch.complex64, lambda w, n: (w * (0.1 + n * 1j)).imag.sum() + (w.conj() * (1 + n / 3)).real.sum()),
    "complex128": (torch.complex128, lambda w, n: (w * (0.1 + n * 1j)).imag.sum()),
    "float64": (torch.float64, lambda w, n: (w * (0.1 + n / 3)).sum()),
}


def run(loss: Callable[[Tensor, int], Tensor], param: Parameter, scale: float, **arguments: bool) -> Iterator[Tensor]:
    for n in range(5):
        (loss(param, n) * scale).backward(**arguments)
        assert param.grad is not None
        yield param.grad


@pytest.mark.parametrize("case", STOCK)
def test_other_kinds_of_gradients_behave_as_stock(case: str, average_over: int | None) -> None:
    dtype, loss = STOCK[case]
    start = torch.ones(5, 3, dtype=dtype)
    param, other, stock = Parameter(start.clone()), parameter(4), Parameter(start.clone())
    optimizer, stock_optimizer = sgd(param, other), sgd(stock)
    acc = accumkern.attach(optimizer, average_over=average_over)
    for window in range(3):
        stock_run = run(loss, stock, 1 / (average_over or 1))
        for found, expected in zip(run(loss, param, 1), stock_run, strict=True):
            assert_equal(found, expected)
            backward(other, 1.0)
        for o in (optimizer, stock_optimizer):
            o.step()
            if window == 0:
                o.zero_grad()
            else:
                o.zero_grad(set_to_none=False)
        assert_equal(param, stock)
    assert acc.state_dict()["residuals"]["0"] is None


def test_gradient_of_a_complex_parameter_keeps_its_imaginary_part() -> None:
    param = parameter(3, dtype=torch.complex64)
    acc = accumkern.attach(sgd(param))
    for _ in range(2):
        (param * (1 + 2j)).real.sum().backward()
    assert (param.grad == 2 - 4j).all()
    assert_equal(acc.gradient(param), param.grad)


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bfloat16", "float32"])
def test_create_graph_gradients_behave_as_stock(dtype: torch.dtype, buffer: str, average_over: int | None) -> None:
    """A gradient penalty through .grad itself: the second micro-batch's sum must still carry its graph."""

    def loss(weight: Tensor, n: int) -> Tensor:
        return (weight.float() ** 3 * (1 + n / 128)).sum()

    start = seeded(4, 3).to(dtype)
    param, stock = Parameter(start.clone()), Parameter(start.clone())
    optimizer = sgd(param)  # it keeps the accumulator alive
    accumkern.attach(optimizer, buffer, average_over=average_over)
    penalties = []
    for p, scale in ((param, 1.0), (stock, 1 / (average_over or 1))):
        *_, grad = run(loss, p, scale, create_graph=True)
        assert grad.requires_grad
        penalties.append(torch.autograd.grad(grad.float().square().sum(), p)[0])
    assert_equal(param.grad, stock.grad)
    assert_equal(*penalties)
    param.grad = stock.grad = None  # gradient and parameter would keep each other alive


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_window_that_mixes_create_graph_and_plain_backward_passes() -> None:
    param = Parameter(seeded(6))
    acc = accumkern.attach(sgd(param), "split32")
    arrived = record(param)
    for n in range(6):
        x = acc.gradient(param)
        (param.float() ** 2 * (1 + n / 128)).sum().backward(create_graph=n in (1, 4))
        g = arrived[-1]
        assert param.grad is not None
        if x is None:
            assert_equal(param.grad, g)
        elif n in (1, 4):
            assert param.grad.requires_grad
            x = x.to(BF16) + g  # torch's own addition
            assert_equal(param.grad.detach(), x)
            assert_equal(acc.gradient(param), x.float())
        else:
            assert_equal(acc.gradient(param), x + g.float())
    param.grad = None
    arrived.clear()
    for n in range(4):
        (param.float() ** 2 * (1 + n / 128)).sum().backward()
    assert_fp32_sum(acc, param, arrived)


def test_gradients_of_grad_dtype_are_summed_in_it() -> None:
    param = parameter(6)
    param.grad_dtype = torch.float32
    acc = accumkern.attach(sgd(param))
    grads = micro_gradients(6, 6)
    for grad in grads:
        backward(param, grad)
    assert param.grad is not None
    assert param.grad.dtype is torch.float32
    assert_equal(param.grad, fp32_sum(grads))
    assert_equal(acc.gradient(param), fp32_sum(grads))


def test_lazily_negated_gradients_of_the_imaginary_part_of_a_complex_number(average_over: int | None) -> None:
    param, seen = parameter(dtype=torch.float32), []
    acc = accumkern.attach(sgd(param), average_over=average_over)
    param.register_hook(lambda grad: seen.append(grad.is_neg()))
    for n in range(1, 4):
        (torch.complex(torch.zeros(()), param).conj() * (1j * n)).real.backward()
    assert any(seen)
    expected = 6 / (average_over or 1)
    assert param.grad == expected
    assert acc.gradient(param) == expected
    assert param.grad.resolve_neg().view(torch.int32).view(torch.float32) == expected
