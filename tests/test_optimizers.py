"""Optimizers of torch and of others, learning rate schedulers, and what is allocated between two windows."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import is_interpreted
from tiny import Classifier, MicroGradients, assert_same_weights, examples
from torch import nn
from torch.optim import lr_scheduler

import accumkern

pytestmark = pytest.mark.usefixtures("one_thread")

BATCHES = [(tokens.unsqueeze(0), classes.unsqueeze(0)) for tokens, classes in examples(8)]


# ---- optimizers --------------------------------------------------------------------------------------------------


def muon(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Muon steps matrices only; the others are left as they are."""
    return torch.optim.Muon([param for param in params if param.dim() == 2], lr=1e-2)


def two_groups(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": params[:2], "lr": 1e-3}, {"params": params[2:], "weight_decay": 0.0}], lr=1e-2)


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

TORCH: dict[str, Make] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "AdamW-foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "AdamW-fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "AdamW-groups": two_groups,
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "Muon": muon,
    "NAdam": lambda params: torch.optim.NAdam(params, lr=1e-2),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.5),
}


def optimi(name: str, **options: Any) -> Make:
    return lambda params: getattr(importlib.import_module("optimi"), name)(params, lr=1e-2, **options)


def bitsandbytes(name: str) -> Make:
    return lambda params: getattr(importlib.import_module("bitsandbytes").optim, name)(params, lr=1e-3)


OF_OTHERS: dict[str, tuple[str, Make]] = {
    "optimi-AdamW": ("optimi", optimi("AdamW", triton=False)),
    "optimi-StableAdamW": ("optimi", optimi("StableAdamW", triton=False)),
    "optimi-Lion": ("optimi", optimi("Lion", triton=False)),
    "bitsandbytes-AdamW8bit": ("bitsandbytes", bitsandbytes("AdamW8bit")),
    "bitsandbytes-Lion8bit": ("bitsandbytes", bitsandbytes("Lion8bit")),
}

SCHEDULERS: list[Callable[[torch.optim.Optimizer], Any]] = [
    lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5),
    lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2),
]


def train(make: Make, attached: bool) -> nn.Module:
    """Train FP32 weights for three windows of eight micro-batches; return the model."""
    model = Classifier(torch.float32)
    optimizer = make(list(model.parameters()))
    if attached:
        accumkern.attach(optimizer)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(3):
        for batch in BATCHES:
            (model(*batch) / len(BATCHES)).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()  # of parameters that the optimizer has not
        scheduler.step()
    return model


def assert_trains_as_stock(make: Make) -> None:
    assert_same_weights(train(make, attached=True), train(make, attached=False))


def assert_hands_on_better_gradients(make: Make) -> None:
    errors = {}
    for attached in (True, False):
        model = Classifier(torch.bfloat16)
        optimizer = make(list(model.parameters()))
        if attached:
            accumkern.attach(optimizer)
        stepped = [param for group in optimizer.param_groups for param in group["params"]]
        truth = MicroGradients(nn.ParameterList(stepped))
        before = [param.detach().clone() for param in stepped]
        for batch in BATCHES * 32:
            model(*batch).backward()
        errors[attached] = truth.error()
        optimizer.step()
        assert all(bool(param.isfinite().all()) for param in stepped)
        assert any(not torch.equal(param, old) for param, old in zip(stepped, before, strict=True))
    assert errors[True] < 2.5e-3  # one rounding to bfloat16
    assert errors[False] > 4 * errors[True]


@pytest.mark.integration("Optimizers: torch.optim")
@pytest.mark.parametrize("make", TORCH.values(), ids=TORCH)
def test_optimizers_of_torch(make: Make) -> None:
    assert_trains_as_stock(make)
    assert_hands_on_better_gradients(make)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.integration("Optimizers: optimi", version_of="torch-optimi"))
        for name in OF_OTHERS
        if name.startswith("optimi")
    ]
    + [
        pytest.param(name, marks=pytest.mark.integration("Optimizers: bitsandbytes", version_of="bitsandbytes"))
        for name in OF_OTHERS
        if name.startswith("bitsandbytes")
    ],
)
def test_optimizers_of_others(name: str) -> None:
    module, make = OF_OTHERS[name]
    pytest.importorskip(module)
    assert_trains_as_stock(make)
    assert_hands_on_better_gradients(make)


@pytest.mark.integration("Optimizers: LBFGS, whose closure is a whole window")
def test_lbfgs() -> None:
    models = []
    for attached in (True, False):
        model = Classifier(torch.float32)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")
        if attached:
            accumkern.attach(optimizer)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            total = 0.0
            for batch in BATCHES:
                loss = model(*batch) / len(BATCHES)
                loss.backward()
                total += loss.item()
            return total

        for _ in range(2):
            optimizer.step(closure)  # type: ignore[arg-type]
        models.append(model)
    assert_same_weights(models[0], models[1])


@pytest.mark.integration(
    "optimi: gradient release", version_of="torch-optimi", refused="optimi takes no hooked parameters"
)
def test_gradient_release_is_refused_by_optimi() -> None:
    """It steps inside the backward pass and throws the gradient away: there is nothing to accumulate."""
    optimi = pytest.importorskip("optimi")
    model = Classifier(torch.bfloat16)
    optimizer = optimi.AdamW(model.parameters(), lr=1e-3, gradient_release=True)
    accumkern.attach(optimizer)
    with pytest.raises(ValueError, match="Model already has post_accumulate_grad_hooks"):
        optimi.prepare_for_gradient_release(model, optimizer)


@pytest.mark.integration("Learning rate schedulers")
@pytest.mark.parametrize("make_scheduler", SCHEDULERS, ids=["OneCycleLR", "CosineAnnealingWarmRestarts"])
@pytest.mark.parametrize("first", ["attach", "scheduler"])
def test_schedulers(first: str, make_scheduler: Callable[[torch.optim.Optimizer], Any]) -> None:
    models, rates = [], []
    for attached in (True, False):
        model = Classifier(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if attached and first == "attach":
            accumkern.attach(optimizer)
        scheduler = make_scheduler(optimizer)
        if attached and first == "scheduler":
            accumkern.attach(optimizer)
        of_run = []
        for _ in range(4):
            for batch in BATCHES:
                (model(*batch) / len(BATCHES)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            of_run.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        models.append(model)
        rates.append(of_run)
    assert rates[0] == rates[1]
    assert_same_weights(models[0], models[1])


# ---- memory ------------------------------------------------------------------------------------------------------

NUMEL = 2**17


@pytest.fixture(scope="module")
def meter() -> type[Any]:
    """The demo's reading of what torch allocates and frees."""
    folder = str(Path(__file__).resolve().parent.parent / "examples")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("measure").AllocatorMeter
    finally:
        sys.path.remove(folder)


@pytest.mark.integration("Memory of gradients after the step")
@pytest.mark.parametrize(
    ("buffer", "in_window", "between"),
    [(None, 2, 0), ("split24", 3, 1), ("split32", 4, 2), ("fp32", 6, 4)],
    ids=["stock", "split24", "split32", "fp32"],
)
def test_only_residuals_stay_allocated_between_windows(
    backend: str, device: torch.device, buffer: str | None, in_window: int, between: int, meter: type[Any]
) -> None:
    if is_interpreted(backend, device):
        pytest.skip("triton's interpreter keeps copies of its arguments")
    param = nn.Parameter(torch.ones(NUMEL, dtype=torch.bfloat16, device=device))
    x = torch.ones_like(param)
    optimizer = torch.optim.SGD([param], lr=0.1)
    if buffer is not None:
        accumkern.attach(optimizer, buffer, backend=backend)

    with meter(device) as allocated:
        for set_to_none in (False, True):
            for _ in range(3):
                (param * x).sum().backward()
            allocated.mark()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            allocated.mark()
    held = [round(in_bytes / NUMEL, 2) for in_bytes in allocated.held_bytes]
    assert held == [in_window, in_window, in_window, between]
