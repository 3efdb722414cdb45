"""The fused step looks at lists of parameters that lie as they did, and does what it does with one by one."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gradients import assert_same_bits
from ranks import Ranks, device
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import accumkern
from accumkern import backends
from accumkern.fused_step import FusedStep

SHAPES = [(3, 5), (7,), (4, 1, 2), (), (0, 3), (16, 16)]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "AMSGrad": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2),
    "momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, dampening=0.1),
}


def spread(tensor: Tensor) -> Tensor:
    """Return a DTensor over all ranks, each with as many rows, or all.

    Not some with fewer rows: torch 2.10 adds up gradients that are cut so as ones that every rank has whole.
    """
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    is_even = tensor.dim() and tensor.shape[0] % dist.get_world_size() == 0
    return distribute_tensor(tensor.to(device()), mesh, [Shard(0) if is_even else Replicate()])


def held(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Training:
    """Parameters in two groups, some of them FP32, with masters and an optimizer.

    Args:
        make: makes an optimizer.
        place: returns what a parameter or a gradient is made of.
    """

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], place: Callable[[Tensor], Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.place = place
        weights = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES * 2]
        weights.append(torch.randn(5, generator=generator))
        self.params = [nn.Parameter(place(weight)) for weight in weights]
        half = len(SHAPES)
        self.optimizer = make([{"params": self.params[:half]}, {"params": self.params[half:]}])
        self.acc = accumkern.attach(self.optimizer, "split24", master_weights="split32")

    def backward(self, seed: int, micro_batches: int = 2) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(micro_batches):
            grads = [self.place(torch.randn(param.shape, generator=generator).to(param.dtype)) for param in self.params]
            torch.autograd.backward(self.params, grads)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bits(self) -> list[Tensor]:
        masters = [self.acc.master_weight(param) for param in self.params]
        states = [
            state[name] for state in (self.optimizer.state[p] for p in self.params) for name in sorted(state)
            if isinstance(state[name], Tensor)
        ]  # fmt: skip
        with torch.no_grad():
            return [held(tensor).clone() for tensor in (*self.params, *masters, *states)]


# ---- what may happen between two steps -----------------------------------------------------------------------------


@torch.no_grad()
def weight_is_written(training: Training) -> None:
    training.params[0].mul_(1.5)


@torch.no_grad()
def weight_is_written_in_part(training: Training) -> None:
    training.params[5][0].add_(1.0)


def weight_is_seen_transposed(training: Training) -> None:
    training.params[5].data = training.params[5].data.t()


def weight_is_another_tensor(training: Training) -> None:
    training.params[5].data = training.params[5].data.clone() * 2


def weight_is_transposed(training: Training) -> None:
    training.params[5].data = training.params[5].data.t().contiguous().t()


@torch.no_grad()
def gradient_is_written(training: Training) -> None:
    grad = training.params[1].grad
    if grad is not None:
        grad.mul_(0.5)


def gradient_is_another_tensor(training: Training) -> None:
    param = training.params[5]
    if param.grad is not None:
        param.grad = torch.full_like(param, 0.25)


def gradient_is_missing(training: Training) -> None:
    training.params[2].grad = None


def state_is_replaced(training: Training) -> None:
    for state in training.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value.clone()


def state_is_seen_transposed(training: Training) -> None:
    state = training.optimizer.state.get(training.params[5], {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() == 2:
            state[name] = value.t()


def state_is_loaded(training: Training) -> None:
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def state_is_gone(training: Training) -> None:
    training.optimizer.state.pop(training.params[0], None)


def state_of_the_last_group_is_gone(training: Training) -> None:
    training.optimizer.state.pop(training.params[-2], None)


def options_are_others(training: Training) -> None:
    training.optimizer.param_groups[0]["lr"] *= 0.5
    training.optimizer.param_groups[1]["weight_decay"] = 0.3


def update_is_another(training: Training) -> None:
    group = training.optimizer.param_groups[0]
    if "momentum" in group:
        group["momentum"] = 0.0 if group["momentum"] else 0.9


def parameters_change_places(training: Training) -> None:
    training.optimizer.param_groups[0]["params"].reverse()


def optimizer_is_checkpointed(training: Training) -> None:
    training.acc.load_state_dict(copy.deepcopy(training.acc.state_dict()))


EVENTS = [
    weight_is_written,
    weight_is_written_in_part,
    weight_is_seen_transposed,
    weight_is_another_tensor,
    weight_is_transposed,
    gradient_is_written,
    gradient_is_another_tensor,
    gradient_is_missing,
    state_is_replaced,
    state_is_seen_transposed,
    state_is_loaded,
    state_is_gone,
    state_of_the_last_group_is_gone,
    options_are_others,
    update_is_another,
    parameters_change_places,
    optimizer_is_checkpointed,
]


@torch.no_grad()
def shard_is_written(training: Training) -> None:
    held(training.params[5]).mul_(1.5)


@torch.no_grad()
def shard_of_the_gradient_is_written(training: Training) -> None:
    grad = training.params[5].grad
    if grad is not None:
        held(grad).mul_(0.5)


def gradient_is_on_every_rank(training: Training) -> None:
    grad: Any = training.params[5].grad
    if grad is not None:
        training.params[5].grad = grad.redistribute(placements=[Replicate()])


def state_is_on_every_rank(training: Training) -> None:
    state = training.optimizer.state.get(training.params[5], {})
    for name, value in state.items():
        if isinstance(value, DTensor):
            state[name] = value.redistribute(placements=[Replicate()])


def gradient_is_a_term_of_a_sum(training: Training) -> None:
    grad: Any = training.params[3].grad
    if grad is not None:
        training.params[3].grad = DTensor.from_local(held(grad), grad.device_mesh, [Partial()])


def groups_change_places(training: Training) -> None:
    one, other = training.optimizer.param_groups
    one["params"], other["params"] = other["params"], one["params"]


EVENTS_OF_SHARDS = [
    *EVENTS,
    shard_is_written,
    shard_of_the_gradient_is_written,
    gradient_is_on_every_rank,
    state_is_on_every_rank,
    gradient_is_a_term_of_a_sum,
]


def trained(
    make: Callable[[Any], torch.optim.Optimizer],
    events: list[list[Any]],
    place: Callable[[Tensor], Tensor] = torch.clone,
    every: int = 5,
) -> Training:
    """Train for a window and a step for each list of events, which happen between the backward passes and the step.

    Each window that is a multiple of ``every`` has one micro-batch, and the others two.
    """
    training = Training(make, place)
    for number, some in enumerate(events):
        training.backward(number, micro_batches=1 if (number + 1) % every == 0 else 2)
        for event in some:
            event(training)
        training.step()
    return training


# ---- tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["extension", "python"])
def layouts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which layouts are compared."""
    if request.param:
        if backends.available_backends()["cpu"] is not None:
            pytest.skip(str(backends.available_backends()["cpu"]))
    else:
        monkeypatch.setattr("accumkern.fused_step.layout_function", lambda: backends._layout)


@pytest.mark.usefixtures("layouts")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_between_steps_lists_do_what_one_by_one_does(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    events = [[chance.choice(EVENTS)] if chance.random() < 0.4 else [] for _ in range(40)]
    found = trained(OPTIMIZERS[name], events)
    monkeypatch.setattr(FusedStep, "_as_before", lambda *_: None)
    expected = trained(OPTIMIZERS[name], events)
    for one, other in zip(found.bits(), expected.bits(), strict=True):
        assert_same_bits(one, other, [[event.__name__ for event in some] for some in events])


def whatever_happens_to_shards(name: str, seeds: range) -> None:
    for seed in seeds:
        chance = random.Random(seed)
        events = [[chance.choice(EVENTS_OF_SHARDS)] if chance.random() < 0.4 else [] for _ in range(20)]
        found = trained(OPTIMIZERS[name], events, spread)
        with mock.patch.object(FusedStep, "_as_before", return_value=None):
            expected = trained(OPTIMIZERS[name], events, spread)
        for one, other in zip(found.bits(), expected.bits(), strict=True):
            assert_same_bits(one, other, [[event.__name__ for event in some] for some in events])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whatever_happens_to_shards_between_steps(ranks: Ranks, name: str) -> None:
    ranks.run(whatever_happens_to_shards, name, range(6), at_least=2)


def a_gradient_without_residual_is_a_term(name: str) -> None:
    events = [[], [], [], [gradient_is_a_term_of_a_sum], []]
    found = trained(OPTIMIZERS[name], events, spread, every=1)
    with mock.patch.object(FusedStep, "_as_before", return_value=None):
        expected = trained(OPTIMIZERS[name], events, spread, every=1)
    for one, other in zip(found.bits(), expected.bits(), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_shard_s_gradient_that_is_a_term_of_a_sum(ranks: Ranks, name: str) -> None:
    ranks.run(a_gradient_without_residual_is_a_term, name, at_least=2)


def half_of_them_are_shards(name: str) -> None:
    half = len(SHAPES)

    def trains() -> list[Tensor]:
        places = itertools.cycle([spread] * half + [torch.clone] * (half + 1))
        events = [[], [], [], [groups_change_places], [], []]
        return trained(OPTIMIZERS[name], events, lambda tensor: next(places)(tensor)).bits()

    found = trains()
    with mock.patch.object(FusedStep, "_as_before", return_value=None):
        for one, other in zip(found, trains(), strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shards_in_the_place_of_plain_tensors(ranks: Ranks, name: str) -> None:
    ranks.run(half_of_them_are_shards, name, at_least=2)


def looks_at_few(name: str, place: Callable[[Tensor], Tensor]) -> None:
    training = Training(OPTIMIZERS[name], place)
    with mock.patch.object(FusedStep, "member", autospec=True, side_effect=FusedStep.member) as member:
        for number in range(5):
            member.reset_mock()
            training.backward(number)
            training.step()
            if number >= 2:
                member.assert_not_called()
        gradient_is_written(training)
        weight_is_written(training)
        training.backward(9)
        training.step()
        assert member.call_count == len(SHAPES)  # of the group that something has happened to


@pytest.mark.usefixtures("layouts")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_from_the_third_step_on_no_parameter_is_looked_at(name: str) -> None:
    looks_at_few(name, torch.clone)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_from_the_third_step_on_no_shard_is_looked_at(ranks: Ranks, name: str) -> None:
    ranks.run(looks_at_few, name, spread, at_least=2)


@pytest.mark.usefixtures("layouts")
@pytest.mark.parametrize("others", [
    lambda t: t.t(), lambda t: t.float(), lambda t: t[:2], lambda t: nn.Parameter(t), lambda t: t.to("meta"),
    lambda t: None, lambda t: t.unsqueeze(0),
])  # fmt: skip
def test_layouts_tell_tensors_apart(others: Callable[[Tensor], Any]) -> None:
    layout = backends.layout_function()
    tensor = torch.randn(4, 3).bfloat16()
    same = layout([tensor], [None, tensor])
    assert same is not None
    assert layout([tensor.clone()], [None, torch.zeros_like(tensor)]) == same
    other = others(tensor)
    assert layout([tensor], [None, other]) != same
    assert layout([tensor, None], [other]) != same


@pytest.mark.parametrize("layout", [backends.layout_function(), backends._layout])
def test_what_is_no_dense_tensor_has_no_layout(layout: Callable[..., Any]) -> None:
    for wrong in (3, "tensor", torch.eye(3).to_sparse()):
        assert layout([torch.zeros(2)], [wrong]) is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_that_are_made_for_one_group_are_not_another_s(name: str) -> None:
    """The group before goes by lists, and both in one launch."""
    training = trained(OPTIMIZERS[name], [[]] * 3)
    state = training.optimizer.state
    kept = {name: value for name, value in state[training.params[0]].items() if isinstance(value, Tensor)}
    state_of_the_last_group_is_gone(training)
    training.backward(3)
    training.step()
    assert all(state[training.params[0]][name] is value for name, value in kept.items())
    assert state.get(training.params[-2], {}).keys() == state[training.params[0]].keys()


def test_a_copy_of_weights_that_were_loaded_is_kept_until_the_next_step() -> None:
    training = trained(OPTIMIZERS["AdamW"], [[]] * 3)
    before = training.acc.memory().master_residuals
    optimizer_is_checkpointed(training)
    assert training.acc.memory().master_residuals > before
    training.backward(3)
    training.step()
    assert training.acc.memory().master_residuals == before
