"""A model in a GGUF file, as llama.cpp's converter writes it: names, spec, and rows in the order of Hugging Face.

The tokenizer is in the file too, in a form of its own, and is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path

import msgspec
import torch

from lbq.formats.disk import shown
from lbq.formats.errors import DataError
from lbq.formats.safetensors_file import Checkpoint, TensorInfo
from lbq.formats.spec import Llama3Scaling, ModelSpec, Rope
from lbq.quantizer.families import spec_of
from lbq.quantizer.foreign.coded import Coded
from lbq.quantizer.foreign.gguf_blocks import BlockType
from lbq.quantizer.foreign.gguf_file import GgufFile, Header, Value
from lbq.quantizer.foreign.layout import Stored, expect

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAME = re.compile(r"(?:blk\.([0-9]{1,4})\.)?([a-z_]+)\.(weight|bias)")
MARKER = "blocks"
ROPE = "rope_freqs.weight"


@dataclass(frozen=True)
class Gguf:
    """See :class:`lbq.quantizer.foreign.layout.Layout`."""

    blocks: Mapping[str, BlockType]  # by module
    tool: str
    notes: tuple[str, ...] = ()
    marker: str = MARKER

    def locate(self, checkpoint: Checkpoint, module: str, n: int, k: int) -> Stored:
        """See :class:`Layout`."""
        block = self.blocks[module]
        name = expect(checkpoint, f"{module}.{MARKER}", (torch.uint8,), (n, -(-k // block.block) * block.nbytes))
        return Stored(module, n, k, block.setting, (name,))

    def read(self, checkpoint: Checkpoint, stored: Stored) -> Coded:
        """See :class:`Layout`."""
        block, name = self.blocks[stored.module], stored.tensors[0]
        codes, scales, biases = block.read(checkpoint.tensor(name).reshape(-1, block.nbytes))
        for floats in (scales, biases):
            if floats is not None and not bool(torch.isfinite(floats).all()):
                raise DataError(f"{checkpoint.folder}: {shown(name)} has scales that are no numbers; fetch it again")
        return Coded(
            codes=codes.reshape(stored.n, stored.k),
            scales=scales.reshape(stored.n, -1),
            zeros=None,
            bits=block.setting.bits,
            group=block.setting.group_in(stored.k),
            biases=None if biases is None else biases.reshape(stored.n, -1),
        )

    def settle(self, checkpoint: Checkpoint, layers: Iterable[Stored]) -> Gguf:
        """Nothing lies here."""
        del checkpoint, layers
        return self


class _Model(GgufFile):
    """A GGUF file under the names, and with the rows in the order, of a Hugging Face checkpoint."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._order: dict[str, torch.Tensor] = {}
        tensors = self.header.tensors
        stretched = ROPE in tensors and ROPE not in self.header.blocks
        self.factors = super().tensor(ROPE).float() if stretched else None
        own = (name for name in tensors if name != ROPE or not stretched)
        self.own = {_hf_name(path, name, name in self.header.blocks): name for name in own}  # by ours
        self.tensors: Mapping[str, TensorInfo] = {
            name: replace(tensors[own], name=name) for name, own in self.own.items()
        }

    def rotate(self, heads: int, kv_heads: int) -> None:
        """llama.cpp pairs neighbouring dimensions of Llama's queries and keys; here halves are paired."""
        for name, info in self.tensors.items():
            for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
                if f".self_attn.{part}." in name:
                    if info.shape[0] % (2 * count):
                        raise DataError(
                            f"{self.path}: {name} has {info.shape[0]} rows, which {count} heads do not share"
                        )
                    rows = torch.arange(info.shape[0]).view(count, -1, 2)
                    self._order[name] = rows.transpose(1, 2).reshape(-1)

    def tensor(self, name: str) -> torch.Tensor:
        """See :meth:`MappedFile.tensor`; a copy where rows are reordered."""
        tensor = super().tensor(name)
        order = self._order.get(name)
        return tensor if order is None else tensor[order]


def open_gguf(path: Path, original: ModelSpec | None = None) -> tuple[ModelSpec, Checkpoint, Gguf]:
    """The spec, the tensors under the names of a Hugging Face checkpoint, and their layout; reads the header.

    ``original`` is the spec of the model that the file was made of, which then is the spec, but for the head: it says
    what the file does not. Raises DataError for a file that is broken, of another model, an architecture or a setting
    that lbq does not know, StorageError where it cannot be read.
    """
    file = _Model(path)
    try:
        parts = file.header.metadata.get("split.count", 1)
        if parts not in (0, 1):
            raise DataError(
                f"{path}: one of {parts} files of a model; join them by llama.cpp's llama-gguf-split --merge"
            )
        head = any(name.startswith("lm_head.") for name in file.own)
        spec = spec_of(msgspec.json.encode(_config(path, file.header, head)), path)
        if original is not None:
            _check_original(path, spec, original)
            spec = msgspec.structs.replace(original, tied=spec.tied)
        _check_rope(path, file.factors, spec)
        if _text(path, file.header.metadata, "general.architecture") == "llama":
            mixer = spec.layer(0).mixer
            file.rotate(mixer.heads, mixer.kv_heads)
        coded = {name: own for name, own in file.own.items() if own in file.header.blocks}
        blocks = {name.removesuffix(f".{MARKER}"): file.header.blocks[own] for name, own in coded.items()}
        kinds = sorted({block.name for block in blocks.values()})
        return spec, Checkpoint(path, {path.name: file}), Gguf(blocks, f"GGUF {'+'.join(kinds)}")
    except BaseException:
        file.close()
        raise


def rope_factors(rope: Rope) -> torch.Tensor | None:
    """What llama.cpp divides the frequencies by, float32 [dims/2], for Llama 3.1's stretch; None for other ropes."""
    scaling = rope.scaling
    if not isinstance(scaling, Llama3Scaling):
        return None
    lengths = 2 * torch.pi * rope.theta ** (torch.arange(0, rope.dims, 2, dtype=torch.float64) / rope.dims)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((scaling.original_context / lengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / scaling.factor + smooth)).float()


def _check_rope(path: Path, found: torch.Tensor | None, spec: ModelSpec) -> None:
    wanted = rope_factors(spec.layer(0).mixer.rope)
    if found is None and wanted is None:
        return
    if found is None or wanted is None or found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-3):
        raise DataError(f"{path}: a stretched rope ({ROPE}) that is not the original model's is not supported")


def _check_original(path: Path, spec: ModelSpec, original: ModelSpec) -> None:
    """Raise DataError if the model in a file, of which ``spec`` is known, is not ``original`` by its sizes and rope."""

    def facts(of: ModelSpec) -> dict[str, float]:
        mixer, mlp = of.layer(0).mixer, of.layer(0).mlp
        return {
            "layers": len(of.layers),
            "hidden size": of.hidden_size,
            "vocabulary": of.vocab_size,
            "heads": mixer.heads,
            "key heads": mixer.kv_heads,
            "head width": mixer.head_dim,
            "intermediate size": mlp.down.in_features,
            "rope theta": mixer.rope.theta,
            "norm eps": of.norm.eps,
        }

    for (what, found), wanted in zip(facts(spec).items(), facts(original).values(), strict=True):
        if not isclose(found, wanted, rel_tol=1e-5):
            raise DataError(f"{path}: {what} {found:g}, the original model's {wanted:g}: it was made of another model")


def _hf_name(path: Path, name: str, quantised: bool) -> str:
    found = NAME.fullmatch(name)
    layer, part, kind = found.groups() if found else (None, "", "")
    module = LAYER.get(part) if layer else TOP.get(part)
    if module is None:
        raise DataError(f"{path}: tensor {shown(name)} is not one that lbq knows")
    return f"{f'model.layers.{int(layer)}.' if layer else ''}{module}.{MARKER if quantised else kind}"


def _config(path: Path, header: Header, head: bool) -> dict[str, object]:
    """The ``config.json`` that says the same as the metadata. ``head``: there is one beside the embedding."""
    metadata = header.metadata
    kind = _text(path, metadata, "general.architecture")
    if kind not in ARCHITECTURES:
        raise DataError(f"{path}: architecture {shown(kind)} is not supported: {', '.join(ARCHITECTURES)} are")
    if _text(path, metadata, f"{kind}.rope.scaling.type", "none") != "none":
        raise DataError(f"{path}: a stretched rope in a GGUF file is not supported")
    shape = header.shapes.get("token_embd.weight")
    if shape is None or len(shape) != 2:
        raise DataError(f"{path}: token_embd.weight is missing or no matrix")

    def value(name: str, default: Value | None = None) -> Value | None:
        found = metadata.get(f"{kind}.{name}", default)
        return float(f"{found:.6g}") if isinstance(found, float) else found  # single precision made of a decimal

    head_dim, rotated = value("attention.key_length"), value("rope.dimension_count")
    if head_dim is not None and rotated is not None and head_dim != rotated:
        raise DataError(f"{path}: rope over {rotated} of {head_dim} dimensions is not supported")
    return {
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": shape[0],
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "head_dim": head_dim if rotated is None else rotated,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "tie_word_embeddings": not head,
    }


def _text(path: Path, metadata: Mapping[str, Value], name: str, default: str | None = None) -> str:
    value = metadata.get(name, default)
    if not isinstance(value, str):
        raise DataError(f"{path}: {name} is missing or no text")
    return value
