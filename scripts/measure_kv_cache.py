#!/usr/bin/env python3
"""What int8 keys and values cost: ``PYTHONPATH=src python3 scripts/measure_kv_cache.py CHECKPOINT TEXT``.

KL divergence of the logits to those of a float32 cache, on the same INT8 weights, on the CPU, over the first tokens of
a text file, after each of which the logits are compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import lbq


def logits(checkpoint: Path, text: str, tokens: int, kv_cache: str) -> torch.Tensor:
    """Log-probabilities after each of the first tokens, float64 [T, V]."""
    with lbq.load(checkpoint, bits=8, device="cpu", context=tokens, kv_cache=kv_cache) as model:  # type: ignore[arg-type]
        ids = model.tokenizer.encode(text, add_special_tokens=True)[:tokens]
        return model.logits(ids).double().log_softmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")[: 40 * arguments.tokens]
    expected, got = (logits(arguments.checkpoint, text, arguments.tokens, kind) for kind in ("auto", "int8"))
    kl = (expected.exp() * (expected - got)).sum(1)
    same = (expected.argmax(1) == got.argmax(1)).float().mean()
    print(
        f"{arguments.checkpoint.name}, {arguments.text.name}, {len(kl)} tokens: KL mean {kl.mean():.1e}, median "
        f"{kl.median():.1e}, largest {kl.max():.1e}; most probable token the same at {same:.1%}"
    )


if __name__ == "__main__":
    main()
