"""``attach()``: its checks, and how the rooms behind an accumulator are wired.

Which parameters have hooks is the attachment's to say; what happens in a backward pass is in passes and sharded, one
fold in fold, and what belongs to one parameter in slot.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from accumkern import backends, ops, torch_private
from accumkern.accumulator import GradAccumulator, Rooms
from accumkern.attachment import Attachment, attachment_of
from accumkern.checks import one_of
from accumkern.dtensor import is_dtensor
from accumkern.fold import Fold
from accumkern.formats import BUFFERS
from accumkern.lost_bits import LostBitsMeter
from accumkern.noise_scale import NoiseScaleMeter
from accumkern.passes import BackwardPasses
from accumkern.sharded import ShardPasses, ShardSlot
from accumkern.slot import Slot


def attach(
    optimizer: torch.optim.Optimizer,
    buffer: str = "split24",
    *,
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
        average_over: multiply each micro-gradient by ``1 / average_over`` inside the kernel, instead of dividing the
            loss; a positive number, usually of the micro-batches in a window, whose reciprocal FP32 can hold (it is
            3e-39 to 7e44). None adds them as they are. It is where :attr:`GradAccumulator.scale` begins.
        stats: take the squared norm of every micro-gradient inside the kernel, for
            :meth:`GradAccumulator.noise_scale`.
        report: accumulate a sample of each 16-bit gradient the way stock PyTorch does, for
            :meth:`GradAccumulator.report`. Costs about a dozen small operations per parameter and micro-batch.
        backend: ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"eager"``; None takes the first that can run on the device of
            each gradient.

    Returns:
        The accumulator, also a context manager that detaches. It need not be kept: the hooks stay as long as the
        optimizer, and :func:`accumulator_of` finds it again.

    Raises:
        TypeError: an argument is of the wrong kind, a parameter's dtype does not take ``buffer``, or a parameter
            that requires a gradient is of a kind whose gradients cannot be folded: wrapped by the older
            FullyShardedDataParallel, a tensor subclass other than DTensor, a DTensor together with ``stats`` or
            ``report``, a fake tensor, or one of a lazy module before its first forward pass.
        ValueError: ``buffer`` or ``backend`` is unknown, ``average_over`` is out of range, or a parameter is attached
            already.
        RuntimeError: ``backend`` cannot run here, or not on the device of a parameter.

    After an error nothing is attached.
    """
    torch_private.check()
    _check_optimizer(optimizer)
    one_of("buffer", buffer, BUFFERS)
    scale = 1.0 if average_over is None else ops.reciprocal("average_over", average_over)
    if backend is not None:
        one_of("backend", backend, backends.BACKENDS)

    def check(name: str, param: Tensor) -> None:
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
    passes = BackwardPasses(fold, lost_bits, lambda param: here.put_on_hooks(param))
    shards = ShardPasses(passes, fold)
    attachment.rooms = Rooms(fold, passes, noise_scale, lost_bits)
    attachment.attach()
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


def _check_optimizer(optimizer: object) -> None:
    if not isinstance(getattr(optimizer, "param_groups", None), list) or not hasattr(optimizer, "add_param_group"):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
