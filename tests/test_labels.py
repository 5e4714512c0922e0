"""Full-batch training on labels: no jump learns by heart where only the training loss could judge it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, attach
from hybrid_predict_trainer.config.presets import PRESETS
from hybrid_predict_trainer.config.toml import with_values
from hybrid_predict_trainer.cycle.inputs import why_ended
from hybrid_predict_trainer.judge.labels import is_of_labels

NUM_INPUTS, NUM_CLASSES = 6, 3
Loss = Callable[[Tensor, Tensor], Tensor]

OF_LABELS: dict[str, Loss] = {
    "cross-entropy": functional.cross_entropy,
    "smoothed": lambda o, y: functional.cross_entropy(o, y, label_smoothing=0.1),
    "weighted by hand": lambda o, y: (functional.cross_entropy(o, y, reduction="none") * y).sum() / 3,
    "of probabilities": lambda o, y: functional.nll_loss(o.log_softmax(-1), y),
    "gathered": lambda o, y: -o.log_softmax(-1).gather(1, y[:, None]).mean(),
    "log-sum-exp": lambda o, y: (torch.logsumexp(o, -1) - o[torch.arange(len(o)), y]).mean(),
    "focal": lambda o, y: (-((1 - o.log_softmax(-1).exp()) ** 2) * o.log_softmax(-1))[torch.arange(len(o)), y].mean(),
    "binary": lambda o, y: functional.binary_cross_entropy_with_logits(o[:, 0], (y > 1).to(o)),
    "binary of probabilities": lambda o, y: functional.binary_cross_entropy(torch.sigmoid(o[:, 0]), (y > 1).to(o)),
    "soft margin": lambda o, y: functional.soft_margin_loss(o[:, 0], torch.sign(y - 0.5)),
    "in double": lambda o, y: functional.cross_entropy(o.double(), y).float(),
    "with a penalty": lambda o, y: functional.cross_entropy(o, y) + 1e-3 * o.square().mean(),
    "weighed by what is learned": lambda o, y: nn.Parameter(torch.ones(())) * functional.cross_entropy(o, y),
    "of some": lambda o, y: functional.cross_entropy(o[y > 0], y[y > 0]),
}  # fmt: skip
OF_NUMBERS: dict[str, Loss] = {
    "squares": lambda o, y: functional.mse_loss(o[:, 0], y.to(o)),
    "squares by hand": lambda o, y: ((o[:, 0] - y) ** 2).mean(),
    "absolute": lambda o, y: functional.l1_loss(o[:, 0], y.to(o)),
    "huber": lambda o, y: functional.huber_loss(o[:, 0], y.to(o)),
    "positive outputs": lambda o, y: functional.mse_loss(functional.softplus(o[:, 0]), y.to(o)),
    "squares of log-probabilities": lambda o, y: functional.mse_loss(o.log_softmax(-1)[:, 0], y.to(o)),
    "counts": lambda o, y: functional.poisson_nll_loss(o[:, 0], y.to(o)),
}  # fmt: skip


@pytest.mark.parametrize(
    "size", [lambda w: w.square().sum(), lambda w: w.norm(), lambda w: w.abs().sum(), lambda w: (w * w).mean()]
)
def test_a_penalty_of_weights_in_the_loss_says_where_to_stop(size: Callable[[Tensor], Tensor]) -> None:
    """As decay that the optimizer adds does; the order of the terms is no matter."""
    x, y = _data(12)
    layer = nn.Linear(NUM_INPUTS, NUM_CLASSES)
    told, penalty = functional.cross_entropy(layer(x), y), 1e-3 * size(layer.weight)
    assert is_of_labels(told)
    assert not is_of_labels(told + penalty)
    assert not is_of_labels(penalty + told)


def _data(num_samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, NUM_INPUTS, generator=generator)
    return x, torch.randint(NUM_CLASSES, (num_samples,), generator=generator)


@pytest.mark.parametrize("name", [*OF_LABELS, *OF_NUMBERS])
def test_a_loss_of_labels_is_known_by_its_graph_before_and_after_backward(name: str) -> None:
    x, y = _data(12)
    loss = (OF_LABELS | OF_NUMBERS)[name](nn.Linear(NUM_INPUTS, NUM_CLASSES)(x), y)
    assert is_of_labels(loss) == (name in OF_LABELS)
    loss.backward()
    assert is_of_labels(loss) == (name in OF_LABELS)
    assert not is_of_labels(loss.detach())


# ---- runs ------------------------------------------------------------------------------------------------------


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(NUM_INPUTS, 16), nn.Tanh(), nn.Linear(16, NUM_CLASSES))


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def _squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.mse_loss(model(batch[0])[:, 0], batch[1].float())


def _run(
    num_samples: int = 40, loss_fn: Any = _cross_entropy, decay: float = 0.0, settings: dict[str, Any] | None = None,
    steps: int = 60, **options: Any,
) -> HybridTrainer:  # fmt: skip
    model = _mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=decay)
    config = with_values(HybridTrainerConfig(), settings or {})
    trainer = HybridTrainer(model, optimizer, config, loss_fn=loss_fn, **options)
    trainer.fit(itertools.repeat(_data(num_samples)), total_steps=steps)
    return trainer


ALLOWED: dict[str, dict[str, Any]] = {
    "many labels": {"num_samples": 8200}, "numbers": {"loss_fn": _squares}, "decay": {"decay": 1e-2},
    "validation": {"val_fn": lambda model: float(_cross_entropy(model, _data(40)).detach())},
    "a predictor that was chosen": {"settings": {**PRESETS["full_batch"], "predictor.type": "quasi_newton"}},
    "asked for": {"settings": {"gate.exact": "always"}},
}  # fmt: skip


def test_few_labels_for_so_many_weights_are_left_to_the_optimizer() -> None:
    """To the last bit, and the run says why."""
    trainer = _run()
    model = _mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(trainer.current_step):
        optimizer.zero_grad()
        _cross_entropy(model, _data(40)).backward()
        optimizer.step()
    assert trainer.run.full_batch
    assert trainer.statistics()["num_jumps_proposed"] == 0
    for ours, theirs in zip(trainer.run.subject.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "by heart" in why_ended(trainer.run)


@pytest.mark.parametrize("validated", [False, True])
def test_the_multiplier_stays_where_nothing_says_where_to_stop(validated: bool) -> None:
    """At a rate that is far too low; with a validation loss it is raised."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    options: dict[str, Any] = ALLOWED["validation"] if validated else {}
    trainer = HybridTrainer(
        model, optimizer, HybridTrainerConfig(), loss_fn=_cross_entropy, lr_scheduler=schedule,
        **options,
    )  # fmt: skip
    trainer.fit(itertools.repeat(_data(40)), total_steps=100)
    assert (trainer.statistics()["learned_scale"] > 1) == validated


@pytest.mark.parametrize("name", ALLOWED)
def test_jumps_are_made_where_something_says_where_to_stop(name: str) -> None:
    assert _run(**ALLOWED[name]).statistics()["num_jumps_accepted"] > 0


def test_a_loop_of_the_user_s_own_is_told_why() -> None:
    model, batch = _mlp(), _data(40)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    engine = attach(model, optimizer, loss_fn=_cross_entropy)
    for _ in range(40):
        optimizer.zero_grad()
        loss = _cross_entropy(model, batch)
        loss.backward()
        engine.note(loss, batch)
        optimizer.step()
    assert engine.run.meter.num_jumps_proposed == 0
    assert "val_fn" in engine.why_not
    engine.detach()


def test_a_resumed_run_knows_it_before_its_first_step(tmp_path: Path) -> None:
    trainer = _run()
    saved = trainer.save_checkpoint(tmp_path / "saved")
    again = _run(steps=0)
    assert again.run.judge.of_labels is None
    again.load_checkpoint(saved)
    assert (again.run.judge.of_labels, again.run.judge.num_samples) == (True, 40)
