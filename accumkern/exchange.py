"""Flat tensors of which every rank owns a part: sent to the owners, and what these make of them to all."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from accumkern.lost_rank import RollCall

_TAG = 0x6D65616E  # of these messages, which are not taken for others in the same group (gloo; NCCL has no tags)
_ALIGNED = 64  # elements from which each row begins, so that kernels read it in whole cache lines


def share_machines(group: dist.ProcessGroup, device: torch.device, doing: str) -> bool:
    """Return whether some ranks are on one machine and some on others, the same on all ranks, which have to call it.

    There a ring between machines enters each of them once, where direct messages come for each rank that is in it.

    Args:
        group: the ranks.
        device: of the tensors that they exchange.
        doing: what it is for, for errors.

    Raises:
        RanksError: a rank is gone, or does not call it within the group's timeout.
    """
    digest = hashlib.sha256(socket.gethostname().encode()).digest()
    host = torch.tensor([int.from_bytes(digest[:7], "big")], device=device)
    hosts = host.new_empty(group.size())
    try:
        dist.all_gather_into_tensor(hosts, host, group=group)
    except RuntimeError as error:
        raise RollCall(group, doing).lost(error) from error
    return 1 < len(set(hosts.tolist())) < len(hosts)


class Exchange:
    """Some flat tensors of one length on each rank, of which every rank owns a part.

    Rank ``r`` of ``n`` owns the elements from ``bounds[r]`` up to ``bounds[r + 1]``, ``bounds[r] = numel * r // n``.
    :meth:`scatter` and :meth:`gather` after each other are an all-reduce, with whatever the owners do in between: each
    rank sends and receives ``2 * (n - 1) / n`` times the bytes of the tensors, as in a ring, but directly.

    Args:
        group: the ranks, which make their exchanges in one order.
        numel: elements of each tensor; parts may be empty.
        doing: what it is for, for errors: ``"in the mean over ranks"``.
        ready: called before anything is sent, when this rank has all that it needs for that.
    """

    def __init__(
        self, group: dist.ProcessGroup, numel: int, doing: str, ready: Callable[[], None] = lambda: None
    ) -> None:
        self._group = group
        self._ready = ready
        self._roll_call = RollCall(group, doing)
        self._rank, self.count = group.rank(), group.size()
        bounds = [numel * rank // self.count for rank in range(self.count + 1)]
        self._parts = [slice(begin, end) for begin, end in pairwise(bounds)]

    @property
    def own(self) -> slice:
        """The elements that this rank owns."""
        return self._parts[self._rank]

    def rows(self, flat: Tensor) -> Tensor:
        """Return new memory of shape ``(ranks, elements of this rank)`` for what others have of this rank's part."""
        numel = self.own.stop - self.own.start
        return flat.new_empty(self.count, -(-numel // _ALIGNED) * _ALIGNED)[:, :numel]

    def scatter(self, flats: Sequence[Tensor], rows: Sequence[Tensor]) -> Transfer:
        """Start to send each rank its part; row ``r`` gets what rank ``r`` has of this rank's."""
        for flat, of_ranks in zip(flats, rows, strict=True):
            of_ranks[self._rank].copy_(flat[self.own])
        return self._start(
            [
                (peer, flat[self._parts[peer]], of_ranks[peer])
                for peer in self._peers()
                for flat, of_ranks in zip(flats, rows, strict=True)
            ]
        )

    def gather(self, flats: Sequence[Tensor]) -> Transfer:
        """Start to send this rank's part to all others, in place; the other parts get what their owners have."""
        return self._start(
            [(peer, flat[self.own], flat[self._parts[peer]]) for peer in self._peers() for flat in flats]
        )

    def _peers(self) -> list[int]:
        """Return the other ranks, from the next one on, so that not all send to the same one at once."""
        return [(self._rank + step) % self.count for step in range(1, self.count)]

    def _start(self, pairs: list[tuple[int, Tensor, Tensor]]) -> Transfer:
        """Start to send and receive, as bytes, which every backend takes: (peer, what it gets, what comes from it)."""
        ops = [
            dist.P2POp(op, tensor.view(torch.uint8), group=self._group, tag=_TAG, group_peer=peer)
            for peer, *both in pairs
            for op, tensor in zip((dist.isend, dist.irecv), both, strict=True)
            if tensor.numel()
        ]
        peers = [op.group_peer for op in ops if op.tensor.device.type == "cpu"]
        self._ready()
        try:
            works = dist.batch_isend_irecv(ops) if ops else []
        except RuntimeError as error:
            raise self._roll_call.lost(error) from error
        return Transfer(works, peers, self._roll_call)


class Transfer:
    """Tensors on their way.

    Args:
        works: of messages.
        peers: whom each is with, by its number in the group; empty on a GPU.
        roll_call: of the group.
    """

    def __init__(self, works: list[dist.Work], peers: list[int], roll_call: RollCall) -> None:
        self._works, self._peers, self._roll_call = works, peers, roll_call

    def wait(self) -> None:
        """Wait until all have come; on a GPU, let the current stream wait.

        Raises:
            RanksError: a rank is gone, or has not come within the group's timeout.
        """
        if self._peers:
            self._roll_call.wait(zip(self._peers, self._works, strict=True))
        else:
            for work in self._works:
                work.wait()
