"""A whole optimizer step in one kernel: every backend, bit for bit, against the eager one."""

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import is_interpreted
from step_cases import (
    ALL_GRADS,
    ALL_UPDATES,
    ALL_WEIGHTS,
    Step,
    assert_stepped,
    by_reference,
    check,
    coefficients,
    hard,
    is_adam,
    usual,
)
from torch import Tensor

from accumkern import available_backends
from accumkern.formats import BLOCK_NUMEL, Format, Start, decode
from accumkern.updates import Update

SIZES = [1, 7, 8, 9, 2047, 2048, 2049, BLOCK_NUMEL - 1, BLOCK_NUMEL, BLOCK_NUMEL + 1]
SPLIT24, SPLIT32 = Format.SPLIT24, Format.SPLIT32


# ---- what is computed --------------------------------------------------------------------------------------------


@ALL_UPDATES
@ALL_WEIGHTS
@ALL_GRADS
@pytest.mark.eager_on_gpu
def test_bits_agree_with_the_reference(
    backend: str, device: torch.device, update: Update, weight_format: Format, grad_format: Format, start: Start
) -> None:
    """All in one list, and some sizes alone, with gradients taken as they are, scaled by numbers and by tensors."""
    interpreted = is_interpreted(backend, device)
    large = 1_000_003 if device.type == "cuda" else 12_289 if interpreted else 40_003  # shared by two threads
    alone = min(large, 200_003)  # the reference is computed on the CPU
    lists = [[0, *SIZES, large, 0], [alone], [5]]
    third, factor = torch.tensor(3.0, device=device), torch.tensor(0.7, dtype=torch.float64, device=device)
    for sizes, (divisor, by) in itertools.product(lists, [(1.0, 1.0), (3.0, 0.7), (third, 1.0), (third, factor)]):
        if (len(sizes) > 1) != (divisor is third and by is factor) and (interpreted or len(sizes) > 1):
            continue  # to make a list takes long, and to interpret a program a millisecond and more
        step = hard(update, weight_format, grad_format, start, sizes)
        found = step.to(device)
        found.divisor, found.factor = divisor, by
        step.divisor, step.factor = (x.cpu() if isinstance(x, Tensor) else x for x in (divisor, by))
        found.run(backend)
        assert_stepped(found, by_reference(step, backend, device), f"{sizes}, {divisor}, {by}")


ADAM_OPTIONS: list[dict[str, Any]] = [
    {"weight_decay": decay, "decoupled_weight_decay": decoupled, "maximize": maximize, "betas": betas}
    for decay, decoupled, maximize in [(0.0, True, False), (0.1, True, True), (0.1, False, False), (0.1, False, True)]
    for betas in [(0.9, 0.999), (0.0, 0.0), (0.5, 0.95), (0.51, 0.95), (0.49, 0.0), (0.999, 0.999)]
] + [{"eps": 0.0}, {"lr": 0.0}, {"lr": 1e38}, {"lr": torch.tensor(0.1)}]
SGD_OPTIONS: list[dict[str, Any]] = [
    {"weight_decay": decay, "maximize": maximize, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    for decay, maximize in [(0.0, True), (0.1, False)]
    for momentum, dampening, nesterov in [(0.9, 0.0, False), (0.9, 0.1, False), (0.9, 0.0, True), (0.999, 0.5, False)]
] + [{"lr": 0.0}, {"lr": 1e38}, {"lr": torch.tensor(0.1)}]


@ALL_UPDATES
@pytest.mark.eager_on_gpu
def test_bits_agree_for_all_options(backend: str, device: torch.device, update: Update) -> None:
    """First steps and later ones, with any bits and with those of training."""
    sizes = [300, 1, 2100, 57, 400]
    for options in ADAM_OPTIONS if is_adam(update) else SGD_OPTIONS:
        rows = coefficients(update, len(sizes), options)
        check(usual(update, sizes, coefficients=rows), backend, device, options)
        check(hard(update, SPLIT32, SPLIT24, Start.CONTINUE, sizes, coefficients=rows), backend, device, options)


@pytest.mark.parametrize("update", [Update.ADAM, Update.AMSGRAD, Update.MOMENTUM], ids=lambda u: u.name.lower())
@pytest.mark.parametrize("huge", [1e25, 3e38, float("inf")], ids=str)
@pytest.mark.eager_on_gpu
def test_what_overflows(backend: str, device: torch.device, update: Update, huge: float) -> None:
    """Squares of gradients pass FP32's largest number; what comes of it is the same everywhere."""
    step = usual(update, [40, 5000], divisor=1e-5)
    for grad in step.grads:
        grad[::3] = huge
        grad[1::3] = -huge
    check(step, backend, device)


@pytest.mark.parametrize("update", list(Update), ids=lambda u: u.name.lower())
@pytest.mark.parametrize("is_decoupled", [True, False], ids=["decoupled", "coupled"])
@pytest.mark.eager_on_gpu
def test_an_infinite_weight_stays_without_decay(
    backend: str, device: torch.device, update: Update, is_decoupled: bool
) -> None:
    step = usual(update, [3000, 20])
    options: dict[str, Any] = {"weight_decay": 0.0} | (
        {"decoupled_weight_decay": is_decoupled} if is_adam(update) else {}
    )
    step.coefficients = coefficients(update, 2, options)
    for weight, residual in zip(step.weights, step.weight_residuals, strict=True):
        weight[::2], residual[::2] = torch.inf, 0
    found = step.to(device)
    found.run(backend)
    for weight, residual, *states in zip(*found.written, strict=True):
        assert (decode(SPLIT32, weight, residual)[::2] == torch.inf).all()
        assert all(state.isfinite().all() for state in states)


@ALL_UPDATES
@pytest.mark.eager_on_gpu
def test_zeros_of_either_sign(backend: str, device: torch.device, update: Update) -> None:
    """Each of weight, gradient and states is one or the other, in all ways; the bits of what comes of them."""
    zeros = torch.cartesian_prod(*[torch.tensor([0.0, -0.0])] * 5).repeat(70, 1).T.contiguous()
    step = usual(update, [zeros.shape[1]])
    step.weights[0][:], step.weight_residuals[0][:] = zeros[0], 0
    step.grads[0][:] = zeros[1]
    assert step.grad_residuals is not None
    step.grad_residuals[0][:] = 0
    for state, (tensor,) in zip(zeros[2:], step.states, strict=False):
        tensor[:] = state
    for options in ADAM_OPTIONS if is_adam(update) else SGD_OPTIONS:
        step.coefficients = coefficients(update, 1, options)
        check(step, backend, device, options)


@pytest.mark.eager_on_gpu
def test_a_nan_stays_the_maximum(backend: str, device: torch.device) -> None:
    """Of the states as of the gradients: max_exp_avg_sq is NaN from then on, as torch's is."""
    step = usual(Update.AMSGRAD, [3000, 20])
    for state in step.states[2]:
        state[0], state[1], state[2], state[3] = torch.nan, 0.0, torch.inf, 1e-30
    for grad in step.grads:
        grad[5] = torch.nan
    found = step.to(device)
    found.run(backend)
    for exp_avg_sq, maximum, before in zip(*found.states[1:], step.states[2], strict=True):
        assert maximum.isnan().nonzero().flatten().tolist() == [0, 5]
        assert maximum[2] == torch.inf
        rest = torch.tensor([i for i in range(len(before)) if i not in (0, 5)])
        assert torch.equal(maximum.cpu()[rest], torch.maximum(before, exp_avg_sq.cpu())[rest])
        assert (maximum.cpu()[rest] == exp_avg_sq.cpu()[rest]).any()  # both occur
        assert (maximum.cpu()[rest] == before[rest]).any()


# ---- what is skipped ---------------------------------------------------------------------------------------------


@ALL_UPDATES
@pytest.mark.parametrize("sizes", [[5000], [300, 0, 5000, 1]], ids=["alone", "list"])
@pytest.mark.parametrize("skip", [1.0, -1.0, 1e-45, float("inf"), float("nan")], ids=str)
@pytest.mark.eager_on_gpu
def test_nothing_is_written_where_the_step_is_skipped(
    backend: str, device: torch.device, update: Update, sizes: list[int], skip: float
) -> None:
    step = hard(update, SPLIT24, SPLIT24, Start.CONTINUE, sizes, skip=torch.tensor(skip))
    found = step.to(device)
    found.run(backend)
    for column, before in zip(found.written, step.written, strict=True):
        for tensor, unchanged in zip(column, before, strict=True):
            assert torch.equal(tensor.cpu().view(torch.int8), unchanged.view(torch.int8))


@ALL_UPDATES
@pytest.mark.parametrize("skip", [0.0, -0.0], ids=str)
@pytest.mark.eager_on_gpu
def test_a_zero_skips_nothing(backend: str, device: torch.device, update: Update, skip: float) -> None:
    for sizes in ([5000], [300, 0, 5000, 1]):
        step = usual(update, sizes, skip=torch.tensor(skip))
        check(step, backend, device)
        plain = step.to("cpu")
        plain.skip = None
        assert_stepped(by_reference(step, "eager", device), by_reference(plain, "eager", device))


# ---- lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["first", "middle", "last", "only", "all"])
def test_empty_tensors_anywhere_in_a_list(backend: str, device: torch.device, place: str) -> None:
    sizes = {"first": [0, 5, 9], "middle": [5, 0, 9], "last": [5, 9, 0], "only": [0], "all": [0, 0, 0]}[place]
    for update in Update:
        check(usual(update, sizes), backend, device)


@pytest.mark.parametrize("count", [1, 2, 3, 48, 49, 50, 98, 99, 300])
def test_lists(backend: str, device: torch.device, count: int) -> None:
    """Around the capacity of a launch, with empty tensors first, in the middle and last, and large ones."""
    sizes = torch.randint(0, 600, (count,)).tolist()
    if count > 2:
        sizes[1], sizes[-1] = 9_000 if is_interpreted(backend, device) else 70_000, 4096
        sizes = [0, *sizes[: count // 2], 0, *sizes[count // 2 :], 0]
    check(usual(Update.ADAM, sizes), backend, device)


# ---- what is read and written ------------------------------------------------------------------------------------

ROOM = 24  # elements around a tensor that must not be written


def slid(tensors: list[Tensor], shifts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return (buffers of 85s, views of them that hold the tensors)."""
    buffers = [torch.full((len(x) + ROOM,), 85, dtype=torch.int8, device=x.device).to(x.dtype) for x in tensors]
    views = [buffer[shift : shift + len(x)] for buffer, shift, x in zip(buffers, shifts, tensors, strict=True)]
    for view, x in zip(views, tensors, strict=True):
        view.copy_(x)
    return buffers, views


def slide(step: Step, shifts: list[list[int]]) -> list[tuple[Tensor, int]]:
    """Replace a step's tensors by views of buffers; ``shifts`` has a row for each column. Return (buffer, shift)s."""
    columns = [*step.written, step.grads, *([] if step.grad_residuals is None else [step.grad_residuals])]
    around = []
    for column, by in zip(columns, shifts, strict=False):
        buffers, column[:] = slid(column, by)
        around += list(zip(buffers, by, strict=True))
    return around


@ALL_UPDATES
@ALL_GRADS
def test_writes_its_range_and_nothing_else(
    backend: str, device: torch.device, update: Update, grad_format: Format, start: Start
) -> None:
    """Views slide over buffers of sentinels, all columns at once and each one alone: by themselves, and in one list."""
    together = [[shift] * 7 for shift in ((0, 1, 8) if is_interpreted(backend, device) else (0, 1, 2, 3, 5, 8, 13))]
    one_aside = [[16 if k == column else 0 for k in range(7)] for column in range(7)]
    one_aside = [[3 if shift == 16 else shift for shift in row] for row in one_aside]
    slides = [*together, *one_aside]
    numel = 2 * BLOCK_NUMEL + 5
    for some in [*([row] for row in slides), slides]:
        step = hard(update, SPLIT24, grad_format, start, [numel] * len(some))
        found = step.to(device)
        around = slide(found, [list(column) for column in zip(*some, strict=True)])
        found.run(backend)
        assert_stepped(found, by_reference(step, backend, device), some)
        for buffer, shift in around:
            assert (torch.cat([buffer[:shift], buffer[len(buffer) - ROOM + shift :]]) == 85).all(), some


def test_cpu_result_does_not_depend_on_threads() -> None:
    if available_backends()["cpu"] is not None:
        pytest.skip(f"backend cpu: {available_backends()['cpu']}")
    before = torch.get_num_threads()
    try:
        for update in Update:
            step = hard(update, SPLIT32, SPLIT24, Start.CONTINUE, [70_001, 3, 0, 200_000, 4096])
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                check(step, "cpu", torch.device("cpu"), f"{threads} threads")
    finally:
        torch.set_num_threads(before)
