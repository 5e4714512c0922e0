"""What accelerate and Fabric share: the loop is the user's, and backward and clipping go through one object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from ..cycle.engine import Engine
from ..records import Phase
from .replaced import Replaced


def schedule_of_loop(scheduler: Any, total_steps: int | None) -> Literal["owned", "external", "shared"]:
    """Who moves a schedule that the loop steps.

    Args:
        scheduler: None: there is none.
        total_steps: That the run has; where that is not known the loop makes all of its steps, and a schedule that
            also took what proposals cost would be at its end before the loop is.
    """
    if scheduler is None:
        return "owned"
    return "external" if total_steps is None else "shared"


class Stations:
    """The engine's stations around the functions that a loop calls."""

    def __init__(self, engine: Engine, *, complete: Callable[[], bool], unscale: Callable[[], object]) -> None:
        """Nothing is replaced yet.

        Args:
            engine: That rides along.
            complete: Whether the micro-batch under way is the last of its step.
            unscale: Divides gradients by a scaler's scale, once per step.
        """
        self.engine, self.replaced = engine, Replaced()
        self._complete, self._unscale = complete, unscale
        engine.on_detach(self.replaced.restore)

    def backward(self, owner: Any, *, times: float = 1.0) -> None:
        """Losses are handed over where ``owner.backward(loss)`` is called.

        Args:
            owner: Of the method.
            times: What a loss is multiplied by, where the loop has divided it by the number of micro-batches.
        """

        def around(backward: Any, loss: Any, *args: Any, **kwargs: Any) -> Any:
            self.engine.note(loss.detach() * times)
            self.engine.before_backward()
            return backward(loss, *args, **kwargs)

        self.replaced.wrap(owner, "backward", around)

    def clip(self, owner: Any, name: str, *, of: Any = None) -> None:
        """Gradients are looked at before ``owner.name`` clips them.

        Args:
            owner: Of the method.
            name: Of the method.
            of: An optimizer whose weights are the engine's, where the method takes ``parameters`` first: where it is
                called with others it is another engine's turn.  None: whatever is clipped is the engine's.
        """

        def around(clip: Any, *args: Any, **kwargs: Any) -> Any:
            ours = True
            if of is not None:
                given, rest = (args[0], args[1:]) if args else (kwargs.pop("parameters"), ())
                weights = given if isinstance(given, Tensor) else list(given)  # one may be gone through once only
                args, ours = (weights, *rest), _share(of, weights)
            if ours and self._complete() and self.engine.in_step:
                self._unscale()
                self.engine.after_backward()
            return clip(*args, **kwargs)

        self.replaced.wrap(owner, name, around)


def _share(optimizer: Any, weights: Tensor | list[Tensor]) -> bool:
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return any(id(p) in own for p in ([weights] if isinstance(weights, Tensor) else weights))


def figures(engine: Engine) -> dict[str, float]:
    """What a line of a framework's log says of the run, numbers only: trackers drop everything else."""
    run = engine.run
    meter = run.meter
    steps = {f"hpt/{phase.value}_steps": float(meter.steps_by_phase[phase]) for phase in Phase}
    return {
        **steps, "hpt/position": float(run.position), "hpt/jumps_accepted": float(meter.num_jumps_accepted),
        "hpt/jumps_proposed": float(meter.num_jumps_proposed), "hpt/confidence": float(run.proposer.confidence),
        "hpt/multiplier": float(run.optimizer_step.scale.learned),
    }  # fmt: skip
