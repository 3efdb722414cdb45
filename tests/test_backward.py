"""``acc.backward``: the gradient and the loss of the whole batch, in micro-batches that fit, whatever memory does."""

from __future__ import annotations

import copy
import gc
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import assert_same_bits
from scarce import Scarce
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F  # noqa: N812

import accumkern
from accumkern import any_batch, waiting
from accumkern.out_of_memory import MemoryLimitError
from accumkern.rank_window import RankWindow

BUFFERS = ["split24", "split32", "fp32"]
TOLERANCE = {"split24": 1e-4, "split32": 1e-6, "fp32": 1e-6}
BF16, FP32 = torch.bfloat16, torch.float32


def network(scarce: nn.Module | None = None, dtype: torch.dtype = BF16, *inside: nn.Module) -> nn.Sequential:
    """Return a network whose first layer's gradient arrives after the memory has run out, and its last one's before."""
    torch.manual_seed(3)
    scarce = Scarce(10**9) if scarce is None else scarce
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), scarce, *inside, nn.Linear(8, 1)).to(dtype)


def attached(model: nn.Module, buffer: str = "split24", **how: Any) -> accumkern.GradAccumulator:
    return accumkern.attach(torch.optim.SGD(model.parameters(), lr=0.1), buffer, **how)


def batch_of(samples: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 6, generator=generator)
    return x.to(dtype), torch.randn(samples, 1, generator=generator)


def loss_of(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda part: F.mse_loss(model(part[0]).float(), part[1])


def gradients(acc: accumkern.GradAccumulator, model: nn.Module) -> list[Tensor]:
    return [acc.gradient(param) for param in model.parameters()]  # type: ignore[misc]


def bits(acc: accumkern.GradAccumulator, model: nn.Module) -> list[Any]:
    return [part for param in model.parameters() for part in (acc.parts(param) or (None, None, None))[:2]]


def assert_equal_bits(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


# ---- the gradient and the loss of the whole batch ----------------------------------------------------------------


@pytest.mark.parametrize(("samples", "micro_batch"), [(8, 8), (8, 4), (10, 4), (7, 3), (5, 1), (3, 100), (13, "auto")])
def test_gradient_and_loss_are_those_of_the_whole_batch(samples: int, micro_batch: Any) -> None:
    model = network(dtype=FP32)
    whole = copy.deepcopy(model).double()
    acc, batch = attached(model), batch_of(samples, FP32)
    expected = F.mse_loss(whole(batch[0].double()), batch[1].double())
    expected.backward()
    loss = acc.backward(loss_of(model), batch, micro_batch)
    assert loss.shape == ()
    assert loss.dtype is FP32
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    for param, right in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(param.grad.double(), right.grad, rtol=1e-5, atol=1e-7)
    largest = samples if micro_batch == "auto" else min(samples, micro_batch)
    sizes = model[2].seen
    assert sum(sizes) == samples
    assert max(sizes) <= largest
    assert max(sizes) - min(sizes) <= 1  # as equal as can be
    assert len(sizes) == -(-samples // largest)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_micro_gradients_are_summed_in_fp32(buffer: str) -> None:
    model = network()
    acc = attached(model, buffer)
    arrived: list[Tensor] = []
    weight = model[0].weight
    weight.register_hook(lambda grad: arrived.append(grad.double()))
    acc.backward(loss_of(model), batch_of(64), 4)
    assert len(arrived) == 16
    error = (acc.gradient(weight).double() - sum(arrived)).norm() / sum(arrived).norm()  # type: ignore[union-attr]
    assert error < TOLERANCE[buffer]


def test_one_micro_batch_is_one_backward_bit_for_bit() -> None:
    model, batch = network(), batch_of(5)
    acc = attached(model)
    loss = acc.backward(loss_of(model), batch)
    found = bits(acc, model)
    model.zero_grad()
    stock = loss_of(model)(batch)
    stock.backward()
    assert torch.equal(loss, stock.detach())
    assert_equal_bits(found, bits(acc, model))


def test_a_loss_of_16_bits_is_weighed_in_fp32() -> None:
    model, batch = network(), batch_of(9)
    acc = attached(model)
    seeds: list[Tensor] = []

    def loss_fn(part: Any) -> Tensor:
        return F.mse_loss(model(part[0]), part[1].bfloat16())

    def backward(loss: Tensor) -> None:
        seeds.append(loss)
        loss.backward()

    mean = acc.backward(loss_fn, batch, 3, backward=backward)
    assert mean.dtype is FP32
    assert all(seed.dtype is FP32 for seed in seeds)


def test_sums_are_not_weighed() -> None:
    model, batch = network(dtype=FP32), batch_of(7, FP32)
    acc = attached(model)
    total = acc.backward(lambda part: (model(part[0]) - part[1]).square().sum(), batch, 3, reduction="sum")
    found = gradients(acc, model)
    model.zero_grad()
    whole = (model(batch[0]) - batch[1]).square().sum()
    whole.backward()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(found, gradients(acc, model), rtol=1e-5, atol=1e-6)


# ---- what a mean is over -----------------------------------------------------------------------------------------


def ragged(samples: int = 6) -> dict[str, Any]:
    """Return sequences of which less and less counts, and of the last samples nothing."""
    generator = torch.Generator().manual_seed(1)
    length = torch.arange(samples).neg().add(samples - 2).clamp(min=0)
    labels = torch.randn(samples, 4, generator=generator)
    return {
        "x": torch.randn(samples, 4, 6, generator=generator),
        "labels": labels,
        "mask": torch.arange(4) < length[:, None],
    }


def masked(model: nn.Module) -> Callable[[Any], Tensor]:
    return lambda part: (model(part["x"])[..., 0] - part["labels"])[part["mask"]].square().mean()


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 6])
def test_means_over_tokens_are_weighed_by_tokens(micro_batch: int, kind: Any) -> None:
    model, batch = network(dtype=FP32), ragged()
    acc = attached(model)
    loss = acc.backward(masked(model), batch, micro_batch, count=lambda part: kind(int(part["mask"].sum())))
    found = gradients(acc, model)
    model.zero_grad()
    whole = masked(model)(batch)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    torch.testing.assert_close(found, gradients(acc, model), rtol=1e-5, atol=1e-7)
    assert len(model[2].seen) == {1: 4, 2: 2, 4: 2, 6: 1}[micro_batch] + 1  # parts that count nothing are left out


@pytest.mark.parametrize(("counts_each", "micro_batch"), [(False, 4), (True, 4), (True, 2)])
def test_several_losses_have_means_of_their_own(counts_each: bool, micro_batch: int) -> None:
    """Of the last part of two, no token counts: its mean over them is NaN."""
    model, batch = network(dtype=FP32), ragged()

    def loss_fn(part: Any) -> dict[str, Tensor]:
        return {"tokens": masked(model)(part), "penalty": model(part["x"]).square().mean()}

    def count(part: Any) -> dict[str, Any]:
        return {"tokens": part["mask"].sum(), "penalty": len(part["x"])}

    if not counts_each:  # then all parts have to count alike
        batch["mask"][:] = True
    acc = attached(model)
    losses = acc.backward(loss_fn, batch, micro_batch, count=count if counts_each else None)
    found = gradients(acc, model)
    model.zero_grad()
    whole = loss_fn(batch)
    sum(whole.values()).backward()  # type: ignore[union-attr]
    assert list(losses) == ["tokens", "penalty"]
    for name in losses:
        torch.testing.assert_close(losses[name], whole[name].detach())
    torch.testing.assert_close(found, gradients(acc, model), rtol=1e-5, atol=1e-7)


def test_losses_in_a_tuple_come_back_in_one() -> None:
    model, batch = network(dtype=FP32), batch_of(6, FP32)
    acc = attached(model)
    first, second = acc.backward(
        lambda part: (loss_of(model)(part), torch.zeros(())), batch, 4, count=lambda part: (len(part[0]), 1)
    )
    torch.testing.assert_close(first, loss_of(model)(batch).detach())
    assert second == 0


# ---- memory that runs out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_comes_out_is_what_the_size_that_fits_would_have_given(where: str, after: int, buffer: str) -> None:
    """Bit for bit, with dropout, which draws the same numbers again."""
    scarce = Scarce(3, where, after)
    model, batch = network(scarce, BF16, nn.Dropout(0.5)), batch_of(14)
    acc = attached(model, buffer)
    acc.micro_batch = 7 if after else None  # then it is not the first part that fails
    torch.manual_seed(5)
    loss = acc.backward(loss_of(model), batch)
    found = bits(acc, model)
    drawn = torch.rand(1)
    failed = [7] * (after + 1) if after else [14, 7]
    assert scarce.seen == [*failed, 3, 3, 3, 3, 2]
    assert acc.micro_batch == 3

    model.zero_grad()
    torch.manual_seed(5)
    again = acc.backward(loss_of(model), batch, 3)
    assert torch.equal(loss, again)
    assert_equal_bits(found, bits(acc, model))
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_gradients_that_were_there_are_kept(where: str, buffer: str) -> None:
    scarce = Scarce(4, where, after=6)  # the gradients before, and two parts
    model = network(scarce)
    acc = attached(model, buffer)
    for seed in (1, 2, 3, 4):
        loss_of(model)(batch_of(seed)).backward()
    earlier = [part if part is None else part.clone() for part in bits(acc, model)]
    tensors = [param.grad for param in model.parameters()]
    acc.micro_batch = 6
    acc.backward(loss_of(model), batch_of(18))
    assert scarce.seen[4:] == [6, 6, 6, 3, 3, 3, 3, 3, 3]
    assert all(param.grad is grad for param, grad in zip(model.parameters(), tensors, strict=True))
    found = bits(acc, model)

    for param in model.parameters():
        param.grad = None
    for seed in (1, 2, 3, 4):
        loss_of(model)(batch_of(seed)).backward()
    assert_equal_bits(bits(acc, model), earlier)
    acc.backward(loss_of(model), batch_of(18), 3)
    assert_equal_bits(found, bits(acc, model))


def test_the_size_that_fitted_is_remembered() -> None:
    scarce = Scarce(5)
    model = network(scarce)
    acc = attached(model)
    assert acc.micro_batch is None
    acc.backward(loss_of(model), batch_of(4))
    assert acc.micro_batch is None  # nothing was learnt about larger ones
    acc.backward(loss_of(model), batch_of(16))
    assert acc.micro_batch == 4
    scarce.seen.clear()
    acc.backward(loss_of(model), batch_of(16))
    acc.backward(loss_of(model), batch_of(3))
    assert scarce.seen == [4, 4, 4, 4, 3]
    scarce.seen.clear()
    acc.micro_batch = None
    acc.backward(loss_of(model), batch_of(5))
    assert scarce.seen == [5]
    assert accumkern.accumulator_of(acc._optimizer).micro_batch is None


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "auto", True])
def test_a_wrong_size_to_remember_is_refused(wrong: Any) -> None:
    acc = attached(network())
    with pytest.raises((TypeError, ValueError), match=r"micro_batch is .*; it must be a positive number of samples"):
        acc.micro_batch = wrong


@pytest.mark.parametrize("how", ["auto", 1])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("with_earlier", [False, True])
def test_one_sample_that_does_not_fit_is_an_error_that_changes_nothing(
    with_earlier: bool, where: str, how: Any
) -> None:
    scarce = Scarce(0, where, after=3 if with_earlier else 0)
    model = network(scarce)
    acc = attached(model)
    if with_earlier:
        for seed in (1, 2, 3):
            loss_of(model)(batch_of(seed)).backward()
    before = [part if part is None else part.clone() for part in bits(acc, model)]
    state = torch.get_rng_state(), random.getstate()
    with pytest.raises(torch.OutOfMemoryError) as raised:
        acc.backward(loss_of(model), batch_of(4), how)
    if how == "auto" and hasattr(raised.value, "__notes__"):
        assert "a micro-batch of one sample: use activation checkpointing" in raised.value.__notes__[0]
    assert_equal_bits(bits(acc, model), before)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    scarce.most = 4
    acc.backward(loss_of(model), batch_of(4))
    assert model[0].weight.grad is not None


def test_another_error_is_raised_as_it_is_and_changes_nothing() -> None:
    model = network()
    acc = attached(model)
    parts = []

    def loss_fn(part: Any) -> Tensor:
        parts.append(len(part[0]))
        if len(parts) == 3:
            raise ArithmeticError("mine")
        return loss_of(model)(part)

    with pytest.raises(ArithmeticError, match="mine"):
        acc.backward(loss_fn, batch_of(8), 2)
    assert parts == [2, 2, 2]
    assert all(param.grad is None for param in model.parameters())


def test_the_size_asked_for_is_not_changed() -> None:
    model = network(Scarce(3))
    acc = attached(model)
    with pytest.raises(torch.OutOfMemoryError):
        acc.backward(loss_of(model), batch_of(8), 4)
    assert model[2].seen == [4]
    assert acc.micro_batch is None


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_waits_to_be_folded_does_not_count_twice(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a failed pass leaves gradients that wait."""
    model = network(Scarce(3, where, after=1))
    acc, batch = attached(model), batch_of(12)
    monkeypatch.setattr(waiting, "WAITING_DEVICE_TYPES", frozenset({"cpu"}))
    acc.micro_batch = 6
    arrived: list[Any] = []
    held: list[int] = []

    def loss_fn(part: Any) -> Tensor:
        held.append(sum(not memory.expired() for memory in arrived))
        return loss_of(model)(part)

    model[3].weight.register_hook(lambda grad: arrived.append(StorageWeakRef(grad.untyped_storage())))
    acc.backward(loss_fn, batch)
    assert held[2] == 0  # as it begins again
    model[3].weight._backward_hooks.popitem()
    found = bits(acc, model)
    model.zero_grad()
    acc.backward(loss_of(model), batch, 3)
    assert_equal_bits(found, bits(acc, model))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_of_the_failed_window_is_held(where: str) -> None:
    """Not by the error's frames either, nor by what a failed backward pass has left in autograd's queue."""
    memory: list[StorageWeakRef] = []
    model = network(Scarce(2, where), BF16, nn.Linear(8, 8), nn.Tanh())
    # Branches: while one fails, the others wait for their turn.
    side = nn.ModuleList(nn.Linear(8, 1) for _ in range(3)).to(BF16)
    for module in (*model, *side):
        module.register_forward_hook(lambda _m, _i, out: memory.append(StorageWeakRef(out.untyped_storage())))
    acc = accumkern.attach(torch.optim.SGD([*model.parameters(), *side.parameters()], lr=0.1))
    held: list[int] = []

    def loss_fn(part: Any) -> Tensor:
        held.append(sum(not reference.expired() for reference in memory))
        hidden = model[1](model[0](part[0]))
        outputs = [one(hidden.exp()) for one in side] + [model[2:](hidden)]
        return sum(F.mse_loss(output.float(), part[1]) for output in outputs)  # type: ignore[return-value]

    acc.backward(loss_fn, batch_of(8))
    assert len(memory) > 40
    assert held == [0] * (2 + 4)


def test_circles_of_the_failed_window_are_collected() -> None:
    memory: list[StorageWeakRef] = []
    model = network(Scarce(4))
    held: list[int] = []

    def loss_fn(part: Any) -> Tensor:
        held.append(sum(not reference.expired() for reference in memory))
        circle: list[Any] = [torch.zeros(100)]
        circle.append(circle)
        memory.append(StorageWeakRef(circle[0].untyped_storage()))
        return loss_of(model)(part)

    gc.disable()
    try:
        attached(model).backward(loss_fn, batch_of(8))
    finally:
        gc.enable()
    assert held == [0, 0, 1]  # a part that went through waits for Python's collector, as always


@pytest.mark.parametrize("memory_ran_out", [True, False])
def test_what_a_retry_raises_names_the_memory_that_led_to_it(memory_ran_out: bool) -> None:
    model = network(Scarce(1 if memory_ran_out else 9), FP32, nn.BatchNorm1d(8))
    acc = attached(model)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as raised:
        acc.backward(loss_of(model), batch_of(4 if memory_ran_out else 1, FP32), model=model)
    cause = raised.value.__cause__
    if not memory_ran_out:
        assert cause is None
        return
    assert isinstance(cause, MemoryError)
    assert str(cause).startswith("memory ran out with micro-batches of 2 samples: OutOfMemoryError: ")
    assert str(cause).endswith("Tried to allocate 2 samples.")
    assert model[2].seen == [4, 2, 1]


def test_what_a_retry_raises_keeps_a_cause_of_its_own() -> None:
    model = network(Scarce(2))

    def loss_fn(part: Any) -> Tensor:
        if len(part[0]) == 2:
            raise ValueError("of two") from KeyError("own")
        return loss_of(model)(part)

    with pytest.raises(ValueError, match="of two") as raised:
        attached(model).backward(loss_fn, batch_of(4))
    assert isinstance(raised.value.__cause__, KeyError)


# ---- a limit on the CPU ------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype = BF16) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 4096), nn.GELU(), nn.Linear(4096, 1)).to(dtype)


@pytest.mark.parametrize("masters", [None, "split32"])
def test_under_a_limit_of_memory_the_cpu_splits_too(masters: str | None) -> None:
    model, batch = wide(), batch_of(64)
    acc = attached(model, master_weights=masters)
    loss = acc.backward(loss_of(model), batch, memory="1MB")
    found, size = bits(acc, model), acc.micro_batch
    assert size is not None
    assert 1 <= size < 64
    model.zero_grad()
    assert torch.equal(loss, acc.backward(loss_of(model), batch, size))
    assert_equal_bits(found, bits(acc, model))
    acc.micro_batch = None
    acc.backward(loss_of(model), batch)
    assert acc.micro_batch is None  # no limit any more


def test_a_limit_that_one_sample_exceeds_is_an_error() -> None:
    model = wide()
    with pytest.raises(MemoryLimitError, match="of 150 kB"):
        attached(model).backward(loss_of(model), batch_of(4), memory="150kB")
    with pytest.raises(ValueError, match="memory is '1 lot'"):
        attached(wide()).backward(loss_of(model), batch_of(4), memory="1 lot")


# ---- what a retry does to the rest of the model ------------------------------------------------------------------


@pytest.mark.parametrize("is_given", [True, False])
def test_running_statistics_go_back_where_the_model_is_given(is_given: bool) -> None:
    scarce = Scarce(4, "backward")
    model = network(scarce, FP32, nn.BatchNorm1d(8))
    batch = batch_of(8, FP32)
    acc = attached(model)
    acc.backward(loss_of(model), batch, model=model if is_given else None)
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert int(found["3.num_batches_tracked"]) == (2 if is_given else 3)

    again = network(Scarce(4), FP32, nn.BatchNorm1d(8))
    attached(again).backward(loss_of(again), batch, 4)
    is_same = torch.equal(found["3.running_mean"], again[3].running_mean)
    assert is_same is is_given
    # It normalises by the samples of a micro-batch, either way.
    torch.testing.assert_close(model[0].weight.grad, again[0].weight.grad)


def test_numbers_of_python_and_numpy_are_drawn_again() -> None:
    numpy = pytest.importorskip("numpy")
    model = network(Scarce(2, "backward"))
    drawn: list[tuple[float, float]] = []

    def loss_fn(part: Any) -> Tensor:
        drawn.append((random.random(), float(numpy.random.rand())))
        return loss_of(model)(part)

    attached(model).backward(loss_fn, batch_of(4))
    assert len(drawn) == 3
    assert drawn[1] == drawn[0]


# ---- with the rest of accumkern and of torch ---------------------------------------------------------------------


def test_the_noise_scale_is_of_the_window_that_was_kept() -> None:
    model = network(Scarce(4, after=1))
    acc = attached(model, stats=True)
    acc.micro_batch = 8
    acc.backward(loss_of(model), batch_of(16))
    found = acc.noise_scale().window
    model.zero_grad()
    acc.backward(loss_of(model), batch_of(16), 4)
    assert acc.noise_scale().window == found


def test_a_window_begun_again_in_its_middle_has_no_noise_scale() -> None:
    model = network(Scarce(4, after=2))
    acc = attached(model, stats=True)
    loss_of(model)(batch_of(4)).backward()
    acc.micro_batch = 8
    acc.backward(loss_of(model), batch_of(16))
    with pytest.raises(RuntimeError, match="the noise scale is unknown"):
        acc.noise_scale()


def test_the_report_is_of_the_window_that_was_kept() -> None:
    model = network(Scarce(4, after=1))
    acc = attached(model, report=True)
    acc.micro_batch = 8
    acc.backward(loss_of(model), batch_of(16))
    found = str(acc.report())
    model.zero_grad()
    acc.backward(loss_of(model), batch_of(16), 4)
    assert str(acc.report()) == found


def test_finish_and_step_with_masters() -> None:
    def trained(micro_batch: Any, most: int) -> list[Tensor]:
        model = network(Scarce(most, "backward"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        acc = accumkern.attach(optimizer, master_weights="split32")
        for seed in range(1, 4):
            acc.backward(loss_of(model), batch_of(4 * seed), micro_batch)
            acc.finish(max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
        return [acc.master_weight(param) for param in model.parameters()]

    assert_equal_bits(trained("auto", 2), trained(2, 10**9))


@pytest.mark.parametrize("is_given", [True, False])
def test_two_optimizers_on_one_model(is_given: bool) -> None:
    """The parameters of the other one are put back where the model is given, attached or not."""
    for other_is_attached in (True, False):
        model = network(Scarce(4, "backward"), FP32)
        first, second = list(model[0].parameters()), list(model[3].parameters())
        acc = accumkern.attach(torch.optim.SGD(first, lr=0.1))
        other = torch.optim.SGD(second, lr=0.1)
        if other_is_attached:
            accumkern.attach(other)
        acc.backward(loss_of(model), batch_of(8, FP32), model=model if is_given else None)
        right = network(dtype=FP32)
        loss_of(right)(batch_of(8, FP32)).backward()
        torch.testing.assert_close(first[0].grad, right[0].weight.grad)
        # The last layer had its gradient when memory ran out. Whoever does not give the model has it twice.
        is_right = torch.allclose(second[0].grad, right[3].weight.grad, rtol=1e-4)  # type: ignore[arg-type]
        assert is_right is is_given


def test_a_backward_of_ones_own() -> None:
    model, batch = network(dtype=FP32), batch_of(6, FP32)
    acc = attached(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    loss = acc.backward(loss_of(model), batch, 2, backward=lambda loss: scaler.scale(loss).backward())
    scaler.unscale_(acc._optimizer)
    found = gradients(acc, model)
    model.zero_grad()
    whole = loss_of(model)(batch)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    torch.testing.assert_close(found, gradients(acc, model))


def test_frozen_and_unused_parameters_stay_without_a_gradient() -> None:
    model = network(Scarce(2))
    model[3].bias.requires_grad_(False)
    unused = nn.Parameter(torch.zeros(3))
    acc = accumkern.attach(torch.optim.SGD([*model.parameters(), unused], lr=0.1))
    acc.backward(loss_of(model), batch_of(8))
    assert model[3].bias.grad is None
    assert unused.grad is None


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"loss_fn": 3}, TypeError, "loss_fn is a int; it must be a function of a micro-batch that returns its loss"),
        ({"count": 3}, TypeError, "count is a int; it must be a function, or None"),
        ({"split": 3}, TypeError, "split is a int; it must be a function, or None"),
        ({"backward": 3}, TypeError, "backward is a int; it must be a function, or None"),
        ({"model": 3}, TypeError, r"model is a int; it must be a torch\.nn\.Module, or None"),
        ({"reduction": "none"}, ValueError, "reduction is 'none'; it must be one of mean, sum"),
        ({"micro_batch": "all"}, ValueError, "micro_batch is 'all'; it must be one of auto, or a number of samples"),
        ({"micro_batch": 0}, ValueError, "micro_batch is 0; it must be 'auto' or a positive number of samples"),
        ({"micro_batch": 1.5}, TypeError, "micro_batch is a float; it must be 'auto' or a positive number of samples"),
        ({"count": lambda _: -1}, ValueError, "count returned -1; count must return a number that is not negative"),
        ({"count": lambda _: 0}, ValueError, "count returned 0 for all parts; a mean needs something to be of"),
        ({"count": lambda _: "3"}, TypeError, "what count returned is a str; count must return a number"),
        ({"count": lambda _: torch.ones(2)}, ValueError, r"count returned a tensor of shape \(2,\)"),
        ({"count": lambda _: float("nan")}, ValueError, "count returned nan"),
        ({"count": lambda _: {"a": 1}}, ValueError, r"count returned numbers for \['a'\], and loss_fn losses for"),
        ({"loss_fn": lambda _: 1.0}, TypeError, "loss_fn returned a float; it must return the mean loss"),
        ({"loss_fn": lambda _: torch.ones(2)}, ValueError, r"loss_fn returned a tensor of shape \(2,\)"),
        ({"loss_fn": lambda _: torch.ones(())}, ValueError, "loss_fn returned a loss without a graph"),
        ({"loss_fn": lambda _: ()}, ValueError, "loss_fn returned no loss"),
        ({"loss_fn": lambda _: torch.ones((), dtype=torch.int64)}, TypeError, r"loss_fn returned a torch\.int64 tens"),
    ],
)
def test_wrong_arguments_are_named(how: dict[str, Any], error: type[Exception], message: str) -> None:
    model = network()
    arguments: dict[str, Any] = {"loss_fn": loss_of(model), "batch": batch_of(4), "micro_batch": 2, **how}
    with pytest.raises(error, match=message):
        attached(model).backward(**arguments)
    assert all(param.grad is None for param in model.parameters())


def test_gradients_that_are_multiplied_already_are_refused() -> None:
    model = network()
    acc = attached(model, average_over=4)
    with pytest.raises(ValueError, match=r"scale is 0\.25; backward\(\) weighs micro-batches itself"):
        acc.backward(loss_of(model), batch_of(4))


def test_a_detached_accumulator_is_refused() -> None:
    model = network()
    acc = attached(model)
    acc.detach()
    with pytest.raises(RuntimeError, match="detached"):
        acc.backward(loss_of(model), batch_of(4))


# ---- what others hold, and what a try has changed -----------------------------------------------------------------


def test_earlier_gradients_that_share_memory_keep_their_residuals() -> None:
    """As those in a bucket: the version of one is the version of all."""

    def sums(micro_batch: Any, most: int) -> tuple[list[Any], list[Any]]:
        scarce = Scarce(most, "backward", after=2)
        model = network(scarce)
        acc = attached(model)
        flat = torch.zeros(sum(param.numel() for param in model.parameters()), dtype=BF16)
        offset = 0
        for param in model.parameters():
            param.grad = flat[offset : offset + param.numel()].view_as(param)
            offset += param.numel()
        for seed in (1, 2):
            loss_of(model)(batch_of(seed)).backward()
        before = [part if part is None else part.clone() for part in bits(acc, model)]
        acc.backward(loss_of(model), batch_of(8), micro_batch)
        return before, bits(acc, model)

    (before, retried), (same, right) = sums("auto", 4), sums(4, 10**9)
    assert_equal_bits(before, same)
    assert any(part is not None and part.dtype is torch.int8 for part in before)
    assert_equal_bits(retried, right)


class Counts(nn.Module):
    """Has buffers that are replaced, resized, made and left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("largest", torch.zeros(0))
        self.register_buffer("expanded", torch.zeros(1).expand(4))
        self.register_buffer("late", None)
        with torch.inference_mode():
            self.register_buffer("inferred", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen = self.seen + len(x)
            self.largest.resize_(8).copy_(x.detach().amax(0).float())
            self.late = x.detach()[0]
        return x


def test_buffers_that_are_replaced_resized_or_made_go_back() -> None:
    counts = Counts()
    model = network(Scarce(4, "backward"), FP32, counts)
    before = dict(counts.named_buffers())
    acc = attached(model)

    def fails_after_the_model(part: Any) -> Tensor:
        loss_of(model)(part)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        acc.backward(fails_after_the_model, batch_of(8, FP32), model=model)
    assert counts.seen is before["seen"]
    assert counts.late is None
    assert counts.largest.shape == (0,)
    acc.backward(loss_of(model), batch_of(8, FP32), model=model)
    assert counts.seen == 8


def test_losses_come_back_in_the_order_of_loss_fn() -> None:
    model = network(dtype=FP32)
    acc = attached(model)
    mask = torch.tensor([0, 0, 1, 1])  # nothing of the first part counts for the first loss
    first, second = acc.backward(
        lambda part: (0 * model(part[0]).sum() + 1, 0 * model(part[0]).sum() + 2),
        (*batch_of(4, FP32), mask),
        2,
        count=lambda part: (part[2].sum(), len(part[0])),
    )
    assert (first, second) == (1, 2)


def test_a_batch_that_loss_fn_has_changed_cannot_begin_again() -> None:
    model = network(Scarce(4, "backward"), FP32)

    def in_place(part: Any) -> Tensor:
        part["x"].mul_(2)
        return F.mse_loss(model(part["x"]), part["y"])

    x, y = batch_of(8, FP32)
    acc = attached(model)
    with pytest.raises(RuntimeError, match=r"loss_fn has changed batch\['x'\] in place; let it work on a copy"):
        acc.backward(in_place, {"x": x, "y": y})
    assert model[0].weight.grad is None
    acc.backward(in_place, {"x": x, "y": y}, 4)  # where nothing has to begin again it is nobody's business


def test_leaves_in_the_batch_get_their_gradient_once() -> None:
    model = network(Scarce(4, "backward"), FP32)
    x, y = batch_of(8, FP32)
    x.requires_grad_(True)
    attached(model).backward(loss_of(model), (x, y))
    right = network(dtype=FP32)
    again = x.detach().clone().requires_grad_(True)
    loss_of(right)((again, y)).backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_a_part_without_a_graph_adds_nothing() -> None:
    """As of detection, where a part may have nothing to detect."""
    model = network(dtype=FP32)
    acc = attached(model)

    def loss_fn(part: Any) -> Tensor:
        return torch.zeros(()) if part[1][0] < 0 else loss_of(model)(part)

    x, _ = batch_of(8, FP32)
    y = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])[:, None]
    loss = acc.backward(loss_fn, (x, y), 4)
    found = gradients(acc, model)
    model.zero_grad()
    right = loss_of(model)((x[:4], y[:4])) / 2
    right.backward()
    torch.testing.assert_close(loss, right.detach())
    torch.testing.assert_close(found, gradients(acc, model))
    with pytest.raises(ValueError, match="a loss without a graph; it must return"):
        acc.backward(lambda part: torch.zeros(()), (x, y), 4)
    with torch.no_grad(), pytest.raises(ValueError, match=r"without a graph: gradients are off here, by no_grad\(\)"):
        acc.backward(loss_of(model), (x, y), 4)
    with torch.no_grad():
        acc.backward(torch.enable_grad()(loss_of(model)), (x, y), 4)


def test_a_call_that_fails_at_once_leaves_a_deferred_step_alone() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    acc = accumkern.attach(optimizer, master_weights="split32")
    acc.backward(loss_of(model), batch_of(8), 4)
    acc.finish(divide_by=2.0, defer=True)
    with pytest.raises(ZeroDivisionError):
        acc.backward(lambda _: 1 / 0, batch_of(8))
    with pytest.raises(RuntimeError, match="already since the last backward pass"):
        acc.finish()
    optimizer.step()


def test_the_report_of_a_window_begun_again_in_its_middle_is_right() -> None:
    model = network(Scarce(4, after=3))
    acc = attached(model, report=True)
    loss_of(model)(batch_of(4)).backward()
    acc.micro_batch = 8
    acc.backward(loss_of(model), batch_of(32))
    assert acc.report().error < 1e-3


def test_an_error_that_somebody_keeps_keeps_no_activations() -> None:
    memory: list[StorageWeakRef] = []
    kept: list[BaseException] = []
    held: list[int] = []
    model = network(Scarce(4))
    model[0].register_forward_hook(lambda _m, _i, out: memory.append(StorageWeakRef(out.untyped_storage())))

    def loss_fn(part: Any) -> Tensor:
        held.append(sum(not reference.expired() for reference in memory))
        try:
            return loss_of(model)(part)
        except torch.OutOfMemoryError as error:
            kept.append(error)
            raise

    attached(model).backward(loss_fn, batch_of(8))
    assert len(kept) == 1
    assert held == [0, 0, 0]


def test_sparse_gradients_count_for_a_limit() -> None:
    model = nn.Embedding(100, 8, sparse=True)
    acc = attached(model)
    tokens = torch.arange(12).reshape(4, 3)
    acc.backward(lambda part: model(part).square().mean(), tokens, memory="1GB")
    acc.backward(lambda part: model(part).square().mean(), tokens, memory="1GB")
    assert acc.memory().gradients >= model.weight.grad._values().nbytes


def test_a_loss_that_counts_on_other_ranks_alone_is_zero_here() -> None:
    model = network(dtype=FP32)
    acc = attached(model)

    class OneOfTwo(RankWindow):
        def whole(self, counts: Any) -> Any:
            return {"tokens": 3.0, "samples": counts["samples"]}

    def loss_fn(part: Any) -> dict[str, Tensor]:
        loss = loss_of(model)(part)
        return {"tokens": loss * math.nan, "samples": loss}

    def count(part: Any) -> dict[str, int]:
        return {"tokens": 0, "samples": len(part[0])}

    batch = batch_of(4, FP32)
    asked = any_batch.check_request(loss_fn, batch, 2, None, count, None, "mean", None, None)
    losses, _ = any_batch.run(asked, acc._attachment, model, OneOfTwo())
    assert losses["tokens"] == 0
    torch.testing.assert_close(losses["samples"], loss_of(model)(batch).detach())
