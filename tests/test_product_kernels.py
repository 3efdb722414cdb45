"""The experiment of benchmarks/product_kernels.py: a gradient that its own product adds to a split sum."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import Tensor

for needed in ("triton", "rich"):
    pytest.importorskip(needed)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_product  # noqa: E402
import product_kernels  # noqa: E402
import timing  # noqa: E402
from product_kernels import TILES, Tile, add_product  # noqa: E402
from tables.product import product_summary, product_tables  # noqa: E402

from accumkern.backends.problems import triton_is_interpreted  # noqa: E402
from accumkern.formats import Format, decode, encode  # noqa: E402

SPLIT24 = Format.SPLIT24
FORMATS = pytest.mark.parametrize("format_", [SPLIT24, Format.SPLIT32, None], ids=["split24", "split32", "alone"])
# Of a sum in FP32, relative to that of its absolute values; tensor cores cut off what does not fit.
SUMMING = 2.0**-22 if triton_is_interpreted() else 2.0**-18
GUARD = 1024  # elements before and behind what is written, which must stay as they are

pytestmark = [
    pytest.mark.parametrize("backend", ["triton"], indirect=True),
    pytest.mark.skipif(
        triton_is_interpreted() and version("triton").startswith("3.6."),
        reason="the interpreter of triton 3.6 cannot read the end of a loop from a tensor",
    ),
]


def sized(tile: Tile) -> Tile:
    """Return it, for the interpreter with less to compute, and as many parts."""
    if not triton_is_interpreted():
        return tile
    return tile._replace(rows=32, columns=64, inner=16, part=64 * tile.part // tile.columns)


def shapes(tile: Tile) -> list[tuple[int, int, int]]:
    """Return sizes (rows, columns, inner): less than a tile, and more of them than programs, some ending outside.

    On a GPU, where each set of sizes takes seconds to compile, the latter alone.
    """
    if tile.kernel == "pointers":
        small, large = (5, 3, 1), (3 * tile.rows - 7, 2 * tile.columns + 5, 3 * tile.inner - 3)
    elif triton_is_interpreted():
        small, large = (16, 16, 1), (4 * tile.rows + 16, 2 * tile.columns + 16, 3 * tile.inner - 3)
    else:
        small, large = (16, 16, 1), bench_product.CHECKED_SHAPES["cuda"]
    return [small, large] if triton_is_interpreted() else [large]


def guarded(values: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """Return the same values between guards, and what says whether the guards are as they were."""
    memory = torch.full((values.numel() + 2 * GUARD,), 77, dtype=values.dtype, device=values.device)
    inside = memory[GUARD:-GUARD].view_as(values)
    inside.copy_(values)
    return inside, lambda: bool((memory[:GUARD] == 77).all() and (memory[-GUARD:] == 77).all())


@FORMATS
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_products_are_added_in_place(tile: Tile, format_: Format | None, device: torch.device) -> None:
    tile = sized(tile)
    for rows, columns, inner in shapes(tile):
        dy, x = (torch.randn(inner, size, device=device).bfloat16() for size in (rows, columns))
        product, magnitude = dy.double().t() @ x.double(), dy.double().abs().t() @ x.double().abs()
        if format_ is None:
            total, is_intact = guarded(torch.full((rows, columns), torch.nan, device=device).bfloat16())
            add_product(None, dy, x, total, None, tile)
            torch.testing.assert_close(total, product.bfloat16(), rtol=2**-7, atol=1e-4)
            assert is_intact()
            continue
        start = 8 * torch.randn(rows, columns, device=device)
        (total, total_is_intact), (residual, residual_is_intact) = map(guarded, encode(format_, start))
        expected = decode(format_, total, residual).double()
        rounding = 2.0**-16 if format_ is SPLIT24 else 2.0**-24
        allowed = torch.zeros_like(expected)
        for _ in range(2):
            add_product(format_, dy, x, total, residual, tile)
            expected += product
            found = decode(format_, total, residual).double()
            allowed = allowed + 1.01 * rounding * expected.abs() + SUMMING * magnitude
            assert bool(((found - expected).abs() <= allowed).all()), (rows, columns, inner)
        assert total_is_intact()
        assert residual_is_intact()


@FORMATS
def test_a_kernel_is_checked_before_it_is_timed(
    format_: Format | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile, shape = sized(TILES[0]), (48, 80, 48)
    bench_product.check_product(format_, tile, shape, device)

    def without_some_tokens(format_: Format | None, dy: Tensor, x: Tensor, *others: object) -> None:
        add_product(format_, dy[:-16], x[:-16], *others)  # type: ignore[arg-type]

    monkeypatch.setattr(product_kernels, "add_product", without_some_tokens)
    with pytest.raises(RuntimeError, match=r"of 3,840 elements are wrong"):
        bench_product.check_product(format_, tile, shape, device)


def test_sums_that_do_not_fit_are_refused(device: torch.device) -> None:
    def refused(match: str, tile: Tile = TILES[-1], **changed: Tensor | None) -> None:
        tensors: dict[str, Tensor | None] = {
            "dy": torch.zeros(4, 24, dtype=torch.bfloat16, device=device),
            "x": torch.zeros(4, 32, dtype=torch.bfloat16, device=device),
            "total": torch.zeros(24, 32, dtype=torch.bfloat16, device=device),
            "residual": torch.zeros(24, 32, dtype=torch.int8, device=device),
        }
        with pytest.raises(ValueError, match=match):
            add_product(SPLIT24, **tensors | changed, tile=tile)  # type: ignore[arg-type]

    refused(r"total is 24 x 32; a streamed tile needs multiples of 16", TILES[0])
    refused(r"residual is None; \(24, 32\) torch.int8, contiguous, is needed", residual=None)
    refused(r"residual is .* torch.int16", residual=torch.zeros(24, 32, dtype=torch.int16, device=device))
    refused(r"x is \(4, 32\) torch.float32", x=torch.zeros(4, 32, device=device))
    refused(r"total is \(24, 32\) .*strides \(1, 24\)", total=torch.zeros(32, 24, device=device).bfloat16().t())
    refused(r"total is \(32, 24\)", total=torch.zeros(32, 24, device=device).bfloat16())


@pytest.mark.gpu
def test_torch_adds_a_product_to_an_fp32_sum_in_place(device: torch.device) -> None:
    buffers = bench_product.Buffers(1024, 512, 64, device)
    total, product = buffers.sums(torch.float32)[0], buffers.dy[0].double().t() @ buffers.x[0].double()
    expected = total.double() + 2 * product
    variant = bench_product.within_the_product(buffers)
    variant.run(0)  # cuBLAS allocates its workspace
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    variant.run(0)
    assert torch.cuda.max_memory_allocated() - allocated < total.nbytes
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-4)


def test_every_tile_is_timed_and_shown(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("jsonschema", "matplotlib"):  # a GPU machine may lack them
        pytest.importorskip(needed)
    import report

    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "BATCH_MS", dict.fromkeys(("cpu", "cuda"), 1.0))
    monkeypatch.setattr(bench_product, "CHECKED_SHAPES", dict.fromkeys(("cpu", "cuda"), (48, 80, 40)))
    tiles = [sized(TILES[0]), sized(TILES[-1])]
    monkeypatch.setattr(bench_product, "tiles_on", lambda device: tiles)
    results = [result for shape in [(32, 32, 4), (16, 24, 4)] for result in bench_product.measure(shape, device, 1)]
    for result in results:
        report.check(result, "product", "results")
    tiled = [r for r in results if "tile" in r]
    assert [r["tile"] for r in tiled] == [str(tile) for tile in tiles for _ in range(3)] * 2
    refused = [r for r in tiled if "error" in r]  # each by the persistent kernel, of the second shape
    assert [(r["columns"], r["tile"]) for r in refused] == [(24, str(tiles[0]))] * 3
    assert all("needs multiples of 16" in r["error"] for r in refused)

    content = {"provenance": {"machine": "NVIDIA"}, "method": {"backend": "triton"}, "results": results}
    full = "\n".join(product_tables(content))
    assert "| operation, 32 x 32 over 4 tokens |" in full
    assert "| operation, 16 x 24 over 4 tokens |" in full
    assert f"| **split24 within the product, triton** ({tiles[0]}) |" in full
    least = min(r["over_product"] for r in tiled[:6] if r["variant"] == "split24 within the product")
    assert f"split24 within the product {least:.2f};" in " ".join(product_summary(content))
