"""The choice of a backend: which can run here, why the others cannot, and which one takes a tensor."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from accumkern.formats import Format, Start

#: Device type -> backends in the order in which they are tried; other devices have ``eager``.
PREFERENCE: dict[str, tuple[str, ...]] = {"cuda": ("triton", "cuda", "eager"), "cpu": ("cpu", "eager")}

#: Backend -> what it does, in a line.
BACKENDS = {
    "triton": "fused Triton kernels for GPUs",
    "cuda": "compiled CUDA kernels for NVIDIA GPUs",
    "cpu": "compiled vectorised kernels for the CPU",
    "eager": "plain torch, on every device",
}

FoldFunction: TypeAlias = Callable[
    [Format, Start, list[Tensor], list[Tensor], "list[Tensor] | None", "float | Tensor", "list[Tensor] | None"], None
]
FinishFunction: TypeAlias = Callable[
    [Format, Start, list[Tensor], "list[Tensor] | None", "float | Tensor", "float | Tensor"], None
]
DecodeFunction: TypeAlias = Callable[[Format, list[Tensor], "list[Tensor] | None", list[Tensor]], None]
EncodeFunction: TypeAlias = Callable[
    [Format, list[Tensor], "float | Tensor", list[Tensor], "list[Tensor] | None"], None
]


def available_backends() -> dict[str, str | None]:
    """Return, for each backend, None where it can run here, or the reason why it cannot.

    Where there is a GPU and the extension has CUDA kernels, this initialises CUDA.
    """
    return {name: _unavailable(name) for name in BACKENDS}


def choose(backend: str | None, device: torch.device) -> str:
    """Return the backend that folds tensors on ``device``.

    Args:
        backend: a name, which is taken or refused; None takes ``ACCUMKERN_BACKEND`` from the environment or else the
            first of :data:`PREFERENCE` that can run.
        device: where the tensors are.

    Raises:
        ValueError: ``backend`` is no backend's name.
        RuntimeError: the backend asked for cannot run here, or not on that device.
    """
    wanted, source = backend, "backend"
    if wanted is None:
        wanted, source = os.environ.get("ACCUMKERN_BACKEND") or None, "ACCUMKERN_BACKEND"
    if wanted is None:
        candidates = PREFERENCE.get(device.type, ("eager",))
        return next(name for name in candidates if _unavailable(name) is None and _refusal(name, device.type) is None)
    if wanted not in BACKENDS:
        raise ValueError(f"{source} is {wanted!r}; it must be one of {', '.join(BACKENDS)}")
    reason = _unavailable(wanted) or _refusal(wanted, device.type)
    if reason is not None:
        raise RuntimeError(f"{source} {wanted!r} cannot run on device {str(device)!r}: {reason}")
    return wanted


@cache
def fold_function(name: str) -> FoldFunction:
    """Return the accumulate kernel of a backend that can run here.

    It is called as ``fold(format_, start, grads, sums, residuals, scale, partials)`` and computes ``x = fma(scale,
    grad, decode(sum, residual)); (sum, residual) = encode(x)`` for every element of every tensor, in place. All tensors
    are on one device, dense, and of the dtypes of ``format_``; the i-th of each list have the same elements in the same
    order in memory.

    The lists are ``grads`` (read), ``sums`` (read unless ``start`` is FROM_ZERO, written), ``residuals`` (read if
    ``start`` is CONTINUE, written; None for PLAIN32) and ``partials`` (written: FP32 of shape ``(partial_rows(numel),
    PARTIALS)``; None to leave them out). ``scale`` is a number or a 0-dim tensor on the device of the others. Nothing
    is checked here: :mod:`accumkern.ops` does.
    """
    module, suffix = _module(name)
    fold: FoldFunction = getattr(module, f"fold{suffix}")
    return fold


@cache
def finish_function(name: str) -> FinishFunction:
    """Return the kernel of a backend that makes the gradient which the optimizer reads.

    It is called as ``finish(format_, start, sums, residuals, divisor, factor)`` and computes ``sum = round((x /
    divisor) * factor)`` in FP32 for every element of every tensor, in place; ``x`` is ``decode(sum, residual)`` if
    ``start`` is CONTINUE, and the sum itself if it is FROM_SUM. Residuals are only read. ``divisor`` and ``factor`` are
    numbers or 0-dim tensors on the device of the others. The rest is as for :func:`fold_function`.
    """
    module, suffix = _module(name)
    finish: FinishFunction = getattr(module, f"finish{suffix}")
    return finish


@cache
def decode_function(name: str) -> DecodeFunction:
    """Return the kernel of a backend that takes accumulated values out of their format.

    It is called as ``decode(format_, sums, residuals, values)`` and computes ``value = decode(sum, residual)`` for
    every element of every tensor. ``values`` are FP32, written, and laid out as the sums, which are only read, as the
    residuals are. The rest is as for :func:`fold_function`.
    """
    module, suffix = _module(name)
    decode: DecodeFunction = getattr(module, f"decode{suffix}")
    return decode


@cache
def encode_function(name: str) -> EncodeFunction:
    """Return the kernel of a backend that puts FP32 values into a format.

    It is called as ``encode(format_, values, divisor, sums, residuals)`` and computes ``(sum, residual) = encode(value
    / divisor)`` for every element of every tensor. ``values`` are FP32, laid out as the sums, and only read;
    ``divisor`` is a number or a 0-dim tensor on their device. The rest is as for :func:`fold_function`.
    """
    module, suffix = _module(name)
    encode: EncodeFunction = getattr(module, f"encode{suffix}")
    return encode


def _module(name: str) -> tuple[ModuleType, str]:
    """Return the module that holds a backend's kernels, and how their names end there."""
    if name == "triton":
        from accumkern.backends import triton_kernels

        return triton_kernels, ""
    if name == "eager":
        from accumkern.backends import eager

        return eager, ""
    from accumkern.backends import native

    return native, f"_{name}"


def _refusal(name: str, device_type: str) -> str | None:
    """Return why a backend that can run does not take tensors on a kind of device."""
    if name == "eager" or device_type == name:
        return None
    if name == "triton":
        if device_type == "cuda" and not _interprets_triton():
            return None
        if device_type == "cpu" and _interprets_triton():
            return None
        return "it takes CUDA tensors, and with TRITON_INTERPRET=1 CPU tensors instead"
    return f"it takes {name} tensors only"


def _unavailable(name: str) -> str | None:
    """Return why a backend cannot run on this machine."""
    if name == "eager":
        return None
    if name == "triton":
        return _triton_unavailable()
    return _extension_problem() or (_cuda_unavailable() if name == "cuda" else None)


def _interprets_triton() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _triton_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton, Linux only)"
    if _interprets_triton():
        if importlib.util.find_spec("numpy") is None:
            return "TRITON_INTERPRET is set and triton's interpreter needs numpy, which is not installed"
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU (TRITON_INTERPRET=1 runs it on the CPU in triton's interpreter, for tests)"
    return None


def _cuda_unavailable() -> str | None:
    from accumkern import _C  # type: ignore[attr-defined]

    if _C.cuda_targets is None:
        return "accumkern was built without CUDA kernels (install it with nvcc on PATH, or ACCUMKERN_BUILD=cuda)"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the triton backend runs there"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _cuda_problem()


@cache
def _cuda_problem() -> str | None:
    """Return why this GPU or its driver does not take the compiled kernels."""
    from accumkern import _C  # type: ignore[attr-defined]

    problem = _C.cuda_problem()
    if not problem:
        return None
    return f"built for {_C.cuda_targets}, and the kernels do not load here: {problem}"


@cache
def _extension_problem() -> str | None:
    """Return why the compiled extension cannot be used."""
    from accumkern import __version__

    if importlib.util.find_spec("accumkern._C") is None:
        return "the extension accumkern._C was not built (install accumkern where there is a C++ compiler)"
    try:
        from accumkern import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return f"the extension accumkern._C does not load: {error}"
    if _C.version != __version__:
        return f"the extension accumkern._C is of version {_C.version}, the package of {__version__}: install it again"
    return None


class Kernels(NamedTuple):
    """The kernels of one backend."""

    fold: FoldFunction
    finish: FinishFunction
    decode: DecodeFunction
    encode: EncodeFunction


@cache
def kernels(name: str) -> Kernels:
    """Return the kernels of a backend that can run here."""
    return Kernels(fold_function(name), finish_function(name), decode_function(name), encode_function(name))
