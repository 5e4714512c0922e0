"""The user's model, optimizer and loss: copied for every pilot, and never touched themselves."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ...keep.rng import RandomStates
from ...records import ConfigError

LossFn = Callable[[nn.Module, Any], Tensor]
#: Share of a run -> factor on the learning rate.
Schedule = Callable[[float], float]
#: Batches kept apart to measure a loss on.
NUM_HELD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is to be trained.

    Attributes:
        model, optimizer, loss_fn: as a plain loop has them.
        loader: batches, to be gone through again and again; or seed -> iterator of batches without end.
        schedule: by share of a run.
        grad_clip: largest gradient norm; 0: no clipping.
        val_fn: model -> validation loss; None: the training loss of batches kept apart.
        num_batches: of one pass over the data, where the loader does not say it itself.
    """

    model: nn.Module
    optimizer: Optimizer
    loss_fn: LossFn
    loader: Iterable[Any] | Callable[[int], Iterator[Any]]
    schedule: Schedule
    grad_clip: float = 0.0
    val_fn: Callable[[nn.Module], float] | None = None
    num_batches: int | None = None

    def copy(self) -> tuple[nn.Module, Optimizer, LossFn]:
        """Model, optimizer and loss that share nothing with the user's.

        Raises:
            ConfigError: one of them cannot be copied.
        """
        memo: dict[int, Any] = {}
        try:
            model = copy.deepcopy(self.model, memo)
            optimizer = copy.deepcopy(self.optimizer, memo)
            for name, value in vars(self.optimizer).items():  # what pickling leaves out
                if name not in vars(optimizer) and name != "step":
                    setattr(optimizer, name, copy.deepcopy(value, memo))
            loss_fn = copy.deepcopy(self.loss_fn, memo) if isinstance(self.loss_fn, nn.Module) else self.loss_fn
        except Exception as error:
            raise ConfigError(
                f"model, optimizer or loss cannot be copied, and a probe trains copies only: {error}"
            ) from error
        own = {id(p) for p in model.parameters()}
        if not all(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ConfigError("the optimizer holds parameters that are not the model's: give it model.parameters()")
        return model, optimizer, loss_fn

    def scheduler(self, optimizer: Optimizer, steps: int) -> LambdaLR:
        """The schedule over a run of so many steps, from the rates that the optimizer was made with."""
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        return LambdaLR(optimizer, lambda step: self.schedule(min(step, steps) / steps))

    def batches(self, seed: int) -> Iterator[Any]:
        """Batches without end, in an order that belongs to the seed.

        Raises:
            ConfigError: there is none, or the loader can be gone through once only.
        """
        if not isinstance(self.loader, Iterable):
            taken = 0
            for batch in _called(self.loader, seed):
                taken += 1
                yield batch
            raise ConfigError(f"loader({seed}) ended after {taken} batches: it must give batches without end")
        if isinstance(self.loader, Iterator):
            raise ConfigError(
                "the loader can be gone through once only; give a list, a data loader, or seed -> iterator"
            )
        torch.manual_seed(seed)
        for epoch in itertools.count():
            sampler: Any = getattr(self.loader, "sampler", None)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(1_000_003 * seed + epoch)
            any_ = False
            for batch in self.loader:
                any_ = True
                yield batch
            if not any_:
                raise ConfigError("the loader has no batches")

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches of one pass; None where the loader does not say."""
        if self.num_batches is not None:
            return self.num_batches
        try:
            return len(self.loader) or None  # type: ignore[arg-type]
        except TypeError:
            return None


def _called(loader: Any, seed: int) -> Iterable[Any]:
    """What a function gives for a seed.

    Raises:
        ConfigError: it is no function of a seed, or gives nothing that can be gone through.
    """
    wanted = "the loader must be a list, a data loader, or a function seed -> iterator"
    if not callable(loader):
        raise ConfigError(f"{wanted}, not {type(loader).__name__}")
    try:
        inspect.signature(loader).bind(seed)
    except TypeError:
        raise ConfigError(f"{wanted}: this one cannot be called with a seed alone") from None
    except ValueError:  # written in C: it says nothing of what it takes
        pass
    found = loader(seed)
    if not isinstance(found, Iterable):
        raise ConfigError(f"{wanted}: loader({seed}) is {type(found).__name__}")
    return found


def checked_loss(model: nn.Module, loss_fn: LossFn, batch: Any, own: nn.Module) -> None:
    """Refuse what no pilot could train: before any time is spent, and in terms of what the caller handed in.

    Args:
        model: A copy.
        loss_fn: Of the copy.
        batch: Of the data.
        own: The user's model, which no pilot may reach.

    Raises:
        ConfigError: nothing trains, the loss is no finite scalar with a gradient, or it is one of the user's model
            instead of the model that it is given.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("the model has no weights that train: all have requires_grad=False, or there are none")
    loss = loss_fn(model, batch)
    if not isinstance(loss, Tensor):
        raise ConfigError(f"loss_fn(model, batch) must return the loss as a tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise ConfigError(f"loss_fn(model, batch) must return one number, not a tensor of shape {tuple(loss.shape)}")
    if not math.isfinite(float(loss.detach())):
        raise ConfigError(
            f"the loss of the model as it is is {float(loss.detach()):g}: there is nothing to train from; "
            "look at the first batch and at the weights"
        )
    if not loss.requires_grad:
        raise ConfigError("the loss has no gradient: compute it without torch.no_grad(), detach() or item()")
    if _reaches(loss, own):
        raise ConfigError(
            "loss_fn computes the loss with the model that was handed to the probe, which trains copies only: "
            "use the model that loss_fn(model, batch) is given"
        )
    if all(p.grad is None for p in model.parameters()):
        raise ConfigError("the loss does not depend on the weights of the model that loss_fn(model, batch) is given")
    model.zero_grad()


def _reaches(loss: Tensor, own: nn.Module) -> bool:
    """Whether gradients of a loss come to the user's weights; theirs are put back as they were."""
    before = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in own.parameters()]
    loss.backward()  # torch.autograd.grad cannot go through every kind of checkpointing
    reached = False
    for p, grad, kept in before:
        if grad is None or kept is None:
            reached |= p.grad is not None
        elif p.grad is not grad or not torch.equal(grad, kept):
            reached = True
            grad.copy_(kept)
        p.grad = grad
    return reached


@contextmanager
def untouched(subject: Subject) -> Iterator[None]:
    """Global random states and those of a data loader's generators are afterwards as they were before."""
    states = RandomStates()
    loader: Any = subject.loader
    owners = [
        loader,
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    ]
    generators = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
    kept = {key: g.get_state() for key, g in generators.items()}
    epochs = {id(o): (o, o.epoch) for o in owners if hasattr(o, "set_epoch") and hasattr(o, "epoch")}
    try:
        yield
    finally:
        for key, g in generators.items():
            g.set_state(kept[key])
        for owner, epoch in epochs.values():
            owner.set_epoch(epoch)
        states.put_back()


def mean_loss(subject: Subject, model: nn.Module, loss_fn: LossFn, held: list[Any]) -> float:
    """Validation loss of a pilot's model: the user's, or the mean over batches kept apart."""
    training = model.training
    model.eval()
    try:
        if subject.val_fn is not None:
            return float(subject.val_fn(model))
        return sum(_loss(loss_fn, model, batch) for batch in held) / len(held)
    finally:
        model.train(training)


def _loss(loss_fn: LossFn, model: nn.Module, batch: Any) -> float:
    try:
        with torch.no_grad():
            return float(loss_fn(model, batch))
    except RuntimeError:  # a loss that differentiates
        return float(loss_fn(model, batch).detach())
