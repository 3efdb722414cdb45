"""Inputs for the kernels, on the CPU, what must come out of them by accumkern/formats.py, and comparisons of bits."""

from __future__ import annotations

import pytest
import torch
from gradients import INTEGERS, assert_same_bits
from torch import Tensor

from accumkern import backends
from accumkern.formats import Format, Start, decode, encode, fma

ALL_FORMATS = pytest.mark.parametrize("format_", list(Format), ids=lambda f: f.name.lower())
ALL_STARTS = pytest.mark.parametrize("start", list(Start), ids=lambda s: s.name.lower())
THIRD = 1 / 3  # no power of two: tells a fused multiply-add from a rounded product

Row = tuple[Tensor, Tensor, Tensor | None]  # (grad, sum, residual)

LARGE = [3.0e38, 3.4028235e38, 65504.0, 65520.0, torch.inf, torch.nan]
SPECIAL = torch.tensor([0.0, 1.0, 1.00390625, 2.0**-126, 2.0**-133, 2.0**-149, 2.0**-24, 1e-40, *LARGE])
PAIRS = torch.cartesian_prod(*[torch.cat([SPECIAL, -SPECIAL])] * 2)


def is_interpreted(backend: str, device: torch.device) -> bool:
    """Return whether the kernels run in triton's interpreter, where each program takes a millisecond and more."""
    return backend == "triton" and device.type == "cpu"


def rounds_once(backend: str, device: torch.device) -> bool:
    """Return whether a kernel's multiply-add is fused here: triton's interpreter multiplied and added up to 3.6."""
    if not is_interpreted(backend, device):
        return True
    import numpy
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    x, minus_x_squared = (
        TensorHandle(numpy.array([value], numpy.float32), language.float32) for value in (1 + 2**-12, -1 - 2**-11)
    )
    return bool(InterpreterBuilder().create_fma(x, x, minus_x_squared).data[0] == 2.0**-24)


# ---- inputs ------------------------------------------------------------------------------------------------------


def random_bits(dtype: torch.dtype, numel: int) -> Tensor:
    """Any bit patterns: NaN, infinities, zeros and subnormals of either sign among them."""
    limits = torch.iinfo(INTEGERS[dtype.itemsize])
    return torch.randint(limits.min, limits.max + 1, (numel,)).to(INTEGERS[dtype.itemsize]).view(dtype)


def values(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values near enough to one another to interact, as many of any bits, and some of SPECIAL."""
    near = (torch.randn(numel) * torch.exp2(torch.randint(-8, 9, (numel,)).float())).to(dtype)
    x = torch.where(torch.rand(numel) < 0.5, near, random_bits(dtype, numel))
    x[:: max(1, numel // 50)] = SPECIAL[torch.arange(len(x[:: max(1, numel // 50)])) % len(SPECIAL)].to(dtype)
    return x


def problem(format_: Format, numel: int) -> Row:
    """Return inputs of a fold: all of PAIRS, :func:`values`, and sums and residuals that no kernel would have left."""
    grad, x = values(numel, format_.sum_dtype), values(numel)
    pairs = PAIRS[torch.randperm(len(PAIRS))[:numel]]
    grad[: len(pairs)], x[: len(pairs)] = pairs[:, 0].to(grad.dtype), pairs[:, 1]
    total, residual = encode(format_, x)
    total = torch.where(torch.rand(numel) < 0.2, random_bits(total.dtype, numel), total)
    if residual is not None:
        residual = torch.where(torch.rand(numel) < 0.2, random_bits(residual.dtype, numel), residual)
    return grad, total, residual


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def accumulated(format_: Format, start: Start, row: Row, scale: float) -> Tensor:
    """Return the FP32 value that a fold stores."""
    grad, total, residual = row
    if start is Start.FROM_ZERO:
        return torch.tensor(scale, dtype=torch.float32) * grad.float()
    return fma(scale, grad, decode(format_, total, residual if start is Start.CONTINUE else None))


# ---- folding -----------------------------------------------------------------------------------------------------


def columns(rows: list[Row], device: torch.device | str) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """Return (grads, sums, residuals): copies on the device."""
    grads, sums, residuals = (
        [x.to(device, copy=True) for x in column if x is not None] for column in zip(*rows, strict=True)
    )
    return grads, sums, residuals or None


def assert_folded(
    backend: str,
    device: torch.device | str,
    format_: Format,
    start: Start,
    rows: list[Row],
    scale: float,
    given: float | Tensor | None = None,
    partials: list[Tensor] | None = None,
    what: object = "",
) -> None:
    """Fold copies of a list, with the scale given as it is or as ``given``, and compare with the reference."""
    grads, sums, residuals = columns(rows, device)
    fold = backends.kernels(backend).fold
    fold(format_, start, grads, sums, residuals, scale if given is None else given, partials)
    assert_stored(format_, start, rows, scale, grads, sums, residuals, what)


def assert_stored(
    format_: Format,
    start: Start,
    rows: list[Row],
    scale: float,
    grads: list[Tensor],
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    what: object = "",
) -> None:
    """Compare what a fold of ``rows`` has left with the reference."""
    for i, row in enumerate(rows):
        of_row = f"{what}, tensor {i} of {[len(grad) for grad in grads][:8]}"
        total, residual = encode(format_, accumulated(format_, start, row, scale))
        assert_same_bits(sums[i], total, f"sum, {of_row}")
        assert_same_bits(residuals[i] if residuals else None, residual, f"residual, {of_row}")
        if grads[i] is not sums[i]:
            assert_same_bits(grads[i], row[0], f"gradient, {of_row}")
