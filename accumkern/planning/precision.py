"""What FP32 a setup trains in: the choice of ``buffer`` and ``master_weights``, and ``attach()`` with them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from accumkern.accumulator import GradAccumulator
from accumkern.attachment import stepped_by
from accumkern.checks import one_of
from accumkern.formats import BUFFERS
from accumkern.fused_step import is_fused
from accumkern.master_weights import MASTER_FORMATS
from accumkern.memory import tensors_in
from accumkern.optimizers import is_stepped_in_parts, refusal
from accumkern.out_of_memory import format_bytes
from accumkern.planning.protocol import Setup
from accumkern.stand_ins import STAND_IN_BYTES
from accumkern.stepping import bucket_bytes_on
from accumkern.wiring import attach

_FEW_MICRO_BATCHES = 8  # the gain of FP32 accumulation may be invisible up to here
_MASTER_BYTES = {"split24": 1, "split32": 2}  # per parameter, of a residual


def choose_buffer(setup: Setup, buffer: str | None) -> str | None:
    """Return the ``buffer`` for :func:`accumkern.attach`, or None where stock PyTorch accumulates in FP32 already.

    Where the user asked for none, trainable parameters decide: ``"fp32"`` if some are float16, else ``"split24"``.

    Raises:
        TypeError, ValueError: ``buffer`` is unknown.
    """
    if buffer is not None:
        one_of("buffer", buffer, BUFFERS, ", or None to choose")
    dtypes = {param.dtype for param in setup.model.parameters() if param.requires_grad}
    if not dtypes & {torch.bfloat16, torch.float16}:
        return None
    return buffer or ("fp32" if torch.float16 in dtypes else "split24")


def choose_masters(setup: Setup, master_weights: str | None) -> str | None:
    """Return the ``master_weights`` for :func:`accumkern.attach`; None where no trained weight is bfloat16.

    ``"auto"`` is ``"split32"``, or None where there is a :func:`masters_problem`.

    Raises:
        TypeError: ``master_weights`` is no text, or there is a problem, and it was asked for by name.
        ValueError: it is unknown.
    """
    if master_weights is None:
        return None
    one_of("master_weights", master_weights, ("auto", *MASTER_FORMATS), ", or None")
    is_auto, problem = master_weights == "auto", masters_problem(setup)
    if problem is not None and not is_auto:
        raise TypeError(f"master_weights is {master_weights!r}, and {problem}; choose 'auto' or None")
    if problem is not None or not with_masters(setup):
        return None
    return "split32" if is_auto else master_weights


def masters_problem(setup: Setup) -> str | None:
    """Return why the 16-bit weights of a setup can have no masters, or None."""
    params = _trained(setup)
    if any(param.dtype is torch.float16 for param in params):
        return "some of the optimizer's parameters are float16, which can have no masters"
    if not with_masters(setup):
        return None
    reason = refusal(stepped_by(setup.optimizer))
    return None if reason is None else f"{type(setup.optimizer).__name__} cannot step FP32 weights: {reason}"


def with_masters(setup: Setup) -> list[Tensor]:
    """Return the parameters that master weights are for: those of bfloat16 that the optimizer trains."""
    return [param for param in _trained(setup) if param.dtype is torch.bfloat16]


def step_bytes(setup: Setup) -> int:
    """Return the bytes of the FP32 weights and gradients that a step with master weights makes at a time."""
    params = with_masters(setup)
    if not params or is_fused(stepped_by(setup.optimizer)):
        return 0
    sizes = [STAND_IN_BYTES * held.numel() for held in tensors_in(params)]
    if not is_stepped_in_parts(stepped_by(setup.optimizer)):
        return sum(sizes)
    return max([min(sum(sizes), bucket_bytes_on(params[0].device)), *sizes])


def buffer_reason(buffer: str | None, accumulation_steps: int) -> str | None:
    """Say why a buffer was chosen; None where there is nothing to say."""
    if buffer is None:
        return "Buffer: none. The parameters are float32, and stock PyTorch accumulates in FP32 already."
    if accumulation_steps == 1:
        return None
    reason = f"Buffer: {buffer!r}, so that {accumulation_steps} micro-gradients are summed in FP32"
    if accumulation_steps <= _FEW_MICRO_BATCHES:
        reason += "; with so few, the loss may not show the difference to stock accumulation"
    return f"{reason}."


def masters_reason(
    master_weights: str | None, problem: str | None, bfloat16_numel: int, step_bytes: int, adam: bool
) -> str:
    """Say what master weights cost or would cost, or why there are none."""
    lost = "updates below 1/512 of a weight are lost in rounding it to bfloat16"
    if problem is not None:
        return f"Master weights: none, and {lost}; {problem}."
    name = master_weights or "split32"
    each = _MASTER_BYTES[name]
    cost = f"{each} byte{'s' if each > 1 else ''} per parameter ({format_bytes(each * bfloat16_numel)})"
    states = "optimizer states in FP32"
    if adam:
        states += " (4 bytes more per parameter for Adam's two moments, where they were bfloat16)"
    if master_weights is None:
        return (
            f"Master weights: none were asked for, and {lost}. master_weights={name!r} would keep them for {cost} and "
            f"{states}."
        )
    bucket = ""  # of an optimizer that is stepped in one pass
    if step_bytes:
        bucket = f", up to {format_bytes(step_bytes)} for the FP32 weights and gradients of a step"
    kept = "what that rounds off" if name == "split32" else "8 bits of what that rounds off"
    return (
        f"Master weights: {name!r}, because without them {lost}. The step reads and writes FP32 weights; a residual "
        f"beside each bfloat16 weight keeps {kept}. This costs {cost}, {states}{bucket}, and time of the step. Memory "
        "and speeds here are with all of it."
    )


def accumulation(
    setup: Setup,
    buffer: str | None,
    micro_batches: int,
    master_weights: str | None = None,
    backend: str | None = None,
) -> AbstractContextManager[GradAccumulator | None]:
    """Return a block in which a setup trains as :func:`accumkern.attach` lets it, where there is a reason to call that.

    Several micro-batches are averaged in FP32; with ``master_weights`` the step is one of FP32 weights.
    """
    if buffer is None or (micro_batches == 1 and master_weights is None):
        return nullcontext()
    return attach(setup.optimizer, buffer, master_weights=master_weights, average_over=micro_batches, backend=backend)


def _trained(setup: Setup) -> list[Tensor]:
    params = (param for group in setup.optimizer.param_groups for param in group["params"])
    return [param for param in dict.fromkeys(params) if param.requires_grad]
