"""What the stack is made of: factors added to conventional training one after the other, and which are not here.

A factor is here if a first step with it works on this device; why another is not is told in one line, because a
missing compiler must not look like a compiler that gains nothing.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ...keep.isolation import side_effect_free
from ...observe import batches as pieces
from ...records import ConfigError
from ..arms.drive import wait_for_device
from ..arms.options import InputError, Options, build_experiment, one_line
from ..run_arm import Experiment, build_trainer

CONVENTIONAL = "conventional"
NOT_HERE = "not here"

#: In the order in which they are added, with what a reader of the table is told.
FACTORS: Mapping[str, str] = {
    "bf16": "bfloat16 autocast",
    "fused": "fused optimizer",
    "compile": "torch.compile",
    "attention": "scaled-dot-product attention",
    "prediction": "predicted phases, default settings",
}

#: Steps of every row before anything is timed: they compile, load kernels and fill the allocator's pools.
NUM_STARTING_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One row: the factors it trains with, or why its own is not to be had here.

    Attributes:
        name: of the factor it adds, or "conventional".
        factors: all it trains with.
        setup: task, recipe and trainer settings; None where the factor is not here.
        reason: why it is not, in one line.
        startup_s: seconds of the steps that are thrown away, compiling included.
        attention_kernels: attentions that the compiler found written out and put its own kernel for.
    """

    name: str
    factors: frozenset[str]
    setup: Experiment | None = None
    reason: str = ""
    startup_s: float = 0.0
    attention_kernels: int = 0


def written_out_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention as papers write it: all scores in memory, masked, softmax, times the values.

    Args:
        query: (..., T, E).
        key: (..., S, E).
        value: (..., S, V).
        attn_mask: (T, S) or broadcast to (..., T, S); bool (True: may look) or added to the scores.
        dropout_p: of the weights.
        is_causal: position t sees positions up to t only.
        scale: of the scores; None: 1 / sqrt(E).
        enable_gqa: fewer heads of keys than of queries; not written out here.

    Returns:
        (..., T, V).

    Raises:
        ValueError: ``enable_gqa``.
    """
    if enable_gqa:
        raise ValueError("attention with shared key heads is not written out here")
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    shares = functional.dropout(functional.softmax(scores, dim=-1).to(value.dtype), dropout_p)
    return shares @ value


@contextmanager
def conventional_attention() -> Iterator[None]:
    """Inside, ``scaled_dot_product_attention`` is :func:`written_out_attention`.

    Why not ``sdpa_kernel(SDPBackend.MATH)``: compiled code does not look at that setting, so a row with it and a row
    without would share one compiled graph; and for bfloat16 that kernel widens to float32, which nobody wrote.
    """
    kept = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = written_out_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = kept


def attention_of(rung: Rung) -> AbstractContextManager[None]:
    """Where a rung's forwards have to run."""
    return nullcontext() if "attention" in rung.factors else conventional_attention()


def missing(factor: str, device: torch.device) -> str:
    """Why a factor cannot be had on a device, as far as can be known without trying; "" where it may be tried."""
    if factor == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return f"{torch.cuda.get_device_name(device)} has no bfloat16"
    if factor == "compile":
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "torch.compile needs the package triton here"
        if not cpp_compiler():
            return "torch.compile needs a C++ compiler (g++, clang++ or the one CXX names), and there is none"
    return ""


def cpp_compiler() -> str:
    """Path of the C++ compiler torch.compile would use, "" if there is none."""
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl")
    return next((path for name in names if name and (path := shutil.which(name))), "")


def climb(options: Options, without: Collection[str], note: Callable[[str], None]) -> list[Rung]:
    """Add one factor after the other, leaving out those that are not here.

    Raises:
        InputError: not even conventional training works.
    """
    device = torch.device(options.device or "cpu")
    first = attempt(options, CONVENTIONAL, frozenset())
    if first.setup is None:
        raise InputError(f"conventional training does not work here: {first.reason}")
    rungs, factors = [first], first.factors
    for name in FACTORS:
        reason = "left out on request" if name in without else missing(name, device)
        rung = Rung(name=name, factors=factors, reason=reason) if reason else attempt(options, name, factors | {name})
        note(f"{name}: {f'{NOT_HERE}, {rung.reason}' if rung.setup is None else f'ready, {rung.startup_s:.1f} s'}")
        factors = factors if rung.setup is None else rung.factors
        rungs.append(rung)
    return rungs


def attempt(options: Options, name: str, factors: frozenset[str]) -> Rung:
    """Build a rung and take its first steps, so that what does not work shows and what is slow once is done."""
    started, before = time.perf_counter(), _attention_kernels(factors)
    chosen = replace(options, bf16="bf16" in factors, fused="fused" in factors, compile="compile" in factors)
    rung = Rung(name=name, factors=factors)
    try:
        setup = build_experiment(chosen)
        with attention_of(rung):
            _first_steps(setup, predict="prediction" in factors)
    except Exception as error:  # whatever a device or a compiler raises means: not here
        if name == CONVENTIONAL and isinstance(error, InputError | ConfigError):
            raise  # nothing to do with factors: a setting does not fit
        return replace(rung, reason=one_line(f"{type(error).__name__}: {error}")[:300])
    return replace(
        rung, setup=setup, startup_s=time.perf_counter() - started,
        attention_kernels=_attention_kernels(factors) - before,
    )  # fmt: skip


def _first_steps(setup: Experiment, *, predict: bool) -> None:
    trainer = build_trainer(setup, lr=setup.recipe.lr, steps=setup.steps, seed=0, predict=predict)
    data = setup.task.batches(0)
    for _ in range(NUM_STARTING_STEPS):
        batch = next(data)
        trainer.step(batch)
    if predict:  # the gate's batches have other sizes, which a compiler compiles for
        size = pieces.num_samples(batch)
        chunks = pieces.chunks(batch, size // 2, size, trainer.config.gate.max_chunks)
        with side_effect_free(trainer.run.subject.model):
            for part in (batch, pieces.narrow(batch, 0, size // 2), *chunks[:1]):
                trainer.run.judge.evaluation.loss(part)
    wait_for_device(trainer)


def _attention_kernels(factors: Collection[str]) -> int:
    """How many written-out attentions the compiler has replaced so far in this process."""
    if "compile" not in factors:
        return 0
    from torch._dynamo.utils import counters  # a heavy import, for nothing where nothing is compiled

    return int(counters["inductor"]["fuse_attention"])
