"""Settings: frozen dataclasses that check their ranges.  Reading and writing is in :mod:`.toml`."""

from __future__ import annotations

import difflib
import math
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..records import ConfigError
from .former import with_former_names
from .keys import short, with_values
from .presets import AUTO as CHOICE
from .presets import PRESETS, choose

if TYPE_CHECKING:
    import torch

Clock = Literal["cost", "credited", "claimed"]
Interval = Literal["step", "epoch"]


def _check(ok: bool, key: str, value: object, legal: str) -> None:
    if not ok:
        raise ConfigError(f"{key} = {value!r} is out of range: must be {legal}")


def _number(key: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{key} = {value!r} is not a number")
    left = "(" if open_low else "["
    inside = (value > low if open_low else value >= low) and value <= high and math.isfinite(value)
    _check(
        inside,
        key,
        value,
        f"in {left}{low:g}, {high:g}]" if math.isfinite(high) else f"{'>' if open_low else '>='} {low:g}",
    )


def _whole(key: str, value: object, low: int, high: int = 1_000_000_000) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{key} = {value!r} is not a whole number")
    _check(low <= value <= high, key, value, f"in [{low}, {high}]")


def _choice(key: str, value: object, legal: tuple[str, ...]) -> None:
    if value not in legal:
        near = difflib.get_close_matches(str(value), legal, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key} = {value!r} is unknown: must be one of {', '.join(legal)}{hint}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecantConfig:
    """Multi-secant quadratic model of the loss in the span of the trajectory."""

    num_displacements: int = 16  # K: secant pairs kept
    damping: tuple[float, ...] = (0.1, 0.01, 0.001, 0.0001)  # lambda: floor of |mu| relative to the largest
    rank_tolerance: float = 1e-2  # relative length under which a direction is rounding noise
    max_scale: float = 8.0  # longest multiple of the jump the gate may try
    finite_horizon: bool = False  # limit each direction to what Y gradient steps would do

    def __post_init__(self) -> None:
        """Check ranges."""
        _whole("predictor.secant.num_displacements", self.num_displacements, 2, 256)
        _check(len(self.damping) > 0, "predictor.secant.damping", self.damping, "a list of at least one number")
        for value in self.damping:
            _number("predictor.secant.damping", value, 0.0, 1.0, open_low=True)
        _number("predictor.secant.rank_tolerance", self.rank_tolerance, 0.0, 0.5)
        _number("predictor.secant.max_scale", self.max_scale, 1.0, 1024.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuasiNewtonConfig:
    """Limited-memory BFGS step from the gradients of real steps; for full-batch training."""

    history: int = 400  # most pairs kept: on small networks 100 end ten times as high
    pairs_memory_mb: float = 256.0  # larger models keep fewer pairs, but no fewer than MIN_HISTORY
    memory_mb: float = 256.0  # for the matrix of the dense form
    self_scaling: bool = True  # divide the matrix by tau before an update; without, it is L-BFGS
    shrink: tuple[float, ...] = (1.0, 0.3, 0.05)  # multiples of the step tried until the loss falls
    form: Literal["limited", "wolfe", "dense", "auto"] = "limited"  # dense: all weights; auto: where that fits
    update: Literal["bfgs", "ssbfgs", "ssbroyden"] = "ssbfgs"  # ssbroyden: of the dense form only

    def __post_init__(self) -> None:
        """Check ranges."""
        _whole("predictor.quasi_newton.history", self.history, 1, 10_000)
        _number("predictor.quasi_newton.pairs_memory_mb", self.pairs_memory_mb, 0.0, open_low=True)
        _number("predictor.quasi_newton.memory_mb", self.memory_mb, 0.0, open_low=True)
        _check(len(self.shrink) > 0, "predictor.quasi_newton.shrink", self.shrink, "a list of at least one number")
        for value in self.shrink:
            _number("predictor.quasi_newton.shrink", value, 0.0, 10.0, open_low=True)
        _choice("predictor.quasi_newton.form", self.form, ("limited", "wolfe", "dense", "auto"))
        _choice("predictor.quasi_newton.update", self.update, ("bfgs", "ssbfgs", "ssbroyden"))
        if self.form in ("limited", "wolfe") and self.update == "ssbroyden":
            raise ConfigError(
                'predictor.quasi_newton.update = "ssbroyden" needs the whole matrix: set form to "dense" or "auto"'
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussNewtonConfig:
    """Closed-form training of the linearised model; needs ``residual_fn`` or ``output_fn``."""

    filter: Literal["damped", "flow"] = "damped"  # limit of damping, or gradient flow for a time (eigenvectors)
    form: Literal["auto", "kernel", "weight", "cg"] = "auto"  # auto: the smaller matrix, cg where neither fits
    initial_damping: float = 1e-2  # relative to the mean eigenvalue of the kernel
    rows: Literal["auto", "all"] = "auto"  # auto: a sample of the residuals for as long as it tells what all would
    second_order: bool = True  # correct every move by the second derivative along it
    linearizations: int = 8  # moves of one proposal, each from where the last one ended
    chain: int = 8  # proposals in a row without a real step between them
    largest_matrix: int = 6000  # side of a matrix that is still factorised
    memory_mb: float = 1024.0  # for that matrix, or a Jacobian that has to be written out
    chunk_rows: int = 64  # residuals differentiated at a time where one backward does not tell all their gradients
    cg_iterations: int = 200
    cg_rank: int = 50  # of the preconditioner

    def __post_init__(self) -> None:
        """Check ranges."""
        _choice("predictor.gauss_newton.filter", self.filter, ("damped", "flow"))
        _choice("predictor.gauss_newton.rows", self.rows, ("auto", "all"))
        _choice("predictor.gauss_newton.form", self.form, ("auto", "kernel", "weight", "cg"))
        _number("predictor.gauss_newton.initial_damping", self.initial_damping, 0.0, 1e8, open_low=True)
        for name in ("linearizations", "chain", "largest_matrix", "chunk_rows", "cg_iterations", "cg_rank"):
            _whole(f"predictor.gauss_newton.{name}", getattr(self, name), 1)
        _number("predictor.gauss_newton.memory_mb", self.memory_mb, 0.0, open_low=True)
        if self.filter == "flow" and self.form == "cg":
            raise ConfigError(
                'predictor.gauss_newton.filter = "flow" needs eigenvectors: form must be auto, kernel or weight'
            )
        if not isinstance(self.second_order, bool):
            raise ConfigError(f"predictor.gauss_newton.second_order = {self.second_order!r} must be true or false")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearConfig:
    """Online ridge on hindsight-optimal coefficients."""

    feature_dim: int = 128  # first numbers of the encoded state that the loss is regressed on
    num_displacements: int = 6  # columns kept: two per oscillation that is to be continued, and two to spare
    l2_regularization: float = 0.01
    forgetting: float = 0.9  # weight of a window one window later

    def __post_init__(self) -> None:
        """Check ranges."""
        _whole("predictor.linear.feature_dim", self.feature_dim, 1, 4096)
        _whole("predictor.linear.num_displacements", self.num_displacements, 2, 256)
        _number("predictor.linear.l2_regularization", self.l2_regularization, 0.0, open_low=True)
        _number("predictor.linear.forgetting", self.forgetting, 0.0, 1.0, open_low=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class DmdConfig:
    """Linear dynamics fitted to successive displacements."""

    num_displacements: int = 8  # columns kept
    delays: int = 2  # snapshots stacked: momentum's state is a position and a velocity
    rank_tolerance: float = 1e-3  # relative length under which a direction is rounding noise

    def __post_init__(self) -> None:
        """Check ranges."""
        _whole("predictor.dmd.num_displacements", self.num_displacements, 3, 256)
        _whole("predictor.dmd.delays", self.delays, 1, 64)
        _number("predictor.dmd.rank_tolerance", self.rank_tolerance, 0.0, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpConfig:
    """Network on the encoded state, trained online."""

    hidden: tuple[int, ...] = (256, 128)
    dropout: float = 0.1
    num_displacements: int = 6  # columns kept; the longest target needs more than 4
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 64
    updates_per_window: int = 4  # a count, not a time: resumed runs stay bit for bit the same
    num_samples: int = 8  # dropout masks per prediction
    replay_windows: int = 2048

    def __post_init__(self) -> None:
        """Check ranges."""
        _check(len(self.hidden) > 0, "predictor.mlp.hidden", self.hidden, "a list of at least one width")
        for width in self.hidden:
            _whole("predictor.mlp.hidden", width, 1, 65536)
        _number("predictor.mlp.dropout", self.dropout, 0.0, 0.9)
        _whole("predictor.mlp.num_displacements", self.num_displacements, 5, 256)
        _number("predictor.mlp.learning_rate", self.learning_rate, 0.0, 1.0, open_low=True)
        _number("predictor.mlp.weight_decay", self.weight_decay, 0.0, 1.0)
        _whole("predictor.mlp.batch_size", self.batch_size, 1, 65536)
        _whole("predictor.mlp.updates_per_window", self.updates_per_window, 0, 10_000)
        _whole("predictor.mlp.num_samples", self.num_samples, 1, 1024)
        _whole("predictor.mlp.replay_windows", self.replay_windows, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class RssmConfig:
    """Recurrent state-space model of training: deterministic and stochastic path, ensemble."""

    deterministic_dim: int = 256  # of the GRU
    stochastic_dim: int = 32  # categorical variables
    num_categoricals: int = 32  # classes of each
    ensemble_size: int = 3
    hidden_dim: int = 128
    num_displacements: int = 6  # columns kept; the longest target needs more than 4
    learning_rate: float = 1e-3
    gradient_clip: float = 1000.0  # global norm; usual ones are 100 to 1000
    free_nats: float = 1.0
    unimix: float = 0.01
    sequence_length: int = 8  # windows of truncated backpropagation through time
    batch_size: int = 8
    updates_per_window: int = 1  # a count, not a time: resumed runs stay bit for bit the same
    num_samples: int = 4  # rollouts per member and prediction
    replay_windows: int = 2048

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("deterministic_dim", "stochastic_dim", "num_categoricals", "hidden_dim"):
            _whole(f"predictor.rssm.{name}", getattr(self, name), 2, 65536)
        _whole("predictor.rssm.ensemble_size", self.ensemble_size, 1, 64)
        _whole("predictor.rssm.num_displacements", self.num_displacements, 5, 256)
        _number("predictor.rssm.learning_rate", self.learning_rate, 0.0, 1.0, open_low=True)
        _number("predictor.rssm.gradient_clip", self.gradient_clip, 0.0, open_low=True)
        _number("predictor.rssm.free_nats", self.free_nats, 0.0)
        _number("predictor.rssm.unimix", self.unimix, 0.0, 0.5)
        _whole("predictor.rssm.sequence_length", self.sequence_length, 2, 1024)
        _whole("predictor.rssm.batch_size", self.batch_size, 1, 1024)
        _whole("predictor.rssm.updates_per_window", self.updates_per_window, 0, 10_000)
        _whole("predictor.rssm.num_samples", self.num_samples, 1, 1024)
        _whole("predictor.rssm.replay_windows", self.replay_windows, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorConfig:
    """The window, the storage of the basis, and one table per predictor."""

    window: int = 10  # N: real steps whose mean is one basis point
    rest_windows: int = 1  # windows not observed after each, where losses are noisy: halves the cost of watching
    update_budget: float = 0.01  # most of the real steps' time that a network's training may take; 0: no bound
    basis_dtype: Literal["float32", "bfloat16", "param"] = "param"
    offload: bool = False  # keep the basis in host memory
    source_price: Literal["counted", "measured"] = "counted"  # portfolio: by sizes, alike everywhere, or by the clock
    keep_basis: bool = False  # also on large models whose displacements cannot be predicted
    secant: SecantConfig = field(default_factory=SecantConfig)
    quasi_newton: QuasiNewtonConfig = field(default_factory=QuasiNewtonConfig)
    gauss_newton: GaussNewtonConfig = field(default_factory=GaussNewtonConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    dmd: DmdConfig = field(default_factory=DmdConfig)
    mlp: MlpConfig = field(default_factory=MlpConfig)
    rssm: RssmConfig = field(default_factory=RssmConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        _whole("predictor.window", self.window, 1, 1_000_000)
        _whole("predictor.rest_windows", self.rest_windows, 0, 1_000)
        _number("predictor.update_budget", self.update_budget, 0.0)
        _choice("predictor.source_price", self.source_price, ("counted", "measured"))
        _choice("predictor.basis_dtype", self.basis_dtype, ("float32", "bfloat16", "param"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectorConfig:
    """Residual correction of forecasts (predictors that use curvature are not corrected)."""

    max_magnitude: float = 0.2  # bound on a correction, in lengths of the predicted jump; 0: no correction
    capacity: int = 200  # residuals kept
    similarity: float = 0.7  # least cosine of a residual's state
    num_similar: int = 5  # most residuals used

    def __post_init__(self) -> None:
        """Check ranges."""
        _number("corrector.max_magnitude", self.max_magnitude, 0.0, 1.0)
        _whole("corrector.capacity", self.capacity, 1, 100_000)
        _number("corrector.similarity", self.similarity, 0.0, 1.0)
        _whole("corrector.num_similar", self.num_similar, 1, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """The encoded state, for predictors that ask for it, and what may be watched besides.

    A predictor that declares ``wants_encoding`` gets sketch and latent; low-rank and Kronecker factors
    are extra numbers of the same state.  Nothing of it is kept for a predictor that does not ask.
    """

    sketch_size: int = 100  # numbers of the count sketch of the newest displacement; 0: none
    latent_dim: int = 64  # of the streaming PCA of the encoded windows; 0: none
    low_rank: int = 0  # rank of the displacement's factors by power iteration; 0: none; one more weight copy
    kfac: bool = False  # Kronecker factors of the curvature, from one step of every window
    kfac_memory_mb: float = 64.0  # of all factors; the largest are kept as diagonals until they fit
    health: int = 0  # windows between two reports on gradient health; 0: none

    def __post_init__(self) -> None:
        """Check ranges."""
        _whole("encoder.sketch_size", self.sketch_size, 0, 65536)
        _whole("encoder.latent_dim", self.latent_dim, 0, 1024)
        _whole("encoder.low_rank", self.low_rank, 0, 256)
        _number("encoder.kfac_memory_mb", self.kfac_memory_mb, 0.0, open_low=True)
        _whole("encoder.health", self.health, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LookaheadConfig:
    """Lookahead with a drift, between real steps with noisy losses under a schedule (:mod:`..move.lookahead`).

    ``damping`` 0.5 with ``drift`` 0 and ``extrapolation`` 0 is Lookahead (arXiv 1907.08610).
    """

    extrapolation: float = 0.3  # beta: weight of the extrapolated drift, every 3 steps; 0: off
    damping: float = 0.25  # kappa: share of each 3-step displacement that is removed; 0: off
    drift: float = 1.0  # delta: how much of the removed share the drift replaces; 0: none (plain Lookahead)
    scope: Literal["blocks", "all"] = "blocks"  # networks with attention or MLP blocks, or all
    holdout_fraction: float | Literal["gate"] = (
        "gate"  # blocks of steps that go without; "gate": as gate.holdout_fraction
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        _number("lookahead.extrapolation", self.extrapolation, 0.0, 2.0)
        _number("lookahead.damping", self.damping, 0.0, 1.0)
        _number("lookahead.drift", self.drift, 0.0, 1.0)
        _choice("lookahead.scope", self.scope, ("blocks", "all"))
        if self.holdout_fraction != "gate":
            _number("lookahead.holdout_fraction", self.holdout_fraction, 0.0, 0.5)


@with_former_names({"control_fraction": "holdout_fraction"})
@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """How a proposal is judged and what it may cost."""

    judge_at: Literal["auto", "current", "average"] = "auto"  # auto: the raw weights if every batch is the same
    exact: Literal["auto", "always", "never"] = "auto"  # every batch is the whole data set; auto: looks
    overhead_budget: float = 0.005  # share of the run that prediction may lose
    overhead_budget_exact: float = 0.1  # the same where losses are exact and no gain is luck
    significance: float = 0.05  # one-sided level of the paired test
    max_chunks: int = 8  # pieces a half batch is cut into for the paired test
    max_relative_length: float = 1000.0  # rho: RMS of the jump over the RMS the basis spans, per tensor
    min_reduction_ratio: float = 0.0  # measured >= ratio * predicted reduction
    min_persistence: float = 0.05  # least share of a gate gain that is taken to last, in the price of a test
    holdout_fraction: float = 0.1  # approved jumps that are skipped to measure the true effect
    max_backoff: int = 16  # windows to wait at most after refusals
    switch_off_after: int = 8  # consecutive ledger checks that show a loss

    def __post_init__(self) -> None:
        """Check ranges."""
        _choice("gate.judge_at", self.judge_at, ("auto", "current", "average"))
        _choice("gate.exact", self.exact, ("auto", "always", "never"))
        _number("gate.overhead_budget", self.overhead_budget, 0.0, 1.0)
        _number("gate.overhead_budget_exact", self.overhead_budget_exact, 0.0, 1.0)
        _number("gate.significance", self.significance, 0.0, 0.5, open_low=True)
        _whole("gate.max_chunks", self.max_chunks, 2, 1024)
        _number("gate.max_relative_length", self.max_relative_length, 0.0, open_low=True)
        _number("gate.min_reduction_ratio", self.min_reduction_ratio, 0.0, 1.0)
        _number("gate.min_persistence", self.min_persistence, 0.0, 1.0, open_low=True)
        _number("gate.holdout_fraction", self.holdout_fraction, 0.0, 0.5)
        _whole("gate.max_backoff", self.max_backoff, 1)
        _whole("gate.switch_off_after", self.switch_off_after, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceConfig:
    """Thresholds of the divergence monitor."""

    gradient_norm_multiplier: float = 10.0  # warning, over the warm-up baseline; caution at 0.3 of it
    critical_multiplier: float = 100.0
    vanishing_gradient_threshold: float = 0.01
    prediction_error_caution: float = 0.1
    prediction_error_threshold: float = 0.2
    prediction_error_critical: float = 1.0  # loss above 2x predicted
    max_sign_changes: int = 3  # of the detrended, smoothed loss in 10 steps
    confidence_exit: float = 0.1  # a jump in segments is not continued below it
    check_interval_steps: int = 10  # how often an accelerator's losses are read
    max_consecutive_nonfinite: int = 20
    max_rollbacks: int = 5  # in a row; then prediction is switched off
    recovery_full_steps: int = 0  # full steps forced by a warning; 0: twice training.full_steps
    retry_learning_rate_factor: float = 0.5  # applied after every 5 critical steps in a row

    def __post_init__(self) -> None:
        """Check ranges."""
        _number("divergence.gradient_norm_multiplier", self.gradient_norm_multiplier, 1.0, open_low=True)
        _number("divergence.critical_multiplier", self.critical_multiplier, 1.0, open_low=True)
        _check(
            self.critical_multiplier >= self.gradient_norm_multiplier,
            "divergence.critical_multiplier", self.critical_multiplier,
            f"at least divergence.gradient_norm_multiplier = {self.gradient_norm_multiplier:g}",
        )  # fmt: skip
        _number("divergence.vanishing_gradient_threshold", self.vanishing_gradient_threshold, 0.0, 1.0)
        _number("divergence.prediction_error_caution", self.prediction_error_caution, 0.0, open_low=True)
        _number("divergence.prediction_error_threshold", self.prediction_error_threshold, 0.0, open_low=True)
        _number("divergence.prediction_error_critical", self.prediction_error_critical, 0.0, open_low=True)
        _whole("divergence.max_sign_changes", self.max_sign_changes, 1, 10)
        _number("divergence.confidence_exit", self.confidence_exit, 0.0, 1.0)
        _whole("divergence.check_interval_steps", self.check_interval_steps, 1)
        _whole("divergence.max_consecutive_nonfinite", self.max_consecutive_nonfinite, 1)
        _whole("divergence.max_rollbacks", self.max_rollbacks, 0)
        _whole("divergence.recovery_full_steps", self.recovery_full_steps, 0)
        _number("divergence.retry_learning_rate_factor", self.retry_learning_rate_factor, 0.0, 1.0, open_low=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """What is recorded, and where to."""

    path: str = ""  # JSONL file; empty: in memory only
    log_interval: int = 100
    histogram_bins: int = 50
    save_predictions: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        _whole("metrics.log_interval", self.log_interval, 1)
        _whole("metrics.histogram_bins", self.histogram_bins, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    directory: str = ""  # empty: only on request
    save_interval: int = 1000
    keep_last_n: int = 3
    async_save: bool = False  # those of the interval are copied, and written while training goes on
    include_predictor: bool = True
    # weights that are frozen, as they were at the start: "auto" leaves them out where they outweigh what trains
    include_frozen: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        """Check ranges."""
        _whole("checkpoint.save_interval", self.save_interval, 1)
        _choice("checkpoint.include_frozen", self.include_frozen, ("auto", "always", "never"))
        _whole("checkpoint.keep_last_n", self.keep_last_n, 1)


@with_former_names({
    "max_learned_scale": "max_lr_multiplier", "min_learned_scale": "min_group_factor",
    "lookahead": "lookahead.extrapolation", "smoothing": "lookahead.damping", "drift": "lookahead.drift",
    "lookahead_scope": "lookahead.scope",
})  # fmt: skip
@dataclass(frozen=True, slots=True, kw_only=True)
class HybridTrainerConfig:
    """All settings of a :class:`~hybrid_predict_trainer.HybridTrainer`; docs/configuration.md has a row for each.

    Frozen; ``dataclasses.replace`` or :func:`~hybrid_predict_trainer.with_values` make changed ones.

    Raises:
        ConfigError: a value is out of range; the message names the key and the legal range.
    """

    warmup_steps: int = 100
    full_steps: int = 20  # between proposals, at least; where losses are exact a closed window is enough
    max_predict_steps: int = 80
    confidence_threshold: float = 0.15
    divergence_threshold: float = 3.0  # sigma over the loss EMA; TOML also divergence.loss_sigma_threshold
    predictor_type: str = "auto"  # TOML predictor.type; auto: quasi_newton where losses are exact, else secant
    predictor_memory_mb: float = 50.0  # of the predictor itself; TOML predictor.memory_budget_mb
    collect_metrics: bool = True  # TOML metrics.enabled

    enabled: bool = True  # False: the plain loop, bit for bit
    min_predict_steps: int = 1
    correct_steps: int = 5  # real steps on probation after a jump
    segments: int = 1  # gate checks per jump
    clock: Clock = "cost"
    lr_interval: Interval = "step"  # one step of the schedule: a step of the clock, or a pass over the data
    horizon_rule: Literal["doubling", "bandit"] = "doubling"  # who chooses Y
    gradient_clip_norm: float = 0.0  # 0: off
    # Both make steps longer and noisier; only a learning-rate decay removes that noise, so both need a schedule.
    max_lr_multiplier: float = 100.0  # bound on the learned multiplier of the optimizer's own steps; 1: off
    decay_follows_multiplier: bool = False  # decoupled weight decay is multiplied along, as by a larger rate
    min_group_factor: float = 0.01  # smallest factor on a group's first steps (group warm-up); 1: off
    recipe: str = "auto"  # step sizes per role: auto, off, prior (untrained networks of blocks), or a recipe's file
    step: Literal["optimizer", "muon", "soap"] = "optimizer"  # who steps hidden matrices: the user's Adam, or a package
    activation_offload: bool = False  # what a backward needs lies in host memory until then
    explore_outcomes: int = 3  # proposals made whatever the confidence, to learn what it is worth
    seed: int = 0  # of the trainer's own random generator (control group)

    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    corrector: CorrectorConfig = field(default_factory=CorrectorConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    lookahead: LookaheadConfig = field(default_factory=LookaheadConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        """Check ranges."""
        _whole("training.warmup_steps", self.warmup_steps, 0)
        _whole("training.full_steps", self.full_steps, 1)
        _whole("training.max_predict_steps", self.max_predict_steps, 0)
        _whole("training.min_predict_steps", self.min_predict_steps, 1)
        _whole("training.correct_steps", self.correct_steps, 0)
        _whole("training.segments", self.segments, 1, 1000)
        _number("training.confidence_threshold", self.confidence_threshold, 0.0, 1.0)
        _number("training.divergence_threshold", self.divergence_threshold, 0.0, open_low=True)
        _choice("training.clock", self.clock, typing.get_args(Clock))
        _choice("training.lr_interval", self.lr_interval, typing.get_args(Interval))
        _choice("training.horizon_rule", self.horizon_rule, ("doubling", "bandit"))
        _number("training.gradient_clip_norm", self.gradient_clip_norm, 0.0)
        _number("training.max_lr_multiplier", self.max_lr_multiplier, 1.0)
        _number("training.min_group_factor", self.min_group_factor, 0.0, 1.0, open_low=True)
        if not isinstance(self.recipe, str) or not self.recipe:
            raise ConfigError(
                f'training.recipe = {self.recipe!r} must be "auto", "off", "prior" or the path of a recipe'
            )
        _choice("training.step", self.step, ("optimizer", "muon", "soap"))
        _whole("training.explore_outcomes", self.explore_outcomes, 0)
        _whole("training.seed", self.seed, 0, 2**63 - 1)
        _number("predictor.memory_budget_mb", self.predictor_memory_mb, 0.0, open_low=True)
        _check(
            self.min_predict_steps <= max(1, self.max_predict_steps),
            "training.min_predict_steps", self.min_predict_steps,
            f"at most training.max_predict_steps = {self.max_predict_steps}",
        )  # fmt: skip
        for name in ("enabled", "collect_metrics", "activation_offload", "decay_follows_multiplier"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"training.{name} = {getattr(self, name)!r} must be true or false")

    @classmethod
    def preset(
        cls, name: object, model: torch.nn.Module | None = None, *, full_batch: bool = False
    ) -> HybridTrainerConfig:
        """Settings of a named starting point: ``HybridTrainerConfig.preset("full_batch")``.

        Args:
            name: One of :data:`~hybrid_predict_trainer.config.presets.PRESETS`; or "auto", by the weights that train.
            model: For "auto" only: its parameters with ``requires_grad`` are counted.
            full_batch: For "auto" only: every batch is the whole data set.

        Raises:
            ConfigError: unknown name (the message lists the known ones), or "auto" without a model.
        """
        if name == CHOICE:
            if model is None:
                raise ConfigError('preset "auto" needs the model: HybridTrainerConfig.preset("auto", model)')
            num_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
            chosen, _ = choose(num_weights, full_batch=full_batch)
            return cls() if chosen is None else cls.preset(chosen)
        if not isinstance(name, str) or name not in PRESETS:
            near = difflib.get_close_matches(str(name)[:80], PRESETS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown preset {short(name)}: must be one of {', '.join(PRESETS)}, {CHOICE}{hint}")
        return with_values(cls(), PRESETS[name])

    @property
    def block_holdout(self) -> float:
        """Share of blocks of real steps that go without lookahead and multiplier, to compare with."""
        asked = self.lookahead.holdout_fraction
        return self.gate.holdout_fraction if asked == "gate" else float(asked)

    @property
    def never_predicts(self) -> bool:
        """Whether these settings rule out every jump, so that nothing need be observed."""
        return not self.enabled or self.max_predict_steps == 0 or self.confidence_threshold >= 1.0


AUTO, NOISY, EXACT = "auto", "secant", "quasi_newton"
#: Sources of proposals that look at residuals, by the names that settings may give them.
CLOSED_FORM = "gauss_newton"
#: A choice between sources by what they bring per second; without residuals it is ``EXACT``.
PORTFOLIO = "portfolio"
#: For exact losses.
FOR_EXACT = (EXACT, PORTFOLIO)
SOURCES = {CLOSED_FORM: CLOSED_FORM, "ntk": CLOSED_FORM, PORTFOLIO: PORTFOLIO}
#: Those that can do nothing without residuals.
NEED_RESIDUALS = tuple(name for name, kind in SOURCES.items() if kind == CLOSED_FORM)
