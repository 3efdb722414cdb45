"""The benchmark of the step: its designs do the same step, and what they hold and move is what is said of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_bench_training import CPU, ROOT, run  # which skips this file, too, where a package is missing
from torch import Tensor

import bench_step  # isort: skip
import report  # isort: skip
import step_designs  # isort: skip
from tables.parts import grouped  # isort: skip
from tables.step import ALONE, step_summary, step_tables  # isort: skip

OF_TORCH = [kind for kind in step_designs.DESIGNS if kind.optimizer_kind is None]
OF_PACKAGES = [kind for kind in step_designs.DESIGNS if kind.optimizer_kind is not None]
# Bytes for a weight: weight, master, gradient, its residual, states of AdamW.
STEP_BYTES = {
    "stock_bf16": (2, 0, 2, 0, 4),
    "stock_fp32_masters": (2, 4, 4, 0, 8),
    "split24_masters": (2, 2, 2, 1, 8),
    "split24_masters_deferred": (2, 2, 2, 1, 8),
    "split24_masters24": (2, 1, 2, 1, 8),
    "split24_masters_generic": (2, 2, 2, 1, 8),
    "split24_masters_8bit": (2, 2, 2, 1, 2 + 8 / 256),  # a block of 256 weights has two FP32 scales
    "split24_masters24_8bit": (2, 1, 2, 1, 2 + 8 / 256),
    "split24_masters_torchao_8bit": (2, 2, 2, 1, 2 + 8 / 256),
    "torchao_stochastic": (2, 0, 2, 0, 4),
}
# Bytes for a weight that are read and written: without mean and clipping, and with them.
MOVED_BYTES = {
    "split24_masters": (27, 27 + 3 + 6),
    "split24_masters_deferred": (27, 27 + 3),
    "split24_masters24": (25, 25 + 3 + 6),
}


def measured(shapes: list[tuple[int, ...]], kinds: list[type[Any]], rounds: int) -> list[dict[str, Any]]:
    *_, results = bench_step.measured([bench_step.Case(shapes, kinds)], CPU, rounds, lambda done, total: None)
    return results


def assert_moved(measured: list[dict[str, Any]]) -> None:
    for result in measured:
        alone, finished = MOVED_BYTES.get(result["design"], (None, None))
        assert result.get("moved_bytes") == (alone if result["end"] == ALONE else finished)
        if alone is not None:
            gb_per_s = result["moved_bytes"] * result["numel"] / 1e6 / result["median_ms"]
            assert result["gb_per_s"] == pytest.approx(gb_per_s)
            assert result["of_fold_bandwidth"]["n"] == result["n"]
            if result["n"] == 1:
                of_fold = result["gb_per_s"] / result["fold_gb_per_s"]
                assert result["of_fold_bandwidth"]["median"] == pytest.approx(of_fold)


def test_bytes_that_a_step_in_one_pass_moves() -> None:
    results = measured([(64, 64)], OF_TORCH, rounds=1)
    assert {r["design"] for r in results} > set(MOVED_BYTES)
    assert_moved(results)


@pytest.mark.slow
def test_step(tmp_path: Path) -> None:
    content = run("step", tmp_path)
    assert {r["tensors"] for r in content["results"]} == {1, 2}
    for results in grouped(content["results"], "design", "tensors").values():
        assert {r["end"] for r in results} == set(bench_step.ENDS)
    here = {kind.key for kind in step_designs.DESIGNS if step_designs.is_installed(kind)}
    assert {r["design"] for r in content["results"]} == here
    for kind in step_designs.DESIGNS:
        assert (kind.label in content["method"]) == (kind.key in here)
        assert kind.key in here or step_designs.package_of(kind) in content["method"]["not installed"]
    measured = [r for r in content["results"] if "error" not in r]
    assert {r["design"] for r in measured} == here & set(STEP_BYTES)  # the others need a GPU
    for result in measured:
        *held, bucket = result["held_bytes"].values()
        assert [size / result["numel"] for size in held] == pytest.approx(STEP_BYTES[result["design"]], abs=2e-3)
        is_accumkern = result["design"].startswith("split24")
        assert (bucket > 0) == (is_accumkern and result["design"] not in MOVED_BYTES)
        assert ("over_fp32_masters" in result) == (result["design"] != "stock_fp32_masters")
        if "8bit" not in result["design"]:
            assert result["peak_bytes"] < 0.01 * result["numel"]  # the bucket is kept
    assert_moved(measured)
    buckets = {r["bucket_bytes"]: r["held_bytes"]["bucket"] for r in measured if r["bucket_bytes"]}
    # A tensor of 2^20 weights needs 8 MiB, also where a bucket is smaller.
    assert "is 4.00 more where they are 2 tensors and 8.00 more where they are 1 tensor" in " ".join(
        step_summary(content)
    )
    assert buckets == {2 * 2**20: 2**23, 8 * 2**20: 2**23, 32 * 2**20: 2**24, 128 * 2**20: 2**24}


def ended(kind: type[Any], end: str) -> tuple[list[Tensor], list[Tensor]]:
    """End four windows; return the weights, and AdamW's first moment."""
    made = bench_step.Measurement([(8, 8), (16,)], [kind], CPU)
    made.make(0, kind)
    design = made.designs[0]
    for _ in range(3):
        made.accumulate(design)
        design.end(bench_step.ENDS[end][0], None if "clip" not in end else 1e-4)
    if issubclass(kind, step_designs.InsideWeights):
        assert ("step='fused'" in repr(design.accumulator)) == kind.is_fused
    momenta = [state.get("exp_avg", state.get("state1")).float() for state in design.optimizer.state.values()]
    return [param.detach() for param in design.params], momenta


def assert_same_step(kinds: list[type[Any]], end: str) -> None:
    weights, momenta = ended(step_designs.BesideWeights, end)
    for kind in kinds:
        in_bf16 = issubclass(kind, step_designs.InBF16)
        mine, my_momenta = ended(kind, end)
        # AdamW's weights hardly depend on the scale of gradients; its first moment does.
        for one, other in zip(my_momenta, momenta, strict=True):
            torch.testing.assert_close(one, other, rtol=2**-5 if in_bf16 else 2**-14, atol=1e-6 if in_bf16 else 1e-9)
        for one, other in zip(mine, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=2**-6, atol=1e-3 if in_bf16 else 1e-5)


@pytest.mark.parametrize("end", bench_step.ENDS)
def test_an_end_of_a_window_is_the_same_step_in_every_design(end: str) -> None:
    assert_same_step(OF_TORCH, end)


@pytest.mark.slow
@pytest.mark.parametrize("end", bench_step.ENDS)
def test_an_end_of_a_window_is_the_same_step_with_other_packages(end: str) -> None:
    kinds = [kind for kind in OF_PACKAGES if kind.key in STEP_BYTES and step_designs.is_installed(kind)]
    assert_same_step(kinds, end)


def test_what_cannot_be_made_is_a_result_and_what_is_not_installed_is_not_measured() -> None:
    absent = type("Absent", (step_designs.Flash24,), {"optimizer_kind": "no_such_package.AdamW"})
    broken = type("Broken", (step_designs.Flash24,), {"optimizer_kind": "json.AdamW"})  # which has none
    assert (step_designs.is_installed(absent), step_designs.is_installed(broken)) == (False, True)
    kinds = [step_designs.BesideWeights, broken]
    results = measured([(64, 64)], kinds, rounds=1)
    failed = [r["error"] for r in results if r["design"] == broken.key]
    assert failed == ["AttributeError: module 'json' has no attribute 'AdamW'"] * len(bench_step.ENDS)
    for result in results:
        report.check(result, "step", "results")
    shown = [line for line in step_tables({"results": results}) if "has no attribute" in line]
    assert len(shown) == 1
    assert shown[0].count("has no attribute") == 1


def test_what_matters_most_is_measured_first_and_stands_where_it_belongs() -> None:
    """Of all weights; and beside the first designs the one that others are compared with, which is measured again."""
    of_package = type("Late", (step_designs.InBF16,), {"key": "late", "optimizer_kind": "torch.optim.AdamW"})
    of_others = type("Later", (step_designs.InBF16,), {"key": "later", "optimizer_kind": "flashoptim.AdamW"})
    kinds = [of_package, of_others, step_designs.InBF16, step_designs.BesideWeights]
    cases = [bench_step.Case([(8,), (8,)], [*kinds, step_designs.with_bucket(1)]), bench_step.Case([(16,)], kinds)]
    grown = list(bench_step.measured(cases, CPU, 1, lambda done, total: None))
    seen = [[(r["tensors"], r["design"]) for r in results if r["end"] == ALONE] for results in grown]
    first = [(2, "stock_bf16"), (2, "stock_fp32_masters"), (2, "split24_masters_generic")]
    assert seen[0] == first
    assert seen[1] == [*first, (1, "stock_bf16"), (1, "stock_fp32_masters")]
    assert seen[2] == [(2, "later"), *seen[1]]
    assert seen[-1] == [(2, "late"), (2, "later"), *first, (1, "late"), (1, "later"), *seen[1][-2:]]
    reference = [[r for r in results if r["design"] == "stock_fp32_masters"] for results in grown]
    assert reference[0] == reference[-1][: len(bench_step.ENDS)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_ends_the_script_takes_only_what_is_being_measured(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_step.py"), "--device", "cpu", "--quick"]
    environment = os.environ | {"ACCUMKERN_COMMIT": "0" * 40, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    script = subprocess.Popen(
        [*command, "--results", str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/step.json")):
        assert script.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    script.send_signal(number)
    printed, _ = script.communicate(timeout=60)
    assert script.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert ("interrupted: what had been measured by then is written" in printed) == (number == signal.SIGINT)
    (found,) = report.load_results(tmp_path).values()
    results = found["step"]["results"]
    assert {"stock_bf16", "stock_fp32_masters", "split24_masters"} <= {r["design"] for r in results}
    assert not {r["design"] for r in results} & {"torchao_stochastic", "split24_masters_torchao_8bit"}
    assert step_summary(found["step"])


def test_what_takes_long_is_measured_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_step.SECONDS_EACH, "cpu", 0.0)
    kinds = [step_designs.InBF16, step_designs.BesideWeights]
    results = measured([(8,)], kinds, rounds=9)
    assert {r["n"] for r in results} == {bench_step.MIN_ROUNDS}


def test_states_in_objects_of_the_optimizer_are_counted() -> None:
    codes, scales = torch.zeros(64, dtype=torch.int8), torch.zeros(2, dtype=torch.float16)
    optimizer = torch.optim.SGD([param := torch.nn.Parameter(torch.zeros(64))])
    optimizer.state[param] = {"exp_avg": SimpleNamespace(codes=codes, scales=scales, data=None), "error_bits": codes}
    assert step_designs.states(optimizer, ["exp_avg"]) == [codes, scales]
    assert step_designs.states(optimizer, ["error_bits"]) == [codes]


def test_a_design_whose_step_fails_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def fails_late(self: Any, divide_by: float, max_norm: float | None) -> None:
        nonlocal calls
        calls += 1
        if calls > 8:  # memory is measured, time is not
            raise ValueError("late")

    monkeypatch.setattr(step_designs.InsideWeights24, "end", fails_late)
    kinds = [*OF_TORCH, step_designs.with_bucket(1)]
    results = measured([(64, 64)], kinds, rounds=2)
    assert len(results) == len(OF_TORCH) * 3 + 1
    failed = [r for r in results if "error" in r]
    assert [(r["design"], r["error"]) for r in failed] == [("split24_masters24", "ValueError: late")] * 3
    for result in results:
        report.check(result, "step", "results")
    assert all("n" not in r or r["n"] == 2 for r in results)
    shown = step_tables({"results": results})
    assert any("ValueError: late" in line for line in shown)
    (moved,) = [line for line in shown if line.startswith("| **accumkern split24 + masters, deferred** | 27 |")]
    assert moved.count("|") == 1 + 1 + 3 * 3
    assert "ValueError: late" in " ".join(step_summary({"results": results}))
