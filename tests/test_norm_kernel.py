"""The end of a norm: every backend against torch's own operations, bit for bit."""

import math

import pytest
import torch
from torch import Tensor, nn

from accumkern import backends
from accumkern.clipping import clipped

GREATEST = 2.0**128 - 2.0**104
MAX_NORMS = [None, 1e-30, 0.05, 1.0, 3e38, math.inf]


def norm_of(
    backend: str, device: torch.device, partials: Tensor, divisor: float | Tensor, max_norm: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the kernel with results that have room around them, where nothing may be written."""
    room = torch.full((6,), 85.0, device=device)
    flags = torch.ones(3, dtype=torch.bool, device=device)
    flags[::2] = False
    backends.kernels(backend).norm(partials.to(device), divisor, max_norm, room[2:4], flags[1])
    assert room[:2].tolist() == room[4:].tolist() == [85.0, 85.0]
    assert flags[::2].tolist() == [False, False]
    return room[2].cpu(), room[3].cpu(), flags[1].cpu()


def as_torch_does(root: Tensor, divisor: float, max_norm: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return norm and coefficient by the operations of clip_grad_norm_ on the CPU."""
    norm = root / torch.tensor(divisor, dtype=torch.float32)
    coefficient = torch.ones(()) if max_norm is None else torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return norm, coefficient, ~norm.isfinite()


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], what: object) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype is b.dtype
        assert a.shape == b.shape == ()
        assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)), f"{what}: {a} is not {b}"
        assert a.isnan() == b.isnan(), what


@pytest.mark.parametrize("max_norm", MAX_NORMS, ids=str)
@pytest.mark.parametrize("scalar", ["number", "tensor"])
@pytest.mark.eager_on_gpu
def test_bits_of_torch(backend: str, device: torch.device, max_norm: float | None, scalar: str) -> None:
    """One partial sum, so that no order counts: nothing, the least, the greatest, what is not finite, and any."""
    squares = [0.0, 2.0**-149, 1e-40, 2.0**-126, 1e-12, 1.0, 2.0, 3.0, 1e30, GREATEST, math.inf, math.nan]
    for square in [*squares, *torch.rand(40).mul(4).tolist()]:
        for divisor in (1.0, 3.0, 37.0, 2.0**-149, 1e-38, GREATEST):
            given = divisor if scalar == "number" else torch.tensor(divisor, device=device)
            partials = torch.tensor([square])
            found = norm_of(backend, device, partials, given, max_norm)
            root = partials[0].double().sqrt().float()
            assert_same(found, as_torch_does(root, divisor, max_norm), (square, divisor))


@pytest.mark.parametrize("divisor", [0.0, -2.0, math.inf, math.nan], ids=str)
@pytest.mark.eager_on_gpu
def test_divisors_on_the_device_that_nobody_has_looked_at(backend: str, device: torch.device, divisor: float) -> None:
    for square in (0.0, 4.0, math.inf):
        given = torch.tensor(divisor, device=device)
        found = norm_of(backend, device, torch.tensor([square]), given, 1.0)
        assert_same(found, as_torch_does(torch.tensor(square).sqrt(), divisor, 1.0), square)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31, 33, 1023, 1024, 1025, 8191, 100_003])
@pytest.mark.eager_on_gpu
def test_many_partial_sums(backend: str, device: torch.device, count: int) -> None:
    """Numbers whose sum FP64 holds, so that the order does not matter; and any, near the root that FP64 gives."""
    exact = torch.randint(0, 2**20, (count,)).float()
    total = torch.tensor(float(sum(map(int, exact.tolist()))), dtype=torch.float64)
    found = norm_of(backend, device, exact, 3.0, 2.0)
    assert_same(found, as_torch_does(total.sqrt().float(), 3.0, 2.0), count)
    spread = torch.randn(count).square() * torch.exp2(torch.randint(-40, 40, (count,)).float())
    first, second = (norm_of(backend, device, spread, 1.0, None) for _ in range(2))
    assert_same(first, second, "a second run")
    wanted = torch.tensor(math.sqrt(math.fsum(spread.tolist()))).float()
    torch.testing.assert_close(first[0], wanted, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_one_of_many_is_not_finite(backend: str, device: torch.device, special: float) -> None:
    for at in (0, 1500, 2999):
        partials = torch.ones(3000)
        partials[at] = special
        found = norm_of(backend, device, partials, 2.0, 1.0)
        assert_same(found, as_torch_does(partials.sum().sqrt(), 2.0, 1.0), at)
        assert found[2]


def test_sums_beyond_fp32_have_a_norm(backend: str, device: torch.device) -> None:
    found = norm_of(backend, device, torch.full((4,), 3e38), 1.0, 1.0)
    assert_same(found, as_torch_does(torch.tensor(math.sqrt(4 * float(torch.tensor(3e38)))), 1.0, 1.0), "")
    assert not found[2]


@pytest.mark.parametrize("max_norm", [0.05, 1e30, math.inf], ids=str)
def test_reference_has_the_bits_of_clip_grad_norm(max_norm: float) -> None:
    for _ in range(200):
        param = nn.Parameter(torch.zeros(1))
        param.grad = torch.randn(1) * torch.exp2(torch.randint(-60, 60, ()).float())
        before = param.grad.clone()
        norm = nn.utils.clip_grad_norm_([param], max_norm)
        found = clipped(norm, 1.0, max_norm)
        assert torch.equal(found[0], norm)
        assert torch.equal(before * found[1], param.grad)
