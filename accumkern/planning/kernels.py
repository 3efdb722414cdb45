"""What kernels do that fake tensors on a CPU do not show: what they need inside themselves, and what a GPU's differ in.

The sizes of scratch memory are those of torch's CPU kernels, seen in the events of its allocator; those of a GPU's
allocator and of cuBLAS are the rules of torch's CUDACachingAllocator.cpp and CublasHandlePool.cpp.
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
from accumkern.torch_private import TorchDispatchMode, is_fake, run_backward, suggest_memory_format

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


# ---- what a GPU's memory is allocated in -------------------------------------------------------------------------

_MIB = 2**20
_MATRIX_PRODUCTS = frozenset(f"aten.{name}.default" for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"))


def block_bytes(size: int) -> int:
    """Return how much torch's allocator for GPUs takes for a tensor of so many bytes.

    It rounds to 512 bytes. What has 10 MiB or more is cut from memory of whole 2 MiB, and what is left of that stays
    with the tensor where it is no more than 1 MiB.
    """
    rounded = -(-size // 512) * 512
    whole = -(-size // (2 * _MIB)) * 2 * _MIB
    return whole if rounded >= 10 * _MIB and whole - rounded <= _MIB else rounded


def workspace_bytes(operation: Any, device: torch.device) -> int:
    """Return what cuBLAS keeps from an operation on: nothing if that is no product of matrices.

    It is a piece of memory for each thread that multiplies: one runs forward passes, and another one backward passes.

    Args:
        operation: of ``torch.ops``, as a dispatch mode is given it.
        device: of the model. Where it is a CPU the GPU is not known, and has as much as any needs.
    """
    if str(operation) not in _MATRIX_PRODUCTS:
        return 0
    is_older = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9
    return 2 * (8 * _MIB + _MIB // 8 if is_older else 32 * _MIB)


# ---- another device's kernels ------------------------------------------------------------------------------------


class GpuKernels(TorchFunctionMode):
    """Lets attention, dropout and RMSNorm on fake tensors of a CPU allocate and save what a GPU's kernels do.

    Attention saves its inputs, the result and a logarithm for each query, and never the matrix of all queries and keys,
    which a CPU has with dropout; dropout saves a byte for each element, where a CPU saves a factor; RMSNorm saves its
    input and a number for each row, where a CPU computes it from FP32 copies, operation by operation.
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


def _rms_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor | None:
    is_channels_last = input.dim() > 3 and suggest_memory_format(input) is not torch.contiguous_format
    if is_channels_last or (weight is not None and weight.dtype is not input.dtype):
        return None  # operation by operation there too
    result: Tensor = _RMSNorm.apply(input, len(normalized_shape), weight)
    return result


class _RMSNorm(torch.autograd.Function):
    """The memory of a fused kernel of RMSNorm over the last dimensions of the input."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, dimensions: int, weight: Tensor | None) -> Tensor:
        roots = given.new_empty(given.shape[: given.dim() - dimensions], dtype=torch.float32)
        ctx.save_for_backward(given, weight, roots)
        return torch.empty_like(given, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, weight, _ = ctx.saved_tensors
        of_weight = None if weight is None or not ctx.needs_input_grad[2] else torch.empty_like(weight)
        return torch.empty_like(given) if ctx.needs_input_grad[0] else None, None, of_weight


_OF_GPU: Mapping[Any, Callable[..., Tensor | None]] = {
    F.scaled_dot_product_attention: _attention,
    F.dropout: _dropout,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
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
