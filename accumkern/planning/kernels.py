"""What kernels do that fake tensors on a CPU do not show: what they need inside themselves, and what a GPU's differ in.

The sizes of scratch memory are those of torch's CPU kernels, seen in the events of its allocator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from accumkern.planning.convolutions import of_convolution, of_convolution_backward
from accumkern.torch_private import TorchDispatchMode, is_fake, run_backward

# ---- inside a kernel ---------------------------------------------------------------------------------------------


def scratch_bytes(operation: Any, args: Sequence[Any], result: Any) -> int:
    """Return about how much more memory an operation needs while it runs than its results take; 0 where none is known.

    Args:
        operation: of ``torch.ops``, as a dispatch mode is given it.
        args: that it was called with.
        result: that it returned.
    """
    needs = _SCRATCH.get(str(operation))
    return 0 if needs is None else needs(args, result)


def _of_lstm(args: Sequence[Any], result: Any) -> int:
    """``args``: input of shape ``(steps, batch, width)``, two weights, and more; needed are gates and weights."""
    steps, batch, _ = args[0].shape
    return 4 * (steps + 1) * batch * args[1].shape[0] + args[1].nbytes + args[2].nbytes


def _of_lstm_backward(args: Sequence[Any], result: Any) -> int:
    """``args``: as before; the eighth is the result, whose gradient is copied too."""
    return _of_lstm(args, result) + args[7].nbytes


def _of_first(args: Sequence[Any], result: Any) -> int:
    """As large as what the operation is given first."""
    return args[0].nbytes


_SCRATCH: Mapping[str, Callable[[Sequence[Any], Any], int]] = {
    "aten.convolution.default": of_convolution,
    "aten.convolution_backward.default": of_convolution_backward,
    "aten.native_batch_norm_backward.default": _of_first,
    "aten.mse_loss.default": _of_first,
    "aten.mkldnn_rnn_layer.default": _of_lstm,
    "aten.mkldnn_rnn_layer_backward.default": _of_lstm_backward,
}


# ---- another device's kernels ------------------------------------------------------------------------------------


class GpuKernels(TorchFunctionMode):
    """Lets attention and dropout on fake tensors of a CPU allocate and save what a GPU's kernels do.

    Attention saves its inputs, the result and a logarithm for each query, and never the matrix of all queries and keys,
    which a CPU has with dropout; dropout saves a byte for each element, where a CPU saves a factor.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.backward and all(value is None or value is False for value in (kwargs or {}).values()):
            with self:  # it would run without this mode otherwise, and checkpoints run forward passes in it
                return run_backward(args[0])
        kernel = _OF_GPU.get(func)
        result = None if kernel is None else kernel(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is None else result


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    is_fused = torch.backends.cuda.flash_sdp_enabled() or torch.backends.cuda.mem_efficient_sdp_enabled()
    if not is_fused or query.dim() != 4 or query.dtype is torch.float64:
        return None
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    result: Tensor = _Attention.apply(query, key, value, attn_mask)
    return result


class _Attention(torch.autograd.Function):
    """The memory of a fused kernel of attention.

    query: ``(batch, heads, length, width)``; key: ``(batch, heads, keys, width)``; value: ``(batch, heads, keys,
    width of the result)``; key and value may have fewer heads.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        result = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        logarithms = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, result, logarithms)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, _, logarithms = ctx.saved_tensors
        _sums = torch.empty_like(logarithms), torch.empty_like(query, dtype=torch.float32)
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        if key.shape[1] != query.shape[1]:  # of every query's head first
            _sums += tuple(tensor.new_empty(*query.shape[:2], *tensor.shape[2:]) for tensor in (key, value))
        return *grads, torch.empty_like(mask) if mask is not None and ctx.needs_input_grad[3] else None


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:  # noqa: A002
    if not training or inplace or not 0 < p < 1 or not math.prod(input.shape):
        return None
    return torch.native_dropout(input, p, True)[0]


_OF_GPU: Mapping[Any, Callable[..., Tensor | None]] = {
    F.scaled_dot_product_attention: _attention,
    F.dropout: _dropout,
}


# ---- kernels without a fake one -----------------------------------------------------------------------------------


class MissingKernels(TorchDispatchMode):
    """Gives operations that torch can run, and has no right fake kernel for, results of the right size."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        if name == "aten._grouped_mm.default" and is_fake(args[0]) and args[0].dtype is not torch.bfloat16:
            return _grouped_mm(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if name == "aten.mkldnn_rnn_layer.default" and is_fake(args[0]):
            return *result[:3], _saved_by_lstm(given=args[0], hidden=args[5])
        return result


def _grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return an empty product of groups: of ``(rows, k)`` and ``(groups, k, columns)``, for example."""
    groups: tuple[int, ...] = ()
    if a.dim() == b.dim():  # both are split along k, or into matrices
        groups = tuple(offs.shape) if offs is not None else (a.shape[0],)
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]), dtype=out_dtype or a.dtype)


def _saved_by_lstm(given: Tensor, hidden: Tensor) -> Tensor:
    """Return what oneDNN's LSTM saves for its backward pass; the formula is within 6% of sizes seen in torch 2.13.

    given: ``(steps, batch, width)``; hidden: ``(batch, width of the result)``.
    """
    steps, batch, width = given.shape
    each = 6 * max(width, hidden.shape[-1]) + 10 * hidden.shape[-1]
    return given.new_empty(4 * (steps + 1) * batch * each, dtype=torch.uint8)
