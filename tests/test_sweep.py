"""The sweep: equal samples, scaled settings, results that are never lost, and what is made of them."""

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import old_objects_aside  # noqa: F401
from torch import Tensor, nn

import accumkern
from accumkern.__main__ import main
from accumkern.planning import sweep as sweep_module
from accumkern.planning import sweep_jobs, sweep_training
from accumkern.planning.checkpoint import Checkpoint
from accumkern.planning.protocol import Setup
from accumkern.planning.sweep_result import Sweep
from accumkern.planning.sweep_runs import Point, Run, write_json
from accumkern.planning.sweep_settings import VALIDATION_SEED
from accumkern.planning.sweep_training import seeded_setup

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside")

ROOT = Path(__file__).resolve().parent.parent
TRUTH = torch.linspace(-1, 1, 8)
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")


def regression(learning_rate: float = 0.05, **fields: Any) -> Setup:
    """Linear regression with noise: it learns at once, and diverges with a large learning rate."""
    model = nn.Linear(8, 1, bias=False)

    def make(size: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 8)
        return x, x @ TRUTH + 0.1 * torch.randn(size)

    setup = Setup(
        model,
        torch.optim.SGD(model.parameters(), lr=learning_rate),
        make,
        lambda model, batch: (model(batch[0])[:, 0] - batch[1]).square().mean(),
    )
    return setup._replace(**fields)


def adam() -> Setup:
    setup = regression()
    return setup._replace(optimizer=torch.optim.Adam(setup.model.parameters(), lr=0.01, betas=(0.9, 0.99)))


def small(setup: Callable[[], Any], folder: Path, **arguments: Any) -> Sweep:
    defaults: dict[str, Any] = {"micro_batch": 4, "evaluations": 4, "validation_samples": 32}
    return accumkern.sweep(setup, [4, 16], 64, folder, **(defaults | arguments))


def test_every_run_trains_with_as_many_samples(tmp_path: Path) -> None:
    told: list[Run] = []
    result = small(regression, tmp_path, rules=["sqrt", "linear"], seeds=[0, 1], progress=told.append)
    assert [(run.effective_batch, run.rule, run.seed) for run in result.runs] == [
        (4, "sqrt", 0),  # the base batch: all rules are one
        (16, "sqrt", 0),
        (16, "linear", 0),
        (4, "sqrt", 1),
        (16, "sqrt", 1),
        (16, "linear", 1),
    ]
    assert told == list(result.runs)
    for run in result.runs:
        assert run.status == "finished"
        assert run.steps * run.effective_batch == 64
        assert run.micro_batch * run.accumulation_steps == run.effective_batch
        assert [point.samples for point in run.points] == [0, 16, 32, 48, 64]
        assert [point.seconds for point in run.points] == sorted(point.seconds for point in run.points)
        assert run.points[-1].seconds == run.seconds
        assert run.points[-1].loss < run.points[0].loss
        assert run.peak_bytes > 0
    assert result.runs[0].points != result.runs[3].points  # seeds
    assert {run.learning_rate for run in result.runs} == {0.05, 0.1, 0.2}


def by_hand(function: Callable[[], Setup]) -> tuple[Setup, list[Any]]:
    """Return a setup with seed 0 and a quarter of the base batch, and the validation batches."""
    made = seeded_setup(function, VALIDATION_SEED)
    validation = [made.make_batch(4) for _ in range(8)]
    setup = seeded_setup(function, 0)
    setup.optimizer.param_groups[0]["lr"] /= 2  # sqrt(4 / 16)
    return setup, validation


def test_a_run_is_what_training_by_hand_gives(tmp_path: Path) -> None:
    result = small(regression, tmp_path, base_batch=16)
    setup, validation = by_hand(regression)
    losses = []
    for step in range(16):
        loss = setup.loss(setup.model, setup.make_batch(4))
        losses.append(loss.item())
        loss.backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        if (step + 1) % 4 == 0:
            point = result.runs[0].points[(step + 1) // 4]
            on_validation = sum(setup.loss(setup.model, batch).item() for batch in validation) / 8
            assert point.loss == pytest.approx(on_validation, rel=1e-6)
            assert point.training_loss == pytest.approx(sum(losses[-4:]) / 4, rel=1e-6)


def short(**fields: Any) -> Setup:
    """Return the regression in bfloat16."""
    setup = regression()
    setup.model.to(torch.bfloat16)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0].bfloat16())[:, 0].float() - batch[1]).square().mean()

    optimizer = torch.optim.SGD(setup.model.parameters(), lr=1e-3)
    return setup._replace(**({"optimizer": optimizer, "loss": loss} | fields))


def refused() -> Setup:
    setup = short()
    group = {"params": list(setup.model.parameters()), "gradient_release": True}
    return setup._replace(optimizer=torch.optim.SGD([group], lr=1e-3))


@pytest.mark.parametrize("master_weights", ["auto", "split24", None])
def test_runs_step_master_weights(tmp_path: Path, master_weights: str | None) -> None:
    result = small(short, tmp_path, base_batch=16, master_weights=master_weights)
    name = "split32" if master_weights == "auto" else master_weights
    assert (result.master_weights, result.master_problem) == (name, None)
    assert json.loads((tmp_path / "sweep.json").read_text())["master_weights"] == name
    text = " ".join(result.findings)
    assert (f"All runs stepped FP32 master weights: attach with master_weights={name!r}." in text) == (name is not None)
    setup, validation = by_hand(short)
    accumkern.attach(setup.optimizer, master_weights=name)  # one micro-batch is a window
    for _ in range(16):
        setup.loss(setup.model, setup.make_batch(4)).backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    loss = sum(setup.loss(setup.model, batch).item() for batch in validation) / 8
    assert result.runs[0].accumulation_steps == 1
    assert result.runs[0].points[-1].loss == pytest.approx(loss, rel=1e-6)


def test_master_weights_make_another_sweep(tmp_path: Path) -> None:
    small(short, tmp_path)
    with pytest.raises(ValueError, match="its master_weights is 'split32', now it is None; choose another"):
        small(short, tmp_path, master_weights=None)
    assert small(short, tmp_path, master_weights="split32") == small(short, tmp_path)


def test_why_there_are_no_master_weights_is_said(tmp_path: Path) -> None:
    result = small(refused, tmp_path)
    assert result.master_weights is None
    assert "No run had master weights: SGD cannot step FP32 weights: gradient_release is on" in result.findings[-2]
    with pytest.raises(TypeError, match="master_weights is 'split32', and SGD cannot step FP32 weights"):
        small(refused, tmp_path / "other", master_weights="split32")
    assert not (tmp_path / "other").exists()


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of each optimizer that a run trains with."""
    seen: list[dict[str, Any]] = []
    original = sweep_training.train

    def training(setup: Setup, *rest: Any) -> Any:
        seen.append(dict(setup.optimizer.param_groups[0]))
        return original(setup, *rest)

    monkeypatch.setattr(sweep_training, "train", training)
    return seen


def test_beta2_is_kept_in_samples(tmp_path: Path, groups: list[dict[str, Any]]) -> None:
    small(adam, tmp_path, base_batch=8)
    assert [group["betas"] for group in groups] == [(0.9, pytest.approx(0.99**0.5)), (0.9, pytest.approx(0.99**2))]


def test_random_numbers_are_put_back(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    small(regression, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_what_fits_is_found_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = small(regression, tmp_path, micro_batch=None)
    assert {run.micro_batch for run in result.runs} == {4, 16}
    monkeypatch.setattr(sweep_module, "find_fit", None)
    assert small(regression, tmp_path, micro_batch=None) == result


def test_a_run_that_diverges_is_a_result(tmp_path: Path) -> None:
    def once() -> Sweep:
        return accumkern.sweep(
            lambda: regression(0.2), [4, 32], 1024, tmp_path, rules=["linear"], micro_batch=4, evaluations=16
        )

    result = once()
    assert [run.status for run in result.runs] == ["finished", "diverged"]
    assert 6 <= result.runs[1].steps < 32
    losses = [point.training_loss or 0.0 for point in result.runs[1].points[1:]]
    assert losses[-1] > 2 * losses[0]
    assert "Not finished: 32 (linear, seed 0): diverged after" in " ".join(result.findings)
    assert once() == result  # kept, not tried again
    infinite = small(lambda: regression(float("inf")), tmp_path / "infinite")
    assert {run.status for run in infinite.runs} == {"diverged"}
    assert max(run.steps for run in infinite.runs) <= 4  # at the first evaluation that knows of it
    assert math.isnan(small(lambda: regression(float("inf")), tmp_path / "infinite").runs[0].points[-1].loss)
    assert not infinite.learnt
    json.dumps(infinite.to_dict(), allow_nan=False)


class Lagging(nn.Module):
    """A regression with statistics for evaluation mode that are wrong after the first step, and catch up slowly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1, bias=False)
        self.register_buffer("behind", torch.zeros(()))
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.linear(x) + self.behind
        self.steps += 1
        self.behind.fill_(10 * 0.9**self.steps)
        return self.linear(x)


def lagging() -> Setup:
    model = Lagging()
    return regression()._replace(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05))


def test_evaluation_mode_that_lags_is_no_divergence(tmp_path: Path) -> None:
    result = accumkern.sweep(lagging, [4], 256, tmp_path, micro_batch=4)
    points = result.runs[0].points
    assert sum(point.loss > 2 * points[0].loss for point in points) >= 3
    assert result.runs[0].status == "finished"
    assert points[-1].loss < 0.1 * points[0].loss
    assert "In evaluation mode the loss of 4 (sqrt, seed 0) was for a time more than twice" in " ".join(result.findings)


def test_a_loss_that_is_high_for_a_moment_is_no_divergence(tmp_path: Path) -> None:
    made = 0

    def setup() -> Setup:
        one = regression(1e-4)

        def loss(model: nn.Module, batch: Any) -> Tensor:
            nonlocal made
            made += model.training
            return one.loss(model, batch) * (1000 if made % 8 in (0, 1) else 1)

        return one._replace(loss=loss)

    result = accumkern.sweep(setup, [4], 128, tmp_path, micro_batch=4, evaluations=32, validation_samples=8)
    losses = [point.training_loss or 0 for point in result.runs[0].points]
    assert max(losses) > 10 * result.runs[0].points[0].loss
    assert result.runs[0].status == "finished"


def test_a_run_out_of_memory_is_a_result(tmp_path: Path) -> None:
    result = accumkern.sweep(regression, [4, 4096], 4096, tmp_path, micro_batch=4096, memory="100kB", evaluations=2)
    assert [run.status for run in result.runs] == ["finished", "out of memory"]
    assert result.runs[1].points == ()
    assert "4096 (sqrt, seed 0): out of memory after 0 steps" in " ".join(result.findings)


def test_memory_that_is_less_than_the_model_is_a_result(tmp_path: Path) -> None:
    assert {run.status for run in small(regression, tmp_path, memory="10B").runs} == {"out of memory"}


def test_memory_that_runs_out_while_training_is_a_result(tmp_path: Path) -> None:
    trained = 0

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal trained
        trained += torch.is_grad_enabled()
        if trained > 30:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return (model(batch[0])[:, 0] - batch[1]).square().mean()

    result = small(lambda: regression(loss=loss), tmp_path)
    assert [run.status for run in result.runs] == ["finished", "out of memory"]


def test_nothing_learnt_is_said(tmp_path: Path) -> None:
    result = small(lambda: regression(0.0), tmp_path)
    assert not result.learnt
    assert result.target_loss is None
    assert "Nothing was learnt: no run brought the loss down by 1%. Train with more samples" in result.findings[0]
    assert all(row.seconds_to_target is None for row in result.rows)


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    small(regression, tmp_path)
    with pytest.raises(ValueError, match="holds another sweep: its evaluations is 4, now it is 5; choose another"):
        small(regression, tmp_path, evaluations=5)
    small(regression, tmp_path, target_loss=0.5)  # changes no run


def test_a_setup_that_ignores_seeds_is_refused(tmp_path: Path) -> None:
    def fixed() -> Setup:
        generator = torch.Generator().manual_seed(0)
        return regression(make_batch=lambda size: (torch.randn(size, 8, generator=generator), torch.zeros(size)))

    with pytest.raises(ValueError, match="draws the same samples whatever the seed is"):
        small(fixed, tmp_path)
    assert not (tmp_path / "sweep.json").exists()
    small(lambda: fixed()._replace(validation_batch=lambda size: (torch.ones(size, 8), torch.zeros(size))), tmp_path)


def test_a_setup_that_returns_the_same_model_again_is_refused(tmp_path: Path) -> None:
    setup = regression()
    with pytest.raises(ValueError, match="returned the same model twice"):
        small(lambda: setup, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"effective_batches": []}, ValueError, "effective_batches is empty"),
        ({"effective_batches": 4}, TypeError, "effective_batches is a int; it must be a list"),
        ({"effective_batches": [4, 0]}, ValueError, "effective_batches is 0; it must be a whole number of at least 1"),
        ({"samples": 8}, ValueError, "samples is 8, less than one window of 16; raise it to 16 at least.*or leave out"),
        ({"seeds": [-1]}, ValueError, "seeds is -1; it must be a whole number from 0 to 4294967295"),
        ({"seeds": [2**32]}, ValueError, "seeds is 4294967296; it must be a whole number from 0 to 4294967295"),
        ({"seeds": [2**31 - 1]}, ValueError, "seeds is 2147483647, which draws the validation samples"),
        ({"target_loss": math.nan}, ValueError, "target_loss is nan; it must be finite"),
        ({"target_loss": math.inf}, ValueError, "target_loss is inf; it must be finite"),
        ({"validation_samples": 10**10}, ValueError, "validation_samples is 10000000000, .* it must be 16384 at most"),
        (
            {"weight_decay_rules": ["sqrt"]},
            ValueError,
            "weight_decay_rules is 'sqrt'; it must be one of none, timescale",
        ),
        ({"weight_decay_rules": []}, ValueError, "weight_decay_rules is empty"),
        ({"start": 3}, TypeError, "start is a int; it must be the path of a checkpoint, or None"),
        ({"setup": "no_script.py:setup"}, FileNotFoundError, "there is no script"),
        ({"samples": 64.0}, TypeError, "samples is a float; it must be a whole number"),
        ({"rules": ["cubic"]}, ValueError, "rules is 'cubic'; it must be one of none, sqrt, linear"),
        ({"rules": "sqrt"}, TypeError, "rules is a str; it must be a list"),
        ({"seeds": []}, ValueError, "seeds is empty"),
        ({"master_weights": "fp32"}, ValueError, "'fp32'; it must be one of auto, split24, split32, or None"),
        ({"master_weights": 32}, TypeError, "master_weights is a int; it must be one of auto"),
        ({"micro_batch": 0}, ValueError, "micro_batch is 0"),
        ({"margin": 2}, ValueError, "margin is 2; it must be a number of at least 0 and less than 1"),
        ({"memory": "1 kB", "micro_batch": None}, ValueError, "memory limit"),
        ({"setup": lambda: None}, TypeError, r"setup\(\) returned a NoneType"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    defaults: dict[str, Any] = {"setup": lambda: big(), "effective_batches": [4, 16], "samples": 64, "micro_batch": 4}
    with pytest.raises(error, match=message):
        accumkern.sweep(folder=tmp_path, **(defaults | arguments))


def big() -> Setup:
    model = nn.Linear(1000, 1)
    return Setup(
        model,
        torch.optim.SGD(model.parameters()),
        lambda size: torch.randn(size, 1000),
        lambda model, batch: model(batch).square().mean(),
    )


SCRIPT = """
    import os, pathlib, sys, time
    sys.path.insert(0, {tests!r})
    from test_sweep import regression

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


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=needs_two_cores)])
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


def test_json_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"loss": 1.0})

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"loss": 2.0})
    assert json.loads(path.read_text()) == {"loss": 1.0}
    assert list(tmp_path.glob("*.json")) == [path]


# ---- what is made of runs ----------------------------------------------------------------------------------------


def run(batch: int, losses: list[float], seconds: float, **fields: Any) -> Run:
    points = tuple(Point(100 * i, seconds * i, loss) for i, loss in enumerate(losses))
    made = Run(batch, 4, batch // 4, "sqrt", 0, 0.1, "finished", 10, points[-1].seconds, 1000, points)
    return dataclasses.replace(made, **fields)


def test_the_way_to_a_loss_is_a_straight_line_between_points() -> None:
    one = run(4, [5.0, 3.0, 1.0, 2.0], 10.0)
    assert one.reaches(4.0) == (50.0, 5.0)
    assert one.reaches(3.0) == (100.0, 10.0)
    assert one.reaches(2.0) == (150.0, 15.0)
    assert one.reaches(6.0) == (0.0, 0.0)
    assert one.reaches(0.5) is None
    assert one.best_loss == 1.0
    assert run(4, [5.0, math.nan, math.nan], 1.0).reaches(4.0) is None


def test_rows_and_findings() -> None:
    sweep = Sweep(
        (
            run(4, [5.0, 3.0, 1.0], 1.0),
            run(4, [5.0, 2.0, 1.5], 2.0, seed=1),
            run(16, [5.0, 4.0, 2.0], 0.5),
            run(16, [5.0, 4.0, 3.0], 0.5, seed=1),
            run(64, [5.0, 4.0, 11.0], 0.1, status="diverged"),
        ),
        None,
        None,
        4,
    )
    assert sweep.target_loss == 3.0  # which every finished run has reached
    four, sixteen, sixty_four = sweep.rows
    assert four.samples_to_target == pytest.approx((100 + 100 * 2 / 3) / 2)
    assert four.seconds_to_target == pytest.approx((1 + 2 * 2 / 3) / 2)
    assert four.seconds_range == (1.0, pytest.approx(4 / 3))
    assert four.last_loss == 1.25
    assert sixteen.seconds_to_target == pytest.approx((0.75 + 1.0) / 2)
    assert (sixty_four.failed, sixty_four.seconds_to_target, sixty_four.last_loss) == ("1 diverged", None, None)
    text = " ".join(sweep.findings)
    assert "Fastest to the loss 3: an effective batch of 16" in text
    assert "Fewest samples to it: an effective batch of 4" in text
    assert "64 (sqrt, seed 0): diverged" in text
    assert "not worth it" not in text  # the fastest accumulates
    unreached = dataclasses.replace(sweep, asked_target_loss=0.1)
    assert "No effective batch reached the loss 0.1 with every seed." in " ".join(unreached.findings)
    single = dataclasses.replace(sweep, runs=(sweep.runs[0], run(16, [5.0, 4.0, 2.0], 5.0)))
    assert "Accumulation was not worth it here" in " ".join(single.findings)
    assert "one seed" in " ".join(single.findings)


def test_runs_survive_json() -> None:
    one = run(4, [5.0, math.inf], 1.0)
    again = Run.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False)))
    assert again.points[0] == one.points[0]
    assert math.isnan(again.points[1].loss)


def test_batches_may_differ_in_their_number_of_tensors_where_validation_has_its_own(tmp_path: Path) -> None:
    def setup() -> Setup:
        model = nn.Linear(4, 1)

        def make_batch(size: int) -> list[Tensor]:
            return [torch.ones(size, 4)] * (1 + torch.initial_seed() % 2)  # another seed gives one more, or one less

        def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
            return torch.stack([model(x).square().mean() for x in batch]).sum()

        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        return Setup(model, optimizer, make_batch, loss, validation_batch=lambda size: [torch.ones(size, 4)])

    found = accumkern.sweep(setup, [4], 16, tmp_path, micro_batch=4, evaluations=2, validation_samples=8)
    assert [run.status for run in found.runs] == ["finished"]


# ---- seeds -------------------------------------------------------------------------------------------------------


def test_a_setup_may_seed_itself(tmp_path: Path) -> None:
    def seeded() -> Setup:
        torch.manual_seed(1337)
        return regression()

    result = small(seeded, tmp_path, seeds=[0, 1])
    firsts = [run.points[0].loss for run in result.runs]
    assert len(set(firsts)) == 1  # the same weights
    assert result.runs[0].points != result.runs[2].points  # other batches
    assert "The 2 seeds had the same initial weights (setup() makes no others)" in " ".join(result.findings)
    assert "same initial weights" not in " ".join(small(regression, tmp_path / "other", seeds=[0, 1]).findings)


@pytest.mark.parametrize("seeds_itself", [False, True])
def test_a_generator_with_a_constant_seed_is_named(tmp_path: Path, seeds_itself: bool) -> None:
    def setup() -> Setup:
        if seeds_itself:
            torch.manual_seed(1337)
        generator = torch.Generator().manual_seed(torch.initial_seed() if seeds_itself else 0)
        made = regression(make_batch=lambda size: (torch.randn(size, 8, generator=generator), torch.zeros(size)))
        return made._replace(validation_batch=made.make_batch) if has_validation else made

    has_validation = False
    with pytest.raises(
        ValueError, match=r"a generator that setup\(\) makes and seeds with a constant .* seed that gen"
    ):
        small(setup, tmp_path)
    has_validation = True
    assert small(setup, tmp_path).runs[0].status == "finished"
    if seeds_itself:
        with pytest.raises(ValueError, match=r"the weights are the same too, so each seed's run would be a copy"):
            small(setup, tmp_path / "copies", seeds=[0, 1])
    else:
        small(setup, tmp_path / "weights", seeds=[0, 1])


# ---- weight decay ------------------------------------------------------------------------------------------------


def decaying(**settings: Any) -> Callable[[], Setup]:
    def setup() -> Setup:
        made = regression()
        arguments = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1} | settings
        return made._replace(optimizer=torch.optim.AdamW(made.model.parameters(), **arguments))

    return setup


def test_weight_decay_keeps_its_timescale(tmp_path: Path, groups: list[dict[str, Any]]) -> None:
    rules = {"rules": ["none", "sqrt", "linear"], "weight_decay_rules": ["none", "timescale"]}
    result = small(decaying(), tmp_path, seeds=[3], **rules)
    found = [(run.effective_batch, run.rule, run.weight_decay_rule, run.weight_decay) for run in result.runs]
    assert found == [
        (4, "none", "none", 0.1),  # the base batch: all rules are one
        (16, "none", "none", 0.1),
        (16, "none", "timescale", pytest.approx(0.4)),
        (16, "sqrt", "none", 0.1),
        (16, "sqrt", "timescale", pytest.approx(0.2)),
        (16, "linear", "none", 0.1),  # where both decay rules are one
    ]
    timescales = [4 / (0.01 * 0.1), *(16 / (group["lr"] * group["weight_decay"]) for group in groups[1:])]
    scaled = [timescales[i] for i in (2, 4, 5)]
    assert scaled == [pytest.approx(timescales[0])] * 3
    assert timescales[1] == pytest.approx(4 * timescales[0])
    assert result.runs[1].points[-1] != result.runs[2].points[-1]
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    assert {"batch-16_sqrt_seed-3.json", "batch-16_sqrt_timescale_seed-3.json"} < names
    assert len(result.rows) == len(names) == 6
    assert small(decaying(), tmp_path, seeds=[3], **rules) == result


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (decaying(weight_decay=0.0), "AdamW has no weight decay to scale; choose 'none'"),
        (regression, "SGD has no weight decay to scale"),
        (
            lambda: regression()._replace(optimizer=torch.optim.SGD(regression().model.parameters())),
            "are not the model's",
        ),
    ],
)
def test_weight_decay_that_is_not_there_is_not_scaled(tmp_path: Path, setup: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(setup, tmp_path, weight_decay_rules=["timescale"])
    assert not (tmp_path / "sweep.json").exists()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.NAdam])
def test_weight_decay_in_the_gradient_is_not_scaled(tmp_path: Path, kind: Any, groups: list[dict[str, Any]]) -> None:
    def setup() -> Setup:
        made = regression()
        return made._replace(optimizer=kind(made.model.parameters(), lr=0.01, weight_decay=0.1))

    with pytest.raises(
        ValueError, match=rf"has 'timescale', and {kind.__name__} adds its weight decay to the gradient"
    ):
        small(setup, tmp_path, weight_decay_rules=["none", "timescale"])
    small(setup, tmp_path)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]


def test_optimizers_whose_decay_is_decoupled_are_known(tmp_path: Path, groups: list[dict[str, Any]]) -> None:
    optimi = pytest.importorskip("optimi")
    kinds = [
        lambda params: torch.optim.NAdam(params, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
        lambda params: torch.optim.Adafactor(params, lr=0.01, weight_decay=0.1),
        lambda params: optimi.Lion(params, lr=0.01, weight_decay=0.1),
        lambda params: optimi.SGD(params, lr=0.01, weight_decay=0.1, decouple_wd=True),
    ]
    for i, kind in enumerate(kinds):
        groups.clear()

        def setup(kind: Any = kind) -> Setup:
            made = regression()
            return made._replace(optimizer=kind(made.model.parameters()))

        small(setup, tmp_path / str(i), weight_decay_rules=["timescale"])
        assert [group["weight_decay"] for group in groups] == [0.1, pytest.approx(0.2)]


# ---- a checkpoint to start from ----------------------------------------------------------------------------------


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
    assert "The learning rate of the checkpoint, 0.0025, is taken to be for the base batch, 4 " in text
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


# ---- the critical batch ------------------------------------------------------------------------------------------


def noisy(batch: int, end: float, noise: float, seed: int = 0, **fields: Any) -> Run:
    """A run of 20 evaluations that goes down from 5 to about ``end``."""
    drawn = random.Random(1000 * batch + seed)
    bias, losses = drawn.gauss(0, noise), [5 + (end - 5) * min(1, i / 12) for i in range(21)]
    return run(
        batch, [losses[0], *(loss + bias + drawn.gauss(0, noise) for loss in losses[1:])], 1.0, seed=seed, **fields
    )


def sweep_of(runs: list[Run], **fields: Any) -> Sweep:
    return Sweep(tuple(runs), None, None, 4, **fields)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_critical_batch_is_the_largest_that_loses_nothing(seeds: int) -> None:
    ends = {4: 1.0, 8: 1.0, 16: 1.0, 32: 1.5, 64: 2.0}
    result = sweep_of([noisy(batch, end, 0.005, seed) for batch, end in ends.items() for seed in range(seeds)])
    critical = result.critical_batch
    assert critical is not None
    assert [one.verdict for one in critical.comparisons] == [None, *["loses nothing"] * 2, "loses", "loses"]
    assert critical.effective_batch == 16
    assert critical.comparisons[3].excess == pytest.approx(0.5, abs=0.05)
    assert 0 < (critical.comparisons[3].error or 0) < 0.1
    text = next(finding for finding in result.findings if finding.startswith("Critical batch"))
    assert text.startswith("Critical batch over this training: 16 is the largest effective batch that loses nothing. ")
    assert ("from 3 seeds" if seeds == 3 else "from the scatter of the last evaluations of one seed") in text
    assert result.to_dict()["critical_batch"]["effective_batch"] == 16


def test_errors_of_seeds_are_those_of_student() -> None:
    ends = {4: 1.0, 16: 1.3}
    runs = [run(batch, [5.0, end + seed * 0.1], 1.0, seed=seed) for batch, end in ends.items() for seed in (0, 1)]
    critical = sweep_of(runs).critical_batch
    assert critical is not None
    variance = 0.1**2 / 2  # of two numbers 0.1 apart
    assert critical.comparisons[1].error == pytest.approx(4.30 * math.sqrt(variance * (1 / 2 + 1 / 2)))
    assert critical.comparisons[1].excess == pytest.approx(0.3)
    assert critical.comparisons[1].verdict == "loses nothing"  # 0.3 of 0.304


def test_the_end_is_that_of_a_line_at_equal_samples() -> None:
    falling = [5.0 - 0.1 * i for i in range(21)]
    longer = run(4, falling + falling[-1:] * 4, 1.0)
    critical = sweep_of([longer, run(16, falling, 1.0)]).critical_batch
    assert critical is not None
    assert [one.loss for one in critical.comparisons] == [pytest.approx(3.0)] * 2


@pytest.mark.parametrize(
    ("runs", "effective_batch", "words"),
    [
        ([noisy(4, 1, 0.005), noisy(16, 1, 0.005)], 16, "and the largest that was compared, so the critical batch may"),
        ([noisy(4, 1, 0.005), noisy(16, 2, 0.005)], None, "below 16, since every batch above 4 loses"),
        ([noisy(4, 1, 0.5), noisy(16, 1, 0.5)], None, "undecidable, since no error is small against what training"),
        ([run(4, [5.0, 1.0], 1.0), run(16, [5.0, 1.0], 1.0)], None, r"undecided \(\+0, error not known\)"),
        ([noisy(4, 1, 0.005), noisy(16, 1, 0.005, status="diverged")], None, r"16 \(sqrt\) diverged"),
        ([noisy(4, 2, 0.005), noisy(16, 1, 0.005)], 16, "16 does better than smaller ones shows that their learning"),
        (
            [noisy(4, 1, 0.005), noisy(16, 2, 0.005), noisy(16, 1, 0.005, rule="linear")],
            16,
            r"16 \(linear\) loses nothing",
        ),
    ],
    ids=["all", "none", "noise", "unknown", "diverged", "better", "best rule"],
)
def test_what_the_critical_batch_says(runs: list[Run], effective_batch: int | None, words: str) -> None:
    result = sweep_of(runs, start_sha256="1234")
    assert result.critical_batch is not None
    assert result.critical_batch.effective_batch == effective_batch
    text = next(finding for finding in result.findings if finding.startswith("Critical batch"))
    assert text.startswith("Critical batch from the checkpoint on: ")
    assert re.search(words, text)
    json.dumps(result.to_dict(), allow_nan=False)


def test_without_two_batches_there_is_no_critical_one() -> None:
    for runs in (
        [noisy(4, 1, 0.1)],
        [noisy(4, 1, 0.1, status="diverged"), noisy(16, 1, 0.1)],
        [noisy(4, 1, 0.1), noisy(16, 1, 0.1, status="out of memory", points=())],
        [noisy(4, 1, 0.1, status="diverged"), noisy(16, 1, 0.1, status="diverged")],
    ):
        assert sweep_of(runs).critical_batch is None
        assert not any("Critical" in finding for finding in sweep_of(runs).findings)
    assert sweep_of(runs).findings[0].startswith("No run finished, so there is no loss to compare at")


# ---- several runs at once ----------------------------------------------------------------------------------------


def failing() -> Setup:
    """A setup whose third batch of 16 fails, with an error that cannot be handed to another process."""
    made, drawn = regression(), 0

    class StrangeError(Exception):
        def __init__(self, one: int, other: int) -> None:
            super().__init__(f"{one} and {other}")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal drawn
        drawn += len(batch[0]) == 16 and torch.is_grad_enabled()
        if drawn > 2:
            raise StrangeError(1, 2)
        return made.loss(model, batch)

    return made._replace(loss=loss)


def dying() -> Setup:
    """A setup whose training with effective batches of 16 ends the process."""
    made = regression()

    def make(size: int) -> Any:
        if size == 16 and torch.initial_seed() != VALIDATION_SEED ^ 2**31 and multiprocessing.parent_process():
            os.kill(os.getpid(), signal.SIGKILL)
        return made.make_batch(size)

    return made._replace(make_batch=make)


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


# ---- what is wrong is named --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not what a run of a sweep writes .JSONDecodeError"),
        ("", "is not what a run of a sweep writes"),
        ("[]", "is not what a run of a sweep writes"),
        ('{"points": [{}]}', "is not what a run of a sweep writes .KeyError"),
        ("another", r"holds another run \(batch 16, sqrt, seed 0\)"),
    ],
    ids=["damaged", "empty", "list", "keys", "another"],
)
def test_a_damaged_run_is_named_with_its_cure(tmp_path: Path, content: str, message: str) -> None:
    result = small(regression, tmp_path)
    path = tmp_path / "runs" / "batch-4_sqrt_seed-0.json"
    path.write_text(path.with_name("batch-16_sqrt_seed-0.json").read_text() if content == "another" else content)
    with pytest.raises(ValueError, match=f"{path} {message}.*; delete it to train that run again"):
        small(regression, tmp_path)
    path.unlink()
    again = small(regression, tmp_path)
    assert [point.loss for point in again.runs[0].points] == [point.loss for point in result.runs[0].points]
    assert again.runs[1] == result.runs[1]


def test_damaged_settings_are_named_with_their_cure(tmp_path: Path) -> None:
    small(regression, tmp_path)
    path = tmp_path / "sweep.json"
    kept = path.read_text()
    for content in ("{", "[]", ""):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path} is not what a sweep writes .*; choose another folder, or delete"):
            small(regression, tmp_path)
    path.write_text(kept.replace('"version": 2', '"version": 1'))
    with pytest.raises(ValueError, match=f"{path} is of another version of accumkern"):
        small(regression, tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"holds runs, and no sweep.json that says what they were trained with"):
        small(regression, tmp_path)


def few(**fields: Any) -> Setup:
    """A setup with a data set of 10 samples."""
    made = regression()
    x, y = made.make_batch(10)

    def make(size: int) -> tuple[Tensor, Tensor]:
        rows = torch.randperm(10)[:size]
        return x[rows], y[rows]

    return made._replace(make_batch=make)


def none_left() -> Setup:
    made = few()

    def make(size: int) -> tuple[Tensor, Tensor]:
        rows = random.sample(range(10), size)
        return made.make_batch(10)[0][rows], made.make_batch(10)[1][rows]

    return made._replace(make_batch=make)


@pytest.mark.parametrize(("setup", "error"), [(few, ValueError), (none_left, RuntimeError)])
def test_a_data_set_smaller_than_a_batch_is_told_what_to_do(tmp_path: Path, setup: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"make_batch\(16\) of setup\(\) .*fewer than 16 samples.*smaller micro-batch"):
        small(setup, tmp_path, micro_batch=16)
    assert small(setup, tmp_path / "smaller", micro_batch=8).runs[1].status == "finished"


def test_the_base_batch_is_said_and_kept(tmp_path: Path) -> None:
    result = small(regression, tmp_path)
    text = (
        "The learning rate of setup(), 0.05, is taken to be for the base batch, 4 (the smallest effective batch, unless"
    )
    assert text in " ".join(result.findings)
    assert json.loads((tmp_path / "sweep.json").read_text())["base_batch"] == 4
    with pytest.raises(ValueError, match="its base_batch is 4, now it is 2"):
        accumkern.sweep(regression, [2, 16], 64, tmp_path, micro_batch=4, evaluations=4, validation_samples=32)


def test_more_evaluations_than_steps_are_one_a_step(tmp_path: Path) -> None:
    result = small(regression, tmp_path, evaluations=10**10)
    assert [len(run.points) for run in result.runs] == [17, 5]


def test_a_loss_of_evaluation_mode_that_is_no_number_is_passed_over() -> None:
    one = run(4, [5.0, math.inf, 3.0, 1.0], 1.0)
    assert one.reaches(3.0) == (200.0, 2.0)
    assert one.reaches(2.0) == (250.0, 2.5)
    sweep = sweep_of([one, run(16, [5.0, math.nan], 1.0)])
    assert sweep.target_loss == 5.0
    assert sweep.rows[1].last_loss is None
    json.dumps(sweep.to_dict(), allow_nan=False)


def test_the_largest_divisor_is_found_at_once() -> None:
    assert sweep_training.largest_divisor(48, 20) == 16
    assert sweep_training.largest_divisor(7, 7) == 7
    assert sweep_training.largest_divisor(7, 6) == 1
    assert sweep_training.largest_divisor(2**40, 10**12) == 2**39
    assert sweep_training.largest_divisor(10**10 + 19, 10**10) == 1  # a prime


def test_not_equally_many_samples_are_said(tmp_path: Path) -> None:
    result = accumkern.sweep(regression, [4, 48], 64, tmp_path, micro_batch=4, evaluations=4, validation_samples=8)
    assert "Not all trained with as many samples: effective batches of 48 with 48 of 64" in " ".join(result.findings)
