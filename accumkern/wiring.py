"""``attach()``: its checks, and how the rooms behind an accumulator are wired.

Which parameters have hooks is the attachment's to say; what happens in a backward pass is in passes and sharded, one
fold in fold, and what belongs to one parameter in slot.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from accumkern import backends, ops, pipelines, torch_private
from accumkern.accumulator import GradAccumulator, Rooms
from accumkern.attachment import Attachment, attachment_of, stepped_by
from accumkern.checks import integer, one_of
from accumkern.dtensor import is_dtensor
from accumkern.fold import Fold
from accumkern.formats import BUFFERS
from accumkern.lost_bits import LostBitsMeter
from accumkern.master_weights import MASTER_FORMATS, MasterWeights
from accumkern.noise_scale import NoiseScaleMeter
from accumkern.optimizer_state import Fp32State
from accumkern.optimizers import refusal, that_steps
from accumkern.passes import BackwardPasses
from accumkern.sharded import ShardPasses, ShardSlot
from accumkern.slot import Slot
from accumkern.stepping import Stepping


def attach(
    optimizer: torch.optim.Optimizer,
    buffer: str = "split24",
    *,
    master_weights: str | None = None,
    bucket: int | None = None,
    average_over: float | None = None,
    stats: bool = False,
    report: bool = False,
    backend: str | None = None,
) -> GradAccumulator:
    """Accumulate the gradients of an optimizer's parameters in FP32 from now on.

    The training loop stays as it is: call ``loss.backward()`` for each micro-batch, then ``optimizer.step()`` and
    ``zero_grad()``. Parameters that are frozen now, or added later by ``optimizer.add_param_group``, are included.
    ``.grad`` is always the sum so far, rounded once: ties away from zero with a split buffer, to even with ``"fp32"``.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or an object with its ``param_groups``.
        buffer: what is kept beside ``.grad`` of a bfloat16 parameter: ``"split24"``, an int8 residual (3 gradient bytes
            per parameter in all, 16-bit significand); ``"split32"``, an int16 residual (4 bytes, exactly FP32);
            ``"fp32"``, an FP32 buffer (6 bytes). float16 parameters take ``"fp32"`` only. float32 parameters need
            nothing beside ``.grad`` and gain no accuracy.
        master_weights: how the FP32 master of a bfloat16 parameter is kept: ``"split32"``, an int16 residual beside the
            weight, which together are every FP32 number; ``"split24"``, an int8 residual, 16 significant bits. Then
            ``optimizer.step()`` reads and writes FP32 weights, with the optimizer's state in FP32 and the accumulated
            gradient to the precision of ``buffer``. None steps the bfloat16 weights themselves. float32 parameters are
            stepped as they are. The step of exactly ``torch.optim.AdamW``, ``Adam`` and ``SGD`` is one pass
            (:mod:`accumkern.fused_step`), that of others their own on FP32 copies.
        bucket: bytes of FP32 copies of weights and gradients that a step makes at a time where it is not one pass, 8
            per parameter; a tensor that needs more is made whole. None takes 8 MiB on a CPU, 256 MiB elsewhere.
            Optimizers that may look at all parameters together (:mod:`accumkern.optimizers` has the table of those that
            do not) take all of them at once.
        average_over: multiply each micro-gradient by ``1 / average_over`` inside the kernel, instead of dividing the
            loss; a positive number, usually of the micro-batches in a window, whose reciprocal FP32 can hold (it is
            3e-39 to 7e44). None adds them as they are. It is where :attr:`GradAccumulator.scale` begins.
        stats: take the squared norm of every micro-gradient inside the kernel, for
            :meth:`GradAccumulator.noise_scale`.
        report: accumulate a sample of each 16-bit gradient the way stock PyTorch does, for
            :meth:`GradAccumulator.report`. Costs about a dozen small operations per parameter and micro-batch.
        backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"eager"``; None takes the first that can run on the device of
            each gradient.

    Returns:
        The accumulator, also a context manager that detaches. It need not be kept: the hooks stay as long as the
        optimizer, and :func:`accumulator_of` finds it again.

    Raises:
        TypeError: an argument is of the wrong kind, a parameter's dtype does not take ``buffer``, or a parameter
            that requires a gradient is of a kind whose gradients cannot be folded: wrapped by the older
            FullyShardedDataParallel, a tensor subclass other than DTensor, a DTensor together with ``stats`` or
            ``report``, a fake tensor, or one of a lazy module before its first forward pass. With
            ``master_weights``: a parameter is float16, or the optimizer cannot be stepped on FP32 parameters.
        ValueError: ``buffer``, ``master_weights`` or ``backend`` is unknown, ``average_over`` or ``bucket`` is out of
            range, ``bucket`` is given without ``master_weights``, or a parameter is attached already.
        RuntimeError: ``backend`` cannot run here, or not on the device of a parameter.

    After an error nothing is attached.
    """
    torch_private.check()
    pipelines.watch()
    _check_optimizer(optimizer)
    one_of("buffer", buffer, BUFFERS)
    bucket_bytes = _checked_masters(optimizer, master_weights, bucket)
    scale = 1.0 if average_over is None else ops.reciprocal("average_over", average_over)
    if backend is not None:
        one_of("backend", backend, backends.BACKENDS)

    def check(name: str, param: Tensor) -> None:
        if masters is not None:
            masters.check(name, param)
        fold.check(name, param)
        for argument, asked in (("stats", stats), ("report", report)):
            if asked and is_dtensor(param):
                raise TypeError(f"{name} is a DTensor, of which this rank sees a part; attach without {argument}=True")

    def make_slot(param: Tensor) -> Slot:
        if is_dtensor(param):
            return ShardSlot(param, BUFFERS[buffer], shards.accumulate, shards.add)
        return Slot(param, BUFFERS[buffer], passes.accumulate)

    def after_step() -> None:
        if noise_scale is not None:
            noise_scale.squares.close()

    attachment = Attachment(optimizer, check, make_slot, after_step, lambda: stats or fold.is_scaled)
    here = weakref.proxy(attachment)  # which holds all that is made here: no circle
    noise_scale = NoiseScaleMeter(lambda: here.groups) if stats else None
    lost_bits = LostBitsMeter() if report else None
    fold = Fold(buffer, backend, None if noise_scale is None else noise_scale.squares)
    fold.set_scale(scale)
    masters = None if master_weights is None else MasterWeights(master_weights, fold.kernels_on)
    passes = BackwardPasses(fold, lost_bits, lambda param: here.put_on_hooks(param))
    shards = ShardPasses(passes, fold, Fold(buffer, backend, None))
    stepping = None
    if masters is not None:
        inner = that_steps(attachment.optimizer)
        stepping = Stepping(inner, masters, attachment.slots, bucket_bytes, fold.kernels_on, passes)
    attachment.rooms = Rooms(fold, passes, noise_scale, lost_bits, stepping)
    attachment.attach()
    if stepping is not None:
        try:
            attachment.keep([*stepping.hook(inner), stepping])
            attachment.keep([Fp32State(inner, stepping.masters.has)])
            stepping.begin_masters()
            if attachment.slots and not any(map(stepping.masters.has, attachment.slots)):
                warnings.warn(
                    f"master_weights is {master_weights!r}, and no parameter of optimizer is bfloat16: FP32 ones need "
                    "none. accumkern.to_bfloat16(model) casts a model without loss",
                    stacklevel=2,
                )
        except BaseException:  # there may be no memory for it
            attachment.detach()
            raise
    return GradAccumulator(attachment)


def accumulator_of(optimizer: torch.optim.Optimizer) -> GradAccumulator | None:
    """Return the accumulator whose hooks are on an optimizer's parameters, or None.

    It also hooks parameters that have come into ``param_groups`` by hand since, and lets go of those that have left: so
    does every step, but then torch has accumulated their gradients by itself.

    Raises:
        TypeError: ``optimizer`` has no ``param_groups``, or a parameter that has come cannot be hooked.
        RuntimeError: torch has accumulated the gradient of a parameter that has come.
    """
    _check_optimizer(optimizer)
    attachment = attachment_of(optimizer)
    if attachment is None:
        return None
    attachment.check_hooks()
    return attachment.face() or GradAccumulator(attachment)


def _checked_masters(optimizer: Any, master_weights: Any, bucket: Any) -> int | None:
    """Return the bytes of a bucket; raise where an argument is wrong or the optimizer cannot have masters."""
    right = "it must be a positive number of bytes, or None"
    bucket_bytes = None if bucket is None else integer("bucket", bucket, right, least=1)
    if master_weights is None:
        if bucket is not None:
            raise ValueError(f"bucket is {bucket}; it belongs to master_weights, which is None")
        return None
    one_of("master_weights", master_weights, MASTER_FORMATS, otherwise=", or None")
    reason = refusal(that_steps(stepped_by(optimizer)))
    if reason is not None:
        name = type(optimizer).__name__
        raise TypeError(f"optimizer is a {name}, which cannot be stepped with master_weights: {reason}")
    return bucket_bytes


def _check_optimizer(optimizer: object) -> None:
    if not isinstance(getattr(optimizer, "param_groups", None), list) or not hasattr(optimizer, "add_param_group"):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
