"""How GPTQ, AWQ and AutoRound store a symmetric layer: ``docs/interop.md``, and the readers in ``quantizer/foreign``.

Zero points are 2^(b−1); scales are float16 and may be negative, as every reader multiplies by them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import torch

from lbq.formats.manifest import QuantizedModule
from lbq.formats.packing import PackedWeight, pack, packed_words, unpack
from lbq.formats.safetensors_writer import TensorPlan
from lbq.quantizer.foreign.awq import BITS as AWQ_BITS
from lbq.quantizer.foreign.awq import COLUMNS, WORD

SCALES = torch.float16
SIDES = 32  # GPTQ's and AutoRound's kernels take layers whose sides are multiples of it


class Layout(Protocol):
    """What a format makes of a layer."""

    name: str

    def problem(self, entry: QuantizedModule) -> str | None:
        """Why the format has no place for a layer."""
        ...

    def tensors(self, module: str, entry: QuantizedModule) -> tuple[TensorPlan, ...]:
        """The tensors that are written."""
        ...

    def store(self, packed: PackedWeight, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Their content, in the same order; ``scales`` are those of ``packed`` in float16."""
        ...

    def config(self, entries: Mapping[str, QuantizedModule], dense: list[str]) -> dict[str, object]:
        """``quantization_config`` of a checkpoint with these layers, all other linears being ``dense``."""
        ...


class Gptq:
    """GPTQ v1, without act-order: what GPTQModel, vLLM, SGLang and AutoGPTQ read."""

    name = "GPTQ"
    indexed = True

    def problem(self, entry: QuantizedModule) -> str | None:
        if entry.n % SIDES or entry.k % SIDES:
            return f"{entry.n}×{entry.k}: {self.name} needs sides that are multiples of {SIDES}"
        return None

    def tensors(self, module: str, entry: QuantizedModule) -> tuple[TensorPlan, ...]:
        groups = entry.k // entry.group
        index = (TensorPlan(f"{module}.g_idx", torch.int32, (entry.k,)),) if self.indexed else ()
        return (
            TensorPlan(f"{module}.qweight", torch.int32, (packed_words(entry.k, entry.bits), entry.n)),
            TensorPlan(f"{module}.qzeros", torch.int32, (groups, packed_words(entry.n, entry.bits))),
            TensorPlan(f"{module}.scales", SCALES, (groups, entry.n)),
            *index,
        )

    def store(self, packed: PackedWeight, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        zero = (1 << (packed.bits - 1)) - 1  # v1 stores one less
        zeros = torch.full((packed.k // packed.group, packed.n), zero, dtype=torch.uint8)
        index = (torch.arange(packed.k, dtype=torch.int32) // packed.group,) if self.indexed else ()
        return packed.words.t(), pack(zeros, packed.bits), scales.t(), *index

    def config(self, entries: Mapping[str, QuantizedModule], dense: list[str]) -> dict[str, object]:
        bits, group = _most_common(entries)
        overrides: dict[str, dict[str, object]] = {
            f"+:^{name.replace('.', chr(92) + '.')}$": {"bits": entry.bits, "group_size": _group(entry)}
            for name, entry in entries.items()
            if (entry.bits, _group(entry)) != (bits, group)
        }
        overrides |= {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in dense if "." in name}
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "desc_act": False,
            "sym": True,
            "lm_head": any("." not in name for name in entries),
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
        } | ({"dynamic": overrides} if overrides else {})


class AutoRound(Gptq):
    """AutoRound's own packing: GPTQ's tensors without the index."""

    name = "AutoRound"
    indexed = False

    def config(self, entries: Mapping[str, QuantizedModule], dense: list[str]) -> dict[str, object]:
        bits, group = _most_common(entries)
        extra: dict[str, dict[str, object]] = {
            name: {"bits": entry.bits, "group_size": _group(entry), "sym": True, "data_type": "int"}
            for name, entry in entries.items()
            if (entry.bits, _group(entry)) != (bits, group) or "." not in name
        }
        extra |= {name: {"bits": 16, "data_type": "float"} for name in dense if "." in name}
        return {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": bits,
            "group_size": group,
            "sym": True,
            "data_type": "int",
            "block_name_to_quantize": "model.layers",
        } | ({"extra_config": extra} if extra else {})


class Awq:
    """AutoAWQ's GEMM order: INT4, one group for all layers, no quantised head."""

    name = "AWQ"

    def problem(self, entry: QuantizedModule) -> str | None:
        if entry.bits != AWQ_BITS:
            return f"INT{entry.bits}: AWQ has INT4 alone"
        return f"{entry.n} outputs: AWQ needs a multiple of {WORD}" if entry.n % WORD else None

    def tensors(self, module: str, entry: QuantizedModule) -> tuple[TensorPlan, ...]:
        groups = entry.k // entry.group
        return (
            TensorPlan(f"{module}.qweight", torch.int32, (entry.k, entry.n // WORD)),
            TensorPlan(f"{module}.qzeros", torch.int32, (groups, entry.n // WORD)),
            TensorPlan(f"{module}.scales", SCALES, (groups, entry.n)),
        )

    def store(self, packed: PackedWeight, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes = unpack(packed.words, packed.bits, packed.k).t().reshape(packed.k, -1, WORD)
        words = pack(codes[:, :, list(COLUMNS)].reshape(packed.k, -1), AWQ_BITS)
        zeros = torch.full((packed.k // packed.group, packed.n), 1 << (AWQ_BITS - 1), dtype=torch.uint8)
        return words, pack(zeros, AWQ_BITS), scales.t()

    def config(self, entries: Mapping[str, QuantizedModule], dense: list[str]) -> dict[str, object]:
        _, group = _most_common(entries)
        return {
            "quant_method": "awq",
            "bits": AWQ_BITS,
            "group_size": group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": dense,
        }


def _most_common(entries: Mapping[str, QuantizedModule]) -> tuple[int, int]:
    return Counter((entry.bits, _group(entry)) for entry in entries.values()).most_common(1)[0][0]


def _group(entry: QuantizedModule) -> int:
    """As configs say it: −1 is a row."""
    return entry.scheme.group or -1
