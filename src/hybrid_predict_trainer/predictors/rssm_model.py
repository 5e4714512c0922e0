"""A small recurrent state-space model of training, with DreamerV3's details (arXiv 2301.04104).

    h_t = GRU(h_{t-1}, [z_{t-1}, a_{t-1}])     deterministic path
    z_t ~ q(z | h_t, e_t)                      posterior, sees the encoded window e_t
    z_t ~ p(z | h_t)                           prior, imagines

z are categorical variables sampled straight-through from probabilities mixed with 1 % uniform.  One
time step is one window of training.  Heads read (h, z) of *imagined* states: the correction to the
coefficients of every group, the change of the log loss, and whether the loss survives; a decoder of
the encoding at observed states gives the representation something to hold.

Letters: ``B`` sequences, ``L`` windows of a sequence, ``D`` deterministic, ``S`` categoricals, ``C``
classes, ``F`` encoded features, ``A`` actions, ``R`` imagined rollouts, ``J`` windows ahead, ``G``
groups, ``K`` columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config.settings import RssmConfig
from ._answers import miss_loss
from ._frame import MAX_AHEAD
from ._learned import NUM_ACTIONS, initialised

#: Largest correction of one coefficient, in lengths of the last displacements; arbitrary.
MAX_CORRECTION = 2.0
#: Weights of the two halves of the KL (DreamerV3, table of hyper-parameters: beta_dyn 1, beta_rep 0.1).
KL_DYNAMICS, KL_REPRESENTATION = 1.0, 0.1
#: Weights of the rest against the KL.  The decoder's error is summed over the features, as DreamerV3
#: does: with a mean the posterior collapses to the prior (under 1 nat after 200 updates, nothing
#: learnt; with these 34 nats, and nine tenths of a hidden sign learnt after 100).
DECODER, COEFFICIENTS, CHANGE, SURVIVAL, MISS = 2.0, 1000.0, 100.0, 30.0, 30.0


class Latent(NamedTuple):
    """State of the model."""

    h: Tensor  # (B, D)
    z: Tensor  # (B, S * C) one-hot per categorical


class Heads(NamedTuple):
    """What is read off J imagined states."""

    corrections: Tensor  # (R, J, G, K)
    changes: Tensor  # (R, J) of the log loss in total, standardised
    survival: Tensor  # (R, J) logit that the loss is finite and below twice its value
    misses: Tensor  # (R, J, G) log of the expected squared miss of the displacement over the base's


class Batch(NamedTuple):
    """Sequences of windows and the starts of imagined rollouts among them."""

    encodings: Tensor  # (B, L, F) standardised
    actions: Tensor  # (B, L, A)
    starts: Tensor  # (R,) positions in the flattened (B * L)
    residuals: Tensor  # (R, J, G, K)
    beyond: Tensor  # (R, J, G) squared length of what no correction can reach
    miss_base: Tensor  # (J, G) what the base alone misses on average
    weights: Tensor  # (R, J, G, K) of each residual, 0: not known
    changes: Tensor  # (R, J) standardised, not finite: not known
    survived: Tensor  # (R, J) 1 or 0, NaN: not known


def _layer(num_inputs: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_inputs, num_outputs), nn.RMSNorm(num_outputs, eps=1e-6), nn.SiLU())


class RssmModel(nn.Module):
    """One member: observe, imagine, read, loss."""

    def __init__(
        self, config: RssmConfig, num_features: int, shape: tuple[int, int], generator: torch.Generator
    ) -> None:
        """Args: config: sizes.  num_features: F.  shape: (G, K).  generator: of weights and samples."""
        super().__init__()
        self.config, self.shape, self.generator = config, shape, generator
        D, H, Z = config.deterministic_dim, config.hidden_dim, config.stochastic_dim * config.num_categoricals
        with torch.device("meta"):  # no weight is drawn from the global generator
            self.embed = nn.Sequential(_layer(num_features, H), _layer(H, H))
            self.enter = _layer(Z + NUM_ACTIONS, H)
            self.gru = nn.GRUCell(H, D)
            self.prior = nn.Sequential(_layer(D, H), nn.Linear(H, Z))
            self.posterior = nn.Sequential(_layer(D + H, H), nn.Linear(H, Z))
            self.trunk = _layer(D + Z + 1, H)
            self.coefficients = nn.Linear(H, shape[0] * shape[1])
            self.change = nn.Linear(H, 1)
            self.survival = nn.Linear(H, 1)
            self.miss = nn.Linear(H, shape[0])
            self.decoder = nn.Linear(H, num_features)
        self.to_empty(device="cpu")
        initialised(generator, self)
        for head in (self.coefficients, self.change, self.survival, self.miss):
            nn.init.zeros_(head.weight)  # untrained: the base

    # ---- the transition --------------------------------------------------------------------------

    def initial(self, num_rows: int) -> Latent:
        """Zero state for B rows."""
        c = self.config
        z = torch.zeros(num_rows, c.stochastic_dim * c.num_categoricals)
        return Latent(torch.zeros(num_rows, c.deterministic_dim), z)

    def advance(self, state: Latent, action: Tensor) -> Tensor:
        """(B, D) deterministic state one window later."""
        h: Tensor = self.gru(self.enter(torch.cat([state.z, action], dim=1)), state.h)
        return h

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, S * C) logits -> (B, S, C) probabilities with the uniform share mixed in."""
        C = self.config.num_categoricals
        return (1 - self.config.unimix) * logits.view(len(logits), -1, C).softmax(dim=2) + self.config.unimix / C

    def sample(self, p: Tensor) -> Tensor:
        """(B, S, C) -> (B, S * C) one-hot sample, gradients straight through to the probabilities."""
        # by the inverse of the distribution function: a third of the time of torch.multinomial
        steps = p.detach().cumsum(dim=2)
        draw = torch.rand(*p.shape[:2], 1, generator=self.generator) * steps[:, :, -1:]
        index = (steps < draw).sum(dim=2, keepdim=True)  # at most C - 1: no draw is above the last step
        hot = torch.zeros_like(steps).scatter_(2, index, 1.0)
        return (hot + p - p.detach()).flatten(1)

    def observe(self, state: Latent, action: Tensor, embedded: Tensor) -> tuple[Latent, Tensor]:
        """One window later, with what was seen.

        Args:
            state: Before.
            action: (B, A) plan for the window between.
            embedded: (B, H) what ``embed`` makes of the standardised encoding.

        Returns:
            The new state and the posterior's probabilities (B, S, C).
        """
        h = self.advance(state, action)
        q = self.probabilities(self.posterior(torch.cat([h, embedded], dim=1)))
        return Latent(h, self.sample(q)), q

    def imagine(self, state: Latent, action: Tensor) -> Heads:
        """Roll out J windows from the prior and read the heads at every one.

        Args:
            state: R rows.
            action: (R, A) plan of the next window and of those after it.
        """
        later = action[:, 1:].expand(-1, NUM_ACTIONS)
        states = []
        for j in range(MAX_AHEAD):
            h = self.advance(state, action if j == 0 else later)
            state = Latent(h, self.sample(self.probabilities(self.prior(h))))
            states.append(state)
        R = len(action)
        # all at once: the heads' weights, and in training their gradients, go through memory once
        rolled = Latent(*(torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*states, strict=True)))
        x = self._features(rolled, torch.arange(1.0, MAX_AHEAD + 1).repeat(R))
        corrections = MAX_CORRECTION * torch.tanh(self.coefficients(x))
        return Heads(
            corrections.view(R, MAX_AHEAD, *self.shape),
            self.change(x).view(R, MAX_AHEAD),
            self.survival(x).view(R, MAX_AHEAD),
            self.miss(x.detach()).view(R, MAX_AHEAD, -1),  # how wrong it is must not shape what it says
        )

    def _features(self, state: Latent, ahead: Tensor) -> Tensor:
        """(B, H) what the heads read of B states, each ``ahead`` (B,) windows imagined."""
        features: Tensor = self.trunk(torch.cat([state.h, state.z, ahead.log1p()[:, None]], dim=1))
        return features

    # ---- the loss ----------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Tensor:
        """Negative evidence bound with free bits, and the heads on rollouts from observed states."""
        B, L, _ = batch.encodings.shape
        state, action = self.initial(B), torch.zeros(B, NUM_ACTIONS)
        states, posteriors = [], []
        embedded = self.embed(batch.encodings)  # all at once: what the recurrence needs not is not in it
        for t in range(L):
            state, q = self.observe(state, action, embedded[:, t])
            posteriors.append(q)
            states.append(state)
            action = batch.actions[:, t]
        seen = Latent(*(torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*states, strict=True)))
        q = torch.stack(posteriors, dim=1).flatten(0, 1)
        loss: Tensor = self._divergence(q.log(), self.probabilities(self.prior(seen.h)).log())
        decoded = self.decoder(self._features(seen, torch.zeros(B * L)))
        error = functional.mse_loss(decoded, batch.encodings.flatten(0, 1))
        loss = loss + DECODER * decoded.shape[1] * error
        if len(batch.starts):
            start = Latent(seen.h[batch.starts], seen.z[batch.starts])
            heads = self.imagine(start, batch.actions.flatten(0, 1)[batch.starts])
            loss = loss + self._head_loss(heads, batch)
        return loss

    def _divergence(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """() both halves of the KL, each with its free nats after the sum over categoricals."""

        def kl(a: Tensor, b: Tensor) -> Tensor:
            nats: Tensor = (a.exp() * (a - b)).sum(dim=(1, 2))
            return nats.clamp(min=self.config.free_nats).mean()

        total: Tensor = KL_DYNAMICS * kl(log_q.detach(), log_p) + KL_REPRESENTATION * kl(log_q, log_p.detach())
        return total

    def _head_loss(self, heads: Heads, batch: Batch) -> Tensor:
        num_targets = len(batch.starts) * MAX_AHEAD
        error = functional.huber_loss(heads.corrections, batch.residuals, reduction="none")
        loss = COEFFICIENTS * (batch.weights * error).sum() / num_targets
        missed = (batch.residuals - heads.corrections.detach()).square()
        loss = loss + MISS * miss_loss(
            heads.misses, missed, batch.beyond, batch.weights, batch.miss_base
        ) / num_targets  # fmt: skip
        known = torch.isfinite(batch.changes)
        if bool(known.any()):
            loss = loss + CHANGE * functional.huber_loss(heads.changes[known], batch.changes[known])
        known = torch.isfinite(batch.survived)
        if bool(known.any()):
            logits, wanted = heads.survival[known], batch.survived[known]
            loss = loss + SURVIVAL * functional.binary_cross_entropy_with_logits(logits, wanted)
        return loss
