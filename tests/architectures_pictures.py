"""Small models of pictures: setups as their users write them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from architectures_text import ATTENTION, BFLOAT16
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


class Pictures(torch.utils.data.Dataset):
    """Noisy pictures of ten things, in numpy as they come from a file."""

    def __init__(self, size: int = 32, channels: int = 3) -> None:
        random = np.random.RandomState(1)
        kinds = random.randn(CLASSES, channels, size, size).astype(np.float32)
        self.labels = random.randint(0, CLASSES, 512)
        self.pixels = kinds[self.labels] + 0.5 * random.randn(512, channels, size, size).astype(np.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.pixels[index]), int(self.labels[index])


def drawn(data: Pictures, size: int) -> tuple[Tensor, Tensor]:
    """Return a batch as a loader's default ``collate_fn`` makes it."""
    indices = torch.randint(len(data), (size,)).tolist()
    pixels, labels = torch.utils.data.default_collate([data[i] for i in indices])
    return pixels, labels


def pictures_for(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype = torch.float32) -> Any:
    """Return the setup of one of transformers' models of pictures."""
    data = Pictures()

    def make_batch(size: int) -> dict[str, Tensor]:
        pixels, labels = drawn(data, size)
        return {"pixel_values": pixels.to(dtype), "labels": labels}

    return model, optimizer, make_batch, lambda model, batch: model(**batch).loss


class ViT(nn.Module):
    """Patches and a class token, initialised as timm does."""

    def __init__(self, width: int = 32, patch: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, 1 + (32 // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)
        for param in (self.class_token, self.places, self.head.weight):
            nn.init.trunc_normal_(param, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.places
        return self.head(self.layers(x)[:, 0])


def vit() -> Any:
    model, data = ViT(), Pictures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    return (
        model,
        optimizer,
        lambda size: drawn(data, size),
        lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1),
    )


def convnext() -> Any:
    config = transformers.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 32, 64], num_labels=CLASSES)
    model = transformers.ConvNextForImageClassification(config).train()
    return pictures_for(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def swin() -> Any:
    config = transformers.SwinConfig(
        image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4, num_labels=CLASSES
    )
    model = transformers.SwinForImageClassification(config).to(BFLOAT16).train()
    return pictures_for(model, torch.optim.AdamW(model.parameters(), lr=3e-3), BFLOAT16)


def resnet() -> Any:
    """BatchNorm down to one pixel, so that a batch of one sample cannot be trained; SGD with momentum."""
    config = transformers.ResNetConfig(
        depths=[1, 1, 1, 1],
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        layer_type="basic",
        num_labels=CLASSES,
    )
    model = transformers.ResNetForImageClassification(config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    return pictures_for(model, optimizer)


def frozen() -> Any:
    """A backbone with its BatchNorm in evaluation mode, of which the first layers are frozen, and a new head."""
    backbone = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    )
    backbone[:6].requires_grad_(False)
    model = nn.Sequential(backbone, nn.Flatten(), nn.Linear(32 * 16, CLASSES)).train()
    backbone.eval()
    optimizer = torch.optim.SGD(filter(lambda param: param.requires_grad, model.parameters()), lr=0.05, momentum=0.9)
    data = Pictures()
    return (
        model,
        optimizer,
        lambda size: drawn(data, size),
        lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
    )


class UNet(nn.Module):
    """Two levels, GroupNorm, a transposed convolution, and an embedding of the time."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.enter = self._convolution(1, width)
        self.down = nn.Sequential(nn.Conv2d(width, 2 * width, 2, stride=2), self._convolution(2 * width, 2 * width))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.leave = nn.Sequential(self._convolution(2 * width, width), nn.Conv2d(width, 1, 1))

    @staticmethod
    def _convolution(inward: int, outward: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inward, outward, 3, padding=1), nn.GroupNorm(4, outward), nn.SiLU())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(4) * 2.0)
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        high = self.enter(x)
        low = self.down(high) + time[:, :, None, None]
        return self.leave(torch.cat([self.up(low), high], dim=1))


def unet() -> Any:
    """Diffusion: the noise is drawn in the loss, as usual, and so differs between calls."""
    model, data = UNet(), Pictures(16, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 200), 0)

    def loss(model: nn.Module, pixels: Tensor) -> Tensor:
        t = torch.randint(0, 200, (len(pixels),))
        noise = torch.randn_like(pixels)
        kept = signal[t][:, None, None, None]
        return functional.mse_loss(model(kept.sqrt() * pixels + (1 - kept).sqrt() * noise, t.float()), noise)

    return model, optimizer, lambda size: drawn(data, size)[0], loss


def clip() -> Any:
    """Contrastive: every sample's negatives are the others of its micro-batch, so the loss is no mean over samples."""
    config = transformers.CLIPConfig(
        text_config=ATTENTION | {"num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=ATTENTION | {"num_hidden_layers": 1, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = Pictures()

    def make_batch(size: int) -> dict[str, Tensor]:
        pixels, labels = drawn(data, size)
        captions = torch.stack([torch.tensor([1, 10 + label, 30 + label, 2]) for label in labels.tolist()])
        return {"input_ids": captions, "attention_mask": torch.ones_like(captions), "pixel_values": pixels}

    return model, optimizer, make_batch, lambda model, batch: model(**batch, return_loss=True).loss
