"""Models side by side: the numbers of `lbq eval` for each, and differences taken window by window."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lbq.conversion import convert
from lbq.evaluation import compare, evaluate
from lbq.evaluation.models import open_model, open_stored, windows_of
from lbq.evaluation.stream import Side, stream
from lbq.evaluation.windows import read_text
from lbq.formats.artifact import open_artifact
from lbq.formats.comparison import Share
from lbq.formats.errors import DataError, StorageError, UsageError
from lbq.runtime.devices import find_device

pytestmark = pytest.mark.usefixtures("one_thread")

Lbq = Callable[..., Any]
CONTEXT = 64
TEXT = "The lighthouse keeper climbed the stairs each evening at the same hour, carrying oil and a brass lamp. " * 4


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def three_bits(checkpoints: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("three") / "bits"
    return convert(checkpoints["llama"], target, bits=3, group=32, lm_head=16, device="cpu").path


@pytest.fixture
def foreign(kept_artifact: Path, tmp_path: Path) -> Path:
    """The artifact as any other tool's checkpoint: without its manifest and tokenizer."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for path in kept_artifact.iterdir():
        if path.name not in ("lbq.json", "report.json", "tokenizer.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_each_as_evaluated_alone(
    checkpoints: Mapping[str, Path], kept_artifact: Path, three_bits: Path, text: Path
) -> None:
    models = [kept_artifact, three_bits]
    found = compare(models, checkpoints["llama"], text, context=CONTEXT, device="cpu")
    for path, row in zip(models, found.models, strict=True):
        alone = evaluate(path, checkpoints["llama"], text, context=CONTEXT, device="cpu")
        assert (found.text, row.scores, row.model) == (alone.text, alone.scores, str(path))
    assert found.models[0].weight_cosine == pytest.approx(alone_cosine(kept_artifact), abs=1e-9)
    assert found.models[0].difference is None


def alone_cosine(artifact: Path) -> float:
    with open_artifact(artifact) as opened:
        return opened.manifest.summary.cosine


def test_cosine_counts_what_stays_16_bits(
    checkpoints: Mapping[str, Path], three_bits: Path, text: Path, read_tensors: Callable[[Path], Any]
) -> None:
    (row,) = compare([three_bits], checkpoints["llama"], text, context=CONTEXT, device="cpu").models
    weights = read_tensors(checkpoints["llama"])
    with open_artifact(three_bits) as opened:
        names = [p.name for p in opened.spec.projections()]
        ours = [
            opened.packed(name).dequantize() if opened.is_quantized(name) else opened.dense(f"{name}.weight")
            for name in names
        ]
    a = torch.cat([weights[f"{name}.weight"].double().flatten() for name in names])
    b = torch.cat([tensor.double().flatten() for tensor in ours])
    assert row.weight_cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
    assert row.weight_cosine > alone_cosine(three_bits)
    bits = [16 if name == "lm_head" else 3.5 for name in names]
    sizes = [tensor.numel() for tensor in ours]
    assert row.storage.bits_per_weight == pytest.approx(np.average(bits, weights=sizes))
    head = 264 * 64
    assert row.storage.shares == (Share(3, 32, sum(sizes) - head), Share(16, None, head))
    assert row.storage.nbytes == sum(tensor.nbytes for tensor in load_file(three_bits / "model.safetensors").values())


def test_differences_are_those_of_windows(
    checkpoints: Mapping[str, Path], kept_artifact: Path, three_bits: Path, text: Path
) -> None:
    models = [kept_artifact, three_bits]
    found = compare(models, checkpoints["llama"], text, context=CONTEXT, device="cpu")
    teacher, *students = (open_model(path) for path in (checkpoints["llama"], *models))
    windows = windows_of(read_text(text), (teacher,), CONTEXT, None)
    sides = [Side("student", student) for student in students]
    a, b = stream(Side("teacher", teacher), sides, windows, find_device("cpu", exact=True))
    means = (b.kl - a.kl).reshape(len(windows), -1).mean(1)
    difference = found.models[1].difference
    assert difference is not None
    assert difference.mean == pytest.approx(means.mean())
    assert difference.standard_error == pytest.approx(means.std(ddof=1) / len(means) ** 0.5)
    for model in (teacher, *students):
        model.close()


def test_another_tools_checkpoint_of_the_same_weights(
    checkpoints: Mapping[str, Path], kept_artifact: Path, foreign: Path, text: Path
) -> None:
    notes: list[str] = []
    found = compare(
        [kept_artifact, foreign], checkpoints["llama"], text, context=CONTEXT, device="cpu", on_note=notes.append
    )
    ours, theirs = found.models
    assert theirs.storage.tool == "compressed-tensors"
    assert (ours.storage.shares, ours.storage.nbytes) == (theirs.storage.shares, theirs.storage.nbytes)
    assert ours.storage.bits_per_weight == theirs.storage.bits_per_weight
    assert ours.weight_cosine == theirs.weight_cosine
    assert theirs.difference is not None
    assert abs(theirs.difference.mean) < 1e-7
    assert theirs.notes == ("no tokenizer.json: it reads the original's tokens",)
    assert notes == [f"{foreign}: {theirs.notes[0]}"]


def test_a_plain_checkpoint_is_measured_in_its_own_precision(
    checkpoints: Mapping[str, Path], kept_artifact: Path, tmp_path: Path, text: Path
) -> None:
    """What a tool that lbq cannot read makes can be dequantised by that tool, to float32."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in checkpoints["llama"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    with open_artifact(kept_artifact) as opened:
        for name in opened.manifest.quantized:
            tensors[f"{name}.weight"] = opened.packed(name).dequantize()
    save_file(tensors, folder / "model.safetensors")
    found = compare([kept_artifact, folder], checkpoints["llama"], text, context=CONTEXT, device="cpu")
    plain = found.models[1]
    assert plain.storage.tool == "none"
    assert plain.difference is not None
    assert abs(plain.difference.mean) < 1e-7


@pytest.mark.parametrize("family", ["smollm2", "qwen2"])
def test_tied_heads(checkpoints: Mapping[str, Path], tmp_path: Path, text: Path, family: str) -> None:
    untied = convert(checkpoints[family], tmp_path / "untied", group=32, device="cpu").path
    tied = convert(checkpoints[family], tmp_path / "tied", group=32, lm_head=16, device="cpu").path
    found = compare([untied, tied, checkpoints[family]], checkpoints[family], text, context=CONTEXT, device="cpu")
    first, second, original = found.models
    assert first.weight_cosine is not None
    assert second.weight_cosine is not None
    assert first.weight_cosine < second.weight_cosine < 1
    assert original.weight_cosine == pytest.approx(1, abs=1e-12)
    assert original.scores is not None
    assert original.scores.kl.mean == pytest.approx(0, abs=1e-12)
    assert original.storage.bits_per_weight == 16
    assert first.storage.nbytes > second.storage.nbytes  # the head is stored beside the embedding


def test_without_an_original_nothing_runs(kept_artifact: Path, foreign: Path) -> None:
    found = compare([kept_artifact, foreign])
    assert (found.reference, found.text, found.device) == (None, None, None)
    assert [row.scores for row in found.models] == [None, None]
    assert found.models[0].weight_cosine == alone_cosine(kept_artifact)
    assert found.models[1].weight_cosine is None


def test_refusals(checkpoints: Mapping[str, Path], kept_artifact: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="no models"):
        compare([])
    with pytest.raises(UsageError, match="against an original"):
        compare([kept_artifact], text=text)
    with pytest.raises(StorageError, match="no such folder"):
        compare([kept_artifact, tmp_path / "missing"], checkpoints["llama"], text)
    with pytest.raises(UsageError, match="no model"):
        compare([""], checkpoints["llama"], text)
    with pytest.raises(DataError, match=r"layers\.0\.self_attn\.k_proj is not as in the original"):
        compare([kept_artifact], checkpoints["qwen3"], text, context=CONTEXT)


def test_command(
    lbq: Lbq, checkpoints: Mapping[str, Path], kept_artifact: Path, three_bits: Path, foreign: Path, text: Path
) -> None:
    arguments = ("compare", kept_artifact, three_bits, foreign)
    options = ("--against", checkpoints["llama"], "--text", text, "--context", CONTEXT, "--device", "cpu")
    shown = lbq(*arguments, *options)
    assert shown.code == 0, shown.err
    assert shown.err == f"note: {foreign}: no tokenizer.json: it reads the original's tokens\n"
    assert "INT3 g32" in shown.out
    assert f"against {checkpoints['llama']}" in shown.out
    lines = [line for line in shown.out.splitlines() if "±" in line]
    found = json.loads(lbq(*arguments, *options, "--json").out)
    divergences = [row["scores"]["kl"]["mean"] for row in found["models"]]
    assert [" * " in line for line in lines[:3]] == [kl == min(divergences) for kl in divergences]
    plain = lbq(*arguments)
    assert plain.code == 0
    assert "KL" not in plain.out
    assert "compressed-tensors" in plain.out


def test_command_refuses(lbq: Lbq, kept_artifact: Path, text: Path, tmp_path: Path) -> None:
    assert lbq("compare").code == 2
    shown = lbq("compare", kept_artifact, "--text", text)
    assert (shown.code, shown.error) == (2, "a text is read against an original: give it too")
    shown = lbq("compare", kept_artifact, tmp_path)
    assert shown.code == 3
    assert "no config.json" in shown.error


def test_stored_models_close(kept_artifact: Path, foreign: Path) -> None:
    for path in (kept_artifact, foreign):
        with open_stored(path) as model:
            assert model.folder == path
