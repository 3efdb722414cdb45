"""A sweep that begins at a checkpoint: what it finds there, and what is refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import old_objects_aside  # noqa: F401
from swept import adam, decaying, regression, seen_groups, short, small  # noqa: F401
from torch import nn

from accumkern.__main__ import main
from accumkern.planning.checkpoint import Checkpoint
from accumkern.planning.protocol import Setup
from accumkern.planning.sweep_settings import VALIDATION_SEED
from accumkern.planning.sweep_training import seeded_setup

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside")

ROOT = Path(__file__).resolve().parent.parent


def trained(function: Callable[[], Setup]) -> Setup:
    """Return a setup after some steps, and with a learning rate that a schedule has brought down."""
    setup = seeded_setup(function, 11)
    for _ in range(5):
        setup.loss(setup.model, setup.make_batch(4)).backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    for group in setup.optimizer.param_groups:
        group["lr"] /= 4
    return setup


SAVED: dict[str, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "plain": lambda model, optimizer: {"model": model, "optimizer": optimizer, "step": 5},
    "tutorial": lambda model, optimizer: {"epoch": 1, "model_state_dict": model, "optimizer_state_dict": optimizer},
    "lightning": lambda model, optimizer: {
        "state_dict": {f"model.{key}": value for key, value in model.items()},
        "optimizer_states": [optimizer],
    },
    "compiled, ddp": lambda model, optimizer: {
        "model": {f"_orig_mod.module.{key}": value for key, value in model.items()},
        "optimizer": optimizer,
    },
}


@pytest.mark.parametrize("form", SAVED)
def test_every_run_begins_at_the_checkpoint(tmp_path: Path, form: str, groups: list[dict[str, Any]]) -> None:
    at = trained(adam)
    path = tmp_path / "checkpoint.pt"
    torch.save(SAVED[form](at.model.state_dict(), at.optimizer.state_dict()), path)
    result = small(adam, tmp_path / "out", start=path, seeds=[0, 1])
    made = seeded_setup(adam, VALIDATION_SEED)
    validation = [made.make_batch(4) for _ in range(8)]
    loss = sum(at.loss(at.model, batch).item() for batch in validation) / 8
    assert [run.points[0].loss for run in result.runs] == [pytest.approx(loss)] * 4
    assert [group["lr"] for group in groups] == [0.0025, 0.005] * 2  # the schedule's, times sqrt(16 / 4)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert result.start_sha256 == digest
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["start_sha256"] == digest
    text = " ".join(result.findings)
    assert "The learning rate of the checkpoint, 0.0025, is taken to be for the base batch, 4" in text
    assert "The 2 seeds had the same initial weights (all runs begin with those of the checkpoint)" in text
    assert small(adam, tmp_path / "out", start=str(path), seeds=[0, 1]) == result


def test_a_run_goes_on_with_the_state_of_the_optimizer(tmp_path: Path) -> None:
    at = trained(adam)
    torch.save({"model": at.model.state_dict(), "optimizer": at.optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    result = small(adam, tmp_path / "out", start=tmp_path / "checkpoint.pt")
    made = seeded_setup(adam, VALIDATION_SEED)
    validation = [made.make_batch(4) for _ in range(8)]
    batches = seeded_setup(adam, 0)
    for _ in range(16):
        at.loss(at.model, batches.make_batch(4)).backward()
        at.optimizer.step()
        at.optimizer.zero_grad()
    loss = sum(at.loss(at.model, batch).item() for batch in validation) / 8
    assert result.runs[0].points[-1].loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("master_weights", ["split32", None])
def test_states_of_a_checkpoint_stay_in_fp32_with_masters(tmp_path: Path, master_weights: str | None) -> None:
    setup = short()
    optimizer = torch.optim.Adam(setup.model.parameters())
    moments = torch.randn(1, 8)
    state = {"step": torch.tensor(3.0), "exp_avg": moments, "exp_avg_sq": moments**2}
    saved = {"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]}
    torch.save({"model": setup.model.state_dict(), "optimizer": saved}, tmp_path / "checkpoint.pt")
    Checkpoint(tmp_path / "checkpoint.pt").load(setup._replace(optimizer=optimizer), master_weights)
    found = optimizer.state[setup.model.weight]["exp_avg"]  # type: ignore[index]
    assert found.dtype is (torch.bfloat16 if master_weights is None else torch.float32)
    assert torch.equal(found, moments.to(found.dtype))
    assert found.data_ptr() != moments.data_ptr()


def test_training_leaves_a_checkpoint_as_it_was(tmp_path: Path) -> None:
    at = trained(adam)
    torch.save({"model": at.model.state_dict(), "optimizer": at.optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt")
    for _ in range(2):
        setup = adam()
        checkpoint.load(setup)
        assert torch.equal(setup.model.weight, at.model.weight)
        assert setup.optimizer.param_groups[0]["lr"] == at.optimizer.param_groups[0]["lr"]
        for name, value in at.optimizer.state[at.model.weight].items():  # type: ignore[index]
            assert torch.equal(setup.optimizer.state[setup.model.weight][name], value)  # type: ignore[index]
        setup.loss(setup.model, setup.make_batch(4)).backward()
        setup.optimizer.step()


def test_another_checkpoint_makes_another_sweep(tmp_path: Path) -> None:
    for name in "ab":
        at = trained(regression) if name == "a" else regression()
        torch.save({"model": at.model.state_dict(), "optimizer": at.optimizer.state_dict()}, tmp_path / name)
    small(regression, tmp_path / "out", start=tmp_path / "a")
    with pytest.raises(ValueError, match="holds another sweep: its start_sha256 is '"):
        small(regression, tmp_path / "out", start=tmp_path / "b")
    with pytest.raises(ValueError, match=r"holds another sweep: its start_sha256 is '.*now it is None"):
        small(regression, tmp_path / "out")


@pytest.mark.parametrize(
    ("saved", "error", "message"),
    [
        ({"weights": {}, "opt": {}, "epoch": 1}, ValueError, "whose keys are 'weights', 'opt', 'epoch'; there is no"),
        ({"model": {}, "epoch": 1}, ValueError, "whose keys are 'model', 'epoch'; there is no state of a model and"),
        ({"state_dict": {}, "optimizer_states": [{}, {}]}, ValueError, "one optimizer under names that are known: sa"),
        ([1], ValueError, "which holds a list; save a dictionary with the state dicts"),
        (nn.Linear(1, 1), ValueError, r"which torch.load\(weights_only=True\) does not load: .*tensors and plain data"),
        (b"no checkpoint", ValueError, "does not load"),
        (None, FileNotFoundError, "and there is no such file"),
        ("other model", ValueError, r"whose model is not that of setup\(\): .*Missing key"),
        ("other optimizer", ValueError, r"whose optimizer is not that of setup\(\): ValueError"),
    ],
)
def test_a_wrong_checkpoint_is_named(tmp_path: Path, saved: Any, error: type[Exception], message: str) -> None:
    path, made = tmp_path / "checkpoint.pt", regression()
    optimizer = made.optimizer.state_dict()
    if saved == "other model":
        saved = {"model": nn.Sequential(made.model, nn.Linear(1, 1)).state_dict(), "optimizer": optimizer}
    elif saved == "other optimizer":
        saved = {"model": made.model.state_dict(), "optimizer": optimizer | {"param_groups": []}}
    if isinstance(saved, bytes):
        path.write_bytes(saved)
    elif saved is not None:
        torch.save(saved, path)
    with pytest.raises(error, match=f"(?s)start is .*checkpoint.pt', .*{message}"):
        small(regression, tmp_path / "out", start=path)
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_the_command_shows_weight_decay_and_the_critical_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nfrom swept import decaying as setup\n")
    at = trained(decaying)
    torch.save({"model": at.model.state_dict(), "optimizer": at.optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    command = ["sweep", f"{script}:setup", "--effective-batches", "4,16", "--samples", "128", "--micro-batch", "4"]
    command += ["--weight-decay", "none,timescale", "--from", str(tmp_path / "checkpoint.pt")]
    command += ["--validation-samples", "16", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    out, told = capsys.readouterr()
    assert "timescale" in out
    assert "weight" in out
    assert "batch 16, sqrt, weight decay timescale, seed 0: finished" in told
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<th>weight decay</th>" in page
    assert "<td>0.2 (timescale)</td>" in page
    assert "Critical batch from the checkpoint on: " in page
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["weight_decay_rule"] for row in results["rows"]] == ["none", "none", "timescale"]
    assert results["start_sha256"] == hashlib.sha256((tmp_path / "checkpoint.pt").read_bytes()).hexdigest()
    assert results["critical_batch"]["comparisons"][1]["rules"].startswith("sqrt")
    assert "weight_decay_rule,weight_decay" in (tmp_path / "out" / "results.csv").read_text()
    assert main([*command[:-1], str(tmp_path / "other"), "--from", str(tmp_path / "gone.pt")]) == 2
    assert "gone.pt', and there is no such file" in " ".join(capsys.readouterr().err.split())
