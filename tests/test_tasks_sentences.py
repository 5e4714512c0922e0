"""Sentence classification: files in GLUE's formats, word pieces, BERT."""

from __future__ import annotations

import itertools
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hybrid_predict_trainer.tasks import TaskSettings, build_optimizer
from hybrid_predict_trainer.tasks.base import count_parameters
from hybrid_predict_trainer.tasks.sentences import bert
from hybrid_predict_trainer.tasks.sentences.bert import PRESETS, Bert, BertTask, read_weights
from hybrid_predict_trainer.tasks.sentences.data import code_or_prose, load_code_or_prose, load_sentences
from hybrid_predict_trainer.tasks.sentences.wordpieces import (
    CLS,
    FIRST_WORD,
    SEP,
    UNKNOWN,
    HashedWords,
    WordPieces,
    basic_words,
    encode_examples,
    read_vocabulary,
    truncate,
)

SST2 = "sentence\tlabel\n" + "".join(f'a "fine film {i}\t{i % 2}\n' for i in range(40))
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "".join(
    f"{i % 2}\t{i}\t{i}\tHe said {i} .\tShe said {i} .\n" for i in range(40)
)


# --- files


def test_sst2_and_mrpc_as_glue_ships_them(tmp_path: Path) -> None:
    sst2, mrpc = tmp_path / "SST-2", tmp_path / "MRPC"
    for folder in (sst2, mrpc):
        folder.mkdir()
    (sst2 / "train.tsv").write_text(SST2)
    (sst2 / "dev.tsv").write_text("sentence\tlabel\nbad\t0\n")
    (sst2 / "test.tsv").write_text("index\tsentence\n0\tunlabelled\n")
    (mrpc / "msr_paraphrase_train.txt").write_text(MRPC)
    (mrpc / "msr_paraphrase_test.txt").write_text(MRPC)
    found = load_sentences(sst2)
    # A quotation mark that is never closed swallows nothing.
    assert (len(found.train), found.train[1], found.valid) == (40, ('a "fine film 1', "", "1"), [("bad", "", "0")])
    assert found.labels == ("0", "1")
    assert load_sentences(mrpc).train[3] == ("He said 3 .", "She said 3 .", "1")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"sentence": "a", "label": 1, "idx": 0}, ("a", "", "1")),
        ({"sentence1": "a", "sentence2": "b", "label": "entailment"}, ("a", "b", "entailment")),
        ({"question1": "a", "question2": "b", "is_duplicate": "0"}, ("a", "b", "0")),
        ({"question": "a", "sentence": "b", "label": "x"}, ("a", "b", "x")),
        ({"premise": "a", "hypothesis": "b", "label": 2}, ("a", "b", "2")),
        ({"text": "a", "label": 0}, ("a", "", "0")),
    ],
)
def test_columns(row: dict[str, Any], expected: tuple[str, str, str], tmp_path: Path) -> None:
    other = {**row, next(k for k in ("label", "is_duplicate") if k in row): "other"}
    lines = [row, other] * 20 + [{**row, "label": -1, "is_duplicate": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = load_sentences(tmp_path / "a.jsonl")
    assert found.train[0] == expected
    assert (len(found.train), len(found.valid)) == (38, 2), "every twentieth is held out, the unlabelled left out"
    assert len(found.labels) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "sentence\tlabel\nx\n", "line 2: has 1 columns, the heading 2"),
        ("a.tsv", "words\tclass\nx\ty\n", "has the columns words, class; known are: #1 String"),
        ("a.tsv", "sentence\tlabel\n", "has no examples"),
        ("a.tsv", "sentence\tlabel\n" + "x\t1\n" * 30, r"labels \['1'\]; at least two"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\t0\n", "has 2 examples, at least 20"),
        ("a.tsv", "sentence\tlabel\n" + "x\t1\n" * 18 + "x\t0\nx\t7\n", "has the label '7', the training part"),
        ("a.jsonl", "{}\n{", r"a\.jsonl has the columns "),
        ("a.jsonl", '{"text": "x", "label": 1}\n{', "line 2: is not JSON"),
        ("a.jsonl", '{"text": "x", "label": 1}\n[1]', "line 2: should be an object"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "x"}', "example 2 has no 'label'"),
    ],
)
def test_files_that_do_not_fit(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_sentences(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text(SST2)
    with pytest.raises(FileNotFoundError, match=r"one called dev, valid or test .* it has train\.tsv"):
        load_sentences(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*gone\.tsv"):
        load_sentences(tmp_path / "gone.tsv")


def test_hub_sets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(*names: str, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        calls.append((*names, split, streaming))
        return iter([{"sentence": f"s{i}", "label": i % 2, "idx": i} for i in range(60)])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    found = load_sentences("hf:nyu-mll/glue/sst2")
    load_sentences("hf:owner/name")
    assert calls == [("nyu-mll/glue", "sst2", "train", True), ("owner/name", "train", True)]
    assert [example[0] for example in found.valid] == ["s19", "s39", "s59"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"hybrid-predict-trainer\[hf\]"):
        load_sentences("hf:a/b")


def test_code_and_prose_are_told_apart() -> None:
    source = b'''"""A module about nothing much."""
import os, sys, re
# a comment of five words
def double(x: int) -> int:
    """Return twice the number given."""
    y = x + x
    return y
text = """a string that
is neither kind of line"""
'''
    found = code_or_prose(source)
    code, prose = ([line for line, _, label in found if label == kind] for kind in ("code", "prose"))
    assert prose == ["A module about nothing much.", "Return twice the number given.", "a comment of five words"]
    assert code == ["import os, sys, re", "def double(x: int) -> int:", "y = x + x"]
    assert code_or_prose(b"def broken(:") == []
    assert code_or_prose("caf\u00e9 = 'x'  # \u00e9".encode("latin-1")) == []


def test_the_embedded_set_is_balanced_and_split_by_file() -> None:
    found = load_code_or_prose()
    for part in (found.train, found.valid):
        kinds = [label for _, _, label in part]
        assert kinds.count("code") == kinds.count("prose") > 100
    shared = set(found.train) & set(found.valid)
    assert len(shared) < 0.1 * len(found.valid), "the same line stands in many files: no more than that"


# --- words


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("H\u00e9llo, WORLD's $5!", ["hello", ",", "world", "'", "s", "$", "5", "!"]),
        (" \t\n", []),
        ("a_b^c \u201cq\u201d", ["a", "_", "b", "^", "c", "\u201c", "q", "\u201d"]),
    ],
)
def test_basic_words(sentence: str, expected: list[str]) -> None:
    assert basic_words(sentence) == expected


def vocab_lines() -> list[str]:
    lines = [f"[unused{i}]" for i in range(103)]
    lines[0], lines[UNKNOWN], lines[CLS], lines[SEP] = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
    return [*lines, "un", "##aff", "##able", "able", "unaff", "."]


def test_word_pieces_are_the_longest_known(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(vocab_lines()))
    pieces = read_vocabulary(tmp_path / "vocab.txt")
    names = vocab_lines()
    # "unaff" beats "un"; the paper's own example would be un ##aff ##able.
    assert [names[t] for t in pieces.encode("Unaffable able.")] == ["unaff", "##able", "able", "."]
    assert [names[t] for t in pieces.encode("unable affable " + "un" * 51)] == ["un", "##able", "[UNK]", "[UNK]"]
    with pytest.raises(ValueError, match=r"\[CLS\] at None, bert-base-uncased at 101"):
        WordPieces({"[PAD]": 0, "[UNK]": 100})


def test_hashed_words_stay_in_the_vocabulary_and_between_processes() -> None:
    tokens = HashedWords(1000).encode("the cat and the dog, 'tis true")
    assert tokens[0] == tokens[3]
    assert all(FIRST_WORD <= token < 1000 for token in tokens)
    assert tokens[:2] == [463, 248]  # pinned: CRC-32 is the same everywhere


@pytest.mark.parametrize(
    ("lengths", "room", "expected"),
    [((3, 3), 6, (3, 3)), ((3, 3), 5, (3, 2)), ((9, 2), 6, (4, 2)), ((2, 9), 6, (2, 4)), ((5, 0), 3, (3, 0))],
)
def test_the_longer_sentence_is_cut(lengths: tuple[int, int], room: int, expected: tuple[int, int]) -> None:
    first, second = truncate(list(range(lengths[0])), list(range(lengths[1])), room)
    assert (len(first), len(second)) == expected
    assert first == list(range(len(first)))


def test_examples_are_laid_out_as_bert_reads_them() -> None:
    words = HashedWords(1000)
    a, b, c = words.encode("a b c")
    encoded = encode_examples([("a b", "c", "x"), ("c", "", "y"), ("a a a a a a a a", "b", "z")], words, 8)
    assert encoded[0].tolist() == [[CLS, a, b, SEP, c, SEP, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]
    assert encoded[1].tolist() == [[CLS, c, SEP, 0, 0, 0, 0, 0], [0] * 8]
    assert encoded[2].tolist() == [[CLS, a, a, a, a, SEP, b, SEP], [0, 0, 0, 0, 0, 0, 1, 1]]


# --- BERT


def test_bert_base_is_the_published_size() -> None:
    assert count_parameters(lambda: Bert(PRESETS["bert-base"], 2)) == 109_482_240 + 2 * 769


def test_a_layer_is_pytorchs_own() -> None:
    config = replace(PRESETS["bert-tiny"], dropout=0.1)
    layer = bert.BertLayer(config).eval()
    theirs = nn.TransformerEncoderLayer(64, 2, 256, 0.1, "gelu", 1e-12, batch_first=True).eval()
    state = layer.state_dict()
    qkv = [f"attention.self.{name}" for name in ("query", "key", "value")]
    names = {
        "self_attn.out_proj": "attention.output.dense", "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense", "linear2": "output.dense", "norm2": "output.LayerNorm",
    }  # fmt: skip
    copied = {f"{a}.{part}": state[f"{b}.{part}"] for a, b in names.items() for part in ("weight", "bias")}
    for part in ("weight", "bias"):
        copied[f"self_attn.in_proj_{part}"] = torch.cat([state[f"{name}.{part}"] for name in qkv])
    theirs.load_state_dict(copied)
    x = torch.randn(3, 5, 64)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]).bool()
    ours = layer(x, ~padding[:, None, None, :])
    expected = theirs(x, src_key_padding_mask=padding)
    torch.testing.assert_close(ours[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def test_padding_segments_and_order() -> None:
    model = Bert(PRESETS["bert-tiny"], 3).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    tokens = torch.tensor([[CLS, 200, 300, SEP]])
    short = torch.stack([tokens, torch.zeros_like(tokens)], 1)
    logits = model(short)
    assert logits.shape == (1, 3)
    torch.testing.assert_close(model(nn.functional.pad(short, (0, 5))), logits, rtol=1e-5, atol=1e-5)
    for changed in (short + torch.tensor([[0], [1]]), short[:, :, [0, 2, 1, 3]]):
        assert (model(changed) - logits).abs().max() > 1e-3


def published(model: nn.Module, *, prefix: str) -> dict[str, Tensor]:
    """The encoder as the files have it: old names of norms, and what belongs to pretraining."""
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("classifier.")}
    renamed = {
        prefix + k.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in state.items()
    }  # fmt: skip
    return {**renamed, "cls.predictions.bias": torch.zeros(7)}


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_published_weights_load(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(PRESETS["bert-tiny"], vocab_size=len(vocab_lines()), pretrained=True)
    monkeypatch.setitem(PRESETS, "bert-base-pretrained", config)
    monkeypatch.setenv("HPT_DATA_DIR", str(tmp_path))
    (tmp_path / "a.tsv").write_text(SST2)
    settings = TaskSettings(preset="bert-base-pretrained", data=tmp_path / "a.tsv", batch_size=8)
    folder = tmp_path / bert.MODEL_FOLDER
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"a vocab\.txt of 109 word pieces is not in HPT_DATA_DIR"):
        BertTask(settings)
    (folder / "vocab.txt").write_text("\n".join(vocab_lines()))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is not there"):
        BertTask(settings)
    source = Bert(config, 5)
    save_file(published(source, prefix=prefix), folder / "model.safetensors")
    task = BertTask(settings)
    models = [task.build_model(seed) for seed in (0, 1)]
    for name, weight in source.state_dict().items():
        if not name.startswith("classifier."):
            assert all(torch.equal(model.state_dict()[name], weight) for model in models), name
    assert models[0].classifier.weight.shape == (2, 64)
    assert not torch.equal(*(model.classifier.weight for model in models))
    described = task.describe()
    assert described["pretrained"] is True
    assert described["data"]["tokens"] == "word pieces"


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = Bert(PRESETS["bert-tiny"], 2)
    state = published(model, prefix="bert.")
    del state["bert.pooler.dense.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"should hold bert\.pooler\.dense\.bias of shape \(64,\), it has nothing"):
        read_weights(tmp_path / "model.safetensors", model)
    (tmp_path / "model.safetensors").write_text("no")
    with pytest.raises(ValueError, match=r"is no \.safetensors file"):
        read_weights(tmp_path / "model.safetensors", model)


def test_an_epoch_shows_every_example_once(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(SST2)
    task = BertTask(TaskSettings(data=tmp_path / "a.tsv", batch_size=19))  # 38 = 2 * 19
    assert task.steps_per_epoch == 2
    for start in (0, 2):
        seen = torch.cat([x.flatten(1) for x, _ in itertools.islice(task.batches(0, start=start), 2)])  # type: ignore[misc]
        assert len(seen.unique(dim=0)) == 38
    with pytest.raises(ValueError, match="38 training examples, fewer than batch_size = 39"):
        BertTask(TaskSettings(data=tmp_path / "a.tsv", batch_size=39))
    with pytest.raises(ValueError, match=r"context must be in \[4, 128\]"):
        BertTask(TaskSettings(data=tmp_path / "a.tsv", context=129))


def test_bert_learns_what_it_is_shown() -> None:
    task = BertTask(TaskSettings(context=16))
    model = task.build_model(0)
    optimizer = build_optimizer(model, replace(task.defaults, lr=3e-3))
    assert task.accuracy(model) == pytest.approx(0.5, abs=0.1)
    for batch in itertools.islice(task.batches(0), 40):
        optimizer.zero_grad()
        task.loss_fn(model, batch).backward()
        optimizer.step()
    assert task.accuracy(model) > 0.85
