"""What the bench measures is a decode whose every token a plain reference confirms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from msgspec import structs

from lbq.runtime.bench.decode import Workload, decode, read_bytes
from lbq.runtime.bench.reference import Check, check, reference_logits
from lbq.runtime.bench.shapes import SHAPES
from lbq.runtime.bench.weights import DeviceKernels, RandomWeights
from lbq.runtime.binding import bind
from lbq.runtime.devices import CpuDevice
from lbq.runtime.engine import DecoderEngine

LOAD = Workload(prompt=20, new=5, rounds=2)
CPU = CpuDevice(exact=False)
SPEC = SHAPES["tiny"].spec()
GOOD = Check(kl=1e-6, largest=0.1, loss=0.0, repeats=True)


def random_weights(bits=4, group=32, device="cpu"):
    return RandomWeights(SPEC, bits, group, torch.device(device))


@pytest.mark.parametrize("depth", [0, 30])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_decode_is_confirmed(bits, depth):
    weights = random_weights(bits)
    found = decode(weights, bind(weights, CPU).decoder, CPU, LOAD, depth)
    assert found.check.fault is None
    assert found.check.kl < 1e-9
    assert found.check.repeats
    assert 0 < found.speed.slowest <= found.speed.median <= found.speed.fastest
    assert found.first_token_seconds > 0
    assert found.cold_seconds > 0
    assert found.peak_bytes > 1 << 20


@pytest.mark.parametrize("depth", [0, 30])
def test_several_texts_are_confirmed(depth):
    weights = random_weights()
    found = decode(weights, bind(weights, CPU).decoder, CPU, LOAD, depth, texts=3)
    assert found.check.fault is None
    assert found.check.kl < 1e-9
    assert found.cache_bytes == 3 * decode(weights, bind(weights, CPU).decoder, CPU, LOAD, depth).cache_bytes
    assert "CPU" in found.batch_fallback


def test_one_wrong_text_of_several_is_found_out():
    weights = random_weights()

    @dataclass
    class OneBroken:
        device: torch.device = CPU.device

        def batch(self, decoder, context, places):
            batch = CPU.batch(decoder, context, places)
            plain = batch.engines[1].decode
            batch.engines[1].decode = lambda token: plain(token) * 1.5
            return batch

    found = decode(weights, bind(weights, CPU).decoder, OneBroken(), LOAD, texts=3)
    assert "final logits diverge" in found.check.fault


def test_tokens_that_are_drawn():
    weights = random_weights()
    decoder = bind(weights, CPU).decoder
    found = decode(weights, decoder, CPU, replace(LOAD, sampled=True))
    assert found.check.fault is None
    assert found.check.loss is None
    other = RandomWeights(SPEC, 4, 32, torch.device("cpu"), seed=2)
    assert decode(other, decoder, CPU, replace(LOAD, sampled=True)).check.fault is not None


@pytest.mark.parametrize("depth", [0, 30])
def test_other_weights_are_found_out(depth):
    other = RandomWeights(SPEC, 4, 32, torch.device("cpu"), seed=2)
    found = decode(random_weights(), bind(other, CPU).decoder, CPU, LOAD, depth)
    assert found.check.fault is not None


@dataclass
class Broken:
    """An engine whose decode goes wrong in some way."""

    how: str
    device: torch.device = CPU.device

    def engine(self, decoder, context):
        broken = DecoderEngine(decoder, context)
        plain, steps = broken.decode, 0

        def wrong(token):
            nonlocal steps
            steps += 1
            logits = plain(token)
            if self.how == "noise":
                return logits + torch.randn(logits.shape) * 0.5
            if self.how == "a token" and steps % (LOAD.new - 1) == 2:  # the same in every round
                return logits.roll(1)
            return logits * 1.5 if self.how == "the last" and broken.position == LOAD.prompt + LOAD.new else logits

        broken.decode = wrong
        return broken


@pytest.mark.parametrize(
    ("how", "fault"), [("noise", ""), ("a token", "less probable"), ("the last", "final logits diverge")]
)
def test_a_wrong_engine_is_found_out(how, fault):
    weights = random_weights()
    found = decode(weights, bind(weights, CPU).decoder, Broken(how), LOAD)
    assert found.check.fault is not None
    assert fault in found.check.fault


def test_the_verdict():
    assert GOOD.fault is None
    assert "diverge" in replace(GOOD, kl=0.02).fault
    assert "diverge" in replace(GOOD, kl=math.nan).fault
    assert "probable" in replace(GOOD, loss=math.nan).fault
    assert "another round" in replace(GOOD, repeats=False).fault
    expected = torch.randn(3, 7)
    right = expected[:2].argmax(1).tolist()
    assert check(expected[2], right, expected, repeats=True) == Check(0.0, 0.0, 0.0, True)
    assert check(expected[2], [right[0], int(expected[1].argmin())], expected, repeats=True).loss > 0


def test_the_reference_is_the_exact_decoder():
    """In parts as at once, with what is held before the tokens."""
    weights, ids = random_weights(), list(range(40))
    exact = DecoderEngine(bind(weights, CpuDevice(exact=True)).decoder, 64)
    held = exact._state
    expected = exact.all_logits(ids)
    whole = reference_logits(weights, CPU.device, ids, 40)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    held.length = 25
    behind = reference_logits(weights, CPU.device, ids[25:], 15, held)
    torch.testing.assert_close(behind, expected[25:], rtol=1e-4, atol=1e-4)


def test_drawn_twice_the_same():
    one, two = random_weights(), random_weights()
    name = SPEC.head.name
    two.packed("l.1.down")
    assert torch.equal(one.packed(name).words, two.packed(name).words)
    assert torch.equal(one.packed(name).words, one.packed(name).words)
    assert not torch.equal(one.packed("l.0.q").words, one.packed("l.1.q").words)
    assert {name: (w.n, w.k, w.bits, w.group) for name, w in one.quantized.items()} == {
        name: (w.n, w.k, w.bits, w.group) for name in one.quantized for w in [one.packed(name)]
    }


def test_bytes_of_keys_and_values():
    state = bind(random_weights(), CPU).decoder.new_state(10, fixed=True)
    assert sum(read_bytes(SPEC, state, 9)) == state.nbytes
    assert sum(read_bytes(SPEC, state, 4)) == state.nbytes / 2
    seven = structs.replace(SPEC.layer(0), mixer=structs.replace(SPEC.layer(0).mixer, window=7))
    assert read_bytes(structs.replace(SPEC, layer_kinds=(seven,)), state, 9) == [0.35 * state.nbytes] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("texts", [1, 2])
def test_the_fused_step_is_confirmed(texts):
    from lbq.runtime.fused.batch import FusedBatch
    from lbq.runtime.fused.engine import FusedEngine
    from lbq.runtime.kernels.gemv.triton import INTERPRETED

    @dataclass
    class Fused:
        device: torch.device

        def engine(self, decoder, context):
            return FusedEngine(decoder, context, graphs=not INTERPRETED)

        def batch(self, decoder, context, places):
            return FusedBatch(decoder, context, places, graphs=not INTERPRETED)

    place = Fused(torch.device("cpu" if INTERPRETED else "cuda"))
    weights = random_weights(device=place.device)
    decoder = bind(weights, DeviceKernels(place.device)).decoder
    load = Workload(prompt=1 if INTERPRETED else 17, new=2 if INTERPRETED else 5, rounds=1)
    found = decode(weights, decoder, place, load, depth=30, texts=texts)
    assert found.check.fault is None
    assert found.check.kl < 1e-4
