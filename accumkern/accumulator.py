"""The hook: gradients of an optimizer's parameters are accumulated in FP32, and the training loop does not change.

Each parameter gets two hooks. The first runs before autograd adds a new gradient: it sets the running ``.grad`` aside,
so that autograd puts the new gradient in its place instead of adding to it in the parameter's dtype. The second runs
after that: it folds the new gradient into the one set aside, in FP32, and puts that back. Between two backward passes
``.grad`` is what it always was, the sum so far in the parameter's dtype; the low bits lie in a residual beside it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.hooks import RemovableHandle

from accumkern import backends, ops
from accumkern.formats import BUFFERS, Start, decode

# Tensors of at most this many elements wait for the end of the backward pass and share one launch.
_SMALL_NUMEL = 65536


def attach(
    optimizer: torch.optim.Optimizer,
    buffer: str = "split24",
    *,
    average_over: float | None = None,
    backend: str | None = None,
) -> GradAccumulator:
    """Accumulate the gradients of an optimizer's parameters in FP32 from now on.

    The training loop stays as it is: call ``loss.backward()`` for each micro-batch, then ``optimizer.step()`` and
    ``zero_grad()``. Parameters that are frozen now, or added later by ``optimizer.add_param_group``, are included.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or an object with its ``param_groups``.
        buffer: what is kept beside ``.grad`` of a bfloat16 parameter: ``"split24"``, an int8 residual (3 gradient bytes
            per parameter in all, 16-bit significand); ``"split32"``, an int16 residual (4 bytes, exactly FP32);
            ``"fp32"``, an FP32 buffer (6 bytes). float16 parameters take ``"fp32"`` only. float32 parameters need
            nothing beside ``.grad`` and gain no accuracy.
        average_over: multiply each micro-gradient by ``1 / average_over`` inside the kernel, instead of dividing the
            loss; a positive number, usually of the micro-batches in a window. None adds them as they are.
        backend: ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"eager"``; None takes the first that can run on the device of
            each gradient.

    Returns:
        The accumulator. It need not be kept: the optimizer keeps it. It is also a context manager that detaches.

    Raises:
        TypeError: ``optimizer`` has no ``param_groups``, a parameter's dtype does not take ``buffer``, or a parameter
            is a tensor subclass whose gradients cannot be folded in place (DTensor).
        ValueError: ``buffer`` or ``backend`` is unknown, ``average_over`` is not a positive number, or a parameter is
            attached already.
        RuntimeError: ``backend`` cannot run here, or not on the device of a parameter.

    After an error nothing is attached.
    """
    return GradAccumulator(optimizer, buffer, average_over=average_over, backend=backend)


class GradAccumulator:
    """Hooks on an optimizer's parameters that accumulate their gradients in FP32; made by :func:`attach`.

    Attributes:
        buffer: the ``buffer`` argument of :func:`attach`.
        average_over: the ``average_over`` argument of :func:`attach`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        buffer: str = "split24",
        *,
        average_over: float | None = None,
        backend: str | None = None,
    ) -> None:
        if not isinstance(getattr(optimizer, "param_groups", None), list) or not hasattr(optimizer, "add_param_group"):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
        if not isinstance(buffer, str) or buffer not in BUFFERS:
            raise ValueError(f"buffer is {buffer!r}; it must be one of {', '.join(BUFFERS)}")
        if average_over is not None and (
            isinstance(average_over, bool)
            or not isinstance(average_over, (int, float))
            or not math.isfinite(average_over)
            or average_over <= 0
        ):
            raise ValueError(f"average_over is {average_over!r}; it must be a positive number, or None")
        if backend is not None and backend not in backends.BACKENDS:
            raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(backends.BACKENDS)}")

        self.buffer = buffer
        self.average_over = average_over
        self._scale = None if average_over is None or average_over == 1 else 1.0 / average_over
        self._backend = backend
        self._backend_of_device: dict[torch.device, str] = {}
        self._optimizer = optimizer
        self._parameters: dict[Tensor, _Parameter] = {}
        self._handles: list[RemovableHandle] = []
        # Small gradients that wait for the end of the backward pass, .grad being the running sum until then:
        # (parameter, running, new, start, version of running, stream that made new).
        self._waiting: list[tuple[_Parameter, Tensor, Tensor, Start, int, int]] = []
        self._backward = -1  # autograd's number of the backward pass that is under way
        self._keeps_graph = False  # whether it was called with create_graph=True
        self._may_wait = False  # whether small gradients may wait for its end
        self._attached = True

        self._hook(self._unhooked())
        self._watch_param_groups()

    # ---- public ------------------------------------------------------------------------------------------------

    def gradient(self, param: Tensor) -> Tensor | None:
        """Return the accumulated gradient of ``param`` as a new FP32 tensor of its shape; None where ``.grad`` is None.

        Raises:
            ValueError: ``param`` is not a parameter of the attached optimizer.
        """
        self._fold_waiting()
        parameter = self._parameters.get(param) if isinstance(param, Tensor) else None
        if parameter is None:
            raise ValueError("param is not a parameter of the attached optimizer")
        grad = param.grad
        if grad is None:
            return None
        residual = parameter.valid_residual(grad)
        if residual is None:
            return grad.detach().to(torch.float32, copy=True)
        residual = residual.as_strided(grad.shape, _memory_strides(grad))
        return decode(BUFFERS[self.buffer][grad.dtype], grad.detach(), residual)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint in the middle of a window needs: sums and residuals, bit for bit.

        Save it beside the state of model and optimizer, which hold no gradients. Like an optimizer's, the tensors are
        the live ones: save or copy them before training goes on. The dictionary holds only strings, numbers, lists and
        tensors, so ``torch.load(weights_only=True)`` takes it.
        """
        self._fold_waiting()
        sums: list[Tensor | None] = []
        residuals: list[Tensor | None] = []
        for param in _parameters_of(self._optimizer):
            parameter = self._parameters.get(param)
            grad = None if parameter is None else param.grad
            sums.append(None if grad is None else grad.detach())
            residuals.append(None if grad is None or parameter is None else parameter.valid_residual(grad))
        return {"buffer": self.buffer, "sums": sums, "residuals": residuals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned: ``.grad`` of every parameter, and the residuals, as copies.

        Raises:
            TypeError: ``state_dict`` is not such a dictionary, or holds a tensor of another dtype.
            ValueError: it was saved with another ``buffer`` or for other parameters.

        After an error nothing has changed.
        """
        parameters = _parameters_of(self._optimizer)
        entries = _checked_state(state_dict, self.buffer, parameters)
        self._waiting.clear()
        for param, (total, residual) in zip(parameters, entries, strict=True):
            parameter = self._parameters.get(param)
            if parameter is None:
                continue
            if total is None:
                param.grad = None
                parameter.forget()
                continue
            grad = total.detach().clone().to(param.device)
            param.grad = grad
            parameter.forget()
            if residual is not None:
                parameter.residual_of_dtype(residual.dtype).copy_(residual)
                parameter.remember(grad)

    def detach(self) -> None:
        """Remove every hook: stock behaviour from now on. ``.grad`` stays as it is; calling it again does nothing."""
        self._fold_waiting()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._parameters.clear()
        self._attached = False
        if vars(self._optimizer).get("add_param_group") is self._add_param_group:
            del self._optimizer.add_param_group

    def __enter__(self) -> GradAccumulator:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = f"{len(self._parameters)} parameters" if self._attached else "detached"
        return f"GradAccumulator(buffer={self.buffer!r}, average_over={self.average_over!r}, {state})"

    # ---- hooks -------------------------------------------------------------------------------------------------

    def _unhooked(self) -> list[Tensor]:
        """Return the parameters that have no hooks yet, after checking that each can have them."""
        found = []
        for i, param in enumerate(_parameters_of(self._optimizer)):
            if param in self._parameters or not (param.is_floating_point() or param.is_complex()):
                continue
            name = f"parameter {i} of optimizer (shape {tuple(param.shape)})"
            if _is_attached(param):
                raise ValueError(f"{name} is attached already; detach() the other accumulator first")
            if is_traceable_wrapper_subclass(param):
                raise TypeError(
                    f"{name} is a {type(param).__name__}; its gradient is not one tensor that can be folded in place"
                )
            if param.dtype is torch.float16 and param.dtype not in BUFFERS[self.buffer]:
                raise TypeError(
                    f"{name} is torch.float16, which buffer={self.buffer!r} cannot hold (it is made of bfloat16); "
                    "use buffer='fp32'"
                )
            if self._backend is not None:
                self._backend_on(param.device)
            found.append(param)
        return found

    def _hook(self, params: list[Tensor]) -> None:
        for param in params:
            # A frozen parameter has no node to hook. The node made here stays its node when it is unfrozen.
            frozen = not param.requires_grad
            if frozen:
                param.requires_grad_(True)
            node = get_gradient_edge(param).node
            parameter = self._parameters[param] = _Parameter(param, self, node)
            set_aside, fold = _hooks(weakref.ref(parameter))
            self._handles += [node.register_prehook(set_aside), param.register_post_accumulate_grad_hook(fold)]
            if frozen:
                param.requires_grad_(False)

    def _hook_again(self, parameter: _Parameter, param: Tensor, grad: Tensor) -> None:
        """Hook the new node of a parameter that was moved or cast after attach: its first hook was not called.

        Raises:
            RuntimeError: torch added this gradient to others, which have been multiplied by ``1 / average_over``.
        """
        node = get_gradient_edge(param).node
        set_aside, _ = _hooks(weakref.ref(parameter))
        self._handles.append(node.register_prehook(set_aside))
        parameter.settle(node)
        if self._scale is not None and grad._version > 0:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} was moved or cast in the middle of a window, and its "
                "gradients with average_over can no longer be told apart; call zero_grad() and begin the window again"
            )

    def _watch_param_groups(self) -> None:
        """Have ``optimizer.add_param_group`` hook what it adds.

        The function is an attribute of the instance, which copying and pickling an optimizer leave out. It also keeps
        the accumulator alive as long as the optimizer.
        """
        optimizer = self._optimizer
        original = optimizer.add_param_group

        def add_param_group(param_group: dict[str, Any]) -> None:
            original(param_group)
            if self._attached:
                try:
                    added = self._unhooked()
                except (TypeError, ValueError, RuntimeError):
                    optimizer.param_groups.pop()
                    raise
                self._hook(added)

        self._add_param_group = add_param_group
        optimizer.add_param_group = add_param_group  # type: ignore[method-assign]

    # ---- the fold ----------------------------------------------------------------------------------------------

    def _accumulate(self, parameter: _Parameter, param: Tensor) -> None:
        """Fold the gradient that autograd has just left in ``param.grad`` into the running one."""
        running: Any = parameter.set_aside
        parameter.set_aside = _NOT_CALLED
        new: Any = param.grad
        if new is None:  # somebody's hook took it
            param.grad = None if running is _NOT_CALLED else running
            return
        backward = torch._C._current_graph_task_id()
        if running is _NOT_CALLED:
            self._begin_backward(backward)
            self._hook_again(parameter, param, new)
            running = None
        elif backward != self._backward or parameter.waits:
            param.grad = running  # as it was before this gradient came
            self._begin_backward(backward)
            running = param.grad
            param.grad = new

        if running is None:  # the first micro-batch of a window
            parameter.forget()
            if self._scale is None:
                return
            running, start, plain = new, Start.FROM_ZERO, True
        elif running is parameter.written() and running._version == parameter.version:  # ours, and untouched
            start, plain = Start.CONTINUE, parameter.is_plain
        else:
            start, plain = Start.FROM_SUM, _is_plain(running, parameter.dtype)
        if (
            not plain
            or new.dtype is not parameter.dtype
            or not new.is_contiguous()
            or new.is_neg()
            or self._keeps_graph
        ):
            self._accumulate_any(parameter, param, running, new, start)
            return

        param.grad = running
        if self._may_wait and parameter.is_small and len(param._post_accumulate_grad_hooks) == 1:
            stream = torch._C._cuda_getCurrentRawStream(new.device.index) if new.is_cuda else 0
            parameter.waits = True
            self._waiting.append((parameter, running, new, start, running._version, stream))
        else:
            self._fold([parameter], [new], [running], start)

    def _accumulate_any(self, parameter: _Parameter, param: Tensor, running: Tensor, new: Tensor, start: Start) -> None:
        """Fold at once a gradient of any layout, or leave it to torch's own addition."""
        if (
            self._keeps_graph
            or new.dtype not in _FOLDED_DTYPES
            or running.dtype is not new.dtype
            or new.layout is not torch.strided
            or running.layout is not torch.strided
        ):
            self._add_as_torch_does(parameter, param, running, new)
            return
        if start is Start.FROM_ZERO:
            if not ops.is_dense(new) or new.is_neg():
                new = new.resolve_neg().contiguous()
            param.grad = new
            self._fold([parameter], [new], [new], start)
            return
        strides = _memory_strides(running)
        if new.stride() != strides or new.is_neg():
            new = torch.empty_strided(new.shape, strides, dtype=new.dtype, device=new.device).copy_(new)
        param.grad = running
        if running.stride() == strides and not running.is_neg():
            self._fold([parameter], [new], [running], start)
        else:  # somebody's .grad with holes in its memory
            dense = running.resolve_neg().contiguous()
            self._fold([parameter], [new], [dense], start)
            running.copy_(dense)
            parameter.remember(running)

    def _add_as_torch_does(self, parameter: _Parameter, param: Tensor, running: Tensor, new: Tensor) -> None:
        """Do what AccumulateGrad does: for sparse, complex and float64 gradients, and for create_graph."""
        parameter.forget()
        first = running is new
        if self._scale is not None:
            new = new * self._scale
        if first:
            param.grad = new
        elif self._keeps_graph:
            param.grad = running + new
        elif running.is_sparse and not new.is_sparse:
            param.grad = new + running
        else:
            param.grad = running.add_(new)

    def _begin_backward(self, backward: int) -> None:
        """Fold what waits. Then, if another backward pass has begun (a nested one too, or its end), prepare for it."""
        same = backward == self._backward
        self._fold_waiting(of_this_backward=same)
        if same:
            return
        self._backward = backward
        self._keeps_graph = torch.is_grad_enabled()  # create_graph=True
        # DistributedDataParallel sends .grad on right after the hook.
        self._may_wait = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if self._may_wait:
            torch.autograd.Variable._execution_engine.queue_callback(self._fold_waiting)

    def _fold_waiting(self, of_this_backward: bool = True) -> None:
        """Fold the small gradients that wait, in one launch for each device and start.

        Args:
            of_this_backward: False where the gradients may come from a backward pass that failed. Then those are
                dropped whose ``.grad`` somebody changed since, as ``zero_grad()`` does.
        """
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        groups: dict[
            tuple[torch.device, torch.dtype | None, Start], tuple[list[_Parameter], list[Tensor], list[Tensor]]
        ] = {}
        for parameter, running, new, start, version, stream in waiting:
            parameter.waits = False
            grad = parameter.param.grad
            if grad is not running or running._version != version:
                if grad is None or not of_this_backward:
                    continue
                start = Start.FROM_SUM
                if not _is_plain(grad, parameter.dtype):
                    self._accumulate_any(parameter, parameter.param, grad, new, start)
                    continue
            if stream and stream != torch._C._cuda_getCurrentRawStream(parameter.device.index):
                new.record_stream(torch.cuda.current_stream(parameter.device))
            key = (parameter.device, parameter.dtype, start)
            if key not in groups:
                groups[key] = ([], [], [])
            parameters, grads, sums = groups[key]
            parameters.append(parameter)
            grads.append(new)
            sums.append(grad)
        for (_, _, start), (parameters, grads, sums) in groups.items():
            self._fold(parameters, grads, sums, start)

    def _fold(self, parameters: list[_Parameter], grads: list[Tensor], sums: list[Tensor], start: Start) -> None:
        """Fold gradients of one device and dtype into their sums, which are laid out alike."""
        format_ = BUFFERS[self.buffer].get(grads[0].dtype)
        if format_ is None:
            raise TypeError(f".grad is {grads[0].dtype}, which buffer={self.buffer!r} cannot hold; use buffer='fp32'")
        dtype = format_.residual_dtype
        residuals = None
        if dtype is not None:
            if start is Start.CONTINUE:
                residuals = [parameter.residual for parameter in parameters]
            else:
                residuals = [parameter.residual_of_dtype(dtype) for parameter in parameters]
        scale = 1.0 if self._scale is None else self._scale
        backend = self._backend_on(parameters[0].device)
        backends.fold_function(backend)(format_, start, grads, sums, residuals, scale, None)
        if start is not Start.CONTINUE:
            for parameter, total in zip(parameters, sums, strict=True):
                parameter.remember(total)

    def _backend_on(self, device: torch.device) -> str:
        chosen = self._backend_of_device.get(device)
        if chosen is None:
            chosen = self._backend_of_device[device] = backends.choose(self._backend, device)
        return chosen


class _Parameter:
    """What belongs to one parameter: the running gradient while autograd works, and the residual.

    The residual belongs to a gradient if that is the very tensor that was written last, unchanged since. The kernels
    do not count as a change: they leave a tensor's version alone, which gradients that are views of one flat buffer
    have in common.
    """

    __slots__ = (
        "__weakref__",
        "accumulator",
        "device",
        "dtype",
        "is_plain",
        "is_small",
        "node",
        "param",
        "residual",
        "set_aside",
        "version",
        "waits",
        "written",
    )

    def __init__(self, param: Tensor, accumulator: GradAccumulator, node: Node) -> None:
        self.param = param
        self.accumulator = accumulator
        self.is_small = param.numel() <= _SMALL_NUMEL
        self.set_aside: Any = _NOT_CALLED  # a tensor, or None where there was no gradient
        self.waits = False
        self.settle(node)

    def settle(self, node: Node) -> None:
        """Take over the parameter's device and dtype, and the node that accumulates its gradient."""
        self.node = node  # a hook on a node lives as long as somebody refers to the node
        self.device = self.param.device
        self.dtype = self.param.dtype if self.param.dtype in _FOLDED_DTYPES else None
        self.residual: Any = None  # a tensor, once there is one: flat, in the memory order of .grad
        self.forget()

    def forget(self) -> None:
        """Note that the residual belongs to no gradient."""
        self.written: Callable[[], Any] = _nothing
        self.version = -1
        self.is_plain = False

    def remember(self, grad: Tensor) -> None:
        """Note that the residual belongs to ``grad`` as it is now."""
        self.written = weakref.ref(grad)
        self.version = grad._version
        self.is_plain = grad.is_contiguous() and grad.dtype is self.dtype

    def valid_residual(self, grad: Tensor) -> Tensor | None:
        """Return the residual that belongs to ``grad``, if there is one."""
        return self.residual if self.written() is grad and grad._version == self.version else None

    def residual_of_dtype(self, dtype: torch.dtype) -> Tensor:
        """Return the residual, made when it is needed first and kept: its address is stable."""
        if self.residual is None or self.residual.dtype is not dtype:
            self.residual = torch.empty(self.param.numel(), dtype=dtype, device=self.device)
        return self.residual


# ---- helpers -----------------------------------------------------------------------------------------------------

_FOLDED_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
_NOT_CALLED: Any = object()


def _nothing() -> None:
    return None


def _is_plain(grad: Tensor, dtype: torch.dtype | None) -> bool:
    return grad.dtype is dtype and grad.layout is torch.strided and grad.is_contiguous() and not grad.is_neg()


def _hooks(reference: weakref.ref[_Parameter]) -> tuple[Any, Any]:
    """Return the two hooks of a parameter.

    They hold it weakly: a cycle through autograd's own objects would never be collected.
    """

    def set_aside(_grad_outputs: tuple[Tensor, ...]) -> None:
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

    fold.accumkern_parameter = reference  # type: ignore[attr-defined]
    return set_aside, fold


def _is_attached(param: Tensor) -> bool:
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    references = (getattr(hook, "accumkern_parameter", None) for hook in hooks.values())
    return any(reference is not None and reference() is not None for reference in references)


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _memory_strides(grad: Tensor) -> tuple[int, ...]:
    """Return the strides of ``grad`` if it is dense, else those of its contiguous copy; its residual lies so."""
    if ops.is_dense(grad):
        return grad.stride()
    return torch.empty(grad.shape, device="meta").stride()


def _checked_state(
    state_dict: object, buffer: str, parameters: list[Tensor]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return (sum, residual) for each parameter, after checking that a state fits."""
    if not isinstance(state_dict, dict) or set(state_dict) != {"buffer", "sums", "residuals"}:
        found = sorted(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
        raise TypeError(f"state_dict is {found}; it must be what GradAccumulator.state_dict() returned")
    if state_dict["buffer"] != buffer:
        raise ValueError(f"state_dict was saved with buffer={state_dict['buffer']!r}; this accumulator has {buffer!r}")
    sums, residuals = state_dict["sums"], state_dict["residuals"]
    if len(sums) != len(parameters) or len(residuals) != len(parameters):
        raise ValueError(f"state_dict is of {len(sums)} parameters; the optimizer has {len(parameters)}")
    for i, (param, total, residual) in enumerate(zip(parameters, sums, residuals, strict=True)):
        if total is None:
            if residual is not None:
                raise ValueError(f"state_dict holds a residual but no sum for parameter {i}")
            continue
        if total.shape != param.shape:
            raise ValueError(
                f"sums[{i}] of state_dict has shape {tuple(total.shape)}; parameter {i} has {tuple(param.shape)}"
            )
        if total.dtype != param.dtype and total.dtype != getattr(param, "grad_dtype", param.dtype):
            raise TypeError(f"sums[{i}] of state_dict is {total.dtype}; parameter {i} is {param.dtype}")
        if residual is not None:
            format_ = BUFFERS[buffer].get(total.dtype)
            if format_ is None or residual.dtype is not format_.residual_dtype:
                raise TypeError(f"residuals[{i}] of state_dict is {residual.dtype}, which buffer={buffer!r} never has")
            if residual.shape != (total.numel(),):
                raise ValueError(
                    f"residuals[{i}] of state_dict has shape {tuple(residual.shape)}; it must be ({total.numel()},)"
                )
    return list(zip(sums, residuals, strict=True))
