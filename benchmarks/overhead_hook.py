"""The hook's host time: ``backward()`` of models with many tiny bfloat16 parameters."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import percentile
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from turns import by_turns

import accumkern

STOCK = "stock"
BARE_NUMEL = 64  # of a parameter
HIDDEN, HEADS, TOKENS = 32, 2, 8  # of a block, which has ten parameters of up to 4096 elements


class MakeGradients(torch.autograd.Function):
    """A scalar whose gradients are new tensors, made by one call."""

    @staticmethod
    def forward(ctx: Any, micro_gradients: list[Tensor], *params: Tensor) -> Tensor:
        """Return zero."""
        ctx.micro_gradients = micro_gradients
        return torch.zeros((), device=params[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return copies of the micro-gradients."""
        return None, *torch._foreach_mul(ctx.micro_gradients, 1.0)


class Bare(nn.Module):
    """As many parameters as wanted, and one autograd node."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.params = nn.ParameterList(torch.randn(BARE_NUMEL).bfloat16() for _ in range(count))
        self.micro_gradients = nn.ParameterList(
            nn.Parameter(torch.randn(BARE_NUMEL).bfloat16(), requires_grad=False) for _ in range(count)
        )

    def forward(self, _: Tensor | None = None) -> Tensor:
        """Return zero."""
        loss: Tensor = MakeGradients.apply([g.detach() for g in self.micro_gradients], *self.params)
        return loss


class Block(nn.Module):
    """A small transformer block of ten parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(HIDDEN)
        self.query_key_value = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.output = nn.Linear(HIDDEN, HIDDEN)
        self.mlp_norm = nn.RMSNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (batch, tokens, hidden) after attention and MLP."""
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, HEADS, HIDDEN // HEADS))
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, count: int, compiled: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count // 10))
        if compiled:
            for block in self.blocks:
                block.compile(fullgraph=True)  # torch compiles the first, and all others run the same code

    def forward(self, x: Tensor) -> Tensor:
        """Return a scalar loss of ``x`` (batch, tokens, hidden)."""
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "bare": Bare,
    "eager": lambda count: Transformer(count, compiled=False),
    "compiled": lambda count: Transformer(count, compiled=True),
}


def measure(
    model: str, count: int, device: torch.device, backends: list[str], share: Callable[[], float]
) -> list[dict[str, Any]]:
    """Return one result for stock and for each backend, on a model with ``count`` parameters."""
    variants = {STOCK: None, **{backend: backend for backend in backends}}
    makers = {name: partial(make_backward, model, count, device, backend) for name, backend in variants.items()}
    measured = by_turns(makers, share)
    stock = measured[STOCK]
    results = []
    for name, us in measured.items():
        result: dict[str, Any] = {"model": model, "parameters": count, "variant": name}
        if isinstance(us, str):
            result["error"] = us
        else:
            result |= {"us_per_parameter": statistics.median(us), "n": len(us)}
            if name != STOCK and not isinstance(stock, str):
                over = [mine - other for mine, other in zip(us, stock, strict=True)]
                result["over_stock_us"] = statistics.median(over)
                result["over_stock_p20_us"] = percentile(over, 0.2)
                result["over_stock_p80_us"] = percentile(over, 0.8)
        results.append(result)
    return results


def make_backward(model_name: str, count: int, device: torch.device, backend: str | None) -> Callable[[], float]:
    """Return a function that runs one micro-batch and returns the microseconds of its ``backward()`` for a parameter.

    Args:
        model_name: of :data:`MODELS`.
        count: number of parameters.
        device: where they are.
        backend: what accumkern folds with; None leaves accumulation to torch.
    """
    torch.manual_seed(0)
    model = MODELS[model_name](count).to(device, torch.bfloat16)
    params = [param for param in model.parameters() if param.requires_grad]
    assert len(params) == count, f"the model has {len(params)} parameters instead of {count}"
    x = torch.randn(1, TOKENS, HIDDEN, device=device).bfloat16()
    acc = None if backend is None else accumkern.attach(torch.optim.SGD(params), backend=backend)

    def backward(_kept: object = acc) -> float:  # the hooks live no longer than the accumulator
        loss = model(x)
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        loss.backward()
        return 1e6 * (time.perf_counter() - begin) / count

    for _ in range(3):  # begin a window, make the residuals, compile
        backward()
    return backward
