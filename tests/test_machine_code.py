"""The GPU kernels' machine code, compiled ahead of time: wide loads and stores, no spills, fused arithmetic.

Needs no GPU: triton brings its assembler, and nvcc compiles for GPUs that are not there.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from accumkern.formats import Format, Start

ARCHITECTURES = [80, 90, 100]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton, which disassembles, is not installed"
    ),
]
# 16-byte loads and stores of a thread that folds two vectors of eight elements; 8 one-byte residuals make 8 bytes.
WIDE = {
    Format.SPLIT24: {"LDG.128": 4, "LDG.64": 2, "STG.128": 2, "STG.64": 2},
    Format.SPLIT32: {"LDG.128": 6, "LDG.64": 0, "STG.128": 4, "STG.64": 0},
    Format.MAIN_GRAD_BFLOAT16: {"LDG.128": 8, "LDG.64": 0, "STG.128": 6, "STG.64": 0},
    Format.MAIN_GRAD_FLOAT16: {"LDG.128": 8, "LDG.64": 0, "STG.128": 6, "STG.64": 0},
    Format.PLAIN32: {"LDG.128": 8, "LDG.64": 0, "STG.128": 4, "STG.64": 0},
}

# The others: to finish is to read sum and residual and write the sum, to rescale is to write both. To decode is to
# write FP32 values instead, and to encode is to read such and write both. Squares leave one number of a block.
WIDE_OF_KERNEL = {
    "finish_kernel": {
        Format.SPLIT24: {"LDG.128": 2, "LDG.64": 2, "STG.128": 2, "STG.64": 0},
        Format.SPLIT32: {"LDG.128": 4, "LDG.64": 0, "STG.128": 2, "STG.64": 0},
        Format.MAIN_GRAD_BFLOAT16: {"LDG.128": 6, "LDG.64": 0, "STG.128": 2, "STG.64": 0},
        Format.MAIN_GRAD_FLOAT16: {"LDG.128": 6, "LDG.64": 0, "STG.128": 2, "STG.64": 0},
        Format.PLAIN32: {"LDG.128": 4, "LDG.64": 0, "STG.128": 4, "STG.64": 0},
    },
    "rescale_kernel": {
        Format.SPLIT24: {"LDG.128": 2, "LDG.64": 2, "STG.128": 2, "STG.64": 2},
        Format.SPLIT32: {"LDG.128": 4, "LDG.64": 0, "STG.128": 4, "STG.64": 0},
        Format.MAIN_GRAD_BFLOAT16: {"LDG.128": 6, "LDG.64": 0, "STG.128": 6, "STG.64": 0},
        Format.MAIN_GRAD_FLOAT16: {"LDG.128": 6, "LDG.64": 0, "STG.128": 6, "STG.64": 0},
        Format.PLAIN32: {"LDG.128": 4, "LDG.64": 0, "STG.128": 4, "STG.64": 0},
    },
    "decode_kernel": {
        Format.SPLIT24: {"LDG.128": 2, "LDG.64": 2, "STG.128": 4, "STG.64": 0},
        Format.SPLIT32: {"LDG.128": 4, "LDG.64": 0, "STG.128": 4, "STG.64": 0},
        Format.MAIN_GRAD_BFLOAT16: {"LDG.128": 6, "LDG.64": 0, "STG.128": 4, "STG.64": 0},
        Format.MAIN_GRAD_FLOAT16: {"LDG.128": 6, "LDG.64": 0, "STG.128": 4, "STG.64": 0},
        Format.PLAIN32: {"LDG.128": 4, "LDG.64": 0, "STG.128": 4, "STG.64": 0},
    },
    "encode_kernel": {
        Format.SPLIT24: {"LDG.128": 4, "LDG.64": 0, "STG.128": 2, "STG.64": 2},
        Format.SPLIT32: {"LDG.128": 4, "LDG.64": 0, "STG.128": 4, "STG.64": 0},
        Format.MAIN_GRAD_BFLOAT16: {"LDG.128": 4, "LDG.64": 0, "STG.128": 6, "STG.64": 0},
        Format.MAIN_GRAD_FLOAT16: {"LDG.128": 4, "LDG.64": 0, "STG.128": 6, "STG.64": 0},
        Format.PLAIN32: {"LDG.128": 4, "LDG.64": 0, "STG.128": 4, "STG.64": 0},
    },
    "squares_kernel": {
        Format.SPLIT24: {"LDG.128": 2, "LDG.64": 2, "STG.128": 0, "STG.64": 0},
        Format.SPLIT32: {"LDG.128": 4, "LDG.64": 0, "STG.128": 0, "STG.64": 0},
        Format.MAIN_GRAD_BFLOAT16: {"LDG.128": 6, "LDG.64": 0, "STG.128": 0, "STG.64": 0},
        Format.MAIN_GRAD_FLOAT16: {"LDG.128": 6, "LDG.64": 0, "STG.128": 0, "STG.64": 0},
        Format.PLAIN32: {"LDG.128": 4, "LDG.64": 0, "STG.128": 0, "STG.64": 0},
    },
}


@cache
def compiled(compiler: str, architecture: int) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), compiler, str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def widths(counts: dict[str, int], expected: dict[str, int]) -> dict[str, int]:
    return {name: counts.get(name, 0) for name in expected}


def reads_of_table(kernel: str, format_: Format) -> dict[str, int]:
    """Addresses and length of a tensor in a list are 8-byte loads of their own, those that the format needs."""
    if kernel != "accumulate_list_kernel":
        return {}
    return {"LDG.64": WIDE[format_]["LDG.64"] + (3 if format_ is Format.PLAIN32 else 4)}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a}")
def test_triton(architecture: int) -> None:
    report = compiled("triton", architecture)
    starts = list(Start) if architecture == 90 else [Start.CONTINUE]
    assert len(report["accumulate_kernel"]) == len(Format) * len(starts) * 2
    assert len(report["accumulate_list_kernel"]) == len(Format)
    for kernel, wide_of_format in WIDE_OF_KERNEL.items():
        variants = report[kernel]
        assert len(variants) == len(Format)
        for name, counts in variants.items():
            where = f"{kernel} {name} sm_{architecture}: {counts}"
            wide = wide_of_format[Format[name.split("-")[0]]]
            assert widths(counts, wide) == wide, where
            assert not any(key.startswith(("LDL", "STL")) for key in counts), where
    for kernel in ("accumulate_kernel", "accumulate_list_kernel"):
        for name, counts in report[kernel].items():
            where = f"{kernel} {name} sm_{architecture}: {counts}"
            format_, start = Format[name.split("-")[0]], Start[name.split("-")[1]]
            assert not any(key.startswith(("LDL", "STL")) for key in counts), where
            if start is Start.CONTINUE:
                assert widths(counts, WIDE[format_]) == WIDE[format_] | reads_of_table(kernel, format_), where
            if "partials" not in name:
                # One rounding: a fused multiply-add, and no sum or product of its own; from zero, the product alone.
                from_zero = start is Start.FROM_ZERO
                assert counts["add"] == 0, where
                assert (counts["mul"] >= 16) == from_zero, where
                assert (counts["fma"] >= 16) == (not from_zero), where
                assert min(counts["mul"], counts["fma"]) == 0, where
                if format_ in (Format.SPLIT24, Format.SPLIT32):
                    # The one-byte residual lies in the threads' registers as the sums do: nothing is exchanged.
                    assert not any(key.startswith(("LDS", "STS")) for key in counts), where


def test_triton_makes_one_nan_of_all_in_float16() -> None:
    """The GPU's conversion makes 0x7FFF of a NaN, which triton's interpreter cannot show: a selection follows it."""
    report = compiled("triton", 90)
    elements = 2 * 16  # of a thread, in the path of whole blocks and in that of the last
    # To decode is to round the residual, and compare; to encode is to round the value.
    roundings = {"accumulate_kernel": 2, "accumulate_list_kernel": 2, "finish_kernel": 2, "decode_kernel": 1}
    for kernel, count in (roundings | {"rescale_kernel": 2, "encode_kernel": 1, "squares_kernel": 1}).items():
        for name, counts in report[kernel].items():
            format_, start = Format[name.split("-")[0]], Start[name.split("-")[1]]
            expected = count - (start is not Start.CONTINUE) if format_ is Format.MAIN_GRAD_FLOAT16 else 0
            assert counts["half_nans"] == expected * elements, f"{kernel} {name}: {counts}"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a}")
def test_cuda(architecture: int) -> None:
    report = compiled("cuda", architecture)
    # Each format, to fold, finish, rescale, decode, encode and square, for one tensor and for a list.
    names = {
        Format.SPLIT24: "Split24",
        Format.SPLIT32: "Split32",
        Format.MAIN_GRAD_BFLOAT16: "BFloat16",
        Format.MAIN_GRAD_FLOAT16: "Float16",
        Format.PLAIN32: "Plain32",
    }
    assert len(report) == 12 * len(names)
    for function, counts in report.items():
        where = f"{function} sm_{architecture}: {counts}"
        format_ = next(f for f, name in names.items() if f"{len(name)}{name}" in function)
        other = next((kernel for kernel in WIDE_OF_KERNEL if kernel in function), None)
        for name, count in (WIDE if other is None else WIDE_OF_KERNEL[other])[format_].items():
            assert counts.get(name, 0) >= count, where
        assert not any(key.startswith(("LDL", "STL")) for key in counts), where
        assert other is not None or counts["fma"] >= 16, where
