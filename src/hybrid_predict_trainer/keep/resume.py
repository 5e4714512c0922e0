"""A trainer to and from a checkpoint: which parts there are, and in which order they are taken back."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config.settings import FOR_EXACT, NOISY
from ..config.toml import to_toml
from ..distributed.collective import on_all
from ..notices import users_line, warn
from ..records import CheckpointError, ConfigError, DamagedCheckpointError, StateDict
from ..weights.parameters import optimizer_parameters
from ..weights.shards import local
from . import checkpoint, failures, model_state, optimizer_state, schema, sharded
from .background import Write
from .backup import Backup
from .identity import check_identity, check_parts, identity
from .manifest import CONFIG, MALFORMED, refusal
from .merged import merged
from .migration import upgraded, with_later
from .object_state import stateful
from .rng import rng_state, set_rng_state
from .state_tree import check_plain, decode, encode

if TYPE_CHECKING:
    from ..cycle.state import State
    from ..tell.recorder import Metrics

#: Tables of the library's own state that hold what a run happened to have: failures, and what its settings asked for.
OPEN = (*failures.TABLES, "of_settings", "rates")

#: Said at a resume that is not bitwise.
WITHOUT_PREDICTOR = (
    "the checkpoint was written with checkpoint.include_predictor = false: a new window begins, with nothing observed "
    "and no earlier state for the guard to come back to; weights, optimizer, schedule and random states are exact"
)


def parts(run: State, metrics: Metrics, *, full: bool = False) -> dict[str, StateDict]:
    """Everything a bitwise resume needs, by part.

    Args:
        run: Between two steps.
        metrics: Of that run.
        full: Whatever ``checkpoint.include_predictor`` says.

    Raises:
        CheckpointError: the optimizer holds something whose state cannot be told; the message names it.
    """
    run.subject.reshard()
    model, about = model_state.saved_state(run.subject.model, run.subject.optimizer, run.origin, run.buffers)
    saved: dict[str, StateDict] = {
        "model": model,
        "optimizer": _optimizer_state(run),
        "trainer": {
            "run": run.state_dict(),
            "metrics": metrics.state_dict(),
            "model": about,
            "scheduler": None if run.schedule.scheduler is None else stateful(run.schedule.scheduler).state_dict(),
            "scaler": None if run.subject.grad_scaler is None else run.subject.grad_scaler.state_dict(),
            "rng": rng_state(),
            "identity": identity(run),
        },
    }
    if full or run.config.checkpoint.include_predictor:
        saved["predictor"] = {
            "name": run.proposer.predictor.name, "predictor": run.proposer.predictor.state_dict(),
            "basis": run.windows.basis.state_dict(),
            "observer": run.windows.observer.state_dict(),
        }  # fmt: skip
    else:
        saved["trainer"]["run"]["safety"] = run.safety.state_without_copies()
        saved["trainer"]["run"]["windows"]["last"] = None  # its products are those of the basis
    saved["trainer"]["forms"] = {part: schema.form(state) for part, state in saved.items()}
    return saved


def save(run: State, metrics: Metrics, directory: Path, extra: dict[str, StateDict] | None = None) -> Path:
    """Write ``directory/checkpoint_step_N``.

    Args:
        run: In a consistent state, between steps.
        metrics: Of that run.
        directory: Made if missing.
        extra: More parts, such as a data position.

    Raises:
        CheckpointError: it could not be written, or holds something that could not be read back.
    """
    if run.subject.gathering:
        return _save_sharded(run, metrics, directory, extra)
    drafted = _drafted(run, metrics, extra)
    return run.subject.ranks.alone_does(lambda: checkpoint.write(directory, drafted))


def captured(run: State, metrics: Metrics, directory: Path, extra: dict[str, StateDict] | None = None) -> Write:
    """Copy all that :func:`save` would write now, and hand back what writes it, from any thread and at any time.

    Args:
        run: In a consistent state, between steps.
        metrics: Of that run.
        directory: Made if missing.
        extra: More parts, such as a data position.

    Raises:
        CheckpointError: it holds something that could not be read back.
    """
    if run.subject.gathering:  # ranks write together, and not while they train
        written = _save_sharded(run, metrics, directory, extra)
        return lambda: written
    drafted = _drafted(run, metrics, extra, copy=True)
    if not run.subject.ranks.first:
        return lambda: directory
    return lambda: checkpoint.write(directory, drafted)


def _save_sharded(run: State, metrics: Metrics, directory: Path, extra: dict[str, StateDict] | None) -> Path:
    try:
        saved = {**parts(run, metrics), **of_ranks(run), **(extra or {})}
        return sharded.save(run, saved, directory, lambda trees: _draft(run, {}, False, trees))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot save a checkpoint: {error}") from error


def of_ranks(run: State) -> dict[str, StateDict]:
    """What every rank has of its own: random states, and what it has seen of its data."""
    ranks = run.subject.ranks
    if ranks.alone:
        return {}
    return {"ranks": {"own": ranks.gathered({"rng": rng_state(), "batches": run.batches.state_dict()})}}


def check_savable(run: State, metrics: Metrics) -> None:
    """Find out before training whether a checkpoint of this run could be written.

    Raises:
        CheckpointError: it could not; the message names what cannot be held.
    """
    try:
        for part, state in parts(run, metrics).items():
            check_plain({part: state})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot save a checkpoint: {error}") from error


def warn_unless_savable(run: State, metrics: Metrics) -> None:
    """Say before training, and not at the first save, that there will be no checkpoints of this run."""
    try:
        check_savable(run, metrics)
    except CheckpointError as error:
        warnings.warn(f"no checkpoint of this run can be written: {error}", stacklevel=users_line())


def _drafted(
    run: State, metrics: Metrics, extra: dict[str, StateDict] | None, *, copy: bool = False
) -> checkpoint.Draft:
    try:
        return _draft(run, {**parts(run, metrics), **of_ranks(run), **(extra or {})}, copy)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"cannot save a checkpoint: {error}") from error


def _draft(run: State, saved: dict[str, StateDict], copy: bool, trees: Any = None) -> checkpoint.Draft:
    return checkpoint.draft(
        run.meter.num_steps,
        saved,
        copy=copy,
        trees=trees,
        config_toml=to_toml(run.proposer.settings),
        summary={
            "loss": run.losses.history.loss_ema.mean, "phase": run.phases.current.value,
            "phase_step": run.meter.steps_by_phase[run.phases.current], "confidence": run.proposer.confidence,
            "num_real_steps": run.meter.num_real_steps, "cost_units": run.meter.cost_units,
            "withdrawn": run.safety.guard.withdrawn, "num_guard_alarms": run.safety.guard.num_alarms,
            "num_guard_restores": run.safety.guard.num_restored, "num_failures": sum(run.failures.counts.values()),
        },
        keep_last_n=run.config.checkpoint.keep_last_n,
    )  # fmt: skip


def load(
    run: State,
    metrics: Metrics,
    path: Path,
    check_rest: Callable[[dict[str, StateDict]], object] = lambda parts: None,
) -> dict[str, StateDict]:
    """Take a checkpoint back: all of it, or nothing.

    It is read, decoded and compared with the live objects in full before anything is changed; should one of them refuse
    its state even so, all of them are put back as they were.  Of several ranks all take it, or none.

    Args:
        run: Between two steps.
        metrics: Of that run.
        path: Of a checkpoint.
        check_rest: Looks at all parts, for what the caller added, and raises CheckpointError.

    Returns:
        All parts, for what the caller added.

    Raises:
        CheckpointError: missing, damaged, or of another model, optimizer or predictor.  Nothing has been changed.
    """
    run.subject.reshard()
    ranks = run.subject.ranks
    loaded, exact, found = on_all(ranks, lambda: _read(run, metrics, path, check_rest))
    backup = on_all(ranks, lambda: Backup(run, metrics))
    try:
        on_all(ranks, lambda: _take(run, metrics, loaded, found))
    except BaseException:  # an interrupt, too
        backup.put_back()
        raise
    if exact and "predictor" not in loaded.parts:
        warn(WITHOUT_PREDICTOR)
    return loaded.parts


def _read(
    run: State, metrics: Metrics, path: Path, check_rest: Callable[[dict[str, StateDict]], object]
) -> tuple[checkpoint.LoadedCheckpoint, bool, Any]:
    """A checkpoint that fits, whether all of it holds, and what holds in the form of this run."""
    loaded, exact = sharded.load(run, path)
    check_parts(path, loaded.parts)
    try:
        check_rest(loaded.parts)
        if not exact:
            _check_anew(run, metrics, loaded)
            return loaded, False, None
        if loaded.manifest.format_version >= 3:
            _check_forms(path, loaded.parts)
        live = parts(run, metrics)
        found = upgraded(loaded.parts, live, loaded.manifest.format_version)
        _check(run, found, live, loaded.config_toml)
    except DamagedCheckpointError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ConfigError as error:
        raise refusal(path, f"has a {CONFIG} that cannot be read: {error}") from error
    except (*MALFORMED, IndexError) as error:
        raise _unfit(path, f"holds a state that cannot be read ({type(error).__name__}: {error})") from error
    return loaded, True, found


def _take(run: State, metrics: Metrics, loaded: checkpoint.LoadedCheckpoint, found: Any) -> None:
    """Change the live objects; ``found`` is None where only a part of it holds."""
    try:
        if found is None:
            _load_anew(run, metrics, loaded)
        else:
            _apply(run, metrics, found)
            _apply_own_rank(run, loaded.parts)
        schema.check_fields([run, metrics])
        check_savable(run, metrics)  # what was taken back has to be whole: it will be saved again
    except Exception as error:
        why = f"does not fit this run ({type(error).__name__}: {error}); nothing was changed"
        raise _unfit(loaded.path, why) from error


#: Of a run that goes on sharded in another way: what counts, and no memory of weights.
KEPT = ("meter", "losses", "monitor", "schedule", "failures")


def _check_anew(run: State, metrics: Metrics, loaded: checkpoint.LoadedCheckpoint) -> None:
    found = {part: loaded.parts[part] for part in (*sharded.SPREAD, "trainer")}
    check_identity(run, found, parts(run, metrics), loaded.config_toml)
    model_state.check(run.subject.model, found["model"], found["trainer"]["model"])


def _load_anew(run: State, metrics: Metrics, loaded: checkpoint.LoadedCheckpoint) -> None:
    """Take weights, optimizer, schedule and counts of a run with parts of other sizes; the rest begins anew."""
    found = loaded.parts
    own, optimizer = found["trainer"], found["optimizer"]
    model_state.load(run.subject.model, found["model"], own["model"])
    optimizer_state.restore(run.subject.model, run.subject.optimizer, optimizer)
    if run.schedule.scheduler is not None:
        stateful(run.schedule.scheduler).load_state_dict(own["scheduler"])
    for name in KEPT:
        getattr(run, name).load_state_dict(own["run"][name])
    run.judge.ledger.load_state_dict(own["run"]["judge"]["ledger"])
    metrics.load_state_dict(own["metrics"])
    run.overwritten()
    run.watch.writes.record()


def _unfit(path: Path, why: str) -> CheckpointError:
    """The error for a checkpoint that is as it was written, and that this run has no use for."""
    return CheckpointError(f"checkpoint {path} {why}; use another checkpoint")


def own_state(run: State) -> StateDict:
    """What the library itself remembers of a run, beside model, optimizer, schedule, scaler and random states.

    Returns:
        ``tree``, a JSON text, and ``tensors`` by name: plain data, which ``torch.load(weights_only=True)`` reads.

    Raises:
        CheckpointError: something in it cannot be held; the message names it.
    """
    state = {
        "run": run.state_dict(), "metrics": run.recorder.state_dict(), "name": run.proposer.predictor.name,
        "predictor": run.proposer.predictor.state_dict(), "basis": run.windows.basis.state_dict(),
        "observer": run.windows.observer.state_dict(),
    }  # fmt: skip
    try:
        tree, tensors = merged(*encode(state))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the state cannot be saved: {error}") from error
    return {"tree": json.dumps(tree), "tensors": tensors}


def load_own_state(run: State, state: StateDict) -> None:
    """Inverse of :func:`own_state`: all of it is taken, or nothing.

    Raises:
        CheckpointError: it is malformed, or of another model or predictor.  Nothing has been changed.
    """
    try:
        found = decode(json.loads(state["tree"]), state["tensors"])
        name = found["name"]
        found["run"] = with_later(found["run"], run.state_dict())
        for part, live in (("run", run.state_dict()), ("metrics", run.recorder.state_dict())):
            schema.check(found[part], live, (part,), free=OPEN)
    except (*MALFORMED, IndexError) as error:
        raise CheckpointError(f"the state cannot be read ({type(error).__name__}: {error})") from error
    if name != run.proposer.predictor.name and not (run.proposer.chooses and name in (NOISY, *FOR_EXACT)):
        raise CheckpointError(
            f"it was saved with predictor {name!r}, this run has {run.proposer.predictor.name!r}: set predictor.type "
            "to match"
        )
    backup = Backup(run, run.recorder)
    try:
        _apply_own(run, found)
        schema.check_fields([run, run.recorder])
    except Exception as error:
        backup.put_back()
        why = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"the state does not fit this run ({why}); nothing was changed") from error
    except BaseException:  # an interrupt
        backup.put_back()
        raise


def _apply_own(run: State, found: StateDict) -> None:
    run.adopt(found["name"])
    run.proposer.predictor.load_state_dict(found["predictor"])
    run.windows.basis.load_state_dict(found["basis"])
    run.windows.observer.load_state_dict(found["observer"])
    run.load_state_dict(found["run"])
    run.recorder.load_state_dict(found["metrics"])


def everything(run: State) -> StateDict:
    """All that decides what comes next, and the weights: what ranks that have parted go on from."""
    return parts(run, run.recorder, full=True)


def adopt(run: State, found: StateDict) -> None:
    """Go on from what :func:`everything` gave on another rank; random states, records and data stay this one's."""
    own = {"metrics": run.recorder.state_dict(), "rng": rng_state()}
    data = run.batches.state_dict()
    _apply(run, run.recorder, {**found, "trainer": {**found["trainer"], **own}})
    run.batches.load_state_dict(data)


def decisions(run: State) -> StateDict:
    """All that decides what comes next, without what is as large as the weights: nothing may remember these now."""
    predictor = run.proposer.predictor
    return {"run": run.state_dict(), "name": predictor.name, "predictor": predictor.state_dict()}


def adopt_decisions(run: State, found: StateDict) -> None:
    """Go on from what :func:`decisions` gave on another rank; weights, records and data stay this one's."""
    data = run.batches.state_dict()
    run.adopt(found["name"])
    run.proposer.predictor.load_state_dict(found["predictor"])
    run.load_state_dict(found["run"])
    run.batches.load_state_dict(data)


def _check_forms(path: Path, found: dict[str, StateDict]) -> None:
    """Refuse what has been changed in form since it was written."""
    own = {key: value for key, value in found["trainer"].items() if key != "forms"}
    wanted = found["trainer"].get("forms")
    digests = wanted if isinstance(wanted, dict) else {}
    for part, digest in {"model": "", "optimizer": "", "trainer": "", **digests}.items():
        state = own if part == "trainer" else found.get(part)
        if state is not None and schema.form(state) != digest:
            raise refusal(path, f"has a part {part!r} whose form is not the one that was written")


def _check(run: State, found: dict[str, StateDict], live: dict[str, StateDict], config_toml: str) -> None:
    """Compare everything with the live objects; raises CheckpointError."""
    check_identity(run, found, live, config_toml)
    own, now = found["trainer"], live["trainer"]
    model_state.check(run.subject.model, found["model"], own["model"])
    predictor = found.get("predictor")
    # another name is that of the other one of a run that chooses
    if predictor is not None and predictor["name"] == run.proposer.predictor.name:
        run.windows.observer.check_state(predictor.get("observer", {}))
        schema.check(predictor["basis"], run.windows.basis.state_dict(), ("predictor", "basis"))
        schema.check(predictor["predictor"], run.proposer.predictor.state_dict(), ("predictor", "predictor"))
    for name in ("run", "metrics", "scaler", "rng"):
        schema.check(own[name], now[name], (name,), free=OPEN)
    if type(run.schedule.scheduler).__module__.startswith("torch."):
        schema.check(own["scheduler"], now["scheduler"], ("scheduler",), free=("lr_lambdas",))
    schema.check(found["optimizer"]["groups"], live["optimizer"]["groups"], ("optimizer", "groups"))
    optimizer = found["optimizer"]
    if not isinstance(optimizer["state"], dict) or not isinstance(optimizer.get("rest"), dict | None):
        raise CheckpointError("the optimizer's state cannot be read")
    schema.check(found["optimizer"]["unowned"], live["optimizer"]["unowned"], ("optimizer", "unowned"))


def _apply(run: State, metrics: Metrics, found: dict[str, StateDict]) -> None:
    own, optimizer, predictor = found["trainer"], found["optimizer"], found.get("predictor")
    model_state.load(run.subject.model, found["model"], own["model"])
    with torch.no_grad():
        for live, extra in zip(_unowned(run), optimizer["unowned"], strict=True):
            local(live).copy_(extra)
    optimizer_state.restore(run.subject.model, run.subject.optimizer, optimizer)
    if run.schedule.scheduler is not None:
        stateful(run.schedule.scheduler).load_state_dict(own["scheduler"])
    if run.subject.grad_scaler is not None:
        run.subject.grad_scaler.load_state_dict(own["scaler"])
    if predictor is not None:
        run.adopt(predictor["name"])
        run.proposer.predictor.load_state_dict(predictor["predictor"])
        run.windows.basis.load_state_dict(predictor["basis"])
        run.windows.observer.load_state_dict(predictor.get("observer", {}))
    run.load_state_dict(own["run"])
    if predictor is None:
        run.windows.begin_without_basis()
    metrics.load_state_dict(own["metrics"])
    set_rng_state(own["rng"])


def _apply_own_rank(run: State, found: dict[str, StateDict]) -> None:
    """What this rank had of its own; the first one's, where there were others in number."""
    ranks = run.subject.ranks
    own = found.get("ranks", {}).get("own", [])
    if not ranks.alone and len(own) == ranks.size:
        set_rng_state(own[ranks.rank]["rng"])
        run.batches.load_state_dict(own[ranks.rank]["batches"])


def _unowned(run: State) -> list[Tensor]:
    """Parameters the optimizer holds but the model does not."""
    owned = {id(p) for p in run.subject.model.parameters()}
    return [p for p in optimizer_parameters(run.subject.optimizer) if id(p) not in owned]


def _optimizer_state(run: State) -> StateDict:
    taken = optimizer_state.taken(run.subject.model, run.subject.optimizer, lambda tensor, _: tensor.detach())
    return {**taken, "unowned": [local(p.detach()) for p in _unowned(run)]}


def memory_usage(run: State) -> dict[str, int]:
    """Bytes held beside model and optimizer: ``predictor``, ``corrector``, ``basis_<device>``, ``snapshots``.

    What the settings keep in host memory wherever the weights are has a name that ends in ``_host``.
    """
    trial = 0 if run.judge.probation is None else run.judge.probation.snapshot.memory_bytes()
    sketch = 0 if run.windows.sketch is None else run.windows.sketch.memory_bytes()
    parked = "_host" if run.parks_copies else ""
    rollback = "_host" if run.config.predictor.offload else ""
    snapshots = {f"snapshots{rollback}": run.rollback.memory_bytes()}
    name = f"snapshots{parked}"
    snapshots[name] = snapshots.get(name, 0) + run.safety.memory_bytes() + trial
    return {
        "predictor": run.proposer.predictor.memory_bytes(),
        "corrector": run.proposer.feedback.memory_bytes(),
        **({"encoder": run.windows.observer.memory_bytes()} if run.windows.observer.memory_bytes() else {}),
        **{f"basis_{device}": size for device, size in run.windows.basis.memory_bytes().items()},
        **run.optimizer_step.memory_bytes(),
        **({"sketch": sketch} if sketch else {}),
        **snapshots,
    }
