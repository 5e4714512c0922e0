"""How the engine's part of a run is kept: as a state, beside a framework's checkpoint, or in one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from ..distributed.collective import on_all
from ..keep import checkpoint, resume
from ..keep.background import Write
from ..keep.housekeeping import newest_good
from ..keep.periodic import PeriodicSaver
from ..records import CheckpointError, Decision, Phase, Reason, StateDict
from ..weights.offload import own_defaults
from .learning import settle_readings
from .state import State

#: Step under which the only state in a folder is written.
ONLY = 0

#: The engine's own part of a checkpoint that a trainer has written.
_FRESH: StateDict = {"decision": None, "looked": False, "spent": 0.0, "forms": []}

ACCUMULATING = (
    "no checkpoint in the middle of a step: gradients of some of its batches have been added up, which it would not "
    "hold; save after optimizer.step()"
)


class Kept(Protocol):
    """What the engine is asked for, and told."""

    def own_state(self) -> StateDict:
        """What no owner of the run's holds."""

    def restart(self, own: StateDict) -> None:
        """Inverse of :meth:`own_state`."""

    def accumulating(self) -> bool:
        """Whether gradients have been added up that no step has used."""


class EngineKeeper:
    """Saves and loads, and knows when the next checkpoint is due."""

    def __init__(self, run: State, engine: Kept) -> None:
        """Checkpoints of their own accord only where ``checkpoint.directory`` is set.

        Args:
            run: Of the engine.
            engine: Whose own part it is.
        """
        self._run, self._engine = run, engine
        config = run.config.checkpoint
        capture = self._capture if config.async_save else None
        self._saver = (
            PeriodicSaver(config.directory, config.save_interval, self._save, capture, run.subject.ranks)
            if config.directory
            else None
        )

    def state_dict(self) -> StateDict:
        """See :meth:`.Engine.state_dict`."""
        settle_readings(self._run, self._run.recorder)
        return {**resume.own_state(self._run), "engine": self._engine.own_state()}

    def load_state_dict(self, state: StateDict) -> None:
        """See :meth:`.Engine.load_state_dict`."""
        own = checked(state.get("engine"))
        with own_defaults():
            resume.load_own_state(self._run, state)
        self._engine.restart(own)

    def save_state(self, directory: str | Path) -> Path:
        """See :meth:`.Engine.save_state`."""
        if self._run.subject.ranks.sharded:
            raise CheckpointError("weights are sharded: every rank has a state of its own; use save_checkpoint()")
        try:
            state = self.state_dict()
            return self._run.subject.ranks.alone_does(lambda: checkpoint.save(directory, ONLY, {"riding": state}))
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"cannot save the engine's state: {error}") from error

    def load_state(self, directory: str | Path) -> None:
        """See :meth:`.Engine.load_state`."""
        path = Path(directory) / f"checkpoint_step_{ONLY}"
        on_all(self._run.subject.ranks, lambda: self._take_state(path))

    def _take_state(self, path: Path) -> None:
        parts = checkpoint.load(path).parts
        if "riding" not in parts:
            raise CheckpointError(f"{path} holds no state of an engine: load it with load_checkpoint()")
        self.load_state_dict(parts["riding"])

    def save_checkpoint(self, path: str | Path) -> Path:
        """See :meth:`.Engine.save_checkpoint`."""
        if self._engine.accumulating():
            raise CheckpointError(ACCUMULATING)
        return self._save(Path(path))

    def load_checkpoint(self, path: str | Path) -> None:
        """See :meth:`.Engine.load_checkpoint`."""
        with own_defaults():
            found = resume.load(self._run, self._run.recorder, Path(path), _own_part)
        self._engine.restart(_own_part(found))
        if self._saver is not None:
            self._saver.loaded(Path(path), self._run.meter.num_steps)

    def load_latest(self, directory: str | Path) -> None:
        """See :meth:`.Engine.load_latest`."""
        newest_good(self._run.subject.ranks, directory, self.load_checkpoint)

    def save_if_due(self, *, stepping: bool) -> None:
        """Write a checkpoint if ``save_interval`` steps have passed.

        Args:
            stepping: The optimizer's step has not returned yet.
        """
        run, saver = self._run, self._saver
        theirs = run.subject.grad_scaler is not None or not run.schedule.owned  # not updated before the hook returns
        if saver is None or (stepping and theirs) or not saver.due(run.meter.num_steps):
            return
        if not self._engine.accumulating():  # else the next call does it, behind the step
            saver.keep_up(run.meter.num_steps)

    def _save(self, directory: Path) -> Path:
        settle_readings(self._run, self._run.recorder)
        with own_defaults():
            return resume.save(self._run, self._run.recorder, directory, extra={"engine": self._engine.own_state()})

    def _capture(self, directory: Path) -> Write:
        settle_readings(self._run, self._run.recorder)
        with own_defaults():
            return resume.captured(self._run, self._run.recorder, directory, extra={"engine": self._engine.own_state()})


def _own_part(parts: dict[str, StateDict]) -> StateDict:
    """The engine's own part of a checkpoint; raises CheckpointError."""
    return checked(parts.get("engine", _FRESH))


def checked(own: Any) -> StateDict:
    """The engine's own part of a state.

    Args:
        own: As it was read.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        found = own["decision"]
        if found is not None:
            Decision(**{**found, "phase": Phase(found["phase"]), "reason": Reason(found["reason"])})
        refused = own.get("account", {"refused": {}})["refused"]  # states of the first engines have none
        account = {"refused": {str(reason): int(count) for reason, count in refused.items()}}
        read = {"decision": found, "looked": bool(own["looked"]), "spent": float(own["spent"]), "account": account}
        return {**read, "forms": [[int(number), [str(n) for n in names]] for number, names in own["forms"]]}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the engine's state cannot be read ({type(error).__name__}: {error})") from error
