"""Predictions of memory: scripts that need values, kernels of a GPU, and what kernels need inside themselves."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planned import old_objects_aside  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import accumkern
from accumkern.planning.fakes import PredictionError, fake_setup
from accumkern.planning.kernels import block_bytes
from accumkern.planning.precision import choose_buffer
from accumkern.planning.predict import Prediction, predict, smallest_size
from accumkern.planning.protocol import Setup
from accumkern.planning.tracker import MemoryTracker
from accumkern.planning.trial import Preserved, try_windows
from accumkern.torch_private import is_fake

pytestmark = pytest.mark.usefixtures("one_thread", "old_objects_aside")

TEXT = torch.arange(10_000) % 50  # of a script, made before setup() is called


def measured(maker: Callable[[], Any], size: int, micro_batches: int = 2) -> int:
    """Return the peak of training, by the events of torch's allocator."""
    setup = maker()
    setup = setup if isinstance(setup, Setup) else Setup(*setup)
    with Preserved(setup, choose_buffer(setup, None)) as preserved:
        return try_windows(preserved, size, 2, micro_batches, 10**10)[0].peak_bytes


def predicted(maker: Callable[[], Any], size: int, device: str | None = None) -> Prediction:
    with fake_setup(maker) as setup:
        return predict(setup, size, choose_buffer(setup, None), device=device)


def images(model: nn.Module, optimizer: torch.optim.Optimizer, width: int) -> Setup:
    return Setup(
        model,
        optimizer,
        lambda size: (torch.randn(size, 3, width, width), torch.randint(10, (size,))),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    )


# ---- models as people write them ---------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(given, made, 3, stride, 1, bias=False),
            nn.BatchNorm2d(made),
            nn.ReLU(inplace=True),
            nn.Conv2d(made, made, 3, 1, 1, bias=False),
            nn.BatchNorm2d(made),
        )
        self.skip = nn.Conv2d(given, made, 1, stride, bias=False) if (given, 1) != (made, stride) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x), inplace=True)


def resnet() -> Setup:
    stem = nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
    blocks = Residual(32, 32, 1), Residual(32, 64, 2), Residual(64, 128, 2)
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return images(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 64)


class UNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def convolutions(given: int, made: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(given, made, 3, padding=1), nn.GroupNorm(4, made), nn.SiLU(), nn.Conv2d(made, made, 3, 1, 1)
            )

        self.down, self.low = convolutions(3, width), convolutions(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.end, self.out = convolutions(2 * width, width), nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        return self.out(self.end(torch.cat([self.up(self.low(F.max_pool2d(high, 2))), high], 1)))


def unet() -> Setup:
    model = UNet()
    optimizer = torch.optim.AdamW(model.parameters())
    return Setup(model, optimizer, lambda size: torch.randn(size, 3, 32, 32), lambda model, x: F.mse_loss(model(x), x))


class Block(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout, self.causal = nn.Dropout(dropout), causal
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, -1, 16).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout.p, is_causal=self.causal)
        x = x + self.dropout(self.out(y.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.mlp(x))


class ViT(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.positions = nn.Parameter(torch.zeros(1, 16, width))
        self.blocks, self.head = nn.Sequential(Block(width), Block(width)), nn.Linear(width, 10)
        for parameter in (self.positions, self.head.weight):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2) + self.positions).mean(1))


def vit() -> Setup:
    model = ViT()
    return images(model, torch.optim.AdamW(model.parameters()), 32)


class ConvNeXt(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        nn.init.trunc_normal_(self.depthwise.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def convnext() -> Setup:
    layers = nn.Conv2d(3, 32, 4, 4), ConvNeXt(32), ConvNeXt(32), nn.Conv2d(32, 64, 2, 2), ConvNeXt(64)
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return images(model, torch.optim.AdamW(model.parameters()), 64)


class GPT(nn.Module):
    def __init__(self, dropout: float, checkpoints: bool) -> None:
        super().__init__()
        self.embedding, self.checkpoints = nn.Embedding(64, 64), checkpoints
        self.blocks = nn.ModuleList([Block(64, dropout, causal=True) for _ in range(2)])
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return self.head(x)


def gpt(dropout: float = 0.0, checkpoints: bool = False) -> Callable[[], Setup]:
    def setup() -> Setup:
        model = GPT(dropout, checkpoints)
        return Setup(
            model,
            torch.optim.AdamW(model.parameters()),
            lambda size: torch.randint(64, (size, 129)),
            lambda model, batch: F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()),
        )

    return setup


# ---- how near ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize(
    ("maker", "least", "most"),
    [
        (resnet, -0.01, 0.01),
        (unet, -0.01, 0.01),
        (vit, -0.01, 0.01),
        (convnext, -0.01, 0.01),
        (gpt(), -0.01, 0.01),
        (gpt(0.1), -0.01, 0.01),
        (gpt(0.1, checkpoints=True), -0.05, 0.01),
    ],
    ids=["ResNet", "UNet", "ViT", "ConvNeXt", "GPT", "GPT with dropout", "GPT with checkpoints"],
)
def test_predictions_of_models_are_near_what_is_measured(
    maker: Callable[[], Setup], least: float, most: float, size: int
) -> None:
    peak, of = measured(maker, size), predicted(maker, size)
    print(f"{of.low} to {of.memory.total} predicted, {peak} measured")
    assert least <= of.memory.total / peak - 1 <= most
    assert of.low <= of.memory.total
    assert of.low <= 1.001 * peak


def test_an_lstm_is_predicted_with_what_its_kernel_saves() -> None:
    def setup() -> Setup:
        model = nn.LSTM(48, 64, batch_first=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Setup(
            model, optimizer, lambda size: torch.randn(size, 32, 48), lambda model, x: model(x)[0].square().mean()
        )

    least = 0.95 if torch.__version__ >= "2.13" else 0.5  # oneDNN needed more before
    assert least <= predicted(setup, 8).memory.total / measured(setup, 8) <= 1.1


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped matrix product")
def test_a_mixture_of_experts_in_float32_is_predicted() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(32, 4)
            self.up, self.down = (nn.Parameter(torch.randn(4, *shape)) for shape in ((32, 64), (64, 32)))

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(0, 1)
            weight, expert = self.router(x).softmax(-1).max(-1)
            order = expert.argsort()
            ends = torch.histc(expert.float(), 4, 0, 3).cumsum(0).int()
            hidden = torch._grouped_mm(x[order], self.up, offs=ends).relu()
            return (
                torch.zeros_like(x).index_put((order,), torch._grouped_mm(hidden, self.down, offs=ends))
                * weight[:, None]
            )

    def setup() -> Setup:
        model = Experts()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Setup(
            model, optimizer, lambda size: torch.randn(size, 64, 32), lambda model, x: model(x).square().mean()
        )

    assert predicted(setup, 4).memory.total == pytest.approx(measured(setup, 4), rel=0.05)


# ---- scripts that need values ------------------------------------------------------------------------------------


def slices(data: Tensor, size: int) -> Tensor:
    return torch.stack([data[i : i + 65] for i in torch.randint(len(data) - 65, (size,))])


def from_numpy(data: Tensor, size: int) -> Tensor:
    array = data.numpy()
    return torch.stack([torch.from_numpy(array[i : i + 65].copy()) for i in torch.randint(len(data) - 65, (size,))])


@pytest.mark.parametrize("made_in_setup", [False, True], ids=["data of the script", "data of setup()"])
@pytest.mark.parametrize("cut", [slices, from_numpy])
def test_batches_that_need_values_are_made_for_real(cut: Callable[[Tensor, int], Tensor], made_in_setup: bool) -> None:
    def setup() -> Setup:
        model = nn.Embedding(50, 16)
        data = TEXT.clone() if made_in_setup else TEXT
        return Setup(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda size: cut(data, size),
            lambda model, batch: model(batch).square().mean(),
        )

    assert predicted(setup, 8).memory.total == pytest.approx(measured(setup, 8), rel=0.02)


def test_numpy_sees_the_values_of_real_tensors() -> None:
    def setup() -> Setup:
        seen.append((int(TEXT.numpy().max()), int(np.asarray(TEXT).max())))
        model = nn.Embedding(50, 16)
        return Setup(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda size: TEXT[: 64 * size].view(size, 64),
            lambda model, batch: model(batch).square().mean(),
        )

    seen: list[tuple[int, int]] = []
    batch = 2 * 64 * 8
    assert predicted(setup, 2).memory.total < 4 * 50 * 16 * 3 + batch + 5 * 2 * 64 * 16 * 4  # a batch, not all data
    assert seen == [(49, 49)]


def test_batches_larger_than_memory_are_made_as_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accumkern.planning.fakes.available_bytes", lambda device: 10**6)
    size = 2**20
    assert predicted(gpt(), size).memory.activations > size * 128 * 64 * 4 * 2  # 69 GB


def test_initialisation_that_looks_at_values_needs_no_memory() -> None:
    def giant() -> Setup:
        model = nn.Sequential(*(nn.Linear(2**16, 2**16, bias=False) for _ in range(2)))
        for layer in model:
            nn.init.trunc_normal_(layer.weight, std=0.02)
        return Setup(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda size: torch.randn(size, 2**16),
            lambda model, batch: model(batch).mean(),
        )

    assert predicted(giant, 1).memory.parameters == 2 * 2**34  # 34 GB
    weight = nn.init.trunc_normal_(torch.zeros(1000), std=0.02)  # afterwards it draws again
    assert 0.015 < float(weight.std()) < 0.025


class Recurrent(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(vocabulary, 32), nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, vocabulary)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(tokens))[0])


def needy(made: list[Setup]) -> Callable[[], Setup]:
    def setup() -> Setup:
        model = Recurrent(int(TEXT.max()) + 1)  # needs a value, so setup() runs for real
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        optimizer.state[model.head.bias] = {
            "step": torch.zeros(()),
            "exp_avg": torch.ones(50),
            "exp_avg_sq": torch.ones(50),
        }
        model.head.bias.grad = torch.ones(50)
        made.append(
            Setup(
                model,
                optimizer,
                lambda size: torch.randint(50, (size, 33)),
                lambda _model, batch: F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()),
            )
        )
        return made[-1]

    return setup


def test_a_setup_that_needs_values_runs_for_real_and_is_left_as_it_was() -> None:
    made: list[Setup] = []
    random = torch.get_rng_state()
    with fake_setup(needy(made)) as setup:
        model = setup.model
        assert model is made[-1].model
        assert all(is_fake(param) for param in model.parameters())
        assert model.head.weight is model.embedding.weight
        memory = predict(setup, 8, None).memory
    params = list(model.parameters())
    assert not any(is_fake(tensor) for tensor in [*params, *model.gru._flat_weights])
    assert setup.optimizer.param_groups[0]["params"] == params
    assert list(setup.optimizer.state) == [model.head.bias]
    assert torch.equal(setup.optimizer.state[model.head.bias]["exp_avg"], torch.ones(50))
    assert [param.grad is None for param in params] == [param is not model.head.bias for param in params]
    assert torch.equal(model.head.bias.grad, torch.ones(50))
    assert torch.equal(torch.get_rng_state(), random)
    numel = sum(param.numel() for param in params)
    assert memory.parameters == 4 * numel
    assert 8 * numel <= memory.optimizer_state <= 8 * numel + 100
    assert memory.total == pytest.approx(measured(needy([]), 8), rel=0.05)


def test_what_stays_impossible_names_the_line_and_what_can_be_done() -> None:
    def peeking() -> Setup:
        return gpt()()._replace(loss=lambda model, batch: model(batch).mean() * batch.max().item())  # this line

    with pytest.raises(PredictionError) as caught:
        accumkern.plan(peeking, memory="1 GB", measure=False)
    message = str(caught.value)
    assert "loss of setup() raised DataDependentOutputException" in message
    assert f"at {__file__}:{peeking.__code__.co_firstlineno + 1}: return gpt()()._replace(" in message
    assert "knows shapes and no values" in message
    assert "choose the CPU" not in message

    def broken() -> Setup:
        raise KeyError("here")

    where = r'raised KeyError: .*: raise KeyError\("here"\); measure, without --predict'
    with pytest.raises(PredictionError, match=where):
        accumkern.plan(broken, memory="1 GB", measure=False)


def stepped_by(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], Setup]:
    def setup() -> Setup:
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
        optimizer = make(list(model.parameters()))
        return Setup(model, optimizer, lambda size: torch.randn(size, 64), lambda model, x: model(x).square().mean())

    return setup


@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_that_reads_norms_is_predicted(foreach: bool) -> None:
    setup = stepped_by(lambda params: torch.optim.Adafactor(params, foreach=foreach))
    for size in (1, 64):
        assert predicted(setup, size).memory.total == pytest.approx(measured(setup, size), rel=0.01)


class Picky(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.param_groups[0]["params"][0].grad.norm() > 0:  # this line
            super().step()


def test_a_step_that_decides_by_values_is_not_predicted() -> None:
    with pytest.raises(PredictionError, match=r"step\(\) of the optimizer of setup\(\) raised .*: if self\.param_gr"):
        predicted(stepped_by(lambda params: Picky(params, lr=0.1)), 2)


def test_numbers_are_made_up_in_steps_alone() -> None:
    losses: list[int] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        losses.append(len(losses))
        return model(batch).mean() * (batch.max().item() if len(losses) > 2 else 1)  # after the first step

    with pytest.raises(PredictionError, match=r"loss of setup\(\) raised DataDependentOutputException"):
        predicted(lambda: stepped_by(torch.optim.Adafactor)()._replace(loss=loss), 2)
    assert len(losses) == 3


def test_no_advice_about_samples_follows_a_lack_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_batch(size: int) -> Tensor:
        return torch.stack([torch.randn(64) for _ in torch.randint(100, (size,)).tolist()])

    monkeypatch.setattr("accumkern.planning.fakes.available_bytes", lambda device: 200_000)
    setup = stepped_by(torch.optim.SGD)
    with pytest.raises(PredictionError, match=r"make_batch\(1024\) .* raised DataDependentOutput") as caught:
        predicted(lambda: setup()._replace(make_batch=make_batch), 1024)
    assert "draw with replacement" not in str(caught.value)
    assert "knows shapes and no values" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_script_that_wants_a_gpu_that_is_not_there_is_told_so() -> None:
    def setup() -> Setup:
        made = gpt()()
        made.model.to("cuda")
        return made

    with pytest.raises(PredictionError, match=r'at .*: made\.model\.to\("cuda"\); there is no GPU here: let setup\(\)'):
        accumkern.plan(setup, memory="1 GB", measure=False)


def test_a_sharded_model_is_refused_and_a_wrapped_one_is_not(tmp_path: Path) -> None:
    def setup() -> Setup:
        made = gpt()()
        wrapped: Any = wrap(made.model)
        return made._replace(model=wrapped, optimizer=torch.optim.AdamW(wrapped.parameters()))

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrap: Any = nn.parallel.DistributedDataParallel
        assert predicted(setup, 2).memory == predicted(gpt(), 2).memory
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        wrap = functools.partial(torch.distributed.fsdp.fully_shard, mesh=mesh)
        with pytest.raises(PredictionError, match="is sharded over ranks"):
            predicted(setup, 2)
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_made_for_real_has_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accumkern.planning.fakes.available_bytes", lambda device: 1000)
    with pytest.raises(PredictionError, match=r"setup\(\) raised MemoryLimitError: .* of 1 kB"):
        accumkern.plan(needy([]), memory="1 GB", measure=False)


# ---- the kernels of a GPU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpoints"])
def test_a_gpu_needs_no_attention_matrices_with_dropout(checkpoints: bool) -> None:
    plain, dropping = (predicted(gpt(dropout, checkpoints), 8, "cuda").memory for dropout in (0.0, 0.1))
    masks = 0 if checkpoints else 8 * 128 * 64 * 2 * 2  # a byte for each element, twice in each of two layers
    kept = 0 if checkpoints else 8 * 128 * 64 * 4 * 2 * 2  # and what was dropped from
    assert plain.total <= dropping.total <= plain.total + masks + kept + 8 * 128 * 64 * 5
    on_cpu = predicted(gpt(0.1, checkpoints), 8, "cpu").memory.total
    on_gpu = dropping.total - dropping.kernels  # without cuBLAS
    assert on_cpu > on_gpu + 8 * 4 * 128 * 128 * 4  # one matrix at least


def test_attention_on_a_gpu_saves_inputs_result_and_logarithms() -> None:
    batch, heads, length, width = 2, 4, 64, 16

    def setup() -> Setup:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss(model: nn.Module, x: Tensor) -> Tensor:
            q, k, v = (model(x[..., None])[..., 0] for _ in range(3))
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5).sum()

        return Setup(model, optimizer, lambda size: torch.randn(size, heads, length, width), loss)

    with fake_setup(setup) as made:
        tensor = batch * heads * length * width * 4
        on = {device: predict(made, batch, None, device=device).memory.activations for device in ("cpu", "cuda")}
    matrix = batch * heads * length * length * 4
    assert on["cuda"] < 13 * tensor
    assert on["cpu"] > on["cuda"] + matrix


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_rms_norm_on_a_gpu_saves_its_input_and_a_number_for_each_row(dtype: torch.dtype) -> None:
    batch, length, width, layers = 4, 128, 256, 8

    def setup(mixed: bool = False) -> Setup:
        model = nn.Sequential(*(nn.RMSNorm(width) for _ in range(layers))).to(dtype)
        if mixed:
            model.to(torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Setup(
            model,
            optimizer,
            lambda size: torch.randn(size, length, width, dtype=dtype),
            lambda model, x: model(x).float().mean(),
        )

    tensor, rows = batch * length * width * dtype.itemsize, batch * length * 4
    on_gpu, on_cpu = (predicted(setup, batch, device).memory.activations for device in ("cuda", "cpu"))
    saved = (layers + 1) * tensor + layers * rows
    assert saved <= on_gpu <= saved + 3 * batch * length * width * 4  # the loss, and a gradient
    assert on_cpu > on_gpu + (layers - 1) * tensor
    mixed = functools.partial(setup, True)  # which is not fused there either
    at_once = [predicted(mixed, batch, device).low for device in ("cuda", "cpu")]
    assert at_once == [pytest.approx(at_once[0], rel=0.01)] * 2


def test_memory_of_a_gpu_is_in_the_blocks_of_its_allocator() -> None:
    mib = 2**20
    sizes = {1: 512, 512: 512, 513: 1024, 9 * mib + 1: 9 * mib + 512}  # cut from larger pieces
    sizes |= {11 * mib: 12 * mib, 12 * mib: 12 * mib, 11 * mib - 512: 11 * mib - 512, 70 * mib + 1: 70 * mib + 512}
    assert {size: block_bytes(size) for size in sizes} == sizes


def test_what_cublas_keeps_counts_where_matrices_are_multiplied() -> None:
    def without() -> Setup:
        model = nn.RMSNorm(64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Setup(model, optimizer, lambda size: torch.randn(size, 64), lambda model, x: model(x).mean())

    kept = {made: predicted(made, 1, "cuda") for made in (without, vit)}
    assert kept[without].memory.kernels == 0
    assert kept[vit].memory.kernels >= 64 * 2**20  # 32 MiB for each of two threads
    assert kept[vit].low < 64 * 2**20
    assert predicted(vit, 1, "cpu").memory.kernels < 2**20


def test_an_optimizer_steps_as_it_would_on_a_gpu() -> None:
    def of(**options: Any) -> Callable[[], Setup]:
        def setup() -> Setup:
            model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
            optimizer = torch.optim.AdamW(model.parameters(), **options)
            return Setup(model, optimizer, lambda size: torch.randn(size, 64), lambda model, x: model(x).mean())

        return setup

    states = {
        name: predicted(of(**options), 1, device).memory.optimizer_state
        for name, options, device in (
            ("cpu", {}, "cpu"),
            ("cuda", {}, "cuda"),
            ("foreach", {"foreach": True}, "cpu"),
            ("one by one", {"foreach": False}, "cuda"),
        )
    }
    numel = 8 * (64 * 64 + 64)
    for name in ("cuda", "foreach"):  # two moments, and a root of all
        assert 12 * numel <= states[name] <= 12 * numel + 50 * 512
    for name in ("cpu", "one by one"):
        assert states[name] <= 8 * numel + 3 * 4 * 64 * 64 + 50 * 512
    with fake_setup(of()) as made:
        predict(made, 1, None, device="cuda")
        assert made.optimizer.param_groups[0]["foreach"] is None


def test_master_weights_are_stepped_in_the_buckets_of_a_gpu() -> None:
    def setup() -> Setup:
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(12))).bfloat16()  # 25 MB of FP32 weight and gradient
        optimizer = torch.optim.RMSprop(model.parameters(), foreach=False)
        return Setup(
            model, optimizer, lambda size: torch.randn(size, 512).bfloat16(), lambda model, x: model(x).float().mean()
        )

    with fake_setup(setup) as made:
        on = {device: predict(made, 1, "split24", 2, "split32", device) for device in ("cpu", "cuda")}
    numel = 12 * (512 * 512 + 512)
    assert on["cuda"].memory.optimizer_state >= 12 * numel  # one state, and a bucket of everything
    assert on["cpu"].memory.optimizer_state <= 4 * numel + 9 * 2**20


def test_the_plan_says_what_device_it_was_predicted_for() -> None:
    plans = {
        device: accumkern.plan(resnet, effective_batch=8, memory="1 GB", measure=False, device=device)
        for device in (None, "cuda", "cpu")
    }
    assert plans[None].predictions == plans["cuda"].predictions
    assert plans[None].machine["device"] == "none: predicted for a GPU on fake tensors"
    assert plans["cpu"].machine["device"] == "none: predicted for a CPU on fake tensors"
    assert "Predicted for a GPU, with fused attention" in str(plans[None])
    assert "Predicted for a GPU" not in str(plans["cpu"])
    for plan in plans.values():
        of = plan.predictions[-1]
        assert of.memory.kernels > 0
        assert of.low < of.memory.total
        assert f" with micro-batches of {of.micro_batch}. Tensors alone take the least" in str(plan)
        assert plan.to_dict()["predictions"][-1]["low"] == of.low


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"device": "tpu"}, "device is 'tpu'; it must be one of cpu, cuda, or None"),
        ({"device": "cpu", "measure": True}, "device is 'cpu'; what is measured .* is the device of the model"),
    ],
)
def test_a_wrong_device_is_named(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        accumkern.plan(gpt(), **{"memory": "1 GB", "measure": False} | arguments)


# ---- one sample is too few ---------------------------------------------------------------------------------------


def pooled() -> Setup:
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 10)
    model = nn.Sequential(*layers)
    return images(model, torch.optim.SGD(model.parameters(), lr=0.1), 8)


def test_a_prediction_begins_where_batch_norm_can() -> None:
    plan = accumkern.plan(pooled, effective_batch=8, memory="1 GB", measure=False)
    assert [of.micro_batch for of in plan.predictions] == [2, 4, 8]
    assert {choice.ranks: choice.micro_batch for choice in plan.by_ranks} == {1: 8, 2: 4, 4: 2, 8: 2}
    with pytest.raises(ValueError, match=r"no micro-batch would fit into 9 kB .*: 2 samples need"):
        accumkern.plan(pooled, memory="9kB", measure=False)
    with pytest.raises(PredictionError, match="Expected more than 1 value per channel"):
        accumkern.plan(pooled, effective_batch=1, memory="1 GB", measure=False)


def test_the_error_of_the_first_size_is_told_where_all_fail() -> None:
    def attempt(size: int) -> None:
        raise RuntimeError(f"failed with {size}")

    with pytest.raises(RuntimeError, match="failed with 1"):
        smallest_size(attempt, 1024)


# ---- the tracker -------------------------------------------------------------------------------------------------


def test_the_tracker_counts_what_is_there_by_what_it_is_for() -> None:
    held, weight = torch.zeros(100), nn.Parameter(torch.ones(50))
    tracker = MemoryTracker(block_bytes)
    tracker.count("residuals", {"x": [held, held[1:]]})
    tracker.count("parameters", weight)
    module = nn.Module()
    module.weight = weight
    with tracker.gradients_of(module), tracker:
        a = torch.zeros(1000)
        b = a[:10]
        del a
        c = b.clone()
        del b, c
        alone = dict(tracker.peak)
        (weight * weight).sum().backward()
        d = torch.zeros(2000)
    kinds = dict.fromkeys(("gradients", "master_residuals", "optimizer_state", "kernels"), 0)
    assert alone == kinds | {"parameters": 512, "residuals": 512, "activations": 4096 + 512}
    assert tracker.peak == alone | {"gradients": 512, "activations": 8192}
    assert tracker.low == 3 * 512 + 8192
    tracker.count("optimizer_state", d)
    assert tracker.peak["optimizer_state"] == 0  # it is no higher
    tracker.count("residuals", torch.zeros(1))
    assert tracker.peak == alone | {"gradients": 512, "residuals": 1024, "activations": 0, "optimizer_state": 8192}
    assert not weight._backward_hooks
    assert not weight._post_accumulate_grad_hooks


def test_the_tracker_sees_what_a_tensor_is_made_of() -> None:
    both = TwoTensor(torch.ones(10), torch.ones(10))
    with MemoryTracker() as tracker:
        first = both + 1
        made = first * 2
        del first
    assert tracker.peak["activations"] == 2 * 2 * 40
    assert made.a.tolist() == [4.0] * 10


# ---- what is written to stderr -----------------------------------------------------------------------------------


SCRIPTS = {
    "checkpoints": "setup = gpt(0.1, checkpoints=True)",
    "called twice": """
        def setup():
            made = gpt()()
            return made._replace(loss=lambda model, batch: model(batch).mean() - model(batch).square().mean())
    """,
    "transformers": """
        import transformers
        transformers.logging.set_verbosity_error()
        def setup():
            sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
            model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **sizes))
            optimizer = torch.optim.AdamW(model.parameters())
            def loss(model, batch):
                return model(input_ids=batch, labels=batch, attention_mask=torch.ones_like(batch)).loss
            return model, optimizer, lambda size: torch.randint(64, (size, 32)), loss
    """,
}
OF_OTHERS = ("torch/utils/_pytree.py", "torchao", "Skipping import of cpp extensions")  # while they are imported


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_is_written_to_stderr(script: str) -> None:
    if script == "transformers":
        pytest.importorskip("transformers")
    program = "\n".join(
        [
            "import torch, accumkern",
            "from test_predict import gpt",
            textwrap.dedent(SCRIPTS[script]),
            "plan = accumkern.plan(setup, memory='1 GB', effective_batch=4, noise_windows=4)",
            "assert plan.prediction_problem is None, plan.prediction_problem",
            "assert plan.prediction_error < 0.05, plan.prediction_error",
            "accumkern.plan(setup, memory='1 GB', effective_batch=4, measure=False)",
        ]
    )
    command = [sys.executable, "-W", "default", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not any(other in line for other in OF_OTHERS)] == []


def test_layers_that_are_copied_bring_no_warning_of_fake_tensors(recwarn: pytest.WarningsRecorder) -> None:
    def setup() -> Any:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.TransformerEncoder(layer, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, lambda size: torch.randn(size, 4, 8), lambda model, batch: model(batch).square().mean()

    accumkern.plan(setup, memory="1GB", measure=False, largest_micro_batch=2)
    assert not [warning for warning in recwarn if "FakeTensor" in str(warning.message)]
