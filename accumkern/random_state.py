"""The random numbers of torch, Python and numpy, to go on from again."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable

import torch


class RandomState:
    """The random numbers of torch (on the CPU and some GPUs), Python and numpy, as they are now.

    Args:
        devices: whose random numbers; those of the CPU always belong to it.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in _gpus(devices)}
        self._python = random.getstate()
        self._numpy = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def put_back(self) -> None:
        """Go on from there again."""
        torch.set_rng_state(self._torch)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def _gpus(devices: Iterable[torch.device]) -> list[torch.device]:
    return [device for device in dict.fromkeys(devices) if device.type == "cuda"]
