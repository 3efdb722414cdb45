"""torch.compile: the model compiles as it does without accumkern, and what must not be compiled says so."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from tiny import Classifier, MicroGradients, assert_same_weights, examples
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import accumkern

BATCHES = [(tokens.unsqueeze(0), classes.unsqueeze(0)) for tokens, classes in examples(8)]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]

compile_feature = pytest.mark.integration("torch.compile of the model, fullgraph")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


class Run:
    """Windows of eight micro-batches through a compiled model."""

    def __init__(self, model: nn.Module, attached: bool, **options: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.accumulator = accumkern.attach(self.optimizer) if attached else None
        self.compiled = torch.compile(model, **options)

    def window(self, repeats: int = 1) -> None:
        for batch in BATCHES * repeats:
            self.compiled(*batch).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def graphs_and_breaks() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@compile_feature
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_weights_train_as_stock_bit_for_bit_with_the_same_graphs(backend: str) -> None:
    runs, graphs = [], []
    for attached in (True, False):
        torch._dynamo.reset()
        counters.clear()
        run = Run(Classifier(torch.float32), attached, backend=backend, fullgraph=True)
        for _ in range(3):
            run.window()
            run.step()
        runs.append(run)
        graphs.append(graphs_and_breaks())
    assert graphs[0] == graphs[1] == (1, 0)  # one graph for all windows, and no breaks
    assert_same_weights(runs[0].model, runs[1].model)


@compile_feature
def test_bf16_gradients_are_nearer_to_fp64_than_stock() -> None:
    errors = {}
    for attached in (True, False):
        run = Run(Classifier(torch.bfloat16), attached, backend="aot_eager", fullgraph=True)
        truth = MicroGradients(run.model)
        run.window(repeats=48)
        errors[attached] = truth.error()
    assert errors[True] < 2.5e-3  # one rounding to bfloat16
    assert errors[False] > 4 * errors[True]


@compile_feature
def test_attach_after_the_model_was_compiled_and_used() -> None:
    run = Run(Classifier(torch.float32), False, backend="aot_eager", fullgraph=True)
    run.window()
    run.optimizer.zero_grad()
    accumkern.attach(run.optimizer)
    run.window()
    assert graphs_and_breaks() == (1, 0)
    stock = Run(Classifier(torch.float32), False, backend="aot_eager", fullgraph=True)
    stock.window()
    run.step()
    stock.step()
    assert_same_weights(run.model, stock.model)


@pytest.mark.integration("torch.compile of the optimizer's step")
def test_compiled_optimizer_step() -> None:
    models = []
    for attached in (True, False):
        run = Run(Classifier(torch.float32), attached, backend="aot_eager")
        step = torch.compile(run.optimizer.step, backend="aot_eager")
        for _ in range(3):
            run.window()
            step()
            run.optimizer.zero_grad()
        models.append(run.model)
    assert_same_weights(models[0], models[1])


class Checkpointed(Classifier):
    """The same model, which computes its activations again in the backward pass."""

    def __init__(self, dtype: torch.dtype, use_reentrant: bool) -> None:
        super().__init__(dtype)
        self.use_reentrant = use_reentrant

    def forward(self, tokens: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embedding(tokens).mean(1))
        x = checkpoint(lambda y: torch.tanh(self.hidden(y)), x, use_reentrant=self.use_reentrant)
        return nn.functional.cross_entropy(self.out(x).float(), classes)


@pytest.mark.integration("Activation checkpointing, compiled or not")
@pytest.mark.parametrize(
    ("use_reentrant", "backend"),
    [(False, None), (True, None), (False, "aot_eager")],  # torch.compile takes non-reentrant checkpointing only
    ids=["non-reentrant", "reentrant", "compiled"],
)
def test_activation_checkpointing(use_reentrant: bool, backend: str | None) -> None:
    options = {"disable": True} if backend is None else {"backend": backend, "fullgraph": True}
    gradients = []
    for model in (Checkpointed(torch.bfloat16, use_reentrant), Classifier(torch.bfloat16)):
        run = Run(model, True, **options)
        run.window(repeats=8)
        assert run.accumulator is not None
        gradients.append([run.accumulator.gradient(param) for param in model.parameters()])
    for checkpointed, plain in zip(*gradients, strict=True):
        assert checkpointed is not None
        assert torch.equal(checkpointed, plain)


@pytest.mark.integration("Compiled autograd", refused="it adds gradients before hooks are called")
@pytest.mark.parametrize("how", ["config", "context"])
@pytest.mark.parametrize("micro_batches_before", [0, 3])
def test_compiled_autograd_is_refused_and_changes_nothing(micro_batches_before: int, how: str) -> None:
    model = Classifier(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = accumkern.attach(optimizer, average_over=8)
    for batch in BATCHES[:micro_batches_before]:
        model(*batch).backward()

    def micro_batch() -> None:
        model(*BATCHES[0]).backward()

    @torch._dynamo.config.patch(compiled_autograd=True)
    def by_config() -> None:
        torch.compile(micro_batch, backend="aot_eager")()

    def in_context() -> None:
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            micro_batch()

    with pytest.raises(RuntimeError, match="compiled autograd adds gradients before accumkern sees them"):
        (by_config if how == "config" else in_context)()

    untouched = Classifier(torch.bfloat16)
    other = accumkern.attach(torch.optim.SGD(untouched.parameters(), lr=0.1), average_over=8)
    for batch in BATCHES:
        untouched(*batch).backward()
    for batch in BATCHES[micro_batches_before:]:  # the window goes on
        model(*batch).backward()
    for a, b in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(accumulator.gradient(a), other.gradient(b))
