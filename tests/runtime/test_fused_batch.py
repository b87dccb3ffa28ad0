"""Several texts by one fused step: each as the single-text engine has it; see test_interpreted.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from tiny_steps import SMALL, Kernels, divergence, token_ids

from lbq.formats.errors import UsageError
from lbq.runtime.batch import OneByOne
from lbq.runtime.binding import bind
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.fused.batch import FusedBatch
from lbq.runtime.fused.engine import FusedEngine
from lbq.runtime.fused.plan import Plan
from lbq.runtime.fused.step import FusedStep, why_not
from lbq.runtime.kernels.attention import Short, Split
from lbq.runtime.kernels.batch import BatchTile
from lbq.runtime.kernels.gemv.triton import INTERPRETED
from lbq.runtime.text.batch import BROKEN
from lbq.runtime.text.sampling import SamplingOptions

pytestmark = pytest.mark.gpu

CONTEXT = 40
IDS = token_ids(CONTEXT, 4)
PROMPTS = (IDS[:2], IDS[3:4], IDS[11:15]) if INTERPRETED else (IDS[:9], IDS[3:4], IDS[11:30])
ON_GPU = pytest.mark.skipif(INTERPRETED, reason="slow there, and the parts of it are tested by others")
GREEDY = SamplingOptions()
ONE = {**SMALL, "num_hidden_layers": 1}
if INTERPRETED:
    ONE |= {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
PLANS = {  # programs that share blocks of 128 outputs, or own whole ones
    "shared": Plan(split=Split(3, 16, 16), several=BatchTile(1, 2)),
    "whole": Plan(split=Split(3, 16, 16), several=BatchTile(1, 8, 2, rows=2), short=Short(until=0)),
}
STEPS = 1 if INTERPRETED else 6


def batch_of(decoder, places=3, plan="shared", **options) -> FusedBatch:
    return FusedBatch(decoder, CONTEXT, places, plan=PLANS[plan], graphs=not INTERPRETED, **options)


def run(batch, sampling=GREEDY, prompts=PROMPTS, steps=STEPS) -> tuple[list[list[int]], torch.Tensor]:
    """The tokens of each text, and the logits behind the last."""
    for place, ids in enumerate(prompts):
        batch.begin(place, ids, replace(sampling, seed=place + 1))
    rounds = [batch.tokens(more=i < steps - 1) for i in range(steps)]
    batch.step()
    return [list(text) for text in zip(*rounds, strict=True)], batch.logits.clone()


CASES = [("qwen2-bias", "shared"), ("qwen3-qk-norm", "whole")]
if not INTERPRETED:
    CASES = [(family, plan) for plan in PLANS for family in ("llama3-rope", "mistral-window", *(f for f, _ in CASES))]


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_each_text_is_that_of_an_engine_of_its_own(make_tiny, reference_kernels, family, plan):
    """Against float32 too: texts of different lengths, one longer than the window."""
    weights = make_tiny(family, **(ONE if INTERPRETED else SMALL)).weights
    decoder = bind(weights, Kernels()).decoder
    batch = batch_of(decoder, plan=plan)
    assert batch.fallback is None
    texts, logits = run(batch)
    exact = bind(weights, reference_kernels).decoder
    for text, prompt, row in zip(texts, PROMPTS, logits, strict=True):
        reference, alone = DecoderEngine(exact, CONTEXT), DecoderEngine(decoder, CONTEXT)
        for engine in (reference, alone):
            expected = engine.prefill(prompt)
            for token in text:
                assert float(expected.max() - expected[token]) <= 1e-3
                expected = engine.decode(token)
            assert divergence(expected, row) <= 1e-5


@ON_GPU
def test_what_stands_beside_a_text_does_not_matter(make_tiny):
    decoder = bind(make_tiny("llama3-rope", **ONE).weights, Kernels()).decoder
    batch = batch_of(decoder)
    texts, logits = run(batch)
    others, other_logits = run(batch, prompts=(PROMPTS[0], IDS[20:25], PROMPTS[2]))
    assert (others[0], others[2]) == (texts[0], texts[2])
    assert torch.equal(other_logits[[0, 2]], logits[[0, 2]])
    swapped, swapped_logits = run(batch_of(decoder), prompts=PROMPTS[::-1])
    assert swapped == texts[::-1]
    assert torch.equal(swapped_logits, logits.flip(0))


def test_a_place_is_taken_again(make_tiny):
    """A text begins while others are under way, and is the same as among others from the start."""
    decoder = bind(make_tiny("llama3-rope", **ONE).weights, Kernels()).decoder
    expected, _ = run(batch_of(decoder), steps=3)
    batch = batch_of(decoder)
    for place in (0, 1):
        batch.begin(place, PROMPTS[place], GREEDY)
    rounds = [batch.tokens()]
    assert rounds[0][2] is None
    batch.end(1)
    batch.begin(1, PROMPTS[2], GREEDY)
    rounds += [batch.tokens(), batch.tokens()]
    assert [row[0] for row in rounds] == expected[0]
    assert [row[1] for row in rounds[1:]] == expected[2][:2]
    assert [row[2] for row in rounds] == [None, None, None]


@ON_GPU
def test_drawn_texts_repeat_with_their_seeds(make_tiny):
    decoder = bind(make_tiny("llama3-rope", **ONE).weights, Kernels()).decoder
    drawn = SamplingOptions(temperature=1.5, top_k=50, top_p=0.9, repetition_penalty=1.2)
    texts, _ = run(batch_of(decoder), drawn)
    assert run(batch_of(decoder), drawn)[0] == texts
    alone = FusedEngine(decoder, CONTEXT, graphs=not INTERPRETED)
    stream = alone.stream(alone.prefill(PROMPTS[0]), replace(drawn, seed=1), PROMPTS[0], STEPS)
    assert list(stream) == texts[0]


@ON_GPU
def test_greedy_among_drawn(make_tiny):
    decoder = bind(make_tiny("llama3-rope", **ONE).weights, Kernels()).decoder
    expected, _ = run(batch_of(decoder, 2), prompts=PROMPTS[:2])
    batch = batch_of(decoder, 2)
    batch.begin(0, PROMPTS[0], GREEDY)
    batch.begin(1, PROMPTS[1], SamplingOptions(temperature=1.0, top_k=5, top_p=0.5, seed=1))
    assert [batch.tokens()[0] for _ in range(STEPS)] == expected[0]


@ON_GPU
def test_keys_and_values_in_int8(make_tiny):
    decoder = bind(make_tiny("qwen3-qk-norm", **ONE).weights, Kernels()).decoder
    texts, logits = run(batch_of(decoder, 2, cache_dtype=torch.int8), prompts=PROMPTS[:2])
    for text, prompt, row in zip(texts, PROMPTS[:2], logits, strict=True):
        alone = FusedEngine(decoder, CONTEXT, cache_dtype=torch.int8, graphs=not INTERPRETED)
        alone.prefill(prompt)
        for token in text:
            expected = alone.decode(token)
        assert divergence(expected, row) <= 1e-5


def test_weights_that_one_pass_cannot_serve(make_tiny):
    decoder = bind(make_tiny("llama3-rope", bits=3, **ONE).weights, Kernels()).decoder
    assert why_not(decoder) is None
    assert (
        why_not(decoder, 2)
        == "layer 0: the q/k/v projection has 3-bit codes, which one pass for several texts cannot read"
    )


def test_launches(make_tiny):
    decoder = bind(make_tiny("llama3-rope", **ONE).weights, Kernels()).decoder
    for plan in PLANS.values():
        assert FusedStep(decoder, CONTEXT, plan, 3).launches == 2 + 4 + 2  # heads of 16 are no whole blocks of planes
    assert "room for 16" in why_not(decoder, 17)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_broken_logits_end_one_text(make_tiny, plan):
    """Those beside it are as they were, and so is the text that takes its place."""
    decoder = bind(make_tiny("llama3-rope", **ONE).weights, Kernels()).decoder
    batch = batch_of(decoder, 2, plan)
    batch.begin(0, PROMPTS[0], GREEDY)
    batch.begin(1, PROMPTS[1], GREEDY)
    sound = [batch.tokens() for _ in range(2)]
    batch.end(0)
    batch.end(1)
    batch.begin(0, PROMPTS[0], GREEDY)
    batch.begin(1, PROMPTS[1], GREEDY)
    batch.engines[1]._state.layers[0].kv.fill_(float("nan"))
    assert batch.tokens() == sound[0]
    assert batch.tokens() == [sound[1][0], BROKEN]
    batch.end(1)
    batch.begin(1, PROMPTS[0], GREEDY)
    assert [batch.tokens()[1] for _ in range(2)] == [row[0] for row in sound]
    assert not batch.engines[1]._state.layers[0].kv.isfinite().all()  # what lies behind the text is read by nobody
    with pytest.raises(UsageError, match="97"):
        batch.begin(0, [97], GREEDY)


@ON_GPU
def test_engines_one_by_one_have_the_same_manners(make_tiny):
    decoder = bind(make_tiny("llama3-rope", **ONE).weights, Kernels()).decoder
    texts, logits = run(OneByOne(partial(DecoderEngine, decoder, CONTEXT), len(PROMPTS), "by itself"))
    expected, rows = run(batch_of(decoder))
    assert texts == expected
    torch.testing.assert_close(logits, rows, rtol=0, atol=1e-2 * float(rows.abs().max()))
