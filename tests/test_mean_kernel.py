"""The mean over ranks: every backend against accumkern/formats.py, bit for bit, and where it reads and writes."""

from __future__ import annotations

import math

import pytest
import torch
from gradients import assert_same_bits
from kernel_cases import is_interpreted, problem
from test_kernels import at_an_offset, nothing_around_is_written
from torch import Tensor

from accumkern import available_backends, backends
from accumkern.formats import BLOCK_NUMEL, Format, decode, encode

SPLIT = pytest.mark.parametrize("format_", [Format.SPLIT24, Format.SPLIT32], ids=lambda f: f.name.lower())
Parts = tuple[Tensor, Tensor]  # (sums, residuals), both (ranks, numel)


def parts(format_: Format, ranks: int, numel: int) -> Parts:
    """Return what ranks have: any bits, values that interact, and pairs that no kernel would have left."""
    rows = [problem(format_, numel)[1:] for _ in range(ranks)]
    for i, (total, _) in enumerate(rows):
        total[i % 5 :: 5] = torch.tensor(-0.0 if i % 2 else 0.0)  # beside residuals of either sign
    return torch.stack([total for total, _ in rows]), torch.stack([low for _, low in rows if low is not None])


def mean_of(format_: Format, stored: Parts, divisor: float) -> Parts:
    """Return (sum, residual) by the reference, one rank after another."""
    x, *others = (decode(format_, total, low) for total, low in zip(*stored, strict=True))
    for other in others:
        x = x + other
    total, low = encode(format_, x / torch.tensor(divisor, dtype=torch.float32))
    assert low is not None
    return total, low


def apart(tensor: Tensor, gap: int, shift: int, device: torch.device) -> Tensor:
    """Return a matrix whose rows lie in a larger buffer, `gap` elements from each other, the first after `shift`."""
    ranks, numel = tensor.shape
    buffer = torch.full((shift + ranks * (numel + gap),), 85, dtype=torch.int8).to(tensor.dtype).to(device)
    return buffer.as_strided(tensor.shape, (numel + gap, 1), shift).copy_(tensor)


def check(
    backend: str,
    device: torch.device,
    format_: Format,
    stored: Parts,
    divisor: float = 3.0,
    given: float | Tensor | None = None,
    gaps: tuple[int, int] = (0, 0),
    shift: int = 0,
) -> None:
    """Compare the kernel with the reference, its tensors lying apart and aside; what it reads stays."""
    sums, residuals = (apart(tensor, gap, shift, device) for tensor, gap in zip(stored, gaps, strict=True))
    wanted = mean_of(format_, stored, divisor)
    buffers, found = at_an_offset([torch.ones_like(tensor) for tensor in wanted], shift, device)
    backends.kernels(backend).mean(format_, sums, residuals, divisor if given is None else given, found[0], found[1])
    what = f"{tuple(sums.shape)}, gaps {gaps}, shift {shift}"
    for tensor, expected in zip((*found, sums, residuals), (*wanted, *stored), strict=True):
        assert_same_bits(tensor.contiguous(), expected, what)
    assert nothing_around_is_written(buffers, shift)


@SPLIT
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 127, 128, 129, 2047, 2049, BLOCK_NUMEL, BLOCK_NUMEL + 1, 70_001])
@pytest.mark.eager_on_gpu
def test_bits_agree_with_the_reference(backend: str, device: torch.device, format_: Format, numel: int) -> None:
    if is_interpreted(backend, device) and numel > 10_000:
        pytest.skip("many programs take long in triton's interpreter")
    for ranks in (1, 2, 5):
        check(backend, device, format_, parts(format_, ranks, numel))


@SPLIT
@pytest.mark.parametrize("ranks", [*range(1, 10), 130])
@pytest.mark.eager_on_gpu
def test_any_number_of_ranks(backend: str, device: torch.device, format_: Format, ranks: int) -> None:
    check(backend, device, format_, parts(format_, ranks, 4500), divisor=float(ranks))


@SPLIT
@pytest.mark.parametrize("shift", [0, 1, 3, 8])
@pytest.mark.parametrize("gaps", [(0, 0), (16, 16), (4, 0), (0, 4), (1, 3), (1000, 77)], ids=str)
def test_rows_lie_anywhere(
    backend: str, device: torch.device, format_: Format, gaps: tuple[int, int], shift: int
) -> None:
    """Rows of whole vectors, which are aligned or not by where they begin and how far apart they are."""
    check(backend, device, format_, parts(format_, 3, 4096 + 32), gaps=gaps, shift=shift)


@SPLIT
@pytest.mark.parametrize("divisor", [1.0, 0.1, 2.0**-149, 3.4e38, 0.0, -2.0, math.inf, math.nan], ids=str)
@pytest.mark.eager_on_gpu
def test_divisors(backend: str, device: torch.device, format_: Format, divisor: float) -> None:
    stored = parts(format_, 2, 1000)
    for given in (divisor, *(torch.tensor(divisor, dtype=d, device=device) for d in (torch.float32, torch.float64))):
        check(backend, device, format_, stored, divisor, given)


@SPLIT
@pytest.mark.eager_on_gpu
def test_zeros_of_either_sign(backend: str, device: torch.device, format_: Format) -> None:
    """-0 stays where all are -0, and a residual below it, which is nobody's, counts as none."""
    zeros = torch.tensor([[0.0, 0.0], [0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0]]).bfloat16().T.repeat(1, 40)
    assert format_.residual_dtype is not None
    for low in (0, -1, 1):
        residuals = torch.full(zeros.shape, low, dtype=format_.residual_dtype)
        for ranks in (1, 2):
            check(backend, device, format_, (zeros[:ranks].contiguous(), residuals[:ranks]))


@SPLIT
def test_ranks_are_added_in_their_order(backend: str, device: torch.device, format_: Format) -> None:
    """(2^127 + 2^127) - 2^127 is infinite, and 2^24 + 1 + 1 - 2^24 is 0 in FP32; in another order they are not."""
    columns = torch.tensor([[2.0**127, 2.0**127, -(2.0**127), 0.0], [2.0**24, 1.0, 1.0, -(2.0**24)]])
    x = columns.repeat(150, 1).T.contiguous()
    total, low = encode(format_, x)
    assert low is not None
    wanted = mean_of(format_, (total, low), 1.0)
    assert decode(format_, *wanted)[:2].tolist() == [math.inf, 0.0]
    check(backend, device, format_, (total, low), 1.0)


@SPLIT
@pytest.mark.parametrize(("of_sum", "of_residual"), [(0, 0), (2, 2), (1, 2)])
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.eager_on_gpu
def test_a_row_may_be_written(
    backend: str, device: torch.device, format_: Format, of_sum: int, of_residual: int, shift: int
) -> None:
    stored = parts(format_, 3, 9001)
    sums, residuals = (apart(tensor, 16, shift, device) for tensor in stored)
    backends.kernels(backend).mean(format_, sums, residuals, 3.0, sums[of_sum], residuals[of_residual])
    wanted = mean_of(format_, stored, 3.0)
    for tensor, before, row, expected in zip((sums, residuals), stored, (of_sum, of_residual), wanted, strict=True):
        after = before.clone()
        after[row] = expected
        assert_same_bits(tensor.contiguous(), after)


def test_cpu_result_does_not_depend_on_threads() -> None:
    if available_backends()["cpu"] is not None:
        pytest.skip(f"backend cpu: {available_backends()['cpu']}")
    stored, before = parts(Format.SPLIT24, 3, 150_001), torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            check("cpu", torch.device("cpu"), Format.SPLIT24, stored)
    finally:
        torch.set_num_threads(before)


def test_other_formats_are_refused() -> None:
    if available_backends()["cpu"] is not None:
        pytest.skip(f"backend cpu: {available_backends()['cpu']}")
    x, out = torch.ones(2, 5).bfloat16(), torch.ones(5)
    with pytest.raises(ValueError, match="the mean over ranks is of split formats"):
        backends.kernels("cpu").mean(Format.MAIN_GRAD_BFLOAT16, x, torch.ones(2, 5), 2.0, out.bfloat16(), out)
