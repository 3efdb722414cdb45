"""Compiles the GPU kernels for a GPU that need not be there, and prints what their machine code does, as JSON.

A program of its own, because triton compiles only outside of its interpreter::

    python compile_kernels.py triton 90    kernel -> format-start[-partials] -> what it does, for sm_90
    python compile_kernels.py cuda 90      kernel -> what it does; nvcc must be on PATH
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from accumkern.backends import triton_kernels as kernels
from accumkern.backends.triton_launch import DTYPES, OPTIONS
from accumkern.formats import Format, Start

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
    """Count single-precision additions, products and fused multiply-adds; those on pairs count twice."""
    counts = dict.fromkeys(("add", "mul", "fma"), 0)
    for name, pair in re.findall(r"\b(add|sub|mul|fma)(?:\.rn)?\.f32(x2)?\s", ptx):
        counts["add" if name == "sub" else name] += 2 if pair else 1
    return counts


def half_nans(ptx: str) -> int:
    """Count the selections between something and float16's NaN."""
    return len(re.findall(r"\bselp\.b(?:16|32)\s.*\b(?:32256|0x7E00)\b", ptx))


def compile_triton(architecture: int) -> dict[str, Any]:
    names = {tl.bfloat16: "bf16", tl.float16: "fp16", tl.float32: "fp32", tl.int8: "i8", tl.int16: "i16"}
    report: dict[str, Any] = {}

    def build(name: str, variant: str, signature: dict[str, str], constants: dict[str, Any]) -> None:
        pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
        source = ASTSource(
            getattr(kernels, name),
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
        stored = {"sum_ptr": f"*{names[sum_dtype]}", "residual_ptr": f"*{names[residual_dtype]}"}
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
    return report


def compile_cuda(architecture: int) -> dict[str, Any]:
    nvcc = shutil.which("nvcc")
    assert nvcc is not None, "nvcc is not on PATH"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        for kind, output in (("-cubin", cubin), ("-ptx", ptx)):
            command = [nvcc, "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{architecture}", kind, "-o", output]
            subprocess.run([*command, ROOT / "csrc" / "accumulate_cuda.cu"], check=True)
        report = describe_functions(cubin)
        entries = re.split(r"^(?:\.visible )?\.entry ", ptx.read_text(), flags=re.MULTILINE)[1:]
    for text in entries:
        report[text.split("(", 1)[0].strip()].update(arithmetic(text))
    return report


if __name__ == "__main__":
    print(json.dumps({"triton": compile_triton, "cuda": compile_cuda}[sys.argv[1]](int(sys.argv[2]))))
