"""A window on one rank: what :mod:`accumkern.ddp_window` and :mod:`accumkern.fsdp_window` do for several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

Name = TypeVar("Name")


class RankWindow:
    """A block around a window, in which memory may run out, and the window begin again, on any rank.

    ::

        with window_of(model) as window:               # all ranks; before anything that may fail on one of them
            while True:
                parts = window.agreed_parts(parts, samples)
                try:
                    with window.attempt():
                        whole = ...                    # window.whole(counts), once
                        for i in range(parts):
                            with window.part(is_last=i + 1 == parts):
                                ...                    # forward and backward
                    break
                except BaseException as error:
                    ...                                # put back; raise, or more parts
            window.reduce()                            # where memory runs out in here, it ends the ranks

    The block is left with an error on all ranks, or on none: a rank that fails, with anything but memory that runs out
    inside of :meth:`attempt`, ends the others with its name and error (:class:`accumkern.ranks.RanksError`).

    Attributes:
        skips_parts: whether a rank may leave out a part that counts nothing.
    """

    skips_parts = True

    def whole(self, counts: Mapping[Name, float]) -> dict[Name, float]:
        """Return ``sum over ranks of count / ranks``, by name: what a part's count is to be divided by.

        The mean over ranks of ``sum(c_i * gradient_i) / whole`` is the gradient of all ranks' samples together. A name
        that a rank does not have counts zero there.
        """
        return dict(counts)

    def agreed_parts(self, parts: int, samples: int) -> int:
        """Return in how many parts this rank runs its samples, where it would run at least ``parts``.

        Raises:
            ValueError: ranks that have to run equally many have too few samples for it.
        """
        return parts

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Return a block around all passes of a window, which may end with an error and be entered again.

        Raises:
            OutOfMemoryElsewhereError: memory has run out on another rank; this one begins again with it.
        """
        yield

    @contextmanager
    def part(self, is_last: bool) -> Iterator[None]:
        """Return a block around forward and backward pass of a part."""
        yield

    def reduce(self) -> None:
        """Take the mean of the gradients over ranks, where the backward passes have not done so."""

    def __enter__(self) -> RankWindow:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None
