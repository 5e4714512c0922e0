"""A refused or rolled-back jump leaves no trace; an accepted one changes exactly what the record says."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import (
    PREDICTOR_FAULTS,
    Broken,
    Fake,
    Setup,
    assert_same,
    config,
    everything,
    full_batch,
    loss_fn,
    make_batches,
    make_model,
    proposals,
    seed_all,
    setup,
    steps_until,
)
from hybrid_predict_trainer import HybridTrainer
from hybrid_predict_trainer.cycle import correct_step, inputs, predict_step
from hybrid_predict_trainer.judge import candidates, gate
from hybrid_predict_trainer.records import Phase, Reason, StepResult, Verdict
from reference import DenseBasis, flat

# ---------------------------------------------------------------- every way to be refused


def nan_without_grad(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Fine in training, not finite in the gate."""
    loss = loss_fn(model, batch)
    return loss if torch.is_grad_enabled() else loss * float("nan")


def raising_without_grad(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Fine in training; the gate has no memory left for it."""
    if not torch.is_grad_enabled():
        model(batch[0])
        raise MemoryError("no more memory")
    return loss_fn(model, batch)


def whole_only(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """A loss that was written for batches of 32."""
    return loss_fn(model, (batch[0].view(32, -1), batch[1].view(32, 1)))


@dataclass
class Refusal:
    reason: Reason
    predictor: Callable[[], Fake] = Fake
    changes: dict[str, Any] = field(default_factory=dict)
    patch: Callable[[pytest.MonkeyPatch], None] = lambda patch: None
    loss: Callable = loss_fn


def price_of_gold(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(candidates, "price", lambda ledger, slope: lambda forwards: 1e9)


def always_control(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(predict_step, "_is_control", lambda run: True)


def looks_promising(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(inputs, "_considered", lambda run, horizon: (horizon, True))


CERTAIN = {"gate__significance": 0.5}  # the mean decides

REFUSALS = {
    "nan": Refusal(Reason.NOT_FINITE, lambda: Broken("nan")),
    "inf": Refusal(Reason.NOT_FINITE, lambda: Broken("inf")),
    "shape": Refusal(Reason.WRONG_SHAPE, lambda: Broken("too_wide")),
    "none": Refusal(Reason.PREDICTOR_FAILED, lambda: Broken("returns_none"), patch=looks_promising),
    "loss": Refusal(Reason.LOSS_NOT_FINITE, loss=nan_without_grad),
    "long": Refusal(Reason.TOO_LONG, lambda: Fake(-1e5)),
    "zero": Refusal(Reason.ZERO_JUMP, lambda: Broken("zero")),
    "uphill": Refusal(Reason.NO_DESCENT, lambda: Fake(1.0), {"corrector__max_magnitude": 0.0}),
    "price": Refusal(Reason.NOT_SIGNIFICANT, patch=price_of_gold),
    "promise": Refusal(
        Reason.MODEL_DISAGREES, lambda: Fake(reduction=1e6), {"gate__min_reduction_ratio": 0.5, **CERTAIN}
    ),
    "control": Refusal(Reason.CONTROL_SKIP, changes=CERTAIN, patch=always_control),
    "raises": Refusal(Reason.CANNOT_EVALUATE, loss=raising_without_grad),
    "pieces": Refusal(Reason.CANNOT_CUT, loss=whole_only),
}
#: Only the noisy gate knows a price and cuts batches.
DATA = {"noisy": make_batches, "exact": full_batch}
#: Losses with dropout are noisy whatever the batches.
MODEL_FOR = {"noisy": "norm_dropout", "exact": "batchnorm"}
CASES = [
    (data, name) for data in DATA for name in REFUSALS if (data, name) not in (("exact", "price"), ("exact", "pieces"))
]
#: What is not asked often, because it fails.
FAILING = ("none", "raises", "pieces")
TOLD = pytest.mark.filterwarnings(
    "ignore:predictor 'fake' failed", "ignore:a proposal could not be judged", "ignore:the batch cannot be cut"
)


def refusing(case: Refusal, patch: pytest.MonkeyPatch, built: Setup, **changes: Any) -> HybridTrainer:
    patch.setattr(candidates, "price", lambda ledger, slope: lambda forwards: 0.0)
    case.patch(patch)
    return built.trainer(config(**{**case.changes, **changes}), predictor=case.predictor(), loss_fn=case.loss)


@pytest.mark.parametrize(("data", "name"), CASES, ids=[f"{d}-{n}" for d, n in CASES])
@TOLD
def test_refused_jump_leaves_no_trace(data: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = REFUSALS[name]
    built = setup(MODEL_FOR[data], "adam", "lambda")
    trainer = refusing(case, monkeypatch, built)
    seen = 0
    before = built.everything()
    for batch in DATA[data](40, 32):
        result = trainer.step(batch)
        if result.phase is Phase.PREDICT:
            assert result.verdict is not None
            assert result.verdict.reason is case.reason
            assert result.reason == case.reason.value
            assert not result.verdict.accepted
            assert not result.was_predicted
            assert not result.consumed
            assert result.num_claimed_steps == 0
            assert_same(built.everything(), before)
            seen += 1
        before = built.everything()
    assert seen >= (1 if name in FAILING else 2)  # one that fails is not asked often
    assert trainer.statistics()["num_jumps_accepted"] == 0
    assert trainer.run.judge.probation is None


@pytest.mark.parametrize(("data", "name"), CASES, ids=[f"{d}-{n}" for d, n in CASES])
@pytest.mark.parametrize("scheduler", ["lambda", "onecycle"])
@TOLD
def test_refused_run_is_the_plain_loop(data: str, name: str, scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through fit() the batch of a refused proposal is used again: the data position is not lost."""
    case = REFUSALS[name]
    batches = DATA[data](30, 32)
    plain = setup(MODEL_FOR[data], "adamw", scheduler)
    wanted = plain.plain(batches, loss=case.loss)
    ours = setup(MODEL_FOR[data], "adamw", scheduler)
    trainer = refusing(case, monkeypatch, ours)
    results: list[StepResult] = []
    epoch = trainer.fit(batches, progress_callback=results.append)
    assert len(proposals(results)) >= (1 if name in FAILING else 2)
    assert [r.loss for r in results if r.phase is not Phase.PREDICT] == wanted
    assert_same(ours.everything(), plain.everything())
    assert epoch.num_real_steps == len(batches)
    assert epoch.mean_loss == pytest.approx(sum(wanted) / len(wanted), rel=1e-5), (
        "refused steps have no loss of their own"
    )
    assert epoch.final_loss == pytest.approx(wanted[-1])


def test_every_refusal_reason_is_in_the_table() -> None:
    start, end = Reason.ACCEPTED, Reason.KEPT
    reasons = list(Reason)
    verdicts = set(reasons[reasons.index(start) + 1 : reasons.index(end)])
    assert {case.reason for case in REFUSALS.values()} == verdicts


@pytest.mark.parametrize("reason", [r for r in Reason if r is not Reason.ACCEPTED], ids=lambda r: r.name)
def test_whatever_the_gate_says(reason: Reason, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that measures everything and then refuses for any reason at all."""

    def refuse(evaluate: Callable, *args: Any, **kwargs: Any) -> Verdict:
        for part in ("whole", "length", "judge"):
            for scale in (0.0, 0.5, 1.0, 1e3):
                evaluate(0, scale, part)
        return Verdict(accepted=False, reason=reason, loss_before=1.0, num_forward=12)

    monkeypatch.setattr(gate, "judge_noisy", refuse)
    batches = make_batches(12)
    plain = setup("norm_dropout", "momentum", "lambda")
    plain.plain(batches)
    ours = setup("norm_dropout", "momentum", "lambda")
    trainer = ours.trainer(config(), predictor=Fake())
    trainer.fit(batches)
    assert trainer.statistics()["num_jumps_proposed"] > 0
    assert_same(ours.everything(), plain.everything())


def test_buffers_changed_in_every_mode() -> None:
    """The gate's forwards run with dropout off, but a buffer may change in evaluation mode too."""
    batches = make_batches(20)
    plain, ours = setup("counting"), setup("counting")
    plain.plain(batches)
    trainer = ours.trainer(config(), predictor=Fake(0.05))
    trainer.fit(batches)
    assert trainer.statistics()["num_jumps_proposed"] > 1
    assert_same(ours.everything(), plain.everything())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_raising_gate_leaves_no_trace(mode: str) -> None:
    """Out of memory in a gate's forward is a refusal, said once; after three nobody asks again."""
    trouble = []

    def raising(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            trouble.append(1)
            if len(trouble) % 3 == 2:
                model(batch[0])
                raise MemoryError("no more memory")
        return loss_fn(model, batch)

    built = setup("norm_dropout")
    built.model.train(mode == "train")
    trainer = built.trainer(config(), predictor=Fake(), loss_fn=raising)
    refused = 0
    with pytest.warns(UserWarning, match="MemoryError: no more memory") as told:  # noqa: PT031 - all steps
        for batch in make_batches(60):
            before = built.everything()
            result = trainer.step(batch)
            if result.reason == Reason.CANNOT_EVALUATE.value:
                refused += 1
                assert_same(built.everything(), before)
    assert refused == 3
    assert len(told) == 1
    assert trainer.statistics()["num_gate_failures"] == 3


def test_evaluation_mode_stays() -> None:
    built = setup("norm_dropout")
    built.model.eval()
    batches = make_batches(20)
    trainer = built.trainer(config(), predictor=Fake())
    trainer.fit(batches)
    assert trainer.statistics()["num_jumps_accepted"] > 0
    assert not any(m.training for m in built.model.modules())


# ---------------------------------------------------------------- rolled back


def poisoned(batches: Iterable[Any], trainer: HybridTrainer, level: float) -> Iterator[Any]:
    """Targets shifted by ``level`` while a jump is on probation."""
    for x, y in batches:
        yield (x, y + level) if trainer.run.judge.probation is not None else (x, y)


def accepting(patch: pytest.MonkeyPatch) -> None:
    """A gate that takes everything."""

    def accept(*args: Any, **kwargs: Any) -> Verdict:
        return Verdict(
            accepted=True,
            reason=Reason.ACCEPTED,
            scale=1.0,
            loss_before=1.0,
            loss_after=0.5,
            upper_bound=-0.5,
            num_forward=2,
        )

    patch.setattr(gate, "judge_noisy", accept)
    patch.setattr(gate, "judge_exact", accept)


def degraded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(correct_step, "probation_passes", lambda probation, sigma: False)


ROLLBACKS = {"poison": 100.0, "nan": float("nan"), "judged": 0.0}


@pytest.mark.parametrize("how", ROLLBACKS)
@pytest.mark.parametrize("optimizer", ["adam", "momentum", "adamw_fused", "adafactor"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("segments", [1, 2])
def test_rolled_back_jump_restores_everything(
    how: str, optimizer: str, data: str, segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepting(monkeypatch)
    if how == "judged":
        degraded(monkeypatch)
    built = setup("norm_dropout", optimizer, "lambda")
    trainer = built.trainer(config(segments=segments), predictor=Fake())
    claimed: list[int] = []
    before, rolled_back = built.everything(), 0
    first = None
    for batch in poisoned(DATA[data](60), trainer, ROLLBACKS[how]):
        if trainer.run.judge.probation is None:
            before = built.everything()
            claimed.append(trainer.run.meter.num_claimed_steps)
            first = flat(trainer.run.subject.parameters)
        result = trainer.step(batch)
        if result.phase is Phase.CORRECT and trainer.run.judge.probation is None:
            rolled_back += 1
            assert trainer.run.meter.num_claimed_steps == claimed[-1]
            assert torch.equal(flat(trainer.run.subject.parameters), first)
            now = built.everything()
            if how != "nan" or result.skipped:
                assert_same({**now, "scheduler": 0, "groups": 0}, {**before, "scheduler": 0, "groups": 0})
            # the steps on probation were spent: the schedule is where the clock stands, and nothing else of it differs
            assert now["scheduler"]["last_epoch"] == trainer.run.position
            moving = {"last_epoch": 0, "_step_count": 0, "_last_lr": 0}
            assert_same({**now["scheduler"], **moving}, {**before["scheduler"], **moving})
            assert_same([{**g, "lr": 0} for g in now["groups"]], [{**g, "lr": 0} for g in before["groups"]])
            before = now
    assert rolled_back >= 2
    counts = trainer.statistics()
    assert counts["num_rollbacks"] == rolled_back
    assert counts["num_claimed_steps"] == 0
    assert trainer.run.judge.ledger.num_credited_steps == 0
    assert not [a for a in trainer.run.judge.ledger.open if not a.skipped], "a jump that was taken back has no account"


def test_rollback_shrinks_the_horizon_and_keeping_grows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    accepting(monkeypatch)
    batches = make_batches(60)
    trainer = setup().trainer(config(divergence_threshold=100.0), predictor=Fake())
    start = trainer.run.proposer.horizon
    steps_until(trainer, batches, lambda r: r.phase is Phase.CORRECT and trainer.run.judge.probation is None)
    assert trainer.run.proposer.horizon == min(2 * start, 20)
    degraded(monkeypatch)
    steps_until(trainer, batches, lambda r: r.phase is Phase.CORRECT and trainer.run.judge.probation is None)
    assert trainer.run.proposer.horizon == min(2 * start, 20) // 2


def test_schedule_catches_up_after_a_rollback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps on probation were spent: the schedule is where the clock says, at once and one step later."""
    accepting(monkeypatch)
    degraded(monkeypatch)
    built = setup("mlp", "adam", "lambda")
    trainer = built.trainer(config(), predictor=Fake())
    batches = make_batches(40)
    steps_until(trainer, batches, lambda r: trainer.statistics()["num_rollbacks"] == 1)
    assert built.scheduler is not None
    assert built.scheduler.last_epoch == trainer.run.position
    trainer.step(batches[0])
    assert built.scheduler.last_epoch == trainer.run.position == trainer.run.meter.num_attempted_steps


# ---------------------------------------------------------------- accepted


PREDICTORS = {"hold": None, "heuristic": None, "linear": None, "secant": None, "fake": Fake}


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize("segments", [1, 2])
def test_accepted_jump_is_the_recorded_vector(name: str, segments: int, tmp_path: Path) -> None:
    """theta_after == theta_before + scale * sum_k c_k b_k, from the record and an independent dense basis."""
    built = setup("mlp", "adam")
    changes = {} if PREDICTORS[name] else {"predictor_type": name}
    trainer = built.trainer(
        config(metrics__path=str(tmp_path / "m.jsonl"), segments=segments, correct_steps=2, full_steps=3, **changes),
        predictor=PREDICTORS[name] and PREDICTORS[name](),
    )
    trainer.run.windows.basis.accumulate, dense = _recorded(trainer)
    moved = 0
    for batch in full_batch(80):
        dense.close_if_full()
        before = flat(trainer.run.subject.parameters)
        state = everything(built.model, built.optimizer)
        result = trainer.step(batch)
        if result.was_predicted:
            assert result.verdict is not None
            record = _last_jump(tmp_path / "m.jsonl")
            assert record["scale"] == result.verdict.scale > 0
            coefficients = torch.tensor(record["coefficients"], dtype=torch.float64)
            wanted = dense.combine(coefficients)
            found = flat(trainer.run.subject.parameters) - before
            assert wanted.norm() > 0
            assert (found - wanted).norm() <= 1e-6 * before.norm()
            assert torch.dot(found, wanted) > 0.99 * found.norm() * wanted.norm()
            after = everything(built.model, built.optimizer)
            for key in ("buffers", "optimizer", "groups", "rng", "modes"):
                assert_same(after[key], state[key])
            dense.jumped(wanted)
            moved += 1
    trainer.metrics.sink.close()
    assert moved >= 2, "nothing was accepted"


def _last_jump(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == "jump"][-1]


def _recorded(trainer: HybridTrainer) -> tuple[Callable[[], None], DenseBasis]:
    """The basis' own accumulate, with a dense reference fed beside it."""
    run = trainer.run
    dense = DenseBasis(
        run.subject.parameters, run.windows.groups, run.proposer.predictor.spec, run.config.predictor.window
    )
    original = run.windows.basis.accumulate

    def accumulate() -> None:
        original()
        dense.accumulate()

    return accumulate, dense


def test_judged_at_theta_the_loss_after_is_real() -> None:
    """With the whole data set in the batch the verdict's losses are those anyone can measure."""
    built = setup("mlp", "adam")
    trainer = built.trainer(config(), predictor=Fake())
    [batch, *_] = batches = full_batch(40)
    before = torch.tensor(0.0)
    for b in batches:
        before = loss_fn(built.model, batch).detach()
        result = trainer.step(b)
        if result.was_predicted:
            assert result.verdict is not None
            assert result.verdict.loss_before == pytest.approx(float(before), rel=1e-6)
            assert result.verdict.loss_after == pytest.approx(float(loss_fn(built.model, batch).detach()), rel=1e-6)
            assert result.loss < float(before)
            return
    raise AssertionError("nothing was accepted")


def test_jump_steps_count_one_batch_and_no_backward() -> None:
    built = setup("mlp", "adam")
    trainer = built.trainer(config(), predictor=Fake())
    results = [trainer.step(b) for b in make_batches(40)]
    jumps = proposals(results)
    assert any(r.was_predicted for r in jumps)
    assert all(r.num_backward == 0 and r.num_forward > 0 and r.gradient_norm is None for r in jumps)
    counts = trainer.statistics()
    assert counts["num_backward"] == sum(r.num_backward for r in results) == counts["num_real_steps"]
    assert counts["num_forward"] == pytest.approx(sum(r.num_forward for r in results))
    assert counts["num_claimed_steps"] == sum(r.num_claimed_steps for r in results)
    assert counts["num_steps"] == len(results) == trainer.current_step


def test_control_group_is_a_random_share(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_all(0)
    trainer = setup().trainer(config(gate__holdout_fraction=0.3, correct_steps=0), predictor=Fake())
    draws = [predict_step._is_control(trainer.run) for _ in range(2000)]
    assert 0.26 < sum(draws) / len(draws) < 0.34
    never = setup().trainer(config(gate__holdout_fraction=0.0), predictor=Fake())
    assert not any(predict_step._is_control(never.run) for _ in range(100))


def test_faulty_predictor_table_is_used() -> None:
    assert len(set(PREDICTOR_FAULTS)) == len(PREDICTOR_FAULTS) >= 15
    assert copy.deepcopy(make_model("mlp")) is not None
