"""Write the files of this folder: a tiny checkpoint as mlx-lm 0.32.2 converts it, and layers as MLX dequantises them.

    python make.py CHECKPOINT

CHECKPOINT was a Llama of one layer with random weights. MLX is not among the tests' packages; its wheel for Linux runs
on a CPU (``pip install mlx mlx-cpu mlx-lm``).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_lm import convert

HERE = Path(__file__).parent
LAYER, EMBEDDING = "model.layers.0.self_attn.k_proj", "model.embed_tokens"
PARTS = ("weight", "scales", "biases")


def dense(tensors: dict[str, mx.array], name: str, bits: int, group: int) -> mx.array:
    words, scales, biases = (tensors[f"{name}.{part}"] for part in PARTS)
    wide = (words, scales.astype(mx.float32), biases.astype(mx.float32))  # else sums are rounded to their dtype
    return mx.dequantize(*wide, group_size=group, bits=bits)


def main(checkpoint: str) -> None:
    expected: dict[str, mx.array] = {}
    for bits, group in ((2, 64), (3, 32), (4, 32), (8, 64)):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "out")
            convert(checkpoint, str(out), quantize=True, q_bits=bits, q_group_size=group)
            tensors = mx.load(str(out / "model.safetensors"))
            config = json.loads((out / "config.json").read_text())

            def dense(
                name: str, tensors: dict[str, mx.array] = tensors, bits: int = bits, group: int = group
            ) -> mx.array:
                words, scales, biases = (tensors[f"{name}.{part}"] for part in PARTS)
                wide = (words, scales.astype(mx.float32), biases.astype(mx.float32))  # else sums are rounded to theirs
                return mx.dequantize(*wide, group_size=group, bits=bits)

            expected[f"{bits}.{LAYER}"] = dense(LAYER)
            if bits == 4:
                expected[f"{bits}.{EMBEDDING}"] = dense(tensors, EMBEDDING, bits, group)[:16]
                mx.save_safetensors(str(HERE / "model.safetensors"), tensors, {"format": "mlx"})
                (HERE / "config.json").write_text(json.dumps(config, indent=1) + "\n")
            else:
                expected |= {f"{bits}.{LAYER}.{part}": tensors[f"{LAYER}.{part}"] for part in PARTS}
    mx.save_safetensors(str(HERE / "expected.safetensors"), expected)


if __name__ == "__main__":
    main(sys.argv[1])
