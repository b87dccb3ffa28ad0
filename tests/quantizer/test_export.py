"""lbq export: what other tools' own code makes of the files, and what comes back by lbq import."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lbq.conversion import convert
from lbq.formats.artifact import Artifact, open_artifact
from lbq.formats.errors import UsageError
from lbq.formats.manifest import QuantizedModule, read_manifest
from lbq.formats.packing import PackedWeight
from lbq.quantizer.export import export
from lbq.quantizer.export.ranks import for_ranks
from lbq.quantizer.foreign.importing import import_checkpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]  # of the packages' own

Lbq = Callable[..., Any]
WIDTHS = {"hidden_size": 512, "intermediate_size": 256, "vocab_size": 288, "num_hidden_layers": 1, "head_dim": 32}
SPLIT = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def made(write_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``made(bits, group, **options)``: an artifact; each made once."""
    root = tmp_path_factory.mktemp("export")
    source = write_checkpoint(root / "source", "qwen3", num_attention_heads=4, num_key_value_heads=2, **WIDTHS)
    found: dict[str, Path] = {}

    def make(bits: int = 4, group: int | str = 256, **options: Any) -> Path:
        key = f"{bits}-{group}-{'-'.join(map(str, options.values()))}".replace("/", "")
        if key not in found:
            found[key] = convert(source, root / key, bits=bits, group=group, device="cpu", **options).path
        return found[key]

    return make


def same_weights(one: Artifact, other: Artifact) -> None:
    """Codes and scales, the latter repeated where groups are smaller; and all 16-bit tensors of ``other``."""
    for name, entry in other.manifest.quantized.items():
        expected = one.packed(name)
        assert entry.bits == expected.bits
        packed = other.packed(name)
        assert torch.equal(packed.words, expected.words)
        assert torch.equal(packed.scales, expected.regrouped(entry.group).scales)
    for name in one.manifest.dense:
        assert torch.equal(one.dense(name), other.dense(name))


@pytest.mark.parametrize("to", ["vllm", "sglang"])
def test_what_conversion_for_readers_writes(made: Callable[..., Path], lbq: Lbq, tmp_path: Path, to: str) -> None:
    """The weights' file is byte by byte that of ``lbq convert --for``; the result verifies and runs."""
    out = tmp_path / "out"
    assert lbq("export", made(4, 256), "--to", to, "--out", out).code == 0
    direct = made(4, 256, readers=[to])
    if to == "vllm":
        assert (out / "model.safetensors").read_bytes() == (direct / "model.safetensors").read_bytes()
        assert read_manifest(out).quantized == read_manifest(direct).quantized
        assert read_manifest(out).summary == read_manifest(direct).summary
    with open_artifact(made(4, 256)) as one, open_artifact(out) as other:
        assert {entry.scheme.group for entry in other.manifest.quantized.values()} <= {128, None}
        assert other.manifest.method.readers == (to,)
        same_weights(one, other)
        # SGLang has no kernel for a head of 288 rows; BF16 stands for it
        assert ("lm_head" in other.manifest.quantized) == (to == "vllm")
        if to == "sglang":
            whole = one.packed("lm_head").dequantize().bfloat16()
            assert torch.equal(other.dense("lm_head.weight"), whole)
            assert other.manifest.notes[-1].startswith("the head is stored as bfloat16, rounded from")
    assert lbq("verify", out).code == 0
    assert lbq("run", out, "-p", "hello", "--max-tokens", "2").code == 0


CASES = [("gptq", 4, 256), ("gptq", 3, 64), ("gptq", 8, "row"), ("auto-round", 4, 32), ("awq", 4, 256)]


@pytest.mark.parametrize(("to", "bits", "group"), CASES)
def test_there_and_back(made: Callable[..., Path], tmp_path: Path, to: str, bits: int, group: int | str) -> None:
    """Codes and scales come back as they were, since these scales are exact in float16."""
    artifact = made(bits, group)
    done = export(artifact, to, tmp_path / "other")
    assert all(note.startswith("the head is stored as bfloat16") for note in done.notes)
    import_checkpoint(done.path, tmp_path / "back", strict=True)
    with open_artifact(artifact) as one, open_artifact(tmp_path / "back") as other:
        assert one.manifest.quantized.keys() - other.manifest.quantized.keys() == (
            {"lm_head"} if to == "awq" else set()
        )
        same_weights(one, other)
        assert other.manifest.summary.cosine == 1.0


def by_autoround(folder: Path, module: str, packed: PackedWeight) -> torch.Tensor:
    """A layer as AutoRound's own code for the CPU dequantises GPTQ's and AWQ's tensors."""
    tensors = load_file(folder / "model.safetensors")
    words, zeros, scales = (tensors[f"{module}.{name}"] for name in ("qweight", "qzeros", "scales"))
    if words.shape[0] == packed.k:
        from auto_round.export.export_to_awq.utils import dequantize_gemm

        whole: torch.Tensor = dequantize_gemm(words, zeros, scales.float(), packed.bits, packed.k // scales.shape[0])
        return whole.t()
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    linear = QuantLinear(packed.bits, packed.k // scales.shape[0], packed.k, packed.n, bias=False)
    linear.qweight, linear.qzeros, linear.scales = words, zeros, scales.float()
    result: torch.Tensor = linear(torch.eye(packed.k)).t()
    return result


@pytest.mark.parametrize(("to", "bits", "group"), CASES)
def test_autoround_dequantizes_to_the_same(
    made: Callable[..., Path], tmp_path: Path, to: str, bits: int, group: int | str
) -> None:
    done = export(made(bits, group), to, tmp_path / "other")
    with open_artifact(made(bits, group)) as artifact:
        for name in artifact.manifest.quantized.keys() - {"lm_head"}:
            packed = artifact.packed(name)
            assert torch.equal(by_autoround(done.path, name, packed), packed.dequantize())


def logits_of(folder: Path) -> torch.Tensor:
    """By transformers, on a CPU, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.arange(0, 160, 5).unsqueeze(0)).logits[0].float()
    return logits


def test_transformers_loads_autoround(made: Callable[..., Path], tmp_path: Path) -> None:
    artifact = made(4, 128, overrides=("down_proj=8",))
    done = export(artifact, "auto-round", tmp_path / "other")
    ours, theirs = logits_of(artifact), logits_of(done.path)
    assert ours.std() > 0.1
    assert (ours - theirs).abs().max() < 2e-2 * ours.abs().max()  # AutoRound's backend computes in 16 bits


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 256), (3, 128), (8, "row")])
def test_gguf(made: Callable[..., Path], tmp_path: Path, bits: int, group: int | str) -> None:
    """The gguf package dequantises to the same numbers, bit by bit."""
    import gguf

    artifact = made(bits, group)
    done = export(artifact, "gguf", tmp_path / "out")
    (path,) = done.path.iterdir()
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["general.architecture"].contents() == "qwen3"
    with open_artifact(artifact) as opened:
        for name, place in (
            ("lm_head", "output"),
            ("self_attn.q_proj", "blk.0.attn_q"),
            ("mlp.down_proj", "blk.0.ffn_down"),
        ):
            module = name if name == "lm_head" else f"model.layers.0.{name}"
            tensor = tensors.pop(f"{place}.weight")
            expected = opened.packed(module).dequantize().numpy()
            assert np.array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), expected)
            assert tensor.tensor_type.name == ("Q8_0" if bits == 8 or name == "lm_head" else "Q4_0")
        assert len(tensors) == len(opened.manifest.quantized) + len(opened.manifest.dense) - 3


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_the_gguf(write_checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """Names, the order of rotary rows, biases and metadata: the same logits as of the artifact."""
    from transformers import AutoModelForCausalLM

    plain = {"rope_scaling": None, "use_sliding_window": None, "sliding_window": None}  # of which the reader knows less
    source = write_checkpoint(tmp_path / "source", family, **plain)
    artifact = convert(source, tmp_path / "artifact", group=32, device="cpu").path
    done = export(artifact, "gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(done.path, gguf_file="artifact.gguf", dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(torch.arange(0, 160, 5).unsqueeze(0)).logits[0]
    ours = logits_of(artifact)
    assert (ours - theirs).abs().max() < 1e-4


def test_scales_that_float16_does_not_hold(write_checkpoint: Callable[..., Path], lbq: Lbq, tmp_path: Path) -> None:
    """A little too small: rounded, said, refused under --strict; far too small: refused."""

    def shrink(factor: float) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda tensors: tensors[f"{SPLIT}.weight"].mul_(factor)

    near = convert(write_checkpoint(tmp_path / "near", edit=shrink(1e-4)), tmp_path / "a", group=32, device="cpu").path
    done = lbq("export", near, "--to", "gptq", "--out", tmp_path / "gptq")
    assert done.code == 0
    assert "scales of 1 layer are rounded to float16: a weight changes by at most" in done.err
    assert "refused under --strict" in lbq("export", near, "--to", "gptq", "--strict", "--out", tmp_path / "b").error
    far = convert(write_checkpoint(tmp_path / "far", edit=shrink(1e-9)), tmp_path / "c", group=32, device="cpu").path
    for to in ("gptq", "awq", "auto-round", "gguf"):
        done = lbq("export", far, "--to", to, "--out", tmp_path / "b")
        assert (done.code, f"{SPLIT} has scales from" in done.error) == (2, True)
    assert lbq("export", far, "--to", "vllm", "--out", tmp_path / "vllm").code == 0
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("artifact", "to", "says"),
    [
        ({"bits": 8}, "awq", "INT8: AWQ has INT4 alone"),
        ({"bits": 3}, "sglang", "sglang cannot run model.layers.0.self_attn.q_proj (INT3)"),
        ({"overrides": ("down_proj=8",)}, "awq", "mlp.down_proj: INT8: AWQ has INT4 alone"),
    ],
)
def test_no_place_for_a_layer(
    made: Callable[..., Path], tmp_path: Path, artifact: dict[str, Any], to: str, says: str
) -> None:
    folder = made(**artifact)
    with pytest.raises(UsageError) as error:
        export(folder, to, tmp_path / "out")
    assert says in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_windows_are_refused_by_gguf(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    artifact = convert(checkpoints["mistral"], tmp_path / "artifact", group=32, device="cpu").path
    with pytest.raises(UsageError, match="layers see 9 tokens back"):
        export(artifact, "gguf", tmp_path / "out")


def test_faults(made: Callable[..., Path], lbq: Lbq, tmp_path: Path) -> None:
    artifact = made(4, 256)
    with pytest.raises(UsageError, match="--to x"):
        export(artifact, "x")
    assert lbq("export", artifact, "--to", "x").code == 2
    assert lbq("export", tmp_path, "--to", "gptq").code == 3
    assert lbq("export", artifact, "--to", "gptq", "--out", artifact).code == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert lbq("export", artifact, "--to", "gptq", "--out", tmp_path / "full", "--overwrite").code == 4


def test_overwriting(made: Callable[..., Path], lbq: Lbq, tmp_path: Path) -> None:
    """An artifact gives way when asked for, and nothing else does."""
    artifact, out = made(4, 256), tmp_path / "out"
    command = ("export", artifact, "--out", out, "--to")
    assert lbq(*command, "vllm").code == 0
    done = lbq(*command, "vllm")
    assert (done.code, "--overwrite to replace it" in done.error) == (4, True)
    assert lbq(*command, "gptq", "--overwrite").code == 0
    assert "not an lbq artifact" in lbq(*command, "vllm", "--overwrite").error
    assert not (out / "lbq.json").exists()


def test_overwriting_a_gguf(made: Callable[..., Path], lbq: Lbq, tmp_path: Path) -> None:
    """An earlier export has the same name and stands alone; what does not is somebody else's."""
    artifact, out = made(4, 256), tmp_path / "out"
    command = ("export", artifact, "--out", out, "--to", "gguf")
    assert lbq(*command).code == 0
    (path,) = out.iterdir()
    path.write_bytes(b"of before")
    done = lbq(*command)
    assert (done.code, "--overwrite to replace it" in done.error) == (4, True)
    assert lbq(*command, "--overwrite").code == 0
    assert path.read_bytes()[:4] == b"GGUF"
    (out / "other").write_text("")
    assert "not an lbq artifact" in lbq(*command, "--overwrite").error
    (out / "other").unlink()
    path.rename(out / "other.gguf")
    assert "not an lbq artifact" in lbq(*command, "--overwrite").error


def test_groups_for_ranks(made: Callable[..., Path], lbq: Lbq, tmp_path: Path) -> None:
    """Layers that are split by inputs get groups that divide a rank's; all others stay."""
    out = tmp_path / "out"
    assert lbq("export", made(4, 64), "--to", "vllm", "--tensor-parallel", "4", "--out", out).code == 0
    with open_artifact(made(4, 64)) as one, open_artifact(out) as other:
        groups = {name.rpartition(".")[2]: entry.group for name, entry in other.manifest.quantized.items()}
        assert {name for name, group in groups.items() if group == 32} == {"o_proj"}  # of 128 inputs
        assert groups["down_proj"] == 64
        same_weights(one, other)


@pytest.mark.parametrize(
    ("artifact", "options", "says"),
    [
        ((4, 64), ("vllm", "3"), "4 heads do not divide between 3 ranks"),
        ((4, 64), ("vllm", "8"), "4 heads do not divide between 8 ranks"),
        ((4, 64), ("vllm", "0"), "--tensor-parallel 0: 1 or more"),
        ((4, 64), ("gptq", "2"), "--tensor-parallel is for vllm and sglang"),
        ((4, 64), ("sglang", "4"), "no kernel for the shape"),
    ],
)
def test_ranks_refused(
    made: Callable[..., Path], lbq: Lbq, tmp_path: Path, artifact: tuple[int, int], options: tuple[str, str], says: str
) -> None:
    to, ranks = options
    done = lbq("export", made(*artifact), "--to", to, "--tensor-parallel", ranks, "--out", tmp_path / "out")
    assert (done.code, says in done.error) == (2, True), done.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bits", "k", "group", "ranks", "wanted"),
    [
        (4, 896, 128, 2, 64),
        (4, 4864, 128, 4, 64),
        (4, 896, None, 2, None),
        (8, 4096, 256, 8, 256),
        (4, 96, 32, 2, "do not divide into groups of 32"),
        (4, 100, None, 10, "no whole words of INT4"),
    ],
)
def test_groups_of_a_rank(bits: int, k: int, group: int | None, ranks: int, wanted: int | str | None) -> None:
    entry = QuantizedModule(64, k, bits, group or k)
    if isinstance(wanted, str):
        with pytest.raises(UsageError, match=wanted):
            for_ranks("model.layers.0.mlp.down_proj", entry, ranks, "here")
    else:
        assert for_ranks("model.layers.0.mlp.down_proj", entry, ranks, "here").scheme.group == wanted
        assert for_ranks("model.layers.0.mlp.up_proj", entry, ranks, "here") == entry
