"""CUDA graphs: a micro-batch with its folds, and the end of a window, captured once and replayed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import accumkern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.integration("CUDA graphs: backward with its folds, finish()"),
]


def network(dtype: torch.dtype) -> nn.Module:
    """Parameters that wait for the end of the backward pass, and one that is too large to."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(96, 768), nn.GELU(), nn.Linear(768, 8)).to("cuda", dtype)


def inputs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(16, 96, generator=generator).to("cuda", torch.bfloat16) for _ in range(count)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


class Run:
    """A model whose first window has allocated gradients, residuals and partial sums, and loaded every kernel."""

    def __init__(self, buffer: str) -> None:
        self.model = network(torch.bfloat16)
        self.accumulator = accumkern.attach(torch.optim.SGD(self.model.parameters()), buffer)
        self.x = inputs(1)[0].clone()
        self.tokens = torch.full((), 7.0, device="cuda")
        for _ in range(2):
            for _ in range(3):
                self.micro_batch()
            self.finish()
            self.model.zero_grad(set_to_none=False)

    def micro_batch(self) -> None:
        loss(self.model, self.x).backward()

    def finish(self) -> None:
        self.norm = self.accumulator.finish(divide_by=self.tokens, max_norm=0.1).norm

    def gradients(self) -> list[Tensor]:
        torch.cuda.synchronize()
        return [param.grad.clone() for param in self.model.parameters() if param.grad is not None]


@pytest.mark.parametrize("buffer", ["split24", "split32", "fp32"])
def test_captured_micro_batch_and_finish_replay_like_the_loop(buffer: str) -> None:
    loop = Run(buffer)
    # Everything on one stream: autograd remembers the one that was current when a parameter was attached.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = Run(buffer)
        run.micro_batch()  # the first fold of a window starts from .grad alone; those that are captured go on
    torch.cuda.synchronize()
    micro_batch, end_of_window = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(micro_batch, stream=stream):
        run.micro_batch()
    with torch.cuda.graph(end_of_window, stream=stream):
        run.finish()
    run.model.zero_grad(set_to_none=False)

    for window in (inputs(8)[:5], inputs(8)[5:]):
        for x in window:
            for one in (loop, run):
                one.x.copy_(x)
            loop.micro_batch()
            micro_batch.replay()
        compare(run.gradients(), loop.gradients())
        loop.finish()
        end_of_window.replay()
        compare([run.norm, *run.gradients()], [loop.norm, *loop.gradients()])
        for one in (loop, run):
            one.model.zero_grad(set_to_none=False)


def compare(found: list[Tensor], right: list[Tensor]) -> None:
    for tensor, other in zip(found, right, strict=True):
        # A residual that is left beside a zeroed gradient is worth less than 2^-126.
        torch.testing.assert_close(tensor, other, rtol=0, atol=1e-37)


def test_model_compiled_with_graphs_of_its_own() -> None:
    """mode="reduce-overhead" replays the model's backward pass; its gradients lie in memory that is used again.

    As in stock PyTorch, a window must not begin with one of them as ``.grad``: there are zeros in other memory.
    """
    sums: list[list[Tensor | None]] = []
    for options in ({"disable": True}, {"mode": "reduce-overhead", "fullgraph": True}):
        model = network(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accumulator = accumkern.attach(optimizer)
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        compiled = torch.compile(model, **options)
        for _ in range(3):  # the third window replays
            optimizer.zero_grad(set_to_none=False)
            for x in inputs(6):
                torch.compiler.cudagraph_mark_step_begin()
                compiled(x.float()).square().mean().backward()
        sums.append([accumulator.gradient(param) for param in model.parameters()])
    for found, right in zip(*sums, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


class Masters:
    """A model that is trained with master weights by whole windows, into gradients that stay where they are."""

    def __init__(self) -> None:
        self.model = accumkern.to_bfloat16(network(torch.float32))
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-3, foreach=True, capturable=True)
        self.accumulator = accumkern.attach(self.optimizer, "split32", master_weights="split32", bucket=2**19)
        self.x = inputs(1)[0].clone()

    def window(self) -> None:
        for _ in range(2):
            loss(self.model, self.x).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def masters(self) -> list[Tensor]:
        torch.cuda.synchronize()
        return [self.accumulator.master_weight(param) for param in self.params]


def test_captured_step_with_master_weights_replays_like_the_loop() -> None:
    loop = Masters()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = Masters()
        for _ in range(2):
            run.window()
    for _ in range(2):
        loop.window()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run.window()
    for x in inputs(4):
        for one in (loop, run):
            one.x.copy_(x)
        loop.window()
        graph.replay()
        compare(run.masters(), loop.masters())


def test_a_step_that_is_captured_before_there_are_masters_is_refused() -> None:
    weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device="cuda"))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    accumkern.attach(optimizer, master_weights="split32")
    torch.cuda.synchronize()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"a CUDA graph is being captured, and a weight of shape \(64,\) has no"):
        capture()
