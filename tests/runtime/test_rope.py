"""Rotary embedding against transformers' frequencies and against complex numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lbq.formats.spec import LinearScaling, Llama3Scaling, Rope
from lbq.runtime.rope import Rotary, inverse_frequencies

SCALED = {
    "linear": LinearScaling(4.0),
    "llama3": Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
}


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("dims", [64, 128])
def test_scaled_frequencies_are_those_of_transformers(kind, dims):
    parameters = {"rope_type": kind, "rope_theta": 500000.0, "factor": SCALED[kind].factor}
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        hidden_size=4 * dims, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=parameters
    )
    expected, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    got = inverse_frequencies(Rope(500000.0, dims, SCALED[kind]))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=3e-7, atol=0)
    plain = inverse_frequencies(Rope(500000.0, dims))
    assert not torch.allclose(got, plain)


def test_plain_frequencies():
    expected = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    torch.testing.assert_close(inverse_frequencies(Rope(10000.0, 32)).double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dims", [16, 32])  # half of each head, and all of it
def test_rotation_is_a_complex_product(dims):
    rotary = Rotary(Rope(10000.0, dims), torch.device("cpu"))
    positions = torch.tensor([0, 5, 8191])
    heads = torch.randn(3, 4, 32)
    real, imaginary = heads[..., :dims].double().chunk(2, dim=2)
    angles = positions.double()[:, None, None] * inverse_frequencies(Rope(10000.0, dims)).double()
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag, heads[..., dims:].double()), dim=2)
    rotary.rotate_(heads, *rotary.angles(positions))
    # 8191 radians in float32 are off by up to 2.4e-4
    torch.testing.assert_close(heads.double(), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(heads[:2].double(), expected[:2], rtol=0, atol=1e-5)
