"""Batches of all kinds, taken apart along their samples."""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import enum
import functools
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from accumkern.splitting import bounds, part_of, samples_of

X = torch.arange(12.0).reshape(4, 3)
Y = torch.arange(4)


class Pair(NamedTuple):
    x: Tensor
    y: Any


@dataclasses.dataclass
class Sample:
    x: Tensor
    name: str
    score: float = dataclasses.field(default=0.0, init=False)


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    names: list[str]


class Mode(enum.Enum):
    TRAIN = 1


def taken(batch: Any, start: int, stop: int) -> Any:
    assert samples_of(batch, None) == 4
    return part_of(batch, start, stop, None)


def test_tensors_are_views() -> None:
    part = taken(X, 1, 3)
    assert torch.equal(part, X[1:3])
    assert part.untyped_storage().data_ptr() == X.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", [list, tuple])
def test_sequences_of_tensors(kind: Any) -> None:
    part = taken(kind([X, Y]), 1, 4)
    assert type(part) is kind
    assert torch.equal(part[0], X[1:4])
    assert torch.equal(part[1], Y[1:4])


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, collections.UserDict])
def test_dictionaries(kind: Any) -> None:
    batch = kind({"x": X, "inside": {"y": Y}, "names": list("abcd"), "temperature": 0.5, "mode": Mode.TRAIN})
    part = taken(batch, 2, 4)
    assert type(part) is kind
    assert list(part) == list(batch)
    assert torch.equal(part["x"], X[2:])
    assert torch.equal(part["inside"]["y"], Y[2:])
    assert part["names"] == ["c", "d"]
    assert (part["temperature"], part["mode"]) == (0.5, Mode.TRAIN)
    assert len(batch["x"]) == 4  # the batch itself is as it was


def test_a_dictionary_keeps_what_its_class_gives_it() -> None:
    batch = collections.defaultdict(list, x=X)
    part = taken(batch, 0, 2)
    assert part["not there"] == []
    assert torch.equal(part["x"], X[:2])


def test_named_tuples_and_dataclasses() -> None:
    pair = taken(Pair(X, Sample(X + 1, "all")), 0, 1)
    assert isinstance(pair, Pair)
    assert torch.equal(pair.x, X[:1])
    assert torch.equal(pair.y.x, X[:1] + 1)
    assert (pair.y.name, pair.y.score) == ("all", 0.0)
    frozen = taken(Frozen(X, list("abcd")), 3, 4)
    assert isinstance(frozen, Frozen)
    assert torch.equal(frozen.x, X[3:])
    assert frozen.names == ["d"]


def test_what_is_of_all_samples_is_given_to_each_part() -> None:
    batch = (X, torch.tensor(2.0), "text", None, 3, 1.5, True, Mode.TRAIN, torch.bfloat16, (224, 224), (), [], X.shape)
    part = taken(batch, 0, 2)
    assert torch.equal(part[0], X[:2])
    assert part[1] is batch[1]
    assert part[2:] == batch[2:]


def test_arrays_and_captions() -> None:
    array = np.arange(8).reshape(4, 2)
    part = taken({"x": X, "array": array, "zero": np.float32(2), "captions": ("a", "b", None, "d")}, 1, 3)
    assert (part["array"] == array[1:3]).all()
    assert part["zero"] == 2
    assert part["captions"] == ("b", None)


def test_what_transformers_makes() -> None:
    pytest.importorskip("transformers")
    from transformers import BatchEncoding
    from transformers.modeling_outputs import BaseModelOutput

    part = taken(BatchEncoding({"input_ids": X, "labels": Y}), 0, 3)
    assert isinstance(part, BatchEncoding)
    assert torch.equal(part.input_ids, X[:3])
    assert torch.equal(part["labels"], Y[:3])
    output = taken(BaseModelOutput(last_hidden_state=X, hidden_states=(X, X)), 1, 2)
    assert isinstance(output, BaseModelOutput)
    assert torch.equal(output.last_hidden_state, X[1:2])
    assert torch.equal(output["hidden_states"][1], X[1:2])


def test_texts_alone() -> None:
    assert taken(["one", "two", "three", "four"], 1, 3) == ["two", "three"]
    assert taken({"texts": list("abcd")}, 1, 3) == {"texts": ["b", "c"]}


def test_a_way_of_ones_own() -> None:
    batch = [{"image": torch.zeros(3, 2 + i, 2)} for i in range(4)]
    split = lambda batch, start, stop: batch[start:stop]  # noqa: E731
    assert samples_of(batch, split) == 4
    assert part_of(batch, 1, 3, split) == batch[1:3]


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((X, Y[:3]), ValueError, r"batch\[1\] is of shape \(3,\), and batch\[0\] has 4 samples in its first dimension"),
        ({"a": {"x": X}, "b": X.T}, ValueError, r"batch\['b'\] is of shape \(3, 4\), and batch\['a'\]\['x'\] has 4"),
        ((X, ["a"]), ValueError, r"batch\[1\] is a list of 1, and batch\[0\] has 4 samples"),
        (Pair(X, Y[:2]), ValueError, r"batch\.y is of shape \(2,\), and batch\.x has 4 samples"),
        ((X, object()), TypeError, r"batch\[1\] is a object, which cannot be taken apart; give it to loss_fn"),
        ((X, X.to_sparse()), TypeError, r"batch\[1\] is a sparse_coo tensor, which cannot be taken apart"),
        (torch.nested.nested_tensor([X, X], layout=torch.jagged), TypeError, r"batch is a nested tensor"),
        (pack_sequence([Y, Y]), TypeError, "batch is a PackedSequence, whose samples lie one inside the other"),
        (torch.tensor(1.0), TypeError, "batch is a Tensor without a tensor of samples in it"),
        ((224, 224), TypeError, "batch is a tuple without a tensor of samples in it"),
        (5, TypeError, "batch is a int without a tensor of samples in it; .*split=lambda batch, start, stop"),
    ],
)
def test_what_cannot_be_taken_apart_is_named(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        samples_of(batch, None)


@pytest.mark.parametrize("samples", range(1, 12))
def test_parts_are_as_equal_as_can_be(samples: int) -> None:
    for parts in range(1, samples + 1):
        found = bounds(samples, parts)
        sizes = [stop - start for start, stop in found]
        assert found[0][0] == 0
        assert found[-1][1] == samples
        assert all(stop == start for (_, stop), (start, _) in pairwise(found))
        assert sizes == sorted(sizes, reverse=True)
        assert 0 < sizes[-1] >= sizes[0] - 1


class Mine(collections.abc.MutableMapping):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.inside = {"x": X}

    def __getitem__(self, key: str) -> Any:
        return self.inside[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.inside[key] = value

    def __delitem__(self, key: str) -> None:
        del self.inside[key]

    def __iter__(self) -> Any:
        return iter(self.inside)

    def __len__(self) -> int:
        return len(self.inside)


@dataclasses.dataclass
class Measured:
    x: Tensor

    def __post_init__(self) -> None:
        self.samples = len(self.x)

    @functools.cached_property
    def total(self) -> float:
        return float(self.x.sum())


def test_what_is_computed_of_a_batch_is_computed_anew_of_a_part() -> None:
    batch = Measured(X)
    assert batch.total == 66
    part = taken(batch, 0, 1)
    assert (part.total, part.samples) == (3, 1)


def test_what_could_be_of_all_samples_or_of_each_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch\[1\] is a tuple of 4 numbers, as many as there are samples"):
        samples_of((X, (0, 1, 0, 1)), None)
    with pytest.raises(ValueError, match=r"batch\[1\] is a tuple of 4 numbers"):
        samples_of((X, tuple(Y)), None)
    assert taken((X, list(Y)), 1, 3)[1] == [1, 2]
    assert taken((X, [0.5, 1, 2, 3]), 1, 3)[1] == [1, 2]


def test_a_mapping_that_cannot_be_copied_is_refused() -> None:
    with pytest.raises(TypeError, match="batch is a Mine, a mapping that cannot be copied; give it to loss_fn"):
        samples_of(Mine(), None)
    with pytest.raises(TypeError, match=r"batch is a generator without len\(\)"):
        samples_of((x for x in X), lambda batch, start, stop: batch)
