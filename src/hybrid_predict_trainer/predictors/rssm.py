"""``rssm``: an ensemble of recurrent state-space models of training, learnt while it runs.

Every member has its own weights, optimizer, random generator and bootstrap mask over the windows.  It
is trained by truncated backpropagation through sequences of windows, at every k-th window (see
``pacing``), and predicts by rolling its prior out four windows, with sampling, once per window: a
prediction for any horizon is read off the same rollouts.  As the other learned predictors it corrects
the closed-form base of ``_learned``, and is trusted as far as its corrections have proved right.

Epistemic: spread between members; aleatoric: spread between rollouts of one, and the miss it expects.

Members are trained one after the other: the time goes into moving weights and their gradients through
memory, which batching the members does not save (and ``torch.vmap`` has no rule for ``nn.GRUCell``).

Letters: ``E`` members, ``M`` rollouts of all members, ``B`` sequences, ``L`` windows of a sequence,
``R`` imagined rollouts in training, ``J`` windows ahead, ``G`` groups, ``K`` columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config.settings import RssmConfig
from ..records import BasisSpec, PhasePrediction, StateDict, Window
from ._answers import Answers, phase_prediction
from ._learned import NUM_ACTIONS, Experience
from .pacing import Pace
from .rssm_model import Batch, Heads, Latent, RssmModel

#: R: rollouts imagined per update; arbitrary, about what a sequence holds.
NUM_IMAGINED = 16
#: Share of the windows each member learns from.
BOOTSTRAP_SHARE = 0.75
#: A loss of more than twice its value counts as diverged (``prediction_error_critical``).
DIVERGED = math.log(2.0)


class Member:
    """One model with everything that is its own."""

    def __init__(self, config: RssmConfig, experience: Experience, shape: tuple[int, int], seed: int) -> None:
        """Args: config: sizes.  experience: shared record.  shape: (G, K).  seed: of this member."""
        self.config, self.experience = config, experience
        self.generator = torch.Generator().manual_seed(seed)
        self.model = RssmModel(config, experience.encoder.num_features, shape, self.generator)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, eps=1e-8, fused=True)
        self.mask = torch.zeros(experience.capacity, dtype=torch.bool)  # windows this member learns from
        self.state = self.model.initial(1)
        self.q: Tensor | None = None  # (1, S, C) posterior of the last window
        self._action = torch.zeros(1, NUM_ACTIONS)

    @torch.no_grad()
    def follow(self, row: int) -> None:
        """Filter the state through the newest window, and draw whether to learn from it."""
        e = self.experience
        self.mask[row] = torch.rand((), generator=self.generator) < BOOTSTRAP_SHARE
        encoding = e.encoder.standardise(e.encodings[row : row + 1])
        self.state, self.q = self.model.observe(self.state, self._action, self.model.embed(encoding))
        self._action = e.actions[row : row + 1].clone()

    def update(self) -> float:
        """One optimizer step on a batch of sequences; returns the loss."""
        loss = self.model.loss(self._batch())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # only one member's gradients exist at a time
        return float(loss.detach())

    def _batch(self) -> Batch:
        e, config = self.experience, self.config
        L, B = min(config.sequence_length, e.count), config.batch_size
        oldest = max(e.count - e.capacity, 0) + L - 1
        # half of the sequences from the recent past: the dynamics drift
        recent = max(oldest, e.count - 4 * L)
        draws = torch.rand(B, generator=self.generator)
        low = torch.where(torch.arange(B) % 2 == 0, oldest, recent)
        ends = low + (draws * (e.count - low)).long()
        rows = (ends[:, None] - torch.arange(L - 1, -1, -1)) % e.capacity  # (B, L)
        flat = rows.flatten()
        usable = (self.mask[flat] & (e.shares[flat, 0].sum(dim=1) > 0)).nonzero()[:, 0]
        if len(usable):
            usable = usable[torch.randint(len(usable), (NUM_IMAGINED,), generator=self.generator)]
        starts = flat[usable]
        changes = e.changes[starts]
        diverged = (changes > DIVERGED).float()
        return Batch(
            encodings=e.encoder.standardise(e.encodings[rows]),
            actions=e.actions[rows],
            starts=usable,
            residuals=e.residuals[starts],
            beyond=e.beyond[starts],
            miss_base=e.miss_base.float(),
            weights=e.shares[starts][..., None] * e.known[None, :, None, :],
            changes=((changes - e.change_base.float()) / e.change_std.float()).clamp(-5.0, 5.0)
            + torch.where(torch.isfinite(changes), 0.0, math.nan),
            survived=torch.where(changes.isnan(), changes, 1 - diverged),
        )

    @torch.no_grad()
    def imagine(self, num_samples: int) -> Heads:
        """Rollouts from the last window, each from its own sample of the posterior."""
        h = self.state.h.expand(num_samples, -1)
        z = self.state.z.expand(num_samples, -1)
        if self.q is not None:
            z = self.model.sample(self.q.expand(num_samples, -1, -1))
        return self.model.imagine(Latent(h, z), self._action.expand(num_samples, -1))

    def num_parameters(self) -> int:
        """Weights of the model."""
        return sum(p.numel() for p in self.model.parameters())

    def state_dict(self) -> StateDict:
        """Everything that is this member's own."""
        return {
            "model": dict(self.model.state_dict()), "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(), "mask": self.mask, "h": self.state.h, "z": self.state.z,
            "q": self.q, "action": self._action,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.mask = state["mask"].clone()
        self.state = Latent(state["h"].clone(), state["z"].clone())
        self.q = None if state["q"] is None else state["q"].clone()
        self._action = state["action"].clone()


class Rssm:
    """The ensemble and the record it learns from."""

    name = "rssm"

    def __init__(self, config: RssmConfig, num_groups: int, seed: int = 0, update_budget: float = 0.0) -> None:
        """Bind sizes; no weight is drawn from the global random state.

        Args:
            config: Sizes and training.
            num_groups: G.
            seed: Of all randomness.
            update_budget: Share of the real steps' time that training may take, 0 for no bound.
        """
        self.config = config
        self.spec = BasisSpec(num_displacements=config.num_displacements, lag=True, optimizer=True)
        self.experience = Experience(num_groups, self.spec, config.replay_windows)
        shape = (num_groups, self.spec.num_columns)
        # seeds of members of different runs must not meet: 7919 is an arbitrary prime
        seeds = (seed * config.ensemble_size + i + 7919 for i in range(config.ensemble_size))
        self.members = [Member(config, self.experience, shape, s) for s in seeds]
        self.schedule = Pace(update_budget)
        self._answers: Answers | None = None  # of the last window

    @property
    def ready(self) -> bool:
        """After the first displacement: before it has learnt, it is the base."""
        window = self.experience.window
        return self.experience.frame is not None and window is not None and window.num_columns > 0

    @property
    def update_every(self) -> int:
        """Windows between two updates."""
        return self.schedule.update_every

    def pace(self, window_seconds: float) -> None:
        """Hear how long the real steps of the window about to be observed took."""
        self.schedule.on_window(window_seconds)

    def observe(self, window: Window) -> None:
        """Record the window, train every member if it is time, follow with their states, note what comes next."""
        e = self.experience
        e.observe(window)
        if e.num_targets >= 4 and self.schedule.due(e.count - 1):
            with self.schedule.measured():
                for member in self.members:
                    for _ in range(self.config.updates_per_window):
                        member.update()
        for member in self.members:
            member.follow((e.count - 1) % e.capacity)
        self._answers = None
        if self.ready:
            self._answers = self._rollouts()
            e.expect(self._answers.corrections.mean(dim=0), float(self._answers.changes[:, 0].mean()))

    def _rollouts(self) -> Answers:
        e = self.experience
        heads = Heads(*map(torch.cat, zip(*(m.imagine(self.config.num_samples) for m in self.members), strict=True)))
        return Answers(
            corrections=heads.corrections.double(),
            changes=e.change_base + heads.changes.double() * e.change_std,
            misses=e.miss_base * heads.misses.double().exp(),
            members=torch.arange(len(self.members)).repeat_interleave(self.config.num_samples),
            survival=float(heads.survival[:, 0].sigmoid().mean()) if e.num_targets >= 4 else 1.0,
        )

    def predict(self, horizon: int) -> PhasePrediction:
        """Coefficients for Y steps from the rollouts of every member."""
        assert self._answers is not None, "predict() before ready"
        return phase_prediction(self.experience, self._answers, horizon)

    def memory_bytes(self) -> int:
        """Weights and two moments of every member, the gradients of one, masks and the replay."""
        weights = sum(m.num_parameters() for m in self.members)
        masks = sum(m.mask.numel() for m in self.members)
        return 4 * (3 * weights + self.members[0].num_parameters()) + masks + self.experience.memory_bytes()

    def state_dict(self) -> StateDict:
        """Weights, optimizers, generators, masks, latent states, rollouts, the pace and the replay."""
        return {
            "experience": self.experience.state_dict(), "members": [m.state_dict() for m in self.members],
            "answers": None if self._answers is None else self._answers.state_dict(),
            "schedule": self.schedule.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.experience.load_state_dict(state["experience"])
        for member, own in zip(self.members, state["members"], strict=True):
            member.load_state_dict(own)
        self._answers = Answers.from_state(state["answers"])
        self.schedule.load_state_dict(state["schedule"])
