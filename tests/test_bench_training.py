"""The benchmarks of training: their designs do the same training, they run, and what fails in them is a result."""

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
import bench_training  # noqa: E402
import figures  # noqa: E402
import report  # noqa: E402
import tables  # noqa: E402
from paired import median_interval, summary  # noqa: E402
from regimes import REGIMES, TINY  # noqa: E402
from tables.convergence import COMPARED_WITH, convergence_summary, convergence_tables  # noqa: E402
from tables.training import training_tables, verdict  # noqa: E402

import designs  # noqa: E402
from measure import Memory  # noqa: E402
from train_gpt import GPT, random_batch  # noqa: E402

CPU = torch.device("cpu")
TEXT = torch.randint(32, 127, (4000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def run(name: str, folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), "--device", "cpu", "--quick", *options]
    environment = os.environ | {"ACCUMKERN_COMMIT": "0" * 40, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([*command, "--results", str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = report.load_results(folder).values()
    assert tables.SECTIONS[name].title in report.document(report.load_results(folder), set())
    for _, figure, _ in report.figures(report.load_results(folder)):
        figure.canvas.draw()
    return found[name]


# ---- the designs -------------------------------------------------------------------------------------------------


def trained(key: str) -> tuple[list[Tensor], list[Tensor]]:
    """Train a tiny model for two windows; return its weights, and the last gradients that were kept."""
    torch.manual_seed(0)
    kind = designs.DESIGNS[key]
    design = kind(kind.cast(GPT(16, 1, 1, context=8)), max_norm=0.5)  # which clips here
    design.begin()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        sums: list[Tensor] = []
        for number in range(4):
            design.backward(design.model(random_batch(TEXT, 2, generator, 8)) / 4, last=number == 3)
        sums = [total.clone() for total in design.sums()]
        design.step()
    return [param.detach().clone() for param in design.params], sums


@pytest.mark.parametrize("key", ["grad_dtype_masters", "hook_add_masters", "hook_cast_masters", "split32_masters"])
def test_exact_designs_with_masters_train_alike_bit_for_bit(key: str) -> None:
    weights, sums = trained(key)
    expected_weights, expected_sums = trained("stock_fp32_masters")
    assert all(map(torch.equal, sums, expected_sums))
    # The norm of a flat buffer and that of its parts may differ in the last bit, which a weight's rounding may show.
    differing = sum((a != b).sum().item() for a, b in zip(weights, expected_weights, strict=True))
    assert differing <= 0.001 * sum(weight.numel() for weight in weights)


def test_the_compiled_step_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(designs, "_compile", lambda function: function)
    weights, _ = trained("compiled_masters")
    expected, _ = trained("stock_fp32_masters")
    # The last bit of a master shows in a weight now and then, and that weight in all gradients of the next window.
    differing = sum((a != b).sum().item() for a, b in zip(weights, expected, strict=True))
    assert differing <= 0.005 * sum(weight.numel() for weight in weights)
    for mine, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    "key", ["stock_bf16", "stock_fp32", "split24", "split32", "split24_finish", "split32_finish", "stock_bf16_masters"]
)
def test_other_designs_train_nearly_alike(key: str) -> None:
    weights, sums = trained(key)
    expected_weights, expected_sums = trained("stock_fp32_masters")
    for mine, other in zip(sums, expected_sums, strict=True):
        torch.testing.assert_close(mine.float(), other, rtol=0.02, atol=1e-3)
    # Where a gradient is next to nothing, AdamW goes by its sign.
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(weights, expected_weights, strict=True)])
    large = torch.cat([(a.abs() * 2**-7 + 1e-4).flatten() for a in expected_weights])
    assert (apart > large).float().mean() < 0.01


def test_gradient_release_trains_and_keeps_no_gradient() -> None:
    pytest.importorskip("optimi")
    torch.manual_seed(0)
    before = [param.detach().clone() for param in GPT(16, 1, 1, context=8).bfloat16().parameters()]
    weights, sums = trained("gradient_release")
    assert sums == []
    assert not any(map(torch.equal, weights[:2], before[:2]))


# ---- the training benchmark --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training(tmp_path: Path) -> None:
    keys = "stock_bf16,stock_fp32,grad_dtype,split24,split32_finish,stock_fp32_masters,split24_masters,autocast"
    content = run("training", tmp_path, "--regimes", "compute,launch", "--designs", keys)
    assert len(content["results"]) == 2 * len(keys.split(","))
    for regime in ("compute", "launch"):
        found = {r["design"]: r for r in content["results"] if r["regime"] == regime}
        assert "expected scalar type BFloat16 but found Float" in found["grad_dtype"]["error"]
        held = {key: r["gradient_bytes_per_parameter"]["held"] for key, r in found.items() if "error" not in r}
        for key, size in {"stock_bf16": 2, "stock_fp32": 4, "split24": 3, "split32_finish": 4}.items():
            assert held[key] == pytest.approx(size, abs=0.05)
        errors = {key: r["relative_error"]["sum"] for key, r in found.items() if "error" not in r}
        assert errors["split24"] == errors["split24_masters"] < errors["stock_bf16"] / 256
        assert errors["stock_fp32"] == errors["split32_finish"] < 2**-24
        # Weights, two states of AdamW and gradients; FP32 copies of the weights make them 4 bytes and 8 more.
        of_weight = {key: r["peak_bytes"] / r["parameters"] for key, r in found.items() if "error" not in r}
        assert of_weight["stock_bf16"] > 6 + 2
        assert found["stock_fp32_masters"]["resident_bytes"] == pytest.approx(
            14 * found["split24"]["parameters"], rel=0.02
        )
        assert found["split24"]["resident_bytes"] == pytest.approx(6 * found["split24"]["parameters"], rel=0.02)
        # The residual of the masters is 2 and the states are FP32; the step makes no copies.
        assert found["split24_masters"]["resident_bytes"] == pytest.approx(
            (2 + 2 + 8) * found["split24"]["parameters"], rel=0.02
        )
        assert held["split24_masters"] == pytest.approx(3, abs=0.05)
        # FP32 weights, their states and their gradients.
        assert found["autocast"]["resident_bytes"] == pytest.approx(12 * found["split24"]["parameters"], rel=0.02)
        assert held["autocast"] == pytest.approx(4, abs=0.05)
        assert errors["autocast"] < 2**-24
        assert set(found["split24"]["window_over"]) == {"stock_bf16", "stock_fp32_masters"}
        assert found["split24"]["micro_batch_over"]["stock_bf16"]["n"] == 2 * 3
    assert any("RuntimeError" in line for line in training_tables(content))


def measurement(monkeypatch: pytest.MonkeyPatch, **more: type[designs.StockBF16]) -> bench_training.Measurement:
    for key, design in more.items():
        monkeypatch.setitem(bench_training.DESIGNS, key, design)
    regime = replace(
        REGIMES["cpu"]["launch"],
        **TINY,
        turn=2,
        designs=("stock_bf16", *more, "split24"),
    )
    return bench_training.Measurement(regime, TEXT, CPU, lambda done, total: None)


def test_what_fails_in_a_design_is_its_result_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(designs.StockBF16):
        steps = 0

        def step(self) -> None:
            Fails.steps += 1
            if Fails.steps > 3:  # two of memory, one of the first window
                raise ValueError("no more\nof this")
            super().step()

    class OutOfMemory(designs.StockBF16):
        def begin(self) -> None:
            torch.empty(2**50)  # more than a process can address

    found = {r["design"]: r for r in measurement(monkeypatch, fails=Fails, out_of_memory=OutOfMemory).results()}
    assert found["fails"]["error"] == "ValueError: no more"
    assert found["out_of_memory"]["error"] == "OOM"
    for key in ("stock_bf16", "split24"):
        assert found[key]["window"]["n"] == 2
        report.check({"regime": "launch"} | found[key], "training", key)
    report.check({"regime": "launch"} | found["fails"], "training", "fails")


def test_as_many_designs_at_a_time_as_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {f"other{i}": designs.Split32 for i in range(3)}
    made = measurement(monkeypatch, **others)
    for outcome in made.outcomes.values():
        outcome.memory = Memory(resident=60, held=20, peak=110, peak_in_step=20)  # 80 that stay, and 30 by turns
    for free, groups in ((1000, 1), (301, 2), (299, 4), (10, 4)):
        monkeypatch.setattr(bench_training, "free_bytes", lambda _, free=free: free)
        found = list(made.groups())
        assert len(found) == groups
        assert all(group[0] == "stock_bf16" for group in found)
        assert sorted(key for group in found for key in group[1:]) == sorted([*others, "split24"])


# ---- the convergence benchmark -----------------------------------------------------------------------------------


CONVERGENCE = bench_convergence.REGIMES


def convergence_run(design: str, micro_batches: int, total: int = 64) -> bench_convergence.Run:
    return bench_convergence.Run(design, micro_batches, 1e-3, 1, total, "cpu", CONVERGENCE["cpu"])


@pytest.mark.slow
def test_convergence(tmp_path: Path) -> None:
    content = run("convergence", tmp_path, "--workers", "2")
    assert {(r["design"], r["micro_batches"]) for r in content["results"]} == {
        (design, count) for design in bench_convergence.DESIGN_KEYS for count in (1, 8)
    }
    assert {r["learning_rate"] for r in content["results"]} == set(CONVERGENCE["cpu"].learning_rates)
    assert content["method"]["seeds"] == "2 of 2"
    for result in content["results"]:
        assert len(set(result["validation_loss"])) == 2  # the seeds
        assert all(3 < loss < 5.5 for loss in result["validation_loss"])  # it has learnt something
        assert ("difference" in result) == (result["design"] != COMPARED_WITH)
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
    assert set(figures.CONVERGENCE_COLORS) == set(bench_convergence.DESIGN_KEYS) - {COMPARED_WITH}


def test_a_run_is_the_same_again() -> None:
    run_ = convergence_run("split24_masters", 4, total=8)
    assert bench_convergence.train(run_) == bench_convergence.train(run_)


@pytest.mark.parametrize("design", bench_convergence.DESIGN_KEYS)
def test_a_run_of_a_gpu_but_for_its_size(design: str) -> None:
    regime = CONVERGENCE["cuda"]
    assert 10e6 <= bench_convergence.parameters_of(regime) <= 100e6
    assert regime.windows == (8,)
    small = replace(regime, width=32, layers=2, heads=1, context=16, batch_size=3)
    run_ = replace(convergence_run(design, 8, total=64), learning_rate=1e-2, regime=small)
    loss = bench_convergence.train(run_)
    assert 3 < loss < 5  # of 5.5 at the beginning
    found = bench_convergence.result(run_, [loss], [loss])
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
    regime = replace(CONVERGENCE["cpu"], batch_size=2)
    for count in (1, 4):
        bench_convergence.train(replace(convergence_run("stock_bf16", count, total=8), regime=regime))
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
        replace(convergence_run(design, 8), seed=seed)
        for seed in range(3)
        for design in ("split24", "stock_fp32_masters", "autocast")
    ]
    pool = OneAfterTheOther(taken)
    found = dict(bench_convergence.trained(runs, pool, 2, time.monotonic(), seconds))
    assert {run_.seed for run_ in found} == set(range(seeds))
    assert len(found) == 3 * seeds  # whole ones
    results = bench_convergence.results_of([run_ for run_ in runs if run_ in found], found)
    assert [r["design"] for r in results] == ["split24", "stock_fp32_masters", "autocast"]
    assert results[0]["error"] == "ValueError: no"
    assert results[2]["validation_loss"] == [3.0, 4.0, 5.0][:seeds]
    assert results[2]["difference"]["n"] == seeds


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are looked up in /proc")
def test_what_ends_the_script_leaves_whole_seeds(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "bench_convergence.py")
    options = "--device cpu --quick --micro-batches 8 --seeds 1000 --workers 2 --results".split()
    environment = os.environ | {"ACCUMKERN_COMMIT": "0" * 40, "PYTHONPATH": str(ROOT)}
    script_ = subprocess.Popen(
        [sys.executable, script, *options, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert script_.stdout is not None
    assert script_.stdout.readline().startswith("convergence: 1 of 1000 seeds after ")
    children = Path(f"/proc/{script_.pid}/task/{script_.pid}/children").read_text().split()
    assert len(children) >= 2
    script_.terminate()
    assert script_.wait(10) == -signal.SIGTERM
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    (found,) = report.load_results(tmp_path).values()
    seeds = int(found["convergence"]["method"]["seeds"].removesuffix(" of 1000"))
    assert {len(r["validation_loss"]) for r in found["convergence"]["results"]} == {seeds}


def test_a_run_that_failed_is_the_result() -> None:
    run_ = convergence_run("split24", 8)
    found = bench_convergence.result(run_, [3.0, "OOM"], [3.0, 3.1])
    assert found["error"] == "OOM"
    found = bench_convergence.result(run_, [3.0, 3.2], [3.0, "OOM"])
    assert found["median_loss"] == pytest.approx(3.1)
    assert "difference" not in found
    report.check(found, "convergence", "split24")


# ---- what the numbers prove --------------------------------------------------------------------------------------


def test_median_interval() -> None:
    assert median_interval([3.0, 1.0, 2.0, 5.0, 4.0]) == (1.0, 5.0, 1 - 2 / 32)
    assert median_interval([float(i) for i in range(6)]) == (0.0, 5.0, 1 - 2 / 64)
    low, high, confidence = median_interval([float(i) for i in range(20)])
    assert (low, high) == (5.0, 14.0)  # the 6th of each end, as tables of the sign test have it
    assert confidence == pytest.approx(0.9586, abs=1e-4)
    assert median_interval([7.0]) == (7.0, 7.0, 0.0)


def training_result(design: str, ratios: list[float]) -> dict[str, Any]:
    over = {} if design == "stock_bf16" else {"stock_bf16": summary(ratios)}
    return {"design": design, "label": designs.DESIGNS[design].label, "window_over": over}


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([1.01, 1.02, 1.03, 1.04, 1.05, 1.06], "slower than stock bf16: accumkern split24"),
        ([0.94, 0.95, 0.96, 0.97, 0.98, 0.99], "faster than stock bf16: accumkern split24"),
        ([0.99, 1.02, 1.03, 1.04, 1.05, 1.06], "not to be told from stock bf16: accumkern split24"),
        ([1.04, 1.05], "not to be told from stock bf16: accumkern split24"),
    ],
    ids=["slower", "faster", "neither", "too few"],
)
def test_a_verdict_follows_the_interval(ratios: list[float], said: str) -> None:
    results = [training_result("stock_bf16", []), training_result("split24", ratios)]
    assert verdict(results, "window", "stock_bf16") == [f"By the window, {said}.", ""]


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
            run_ = replace(convergence_run(design, count, total=512), learning_rate=rate)
            results.append(bench_convergence.result(run_, [*of_design], [*reference]))
    content = {"results": results}
    summary_ = convergence_summary(content)
    said = " ".join(summary_)
    assert "Validation loss of a GPT of 0.084 million weights after 16,384 tokens" in said
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
