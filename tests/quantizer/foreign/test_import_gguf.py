"""lbq import of GGUF files: of lbq's own, which come back as they were, and of those that the gguf package wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hub_stub import Hub
from safetensors.torch import load_file

from lbq.conversion import convert
from lbq.formats.artifact import open_artifact
from lbq.formats.manifest import Import
from lbq.quantizer.export import export
from lbq.quantizer.foreign import open_foreign
from lbq.quantizer.foreign.gguf import LAYER, TOP
from lbq.quantizer.foreign.importing import find_source, import_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

Lbq = Callable[..., Any]
Write = Callable[..., Path]
PLAIN = {"use_sliding_window": None, "sliding_window": None}


@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("smollm2", 8), ("qwen2", 4), ("qwen3", 8), ("mistral", 4)])
def test_there_and_back(write_checkpoint: Write, tmp_path: Path, family: str, bits: int) -> None:
    """The same codes, scales and 16-bit tensors, rotary rows and Llama 3.1's stretch included."""
    source = write_checkpoint(tmp_path / "source", family, **PLAIN)
    made = convert(source, tmp_path / "made", bits=bits, group=32, lm_head=16, device="cpu")
    file = export(made.path, "gguf", tmp_path / "gguf").path / "made.gguf"
    back = import_checkpoint(file, tmp_path / "back", original=made.path if family == "qwen2" else source, strict=True)
    assert back.manifest.quantized == made.manifest.quantized
    assert back.manifest.spec == made.manifest.spec
    assert (back.manifest.summary.cosine, back.manifest.source.name) == (1.0, "made")
    assert {"made.gguf", "config.json", "tokenizer.json"} <= back.manifest.source.files.keys()
    assert back.manifest.method == Import({}, bits, 32, 16, origin=f"GGUF {'Q4_0' if bits == 4 else 'Q8_0'}")
    one, other = (load_file(path / "model.safetensors") for path in (made.path, back.path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def original(write_checkpoint: Write, tmp_path: Path) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}
    return write_checkpoint(tmp_path / "original", "qwen3", **sizes)


@pytest.fixture
def write(original: Path, tmp_path: Path) -> Callable[[Kind], Path]:
    """``write(kind)``: a file with all matrices of a kind; blocks that the package cannot make are random."""

    def blocks(values: np.ndarray[Any, Any], kind: Kind) -> np.ndarray[Any, Any]:
        try:
            return gguf.quantize(values, kind)
        except NotImplementedError:
            block, nbytes = gguf.GGML_QUANT_SIZES[kind]
            random = np.random.default_rng(0)
            raw = random.integers(0, 256, (values.size // block, nbytes), dtype=np.uint8)
            for at in {Kind.Q6_K: (208,), Kind.Q3_K: (108,), Kind.Q2_K: (80, 82)}.get(kind, (0, 2)):
                raw[:, at : at + 2] = random.normal(0, 1e-3, (len(raw), 1)).astype(np.float16).view(np.uint8)
            return raw.reshape(values.shape[0], -1)

    def theirs(module: str) -> str:
        if module in TOP.values():
            return next(own for own, ours in TOP.items() if ours == module)
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{next(own for own, ours in LAYER.items() if ours == rest)}"

    def run(kind: Kind) -> Path:
        with open_artifact(convert(original, tmp_path / "plain", group=32, device="cpu").path) as artifact:
            written = export(artifact.folder, "gguf", tmp_path / "template").path / "plain.gguf"
        path = tmp_path / f"{kind.name}.gguf"
        writer = gguf.GGUFWriter(path, "qwen3")
        for field in gguf.GGUFReader(written).fields.values():
            if field.name.startswith("qwen3."):
                writer.add_key_value(field.name, field.contents(), field.types[0])
        for name, tensor in load_file(original / "model.safetensors").items():
            module, _, suffix = name.rpartition(".")
            wanted = kind if tensor.dim() == 2 and "embed" not in name else Kind.F32
            data = tensor.float().numpy() if wanted == Kind.F32 else blocks(tensor.float().numpy(), wanted)
            writer.add_tensor(f"{theirs(module)}.{suffix}", data, raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return run


@pytest.mark.parametrize(
    ("kind", "bits", "says"),
    [
        (Kind.Q4_0, 4, None),
        (Kind.Q8_0, 8, "float16 scales that BF16 does not hold"),
        (Kind.Q5_0, 8, None),
        (Kind.Q4_1, 4, "asymmetric"),
        (Kind.Q4_K, 4, "asymmetric"),
        (Kind.Q5_K, 8, "asymmetric"),
        (Kind.Q6_K, 8, "groups of 16"),
        (Kind.Q3_K, 3, "groups of 16"),
        (Kind.Q2_K, 3, "asymmetric"),
    ],
)
def test_block_types(
    write: Callable[[Kind], Path], original: Path, lbq: Lbq, tmp_path: Path, kind: Kind, bits: int, says: str | None
) -> None:
    """Exact where codes and scales fit; else refused, and requantised with a word about it."""
    path, out = write(kind), tmp_path / "out"
    done = lbq("import", path, "--original", original, "--out", out)
    if says is None:
        assert done.code == 0, done.err
    else:
        assert (done.code, says in done.error) == (2, True), done.error
        assert not out.exists()
        assert (
            "refused under --strict"
            in lbq("import", path, "--original", original, "--out", out, "--requantize", "--strict").error
        )
        done = lbq("import", path, "--original", original, "--out", out, "--requantize")
        assert done.code == 0, done.err
        assert "note: " in done.err
    source = find_source(path, original, None)
    with open_artifact(out) as artifact, open_foreign(source) as foreign:
        assert {entry.bits for entry in artifact.manifest.quantized.values()} == {bits}
        for name in foreign.layers:
            ours, theirs = artifact.packed(name).dequantize(), foreign.dense(f"{name}.weight")
            error = float((ours - theirs).norm() / theirs.norm())
            assert error == 0 if says is None else error < 0.3
    assert lbq("verify", out).code == 0
    assert lbq("run", out, "-p", "hello", "--max-tokens", "2").code == 0


def test_faults(
    write: Callable[[Kind], Path], write_checkpoint: Write, original: Path, lbq: Lbq, tmp_path: Path
) -> None:
    path, out = write(Kind.Q4_0), tmp_path / "out"
    for command in ("convert", "inspect"):
        assert f"a GGUF file; lbq import {path} --original MODEL" in lbq(command, path).error
    assert "--original MODEL" in lbq("import", path, "--out", out).error
    done = lbq("import", tmp_path / "none.gguf", "--original", original, "--out", out)
    assert (done.code, done.error) == (4, f"{tmp_path / 'none.gguf'}: no such file")
    assert "--original is for GGUF files" in lbq("import", original, "--original", original, "--out", out).error
    other = write_checkpoint(
        tmp_path / "other", "qwen3", hidden_size=256, intermediate_size=544, num_hidden_layers=1, head_dim=64
    )
    done = lbq("import", path, "--original", other, "--out", out)
    assert (done.code, "intermediate size 512, the original model's 544" in done.error) == (3, True)
    path.write_bytes(path.read_bytes()[:-100])
    assert lbq("import", path, "--original", original, "--out", out).code == 3
    assert lbq("import", tmp_path / "none.gguf", "--original", original, "--out", out).code in (2, 4)
    assert not out.exists()


def test_an_original_on_the_hub(
    hub: Hub, write: Callable[[Kind], Path], original: Path, lbq: Lbq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its small files are fetched, its weights are not."""
    card = b"---\nlicense: mit\n---\n"
    hub.add("user/model", {"README.md": card, **{path.name: path.read_bytes() for path in original.iterdir()}})
    monkeypatch.chdir(tmp_path)
    path = write(Kind.Q4_0)
    done = lbq("import", path, "--original", "user/model")
    assert done.code == 0, done.err
    assert not any(name.endswith(".safetensors") for name in hub.fetched())
    assert {"config.json", "tokenizer.json"} <= set(hub.fetched())
    with open_artifact(tmp_path / "Q4_0-lbq") as artifact:
        assert artifact.manifest.source.license is not None
    assert lbq("verify", "Q4_0-lbq").code == 0
