"""Ours moves only what trains, and forgets weights that somebody else has changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import WIDTH, Fake, config, full_batch, make_batches, setup
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, LookaheadConfig, preset_config
from hybrid_predict_trainer.cycle.outside import MAX_WRITES
from hybrid_predict_trainer.keep.loss_modules import modules_beside
from hybrid_predict_trainer.move.lookahead import DriftLookahead
from hybrid_predict_trainer.weights.trained import MAX_RETURNS, Trained, Write, Writes

STOP = 60

#: The lookahead on any network.
DEFAULT = HybridTrainerConfig(lookahead=LookaheadConfig(scope="all"))

SETTINGS: dict[str, Callable[[], tuple[HybridTrainerConfig, list[Any]]]] = {
    "default": lambda: (DEFAULT, make_batches(150)),
    "lookahead without drift": lambda: (
        HybridTrainerConfig(lookahead=LookaheadConfig(extrapolation=0.0, drift=0.0, scope="all")),
        make_batches(150),
    ),
    "jumps on noise": lambda: (config(gate__significance=0.5), make_batches(150)),
    "jumps on one batch": lambda: (config(correct_steps=3), full_batch(150)),
    "quasi-Newton": lambda: (preset_config("full_batch"), full_batch(150)),
}


@dataclass
class Case:
    """A network in two groups, and a loss that can leave its first layer out."""

    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    trainer: HybridTrainer
    unused: bool = False

    @classmethod
    def of(cls, settings: HybridTrainerConfig, **kwargs: Any) -> Case:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / 400)
        case = cls(model, optimizer, None)  # type: ignore[arg-type]
        case.trainer = HybridTrainer(model, optimizer, settings, case.loss, schedule, **kwargs)
        return case

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        first = model[0]
        if self.unused:
            return nn.functional.mse_loss(model[2](torch.tanh(batch[0] @ first.weight.detach().T)), batch[1])
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    @property
    def held(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model[0].parameters()]


def _freeze(case: Case) -> None:
    case.model[0].requires_grad_(False)


def _remove(case: Case) -> None:
    del case.optimizer.param_groups[0]
    case.trainer.run.schedule.scheduler = None


def _unuse(case: Case) -> None:
    case.unused = True


def _stop_rate(case: Case) -> None:
    case.optimizer.param_groups[0]["lr"] = 0.0
    case.trainer.run.schedule.scheduler.base_lrs[0] = 0.0


def _tensor_rate(case: Case) -> None:
    case.trainer.run.schedule.scheduler = None
    case.optimizer.param_groups[0]["lr"] = torch.tensor(0.0)


STOPS = {"frozen": _freeze, "removed": _remove, "unused": _unuse, "rate 0": _stop_rate, "rate tensor(0)": _tensor_rate}


@pytest.mark.parametrize("settings", sorted(SETTINGS))
@pytest.mark.parametrize("how", sorted(STOPS))
def test_what_does_not_train_stays(how: str, settings: str) -> None:
    values, batches = SETTINGS[settings]()
    case = Case.of(values)
    for batch in batches[:STOP]:
        case.trainer.step(batch)
    STOPS[how](case)
    if how == "unused":  # that a loss has changed can be seen at its next backward pass
        case.trainer.force_full_phase(1)
    held, other = case.held, case.model[2].weight.detach().clone()
    for batch in batches[STOP:]:
        case.trainer.step(batch)
    assert all(torch.equal(a, b) for a, b in zip(case.held, held, strict=True))
    assert not torch.equal(case.model[2].weight, other)
    assert case.trainer.statistics()["num_left_alone"] == 2


def test_what_trains_again_begins_with_a_fresh_memory() -> None:
    case = Case.of(DEFAULT)
    batches = make_batches(100)
    for batch in batches[:40]:
        case.trainer.step(batch)
    lookahead: Any = case.trainer.run.optimizer_step.lookahead
    drift = [float(b.abs().max()) for b in lookahead._b]
    case.model[0].requires_grad_(False)
    for batch in batches[40:60]:
        case.trainer.step(batch)
    assert [float(b.abs().max()) for b in lookahead._b[:2]] == [0.0, 0.0]
    case.model[0].requires_grad_(True)
    for batch in batches[60:62]:
        case.trainer.step(batch)
    fresh = [float(b.abs().max()) for b in lookahead._b]
    assert all(new < old / 4 for new, old in zip(fresh[:2], drift, strict=False))
    assert fresh[2] > drift[2] / 4, "what trained all along keeps its memory"
    assert case.trainer.run.windows.basis.num_columns == 0
    assert case.trainer.statistics()["num_left_alone"] == 0


def test_the_lookahead_leaves_alone_what_it_may_not_move() -> None:
    """Those that come and go too often train now and then, and are moved by the optimizer alone."""
    for lookahead in (DriftLookahead(0.3, 0.25), DriftLookahead(0.0, 0.25, 0.0)):
        free, held, walked = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2)), torch.zeros(2)
        for _ in range(30):
            lookahead.before_step([free, held])
            with torch.no_grad():
                free += 0.1
                held += 0.1
                walked += 0.1
            lookahead.after_step([free, held], 0.1, pull=1.0, strength=1.0, movable=[True, False])
        assert torch.equal(held, walked)
        assert not torch.equal(free, walked)
        assert all(t.data_ptr() != held.data_ptr() for t in lookahead._theta_0)


def test_a_jump_is_zero_where_nothing_may_be_moved() -> None:
    parameters, _, trained = _mask()
    _looked(trained, parameters, 0, 2)
    deltas = [torch.ones(2)] * 3
    assert [float(d.sum()) for d in trained.masked(deltas)] == [2.0, 0.0, 2.0]
    assert [p is q for p, q in zip(trained.only(parameters), [parameters[0], parameters[2]], strict=True)] == [True] * 2
    _looked(trained, parameters, 0, 1, 2)
    assert trained.masked(deltas) is deltas
    assert trained.only(parameters) is parameters


def test_new_groups_are_left_to_the_optimizer_alone() -> None:
    """The run goes by the parameters it was built with: others are never moved by anything of its memory."""
    case = Case.of(DEFAULT)
    for batch in make_batches(30):
        case.trainer.step(batch)
    added = nn.Parameter(torch.zeros(3))
    case.trainer.run.schedule.scheduler = None
    case.optimizer.add_param_group({"params": [added], "lr": 0.0})
    for batch in make_batches(30):
        case.trainer.step(batch)
    assert torch.equal(added, torch.zeros(3))


# ---- the mask alone ---------------------------------------------------------------------------------


def _mask(rate: Any = 0.1) -> tuple[list[nn.Parameter], torch.optim.Optimizer, Trained]:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=rate)
    return parameters, optimizer, Trained(parameters, optimizer)


def _looked(trained: Trained, parameters: list[nn.Parameter], *used: int) -> list[int]:
    for i, p in enumerate(parameters):
        p.grad = torch.ones(2) if i in used else None
    return trained.look()


def test_one_that_was_never_trained_has_nothing_to_forget() -> None:
    parameters, _, trained = _mask()
    assert _looked(trained, parameters, 0, 1) == []
    assert trained.movable == [True, True, False]
    assert _looked(trained, parameters, 0, 1, 2) == []
    assert trained.movable == [True] * 3
    assert _looked(trained, parameters, 0, 1) == [2]


def test_one_that_comes_and_goes_is_left_alone_in_the_end() -> None:
    parameters, _, trained = _mask()
    forgotten = []
    for t in range(20):
        forgotten.append(_looked(trained, parameters, 0, 1, *([2] if t % 2 == 0 else [])))
    assert sum(map(len, forgotten)) == 2 * MAX_RETURNS + 1
    assert forgotten[-6:] == [[]] * 6
    assert trained.movable == [True, True, False]
    _looked(trained, parameters, 0, 1, 2)
    assert trained.movable == [True, True, False]


def test_a_rate_that_is_zero_for_all_is_a_pause() -> None:
    parameters, optimizer, trained = _mask()
    _looked(trained, parameters, 0, 1, 2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert _looked(trained, parameters, 0, 1, 2) == []
    assert trained.movable == [False] * 3
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    assert _looked(trained, parameters, 0, 1, 2) == []
    assert trained.movable == [True] * 3


def test_a_freeze_is_seen_before_the_step() -> None:
    parameters, _, trained = _mask()
    _looked(trained, parameters, 0, 1, 2)
    parameters[1].requires_grad_(False)
    assert trained.look_ahead() == [1]
    assert trained.movable == [True, False, True]
    again = Trained(parameters, torch.optim.SGD(parameters, lr=0.1))
    again.load_state_dict(trained.state_dict())
    assert again.movable == trained.movable
    assert again.state_dict() == trained.state_dict()


# ---- writes -----------------------------------------------------------------------------------------


def _in_place(p: Tensor) -> None:
    with torch.no_grad():
        p.mul_(0.5)


def _data_in_place(p: Tensor) -> None:
    p.data.mul_(0.5)


def _data_replaced(p: Tensor) -> None:
    p.data = p.detach() * 0.5


def _through_numpy(p: Tensor) -> None:
    p.detach().numpy()[...] *= 0.5


def _one_row(p: Tensor) -> None:
    with torch.no_grad():
        p[1:2] += 1


def _there_and_back(p: Tensor) -> None:
    before = p.detach().clone()
    with torch.no_grad():
        p.zero_()
        p.copy_(before)


WRITES: dict[str, tuple[Callable[[Tensor], None], set[Write]]] = {
    "in place": (_in_place, {Write.CHANGED}), ".data in place": (_data_in_place, {Write.CHANGED}),
    ".data replaced": (_data_replaced, {Write.CHANGED}), "numpy": (_through_numpy, {Write.CHANGED}),
    "one row": (_one_row, {Write.CHANGED, Write.TOUCHED}), "there and back": (_there_and_back, {Write.TOUCHED}),
    "read": (lambda p: None, {Write.NONE}),
}  # fmt: skip
SHAPES: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: torch.randn(300), "matrix": lambda: torch.randn(40, 30), "few": lambda: torch.randn(3),
    "transposed": lambda: torch.randn(30, 40).T, "strided": lambda: torch.randn(20, 3)[:, 1],
    "channels last": lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "half": lambda: torch.randn(40).bfloat16(), "nan": lambda: torch.full((5,), torch.nan),
    "complex": lambda: torch.randn(6, 2, dtype=torch.complex64),
}  # fmt: skip


@pytest.mark.parametrize("shape", sorted(SHAPES))
@pytest.mark.parametrize("how", sorted(WRITES))
def test_every_way_to_write_is_noticed(how: str, shape: str) -> None:
    write, expected = WRITES[how]
    if (how == "numpy" and shape == "half") or (shape == "nan" and how not in ("read", "there and back")):
        pytest.skip("numpy has no such numbers, or NaN stays NaN")
    parameters = [nn.Parameter(torch.randn(4)), nn.Parameter(SHAPES[shape]())]
    writes = Writes(parameters)
    assert writes.look() is Write.NONE
    writes.record()
    assert writes.look() is Write.NONE
    write(parameters[1])
    assert writes.look() in expected
    writes.record()
    assert writes.look() is Write.NONE


def test_all_written_and_the_same_is_a_swap() -> None:
    parameters = [nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(40, 40))]
    writes = Writes(parameters)
    writes.record()
    for p in parameters:
        _there_and_back(p)
    assert writes.look() is Write.SWAPPED
    with torch.no_grad():
        parameters[1][3, 3] += 1  # between the values that are compared
    writes.record()
    with torch.no_grad():
        parameters[1][3, 3] -= 1
    assert writes.look() is Write.TOUCHED


def test_values_alone_are_compared_now_and_then_where_that_waits() -> None:
    parameter = nn.Parameter(torch.randn(4))
    writes = Writes([parameter], every=3)
    writes.record()
    parameter.data.mul_(0.5)
    assert [writes.look() for _ in range(3)] == [Write.NONE, Write.NONE, Write.CHANGED]


# ---- a run that is written to -------------------------------------------------------------------------


def _reload(model: nn.Module, best: dict[str, Tensor]) -> None:
    model.load_state_dict(best)


def _data_copy(model: nn.Module, best: dict[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        p.data.copy_(best[name])


def _vector(model: nn.Module, best: dict[str, Tensor]) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(list(best.values())), model.parameters())


@pytest.mark.parametrize("settings", ["default", "lookahead without drift", "jumps on noise", "jumps on one batch"])
@pytest.mark.parametrize("how", [_reload, _data_copy, _vector])
def test_a_reload_is_not_undone(how: Callable[..., None], settings: str) -> None:
    """At a rate near zero the weights stay where they were put."""
    values, batches = SETTINGS[settings]()
    case = Case.of(values)
    best = {}
    for i, batch in enumerate(batches[:STOP]):
        case.trainer.step(batch)
        if i == 10:
            best = {k: v.clone() for k, v in case.model.state_dict().items()}
    how(case.model, best)
    distance = float((case.held[0] - best["0.weight"]).norm())
    assert distance == 0
    case.trainer.run.schedule.scheduler = None
    for group in case.optimizer.param_groups:
        group["lr"] = 1e-12
    run = case.trainer.run
    with pytest.warns(UserWarning, match="weights were changed between two steps") as said:
        case.trainer.step(batches[STOP])
    assert len(said) == 1
    assert run.judge.probation is None
    assert run.windows.basis.num_columns == 0
    assert run.proposer.segment is None
    for batch in batches[STOP : STOP + 5]:
        case.trainer.step(batch)
    assert float((case.held[0] - best["0.weight"]).abs().max()) < 1e-6
    assert case.trainer.statistics()["num_outside_writes"] == 1


def test_a_write_voids_a_probation() -> None:
    """There is no way back to weights from before it."""
    case = Case.of(config(correct_steps=5), predictor=Fake(-0.05))
    for batch in full_batch(60):
        case.trainer.step(batch)
        if case.trainer.run.judge.probation is not None:
            break
    assert case.trainer.run.judge.probation is not None
    with torch.no_grad():
        for p in case.model.parameters():
            p.add_(3.0)
    with pytest.warns(UserWarning, match="weights were changed"):
        case.trainer.fit(full_batch(8))
    assert case.trainer.statistics()["num_rollbacks"] == 0
    assert float(case.model[0].weight.detach().mean()) > 2.5


def test_weights_clipped_after_every_step_end_the_lookahead() -> None:
    case = Case.of(DEFAULT)

    def clip(_: Any) -> None:
        for p in case.model.parameters():
            p.data.clamp_(-0.1, 0.1)

    with pytest.warns(UserWarning, match="weights were changed") as said:
        case.trainer.fit(make_batches(40), progress_callback=clip)
    assert len(said) == 1
    counts = case.trainer.statistics()
    assert counts["num_outside_writes"] >= MAX_WRITES
    assert counts["lookahead_switched_off"]


def test_an_average_that_is_swapped_in_and_out_changes_nothing_that_was_learnt() -> None:
    case = Case.of(config(correct_steps=6), predictor=Fake(-0.05))
    num_trials = 0
    for i, batch in enumerate(full_batch(40)):
        case.trainer.step(batch)
        if i % 7 == 6:
            live = {k: v.clone() for k, v in case.model.state_dict().items()}
            case.model.load_state_dict({k: v * 0.9 for k, v in live.items()})
            case.model.load_state_dict(live)
            trial = case.trainer.run.judge.probation
            if trial is not None and trial.num_steps_left > 1 and num_trials == 0:
                case.trainer.step(batch)
                assert case.trainer.run.judge.probation is trial, "it goes on"
                num_trials += 1
    assert num_trials == 1
    assert case.trainer.statistics()["num_outside_writes"] == 0
    assert case.trainer.run.windows.basis.num_columns == 1


def test_a_checkpoint_and_a_rollback_are_no_writes_of_the_users(tmp_path: Any) -> None:
    case = Case.of(config(correct_steps=2))
    for batch in make_batches(30):
        case.trainer.step(batch)
    path = case.trainer.save_checkpoint(tmp_path)
    other = Case.of(config(correct_steps=2))
    other.trainer.load_checkpoint(path)
    for batch in make_batches(30):
        case.trainer.step(batch)
        other.trainer.step(batch)
    assert other.trainer.statistics()["num_outside_writes"] == 0
    assert all(torch.equal(a, b) for a, b in zip(case.held, other.held, strict=True))


# ---- modules that only the loss function uses ---------------------------------------------------------


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


GLOBAL = Critic()


class Losses:
    def __init__(self, critic: Critic) -> None:
        self.critics = {"real": [critic]}

    def of(self, model: nn.Module, batch: Any) -> Tensor:
        return self.critics["real"][0](batch).sum()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.of(model, batch)


def test_modules_are_found_where_a_function_keeps_them() -> None:
    critic, model = Critic(), setup().model

    def closed(m: nn.Module, b: Any, scale: float = 1.0) -> Tensor:
        return (lambda x: critic(x))(b).sum() * scale

    def default(m: nn.Module, b: Any, other: nn.Module = critic) -> Tensor:
        return other(b).sum()

    def named(m: nn.Module, b: Any) -> Tensor:
        return sum(GLOBAL(x).sum() for x in [b])

    losses = Losses(critic)
    for loss in (closed, default, losses, losses.of, lambda m, b: losses.of(m, b)):
        assert modules_beside(loss, model) == [critic]
    assert modules_beside(named, model) == [GLOBAL]
    assert modules_beside(lambda m, b: model(b).sum(), model) == []


def test_a_refused_proposal_leaves_no_trace_in_the_other_network() -> None:
    critic, built = Critic(), setup("mlp")
    fakes = Fake(1.0)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(critic(batch[0])), batch[1])

    trainer = built.trainer(config(), loss_fn=loss, predictor=fakes)
    refused = 0
    for batch in make_batches(40):
        before = critic.norm.running_mean.clone(), critic.norm.num_batches_tracked.clone()
        result = trainer.step(batch)
        if result.phase.value == "predict" and not result.was_predicted:
            refused += 1
            assert torch.equal(before[0], critic.norm.running_mean)
            assert torch.equal(before[1], critic.norm.num_batches_tracked)
    assert refused > 1
