"""The step of any optimizer on FP32 stand-ins: it reads and writes FP32 weights, and the model keeps bfloat16 ones.

A hook before the step has ``step()`` called with another optimizer in the place of ``self``: of a subclass, with the
same attributes (in the very same dictionary) but other parameter groups, which hold stand-ins. A stand-in is an FP32
parameter, the master weight, whose gradient is the accumulated one in FP32, and whose state is the very dictionary of
the parameter that it stands for. So the optimizer that users hold is as always: in hooks, in a closure, after an error.

Stand-ins are made, stepped and stored for some bytes at a time, a bucket. The last bucket is what the user's own call
of ``step()`` steps; a hook after it stores that one. What :mod:`accumkern.fused_step` takes is stepped before, without
stand-ins, and is in no bucket.
"""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from accumkern.backends import Kernels
from accumkern.casting import count_calls, take_cut_off
from accumkern.deferred import DeferredScaling
from accumkern.dtensor import is_dtensor, largest_shard, version_of
from accumkern.fused_step import FusedStep, Launch, is_fused
from accumkern.master_weights import MasterWeights, dense, local_of, sum_of_bits
from accumkern.optimizers import is_stepped_in_parts, raw_step
from accumkern.passes import BackwardPasses
from accumkern.slot import Slot
from accumkern.stand_ins import STAND_IN_BYTES, StandIn, StandIns, kind_of
from accumkern.torch_private import HOOKS_OF_STEP, LastHook, call_first_after_step

#: Bytes of a bucket. On a CPU it stays in the cache; elsewhere each one takes a few launches. docs/performance.md
_CPU_BUCKET, _BUCKET = 8 * 2**20, 256 * 2**20

_Members = dict[int, list[Tensor]]  # index of a parameter group -> parameters in it


def bucket_bytes_on(device: torch.device) -> int:
    """Return the bytes of a bucket where none were asked for."""
    return _CPU_BUCKET if kind_of(device) == "cpu" else _BUCKET


class Stepping:
    """Steps the bfloat16 parameters of an optimizer as FP32 ones.

    Attributes:
        masters: see below.
        deferred: what ``finish(defer=True)`` leaves to the step.
        is_in_parts: whether buckets are stepped one after the other; else there is one of everything.

    Args:
        optimizer: a ``torch.optim.Optimizer`` that :func:`accumkern.optimizers.refusal` does not refuse.
        masters: of its parameters.
        slots: parameter -> slot of its gradient; of all that have hooks.
        bucket_bytes: FP32 weights and gradients that are made at a time, unless one parameter needs more; None takes
            what suits the device.
        kernels_on: returns the kernels of a device.
        passes: the backward passes, some of whose gradients may wait to be folded.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        masters: MasterWeights,
        slots: Mapping[Tensor, Slot],
        bucket_bytes: int | None,
        kernels_on: Callable[[torch.device], Kernels],
        passes: BackwardPasses,
    ) -> None:
        self.masters, self._slots = masters, slots
        self._kernels_on, self._passes = kernels_on, passes
        self.is_in_parts = is_stepped_in_parts(optimizer)
        self._fused = FusedStep(optimizer, masters, slots, kernels_on) if is_fused(optimizer) else None
        self._stand_ins = StandIns(masters, slots, kernels_on)
        self._not_fused = 0  # parameters with masters in the last step that it did not take
        self.deferred = DeferredScaling(kernels_on, lambda: passes.count)
        self._bucket_bytes = bucket_bytes
        kind = self._class = type(optimizer)
        own = ("param_groups", "state", "_accumkern_members", "_accumkern_stand_ins", *HOOKS_OF_STEP)
        try:
            self._kind: Any = type(kind.__name__, (kind,), {"__slots__": own, "__module__": kind.__module__})
        except Exception as error:
            raise TypeError(f"optimizer is a {kind.__name__}, which cannot be derived from: {error}") from error
        self._begun = (0, 0)  # how many parameters and casts there had been when that was looked for last
        self._of_last_step: list[Any] = []  # weak references to stand-ins, of what is not stepped in parts
        self._is_known = self.is_in_parts  # whether a step was seen to step stand-ins

    def hook(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Have ``optimizer.step()`` step stand-ins from now on; return handles whose ``remove()`` ends it."""
        # torch.compile of the step breaks its graph here, and compiles what is around.
        after = optimizer.register_step_post_hook(torch.compiler.disable(self._after))
        call_first_after_step(optimizer, after)  # the others see the new weights
        return [LastHook(optimizer, "step", torch.compiler.disable(self._before)), after]

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Step all buckets but the last, and return what ``step()`` is to be called with for that one."""
        self._check_class(optimizer)
        self._check_last_step(optimizer)
        self.begin_masters()
        args, kwargs, closure = _after_closure(args, kwargs)
        self._passes.complete()
        self.masters.keep_only(self._slots)
        step = raw_step(optimizer)
        fused: list[Launch] = []
        if self._fused is not None:
            fused, self._not_fused = self._fused.launches(optimizer, self._has_stand_in)
        scaling = self.deferred.checked()
        buckets = list(self._buckets(optimizer, {id(param) for launch in fused for param in launch.params}))
        if closure is not None:
            closure.calls_left = len(buckets)
        memory = dict(self._stand_ins.kept)
        written: list[Tensor] = []
        try:
            if self._fused is not None:
                for some in self._fused.step(optimizer, fused, *scaling):
                    written += some
            params = {param: None for some in buckets for group in some.values() for param in group}
            slots = [self._slots[param] for param in params if param.grad is not None and param in self._slots]
            self.deferred.write(slots)
            for members in buckets[:-1]:
                made = self._with_stand_ins(optimizer, members, memory, closure)
                step(made, *args[1:], **kwargs)
                written += self._store(optimizer, made)
        finally:
            self.masters.count_changes(written)
        last = self._with_stand_ins(optimizer, buckets[-1], memory, closure)
        if self.is_in_parts:  # else the optimizer may have kept what it was given
            self._stand_ins.keep(memory)
        return (last, *args[1:]), kwargs

    def _after(self, optimizer: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if isinstance(args[0], self._kind):
            self.deferred.end_step()
            self.masters.count_changes(self._store(optimizer, args[0]))

    def how(self) -> str:
        """Return how ``step()`` is made: in one pass, in buckets of FP32 weights, or with all of them at once."""
        otherwise = "in buckets" if self.is_in_parts else "at once"
        if self._fused is None:
            return otherwise
        count = self._not_fused
        return f"fused, {count} parameter{'s' if count > 1 else ''} in buckets" if count else "fused"

    def begin_masters(self) -> None:
        """Begin the masters of parameters that have come with what ``to_bfloat16()`` has cut off them."""
        found = len(self._slots), count_calls()
        if found != self._begun:
            take_cut_off(self.masters, self._slots)
            self._begun = found

    def remove(self) -> None:
        """Let go of what the weights lack, and of the memory that is kept."""
        self.masters.forget_all()
        self._stand_ins.kept.clear()

    def kept_bytes(self) -> int:
        """Return the bytes of the memory that is kept for the next step's stand-ins."""
        return sum(flat.nbytes for flat in self._stand_ins.kept.values())

    def _check_class(self, optimizer: Any) -> None:
        """Raise where an optimizer has become one of another class, whose step is made in another way."""
        if type(optimizer) is not self._class:
            raise RuntimeError(
                f"optimizer is a {type(optimizer).__name__}, and was a {self._class.__name__} when it was attached; "
                "detach(), and attach() again"
            )

    def _check_last_step(self, optimizer: Any) -> None:
        """Raise where an optimizer still holds stand-ins of its last step: what it keeps for them is lost."""
        if any(reference() is not None for reference in self._of_last_step):
            gc.collect()
        if any(reference() is not None for reference in self._of_last_step):
            self._of_last_step = []
            raise RuntimeError(
                f"{type(optimizer).__name__} keeps parameters of its last step outside of optimizer.state, which are "
                "other ones in each step with master_weights; attach without master_weights"
            )

    # ---- buckets -------------------------------------------------------------------------------------------------

    def _has_stand_in(self, param: Tensor) -> bool:
        if param.grad is None or param not in self._slots:
            return False
        if self.masters.has(param):
            return True
        self.masters.check("a parameter of optimizer", param)  # it may have been cast
        return False

    def _buckets(self, optimizer: Any, fused: Set[int]) -> Iterator[_Members]:
        """Yield the parameters in order, as many at a time as a bucket takes; those without stand-ins take nothing.

        Those of ``fused``, addresses of parameters, are left out.

        Of DTensors all ranks yield the same: a step may take sums over ranks, several parameters at a time.
        """
        groups = optimizer.param_groups
        members: _Members = {} if self.is_in_parts and not fused else {i: [] for i in range(len(groups))}
        size = 0
        for i, group in enumerate(groups):
            for param in group["params"]:
                if id(param) in fused:
                    continue
                numel = largest_shard(param) if is_dtensor(param) else param.numel()
                needed = STAND_IN_BYTES * numel if self._has_stand_in(param) else 0
                limit = self._bucket_bytes or bucket_bytes_on(param.device)
                if self.is_in_parts and size and size + needed > limit:
                    yield members
                    members, size = {}, 0
                members.setdefault(i, []).append(param)
                size += needed
        yield members

    @torch.no_grad()
    def _with_stand_ins(
        self, optimizer: Any, members: _Members, memory: dict[torch.device, Tensor], closure: _CalledClosure | None
    ) -> Any:
        """Return the optimizer with stand-ins of some of its parameters in the place of all parameters.

        Args:
            optimizer: the optimizer.
            members: the parameters.
            memory: what earlier buckets had, to be used again.
            closure: what stands for the closure of the step, if there is one.
        """
        params = [param for some in members.values() for param in some]
        stepped = [param for param in dict.fromkeys(params) if self._has_stand_in(param)]
        of = dict(zip(stepped, self._stand_ins(stepped, memory, self._is_known), strict=True))
        if closure is not None:
            closure.stand_ins = list(of.values())
        made = object.__new__(self._kind)
        made.__dict__ = optimizer.__dict__
        for name in HOOKS_OF_STEP:
            setattr(made, name, {})  # of a step() that calls super().step()
        made._accumkern_members, made._accumkern_stand_ins = members, of
        if not self.is_in_parts:
            self._of_last_step = [weakref.ref(stand_in.parameter) for stand_in in of.values()]
        made.param_groups = [
            {**optimizer.param_groups[i], "params": [of[param].parameter if param in of else param for param in some]}
            for i, some in members.items()
        ]
        states = optimizer.state
        made.state = defaultdict(getattr(states, "default_factory", None) or dict)
        for key in params if self.is_in_parts else [*params, *states]:
            if key in states:
                made.state[of[key].parameter if key in of else key] = states[key]
        return made

    @torch.no_grad()
    def _store(self, optimizer: Any, made: Any) -> list[Tensor]:
        """Store what a step has made of stand-ins: weights, states and options of the groups; return the parameters.

        Raises:
            RuntimeError: the step has written the parameters themselves.
        """
        stand_ins: list[StandIn] = list(made._accumkern_stand_ins.values())
        if any(
            version_of(one.param) != one.version
            or (one.bits is not None and not torch.equal(one.bits, sum_of_bits(dense(local_of(one.param)))))
            for one in stand_ins
        ):
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() has written parameters that it does not take from its "
                "param_groups; attach without master_weights"
            )
        for one in stand_ins:
            now = local_of(one.parameter)
            if now.untyped_storage()._cdata != one.master.untyped_storage()._cdata:  # by parameter.data = ...
                one.master.copy_(now)
            if one.parameter.grad is None:
                one.param.grad = None
            vars(one.param).update((key, value) for key, value in vars(one.parameter).items() if key not in one.own)
        params = [one.param for one in stand_ins]
        self.masters.write(params, [one.master for one in stand_ins])
        self._is_known |= any(one.parameter._version != one.made_version for one in stand_ins)
        of = {one.parameter: one.param for one in stand_ins}
        for param in made._accumkern_stand_ins:
            optimizer.state.pop(param, None)
        optimizer.state.update((of.get(key, key), state) for key, state in made.state.items())
        for i, group in zip(made._accumkern_members, made.param_groups, strict=True):
            optimizer.param_groups[i].update((key, value) for key, value in group.items() if key != "params")
        return params


# ---- closures and hooks ------------------------------------------------------------------------------------------


class _CalledClosure:
    """What stands for a closure that was called already: it hands the loss on, once for each bucket."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.calls_left = 0
        self.stand_ins: list[StandIn] = []

    def __call__(self) -> Any:
        has_moved = any(one.parameter._version != one.made_version for one in self.stand_ins)
        if self.calls_left == 0 or has_moved:
            raise RuntimeError(
                "the optimizer calls its closure several times in a step, or with other weights than those before the "
                "step; attach without master_weights"
            )
        self.calls_left -= 1
        return self.loss


def _after_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], _CalledClosure | None]:
    """Call the closure of a step, which makes the gradients; return arguments that hand its loss on."""
    by_name = "closure" in kwargs
    closure = kwargs["closure"] if by_name else args[1] if len(args) > 1 else None
    if not callable(closure):
        return args, kwargs, None
    with torch.enable_grad():
        called = _CalledClosure(closure())
    if by_name:
        return args, {**kwargs, "closure": called}, called
    return (args[0], called, *args[2:]), kwargs, called
