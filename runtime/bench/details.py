"""Long contexts, attention of one layer, and the choice of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from lbq.formats.packing import PackedWeight
from lbq.runtime.bench.checks import relative_error
from lbq.runtime.bench.compiling import BATCH_TILES
from lbq.runtime.bench.context import Bench, Model, state_at
from lbq.runtime.bench.models import kv_bytes, weight_bytes
from lbq.runtime.bench.tune import step_weights
from lbq.runtime.fused.plan import Plan
from lbq.runtime.fused.step import FusedStep
from lbq.runtime.kernels import batch, gemv
from lbq.runtime.kernels.batch import BatchTile
from lbq.runtime.kernels.gemv import ArrangedWeight
from lbq.runtime.kernels.gemv.reference import gemv as float64_product
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


def batches(bench: Bench, model: Model) -> None:
    """One layer's products for a few tokens: tensor cores in one pass, the present kernel's pass a token, torch."""
    decoder = model.decoder(bench.device, layers=1)
    bench.say("| product | tokens | tensor cores: best tile, µs, error | a pass a token, µs | torch BF16, µs |")
    bench.say("|---|---|---|---|---|")
    for role, weight in step_weights(decoder).items():
        if role == "head" or batch.why_not(weight) is not None:
            continue
        for tokens in (3,) if bench.toy else (1, 2, 4, 8, 16):
            best, error = _best_batch(bench, weight, tokens)
            x = torch.randn(tokens, weight.k, device=bench.device)
            passes = _cold(bench, weight, partial(gemv.gemv, gemv.quantize(x, weight.bits)))
            dense = torch.randn(weight.n, weight.k, device=bench.device).bfloat16()
            torchs = bench.clock.seconds([partial(torch.nn.functional.linear, x.bfloat16(), dense)], least=4)
            cells = f"{_named(best[1])} {best[0] * 1e6:.1f} err {error:.1e} | {passes * 1e6:.1f} | {torchs * 1e6:.1f}"
            bench.say(f"| {role} {weight.n}×{weight.k} INT{weight.bits} | {tokens} | {cells} |")


def _best_batch(bench: Bench, weight: ArrangedWeight, tokens: int) -> tuple[tuple[float, BatchTile], float]:
    """Seconds and tile of the fastest, and its error."""
    x = torch.randn(tokens, weight.k, device=bench.device)
    planes = batch.planes(x, weight.bits)
    times = [(_cold(bench, weight, partial(batch.batch, planes, tile=tile)), tile) for tile in BATCH_TILES]
    best = min(times, key=lambda one: one[0])
    rows = min(weight.n, 4096)
    first = PackedWeight(weight.words[:rows], weight.scales[:rows], weight.bits, weight.group, weight.k)
    y = batch.batch(planes, weight, tile=best[1])[:, :rows]
    return best, relative_error(y, float64_product(x, first))


def _named(tile: BatchTile) -> str:
    return f"{tile.blocks} × {16 * tile.rows} rows by {tile.split} warps, {tile.depth} steps ahead"


def _cold(bench: Bench, weight: ArrangedWeight, product: Callable[[ArrangedWeight], object]) -> float:
    """Seconds of a product over copies of ``weight`` that exceed L2 together."""
    copies = 2 if bench.toy else max(2, min(64, 300_000_000 // weight.nbytes))
    weights = [weight, *(replace(weight, words=weight.words.clone()) for _ in range(copies - 1))]
    return bench.clock.seconds([partial(product, one) for one in weights], replays=7)


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
