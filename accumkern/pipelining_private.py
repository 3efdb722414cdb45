"""What accumkern needs of ``torch.distributed.pipelining`` beyond its documented names; in torch 2.10 and 2.13."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

#: The module of pipeline stages, or None before somebody has imported it.
_stages = functools.partial(sys.modules.get, "torch.distributed.pipelining.stage")


def watch_stages(run: Callable[..., Any]) -> None:
    """Let each stage of a pipeline call ``run(method, stage, kind, ...)`` for ``method(stage, kind, ...)``.

    That is what it does of a backward pass: ``kind`` is ``"full"``, ``"input"`` or ``"weight"``. Before
    torch.distributed.pipelining is imported, nothing is done; nor is it done twice.

    Raises:
        RuntimeError: stages of this torch have not that method.
    """
    module = _stages()
    if module is None or _are_watched(module):
        return
    try:
        method = module._PipelineStageBase.backward_maybe_with_nosync
        module.stage_backward_weight.__code__  # noqa: B018
    except AttributeError as error:
        raise RuntimeError(
            f"torch.distributed.pipelining is imported, and not as torch 2.10 to 2.13 have it: {error}; install one of "
            "these"
        ) from error

    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        return run(method, *args, **kwargs)

    module._PipelineStageBase.backward_maybe_with_nosync = watched
    module._PipelineStageBase.accumkern_watches = True  # also where others wrap the method after this


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
