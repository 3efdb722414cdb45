"""The benchmarks of training: their designs do the same training, they run, and what fails in them is a result."""

from __future__ import annotations

import os
import subprocess
import sys
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

import bench_training  # noqa: E402
import report  # noqa: E402
import tables  # noqa: E402
from paired import median_interval, summary  # noqa: E402
from regimes import REGIMES, TINY  # noqa: E402
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
