"""The fused step against the step it is to replace, on a tiny model of every family; see test_interpreted.py.

Under the interpreter both run the same Triton kernels' arithmetic on a CPU, and a float32 reference stands beside them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_steps import DEVICE, SMALL, Kernels, divergence, token_ids

from lbq.formats.errors import DataError
from lbq.runtime.binding import bind
from lbq.runtime.decoder import Decoder
from lbq.runtime.devices import CudaDevice
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.engine_cuda import CudaEngine
from lbq.runtime.engines import EnginePool, TrackedEngine, TrackedStream
from lbq.runtime.fused.engine import FusedEngine
from lbq.runtime.fused.plan import Plan, Projecting
from lbq.runtime.fused.step import why_not
from lbq.runtime.kernels.attention import Short, Split
from lbq.runtime.kernels.gemv import Tile
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.text.generation import GenerationOptions, Streams, generate_tokens
from lbq.runtime.text.sampling import SamplingOptions

pytestmark = pytest.mark.gpu

CONTEXT, PROMPT = 40, 21
IDS = token_ids(CONTEXT, 4)
SPLIT = Split(splits=3, block=16, least=16)
SHARED, WHOLE, APART = Projecting(Tile(16, 32, 2)), Projecting(Tile(64, 32, 2)), Projecting(Tile(64, 32, 2), apart=True)
PLANS = {
    "shared": Plan(SHARED, SHARED, SHARED, SHARED, WHOLE, SPLIT),
    "whole": Plan(WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, SPLIT),
    "apart": Plan(WHOLE, APART, APART, APART, WHOLE, SPLIT),
}


def fused(decoder: Decoder, plan: str = "whole", context: int = CONTEXT) -> FusedEngine:
    return FusedEngine(decoder, context, plan=PLANS[plan], graphs=not INTERPRETED)


def after_prompt(weights, reference_kernels, *engines: DecoderEngine) -> DecoderEngine:
    """An engine in float32 that took in a prompt, after copying what it holds into ``engines``."""
    reference = DecoderEngine(bind(weights, reference_kernels).decoder, CONTEXT)
    reference.prefill(IDS[:PROMPT])
    for engine in engines:
        for to, layer in zip(engine._state.layers, reference._state.layers, strict=True):
            to.kv[:, :, :PROMPT] = layer.kv[:, :, :PROMPT]
        engine._state.length = PROMPT
    return reference


def test_logits_of_every_family(tiny, make_tiny, reference_kernels):
    """Against float32, after a prompt longer than the windows."""
    weights = make_tiny(tiny.family, **SMALL).weights
    decoder = bind(weights, Kernels()).decoder
    assert why_not(decoder) is None
    engine = fused(decoder)
    reference = after_prompt(weights, reference_kernels, engine)
    for token in IDS[PROMPT : PROMPT + (1 if INTERPRETED else 10)]:
        assert divergence(reference.decode(token), engine.decode(token)) <= 1e-5
    assert engine.position == reference.position


def test_agrees_with_the_present_engine(make_tiny, reference_kernels):
    weights = make_tiny("qwen3-qk-norm", **SMALL).weights
    decoder = bind(weights, Kernels()).decoder
    engines = CudaEngine(decoder, CONTEXT, graphs=not INTERPRETED), fused(decoder)
    after_prompt(weights, reference_kernels, *engines)
    for token in IDS[PROMPT : PROMPT + (1 if INTERPRETED else 10)]:
        today, new = [engine.decode(token) for engine in engines]
        torch.testing.assert_close(new, today, rtol=0, atol=5e-3 * today.abs().max().item())
        assert int(new.argmax()) == int(today.argmax())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_keys_and_values_in_few_bits(make_tiny, reference_kernels, dtype):
    """Against float32 on the same cache; the new token's own entry is rounded before it is looked at."""
    weights = make_tiny("qwen3-qk-norm", **SMALL).weights
    engine = FusedEngine(
        bind(weights, Kernels()).decoder, CONTEXT, cache_dtype=dtype, plan=PLANS["whole"], graphs=not INTERPRETED
    )
    reference = DecoderEngine(bind(weights, reference_kernels).decoder, CONTEXT, cache_dtype=dtype, slots=CONTEXT)
    reference.prefill(IDS[:PROMPT])
    for to, layer in zip(engine._state.layers, reference._state.layers, strict=True):
        to.kv.copy_(layer.kv)
        to.scales.copy_(layer.scales)
    engine._state.length = PROMPT
    for token in IDS[PROMPT : PROMPT + (1 if INTERPRETED else 10)]:
        assert divergence(reference.decode(token), engine.decode(token)) <= 1e-3
    got, expected = engine._state.layers[0], reference._state.layers[0]
    codes = [cache.kv[:, :, PROMPT].cpu().int() for cache in (got, expected)]
    if dtype == torch.uint8:
        codes = [torch.stack((code & 15, code >> 4)) for code in codes]
    assert int((codes[0] - codes[1]).abs().max()) <= 1


@pytest.mark.parametrize("plan", ["shared", "apart"])
@pytest.mark.parametrize("bits", [3, 8])
def test_ways_to_hand_on(make_tiny, reference_kernels, plan, bits):
    model = make_tiny("qwen3-qk-norm", bits=bits, num_hidden_layers=1)
    reference = DecoderEngine(bind(model.weights, reference_kernels).decoder, CONTEXT)
    engine = fused(bind(model.weights, Kernels()).decoder, plan)
    assert divergence(reference.decode(IDS[0]), engine.decode(IDS[0])) <= 1e-5
    apart = {"shared": 0, "apart": 3}[plan]
    assert engine.launches == 2 + 5 + apart


def test_truncated_engine_is_as_good_as_new(make_tiny):
    decoder = bind(make_tiny("mistral-window", **SMALL).weights, Kernels()).decoder
    engine, fresh = fused(decoder), fused(decoder)
    for token in IDS[:3]:
        engine.decode(token)
    engine.truncate(1)
    fresh.decode(IDS[0])
    assert torch.equal(engine.decode(IDS[9]), fresh.decode(IDS[9]))


def test_tokens_are_chosen_and_fed_back_on_the_device(make_tiny):
    decoder = bind(make_tiny("llama3-rope", **{**SMALL, "num_hidden_layers": 1}).weights, Kernels()).decoder
    engine, other = fused(decoder), fused(decoder)
    logits = engine.decode(IDS[0])
    stream = engine.stream(logits.clone(), SamplingOptions(), IDS[:1], 3)
    got = [next(stream), next(stream)]
    assert engine.position == 2  # the second token is known, and not taken in
    stream.close()
    expected = [int(other.decode(IDS[0]).argmax())]
    expected.append(int(other.decode(expected[0]).argmax()))
    assert got == expected
    assert torch.equal(engine.decode(got[1]), other.decode(got[1]))


def test_generation_streams_where_it_can(make_tiny):
    """The loop of ``lbq run``, with tokens chosen on the device and on the host: the same text, the same state held."""
    decoder = bind(make_tiny("llama3-rope", **{**SMALL, "num_hidden_layers": 1}).weights, Kernels()).decoder
    options = GenerationOptions(max_tokens=3)
    ended = []
    for tracked in (TrackedStream(fused(decoder)), TrackedEngine(fused(decoder))):
        assert isinstance(tracked, Streams) == isinstance(tracked, TrackedStream)
        text = list(generate_tokens(tracked, IDS[:2], options, eos_ids=()))
        assert tracked._engine.position == tracked.position == 4
        stopped = generate_tokens(tracked, [*IDS[:2], *text], options, eos_ids=(), held=4)
        ended.append((text, next(stopped)))
        stopped.close()
        assert tracked._engine.position == tracked.position == 5
    assert ended[0] == ended[1]
    with EnginePool(lambda: fused(decoder), CONTEXT).engine() as engine:
        assert isinstance(engine, TrackedStream)


def test_a_stream_ends_with_the_context_and_repeats_with_its_seed(make_tiny):
    decoder = bind(make_tiny("llama3-rope", **{**SMALL, "num_hidden_layers": 1}).weights, Kernels()).decoder
    options = SamplingOptions(temperature=2.0, top_k=40, repetition_penalty=1.3, seed=7)
    texts = []
    for _ in range(2):
        engine = fused(decoder, context=4)
        texts.append(list(engine.stream(engine.decode(IDS[0]).clone(), options, IDS[:1], 99)))
        assert engine.position == 3
    assert len(texts[0]) == 3
    assert texts[0] == texts[1]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_broken_logits_end_a_stream(make_tiny):
    engine = fused(bind(make_tiny("llama3-rope", **{**SMALL, "num_hidden_layers": 1}).weights, Kernels()).decoder)
    engine.decode(IDS[0])
    stream = engine.stream(torch.full((97,), float("nan"), device=DEVICE), SamplingOptions(), IDS[:1], 3)
    with pytest.raises(DataError, match="not finite"):
        next(stream)


def test_what_it_does_not_know(make_tiny, reference_kernels):
    model = make_tiny("llama-tied", **SMALL)
    assert "q/k/v projection runs by reference INT4" in why_not(bind(model.weights, reference_kernels).decoder)
    assert "runs by Triton INT4 dequantise" in why_not(bind(model.weights, Kernels(exact=True)).decoder)
    decoder = bind(model.weights, Kernels()).decoder
    decoder.layers[1].mixer = object()
    assert why_not(decoder) == "layer 1 mixes tokens by object"


def test_the_device_takes_it_unless_told_not_to(make_tiny, reference_kernels):
    weights = make_tiny("llama-tied", **SMALL).weights
    decoder = bind(weights, Kernels()).decoder
    device, without = CudaDevice(exact=False), CudaDevice(exact=False, fused=False)
    assert device.step_fallback(decoder) is None
    assert isinstance(device.engine(decoder, CONTEXT), FusedEngine)
    assert isinstance(without.engine(decoder, CONTEXT), CudaEngine)
    other = bind(weights, reference_kernels).decoder
    assert isinstance(device.engine(other, CONTEXT), CudaEngine)
    assert "reference INT4" in str(device.step_fallback(other))
    assert without.step_fallback(other) is None
    assert CudaDevice(exact=True).step_fallback(other) is None


def test_a_text_that_grows_long(make_tiny, reference_kernels):
    """As a short one up to a length, then cut: both against float32, and the stream goes from one to the other."""
    weights = make_tiny("qwen3-qk-norm", **{**SMALL, "num_hidden_layers": 1, "head_dim": 32}).weights
    decoder = bind(weights, Kernels()).decoder
    plan = replace(PLANS["whole"], short=Short(until=PROMPT + 1, block=32, warps=1))
    engine = FusedEngine(decoder, CONTEXT, plan=plan, graphs=not INTERPRETED)
    reference = after_prompt(weights, reference_kernels, engine)
    for token in IDS[PROMPT : PROMPT + 2]:
        assert divergence(reference.decode(token), engine.decode(token)) <= 1e-5
    engine.truncate(PROMPT - 1)
    greedy = [int(engine.decode(IDS[PROMPT - 1]).argmax())]
    for _ in range(3):
        greedy.append(int(engine.decode(greedy[-1]).argmax()))
    engine.truncate(PROMPT - 1)
    logits = engine.decode(IDS[PROMPT - 1]).clone()
    assert list(engine.stream(logits, SamplingOptions(), IDS[:PROMPT], 4)) == greedy
