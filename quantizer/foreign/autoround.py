"""AutoRound's own export: the tensors of GPTQ or AWQ under another config, where keys with default values are left out.

Which packing has zero points less one is in ``auto_round.inference.backend`` (``GPTQ_FORMAT``, ``GPTQ_FORMAT_NO_ZP``).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from lbq.formats.errors import DataError
from lbq.quantizer.foreign.awq import BITS, Awq
from lbq.quantizer.foreign.gptq import ZERO_OFFSETS, Bits, Gptq, Version
from lbq.quantizer.foreign.layout import Layout, Setting, read_config

HARMLESS = frozenset(
    (
        *("act_data_type", "act_dynamic", "act_group_size", "act_sym", "amp", "autoround_version", "backend"),
        *("batch_size", "block_name_to_quantize", "dataset", "enable_minmax_tuning", "enable_quanted_input"),
        *("gradient_accumulate_steps", "iters", "lm_head", "low_gpu_mem_usage", "lr", "minmax_lr", "nsamples"),
        *("quant_block_list", "scale_dtype", "seqlen", "super_group_size", "to_quant_block_names"),
    )
)
WHOLE = 16  # bits of a layer that is not quantised

VERSIONS: dict[str, Version] = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:exllamav2": "gptq_v2",
}


class _Override(msgspec.Struct):
    """What ``extra_config`` says of a layer or a pattern of layers."""

    bits: Bits | Literal[16] | None = None
    group_size: int | None = None
    sym: bool | None = None
    data_type: Literal["int"] | None = None
    act_bits: Literal[16, 32] | None = None


class AutoRoundConfig(msgspec.Struct):
    """``quantization_config`` of method auto-round."""

    bits: Bits = 4
    group_size: int = 128
    sym: bool = True
    data_type: Literal["int"] = "int"
    act_bits: Literal[16, 32] | None = None
    super_bits: None = None
    rotation_config: None = None
    packing_format: Literal[
        "auto_round:auto_gptq",
        "auto_round:gptq",
        "auto_round",
        "auto_round:gptqmodel",
        "auto_round:exllamav2",
        "auto_round:auto_awq",
        "auto_round:awq",
    ] = "auto_round:auto_gptq"
    extra_config: dict[str, _Override] | None = None


def parse_autoround(data: bytes, where: str) -> Layout:
    """The layout of a ``quantization_config``. Raises DataError for a value without a meaning here."""
    config, notes = read_config(data, AutoRoundConfig, HARMLESS, where)
    wanted = [_Override(), *(config.extra_config or {}).values()]
    try:
        settings = tuple(dict.fromkeys(_setting(config, o) for o in wanted if o.bits != WHOLE))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    if config.packing_format in VERSIONS:
        offset = ZERO_OFFSETS[VERSIONS[config.packing_format]]
        return Gptq(settings, offset, f"AutoRound ({config.packing_format})", notes)
    if any(setting.bits != BITS for setting in settings):
        raise DataError(f"{where}: {config.packing_format} at other than {BITS} bits is not supported")
    return Awq(settings, f"AutoRound ({config.packing_format})", notes)


def _setting(config: AutoRoundConfig, override: _Override) -> Setting:
    group = config.group_size if override.group_size is None else override.group_size
    bits = config.bits if override.bits is None else override.bits
    return Setting.of(bits, group, config.sym if override.sym is None else override.sym)
