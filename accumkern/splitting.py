"""A batch as people have it, taken apart along its samples: the first dimension of its tensors.

A batch is a tensor, or tensors in tuples, lists, dictionaries (``BatchEncoding`` and ``ModelOutput`` too), named tuples
and dataclasses, however nested. Beside them may lie lists with an entry for each sample, such as captions, and what is
of all samples: numbers, text, 0-dim tensors, None. Parts are of the same kinds, and their tensors are views.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import sys
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from accumkern.torch_private import tree_leaves

#: Takes a batch, and returns its samples from the first number up to, without, the second.
Split = Callable[[Any, int, int], Any]

_OF_ALL_SAMPLES = (str, bytes, int, float, complex, type(None), enum.Enum, torch.dtype, torch.device, torch.layout)
_ADVICE = (
    "give it to loss_fn in another way, or say how to take a batch apart with split=lambda batch, start, stop: ..."
)


def samples_of(batch: Any, split: Split | None) -> int:
    """Return the number of samples in a batch: the first dimension of its tensors; ``len(batch)`` with ``split``.

    Raises:
        TypeError: there is no tensor in it, or something that cannot be taken apart.
        ValueError: tensors differ in their first dimension, or a list has another number of entries.
    """
    if split is not None:
        if not hasattr(batch, "__len__"):
            raise TypeError(f"batch is a {type(batch).__name__} without len(), which says how many samples split takes")
        return len(batch)
    nodes = list(_nodes(batch, "batch"))
    leaves = [(path, leaf) for path, leaf, is_split in nodes if is_split]
    if not leaves:
        raise TypeError(f"batch is a {type(batch).__name__} without a tensor of samples in it; {_ADVICE}")
    tensors = [entry for entry in leaves if not isinstance(entry[1], (list, tuple))]
    first, decides = (tensors or leaves)[0]
    samples = len(decides)
    for path, leaf in leaves:
        if len(leaf) != samples:
            what = f"a {type(leaf).__name__} of {len(leaf)}" if isinstance(leaf, (list, tuple)) else _shape(leaf)
            raise ValueError(
                f"{path} is {what}, and {first} has {samples} samples in its first dimension; all must have as many: "
                f"{_ADVICE}"
            )
    for path, leaf, is_split in nodes:
        if not is_split and type(leaf) is tuple and len(leaf) == samples > 1:
            raise ValueError(
                f"{path} is a tuple of {samples} numbers, as many as there are samples; make it a tensor or a list if "
                f"they are of the samples, or, if they are of all, {_ADVICE}"
            )
    return samples


def tensors_of(batch: Any, split: Split | None) -> dict[str, Tensor]:
    """Return the tensors in a batch that parts are cut from, by where they lie."""
    if split is None:
        return {path: leaf for path, leaf, is_split in _nodes(batch, "batch") if is_split and isinstance(leaf, Tensor)}
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return {f"tensor {number} of batch": tensor for number, tensor in enumerate(tensors)}


def part_of(batch: Any, start: int, stop: int, split: Split | None) -> Any:
    """Return the samples ``start`` to ``stop``, without the last, of a batch that :func:`samples_of` has looked at."""
    if split is not None:
        return split(batch, start, stop)
    return _mapped(batch, lambda leaf: leaf[start:stop])


def bounds(samples: int, parts: int) -> list[tuple[int, int]]:
    """Return where as many parts begin and end; they are as equal as can be, and the first are the larger ones."""
    size, larger = divmod(samples, parts)
    starts = [i * size + min(i, larger) for i in range(parts + 1)]
    return list(pairwise(starts))


def _nodes(tree: Any, path: str) -> Iterator[tuple[str, Any, bool]]:
    """Return where each leaf of a batch lies, the leaf, and whether it has an entry for each sample.

    Raises:
        TypeError: something cannot be taken apart.
    """
    kind = _kind(tree, path)
    if kind is _LEAF or kind is _WHOLE:
        yield path, tree, kind is _LEAF
        return
    for name, child in kind.items():
        yield from _nodes(child, path + name)


def _mapped(tree: Any, take: Callable[[Any], Any]) -> Any:
    kind = _kind(tree, "batch")
    if kind is _WHOLE:
        return tree
    if kind is _LEAF:
        return take(tree)
    children = [_mapped(child, take) for child in kind.values()]
    if isinstance(tree, Mapping):
        items = dict(zip(tree, children, strict=True))
        if type(tree) is dict or not isinstance(tree, (dict, UserDict)):
            return items
        found: Any = copy.copy(tree)  # with what else it has
        for key, child in items.items():
            found[key] = child
        return found
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*children)
    if isinstance(tree, (list, tuple)):
        return type(tree)(children)
    fields = dataclasses.fields(tree)
    if all(field.init for field in fields):  # then what it has beside its fields is made anew
        return dataclasses.replace(tree, **{f.name: child for f, child in zip(fields, children, strict=True)})
    found = copy.copy(tree)
    for field, child in zip(fields, children, strict=True):
        object.__setattr__(found, field.name, child)  # it may be frozen
    return found


_LEAF: Any = object()
_WHOLE: Any = object()


def _kind(tree: Any, path: str) -> Any:
    """Return the children of a container by their names in Python, or whether it is taken apart or left whole."""
    if isinstance(tree, Tensor):
        if tree.layout is not torch.strided or tree.is_nested:
            kind = "nested" if tree.is_nested else str(tree.layout).removeprefix("torch.")
            raise TypeError(f"{path} is a {kind} tensor, which cannot be taken apart; {_ADVICE}")
        return _WHOLE if tree.dim() == 0 else _LEAF
    if isinstance(tree, PackedSequence):
        raise TypeError(f"{path} is a PackedSequence, whose samples lie one inside the other; {_ADVICE}")
    if isinstance(tree, MutableMapping) and not isinstance(tree, (dict, UserDict)):
        raise TypeError(f"{path} is a {type(tree).__name__}, a mapping that cannot be copied; {_ADVICE}")
    if isinstance(tree, Mapping):
        return {f"[{key!r}]": child for key, child in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {f".{name}": child for name, child in zip(tree._fields, tree, strict=True)}
    if isinstance(tree, (list, tuple)):
        if not tree or (isinstance(tree, tuple) and all(map(_is_number, tree))):
            return _WHOLE  # a size, or a range
        if all(isinstance(entry, _OF_ALL_SAMPLES) or _is_number(entry) for entry in tree):
            return _LEAF
        return {f"[{i}]": child for i, child in enumerate(tree)}
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {f".{field.name}": getattr(tree, field.name) for field in dataclasses.fields(tree)}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(tree, (numpy.ndarray, numpy.generic)):
        return _LEAF if tree.ndim else _WHOLE
    if isinstance(tree, _OF_ALL_SAMPLES):
        return _WHOLE
    raise TypeError(f"{path} is a {type(tree).__name__}, which cannot be taken apart; {_ADVICE}")


def _is_number(entry: Any) -> bool:
    return isinstance(entry, (int, float)) or (isinstance(entry, Tensor) and entry.dim() == 0)


def _shape(leaf: Any) -> str:
    return f"of shape {tuple(leaf.shape)}"
