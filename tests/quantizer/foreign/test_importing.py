"""lbq import: exact images of what other tools wrote, refusals, and what is requantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lbq.formats.artifact import Artifact, open_artifact
from lbq.formats.manifest import Import
from lbq.formats.report import read_report
from lbq.quantizer.foreign import open_foreign
from lbq.quantizer.source import resolve

pytestmark = pytest.mark.filterwarnings("ignore")  # of AutoRound's own

Export = Callable[..., Path]
Lbq = Callable[..., Any]
LAYERS = 7


def same(artifact: Artifact, folder: Path) -> None:
    """Every tensor of an artifact stands for what the checkpoint's does."""
    with open_foreign(resolve(folder)) as foreign:
        assert foreign.layers.keys() <= artifact.manifest.quantized.keys()
        for name in foreign.layers:
            assert torch.equal(artifact.packed(name).dequantize(), foreign.dense(f"{name}.weight"))
        for name in artifact.manifest.dense:
            assert torch.equal(artifact.dense(name).float(), foreign.dense(name).float())


@pytest.mark.parametrize(
    ("form", "bits", "origin"),
    [
        ("auto_gptq", 4, "GPTQ"),
        ("auto_round", 8, "AutoRound (auto_round:auto_gptq)"),
        ("auto_round", 3, "AutoRound (auto_round:auto_gptq)"),
        ("auto_awq", 4, "AWQ"),
        ("llm_compressor", 4, "compressed-tensors"),
    ],
)
def test_an_exact_image(export: Export, lbq: Lbq, tmp_path: Path, form: str, bits: int, origin: str) -> None:
    folder = export(form, bits)
    done = lbq("import", folder, "--out", tmp_path / "out", "--strict")
    assert (done.code, done.err) == (0, "")
    assert f"{LAYERS} layers of {origin}, every weight of them the source's" in done.out
    with open_artifact(tmp_path / "out") as artifact:
        method, summary = artifact.manifest.method, artifact.manifest.summary
        assert method == Import({}, bits, 32, 16, origin=origin)
        assert (summary.cosine, summary.worst_cosine, summary.relative_error) == (1.0, 1.0, 0.0)
        assert {module.cosine for module in read_report(artifact.folder).modules} == {1.0}
        same(artifact, folder)
    assert lbq("verify", tmp_path / "out").code == 0
    assert f"import of {origin}, INT{bits}, group 32, head 16 bits" in lbq("inspect", tmp_path / "out").out
    assert "error: " in lbq("import", folder, "--out", tmp_path / "out").err
    assert lbq("run", tmp_path / "out", "-p", "hello", "--max-tokens", "2").code == 0


def test_zero_points(export: Export, lbq: Lbq, tmp_path: Path) -> None:
    """Codes of 4 bits less their zero points are codes of 8 bits, and those of 3 are codes of 4."""
    folder, out = export("auto_gptq", 4, sym=False), tmp_path / "out"
    done = lbq("import", folder, "--out", out)
    assert done.code == 2
    assert f"asymmetric: zero points differ from the middle ({LAYERS} layers); --bits 8 holds the same" in done.error
    assert not out.exists()
    assert lbq("import", folder, "--out", out, "--bits", "8").code == 0
    with open_artifact(out) as artifact:
        assert {entry.bits for entry in artifact.manifest.quantized.values()} == {8}
        same(artifact, folder)
    done = lbq("import", folder, "--out", out, "--overwrite", "--requantize", "--json")
    assert done.code == 0
    result = json.loads(done.out)
    note = f"{result['notes'][0]}"
    assert note.endswith(f"rounded to nearest at 4 bits, groups of 32 ({LAYERS} layers)")
    assert f"note: {note}\n" in done.err
    assert (result["requantized"], result["origin"]) == (LAYERS, "GPTQ")
    assert 0.98 < result["summary"]["cosine"] < 0.9999
    narrow = export("auto_round:auto_gptq", 3, sym=False)
    assert lbq("import", narrow, "--out", tmp_path / "three", "--bits", "4").code == 0
    with open_artifact(tmp_path / "three") as artifact:
        same(artifact, narrow)


def test_scales_that_bf16_does_not_hold(export: Export, lbq: Lbq, tmp_path: Path, resave: Callable[..., None]) -> None:
    """Codes are kept, scales rounded: the default of nobody, since a weight changes."""
    folder, out = tmp_path / "source", tmp_path / "out"
    folder.mkdir()
    for path in export("auto_gptq").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    resave(folder, lambda t: t.update({n: x * 1.001 for n, x in t.items() if n.endswith("scales")}))
    done = lbq("import", folder, "--out", out)
    assert f"float16 scales that BF16 does not hold ({LAYERS} layers); --requantize" in done.error
    done = lbq("import", folder, "--out", out, "--requantize", "--strict")
    assert "refused under --strict: scales that BF16 does not hold are rounded" in done.error
    assert lbq("import", folder, "--out", out, "--requantize").code == 0
    with open_artifact(out) as artifact, open_foreign(resolve(folder)) as foreign:
        for name in foreign.layers:
            coded, packed = foreign.coded(name), artifact.packed(name)
            assert torch.equal(packed.signed_codes().short(), coded.codes.short() - 8)
            assert torch.equal(packed.scales, coded.scales.bfloat16())
        assert 0 < artifact.manifest.summary.relative_error < 2**-8


def test_layers_of_several_widths(export: Export, lbq: Lbq, tmp_path: Path) -> None:
    """A part of a fused unit that is wider widens the unit, which changes no weight; the head by itself."""
    layers = {"model.layers.0.self_attn.v_proj": {"bits": 8, "group_size": 64}}
    folder, out = export("auto_round", layer_config=layers), tmp_path / "out"
    done = lbq("import", folder, "--out", out, "--lm-head", "8")
    assert done.code == 0
    assert "q_proj and k_proj and v_proj: codes of 4 bits are stored in 8, with the same values (3 layers)" in done.err
    with open_artifact(out) as artifact:
        bits = {name.rpartition(".")[2]: (e.bits, e.group) for name, e in artifact.manifest.quantized.items()}
        assert {bits.pop(name) for name in ("q_proj", "k_proj", "v_proj")} == {(8, 32)}
        assert bits.pop("lm_head") == (8, 64)
        assert set(bits.values()) == {(4, 32)}
        with open_foreign(resolve(folder)) as foreign:
            for name in foreign.layers:
                assert torch.equal(artifact.packed(name).dequantize(), foreign.dense(f"{name}.weight"))


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--bits", "5"), 2, "5 bits are not supported"),
        (("--gs", "48"), 2, "group size 48"),
        (("--lm-head", "3"), 2, "--lm-head 3"),
        (("--bits", "3"), 2, "no exact image"),
        (("--gs", "row"), 2, "no exact image"),
    ],
)
def test_requests_refused(
    export: Export, lbq: Lbq, tmp_path: Path, options: tuple[str, ...], code: int, says: str
) -> None:
    done = lbq("import", export("auto_gptq"), "--out", tmp_path / "out", *options)
    assert (done.code, says in done.error) == (code, True), done.error
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_such_checkpoint(
    source: Path, export: Export, kept_artifact: Path, lbq: Lbq, tmp_path: Path
) -> None:
    assert lbq("import", source, "--out", tmp_path / "out").error == (
        f"{source}: not quantized; lbq convert {source} quantizes it"
    )
    assert "an lbq artifact already" in lbq("import", kept_artifact, "--out", tmp_path / "out").error
    assert "(GPTQ): lbq import makes" in lbq("convert", export("auto_gptq"), "--out", tmp_path / "out").error
    assert "an lbq artifact, quantized already" in lbq("convert", kept_artifact, "--out", tmp_path / "out").error
