"""Every benchmark runs and writes a file that keeps to its schema; a variant that fails is reported, others go on."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch

for needed in ("jsonschema", "matplotlib", "rich"):  # a GPU machine may lack them
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_kernels  # noqa: E402
import bench_product  # noqa: E402
import bench_registers  # noqa: E402
import gpu  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
from provenance import folder_name, provenance  # noqa: E402
from shapes import MODELS  # noqa: E402
from tables import SECTIONS  # noqa: E402
from tables.finish import finish_tables  # noqa: E402
from tables.kernels import COPY, MUL, kernels_summary, kernels_tables  # noqa: E402
from tables.product import product_summary, product_tables  # noqa: E402

from accumkern import formats  # noqa: E402

CPU = torch.device("cpu")
# Arguments that make each of them small.
QUICK = {
    "kernels": ["--sizes", "2^10", "--models", "none"],
    "finish": ["--sizes", "2^12"],
    "accuracy": [],
    "overhead": ["--parameters", "10"],
    "batch": [],
    "scale": [],
    "parallel": [],
    "plan": [],
}


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), "--device", "cpu", "--quick", *arguments]
    environment = os.environ | {"ACCUMKERN_COMMIT": "0" * 40 + "-dirty", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_runs_and_keeps_to_its_schema(name: str, tmp_path: Path) -> None:
    printed = run(name, *QUICK[name], "--results", str(tmp_path))
    results = report.load_results(tmp_path)
    content = results[folder_name(provenance(CPU)["machine"])][name]
    assert content["provenance"]["commit"] == "0" * 40
    assert content["provenance"]["uncommitted_changes"] is True
    assert str(tmp_path) not in json.dumps(content)
    assert [r for r in content["results"] if "error" in r] == []
    assert SECTIONS[name].title in report.document(results, set())
    assert f"{name}.json" in printed


@pytest.mark.skipif(shutil.which("make") is None, reason="no make to ask")
def test_every_script_has_a_section_and_a_schema() -> None:
    scripts = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    schemas = {path.stem for path in (ROOT / "benchmarks" / "schemas").glob("*.json")} - {"file", "notes"}
    assert scripts == schemas == set(SECTIONS)
    planned = subprocess.run(["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name for names in re.findall(r"for name in ([a-z ]+);", planned) for name in names.split()} == scripts
    # A simulation and a reading of machine code are the same on any machine.
    on_gpus = {part.name for part in gpu.benchmarks(Path("results"), gpus=2)}
    assert on_gpus == scripts - {"scale", "registers"}


def time_quickly(makers: dict[str, Callable[[], timing.Variant]]) -> dict[str, timing.Timing | str]:
    return timing.time_variants(makers, CPU, rounds=4, seconds_each=1.0, on_step=lambda done, total: None)


def test_a_variant_that_fails_is_reported_and_the_others_go_on() -> None:
    calls = 0

    def fails(i: int) -> None:
        raise ValueError("no such kernel\nand more")

    def fails_late(i: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:  # warm, and being measured
            raise RuntimeError("late")

    def out_of_memory() -> timing.Variant:
        return timing.Variant(torch.empty(2**50).add_, 1, 1)

    outcome = time_quickly(
        {
            "fails": lambda: timing.Variant(fails, 1, 1),
            "fails late": lambda: timing.Variant(fails_late, 1, 1),
            "out of memory": out_of_memory,
            "works": lambda: timing.Variant(lambda i: sum(range(10_000)), 1, 1),
        }
    )
    assert list(outcome) == ["fails", "fails late", "out of memory", "works"]
    assert outcome["fails"] == "ValueError: no such kernel"
    assert outcome["fails late"] == "RuntimeError: late"
    assert outcome["out of memory"] == "OOM"
    assert isinstance(outcome["works"], timing.Timing)
    assert outcome["works"].n == 4


def test_a_kernel_that_fails_is_a_result_of_the_kernel_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(sums: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(bench_kernels, "add_each_converted", fails)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**12)
    monkeypatch.setattr(timing, "BATCH_MS", {"cpu": 1.0})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    results = bench_kernels.measure(bench_kernels.Case("list", [(3, 5), (700,)]), CPU, rounds=1)
    broken = [r for r in results if "error" in r]
    assert [(r["variant"], r["error"]) for r in broken] == [("fp32.add_(bf16.float())", "RuntimeError: broken")]
    assert {r["numel"] for r in results} == {715}
    for result in results:
        report.check(result, "kernels", "results")


def test_both_roofs_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**12)
    monkeypatch.setattr(timing, "BATCH_MS", {"cpu": 1.0})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = bench_kernels.Case("2^12", [(2**12,)])
    found = {r["variant"]: r for r in bench_kernels.measure(case, CPU, rounds=1)}
    for variant, fraction in ((COPY, "fraction_of_copy"), (MUL, "fraction_of_mul")):
        assert found[variant]["bytes_per_element"] == 4
        assert found[variant][fraction] == pytest.approx(1.0)
        assert all(fraction in result for result in found.values())
    buffers = bench_kernels.Buffers(case, CPU)
    bench_kernels.multiply(buffers)(0)
    assert torch.equal(*buffers.flat[0])


def test_a_product_is_added_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    shape = bench_product.parse_shape("6x5x4")
    buffers = bench_product.Buffers(*shape, CPU)
    product = buffers.dy[0].t() @ buffers.x[0]
    for dtype in (torch.bfloat16, torch.float32):
        before = buffers.sums(dtype)[0].clone()
        bench_product.added_by_torch(buffers, dtype).run(0)
        assert torch.equal(buffers.sums(dtype)[0], before + product)
    total, residual = buffers.sums(torch.bfloat16)[0], buffers.sums(torch.int8)[0]
    before = formats.decode(formats.Format.SPLIT24, total, residual)
    bench_product.folded(buffers, "eager").run(0)
    after = formats.decode(formats.Format.SPLIT24, total, residual)
    torch.testing.assert_close(after, before + product, rtol=2**-15, atol=0)

    found = {r["variant"]: r for r in bench_product.measure(shape, CPU, rounds=1)}
    for result in found.values():
        report.check(result, "product", "results")
    assert "aten::addmm.dtype_out" in found["addmm(out_dtype=fp32), in place"]["error"]  # no silent gap on a CPU
    assert found["product, fp32.add_(bf16)"]["over_product"] > 0
    assert bench_product.parse_shapes("2x3x4,5x6x7") == [(2, 3, 4), (5, 6, 7)]
    for text in ("2x3", "2x3x4,", "2x0x4"):
        with pytest.raises(bench_product.argparse.ArgumentTypeError, match="three sizes are needed"):
            bench_product.parse_shapes(text)


def test_memory_that_is_not_there_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_available_bytes", lambda: timing.FREE_BYTES + 4000)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "BATCH_MS", {"cpu": 1.0})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    results = bench_kernels.measure(bench_kernels.Case("1024", [(1024,)]), CPU, rounds=1)
    out_of_memory = {r["variant"] for r in results if r.get("error") == "OOM"}
    assert out_of_memory == {r["variant"] for r in results if "fp32" in r["variant"]}
    assert len(out_of_memory) < len(results)


# ---- a GPU that is none ------------------------------------------------------------------------------------------


class FakeGPU:
    """Two clocks, in ms: a host that queues work, and a device that does it; at most ``queue`` pieces wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, queue: int = 1000) -> None:
        self.host, self.ends, self.queue = 0.0, [0.0], queue
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(gpu.host, gpu.ends[-1])

            def query(self) -> bool:
                return gpu.host >= self.at

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(0.0, cycles / timing.CYCLES_OF_A_MS))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host / 1e3)

    def launch(self, host_ms: float, device_ms: float) -> None:
        self.host += host_ms
        waiting = [end for end in self.ends if end > self.host]
        if len(waiting) >= self.queue:
            self.host = waiting[-self.queue]
        self.ends.append(max(self.host, self.ends[-1]) + device_ms)

    def synchronize(self) -> None:
        self.host = max(self.host, self.ends[-1])

    def time(self, launches: int, host_ms: float, device_ms: float) -> timing.Timing:
        def run(_: int) -> None:
            for _launch in range(launches):
                self.launch(host_ms / launches, device_ms / launches)

        makers = {"it": lambda: timing.Variant(run, 1, 1)}
        found = timing.time_variants(makers, torch.device("cuda"), 5, 1.0, lambda done, total: None)["it"]
        assert isinstance(found, timing.Timing)
        return found


@pytest.mark.parametrize("host_ms", [0.02, 0.7, 9.0], ids=["little", "more than the GPU's", "more than the first spin"])
def test_the_time_of_a_gpu_is_not_that_of_launching(host_ms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = FakeGPU(monkeypatch).time(4, host_ms, device_ms=0.3)
    assert found.how == "batch"
    assert found.median_ms == pytest.approx(0.3)
    assert found.host_ms == pytest.approx(host_ms)
    assert found.n == 5


def test_where_a_gpu_waits_for_python_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    found = FakeGPU(monkeypatch, queue=50).time(500, host_ms=4.0, device_ms=0.3)
    assert found.how == "host"
    assert found.median_ms > 3.0
    assert found.n == 5


def test_a_measurement_in_which_the_gpu_waited_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = timing.Queue(lambda: None, "batch", calls=2, host_ms=0.1)
    queue.measured = [(1.0, False), (9.0, True), (3.0, False), (1.0, False)]
    found = timing._timing_of(queue)
    assert (found.median_ms, found.n, found.how) == (0.5, 3, "batch")
    queue.measured[0] = (9.0, True)
    assert (timing._timing_of(queue).how, timing._timing_of(queue).n) == ("host", 4)


def test_what_fails_on_a_gpu_ends_what_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)

    def broken() -> None:
        raise RuntimeError("an illegal access\nwas encountered")

    def fails(_: int) -> None:
        gpu.launch(0.1, 0.3)
        if gpu.host > 50:
            monkeypatch.setattr(torch.cuda, "synchronize", broken)

    makers = {
        name: lambda run=run: timing.Variant(run, 1, 1)
        for name, run in {"works": lambda _: gpu.launch(0.1, 0.3), "fails": fails}.items()
    }
    found = timing.time_variants(makers, torch.device("cuda"), 99, 1.0, lambda done, total: None)
    assert found == dict.fromkeys(makers, "RuntimeError: an illegal access")


# ---- what is shown -----------------------------------------------------------------------------------------------


def kernel_result(variant: str, **more: float | str) -> dict[str, object]:
    case = {"case": "2^20", "tensors": 1, "numel": 2**20, "variant": variant, "called": "as one tensor"}
    times = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "n": 9, "how": "batch", "calls": 1, "gb_per_s": 9.0}
    return {
        **case,
        "buffer": None,
        "backend": "torch",
        **times,
        "time_over_split24": 2.0,
        "fraction_of_copy": 0.5,
    } | more


def test_what_older_files_of_kernels_lack_was_not_measured() -> None:
    for machine, lacks in (
        ("CPU Toy", "`torch.mul` bandwidth"),
        ("NVIDIA", "`torch.mul` bandwidth, host time of a call"),
    ):
        content = {
            "provenance": {"machine": machine},
            "method": {"backend": "cpu"},
            "results": [kernel_result(COPY), kernel_result("broken") | {"error": "OOM"}],
        }
        assert f"Not measured here: {lacks}." in kernels_tables(content)
        assert "| `torch.mul` by 1, which adds nothing | not measured | not measured |" in kernels_summary(content)
        content["results"] = [kernel_result(MUL, fraction_of_mul=1.0, host_ms=0.0123, how="host")]
        full = kernels_tables(content)
        assert f"| `{MUL}` | 2.00 | 1.00 ms (1.00-1.00), by the host | 9.00 | 0.50 | 1.00 | 12.3 µs |" in full
        assert not any("Not measured" in line for line in full)
        assert "| `torch.mul` by 1, which adds nothing | 2.00 | 0.50 |" in kernels_summary(content)


def test_host_time_of_finish_is_shown_where_there_is_a_gpu() -> None:
    stock = kernel_result("stock", host_ms=0.05, time_over_stock=1.0)
    content = {"provenance": {"machine": "NVIDIA"}, "results": [stock]}
    assert "| stock | 1.00 | 1.00 ms (1.00-1.00) | 50.0 µs |" in finish_tables(content)
    del stock["host_ms"]
    assert "Not measured here: host time of a call." in finish_tables(content)


def test_products_are_shown_over_the_product_alone() -> None:
    shape = {"rows": 6, "columns": 5, "inner": 4000}
    times = {"median_ms": 1.5, "p20_ms": 1.0, "p80_ms": 2.0, "how": "batch", "host_ms": 0.02}
    content = {
        "provenance": {"machine": "NVIDIA"},
        "method": {"backend": "cuda"},
        "results": [
            shape | times | {"variant": "product", "backend": "torch"},
            shape | {"variant": "addmm", "backend": "torch", "error": "OOM"},
            shape | times | {"variant": "product, fold", "backend": "cuda", "more_ms": -0.25, "over_product": 0.9},
        ],
    }
    full = product_tables(content)
    assert "| product | 1.50 ms (1.00-2.00) |  |  | 20.0 µs |" in full
    assert "| addmm | OOM |  |  |  |" in full
    assert "| **product, fold, cuda** | 1.50 ms (1.00-2.00) | -250 µs | 0.900 | 20.0 µs |" in full
    assert "over the time of the product alone: fold 0.90." in " ".join(product_summary(content))
    content["results"].pop()
    assert product_summary(content) == []


def test_buffers_of_a_case_do_not_overlap() -> None:
    case = bench_kernels.Case("list", [(3, 5), (256,), (1,)])
    buffers = bench_kernels.Buffers(case, CPU)
    buffers.sets = 2
    for memory in (buffers.grads, buffers.sums, buffers.wide, buffers.int16, buffers.int8):
        assert [[tuple(tensor.shape) for tensor in tensors] for tensors in memory] == [case.shapes] * 2
        tensors = [tensor for tensors in memory for tensor in tensors]
        ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))
        assert all((t.data_ptr() - tensors[0].data_ptr()) % 256 == 0 for t in tensors)


@pytest.mark.parametrize(
    ("model", "tensors", "numel"),
    [("GPT-2", 148, 124_439_808), ("Llama-1B", 146, 1_235_814_400), ("Llama-8B", 291, 8_030_261_248)],
)
def test_shapes_add_up_to_the_published_number_of_parameters(model: str, tensors: int, numel: int) -> None:
    assert len(MODELS[model]) == tensors
    assert sum(prod(shape) for shape in MODELS[model]) == numel


def test_a_compiler_that_is_not_there_is_a_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("ACCUMKERN_COMMIT", "0" * 40)
    monkeypatch.setattr(sys, "argv", ["bench_registers.py", "--quick", "--device", "cpu", "--results", str(tmp_path)])
    bench_registers.main()
    (path,) = tmp_path.glob("*/registers.json")
    (result,) = json.loads(path.read_text())["results"]
    assert "nvcc is not on PATH" in result["error"]
    assert report.load_results(tmp_path)
