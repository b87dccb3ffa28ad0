"""Write the files of this folder: a layer each, as GPTQModel stored it and as GPTQModel dequantises it.

    GPTQMODEL_CPU_WORKERS=2 python make.py CHECKPOINT

GPTQModel 7.7.0 asks for a newer torch than lbq's other tools do, so the tests do not run it. CHECKPOINT was a tiny
Llama with random weights (``checkpoints["llama"]`` of the tests), to which calibration text means nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file

LAYER = "model.layers.0.self_attn.k_proj"
CASES = {
    "v1": {"bits": 4, "format": "gptq"},
    "v1-act-order": {"bits": 4, "format": "gptq", "desc_act": True},
    "v1-asymmetric-act-order": {"bits": 4, "format": "gptq", "desc_act": True, "sym": False},
    "v2": {"bits": 4, "format": "gptq_v2"},
    "v2-3-bits-asymmetric": {"bits": 3, "format": "gptq_v2", "sym": False},
    "v1-8-bits": {"bits": 8, "format": "gptq"},
    "v1-2-bits": {"bits": 2, "format": "gptq"},
}
TEXT = "the quick brown fox jumps over the lazy dog " * 8


def main(checkpoint: str) -> None:
    for name, settings in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            config = QuantizeConfig(group_size=32, offload_to_disk=False, **settings)
            model = GPTQModel.load(checkpoint, config, device="cpu")
            model.quantize([TEXT] * 8, batch_size=1)
            model.save(folder)
            stored = load_file(Path(folder, "model.safetensors"))
            tensors = {key: value for key, value in stored.items() if key.startswith(f"{LAYER}.")}
            loaded = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH)
            linear = loaded.model.get_submodule(LAYER)
            linear.scales = tensors[f"{LAYER}.scales"].float()  # it rounds them, and products, to BF16
            tensors["dequantized"] = linear.dequantize_weight().t().float().contiguous()
            settings = json.loads(Path(folder, "config.json").read_text())["quantization_config"]
            metadata = {"quantization_config": json.dumps(settings)}
            save_file(tensors, Path(__file__).parent / f"{name}.safetensors", metadata)


if __name__ == "__main__":
    main(sys.argv[1])
