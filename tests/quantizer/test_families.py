"""Configs to specs: against transformers' own models, against published sizes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lbq.formats.errors import DataError
from lbq.formats.spec import LinearScaling, Llama3Scaling, ModelSpec, Rope
from lbq.quantizer.families import Adapted, read_spec

FAMILY_CHANGES = {
    "llama": [{}, {"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": None}, {"head_dim": 24}],
    "smollm2": [{}, {"rope_scaling": {"type": "linear", "factor": 2.5}}],
    "mistral": [{}, {"sliding_window": None, "head_dim": 32}],
    "qwen2": [{}, {"use_sliding_window": False}, {"layer_types": ["sliding_attention", "full_attention"]}],
    "qwen3": [{}, {"attention_bias": True, "tie_word_embeddings": True}],
}
CASES = [(family, changes) for family, variants in FAMILY_CHANGES.items() for changes in variants]

WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path, checkpoints: dict[str, Path]) -> WriteConfig:
    """``write_config(family, **changes)``: a folder with a config alone; None removes a field."""

    def write(family: str, **changes: object) -> Path:
        fields = json.loads((checkpoints[family] / "config.json").read_text()) | changes
        text = json.dumps({name: value for name, value in fields.items() if value is not None})
        (tmp_path / "config.json").write_text(text)
        return tmp_path

    return write


def adapt(folder: Path, config: dict[str, object]) -> Adapted:
    (folder / "config.json").write_text(json.dumps(config))
    return read_spec(folder)


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """What the spec says a checkpoint holds."""
    found: dict[str, tuple[int, ...]] = {f"{spec.embedding}.weight": (spec.vocab_size, spec.hidden_size)}
    for p in spec.projections():
        found[f"{p.name}.weight"] = (p.out_features, p.in_features)
        if p.bias:
            found[f"{p.name}.bias"] = (p.out_features,)
    return found | {f"{name}.weight": (width,) for name, width in spec.norms()}


def parameters(spec: ModelSpec) -> int:
    tensors = shapes(spec)
    if spec.tied:
        del tensors[f"{spec.head.name}.weight"]
    return sum(torch.Size(shape).numel() for shape in tensors.values())


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_spec_is_the_model_that_transformers_makes(
    family: str, changes: dict[str, object], write_config: WriteConfig
) -> None:
    folder = write_config(family, **changes)
    adapted = read_spec(folder)
    spec = adapted.spec
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shapes(spec) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert adapted.unknown_keys == ()
    assert spec.tied == config.tie_word_embeddings
    assert spec.context == config.max_position_embeddings
    for i, layer in enumerate(model.model.layers):
        own = spec.layer(i)
        # Mistral's window is the config's, for every layer; Qwen's stands in each attention module.
        theirs = getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None))
        assert own.mixer.window == theirs
        assert own.mixer.scale == pytest.approx(layer.self_attn.scaling, rel=1e-12)
        assert own.mixer.heads // own.mixer.kv_heads == layer.self_attn.num_key_value_groups
        assert own.mixer.head_dim == layer.self_attn.head_dim
        assert own.mixer_norm.eps == layer.input_layernorm.variance_epsilon
        assert (own.mixer.q_norm is None) == (not hasattr(layer.self_attn, "q_norm"))


@pytest.mark.parametrize("family", FAMILY_CHANGES)
def test_what_transformers_saves_gives_the_same_spec(family: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    AutoConfig.from_pretrained(checkpoints[family]).save_pretrained(tmp_path)
    assert read_spec(tmp_path) == read_spec(checkpoints[family])


def test_rope(write_config: WriteConfig) -> None:
    def rope(**changes: object) -> Rope:
        return read_spec(write_config("smollm2", **changes)).spec.layer(0).mixer.rope

    assert rope() == Rope(10000.0, 16)
    assert rope(rope_theta=None) == Rope(10000.0, 16)
    assert rope(rope_scaling={"type": "linear", "factor": 2}) == Rope(10000.0, 16, LinearScaling(2.0))
    assert rope(rope_parameters={"rope_type": "default", "rope_theta": 7.0}) == Rope(7.0, 16)
    llama3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 32}
    expected = Rope(500.0, 16, Llama3Scaling(8.0, 1.0, 4.0, 32))
    assert rope(rope_theta=500, rope_scaling={"rope_type": "llama3", **llama3}) == expected
    assert rope(rope_parameters={"rope_type": "llama3", "rope_theta": 500, **llama3}) == expected


PUBLISHED: dict[str, tuple[int, dict[str, object]]] = {
    "Llama-3.1-8B": (
        8_030_261_248,
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.42.3",
            "use_cache": True,
            "vocab_size": 128256,
        },
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            "architectures": ["MistralForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mistral",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.34.0.dev0",
            "use_cache": True,
            "vocab_size": 32000,
        },
    ),
    "Qwen2.5-7B-Instruct": (
        7_615_616_512,
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "hidden_act": "silu",
            "hidden_size": 3584,
            "initializer_range": 0.02,
            "intermediate_size": 18944,
            "max_position_embeddings": 32768,
            "max_window_layers": 28,
            "model_type": "qwen2",
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.1",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 152064,
        },
    ),
    "Qwen3-8B": (
        8_190_735_360,
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 12288,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "model_type": "qwen3",
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str, tmp_path: Path) -> None:
    count, config = PUBLISHED[name]
    adapted = adapt(tmp_path, config)
    assert parameters(adapted.spec) == count
    assert adapted.unknown_keys == ()
    windows = {adapted.spec.layer(i).mixer.window for i in range(len(adapted.spec.layers))}
    assert windows == ({4096} if name.startswith("Mistral") else {None})


def test_unknown_keys_are_listed(write_config: WriteConfig) -> None:
    assert read_spec(write_config("llama", frobnicate=1, attn_logit_cap=3.0)).unknown_keys == (
        "attn_logit_cap",
        "frobnicate",
    )


REFUSED: list[tuple[str, dict[str, object], str]] = [
    ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope type 'longrope'"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32}}, "rope type 'yarn'"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs original_max_position_embeddings"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mystery": 1}}, "'mystery'"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "rope_scaling.factor"),
    ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "'full_attention'"),
    ("llama", {"rope_theta": -1.0}, "rope_theta"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
    ("qwen3", {"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "no sliding window"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("llama", {"architectures": ["GPTNeoXForCausalLM"]}, "GPTNeoXForCausalLM is not supported"),
    ("llama", {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "not supported"),
    ("llama", {"architectures": []}, "none named"),
    ("llama", {"architectures": None}, "none named"),
    ("llama", {"auto_map": {"AutoModelForCausalLM": "model.Evil"}}, "auto_map"),
    ("llama", {"trust_remote_code": True}, "trust_remote_code"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized (GPTQ): lbq import"),
    ("llama", {"quantization_config": {"bits": 4}}, "already quantized (MLX): lbq import"),
    ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "('bitsandbytes'); convert the original"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; at most"),
    ("llama", {"num_hidden_layers": 10**30}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("llama", {"hidden_size": 0}, "hidden_size"),
    ("llama", {"hidden_size": -64}, "hidden_size"),
    ("llama", {"hidden_size": "64"}, "hidden_size"),
    ("llama", {"hidden_size": 64.5}, "hidden_size"),
    ("llama", {"vocab_size": None}, "vocab_size"),
    ("llama", {"head_dim": 15}, "rope over 15"),
    ("llama", {"num_attention_heads": 3}, "not a multiple"),
    ("mistral", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ("llama", {"rms_norm_eps": 0}, "rms_norm_eps"),
]


@pytest.mark.parametrize(("family", "changes", "says"), REFUSED)
def test_refused(family: str, changes: dict[str, object], says: str, write_config: WriteConfig) -> None:
    folder = write_config(family, **changes)
    with pytest.raises(DataError) as caught:
        read_spec(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"architectures": 1}', "\udcff", "[" * 100_000])
def test_not_a_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"config\.json"):
        read_spec(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        read_spec(tmp_path)


def test_layer_types_and_windows_follow_the_family(make_checkpoint: Callable[..., Path]) -> None:
    mixed = ["sliding_attention", "full_attention"]
    with pytest.raises(DataError, match="does not mix layer_types"):
        read_spec(make_checkpoint("mistral", layer_types=mixed))


def test_llama_has_no_window(make_checkpoint: Callable[..., Path]) -> None:
    spec = read_spec(make_checkpoint("llama", use_sliding_window=True, sliding_window=5, max_window_layers=0)).spec
    assert [spec.layer(i).mixer.window for i in range(2)] == [None, None]
