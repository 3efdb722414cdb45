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
import bench_registers  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
from provenance import folder_name, provenance  # noqa: E402
from shapes import MODELS  # noqa: E402
from tables import SECTIONS  # noqa: E402

CPU = torch.device("cpu")
# Arguments that make each of them small.
QUICK = {
    "kernels": ["--sizes", "2^10", "--models", "none"],
    "finish": ["--sizes", "2^12"],
    "accuracy": [],
    "overhead": ["--parameters", "10"],
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
    for target in ("bench", "gpu"):
        planned = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        run = {name for names in re.findall(r"for name in ([a-z ]+);", planned) for name in names.split()}
        assert run == scripts, target


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


def test_memory_that_is_not_there_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_available_bytes", lambda: timing.FREE_BYTES + 4000)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1)
    monkeypatch.setattr(timing, "BATCH_MS", {"cpu": 1.0})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    results = bench_kernels.measure(bench_kernels.Case("1024", [(1024,)]), CPU, rounds=1)
    out_of_memory = {r["variant"] for r in results if r.get("error") == "OOM"}
    assert out_of_memory == {r["variant"] for r in results if "fp32" in r["variant"]}
    assert len(out_of_memory) < len(results)


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
