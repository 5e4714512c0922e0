"""Modules under the names they had until version 0.2, until the next minor version.

``import hybrid_predict_trainer.executors`` still works, with one line of warning.  Reading a name asks the module's new
homes in turn; setting one sets it wherever it is used, so that a patched function is the one that is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__.rpartition(".")[0]

#: Former name -> where its definitions are today.
MODULES: dict[str, tuple[str, ...]] = {
    "adaptation": ("propose.feedback",),
    "bandit": ("propose.horizon",),
    "basis": ("observe.basis",),
    "batches": ("observe.batches",),
    "bench": ("cli.bench", "cli.bench_arguments"),
    "calibration": ("propose.confidence", "numerics.calibration"),
    "checkpoint": ("keep.checkpoint", "keep.housekeeping"),
    "corrector": ("propose.corrector",),
    "counters": ("cost",),
    "divergence": ("observe.divergence",),
    "early_cuts": ("move.group_warmup",),
    "encoder": ("observe.encoder",),
    "executors": (
        "cycle.real_step",
        "cycle.predict_step",
        "cycle.correct_step",
        "cycle.transaction",
        "cycle.loop",
        "judge.probation",
        "records",
    ),
    "experiments.accelerator": ("experiments.bench.accelerator",),
    "experiments.acceptance": ("experiments.bench.acceptance", "experiments.statistics"),
    "experiments.costs": ("experiments.bench.costs",),
    "experiments.countdown": ("experiments.arms.countdown",),
    "experiments.encoding_cost": ("experiments.bench.encoding_cost",),
    "experiments.environment": ("experiments.arms.environment",),
    "experiments.equal_loss": ("experiments.compare.equal_loss",),
    "experiments.factors": ("experiments.bench.factors",),
    "experiments.healthy": ("experiments.bench.false_alarms",),
    "experiments.memory": ("experiments.bench.memory",),
    "experiments.overhead": ("experiments.bench.overhead",),
    "experiments.peers": ("experiments.baselines",),
    "experiments.peers.averaging": ("experiments.baselines.averaging",),
    "experiments.peers.base": ("experiments.baselines.base",),
    "experiments.peers.flops": ("experiments.baselines.flops",),
    "experiments.peers.lbfgs": ("experiments.baselines.lbfgs",),
    "experiments.peers.optimizers": ("experiments.baselines.optimizers",),
    "experiments.peers.outer": ("experiments.baselines.outer",),
    "experiments.peers.table": ("experiments.baselines.table",),
    "experiments.peers.warmup": ("experiments.baselines.warmup",),
    "experiments.peers.wnn": ("experiments.baselines.wnn",),
    "experiments.predictor_bench": ("experiments.bench.predictors",),
    "experiments.recording": ("experiments.arms.recording",),
    "experiments.regime_cache": ("experiments.regimes.cache",),
    "experiments.regime_cases": ("experiments.regimes.cases",),
    "experiments.regime_report": ("experiments.regimes.report",),
    "experiments.regime_runs": ("experiments.regimes.runs",),
    "experiments.regime_summary": ("experiments.regimes.summary", "experiments.statistics"),
    "experiments.report_confidence": ("experiments.report.confidence",),
    "experiments.report_data": ("experiments.report.data",),
    "experiments.report_parts": ("experiments.report.parts",),
    "experiments.runs": ("experiments.arms.drive",),
    "experiments.setup": ("experiments.arms.options",),
    "experiments.single": ("experiments.train", "keep.stop_signal"),
    "experiments.stack": ("experiments.bench.stack",),
    "experiments.step_cosines": ("experiments.bench.step_cosines",),
    "experiments.svg": ("experiments.report.charts",),
    "experiments.table": ("experiments.report.text",),
    "experiments.trajectories": ("experiments.bench.trajectories",),
    "features": ("observe.loss_features",),
    "gate": ("judge.gate", "numerics.quantiles", "propose.proposal"),
    "health": ("observe.gradient_health",),
    "history": ("observe.history", "numerics.running"),
    "host": ("weights.offload",),
    "inner_products": ("weights.products",),
    "kfac": ("observe.kfac",),
    "ledger": ("judge.ledger", "cost", "records"),
    "lookahead": ("move.lookahead",),
    "manifest": ("keep.manifest",),
    "metrics": ("tell.recorder", "tell.sinks", "tell.figures"),
    "observer": ("observe.window_encoder",),
    "persistence": ("keep.resume",),
    "phases": ("cycle.phases",),
    "predictors.ridge": ("numerics.ridge",),
    "presets": ("config.presets",),
    "progress": ("cli.progress",),
    "proposals": ("propose.proposal", "judge.candidates", "judge.budget", "cycle.predict_step"),
    "residuals": ("propose.residuals",),
    "responses": ("cycle.alarms",),
    "run": ("cycle.state", "judge.probation", "propose.segments", "records"),
    "snapshot": ("keep.snapshot", "keep.object_state", "weights.parameters", "keep.rng", "keep.buffers"),
    "state_tree": ("keep.state_tree",),
    "step_scale": ("move.lr_multiplier", "move.unit_multiplier"),
    "streaming": ("numerics.streaming",),
    "switchback": ("judge.switchback",),
    "tasks.bert": ("tasks.sentences.bert",),
    "tasks.finetune": ("tasks.language.finetune",),
    "tasks.gpt": ("tasks.language.gpt",),
    "tasks.llama": ("tasks.language.llama",),
    "tasks.lora": ("tasks.language.lora",),
    "tasks.mlp": ("tasks.equations.mlp",),
    "tasks.networks": ("tasks.images.networks",),
    "tasks.optim": ("tasks.recipes",),
    "tasks.pinn": ("tasks.equations.pinn",),
    "tasks.pretrained": ("tasks.language.pretrained",),
    "tasks.regression": ("tasks.equations.regression",),
    "tasks.text": ("tasks.language.text",),
    "tasks.tokens": ("tasks.language.tokens",),
    "tasks.vision": ("tasks.images.task",),
    "tasks.wordpieces": ("tasks.sentences.wordpieces",),
    "toml_io": ("config.toml",),
}
#: Packages that bear the name of a former module: what they do not have themselves is looked up there.
PACKAGES: dict[str, tuple[str, ...]] = {
    "cycle": ("cycle.learning", "cycle.inputs", "cycle.alarms"),
    "experiments.arms": ("experiments.run_arm",),
    "experiments.compare": ("experiments.compare.run",),
    "experiments.regimes": ("experiments.regimes.catalogue",),
    "experiments.report": ("experiments.report.page",),
    "tasks.equations": ("tasks.equations.problems",),
    "tasks.images": ("tasks.images.data",),
    "tasks.language": ("tasks.language.batches",),
    "tasks.sentences": ("tasks.sentences.data",),
    "weights": ("weights.algebra", "weights.parameters"),
}


#: Attributes that ``trainer.run`` had -> where they are today.
ATTRIBUTES: dict[str, str] = {
    "counters": "meter",
    "lr_scheduler": "schedule.scheduler",
    "num_schedule_steps": "schedule.num_steps",
    "peak_rate": "schedule.peak",
    "phase": "phases.current",
    "controller": "phases.controller",
    "num_forced_full_steps": "phases.num_forced_full_steps",
    "forced_by_alarm": "phases.forced_by_alarm",
    "num_real_steps_since_predict": "phases.num_real_steps_since_predict",
    "anchor": "rollback.point",
    "old_anchor": "rollback.spare",
    "anchor_real_steps": "rollback.num_real_steps",
    "anchor_schedule_steps": "rollback.num_schedule_steps",
    "horizon": "proposer.horizon",
    "stated_confidence": "proposer.confidence",
    "refused": "proposer.refused",
    "segment": "proposer.segment",
    "correction": "proposer.correction",
    "predictor": "proposer.predictor",
    "adaptation": "proposer.feedback",
    "time": "proposer.time",
    "num_windows_since_proposal": "proposer.num_windows_since_proposal",
    "chooses": "proposer.chooses",
    "settings": "proposer.settings",
    "note_predictor_failure": "proposer.on_failure",
    "note_time": "proposer.add_time",
    "basis": "windows.basis",
    "observer": "windows.observer",
    "groups": "windows.groups",
    "window": "windows.last",
    "window_loss": "windows.loss",
    "loss_slope": "windows.slope",
    "num_windows": "windows.num_closed",
    "num_rest_steps": "windows.num_rest_steps",
    "lr_integral": "windows.lr_integral",
    "window_seconds": "windows.seconds",
    "observing": "windows.observing",
    "window_just_closed": "windows.just_closed",
    "history": "losses.history",
    "readout": "losses.readout",
    "data": "batches.same_batch",
    "recurrence": "batches.recurrence",
    "batch_free": "batches.free",
    "same_batch": "batches.same",
    "ledger": "judge.ledger",
    "exactness": "judge.exactness",
    "probation": "judge.probation",
    "generator": "judge.generator",
    "held": "judge.held",
    "cuts": "judge.evaluation.cuts",
    "needs_grad_mode": "judge.evaluation.needs_grad_mode",
    "quiet_fails": "judge.evaluation.quiet_fails",
    "loss_writes": "judge.evaluation.loss_writes",
    "evaluate_loss": "judge.evaluation.loss",
    "scale": "optimizer_step.scale",
    "lookahead": "optimizer_step.lookahead",
    "switchback": "optimizer_step.switchback",
    "scale_search": "optimizer_step.scale_search",
    "guard": "safety.guard",
    "validation": "safety.validation",
    "raise_point": "safety.raise_point",
    "safe_point": "safety.safe_point",
    "trained": "watch.trained",
    "writes": "watch.writes",
    "hands_off": "watch.hands_off",
    "views": "subject.views",
    "model": "subject.model",
    "optimizer": "subject.optimizer",
    "loss_fn": "subject.loss_fn",
    "grad_scaler": "subject.grad_scaler",
    "parameters": "subject.parameters",
    "on_cpu": "subject.on_cpu",
    "role_groups": "subject.groups",
    "deterministic": "full_batch",
}
_said_attributes: set[str] = set()


def place_of(name: str) -> str:
    """Where an attribute of ``trainer.run`` is today; a former name is said once.

    Raises:
        AttributeError: it never was one.
    """
    if name not in ATTRIBUTES:
        raise AttributeError(f"the state of a run has no attribute {name!r}")
    if name not in _said_attributes:
        _said_attributes.add(name)
        warnings.warn(
            f"run.{name} is now run.{ATTRIBUTES[name]}; the former name goes with the next minor version",
            DeprecationWarning,
            stacklevel=4,
        )
    return ATTRIBUTES[name]


#: Former name of a definition -> today's.
NAMES: dict[str, str] = {
    "Adaptation": "Feedback",
    "Counters": "CostMeter",
    "EXECUTORS": "STEP_OF_PHASE",
    "EarlyCuts": "GroupWarmup",
    "Execution": "StepOutcome",
    "Landing": "StagingBuffers",
    "LearnedScale": "LrMultiplier",
    "Order": "BaselineJob",
    "PEERS": "BASELINES",
    "Peer": "Baseline",
    "Run": "State",
    "Session": "BaselineRun",
    "State": "StateDict",
    "StepScale": "Multiplier",
    "UnitScale": "UnitMultiplier",
    "peer_of": "baseline_of",
    "peers_for": "baselines_for",
    "quiet_forward": "side_effect_free",
    "run_peer": "run_baseline",
    "settle_anchor": "settle_rollback_point",
}


def _warn(former: str, homes: Sequence[str]) -> None:
    warnings.warn(
        f"{PACKAGE}.{former} is now {' and '.join(f'{PACKAGE}.{home}' for home in homes)}; the former name goes with "
        "the next minor version",
        DeprecationWarning,
        stacklevel=3,
    )


def _homes(names: Sequence[str]) -> list[ModuleType]:
    return [importlib.import_module(f"{PACKAGE}.{name}") for name in names]


class FormerModule(ModuleType):
    """Forwards to the modules that a former one has become."""

    def __getattr__(self, name: str) -> Any:
        """Of the first home that has it."""
        if not name.startswith("__"):
            for home in _homes(MODULES[self.__name__.removeprefix(f"{PACKAGE}.")]):
                for known in (name, NAMES.get(name, name)):
                    if hasattr(home, known):
                        return getattr(home, known)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """In every home that has it."""
        if name.startswith("__"):
            super().__setattr__(name, value)
            return
        for home in _homes(MODULES[self.__name__.removeprefix(f"{PACKAGE}.")]):
            if hasattr(home, name):
                setattr(home, name, value)


class _Finder(MetaPathFinder, Loader):
    """Finds former modules; asked after everything else."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        """A spec for a name of the table, else None."""
        known = fullname.startswith(f"{PACKAGE}.") and fullname.removeprefix(f"{PACKAGE}.") in MODULES
        return ModuleSpec(fullname, self) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty one that forwards."""
        former = spec.name.removeprefix(f"{PACKAGE}.")
        _warn(former, MODULES[former])
        return FormerModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to execute."""


def install() -> None:
    """Let former names be imported; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def lookup(package: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package that bears a former module's name.

    Args:
        package: Its name inside this one.
    """

    said: set[str] = set()

    def get(name: str) -> Any:
        if not name.startswith("__") and name not in ("_path", "path"):
            if importlib.util.find_spec(f"{PACKAGE}.{package}.{name}") is not None:
                # ``from . import name`` asks here before it looks for a module: no former module may be imported for it
                return importlib.import_module(f"{PACKAGE}.{package}.{name}")
            for home in PACKAGES[package]:
                module = importlib.import_module(f"{PACKAGE}.{home}")
                if hasattr(module, name):
                    if name not in said:  # an import statement asks twice
                        said.add(name)
                        _warn(f"{package}.{name}", [f"{home}.{name}"])
                    return getattr(module, name)
        raise AttributeError(f"module {PACKAGE}.{package} has no attribute {name!r}")

    return get
