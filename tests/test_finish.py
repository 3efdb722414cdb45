"""Right averages, and the one pass that finishes a window: mean, norm, clipping, rounding."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import accumkern
from accumkern.backends import eager
from accumkern.formats import BUFFERS as BUFFER_FORMATS
from accumkern.formats import Format, Start, decode, divide, encode

BUFFERS = ["split24", "split32", "fp32"]
IGNORED = -100


def model(dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> nn.Module:
    torch.manual_seed(1)
    # Small tensors that wait for the end of the backward pass, and one that does not.
    net = nn.Sequential(nn.Linear(16, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 11))
    return net.to(device, dtype)


def train_window(net: nn.Module, count: int, device: torch.device | str = "cpu") -> None:
    dtype = next(net.parameters()).dtype
    for _ in range(count):
        net(torch.randn(5, 16, device=device).to(dtype)).float().square().sum().backward()


def values(acc: accumkern.GradAccumulator, net: nn.Module) -> list[Tensor]:
    found = [acc.gradient(p) for p in net.parameters()]
    assert all(value is not None for value in found)
    return found  # type: ignore[return-value]


def stock_norm(gradients: list[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return what clip_grad_norm_ does for these gradients."""
    copies = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for copy, gradient in zip(copies, gradients, strict=True):
        copy.grad = gradient.clone()
    return nn.utils.clip_grad_norm_(copies, math.inf, norm_type)


# ---- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", list(Format), ids=lambda f: f.name.lower())
@pytest.mark.parametrize("start", [Start.CONTINUE, Start.FROM_SUM], ids=lambda s: s.name.lower())
@pytest.mark.parametrize("scalars", ["numbers", "tensors"])
@pytest.mark.eager_on_gpu
def test_kernel_bits(backend: str, device: torch.device, format_: Format, start: Start, scalars: str) -> None:
    from accumkern import backends

    for sizes in ([0], [1], [4095], [4097], [100_003], [5, 0, 4096, 70_001, 3]):
        problems = [encode(format_, torch.randn(n) * torch.exp2(torch.randint(-140, 120, (n,)).float())) for n in sizes]
        for sums, _ in problems:
            if len(sums) > 3:
                sums[:3] = torch.tensor([math.nan, math.inf, -math.inf])
        wanted = []
        for sums, residual in problems:
            x = decode(format_, sums, residual if start is Start.CONTINUE else None)
            y = (x / 3.0) * 0.7
            nan = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}[sums.dtype]
            bits = y.to(sums.dtype).view(torch.int32 if sums.dtype is torch.float32 else torch.int16)
            wanted.append(torch.where(y.isnan(), torch.tensor(nan, dtype=bits.dtype), bits))
        moved = [s.to(device, copy=True) for s, _ in problems]
        residuals: Any = None
        if format_ is not Format.PLAIN32:
            residuals = [r.to(device, copy=True) for _, r in problems if r is not None]
        before = None if residuals is None else [r.clone() for r in residuals]
        divisor: Any = 3.0 if scalars == "numbers" else torch.tensor(3.0, device=device)
        factor: Any = 0.7 if scalars == "numbers" else torch.tensor(0.7, device=device)
        backends.kernels(backend).finish(format_, start, moved, residuals, divisor, factor)
        for found, want in zip(moved, wanted, strict=True):
            assert torch.equal(found.cpu().view(want.dtype), want), sizes
        if before is not None:
            for found, want in zip(residuals, before, strict=True):
                same_type = torch.int8
                assert torch.equal(found.view(same_type), want.view(same_type))


# ---- finish ------------------------------------------------------------------------------------------------------


class Divisions(TorchDispatchMode):
    """Records what tensors are divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.divisors: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            self.divisors.append(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nothing_is_divided_by_a_number(buffer: str, dtype: torch.dtype) -> None:
    """On CUDA torch would multiply by its reciprocal, which may be a unit in the last place off."""
    net = model(dtype)
    acc = accumkern.attach(torch.optim.SGD(net.parameters()), buffer, backend="eager")
    train_window(net, 2)
    with Divisions() as found:
        acc.finish(divide_by=3, max_norm=1.0)
        eager.encode(BUFFER_FORMATS[buffer][dtype], [torch.ones(3)], 3, [torch.ones(3, dtype=dtype)], None)
    assert len(found.divisors) > len(list(net.parameters()))
    assert {(type(divisor), divisor.dim(), divisor.dtype) for divisor in found.divisors} == {(Tensor, 0, torch.float32)}


@pytest.mark.parametrize("number", [3.0, 1e-3])
def test_scalars_of_other_dtypes_do_not_widen_a_scalar_parameter(number: float) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64)[: 2 + 2 * (number == 3)]:
        param = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
        acc = accumkern.attach(torch.optim.SGD([param]), backend="eager")
        if dtype is not torch.int64:
            acc.scale = torch.tensor(number, dtype=dtype)
        for _ in range(3):
            param.backward(torch.ones((), dtype=torch.bfloat16))
        scale = 1.0 if dtype is torch.int64 else float(torch.tensor(number, dtype=dtype).float())
        found = acc.gradient(param)
        assert found is not None
        assert found.item() == pytest.approx(3 * scale, rel=2**-16)
        acc.finish(torch.tensor(number, dtype=dtype))
        assert param.grad is not None
        assert param.grad.item() == pytest.approx(3 * scale / number, rel=2**-8)


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("max_norm", [None, 0.05, 1e6], ids=["unclipped", "clipped", "below-the-limit"])
def test_equals_dividing_in_fp32_clipping_and_rounding_once(
    backend: str, device: torch.device, buffer: str, max_norm: float | None
) -> None:
    net = model(device=device)
    optimizer = torch.optim.SGD(net.parameters())
    acc = accumkern.attach(optimizer, buffer, backend=backend)
    for _ in range(2):
        train_window(net, 3, device)
        divided = [divide(value, 37) for value in values(acc, net)]
        norm = stock_norm(divided)
        finished = acc.finish(divide_by=37, max_norm=max_norm)
        torch.testing.assert_close(finished.norm, norm, rtol=1e-5, atol=0)
        limit = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch.testing.assert_close(finished.clip_coefficient, limit, rtol=1e-5, atol=0)
        assert (finished.clip_coefficient < 1) == (max_norm == 0.05)
        assert not finished.found_nonfinite
        for p, value in zip(net.parameters(), divided, strict=True):
            assert p.grad is not None
            assert torch.equal(p.grad, (value * finished.clip_coefficient).to(p.dtype))
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = model(dtype)
    acc = accumkern.attach(torch.optim.SGD(net.parameters()), "fp32")
    for _ in range(2):
        net.zero_grad()
        train_window(net, 3)
        grads = [p.grad.to(torch.float64, copy=True) for p in net.parameters() if p.grad is not None]
        finished = acc.finish(divide_by=8.0, max_norm=0.01)
        tolerance = {"rtol": 2e-3, "atol": 1e-7} if dtype is torch.float16 else {"rtol": 1e-5, "atol": 1e-10}
        torch.testing.assert_close(finished.norm.double(), stock_norm([g / 8 for g in grads]), rtol=1e-3, atol=0)
        for p, grad in zip(net.parameters(), grads, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad.double(), grad / 8 * finished.clip_coefficient.double(), **tolerance)


@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf], ids=str)
@pytest.mark.parametrize("buffer", BUFFERS)
def test_other_norms(norm_type: float, buffer: str) -> None:
    net = model()
    acc = accumkern.attach(torch.optim.SGD(net.parameters()), buffer)
    train_window(net, 4)
    norm = stock_norm([value / 5 for value in values(acc, net)], norm_type)
    torch.testing.assert_close(acc.finish(5, 1.0, norm_type).norm, norm, rtol=1e-5, atol=0)


def test_norm_of_a_large_gradient_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from accumkern import finish

    monkeypatch.setattr(finish, "_PART_NUMEL", 1000)
    net = model().to(memory_format=torch.contiguous_format)
    acc = accumkern.attach(torch.optim.SGD(net.parameters()), "split32")
    train_window(net, 3)
    for norm_type in (1.0, 3.0, math.inf):  # the 2-norm has a kernel
        norm = stock_norm(values(acc, net), norm_type)
        batches = finish.batches_of(acc._attachment.with_gradients())
        torch.testing.assert_close(finish.total_norm(batches, norm_type, acc._fold.kernels_on), norm, rtol=1e-5, atol=0)


def test_norm_is_one_call_for_those_that_are_stored_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from accumkern import backends

    calls: list[tuple[Format, Start, int]] = []
    original = backends.kernels

    def kernels(name: str) -> backends.Kernels:
        def squares(format_: Format, start: Start, sums: list[Tensor], *rest: Any) -> None:
            calls.append((format_, start, len(sums)))
            original(name).squares(format_, start, sums, *rest)

        return original(name)._replace(squares=squares)

    monkeypatch.setattr(backends, "kernels", kernels)
    net, once, single = model(), nn.Parameter(torch.ones(5).bfloat16()), nn.Parameter(torch.ones(3))
    acc = accumkern.attach(torch.optim.SGD([*net.parameters(), once, single]))
    for _ in range(2):
        acc._attachment.optimizer.zero_grad()
        train_window(net, 2)
        (once.float().sum() + single.sum()).backward()
        norm = stock_norm([*values(acc, net), torch.ones(8)])
        torch.testing.assert_close(acc.finish().norm, norm, rtol=1e-5, atol=0)
        split, plain = Format.SPLIT24, Format.PLAIN32
        assert calls == [(split, Start.CONTINUE, 6), (split, Start.FROM_SUM, 1), (plain, Start.FROM_SUM, 1)]
        calls.clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called."""
    from accumkern import backends

    found: list[str] = []
    original = backends.kernels

    def recording(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found.append(name)
            return kernel(*arguments)

        return call

    def kernels(backend: str) -> backends.Kernels:
        return backends.Kernels(**{n: recording(n, k) for n, k in original(backend)._asdict().items()})

    monkeypatch.setattr(backends, "kernels", kernels)
    return found


ENDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "norm": ({}, ["squares", "norm"]),
    "divide": ({"divide_by": 4}, ["squares", "norm", "finish"]),
    "clip": ({"max_norm": 1.0}, ["squares", "norm", "finish"]),
    "divide and clip": ({"divide_by": torch.tensor(4.0), "max_norm": 1.0}, ["squares", "norm", "finish"]),
}


@pytest.mark.parametrize("case", list(ENDS))
@pytest.mark.parametrize("masters", [None, "split32"])
def test_three_launches_and_as_many_operations_whatever_the_number_of_tensors(
    launches: list[str], case: str, masters: str | None
) -> None:
    if (reason := accumkern.available_backends()["cpu"]) is not None:  # eager kernels are torch's operations
        pytest.skip(f"backend cpu: {reason}")
    arguments, wanted = ENDS[case]
    counts = []
    for count in (1, 40):
        params = [nn.Parameter(torch.ones(70).bfloat16()) for _ in range(count)]
        acc = accumkern.attach(torch.optim.SGD(params), backend="cpu", master_weights=masters)
        for _ in range(2):
            (sum(p.sum() for p in params) * 1.0).backward()  # type: ignore[union-attr]
        launches.clear()
        with Operations() as operations:
            acc.finish(**arguments)
        assert launches == [name if masters is None else name.replace("finish", "rescale") for name in wanted]
        counts.append(operations.count)
    assert counts[0] == counts[1] <= 8


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_launches_where_gradients_lie_in_memory_otherwise(launches: list[str]) -> None:
    """One that was folded, one that came alone, and an FP32 one: each kind has its launch, and the norm is one."""
    folded, once, single = (
        nn.Parameter(torch.ones(5, dtype=d)) for d in (torch.bfloat16, torch.bfloat16, torch.float32)
    )
    acc = accumkern.attach(torch.optim.SGD([folded, once, single]))
    folded.sum().backward()
    (folded.sum() + once.sum() + single.sum()).backward()
    launches.clear()
    assert acc.finish(max_norm=1.0).norm == torch.tensor(30.0).sqrt()
    assert launches == [*["squares"] * 3, "norm", *["finish"] * 3]


@pytest.mark.parametrize("divide_by", [1.0, 37.0, torch.tensor(3.0)], ids=str)
@pytest.mark.parametrize("max_norm", [None, 0.05, 1e6, math.inf], ids=str)
def test_one_launch_ends_a_norm_as_torchs_operations_do(divide_by: float | Tensor, max_norm: float | None) -> None:
    from accumkern import finish
    from accumkern.clipping import clipped

    net = model()
    acc = accumkern.attach(torch.optim.SGD(net.parameters()))
    for special in (None, math.nan, math.inf, 0.0):
        train_window(net, 3)
        if special is not None:
            for param in net.parameters():
                assert param.grad is not None
                param.grad.fill_(special)
        batches = finish.batches_of(acc._attachment.with_gradients())
        wanted = clipped(finish.total_norm(batches, 2.0, acc._fold.kernels_on), divide_by, max_norm)
        found = acc.finish(divide_by, max_norm)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "eager"], indirect=True)
def test_gradients_that_have_a_graph(backend: str) -> None:
    param = nn.Parameter(torch.ones(4))
    acc = accumkern.attach(torch.optim.SGD([param]), backend=backend)
    (param**2).sum().backward(create_graph=True)
    assert param.grad is not None
    assert param.grad.requires_grad
    with torch.no_grad():
        wanted = param.grad / 4
    finished = acc.finish(divide_by=torch.tensor(2.0, requires_grad=True), max_norm=2.0)
    assert not any(scalar.requires_grad for scalar in finished)
    assert finished.norm == 2
    torch.testing.assert_close(param.grad.detach(), 2 * wanted)
    param.grad = None


def unscale(grad: Tensor) -> None:
    """Multiply by 2 as ``GradScaler.unscale_`` does."""
    torch._amp_foreach_non_finite_check_and_unscale_([grad], torch.zeros(1), torch.tensor(2.0))


# Each doubles a bfloat16 gradient, without a trace in its version.
WRITES: dict[str, Callable[[Tensor], object]] = {
    "numpy": lambda grad: grad.view(torch.int16).numpy().__iadd__(1 << 7),  # one more in the exponent
    "dlpack": lambda grad: torch.from_dlpack(grad).mul_(2),
    "data": lambda grad: grad.data.mul_(2),
    "storage": lambda grad: grad.untyped_storage().copy_((2 * grad).untyped_storage()),
    "unscale_": unscale,
}


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("way", list(WRITES))
def test_norm_after_writes_that_leave_no_trace(way: str, buffer: str) -> None:
    if way == "numpy":
        pytest.importorskip("numpy")
    param = nn.Parameter(torch.zeros(70_001, dtype=torch.bfloat16))
    acc = accumkern.attach(torch.optim.SGD([param]), buffer)
    for _ in range(3):
        param.grad = None
        for _ in range(3):
            (param * (1 + torch.rand(70_001)).bfloat16()).sum().backward()
        value, grad = acc.gradient(param), param.grad
        assert value is not None
        assert grad is not None
        if buffer == "fp32":  # which gives way to an edit
            value = grad.float()
        version = grad._version
        WRITES[way](grad)
        assert (acc.parts(param).sum is grad, grad._version) == (True, version)  # type: ignore[union-attr]
        finished = acc.finish(max_norm=1.0)
        torch.testing.assert_close(finished.norm, 2 * value.norm(), rtol=1e-5, atol=0)
        torch.testing.assert_close(grad.float().norm(), torch.ones(()), rtol=1e-3, atol=0)


def test_one_gradient_without_a_fold_and_unused_parameters() -> None:
    used, once, unused = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(3))
    acc = accumkern.attach(torch.optim.SGD([used, once, unused]))
    for _ in range(2):
        used.grad = once.grad = None
        (used * 3).sum().backward()
        (used * 3 + once * 4).sum().backward()
        finished = acc.finish(divide_by=2.0)
        assert finished.norm == math.sqrt(4 * 9 + 4 * 4)
        assert (used.grad == 3).all()
        assert (once.grad == 2).all()
        assert unused.grad is None


def test_norm_of_nothing_is_float32_whatever_the_default() -> None:
    empty = nn.Parameter(torch.zeros(0))
    acc = accumkern.attach(torch.optim.SGD([empty]))
    empty.sum().backward()
    torch.set_default_dtype(torch.float64)
    try:
        finished = acc.finish(max_norm=1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert finished.norm == 0
    assert finished.norm.dtype is finished.clip_coefficient.dtype is torch.float32


@pytest.mark.parametrize("buffer", BUFFERS)
def test_partial_sums_are_float32_whatever_the_default(buffer: str) -> None:
    # float64, because rows of a 16-bit default would be too short, and a kernel would write beyond them.
    param = nn.Parameter(torch.zeros(5000).bfloat16())
    acc = accumkern.attach(torch.optim.SGD([param]), buffer, stats=True)
    torch.set_default_dtype(torch.float64)
    try:
        for _ in range(3):
            param.sum().backward()
        noise = acc.noise_scale()
        finished = acc.finish()
    finally:
        torch.set_default_dtype(torch.float32)
    assert finished.norm.item() == pytest.approx(3 * 5000**0.5)
    assert noise.window.squared_gradient == pytest.approx(5000)


@pytest.mark.parametrize("norm_type", [2.0, math.inf], ids=str)
def test_gradients_without_elements(norm_type: float) -> None:
    empty, other = nn.Parameter(torch.zeros(0, 3).bfloat16()), nn.Parameter(torch.zeros(4).bfloat16())
    acc = accumkern.attach(torch.optim.SGD([empty, other]))
    for used in ([empty], [empty, other]):
        for _ in range(3):
            sum((p * 2).sum() for p in used).backward()  # type: ignore[union-attr]
        finished = acc.finish(2.0, 1.0, norm_type)
        wanted = 0.0 if len(used) == 1 else 3.0 * (2.0 if norm_type == 2 else 1.0)
        assert finished.norm == wanted
        empty.grad = other.grad = None


def test_division_by_one_leaves_everything() -> None:
    net = model()
    acc = accumkern.attach(torch.optim.SGD(net.parameters()))
    train_window(net, 3)
    before, grads = values(acc, net), [p.grad.clone() for p in net.parameters() if p.grad is not None]
    acc.finish()
    assert all(torch.equal(a, b) for a, b in zip(before, values(acc, net), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True) if p.grad is not None)


def test_divides_by_a_tensor_of_counted_tokens() -> None:
    net = model()
    acc = accumkern.attach(torch.optim.SGD(net.parameters()))
    for divide_by in (torch.tensor(37), torch.tensor(37.0), torch.tensor(37.0, dtype=torch.float64)):
        net.zero_grad()
        train_window(net, 2)
        wanted = [(value / 37).bfloat16() for value in values(acc, net)]
        acc.finish(divide_by=divide_by)
        assert all(torch.equal(p.grad, w) for p, w in zip(net.parameters(), wanted, strict=True) if p.grad is not None)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "holes", "sparse", "complex"])
def test_layouts(layout: str) -> None:
    if layout == "channels_last":
        param = nn.Parameter(torch.randn(4, 3, 5, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last))
    elif layout == "transposed":
        param = nn.Parameter(torch.randn(7, 9, dtype=torch.bfloat16).t())
    elif layout == "sparse":
        param = nn.Parameter(torch.randn(7, 9))
    elif layout == "complex":
        param = nn.Parameter(torch.randn(7, 9, dtype=torch.complex64))
    else:
        param = nn.Parameter(torch.randn(7, 9, dtype=torch.bfloat16))
    acc = accumkern.attach(torch.optim.SGD([param]), "split32")
    if layout == "holes":
        param.grad = torch.zeros(7, 18, dtype=torch.bfloat16)[:, ::2]
    for _ in range(3):
        if layout == "sparse":
            functional.embedding(torch.tensor([1, 3, 1]), param, sparse=True).sum().backward()
        else:
            (param * torch.randn_like(param)).abs().sum().backward()
    assert param.grad is not None
    grad = param.grad.to_dense() if layout == "sparse" else param.grad.detach()
    value = acc.gradient(param) if layout in ("channels_last", "transposed") else None
    wanted = (grad if value is None else value).to(torch.complex128 if layout == "complex" else torch.float64) / 3
    torch.testing.assert_close(acc.finish(3).norm, torch.linalg.vector_norm(wanted).float(), rtol=1e-3, atol=0)
    found = param.grad.to_dense() if layout == "sparse" else param.grad
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-2, atol=0)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_norm_of_a_compressed_sparse_gradient() -> None:
    param = nn.Parameter(torch.eye(4).to_sparse_csr())
    acc = accumkern.attach(torch.optim.SGD([param]))
    torch.sparse.mm(param, torch.ones(4, 2)).sum().backward()
    assert param.grad is not None
    assert param.grad.layout is torch.sparse_csr
    assert acc.finish().norm == torch.linalg.vector_norm(param.grad.values())


def test_the_next_window_starts_anew() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters())
    for style in (True, False):
        acc = accumkern.attach(optimizer, "split32")
        for _ in range(2):
            train_window(net, 3)
            acc.finish(7.0, 1.0)
            optimizer.zero_grad(set_to_none=style)
        torch.manual_seed(5)
        train_window(net, 4)
        found = values(acc, net)
        acc.detach()
        net.zero_grad()
        clean = accumkern.attach(optimizer, "split32")
        torch.manual_seed(5)
        train_window(net, 4)
        assert all(torch.equal(a, b) for a, b in zip(found, values(clean, net), strict=True))
        clean.detach()
        net.zero_grad()


# ---- averages ----------------------------------------------------------------------------------------------------


class Language(nn.Module):
    """A tiny next-token model with FP32 weights, so that what remains is the arithmetic of averaging."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32, dtype=dtype)
        self.head = nn.Linear(32, 50, dtype=dtype)

    def forward(self, tokens: Tensor, labels: Tensor, reduction: str) -> Tensor:
        logits = self.head(torch.tanh(self.embedding(tokens)))
        return functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction
        )


def ragged_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of wildly different lengths, padded, some labels ignored."""
    batches = []
    for i in range(count):
        length = [1, 40, 7, 90, 3, 15][i % 6]
        tokens, labels = torch.randint(0, 50, (2, length)), torch.randint(0, 50, (2, length))
        labels[0, length // 2 + 1 :] = IGNORED
        labels[torch.rand_like(labels, dtype=torch.float32) < 0.2] = IGNORED
        labels[0, 0] = 1
        batches.append((tokens, labels))
    return batches


def one_big_batch(net: Language, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return the FP64 gradient of CrossEntropyLoss(reduction="sum") / all counted tokens."""
    copy = Language(torch.float64)
    copy.load_state_dict(net.state_dict())
    length = max(tokens.shape[1] for tokens, _ in batches)
    tokens = torch.cat([functional.pad(t, (0, length - t.shape[1])) for t, _ in batches])
    labels = torch.cat([functional.pad(x, (0, length - x.shape[1]), value=IGNORED) for _, x in batches])
    (copy(tokens, labels, "sum") / (labels != IGNORED).sum()).backward()
    return [p.grad for p in copy.parameters() if p.grad is not None]


def relative_error(net: nn.Module, truth: list[Tensor]) -> float:
    grads = [p.grad.double() for p in net.parameters() if p.grad is not None]
    error = sum((g - t).square().sum().item() for g, t in zip(grads, truth, strict=True))
    return math.sqrt(error / sum(t.square().sum().item() for t in truth))


@pytest.mark.parametrize("way", ["scale as a number", "scale as a tensor", "finish", "finish with a tensor"])
@pytest.mark.parametrize("count", [6, 5, 1], ids=["full", "short-last", "single"])
def test_token_mean_equals_one_big_batch(way: str, count: int) -> None:
    net = Language(torch.float32)
    acc = accumkern.attach(torch.optim.SGD(net.parameters()))
    for _ in range(2):
        net.zero_grad()
        batches = ragged_batches(count)
        truth = one_big_batch(net, batches)
        tokens = sum((labels != IGNORED).sum() for _, labels in batches)
        assert isinstance(tokens, Tensor)
        if way == "scale as a number":
            acc.scale = 1 / tokens.item()
        elif way == "scale as a tensor":
            acc.scale = 1 / tokens
        for inputs, labels in batches:
            net(inputs, labels, "sum").backward()
        if way == "finish":
            acc.finish(divide_by=tokens.item())
        elif way == "finish with a tensor":
            acc.finish(divide_by=tokens)
        assert relative_error(net, truth) < 1e-6


def test_mean_of_means_is_something_else() -> None:
    """The trap that the others avoid: it is off by far more than rounding."""
    net = Language(torch.float32)
    optimizer = torch.optim.SGD(net.parameters())  # it keeps the accumulator alive
    accumkern.attach(optimizer, average_over=6)
    batches = ragged_batches(6)
    for inputs, labels in batches:
        net(inputs, labels, "mean").backward()
    assert relative_error(net, one_big_batch(net, batches)) > 0.1


def test_weighted_micro_batches_make_the_mean_of_means_right() -> None:
    net = Language(torch.float32)
    acc = accumkern.attach(torch.optim.SGD(net.parameters()))
    batches = ragged_batches(6)
    total = sum((labels != IGNORED).sum().item() for _, labels in batches)
    for inputs, labels in batches:
        acc.scale = (labels != IGNORED).sum() / total  # a 0-dim tensor, another one for each micro-batch
        net(inputs, labels, "mean").backward()
    assert relative_error(net, one_big_batch(net, batches)) < 1e-6


def test_a_short_last_window_of_a_fixed_mean() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    acc = accumkern.attach(torch.optim.SGD([param]), "split32", average_over=8)
    assert acc.scale == 1 / 8
    for count in (8, 3):
        param.grad = None
        acc.scale = 1 / count
        micro = [torch.full((3,), 1.0 + i / 64, dtype=torch.bfloat16) for i in range(count)]
        for grad in micro:
            (param * grad).sum().backward()
        value = acc.gradient(param)
        assert value is not None
        torch.testing.assert_close(value.double(), torch.stack(micro).double().mean(0), rtol=1e-6, atol=0)


def test_scale_set_back_to_one_keeps_the_first_gradient_as_it_comes() -> None:
    param = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    acc = accumkern.attach(torch.optim.SGD([param]), average_over=4)
    acc.scale = 1
    (param * 3).sum().backward()
    assert (param.grad == 3).all()
    parts = acc.parts(param)
    assert parts is not None
    assert parts.residual is None


# ---- GradScaler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", [False, True])
def test_grad_scaler_then_finish(overflow: bool) -> None:
    """The recipe of docs/averaging.md: unscale_, finish, step; an overflow skips the step and shrinks the scale."""
    net = Language(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    acc = accumkern.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        optimizer.zero_grad()
        batches = ragged_batches(4)
        truth = one_big_batch(net, batches)
        tokens = sum((labels != IGNORED).sum().item() for _, labels in batches)
        for inputs, labels in batches:
            scaler.scale(net(inputs, labels, "sum")).backward()
        if overflow:
            assert net.head.weight.grad is not None
            net.head.weight.grad[0, 0] = math.inf
        before, scale = [p.detach().clone() for p in net.parameters()], scaler.get_scale()
        scaler.unscale_(optimizer)
        finished = acc.finish(divide_by=tokens, max_norm=1e6)
        assert finished.found_nonfinite == overflow
        if not overflow:
            assert relative_error(net, truth) < 1e-6
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
        assert moved == (not overflow)
        assert (scaler.get_scale() < scale) == overflow


@pytest.mark.parametrize("buffer", BUFFERS)
def test_ordinary_unscale_and_clip_stay_right(buffer: str) -> None:
    net = model(torch.float32)
    optimizer = torch.optim.SGD(net.parameters())
    accumkern.attach(optimizer, buffer)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    grads = []
    for _ in range(2):
        torch.manual_seed(3)
        net.zero_grad()
        for _ in range(3):
            scaler.scale(net(torch.randn(5, 16)).square().sum()).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        grads.append([norm, *(p.grad for p in net.parameters() if p.grad is not None)])
        scaler.update()
    torch.manual_seed(3)
    clean = model(torch.float32)
    torch.manual_seed(3)
    for _ in range(3):
        clean(torch.randn(5, 16)).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(clean.parameters(), 0.1)
    for found in grads:
        for a, b in zip(found, [norm, *(p.grad for p in clean.parameters())], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"divide_by": 0}, ValueError, "divide_by is 0; it must be a number or .*positive"),
        ({"divide_by": 1e300}, ValueError, r"divide_by is 1e\+300; .* finite in FP32"),
        ({"divide_by": 1e-300}, ValueError, "divide_by is 1e-300; .*positive"),
        ({"divide_by": -2.0}, ValueError, "divide_by is -2.0"),
        ({"divide_by": math.nan}, ValueError, "divide_by is nan"),
        ({"divide_by": torch.tensor(0)}, ValueError, "divide_by is 0"),
        ({"divide_by": torch.ones(2)}, ValueError, r"divide_by is a tensor of shape \(2,\)"),
        ({"divide_by": torch.ones((), device="meta")}, ValueError, "divide_by is on meta and the gradients on cpu"),
        ({"divide_by": "8"}, TypeError, "divide_by is a str"),
        ({"divide_by": True}, TypeError, "divide_by is a bool"),
        ({"max_norm": 0.0}, ValueError, "max_norm is 0.0; it must be a positive number .* or None"),
        ({"max_norm": math.nan}, ValueError, "max_norm is nan"),
        ({"max_norm": "1"}, TypeError, "max_norm is a str"),
        ({"norm_type": -1}, ValueError, "norm_type is -1"),
        ({"norm_type": "inf"}, TypeError, "norm_type is a str"),
    ],
    ids=str,
)
def test_bad_arguments_leave_everything(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    net = model()
    acc = accumkern.attach(torch.optim.SGD(net.parameters()))
    train_window(net, 2)
    before = values(acc, net)
    with pytest.raises(error, match=words):
        acc.finish(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, values(acc, net), strict=True))
    acc.finish(2.0)  # and it can still be finished


def test_nothing_to_finish() -> None:
    acc = accumkern.attach(torch.optim.SGD(model().parameters()))
    with pytest.raises(RuntimeError, match="there is nothing to finish"):
        acc.finish()


def test_twice_in_a_window_is_refused() -> None:
    net = model()
    acc = accumkern.attach(torch.optim.SGD(net.parameters()))
    train_window(net, 2)
    acc.finish(2.0)
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    with pytest.raises(RuntimeError, match="finish\\(\\) was called already"):
        acc.finish(2.0)
    assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before, strict=True) if p.grad is not None)


def test_nonfinite_norm() -> None:
    net = model()
    acc = accumkern.attach(torch.optim.SGD(net.parameters()))
    train_window(net, 2)
    net[0].weight.grad[0, 0] = math.nan
    before = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    with pytest.raises(RuntimeError, match=r"total norm of order .* of the gradients is nan"):
        acc.finish(2.0, 1.0, error_if_nonfinite=True)
    for p, b in zip(net.parameters(), before, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad.nan_to_num(7), b.nan_to_num(7))
    assert acc.finish(2.0, 1.0).found_nonfinite


@pytest.mark.parametrize(
    ("scale", "error", "words"),
    [
        ("2", TypeError, "scale is a str"),
        (math.inf, ValueError, "scale is inf"),
        (torch.ones(2), ValueError, r"scale is a tensor of shape \(2,\)"),
        (torch.ones((), device="meta"), ValueError, "scale is on meta and the parameters on cpu"),
    ],
    ids=str,
)
def test_bad_scales(scale: Any, error: type[Exception], words: str) -> None:
    acc = accumkern.attach(torch.optim.SGD(model().parameters()), average_over=4)
    with pytest.raises(error, match=words):
        acc.scale = scale
    assert acc.scale == 0.25


@pytest.mark.parametrize("number", [2**64, 10**38])
def test_integers_of_more_than_64_bits(number: int) -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    acc = accumkern.attach(torch.optim.SGD([param], lr=1.0))
    (param * float(number)).sum().backward()
    acc.finish(divide_by=number)
    assert (param.grad == 1).all()
    param.sum().backward()
    assert float(acc.finish(max_norm=number).clip_coefficient) == 1
    acc.scale = number
    with pytest.raises(ValueError, match="scale is a tensor of shape"):
        acc.scale = torch.zeros(()).to_sparse()
