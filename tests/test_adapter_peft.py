"""LoRA models of PEFT: only what trains is predicted, held in snapshots and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cases import assert_same
from frameworks import Sequences, framework, gpt2, willing
from hybrid_predict_trainer import HybridTrainerConfig

transformers, peft = framework("transformers"), framework("peft")
framework("accelerate")

from hybrid_predict_trainer.adapters.hf import HybridCallback  # noqa: E402

transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # of PEFT 0.15 without a network
]


def train(out: Path, callback: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    )
    arguments = transformers.TrainingArguments(
        str(out), max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, **{"save_strategy": "no", **changes},
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sequences(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=changes.get("resume"))
    return trainer


def test_only_the_adapter_is_predicted_snapshotted_and_saved(tmp_path: Path) -> None:
    callback = HybridCallback(willing(), say=False)
    before = {n: p.detach().clone() for n, p in gpt2().named_parameters()}
    trainer = train(tmp_path, callback, save_strategy="steps", save_steps=10)
    engine = callback.engine
    assert engine is not None
    assert engine.statistics()["num_jumps_proposed"] > 0
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in n for n in names)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(p.numel() for p in engine.run.subject.parameters) == trained
    snapshot = engine.run.snapshot_into(None)
    assert sum(p.numel() for p in snapshot.parameters) == trained
    base = {n.replace("base_model.model.", "").replace(".base_layer", ""): p
            for n, p in trainer.model.named_parameters() if "lora_" not in n}  # fmt: skip
    assert_same({n: base[n].detach() for n in before if n in base}, {n: before[n] for n in before if n in base})
    assert len(base) >= len(before) - 1
    folder = tmp_path / "checkpoint-10" / "hybrid_predict_trainer"
    assert not list(folder.rglob("model_weights*"))


def test_off_is_the_plain_trainer(tmp_path: Path) -> None:
    class Nothing(transformers.TrainerCallback):  # type: ignore[misc]
        """Does nothing."""

    plain, ours = train(tmp_path, Nothing()), train(tmp_path, HybridCallback(HybridTrainerConfig(enabled=False)))
    assert_same(*({n: p.detach() for n, p in t.model.named_parameters()} for t in (ours, plain)))


@pytest.mark.parametrize("at", [10])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path, at: int) -> None:
    straight = train(tmp_path, HybridCallback(willing(), say=False), save_strategy="steps", save_steps=at)
    torch.manual_seed(0)
    model = peft.get_peft_model(
        gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    )
    resumed = transformers.Trainer(
        model=model, args=straight.args, train_dataset=Sequences(), callbacks=[HybridCallback(willing(), say=False)]
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert_same(*({n: p.detach() for n, p in t.model.named_parameters()} for t in (resumed, straight)))
