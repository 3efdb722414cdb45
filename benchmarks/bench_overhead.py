"""What the hook costs on the host: microseconds for each parameter and micro-batch, over stock accumulation.

``python benchmarks/bench_overhead.py [--device cpu|cuda] [--quick]``

Many tiny bfloat16 parameters, in three kinds of models: *bare*, whose gradients one autograd node makes, so that little
is timed beside accumulation; a stack of transformer blocks; and the same with its blocks ``torch.compile``d. What is
timed is ``backward()`` of a micro-batch that is added to earlier ones. On a GPU that is the time until Python goes on,
not until the GPU has finished. Writes ``benchmarks/results/<machine>/overhead.json``.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout, installed or not

from harness import backends_on, parser, steps, write_results
from timing import describe, percentile

import accumkern
from accumkern import backends

PARAMETERS = (10, 300, 3000)
STOCK = "stock"
BARE_NUMEL = 64  # of a parameter
HIDDEN, HEADS, TOKENS = 32, 2, 8  # of a block, which has ten parameters of up to 4096 elements
MIN_ROUNDS = 8


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

    def forward(self, _: Tensor) -> Tensor:
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


def main() -> None:
    """Measure every model with every number of parameters and write the file."""
    options = parser(__doc__)
    options.add_argument("--parameters", help="numbers of parameters, multiples of ten, as 10,300")
    arguments = options.parse_args()
    device = torch.device(arguments.device)
    counts = [int(text) for text in arguments.parameters.split(",")] if arguments.parameters else list(PARAMETERS)
    torch.set_num_threads(1)  # the hook's time is Python's; torch's threads would add their waits for one another
    work = 300 if arguments.quick else 3_000  # parameters that a variant sees in all rounds

    results = []
    for model in MODELS:
        for count in counts:
            results += measure(model, count, device, rounds=work // count + MIN_ROUNDS)
    method = {
        "timed": "backward() on the host, second and later micro-batches of a window",
        "order": "stock and each backend take turns in every round; the order is reversed from round to round",
        "over_stock": "median over rounds of the difference to stock of the same round, divided by the parameters",
        "models": f"bare: parameters of {BARE_NUMEL} elements, all gradients by one autograd node; "
        f"transformer: blocks of width {HIDDEN}, {TOKENS} tokens; compiled: each block by torch.compile",
        "threads": "one",
        "buffer": "split24",
        "backend": backends.choose(None, device),
    }
    write_results(arguments, "overhead", method, results)


def measure(model: str, count: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return one result for stock and for each backend, on a model with ``count`` parameters."""
    errors: dict[str, str] = {}
    variants: dict[str, Callable[[], float]] = {}
    for name in (STOCK, *backends_on(device)):
        try:
            variants[name] = make_backward(model, count, device, None if name == STOCK else name)
        except Exception as error:  # any variant's any failure is a result
            errors[name] = describe(error)
    us: dict[str, list[float]] = {name: [] for name in variants}
    with steps(f"overhead, {model}, {count:,} parameters") as on_step:
        for number in range(rounds):
            on_step(number, rounds)
            for name in list(variants) if number % 2 == 0 else list(variants)[::-1]:
                us[name].append(1e6 * variants[name]() / count)
    results = []
    for name in [*variants, *errors]:
        result: dict[str, Any] = {"model": model, "parameters": count, "variant": name}
        if name in errors:
            result["error"] = errors[name]
        else:
            result |= {"us_per_parameter": statistics.median(us[name]), "n": rounds}
        if name in us and name != STOCK and STOCK in us:
            over = [mine - stock for mine, stock in zip(us[name], us[STOCK], strict=True)]
            result["over_stock_us"] = statistics.median(over)
            result["over_stock_p20_us"] = percentile(over, 0.2)
            result["over_stock_p80_us"] = percentile(over, 0.8)
        results.append(result)
    return results


def make_backward(model_name: str, count: int, device: torch.device, backend: str | None) -> Callable[[], float]:
    """Return a function that runs one micro-batch and returns the seconds of its ``backward()``.

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
        return time.perf_counter() - begin

    for _ in range(3):  # begin a window, make the residuals, compile
        backward()
    return backward


if __name__ == "__main__":
    main()
