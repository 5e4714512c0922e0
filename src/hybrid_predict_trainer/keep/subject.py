"""What is trained, and how: bound once, changed by nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed.collective import ALONE, Collective
from ..distributed.processes import NOT_SHARED, Shared, reshard
from ..weights.decay import has_coupled_decay
from ..weights.parameters import Groups, predicted_parameters
from ..weights.real_views import ParameterView, all_differentiable

LossFn = Callable[[nn.Module, Any], Tensor]
#: (model, batch) -> residuals, shape (R,) or (R, C), whose mean square is the loss.
ResidualFn = Callable[[nn.Module, Any], Tensor]
#: (model, batch) -> outputs, shape (N,) or (N, C), and the loss as a convex function of them.
OutputFn = Callable[[nn.Module, Any], tuple[Tensor, Callable[[Tensor], Tensor]]]
#: (model, batch) -> scores, shape (N,), one for each sample of the batch; higher is better.
JudgeFn = Callable[[nn.Module, Any], Tensor]


class NegatedScore:
    """A judge's scores as a loss: minus their mean, so that lower is better."""

    def __init__(self, judge_fn: JudgeFn) -> None:
        """Bind."""
        self.judge_fn = judge_fn

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Minus the mean score of a batch, shape ().

        Raises:
            TypeError: there is not one number for each sample.
        """
        scores = self.judge_fn(model, batch)
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        if not isinstance(scores, Tensor) or scores.dim() != 1 or scores.numel() == 0:
            raise TypeError(f"judge_fn must return a score for each sample, a tensor of shape (N,), not {shape}")
        return -(scores if scores.is_floating_point() else scores.float()).mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Model, optimizer and loss of one run.

    Attributes:
        model: Any module.
        optimizer: Steps without a closure.
        loss_fn: (model, batch) -> loss, shape ().
        grad_scaler: For float16, or None.
        parameters: Those that are predicted, in the optimizer's order.
        groups: The same by role.
        on_cpu: Losses can be read at once, without a wait for a device.
        residual_fn: (model, batch) -> residuals, or None.
        output_fn: (model, batch) -> outputs and the loss as a function of them, or None.
        judge_fn: (model, batch) -> score of each sample, higher is better, that judges jumps; None: the loss does.
        ranks: What this process agrees with others on.
        wrapped: The model in what shares its gradients between processes, for real steps; None: it is in nothing.
        gathering: Modules that gather sharded weights for a forward, and may keep them.
    """

    model: nn.Module
    optimizer: Optimizer
    loss_fn: LossFn
    grad_scaler: Any
    parameters: list[Tensor]
    groups: Groups
    on_cpu: bool
    residual_fn: ResidualFn | None = None
    output_fn: OutputFn | None = None
    judge_fn: JudgeFn | None = None
    ranks: Collective = ALONE
    wrapped: nn.Module | None = None
    gathering: Sequence[Any] = ()

    @property
    def can_solve(self) -> bool:
        """Whether closed form can be had: residuals and real weights, and not a batch of its own on every rank.

        Nor with weight decay that is added to the gradient: residuals know nothing of it.
        """
        has = self.residual_fn is not None or self.output_fn is not None
        alone = self.ranks.alone and not has_coupled_decay(self.optimizer)
        return has and alone and all_differentiable(self.parameters)

    @classmethod
    def of(
        cls, model: nn.Module, optimizer: Optimizer, loss_fn: LossFn, grad_scaler: Any, roles: dict[str, str] | None,
        *, residual_fn: ResidualFn | None = None, output_fn: OutputFn | None = None, shared: Shared = NOT_SHARED,
    ) -> Subject:  # fmt: skip
        """Look at model and optimizer.

        Args:
            model: Any module.
            optimizer: Of that model.
            loss_fn: (model, batch) -> loss.
            grad_scaler: Or None.
            roles: Overrides of parameter roles, qualified name -> role.
            residual_fn: Or None.
            output_fn: Or None.
            shared: Between which processes, and in what.

        Raises:
            ConfigError: nothing can be trained.
        """
        reshard(shared.gathering)  # or names would be those of the gathered weights
        parameters, groups = predicted_parameters(model, optimizer, roles, shared.ranks.total)
        on_cpu = all(p.device.type == "cpu" for p in parameters)
        return cls(
            model=model, optimizer=optimizer, loss_fn=loss_fn, grad_scaler=grad_scaler, parameters=parameters,
            groups=groups, on_cpu=on_cpu, residual_fn=residual_fn, output_fn=output_fn, ranks=shared.ranks,
            wrapped=shared.wrapped, gathering=shared.gathering,
        )  # fmt: skip

    @property
    def stepped(self) -> nn.Module:
        """What a real step's loss is computed with."""
        return self.model if self.wrapped is None else self.wrapped

    @property
    def views(self) -> Sequence[ParameterView]:
        """Those of the parameters that are views: of complex weights, of sharded ones."""
        return [p for p in self.parameters if isinstance(p, ParameterView)]

    def reshard(self) -> None:
        """Let go of weights that were gathered for a forward: what is written to shards would not be seen."""
        reshard(self.gathering)
