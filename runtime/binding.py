"""Weights by exact name from the spec into a decoder: one kernel for each fused unit, unit by unit.

Never more than one unit is in memory twice, or one layer on a GPU: its parts are joined, handed to the device's kernel,
and the mapped pages they came from are released; for a GPU all at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

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
        """The memory of ``module``'s packed weight is not needed soon."""
        ...

    def release_dense(self, name: str) -> None:
        """The memory of tensor ``name`` is not needed soon."""
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


@dataclass(frozen=True)
class _Packed:
    """The parts of a unit as they are stored, in codes."""

    parts: tuple[Projection, ...]
    weights: Sequence[PackedWeight]

    @property
    def groups(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [w.words for w in self.weights], [w.scales for w in self.weights]

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.weights)


@dataclass(frozen=True)
class _Dense:
    """The parts of a unit as they are stored, in 16 or 32 bits."""

    parts: tuple[Projection, ...]
    weights: Sequence[torch.Tensor]

    @property
    def groups(self) -> tuple[Sequence[torch.Tensor]]:
        return (self.weights,)

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.weights)


def bind(weights: Weights, kernels: Kernels) -> Bound:
    """Bind every tensor that the spec names."""
    # Releasing pages interrupts all processors that read others for a GPU: 5 GB take 160 ms instead of 130.
    binder, spec = Binder(weights, kernels, release_at_once=kernels.device.type != "cuda"), weights.spec
    embedding = binder.embedding()
    layers = [binder.layer(i) for i in range(len(spec.layers))]
    norm, head = binder.norm(), binder.head(embedding)
    binder.release_moved()
    return Bound(Decoder(spec, embedding, layers, norm, head), binder.uses, binder.resident_bytes)


class Binder:
    """Binds a model part by part, so that whoever runs it layer by layer need never hold it whole."""

    def __init__(self, weights: Weights, kernels: Kernels, *, release_at_once: bool = True) -> None:
        """What has been moved is released with each unit, or by :meth:`release_moved`."""
        self._weights, self._kernels, self._spec = weights, kernels, weights.spec
        self._release_at_once = release_at_once
        self._moved: list[Callable[[], None]] = []  # what releases it
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
        ((_, (moved,)),) = self._mover.move([_Dense((), [self._weights.dense(name)])])
        if moved.is_cpu:
            return moved
        self._was_moved(partial(self._weights.release_dense, name))
        if not self._spec.tied:  # else it is counted with the head
            self.resident_bytes += moved.nbytes
        return moved

    def layer(self, i: int) -> DecoderLayer:
        """Layer ``i``."""
        layer = self._spec.layer(i)
        qkv, out, gate_up, down = self._linears(self._spec.layer_units(i))
        mixer_norm, mlp_norm = self._norm(layer.mixer_norm, i), self._norm(layer.mlp_norm, i)
        mixer = AttentionMixer(
            layer.mixer,
            qkv,
            out,
            self._rotary(layer.mixer.rope),
            self._norm(layer.mixer.q_norm, i) if layer.mixer.q_norm else None,
            self._norm(layer.mixer.k_norm, i) if layer.mixer.k_norm else None,
        )
        return DecoderLayer(mixer_norm, mixer, mlp_norm, Mlp(layer.mlp, gate_up, down))

    def norm(self) -> RmsNorm:
        """The norm behind the last layer."""
        return self._norm(self._spec.norm, 0)

    def head(self, embedding: torch.Tensor | None = None) -> Linear:
        """The output head. ``embedding``, if it is bound already, is the weight where the spec ties them."""
        if not self._spec.tied:
            return next(self._linears([(self._spec.head,)]))
        return self._tied_head(
            self._weights.dense(f"{self._spec.embedding}.weight") if embedding is None else embedding
        )

    def release_moved(self) -> None:
        """Release all that was moved until now."""
        while self._moved:
            self._moved.pop()()

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

    def _was_moved(self, release: Callable[[], None]) -> None:
        self._moved.append(release)
        if self._release_at_once:
            self.release_moved()

    def _rotary(self, rope: Rope) -> Rotary:
        if rope not in self._rotaries:
            self._rotaries[rope] = Rotary(rope, self._kernels.device)
        return self._rotaries[rope]

    def _norm(self, norm: Norm, i: int) -> RmsNorm:
        weight = self._weights.dense(f"{norm.name.replace('{i}', str(i))}.weight").to(torch.float32)
        # Not waited for: that would be for all weights on their way.
        return RmsNorm(weight.to(self._kernels.device, non_blocking=True), norm.eps)

    def _linears(self, units: Iterable[tuple[Projection, ...]]) -> Iterator[Linear]:
        """A kernel for each unit: projections that read the same input, their outputs one after the other."""
        for stored, moved in self._mover.move(map(self._stored, units)):
            linear = self._packed(stored, *moved) if isinstance(stored, _Packed) else self._dense(stored, *moved)
            held = held_bytes(linear, len(stored.parts), stored.nbytes)
            self.resident_bytes += held
            if held:
                self._was_moved(partial(self._release, stored.parts))
            del stored, moved  # what the kernel does not hold is not in memory beside the next unit
            yield linear

    def _stored(self, parts: tuple[Projection, ...]) -> _Packed | _Dense:
        quantized = {self._weights.is_quantized(p.name) for p in parts}
        assert len(quantized) == 1
        if quantized.pop():
            return _Packed(parts, [self._weights.packed(p.name) for p in parts])
        return _Dense(parts, [self._weights.dense(f"{p.name}.weight") for p in parts])

    def _packed(self, stored: _Packed, words: torch.Tensor, scales: torch.Tensor) -> Linear:
        first = stored.weights[0]
        assert all((w.bits, w.group, w.k) == (first.bits, first.group, first.k) for w in stored.weights)
        whole = PackedWeight(words, scales, first.bits, first.group, first.k)
        linear = self._kernels.packed(whole, self._bias(stored.parts))
        return self._use(stored.parts, linear, whole.bits, whole.group)

    def _dense(self, stored: _Dense, whole: torch.Tensor) -> Linear:
        return self._use(stored.parts, self._kernels.dense(whole, self._bias(stored.parts)), 8 * whole.itemsize)

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
