"""Checks of a state that is loaded in the middle of a window."""

from __future__ import annotations

from torch import Tensor

from accumkern import distributed
from accumkern.formats import BUFFERS


def checked_state(
    state_dict: object, buffer: str, parameters: list[Tensor]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return (sum, residual) for each parameter, after checking that a state fits."""
    if not isinstance(state_dict, dict) or set(state_dict) != {"buffer", "sums", "residuals"}:
        found = sorted(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise TypeError(f"state_dict is {found}; it must be what GradAccumulator.state_dict() returned")
    if state_dict["buffer"] != buffer:
        raise ValueError(f"state_dict was saved with buffer={state_dict['buffer']!r}; this accumulator has {buffer!r}")
    sums, residuals = state_dict["sums"], state_dict["residuals"]
    for key, tensors in (("sums", sums), ("residuals", residuals)):
        if not isinstance(tensors, dict):
            raise TypeError(f"{key} of state_dict is a {type(tensors).__name__}; it must be a dictionary")
        if len(tensors) != len(parameters):
            raise ValueError(
                f"{key} of state_dict are of {len(tensors)} parameters; the optimizer has {len(parameters)}"
            )
        for i in range(len(parameters)):  # as strings: torch.distributed.checkpoint makes strings of numbers
            if str(i) not in tensors:
                raise ValueError(f"{key} of state_dict has no entry {str(i)!r}; it must have one for each parameter")
            tensor = tensors[str(i)]
            if tensor is not None and not isinstance(tensor, Tensor):
                raise TypeError(f"{key}[{i}] of state_dict is a {type(tensor).__name__}; it must be a tensor or None")
    entries = [(sums[str(i)], residuals[str(i)]) for i in range(len(parameters))]
    for i, (param, (total, residual)) in enumerate(zip(parameters, entries, strict=True)):
        if total is None:
            if residual is not None:
                raise ValueError(f"state_dict holds a residual but no sum for parameter {i}")
            continue
        for key, tensor in (("sums", total), ("residuals", residual)):
            if tensor is not None and tensor.is_meta:
                raise ValueError(f"{key}[{i}] of state_dict is on the meta device, without values; load it elsewhere")
            if tensor is not None:
                distributed.check_layout(f"{key}[{i}] of state_dict", tensor, f"parameter {i}", param)
        if total.shape != param.shape:
            raise ValueError(
                f"sums[{i}] of state_dict has shape {tuple(total.shape)}; parameter {i} has {tuple(param.shape)}"
            )
        if getattr(param, "grad_dtype", param.dtype) not in (None, total.dtype):
            raise TypeError(f"sums[{i}] of state_dict is {total.dtype}; parameter {i} is {param.dtype}")
        if residual is not None:
            format_ = BUFFERS[buffer].get(total.dtype)
            if format_ is None or residual.dtype is not format_.residual_dtype:
                raise TypeError(f"residuals[{i}] of state_dict is {residual.dtype}, which buffer={buffer!r} never has")
            shape = tuple(total.shape) if distributed.is_dtensor(total) else (total.numel(),)
            if residual.shape != shape:
                raise ValueError(f"residuals[{i}] of state_dict has shape {tuple(residual.shape)}; it must be {shape}")
    return entries
