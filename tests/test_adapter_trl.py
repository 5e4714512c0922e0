"""TRL's trainers and PEFT's models with the callback, at tiny local models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cases import assert_same
from frameworks import framework, gpt2, weights_of, willing
from hybrid_predict_trainer import HybridTrainerConfig

transformers = framework("transformers")
trl = framework("trl", in_ci=False)
datasets = framework("datasets", in_ci=False)

from hybrid_predict_trainer.adapters.hf import HybridCallback  # noqa: E402

transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("default")
STEPS = 20


def tokenizer(folder: Path) -> Any:
    """Whole words, made here."""
    tokenizers = framework("tokenizers")
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(20)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def words(start: int, count: int) -> str:
    return " ".join(f"w{(start + i) % 20}" for i in range(count))


def sft(out: Path, callback: Any, **changes: Any) -> Any:
    rows = datasets.Dataset.from_dict({"text": [words(i, 4 + i % 6) for i in range(4 * 40)]})
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "report_to": [],
                "logging_steps": 5, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_length": 10,
                "output_dir": str(out), "seed": 1, "bf16": False, "dataloader_pin_memory": False,
                **changes}  # fmt: skip
    trainer = trl.SFTTrainer(
        model=gpt2(), args=trl.SFTConfig(**settings), train_dataset=rows, processing_class=tokenizer(out),
        callbacks=[] if callback is None else [callback],
    )  # fmt: skip
    trainer.train()
    return trainer


def dpo(out: Path, callback: Any) -> Any:
    rows = datasets.Dataset.from_dict({
        "prompt": [words(i, 3) for i in range(4 * 40)], "chosen": [" " + words(i + 3, 3) for i in range(4 * 40)],
        "rejected": [" " + words(i + 9, 3) for i in range(4 * 40)],
    })  # fmt: skip
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "report_to": [],
                "logging_steps": 5, "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_length": 10,
                "output_dir": str(out), "seed": 1, "bf16": False, "dataloader_pin_memory": False}  # fmt: skip
    trainer = trl.DPOTrainer(
        model=gpt2(), ref_model=gpt2(seed=3), args=trl.DPOConfig(**settings), train_dataset=rows,
        processing_class=tokenizer(out), callbacks=[] if callback is None else [callback],
    )  # fmt: skip
    trainer.train()
    return trainer


MAKERS = {"sft": sft, "dpo": dpo}


@pytest.mark.parametrize("kind", MAKERS)
def test_off_is_the_plain_trainer(tmp_path: Path, kind: str) -> None:
    plain = MAKERS[kind](tmp_path, None)
    ours = MAKERS[kind](tmp_path, HybridCallback(HybridTrainerConfig(enabled=False), say=False))
    assert_same(weights_of(ours.model), weights_of(plain.model))


@pytest.mark.parametrize("kind", MAKERS)
def test_proposals_are_judged_by_the_trainers_own_loss_and_leave_no_trace(tmp_path: Path, kind: str) -> None:
    callback = HybridCallback(willing(), say=False)
    trainer = MAKERS[kind](tmp_path, callback)
    assert callback.report is not None
    assert callback.report["num_jumps_proposed"] > 0
    # neither could not be evaluated, nor not be cut into pieces (of preference pairs: whole pairs)
    assert not any("evaluated" in reason or "cut" in reason for reason in callback.report["refused"])
    lines = [line for line in trainer.state.log_history if "num_tokens" in line]
    counted = lines[-1]["num_tokens"] / lines[-1]["step"]
    assert counted == pytest.approx(lines[0]["num_tokens"] / lines[0]["step"], rel=0.2)  # no token was counted twice
