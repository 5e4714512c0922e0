"""From what the command line says to an :class:`~.arms.drive.Experiment`: flags over file over preset over recipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError

from ...config.preset_text import format_preset
from ...config.presets import AUTO, CLOSED_FORM, PRESETS, choose
from ...config.settings import FOR_EXACT, SOURCES, HybridTrainerConfig
from ...config.toml import flatten, loads, parse, preset_config, read, with_values
from ...predictors import PREDICTORS
from ...records import CheckpointError, ConfigError, DivergenceError
from ...tasks import Task, TaskDefaults, TaskSettings, make_task
from ...tasks.base import OptimizerName, ScheduleName, unknown_name
from ..run_arm import Experiment, build_trainer


class InputError(Exception):
    """What was asked for cannot be done; the message is one line for a person."""


@contextmanager
def as_input_error() -> Iterator[None]:
    """Whatever is wrong with names, values and files in the block is the caller's input, said in one line."""
    try:
        yield
    except (CheckpointError, DivergenceError):
        raise
    except OSError as error:
        told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        raise InputError(one_line(told)) from error
    except (ValueError, ModuleNotFoundError, SafetensorError) as error:  # the last where a disk is full or a file torn
        raise InputError(one_line(str(error))) from error


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


#: Least and most that a flag takes.
RANGES: dict[str, tuple[float, float]] = {
    "threads": (1, 1024), "seed": (0, 2**31), "lr": (sys.float_info.min, sys.float_info.max),
    "weight_decay": (0.0, 1e6),
    **dict.fromkeys(("data_bytes", "batch_size", "context", "steps"), (1, 1000000000)),
}  # fmt: skip

#: Below this many weights a step takes a few milliseconds, and handing its work to a second thread costs more
#: than it saves, most of all on a busy machine.
SMALL_MODEL = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Flags shared by the commands that train; None where the user said nothing."""

    task: str
    threads: int | None = None
    preset: str | None = None
    data: str | None = None
    data_bytes: int | None = None
    batch_size: int | None = None
    context: int | None = None
    dtype: str | None = None
    bf16: bool | None = None
    compile: bool | None = None
    gradient_checkpointing: bool | None = None
    ternary: bool | None = None
    fused: bool | None = None
    device: str | None = None
    optimizer: str | None = None
    schedule: str | None = None
    lr: float | None = None
    weight_decay: float | None = None
    steps: int | None = None
    config: str | None = None
    config_preset: str | None = None
    predictor: str | None = None
    set: tuple[str, ...] = ()


def build_experiment(options: Options, config: HybridTrainerConfig | None = None) -> Experiment:
    """Everything that has to exist before a run can begin, checked.

    Args:
        options: Of the command line.
        config: The trainer's settings as they stand, when a run is resumed; None: put together from
            the options.

    Raises:
        InputError: in one line, what is wrong and what would be right.
    """
    with as_input_error():
        check_device(options.device or "cpu")
        settings = TaskSettings(
            preset=options.preset, data=options.data, data_bytes=options.data_bytes,
            batch_size=options.batch_size, context=options.context, dtype=options.dtype,  # type: ignore[arg-type]
            autocast_bf16=bool(options.bf16), compile=bool(options.compile),
            gradient_checkpointing=bool(options.gradient_checkpointing), ternary=bool(options.ternary),
            device=options.device or "cpu",
            fused=bool(options.fused),
        )  # fmt: skip
        task: Task = make_task(options.task, settings)
        recipe = recipe_of(task.defaults, options)
        if config is None:
            options, why = chosen_preset(options, task, recipe)
            config = config_of(options, recipe, task.steps_per_epoch)
            if why:
                print(why, file=sys.stderr)
        setup = Experiment(task=task, settings=settings, recipe=recipe, config=config, steps=recipe.steps)
        trainer = build_trainer(
            setup, lr=recipe.lr, steps=recipe.steps, seed=0, predict=True
        )  # what does not fit, shows
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    elif sum(trainer.run.windows.groups.sizes) < SMALL_MODEL and settings.device == "cpu":
        torch.set_num_threads(1)
    return setup


def given_config(config: HybridTrainerConfig, said: Options, then: Options) -> HybridTrainerConfig:
    """A run's settings with those that are said again put over them.

    Args:
        config: Of the run.
        said: Now; what is not said leaves the settings as they are.
        then: When the run was started: its single assignments hold over a preset or a file, as they did.
    """
    layers: list[Mapping[str, Any]] = []
    with as_input_error():
        if said.config_preset is not None and not said.config_preset == then.config_preset == AUTO:
            preset_config(said.config_preset)
            layers.append(PRESETS[said.config_preset])
        if said.config is not None:
            layers += file_layers(Path(said.config))
        _check_predictor(said.predictor)
        layers += [{"predictor.type": name} for name in (then.predictor, said.predictor) if name is not None]
        layers += [assignments(then.set), assignments(said.set)]
        for values in layers:
            config = with_values(config, values)
    return config


def _check_predictor(name: str | None) -> None:
    known = sorted({*PREDICTORS, *SOURCES})
    if name is not None and name not in known:
        raise unknown_name("predictor", name, known)


def chosen_preset(options: Options, task: Task, recipe: TaskDefaults) -> tuple[Options, str]:
    """The options with ``auto`` replaced by what it stands for, and what is told of the preset; "" without one."""
    name = options.config_preset
    if name is None:
        return options, ""
    if name != AUTO:
        preset_config(name)  # says which there are
        return options, format_preset(name)
    whole = (options.predictor or recipe.predictor) in FOR_EXACT
    num_weights = sum(p.numel() for p in task.build_model(0).parameters() if p.requires_grad)
    name, why = choose(num_weights, full_batch=whole, steps_per_epoch=task.steps_per_epoch)
    what = f"preset auto: {name or 'the settings stay as they are'}: {why}"
    return replace(options, config_preset=name), what if name is None else f"{what}\n{format_preset(name)}"


def recipe_of(defaults: TaskDefaults, options: Options) -> TaskDefaults:
    """The task's recipe with what the user chose."""
    if options.optimizer is not None and options.optimizer not in get_args(OptimizerName):
        raise unknown_name("optimizer", options.optimizer, get_args(OptimizerName))
    if options.schedule is not None and options.schedule not in get_args(ScheduleName):
        raise unknown_name("schedule", options.schedule, get_args(ScheduleName))
    names = ("optimizer", "schedule", "lr", "weight_decay", "steps")
    return replace(defaults, **{n: v for n in names if (v := getattr(options, n)) is not None})


def config_of(options: Options, recipe: TaskDefaults, steps_per_epoch: int | None = None) -> HybridTrainerConfig:
    """Trainer settings: ``--set`` over ``--predictor`` over ``--config`` over ``--config-preset`` over the recipe.

    Full-batch tasks and those that see their data many times get the presets made for them.

    Warm-up takes at most a tenth of the run unless it was set: a short run would never leave it.
    """
    _check_predictor(options.predictor)
    recipes = {"predictor.type": recipe.predictor, "training.gradient_clip_norm": recipe.grad_clip or 0.0}
    config = with_values(HybridTrainerConfig(), recipes)
    layers: list[Mapping[str, Any]] = []
    if (options.predictor or recipe.predictor) in FOR_EXACT:
        layers.append(PRESETS["full_batch"])  # the windows and the budget it is made for
    elif options.predictor in SOURCES:
        layers.append(CLOSED_FORM)
    if (steps_per_epoch or 1) > 1 and (options.predictor or recipe.predictor) == "hold":
        name = "epochs_adam" if recipe.optimizer in ("adam", "adamw", "adamw8bit") else "epochs"
        layers.append({**PRESETS[name], "predictor.window": steps_per_epoch})
    if options.task == "finetune":
        layers.append(PRESETS["finetune"])
    elif recipe.optimizer == "muon":
        layers.append(PRESETS["muon"])
    num_automatic = len(layers)
    if options.config_preset is not None:
        preset_config(options.config_preset)  # says which there are
        layers.append(PRESETS[options.config_preset])
    if options.config is not None:
        layers += file_layers(Path(options.config))
    if options.predictor is not None:
        layers.append({"predictor.type": options.predictor})
    layers.append(assignments(options.set))
    for values in layers:
        config = with_values(config, values)
    if not any(key.endswith("warmup_steps") for values in layers[num_automatic:] for key in values):
        config = replace(config, warmup_steps=min(config.warmup_steps, recipe.steps // 10))
    return config


def file_layers(path: Path) -> list[Mapping[str, Any]]:
    """What a TOML file sets, its preset first; unlike :func:`~..config.toml.load`, nothing it does not set."""
    text = read(path)
    loads(text, str(path))  # every check, with the file's name in the message
    table = parse(text)
    preset = table.pop("preset", None)
    return [*([] if preset is None else [PRESETS[preset]]), flatten(table)]


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """``a.b=c`` -> value by dotted key; c is TOML where it can be read as such, else a string.

    Raises:
        ConfigError: no ``=``.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise ConfigError(f"--set {text}: must be KEY=VALUE, such as training.warmup_steps=50")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        table = parse(f"value = {text}")
    except ConfigError:
        return text
    return table["value"] if table.keys() == {"value"} else text


def check_device(name: str) -> None:
    """Refuse a device that does not exist here.

    Raises:
        ConfigError: unknown, or not available.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        if "Expected one of" in str(error) or "Invalid device string" in str(error):
            raise ConfigError(f"unknown device {name!r}: must be cpu, cuda, cuda:0, mps, ...") from None
        raise ConfigError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from None
