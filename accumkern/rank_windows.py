"""Which window a model has: of one rank, of DistributedDataParallel, or of fully_shard; what is refused, and why."""

from __future__ import annotations

import weakref
from typing import Any

import torch.distributed as dist
from torch import nn

from accumkern.ddp_window import DdpWindow
from accumkern.dtensor import is_dtensor
from accumkern.fsdp_window import FsdpWindow
from accumkern.fully_shard_private import mesh_of, sharded_groups, sharded_modules
from accumkern.rank_window import RankWindow
from accumkern.torch_private import active_ddp, timeout_of

_GROUPS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()  # for agreements, by model


def window_of(model: nn.Module | None, reduce_once: bool = False, has_to_reduce: bool = False) -> RankWindow:
    """Return the window of a model: all its ranks have to enter it.

    Args:
        model: is or has a DistributedDataParallel, or is in one whose forward pass is under way, or has modules under
            ``fully_shard``; otherwise the window is of this rank alone. None is for a process without others.
        reduce_once: of :class:`accumkern.fsdp_window.FsdpWindow`.
        has_to_reduce: whether a window inside of ``no_sync()``, which leaves that to a later one, is an error.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: there are other ranks, and no model; or the model communicates in passes in a way that a rank which
            runs out of memory cannot leave.
    """
    if model is None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"model is None, and there are {dist.get_world_size()} ranks; give the model that loss_fn calls: a "
                "DistributedDataParallel or under fully_shard; or any other, of which nothing is reduced"
            )
        return RankWindow()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module, or None")
    replicated = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    around = active_ddp()
    if not replicated and around is not None and any(module is model for module in around.module.modules()):
        replicated = [around]
    sharded = sharded_modules(model)
    meshes = {mesh_of(group) for group in sharded_groups(sharded)}
    _check(model, len(replicated), meshes)
    if replicated:
        if has_to_reduce and not replicated[0].require_backward_grad_sync:
            raise ValueError("mean_over_ranks() was called inside of model.no_sync(); call it outside of it")
        group = replicated[0].process_group
        return DdpWindow(replicated[0], _group_for(replicated[0], dist.get_process_group_ranks(group), group))
    if meshes:
        mesh = meshes.pop()
        return FsdpWindow(sharded, _group_for(model, mesh.mesh.flatten().tolist(), mesh.get_group(0)), reduce_once)
    return RankWindow()


def _check(model: nn.Module, replicated: int, meshes: set[Any]) -> None:
    """Raise where a pass communicates otherwise than by one DistributedDataParallel or one mesh of fully_shard.

    Args:
        model: the whole of it.
        replicated: how many of its modules are DistributedDataParallel.
        meshes: over which fully_shard spreads its parameters.
    """
    if replicated + len(meshes) > 1:
        raise ValueError(
            f"model has {replicated} DistributedDataParallel in it, and parameters under fully_shard on {len(meshes)} "
            "meshes of ranks; acc.backward() takes one of either"
        )
    for name, param in model.named_parameters():
        if not is_dtensor(param):
            continue
        spread: Any = param
        mesh, shards = spread.device_mesh, [place for place in spread.placements if place.is_shard()]
        if mesh.size() > 1 and not (mesh in meshes and len(shards) == 1 and mesh.size(-1) > 1):
            raise ValueError(
                f"{name} is spread over ranks as {spread.placements} on {mesh}, by something else than fully_shard "
                "with shards on two ranks or more: where memory runs out on one rank, the others would wait for it in "
                "the collectives of its layers; run the passes yourself"
            )
    if replicated or meshes:
        for name, module in model.named_modules():
            if isinstance(module, nn.SyncBatchNorm) and module.training:
                raise ValueError(
                    f"{name} is a SyncBatchNorm: where memory runs out on one rank, the others would wait for it in "
                    "there; run the passes yourself"
                )


def _group_for(model: nn.Module, ranks: list[int], like: Any) -> Any:
    """Return a gloo group for what the ranks of a model agree on, made once; it waits as long as ``like`` does."""
    group = _GROUPS.get(model)
    if group is None:
        # Only its own ranks come here, and not those of another pipeline stage.
        group = dist.new_group(ranks, timeout_of(like), backend="gloo", use_local_synchronization=True)
        _GROUPS[model] = group
    return group
