"""llama.cpp itself on GGUF files that lbq wrote: distributions and tokens as lbq's runtime has them.

Skipped where xllamacpp, a build of llama.cpp for Python, is not installed.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbq import load
from lbq.conversion import convert
from lbq.quantizer.export import export

xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "use_sliding_window": None, "sliding_window": None}
TEXT = "The café costs 123 £; don't  go!\n\n x"
ONE = {"n_predict": 1, "n_probs": 264, "logit_bias": [[40, 1000]], "cache_prompt": False}  # probabilities without bias
PROMPTS = ([3], [70, 111, 120], list(range(40, 100)))


def serve(file: Path) -> Callable[..., Any]:
    """``ask(path, **body)``: an answer of llama.cpp's server."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.warmup = 128, 1, 1, False
    server = xllamacpp.Server(settings)

    def ask(path: str, **body: object) -> Any:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    return ask


def _merge(path: Path) -> None:
    """llama.cpp takes no BPE without a merge."""
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["on"] = 258
    tokenizer["model"]["merges"] = [["o", "n"]]
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("family", ["llama", "smollm2", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("bits", [4, 8])
def test_distributions(write_checkpoint: Callable[..., Path], tmp_path: Path, family: str, bits: int) -> None:
    """Of every token after short prompts and a long one, Llama 3.1's stretched rope included. llama.cpp rounds
    activations to 8 bits before its products, lbq here does not; what is wrong differs by whole deviations."""
    source = write_checkpoint(tmp_path / "source", family, **WIDTHS)
    _merge(source / "tokenizer.json")
    artifact = convert(source, tmp_path / "made", bits=bits, group=32, device="cpu").path
    ask = serve(export(artifact, "gguf", tmp_path / "gguf").path / "made.gguf")
    with load(artifact, device="cpu", dtype="float32") as model:
        assert ask("/tokenize", content=TEXT, add_special=False)["tokens"] == model.tokenizer.encode(
            TEXT, add_special_tokens=False
        )
        for prompt in PROMPTS:
            ours = model.logits(prompt)[-1].double().log_softmax(-1)
            answer = ask("/completion", prompt=prompt, **ONE)
            found = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}
            theirs = torch.full_like(ours, -torch.inf)
            theirs[list(found)] = torch.tensor(list(found.values()), dtype=torch.float64)
            likely = theirs > -10
            assert likely.sum() > 2
            assert (ours - theirs)[likely].abs().max() < 0.2 * ours.std()
