"""Two hooks on one parameter: one before autograd accumulates its gradient, and one after."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from accumkern.torch_private import post_accumulate_hooks, set_post_accumulate_hooks


class ParameterHooks:
    """The hooks of one parameter.

    Args:
        param: the parameter; a frozen one has its hooks when it is unfrozen.
        before: called as ``before(_)`` by the node that accumulates the gradient, before it does. A hook on a node,
            unlike one on a tensor, is not called for ``torch.autograd.grad``.
        after: called as ``after(param)`` when the gradient is in ``.grad``, before other post-accumulate hooks.
        owner: who :func:`owner_of` returns; held weakly.

    Autograd holds both functions in objects of its own, through which Python's collector cannot see: they must refer to
    the parameter weakly.
    """

    def __init__(
        self, param: Tensor, before: Callable[[Any], None], after: Callable[[Tensor], None], owner: object
    ) -> None:
        self._param = param
        self._before, self._after = before, after
        self._node: Any = None  # a hook on a node lives as long as somebody refers to the node
        self._node_handle: RemovableHandle | None = None
        self._handle: RemovableHandle | None = None
        after.accumkern_owner = weakref.ref(owner)  # type: ignore[attr-defined]
        self.put_on()

    def put_on(self) -> None:
        """Hook the parameter, and the node that accumulates its gradient."""
        param = self._param
        is_frozen = not param.requires_grad
        with torch.inference_mode(False):
            if is_frozen:  # it has no node to hook; the one that is made here stays its node when it is unfrozen
                param.requires_grad_(True)
            self.renew_node()
            if self._handle is not None:
                self._handle.remove()
            found = post_accumulate_hooks(param) or {}
            others = [item for item in found.items() if not _is_left_over(item[1])]
            found.clear()
            self._handle = param.register_post_accumulate_grad_hook(self._after)
            hooks = post_accumulate_hooks(param)
            hooks.update(others)  # ours goes first, so that the others see the sum: torch calls them in this order
            set_post_accumulate_hooks(param, hooks)
            if is_frozen:
                param.requires_grad_(False)

    def are_on(self) -> bool:
        """Return whether the parameter has its hooks still.

        ``torch.utils.swap_tensors``, by which ``module.to()`` moves a DTensor, gives it the content of another tensor,
        which then has the node and the hooks of this one.
        """
        return self._node.variable is self._param

    def renew_node(self) -> bool:
        """Hook the node that accumulates the gradient; return whether it is another one than before."""
        node = get_gradient_edge(self._param).node
        if node is self._node:
            return False
        if self._node_handle is not None:
            self._node_handle.remove()
        self._node = node
        self._node_handle = node.register_prehook(self._before)
        return True

    def remove(self) -> None:
        """Remove both hooks."""
        for handle in (self._node_handle, self._handle):
            if handle is not None:
                handle.remove()


def owner_of(param: Tensor) -> Any:
    """Return whose hooks are on a parameter, or None."""
    references = (getattr(hook, "accumkern_owner", None) for hook in (post_accumulate_hooks(param) or {}).values())
    return next((owner for reference in references if reference is not None and (owner := reference())), None)


def _is_left_over(hook: Any) -> bool:
    reference = getattr(hook, "accumkern_owner", None)
    return reference is not None and reference() is None
