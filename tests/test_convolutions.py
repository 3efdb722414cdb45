"""What convolutions need inside themselves, against the events of torch's allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from accumkern.planning.kernels import scratch_bytes
from accumkern.planning.memory import MemoryMeter

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = {"given": torch.channels_last, "weight": torch.channels_last, "grad": torch.channels_last}
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((8, 32, 32, 32), (32, 32, 3, 3), {"padding": 1}),
    "3x3 stride 2": ((8, 32, 32, 32), (64, 32, 3, 3), {"padding": 1, "stride": 2}),
    "1x1 stride 2": ((8, 32, 32, 32), (64, 32, 1, 1), {"stride": 2}),
    "odd channels": ((8, 17, 32, 32), (33, 17, 3, 3), {"padding": 1}),
    "to an image": ((8, 32, 32, 32), (3, 32, 3, 3), {"padding": 1}),
    "of an image": ((8, 3, 64, 64), (32, 3, 7, 7), {"padding": 3, "stride": 2}),
    "patches": ((16, 3, 32, 32), (32, 3, 8, 8), {"stride": 8}),
    "groups": ((8, 32, 32, 32), (32, 8, 3, 3), {"padding": 1, "groups": 4}),
    "small groups": ((8, 128, 14, 14), (128, 4, 3, 3), {"padding": 1, "groups": 32}),
    "small groups stride 2": ((8, 128, 14, 14), (128, 4, 3, 3), {"padding": 1, "groups": 32, "stride": 2}),
    "depthwise": ((8, 32, 32, 32), (32, 1, 7, 7), {"padding": 3, "groups": 32}),
    "depthwise 3x3": ((8, 24, 16, 16), (24, 1, 3, 3), {"padding": 1, "groups": 24}),
    "depthwise stride 2": ((4, 64, 28, 28), (64, 1, 5, 5), {"padding": 2, "groups": 64, "stride": 2}),
    "depthwise of few": ((1, 96, 14, 14), (96, 1, 7, 7), {"padding": 3, "groups": 96}),
    "transposed": ((8, 32, 32, 32), (32, 16, 2, 2), {"stride": 2, "transposed": True}),
    "transposed stride 1": ((8, 32, 32, 32), (32, 16, 3, 3), {"transposed": True}),
    "transposed 4x4": ((8, 64, 16, 16), (64, 32, 4, 4), {"stride": 2, "padding": 1, "transposed": True}),
    "1d": ((8, 32, 1024), (32, 32, 3), {"padding": 1}),
    "1d depthwise": ((4, 64, 128), (64, 1, 4), {"padding": 3, "groups": 64}),
    "1d depthwise 3": ((4, 64, 128), (64, 1, 3), {"padding": 2, "groups": 64}),
    "1d of one": ((1, 64, 256), (64, 64, 7), {"padding": 3}),
    "1d, channels last": ((4, 64, 128), (64, 64, 3), {"padding": 1, "given": "transposed"}),
    "3d": ((2, 16, 16, 16, 16), (16, 16, 3, 3, 3), {"padding": 1}),
    "3d of one": ((1, 16, 16, 16, 16), (16, 16, 3, 3, 3), {"padding": 1}),
    "one small image": ((1, 16, 32, 32), (32, 16, 3, 3), {"padding": 1}),
    "FP64": ((4, 16, 16, 16), (16, 16, 3, 3), {"padding": 1, "dtype": torch.float64}),
    "channels last": ((16, 64, 14, 14), (64, 64, 3, 3), {"padding": 1} | LAST),
    "channels last of one": ((1, 16, 32, 32), (32, 16, 3, 3), {"padding": 1} | LAST | {"weight": None}),
    "channels last in the input": ((4, 64, 14, 14), (64, 64, 3, 3), {"padding": 1, "given": torch.channels_last}),
    "channels last in the weight": ((4, 64, 14, 14), (64, 64, 3, 3), {"padding": 1, "weight": torch.channels_last}),
    "channels last, groups": ((8, 128, 14, 14), (128, 8, 3, 3), {"padding": 1, "groups": 16} | LAST),
    "channels last, small groups": ((8, 64, 16, 16), (64, 2, 3, 3), {"padding": 1, "groups": 32} | LAST),
    "channels last, depthwise": ((8, 32, 16, 16), (32, 1, 7, 7), {"padding": 3, "groups": 32} | LAST),
    "channels last, one pixel": ((8, 64, 1, 1), (64, 1, 7, 7), {"padding": 3, "groups": 64, "given": LAST["given"]}),
    "channels last, depthwise 3x3": ((8, 24, 16, 16), (24, 1, 3, 3), {"padding": 1, "groups": 24} | LAST),
    "the gradient's channels last": ((8, 64, 14, 14), (64, 64, 3, 3), {"padding": 1, "grad": torch.channels_last}),
}


@pytest.mark.skipif(torch.__version__ < "2.13", reason="the formulas are of torch 2.13's oneDNN")
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_what_a_convolution_needs_inside_itself(case: str) -> None:
    given_shape, weight_shape, options = CONVOLUTIONS[case]

    def made(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.ones(shape, dtype=options.get("dtype", torch.float32))
        if options.get(name) == "transposed":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        return tensor.to(memory_format=options.get(name) or torch.contiguous_format)

    dims, transposed = len(given_shape) - 2, options.get("transposed", False)
    each = [[options.get(name, standard)] * dims for name, standard in (("stride", 1), ("padding", 0), ("dilation", 1))]
    rest = (transposed, [0] * dims, options.get("groups", 1))
    given, weight = made("given", given_shape), made("weight", weight_shape)
    convolution, backward = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default
    grad = made("grad", convolution(given, weight, None, *each, *rest).shape)
    mask = [given_shape[1] > 3, True, False]
    for function, args in (
        (convolution, (given, weight, None, *each, *rest)),
        (backward, (grad, given, weight, None, *each, *rest, mask)),
    ):
        function(*args)  # what is kept for the next time
        with MemoryMeter(torch.device("cpu"), 0, 10**10) as meter:
            result = function(*args)
        left = sum(tensor.nbytes for tensor in (result if function is backward else [result]) if tensor is not None)
        inside, needs = meter.peak_bytes - left, scratch_bytes(function, args, result)
        print(f"{function}: {inside} inside, {needs} by the formula")
        assert needs == pytest.approx(inside, rel=0.06, abs=9_000)
