"""Policy optimization with exact scores: the task, the rules of jumps, their nulls and what is read off them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer.cli.hpt import main
from hybrid_predict_trainer.experiments.arms.options import InputError
from hybrid_predict_trainer.experiments.probe import rewards
from hybrid_predict_trainer.experiments.rollouts import policy, program, runs
from hybrid_predict_trainer.experiments.rollouts.linearity import shared_drift, straightness, with_random_signs
from hybrid_predict_trainer.experiments.rollouts.policy import Problems, Rollout
from hybrid_predict_trainer.experiments.rollouts.runs import (
    RolloutArm,
    direction,
    rollout_scores,
    run,
)


@pytest.fixture(scope="module")
def scored() -> Problems:
    return policy.draw_problems(64, torch.Generator().manual_seed(5))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the task ------------------------------------------------------------------------------------------


def test_a_problem_reads_as_a_sum_and_its_answer_from_the_lowest_digit() -> None:
    problems = policy.draw_problems(50, generator())
    for prompt, answer in zip(problems.prompts.tolist(), problems.answers.tolist(), strict=True):
        assert (prompt[3], prompt[7]) == (policy.PLUS, policy.EQUALS)
        a, b = (int("".join(map(str, digits))) for digits in (prompt[:3], prompt[4:7]))
        assert int("".join(map(str, answer[::-1]))) == a + b


class Coin(nn.Module):
    """Says 7 half of the time, whatever it is asked."""

    def forward(self, tokens: Tensor) -> Tensor:
        probabilities = torch.full((policy.NUM_TOKENS,), 0.5 / (policy.NUM_TOKENS - 1))
        probabilities[7] = 0.5
        return probabilities.log().expand(*tokens.shape, -1)


def test_the_expected_reward_is_the_mean_of_sampled_rewards() -> None:
    right = torch.full((1, 4), 7)
    problems = Problems(torch.zeros(1, 8, dtype=torch.long), right)
    expected, greedy = policy.expected_reward(Coin(), problems)
    assert (expected, greedy) == (pytest.approx(0.5**4), 1.0)
    answers = policy.sample(Coin(), problems.prompts.repeat(10_000, 1), generator())
    assert (answers == right).all(1).float().mean().item() == pytest.approx(0.5**4, abs=0.01)


def test_right_answers_teach_until_the_target(monkeypatch: pytest.MonkeyPatch, scored: Problems) -> None:
    monkeypatch.setattr(policy, "judged_problems", lambda: scored)
    subject = policy.new_policy(0)
    before, _ = policy.expected_reward(subject, scored)
    assert policy.supervised(subject, 2 * before) % 4 == 0
    assert policy.expected_reward(subject, scored)[0] >= 2 * before
    with pytest.raises(RuntimeError, match="has not reached an expected reward of 1"):
        policy.supervised(subject, 1.0, max_steps=4)


def test_advantages_have_no_mean_within_a_group_and_nothing_is_learnt_where_all_answers_are_alike() -> None:
    rewards = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0] + [1.0] * 8)
    found = policy.advantages(rewards)
    assert found.view(2, 8).sum(1).abs().max() < 1e-5
    assert found[0] > 0 > found[1]
    assert torch.equal(found[8:], torch.zeros(8))


def test_scores_are_nothing_for_the_policy_that_gave_the_answers_and_rise_along_the_gradient() -> None:
    subject = policy.new_policy(0)
    drawn = policy.draw_rollout(subject, generator())
    rewards = (torch.arange(len(drawn.rewards)) % 3 == 0).float()
    rollout = Rollout(drawn.prompts, drawn.answers, rewards, drawn.log_probs)
    assert rollout_scores(subject, rollout).abs().max() < 1e-5
    policy.policy_loss(subject, rollout).backward()
    with torch.no_grad():
        for p in subject.parameters():
            p.sub_(0.1 * p.grad)  # type: ignore[operator]
    assert rollout_scores(subject, rollout).mean() > 0


# ---- rules -----------------------------------------------------------------------------------------------


def chunks_of(drift: float, noise: float, num: int = 8) -> list[Tensor]:
    g = generator(3)
    return [torch.full((num, 40), drift) + noise * torch.randn(num, 40, generator=g) for _ in range(2)]


def test_without_noise_the_shrunken_jump_is_the_mean_one() -> None:
    chunks = chunks_of(1.0, 0.0)
    for rule in ("mean", "shrunken"):
        found = direction(RolloutArm(name="", rule=rule), chunks, generator())  # type: ignore[arg-type]
        assert torch.allclose(found[0], torch.full((40,), 2.0))  # ten steps of a chunk of five


def test_noise_alone_is_hardly_followed() -> None:
    chunks = chunks_of(0.0, 1.0)
    mean, shrunken = (
        direction(RolloutArm(name="", rule=rule), chunks, generator())[0].norm().item()  # type: ignore[arg-type]
        for rule in ("mean", "shrunken")
    )
    assert shrunken < 0.5 * mean


@pytest.mark.parametrize("rule", ["random-signs", "other-seed"])
def test_a_null_is_as_long_as_the_jump_that_it_stands_beside(rule: Any) -> None:
    chunks = chunks_of(1.0, 0.3)
    size = torch.cat(direction(RolloutArm(name="", rule="shrunken"), chunks, generator())).norm()
    null = direction(RolloutArm(name="", rule=rule), chunks, generator(), torch.randn(80, generator=generator(9)))
    assert torch.cat(null).norm() == pytest.approx(size.item(), rel=1e-5)


def test_another_seeds_window_is_wanted_where_that_is_the_null() -> None:
    with pytest.raises(ValueError, match="another seed"):
        direction(RolloutArm(name="", rule="other-seed"), chunks_of(1.0, 0.3), generator())


# ---- runs ------------------------------------------------------------------------------------------------


def few_answers(subject: nn.Module, drawn_by: torch.Generator) -> Rollout:
    """Eight answers, rewarded where they begin with an even digit: what a new policy can learn at once."""
    prompts = policy.draw_problems(1, drawn_by).prompts.repeat(policy.GROUP, 1)
    answers = policy.sample(subject, prompts, drawn_by)
    with torch.no_grad():
        log_probs = policy.log_probs_of(subject, prompts, answers).sum(1)
    return Rollout(prompts, answers, (answers[:, 0] % 2 == 0).float(), log_probs)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "draw_rollout", few_answers)


def a_run(scored: Problems, steps: int = 50, **arm: Any) -> tuple[Any, list[Tensor]]:
    subject = policy.new_policy(0)
    found = run(subject, RolloutArm(name="", **arm), rate=1e-4, steps=steps, seed=1, scored=scored)
    return found, [p.detach().clone() for p in subject.parameters()]


@pytest.mark.usefixtures("small")
def test_a_jump_that_the_rollouts_refuse_leaves_no_trace(scored: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "rollout_scores", lambda model, rollout: torch.zeros(8))
    plain, without = a_run(scored)
    judged, with_refusals = a_run(scored, rule="shrunken", judged=True)
    assert (judged.proposed, judged.kept) == (1, 0)
    assert all(torch.equal(a, b) for a, b in zip(without, with_refusals, strict=True))
    assert judged.tokens > plain.tokens == 50


@pytest.mark.usefixtures("small")
def test_a_jump_that_is_not_judged_is_made(scored: Problems) -> None:
    _, without = a_run(scored)
    found, with_jump = a_run(scored, rule="mean")
    assert (found.proposed, found.kept) == (1, 1)
    assert not torch.equal(without[0], with_jump[0])


@pytest.mark.usefixtures("small")
def test_the_trainer_asks_for_a_rollout_at_every_step(scored: Problems) -> None:
    found, _ = a_run(scored, steps=12, rule="trainer")
    assert found.steps == 12
    assert found.tokens == pytest.approx(12, rel=0.2)


# ---- signs of a line, and what seeds share ------------------------------------------------------------------


def test_a_walk_without_drift_looks_like_a_line() -> None:
    steps = torch.randn(200, 3000, generator=generator())
    path = torch.cat([torch.zeros(1, 3000), steps.cumsum(0)])
    found = straightness(path)
    assert 0.7 < found["rank_1"] < 0.9  # 0.81 of Brownian motion
    assert found["r2"] > 0.8
    assert abs(found["cos_20"]) < 0.1  # its windows know nothing of each other


def test_a_line_is_one() -> None:
    path = torch.arange(61.0)[:, None] * torch.randn(1, 50, generator=generator())
    found = straightness(path)
    for name in ("rank_1", "r2", "r2_weights", "cos_5", "cos_20"):
        assert found[name] == pytest.approx(1, abs=1e-4), name
    assert straightness(with_random_signs(path, generator()))["cos_5"] < 0.9


def test_random_signs_keep_the_length_of_every_step() -> None:
    path = torch.randn(30, 7, generator=generator()).cumsum(0)
    null = with_random_signs(path, generator())
    assert torch.allclose((path[1:] - path[:-1]).abs(), (null[1:] - null[:-1]).abs(), atol=1e-5)
    assert not torch.equal(null, path)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shared_drift_is_the_share_of_it_in_the_square(share: float) -> None:
    g = generator()
    drift = torch.randn(20_000, generator=g) * share**0.5
    windows = [{40: drift + (1 - share) ** 0.5 * torch.randn(20_000, generator=g)} for _ in range(4)]
    assert shared_drift(windows)[40] == pytest.approx(share, abs=0.02)


# ---- what is read off -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "expected"),
    [(0.5, (1.0, "exact")), (0.6, (1.25, "exact")), (0.3, (0.5, "at most")), (0.9, (1.5, "at least")),
     (0.45, (0.75, "exact"))],
)  # fmt: skip
def test_speed_is_the_length_of_the_plain_run_with_that_reward(reward: float, expected: tuple[float, str]) -> None:
    found = program.speedup(reward, {0.5: 0.4, 1.0: 0.5, 1.5: 0.7})
    assert found == (pytest.approx(expected[0]), expected[1])


def result_with(rows: dict[str, tuple[float, float]], seeds: int = 5) -> dict[str, Any]:
    return {
        "seeds": list(range(seeds)),
        "rows": [
            {"name": name, "proposed": 3, "difference": {"low": low, "mean": 0.0, "high": high}}
            for name, (low, high) in rows.items()
        ],
    }


def test_a_ruling_needs_seeds_and_an_interval_above_zero() -> None:
    assert "no ruling" in program.ruling(result_with({"shrunken": (0.1, 0.2)}, seeds=2))
    assert "no-go" in program.ruling(result_with({"shrunken": (-0.01, 0.2)}))
    assert "shrunken end above" in program.ruling(result_with({"shrunken": (0.01, 0.2)}))
    both = program.ruling(result_with({"shrunken": (0.01, 0.2), "null: random signs": (0.01, 0.3)}))
    assert "so it is not the direction" in both


@pytest.mark.usefixtures("small")
def test_stored_runs_are_taken_and_the_tables_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: Problems
) -> None:
    monkeypatch.setattr(program, "supervised", lambda subject, target: 0)
    monkeypatch.setattr(program, "judged_problems", lambda: scored)
    request = program.RolloutRequest(out=tmp_path, quick=True, steps=50, arms=("shrunken,-40,-Y-10",))
    said: list[str] = []
    first = program.measure(request, said.append)
    assert len(said) == 2 + 8
    said.clear()
    second = program.measure(request, said.append)
    assert said == []
    assert first["rows"] == second["rows"]
    text = program.format_text(second)
    assert "| shrunken, 40, Y 10 |" in text
    assert "no ruling: 2 seeds" in text
    assert "| random signs |" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--seeds", "1"], "--seeds 1"), (["--steps", "20"], "--steps 20"), (["--arms", "hybrid"], "unknown arm"),
     (["--lr-grid", "1e-3"], "--lr-grid does not apply"), (["--preset", "3M"], "--preset does not apply")],
)  # fmt: skip
def test_bad_input_is_one_line(flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "regimes", "--regime", "rl", "--out", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_arm_that_is_not_known_raises() -> None:
    with pytest.raises(InputError, match="known: linear-decay"):
        program._chosen(("no-such",))


# ---- what a probe says ------------------------------------------------------------------------------------------


def test_a_probe_of_rewards_says_no_go_with_the_figures_of_the_documents(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--rewards"]) == 0
    said = capsys.readouterr().out
    assert "jumps: no-go" in said
    page = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    page = page[page.index("## rl:") :]
    for measured in (*rewards.JUMPS, *rewards.SIZES):
        found = f"{measured.speedup:.2f}"
        found += "" if measured.low is None else f" [{measured.low:.2f}, {measured.high:.2f}]"
        assert f"{measured.what}: S {found}" in said
        assert f" {found} |" in page, measured.what


@pytest.mark.parametrize(
    ("flags", "said"), [(["--toml", "x.toml"], "no other settings"), (["--task", "gpt"], "--task gpt")]
)
def test_a_probe_of_rewards_takes_nothing_else(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["probe", "--rewards", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
