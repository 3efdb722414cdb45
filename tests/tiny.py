"""For tests that train: a tiny model with its data, and what autograd hands to its parameters, added up in FP64."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import accumkern

LIGHTNING = "lightning" if find_spec("lightning") else "pytorch-lightning"  # the same code, published twice

# Relative L2 error of an accumulated gradient against the FP64 sum of its micro-gradients, and of `.grad`.
TOLERANCE = {"split24": 2e-4, "split32": 2e-6, "fp32": 2e-6}
GRAD_TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}

TOKENS = 1100  # the embedding is too large to wait for the end of a backward pass, the other parameters are not


class Classifier(nn.Module):
    """Returns the mean loss of a batch of token sequences and their classes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(TOKENS, 64)
        self.norm = nn.LayerNorm(64)
        self.hidden = nn.Linear(64, 32)
        self.out = nn.Linear(32, 10)
        self.to(dtype)

    def forward(self, tokens: Tensor, classes: Tensor) -> Tensor:
        """tokens: (batch, length); classes: (batch,); both int64."""
        x = torch.tanh(self.hidden(self.norm(self.embedding(tokens).mean(1))))
        return F.cross_entropy(self.out(x).float(), classes)


def examples(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return `count` pairs of five tokens and their class."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(TOKENS, (count, 5), generator=generator)
    classes = torch.randint(10, (count,), generator=generator)
    return list(zip(tokens, classes, strict=True))


def fp64_sums(params: Iterable[Tensor]) -> list[Tensor]:
    """Return the sums of the gradients that arrive at parameters from now on."""
    sums = []
    for p in params:
        sums.append(torch.zeros(p.shape, dtype=torch.float64, device=p.device))
        p.register_hook(functools.partial(_add, sums[-1]))
    return sums


def _add(total: Tensor, grad: Tensor) -> None:
    wide = grad.double()  # first, because of a DTensor the sum over ranks may be still to be taken
    total += wide.full_tensor() if hasattr(wide, "full_tensor") else wide


def relative_error(found: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Return the relative L2 error of all tensors together."""
    a, b = (torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (found, truth))
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def check_gradients(
    acc: accumkern.GradAccumulator, params: list[nn.Parameter], truths: list[Tensor], scale: float = 1.0
) -> None:
    """Assert that each accumulated gradient and each ``.grad`` are near to FP64 sums times a scale."""
    for i, (param, truth) in enumerate(zip(params, truths, strict=True)):
        gradient = acc.gradient(param)
        assert gradient is not None
        assert param.grad is not None
        assert relative_error([gradient], [truth * scale]) < TOLERANCE[acc.buffer], f"parameter {i}"
        assert relative_error([param.grad], [truth * scale]) < GRAD_TOLERANCE[param.dtype], f".grad of parameter {i}"


class MicroGradients:
    """Sums in FP64 of all gradients that arrive at the parameters of ``model`` from now on.

    A hook on a tensor runs before autograd adds its gradient to ``.grad``, so attached and stock runs hand in the same
    values while their weights are the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self.params = {name: param for name, param in model.named_parameters() if param.requires_grad}
        self.sums = {name: torch.zeros_like(param, dtype=torch.float64) for name, param in self.params.items()}
        for name, param in self.params.items():
            param.register_hook(functools.partial(self._add, name))

    def _add(self, name: str, grad: Tensor) -> None:
        self.sums[name] = self.sums[name].to(grad.device) + grad  # the model may have moved

    def norm(self) -> float:
        """Return the norm of all sums as one vector."""
        return math.sqrt(sum(float(total.square().sum()) for total in self.sums.values()))

    def error(self) -> float:
        """Return the relative L2 error of ``.grad`` against the sums."""
        difference = 0.0
        for name, param in self.params.items():
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            difference += float((grad.double() - self.sums[name].to(grad.device)).square().sum())
        return math.sqrt(difference) / self.norm()


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    """Assert that two models have the same parameters, bit for bit."""
    theirs = dict(expected.named_parameters())
    for name, param in found.named_parameters():
        assert torch.equal(param.detach(), theirs[name].detach()), f"{name} differs"
