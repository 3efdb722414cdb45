"""The hook: gradients of an optimizer's parameters are accumulated in FP32, and the training loop does not change.

Each parameter gets two hooks. The first runs before autograd adds a new gradient: it sets the running ``.grad`` aside,
so that autograd puts the new gradient in its place instead of adding to it in the parameter's dtype. The second runs
after that: it folds the new gradient into the one set aside, in FP32, and puts that back. Between two backward passes
``.grad`` is what it always was, the sum so far in the parameter's dtype; the low bits lie in a residual beside it.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from accumkern import backends, distributed, ops
from accumkern.finish import Finished, check_divide_by, check_max_norm, total_norm, write
from accumkern.formats import BUFFERS, Start, decode
from accumkern.lost_bits import LostBitsMeter, LostBitsReport
from accumkern.noise_scale import (
    NoiseScale,
    Smoother,
    WindowSquares,
    check_group,
    check_smoothing,
    counts_of,
    estimate,
)
from accumkern.parameter import FOLDED_DTYPES, NOT_CALLED, Parameter, is_attached, refuse_compiled_autograd
from accumkern.state import checked_state

# A small gradient that waits for the end of the backward pass: its parameter; it; the running sum, which is .grad until
# then, and its version; where the fold starts; the stream that made the gradient.
_Waiting: TypeAlias = tuple[Parameter, Any, Any, int, Start, int]

# Small gradients wait for the end of the backward pass, unless so many elements wait already that their memory counts.
_MAX_WAITING_NUMEL = 2**22


def attach(
    optimizer: torch.optim.Optimizer,
    buffer: str = "split24",
    *,
    average_over: float | None = None,
    stats: bool = False,
    report: bool = False,
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
            loss; a positive number, usually of the micro-batches in a window. None adds them as they are. It is
            where :attr:`GradAccumulator.scale` begins.
        stats: take the squared norm of every micro-gradient inside the kernel, for
            :meth:`GradAccumulator.noise_scale`.
        report: accumulate a sample of each 16-bit gradient the way stock PyTorch does, for
            :meth:`GradAccumulator.report`. Costs a few small operations per parameter and micro-batch.
        backend: ``"triton"``, ``"cuda"``, ``"cpu"`` or ``"eager"``; None takes the first that can run on the device of
            each gradient.

    Returns:
        The accumulator. It need not be kept: the optimizer keeps it. It is also a context manager that detaches.

    Raises:
        TypeError: ``optimizer`` has no ``param_groups``, a parameter's dtype does not take ``buffer``, or a parameter
            is of a kind whose gradients cannot be folded: wrapped by the older FullyShardedDataParallel, a tensor
            subclass other than DTensor, or a DTensor together with ``stats`` or ``report``.
        ValueError: ``buffer`` or ``backend`` is unknown, ``average_over`` is not a positive number, or a parameter is
            attached already.
        RuntimeError: ``backend`` cannot run here, or not on the device of a parameter.

    After an error nothing is attached.
    """
    return GradAccumulator(optimizer, buffer, average_over=average_over, stats=stats, report=report, backend=backend)


class GradAccumulator:
    """Hooks on an optimizer's parameters that accumulate their gradients in FP32; made by :func:`attach`.

    Attributes:
        buffer: the ``buffer`` argument of :func:`attach`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        buffer: str = "split24",
        *,
        average_over: float | None = None,
        stats: bool = False,
        report: bool = False,
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
        self._scale: float | Tensor = 1.0 if average_over is None else 1.0 / average_over
        self._scales = self._scale != 1.0
        self._backend = backend
        self._backend_of_device: dict[torch.device, str] = {}
        self._kinds: dict[tuple[torch.device, torch.dtype], int] = {}
        self._optimizer = optimizer
        self._parameters: dict[Tensor, Parameter] = {}
        # Autograd calls the hooks of each device from a thread of its own. What they share is a deque, whose append and
        # popleft cannot be torn apart, and flags that are set under a lock when a backward pass begins.
        self._waiting: deque[_Waiting] = deque()
        self._waiting_numel = 0
        self._lock = threading.RLock()
        self._backward = _NO_BACKWARD  # autograd's number of the backward pass that is under way
        self._in_group = False  # whether there is a process group
        self._may_wait = False  # whether small gradients may wait for the end of the backward pass
        self._versions: dict[int, int] = {}  # of memory that gradients are views of, when the backward pass came there
        self._finished = False  # finish() was called since the last backward pass
        self._measures = stats  # whether folds leave partial sums; finish() turns it on too
        self._squares = WindowSquares() if stats else None
        self._smoothers: dict[int | None, Smoother] = {}
        self._lost_bits = LostBitsMeter() if report else None
        self._attached = True

        self._hook(self._unhooked())
        self._watch_param_groups()
        steps = _optimizer_with_hooks(optimizer)
        self._step_hook = None if steps is None else steps.register_step_pre_hook(self._check_hooks)

    # ---- public ------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float | Tensor:
        """The factor of each micro-gradient, multiplied in the kernel: a number, or a floating 0-dim tensor.

        Set it before the backward pass of a micro-batch: to weigh that one, to ``1 / tokens`` when the window's tokens
        are known beforehand, or to ``1 / n`` for a short last window of n. A tensor is read on the device when the
        gradients are folded. It begins as ``1 / average_over``, or 1.
        """
        return self._scale

    @scale.setter
    def scale(self, scale: float | Tensor) -> None:
        self._check_attached()
        ops.check_scale("scale", scale)
        if isinstance(scale, Tensor):
            devices = {parameter.device for parameter in self._parameters.values()}
            if scale.device not in devices:
                on = ", ".join(sorted(map(str, devices)))
                raise ValueError(f"scale is on {scale.device} and the parameters on {on}; move it there")
        self._settle()
        self._scale = scale
        self._scales = isinstance(scale, Tensor) or scale != 1

    def finish(
        self,
        divide_by: float | Tensor = 1.0,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Finished:
        """Divide, clip and round all gradients in one pass; optional, once per window before ``optimizer.step()``.

        For every element, with ``x`` the accumulated FP32 value::

            norm  = ||x / divide_by||                           # of all gradients together
            grad  = round((x / divide_by) * min(1, max_norm / (norm + 1e-6)))

        The 2-norm comes from sums that the folds leave behind (from the second window on; other gradients and other
        norms cost a pass). Nothing waits for the device, so it can be captured in a CUDA graph.

        Args:
            divide_by: a positive number, or a 0-dim tensor on the device of the gradients, such as the tokens of the
                window. A tensor on a GPU is not looked at: zero or NaN there comes out as ``found_nonfinite``.
            max_norm: clip the total norm to this; None does not clip.
            norm_type: 2 or any other positive number, or infinity, as in ``clip_grad_norm_``.
            error_if_nonfinite: raise where the norm is infinite or NaN. Waits for the device.

        Returns:
            ``Finished(norm, clip_coefficient, found_nonfinite)``, 0-dim tensors on the device.

        Raises:
            TypeError, ValueError: an argument is of the wrong kind or range, or on another device.
            RuntimeError: there are no gradients, ``finish`` was called already since the last backward pass, or the
                norm is not finite and ``error_if_nonfinite`` is set. ``.grad`` is untouched then.
        """
        self._check_attached()
        self._check_hooks()
        self._settle()
        params = [param for param in self._parameters if param.grad is not None]
        if not params:
            raise RuntimeError("there is nothing to finish: no parameter has a gradient; call it after backward()")
        if self._finished:
            raise RuntimeError("finish() was called already since the last backward pass; call it once per window")
        gradients = [self._parameters[param].gradient(self.buffer) for param in params]
        check_divide_by(divide_by, gradients)
        check_max_norm(max_norm, norm_type)

        norm = total_norm(gradients, float(norm_type), self._backend_on)
        divisor: float | Tensor = divide_by
        if isinstance(divide_by, Tensor):
            divisor = divide_by.detach().to(norm.device, torch.float32, non_blocking=True)
        norm = norm / divisor
        nonfinite = ~norm.isfinite()
        if error_if_nonfinite and bool(nonfinite):
            raise RuntimeError(
                f"the total norm of order {norm_type} of the gradients is {norm.item()}; they are left as they were"
            )
        coefficient = torch.ones_like(norm) if max_norm is None else torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        if max_norm is not None or isinstance(divisor, Tensor) or divisor != 1:
            write(gradients, divisor, 1.0 if max_norm is None else coefficient, self._backend_on)
        if self._squares is not None:
            self._squares.reduce()
        self._finished = True
        self._measures |= not distributed.is_in_group()
        return Finished(norm, coefficient, nonfinite)

    def reduce_in_fp32(self, model: torch.nn.parallel.DistributedDataParallel) -> None:
        """Let DistributedDataParallel take the mean of the accumulated sums in FP32, instead of rounding first.

        Registers a communication hook on ``model``: each bucket is reduced as FP32 numbers, sum and residual together,
        while the backward pass goes on. ``.grad`` is the mean, rounded once; the residual is what it lacks, so that
        :meth:`finish` and :meth:`gradient` see the mean to the precision of ``buffer``. Twice the bytes of bfloat16 are
        sent, and one bucket at a time has a copy of 4 bytes per element. float32 gradients are reduced as always.

        Args:
            model: the wrapped model, with no other communication hook. Its process group is used.

        Raises:
            TypeError: ``model`` is not a DistributedDataParallel.
            RuntimeError: ``model`` has a communication hook already.
        """
        self._check_attached()
        if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
            raise TypeError(f"model is a {type(model).__name__}; it must be a DistributedDataParallel")
        reduction = distributed.Fp32Reduction(self, model.process_group)
        # A lambda, because DDP compares annotations, and takes none that are strings.
        model.register_comm_hook(None, lambda state, bucket: reduction.start(bucket))

    def noise_scale(
        self,
        tokens: Sequence[float] | Tensor | None = None,
        *,
        group: int | None = None,
        smoothing: float = 0.9,
    ) -> NoiseScale:
        """Return the gradient noise scale, a guide to the useful batch size; needs ``attach(..., stats=True)``.

        Call it once per window, after its last backward pass and before ``zero_grad()``. The estimator is unbiased for
        micro-batches of unequal size; see :mod:`accumkern.noise_scale` for the formula and docs/noise-scale.md for its
        limits. It waits for the device.

        Args:
            tokens: what each micro-batch of the window counts, where the losses are sums over so many tokens. None
                takes all as equal, and gives the noise scale in micro-batches instead of tokens.
            group: index of a parameter group of the optimizer, to estimate from it alone.
            smoothing: weight of the past in the average over windows, 0 to 1 (excluded).

        Raises:
            RuntimeError: ``stats`` is off, the window has fewer than two micro-batches, ``.grad`` was changed in the
                middle of it, it is over, or this was called in it already.
            TypeError: an argument is of the wrong kind.
            ValueError: ``tokens`` does not hold one positive number per micro-batch, or ``group`` or ``smoothing`` is
                out of range.
        """
        self._check_attached()
        if self._squares is None:
            raise RuntimeError("noise_scale() needs the squared norms that attach(..., stats=True) takes")
        check_smoothing(smoothing)
        check_group(group, len(self._optimizer.param_groups))
        smoother = self._smoothers.setdefault(group, Smoother())
        self._settle()
        if smoother.last_window == self._squares.window:
            raise RuntimeError("noise_scale() was called already in this window; call it once per window and group")
        shares = [parameter.share for parameter in self._parameters.values()]
        squares, square_of_sum = self._squares.totals(shares, group)
        counts = counts_of(tokens, len(squares))
        window = estimate(squares, square_of_sum, counts)
        smoothed = smoother.add(window, smoothing)
        smoother.last_window = self._squares.window
        self._squares.close()
        return NoiseScale(smoothed.noise_scale, smoothed, window, len(squares), smoother.windows)

    def report(self) -> LostBitsReport:
        """Return how much stock accumulation would have lost in the last window; needs ``attach(..., report=True)``.

        ``print(acc.report())`` shows it as plain text, ``rich.print`` as a table; its rows are plain data.

        Raises:
            RuntimeError: ``report`` is off, or no 16-bit gradient has been accumulated yet.
        """
        self._check_attached()
        if self._lost_bits is None:
            raise RuntimeError("report() needs the samples that attach(..., report=True) takes")
        self._settle()
        return self._lost_bits.report(self._optimizer, self.gradient)

    def gradient(self, param: Tensor) -> Tensor | None:
        """Return the accumulated gradient of ``param`` as a new FP32 tensor of its shape; None where ``.grad`` is None.

        A complex gradient, which torch adds by itself, is returned as it is.

        Raises:
            ValueError: ``param`` is not a parameter of the attached optimizer.
        """
        self._check_attached()
        self._settle()
        parameter = self._parameters.get(param) if isinstance(param, Tensor) else None
        if parameter is None:
            raise ValueError("param is not a parameter of the attached optimizer")
        grad = param.grad
        if grad is None:
            return None
        residual = parameter.valid_residual(grad, self.buffer)
        grad = grad.detach()
        if grad.is_complex():
            return grad.clone()
        if residual is None:
            return grad.to(torch.float32, copy=True).resolve_neg()
        if parameter.is_dtensor:
            local = distributed.shard(grad)
            residual = residual.as_strided(local.shape, local.stride())
            return distributed.with_shard(decode(BUFFERS[self.buffer][grad.dtype], local, residual), grad)
        residual = residual.as_strided(grad.shape, _memory_strides(grad))
        return decode(BUFFERS[self.buffer][grad.dtype], grad.resolve_neg(), residual)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint in the middle of a window needs: sums and residuals, bit for bit.

        Save it beside the state of model and optimizer, which hold no gradients. Like an optimizer's, the tensors are
        the live ones: save or copy them before training goes on. ``state["sums"]["0"]`` is ``.grad`` of the optimizer's
        first parameter, ``state["residuals"]["0"]`` what lies beside it, each None where there is none. There is
        nothing but dictionaries, strings and tensors, so ``torch.load(weights_only=True)`` takes it. What belongs to a
        DTensor is a DTensor, laid out alike.

        Raises:
            RuntimeError: the gradient of a DTensor is a sum over ranks that is still to be taken (``Partial``, as of a
                norm under sequence parallelism), of which a checkpoint would keep one term.
        """
        self._check_attached()
        self._settle()
        sums: dict[str, Tensor | None] = {}
        residuals: dict[str, Tensor | None] = {}
        for i, param in enumerate(_parameters_of(self._optimizer)):
            parameter = self._parameters.get(param)
            grad = None if parameter is None else param.grad
            if grad is not None and parameter is not None and parameter.is_dtensor and distributed.is_pending(grad):
                raise RuntimeError(
                    f"the gradient of parameter {i} of optimizer is a sum over ranks that is still to be taken "
                    "(Partial); save between two windows"
                )
            sums[str(i)] = None if grad is None else grad.detach()
            residual = None if grad is None or parameter is None else parameter.valid_residual(grad, self.buffer)
            if residual is not None and parameter is not None and parameter.is_dtensor:
                residual = distributed.with_shard(residual.view(distributed.shard(grad).shape), grad)
            residuals[str(i)] = residual
        return {"buffer": self.buffer, "sums": sums, "residuals": residuals}

    def empty_state_dict(self) -> dict[str, Any]:
        """Return a state of zeros, for loaders that write into tensors which are there: torch.distributed.checkpoint.

        It has a sum for every parameter that requires a gradient, and every residual. What the checkpoint has not, is
        None after it was loaded. Give the result to :meth:`load_state_dict`.
        """
        self._check_attached()
        sums: dict[str, Tensor | None] = {}
        residuals: dict[str, Tensor | None] = {}
        for i, param in enumerate(_parameters_of(self._optimizer)):
            parameter = self._parameters.get(param) if param.requires_grad else None
            total = sums[str(i)] = None if parameter is None else torch.zeros_like(param, requires_grad=False)
            format_ = BUFFERS[self.buffer].get(param.dtype)
            dtype = None if format_ is None else format_.residual_dtype
            residual = None
            if parameter is not None and dtype is not None:
                residual = torch.zeros(parameter.numel, dtype=dtype, device=parameter.device)
                if parameter.is_dtensor:
                    residual = distributed.with_shard(residual.view(distributed.shard(total).shape), param)
            residuals[str(i)] = residual
        return {"buffer": self.buffer, "sums": sums, "residuals": residuals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what :meth:`state_dict` returned: ``.grad`` of every parameter, and the residuals, as copies.

        Raises:
            TypeError: ``state_dict`` is not such a dictionary, or holds a tensor of another dtype.
            ValueError: it was saved with another ``buffer`` or for other parameters.

        After an error nothing has changed.
        """
        self._check_attached()
        parameters = _parameters_of(self._optimizer)
        entries = checked_state(state_dict, self.buffer, parameters)
        self._settle()
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
            if parameter.is_dtensor:
                distributed.RunningShard.put_into(grad, parameter)
                residual = None if residual is None else distributed.shard(residual).flatten()
            if residual is not None:
                parameter.residual_of_dtype(residual.dtype).copy_(residual)
                parameter.remember()
                parameter.is_measured = False  # the partial sums are of what was there before

    def detach(self) -> None:
        """Remove every hook: stock behaviour from now on. ``.grad`` stays as it is; calling it again does nothing."""
        self._settle()
        for parameter in self._parameters.values():
            parameter.unhook()
        self._parameters.clear()
        self._attached = False
        if self._step_hook is not None:
            self._step_hook.remove()
        if vars(self._optimizer).get("add_param_group") is self._add_param_group:
            del self._optimizer.add_param_group

    def __enter__(self) -> GradAccumulator:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = f"{len(self._parameters)} parameters" if self._attached else "detached"
        return f"GradAccumulator(buffer={self.buffer!r}, scale={self._scale!r}, {state})"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a GradAccumulator cannot be copied or pickled, because hooks of parameters cannot: save its state_dict(), "
            "and attach() to the optimizer of the copy"
        )

    def _check_attached(self) -> None:
        if not self._attached:
            raise RuntimeError("this accumulator is detached from its optimizer; attach() makes another one")

    # ---- hooks -------------------------------------------------------------------------------------------------

    def _unhooked(self) -> list[Tensor]:
        """Return the parameters that have no hooks yet, after checking that each can have them."""
        found = []
        for i, param in enumerate(_parameters_of(self._optimizer)):
            if param in self._parameters or param.is_inference():
                continue
            if not (param.is_floating_point() or param.is_complex()):
                continue
            name = f"parameter {i} of optimizer (shape {tuple(param.shape)})"
            if is_attached(param):
                raise ValueError(f"{name} is attached already; detach() the other accumulator first")
            if is_traceable_wrapper_subclass(param):
                self._check_subclass(name, param)
            if getattr(param, "_fsdp_flattened", False):
                raise TypeError(
                    f"{name} is of a FullyShardedDataParallel module, which keeps the gradient apart from .grad in its "
                    "own buffers; use torch.distributed.fsdp.fully_shard"
                )
            if param.dtype is torch.float16 and param.dtype not in BUFFERS[self.buffer]:
                raise TypeError(
                    f"{name} is torch.float16, which buffer={self.buffer!r} cannot hold (it is made of bfloat16); "
                    "use buffer='fp32'"
                )
            self._backend_on(param.device)
            found.append(param)
        return found

    def _check_subclass(self, name: str, param: Tensor) -> None:
        """Raise unless the gradient of a tensor subclass can be folded: of a DTensor, shard by shard."""
        if not distributed.is_dtensor(param):
            raise TypeError(
                f"{name} is a {type(param).__name__}; its gradient is not one tensor that can be folded in place"
            )
        for asked, argument in ((self._squares, "stats"), (self._lost_bits, "report")):
            if asked is not None:
                raise TypeError(f"{name} is a DTensor, of which this rank sees a part; attach without {argument}=True")

    def _hook(self, params: list[Tensor]) -> None:
        group_of = {p: i for i, group in enumerate(self._optimizer.param_groups) for p in group["params"]}
        for param in params:
            self._parameters[param] = Parameter(param, self, group_of[param])

    def _hook_again(self, grad: Tensor, was_added: bool) -> None:
        """Hook the new nodes of parameters that were moved or cast after attach: the first hook was not called.

        Args:
            grad: the ``.grad`` that was noticed first.
            was_added: whether torch has added to it.

        Raises:
            RuntimeError: torch added this gradient to others, which have been multiplied by ``scale`` already.
        """
        for other in self._parameters.values():
            if other.param.requires_grad:
                other.hook_node()
        if was_added and self._scales:
            raise RuntimeError(
                f"a parameter of shape {tuple(grad.shape)} was moved or cast in the middle of a window, and its "
                "gradients with average_over or scale can no longer be told apart; call zero_grad() and begin the "
                "window again"
            )

    def _check_hooks(self, *_arguments: object) -> None:
        """Hook parameters again that have lost their hooks; called before every step and by :meth:`finish`.

        Raises:
            RuntimeError: one of them has a gradient, which torch has accumulated by itself.
        """
        if torch.compiler.is_compiling():  # of the optimizer's step
            return
        lost = [parameter for parameter in self._parameters.values() if not parameter.is_hooked()]
        for parameter in lost:
            parameter.hook()
        missed = [parameter.param for parameter in lost if parameter.param.grad is not None]
        if missed:
            raise RuntimeError(
                f"{len(missed)} parameters, the first of shape {tuple(missed[0].shape)}, have lost their hooks since "
                "attach(), and torch has accumulated their gradients by itself: module.to() has put other tensors into "
                "them (torch.utils.swap_tensors, which it uses for DTensors). They are hooked again now: call "
                "zero_grad() and begin the window again, or attach() after module.to()"
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

    def _accumulate(self, parameter: Parameter, param: Tensor) -> None:
        """Fold the gradient that autograd has just left in ``param.grad`` into the running one."""
        running: Any = parameter.set_aside
        parameter.set_aside = NOT_CALLED
        new: Any = param.grad
        if new is None:  # somebody's hook took it
            param.grad = None if running is NOT_CALLED else running
            return
        backward = _current_graph_task_id()
        if running is NOT_CALLED:
            refuse_compiled_autograd()
            self._begin_backward(backward)
            self._hook_again(new, parameter.last() is new)
            running = None
        elif backward != self._backward:
            param.grad = running  # as it was before this gradient came
            self._begin_backward(backward)
            running = param.grad
            param.grad = new

        if self._squares is not None:
            self._squares.arrive(parameter.share, is_first=running is None)
        if self._lost_bits is not None:
            self._lost_bits.add(param, new, self._scale, running, parameter.owns(running))
        if running is None:  # the first micro-batch of a window
            parameter.forget()
            parameter.last = weakref.ref(new)
            if not self._scales:
                if self._squares is not None:
                    self._squares.keep(parameter.share, new)
                return
            running, start = new, Start.FROM_ZERO
            version = new._version
        else:
            version = running._version
            if self._in_group:
                self._look_through_bucket(parameter, running, version)
            is_ours = running is parameter.written() and version == parameter.version
            start = Start.CONTINUE if is_ours else Start.FROM_SUM
        # .grad.data may have been given another layout or dtype, which no version tells.
        plain = _is_plain(new, parameter.dtype) and (running is new or _is_plain(running, parameter.dtype))
        if not plain or _is_grad_enabled():  # create_graph=True
            self._accumulate_any(parameter, param, running, new, start)
            return

        param.grad = running
        if self._may_wait and parameter.is_small and len(param._post_accumulate_grad_hooks) == 1:
            stream = torch._C._cuda_getCurrentRawStream(parameter.device.index) if parameter.is_cuda else 0
            self._waiting.append((parameter, new, running, version, start, stream))
            self._waiting_numel += parameter.numel
            if self._waiting_numel > _MAX_WAITING_NUMEL:
                self._fold_waiting()
        else:
            self._fold([parameter], [new], [running], start)

    def _accumulate_shard(self, parameter: Parameter, param: Tensor) -> None:
        """Fold the gradient of a DTensor, on the shard of this rank.

        Where autograd accumulates it (tensor parallel), both hooks are called, as with other parameters. fully_shard
        adds to ``.grad`` itself and calls this hook alone; then a RunningShard has folded already.
        """
        running, parameter.set_aside = parameter.set_aside, NOT_CALLED
        new: Any = param.grad
        if new is None:  # somebody's hook took it
            param.grad = None if running is NOT_CALLED else running
            return
        backward = _current_graph_task_id()
        if backward != self._backward or backward == _NO_BACKWARD:
            self._begin_backward(backward)
        if running is not NOT_CALLED:
            if running is None:
                parameter.forget()
                parameter.last = weakref.ref(new)
                if not self._scales:
                    return
                self._fold_dtensor(parameter, param, new, new, Start.FROM_ZERO)
            else:
                start = Start.CONTINUE if parameter.owns(running) else Start.FROM_SUM
                self._fold_dtensor(parameter, param, running, new, start)
            return
        is_ours = isinstance(distributed.shard(new), distributed.RunningShard)
        is_folded, parameter.is_folded = parameter.is_folded, False
        if is_ours and is_folded:
            return
        was_added, parameter.last = parameter.last() is new, weakref.ref(new)
        if is_ours and parameter.is_fully_sharded:
            raise RuntimeError(
                f"fully_shard has added to the gradient of a parameter of shape {tuple(param.shape)}, and it was not "
                "folded: "
                + (
                    f"torch {torch.__version__} does it in a way that accumkern does not know; detach()"
                    if _current_graph_task_id() != _NO_BACKWARD
                    else "outside of a backward pass, where pipeline schedules do so, average_over and scale do not "
                    "reach; divide in finish()"
                )
            )
        if was_added:
            self._hook_again(new, was_added)
        elif not parameter.is_fully_sharded:
            parameter.hook_node()  # it may have been moved before its first gradient
        parameter.is_fully_sharded = True
        parameter.forget()
        if self._scales:
            self._fold_dtensor(parameter, param, new, new, Start.FROM_ZERO)
        distributed.RunningShard.put_into(param.grad, parameter)

    def _fold_dtensor(self, parameter: Parameter, param: Tensor, running: Any, new: Any, start: Start) -> None:
        """Fold the shard of one DTensor into that of another, or leave it to torch where they are laid out apart."""
        alike = running.device_mesh == new.device_mesh
        if alike and running.placements != new.placements and not distributed.is_pending(running):
            new = new.redistribute(placements=running.placements)
        alike &= running.placements == new.placements
        local = distributed.shard(new)
        total = local if running is new else distributed.shard(running)
        plain = _is_plain(local, parameter.dtype) and _is_plain(total, parameter.dtype)
        if not alike or not plain or local.shape != total.shape or _is_grad_enabled():
            self._add_as_torch_does(parameter, param, running, new)
            return
        param.grad = running
        self._fold([parameter], [local], [total], start)

    def _takes_shard(self) -> bool:
        """Return whether what is added to a shard is folded.

        Outside of a backward pass it may be an edit, which must not be multiplied by ``scale``.
        """
        return _current_graph_task_id() != _NO_BACKWARD or not self._scales

    def _fold_shard(self, parameter: Parameter, total: Tensor, new: Tensor) -> None:
        """Fold what fully_shard adds to a shard."""
        backward = _current_graph_task_id()
        if backward != self._backward or backward == _NO_BACKWARD:
            self._begin_backward(backward)
        parameter.is_folded = True
        if not _is_plain(new, parameter.dtype) or not _is_plain(total, parameter.dtype) or new.shape != total.shape:
            parameter.forget()
            total.add_(new * self._scale if self._scales else new)
            return
        start = Start.CONTINUE if parameter.owns(parameter.param.grad) else Start.FROM_SUM
        self._fold([parameter], [new], [total], start)

    def _accumulate_any(self, parameter: Parameter, param: Tensor, running: Tensor, new: Tensor, start: Start) -> None:
        """Fold at once a gradient of any layout, or leave it to torch's own addition."""
        if (
            _is_grad_enabled()
            or new.dtype not in FOLDED_DTYPES
            or running.dtype is not new.dtype
            or new.layout is not torch.strided
            or running.layout is not torch.strided
        ):
            self._add_as_torch_does(parameter, param, running, new)
            return
        if start is Start.FROM_ZERO:
            new = new.resolve_neg()
            if not ops.is_dense(new):
                new = new.contiguous()
            param.grad = new
            self._fold([parameter], [new], [new], start)
            return
        # A running gradient that is somebody's, lazily negated or with holes in its memory, is folded in a copy.
        total = running if ops.is_dense(running) else running.contiguous()
        total = total.resolve_neg()
        if new.stride() != total.stride() or new.is_neg():
            new = torch.empty_strided(new.shape, total.stride(), dtype=new.dtype, device=new.device).copy_(new)
        param.grad = running
        self._fold([parameter], [new], [total], start)
        if total is not running:
            running.data.copy_(total)  # gradients that are views of one tensor share a version counter: leave it alone
            parameter.remember()

    def _add_as_torch_does(self, parameter: Parameter, param: Tensor, running: Tensor, new: Tensor) -> None:
        """Do what AccumulateGrad does: for sparse, complex and float64 gradients, and for create_graph."""
        parameter.forget()
        first = running is new
        if self._scales and parameter.is_dtensor:
            new = distributed.with_shard(distributed.shard(new) * self._scale, new)
        elif self._scales:
            new = new * self._scale
        if first:
            param.grad = new
        elif _is_grad_enabled():
            param.grad = running + new
        elif running.is_sparse and not new.is_sparse:
            param.grad = new + running
        else:
            param.grad = running.add_(new)

    def _begin_backward(self, backward: int) -> None:
        """Fold what waits. Then, if another backward pass has begun (a nested one too, or its end), prepare for it."""
        with self._lock:
            same = backward == self._backward != _NO_BACKWARD
            self._fold_waiting(of_this_backward=same)
            if self._squares is not None:
                self._squares.reduce()
            if same:
                return
            self._finished = False
            self._in_group = distributed.is_in_group()
            self._may_wait = not self._in_group  # DistributedDataParallel sends .grad on right after the hook
            self._versions.clear()
            if self._may_wait or self._squares is not None:
                torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            self._backward = backward  # last: other threads look at it without the lock

    def _look_through_bucket(self, parameter: Parameter, grad: Tensor, version: int) -> None:
        """Let a change of ``grad``'s version that comes from others in its bucket not count as one of its own.

        DistributedDataParallel divides the gradients of a bucket one after another, each after its hook. If they are
        views of the bucket, they share a counter, and the division of one looks like a change of those to come.
        """
        if grad._is_view():
            before = self._versions.setdefault(grad.untyped_storage().data_ptr(), version)
            if parameter.version == before:
                parameter.version = version

    def _end_backward(self) -> None:
        self._fold_waiting()
        if self._squares is not None:
            self._squares.reduce()

    def _settle(self) -> None:
        """Fold what waits: inside its backward pass as it is, after one that failed with care."""
        self._fold_waiting(of_this_backward=torch._C._current_graph_task_id() == self._backward)

    def _fold_waiting(self, of_this_backward: bool = True) -> None:
        """Fold the small gradients that wait, in one launch for each device and start.

        Args:
            of_this_backward: False where the gradients may come from a backward pass that failed. Then those are
                dropped whose ``.grad`` somebody changed since, as ``zero_grad()`` does.
        """
        if not self._waiting:
            return
        self._waiting_numel = 0
        groups: dict[int, tuple[list[Parameter], list[Tensor], list[Tensor], Start]] = {}
        popleft = self._waiting.popleft
        while True:
            try:
                parameter, new, running, version, start, stream = popleft()
            except IndexError:
                break
            grad: Any = parameter.param.grad
            if grad is not running or running._version != version:
                if grad is None or not of_this_backward:
                    continue
                start = Start.FROM_SUM
                if not _is_plain(grad, parameter.dtype):
                    self._accumulate_any(parameter, parameter.param, grad, new, start)
                    continue
            if parameter.is_cuda and stream != torch._C._cuda_getCurrentRawStream(parameter.device.index):
                current = torch.cuda.current_stream(parameter.device)
                current.wait_stream(torch.cuda.ExternalStream(stream, parameter.device))
                new.record_stream(current)
            key = parameter.kind + start
            if key not in groups:
                groups[key] = ([], [], [], start)
            parameters, grads, sums, _ = groups[key]
            parameters.append(parameter)
            grads.append(new)
            sums.append(grad)
            if start is Start.FROM_ZERO:  # before any group is folded, which may fail: see _fold
                parameter.param.grad = None
        for group in groups.values():
            self._fold(*group)

    def _fold(self, parameters: list[Parameter], grads: list[Tensor], sums: list[Tensor], start: Start) -> None:
        """Fold gradients of one device and dtype into their sums, which are laid out alike.

        From zero, the sums are the gradients themselves. They may share memory with tensors of somebody else, so what
        is written goes into memory of its own. Until then there is no ``.grad``: if memory runs out, a gradient that
        has not been multiplied must not count.
        """
        taken: list[Any] = []
        if start is Start.FROM_ZERO:
            taken = [parameter.take() for parameter in parameters]
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
        if start is Start.FROM_ZERO:
            sums = [torch.empty_like(grad) for grad in grads]
        device = parameters[0].device
        scale = self._scale.to(device) if isinstance(self._scale, Tensor) else self._scale
        partials = (
            [parameter.partials_of(total) for parameter, total in zip(parameters, sums, strict=True)]
            if self._measures
            else None
        )
        if self._squares is not None and partials is not None:
            with self._lock:
                for parameter, total, rows in zip(parameters, sums, partials, strict=True):
                    self._squares.fold(parameter.share, total, start, rows, scale)
        self._kernel_on(device)(format_, start, grads, sums, residuals, scale, partials)
        if start is Start.FROM_ZERO:
            for parameter, total, like in zip(parameters, sums, taken, strict=True):
                parameter.put(total, like)
        if start is not Start.CONTINUE:
            for parameter in parameters:
                parameter.remember()

    def _kind_of(self, device: torch.device, dtype: torch.dtype) -> int:
        """Return a number for a device and dtype, to which a Start can be added: cheaper to group by than the pair."""
        return self._kinds.setdefault((device, dtype), len(Start) * len(self._kinds))

    def _kernel_on(self, device: torch.device) -> backends.FoldFunction:
        return backends.kernels(self._backend_on(device)).fold

    def _backend_on(self, device: torch.device) -> str:
        chosen = self._backend_of_device.get(device)
        if chosen is None:
            chosen = self._backend_of_device[device] = backends.choose(self._backend, device)
        return chosen


# ---- helpers -----------------------------------------------------------------------------------------------------

_NO_BACKWARD = -1  # as autograd counts: pipeline schedules let fully_shard reduce after their backward passes
_current_graph_task_id = torch._C._current_graph_task_id
_is_grad_enabled = torch.is_grad_enabled


def _is_plain(grad: Tensor, dtype: torch.dtype | None) -> bool:
    """Return whether the kernels take a gradient as it is; sparse tensors are not contiguous."""
    return grad.dtype is dtype and grad.is_contiguous() and not grad.is_neg()


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _optimizer_with_hooks(optimizer: Any) -> torch.optim.Optimizer | None:
    """Return the optimizer whose step calls hooks: this one, or what it wraps, as Accelerate's does."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None:
            return None
    return optimizer


def _memory_strides(grad: Tensor) -> tuple[int, ...]:
    """Return the strides of ``grad`` if it is dense, else those of its contiguous copy; its residual lies so."""
    if ops.is_dense(grad):
        return grad.stride()
    return torch.empty(grad.shape, device="meta").stride()
