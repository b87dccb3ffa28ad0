"""The model of lm-evaluation-harness, where the harness is installed: on tasks whose data lie here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lbq as library

lm_eval = pytest.importorskip("lm_eval", reason="the extra lbq[lm-eval] is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]  # of the harness's own

Lbq = Callable[..., Any]
TASKS: dict[str, dict[str, object]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "local_words": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "question",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "local_text": {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "text",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
QUESTIONS = ("The ship was", "A lamp of brass is on the table and it", "x" * 300)
CHOICES = (" old", " of a colour that nobody knew")


def likelihood(model: Any, context: str, continuation: str) -> float:
    """ln p, computed here from all logits of one pass."""
    whole = model.tokenizer.encode(context + continuation, add_special_tokens=True)
    count = len(whole) - len(model.tokenizer.encode(context, add_special_tokens=True))
    ids = whole[-(model.context + 1) :]
    logs = model.logits(ids[:-1]).double().log_softmax(-1)[-count:]
    return float(logs.gather(1, torch.tensor(ids[-count:]).unsqueeze(1)).sum())


@pytest.fixture
def tasks(kept_artifact: Path, tmp_path: Path) -> Path:
    """The tasks, whose answers are what the model itself says."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = []
    with library.load(kept_artifact, device="cpu") as model:
        for question in QUESTIONS:
            answer = max(range(2), key=lambda i, q=question: likelihood(model, q, CHOICES[i]))
            text = model.generate(question[-100:], chat=False, temperature=0, max_tokens=5, stop="\n").text
            lines.append({"question": question, "choices": CHOICES, "answer": answer, "text": text})
    (folder / "data.json").write_text("\n".join(map(json.dumps, lines)))
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.json")}}}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **where, **task}))
    return folder


class Request:
    """What the harness hands over, of which the arguments matter."""

    def __init__(self, *args: object) -> None:
        self.args = args


def test_the_command(kept_artifact: Path, tasks: Path, lbq: Lbq, tmp_path: Path) -> None:
    settings = ("--include_path", tasks, "--tasks", ",".join(TASKS), "--output_path", tmp_path / "out")
    done = lbq("lm-eval", "run", "--model", "lbq", "--model_args", f"path={kept_artifact},device=cpu", *settings)
    assert done.code == 0, done.err
    (found,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    assert results["local_choice"]["acc,none"] == 1.0
    assert results["local_text"]["exact_match,none"] >= 2 / 3  # the third prompt is cut elsewhere
    assert 1 < results["local_words"]["bits_per_byte,none"] < 100


def test_likelihoods_are_those_of_all_logits(kept_artifact: Path) -> None:
    from lbq.lm_eval_model import LbqModel

    model = LbqModel(str(kept_artifact), device="cpu", dtype="float32")
    requests = [Request(question, " old and grey") for question in QUESTIONS]
    found = model.loglikelihood(requests, disable_tqdm=True)
    for question, (value, _) in zip(QUESTIONS, found, strict=True):
        assert value == pytest.approx(likelihood(model.model, question, " old and grey"), abs=1e-3)
    for text in ("The ship was old", QUESTIONS[2]):  # within the context, and beyond it
        (whole,) = model.loglikelihood_rolling([Request(text)], disable_tqdm=True)
        ids = [model.prefix_token_id, *model.tok_encode(text)]
        expected, at = 0.0, 1
        while at < len(ids):  # the harness fills the context of every window but the first
            stop = min(at + model.max_length, len(ids))
            window = ids[max(0, stop - 1 - model.max_length) : stop]
            logs = model.model.logits(window[:-1]).double().log_softmax(-1)[at - stop :]
            expected += float(logs.gather(1, torch.tensor(ids[at:stop]).unsqueeze(1)).sum())
            at = stop
        assert whole == pytest.approx(expected, abs=2e-3) or len(ids) > model.max_length
    best = int(model.model.logits(model.tok_encode("The"))[-1].argmax())
    assert model._score(model.tok_encode("The"), [best])[1]
    assert not model._score(model.tok_encode("The"), [best ^ 1])[1]


def test_faults(kept_artifact: Path, lbq: Lbq, tmp_path: Path) -> None:
    base = ("lm-eval", "run", "--model", "lbq", "--tasks", "arc_easy", "--model_args")
    assert "lbq convert" in lbq(*base, f"path={tmp_path}").err
    assert "device tpu: auto, cpu or cuda" in lbq(*base, f"path={kept_artifact},device=tpu").err
