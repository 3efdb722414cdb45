"""Which parameters have hooks: those in the optimizer's groups, also when they are added, moved or replaced."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accumkern.hooks import ParameterHooks, owner_of
from accumkern.slot import NOT_SET_ASIDE, Slot
from accumkern.torch_private import NO_BACKWARD, current_graph_task_id, has_step_hooks

_SHORT_DTYPES = frozenset({torch.bfloat16, torch.float16})


class Attachment:
    """The parameters of an optimizer, and the slot of each that has hooks.

    An optimizer holds what is attached to it, and is not held by it: when it is gone, its hooks are removed. What wraps
    an optimizer without its parameter groups being the same is held: some are made for the call to attach() alone.

    Attributes:
        slots: parameter -> slot, in the order of the optimizer; the same dictionary always, empty once detached.
        is_attached: whether hooks are on the parameters.
        face: returns what users hold of it, while somebody holds that.
        rooms: what the face is made of.

    Args:
        optimizer: a ``torch.optim.Optimizer``, or what wraps one.
        check: called as ``check(name, param)``; raises where a parameter's gradient cannot be folded.
        make_slot: makes the slot of a parameter.
        after_step: called after every step of the optimizer.
        needs_all: returns whether what torch accumulates by itself is of no use, even where it loses no bits.
    """

    def __init__(
        self,
        optimizer: Any,
        check: Callable[[str, Tensor], None],
        make_slot: Callable[[Tensor], Slot],
        after_step: Callable[[], None],
        needs_all: Callable[[], bool],
    ) -> None:
        self.slots: dict[Tensor, Slot] = {}
        self.face: Callable[[], Any] = lambda: None
        self.rooms: Any = None
        self._check, self._make_slot = check, make_slot
        self._after_step, self._needs_all = after_step, needs_all
        self._hooks: dict[Tensor, ParameterHooks] = {}
        self._handles: list[Any] = []
        self.is_attached = False
        optimizer = stepped_by(optimizer)
        is_torchs = isinstance(optimizer, torch.optim.Optimizer)
        self._optimizer: Callable[[], Any] = weakref.ref(optimizer) if is_torchs else lambda: optimizer
        self._groups: list[dict[str, Any]] = optimizer.param_groups
        self._known: list[Tensor] = []  # the optimizer's parameters when they were compared last
        self._missed: dict[Tensor, tuple[Any, int]] = {}  # whose gradient is torch's: that, and its version
        self._left_out: list[Tensor] = []  # of these, frozen ones that cannot be hooked, and integers

    def __del__(self) -> None:
        self.detach()

    def attach(self) -> None:
        """Hook all parameters, and have those hooked that are added later; after an error nothing is attached."""
        params = self._unhooked()
        try:
            self._watch_param_groups()
            self._hook(params)
            self._note_known()
            inner = _inner(self.optimizer)
            if inner is not None:
                self.keep([inner.register_step_pre_hook(lambda *_: self.check_hooks())])
                self.keep([inner.register_step_post_hook(lambda *_: self._after_step())])
        except BaseException:
            self.detach()
            raise
        self.is_attached = True

    def keep(self, handles: list[Any]) -> None:
        """Call the ``remove()`` of each handle when this is detached."""
        self._handles += handles

    @property
    def optimizer(self) -> Any:
        """The optimizer, or None when it is gone."""
        return self._optimizer()

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups; of one that is gone, whose state another took over, the last ones."""
        optimizer = self.optimizer
        if optimizer is not None:
            self._groups = optimizer.param_groups
        return self._groups

    @property
    def params(self) -> list[Tensor]:
        """The optimizer's parameters, in its order, whether they have hooks or not."""
        return [param for group in self.groups for param in group["params"]]

    @property
    def devices(self) -> set[torch.device]:
        """Where the parameters are."""
        return {param.device for param in self.slots}

    def with_gradients(self) -> list[Slot]:
        """Return the slots of the gradients that are there."""
        return [slot for slot in self.slots.values() if slot.param.grad is not None]

    def check_hooks(self) -> None:
        """Compare hooks with the optimizer's parameters; called before every step and by whoever asks for gradients.

        Parameters that have come into its groups by hand, or have lost their hooks, are hooked; those that have left
        the groups are let go.

        Raises:
            RuntimeError: torch has accumulated the gradient of one of them by itself, and it was not zeroed since.
            TypeError, ValueError: a parameter that has come cannot be hooked.
        """
        if torch.compiler.is_compiling():  # of the optimizer's step
            return
        hooked = [param for param, hooks in self._hooks.items() if not hooks.are_on()]
        for param in hooked:
            self.put_on_hooks(param)
        params = self.params
        unfrozen = any(param.requires_grad for param in self._left_out)
        if unfrozen or len(params) != len(self._known) or not all(map(operator.is_, params, self._known)):
            for param in self.slots.keys() - set(params):
                self._hooks.pop(param).remove()
                _put_back(self.slots.pop(param))
            come = self._unhooked()
            self._hook(come)
            hooked += come
            slots = [(param, self.slots[param]) for param in dict.fromkeys(params) if param in self.slots]
            self.slots.clear()
            self.slots.update(slots)  # in the order of the optimizer
            self._note_known()
        for param in hooked:
            if param.grad is not None and (self._needs_all() or param.dtype in _SHORT_DTYPES):
                self._missed[param] = weakref.ref(param.grad), param.grad._version
        for param, (reference, version) in list(self._missed.items()):
            grad = param.grad
            if grad is None or grad is not reference() or grad._version != version:  # zero_grad() was called
                del self._missed[param]
        if self._missed:
            shape = tuple(next(iter(self._missed)).shape)
            raise RuntimeError(
                f"{len(self._missed)} parameters, the first of shape {shape}, had no hooks, and torch has "
                "accumulated their gradients by itself: they came into the optimizer's groups without its "
                "add_param_group() (call accumkern.accumulator_of(optimizer) after that), or module.to() has put other "
                "tensors into them (torch.utils.swap_tensors, which it uses for DTensors), or their _backward_hooks "
                "were cleared. They are hooked now: call zero_grad() and begin the window again"
            )

    def put_on_hooks(self, param: Tensor) -> None:
        """Hook a parameter that has lost its hooks."""
        if not self._hooks[param].are_on():
            self._hooks[param].put_on()
            self.slots[param].forget()

    def detach(self) -> None:
        """Remove every hook; calling it again does nothing."""
        self.is_attached = False
        for hooks in self._hooks.values():
            hooks.remove()
        for slot in self.slots.values():
            _put_back(slot)
        self._hooks.clear()
        self.slots.clear()
        optimizer = self.optimizer
        watch = getattr(optimizer, "__dict__", {}).get("add_param_group")
        if getattr(watch, "attachment", None) is self:
            del optimizer.add_param_group
        handles, self._handles = self._handles, []
        for handle in handles:  # last the optimizer's state, which may find no memory
            handle.remove()

    def _unhooked(self) -> list[Tensor]:
        """Return the parameters that have no hooks yet, after checking that each can have them."""
        found: dict[Tensor, None] = {}  # torch lets a group hold a parameter twice
        for i, param in enumerate(self.params):
            if param in self.slots or param in found:
                continue
            if isinstance(param, torch.nn.UninitializedParameter):
                if not param.requires_grad:
                    continue
                raise TypeError(
                    f"parameter {i} of optimizer is a {type(param).__name__} of a lazy module, without a shape; run a "
                    "forward pass first"
                )
            if param.is_inference():
                continue
            if not (param.is_floating_point() or param.is_complex()):
                continue
            name = f"parameter {i} of optimizer (shape {tuple(param.shape)})"
            if owner_of(param) is not None:
                gc.collect()  # its optimizer may be gone, but for a circle that holds it
            if owner_of(param) is not None:
                raise ValueError(
                    f"{name} is attached already; detach() the other accumulator first, which "
                    "accumkern.accumulator_of(optimizer) returns"
                )
            try:
                self._check(name, param)
            except TypeError:
                if param.requires_grad:
                    raise
                continue  # a weight that is frozen, such as a packed one beside adapters, gets no gradient
            found[param] = None
        return list(found)

    def _hook(self, params: list[Tensor]) -> None:
        for param in params:
            slot = self.slots[param] = self._make_slot(param)
            self._hooks[param] = ParameterHooks(slot, owner=self)

    def _note_known(self) -> None:
        self._known = self.params
        self._left_out = [param for param in self._known if param not in self.slots]

    def _watch_param_groups(self) -> None:
        """Have ``optimizer.add_param_group`` hook what it adds.

        The function is an attribute of the instance, which copying and pickling an optimizer leave out. It also keeps
        this object alive as long as the optimizer.
        """
        optimizer = self.optimizer
        bound = optimizer.add_param_group
        is_method = getattr(bound, "__self__", None) is optimizer and isinstance(optimizer, torch.optim.Optimizer)
        original: Callable[[], Any] = weakref.WeakMethod(bound) if is_method else lambda: bound

        def add_param_group(param_group: dict[str, Any]) -> None:
            add = original()
            if add is None:
                raise ReferenceError("the optimizer of this add_param_group is gone")
            add(param_group)
            if self.is_attached:
                try:
                    added = self._unhooked()
                except (TypeError, ValueError, RuntimeError):
                    self.groups.pop()
                    raise
                self._hook(added)
                self._note_known()

        add_param_group.attachment = self  # type: ignore[attr-defined]
        try:
            optimizer.add_param_group = add_param_group
        except AttributeError as error:
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}, whose add_param_group cannot be watched ({error}); attach "
                "to the torch.optim.Optimizer that it wraps"
            ) from error


def _put_back(slot: Slot) -> None:
    """Let autograd itself add to what was set aside, where it is about to."""
    if current_graph_task_id() != NO_BACKWARD:
        running, slot.set_aside = slot.set_aside, NOT_SET_ASIDE
        if isinstance(running, Tensor) and slot.param.grad is None:
            slot.param.grad = running


def attachment_of(optimizer: Any) -> Attachment | None:
    """Return what is attached to an optimizer, or None."""
    watch = getattr(optimizer, "__dict__", {}).get("add_param_group")
    owners = (owner_of(param) for group in optimizer.param_groups for param in group["params"])
    return getattr(watch, "attachment", None) or next((owner for owner in owners if owner is not None), None)


def stepped_by(optimizer: Any) -> Any:
    """Return the optimizer that is attached to: ``optimizer``, or what it wraps where that has the same parameters."""
    inner = _inner(optimizer)
    return inner if inner is not None and _same_groups(inner, optimizer) else optimizer


def _inner(optimizer: Any) -> Any:
    """Return the optimizer whose step has hooks: it, or what it wraps (as Accelerate's does); None where none has."""
    while optimizer is not None and not has_step_hooks(optimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def _same_groups(a: Any, b: Any) -> bool:
    return [list(map(id, group["params"])) for group in a.param_groups] == [
        list(map(id, group["params"])) for group in b.param_groups
    ]
