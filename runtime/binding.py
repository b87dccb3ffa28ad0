"""Weights by exact name from the spec into a decoder: one kernel for each fused unit, unit by unit.

Never more than one unit is in memory twice: its parts are joined, handed to the device's kernel, and the mapped pages
they came from are released. On another device than the CPU a layer is on its way there while the one before it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from lbq.formats.packing import PackedWeight
from lbq.formats.spec import ModelSpec, Norm, Projection, Rope
from lbq.formats.wording import pattern
from lbq.runtime.attention import AttentionMixer
from lbq.runtime.decoder import Decoder, DecoderLayer, Mlp
from lbq.runtime.kernels.linear import Choice, Linear, Matrix
from lbq.runtime.norm import RmsNorm
from lbq.runtime.rope import Rotary
from lbq.runtime.upload import mover

T = TypeVar("T")


class Weights(Protocol):
    """Where weights come from: an :class:`lbq.formats.artifact.Artifact`.

    Complete and of the shapes that ``spec`` says; the parts of a fused unit share bits and group, or are all dense.
    Tensors may lie in a mapped file.
    """

    @property
    def spec(self) -> ModelSpec: ...

    def is_quantized(self, module: str) -> bool:
        """Whether ``module`` has a packed weight, rather than a dense one."""
        ...

    def packed(self, module: str) -> PackedWeight:
        """The weight [N, K] of a quantized module: words int32 [N, ⌈K·bits/32⌉], scales bfloat16 [N, K/group]."""
        ...

    def dense(self, name: str) -> torch.Tensor:
        """A tensor by its full name: bfloat16, [N, K] for a matrix, [N] for a bias or a norm.

        Float32 too where the kernels are exact: what another tool's codes stand for may fit nothing shorter.
        """
        ...

    def release(self, module: str) -> None:
        """The memory of ``module``'s packed weight is not needed soon. On any thread, beside other methods."""
        ...

    def release_dense(self, name: str) -> None:
        """The memory of tensor ``name`` is not needed soon. On any thread, beside other methods."""
        ...


class Kernels(Protocol):
    """Makes the linears of one device. Weights may lie in a mapped file; a kernel copies what it needs."""

    @property
    def device(self) -> torch.device: ...

    def packed(self, weight: PackedWeight, bias: torch.Tensor | None) -> Linear:
        """From codes; ``bias`` is float32 [N]."""
        ...

    def dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """From a BF16 matrix [N, K], or a float32 one where the device is exact."""
        ...


@dataclass(frozen=True)
class KernelUse:
    """A kernel that serves ``count`` units of one matrix whose names differ in the layer's number alone (``*``)."""

    units: str
    matrix: Matrix
    kernel: str
    fallback: str | None
    count: int


@dataclass(frozen=True)
class Bound:
    """A decoder, what serves it, and the bytes of memory it holds beyond the mapped file."""

    decoder: Decoder
    kernels: tuple[KernelUse, ...]
    resident_bytes: int


def bind(weights: Weights, kernels: Kernels) -> Bound:
    """Bind every tensor that the spec names."""
    spec = weights.spec
    with closing(Binder(weights, kernels)) as binder:
        embedding = binder.embedding()
        begun = (binder.begin(i) for i in range(len(spec.layers)))
        layers = [made() for made in (begun if embedding.is_cpu else _one_ahead(begun))]
        norm, head = binder.norm(), binder.head(embedding)
    return Bound(Decoder(spec, embedding, layers, norm, head), binder.uses, binder.resident_bytes)


def _one_ahead(begun: Iterator[T]) -> Iterator[T]:
    """Each once the next was taken, too."""
    for taken in begun:
        for following in begun:
            yield taken
            taken = following
        yield taken


class Binder:
    """Binds a model part by part, so that whoever runs it layer by layer need never hold it whole."""

    def __init__(self, weights: Weights, kernels: Kernels) -> None:
        self._weights, self._kernels, self._spec = weights, kernels, weights.spec
        self._uses: dict[tuple[str, Matrix, str, str | None], int] = {}
        self._rotaries: dict[Rope, Rotary] = {}
        self._mover = mover(kernels.device)
        self.resident_bytes = 0  # of everything bound so far, dropped or not

    @property
    def uses(self) -> tuple[KernelUse, ...]:
        """What serves the parts bound so far."""
        return tuple(KernelUse(*key, count) for key, count in self._uses.items())

    def embedding(self) -> torch.Tensor:
        """BF16 [V, hidden]: mapped on the CPU, where a token reads one row, moved elsewhere."""
        name = f"{self._spec.embedding}.weight"
        moved = self._mover.begin([self._weights.dense(name)], partial(self._weights.release_dense, name))()
        if not (moved.is_cpu or self._spec.tied):  # a tied one is counted with the head
            self.resident_bytes += moved.nbytes
        return moved

    def layer(self, i: int) -> DecoderLayer:
        """Layer ``i``."""
        return self.begin(i)()

    def begin(self, i: int) -> Callable[[], DecoderLayer]:
        """Begin to bring the linears of layer ``i`` to the device; what waits for them and makes the layer."""
        layer = self._spec.layer(i)
        mixer, mlp = layer.mixer, layer.mlp
        qkv, out, gate_up, down = (self._unit(unit) for unit in self._spec.layer_units(i))

        def made() -> DecoderLayer:
            attention = AttentionMixer(
                mixer,
                qkv(),
                out(),
                self._rotary(mixer.rope),
                self._norm(mixer.q_norm, i) if mixer.q_norm else None,
                self._norm(mixer.k_norm, i) if mixer.k_norm else None,
            )
            norms = self._norm(layer.mixer_norm, i), self._norm(layer.mlp_norm, i)
            return DecoderLayer(norms[0], attention, norms[1], Mlp(mlp, gate_up(), down()))

        return made

    def close(self) -> None:
        """No part is going to be asked for any more."""
        self._mover.close()

    def norm(self) -> RmsNorm:
        """The norm behind the last layer."""
        return self._norm(self._spec.norm, 0)

    def head(self, embedding: torch.Tensor | None = None) -> Linear:
        """The output head. ``embedding``, if it is bound already, is the weight where the spec ties them."""
        if not self._spec.tied:
            return self._unit((self._spec.head,))()
        return self._tied_head(
            self._weights.dense(f"{self._spec.embedding}.weight") if embedding is None else embedding
        )

    def release_layer(self, i: int) -> None:
        """The memory of layer ``i``'s linears is not needed soon: nobody uses what :meth:`layer` returned."""
        for unit in self._spec.layer_units(i):
            self._release(unit)

    def release_head(self) -> None:
        """As :meth:`release_layer`, for the head's weight."""
        if self._spec.tied:
            self._weights.release_dense(f"{self._spec.embedding}.weight")
        else:
            self._release((self._spec.head,))

    def _rotary(self, rope: Rope) -> Rotary:
        if rope not in self._rotaries:
            self._rotaries[rope] = Rotary(rope, self._kernels.device)
        return self._rotaries[rope]

    def _norm(self, norm: Norm, i: int) -> RmsNorm:
        weight = self._weights.dense(f"{norm.name.replace('{i}', str(i))}.weight").to(torch.float32)
        return RmsNorm(weight.to(self._kernels.device, non_blocking=True), norm.eps)

    def _unit(self, parts: tuple[Projection, ...]) -> Callable[[], Linear]:
        """One kernel for projections that read the same input, their outputs one after the other; begun to move."""
        quantized = {self._weights.is_quantized(p.name) for p in parts}
        assert len(quantized) == 1
        return self._packed(parts) if quantized.pop() else self._dense(parts)

    def _packed(self, parts: tuple[Projection, ...]) -> Callable[[], Linear]:
        packed = [self._weights.packed(p.name) for p in parts]
        first = packed[0]
        assert all((w.bits, w.group, w.k) == (first.bits, first.group, first.k) for w in packed)
        scales = self._mover.begin([w.scales for w in packed], lambda: None)  # released with the words
        words = self._mover.begin([w.words for w in packed], partial(self._release, parts))

        def made() -> Linear:
            whole = PackedWeight(words(), scales(), first.bits, first.group, first.k)
            linear = self._use(parts, self._kernels.packed(whole, self._bias(parts)), whole.bits, whole.group)
            self._hold(parts, linear, whole.nbytes, whole.words)
            return linear

        return made

    def _dense(self, parts: tuple[Projection, ...]) -> Callable[[], Linear]:
        matrices = [self._weights.dense(f"{p.name}.weight") for p in parts]
        moved = self._mover.begin(matrices, partial(self._release, parts))

        def made() -> Linear:
            whole = moved()
            linear = self._use(parts, self._kernels.dense(whole, self._bias(parts)), 8 * whole.itemsize)
            self._hold(parts, linear, whole.nbytes, whole)
            return linear

        return made

    def _hold(self, parts: tuple[Projection, ...], linear: Linear, nbytes: int, moved: torch.Tensor) -> None:
        """Count what ``linear`` holds; release what it was made of and does not use, if nobody else does."""
        held = held_bytes(linear, len(parts), nbytes)
        self.resident_bytes += held
        if held and moved.is_cpu:
            self._release(parts)

    def _tied_head(self, embedding: torch.Tensor) -> Linear:
        unit = (self._spec.head,)
        linear = self._use(unit, self._kernels.dense(embedding, self._bias(unit)), 8 * embedding.itemsize)
        self.resident_bytes += linear.resident_bytes
        if linear.resident_bytes and embedding.is_cpu:
            self._weights.release_dense(f"{self._spec.embedding}.weight")
        return linear

    def _release(self, parts: tuple[Projection, ...]) -> None:
        for p in parts:
            if self._weights.is_quantized(p.name):
                self._weights.release(p.name)
            else:
                self._weights.release_dense(f"{p.name}.weight")

    def _bias(self, parts: tuple[Projection, ...]) -> torch.Tensor | None:
        if not any(p.bias for p in parts):
            return None
        return torch.cat(
            [
                self._weights.dense(f"{p.name}.bias").to(torch.float32) if p.bias else torch.zeros(p.out_features)
                for p in parts
            ]
        )

    def _use(self, unit: tuple[Projection, ...], linear: Linear, bits: int, group: int | None = None) -> Linear:
        key = (unit_names(unit), unit_matrix(unit, bits, group), linear.kernel, linear.fallback)
        self._uses[key] = self._uses.get(key, 0) + 1
        return linear


def held_bytes(served_by: Linear | Choice, parts: int, nbytes: int) -> int:
    """Bytes that a kernel holds: its own arrangement, or the joined matrix where it uses that, or only the file: 0."""
    return served_by.resident_bytes or (nbytes if parts > 1 else 0)


def unit_matrix(unit: tuple[Projection, ...], bits: int, group: int | None = None) -> Matrix:
    """The joined matrix of a fused unit, whose parts share bits and group (None: a row)."""
    k = unit[0].in_features
    return Matrix(sum(p.out_features for p in unit), k, bits, group or k, any(p.bias for p in unit))


def unit_names(unit: tuple[Projection, ...]) -> str:
    """``model.layers.*.self_attn.{q_proj,k_proj,v_proj}``"""
    names = [pattern(p.name) for p in unit]
    if len(names) == 1:
        return names[0]
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) != 1:
        return ",".join(names)
    return f"{parents.pop()}.{{{','.join(name.rpartition('.')[2] for name in names)}}}"
