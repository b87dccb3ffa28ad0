"""Tiny random models of each family: the spec, quantised weights in memory, and transformers on the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lbq.formats.packing import PackedWeight
from lbq.formats.spec import ModelSpec
from lbq.quantizer.families import read_spec
from lbq.quantizer.rtn import quantize
from lbq.runtime.kernels.linear import Linear

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama3-rope": ("llama", "LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama-tied": ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-linear-biased": (
        "llama",
        "LlamaForCausalLM",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "mistral-window": ("mistral", "MistralForCausalLM", {"sliding_window": 9}),
    "qwen2-bias": ("qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-some-windows": (
        "qwen2",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3-qk-norm": ("qwen3", "Qwen3ForCausalLM", {}),
}


@dataclass
class MemoryWeights:
    """``lbq.runtime.binding.Weights`` from tensors; remembers what was released."""

    spec: ModelSpec
    quantized: dict[str, PackedWeight]
    tensors: dict[str, torch.Tensor]
    released: list[str] = field(default_factory=list)

    def is_quantized(self, module: str) -> bool:
        return module in self.quantized

    def packed(self, module: str) -> PackedWeight:
        return self.quantized[module]

    def dense(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def release(self, module: str) -> None:
        self.released.append(module)

    def release_dense(self, name: str) -> None:
        self.released.append(name)


class ReferenceLinear:
    """Dequantise once in float32, multiply in float32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernel: str, fallback: str | None) -> None:
        self.kernel, self.fallback = kernel, fallback
        self.n, self.k = weight.shape
        self.resident_bytes = weight.nbytes
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self._weight, self._bias)


@dataclass
class ReferenceKernels:
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def packed(self, weight: PackedWeight, bias: torch.Tensor | None) -> Linear:
        return ReferenceLinear(weight.dequantize(), bias, f"reference INT{weight.bits}", "it is a reference")

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        return ReferenceLinear(weight.float(), bias, "reference BF16", None)


@dataclass(frozen=True)
class Tiny:
    """One tiny model; ``reference`` is transformers in float32 on the dequantised weights."""

    weights: MemoryWeights
    reference: PreTrainedModel


def tiny_model(family: str, folder: Path, *, bits: int = 4, seed: int = 1) -> Tiny:
    kind, architecture, changes = FAMILIES[family]
    config = AutoConfig.for_model(kind, **{**SHAPE, **changes})
    config.architectures = [architecture]
    folder.joinpath("config.json").write_text(json.dumps(config.to_dict()))
    spec = read_spec(folder).spec
    reference = random_model(config, seed)
    weights = MemoryWeights(spec, {}, {})
    state = reference.state_dict()
    heads = () if spec.tied else (spec.head.name,)
    modules = [p.name for p in spec.projections() if p.name != spec.head.name]
    for module in (*modules, *heads):
        name = f"{module}.weight"
        weight = quantize(state[name], 8 if module in heads else bits, None if module in heads else 32)
        state[name].copy_(weight.dequantize())
        weights.quantized[module] = weight
    dense = (name for name in state if name.removesuffix(".weight") not in weights.quantized)
    weights.tensors = {name: state[name].to(torch.bfloat16) for name in dense if not (spec.tied and "lm_head" in name)}
    return Tiny(weights, reference)


def random_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """transformers' model in float32 with BF16 values, norms and biases random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny model of every family, INT4 with groups of 32 and an INT8 head. Made once: leave it as it is."""
    return tiny_model(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., Tiny]:
    """``make_tiny(family, bits=4, seed=1)``"""
    return lambda family, **options: tiny_model(family, tmp_path, **options)


@pytest.fixture(scope="session")
def reference_kernels() -> ReferenceKernels:
    return ReferenceKernels()
