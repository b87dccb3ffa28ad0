"""Specs of well-known models, for random weights: what matters is how many bytes and operations a token takes."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import structs

from lbq.formats.spec import Attention, GatedMlp, Layer, Llama3Scaling, ModelSpec, Norm, Projection, Rope


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama-like model."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    qk_norm: bool
    eps: float
    context: int

    def spec(self) -> ModelSpec:
        """Its spec, with the head apart from the embedding: an INT8 head is what gets measured."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        mixer = Attention(
            qkv=tuple(Projection(f"l.{{i}}.{name}", n, self.hidden) for name, n in (("q", q), ("k", kv), ("v", kv))),
            out=Projection("l.{i}.o", self.hidden, q),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            rope=self.rope,
            q_norm=Norm("l.{i}.q_norm", self.eps) if self.qk_norm else None,
            k_norm=Norm("l.{i}.k_norm", self.eps) if self.qk_norm else None,
        )
        mlp = GatedMlp(
            gate_up=tuple(Projection(f"l.{{i}}.{name}", self.intermediate, self.hidden) for name in ("gate", "up")),
            down=Projection("l.{i}.down", self.hidden, self.intermediate),
            activation="silu",
        )
        kind = Layer(Norm("l.{i}.norm", self.eps), mixer, Norm("l.{i}.mlp_norm", self.eps), mlp)
        return ModelSpec(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            context=self.context,
            embedding="embed",
            layer_kinds=(kind,),
            layers=(0,) * self.layers,
            norm=Norm("norm", self.eps),
            head=Projection("head", self.vocabulary, self.hidden),
            tied=False,
        )


_LLAMA_ROPE = Rope(theta=500000.0, dims=128, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
_LLAMA32_ROPE = Rope(theta=500000.0, dims=128, scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192))
_QWEN_ROPE = Rope(theta=1000000.0, dims=128)


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int) -> Shape:
    return Shape(151936, hidden, intermediate, layers, heads, 8, 128, _QWEN_ROPE, True, 1e-6, 40960)


def _llama32(hidden: int, layers: int, heads: int, head_dim: int) -> Shape:
    rope = structs.replace(_LLAMA32_ROPE, dims=head_dim)
    return Shape(128256, hidden, 8192, layers, heads, 8, head_dim, rope, False, 1e-5, 131072)


SHAPES = {
    "llama-3.1-8b": Shape(128256, 4096, 14336, 32, 32, 8, 128, _LLAMA_ROPE, False, 1e-5, 131072),
    "llama-3.2-3b": _llama32(3072, 28, 24, 128),
    "llama-3.2-1b": _llama32(2048, 16, 32, 64),
    "mistral-7b": Shape(32768, 4096, 14336, 32, 32, 8, 128, Rope(theta=1000000.0, dims=128), False, 1e-5, 32768),
    "qwen3-14b": _qwen3(5120, 17408, 40, 40),
    "qwen3-8b": _qwen3(4096, 12288, 36, 32),
    "qwen3-4b": _qwen3(2560, 9728, 36, 32),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16),
    "smollm2-135m": Shape(49152, 576, 1536, 30, 9, 3, 64, Rope(theta=100000.0, dims=64), False, 1e-5, 8192),
    "tiny": Shape(97, 64, 64, 2, 4, 2, 16, Rope(theta=10000.0, dims=16), True, 1e-6, 2048),  # to try out commands
}
