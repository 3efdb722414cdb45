"""What is made of a norm, in plain torch: the reference of the kernels, and what does it where they cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from accumkern.formats import divide


def clipped(norm: Tensor, divisor: float | Tensor, max_norm: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm of divided gradients, what they are to be multiplied by, and whether the norm is not finite.

    ``norm / divisor`` and ``min(1, max_norm * (1 / (norm + 1e-6)))``, each operation rounded to FP32: the bits of
    ``torch.nn.utils.clip_grad_norm_``. A NaN stays one.

    Args:
        norm: of the gradients before they are divided, FP32, 0-dim.
        divisor: a number, or an FP32 0-dim tensor beside the norm.
        max_norm: None clips nothing.
    """
    norm = divide(norm, divisor)
    coefficient = torch.ones_like(norm) if max_norm is None else torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return norm, coefficient, ~norm.isfinite()
