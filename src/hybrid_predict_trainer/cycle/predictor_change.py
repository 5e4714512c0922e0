"""``predictor.type = "auto"``: the predictor for exact losses where they are, ``secant`` elsewhere.

Whether losses are exact is known when the same batch has come twice and two evaluations of it agreed.  Then the run
goes over to the settings of the preset ``full_batch``, as far as the user left them at their defaults; where other
batches come for good it goes back.  A run whose losses are noisy all along is bit for bit one with ``secant``.
"""

from __future__ import annotations

import logging

from ..config.settings import EXACT, FOR_EXACT, NOISY, PORTFOLIO
from ..keep.failures import Place
from .state import State

log = logging.getLogger(__name__)

#: Batches in a row that are not the one before, after which a run no longer counts as full-batch training.
BACK_AFTER = 20


def choose_by_losses(run: State) -> None:
    """Between two steps: take the predictor that suits the losses, if the user left the choice."""
    if not run.proposer.chooses or run.judge.probation is not None or run.proposer.segment is not None:
        return
    exact = run.proposer.predictor.name in FOR_EXACT
    if not exact and run.full_batch:
        _go_over(run, PORTFOLIO if run.subject.can_solve else EXACT, "exact")
    elif exact and not run.full_batch:
        noisy = run.batches.same or run.batches.same_batch.num_different >= BACK_AFTER
        if noisy:
            _go_over(run, NOISY, "noisy")


def _go_over(run: State, name: str, losses: str) -> None:
    """Take the other predictor; where it cannot be had (no memory, say) the run keeps the one that it has."""
    try:
        run.choose(name)
    except Exception as error:
        run.proposer.keep_predictor()
        run.failures.note(Place.PREDICTOR, error, name=name)
        return
    log.info('predictor.type = "auto": losses are %s, predictor %s from here', losses, name)
