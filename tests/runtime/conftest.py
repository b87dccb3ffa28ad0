"""Tiny random models of each family: the spec, quantised weights in memory, and transformers on the same weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lbq.formats.packing import PackedWeight
from lbq.formats.spec import ModelSpec
from lbq.quantizer.families import read_spec
from lbq.quantizer.rtn import quantize
from lbq.runtime.kernels.linear import Linear

if TYPE_CHECKING:  # only the reference needs it, and a machine with a GPU may lack it
    from transformers import PreTrainedModel

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
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
    """One tiny model."""

    family: str
    folder: Path  # holds its config.json
    weights: MemoryWeights

    @cached_property
    def reference(self) -> PreTrainedModel:
        """transformers in float32 on the dequantised weights."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(self.folder)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                module = name.removesuffix(".weight")
                quantized = self.weights.is_quantized(module)
                parameter.copy_(self.weights.packed(module).dequantize() if quantized else self.weights.dense(name))
        return model


def tiny_model(family: str, folder: Path, *, bits: int = 4, seed: int = 1, **shape: int) -> Tiny:
    """Random weights, norms and biases; linears at ``bits`` with groups of 32, an untied head at 8, one scale a row.

    ``shape`` overrides SHAPE.
    """
    kind, architecture, changes = FAMILIES[family]
    config = {**SHAPE, **changes, **shape, "model_type": kind, "architectures": [architecture]}
    folder.joinpath("config.json").write_text(json.dumps(config))
    spec = read_spec(folder).spec
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=random) * scale

    weights = MemoryWeights(spec, {}, {})
    dense = {f"{spec.embedding}.weight": normal(spec.vocab_size, spec.hidden_size, scale=0.15)}
    for p in spec.projections():
        matrix = normal(p.out_features, p.in_features, scale=0.15)
        if p.name != spec.head.name:
            weights.quantized[p.name] = quantize(matrix, bits, 32)
        elif not spec.tied:
            weights.quantized[p.name] = quantize(matrix, 8)
        if p.bias:
            dense[f"{p.name}.bias"] = normal(p.out_features, scale=0.3)
    dense |= {f"{name}.weight": 1 + normal(width, scale=0.2) for name, width in spec.norms()}
    weights.tensors = {name: tensor.to(torch.bfloat16) for name, tensor in dense.items()}
    return Tiny(family, folder, weights)


@pytest.fixture(scope="session", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny model of every family, INT4 with groups of 32 and an INT8 head. Made once: leave it as it is."""
    return tiny_model(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., Tiny]:
    """``make_tiny(family, bits=4, seed=1, **shape)``"""
    return lambda family, **options: tiny_model(family, tmp_path, **options)


@pytest.fixture(scope="session")
def reference_kernels() -> ReferenceKernels:
    return ReferenceKernels()


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Triton's interpreter patches its language at every call of a function within a kernel: once is enough."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or not hasattr(interpreter, "_patch_lang"):
        yield
        return
    import triton.language as tl

    patch = interpreter._patch_lang

    def patch_once(fn: Any) -> Any:
        seen = [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]
        new = any(tl.core.is_builtin(lang.load) for lang in seen)
        return patch(fn) if new else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch
