"""A torch that lacks an undocumented name."""

from __future__ import annotations

import pytest
import torch
from gradients import backward, parameter
from torch import Tensor

import accumkern
from accumkern import torch_private


def is_averaged(param: Tensor) -> bool:
    """Return whether average_over=2 is at work."""
    param.grad = None
    backward(param, 4.0)
    assert param.grad is not None
    averaged = bool((param.grad == 2).all())
    assert averaged or bool((param.grad == 4).all())
    param.grad = None
    return averaged


# ---- torch ---------------------------------------------------------------------------------------------------------


def test_a_torch_without_a_private_name_is_refused_at_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "_missing", ["torch._C._current_graph_task_id"])
    param = parameter(4)
    with pytest.raises(RuntimeError, match=r"torch .* has no torch\._C\._current_graph_task_id, which accumkern needs"):
        accumkern.attach(torch.optim.SGD([param], lr=1.0), average_over=2)
    assert not is_averaged(param)


def test_a_name_that_torch_lacks_is_noted() -> None:
    missing = list(torch_private._missing)
    assert missing == []
    try:
        assert torch_private._find("_C._no_such_name") is None
        assert torch_private._missing == ["torch._C._no_such_name"]
    finally:
        torch_private._missing[:] = missing
