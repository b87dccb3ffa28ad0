"""Whole models of random weights: the present engine against the fused one, untuned and tuned."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from lbq.runtime.bench.compiling import compile_all, jobs_of
from lbq.runtime.bench.context import NEW, PROMPT, Bench, Model, put, start_plan, state_at
from lbq.runtime.bench.heads import tune_heads
from lbq.runtime.bench.tune import Search, Tried
from lbq.runtime.decoder import Decoder
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.engine_cuda import CudaEngine
from lbq.runtime.fused.engine import FusedEngine, default_plan
from lbq.runtime.fused.plan import ROLES, Plan
from lbq.runtime.fused.step import FusedStep
from lbq.runtime.text.sampling import Sampler, SamplingOptions

SAMPLED = SamplingOptions(temperature=0.7, top_k=20, top_p=0.95, seed=1)


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
        again=bench.again,
    )


def weight_bytes(step: FusedStep) -> int:
    """Bytes of packed weights a token reads."""
    return sum(product.weight.nbytes for role in ROLES for product in step.products(role))


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
    tried = search.descend(start_plan(bench))
    best = tried[-1]
    bench.best[model] = tune_heads(bench, model, best.plan)
    bench.say(f"{len(tried) - 1} plans, from {tried[0].seconds * 1e6:.0f} to {best.seconds * 1e6:.0f} µs a step:\n")
    bench.say(f"    {best.plan}\n")
    _tell(bench, tried)
    without = search.seconds(replace(best.plan, pdl=False))
    bench.say(f"\nThe same without PDL: {without * 1e6:.0f} µs")
    roles(bench, decoder, best.plan)
    time_engines(bench, decoder, {"rule": Plan(pdl=bench.pdl), "tuned": bench.best[model]})


def time_model(bench: Bench, model: Model) -> None:
    """Engines by what is shipped for this GPU."""
    decoder = model.decoder(bench.device)
    plan = default_plan(bench.device)
    roles(bench, decoder, plan)
    time_engines(bench, decoder, {"shipped": plan})


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
    if role == "short":
        short = plan.short
        on = " onward" if short is not None and short.onward else ""
        return "" if short is None else f"{short.parts}×{short.block}/{short.warps}{on}"
    how = getattr(plan, role, None)
    if how is None:
        return ""
    tile = how.tile
    return (
        f"{tile.rows}×{tile.columns}/{tile.warps}"
        + (f" {tile.rounds} rounds" if tile.rounds > 1 else "")
        + (" apart" if how.apart else "")
        + (" ahead" if how.ahead else "")
        + (" early" if how.early > 1 else "")
        + (f" {how.lines} lines of the next" if how.lines else "")
        + (" onward" if how.onward else "")
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
            [partial(layer.attention.launch, at, cache_, pdl=plan.pdl, short=True) for layer, cache_ in caches],  # type: ignore[arg-type]
            kv_bytes(decoder, position) // len(step.layers),
        )
    }
    for role in ROLES:
        products = step.products(role)
        chains[role] = ([partial(p.launch, pdl=plan.pdl) for p in products], products[0].weight.nbytes)
    for name, (calls, nbytes) in chains.items():
        seconds = bench.clock.seconds(calls, replays=9)
        bench.say(f"| {name} | {seconds * 1e6:.2f} | {nbytes / 1e6:.2f} | {nbytes / seconds / bench.copy:.0%} |")
