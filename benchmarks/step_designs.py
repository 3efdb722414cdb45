"""The designs of bench_step.py: ways to end a window of bfloat16 weights, accumkern's and others'.

A design ends the windows of the parameters that it was made with, says how many bytes it holds, and, where it goes in
one pass, how many it moves. Those that need a package are measured where that is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

import accumkern
from accumkern.formats import BUFFERS
from accumkern.memory import storage_bytes, tensors_in
from accumkern.updates import Update
from designs import Split24Masters, Split24Masters24, StockBF16, StockFP32Masters


class Design(Protocol):
    """One of the designs below.

    Attributes:
        key: the name in result files.
        label: the name in tables and figures.
        what: what it does, for readers of the numbers.
        optimizer_kind: module and name of the optimizer, where that is of another package than torch; else None.
        params: the bfloat16 weights.
    """

    key: str
    label: str
    what: str
    optimizer_kind: str | None
    params: list[nn.Parameter]

    def begin(self) -> None:
        """Make ready to accumulate."""

    def end(self, divide_by: float, max_norm: float | None) -> None:
        """Do what comes between two windows."""

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that are held, by what they are for."""

    def moved_bytes(self, divide_by: float, max_norm: float | None) -> int | None:
        """Return the bytes for a weight that an end has to read and write, if that is in as few passes as there are."""


class _Stock:
    """What is not accumkern's: its passes are not counted."""

    optimizer_kind: ClassVar[str | None] = None

    def moved_bytes(self, divide_by: float, max_norm: float | None) -> int | None:
        """Return None."""
        return None


class _OfPackage:
    """What steps with an optimizer of another package."""

    optimizer_kind: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    stepped: Callable[[], list[nn.Parameter]]

    def make_optimizer(self, learning_rate: float) -> Any:
        """Return the package's AdamW over :meth:`stepped`."""
        module, _, name = self.optimizer_kind.rpartition(".")
        return getattr(importlib.import_module(module), name)(self.stepped(), lr=learning_rate, **self.options)


# ---- stock PyTorch -----------------------------------------------------------------------------------------------


class InBF16(_Stock, StockBF16):
    """Stock PyTorch: everything is in bfloat16."""

    what = "bf16 sums and states; _foreach_div_ for the mean, clip_grad_norm_, step, zero_grad"
    residual_in_state: ClassVar[str | None] = None  # what the weights lack of their masters, where there are any

    def end(self, divide_by: float, max_norm: float | None) -> None:
        """Divide and clip ``.grad`` in passes of their own."""
        if divide_by != 1:
            torch._foreach_div_(self.sums(), divide_by)
        self.max_norm = max_norm
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that are held, by what they are for."""
        names = {name for state in self.optimizer.state.values() for name in state}
        residuals = {self.residual_in_state} & names
        return held(
            self.params,
            gradients=self.sums(),
            optimizer_state=states(self.optimizer, names - residuals),
            masters=states(self.optimizer, residuals),
        )


class BesideWeights(_Stock, StockFP32Masters):
    """FP32 sums and FP32 masters; the fused AdamW takes the mean and clips as it steps."""

    what = (
        "FP32 sums in one flat buffer, FP32 masters and states; mean and clipping by grad_scale in the fused AdamW of "
        "the masters, _foreach_copy_ to the weights, zeroing of the sums; no step hooks"
    )

    @torch.no_grad()
    def end(self, divide_by: float, max_norm: float | None) -> None:
        """Step the masters, round them to the weights and zero the sums."""
        self.optimizer.grad_scale = None
        if max_norm is not None:
            norm = torch.linalg.vector_norm(self.flat) / divide_by
            self.optimizer.grad_scale = divide_by * torch.clamp((norm + 1e-6) / max_norm, min=1.0)
        elif divide_by != 1:
            self.optimizer.grad_scale = torch.full((), divide_by, device=self.flat.device)
        for weight, total in zip(self.fp32_weights, self.buffers, strict=True):
            weight.grad = total
        self.optimizer.step()
        torch._foreach_copy_([*self.params], [*self.fp32_weights])
        self.begin_window()

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that are held, by what they are for."""
        state = tensors_in(dict(self.optimizer.state))
        return held(self.params, masters=[*self.fp32_weights], gradients=[self.flat], optimizer_state=state)


# ---- accumkern ---------------------------------------------------------------------------------------------------


class InsideWeights(Split24Masters):
    """Masters inside the weights, stepped in one pass; ``finish`` takes the mean and clips in passes before it."""

    what = "split24 sums, split32 masters, FP32 states; finish() for mean and clipping, step in one pass, zero_grad"
    optimizer_kind: ClassVar[str | None] = None
    bucket: ClassVar[int | None] = None
    is_fused: ClassVar[bool] = True
    defers: ClassVar[bool] = False

    def attach(self) -> accumkern.GradAccumulator:
        """Attach to the optimizer, with masters of the weights."""
        return accumkern.attach(self.optimizer, self.buffer, master_weights=self.master_weights, bucket=self.bucket)

    def end(self, divide_by: float, max_norm: float | None) -> None:
        """Do what users do."""
        if divide_by != 1 or max_norm is not None:
            self.accumulator.finish(divide_by, max_norm, defer=self.defers)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that are held, by what they are for."""
        found = self.accumulator.memory()
        return {
            "weights": found.weights,
            "masters": found.master_residuals,
            "gradients": found.gradients,
            "residuals": found.residuals,
            "optimizer_state": found.optimizer_state,
            "bucket": found.bucket,
        }

    def moved_bytes(self, divide_by: float, max_norm: float | None) -> int | None:
        """Return the bytes for a weight that an end reads and writes; None where it makes FP32 weights.

        The step reads and writes weight, its residual and two states, and reads sum and residual. ``finish`` reads sum
        and residual for the norm, and, unless it leaves that to the step, reads and writes them again.
        """
        if not self.is_fused:
            return None
        weight, total = stored_bytes(self.master_weights), stored_bytes(self.buffer)
        moved = 2 * (weight + torch.float32.itemsize * len(Update.ADAM.states)) + total
        if divide_by == 1 and max_norm is None:
            return moved
        return moved + total + (0 if self.defers else 2 * total)


class Deferred(InsideWeights):
    """The same, and the step takes the mean and clips as it goes."""

    key = "split24_masters_deferred"
    label = "accumkern split24 + masters, deferred"
    what = "split24 + masters with finish(defer=True): the norm, and mean and clipping are left to the step"
    defers = True


class InsideWeights24(InsideWeights):
    """Masters of 24 bits."""

    key, label, master_weights = Split24Masters24.key, Split24Masters24.label, Split24Masters24.master_weights
    what = "split24 sums, split24 masters, FP32 states; ends as split24 + masters"


class OwnAdamW(torch.optim.AdamW):
    """AdamW as a class of one's own, which may do something else: it is stepped on FP32 weights."""


class InBuckets(InsideWeights):
    """Masters inside the weights, which an optimizer of any class steps as FP32 weights, bucket by bucket."""

    key = "split24_masters_generic"
    label = "accumkern split24 + masters, in buckets"
    what = "split24 + masters with a subclass of the fused AdamW: FP32 weights and gradients, a bucket at a time"
    is_fused = False

    def make_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Return AdamW over :meth:`stepped`."""
        return OwnAdamW(self.stepped(), lr=learning_rate, fused=True)


class EightBit(_OfPackage, InBuckets):
    """The same with 8-bit states of bitsandbytes."""

    key = "split24_masters_8bit"
    label = "accumkern split24 + masters, bitsandbytes 8-bit"
    what = "AdamW8bit, split24 sums, split32 masters, 8-bit states; in buckets"
    optimizer_kind = "bitsandbytes.optim.AdamW8bit"


class EightBit24(EightBit):
    """The same with masters of 24 bits."""

    key = "split24_masters24_8bit"
    label = "accumkern split24 + 24-bit masters, bitsandbytes 8-bit"
    master_weights = "split24"
    what = "AdamW8bit, split24 sums, split24 masters, 8-bit states; in buckets"


class TorchaoEightBit(_OfPackage, InBuckets):
    """The same with 8-bit states of torchao."""

    key = "split24_masters_torchao_8bit"
    label = "accumkern split24 + masters, torchao 8-bit"
    what = "AdamW8bit, split24 sums, split32 masters, 8-bit states; in buckets, by torch.compile"
    optimizer_kind = "torchao.optim.AdamW8bit"


# ---- others ------------------------------------------------------------------------------------------------------


class StochasticRounding(_OfPackage, InBF16):
    """torchao: bfloat16 weights without masters, rounded at random so that small updates count on average."""

    key = "torchao_stochastic"
    label = "torchao, stochastic rounding"
    what = "_AdamW(bf16_stochastic_round=True), bf16 sums and states, no masters; by torch.compile"
    optimizer_kind = "torchao.optim._AdamW"
    options: ClassVar[dict[str, Any]] = {"bf16_stochastic_round": True}


class Flash24(_OfPackage, InBF16):
    """FlashOptim: masters of 24 bits, of which the weights are the upper ones, and 8-bit states, in one kernel."""

    key = "flashoptim24"
    label = "FlashOptim, 24-bit masters, 8-bit states"
    what = "FlashAdamW, bf16 sums, 24-bit masters, 8-bit states, one Triton kernel for each tensor"
    optimizer_kind = "flashoptim.FlashAdamW"
    residual_in_state = "error_bits"
    options: ClassVar[dict[str, Any]] = {"master_weight_bits": 24}


class Flash32(Flash24):
    """The same with masters of 32 bits."""

    key = "flashoptim32"
    label = "FlashOptim, 32-bit masters, 8-bit states"
    what = "FlashAdamW, bf16 sums, 32-bit masters, 8-bit states, one Triton kernel for each tensor"
    options: ClassVar[dict[str, Any]] = {"master_weight_bits": 32}


class BF16FusedAdam(_OfPackage, InBF16):
    """bf16_fused_adam: the lower half of FP32 masters beside the weights, which are cut off instead of rounded."""

    key = "bf16_fused_adam"
    label = "bf16_fused_adam"
    what = "BF16FusedAdamW, bf16 sums and states, FP32 masters whose upper half is the weight; one CUDA kernel"
    optimizer_kind = "bf16_fused_adam.BF16FusedAdamW"
    residual_in_state = "mantissas"


DESIGNS: tuple[type[Any], ...] = (
    InBF16,
    BesideWeights,
    InsideWeights,
    Deferred,
    InsideWeights24,
    InBuckets,
    EightBit,
    EightBit24,
    TorchaoEightBit,
    StochasticRounding,
    Flash24,
    Flash32,
    BF16FusedAdam,
)


# ---- what they share ---------------------------------------------------------------------------------------------


def with_bucket(mebibytes: int) -> type[InBuckets]:
    """Return the design of masters inside the weights that goes in buckets, of a size of its own."""
    return type(f"Bucket{mebibytes}", (InBuckets,), {"bucket": mebibytes * 2**20})


def package_of(design: type[Any]) -> str | None:
    """Return the name of the package that a design needs beside torch."""
    return None if design.optimizer_kind is None else str(design.optimizer_kind).partition(".")[0]


def is_installed(design: type[Any]) -> bool:
    """Return whether what a design needs is there; it may still fail to run, which is a result."""
    package = package_of(design)
    return package is None or importlib.util.find_spec(package) is not None


def stored_bytes(buffer: str) -> int:
    """Return the bytes of a bfloat16 number and its residual in a format of ``buffer`` or ``master_weights``."""
    format_ = BUFFERS[buffer][torch.bfloat16]
    residual = format_.residual_dtype
    return format_.sum_dtype.itemsize + (0 if residual is None else residual.itemsize)


def states(optimizer: Any, names: Collection[str | None]) -> list[Tensor]:
    """Return the tensors of an optimizer's states of some names, also those that lie in objects of the optimizer."""
    found = [value for state in optimizer.state.values() for name, value in state.items() if name in names]
    return tensors_in([found, [vars(value) for value in found if hasattr(value, "__dict__")]])


def held(
    params: list[nn.Parameter], gradients: list[Tensor], optimizer_state: list[Tensor], masters: list[Tensor]
) -> dict[str, int]:
    """Return the bytes of tensors, by what they are for."""
    return {
        "weights": storage_bytes(params),
        "masters": storage_bytes(masters),
        "gradients": storage_bytes(gradients),
        "residuals": 0,
        "optimizer_state": storage_bytes(optimizer_state),
        "bucket": 0,
    }
