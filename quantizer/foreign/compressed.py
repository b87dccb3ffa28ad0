"""compressed-tensors checkpoints, format ``pack-quantized``: integers of 2, 3, 4 and 8 bits, groups and rows.

``weight_packed`` int32 [N, ⌈K·b/32⌉] is a little-endian stream of code + 2^(b−1) along K; ``weight_scale`` [N, G];
``weight_shape`` int64 [2]; ``weight_zero_point`` where it is asymmetric, int32 [⌈N·b/32⌉, G], a stream along N, or int8
[N, G] in old files; ``weight_g_idx`` int32 [K] where GPTQ reordered groups (versions before 0.19). At 3 bits versions
before 0.18 put ten codes into a word and wasted two bits: told apart by the width. Read in
``compressed_tensors.compressors.pack_quantized``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import torch

from lbq.formats.disk import shown
from lbq.formats.errors import DataError
from lbq.formats.packing import packed_words
from lbq.formats.safetensors_file import Checkpoint
from lbq.quantizer.foreign.coded import Coded, unpack_stream
from lbq.quantizer.foreign.layout import (
    SCALES,
    Setting,
    Stored,
    choose,
    expect,
    finite,
    group_index,
    matrix_shape,
    read_config,
)

HARMLESS = frozenset(("global_compression_ratio", "ignore", "moe_sparsity_config", "version"))
OLD_WORD = 10  # codes of 3 bits a word, before 0.18


class _Weights(msgspec.Struct):
    num_bits: Literal[2, 3, 4, 8] = 8
    type: Literal["int"] = "int"
    symmetric: bool = True
    strategy: Literal["group", "channel"] | None = None
    group_size: int | None = None
    dynamic: bool = False
    block_structure: None = None

    def setting(self) -> Setting:
        if self.dynamic:
            raise ValueError("dynamic weights")
        strategy = self.strategy or ("group" if (self.group_size or -1) != -1 else "channel")
        if strategy == "channel":
            return Setting(self.num_bits, None, self.symmetric)
        if self.group_size is None:
            raise ValueError("strategy group without a group_size")
        return Setting.of(self.num_bits, self.group_size, self.symmetric)


class _Group(msgspec.Struct):
    weights: _Weights
    format: Literal["pack-quantized"] | None = None
    input_activations: None = None
    output_activations: None = None


class CompressedConfig(msgspec.Struct):
    """``quantization_config`` of method compressed-tensors."""

    config_groups: Annotated[dict[str, _Group], msgspec.Meta(min_length=1)]
    format: Literal["pack-quantized", "mixed-precision"] = "pack-quantized"
    quantization_status: Literal["compressed"] = "compressed"
    kv_cache_scheme: None = None
    sparsity_config: dict[str, object] | None = None
    transform_config: dict[str, object] | None = None


@dataclass(frozen=True)
class Compressed:
    """See :class:`lbq.quantizer.foreign.layout.Layout`."""

    settings: tuple[Setting, ...]
    notes: tuple[str, ...] = ()
    tool: str = "compressed-tensors"
    marker: str = "weight_packed"

    def locate(self, checkpoint: Checkpoint, module: str, n: int, k: int) -> Stored:
        """See :class:`Layout`."""
        zero_point, index = f"{module}.weight_zero_point", f"{module}.weight_g_idx"
        symmetric = zero_point not in checkpoint
        _, words = matrix_shape(checkpoint, f"{module}.weight_packed")
        _, groups = matrix_shape(checkpoint, f"{module}.weight_scale")

        def fits(setting: Setting) -> bool:
            widths = (packed_words(k, setting.bits), *((-(-k // OLD_WORD),) if setting.bits == 3 else ()))
            return words in widths and setting.groups_in(k) == groups and setting.symmetric == symmetric

        setting = choose(checkpoint, module, k, self.settings, fits)
        if setting.bits == 3 and packed_words(k, 3) == -(-k // OLD_WORD) and k > OLD_WORD:
            raise DataError(f"{checkpoint.folder}: {module}: {k} 3-bit codes fill as many words in either packing")
        tensors: tuple[str, ...] = (
            expect(checkpoint, f"{module}.weight_packed", (torch.int32,), (n, words)),
            expect(checkpoint, f"{module}.weight_scale", SCALES, (n, groups)),
            expect(checkpoint, f"{module}.weight_shape", (torch.int64, torch.int32), (2,)),
        )
        shape = checkpoint.tensor(tensors[2]).tolist()
        if shape != [n, k]:
            raise DataError(f"{checkpoint.folder}: {module}.weight_shape is {shape}, the config says {[n, k]}")
        if not symmetric:
            old = checkpoint.info(zero_point).dtype == torch.int8
            rows = n if old else packed_words(n, setting.bits)
            tensors += (expect(checkpoint, zero_point, (torch.int8 if old else torch.int32,), (rows, groups)),)
        if index in checkpoint:
            tensors += (expect(checkpoint, index, (torch.int32, torch.int64), (k,)),)
        return Stored(module, n, k, setting, tensors)

    def read(self, checkpoint: Checkpoint, stored: Stored) -> Coded:
        """See :class:`Layout`."""
        words, scales, _, *more = stored.tensors
        index = [name for name in more if name.endswith("g_idx")]
        zero_point = [name for name in more if name not in index]
        return Coded(
            codes=_codes(checkpoint.tensor(words), stored.setting.bits, stored.k),
            scales=finite(checkpoint, scales),
            zeros=_zeros(checkpoint, zero_point[0], stored) if zero_point else None,
            bits=stored.setting.bits,
            group=stored.setting.group_in(stored.k),
            columns=group_index(checkpoint, index[0], stored.setting.groups_in(stored.k)) if index else None,
        )

    def settle(self, checkpoint: Checkpoint, layers: Iterable[Stored]) -> Compressed:
        """Nothing lies here."""
        del checkpoint, layers
        return self


def parse_compressed(data: bytes, where: str) -> Compressed:
    """The layout of a ``quantization_config``. Raises DataError for a value without a meaning here."""
    config, notes = read_config(data, CompressedConfig, HARMLESS, where)
    for name, value in (("sparsity_config", config.sparsity_config), ("transform_config", config.transform_config)):
        if value and value.get("format") != "dense":
            raise DataError(f"{where}: {name} is not supported")
    try:
        settings = [group.weights.setting() for group in config.config_groups.values()]
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return Compressed(tuple(dict.fromkeys(settings)), notes)


def _codes(words: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """Unsigned codes, uint8 [N, K], of either packing."""
    if bits != 3 or words.shape[1] == packed_words(k, bits):
        return unpack_stream(words, bits, k)
    shifts = 3 * torch.arange(OLD_WORD, dtype=torch.int32)
    return ((words.unsqueeze(2) >> shifts) & 7).to(torch.uint8).flatten(1)[:, :k].contiguous()


def _zeros(checkpoint: Checkpoint, name: str, stored: Stored) -> torch.Tensor:
    """Zero points on the codes' scale, int16 [N, G]."""
    bits = stored.setting.bits
    values = checkpoint.tensor(name)
    if values.dtype != torch.int8:
        return unpack_stream(values.t(), bits, stored.n).t().to(torch.int16)
    zeros = values.to(torch.int16) + (1 << (bits - 1))
    if bool((zeros < 0).any()) or bool((zeros >= 1 << bits).any()):
        raise DataError(f"{checkpoint.folder}: {shown(name)} has zero points outside {bits} bits")
    return zeros
