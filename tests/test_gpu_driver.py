"""benchmarks/gpu.py, which runs what only a GPU can show: parts end in time, fail alone, and are told of."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu import CHECKS, UNTIMED, Driver, Part  # noqa: E402


def part(name: str, program: str, limit: int = 60, beside: str | None = None) -> Part:
    return Part(name, [sys.executable, "-c", program], limit, beside)


def test_a_part_that_fails_leaves_the_others_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    driver = Driver(tmp_path, end=60)
    worked = driver.run(
        [part("fails", "print('about to'); raise SystemExit(3)"), part("works", "print('all of it')")],
    )
    assert not worked
    assert driver.failed == ["fails"]
    assert "rc 3" in driver.outcomes["fails"]
    assert "about to" in driver.outcomes["fails"]
    assert "rc 0" in driver.outcomes["works"]
    assert (tmp_path / "logs" / "works.txt").read_text() == "all of it\n"
    driver.summary()
    assert "all of it" in capsys.readouterr().out


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it does not listen; by its own limit, and by the end of everything."""
    deaf = "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    program = deaf + "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    program += "print(child.pid, flush=True); time.sleep(600)"
    monkeypatch.setattr(gpu, "KILL_AFTER", 1)
    driver = Driver(tmp_path, end=60)
    begun = time.monotonic()
    assert not driver.run([part("hangs", program, limit=2)])
    assert time.monotonic() - begun < 20
    assert "ended by its limit" in driver.outcomes["hangs"]
    child = int((tmp_path / "logs" / "hangs.txt").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "a process that a part started is still there"
        time.sleep(0.05)


def test_nothing_begins_when_the_time_is_over(tmp_path: Path) -> None:
    driver = Driver(tmp_path, end=gpu.LEAST - 1)
    assert not driver.run([part("late", "print('never')")])
    assert driver.outcomes["late"] == "left out: no time"
    assert driver.failed == ["late"]
    assert not list((tmp_path / "logs").iterdir())


def test_a_program_that_is_missing_is_told_of(tmp_path: Path) -> None:
    driver = Driver(tmp_path, end=60)
    assert not driver.run([Part("missing", ["/no/such/program"], 10), part("works", "pass")])
    assert "cannot be started" in driver.outcomes["missing"]
    assert "rc 0" in driver.outcomes["works"]


def test_failed_tests_are_named_in_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    driver = Driver(tmp_path, end=60)
    driver.run([part("tests some", "print('FAILED tests/test_x.py::test_y - nothing'); print('1 failed in 2s')")])
    driver.summary()
    assert "tests-some: FAILED tests/test_x.py::test_y - nothing" in capsys.readouterr().out


def test_every_file_of_tests_is_in_one_group() -> None:
    """But test_gpu.py, whose captures of graphs have a process of their own."""
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    named = [argument for part in gpu.tests() for argument in part.command if argument.startswith("tests/test_")]
    counted = sorted(Path(name).stem.removeprefix("test_") for name in named)
    assert counted == sorted([*files, "gpu"])
    assert all(part.beside == CHECKS for part in gpu.tests())


def test_every_script_of_a_part_is_there() -> None:
    for known in gpu.benchmarks(Path("results"), gpus=2):
        assert (ROOT / known.command[1]).exists()


def test_what_is_timed_has_the_machine_for_itself() -> None:
    """And what is not timed goes without tests beside it."""
    groups = [[known.name for known in together] for together in gpu.side_by_side(gpu.parts(Path("results")))]
    checks, *others = groups
    assert {"doctor", "tests steps", "memcheck cuda"} <= set(checks)
    assert others[:3] == [["step"], ["plan", "convergence"], ["product"]]
    assert all(len(names) == 1 for names in others if "plan" not in names)
    assert not {name for names in others for name in names} & set(checks)
    untimed = [part("a", "", beside=UNTIMED), part("alone", ""), part("b", "", beside=UNTIMED), part("untimed", "")]
    assert [[p.name for p in together] for together in gpu.side_by_side(untimed)] == [
        ["a", "b"],
        ["alone"],
        ["untimed"],
    ]


def test_parts_are_chosen_by_name(tmp_path: Path) -> None:
    environment = os.environ | {"ACCUMKERN_COMMIT": "0" * 40}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--output", str(tmp_path), "--parts", "kernel"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--parts has kernel; there are doctor, tests folds" in refused.stderr


@pytest.mark.slow
def test_every_kernel_is_called() -> None:
    """The program for compute-sanitizer, on the CPU's kernels."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "every_kernel.py"), "cpu"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "mean 6" in done.stdout
