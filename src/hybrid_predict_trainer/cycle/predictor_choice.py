"""Which predictor a run has, and ``predictor.type = "auto"``: quasi-Newton where losses are exact, secant elsewhere.

Whether losses are exact is known when the same batch has come twice and two evaluations of it agreed.  Then the run
goes over to the settings of the preset ``full_batch``, as far as the user left them at their defaults; where other
batches come for good it goes back.  A run whose losses are noisy all along is bit for bit one with ``secant``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..config.presets import PRESETS
from ..config.settings import EXACT, NOISY, HybridTrainerConfig
from ..config.toml import valid_keys, with_values
from ..keep.failures import Place
from ..observe.basis import Basis
from ..observe.guarded_observer import GuardedObserver
from ..observe.window_encoder import NullObserver, Observer, observer_for
from ..predictors import Paced, Predictor, build
from ..propose.feedback import Adaptation
from ..propose.time_budget import TimeBudget
from ..version import PACKAGE
from .phases import controller_for

if TYPE_CHECKING:
    from .state import Run

log = logging.getLogger(__name__)


#: Batches in a row that are not the one before, after which a run no longer counts as full-batch training.
BACK_AFTER = 20


def _value(config: HybridTrainerConfig, path: tuple[str, ...]) -> Any:
    value: Any = config
    for name in path:
        value = getattr(value, name)
    return value


def settings_for(config: HybridTrainerConfig, name: str) -> HybridTrainerConfig:
    """The settings of a run with ``predictor.type = "auto"`` whose predictor is ``name`` now.

    Args:
        config: The user's.
        name: ``NOISY`` or ``EXACT``; the latter takes along what preset ``full_batch`` sets and the user did not.
    """
    chosen: dict[str, Any] = {"predictor.type": name}
    if name == EXACT:
        keys, defaults = valid_keys(), HybridTrainerConfig()
        for key, value in PRESETS["full_batch"].items():
            if _value(config, keys[key]) == _value(defaults, keys[key]):
                chosen[key] = value
    return with_values(config, chosen)


def bind(run: Run, config: HybridTrainerConfig, predictor: Predictor | None = None) -> None:
    """Give a run its predictor and all that depends on it; nothing is observed yet.

    Args:
        run: Has its parameters and role groups.
        config: Settings.
        predictor: The user's own; None: the one that is named in the settings.
    """
    run.config = config
    groups = run.role_groups
    run.predictor = predictor if predictor is not None else build(config, groups.num_groups, groups.num_weights)
    own = type(run.predictor).__module__.startswith(f"{PACKAGE}.")
    run.time = TimeBudget(own=own, paced=isinstance(run.predictor, Paced))
    run.groups = groups.pooled() if run.predictor.spec.pooled else groups
    run.basis = Basis(
        run.parameters, run.groups, run.predictor.spec,
        dtype=config.predictor.basis_dtype, offload=config.predictor.offload,
    )  # fmt: skip
    run.phases.follow(controller_for(config))
    run.observing = not config.never_predicts and run.hands_off is None
    observer: Observer = NullObserver()
    if run.observing:
        observer = observer_for(
            config.encoder, run.predictor, run.model, run.parameters, run.groups, run.predictor.spec, run.grad_scaler
        )
        if not isinstance(observer, NullObserver):
            observer = GuardedObserver(observer, run.failures)
    run.observer = observer
    run.adaptation = Adaptation(config, run.predictor.spec, run.groups.num_groups, run.failures)
    run.horizon = min(max(config.min_predict_steps, 4 * config.predictor.window), max(config.max_predict_steps, 1))


#: What :func:`bind` sets.
_BOUND = (
    "config", "predictor", "time", "groups", "basis", "observing", "observer", "adaptation", "horizon",
)  # fmt: skip


def choose(run: Run, name: str) -> None:
    """Go over to another predictor: what was observed for the old one is dropped."""
    bind(run, settings_for(run.settings, name))
    run.ledger.config = run.config.gate
    run.window, run.segment, run.correction = None, None, None
    run.window_just_closed, run.refused = False, False
    run.num_rest_steps, run.lr_integral = 0, 0.0


def choose_by_losses(run: Run) -> None:
    """Between two steps: take the predictor that suits the losses, if the user left the choice."""
    if not run.chooses or run.probation is not None or run.segment is not None:
        return
    if run.predictor.name != EXACT and run.deterministic:
        _go_over(run, EXACT, "exact")
    elif run.predictor.name == EXACT and not run.deterministic:
        noisy = run.same_batch or run.data.num_different >= BACK_AFTER
        if noisy:
            _go_over(run, NOISY, "noisy")


def _go_over(run: Run, name: str, losses: str) -> None:
    """Take the other predictor; where it cannot be had (no memory, say) the run keeps the one that it has."""
    before = {attribute: getattr(run, attribute) for attribute in _BOUND}
    try:
        choose(run, name)
    except Exception as error:
        for attribute, value in before.items():
            setattr(run, attribute, value)
        run.chooses = False
        run.failures.note(Place.PREDICTOR, error, name=name)
        return
    log.info('predictor.type = "auto": losses are %s, predictor %s from here', losses, name)
