"""A window under DistributedDataParallel: passes without collectives, and one mean over ranks when all are through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accumkern.ddp import HALVES, Fp32Reduction, reduction_of
from accumkern.ops import is_dense
from accumkern.rank_window import Name, RankWindow
from accumkern.ranks import Ranks
from accumkern.torch_private import refusal_of_ddp, sync_before_passes

BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel


class DdpWindow(RankWindow):
    """The window of a rank under DistributedDataParallel, beside others that may need more or smaller parts.

    Within a pass there is no collective (``no_sync()``), so each rank splits as its own memory has it, and begins again
    without the others. The mean over ranks is taken once, after the last backward pass: bucket by bucket, in the
    gradients' dtype with the bits of DistributedDataParallel, or in FP32 after ``acc.reduce_in_fp32(model)``. It is not
    hidden behind a backward pass: one that is under way could not be taken back on all ranks. Inside of the user's own
    ``no_sync()`` it is left to a later window.

    Args:
        model: the DistributedDataParallel.
        group: a gloo group of its ranks for their agreements.

    Raises:
        ValueError: on entering, the model has a communication hook, or another way to reduce that needs a backward
            pass.
    """

    def __init__(self, model: nn.parallel.DistributedDataParallel, group: dist.ProcessGroup) -> None:
        self._agreement = Ranks(group, "in acc.backward()")
        self._model: Any = model
        self._stack = ExitStack()
        self._is_synced = model.require_backward_grad_sync

    def whole(self, counts: Mapping[Name, float]) -> dict[Name, float]:
        """Return the counts of all ranks, divided by their number."""
        return self._agreement.means(counts)

    def reduce(self) -> None:
        """Take the mean over ranks of every gradient that a rank has; where it has none, it counts zero.

        Raises:
            TypeError: a gradient is sparse, or of another dtype than its parameter.
        """
        params = _params_of(self._model)
        for name, param in params.items():
            grad = param.grad
            if grad is not None and (grad.layout is not torch.strided or grad.dtype is not param.dtype):
                raise TypeError(
                    f"the gradient of {name} is {grad.dtype} and {grad.layout}, and the parameter {param.dtype}; "
                    "acc.backward() takes the mean over ranks of dense gradients in the parameter's dtype"
                )
        have = self._agreement.gathered(
            bytes(param.grad is not None for param in params.values()) if self._is_synced else None
        )
        if None in have:  # a window in no_sync(): another reduces its gradients
            if any(of_rank is not None for of_rank in have):
                raise ValueError("acc.backward() was called inside of model.no_sync() on some ranks and not on others")
            return
        if self._agreement.count == 1:
            return
        used = [
            param for param, of_ranks in zip(params.values(), zip(*have, strict=True), strict=True) if any(of_ranks)
        ]
        for param in used:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        reduction = reduction_of(self._model)
        if reduction is not None:
            reduction.begin()
        try:
            for params_of_bucket in _bucketed(used):
                self._reduce(Bucket(params_of_bucket), reduction)
        finally:
            torch.autograd.graph.increment_version([param.grad for param in used])
        if reduction is not None:
            reduction.end()
        self._agreement.meet()

    @torch.no_grad()
    def _reduce(self, bucket: Bucket, reduction: Fp32Reduction | None) -> None:
        buffer = bucket.buffer()
        for param, part in zip(bucket.parameters(), bucket.gradients(), strict=True):
            part.copy_(param.grad)
        if reduction is not None and buffer.dtype in HALVES:
            group = self._model.process_group
            future = reduction.start(bucket, group, self._agreement.count, ready=self._agreement.meet)
            reduction.drain()
            future.wait()
        else:
            self._agreement.meet()
            dist.all_reduce(buffer.mul_(1 / self._agreement.count), group=self._model.process_group)
        for param, part in zip(bucket.parameters(), bucket.gradients(), strict=True):
            param.grad.data.copy_(part)  # without a new version, which gradients of other buckets may have in common

    def __enter__(self) -> RankWindow:
        with ExitStack() as stack:
            stack.enter_context(self._agreement)
            reduction_of(self._model)
            refusal = refusal_of_ddp(self._model)
            if refusal is not None:
                raise ValueError(f"model is a DistributedDataParallel with {refusal}; acc.backward() cannot run that")
            self._agreement.meet()
            sync_before_passes(self._model)
            stack.callback(setattr, self._model, "require_forward_param_sync", True)
            stack.enter_context(self._model.no_sync())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


class Bucket:
    """Some gradients in one flat buffer, as DistributedDataParallel hands its buckets to a communication hook."""

    def __init__(self, params: list[Any]) -> None:
        self._params = params
        first = params[0]
        self._buffer = torch.empty(sum(p.numel() for p in params), dtype=first.dtype, device=first.device)
        self._gradients, offset = [], 0
        for param in params:
            flat = self._buffer[offset : offset + param.numel()]
            dense = is_dense(param)
            self._gradients.append(flat.as_strided(param.shape, param.stride()) if dense else flat.view(param.shape))
            offset += param.numel()

    def buffer(self) -> Tensor:
        """Return the memory of all gradients."""
        return self._buffer

    def gradients(self) -> list[Tensor]:
        """Return the views of it, in the memory order of the parameters."""
        return self._gradients

    def parameters(self) -> list[Any]:
        """Return the parameters in the same order."""
        return self._params


def _params_of(model: Any) -> dict[str, Any]:
    """Return the parameters that a DistributedDataParallel reduces, each once, by name."""
    params: dict[Any, str] = {}
    for module_name, module in model.module.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if param.requires_grad and f"{module_name}.{name}" not in model.parameters_to_ignore and param.numel():
                params.setdefault(param, f"{module_name}.{name}".lstrip("."))
    return {name: param for param, name in params.items()}


def _bucketed(params: list[Any]) -> Iterator[list[Any]]:
    """Return the parameters of one bucket after another: of one dtype and device."""
    by_kind: dict[Any, list[Any]] = {}
    for param in params:
        by_kind.setdefault((param.dtype, param.device), []).append(param)
    for (dtype, _), alike in by_kind.items():
        bucket: list[Any] = []
        room = BUCKET_BYTES
        for param in alike:
            size = param.numel() * dtype.itemsize
            if bucket and size > room:
                yield bucket
                bucket, room = [], BUCKET_BYTES
            bucket.append(param)
            room -= size
        yield bucket
