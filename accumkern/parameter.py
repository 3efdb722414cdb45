"""What belongs to one parameter: its two hooks, the gradient that they set aside, and the residual."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from accumkern import distributed, ops
from accumkern.finish import Gradient
from accumkern.formats import BUFFERS, PARTIALS, partial_rows
from accumkern.noise_scale import Share

if TYPE_CHECKING:
    from accumkern.accumulator import GradAccumulator

# Gradients of at most this many elements wait for the end of the backward pass and share one launch.
SMALL_NUMEL = 65536
FOLDED_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
NOT_CALLED: Any = object()


class Parameter:
    """What belongs to one parameter: the gradient set aside while autograd works, and the residual.

    The residual belongs to a gradient if that is the very tensor that was written last, unchanged since. The kernels
    do not count as a change: they leave a tensor's version alone, which gradients that are views of one flat buffer
    have in common.
    """

    __slots__ = (
        "__weakref__",
        "accumulator",
        "after",
        "before",
        "device",
        "dtype",
        "handle",
        "is_cuda",
        "is_dtensor",
        "is_folded",
        "is_fully_sharded",
        "is_measured",
        "is_small",
        "kind",
        "last",
        "node",
        "node_handle",
        "numel",
        "param",
        "partials",
        "residual",
        "set_aside",
        "share",
        "version",
        "written",
    )

    def __init__(self, param: Tensor, accumulator: GradAccumulator, group: int) -> None:
        self.param = param
        self.share = Share(param, group)
        self.accumulator = accumulator
        self.is_dtensor = distributed.is_dtensor(param)
        self.is_fully_sharded = False  # whether fully_shard accumulates the gradient, and autograd does not
        self.is_folded = False  # whether what fully_shard has added is folded, and its hook still to come
        local: Any = param
        self.numel = distributed.shard(local).numel() if self.is_dtensor else param.numel()
        self.is_small = self.numel <= SMALL_NUMEL
        self.set_aside: Any = NOT_CALLED  # a tensor, or None where there was no gradient
        self.last: Callable[[], Any] = _nothing  # .grad as the last window or fold left it
        self.before, self.after = _hooks(weakref.ref(self), self.is_dtensor)
        self.node: Any = None  # of autograd, which accumulates the gradient
        self.node_handle: RemovableHandle | None = None
        self.handle: RemovableHandle | None = None
        self.hook()

    def hook(self) -> None:
        """Hook the parameter, and the node that accumulates its gradient."""
        param = self.param
        is_frozen = not param.requires_grad
        with torch.inference_mode(False):
            if is_frozen:  # it has no node to hook; the one that is made here stays its node when it is unfrozen
                param.requires_grad_(True)
            self.hook_node()
            if self.handle is not None:
                self.handle.remove()
            hooks = _drop_dead_hooks(param)
            self.handle = param.register_post_accumulate_grad_hook(self.after)
            # Autograd may have lost the dict, with the hooks of others in it: it takes what is set.
            param._post_accumulate_grad_hooks = param._post_accumulate_grad_hooks
            # Ours goes first, so that the others see the sum. torch reads the dict in the order of insertion.
            for key, hook in hooks:
                del param._post_accumulate_grad_hooks[key]
                param._post_accumulate_grad_hooks[key] = hook
            if is_frozen:
                param.requires_grad_(False)

    def is_hooked(self) -> bool:
        """Return whether the parameter has its hooks still.

        ``torch.utils.swap_tensors``, by which ``module.to()`` moves a DTensor, gives it the content of another tensor,
        which then has the node and the hooks of this one.
        """
        return self.node.variable is self.param

    def hook_node(self) -> None:
        """Hook the node that accumulates the gradient, if it is another one than before, and take over its device."""
        node = get_gradient_edge(self.param).node
        if node is self.node:
            return
        if self.node_handle is not None:
            self.node_handle.remove()
        self.node = node  # a hook on a node lives as long as somebody refers to the node
        self.node_handle = node.register_prehook(self.before)
        self.device = self.param.device
        self.is_cuda = self.device.type == "cuda"
        self.kind = self.accumulator._kind_of(self.device, self.param.dtype)
        self.dtype = self.param.dtype if self.param.dtype in FOLDED_DTYPES else None
        self.residual: Any = None  # a tensor, once there is one: flat, in the memory order of .grad
        self.partials: Tensor | None = None
        self.is_measured = False  # whether the partial sums are of what was written last
        self.forget()

    def unhook(self) -> None:
        """Remove both hooks."""
        if self.node_handle is not None:
            self.node_handle.remove()
        if self.handle is not None:
            self.handle.remove()

    def forget(self) -> None:
        """Note that the residual belongs to no gradient."""
        self.written: Callable[[], Any] = _nothing
        self.version = -1

    def take(self) -> Any:
        """Return the gradient and leave None."""
        grad, self.param.grad = self.param.grad, None
        return grad

    def put(self, total: Tensor, like: Any) -> None:
        """Make ``total`` the gradient, or this rank's shard of one that is laid out as ``like``."""
        self.param.grad = distributed.with_shard(total, like) if self.is_dtensor else total

    def remember(self) -> None:
        """Note that the residual belongs to ``.grad`` as it is now."""
        grad: Any = self.param.grad
        self.written = self.last = weakref.ref(grad)
        self.version = self.version_of(grad)

    def version_of(self, grad: Any) -> int:
        """Return a number that grows with every change of ``grad``. A DTensor and its shard count their own."""
        return grad._version + distributed.shard(grad)._version if self.is_dtensor else grad._version

    def owns(self, grad: Tensor | None) -> bool:
        """Return whether ``grad`` is what was written last, unchanged since: the residual belongs to it."""
        return grad is not None and self.written() is grad and self.version_of(grad) == self.version

    def valid_residual(self, grad: Tensor, buffer: str) -> Tensor | None:
        """Return the residual that belongs to ``grad``, if there is one."""
        format_ = BUFFERS[buffer].get(grad.dtype)
        if format_ is None or self.residual is None or not self.owns(grad):
            return None
        return self.residual if self.residual.dtype is format_.residual_dtype else None  # .grad.data may be anything

    def gradient(self, buffer: str) -> Gradient:
        """Return ``.grad`` and what belongs to it."""
        grad: Any = self.param.grad
        format_ = BUFFERS[buffer].get(grad.dtype)
        if self.is_dtensor:
            local = distributed.shard(grad)
            foldable = format_ is not None and not local.is_neg() and ops.is_dense(local)
            residual = self.valid_residual(grad, buffer) if foldable else None
            return Gradient(local, format_ if foldable else None, residual, None, grad)
        if format_ is None or grad.layout is not torch.strided or grad.is_neg() or not ops.is_dense(grad):
            return Gradient(grad, None, None, None)
        # A collective that has written to .grad since leaves no trace in its version.
        is_measured = self.is_measured and self.owns(grad) and not distributed.is_in_group()
        return Gradient(grad, format_, self.valid_residual(grad, buffer), self.partials if is_measured else None)

    def partials_of(self, grad: Tensor) -> Tensor:
        """Return the rows for partial sums, made when they are needed first and kept."""
        if self.partials is None:
            shape = partial_rows(grad.numel()), PARTIALS
            self.partials = torch.empty(shape, dtype=torch.float32, device=self.device)
        self.is_measured = True
        return self.partials

    def residual_of_dtype(self, dtype: torch.dtype) -> Tensor:
        """Return the residual, made when it is needed first and kept: its address is stable."""
        if self.residual is None or self.residual.dtype is not dtype:
            self.residual = torch.empty(self.numel, dtype=dtype, device=self.device)
        return self.residual


def is_attached(param: Tensor) -> bool:
    """Return whether an accumulator that is still there has hooks on a parameter."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    references = (getattr(hook, "accumkern_parameter", None) for hook in hooks.values())
    return any(reference is not None and reference() is not None for reference in references)


def refuse_compiled_autograd() -> None:
    """Raise in a backward pass of compiled autograd, which calls both hooks after it has added the gradient."""
    compiled_autograd = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled_autograd is not None and compiled_autograd.in_compiled_autograd_region:
        raise RuntimeError(
            "compiled autograd adds gradients before accumkern sees them; call backward() without it "
            "(torch._dynamo.config.compiled_autograd = False), which torch.compile of the model does not need"
        )


# ---- helpers -----------------------------------------------------------------------------------------------------


def _nothing() -> None:
    return None


def _hooks(reference: weakref.ref[Parameter], is_dtensor: bool) -> tuple[Any, Any]:
    """Return the two hooks of a parameter.

    They hold it weakly: a cycle through autograd's own objects would never be collected.
    """

    def set_aside(_grad_outputs: tuple[Tensor, ...]) -> None:
        refuse_compiled_autograd()
        parameter = reference()
        if parameter is not None:
            grad = parameter.param.grad
            parameter.set_aside = grad
            if grad is not None:
                parameter.param.grad = None

    def fold(param: Tensor) -> None:
        parameter = reference()
        if parameter is not None:
            parameter.accumulator._accumulate(parameter, param)

    def fold_shard(param: Tensor) -> None:
        parameter = reference()
        if parameter is not None:
            parameter.accumulator._accumulate_shard(parameter, param)

    after: Any = fold_shard if is_dtensor else fold
    after.accumkern_parameter = reference
    return set_aside, after


def _drop_dead_hooks(param: Tensor) -> list[tuple[int, Any]]:
    """Remove what an accumulator that is gone has left on a parameter; return the other hooks."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    for key, hook in list(hooks.items()):
        reference = getattr(hook, "accumkern_parameter", None)
        if reference is not None and reference() is None:
            del hooks[key]
    return list(hooks.items())
