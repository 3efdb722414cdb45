"""Checkpoints of master weights: what the weights lack, and checksums of the weights that it belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accumkern.dtensor import check_layout, is_dtensor, shard, with_shard
from accumkern.master_weights import MasterWeights, checksums, dense, local_of

_KEYS = ("format", "residuals", "checksums")


def saved(params: list[Tensor], masters: MasterWeights) -> dict[str, Any]:
    """Return the state of masters; see :meth:`accumkern.GradAccumulator.state_dict`.

    A DTensor that is trained has a residual always, zeros if need be: on another rank it may be another one.
    """
    residuals = {i: masters.residual(param) for i, param in enumerate(params)}
    for i, param in enumerate(params):
        if residuals[i] is None and is_dtensor(param) and param.requires_grad and masters.has(param):
            residuals[i] = _zeros(param, masters)
    there = [i for i, residual in residuals.items() if residual is not None]
    sums = _checksums(params, there, checksums_of_shards(params, masters))
    return {
        "format": masters.name,
        "residuals": {str(i): None if r is None else _shaped(r, params[i]) for i, r in residuals.items()},
        "checksums": {str(i): sums.get(i) for i in residuals},
    }


def empty(params: list[Tensor], masters: MasterWeights) -> dict[str, Any]:
    """Return a state of zeros; see :meth:`accumkern.GradAccumulator.empty_state_dict`."""
    residuals: dict[str, Any] = {str(i): None for i in range(len(params))}
    sums = dict(residuals)
    for i, param in enumerate(params):
        if param.requires_grad and masters.has(param):
            zeros = _zeros(param, masters)
            residuals[str(i)] = _shaped(zeros, param)
            sums[str(i)] = torch.zeros((), dtype=torch.int64, device=zeros.device)
    return {"format": masters.name, "residuals": residuals, "checksums": sums}


def checksums_of_shards(params: list[Tensor], masters: MasterWeights) -> dict[int, Tensor]:
    """Return the checksums of those weights that are DTensors, by their index. All ranks have to call this."""
    spread = [i for i, param in enumerate(params) if is_dtensor(param) and masters.has(param)]
    return dict(zip(spread, checksums([params[i] for i in spread]), strict=True))


def checked(
    state: object, params: list[Tensor], masters: MasterWeights, of_shards: dict[int, Tensor]
) -> list[Tensor | None]:
    """Return what each weight lacks, flat in its memory order, after checking that a state fits the weights.

    Args:
        state: part of a state.
        params: all parameters.
        masters: of the parameters.
        of_shards: what :func:`checksums_of_shards` has returned before: here one rank may raise, and ask no other.

    Raises:
        TypeError, ValueError: it does not.
    """
    name = "state_dict['master_weights']"
    if not isinstance(state, dict) or set(state) != set(_KEYS):
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise TypeError(f"{name} is {found}; it must be what GradAccumulator.state_dict() returned")
    if state["format"] != masters.name:
        raise ValueError(f"{name} was saved with {state['format']!r}; this accumulator has {masters.name!r}")
    for key in _KEYS[1:]:
        entries = state[key]
        if not isinstance(entries, dict):
            raise TypeError(f"{key} of {name} is a {type(entries).__name__}; it must be a dictionary")
        if set(entries) != {str(i) for i in range(len(params))}:
            raise ValueError(f"{key} of {name} are of {len(entries)} parameters; the optimizer has {len(params)}")
    residuals = [state["residuals"][str(i)] for i in range(len(params))]
    for i, (param, residual) in enumerate(zip(params, residuals, strict=True)):
        if residual is not None:
            _check(f"residuals[{i}] of {name}", residual, f"parameter {i}", param, masters)
            if not isinstance(state["checksums"][str(i)], Tensor):
                raise TypeError(f"checksums[{i}] of {name} is no tensor, and there is a residual")
    there = [i for i, residual in enumerate(residuals) if residual is not None]
    for i, checksum in _checksums(params, there, of_shards).items():
        if int(checksum) != int(state["checksums"][str(i)]):
            raise ValueError(
                f"residuals[{i}] of {name} belongs to another weight than parameter {i} is now: load the state of the "
                "model before this one"
            )
    return [None if r is None else _flat(r, param) for r, param in zip(residuals, params, strict=True)]


def _check(name: str, residual: Any, of: str, param: Tensor, masters: MasterWeights) -> None:
    """Raise unless a residual is one that a parameter's weight can lack."""
    if not isinstance(residual, Tensor) or residual.layout is not torch.strided or residual.is_meta:
        found = type(residual).__name__
        raise TypeError(f"{name} is a {found}; it must be a dense tensor with values, or None")
    if not masters.has(param):
        raise TypeError(f"{name} is there; {of} is {param.dtype}, which lacks nothing")
    if residual.dtype is not masters.format.residual_dtype:
        raise TypeError(f"{name} is {residual.dtype}; with {masters.name!r} it is {masters.format.residual_dtype}")
    if residual.shape != param.shape:
        raise ValueError(f"{name} has shape {tuple(residual.shape)}; {of} has {tuple(param.shape)}")
    check_layout(name, residual, of, param)


def _checksums(params: list[Tensor], wanted: list[int], of_shards: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the checksums of some weights by their index; those of DTensors are known."""
    plain = [i for i in wanted if i not in of_shards]
    sums = {**of_shards, **dict(zip(plain, checksums([params[i] for i in plain]), strict=True))}
    return {i: sums[i] for i in wanted}


def _zeros(param: Tensor, masters: MasterWeights) -> Tensor:
    """Return the residual, flat, of a weight that lacks nothing."""
    local = local_of(param)
    return torch.zeros(local.numel(), dtype=masters.format.residual_dtype, device=local.device)


def _shaped(residual: Tensor, param: Any) -> Any:
    """Return a flat residual in the shape of its weight, laid out over ranks alike."""
    local = dense(local_of(param))
    shaped = residual.as_strided(local.shape, local.stride())
    return with_shard(shaped, param.detach()) if is_dtensor(param) else shaped


def _flat(residual: Any, param: Any) -> Tensor:
    """Return a copy of a residual, flat in the memory order of its weight."""
    local = dense(local_of(param))
    copy = torch.empty_like(local, dtype=residual.dtype)
    copy.copy_(shard(residual) if is_dtensor(residual) else residual)
    return copy.as_strided((copy.numel(),), (1,))
