"""A window under fully_shard (FSDP2): every collective of a pass is one that all ranks have agreed to run.

A forward or backward pass of ``fully_shard`` gathers weights and reduces gradients, again and again. Were a rank to run
out of memory between two of these collectives, the others would wait in the next one for ever. So before each, all
ranks meet: a short message on the CPUs. A rank that has run out of memory comes to the same meeting with that news
instead of the collective, and all leave their passes there, with an error, and begin the window again in more parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from accumkern.fully_shard_private import (
    dtypes_of_sums,
    forget_failed_pass,
    has_whole_gradients,
    is_reduced,
    sharded_groups,
    wrap_collectives,
)
from accumkern.out_of_memory import is_out_of_memory
from accumkern.rank_window import Name, RankWindow
from accumkern.ranks import OutOfMemoryElsewhereError, Ranks, RanksError
from accumkern.whole_gradients import keeps_split_sums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.fsdp import FSDPModule


class FsdpWindow(RankWindow):
    """The window of a rank under fully_shard, which runs as many parts as every other.

    Args:
        modules: those under fully_shard, roots first.
        group: a gloo group of its ranks for their agreements.
        reduce_once: reduce gradients in the last part only. Until then each rank keeps whole gradients: as split sums
            after ``acc.reduce_in_fp32(model)``, otherwise in the dtype that they are reduced in, which must be float32,
            since ``fully_shard`` adds them up. Without it each part's gradients are reduced, and their shards folded in
            FP32.

    Raises:
        ValueError: on entering, gradients are not to be reduced, or some were not, or not in FP32 and ``reduce_once``.
    """

    skips_parts = False

    def __init__(self, modules: list[FSDPModule], group: ProcessGroup, reduce_once: bool) -> None:
        self._agreement = Ranks(group, "in acc.backward()")
        self._meeting = Meeting(self._agreement)
        self._modules = modules
        self._reduce_once = reduce_once
        self._stack = ExitStack()

    def whole(self, counts: Mapping[Name, float]) -> dict[Name, float]:
        """Return the counts of all ranks, divided by their number."""
        return self._agreement.means(counts)

    def agreed_parts(self, parts: int, samples: int) -> int:
        """Return the most parts that a rank needs.

        Raises:
            ValueError: that is more than a rank has samples.
        """
        of_ranks = self._agreement.gathered((parts, samples))
        most, available = max(parts for parts, _ in of_ranks), [samples for _, samples in of_ranks]
        if most > min(available):
            raise ValueError(
                f"the ranks have {available} samples, and one of them needs {most} parts; with fully_shard all run "
                "equally many parts, of at least one sample: give them equally many samples"
            )
        return most

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Return a block around all passes of a window.

        Raises:
            OutOfMemoryElsewhereError: memory has run out on another rank.
        """
        self._meeting.news = None
        try:
            yield
            self._meeting()
        except BaseException as error:
            is_known = self._meeting.news is not None or isinstance(error, (OutOfMemoryElsewhereError, RanksError))
            if is_out_of_memory(error) and not is_known:
                self._agreement.meet_out_of_memory(error)
            for module in self._modules:
                forget_failed_pass(module)
            raise

    @contextmanager
    def part(self, is_last: bool) -> Iterator[None]:
        """Return a block around forward and backward pass of a part."""
        if self._reduce_once:
            self._reduce_in_backward(is_last)
        yield

    def __enter__(self) -> RankWindow:
        with ExitStack() as stack:
            stack.enter_context(self._agreement)
            groups = sharded_groups(self._modules)
            if not all(map(is_reduced, groups)):
                raise ValueError(
                    "set_requires_gradient_sync(False) or set_requires_all_reduce(False) is set, and acc.backward() "
                    "and acc.mean_over_ranks() need every pass to reduce; set it to True before"
                )
            if any(map(has_whole_gradients, groups)):
                raise ValueError(
                    "fully_shard keeps gradients of earlier passes that were not reduced, which acc.backward() could "
                    "not put back where memory runs out, and acc.mean_over_ranks() does not reach; run a backward pass "
                    "before that reduces them"
                )
            added_in = [dtypes_of_sums(group) for group in groups if not keeps_split_sums(group)]
            dtypes = {dtype for dtypes in added_in for dtype in dtypes}
            if self._reduce_once and dtypes - {torch.float32, torch.float64}:
                found = ", ".join(sorted(map(str, dtypes)))
                raise ValueError(
                    f"reduce_once is True, and fully_shard would add up gradients in {found}; call "
                    "acc.reduce_in_fp32(model), or give it MixedPrecisionPolicy(reduce_dtype=torch.float32), or reduce "
                    "in each part"
                )
            self._agreement.meet()
            stack.enter_context(self._meeting.before_collectives(groups))
            stack.callback(self._reduce_in_backward, True)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def _reduce_in_backward(self, yes: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(yes, recurse=False)


class Meeting:
    """Where ranks come before each collective of ``fully_shard``, and one that has run out of memory with that news.

    Attributes:
        news: what it has raised, as class and text: :class:`OutOfMemoryElsewhereError` or :class:`RanksError`. None as
            long as all is well.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.news: tuple[type[Exception], str] | None = None

    def __call__(self) -> None:
        """Return when all ranks have come here; raise on all of them when memory has run out on one, or it failed."""
        if self.news is not None:  # the pass went on after it
            kind, text = self.news
            raise kind(text)
        try:
            self._ranks.meet()
        except (OutOfMemoryElsewhereError, RanksError) as error:
            self.news = type(error), str(error)  # not itself, which holds the tensors of its frames
            raise

    @contextmanager
    def before_collectives(self, groups: list[Any]) -> Iterator[None]:
        """Return a block in which groups of parameters have it before each of their collectives."""
        with ExitStack() as stack:
            for group in groups:
                stack.callback(wrap_collectives(group, lambda comm: AgreedCollective(comm, self)))
            yield


class AgreedCollective:
    """A collective of fully_shard that every rank runs, or none.

    Args:
        comm: the collective, as ``FSDPModule.set_custom_all_gather`` takes it.
        meet: is called before it.
    """

    def __init__(self, comm: Any, meet: Callable[[], None]) -> None:
        self._comm, self._meet = comm, meet

    def allocate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return memory for what it sends or receives."""
        return self._comm.allocate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it, when all ranks have come to it."""
        self._meet()
        return self._comm(*args, **kwargs)
