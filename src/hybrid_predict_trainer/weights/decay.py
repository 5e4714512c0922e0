"""Weight decay that an optimizer adds to the gradient, as a part of what it minimizes.

SGD, Adam and most optimizers of torch add ``decay * w`` to the gradient of the loss (L2 regularization, as Loshchilov &
Hutter, arXiv 1711.05101, set it apart from decoupled decay).  They come to rest where the gradient of

    loss + 1/2 sum_i decay_i |w_i|^2

is zero.  Where losses are exact a jump goes a long way, and one that is judged by the loss alone goes where the decay
would never have let the weights go: on a graph network of 100 labelled nodes it ended at five times the validation loss
(LOG.md).  Decoupled decay (AdamW) is no gradient of anything: where it comes to rest hangs on the sizes of gradients,
and with exact losses it bounds the weights by 1 / decay only.  It is left to the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .real_views import owner
from .shards import itself, total_over

#: Optimizers whose groups do not say what kind their decay is, by the names of their classes.
COUPLED = ("SGD", "Adam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam")


def coupled_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """Weight decay that a group's optimizer adds to the gradient, per unit of weight; 0: none, or of another kind.

    A group of torch's Adam and its kin, or of pytorch_optimizer's, says which kind it is; of the others the name does.
    What nobody knows is taken for decoupled.

    Args:
        optimizer: Whose group it is.
        group: Of parameters.
    """
    decay = group.get("weight_decay", 0.0)
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not decay > 0 or group.get("maximize"):
        return 0.0
    decoupled = group.get("decoupled_weight_decay", group.get("weight_decouple"))
    if decoupled is None:
        decoupled = type(optimizer).__name__ not in COUPLED
    return 0.0 if decoupled else float(decay)


def has_coupled_decay(optimizer: Optimizer) -> bool:
    """Whether an optimizer adds weight decay of some group to the gradient."""
    return any(coupled_decay(optimizer, group) for group in optimizer.param_groups)


class CoupledDecay:
    """What the decay of the groups adds to the loss now: a user may change it, or a load replace the groups."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Bind.

        Args:
            optimizer: Its groups are looked at whenever something is asked.
            parameters: That are trained, as the run sees them.
        """
        self._optimizer, self._parameters = optimizer, list(parameters)
        held = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._group_of = [held.get(id(owner(p))) for p in parameters]
        self._total = total_over(parameters)

    @property
    def present(self) -> bool:
        """Whether some group has such a decay."""
        return has_coupled_decay(self._optimizer)

    def factors(self) -> list[float]:
        """The decay of every parameter, per unit of weight."""
        of_group = [coupled_decay(self._optimizer, group) for group in self._optimizer.param_groups]
        # a group that was taken away has left its parameters without a step
        return [0.0 if g is None or g >= len(of_group) else of_group[g] for g in self._group_of]

    def value(self) -> Tensor:
        """1/2 sum_i decay_i |w_i|^2 at the present weights, shape (), in float64; with a graph in grad mode."""
        pairs = [(p, decay) for p, decay in zip(self._parameters, self.factors(), strict=True) if decay]
        parts = [0.5 * decay * p.double().square().sum() for p, decay in pairs]
        device = self._parameters[0].device
        if not parts:
            return torch.zeros((), dtype=torch.float64, device=device)
        own = torch.stack([part.to(device) for part in parts]).sum()
        return own if self._total is itself else self._total(own.detach())
