"""Ways of accumulating gradients: stock PyTorch's, other systems', and accumkern's, all behind the same four calls.

    design = Split24(model)
    design.begin()
    for number, batch in enumerate(window):
        design.backward(design.model(batch) / len(window), last=number == len(window) - 1)
    design.step()

Every class is one design. Those with ``masters`` step FP32 weights, which they keep beside the bfloat16 ones or inside
them, or instead of them; compare them with one another, and the others with one another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import accumkern

LEARNING_RATE = 1e-3
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 1e-2  # the defaults of AdamW


class StockBF16:
    """What PyTorch does by itself: ``.grad += gradient`` in bfloat16.

    Attributes:
        key: the name in result files.
        label: the name in tables and figures.
        color: in figures.
        masters: whether FP32 weights are stepped.
        keeps_gradient: whether there is an accumulated gradient to look at.
        params: the bfloat16 weights.
    """

    key = "stock_bf16"
    label = "stock bf16"
    color = "#d1495b"
    masters = False
    keeps_gradient = True

    def __init__(self, model: nn.Module, learning_rate: float = LEARNING_RATE, max_norm: float | None = None) -> None:
        self.model = model
        self.params = list(model.parameters())
        self.max_norm = max_norm
        self.optimizer: Any = self.make_optimizer(learning_rate)  # no stub knows grad_scale, or optimi's own

    @staticmethod
    def cast(model: nn.Module) -> nn.Module:
        """Return an FP32 model as this design trains it: in bfloat16."""
        return model.bfloat16()

    def make_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Return AdamW over :meth:`stepped`."""
        return torch.optim.AdamW(self.stepped(), lr=learning_rate, fused=True)

    def stepped(self) -> list[nn.Parameter]:
        """Return the parameters that AdamW steps."""
        return self.params

    def make_state(self) -> None:
        """Make the state of AdamW, by a step with gradients of zero."""
        stepped = self.optimizer.param_groups[0]["params"]
        for param in stepped:
            param.grad = torch.zeros_like(param)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def begin(self) -> None:
        """Make ready to accumulate; called once, when there is no gradient yet."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of a micro-batch, which may be the last of its window."""
        loss.backward()

    def sums(self) -> list[Tensor]:
        """Return the accumulated gradients."""
        return [grad for param in self.params if (grad := param.grad) is not None]

    def gradients_for_step(self) -> list[Tensor]:
        """Return the gradients that AdamW would read now, before they are clipped."""
        return self.sums()

    def step(self) -> None:
        """Clip, update the weights and begin a new window."""
        self.clip()
        self.optimizer.step()
        self.begin_window()

    def clip(self) -> None:
        """Clip what AdamW reads."""
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.params, self.max_norm)

    def begin_window(self) -> None:
        """Drop the accumulated gradients."""
        for param in self.params:
            param.grad = None


class StockBF16Masters(StockBF16):
    """The same with FP32 copies of the weights ("masters"), which AdamW steps; it clips as it does so."""

    key = "stock_bf16_masters"
    label = "stock bf16 + masters"
    color = "#e59aa4"
    masters = True

    @staticmethod
    def cast(model: nn.Module) -> nn.Module:
        """Return an FP32 model in bfloat16, each parameter with the FP32 weight that it was."""
        weights = [param.detach().clone() for param in model.parameters()]
        model.bfloat16()
        for param, weight in zip(model.parameters(), weights, strict=True):
            param.fp32 = weight  # type: ignore[attr-defined]
        return model

    def stepped(self) -> list[nn.Parameter]:
        """Return FP32 copies of the weights."""
        self.fp32_weights = [nn.Parameter(weight) for weight in self.take_fp32()]
        return self.fp32_weights

    def take_fp32(self) -> list[Tensor]:
        """Return the weights in FP32, as they were before :meth:`cast` if it has cast them; they are not kept."""
        kept = [vars(param).pop("fp32", None) for param in self.params]
        return [p.detach().float() if fp32 is None else fp32 for p, fp32 in zip(self.params, kept, strict=True)]

    def gradients_for_step(self) -> list[Tensor]:
        """Return the sums in FP32."""
        return [total.float() for total in self.sums()]

    def norm(self, grads: list[Tensor]) -> Tensor:
        """Return the total norm of the gradients."""
        return nn.utils.get_total_norm(grads)

    @torch.no_grad()
    def step(self) -> None:
        """Step the FP32 weights, round them to the weights, and begin a new window."""
        grads = self.gradients_for_step()
        for weight, grad in zip(self.fp32_weights, grads, strict=True):
            weight.grad = grad
        if self.max_norm is not None:
            norm = self.norm(grads)
            self.optimizer.grad_scale = torch.clamp((norm + 1e-6) / self.max_norm, min=1.0)
            self.optimizer.found_inf = (~torch.isfinite(norm)).float()
        self.optimizer.step()
        torch._foreach_copy_([*self.params], [*self.fp32_weights])
        for weight in self.fp32_weights:
            weight.grad = None
        self.begin_window()


class GradDtype(StockBF16):
    """``grad_dtype = torch.float32``: autograd casts each gradient to FP32 and adds it to an FP32 ``.grad``."""

    key = "grad_dtype"
    label = "grad_dtype fp32"
    color = "#8d6a9f"

    def begin(self) -> None:
        """Ask for FP32 gradients."""
        for param in self.params:
            param.grad_dtype = torch.float32


class GradDtypeMasters(StockBF16Masters, GradDtype):
    """The same with FP32 copies of the weights."""

    key = "grad_dtype_masters"
    label = "grad_dtype fp32 + masters"
    color = "#c4b0cf"


class StockFP32(StockBF16):
    """The strongest that stock PyTorch can do: autograd adds to an FP32 ``.grad``, in place.

    AdamW refuses an FP32 gradient of a bfloat16 weight, so it gets the sum rounded to bfloat16.
    """

    key = "stock_fp32"
    label = "stock fp32"
    color = "#30343f"

    def begin(self) -> None:
        """Make the FP32 buffer, and have each gradient added to it."""
        sizes = [param.numel() for param in self.params]
        self.flat = torch.zeros(sum(sizes), device=self.params[0].device)
        self.buffers = [v.view_as(p) for v, p in zip(self.flat.split(sizes), self.params, strict=True)]
        self.accumulate_into_buffers()

    def accumulate_into_buffers(self) -> None:
        """Have autograd add to the buffers."""
        for param in self.params:
            param.grad_dtype = None  # .grad may have any dtype
        self.put(self.buffers)

    def put(self, grads: list[Tensor]) -> None:
        """Make these the ``.grad`` of the weights."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad

    def sums(self) -> list[Tensor]:
        """Return the FP32 buffers."""
        return self.buffers

    def gradients_for_step(self) -> list[Tensor]:
        """Return the sums in bfloat16."""
        return [buffer.to(param.dtype) for buffer, param in zip(self.buffers, self.params, strict=True)]

    def step(self) -> None:
        """Lend AdamW the sums in bfloat16, and begin a new window."""
        self.put(self.gradients_for_step())
        self.clip()
        self.optimizer.step()
        self.put(self.buffers)
        self.begin_window()

    def begin_window(self) -> None:
        """Zero the buffers."""
        self.flat.zero_()


class StockFP32Masters(StockBF16Masters, StockFP32):
    """The same with FP32 copies of the weights, which AdamW steps with the FP32 sums as they are."""

    key = "stock_fp32_masters"
    label = "stock fp32 + masters"
    color = "#a5a9b4"

    def norm(self, grads: list[Tensor]) -> Tensor:
        """Return the norm of the flat buffer."""
        return torch.linalg.vector_norm(self.flat)


class HookAdd(StockFP32Masters):
    """Megatron-LM's way: a hook adds each gradient to an FP32 buffer and drops it."""

    key = "hook_add_masters"
    label = "hook add_ + masters"
    color = "#c77d2e"

    def accumulate_into_buffers(self) -> None:
        """Hook the weights."""
        for param, buffer in zip(self.params, self.buffers, strict=True):
            param.register_post_accumulate_grad_hook(self.add_to(buffer))

    def add_to(self, buffer: Tensor) -> Callable[[Tensor], None]:
        """Return a hook that adds to ``buffer``."""

        def hook(param: Tensor) -> None:
            buffer.add_(_taken(param))

        return hook


class HookCast(HookAdd):
    """DeepSpeed's way with ``grad_accum_dtype: fp32``: a hook casts each gradient to FP32, and then adds it."""

    key = "hook_cast_masters"
    label = "hook cast, add_ + masters"
    color = "#e3b778"

    def add_to(self, buffer: Tensor) -> Callable[[Tensor], None]:
        """Return a hook that adds to ``buffer``."""

        def hook(param: Tensor) -> None:
            buffer.add_(_taken(param).to(torch.float32))

        return hook


def _taken(param: Tensor) -> Tensor:
    grad = param.grad
    assert grad is not None
    param.grad = None
    return grad


class Compiled(HookAdd):
    """Megatron-LM's way through torch.compile: one generated kernel for the addition, one for the whole step.

    Weights, their FP32 copies, the sums and the state of AdamW are one flat tensor each, which is the best that the
    compiler can be given: no list of tensors to walk through.
    """

    key = "compiled_masters"
    label = "torch.compile + masters"
    color = "#5f7f3b"

    def make_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Lay weights and their FP32 copies out flat; return AdamW, whose learning rate the compiled step takes."""
        self.flat_weights = torch.cat([param.detach().flatten() for param in self.params])
        flat = iter(self.flat_weights.split([param.numel() for param in self.params]))
        for param in self.params:
            param.data = next(flat).view_as(param)
        self.flat_fp32 = torch.cat([weight.flatten() for weight in self.take_fp32()])
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.flat_fp32), torch.zeros_like(self.flat_fp32)
        self.steps = torch.zeros((), device=self.flat_fp32.device)
        rate = torch.tensor(learning_rate, device=self.flat_fp32.device)
        return torch.optim.AdamW([nn.Parameter(self.flat_fp32)], lr=rate)

    def make_state(self) -> None:
        """Do nothing: the state is there."""

    def add_to(self, buffer: Tensor) -> Callable[[Tensor], None]:
        """Return a hook that adds to ``buffer``."""
        add, flat = _compile(_add), buffer.view(-1)

        def hook(param: Tensor) -> None:
            add(flat, _taken(param).view(-1))

        return hook

    @torch.no_grad()
    def step(self) -> None:
        """Do all of a step at once: norm, clip, AdamW, rounding and zeroing."""
        _compile(_step)(
            self.flat_weights,
            self.flat_fp32,
            self.flat,
            self.exp_avg,
            self.exp_avg_sq,
            self.steps,
            self.optimizer.param_groups[0]["lr"],
            self.max_norm,
        )


@functools.cache
def _compile(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=True)


def _add(total: Tensor, grad: Tensor) -> None:
    total.add_(grad)


def _step(
    weights: Tensor,
    fp32_weights: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    learning_rate: Tensor,
    max_norm: float | None,
) -> None:
    """One step of AdamW in FP32, as ``torch.optim.AdamW`` has it."""
    grad = grads
    if max_norm is not None:
        norm = torch.linalg.vector_norm(grads)
        grad = grads / torch.clamp((norm + 1e-6) / max_norm, min=1.0)
    steps += 1
    exp_avg.lerp_(grad, 1 - BETAS[0])
    exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
    correction1, correction2 = 1 - BETAS[0] ** steps, 1 - BETAS[1] ** steps
    denominator = exp_avg_sq.sqrt() / correction2.sqrt() + EPS
    fp32_weights.mul_(1 - learning_rate * WEIGHT_DECAY)
    fp32_weights.sub_(learning_rate / correction1 * (exp_avg / denominator))
    weights.copy_(fp32_weights)
    grads.zero_()


class GradientRelease(StockBF16):
    """Optimi's way: no accumulated gradient at all; each micro-gradient goes into the state of AdamW and is dropped.

    The square that AdamW takes is of each micro-gradient instead of their sum, and nothing can be clipped.
    """

    key = "gradient_release"
    label = "optimi gradient release"
    color = "#3fa7a0"
    keeps_gradient = False

    def make_optimizer(self, learning_rate: float) -> torch.optim.Optimizer:
        """Return optimi's AdamW, without its correction of rounded weights, which the others do not have either."""
        from optimi import AdamW, prepare_for_gradient_release

        optimizer = AdamW(
            self.params, lr=learning_rate, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, kahan_sum=False,
            gradient_release=True,
        )  # fmt: skip
        prepare_for_gradient_release(self.model, optimizer)
        return optimizer

    def make_state(self) -> None:
        """Make the state of AdamW, by a step with gradients of zero."""
        for param in self.params:
            param.grad = torch.zeros_like(param)
            self.optimizer.step(param=param)
            param.grad = None

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate into the state of AdamW, and step with the last micro-batch."""
        self.optimizer.optimizer_accumulation = not last
        loss.backward()

    def step(self) -> None:
        """Do nothing: the last backward pass has stepped."""


class Split24(StockBF16):
    """Stock PyTorch and one line."""

    key = buffer = "split24"
    label = "accumkern split24"
    color = "#1f77b4"

    def begin(self) -> None:
        """Attach."""
        self.accumulator = self.attach()

    def attach(self) -> accumkern.GradAccumulator:
        """Attach to the optimizer."""
        return accumkern.attach(self.optimizer, self.buffer)

    def sums(self) -> list[Tensor]:
        """Return ``.grad`` and residual, put together in FP32."""
        return [grad for param in self.params if (grad := self.accumulator.gradient(param)) is not None]

    def gradients_for_step(self) -> list[Tensor]:
        """Return ``.grad``."""
        return super().sums()


class Split32(Split24):
    """The same with a wider residual."""

    key = buffer = "split32"
    label = "accumkern split32"
    color = "#2a9d8f"


class Split24Finish(Split24):
    """The same with ``finish``, which clips the FP32 sum instead of ``.grad``."""

    key = "split24_finish"
    label = "accumkern split24, finish"
    color = "#7db4dc"

    def clip(self) -> None:
        """Clip and round in one pass."""
        self.accumulator.finish(max_norm=self.max_norm)


class Split32Finish(Split24Finish):
    """The same with a wider residual."""

    key = "split32_finish"
    buffer = "split32"
    label = "accumkern split32, finish"
    color = "#85cbc0"


class Split24Masters(Split24Finish):
    """The same with master weights inside the weights, which AdamW steps with the sum in FP32, clipped in FP32."""

    key = "split24_masters"
    master_weights = "split32"
    label = "accumkern split24 + masters"
    color = "#0d4a75"
    masters = True

    @staticmethod
    def cast(model: nn.Module) -> nn.Module:
        """Return an FP32 model in bfloat16; what is cut off is kept for the masters."""
        return accumkern.to_bfloat16(model)

    def attach(self) -> accumkern.GradAccumulator:
        """Attach to the optimizer, with masters of the weights."""
        return accumkern.attach(self.optimizer, self.buffer, master_weights=self.master_weights)

    def make_state(self) -> None:
        """Make the state of AdamW and of the masters, by a step with gradients of zero."""
        self.begin()
        super().make_state()

    def begin(self) -> None:
        """Attach, unless the state of the masters is there."""
        if accumkern.accumulator_of(self.optimizer) is None:
            super().begin()

    def gradients_for_step(self) -> list[Tensor]:
        """Return the sums in FP32."""
        return self.sums()


class Split24Masters24(Split24Masters):
    """The same with masters of 24 bits."""

    key = "split24_masters24"
    master_weights = "split24"
    label = "accumkern split24 + 24-bit masters"
    color = "#5c86ab"


class Split32Masters(Split24Masters):
    """The same with a wider residual of the sum."""

    key = "split32_masters"
    buffer = "split32"
    label = "accumkern split32 + masters"
    color = "#17635a"


class Autocast(StockBF16):
    """FP32 weights and gradients; matrix products compute in bfloat16."""

    key = "autocast"
    label = "fp32 weights + autocast"
    color = "#6c757d"
    masters = True

    @staticmethod
    def cast(model: nn.Module) -> nn.Module:
        """Return the model, whose forward pass casts to bfloat16 what it multiplies."""
        device = next(model.parameters()).device.type
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
        return model


DESIGNS: dict[str, type[StockBF16]] = {
    design.key: design
    for design in (
        StockBF16,
        StockFP32,
        GradDtype,
        GradientRelease,
        Split24,
        Split32,
        Split24Finish,
        Split32Finish,
        StockBF16Masters,
        StockFP32Masters,
        GradDtypeMasters,
        HookAdd,
        HookCast,
        Compiled,
        Split24Masters,
        Split24Masters24,
        Split32Masters,
        Autocast,
    )
}
