"""The command line as people use it: scripts that print, parse arguments, change directory, have names of libraries."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

for library in ("matplotlib", "rich", "jinja2"):
    pytest.importorskip(library)

from planned import old_objects_aside  # noqa: E402, F401

from accumkern.__main__ import main  # noqa: E402
from accumkern.planning import cli, speed  # noqa: E402
from accumkern.planning.script import Script  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside")

PREDICT = ["--predict", "--memory", "1GB", "--effective-batch", "64"]
SETUP = """
    import torch
    from torch import nn

    def setup():
        model = nn.Linear(16, 1).to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, make_batch, loss

    def make_batch(size):
        return torch.randn(size, 16, dtype=torch.bfloat16)

    def loss(model, batch):
        return (model(batch).float()[:, 0] - batch.float().sum(-1)).square().mean()
"""


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LEAST_SECONDS", 0.01)


def write(folder: Path, name: str = "train.py", before: str = "", after: str = "") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(before) + textwrap.dedent(SETUP) + textwrap.dedent(after))
    return path


def started(folder: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    """Start the program as a shell would, in a folder: it can be interrupted, whatever this process ignores."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    command = [sys.executable, "-m", "accumkern", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, preexec_fn=_interruptible, **streams)


def _interruptible() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# ---- what is printed ---------------------------------------------------------------------------------------------

PRINTING = """
    import atexit, ctypes, os, sys

    C = ctypes.CDLL(None)

    def everywhere(place):
        print(f"print {place}")
        os.write(1, f"write {place}\\n".encode())
        C.printf(f"printf {place}\\n".encode())
        sys.__stdout__.write(f"__stdout__ {place}\\n")
        os.system(f'echo "process {place}"')

    everywhere(f"import {sys.argv[1:]}")
    atexit.register(everywhere, "exit")
"""
PRINTING_CALLS = """
    plain_setup, plain_batch, plain_loss = setup, make_batch, loss

    def setup():
        everywhere(f"setup {sys.argv[1:]}")
        return plain_setup()

    def make_batch(size):
        everywhere(f"batch {sys.argv[1:]}")
        return plain_batch(size)

    def loss(model, batch):
        everywhere(f"loss {sys.argv[1:]}")
        return plain_loss(model, batch)
"""


@pytest.mark.slow
def test_stdout_has_nothing_but_json_whatever_a_script_prints(tmp_path: Path) -> None:
    write(tmp_path, before=PRINTING, after=PRINTING_CALLS)
    arguments = ["train.py:setup", *PREDICT, "--json", "--", "--width", "3"]
    with (
        started(tmp_path, "plan", *arguments) as plan,
        subprocess.Popen([sys.executable, "-m", "json.tool"], stdin=plan.stdout, stdout=subprocess.PIPE) as tool,
    ):
        assert plan.stderr is not None
        err = plan.stderr.read()
        out, _ = tool.communicate(timeout=120)
    assert (plan.returncode, tool.returncode) == (0, 0), err
    assert json.loads(out)["choice"]["effective_batch"] == 64
    for way in ("print", "write", "printf", "__stdout__", "process"):
        for place in ("import", "setup", "batch", "loss"):
            assert f"{way} {place} ['--width', '3']" in err.splitlines()
        assert f"{way} exit" in err.splitlines()


def test_a_table_is_all_of_stdout_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = write(tmp_path, before=PRINTING.replace('atexit.register(everywhere, "exit")', ""), after=PRINTING_CALLS)
    assert main(["plan", f"{script}:setup", *PREDICT]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("predicted for a GPU on fake tensors\nthe plan")
    assert "loss" not in out
    assert "printf loss []" in err
    print("afterwards")
    os.write(1, b"and of C\n")
    assert capfd.readouterr().out == "afterwards\nand of C\n"


def test_a_result_is_shown_though_its_page_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "write_plan", full)
    assert main(["plan", f"{write(tmp_path)}:setup", *PREDICT, "--json", "--output", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["choice"]["effective_batch"] == 64
    assert "No space left on device" in err


# ---- the script and its arguments --------------------------------------------------------------------------------

ARGUMENTS = """
    import argparse, sys

    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.5)
    args = parser.parse_args()
"""
OWN_RATE = """
    plain = setup

    def setup():
        made = plain()
        made[1].param_groups[0]["lr"] = parser.parse_args().lr
        print("rate", made[1].param_groups[0]["lr"], "of", sys.argv[0])
        return made
"""


def test_a_script_sees_its_own_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = write(tmp_path, before=ARGUMENTS, after=OWN_RATE)
    argv, path = list(sys.argv), list(sys.path)
    assert main(["plan", f"{script}:setup", *PREDICT]) == 0
    assert f"rate 0.5 of {script}\n" in capsys.readouterr().err
    assert main(["plan", f"{script}:setup", *PREDICT, "--", "--lr", "0.25"]) == 0
    assert f"rate 0.25 of {script}\n" in capsys.readouterr().err
    assert main(["plan", f"{script}:setup", *PREDICT, "--", "--rate", "1"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "train.py: error: unrecognized arguments: --rate 1" in err
    assert "train.py raised SystemExit: 2 while it was imported; arguments of its own go after --" in err
    assert (sys.argv, sys.path) == (argv, path)
    with pytest.raises(SystemExit):
        main(["doctor", "--", "--lr", "1"])
    assert "nothing can go after --" in capsys.readouterr().err


def test_a_sweep_with_other_arguments_is_another_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = write(tmp_path, before=ARGUMENTS, after=OWN_RATE)
    command = ["sweep", f"{script}:setup", "--effective-batches", "4", "--samples", "64", "--micro-batch", "4"]
    command += ["--output", str(tmp_path / "out"), "--", "--lr"]
    assert main([*command, "1e-3"]) in (0, 1)
    assert main([*command, "1e-3"]) in (0, 1)
    capsys.readouterr()
    assert main([*command, "1e-4"]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "holds another sweep: its script_arguments is ['--lr', '1e-3'], now it is ['--lr', '1e-4']" in err


LIBRARY_NAME = """
    import dataclasses, pickle, random, sys

    @dataclasses.dataclass
    class Settings:
        width: "int" = 3

    assert pickle.loads(pickle.dumps(Settings(4))) == Settings(4)
    assert 0 <= random.random() < 1  # Python's own
    print("module", __name__)
"""


def test_a_script_named_like_a_library_hides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "neighbour_of_random.py").write_text("value = 64\n")
    before = LIBRARY_NAME + "    from neighbour_of_random import value\n"
    script = write(tmp_path, "random.py", before)
    assert main(["plan", f"{script}:setup", *PREDICT]) == 0
    assert sys.modules["random"] is random
    assert "module script_random_" in capsys.readouterr().err
    script = write(tmp_path, "of_its_own.py", before)
    for _ in range(2):
        assert main(["plan", f"{script}:setup", *PREDICT]) == 0
        assert "module of_its_own\n" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    script = write(other, "of_its_own.py", LIBRARY_NAME)  # another one of that name
    assert main(["plan", f"{script}:setup", *PREDICT]) == 0
    assert "module script_of_its_own_" in capsys.readouterr().err
    assert sys.modules["of_its_own"].__file__ == str(tmp_path / "of_its_own.py")


def test_a_library_is_found_by_a_script_of_its_name(tmp_path: Path) -> None:
    assert "pyclbr" not in sys.modules
    script = write(tmp_path, "pyclbr.py", before="from pyclbr import readmodule\n")
    try:
        assert main(["plan", f"{script}:setup", *PREDICT]) == 0
        assert sys.modules["pyclbr"].__file__ != str(script)
    finally:
        sys.modules.pop("pyclbr", None)


def test_neighbours_come_first_as_where_python_runs_a_script(tmp_path: Path) -> None:
    assert "this" not in sys.modules
    (tmp_path / "this.py").write_text("value = 3\n")
    script = write(tmp_path, "beside_this.py", before="from this import value\n")
    try:
        assert main(["plan", f"{script}:setup", *PREDICT]) == 0
        assert sys.modules["this"].value == 3
    finally:
        sys.modules.pop("this", None)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("train.py", ValueError, "such as 'train.py:setup'"),
        ("train.py:set up", ValueError, "such as 'train.py:setup'"),
        (":setup", ValueError, "such as 'train.py:setup'"),
        ("none.py:setup", FileNotFoundError, "there is no script 'none.py'"),
        ("train.py:main", AttributeError, "train.py has no 'main'; name a function that returns model, optimizer"),
        ("train.txt:setup", ValueError, "its name must end in .py"),
        ("raising.py:setup", RuntimeError, "raising.py raised KeyError: 3 while it was imported"),
    ],
)
def test_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, error: type[Exception], message: str
) -> None:
    write(tmp_path)
    write(tmp_path, "train.txt")
    write(tmp_path, "raising.py", before="raise KeyError(3)\n")
    monkeypatch.chdir(tmp_path)

    def load() -> None:
        script = Script(target)
        with script.running():
            script.load()

    with pytest.raises(error) as raised:
        load()
    assert message in str(raised.value)
    assert "raising" not in sys.modules


def test_paths_stay_where_they_were_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moving = f"import os\nos.chdir({str(elsewhere)!r})\n"
    write(tmp_path, before=moving, after="    def broken():\n        return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "train.py:setup", *PREDICT, "--output", "out"]) == 0
    assert (tmp_path / "out" / "report.html").is_file()
    assert not list(elsewhere.iterdir())
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["plan", "train.py:broken", *PREDICT]) == 2
    assert "return 1 / 0" in capsys.readouterr().err  # located by a path that was relative


# ---- files and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"runs": [', "JSONDecodeError"),
        (b"\xff\xfe\x00", "UnicodeDecodeError"),
        ("[]", "it holds a list"),
        ('{"runs": []}', "it has no "),
    ],
)
def test_a_damaged_result_beside_it_is_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes, problem: str
) -> None:
    script = write(tmp_path)
    damaged = tmp_path / "results.json"
    damaged.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["plan", f"{script}:setup", *PREDICT, "--output", str(tmp_path)]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"{str(damaged)!r} is not a result of accumkern sweep, or damaged ({problem}" in err
    assert "would fit" not in err
    damaged.rename(tmp_path / "plan.json")  # which this plan replaces
    assert main(["plan", f"{script}:setup", *PREDICT, "--output", str(tmp_path)]) == 0


SWEEP = ["sweep", "train.py:setup", "--effective-batches", "4", "--samples", "64", "--output", "out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SWEEP, "--seeds", "0,x"], "argument --seeds: 'x' is not a whole number of at least 0"),
        ([*SWEEP, "--seeds", "-1"], "argument --seeds: '-1' is not a whole number of at least 0"),
        ([*SWEEP, "--seeds", str(2**64)], f"argument --seeds: '{2**64}' is not a whole number from 0 to {2**63 - 1}"),
        ([*SWEEP, "--samples", "9" * 5000], "argument --samples: '9999999999"),
        ([*SWEEP, "--effective-batches", "4,"], "argument --effective-batches: '' is not a whole number"),
        ([*SWEEP, "--effective-batches", "0"], "argument --effective-batches: '0' is not a whole number of at least 1"),
        ([*SWEEP, "--evaluations", "1000000000000"], "--evaluations: '1000000000000' is not a whole number from 1 to"),
        ([*SWEEP, "--target-loss", "nan"], "argument --target-loss: 'nan' is not a finite number"),
        ([*SWEEP, "--rules", "sqrt,cubic"], "argument --rules: 'cubic' is not one of none, sqrt, linear"),
        (["plan", "train.py:setup", "--margin", "1.5"], "argument --margin: 1.5 is not at least 0 and less than 1"),
        (["plan", "train.py:setup", "--margin", "nan"], "argument --margin: 'nan' is not a finite number"),
        (["plan", "train.py:setup", "--effective-batch", "1.5"], "argument --effective-batch: '1.5' is not a whole"),
        (["plan", "train.py:setup", "--noise-windows", "3"], "argument --noise-windows: 3 is too few"),
        (["plan", "train.py:setup", "--memory", "24"], "argument --memory: '24'; it must be a number and a unit"),
        (["plan", "train.py:setup", "--memory", "0B"], "argument --memory: 0; it must be a positive number"),
        (["plan", "train.py:setup", "--buffer", "bf16"], "argument --buffer: 'bf16' is not one of split24, split32"),
        (
            ["plan", "train.py:setup", "--master-weights", "fp32"],
            "argument --master-weights: 'fp32' is not one of auto",
        ),
        (["plan", "train.py:setup", "--predict"], "plan: --predict needs --memory, such as --memory 24GB"),
    ],
)
def test_options_out_of_range_are_named_as_they_are_spelled(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_help_says_how(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    assert raised.value.code == 0
    out = capsys.readouterr().out
    for part in ("def setup():", "LightningModule", "examples:", "docs/batch-size.md", "memory and precision:", "130"):
        assert part in out
    assert f"accumkern {command} train.py:setup" in out
    assert out.count("default:") >= 6
    assert max(map(len, out.splitlines())) <= 120


# ---- interrupts --------------------------------------------------------------------------------------------------


def test_an_interrupt_ends_with_130_and_one_line(tmp_path: Path) -> None:
    write(tmp_path, after="    import time\n    def make_batch(size):\n        print('here')\n        time.sleep(60)\n")
    with started(tmp_path, "plan", "train.py:setup", "--effective-batch", "8") as program:
        assert program.stderr is not None
        assert program.stderr.readline() == "here\n"
        time.sleep(0.2)
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=60)
    assert program.returncode == 130
    assert out == ""
    assert err.split("\n") == ["", "accumkern plan: interrupted", ""]


def test_an_interrupted_sweep_says_that_it_can_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = write(tmp_path, after="    def make_batch(size):\n        raise KeyboardInterrupt\n")
    command = ["sweep", f"{script}:setup", "--effective-batches", "4", "--samples", "64", "--output", str(tmp_path)]
    stdout = sys.stdout
    assert main(command) == 130
    assert sys.stdout is stdout
    assert capsys.readouterr().err == "\naccumkern sweep: interrupted; the same command goes on where it was\n"
