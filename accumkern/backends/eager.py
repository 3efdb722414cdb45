"""The accumulate kernel in plain torch: slow, readable, and on every device that torch has.

Bit-identical to the other backends when ``scale`` is a power of two; otherwise the product is rounded before it is
added, which is within one unit in the last place of FP32.
"""

from __future__ import annotations

from torch import Tensor

from accumkern.formats import BLOCK_NUMEL, Format, Start, decode, encode


def fold(
    format_: Format,
    start: Start,
    grads: list[Tensor],
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    scale: float | Tensor,
    partials: list[Tensor] | None,
) -> None:
    """Fold each gradient into its sum; see :func:`accumkern.backends.fold_function` for the contract."""
    for i, (grad, total) in enumerate(zip(grads, sums, strict=True)):
        # A residual may be flat, in the sum's memory order.
        residual = None if residuals is None else residuals[i].as_strided(total.shape, total.stride())
        g = grad.float()
        x = g * scale
        if start is Start.CONTINUE:
            x += decode(format_, total, residual)
        elif start is Start.FROM_SUM:
            x += total
        if partials is not None:
            for rows, values in zip(partials[i].unbind(1), (g, x), strict=True):
                for row, block in enumerate(values.flatten().split(BLOCK_NUMEL)):
                    rows[row] = block.square().sum()
        new_sum, new_residual = encode(format_, x)
        total.copy_(new_sum)
        if residual is not None and new_residual is not None:
            residual.copy_(new_residual)
