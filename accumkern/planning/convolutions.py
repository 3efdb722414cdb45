"""What convolutions need inside themselves on a CPU.

oneDNN convolves tensors in a layout of its own, so it copies what it is given into that, and its result back. The
formulas were found one operation at a time, in the events of the allocator of torch 2.13: for 1 to 16 images in 1 to 3
dimensions, of 1 to 256 channels, with and without groups, in both memory formats, in FP32 and bfloat16. They leave out
what does not grow with the tensors, up to 0.1 MB, and, in bfloat16 with channels last, a sixth of what small groups
need. Where oneDNN has several ways, they follow that which needs the most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from accumkern.torch_private import suggest_memory_format


def of_convolution(args: Sequence[Any], result: Any) -> int:
    """``args``: input, weight, bias, stride, padding, dilation, transposed, output padding, groups.

    First there are copies of input, weight and result in oneDNN's layout, then that of the result beside it. Images of
    up to 3 channels, and tensors whose channels are last, are read as they are.
    """
    given, weight, stride, transposed, groups = args[0], args[1], args[3], args[6], args[8]
    layout = _layout(given, weight)
    others = _copies(layout, given, weight)
    if _is_of_torch(given, weight, transposed, groups):
        return others + given.shape[0] * _columns(weight, result)
    if layout is not torch.contiguous_format:
        each = groups > 1 and not _is_depthwise(weight, groups) and weight.shape[1] % 4 != 0
        return others + _blocked_weight(weight, groups, each)
    written = _blocked_bytes(result)
    first = _blocked_weight(weight, groups) + written + (0 if given.shape[1] <= 3 else _blocked_bytes(given))
    if transposed and max(stride) > 1:
        return others + max(first, 2 * written)
    return others + max(first - result.nbytes, written)


def of_convolution_backward(args: Sequence[Any], result: Any) -> int:
    """``args``: gradient, input, weight, bias sizes, stride, padding, dilation, transposed, ..., groups, output mask.

    For the weight's gradient there are copies of gradient and input, and for that of 16-bit weights its sum in FP32; a
    stride of more than 1 makes the input's gradient through two more copies. Where channels are last there are only the
    weight and its gradient, in blocks of each group's own. For the weight's gradient of some groups oneDNN multiplies
    matrices that it cuts from the tensors as they are; the copies are then those of the input's gradient, which comes
    first, when neither result is there.
    """
    grad, given, weight, stride, transposed = *args[:3], args[4], args[7]
    groups, output_mask = args[9:11]
    layout, is_16_bit = _layout(given, weight), weight.itemsize == 2
    others = _copies(layout, grad, given, weight)
    if _is_of_torch(given, weight, transposed, groups):
        return others + given.shape[0] * _columns(weight, grad)
    if layout is not torch.contiguous_format:
        each = groups > 1 and not (_is_depthwise(weight, groups) and max(weight.shape[2:]) <= 3)
        blocked = _blocked_weight(weight, groups, each)
        return others + ((3 if each else 2) * blocked if is_16_bit else blocked + weight.nbytes)
    copies = _blocked_bytes(grad) + (0 if given.shape[1] <= 3 and not output_mask[0] else _blocked_bytes(given))
    blocked, sums = _blocked_weight(weight, groups), 2 * weight.nbytes if is_16_bit else 0
    spread = 2 * given.nbytes if output_mask[0] and max(stride) > 1 else 0
    if _is_cut(weight, groups):
        first = max(copies + blocked, spread) - given.nbytes - weight.nbytes
        return others + max(first, 4 * weight.nbytes + _columns(weight, grad) + sums)
    return others + max(copies + sums, blocked, spread - weight.nbytes if groups == 1 else 0)


def _is_of_torch(given: Tensor, weight: Tensor, transposed: bool, groups: int) -> bool:
    """Return whether torch convolves without oneDNN, as ``use_mkldnn()`` of its Convolution.cpp decides.

    That is in FP64, and for one small image: each is multiplied as a matrix.
    """
    width = weight.shape[2:]
    is_small = given.shape[0] == 1 and math.prod(given.shape[:4]) <= 20_480
    is_small = is_small and (len(width) == 1 or min(width[-2:]) <= 3)
    is_left = given.dtype is torch.float64 or (given.dtype is torch.float32 and is_small)
    return is_left and groups == 1 and not transposed and max(width) > 1


def _columns(weight: Tensor, result: Tensor) -> int:
    """Return the bytes of the matrix of an image that a group of a weight is multiplied with: a column for a pixel."""
    return weight[0].nbytes * math.prod(result.shape[2:])


def _is_cut(weight: Tensor, groups: int) -> bool:
    if _is_depthwise(weight, groups):
        return groups > 1 and (weight.dim() == 3 or max(weight.shape[2:]) > 3)
    return groups > 1 and weight.shape[1] % 8 != 0


def _blocked_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor of shape ``(batch, channels, ...)`` in oneDNN's layout: blocks of 16 channels."""
    channels = tensor.shape[1]
    return tensor.nbytes // max(channels, 1) * _whole_blocks(channels)


def _blocked_weight(weight: Tensor, groups: int, each: bool = False) -> int:
    """Return the bytes of a weight in oneDNN's layout: blocks of 16 x 16 channels, or of 16 where they are grouped.

    Args:
        weight: of shape ``(channels made, channels read / groups, ...)``.
        groups: of channels.
        each: whether each group has blocks of 16 x 16 of its own.
    """
    made, read = weight.shape[:2]
    if each:
        blocks = groups * _whole_blocks(made // groups) * _whole_blocks(read)
    else:
        blocks = _whole_blocks(made) * (read if groups > 1 or read <= 3 else _whole_blocks(read))
    return weight.nbytes // max(made * read, 1) * blocks


def _whole_blocks(channels: int) -> int:
    return -(-channels // 16) * 16


def _is_depthwise(weight: Tensor, groups: int) -> bool:
    return weight.shape[0] == groups and weight.shape[1] == 1


def _layout(given: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the format that torch convolves in: channels are last where input or weight suggest it, never in 1d."""
    suggested = [suggest_memory_format(tensor) for tensor in (given, weight)]
    return next((layout for layout in suggested if layout is not torch.contiguous_format), torch.contiguous_format)


def _copies(layout: torch.memory_format, *tensors: Tensor) -> int:
    """Return the bytes of copies of those that are not in this layout."""
    return sum(tensor.nbytes for tensor in tensors if not tensor.is_contiguous(memory_format=layout))
