"""A predictor of your own: repeat the mean of the last two displacements, as often as it has paid.

Give it to the trainer directly, ``HybridTrainer(..., predictor=MeanOfTwo())``, or announce it from your
package and name it in the configuration (``predictor.type = "mean_of_two"``)::

    [project.entry-points."hybrid_predict_trainer.predictors"]
    mean_of_two = "your_package.predictors:build_mean_of_two"
"""

from __future__ import annotations

import torch

from hybrid_predict_trainer.config.settings import HybridTrainerConfig
from hybrid_predict_trainer.records import BasisSpec, PhasePrediction, State, Window


class MeanOfTwo:
    """Coefficients Y / 2N on the two newest displacements."""

    name = "mean_of_two"
    spec = BasisSpec(num_displacements=2)
    window: Window | None = None

    @property
    def ready(self) -> bool:
        """After two displacements."""
        return self.window is not None and self.window.num_columns == 2

    def observe(self, window: Window) -> None:
        """Remember the window."""
        self.window = window

    def predict(self, horizon: int) -> PhasePrediction:
        """The mean displacement per step, Y times; the loss along its slope."""
        assert self.window is not None
        share = horizon / (2 * self.window.num_steps)
        loss = self.window.loss + self.window.loss_slope * horizon
        coefficients = torch.full((self.window.products.num_groups, 2), share, dtype=torch.float64)
        return PhasePrediction(coefficients=coefficients, horizon=horizon, predicted_loss=loss)

    def memory_bytes(self) -> int:
        """Nothing to speak of."""
        return 0

    def state_dict(self) -> State:
        """Nothing: after a resume it waits for the next window."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Inverse of :meth:`state_dict`."""


def build_mean_of_two(config: HybridTrainerConfig, num_groups: int) -> MeanOfTwo:
    """What the entry point names."""
    return MeanOfTwo()


if __name__ == "__main__":
    from hybrid_predict_trainer import HybridTrainer

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    inputs = torch.rand(256, 8)
    batch = (inputs, inputs.sum(dim=1, keepdim=True).sin())

    def loss_fn(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Mean squared error."""
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])

    trainer = HybridTrainer(
        model,
        torch.optim.Adam(model.parameters(), lr=3e-3),
        HybridTrainerConfig(warmup_steps=20),
        loss_fn=loss_fn,
        predictor=MeanOfTwo(),
    )
    for _ in range(400):
        result = trainer.step(batch)
    print(f"loss {result.loss:.5f} after {trainer.statistics()}")
