"""Compiles the GPU kernels for a GPU that need not be there, and prints what their machine code does, as JSON.

A program of its own, because triton compiles only outside of its interpreter::

    python compile_kernels.py triton 90    kernel -> format-start[-partials] -> what it does, for sm_90
    python compile_kernels.py product 90   tile -> format -> what the kernels of benchmarks/product_kernels.py do
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from accumkern.backends import triton_kernels, triton_step
from accumkern.backends.triton_launch import NORM_OPTIONS, OPTIONS
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
    counts["sqrt64"] = len(re.findall(r"\bsqrt\.rn\.f64\s", ptx))
    # What rounds otherwise, or takes subnormals for zeros.
    counts["inexact"] = len(re.findall(r"\b\w+(?:\.\w+)*\.(?:approx|full|ftz)(?:\.\w+)*\s", ptx))
    return counts


def half_nans(ptx: str) -> int:
    """Count the selections between something and float16's NaN."""
    return len(re.findall(r"\bselp\.b(?:16|32)\s.*\b(?:32256|0x7E00)\b", ptx))


def describe_compiled(compiled: Any) -> dict[str, int]:
    """Return the same of a kernel that triton has compiled."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (counts,) = describe_functions(cubin).values()
    return counts


def compile_triton(architecture: int) -> dict[str, Any]:
    report: dict[str, Any] = {}

    def build(name: str, variant: str, arguments: dict[str, str], constants: dict[str, Any]) -> None:
        """Compile a kernel as its launches have it: it knows that addresses are aligned, and nothing else of them."""
        kernel = getattr(triton_kernels, name, None) or getattr(triton_step, name)
        specialized = [param.name for param in kernel.params if not (param.is_constexpr or param.do_not_specialize)]
        assert not specialized, f"{name} has other machine code for some values of {specialized}"
        if "ALIGNED" in kernel.arg_names:
            constants = {"ALIGNED": True} | constants
        signature = {key: arguments[key] for key in kernel.arg_names if key not in constants}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        options = NORM_OPTIONS if name == "norm_kernel" else OPTIONS
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        counts = describe_compiled(compiled)
        counts |= arithmetic(compiled.asm["ptx"]) | {"half_nans": half_nans(compiled.asm["ptx"])}
        report.setdefault("rescale_kernel" if constants.get("RESCALES") else name, {})[variant] = counts

    numbers = ["grad_address", "sum_address", "residual_address", "value_address", "partials_address", "numel"]
    arguments = dict.fromkeys(numbers, "i64") | {"table_ptr": "*i64", "count": "i32"}
    arguments |= dict.fromkeys(["scale", "divisor", "factor", "max_norm"], "fp32")
    by_value = {"DIVISOR_IS_POINTER": False, "FACTOR_IS_POINTER": False}
    for format_ in Format:
        of_format = {"FORMAT": int(format_)}
        for start in Start if architecture == 90 else [Start.CONTINUE]:
            variant = f"{format_.name}-{start.name}"
            constants = of_format | {"START": int(start), "SCALE_IS_POINTER": False}
            build("accumulate_kernel", variant, arguments, constants | {"PARTIALS": False})
            build("accumulate_kernel", f"{variant}-partials", arguments, constants | {"PARTIALS": True})
        variant, constants = f"{format_.name}-{Start.CONTINUE.name}", of_format | {"START": int(Start.CONTINUE)}
        for rescales in (False, True):
            build("finish_kernel", variant, arguments, constants | by_value | {"RESCALES": rescales})
        build("decode_kernel", variant, arguments, of_format)
        build("encode_kernel", variant, arguments, of_format | {"DIVISOR_IS_POINTER": False})
        build("squares_kernel", variant, arguments, constants)
        of_list = constants | {"PARTIALS": False, "SCALE_IS_POINTER": False}
        build("accumulate_list_kernel", variant, arguments, of_list)
    pointers = {"partials_ptr": "*fp32", "results_ptr": "*fp32", "nonfinite_ptr": "*i1"}
    for clips in (False, True):
        build("norm_kernel", f"clips-{clips}", arguments | pointers, {"DIVISOR_IS_POINTER": False, "CLIPS": clips})
    numbers = ["sums_address", "residuals_address", "sum_stride", "residual_stride", "ranks"]
    of_ranks = arguments | dict.fromkeys([*numbers, "out_sum_address", "out_residual_address"], "i64")
    for format_ in (Format.SPLIT24, Format.SPLIT32):
        build("mean_kernel", format_.name, of_ranks, {"FORMAT": int(format_), "DIVISOR_IS_POINTER": False})
    build_steps(build, is_thorough=architecture == 90)
    return report


def build_steps(build: Callable[[str, str, dict[str, str], dict[str, Any]], None], is_thorough: bool) -> None:
    """Build the kernels of a step: every update with every pair of formats, gradients scaled; and from the sum alone.

    Less than thorough: for a list, weights and gradients of two formats.
    """
    numbers = ["weight", "weight_residual", "grad", "grad_residual", "first", "second", "third"]
    arguments = dict.fromkeys([*[f"{name}_address" for name in numbers], "numel", "row"], "i64")
    arguments |= {"table_ptr": "*i64", "count": "i32"}
    arguments |= dict.fromkeys(["coefficients_ptr", "divisor", "factor", "skip_ptr"], "*fp32")
    weight_formats, grad_formats = (Format.SPLIT24, Format.SPLIT32), list(Format)[:3]
    for update, weight_format, grad_format in itertools.product(Update, weight_formats, grad_formats):
        for start in (Start.CONTINUE, Start.FROM_SUM) if grad_format is Format.SPLIT24 else (Start.CONTINUE,):
            constants = {
                "UPDATE": int(update),
                "WEIGHT_FORMAT": int(weight_format),
                "GRAD_FORMAT": int(grad_format),
                "START": int(start),
                "SCALES": True,
                "SKIPS": True,
                "DIVISOR_IS_POINTER": True,
                "FACTOR_IS_POINTER": True,
            }
            variant = f"{update.name}-{weight_format.name}-{grad_format.name}-{start.name}"
            if is_thorough:
                build("step_kernel", variant, arguments, constants)
            if is_thorough or weight_format is not grad_format:
                build("step_list_kernel", variant, arguments, constants)


def compile_product(architecture: int) -> dict[str, Any]:
    """Compile as for large products, whose addresses and sizes are multiples of 16."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import product_kernels

    report: dict[str, Any] = {}
    for tile in product_kernels.TILES:
        for format_, residual in ((Format.SPLIT24, "*i8"), (Format.SPLIT32, "*i16")):
            kernel = product_kernels.streamed_kernel
            constants = {"FORMAT": int(format_), "ROWS": tile.rows, "COLUMNS": tile.columns, "INNER": tile.inner}
            constants |= {"PART": tile.part}
            if tile.kernel == "pointers":
                kernel = product_kernels.product_kernel
            arguments = dict.fromkeys(("dy_ptr", "x_ptr", "sum_ptr"), "*bf16") | {"residual_ptr": residual}
            arguments |= dict.fromkeys(("rows", "columns", "inner"), "i32")
            multiples = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in arguments}
            signature = arguments | dict.fromkeys(constants, "constexpr")
            source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, multiples)
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            counts = describe_compiled(compiled) | {"SHARED": compiled.metadata.shared}
            for name, instruction in (("wgmma", "wgmma.mma_async"), ("tma", "cp.async.bulk.tensor")):
                counts[name] = compiled.asm["ptx"].count(instruction)
            report.setdefault(str(tile), {})[format_.name] = counts
    return report


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
    found = re.search(r"\dmean_kernelINS_\d(Split24|Split32)E", symbol)
    if found is not None:
        return "mean_kernel", CUDA_FORMATS[found[1]].name
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


COMPILERS = {"triton": compile_triton, "product": compile_product, "cuda": compile_cuda}

if __name__ == "__main__":
    print(json.dumps(COMPILERS[sys.argv[1]](int(sys.argv[2]))))
