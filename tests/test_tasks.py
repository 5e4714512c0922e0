"""Tasks: data that can be addressed by position, exact derivatives, schedules that end, errors that help."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import math
import os
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hybrid_predict_trainer.tasks import (
    TASKS,
    Task,
    TaskDefaults,
    TaskSettings,
    build_optimizer,
    build_scheduler,
    lr_factor,
    make_task,
    with_steps,
)
from hybrid_predict_trainer.tasks.base import count_parameters
from hybrid_predict_trainer.tasks.equations.mlp import TanhMLP, jet_channels
from hybrid_predict_trainer.tasks.equations.pinn import PinnTask
from hybrid_predict_trainer.tasks.equations.problems import PROBLEMS, burgers_solution
from hybrid_predict_trainer.tasks.images.data import crop_and_flip, mirror
from hybrid_predict_trainer.tasks.images.task import ImageTask
from hybrid_predict_trainer.tasks.language import finetune
from hybrid_predict_trainer.tasks.language.gpt import PRESETS, Gpt, GptTask
from hybrid_predict_trainer.tasks.language.text import load_corpus, split_by_hash, stream_texts

needs_data = pytest.mark.skipif(not os.environ.get("HPT_DATA_DIR"), reason="HPT_DATA_DIR is not set")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_images(folder: Path, num: int = 60, size: int = 8) -> Path:
    """An .npz like CIFAR-10's, with noise in it."""
    rng = np.random.default_rng(0)
    x = rng.integers(256, size=(num, size, size, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", x=x, y=np.arange(num) % 10)
    return folder / "images.npz"


@pytest.fixture(params=sorted(TASKS))
def settings(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[str, TaskSettings]:
    """Each task with settings that make it small."""
    name = request.param
    if name == "finetune":
        monkeypatch.setenv("HPT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
        monkeypatch.setattr(finetune, "PRETRAINING", finetune.Pretraining(steps=20, data_bytes=200_000))
        # LoRA: without it the seed does not decide the model.
        return name, TaskSettings(preset="stdlib-lora", data="manual", context=32, batch_size=4)
    if name == "bert":
        return name, TaskSettings(batch_size=400, context=8)
    if name in ("gpt", "gpt-modern"):
        return name, TaskSettings(preset="0.3M", context=32, batch_size=4)
    if name in ("digits", "digits-mlp"):
        pytest.importorskip("sklearn")
        return name, TaskSettings(batch_size=128)
    if name == "cifar":
        return name, TaskSettings(data=tiny_images(tmp_path), batch_size=8)
    return name, TaskSettings()


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a batch."""
    return [value] if isinstance(value, Tensor) else list(value)


def same(left: Any, right: Any) -> bool:
    """Whether two batches or state dicts are bitwise equal."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    return all(torch.equal(a, b) for a, b in zip(tensors(left), tensors(right), strict=True))


# --- every task


def test_batches_can_be_entered_anywhere(settings: tuple[str, TaskSettings]) -> None:
    task = make_task(*settings)
    # 12 batches pass the end of an epoch for all tasks that have epochs (11 steps at most).
    played = list(itertools.islice(task.batches(3), 16))
    for start in (0, 1, 7, 12):
        entered = list(itertools.islice(task.batches(3, start=start), 16 - start))
        assert all(same(a, b) for a, b in zip(entered, played[start:], strict=True))
    if task.deterministic:
        assert played[0] is played[1]
    else:
        assert not same(played[0], played[1])
        assert not same(played[0], next(task.batches(4)))


def test_two_fresh_tasks_agree_and_leave_the_global_random_state_alone(
    settings: tuple[str, TaskSettings],
) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    results = []
    for _ in range(2):
        task = make_task(*settings)
        model = task.build_model(5)
        loss = task.loss_fn(model, next(task.batches(5)))
        results.append((model.state_dict(), loss.item(), task.evaluate(model), task.describe()))
        torch.testing.assert_close(torch.get_rng_state(), torch_state, rtol=0, atol=0)
        torch.rand(3)  # the second time, the global state is another one
        torch_state = torch.get_rng_state()
    (first_model, *first), (second_model, *second) = results
    assert same(first_model, second_model)
    assert first == second
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert not same(task.build_model(6).state_dict(), first_model)


def test_evaluate_disturbs_nothing(settings: tuple[str, TaskSettings]) -> None:
    name, setting = settings
    task = make_task(name, replace(setting, preset="batchnorm") if name == "cifar" else setting)

    class Draw(nn.Module):
        """Moves the global random state in eval mode too."""

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(1)
            return x

    model = nn.Sequential(task.build_model(0), nn.Dropout(0.5), Draw())
    model.train()
    model[0].eval()  # a mixed state must come back as it was
    modes = [module.training for module in model.modules()]
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = task.evaluate(model)
    assert math.isfinite(first)
    assert task.evaluate(model) == first
    assert [module.training for module in model.modules()] == modes
    assert same(model.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    assert task.evaluate(model) == first, "dropout was on"


def test_a_few_steps_lower_the_loss(settings: tuple[str, TaskSettings]) -> None:
    task = make_task(*settings)
    slow = task.deterministic or task.name == "finetune"  # corrections of rank 8 begin at zero
    recipe = with_steps(task.defaults, 120 if slow else 25)
    if task.name == "finetune":  # the base of these tests is hardly trained, and wants smaller steps than a real one
        recipe = replace(recipe, lr=1e-2)
    model = task.build_model(0)
    optimizer = build_optimizer(model, recipe)
    scheduler = build_scheduler(optimizer, recipe.schedule, recipe.steps, recipe.warmup_steps, recipe.decay_frac)
    batch = next(task.batches(0))
    with torch.no_grad():
        before = task.loss_fn(model, batch).item()
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        task.loss_fn(model, batch).backward()
        if recipe.grad_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
        scheduler.step()
    assert task.loss_fn(model, batch).item() < 0.8 * before


def test_describe_is_json_and_counts_parameters(settings: tuple[str, TaskSettings]) -> None:
    task = make_task(*settings)
    described = json.loads(json.dumps(task.describe()))
    assert described["task"] == task.name == settings[0]
    assert described["num_parameters"] == sum(p.numel() for p in task.build_model(0).parameters())


def test_float64_reaches_parameters_batches_and_loss(settings: tuple[str, TaskSettings]) -> None:
    name, setting = settings
    task = make_task(name, replace(setting, dtype="float64"))
    model = task.build_model(0)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert task.loss_fn(model, next(task.batches(0))).dtype == torch.float64
    single = make_task(name, replace(setting, dtype="float32"))
    assert single.evaluate(single.build_model(0)) == pytest.approx(task.evaluate(model), rel=1e-3)


def test_oscillator_is_float64_unless_told() -> None:
    assert next(make_task("oscillator").build_model(0).parameters()).dtype == torch.float64
    assert next(make_task("pinn-poisson").build_model(0).parameters()).dtype == torch.float32


# --- bad input: one clear line


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("pinn-poison", {}, "unknown task 'pinn-poison'; did you mean 'pinn-poisson'?"),
        ("gpt", {"preset": "0.9m"}, "did you mean '0.9M'?"),
        ("digits", {"preset": "groupnrom"}, "did you mean 'groupnorm'?"),
        ("regression", {"context": 8}, "task 'regression' has no use for the setting 'context'"),
        ("pinn-burgers", {"autocast_bf16": True}, "no use for the setting 'autocast_bf16'"),
        ("digits", {"data": "x.npz"}, "brings its own data"),
        ("digits", {"batch_size": 10_000}, "fewer than batch_size = 10000"),
    ],
)
def test_settings_that_do_not_fit(name: str, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make_task(name, TaskSettings(**setting))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TaskSettings(batch_size=0)
    with pytest.raises(ValueError, match="unknown dtype 'float16'"):
        TaskSettings(dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be at least 0"):
        next(make_task("gpt", TaskSettings(preset="0.3M")).batches(-1))


def test_missing_files_and_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPT_DATA_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"no file or folder nowhere\.txt; pass a text file"):
        load_corpus("nowhere.txt")
    with pytest.raises(FileNotFoundError, match="data set 'tinystories' is looked for under HPT_DATA_DIR"):
        load_corpus("tinystories")
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 subset .* HPT_DATA_DIR, which is not set"):
        make_task("cifar")
    with pytest.raises(FileNotFoundError, match=r"gone\.npz is neither an \.npz file nor a folder"):
        make_task("cifar", TaskSettings(data="gone.npz"))


def test_empty_and_short_text(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        load_corpus(empty)
    with pytest.raises(ValueError, match=r"no text in .*: no file in it ends in \.txt"):
        load_corpus(tmp_path)
    short = tmp_path / "short.txt"
    short.write_bytes(b"x" * 2000)  # 1900 + 100 tokens
    GptTask(TaskSettings(data=short, context=99))
    with pytest.raises(ValueError, match=r"validation part of .*short\.txt has 100 tokens, fewer .* = 101"):
        GptTask(TaskSettings(data=short, context=100))
    binary = tmp_path / "arrays.npz"
    np.savez(binary, x=np.zeros(9))
    with pytest.raises(ValueError, match=r"arrays\.npz holds binary data"):
        load_corpus(binary)
    broken = tmp_path / "broken.txt.gz"
    broken.write_bytes(b"not gzip")
    with pytest.raises(ValueError, match=r"broken\.txt\.gz is not a readable gzip file"):
        load_corpus(broken)


def test_images_of_the_wrong_kind(tmp_path: Path) -> None:
    np.savez(tmp_path / "float.npz", x=np.zeros((4, 8, 8, 3)), y=np.zeros(4))
    np.savez(tmp_path / "named.npz", images=np.zeros(1))
    (tmp_path / "text.npz").write_text("no")
    for name, message in (
        ("float", "should hold x uint8"),
        ("named", "with arrays x"),
        ("text", "is no .npz"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task("cifar", TaskSettings(data=tmp_path / f"{name}.npz"))


@pytest.mark.parametrize(
    ("module", "extra", "name", "data"),
    [("sklearn.datasets", "experiments", "digits", None), ("datasets", "hf", "gpt", "hf:a/b")],
)
def test_a_missing_library_names_its_extra(
    module: str, extra: str, name: str, data: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "hybrid-predict-trainer\[{extra}\]"'):
        make_task(name, TaskSettings(data=data))


# --- text


def test_one_file_is_split_at_its_end(tmp_path: Path) -> None:
    text = bytes(range(1, 201))
    (tmp_path / "a.txt").write_bytes(text)
    with gzip.open(tmp_path / "b.gz", "wb") as file:
        file.write(text)
    for name in ("a.txt", "b.gz"):
        corpus = load_corpus(tmp_path / name)
        assert bytes(corpus.train.tolist()) == text[:190]
        assert bytes(corpus.valid.tolist()) == text[190:]
    assert load_corpus(tmp_path / "a.txt", max_bytes=40).source["num_train_tokens"] == 38


def test_a_folder_is_split_by_file(tmp_path: Path) -> None:
    documents = {f"{i}.txt": f"<{i}>" for i in range(60)}
    for name, text in documents.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "ignored.bin").write_text("<bin>")
    corpus = load_corpus(tmp_path)
    train, valid = (bytes(part.tolist()).decode().split() for part in (corpus.train, corpus.valid))
    assert set(train).isdisjoint(valid)
    assert sorted(train + valid) == sorted(documents.values())
    assert 1 <= len(valid) <= 10
    # Another file changes nobody's side.
    (tmp_path / "new.txt").write_text("<new>")
    again = bytes(load_corpus(tmp_path).valid.tolist()).decode().split()
    assert set(again) - {"<new>"} == set(valid)


def test_a_folder_with_names_for_its_parts(tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text(part)
    corpus = load_corpus(tmp_path)
    assert bytes(corpus.train.tolist()) == b"train"
    assert bytes(corpus.valid.tolist()) == b"valid"
    # Not so where other files would be left out.
    (tmp_path / "model.txt").write_text("model")
    corpus = load_corpus(tmp_path)
    assert len(corpus.train) + len(corpus.valid) == len("train" + "valid" + "test" + "model") + 2 * len("\n\n")


def test_split_by_hash_always_has_two_sides() -> None:
    for pair in itertools.combinations("abcdefghij", 2):
        train, valid = split_by_hash({name: Path(name) for name in pair})
        assert len(train) == len(valid) == 1
    # Pinned: a hash that differs between machines or versions would leak validation files into training.
    _, valid = split_by_hash({name: Path(name) for name in map(str, range(100))})
    assert sorted(path.name for path in valid) == ["0", "10", "33", "40", "44", "59", "70", "74", "9"]


def test_the_standard_library_is_read_without_its_tests() -> None:
    corpus = load_corpus(None)
    text = bytes(corpus.train.tolist())
    assert 5_000_000 < len(text) <= 8_010_000
    assert len(corpus.valid) > 50_000
    assert b"class TestCase(object):" in text or b"class TestCase(object):" in bytes(corpus.valid.tolist())
    assert load_corpus(None, max_bytes=100_000).source["num_train_tokens"] < 101_000


def test_windows_are_text_and_the_target_is_the_next_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 251)) * 8)
    task = GptTask(TaskSettings(data=tmp_path / "a.txt", context=16, batch_size=64))
    x, y = next(task.batches(0))  # type: ignore[misc]
    assert x.shape == y.shape == (64, 16)
    assert x.dtype == torch.int64
    assert torch.equal(y, x % 250 + 1)
    assert len(x[:, 0].unique()) > 40


def test_the_last_window_can_be_drawn_and_is_evaluated(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 99 + b"b" + b"c" * 4 + b"d")  # 100 + 5 tokens
    task = GptTask(TaskSettings(data=tmp_path / "a.txt", context=4, batch_size=256))
    _, y = next(task.batches(0))  # type: ignore[misc]
    assert (y == ord("b")).any(), "the last training byte is never a target"

    class Oracle(nn.Module):
        """Sure that the next byte is d, which only the last one is."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.one_hot(torch.full_like(x, ord("d")), 256) * 100.0

    assert task.evaluate(Oracle()) == pytest.approx(75.0)


def test_streams_are_read_through_the_loader_given(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"story {i}"} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = list(stream_texts(datasets.load_dataset, "json", data_files=str(tmp_path / "a.jsonl")))
    assert texts == [row["text"] for row in rows]


def fake_hub(rows: list[dict[str, str]], calls: list[tuple[Any, ...]]) -> types.ModuleType:
    """A `datasets` module whose only set is `rows`."""

    def load_dataset(name: str, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        calls.append((name, split, streaming))
        return iter(rows)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    return module


def test_hub_sets_are_streamed_and_split_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    rows = [{"text": f"<{i:03}>"} for i in range(1000)]
    monkeypatch.setitem(sys.modules, "datasets", fake_hub(rows, calls))
    corpus = load_corpus("hf:roneneldan/TinyStories", max_bytes=500)
    assert calls == [("roneneldan/TinyStories", "train", True)]
    assert bytes(corpus.valid.tolist()).decode().split() == [f"<{i:03}>" for i in range(19, 100, 20)]
    assert "<000>\n\n<001>" in bytes(corpus.train.tolist()).decode()
    assert corpus.source["num_train_documents"] == 95
    monkeypatch.setitem(sys.modules, "datasets", fake_hub(rows[:5], calls))
    with pytest.raises(ValueError, match=r"hf:a/b gave 5 documents .* at least 20 are needed"):
        load_corpus("hf:a/b")
    monkeypatch.setitem(sys.modules, "datasets", fake_hub([{"story": "x", "id": "1"}], calls))
    with pytest.raises(ValueError, match=r'a/b has no field "text", only story, id'):
        load_corpus("hf:a/b")


@needs_data
@pytest.mark.parametrize("name", ["tinystories", "wikitext-2", "novels", "tinyshakespeare"])
def test_named_sets(name: str) -> None:
    task = GptTask(TaskSettings(data=name, data_bytes=200_000, preset="0.3M"))
    source = task.describe()["data"]
    assert source["name"] == name
    assert source["num_train_tokens"] >= 190_000
    assert source["num_valid_tokens"] >= 10_000


# --- GPT


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_the_size_they_say(preset: str) -> None:
    num = count_parameters(lambda: Gpt(PRESETS[preset]))
    assert num == pytest.approx(float("124.4" if preset == "gpt2" else preset.removesuffix("M")) * 1e6, rel=0.08)


def test_gpt_sees_no_later_token() -> None:
    task = GptTask(TaskSettings(preset="0.3M", context=32, batch_size=2))
    model = task.build_model(0)
    x, _ = next(task.batches(0))  # type: ignore[misc]
    changed = x.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 256
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for on in (False, True):
        task = GptTask(TaskSettings(preset="0.3M", context=32, batch_size=2, gradient_checkpointing=on))
        model = task.build_model(0)
        assert model.gradient_checkpointing is on
        task.loss_fn(model, next(task.batches(0))).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert same(*gradients)


def test_autocast_runs_in_bfloat16_and_keeps_the_loss() -> None:
    losses, seen = [], []
    for on in (False, True):
        task = GptTask(TaskSettings(preset="0.3M", context=32, batch_size=4, autocast_bf16=on))
        model = task.build_model(0)
        model.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.dtype))
        loss = task.loss_fn(model, next(task.batches(0)))
        assert loss.dtype == torch.float32
        losses.append(loss.item())
    assert seen == [torch.float32, torch.bfloat16]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_gpt_starts_from_the_uniform_guess() -> None:
    task = GptTask(TaskSettings(preset="0.9M"))
    assert task.evaluate(task.build_model(0)) == pytest.approx(math.log(256), abs=0.2)


def test_compile_keeps_parameter_names(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    plain, fast = (GptTask(TaskSettings(preset="0.3M", compile=on)).build_model(0).state_dict() for on in (False, True))
    assert len(compiled) == 1
    assert same(plain, fast)


# --- derivatives and equations


@pytest.mark.parametrize("orders", [(2,), (1,), (2, 1), (1, 2), (2, 2, 0), (0, 0)])
def test_the_jet_is_what_autograd_finds(orders: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = TanhMLP((len(orders), 7, 6, 5), orders).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)  # biases too
    points = torch.randn(9, len(orders), dtype=torch.float64, requires_grad=True)
    z = points
    for layer in model.layers[:-1]:
        z = torch.tanh(layer(z))
    value = model.layers[-1](z)[:, 0]
    (gradient,) = torch.autograd.grad(value.sum(), points, create_graph=True)
    with torch.no_grad():
        jet = model(points.detach())
    assert jet.shape == (len(jet_channels(orders)), 9)
    for channel, (coordinate, order) in zip(jet, jet_channels(orders), strict=True):
        if order == 0:
            expected = value
        elif order == 1:
            expected = gradient[:, coordinate]
        else:
            (second,) = torch.autograd.grad(gradient[:, coordinate].sum(), points, retain_graph=True)
            expected = second[:, coordinate]
        torch.testing.assert_close(channel, expected.detach())


def finite_jet(name: str, points: Tensor, step: float = 1e-4) -> Tensor:
    """The jet of a problem's solution by central differences."""
    problem = PROBLEMS[name]
    solution = problem.solution
    channels = []
    for coordinate, order in jet_channels(problem.orders):
        shift = torch.zeros(points.shape[1], dtype=torch.float64)
        shift[coordinate] = step if order else 0
        ahead, here, behind = solution(points + shift), solution(points), solution(points - shift)
        channels.append({0: here, 1: (ahead - behind) / (2 * step), 2: (ahead - 2 * here + behind) / step**2}[order])
    known = [torch.full_like(channels[0], c) for c in problem.coefficients]
    return torch.stack([*channels, *known])


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_solution_solves_the_equation(name: str) -> None:
    problem = PROBLEMS[name]
    points = problem.valid_points[::7]
    if name == "pinn-burgers":
        # Away from the shock and from t = 0, where differences cannot follow the solution.
        points = points[(points[:, 0].abs() > 0.1) & (points[:, 1] > 0.01)]
    residual = problem.residual(points, finite_jet(name, points))
    assert len(residual) > 50
    assert residual.abs().max() < 2e-4
    wrong = problem.residual(points, 1.1 * finite_jet(name, points) + 0.1)
    assert wrong.abs().max() > 0.01


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_solution_fits_the_edge(name: str) -> None:
    problem = PROBLEMS[name]
    jet = finite_jet(name, problem.edge) if name != "pinn-burgers" else problem.solution(problem.edge)[None]
    assert problem.edge_residual(problem.edge, jet).abs().max() < 1e-5
    wrong = problem.edge_residual(problem.edge, jet + 1).abs()
    assert (wrong if wrong.shape[0] != 2 else wrong.amax(0)).min() > 0.04


def test_burgers_solution_is_the_published_one() -> None:
    # The slope at the origin, steepest at t = 0.5105: -152.00516 (Basdevant et al. 1986, table 4).
    step = 1e-6
    points = torch.tensor([[-step, 1.6037 / math.pi], [step, 1.6037 / math.pi]], dtype=torch.float64)
    low, high = burgers_solution(points, nu=0.01 / math.pi)
    assert ((high - low) / (2 * step)).item() == pytest.approx(-152.00516, abs=0.01)


@pytest.mark.parametrize("name", PROBLEMS)
def test_validation_points_are_not_trained_on(name: str) -> None:
    problem = PROBLEMS[name]
    train, valid = problem.train_points(problem.num_points), problem.valid_points
    assert len(valid) > len(train) == problem.num_points
    assert torch.cdist(train, valid).min() > 1e-6
    for points in (train, valid):
        # All over the domain and nowhere else: the first coordinate is x, or t for the oscillator.
        low = 0.0 if name in ("oscillator", "pinn-klein-gordon", "pinn-inverse") else -1.0
        second = -1.0 if name == "pinn-allen-cahn" else 0.0
        assert points.min(0).values.tolist() == pytest.approx([low, second][: points.shape[1]], abs=0.02)
        assert points.max(0).values.tolist() == pytest.approx([1.0] * points.shape[1], abs=0.02)
        assert points[:, 0].min() >= low
        assert points.max() <= 1


def test_regression_is_validated_on_other_points() -> None:
    task = make_task("regression")
    points, values = next(task.batches(0))  # type: ignore[misc]
    seen: list[Tensor] = []

    class Spy(nn.Module):
        """Keeps what it is asked."""

        def forward(self, asked: Tensor) -> Tensor:
            seen.append(asked)
            return torch.zeros(1, len(asked))

    loss = task.evaluate(Spy())
    assert torch.cdist(points, seen[0]).min() > 0
    assert loss == pytest.approx(values.square().mean().item(), rel=0.2)


def test_no_symmetry_leaves_a_gradient_to_rounding() -> None:
    task = make_task("pinn-poisson")
    model = task.build_model(0)
    task.loss_fn(model, next(task.batches(0))).backward()
    largest = [p.grad.abs().max().item() for p in model.parameters() if p.grad is not None]
    assert min(largest[:-1]) > 1e-2, "the output bias alone is fixed by the edge, which is small at first"


def test_solution_error_is_relative_to_the_solution() -> None:
    task = PinnTask("pinn-poisson", TaskSettings(dtype="float64"))

    class Scaled(nn.Module):
        """1.25 times the solution."""

        def forward(self, points: Tensor) -> Tensor:
            return 1.25 * PROBLEMS["pinn-poisson"].solution(points)[None]

    assert task.solution_error(Scaled()) == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["pinn-poisson", "pinn-inverse", "regression"])
def test_new_points_are_drawn_afresh_and_lie_in_the_region(name: str) -> None:
    task = make_task(name, TaskSettings(batch_size=20))
    drawn = [points[0] if isinstance(points, tuple) else points
             for points in itertools.islice(task.new_batches(3, every=2), 6)]  # type: ignore[attr-defined]  # fmt: skip
    assert [torch.equal(a, b) for a, b in itertools.pairwise(drawn)] == [True, False, True, False, True]
    assert all(p.shape == drawn[0].shape and p.dtype == drawn[0].dtype for p in drawn)
    low = 0.0 if name == "pinn-inverse" else -1.0
    assert all(p.min() >= low and p.max() <= 1 for p in drawn)
    again = next(task.new_batches(3))  # type: ignore[attr-defined]
    assert torch.equal(again[0] if isinstance(again, tuple) else again, drawn[0])


# --- images


def test_an_epoch_shows_every_image_once() -> None:
    pytest.importorskip("sklearn")
    task = ImageTask("digits", TaskSettings(batch_size=107))  # 1498 = 14 * 107
    assert task.steps_per_epoch == 14
    epochs = [
        torch.cat([x.flatten(1) for x, _ in itertools.islice(task.batches(1, start=start), 14)])  # type: ignore[misc]
        for start in (0, 14)
    ]
    assert len(epochs[0]) == 1498
    assert len(epochs[0].unique(dim=0)) == 1498
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0].unique(dim=0), epochs[1].unique(dim=0))


def test_inputs_are_normalised_by_the_training_images(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    task = ImageTask("digits", TaskSettings(batch_size=1498))
    x, _ = next(task.batches(0))  # type: ignore[misc]
    assert x.mean().item() == pytest.approx(0, abs=1e-4)
    assert x.std().item() == pytest.approx(1, abs=1e-3)


def test_crop_and_flip_against_the_slow_obvious_version() -> None:
    images = torch.arange(6 * 5 * 5 * 2).reshape(6, 5, 5, 2)
    done = crop_and_flip(images, 2, np.random.default_rng(1))
    rng = np.random.default_rng(1)
    shift, flip = rng.integers(-2, 3, size=(6, 2)), rng.integers(2, size=(6, 1))
    assert 0 < flip.sum() < 6
    padded = nn.functional.pad(images.permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="reflect")
    for image, expected, (down, right), flipped in zip(done, padded, shift, flip[:, 0], strict=True):
        crop = expected[:, 2 + down : 7 + down, 2 + right : 7 + right]
        crop = crop.flip(2) if flipped else crop
        assert torch.equal(image.permute(2, 0, 1).float(), crop)
    assert mirror(torch.arange(-2, 7), 5).tolist() == [2, 1, 0, 1, 2, 3, 4, 3, 2]


def test_images_of_one_file_and_of_a_folder(tmp_path: Path) -> None:
    file = tiny_images(tmp_path)
    described = ImageTask("cifar", TaskSettings(data=file, batch_size=8)).describe()
    assert (described["num_train_images"], described["num_valid_images"]) == (50, 10)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a_train.npz").write_bytes(file.read_bytes())
    (folder / "a_test.npz").write_bytes(file.read_bytes())
    described = ImageTask("cifar", TaskSettings(data=folder, batch_size=8)).describe()
    assert (described["num_train_images"], described["num_valid_images"]) == (60, 60)


def test_only_training_images_are_augmented(tmp_path: Path) -> None:
    task = ImageTask("cifar", TaskSettings(data=tiny_images(tmp_path), batch_size=8))

    class Sum(nn.Module):
        """Logits that see where a pixel is."""

        def forward(self, images: Tensor) -> Tensor:
            weights = torch.arange(images[0].numel() * 10, dtype=images.dtype).reshape(-1, 10).sin()
            return images.flatten(1) @ weights

    assert task.evaluate(Sum()) == task.evaluate(Sum())
    assert 0 <= task.accuracy(Sum()) <= 1


def test_augmentation_differs_between_steps_and_seeds(tmp_path: Path) -> None:
    one = np.random.default_rng(0).integers(256, size=(1, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "same.npz", x=np.repeat(one, 60, axis=0), y=np.zeros(60, dtype=np.int64))
    task = ImageTask("cifar", TaskSettings(data=tmp_path / "same.npz", batch_size=10))
    first, second = itertools.islice(task.batches(0), 2)
    assert not same(first, second)
    assert not same(first, next(task.batches(1)))


@needs_data
def test_cifar_subset() -> None:
    task = make_task("cifar")
    described = task.describe()
    assert (described["num_train_images"], described["num_valid_images"]) == (10_000, 2_000)
    assert task.steps_per_epoch == 78
    x, y = next(task.batches(0))  # type: ignore[misc]
    assert x.shape == (128, 3, 32, 32)
    assert y.max() == 9


# --- optimizers and schedules

RECIPE = TaskDefaults(lr=0.1, steps=100, weight_decay=0.5)


def test_decay_spares_norms_biases_and_embeddings() -> None:
    model = Gpt(replace(PRESETS["0.3M"], tied=True))
    optimizer = build_optimizer(model, RECIPE)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 2)[-2] for p in decayed["params"]} == {
        "q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert "embed_tokens.weight" in {names[id(p)] for p in plain["params"]}
    assert len(names) == sum(len(group["params"]) for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
def test_each_optimizer_resumes_bitwise(name: str, tmp_path: Path) -> None:
    task = make_task("gpt", TaskSettings(preset="0.3M", context=16, batch_size=2))
    recipe = replace(task.defaults, optimizer=name, steps=6)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, start: int, stop: int) -> None:
        for batch in itertools.islice(task.batches(0, start=start), stop - start):
            optimizer.zero_grad()
            task.loss_fn(model, batch).backward()
            optimizer.step()
            scheduler.step()

    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = task.build_model(seed)
        optimizer = build_optimizer(model, recipe)
        return model, optimizer, build_scheduler(optimizer, "cosine", 6, 2)

    whole, first, second = fresh(0), fresh(0), fresh(1)
    before = copy.deepcopy(whole[0].state_dict())
    train(*whole, 0, 6)
    assert all(not torch.equal(p, before[key]) for key, p in whole[0].state_dict().items())
    train(*first, 0, 3)
    torch.save([part.state_dict() for part in first], tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    train(*second, 3, 6)
    assert same(whole[0].state_dict(), second[0].state_dict())


def test_muon_takes_hidden_matrices_only_and_steps_like_its_parts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    alone = copy.deepcopy(model)
    optimizer = build_optimizer(model, replace(RECIPE, optimizer="muon", weight_decay=0.0))
    muon = torch.optim.Muon(
        [alone[0].weight, alone[1].weight],
        lr=0.1,
        momentum=0.9,
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = [alone[2].weight, *(layer.bias for layer in alone)]
    adamw = torch.optim.AdamW(rest, lr=0.1, weight_decay=0.0)
    x = torch.randn(8, 3)
    for _ in range(3):
        for net, optimizers in ((model, [optimizer]), (alone, [muon, adamw])):
            net.zero_grad()
            net(x).square().mean().backward()
            for each in optimizers:
                each.step()
    assert same(model.state_dict(), alone.state_dict())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # steps 0, 4, 9 of a warm-up of 10; then 10, 55, 75, 88, 99, 100, 150 of 100
        ("constant", [0.1, 0.5, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.1, 0.5, 1, 1, 0.5, 25 / 90, 12 / 90, 1 / 90, 0, 0]),
        ("wsd", [0.1, 0.5, 1, 1, 1, 1, 12 / 25, 1 / 25, 0, 0]),
        ("cosine", [0.1, 0.5, 1, 1, 0.5, 0.5 - 0.5 * math.cos(math.pi * 25 / 90), None, None, 0, 0]),
    ],
)
def test_schedules_have_their_values_and_never_rise_again(schedule: Any, expected: list[float | None]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = build_scheduler(optimizer, schedule, 100, warmup_steps=10, decay_frac=0.25)
    rates = []
    for _ in range(201):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    for step, value in zip((0, 4, 9, 10, 55, 75, 88, 99, 100, 150), expected, strict=True):
        if value is not None:
            assert rates[step] == pytest.approx(2 * value, abs=1e-12), step
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_scheduler_state_holds_the_position_only() -> None:
    def scheduled(total: int) -> Any:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = build_scheduler(optimizer, "linear", total)
        optimizer.step()
        return scheduler

    short, longer = scheduled(100), scheduled(200)
    for _ in range(50):
        short.step()
    longer.load_state_dict(json.loads(json.dumps(short.state_dict())))
    longer.step()
    assert longer.get_last_lr() == [pytest.approx(1 - 51 / 200)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lineer", 10), "unknown schedule 'lineer'; did you mean 'linear'?"),
        (("linear", 0), "total_steps must be at least 1, got 0"),
        (("linear", 10, 11), r"warmup_steps must be in \[0, total_steps = 10\], got 11"),
        (("wsd", 10, 0, 1.5), r"decay_frac must be in \[0, 1\], got 1.5"),
    ],
)
def test_bad_schedules(arguments: tuple[Any, ...], message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build_scheduler(optimizer, *arguments)


def test_bad_optimizers() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"unknown optimizer 'adamv'; did you mean 'adam"):
        build_optimizer(model, replace(RECIPE, optimizer="adamv"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"muon needs at least one hidden nn\.Linear"):
        build_optimizer(model, replace(RECIPE, optimizer="muon"))


def test_with_steps_shortens_the_warm_up() -> None:
    recipe = replace(RECIPE, warmup_steps=50)
    assert with_steps(recipe, 1000).warmup_steps == 50
    assert with_steps(recipe, 100).warmup_steps == 10
    assert with_steps(recipe, 3).warmup_steps == 0
    assert lr_factor(0, schedule="linear", total_steps=1, warmup_steps=0, decay_frac=0.25) == 1.0


def test_every_task_has_a_recipe_that_can_be_built(settings: tuple[str, TaskSettings]) -> None:
    task: Task = make_task(*settings)
    recipe = task.defaults
    assert recipe.lr in recipe.lr_grid
    optimizer = build_optimizer(task.build_model(0), recipe, fused=True)
    build_scheduler(optimizer, recipe.schedule, recipe.steps, recipe.warmup_steps, recipe.decay_frac)
    assert optimizer.param_groups[0]["fused"] is True
