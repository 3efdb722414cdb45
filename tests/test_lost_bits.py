"""The report of what stock accumulation would have lost."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import accumkern
from accumkern.fold import Fold


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 300), nn.Tanh(), nn.Linear(300, 5)).bfloat16()


def window(model: nn.Module, count: int, accumulate: bool = True) -> None:
    for _ in range(count):
        loss = model(torch.rand(4, 16).bfloat16()).float().sum()
        loss.backward() if accumulate else None


@pytest.mark.parametrize("count", [2, 64])
def test_agrees_with_a_real_stock_run(count: int) -> None:
    torch.manual_seed(3)
    model, stock = net(), net()
    stock.load_state_dict(model.state_dict())
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), report=True)
    truth: list[Tensor] = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    for _ in range(2):  # the second window starts anew
        for t, p, q in zip(truth, model.parameters(), stock.parameters(), strict=True):
            t.zero_()
            p.grad = q.grad = None
        for _ in range(count):
            x = torch.rand(4, 16).bfloat16()
            model(x).float().sum().backward()
            stock(x).float().sum().backward()
            grads = torch.autograd.grad(stock(x).float().sum(), list(stock.parameters()))
            for t, g in zip(truth, grads, strict=True):
                t += g.double()
        report = acc.report()
        assert [row.micro_batches for row in report.parameters] == [count] * 4
        for row, t, q, p in zip(report.parameters, truth, stock.parameters(), model.parameters(), strict=True):
            assert q.grad is not None
            value = acc.gradient(p)
            assert value is not None
            scale = t.norm()
            # Up to 1,024 elements are looked at: all of the small parameters, a sample of the large.
            tolerance = 1e-6 if t.numel() <= 1024 else 0.2
            assert row.stock_error == pytest.approx(float((q.grad.double() - t).norm() / scale), rel=tolerance)
            assert row.error == pytest.approx(float((value.double() - t).norm() / scale), rel=3 * tolerance, abs=1e-7)
    if count == 64:
        assert report.stock_error > 100 * report.error


def test_scale_and_edits_count_for_both() -> None:
    param = nn.Parameter(torch.zeros(500, dtype=torch.bfloat16))
    acc = accumkern.attach(torch.optim.SGD([param]), report=True, average_over=4)
    stock = torch.zeros(500, dtype=torch.bfloat16)
    exact = torch.zeros(500, dtype=torch.float64)
    for i in range(6):
        grad = (1 + torch.rand(500)).bfloat16()
        (param * grad).sum().backward()
        stock += grad / 4
        exact += grad.double() / 4
        if i == 2:
            assert param.grad is not None
            param.grad.mul_(0.5)
            stock = param.grad.clone()
            exact = stock.double()
    row = acc.report().parameters[0]
    assert row.stock_error == pytest.approx(float((stock.double() - exact).norm() / exact.norm()), rel=1e-9)
    assert row.micro_batches == 3  # since the edit


def test_prints_as_text_and_as_a_table() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.named_parameters())
    acc = accumkern.attach(optimizer, report=True)
    window(model, 4)
    report = acc.report()
    text = str(report)
    assert "0.weight" in text
    assert "300x16" in text
    assert text.splitlines()[-1].startswith("all")
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=120)
    console.print(report)
    shown = console.file.getvalue()
    assert "0.weight" in shown
    assert "micro-batches" in shown
    assert f"{report.stock_error:.1e}" in shown


@pytest.mark.parametrize(
    "change",
    [
        lambda model, acc: model.zero_grad(),
        lambda model, acc: model.zero_grad(set_to_none=False),
        lambda model, acc: acc.finish(divide_by=3.0, max_norm=0.1),
        lambda model, acc: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    ],
    ids=["zero_grad", "zeros", "finish", "clip_grad_norm_"],
)
def test_what_becomes_of_the_sum_later_does_not_count(change: Any) -> None:
    model = net()
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), "split32", report=True)
    window(model, 8)
    before = acc.report()
    assert before.error < 1e-6
    change(model, acc)
    assert acc.report() == before


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda shape: torch.zeros(shape, dtype=torch.bfloat16),
        lambda shape: torch.zeros(shape[::-1], dtype=torch.bfloat16).t(),
        lambda shape: torch.zeros((shape[0], 2 * shape[1]), dtype=torch.bfloat16)[:, ::2],
    ],
    ids=["contiguous", "transposed", "holes"],
)
def test_a_running_gradient_of_any_layout(buffer: str, layout: Any) -> None:
    param = nn.Parameter(torch.zeros(60, 50, dtype=torch.bfloat16))
    acc = accumkern.attach(torch.optim.SGD([param]), buffer, report=True)
    param.grad = layout((60, 50))
    for _ in range(20):
        (param * (1 + torch.rand(60, 50)).bfloat16()).sum().backward()
    report = acc.report()
    assert report.stock_error > 3e-3
    assert report.error < (1e-4 if buffer == "split24" else 1e-6)
    assert report.parameters[0].micro_batches == 20


def test_a_micro_batch_that_fails_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.zeros(500, dtype=torch.bfloat16))
    acc = accumkern.attach(torch.optim.SGD([param]), "split32", report=True)

    def micro_batch() -> None:
        (param * (1 + torch.rand(500)).bfloat16()).sum().backward()

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    for _ in range(4):
        micro_batch()
    with monkeypatch.context() as patch:
        patch.setattr(Fold, "many", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            micro_batch()
    micro_batch()
    assert acc.report().parameters[0].micro_batches == 5
    assert acc.report().error < 1e-6


def test_sparse_gradients_are_left_out() -> None:
    param = nn.Parameter(torch.zeros(50, 4, dtype=torch.bfloat16))
    other = nn.Parameter(torch.zeros(50, dtype=torch.bfloat16))
    acc = accumkern.attach(torch.optim.SGD([param, other]), "split32", report=True)
    for sparse in (False, True, False, False):
        rows = nn.functional.embedding(torch.arange(5), param, sparse=sparse)
        (rows.sum() + (other * torch.rand(50).bfloat16()).sum()).backward()
    rows = acc.report().parameters
    assert [row.micro_batches for row in rows] == [2, 4]
    assert all(row.error < 1e-6 for row in rows)


def test_starts_afresh_after_reset() -> None:
    """What was accumulated before, in FP32, is where the sample begins."""
    param = nn.Parameter(torch.zeros(500, dtype=torch.bfloat16))
    acc = accumkern.attach(torch.optim.SGD([param]), "split32", report=True)
    for n in range(6):
        if n == 4:
            acc._rooms.lost_bits.reset()
            with pytest.raises(RuntimeError, match="nothing to report"):
                acc.report()
        (param * (1 + torch.rand(500)).bfloat16()).sum().backward()
    assert acc.report().parameters[0].micro_batches == 2
    assert acc.report().error < 1e-6


def test_changes_no_gradient_and_no_random_number() -> None:
    results = []
    for report in (False, True):
        torch.manual_seed(7)
        model = net()
        acc = accumkern.attach(torch.optim.SGD(model.parameters()), report=report)
        window(model, 5)
        results.append([*(acc.gradient(p) for p in model.parameters()), torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nothing_to_report() -> None:
    model = net()
    acc = accumkern.attach(torch.optim.SGD(model.parameters()))
    with pytest.raises(RuntimeError, match=r"attach\(..., report=True\)"):
        acc.report()
    acc.detach()
    acc = accumkern.attach(torch.optim.SGD(model.parameters()), report=True)
    with pytest.raises(RuntimeError, match="nothing to report"):
        acc.report()
