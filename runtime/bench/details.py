"""Long contexts, attention of one layer, and the choice of tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from lbq.runtime.bench.context import Bench, Model, state_at
from lbq.runtime.bench.models import kv_bytes, weight_bytes
from lbq.runtime.fused.plan import Plan
from lbq.runtime.fused.step import FusedStep
from lbq.runtime.kernels.attention import Cache, Heads, Scratch, attend, split_for
from lbq.runtime.kernels.planes import Activations
from lbq.runtime.kernels.sample import Chain, Choice, choose

DEPTHS = (4096, 32768, 131000)


def depths(bench: Bench, model: Model) -> None:
    decoder = model.decoder(bench.device)
    plan = bench.best.get(model, Plan(pdl=bench.pdl))
    bench.say(
        "| depth | µs a step | share of copy, weights and keys | same without the tuned split |\n|---|---|---|---|"
    )
    for depth in (40,) if bench.toy else DEPTHS:
        if bench.left() < 20 and not bench.toy:
            bench.say("No time left.")
            return
        slots = depth + 24
        state = state_at(decoder, slots, depth)
        token, at = (torch.full((1,), i, device=bench.device) for i in (5, depth))
        cells = []
        for chosen in (plan, replace(plan, split=None)):
            step = FusedStep(decoder, slots, chosen)
            seconds = bench.clock.seconds([partial(step.run, token, at, state)], replays=5)
            share = (weight_bytes(step) + kv_bytes(decoder, depth)) / seconds / bench.copy
            cells.append((seconds, share))
        bench.say(f"| {depth} | {cells[0][0] * 1e6:.0f} | {cells[0][1]:.0%} | {cells[1][0] * 1e6:.0f} µs |")
        del state, step


def int8_caches(bench: Bench) -> None:
    """Attention of one 8B layer at depth, in float16 and int8."""
    heads = Heads(2, 2, 64, 64, 0.125) if bench.toy else Heads(8, 4, 128, 128, 128**-0.5)
    bench.say("| depth | cache | µs | share of copy |\n|---|---|---|---|")
    for depth in (40,) if bench.toy else (512, 8192, 32768, 131072):
        for dtype in (torch.float16, torch.int8):
            shape = (2, heads.kv_heads, depth, heads.dim)
            copies = 2 if bench.toy else max(2, min(64, 200_000_000 // (2 * heads.kv_heads * depth * heads.dim)))
            split = split_for(heads, bench.sms)
            calls, nbytes = [], 0
            for _ in range(copies):
                if dtype == torch.int8:
                    kv = torch.randint(-127, 128, shape, dtype=dtype, device=bench.device)
                    cache_ = Cache(kv, torch.rand(shape[:3], device=bench.device))
                else:
                    cache_ = Cache(torch.randn(shape, device=bench.device, dtype=dtype))
                nbytes = cache_.kv.nbytes + (0 if cache_.scales is None else cache_.scales.nbytes)
                angles = (torch.rand(depth, heads.dim // 2, device=bench.device),) * 2
                calls.append(
                    partial(
                        attend,
                        torch.randn(heads.width, device=bench.device),
                        heads,
                        None,
                        None,
                        angles,
                        torch.full((1,), depth - 1, device=bench.device),
                        cache_,
                        Scratch.empty(heads, split, bench.device),
                        split,
                        Activations.empty(heads.kv_heads * heads.group * heads.dim, 4, bench.device),
                        pdl=bench.pdl,
                    )
                )
            seconds = bench.clock.seconds(calls, replays=7)
            bench.say(f"| {depth} | {dtype} | {seconds * 1e6:.1f} | {nbytes / seconds / bench.copy:.0%} |")


def sampling(bench: Bench) -> None:
    v = 97 if bench.toy else 151936
    logits = torch.randn(v, device=bench.device) * 3
    chain = Chain(v, 64, bench.device)
    chain.settings.copy_(torch.tensor([1.4, -4.0, 0.95, 1.1]))
    chain.top_k.fill_(20)
    bench.say(f"| of {v} logits | µs |\n|---|---|")
    for name, choice in {
        "greedy": Choice(),
        "temperature": Choice(sampled=True),
        "top-k": Choice(sampled=True, top_k=True),
        "top-k, top-p, penalty": Choice(sampled=True, top_k=True, top_p=True, penalty=True),
    }.items():

        def run(choice: Choice = choice) -> None:
            chain.position.zero_()
            choose(logits, chain, choice, pdl=bench.pdl)

        bench.say(f"| {name} | {bench.clock.seconds([run], replays=9, least=5) * 1e6:.1f} |")
