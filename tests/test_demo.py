"""The demo and the training script: their numbers, what they write, and how they end when something is wrong."""

from __future__ import annotations

import ast
import importlib
import io
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
def report(demo: ModuleType) -> ModuleType:
    return importlib.import_module("demo_report")


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


STOCK, FP32, OURS = "stock_bf16", "autocast", "split24_masters"
HELD = {  # bytes per weight
    STOCK: {"weights": 2, "masters": 0, "gradients": 2, "AdamW state": 4},
    FP32: {"weights": 4, "masters": 0, "gradients": 4, "AdamW state": 8},
    OURS: {"weights": 2, "masters": 2, "gradients": 3, "AdamW state": 8},
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> tuple[dict[str, Any], Path, str]:
    output = tmp_path_factory.mktemp("output") / "made" / "here"
    done = run("demo.py", "--quick", "--text", text_folder, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return json.loads((output / "demo.json").read_text()), output, done.stdout


@pytest.mark.parametrize("key", HELD)
def test_bytes(quick: tuple[dict[str, Any], Path, str], key: str) -> None:
    size = quick[0]["designs"][key]["bytes_per_parameter"]
    assert size["held"] == pytest.approx(HELD[key], abs=0.01)
    # The most is when FP32 weights have bfloat16 copies, or when a gradient is there that is not yet added.
    more = 2 if key == FP32 else 0
    assert more < size["peak"] - sum(size["held"].values()) < more + 1


def test_loss_and_time(quick: tuple[dict[str, Any], Path, str]) -> None:
    results = quick[0]
    assert list(results["designs"]) == list(HELD)
    assert results["steps"] == 20
    losses = {key: entry["loss"] for key, entry in results["designs"].items()}
    for key, loss in losses.items():
        assert len(loss) == 20
        assert loss[0] == pytest.approx(math.log(256), rel=0.05)
        assert loss[0] == pytest.approx(losses[FP32][0], abs=0.01)  # the same weights, the same text
        assert loss[-1] < loss[0] - 1
        entry = results["designs"][key]
        assert entry["final_loss"] == pytest.approx((loss[-1] + loss[-2]) / 2)
        assert entry["ms_per_step"] > 0
        assert list(entry["time_over"]) == list(HELD)
        for low, median, high in entry["time_over"].values():
            assert 0 < low <= median <= high
        assert entry["time_over"][key] == [1, 1, 1]
    assert losses[OURS] == pytest.approx(losses[FP32], abs=0.05)


def test_small_updates_reach_master_weights_alone(quick: tuple[dict[str, Any], Path, str]) -> None:
    unmoved = {key: entry["unmoved"] for key, entry in quick[0]["designs"].items()}
    assert {len(shares) for shares in unmoved.values()} == {10}
    assert unmoved[STOCK][-1] > 0.9  # the learning rate has fallen
    assert unmoved[STOCK][-1] > unmoved[STOCK][2]
    for key in (FP32, OURS):
        assert unmoved[key][-1] < 0.1  # bytes that the text has not


def test_what_is_shown_and_written(
    quick: tuple[dict[str, Any], Path, str], demo: ModuleType, report: ModuleType
) -> None:
    from matplotlib.image import imread

    results, output, shown = quick
    for label in demo.LABELS.values():
        assert label in shown
    for line in report.findings(results):
        assert line in " ".join(shown.split())
    assert "loss, steps 1 to 4: stock bf16 " in shown
    assert "\x1b" not in shown  # a log gets no progress bar and no colours
    assert "\r" not in shown
    assert len(shown.splitlines()) < 40
    assert all(len(line) <= 110 for line in shown.splitlines()[:-1])  # the last names two paths
    picture = imread(output / "demo.png")
    assert picture.shape[0] > 600
    assert picture.shape[1] > 1000
    assert len({tuple(color) for color in picture[::5, ::5].reshape(-1, 4).tolist()}) > 50
    assert results["versions"]["torch"] == torch.__version__
    assert results["options"]["micro_batches"] == 4
    assert f"{os.cpu_count()} cores" in results["machine"]
    assert sorted(file.name for file in output.iterdir()) == ["demo.json", "demo.png"]


# ---- parts of it -------------------------------------------------------------------------------------------------


@pytest.fixture
def small(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, text_folder: Path, tmp_path: Path) -> list[str]:
    """Make the model for memory small and the program quiet about threads; return the options of a run."""
    monkeypatch.setattr(demo, "MEMORY_MODEL", {"width": 16, "layers": 1, "heads": 1})
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return ["demo.py", "--text", str(text_folder), "--output", str(tmp_path)]


def test_the_time_limit(
    demo: ModuleType, small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*small, "--steps", "30", "--time-limit", "0.001"])
    demo.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "Training ended after 1 of 30 steps, for --time-limit 0.001." in shown
    assert "did not change" not in shown  # no tenth of the training is over


def test_the_learning_rate_rises_and_falls_to_zero(
    demo: ModuleType, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*small, "--steps", "40", "--lr", "0.5"])
    args, text = demo.parse_arguments()
    monkeypatch.setattr(demo, "GPT", lambda: torch.nn.Linear(1, 1))
    monkeypatch.setattr(demo, "run_micro_batches", lambda design, batches, numbers: ([torch.ones(())], []))
    training = demo.Training(demo.StockBF16, args)
    rates = []
    for _ in range(40):
        rates.append(training.design.optimizer.param_groups[0]["lr"])
        training.step([text])
    assert rates[0] == 0.25
    assert max(rates) == rates[1] == pytest.approx(0.5, rel=0.01)
    assert rates[20] == pytest.approx(0.25)
    assert rates[-1] < 0.001
    assert rates[1:] == sorted(rates[1:], reverse=True)


@pytest.fixture
def results() -> dict[str, Any]:
    """What a run of 200 steps might find; the last 20 are the end."""
    made: dict[str, Any] = {"steps": 200, "parameters": 1000, "machine": "a machine", "versions": {"torch": "2.13.0"}}
    made["options"] = {"micro_batches": 4, "lr": 2e-4, "steps": 400}
    made["designs"] = {
        key: {
            "label": label,
            "final_loss": loss,
            "loss": [5.0] * 20 + [loss] * 180,
            "unmoved": [0.5, share],
            "bytes_per_parameter": {"held": dict(HELD[key]), "peak": peak, "of_parameters": 1000},
            "time_over": {STOCK: [ratio - 0.1, ratio, ratio + 0.1], FP32: [0.9, ratio / 1.1, 1.2]},
        }
        for key, label, loss, share, peak, ratio in [
            (STOCK, "stock bf16", 2.5, 0.98, 8.5, 1.0),
            (FP32, "FP32 + autocast", 2.25, 0.0, 20.0, 1.1),
            (OURS, "accumkern", 2.25, 0.01, 16.0, 1.21),
        ]
    }
    return made


def test_findings(results: dict[str, Any], report: ModuleType) -> None:
    assert report.findings(results) == [
        "The loss of stock bf16 ends 0.2500 above that of accumkern: above it in 20 of the last 20 steps.",
        "The losses of FP32 + autocast and accumkern end less than 0.0001 apart.",
        "In steps 41 to 80, 98% of the weights of stock bf16 did not change at all, with FP32 + autocast 0%, "
        "of the masters of accumkern 1%. bfloat16 cannot hold so small updates.",
        "accumkern holds 6.2 % less memory than FP32 + autocast (at the peak 20.0 % less), and 87.5 % more than "
        "stock bf16.",
        "accumkern takes 10.0 % more time for a step than FP32 + autocast (half of the steps: 10.0 % less to 20.0 % "
        "more), and 21.0 % more than stock bf16.",
    ]


def test_findings_follow_the_losses(results: dict[str, Any], report: ModuleType) -> None:
    stock, fp32, ours = results["designs"].values()
    stock["loss"][-20:] = [2.0] * 20
    stock["final_loss"] = 2.0
    fp32["loss"][-20:] = [2.2, 2.4] * 10
    fp32["final_loss"] = 2.3
    ours["unmoved"] = [0.6]
    stock_line, fp32_line, unmoved, *_ = report.findings(results)
    assert stock_line.endswith("ends 0.2500 below that of accumkern: below it in 20 of the last 20 steps.")
    assert fp32_line.endswith("ends 0.0500 above that of accumkern: no clear difference, above it in 10 of the last 20 "
                              "steps.")  # fmt: skip
    assert unmoved.endswith("of the masters of accumkern 60%.")
    results["steps"] = 50
    assert all(line.endswith("after so few steps that says nothing.") for line in report.findings(results)[:2])
    for entry in results["designs"].values():
        entry["unmoved"] = []
    assert "did not change" not in " ".join(report.findings(results))


def test_findings_follow_bytes_and_time(results: dict[str, Any], report: ModuleType) -> None:
    ours = results["designs"][OURS]
    ours["bytes_per_parameter"]["held"]["gradients"] += 17
    ours["bytes_per_parameter"]["peak"] = 40
    ours["time_over"] = {STOCK: [0.4, 0.5, 0.6], FP32: [0.1, 0.25, 0.4]}
    memory, milliseconds = report.findings(results)[-2:]
    assert "100.0 % more memory than FP32 + autocast (at the peak 100.0 % more), and 300.0 % more" in memory
    assert "75.0 % less time for a step than FP32 + autocast (half of the steps: 90.0 % less to 60.0" in milliseconds
    assert milliseconds.endswith("and 50.0 % less than stock bf16.")


def test_the_table_follows_the_numbers(results: dict[str, Any], report: ModuleType) -> None:
    from rich.console import Console

    console = Console(width=100, file=io.StringIO())
    console.print(report.table(results))
    rows = [" ".join(line.split()) for line in console.file.getvalue().splitlines() if line.strip()]
    assert rows[-3:] == [
        "stock bf16 2.5000 8.0 8.5 1.00",
        "FP32 + autocast 2.2500 16.0 20.0 1.10",
        "accumkern 2.2500 15.0 16.0 1.21",
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 2, 200])
def test_the_figure(results: dict[str, Any], report: ModuleType, steps: int) -> None:
    results["steps"] = steps
    for entry in results["designs"].values():
        entry["loss"] = entry["loss"][-steps:]
    picture = report.figure(results)
    picture.draw_without_rendering()
    losses, sizes = picture.axes
    assert [line.get_label() for line in losses.lines] == [
        "stock bf16: 2.500 at the end",
        "FP32 + autocast: 2.250 at the end",
        "accumkern: 2.250 at the end",
    ]
    assert [line.get_ydata()[-1] for line in losses.lines] == [2.5, 2.25, 2.25]
    assert len({(line.get_linestyle(), line.get_linewidth()) for line in losses.lines}) == 3  # told apart in grey
    low, high = losses.get_ylim()
    assert low < 2.25 < 2.5 <= high
    tops = [max(bar.get_y() + bar.get_height() for bar in bars) for bars in zip(*sizes.containers, strict=True)]
    assert tops == pytest.approx([sum(HELD[key].values()) for key in HELD])


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


@pytest.mark.parametrize("key", ["stock_bf16", "stock_fp32", "stock_fp32_masters", "split24", "split32_masters"])
def test_errors_are_against_the_fp64_sum_of_the_micro_gradients(
    demo: ModuleType, measure: ModuleType, key: str
) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return demo.GPT(width=32, layers=1, heads=2).to(torch.bfloat16)

    generator = torch.Generator().manual_seed(1)
    text = torch.randint(256, (1000,), dtype=torch.uint8, generator=generator)
    batches = [demo.random_batch(text, 1, generator) for _ in range(16)]
    reference = model()
    expected = [torch.zeros_like(param, dtype=torch.float64) for param in reference.parameters()]
    for batch in batches:
        grads = torch.autograd.grad(reference(batch) / 16, list(reference.parameters()))
        for total, grad in zip(expected, grads, strict=True):
            total += grad
    errors, truths = measure.measure_error(importlib.import_module("designs").DESIGNS[key](model()), batches, 16)
    assert all(map(torch.equal, truths, expected))
    # Every addition rounds to 8 bits, to 16 or to 24; AdamW reads a sum of bfloat16, or one rounded to it once.
    low, high = {"stock_bf16": (1e-3, 2e-2), "split24": (1e-8, 1e-4)}.get(key, (0, 2**-24))
    assert low <= errors["sum"] < high
    if key in ("stock_bf16", "stock_fp32_masters", "split32_masters"):
        assert errors["optimizer"] == errors["sum"]
    else:
        assert 2**-12 < errors["optimizer"] < 2**-9


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
    code = f"import sys; sys.modules[{package!r}] = None; import demo"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=EXAMPLES, env=environment()
    )
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
