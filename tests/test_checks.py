"""Arguments that are numbers or names: every kind of number is taken, and what is wrong is named."""

import array
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import accumkern
from accumkern.noise_scale import check_group, check_smoothing, counts_of
from accumkern.out_of_memory import parse_bytes
from accumkern.planning.memory import check_margin
from accumkern.planning.protocol import Setup, check_setup

HUGE = 10**400


def attached(**arguments: Any) -> tuple[torch.nn.Parameter, accumkern.GradAccumulator]:
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    accumulator = accumkern.attach(torch.optim.SGD([param]), **arguments)
    for _ in range(2):
        (param * torch.tensor([3.0, 4.0, 0.0, 0.0])).sum().backward()
    return param, accumulator


def average_over(value: Any) -> Any:
    return attached(average_over=value)[1].scale


def scale(value: Any) -> Any:
    _, accumulator = attached()
    accumulator.scale = value
    return accumulator.scale


def scale_of_accumulate(value: Any) -> Any:
    total = torch.zeros(2)
    accumkern.accumulate_([torch.ones(2)], [total], scale=value)
    return total[0].item()


def divide_by(value: Any) -> Any:
    return attached()[1].finish(value).norm.item()


def max_norm(value: Any) -> Any:
    return attached()[1].finish(max_norm=value).clip_coefficient.item()


def norm_type(value: Any) -> Any:
    return attached()[1].finish(norm_type=value).norm.item()


def tokens(value: Any) -> Any:
    return counts_of([1, value], 2)[1]


def tokens_per_sample(value: Any) -> Any:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    made = Setup(model, optimizer, lambda n: torch.ones(n, 2), lambda m, b: m(b).mean(), tokens_per_sample=value)
    return check_setup(made).tokens_per_sample


POSITIVE = {
    "average_over": average_over,
    "divide_by": divide_by,
    "max_norm": max_norm,
    "norm_type": norm_type,
    "tokens": tokens,
    "tokens_per_sample": tokens_per_sample,
}
REAL: dict[str, Callable[[Any], Any]] = {
    **POSITIVE,
    "scale": scale,
    "scale of accumulate_": scale_of_accumulate,
    "smoothing": check_smoothing,
    "margin": check_margin,
}


@pytest.mark.parametrize("kind", [float, Fraction, np.float16, np.float32, np.float64, np.longdouble, int, np.uint8])
@pytest.mark.parametrize("name", REAL)
def test_every_real_number_is_taken_and_kept_as_pythons(name: str, kind: Callable[[Any], Any]) -> None:
    number = 0.5 if kind(0.5) == 0.5 else 1 if name in POSITIVE else 0
    found = REAL[name](kind(number))
    assert type(found) in (int, float)
    assert found == REAL[name](number)


@pytest.mark.parametrize(
    "value", [True, np.True_, "8", b"8", 8j, [8], np.ones(2), object()], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("name", REAL)
def test_what_is_no_real_number_is_named_with_what_is_right(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"{name.split()[0]}.* is a {type(value).__name__}; it must (be|hold) (a|one)"):
        REAL[name](value)


@pytest.mark.parametrize(
    "value", [HUGE, -HUGE, Fraction(HUGE), Fraction(1, HUGE), 10**5000], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("name", REAL)
def test_a_number_beyond_fp64_is_a_value_error_that_says_what_is_right(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name.split()[0]}.* it must (be|hold) (a|one)"):
        REAL[name](value)


# ---- extremes ----------------------------------------------------------------------------------------------------

GREATEST = float(torch.finfo(torch.float32).max)
LEAST = 2.0**-149


@pytest.mark.parametrize("value", [1e46, 1e39 * 1e300, 5e-324, 1e-39, 1e-320, Fraction(1, 10**50), 0, -8, np.nan])
def test_the_reciprocal_of_average_over_must_be_a_number_of_fp32(value: Any) -> None:
    with pytest.raises(ValueError, match=r"average_over is .*reciprocal FP32 holds \(2.94e-39 to 7.13e\+44\), or None"):
        average_over(value)


@pytest.mark.parametrize("value", [2.94e-39, 7.13e44, 1e39])
def test_an_extreme_average_that_fp32_can_take_is_taken(value: float) -> None:
    found = torch.tensor(average_over(value))
    assert found.isfinite()
    assert found != 0


@pytest.mark.parametrize("take", [scale, scale_of_accumulate], ids=lambda take: take.__name__)
def test_a_scale_is_zero_in_fp32_only_if_it_is_zero(take: Callable[[Any], Any]) -> None:
    for value in (1e-46, -1e-46, 1e-300, Fraction(1, HUGE), 1e39, -1e39, np.inf, np.nan):
        with pytest.raises(ValueError, match=r"scale is .*; it must be"):
            take(value)
    for value in (0, 0.0, -0.0, LEAST, -LEAST, GREATEST):
        assert take(value) == value


@pytest.mark.parametrize("name", ["divide_by", "max_norm", "tokens"])
def test_positive_numbers_must_be_so_in_fp32(name: str) -> None:
    for value in (1e-46, 1e-320, 1e39, 1e300, 0, -1, np.nan):
        with pytest.raises(ValueError, match=f"{name} is .*; it must"):
            REAL[name](value)
    for value in (LEAST, GREATEST):
        REAL[name](value)


@pytest.mark.parametrize("gradient", [[3.0, 4.0], [torch.inf, 1.0], [torch.nan, 1.0]], ids=str)
@pytest.mark.parametrize("limit", [torch.inf, GREATEST, 1.0, LEAST])
def test_a_limit_clips_as_torchs_does(gradient: list[float], limit: float) -> None:
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    accumulator = accumkern.attach(torch.optim.SGD(params[:1]))
    for param in params:
        param.backward(torch.tensor(gradient))
    accumulator.finish(max_norm=limit)
    torch.nn.utils.clip_grad_norm_(params[1:], limit)
    assert params[0].grad is not None
    assert params[1].grad is not None
    torch.testing.assert_close(params[0].grad, params[1].grad, equal_nan=True, rtol=0, atol=0)


# ---- tokens and groups -------------------------------------------------------------------------------------------

TOKENS = [
    np.array([2, 3]),
    np.array([2, 3], dtype=np.float16),
    [np.array(2), np.array([3])],
    [torch.tensor(2), torch.tensor([3.0])],
    torch.tensor([2, 3]),
    array.array("I", [2, 3]),
    range(2, 4),
    (Fraction(2), np.int8(3)),
]


@pytest.mark.parametrize("given", TOKENS, ids=lambda given: f"{type(given).__name__} {given}")
def test_tokens_are_taken_from_whatever_holds_them(given: Any) -> None:
    found = counts_of(given, 2)
    assert found == [2.0, 3.0]
    assert {type(count) for count in found} == {float}


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (np.ones((2, 1)), ValueError, r"tokens is a ndarray of shape \(2, 1\); it must hold one positive number"),
        (np.array(2), ValueError, r"tokens is a ndarray of shape \(\)"),
        (np.array([True, True]), TypeError, r"tokens\[0\] is a bool"),
        (torch.ones(2, dtype=torch.complex64), TypeError, r"tokens\[0\] is a complex"),
        (np.float64(2), ValueError, "tokens is a float64"),
        ({2, 3}, TypeError, "tokens is a set"),
        (b"ab", TypeError, "tokens is a bytes"),
    ],
    ids=repr,
)
def test_other_tokens_are_named(given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        counts_of(given, 2)


def test_a_group_may_be_any_integer() -> None:
    assert type(check_group(np.int64(1), 2)) is int
    assert check_group(None, 2) is None
    for wrong, error in ((True, TypeError), (1.0, TypeError), (np.int64(2), ValueError), (HUGE, ValueError)):
        with pytest.raises(error, match=r"group is .*; it must be None or the index of one of the optimizer's 2 param"):
            check_group(wrong, 2)


# ---- planning ----------------------------------------------------------------------------------------------------


def setup() -> Setup:
    model = torch.nn.Linear(2, 2).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return Setup(model, optimizer, lambda n: torch.randn(n, 2).bfloat16(), lambda m, b: m(b).float().square().mean())


def test_a_plan_takes_numbers_of_numpy() -> None:
    sizes = {"effective_batch": np.int64(4), "largest_micro_batch": np.uint8(2), "noise_windows": np.int32(4)}
    made = accumkern.plan(setup, memory=np.int64(10**8), margin=np.float32(0.25), **sizes)
    assert (made.choice.effective_batch, made.memory_limit_bytes, made.margin) == (4, 10**8, 0.25)
    assert type(made.choice.effective_batch) is type(made.memory_limit_bytes) is int
    assert type(made.margin) is float


@pytest.mark.parametrize("name", ["effective_batch", "largest_micro_batch", "noise_windows", "memory", "margin"])
def test_a_plan_names_what_is_no_number_for_it(name: str) -> None:
    for wrong, error in ((HUGE, ValueError), (-HUGE, ValueError), (True, TypeError), (2j, TypeError)):
        with pytest.raises(error, match=f"{name} is .*; it must be"):
            accumkern.plan(setup, **{name: wrong})


def test_sizes_of_memory_do_not_overflow() -> None:
    assert type(parse_bytes(np.int64(5))) is int
    with pytest.raises(ValueError, match=r"memory is a int beyond the range of 64 bits; it must be"):
        parse_bytes("9" * 400 + "GB")


def test_a_sweep_takes_numbers_of_numpy(tmp_path: Path) -> None:
    numbers = {"base_batch": np.int64(2), "micro_batch": np.int8(2), "evaluations": np.int64(1)}
    made = accumkern.sweep(
        setup, np.array([2, 4]), np.int64(8), tmp_path, seeds=np.arange(1), target_loss=np.float32(0.5),
        validation_samples=np.int64(2), margin=np.float64(0.5), memory=np.int64(10**8), **numbers,
    )  # fmt: skip
    assert [run.effective_batch for run in made.runs] == [2, 4]
    assert type(made.target_loss) is float
    with pytest.raises(TypeError, match="target_loss is a str; it must be a number, or None"):
        accumkern.sweep(setup, [2], 8, tmp_path, target_loss="low")


# ---- names -------------------------------------------------------------------------------------------------------


def sums(**arguments: Any) -> None:
    accumkern.accumulate_([torch.ones(2)], [torch.ones(2)], **arguments)


@pytest.mark.parametrize("wrong", [3, torch.int8, ["split24"], b"split24"], ids=str)
def test_a_name_that_is_no_text_is_a_type_error(wrong: Any, tmp_path: Path) -> None:
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("buffer", lambda: attached(buffer=wrong)),
        ("backend", lambda: attached(backend=wrong)),
        ("backend", lambda: sums(backend=wrong)),
        ("buffer", lambda: accumkern.plan(setup, buffer=wrong)),
        ("rules", lambda: accumkern.sweep(setup, [2], 8, tmp_path, rules=[wrong])),
    ]
    for name, call in calls:
        with pytest.raises(TypeError, match=f"{name} is a {type(wrong).__name__}; it must be one of"):
            call()
