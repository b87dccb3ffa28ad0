"""GGUF files: Q4_0 and Q8_0 blocks of 32 codes and a float16 scale hold lbq's symmetric codes exactly.

A Q8_0 block is d (float16) and 32 int8 codes; a Q4_0 block d and 16 bytes, byte j holding code j low and code j + 16
high, each plus 8; a weight is d · code. A scale of a larger group is repeated. Read in the gguf package's ``quants``
and llama.cpp's ``ggml-quants.c``; names, metadata and the order of rotary rows in ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from lbq.formats import json_file
from lbq.formats.artifact import Artifact
from lbq.formats.disk import storage_errors
from lbq.formats.errors import UsageError
from lbq.formats.manifest import QuantizedModule
from lbq.formats.packing import PackedWeight
from lbq.formats.spec import Llama3Scaling
from lbq.formats.staging import StagedFolder
from lbq.formats.tokenizer_file import TOKENIZER
from lbq.quantizer.export.gguf_tokenizer import tokenizer_of
from lbq.quantizer.export.layouts import SCALES
from lbq.quantizer.export.plan import Layers, check_scales
from lbq.quantizer.foreign.gguf import rope_factors

if TYPE_CHECKING:
    from gguf import GGUFWriter

BLOCK = 32
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOPS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
"""Modules → tensors of llama.cpp's models."""

OnProgress = Callable[[str, int], None]


class _Config(msgspec.Struct):
    architectures: list[str] = []


def gguf_layers(artifact: Artifact) -> Layers:
    """An artifact's layers as blocks; reads scales. Raises UsageError for a model, a layer or a scale that the file
    has no place for."""
    if find_spec("gguf") is None:
        raise UsageError('the gguf package is not installed: pip install "lbq[gguf]"')
    _architecture(artifact)
    _check_spec(artifact)
    entries: dict[str, QuantizedModule] = {}
    for name, entry in artifact.manifest.quantized.items():
        if entry.group % BLOCK:
            raise UsageError(
                f"{artifact.folder}: {name} has {entry.k} inputs and one scale a row; GGUF's blocks are of {BLOCK} "
                f"inputs: --keep it in BF16 at conversion, or choose a group of {BLOCK} to 512 that divides its inputs"
            )
        entries[name] = msgspec.structs.replace(entry, group=BLOCK, bits=max(entry.bits, 4))
    notes = check_scales(artifact, entries)
    if any(entry.bits == 3 for entry in artifact.manifest.quantized.values()):
        notes.append("3-bit codes are stored in the 4 bits of Q4_0, with the same values")
    if tokenizer_of(artifact) is None:
        notes.append(
            f"{TOKENIZER} is not a byte-level BPE that llama.cpp has a name for: the file has no tokenizer, and "
            "llama.cpp's server does not start with it"
        )
    return Layers(entries, None, tuple(notes))


def write_gguf(
    artifact: Artifact, entries: Mapping[str, QuantizedModule], stage: StagedFolder, name: str, on_progress: OnProgress
) -> None:
    """Write the whole model into the file ``name`` of a staged folder. Raises StorageError."""
    from gguf import GGUFWriter

    path = stage.path(name)
    part = path.with_name(f"{name}.part")
    with storage_errors(path), closing(GGUFWriter(part, _architecture(artifact))) as writer:
        _write_metadata(writer, artifact)
        tokenizer = tokenizer_of(artifact)
        if tokenizer is not None:
            tokenizer.write(writer)
        else:
            writer.add_tokenizer_model("none")
            writer.add_vocab_size(artifact.spec.vocab_size)
        _write_tensors(writer, artifact, entries, on_progress)
    with storage_errors(path):
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.rename(part, path)


def blocks(packed: PackedWeight) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Rows of blocks, uint8 [N, K/32 · 34] at 8 bits and [N, K/32 · 18] below; groups are multiples of 32."""
    packed = packed.regrouped(BLOCK)
    codes = packed.signed_codes().view(packed.n, -1, BLOCK)
    scales = packed.scales.to(SCALES).unsqueeze(2).contiguous().view(torch.uint8)
    if packed.bits == 8:
        content = codes.view(torch.uint8)
    else:
        shifted = (codes + 8).to(torch.uint8)
        content = shifted[:, :, : BLOCK // 2] | (shifted[:, :, BLOCK // 2 :] << 4)
    made: np.ndarray[Any, np.dtype[np.uint8]] = torch.cat((scales, content), 2).flatten(1).numpy()
    return made


def rotary_order(heads: int, head_dim: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp's ``llama`` takes them: pairs (j, j + d/2) of a head beside one
    another."""
    return torch.arange(heads * head_dim).view(heads, 2, head_dim // 2).transpose(1, 2).flatten()


def _architecture(artifact: Artifact) -> str:
    config = json_file.read(artifact.folder / "config.json", _Config)
    name = config.architectures[0] if config.architectures else "none named"
    if name not in ARCHITECTURES:
        raise UsageError(f"{artifact.folder}: {name} cannot be exported to GGUF: {', '.join(ARCHITECTURES)} can")
    return ARCHITECTURES[name]


def _check_spec(artifact: Artifact) -> None:
    spec = artifact.spec
    for kind in spec.layer_kinds:
        if kind.mixer.window is not None and kind.mixer.window < spec.context:
            raise UsageError(
                f"{artifact.folder}: layers see {kind.mixer.window} tokens back, which GGUF models of this "
                f"architecture cannot say; texts of {spec.context} tokens would differ"
            )
        if kind.mlp.activation != "silu":
            raise UsageError(f"{artifact.folder}: llama.cpp computes this architecture with silu only")


def _write_metadata(writer: GGUFWriter, artifact: Artifact) -> None:
    spec = artifact.spec
    layer = spec.layer_kinds[0]
    mixer = layer.mixer
    writer.add_name(artifact.manifest.source.name)
    writer.add_quantization_version(2)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(len(spec.layers))
    writer.add_feed_forward_length(layer.mlp.down.in_features)
    writer.add_head_count(mixer.heads)
    writer.add_head_count_kv(mixer.kv_heads)
    writer.add_key_length(mixer.head_dim)
    writer.add_value_length(mixer.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm.eps)
    writer.add_rope_freq_base(mixer.rope.theta)
    writer.add_rope_dimension_count(mixer.rope.dims)
    if mixer.rope.scaling is not None and not isinstance(mixer.rope.scaling, Llama3Scaling):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(mixer.rope.scaling.factor)


def _write_tensors(
    writer: GGUFWriter, artifact: Artifact, entries: Mapping[str, QuantizedModule], on_progress: OnProgress
) -> None:
    """Headers of all tensors, then their data, one by one."""
    from gguf import GGMLQuantizationType as Kind

    kinds = {8: (Kind.Q8_0, 34), 4: (Kind.Q4_0, 18)}
    factors = rope_factors(artifact.spec.layer_kinds[0].mixer.rope)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes, Kind.F32)
    for name, entry in entries.items():
        kind, size = kinds[entry.bits]
        shape = (entry.n, entry.k // BLOCK * size)
        writer.add_tensor_info(f"{_place(name)}.weight", shape, np.dtype(np.uint8), shape[0] * shape[1], kind)
    dense = artifact.manifest.dense
    for name, tensor in dense.items():
        flat = len(tensor.shape) == 1
        count = int(np.prod(tensor.shape))
        info = (np.dtype(np.float32), 4 * count, Kind.F32) if flat else (np.dtype(np.int16), 2 * count, Kind.BF16)
        writer.add_tensor_info(_dense_place(name), tensor.shape, *info)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for name in (*entries, *dense):
        content = _content(artifact, name)
        writer.write_tensor_data(content)
        on_progress(name, content.nbytes)


def _content(artifact: Artifact, name: str) -> np.ndarray[Any, Any]:
    order = _row_order(artifact, name)
    if artifact.is_quantized(name):
        packed = artifact.packed(name)
        if order is not None:
            packed = PackedWeight(packed.words[order], packed.scales[order], packed.bits, packed.group, packed.k)
        found = blocks(packed)
        artifact.release(name)
        return found
    tensor = artifact.dense(name)
    tensor = tensor if order is None else tensor[order]
    made: np.ndarray[Any, Any] = (
        tensor.float() if tensor.dim() == 1 else tensor.contiguous().view(torch.int16)
    ).numpy()
    return made


def _row_order(artifact: Artifact, name: str) -> torch.Tensor | None:
    leaf = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj") or _architecture(artifact) != "llama":
        return None
    mixer = artifact.spec.layer_kinds[0].mixer
    return rotary_order(mixer.heads if leaf == "q_proj" else mixer.kv_heads, mixer.head_dim)


def _place(module: str) -> str:
    """``model.layers.3.mlp.up_proj`` → ``blk.3.ffn_up``"""
    if module in TOPS:
        return TOPS[module]
    _, _, number, rest = module.split(".", 3)
    return f"blk.{number}.{PLACES[rest]}"


def _dense_place(name: str) -> str:
    module, _, kind = name.rpartition(".")
    return f"{_place(module)}.{kind}"
