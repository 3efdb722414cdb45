"""What only a GPU can show: every bit pattern, sizes past 2^31, streams, graphs, memory, and the whole hook.

Run ``python -m pytest -m gpu``: what a kernel stores is compared with the reference in test_kernels.py, on a GPU too.
"""

from __future__ import annotations

import copy
import functools
import gc

import pytest
import torch
from gradients import assert_same_bits
from kernel_cases import (
    THIRD,
    accumulated,
    assert_stored,
    columns,
    every_half,
    problem,
)
from ranks import Ranks
from step_cases import assert_stepped, by_reference, usual
from tiny import check_gradients, fp64_sums, relative_error
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import accumkern
from accumkern import backends
from accumkern.formats import PARTIALS, Format, Start, decode, encode, partial_rows
from accumkern.updates import Update
from accumkern.waiting import MAX_WAITING_NUMEL

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
every_backend = pytest.mark.parametrize("backend", ["triton", "cuda", "eager"], indirect=True)
fused_backends = pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)

SLEEP = 100_000_000  # GPU clock cycles, about 50 ms: what waits for them is late

ignore_stream_mismatch = pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")


# ---- kernels -----------------------------------------------------------------------------------------------------


def check_decoding(backend: str, format_: Format, sums: Tensor, residuals: Tensor) -> None:
    """Fold a gradient of -0, the zero that leaves -0 + 0 = 0 and -0 - 0 = -0 alone: what was decoded is encoded."""
    expected = encode(format_, decode(format_, sums, residuals))
    stored = columns([(torch.full_like(sums, -0.0), sums, residuals)], DEVICE)
    backends.kernels(backend).fold(format_, Start.CONTINUE, *stored, 1.0, None)
    assert stored[2] is not None
    assert_same_bits(stored[1][0], expected[0], "sum")
    assert_same_bits(stored[2][0], expected[1], "residual")


@every_backend
def test_every_split24_pair_is_decoded(backend: str) -> None:
    sums, residuals = every_half(torch.bfloat16), torch.arange(-0x80, 0x80).to(torch.int8)
    check_decoding(backend, Format.SPLIT24, sums.repeat_interleave(len(residuals)), residuals.repeat(len(sums)))


@fused_backends
def test_every_split32_pair_is_decoded(backend: str) -> None:
    """All 2^32 of them, against the reference on the GPU, which has only integer operations here."""
    residuals = torch.arange(-0x8000, 0x8000, device=DEVICE).to(torch.int16)
    for sums in every_half(torch.bfloat16).to(DEVICE).split(512):
        check_decoding(backend, Format.SPLIT32, sums.repeat_interleave(len(residuals)), residuals.repeat(len(sums)))


@fused_backends
def test_more_than_2_to_the_31_elements(backend: str) -> None:
    """Every element of a fold of 10 GiB, against one period of it on the CPU."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("less than 24 GiB of GPU memory are free")
    numel, period, chunk = 2**31 + 4096 + 3, 1_000_003, 2**26
    row = problem(Format.SPLIT24, period)

    def repeated(base: Tensor, begin: int, end: int) -> Tensor:
        return base[torch.arange(begin, end, device=DEVICE) % period]

    tensors = []
    for tensor in row:
        assert tensor is not None
        base = tensor.to(DEVICE)
        tensors.append(torch.empty(numel, dtype=tensor.dtype, device=DEVICE))
        for begin in range(0, numel, chunk):
            end = min(begin + chunk, numel)
            tensors[-1][begin:end] = repeated(base, begin, end)
    grad, total, residual = tensors
    backends.kernels(backend).fold(Format.SPLIT24, Start.CONTINUE, [grad], [total], [residual], THIRD, None)
    expected = encode(Format.SPLIT24, accumulated(Format.SPLIT24, Start.CONTINUE, row, THIRD))
    for actual, right in zip((grad, total, residual), (row[0], *expected), strict=True):
        assert right is not None
        base = right.to(DEVICE)
        for begin in range(0, numel, chunk):
            end = min(begin + chunk, numel)
            assert_same_bits(actual[begin:end], repeated(base, begin, end), f"from element {begin}")
    del tensors, grad, total, residual, actual, base
    gc.collect()
    torch.cuda.empty_cache()


# ---- streams and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_by_one", [False, True])
@every_backend
def test_folds_run_on_the_current_stream(backend: str, one_by_one: bool) -> None:
    kernels = backends.kernels(backend)

    def fold(grads: list[Tensor], sums: list[Tensor], residuals: list[Tensor], scale: float, _: None) -> None:
        if not one_by_one:
            kernels.fold(Format.SPLIT24, Start.CONTINUE, grads, sums, residuals, scale, None)
            return
        for grad, total, residual in zip(grads, sums, residuals, strict=True):
            add = kernels.fold_into(Format.SPLIT24, Start.CONTINUE, total, residual)
            assert add(grad, total, total._version, scale)

    rows = [problem(Format.SPLIT24, numel) for numel in (300, 4097, 200_001)]
    here, there = columns(rows, DEVICE), columns(rows, DEVICE)
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
    for stored in (here, there):
        assert_stored(Format.SPLIT24, Start.CONTINUE, rows, 0.5, *stored)


@every_backend
def test_steps_run_on_the_current_stream_and_never_wait(backend: str) -> None:
    """Gradients, divisor and skip come late, on a stream of their own."""
    scalars = {"divisor": torch.tensor(3.0), "factor": torch.tensor(0.5), "skip": torch.tensor(0.0)}
    step = usual(Update.AMSGRAD, [300, 0, 4097, 200_001], **scalars)
    for is_loaded in (False, True):  # to load a kernel is to wait
        late = step.to(DEVICE)
        fresh = late.to(DEVICE)
        late.skip, late.divisor = torch.ones((), device=DEVICE), torch.full((), torch.nan, device=DEVICE)
        for grad in late.grads:
            grad.fill_(torch.nan)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP)
            for grad, values in zip(late.grads, fresh.grads, strict=True):
                grad.copy_(values)
            late.skip.copy_(fresh.skip)
            late.divisor.copy_(fresh.divisor)
            torch.cuda.set_sync_debug_mode("error" if is_loaded else "default")
            try:
                late.run(backend)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert_stepped(late, by_reference(step, backend, torch.device(DEVICE)))


@fused_backends
def test_a_launch_error_is_raised_and_leaves_nothing_behind(backend: str) -> None:
    from accumkern.backends import _C  # type: ignore[attr-defined]

    if _C.cuda_targets is None:
        pytest.skip(str(accumkern.available_backends()["cuda"]))
    row = problem(Format.SPLIT24, 4097)
    (grad,), (total,), residuals = columns([row], DEVICE)
    assert residuals is not None
    no_device = torch.cuda.device_count()
    table = [grad.data_ptr(), total.data_ptr(), residuals[0].data_ptr(), -1, grad.numel()]
    with pytest.raises(RuntimeError, match="accumkern: cudaSetDevice"):
        _C.run(_C.FOLD, Format.SPLIT24, Start.CONTINUE, table, (0.5, 0), (1.0, 0), no_device, 0)
    torch.cuda.synchronize()
    assert torch.cuda.current_device() == grad.device.index
    assert_same_bits(total, row[1], "after an error")
    backends.kernels(backend).fold(Format.SPLIT24, Start.CONTINUE, [grad], [total], residuals, 0.5, None)
    assert_stored(Format.SPLIT24, Start.CONTINUE, [row], 0.5, [grad], [total], residuals)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_backend
def test_tensors_on_another_device_than_the_current(backend: str) -> None:
    rows = [problem(Format.SPLIT24, numel) for numel in (300, 4097, 200_001)]
    for scale in (0.5, torch.tensor(0.5, device="cuda:1")):
        grads, sums, residuals = columns(rows, "cuda:1")
        accumkern.accumulate_(grads, sums, residuals, scale, backend=backend)
        assert torch.cuda.current_device() == 0
        assert_stored(Format.SPLIT24, Start.CONTINUE, rows, 0.5, grads, sums, residuals)

    params = [nn.Parameter(torch.randn(300, device=f"cuda:{i}").bfloat16()) for i in (0, 1)]
    acc = accumkern.attach(torch.optim.SGD(params), buffer="split32", backend=backend)
    truths = fp64_sums(params)
    for _ in range(4):
        sum((param * torch.randn_like(param)).sum().to("cuda:0") for param in params).backward()
    assert torch.cuda.current_device() == 0
    check_gradients(acc, params, truths)


# ---- the hook ----------------------------------------------------------------------------------------------------


class Window:
    """Small and large parameters with their accumulator, and four micro-gradients for each."""

    def __init__(self, backend: str, numels: list[int], buffer: str = "split32", **options: float) -> None:
        self.params = [nn.Parameter(torch.randn(numel, device=DEVICE).bfloat16()) for numel in numels]
        self.optimizer = torch.optim.SGD(self.params)
        self.acc = accumkern.attach(self.optimizer, buffer, backend=backend, **options)
        self.micro = [[torch.randn_like(param) for _ in range(4)] for param in self.params]
        torch.cuda.synchronize()

    def loss(self, grads: list[Tensor]) -> Tensor:
        return torch.stack([(param * grad).sum() for param, grad in zip(self.params, grads, strict=True)]).sum()

    def of(self, k: int) -> list[Tensor]:
        """Return micro-gradient k of each parameter."""
        return [values[k] for values in self.micro]

    def check(self, scale: float = 1.0) -> None:
        check_gradients(self.acc, self.params, [torch.stack(v).double().sum(0) for v in self.micro], scale)


@ignore_stream_mismatch
@every_backend
def test_hook_with_forward_and_backward_on_a_side_stream(backend: str) -> None:
    window = Window(backend, [300, 5000, 200_001])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for k in range(4):
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP // 4)
            late = [grad.clone() for grad in window.of(k)]
            window.loss(late).backward()
    torch.cuda.current_stream().wait_stream(side)
    window.check()


@every_backend
def test_gradients_of_all_sizes_wait_together_or_are_folded_at_once(backend: str) -> None:
    sizes = [3, 65_537, MAX_WAITING_NUMEL // 2, MAX_WAITING_NUMEL, MAX_WAITING_NUMEL + 1, 1_000_001]
    window = Window(backend, sizes)
    for k in range(4):
        window.loss(window.of(k)).backward()
    window.check()


@ignore_stream_mismatch
@pytest.mark.parametrize("forward_aside", [True, False], ids=["forward-aside", "backward-aside"])
@every_backend
def test_small_gradients_live_until_a_late_fold_has_read_them(backend: str, forward_aside: bool) -> None:
    """A gradient made on one stream and folded, late, on another: its memory must not be given away in between."""
    side, default = torch.cuda.Stream(), torch.cuda.current_stream()
    forward_stream, backward_stream = (side, default) if forward_aside else (default, side)
    with torch.cuda.stream(forward_stream):
        window = Window(backend, [2000, 2000])

    def delay_the_fold(_grad: Tensor) -> None:
        with torch.cuda.stream(backward_stream):
            torch.cuda._sleep(SLEEP)

    window.params[0].register_hook(delay_the_fold)
    for k in range(4):
        with torch.cuda.stream(forward_stream):
            loss = window.loss(window.of(k))
        with torch.cuda.stream(backward_stream):
            loss.backward()
        with torch.cuda.stream(forward_stream):
            taken = [torch.full_like(window.params[0], torch.nan) for _ in range(64)]
        torch.cuda.synchronize()
        del taken, loss
    window.check()


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


@every_backend
def test_hook_after_a_backward_function_with_a_stream_of_its_own(backend: str) -> None:
    window = Window(backend, [300, 5000, 200_001])
    side = torch.cuda.Stream()
    for k in range(4):
        pairs = zip(window.params, window.of(k), strict=True)
        sum(ProductOnSideStream.apply(param, grad, side) for param, grad in pairs).backward()
    window.check()


@pytest.mark.parametrize("buffer", ["split24", "fp32"])
@every_backend
def test_the_hook_never_waits_for_the_gpu(backend: str, buffer: str) -> None:
    window = Window(backend, [*range(1, 200, 10), 200_001], buffer, average_over=4)

    def run() -> None:
        window.optimizer.zero_grad()
        for k in range(4):
            window.loss(window.of(k)).backward()

    run()  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    window.check(scale=1 / 4)


# ---- gradients in host memory --------------------------------------------------------------------------------------


def offloaded_average() -> float:
    """Return the error of an average whose first gradient is still being copied to the host when its hook is called."""
    module = nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16, device=DEVICE)
    alone = copy.deepcopy(module)
    fully_shard(module, offload_policy=CPUOffloadPolicy())
    acc = accumkern.attach(torch.optim.SGD(module.parameters()), "split32", average_over=4)
    for _ in range(3):  # pinned memory is used again, with what an earlier window has left in it
        module.zero_grad()
        truth = torch.zeros(alone.weight.shape, dtype=torch.float64, device=DEVICE)
        for _ in range(4):
            x = torch.randn(64, 4096, dtype=torch.bfloat16, device=DEVICE)
            y = module(x)
            y.register_hook(lambda _: torch.cuda._sleep(SLEEP))
            y.float().square().sum().backward()
            truth += torch.autograd.grad(alone(x).float().square().sum(), alone.weight)[0]
    gradient = acc.gradient(module.weight)
    assert gradient is not None
    assert gradient.device.type == "cpu"
    return relative_error([gradient.to_local()], [truth.cpu() / 4])


def test_a_gradient_on_its_way_to_the_host_is_waited_for() -> None:
    processes = Ranks("nccl")
    try:
        assert processes.run(offloaded_average, ranks=1)[0] < 1e-6
    finally:
        processes.stop()


# ---- graphs: last, because a capture that fails may trouble what comes after it ------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [[300, 0, 4097, 300], [4096], [200_001], [300, 0, 200_001, 4097, 300]],
    ids=["small-list", "small", "large", "list"],
)
@fused_backends
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


@pytest.mark.parametrize("sizes", [[4096], [200_001], [300, 0, 200_001, 4097, 300]], ids=["small", "large", "list"])
@fused_backends
def test_a_captured_step_replays_like_repeated_steps(backend: str, sizes: list[int]) -> None:
    # No other test has MOMENTUM from a sum alone with all scalars on the device: only the call before loads its kernel.
    step = usual(Update.MOMENTUM, sizes, start=Start.FROM_SUM, grad_residuals=None)
    step.divisor, step.factor, step.skip = torch.ones(()), torch.ones(()), torch.zeros(())
    right, captured = step.to(DEVICE), step.to(DEVICE)
    step.to(DEVICE).run(backend)  # compiles and loads
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.run(backend)
    torch.cuda.synchronize()
    assert_stepped(captured, right, "capturing is not running")

    for replay in range(5):
        for ours, other in zip(captured.grads, right.grads, strict=True):
            other.copy_(ours.normal_())
        for one in (captured, right):
            assert isinstance(one.divisor, Tensor)
            assert one.skip is not None
            one.divisor.fill_(replay + 1.0)
            one.coefficients[:, 5] = 0.1 / (replay + 1)
            one.skip.fill_(replay == 3)
        graph.replay()
        right.run(backend)
    torch.cuda.synchronize()
    assert_stepped(captured, right, "after five replays")


# ---- memory that runs out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("masters", [None, "split32"])
def test_a_batch_that_does_not_fit_is_split(masters: str | None) -> None:
    """The real allocator runs out, in a forward or a backward pass, and the sums are those of the size that fits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 2**14), nn.GELU(), nn.Dropout(0.1), nn.Linear(2**14, 64)).to(
        DEVICE, torch.bfloat16
    )
    acc = accumkern.attach(torch.optim.AdamW(model.parameters(), lr=1e-3), master_weights=masters)
    batch = torch.randn(4096, 64, device=DEVICE, dtype=torch.bfloat16)  # 128 MiB for each activation of all samples

    def bits(micro_batch: int | str, memory: str | None) -> list[Tensor]:
        torch.manual_seed(1)
        acc.backward(lambda part: model(part).float().square().mean(), batch, micro_batch, model=model, memory=memory)
        parts = [acc.parts(param) for param in model.parameters()]
        stored = [tensor.clone() for part in parts if part for tensor in part[:2] if tensor is not None]
        model.zero_grad()
        return stored

    gc.collect()
    torch.cuda.empty_cache()  # what the allocator has kept is not limited
    found = bits("auto", "200MB")
    size = acc.micro_batch
    assert size is not None
    assert size < 4096
    assert torch.cuda.get_per_process_memory_fraction() == 1.0
    for one, other in zip(found, bits(size, None), strict=True):
        assert_same_bits(one, other, f"micro-batches of {size}")
