"""What only a GPU can show: equal bits on every backend, streams, graphs, sizes past 2^31, memory, and the whole hook.

Run ``python -m pytest -m gpu tests/test_gpu.py``. Without a GPU every test skips with the reason of its backend.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import accumkern
from accumkern import backends, formats
from accumkern.formats import BLOCK_NUMEL, PARTIALS, Format, Start, partial_rows

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
FUSED = ["triton", "cuda"]
ALL = [*FUSED, "eager"]

# Empty tensors first, in the middle and last; sizes around a block; a large prime.
SIZES = [0, 4097, 1, 0, 1_000_003, 4096, 4095, 0]
SLEEP = 100_000_000  # GPU clock cycles, about 50 ms: what waits for them is late
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}

# Relative L2 error of an accumulated gradient against the FP64 sum of its micro-gradients, and of `.grad`.
TOLERANCE = {"split24": 2e-4, "split32": 2e-6, "fp32": 2e-6}
GRAD_TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}

ignore_stream_mismatch = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")


@pytest.fixture(autouse=True)
def _needs_gpu(request: pytest.FixtureRequest) -> None:
    """Skip with the reason of the test's backend where that cannot run on a GPU."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    try:
        backends.choose(backend or "cuda", torch.device(DEVICE))
    except RuntimeError as error:
        pytest.skip(str(error))
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")


# ---- inputs and reference ----------------------------------------------------------------------------------------

SPECIAL = torch.tensor(
    [0.0, 1.0, 1.00390625, 3.0e38, 65504.0, 2.0**-126, 2.0**-133, 2.0**-149, 2.0**-24, 1e-40, torch.inf, torch.nan]
)
SPECIAL = torch.cat([SPECIAL, -SPECIAL])


def random_bits(dtype: torch.dtype, numel: int, generator: torch.Generator) -> Tensor:
    """Any bit patterns: NaN, infinities, zeros and subnormals of either sign among them."""
    info = torch.iinfo(INTEGERS[dtype.itemsize])
    bits = torch.randint(info.min, info.max + 1, (numel,), generator=generator)
    return bits.to(INTEGERS[dtype.itemsize]).view(dtype)


def make_inputs(format_: Format, numel: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """(grads, sums, residuals) on the CPU: every pair of SPECIAL, values that interact, any bits, and edited sums."""
    generator = torch.Generator().manual_seed(seed)

    def chance(probability: float) -> Tensor:
        return torch.rand(numel, generator=generator) < probability

    def values(dtype: torch.dtype) -> Tensor:
        exponents = torch.randint(-6, 7, (numel,), generator=generator)
        near = torch.randn(numel, generator=generator) * 2.0**exponents
        return torch.where(chance(0.5), near.to(dtype), random_bits(dtype, numel, generator))

    grads, x = values(format_.sum_dtype), values(torch.float32)
    pairs = torch.cartesian_prod(SPECIAL, SPECIAL)[:numel]
    grads[: len(pairs)] = pairs[:, 0].to(grads.dtype)
    x[: len(pairs)] = pairs[:, 1]
    sums, residuals = formats.encode(format_, x)
    sums = torch.where(chance(0.2), random_bits(sums.dtype, numel, generator), sums)
    if residuals is not None:
        residuals = torch.where(chance(0.2), random_bits(residuals.dtype, numel, generator), residuals)
    return grads, sums, residuals


def accumulated(
    format_: Format, start: Start, grads: Tensor, sums: Tensor, residuals: Tensor | None, scale: float
) -> Tensor:
    """The FP32 value that a fold stores."""
    if start is Start.FROM_ZERO:
        return grads.float() * torch.tensor(scale, dtype=torch.float32)
    base = sums.float() if start is Start.FROM_SUM else formats.decode(format_, sums, residuals)
    return formats.fma(scale, grads, base)


@functools.cache
def case(
    format_: Format, start: Start, scale: float, numel: int
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """(inputs, expected) on the CPU. They are shared by tests: not to be written."""
    inputs = make_inputs(format_, numel, seed=numel)
    return inputs, formats.encode(format_, accumulated(format_, start, *inputs, scale))


def on_device(tensors: list[Tensor], device: str | torch.device = DEVICE) -> list[Tensor]:
    return [tensor.to(device, copy=True) for tensor in tensors]


def columns(
    rows: list[tuple[Tensor, Tensor, Tensor | None]], device: str | torch.device = DEVICE
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    """(grads, sums, residuals): copies on the device of a list of (grad, sum, residual)."""
    residuals = [row[2] for row in rows if row[2] is not None]
    return (
        on_device([row[0] for row in rows], device),
        on_device([row[1] for row in rows], device),
        on_device(residuals, device) if residuals else None,
    )


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    bits = INTEGERS[expected.element_size()]
    assert actual.dtype is expected.dtype
    actual = actual.to(expected.device)
    differs = actual.view(bits) != expected.view(bits)
    if differs.any():
        at = int(differs.flatten().nonzero()[0])
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} elements differ; the first, {at}, is "
            f"{actual.flatten()[at].item()} and should be {expected.flatten()[at].item()}"
        )


def relative_error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).norm() / truth.norm())


# ---- the same bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", list(Start), ids=lambda start: start.name.lower())
@pytest.mark.parametrize("format_", list(Format), ids=lambda format_: format_.name.lower())
@pytest.mark.parametrize("backend", ALL)
def test_bits_equal_reference(backend: str, format_: Format, start: Start) -> None:
    fold = backends.kernels(backend).fold
    scales = [1.0, 0.5, 1 / 3]
    if backend == "eager":  # it rounds the product first; half of a subnormal FP32 gradient is not exact either
        scales = [1.0] if format_ is Format.PLAIN32 else [1.0, 0.5]

    def check(scale: float, sizes: list[int], given: float | Tensor, in_place: bool = False) -> None:
        cases = [case(format_, start, scale, numel) for numel in sizes]
        grads, sums, residuals = columns([inputs for inputs, _ in cases])
        if in_place:
            sums = grads
        fold(format_, start, grads, sums, residuals, given, None)
        for i, (inputs, expected) in enumerate(cases):
            what = f"scale {given!r}, sizes {sizes}, tensor {i}"
            assert_same_bits(sums[i], expected[0], f"sum, {what}")
            if residuals is not None and expected[1] is not None:
                assert_same_bits(residuals[i], expected[1], f"residual, {what}")
            if not in_place:
                assert_same_bits(grads[i], inputs[0], f"gradient, {what}")

    for scale in scales:
        for numel in sorted(set(SIZES)):
            check(scale, [numel], scale)
        check(scale, SIZES, scale)
    for dtype in (torch.float32, torch.float64):
        given = torch.tensor(scales[-1], dtype=dtype, device=DEVICE)
        check(scales[-1], [4097], given)
        check(scales[-1], SIZES, given)
    if start is Start.FROM_ZERO:
        check(scales[-1], [4097], scales[-1], in_place=True)
        check(scales[-1], SIZES, scales[-1], in_place=True)


@pytest.mark.parametrize("start", list(Start), ids=lambda start: start.name.lower())
@pytest.mark.parametrize("format_", list(Format), ids=lambda format_: format_.name.lower())
def test_cpu_kernels_give_the_same_bits(format_: Format, start: Start) -> None:
    reason = accumkern.available_backends()["cpu"]
    if reason is not None:
        pytest.skip(reason)
    for scale in (1.0, 0.5, 1 / 3):
        cases = [case(format_, start, scale, numel) for numel in SIZES]
        grads, sums, residuals = columns([inputs for inputs, _ in cases], "cpu")
        backends.kernels("cpu").fold(format_, start, grads, sums, residuals, scale, None)
        for i, (_, expected) in enumerate(cases):
            assert_same_bits(sums[i], expected[0], f"sum {i}")
            if residuals is not None and expected[1] is not None:
                assert_same_bits(residuals[i], expected[1], f"residual {i}")


@pytest.mark.parametrize("backend", FUSED)
def test_formats_may_be_mixed_in_one_call(backend: str) -> None:
    mixed = [Format.SPLIT24, Format.MAIN_GRAD_FLOAT16, Format.SPLIT32, Format.SPLIT24, Format.MAIN_GRAD_BFLOAT16]
    cases = [case(format_, Start.CONTINUE, 1 / 3, 4097) for format_ in mixed]
    grads, sums, residuals = columns([inputs for inputs, _ in cases])
    scale = torch.tensor(1 / 3, device=DEVICE)
    accumkern.accumulate_(grads, sums, residuals, scale, backend=backend)
    assert residuals is not None
    for format_, total, residual, (_, expected) in zip(mixed, sums, residuals, cases, strict=True):
        assert_same_bits(total, expected[0], f"sum, {format_.name}")
        assert expected[1] is not None
        assert_same_bits(residual, expected[1], f"residual, {format_.name}")


def check_decoding(backend: str, format_: Format, sums: Tensor, residuals: Tensor) -> None:
    """Fold a gradient of -0, the zero that leaves -0 + 0 = 0 and -0 - 0 = -0 alone: what was decoded is encoded."""
    expected = formats.encode(format_, formats.decode(format_, sums, residuals))
    zeros = torch.full(sums.shape, -0x8000, dtype=torch.int16, device=DEVICE).view(sums.dtype)
    actual = on_device([sums, residuals])
    backends.kernels(backend).fold(format_, Start.CONTINUE, [zeros], actual[:1], actual[1:], 1.0, None)
    assert expected[1] is not None
    assert_same_bits(actual[0], expected[0], "sum")
    assert_same_bits(actual[1], expected[1], "residual")


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(-0x8000, 0x8000).to(torch.int16).view(dtype)


@pytest.mark.parametrize("backend", ALL)
def test_every_split24_pair_is_decoded(backend: str) -> None:
    residuals = torch.arange(-0x80, 0x80).to(torch.int8)
    check_decoding(
        backend,
        Format.SPLIT24,
        every_half(torch.bfloat16).repeat_interleave(len(residuals)),
        residuals.repeat(0x10000),
    )


@pytest.mark.parametrize("backend", FUSED)
def test_every_split32_pair_is_decoded(backend: str) -> None:
    """All 2^32 of them, against the reference on the GPU, which has only integer operations here."""
    residuals = torch.arange(-0x8000, 0x8000, device=DEVICE).to(torch.int16)
    for sums in every_half(torch.bfloat16).to(DEVICE).split(512):
        check_decoding(backend, Format.SPLIT32, sums.repeat_interleave(len(residuals)), residuals.repeat(len(sums)))


@pytest.mark.parametrize("format_", [Format.MAIN_GRAD_BFLOAT16, Format.MAIN_GRAD_FLOAT16], ids=lambda f: f.name.lower())
@pytest.mark.parametrize("backend", ALL)
def test_every_edit_beside_a_main_grad_is_seen(backend: str, format_: Format) -> None:
    """Every sum beside FP32 values around it and around its ties, and beside any bits."""
    sums = every_half(format_.sum_dtype)
    tie = 0x8000 if format_ is Format.MAIN_GRAD_BFLOAT16 else 0x1000  # half a last place of the sum, in those of FP32
    offsets = torch.tensor([-tie - 1, -tie, -tie + 1, -1, 0, 1, tie - 1, tie, tie + 1], dtype=torch.int32)
    near = (sums.float().view(torch.int32)[:, None] + offsets).view(torch.float32)
    anything = random_bits(torch.float32, 7 * len(sums), torch.Generator().manual_seed(0)).view(len(sums), 7)
    main_grads = torch.cat([near, anything], dim=1)
    check_decoding(backend, format_, sums.repeat_interleave(main_grads.shape[1]), main_grads.flatten())


# ---- partial sums ------------------------------------------------------------------------------------------------


def block_sums_of_squares(x: Tensor) -> Tensor:
    """FP64 sums of squares of blocks of BLOCK_NUMEL: (partial_rows(numel),)."""
    rows = partial_rows(x.numel())
    return (
        torch.nn.functional.pad(x.double().square(), (0, rows * BLOCK_NUMEL - x.numel())).view(rows, BLOCK_NUMEL).sum(1)
    )


@pytest.mark.parametrize(
    ("format_", "start"),
    [(format_, Start.CONTINUE) for format_ in Format]
    + [(Format.SPLIT24, Start.FROM_SUM), (Format.SPLIT24, Start.FROM_ZERO)],
    ids=lambda value: value.name.lower(),
)
@pytest.mark.parametrize("backend", ALL)
def test_partial_sums_of_squares(backend: str, format_: Format, start: Start) -> None:
    fold = backends.kernels(backend).fold
    scale = 0.5
    for sizes in ([70_001], [0, 1, 4096, 4097, 0, 70_001, 3, 0]):
        rows = []
        for numel in sizes:
            sums, residuals = formats.encode(format_, torch.randn(numel))
            rows.append((torch.randn(numel).to(format_.sum_dtype), sums, residuals))
        runs = []
        for _ in range(2):
            grads, sums_, residuals_ = columns(rows)
            partials = [torch.full((partial_rows(numel), PARTIALS), torch.nan, device=DEVICE) for numel in sizes]
            fold(format_, start, grads, sums_, residuals_, scale, partials)
            runs.append([partial.cpu() for partial in partials])
            for row, total in zip(rows, sums_, strict=True):
                expected = formats.encode(format_, accumulated(format_, start, *row, scale))
                assert_same_bits(total, expected[0], "sum")
        for row, first, second in zip(rows, *runs, strict=True):
            x = accumulated(format_, start, *row, scale)
            old = row[1].double() if start is Start.FROM_SUM else torch.zeros_like(x)
            truth = torch.stack([block_sums_of_squares(values) for values in (row[0], x, old)], dim=1)
            torch.testing.assert_close(first.double(), truth, rtol=1e-5, atol=0.0)
            assert_same_bits(second, first, "partial sums of a second run")


# ---- shapes of calls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(
    "format_", [Format.SPLIT24, Format.MAIN_GRAD_FLOAT16, Format.PLAIN32], ids=lambda format_: format_.name.lower()
)
@pytest.mark.parametrize("backend", FUSED)
def test_lists_of_any_length(backend: str, format_: Format, aligned: bool) -> None:
    """Around the capacity of one launch, with empty tensors first, in the middle and last, and a large one."""
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 89, 90, 91, 180, 181, 1997):
        sizes = torch.randint(1, 600, (count,), generator=generator).tolist()
        if count > 2:
            sizes[1] = 100_003
            sizes = [0, *sizes[: count // 2], 0, *sizes[count // 2 :], 0]
        inputs, expected = case(format_, Start.CONTINUE, 1 / 3, sum(sizes))
        grads, sums, residuals = (
            None if flat is None else list(flat.to(DEVICE, copy=True).split(sizes)) for flat in inputs
        )
        assert grads is not None
        assert sums is not None
        if aligned:
            grads, sums = [grad.clone() for grad in grads], [total.clone() for total in sums]
            residuals = None if residuals is None else [residual.clone() for residual in residuals]
        backends.kernels(backend).fold(format_, Start.CONTINUE, grads, sums, residuals, 1 / 3, None)
        assert_same_bits(torch.cat(sums), expected[0], f"sums of {len(sizes)} tensors")
        if residuals is not None and expected[1] is not None:
            assert_same_bits(torch.cat(residuals), expected[1], f"residuals of {len(sizes)} tensors")


@pytest.mark.parametrize("format_", list(Format), ids=lambda format_: format_.name.lower())
@pytest.mark.parametrize("backend", FUSED)
def test_unaligned_views_write_their_range_only(backend: str, format_: Format) -> None:
    """Views slid over buffers of random bits, which must stay as they are before and behind each view."""
    numel, margin = 2 * BLOCK_NUMEL + 5, 64
    # Elements by which grad, sum and residual are slid.
    slides = [(0, 0, 0), (1, 1, 1), (8, 0, 3), (0, 5, 16)]
    inputs, expected = case(format_, Start.CONTINUE, 1 / 3, numel)

    def slid(tensor: Tensor, slide: int) -> tuple[Tensor, Tensor]:
        buffer = random_bits(tensor.dtype, numel + 2 * margin, torch.Generator().manual_seed(slide)).to(DEVICE)
        view = buffer[margin + slide : margin + slide + numel]
        view.copy_(tensor)
        return buffer, view

    for calls in [[slide] for slide in slides] + [slides]:
        views = [
            [slid(tensor, by) for tensor, by in zip(inputs, slide, strict=True) if tensor is not None]
            for slide in calls
        ]
        before = [[buffer.clone() for buffer, _ in row] for row in views]
        grads, sums, *rest = ([row[k][1] for row in views] for k in range(len(views[0])))
        backends.kernels(backend).fold(format_, Start.CONTINUE, grads, sums, rest[0] if rest else None, 1 / 3, None)
        for row, copies, slide in zip(views, before, calls, strict=True):
            for k, ((buffer, view), copy) in enumerate(zip(row, copies, strict=True)):
                right = (inputs[0], *expected)[k]
                assert right is not None
                assert_same_bits(view, right, f"slid by {slide}, tensor {k}")
                begin = margin + slide[k]
                assert_same_bits(buffer[:begin], copy[:begin], f"before the view, slid by {slide}, tensor {k}")
                end = begin + numel
                assert_same_bits(buffer[end:], copy[end:], f"behind the view, slid by {slide}, tensor {k}")


@pytest.mark.parametrize("backend", FUSED)
def test_more_than_2_to_the_31_elements(backend: str) -> None:
    """Every element of a fold of 10 GiB, against one period of it on the CPU."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of GPU memory are free")
    numel, period, chunk = 2**31 + 4096 + 3, 1_000_003, 2**26
    inputs, expected = case(Format.SPLIT24, Start.CONTINUE, 1 / 3, period)

    def repeated(base: Tensor, begin: int, end: int) -> Tensor:
        return base[torch.arange(begin, end, device=DEVICE) % period]

    tensors = []
    for tensor in inputs:
        assert tensor is not None
        base = tensor.to(DEVICE)
        tensors.append(torch.empty(numel, dtype=tensor.dtype, device=DEVICE))
        for begin in range(0, numel, chunk):
            end = min(begin + chunk, numel)
            tensors[-1][begin:end] = repeated(base, begin, end)
    grad, total, residual = tensors
    backends.kernels(backend).fold(Format.SPLIT24, Start.CONTINUE, [grad], [total], [residual], 1 / 3, None)
    for actual, right in zip((grad, total, residual), (inputs[0], *expected), strict=True):
        assert right is not None
        base = right.to(DEVICE)
        for begin in range(0, numel, chunk):
            end = min(begin + chunk, numel)
            assert_same_bits(actual[begin:end], repeated(base, begin, end), f"from element {begin}")
    del tensors, grad, total, residual, actual, base
    gc.collect()
    torch.cuda.empty_cache()


# ---- streams and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ALL)
def test_folds_run_on_the_current_stream(backend: str) -> None:
    sizes = [300, 4097, 200_001]
    fold = functools.partial(backends.kernels(backend).fold, Format.SPLIT24, Start.CONTINUE)
    cases = [case(Format.SPLIT24, Start.CONTINUE, 0.5, numel) for numel in sizes]
    rows = [inputs for inputs, _ in cases]
    here, there = columns(rows), columns(rows)
    fresh = [grad.clone() for grad in there[0]]
    for grad in there[0]:
        grad.fill_(torch.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        for grad, values in zip(there[0], fresh, strict=True):
            grad.copy_(values)
        fold(*there, 0.5, None)
    fold(*here, 0.5, None)
    torch.cuda.synchronize()
    for _, sums, residuals in (here, there):
        assert residuals is not None
        for total, residual, (_, expected) in zip(sums, residuals, cases, strict=True):
            assert_same_bits(total, expected[0], "sum")
            assert expected[1] is not None
            assert_same_bits(residual, expected[1], "residual")


@pytest.mark.parametrize("backend", FUSED)
def test_a_launch_error_is_raised_and_leaves_nothing_behind(backend: str) -> None:
    from accumkern import _C  # type: ignore[attr-defined]

    if _C.cuda_targets is None:
        pytest.skip(str(accumkern.available_backends()["cuda"]))
    inputs, expected = case(Format.SPLIT24, Start.CONTINUE, 0.5, 4097)
    (grad,), (total,), residuals = columns([inputs])
    assert residuals is not None
    no_device = torch.cuda.device_count()
    addresses = [grad.data_ptr()], [total.data_ptr()], [residuals[0].data_ptr()]
    with pytest.raises(RuntimeError, match="accumkern: cudaSetDevice"):
        _C.fold(int(Format.SPLIT24), int(Start.CONTINUE), *addresses, (0.5, 0), [], [grad.numel()], no_device, 0)
    torch.cuda.synchronize()
    assert torch.cuda.current_device() == grad.device.index
    assert_same_bits(total, inputs[1], "after an error")
    backends.kernels(backend).fold(Format.SPLIT24, Start.CONTINUE, [grad], [total], residuals, 0.5, None)
    assert_same_bits(total, expected[0], "sum")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ALL)
def test_tensors_on_another_device_than_the_current(backend: str) -> None:
    sizes = [300, 4097, 200_001]
    cases = [case(Format.SPLIT24, Start.CONTINUE, 0.5, numel) for numel in sizes]
    for scale in (0.5, torch.tensor(0.5, device="cuda:1")):
        grads, sums, residuals = columns([inputs for inputs, _ in cases], "cuda:1")
        accumkern.accumulate_(grads, sums, residuals, scale, backend=backend)
        assert torch.cuda.current_device() == 0
        for total, (_, expected) in zip(sums, cases, strict=True):
            assert_same_bits(total, expected[0], "sum")

    params = [nn.Parameter(torch.randn(300, device=f"cuda:{i}").bfloat16()) for i in (0, 1)]
    acc = accumkern.attach(torch.optim.SGD(params), buffer="split32", backend=backend)
    truths = watch(params)
    for _ in range(4):
        sum((param * torch.randn_like(param)).sum().to("cuda:0") for param in params).backward()
    assert torch.cuda.current_device() == 0
    check_gradients(acc, params, truths)


# ---- the hook ----------------------------------------------------------------------------------------------------


def watch(params: list[nn.Parameter]) -> list[Tensor]:
    """FP64 sums of the micro-gradients that autograd hands to `params` from now on."""
    truths = [torch.zeros_like(param, dtype=torch.float64) for param in params]

    def hook_of(truth: Tensor) -> Callable[[Tensor], None]:
        def add(grad: Tensor) -> None:
            truth.add_(grad)

        return add

    for param, truth in zip(params, truths, strict=True):
        param.register_hook(hook_of(truth))
    return truths


def check_gradients(
    acc: accumkern.GradAccumulator, params: list[nn.Parameter], truths: list[Tensor], scale: float = 1.0
) -> None:
    for i, (param, truth) in enumerate(zip(params, truths, strict=True)):
        gradient = acc.gradient(param)
        assert gradient is not None
        assert param.grad is not None
        truth = truth * scale
        assert relative_error(gradient, truth) < TOLERANCE[acc.buffer], f"parameter {i}"
        assert relative_error(param.grad, truth) < GRAD_TOLERANCE[param.dtype], f".grad of parameter {i}"


def make_mlp() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A network with large and small parameters, and its random inputs."""
    net = nn.Sequential(nn.Linear(96, 768), nn.LayerNorm(768), nn.GELU(), nn.Linear(768, 33, bias=False))
    return net.to(DEVICE, torch.bfloat16), lambda: torch.randn(64, 96, device=DEVICE, dtype=torch.bfloat16)


def make_convolutions() -> tuple[nn.Module, Callable[[], Tensor]]:
    """The same for weights and gradients in channels_last order."""
    net = nn.Sequential(nn.Conv2d(8, 128, 3), nn.GELU(), nn.Conv2d(128, 64, 3))
    net = net.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
    return net, lambda: torch.randn(4, 8, 12, 12, device=DEVICE, dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )


@pytest.mark.parametrize("make_network", [make_mlp, make_convolutions], ids=["mlp", "channels_last"])
@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
@pytest.mark.parametrize("backend", ALL)
def test_training(
    backend: str, buffer: str, make_network: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]
) -> None:
    net, make_input = make_network()
    params = list(net.parameters())
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    acc = accumkern.attach(optimizer, buffer=buffer, average_over=8, backend=backend)
    truths = watch(params)
    for _ in range(2):
        before = [param.detach().clone() for param in params]
        for _ in range(8):
            net(make_input()).float().square().mean().backward()
        check_gradients(acc, params, truths, scale=1 / 8)
        optimizer.step()
        optimizer.zero_grad()
        assert not any(torch.equal(param, old) for param, old in zip(params, before, strict=True))
        for truth in truths:
            truth.zero_()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "autocast"])
@pytest.mark.parametrize("backend", ALL)
def test_training_with_grad_scaler(backend: str, dtype: torch.dtype) -> None:
    """float16 parameters with the fused optimizer, which takes the scale; float32 parameters under autocast."""
    net = nn.Sequential(nn.Linear(96, 768), nn.ReLU(), nn.Linear(768, 33)).to(DEVICE, dtype)
    params = list(net.parameters())
    lr, scale = 0.1, 256.0
    optimizer = torch.optim.SGD(params, lr=lr, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=scale)
    acc = accumkern.attach(optimizer, buffer="fp32", backend=backend)
    truths = watch(params)

    def micro_batches(factor: float = 1.0) -> None:
        for truth in truths:
            truth.zero_()
        for _ in range(8):
            x = torch.randn(64, 96, device=DEVICE, dtype=dtype)
            with torch.autocast("cuda", dtype=torch.float16, enabled=dtype is torch.float32):
                loss = net(x).float().square().sum(1).mean() / 8
            scaler.scale(loss * factor).backward()

    for _ in range(2):
        before = [param.detach().clone() for param in params]
        micro_batches()
        check_gradients(acc, params, truths)
        if dtype is torch.float32:  # GradScaler.unscale_ refuses float16 gradients
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1e6)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        for param, old, truth in zip(params, before, truths, strict=True):
            step = param.detach().double() - old.double()  # a few last places of a float16 parameter
            assert relative_error(step, -lr * truth / scale) < (0.1 if dtype is torch.float16 else 1e-4)

    before = [param.detach().clone() for param in params]
    micro_batches(factor=float("inf"))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert scaler.get_scale() == scale / 2
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    micro_batches()
    check_gradients(acc, params, truths)


def micro_gradients(shape: tuple[int, ...], count: int) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE).bfloat16() for _ in range(count)]


@ignore_stream_mismatch
@pytest.mark.parametrize("backend", ALL)
def test_hook_with_forward_and_backward_on_a_side_stream(backend: str) -> None:
    params = [nn.Parameter(torch.randn(numel, device=DEVICE).bfloat16()) for numel in (300, 5000, 200_001)]
    acc = accumkern.attach(torch.optim.SGD(params), buffer="split32", backend=backend)
    micro = [micro_gradients(param.shape, 4) for param in params]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for k in range(4):
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP // 4)
            late = [values[k].clone() for values in micro]
            sum((param * x).sum() for param, x in zip(params, late, strict=True)).backward()
    torch.cuda.current_stream().wait_stream(side)
    check_gradients(acc, params, [torch.stack(values).double().sum(0) for values in micro])


@ignore_stream_mismatch
@pytest.mark.parametrize("forward_aside", [True, False], ids=["forward-aside", "backward-aside"])
@pytest.mark.parametrize("backend", ALL)
def test_small_gradients_live_until_a_late_fold_has_read_them(backend: str, forward_aside: bool) -> None:
    """A gradient made on one stream and folded, late, on another: its memory must not be given away in between."""
    side, default = torch.cuda.Stream(), torch.cuda.current_stream()
    forward_stream, backward_stream = (side, default) if forward_aside else (default, side)
    params = [nn.Parameter(torch.randn(2000, device=DEVICE).bfloat16()) for _ in range(2)]
    micro = [micro_gradients(param.shape, 4) for param in params]
    torch.cuda.synchronize()
    with torch.cuda.stream(forward_stream):
        acc = accumkern.attach(torch.optim.SGD(params), buffer="split32", backend=backend)

    def delay_the_fold(_grad: Tensor) -> None:
        with torch.cuda.stream(backward_stream):
            torch.cuda._sleep(SLEEP)

    params[0].register_hook(delay_the_fold)
    for k in range(4):
        with torch.cuda.stream(forward_stream):
            loss = sum((param * values[k]).sum() for param, values in zip(params, micro, strict=True))
        with torch.cuda.stream(backward_stream):
            loss.backward()
        with torch.cuda.stream(forward_stream):
            taken = [torch.full_like(params[0], torch.nan) for _ in range(64)]
        torch.cuda.synchronize()
        del taken, loss
    check_gradients(acc, params, [torch.stack(values).double().sum(0) for values in micro])


class ProductOnSideStream(torch.autograd.Function):
    """(param * x).sum(), whose backward pass computes on a stream of its own."""

    @staticmethod
    def forward(ctx, param: Tensor, x: Tensor, side: torch.cuda.Stream) -> Tensor:
        ctx.save_for_backward(x)
        ctx.side = side
        return (param * x).sum()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        current = torch.cuda.current_stream()
        ctx.side.wait_stream(current)
        with torch.cuda.stream(ctx.side):
            torch.cuda._sleep(SLEEP // 4)
            grad = grad_output * x
        grad.record_stream(current)
        current.wait_stream(ctx.side)
        return grad, None, None


@pytest.mark.parametrize("backend", ALL)
def test_hook_after_a_backward_function_with_a_stream_of_its_own(backend: str) -> None:
    params = [nn.Parameter(torch.randn(numel, device=DEVICE).bfloat16()) for numel in (300, 5000, 200_001)]
    acc = accumkern.attach(torch.optim.SGD(params), buffer="split32", backend=backend)
    micro = [micro_gradients(param.shape, 4) for param in params]
    side = torch.cuda.Stream()
    for k in range(4):
        sum(
            ProductOnSideStream.apply(param, values[k], side) for param, values in zip(params, micro, strict=True)
        ).backward()
    check_gradients(acc, params, [torch.stack(values).double().sum(0) for values in micro])


# ---- what it costs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buffer", "bytes_per_element"), [(None, 2), ("split24", 3), ("split32", 4), ("fp32", 6)], ids=str
)
@pytest.mark.parametrize("backend", FUSED)
def test_memory_held_after_a_window(backend: str, buffer: str | None, bytes_per_element: int) -> None:
    param = nn.Parameter(torch.randn(2**24, device=DEVICE).bfloat16())
    x = torch.randn_like(param)
    acc = None
    if buffer is not None:
        acc = accumkern.attach(torch.optim.SGD([param]), buffer=buffer, backend=backend)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(4):
        (param * x).sum().backward()
    torch.cuda.synchronize()
    held = (torch.cuda.memory_allocated() - before) / param.numel()
    assert held == pytest.approx(bytes_per_element, abs=0.05)
    assert (acc is None) == (buffer is None)


@pytest.mark.parametrize("buffer", ["split24", "fp32"])
@pytest.mark.parametrize("backend", ALL)
def test_the_hook_never_waits_for_the_gpu(backend: str, buffer: str) -> None:
    params = [nn.Parameter(torch.randn(numel, device=DEVICE).bfloat16()) for numel in [*range(1, 200, 10), 200_001]]
    optimizer = torch.optim.SGD(params)
    acc = accumkern.attach(optimizer, buffer=buffer, average_over=4, backend=backend)
    micro = [micro_gradients(param.shape, 4) for param in params]

    def window() -> None:
        optimizer.zero_grad()
        for k in range(4):
            sum((param * values[k]).sum() for param, values in zip(params, micro, strict=True)).backward()

    window()  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        window()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_gradients(acc, params, [torch.stack(values).double().sum(0) for values in micro], scale=1 / 4)


# ---- graphs: last, because a capture that fails may trouble what comes after it ------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [[300, 0, 4097, 300], [4096], [200_001], [300, 0, 200_001, 4097, 300]],
    ids=["small-list", "small", "large", "list"],
)
@pytest.mark.parametrize("backend", FUSED)
def test_a_captured_fold_replays_like_repeated_folds(backend: str, sizes: list[int]) -> None:
    # No other test has SPLIT32 from a sum with partial sums: nothing but the same call, before, has loaded its kernel.
    fold = functools.partial(backends.kernels(backend).fold, Format.SPLIT32, Start.FROM_SUM)
    sums = [torch.randn(numel, device=DEVICE).bfloat16() for numel in sizes]
    grads = [torch.randn_like(total) for total in sums]
    residuals = [torch.zeros_like(total, dtype=torch.int16) for total in sums]
    partials = [torch.zeros(partial_rows(numel), PARTIALS, device=DEVICE) for numel in sizes]
    scale = torch.ones((), device=DEVICE)

    def copies(tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.clone() for tensor in tensors]

    right = copies(sums), copies(residuals), copies(partials)
    fold(grads, copies(sums), copies(residuals), scale, copies(partials))  # compiles and loads
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fold(grads, sums, residuals, scale, partials)
    torch.cuda.synchronize()
    for total, untouched in zip(sums, right[0], strict=True):
        assert_same_bits(total, untouched, "capturing is not running")

    for replay in range(5):
        for grad in grads:
            grad.normal_()
        scale.fill_(1.0 / (replay + 1))
        graph.replay()
        fold(grads, right[0], right[1], scale, right[2])
    torch.cuda.synchronize()
    for actual, expected in zip((sums, residuals), right[:2], strict=True):
        for tensor, other in zip(actual, expected, strict=True):
            assert_same_bits(tensor, other, "after five replays")
    for tensor, other in zip(partials, right[2], strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=0.0)
