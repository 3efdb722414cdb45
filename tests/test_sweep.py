"""The sweep: equal samples, scaled settings, what diverges, and what is wrong is named."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import old_objects_aside  # noqa: F401
from swept import adam, decaying, regression, seen_groups, short, small  # noqa: F401
from torch import Tensor, nn

import accumkern
from accumkern.planning import sweep as sweep_module
from accumkern.planning import sweep_training
from accumkern.planning.protocol import Setup
from accumkern.planning.sweep_result import Sweep
from accumkern.planning.sweep_runs import Run
from accumkern.planning.sweep_settings import VALIDATION_SEED
from accumkern.planning.sweep_training import seeded_setup

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside")


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


@pytest.mark.parametrize(
    ("high", "status", "points"),
    [
        (lambda window: window % 4 == 0, "finished", 33),
        (lambda window: window % 4 > 1, "finished", 33),  # twice in a row
        (lambda window: window > 20, "diverged", 1 + 23),
    ],
    ids=["for a moment", "for two", "from then on"],
)
def test_a_loss_that_stays_high_is_divergence(
    tmp_path: Path, high: Callable[[int], bool], status: str, points: int
) -> None:
    def setup() -> Setup:
        one, window = regression(1e-6), 0

        def loss(model: nn.Module, batch: Any) -> Tensor:
            nonlocal window
            window += model.training
            return 0 * one.loss(model, batch) + (3.0 if high(window) and window > 8 and model.training else 1.0)

        return one._replace(loss=loss)

    result = accumkern.sweep(setup, [4], 128, tmp_path, micro_batch=4, evaluations=32, validation_samples=8)
    assert max(point.training_loss or 0 for point in result.runs[0].points) == 3
    assert (result.runs[0].status, len(result.runs[0].points)) == (status, points)


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
    rate = 0.05

    def of_the_environment() -> Setup:
        return regression(rate)

    small(of_the_environment, tmp_path / "other")
    rate = 0.1
    with pytest.raises(ValueError, match=r"its learning_rate is 0\.05, now it is 0\.1; choose another"):
        small(of_the_environment, tmp_path / "other")


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


def test_weight_decay_keeps_its_timescale(tmp_path: Path, groups: list[dict[str, Any]]) -> None:
    rules = {"rules": ["none", "sqrt", "linear"], "weight_decay_rules": ["none", "timescale"]}
    result = small(decaying, tmp_path, seeds=[3], **rules)
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
    assert small(decaying, tmp_path, seeds=[3], **rules) == result


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (lambda: decaying(weight_decay=0.0), "AdamW has no weight decay to scale; choose 'none'"),
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
    with pytest.raises(error, match=r"make_batch\(16\) of setup\(\) .*fewer samples than 16.*smaller micro-batches"):
        small(setup, tmp_path, micro_batch=16)
    assert small(setup, tmp_path / "smaller", micro_batch=8).runs[1].status == "finished"


def test_the_base_batch_is_said_and_kept(tmp_path: Path) -> None:
    result = small(regression, tmp_path)
    text = "The learning rate of setup(), 0.05, is taken to be for the base batch, 4, the smallest; --base-batch"
    assert text in " ".join(result.findings)
    assert json.loads((tmp_path / "sweep.json").read_text())["base_batch"] == 4
    with pytest.raises(ValueError, match="its base_batch is 4, now it is 2"):
        accumkern.sweep(regression, [2, 16], 64, tmp_path, micro_batch=4, evaluations=4, validation_samples=32)


def test_more_evaluations_than_steps_are_one_a_step(tmp_path: Path) -> None:
    result = small(regression, tmp_path, evaluations=10**10)
    assert [len(run.points) for run in result.runs] == [17, 5]


def test_the_largest_divisor_is_found_at_once() -> None:
    assert sweep_training.largest_divisor(48, 20) == 16
    assert sweep_training.largest_divisor(7, 7) == 7
    assert sweep_training.largest_divisor(7, 6) == 1
    assert sweep_training.largest_divisor(2**40, 10**12) == 2**39
    assert sweep_training.largest_divisor(10**10 + 19, 10**10) == 1  # a prime


def test_not_equally_many_samples_are_said(tmp_path: Path) -> None:
    result = accumkern.sweep(regression, [4, 48], 64, tmp_path, micro_batch=4, evaluations=4, validation_samples=8)
    assert "Not all trained with as many samples: effective batches of 48 with 48 of 64" in " ".join(result.findings)
