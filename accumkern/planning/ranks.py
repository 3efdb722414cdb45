"""What data-parallel ranks agree on; without a process group there is one rank, which agrees with itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TypeVar

import torch.distributed as dist

from accumkern.planning.protocol import describe

T = TypeVar("T")


class RanksError(RuntimeError):
    """Another rank failed or is gone, or the ranks were not asked for the same."""


class Ranks:
    """A block that all ranks enter, and that they leave together: after an error on one of them, all with an error.

    Whatever they have to agree on goes through :meth:`gathered`, and a rank that fails takes part in it once more, with
    its error in the place of a value. So it meets the others at their next agreement, whichever that is, and nobody
    waits for a rank that will not come. These collectives run on the CPU, in a group of their own (gloo): they take no
    memory of a GPU that may have run out of it, and are never paired with a collective of the model.

    The last thing in the block must be :meth:`gathered` or the end of a :meth:`phase`.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._phase = ""
        self._is_over = False  # all know of an error, or the ranks have lost each other

    @property
    def count(self) -> int:
        """The number of ranks."""
        return dist.get_world_size() if _is_initialized() else 1

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of ranks.

        Raises:
            RanksError: another rank has failed, or is gone.
        """
        return self._exchanged(value, None)

    def check_same(self, **arguments: object) -> None:
        """Check that all ranks were given the same.

        Raises:
            RanksError: an argument differs.
        """
        of_ranks = self.gathered(arguments)
        for name in arguments:
            values = [of_rank[name] for of_rank in of_ranks]
            if any(other != values[0] for other in values):
                raise RanksError(f"{name} differs between the ranks: {values}; give the same to all of them")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Return a block that errors are told to come from, and that no rank leaves before all have come to its end."""
        self._phase = name
        yield
        self.gathered(None)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if error is not None and not self._is_over:
            with suppress(RuntimeError):  # the rank's own error is what it ends with
                self._exchanged(None, f"in the phase {self._phase!r} with {describe(error)}")
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _exchanged(self, value: T, failure: str | None) -> list[T]:
        if self.count == 1:
            return [value]
        self._is_over = True  # until it went well: after an interrupt in its middle nothing would be paired rightly
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        of_ranks: list[tuple[T, str | None]] = [(value, failure)] * self.count
        try:
            dist.all_gather_object(of_ranks, (value, failure), self._group)
        except RuntimeError as error:
            raise RanksError(
                f"another rank is gone, or did not come to the end of the phase {self._phase!r} in time; see its "
                f"output ({describe(error)})"
            ) from error
        failures = [f"rank {rank} failed {text}" for rank, (_, text) in enumerate(of_ranks) if text is not None]
        if failures:
            raise RanksError(f"{'; '.join(failures)}; see the output of that rank for where")
        self._is_over = False
        return [value for value, _ in of_ranks]


def is_first() -> bool:
    """Return whether this is the rank that speaks for all."""
    return not _is_initialized() or dist.get_rank() == 0


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
