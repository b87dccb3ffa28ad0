"""The model spec: all that a runtime must know to decode, and nothing about who made the model.

It is written once by the quantizer's adapter of the model's family and is part of the manifest. Names are exact;
``{i}`` in a name stands for the layer's number. A mixer or a feed-forward block is one variant of a tagged union; a
new kind of model is a new variant or a new field with a default, and old artifacts stay readable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e12)]
Bounded = Annotated[float, msgspec.Meta(ge=-1e100, le=1e100)]  # whatever is done with it stays finite
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]

MAX_LAYERS = 4096


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all parts: immutable, and strict about fields it does not know."""


class Projection(Part, frozen=True):
    """A linear layer y = W x (+ bias): module path, W is [out_features, in_features]."""

    name: Name
    out_features: Count
    in_features: Count
    bias: bool = False

    def at(self, layer: int) -> Projection:
        """The same projection in layer number ``layer``."""
        return msgspec.structs.replace(self, name=self.name.replace("{i}", str(layer)))


class Norm(Part, frozen=True):
    """Root-mean-square norm over the last axis, y = w · x / √(mean(x²) + eps); ``name`` is the module of w."""

    name: Name
    eps: Positive


class LinearScaling(Part, frozen=True, tag="linear"):
    """Positions divided by ``factor``."""

    factor: Positive


class Llama3Scaling(Part, frozen=True, tag="llama3"):
    """Llama 3.1's frequency-dependent stretch (Meta's reference code; ``rope_type: llama3``)."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_context: Count


class Rope(Part, frozen=True):
    """Rotary embedding of the first ``dims`` of each head, halves paired (x[j] with x[j + dims/2])."""

    theta: Positive
    dims: Count
    scaling: LinearScaling | Llama3Scaling | None = None


class Attention(Part, frozen=True, tag="attention"):
    """Causal grouped-query attention. ``qkv``'s outputs concatenated are q, then k, then v."""

    qkv: tuple[Projection, ...]
    out: Projection
    heads: Count
    kv_heads: Count
    head_dim: Count
    scale: Positive  # of q·k before the softmax
    rope: Rope
    q_norm: Norm | None = None  # over head_dim, before rope
    k_norm: Norm | None = None
    window: Count | None = None  # a token sees itself and the window − 1 before it


class GatedMlp(Part, frozen=True, tag="gated_mlp"):
    """down(act(gate(x)) · up(x)). ``gate_up``'s outputs concatenated are gate, then up."""

    gate_up: tuple[Projection, ...]
    down: Projection
    activation: Literal["silu", "gelu", "gelu_tanh"]


Mixer = Attention  # a union, once there is a second mixer
FeedForward = GatedMlp  # likewise


class Layer(Part, frozen=True):
    """x += mixer(norm(x)); x += mlp(norm(x))."""

    mixer_norm: Norm
    mixer: Mixer
    mlp_norm: Norm
    mlp: FeedForward

    def units(self) -> tuple[tuple[Projection, ...], ...]:
        """Fused units in the order of execution, names still holding ``{i}``."""
        return (self.mixer.qkv, (self.mixer.out,), self.mlp.gate_up, (self.mlp.down,))


class ModelSpec(Part, frozen=True):
    """A decoder: embedding, layers, norm, head. ``layers[i]`` says which of ``layer_kinds`` layer i is."""

    vocab_size: Count
    hidden_size: Count
    context: Count  # positions the model was made for
    embedding: Name  # module of the [vocab_size, hidden_size] matrix
    layer_kinds: tuple[Layer, ...]
    layers: tuple[int, ...]
    norm: Norm
    head: Projection
    tied: bool  # the head's weight is the embedding's, and stands in the file once

    def __post_init__(self) -> None:
        """Refuse a spec whose parts do not fit; msgspec turns the ValueError into a decoding error."""
        if not 1 <= len(self.layers) <= MAX_LAYERS:
            raise ValueError(f"{len(self.layers)} layers: 1 to {MAX_LAYERS} are supported")
        if set(self.layers) != set(range(len(self.layer_kinds))):
            raise ValueError("layers must name every entry of layer_kinds and no other")
        if (self.head.out_features, self.head.in_features) != (self.vocab_size, self.hidden_size):
            raise ValueError("head does not map hidden_size to vocab_size")
        for kind in self.layer_kinds:
            _check_attention(kind.mixer, self.hidden_size)
            _check_mlp(kind.mlp, self.hidden_size)

    def layer(self, i: int) -> Layer:
        """Layer ``i``, names still holding ``{i}``."""
        return self.layer_kinds[self.layers[i]]

    def layer_units(self, i: int) -> Iterator[tuple[Projection, ...]]:
        """Fused units of layer ``i`` in the order of execution."""
        for unit in self.layer(i).units():
            yield tuple(p.at(i) for p in unit)

    def units(self) -> Iterator[tuple[Projection, ...]]:
        """Fused units in the order of execution: projections that a runtime joins and that share bits and group."""
        for i in range(len(self.layers)):
            yield from self.layer_units(i)
        yield (self.head,)

    def projections(self) -> Iterator[Projection]:
        """Every linear layer, head last."""
        for unit in self.units():
            yield from unit

    def norms(self) -> Iterator[tuple[Name, int]]:
        """Every norm weight: module and width."""
        for i in range(len(self.layers)):
            layer = self.layer(i)
            mixer = layer.mixer
            for norm, width in (
                (layer.mixer_norm, self.hidden_size),
                (mixer.q_norm, mixer.head_dim),
                (mixer.k_norm, mixer.head_dim),
                (layer.mlp_norm, self.hidden_size),
            ):
                if norm is not None:
                    yield norm.name.replace("{i}", str(i)), width
        yield self.norm.name, self.hidden_size


def _check_attention(mixer: Attention, hidden: int) -> None:
    q, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
    if mixer.heads % mixer.kv_heads:
        raise ValueError(f"{mixer.heads} heads are not a multiple of {mixer.kv_heads} key/value heads")
    if sum(p.out_features for p in mixer.qkv) != q + 2 * kv or any(p.in_features != hidden for p in mixer.qkv):
        raise ValueError("qkv does not fit the heads")
    if len(mixer.qkv) not in (1, 3) or (len(mixer.qkv) == 3 and mixer.qkv[0].out_features != q):
        raise ValueError("qkv must be one projection or three")
    if (mixer.out.out_features, mixer.out.in_features) != (hidden, q):
        raise ValueError("the output projection does not fit the heads")
    if mixer.rope.dims % 2 or mixer.rope.dims > mixer.head_dim:
        raise ValueError(f"rope over {mixer.rope.dims} of {mixer.head_dim} dimensions")


def _check_mlp(mlp: GatedMlp, hidden: int) -> None:
    width = mlp.down.in_features
    if sum(p.out_features for p in mlp.gate_up) != 2 * width or any(p.in_features != hidden for p in mlp.gate_up):
        raise ValueError("gate_up does not fit down")
    if mlp.down.out_features != hidden:
        raise ValueError("down does not return to hidden_size")
