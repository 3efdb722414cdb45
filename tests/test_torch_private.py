"""A torch that lacks an undocumented name."""

from __future__ import annotations

import pytest
import torch
from gradients import is_averaged, parameter

import accumkern
from accumkern import torch_private


def test_a_torch_without_a_private_name_is_refused_at_attach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_private._missing, "attach()", ["torch._C._current_graph_task_id"])
    param = parameter(4)
    right = r"torch .* has no torch\._C\._current_graph_task_id, which attach\(\) of accumkern needs"
    with pytest.raises(RuntimeError, match=right):
        accumkern.attach(torch.optim.SGD([param], lr=1.0), average_over=2)
    assert not is_averaged(param)


@pytest.mark.parametrize("needed_by", ["attach()", "planning"])
def test_a_name_that_torch_lacks_is_noted(needed_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_private._missing == {"attach()": [], "planning": []}
    monkeypatch.setitem(torch_private._missing, needed_by, [])
    torch_private.check(needed_by)
    assert torch_private._find("_C._no_such_name", needed_by) is None
    with pytest.raises(RuntimeError, match=r"has no torch\._C\._no_such_name"):
        torch_private.check(needed_by)


def test_a_torch_without_its_collectives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "_COLLECTIVES", "torch.distributed._no_such_module")
    with pytest.raises(RuntimeError, match=r"has no torch\.distributed\._no_such_module"):
        torch_private.check()
    torch_private.check("planning")


def test_a_torch_that_answers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is set aside for torch.autograd.grad would be lost."""
    torch_private._tells_what_accumulates.cache_clear()
    try:
        with monkeypatch.context() as context:
            context.setattr(torch_private, "will_evaluate", lambda _node: True)
            with pytest.raises(RuntimeError, match=r"_will_engine_execute_node that tells backward\(\) from"):
                torch_private.check()
    finally:
        torch_private._tells_what_accumulates.cache_clear()
    with torch.inference_mode():
        torch_private.check()
