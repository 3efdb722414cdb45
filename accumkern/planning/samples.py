"""Batches of any size from a data set or a data loader, for setups that are derived from what others train with."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from accumkern.planning.protocol import SetupError
from accumkern.torch_private import is_fake, tree_leaves, without_fake_tensors

_BUFFER = 1024  # samples of a data set that can only be gone through
_LOOKED_AT = 512  # samples, for the longest one


class Samples:
    """Samples of a data set, drawn independently of each other, so that a batch can have any size.

    Each is drawn with equal chances, as often as it comes, where the loader shuffles or goes through the data set in
    its order; where it has another sampler, that sampler is gone through again and again. Of an iterable data set the
    first 1024 samples are kept, and drawn from. On several ranks each draws others.

    Tensors are real here, in a prediction too, up to the batch: collating looks at values.
    """

    def __init__(self, name: str, data: Any, seed: int) -> None:
        """Make ready.

        Args:
            name: of the data, for messages.
            data: a DataLoader, whose collate function and sampler are used, or a data set: what has a length and can be
                indexed, or iterated.
            seed: of what is drawn.

        Raises:
            SetupError: it is neither, it is empty, or the loader's data set makes the batches.
        """
        sampler, self._collate = None, default_collate
        if isinstance(data, DataLoader):
            if data.batch_sampler is None:
                raise SetupError(
                    f"the {name} has batch_size=None: its data set makes batches, of sizes of its own; give it a "
                    "batch_size and a data set of samples, or write a setup() with a make_batch(size)"
                )
            sampler, self._collate, data = data.sampler, data.collate_fn, data.dataset
        is_indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, Mapping))
        if not isinstance(data, Dataset) and not is_indexed:
            raise SetupError(f"the {name} is a {type(data).__name__}; it must be a DataLoader or a data set")
        self._data = data
        if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            with without_fake_tensors():
                self._data, sampler = list(itertools.islice(iter(data), _BUFFER)), None
        if len(self._data) == 0:
            raise SetupError(f"the {name} has no samples")
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._random = random.Random(f"{seed} {rank}")
        in_order = sampler is None or isinstance(sampler, (RandomSampler, SequentialSampler))
        self._indices = self._drawn() if in_order else self._of(sampler)
        self._longest: list[Any] = []

    def draw(self, size: int) -> Any:
        """Return a batch of samples, on the host."""
        with without_fake_tensors():
            return self._collate(self._fetch(list(itertools.islice(self._indices, size))))

    def longest(self, size: int) -> Any:
        """Return a batch of one sample again and again: the one with most elements of up to 512, on the host."""
        with without_fake_tensors():
            if not self._longest:
                count = len(self._data)
                looked_at = (self._fetch([i])[0] for i in range(0, count, -(-count // _LOOKED_AT)))
                self._longest = [max(looked_at, key=_elements)]
            return self._collate([copy.copy(self._longest[0]) for _ in range(size)])  # collating may write into them

    def _drawn(self) -> Iterator[int]:
        while True:
            yield self._random.randrange(len(self._data))

    def _of(self, sampler: Any) -> Iterator[Any]:
        while True:
            index = None
            for index in sampler:
                yield index
            if index is None:
                raise ValueError(f"the sampler, a {type(sampler).__name__}, is empty")

    def _fetch(self, indices: list[Any]) -> list[Any]:
        many = getattr(self._data, "__getitems__", None)  # as torch's DataLoader does
        return [copy.copy(sample) for sample in (many(indices) if many else map(self._data.__getitem__, indices))]


def moved(batch: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch with its tensors moved; mappings of any kind become dicts, in which a plan finds tensors."""
    if isinstance(batch, Tensor):
        return move(batch)
    if isinstance(batch, Mapping):
        return {key: moved(value, move) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, move) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, move) for value in batch)
    return batch


def is_faking() -> bool:
    """Return whether tensors that are made here and now are fake, as in a prediction."""
    found: bool = is_fake(torch.empty(0))
    return found


def _elements(sample: Any) -> int:
    """Return how many elements a sample has, in tensors, arrays, lists and text."""
    total = 0
    for leaf in tree_leaves(dict(sample) if isinstance(sample, Mapping) else sample):
        if isinstance(leaf, Tensor):
            total += leaf.numel()
        elif isinstance(leaf, str):
            total += len(leaf)
        else:
            size = getattr(leaf, "size", 1)  # of numpy's arrays
            total += size if isinstance(size, int) else 1
    return total
