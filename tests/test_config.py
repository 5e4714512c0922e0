"""Settings: every range is told, unknown keys get a suggestion, TOML goes there and back."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_predict_trainer import ConfigError, HybridTrainerConfig, load_config, preset_config, with_values
from hybrid_predict_trainer.config.keys import ALIASES, TABLE_ALIASES
from hybrid_predict_trainer.config.presets import PRESETS
from hybrid_predict_trainer.config.toml import MAX_TOML_BYTES, loads, to_toml, valid_keys

DEFAULT = HybridTrainerConfig()


def value_of(config: HybridTrainerConfig, key: str) -> Any:
    node: Any = config
    for name in valid_keys()[key]:
        node = getattr(node, name)
    return node


def hint_of(key: str) -> Any:
    cls: Any = HybridTrainerConfig
    *tables, name = valid_keys()[key]
    for table in tables:
        cls = get_type_hints(cls)[table]
    return get_type_hints(cls)[name]


NUMBERS = [k for k in valid_keys() if hint_of(k) in (int, float)]


# ---------------------------------------------------------------- ranges


def test_defaults_of_the_specification() -> None:
    assert (DEFAULT.warmup_steps, DEFAULT.full_steps, DEFAULT.max_predict_steps) == (100, 20, 80)
    assert DEFAULT.divergence_threshold == 3.0
    assert DEFAULT.enabled
    assert not DEFAULT.never_predicts


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [-1e12, -1, math.nan, math.inf, 1e300], ids=str)
def test_out_of_range_names_key_and_range(key: str, value: float) -> None:
    """Some values are legal for some keys; what is refused is refused with the key and what would be legal."""
    if hint_of(key) is int:
        value = int(value) if math.isfinite(value) else 10**18
    try:
        accepted = with_values(DEFAULT, {key: value})
    except ConfigError as error:
        message = str(error)
    else:
        assert value_of(accepted, key) == value
        assert math.isfinite(value)
        assert value > 0
        return
    told = ("must be in [", "must be in (", "must be >", "at least", "at most")
    assert key in message
    assert any(words in message for words in told), message


@pytest.mark.parametrize("key", NUMBERS)
def test_nothing_takes_a_negative_number(key: str) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        with_values(DEFAULT, {key: -1 if hint_of(key) is int else -0.5})


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [True, "3", None, [1]], ids=repr)
def test_wrong_types(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*(whole number|a number)"):
        with_values(DEFAULT, {key: value})


@pytest.mark.parametrize("key", [k for k in valid_keys() if hint_of(k) is bool])
@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_booleans_are_booleans(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*true or false"):
        with_values(DEFAULT, {key: value})


def every_dataclass() -> list[type]:
    found: list[type] = []

    def walk(cls: type) -> None:
        found.append(cls)
        for hint in get_type_hints(cls).values():
            if is_dataclass(hint):
                walk(hint)  # type: ignore[arg-type]

    walk(HybridTrainerConfig)
    return found


@pytest.mark.parametrize("cls", every_dataclass(), ids=lambda c: c.__name__)
def test_python_construction_is_checked_too(cls: type) -> None:
    for f in fields(cls):
        hint = get_type_hints(cls)[f.name]
        if hint in (int, float):
            for wrong in (True, "1"):
                with pytest.raises(ConfigError, match=f"{f.name}|memory_budget_mb"):
                    cls(**{f.name: wrong})
    assert cls() == cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), fields(cls)[0].name, 1)


CHOICES = {
    "training.clock": ("cost", "credited", "claimed"), "gate.judge_at": ("auto", "current", "average"),
    "gate.exact": ("auto", "always", "never"), "predictor.basis_dtype": ("float32", "bfloat16", "param"),
}  # fmt: skip


@pytest.mark.parametrize("key", CHOICES)
def test_choices(key: str) -> None:
    for choice in CHOICES[key]:
        assert value_of(with_values(DEFAULT, {key: choice}), key) == choice
    near = CHOICES[key][1][:-1]
    with pytest.raises(
        ConfigError, match=f"{key} = '{near}' is unknown: must be one of .*did you mean '{CHOICES[key][1]}'"
    ):
        with_values(DEFAULT, {key: near})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"training.min_predict_steps": 90}, r"min_predict_steps = 90.*at most training.max_predict_steps = 80"),
        (
            {"divergence.critical_multiplier": 5.0},
            "critical_multiplier.*at least divergence.gradient_norm_multiplier = 10",
        ),
        ({"predictor.secant.damping": []}, "damping.*at least one"),
        ({"predictor.secant.damping": [0.1, 2.0]}, r"damping = 2.0.*\(0, 1\]"),
        ({"predictor.secant.damping": 0.1}, "damping = 0.1 must be a list"),
        ({"training.confidence_threshold": 1.5}, r"confidence_threshold = 1.5 is out of range: must be in \[0, 1\]"),
    ],
)
def test_messages(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        with_values(DEFAULT, values)


# ---------------------------------------------------------------- unknown keys, aliases, presets


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("training.warmup_step", "training.warmup_steps"), ("warmup_steps", "training.warmup_steps"),
        ("training.significance", "gate.significance"), ("gate.overhead_bugdet", "gate.overhead_budget"),
        ("predictor.secant.dampings", "predictor.secant.damping"), ("checkpoint.keep_last", "checkpoint.keep_last_n"),
    ],
)  # fmt: skip
def test_unknown_key_suggests_the_nearest(key: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}'; did you mean '{suggestion}'"):
        with_values(DEFAULT, {key: 1})


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias: str) -> None:
    key = ALIASES[alias]
    assert key in valid_keys()
    value = value_of(DEFAULT, key)
    other = (not value) if isinstance(value, bool) else "linear" if isinstance(value, str) else type(value)(value + 1)
    assert value_of(with_values(DEFAULT, {alias: other}), key) == other
    assert with_values(DEFAULT, {alias: other, key: other}) == with_values(DEFAULT, {key: other})
    with pytest.raises(ConfigError, match="both set"):
        with_values(DEFAULT, {alias: other, key: value})


@pytest.mark.parametrize("table", TABLE_ALIASES)
def test_table_aliases(table: str) -> None:
    key = next(
        k for k in valid_keys() if k.startswith(TABLE_ALIASES[table] + ".") and k.count(".") == 1 and hint_of(k) is int
    )
    other = f"{table}.{key.partition('.')[2]}"
    assert value_of(with_values(DEFAULT, {other: 7}), key) == 7


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    chosen = preset_config(name)
    for key, value in PRESETS[name].items():
        assert value_of(chosen, key) == value
    text = f'preset = "{name}"\n[training]\nwarmup_steps = 7\n'
    assert loads(text) == with_values(chosen, {"training.warmup_steps": 7})


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'smal'.*did you mean 'small'"):
        preset_config("smal")
    with pytest.raises(ConfigError, match="unknown preset 3"):
        loads("preset = 3")


def test_default_and_off_switches() -> None:
    for key, value in (
        ("training.enabled", False),
        ("training.max_predict_steps", 0),
        ("training.confidence_threshold", 1.0),
    ):
        assert with_values(DEFAULT, {key: value}).never_predicts


# ---------------------------------------------------------------- TOML


def legal(key: str) -> st.SearchStrategy[Any]:
    value, hint = value_of(DEFAULT, key), hint_of(key)
    if key in CHOICES:
        return st.sampled_from(CHOICES[key])
    if hint is bool:
        return st.booleans()
    if hint is str:
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    if hint is int:
        return st.integers(value, value + 50)
    if hint is float:
        return st.floats(0.5 * value, value) if value else st.just(0.0)
    return st.just(value)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_toml_round_trip(data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(sorted(valid_keys())), unique=True, max_size=12))
    values = {key: data.draw(legal(key), label=key) for key in keys}
    try:
        chosen = with_values(DEFAULT, values)
    except ConfigError:  # combinations that contradict each other
        return
    assert loads(to_toml(chosen)) == chosen


def test_every_setting_is_written() -> None:
    text = to_toml(DEFAULT)
    for key in valid_keys():
        assert f"\n{key.rpartition('.')[2]} = " in "\n" + text
    assert text.startswith("[training]")


def test_reading_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('\ufeff[training]\nwarmup_steps = 3\nclock = "claimed"\n', encoding="utf-8")
    chosen = load_config(path)
    assert (chosen.warmup_steps, chosen.clock) == (3, "claimed")
    path.write_text("", encoding="utf-8")
    assert load_config(path) == DEFAULT


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"[training]\nwarmup_steps = -3", r"run\.toml: training\.warmup_steps = -3 is out of range"),
        (b"[training]\nwarmup_stepz = 3", r"run\.toml: unknown key 'training\.warmup_stepz'; did you mean"),
        (b"[training]\nwarmup_steps = true", r"run\.toml: training\.warmup_steps = True must be a whole number"),
        (b"[training]\nwarmup_steps = 3.0", r"warmup_steps = 3\.0 must be a whole number"),
        (b"[training]\nwarmup_steps = 3\nwarmup_steps = 4", r"run\.toml: not valid TOML"),
        (b"[training", r"run\.toml: not valid TOML"),
        (b"\xff\xfe\x00", r"run\.toml: is not UTF-8"),
        (b"training = 3", r"run\.toml: unknown key 'training'"),
        (b"[training]\nconfidence_threshold = nan", r"confidence_threshold = nan is out of range"),
        (b"x = " + b"[" * 5000, r"run\.toml: not valid TOML"),
        (b"#" * (MAX_TOML_BYTES + 1), r"run\.toml: \d+ bytes is too large"),
    ],
    ids=[
        "range",
        "unknown",
        "bool for int",
        "float for int",
        "twice",
        "syntax",
        "encoding",
        "no table",
        "nan",
        "deep",
        "large",
    ],
)
def test_bad_files_get_one_clear_line(content: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=match) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    message = "<string>: "
    try:
        loads(text)
    except ConfigError as error:
        message = str(error)
    assert message.startswith("<string>: ")


def test_the_shipped_file_holds_the_defaults() -> None:
    assert load_config(Path(__file__).parents[1] / "configs" / "default.toml") == DEFAULT, "run 'make presets'"
