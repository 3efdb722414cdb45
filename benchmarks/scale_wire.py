"""What a mean over ranks sends, and a model of the time: latency and bandwidth of two kinds of link, and nothing else.

Ranks are in nodes of :data:`scale_means.NODE`. Every GPU has a link within the node and a network card of its own. A
message costs its link's latency, one after another, and every byte its time; within a phase both kinds of link carry
bytes at the same time, and phases follow one another. Not modelled: contention and topology of the network, sums that
switches take (NVLink SHARP, InfiniBand SHARP), several messages in flight, the filling of a pipeline, the work on the
GPUs, and overlap with the backward pass.

A ring's hops wait for one another. Messages to all ranks do not, and a network card has many of them in flight: there
the latency is an upper bound. A tree's and a ring's pieces are pipelined in chunks, which are not counted as messages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log2

from scale_means import NODE

BYTES = {"bf16": 2, "split24": 3, "FP32": 4}


@dataclass(frozen=True)
class Links:
    """Latency and bandwidth, in one direction, of a GPU's two links.

    Attributes:
        node_us, network_us: of a message.
        node_gb_per_s, network_gb_per_s: 1e9 bytes per second.
    """

    node_us: float
    node_gb_per_s: float
    network_us: float
    network_gb_per_s: float


@dataclass(frozen=True)
class Phase:
    """One phase of a collective. Messages and bytes are what a rank sends, in the mean over ranks.

    Attributes:
        messages: to ranks of its node and of others.
        node_hops, network_hops: messages that are paid for one after another.
        node_bytes, network_bytes: for an element of the gradient.
    """

    messages: float
    node_hops: float
    network_hops: float
    node_bytes: float
    network_bytes: float

    def transfer_ns(self, links: Links) -> float:
        """Return the time of the bytes of an element."""
        return max(self.node_bytes / links.node_gb_per_s, self.network_bytes / links.network_gb_per_s)

    def latency_us(self, links: Links) -> float:
        """Return the time of the messages."""
        return self.node_hops * links.node_us + self.network_hops * links.network_us


def ring(ranks: int, width: int) -> list[Phase]:
    """Reduce-scatter and gather: ranks - 1 hops each; a ring leaves each node once, and rings share the cards."""
    hops, size = ranks - 1, width * (ranks - 1) / ranks
    outside = 1 / NODE if ranks > NODE else 0.0
    return 2 * [Phase(hops, hops * (1 - outside), hops * outside, size * (1 - outside), size * outside)]


def tree(ranks: int, width: int) -> list[Phase]:
    """Up and down NCCL's two trees, each of which has one half of the gradient; a node is a chain."""
    nodes, gpus = _nodes(ranks)
    network_bytes = width * (nodes - 1) / ranks
    up = Phase(2 * (ranks - 1) / ranks, gpus - 1, log2(nodes), width * (ranks - nodes) / ranks, network_bytes)
    return [up, up]


def all_to_all(ranks: int, width: int) -> list[Phase]:
    """Pieces to their owners, and means from them: a message to each other rank, each time."""
    _, gpus = _nodes(ranks)
    piece = width / ranks
    return 2 * [Phase(ranks - 1, gpus - 1, ranks - gpus, piece * (gpus - 1), piece * (ranks - gpus))]


def two_levels(ranks: int, width: int) -> list[Phase]:
    """Do that within nodes, and between them only among ranks that own the same piece."""
    nodes, gpus = _nodes(ranks)
    inside = Phase(gpus - 1, gpus - 1, 0, width / gpus * (gpus - 1), 0)
    outside = Phase(nodes - 1, 0, nodes - 1, 0, width / ranks * (nodes - 1))
    return [inside, *([outside, outside] if nodes > 1 else []), inside]


#: Way to exchange -> its phases, of a number of ranks and the bytes of an element.
COLLECTIVES: dict[str, Callable[[int, int], list[Phase]]] = {
    "ring": ring,
    "tree": tree,
    "all-to-all": all_to_all,
    "two levels": two_levels,
}


def phases(way: str, ranks: int) -> list[Phase]:
    """Return the phases of a way in :data:`scale_means.MEANS`."""
    width, _, collective = way.partition(" ")
    return COLLECTIVES[collective](ranks, BYTES[width])


def wire(way: str, ranks: int, links: Links, numels: list[int]) -> dict[str, object]:
    """Return what a way sends, and the modelled milliseconds of gradients of ``numels`` elements, for the file."""
    of_way = phases(way, ranks)
    latency_us = sum(phase.latency_us(links) for phase in of_way)
    transfer_ns = sum(phase.transfer_ns(links) for phase in of_way)
    of_card = sum(phase.network_bytes for phase in of_way)
    return {
        "bytes_per_element": sum(phase.node_bytes for phase in of_way) + of_card,
        "messages": sum(phase.messages for phase in of_way),
        "card_bytes_per_element": of_card,
        "node_bytes_per_element": of_card * NODE,
        "latency_ms": latency_us / 1e3,
        "modelled_ms": {str(numel): latency_us / 1e3 + transfer_ns * numel / 1e6 for numel in numels},
    }


def _nodes(ranks: int) -> tuple[int, int]:
    """Return the number of nodes, and of GPUs in each."""
    gpus = min(NODE, ranks)
    return ranks // gpus, gpus
