"""The benchmark of predictions of memory: what it makes of plans and measurements, and of what fails."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("jsonschema")  # a GPU machine may lack them
pytest.importorskip("rich")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_plan  # noqa: E402
import report  # noqa: E402
from bench_plan import Job, Peak, Predicted  # noqa: E402
from plan_models import MODELS, Llama, ResNet  # noqa: E402
from tables.plan import plan_summary, plan_tables  # noqa: E402

GPT = Job("cuda", "GPT", "4GB")
PEAKS = {1: 10**9, 2: 2 * 10**9, 4: 4 * 10**9}


def outcomes(monkeypatch: pytest.MonkeyPatch, **of: Any) -> list[dict[str, Any]]:
    """Return the results where each process returns, or raises, what is said."""

    def in_process(function: Any, job: Job, *arguments: Any) -> Any:
        name = function.__name__ if function is bench_plan.measured else arguments[0]
        if isinstance(of[name], Exception):
            raise of[name]
        return of[name]

    monkeypatch.setattr(bench_plan, "in_process", in_process)
    results = bench_plan.results_of(GPT)
    for result in results:
        report.check(result, "plan", "results")
    return results


def shown(results: list[dict[str, Any]]) -> str:
    content = {"provenance": {"machine": "NVIDIA"}, "method": {}, "results": results}
    return "\n".join([*plan_tables(content), *plan_summary(content)])


def test_both_predictions_of_a_gpu_stand_beside_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {1: Peak(10**9, 1_100_000_000), 3: Peak(2_400_000_000, 3 * 10**9)}, 4
    elsewhere = Predicted({1: 9 * 10**8, 2: 18 * 10**8, 4: 36 * 10**8}, 4, 86 * 10**6)
    results = outcomes(monkeypatch, cuda=Predicted(PEAKS, 3, 86 * 10**6), cpu=elsewhere, measured=measured)
    assert [r["error_of_prediction"] for r in results if r["kind"] == "peak"] == pytest.approx([0, 0.25, -0.1, 0.125])
    text = shown(results)
    assert "| GPT, 86 M weights | 3 | 2,400 MB | 3,000 MB | +25.0 % | 2,700 MB | +12.5 % | 3,000 MB |" in text
    assert "| GPT | 4,000 MB | 3 | 4 | 4 |" in text
    assert "the worst of each model: GPT +25.0 %." in text


def test_what_fails_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Predicted(PEAKS, 2, 86 * 10**6)
    of_plan = outcomes(monkeypatch, cuda=RuntimeError("no"), cpu=plan, measured=({1: Peak(10**9, 2 * 10**9)}, 2))
    assert [r["kind"] for r in of_plan] == ["model", "peak", "choice"]
    assert "GPT: RuntimeError: no" in shown(of_plan)
    assert "| GPT, 86 M weights | 1 | 1,000 MB |  |  | 1,000 MB | +0.0 % | 2,000 MB |" in shown(of_plan)
    of_size = outcomes(monkeypatch, cuda=plan, cpu=plan, measured=({1: Peak(10**9, None), 2: "OOM"}, "ValueError: x"))
    assert "| GPT, 86 M weights | 2 | OOM | 2,000 MB |  | 2,000 MB |  |  |" in shown(of_size)
    assert "| GPT | 4,000 MB | 2 | 2 | ValueError: x |" in shown(of_size)
    of_all = outcomes(monkeypatch, cuda=plan, cpu=plan, measured=MemoryError())
    assert [(r["kind"], r["error"]) for r in of_all] == [("model", "OOM")]
    assert "worst" not in shown(of_all)


def test_what_is_measured_lies_between_the_least_and_what_was_chosen() -> None:
    assert bench_plan.sizes_of(Predicted(dict.fromkeys([1, 2, 4, 8, 16, 12, 13], 0), 13, 1)) == [1, 4, 13]
    assert bench_plan.sizes_of(Predicted({1: 0, 2: 0}, 1, 1)) == [1]


def test_what_fits_is_found_where_the_plan_chose_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("cpu", "GPT", "1MB")
    monkeypatch.setattr(bench_plan, "peak_of", lambda job, size, device: Peak(100_000 * size, None))
    for chosen in (3, 8, 30):
        assert bench_plan.measured(job, [1, chosen])[1] == min(10, 2 * chosen)


@pytest.mark.parametrize("most", range(1, 25))
def test_the_largest_is_found_in_few_tries(most: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= most

    for chosen in range(1, 25):
        tried.clear()
        assert bench_plan.largest(fits, 1, chosen, math.inf) == min(most, 2 * chosen)
        assert len(tried) == len(set(tried)) <= 8
        assert tried[0] == chosen
    assert bench_plan.largest(lambda size: False, 2, 9, math.inf) == "2, the fewest that were predicted, do not train"
    tried.clear()
    bench_plan.largest(lambda size: fits(size) or size < 192, 1, 172, math.inf)  # as on a GPU, with a margin of 10 %
    assert len(tried) <= 8


def test_a_search_that_has_no_time_left_says_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(fits: Callable[[int], bool], tries: int) -> int | str:
        clock = iter(range(100))
        monkeypatch.setattr(bench_plan, "time", SimpleNamespace(time=lambda: next(clock)))
        return bench_plan.largest(fits, 1, 40, tries - 1)

    assert said(lambda size: size < 47, 0) == "not found in time: none was tried"
    assert said(lambda size: size < 47, 2) == "not found in time: 45 trains"
    assert said(lambda size: size < 47, 3) == "not found in time: 45 trains, 55 does not"
    assert said(lambda size: size < 7, 1) == "not found in time: 40 does not"
    assert said(lambda size: size < 47, 7) == 46
    plan = Predicted(PEAKS, 2, 86 * 10**6)
    words = "not found in time: 2 trains"
    results = outcomes(monkeypatch, cuda=plan, cpu=plan, measured=({1: Peak(10**9, None)}, words))
    assert f"| GPT | 4,000 MB | 2 | 2 | {words} |" in shown(results)


def test_models_are_results_as_soon_as_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job("cuda", name, "4GB") for name in ("slow", "fast")]
    seen = threading.Event()

    def results_of(job: Job) -> list[dict[str, Any]]:
        assert job.name == "fast" or seen.wait(60)
        return [{"model": job.name}]

    monkeypatch.setattr(bench_plan, "results_of", results_of)
    grown = []
    for results in bench_plan.found(jobs, 2, lambda done, total: None):
        grown.append([result["model"] for result in results])
        seen.set()
    assert grown == [["fast"], ["slow", "fast"]]


def children_of(process: int) -> list[str]:
    return [child for path in Path(f"/proc/{process}/task").glob("*/children") for child in path.read_text().split()]


@pytest.mark.slow
def test_an_interrupt_ends_the_script_and_its_processes(tmp_path: Path) -> None:
    """Also where it alone is interrupted, as by ``kill``."""
    environment = os.environ | {"ACCUMKERN_COMMIT": "0" * 40, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_plan.py"), "--device", "cpu", "--results"]
    script = subprocess.Popen([*command, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("*/plan.json")):
        assert script.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Those of all threads; a new model begins as soon as the file is written.
    while len(of_script := children_of(script.pid)) < 2:  # the tracker of resources is one
        assert time.monotonic() < deadline
    script.send_signal(signal.SIGINT)
    printed, _ = script.communicate(timeout=30)
    assert script.returncode == 0
    assert "interrupted: what had been measured by then is written" in printed
    (found,) = report.load_results(tmp_path).values()
    assert {r["model"] for r in found["plan"]["results"]} < set(MODELS["cpu"])
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in of_script):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("make", "numel"),
    [(ResNet, 25_557_032), (MODELS["cuda"]["Llama"].make, 200_827_904), (MODELS["cuda"]["GPT"].make, 86_198_784)],
    ids=["ResNet-50", "Llama", "GPT"],
)
def test_models_have_the_weights_that_they_should(make: Any, numel: int) -> None:
    with torch.device("meta"):
        model = make()
    assert sum(param.numel() for param in model.parameters()) == numel
    if isinstance(model, Llama):
        assert "cosines" not in model.state_dict()
