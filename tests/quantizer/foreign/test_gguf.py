"""GGUF files that the gguf package wrote: blocks as it dequantises them, models as transformers reads them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lbq.evaluation import compare
from lbq.formats.errors import DataError
from lbq.formats.packing import PackedWeight
from lbq.quantizer.families import read_spec
from lbq.quantizer.foreign import ForeignCheckpoint, NoImage, open_foreign
from lbq.quantizer.foreign.gguf import LAYER, TOP
from lbq.quantizer.foreign.gguf_blocks import BLOCK_TYPES
from lbq.quantizer.original import open_original
from lbq.quantizer.source import SourceFolder, resolve

Write = Callable[..., Path]
Kinds = Callable[[str], Kind]


def opened(path: Path) -> ForeignCheckpoint:
    return open_foreign(SourceFolder(path, path.name))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(checkpoint, kinds, **metadata)``: as llama.cpp's converter names and orders a checkpoint's tensors."""

    def run(checkpoint: Path, kinds: Kinds = lambda _: Kind.Q8_0, **metadata: object) -> Path:
        spec = read_spec(checkpoint).spec
        arch = {"llama": "llama", "smollm2": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}[checkpoint.name]
        mixer = spec.layer(0).mixer
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, arch)
        writer.add_block_count(len(spec.layers))
        writer.add_context_length(spec.context)
        writer.add_embedding_length(spec.hidden_size)
        writer.add_feed_forward_length(spec.layer(0).mlp.down.in_features)
        writer.add_head_count(mixer.heads)
        writer.add_head_count_kv(mixer.kv_heads)
        writer.add_key_length(mixer.head_dim)
        writer.add_rope_dimension_count(mixer.head_dim)
        writer.add_rope_freq_base(mixer.rope.theta)
        writer.add_layer_norm_rms_eps(spec.norm.eps)
        writer.add_vocab_size(spec.vocab_size)
        writer.add_token_list([f"t{i}" for i in range(spec.vocab_size)])
        for key, value in metadata.items():
            writer.add_string(f"{arch}.{key.replace('__', '.')}", str(value))
        for name, tensor in load_file(checkpoint / "model.safetensors").items():
            module, _, suffix = name.rpartition(".")
            values = tensor.float()
            for leaf, heads in (("q_proj", mixer.heads), ("k_proj", mixer.kv_heads)):
                if module.endswith(leaf) and arch == "llama":  # as convert_hf_to_gguf.py permutes
                    values = values.view(heads, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
            kind = kinds(name) if tensor.dim() == 2 else Kind.F32
            data = values.numpy() if kind == Kind.F32 else gguf.quantize(values.numpy(), kind)
            writer.add_tensor(f"{theirs(module)}.{suffix}", data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return run


def theirs(module: str) -> str:
    for own, ours in TOP.items():
        if module == ours:
            return own
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{next(own for own, ours in LAYER.items() if ours == rest)}"


@pytest.mark.parametrize("number", BLOCK_TYPES)
def test_blocks_as_the_package_dequantizes_them(number: int) -> None:
    kind, block = Kind(number), BLOCK_TYPES[number]
    assert (block.name, (block.block, block.nbytes)) == (kind.name, gguf.GGML_QUANT_SIZES[kind])
    random = np.random.default_rng(number)
    raw = random.integers(0, 256, (50, block.nbytes), dtype=np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind.name, (0, 2) if block.nbytes != 18 else (0,))
    halves = (0,) if kind.name in ("Q5_0", "Q8_0") else halves
    for at in halves:  # random bytes may be no number
        raw[:, at : at + 2] = random.normal(size=(50, 1)).astype(np.float16).view(np.uint8)
    codes, scales, biases = block.read(torch.from_numpy(raw))
    grouped = codes.float().unflatten(1, (scales.shape[1], -1))
    assert grouped.shape[2] == block.setting.group
    middle = float(1 << (block.setting.bits - 1))
    scaled = scales.float()[..., None] * (grouped if biases is not None else grouped - middle)
    found = scaled if biases is None else scaled + biases.float()[..., None]
    assert int(codes.max()) < 1 << block.setting.bits
    assert (biases is None) == block.setting.symmetric
    assert torch.equal(found.flatten(1), torch.from_numpy(gguf.dequantize(raw, kind)))


def mixed(name: str) -> Kind:
    kinds = {"q_proj": Kind.Q4_0, "k_proj": Kind.Q5_0, "v_proj": Kind.Q4_1, "o_proj": Kind.F16, "up_proj": Kind.Q5_1}
    return next((kind for leaf, kind in kinds.items() if leaf in name), Kind.Q8_0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["smollm2", "qwen2"])
def test_models_as_transformers_reads_them(checkpoints: Mapping[str, Path], write: Write, family: str) -> None:
    path = write(checkpoints[family], mixed)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with opened(path) as found:
        assert found.spec.tied
        assert found.tool == "GGUF Q4_0+Q4_1+Q5_0+Q5_1+Q8_0"
        assert "model.layers.0.self_attn.o_proj" not in found.layers
        for name, parameter in model.named_parameters():
            assert torch.equal(found.dense(name).float(), parameter.detach()), name
        with open_original(resolve(checkpoints[family])) as original:
            assert found.spec.layer(0).mixer.rope == original.spec.layer(0).mixer.rope
            assert found.spec.norm == original.spec.norm


def test_untied_heads_and_norms_of_queries(checkpoints: Mapping[str, Path], write: Write) -> None:
    with opened(write(checkpoints["qwen3"])) as found, open_original(resolve(checkpoints["qwen3"])) as original:
        assert not found.spec.tied
        assert found.spec == original.spec
        for name, _ in found.spec.norms():
            assert torch.equal(found.dense(f"{name}.weight"), original.dense(f"{name}.weight").float())
        for p in found.spec.projections():
            ours, wanted = found.dense(f"{p.name}.weight"), original.dense(f"{p.name}.weight").float()
            assert float((ours - wanted).norm() / wanted.norm()) < 0.01
            assert found.nbytes(p.name) == p.out_features * p.in_features // 32 * 34


def test_exact_images(checkpoints: Mapping[str, Path], write: Write) -> None:
    """An eighth of a BF16 weight is a BF16 scale, a 127th is not."""
    name = "model.layers.0.mlp.down_proj"
    with opened(write(checkpoints["qwen3"], lambda _: Kind.Q4_0)) as found:
        image = found.image(name)
        assert isinstance(image, PackedWeight)
        assert (image.bits, image.group) == (4, 32)
        assert torch.equal(image.dequantize(), found.dense(f"{name}.weight"))
    with opened(write(checkpoints["qwen3"], lambda _: Kind.Q8_0)) as found:
        assert found.image(name) == NoImage("float16 scales that BF16 does not hold")
    with opened(write(checkpoints["qwen3"], lambda _: Kind.Q5_0)) as found:
        assert found.image(name) == NoImage("5 bits")


@pytest.mark.usefixtures("one_thread")
def test_beside_others(checkpoints: Mapping[str, Path], write: Write, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The lighthouse keeper climbed the stairs each evening at the same hour. " * 5)
    path = write(checkpoints["smollm2"], lambda _: Kind.Q8_0)
    found = compare([path], checkpoints["smollm2"], tmp_path / "text.txt", context=64, device="cpu").models[0]
    assert (found.model, found.storage.tool) == (str(path), "GGUF Q8_0")
    assert found.storage.bits_per_weight == 8.5
    assert found.notes == ("no tokenizer.json: it reads the original's tokens",)
    assert found.scores is not None
    assert 0 < found.scores.kl.mean < 0.01


def test_stretched_ropes_are_refused(checkpoints: Mapping[str, Path], write: Write) -> None:
    with pytest.raises(DataError, match="stretched rope"):
        opened(write(checkpoints["qwen3"], rope__scaling__type="yarn"))


def test_parts_of_a_model_are_refused(checkpoints: Mapping[str, Path], write: Write, tmp_path: Path) -> None:
    whole = write(checkpoints["qwen3"])
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "qwen3")
    writer.add_uint16("split.count", 2)
    for tensor in reader.tensors[:3]:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(DataError, match=r"part.gguf: one of 2 files of a model; join them"):
        opened(tmp_path / "part.gguf")


def header(*, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, entries: int = 0, rest: bytes = b"") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "cut short inside the header"),
        (header(magic=b"GGML"), "not a GGUF file"),
        (header(version=1), "version 1"),
        (header(entries=1 << 62), "cut short inside the header"),
        (header(tensors=1 << 62), "cut short inside the header"),
        (header(entries=1, rest=struct.pack("<Q", 1 << 63)), "cut short inside the header"),
        (header(entries=1, rest=text("a") + struct.pack("<I", 77)), "metadata of type 77"),
        (header(entries=1, rest=text("a") + struct.pack("<IIQ", 9, 9, 1)), "metadata of type 9"),
        (header(entries=1, rest=text("a") + struct.pack("<IIQ", 9, 4, 1 << 61)), "cut short inside the header"),
        (header(entries=2, rest=2 * (text("a") + struct.pack("<IB", 7, 1))), "'a' stands twice"),
        (header(entries=1, rest=text("general.alignment") + struct.pack("<II", 4, 0)), "general.alignment is 0"),
        (header(tensors=1, rest=entry("a", ())), "0 dimensions"),
        (header(tensors=1, rest=entry("a", (1,) * 5)), "5 dimensions"),
        (header(tensors=1, rest=entry("a", (0, 2))), "impossible shape"),
        (header(tensors=1, rest=entry("a", (1 << 32, 1 << 32))), "impossible shape"),
        (header(tensors=1, rest=entry("a", (4,), 16)), "type 16"),
        (header(tensors=1, rest=entry("a", (33,), 8)), "33 inputs do not divide into blocks of 32"),
        (header(tensors=2, rest=entry("a", (4,)) + entry("a", (4,))), "'a' stands twice"),
        (header(tensors=1, rest=entry("a", (4,))), "cut short inside tensor 'a'"),
        (header(tensors=1, rest=entry("a", (4,), 0, 64) + bytes(200)), "does not follow"),
        (header(tensors=2, rest=entry("a", (16,)) + entry("b", (16,), 0, 32) + bytes(200)), "does not follow"),
        (header(tensors=1, rest=entry("a", (4,)) + bytes(200)), "bytes after the last tensor"),
        (header(tensors=1, rest=entry("a", (4,)) + bytes(40)), "'a' is not one that lbq knows"),
        (header(), "general.architecture is missing"),
    ],
)
def test_broken_files(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(DataError, match=says) as error:
        opened(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.9999])
def test_files_that_were_cut(checkpoints: Mapping[str, Path], write: Write, keep: float) -> None:
    path = write(checkpoints["qwen3"])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError, match="cut short"):
        opened(path)
