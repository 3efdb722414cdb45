"""The mean over ranks of accumulated gradients, in the order and with the roundings of each way to exchange them.

Every function runs the arithmetic itself, element by element, in the formats that travel: a sum of two bfloat16 tensors
is rounded to bfloat16 as a hop of NCCL's or gloo's ring rounds it, and split24 is :func:`accumkern.formats.decode` and
:func:`~accumkern.formats.encode`, which all kernels follow bit by bit. Nothing here is a model; what the wire costs is
in ``scale_wire.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from accumkern.formats import Format, decode, divide, encode

NODE = 8  # GPUs in a node


@dataclass(frozen=True)
class Parts:
    """What the ranks send, for some elements of the gradient: each rank's sum over its micro-batches.

    Attributes:
        halves: (ranks, numel) bfloat16, each rank's ``.grad``.
        wide: (ranks, numel) FP32, the same with its residual; None where there is no residual.
        pieces: (numel,) int64, the piece of the gradient that each element is in, from 0 to ranks - 1.
    """

    halves: Tensor
    wide: Tensor | None
    pieces: Tensor


#: ``.grad`` after the mean, bfloat16, and what the step reads: the same, or with its residual, FP32.
Mean = tuple[Tensor, Tensor]


def ring(parts: Tensor, pieces: Tensor) -> Tensor:
    """Return the sum that a ring's reduce-scatter leaves, rounded to the dtype of ``parts`` at every hop.

    Piece ``p`` sets out from rank ``p + 1``, each rank adds its part to what has come, and rank ``p`` is the last.

    Args:
        parts: (ranks, numel).
        pieces: (numel,), of each element.
    """
    ranks, numel = parts.shape
    columns = torch.arange(numel, device=parts.device)
    total = parts[(pieces + 1) % ranks, columns]
    for hop in range(2, ranks + 1):
        total = total + parts[(pieces + hop) % ranks, columns]
    return total


def tree(parts: Tensor) -> Tensor:
    """Return the sum that NCCL's binary tree leaves at its root, rounded to the dtype of ``parts`` at every addition.

    In a node it is a chain from the last GPU to the first. Nodes are a tree as ``ncclGetBtree`` has it
    (nccl/src/graph/trees.cc): with ``b`` the lowest bit of a node's number, its children are ``b / 2`` below and above;
    the root is node 0, whose only child is node ``nodes / 2``. A node adds its children to its own sum.

    Args:
        parts: (ranks, numel); ranks are a power of two.
    """
    of_node = parts.unflatten(0, (-1, min(NODE, len(parts))))
    total = of_node[:, -1].clone()
    for gpu in reversed(range(of_node.shape[1] - 1)):
        total = of_node[:, gpu] + total
    nodes = len(total)
    bit = 2
    while bit < nodes:
        below, above = total[bit // 2 :: 2 * bit], total[3 * bit // 2 :: 2 * bit]
        total[bit :: 2 * bit] = total[bit :: 2 * bit] + below + above
        bit *= 2
    return total[0] + total[nodes // 2] if nodes > 1 else total[0]


def in_rank_order(parts: Tensor) -> Tensor:
    """Return the FP32 sum of FP32 ``parts``, (ranks, numel), from the first rank to the last."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def bf16_ring(parts: Parts) -> Mean:
    """Stock DistributedDataParallel: ``.grad`` times 1 / ranks in bfloat16, and a ring in bfloat16."""
    mean = ring(parts.halves * (1 / len(parts.halves)), parts.pieces)
    return mean, mean


def bf16_tree(parts: Parts) -> Mean:
    """Do the same with NCCL's tree."""
    mean = tree(parts.halves * (1 / len(parts.halves)))
    return mean, mean


def bf16_all_to_all(parts: Parts) -> Mean:
    """Exchange bfloat16 pieces; their owner adds them in FP32, and the mean is gathered in bfloat16."""
    mean = divide(in_rank_order(parts.halves.float()), len(parts.halves)).bfloat16()
    return mean, mean


def fp32_ring(parts: Parts) -> Mean:
    """Add sums with their residuals in an FP32 ring; divide, and store the mean in split24."""
    wide = _with_residuals(parts)
    return _split24(divide(ring(wide, parts.pieces), len(wide)))


def split24_all_to_all(parts: Parts) -> Mean:
    """Exchange split24 pieces; their owner adds them in FP32 and divides, and the mean is gathered in split24."""
    wide = _with_residuals(parts)
    return _split24(divide(in_rank_order(wide), len(wide)))


def split24_two_levels(parts: Parts) -> Mean:
    """Do the same within each node, whose sum is stored in split24, and then with the sums of the nodes."""
    of_node = _with_residuals(parts).unflatten(0, (-1, min(NODE, len(parts.halves))))
    sums = [in_rank_order(of_ranks) for of_ranks in of_node]
    if len(sums) == 1:  # the second level has nobody to exchange with
        return _split24(divide(sums[0], len(parts.halves)))
    return _split24(divide(in_rank_order(torch.stack([_split24(total)[1] for total in sums])), len(parts.halves)))


#: Way to exchange -> its mean.
MEANS: dict[str, Callable[[Parts], Mean]] = {
    "bf16 ring": bf16_ring,
    "bf16 tree": bf16_tree,
    "bf16 all-to-all": bf16_all_to_all,
    "FP32 ring": fp32_ring,
    "split24 all-to-all": split24_all_to_all,
    "split24 two levels": split24_two_levels,
}
STOCK, EXACT = "bf16", "split24"
#: (way, format of a rank's sum) of each row.
WAYS = [(way, held) for way in MEANS for held in (STOCK, EXACT) if held == EXACT or way.startswith("bf16")]


def _with_residuals(parts: Parts) -> Tensor:
    assert parts.wide is not None
    return parts.wide


def _split24(x: Tensor) -> Mean:
    upper, low = encode(Format.SPLIT24, x)
    return upper, decode(Format.SPLIT24, upper, low)
