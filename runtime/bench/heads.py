"""Attention by itself, along the length of a text: up to where it is short, and how a long one is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from lbq.runtime.bench.compiling import compile_all, jobs_of
from lbq.runtime.bench.context import Bench, Model, state_at
from lbq.runtime.bench.tune import first_heads, splits
from lbq.runtime.cache import DecoderState, KVCache
from lbq.runtime.decoder import Decoder
from lbq.runtime.fused.plan import Plan
from lbq.runtime.fused.step import FusedStep
from lbq.runtime.kernels.attention import Split

UNTIL = (256, 512, 768, 1024, 1536, 2048, 3072, 4096)
LONG = (4096, 16384, 65536)
LAYERS = 8  # enough that keys come from memory at the longer lengths


def tune_heads(bench: Bench, model: Model, plan: Plan) -> Plan:
    """``plan`` with the fastest split for long texts, and short ones told from them where the two ways cross."""
    decoder = model.decoder(bench.device, layers=1 if bench.toy else LAYERS)
    heads = first_heads(decoder)
    known = plan.table.heads(heads) if plan.table and not bench.again else None
    if known is not None:
        bench.cuts.setdefault(heads, (known.split, known.short.until))
    if heads not in bench.cuts:
        split = _tune_split(bench, model, decoder, plan)
        bench.cuts[heads] = split, _tune_until(bench, decoder, replace(plan, split=split))
    split, until = bench.cuts[heads]
    short = plan.shortening(heads)
    return replace(plan, split=split, short=short and replace(short, until=until))


def attention_seconds(bench: Bench, decoder: Decoder, plan: Plan, state: DecoderState, *, short: bool) -> float:
    """Of one layer's attention to the text that ``state`` holds, in a chain of all layers of ``decoder``."""
    step = FusedStep(decoder, state.context, plan)
    at = torch.full((1,), state.length, device=bench.device)
    calls: list[Callable[[], None]] = []
    for layer, cache in zip(step.layers, state.layers, strict=True):
        assert isinstance(cache, KVCache)
        calls.append(partial(layer.attention.launch, at, cache, pdl=plan.pdl, short=short))
    return bench.clock.seconds(calls, replays=7)


def _tune_split(bench: Bench, model: Model, decoder: Decoder, plan: Plan) -> Split:
    found = splits(first_heads(decoder), bench.sms)[: 1 if bench.toy else None]
    compile_all(bench, jobs_of(model, [replace(plan, split=split) for split in found]))
    times: dict[Split, list[float]] = {split: [] for split in found}
    for depth in (40,) if bench.toy else LONG:
        state = state_at(decoder, depth + 1, depth)
        for split in found:
            times[split].append(attention_seconds(bench, decoder, replace(plan, split=split), state, short=False))
    bench.say("\n| splits × block, least, stages, warps | " + " | ".join(f"{d} tokens, µs" for d in LONG) + " |")
    bench.say("|---|" + "---|" * len(LONG))
    for split, seconds in times.items():
        cells = " | ".join(f"{t * 1e6:.1f}" for t in seconds)
        bench.say(f"| {split.splits}×{split.block}, {split.least}, {split.stages}, {split.warps} | {cells} |")
    return min(found, key=lambda split: math.prod(times[split]))


def _tune_until(bench: Bench, decoder: Decoder, plan: Plan) -> int:
    """The length at which a cut cache begins to be faster than the way for short texts."""
    until = UNTIL[0]
    bench.say("\n| tokens | as a short text, µs | cut, µs |\n|---|---|---|")
    for depth in (40,) if bench.toy else UNTIL:
        state = state_at(decoder, depth + 1, depth)
        times = [attention_seconds(bench, decoder, plan, state, short=short) for short in (True, False)]
        bench.say(f"| {depth} | {times[0] * 1e6:.1f} | {times[1] * 1e6:.1f} |")
        if times[0] > times[1]:
            break
        until = depth
    return until
