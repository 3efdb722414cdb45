"""FP32-exact gradient accumulation inside ``.grad``, and FP32 master weights inside bfloat16 weights."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
    raise ImportError(f"accumkern needs torch 2.10 or newer; torch {torch.__version__} is installed")

from accumkern.accumulator import GradAccumulator
from accumkern.backends import available_backends
from accumkern.batch_schedule import BatchSchedule
from accumkern.casting import to_bfloat16
from accumkern.finish import Finished
from accumkern.lost_bits import LostBitsReport
from accumkern.memory import HeldMemory
from accumkern.noise_scale import NoiseScale
from accumkern.ops import accumulate_
from accumkern.slot import Parts
from accumkern.version import __version__ as __version__
from accumkern.wiring import accumulator_of, attach

__all__ = [
    "attach",
    "accumulator_of",
    "GradAccumulator",
    "Finished",
    "Parts",
    "NoiseScale",
    "LostBitsReport",
    "HeldMemory",
    "BatchSchedule",
    "accumulate_",
    "to_bfloat16",
    "available_backends",
    "plan",
    "sweep",
]

if TYPE_CHECKING:
    from accumkern.planning.plan import plan
    from accumkern.planning.sweep import sweep
else:

    def __getattr__(name: str) -> Any:
        # Planning is imported when it is asked for: training needs none of it.
        if name in ("plan", "sweep"):
            return getattr(import_module(f"accumkern.planning.{name}"), name)
        raise AttributeError(f"module 'accumkern' has no attribute {name!r}")
