"""One token's attention at depth by itself: on both kinds of caches, cut in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from lbq.runtime.bench.context import Bench
from lbq.runtime.bench.decode import fill
from lbq.runtime.cache import KVCache
from lbq.runtime.fused.plan import Plan
from lbq.runtime.fused.tables import device_table
from lbq.runtime.kernels.attention import Cache, Heads, Scratch, Split, attend
from lbq.runtime.kernels.planes import Activations

DEPTHS = (4096, 16384, 32768, 65536, 131072)
L2_BYTES = 200_000_000  # of caches that a chain reads, so that L2 holds little of what is read next
KINDS = (torch.float16, torch.int8, torch.uint8)


def random_cache(bench: Bench, heads: Heads, slots: int, dtype: torch.dtype) -> KVCache:
    """Full of random keys and values."""
    cache = KVCache(heads.kv_heads, heads.dim, slots, dtype=dtype, device=bench.device, fixed=True)
    fill(cache, slots, torch.Generator(bench.device).manual_seed(3))
    return cache


def attention_seconds(bench: Bench, heads: Heads, caches: Sequence[KVCache], split: Split) -> float:
    """Of one launch in a chain of one for each cache, at their last slot."""
    slots = caches[0].kv.shape[2]
    angles = (torch.rand(slots, heads.rope_dims // 2, device=bench.device),) * 2
    scratch = Scratch.empty(heads, split, bench.device)
    to = Activations.empty(heads.kv_heads * heads.group * heads.dim, 4, bench.device)
    at = torch.full((1,), slots - 1, device=bench.device)
    qkv = torch.randn(heads.width, device=bench.device)
    calls = [
        partial(
            attend,
            qkv,
            heads,
            None,
            None,
            angles,
            at,
            Cache(cache.kv, cache.scales, cache.turn),
            scratch,
            split,
            to,
            pdl=bench.pdl,
        )
        for cache in caches
    ]
    return bench.clock.seconds(calls, replays=9, least=4)


def tabulate(
    bench: Bench, heads: Heads, kinds: Sequence[tuple[torch.dtype, Sequence[Split]]], depths: Sequence[int] = DEPTHS
) -> None:
    """µs and share of copy bandwidth for each kind of cache, way to cut it and depth."""
    depths = (40,) if bench.toy else depths
    bench.say("| cache | parts × tokens a block, stages, warps | " + " | ".join(f"{d} tokens" for d in depths) + " |")
    bench.say("|---|---|" + "---|" * len(depths))
    rows: dict[tuple[torch.dtype, Split], list[str]] = {(kind, split): [] for kind, found in kinds for split in found}
    for depth in depths:
        for kind, found in kinds:
            nbytes = random_cache(bench, heads, 1, kind).nbytes * depth
            count = 2 if bench.toy else max(2, min(64, L2_BYTES // nbytes))
            caches = [random_cache(bench, heads, depth, kind) for _ in range(count)]
            for split in found:
                seconds = attention_seconds(bench, heads, caches, split)
                rows[kind, split].append(f"{seconds * 1e6:.1f} µs {nbytes / seconds / bench.copy:.0%}")
            del caches
    for (kind, split), cells in rows.items():
        way = f"{split.splits}×{split.block}, {split.stages}, {split.warps}"
        way += f", {split.ahead} ahead" if split.ahead else ""
        bench.say(f"| {str(kind).removeprefix('torch.')} | {way} | " + " | ".join(cells) + " |")


def at_depth(bench: Bench) -> None:
    """Both kinds of caches of a layer of Llama-3.1-8B, cut as they are on this GPU."""
    heads = Heads(2, 2, 64, 64, 0.125) if bench.toy else Heads(8, 4, 128, 128, 128**-0.5)
    plan = Plan(table=None if bench.toy else device_table(bench.device))
    tabulate(bench, heads, [(kind, [plan.splitting(heads, bench.sms, kind)]) for kind in KINDS])
