"""AWQ checkpoints in the GEMM order (AutoAWQ; AutoRound writes it too).

``qweight`` int32 [K, N/8] and ``qzeros`` int32 [G, N/8], four bits a code; slot i of a word, from the low bits, holds
column COLUMNS[i] of its eight. ``scales`` [G, N]. Zero points are stored as they are. Read in AutoAWQ's
``WQLinear_GEMM`` and ``packing_utils``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch

from lbq.formats.errors import DataError
from lbq.formats.packing import unpack
from lbq.formats.safetensors_file import Checkpoint
from lbq.quantizer.foreign.coded import Coded
from lbq.quantizer.foreign.layout import SCALES, Setting, Stored, choose, expect, finite, matrix_shape, read_config

BITS = 4
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
WORD = len(COLUMNS)
HARMLESS = frozenset(
    (
        *("autoround_version", "backend", "batch_size", "data_type", "do_fuse", "enable_quanted_input"),
        *("exllama_config", "fuse_max_seq_len", "iters", "lm_head", "modules_to_fuse", "modules_to_not_convert"),
        *("provider", "sym", "to_quant_block_names"),
    )
)


class AwqConfig(msgspec.Struct):
    """``quantization_config`` of method awq."""

    bits: Literal[4] = 4
    group_size: int = 128
    zero_point: bool = True
    version: Literal["gemm", "GEMM"] = "gemm"


@dataclass(frozen=True)
class Awq:
    """See :class:`lbq.quantizer.foreign.layout.Layout`."""

    settings: tuple[Setting, ...]
    tool: str
    notes: tuple[str, ...] = ()
    marker: str = "qweight"

    def locate(self, checkpoint: Checkpoint, module: str, n: int, k: int) -> Stored:
        """See :class:`Layout`."""
        if n % WORD:
            raise DataError(f"{checkpoint.folder}: {module}: {n} outputs do not divide into words of {WORD}")
        groups, _ = matrix_shape(checkpoint, f"{module}.scales")
        setting = choose(checkpoint, module, k, self.settings, lambda s: s.groups_in(k) == groups)
        tensors = (
            expect(checkpoint, f"{module}.qweight", (torch.int32,), (k, n // WORD)),
            expect(checkpoint, f"{module}.qzeros", (torch.int32,), (groups, n // WORD)),
            expect(checkpoint, f"{module}.scales", SCALES, (groups, n)),
        )
        return Stored(module, n, k, setting, tensors)

    def read(self, checkpoint: Checkpoint, stored: Stored) -> Coded:
        """See :class:`Layout`."""
        words, zeros, scales = stored.tensors
        return Coded(
            codes=_in_order(checkpoint.tensor(words)).t().contiguous(),
            scales=finite(checkpoint, scales).t(),
            zeros=_in_order(checkpoint.tensor(zeros)).t().to(torch.int16),
            bits=BITS,
            group=stored.setting.group_in(stored.k),
        )

    def settle(self, checkpoint: Checkpoint, layers: Iterable[Stored]) -> Awq:
        """Nothing lies here."""
        del checkpoint, layers
        return self


def parse_awq(data: bytes, where: str) -> Awq:
    """The layout of a ``quantization_config``. Raises DataError for a value without a meaning here."""
    config, notes = read_config(data, AwqConfig, HARMLESS, where)
    try:
        return Awq((Setting.of(config.bits, config.group_size, not config.zero_point),), "AWQ", notes)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N/8] to codes in the order of the columns, uint8 [R, N]."""
    rows, count = words.shape
    slots = unpack(words, BITS, WORD * count).view(rows, count, WORD)
    order = torch.tensor(COLUMNS).argsort()  # column → slot
    return slots[:, :, order].view(rows, -1)
