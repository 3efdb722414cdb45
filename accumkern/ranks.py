"""What data-parallel ranks agree on; without a process group there is one rank, which agrees with itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist

from accumkern.checks import describe
from accumkern.lost_rank import RanksError, RollCall, is_of_connection
from accumkern.torch_private import without_modes

__all__ = ["OutOfMemoryElsewhereError", "Ranks", "RanksError", "is_first"]

T = TypeVar("T")

_GOOD, _OUT_OF_MEMORY, _FAILED = range(3)


class OutOfMemoryElsewhereError(torch.OutOfMemoryError):
    """Memory has run out on another rank."""


class Ranks:
    """A block that all ranks enter, and that they leave together: after an error on one of them, all with an error.

    Whatever they have to agree on goes through :meth:`gathered` and :meth:`meet`, and a rank that fails takes part in
    it once more, with its error in the place of a value. So it meets the others at their next agreement, whichever that
    is, and nobody waits for a rank that will not come. These collectives run on the CPU, in a group of their own
    (gloo): they take no memory of a GPU that may have run out of it, and are never paired with a collective of the
    model.

    The last thing in the block must be an agreement or the end of a :meth:`phase`.

    Args:
        group: a gloo group of the ranks, for nothing but their agreements, which outlives the block. None makes one of
            all ranks, for the block, when they first agree on something.
        doing: what they do, for errors: ``"in acc.backward()"``.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, doing: str = "") -> None:
        self._group = group
        self._is_own = group is None
        self._doing = doing
        self._is_over = False  # all know of an error, or the ranks have lost each other

    @property
    def count(self) -> int:
        """The number of ranks."""
        if self._group is not None:
            return self._group.size()
        return dist.get_world_size() if _is_initialized() else 1

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of ranks.

        Raises:
            RanksError: another rank has failed, or is gone.
            OutOfMemoryElsewhereError: as :meth:`meet`.
        """
        return self._exchanged(value, None)

    def means(self, numbers: Mapping[T, float]) -> dict[T, float]:
        """Return the means of numbers over ranks, by name; a rank that lacks a name has zero there."""
        of_ranks = self.gathered(dict(numbers))
        names = dict.fromkeys(name for of_rank in of_ranks for name in of_rank)
        return {name: sum(of_rank.get(name, 0.0) for of_rank in of_ranks) / len(of_ranks) for name in names}

    def meet(self) -> None:
        """Return when all ranks have come to their next agreement; it takes one short message.

        Raises:
            RanksError: another rank has failed, or is gone.
            OutOfMemoryElsewhereError: another rank has come with :meth:`meet_out_of_memory`.
        """
        if self.count > 1:
            with self._agreement():
                self._met(_GOOD, None)

    def meet_out_of_memory(self, error: BaseException) -> None:
        """Let the others know, at their next agreement, that memory has run out here. None of them ends with it.

        Raises:
            RanksError: another rank has failed, or is gone.
        """
        if self.count > 1:
            with self._agreement(), suppress(OutOfMemoryElsewhereError):
                self._met(_OUT_OF_MEMORY, f"ran out of memory ({describe(error)})")

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
        self._doing = f"in the phase {name!r}"
        yield
        self.gathered(None)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None and not self._is_over and not isinstance(error, RanksError):  # which all get
                self._tell(error)
        finally:
            if self._group is not None and self._is_own:
                dist.destroy_process_group(self._group)

    def _tell(self, error: BaseException) -> None:
        """Let the others know of this rank's error, which it ends with: unless that is the loss of another rank."""
        if self._group is not None and is_of_connection(error):
            raise RollCall(self._group, self._doing).lost(error) from error
        with suppress(RuntimeError):
            self._exchanged(None, f"failed {self._doing} with {describe(error)}")

    def _exchanged(self, value: T, failure: str | None) -> list[T]:
        if self.count == 1:
            return [value]
        with self._agreement():
            self._met(_GOOD if failure is None else _FAILED, failure)
            values: list[T] = [value] * self.count
            dist.all_gather_object(values, value, self._group)
        return values

    @contextmanager
    def _agreement(self) -> Iterator[None]:
        self._is_over = True  # until it went well: after an interrupt in its middle nothing would be paired rightly
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        try:
            with without_modes():  # such as a limit of memory
                yield
        except OutOfMemoryElsewhereError:
            self._is_over = False
            raise
        except RanksError:
            raise
        except RuntimeError as error:
            raise RollCall(self._group, self._doing).lost(error) from error
        self._is_over = False

    def _met(self, state: int, text: str | None) -> None:
        """Wait until all ranks have come here, and raise where one of them is not well."""
        worst = torch.tensor([state], dtype=torch.int32, device="cpu")
        dist.all_reduce(worst, dist.ReduceOp.MAX, self._group)
        if worst == _GOOD:
            return
        of_ranks: list[tuple[int, str | None]] = [(state, text)] * self.count
        dist.all_gather_object(of_ranks, (state, text), self._group)
        assert self._group is not None
        numbers = dist.get_process_group_ranks(self._group)
        told = "; ".join(
            f"rank {rank} {text}" for rank, (state, text) in zip(numbers, of_ranks, strict=True) if state == worst
        )
        if worst == _FAILED:
            raise RanksError(f"{told}; see the output of that rank for where")
        raise OutOfMemoryElsewhereError(told)


def is_first() -> bool:
    """Return whether this is the rank that speaks for all."""
    return not _is_initialized() or dist.get_rank() == 0


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
