"""FP32 master weights inside bfloat16 weights: the weight is the upper half, a residual beside it the rest.

With ``h`` the weight and ``l`` its residual, the master weight is ``decode(h, l)`` of :mod:`accumkern.formats`: with
``"split32"`` (int16) every FP32 number, with ``"split24"`` (int8) those of 16 significant bits. The weight is the
master rounded to the nearest, ties away from zero.

A residual belongs to a weight as it was written last. Whoever changes the weight is right: its residual counts as zero
then, and the new master is what is there. A change is seen by the weight's version or its memory. Where a copy of the
weight is kept, elements that are as they were keep their residuals: until the first step, and of a weight that somebody
else has written twice (``Embedding(max_norm=...)``, clamping after the step, averages that are swapped in and out).
What is written through ``weight.data`` leaves no trace and keeps the residual, which is at most half a unit in the last
place of the weight.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accumkern.backends import Kernels
from accumkern.dtensor import is_dtensor, is_in_group, shard, sum_over_shards, version_of, with_shard
from accumkern.formats import BUFFERS, decode
from accumkern.ops import is_dense

#: ``master_weights`` argument of :func:`accumkern.attach` -> how weight and residual are stored.
MASTER_FORMATS = {name: BUFFERS[name][torch.bfloat16] for name in ("split24", "split32")}

_PART_NUMEL = 2**20
_CHANGES = 2  # of a weight by others, from which on a copy of it is kept


def local_of(param: Any) -> Tensor:
    """Return what this rank holds of a parameter, without its history."""
    return held(param).detach()


def held(param: Any) -> Tensor:
    """Return what this rank holds of a parameter: its shard, or the parameter itself."""
    return shard(param) if is_dtensor(param) else param


def dense(local: Tensor) -> Tensor:
    """Return a tensor whose memory has no holes, or a copy without them: as kernels take it."""
    return local if is_dense(local) and not local.is_neg() else local.resolve_neg().contiguous()


@dataclass
class _Residual:
    """What a weight lacks, flat in its memory order; and the place and version of the weight that it belongs to."""

    tensor: Tensor
    place: Any = None
    version: int = -1
    address: int = -1  # of the weight's first element
    seen: Tensor | None = None  # a copy of the weight, without holes in memory
    changes: int = 0  # by others, between steps


class MasterWeights:
    """The FP32 masters of bfloat16 parameters.

    Attributes:
        name: see below.
        format: how a weight and its residual make one number.

    Args:
        name: a key of :data:`MASTER_FORMATS`.
        kernels_on: returns the kernels of a device.
    """

    def __init__(self, name: str, kernels_on: Callable[[torch.device], Kernels]) -> None:
        self.name = name
        self.format = MASTER_FORMATS[name]
        self._kernels_on = kernels_on
        self._residuals: dict[Tensor, _Residual] = {}

    def check(self, name: str, param: Tensor) -> None:
        """Raise where a parameter can have no master.

        Raises:
            TypeError: it is float16, which is not the upper half of an FP32 number.
        """
        if param.dtype is torch.float16:
            raise TypeError(
                f"{name} is torch.float16, which has no master_weights: with 5 bits of exponent it is not the upper "
                "half of an FP32 number, as bfloat16 is; use bfloat16, or FP32 weights with autocast"
            )

    def has(self, param: Tensor) -> bool:
        """Return whether a parameter has a master: all that are bfloat16 have one."""
        return param.dtype is self.format.sum_dtype and param.layout is torch.strided

    def keep_only(self, params: Collection[Tensor]) -> None:
        """Let go of the residuals of all other parameters."""
        if not {*map(id, self._residuals)} <= {*map(id, params)}:  # to hash tensors takes longer
            for param in self._residuals.keys() - set(params):
                del self._residuals[param]

    def forget_all(self) -> None:
        """Let go of all residuals."""
        self._residuals.clear()

    def residual(self, param: Any) -> Tensor | None:
        """Return the residual that belongs to a weight as it is now, flat in its memory order; None counts as zero."""
        found = self._residuals.get(param)
        if found is None or not self.has(param):
            return None
        if (found.place, found.version) == (_place(param), version_of(param)):
            return found.tensor
        weight = dense(local_of(param))
        seen = found.seen
        if seen is None or (seen.shape, seen.stride(), seen.device) != (weight.shape, weight.stride(), weight.device):
            return None
        return torch.where(_bits(weight) == _bits(seen), found.tensor, 0)

    def held_tensors(self) -> list[Tensor]:
        """Return what is held beside the weights."""
        both = [(found.tensor, found.seen) for found in self._residuals.values()]
        return [tensor for pair in both for tensor in pair if tensor is not None]

    def watch(self, param: Tensor) -> None:
        """Keep a copy of a weight until the next step, to tell which elements are changed."""
        self._residuals[param].seen = dense(local_of(param)).clone()

    def value(self, param: Any) -> Any:
        """Return the FP32 master as a new tensor, laid out as the parameter is; of another dtype, a copy."""
        if not self.has(param):
            return param.detach().clone()
        local = dense(local_of(param))
        residual = self.residual(param)
        low = None if residual is None else residual.as_strided(local.shape, local.stride())
        master = decode(self.format, local, low)
        return with_shard(master, param.detach()) if is_dtensor(param) else master

    @torch.no_grad()
    def read(self, params: list[Tensor], masters: list[Tensor]) -> None:
        """Write the masters of parameters into FP32 tensors, each laid out as ``dense(local_of(param))``.

        Each parameter has memory for its residual from then on.

        Raises:
            RuntimeError: a CUDA graph is being captured, and a residual does not belong to its weight yet.
        """
        weights = [dense(local_of(param)) for param in params]
        residuals = [self.residual_to_write(param) for param in params]
        for device, lists in _by_device(weights, residuals, masters):
            self._kernels_on(device).decode(self.format, *lists)

    @torch.no_grad()
    def write(self, params: list[Tensor], masters: list[Tensor]) -> None:
        """Make FP32 tensors the masters of parameters that :meth:`read` has seen: weight and residual are written.

        The versions of the weights are left alone, until :meth:`count_changes`.
        """
        locals_ = [local_of(param) for param in params]
        weights = [dense(local) for local in locals_]
        residuals = [self._residuals[param].tensor for param in params]
        for device, (highs, lows, values) in _by_device(weights, residuals, masters):
            self._kernels_on(device).encode(self.format, values, 1.0, highs, lows)
        for local, weight in zip(locals_, weights, strict=True):
            if weight is not local:
                local.data.copy_(weight)
        self.wrote(params, weights)

    def wrote(self, params: list[Tensor], weights: list[Tensor]) -> None:
        """Note that weights and their residuals were written, and belong together.

        The versions of the weights are left alone, until :meth:`count_changes`.

        Args:
            params: the parameters.
            weights: what this rank holds of each, without holes in memory.
        """
        for param, weight in zip(params, weights, strict=True):
            self._remember(param)
            found = self._residuals[param]
            found.seen = weight.clone() if found.changes >= _CHANGES else None

    def count_changes(self, params: list[Tensor]) -> None:
        """Let autograd know that parameters were written.

        Parameters that are views of one tensor have one version: what belongs to a weight before does so afterwards.
        """
        if not params:
            return
        belong = [(param, found) for param, found in self._residuals.items() if found.version == version_of(param)]
        torch.autograd.graph.increment_version([held(param) for param in params])
        for param, found in belong:
            found.version = version_of(param)

    def load(self, param: Tensor, residual: Tensor | None) -> None:
        """Make a residual, flat in the weight's memory order, what belongs to the weight as it is now; None is zero."""
        if residual is None:
            self._residuals.pop(param, None)
        else:
            self._residuals[param] = _Residual(residual)
            self._remember(param)
            self.watch(param)

    def residual_to_write(self, param: Tensor) -> Tensor:
        """Return the residual of a weight, flat in its memory order, as memory that stays; of zeros where none belongs.

        Raises:
            RuntimeError: a CUDA graph is being captured, and a residual does not belong to its weight yet.
        """
        found, residual = self._residuals.get(param), self.residual(param)
        if found is not None and residual is found.tensor:
            return residual
        local = local_of(param)
        if local.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph is being captured, and a weight of shape {tuple(param.shape)} has no master yet, or was "
                "changed since the last step: each replay would begin its master again. Call optimizer.step() once "
                "before"
            )
        zeros = torch.zeros(local.numel(), dtype=self.format.residual_dtype, device=local.device)
        if found is None:
            found = self._residuals[param] = _Residual(zeros)
            return zeros
        if found.changes == 0 and residual is not None and not torch.equal(residual, found.tensor):
            warn_of_ranks(1)
        found.tensor = zeros if residual is None else residual
        found.changes += 1
        return found.tensor

    def as_written(self, params: list[Tensor], locals_: list[Tensor]) -> list[Tensor] | None:
        """Return the residuals of weights, flat in their memory order, if every weight is as a step has left it.

        Args:
            params: whose shapes and strides are what they were then.
            locals_: what this rank holds of each.
        """
        found = [self._residuals.get(param) for param in params]
        is_as_written = all(
            one is not None
            and one.version == version_of(param)
            and one.address == local.data_ptr()
            and one.seen is None
            and one.changes < _CHANGES
            for one, param, local in zip(found, params, locals_, strict=True)
        )
        return [one.tensor for one in found if one is not None] if is_as_written else None

    def _remember(self, param: Tensor) -> None:
        found = self._residuals[param]
        found.place, found.version, found.address = _place(param), version_of(param), held(param).data_ptr()


def state_dict_of(model: torch.nn.Module, masters_of: Callable[[Tensor], MasterWeights | None]) -> dict[str, Any]:
    """Return the state dict of a model in FP32; see :meth:`accumkern.GradAccumulator.master_state_dict`.

    Args:
        model: the model.
        masters_of: returns the masters that a parameter's is among, if there is one.
    """
    made: dict[int, Any] = {}
    exported = model.state_dict(keep_vars=True)
    for key, value in exported.items():
        if not isinstance(value, Tensor):
            continue
        if id(value) not in made:  # what is tied stays tied
            is_short = value.dtype in (torch.bfloat16, torch.float16)
            masters = masters_of(value) if is_short else None
            whole = value.detach() if masters is None else masters.value(value)
            made[id(value)] = whole.float() if is_short else whole
        exported[key] = made[id(value)]
    return exported


@torch.no_grad()
def checksums(params: list[Any]) -> list[Tensor]:
    """Return a number for the bits of each bfloat16 weight: their sum as int16, over all ranks that hold some of it.

    The same weights spread over other ranks have the same number. For DTensors, all ranks have to call this.
    """
    sums = [sum_of_bits(dense(local_of(param))) for param in params]
    spread = [i for i, param in enumerate(params) if is_dtensor(param)]
    over_ranks = sum_over_shards([sums[i] for i in spread], [params[i] for i in spread])
    for i, total in zip(spread, over_ranks, strict=True):
        sums[i] = total
    return sums


def warn_of_ranks(count: int) -> None:
    """Warn of weights that have changed since to_bfloat16(), where ranks may have changed them alone."""
    if is_in_group():
        warnings.warn(
            f"weights ({count}) have changed on this rank since to_bfloat16(), and what it had cut off of them is left "
            "out. DistributedDataParallel hands on the weights of rank 0, but not that: give all ranks the same FP32 "
            "weights before to_bfloat16(), or else their master weights differ",
            stacklevel=6,  # whoever calls attach(); torch.no_grad() is between
        )


def _bits(weight: Tensor) -> Tensor:
    """Return the bits of a weight without holes in memory, flat in its memory order."""
    return weight.as_strided((weight.numel(),), (1,)).view(torch.int16)


def sum_of_bits(weight: Tensor) -> Tensor:
    """Return the sum of a weight's bits as int16; the weight has no holes in memory."""
    bits = _bits(weight)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for part in bits.split(_PART_NUMEL):  # torch makes an int64 copy
        total += part.sum(dtype=torch.int64)
    return total


def _by_device(*columns: list[Tensor]) -> Iterator[tuple[torch.device, list[list[Tensor]]]]:
    """Yield each device and the tensors of the columns that are there."""
    rows: dict[torch.device, list[tuple[Tensor, ...]]] = defaultdict(list)
    for row in zip(*columns, strict=True):
        rows[row[0].device].append(row)
    for device, found in rows.items():
        yield device, [list(column) for column in zip(*found, strict=True)]


def _place(param: Any) -> Any:
    """Return where the memory of a weight is, and how the weight lies in it."""
    local = held(param)
    return local.untyped_storage()._cdata, local.storage_offset(), local.shape, local.stride()
