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
from accumkern.updates import Update

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


# A step of one vector of eight elements of each part: weight and gradient, their residuals, and states in FP32.
WIDE_OF_RESIDUAL = {
    Format.SPLIT24: {"128": 0, "64": 1},
    Format.SPLIT32: {"128": 1, "64": 0},
    Format.MAIN_GRAD_BFLOAT16: {"128": 2, "64": 0},
}
STEPS = len(Update) * 2 * len(WIDE_OF_RESIDUAL)  # updates, formats of weights and of gradients


# A mean over ranks, of one vector of eight elements: a sum and a residual of a rank, and as much written.
WIDE_OF_MEAN = {
    "SPLIT24": {"LDG.128": 1, "LDG.64": 1, "STG.128": 1, "STG.64": 1},
    "SPLIT32": {"LDG.128": 2, "LDG.64": 0, "STG.128": 2, "STG.64": 0},
}


def wide_of_step(variant: str) -> dict[str, int]:
    """Return what a step loads and stores, 16 and 8 bytes at a time; its name is update-format-format-start."""
    update, weight_format, grad_format, *start = variant.split("-")
    weight, grad = WIDE_OF_RESIDUAL[Format[weight_format]], WIDE_OF_RESIDUAL[Format[grad_format]]
    states = 2 * len(Update[update].states)
    reads = 0 if start == [Start.FROM_SUM.name] else 1
    return {
        "LDG.128": 2 + weight["128"] + reads * grad["128"] + states,
        "LDG.64": weight["64"] + reads * grad["64"],
        "STG.128": 1 + weight["128"] + states,
        "STG.64": weight["64"],
    }


def assert_in_registers(counts: dict[str, int], where: str) -> None:
    """Nothing is spilled, and nothing exchanged between threads through shared memory."""
    assert not any(key.startswith(("LDL", "STL", "LDS", "STS")) for key in counts), where


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
    """Of a tensor in a list 8 bytes each: the addresses that the format needs, length and first block; and a search."""
    if kernel != "accumulate_list_kernel":
        return {}
    return {"LDG.64": WIDE[format_]["LDG.64"] + (5 if format_ is Format.PLAIN32 else 6)}


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


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a}")
def test_triton_steps(architecture: int) -> None:
    report = compiled("triton", architecture)
    with_starts = STEPS + len(Update) * 2
    assert len(report["step_list_kernel"]) == (with_starts if architecture == 90 else with_starts - len(Update) * 3)
    assert len(report.get("step_kernel", [])) == (with_starts if architecture == 90 else 0)
    for kernel in ("step_kernel", "step_list_kernel"):
        for name, counts in report.get(kernel, {}).items():
            where = f"{kernel} {name} sm_{architecture}: {counts}"
            update, wide = Update[name.split("-")[0]], wide_of_step(name)
            if kernel == "step_list_kernel":  # 8 bytes for each address; a length, a row, a first block, and a search
                addresses = 4 - name.endswith(Start.FROM_SUM.name) + len(update.states)
                wide["LDG.64"] += addresses + 4
            assert widths(counts, wide) == wide, where
            assert_in_registers(counts, where)
            # Eight elements, in the path of whole blocks and in that of the last: quotients and roots are IEEE's.
            is_adam = update in (Update.ADAM, Update.AMSGRAD)
            assert counts["div"] == 16 * (3 if is_adam else 1), where
            assert counts["sqrt"] == (16 if is_adam else 0), where
            assert counts["fma"] == 16 * (4 if is_adam or update is Update.MOMENTUM else 2), where
            assert counts["inexact"] == 0, where


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a}")
def test_triton_norm(architecture: int) -> None:
    """Root in FP64, quotients and a product in FP32, each rounded by itself."""
    for name, counts in compiled("triton", architecture)["norm_kernel"].items():
        clips = name == "clips-True"
        where = f"norm_kernel {name} sm_{architecture}: {counts}"
        arithmetic = {"sqrt64": 1, "div": 1 + clips, "add": int(clips), "mul": int(clips), "fma": 0, "inexact": 0}
        assert widths(counts, arithmetic) == arithmetic, where
        assert not any(key.startswith(("LDL", "STL")) for key in counts), where


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a}")
def test_triton_mean(architecture: int) -> None:
    """Two vectors of each rank at once; additions and a quotient, each rounded by itself."""
    variants = compiled("triton", architecture)["mean_kernel"]
    assert variants.keys() == WIDE_OF_MEAN.keys()
    for name, counts in variants.items():
        where = f"mean_kernel {name} sm_{architecture}: {counts}"
        wide = {key: 2 * count for key, count in WIDE_OF_MEAN[name].items()}
        assert widths(counts, wide) == wide, where
        assert_in_registers(counts, where)
        elements = 2 * 16  # of a thread, in the path of whole blocks and in that of the last
        assert counts["add"] >= elements, where
        arithmetic = {"div": elements, "mul": 0, "fma": 0, "inexact": 0}
        assert widths(counts, arithmetic) == arithmetic, where


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


def test_products_that_add_to_a_split_sum() -> None:
    """Hopper's own matrix products, all in flight in what shared memory there is; tiles come and go by hardware."""
    report = compiled("product", 90)
    assert len(report) == 3
    for tile, formats in report.items():
        for name, counts in formats.items():
            where = f"{tile} {name}: {counts}"
            assert counts["wgmma"] > 0, where
            assert (counts["tma"] > 0) == ("pointers" not in tile), where
            assert counts["SHARED"] <= 227 * 1024, where
            if name == Format.SPLIT24.name:
                assert not any(key.startswith(("LDL", "STL")) for key in counts), where


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: f"sm_{a}")
def test_cuda(architecture: int) -> None:
    report = compiled("cuda", architecture)
    steps = report.pop("step_list_kernel")
    assert len(steps) == STEPS
    for name, counts in steps.items():
        where = f"step {name} sm_{architecture}: {counts}"
        for width, count in wide_of_step(name).items():  # for sm_100 some have a second loop, which does not scale
            assert counts.get(width, 0) >= count, where
        assert_in_registers(counts, where)
        assert counts["fma"] >= 16, where
        assert counts["inexact"] == 0, where
    (norm,) = report.pop("norm_kernel").values()
    assert not any(key.startswith(("LDL", "STL")) for key in norm), norm
    assert norm["inexact"] == 0, norm
    means = report.pop("mean_kernel")
    assert means.keys() == WIDE_OF_MEAN.keys()
    for name, counts in means.items():
        where = f"mean {name} sm_{architecture}: {counts}"
        # The loop over ranks has four at once, whose elements are all asked for, and one for what is left.
        for width, count in WIDE_OF_MEAN[name].items():
            assert counts.get(width, 0) >= count * (4 if width.startswith("LDG") else 1), where
        assert_in_registers(counts, where)
        assert counts["add"] >= 8, where
        assert counts["fma"] == counts["inexact"] == 0, where
    # To fold, finish, rescale, decode, encode and square, each for one tensor and for a list.
    assert len(report) == 2 * 6
    for kernel, variants in report.items():
        assert len(variants) == len(Format)
        other = WIDE_OF_KERNEL.get(kernel.replace("_list", ""))
        for name, counts in variants.items():
            where = f"{kernel} {name} sm_{architecture}: {counts}"
            for width, count in (other or WIDE)[Format[name]].items():
                assert counts.get(width, 0) >= count, where
            assert not any(key.startswith(("LDL", "STL")) for key in counts), where
            assert other is not None or counts["fma"] >= 16, where


def test_cuda_kernels_are_named_by_their_symbols() -> None:
    from compile_kernels import name_cuda

    prefix = "_ZN9accumkern51_GLOBAL__N__e7abd315_18_accumulate_cuda_cu_98f8fdc8"
    named = name_cuda(f"{prefix}13finish_kernelINS_7Plain32ELi90EEEvNS0_10TensorListIXT0_EEENS_5StartE")
    assert named == ("finish_list_kernel", "PLAIN32")
    named = name_cuda(f"{prefix}17accumulate_kernelINS_8MainGradINS_8BFloat16EEELi1EEEvNS0_10Tensor")
    assert named == ("accumulate_kernel", "MAIN_GRAD_BFLOAT16")
    step = f"{prefix}11step_kernelINS_"
    assert name_cuda(f"{step}4AdamILb1EEENS_7Split32ES4_EEvNS0_10Tensor")[1] == "AMSGRAD-SPLIT32-SPLIT32"
    named = name_cuda(f"{step}3SgdILb0EEENS_7Split24ENS_8MainGradINS_8BFloat16EEEEEvNS0_10Tensor")
    assert named == ("step_list_kernel", "SGD-SPLIT24-MAIN_GRAD_BFLOAT16")
    assert name_cuda(f"{prefix}11mean_kernelINS_7Split32EEEvNS_8MeanCallEb") == ("mean_kernel", "SPLIT32")
    assert name_cuda(f"{prefix}11norm_kernelENS_8NormCallE") == ("norm_kernel", "")
    with pytest.raises(ValueError, match="is no kernel's name"):
        name_cuda("_Z4mainv")
