"""``BatchSchedule``: an effective batch that changes during a run, by the number of micro-batches in a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accumkern.accumulator import GradAccumulator
from accumkern.checks import integer, items, one_of

#: The learning rate is multiplied by (batch / last batch) to the power:
LR_RULES = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


class BatchSchedule:
    """Says how many micro-batches the current window has, and moves on when the window is over.

    A loop of its own, with the mean over each window in FP32::

        acc = accumkern.attach(optimizer)
        schedule = accumkern.BatchSchedule([(0, 2), (50_000, 4), (400_000, 8)], micro_batch=16, accumulator=acc)
        while schedule.samples < 2_000_000:
            for _ in range(schedule.accumulation_steps):
                loss(model, next(batches)).backward()      # the mean loss of a micro-batch, not divided
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_factor * lr      # lr belongs to the last stage's batch
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    A stage begins with the first window that starts at its samples or beyond: no window is cut short.

    Args:
        stages: pairs of whole numbers: the samples of all ranks from which a stage is, from 0 upwards, and its
            micro-batches in a window. ``plan(..., schedule=True).schedule.pairs`` are such.
        micro_batch: samples of one micro-batch of a rank.
        ranks: that train with different data.
        lr_rule: of :attr:`lr_factor`: ``"none"``, ``"sqrt"`` or ``"linear"``.
        accumulator: whose ``scale`` is set to ``1 / accumulation_steps`` for each window, now and in every
            :meth:`step`: a window's gradient is then the mean over its micro-batches, as with
            ``attach(..., average_over=accumulation_steps)``. None leaves averaging to the loop.

    Attributes:
        samples: of all ranks, in the windows that are over.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or range, or the stages are not in order.
        RuntimeError: the accumulator is detached.
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, int]],
        micro_batch: int,
        *,
        ranks: int = 1,
        lr_rule: str = "sqrt",
        accumulator: GradAccumulator | None = None,
    ) -> None:
        self._stages = _checked(stages)
        right = "it must be a whole number of at least 1"
        self._micro_batch = integer("micro_batch", micro_batch, right, 1) * integer("ranks", ranks, right, 1)
        one_of("lr_rule", lr_rule, LR_RULES)
        self._power = LR_RULES[lr_rule]
        if accumulator is not None and not isinstance(accumulator, GradAccumulator):
            raise TypeError(
                f"accumulator is a {type(accumulator).__name__}; it must be what attach() returned, or None"
            )
        self._accumulator = accumulator
        self.samples = 0
        self._set_scale()

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of a rank in the current window."""
        return next(steps for start, steps in reversed(self._stages) if start <= self.samples)

    @property
    def effective_batch(self) -> int:
        """Samples of the current window, over all ranks."""
        return self._micro_batch * self.accumulation_steps

    @property
    def lr_factor(self) -> float:
        """What to multiply the learning rate of the last stage by: ``(batch / last batch) ** (0, 1/2 or 1)``."""
        return float((self.accumulation_steps / self._stages[-1][1]) ** self._power)

    def step(self, samples: int | None = None) -> None:
        """Go on to the next window; call it once per window, after the optimizer's step.

        Args:
            samples: that the window really had, over all ranks; None where it was a full one.

        Raises:
            TypeError, ValueError: ``samples`` is not a whole number of at least 1.
            RuntimeError: the accumulator is detached.
        """
        if samples is None:
            samples = self.effective_batch
        self.samples += integer("samples", samples, "it must be a whole number of at least 1, or None", 1)
        self._set_scale()

    def state_dict(self) -> dict[str, int]:
        """Return what a checkpoint needs: ``{"samples": ...}``. Stages and micro-batch are given anew, and may change.

        In the middle of a window it is the state of its beginning: the loop has to know how far it had come.
        """
        return {"samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            TypeError, ValueError: it is no such dictionary. Nothing has changed then.
            RuntimeError: the accumulator is detached.
        """
        if not isinstance(state_dict, dict) or set(state_dict) != {"samples"}:
            found = list(state_dict) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise TypeError(f"state_dict is {found}; it must be what state_dict() returned: {{'samples': ...}}")
        self.samples = integer(
            "samples of state_dict", state_dict["samples"], "it must be a whole number of at least 0"
        )
        self._set_scale()

    def __repr__(self) -> str:
        return f"BatchSchedule({self._stages}, samples={self.samples}, accumulation_steps={self.accumulation_steps})"

    def _set_scale(self) -> None:
        if self._accumulator is not None:
            self._accumulator.scale = 1 / self.accumulation_steps


def _checked(stages: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return stages as numbers of Python's own, or raise."""
    right = "it must hold pairs of samples and accumulation steps, such as [(0, 2), (50_000, 4)]"
    found: list[tuple[int, int]] = []
    for number, stage in enumerate(items("stages", stages, right)):
        name = f"stages[{number}]"
        pair = items(name, stage, "it must be a pair of samples and accumulation steps")
        if len(pair) != 2:
            raise ValueError(f"{name} has {len(pair)} numbers; it must be a pair of samples and accumulation steps")
        start = integer(f"{name}[0]", pair[0], "it must be a whole number of samples")
        steps = integer(f"{name}[1]", pair[1], "it must be a whole number of accumulation steps, at least 1", 1)
        if not found and start != 0:
            raise ValueError(f"{name} is from {start} samples; the first stage must be from 0")
        if found and start <= found[-1][0]:
            raise ValueError(
                f"{name} is from {start} samples; it must be from more than {found[-1][0]}, as of the one before"
            )
        found.append((start, steps))
    if not found:
        raise ValueError(f"stages is empty; {right}")
    return found
