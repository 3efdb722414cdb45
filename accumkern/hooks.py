"""Two hooks on one parameter: one before autograd accumulates its gradient, and one after."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook

from accumkern.pipelining_private import refuse_unwatched_stage
from accumkern.slot import Slot
from accumkern.torch_private import (
    NO_BACKWARD,
    current_graph_task_id,
    current_node,
    identity_of,
    post_accumulate_hooks,
    refuse_compiled_autograd,
    set_hooks,
    tensor_hooks,
    will_evaluate,
)


class ParameterHooks:
    """The hooks of one parameter.

    When autograd is about to accumulate a gradient, and after all other hooks that see it come, ``.grad`` goes into
    ``slot.set_aside`` and is None from then on. When the gradient is in ``.grad``, and before other post-accumulate
    hooks, ``slot.accumulate(slot, param)`` is called.

    Both hooks are kept by the parameter, not by the node that accumulates its gradient: nobody has to keep the node
    alive, which knows the parameter's shape of the time when it was made.

    Args:
        slot: of the parameter, held; a frozen parameter has its hooks when it is unfrozen.
        owner: who :func:`owner_of` returns; held weakly.

    Autograd holds both functions in objects of its own, through which Python's collector cannot see: they refer to the
    parameter weakly.
    """

    def __init__(self, slot: Slot, owner: object) -> None:
        self._slot = slot
        self._before, self._after = _hooks_of(weakref.ref(slot))
        self._handles: list[RemovableHandle] = []
        self._after.accumkern_owner = weakref.ref(owner)  # type: ignore[attr-defined]
        self.put_on()

    def put_on(self) -> None:
        """Hook the parameter."""
        self.remove()
        param = self._slot.param
        is_frozen = not param.requires_grad
        with torch.inference_mode(False):
            if is_frozen:  # it takes no hooks
                param.requires_grad_(True)
            found = post_accumulate_hooks(param) or {}
            others = [item for item in found.items() if not _is_left_over(item[1])]
            found.clear()
            self._handles = [
                param.register_hook(self._before),
                param.register_post_accumulate_grad_hook(self._after),
            ]
            hooks = post_accumulate_hooks(param)
            hooks.update(others)  # ours goes first, so that the others see the sum: torch calls them in this order
            set_hooks(param, tensor_hooks(param), hooks)
            if is_frozen:
                param.requires_grad_(False)
        self._slot.identity, self._slot.hook = identity_of(param), self._handles[1].id

    def are_on(self) -> bool:
        """Return whether the parameter has its hooks still.

        ``torch.utils.swap_tensors``, by which ``module.to()`` moves a DTensor, gives it the content of another tensor,
        which then has the hooks of this one. ``_backward_hooks`` may have been cleared.
        """
        if not self._handles:
            return False
        return self._handles[0].id in (tensor_hooks(self._slot.param) or ()) and _will_come(self._slot)

    def remove(self) -> None:
        """Remove both hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def owner_of(param: Tensor) -> Any:
    """Return whose hooks are on a parameter, or None."""
    references = (getattr(hook, "accumkern_owner", None) for hook in (post_accumulate_hooks(param) or {}).values())
    return next((owner for reference in references if reference is not None and (owner := reference())), None)


def _is_left_over(hook: Any) -> bool:
    reference = getattr(hook, "accumkern_owner", None)
    return reference is not None and reference() is None


def _will_come(slot: Slot) -> bool:
    """Return whether autograd calls the second hook when it has accumulated a gradient of the parameter."""
    param = slot.param
    return identity_of(param) == slot.identity and slot.hook in (post_accumulate_hooks(param) or ())


_accumulating = NO_BACKWARD - 1  # number of the backward pass that was found to accumulate last


def _hooks_of(reference: Callable[[], Slot | None]) -> tuple[Callable[[Any], None], Callable[[Tensor], None]]:
    """Return the two hooks, which are called for every gradient. They share what they look at.

    Autograd calls the first when a gradient comes, be it to accumulate it or for torch.autograd.grad, and the second
    after it has accumulated one.
    """

    @unserializable_hook
    def before(_new: Any) -> None:
        global _accumulating
        slot = reference()
        if slot is None:
            return
        number, may_accumulate = current_graph_task_id(), True
        if number != _accumulating:  # a pass is asked once what it does
            node = current_node()
            if node is None:
                refuse_compiled_autograd()
                return
            try:
                may_accumulate = will_evaluate(node)  # False in a pass from the parameter itself
            except RuntimeError:  # torch.autograd.grad
                refuse_unwatched_stage()
                return
            if may_accumulate:
                _accumulating = number
        param = slot.param
        if identity_of(param) != slot.identity or slot.hook not in (post_accumulate_hooks(param) or ()):
            return  # who would put the gradient back?
        grad = param.grad
        if grad is not None:
            hooks = tensor_hooks(param)
            # In the order in which autograd calls them; move_to_end() of an OrderedDict does not change that.
            if not may_accumulate or (len(hooks) > 1 and list(dict.values(hooks))[-1] is not before):
                handle: RemovableHandle = current_node().register_prehook(lambda _: last(number, handle))
                return  # others are still to look
        slot.set_aside = grad
        if grad is not None:
            param.grad = None

    def last(number: int, handle: RemovableHandle) -> None:
        if current_graph_task_id() != number:  # of a pass inside that one, or after it failed
            return
        handle.remove()
        slot = reference()
        grad = None if slot is None else slot.param.grad
        if slot is not None and grad is not None and _will_come(slot):
            slot.set_aside = grad
            slot.param.grad = None

    def after(param: Tensor) -> None:
        slot = reference()
        if slot is not None and slot.param is param:  # swap_tensors gives others its hooks
            slot.accumulate(slot, param)

    return before, after
