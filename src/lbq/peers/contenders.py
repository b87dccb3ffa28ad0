"""The peers that run on transformers' own model: how each stores its linear layers, and how it decodes.

The head stays in BF16, as their defaults have it. These are the documented ways of each library, no more and no less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Prepare = Callable[[Any, torch.device], None]  # quantises the layers of a model in place


@dataclass(frozen=True)
class Contender:
    """``bits`` a weight of the layers, scales included. ``compiled``: a static cache and ``torch.compile``."""

    name: str
    packages: tuple[str, ...]
    bits: float
    compiled: bool
    prepare: Prepare
    needs_gpu: bool = False


def _nothing(model: Any, device: torch.device) -> None:
    del model, device


def replace_linears(model: Any, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put ``make(linear)`` in the place of every linear layer but the head."""
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, make(child))


def _bitsandbytes_int8(model: Any, device: torch.device) -> None:
    import bitsandbytes

    def make(linear: nn.Linear) -> nn.Module:
        made = bitsandbytes.nn.Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, threshold=6.0
        )
        made.load_state_dict(linear.cpu().state_dict())
        return made.to(device)  # type: ignore[no-any-return]

    replace_linears(model, make)


def _bitsandbytes_nf4(model: Any, device: torch.device) -> None:
    import bitsandbytes

    def make(linear: nn.Linear) -> nn.Module:
        made = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
        )
        made.load_state_dict(linear.cpu().state_dict())
        return made.to(device)  # type: ignore[no-any-return]

    replace_linears(model, make)


def _torchao(name: str, **options: Any) -> Prepare:
    def prepare(model: Any, device: torch.device) -> None:
        del device
        from torchao import quantization

        quantization.quantize_(model.model, getattr(quantization, name)(**options))

    return prepare


def _hqq_linears(model: Any, device: torch.device, then: Callable[[Any], nn.Module]) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)

    def make(linear: nn.Linear) -> nn.Module:
        return then(HQQLinear(linear, config, compute_dtype=torch.bfloat16, device=str(device)))

    replace_linears(model, make)


def _hqq(model: Any, device: torch.device) -> None:
    _hqq_linears(model, device, lambda linear: linear)


def _gemlite(model: Any, device: torch.device) -> None:
    from gemlite.helper import A16W4_HQQ_INT

    processor = A16W4_HQQ_INT(device=str(device), dtype=torch.bfloat16)
    _hqq_linears(model, device, processor.from_hqqlinear)


_int4 = _torchao("Int4WeightOnlyConfig", group_size=128, int4_packing_format="tile_packed_to_4d")
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("transformers BF16", ("transformers",), 16, False, _nothing),
        Contender("transformers BF16, compiled", ("transformers",), 16, True, _nothing),
        Contender("bitsandbytes INT8", ("bitsandbytes",), 8, False, _bitsandbytes_int8),
        Contender("bitsandbytes NF4", ("bitsandbytes",), 4.5, False, _bitsandbytes_nf4),
        Contender("torchao INT8, compiled", ("torchao",), 8, True, _torchao("Int8WeightOnlyConfig")),
        Contender("torchao FP8, compiled", ("torchao",), 8, True, _torchao("Float8WeightOnlyConfig")),
        Contender(
            "torchao INT4 g128, compiled",
            ("torchao",),
            4.25,
            True,
            _int4,
            needs_gpu=True,
        ),
        Contender("HQQ INT4 g64, compiled", ("hqq",), 4.5, True, _hqq),
        Contender("gemlite INT4 g64, compiled", ("gemlite", "hqq"), 4.5, True, _gemlite, needs_gpu=True),
    )
}
