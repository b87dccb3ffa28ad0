"""Llama and its siblings: Llama 1 to 3.x, SmolLM2, Mistral, Qwen2, Qwen3.

They share tensor names and block structure; a sibling is a row of ``ARCHITECTURES``. Field names and defaults are those
of the configuration classes in Hugging Face transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from lbq.formats import json_file
from lbq.formats.disk import listed
from lbq.formats.errors import DataError
from lbq.formats.spec import (
    MAX_LAYERS,
    Attention,
    Count,
    GatedMlp,
    Layer,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    Norm,
    Positive,
    Projection,
    Rope,
)

LAYER = "model.layers.{i}."


@dataclass(frozen=True)
class Family:
    """What sets a sibling apart where its config does not say it."""

    qkv_bias: bool | None = None  # None: the config's attention_bias
    out_bias: bool | None = None  # None: likewise
    qk_norm: bool = False
    default_head_dim: int | None = None
    window: Literal["no", "all layers", "by switch"] = "no"  # when sliding_window is meant; absent, it is 4096
    kv_heads_optional: bool = False  # absent: as many as heads
    rms_norm_eps: float = 1e-6
    max_positions: int = 32768


ARCHITECTURES = {
    "LlamaForCausalLM": Family(kv_heads_optional=True, max_positions=2048),
    "MistralForCausalLM": Family(qkv_bias=False, out_bias=False, window="all layers", max_positions=131072),
    "Qwen2ForCausalLM": Family(qkv_bias=True, out_bias=False, window="by switch"),
    "Qwen3ForCausalLM": Family(qk_norm=True, default_head_dim=128, window="by switch"),
}

ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Keys without a bearing on what the model computes.
HARMLESS = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "is_llama_config",
    "model_type",
    "pad_token_id",
    "pretraining_tp",
    "rope_interleaved",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
}


class RopeConfig(msgspec.Struct, frozen=True):
    """``rope_parameters`` (transformers 5) or ``rope_scaling`` (4)."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: Positive | None = None

    @property
    def kind(self) -> str:
        """``default``, ``linear``, ``llama3``, or one that is refused."""
        return self.rope_type or self.type or "default"


class Config(msgspec.Struct, frozen=True):
    """The fields of ``config.json`` that mean something here."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Count | None = None
    rms_norm_eps: Positive | None = None
    tie_word_embeddings: bool = False
    rope_theta: Positive | None = None
    rope_scaling: RopeConfig | None = None
    rope_parameters: RopeConfig | None = None
    partial_rotary_factor: Positive | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: Count | msgspec.UnsetType | None = msgspec.UNSET
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None
    quantization_config: dict[str, object] | None = None  # not of the model: its readers are elsewhere
    use_mrope: bool = False


@dataclass(frozen=True)
class Adapted:
    """A spec, and the config keys that were neither used nor known to be harmless."""

    spec: ModelSpec
    unknown_keys: tuple[str, ...]


def adapt(architecture: str, data: bytes, path: Path) -> Adapted:
    """Turn ``config.json`` into a spec. Raises DataError for a value that has no meaning here."""
    family = ARCHITECTURES[architecture]
    config = json_file.decode(data, Config, path)
    if config.num_hidden_layers > MAX_LAYERS:
        raise DataError(f"{path}: num_hidden_layers is {config.num_hidden_layers}; at most {MAX_LAYERS} are supported")
    if config.use_mrope:
        raise DataError(f"{path}: use_mrope is not supported")
    fields = json_file.decode(data, dict[str, msgspec.Raw], path)
    for name, rope in (("rope_parameters", config.rope_parameters), ("rope_scaling", config.rope_scaling)):
        if rope is not None:
            _check_rope(bytes(fields[name]), rope, f"{path}: {name}")
    unknown = tuple(sorted(fields.keys() - HARMLESS - set(Config.__struct_fields__)))
    remote = [key for key in unknown if key in ("auto_map", "trust_remote_code")]
    if remote:
        raise DataError(f"{path}: {remote[0]} asks for code from the checkpoint; lbq never runs it")
    return Adapted(_spec(family, config, path), unknown)


def _spec(family: Family, config: Config, path: Path) -> ModelSpec:
    windows = _windows(family, config, path)
    kinds = tuple(dict.fromkeys(windows))  # in order of first use
    hidden, vocab = config.hidden_size, config.vocab_size
    return ModelSpec(
        vocab_size=vocab,
        hidden_size=hidden,
        context=config.max_position_embeddings or family.max_positions,
        embedding="model.embed_tokens",
        layer_kinds=tuple(_layer(family, config, window, path) for window in kinds),
        layers=tuple(kinds.index(window) for window in windows),
        norm=_norm(family, config, "model.norm"),
        head=Projection("lm_head", vocab, hidden),
        tied=config.tie_word_embeddings,
    )


def _norm(family: Family, config: Config, name: str) -> Norm:
    return Norm(name, config.rms_norm_eps or family.rms_norm_eps)


def _layer(family: Family, config: Config, window: int | None, path: Path) -> Layer:
    activation = ACTIVATIONS.get(config.hidden_act)
    if activation is None:
        raise DataError(f"{path}: hidden_act {config.hidden_act!r} is not supported: {', '.join(ACTIVATIONS)} are")
    hidden, width = config.hidden_size, config.intermediate_size
    mlp = LAYER + "mlp."
    gate_up = tuple(Projection(f"{mlp}{name}_proj", width, hidden, config.mlp_bias) for name in ("gate", "up"))
    return Layer(
        mixer_norm=_norm(family, config, LAYER + "input_layernorm"),
        mixer=_attention(family, config, window, path),
        mlp_norm=_norm(family, config, LAYER + "post_attention_layernorm"),
        mlp=GatedMlp(gate_up, Projection(f"{mlp}down_proj", hidden, width, config.mlp_bias), activation),
    )


def _attention(family: Family, config: Config, window: int | None, path: Path) -> Attention:
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads = config.num_key_value_heads or (heads if family.kv_heads_optional else None)
    if kv_heads is None:
        raise DataError(f"{path}: num_key_value_heads is missing")
    head_dim = config.head_dim or family.default_head_dim
    if head_dim is None:
        if hidden % heads:
            raise DataError(
                f"{path}: hidden_size {hidden} is not a multiple of {heads} heads, and there is no head_dim"
            )
        head_dim = hidden // heads
    qkv_bias = config.attention_bias if family.qkv_bias is None else family.qkv_bias
    out_bias = config.attention_bias if family.out_bias is None else family.out_bias
    name = LAYER + "self_attn."
    q, kv = heads * head_dim, kv_heads * head_dim
    return Attention(
        qkv=(
            Projection(name + "q_proj", q, hidden, qkv_bias),
            Projection(name + "k_proj", kv, hidden, qkv_bias),
            Projection(name + "v_proj", kv, hidden, qkv_bias),
        ),
        out=Projection(name + "o_proj", hidden, q, out_bias),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        scale=1 / math.sqrt(head_dim),
        rope=_rope(config, head_dim, path),
        q_norm=_norm(family, config, name + "q_norm") if family.qk_norm else None,
        k_norm=_norm(family, config, name + "k_norm") if family.qk_norm else None,
        window=window,
    )


def _check_rope(data: bytes, rope: RopeConfig, where: str) -> None:
    """Refuse kinds of rope and fields that have no meaning here, such as a rope for each type of layer."""
    if rope.kind not in ("default", "linear", "llama3"):
        raise DataError(f"{where}: rope type {rope.kind!r} is not supported: default, linear and llama3 are")
    odd = json_file.decode(data, dict[str, msgspec.Raw], where).keys() - set(RopeConfig.__struct_fields__)
    if odd:
        raise DataError(f"{where}: {listed(sorted(odd))} not understood; the model would be wrong without")


def _rope(config: Config, head_dim: int, path: Path) -> Rope:
    given = config.rope_parameters or config.rope_scaling or RopeConfig()
    theta = given.rope_theta or config.rope_theta or 10000.0
    if (given.partial_rotary_factor or config.partial_rotary_factor or 1.0) != 1.0:
        raise DataError(f"{path}: partial_rotary_factor other than 1 is not supported")
    kind = given.kind
    if kind == "default":
        return Rope(theta, head_dim)

    def needed(value: float | None, name: str) -> float:
        if value is None:
            raise DataError(f"{path}: rope type {kind} needs {name}")
        return value

    factor = needed(given.factor, "factor")
    if kind == "linear":
        return Rope(theta, head_dim, LinearScaling(factor))
    original = needed(given.original_max_position_embeddings, "original_max_position_embeddings")
    low, high = needed(given.low_freq_factor, "low_freq_factor"), needed(given.high_freq_factor, "high_freq_factor")
    return Rope(theta, head_dim, Llama3Scaling(factor, low, high, int(original)))


def _windows(family: Family, config: Config, path: Path) -> tuple[int | None, ...]:
    """Each layer's sliding window, or None for full attention."""
    layers = config.num_hidden_layers
    meant = family.window == "all layers" or (family.window == "by switch" and config.use_sliding_window)
    window = (4096 if config.sliding_window is msgspec.UNSET else config.sliding_window) if meant else None
    first = config.max_window_layers if family.window == "by switch" else 0
    default = tuple("sliding_attention" if window and i >= first else "full_attention" for i in range(layers))
    types = config.layer_types or default
    if len(types) != layers:
        raise DataError(f"{path}: {len(types)} layer_types for {layers} layers")
    if odd := set(types) - {"full_attention", "sliding_attention"}:
        raise DataError(f"{path}: layer type {min(odd)!r} is not supported")
    if "sliding_attention" in types and window is None:
        raise DataError(f"{path}: layer_types has sliding_attention but no sliding window is set")
    if family.window != "by switch" and types != default:
        raise DataError(f"{path}: this architecture does not mix layer_types")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
