"""A plan on several ranks: they agree, whatever differs between them, and an error on one of them ends all."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import planned
import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import accumkern
from accumkern.__main__ import main
from accumkern.planning import speed, trial
from accumkern.planning.caveats import rank_warnings
from accumkern.planning.plan_result import Plan
from accumkern.planning.protocol import Setup


def hungry(loss: Callable[[nn.Module, Tensor], Tensor] = lambda model, batch: model(batch)) -> Setup:
    return planned.hungry(loss, device())


def small_plan(setup: Callable[[], Any], **arguments: Any) -> Plan:
    """Plan in little time."""
    speed.LEAST_SECONDS = 0.01
    torch.manual_seed(dist.get_rank())
    return accumkern.plan(
        setup, **({"effective_batch": 16, "largest_micro_batch": 4, "noise_windows": 4, "memory": "1GB"} | arguments)
    )


def error_of(function: Callable[[], Any]) -> str:
    """Return what a function raises."""
    try:
        return f"nothing: {function()}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


# ---- they agree --------------------------------------------------------------------------------------------------


def plan_with_differences() -> tuple[Plan, dict[str, int]]:
    """Plan with a model that has a collective, on ranks of other memory, other speed and other random numbers."""
    rank = dist.get_rank()
    counts = {"losses": 0}
    clock = 0.0

    def now(setup: Setup) -> float:  # of rank 1, four times slower
        nonlocal clock
        clock += [0.001, 0.004][rank]
        return clock

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        counts["losses"] += 1
        total = torch.ones(1, device=device())
        dist.all_reduce(total)
        assert total.item() == 2
        return model(batch)

    memory = ["8MB", "3MB"] if device().type == "cpu" else ["2GB", "1GB"]  # a GPU's allocator takes 20 MB at once
    real, trial.now = trial.now, now
    try:
        return small_plan(lambda: hungry(loss), memory=memory[rank], largest_micro_batch=16), counts
    finally:
        trial.now = real


def test_ranks_of_other_memory_and_speed_get_the_same_plan(ranks: Ranks) -> None:
    (one, losses), (other, losses_of_other) = ranks.run(plan_with_differences, at_least=2)
    assert one == other
    assert losses == losses_of_other
    assert one.memory_limit_bytes == (10**9 if ranks.backend == "nccl" else 3 * 10**6)
    assert one.is_limited_by_memory == (ranks.backend == "gloo")
    assert one.choice.ranks == 2
    assert one.choice.effective_batch == 16
    assert one.speeds[0].seconds == pytest.approx(0.004)


def plan_where_one_runs_out() -> Plan:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if dist.get_rank() == 1 and batch.shape[0] > 3:
            raise torch.OutOfMemoryError("out of memory")
        return model(batch)

    def setup() -> Setup:
        made = hungry(loss)
        return made._replace(model=DistributedDataParallel(made.model))

    return small_plan(setup, largest_micro_batch=16)


def test_what_does_not_fit_on_one_rank_does_not_fit(ranks: Ranks) -> None:
    one, other = ranks.run(plan_where_one_runs_out, at_least=2)
    assert one == other
    assert one.largest_micro_batch == 3
    assert one.prediction_problem is None  # of what DistributedDataParallel wraps
    assert one.prediction_error is not None
    assert one.prediction_error < 0.01


def plan_of_few_samples(phase: str, samples: list[int]) -> Any:
    """Plan where a loss needs so many samples on a rank, or where there is data for so many."""

    def fail(size: int) -> None:
        raise ZeroDivisionError(f"of {size}")

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if phase == "loss" and batch.shape[0] < samples[dist.get_rank()]:
            fail(batch.shape[0])
        return model(batch)

    def setup() -> Setup:
        made = hungry(loss)

        def make(size: int) -> Tensor:
            if phase == "data" and size > samples[dist.get_rank()]:
                fail(size)
            return made.make_batch(size)

        return made._replace(make_batch=make)

    try:
        return small_plan(setup, largest_micro_batch=16)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def test_ranks_agree_on_the_smallest_that_trains(ranks: Ranks) -> None:
    one, other = ranks.run(plan_of_few_samples, "loss", [2, 2], at_least=2)
    assert one == other
    assert (one.fit.smallest, one.fit.smallest_problem) == (2, "ZeroDivisionError: of 1")
    assert min(speed.micro_batch for speed in one.speeds) == 2


def test_what_is_too_small_on_one_rank_alone_is_an_error_of_it(ranks: Ranks) -> None:
    one, other = ranks.run(plan_of_few_samples, "loss", [1, 2], at_least=2)
    own = "RuntimeError: loss of setup() raised ZeroDivisionError: of 1"
    assert other == own
    assert (
        one == f"RanksError: rank 1 failed in the phase 'what fits' with {own}; see the output of that rank for where"
    )


def test_the_rank_with_the_least_data_is_the_limit_of_all(ranks: Ranks) -> None:
    one, other = ranks.run(plan_of_few_samples, "data", [100, 3], at_least=2)
    assert one == other
    assert (one.largest_micro_batch, one.is_limited_by_memory) == (3, False)
    assert one.fit.data_problem.startswith("make_batch(4) of setup() raised ZeroDivisionError: of 4; where there are")


# ---- an error on one of them -------------------------------------------------------------------------------------


def plan_that_fails(phase: str, kind: type[BaseException]) -> str:
    """Fail on rank 1, in a phase."""
    stage, setups = "", 0

    def progress(told: str, detail: str) -> None:
        nonlocal stage
        stage = told

    def fail() -> Any:
        raise kind("on one rank")

    fails = dist.get_rank() == 1

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if fails and stage == phase:
            fail()
        return model(batch)

    def setup() -> Setup:
        nonlocal setups
        setups += 1
        if fails and (phase, setups) in (("setup()", 1), ("what would fit elsewhere", 2)):
            fail()
        return hungry(loss)

    return error_of(lambda: small_plan(setup, progress=progress))


@pytest.mark.parametrize(
    ("phase", "kind"),
    [
        ("setup()", TypeError),
        ("what fits", ZeroDivisionError),
        ("what is fast", ZeroDivisionError),
        ("what is fast", torch.OutOfMemoryError),
        ("what helps training", ZeroDivisionError),
        ("what helps training", KeyboardInterrupt),
        ("what would fit elsewhere", KeyboardInterrupt),
        ("the plan", ZeroDivisionError),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_an_error_on_one_rank_ends_all_and_is_named(ranks: Ranks, phase: str, kind: type[BaseException]) -> None:
    one, other = ranks.run(plan_that_fails, phase, kind, at_least=2)
    own = f"{kind.__name__}: on one rank"
    if kind is ZeroDivisionError:
        own = f"RuntimeError: loss of setup() raised {own}"
    if phase == "setup()":
        own = f"RuntimeError: setup() raised {own}; run it by itself to see where"
    assert other == own
    assert one == f"RanksError: rank 1 failed in the phase {phase!r} with {own}; see the output of that rank for where"


def plan_that_leaks() -> str:
    kept = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            kept.append(batch)
        return model(batch)

    return error_of(lambda: small_plan(lambda: hungry(loss)))


def test_a_leak_on_one_rank_ends_all(ranks: Ranks) -> None:
    one, other = ranks.run(plan_that_leaks, at_least=2)
    assert one.startswith("RanksError: rank 1 failed in the phase 'what fits' with RuntimeError: setup() leaks memory")
    assert other.startswith("RuntimeError: setup() leaks memory")


def plan_with_other_arguments(arguments: list[dict[str, Any]]) -> str:
    return error_of(lambda: small_plan(hungry, **arguments[dist.get_rank()]))


def test_other_arguments_on_a_rank_are_named(ranks: Ranks) -> None:
    one, other = ranks.run(plan_with_other_arguments, [{"noise_windows": 4}, {"noise_windows": 8}], at_least=2)
    assert one == other == "RanksError: noise_windows differs between the ranks: [4, 8]; give the same to all of them"
    one, other = ranks.run(plan_with_other_arguments, [{"measure": False}, {"memory": "lots"}], at_least=2)
    assert other.startswith("ValueError: memory is 'lots'")
    assert one.startswith("RanksError: rank 1 failed in the phase 'arguments' with ValueError: memory is 'lots'")


def plan_that_fails_beside_a_collective() -> str:
    group = dist.new_group(timeout=timedelta(seconds=1))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if dist.get_rank() == 1 and batch.shape[0] == 2:
            raise ZeroDivisionError("on one rank")
        dist.all_reduce(torch.ones(1), group=group)
        return model(batch)

    return error_of(lambda: small_plan(lambda: hungry(loss)))


def test_a_collective_of_the_model_ends_with_the_timeout_of_its_group(ranks: Ranks) -> None:
    if ranks.backend == "nccl":
        pytest.skip("NCCL's timeout ends the process")
    one, other = ranks.run(plan_that_fails_beside_a_collective)
    assert "imed out" in one
    assert other == "RuntimeError: loss of setup() raised ZeroDivisionError: on one rank"


# ---- the command line, and sweeps --------------------------------------------------------------------------------


def run_command(arguments: list[str]) -> tuple[int, str, str]:
    speed.LEAST_SECONDS = 0.01
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(arguments)
    return status, out.getvalue(), errors.getvalue()


def test_the_first_rank_prints_and_writes(ranks: Ranks, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script = tmp_path / "script.py"
    script.write_text("from test_plan_ranks import hungry as setup\n")
    command = ["plan", f"{script}:setup", "--effective-batch", "8", "--noise-windows", "0", "--memory", "1GB"]
    (status, out, errors), other = ranks.run(run_command, [*command, "--output", str(tmp_path / "out")], at_least=2)
    assert status == 0
    assert "effective batch" in out
    assert "what fits: micro-batch 1" in errors
    assert (tmp_path / "out" / "plan.json").is_file()
    assert other == (0, "", "")


def sweep_on_ranks(folder: Path) -> str:
    return error_of(lambda: accumkern.sweep(hungry, [4], 4, folder, micro_batch=4))


def test_a_sweep_on_several_ranks_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    for outcome in ranks.run(sweep_on_ranks, tmp_path / "out", at_least=2):
        assert outcome.startswith("RuntimeError: a sweep trains in one process, and there are 2 ranks")
    assert not (tmp_path / "out").exists()


# ---- the last, because it ends processes -------------------------------------------------------------------------


def plan_that_dies() -> str:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if dist.get_rank() == 1 and batch.shape[0] == 2:
            os._exit(1)
        return model(batch)

    return error_of(lambda: small_plan(lambda: hungry(loss)))


def test_a_rank_that_dies_is_missed(ranks: Ranks) -> None:
    if ranks.backend == "nccl":
        pytest.skip("NCCL ends the other processes")
    (_, one), _ = ranks.outcomes(plan_that_dies, ranks=2)
    assert one.startswith("RanksError: rank 1 is gone (its connection closed) in the phase 'what fits'; see its output")


def test_processes_that_no_group_joins_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rank_warnings() == []
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rank_warnings() == []  # of something else than torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    (warning,) = rank_warnings()
    assert warning.startswith("torchrun has started 4 processes, and they are in no process group")
