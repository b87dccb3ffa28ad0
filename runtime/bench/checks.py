"""Kernels of the fused step against float64, and the whole step against exact products, at real sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from lbq.formats.packing import PackedWeight
from lbq.runtime.bench.context import GROUP, Bench, Model, put, state_at
from lbq.runtime.bench.shapes import SHAPES
from lbq.runtime.bench.tune import shorts
from lbq.runtime.bench.weights import RandomWeights
from lbq.runtime.cache import KVCache, name_of, opened
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.engine_cuda import CudaEngine
from lbq.runtime.fused.engine import FusedEngine
from lbq.runtime.fused.plan import Plan
from lbq.runtime.kernels import gemv, planes
from lbq.runtime.kernels.attention import Cache, Heads, Scratch, Short, attend, attend_short, split_for
from lbq.runtime.kernels.attention import reference as plain_attention
from lbq.runtime.kernels.gemv import Tile
from lbq.runtime.kernels.gemv.reference import gemv as float64_product
from lbq.runtime.kernels.gemv.tiles import whole_rows
from lbq.runtime.kernels.planes import Activations, Normed
from lbq.runtime.kernels.planes.reference import rms_norm, value
from lbq.runtime.kernels.project import arrivals, project

Case = tuple[str, float, float]  # what, its error, the bound


def relative_error(y: torch.Tensor, y64: torch.Tensor) -> float:
    return float((y.double() - y64).norm() / y64.norm())


def divergence(expected: torch.Tensor, got: torch.Tensor) -> float:
    """KL of one row of logits to another, in float64."""
    p, q = expected.double().log_softmax(0), got.double().log_softmax(0)
    return float((p.exp() * (p - q)).sum())


def check_kernels(bench: Bench) -> None:
    bench.say("| kernel | case | error | bound | |\n|---|---|---|---|---|")
    for case, error, bound in (*_projections(bench), *_attentions(bench)):
        verdict = "" if error <= bound else "**WRONG**"
        bench.say(f"| {case} | {error:.1e} | {bound:.0e} | {verdict} |")


def _projections(bench: Bench) -> Iterator[Case]:
    n, k = (70, 96) if bench.toy else (4096, 4096)
    x = torch.randn(k, device=bench.device)
    for bits in (4,) if bench.toy else (3, 4, 8):
        source = Activations.empty(k, bits, bench.device)
        planes.plain(x, source)
        for tile in (Tile(16, 32, 2), Tile(64, 64, 4)) if bench.toy else (Tile(2, 128, 1), Tile(32, 128, 8)):
            yield from _added(bench, x, source, n, tile)
            yield _gated(bench, x, source, n, replace(tile, rows=min(64, 2 * tile.rows)))
        whole = whole_rows(k, bits, 2, 4, 1)
        assert whole is not None
        yield from _added(bench, x, source, n, whole)
        yield _gated(bench, x, source, n, whole)


def _weight(bench: Bench, n: int, x: Activations) -> PackedWeight:
    k, bits = x.planes.k, x.planes.bits
    group = k if bits == 8 else 32 if bench.toy else GROUP
    return RandomWeights(SHAPES["tiny"].spec(), bits, group, bench.device).draw(n, k, bits, group)


def _added(bench: Bench, x: torch.Tensor, source: Activations, n: int, tile: Tile) -> Iterator[Case]:
    weight, w = _weight(bench, n, source), torch.randn(n, device=bench.device)
    stream = torch.randn(n, device=bench.device)
    expected = stream.double() + float64_product(x[None], weight)[0]
    to = Normed(Activations.empty(n, 4, bench.device, eps=1e-6), w)
    project(
        source,
        gemv.arrange(weight),
        None,
        stream,
        kind="add",
        tile=tile,
        to=to,
        counters=arrivals(n, bench.device),
        pdl=bench.pdl,
        ahead=True,
        early=2,
    )
    yield f"out/down INT{weight.bits} | {tile}", relative_error(stream, expected), 2e-4
    yield f"its planes | {tile}", relative_error(value(to.to), rms_norm(expected, w, 1e-6)), 2e-4


def _gated(bench: Bench, x: torch.Tensor, source: Activations, n: int, tile: Tile) -> Case:
    weight = _weight(bench, 2 * n, source)
    gate, up = float64_product(x[None], weight)[0].split(n)
    y, to = torch.full((n,), float("nan"), device=bench.device), Activations.empty(n, 8, bench.device)
    project(
        source,
        gemv.arrange(weight),
        None,
        y,
        kind="gated",
        tile=tile,
        to=to,
        counters=arrivals(n, bench.device),
        pdl=bench.pdl,
        ahead=True,
    )
    expected = torch.nn.functional.silu(gate) * up
    return f"gate/up INT{weight.bits} | {tile}", relative_error(value(to), expected), 2e-4


def _attentions(bench: Bench) -> Iterator[Case]:
    cases = ((2, 2, 64, (20,)),) if bench.toy else ((8, 4, 128, (0, 200, 5000)), (2, 7, 64, (63, 3000)))
    for kv_heads, group, dim, positions in cases:
        heads = Heads(kv_heads, group, dim, dim, dim**-0.5)
        for position in positions:
            yield _attended(bench, heads, position, torch.float16, 1e-3, None)
            yield _attended(bench, heads, position, torch.int8, 1e-3, None)
            yield _attended(bench, heads, position, torch.uint8, 2e-3, None)
            for short in shorts(heads)[: 1 if bench.toy else None]:
                yield _attended(bench, heads, position, torch.float16, 2e-4, short)


def _attended(bench: Bench, heads: Heads, position: int, dtype: torch.dtype, bound: float, short: Short | None) -> Case:
    slots, split = position + 64, split_for(heads, bench.sms, dtype)
    cache = KVCache(heads.kv_heads, heads.dim, slots, dtype=dtype, device=bench.device, fixed=True)
    cache.put(slice(0, slots), torch.randn(slots, 2 * heads.kv_heads, heads.dim, device=bench.device))
    angle = torch.rand(slots, heads.dim // 2, device=bench.device) * 6
    angles = angle.cos(), angle.sin()
    qkv = torch.randn(heads.width, device=bench.device)
    to = Activations.empty(heads.kv_heads * heads.group * heads.dim, 4, bench.device)
    at, scratch = torch.tensor([position], device=bench.device), Scratch.empty(heads, split, bench.device)
    text = (qkv, heads, None, None, angles, at, Cache(cache.kv, cache.scales, cache.turn))
    if short is None:
        attend(*text, scratch, split, to, pdl=bench.pdl)
    else:
        attend_short(*text, Scratch.empty_short(heads, short, bench.device), short, to, pdl=bench.pdl)
    q, _, _ = plain_attention.new_entry(qkv, heads, None, None, angles[0][position], angles[1][position])
    kv = cache.kv[:, :, : position + 1]
    if cache.scales is None or cache.turn is None:
        k, v = kv.double()
    else:
        k, v = opened(kv, cache.scales[:, :, : position + 1].double(), cache.turn)
    error = relative_error(value(to), plain_attention.attend(q, k, v, heads))
    kind = name_of(dtype) + (f" {short.parts}×{short.block}/{short.warps}" if short else "")
    return f"attention {heads.kv_heads}×{heads.group}×{heads.dim} {kind} | position {position}", error, bound


def check_step(bench: Bench, model: Model) -> None:
    """Logits of the present and of the fused engine against exact products; races show as bits that change."""
    slots = 64 if bench.toy else 512
    depth = slots // 2
    decoder = model.decoder(bench.device)
    state = state_at(decoder, slots, depth)
    exact = DecoderEngine(model.decoder(bench.device, exact=True), slots)
    cut = Short(until=0)
    engines = {
        "present": CudaEngine(decoder, slots, graphs=not bench.toy),
        "fused": FusedEngine(decoder, slots, plan=Plan(), graphs=not bench.toy),
        "fused, PDL": FusedEngine(decoder, slots, plan=Plan(pdl=bench.pdl), graphs=not bench.toy),
        "fused, as shipped": FusedEngine(decoder, slots, graphs=not bench.toy),
        "fused, cut cache, PDL": FusedEngine(decoder, slots, plan=Plan(short=cut, pdl=bench.pdl), graphs=not bench.toy),
    }
    exact._state.layers = exact._decoder.new_state(slots, fixed=True).layers
    for engine in (exact, *engines.values()):
        put(engine, state)
    expected = exact.decode(5)
    bench.say("| engine | KL to exact products | largest difference of a logit | same bits in 30 repeats |")
    bench.say("|---|---|---|---|")
    first = None
    for name, engine in engines.items():
        logits = engine.decode(5).clone()
        same = True
        for _ in range(1 if bench.toy else 30):
            engine.truncate(depth)
            same &= torch.equal(engine.decode(5), logits)
        worst = float((logits - expected).abs().max())
        bench.say(f"| {name} | {divergence(expected, logits):.1e} | {worst:.1e} | {'yes' if same else '**NO**'} |")
        if name in ("fused", "fused, PDL"):
            first = logits if first is None else first
            if not torch.equal(first, logits):
                bench.say("**The fused step gives other bits with PDL than without.**")
    bench.say(f"\nLogits range over {float(expected.max() - expected.min()):.1f}.")
