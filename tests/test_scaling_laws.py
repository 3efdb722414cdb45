"""What published laws say of the batch, the plan that listens to them, and a schedule of the batch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import old_objects_aside  # noqa: F401
from torch import Tensor, nn

import accumkern
from accumkern.__main__ import main
from accumkern.planning import scaling_laws
from accumkern.planning import speed as speed_module
from accumkern.planning.plan_reasons import explain
from accumkern.planning.plan_result import Plan
from accumkern.planning.protocol import Setup
from accumkern.planning.scaling_laws import POWER_LINES, STEP_LAW, BatchLaws, format_count, law_batch, laws_of
from accumkern.planning.speed import Split
from accumkern.planning.token_budget import law_reasons, parse_tokens, schedule_of

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside")


class Deep(nn.Module):
    """An embedding, and ``layers`` of ``width`` squared parameters each."""

    def __init__(self, width: int, layers: int, words: int = 100) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))

    def forward(self, batch: Tensor) -> Tensor:
        return self.layers(self.embedding(batch)).float().square().mean()


def deep(
    width: int = 32,
    layers: int = 2,
    tokens_per_sample: float | None = 2048,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
) -> Setup:
    model = Deep(width, layers).to(torch.bfloat16)
    return Setup(
        model,
        optimizer(model.parameters(), lr=1e-3),
        lambda size: torch.randint(100, (size, 4)),
        lambda model, batch: model(batch),
        tokens_per_sample=tokens_per_sample,
    )


def on_meta(parameters: float, **arguments: Any) -> Setup:
    with torch.device("meta"):
        return deep(width=1000, layers=round(parameters / 1e6), **arguments)


def predicted(tokens: Any = 10e9, parameters: float = 2e8, **arguments: Any) -> Plan:
    """A plan for a model too large for a test, from fake tensors."""
    return accumkern.plan(
        lambda: deep(width=4096, layers=round(parameters / 4096**2)),
        **{"tokens": tokens, "memory": "24GB", "measure": False, "largest_micro_batch": 16} | arguments,
    )


# ---- the laws ----------------------------------------------------------------------------------------------------


def test_the_laws_give_what_the_papers_give() -> None:
    # By hand: 10^10 to the powers 0.383, 0.462 and 0.571 is 10^3.83, 10^4.62 and 10^5.71.
    assert scaling_laws.power_lines_optimum(1e10) == pytest.approx(2048 * 0.0306 * 6760.83, rel=1e-5)
    assert scaling_laws.power_lines_critical(1e10) == pytest.approx(2048 * 0.0471 * 41686.94, rel=1e-5)
    assert scaling_laws.step_law_optimum(1e10) == pytest.approx(0.58 * 512861.4, rel=1e-5)
    assert scaling_laws.power_lines_timescale(20e9, 1e9) == pytest.approx(1.084 * 0.20624, rel=1e-4)
    # 10^9 to the power -0.713 is 10^-6.417, 10^11 to 0.307 is 10^3.377.
    assert scaling_laws.step_law_learning_rate(1e11, 1e9) == pytest.approx(1.79 * 10**-3.04, rel=1e-5)
    for batch in (1e4, 1e6):
        tokens = scaling_laws.tokens_until_critical(batch)
        assert scaling_laws.power_lines_critical(tokens) == pytest.approx(batch, rel=1e-12)


def test_the_laws_of_a_setup_are_in_tokens_and_in_samples() -> None:
    setup = on_meta(2e8, tokens_per_sample=1024)
    laws = laws_of(setup, 10**10)
    power_lines, step_law = laws.optima
    assert (power_lines.law, step_law.law) == (POWER_LINES, STEP_LAW)
    assert power_lines.samples * 1024 == power_lines.tokens == scaling_laws.power_lines_optimum(1e10)
    assert step_law.samples * 1024 == step_law.tokens == scaling_laws.step_law_optimum(1e10)
    assert laws.critical.samples * 1024 == scaling_laws.power_lines_critical(1e10)
    assert laws.parameters == 200 * 10**6 + 100 * 1000
    assert laws.other_parameters == 200 * 10**6
    assert laws.learning_rate == scaling_laws.step_law_learning_rate(1e10, 2e8)
    assert laws.best_samples == pytest.approx(math.sqrt(power_lines.samples * step_law.samples))
    assert power_lines.out_of_range is step_law.out_of_range is None


def test_frozen_and_tied_weights_are_not_counted_twice() -> None:
    setup = deep(width=100, layers=3)
    tied = setup.model.layers[2] = nn.Linear(100, 100, bias=False)
    tied.weight = setup.model.embedding.weight
    laws = laws_of(setup, 10**10)
    assert (laws.parameters, laws.other_parameters) == (3 * 100**2, 2 * 100**2)
    setup.model.layers[0].weight.requires_grad_(False)
    laws = laws_of(setup, 10**10)
    assert (laws.parameters, laws.other_parameters) == (2 * 100**2, 100**2)
    tied.weight.requires_grad_(False)
    laws = laws_of(setup, 10**10)
    assert (laws.parameters, laws.other_parameters) == (100**2, 100**2)


@pytest.mark.parametrize(
    ("tokens", "parameters", "fitted", "problem"),
    [
        (10e9, 2e8, {POWER_LINES, STEP_LAW}, ""),
        (100e9, 2e9, {POWER_LINES}, "2B parameters without embeddings, and it was fitted on about 60M to 1B"),
        (10e9, 8e7, {STEP_LAW}, "80.1M parameters, and it was fitted on about 111M to 3.3B"),
        (10e9, 9e8, {STEP_LAW}, "11.1 tokens per parameter, and it was fitted on about 20 to 1,280"),
        (1e9, 2e8, set(), "1B tokens, and it was fitted on about 2B to 100B"),
        (200e9, 2e8, set(), "200B tokens, and it was fitted on about 2B to 100B"),
        (10e9, 7e9, set(), "7B parameters, and"),
    ],
)
def test_a_run_outside_what_was_fitted_is_named(
    tokens: float, parameters: float, fitted: set[str], problem: str
) -> None:
    laws = laws_of(on_meta(parameters), int(tokens))
    assert {law.law for law in laws.optima if law.out_of_range is None} == fitted
    assert any(problem in (law.out_of_range or "") for law in laws.optima)
    samples = [law.samples for law in laws.optima if law.law in fitted]
    if not samples:
        assert laws.best_samples is law_batch(laws, 4) is None
    else:
        assert laws.best_samples == pytest.approx(math.prod(samples) ** (1 / len(samples)))


def test_other_optimizers_are_not_the_laws() -> None:
    laws = laws_of(on_meta(2e8, optimizer=torch.optim.SGD), 10**10)
    assert {law.out_of_range for law in laws.optima} == {"it is of AdamW, and the optimizer is SGD"}
    assert laws.best_samples is None


@pytest.mark.parametrize(
    ("best", "ranks", "batch"),
    [(173, 1, 128), (190, 1, 256), (173, 8, 128), (173, 3, 192), (5, 8, 8), (0.3, 1, 1), (None, 1, None)],
)
def test_the_nearest_batch_is_a_power_of_two_per_rank(best: float | None, ranks: int, batch: int | None) -> None:
    laws = dataclasses.replace(laws_of(on_meta(2e8), 10**10), best_samples=best)
    assert law_batch(laws, ranks) == batch


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        *[(5, 5), (10e9, 10**10), ("10B", 10**10), ("300M", 3 * 10**8), ("1.5 T", 15 * 10**11), ("10e9", 10**10)],
        *[("2.5k", 2500), ("123", 123), ("1e+3", 1000)],
    ],
)
def test_parse_tokens(text: int | float | str, tokens: int) -> None:
    assert parse_tokens(text) == tokens
    assert type(parse_tokens(text)) is int


@pytest.mark.parametrize(
    ("text", "error"),
    [
        *[(wrong, ValueError) for wrong in (0, -5, 1.5, math.inf, math.nan, 2**63)],
        *[(wrong, ValueError) for wrong in ("ten", "10X", "0.5", "1e99B", "1e999999999", "", "-1B")],
        *[(wrong, TypeError) for wrong in (True, [])],
    ],
)
def test_parse_tokens_refuses(text: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"tokens is .*; it must be a whole number of at least 1, or text such as '10B'"):
        parse_tokens(text)


def test_format_count() -> None:
    assert [format_count(x) for x in (0.3, 9.99, 1963.4, 25000, 3.2e8, 10**10, 1.5e12)] == [
        *("0.3", "9.99", "1,963", "25K", "320M", "10B", "1.5T")
    ]


# ---- the plan ----------------------------------------------------------------------------------------------------


def test_the_laws_choose_the_batch_where_they_were_fitted() -> None:
    plan = predicted()
    assert plan.laws is not None
    assert plan.by_laws is plan.laws
    assert plan.laws.best_samples is not None
    assert 128 < plan.laws.best_samples < 256  # 207 and 145 samples of 2,048 tokens
    assert plan.choice.effective_batch == law_batch(plan.laws, 1) == 128
    assert (plan.target, plan.schedule) == (None, None)
    told = str(plan)
    assert "128 samples are the power of two per rank that is nearest to 173, the geometric mean of the optimal" in told
    assert "the optimal batch is 207 samples (424K tokens) by Power Lines (arXiv 2505.13738) and 145 samples" in told
    assert "Accumulation: it makes the batch that the laws say is best for so many tokens; smaller" in told
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert data["laws"]["optima"][0]["law"] == POWER_LINES
    assert data["laws"]["critical"]["samples"] == plan.laws.critical.samples


def test_the_laws_leave_what_was_asked_for_and_runs_they_do_not_cover() -> None:
    asked = predicted(effective_batch=48)
    assert asked.choice.effective_batch == 48
    assert asked.laws is not None
    assert asked.by_laws is None
    assert "Token budget: for 10B tokens and 202M parameters" in str(asked)
    assert "Learning rate by Step Law: 0.0025" in str(asked)
    assert "tokens) is best at 0.14, with the batch in tokens" in str(asked)
    without = predicted(tokens=None)
    assert without.laws is None
    assert "Token budget" not in str(without)
    outside = predicted(tokens="1B")
    assert outside.choice == without.choice
    assert "Learning rate by Step Law" not in str(outside)
    assert "Timescale of AdamW by Power Lines" not in str(outside)
    assert "They choose nothing here; take the number as an order of magnitude" in str(outside)
    assert "Power Lines (arXiv 2505.13738) does not cover this run (1B tokens, and" in str(outside)


def test_a_measured_plan_listens_to_them_and_shows_the_noise_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module, "LEAST_SECONDS", 0.02)
    arguments: Any = {"tokens": "2B", "schedule": True, "noise_windows": 4, "largest_micro_batch": 4}
    outside = accumkern.plan(lambda: deep(tokens_per_sample=8192), **arguments)
    assert outside.by_laws is None
    monkeypatch.setitem(scaling_laws.PARAMETERS, STEP_LAW, (1, 1e9))  # as if it had been fitted on so small a model
    inside = accumkern.plan(lambda: deep(tokens_per_sample=8192), **arguments)
    assert inside.by_laws is not None
    assert inside.choice.effective_batch == 16  # 14.5
    assert inside.noise is not None
    told = str(inside)
    assert "nearest to 14.5, the optimal batch by Step Law (arXiv 2503.04715) for 2B tokens" in told
    assert "the gradient noise scale is" in told
    assert "Power Lines (arXiv 2505.13738) does not cover this run" in told
    assert inside.schedule is not None
    assert inside.schedule.stages[-1].effective_batch == 16


@pytest.mark.parametrize(
    ("noise_scale", "said"),
    [
        (15.0, "the laws' critical batch is 131 times the noise scale. That is to be expected where"),
        (1500.0, "agree on the critical batch within a factor of 2"),
        (1e5, "the noise scale is 50.9 times the laws' critical batch. The windows were few"),
        (math.inf, ""),
        (0.0, ""),
        (None, ""),
    ],
)
def test_noise_scale_and_laws_are_compared(noise_scale: float | None, said: str) -> None:
    told = list(law_reasons(laws_of(on_meta(2e8), 10**10), 128, noise_scale))
    of_both = [reason for reason in told if "Noise scale" in reason]
    assert len(of_both) == (1 if said else 0)
    assert said in "".join(of_both)


@pytest.mark.parametrize(
    ("setup", "arguments", "error", "message"),
    [
        (deep, {"tokens": "ten"}, ValueError, "tokens is 'ten'"),
        (deep, {"schedule": True}, ValueError, "schedule is True, and tokens is None; give the tokens of the run"),
        (deep, {"tokens": "1B", "schedule": 1}, TypeError, "schedule is a int; it must be True or False"),
        (
            lambda: deep(tokens_per_sample=None),
            {"tokens": "1B"},
            ValueError,
            "does not say how many tokens a sample has",
        ),
    ],
)
@pytest.mark.parametrize("measure", [True, False])
def test_wrong_arguments_are_named(
    setup: Callable[[], Setup], arguments: dict[str, Any], error: type[Exception], message: str, measure: bool
) -> None:
    with pytest.raises(error) as raised:
        accumkern.plan(setup, **arguments, memory="1GB", measure=measure)
    assert message in str(raised.value)


# ---- the schedule ------------------------------------------------------------------------------------------------


def laws_for(tokens: float, per_sample: float = 2048) -> BatchLaws:
    return laws_of(on_meta(2e8, tokens_per_sample=per_sample), int(tokens))


def test_the_batch_doubles_when_the_critical_batch_has_come_to_it() -> None:
    laws = laws_for(10e9)
    schedule = schedule_of(laws, Split(2, 8, 96))  # 1,536 samples; the critical batch ends at 1,963
    batches = [stage.effective_batch for stage in schedule.stages]
    assert batches == [16, 32, 64, 128, 256, 512, 1024, 1536]
    assert [stage.accumulation_steps for stage in schedule.stages] == [1, 2, 4, 8, 16, 32, 64, 96]
    assert schedule.stages[0].from_samples == 0
    for stage in schedule.stages[1:]:
        assert stage.from_tokens == stage.from_samples * 2048
        assert scaling_laws.power_lines_critical(stage.from_tokens) >= stage.effective_batch * 2048
        assert scaling_laws.power_lines_critical(stage.from_tokens - 2048) < stage.effective_batch * 2048
        assert stage.lr_factor == math.sqrt(stage.effective_batch / 1536)


def test_steps_are_counted_as_the_runtime_takes_them() -> None:
    laws = laws_for(3e9)
    schedule = schedule_of(laws, Split(1, 4, 40))
    runtime = accumkern.BatchSchedule(schedule.pairs, schedule.micro_batch, ranks=schedule.ranks)
    samples, steps = math.ceil(3e9 / 2048), 0
    while runtime.samples < samples:
        runtime.step()
        steps += 1
    assert abs(steps - schedule.optimizer_steps) <= len(schedule.stages)
    assert schedule.constant_steps == math.ceil(samples / 160)
    assert steps > schedule.constant_steps


def test_stages_that_the_run_does_not_come_to_are_left_out() -> None:
    laws = laws_for(10e9)
    schedule = schedule_of(laws, Split(1, 512, 16))  # 8,192 samples, of which 1,963 are of use
    assert [stage.effective_batch for stage in schedule.stages] == [512, 1024]
    assert [stage.lr_factor for stage in schedule.stages] == [math.sqrt(0.5), 1]
    plan = predicted(effective_batch=8192, schedule=True)
    assert "The critical batch does not come to 8192 samples in this run" in str(plan)
    assert "What the schedule would change" not in str(plan)


def test_stages_that_begin_at_once_are_one() -> None:
    schedule = schedule_of(laws_for(10e9, per_sample=1e6), Split(1, 1, 4))
    starts = [stage.from_samples for stage in schedule.stages]
    assert starts == sorted(set(starts))
    schedule = schedule_of(laws_for(10e9, per_sample=1), Split(1, 1, 1))
    assert schedule.pairs == [(0, 1)]


def test_a_plan_has_a_schedule_in_words_and_as_a_line_that_runs() -> None:
    plan = predicted(schedule=True)
    schedule = plan.schedule
    assert schedule is not None
    assert [stage.effective_batch for stage in schedule.stages] == [16, 32, 64, 128]
    acc = accumkern.attach(torch.optim.SGD([nn.Parameter(torch.zeros(3))]))
    runtime = eval(schedule.line, {"accumkern": accumkern, "acc": acc})
    assert runtime.effective_batch == 16
    runtime.step(schedule.stages[-1].from_samples)
    assert runtime.effective_batch == plan.choice.effective_batch == 128
    assert acc.scale == 1 / 8
    told = str(plan)
    assert "Schedule: A constant batch is the default" in told
    assert "16 samples at first, 32 from" in told
    assert "far outside what it was fitted on (about 2B tokens and more, of whole runs)" in told
    assert "arXiv 2602.14208" in told
    assert plan.to_dict()["schedule"]["line"] == schedule.line
    assert "What the schedule would change: little. It is over after 0.27% of the run, where the critical batch" in told
    assert explain(plan) == plan


def test_nothing_to_raise_is_said() -> None:
    assert "Schedule: none." in str(predicted(effective_batch=16, schedule=True))
    assert "the batch is one micro-batch per rank already" in str(predicted(effective_batch=16, schedule=True))


def test_the_command_line_shows_laws_and_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script_with_tokens.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_scaling_laws import deep\ndef setup(): return deep(4096, 12)\n"
    )
    options = ["--predict", "--memory", "24GB", "--largest-micro-batch", "16", "--tokens", "10B", "--schedule"]
    assert main(["plan", f"{script}:setup", *options]) == 0
    told = capsys.readouterr().out
    assert "when to raise the batch" in told
    assert "accumkern.BatchSchedule([(0, 1), " in told
    assert "Token budget:" in told
    assert main(["plan", f"{script}:setup", *options, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [stage["effective_batch"] for stage in data["schedule"]["stages"]] == [16, 32, 64, 128]
    assert main(["plan", f"{script}:setup", "--tokens", "many"]) == 2
    assert "tokens is 'many'" in capsys.readouterr().err
