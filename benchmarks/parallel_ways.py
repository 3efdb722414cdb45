"""The ways of bench_parallel.py to divide one global batch and one model among ranks, with a GPT that all of them take.

A way is made on every rank of the process group. It runs windows of this rank's part of the global batch, and hands out
what the window has left: gradients, and the bytes that are held.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F  # noqa: N812
from torch.nn.parallel import DistributedDataParallel

import accumkern
from accumkern import GradAccumulator

RANKS = 4
VOCABULARY = 256
HEADS = 4


@dataclass(frozen=True)
class Shape:
    """How large model and batch are: a GPT, and samples of a window over all ranks and of a micro-batch."""

    width: int
    layers: int
    context: int
    global_batch: int
    micro_batch: int


class Embed(nn.Module):
    """Bytes and their positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs: (samples, context) bytes; returns (samples, context, width)."""
        return self.bytes(inputs) + self.positions.weight


class Block(nn.Module):
    """Causal self-attention and an MLP, of as many heads and hidden features as this rank has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head_width = width // HEADS
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (samples, context, width); returns the same shape."""
        y = self.norm1(x)
        query, key, value = (
            project(y).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attention = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Head(nn.Module):
    """A score for each next byte."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (samples, context, width); returns (samples, context, 256)."""
        scores: Tensor = self.scores(self.norm(x))
        return scores


#: How the ranks share matrices: by what comes out of them, or by what goes in.
TENSOR_PLAN = {
    "embed.bytes": ColwiseParallel(output_layouts=Replicate()),
    **{f"block*.{name}": ColwiseParallel() for name in ("query", "key", "value", "up")},
    **{f"block*.{name}": RowwiseParallel() for name in ("out", "down")},
    "head.scores": ColwiseParallel(output_layouts=Replicate()),
}


def new_gpt(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    """Return a GPT whose weights, the same in each call, are bfloat16 numbers in any dtype."""
    generator = torch.Generator().manual_seed(0)
    blocks = {f"block{i}": Block(shape.width) for i in range(shape.layers)}
    model = nn.Sequential(OrderedDict(embed=Embed(shape), **blocks, head=Head(shape.width)))
    for param in model.parameters():
        if param.dim() > 1:
            nn.init.normal_(param, std=0.02, generator=generator)
    return model.to(torch.bfloat16).to(device, dtype)


def loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of predicting each next byte."""
    return F.cross_entropy(scores.float().flatten(0, 1), targets.flatten())


@functools.cache
def mesh_of(device_type: str, names: tuple[str, ...]) -> DeviceMesh:
    """Return a mesh of all ranks, of one or two equal dimensions; its process groups are made once."""
    return init_device_mesh(device_type, (RANKS,) if len(names) == 1 else (2, RANKS // 2), mesh_dim_names=names)


class Way:
    """One process that accumulates; the other ways derive from it.

    Attributes:
        name: in tables.
        data_parallel: ranks, or groups of ranks, that share the samples.
    """

    name = "1 process"
    data_parallel = 1

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.accumulation_steps = shape, device, self.steps(shape)
        self.index = 0  # of this rank's part of the samples
        self.model: Any = self.divided(new_gpt(shape, device, dtype))
        self.params = dict(self.model.named_parameters())
        optimizer = torch.optim.AdamW(self.params.values(), foreach=False)  # they lie on several meshes
        masters = "split32" if dtype is torch.bfloat16 else None
        self.optimizer = optimizer
        self.acc: GradAccumulator = accumkern.attach(optimizer, master_weights=masters)

    @classmethod
    def steps(cls, shape: Shape) -> int:
        """Return the micro-batches of a window: the samples of a part over those of a micro-batch."""
        return shape.global_batch // (cls.data_parallel * shape.micro_batch)

    def divided(self, model: nn.Sequential) -> nn.Module:
        """Return what this rank has of the model, and set which part of the samples is its own."""
        return model

    def run_window(self, batch: Tensor) -> None:
        """Run forward and backward passes of this rank's part of a global batch, (samples, context + 1) bytes."""
        micro_batches = batch[self.index :: self.data_parallel].split(self.shape.micro_batch)
        for number, part in enumerate(micro_batches):
            with self.reducing(number == len(micro_batches) - 1):
                loss(self.model(part[:, :-1]), part[:, 1:]).backward()

    def reducing(self, is_last: bool) -> Any:
        """Return a block for a micro-batch, in which gradients are reduced where the way does that."""
        return nullcontext()

    def end_window(self) -> None:
        """Take the mean over micro-batches, and step."""
        self.acc.finish(divide_by=self.accumulation_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and gradients of the whole parameters that this rank has a part of, the mean of the batch."""
        for name, param in self.params.items():
            gradient = self.acc.gradient(param)
            assert gradient is not None  # every parameter is used
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            yield name.removeprefix("module."), whole / self.accumulation_steps


class DDP(Way):
    """Whole models that share the samples; one reduction in a window, in FP32."""

    name = f"DDP {RANKS}"
    data_parallel = RANKS

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(shape, device, dtype)
        if dtype is torch.bfloat16:
            self.acc.reduce_in_fp32(self.model)

    def divided(self, model: nn.Sequential) -> nn.Module:
        """Return the model in DistributedDataParallel."""
        self.index = dist.get_rank()
        return DistributedDataParallel(model)

    def reducing(self, is_last: bool) -> Any:
        """Reduce in the last micro-batch."""
        return nullcontext() if is_last else self.model.no_sync()


class FSDP(Way):
    """Shards of everything; gradients are reduced in each micro-batch."""

    name = f"FSDP2 {RANKS}"
    data_parallel = RANKS
    policy = MixedPrecisionPolicy()

    def mesh(self) -> DeviceMesh:
        """Return the mesh on which the model is sharded."""
        self.index = dist.get_rank()
        return mesh_of(self.device.type, ("shard",))

    def divided(self, model: nn.Sequential) -> nn.Module:
        """Return the model with its parameters sharded, layer by layer."""
        mesh = self.mesh()
        for layer in model:
            fully_shard(layer, mesh=mesh, mp_policy=self.policy)
        fully_shard(model, mesh=mesh, mp_policy=self.policy)
        return model


class FSDPOnce(FSDP):
    """Shards of everything; gradients stay whole until the last micro-batch, which reduces them."""

    name = f"FSDP2 {RANKS}, reduced once"
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)

    def reducing(self, is_last: bool) -> Any:
        """Reduce in the last micro-batch."""
        self.model.set_requires_gradient_sync(is_last)
        return nullcontext()


class HSDP(FSDP):
    """Shards within two groups that are replicas of each other."""

    name = "HSDP 2 x 2"

    def mesh(self) -> DeviceMesh:
        """Return a mesh of replicas and shards."""
        self.index = dist.get_rank()
        return mesh_of(self.device.type, ("replicate", "shard"))


class TensorParallel(FSDP):
    """Pairs of ranks share each layer's matrices; two pairs share the samples, and shard what each rank has."""

    name = "tensor 2 x FSDP2 2"
    data_parallel = 2

    def divided(self, model: nn.Sequential) -> nn.Module:
        """Return the model with its matrices divided, and sharded over the other dimension of the mesh."""
        self._mesh = mesh_of(self.device.type, ("dp", "tp"))
        parallelize_module(model, self._mesh["tp"], TENSOR_PLAN)
        return super().divided(model)

    def mesh(self) -> DeviceMesh:
        """Return the dimension of the mesh that shares samples."""
        self.index = self._mesh.get_local_rank("dp")
        return self._mesh["dp"]


class Pipeline(DDP):
    """Pairs of ranks have one half of the layers each (1F1B); two pairs share the samples."""

    name = "pipeline 2 (1F1B) x DDP 2"
    data_parallel = 2

    def divided(self, model: nn.Sequential) -> nn.Module:
        """Return one stage in DistributedDataParallel, and make the schedule."""
        mesh = mesh_of(self.device.type, ("dp", "pp"))
        self.index, self._stage = mesh.get_local_rank("dp"), mesh.get_local_rank("pp")
        half = len(model) // 2
        part = DistributedDataParallel(
            model[half:] if self._stage else model[:half], process_group=mesh.get_group("dp")
        )
        stage = PipelineStage(part, self._stage, 2, self.device, group=mesh.get_group("pp"))
        self._schedule = Schedule1F1B(stage, self.accumulation_steps, loss_fn=loss, scale_grads=False)
        return part

    def run_window(self, batch: Tensor) -> None:
        """Run the schedule, whose micro-batches are the window's."""
        own = batch[self.index :: self.data_parallel]
        if self._stage:
            self._schedule.step(target=own[:, 1:], losses=[])
        else:
            self._schedule.step(own[:, :-1])


WAYS: list[type[Way]] = [Way, DDP, FSDP, FSDPOnce, HSDP, TensorParallel, Pipeline]


def new_batch(shape: Shape, device: torch.device) -> Tensor:
    """Return a global batch of random bytes, the same on every rank."""
    size = (shape.global_batch, shape.context + 1)
    return torch.randint(VOCABULARY, size, generator=torch.Generator().manual_seed(1)).to(device)
