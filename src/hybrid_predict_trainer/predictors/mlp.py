"""``mlp``: a small network on the encoded state, trained online from a replay of all windows.

[256, 128] GELU units with dropout, conditioned on the log of how many windows ahead is asked for;
three heads: a bounded correction to the coefficients of every group, the change of the log loss, and
how far the displacement is expected to miss that.  They start at zero: an untrained network is the
closed-form base of ``_learned``.  It trains at every k-th window (see ``pacing``), and its dropout
masks are drawn once per window: a prediction for any horizon is read off the same answers.

    u[j] = (base[j] + trust * 2 tanh(net(e, log j))) * planned drift

Letters: ``G`` groups, ``K`` columns, ``J`` windows ahead, ``F`` encoded features,
``B`` rows of a minibatch, ``M`` dropout samples.

Epistemic: spread between dropout masks; aleatoric: the miss it expects.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config.settings import MlpConfig
from ..records import BasisSpec, PhasePrediction, StateDict, Window
from ._answers import Answers, miss_loss, phase_prediction
from ._frame import MAX_AHEAD
from ._learned import NUM_ACTIONS, Experience, initialised
from .pacing import Pace

#: Largest correction of one coefficient, in lengths of the last displacement; arbitrary.
MAX_CORRECTION = 2.0


class Network(nn.Module):
    """Trunk and three heads."""

    def __init__(self, num_inputs: int, hidden: tuple[int, ...], shape: tuple[int, int]) -> None:
        """Args: num_inputs: encoding, action and log j.  hidden: widths.  shape: (G, K)."""
        super().__init__()
        sizes = (num_inputs, *hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.shape = shape
        self.coefficients = nn.Linear(hidden[-1], shape[0] * shape[1])
        self.change = nn.Linear(hidden[-1], 1)
        self.miss = nn.Linear(hidden[-1], shape[0])

    def forward(self, x: Tensor, dropout: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(B, inputs) -> correction (B, G, K), standardised change of the log loss (B,), log of the miss
        over the base's (B, G).

        Dropout is drawn from our own generator: ``nn.Dropout`` would draw from the user's.
        """
        for layer in self.layers:
            x = functional.gelu(layer(x))
            if dropout > 0:
                keep = torch.rand(x.shape, generator=generator) >= dropout
                x = x * keep / (1 - dropout)
        correction = MAX_CORRECTION * torch.tanh(self.coefficients(x)).view(-1, *self.shape)
        return correction, self.change(x)[:, 0], self.miss(x.detach())  # the miss must not shape what is said


class Mlp:
    """The network with its replay, optimizer and random generator."""

    name = "mlp"

    def __init__(self, config: MlpConfig, num_groups: int, seed: int = 0, update_budget: float = 0.0) -> None:
        """Bind sizes; no weight is drawn from the global random state.

        Args:
            config: Widths, dropout, training.
            num_groups: G.
            seed: Of all randomness.
            update_budget: Share of the real steps' time that training may take, 0 for no bound.
        """
        self.config = config
        self.spec = BasisSpec(num_displacements=config.num_displacements, lag=True, optimizer=True)
        self.experience = Experience(num_groups, self.spec, config.replay_windows)
        self._generator = torch.Generator().manual_seed(seed)
        num_inputs = self.experience.encoder.num_features + NUM_ACTIONS + 1
        with torch.device("meta"):  # no weight is drawn from the global generator
            self.network = Network(num_inputs, config.hidden, (num_groups, self.spec.num_columns))
        self.network.to_empty(device="cpu")
        initialised(self._generator, self.network)
        for head in (self.network.coefficients, self.network.change, self.network.miss):
            nn.init.zeros_(head.weight)  # untrained: the base
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.schedule = Pace(update_budget)
        self._answers: Answers | None = None  # of the last window

    @property
    def ready(self) -> bool:
        """After the first displacement: before it has learnt, it is ``hold``."""
        return self.experience.frame is not None and self.experience.window is not None and (
            self.experience.window.num_columns > 0
        )  # fmt: skip

    @property
    def update_every(self) -> int:
        """Windows between two updates."""
        return self.schedule.update_every

    def pace(self, window_seconds: float) -> None:
        """Hear how long the real steps of the window about to be observed took."""
        self.schedule.on_window(window_seconds)

    def observe(self, window: Window) -> None:
        """Add the window to the replay, train a few steps if it is time, note what is expected next."""
        e = self.experience
        e.observe(window)
        if e.num_targets >= 4 and self.schedule.due(e.count - 1):
            with self.schedule.measured():
                for _ in range(self.config.updates_per_window):
                    self._update()
        self._answers = None
        if self.ready:
            self._answers = self._ask()
            e.expect(self._answers.corrections.mean(dim=0), float(self._answers.changes[:, 0].mean()))

    # ---- training --------------------------------------------------------------------------------

    def _update(self) -> None:
        e, config = self.experience, self.config
        filled = min(e.count, e.capacity)
        known = (e.shares[:filled].sum(dim=2) > 0).nonzero()  # (pairs, 2) of row and j
        pick = known[torch.randint(len(known), (config.batch_size,), generator=self._generator)]
        rows, ahead = pick[:, 0], pick[:, 1]
        x = self._inputs(rows, ahead)
        correction, change, log_ratio = self.network(x, config.dropout, self._generator)
        target = e.residuals[rows, ahead]  # (B, G, K)
        weight = e.shares[rows, ahead][:, :, None] * e.known[ahead][:, None, :]
        error = functional.huber_loss(correction, target, reduction="none")
        missed = (target - correction.detach()).square()
        miss = miss_loss(log_ratio, missed, e.beyond[rows, ahead], weight, e.miss_base.float()[ahead])
        loss = ((weight * error).sum() + 0.1 * miss) / len(pick)
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
    def _ask(self) -> Answers:
        """M draws of the dropout mask for the last window, each for J windows ahead."""
        e, M, J = self.experience, self.config.num_samples, MAX_AHEAD
        row = torch.full((M * J,), (e.count - 1) % e.capacity)
        ahead = torch.arange(J).repeat(M)
        correction, change, log_ratio = self.network(self._inputs(row, ahead), self.config.dropout, self._generator)
        return Answers(
            corrections=correction.view(M, J, *self.network.shape).double() * e.known[None, :, None, :],
            changes=e.change_base + change.view(M, J).double() * e.change_std,
            misses=e.miss_base * log_ratio.view(M, J, -1).double().exp(),
            members=torch.arange(M),
        )

    def predict(self, horizon: int) -> PhasePrediction:
        """Coefficients for Y steps."""
        assert self._answers is not None, "predict() before ready"
        return phase_prediction(self.experience, self._answers, horizon)

    # ---- cost and state ----------------------------------------------------------------------------

    def memory_bytes(self) -> int:
        """Weights, their gradients, two moments each, and the replay."""
        own = sum(p.numel() * p.element_size() for p in self.network.parameters())
        return 4 * own + self.experience.memory_bytes()

    def state_dict(self) -> StateDict:
        """Everything learnt, the optimizer's moments, the generator, the last answers and the pace."""
        return {
            "network": dict(self.network.state_dict()), "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(), "experience": self.experience.state_dict(),
            "answers": None if self._answers is None else self._answers.state_dict(),
            "schedule": self.schedule.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Inverse of :meth:`state_dict`."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])
        self.experience.load_state_dict(state["experience"])
        self._answers = Answers.from_state(state["answers"])
        self.schedule.load_state_dict(state["schedule"])
