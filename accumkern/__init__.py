"""FP32-exact gradient accumulation inside ``.grad``, at one byte per parameter."""

import torch

__version__ = "0.1.0"

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
    raise ImportError(f"accumkern needs torch 2.10 or newer; torch {torch.__version__} is installed")

from accumkern.accumulator import GradAccumulator, attach
from accumkern.backends import available_backends
from accumkern.finish import Finished
from accumkern.lost_bits import LostBitsReport
from accumkern.noise_scale import NoiseScale
from accumkern.ops import accumulate_

__all__ = [
    "attach",
    "GradAccumulator",
    "Finished",
    "NoiseScale",
    "LostBitsReport",
    "accumulate_",
    "available_backends",
]
