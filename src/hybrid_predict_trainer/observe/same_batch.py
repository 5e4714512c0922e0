"""Whether a batch is the batch of last time: full-batch training, whichever way the data come.

The very same tensors, unchanged, are the same batch.  New tensors with the same numbers (a ``DataLoader`` that gives
the whole data set at every step) are one, too: a few numbers of every tensor are compared first, which is where batches
that are drawn afresh differ, and only where they agree a digest of all numbers.  The same samples in another order are
not the same batch: their loss differs by rounding, and exact losses are compared bit for bit.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..records import StateDict
from .batches import PLAIN, is_plain

#: Numbers of a tensor that are looked at first, and tensors that are looked at.
NUM_SAMPLED, MAX_TENSORS = 16, 16
#: Once recognised, all numbers of copies are read at the first steps and then at every so-manieth.
DIGEST_EVERY = 16
#: Bytes that are read whatever the step: their digest takes some microseconds.
SMALL_BYTES = 1 << 14
#: Reading an accelerator's tensors waits for it: there copies are looked for in the first steps of every so many.
LOOK_EVERY, LOOK_STEPS = 200, 4
#: What numpy has as well.
_OF_NUMPY = frozenset({torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool})
_LEAVES = (Tensor, np.ndarray, *PLAIN)
#: How deep objects are looked into.
MAX_DEPTH = 8


def leaves(batch: Any, depth: int = 0, seen: set[int] | None = None) -> Iterator[Any]:
    """Tensors, arrays, plain values and what is none of these, in order; looks into containers and objects."""
    seen = set() if seen is None else seen
    if isinstance(batch, _LEAVES):
        yield batch
        return
    if id(batch) in seen or depth > MAX_DEPTH:
        return
    seen.add(id(batch))
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield key
            yield from leaves(value, depth + 1, seen)
    elif isinstance(batch, tuple | list):
        if is_plain(batch):
            yield batch
            return
        for value in batch:
            if isinstance(value, Tensor):
                yield value
            else:
                yield from leaves(value, depth + 1, seen)
    elif not callable(batch) and not isinstance(batch, weakref.ref) and vars_of(batch):
        yield type(batch).__qualname__
        for value in vars_of(batch).values():
            yield from leaves(value, depth + 1, seen)
    elif not isinstance(batch, weakref.ref):
        yield batch


def vars_of(value: Any) -> dict[str, Any]:
    """Attributes of an object, those of its slots included; empty where it shows none."""
    found = dict(getattr(value, "__dict__", {}))
    for cls in type(value).__mro__:
        for name in getattr(cls, "__slots__", ()):
            if isinstance(name, str) and hasattr(value, name):
                found.setdefault(name, getattr(value, name))
    return {k: v for k, v in found.items() if not k.startswith("__")}


def _dense(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in host memory, as flat bytes."""
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = torch.cat([values.coalesce().indices().double().reshape(-1), values.coalesce().values().reshape(-1)])
    return values.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)


def _sampled(tensor: Tensor) -> bytes | None:
    """Some numbers of a tensor as bytes, in a fixed order; None where they cannot be read."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_conj() or tensor.is_neg():
        return b""  # the digest tells
    values = tensor.detach()
    step = max(1, values.numel() // NUM_SAMPLED)
    if values.device.type == "cpu" and values.dtype in _OF_NUMPY:  # in a third of the time, strided in a twentieth
        flat = values.numpy().reshape(-1) if values.is_contiguous() else values.numpy().flat
        return bytes(flat[::step].tobytes())
    if values.is_contiguous():
        picked = values.as_strided((-(-values.numel() // step),), (step,))
    else:
        places = torch.arange(0, values.numel(), step, device=values.device)
        picked = values[torch.unravel_index(places, values.shape)]
    return bytes(picked.cpu().contiguous().view(torch.uint8).numpy().tobytes())


class Fingerprint:
    """A batch as one can recognise it later, without keeping it alive.

    Attributes:
        digest: Of all its numbers, or None while nobody has asked.
    """

    __slots__ = ("_loaded", "_marks", "_others", "_refs", "_seen_whole", "digest", "num_bytes", "num_tensors")

    def __init__(self, batch: Any, *, values: bool = True, found: Sequence[Any] | None = None) -> None:
        """Remember what identifies ``batch``.

        Args:
            batch: Any.
            values: Look at some numbers; without, only the very same tensors match.
            found: Its :func:`leaves`, where they are known.
        """
        self.digest: str | None = None
        self._loaded = False  # from a checkpoint: its marks are text
        self._refs: list[tuple[Any, int]] = []
        self._others: list[Any] | None = []
        marks: list[Any] = []
        self.num_bytes = self.num_tensors = 0
        self._seen_whole = True  # no list is longer than what is looked at
        for leaf in leaves(batch) if found is None else found:
            if isinstance(leaf, np.ndarray) and leaf.dtype != object:
                leaf = torch.from_numpy(leaf) if leaf.dtype.kind in "biufc" else str(leaf.tolist())
            if isinstance(leaf, Tensor):
                # inference tensors have no version counter (and cannot be changed in place outside inference mode)
                self._refs.append((weakref.ref(leaf), 0 if leaf.is_inference() else leaf._version))
                self.num_tensors += 1
                self.num_bytes += leaf.numel() * leaf.element_size() if leaf.layout is torch.strided else 0
                marks.append((leaf.dtype, leaf.shape))
                if values and self.num_tensors <= MAX_TENSORS and leaf.numel():
                    marks.append(_sample(leaf))
            elif isinstance(leaf, tuple | list):
                marks.append(f"{len(leaf)}{leaf[:NUM_SAMPLED]!r}")
                self._seen_whole = self._seen_whole and len(leaf) <= NUM_SAMPLED
            elif isinstance(leaf, PLAIN):
                marks.append(repr(leaf))
            else:
                self._others.append(_reference(leaf))
        self._marks: list[Any] | None = marks if values else None

    def still(self, batch: Any) -> bool:
        """Whether a list or tuple of tensors is the very one that this was taken of, and shows the same numbers.

        A short answer to what a new fingerprint, :meth:`identical` and :meth:`alike` would say; False: ask these.
        """
        marks = self._marks
        if marks is None or self._loaded or self._others or type(batch) not in (list, tuple):
            return False
        if len(batch) != len(self._refs) or len(batch) > MAX_TENSORS or len(marks) != 2 * len(batch):
            return False
        for i, leaf in enumerate(batch):
            ref, version = self._refs[i]
            if ref() is not leaf or (0 if leaf.is_inference() else leaf._version) != version:
                return False
            if marks[2 * i] != (leaf.dtype, leaf.shape) or marks[2 * i + 1] != _sample(leaf):
                return False
        return True

    def identical(self, other: Fingerprint) -> bool:
        """Whether both are the same living tensors, never written to by torch in between, and nothing else to read."""
        if not self._refs or not self._seen_whole or len(self._refs) != len(other._refs):
            return False
        return all(
            a() is not None and a() is b() and va == vb
            for (a, va), (b, vb) in zip(self._refs, other._refs, strict=True)
        )

    def alike(self, other: Fingerprint) -> bool:
        """Whether shapes, plain values and the numbers looked at agree; False for batches without tensors."""
        if not self.num_tensors or self.num_tensors != other.num_tensors:
            return False
        if self._others is not None and other._others is not None:
            if len(self._others) != len(other._others):
                return False
            if not all(a() is not None and a() is b() for a, b in zip(self._others, other._others, strict=True)):
                return False
        if self._marks is None or other._marks is None:
            return self.identical(other)
        if self._loaded or other._loaded:
            return _written(self._marks) == _written(other._marks)
        return self._marks == other._marks

    def state_dict(self) -> StateDict:
        """What can be compared after a resume."""
        return {
            "marks": None if self._marks is None else _written(self._marks),
            "digest": self.digest,
            "num_tensors": self.num_tensors,
        }

    @classmethod
    def from_state_dict(cls, state: StateDict) -> Fingerprint:
        """Inverse of :meth:`state_dict`; references to living tensors are gone."""
        made = cls(())
        made._marks, made.digest, made.num_tensors = state["marks"], state["digest"], state["num_tensors"]
        made._others, made._loaded = None, True
        return made


def _sample(tensor: Tensor) -> bytes | str:
    try:
        found = _sampled(tensor)
    except (RuntimeError, TypeError, NotImplementedError):  # subclasses that hold their numbers otherwise
        found = None
    return "?" if found is None else found


def _written(marks: Sequence[Any]) -> list[str]:
    """Marks as a file holds them."""
    return [_text(mark) for mark in marks]


def _text(mark: Any) -> str:
    if isinstance(mark, tuple):
        return f"{mark[0]}{tuple(mark[1])}"
    return mark.hex() if isinstance(mark, bytes) else str(mark)


def _reference(value: Any) -> Any:
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: None  # cannot be recognised


def digest_of(batch: Any) -> str | None:
    """Digest of all numbers and plain values of a batch; None where something in it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for leaf in leaves(batch):
            if isinstance(leaf, Tensor):
                digest.update(_dense(leaf).numpy().data)
            elif isinstance(leaf, np.ndarray):
                digest.update(np.ascontiguousarray(leaf).tobytes() if leaf.dtype != object else repr(leaf).encode())
            elif isinstance(leaf, (*PLAIN, tuple, list)):
                digest.update(repr(leaf).encode())
    except (RuntimeError, TypeError, NotImplementedError, ValueError):
        return None
    return digest.hexdigest()


def _on_host(found: Sequence[Any]) -> bool:
    """Whether the numbers of a batch, given by its leaves, can be read without waiting for a device."""
    return all(t.device.type == "cpu" for t in found if isinstance(t, Tensor))


class SameBatch:
    """Looks at every batch that real training takes, and says whether it is the one of last time.

    Attributes:
        same: Of the last batch seen.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.same = False
        self.num_seen = 0
        self.num_same = 0  # in a row
        self.num_different = 0  # likewise
        self._last: Fingerprint | None = None

    def see(self, batch: Any, *, again: bool = False) -> None:
        """Compare a batch with the one before.

        Args:
            batch: Of the step that is about to be taken.
            again: It is given again because nothing was learnt from it: that says nothing of the data.
        """
        if again and self._last is not None:
            return
        if self.same and self._last is not None and self._last.digest is not None and self._last.still(batch):
            self.num_seen, self.num_same, self.num_different = self.num_seen + 1, self.num_same + 1, 0
            return
        found = list(leaves(batch))
        values = _on_host(found) or self.same or self.num_seen % LOOK_EVERY < LOOK_STEPS
        current, last = Fingerprint(batch, values=values, found=found), self._last
        self.num_seen += 1
        if last is None:
            current.digest = digest_of(batch)  # so that the second batch can be told for a copy at once
        elif current.alike(last):
            current.digest = self._digest(batch, current, last)
            unreadable = current.digest is None and self.num_same > 0
            agrees = current.digest is not None and current.digest == last.digest
            self.same = agrees or (unreadable and current.identical(last))
            self.num_same = self.num_same + 1 if self.same or current.digest is None else 0
            self.num_different = 0 if self.same else self.num_different + 1
            self._last = current
            return
        self.same, self.num_same, self._last = False, 0, current
        self.num_different += 1

    def forget(self) -> None:
        """A batch could not be looked at: it is another one than the last, as far as can be told."""
        self.same, self.num_same, self._last = False, 0, None
        self.num_different += 1

    def _digest(self, batch: Any, current: Fingerprint, last: Fingerprint) -> str | None:
        """The digest of a batch that looks like the last one; copies are read in full at first and then rarely."""
        known = self.same and last.digest is not None
        rests = known and current.num_bytes > SMALL_BYTES and self.num_same % DIGEST_EVERY >= 2
        return last.digest if last.digest is not None and (current.identical(last) or rests) else digest_of(batch)

    def state_dict(self) -> StateDict:
        """Plain containers."""
        last = None if self._last is None else self._last.state_dict()
        return {
            "same": self.same, "num_seen": self.num_seen, "num_same": self.num_same,
            "num_different": self.num_different, "last": last,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.same, self.num_seen = state["same"], state["num_seen"]
        self.num_same, self.num_different = state["num_same"], state["num_different"]
        self._last = None if state["last"] is None else Fingerprint.from_state_dict(state["last"])
