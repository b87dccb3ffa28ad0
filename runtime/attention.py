"""Causal grouped-query attention of one layer."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lbq.formats.spec import Attention
from lbq.runtime.cache import KVCache, MixerState
from lbq.runtime.kernels.linear import Linear
from lbq.runtime.norm import RmsNorm
from lbq.runtime.rope import Rotary
from lbq.runtime.step import Seen, Step
from lbq.runtime.turn import Turn

# Without cuDNN, which torch prefers on an H100: it builds a plan of tens of milliseconds for every new length.
CUDA_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class AttentionMixer:
    """q/k/v projection, q/k norm, rope, cache, attention, output projection."""

    def __init__(
        self,
        spec: Attention,
        qkv: Linear,
        out: Linear,
        rotary: Rotary,
        q_norm: RmsNorm | None = None,
        k_norm: RmsNorm | None = None,
    ) -> None:
        self.spec = spec
        self.qkv, self.out, self.rotary = qkv, out, rotary
        self.q_norm, self.k_norm = q_norm, k_norm
        self._turned = spec.heads + spec.kv_heads  # heads that rope turns: all but the values
        self.turn: Turn | None = None  # of keys that are kept in a few bits, once it is known

    def new_state(self, context: int, *, dtype: torch.dtype, device: torch.device, fixed: bool) -> KVCache:
        """An empty cache for up to ``context`` tokens."""
        spec = self.spec
        return KVCache(spec.kv_heads, spec.head_dim, context, dtype=dtype, device=device, fixed=fixed, turn=self.turn)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """q, k and v of float32 [T, hidden], [T, heads + 2 · kv_heads, head_dim]: normed, not turned yet."""
        spec = self.spec
        heads = self.qkv(x).view(x.shape[0], -1, spec.head_dim)
        if self.q_norm is not None:
            heads[:, : spec.heads] = self.q_norm(heads[:, : spec.heads])
        if self.k_norm is not None:
            heads[:, spec.heads : self._turned] = self.k_norm(heads[:, spec.heads : self._turned])
        return heads

    def __call__(self, x: torch.Tensor, state: MixerState, step: Step) -> torch.Tensor:
        """float32 [T, hidden] → float32 [T, hidden]; appends T tokens to ``state``."""
        assert isinstance(state, KVCache)
        spec = self.spec
        heads = self.heads(x)
        self.rotary.rotate_(heads[:, : self._turned], *step.angles(self.rotary))
        seen = step.store(state, heads[:, spec.heads :], spec.window)
        return self.out(attend(heads[:, : spec.heads], seen, spec.scale))


def attend(q: torch.Tensor, seen: Seen, scale: float) -> torch.Tensor:
    """softmax(scale · q · kᵀ) · v: float32 q [T, heads, head_dim] → float32 [T, heads · head_dim].

    Computes in the cache's dtype with float32 sums, whatever torch's kernel for the device does between. On CUDA torch
    chooses among CUDA_BACKENDS: flash attention for what needs no mask, else the memory-efficient kernel, and the plain
    formula, which keeps the scores of all tokens in memory, where neither takes the shape (a head_dim that is no
    multiple of 8, say). Which of them served is not reported.
    """
    tokens, heads, dim = q.shape
    kv_heads = seen.k.shape[0]
    group = heads // kv_heads
    if tokens > 1:
        # [kv_heads, group, T, head_dim]: each key/value head is a batch entry that its queries' heads share by stride 0
        grouped = q.view(tokens, kv_heads, group, dim).permute(1, 2, 0, 3).to(seen.k.dtype)
        k, v = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (seen.k, seen.v))
        return _sdpa(grouped, k, v, seen, scale).permute(2, 0, 1, 3).reshape(tokens, -1).to(q.dtype)
    # [kv_heads, group, head_dim]: for one token, the heads that share keys stand where tokens would
    grouped = q.view(kv_heads, group, dim).to(seen.k.dtype)
    if q.is_cpu and seen.mask is None:  # twice as fast there as torch's fused kernel
        weights = torch.bmm(grouped, seen.k.mT).mul_(scale).softmax(-1)
        return torch.bmm(weights, seen.v).view(1, -1).to(q.dtype)
    y = _sdpa(grouped.unsqueeze(0), seen.k.unsqueeze(0), seen.v.unsqueeze(0), seen, scale)
    return y.reshape(1, -1).to(q.dtype)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float) -> torch.Tensor:
    if q.is_cpu:
        return scaled_dot_product_attention(q, k, v, attn_mask=seen.mask, is_causal=seen.causal, scale=scale)
    with sdpa_kernel(CUDA_BACKENDS):
        return scaled_dot_product_attention(q, k, v, attn_mask=seen.mask, is_causal=seen.causal, scale=scale)
