"""One run of policy optimization: plain, with jumps by a rule (followed or judged), or with the trainer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ... import schedules
from ...config.keys import with_values
from ...config.settings import HybridTrainerConfig
from ...cost import STEP_UNITS
from ...numerics.shrunken_mean import importance_weighted_gain, shrunken_step
from ...trainer import HybridTrainer
from ...weights.algebra import Tensors
from .policy import (
    ANSWER_TOKENS,
    GROUP,
    PROMPT_TOKENS,
    Problems,
    Rollout,
    draw_rollout,
    expected_reward,
    flattened,
    log_probs_of,
    policy_loss,
)

Rule = Literal["none", "mean", "shrunken", "random-signs", "other-seed", "trainer"]

WARMUP_STEPS, DECAY_SHARE, CLIP = 20, 0.2, 1.0
#: Steps of a chunk: a window's scatter is told from its chunks.
CHUNK_STEPS = 5
#: Steps between windows that are kept for other seeds.
KEPT_WINDOW = 40
#: Newest rollouts that a jump is judged on: they are there already.
NUM_JUDGED = 4
#: No jump in the last tenth: the rate is on its way to zero.
LAST_JUMP = 0.9
#: A token that is only computed forwards costs a third of one that is trained on.
FORWARD_SHARE = 1 / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutArm:
    """What is compared.

    Attributes:
        name: Of its row.
        rate: Times the tuned rate.
        schedule: "wsd" (the last fifth decays) or "linear", both to zero.
        rule: Where a jump goes: along the mean of the window, the same shrunken by its scatter, chunks with random
            signs, the window of another seed; the last two in the length of the shrunken one.
        window: Steps that a direction is taken from, and between jumps.
        horizon: Y, steps that a jump stands for.
        judged: Whether a jump has to raise the importance-weighted reward of the newest rollouts.
        length: Of the run, times the case's.
    """

    name: str
    rate: float = 1.0
    schedule: Literal["wsd", "linear"] = "wsd"
    rule: Rule = "none"
    window: int = 40
    horizon: int = 10
    judged: bool = False
    length: float = 1.0


@dataclass(slots=True, kw_only=True)
class RolloutRun:
    """A run that has ended.

    Attributes:
        reward: Expected reward of a sampled answer at the end.
        greedy: Share of prompts whose likeliest answer is right.
        steps: Real steps, each with one rollout.
        tokens: Cost in real steps: tokens generated and trained on, and those of judging as far as they are forward.
        cpu_s: CPU time.
        proposed, kept: Jumps.
        path: (T+1, P) weights before and after every step of the stable phase, where that was asked for.
    """

    reward: float
    greedy: float
    steps: int
    tokens: float
    cpu_s: float
    proposed: int = 0
    kept: int = 0
    path: Tensor | None = None
    windows: dict[int, Tensor] = field(default_factory=dict)


def run(
    base: nn.Module, arm: RolloutArm, *, rate: float, steps: int, seed: int, scored: Problems,
    others: dict[int, Tensor] | None = None, keep_path: bool = False,
) -> RolloutRun:  # fmt: skip
    """Train ``base`` in place.

    Args:
        base: The supervised policy.
        arm: What is done.
        rate: Tuned for a plain run.
        steps: Of the case.
        seed: Of prompts and answers.
        scored: Problems that the end is scored on.
        others: (P,) displacement of another seed's window by the step that it ends with.
        keep_path: Keep the weights of the stable phase, and displacements of its windows.
    """
    steps = round(arm.length * steps)
    optimizer = torch.optim.Adam(base.parameters(), lr=rate * arm.rate, betas=(0.9, 0.99))
    schedule = scheduled(optimizer, arm.schedule, steps)
    generator = torch.Generator().manual_seed(1000 + seed)
    started = time.process_time()
    if arm.rule == "trainer":
        found = _with_trainer(base, optimizer, schedule, steps, generator)
    else:
        found = _by_rule(base, optimizer, schedule, arm, steps, generator, others or {}, keep_path)
    found.cpu_s = time.process_time() - started
    found.reward, found.greedy = expected_reward(base, scored)
    return found


def scheduled(
    optimizer: torch.optim.Optimizer, kind: Literal["wsd", "linear"], steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """To zero at the run's end, after a short warm-up."""
    warmup = min(WARMUP_STEPS, steps // 4)
    if kind == "linear":
        return schedules.linear(optimizer, steps, warmup_steps=warmup)
    decay = round(DECAY_SHARE * steps)
    return schedules.wsd(
        optimizer, warmup_steps=warmup, stable_steps=steps - warmup - decay, decay_steps=decay, shape="linear"
    )


# ---- with the trainer -------------------------------------------------------------------------------------


def rollout_scores(policy: nn.Module, rollout: Rollout) -> Tensor:
    """(N,) what the weights would add to the reward of the rollout's policy: ``judge_fn`` of the trainer."""
    log_probs = log_probs_of(policy, rollout.prompts, rollout.answers).sum(1)
    return importance_weighted_gain(rollout.rewards, log_probs - rollout.log_probs, GROUP)


def _with_trainer(
    policy: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, steps: int,
    generator: torch.Generator,
) -> RolloutRun:  # fmt: skip
    """The defaults, judged by the rollouts: one for every call, also of those that are jumps."""
    config = with_values(HybridTrainerConfig(), {"training.gradient_clip_norm": CLIP})
    trainer = HybridTrainer(policy, optimizer, config, policy_loss, schedule, judge_fn=rollout_scores)
    for _ in range(steps):
        trainer.step(draw_rollout(policy, generator))
    counted = trainer.statistics()
    return RolloutRun(
        reward=0.0, greedy=0.0, cpu_s=0.0, steps=steps,
        tokens=steps * (1 - _TRAINED_SHARE) + counted["fair_cost_units"] / STEP_UNITS * _TRAINED_SHARE,
        proposed=counted["num_jumps_proposed"], kept=counted["num_jumps_accepted"],
    )  # fmt: skip


# ---- by a rule --------------------------------------------------------------------------------------------


def _by_rule(
    policy: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler,
    arm: RolloutArm, steps: int, generator: torch.Generator, others: dict[int, Tensor], keep_path: bool,
) -> RolloutRun:  # fmt: skip
    parameters = list(policy.parameters())
    found = RolloutRun(reward=0.0, greedy=0.0, steps=steps, tokens=0.0, cpu_s=0.0)
    signs = torch.Generator().manual_seed(generator.initial_seed() + 7)
    newest: deque[Rollout] = deque(maxlen=NUM_JUDGED)
    marks: deque[Tensors] = deque([_copies(parameters)], maxlen=arm.window // CHUNK_STEPS + 1)
    path, window_start = [flattened(parameters)] if keep_path else [], flattened(parameters)
    for step in range(1, steps + 1):
        newest.append(draw_rollout(policy, generator))
        _train_on(policy, optimizer, schedule, newest[-1])
        found.tokens += 1.0
        if keep_path and step <= (1 - DECAY_SHARE) * steps:
            path.append(flattened(parameters))
            if step % KEPT_WINDOW == 0:
                found.windows[step], window_start = path[-1] - window_start, path[-1]
        if step % CHUNK_STEPS == 0:
            marks.append(_copies(parameters))
        due = step % arm.window == 0 and WARMUP_STEPS < step < LAST_JUMP * steps and len(marks) == marks.maxlen
        if arm.rule != "none" and due:
            chunks = [torch.stack([b - a for a, b in zip(*pair, strict=True)]) for pair in _by_tensor(list(marks))]
            delta = direction(arm, chunks, signs, others.get(step))
            found.proposed += 1
            found.kept += _jump(policy, parameters, delta, list(newest) if arm.judged else [], found)
            marks.clear()
            marks.append(_copies(parameters))
    found.path = torch.stack(path) if path else None
    return found


def _train_on(
    policy: nn.Module, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler,
    rollout: Rollout,
) -> None:  # fmt: skip
    optimizer.zero_grad()
    policy_loss(policy, rollout).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
    optimizer.step()
    schedule.step()


def _copies(parameters: Sequence[Tensor]) -> Tensors:
    return [p.detach().clone() for p in parameters]


def _by_tensor(marks: Sequence[Tensors]) -> list[tuple[Tensors, Tensors]]:
    """Of every tensor: where its chunks begin, and where they end."""
    return [([m[i] for m in marks[:-1]], [m[i] for m in marks[1:]]) for i in range(len(marks[0]))]


def direction(
    arm: RolloutArm, chunks: Sequence[Tensor], signs: torch.Generator, other: Tensor | None = None
) -> Tensors:
    """Displacements of a jump, one per tensor.

    Args:
        arm: Its rule, window and horizon.
        chunks: (K, ...) displacements of the window's chunks, one per tensor.
        signs: Draws those of the null, one per chunk for all tensors.
        other: (P,) displacement of another seed's window.

    Raises:
        ValueError: the window is too short for its horizon; another seed's window is wanted and not there.
    """
    ratio = arm.horizon / CHUNK_STEPS
    if arm.rule == "mean":
        return [c.mean(0) * ratio for c in chunks]
    shrunken = [shrunken_step(list(c), chunk_steps=CHUNK_STEPS, horizon=arm.horizon) for c in chunks]
    if arm.rule == "shrunken":
        return shrunken
    if arm.rule == "random-signs":
        drawn = torch.randint(0, 2, (len(chunks[0]),), generator=signs).float() * 2 - 1
        null = [torch.einsum("k,k...->...", drawn, c) for c in chunks]
    elif other is not None:
        null = [
            piece.view_as(c[0]) for piece, c in zip(other.split([c[0].numel() for c in chunks]), chunks, strict=True)
        ]
    else:
        raise ValueError("the window of another seed is wanted, and that seed has not run yet")
    size = flattened(null).norm()
    factor = flattened(shrunken).norm() / size if size > 0 else 0.0
    return [t * factor for t in null]


@torch.no_grad()
def _jump(
    policy: nn.Module, parameters: Sequence[Tensor], delta: Tensors, judged_on: Sequence[Rollout], found: RolloutRun
) -> bool:
    """Move, unless rollouts that are there say that the reward would not rise; whether it was done."""
    before = _copies(parameters)

    def score() -> float:
        found.tokens += FORWARD_SHARE * len(judged_on) * _TRAINED_SHARE
        return torch.cat([rollout_scores(policy, r) for r in judged_on]).mean().item()

    standing = score() if judged_on else 0.0
    for p, d in zip(parameters, delta, strict=True):
        p.add_(d)
    if judged_on and not score() > standing:
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b)
        return False
    return True


#: Of a step's tokens, generated and trained on, those that are trained on.
_TRAINED_SHARE = (PROMPT_TOKENS + ANSWER_TOKENS) / (PROMPT_TOKENS + 2 * ANSWER_TOKENS)
