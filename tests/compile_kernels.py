"""Compiles the GPU kernels for a GPU that need not be there, and prints what their machine code does, as JSON.

A program of its own, because triton compiles only outside of its interpreter::

    python compile_kernels.py triton 90    kernel -> format-start[-partials] -> what it does, for sm_90
    python compile_kernels.py cuda 90      kernel -> format -> what it does; nvcc must be on PATH

A step has an update and two formats, of weights and of gradients: update-format-format[-start].
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from accumkern.backends import triton_kernels, triton_step
from accumkern.backends.triton_launch import DTYPES, OPTIONS
from accumkern.formats import Format, Start
from accumkern.updates import Update

ROOT = Path(__file__).resolve().parent.parent
COUNTED = ("LDG", "STG", "LDL", "STL", "LDS", "STS")  # global, local (spills) and shared memory


def cuobjdump(option: str, cubin: Path) -> dict[str, str]:
    """Return function -> what the tool says of it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    output = subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout
    texts = re.split(r"^\s*Function :? ?", output, flags=re.MULTILINE)[1:]
    return {re.split(r"[:\s]", text, maxsplit=1)[0]: text for text in texts}


def describe_functions(cubin: Path) -> dict[str, dict[str, int]]:
    """Return function -> counts of memory instructions, REG (of a thread) and STACK (its bytes, where spills go)."""
    resources = cuobjdump("-res-usage", cubin)
    report = {name: describe(sass) for name, sass in cuobjdump("-sass", cubin).items()}
    for name, counts in report.items():
        counts |= {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", resources[name])}
    return report


def describe(sass: str) -> dict[str, int]:
    """Count memory instructions by kind and width, such as LDG.128."""
    counts: dict[str, int] = {}
    for name in re.findall(r"\s((?:[A-Z]+)(?:\.[A-Z0-9_]+)*)\s", sass):
        kind, *modifiers = name.split(".")
        if kind in COUNTED:
            width = next((m for m in modifiers if m in ("64", "128")), "narrow")
            counts[f"{kind}.{width}"] = counts.get(f"{kind}.{width}", 0) + 1
    return counts


def arithmetic(ptx: str) -> dict[str, int]:
    """Count additions, products, fused multiply-adds, quotients and roots in FP32; those on pairs count twice."""
    counts = dict.fromkeys(("add", "mul", "fma"), 0)
    for name, pair in re.findall(r"\b(add|sub|mul|fma)(?:\.rn)?\.f32(x2)?\s", ptx):
        counts["add" if name == "sub" else name] += 2 if pair else 1
    for name in ("div", "sqrt"):
        counts[name] = len(re.findall(rf"\b{name}\.rn\.f32\s", ptx))
    # What rounds otherwise, or takes subnormals for zeros.
    counts["inexact"] = len(re.findall(r"\b\w+(?:\.\w+)*\.(?:approx|full|ftz)(?:\.\w+)*\s", ptx))
    return counts


def half_nans(ptx: str) -> int:
    """Count the selections between something and float16's NaN."""
    return len(re.findall(r"\bselp\.b(?:16|32)\s.*\b(?:32256|0x7E00)\b", ptx))


NAMES = {tl.bfloat16: "bf16", tl.float16: "fp16", tl.float32: "fp32", tl.int8: "i8", tl.int16: "i16"}


def compile_triton(architecture: int) -> dict[str, Any]:
    report: dict[str, Any] = {}

    def build(name: str, variant: str, signature: dict[str, str], constants: dict[str, Any]) -> None:
        # As the launches have it; coefficients may lie anywhere.
        pointers = [
            i for i, (key, kind) in enumerate(signature.items()) if kind[0] == "*" and key != "coefficients_ptr"
        ]
        source = ASTSource(
            getattr(triton_kernels, name, None) or getattr(triton_step, name),
            signature | dict.fromkeys(constants, "constexpr"),
            constants,
            {(i,): [["tt.divisibility", 16]] for i in pointers},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=OPTIONS)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            (counts,) = describe_functions(cubin).values()
        counts |= arithmetic(compiled.asm["ptx"]) | {"half_nans": half_nans(compiled.asm["ptx"])}
        report.setdefault("rescale_kernel" if constants.get("RESCALES") else name, {})[variant] = counts

    for format_ in Format:
        sum_dtype, residual_dtype = DTYPES[format_.sum_dtype], DTYPES[format_.residual_dtype]
        stored = {"sum_ptr": f"*{NAMES[sum_dtype]}", "residual_ptr": f"*{NAMES[residual_dtype]}"}
        grad, value, partials = {"grad_ptr": stored["sum_ptr"]}, {"value_ptr": "*fp32"}, {"partials_ptr": "*fp32"}
        numel, scale, divisor, factor = {"numel": "i64"}, {"scale": "fp32"}, {"divisor": "fp32"}, {"factor": "fp32"}
        of_format = {"FORMAT": int(format_)}
        for start in Start if architecture == 90 else [Start.CONTINUE]:
            variant, constants = f"{format_.name}-{start.name}", of_format | {"START": int(start)}
            signature = grad | stored | partials | numel | scale
            constants["SCALE_IS_POINTER"] = False
            build("accumulate_kernel", variant, signature, constants | {"PARTIALS": False})
            build("accumulate_kernel", f"{variant}-partials", signature, constants | {"PARTIALS": True})
        variant, constants = f"{format_.name}-{Start.CONTINUE.name}", of_format | {"START": int(Start.CONTINUE)}
        by_value = {"DIVISOR_IS_POINTER": False, "FACTOR_IS_POINTER": False}
        for rescales in (False, True):
            of_finish = constants | by_value | {"RESCALES": rescales}
            build("finish_kernel", variant, stored | numel | divisor | factor, of_finish)
        build("decode_kernel", variant, stored | value | numel, of_format)
        build("encode_kernel", variant, value | stored | numel | divisor, of_format | {"DIVISOR_IS_POINTER": False})
        build("squares_kernel", variant, stored | partials | numel, constants)
        of_list = {"SUM_DTYPE": sum_dtype, "RESIDUAL_DTYPE": residual_dtype, "ALIGNED": True}
        signature = {"table_ptr": "*i64"} | scale
        of_list |= constants | {"PARTIALS": False, "SCALE_IS_POINTER": False}
        build("accumulate_list_kernel", variant, signature, of_list)
    build_steps(build, is_thorough=architecture == 90)
    return report


def build_steps(build: Callable[[str, str, dict[str, str], dict[str, Any]], None], is_thorough: bool) -> None:
    """Build the kernels of a step: every update with every pair of formats, gradients scaled; and from the sum alone.

    Less than thorough: for a list, weights and gradients of two formats.
    """
    bf16, fp32 = "*bf16", "*fp32"
    states = {"first_ptr": fp32, "second_ptr": fp32, "third_ptr": fp32}
    scalars = {"coefficients_ptr": fp32, "divisor": fp32, "factor": fp32, "skip_ptr": fp32}
    weight_formats, grad_formats = (Format.SPLIT24, Format.SPLIT32), list(Format)[:3]
    for update, weight_format, grad_format in itertools.product(Update, weight_formats, grad_formats):
        weight_dtype, grad_dtype = DTYPES[weight_format.residual_dtype], DTYPES[grad_format.residual_dtype]
        tensors = {
            "weight_ptr": bf16,
            "weight_residual_ptr": f"*{NAMES[weight_dtype]}",
            "grad_ptr": bf16,
            "grad_residual_ptr": f"*{NAMES[grad_dtype]}",
            **states,
        }
        of_list = {"WEIGHT_RESIDUAL_DTYPE": weight_dtype, "GRAD_RESIDUAL_DTYPE": grad_dtype, "ALIGNED": True}
        for start in (Start.CONTINUE, Start.FROM_SUM) if grad_format is Format.SPLIT24 else (Start.CONTINUE,):
            constants = {
                "UPDATE": int(update),
                "WEIGHT_FORMAT": int(weight_format),
                "GRAD_FORMAT": int(grad_format),
                "START": int(start),
                "SCALES": True,
                "DIVISOR_IS_POINTER": True,
                "FACTOR_IS_POINTER": True,
            }
            variant = f"{update.name}-{weight_format.name}-{grad_format.name}-{start.name}"
            if is_thorough:
                build("step_kernel", variant, tensors | {"numel": "i64", "row": "i32"} | scalars, constants)
            if is_thorough or weight_format is not grad_format:
                build("step_list_kernel", variant, {"table_ptr": "*i64", "count": "i32"} | scalars, constants | of_list)


# The CUDA kernels' types -> formats, and updates without and with what their template's argument says.
CUDA_FORMATS = {
    "Split24": Format.SPLIT24,
    "Split32": Format.SPLIT32,
    "BFloat16": Format.MAIN_GRAD_BFLOAT16,
    "Float16": Format.MAIN_GRAD_FLOAT16,
    "Plain32": Format.PLAIN32,
}
CUDA_UPDATES = {"Adam": (Update.ADAM, Update.AMSGRAD), "Sgd": (Update.SGD, Update.MOMENTUM)}


def name_cuda(symbol: str) -> tuple[str, str]:
    """Return (kernel, format) of a mangled name, which has the kernel's name, its types and how long its lists are.

    The norm's has no format.

    Raises:
        ValueError: it is no kernel's.
    """
    format_ = "|".join(CUDA_FORMATS)
    found = re.search(rf"\d(accumulate|finish|rescale|decode|encode|squares)_kernel.*?\d({format_}).*Li(\d+)E", symbol)
    if found is not None:
        kernel, type_name, capacity = found.groups()
        return f"{kernel}{'_list' if int(capacity) > 1 else ''}_kernel", CUDA_FORMATS[type_name].name
    if re.search(r"\d+norm_kernelE", symbol):  # which knows no format
        return "norm_kernel", ""
    # A type that the name has had before is written as a number between S and _.
    grad = rf"(?:S\w*?_|NS_\d+(?:MainGradINS_\d)?({format_})E)"
    found = re.search(rf"step_kernelINS_\d(Adam|Sgd)ILb([01])EEENS_\d({format_})E{grad}", symbol)
    if found is None:
        raise ValueError(f"{symbol} is no kernel's name")
    update, flag, weight_format, grad_format = found.groups()
    names = [CUDA_FORMATS[name].name for name in (weight_format, grad_format or weight_format)]
    return "step_list_kernel", "-".join([CUDA_UPDATES[update][int(flag)].name, *names])


def compile_cuda(architecture: int) -> dict[str, Any]:
    nvcc = shutil.which("nvcc")
    assert nvcc is not None, "nvcc is not on PATH"
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        for source in sorted((ROOT / "csrc").glob("*.cu")):
            for kind, output in (("-cubin", cubin), ("-ptx", ptx)):
                command = [nvcc, "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{architecture}", kind, "-o", output]
                subprocess.run([*command, source], check=True)
            functions = describe_functions(cubin)
            for text in re.split(r"^(?:\.visible )?\.entry ", ptx.read_text(), flags=re.MULTILINE)[1:]:
                functions[text.split("(", 1)[0].strip()].update(arithmetic(text))
            for symbol, counts in functions.items():
                kernel, name = name_cuda(symbol)
                assert name not in report.setdefault(kernel, {}), f"two kernels are {kernel} {name}"
                report[kernel][name] = counts
    return report


if __name__ == "__main__":
    print(json.dumps({"triton": compile_triton, "cuda": compile_cuda}[sys.argv[1]](int(sys.argv[2]))))
