"""What ranks tell each other before anything is decided, so that all of them decide alike.

Whatever decides gets values that are the same on every rank: means of losses, "any rank" of flags, and the first
rank's figures where only one can be right (times, answers of a predictor).  One process is the identity and costs
nothing.

Several ranks exchange blocks of one fixed size that begin with a mark of their kind.  So ranks that have parted,
because something was raised on one of them, do not wait for ever or add up figures of different things: the block that
comes back shows that the marks differ, on all of them at once.  Inside a stretch of work that may raise
(:meth:`Collective.together`) that is an :class:`OtherRankFailed`; at its end, and at the beginning of a step, ranks
repeat the exchange until the others have arrived there too.

Marks are compared in one sum: n sum(m^2) = (sum m)^2 only if all n marks are equal (Cauchy and Schwarz); they are below
2^16, so that this is exact in float64 for up to 1,024 ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..records import CheckpointError, HybridError

T = TypeVar("T")

#: Numbers of a block, and of its head: mark and its square.
BLOCK, HEAD = 40, 2
#: Marks of one kind: kinds are told apart by multiples of it, lengths of a kind by the rest.
LENGTHS = 4096
#: Blocks that did not match in a row after which ranks have lost each other for good.
MAX_TRIES = 1000
#: Ranks for which marks are compared exactly.
MAX_RANKS = 1024


class OtherRankFailed(HybridError, RuntimeError):  # noqa: N818
    """Something was raised on another rank, so that what this one was doing is given up here as well."""


class RanksDisagree(HybridError, RuntimeError):  # noqa: N818
    """Ranks have lost each other, or hold states that cannot be brought together."""


class _Kind(IntEnum):
    STEP = 1  # a step begins
    END = 2  # of work together
    MEANS = 3
    FIRST = 4
    FAILED = 5
    DONE = 6
    TOTAL = 7


class Collective:
    """One process: every value is its own.

    Attributes:
        size: Number of ranks.
        rank: Of this process, from 0.
        sharded: Every rank holds a part of the weights.
        exchanged: Blocks so far, and bytes of tensors.
        group: Process group in host memory; None: there is none.
        num_brought_together: Times that ranks had parted and went on from the first one's state.
    """

    size = 1
    rank = 0
    sharded = False
    exchanged = (0, 0)
    num_brought_together = 0
    group: Any = None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0

    def means(self, work: Callable[[], Sequence[float]]) -> list[float]:
        """Means over ranks of what ``work`` returns; raises on every rank if it raised on one.

        Raises:
            OtherRankFailed: it raised on another rank, or the ranks have returned different numbers of values.
        """
        return list(work())

    def mean_of(self, values: Tensor) -> Tensor:
        """Mean over ranks of a tensor, on its device; on an accelerator nobody waits for it."""
        return values

    def first_of(self, work: Callable[[], Sequence[float]]) -> list[float]:
        """The first rank's values; raises as :meth:`means`."""
        return list(work())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def all_here(self) -> None:
        """Every rank has come this far.

        Raises:
            OtherRankFailed: one has not.
        """
        self.means(list)

    def at_step(self, sums: Sequence[float], digest: int) -> tuple[list[float], bool]:
        """A step begins on every rank.

        Args:
            sums: Numbers to be added up over ranks.
            digest: Of all that decides, in [0, 2^16).

        Returns:
            The sums, and whether all digests are the same.
        """
        return list(sums), True

    def together(self, work: Callable[[], T]) -> T:
        """Do ``work``, which may exchange; returns when all ranks are done with it.

        Raises:
            Exception: what it raised here.
            OtherRankFailed: it raised on another rank.
        """
        return work()

    def brought_together(self) -> None:
        """Ranks had parted, and go on from the first one's state."""
        self.num_brought_together += 1

    def alone_does(self, work: Callable[[], T]) -> T:
        """The first rank does ``work``, and the others wait for what came of it.

        Raises:
            Exception: what it raised, there.
            CheckpointError: it raised one; on every rank.
            OtherRankFailed: it raised something else, on the other ranks.
        """
        return work()

    def share(self, value: Any) -> Any:
        """The first rank's object."""
        return value

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's object, by rank."""
        return [value]

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks that hold shards of the weights of what each has summed over its own."""
        return values


#: The one that costs nothing.
ALONE = Collective()


def on_all(ranks: Collective, work: Callable[[], T]) -> T:
    """What has to do with checkpoints, on every rank or on none.

    Raises:
        Exception: what it raised here.
        CheckpointError: it failed on another rank.
    """
    try:
        return ranks.together(work)
    except OtherRankFailed as error:
        raise CheckpointError(f"{error}: see what it says; nothing was changed") from error


class Ranks(Collective):
    """Several processes, by ``torch.distributed``; every rank makes the same calls.

    Figures of the host go over a gloo group of their own, beside the gradients' collectives: on an accelerator nobody
    waits for the device because of them.
    """

    def __init__(self, *, sharded: bool = False) -> None:
        """Bind to all processes of the default group; every one of them has to come here.

        Args:
            sharded: Every rank holds a part of the weights, and sums over weights are to be added up.

        Raises:
            RanksDisagree: there are more ranks than can be told apart.
        """
        self.size, self.rank = distributed.get_world_size(), distributed.get_rank()
        if self.size > MAX_RANKS:
            raise RanksDisagree(f"{self.size} processes: at most {MAX_RANKS} can agree")
        self.sharded = sharded
        self.group = _host_group()
        self.exchanged = (0, 0)

    def means(self, work: Callable[[], Sequence[float]]) -> list[float]:  # noqa: D102
        sums = self._after(work, _Kind.MEANS, lambda values: values)
        return [value / self.size for value in sums]

    def first_of(self, work: Callable[[], Sequence[float]]) -> list[float]:  # noqa: D102
        return self._after(work, _Kind.FIRST, lambda values: values if self.first else [0.0] * len(values))

    def _after(
        self, work: Callable[[], Sequence[float]], kind: _Kind, told: Callable[[Sequence[float]], Sequence[float]]
    ) -> list[float]:
        try:
            values = [float(value) for value in work()]
        except Exception:
            self._block(_Kind.FAILED, [])
            raise
        found = self._block(kind, told(values))
        if found is None:
            raise OtherRankFailed("another rank failed where this one did not, or is elsewhere")
        return found

    def mean_of(self, values: Tensor) -> Tensor:  # noqa: D102
        if values.device.type == "cpu":
            means = self.means(values.detach().double().reshape(-1).tolist)
            return torch.tensor(means, dtype=torch.float64).to(values.dtype).reshape(values.shape)
        summed = values.detach().clone()
        distributed.all_reduce(summed)  # in the gradients' group: on the device's own stream
        self._count(summed)
        return summed / self.size

    def any(self, flag: bool) -> bool:  # noqa: D102
        return self.means(lambda: [float(flag)])[0] > 0

    def at_step(self, sums: Sequence[float], digest: int) -> tuple[list[float], bool]:  # noqa: D102
        found = self._until(_Kind.STEP, [*sums, float(digest), float(digest) ** 2])
        total, squares = found[-2:]
        return found[:-2], squares * self.size == total * total

    def together(self, work: Callable[[], T]) -> T:  # noqa: D102
        try:
            result = work()
        except Exception:
            self._until(_Kind.END, [1.0])
            raise
        if self._until(_Kind.END, [0.0])[0] > 0:
            raise OtherRankFailed("another rank failed where this one did not")
        return result

    def alone_does(self, work: Callable[[], T]) -> T:  # noqa: D102
        made: list[T] = []
        failed: Exception | None = None
        if self.first:
            try:
                made.append(work())
            except Exception as error:
                failed = error
        self._until(_Kind.DONE, [])
        of_disk = isinstance(failed, CheckpointError)  # an error may not be what can be sent: its words are
        result: list[T]
        result, said, of_disk = self.share((made, None if failed is None else str(failed), of_disk))
        if failed is not None:
            raise failed
        if said is not None:
            raise CheckpointError(said) if of_disk else OtherRankFailed(f"rank 0: {said}")
        return result[0]

    def share(self, value: Any) -> Any:  # noqa: D102
        held = [value if self.first else None]
        distributed.broadcast_object_list(held, src=0, group=self.group)
        return held[0]

    def gathered(self, value: Any) -> list[Any]:  # noqa: D102
        held: list[Any] = [None] * self.size
        distributed.all_gather_object(held, value, group=self.group)
        return held

    def total(self, values: Tensor) -> Tensor:  # noqa: D102
        if not self.sharded:
            return values
        if values.device.type == "cpu":
            sums = self._after(values.detach().double().reshape(-1).tolist, _Kind.TOTAL, lambda found: found)
            return torch.tensor(sums, dtype=torch.float64).to(values.dtype).reshape(values.shape)
        summed = values.detach().clone().contiguous()
        distributed.all_reduce(summed)
        self._count(summed)
        return summed

    # ---- blocks --------------------------------------------------------------------------------------

    def _until(self, kind: _Kind, values: Sequence[float]) -> list[float]:
        """Exchange until all ranks are here; the others are on their way, because something was raised there."""
        for _ in range(MAX_TRIES):
            found = self._block(kind, values)
            if found is not None:
                return found
        raise RanksDisagree(f"ranks do not come together at {kind.name.lower()!r}: each waits somewhere else")

    def _block(self, kind: _Kind, values: Sequence[float]) -> list[float] | None:
        """Sums over ranks; None where marks differ, on every rank."""
        mark = kind * LENGTHS + len(values) % LENGTHS
        room = BLOCK - HEAD
        block = torch.zeros(BLOCK, dtype=torch.float64, device="cpu")
        block[0], block[1] = mark, mark * mark
        if values:
            head = torch.tensor(values[:room], dtype=torch.float64, device="cpu")
            block[HEAD : HEAD + len(head)] = head
        distributed.all_reduce(block, group=self.group)
        self._count(block)
        total, squares, *found = block.tolist()
        if squares * self.size != total * total:
            return None
        if kind is _Kind.FAILED:  # on every rank
            return None
        if len(values) > room:
            rest = torch.tensor(values[room:], dtype=torch.float64, device="cpu")
            distributed.all_reduce(rest, group=self.group)
            self._count(rest)
            return [*found, *rest.tolist()]
        return found[: len(values)]

    def _count(self, tensor: Tensor) -> None:
        number, size = self.exchanged
        self.exchanged = number + 1, size + tensor.numel() * tensor.element_size()


#: The default group that was bound to last, its process and its gloo group.
_bound: list[tuple[Any, int, Any]] = []


def _host_group() -> Any:
    """A gloo group of all processes, one per default group."""
    default = distributed.group.WORLD
    if _bound and _bound[0][0] is default and _bound[0][1] == os.getpid():
        return _bound[0][2]
    made = distributed.new_group(backend="gloo")
    _bound[:] = [(default, os.getpid(), made)]
    return made
