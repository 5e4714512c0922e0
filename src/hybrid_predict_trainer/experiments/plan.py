"""What a training run holds in memory at its peak, found without the memory: ``hpt plan``.

One step is taken with tensors that have a shape and no contents (``FakeTensorMode``), while torch's ``MemTracker``
counts what would be allocated: weights, gradients, optimizer state, activations, temporaries.  Nothing of the size of
the model is ever allocated, and no formula for activations can go out of date.  What this library holds besides is
added from its own rules: lookahead, copies to come back to, basis.  ``hpt plan --check`` holds the sum against the peak
of real runs (:mod:`.plan_check`).

Shape letters: ``P`` trained weights, ``B`` sequences, ``T`` tokens of each, ``K`` columns of the basis.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..config.settings import HybridTrainerConfig
from ..observe.basis import FLOAT64_BELOW
from ..predictors import build
from ..tasks import TaskSettings, make_task
from ..tasks.language.batches import token_loss
from ..tasks.language.gpt import Gpt, GptConfig
from ..tasks.low_bit import ternary
from ..weights.algebra import LARGE
from ..weights.offload import activations_on_host

#: Bytes of a state of AdamW in 8 bits: a code, and its share of one float32 per block of 256 (torchao).
STATE_8BIT = 1 + 4 / 256
#: Share of a card that the driver, cuBLAS and fragmentation leave for tensors; an allowance, not a measurement.
USABLE = 0.92
#: Weights of a block's width to its number, as of GPT-2 (768 / 12) to GPT-3's sizes (2048 / 24).
WIDTH_PER_LAYER = 80
VOCABULARY = 50_257
#: Most heads of 64 that a planned model has: beyond 100 B weights.
MOST_HEADS = 256
#: Blocks up to which a model is walked through as it is.
DEEP = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a model is trained.

    Attributes:
        batch_size: Sequences per step.
        bf16: Forward and backward under bfloat16 autocast; weights stay float32.
        checkpointing: Activations of blocks are computed again in the backward pass.
        activation_offload: ``training.activation_offload``: what a backward needs lies in host memory until then.
        ternary: Hidden linear layers of torchao's BitNet.
        eight_bit: Both moments of AdamW in 8 bits.
        offload: ``predictor.offload``: what this library remembers lies in host memory.
        ours: With this library; no: the plain loop.
    """

    batch_size: int = 8
    bf16: bool = False
    checkpointing: bool = False
    activation_offload: bool = False
    ternary: bool = False
    eight_bit: bool = False
    offload: bool = False
    ours: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes at the peak of a step.

    Attributes:
        setup: Of this estimate.
        num_parameters: Trained weights, P.
        parts: Name -> bytes on the training device.
        host: Bytes that lie in host memory.
        copy_before_a_raise: What of both is held only while a raise of the rate is on trial.
        activations_on_host: What of the host's is held from forward to backward: not when the optimizer steps.
    """

    setup: Setup
    num_parameters: int
    parts: dict[str, int]
    host: int
    copy_before_a_raise: int = 0
    activations_on_host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the training device."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planned: how its model is made and its loss is computed.

    Attributes:
        name: For people.
        build: Whether activations are computed again -> the model.
        batch: Batch size -> a batch, small and real.
        loss: Model, batch and whether the forward runs under bfloat16 autocast -> loss.
        shallow: The same with fewer blocks, twice, and the number of steps of that length beyond the second: what is
            held grows by the same amount with every block, so that deep models need not be walked through.
        built_empty: The model can be made without contents from the beginning.
    """

    name: str
    build: Callable[[bool], nn.Module]
    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any, bool], Tensor]
    shallow: tuple[Subject, Subject, float] | None = None
    built_empty: bool = False


def gpt_of(num_parameters: int, *, context: int, vocabulary: int = VOCABULARY) -> GptConfig:
    """The GPT whose number of weights is nearest, with tied embeddings and ``WIDTH_PER_LAYER``.

    Args:
        num_parameters: Wanted, P.
        context: T.
        vocabulary: Tokens that it knows.
    """
    shapes = (_shaped(heads, context, vocabulary) for heads in range(1, MOST_HEADS + 1))
    return min(shapes, key=lambda c: abs(num_weights(c) - num_parameters))


def _shaped(heads: int, context: int, vocabulary: int = VOCABULARY) -> GptConfig:
    width = 64 * heads
    return GptConfig(
        num_layers=max(round(width / WIDTH_PER_LAYER), 1), width=width, num_heads=heads, context=context, lr=1e-4,
        vocab_size=vocabulary, tied=True,
    )  # fmt: skip


def num_weights(config: GptConfig) -> int:
    """Weights of a tied GPT: two embeddings, and 12 W^2 + 2 W of each block."""
    per_block = 12 * config.width**2 + 2 * config.width
    return (config.vocab_size + config.context + 1) * config.width + config.num_layers * per_block


def of_size(num_parameters: int, *, context: int, vocabulary: int = VOCABULARY) -> Subject:
    """A GPT of about so many weights, for text in sequences of ``context`` tokens."""
    return _of(gpt_of(num_parameters, context=context, vocabulary=vocabulary))


def _of(config: GptConfig) -> Subject:
    found = _of_shape(config)
    if config.num_layers <= DEEP:
        return found
    two, four = (_of_shape(replace(config, num_layers=n)) for n in (2, 4))
    return replace(found, shallow=(two, four, (config.num_layers - 4) / 2))


@cache
def _of_shape(config: GptConfig) -> Subject:
    context = config.context

    def loss(model: nn.Module, tokens: Tensor, bf16: bool) -> Tensor:
        return token_loss(model, (tokens[:, :-1], tokens[:, 1:]), autocast_bf16=bf16)

    return Subject(
        f"GPT of {num_weights(config):,} weights: {config.num_layers} blocks of width {config.width}, context "
        f"{context}",
        lambda checkpointing: Gpt(config, gradient_checkpointing=checkpointing),
        lambda size: torch.zeros(size, context + 1, dtype=torch.long),
        loss,
        built_empty=True,
    )


def of_task(name: str, *, preset: str | None = None, context: int | None = None) -> Subject:
    """The model of a task as ``hpt train`` would build it.

    Raises:
        ConfigError: no such task, preset or setting.
    """

    settings = TaskSettings(preset=preset, context=context)

    def made(**changes: Any) -> Any:
        return make_task(name, replace(settings, **changes))

    losses = {False: made().loss_fn}

    def loss(model: nn.Module, batch: Any, bf16: bool) -> Tensor:
        if bf16 not in losses:
            losses[bf16] = made(autocast_bf16=bf16).loss_fn
        found: Tensor = losses[bf16](model, batch)
        return found

    return Subject(
        f"task {name}" + (f", preset {preset}" if preset else ""),
        lambda checkpointing: made(gradient_checkpointing=checkpointing).build_model(0),
        lambda size: next(iter(made(batch_size=size).batches(0))),
        loss,
    )


def estimate(subject: Subject, setup: Setup) -> Estimate:
    """Bytes at the peak of a step with AdamW.

    Args:
        subject: What is trained.
        setup: How.
    """
    peak, largest, num_parameters = _peak(subject, replace(setup, eight_bit=False, offload=False, ours=False))
    weights, moments = peak["weights"], peak["optimizer state"]
    parts = dict(peak)
    away = parts.pop(_AWAY)
    if setup.eight_bit:
        parts["optimizer state"] = moments = round(2 * STATE_8BIT * num_parameters)
    if not setup.ours:
        return Estimate(setup=setup, num_parameters=num_parameters, parts=parts, host=away, activations_on_host=away)
    held, host, snapshot = _held(num_parameters, weights, moments, setup)
    parts |= held
    # activations are gone by the time the lookahead writes, gradients are not: only what is above them counts
    moments_of_one = 8 * largest if setup.eight_bit else 0  # in float32, while its weights are stepped
    written = max(_landing(num_parameters, setup), moments_of_one) + 4 * num_parameters - parts["gradients"]
    over = written - parts["activations"] - parts["temporary"]
    parts["temporary"] += max(over, 0)
    return Estimate(
        setup=setup, num_parameters=num_parameters, parts=parts, host=host + away, copy_before_a_raise=snapshot,
        activations_on_host=away,
    )  # fmt: skip


#: Name of what activation offload keeps in host memory, beside the parts on the device.
_AWAY = "activations in host memory"


@cache  # what this library holds and where it lies changes nothing of the step
def _peak(subject: Subject, setup: Setup) -> tuple[dict[str, int], int, int]:
    """Bytes at a step's peak by kind, the largest tensor of trained weights, and P; callers leave the dict as it is."""
    if subject.shallow is None:
        return _step(subject, setup)
    two, four, times = subject.shallow
    (a, _, n), (b, largest, m) = (_peak(one, setup) for one in (two, four))
    return {key: round(b[key] + times * (b[key] - a[key])) for key in b}, largest, round(m + times * (m - n))


def _step(subject: Subject, setup: Setup) -> tuple[dict[str, int], int, int]:
    """:func:`_peak` of a second step that is taken."""
    from torch.distributed._tools.mem_tracker import MemTracker  # half a second

    batch = subject.batch(setup.batch_size)
    made = None if subject.built_empty else subject.build(setup.checkpointing)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        warnings.simplefilter("ignore")
        model = subject.build(setup.checkpointing) if made is None else _emptied(made, mode)
        model = ternary(model) if setup.ternary else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        batch = _converted(batch, mode)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        away = Away()
        with tracker:
            for i in range(2):
                if i:
                    tracker.reset_mod_stats()
                optimizer.zero_grad()
                away.num_bytes = 0
                with activations_on_host(model.parameters(), away) if setup.activation_offload else nullcontext():
                    loss = subject.loss(model, batch, setup.bf16)
                loss.backward()
                optimizer.step()
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
    (found,) = tracker.get_tracker_snapshot("peak").values()
    by_kind = {str(getattr(kind, "value", kind)): size for kind, size in found.items()}
    names = {
        "Parameter": "weights", "Buffer": "weights", "Gradient": "gradients", "Optstate": "optimizer state",
        "Activation": "activations", "Temp": "temporary", "Other": "temporary",
    }  # fmt: skip
    parts = dict.fromkeys(names.values(), 0)
    for kind, name in names.items():
        parts[name] += by_kind.get(kind, 0)
    return {**parts, _AWAY: away.num_bytes}, max(trained), sum(trained)


class Away(torch.autograd.graph.saved_tensors_hooks):
    """What a backward needs is dropped and counted, and comes back as a tensor of that shape.

    Attributes:
        num_bytes: That are away, if nothing has come back.
    """

    def __init__(self) -> None:
        """Nothing is away."""
        self.num_bytes = 0
        super().__init__(self._dropped, lambda kind: torch.empty(kind[0], dtype=kind[1], device=kind[2]))

    def _dropped(self, tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
        self.num_bytes += tensor.numel() * tensor.element_size()
        return tensor.shape, tensor.dtype, tensor.device


def _emptied(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A model whose weights have no contents any more; tied ones stay tied."""
    known: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            found = mode.from_tensor(tensor.detach())
            is_weight = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(found, tensor.requires_grad) if is_weight else found
        return known[id(tensor)]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = empty(tensor)  # type: ignore[assignment]
    return model


def _converted(value: Any, mode: FakeTensorMode) -> Any:
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, dict):
        return {key: _converted(item, mode) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_converted(item, mode) for item in value)
    return value


def _held(num_parameters: int, weights: int, moments: int, setup: Setup) -> tuple[dict[str, int], int, int]:
    """What the library holds with default settings on text, on the device by part, and in host memory."""
    P, large = num_parameters, num_parameters > LARGE
    lookahead = (6 if large else 8) * P  # weights at the last application, drift (narrow)
    snapshot = weights + moments + lookahead
    # two states are kept (cycle/withdrawal.py): the guard's anchor, and the start of a raise of the rate on trial
    copies = {"copy to come back to": snapshot, "copy before a raise": snapshot}
    found, host = {"lookahead": lookahead}, 0
    if setup.offload:
        found, host = {}, lookahead
    if setup.offload or large:
        host += sum(copies.values())
    else:
        found |= copies
    if not large:
        found["weights before a step"] = weights  # of which the learned multiplier takes the step's direction
        spec = build(HybridTrainerConfig(), 1, P).spec
        wide = 8 if P < FLOAT64_BELOW else 4
        basis = (spec.num_columns + 4) * wide * P  # columns; two sums and two means
        if setup.offload:
            host += basis
        else:
            found["basis"] = basis
    return found, host, snapshot


def _landing(num_parameters: int, setup: Setup) -> int:
    """Bytes that are built after a step: by the lookahead before it writes, by the multiplier while it measures.

    The lookahead builds weights, and a drift unless it is parked.  Of large models the multiplier keeps all weights
    before a step only until a sample of them is taken after it; and the group warm-up builds the weights anew then.
    """
    if num_parameters > LARGE:
        return 8 * num_parameters
    if setup.offload:
        return 4 * num_parameters
    return 8 * num_parameters


#: Ways to need less, the cheapest in time first: what is switched on beside what came before.
REMEDIES: tuple[dict[str, Any], ...] = (
    {"bf16": True}, {"offload": True}, {"checkpointing": True}, {"activation_offload": True}, {"eight_bit": True},
)  # fmt: skip


def options(subject: Subject, setup: Setup) -> Iterator[Estimate]:
    """Estimates with one remedy more at a time, then with half the batch each time; what needs no less is left out."""
    least = estimate(subject, setup)
    yield least
    for remedy in REMEDIES:
        found = estimate(subject, replace(setup, **remedy))
        if found.total < least.total:
            setup, least = found.setup, found
            yield found
    while setup.batch_size > 1:
        setup = replace(setup, batch_size=setup.batch_size // 2)
        yield estimate(subject, setup)


def first_that_fits(found: Iterator[Estimate], usable: float, most: int = 16) -> tuple[list[Estimate], bool]:
    """Estimates up to the first whose total is at most ``usable`` bytes, and whether there was one."""
    tried = []
    for one in islice(found, most):
        tried.append(one)
        if one.total <= usable:
            return tried, True
    return tried, False


def largest_that_fits(usable: float, setup: Setup, *, context: int) -> int:
    """Weights of the largest GPT whose peak is at most ``usable`` bytes, 0 where none is; by halving over widths."""
    low, high = 0, MOST_HEADS + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = estimate(_of(_shaped(middle, context)), setup).total <= usable
        low, high = (middle, high) if fits else (low, middle)
    return num_weights(_shaped(low, context)) if low else 0
