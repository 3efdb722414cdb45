"""Builds the extension module accumkern.backends._C; everything else about the package stands in pyproject.toml.

ACCUMKERN_BUILD chooses what is built:

    (unset)   CPU kernels, and CUDA kernels where nvcc is found; what fails to build is left out with a warning
    cpu       CPU kernels only; a failure is an error
    cuda      CPU and CUDA kernels; a failure is an error
    0         nothing: a pure Python package

Neither torch nor a GPU is needed to build.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # pip brings its own; `python setup.py` takes what is there
    sys.exit(f"setuptools is {setuptools.__version__}; accumkern is built with 77 or newer: pip install -U setuptools")

CPU_FILES = ("accumulate_cpu", "step_cpu", "norm_cpu", "mean_cpu")
SOURCES = [f"csrc/{name}.cpp" for name in ("bindings", "fold_into", "tensors", *CPU_FILES)]
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
CUDA_SOURCES = [f"csrc/{name}.cu" for name in ("accumulate_cuda", "step_cuda", "norm_cuda", "mean_cuda")]
# Every fused multiply-add is spelled out; nobody reads floating-point flags or errno, which otherwise forbid
# vectorisation.
ARITHMETIC = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
# Machine code for these; later GPUs compile the newest one's PTX when they first load it.
CUDA_ARCHITECTURES = ("80", "90", "100")

CHOICE = os.environ.get("ACCUMKERN_BUILD", "")
if CHOICE not in ("", "cpu", "cuda", "0"):
    sys.exit(f"ACCUMKERN_BUILD is {CHOICE!r}; it must be cpu, cuda, 0 or unset")


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    return next((found for c in ["nvcc", *candidates] if (found := shutil.which(c))), None)


class BuildExtension(build_ext):
    """Compiles with OpenMP and CUDA where they are to be had."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if CHOICE != "cpu":
                self._add_cuda(ext)
            self._build_with_openmp(ext)
        except Exception as error:  # any compiler's any failure: the package works without its extension
            if CHOICE:
                raise
            self.warn(f"accumkern.backends._C was not built ({error}); the triton and eager backends remain")

    def _build_with_openmp(self, ext: Extension) -> None:
        serial = list(ext.extra_compile_args), list(ext.extra_link_args)
        try:
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
            super().build_extension(ext)
        except Exception as error:
            self.warn(f"building with OpenMP failed ({error}); the CPU kernels will use one thread")
            ext.extra_compile_args, ext.extra_link_args = serial
            super().build_extension(ext)

    def _add_cuda(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            if CHOICE == "cuda":
                raise RuntimeError("ACCUMKERN_BUILD=cuda, but nvcc is neither on PATH nor under CUDA_HOME")
            return
        try:
            listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
            targets = [a for a in CUDA_ARCHITECTURES if f"compute_{a}" in listed.split()]
            Path(self.build_temp).mkdir(parents=True, exist_ok=True)
            command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "--threads", "0", "-Xcompiler", "-fPIC"]
            command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
            command += [f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]
            compiled = {
                source: str(Path(self.build_temp) / Path(source).with_suffix(".o").name) for source in CUDA_SOURCES
            }
            for source, target in compiled.items():
                self.announce(" ".join([*command, "-c", source, "-o", target]), level=2)
                subprocess.run([*command, "-c", source, "-o", target], check=True)
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            if CHOICE == "cuda":
                raise
            self.warn(f"the CUDA kernels were not built ({error}); the others were")
            return
        toolkit = Path(nvcc).resolve().parent.parent
        if not (toolkit / "lib64" / "libcudart_static.a").exists():  # nvcc on PATH may be a script elsewhere
            toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        ext.extra_objects += compiled.values()
        ext.library_dirs.append(str(toolkit / "lib64"))
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        ext.define_macros.append(("ACCUMKERN_CUDA_TARGETS", '"' + " ".join(f"sm_{a}" for a in targets) + '"'))


def extensions() -> list[Extension]:
    if CHOICE == "0":
        return []
    import pybind11  # a build requirement, not needed for a pure Python package

    about = runpy.run_path("accumkern/version.py")  # not by an import, which would need torch
    return [
        Extension(
            "accumkern.backends._C",
            sources=SOURCES,
            depends=[*HEADERS, *CUDA_SOURCES],
            include_dirs=["csrc", pybind11.get_include()],
            define_macros=[
                ("ACCUMKERN_VERSION", f'"{about["__version__"]}"'),
                ("ACCUMKERN_SOURCES", f'"{about["digest_of_sources"]()}"'),
            ],
            extra_compile_args=[*ARITHMETIC, "-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-g0"],
            language="c++",
            optional=not CHOICE,
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
