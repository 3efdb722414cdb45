"""The CUDA kernels' logic without a GPU: csrc/*.cu compiled for the CPU and put through the kernel tests.

A C++ compiler gets the files as they are, but for their launches, with cuda_on_cpu/cuda_runtime.h in place of NVIDIA's
header. That shows which elements are read and written, in which format and how wide, how lists are cut into launches
and squares added up. It shows no race, no speed, and nothing of the GPU's own arithmetic: for those, see
test_machine_code.py and test_gpu.py.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_finish import test_kernel_bits as test_finish_bits
from test_kernels import (
    test_bits_agree_with_the_reference,
    test_decode,
    test_empty_tensors_anywhere_in_a_list,
    test_encode,
    test_every_half_and_residual_decodes_alike,
    test_list_of_small_and_large,
    test_list_of_two_thousand,
    test_lists,
    test_partial_sums_of_squares,
    test_rescale,
    test_squares,
    test_squares_of_what_is_not_finite,
    test_sum_may_be_the_gradient_itself_from_zero,
    test_writes_its_range_and_nothing_else,
)
from test_mean_kernel import test_a_row_may_be_written as test_mean_a_row_may_be_written
from test_mean_kernel import test_any_number_of_ranks as test_mean_any_number_of_ranks
from test_mean_kernel import test_bits_agree_with_the_reference as test_mean_bits_agree_with_the_reference
from test_mean_kernel import test_divisors as test_mean_divisors
from test_mean_kernel import test_ranks_are_added_in_their_order as test_mean_ranks_are_added_in_their_order
from test_mean_kernel import test_rows_lie_anywhere as test_mean_rows_lie_anywhere
from test_mean_kernel import test_zeros_of_either_sign as test_mean_zeros_of_either_sign
from test_norm_kernel import test_bits_of_torch as test_norm_bits_of_torch
from test_norm_kernel import (
    test_divisors_on_the_device_that_nobody_has_looked_at,
    test_many_partial_sums,
    test_one_of_many_is_not_finite,
    test_sums_beyond_fp32_have_a_norm,
)
from test_step_kernels import (
    test_a_nan_stays_the_maximum,
    test_an_infinite_weight_stays_without_decay,
    test_nothing_is_written_where_the_step_is_skipped,
    test_what_overflows,
    test_zeros_of_either_sign,
)
from test_step_kernels import test_a_zero_skips_nothing as test_step_a_zero_skips_nothing
from test_step_kernels import test_bits_agree_for_all_options as test_step_bits_agree_for_all_options
from test_step_kernels import test_bits_agree_with_the_reference as test_step_bits_agree_with_the_reference
from test_step_kernels import test_empty_tensors_anywhere_in_a_list as test_step_empty_tensors_anywhere_in_a_list
from test_step_kernels import test_lists as test_step_lists
from test_step_kernels import test_writes_its_range_and_nothing_else as test_step_writes_its_range_and_nothing_else

from accumkern import backends

__all__ = [
    "test_a_nan_stays_the_maximum",
    "test_an_infinite_weight_stays_without_decay",
    "test_bits_agree_with_the_reference",
    "test_decode",
    "test_divisors_on_the_device_that_nobody_has_looked_at",
    "test_empty_tensors_anywhere_in_a_list",
    "test_encode",
    "test_every_half_and_residual_decodes_alike",
    "test_finish_bits",
    "test_list_of_small_and_large",
    "test_list_of_two_thousand",
    "test_lists",
    "test_many_partial_sums",
    "test_mean_a_row_may_be_written",
    "test_mean_any_number_of_ranks",
    "test_mean_bits_agree_with_the_reference",
    "test_mean_divisors",
    "test_mean_ranks_are_added_in_their_order",
    "test_mean_rows_lie_anywhere",
    "test_mean_zeros_of_either_sign",
    "test_norm_bits_of_torch",
    "test_nothing_is_written_where_the_step_is_skipped",
    "test_one_of_many_is_not_finite",
    "test_partial_sums_of_squares",
    "test_rescale",
    "test_squares",
    "test_squares_of_what_is_not_finite",
    "test_step_a_zero_skips_nothing",
    "test_step_bits_agree_for_all_options",
    "test_step_bits_agree_with_the_reference",
    "test_step_empty_tensors_anywhere_in_a_list",
    "test_step_lists",
    "test_step_writes_its_range_and_nothing_else",
    "test_sums_beyond_fp32_have_a_norm",
    "test_sum_may_be_the_gradient_itself_from_zero",
    "test_what_overflows",
    "test_writes_its_range_and_nothing_else",
    "test_zeros_of_either_sign",
]

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
LAUNCH = re.compile(r"(\w+_kernel(?:<[\w, ]+>)?)<<<(\w+), (\w+), 0, stream>>>\((.*)\);")
SOURCES = ("accumulate_cuda", "step_cuda", "norm_cuda", "mean_cuda")


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The extension with kernels that take CPU tensors for CUDA's, and report what the sanitizer finds on stderr."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile with")
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    launches = 0
    for name in SOURCES:
        source, count = LAUNCH.subn(
            r"emulator::launch(\2, \3, [&] { \1(\4); });", (ROOT / f"csrc/{name}.cu").read_text()
        )
        launches += count
        assert "<<<" not in source
        (folder / f"{name}.cpp").write_text(source)
    assert launches == len(backends.Kernels._fields) - 2  # fold_into and fold_alike launch what a fold does
    paths = [str(ROOT / "tests/cuda_on_cpu"), str(ROOT / "csrc"), pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-std=c++17", "-ffp-contract=off", "-fPIC", *(f"-I{path}" for path in paths)]
    flags += ['-DACCUMKERN_CUDA_TARGETS="cpu"', '-DACCUMKERN_VERSION="0"', '-DACCUMKERN_SOURCES="0"']

    def compile_(*arguments: str | Path) -> None:
        done = subprocess.run([compiler, *flags, *map(str, arguments)], capture_output=True, text=True)
        if "-lubsan" in done.stderr:
            pytest.skip("g++ has no libubsan, which tells what is not aligned")
        assert done.returncode == 0, done.stderr

    for name in SOURCES:
        compile_("-O1", "-fsanitize=undefined", "-c", folder / f"{name}.cpp", "-o", folder / f"{name}.o")
    library, compiled = folder / "_C.so", [folder / f"{name}.o" for name in SOURCES]
    compile_("-shared", *(ROOT / "csrc").glob("*.cpp"), *compiled, "-lubsan", "-o", library)
    spec = importlib.util.spec_from_file_location("cuda_on_cpu._C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def backend(extension: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[str]:
    """The cuda backend over that extension, told device 0 and its default stream where CPU tensors name the CPU."""
    from accumkern.backends import native

    def on_device(function: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: function(*arguments[:-2], 0, 0)

    functions = {name: on_device(getattr(extension, name)) for name in ("run", "squares", "step", "norm", "mean")}
    numbers = {
        name.upper(): getattr(extension, name.upper()) for name in ("fold", "finish", "rescale", "decode", "encode")
    }
    monkeypatch.setattr(native, "_C", SimpleNamespace(**functions, **numbers))
    yield "cuda"
    assert "runtime error" not in capfd.readouterr().err


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")
