"""Units of keys: what stands out in them does so no more, and scores stay what they are."""

from __future__ import annotations

import torch
from tiny_steps import divergence

from lbq.runtime.binding import bind
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.key_units import measure_units

IDS = list(range(1, 60))


def with_large_biases(make_tiny):
    """As Qwen2 has them: some of a key's elements are far larger than the others."""
    tiny = make_tiny("qwen2-bias")
    for name, tensor in tiny.weights.tensors.items():
        if name.endswith("k_proj.bias"):
            tensor[3] = 60.0
            tensor[10] = -40.0
    return tiny.weights


def test_large_biases_of_keys_cost_no_precision(make_tiny, reference_kernels):
    weights = with_large_biases(make_tiny)
    expected = DecoderEngine(bind(weights, reference_kernels).decoder, 64).all_logits(IDS)
    costs = []
    for plain in (True, False):
        decoder = bind(weights, reference_kernels).decoder
        state = decoder.new_state(64, dtype=torch.int8)  # by signs alone, as nothing was measured
        if not plain:
            measure_units(decoder)
            state = decoder.new_state(64, dtype=torch.int8)
        ids = torch.tensor(IDS)
        costs.append(float(divergence(expected, decoder.forward(ids, state, all_logits=True)).mean()))
    assert costs[1] <= costs[0] / 3


def test_units_are_measured_once_and_shared_by_pairs(make_tiny, reference_kernels):
    decoder = bind(with_large_biases(make_tiny), reference_kernels).decoder
    assert decoder.layers[0].mixer.turn is None
    DecoderEngine(decoder, 64)
    assert decoder.layers[0].mixer.turn is None
    engine = DecoderEngine(decoder, 64, cache_dtype=torch.int8)
    turns = [layer.mixer.turn for layer in decoder.layers]
    assert [state.turn for state in engine._state.layers] == turns
    DecoderEngine(decoder, 64, cache_dtype=torch.int8)
    assert all(layer.mixer.turn is turn for layer, turn in zip(decoder.layers, turns, strict=True))
    units = turns[0].units
    half = decoder.layers[0].mixer.spec.rope.dims // 2
    assert torch.equal(units[:, :half], units[:, half : 2 * half])
    assert units[0, 3] > 3 * units.median()
