"""The step of torch's Adam, AdamW and SGD in one pass: no FP32 copy of weights or gradients is made.

By rule, not by option: a parameter is stepped in one pass if its optimizer is exactly one of these classes, and weight,
gradient and states lie in memory alike. What is computed are torch's formulas in FP32 (:mod:`accumkern.updates` has
them, and their roundings); ``optimizer.state`` holds what torch's own step would leave there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accumkern.backends import Kernels, layout_function
from accumkern.dtensor import is_complete_as, is_dtensor, shard, version_of, with_shard
from accumkern.formats import Format, Start
from accumkern.master_weights import MasterWeights, local_of
from accumkern.ops import is_dense, same_order
from accumkern.optimizers import is_stepped_in_parts
from accumkern.slot import Slot, Stored
from accumkern.torch_private import is_fake
from accumkern.updates import Update, adam_coefficients, sgd_coefficients

#: The classes of optimizers that are stepped in one pass, and how their parameter groups name the update.
FUSED: dict[type, Callable[[Mapping[str, Any]], Update]] = {
    torch.optim.Adam: lambda group: Update.AMSGRAD if group["amsgrad"] else Update.ADAM,
    torch.optim.AdamW: lambda group: Update.AMSGRAD if group["amsgrad"] else Update.ADAM,
    torch.optim.SGD: lambda group: Update.MOMENTUM if group["momentum"] else Update.SGD,
}

#: Updates that depend on the number of the step.
COUNTED = (Update.ADAM, Update.AMSGRAD)


def is_fused(optimizer: Any) -> bool:
    """Return whether parameters of an optimizer are stepped in one pass, by its class."""
    return type(optimizer) in FUSED and is_stepped_in_parts(optimizer)  # and nobody has replaced its step()


class Member(NamedTuple):
    """A parameter that is stepped, and what belongs to it on this rank."""

    param: Tensor
    weight: Tensor
    gradient: Stored
    states: list[Tensor]
    steps: Tensor | None  # how many there were, as the optimizer counts them; None where it does not
    made: dict[str, Any]  # for this step, what its state lacks: none of it is in the optimizer's state yet


class Kind(NamedTuple):
    """What all parameters of a launch have in common; ``is_alone`` where sums have no residuals."""

    device: torch.device
    update: Update
    format: Format
    is_alone: bool


@dataclass
class Launch:
    """Parameters that are stepped in one launch: lists of what belongs to them, and a row of coefficients for each."""

    kind: Kind
    params: list[Tensor]
    weights: list[Tensor]
    weight_residuals: list[Tensor]  # empty where they are still to be looked up
    sums: list[Tensor]
    residuals: list[Any]
    states: list[list[Tensor]]  # of each of the update's states
    steps: list[Tensor]  # empty where they are not counted
    made: list[dict[str, Any]]  # as in Member
    rows: Tensor

    def add(self, other: Launch) -> None:
        """Step those of another launch of the same kind, too."""
        if bool(self.weight_residuals) is not bool(other.weight_residuals):
            self.weight_residuals = other.weight_residuals = []
        for mine, others in zip(self._lists(), other._lists(), strict=True):
            mine += others
        self.rows = torch.cat([self.rows, other.rows])

    def _lists(self) -> list[list[Any]]:
        return [
            self.params,
            self.weights,
            self.weight_residuals,
            self.sums,
            self.residuals,
            *self.states,
            self.steps,
            self.made,
        ]


class FusedStep:
    """Steps parameters of an optimizer in one pass.

    Args:
        optimizer: one that :func:`is_fused`.
        masters: of its parameters.
        slots: parameter -> slot of its gradient.
        kernels_on: returns the kernels of a device.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        masters: MasterWeights,
        slots: Mapping[Tensor, Slot],
        kernels_on: Callable[[torch.device], Kernels],
    ) -> None:
        self._update_of = FUSED[type(optimizer)]
        self._masters, self._slots, self._kernels_on = masters, slots, kernels_on
        self._layout = layout_function()
        # Number of a group -> kind, whether all are DTensors, and layout of all that belonged to its parameters in the
        # last step.
        self._known: dict[int, tuple[Kind, bool, Any]] = {}

    def launches(self, optimizer: Any, has_master: Callable[[Tensor], bool]) -> tuple[list[Launch], int]:
        """Return what is to be launched, and how many parameters with masters torch has to step.

        Args:
            optimizer: the optimizer.
            has_master: returns whether a parameter has a master, and a gradient for it.
        """
        groups = optimizer.param_groups
        # torch lets a group hold a parameter twice
        times = Counter(id(param) for group in groups for param in group["params"])
        launches: dict[Kind, Launch] = {}
        left_out = 0
        for number, group in enumerate(groups):
            params = [param for param in group["params"] if has_master(param)]
            once = [param for param in params if times[id(param)] == 1]
            found = self._as_before(number, optimizer, group, once) or self._one_by_one(number, optimizer, group, once)
            for launch in found:
                if launch.kind in launches:
                    launches[launch.kind].add(launch)
                else:
                    launches[launch.kind] = launch
            left_out += len(params) - sum(len(launch.params) for launch in found)
        return list(launches.values()), left_out

    def _as_before(
        self, number: int, optimizer: Any, group: Mapping[str, Any], params: list[Tensor]
    ) -> list[Launch] | None:
        """Return the launch of a group of which everything lies as in the last step, looking at whole lists."""
        if number not in self._known:
            return None
        kind, is_spread, layout = self._known[number]
        update, columns = kind.update, self._columns(optimizer, kind.update, params, is_spread)
        if columns is None or update is not self._update_of(group) or self._layout(*columns) != layout:
            return None
        weights, sums, residuals, *states = columns
        belongs = {
            (slot := self._slots[param]).written() is param.grad and version_of(param.grad) == slot.version
            for param in params
        }
        weight_residuals = self._masters.as_written(params, weights)
        if belongs != {not kind.is_alone} or weight_residuals is None:
            return None
        steps = states.pop() if update in COUNTED else []
        _check_capture(optimizer, group, kind.device)
        rows = _coefficients(group, update, steps, [], len(params), kind.device)
        weights = [weight.detach() for weight in weights]
        made: list[dict[str, Any]] = [{}] * len(params)
        return [Launch(kind, params, weights, weight_residuals, sums, residuals, states, steps, made, rows)]

    def _columns(self, optimizer: Any, update: Update, params: list[Tensor], is_spread: bool) -> list[list[Any]] | None:
        """Return lists of what this rank holds: weights, gradients, their residuals, each state, the count of steps.

        Args:
            optimizer: the optimizer.
            update: of all parameters.
            params: the parameters.
            is_spread: whether all of these are DTensors, with gradients and states that lie on the same ranks.
        """
        if not params:
            return None
        of_params = [optimizer.state.get(param) for param in params]
        if update.states and not all(of_params):
            return None
        grads = [param.grad for param in params]
        residuals = [self._slots[param].residual for param in params]
        states = [[state.get(name) for state in of_params] for name in update.states]
        spread: list[list[Any]] = [params, grads, *states]
        if is_spread:
            if not all(is_dtensor(tensor) for column in spread for tensor in column):
                return None
            if not all(is_complete_as(grad, param) for grad, param in zip(grads, params, strict=True)):
                return None
            spread = [[shard(tensor) for tensor in column] for column in spread]
        counts: list[list[Any]] = [[state.get("step") for state in of_params]] if update in COUNTED else []
        return [*spread[:2], residuals, *spread[2:], *counts]

    def _one_by_one(self, number: int, optimizer: Any, group: Mapping[str, Any], params: list[Tensor]) -> list[Launch]:
        """Return the launches of a group, looking at each of its parameters."""
        update = self._update_of(group)
        members = [member for param in params if (member := self.member(optimizer, group, param)) is not None]
        by_device: dict[torch.device, list[Member]] = defaultdict(list)
        for member in members:
            by_device[member.weight.device].append(member)
        launches: list[Launch] = []
        for device, there in by_device.items():
            _check_capture(optimizer, group, device)
            counts = [member.steps for member in there if member.steps is not None]
            rows = _coefficients(group, update, counts, [bool(m.made) for m in there], len(there), device)
            alike: dict[Kind, list[int]] = defaultdict(list)
            for i, member in enumerate(there):
                assert member.gradient.format is not None
                alike[Kind(device, update, member.gradient.format, member.gradient.residual is None)].append(i)
            for kind, indices in alike.items():
                of_these = rows  # those of some one by one: indices would be copied to the device, and waited for
                if len(indices) < len(there):
                    of_these = torch.stack([rows[i] for i in indices])
                launches.append(_launch(kind, [there[i] for i in indices], of_these))
        self._known.pop(number, None)
        kinds = {is_dtensor(member.param) for member in members}
        is_plain = all(not m.made and m.gradient.residual is self._slots[m.param].residual for m in members)
        if is_plain and len(kinds) == len(launches) == 1 and len(members) == len(params):
            is_spread = kinds.pop()
            columns = self._columns(optimizer, update, params, is_spread)
            layout = None if columns is None else self._layout(*columns)
            if layout is not None:
                self._known[number] = launches[0].kind, is_spread, layout
        return launches

    def member(self, optimizer: Any, group: Mapping[str, Any], param: Any) -> Member | None:
        """Return what belongs to a parameter that has a master and a gradient; None where torch has to step it.

        States are made as torch makes them, where there are none.
        """
        slot, grad, is_spread = self._slots[param], param.grad, is_dtensor(param)
        gradient, weight = slot.stored(), local_of(param)
        is_alike = (
            gradient.format is not None
            and gradient.sum.dtype is weight.dtype
            and gradient.sum.shape == weight.shape
            and is_dense(weight)
            and not weight.is_neg()
            and same_order(gradient.sum, weight)
        )
        if not is_alike or (is_spread and not is_complete_as(grad, param)):
            return None
        update = self._update_of(group)
        if not update.states:
            return Member(param, weight, gradient, [], None, {})
        state: Mapping[str, Any] = optimizer.state.get(param) or {}
        made: dict[str, Any] = {}
        if not state or (update is Update.MOMENTUM and state.get("momentum_buffer") is None):
            if update in COUNTED:
                made["step"] = _zero_steps(group, weight.device)
            for name in update.states:
                zeros = torch.zeros_like(weight, dtype=torch.float32)
                made[name] = with_shard(zeros, param.detach()) if is_spread else zeros
            state = made
        steps = None
        if update in COUNTED:
            steps = state.get("step")
            if not _is_count(steps):
                return None
        states = []
        for name in update.states:
            local = _state_of(state.get(name), is_spread, weight)
            if local is None:
                return None
            states.append(local)
        return Member(param, weight, gradient, states, steps, made)

    @torch.no_grad()
    def step(
        self, optimizer: Any, launches: list[Launch], divisor: float | Tensor, factor: float | Tensor
    ) -> Iterator[list[Tensor]]:
        """Step parameters with ``(gradient / divisor) * factor``; yield some once they are stepped.

        The versions of the weights are left alone, until :meth:`MasterWeights.count_changes`. After an error, those
        that were not yielded are as they were, with their states.

        Args:
            optimizer: the optimizer.
            launches: what :meth:`launches` has returned.
            divisor: a number, or an FP32 0-dim tensor.
            factor: the same.
        """
        found_inf, grad_scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        for launch in launches:
            device, update, format_, is_alone = launch.kind
            weight_residuals = launch.weight_residuals or [self._masters.residual_to_write(p) for p in launch.params]
            _add(launch.steps, 1.0)  # torch may refuse it
            try:
                self._kernels_on(device).step(
                    update,
                    self._masters.format,
                    format_,
                    Start.FROM_SUM if is_alone else Start.CONTINUE,
                    launch.weights,
                    weight_residuals,
                    launch.sums,
                    None if is_alone else launch.residuals,
                    launch.states,
                    launch.rows,
                    _product(divisor, grad_scale, device),
                    _on(factor, device),
                    None if found_inf is None else _on(found_inf, device).float(),
                )
            except BaseException:
                _add(launch.steps, -1.0)
                raise
            if found_inf is not None and launch.steps:  # they were not steps
                torch._foreach_sub_(launch.steps, [_on(found_inf, count.device) for count in launch.steps])
            for param, made in zip(launch.params, launch.made, strict=True):
                if made:
                    optimizer.state[param].update(made)
            if not launch.weight_residuals:  # else it was so before
                self._masters.wrote(launch.params, launch.weights)
            yield launch.params


def _launch(kind: Kind, members: list[Member], rows: Tensor) -> Launch:
    """Return a launch of parameters of one kind."""
    return Launch(
        kind,
        [member.param for member in members],
        [member.weight for member in members],
        [],
        [member.gradient.sum for member in members],
        [member.gradient.residual for member in members],
        [[member.states[i] for member in members] for i in range(len(kind.update.states))],
        [member.steps for member in members if member.steps is not None],
        [member.made for member in members],
        rows,
    )


def _zero_steps(group: Mapping[str, Any], device: torch.device) -> Tensor:
    """Return what Adam counts steps with: on the device where it is fused or capturable."""
    is_double = torch.get_default_dtype() is torch.float64 and not group["fused"]
    where = device if group["capturable"] or group["fused"] else torch.device("cpu")
    return torch.zeros((), dtype=torch.float64 if is_double else torch.float32, device=where)


def _is_count(steps: Any) -> bool:
    """Return whether the steps of a parameter are counted as torch counts them."""
    return isinstance(steps, Tensor) and not is_dtensor(steps) and steps.dim() == 0 and steps.is_floating_point()


def _state_of(value: Any, is_spread: bool, weight: Tensor) -> Tensor | None:
    """Return what this rank holds of a state, if it is FP32 and laid out as its parameter is."""
    if not isinstance(value, Tensor) or value.dtype is not torch.float32 or is_dtensor(value) is not is_spread:
        return None
    local = shard(value) if is_spread else value
    is_alike = local.shape == weight.shape and local.device == weight.device and same_order(local, weight)
    return local if is_alike else None


def _add(counts: list[Tensor], number: float) -> None:
    """Add a number to counts of steps."""
    elsewhere = [count for count in counts if not count.is_cpu]
    on_host = [count for count in counts if count.is_cpu] if len(elsewhere) < len(counts) else []
    if on_host:  # torch would make a tensor of the number for each of them
        torch._foreach_add_(on_host, torch.tensor(number, device="cpu"), alpha=1)
    if elsewhere:
        torch._foreach_add_(elsewhere, number)


def _coefficients(
    group: Mapping[str, Any],
    update: Update,
    counts: list[Tensor],
    are_first: list[bool],
    number: int,
    device: torch.device,
) -> Tensor:
    """Return a row of coefficients for each of some parameters, on the device of the weights, without waiting for it.

    Args:
        group: their parameter group.
        update: how they are stepped.
        counts: of their steps, where these are counted.
        are_first: whether each is stepped for the first time; empty where none is.
        number: how many there are.
        device: of the weights.
    """
    places = {count.device for count in counts}
    options = [value.device for value in (group["lr"], *group.get("betas", ())) if isinstance(value, Tensor)]
    is_on_device = device in places or device in options
    where = device if is_on_device or _is_capturing(device) else torch.device("cpu")
    if update in COUNTED:
        if len(places) > 1:
            counts = [count.to(where) for count in counts]
        rows = adam_coefficients(group, torch.stack(counts).to(where) + 1)
    elif any(are_first):
        rows = sgd_coefficients(group, torch.tensor(are_first, device=where))
    else:
        rows = sgd_coefficients(group, torch.zeros(number, dtype=torch.bool, device=where))
    if where == device:
        return rows
    if device.type != "cuda" or is_fake(rows):  # which cannot be pinned
        return rows.to(device)
    return rows.pin_memory().to(device, non_blocking=True)


def _check_capture(optimizer: Any, group: Mapping[str, Any], device: torch.device) -> None:
    """Raise where a CUDA graph would keep the number of this step."""
    if not group.get("capturable", True) and _is_capturing(device):
        raise RuntimeError(
            f"a CUDA graph is being captured, and the steps of {type(optimizer).__name__} are counted on the host, so "
            "that each replay would be the same step; make it with capturable=True"
        )


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on(scalar: Any, device: torch.device) -> Any:
    """Return a number as it is, and a tensor on a device."""
    return scalar.to(device, non_blocking=device.type != "cpu") if isinstance(scalar, Tensor) else scalar


def _product(divisor: float | Tensor, grad_scale: Tensor | None, device: torch.device) -> float | Tensor:
    """Return what gradients are divided by: a divisor, and what a GradScaler has multiplied the loss with."""
    if grad_scale is None:
        return _on(divisor, device)
    scale = _on(grad_scale, device).float()
    return scale if not isinstance(divisor, Tensor) and divisor == 1 else scale * _on(divisor, device)
