"""Checkpoints in the middle of a window: sums and residuals, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from accumkern.dtensor import check_layout
from accumkern.formats import BUFFERS
from accumkern.slot import Slot


def parts(state_dict: Any, master_weights: str | None) -> tuple[Any, Any]:
    """Return the parts of a state that are of gradients and of master weights.

    Raises:
        ValueError: one has master weights, the state or the accumulator, and the other has not.
    """
    if not isinstance(state_dict, dict):
        return state_dict, None
    of_gradients = dict(state_dict)
    of_masters = of_gradients.pop("master_weights", None)
    if (of_masters is None) is not (master_weights is None):
        with_, without = (
            ("this accumulator", "state_dict") if of_masters is None else ("state_dict", "this accumulator")
        )
        raise ValueError(
            f"{with_} has master_weights and {without} has none; attach(..., master_weights=...) as it was"
        )
    return of_gradients, of_masters


def saved(params: list[Tensor], slots: Mapping[Tensor, Slot], buffer: str) -> dict[str, Any]:
    """Return the state of gradients; see :meth:`accumkern.GradAccumulator.state_dict`."""
    sums: dict[str, Tensor | None] = {}
    residuals: dict[str, Tensor | None] = {}
    for i, param in enumerate(params):
        slot = slots.get(param)
        grad = None if slot is None else param.grad
        sums[str(i)] = residuals[str(i)] = None
        if slot is None or grad is None:
            continue
        if not slot.is_complete(grad):
            raise RuntimeError(
                f"the gradient of parameter {i} of optimizer is a sum over ranks that is still to be taken "
                "(Partial); save between two windows"
            )
        sums[str(i)] = grad.detach()
        residual = slot.valid_residual(grad)
        residuals[str(i)] = None if residual is None else slot.saved_residual(residual, grad)
    return {"buffer": buffer, "sums": sums, "residuals": residuals}


def empty(params: list[Tensor], slots: Mapping[Tensor, Slot], buffer: str) -> dict[str, Any]:
    """Return a state of zeros; see :meth:`accumkern.GradAccumulator.empty_state_dict`."""
    sums: dict[str, Tensor | None] = {}
    residuals: dict[str, Tensor | None] = {}
    for i, param in enumerate(params):
        slot = slots.get(param) if param.requires_grad else None
        sums[str(i)] = residuals[str(i)] = None
        if slot is None:
            continue
        sums[str(i)] = torch.zeros_like(param, requires_grad=False)
        format_ = BUFFERS[buffer].get(param.dtype)
        if format_ is not None and format_.residual_dtype is not None:
            local = slot.local(param)
            residual = torch.zeros(local.numel(), dtype=format_.residual_dtype, device=local.device)
            residuals[str(i)] = slot.saved_residual(residual, param)
    return {"buffer": buffer, "sums": sums, "residuals": residuals}


def load(
    entries: list[tuple[Tensor | None, Tensor | None]], params: list[Tensor], slots: Mapping[Tensor, Slot]
) -> None:
    """Put back what :func:`checked` has returned; see :meth:`accumkern.GradAccumulator.load_state_dict`."""
    with torch.inference_mode(False):  # whose tensors cannot be written outside of it
        loaded = [
            (slot, None if total is None else slot.copies(total, residual))
            for param, (total, residual) in zip(params, entries, strict=True)
            if (slot := slots.get(param)) is not None
        ]
        for slot, copies in loaded:  # from here on nothing can fail
            slot.load(*(copies or (None, None)))


def checked(state_dict: object, parameters: list[Tensor], buffer: str) -> list[tuple[Tensor | None, Tensor | None]]:
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
            if tensor is not None and (
                tensor.is_nested or (residual is not None and tensor.layout is not torch.strided)
            ):
                kind = "a nested tensor" if tensor.is_nested else f"of layout {tensor.layout} beside a residual"
                raise TypeError(f"{key}[{i}] of state_dict is {kind}; it must be a dense tensor")
            if tensor is not None:
                check_layout(f"{key}[{i}] of state_dict", tensor, f"parameter {i}", param)
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
            if residual.shape != total.shape:
                shapes = f"{tuple(residual.shape)}; it must be that of the sum, {tuple(total.shape)}"
                raise ValueError(f"residuals[{i}] of state_dict has shape {shapes}")
    return entries
