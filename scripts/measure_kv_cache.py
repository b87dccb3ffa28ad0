#!/usr/bin/env python3
"""What keys and values in few bits cost: ``PYTHONPATH=src python3 scripts/measure_kv_cache.py CHECKPOINT TEXT …``.

KL divergence of the logits to those of a float32 cache, on the same INT8 weights, on the CPU, over the first tokens of
each text file, after each of which the logits are compared. In three ways: keys as they are, keys turned by signs
alone, and by units and signs, as ``lbq run --kv-cache`` has it (``lbq.runtime.turn``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import lbq
from lbq.runtime.attention import AttentionMixer
from lbq.runtime.cache import name_of
from lbq.runtime.decoder import Decoder
from lbq.runtime.engine import DecoderEngine
from lbq.runtime.key_units import measure_units
from lbq.runtime.turn import Turn


def untouched(decoder: Decoder) -> None:
    """Keys are rounded as they are, and values too."""
    for mixer in mixers(decoder):
        shape = mixer.spec.kv_heads, mixer.spec.head_dim
        mixer.turn = Turn(torch.ones(shape), torch.eye(shape[1], dtype=torch.float16), 1)


def by_signs(decoder: Decoder) -> None:
    for mixer in mixers(decoder):
        mixer.turn = Turn.plain(mixer.spec.kv_heads, mixer.spec.head_dim, decoder.device)


def as_shipped(decoder: Decoder) -> None:
    for mixer in mixers(decoder):
        mixer.turn = None
    measure_units(decoder)


def mixers(decoder: Decoder) -> list[AttentionMixer]:
    return [layer.mixer for layer in decoder.layers if isinstance(layer.mixer, AttentionMixer)]


WAYS: dict[str, Callable[[Decoder], None]] = {
    "as they are": untouched,
    "by signs": by_signs,
    "by units and signs": as_shipped,
}


def logits(decoder: Decoder, ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities after each token, float64 [T, V]."""
    engine = DecoderEngine(decoder, len(ids), cache_dtype=dtype)
    return engine.all_logits(ids).double().log_softmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    print("| | keys | text | mean KL | median | largest | most probable token the same |")
    print("|---|---|---|---|---|---|---|")
    with lbq.load(arguments.checkpoint, bits=8, device="cpu", context=arguments.tokens) as model:
        decoder = model._bound().bound.decoder
        for path in arguments.texts:
            text = path.read_text(encoding="utf-8")[: 40 * arguments.tokens]
            ids = model.tokenizer.encode(text, add_special_tokens=True)[: arguments.tokens]
            expected = logits(decoder, ids, torch.float32)
            for dtype in (torch.int8, torch.uint8):
                for way, prepare in WAYS.items():
                    prepare(decoder)
                    got = logits(decoder, ids, dtype)
                    kl = (expected.exp() * (expected - got)).sum(1)
                    same = (expected.argmax(1) == got.argmax(1)).float().mean()
                    print(
                        f"| {name_of(dtype)} | {way} | {path.name} | {kl.mean():.1e} | {kl.median():.1e} "
                        f"| {kl.max():.1e} | {same:.1%} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
