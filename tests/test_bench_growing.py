"""Result files of benchmarks grow with what has been measured, whatever ends the script."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

for needed in ("jsonschema", "matplotlib", "rich"):  # a GPU machine may lack them
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_kernels  # noqa: E402
import bench_training  # noqa: E402
import harness  # noqa: E402
from tables import SECTIONS  # noqa: E402
from tables.parts import Section  # noqa: E402

CPU = torch.device("cpu")


def growing(*lists: list[dict[str, Any]] | type[BaseException]) -> Iterator[list[dict[str, Any]]]:
    for results in lists:
        if isinstance(results, type):
            raise results
        yield results


def test_what_is_measured_is_written_while_it_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCUMKERN_COMMIT", "0" * 40)
    monkeypatch.setitem(SECTIONS, "kernels", Section("Kernels", lambda content: [f"{len(content['results'])} shown"]))
    arguments = harness.parser("Measures.").parse_args(["--device", "cpu", "--results", str(tmp_path)])

    def written() -> list[dict[str, Any]]:
        (path,) = tmp_path.glob("*/*")
        found: list[dict[str, Any]] = json.loads(path.read_text())["results"]
        return found

    def looking() -> Iterator[list[dict[str, Any]]]:
        yield [{"n": 1}]
        assert written() == [{"n": 1}]
        yield [{"n": 1}, {"n": 2}]
        assert written() == [{"n": 1}, {"n": 2}]

    harness.write_growing(arguments, "kernels", {"how": "not"}, looking())
    assert "2 shown" in capsys.readouterr().out
    harness.write_growing(arguments, "kernels", {"how": "not"}, growing([{"n": 3}], KeyboardInterrupt, [{"n": 4}]))
    assert written() == [{"n": 3}]
    printed = capsys.readouterr().out
    assert "1 shown" in printed
    assert "interrupted" in printed
    with pytest.raises(SystemExit, match="nothing is written"):
        harness.write_growing(arguments, "kernels", {"how": "not"}, growing(KeyboardInterrupt, [{"n": 5}]))
    with pytest.raises(ValueError, match="nothing was measured of kernels"):
        harness.write_growing(arguments, "kernels", {"how": "not"}, growing())
    assert written() == [{"n": 3}]


@pytest.mark.parametrize("script", ["kernels", "training"])
def test_cases_and_regimes_are_results_as_soon_as_they_are_measured(
    script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script == "kernels":
        monkeypatch.setattr(bench_kernels, "measure", lambda case, device, rounds: [{"case": case.name}])
        cases = [bench_kernels.Case(name, [(1,)]) for name in ("a", "b")]
        grown = [[r["case"] for r in results] for results in bench_kernels.measured(cases, CPU, 1)]
    else:
        monkeypatch.setattr(bench_training.Measurement, "__init__", lambda self, *arguments: None)
        monkeypatch.setattr(bench_training.Measurement, "results", lambda self: [{}])
        monkeypatch.setattr(bench_training, "adapted", lambda regime, arguments: regime)
        arguments = SimpleNamespace(device="cpu", regimes=["a", "b"])
        monkeypatch.setitem(bench_training.REGIMES, "cpu", dict.fromkeys("ab", SimpleNamespace(designs=["one"])))
        grown = [[r["regime"] for r in results] for results in bench_training.measured(arguments, CPU)]
    assert grown == [["a"], ["a", "b"]]
