"""What accumkern needs of torch beyond its documented names, and :func:`check` for a torch that lacks some of it.

Seen in torch 2.10, 2.11 and 2.13. Attributes are read where they are needed: ``_version``, the counter of a tensor's
changes, ``_is_view()``, a storage's ``_cdata``, a module's ``_parameters`` and ``_buffers``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import operator
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

_COLLECTIVES = "torch.distributed._functional_collectives"  # imported when a DTensor comes
_missing: dict[str, list[str]] = {"attach()": [], "planning": []}


def _find(name: str, needed_by: str = "attach()") -> Any:
    try:
        return operator.attrgetter(name)(torch)
    except AttributeError:
        _missing[needed_by].append(f"torch.{name}")
        return None


def check(needed_by: str = "attach()") -> None:
    """Raise unless this torch has every name that a part of accumkern needs.

    Args:
        needed_by: ``"attach()"`` or ``"planning"``.

    Raises:
        RuntimeError: some are missing; the message lists them.
    """
    missing = list(_missing[needed_by])
    if needed_by == "attach()" and not missing and not _tells_what_accumulates():
        missing.append("torch._C._will_engine_execute_node that tells backward() from torch.autograd.grad")
    if needed_by == "attach()" and torch.distributed.is_available() and not importlib.util.find_spec(_COLLECTIVES):
        missing.append(_COLLECTIVES)
    if missing:
        raise RuntimeError(
            f"torch {torch.__version__} has no {', '.join(missing)}, which {needed_by} of accumkern needs and torch "
            "2.10 to 2.13 have; install one of these"
        )


# ---- backward passes and hooks -----------------------------------------------------------------------------------


#: Number of the backward pass that this thread works for; NO_BACKWARD outside of one.
current_graph_task_id = _find("_C._current_graph_task_id")
NO_BACKWARD = -1
#: The node that this thread evaluates, in a hook too.
current_node = _find("_C._current_autograd_node")
#: Whether the backward pass evaluates a node. Of one that accumulates a gradient, it raises a RuntimeError in
#: ``torch.autograd.grad``, which does not.
will_evaluate = _find("_C._will_engine_execute_node")
#: Have a function called at the end of the backward pass.
queue_callback = _find("autograd.Variable._execution_engine.queue_callback")
#: ``__torch_function__`` of a subclass whose operations return plain tensors.
disabled_torch_function = _find("_C._disabled_torch_function_impl")
#: Whether a tensor is of a subclass that wraps other tensors, such as DTensor.
is_wrapper_subclass = _find("utils._python_dispatch.is_traceable_wrapper_subclass")
#: A block in which no mode sees operations.
without_modes = _find("utils._python_dispatch._disable_current_modes")
#: The base of modes that see every operation; a torch without it can be imported.
TorchDispatchMode: Any = _find("utils._python_dispatch.TorchDispatchMode") or object
#: What lies in nested containers.
tree_leaves = _find("utils._pytree.tree_leaves")
#: Whether a tensor has a shape but no memory, as what is made under FakeTensorMode.
is_fake = _find("_subclasses.fake_tensor.is_fake")

_function_backward = _find("autograd.function.BackwardCFunction.apply")
for _name in ("Tensor._version", "Tensor._is_view", "Tensor._backward_hooks", "Tensor._post_accumulate_grad_hooks"):
    _find(_name)


def is_in_function() -> bool:
    """Return whether this runs inside the ``backward`` of a ``torch.autograd.Function``, such as a checkpoint's."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _function_backward.__code__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@functools.cache
def _tells_what_accumulates() -> bool:
    """Return whether :data:`will_evaluate` does what is said there."""
    found = []

    def hook(_grad: Any) -> None:
        try:
            found.append(will_evaluate(current_node()))
        except RuntimeError:
            found.append(False)

    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros(1, device="cpu", requires_grad=True)
        leaf.register_hook(hook)
        torch.autograd.grad(leaf * 1, [leaf])
        (leaf * 1).backward()
    return found == [False, True]


def _stream_by_public_names(device_index: int) -> int:
    return torch.cuda.current_stream(device_index).cuda_stream


#: Handle of a GPU's current stream; builds for CPUs lack the quick way.
current_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_by_public_names)


#: The hooks of a parameter that autograd calls after it has accumulated a gradient, in a dictionary, or None.
post_accumulate_hooks = operator.attrgetter("_post_accumulate_grad_hooks")
#: Those that it calls when a gradient comes, by ``Tensor.register_hook``.
tensor_hooks = operator.attrgetter("_backward_hooks")
#: Address of what a tensor object stands for; ``torch.utils.swap_tensors`` exchanges it, and the hooks with it.
identity_of = operator.attrgetter("_cdata")


#: The module of compiled autograd, whose ``in_compiled_autograd_region`` says whether it runs, or None.
compiled_autograd = functools.partial(sys.modules.get, "torch._dynamo.compiled_autograd")


def refuse_compiled_autograd() -> None:
    """Raise where compiled autograd runs, because it calls both hooks after it has added the gradient."""
    compiled = compiled_autograd()
    if compiled is not None and compiled.in_compiled_autograd_region:
        raise RuntimeError(
            "compiled autograd adds gradients before accumkern sees them; call backward() without it "
            "(torch._dynamo.config.compiled_autograd = False), which torch.compile of the model does not need"
        )


def set_hooks(param: Tensor, tensor_hooks: dict[int, Any], post_accumulate_hooks: dict[int, Any]) -> None:
    """Let autograd call the hooks of two dictionaries: it may have lost those that it had."""
    param._backward_hooks = tensor_hooks
    param._post_accumulate_grad_hooks = post_accumulate_hooks


# ---- optimizers and tensors --------------------------------------------------------------------------------------


#: Attributes of an optimizer: the hooks that are called before its ``step``, and after it.
HOOKS_OF_STEP = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def has_step_hooks(optimizer: object) -> bool:
    """Return whether the ``step`` of an optimizer, or of one that it stands for, calls hooks."""
    return hasattr(optimizer, HOOKS_OF_STEP[0])


def call_first_after_step(optimizer: Any, handle: Any) -> None:
    """Let a hook that was registered after the step be called before the others there."""
    getattr(optimizer, HOOKS_OF_STEP[1]).move_to_end(handle.id, last=False)


class LastHook:
    """A hook before a method of an optimizer that is called after all others there, also after later ones.

    Args:
        optimizer: whose method.
        method: ``"step"`` or ``"load_state_dict"``.
        hook: as ``register_<method>_pre_hook`` takes it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, method: str, hook: Callable[..., Any]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._register = name = f"register_{method}_pre_hook"
        hooks = getattr(optimizer, f"_optimizer_{method}_pre_hooks")

        def call(*args: Any) -> Any:
            if next(reversed(hooks)) != handle.id:
                hooks.move_to_end(handle.id)
                raise RuntimeError(
                    f"a hook before {method}() was registered after attach(), and not by the optimizer's own method: "
                    f"it would come too late. It is put before accumkern's now; call {method}() again"
                )
            return hook(*args)

        bound = weakref.WeakMethod(getattr(optimizer, name))
        self._handle = handle = bound()(call)  # type: ignore[misc]

        def register(hook: Callable[..., Any], **options: Any) -> Any:
            other = bound()(hook, **options)  # type: ignore[misc]
            hooks.move_to_end(handle.id)
            return other

        setattr(optimizer, name, register)

    def remove(self) -> None:
        """Remove the hook."""
        self._handle.remove()
        optimizer = self._optimizer()
        if optimizer is not None:
            vars(optimizer).pop(self._register, None)


def is_flattened(param: Tensor) -> bool:
    """Return whether a parameter is of the older FullyShardedDataParallel."""
    return getattr(param, "_fsdp_flattened", False)


def spec_of(dtensor: Any) -> Any:
    """Return the ``placements`` and the ``device_mesh`` of a DTensor, as one object that others may share."""
    return dtensor._spec


def set_local_tensor(dtensor: Any, local: Tensor) -> None:
    """Let ``local`` be the very tensor that a DTensor holds on this rank."""
    dtensor._local_tensor = local


def dtensor_of(local: Tensor, like: Any) -> Any:
    """Return a DTensor laid out over ranks as ``like`` is, of which this rank holds ``local``, on whatever device.

    ``DTensor.from_local`` would move it to where the ranks compute, while fully_shard may keep shards in host memory.
    """
    from torch.distributed.tensor import DTensor

    meta = like._spec.tensor_meta._replace(dtype=local.dtype)
    make: Any = DTensor
    return make(local.detach(), dataclasses.replace(like._spec, tensor_meta=meta), requires_grad=False)


def local_tensor(dtensor: Any) -> Tensor:
    """Return the very tensor that a DTensor holds on this rank, once a collective that writes it is done.

    ``DTensor.to_local`` takes ten times as long, and returns a view of a parameter's.
    """
    local = dtensor._local_tensor
    if type(local) is Tensor:
        return local
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def divides_by_all_ranks(model: Any) -> bool:
    """Return whether a DistributedDataParallel divides by all its ranks, also by those that ``join()`` waits with."""
    return getattr(model, "_divide_by_initial_world_size", True)


# ---- DistributedDataParallel -------------------------------------------------------------------------------------


def active_ddp() -> Any:
    """Return the DistributedDataParallel whose forward pass is under way, as around a step of Lightning; or None."""
    return torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()


def has_communication_hook(model: Any) -> bool:
    """Return whether a DistributedDataParallel has a communication hook."""
    return bool(model._comm_hooks)


def register_communication_hook(model: Any, hook: Callable[[Any, Any], Any]) -> None:
    """Register a communication hook that copies and pickles of the model, which do not have it, know nothing of.

    Raises:
        RuntimeError: the model has one already.
    """
    known = len(model._comm_hooks)  # a list for its reducer in Python
    try:
        model.register_comm_hook(None, hook)
    finally:
        del model._comm_hooks[known:]


def refusal_of_hook(model: Any) -> str | None:
    """Return why a DistributedDataParallel takes no communication hook; None if it does."""
    if model.mixed_precision is not None:
        return "mixed_precision, which has a communication hook of its own"
    if model._use_python_reducer:
        return "torch._dynamo.config.optimize_ddp = 'python_reducer', whose hooks get no buckets"
    return None


def refusal_of_ddp(model: Any) -> str | None:
    """Return why a DistributedDataParallel cannot run without the collectives of its own passes; None if it can."""
    if model.mixed_precision is not None:
        return "mixed_precision"
    if model._use_python_reducer:
        return "torch._dynamo.config.optimize_ddp = 'python_reducer'"
    if model._delay_all_reduce_params:
        return "delay_all_reduce_named_params"
    if model._join_config.enable:
        return "join()"
    if model.static_graph and not model._static_graph_delay_allreduce_enqueued:
        return "static_graph=True before its first backward pass, which has to reduce"
    return None


def sync_before_passes(model: Any) -> None:
    """Let a DistributedDataParallel do what it has to do with all ranks before a forward pass, which then will not."""
    if torch.is_grad_enabled():
        model.reducer._rebuild_buckets()
    if model.will_sync_module_buffers():
        model._sync_buffers()
    model.require_forward_param_sync = False


# ---- process groups ----------------------------------------------------------------------------------------------


def timeout_of(group: Any) -> timedelta:
    """Return how long a wait for other ranks of a process group may take: between CPUs, where it knows these."""
    cpu, devices = torch.device("cpu"), group._device_types
    return group._get_backend(cpu if cpu in devices else devices[0]).options._timeout


def sendable(tensor: Tensor, group: Any) -> Tensor:
    """Return a tensor where a process group can send it: NCCL takes none from host memory."""
    kinds = [device.type for device in group._device_types]
    return tensor if tensor.device.type in kinds else tensor.to(kinds[0])


# ---- planning ----------------------------------------------------------------------------------------------------

tree_flatten = _find("utils._pytree.tree_flatten", "planning")
tree_unflatten = _find("utils._pytree.tree_unflatten", "planning")
pop_mode_temporarily = _find("utils._python_dispatch._pop_mode_temporarily", "planning")
FakeTensorMode = _find("_subclasses.fake_tensor.FakeTensorMode", "planning")
#: A block in which tensors are real, inside of one of FakeTensorMode too.
without_fake_tensors = _find("_subclasses.fake_tensor.unset_fake_temporarily", "planning")
BatchNorm = _find("nn.modules.batchnorm._BatchNorm", "planning")
#: The format that the strides of a tensor suggest, as C++ decides it; ``is_contiguous()`` allows several for some.
suggest_memory_format = _find("_prims_common.suggest_memory_format", "planning")
#: What operations on fake tensors raise that need values of tensors, or have results of a shape that depends on them.
NEEDS_VALUES = tuple(
    _find(f"_subclasses.fake_tensor.{name}", "planning")
    for name in ("DataDependentOutputException", "DynamicOutputShapeException")
)
tree_map = _find("utils._pytree.tree_map", "planning")
_find("nn.init._no_grad_trunc_normal_", "planning")
_find("_C._autograd._ProfilerResult.experimental_event_tree", "planning")
_EventType = _find("_C._profiler._EventType", "planning")

_engine_run_backward = _find("autograd.graph._engine_run_backward", "planning")


def memory_events(results: Any) -> list[tuple[int, int, int]]:
    """Return what a profiler saw of memory in its thread: nanoseconds, address, and bytes, negative where it is freed.

    Args:
        results: ``kineto_results`` of a ``torch.autograd.profiler.profile(profile_memory=True)``.
    """
    found, events = [], list(results.experimental_event_tree())
    while events:
        event = events.pop()
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
        events += event.children
    return sorted(found, key=operator.itemgetter(0))


def run_backward(loss: Tensor) -> None:
    """Do what ``loss.backward()`` does, without asking the modes of ``__torch_function__``."""
    gradients = (torch.ones_like(loss),)
    _engine_run_backward((loss,), gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)


@contextmanager
def without_rejection() -> Iterator[None]:
    """Let ``nn.init.trunc_normal_`` leave fake tensors as they are: it looks at values, to draw some of them again."""
    draw = torch.nn.init._no_grad_trunc_normal_

    def draw_or_leave(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor if is_fake(tensor) else draw(tensor, *args, **kwargs)

    torch.nn.init._no_grad_trunc_normal_ = draw_or_leave
    try:
        yield
    finally:
        torch.nn.init._no_grad_trunc_normal_ = draw
