"""The step of torch's Adam, AdamW and SGD in one pass: no FP32 copy of weights or gradients is made.

By rule, not by option: a parameter is stepped in one pass if its optimizer is exactly one of these classes, and weight,
gradient and states lie in memory alike. What is computed are torch's formulas in FP32 (:mod:`accumkern.updates` has
them, and their roundings); ``optimizer.state`` holds what torch's own step would leave there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accumkern.backends import Kernels
from accumkern.dtensor import is_dtensor, shard, with_shard
from accumkern.formats import Start
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

    def member(self, optimizer: Any, group: Mapping[str, Any], param: Any) -> Member | None:
        """Return what belongs to a parameter that has a master and a gradient; None where torch has to step it.

        States are made as torch makes them, where there are none.
        """
        slot, grad, is_spread = self._slots[param], param.grad, is_dtensor(param)
        gradient, weight = slot.stored(), local_of(param)
        is_alike = (
            gradient.format is not None
            and gradient.sum.dtype is weight.dtype
            and slot.is_complete(grad)
            and gradient.sum.shape == weight.shape
            and is_dense(weight)
            and not weight.is_neg()
            and same_order(gradient.sum, weight)
        )
        if is_alike and is_spread:
            is_alike = grad.placements == param.placements and grad.device_mesh == param.device_mesh
        if not is_alike:
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
        self, optimizer: Any, members: Iterable[list[Member]], divisor: float | Tensor, factor: float | Tensor
    ) -> Iterator[list[Tensor]]:
        """Step parameters with ``(gradient / divisor) * factor``; yield some once they are stepped.

        The versions of the weights are left alone, until :meth:`MasterWeights.count_changes`. After an error, those
        that were not yielded are as they were, with their states.

        Args:
            optimizer: the optimizer.
            members: of each of its groups, what :meth:`member` has returned.
            divisor: a number, or an FP32 0-dim tensor.
            factor: the same.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the optimizer is not ``capturable``.
        """
        launches: dict[Any, list[tuple[list[Member], Tensor]]] = defaultdict(list)
        for group, of_group in zip(optimizer.param_groups, members, strict=True):
            update = self._update_of(group)
            by_device: dict[torch.device, list[Member]] = defaultdict(list)
            for member in of_group:
                by_device[member.weight.device].append(member)
            for device, there in by_device.items():
                _check_capture(optimizer, group, device)
                rows = _coefficients(group, update, there, device)
                alike: dict[Any, list[int]] = defaultdict(list)
                for i, member in enumerate(there):
                    alike[member.gradient.format, member.gradient.residual is None].append(i)
                for (format_, is_alone), indices in alike.items():
                    of_these = rows  # those of some one by one: indices would be copied to the device, and waited for
                    if len(indices) < len(there):
                        of_these = torch.stack([rows[i] for i in indices])
                    launches[device, update, format_, is_alone].append(([there[i] for i in indices], of_these))
        found_inf, grad_scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        for (device, update, format_, is_alone), parts in launches.items():
            stepped = [member for some, _ in parts for member in some]
            counts = [member.steps for member in stepped if member.steps is not None]
            _add(counts, 1.0)  # torch may refuse it
            try:
                self._kernels_on(device).step(
                    update,
                    self._masters.format,
                    format_,
                    Start.FROM_SUM if is_alone else Start.CONTINUE,
                    [member.weight for member in stepped],
                    [self._masters.residual_to_write(member.param) for member in stepped],
                    [member.gradient.sum for member in stepped],
                    None if is_alone else [member.gradient.residual for member in stepped],
                    [[member.states[i] for member in stepped] for i in range(len(update.states))],
                    torch.cat([rows for _, rows in parts]) if len(parts) > 1 else parts[0][1],
                    _product(divisor, grad_scale, device),
                    _on(factor, device),
                    None if found_inf is None else _on(found_inf, device).float(),
                )
            except BaseException:
                _add(counts, -1.0)
                raise
            if found_inf is not None and counts:  # they were not steps
                torch._foreach_sub_(counts, [_on(found_inf, count.device) for count in counts])
            for member in stepped:
                if member.made:
                    optimizer.state[member.param].update(member.made)
            wrote = [member.param for member in stepped]
            self._masters.wrote(wrote, [member.weight for member in stepped])
            yield wrote


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
    on_host = [count for count in counts if count.is_cpu]
    elsewhere = [count for count in counts if not count.is_cpu]
    if on_host:  # torch would make a tensor of the number for each of them
        torch._foreach_add_(on_host, torch.tensor(number, device="cpu"), alpha=1)
    if elsewhere:
        torch._foreach_add_(elsewhere, number)


def _coefficients(group: Mapping[str, Any], update: Update, members: list[Member], device: torch.device) -> Tensor:
    """Return a row of coefficients for each parameter, on the device of the weights, without waiting for it."""
    counts = [member.steps for member in members if member.steps is not None]
    inputs = [*counts, group["lr"], *group.get("betas", ())]
    is_on_device = any(isinstance(value, Tensor) and value.device == device for value in inputs)
    where = device if is_on_device or _is_capturing(device) else torch.device("cpu")
    if update in COUNTED:
        rows = adam_coefficients(group, torch.stack([count.to(where) for count in counts]) + 1)
    elif any(member.made for member in members):
        rows = sgd_coefficients(group, torch.tensor([bool(member.made) for member in members], device=where))
    else:
        rows = sgd_coefficients(group, torch.zeros(len(members), dtype=torch.bool, device=where))
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
