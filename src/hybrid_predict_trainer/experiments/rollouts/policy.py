"""A policy with verifiable rewards: a small GPT that adds two numbers, sampled and trained by its own answers.

Three-digit addition with the answer's lowest digit first.  A prompt has 8 tokens, an answer 4; a reward is 1 for an
answer that is right in every digit.  The probability of the right answer is the expected reward, so that a policy is
scored without sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...tasks.language.gpt import Gpt, GptConfig

NUM_DIGITS = 3
PLUS, EQUALS, NUM_TOKENS = 10, 11, 12
PROMPT_TOKENS, ANSWER_TOKENS = 2 * NUM_DIGITS + 2, NUM_DIGITS + 1

#: 100,800 weights.
SHAPE = GptConfig(
    num_layers=2, width=64, num_heads=4, context=PROMPT_TOKENS + ANSWER_TOKENS, lr=1e-3, vocab_size=NUM_TOKENS
)

#: Prompts of a step, and answers that are sampled to each.
NUM_PROMPTS, GROUP = 16, 8


@dataclass(frozen=True, slots=True)
class Problems:
    """Prompts and their right answers.

    Attributes:
        prompts: (N, 8) tokens.
        answers: (N, 4) tokens.
    """

    prompts: Tensor
    answers: Tensor


@dataclass(frozen=True, slots=True)
class Rollout:
    """What a policy has answered, groups of the same prompt one after the other.

    Attributes:
        prompts: (N, 8) tokens.
        answers: (N, 4) sampled tokens.
        rewards: (N,), 0 or 1.
        log_probs: (N,) of the whole answers under the policy that gave them, nats.
    """

    prompts: Tensor
    answers: Tensor
    rewards: Tensor
    log_probs: Tensor


def new_policy(seed: int) -> nn.Module:
    """A policy with drawn weights, scaled so that it learns in some hundred steps."""
    torch.manual_seed(seed)
    policy = Gpt(SHAPE)
    for module in policy.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.mul_(SHAPE.width**-0.5 / 0.02)
    return policy


def draw_problems(num: int, generator: torch.Generator) -> Problems:
    """Two numbers below 1,000 each, drawn anew."""
    a, b = torch.randint(0, 10**NUM_DIGITS, (2, num), generator=generator)
    shown = [*_digits(a, NUM_DIGITS)[::-1], torch.full_like(a, PLUS), *_digits(b, NUM_DIGITS)[::-1]]
    return Problems(torch.stack([*shown, torch.full_like(a, EQUALS)], 1), torch.stack(_digits(a + b, ANSWER_TOKENS), 1))


def _digits(numbers: Tensor, num: int) -> list[Tensor]:
    """Lowest first."""
    return [numbers // 10**k % 10 for k in range(num)]


def log_probs_of(policy: nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    """(N, 4) log probability of every token of an answer, given those before it, nats."""
    logits = policy(torch.cat([prompts, answers[:, :-1]], 1))[:, PROMPT_TOKENS - 1 :]
    return -functional.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none").view(answers.shape)


@torch.no_grad()
def sample(policy: nn.Module, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """(N, 4) answers at temperature 1."""
    tokens = prompts
    for _ in range(ANSWER_TOKENS):
        probabilities = policy(tokens)[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return tokens[:, PROMPT_TOKENS:]


@torch.no_grad()
def draw_rollout(policy: nn.Module, generator: torch.Generator) -> Rollout:
    """Answers of the policy to new prompts."""
    problems = draw_problems(NUM_PROMPTS, generator)
    prompts, right = (t.repeat_interleave(GROUP, 0) for t in (problems.prompts, problems.answers))
    answers = sample(policy, prompts, generator)
    rewards = (answers == right).all(1).float()
    return Rollout(prompts, answers, rewards, log_probs_of(policy, prompts, answers).sum(1))


def advantages(rewards: Tensor, group: int = GROUP) -> Tensor:
    """(N,) rewards less their group's mean, over its standard deviation (Shao et al., arXiv 2402.03300, section 4)."""
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def policy_loss(policy: nn.Module, rollout: Rollout) -> Tensor:
    """Minus the advantage-weighted log probability per token: made for its gradient, says nothing of the policy."""
    log_probs = log_probs_of(policy, rollout.prompts, rollout.answers).sum(1)
    return -(advantages(rollout.rewards) * log_probs).mean() / ANSWER_TOKENS


@torch.no_grad()
def expected_reward(policy: nn.Module, problems: Problems) -> tuple[float, float]:
    """Expected reward of a sampled answer, and share of prompts whose likeliest tokens are right."""
    logits = policy(torch.cat([problems.prompts, problems.answers[:, :-1]], 1))[:, PROMPT_TOKENS - 1 :].float()
    chosen = logits.log_softmax(-1).gather(-1, problems.answers[..., None])[..., 0].sum(1)
    greedy = (logits.argmax(-1) == problems.answers).all(1)
    return chosen.exp().mean().item(), greedy.float().mean().item()


def judged_problems() -> Problems:
    """1,500 problems that every policy is scored on."""
    return draw_problems(1500, torch.Generator().manual_seed(987_654))


def supervised(policy: nn.Module, target: float, *, seed: int = 0, max_steps: int = 6000) -> int:
    """Train on right answers until the expected reward is reached; returns the steps it took.

    Raises:
        RuntimeError: it is not reached.
    """
    generator, scored = torch.Generator().manual_seed(seed), judged_problems()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=SHAPE.lr, betas=(0.9, 0.98))
    for step in range(1, max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = SHAPE.lr * min(1.0, step / 50)
        problems = draw_problems(128, generator)
        optimizer.zero_grad()
        (-log_probs_of(policy, problems.prompts, problems.answers).mean()).backward()
        optimizer.step()
        if step % 4 == 0 and expected_reward(policy, scored)[0] >= target:
            return step
    raise RuntimeError(f"the policy has not reached an expected reward of {target} in {max_steps} supervised steps")


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """(P,) copies one after the other."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])
