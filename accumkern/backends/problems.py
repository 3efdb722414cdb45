"""Why a backend cannot run on this machine: each function returns the reason, or None where there is none."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from accumkern.version import SOURCES, __version__, digest_of_sources


def triton_problem() -> str | None:
    """Return why the Triton kernels cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton, Linux only)"
    if triton_is_interpreted():
        if importlib.util.find_spec("numpy") is None:
            return "TRITON_INTERPRET is set and triton's interpreter needs numpy, which is not installed"
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU (TRITON_INTERPRET=1 runs it on the CPU in triton's interpreter, for tests)"
    return None


def triton_is_interpreted() -> bool:
    """Return whether triton is told to interpret its kernels, which then take tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def extension_problem() -> str | None:
    """Return why the compiled extension, and with it the CPU kernels, cannot be used."""
    if importlib.util.find_spec("accumkern.backends._C") is None:
        return "the extension accumkern.backends._C was not built (install accumkern where there is a C++ compiler)"
    try:
        from accumkern.backends import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return f"the extension accumkern.backends._C does not load: {error}"
    if _C.version != __version__:
        versions = f"of version {_C.version}, the package of {__version__}"
        return f"the extension accumkern.backends._C is {versions}: install it again"
    if digest_of_sources() not in (None, getattr(_C, "sources", "")):
        how = "build it again (python setup.py build_ext --inplace)"
        return f"the extension accumkern.backends._C was built from other sources than those in {SOURCES}: {how}"
    try:
        _C.read_tensors_of(torch.Tensor)  # from now on, where it can
    except RuntimeError as error:
        return f"the extension accumkern.backends._C cannot read tensors: {error}"
    return None


def cuda_problem(device: torch.device | None = None) -> str | None:
    """Return why the compiled CUDA kernels cannot run here. Where they might, this initialises CUDA.

    Args:
        device: a GPU, which may be of another architecture than others here; otherwise the current one is asked.
    """
    problem = extension_problem()
    if problem is not None:
        return problem
    from accumkern.backends import _C  # type: ignore[attr-defined]

    if _C.cuda_targets is None:
        return "accumkern was built without CUDA kernels (install it with nvcc on PATH, or ACCUMKERN_BUILD=cuda)"
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the triton backend runs there"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    is_named = device is not None and device.type == "cuda" and device.index is not None
    return _load_problem(device.index if is_named else torch.cuda.current_device())  # type: ignore[union-attr]


@cache
def _load_problem(index: int) -> str | None:
    """Return why a GPU or its driver does not take the compiled kernels."""
    from accumkern.backends import _C  # type: ignore[attr-defined]

    problem = _C.cuda_problem(index)
    if not problem:
        return None
    return f"built for {_C.cuda_targets}, and the kernels do not load on cuda:{index}: {problem}"
