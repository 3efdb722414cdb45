"""The kernels: every backend, bit for bit, against accumkern/formats.py."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accumkern import accumulate_, available_backends, backends
from accumkern.formats import BLOCK_NUMEL, Format, Start, decode, encode, fma, partial_rows

ALL_FORMATS = pytest.mark.parametrize("format_", list(Format), ids=lambda f: f.name.lower())
ALL_STARTS = pytest.mark.parametrize("start", list(Start), ids=lambda s: s.name.lower())
SIZES = [0, 1, 7, 8, 9, BLOCK_NUMEL - 1, BLOCK_NUMEL, BLOCK_NUMEL + 1, 100_003]
THIRD = 1 / 3  # no power of two: tells a fused multiply-add from a rounded product


def bits_of(x: Tensor) -> Tensor:
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(bits_of(a), bits_of(b).to(a.device))


def values(numel: int) -> Tensor:
    """FP32 values over many magnitudes, with specials among them."""
    x = torch.randn(numel) * torch.exp2(torch.randint(-30, 30, (numel,)).float())
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 65520.0, 3.4028235e38])
    x[:: max(1, numel // 50)] = special[torch.arange(len(x[:: max(1, numel // 50)])) % len(special)]
    return x


def problem(format_: Format, numel: int) -> tuple[Tensor, Tensor, Tensor | None]:
    grad = values(numel)[torch.randperm(numel)].to(format_.sum_dtype)
    return grad, *encode(format_, values(numel))


def expected(
    format_: Format, start: Start, grad: Tensor, total: Tensor, residual: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    if start is Start.FROM_ZERO:
        return encode(format_, torch.tensor(scale, dtype=torch.float32) * grad.float())
    base = decode(format_, total, residual if start is Start.CONTINUE else None)
    return encode(format_, fma(scale, grad, base))


def run(
    backend: str,
    device: torch.device,
    format_: Format,
    start: Start,
    grads: list[Tensor],
    sums: list[Tensor],
    residuals: list[Tensor] | None,
    scale: float | Tensor = 1.0,
    partials: list[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Fold copies on the device and return (sums, residuals) from there."""
    grads, sums = [g.to(device, copy=True) for g in grads], [s.to(device, copy=True) for s in sums]
    residuals = None if residuals is None else [r.to(device, copy=True) for r in residuals]
    backends.kernels(backend).fold(format_, start, grads, sums, residuals, scale, partials)
    return sums, residuals


def rounds_once(backend: str, device: torch.device) -> bool:
    """Return whether a fused multiply-add is one here: triton's interpreter multiplied and added up to some version."""
    if backend != "triton" or device.type != "cpu":
        return True
    import numpy
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    x, minus_x_squared = (
        TensorHandle(numpy.array([value], numpy.float32), language.float32) for value in (1 + 2**-12, -1 - 2**-11)
    )
    return bool(InterpreterBuilder().create_fma(x, x, minus_x_squared).data[0] == 2.0**-24)


@ALL_FORMATS
@ALL_STARTS
@pytest.mark.parametrize("scale", [1.0, 0.25, THIRD], ids=["one", "quarter", "third"])
def test_bits_agree_with_the_reference(
    backend: str, device: torch.device, format_: Format, start: Start, scale: float
) -> None:
    if backend == "eager" and scale == THIRD and start is not Start.FROM_ZERO:
        pytest.skip("eager rounds the product before it adds; how far that may go has a test of its own")
    if scale == THIRD and start is not Start.FROM_ZERO and not rounds_once(backend, device):
        pytest.skip("the interpreter of this triton rounds the product before it adds")
    for numel in SIZES:
        grad, total, residual = problem(format_, numel)
        want_sum, want_residual = expected(format_, start, grad, total, residual, scale)
        (got_sum,), got_residuals = run(
            backend, device, format_, start, [grad], [total], None if residual is None else [residual], scale
        )
        assert same_bits(want_sum, got_sum), numel
        if want_residual is not None:
            assert got_residuals is not None
            assert same_bits(want_residual, got_residuals[0]), numel


@pytest.mark.parametrize("start", [Start.CONTINUE, Start.FROM_SUM], ids=lambda s: s.name.lower())
def test_eager_is_within_one_ulp_of_fp32_for_any_scale(start: Start) -> None:
    grad, total, residual = problem(Format.SPLIT32, 100_003)
    want = decode(Format.SPLIT32, *expected(Format.SPLIT32, start, grad, total, residual, THIRD))
    assert residual is not None
    (got,), got_residuals = run("eager", torch.device("cpu"), Format.SPLIT32, start, [grad], [total], [residual], THIRD)
    assert got_residuals is not None
    x = decode(Format.SPLIT32, got, got_residuals[0])
    # The rounding of the product is half a unit of the product's last place, before cancellation.
    product = (grad.double() * THIRD).abs()
    finite = want.isfinite() & x.isfinite()
    bound = product * 2.0**-24 + want.double().abs() * 2.0**-23 + 2.0**-149
    assert ((x.double() - want.double()).abs()[finite] <= bound[finite]).all()


@pytest.mark.parametrize("format_", [f for f in Format if f.residual_dtype is not None], ids=lambda f: f.name.lower())
def test_every_half_and_residual_decodes_alike(backend: str, device: torch.device, format_: Format) -> None:
    """Stale pairs too, which no encoder writes: a zero gradient leaves the decoded value to be stored again."""
    sums = torch.arange(-(2**15), 2**15).to(torch.int16).view(format_.sum_dtype)
    if format_.residual_dtype is torch.float32:
        residuals = values(len(sums))
        residuals[::3] = sums[::3].float() * (1 + 2.0**-12)
    else:
        assert format_.residual_dtype is not None
        limits = torch.iinfo(format_.residual_dtype)
        residuals = torch.randint(limits.min, limits.max + 1, sums.shape).to(format_.residual_dtype)
    grads = torch.zeros_like(sums)
    want = expected(format_, Start.CONTINUE, grads, sums, residuals, 1.0)
    got_sums, got_residuals = run(backend, device, format_, Start.CONTINUE, [grads], [sums], [residuals])
    assert same_bits(want[0], got_sums[0])
    assert want[1] is not None
    assert got_residuals is not None
    assert same_bits(want[1], got_residuals[0])


@pytest.mark.parametrize("place", ["first", "middle", "last", "only", "all"])
def test_empty_tensors_anywhere_in_a_list(backend: str, device: torch.device, place: str) -> None:
    sizes = {"first": [0, 5, 9], "middle": [5, 0, 9], "last": [5, 9, 0], "only": [0], "all": [0, 0, 0]}[place]
    check_list(backend, device, sizes)


@pytest.mark.parametrize("count", [1, 2, 89, 90, 91, 300])
def test_lists(backend: str, device: torch.device, count: int) -> None:
    check_list(backend, device, [int(n) for n in torch.randint(0, 40, (count,))])


def test_list_of_two_thousand(backend: str, device: torch.device) -> None:
    check_list(backend, device, [int(n) for n in torch.randint(0, 300, (2000,))], formats=(Format.SPLIT24,))


def test_list_of_small_and_large(backend: str, device: torch.device) -> None:
    check_list(backend, device, [3, 70_000, 0, 4096, 65_536, 65_537, 1])


def check_list(
    backend: str,
    device: torch.device,
    sizes: list[int],
    formats: tuple[Format, ...] = (Format.SPLIT24, Format.PLAIN32),
) -> None:
    for format_ in formats:
        problems = [problem(format_, n) for n in sizes]
        residuals = None if format_ is Format.PLAIN32 else [p[2] for p in problems if p[2] is not None]
        got_sums, got_residuals = run(
            backend, device, format_, Start.CONTINUE, [p[0] for p in problems], [p[1] for p in problems], residuals
        )
        for i, (grad, total, residual) in enumerate(problems):
            want_sum, want_residual = expected(format_, Start.CONTINUE, grad, total, residual, 1.0)
            assert same_bits(want_sum, got_sums[i]), (i, sizes[i])
            if want_residual is not None:
                assert got_residuals is not None
                assert same_bits(want_residual, got_residuals[i]), (i, sizes[i])


@ALL_FORMATS
@pytest.mark.parametrize("together", [False, True], ids=["alone", "in-a-list"])
def test_writes_its_range_and_nothing_else(backend: str, device: torch.device, format_: Format, together: bool) -> None:
    """Views slide over buffers of sentinels, so that every alignment occurs."""
    numel, room = 4096 + 37, 24
    for shift in (0, 1, 2, 3, 5, 8, 13):
        grad, total, residual = problem(format_, numel)
        want = expected(format_, Start.CONTINUE, grad, total, residual, 1.0)
        buffers, views = [], []
        for tensor in (grad, total, residual):
            if tensor is None:
                continue
            buffer = torch.full((numel + room,), 85, dtype=torch.int8).to(tensor.dtype).to(device)
            view = buffer[shift : shift + numel]
            view.copy_(tensor)
            buffers.append(buffer)
            views.append(view)
        count = 2 if together else 1
        backends.kernels(backend).fold(
            format_,
            Start.CONTINUE,
            views[:1] + [torch.zeros(3, dtype=grad.dtype, device=device)] * (count - 1),
            views[1:2] + [torch.zeros(3, dtype=grad.dtype, device=device)] * (count - 1),
            None
            if residual is None
            else views[2:] + [torch.zeros(3, dtype=residual.dtype, device=device)] * (count - 1),
            1.0,
            None,
        )
        for tensor, view, buffer in zip((grad, *want), views, buffers, strict=False):
            assert tensor is not None
            assert same_bits(tensor, view), shift
            assert (buffer[:shift] == 85).all(), shift
            assert (buffer[shift + numel :] == 85).all(), shift


@ALL_FORMATS
@ALL_STARTS
def test_scale_from_a_tensor(backend: str, device: torch.device, format_: Format, start: Start) -> None:
    scale = 0.25
    sizes = [1, 5000, 70_001]
    problems = [problem(format_, n) for n in sizes]
    got_sums, got_residuals = run(
        backend,
        device,
        format_,
        start,
        [p[0] for p in problems],
        [p[1] for p in problems],
        None if format_ is Format.PLAIN32 else [p[2] for p in problems if p[2] is not None],
        torch.tensor(scale, device=device),
    )
    for i, (grad, total, residual) in enumerate(problems):
        want_sum, want_residual = expected(format_, start, grad, total, residual, scale)
        assert same_bits(want_sum, got_sums[i])
        if want_residual is not None:
            assert got_residuals is not None
            assert same_bits(want_residual, got_residuals[i])


@ALL_FORMATS
def test_sum_may_be_the_gradient_itself_from_zero(backend: str, device: torch.device, format_: Format) -> None:
    for numel in (5, 5000, 70_001):
        grad, _, residual = problem(format_, numel)
        want_sum, want_residual = expected(format_, Start.FROM_ZERO, grad, grad, None, 0.125)
        tensor = grad.to(device, copy=True)
        residuals = None if residual is None else [torch.empty_like(residual, device=device)]
        backends.kernels(backend).fold(format_, Start.FROM_ZERO, [tensor], [tensor], residuals, 0.125, None)
        assert same_bits(want_sum, tensor)
        if residuals is not None and want_residual is not None:
            assert same_bits(want_residual, residuals[0])


ROOM = 8  # elements around a tensor that must not be written


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


SHIFTS_AND_SIZES = [(0, [0]), (0, [1]), (0, [4096]), (0, [100_003]), (3, [9000]), (1, [3, 0, 70_000, 4097, 65_536, 1])]


@ALL_FORMATS
@pytest.mark.parametrize(("shift", "sizes"), [*SHIFTS_AND_SIZES, (0, [5, 4096] * 46)], ids=lambda _: "")
def test_decode(backend: str, device: torch.device, format_: Format, shift: int, sizes: list[int]) -> None:
    sums, residuals = [], []
    for n in sizes:
        _, total, residual = problem(format_, n)
        total[::7] = 0  # beside what was stored with another sum
        sums.append(total)
        if residual is not None:
            residual[::5] = -residual[::5]
            residuals.append(residual)
    wanted = [decode(format_, total, residuals[i] if residuals else None) for i, total in enumerate(sums)]
    buffers, values = at_an_offset([torch.zeros(n) for n in sizes], shift, device)
    _, given = at_an_offset(sums, shift, device)
    _, lows = at_an_offset(residuals, shift, device)
    backends.kernels(backend).decode(format_, given, lows or None, values)
    assert all(map(same_bits, wanted, values))
    assert all(map(same_bits, [*sums, *residuals], [*given, *lows]))  # only read
    assert nothing_around_is_written(buffers, shift)


@ALL_FORMATS
@pytest.mark.parametrize("scalar", ["number", "tensor"])
@pytest.mark.parametrize(("shift", "sizes"), [*SHIFTS_AND_SIZES, (0, [5, 4096] * 46)], ids=lambda _: "")
def test_encode(backend: str, device: torch.device, format_: Format, shift: int, sizes: list[int], scalar: str) -> None:
    given = [values(n) for n in sizes]
    wanted = [encode(format_, x / 3.0) for x in given]
    stored = [(torch.ones_like(total), None if low is None else torch.ones_like(low)) for total, low in wanted]
    buffers, sums = at_an_offset([total for total, _ in stored], shift, device)
    low_buffers, lows = at_an_offset([low for _, low in stored if low is not None], shift, device)
    _, moved = at_an_offset(given, shift, device)
    divisor = 3.0 if scalar == "number" else torch.tensor(3.0, device=device)
    backends.kernels(backend).encode(format_, moved, divisor, sums, lows or None)
    assert all(map(same_bits, [total for total, _ in wanted], sums))
    assert all(map(same_bits, [low for _, low in wanted if low is not None], lows))
    assert all(map(same_bits, given, moved))  # only read
    assert nothing_around_is_written([*buffers, *low_buffers], shift)


@ALL_FORMATS
@ALL_STARTS
def test_partial_sums_of_squares(backend: str, device: torch.device, format_: Format, start: Start) -> None:
    sizes = [1, 4095, 4096, 4097, 70_001]
    grads = [torch.randn(n).to(format_.sum_dtype) for n in sizes]
    stored = [encode(format_, torch.randn(n)) for n in sizes]
    residuals = None if format_ is Format.PLAIN32 else [s[1] for s in stored if s[1] is not None]
    both = []
    for _ in range(2):
        partials = [torch.full((partial_rows(n), 3), math.nan, device=device) for n in sizes]
        run(backend, device, format_, start, grads, [s[0] for s in stored], residuals, 0.5, partials)
        both.append([p.cpu() for p in partials])
    for i, grad in enumerate(grads):
        base = decode(format_, stored[i][0], stored[i][1] if start is Start.CONTINUE else None).double()
        x = 0.5 * grad.double() + (0 if start is Start.FROM_ZERO else base)
        before = base if start is Start.FROM_SUM else torch.zeros_like(base)
        for column, exact in ((0, grad.double()), (1, x), (2, before)):
            found = both[0][i][:, column].double()
            wanted = torch.stack([block.square().sum() for block in exact.split(BLOCK_NUMEL)])
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-12)
        assert torch.equal(both[0][i], both[1][i])  # deterministic


def test_tensors_without_memory_are_refused() -> None:
    if available_backends()["cpu"] is not None:
        pytest.skip(f"backend cpu: {available_backends()['cpu']}")
    zero = torch._efficientzerotensor((5,), dtype=torch.bfloat16)
    total, residual = torch.ones(5).bfloat16(), torch.zeros(5, dtype=torch.int8)
    fold = backends.kernels("cpu").fold
    with pytest.raises(RuntimeError, match=r"a tensor has no memory, .*clone\(\) it first"):
        fold(Format.SPLIT24, Start.CONTINUE, [zero], [total], [residual], 1.0, None)
    assert (total == 1).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_cpu_result_does_not_depend_on_threads(threads: int) -> None:
    if available_backends()["cpu"] is not None:
        pytest.skip(f"backend cpu: {available_backends()['cpu']}")
    sizes = [70_001, 3, 0, 200_000, 4096]
    problems = [problem(Format.SPLIT24, n) for n in sizes]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        partials = [torch.full((partial_rows(n), 3), math.nan) for n in sizes]
        sums, residuals = run(
            "cpu",
            torch.device("cpu"),
            Format.SPLIT24,
            Start.CONTINUE,
            [p[0] for p in problems],
            [p[1] for p in problems],
            [p[2] for p in problems if p[2] is not None],
            partials=partials,
        )
    finally:
        torch.set_num_threads(before)
    assert residuals is not None
    for i, (grad, total, residual) in enumerate(problems):
        want_sum, want_residual = expected(Format.SPLIT24, Start.CONTINUE, grad, total, residual, 1.0)
        assert same_bits(want_sum, sums[i])
        assert want_residual is not None
        assert same_bits(want_residual, residuals[i])
        assert not partials[i].isnan().any() or (decode(Format.SPLIT24, want_sum, want_residual).isnan().any())


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
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert out[0] == out[1]
    assert int(out[0]) >= 3


def test_accuracy_of_a_long_sum_that_agrees_in_sign(backend: str, device: torch.device) -> None:
    """N = 512: stock bfloat16 stops growing, FP32 and the split formats go on."""
    if backend == "triton" and device.type == "cpu":
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
            assert same_bits(single, result)
    assert error(stock) > 1e-1


@pytest.mark.slow
def test_compiler_vectorises_the_cpu_kernels(tmp_path: Path) -> None:
    """The compiler's own report: each instruction set's loops are vectorised at its width."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to ask")
    source = Path(__file__).resolve().parent.parent / "csrc" / "accumulate_cpu.cpp"
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-trapping-math", "-fopenmp", "-fPIC"]
    report = subprocess.run(
        [compiler, *flags, "-fopt-info-vec-optimized", "-c", str(source), "-o", str(tmp_path / "a.o")],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    lines = source.read_text().splitlines()
    loops = {
        name: next(i for i in range(first, len(lines)) if "for (int64_t i = 0; i < " in lines[i]) + 1
        for first, text in enumerate(lines)
        for name in ("fold_elements", "fold_pairs", "finish_elements", "decode_elements", "encode_elements")
        if text.startswith("ACCUMKERN_INLINE void " + name + "(")
    }
    for width in (32, 64):
        count = {
            name: sum(f"accumulate_cpu.cpp:{line}:" in text and f"{width} byte" in text for text in report.splitlines())
            for name, line in loops.items()
        }
        # formats x starts x with and without squares; whole chunks, and what is left at the end of a tensor
        assert count["fold_pairs"] >= 2 * 3 * 2, report
        assert count["fold_elements"] >= 5 * 3 * 2 + 2 * 3, report
        assert count["finish_elements"] >= 5 * 2 * 2, report
        assert count["decode_elements"] >= 5 * 2, report
        assert count["encode_elements"] >= 5 * 2, report
