"""What is installed, which backends can run here, and why the others cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from accumkern import backends, optimizers
from accumkern.fused_step import FUSED
from accumkern.version import __version__


def doctor() -> int:
    """Print versions, devices, backends and optimizers; return 0, or 1 where the backend that is set cannot run."""
    print(f"accumkern   {__version__}")
    print(f"python      {platform.python_version()} on {platform.platform()}")
    print(f"torch       {torch.__version__}, {_torch_build()}, {torch.get_num_threads()} CPU threads")
    print(f"triton      {_version_of('triton')}")
    print(f"extension   {_extension()}")
    for name in _devices():
        print(f"device      {name}")
    print("\nbackends")
    for name, reason in backends.available_backends().items():
        print(f"  {name:8s}  {'ok' if reason is None else 'no'}   {reason or backends.BACKENDS[name].summary}")
    print()
    failed = False
    for device in [torch.device("cpu"), *_gpus_that_differ()]:
        try:
            chosen = backends.choose(None, device)
        except (RuntimeError, ValueError) as error:
            print(f"{device} tensors: {error}")
            failed = True
        else:
            because = " (set by ACCUMKERN_BACKEND)" if os.environ.get("ACCUMKERN_BACKEND") else ""
            print(f"{device} tensors are folded by backend {chosen!r}{because}")
    print("\nmaster weights: how optimizers are stepped on FP32 weights")
    for what, text in _optimizers():
        print(f"  {what}: {text}")
    return int(failed)


def _optimizers() -> list[tuple[str, str]]:
    """Return which optimizers can have master weights, and which cannot and why."""
    by_package: dict[str, list[str]] = {}
    for name in sorted(optimizers.STEPPED_IN_PARTS):
        package, *_, kind, _step = name.split(".")
        by_package.setdefault(package, []).append(kind)
    in_parts = "; ".join(f"{package} {', '.join(kinds)}" for package, kinds in by_package.items())
    fused = ", ".join(sorted(kind.__name__ for kind in FUSED))
    return [
        ("in one pass", f"torch.optim {fused} themselves, where weight, gradient and states lie in memory alike"),
        ("a few weights at a time", f"those with the step() of {in_parts}"),
        ("all weights at once", "all others"),
        *((f"not {_short(name)}", reason) for name, reason in optimizers.REFUSED.items()),
        *((f"not with {option}", reason) for option, reason in optimizers.REFUSED_OPTIONS.items()),
    ]


def _short(name: str) -> str:
    """Return the package and the class of a name, or the beginning of a module."""
    package, *modules = name.removesuffix(".").split(".")
    return ".".join([package, *modules[-1:]])


def _torch_build() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda is not None else "CPU build"


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    problem = backends.extension_problem()
    if problem is not None:
        return problem
    from accumkern.backends import _C  # type: ignore[attr-defined]

    parts = [
        f"built with {_C.compiler}",
        "OpenMP" if _C.openmp else "no OpenMP",
        f"{_C.cpu_instruction_set()} chosen on this CPU",
        f"CUDA for {_C.cuda_targets}" if _C.cuda_targets else "no CUDA",
    ]
    return ", ".join(parts)


def _gpus_that_differ() -> list[torch.device]:
    """Return the first GPU of each architecture."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    firsts = {torch.cuda.get_device_capability(i): i for i in reversed(range(count))}
    return [torch.device("cuda", i) for i in sorted(firsts.values())]


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["CPU only: torch finds no GPU"]
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}"
        found.append(f"cuda:{i} {properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB")
    return found
