"""For tests of master weights: the same optimizer on FP32 parameters, given the gradients that the step reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from pinned import pinned
from ranks import full
from torch import Tensor, nn

import accumkern
from accumkern.formats import BUFFERS, encode

BF16 = torch.bfloat16


def bits(tensor: Any) -> Tensor:
    """Return the bits of the whole of an FP32 or bfloat16 tensor, as integers."""
    whole = full(tensor.detach()).contiguous()
    return whole.view(torch.int32 if whole.dtype is torch.float32 else torch.int16)


def rounded(master: Any) -> Tensor:
    """Return the bfloat16 weight of the whole of an FP32 master: ties away from zero."""
    return encode(BUFFERS["split32"][BF16], full(master.detach()))[0]


class Fp32Twin:
    """The same optimizer on FP32 parameters: the masters as they are now, laid out over ranks alike.

    Args:
        acc: an accumulator with ``master_weights="split32"``.
        params: all of its optimizer.
        make: makes an optimizer of groups of parameters.
    """

    def __init__(
        self,
        acc: accumkern.GradAccumulator,
        params: Iterable[nn.Parameter],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    ) -> None:
        self.acc, self.of = acc, list(params)
        self.params = [nn.Parameter(acc.master_weight(param)) for param in self.of]
        twins = dict(zip(self.of, self.params, strict=True))
        groups = [[twins[param] for param in group["params"]] for group in self._theirs.param_groups]
        self.optimizer = pinned(make([{"params": group} for group in groups]))

    @property
    def _theirs(self) -> Any:
        return self.acc._attachment.optimizer

    def step(self, divide_by: float = 1.0) -> None:
        """Step with the gradients and options that there are; call it before the other optimizer steps."""
        for group, theirs in zip(self.optimizer.param_groups, self._theirs.param_groups, strict=True):
            group.update({key: value for key, value in theirs.items() if key != "params"})
        for param, twin in zip(self.of, self.params, strict=True):
            gradient = self.acc.gradient(param)
            if gradient is not None and divide_by != 1:  # some versions of torch take a pending sum before they divide
                gradient = gradient / divide_by
            twin.grad = gradient
        self.optimizer.step()

    def check(self) -> None:
        """Assert that masters, weights and states have the bits of this optimizer's."""
        for i, (param, twin) in enumerate(zip(self.of, self.params, strict=True)):
            assert torch.equal(bits(self.acc.master_weight(param)), bits(twin)), f"master {i} differs"
            if param.dtype is BF16:
                assert torch.equal(bits(param), bits(rounded(twin))), f"weight {i} is not its master rounded"
            theirs, ours = self.optimizer.state[twin], self._theirs.state[param]
            assert theirs.keys() == ours.keys()
            for key, value in theirs.items():
                if isinstance(value, Tensor):
                    assert ours[key].dtype is value.dtype, f"{key} {i}"
                    assert torch.equal(bits(ours[key].float()), bits(value.float())), f"{key} of {i} differs"
                else:
                    assert ours[key] == value, f"{key} {i}"


def assert_same_masters(
    found: accumkern.GradAccumulator, model: nn.Module, expected: accumkern.GradAccumulator, other: nn.Module
) -> None:
    """Assert that two models have the same master weights, bit for bit."""
    theirs = dict(other.named_parameters())
    for name, param in model.named_parameters():
        a, b = found.master_weight(param), expected.master_weight(theirs[name])
        assert torch.equal(bits(a), bits(b)), f"the master of {name} differs"
