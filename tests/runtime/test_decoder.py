"""The decoder against transformers in float32 on the dequantised weights, family by family."""

from __future__ import annotations

import pytest
import torch

from lbq.runtime import decoder as decoder_module
from lbq.runtime.binding import bind
from lbq.runtime.decoder import Decoder
from lbq.runtime.devices import CpuDevice
from lbq.runtime.step import DeviceStep

PROMPT = 40  # longer than every window of the tiny models


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (PROMPT,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def decoder(tiny, reference_kernels) -> Decoder:
    return bind(tiny.weights, reference_kernels).decoder


def reference_logits(tiny, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tiny.reference(ids[None]).logits[0]


def one_by_one(decoder: Decoder, ids: torch.Tensor, state) -> torch.Tensor:
    return torch.stack([decoder.forward(token, state) for token in ids.split(1)])


def test_all_logits_match_transformers(tiny, decoder, ids):
    expected = reference_logits(tiny, ids)
    got = decoder.forward(ids, decoder.new_state(), all_logits=True)
    assert got.dtype == torch.float32
    assert torch.cosine_similarity(got.double(), expected.double(), dim=1).min() > 1 - 1e-9
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_last_logits_are_the_last_of_all(decoder, ids):
    every = decoder.forward(ids, decoder.new_state(), all_logits=True)
    torch.testing.assert_close(decoder.forward(ids, decoder.new_state()), every[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_200_greedy_tokens_match_transformers(tiny, make_tiny, ids, bits):
    """The float32 mode; each token is the best of the reference after the same text, or within 1e-3 of the best."""
    model = make_tiny(tiny.family, bits=bits)
    decoder = bind(model.weights, CpuDevice(exact=True)).decoder
    state, text = decoder.new_state(), ids
    logits = decoder.forward(ids, state)
    for _ in range(200):
        text = torch.cat((text, logits.argmax().view(1)))
        logits = decoder.forward(text[-1:], state)
    expected = reference_logits(model, text)[PROMPT - 1 : -1]
    chosen = expected.gather(1, text[PROMPT:, None])[:, 0]
    assert bool((expected.amax(1) - chosen <= 1e-3).all())
    assert text[PROMPT:].unique().numel() > 10  # a loop over a few tokens would show little


def test_chunks_and_single_tokens_give_the_same(decoder, ids, monkeypatch):
    whole = decoder.forward(ids, decoder.new_state(), all_logits=True)
    monkeypatch.setattr(decoder_module, "CHUNK", 7)
    chunked = decoder.forward(ids, decoder.new_state(), all_logits=True)
    single = one_by_one(decoder, ids, decoder.new_state())
    tolerance = {"rtol": 1e-4, "atol": 1e-4 * whole.abs().max().item()}
    torch.testing.assert_close(chunked, whole, **tolerance)
    torch.testing.assert_close(single, whole, **tolerance)


def test_truncated_state_is_as_good_as_new(decoder, ids):
    state = decoder.new_state()
    decoder.forward(ids, state)
    decoder.forward(ids[:1], state)
    state.truncate(11)
    assert state.length == 11
    again = decoder.forward(ids[11:], state, all_logits=True)
    fresh = decoder.forward(ids, decoder.new_state(), all_logits=True)[11:]
    torch.testing.assert_close(again, fresh, rtol=1e-4, atol=1e-4 * fresh.abs().max().item())


def test_cache_grows_without_a_trace(decoder, ids, monkeypatch):
    monkeypatch.setattr("lbq.runtime.cache.FIRST_CAPACITY", 4)
    state = decoder.new_state()
    small = state.nbytes
    got = one_by_one(decoder, ids, state)
    assert small < state.nbytes < 2.1 * PROMPT / 4 * small
    fixed = decoder.new_state(fixed=True)
    torch.testing.assert_close(got, one_by_one(decoder, ids, fixed), rtol=0, atol=0)


@pytest.mark.parametrize("bucket", [PROMPT, 64])
def test_step_with_the_position_in_a_tensor(decoder, ids, bucket):
    """What a CUDA graph replays: the same step object at every position, over more slots than are filled."""
    expected = decoder.forward(ids, decoder.new_state(), all_logits=True)
    state = decoder.new_state(64, fixed=True)
    decoder.forward(ids[:20], state)
    position = torch.tensor([20])
    for i in range(20, PROMPT):
        position.fill_(i)
        got = decoder.step(ids[i : i + 1], state, DeviceStep(position, torch.arange(bucket)))
        torch.testing.assert_close(got, expected[i], rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_two_sequences_do_not_meet(decoder, ids):
    a, b = decoder.new_state(), decoder.new_state()
    decoder.forward(ids, a)
    decoder.forward(ids.flip(0), b)
    alone = decoder.new_state()
    decoder.forward(ids, alone)
    torch.testing.assert_close(decoder.forward(ids[:1], a), decoder.forward(ids[:1], alone), rtol=0, atol=0)
