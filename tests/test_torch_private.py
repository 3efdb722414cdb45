"""A torch that lacks an undocumented name."""

from __future__ import annotations

import pytest
import torch
from gradients import is_averaged, parameter

import accumkern
from accumkern import torch_private

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
