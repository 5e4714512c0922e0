"""What becomes of a run's memories when something outside it has changed the weights, or what is trained.

:meth:`State.overwritten` tells everything that remembers weights; here it is found out, and copies to go back to are
dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..keep.failures import Place
from ..keep.snapshot import Snapshot
from ..notices import warn
from ..weights import real_views
from ..weights.parameters import named_parameters
from ..weights.real_views import owner
from ..weights.shards import local
from ..weights.trained import Write
from .motions import end_motions
from .state import State

#: Times that somebody else may change the weights before the lookahead ends: one who does so at every step (weights
#: clipped after it, say) undoes a part of what it adds, and there is never a displacement to go by.
MAX_WRITES = 3


def notice(run: State) -> None:
    """Before a step: see whether weights were written to since the last, or are trained no more."""
    run.subject.reshard()  # the caller may have made a forward
    if run.config.never_predicts or run.failures.exhausted(Place.WEIGHTS):  # nothing is remembered of them
        return
    try:
        _notice(run)
    except Exception as error:
        on_unseen(run, error)


def _notice(run: State) -> None:
    real_views.follow(run.subject.views)
    write = run.watch.writes.look()
    if write is Write.CHANGED:
        on_changed(run)
    elif write is not Write.NONE:
        on_touched(run, write)
    on_trained(run, run.watch.trained.look_ahead())


def remember(run: State) -> None:
    """After a step, whatever became of it: the weights are as the run left them."""
    if run.config.never_predicts or run.failures.exhausted(Place.WEIGHTS):
        return
    try:
        run.watch.writes.record()
    except Exception as error:
        on_unseen(run, error)


def on_unseen(run: State, error: Exception) -> None:
    """What was done to the weights cannot be seen: what remembers them begins anew, and ends if that goes on."""
    run.failures.note(Place.WEIGHTS, error)
    forget(run)
    if run.failures.exhausted(Place.WEIGHTS):
        end_motions(run)


def on_changed(run: State) -> None:
    """The weights are others than the run left: everything that remembers the old ones begins anew."""
    run.meter.outside_write()
    if run.meter.num_outside_writes == 1:
        warn(
            "weights were changed between two steps by something else than this trainer: what was learnt from those "
            f"before is dropped; after {MAX_WRITES} times the lookahead ends, if every step is followed by such a "
            "change (clipped weights, say) lookahead.extrapolation = 0 and lookahead.damping = 0 say so from the start",
        )
    forget(run)
    if run.meter.num_outside_writes >= MAX_WRITES:
        run.optimizer_step.switchback.switch_off()


def on_touched(run: State, write: Write) -> None:
    """Weights were written to and are the same, as far as a sample tells.

    What spans this moment is dropped, in case that they changed in few places; what was learnt before is kept.  Copies
    to go back to are kept where all were swapped out and in again, as for a validation with averaged weights.
    """
    run.windows.restart_window()
    run.optimizer_step.on_touch()
    if write is Write.TOUCHED:
        run.end_probation()
        drop_points(run)


def on_training(run: State) -> None:
    """Between backward and step: see what is trained."""
    if run.config.never_predicts or run.failures.exhausted(Place.WEIGHTS):
        return
    try:
        on_trained(run, run.watch.trained.look())
    except Exception as error:
        on_unseen(run, error)


def on_trained(run: State, places: Sequence[int]) -> None:
    """Parameters that were trained are not trained any more, or are again."""
    if not places:
        return
    run.overwritten()
    run.optimizer_step.lookahead.begin_anew(run.subject.parameters, places)
    for point in (run.rollback.point, *run.safety.points):
        if point is not None:
            _keep_in_place(run, point, places)


def forget(run: State) -> None:
    """Whatever remembers weights, or steps between them, begins anew."""
    run.overwritten()
    run.optimizer_step.lookahead.forget()
    drop_points(run)


def drop_points(run: State) -> None:
    """Copies of the weights from before: nobody may go back to them."""
    run.rollback.drop()
    run.safety.forget_weights()


@torch.no_grad()
def _keep_in_place(run: State, anchor: Snapshot, places: Sequence[int]) -> None:
    """These parameters are not to move when the run goes back to its anchor."""
    names = {id(p): name for name, p in named_parameters(run.subject.model, run.subject.optimizer).items()}
    held = list(names.values()) if anchor.names is None else anchor.names
    for i in places:
        parameter = owner(run.subject.parameters[i])
        name = names.get(id(parameter))
        if name in held:  # not if neither model nor optimizer holds it any more
            anchor.parameters[held.index(name)].copy_(local(parameter))
