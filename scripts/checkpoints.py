"""Weights in other containers (GGUF, llama2.c) as plain BF16 Hugging Face checkpoints.

Only what ``fetch_models.py`` needs: the dense ``llama`` and ``qwen2`` architectures with byte-level BPE, and llama2.c's
float32 export with its SentencePiece vocabulary. Anything else raises ``ValueError``.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that one Hugging Face folder holds; ``tensors`` are bfloat16."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    tokenizer: Tokenizer
    tokenizer_config: dict[str, Any]
    eos_token_ids: list[int]
    chat_template: str | None = None
    extra_files: dict[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the files into an existing, empty ``folder``."""
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        self.tokenizer.save(str(folder / "tokenizer.json"))
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        generation = {"bos_token_id": self.config["bos_token_id"], "eos_token_id": self.eos_token_ids}
        if self.config.get("pad_token_id") is not None:
            generation["pad_token_id"] = self.config["pad_token_id"]
        for name, content in (
            ("tokenizer_config.json", self.tokenizer_config),
            ("generation_config.json", generation),
            ("config.json", self.config),
        ):
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, data in self.extra_files.items():
            (folder / name).write_bytes(data)


def rotate_half_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads · D] (a weight or a bias) from interleaved rotary pairs (0, 1), (2, 3), … to halves (0, D/2), …

    llama.cpp (architecture ``llama``) and llama2.c store q and k for the first kind, Hugging Face for the second.
    """
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def from_gguf(path: Path, *, tied: bool, eos_token_ids: list[int]) -> Checkpoint:
    """Read a GGUF file whole and dequantise it.

    ``tied`` says whether the model ties its head to the embedding, which GGUF does not record; a tied model that
    brings a head of its own (llama.cpp quantises both kinds) takes the head's values for both: they are the finer.
    """
    reader = gguf.GGUFReader(path)
    fields = {name: value.contents() for name, value in reader.fields.items()}
    architecture = fields["general.architecture"]
    if architecture not in ("llama", "qwen2"):
        raise ValueError(f"{path}: architecture {architecture!r} is not one of llama, qwen2")
    config = _gguf_config(fields, architecture, tied=tied)
    tensors = _gguf_tensors(reader, config, architecture)
    if tied:
        tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight", tensors["model.embed_tokens.weight"])
    tokens = fields["tokenizer.ggml.tokens"]
    return Checkpoint(
        config,
        tensors,
        _byte_level_tokenizer(fields),
        _tokenizer_config(
            bos=tokens[config["bos_token_id"]],
            eos=tokens[config["eos_token_id"]],
            pad=tokens[config["pad_token_id"]],
            length=config["max_position_embeddings"],
        ),
        eos_token_ids,
        fields.get("tokenizer.chat_template"),
    )


def _gguf_config(fields: dict[str, Any], architecture: str, *, tied: bool) -> dict[str, Any]:
    def key(name: str) -> Any:
        return fields[f"{architecture}.{name}"]

    config = {
        "architectures": ["LlamaForCausalLM" if architecture == "llama" else "Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": key("embedding_length"),
        "initializer_range": 0.02,
        "intermediate_size": key("feed_forward_length"),
        "max_position_embeddings": key("context_length"),
        "model_type": architecture,
        "num_attention_heads": key("attention.head_count"),
        "num_hidden_layers": key("block_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": float(f"{key('attention.layer_norm_rms_epsilon'):.6g}"),  # GGUF holds it as float32
        "rope_scaling": None,
        "rope_theta": key("rope.freq_base"),
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }
    if architecture == "llama":
        return config | {"attention_bias": False, "mlp_bias": False}
    return config | {"use_sliding_window": False, "sliding_window": None, "max_window_layers": key("block_count")}


def _gguf_tensors(reader: gguf.GGUFReader, config: dict[str, Any], architecture: str) -> dict[str, torch.Tensor]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    outer = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    tensors = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        name = outer.get(tensor.name)
        if name is None:
            _, layer, kind, suffix = tensor.name.split(".")
            name = f"model.layers.{layer}.{GGUF_NAMES[kind]}.{suffix}"
            if architecture == "llama" and kind in heads:
                values = rotate_half_order(values, heads[kind])
        tensors[name] = values.to(torch.bfloat16)
    return tensors


def _byte_level_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer of a GGUF, with the pre-tokenizer that its ``pre`` names."""
    if fields["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(f"tokenizer {fields['tokenizer.ggml.model']!r} is not byte-level BPE")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    unused = gguf.TokenType.UNUSED  # padding of the embedding, not a token
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != unused}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    pre = fields["tokenizer.ggml.pre"]
    if pre == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        raise ValueError(f"pre-tokenizer {pre!r} is not one of smollm, qwen2")
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = kind == gguf.TokenType.CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    return tokenizer


def _tokenizer_config(*, bos: str, eos: str, pad: str | None, length: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is, in transformers 4 and 5
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }


def from_llama2c(data: bytes) -> Checkpoint:
    """Read llama2.c's first export format (header of 7 int32, float32 weights) followed by its tokenizer file."""
    dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack_from("7i", data)
    if heads != kv_heads or vocab < 0:
        raise ValueError("only multi-head attention with a tied head is known of llama2.c's format")
    at = 28

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        values = torch.from_numpy(np.frombuffer(data, np.float32, count, at).copy()).view(shape)
        at += 4 * count
        return values

    tensors = {"model.embed_tokens.weight": take(vocab, dim)}
    stacked = (  # in the file's order, each over all layers
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (dim, dim)),
        ("self_attn.v_proj", (dim, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden, dim)),
        ("mlp.down_proj", (dim, hidden)),
        ("mlp.up_proj", (hidden, dim)),
    )
    for name, shape in stacked:
        for layer, values in enumerate(take(layers, *shape)):
            ordered = rotate_half_order(values, heads) if name.endswith(("q_proj", "k_proj")) else values
            tensors[f"model.layers.{layer}.{name}.weight"] = ordered
    tensors["model.norm.weight"] = take(dim)
    take(2, length, dim // heads // 2)  # rotary tables, which the config gives
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": dim,
        "initializer_range": 0.02,
        "intermediate_size": hidden,
        "max_position_embeddings": length,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab,
    }
    return Checkpoint(
        config,
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()},
        _sentencepiece_tokenizer(data[at:], vocab),
        _tokenizer_config(bos="<s>", eos="</s>", pad=None, length=length),
        [1, 2],  # stories are separated by <s> alone in the training text, so <s> is what ends one
    )


def _sentencepiece_tokenizer(data: bytes, size: int) -> Tokenizer:
    """Llama's SentencePiece BPE from llama2.c's list of (score, length, bytes); a merge is ranked by its result."""
    pieces, scores, at = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)], [], 4
    for i in range(size):
        score, length = struct.unpack_from("fi", data, at)
        text = data[at + 8 : at + 8 + length]
        at += 8 + length
        scores.append(score)
        if i >= 259:  # the first 259 are written in another spelling there
            pieces.append(text.decode("utf-8").replace(" ", "▁"))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in sorted(range(259, size), key=lambda i: -scores[i]):
        piece = pieces[i]
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += sorted(
            (s for s in splits if s[0] in vocab and s[1] in vocab), key=lambda s: (vocab[s[0]], vocab[s[1]])
        )
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer
