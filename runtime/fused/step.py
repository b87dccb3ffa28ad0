"""One decode step of a decoder, from a token on the device to its logits there, in five launches a layer.

qkv · attention (norm and rope of q and k, the cache's new entry, merge) · out + residual · gate/up + activation ·
down + residual; an embedding before them and a head behind. What a launch hands to the next one are int8 planes of
activations, in buffers that layers share: each is read before it is written again.

A step is of one text, or of a few: their products then are those of ``kernels.batch``, one pass over the weights, and
everything else has an axis of texts.
"""

from __future__ import annotations

import torch

from lbq.runtime.attention import AttentionMixer
from lbq.runtime.cache import DecoderState, KVCache
from lbq.runtime.decoder import Decoder, DecoderLayer
from lbq.runtime.fused.layer import Attending, BatchProduct, Cut, Product, StepLayer
from lbq.runtime.fused.plan import ROLES, Plan, Role
from lbq.runtime.kernels import attention, batch, planes
from lbq.runtime.kernels.attention import Heads, Norms, Scratch, Short, Split
from lbq.runtime.kernels.cuda import CudaLinear, DenseCudaLinear
from lbq.runtime.kernels.gemv import BLOCK, sm_count
from lbq.runtime.kernels.planes import Activations, Normed
from lbq.runtime.kernels.project import Activation, arrivals, project_dense
from lbq.runtime.norm import RmsNorm
from lbq.runtime.rope import Rotary


def why_not(decoder: Decoder, texts: int = 1) -> str | None:
    """Why this step cannot run ``decoder`` on so many texts at a time, in words, or None where it can."""
    if texts > batch.TOKENS:
        return f"{texts} texts at a time: it has room for {batch.TOKENS}"
    if decoder.embedding.dtype not in (torch.bfloat16, torch.float16):
        return f"its embedding is {decoder.embedding.dtype}"
    for i, layer in enumerate(decoder.layers):
        mixer = layer.mixer
        if not isinstance(mixer, AttentionMixer):
            return f"layer {i} mixes tokens by {type(mixer).__name__}"
        trouble = attention.why_not(Heads.of(mixer.spec))
        if trouble is not None:
            return f"layer {i}: {trouble}"
        units = {"q/k/v": mixer.qkv, "output": mixer.out, "gate/up": layer.mlp.gate_up, "down": layer.mlp.down}
        for name, linear in units.items():
            if not isinstance(linear, CudaLinear) or linear.exact:
                return f"layer {i}: the {name} projection runs by {linear.kernel}"
            if texts > 1 and (trouble := batch.why_not(linear.weight)):
                return f"layer {i}: the {name} projection has {trouble}, which one pass for several texts cannot read"
    head = decoder.head
    if not isinstance(head, CudaLinear | DenseCudaLinear) or head.exact:
        return f"the head runs by {head.kernel}"
    if texts > 1 and isinstance(head, CudaLinear) and (trouble := batch.why_not(head.weight)):
        return f"the head has {trouble}, which one pass for several texts cannot read"
    return None


class _Buffers:
    """What launches hand on, made once for each shape."""

    def __init__(self, device: torch.device, texts: int) -> None:
        self._device, self._texts = device, texts
        self._activations: dict[tuple[str, int, int, float | None], Activations] = {}
        self._vectors: dict[tuple[str, int], torch.Tensor] = {}
        self._scratch: dict[tuple[Heads, Split | Short], Scratch] = {}

    def activations(self, name: str, k: int, bits: int, eps: float | None = None) -> Activations:
        key = (name, k, bits, eps)
        if key not in self._activations:
            block = BLOCK if self._texts == 1 else batch.tile_codes(bits)
            self._activations[key] = Activations.empty(k, bits, self._device, eps=eps, tokens=self._texts, block=block)
        return self._activations[key]

    def vector(self, name: str, n: int) -> torch.Tensor:
        """float32 [n], of several texts [texts, n]."""
        if (name, n) not in self._vectors:
            shape = (n,) if self._texts == 1 else (self._texts, n)
            self._vectors[name, n] = torch.empty(shape, dtype=torch.float32, device=self._device)
        return self._vectors[name, n]

    def counters(self, n: int) -> torch.Tensor:
        if ("counters", n) not in self._vectors:
            self._vectors["counters", n] = arrivals(n, self._device)
        return self._vectors["counters", n]

    def scratch(self, heads: Heads, cut: Split | Short) -> Scratch:
        if (heads, cut) not in self._scratch:
            self._scratch[heads, cut] = (
                Scratch.empty_short(heads, cut, self._device, self._texts)
                if isinstance(cut, Short)
                else Scratch.empty(heads, cut, self._device, self._texts)
            )
        return self._scratch[heads, cut]


class FusedStep:
    """The launches of one decoder's step; ``run`` allocates nothing and reads nothing on the host."""

    def __init__(self, decoder: Decoder, slots: int, plan: Plan, texts: int = 1) -> None:
        """For positions below ``slots``, the length of the caches. ``why_not(decoder, texts)`` must be None."""
        assert why_not(decoder, texts) is None
        self._decoder, self._plan, self._slots, self._texts = decoder, plan, slots, texts
        self._device = decoder.device
        self._sms = sm_count(self._device)
        self._buffers = _Buffers(self._device, texts)
        self._angles: dict[Rotary, tuple[torch.Tensor, torch.Tensor]] = {}
        self._x = self._buffers.vector("x", decoder.spec.hidden_size)
        self.logits = self._buffers.vector("logits", decoder.spec.vocab_size)
        layers, head = decoder.layers, decoder.head
        entries = [self._entry(layer.mixer_norm, _mixer(layer).qkv) for layer in layers]
        entries.append(self._entry(decoder.norm, head))
        self._first, self._last = entries[0], entries[-1]
        nexts = [*(_mixer(layer).qkv for layer in layers[1:]), head]
        self.layers = [self._layer(*each) for each in zip(layers, entries[:-1], entries[1:], nexts, strict=True)]
        self.head = None
        if isinstance(head, CudaLinear):
            self.head = self._product("head", head, self._last.to, self.logits)

    def products(self, role: Role) -> list[Product | BatchProduct]:
        """The projections of ``role``: one a layer, or the head's where it is packed."""
        if role == "head":
            return [] if self.head is None else [self.head]
        found: list[Product | BatchProduct] = [getattr(layer, role) for layer in self.layers]
        return found

    @property
    def launches(self) -> int:
        """Kernels a step."""
        layers = [product for role in ROLES if role != "head" for product in self.products(role)]
        apart = sum(product.apart for product in layers)
        attentions = sum(1 if layer.attention.whole is None else 2 for layer in self.layers)
        return 2 + len(layers) + attentions + apart

    @property
    def short_until(self) -> int:
        """Tokens up to which a text is short: it is attended to in another way then."""
        return max((layer.attention.short[0].until for layer in self.layers if layer.attention.short), default=0)

    @torch.inference_mode()
    def run(
        self, token: torch.Tensor, position: torch.Tensor, state: DecoderState, *, short: bool | None = None
    ) -> torch.Tensor:
        """Take in ``token`` at ``position``, int64 [1] on the device: logits, float32 [V], the same tensor every time.

        Of several texts all of these have an axis for them in front, and so have the caches. ``state``'s caches are
        fixed and of ``slots``; its ``length`` stays as it is. ``short``: attend as to a short text; None: if the text
        that ``state`` holds is one.
        """
        pdl = self._plan.pdl
        short = state.length < self.short_until if short is None else short
        planes.embed(token, self._decoder.embedding, self._x, self._first, pdl=pdl)
        for layer, cache in zip(self.layers, state.layers, strict=True):
            assert isinstance(cache, KVCache)
            layer.qkv.launch(pdl=pdl)
            layer.attention.launch(position, cache, pdl=pdl, short=short)
            layer.out.launch(pdl=pdl)
            layer.gate_up.launch(pdl=pdl)
            layer.down.launch(pdl=pdl)
        if self.head is not None:
            self.head.launch(pdl=pdl)
        else:
            head = self._decoder.head
            assert isinstance(head, DenseCudaLinear)
            squares = self._last.to.squares
            assert squares is not None
            project_dense(
                self._x,
                self._last.weight,
                squares,
                self._last.to.eps,
                head.weight,
                head.bias,
                self.logits,
                block=self._last.to.planes.block,
                pdl=pdl,
            )
        return self.logits

    def _entry(self, norm: RmsNorm, linear: object) -> Normed:
        """What the residual stream is written into before ``linear``; a dense head reads its squares alone."""
        bits = linear.weight.bits if isinstance(linear, CudaLinear) else 8
        return Normed(self._buffers.activations("stream", norm.weight.numel(), bits, norm.eps), norm.weight)

    def _layer(self, layer: DecoderLayer, entry: Normed, following: Normed, then: object) -> StepLayer:
        mixer, buffers = _mixer(layer), self._buffers
        heads = Heads.of(mixer.spec)
        out, gate_up, down = mixer.out, layer.mlp.gate_up, layer.mlp.down
        assert isinstance(out, CudaLinear)
        assert isinstance(down, CudaLinear)
        qkv = buffers.vector("qkv", heads.width)
        seen = buffers.activations("seen", out.k, out.weight.bits)
        between = self._entry(layer.mlp_norm, gate_up)
        gated = buffers.activations("gated", down.k, down.weight.bits)
        kinds = {16: torch.float16, 8: torch.int8, 4: torch.uint8}
        splits = {bits: self._plan.splitting(heads, self._sms, kind, self._texts) for bits, kind in kinds.items()}
        whole = None if heads.dim % seen.planes.block == 0 or self._texts == 1 else buffers.vector("attended", out.k)
        short = self._plan.shortening(heads, self._texts)
        return StepLayer(
            self._product("qkv", mixer.qkv, entry.to, qkv, then=out),
            Attending(
                qkv,
                heads,
                _norms(mixer.q_norm),
                _norms(mixer.k_norm),
                self._table(mixer.rotary),
                {bits: Cut(split, buffers.scratch(heads, split)) for bits, split in splits.items()},
                None if short is None else (short, buffers.scratch(heads, short)),
                seen,
                whole,
            ),
            self._product("out", out, seen, self._x, between, then=gate_up),
            self._product(
                "gate_up",
                gate_up,
                between.to,
                buffers.vector("gated", down.k),
                gated,
                layer.mlp.activation,
                then=down,
            ),
            self._product("down", down, gated, self._x, following, then=then),
        )

    def _product(
        self,
        role: Role,
        linear: object,
        x: Activations,
        y: torch.Tensor,
        to: Normed | Activations | None = None,
        activation: Activation = "silu",
        *,
        then: object = None,
    ) -> Product | BatchProduct:
        """``then``: the projection after this one."""
        assert isinstance(linear, CudaLinear)
        if self._texts > 1:
            return self._batched(role, linear, x, y, to, activation)
        how = self._plan.projecting(role, linear.weight, self._sms)
        shared = to is not None and not how.apart and how.outputs(role) % 32 != 0
        counters = self._buffers.counters(y.numel()) if shared else None
        weight = then.weight if isinstance(then, CudaLinear) else None
        return Product(linear.weight, linear.bias, role, how, x, y, to, counters, activation, weight)

    def _batched(
        self,
        role: Role,
        linear: CudaLinear,
        x: Activations,
        y: torch.Tensor,
        to: Normed | Activations | None,
        activation: Activation,
    ) -> BatchProduct:
        how = self._plan.batching(role, linear.weight, self._sms, self._texts)
        counters = None if to is None else self._buffers.counters(y.shape[1])
        return BatchProduct(linear.weight, linear.bias, role, how, x, y, to, counters, activation)

    def _table(self, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines float32 [slots, dims/2] of all positions, as the decoder itself computes them."""
        if rotary not in self._angles:
            cos, sin = rotary.angles(torch.arange(self._slots, device=self._device))
            self._angles[rotary] = (cos.view(self._slots, -1).contiguous(), sin[:, 0, 1].contiguous())
        return self._angles[rotary]


def _mixer(layer: DecoderLayer) -> AttentionMixer:
    assert isinstance(layer.mixer, AttentionMixer)
    return layer.mixer


def _norms(norm: RmsNorm | None) -> Norms | None:
    return None if norm is None else Norms(norm.weight, norm.eps)
