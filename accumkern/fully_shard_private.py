"""What accumkern needs of ``fully_shard`` beyond its documented names, as torch 2.10 and 2.13 have it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_OF_MODULE = ("_is_root", "_training_state", "_modules_to_run_forward", "_state_ctx", "_comm_ctx")
_OF_GROUP = (
    *("fsdp_params", "mesh_info", "mp_policy", "reduce_grads", "all_reduce_grads"),
    *("_all_gather_comm", "_reduce_scatter_comm", "_all_gather_result", "_post_reduce_event", "_all_reduce_state"),
    *("_reshard_after_forward_event", "_partial_reduce_output", "_post_forward_indices", "_training_state"),
    *("_sharded_state", "_to_sharded", "_orig_dtype", "_reduce_dtype", "post_backward"),
)
_OF_PARAM = ("sharded_param", "unsharded_accumulated_grad")


def sharded_modules(model: torch.nn.Module) -> list[Any]:
    """Return the modules under fully_shard, roots first; there are none where nobody has imported it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


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


def replace_post_backward(group: Any, post_backward: Callable[..., None]) -> Callable[[], None]:
    """Let ``post_backward`` be called where a group has all gradients of a backward pass; return what undoes that."""
    before = vars(group).get("post_backward")

    def restore() -> None:
        if vars(group).get("post_backward") != post_backward:  # somebody else has replaced it after that
            return
        if before is None:
            del group.post_backward
        else:
            group.post_backward = before

    group.post_backward = post_backward
    return restore


def take_whole_gradient(param: Any) -> Any:
    """Return the whole gradient that autograd has brought, which the parameter has no longer; None where it did not."""
    if not hasattr(param, "_unsharded_param"):  # was never gathered
        return None
    whole = param._unsharded_param
    grad, whole.grad = whole.grad, None
    return grad


def put_back_whole_gradient(param: Any, value: Any) -> None:
    """Let fully_shard itself go on with a whole gradient in FP32, in the dtype in which it adds up."""
    if param.reduce_dtype is not None:
        param.unsharded_accumulated_grad = value.to(param.reduce_dtype)
        return
    param.unsharded_accumulated_grad = None
    whole = param._unsharded_param
    value = value.to(whole.dtype)
    whole.grad = value if whole.grad is None else value.add_(whole.grad)


def zeros_for_unused(group: Any, param: Any) -> Any:
    """Return zeros in FP32 for a parameter that got no gradient, where fully_shard reduces these too; else None."""
    is_asked = getattr(group, "reduce_scatter_unused_params", False)  # torch 2.10 does not have it
    if not is_asked or not hasattr(param, "_unsharded_param") or not param._unsharded_param.requires_grad:
        return None
    return torch.zeros_like(param._unsharded_param, dtype=torch.float32)


@contextmanager
def reduced_in_fp32(group: Any) -> Iterator[None]:
    """Return a block in which a group reduces FP32 gradients in FP32, and adds them to shards as they are."""
    before = group._orig_dtype, group._reduce_dtype
    group._orig_dtype = group._reduce_dtype = torch.float32
    try:
        yield
    finally:
        group._orig_dtype, group._reduce_dtype = before


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
    for group in groups:
        later = type(group).__annotations__  # what a group has from its first forward pass on
        missing += [name for name in _OF_GROUP if not hasattr(group, name) and name not in later]
        missing += [name for param in group.fsdp_params for name in _OF_PARAM if not hasattr(param, name)]
    if missing:
        raise RuntimeError(
            f"fully_shard of torch {torch.__version__} has no {', '.join(dict.fromkeys(missing))}, which accumkern "
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
