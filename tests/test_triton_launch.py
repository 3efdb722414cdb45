"""How the Triton backend launches its kernels: how often, on what, and by which machine code; and its norm."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import assert_same_bits
from kernel_cases import Row, accumulated
from step_cases import usual
from torch import Tensor

from accumkern import backends
from accumkern.formats import BLOCK_NUMEL, Format, Start, decode, encode, partial_rows
from accumkern.updates import Update

SPLIT24, CONTINUE = Format.SPLIT24, Start.CONTINUE
SIZES = [3, 70_000, 0, 4096, 12_289, 1, 0]
BLOCKS = sum(partial_rows(numel) for numel in SIZES)

only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


class Recorder:
    """A kernel whose launches are written down: the number of programs, and what it was given."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[int, tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:  # None: asked for again at the next launch
            self.launches.append((grid[0], arguments))
            self.kernel[grid](*arguments, **options)

        return launch

    @property
    def programs(self) -> list[int]:
        return [programs for programs, _ in self.launches]


@pytest.fixture
def record(backend: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Recorder]:
    """Put a recorder in a kernel's place."""
    module = importlib.import_module(backends.BACKENDS[backend].module)

    def put(name: str) -> Recorder:
        recorder = Recorder(getattr(module, name))
        monkeypatch.setattr(module, name, recorder)
        return recorder

    return put


def stored(sizes: list[int], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Return (sums, residuals) of SPLIT24."""
    pairs = [encode(SPLIT24, 1 + torch.randn(numel)) for numel in sizes]
    return [total.to(device) for total, _ in pairs], [low.to(device) for _, low in pairs if low is not None]


def values_of(sums: list[Tensor], residuals: list[Tensor]) -> list[Tensor]:
    return [decode(SPLIT24, total, low) for total, low in zip(sums, residuals, strict=True)]


def assert_near(partials: Tensor, x: Tensor) -> None:
    """Compare sums of squares of each block of a tensor with FP64."""
    blocks = [block.double().square().sum() for block in x.split(BLOCK_NUMEL) if len(block)]
    torch.testing.assert_close(partials.double().cpu(), torch.tensor(blocks).double(), rtol=1e-6, atol=0)


@only_triton
@pytest.mark.parametrize("name", ["accumulate", "finish", "rescale", "decode", "encode", "squares"])
def test_a_list_of_any_sizes_is_one_launch(
    backend: str, device: torch.device, record: Callable[[str], Recorder], name: str
) -> None:
    sums, residuals = stored(SIZES, device)
    before = values_of(sums, residuals)
    kernels = backends.kernels(backend)
    launched = record(f"{'finish' if name == 'rescale' else name}_list_kernel")
    if name == "accumulate":
        kernels.fold(SPLIT24, CONTINUE, [torch.zeros_like(total) for total in sums], sums, residuals, 1.0, None)
    elif name == "finish":
        kernels.finish(SPLIT24, CONTINUE, sums, residuals, 1.0, 1.0)
    elif name == "rescale":
        kernels.rescale(SPLIT24, CONTINUE, sums, residuals, 1.0, 1.0)
    elif name == "encode":
        kernels.encode(SPLIT24, before, 1.0, sums, residuals)
    elif name == "decode":
        decoded = [torch.zeros_like(value) for value in before]
        kernels.decode(SPLIT24, sums, residuals, decoded)
        for found, wanted in zip(decoded, before, strict=True):
            assert_same_bits(found, wanted)
    else:
        partials = torch.full((BLOCKS,), math.nan, device=device)
        kernels.squares(SPLIT24, CONTINUE, sums, residuals, partials)  # type: ignore[arg-type]
        assert partials.isfinite().all()
    assert launched.programs == [BLOCKS]
    for found, wanted in zip(values_of(sums, residuals), before, strict=True):
        if name != "finish":  # which leaves residuals as they were
            assert_same_bits(found, wanted)


@only_triton
def test_a_step_of_a_list_is_one_launch(backend: str, device: torch.device, record: Callable[[str], Recorder]) -> None:
    launched = record("step_list_kernel")
    usual(Update.ADAM, [3, 9000, 0, 2048]).to(device).run(backend)
    assert launched.programs == [1 + 5 + 1]


@only_triton
def test_nothing_is_launched_for_empty_tensors(
    backend: str, device: torch.device, record: Callable[[str], Recorder]
) -> None:
    launched = [record(f"finish{kind}_kernel") for kind in ("", "_list")]
    for sizes in ([0], [0, 0, 0]):
        backends.kernels(backend).finish(SPLIT24, CONTINUE, *stored(sizes, device), 1.0, 1.0)
    assert [recorder.programs for recorder in launched] == [[], []]


@only_triton
def test_unaligned_tensors_have_a_launch_of_their_own(
    backend: str, device: torch.device, record: Callable[[str], Recorder]
) -> None:
    """Of each column in turn, and with sums that lie anywhere; what is written goes where it belongs."""
    sizes = [5000, 300, 4096, 0, 9001]
    for aside in range(3):
        rows: list[Row] = [(torch.randn(n).bfloat16(), *encode(SPLIT24, torch.randn(n))) for n in sizes]
        columns: list[list[Tensor]] = [[], [], []]
        for i, row in enumerate(rows):
            for k, (column, tensor) in enumerate(zip(columns, row, strict=True)):
                assert tensor is not None
                shift = 3 if k == aside and i in (1, 4) else 0
                room = torch.zeros(len(tensor) + shift, dtype=tensor.dtype, device=device)
                column.append(room[shift:].copy_(tensor))
        launched = record("accumulate_list_kernel")
        grads, sums, residuals = columns
        partials = [torch.full((partial_rows(numel), 3), math.nan, device=device) for numel in sizes]
        backends.kernels(backend).fold(SPLIT24, CONTINUE, grads, sums, residuals, 0.5, partials)
        # Those that are aligned: 5000, 4096 and 0 elements; then 300 and 9001.
        assert launched.programs == [2 + 1, 1 + 3]
        assert [arguments[3] for _, arguments in launched.launches] == [True, False]
        for row, total, low, sums_of in zip(rows, sums, residuals, partials, strict=True):
            x = accumulated(SPLIT24, CONTINUE, row, 0.5)
            for found, wanted in zip((total, low), encode(SPLIT24, x), strict=True):
                assert_same_bits(found, wanted)
            assert_near(sums_of[:, 0], row[0])
            assert_near(sums_of[:, 1], x)


@only_triton
def test_partial_sums_lie_one_after_another(backend: str, device: torch.device) -> None:
    """Aligned or not, in one list or tensor by tensor, beside empty ones: those of a tensor lie in its rows alone."""
    squares: Callable[..., None] = backends.kernels(backend).squares
    sums, residuals = stored(SIZES, device)
    sums[3] = torch.cat([sums[3][:1], sums[3]])[1:]  # not aligned
    whole = torch.full((BLOCKS + 2,), 85.0, device=device)
    squares(SPLIT24, CONTINUE, sums, residuals, whole[1:-1])
    assert whole[0] == whole[-1] == 85.0
    for found, x in zip(whole[1:-1].split([partial_rows(n) for n in SIZES]), values_of(sums, residuals), strict=True):
        assert_near(found, x)
    for i, found in enumerate(whole[1:-1].split([partial_rows(n) for n in SIZES])):
        alone = torch.full((len(found),), 85.0, device=device)
        squares(SPLIT24, CONTINUE, sums[i : i + 1], residuals[i : i + 1], alone)
        assert_same_bits(alone, found)


# ---- which machine code ------------------------------------------------------------------------------------------


class Compiled:
    """What Triton makes of a kernel: ``kernel[grid](...)`` returns it, and it can be launched itself."""

    def __init__(self, launches: list[tuple[str, tuple[int, ...], tuple[Any, ...]]], what: str) -> None:
        self.launches, self.what, self.made = launches, what, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled | None]:
        def launch(*arguments: Any, **_options: Any) -> Compiled | None:
            self.launches.append((self.what, grid, arguments))
            if self.what != "kernel":
                return None
            self.made += 1
            return Compiled(self.launches, f"code {self.made}")

        return launch


@only_triton
def test_machine_code_is_asked_for_once(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code for each combination of constants, alignment among them, whatever numbers and addresses there are."""
    module = importlib.import_module(backends.BACKENDS[backend].module)
    launches: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
    monkeypatch.setattr(module, "accumulate_kernel", Compiled(launches, "kernel"))
    fold = backends.kernels(backend).fold
    room = torch.zeros(20_001, dtype=torch.bfloat16, device=device)
    low = torch.zeros(20_001, dtype=torch.int8, device=device)

    def run(shift: int, numel: int, scale: float | Tensor, start: Start = CONTINUE) -> None:
        part = room[shift : shift + numel]
        fold(SPLIT24, start, [part], [part], [low[:numel]], scale, None)

    one = torch.ones((), device=device)
    for _ in range(2):
        run(0, 5000, 1.0)
        run(8, 1, 0.3)
        run(1, 16, 1.0)
        run(3, 10_000, 1.0)
        run(0, 5000, one)
        run(0, 5000, 1.0, Start.FROM_SUM)
    codes = [what for what, *_ in launches]
    first = ["kernel", "code 1", "kernel", "code 2", "kernel", "kernel"]
    assert codes == [*first, "code 1", "code 1", "code 2", "code 2", "code 3", "code 4"]
    for (_, _, arguments), (_, grid, again) in zip(launches[:6], launches[6:], strict=True):
        assert len(grid) == 3
        assert arguments == again  # constants too, which follow the others
    assert [arguments[:2] for _, _, arguments in launches[2:4]] == [(room[k:].data_ptr(),) * 2 for k in (1, 3)]


@only_triton
def test_a_list_loads_the_kernel_for_one_tensor(
    backend: str, device: torch.device, record: Callable[[str], Recorder]
) -> None:
    """On no elements, once for each kind: none may be loaded while a graph is captured, where lists go one by one."""
    launched = record("finish_kernel")  # which rescales, too
    for scalar in (1.0, torch.ones((), device=device)):
        for shift in (0, 1, 0):
            sums, residuals = stored([5000, 300], device)
            if shift:
                sums[1] = torch.cat([sums[1][:1], sums[1]])[1:]
            before = values_of(sums, residuals)
            backends.kernels(backend).rescale(SPLIT24, CONTINUE, sums, residuals, scalar, 1.0)
            for found, wanted in zip(values_of(sums, residuals), before, strict=True):
                assert_same_bits(found, wanted)
    assert [(grid, arguments[:3], arguments[5]) for grid, arguments in launched.launches] == [
        (1, (0, 0, 0), is_aligned) for _ in range(2) for is_aligned in (True, False)
    ]


# ---- the norm ----------------------------------------------------------------------------------------------------

SPECIAL = [0.0, 1e-45, 1e-38, 1.0, 1e30, 3.4e38, math.inf, math.nan]


def torch_norm(partials: Tensor, divisor: float | Tensor, max_norm: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return (norm, clip coefficient, whether it is not finite), as torch computes them."""
    total = partials.sum(dtype=torch.float64).sqrt().float()
    norm = total / torch.as_tensor(divisor, dtype=torch.float32, device=partials.device)
    coefficient = torch.ones_like(norm) if max_norm is None else torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return norm, coefficient, ~norm.isfinite()


@only_triton
@pytest.mark.parametrize("special", [None, *SPECIAL], ids=str)
@pytest.mark.parametrize("max_norm", [None, 1e-40, 0.05, 1.0, 3e38, math.inf], ids=str)
def test_norm(backend: str, device: torch.device, special: float | None, max_norm: float | None) -> None:
    """Torch's numbers: of a few partial sums and of many, of one special value among zeros, of no values at all."""
    module = importlib.import_module(backends.BACKENDS[backend].module)
    for numel in (0, 1, 5, 4096, 4097, 9000):
        partials = torch.rand(numel, device=device) if special is None else torch.zeros(numel, device=device)
        if special is not None:
            partials[numel // 2 : numel // 2 + 1] = special
        for divisor in (1.0, 3.0, 1e-30, 1e30):
            for given in (divisor, torch.tensor(divisor, dtype=torch.float64, device=device)):
                results = torch.full((3,), 85.0, device=device)
                nonfinite = torch.tensor(numel % 2 == 0, device=device)
                module.norm(partials, given, max_norm, results[1:], nonfinite)
                norm, coefficient, is_nonfinite = torch_norm(partials, divisor, max_norm)
                where = f"{numel} partial sums, divided by {divisor}"
                wanted = torch.stack([norm, coefficient])
                torch.testing.assert_close(results[1:], wanted, rtol=0, atol=0, equal_nan=True, msg=where)
                assert nonfinite == is_nonfinite, where
                assert results[0] == 85.0


@only_triton
def test_norm_is_added_up_in_fp64(backend: str, device: torch.device) -> None:
    """Ones beside 2**25, each of which FP32 would lose."""
    module = importlib.import_module(backends.BACKENDS[backend].module)
    partials = torch.ones(2**14, device=device)
    partials[7] = 2.0**25
    results, nonfinite = torch.zeros(2, device=device), torch.ones((), dtype=torch.bool, device=device)
    module.norm(partials, 1.0, None, results, nonfinite)
    assert results.tolist() == [torch.tensor(math.sqrt(2**25 + 2**14 - 1)).item(), 1.0]
    assert not nonfinite
