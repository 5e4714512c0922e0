"""The log of blocks: what a person reads while a run goes on."""

from __future__ import annotations

import io

from cases import full_batch, loss_fn, setup
from hybrid_predict_trainer import HybridTrainer, HybridTrainerConfig, with_values
from hybrid_predict_trainer.config.presets import PRESETS
from hybrid_predict_trainer.tell.phase_log import PhaseLog


def logged(stream: io.StringIO, **settings: object) -> HybridTrainer:
    built = setup("mlp", "adam", "lambda")
    config = with_values(HybridTrainerConfig(), {**PRESETS["full_batch"], "training.warmup_steps": 10, **settings})
    trainer = HybridTrainer(built.model, built.optimizer, config, loss_fn=loss_fn, lr_scheduler=built.scheduler)
    log = PhaseLog(trainer, stream=stream, every=4)
    trainer.fit(full_batch(60), total_steps=40, progress_callback=log)
    log.close()
    return trainer


def test_every_phase_is_a_block_with_its_steps_and_its_end() -> None:
    stream = io.StringIO()
    trainer = logged(stream)
    text = stream.getvalue()
    assert text.startswith("\nStep 1: WARMUP\n--------------\nStep      1 | loss ")
    assert "  warmup complete | 10 steps | loss " in text
    assert text.count(": PREDICT") > 0
    counts = trainer.statistics()
    assert text.count("| stands for ") == counts["num_jumps_accepted"] > 0
    assert text.count("| refused: ") == counts["num_jumps_proposed"] - counts["num_jumps_accepted"]
    end = text.rstrip().splitlines()[-1]
    assert end.startswith(f"All {counts['num_steps']} steps: {counts['num_real_steps']} real, jumps accepted")
    shown = [
        int(line.split("|")[0].split()[1]) for line in text.splitlines() if line.startswith("Step ") and "|" in line
    ]
    assert shown == sorted(shown)
    assert shown[:3] == [1, 5, 9]


def test_a_closed_terminal_ends_no_run() -> None:
    stream = io.StringIO()
    stream.close()
    assert logged(stream).statistics()["num_real_steps"] > 0
