"""``mlp``: a small network on the encoded state, trained online from a replay of all windows.

[256, 128] GELU units with dropout, conditioned on the log of how many windows ahead is asked for;
two heads: a bounded correction to the coefficients of every group, and the change of the log loss.
The heads start at zero: an untrained network is the closed-form base of ``_learned``.

    u[j] = (base[j] + trust * 2 tanh(net(e, log j))) * planned drift

Letters: ``G`` groups, ``K`` columns, ``J`` windows ahead, ``F`` encoded features,
``B`` rows of a minibatch, ``M`` dropout samples.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import MlpConfig
from ..records import BasisSpec, PhasePrediction, State, Window
from ._frame import MAX_AHEAD
from ._learned import NUM_ACTIONS, Answers, Experience, initialised, phase_prediction

#: Largest correction of one coefficient, in lengths of the last displacement; arbitrary.
MAX_CORRECTION = 2.0


class Network(nn.Module):
    """Trunk and two heads."""

    def __init__(self, num_inputs: int, hidden: tuple[int, ...], num_coefficients: int) -> None:
        """Args: num_inputs: encoding, action and log j.  hidden: widths.  num_coefficients: G * K."""
        super().__init__()
        sizes = (num_inputs, *hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.coefficients = nn.Linear(hidden[-1], num_coefficients)
        self.change = nn.Linear(hidden[-1], 1)

    def forward(self, x: Tensor, dropout: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(B, inputs) -> correction (B, G * K), standardised change of the log loss (B,).

        Dropout is drawn from our own generator: ``nn.Dropout`` would draw from the user's.
        """
        for layer in self.layers:
            x = functional.gelu(layer(x))
            if dropout > 0:
                keep = torch.rand(x.shape, generator=generator) >= dropout
                x = x * keep / (1 - dropout)
        return MAX_CORRECTION * torch.tanh(self.coefficients(x)), self.change(x)[:, 0]


class Mlp:
    """The network with its replay, optimizer and random generator."""

    name = "mlp"

    def __init__(self, config: MlpConfig, num_groups: int, seed: int = 0) -> None:
        """Args: config: widths, dropout, training.  num_groups: G.  seed: of all randomness."""
        self.config = config
        self.spec = BasisSpec(num_displacements=config.num_displacements, lag=True, optimizer=True)
        self.experience = Experience(num_groups, self.spec, config.replay_windows)
        self._shape = (num_groups, self.spec.num_columns)
        self._generator = torch.Generator().manual_seed(seed)
        num_inputs = self.experience.encoder.num_features + NUM_ACTIONS + 1
        with torch.device("meta"):  # no weight is drawn from the global generator
            self.network = Network(num_inputs, config.hidden, num_groups * self.spec.num_columns)
        self.network.to_empty(device="cpu")
        initialised(self._generator, self.network)
        for head in (self.network.coefficients, self.network.change):
            nn.init.zeros_(head.weight)  # untrained: the base
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    @property
    def ready(self) -> bool:
        """After the first displacement: before it has learnt, it is ``hold``."""
        return self.experience.frame is not None and self.experience.window is not None and (
            self.experience.window.num_columns > 0
        )  # fmt: skip

    def observe(self, window: Window) -> None:
        """Add the window to the replay, train a few steps, note what is expected next."""
        self.experience.observe(window)
        if self.experience.num_targets >= 4:
            for _ in range(self.config.updates_per_window):
                self._update()
        if self.ready:
            answers = self._answers(num_samples=0)
            self.experience.expect(answers.corrections[0], float(answers.changes[0, 0]))

    # ---- training --------------------------------------------------------------------------------

    def _update(self) -> None:
        e, config = self.experience, self.config
        filled = min(e.count, e.capacity)
        known = (e.shares[:filled].sum(dim=2) > 0).nonzero()  # (pairs, 2) of row and j
        pick = known[torch.randint(len(known), (config.batch_size,), generator=self._generator)]
        rows, ahead = pick[:, 0], pick[:, 1]
        x = self._inputs(rows, ahead)
        correction, change = self.network(x, config.dropout, self._generator)
        target = e.residuals[rows, ahead]  # (B, G, K)
        weight = e.shares[rows, ahead][:, :, None] * e.known[ahead][:, None, :]
        error = functional.huber_loss(correction.view(-1, *self._shape), target, reduction="none")
        loss = (weight * error).sum() / len(pick)
        wanted = (e.changes[rows, ahead] - e.change_base.float()[ahead]) / e.change_std.float()[ahead]
        seen = torch.isfinite(wanted)
        if bool(seen.any()):
            loss = loss + 0.1 * functional.huber_loss(change[seen], wanted[seen].clamp(-5.0, 5.0))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self._optimizer.step()

    def _inputs(self, rows: Tensor, ahead: Tensor) -> Tensor:
        e = self.experience
        state = e.encoder.standardise(e.encodings[rows])
        return torch.cat([state, e.actions[rows], (ahead + 1.0).log()[:, None]], dim=1)

    # ---- prediction --------------------------------------------------------------------------------

    @torch.no_grad()
    def _answers(self, num_samples: int) -> Answers:
        """Without dropout for 0 samples, else M = num_samples draws of the dropout mask."""
        e, M, J = self.experience, max(num_samples, 1), MAX_AHEAD
        row = torch.full((M * J,), (e.count - 1) % e.capacity)
        ahead = torch.arange(J).repeat(M)
        dropout = self.config.dropout if num_samples else 0.0
        correction, change = self.network(self._inputs(row, ahead), dropout, self._generator)
        corrections = correction.view(M, J, *self._shape).double() * e.known[None, :, None, :]
        changes = e.change_base + change.view(M, J).double() * e.change_std
        return Answers(corrections=corrections, changes=changes, members=torch.arange(M))

    def predict(self, horizon: int) -> PhasePrediction:
        """Coefficients for Y steps; the spread over dropout masks is the epistemic part."""
        return phase_prediction(self.experience, self._answers(self.config.num_samples), horizon)

    # ---- cost and state ----------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        """Weights, their gradients, two moments each, and the replay."""
        own = sum(p.numel() * p.element_size() for p in self.network.parameters())
        return 4 * own + self.experience.memory_bytes()

    def state_dict(self) -> State:
        """Everything learnt, the optimizer's moments and the generator."""
        return {
            "network": dict(self.network.state_dict()), "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(), "experience": self.experience.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        self.experience.load_state_dict(state["experience"])
