"""The benchmark of host time: fair turns within a time, ratios of the same rounds, and what is left out is said."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("jsonschema", "matplotlib", "rich"):  # a GPU machine may lack them
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_overhead  # noqa: E402
import overhead_finish  # noqa: E402
import overhead_hook  # noqa: E402
import overhead_step  # noqa: E402
import overhead_training  # noqa: E402
import report  # noqa: E402
import turns  # noqa: E402
from regimes import REGIMES, TINY  # noqa: E402
from tables.overhead import overhead_summary, overhead_tables  # noqa: E402

import accumkern  # noqa: E402

CPU = torch.device("cpu")
OUT_OF_TIME: Callable[[], float] = lambda: 0.0  # noqa: E731


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that moves when it is told to: its first element is the seconds."""
    now = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])
    return now


# ---- turns -------------------------------------------------------------------------------------------------------


def test_what_a_case_leaves_or_needs_beyond_its_share_the_others_have(clock: list[float]) -> None:
    budget = turns.Budget(12.0, [1, 3, 1, 1])
    assert budget.share() == 2.0
    clock[0] = 7.0  # torch.compile took its time
    assert budget.share() == 3.0
    clock[0] = 8.0
    assert budget.share() == 2.0
    clock[0] = 99.0
    assert budget.share() == 0.0


@pytest.mark.parametrize(("share", "rounds"), [(0.0, 8), (31.0, 11), (1e9, 1000)], ids=["least", "share", "most"])
def test_variants_take_turns_for_their_share(share: float, rounds: int, clock: list[float]) -> None:
    calls: list[str] = []

    def variant(name: str) -> Callable[[], float]:
        clock[0] += 100.0  # making is not of the share
        calls.clear()

        def run() -> float:
            calls.append(name)
            clock[0] += 1.0
            return clock[0]

        return run

    measured = turns.by_turns({name: lambda name=name: variant(name) for name in "abc"}, lambda: share)
    assert {name: len(values) for name, values in measured.items()} == dict.fromkeys("abc", rounds)
    assert "".join(calls).startswith("abccbaabccba")


def test_a_variant_that_fails_is_a_result_and_the_others_go_on() -> None:
    left = iter(range(2))

    def cannot_be_made() -> Callable[[], int]:
        raise ValueError("not made\nfor this")

    measured = turns.by_turns(
        {"a": lambda: lambda: 1, "made": cannot_be_made, "late": lambda: lambda: next(left)}, OUT_OF_TIME
    )
    assert measured == {"a": [1] * 8, "made": "ValueError: not made", "late": "StopIteration: "}


def test_ratios_are_of_the_same_place_in_the_same_round() -> None:
    stock: list[turns.Clocked] = [{("window", "host"): [1.0, 2.0]}, {("window", "host"): [4.0, 8.0]}]
    mine: list[turns.Clocked] = [{("window", "host"): [3.0, 6.0]}, {("window", "host"): [12.0, 24.0]}]
    found = turns.compared({"stock": stock, "other": "OOM", "cpu": mine}, ["stock", "other"])
    assert [r["variant"] for r in found] == ["stock", "other", "cpu"]
    assert "over" not in found[0]
    assert found[1] == {"variant": "other", "error": "OOM"}
    assert (found[2]["n"], found[2]["rounds"], found[2]["median_ms"]) == (4, 2, 9.0)
    ratio = found[2]["over"]["stock"]
    assert list(found[2]["over"]) == ["stock"]
    assert (ratio["median"], ratio["low"], ratio["high"], ratio["n"]) == (3.0, 3.0, 3.0, 4)


def test_a_gpu_has_two_clocks(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: clock.__setitem__(0, clock[0] + 2.0))
    action: Callable[[], object] = lambda: clock.__setitem__(0, clock[0] + 1.0)  # noqa: E731
    assert turns.clocked(action, torch.device("cuda")) == {"host": 1000.0, "done": 3000.0}
    assert turns.clocked(action, CPU) == {"host": 1000.0}


# ---- what is measured --------------------------------------------------------------------------------------------


def test_the_hook() -> None:
    found = overhead_hook.measure("bare", 10, CPU, ["eager"], OUT_OF_TIME)
    assert [(r["variant"], r["n"]) for r in found] == [("stock", 8), ("eager", 8)]
    assert found[1]["over_stock_p20_us"] <= found[1]["over_stock_us"] <= found[1]["over_stock_p80_us"]
    for result in found:
        report.check(result, "overhead", "hook")


def test_training_where_launches_decide() -> None:
    regime = replace(REGIMES["cpu"]["launch"], **TINY)
    found = overhead_training.measure(regime, CPU, ["eager"], OUT_OF_TIME)
    assert [(r["variant"], r["stretch"], r["n"]) for r in found] == [
        ("stock", "micro-batch", 8 * 3),  # the first of four keeps its gradient
        ("stock", "window", 8),
        ("eager", "micro-batch", 8 * 3),
        ("eager", "window", 8),
    ]
    assert found[3]["median_ms"] > 3 * found[2]["median_ms"]
    for result in found:
        assert (result["model"], result["parameters"]) == ("training", 25)
        report.check(result, "overhead", "training")


def test_training_attaches_the_backend_that_it_names() -> None:
    regime = replace(REGIMES["cpu"]["launch"], **TINY)
    (stock, *_, failed) = overhead_training.measure(regime, CPU, ["cuda"], OUT_OF_TIME)
    assert "error" not in stock
    assert failed["variant"] == "cuda"
    assert "backend" in failed["error"]


def test_finish_ends_windows_that_were_accumulated(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    divide = torch._foreach_div_
    monkeypatch.setattr(torch, "_foreach_div_", lambda grads, by: (ends.append(len(grads)), divide(grads, by)))
    found = overhead_finish.measure(3, CPU, ["eager"], OUT_OF_TIME)
    assert ends == [3] * 9  # of one variant: eight rounds and one before
    assert [r["variant"] for r in found] == [overhead_finish.CLIP, overhead_finish.MEAN_AND_CLIP, "eager"]
    assert [set(r.get("over", {})) for r in found] == [set(), set(), {r["variant"] for r in found[:2]}]
    for result in found:  # finish() refuses a window that it has ended
        assert "error" not in result
        report.check(result, "overhead", "finish")


@pytest.mark.parametrize("model", overhead_step.MODELS)
def test_steps_of_fp32_weights_and_of_masters(model: str) -> None:
    found = overhead_step.measure(model, CPU, ["eager"], OUT_OF_TIME)
    assert [r["variant"] for r in found] == [*overhead_step.STOCK, "eager"]
    assert [set(r.get("over", {})) for r in found] == [set(), set(), set(overhead_step.STOCK)]
    for result in found:
        assert "error" not in result
        report.check(result, "overhead", "step")


def test_steps_are_those_that_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[Any] = []

    def clocked(step: Any, _: torch.device) -> dict[str, float]:
        stepped.append(step.__self__)
        step()
        return {"host": 1.0}

    monkeypatch.setattr(overhead_step, "clocked", clocked)
    for name, options in overhead_step.STOCK.items():
        overhead_step.make_step(overhead_step.PLAIN, CPU, options, None)
        assert all(stepped[-1].param_groups[0][option] for option in options), name
        assert {param.dtype for param in stepped[-1].state} == {torch.float32}
        assert len(stepped[-1].state) == overhead_step.COUNT
    overhead_step.make_step(overhead_step.PLAIN, CPU, {}, "eager")
    assert {param.dtype for param in stepped[-1].state} == {torch.bfloat16}
    assert accumkern.accumulator_of(stepped[-1]).memory().master_residuals == overhead_step.COUNT * 64 * 2


def test_a_slow_backend_is_measured_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    options = argparse.ArgumentParser()
    monkeypatch.setattr(bench_overhead, "backends_on", lambda _: ["cpu", "eager"])
    assert bench_overhead.chosen_backends(options, None, CPU) == (["cpu"], ["eager"])
    assert bench_overhead.chosen_backends(options, "eager,cpu", CPU) == (["eager", "cpu"], [])
    with pytest.raises(SystemExit):
        bench_overhead.chosen_backends(options, "cuda", CPU)
    monkeypatch.setattr(bench_overhead, "backends_on", lambda _: ["eager"])
    assert bench_overhead.chosen_backends(options, None, CPU) == (["eager"], [])


def test_numbers_of_parameters_are_whole_blocks() -> None:
    assert bench_overhead.numbers("10,3000") == [10, 3000]
    with pytest.raises(argparse.ArgumentTypeError, match="15, 0: a block has ten parameters"):
        bench_overhead.numbers("15,10,0")


# ---- what is shown -----------------------------------------------------------------------------------------------


def shown(results: list[dict[str, Any]]) -> tuple[str, str]:
    content = {"results": results, "method": {"backend": "cpu"}}
    return "\n".join(overhead_tables(content)), " ".join(" ".join(overhead_summary(content)).split())


def clocked_result(variant: str, clock: str, ms: float, **more: Any) -> dict[str, Any]:
    made = {"model": "training", "parameters": 5, "variant": variant, "stretch": "window", "clock": clock, "rounds": 9}
    return made | {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "n": 9} | more


def test_what_an_older_file_lacks_was_not_measured() -> None:
    full, summary = shown([{"model": "bare", "parameters": 10, "variant": "stock", "us_per_parameter": 5.0, "n": 9}])
    assert "| 10 | 5.00 |" in full
    assert "**transformer**: not measured" in full
    assert "Training with tiny micro-batches: not measured." in full
    assert "The end of a window of small tensors: not measured." in full
    assert "AdamW's step of small tensors, with masters in bfloat16 weights: not measured." in full
    assert "The same under `fully_shard`: not measured." in full
    assert "Training" not in summary


def test_ratios_of_training_are_shown_by_clock_where_there_are_two() -> None:
    ratio = {"median": 1.25, "low": 1.2, "high": 1.3, "confidence": 0.96, "n": 9}
    results = [
        clocked_result("stock", "host", 4.0),
        clocked_result("cpu", "host", 5.0, over={"stock": ratio}),
        {"model": "training", "parameters": 5, "variant": "eager", "error": "OOM"},
    ]
    full, summary = shown(results)
    assert "| **cpu** | 5 | window | 5.00 ms (5.00-5.00) | 1.250 (1.200-1.300) |" in full
    assert "| **eager** | 5 |  | OOM |  |" in full
    assert "Training with tiny micro-batches: time over stock bf16 1.250 (1.200-1.300) for a window." in summary
    results += [clocked_result("stock", "done", 6.0), clocked_result("cpu", "done", 6.0, over={"stock": ratio})]
    full, summary = shown(results)
    assert "| **cpu** | 5 | window, until the GPU has finished | 6.00 ms" in full
    assert "for a window, host time, 1.250 (1.200-1.300) for a window, until the GPU has finished." in summary
