"""A sweep that is killed goes on, and several runs at once are those one after another."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import old_objects_aside  # noqa: F401
from swept import dying, failing, regression, small

from accumkern.__main__ import main
from accumkern.planning import sweep_jobs
from accumkern.planning.sweep_runs import Run

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside")

ROOT = Path(__file__).resolve().parent.parent
needs_two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")


@pytest.mark.slow
@needs_two_cores
def test_runs_at_once_are_those_one_after_another(tmp_path: Path) -> None:
    told: list[Run] = []
    one = small(regression, tmp_path / "one", seeds=[0, 1])
    two = small(regression, tmp_path / "two", seeds=[0, 1], jobs=2, progress=told.append)
    assert [run.planned for run in two.runs] == [run.planned for run in one.runs]
    assert sorted(told, key=id) == sorted(two.runs, key=id)
    for a, b in zip(one.runs, two.runs, strict=True):
        assert [(p.samples, p.loss, p.training_loss) for p in a.points] == [
            (p.samples, p.loss, p.training_loss) for p in b.points
        ]
        assert (a.jobs, b.jobs) == (1, 2)
    files = [sorted(path.name for path in (tmp_path / name / "runs").glob("*.json")) for name in ("one", "two")]
    assert files[0] == files[1]
    assert "Seconds are of runs that shared the machine, up to 2 at once" in " ".join(two.findings)
    assert "shared the machine" not in " ".join(one.findings)
    assert small(regression, tmp_path / "two", seeds=[0, 1]) == two  # kept, whatever the jobs


@pytest.mark.slow
@needs_two_cores
def test_an_error_of_a_run_at_once_names_it_and_keeps_the_others(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"micro_batch": 16, "jobs": 2, "seeds": [0, 1, 2]}
    with pytest.raises(RuntimeError, match=r"the run of batch 16, sqrt, seed \d failed: .*StrangeError: 1 and 2"):
        small(failing, tmp_path, **arguments)
    assert all("batch-4_" in path.name for path in (tmp_path / "runs").glob("*.json"))


@needs_two_cores
def test_a_process_that_is_ended_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"a worker was ended from outside.*batch 16, sqrt, seed 0\. Look"):
        small(dying, tmp_path, micro_batch=16, jobs=2, validation_samples=8)


@needs_two_cores
def test_what_other_processes_cannot_import_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"jobs is 2, and other processes cannot import setup .*'train.py:setup'"):
        small(lambda: regression(), tmp_path, jobs=2)


@pytest.mark.parametrize(("jobs", "error"), [(0, ValueError), (10**6, ValueError), (1.0, TypeError)])
def test_a_wrong_number_of_jobs_is_named(tmp_path: Path, jobs: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="jobs is "):
        small(regression, tmp_path, jobs=jobs)


def test_workers_get_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep_jobs.shares(2, torch.device("cuda"))[1] == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7, 2")
    assert sweep_jobs.shares(3, torch.device("cuda"))[1] == ("5", "GPU-7", "2")
    with pytest.raises(ValueError, match="jobs is 4, and this process has 3 GPUs; it must be 3 at most"):
        sweep_jobs.shares(4, torch.device("cuda"))


SCRIPT = """
    import os, pathlib, sys, time
    sys.path.insert(0, {tests!r})
    from swept import regression

    def setup():
        processes = pathlib.Path({trained!r})
        processes.mkdir(exist_ok=True)
        (processes / str(os.getpid())).touch()
        made = regression()
        def loss(model, batch):
            time.sleep(0.004)
            return made.loss(model, batch)
        return made._replace(loss=loss)
"""


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=[needs_two_cores, pytest.mark.slow])])
def test_a_killed_sweep_goes_on_without_losing_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: int
) -> None:
    pytest.importorskip("matplotlib")
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(ROOT / "tests"), trained=str(tmp_path / "trained"))))
    folder = tmp_path / "out"
    arguments = ["sweep", f"{script}:setup", "--effective-batches", "4,8,16", "--samples", "256", "--micro-batch", "4"]
    arguments += ["--evaluations", "4", "--validation-samples", "16", "--seeds", "0,1", "--output", str(folder)]
    arguments += ["--jobs", str(jobs)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "accumkern", *arguments],
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 90
    while not list(folder.glob("runs/*.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert process.poll() is None, "it was done before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline and any(map(is_alive, (tmp_path / "trained").glob("*"))):
        time.sleep(0.02)  # its workers end with it
    assert not any(map(is_alive, (tmp_path / "trained").glob("*")))
    kept = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("runs/*.json")}
    assert 1 <= len(kept) < 6
    assert all(json.loads(content) for _, content in kept.values())  # none is half written
    assert main([*arguments, "--json"]) == 0
    for name, (time_ns, content) in kept.items():
        path = folder / "runs" / name
        assert (path.stat().st_mtime_ns, path.read_bytes()) == (time_ns, content)
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 6
    assert len(list(folder.glob("runs/*.json"))) == 6
    assert (folder / "report.html").is_file()


def is_alive(path: Path) -> bool:
    """Return whether the process is there whose number is a file's name."""
    try:
        state = Path("/proc", path.name, "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z" and path.name != str(os.getpid())
