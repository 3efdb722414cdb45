"""Models whose memory is predicted and measured: each a ``setup()`` as its users write one, in torch alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from train_gpt import GPT


@dataclass(frozen=True)
class Model:
    """What is planned for.

    Attributes:
        what: model and samples in words.
        make: makes the model in FP32.
        make_batch: takes a number of samples and a device.
        limit: of the memory, as :func:`accumkern.plan` takes it.
        channels_last: the memory format of images and of weights of convolutions.
    """

    what: str
    make: Callable[[], nn.Module]
    make_batch: Callable[[int, torch.device], Any]
    limit: str
    channels_last: bool = False

    def setup(self, device: torch.device) -> Any:
        """Return model, optimizer, make_batch and loss, as :func:`accumkern.plan` takes them."""
        with device:
            model = self.make().to(torch.bfloat16)
        if self.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return (
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-4),
            lambda size: self.make_batch(size, device),
            lambda model, batch: model(batch),
        )


# ---- a convnet ---------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut; four times as many channels come out as are within."""

    def __init__(self, given: int, width: int, stride: int) -> None:
        super().__init__()
        made = 4 * width
        self.body = nn.Sequential(
            *_convolution(given, width, 1),
            nn.ReLU(inplace=True),
            *_convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_convolution(width, made, 1),
        )
        is_same = given == made and stride == 1
        self.skip = nn.Identity() if is_same else nn.Sequential(*_convolution(given, made, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, given, height, height); returns (batch, 4 * width, height / stride, height / stride)."""
        return F.relu(self.body(x) + self.skip(x), inplace=True)


class ResNet(nn.Module):
    """ResNet of bottlenecks: with a width of 64 and depths of 3, 4, 6 and 3 it is ResNet-50."""

    def __init__(self, width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> None:
        super().__init__()
        layers = [*_convolution(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        given = width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                layers.append(Bottleneck(given, width << stage, 2 if stage > 0 and block == 0 else 1))
                given = 4 * (width << stage)
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, classes))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """batch: images (batch, 3, height, height) and classes (batch,); returns the mean loss."""
        images, classes = batch
        return F.cross_entropy(self.layers(images).float(), classes)


def _convolution(given: int, made: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(given, made, size, stride, size // 2, bias=False), nn.BatchNorm2d(made)]


# ---- a language model --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention with rotary positions, and several heads of queries for one of keys and values."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.each = width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, key_heads * self.each, bias=False)
        self.value = nn.Linear(width, key_heads * self.each, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """x: (batch, length, width); cosines, sines: (length, width of a head); returns the shape of x."""

        def heads(made: Tensor) -> Tensor:
            return made.unflatten(-1, (-1, self.each)).transpose(1, 2)

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cosines + torch.cat((-second, first), -1) * sines

        query, key, value = rotated(heads(self.query(x))), rotated(heads(self.key(x))), heads(self.value(x))
        made = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.out(made.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a gated MLP, each behind a norm and around a residual connection."""

    def __init__(self, width: int, heads: int, key_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads, key_heads)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """As :meth:`Attention.forward`."""
        x = x + self.attention(self.norm1(x), cosines, sines)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """A decoder-only transformer as Llama is."""

    def __init__(
        self, width: int, layers: int, heads: int, key_heads: int, hidden: int, vocabulary: int, context: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, key_heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        each = width // heads
        angles = torch.outer(torch.arange(context), 10_000 ** -(torch.arange(0, each, 2) / each)).repeat(1, 2)
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, batch: Tensor) -> Tensor:
        """batch: (batch, context + 1) tokens; returns the mean loss of predicting each next one."""
        x = self.tokens(batch[:, :-1])
        for layer in self.layers:
            x = layer(x, self.cosines, self.sines)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


# ---- which -------------------------------------------------------------------------------------------------------


def _text(vocabulary: int, context: int) -> Callable[[int, torch.device], Tensor]:
    return lambda size, device: torch.randint(vocabulary, (size, context + 1), device=device)


def _gpt(limit: str, width: int, layers: int, heads: int, context: int) -> Model:
    what = f"GPT of width {width} with {layers} layers; samples of {context:,} bytes"
    return Model(what, lambda: GPT(width, layers, heads, context), _text(256, context), limit)


def _llama(limit: str, width: int, layers: int, heads: int, hidden: int, vocabulary: int, context: int) -> Model:
    what = (
        f"Llama of width {width} with {layers} layers, 4 heads of queries for one of keys, MLPs of {hidden:,}, "
        f"{vocabulary:,} tokens; samples of {context:,}"
    )
    sizes = width, layers, heads, heads // 4, hidden, vocabulary, context
    return Model(what, lambda: Llama(*sizes), _text(vocabulary, context), limit)


def _resnet(limit: str, width: int, depths: tuple[int, ...], pixels: int, channels_last: bool) -> Model:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def make_batch(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        images = torch.randn(size, 3, pixels, pixels, device=device).to(torch.bfloat16, memory_format=layout)
        return images, torch.randint(1000, (size,), device=device)

    what = (
        f"ResNet of bottlenecks, width {width}, depths {', '.join(map(str, depths))}; images of {pixels} x {pixels}"
        + (", channels last" if channels_last else "")
    )
    return Model(what, lambda: ResNet(width, depths), make_batch, limit, channels_last)


#: Kind of device -> name -> model; on a CPU all is small.
MODELS: Mapping[str, Mapping[str, Model]] = {
    "cpu": {
        "GPT": _gpt("40MB", 128, 4, 4, 64),
        "ResNet": _resnet("40MB", 16, (1, 1, 1, 1), 64, channels_last=False),
        "ResNet channels last": _resnet("40MB", 16, (1, 1, 1, 1), 64, channels_last=True),
        "Llama": _llama("40MB", 128, 4, 8, 352, 2000, 64),
    },
    "cuda": {
        "GPT": _gpt("18GB", 768, 12, 12, 1024),
        "ResNet-50": _resnet("9GB", 64, (3, 4, 6, 3), 224, channels_last=False),
        "ResNet-50 channels last": _resnet("9GB", 64, (3, 4, 6, 3), 224, channels_last=True),
        "Llama": _llama("18GB", 1024, 12, 16, 2816, 32_000, 1024),
    },
}
