"""FP32-exact gradient accumulation inside ``.grad``, at one byte per parameter."""

__version__ = "0.1.0"

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
