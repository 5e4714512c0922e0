"""The table of ``hpt bench scale``: what it computes from what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hybrid_predict_trainer.experiments.bench.scale import RANKS, SIZES, Coefficients, estimate, format_text, markdown
from hybrid_predict_trainer.safe_files import write_between

FOUND = Coefficients(
    num_weights=1000, exchange_s={2: 1e-4, 4: 3e-4}, step_blocks=2, step_bytes=640, proposal_blocks=10,
    proposal_bytes=4000, step_passes=1, proposal_passes=20, proposal_forwards=2.5, pass_s=1e-9, copies=6.0,
    num_proposals=5,
)  # fmt: skip


def test_what_grows_with_weights_and_ranks() -> None:
    found = estimate(FOUND, 7e10, 1024)
    assert found["gradient_bytes"] == pytest.approx(2 * 4 * 7e10 * 1023 / 1024)
    assert found["step_bytes"] == 640
    assert found["step_exchange_s"] == pytest.approx(2 * 10 * 1e-4)  # log2(1024) times that of two
    assert found["proposal_exchange_s"] == pytest.approx(10 * 10 * 1e-4)
    assert found["proposal_passes_s"] == pytest.approx(20 * 1e-9 * 7e10)
    assert found["held_bytes"] == pytest.approx(6 * 4 * 7e10)
    assert estimate(FOUND, 1e7, 1024)["proposal_bytes"] == found["proposal_bytes"], "it does not grow with weights"


def test_parts_of_weights_are_gathered_for_every_forward() -> None:
    parts = replace(FOUND, sharded=True, proposal_calls=5.0)
    found = estimate(parts, 7e10, 1024)
    assert found["gradient_bytes"] == pytest.approx(3 * 4 * 7e10 * 1023 / 1024)
    assert found["proposal_bytes"] == pytest.approx(4000 + 5 * 4 * 7e10 * 1023 / 1024)
    assert found["held_bytes"] == pytest.approx(6 * 4 * 7e10 / 1024)
    assert found["proposal_passes_s"] == pytest.approx(20 * 1e-9 * 7e10 / 1024)
    assert estimate(parts, 1e7, 1)["proposal_bytes"] == 0


def test_one_process_exchanges_nothing() -> None:
    found = estimate(FOUND, 1e7, 1)
    sent = ("gradient_bytes", "step_bytes", "proposal_bytes", "step_exchange_s", "proposal_exchange_s")
    assert {found[name] for name in sent} == {0}
    assert found["proposal_passes_s"] > 0


def test_the_table_has_a_row_per_size_and_number_of_ranks(tmp_path: Path) -> None:
    from dataclasses import asdict

    table = [estimate(FOUND, size, n) for size in SIZES for n in RANKS]
    found = {"preset": "0.3M", "coefficients": asdict(FOUND), "table": table}
    assert format_text(found).count("\n70 G") == len(RANKS)
    assert "100 us with 2 processes" in format_text(found)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- scale: begin -->\nold\n<!-- scale: end -->\nafter\n")
    write_between(page, "scale", markdown(found) + "\n")
    written = page.read_text()
    assert written.startswith("before\n<!-- scale: begin -->\n```text")
    assert written.endswith("<!-- scale: end -->\nafter\n")
    assert "old" not in written
    assert written.count("| 1,024 |") == len(SIZES)
