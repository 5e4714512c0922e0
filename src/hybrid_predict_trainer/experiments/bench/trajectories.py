"""Optimizer trajectories with a known answer, turned into the windows a run would produce.

The problems are linear-quadratic, so the expected continuation of a trajectory is known exactly from
its state: that is the analytic optimum every predictor is measured against.

Letters: ``P`` weights, ``T`` steps, ``N`` steps of a window, ``W`` windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...config.settings import EncoderConfig
from ...observe.basis import Basis
from ...observe.history import History, Reading
from ...observe.loss_features import loss_features
from ...observe.window_encoder import observer_for
from ...records import BasisSpec, Window
from ...weights.parameters import predicted_parameters

Schedule = Callable[[int], float]  # step -> learning rate


@dataclass(frozen=True, slots=True)
class Case:
    """A quadratic loss 0.5 sum_i h_i w_i^2 + floor under SGD, and how it is disturbed."""

    name: str
    curvatures: tuple[float, ...]  # repeated over the weights of a group
    learning_rate: float
    momentum: float = 0.0
    noise: float = 0.0  # standard deviation of the gradient per weight
    floor: float = 0.0  # of the loss
    switch_every: int = 0  # windows between two learning rates, 0: constant
    switch_factor: float = 0.25
    num_weights: int = 256

    @property
    def noise_free(self) -> bool:
        """Whether the trajectory is deterministic."""
        return self.noise == 0

    def schedule(self, num_steps: int) -> Schedule:
        """Learning rate at every step."""

        def rate(step: int) -> float:
            low = self.switch_every and (step // (num_steps * self.switch_every)) % 2 == 1
            return self.learning_rate * (self.switch_factor if low else 1.0)

        return rate


def _spread(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(math.exp(v) for v in torch.linspace(math.log(low), math.log(high), count).tolist())


#: The table of cases.  The slowest modes shrink by some exp(-3) over a bench run, so nothing converges
#: away; the two time scales are weakly damped oscillations with periods of some 6 and 40 windows, on
#: which ``hold`` is soon wrong.
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("quadratic", _spread(0.02, 1.0, 12), learning_rate=0.05),
        Case("momentum", _spread(0.02, 1.0, 12), learning_rate=0.005, momentum=0.9),
        Case("two_scales", (0.011, 0.00025), learning_rate=1.0, momentum=0.997),
        Case("noisy", _spread(0.02, 1.0, 12), learning_rate=0.005, momentum=0.9, noise=1.0, floor=20.0),
        Case("switching", _spread(0.02, 1.0, 12), learning_rate=0.05, switch_every=4),
    )
}


class Weights(nn.Module):
    """Two matrices whose names make two parameter groups."""

    def __init__(self, start: Tensor) -> None:
        """Args: start: (P,) float64, split in halves."""
        super().__init__()
        half = len(start) // 2
        self.fc1 = nn.Parameter(start[:half].clone().reshape(2, -1))
        self.fc2 = nn.Parameter(start[half:].clone().reshape(2, -1))


@dataclass(frozen=True, slots=True)
class Trajectory:
    """All steps of one run, and what it would do next without noise."""

    num_steps: int  # N
    thetas: Tensor  # (T + 1, P)
    grads: Tensor  # (T, P)
    losses: tuple[float, ...]
    rates: tuple[float, ...]  # learning rate of every step, N more than T
    expected: Tensor  # (W, J, P) expected displacement of the window mean 1 ... J windows ahead

    @property
    def means(self) -> Tensor:
        """(W, P) window means x."""
        W = len(self.grads) // self.num_steps
        return self.thetas[: W * self.num_steps].reshape(W, self.num_steps, -1).mean(dim=1)

    @property
    def window_losses(self) -> Tensor:
        """(W,) mean loss of every window."""
        return torch.tensor(self.losses, dtype=torch.float64).reshape(-1, self.num_steps).mean(dim=1)


def generate(case: Case, seed: int, *, num_windows: int, num_steps: int = 10, ahead: int = 4) -> Trajectory:
    """Train with ``torch.optim.SGD`` from a seeded start; the global random state is not touched."""
    generator = torch.Generator().manual_seed(seed)
    P, T = case.num_weights, num_windows * num_steps
    h = torch.tensor(case.curvatures, dtype=torch.float64)[torch.arange(P) % len(case.curvatures)]
    theta = nn.Parameter(torch.randn(P, generator=generator, dtype=torch.float64))
    rate = case.schedule(num_steps)
    optimizer = torch.optim.SGD([theta], lr=case.learning_rate, momentum=case.momentum)
    thetas, grads, losses, expected = [theta.detach().clone()], [], [], []
    for step in range(T):
        optimizer.param_groups[0]["lr"] = rate(step)
        noise = case.noise * torch.randn(P, generator=generator, dtype=torch.float64)
        theta.grad = h * theta.detach() + noise
        losses.append(float(0.5 * (h * theta.detach().square()).sum() + theta.detach() @ noise) + case.floor)
        grads.append(theta.grad.clone())
        optimizer.step()
        thetas.append(theta.detach().clone())
        if (step + 1) % num_steps == 0:
            buffer = optimizer.state[theta].get("momentum_buffer")
            velocity = torch.zeros(P, dtype=torch.float64) if buffer is None else buffer
            mean = torch.stack(thetas[-num_steps - 1 : -1]).mean(dim=0)
            future = _continue(h, theta.detach(), velocity, case.momentum, rate, step + 1, num_steps, ahead)
            expected.append(future - mean)
    rates = tuple(rate(step) for step in range(T + num_steps))
    return Trajectory(num_steps, torch.stack(thetas), torch.stack(grads), tuple(losses), rates, torch.stack(expected))


def _continue(
    h: Tensor, theta: Tensor, velocity: Tensor, momentum: float, rate: Schedule, step: int, num_steps: int, ahead: int
) -> Tensor:
    """(J, P) noise-free window means from a state: the expectation, as the system is linear."""
    means = []
    for j in range(ahead):
        total = torch.zeros_like(theta)
        for i in range(num_steps):
            total += theta
            velocity = momentum * velocity + h * theta
            theta = theta - rate(step + j * num_steps + i) * velocity
        means.append(total / num_steps)
    return torch.stack(means)


def observe(
    trajectory: Trajectory, spec: BasisSpec, *, predictor: object = None, encoder: EncoderConfig | None = None
) -> Iterator[tuple[Window, Basis]]:
    """Feed the recorded steps to a real basis, as a run does; yields every window as it closes.

    Args:
        trajectory: All steps.
        spec: Columns to keep.
        predictor: Gets encoded windows if it wants them.
        encoder: Settings of the encoding, defaults if None.
    """
    model = Weights(trajectory.thetas[0])
    parameters, groups = predicted_parameters(model, torch.optim.SGD(model.parameters(), lr=1.0))
    basis, history, N = Basis(parameters, groups, spec), History(), trajectory.num_steps
    observer = observer_for(encoder or EncoderConfig(), predictor, model, parameters, groups, spec)
    norms = torch.linalg.vector_norm(trajectory.grads, dim=1)
    for index in range(len(trajectory.grads) // N):
        for step in range(index * N, (index + 1) * N):
            _place(parameters, trajectory.thetas[step], trajectory.grads[step])
            basis.accumulate()
            basis.before_step(last=step == (index + 1) * N - 1)
            history.push(Reading(step, trajectory.losses[step], float(norms[step])), warming_up=False)
        last = (index + 1) * N
        _place(parameters, trajectory.thetas[last], None)
        hindsight = basis.close_window()
        window = Window(
            index=index,
            num_steps=N,
            num_columns=basis.num_columns,
            step=last,
            loss=history.close_window(last, N),
            loss_slope=history.loss_slope(),
            gradient_norm=float(norms[last - N : last].mean()),
            learning_rate=trajectory.rates[last - 1],
            lr_integral=sum(trajectory.rates[last - N : last]),
            lr_ahead=sum(trajectory.rates[last : last + N]),
            jumped=False,
            features=loss_features(history.losses, last),
            products=basis.products(),
            hindsight=hindsight,
            group_sizes=groups.sizes,
        )
        yield observer.complete(window, basis), basis


def _place(parameters: Sequence[Tensor], theta: Tensor, grad: Tensor | None) -> None:
    start = 0
    for p in parameters:
        p.data.copy_(theta[start : start + p.numel()].reshape(p.shape))
        p.grad = None if grad is None else grad[start : start + p.numel()].reshape(p.shape)
        start += p.numel()


def flat(deltas: Sequence[Tensor]) -> Tensor:
    """(P,) one vector from one tensor per parameter; the problems here are small."""
    return torch.cat([d.detach().reshape(-1).double() for d in deltas])
