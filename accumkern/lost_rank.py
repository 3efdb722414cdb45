"""Which rank is gone: what the others find out together when an exchange between them has failed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from accumkern.checks import describe
from accumkern.torch_private import timeout_of, without_modes

#: For how many seconds a rank waits for the notes of others, which may be there still.
PATIENCE_S = 5.0

_NOTES = "accumkern/missed"
_TAG = 0x6C6F7374  # of messages that nobody sends
_CLOSED, _LATE = "closed", "late"
_WORDS_OF_CLOSED = ("closed by peer", "reset by peer", "Broken pipe")  # of gloo, which has no types for its errors
_WORDS_OF_LATE = ("Timed out waiting", "timeout caused pair closure")


class RanksError(RuntimeError):
    """Another rank failed or is gone, or the ranks were not asked for the same."""


def is_of_connection(error: BaseException) -> bool:
    """Return whether an error is one of an exchange between ranks, one of which is gone or has not come."""
    told = str(error)
    return isinstance(error, RuntimeError) and any(words in told for words in _WORDS_OF_CLOSED + _WORDS_OF_LATE)


class RollCall:
    """Finds out which ranks of a group are gone, when an exchange between them has failed.

    A rank that dies closes its connections; but so does one that has seen that and ended with an error, and one that
    did not wait any longer for another that hangs. So whoever sees a failure first leaves a note of whom it misses, in
    the store of the group. Gone is who is missed and leaves no note within a few seconds (:data:`PATIENCE_S`): missed
    by this rank, or by one that this rank misses. While all is well nothing is sent or stored.

    It looks at connections of gloo. Of a group without gloo only notes are known.

    Args:
        group: of the ranks. After a failure nothing can be exchanged in it any more.
        doing: what they do, for errors: ``"in acc.backward()"``.
    """

    def __init__(self, group: dist.ProcessGroup, doing: str) -> None:
        self._group = group
        self._doing = doing

    def wait(self, works: Iterable[tuple[int, Any]]) -> None:
        """Wait for messages with other ranks, for all of them together no longer than the group's timeout.

        For all together: then a rank that this one waits for, and that waits for a third, has begun to wait before and
        gives up before, so that its note is there.

        Args:
            works: the other rank, by its number in the group, and what ``isend`` or ``irecv`` with it has returned.

        Raises:
            RanksError: a rank is gone, or has not come in time.
        """
        end = time.monotonic() + timeout_of(self._group).total_seconds()
        for peer, work in works:
            try:
                work.wait(timedelta(seconds=max(end - time.monotonic(), 0.001)))
            except RuntimeError as error:
                raise self.lost(error, peer) from error

    def lost(self, error: BaseException, peer: int | None = None) -> RanksError:
        """Return the error that says who is gone. It takes a few seconds at most, whoever and whatever is gone.

        Args:
            error: how the exchange failed.
            peer: whom this rank waited for, by its number in the group; None where it may have been any.
        """
        me = self._group.rank()
        others = [other for other in range(self._group.size()) if other != me]
        with without_modes():  # such as one of fake tensors
            closed, pending = self._connections(others)
        missed = dict.fromkeys(closed, _CLOSED)
        if peer is not None:
            missed.setdefault(peer, _LATE)
        elif not closed:
            missed = dict.fromkeys(others, _LATE)
        notes = _Notes(self._group.get_group_store(), me, missed)
        notes.leave()
        if pending:  # a wait in vain closes all connections, so that those who wait for this rank see it too
            with suppress(RuntimeError):
                pending[0].wait(timedelta(milliseconds=1))
        notes.collect()
        return RanksError(f"{self._told(notes)} ({describe(error)})")

    def _connections(self, others: list[int]) -> tuple[list[int], list[Any]]:
        """Return to whom the connection was closed from their side, and what waits for a message from the rest."""
        closed, pending = [], []
        for other in others:
            try:
                message = torch.empty(1, dtype=torch.uint8, device="cpu")
                pending.append(dist.irecv(message, group=self._group, group_src=other, tag=_TAG))
            except RuntimeError as error:
                if any(words in str(error) for words in _WORDS_OF_CLOSED):
                    closed.append(other)
        return closed, pending

    def _told(self, notes: _Notes) -> str:
        numbers = dist.get_process_group_ranks(self._group)

        def named(ranks: Iterable[int], one: str, several: str) -> str:
            names = sorted(numbers[rank] for rank in ranks)
            return f"rank {names[0]} {one}" if len(names) == 1 else f"ranks {', '.join(map(str, names))} {several}"

        silent = notes.silent()
        gone = [rank for rank, how in silent.items() if how == _CLOSED]
        if gone:
            told = named(gone, "is gone (its connection closed)", "are gone (their connections closed)")
            if notes.error is None or len(gone) == 1:
                return f"{told} {self._doing}; see its output"
            why = f"as the store of the group is gone too ({notes.error})"
            return f"{told} {self._doing}; which of them was first is not known, {why}"
        if silent:
            seconds = f"{timeout_of(self._group).total_seconds():g} s, the timeout of the group"
            return f"{named(silent, 'has', 'have')} not come {self._doing} within {seconds}; see its output"
        left = [rank for rank, missed in list(notes.found.items()) if self._group.rank() in missed]
        if left:
            told = named(left, "has", "have")
            return f"{told} not waited any longer for this rank, {dist.get_rank()}, {self._doing}"
        return f"{named(notes.found, 'has', 'have')} lost the connection to this rank, {dist.get_rank()}, {self._doing}"


class _Notes:
    """Notes in a store of who misses whom, and how.

    A store may be gone, or its machine, so that it never answers: so another thread reads it.

    Attributes:
        found: of the ranks that have left one.
        error: of the store, or None.
    """

    def __init__(self, store: dist.Store, me: int, missed: dict[int, str]) -> None:
        self._store = dist.PrefixStore(_NOTES, store)
        self._me = me
        self._missed = missed
        self.found: dict[int, dict[int, str]] = {}
        self.error: str | None = None
        self._is_left = threading.Event()
        self._end = time.monotonic() + PATIENCE_S
        self._thread = threading.Thread(target=self._run, daemon=True)

    def silent(self) -> dict[int, str]:
        """Return who is missed, and how, by this rank and by those that it misses, and has left no note."""
        missed = dict(self._missed)
        for of_other in list(self.found.values()):
            missed = {**of_other, **missed}
        return {rank: how for rank, how in missed.items() if rank != self._me and rank not in self.found}

    def leave(self) -> None:
        """Leave this rank's note, and begin to read those of others."""
        self._thread.start()
        self._is_left.wait(PATIENCE_S)

    def collect(self) -> None:
        """Read notes until there is one of everybody who is missed, or no more is to be expected."""
        self._thread.join(max(self._end - time.monotonic(), 0.0) + 0.5)
        if self._thread.is_alive():
            self.error = "it does not answer"

    def _run(self) -> None:
        try:
            self._store.set(str(self._me), json.dumps(list(self._missed.items())))
            self._is_left.set()
            while self.silent() and time.monotonic() < self._end:
                for rank in self.silent():
                    if self._store.check([str(rank)]):
                        self.found[rank] = dict(json.loads(self._store.get(str(rank))))
                time.sleep(0.02)
        except RuntimeError as error:
            self.error = describe(error)
        finally:
            self._is_left.set()
