"""Early cuts: when a group is slowed down, how it comes back, and that a step is really shortened."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from cases import assert_same, config, setup
from hybrid_predict_trainer import HybridTrainer
from hybrid_predict_trainer.move.group_warmup import (
    AFTER_RAISE,
    CUT,
    EARLY_STEPS,
    MUST_FALL,
    NUM_COSINES,
    RECOVERY_STEPS,
    GroupWarmup,
    beyond_the_edge,
    shorten,
    shortened,
)
from hybrid_predict_trainer.move.lr_multiplier import LrMultiplier
from hybrid_predict_trainer.move.multiplier import GROWTH, Advice, Multiplier, Reading
from hybrid_predict_trainer.move.unit_multiplier import UnitMultiplier
from hybrid_predict_trainer.tasks import TaskSettings, make_task
from hybrid_predict_trainer.weights.parameters import Groups


@pytest.mark.parametrize(
    ("cosines", "beyond"),
    [
        ([0.2, 0.2], False),  # too few
        ([0.2, 0.2, 0.2], True),
        ([0.04, 0.04, 0.04], False),  # a tuned rate spends its time there
        ([-0.2, -0.2, -0.2], False),
        ([0.5, -0.1, -0.1], False),  # one of three: noise
        ([0.3, 0.1, 0.1], True),
    ],
)
def test_a_group_is_beyond_the_edge_where_three_cosines_agree(cosines: list[float], beyond: bool) -> None:
    assert beyond_the_edge(cosines) is beyond


#: Of what is trained: a block and what is around it.
TWO = ("attention_v", "head")


def observed(cuts: GroupWarmup, *rows: tuple[float, ...]) -> GroupWarmup:
    for cosines in rows:
        cuts.observe(cosines)
    return cuts


def test_only_the_group_in_question_is_cut_and_its_cosines_start_anew() -> None:
    cuts = observed(GroupWarmup(TWO, least=0.05), *[(0.3, 0.0)] * NUM_COSINES)
    assert cuts.factors == [CUT, 1.0]
    observed(cuts, *[(0.3, 0.0)] * (NUM_COSINES - 1))
    assert cuts.factors == [CUT, 1.0]  # the old ones were measured at the old length
    observed(cuts, (0.3, 0.0))
    assert cuts.factors == [CUT**2, 1.0]
    assert cuts.num_cuts == 2


def test_the_newest_cosines_count_not_all_of_them() -> None:
    cuts = observed(GroupWarmup(TWO, least=0.05), *[(-0.5, 0.0)] * 10, *[(0.3, 0.0)] * NUM_COSINES)
    assert cuts.factors == [CUT, 1.0]


def test_cuts_are_bounded() -> None:
    cuts = observed(GroupWarmup(TWO, least=0.3), *[(0.3, 0.0)] * (10 * NUM_COSINES))
    assert cuts.factors == [0.3, 1.0]


def test_a_group_comes_back_by_the_same_amount_at_every_step() -> None:
    cuts = observed(GroupWarmup(TWO, least=0.05), *[(0.3, 0.0)] * NUM_COSINES)
    for n in range(1, RECOVERY_STEPS // 2):
        cuts.count_step()
        assert cuts.factors[0] == pytest.approx(CUT + n / RECOVERY_STEPS)
    for _ in range(2):
        cuts.count_step()
    assert cuts.factors == [1.0, 1.0]
    assert not cuts.active


def test_only_the_first_steps_are_watched_and_those_after_a_raise() -> None:
    cuts = GroupWarmup(TWO, least=0.05)
    for _ in range(EARLY_STEPS):
        assert cuts.watching
        cuts.count_step()
    assert not cuts.watching
    cuts.lengthened(2.0)
    for _ in range(AFTER_RAISE):
        assert cuts.watching
        cuts.count_step()
    assert not cuts.watching


def test_a_bound_of_one_means_no_cuts_at_all() -> None:
    cuts = GroupWarmup(TWO, least=1.0)
    assert not cuts.watching
    cuts.lengthened(2.0)
    assert not cuts.watching


@pytest.mark.parametrize(
    ("roles", "watched"),
    [
        (("embedding", "attention_v", "mlp_up", "head", "norm_bias"), True),
        (("mlp_down", "norm_bias"), True),
        (("head", "norm_bias", "other"), False),  # a plain MLP or CNN
        (("attention_q", "mlp_up"), False),  # adapters in frozen blocks
    ],
)
def test_only_blocks_trained_with_what_is_around_them(roles: tuple[str, ...], watched: bool) -> None:
    assert GroupWarmup(roles, least=0.05).watching is watched


def test_in_an_untrained_network_the_blocks_begin_at_the_bottom_and_come_up_by_themselves() -> None:
    cuts = GroupWarmup(TWO, least=0.01, untrained=True)
    assert cuts.factors == [0.01, 1.0]
    for n in range(1, 99):
        cuts.count_step()
        assert cuts.factors == [pytest.approx(0.01 + n / RECOVERY_STEPS), 1.0]
    cuts.count_step()
    assert cuts.factors == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("untrained", "wanted"), [(True, [0.2, 1.0]), (False, [0.8, 1.0])])
def test_a_raise_reaches_the_blocks_of_an_untrained_network_later(untrained: bool, wanted: list[float]) -> None:
    """Their steps stay as long as they were, and come up to the new length by themselves."""
    cuts = GroupWarmup(TWO, least=0.01, untrained=untrained)
    cuts.factors = [0.8, 1.0]
    cuts.lengthened(4.0)
    assert cuts.factors == pytest.approx(wanted)
    cuts.lengthened(1000.0)
    assert cuts.factors[0] >= 0.01


def test_which_blocks_come_up_later_is_part_of_the_state() -> None:
    a, b = GroupWarmup(TWO, least=0.01, untrained=True), GroupWarmup(TWO, least=0.01)
    a.factors = [0.8, 1.0]
    b.load_state_dict(a.state_dict())
    b.lengthened(2.0)
    assert b.factors == [0.4, 1.0]


@pytest.mark.parametrize(("touched", "wanted"), [(False, [0.8 / GROWTH, 1.0]), (True, [0.8, 1.0])])
def test_a_raise_of_the_scale_tells_the_cuts(
    monkeypatch: pytest.MonkeyPatch, touched: bool, wanted: list[float]
) -> None:
    """Before the edge; a creep beyond it is too small to matter."""

    def decide(multiplier: Multiplier, *args: object) -> tuple[Advice, bool]:
        multiplier.value *= GROWTH
        return Advice.RAISED, True

    monkeypatch.setattr(Multiplier, "decide", decide)
    scale = LrMultiplier(Groups(("a", "b"), (0, 1), TWO, (1, 1)), 100.0, 0.01, check_steps=1, untrained=True)
    scale.cuts.factors, scale.multiplier.touched = [0.8, 1.0], touched
    monkeypatch.setattr(scale.multiplier, "follow", lambda lr: True)
    scale._cosines = [torch.tensor(-0.5)]
    assert scale.check(Reading(lr=1.0, loss=1.0, noise=0.1, newest=[1.0])) is Advice.RAISED
    assert scale.cuts.factors == wanted


# ---------------------------------------------------------------- is it harm?


@pytest.mark.parametrize(("fallen", "ended"), [(False, True), (True, False)])
def test_the_cuts_end_where_the_loss_has_not_fallen_in_time(fallen: bool, ended: bool) -> None:
    cuts = GroupWarmup(TWO, least=0.01, untrained=True)
    for _ in range(MUST_FALL - 1):
        cuts.count_step()
        cuts.on_loss(fallen=False)  # it may still fall
    assert cuts.active
    cuts.count_step()
    cuts.on_loss(fallen=fallen)
    assert cuts.active is not ended
    assert cuts.watching is not ended


def test_once_ended_there_are_no_more_cuts() -> None:
    cuts = GroupWarmup(TWO, least=0.01, untrained=True)
    cuts.end()
    assert cuts.factors == [1.0, 1.0]
    cuts.lengthened(8.0)
    assert not cuts.watching
    assert not cuts.active
    again = GroupWarmup(TWO, least=0.01, untrained=True)
    again.load_state_dict(cuts.state_dict())
    again.lengthened(8.0)
    assert not again.active


def test_the_scale_tells_the_cuts_at_its_checks() -> None:
    """The losses of the first steps against the newest ones: here they stay where they are."""
    for last, active in ((1.0, False), (0.5, True)):
        scale = LrMultiplier(Groups(("a", "b"), (0, 1), TWO, (1, 1)), 1.0, 0.01, untrained=True)
        for i in range(MUST_FALL + scale.check_steps):
            scale.after_step([])
            loss = 1.0 if i < 10 else last
            scale.check(Reading(lr=1.0, loss=loss, noise=0.1, newest=[loss] * 12))
        assert scale.shortening is active


@pytest.mark.parametrize("roles", [("head", "other"), ("attention_q", "mlp_up")])
def test_without_cuts_there_is_no_ramp(roles: tuple[str, ...]) -> None:
    assert GroupWarmup(roles, least=0.01, untrained=True).factors == [1.0, 1.0]
    assert GroupWarmup(TWO, least=1.0, untrained=True).factors == [1.0, 1.0]


def test_a_network_begins_with_the_ramp_and_one_that_was_trained_without() -> None:
    """Found out from the gains of its norms: one real step of anything moves them apart."""
    task = make_task("gpt", TaskSettings(preset="0.3M", data_bytes=100_000))
    model = task.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = config(min_group_factor=0.01, recipe="off")

    def trainer() -> HybridTrainer:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        return HybridTrainer(model, optimizer, settings, loss_fn=task.loss_fn, lr_scheduler=schedule)

    first = trainer()
    assert isinstance(first.run.optimizer_step.scale, LrMultiplier)
    assert min(first.run.optimizer_step.scale.cuts.factors) == 0.01
    before = [p.detach().clone() for p in first.run.subject.parameters]
    first.step(next(task.batches(0)))
    moved = {
        role: max((p - b).abs().max().item() for p, b, g in zip(
            first.run.subject.parameters, before, first.run.windows.groups.index, strict=True)
            if first.run.windows.groups.roles[g] == role)
        for role in ("head", "mlp_up")
    }  # fmt: skip
    assert moved["mlp_up"] == pytest.approx(0.01 * moved["head"], rel=0.2)  # Adam's first step has one length
    second = trainer()
    assert isinstance(second.run.optimizer_step.scale, LrMultiplier)
    assert min(second.run.optimizer_step.scale.cuts.factors) == 1.0


def test_shortening_is_per_group_and_leaves_the_others_alone_bit_for_bit() -> None:
    before = [torch.zeros(3), torch.zeros(2), torch.ones(1)]
    after = [torch.full((3,), 4.0), torch.tensor([0.1, 0.2]), torch.tensor([3.0])]
    wanted = after[1].clone()
    places = shortened(after, before, (0, 1, 0), [0.25, 1.0])
    assert list(places) == [0, 2]
    assert after[0][0] == 4.0  # nothing is written yet
    shorten(after, before, (0, 1, 0), [0.25, 1.0])
    assert_same(after, [torch.full((3,), 1.0), wanted, torch.tensor([1.5])])


@pytest.mark.parametrize("factor", [0.1, 0.5, 0.9, 1.0])
def test_weights_that_did_not_move_stay_bit_for_bit(factor: float) -> None:
    before = [torch.randn(100)]
    found = shortened([before[0].clone()], before, (0,), [factor])
    assert_same(list(found.values()), before if factor < 1 else [])


def counted(cuts: GroupWarmup, parameters: list[torch.Tensor], before: list[torch.Tensor], line: int) -> bool:
    """Count a step, interrupted at its n-th line; returns whether it was."""
    count = 0

    def inside(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == line:
                raise KeyboardInterrupt
        return inside

    sys.settrace(
        lambda frame, event, arg: (
            inside if frame.f_code.co_filename.endswith(("group_warmup.py", "algebra.py")) else None
        )
    )
    try:
        cuts.count_step(parameters, before, (0, 1, 0))
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_an_interruption_at_any_line_is_made_good_by_doing_it_again() -> None:
    """None of it or all of it: a step is never shortened twice, nor are factors."""
    ends, line, interrupted = [], 0, True
    while interrupted:
        line += 1
        cuts, before = GroupWarmup(TWO, least=0.01, untrained=True), [torch.ones(2), torch.ones(3), torch.zeros(1)]
        cuts.count_step()
        after = [b + 1 for b in before]
        interrupted = counted(cuts, after, before, line)
        if interrupted and cuts.num_steps == 1:
            cuts.count_step(after, before, (0, 1, 0))
        ends.append((after, cuts.state_dict()))
    assert line > 20
    for end in ends:
        assert_same(end, ends[-1])
    assert ends[-1][0][0].tolist() == pytest.approx([1.02] * 2)


def test_state_round_trips_between_two_cosines_of_a_decision() -> None:
    a, b = observed(GroupWarmup(TWO, least=0.05), (0.3, 0.1), (0.3, 0.1)), GroupWarmup(TWO, least=0.05)
    a.count_step()
    b.load_state_dict(a.state_dict())
    for cuts in (a, b):
        observed(cuts, (0.3, -0.5))
    assert a.factors == b.factors == [CUT, 1.0]
    assert_same(a.state_dict(), b.state_dict())


class Valley(nn.Module):
    """Two directions, one a hundred times steeper: L = (c steep^2 + c/100 flat^2) / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.steep, self.flat = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))


def descent(curvature: float, **changes: object) -> list[float]:
    """Losses of gradient descent at rate 1, never jumping; it diverges from a curvature of 2 on."""

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        assert isinstance(model, Valley)
        return (curvature * model.steep.square() + 0.01 * curvature * model.flat.square()).sum() / 2 + 0.0 * batch.sum()

    model = Valley()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = HybridTrainer(
        model, optimizer, config(explore_outcomes=0, gate__overhead_budget=0.0, **changes), loss_fn=loss,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        roles={"steep": "mlp_up", "flat": "head"},
    )  # fmt: skip
    return [trainer.step(torch.randn(4)).loss for _ in range(30)]


def test_a_group_beyond_the_edge_is_brought_below_it_and_the_other_goes_on() -> None:
    """Steep: the steps overshoot (plain shrinks by 0.9 a step); cut once they shrink by 0.05."""
    plain, cut = descent(1.9), descent(1.9, min_group_factor=0.05)
    assert plain[: NUM_COSINES + 1] == cut[: NUM_COSINES + 1]  # nothing is known yet
    flat = 0.5 * 0.019 * (1 - 0.019) ** (2 * 10)  # what is left of the other direction after ten steps
    assert plain[10] > 5 * flat
    assert cut[10] == pytest.approx(flat, rel=0.1)


def test_the_statistics_say_how_often_something_was_cut() -> None:
    made = setup("mlp", "sgd", "flat")
    trainer = made.trainer(config(max_lr_multiplier=9.0))
    assert trainer.statistics()["num_early_cuts"] == 0
    assert isinstance(trainer.run.optimizer_step.scale, LrMultiplier)
    observed(
        trainer.run.optimizer_step.scale.cuts, *[tuple([0.3] * trainer.run.windows.groups.num_groups)] * NUM_COSINES
    )
    assert trainer.statistics()["num_early_cuts"] == trainer.run.windows.groups.num_groups


def test_below_the_edge_the_run_is_the_plain_one_bit_for_bit() -> None:
    """Watching alone changes nothing."""
    assert descent(0.9) == descent(0.9, min_group_factor=0.05)


@pytest.mark.parametrize(
    ("maximum", "minimum", "kind"), [(1.0, 1.0, UnitMultiplier), (1.0, 0.05, LrMultiplier), (9.0, 1.0, LrMultiplier)]
)
def test_either_bound_alone_is_enough(maximum: float, minimum: float, kind: type) -> None:
    made = setup("mlp", "sgd", "flat")
    trainer = made.trainer(config(max_lr_multiplier=maximum, min_group_factor=minimum))
    assert type(trainer.run.optimizer_step.scale) is kind
