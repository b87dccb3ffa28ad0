"""A model of transformers with random weights in the shape of a spec, and the clock around its ``generate``."""

from __future__ import annotations

import time
from typing import Any

import torch

from lbq.formats.spec import ModelSpec


def config_of(spec: ModelSpec) -> Any:
    """The config of a model with as many bytes and operations a token; how positions turn does not matter."""
    import transformers

    kind = spec.layer_kinds[0]
    mixer, mlp = kind.mixer, kind.mlp
    family = transformers.Qwen3Config if mixer.q_norm else transformers.LlamaConfig
    return family(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=mlp.down.in_features,
        num_hidden_layers=len(spec.layers),
        num_attention_heads=mixer.heads,
        num_key_value_heads=mixer.kv_heads,
        head_dim=mixer.head_dim,
        max_position_embeddings=spec.context,
        attention_bias=any(p.bias for p in mixer.qkv),
        tie_word_embeddings=spec.tied,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )


def random_model(spec: ModelSpec, device: torch.device) -> Any:
    """Its weights are BF16 and drawn on the device."""
    import transformers

    with device:
        model = transformers.AutoModelForCausalLM.from_config(config_of(spec), dtype=torch.bfloat16)
    return model.eval()


class Generating:
    """Greedy decoding by ``generate``, past any end token."""

    def __init__(self, model: Any, device: torch.device, *, compiled: bool) -> None:
        self._model, self._device = model, device
        self._options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if compiled:
            model.forward = torch.compile(model.forward, mode="reduce-overhead")
            self._options |= {"cache_implementation": "static", "disable_compile": True}

    @torch.inference_mode()
    def seconds(self, prompt: int, new: int) -> float:
        """Of one call for exactly ``new`` tokens."""
        ids = torch.randint(1, self._model.config.vocab_size, (1, prompt), device=self._device)
        self._synchronize()
        began = time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            **self._options,
        )
        self._synchronize()
        assert out.shape == (1, prompt + new)
        return time.perf_counter() - began

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
