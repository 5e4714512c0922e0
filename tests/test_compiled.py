"""Loss functions that call what ``torch.compile`` has made, while the model that was handed in is the plain one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from cases import Fake, assert_same, config, full_batch, loss_fn, make_batches, setup
from frameworks import weights_of
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, attach, with_values
from hybrid_predict_trainer.keep.loss_modules import MAX_DEPTH


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _calls_what_is_compiled(way: str, model: nn.Module, backend: Any) -> Any:
    """Loss functions that ignore the model they are given, or are compiled themselves."""
    if way == "plain":
        return loss_fn
    if way == "compiled model":
        compiled = torch.compile(model, backend=backend)
        return lambda _, batch: loss_fn(compiled, batch)
    if way == "compiled function":
        return torch.compile(loss_fn, backend=backend)
    inside = torch.compile(lambda x: model(x), backend=backend)
    if way == "function inside":
        return lambda _, batch: nn.functional.mse_loss(inside(batch[0]), batch[1])
    far: Any = [torch.compile(model, backend=backend)]
    for _ in range(MAX_DEPTH):
        far = [far]

    def of_far(_: nn.Module, batch: Any) -> Tensor:
        found = far
        while isinstance(found, list):
            found = found[0]
        return loss_fn(found, batch)

    return of_far


WAYS = ["compiled model", "compiled function", "function inside", "too far to be found"]


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # of torch, where it is too far to be found
@pytest.mark.parametrize("riding", [False, True], ids=["trainer", "attached"])
@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_calls_what_is_compiled_is_judged(way: str, riding: bool) -> None:
    """The same run as without, and no phase compiles anew: with gradients, without, and for pieces of a batch."""
    ends, counter = [], CompileCounter()
    for chosen in ("plain", way):
        torch._dynamo.reset()
        made = setup("mlp", "sgd")
        loss_of = _calls_what_is_compiled(chosen, made.model, counter)
        driver = attach if riding else HybridTrainer
        driven = driver(made.model, made.optimizer, config(), loss_fn=loss_of, predictor=Fake(-0.02))
        for batch in make_batches(60):
            if isinstance(driven, HybridTrainer):
                driven.step(batch)
                continue
            made.optimizer.zero_grad()
            loss = loss_of(made.model, batch)
            loss.backward()
            driven.note(loss, batch)
            made.optimizer.step()
        statistics = driven.statistics()
        assert statistics["num_jumps_proposed"] > 2
        assert not any(driven.run.failures.counts.values())
        ends.append((weights_of(made.model), statistics["num_jumps_accepted"]))
    assert_same(*ends)
    assert 2 <= counter.frame_count <= 3


class ReturnsLoss(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.inner(x), y)}


def test_the_engine_is_not_traced_where_the_loop_calls_the_compiled_model_and_the_plain_one_is_attached() -> None:
    ends, counter = [], CompileCounter()
    for compiled in (False, True):
        torch._dynamo.reset()
        made = setup("mlp", "sgd")
        model = ReturnsLoss(made.model)
        called = torch.compile(model, backend=counter) if compiled else model
        engine = attach(model, made.optimizer, config(), predictor=Fake(-0.02))
        for x, y in make_batches(60):
            made.optimizer.zero_grad()
            called(x=x, y=y)["loss"].backward()
            made.optimizer.step()
        assert engine.statistics()["num_jumps_proposed"] > 2
        assert engine.why_not == ""
        ends.append((weights_of(model), engine.statistics()["num_jumps_accepted"]))
    assert_same(*ends)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["residuals", "wolfe", "dense"])
def test_own_steps_of_a_loss_that_calls_what_is_compiled(kind: str) -> None:
    ends, counter = [], CompileCounter()
    for compiled in (False, True):
        torch._dynamo.reset()
        made = setup("mlp", "adam")
        model = torch.compile(made.model, backend=counter) if compiled else made.model
        settings = {} if kind == "residuals" else {"predictor_type": "quasi_newton"}
        chosen = with_values(HybridTrainerConfig(**settings), {"training.warmup_steps": 4})
        if kind != "residuals":
            chosen = with_values(chosen, {"predictor.quasi_newton.form": kind, "predictor.window": 1})
        residual_fn = (lambda _, b, m=model: m(b[0]) - b[1]) if kind == "residuals" else None
        trainer = HybridTrainer(
            made.model, made.optimizer, chosen, lambda _, b, m=model: loss_fn(m, b), residual_fn=residual_fn
        )
        for batch in full_batch(40):
            trainer.step(batch)
        assert trainer.statistics()["num_jumps_accepted"] > 0
        assert not any(trainer.run.failures.counts.values())
        ends.append(weights_of(made.model))
    assert_same(*ends)
    assert counter.frame_count <= 2
    torch._dynamo.reset()
