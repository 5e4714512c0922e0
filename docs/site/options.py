"""docs/options.md from the settings' own classes: every option with default, unit and range; `make options`."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hybrid_predict_trainer import ConfigError, HybridTrainerConfig
from hybrid_predict_trainer.config.presets import PRESETS
from hybrid_predict_trainer.config.settings import SOURCES
from hybrid_predict_trainer.config.toml import literal, valid_keys, with_values
from hybrid_predict_trainer.predictors import PREDICTORS

PAGE = Path(__file__).parents[1] / "options.md"
HEAD = """# Options

Written by `make options` from the settings' own classes: the range is found by asking them, the unit follows from
the name.  What each one means is in [configuration.md](configuration.md); "presets" names those that set it, and
`hpt train --preset NAME` prints their sources.  Source: where the option or its default comes from, a paper, a section
of LOG.md (quoted) or of design.md, the founding document (its value, or one that a ruling in LOG.md has changed), or a
choice that nobody has measured.

| key | default | type | unit | range | presets | source |
|---|---|---|---|---|---|---|
"""
UNITS = (
    (r"(steps|warmup|_interval)$", "steps"),
    (r"_mb$", "MB"),
    (r"windows?$", "windows or steps"),
    (r"(fraction|budget|_exact|threshold|significance)$", "share or bound"),
    (r"(_dim|size|rank)$", "numbers"),
    (r"learning_rate$", "rate"),
)
_CHOICE = "choice, not measured"
_FOUNDING = "founding document"
_RULINGS = 'LOG.md "Rulings where the founding documents contradict each other"'
_NEWTON = 'LOG.md "Self-scaled quasi-Newton steps"'
_CLOSED = 'LOG.md "Closed form with a second-order correction"'
_LOOKAHEAD = 'LOG.md "The lookahead, second round"'
_POISSON = 'LOG.md "Poisson PINN at a fixed rate"'
_DREAMER = "DreamerV3 (arXiv 2301.04104)"
_LEDGER = "[the ledger](design.md#the-ledger)"
_GATE = "[the gate](design.md#the-gate)"
#: Pattern of keys -> source; the first that fits.
SOURCE_OF = (
    (r"training\.(warmup_steps|full_steps|max_predict_steps|correct_steps|enabled|seed)", _FOUNDING),
    (r"training\.confidence_threshold", f"{_RULINGS}; founding document: 0.85"),
    (r"training\.divergence_threshold", _FOUNDING),
    (
        r"training\.max_lr_multiplier",
        'edge of stability, arXiv 2103.00065; LOG.md "What the learned multiplier may go by"',
    ),
    (r"training\.decay_follows_multiplier", "[recipes](recipes.md)"),
    (r"training\.min_group_factor", 'LOG.md "Early cuts: the edge of stability is not one number"'),
    (r"training\.recipe", 'LOG.md "Step sizes per role"'),
    (r"training\.step", "Muon (arXiv 2502.16982), SOAP (arXiv 2409.11321); [recipes](recipes.md)"),
    (r"training\.horizon_rule", 'LinUCB (WWW 2010, algorithm 1); LOG.md "Recorded real runs, corrector, bandit"'),
    (r"training\.(clock|lr_interval)", "[cost and clocks](design.md#cost-and-clocks)"),
    (r"predictor\.type", 'LOG.md "Every predictor on the Poisson problem", "Every predictor where losses are noisy"'),
    (r"predictor\.window|predictor\.secant\.(num_displacements|damping)", 'LOG.md "Window, memory and damping"'),
    (r"predictor\.keep_basis", 'LOG.md "Which displacements can be predicted"'),
    (r"predictor\.update_budget", 'LOG.md "Three ideas for the predictor that were not built"'),
    (r"predictor\.basis_dtype", _POISSON),
    (r"predictor\.memory_budget_mb", _FOUNDING),
    (r"predictor\.secant\.", "saddle-free Newton, arXiv 1406.2572; the number: " + _CHOICE),
    (r"predictor\.quasi_newton\.(history|shrink|form|memory_mb|pairs_memory_mb)", _NEWTON),
    (r"predictor\.quasi_newton\.", f"Al-Baali 1998; {_NEWTON}"),
    (r"predictor\.gauss_newton\.second_order", f"geodesic acceleration, arXiv 1207.4999; {_CLOSED}"),
    (r"predictor\.gauss_newton\.(filter|initial_damping|linearizations|chain)", _CLOSED),
    (r"predictor\.gauss_newton\.", _CHOICE),
    (r"predictor\.dmd\.", "exact DMD, arXiv 1312.0041; delays: arXiv 1611.06664"),
    (r"predictor\.rssm\.(free_nats|unimix|num_categoricals|stochastic_dim)", _DREAMER),
    (r"predictor\.rssm\.(deterministic_dim|ensemble_size)", f'{_FOUNDING}; LOG.md "Learned predictors"'),
    (r"predictor\.(rssm|mlp|linear)\.", 'method: LOG.md "Learned predictors"; the number: ' + _CHOICE),
    (r"encoder\.kfac", "K-FAC, arXiv 1503.05671"),
    (r"encoder\.", 'LOG.md "What the encoder\'s parts are worth"'),
    (r"corrector\.", 'LOG.md "Recorded real runs, corrector, bandit"'),
    (r"gate\.overhead_budget", f"{_RULINGS}; {_POISSON}"),
    (r"gate\.(significance|min_persistence)", f'{_GATE}; LOG.md "Regimes, first round"'),
    (r"gate\.holdout_fraction", _LEDGER),
    (r"gate\.", f"{_GATE}; the number: {_CHOICE}"),
    (r"lookahead\.extrapolation", f"EMA-Nesterov, arXiv 2605.25395; {_LOOKAHEAD}"),
    (r"lookahead\.(damping|drift)", 'Lookahead, arXiv 1907.08610; LOG.md "Part of a displacement predicted: kappa"'),
    (r"lookahead\.scope", 'LOG.md "The lookahead carries on a drift that has ended"'),
    (r"lookahead\.holdout_fraction", _LEDGER),
    (r"divergence\.gradient_norm_multiplier", _FOUNDING),
    (r"divergence\.vanishing_gradient_threshold|divergence\.max_sign_changes", _RULINGS),
    (r"divergence\.(prediction_error_\w+|confidence_exit|check_interval_steps)", _FOUNDING),
    (r"divergence\.retry_learning_rate_factor", 'LOG.md "A full-batch run is lifted off its best"'),
    (r"divergence\.", f"[divergence](design.md#divergence); the number: {_CHOICE}"),
    (
        r"metrics\.|checkpoint\.|predictor\.offload|training\.activation_offload",
        "bookkeeping, no constant of the method",
    ),
    (r"training\.|predictor\.", _CHOICE),
)
#: Values that no setting takes, so that it says what it does take.
PROBES = (-1e18, 1e18, "no such name")


def range_of(key: str, hint: Any) -> str:
    """Legal values, from the setting's own refusal."""
    if key == "predictor.type":
        return ", ".join(("auto", *PREDICTORS, *SOURCES))
    if get_args(hint) and all(isinstance(v, str) for v in get_args(hint)):
        return ", ".join(get_args(hint))
    for value in PROBES:
        probe: Any = int(value) if hint is int and not isinstance(value, str) else value
        try:
            with_values(HybridTrainerConfig(), {key: [probe] if "tuple" in str(hint) else probe})
        except ConfigError as error:
            found = re.search(r"must be (.*)$", str(error))
            if found and ("out of range" in str(error) or "is unknown" in str(error)):
                return found[1].replace("|", "or")
    return "true, false" if hint is bool else "any text" if hint is str else "see the text"


def source_of(key: str) -> str:
    """Where an option or its default comes from.

    Raises:
        KeyError: no row of ``SOURCE_OF`` fits.
    """
    for pattern, source in SOURCE_OF:
        if re.match(pattern, key):
            return source
    raise KeyError(key)


def page() -> str:
    """The whole document."""
    rows = []
    for key, path in valid_keys().items():
        owner: Any = HybridTrainerConfig
        value: Any = HybridTrainerConfig()
        hint: Any = None
        for name in path:
            hint = get_type_hints(owner)[name]
            value = getattr(value, name)
            owner = hint if is_dataclass(hint) else owner
        named = next((unit for pattern, unit in UNITS if re.search(pattern, key)), "-")
        unit = "-" if isinstance(value, bool | str) else named
        users = ", ".join(name for name in PRESETS if key in PRESETS[name]) or "-"
        kind = type(value).__name__
        rows.append(
            f"| `{key}` | `{literal(value)}` | {kind} | {unit} | {range_of(key, hint)} | {users} | {source_of(key)} |"
        )
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
