"""The kernels: every backend, bit for bit, against accumkern/formats.py."""

import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradients import assert_same_bits
from kernel_cases import (
    ALL_FORMATS,
    ALL_STARTS,
    THIRD,
    Row,
    accumulated,
    assert_folded,
    assert_stored,
    columns,
    every_half,
    is_interpreted,
    problem,
    random_bits,
    rounds_once,
    values,
)
from torch import Tensor

from accumkern import accumulate_, available_backends, backends
from accumkern.formats import BLOCK_NUMEL, PARTIALS, Format, Start, decode, encode, partial_rows

SIZES = [0, 1, 7, 8, 9, BLOCK_NUMEL - 1, BLOCK_NUMEL, BLOCK_NUMEL + 1]


def is_exact(backend: str, device: torch.device) -> bool:
    """Return whether a fold rounds once."""
    return backend != "eager" and rounds_once(backend, device)


@ALL_FORMATS
@ALL_STARTS
@pytest.mark.parametrize("scale", [1.0, 0.25, THIRD], ids=["one", "quarter", "third"])
@pytest.mark.eager_on_gpu
def test_bits_agree_with_the_reference(
    backend: str, device: torch.device, format_: Format, start: Start, scale: float
) -> None:
    """Each size alone and all in one list, and a scale that lies on the device."""
    if scale == THIRD and start is not Start.FROM_ZERO and not is_exact(backend, device):
        pytest.skip("the product is rounded before it is added; how far that may go has a test of its own")
    large = 1_000_003 if device.type == "cuda" else 12_289 if is_interpreted(backend, device) else 100_003
    rows = [problem(format_, numel) for numel in (*SIZES, large)]
    if format_ is Format.PLAIN32 and not is_exact(backend, device):
        for grad, _, _ in rows:  # a part of a subnormal FP32 gradient is not exact either
            grad[grad.abs() < 2.0**-124] = 0
    for row in rows:
        assert_folded(backend, device, format_, start, [row], scale)
    assert_folded(backend, device, format_, start, rows, scale)
    for dtype in (torch.float32, torch.float64):
        given = torch.tensor(scale, dtype=dtype, device=device)
        for some in (rows[-1:], rows[:5] if is_interpreted(backend, device) else rows):
            assert_folded(backend, device, format_, start, some, scale, given, what=given)


@pytest.mark.parametrize("start", [Start.CONTINUE, Start.FROM_SUM], ids=lambda s: s.name.lower())
def test_eager_is_within_one_ulp_of_fp32_for_any_scale(start: Start) -> None:
    row = problem(Format.SPLIT32, 100_003)
    want = accumulated(Format.SPLIT32, start, row, THIRD)
    grads, sums, residuals = columns([row], "cpu")
    backends.kernels("eager").fold(Format.SPLIT32, start, grads, sums, residuals, THIRD, None)
    assert residuals is not None
    x = decode(Format.SPLIT32, sums[0], residuals[0])
    # The rounding of the product is half a unit of the product's last place, before cancellation.
    product = (grads[0].double() * THIRD).abs()
    finite = want.isfinite() & x.isfinite()
    bound = product * 2.0**-24 + want.double().abs() * 2.0**-23 + 2.0**-149
    assert ((x.double() - want.double()).abs()[finite] <= bound[finite]).all()


@pytest.mark.parametrize("format_", [f for f in Format if f.residual_dtype is not None], ids=lambda f: f.name.lower())
@pytest.mark.eager_on_gpu
def test_every_half_and_residual_decodes_alike(backend: str, device: torch.device, format_: Format) -> None:
    """Stale pairs too, which no encoder writes: a zero gradient leaves the decoded value to be stored again.

    Every sum stands beside any residuals; if they are FP32, beside those around it and around its ties as well.
    """
    sums = every_half(format_.sum_dtype)
    assert format_.residual_dtype is not None
    residuals = random_bits(format_.residual_dtype, 7 * len(sums)).view(len(sums), 7)
    if format_.residual_dtype is torch.float32:
        tie = 0x8000 if format_ is Format.MAIN_GRAD_BFLOAT16 else 0x1000  # half a last place, in those of FP32
        offsets = torch.tensor([-tie - 1, -tie, -tie + 1, -1, 0, 1, tie - 1, tie, tie + 1], dtype=torch.int32)
        near = (sums.float().view(torch.int32)[:, None] + offsets).view(torch.float32)
        residuals = torch.cat([near, residuals], dim=1)
    sums, residuals = sums.repeat_interleave(residuals.shape[1]), residuals.flatten()
    for zero in (0.0, -0.0):  # -0 leaves -0 + -0 = -0 alone
        grads = torch.full_like(sums, zero)
        assert_folded(backend, device, format_, Start.CONTINUE, [(grads, sums, residuals)], 1.0)


@pytest.mark.parametrize("place", ["first", "middle", "last", "only", "all"])
def test_empty_tensors_anywhere_in_a_list(backend: str, device: torch.device, place: str) -> None:
    sizes = {"first": [0, 5, 9], "middle": [5, 0, 9], "last": [5, 9, 0], "only": [0], "all": [0, 0, 0]}[place]
    check_list(backend, device, sizes)


@pytest.mark.parametrize("count", [1, 2, 89, 90, 91, 180, 181, 300])
def test_lists(backend: str, device: torch.device, count: int) -> None:
    """Around the capacity of one launch, with empty tensors first, in the middle and last, and a large one."""
    sizes = torch.randint(0, 600, (count,)).tolist()
    if count > 2:
        sizes[1] = 70_000
        sizes = [0, *sizes[: count // 2], 0, *sizes[count // 2 :], 0]
    check_list(backend, device, sizes)


def test_list_of_two_thousand(backend: str, device: torch.device) -> None:
    count = 400 if is_interpreted(backend, device) else 2000
    check_list(backend, device, torch.randint(0, 300, (count,)).tolist())


def test_list_of_small_and_large(backend: str, device: torch.device) -> None:
    check_list(backend, device, [3, 70_000, 0, 4096, 65_536, 65_537, 1])


def check_list(backend: str, device: torch.device, sizes: list[int]) -> None:
    """Fold tensors of their own, and views of one, which are not aligned."""
    formats = [Format.SPLIT24, Format.MAIN_GRAD_FLOAT16, Format.PLAIN32]
    for format_ in formats[:1] if is_interpreted(backend, device) else formats:
        whole = problem(format_, sum(sizes))
        for aligned in (True, False):
            lists = [None if x is None else list(x.to(device, copy=True).split(sizes)) for x in whole]
            if aligned:
                lists = [None if tensors is None else [x.clone() for x in tensors] for tensors in lists]
            backends.kernels(backend).fold(format_, Start.CONTINUE, *lists, 1.0, None)  # type: ignore[arg-type]
            grads, sums, residuals = (None if tensors is None else [torch.cat(tensors)] for tensors in lists)
            assert grads is not None
            assert sums is not None
            assert_stored(format_, Start.CONTINUE, [whole], 1.0, grads, sums, residuals, f"aligned: {aligned}")


@pytest.mark.parametrize("scale", [0.5, THIRD], ids=["half", "third"])
def test_formats_may_be_mixed_in_one_call(backend: str, device: torch.device, scale: float) -> None:
    if scale == THIRD and not is_exact(backend, device):
        pytest.skip("the product is rounded before it is added")
    mixed = [Format.SPLIT24, Format.MAIN_GRAD_FLOAT16, Format.SPLIT32, Format.SPLIT24, Format.MAIN_GRAD_BFLOAT16]
    rows = [problem(format_, 4097) for format_ in mixed]
    grads, sums, residuals = columns(rows, device)
    accumulate_(grads, sums, residuals, torch.tensor(scale, device=device), backend=backend)
    assert residuals is not None
    for i, format_ in enumerate(mixed):
        stored = grads[i : i + 1], sums[i : i + 1], residuals[i : i + 1]
        assert_stored(format_, Start.CONTINUE, rows[i : i + 1], scale, *stored, format_.name)


@ALL_FORMATS
@pytest.mark.eager_on_gpu
def test_sum_may_be_the_gradient_itself_from_zero(backend: str, device: torch.device, format_: Format) -> None:
    rows = [problem(format_, numel) for numel in (*SIZES, 70_001)]
    if backend == "eager" and format_ is Format.PLAIN32:
        for grad, _, _ in rows:
            grad[grad.abs() < 2.0**-120] = 0
    for some in [*([row] for row in rows), rows]:
        _, grads, residuals = columns([(low, grad, residual) for (grad, low, residual) in some], device)
        backends.kernels(backend).fold(format_, Start.FROM_ZERO, grads, grads, residuals, 0.125, None)
        assert_stored(format_, Start.FROM_ZERO, some, 0.125, grads, grads, residuals)


# ---- what is read and written ------------------------------------------------------------------------------------

ROOM = 24  # elements around a tensor that must not be written


def at_an_offset(tensors: list[Tensor], shift: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """(buffers of 85s, views of them that hold the tensors), on the device."""
    buffers = [torch.full((len(x) + ROOM,), 85, dtype=torch.int8).to(x.dtype).to(device) for x in tensors]
    views = [buffer[shift : shift + len(x)] for buffer, x in zip(buffers, tensors, strict=True)]
    for view, x in zip(views, tensors, strict=True):
        view.copy_(x)
    return buffers, views


def nothing_around_is_written(buffers: list[Tensor], shift: int) -> bool:
    around = [torch.cat([x[:shift], x[len(x) - ROOM + shift :]]) for x in buffers]
    return all(bool((x == 85).all()) for x in around)


# By how many elements grad, sum and residual are slid.
SLIDES = [*[(n, n, n) for n in (0, 1, 2, 3, 5, 8, 13)], (8, 0, 3), (0, 5, 16)]


@ALL_FORMATS
def test_writes_its_range_and_nothing_else(backend: str, device: torch.device, format_: Format) -> None:
    """Views slide over buffers of sentinels, so that every alignment occurs: alone, and all in one list."""
    for slides in [*([slide] for slide in SLIDES), SLIDES]:
        rows = [problem(format_, 2 * BLOCK_NUMEL + 5) for _ in slides]
        views: list[list[Tensor]] = [[], [], []]
        written = []
        for row, slide in zip(rows, slides, strict=True):
            for column, x, shift in zip(views, row, slide, strict=True):
                if x is not None:
                    buffers, (view,) = at_an_offset([x], shift, device)
                    column.append(view)
                    written.append((buffers, shift))
        grads, sums, residuals = views[0], views[1], views[2] or None
        backends.kernels(backend).fold(format_, Start.CONTINUE, grads, sums, residuals, 1.0, None)
        assert_stored(format_, Start.CONTINUE, rows, 1.0, grads, sums, residuals, slides)
        assert all(nothing_around_is_written(buffers, shift) for buffers, shift in written), slides


SHIFTS_AND_SIZES = [(0, [0]), (0, [1]), (0, [4096]), (0, [100_003]), (3, [9000]), (1, [3, 0, 70_000, 4097, 65_536, 1])]


def assert_all_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (tensor, expected) in enumerate(zip(found, wanted, strict=True)):
        assert_same_bits(tensor, expected, i)


@ALL_FORMATS
@pytest.mark.parametrize(("shift", "sizes"), [*SHIFTS_AND_SIZES, (0, [5, 4096] * 46)], ids=lambda _: "")
def test_decode(backend: str, device: torch.device, format_: Format, shift: int, sizes: list[int]) -> None:
    sums, residuals = [], []
    for n in sizes:
        total, residual = encode(format_, values(n))
        total[::7] = 0  # beside what was stored with another sum
        sums.append(total)
        if residual is not None:
            residual[::5] = -residual[::5]
            residuals.append(residual)
    wanted = [decode(format_, total, residuals[i] if residuals else None) for i, total in enumerate(sums)]
    buffers, decoded = at_an_offset([torch.zeros(n) for n in sizes], shift, device)
    _, given = at_an_offset(sums, shift, device)
    _, lows = at_an_offset(residuals, shift, device)
    backends.kernels(backend).decode(format_, given, lows or None, decoded)
    assert_all_same_bits(decoded, wanted)
    assert_all_same_bits([*given, *lows], [*sums, *residuals])  # only read
    assert nothing_around_is_written(buffers, shift)


@ALL_FORMATS
@pytest.mark.parametrize("scalar", ["number", "tensor"])
@pytest.mark.parametrize(("shift", "sizes"), [*SHIFTS_AND_SIZES, (0, [5, 4096] * 46)], ids=lambda _: "")
@pytest.mark.eager_on_gpu
def test_encode(backend: str, device: torch.device, format_: Format, shift: int, sizes: list[int], scalar: str) -> None:
    given = [values(n) for n in sizes]
    wanted = [encode(format_, x / 3.0) for x in given]
    stored = [(torch.ones_like(total), None if low is None else torch.ones_like(low)) for total, low in wanted]
    buffers, sums = at_an_offset([total for total, _ in stored], shift, device)
    low_buffers, lows = at_an_offset([low for _, low in stored if low is not None], shift, device)
    _, moved = at_an_offset(given, shift, device)
    divisor = 3.0 if scalar == "number" else torch.tensor(3.0, device=device)
    backends.kernels(backend).encode(format_, moved, divisor, sums, lows or None)
    assert_all_same_bits(sums, [total for total, _ in wanted])
    assert_all_same_bits(lows, [low for _, low in wanted if low is not None])
    assert_all_same_bits(moved, given)  # only read
    assert nothing_around_is_written([*buffers, *low_buffers], shift)


@ALL_FORMATS
@pytest.mark.parametrize("start", [Start.CONTINUE, Start.FROM_SUM], ids=lambda s: s.name.lower())
@pytest.mark.parametrize("scalars", ["numbers", "tensors", "one of each"])
@pytest.mark.parametrize(("shift", "sizes"), [*SHIFTS_AND_SIZES, (0, [5, 4096] * 46)], ids=lambda _: "")
@pytest.mark.eager_on_gpu
def test_rescale(
    backend: str, device: torch.device, format_: Format, start: Start, shift: int, sizes: list[int], scalars: str
) -> None:
    """Any bits, by factors that are no powers of two; from the sum alone, whatever the residuals are."""
    stored = [problem(format_, n)[1:] for n in sizes]
    wanted = []
    for total, low in stored:
        x = decode(format_, total, low if start is Start.CONTINUE else None)
        wanted.append(encode(format_, (x / 3.0) * torch.tensor(0.7)))
    buffers, sums = at_an_offset([total for total, _ in stored], shift, device)
    low_buffers, lows = at_an_offset([low for _, low in stored if low is not None], shift, device)
    divisor = 3.0 if scalars == "numbers" else torch.tensor(3.0, dtype=torch.float64, device=device)
    factor = torch.tensor(0.7, device=device) if scalars == "tensors" else 0.7
    backends.kernels(backend).rescale(format_, start, sums, lows or None, divisor, factor)
    assert_all_same_bits(sums, [total for total, _ in wanted])
    assert_all_same_bits(lows, [low for _, low in wanted if low is not None])
    assert nothing_around_is_written([*buffers, *low_buffers], shift)


@ALL_FORMATS
@ALL_STARTS
@pytest.mark.eager_on_gpu
def test_partial_sums_of_squares(backend: str, device: torch.device, format_: Format, start: Start) -> None:
    for sizes in ([70_001], [0, 1, 4095, 4096, 4097, 0, 70_001, 0]):
        rows: list[Row] = [(torch.randn(n).to(format_.sum_dtype), *encode(format_, torch.randn(n))) for n in sizes]
        first, second = ([torch.full((partial_rows(n), 3), math.nan, device=device) for n in sizes] for _ in range(2))
        assert_folded(backend, device, format_, start, rows, 0.5, partials=first)
        assert_folded(backend, device, format_, start, rows, 0.5, partials=second)
        for i, row in enumerate(rows):
            x = accumulated(format_, start, row, 0.5)
            before = row[1].double() if start is Start.FROM_SUM else torch.zeros_like(x).double()
            for column, exact in enumerate((row[0].double(), x.double(), before)):
                blocks = exact.split(BLOCK_NUMEL) if len(exact) else []
                wanted = torch.tensor([block.square().sum() for block in blocks], dtype=torch.float64)
                torch.testing.assert_close(first[i][:, column].double().cpu(), wanted, rtol=1e-5, atol=0.0)
            assert_same_bits(first[i], second[i], "a second run")  # deterministic


@ALL_FORMATS
@pytest.mark.parametrize("start", [Start.CONTINUE, Start.FROM_SUM], ids=lambda s: s.name.lower())
@pytest.mark.parametrize(("shift", "sizes"), [*SHIFTS_AND_SIZES, (0, [5, 4096] * 46)], ids=lambda _: "")
@pytest.mark.eager_on_gpu
def test_squares(
    backend: str, device: torch.device, format_: Format, start: Start, shift: int, sizes: list[int]
) -> None:
    """Near FP64, to the bit what a fold of zeros leaves of the same values, and nothing else written."""
    pairs = [encode(format_, 1 + torch.randn(n)) for n in sizes]
    stored: list[tuple[Tensor, Tensor | None]] = []
    for total, low in pairs:
        total[::7] = 0.5  # beside what was stored with another sum
        stored.append((total, low))
    counts = [partial_rows(n) for n in sizes]
    buffers, (partials,) = at_an_offset([torch.zeros(sum(counts))], shift, device)
    _, sums = at_an_offset([total for total, _ in stored], shift, device)
    _, lows = at_an_offset([low for _, low in stored if low is not None], shift, device)
    kernels = backends.kernels(backend)
    kernels.squares(format_, start, sums, lows or None, partials)
    assert_all_same_bits(
        [*sums, *lows], [*[total for total, _ in stored], *[low for _, low in stored if low is not None]]
    )
    assert nothing_around_is_written(buffers, shift)
    for found, (total, low) in zip(partials.split(counts), stored, strict=True):
        x = decode(format_, total, low if start is Start.CONTINUE else None).double()
        wanted = torch.tensor([block.square().sum() for block in x.split(BLOCK_NUMEL) if len(block)]).double()
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-6, atol=0.0)
    zeros = [torch.zeros_like(total) for total in sums]
    rows = [torch.full((partial_rows(n), PARTIALS), math.nan, device=device) for n in sizes]
    kernels.fold(format_, start, zeros, sums, lows or None, 1.0, rows)
    assert_same_bits(partials, torch.cat(rows)[:, 1].contiguous())


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf, 3.0e38])
def test_squares_of_what_is_not_finite(backend: str, device: torch.device, special: float) -> None:
    for format_ in (Format.SPLIT24, Format.PLAIN32):
        x = torch.ones(3 * BLOCK_NUMEL)
        x[BLOCK_NUMEL + 5] = special
        total, low = (None if t is None else t.to(device) for t in encode(format_, x))
        assert total is not None
        partials = torch.zeros(3, device=device)
        backends.kernels(backend).squares(format_, Start.CONTINUE, [total], None if low is None else [low], partials)
        assert partials[0] == partials[2] == BLOCK_NUMEL
        assert partials[1].isnan() if math.isnan(special) else partials[1] == math.inf


def test_tensors_without_memory_are_refused() -> None:
    if available_backends()["cpu"] is not None:
        pytest.skip(f"backend cpu: {available_backends()['cpu']}")
    zero = torch._efficientzerotensor((5,), dtype=torch.bfloat16)
    total, residual = torch.ones(5).bfloat16(), torch.zeros(5, dtype=torch.int8)
    fold = backends.kernels("cpu").fold
    with pytest.raises(RuntimeError, match=r"a tensor has no memory, .*clone\(\) it first"):
        fold(Format.SPLIT24, Start.CONTINUE, [zero], [total], [residual], 1.0, None)
    assert (total == 1).all()


def test_cpu_result_does_not_depend_on_threads() -> None:
    if available_backends()["cpu"] is not None:
        pytest.skip(f"backend cpu: {available_backends()['cpu']}")
    sizes = [70_001, 3, 0, 200_000, 4096]
    rows: list[Row] = [(torch.randn(n).bfloat16(), *encode(Format.SPLIT24, torch.randn(n))) for n in sizes]
    measured: list[list[Tensor]] = []
    squares: list[Tensor] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            measured.append([torch.full((partial_rows(n), 3), 7.0) for n in sizes])
            assert_folded("cpu", "cpu", Format.SPLIT24, Start.CONTINUE, rows, 1.0, partials=measured[-1])
            for partials, alone in zip(measured[-1], measured[0], strict=True):
                assert_same_bits(partials, alone, f"partial sums of {threads} threads")
            _, sums, residuals = columns(rows, "cpu")
            squares.append(torch.full((sum(map(partial_rows, sizes)),), 7.0))
            backends.kernels("cpu").squares(Format.SPLIT24, Start.CONTINUE, sums, residuals, squares[-1])
            assert_same_bits(squares[-1], squares[0])
    finally:
        torch.set_num_threads(before)


def test_native_code_shares_torchs_thread_pool() -> None:
    """Two OpenMP pools would fight for the cores: the extension's parallel regions must run in torch's."""
    if available_backends()["cpu"] is not None or not sys.platform.startswith("linux"):
        pytest.skip("needs the extension, and Linux's /proc")
    code = (
        "import os, torch\n"
        "torch.set_num_threads(3)\n"
        "a = torch.randn(1 << 22); a.add_(a)\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "import accumkern\n"
        "g = torch.randn(1 << 22).bfloat16(); s = torch.zeros_like(g); r = torch.zeros(1 << 22, dtype=torch.int8)\n"
        "accumkern.accumulate_([g], [s], [r], backend='cpu')\n"
        "print(before, len(os.listdir('/proc/self/task')))\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}  # a limit of threads
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env
    ).stdout.split()
    assert out[0] == out[1]
    assert int(out[0]) >= 3


def test_accuracy_of_a_long_sum_that_agrees_in_sign(backend: str, device: torch.device) -> None:
    """N = 512: stock bfloat16 stops growing, FP32 and the split formats go on."""
    if is_interpreted(backend, device):
        pytest.skip("512 launches take long in triton's interpreter; bits are compared above")
    numel, count = 2000, 512
    micro = [(3 + torch.randn(numel)).bfloat16() for _ in range(count)]
    truth = torch.stack(micro).double().sum(0)
    stock = torch.zeros(numel, dtype=torch.bfloat16)
    single = torch.zeros(numel)
    for grad in micro:
        stock += grad
        single += grad.float()

    def error(x: Tensor) -> float:
        return float((x.cpu().double() - truth).norm() / truth.norm())

    for format_, limit in ((Format.SPLIT24, 5e-4), (Format.SPLIT32, 1e-5), (Format.MAIN_GRAD_BFLOAT16, 1e-5)):
        total = torch.zeros(numel, dtype=torch.bfloat16, device=device)
        residual = torch.zeros(numel, dtype=format_.residual_dtype, device=device)
        for grad in micro:
            accumulate_([grad.to(device)], [total], [residual], backend=backend)
        result = decode(format_, total, residual)
        assert error(result) < limit
        if format_ is not Format.SPLIT24:
            assert_same_bits(result, single)
    assert error(stock) > 1e-1


# Loop -> the least times that it is compiled for one instruction set.
LOOPS_OF_FOLDS = {
    # formats x starts x with and without squares; whole chunks, and what is left at the end of a tensor
    "fold_pairs": 2 * 3 * 2,
    "fold_elements": 5 * 3 * 2 + 2 * 3,
    # of finish, and of rescale: whole chunks by pairs in two formats; what is alike from the sum alone may be merged
    "finish_elements": 5 * 2 * 2 + 5 * 2 + 3 * 2 - 2,
    "rescale_pairs": 2 * 2,
    "decode_elements": 5 * 2,
    "encode_elements": 5 * 2,
    "square_pairs": 2 * 2,
    "square_elements": 5 * 2 + 3 * 2,
}
_STEPS = 4 * 2 * 4 * 2  # updates, formats of weights, of gradients; whole chunks, and what is left
LOOPS_OF_STEPS = {
    "decode_elements": _STEPS,  # of gradients and of weights
    "scale_elements": _STEPS,
    "update_elements": _STEPS,
    "encode_weights": _STEPS,
}
LOOPS_OF_MEANS = {"add_elements": 2, "add_pairs": 2, "store_elements": 2, "store_pairs": 2}  # of two formats


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels choose among x86 instruction sets")
@pytest.mark.parametrize(
    ("name", "loops"),
    [("accumulate_cpu.cpp", LOOPS_OF_FOLDS), ("step_cpu.cpp", LOOPS_OF_STEPS), ("mean_cpu.cpp", LOOPS_OF_MEANS)],
)
def test_compiler_vectorises_the_cpu_kernels(name: str, loops: dict[str, int], tmp_path: Path) -> None:
    """The compiler's own report: each instruction set's loops are vectorised at its width."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to ask")
    folder = Path(__file__).resolve().parent.parent / "csrc"
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fopenmp", "-fPIC"]
    report = subprocess.run(
        [compiler, *flags, "-fopt-info-vec-optimized", "-c", str(folder / name), "-o", str(tmp_path / "a.o")],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
    ).stderr
    places = {}
    for source in (name, "cpu.h"):
        lines = (folder / source).read_text().splitlines()
        for first, text in enumerate(lines):
            found = re.match(r"ACCUMKERN_INLINE void (\w+)\(", text)
            if found and found[1] in loops:
                loop = next(i for i in range(first, len(lines)) if "for (int64_t i = 0; i < " in lines[i])
                places[found[1]] = f"{source}:{loop + 1}:"
    assert places.keys() == loops.keys()
    for width in (32, 64):
        vectorised = [text for text in report.splitlines() if f"{width} byte" in text]
        for loop, least in loops.items():
            assert sum(places[loop] in text for text in vectorised) >= least, f"{loop}, {width} bytes: {report}"
