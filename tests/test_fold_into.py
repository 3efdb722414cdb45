"""Kernels.fold_into: the fold of one gradient after another into a sum that lies where it lay."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import (
    BF16,
    assert_fp32_sum,
    assert_same_bits,
    backward_of_all,
    micro_gradients,
    parameter,
    sgd,
    stored_sum,
)
from kernel_cases import ALL_FORMATS, THIRD, problem
from torch import Tensor

import accumkern
from accumkern import backends, waiting
from accumkern.formats import Format, Start, decode

LONG = 40_000  # more than a CPU folds without other threads


@ALL_FORMATS
@pytest.mark.parametrize("scale", [1.0, THIRD])
@pytest.mark.parametrize("numel", [0, 1, 100, LONG])
def test_it_is_the_fold_of_a_list_of_one(
    backend: str, device: torch.device, format_: Format, numel: int, scale: float
) -> None:
    kernels = backends.kernels(backend)
    grad, total, residual = (None if x is None else x.to(device) for x in problem(format_, numel))
    assert grad is not None
    assert total is not None
    expected_total, expected_residual = total.clone(), None if residual is None else residual.clone()
    kernels.fold(
        format_,
        Start.CONTINUE,
        [grad],
        [expected_total],
        None if expected_residual is None else [expected_residual],
        scale,
        None,
    )
    version = total._version
    add = kernels.fold_into(format_, Start.CONTINUE, total, residual)
    assert add(grad, total, version, scale) is True
    assert total._version == version
    assert_same_bits(total, expected_total)
    if residual is not None:
        assert_same_bits(residual, expected_residual)


@ALL_FORMATS
def test_the_first_may_start_from_the_sum_alone(backend: str, device: torch.device, format_: Format) -> None:
    kernels = backends.kernels(backend)
    grad, total, residual = (None if x is None else x.to(device) for x in problem(format_, 100))
    assert grad is not None
    assert total is not None
    expected_total, expected_residual = total.clone(), None if residual is None else residual.clone()
    for start in (Start.FROM_SUM, Start.CONTINUE):
        residuals = None if expected_residual is None else [expected_residual]
        kernels.fold(format_, start, [grad], [expected_total], residuals, THIRD, None)
    add = kernels.fold_into(format_, Start.FROM_SUM, total, residual)
    assert not add(grad, total, total._version + 1, THIRD)  # which is not the first
    assert add(grad, total, total._version, THIRD)
    assert add(grad, total, total._version, THIRD)
    assert_same_bits(total, expected_total)
    if residual is not None:
        assert_same_bits(residual, expected_residual)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 3, 4), (12, 4, 1)), ((2, 3, 4, 5), (60, 1, 15, 3)), ((4, 3), (1, 4)), ((3, 1, 2), (2, 7, 1)), ((), ())],
)
def test_any_order_of_dimensions(
    backend: str, device: torch.device, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    total = torch.empty_strided(shape, strides, dtype=BF16, device=device).fill_(1.0)
    grad = torch.empty_strided(shape, strides, dtype=BF16, device=device).copy_(torch.randn(shape))
    residual = torch.zeros(total.numel(), dtype=torch.int16, device=device)
    add = backends.kernels(backend).fold_into(Format.SPLIT32, Start.CONTINUE, total, residual)
    assert add(grad, total, total._version, 1.0)
    value = decode(Format.SPLIT32, total, residual.as_strided(shape, strides))
    assert_same_bits(value, 1 + grad.float())


def deviations() -> list[Any]:
    """Return what must not be folded: names, and functions of (grad, total) that return (grad, total, scale)."""

    def moved(grad: Tensor, total: Tensor) -> tuple[Any, ...]:
        total.data = total.data.clone()
        return grad, total, 1.0

    def shrunk(grad: Tensor, total: Tensor) -> tuple[Any, ...]:
        total.data = total.data[:2]
        return grad[:2], total, 1.0

    def turned(grad: Tensor, total: Tensor) -> tuple[Any, ...]:
        total.data = total.data.t()
        return grad.t(), total, 1.0

    def seen_as_another_dtype(grad: Tensor, total: Tensor) -> tuple[Any, ...]:
        total.data = total.data.view(torch.float16)
        return grad.view(torch.float16), total, 1.0

    def changed(grad: Tensor, total: Tensor) -> tuple[Any, ...]:
        total.mul_(1.0)
        return grad, total, 1.0

    cases: list[tuple[str, Callable[[Tensor, Tensor], tuple[Any, ...]]]] = [
        ("the sum is elsewhere", moved),
        ("the sum is shorter", shrunk),
        ("the sum is transposed", turned),
        ("the sum has another dtype", seen_as_another_dtype),
        ("the sum was changed", changed),
        ("another dtype", lambda grad, total: (grad.float(), total, 1.0)),
        ("another shape", lambda grad, total: (grad[:2], total, 1.0)),
        ("another number of dimensions", lambda grad, total: (grad.view(-1), total, 1.0)),
        ("other strides", lambda grad, total: (grad.t().contiguous().t(), total, 1.0)),
        ("a gradient of a subclass", lambda grad, total: (torch.nn.Parameter(grad), total, 1.0)),
        ("no gradient", lambda grad, total: (None, total, 1.0)),
        ("a sparse gradient", lambda grad, total: (grad.to_sparse(), total, 1.0)),
        ("a scale on the device", lambda grad, total: (grad, total, torch.ones((), device=grad.device))),
        ("an integer as scale", lambda grad, total: (grad, total, 1)),
    ]
    return [pytest.param(case, id=name) for name, case in cases]


@pytest.mark.parametrize("deviate", deviations())
def test_what_is_not_as_it_was_is_left_alone(
    backend: str, device: torch.device, deviate: Callable[[Tensor, Tensor], tuple[Any, ...]]
) -> None:
    grad, total = torch.randn(3, 3, device=device).to(BF16), torch.randn(3, 3, device=device).to(BF16)
    residual = torch.zeros(9, dtype=torch.int16, device=device)
    add = backends.kernels(backend).fold_into(Format.SPLIT32, Start.CONTINUE, total, residual)
    version = total._version
    new, total, scale = deviate(grad, total)
    before = total.clone()
    assert add(new, total, version, scale) is False
    assert_same_bits(total, before)
    assert not residual.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_negated_gradient_is_left_alone(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """It has the bits of what it is the negative of."""
    total = torch.zeros(1, dtype=dtype, device=device)
    complex_dtype = torch.complex64 if dtype is torch.float32 else torch.complex32
    grad = torch.ones(1, dtype=complex_dtype, device=device).conj().imag
    assert (grad.is_neg(), grad.is_contiguous(), grad.dtype) == (True, True, dtype)
    format_, residual = Format.PLAIN32, None
    if dtype is torch.float16:
        format_, residual = Format.MAIN_GRAD_FLOAT16, torch.zeros(1, device=device)
    assert backends.kernels(backend).fold_into(format_, Start.CONTINUE, total, residual)(grad, total, 0, 1.0) is False
    assert not total.any()


def test_memory_that_torch_does_not_have_is_not_read(backend: str, device: torch.device) -> None:
    total, residual = torch.ones(4, dtype=BF16, device=device), torch.zeros(4, dtype=torch.int8, device=device)
    add = backends.kernels(backend).fold_into(Format.SPLIT24, Start.CONTINUE, total, residual)
    zeros = torch._efficientzerotensor((4,), dtype=BF16, device=device)
    if backend == "eager":
        assert add(zeros, total, 0, 1.0)
    else:
        assert zeros.data_ptr() == 0
        assert backend == "triton" or not add(zeros, total, 0, 1.0)
    assert_same_bits(total, torch.ones(4, dtype=BF16))


def test_nothing_is_kept_alive_but_the_residual(backend: str, device: torch.device, no_collector: None) -> None:
    total, residual = torch.zeros(4, dtype=BF16, device=device), torch.zeros(4, dtype=torch.int8, device=device)
    add = backends.kernels(backend).fold_into(Format.SPLIT24, Start.CONTINUE, total, residual)
    there = weakref.ref(total)
    del total
    assert there() is None
    assert callable(add)


def test_a_residual_elsewhere_is_found_again() -> None:
    """Its old memory may be somebody else's."""
    param, first = parameter(100), parameter(3)
    acc = accumkern.attach(sgd(param, first), "split32")
    grads = micro_gradients(6, 100)
    for grad in grads[:3]:
        backward_of_all([param, first], [grad, torch.ones(3)])
    state = acc.state_dict()
    acc.load_state_dict(state)
    for grad in grads[3:]:
        backward_of_all([param, first], [grad, torch.ones(3)])
    assert_fp32_sum(acc, param, grads)


@pytest.mark.parametrize("waits", [False, True])
def test_weights_with_their_channels_last(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """The kernels take them one by one, and they do not wait for a list."""
    if waits:
        monkeypatch.setattr(waiting, "WAITING_DEVICE_TYPES", frozenset({"cpu", "cuda"}))
    param = torch.nn.Parameter(torch.zeros(4, 3, 2, 2, dtype=BF16).to(memory_format=torch.channels_last))
    first = parameter(3)  # whose gradient comes first in a pass, and goes the long way
    acc = accumkern.attach(sgd(param, first), "split24")
    grads = micro_gradients(20, 4, 3, 2, 2)
    for grad in grads:
        backward_of_all([param, first], [grad, torch.ones(3)])
    total, value = stored_sum("split24", grads)
    assert param.grad is not None
    assert param.grad.stride() == param.stride()
    assert_same_bits(param.grad.contiguous(), total)
    assert_same_bits(acc.gradient(param).contiguous(), value)  # type: ignore[union-attr]


def test_the_extension_says_which_torch_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.unavailable("cpu") is not None:
        pytest.skip("the extension was not built")
    from accumkern.backends import _C  # type: ignore[attr-defined]

    class Old:
        pass

    class New:
        __dlpack_c_exchange_api__ = 1

    for kind in (Old, New):
        with pytest.raises(RuntimeError, match="this torch"):
            _C.read_tensors_of(kind)
    _C.read_tensors_of(Tensor)


@pytest.mark.parametrize("fails", [False, True])
def test_a_second_gradient_that_goes_another_way_leaves_the_residual_to_count(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """What was prepared to start from the sum alone must not be used when there is a residual."""
    param, first = parameter(100), parameter(3)  # the gradient that comes first in a pass goes the long way
    acc = accumkern.attach(sgd(param, first), "split32")
    grads = [grad * 2.0 ** (-n) for n, grad in enumerate(micro_gradients(6, 100))]

    def backward_of_both(grad: Tensor) -> None:
        backward_of_all([param, first], [grad, torch.ones(3)])

    backward_of_both(grads[0])
    fold = acc._fold
    if fails:

        def no_fold(*_: Any) -> Any:
            def fail(*_: Any) -> bool:
                raise MemoryError

            return fail

        kernels = fold.kernels_on(param.device)
        with monkeypatch.context() as patch:
            patch.setattr(fold, "kernels_on", lambda _: kernels._replace(fold_into=no_fold))
            with pytest.raises(MemoryError):
                backward_of_both(grads[1])
    else:
        fold.set_scale(torch.ones(()))  # which only lists take
    backward_of_both(grads[1])
    fold.set_scale(1.0)
    for grad in grads[2:]:
        backward_of_both(grad)
    total, value = stored_sum("split32", grads)
    assert_same_bits(param.grad, total)
    assert_same_bits(acc.gradient(param), value)
