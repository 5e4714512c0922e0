"""The stack against conventional training: factors, turns, figures, and what is not here."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from hybrid_predict_trainer.experiments.arms.options import InputError
from hybrid_predict_trainer.experiments.bench import accelerator, acceptance, factors, stack
from hybrid_predict_trainer.experiments.statistics import paired_t, significant

TINY: dict[str, Any] = {"preset": "0.3M", "batch_size": 2, "context": 16, "data_bytes": 200_000}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    torch.set_num_threads(1)
    return stack.measure(**TINY, steps=6, rounds=3, budgets=(0.5,), without=("compile",))


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["rows"]}


# ---- the table ------------------------------------------------------------------------------------------


def test_every_factor_is_a_row_after_the_conventional_one(result: dict[str, Any]) -> None:
    assert [row["name"] for row in result["rows"]] == ["conventional", *stack.FACTORS]
    assert by_name(result)["conventional"]["factors"] == []
    assert by_name(result)["prediction"]["factors"] == ["attention", "bf16", "fused", "prediction"]


def test_a_factor_that_is_not_here_is_named_with_its_reason(result: dict[str, Any]) -> None:
    row = by_name(result)["compile"]
    assert (row["status"], row["reason"]) == ("not here", "left out on request")
    assert "compile: not here, left out on request" in stack.format_text(result)
    assert "step_ms" not in row, "nothing was measured"


def test_ratios_are_paired_and_the_product_is_of_the_factors(result: dict[str, Any]) -> None:
    rows = [row for row in result["rows"] if row["status"] == "measured"]
    assert [rows[0][key] for key in ("ratio", "factor", "equal_loss_time_ratio")] == pytest.approx([1.0] * 3)
    product = 1.0
    for row in rows:
        product *= row["factor"]
        assert row["cumulative"] == pytest.approx(product)
        assert row["n"] == 3, "one ratio per round"
        assert row["step_ms"] > 0
        assert row["wall_s"] > 0


def test_rows_train_the_same_thing(result: dict[str, Any]) -> None:
    rows = by_name(result)
    exact = rows["conventional"]["final_val_loss"]
    assert rows["bf16"]["final_val_loss"] == pytest.approx(exact, rel=2e-2)
    assert rows["bf16"]["final_val_loss"] != exact, "bfloat16 was on"
    assert 2.0 < exact < math.log(256)
    assert exact == rows["conventional"]["final_val_loss_per_seed"][0]


def test_the_object_is_json(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False))["schema"] == 1
    assert {"steps", "seeds", "rounds", "budgets", "task", "recipe", "environment", "float32_matmul_precision"} <= set(
        result
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"without": ("magic",)}, "unknown factor 'magic'"),
        ({"steps": 2, "rounds": 3}, "1 <= rounds <= steps"),
        ({"seeds": ()}, "at least one seed"),
        ({"budgets": (0.0,)}, "budgets must be > 0"),
        ({"preset": "9000M"}, "unknown preset"),
    ],
)
def test_bad_input_is_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        stack.measure(**{**TINY, "steps": 6, "rounds": 3, **values})
    assert "\n" not in str(caught.value)


# ---- turns ----------------------------------------------------------------------------------------------


class Recorded:
    """Stands for a training: notes when it was its turn."""

    def __init__(self, name: str, diary: list[tuple[str, float]]) -> None:
        self.name, self.diary = name, diary

    def advance(self, share: float) -> None:
        self.diary.append((self.name, share))


def test_rows_take_turns_and_the_order_turns_round() -> None:
    diary: list[tuple[str, float]] = []
    stack.take_turns([Recorded(n, diary) for n in "abc"], 3)  # type: ignore[misc]
    assert "".join(name for name, _ in diary) == "abc" + "cba" + "abc"
    assert [share for _, share in diary] == pytest.approx([1 / 3] * 3 + [2 / 3] * 3 + [1] * 3)
    diary.clear()
    stack.take_turns([Recorded(n, diary) for n in "abc"], 2, first=3)  # type: ignore[misc]
    assert "".join(name for name, _ in diary) == "cba" + "abc", "the next seed goes on where the last one stopped"


def test_slices_of_a_run_make_up_the_run() -> None:
    options = factors.Options(task="gpt", steps=7, **TINY)
    rung = factors.attempt(options, "conventional", frozenset())
    whole, sliced = (stack.start([rung], (), seed=3)[0] for _ in range(2))
    whole.advance(1.0)
    for number in range(3):
        sliced.advance((number + 1) / 3)
    assert [s.steps for s in sliced.slices] == [3, 2, 2]
    for a, b in zip(whole.trainer.run.subject.parameters, sliced.trainer.run.subject.parameters, strict=True):
        assert torch.equal(a, b)
    sliced.advance(1.0)
    assert math.isnan(sliced.slices[-1].step_ms), "a finished run is not trained on"


# ---- the factors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", ["none", "bool", "float"])
def test_attention_written_out_is_attention(causal: bool, masked: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    keep = torch.ones(5, 5, dtype=torch.bool).tril(1)
    mask = {"none": None, "bool": keep, "float": torch.randn(5, 5)}[masked]
    if causal and mask is not None:
        pytest.skip("torch takes one or the other")
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    found = factors.written_out_attention(q, k, v, attn_mask=mask, is_causal=causal)
    assert torch.allclose(found, expected, atol=1e-6)


def test_attention_is_conventional_inside_only_and_compiled_code_can_tell() -> None:
    graphs: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        graphs.append(any("scaled_dot_product" in name for name in names))
        return graph

    def attend(x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    torch.compiler.reset()
    compiled, x = torch.compile(attend, backend=backend), torch.randn(1, 2, 4, 8)
    with factors.conventional_attention():
        assert functional.scaled_dot_product_attention is factors.written_out_attention
        compiled(x)
    assert functional.scaled_dot_product_attention is not factors.written_out_attention
    compiled(x)
    assert graphs == [False, True], "each row gets its own graph"


def test_no_compiler_no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors.shutil, "which", lambda name: None)
    assert "C++ compiler" in factors.missing("compile", torch.device("cpu"))
    monkeypatch.setattr(factors.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("CXX", "mine")
    assert factors.cpp_compiler() == "/bin/mine"
    assert factors.missing("compile", torch.device("cpu")) == ""


def test_what_raises_is_not_here_and_later_factors_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    works = factors._first_steps

    def no_fused(setup: Any, *, predict: bool) -> None:
        if setup.settings.fused:
            raise RuntimeError("no fused kernel\nfor this device")
        works(setup, predict=predict)

    monkeypatch.setattr(factors, "_first_steps", no_fused)
    said: list[str] = []
    rungs = {r.name: r for r in factors.climb(factors.Options(task="gpt", steps=4, **TINY), ["compile"], said.append)}
    assert rungs["fused"].reason == "RuntimeError: no fused kernel for this device"
    assert rungs["fused"].setup is None
    assert rungs["prediction"].factors == {"bf16", "attention", "prediction"}
    assert "fused: not here, RuntimeError: no fused kernel for this device" in said

    def nothing(setup: Any, *, predict: bool) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(factors, "_first_steps", nothing)
    with pytest.raises(InputError, match=r"conventional training does not work here: RuntimeError: out of memory"):
        factors.climb(factors.Options(task="gpt", steps=4, **TINY), (), said.append)


# ---- acceptance -----------------------------------------------------------------------------------------


def comparison(seed: int, plain: float, hybrid: float, *, wall: tuple[float, float] = (10.0, 8.0)) -> dict[str, Any]:
    return {
        "task": "gpt", "seeds": [seed],
        "settings": {"task": {"preset": "124M"}, "steps": 10, "trainer": {"clock": "claimed"}},
        "arms": [
            {"name": "plain", "wall_s": wall[0], "final_val_loss_per_seed": [plain]},
            {"name": "hybrid", "wall_s": wall[1], "final_val_loss_per_seed": [hybrid]},
        ],
        "loss_gap_per_seed": [100 * (hybrid - plain) / plain if math.isfinite(hybrid) else None],
        "speedup_at_equal_loss": 1.1, "speedup_wall": None, "speedup_kind": "exact",
        "backward_reduction_claimed_pct": 20.0, "environment": {},
    }  # fmt: skip


def stack_result(ratio: float) -> dict[str, Any]:
    rows = [("conventional", 1.0), ("bf16", ratio / 2), ("attention", ratio), ("prediction", 99.0)]
    return {"rows": [{"name": n, "status": "measured", "ratio": r} for n, r in rows]}


def memory_result(offload: float) -> dict[str, Any]:
    return {"memory": [{"store": "bare loop", "peak_bytes": 100}, {"store": "trainer, offload", "peak_bytes": offload}]}


LOSS = "loss within 5 % of the baseline on every seed, %"
CASES = [
    # losses of plain and hybrid per seed, stack, memory, passed, what is missed
    ([(2.0, 2.05)] * 3, stack_result(4.0), memory_result(102), True, []),
    ([(2.0, 2.05)] * 3, stack_result(3.0), memory_result(102), False, ["wall-clock over conventional training, x"]),
    ([(2.0, 2.05)] * 2, stack_result(4.0), None, False, ["seeds"]),
    ([(2.0, 2.05)] * 2 + [(2.0, 2.11)], stack_result(4.0), None, False, [LOSS]),
    ([(2.0, 2.05)] * 3, None, None, None, []),
    ([(2.0, math.nan)] * 3, stack_result(4.0), None, False, ["runs whose loss is not finite"]),
]  # fmt: skip


@pytest.mark.parametrize(("losses", "table", "memory", "passed", "missed"), CASES)
def test_acceptance(losses: Any, table: Any, memory: Any, passed: bool | None, missed: list[str]) -> None:
    found = acceptance.judge([comparison(i, p, h) for i, (p, h) in enumerate(losses)], table, memory)
    assert found["passed"] is passed
    assert [c["name"] for c in found["criteria"] if c["must"] and c["passed"] is False] == missed
    assert found["figures"]["wall_clock_ratio"] == pytest.approx(1.25)
    assert found["figures"]["speedup_at_equal_loss"] == pytest.approx(1.1)
    json.dumps(found, allow_nan=False)
    assert f"acceptance: { {True: 'passed', False: 'not passed', None: 'unknown'}[passed] }" in acceptance.format_text(
        found
    )


def test_acceptance_takes_each_seed_once_and_one_task() -> None:
    one = comparison(0, 2.0, 2.0)
    for wrong, words in (([], "no comparison"), ([one, one], "twice"), ([one, {**one, "task": "other"}], "different")):
        with pytest.raises(InputError, match=words):
            acceptance.judge(wrong)


def test_paired_t_of_a_known_answer() -> None:
    assert paired_t([1.0, 2.0, 3.0]) == pytest.approx(2 * math.sqrt(3))
    assert significant([1.0, 2.0, 3.0]) is False  # 3.46 < 4.30
    assert significant([1.0, 1.1, 0.9]) is True
    assert paired_t([1.0]) is None


# ---- accelerator ----------------------------------------------------------------------------------------


def test_on_the_cpu_every_row_says_that_it_is_not_here() -> None:
    found = accelerator.measure(preset="0.3M", device="cpu", batch_size=2, context=16)
    assert [row["interval"] for row in found["late_reading"]] == list(accelerator.INTERVALS)
    assert {row["status"] for row in (*found["late_reading"], *found["memory"])} == {"not here"}
    assert "not here: the CPU reads every loss at once" in accelerator.format_text(found)


def test_measured_rows_read_well() -> None:
    found = {
        "late_reading": [{"interval": 10, "status": "measured", "reason": "", "full_step_ratio_median": 1.02,
                          "host_syncs_per_step": 0.1}],
        "memory": [{"store": s, "status": "measured", "reason": "", "peak_bytes": b << 20}
                   for s, b in (("bare loop", 100), ("trainer, offload", 103))],
    }  # fmt: skip
    told = accelerator.format_text(found)
    assert "1.0200" in told
    assert "1.030" in told
