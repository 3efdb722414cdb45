"""What accumkern needs of ``torch.distributed.pipelining`` beyond its documented names; in torch 2.10 and 2.13."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

#: The module of pipeline stages, or None before somebody has imported it.
_stages = functools.partial(sys.modules.get, "torch.distributed.pipelining.stage")


def watch_stages(backward: Callable[..., Any], add: Callable[..., Any]) -> None:
    """Let each stage of a pipeline call two functions in the stead of torch's, each with that as its first argument.

    Before torch.distributed.pipelining is imported, nothing is done; nor is it done twice.

    Args:
        backward: ``backward(original, stage, kind, ...)`` for what the stage does of a backward pass, where ``kind`` is
            ``"full"``, ``"input"`` or ``"weight"``.
        add: ``add(original, weights, groups, ...)`` for what takes gradients of weights, group by group, and adds them.

    Raises:
        RuntimeError: this torch has not these functions.
    """
    module: Any = _stages()
    if module is None or _are_watched(module):
        return
    try:
        stage = module._PipelineStageBase
        stage_backward, stage_weights = stage.backward_maybe_with_nosync, module.stage_backward_weight
    except AttributeError as error:
        raise RuntimeError(
            f"torch.distributed.pipelining is imported, and not as torch 2.10 to 2.13 have it: {error}; install one of "
            "these"
        ) from error
    stage.backward_maybe_with_nosync = _instead_of(stage_backward, backward)
    module.stage_backward_weight = _instead_of(stage_weights, add)
    stage.accumkern_watches = True  # also where others wrap the functions after this


def _instead_of(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    return call


def refuse_unwatched_stage() -> None:
    """Raise where a stage is taking the gradients of its weights, and stages are not watched."""
    module = _stages()
    if module is None or _are_watched(module):
        return
    code = module.stage_backward_weight.__code__
    for newest in sys._current_frames().values():  # autograd may call a hook in another thread
        if any(frame.f_code is code for frame, _ in traceback.walk_stack(newest)):
            raise RuntimeError(
                "a pipeline schedule that splits the backward pass adds gradients of weights itself, which accumkern "
                "does not see, because torch.distributed.pipelining was imported after attach(); import it before"
            )


def _are_watched(module: Any) -> bool:
    return hasattr(module._PipelineStageBase, "accumkern_watches")
