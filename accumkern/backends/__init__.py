"""The backends: what a kernel is, which backends have them, and which one takes a tensor.

A new backend is a row of :data:`BACKENDS` and a module with its kernels.
"""

from __future__ import annotations

import importlib
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from accumkern.backends.problems import cuda_problem, extension_problem, triton_is_interpreted, triton_problem
from accumkern.checks import one_of
from accumkern.formats import Format, Start

# ---- kernels -----------------------------------------------------------------------------------------------------


_Tensors: TypeAlias = list[Tensor]
_Scalar: TypeAlias = "float | Tensor"


class Kernels(NamedTuple):
    """What a backend computes: all but ``norm`` and ``mean`` for every element of every tensor of a list.

    All tensors are on one device, dense, and of the dtypes of ``format_``; the i-th of each list have the same elements
    in the same order in memory. ``scale``, ``divisor`` and ``factor`` are numbers or 0-dim tensors on the device of the
    others. ``residuals`` are None for PLAIN32. Nothing is checked here: :mod:`accumkern.ops` does.

    Attributes:
        fold: ``fold(format_, start, grads, sums, residuals, scale, partials)``: ``x = fma(scale, grad, decode(sum,
            residual)); (sum, residual) = encode(x)``, in place. Sums are read unless ``start`` is FROM_ZERO, residuals
            if it is CONTINUE. ``partials`` are written: FP32 of shape ``(partial_rows(numel), PARTIALS)``; None to
            leave them out.
        fold_into: ``fold_into(format_, start, total, residual)`` returns ``add(grad, total, version, scale)``. Its
            first call does what ``fold(format_, start, [grad], [total], [residual], scale, None)`` does, later ones
            continue, and it returns True, if the sum lies as it lay and is of that version, the gradient is laid out
            alike, both are exactly tensors, and scale is a float. Else it writes nothing and returns False.
        fold_alike: ``fold_alike(format_, grads, sums, residuals, scale)`` does what ``fold(format_, CONTINUE, grads,
            sums, residuals, scale, None)`` does, and returns True, if all are exactly tensors of one device, gradients
            and sums contiguous and of one dtype, residuals of the format's, each with as many elements as its sum, and
            nothing is lazily negated. Else it writes nothing and returns False. ``scale`` is a number, and the first
            gradient's dtype is the format's.
        finish: ``finish(format_, start, sums, residuals, divisor, factor)``: ``sum = round((x / divisor) * factor)`` in
            FP32, in place; ``x`` is ``decode(sum, residual)`` if ``start`` is CONTINUE, the sum if it is FROM_SUM.
        rescale: ``rescale(format_, start, sums, residuals, divisor, factor)``: ``(sum, residual) = encode((x /
            divisor) * factor)`` in FP32, in place; ``x`` as in ``finish``. Residuals are read if ``start`` is CONTINUE
            and written in any case.
        decode: ``decode(format_, sums, residuals, values)``: ``value = decode(sum, residual)``, FP32, laid out as the
            sums.
        encode: ``encode(format_, values, divisor, sums, residuals)``: ``(sum, residual) = encode(value / divisor)``.
        squares: ``squares(format_, start, sums, residuals, partials)``: the sum of ``x**2`` over each block of
            BLOCK_NUMEL elements, in memory order; ``x`` as in ``finish``. ``partials`` is written and nothing else: one
            FP32 tensor with a number for each block of the first sum, of the second, and so on, those that a fold
            leaves of the same values where its tensors are aligned alike.
        norm: ``norm(partials, divisor, max_norm, results, nonfinite)``: the end of a norm, in one launch. ``results``,
            FP32 of shape ``(2,)``, and ``nonfinite``, a bool 0-dim tensor, are written: what
            :func:`accumkern.clipping.clipped` returns of ``sqrt(sum(partials))``. The sum, in a fixed order, and the
            root are of FP64 (:func:`accumkern.formats.widest`); the root is rounded to FP32. ``partials`` is FP32 of
            one dimension, and may be empty.
        mean: ``mean(format_, sums, residuals, divisor, out_sum, out_residual)``: ``x = decode(sums[0], residuals[0]) +
            decode(sums[1], residuals[1]) + ...``, FP32, from left to right, each addition rounded; ``(out_sum,
            out_residual) = encode(x / divisor)``. ``sums`` and ``residuals`` are ``(ranks, numel)``, a row for each of
            at least one rank, each row contiguous and as far from the next as its tensor says; what is written is
            ``(numel,)``, contiguous. Nothing is aligned but as its dtype is. ``out_sum`` may be a row of ``sums`` and
            ``out_residual`` a row of ``residuals``; else what is written overlaps nothing. Split formats alone.
        step: ``step(update, weight_format, grad_format, start, weights, weight_residuals, grads, grad_residuals,
            states, coefficients, divisor, factor, skip)``: an optimizer's step in one pass. ``g = (x / divisor) *
            factor`` with ``x`` of gradient and residual as in ``finish``; weight and states are updated as
            :mod:`accumkern.updates` says, in FP32, and ``(weight, residual) = encode(new weight)``. ``states`` has a
            list of FP32 tensors for each of ``update.states``. ``coefficients`` is ``(len(weights), COEFFICIENTS)``,
            FP32, a row for each weight. Where ``skip``, an FP32 0-dim tensor, is not zero, nothing is written. Weights
            are of a split format, gradients bfloat16.
    """

    fold: Callable[[Format, Start, _Tensors, _Tensors, _Tensors | None, _Scalar, _Tensors | None], None]
    fold_into: Callable[[Format, Start, Tensor, Tensor | None], Callable[[Tensor, Tensor, int, Any], bool]]
    fold_alike: Callable[[Format, _Tensors, _Tensors, _Tensors | None, float], bool]
    finish: Callable[[Format, Start, _Tensors, _Tensors | None, _Scalar, _Scalar], None]
    rescale: Callable[[Format, Start, _Tensors, _Tensors | None, _Scalar, _Scalar], None]
    decode: Callable[[Format, _Tensors, _Tensors | None, _Tensors], None]
    encode: Callable[[Format, _Tensors, _Scalar, _Tensors, _Tensors | None], None]
    squares: Callable[[Format, Start, _Tensors, _Tensors | None, Tensor], None]
    norm: Callable[[Tensor, _Scalar, float | None, Tensor, Tensor], None]
    mean: Callable[[Format, Tensor, Tensor, _Scalar, Tensor, Tensor], None]
    step: Callable[..., None]


# ---- the table ---------------------------------------------------------------------------------------------------


class Backend(NamedTuple):
    """A row of the table."""

    summary: str  # what it does, in a line
    module: str  # whose functions named as in Kernels are its kernels; fold_into and fold_alike may be left out
    problem: Callable[[torch.device | None], str | None]  # why it cannot run on this machine, of several GPUs on one
    device_type: Callable[[], str | None]  # of the tensors that it takes; None for every one
    takes: str  # the same, in words


BACKENDS: dict[str, Backend] = {
    "cuda": Backend(
        summary="compiled CUDA kernels for NVIDIA GPUs",
        module="accumkern.backends.native",
        problem=cuda_problem,
        device_type=lambda: "cuda",
        takes="cuda tensors only",
    ),
    "triton": Backend(
        summary="fused Triton kernels for GPUs",
        module="accumkern.backends.triton_launch",
        problem=lambda _: triton_problem(),
        device_type=lambda: "cpu" if triton_is_interpreted() else "cuda",
        takes="CUDA tensors, and with TRITON_INTERPRET=1 CPU tensors instead",
    ),
    "cpu": Backend(
        summary="compiled vectorised kernels for the CPU",
        module="accumkern.backends.native",
        problem=lambda _: extension_problem(),
        device_type=lambda: "cpu",
        takes="cpu tensors only",
    ),
    "eager": Backend(
        summary="plain torch, on every device",
        module="accumkern.backends.eager",
        problem=lambda _: None,
        device_type=lambda: None,
        takes="all tensors",
    ),
}

#: Device type -> backends in the order in which they are tried; other devices have ``eager``.
PREFERENCE: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton", "eager"), "cpu": ("cpu", "eager")}


# ---- the choice --------------------------------------------------------------------------------------------------


def available_backends() -> dict[str, str | None]:
    """Return, for each backend, None where it can run here, or the reason why it cannot.

    Where there is a GPU and the extension has CUDA kernels, this initialises CUDA.
    """
    return {name: unavailable(name) for name in BACKENDS}


def unavailable(name: str, device: torch.device | None = None) -> str | None:
    """Return why a backend cannot run on this machine; where GPUs differ, on ``device``, or on the current one."""
    return BACKENDS[name].problem(device)


def refusal(name: str, device_type: str) -> str | None:
    """Return why a backend that can run does not take tensors on a kind of device."""
    backend = BACKENDS[name]
    return None if backend.device_type() in (None, device_type) else f"it takes {backend.takes}"


def choose(backend: str | None, device: torch.device) -> str:
    """Return the backend that folds tensors on ``device``.

    Args:
        backend: a name, which is taken or refused; None takes ``ACCUMKERN_BACKEND`` from the environment or else the
            first of :data:`PREFERENCE` that can run.
        device: where the tensors are.

    Raises:
        TypeError, ValueError: ``backend`` is no backend's name.
        RuntimeError: the backend asked for cannot run here, or not on that device.
    """
    wanted, source = backend, "backend"
    if wanted is None:
        wanted, source = os.environ.get("ACCUMKERN_BACKEND") or None, "ACCUMKERN_BACKEND"
    if wanted is None:
        candidates = PREFERENCE.get(device.type, ("eager",))
        return next(n for n in candidates if unavailable(n, device) is None and refusal(n, device.type) is None)
    one_of(source, wanted, BACKENDS)
    reason = unavailable(wanted, device) or refusal(wanted, device.type)
    if reason is not None:
        raise RuntimeError(f"{source} {wanted!r} cannot run on device {str(device)!r}: {reason}")
    return wanted


@cache
def kernels(name: str) -> Kernels:
    """Return the kernels of a backend that can run here. The first call imports them."""
    if _are_left_out:
        return Kernels(*[_do_nothing] * len(Kernels._fields))
    module = importlib.import_module(BACKENDS[name].module)
    general = {"fold_into": partial(_fold_into, module.fold), "fold_alike": partial(_fold_alike, module.fold)}
    found: dict[str, Any] = {name: getattr(module, name, general.get(name)) for name in Kernels._fields}
    return Kernels(**found)


@cache
def layout_function() -> Callable[..., Any]:
    """Return ``layout(*lists)``, a value that is equal for tensors that lie alike, wherever in memory that is.

    That is to say, for lists of as many tensors of the same classes, dtypes, devices, shapes and strides; None may take
    the place of a tensor. It returns None where something else is among them, or a tensor has no such value.
    """
    if extension_problem() is None:
        from accumkern.backends import _C  # type: ignore[attr-defined]

        return _C.layout
    return _layout


def _layout(*lists: list[Any]) -> Any:
    if any(t is not None and not (isinstance(t, Tensor) and t.layout is torch.strided) for some in lists for t in some):
        return None
    return tuple(
        tuple(None if t is None else (type(t), t.dtype, t.device, t.shape, t.stride()) for t in some) for some in lists
    )


def _fold_into(
    fold: Callable[..., None], format_: Format, start: Start, total: Tensor, residual: Tensor | None
) -> Callable[[Tensor, Tensor, int, Any], bool]:
    """Return what :attr:`Kernels.fold_into` returns, for a backend that has nothing of its own."""
    address, dtype, shape, strides = total.data_ptr(), total.dtype, total.shape, total.stride()
    residuals = None if residual is None else [residual]

    def add(grad: Tensor, total: Tensor, version: int, scale: Any) -> bool:
        nonlocal start
        is_as_it_was = (
            type(grad) is type(total) is Tensor
            and type(scale) is float
            and total._version == version
            and total.data_ptr() == address
            and total.dtype is grad.dtype is dtype
            and total.device == grad.device
            and total.shape == grad.shape == shape
            and total.stride() == grad.stride() == strides
            and not grad.is_neg()
        )
        if is_as_it_was:
            fold(format_, start, [grad], [total], residuals, scale, None)
            start = Start.CONTINUE
        return is_as_it_was

    return add


_is_contiguous, _is_neg, _numel, _get_device = Tensor.is_contiguous, Tensor.is_neg, Tensor.numel, Tensor.get_device
_dtype_of = operator.attrgetter("dtype")


def _fold_alike(
    fold: Callable[..., None],
    format_: Format,
    grads: _Tensors,
    sums: _Tensors,
    residuals: _Tensors | None,
    scale: float,
) -> bool:
    """Do what :attr:`Kernels.fold_alike` does, for a backend that has nothing of its own."""
    dtype, of_all, lows = grads[0].dtype, [*grads, *sums], residuals or []
    numels = list(map(_numel, sums))
    are_alike = (
        set(map(type, chain(of_all, lows))) == {Tensor}
        and set(map(_dtype_of, of_all)) == {dtype}
        and set(map(_dtype_of, lows)) <= {format_.residual_dtype}
        and all(map(_is_contiguous, of_all))
        and (dtype is torch.bfloat16 or not any(map(_is_neg, of_all)))  # no complex number has parts of bfloat16
        and len(set(map(_get_device, chain(of_all, lows)))) == 1
        and list(map(_numel, grads)) == numels
        and (residuals is None or list(map(_numel, residuals)) == numels)
    )
    if are_alike:
        fold(format_, Start.CONTINUE, grads, sums, residuals, scale, None)
    return are_alike


_are_left_out = False


@contextmanager
def without_kernels() -> Iterator[None]:
    """Let :func:`kernels` return kernels that read and write nothing, in all threads.

    For predictions of memory: under ``FakeTensorMode`` tensors have shapes but no memory, and the hooks that allocate
    gradients and residuals run as they do in training.
    """
    global _are_left_out
    before, _are_left_out = _are_left_out, True
    kernels.cache_clear()
    try:
        yield
    finally:
        _are_left_out = before
        kernels.cache_clear()


def are_kernels_left_out() -> bool:
    """Return whether the kernels read and write nothing now, so that tensors need no memory."""
    return _are_left_out


def _do_nothing(*_arguments: Any) -> Any:
    """Return what ``fold_into`` returns: a function that says that it has folded."""
    return _do_nothing


def is_writable(address: int, size_bytes: int) -> bool:
    """Return whether a range of the host's memory can be written, without writing; True where nobody can be asked."""
    if extension_problem() is not None:
        return True
    from accumkern.backends import _C  # type: ignore[attr-defined]

    return bool(_C.is_writable(address, size_bytes))
