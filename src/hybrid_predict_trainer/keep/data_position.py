"""Where a run stands in its data, for loaders that can tell (``state_dict`` and ``load_state_dict``).

That is the protocol of torchdata's ``StatefulDataLoader``.  Of other loaders batches are counted
(``HybridTrainer.num_batches``), and the caller skips so many.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..notices import warn
from ..records import CheckpointError, StateDict
from .state_tree import check_plain

#: Part of a checkpoint.
PART = "loader"


class DataPosition:
    """The loader of a run, where it can say where it stands."""

    def __init__(self) -> None:
        """No loader yet."""
        self._loader: Any = None
        self._found: StateDict | None = None
        self._said = False

    @staticmethod
    def check(parts: dict[str, StateDict]) -> None:
        """Refuse a part that no loader has written.

        Raises:
            CheckpointError: it cannot be read.
        """
        part = parts.get(PART)
        if part is not None and not (isinstance(part, dict) and "position" in part and type(part.get("again")) is list):
            raise CheckpointError("the position in the data cannot be read")

    def found(self, parts: dict[str, StateDict]) -> None:
        """A checkpoint was loaded: the next loader that can goes on from there."""
        self._found = parts.get(PART)

    def follow(self, loader: Any) -> Iterator[Any]:
        """Training goes on with a loader.

        Returns:
            The batch of a refused proposal that was to be used again when the checkpoint was written, if there is one.
        """
        can = callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))
        self._loader = loader if can else None
        found, self._found = self._found, None
        if can and found is not None:
            loader.load_state_dict(found["position"])
            return iter(found["again"])
        return iter(())

    def parts(self, again: Any) -> dict[str, StateDict]:
        """What a checkpoint of this moment holds of it; nothing where the loader cannot tell.

        Args:
            again: The batch that is to be used again, which the loader has already given; None: there is none.
        """
        if self._loader is None:
            return {}
        state = {"position": self._loader.state_dict(), "again": [] if again is None else [again]}
        try:
            check_plain(state)
        except (TypeError, ValueError) as error:
            if not self._said:
                self._said = True
                warn(f"the position in the data is not in the checkpoints: {error}; count batches instead")
            return {}
        return {PART: state}

    def __deepcopy__(self, memo: object) -> DataPosition:
        """A copy of a trainer has no loader of its own."""
        return DataPosition()
