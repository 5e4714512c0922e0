"""Which predictor a run has by its settings, and all that is made for it.

For exact losses that is the portfolio where the run has ``residual_fn`` or ``output_fn``, and quasi-Newton elsewhere:
without closed form the portfolio's own steps end above it (LOG.md).  When a run goes over from one to the other is
said in :mod:`.predictor_change`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..config import presets
from ..config.settings import (
    AUTO,
    CLOSED_FORM,
    EXACT,
    NEED_RESIDUALS,
    NOISY,
    PORTFOLIO,
    SOURCES,
    HybridTrainerConfig,
)
from ..config.toml import valid_keys, with_values
from ..keep.failures import Failures
from ..keep.subject import Subject
from ..observe.basis import Basis
from ..observe.guarded_observer import GuardedObserver
from ..observe.window_encoder import NullObserver, Observer, observer_for
from ..predictors import Hold, Paced, Predictor, build
from ..propose.feedback import Feedback
from ..propose.sources.base import Source
from ..propose.sources.dense import DenseQuasiNewton, LimitedQuasiNewton, fits
from ..propose.sources.gauss_newton import GaussNewton
from ..propose.sources.least_squares import Convex, LeastSquares
from ..propose.sources.portfolio import Portfolio, clock_for
from ..propose.time_budget import TimeBudget
from ..records import ConfigError
from ..version import PACKAGE
from ..weights.algebra import LARGE
from ..weights.parameters import Groups


def _value(config: HybridTrainerConfig, path: tuple[str, ...]) -> Any:
    value: Any = config
    for name in path:
        value = getattr(value, name)
    return value


#: Whose settings come with a predictor, as far as the user left them at their defaults.
COMES_WITH = {
    EXACT: presets.PRESETS["full_batch"], PORTFOLIO: presets.PRESETS["full_batch"], CLOSED_FORM: presets.CLOSED_FORM
}  # fmt: skip


def settled(config: HybridTrainerConfig) -> HybridTrainerConfig:
    """The settings that a run begins with: those that come with a source of proposals, or the noisy ones."""
    if config.predictor_type == AUTO:
        return settings_for(config, NOISY)
    if config.predictor_type in SOURCES:
        return settings_for(config, SOURCES[config.predictor_type])
    return config


def settings_for(config: HybridTrainerConfig, name: str) -> HybridTrainerConfig:
    """The settings of a run with ``predictor.type = "auto"`` whose predictor is ``name`` now.

    Args:
        config: The user's.
        name: ``NOISY``, ``EXACT`` or ``PORTFOLIO``; the latter two take along what preset ``full_batch`` sets and the
            user did not.
    """
    chosen: dict[str, Any] = {"predictor.type": name}
    if name in COMES_WITH:
        keys, defaults = valid_keys(), HybridTrainerConfig()
        for key, value in COMES_WITH[name].items():
            if key != "predictor.type" and _value(config, keys[key]) == _value(defaults, keys[key]):
                chosen[key] = value
    return with_values(config, chosen)


@dataclass(frozen=True, slots=True)
class Parts:
    """A predictor, and what is made for it; the observer is None where nothing is observed.

    Attributes:
        on_trial: The basis is kept only while displacements can be predicted: on large models, where it is many copies
            of the weights; not for what has to learn from every window, and not for a predictor of the user's own.
    """

    predictor: Predictor
    time: TimeBudget
    feedback: Feedback
    basis: Basis
    groups: Groups
    observer: Observer | None
    on_trial: bool = False


def parts_for(
    subject: Subject, config: HybridTrainerConfig, predictor: Predictor | None, failures: Failures, *, hands_off: bool
) -> Parts:
    """Make a predictor and all that depends on it; nothing is observed yet.

    Args:
        subject: What is trained.
        config: Settings.
        predictor: The user's own; None: the one that is named in the settings.
        failures: Count what raises.
        hands_off: Only the optimizer may move weights: nothing is proposed.
    """
    groups = subject.groups
    if predictor is None and config.predictor_type in NEED_RESIDUALS:
        predictor = Hold() if config.never_predicts else _closed_form(subject, config)
    if predictor is None and config.predictor_type == PORTFOLIO:
        predictor = Hold() if config.never_predicts else _portfolio(subject, config)  # None: nothing to solve for
        config = config if predictor is not None else replace(config, predictor_type=EXACT)
    if predictor is None and config.predictor_type == EXACT and not config.never_predicts:
        predictor = _own_steps(subject, config)  # None: the limited form
    if predictor is None:
        predictor = build(config, groups.num_groups, groups.num_weights)
    spec = predictor.spec
    own = type(predictor).__module__.startswith(f"{PACKAGE}.")
    time = TimeBudget(own=own, paced=isinstance(predictor, Paced), source=isinstance(predictor, Source))
    if isinstance(predictor, Portfolio) and predictor.clock:  # what is compared is measured by one clock
        time = TimeBudget(own=own, paced=False, source=True, clock=predictor.clock)
    groups = groups.pooled() if spec.pooled else groups
    basis = Basis(
        subject.parameters, groups, spec, dtype=config.predictor.basis_dtype, offload=config.predictor.offload
    )
    observer: Observer | None = None
    if not config.never_predicts and not hands_off:
        observer = observer_for(
            config.encoder, predictor, subject.model, subject.parameters, groups, spec, subject.grad_scaler
        )
        if not isinstance(observer, NullObserver):
            observer = GuardedObserver(observer, failures)
    feedback = Feedback(config, spec, groups.num_groups, failures)
    on_trial = own and isinstance(observer, NullObserver) and not spec.differences and not config.predictor.keep_basis
    return Parts(predictor, time, feedback, basis, groups, observer, on_trial and groups.num_weights > LARGE)


def _portfolio(subject: Subject, config: HybridTrainerConfig) -> Portfolio | None:
    """Closed form, a dense matrix where it fits, and pairs; None where the run cannot have it."""
    if not subject.can_solve:
        return None
    settings, longest = config.predictor.quasi_newton, max(config.max_predict_steps, 1)
    limited = replace(settings, form="wolfe", update="ssbfgs" if settings.update == "ssbroyden" else settings.update)
    closed = _closed_form(subject, config)
    closed.search_dampings()
    sources: dict[str, Source] = {"gauss_newton": closed}
    sources["wolfe"] = LimitedQuasiNewton(limited, subject.loss_fn, longest=longest)
    if fits(settings, subject.groups.num_weights, max(p.element_size() for p in subject.parameters)):
        dense = replace(settings, form="dense", update="ssbroyden")
        sources["dense"] = DenseQuasiNewton(dense, subject.loss_fn, longest=longest)
    measured = config.predictor.source_price == "measured"
    return Portfolio(sources, clock_for(subject.parameters[0].device) if measured else None)


def _closed_form(subject: Subject, config: HybridTrainerConfig) -> GaussNewton:
    """The source of closed-form moves, with what it needs of the subject."""
    problem: LeastSquares | Convex
    if subject.residual_fn is not None:
        problem = LeastSquares(subject.residual_fn)
    elif subject.output_fn is not None:
        problem = Convex(subject.output_fn)
    else:
        raise ConfigError(f"predictor.type = {config.predictor_type!r} needs residual_fn or output_fn")
    rate = lambda: float(subject.optimizer.param_groups[0].get("lr", 1.0))  # noqa: E731
    return GaussNewton(
        config.predictor.gauss_newton, problem, rate, longest=max(config.max_predict_steps, 1), seed=config.seed
    )


def _own_steps(subject: Subject, config: HybridTrainerConfig) -> Predictor | None:
    """The form of ``quasi_newton`` that takes steps of its own, where it is asked for and fits.

    Raises:
        ConfigError: it is asked for and does not fit.
    """
    settings, num_weights = config.predictor.quasi_newton, subject.groups.num_weights
    if settings.form == "limited":
        return None
    longest = max(config.max_predict_steps, 1)
    if settings.form == "wolfe":
        return LimitedQuasiNewton(settings, subject.loss_fn, longest=longest)
    itemsize = max(p.element_size() for p in subject.parameters)
    if fits(settings, num_weights, itemsize):
        return DenseQuasiNewton(settings, subject.loss_fn, longest=longest)
    if settings.form == "auto":
        return None
    needed = num_weights**2 * itemsize / 2**20
    raise ConfigError(
        f'predictor.quasi_newton.form = "dense" needs {needed:.0f} MB for {num_weights} weights: raise '
        f'predictor.quasi_newton.memory_mb = {settings.memory_mb:g}, or set form to "auto"'
    )
