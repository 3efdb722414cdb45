"""The optimizers' updates in FP32, accumkern/updates.py, against FP64 and against torch's own fused optimizers on FP32.

Differences are counted in units of each element: a unit in the last place (ulp) of the largest term of every sum that
leads to it, carried on to the weight. That of the last sum is an ulp of the larger of weight and update, and alone
where the others do not cancel. So no bound depends on whether the processor's vectors have a fused multiply-add, which
torch uses where there is one.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from accumkern.updates import Update, adam_coefficients, sgd_coefficients, updated

NUMEL = 20_000
KINDS = pytest.mark.parametrize("kind", ["training", "wide"])
# Where torch's vectors fuse, its roundings are ours to the last, but for those of a decoupled decay.
FUSES = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def ulp(*terms: Tensor) -> Tensor:
    """Return the spacing of FP32 numbers at the largest of some FP64 terms."""
    largest = torch.stack([term.abs() for term in terms]).amax(0)
    return torch.exp2(torch.floor(torch.log2(largest.clamp(min=2.0**-126))) - 23)


def inputs(kind: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return (weight, gradient, states): as in training, or spread over 24 powers of two each."""

    def normal(scale: float) -> Tensor:
        x = scale * torch.randn(NUMEL)
        return x * torch.exp2(torch.randint(-12, 13, (NUMEL,)).float()) if kind == "wide" else x

    return normal(0.02), normal(1e-3), [normal(1e-3), normal(1e-3) ** 2, normal(1e-3) ** 2]


@dataclass
class Result:
    """Weights and states after a step, by our formulas, by torch and in FP64, and the units of the weights."""

    ours: Tensor
    torchs: Tensor
    exact: Tensor
    units: Tensor
    states: list[tuple[Tensor, Tensor]]

    def errors(self, x: Tensor) -> Tensor:
        return ((x.double() - self.exact) / self.units).abs()

    def check(self, has_decoupled_decay: bool, is_large: bool, what: object) -> None:
        """Assert that our error is no larger than torch's, and that we are within two units of it, mostly within one.

        With a decoupled decay, torch multiplies the weight by 1 - lr * weight_decay, which it has rounded to FP32: up
        to half an ulp of the weight for either, and the difference is half an ulp more. Ours is half an ulp of the
        update and half of the weight: less in training, more where the update is larger than the weight.
        """
        our_errors, torchs_errors = self.errors(self.ours), self.errors(self.torchs)
        rms, torchs_rms = (float(errors.square().mean().sqrt()) for errors in (our_errors, torchs_errors))
        assert rms <= torchs_rms * (1.25 if has_decoupled_decay and is_large else 1.05), what
        assert our_errors.max() <= torchs_errors.max() + 0.5, what
        apart = ((self.ours.double() - self.torchs.double()) / self.units).abs()
        assert apart.max() <= 2, what
        assert (apart > 1).sum() < 3e-3 * NUMEL, what
        if FUSES:
            assert has_decoupled_decay or apart.max() == 0, what
            assert all(torch.equal(ours, torchs) for ours, torchs in self.states), what


def torchs_step(cls: Any, options: dict[str, Any], weight: Tensor, grad: Tensor, state: dict[str, Tensor]) -> Any:
    """Return (weight, state) after a step of torch's fused optimizer."""
    param = torch.nn.Parameter(weight.clone())
    param.grad = grad.clone()
    optimizer = cls([param], fused=True, **options)
    if state:
        optimizer.state[param] = {name: tensor.clone() for name, tensor in state.items()}
    optimizer.step()
    return param.detach(), optimizer.state[param]


# ---- Adam --------------------------------------------------------------------------------------------------------


def adam_step(kind: str, step: int, is_amsgrad: bool, options: dict[str, Any]) -> Result:
    weight, grad, states = inputs(kind)
    update = Update.AMSGRAD if is_amsgrad else Update.ADAM
    states = [state * 0 if step == 1 else state for state in states[: len(update.states)]]
    group = {"eps": 1e-8} | options

    of_torch = {name: value for name, value in group.items() if name != "decoupled_weight_decay"}
    cls = torch.optim.AdamW if group["decoupled_weight_decay"] else torch.optim.Adam
    before = {"step": torch.tensor(step - 1.0), **dict(zip(update.states, states, strict=True))}
    torchs, after = torchs_step(cls, of_torch | {"amsgrad": is_amsgrad}, weight, grad, before)

    w, g, m, v = (x.double() for x in (weight, -grad if group["maximize"] else grad, *states[:2]))
    lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    coupled, decoupled = (0.0, decay) if group["decoupled_weight_decay"] else (decay, 0.0)
    ulp_g = ulp(g, coupled * w) if coupled else torch.zeros(())
    g = g + coupled * w
    ulp_m, ulp_v = ulp(m, g) + (1 - beta1) * ulp_g, ulp(v, g.square()) + 2 * (1 - beta2) * g.abs() * ulp_g
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g.square()
    largest = torch.maximum(states[2].double(), v) if is_amsgrad else v
    root = (largest / (1 - beta2**step)).sqrt()
    step_size = lr / (1 - beta1**step)
    change = step_size * m / (root + group["eps"])
    # d change / d m, and d change / d v = change / (root + eps) * root / (2 v)
    carried = step_size / (root + group["eps"]) * ulp_m
    carried = carried + change.abs() * root / (root + group["eps"]) * ulp_v / (2 * largest).clamp(min=2.0**-149)
    moved = change + lr * decoupled * w

    ours = [state.clone() for state in states]
    by = adam_coefficients(group, torch.tensor([float(step)]))[0]
    new = updated(update, by, grad, weight, ours)
    units = ulp(w, w - moved, change) + carried
    return Result(new, torchs, w - moved, units, [(x, after[n]) for n, x in zip(update.states, ours, strict=True)])


@KINDS
@pytest.mark.parametrize("is_amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("decoupled_weight_decay", [False, True], ids=["Adam", "AdamW"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam(kind: str, is_amsgrad: bool, decoupled_weight_decay: bool, weight_decay: float) -> None:
    betas = [(0.9, 0.999), (0.0, 0.99), (0.5, 0.95), (0.3, 0.95), (0.9, 0.0)]
    for (beta1, beta2), maximize, step, lr in itertools.product(betas, (False, True), (1, 2, 1000), (1e-3, 1.0)):
        options = {
            "lr": lr,
            "betas": (beta1, beta2),
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        result = adam_step(kind, step, is_amsgrad, options)
        result.check(decoupled_weight_decay and weight_decay > 0, kind == "wide" or lr == 1.0, (options, step))


# ---- SGD ---------------------------------------------------------------------------------------------------------


def sgd_step(kind: str, is_first: bool, options: dict[str, Any]) -> Result:
    weight, grad, (buffer, *_) = inputs(kind)
    momentum, dampening, lr = options["momentum"], options["dampening"], options["lr"]
    update = Update.MOMENTUM if momentum else Update.SGD
    before = {"momentum_buffer": buffer} if momentum and not is_first else {}
    torchs, after = torchs_step(torch.optim.SGD, options, weight, grad, before)

    w, g, b = (x.double() for x in (weight, -grad if options["maximize"] else grad, buffer))
    ulp_g = ulp(g, options["weight_decay"] * w) if options["weight_decay"] else torch.zeros(())
    g = g + options["weight_decay"] * w
    if momentum:
        old, new = (b * 0, g) if is_first else (momentum * b, (1 - dampening) * g)
        ulp_b, b = ulp(old, new, old + new) + ulp_g, old + new
        ulp_g = ulp(g, momentum * b) + ulp_g + ulp_b if options["nesterov"] else ulp_b
        g = g + momentum * b if options["nesterov"] else b
    moved = lr * g

    ours = [buffer * 0 if is_first else buffer.clone()] if momentum else []
    by = sgd_coefficients(options, torch.tensor([is_first]))[0]
    found = updated(update, by, grad, weight, ours)
    units = ulp(w, w - moved, moved) + lr * ulp_g
    return Result(found, torchs, w - moved, units, [(x, after[n]) for n, x in zip(update.states, ours, strict=True)])


@KINDS
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.1, False), (0.9, 0.0, True)]
)
def test_sgd(kind: str, weight_decay: float, momentum: float, dampening: float, nesterov: bool) -> None:
    for maximize, is_first, lr in itertools.product((False, True), (False, True), (1e-2, 1.0)):
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "dampening": dampening,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        sgd_step(kind, is_first, options).check(False, False, (options, is_first))


# ---- coefficients ------------------------------------------------------------------------------------------------


def test_first_step_of_a_beta_of_zero_moves_by_the_learning_rate() -> None:
    """Adam's first step is lr * sign(gradient), exactly so without eps and with powers of two."""
    weight, grad = torch.zeros(6), torch.tensor([1.0, -1.0, 2.0**20, -(2.0**-20), 4.0, -8.0])
    group = {"lr": 0.25, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0, "maximize": False}
    by = adam_coefficients(group | {"decoupled_weight_decay": True}, torch.tensor([1.0]))[0]
    new = updated(Update.ADAM, by, grad, weight, [torch.zeros(6), torch.zeros(6)])
    assert torch.equal(new, -0.25 * grad.sign())


@pytest.mark.parametrize("device_of_lr", ["number", "tensor"])
def test_coefficients_round_once(device_of_lr: str) -> None:
    """From FP64: 1 - beta2 is not 1 - float32(beta2)."""
    lr = 1e-3 if device_of_lr == "number" else torch.tensor(1e-3, dtype=torch.float64)
    group = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "maximize": True}
    row = adam_coefficients(group | {"decoupled_weight_decay": True}, torch.tensor([3.0]))[0]
    beta1, beta2 = 0.9, 0.999
    exact = [-1, 0, 1e-3 * 0.1, 1 - beta1, beta2, 1 - beta2, (1 - beta2**3) ** 0.5, 1e-8, 1e-3 / (1 - beta1**3)]
    torch.testing.assert_close(row, torch.tensor(exact, dtype=torch.float64).float(), rtol=1.2e-7, atol=0.0)
    assert row[5] == torch.tensor(1 - 0.999)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_coefficients_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
    adam["decoupled_weight_decay"] = True
    sgd = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.9, "dampening": 0.3, "nesterov": True, "maximize": False}
    steps, is_first = torch.tensor([1.0, 300.0]), torch.tensor([True, False])
    expected = adam_coefficients(adam, steps), sgd_coefficients(sgd, is_first)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = adam_coefficients(adam, steps), sgd_coefficients(sgd, is_first)
    finally:
        torch.set_default_dtype(before)
    for rows, wanted in zip(found, expected, strict=True):
        assert torch.equal(rows, wanted)
