"""Artifacts of tiny models against their originals: numbers by transformers in float32, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lbq.conversion import convert
from lbq.evaluation import Evaluation, evaluate
from lbq.formats.artifact import open_artifact
from lbq.formats.errors import DataError, UsageError
from lbq.quantizer.original import open_original
from lbq.quantizer.source import resolve
from lbq.runtime.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

Lbq = Callable[..., Any]
CONTEXT = 64
TEXT = "The lighthouse keeper climbed the stairs each evening at the same hour, carrying oil and a brass lamp. " * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def reference_logits(checkpoint: Path, artifact: Path | None) -> torch.Tensor:
    """transformers in float32, on the checkpoint's weights or the artifact's: float64 [windows, CONTEXT, V]."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    if artifact is not None:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # the source may be tied
        with open_artifact(artifact) as opened, torch.no_grad():
            for name in opened.manifest.quantized:
                model.get_submodule(name).weight.copy_(opened.packed(name).dequantize())
    ids = Tokenizer.load(checkpoint).encode(TEXT, add_special_tokens=False)
    windows = torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    with torch.inference_mode():
        logits: torch.Tensor = model(windows).logits.double()
    return logits


def test_against_transformers(checkpoints: Mapping[str, Path], family: str, text: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints[family]
    artifact = convert(checkpoint, tmp_path / "out", group=32, device="cpu").path
    found = evaluate(artifact, checkpoint, text, context=CONTEXT, device="cpu")
    ids = torch.tensor(Tokenizer.load(checkpoint).encode(TEXT, add_special_tokens=False))
    windows = len(ids) // CONTEXT
    half = slice(CONTEXT // 2 - 1, CONTEXT - 1)
    following = ids[: windows * CONTEXT].view(windows, CONTEXT)[:, CONTEXT // 2 :].numpy()[..., None]
    a, b = (reference_logits(checkpoint, each)[:, half].numpy() for each in (None, artifact))
    p, q = (np.exp(each) / np.exp(each).sum(-1, keepdims=True) for each in (a, b))
    kl = (p * np.log(p / q)).sum(-1)
    nll = [-np.log(np.take_along_axis(each, following, -1)[..., 0]) for each in (q, p)]
    cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))

    assert (found.text.windows, found.text.positions) == (windows, kl.size)
    scores = found.scores
    near = {"rel": 1e-3, "abs": 1e-6}
    assert scores.kl.mean == pytest.approx(kl.mean(), **near)
    assert scores.kl.mean > 1e-3  # there is something to measure
    assert scores.kl.standard_error == pytest.approx(kl.mean(1).std(ddof=1) / windows**0.5, **near)
    assert scores.kl.p99 == pytest.approx(np.percentile(kl, 99), **near)
    assert scores.same_top1.mean == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean(), abs=1 / kl.size)  # a near tie
    assert scores.logit_cosine.mean == pytest.approx(cosine.mean(), abs=1e-5)
    assert scores.logit_cosine.least == pytest.approx(cosine.min(), abs=1e-5)
    assert scores.perplexity.artifact == pytest.approx(np.exp(nll[0].mean()), rel=1e-4)
    assert scores.perplexity.reference == pytest.approx(np.exp(nll[1].mean()), rel=1e-4)
    assert scores.perplexity.log_ratio.mean == pytest.approx((nll[0] - nll[1]).mean(), rel=1e-3, abs=1e-5)


def test_blocks_change_nothing(
    kept_artifact: Path, checkpoints: Mapping[str, Path], text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(kept_artifact, checkpoints["llama"], text, context=CONTEXT, device="cpu").scores
    monkeypatch.setattr("lbq.evaluation.stream.BLOCK", 5)
    told: list[tuple[int, int]] = []
    blocks = evaluate(
        kept_artifact,
        checkpoints["llama"],
        text,
        context=CONTEXT,
        device="cpu",
        on_progress=lambda *at: told.append(at),
    ).scores
    assert blocks.kl.mean == pytest.approx(whole.kl.mean, rel=1e-4)
    assert blocks.perplexity.artifact == pytest.approx(whole.perplexity.artifact, rel=1e-5)
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 2 * 2 * (len(TEXT) // CONTEXT)  # sides, layers, windows, and their logits


def test_a_model_against_itself(kept_artifact: Path, text: Path) -> None:
    found = evaluate(kept_artifact, kept_artifact, text, device="cpu", max_tokens=200)
    assert found.text.context == 128  # these models' own, below the default
    assert (found.text.windows, found.text.positions, found.text.tokens) == (1, 64, 128)
    scores = found.scores
    assert (scores.kl.max, scores.same_top1.mean, scores.perplexity.log_ratio.mean) == (0, 1, 0)
    assert scores.kl.standard_error is None
    assert scores.logit_cosine.least == pytest.approx(1, abs=1e-12)


@pytest.mark.gpu
def test_on_cuda(kept_artifact: Path, checkpoints: Mapping[str, Path], text: Path) -> None:
    cpu, cuda = (evaluate(kept_artifact, checkpoints["llama"], text, device=d).scores for d in ("cpu", "cuda"))
    assert cuda.kl.mean == pytest.approx(cpu.kl.mean, rel=1e-3)
    assert cuda.perplexity.reference == pytest.approx(cpu.perplexity.reference, rel=1e-4)


def test_bits_are_ordered(checkpoints: Mapping[str, Path], text: Path, tmp_path: Path) -> None:
    costs = []
    for bits in (8, 4, 3):
        path = convert(checkpoints["llama"], tmp_path / str(bits), bits=bits, group=32, device="cpu").path
        costs.append(evaluate(path, checkpoints["llama"], text, device="cpu").scores)
    assert costs[0].kl.mean < costs[1].kl.mean / 20 < costs[2].kl.mean / 20
    assert costs[0].kl.mean < 5e-3
    assert costs[0].same_top1.mean > 0.95


def test_kept_weights_cost_nothing(checkpoints: Mapping[str, Path], text: Path, tmp_path: Path) -> None:
    """All but one projection stays BF16, and that one is quantised to 8 bits: almost the original."""
    keep = ("layers.0", "layers.1.self_attn", "gate_proj", "up_proj")
    path = convert(checkpoints["smollm2"], tmp_path / "out", bits=8, lm_head=16, keep=keep, device="cpu").path
    found = evaluate(path, checkpoints["smollm2"], text, device="cpu").scores
    assert 0 < found.kl.mean < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_originals_of_other_dtypes_are_rounded(
    write_checkpoint: Callable[..., Path], text: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    source = write_checkpoint(tmp_path / "source", dtype=dtype)
    path = convert(source, tmp_path / "out", bits=8, device="cpu").path
    found = evaluate(path, source, text, device="cpu")
    name = str(dtype).removeprefix("torch.")
    assert found.notes == (f"{source}: tensors that stay are rounded from {name} to bfloat16",)
    assert found.scores.kl.mean < 0.02
    with open_original(resolve(source)) as original:
        for projection in original.spec.projections():
            assert original.dense(f"{projection.name}.weight").dtype == torch.bfloat16


# ------------------------------------------------------------------------ what is refused


def test_broken_weights(
    artifact: Path, make_checkpoint: Callable[..., Path], resave: Callable[..., None], text: Path
) -> None:
    source = make_checkpoint("llama")
    resave(source, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(DataError, match=f"{source}: the logits are not finite"):
        evaluate(artifact, source, text, device="cpu")
    resave(source, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(DataError, match=r"tensors missing: 'model\.norm\.weight'"):
        evaluate(artifact, source, text, device="cpu")


def test_models_that_do_not_belong_together(
    artifact: Path, make_checkpoint: Callable[..., Path], write_checkpoint: Callable[..., Path], text: Path, lbq: Lbq
) -> None:
    source = make_checkpoint("llama")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["h"], vocabulary["e"] = vocabulary["e"], vocabulary["h"]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = lbq("eval", artifact, "--against", source, "--text", text, "--device", "cpu")
    assert (done.code, done.out) == (3, "")
    assert "tokenizers make different tokens" in done.error
    larger = write_checkpoint(source.parent / "larger", vocab_size=300)
    done = lbq("eval", artifact, "--against", larger, "--text", text)
    assert done.code == 3
    assert "264 tokens in the vocabulary" in done.error


FAULTS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no such text": (("--text", "absent.txt"), 4, "absent.txt: No such file"),
    "no such model": (("--against", "absent"), 4, "absent: no such folder"),
    "not a model": (("--against", "."), 3, "no config.json"),
    "context 3": (("--context", "3"), 2, "context 3: these models take 4 to 128 tokens"),
    "context past the model's": (("--context", "129"), 2, "context 129"),
    "too few tokens": (("--max-tokens", "5"), 2, "5 tokens at most: a window has 128"),
    "negative tokens": (("--max-tokens", "-5"), 2, "-5 tokens at most"),
    "no threads": (("--threads", "0"), 2, "0 threads"),
    "unknown device": (("--device", "tpu"), 2, "tpu"),
    "a folder as text": (("--text", "."), 4, "not a file"),
    "empty text": (("--text", "empty.txt"), 3, "empty.txt: the text is empty"),
    "short text": (("--text", "short.txt"), 3, "short.txt: 5 tokens, and a window takes 128"),
    "binary text": (("--text", "binary"), 3, "binary: not UTF-8 at byte 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(
    kept_artifact: Path,
    checkpoints: Mapping[str, Path],
    text: Path,
    lbq: Lbq,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    monkeypatch.chdir(text.parent)
    for name, data in (("empty.txt", b""), ("short.txt", b"hello"), ("binary", b"\xff\x00")):
        Path(name).write_bytes(data)
    options, code, message = FAULTS[fault]
    done = lbq("eval", kept_artifact, "--against", checkpoints["llama"], "--text", text, "--device", "cpu", *options)
    assert (done.code, done.out) == (code, "")
    assert message in done.error


def test_odd_device(kept_artifact: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="device tpu: auto, cpu or cuda"):
        evaluate(kept_artifact, kept_artifact, text, device="tpu")  # type: ignore[arg-type]


def test_not_an_artifact(checkpoints: Mapping[str, Path], text: Path, lbq: Lbq) -> None:
    done = lbq("eval", checkpoints["llama"], "--against", checkpoints["llama"], "--text", text)
    assert done.code == 3
    assert "not an lbq artifact" in done.error


# ------------------------------------------------------------------------ the command


def test_json(kept_artifact: Path, checkpoints: Mapping[str, Path], text: Path, lbq: Lbq) -> None:
    options = ("--against", checkpoints["llama"], "--text", text, "--context", "64", "--device", "cpu", "--json")
    done = lbq("eval", kept_artifact, *options)
    assert (done.code, done.err) == (0, "")
    found = msgspec.json.decode(done.out, type=Evaluation)  # strict: no field more, none less
    fields = json.loads(done.out)
    assert set(fields["scores"]) == {"kl", "same_top1", "logit_cosine", "perplexity"}
    assert set(fields["scores"]["kl"]) == {"mean", "standard_error", "p50", "p90", "p99", "max"}
    assert found.eval_format == 1
    assert (found.artifact, found.reference) == (str(kept_artifact), str(checkpoints["llama"]))
    assert found.text.windows * 32 == found.text.positions
    with open_artifact(kept_artifact) as opened:
        assert found.weights.cosine == opened.manifest.summary.cosine
    assert lbq("eval", kept_artifact, *options).out == done.out


def test_text_output(kept_artifact: Path, checkpoints: Mapping[str, Path], text: Path, lbq: Lbq) -> None:
    against = ("--against", checkpoints["llama"], "--text", text, "--device", "cpu")
    done = lbq("eval", kept_artifact, *against, "--context", "64")
    assert (done.code, done.err) == (0, "")
    found = evaluate(kept_artifact, checkpoints["llama"], text, context=64, device="cpu").scores
    assert f"{found.kl.mean:.5f} ± {found.kl.standard_error:.5f}" in done.out
    assert f"{found.same_top1.mean:.2%} ± " in done.out
    assert "± is the standard error over windows" in done.out
    assert "\x1b" not in done.out
    one = lbq("eval", kept_artifact, *against, "--max-tokens", "128")
    assert "one window gives no standard errors" in one.out
    assert "±" not in one.out
