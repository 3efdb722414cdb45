"""Which parameters have hooks: those in the optimizer's groups, also when they are added, moved or replaced."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accumkern.hooks import ParameterHooks, owner_of
from accumkern.passes import hook_functions
from accumkern.slot import Slot, Stored
from accumkern.torch_private import has_step_hooks


class Attachment:
    """The parameters of an optimizer, and the slot of each that has hooks.

    An optimizer holds what is attached to it, and is not held by it: when it is gone, its hooks are removed. Wrappers
    of one are held: some are made for the call to attach() alone.

    Attributes:
        slots: parameter -> slot, in the order of the optimizer; the same dictionary always, empty once detached.
        is_attached: whether hooks are on the parameters.
        face: returns what users hold of it, while somebody holds that.
        rooms: what the face is made of.

    Args:
        optimizer: a ``torch.optim.Optimizer``, or what wraps one.
        check: called as ``check(name, param)``; raises where a parameter's gradient cannot be folded.
        make_slot: makes the slot of a parameter.
    """

    def __init__(
        self, optimizer: Any, check: Callable[[str, Tensor], None], make_slot: Callable[[Tensor], Slot]
    ) -> None:
        self.slots: dict[Tensor, Slot] = {}
        self.face: Callable[[], Any] = lambda: None
        self.rooms: Any = None
        self._check, self._make_slot = check, make_slot
        self._hooks: dict[Tensor, ParameterHooks] = {}
        self._step_hook: Any = None
        self.is_attached = False
        is_torchs = isinstance(optimizer, torch.optim.Optimizer)
        self._optimizer: Callable[[], Any] = weakref.ref(optimizer) if is_torchs else lambda: optimizer
        self._groups: list[dict[str, Any]] = optimizer.param_groups

    def __del__(self) -> None:
        self.detach()

    def attach(self) -> None:
        """Hook all parameters, and have those hooked that are added later; after an error nothing is attached."""
        params = self._unhooked()
        try:
            self._watch_param_groups()
            self._hook(params)
            optimizer = self.optimizer
            while optimizer is not None and not has_step_hooks(optimizer):  # of what it wraps, as Accelerate's does
                optimizer = getattr(optimizer, "optimizer", None)
            if optimizer is not None:
                self._step_hook = optimizer.register_step_pre_hook(lambda *_: self.check_hooks())
        except BaseException:
            self.detach()
            raise
        self.is_attached = True

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
        return {slot.device for slot in self.slots.values()}

    def stored(self) -> list[Stored]:
        """Return the gradients that are there, as they lie in memory."""
        return [slot.stored() for slot in self.slots.values() if slot.param.grad is not None]

    def check_hooks(self) -> None:
        """Hook parameters again that have lost their hooks; called before every step and at the end of a window.

        Raises:
            RuntimeError: one of them has a gradient, which torch has accumulated by itself.
        """
        if torch.compiler.is_compiling():  # of the optimizer's step
            return
        lost = [param for param, hooks in self._hooks.items() if not hooks.are_on()]
        for param in lost:
            self._hooks[param].put_on()
            self.slots[param].renew()
        missed = [param for param in lost if param.grad is not None]
        if missed:
            raise RuntimeError(
                f"{len(missed)} parameters, the first of shape {tuple(missed[0].shape)}, have lost their hooks since "
                "attach(), and torch has accumulated their gradients by itself: module.to() has put other tensors into "
                "them (torch.utils.swap_tensors, which it uses for DTensors). They are hooked again now: call "
                "zero_grad() and begin the window again, or attach() after module.to()"
            )

    def renew_nodes(self, only: Tensor | None = None) -> None:
        """Hook the nodes of parameters that were moved or cast: autograd has made new ones."""
        for param in self._hooks if only is None else [only]:
            if param.requires_grad and self._hooks[param].renew_node():
                self.slots[param].renew()

    def detach(self) -> None:
        """Remove every hook; calling it again does nothing."""
        self.is_attached = False
        for hooks in self._hooks.values():
            hooks.remove()
        self._hooks.clear()
        self.slots.clear()
        if self._step_hook is not None:
            self._step_hook.remove()
        optimizer = self.optimizer
        watch = getattr(optimizer, "__dict__", {}).get("add_param_group")
        if getattr(watch, "attachment", None) is self:
            del optimizer.add_param_group

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
            self._hooks[param] = ParameterHooks(param, *hook_functions(slot), owner=self)

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

        add_param_group.attachment = self  # type: ignore[attr-defined]
        try:
            optimizer.add_param_group = add_param_group
        except AttributeError as error:
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}, whose add_param_group cannot be watched ({error}); attach "
                "to the torch.optim.Optimizer that it wraps"
            ) from error
