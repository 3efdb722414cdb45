"""What accumkern needs of ``fully_shard`` beyond its documented names, as torch 2.10 and 2.13 have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_OF_MODULE = ("_is_root", "_training_state", "_modules_to_run_forward", "_state_ctx", "_comm_ctx")
_OF_GROUP = (
    *("fsdp_params", "mesh_info", "mp_policy", "reduce_grads", "all_reduce_grads"),
    *("_all_gather_comm", "_reduce_scatter_comm", "_all_gather_result", "_post_reduce_event", "_all_reduce_state"),
    *("_reshard_after_forward_event", "_partial_reduce_output", "_post_forward_indices", "_training_state"),
    *("_sharded_state", "_to_sharded"),
)


def sharded_groups(modules: list[Any]) -> list[Any]:
    """Return the groups of parameters that fully_shard communicates together, each once.

    Raises:
        RuntimeError: this torch keeps them in another way.
    """
    return list(dict.fromkeys(group for module in modules for group in _groups_of(module)))


def mesh_of(group: Any) -> Any:
    """Return the ranks of a group of parameters: of one dimension, or of replicas and shards."""
    return group.mesh_info.mesh


def is_reduced(group: Any) -> bool:
    """Return whether a backward pass reduces the gradients of a group of parameters, over all its ranks."""
    return group.reduce_grads and group.all_reduce_grads


def has_whole_gradients(group: Any) -> bool:
    """Return whether a group of parameters keeps gradients of earlier passes that are still to be reduced."""
    return group._partial_reduce_output is not None or any(
        param.unsharded_accumulated_grad is not None
        or (hasattr(param, "_unsharded_param") and param._unsharded_param.grad is not None)
        for param in group.fsdp_params
    )


def dtypes_of_sums(group: Any) -> set[torch.dtype]:
    """Return in what fully_shard adds the gradients of a group of parameters, before it reduces them."""
    policy = group.mp_policy
    return {policy.reduce_dtype or policy.param_dtype or param.sharded_param.dtype for param in group.fsdp_params}


def wrap_collectives(group: Any, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Let a group of parameters communicate by ``wrap(collective)``; return what takes that back."""
    before = group._all_gather_comm, group._reduce_scatter_comm
    group._all_gather_comm, group._reduce_scatter_comm = map(wrap, before)

    def restore() -> None:
        group._all_gather_comm, group._reduce_scatter_comm = before

    return restore


def _groups_of(module: Any) -> list[Any]:
    """Return the groups of a module.

    Raises:
        RuntimeError: this torch keeps them in another way.
    """
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        groups = list(state._fsdp_param_groups)
    else:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    missing = [name for name in _OF_MODULE if not hasattr(state, name)]
    missing += [name for group in groups for name in _OF_GROUP if not hasattr(group, name)]
    if missing:
        raise RuntimeError(
            f"fully_shard of torch {torch.__version__} has no {', '.join(missing)}, which acc.backward() of accumkern "
            "needs for it and torch 2.10 to 2.13 have; install one of these"
        )
    return groups


def forget_failed_pass(module: Any) -> None:
    """Let a module under fully_shard begin anew after a pass that failed: without its gradients, with its shards.

    Call it for every module under fully_shard, roots first.
    """
    state = module._get_fsdp_state()
    if hasattr(module, "reset_iter_state"):
        if state._is_root:
            module.reset_iter_state()
    else:
        _reset_iter_state(state)
    for group in _groups_of(module):
        group._to_sharded()
        for param in group.fsdp_params:
            param.to_sharded()  # also where it failed on the way to be whole
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None


def _reset_iter_state(state: Any) -> None:
    """Do for a module what ``FSDPModule.reset_iter_state`` does, which torch 2.10 does not have."""
    context, group = state._comm_ctx, state._fsdp_param_group
    if state._is_root:
        for name in ("all_gather_state", "reduce_scatter_state"):
            held = getattr(context, name)
            if held is not None and held.event is not None:
                state._device_handle.current_stream().wait_event(held.event)
            setattr(context, name, None)
        context.post_forward_order.clear()
        state._state_ctx.iter_forward_root = None
        state._state_ctx.post_backward_final_callback_queued = False
    idle = type(state._training_state).IDLE
    state._training_state = idle
    state._modules_to_run_forward.clear()
    if group is None:
        return
    if group._all_gather_result is not None:
        stream, result = group.device_handle.current_stream(), group._all_gather_result
        if result.all_gather_event is not None:
            stream.wait_event(result.all_gather_event)
        if result.all_gather_work is not None:
            result.all_gather_work.wait()
        group._all_gather_result = None
    group._wait_for_post_backward()
    if group._reshard_after_forward_event is not None:
        group._wait_all_gather_streams_on_event(group._reshard_after_forward_event)
        group._reshard_after_forward_event = None
    group._partial_reduce_output = None
    group._post_forward_indices.clear()
    group._training_state = idle
