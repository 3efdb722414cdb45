"""The convergence benchmark: its runs, what it says of them, and that it loses no seed that has ended."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

for needed in ("jsonschema", "matplotlib", "rich"):  # a GPU machine may lack them
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_convergence  # noqa: E402
import figures  # noqa: E402
import report  # noqa: E402
from bench_convergence import DESIGN_KEYS, REGIMES, Run, result, results_of, train, trained  # noqa: E402
from tables.convergence import COMPARED_WITH, convergence_summary, convergence_tables  # noqa: E402

from train_gpt import GPT  # noqa: E402


def begun(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start the script."""
    script = str(ROOT / "benchmarks" / "bench_convergence.py")
    command = [sys.executable, script, "--device", "cpu", "--quick", "--workers", "2", *options]
    environment = os.environ | {"ACCUMKERN_COMMIT": "0" * 40, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen([*command, "--results", str(folder)], env=environment, stdout=subprocess.PIPE, text=True)


def is_alive(process: str) -> bool:
    """Return whether a process of this number is there."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def a_run(design: str, micro_batches: int, total: int = 64) -> Run:
    return Run(design, micro_batches, 1e-3, 1, total, "cpu", REGIMES["cpu"])


@pytest.mark.slow
def test_convergence(tmp_path: Path) -> None:
    script = begun(tmp_path)
    printed, _ = script.communicate()
    assert script.returncode == 0
    assert "convergence: 2 of 2 seeds after " in printed
    (found,) = report.load_results(tmp_path).values()
    assert "### Convergence" in report.document({"a-machine": found}, set())
    content = found["convergence"]
    assert {(r["design"], r["micro_batches"]) for r in content["results"]} == {
        (design, count) for design in DESIGN_KEYS for count in (1, 8)
    }
    assert {r["learning_rate"] for r in content["results"]} == set(REGIMES["cpu"].learning_rates)
    assert content["method"]["seeds"] == "2 of 2"
    for of_design in content["results"]:
        assert len(set(of_design["validation_loss"])) == 2  # the seeds
        assert all(3 < loss < 5.5 for loss in of_design["validation_loss"])  # it has learnt something
        assert ("difference" in of_design) == (of_design["design"] != COMPARED_WITH)
    # 16-bit weights swallow small updates; masters do not.
    of = {
        (r["design"], r["micro_batches"], r["learning_rate"]): r["difference"]
        for r in content["results"]
        if "difference" in r
    }
    for count, rate in ((1, 2e-4), (1, 1e-3), (8, 2e-4), (8, 1e-3)):
        assert of["split24", count, rate]["low"] > 10 * abs(of["split24_masters", count, rate]["median"])


def test_the_losses_are_compared_with_the_design_that_the_tables_name() -> None:
    assert bench_convergence.REFERENCE == COMPARED_WITH
    assert set(figures.CONVERGENCE_COLORS) == set(DESIGN_KEYS) - {COMPARED_WITH}


def test_a_run_is_the_same_again() -> None:
    run_ = a_run("split24_masters", 4, total=8)
    assert train(run_) == train(run_)


@pytest.mark.parametrize("design", DESIGN_KEYS)
def test_a_run_of_a_gpu_but_for_its_size(design: str) -> None:
    regime = REGIMES["cuda"]
    assert 10e6 <= bench_convergence.parameters_of(regime) <= 100e6
    assert regime.windows == (8,)
    small = replace(regime, width=32, layers=2, heads=1, context=16, batch_size=3)
    run_ = replace(a_run(design, 8, total=64), learning_rate=1e-2, regime=small)
    loss = train(run_)
    assert 3 < loss < 5  # of 5.5 at the beginning
    found = result(run_, [loss], [loss])
    report.check(found, "convergence", design)
    weights = GPT(32, 2, 1, 16)
    assert found["parameters"] == sum(param.numel() for param in weights.parameters())
    assert (found["steps"], found["tokens"]) == (8, 64 * 3 * 16)


def test_micro_batches_are_the_same_text_whatever_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    class Seeing(GPT):
        def forward(self, batch: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                seen.append(batch)
            return super().forward(batch)

    monkeypatch.setattr(bench_convergence, "GPT", Seeing)
    regime = replace(REGIMES["cpu"], batch_size=2)
    for count in (1, 4):
        train(replace(a_run("stock_bf16", count, total=8), regime=regime))
    assert all(batch.shape == (2, 33) for batch in seen)
    assert torch.equal(torch.stack(seen[:8]), torch.stack(seen[8:]))


class OneAfterTheOther(Executor):
    """A pool whose runs have ended when they are submitted, after so many seconds by their own account."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def submit(self, function: Any, run_: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        if run_.design == "split24":
            future.set_exception(ValueError("no"))
        else:
            future.set_result((3.0 + run_.seed, self.seconds))
        return future


@pytest.mark.parametrize(
    ("taken", "seconds", "seeds"),
    [(0.0, math.inf, 3), (0.0, 100.0, 3), (99.0, 100.0, 3), (101.0, 100.0, 1), (0.0, 0.0, 1)],
    ids=["no limit", "fast", "just in time", "too slow", "no time"],
)
def test_no_seed_begins_that_would_end_too_late(taken: float, seconds: float, seeds: int) -> None:
    runs = [
        replace(a_run(design, 8), seed=seed)
        for seed in range(3)
        for design in ("split24", "stock_fp32_masters", "autocast")
    ]
    pool = OneAfterTheOther(taken)
    found = dict(trained(runs, pool, 2, time.monotonic(), seconds))
    assert {run_.seed for run_ in found} == set(range(seeds))
    assert len(found) == 3 * seeds  # whole ones
    results = results_of([run_ for run_ in runs if run_ in found], found)
    assert [r["design"] for r in results] == ["split24", "stock_fp32_masters", "autocast"]
    assert results[0]["error"] == "ValueError: no"
    assert results[2]["validation_loss"] == [3.0, 4.0, 5.0][:seeds]
    assert results[2]["difference"]["n"] == seeds


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are looked up in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_what_ends_the_script_leaves_whole_seeds(number: signal.Signals, tmp_path: Path) -> None:
    script = begun(tmp_path, "--micro-batches", "8", "--seeds", "1000")
    assert script.stdout is not None
    assert script.stdout.readline().startswith("convergence: 1 of 1000 seeds after ")
    children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    assert sum(map(is_alive, children)) >= 2
    script.send_signal(number)
    assert script.wait(10) == -number
    deadline = time.monotonic() + 10
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, children))
    (found,) = report.load_results(tmp_path).values()
    seeds = int(found["convergence"]["method"]["seeds"].removesuffix(" of 1000"))
    assert {len(r["validation_loss"]) for r in found["convergence"]["results"]} == {seeds}


def test_a_run_that_failed_is_the_result() -> None:
    run_ = a_run("split24", 8)
    found = result(run_, [3.0, "OOM"], [3.0, 3.1])
    assert found["error"] == "OOM"
    found = result(run_, [3.0, 3.2], [3.0, "OOM"])
    assert found["median_loss"] == pytest.approx(3.1)
    assert "difference" not in found
    report.check(found, "convergence", "split24")


def test_where_there_is_a_visible_difference_it_is_said() -> None:
    results = []
    reference = [3.0, 3.1, 3.2, 3.3, 3.4]
    for rate, count, less in ((2e-4, 1, 0.02), (2e-4, 8, 0.0), (1e-3, 1, 0.02), (1e-3, 8, -0.01), (1e-3, 64, 0.0)):
        losses: list[float | str] = [
            loss + less + noise for loss, noise in zip(reference, (0.001, -0.001, 0.0, 0.002, -0.002), strict=True)
        ]
        for design, of_design in (
            ("stock_bf16", losses),
            ("stock_fp32_masters", reference),
            ("split24", ["OOM"] * 5),
        ):
            run_ = replace(a_run(design, count, total=512), learning_rate=rate)
            results.append(result(run_, [*of_design], [*reference]))
    content = {"results": results}
    summary_ = convergence_summary(content)
    said = " ".join(summary_)
    assert "Validation loss of a GPT of 0.085 million weights after 16,384 tokens" in said
    older = [{key: value for key, value in r.items() if key != "parameters"} for r in results]
    assert "Validation loss of a small GPT after" in " ".join(convergence_summary({"results": older}))
    assert (
        "stock bf16: the loss is higher than that of stock fp32 + masters at N = 1 (learning rate 0.0002) and N = 1 "
        "(learning rate 0.001); lower than that of stock fp32 + masters at N = 8 (learning rate 0.001); not to be told "
        "from that of stock fp32 + masters at N = 8 (learning rate 0.0002) and N = 64 (learning rate 0.001)."
    ) in said
    assert "a confidence of 94%: of 5, about 0 would" in said
    assert "| stock bf16 | +0.02000 (+0.01800 to +0.02200) | +0.00000 (-0.00200 to +0.00200) |" in summary_
    assert "| **accumkern split24** | OOM | OOM | OOM |" in convergence_tables(content)
    assert figures.convergence("a machine", content) is not None


@pytest.mark.parametrize(("seeds", "confidence"), [(1, "0%"), (2, "50%"), (4, "88%")])
def test_few_seeds_are_said_to_tell_nothing(seeds: int, confidence: str) -> None:
    reference = [3.0, 3.1, 3.2, 3.3][:seeds]
    losses = {"stock_bf16": [loss + 0.5 for loss in reference], "stock_fp32_masters": reference}
    results = [result(a_run(design, 8), [*of], [*reference]) for design, of in losses.items()]
    content = {"results": results}
    for lines in (convergence_tables(content), convergence_summary(content)):
        said = " ".join(lines)
        assert f"So few seeds, {seeds}, tell nothing of differences" in said
        assert f"a confidence of {confidence}" in said
        assert "the loss is" not in said
        assert "by chance" not in said
        assert "| stock bf16 | +0.50000 (+0.50000 to +0.50000) |" in lines
