#!/usr/bin/env python3
"""Check, time and tune the fused decode step on a GPU: ``PYTHONPATH=src python3 scripts/gpu_bench.py [--out FILE]``.

In the order of what is needed most, within ``--budget`` seconds: kernels against float64; the whole step against exact
products, with itself and with programmatic dependent launch off; then for each model of random weights the present
engine against the fused one, untuned and tuned; kernels in their chains; long contexts; the choice of tokens.

Tables are Markdown. ``--toy`` runs all of it at a toy size in Triton's interpreter on a CPU, where times mean nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice

import torch
import triton

from lbq.runtime.bench.shapes import SHAPES
from lbq.runtime.bench.timing import Clock
from lbq.runtime.bench.tune import Search, Tried
from lbq.runtime.bench.weights import DeviceKernels, RandomWeights
from lbq.runtime.binding import bind
from lbq.runtime.cache import DecoderState, KVCache
from lbq.runtime.decoder import Decoder
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.engine_cuda import CudaEngine
from lbq.runtime.fused.engine import FusedEngine
from lbq.runtime.fused.plan import ROLES, Plan
from lbq.runtime.fused.step import FusedStep
from lbq.runtime.kernels import gemv, planes
from lbq.runtime.kernels.attention import Cache, Heads, Scratch, attend, split_for
from lbq.runtime.kernels.attention import reference as plain_attention
from lbq.runtime.kernels.gemv import Tile, sm_count
from lbq.runtime.kernels.gemv.reference import gemv as float64_product
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.kernels.planes import Activations, Normed
from lbq.runtime.kernels.planes.reference import rms_norm, value
from lbq.runtime.kernels.project import arrivals, project
from lbq.runtime.kernels.sample import Chain, Choice, choose
from lbq.runtime.text.sampling import Sampler, SamplingOptions

GROUP, PROMPT, NEW = 256, 128, 256
MODELS = ("llama-3.1-8b:4", "qwen3-1.7b:4", "qwen3-0.6b:4", "llama-3.1-8b:8", "llama-3.1-8b:3")
DEPTHS = (4096, 32768, 131000)
SAMPLED = SamplingOptions(temperature=0.7, top_k=20, top_p=0.95, seed=1)


@dataclass(frozen=True)
class Model:
    """Random weights of a known shape."""

    shape: str
    bits: int

    def __str__(self) -> str:
        return f"{self.shape} INT{self.bits}"

    def decoder(self, device: torch.device, *, layers: int | None = None, exact: bool = False) -> Decoder:
        shape = SHAPES[self.shape]
        shape = shape if layers is None else replace(shape, layers=layers)
        group = 32 if self.shape == "toy" else GROUP
        return bind(RandomWeights(shape.spec(), self.bits, group, device), DeviceKernels(device, exact)).decoder


@dataclass
class Bench:
    """What all parts share."""

    device: torch.device
    clock: Clock
    pdl: bool
    deadline: float
    toy: bool
    lines: list[str] = field(default_factory=list)
    copy: float = 1e9
    best: dict[Model, Plan] = field(default_factory=dict)
    pool: ProcessPoolExecutor | None = None

    @property
    def sms(self) -> int:
        return sm_count(self.device)

    @property
    def new(self) -> int:
        return 2 if self.toy else NEW

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, line: str = "") -> None:
        self.lines.append(line)
        print(line, flush=True)

    def part(self, what: str, run: Callable[[], None], *, least: float = 5.0) -> None:
        """Run one part if there is time for it; a failure is told and does not end the rest."""
        self.say(f"\n## {what}\n")
        if self.left() < least:
            self.say("Left out: no time left.")
            return
        began = time.monotonic()
        try:
            run()
        except Exception:
            self.say("FAILED\n```\n" + traceback.format_exc(limit=12) + "```")
        self.clock.synchronize()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"\n({time.monotonic() - began:.1f} s)")


def relative_error(y: torch.Tensor, y64: torch.Tensor) -> float:
    return float((y.double() - y64).norm() / y64.norm())


def divergence(expected: torch.Tensor, got: torch.Tensor) -> float:
    """KL of one row of logits to another, in float64."""
    p, q = expected.double().log_softmax(0), got.double().log_softmax(0)
    return float((p.exp() * (p - q)).sum())


# Kernels against float64


def check_kernels(bench: Bench) -> None:
    bench.say("| kernel | case | error | bound | |\n|---|---|---|---|---|")
    for case, error, bound in (*_projections(bench), *_attentions(bench)):
        verdict = "" if error <= bound else "**WRONG**"
        bench.say(f"| {case} | {error:.1e} | {bound:.0e} | {verdict} |")


def _projections(bench: Bench) -> Iterator[tuple[str, float, float]]:
    n, k = (70, 96) if bench.toy else (4096, 4096)
    x, w = torch.randn(k, device=bench.device), torch.randn(n, device=bench.device)
    for bits in (4,) if bench.toy else (3, 4, 8):
        weights = RandomWeights(SHAPES["toy"].spec(), bits, 32 if bench.toy else GROUP, bench.device)
        group = k if bits == 8 else weights._group
        draw = partial(weights._draw, bits=bits, group=group)
        source = Activations.empty(k, bits, bench.device)
        planes.plain(x, source)
        for tile in (Tile(16, 32, 2), Tile(64, 64, 4)) if bench.toy else (Tile(2, 128, 1), Tile(32, 128, 8)):
            weight = draw(_named(n, k))
            product = float64_product(x[None], weight)[0]
            stream = torch.randn(n, device=bench.device)
            expected = stream.double() + product
            to, counters = Normed(Activations.empty(n, 4, bench.device, eps=1e-6), w), arrivals(n, bench.device)
            options = {"tile": tile, "counters": counters, "pdl": bench.pdl, "ahead": True}
            project(source, gemv.arrange(weight), None, stream, kind="add", to=to, **options)
            yield f"out/down INT{bits} | {tile}", relative_error(stream, expected), 2e-4
            yield f"its planes | {tile}", relative_error(value(to.to), rms_norm(expected, w, 1e-6)), 2e-4
            weight = draw(_named(2 * n, k))
            gate, up = float64_product(x[None], weight)[0].split(n)
            gated, y = Activations.empty(n, 8, bench.device), torch.full((n,), float("nan"), device=bench.device)
            options["tile"] = replace(tile, rows=min(64, 2 * tile.rows))
            project(source, gemv.arrange(weight), None, y, kind="gated", to=gated, **options)
            expected = torch.nn.functional.silu(gate) * up
            yield f"gate/up INT{bits} | {options['tile']}", relative_error(value(gated), expected), 2e-4


def _named(n: int, k: int) -> object:
    from lbq.formats.spec import Projection

    return Projection("x", n, k)


def _attentions(bench: Bench) -> Iterator[tuple[str, float, float]]:
    cases = ((2, 2, 64, (20,)),) if bench.toy else ((8, 4, 128, (0, 200, 5000)), (2, 7, 64, (63, 3000)))
    for kv_heads, group, dim, positions in cases:
        heads = Heads(kv_heads, group, dim, dim, dim**-0.5)
        slots = max(positions) + 64
        split = split_for(heads, bench.sms)
        angle = torch.rand(slots, dim // 2, device=bench.device) * 6
        for dtype, bound in ((torch.float16, 1e-3), (torch.int8, 5e-3)):
            for position in positions:
                kv = torch.randn(2, kv_heads, slots, dim, device=bench.device)
                scales = kv.abs().amax(-1) / 127 if dtype == torch.int8 else None
                cached = kv.to(dtype) if scales is None else (kv / scales[..., None]).round().to(dtype)
                qkv = torch.randn(heads.width, device=bench.device)
                to = Activations.empty(kv_heads * group * dim, 4, bench.device)
                at = torch.tensor([position], device=bench.device)
                angles = angle.cos(), angle.sin()
                scratch = Scratch.empty(heads, split, bench.device)
                args = (qkv, heads, None, None, angles, at, Cache(cached, scales), scratch, split, to)
                attend(*args, pdl=bench.pdl)
                q, _, _ = plain_attention.new_entry(qkv, heads, None, None, angles[0][position], angles[1][position])
                seen = cached[:, :, : position + 1].double()
                if scales is not None:
                    seen *= scales[:, :, : position + 1, None].double()
                expected = plain_attention.attend(q, seen[0], seen[1], heads)
                what = f"attention {kv_heads}×{group}×{dim} {str(dtype).removeprefix('torch.')} | position {position}"
                yield what, relative_error(value(to), expected), bound


# The whole step


def state_at(decoder: Decoder, slots: int, position: int, seed: int = 3) -> DecoderState:
    """Caches of random keys and values before ``position``."""
    state = decoder.new_state(slots, dtype=torch.float16, fixed=True)
    random = torch.Generator(decoder.device).manual_seed(seed)
    for layer in state.layers:
        assert isinstance(layer, KVCache)
        layer.kv[:, :, :position].normal_(generator=random)
    state.length = position
    return state


def put(engine: DecoderEngine, state: DecoderState) -> None:
    """Make ``engine`` hold what ``state`` holds."""
    for to, was in zip(engine._state.layers, state.layers, strict=True):
        to.kv[:, :, : state.length] = was.kv[:, :, : state.length]
    engine._state.length = state.length


def check_step(bench: Bench, model: Model) -> None:
    """Logits of the present and of the fused engine against exact products; races show as bits that change."""
    slots = 64 if bench.toy else 512
    depth = slots // 2
    decoder = model.decoder(bench.device)
    state = state_at(decoder, slots, depth)
    exact = DecoderEngine(model.decoder(bench.device, exact=True), slots)
    engines = {
        "present": CudaEngine(decoder, slots, graphs=not bench.toy),
        "fused": FusedEngine(decoder, slots, plan=Plan(), graphs=not bench.toy),
        "fused, PDL": FusedEngine(decoder, slots, plan=Plan(pdl=bench.pdl), graphs=not bench.toy),
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
        if name != "present":
            first = logits if first is None else first
            if not torch.equal(first, logits):
                bench.say("**The fused step gives other bits with PDL than without.**")
    bench.say(f"\nLogits range over {float(expected.max() - expected.min()):.1f}.")


# Compiling ahead, on all cores


@dataclass(frozen=True)
class Job:
    """One kernel of a plan, or with no role the present engine's."""

    model: Model
    role: str | None
    plan: Plan


@cache
def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


_made: dict[Model, Decoder] = {}


def compile_job(job: Job) -> str | None:
    """Put a kernel into Triton's cache by launching it; in words what went wrong, if anything."""
    try:
        if job.model not in _made:
            _made.clear()
            torch.cuda.empty_cache()
            _made[job.model] = job.model.decoder(_device(), layers=1)
        decoder = _made[job.model]
        if job.role is None:
            CudaEngine(decoder, 256, graphs=False).decode(1)
        else:
            step = FusedStep(decoder, 256, job.plan)
            if job.role == "attention":
                cache_ = decoder.new_state(256, dtype=torch.float16, fixed=True).layers[0]
                position = torch.zeros(1, dtype=torch.int64, device=decoder.device)
                step.layers[0].attention.launch(position, cache_, pdl=job.plan.pdl)
            else:
                product = step.head if job.role == "head" else getattr(step.layers[0], job.role)
                product.launch(pdl=job.plan.pdl)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job.model} {job.role}: {type(error).__name__}: {error}"[:300]
    return None


def jobs_of(model: Model, plans: list[Plan]) -> list[Job]:
    """One for each kernel in which any two of the plans differ."""
    found: dict[tuple[object, ...], Job] = {}
    for plan in plans:
        for role in ROLES:
            found.setdefault((role, getattr(plan, role), plan.pdl), Job(model, role, plan))
        found.setdefault(("attention", plan.split, plan.pdl), Job(model, "attention", plan))
    return list(found.values())


def compile_all(bench: Bench, jobs: list[Job]) -> None:
    if bench.pool is None:
        return
    troubles = [trouble for trouble in bench.pool.map(compile_job, jobs, chunksize=2) if trouble is not None]
    for trouble in troubles[:10]:
        bench.say(f"does not compile or run: {trouble}")


# Models


def search_of(bench: Bench, model: Model, decoder: Decoder) -> Search:
    slots = 64 if bench.toy else 512
    state = state_at(decoder, slots, PROMPT + NEW // 2 if not bench.toy else 20)
    token = torch.full((1,), 5, device=bench.device)
    position = torch.full((1,), state.length, device=bench.device)

    def seconds(plan: Plan) -> float:
        step = FusedStep(decoder, slots, plan)
        return bench.clock.seconds([partial(step.run, token, position, state)], replays=9, least=3)

    return Search(
        decoder,
        bench.sms,
        seconds,
        lambda plans: compile_all(bench, jobs_of(model, plans)),
        bench.left,
        most=1 if bench.toy else None,
    )


def weight_bytes(step: FusedStep) -> int:
    """Bytes of packed weights a token reads."""
    found = sum(getattr(layer, role).weight.nbytes for layer in step.layers for role in ROLES if role != "head")
    assert step.head is not None
    return found + step.head.weight.nbytes


def kv_bytes(decoder: Decoder, length: int) -> int:
    sample = decoder.new_state(1, dtype=torch.float16, fixed=True)
    return sample.nbytes * length


def greedy_loop(engine: DecoderEngine, new: int) -> None:
    """As ``lbq run`` does it: the host reads each token."""
    sampler = Sampler(SamplingOptions(), [])
    token = 5
    for _ in range(new):
        token = sampler.choose(engine.decode(token))


def stream_loop(engine: FusedEngine, new: int, options: SamplingOptions) -> None:
    logits = engine.decode(5).clone()
    for _ in engine.stream(logits, options, [5], new):
        pass


def tokens_per_second(bench: Bench, run: Callable[[int], None], reset: Callable[[], None]) -> float:
    """Of the better of two runs, after one that captures graphs."""
    rates = []
    for i in range(2 if bench.toy else 3):
        reset()
        bench.clock.synchronize()
        began = time.perf_counter()
        run(bench.new if i else 2)
        bench.clock.synchronize()
        rates.append(bench.new / (time.perf_counter() - began))
    return max(rates[1:])


def time_engines(bench: Bench, decoder: Decoder, plans: dict[str, Plan]) -> None:
    slots = 64 if bench.toy else 512
    prompt = 20 if bench.toy else PROMPT
    state = state_at(decoder, slots, prompt)
    step = FusedStep(decoder, slots, Plan())
    floor = (weight_bytes(step) + kv_bytes(decoder, prompt + bench.new // 2)) / bench.copy
    bench.say(f"\n{weight_bytes(step) / 1e6:.0f} MB of weights a token: floor {1 / floor:.0f} tokens/s\n")
    bench.say("| engine | tokens/s | µs a token | share of copy |\n|---|---|---|---|")

    def row(name: str, engine: DecoderEngine, run: Callable[[int], None]) -> None:
        def reset() -> None:
            put(engine, state)

        rate = tokens_per_second(bench, run, reset)
        bench.say(f"| {name} | {rate:.1f} | {1e6 / rate:.1f} | {floor * rate:.1%} |")

    graphs = not bench.toy
    present = CudaEngine(decoder, slots, graphs=graphs)
    row("present, host greedy", present, partial(greedy_loop, present))
    del present
    for name, plan in plans.items():
        engine = FusedEngine(decoder, slots, plan=plan, graphs=graphs)
        row(f"fused, {name}, host greedy", engine, partial(greedy_loop, engine))
        row(f"fused, {name}, device greedy", engine, partial(stream_loop, engine, options=SamplingOptions()))
        if name == list(plans)[-1]:
            row(f"fused, {name}, device top-k, top-p", engine, partial(stream_loop, engine, options=SAMPLED))


def tune_model(bench: Bench, model: Model) -> None:
    decoder = model.decoder(bench.device)
    search = search_of(bench, model, decoder)
    tried = search.descend(Plan(pdl=bench.pdl))
    best = tried[-1]
    bench.best[model] = best.plan
    bench.say(f"{len(tried) - 1} plans, from {tried[0].seconds * 1e6:.0f} to {best.seconds * 1e6:.0f} µs a step:\n")
    bench.say(f"    {best.plan}\n")
    _tell(bench, tried)
    without = search.seconds(replace(best.plan, pdl=False))
    bench.say(f"\nThe same without PDL: {without * 1e6:.0f} µs")
    roles(bench, decoder, best.plan)
    time_engines(bench, decoder, {"rule": Plan(pdl=bench.pdl), "tuned": best.plan})


def _tell(bench: Bench, tried: list[Tried]) -> None:
    """The best three of each kind of candidate."""
    bench.say("| tried | best three, µs a step |\n|---|---|")
    kinds = list(dict.fromkeys(one.what for one in tried[1:-1]))
    for kind in kinds:
        same = sorted(
            (one for one in tried if one.what == kind), key=lambda one: (one.seconds != one.seconds, one.seconds)
        )
        cells = [f"{_label(kind, one.plan)} {one.seconds * 1e6:.0f}" for one in same[:3]]
        bench.say(f"| {kind} | {', '.join(cells)} |")


def _label(kind: str, plan: Plan) -> str:
    role = kind.split()[0].removesuffix(":")
    if role == "split":
        s = plan.split
        return "" if s is None else f"{s.splits}×{s.block} least {s.least} stages {s.stages} warps {s.warps}"
    how = getattr(plan, role, None)
    if how is None:
        return ""
    tile = how.tile
    return (
        f"{tile.rows}×{tile.columns}/{tile.warps}" + (" apart" if how.apart else "") + (" ahead" if how.ahead else "")
    )


def roles(bench: Bench, decoder: Decoder, plan: Plan) -> None:
    """Each kind of launch alone, over all layers, so that weights come from memory."""
    slots, position = (64, 20) if bench.toy else (512, PROMPT + NEW // 2)
    step, state = FusedStep(decoder, slots, plan), state_at(decoder, slots, position)
    at = torch.full((1,), position, device=bench.device)
    step.run(torch.full((1,), 5, device=bench.device), at, state)
    bench.say("\n| launch | µs | MB | share of copy |\n|---|---|---|---|")
    caches = zip(step.layers, state.layers, strict=True)
    chains: dict[str, tuple[list[Callable[[], None]], int]] = {
        "attention": (
            [partial(layer.attention.launch, at, cache_, pdl=plan.pdl) for layer, cache_ in caches],  # type: ignore[arg-type]
            kv_bytes(decoder, position) // len(step.layers),
        )
    }
    for role in ROLES:
        products = [step.head] if role == "head" else [getattr(layer, role) for layer in step.layers]
        chains[role] = ([partial(p.launch, pdl=plan.pdl) for p in products], products[0].weight.nbytes)
    for name, (calls, nbytes) in chains.items():
        seconds = bench.clock.seconds(calls, replays=9)
        bench.say(f"| {name} | {seconds * 1e6:.2f} | {nbytes / 1e6:.2f} | {nbytes / seconds / bench.copy:.0%} |")


# Long contexts and sampling


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


# All of it


def start_pool(bench: Bench, models: list[Model]) -> list[Future[str | None]]:
    """Begin to compile what descents will try first, while the main process checks."""
    cores = min(14, (os.cpu_count() or 2) - 1)
    bench.pool = ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"))
    jobs: list[Job] = []
    for model in models:
        decoder = model.decoder(bench.device, layers=1)
        search = Search(decoder, bench.sms, lambda _: 0.0, lambda _: None, bench.left)
        plans = [*search.first_candidates(Plan(pdl=bench.pdl)), Plan(pdl=False)]
        jobs += [Job(model, None, Plan()), *jobs_of(model, plans)]
    bench.say(f"{len(jobs)} kernels are compiled on {cores} cores meanwhile.")
    return [bench.pool.submit(compile_job, job) for job in jobs]


def wait_for(bench: Bench, compiled: list[Future[str | None]]) -> None:
    troubles = [trouble for future in compiled if (trouble := future.result(timeout=max(bench.left() - 60, 1)))]
    bench.say(f"{len(compiled)} kernels compiled, {len(troubles)} did not.")
    for trouble in islice(troubles, 10):
        bench.say(f"- {trouble}")


def run_all(bench: Bench, models: list[Model]) -> None:
    first = models[0]
    compiled: list[Future[str | None]] = []
    if not bench.toy:
        bench.part("Compiling", lambda: compiled.extend(start_pool(bench, models)))
    bench.part("Kernels against float64", lambda: check_kernels(bench))
    bench.part(f"The whole step, {first}", lambda: check_step(bench, first))
    if compiled:
        bench.part("Compiled", lambda: wait_for(bench, compiled))
    bench.copy = bench.clock.copy_bandwidth()
    bench.say(f"\nCopy bandwidth: {bench.copy / 1e12:.3f} TB/s")
    for model in models:
        bench.part(str(model), partial(tune_model, bench, model), least=25)
    bench.part(f"Depth, {first}", lambda: depths(bench, first), least=25)
    bench.part("Attention of one layer", lambda: int8_caches(bench), least=20)
    bench.part("Choosing a token", lambda: sampling(bench))
    if bench.pool is not None:
        bench.pool.shutdown(cancel_futures=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="shape:bits, …")
    parser.add_argument("--budget", type=float, default=440.0, help="seconds")
    parser.add_argument("--out", help="write the tables to this file too")
    parser.add_argument("--toy", action="store_true", help="a toy size in Triton's interpreter, on a CPU")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.toy and not INTERPRETED:  # Triton reads it once, at its import
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    device = torch.device("cpu") if arguments.toy else _device()
    pdl = not arguments.toy and torch.cuda.get_device_capability() >= (9, 0)
    bench = Bench(device, Clock(device), pdl, time.monotonic() + arguments.budget, arguments.toy)
    name = "a CPU, in Triton's interpreter" if arguments.toy else torch.cuda.get_device_name()
    bench.say(f"# Fused decode on {name}: torch {torch.__version__}, Triton {triton.__version__}, PDL {pdl}")
    names = "toy:4" if arguments.toy else arguments.models
    models = [Model(shape, int(bits)) for shape, bits in (one.split(":") for one in names.split(","))]
    try:
        run_all(bench, models)
    finally:
        if arguments.out:
            with open(arguments.out, "w", encoding="utf-8") as file:
                file.write("\n".join(bench.lines) + "\n")
    bad = [line for line in bench.lines if "**" in line or "FAILED" in line]
    bench.say("\n" + (f"{len(bad)} lines tell of faults." if bad else "No faults."))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
