"""The storage formats: accumkern/formats.py against FP64 and exact fractions, and the C++ header over every float."""

import math
import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import accumkern
from accumkern.dtensor import norm_over
from accumkern.formats import BUFFERS, FORMAT_OF_DTYPES, Format, decode, encode, fma, partial_rows, round_to
from accumkern.lost_bits import LostBitsMeter

SPLITS = [Format.SPLIT24, Format.SPLIT32]
WITH_RESIDUAL = [format_ for format_ in Format if format_ is not Format.PLAIN32]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 2.0**-126, 2.0**-149, 3.4028234663852886e38]


def floats(count: int) -> torch.Tensor:
    """Floats of random bits, so that every exponent, subnormals, infinities and NaNs occur; the special ones first."""
    bits = torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    values[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return values


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)


@pytest.fixture(scope="module")
def format_laws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """format_laws.cpp, compiled as setup.py compiles the kernels."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler to compile csrc/accumulate_math.h with")
    program = tmp_path_factory.mktemp("format_laws") / "format_laws"
    arithmetic = ["-ffp-contract=off", "-fno-trapping-math"]
    source = Path(__file__).with_name("format_laws.cpp")
    flags = ["-std=c++17", "-O3", *arithmetic, "-pthread", f"-I{source.parent.parent / 'csrc'}"]
    done = subprocess.run([compiler, *flags, str(source), "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.slow
@pytest.mark.parametrize("format_", SPLITS, ids=lambda f: f.name.lower())
def test_cpp_round_trip_holds_for_all_floats(format_: Format, format_laws: Path) -> None:
    command = [str(format_laws), format_.name.lower(), str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) == 0, f"{done.stdout.strip()} bit patterns break a law"


@pytest.mark.parametrize(
    "format_", [Format.SPLIT32, Format.MAIN_GRAD_BFLOAT16, Format.MAIN_GRAD_FLOAT16, Format.PLAIN32]
)
def test_exact_formats_keep_every_bit(format_: Format) -> None:
    x = floats(1 << 20)
    y = decode(format_, *encode(format_, x))
    nan = x.isnan()
    assert torch.equal(bits_of(y)[~nan], bits_of(x)[~nan])
    assert torch.equal(bits_of(y)[nan], torch.full_like(bits_of(y)[nan], 0x7FC00000))


def test_split24_keeps_sixteen_significant_bits() -> None:
    x = floats(1 << 20)
    y = decode(Format.SPLIT24, *encode(Format.SPLIT24, x))
    normal = x.isfinite() & y.isfinite() & (x.abs() >= 2.0**-126)
    error = (y.double() - x.double()).abs() / x.double().abs()
    assert error[normal].max() <= 2.0**-16
    assert error[normal].max() > 2.0**-17  # the bound is not idle
    overflowed = x.isfinite() & ~y.isfinite()
    assert (x[overflowed].abs() > 3.4e38).all()


@pytest.mark.parametrize("format_", WITH_RESIDUAL, ids=lambda f: f.name.lower())
def test_sum_is_the_value_correctly_rounded(format_: Format) -> None:
    x = floats(1 << 20)
    x = x[~x.isnan()]
    sums, _ = encode(format_, x)
    expected = x.to(format_.sum_dtype)
    different = bits_of(sums) != bits_of(expected)
    if format_ not in SPLITS:
        assert not different.any()
        return
    # Only ties may differ, and go away from zero; split24 rounds what is within 2^-8 of a tie to one first.
    low = bits_of(x)[different] & 0xFFFF
    assert ((low - 0x8000).abs() <= (0x80 if format_ is Format.SPLIT24 else 0)).all()
    assert (sums[different].float().abs() > x[different].abs() - x[different].abs() * 2.0**-15).all()


@pytest.mark.parametrize("format_", WITH_RESIDUAL, ids=lambda f: f.name.lower())
def test_special_values_survive(format_: Format) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, 2.0**-126, -(2.0**-130)])
    sums, residuals = encode(format_, x)
    assert torch.equal(bits_of(decode(format_, sums, residuals)), bits_of(x))
    nan_sum, nan_residual = encode(format_, torch.tensor([math.nan, -math.nan]))
    assert decode(format_, nan_sum, nan_residual).isnan().all()
    if format_ in SPLITS:
        assert torch.equal(bits_of(nan_sum), torch.tensor([0x7FC0, 0x7FC0], dtype=torch.int16))
        assert nan_residual is not None
        assert (nan_residual == 0).all()


@pytest.mark.parametrize("format_", SPLITS, ids=lambda f: f.name.lower())
def test_stale_residual_shifts_by_at_most_half_a_unit_in_the_last_place(format_: Format) -> None:
    sums = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    sums = sums[sums.isfinite()]
    assert format_.residual_dtype is not None
    limits = torch.iinfo(format_.residual_dtype)
    for residual in (limits.min, -1, 1, limits.max):
        value = decode(format_, sums, torch.full(sums.shape, residual, dtype=format_.residual_dtype))
        above = (bits_of(sums).int() + 1).to(torch.int16).view(torch.bfloat16).double()
        spacing = (above - sums.double()).abs().clamp(min=2.0**-133)
        largest = sums.abs() == torch.finfo(torch.bfloat16).max
        shift = (value.double() - sums.double()).abs()
        assert (shift[~largest] <= spacing[~largest] / 2).all()
        assert value.isfinite().all()
    zeros = torch.tensor([0.0, -0.0], dtype=torch.bfloat16)
    negative = torch.full((2,), -1, dtype=format_.residual_dtype)
    assert torch.equal(decode(format_, zeros, negative), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_round_to_is_torchs_cast_with_one_nan(dtype: torch.dtype) -> None:
    x = floats(1 << 20)
    rounded = round_to(dtype, x)
    nan = x.isnan()
    assert torch.equal(bits_of(rounded)[~nan], bits_of(x.to(dtype))[~nan])
    assert len(bits_of(rounded)[nan].unique()) == 1


def test_fma_rounds_once() -> None:
    # Each float by exact arithmetic in fractions.
    exponents = torch.randint(-20, 20, (3, 2000)).float()
    a, b, c = torch.randn(3, 2000) * torch.exp2(exponents)
    c[:500] = -(a[:500].double() * b[:500].double()).float()  # cancellation
    for scale, grad, x, found in zip(a, b, c, fma(torch.ones(()), a, torch.zeros(2000)), strict=True):
        assert found == scale  # 1 * a + 0
        exact = Fraction(scale.item()) * Fraction(grad.item()) + Fraction(x.item())
        result = fma(scale, grad, x).item()
        below, above = (
            torch.nextafter(torch.tensor(result), torch.tensor(direction)).item() for direction in (-math.inf, math.inf)
        )
        error = abs(Fraction(result) - exact)
        assert error <= min(abs(Fraction(below) - exact), abs(Fraction(above) - exact))


def test_dtypes_name_their_format() -> None:
    for (sum_dtype, residual_dtype), format_ in FORMAT_OF_DTYPES.items():
        assert format_.sum_dtype is sum_dtype
        assert format_.residual_dtype is residual_dtype
    assert len(FORMAT_OF_DTYPES) == len(Format)
    assert {f for by_dtype in BUFFERS.values() for f in by_dtype.values()} == set(Format)


def test_partial_rows_cover_every_element() -> None:
    assert [partial_rows(n) for n in (0, 1, 4095, 4096, 4097, 8192)] == [0, 1, 1, 1, 2, 2]


# ---- a device without FP64 ---------------------------------------------------------------------------------------


class NoFp64OnMps(TorchDispatchMode):
    """As on MPS: no tensor of FP64 can be there, and tensors of two devices do not mix."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                assert (tensor.device.type, tensor.dtype) != ("mps", torch.float64), func
        return result


def test_nothing_is_of_fp64_on_a_device_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    group: Any = SimpleNamespace(_device_types=[torch.device("cpu"), torch.device("mps")])
    with FakeTensorMode(), NoFp64OnMps():
        grad = torch.ones(5, dtype=torch.bfloat16, device="mps")
        assert fma(2.0, grad, grad.float()).device.type == "mps"
        norm = norm_over((group,), grad.float().norm(), 2.0)
        assert (norm.device.type, norm.dtype) == ("mps", torch.float32)
        meter = LostBitsMeter()
        for scale in (0.5, torch.tensor(0.5, device="mps")):
            for more in ((), (grad, Tensor.float), (grad,)):
                meter.add(grad, grad, scale, *more)
                meter.folded(grad, grad, None, None)
        monkeypatch.setattr(Tensor, "item", lambda tensor: 1.0)  # a fake tensor has no value
        assert meter.report([{"params": [grad]}]).error == 1


# ---- ties --------------------------------------------------------------------------------------------------------


def ties() -> torch.Tensor:
    """Every finite value that lies in the middle between two normal bfloat16 numbers."""
    upper = torch.arange(0x0080, 0x7F7F, dtype=torch.int32)
    return torch.cat([upper, upper | 0x8000]).mul(0x10000).add(0x8000).view(torch.float32)


@pytest.mark.parametrize("format_", SPLITS, ids=lambda f: f.name.lower())
def test_split_formats_round_ties_away_from_zero(format_: Format) -> None:
    x = ties()
    sums, residuals = encode(format_, x)
    assert (sums.double().abs() > x.double().abs()).all()
    assert torch.equal(decode(format_, sums, residuals), x)


def test_fp32_rounds_ties_to_even_as_torch_does() -> None:
    sums, _ = encode(Format.MAIN_GRAD_BFLOAT16, ties())
    assert (sums.view(torch.int16) & 1 == 0).all()
    assert torch.equal(sums, ties().bfloat16())


@pytest.mark.parametrize("buffer", BUFFERS)
def test_grad_has_ties_away_from_zero_until_finish_rounds_them_to_even(buffer: str) -> None:
    x = ties()
    param = torch.nn.Parameter(torch.zeros_like(x, dtype=torch.bfloat16))
    accumulator = accumkern.attach(torch.optim.SGD([param]), buffer)
    upper = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    for grad in (upper, x - upper):
        param.backward(grad.bfloat16())
    assert param.grad is not None
    is_tie = accumulator.gradient(param) == x  # not of subnormal halves
    assert is_tie.float().mean() > 0.9
    if buffer == "fp32":
        assert torch.equal(param.grad[is_tie], x.bfloat16()[is_tie])
    else:
        assert (param.grad.double().abs() > x.double().abs())[is_tie].all()
    accumulator.finish(2.0)
    assert torch.equal(param.grad[is_tie], (x / 2).bfloat16()[is_tie])
