"""The kernels in plain torch: slow, readable, and on every device that torch has.

Bit-identical to the other backends where ``scale * grad`` is exact, as it is for powers of two short of overflow and
subnormal FP32; otherwise the product is rounded before it is added, by half a unit in its last place of FP32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from accumkern import formats
from accumkern.clipping import clipped
from accumkern.formats import BLOCK_NUMEL, Format, Start, divide, fp32_scalar, partial_rows, round_to, widest
from accumkern.updates import Update, updated


def fold(
    format_: Format,
    start: Start,
    grads: list[Tensor],
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    scale: float | Tensor,
    partials: list[Tensor] | None,
) -> None:
    """Fold each gradient into its sum; see :class:`accumkern.backends.Kernels`."""
    for i, (grad, total) in enumerate(zip(grads, _uncounted(sums), strict=True)):
        if grad.numel() == 0:
            continue
        g = grad.float()
        x = g * fp32_scalar(scale, g.device)  # one of FP64 would widen a 0-dim gradient
        old = None
        if start is Start.CONTINUE:
            x += _value(format_, start, total, residuals, i)
        elif start is Start.FROM_SUM:
            old = total.float()
            x += old
        if partials is not None:
            partials[i].zero_()
            for column, values in enumerate((g, x) if old is None else (g, x, old)):
                partials[i][:, column] = _squares_of_blocks(values)
        _store(format_, x, total, residuals, i)


def finish(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
) -> None:
    """Divide, multiply and round each sum; see :class:`accumkern.backends.Kernels`."""
    for i, total in enumerate(_uncounted(sums)):
        x = _value(format_, start, total, residuals, i)
        total.copy_(round_to(format_.sum_dtype, divide(x, divisor) * fp32_scalar(factor, x.device)))


def rescale(
    format_: Format,
    start: Start,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    divisor: float | Tensor,
    factor: float | Tensor,
) -> None:
    """Divide, multiply and store each value; see :class:`accumkern.backends.Kernels`."""
    for i, total in enumerate(_uncounted(sums)):
        x = _value(format_, start, total, residuals, i)
        _store(format_, divide(x, divisor) * fp32_scalar(factor, x.device), total, residuals, i)


def decode(format_: Format, sums: list[Tensor], residuals: list[Tensor] | None, values: list[Tensor]) -> None:
    """Write the FP32 values of each sum; see :class:`accumkern.backends.Kernels`."""
    for i, value in enumerate(_uncounted(values)):
        residual = None if residuals is None else _shaped_like(sums[i], residuals[i])
        value.copy_(formats.decode(format_, sums[i], residual))


def encode(
    format_: Format,
    values: list[Tensor],
    divisor: float | Tensor,
    sums: list[Tensor],
    residuals: list[Tensor] | None,
) -> None:
    """Divide FP32 values and store them; see :class:`accumkern.backends.Kernels`."""
    for i, total in enumerate(_uncounted(sums)):
        _store(format_, divide(values[i], divisor), total, residuals, i)


def squares(
    format_: Format, start: Start, sums: list[Tensor], residuals: list[Tensor] | None, partials: Tensor
) -> None:
    """Write the sums of squares of each block; see :class:`accumkern.backends.Kernels`."""
    rows = partials.split([partial_rows(total.numel()) for total in sums])
    for i, total in enumerate(_uncounted(sums)):
        if total.numel() > 0:
            rows[i].copy_(_squares_of_blocks(_value(format_, start, total, residuals, i)))


def norm(partials: Tensor, divisor: float | Tensor, max_norm: float | None, results: Tensor, nonfinite: Tensor) -> None:
    """Write norm, clip coefficient and whether the norm is not finite; see :class:`accumkern.backends.Kernels`."""
    root = partials.sum(dtype=widest(partials.device)).sqrt().float()
    divided, coefficient, is_nonfinite = clipped(root, divisor, max_norm)
    results[0] = divided
    results[1] = coefficient
    nonfinite.copy_(is_nonfinite)


def mean(
    format_: Format,
    sums: Tensor,
    residuals: Tensor,
    divisor: float | Tensor,
    out_sum: Tensor,
    out_residual: Tensor,
) -> None:
    """Add up what ranks have, in their order, divide and store; see :class:`accumkern.backends.Kernels`."""
    x = formats.decode(format_, sums[0], residuals[0])
    for total, residual in zip(sums[1:], residuals[1:], strict=True):
        x += formats.decode(format_, total, residual)
    _store(format_, divide(x, divisor), out_sum.data, [out_residual.data], 0)


def step(
    update: Update,
    weight_format: Format,
    grad_format: Format,
    start: Start,
    weights: list[Tensor],
    weight_residuals: list[Tensor],
    grads: list[Tensor],
    grad_residuals: list[Tensor] | None,
    states: list[list[Tensor]],
    coefficients: Tensor,
    divisor: float | Tensor,
    factor: float | Tensor,
    skip: Tensor | None,
) -> None:
    """Update each weight; see :class:`accumkern.backends.Kernels`."""
    for i, weight in enumerate(_uncounted(weights)):
        of_weight = [column[i].data for column in states]
        new_states = [state.clone() for state in of_weight]
        g = _value(grad_format, start, grads[i], grad_residuals, i)
        g = divide(g, divisor) * fp32_scalar(factor, g.device)
        old = _value(weight_format, Start.CONTINUE, weight, weight_residuals, i)
        new = updated(update, coefficients[i], g, old, new_states)
        new_weight, new_residual = formats.encode(weight_format, new)
        assert new_residual is not None
        stored = [weight, _shaped_like(weight, weight_residuals[i]), *of_weight]
        for tensor, value in zip(stored, [new_weight, new_residual, *new_states], strict=True):
            tensor.copy_(value if skip is None else torch.where(skip != 0, tensor, value))


def _value(format_: Format, start: Start, total: Tensor, residuals: list[Tensor] | None, i: int) -> Tensor:
    """Return the accumulated values of the i-th sum."""
    residual = None if residuals is None or start is Start.FROM_SUM else _shaped_like(total, residuals[i])
    return formats.decode(format_, total, residual)


def _store(format_: Format, x: Tensor, total: Tensor, residuals: list[Tensor] | None, i: int) -> None:
    """Store FP32 values as the i-th sum and residual."""
    new_sum, new_residual = formats.encode(format_, x)
    total.copy_(new_sum)
    if residuals is not None and new_residual is not None:
        _shaped_like(total, residuals[i]).copy_(new_residual)


def _squares_of_blocks(values: Tensor) -> Tensor:
    """Return the sum of squares of each block, FP32; ``values`` are FP32, with at least one element."""
    squares = values.as_strided((values.numel(),), (1,)).square()  # in the order in memory
    whole = squares.numel() // BLOCK_NUMEL * BLOCK_NUMEL
    of_whole = squares[:whole].view(-1, BLOCK_NUMEL).sum(1)
    return of_whole if whole == squares.numel() else torch.cat([of_whole, squares[whole:].sum().view(1)])


def _shaped_like(total: Tensor, residual: Tensor) -> Tensor:
    """Return a residual, which may be flat in the sum's memory order, in the sum's shape."""
    return residual.as_strided(total.shape, total.stride())


def _uncounted(sums: list[Tensor]) -> list[Tensor]:
    """Return aliases of which autograd knows nothing: writes leave version counters alone, as in the other backends."""
    return [total.data for total in sums]
