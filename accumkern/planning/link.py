"""What the exchange of gradients and weights between ranks takes, and how few exchanges accumulation leaves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from accumkern.dtensor import is_dtensor
from accumkern.out_of_memory import format_bytes
from accumkern.planning.protocol import Setup
from accumkern.planning.speed import Speed, Split, plain
from accumkern.planning.trial import now
from accumkern.ranks import Ranks

#: Of a window's compute time: an exchange that takes less is small enough. The same 10% within which a plan calls
#: effective batches useful, so that neither is driven further than the other can be told.
ENOUGH = 0.1
BUCKET_BYTES = 25 * 2**20  # of gradients, that DistributedDataParallel reduces at a time
FSDP_ONCE = "FSDP2 once in FP32"
_ROUNDS = 5
_SHOWN = (1, 4, 16)  # micro-batches per window, beside the plan's


@dataclass(frozen=True)
class Link:
    """How fast ranks exchange.

    Attributes:
        gb_per_s: 10^9 bytes that each rank sends per second, while it receives as many: the bus bandwidth,
            ``2 (n - 1) / n`` times the algorithm's for an all-reduce on ``n`` ranks.
        algorithm_gb_per_s: bytes of the tensor that was all-reduced over the time it took; None where nothing was
            measured.
        measured_bytes: of that tensor; None where nothing was measured.
    """

    gb_per_s: float
    algorithm_gb_per_s: float | None = None
    measured_bytes: int | None = None

    def seconds(self, sent_bytes: float) -> float:
        """Return the time in which a rank sends so much."""
        return sent_bytes / (self.gb_per_s * 1e9)


@dataclass(frozen=True)
class Payload:
    """What the ranks of a model have to exchange, in bytes.

    Attributes:
        gradients: of all parameters that are trained, in their own dtypes.
        precise: of their sums as ``reduce_in_fp32`` sends them: 3 bytes for each element in split24, 4 otherwise. None
            where stock PyTorch sums in FP32 already.
        fp32: of the same gradients in FP32.
        weights: of all parameters, frozen ones too, in their own dtypes.
        layer: the part of ``weights`` that is the largest of the model's layers, 1 where it has no list of them.
    """

    gradients: int
    precise: int | None
    fp32: int
    weights: int
    layer: float


@dataclass(frozen=True)
class Way:
    """A way to exchange, in bytes that a rank sends.

    Attributes:
        name: in words.
        each: in each micro-batch.
        once: in the last micro-batch of a window, beside those.
        each_open: of ``each``, what no computation can hide: what comes first or last.
        once_open: of ``once``, likewise.
    """

    name: str
    each: float
    once: float
    each_open: float
    once_open: float


@dataclass(frozen=True)
class Window:
    """What the exchange takes in a window.

    Attributes:
        way: its name.
        micro_batches: between two steps of the optimizer.
        sent_bytes: by a rank, which receives as many.
        low_ms: with as much of it hidden behind computation as can be.
        high_ms: with nothing hidden.
        low_share: the former over the time that the window computes; None where that was not measured.
        high_share: the latter, likewise.
    """

    way: str
    micro_batches: int
    sent_bytes: int
    low_ms: float
    high_ms: float
    low_share: float | None
    high_share: float | None


@dataclass(frozen=True)
class Exchange:
    """What ranks exchange, by ways and micro-batches per window.

    Attributes:
        ranks: that exchange.
        micro_batch: samples in a micro-batch.
        link: between them.
        windows: in the order of a table.
        enough: by the name of a way, the fewest micro-batches per window with which all of the exchange, nothing
            hidden, takes no more than 10% of the time that the window computes; None where no number is enough. Empty
            where that time was not measured.
    """

    ranks: int
    micro_batch: int
    link: Link
    windows: tuple[Window, ...]
    enough: dict[str, int | None]


def payload_of(model: nn.Module, buffer: str | None) -> Payload:
    """Return what ranks exchange of a model whose gradients are summed in ``buffer``.

    Layers are what stands in its lists (``ModuleList`` and ``Sequential``), as fully_shard takes them.
    """
    params = list(model.parameters())
    trained = [param for param in params if param.requires_grad]
    fp32 = sum(4 * param.numel() for param in trained)
    short = sum(param.numel() for param in trained if param.dtype is torch.bfloat16 and buffer == "split24")
    weights = _bytes_of(model)
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    largest = max((_bytes_of(layer) for of in lists for layer in of), default=weights)
    return Payload(
        gradients=sum(param.numel() * param.element_size() for param in trained),
        precise=None if buffer is None else fp32 - short,
        fp32=fp32,
        weights=weights,
        layer=largest / weights if weights else 1.0,
    )


def _bytes_of(module: nn.Module) -> int:
    return sum(param.numel() * param.element_size() for param in module.parameters())


def ways_of(payload: Payload, ranks: int) -> list[Way]:
    """Return the ways to exchange, with the bytes that each of ``n`` ranks sends.

    An all-gather or a reduce-scatter of P bytes sends ``(n - 1) / n * P``, and an all-reduce both. DDP reduces all
    gradients. ``fully_shard`` gathers the weights in the forward pass and, with ``reshard_after_forward``, in the
    backward pass again; it scatters the gradients in each micro-batch in their own dtype, or once per window
    (``set_requires_gradient_sync(False)``) in FP32. What cannot be hidden is a bucket of 25 MiB with DDP, and the
    largest layer's gathering and scattering with ``fully_shard``.
    """
    part = (ranks - 1) / ranks
    gather, scatter = part * payload.weights, part * payload.gradients
    bucket = min(1.0, BUCKET_BYTES / payload.gradients)
    reduce = 2 * scatter
    ways = [
        Way("DDP in each micro-batch", reduce, 0.0, bucket * reduce, 0.0),
        Way("DDP once (no_sync)", 0.0, reduce, 0.0, bucket * reduce),
    ]
    if payload.precise is not None:
        precise = 2 * part * payload.precise
        ways.append(Way("DDP once with reduce_in_fp32", 0.0, precise, 0.0, bucket * precise))
    layer, fp32 = payload.layer, part * payload.fp32
    ways += [
        Way("FSDP2 in each micro-batch", 2 * gather + scatter, 0.0, layer * (gather + scatter), 0.0),
        Way(FSDP_ONCE, 2 * gather, fp32, layer * gather, layer * fp32),
    ]
    return ways


def exchange_of(payload: Payload, link: Link, split: Split, speed: Speed | None = None) -> Exchange:
    """Return what the ranks of a split exchange over a link.

    Args:
        payload: what they have to exchange, which is something.
        link: between the ranks.
        split: how they share a batch.
        speed: of its micro-batch; None where that was not measured.
    """
    ways = ways_of(payload, split.ranks)
    counts = sorted({*_SHOWN, split.accumulation_steps})
    windows = tuple(_window(way, count, link, speed) for way in ways for count in counts)
    enough = {} if speed is None else {way.name: fewest(way, link, speed) for way in ways}
    return Exchange(split.ranks, split.micro_batch, link, windows, enough)


def exchange_of_model(
    model: nn.Module, buffer: str | None, link: Link, split: Split, speeds: Sequence[Speed]
) -> Exchange | None:
    """Return what the ranks of a split exchange of a model; None where there is one rank, or nothing to exchange.

    Where parameters are DTensors, ``speeds`` have the time of the model's own collectives in them and are not used.
    """
    payload = payload_of(model, buffer)
    if split.ranks == 1 or not payload.gradients:
        return None
    is_alone = not any(is_dtensor(param) for param in model.parameters())
    speed = next((speed for speed in speeds if is_alone and speed.micro_batch == split.micro_batch), None)
    return exchange_of(payload, link, split, speed)


def _window(way: Way, count: int, link: Link, speed: Speed | None) -> Window:
    hides = math.inf if speed is None else speed.seconds  # of a micro-batch, for what is sent in it

    def least(sent: float, is_open: float) -> float:
        return max(link.seconds(is_open), link.seconds(sent) - hides)

    low = (count - 1) * least(way.each, way.each_open) + least(way.each + way.once, way.each_open + way.once_open)
    sent = count * way.each + way.once
    high = link.seconds(sent)
    computed = None if speed is None else speed.window_seconds(count)
    shares = (None, None) if computed is None else (low / computed, high / computed)
    return Window(way.name, count, round(sent), 1e3 * low, 1e3 * high, *shares)


def fewest(way: Way, link: Link, speed: Speed) -> int | None:
    """Return the fewest micro-batches per window with which the exchange is small enough, nothing hidden; None: none.

    The least whole ``k >= 1`` with ``k * each + once <= 10% of (k * seconds + step_seconds)``.
    """
    gained = ENOUGH * speed.seconds - link.seconds(way.each)
    missing = link.seconds(way.once) - ENOUGH * speed.step_seconds
    if missing <= gained:
        return 1
    return math.ceil(missing / gained) if gained > 0 else None


def measure_link(setup: Setup, ranks: Ranks) -> Link:
    """Time an all-reduce of a bucket of gradients, or of all of them if they are less, over all ranks.

    The median of a few after one to warm up, the slowest rank's.
    """
    trained = [param for param in setup.model.parameters() if param.requires_grad]
    total = sum(param.numel() * param.element_size() for param in trained)
    dtype = max(trained, key=lambda param: param.numel()).dtype
    bucket = torch.zeros(min(total, BUCKET_BYTES) // dtype.itemsize, dtype=dtype, device=setup.device)
    times = []
    for _ in range(1 + _ROUNDS):
        ranks.meet()
        begin = now(setup)
        dist.all_reduce(bucket)
        times.append(now(setup) - begin)
    seconds = max(ranks.gathered(statistics.median(times[1:])))
    algorithm = bucket.nbytes / seconds / 1e9
    return Link(algorithm * 2 * (ranks.count - 1) / ranks.count, algorithm, bucket.nbytes)


def link_reasons(exchange: Exchange) -> Iterator[str]:
    """Say in words how fast the link is, how to read the times, and how much accumulation makes the exchange small."""
    link, ranks = exchange.link, exchange.ranks
    speed = f"{plain(link.gb_per_s)} GB/s for each rank and direction"
    if link.measured_bytes is not None and link.algorithm_gb_per_s is not None:
        speed += (
            f", the bus bandwidth of an all-reduce of {format_bytes(link.measured_bytes)} on {ranks} ranks (of the "
            f"algorithm {plain(link.algorithm_gb_per_s)} GB/s)"
        )
    yield (
        f"Link between ranks: {speed}. An exchange takes from as little as computation can leave of it (all hidden but "
        "a bucket of DDP or a layer of FSDP2, and what takes longer than the micro-batch beside it) to all of it, "
        "nothing hidden."
    )
    if not exchange.enough:
        yield (
            "Exchange and accumulation: how much of a window the exchange takes is known where a plan runs on the "
            "device, with a model that exchanges nothing by itself."
        )
        return
    batch = exchange.ranks * exchange.micro_batch
    few = [
        f"{way}: {count} (an effective batch of {count * batch:,})"
        for way, count in exchange.enough.items()
        if count is not None
    ]
    never = [way for way, count in exchange.enough.items() if count is None]
    yield (
        f"Exchange and accumulation: the fewest micro-batches of {exchange.micro_batch} per window with which all of "
        f"the exchange, nothing hidden, takes no more than {ENOUGH:.0%} of the time that the window computes. "
        + "; ".join(few + ([f"no number is enough for {' and '.join(never)}"] if never else []))
        + "."
    )
    if exchange.enough[FSDP_ONCE] is None:
        yield (
            "Accumulation and FSDP2: it gathers the weights twice in each micro-batch, so more of them per window do "
            "not help the link. A larger micro-batch does, or weights that stay gathered for a window "
            "(reshard_after_forward=False and set_reshard_after_backward(False)), all of them on each rank."
        )


def exchange_rows(exchange: dict[str, Any]) -> list[dict[str, str]]:
    """Return rows of a table, by columns, from what ``dataclasses.asdict`` gives of an :class:`Exchange`."""
    rows: list[dict[str, str]] = []
    named = None
    for window in exchange["windows"]:
        low, high = window["low_share"], window["high_share"]
        rows.append(
            {
                "way": window["way"] if window["way"] != named else "",
                "micro-batches": f"{window['micro_batches']:,}",
                "sent by a rank": format_bytes(window["sent_bytes"]),
                "ms": _range(plain(window["low_ms"]), plain(window["high_ms"])),
                "of the compute time": "not measured" if low is None else _range(_percent(low), _percent(high)),
            }
        )
        named = window["way"]
    return rows


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _percent(share: float) -> str:
    if share >= 0.1:
        return f"{100 * share:.0f}%"
    return f"{100 * share:.1f}%" if share >= 0.0005 else "< 0.1%"
