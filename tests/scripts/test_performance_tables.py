"""The tables of docs/performance.md say what was measured, and say so where something was not."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from performance_tables import (  # noqa: E402
    GOALS,
    MARKS,
    Decode,
    Found,
    Goal,
    Prompt,
    Real,
    draw,
    put_into,
    render,
    value_of,
)

LLAMA = "llama-3.1-8b"


def decoded(tokens, share=0.5, **changed):
    values = {
        "shape": LLAMA, "bits": 4, "depth": 0, "batch": 1, "fused": True, "sampled": False, "tokens": tokens,
        "slowest": tokens - 1, "fastest": tokens + 1, "share": share, "nbytes": 4_000_000_000, "first_token": 0.01,
        "peak": 6_000_000_000, "kl": 1e-9, "fault": None,
    }  # fmt: skip
    return Decode(**values | changed)


def found(*decodes):
    return Found("A GPU", "2026-01-02T03:04:05", "torch 1", 4e12, list(decodes))


def test_shares_and_ratios():
    one = found(
        decoded(700, 0.69), decoded(1250, batch=2), decoded(770, bits=3), decoded(300, 0.4, depth=32768),
        decoded(600, sampled=True), decoded(200, fused=False),
    )  # fmt: skip
    values = {goal.name: value_of(goal, one) for goal in GOALS}
    assert values[f"{LLAMA} INT4"] == 0.69
    assert values[f"{LLAMA} INT3"] == pytest.approx(1.1)
    assert values[f"{LLAMA} INT4, 2 texts"] == pytest.approx(2 * 700 / 1250)
    assert values[f"{LLAMA} INT4 at depth 32,768"] == 0.4
    assert values[f"{LLAMA} INT8"] is None
    text = render(one)
    assert f"| {LLAMA} INT4 | 700 | **69.0%** | 66.0% | 80.0% |" in text
    assert f"| {LLAMA} INT4, 2 texts | 1,250 | **1.120 × one text's step** | 1.2 | 1.1 |" in text
    assert f"| {LLAMA} INT4 at depth 32,768 | 300 | 40.0% |" in text  # not reached, so not bold
    assert f"| {LLAMA} INT8 |  | not measured |" in text
    assert "| 700 (699 – 701) | 69.0% | 600 | 200 |" in text


def test_prompts_and_real_models():
    one = found()
    one.prompts.append(Prompt(LLAMA, 4, 2048, "float16", 0.05, 5.5e14, 7.7e14))
    one.reals.append(Real("some-int4", 1.2e-6, 3.4e-7))
    assert value_of(next(goal for goal in GOALS if goal.prompt), one) == pytest.approx(55 / 77)
    text = render(one)
    assert "| float16 | 50.0 | 40,960 | 71% of 770 TFLOP/s |" in text
    assert "| some-int4 | 1.2e-06 | 3.4e-07 |" in text


def test_a_point_for_each_text_by_itself():
    one = found(decoded(700, 0.69), decoded(300, depth=32768), decoded(1250, batch=2), decoded(9, fused=False))
    svg = draw(one)
    assert svg.count("<circle") == 2
    assert f"{LLAMA} INT4: 69%" in svg


def test_wrong_logits_reach_nothing():
    one = found(decoded(9999, 2.0, fault="the logits diverge"))
    assert value_of(GOALS[0], one) is None
    assert "**the logits diverge**" in render(one)


def test_batches_are_met_from_below():
    goal = Goal(LLAMA, 4, 1.2, 1.1, batch=2, over="batch 1")
    assert goal.met(1.15, goal.must)
    assert not goal.met(1.25, goal.must)


def test_only_what_is_between_the_marks_changes():
    document = f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n"
    assert put_into(document, "new") == f"before\n{MARKS[0]}\n\nnew\n\n{MARKS[1]}\nafter\n"
    with pytest.raises(SystemExit):
        put_into("no marks", "new")
    document = (Path(__file__).parents[2] / "docs/performance.md").read_text()
    assert put_into(document, "new").count("\n\nnew\n\n") == 1


def test_results_can_be_read_again():
    one = found(decoded(700))
    assert msgspec.json.decode(msgspec.json.encode(one), type=Found) == one
