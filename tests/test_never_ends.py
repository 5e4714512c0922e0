"""Nothing that prediction does ends a run, and what counts as exact was measured."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import Fake, assert_same, config, full_batch, make_batches, put_into_subject, setup
from hybrid_predict_trainer.judge import exactness, gate
from hybrid_predict_trainer.judge.exactness import Agreement, measure
from hybrid_predict_trainer.records import Phase, Reason, Verdict

mse = nn.functional.mse_loss
DATA: dict[str, Callable[..., list[Any]]] = {"noisy": make_batches, "exact": full_batch}
ERRORS = (
    RuntimeError("no"),
    MemoryError("no"),
    torch.OutOfMemoryError("no"),
    KeyError("no"),
    NotImplementedError("no"),
)


# ---------------------------------------------------------------- exceptions x places


def in_the_loss(trainer: Any, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    inner = trainer.run.subject.loss_fn

    def raising(model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled():
            model(batch[0])
            model.train(not model.training)
            raise error
        return inner(model, batch)

    put_into_subject(trainer, loss_fn=raising)


def in_a_method(owner: str, name: str) -> Callable[[Any, BaseException, pytest.MonkeyPatch], None]:
    def install(trainer: Any, error: BaseException, patch: pytest.MonkeyPatch) -> None:
        def raising(*args: Any, **kwargs: Any) -> Any:
            raise error

        patch.setattr(operator.attrgetter(owner)(trainer.run), name, raising)

    return install


PLACES: dict[str, Callable[[Any, BaseException, pytest.MonkeyPatch], None]] = {
    "loss": in_the_loss,
    "predict": in_a_method("proposer.predictor", "predict"),
    "observe": in_a_method("proposer.predictor", "observe"),
    "combine": in_a_method("windows.basis", "combine"),
    "radius": in_a_method("windows.basis", "displacement_rms"),
    "sums": in_a_method("windows.basis", "accumulate"),
    "columns": in_a_method("windows.basis", "close_window"),
    "confidence": in_a_method("proposer.feedback", "state_confidence"),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_anywhere_is_a_refusal(
    place: str, error: Exception, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = DATA[data](40, 32)
    plain, ours = setup("batchnorm", "adam", "lambda"), setup("batchnorm", "adam", "lambda")
    plain.plain(batches)
    trainer = ours.trainer(config(), predictor=Fake())
    PLACES[place](trainer, error, monkeypatch)
    with pytest.warns(UserWarning, match=type(error).__name__) as told:
        trainer.fit(batches)
    assert len(told) <= 2, "once per kind"
    assert_same(ours.everything(), plain.everything())
    counts = trainer.statistics()
    assert 3 <= counts["num_gate_failures"] + counts["num_predictor_failures"] <= 5, "after three nobody asks"
    assert counts["num_real_steps"] == 40


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_gate_passes_through(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    made = setup("batchnorm", "adam", "lambda")
    trainer = made.trainer(config(), predictor=Fake())
    in_the_loss(trainer, error(), monkeypatch)
    state: Any = None

    def go() -> None:
        nonlocal state
        for batch in make_batches(40, 32):
            state = made.everything()
            trainer.step(batch)

    with pytest.raises(error):
        go()
    assert_same(made.everything(), state)
    assert torch.is_grad_enabled()


def test_gradients_of_the_last_step_stay() -> None:
    made = setup("mlp")
    trainer = made.trainer(config(), predictor=Fake(1.0))

    def writes(model: nn.Module, batch: Any) -> Tensor:
        loss = mse(model(batch[0]), batch[1])
        if not torch.is_grad_enabled():
            for p in model.parameters():
                p.grad = torch.full_like(p, 7.0)
        return loss

    put_into_subject(trainer, loss_fn=writes)
    refused = 0
    for batch in make_batches(30):
        before = [p.grad for p in made.model.parameters()]
        if trainer.step(batch).phase is Phase.PREDICT:
            refused += 1
            assert all(p.grad is old for p, old in zip(made.model.parameters(), before, strict=True))
    assert refused


# ---------------------------------------------------------------- what a batch can be


def popping(model: nn.Module, batch: Any) -> Tensor:
    y = batch.pop("y")
    return mse(model(batch["x"]), y)


def writing(model: nn.Module, batch: Any) -> Tensor:
    batch["x"].mul_(0.5)
    return mse(model(batch["x"]), batch["y"])


#: name -> (make a batch of x and y, its loss, whether it may be cut)
LAYOUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[nn.Module, Any], Tensor], bool]] = {
    "labels taken out": (lambda x, y: {"x": x, "y": y}, popping, True),
    "written into": (lambda x, y: {"x": x.clone(), "y": y}, writing, True),
    "sum": (lambda x, y: (x, y), lambda m, b: mse(m(b[0]), b[1], reduction="sum"), True),
    "a scalar beside": (lambda x, y: (x, y, torch.tensor(2.0)), lambda m, b: b[2] * mse(m(b[0]), b[1]), True),
    "a mask for all": (lambda x, y: (x, y, torch.ones(1, 1)), lambda m, b: (b[2] * (m(b[0]) - b[1]) ** 2).mean(), True),
    "labels in a list": (lambda x, y: (x, y[:, 0].tolist()), lambda m, b: mse(m(b[0])[:, 0], torch.tensor(b[1])), True),
    "weights of a mask": (
        lambda x, y: (x, y, (x[:, :1] > 0).float()),
        lambda m, b: (b[2] * (m(b[0]) - b[1]).square()).sum() / b[2].sum(),
        True,
    ),
    "built-in size": (lambda x, y: (x, y), lambda m, b: mse(m(b[0].view(32, -1)), b[1].view(32, 1)), False),
    "an object": (lambda x, y: SimpleNamespace(x=x, y=y), lambda m, b: mse(m(b.x), b.y), False),
    "ragged": (
        lambda x, y: [(x, y), (x[:5], y[:5])],
        lambda m, b: torch.stack([mse(m(x), y) for x, y in b]).mean(),
        False,
    ),
    "other lengths": (lambda x, y: (x, y, torch.ones(3)), lambda m, b: mse(m(b[0]), b[1]) * b[2].mean(), False),
    "samples compared": (lambda x, y: (x, y), lambda m, b: m(b[0]).var() + mse(m(b[0]), b[1]), False),
    "time comes first": (lambda x, y: (x, y), lambda m, b: (m(b[0]).cumsum(0) - b[1]).square().mean(), False),
    "paired the other way": (lambda x, y: (x, y), lambda m, b: mse(m(b[0]), b[1].roll(3, 0)), False),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.filterwarnings("ignore:the batch cannot be cut")
def test_a_batch_is_cut_truly_or_not_at_all(name: str) -> None:
    make, loss, cut = LAYOUTS[name]
    made = setup("mlp")
    trainer = made.trainer(config(gate__significance=0.5), predictor=Fake(), loss_fn=loss)
    reasons = [trainer.step(make(x, y)).reason for x, y in make_batches(60, 32)]
    refused = [r for r in reasons if r == Reason.CANNOT_CUT.value]
    assert len(refused) == (0 if cut else 3), "after three nobody asks"
    assert trainer.statistics()["num_jumps_proposed"] >= 3
    assert trainer.statistics()["num_gate_failures"] == 0


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 16, 17, 32])
def test_no_piece_of_one_sample_where_there_are_batch_statistics(size: int) -> None:
    seen: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled() and model.training is False:
            seen.append(len(batch[0]))
        return mse(model(batch[0]), batch[1])

    trainer = setup("batchnorm").trainer(config(gate__significance=0.5), predictor=Fake(), loss_fn=loss)
    for batch in make_batches(30, size):
        trainer.step(batch)
    assert all(n >= 2 for n in seen)
    assert bool(seen) is (size >= 4)


def test_a_model_that_can_be_trained_only() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.aux = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Any:
            h = torch.tanh(self.body(x))
            return (self.head(h), self.aux(h)) if self.training else self.head(h)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        main, aux = model(batch[0][:, :4])
        return mse(main, batch[1]) + 0.4 * mse(aux, batch[1])

    for data in DATA.values():
        made = setup("mlp")
        made.model = Aux()
        made.optimizer = torch.optim.SGD(made.model.parameters(), lr=0.05)
        trainer = made.trainer(config(gate__significance=0.5), predictor=Fake(), loss_fn=loss)
        trainer.fit(data(40))
        assert trainer.statistics()["num_jumps_accepted"] > 0


def test_other_modules_and_carried_state_are_left_alone() -> None:
    critic = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))

    class Carrying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls, self.seen, self.state = nn.Linear(8, 1), 0, [], torch.zeros(1)
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(self.calls)
            self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
            self.state.add_(1.0)
            return self.layer(x) + 0.01 * self.mean

    model = Carrying()
    made = setup("mlp")
    made.model, made.optimizer = model, torch.optim.SGD(model.parameters(), lr=0.05)
    batches = make_batches(40)
    width = batches[0][0].shape[1]
    model.layer = nn.Linear(width, 1)
    made.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    trainer = made.trainer(
        config(), predictor=Fake(1.0), loss_fn=lambda m, b: mse(m(b[0]), b[1]) + critic(m(b[0])).square().mean()
    )
    refused = 0
    for batch in batches:
        before = (
            model.calls,
            list(model.seen),
            model.mean.clone(),
            model.state.clone(),
            critic[1].running_mean.clone(),
        )
        result = trainer.step(batch)
        if result.phase is Phase.PREDICT and not result.was_predicted:
            refused += 1
            after = (model.calls, list(model.seen), model.mean, model.state, critic[1].running_mean)
            assert_same(list(after), list(before))
    assert refused


# ---------------------------------------------------------------- exactness


def random_in_the_loss(model: nn.Module, batch: Any) -> Tensor:
    return mse(model(batch[0]), batch[1]) + 1e-6 * torch.rand(())


def own_generator(model: nn.Module, batch: Any, generator: torch.Generator = torch.Generator()) -> Tensor:  # noqa: B008
    return mse(model(batch[0]), batch[1]) + 1e-6 * torch.rand((), generator=generator)


NOISE: dict[str, tuple[str, Any, bool]] = {
    "nothing random": ("mlp", None, True),
    "batch statistics": ("batchnorm", None, True),
    "dropout": ("dropout", None, False),
    "a random number": ("mlp", random_in_the_loss, False),
    "a generator of its own": ("mlp", own_generator, False),
}


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_exact_is_what_two_evaluations_say(name: str, optimizer: str) -> None:
    model, loss, exact = NOISE[name]
    made = setup(model, optimizer)
    trainer = made.trainer(config(), predictor=Fake(), **({} if loss is None else {"loss_fn": loss}))
    data = full_batch(8)
    trainer.step(data[0])
    before, forwards = made.everything(), trainer.statistics()["num_forward"]
    assert trainer.run.judge.exactness.agreed is None, "nobody asks before the batch has come twice"
    trainer.step(data[1])
    assert trainer.run.full_batch is exact
    spent = trainer.statistics()["num_forward"] - forwards - 1
    assert spent == (2 if exact else 3), "and it is paid for"
    assert before["modes"] == made.everything()["modes"]


def test_dropout_switched_on_in_mid_run() -> None:
    made = setup("dropout")
    drop = next(m for m in made.model.modules() if isinstance(m, nn.Dropout))
    rate, drop.p = drop.p, 0.0
    trainer = made.trainer(config(), predictor=Fake())
    trainer.fit(full_batch(10))
    assert trainer.run.full_batch
    drop.p = rate
    trainer.fit(full_batch(10))
    assert not trainer.run.full_batch


def test_asked_again_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "RECHECK_STEPS", 10)
    trainer = setup().trainer(config(), predictor=Fake(ready=False))
    trainer.fit(full_batch(42))
    assert trainer.run.judge.exactness.num_measured == 5


def test_always_is_the_users_word_but_looked_at() -> None:
    trainer = setup("dropout").trainer(config(gate__exact="always"), predictor=Fake())
    with pytest.warns(UserWarning, match="two losses of the same batch differ") as told:
        trainer.fit(full_batch(20))
    assert len(told) == 1
    assert trainer.run.full_batch


@pytest.mark.parametrize(
    ("values", "on_cpu", "wanted"),
    [
        ([1.0, 1.0], True, Agreement(exact=True)),
        ([1.0, 1.0 + 1e-6, 1.0], False, Agreement(exact=False, num_forward=3)),
        ([1.0, 1.0 + 1e-6, 1.0 - 2e-6], True, Agreement(exact=False, num_forward=3)),
        ([1.0, 1.5, 1.0 - 1e-6], False, Agreement(exact=False, num_forward=3)),
        ([float("nan")] * 3, True, Agreement(exact=False, num_forward=3, finite=False)),
    ],
)
def test_what_evaluations_have_in_common(values: list[float], on_cpu: bool, wanted: Agreement) -> None:
    found = iter(values)
    assert measure(lambda: next(found), lambda: None, on_cpu=on_cpu) == wanted


def test_rounding_of_a_device_is_the_noise_to_beat() -> None:
    found = iter([1.0, 1.0 + 1e-6, 1.0 - 2e-6])
    agreement = measure(lambda: next(found), lambda: None, on_cpu=False)
    assert agreement.exact
    assert agreement.noise == pytest.approx(2e-6)
    for gain, accepted in ((1e-6, False), (3e-6, True)):
        verdict = Verdict(accepted=True, reason=Reason.ACCEPTED, loss_before=1.0, loss_after=1.0 - gain)
        judged = gate.beyond_noise(verdict, agreement.noise)
        assert judged.accepted is accepted
        assert judged.reason is (Reason.ACCEPTED if accepted else Reason.NOT_SIGNIFICANT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{"predictor_type": "secant", "encoder__low_rank": 2}, {"predictor_type": "linear"}]
)
def test_defaults_of_the_user_are_not_ours(dtype: torch.dtype, changes: dict[str, Any]) -> None:
    made, batches = setup("mlp"), make_batches(30)
    try:
        torch.set_default_dtype(dtype)
        trainer = made.trainer(config(**changes))
        trainer.fit(batches)
        assert torch.get_default_dtype() is dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert trainer.summary()["failures"] == {}


def test_a_default_device_of_the_user_is_not_ours() -> None:
    made, batches = setup("mlp"), make_batches(30)
    trainer = made.trainer(config(), predictor=Fake())
    torch.set_default_device("meta")
    try:
        for batch in batches:
            trainer.step(batch)
    finally:
        torch.set_default_device(None)  # type: ignore[arg-type]
    assert trainer.statistics()["num_jumps_proposed"] > 0
    assert trainer.summary()["failures"] == {}
