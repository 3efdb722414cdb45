"""The state of an optimizer that steps FP32 stand-ins of bfloat16 parameters: it stays in FP32.

``Optimizer.load_state_dict`` gives floating tensors of a state the dtype of the parameter. Two hooks put those back
that it was given, so that checkpoints are exchanged with the same optimizer on FP32 parameters without loss.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from accumkern.torch_private import LastHook


class Fp32State:
    """Keeps the state of an optimizer's bfloat16 parameters in FP32, until it is removed.

    Args:
        optimizer: a ``torch.optim.Optimizer``. States that it has already become FP32.
        has_master: returns whether a parameter is stepped as an FP32 one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, has_master: Callable[[Tensor], bool]) -> None:
        self._optimizer, self._has_master = weakref.ref(optimizer), has_master
        self._loaded: dict[str, Any] | None = None
        for group in optimizer.param_groups:
            for param in group["params"]:
                state = optimizer.state.get(param)
                if state and has_master(param):
                    _widen(state, state, also_bfloat16=True)
                    if "initial_accumulator_value" in group and state.get("step") == 0:  # Adagrad has rounded it
                        state["sum"].fill_(group["initial_accumulator_value"])
        self._handles: list[Any] = [
            LastHook(optimizer, "load_state_dict", self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self, keep_fp32: bool = False) -> None:
        """Leave states to torch, which takes them in the dtype of the parameters, as its ``load_state_dict`` does.

        Other optimizers than torch's own may have chosen FP32 by themselves; their states stay, and so do all with
        ``keep_fp32``.
        """
        for handle in self._handles:
            handle.remove()
        optimizer = self._optimizer()
        if keep_fp32 or optimizer is None or not _is_torchs(optimizer):
            return
        for param, state in optimizer.state.items():
            if isinstance(param, Tensor) and self._has_master(param):
                for key, value in state.items():
                    has_values = key != "step" and isinstance(value, Tensor) and (value.dim() > 0 or param.dim() == 0)
                    if has_values and value.dtype is torch.float32:
                        state[key] = value.to(param.dtype)

    def _before_load(self, _optimizer: Any, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _after_load(self, optimizer: Any) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        for group, loaded_group in zip(optimizer.param_groups, loaded["param_groups"], strict=True):
            for param, key in zip(group["params"], loaded_group["params"], strict=True):
                if key in loaded["state"] and self._has_master(param):
                    _widen(optimizer.state.get(param), loaded["state"][key], also_bfloat16=_is_torchs(optimizer))


def _is_torchs(optimizer: Any) -> bool:
    """Return whether an optimizer is one of torch's, or derives from one: its states have the weights' dtype."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind is not torch.optim.Optimizer]
    return any(kind.__module__.startswith("torch.optim.") for kind in kinds)


def _widen(live: Any, loaded: Any, also_bfloat16: bool) -> None:
    """Put what was loaded, in FP32, in the place of bfloat16 tensors in nested dictionaries and lists.

    Args:
        live: the state.
        loaded: what it was made of.
        also_bfloat16: whether tensors become FP32 that were bfloat16 before they were loaded.
    """
    items = live.items() if isinstance(live, dict) else enumerate(live) if isinstance(live, list) else ()
    for key, value in list(items):
        if isinstance(value, Tensor):
            if value.dtype is torch.bfloat16 and (also_bfloat16 or loaded[key].dtype is not torch.bfloat16):
                live[key] = loaded[key].detach().to(value.device, torch.float32, copy=True)
        else:
            _widen(value, loaded[key], also_bfloat16)
