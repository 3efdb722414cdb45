"""The demo and the training script: their numbers, what they write, and how they end when something is wrong."""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SENTENCE = "The quick brown fox jumps over the lazy dog, and %d times back again.\n"


@pytest.fixture(scope="module")
def demo() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("demo")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def measure(demo: ModuleType) -> ModuleType:
    return importlib.import_module("measure")


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "chapters").mkdir()
    (folder / "chapters" / "one.txt").write_text("".join(SENTENCE % i for i in range(300)))
    (folder / "two.md").write_text("".join(SENTENCE % i for i in range(300, 400)))
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\0\0" * 1000)
    (folder / ".hidden").write_text("hidden " * 1000)
    (folder / "empty.txt").write_text("")
    return folder


def run(script: str, *options: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), **more)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}


# ---- a whole run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> tuple[dict[str, Any], Path, str]:
    output = tmp_path_factory.mktemp("output") / "made" / "here"
    done = run("demo.py", "--quick", "--steps", 3, "--text", text_folder, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return json.loads((output / "demo.json").read_text()), output, done.stdout


@pytest.mark.slow
def test_errors_of_the_designs(quick: tuple[dict[str, Any], Path, str]) -> None:
    errors = {key: entry["relative_error"] for key, entry in quick[0]["designs"].items()}
    assert quick[0]["same_micro_gradients"]
    # 16 micro-batches: every addition in bfloat16 rounds to 8 bits, in split24 to 16 bits.
    assert 1e-3 < errors["stock_bf16"]["sum"] < 2e-2
    assert 1e-8 < errors["split24"]["sum"] < errors["stock_bf16"]["sum"] / 256
    assert errors["split32"]["sum"] < 2**-24
    for key in ("stock_fp32", "stock_fp32_masters"):
        assert errors[key]["by_micro_batches"] == errors["split32"]["by_micro_batches"]
    # AdamW reads the sum rounded to bfloat16 once, at most 2^-9 of each element, or rounded at every addition.
    assert errors["stock_bf16"]["optimizer"] == errors["stock_bf16"]["sum"]
    assert errors["stock_fp32_masters"]["optimizer"] == errors["stock_fp32_masters"]["sum"]
    for key in ("stock_fp32", "split24", "split32"):
        assert errors[key]["optimizer"] < 2**-9
        assert errors[key]["optimizer"] == pytest.approx(errors["stock_fp32"]["optimizer"], rel=1e-3)
    assert list(errors["split24"]["by_micro_batches"]) == ["2", "4", "8", "16", "32", "64"]


@pytest.mark.parametrize(
    ("key", "held", "in_step"),
    [
        ("stock_bf16", 2, 2),
        ("stock_fp32", 4, 6),
        ("stock_fp32_masters", 4, 4),
        ("split24", 3, 3),
        ("split32", 4, 4),
    ],
)
def test_gradient_bytes(quick: tuple[dict[str, Any], Path, str], key: str, held: int, in_step: int) -> None:
    size = quick[0]["designs"][key]["gradient_bytes_per_parameter"]
    assert size["held"] == pytest.approx(held, abs=0.01)
    assert size["in_step"] == pytest.approx(in_step, abs=0.01)
    assert held - 0.01 <= size["peak"] <= held + 0.5


def test_loss_and_time(quick: tuple[dict[str, Any], Path, str]) -> None:
    results = quick[0]
    assert results["steps"] == 3
    for entry in results["designs"].values():
        assert len(entry["loss"]) == 3
        assert entry["loss"][0] == pytest.approx(math.log(256), rel=0.05)
        assert entry["loss"][0] == results["designs"]["stock_fp32"]["loss"][0]  # the same weights, the same text
        assert entry["loss"][2] < entry["loss"][0] - 0.5
        assert entry["loss"][2] == pytest.approx(results["designs"]["stock_fp32"]["loss"][2], abs=0.05)
        assert 0 < entry["ms_per_micro_batch"]["median"] <= entry["ms_per_micro_batch"]["p90"]
        assert len(entry["ms_per_micro_batch"]["over"]) == len(results["designs"])
        for low, median, high in entry["ms_per_micro_batch"]["over"].values():
            assert 0 < low <= median <= high
    for key, entry in results["designs"].items():
        assert entry["ms_per_micro_batch"]["over"][key] == [1, 1, 1]


def test_what_is_shown_and_written(quick: tuple[dict[str, Any], Path, str], demo: ModuleType) -> None:
    from matplotlib.image import imread

    results, output, shown = quick
    for design in demo.DESIGNS:
        assert design.label in shown
    for line in demo.findings(results):
        assert line in " ".join(shown.split())
    assert "\x1b" not in shown  # a log gets no progress bar and no colours
    assert "\r" not in shown
    assert len(shown.splitlines()) < 60
    assert all(len(line) <= 110 for line in shown.splitlines()[:-1])  # the last names two paths
    picture = imread(output / "demo.png")
    assert picture.shape[0] > 600
    assert picture.shape[1] > 1000
    assert len({tuple(color) for color in picture[::5, ::5].reshape(-1, 4).tolist()}) > 50
    assert results["versions"]["torch"] == torch.__version__
    assert results["options"]["micro_batches"] == 16
    assert results["machine"]["cpu"]
    assert sorted(file.name for file in output.iterdir()) == ["demo.json", "demo.png"]


def test_findings_follow_the_numbers(quick: tuple[dict[str, Any], Path, str], demo: ModuleType) -> None:
    results = json.loads(json.dumps(quick[0]))
    errors = {key: entry["relative_error"] for key, entry in results["designs"].items()}
    errors["split24"]["sum"] = 10 * errors["stock_bf16"]["sum"]
    results["designs"]["split24"]["final_loss"] += 5
    errors["split32"]["by_micro_batches"]["2"] += 1e-9  # it may be exactly zero
    results["same_micro_gradients"] = False
    said = " ".join(demo.findings(results))
    assert "accumkern split24 is 10 times farther off" in said
    assert "more than the" in said
    assert "to the last digit" not in said
    assert "The micro-gradients differed" in said


@pytest.mark.parametrize(
    ("stock", "split24", "said"),
    [
        (0.0, 0.0, "as close"),
        (0.5, 0.0, "infinitely many times closer"),
        (0.0, 0.5, "infinitely many times farther off"),
        (0.5, 0.25, "2.0 times closer"),
    ],
)
def test_findings_where_an_error_is_zero(
    quick: tuple[dict[str, Any], Path, str], demo: ModuleType, stock: float, split24: float, said: str
) -> None:
    results = json.loads(json.dumps(quick[0]))
    for key, error in (("stock_bf16", stock), ("split24", split24)):
        results["designs"][key]["relative_error"] |= {"sum": error, "optimizer": error}
    assert f"split24 is {said} to the FP64 sum, and what AdamW reads is {said}." in demo.findings(results)[0]


@pytest.mark.filterwarnings("error")
def test_a_figure_where_every_error_is_zero(quick: tuple[dict[str, Any], Path, str], demo: ModuleType) -> None:
    results = json.loads(json.dumps(quick[0]))
    for entry in results["designs"].values():
        entry["relative_error"] |= {"sum": 0.0, "optimizer": 0.0}
    demo.figure(results).draw_without_rendering()


# ---- the measuring tools -----------------------------------------------------------------------------------------


def test_allocator_meter(measure: ModuleType) -> None:
    before = torch.empty(7000, dtype=torch.uint8)
    with measure.AllocatorMeter(torch.device("cpu")) as meter:
        kept = torch.empty(1000, dtype=torch.uint8)
        dropped = torch.empty(5000, dtype=torch.uint8)
        del dropped
        meter.mark()
        after = torch.empty(3000, dtype=torch.uint8)
        del kept, after
    assert len(before) == 7000
    assert meter.held_bytes == [1000]
    assert meter.peak_bytes == [6000, 4000]


def test_relative_error(measure: ModuleType) -> None:
    truths = [torch.tensor([3.0, 0.0], dtype=torch.float64), torch.tensor([[4.0]], dtype=torch.float64)]
    tensors = [torch.tensor([3.0, 0.5]), torch.tensor([[4.0]], dtype=torch.bfloat16)]
    assert measure.relative_error(tensors, truths) == pytest.approx(0.1)


def test_truth_is_the_fp64_sum_of_the_micro_gradients(demo: ModuleType) -> None:
    cpu = torch.device("cpu")
    text = torch.randint(256, (1000,), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1)
    batches = [demo.random_batch(text, 1, generator) for _ in range(3)]
    model = demo.new_model(cpu, 0)
    expected = [torch.zeros_like(param, dtype=torch.float64) for param in model.parameters()]
    for batch in batches:
        for total, grad in zip(expected, torch.autograd.grad(model(batch) / 2, list(model.parameters())), strict=True):
            total += grad
    for design_type in demo.DESIGNS:
        _, truths = demo.measure_error(design_type(demo.new_model(cpu, 0)), batches, 2)
        assert all(torch.equal(a, b) for a, b in zip(truths, expected, strict=True)), design_type.key


# ---- the text ----------------------------------------------------------------------------------------------------


def test_read_text(demo: ModuleType, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (text_folder / name for name in ("chapters/one.txt", "two.md"))
    assert bytes(demo.read_text(str(text_folder)).tolist()) == two.read_bytes() + one.read_bytes()
    assert bytes(demo.read_text(str(one)).tolist()) == one.read_bytes()
    standard_library = demo.read_text("")
    assert len(standard_library) > 2**20
    assert torch.equal(standard_library, demo.read_text())
    monkeypatch.setattr(sys.modules["train_gpt"], "MAX_TEXT_BYTES", 10_000)
    assert len(demo.read_text(str(text_folder))) == 10_000


# ---- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--text", "{tmp}/nowhere"], "--text: there is no file or folder '{tmp}/nowhere'", id="no folder"),
        pytest.param(["--text", "{tmp}/empty.txt"], "'{tmp}/empty.txt' is empty or holds no text", id="empty file"),
        pytest.param(["--text", "{tmp}/hollow"], "'{tmp}/hollow' is empty or holds no text", id="empty folder"),
        pytest.param(["--text", "{tmp}/binary"], "'{tmp}/binary' is empty or holds no text", id="binary file"),
        pytest.param(["--text", "{tmp}/short.txt"], "holds only 5 bytes of text; at least 65 are needed", id="short"),
        pytest.param(["--text", "{tmp}/long.txt", "--output", "{tmp}/empty.txt"], "cannot write into", id="output"),
        pytest.param(["--device", "toaster"], "--device 'toaster' cannot be used", id="no such device"),
        pytest.param(["--device", "meta"], "it must be cpu or cuda", id="wrong device"),
        pytest.param(["--steps", "0"], "--steps: invalid positive whole number value: '0'", id="no steps"),
        pytest.param(["--time-limit", "nan"], "--time-limit: invalid positive number value: 'nan'", id="no time"),
    ],
)
def test_bad_arguments(
    options: list[str],
    message: str,
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary").write_bytes(b"\0" * 1000)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "long.txt").write_text("long " * 1000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", *(option.format(tmp=tmp_path) for option in options)])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err


def test_a_missing_folder_ends_the_program(tmp_path: Path) -> None:
    done = run("demo.py", "--text", tmp_path / "nowhere", "--output", tmp_path / "output")
    assert done.returncode == 2
    assert f"there is no file or folder '{tmp_path}/nowhere'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_package(package: str) -> None:
    code = f"import sys, runpy; sys.modules[{package!r}] = None; runpy.run_path({str(EXAMPLES / 'demo.py')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith(f"demo: {package}")
    assert "pip install accumkern[demo]" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c(text_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-u", str(EXAMPLES / "demo.py"), "--text", str(text_folder), "--output", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("Training a GPT")
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == "\ndemo: stopped by Ctrl-C\n"
    assert list(tmp_path.iterdir()) == []


# ---- the script that a user copies -------------------------------------------------------------------------------


def test_the_training_script(text_folder: Path) -> None:
    done = run("train_gpt.py", "--text", text_folder, "--steps", 3, "--micro-batches", 4)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["1", "2", "3"]
    assert float(lines[2].split()[-1]) < float(lines[0].split()[-1])


def test_the_training_script_needs_one_line_of_accumkern() -> None:
    tree = ast.parse((EXAMPLES / "train_gpt.py").read_text())
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "accumkern"]
    assert len(used) == 1
