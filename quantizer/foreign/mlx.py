"""MLX checkpoints (mlx-lm): affine groups, embedding and head among the quantised layers.

``weight`` uint32 [N, K·b/32], a little-endian stream of codes along K; ``scales`` and ``biases`` [N, K/g]; a weight is
scale · code + bias. Read in mlx's ``quantize`` and ``dequantize`` and mlx-lm's ``utils``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch

from lbq.formats import json_file
from lbq.formats.errors import DataError
from lbq.formats.packing import packed_words
from lbq.formats.safetensors_file import Checkpoint
from lbq.quantizer.foreign.coded import Coded, unpack_stream
from lbq.quantizer.foreign.gptq import Bits
from lbq.quantizer.foreign.layout import SCALES, Setting, Stored, choose, expect, finite, matrix_shape

SETTINGS = ("group_size", "bits", "mode", "quant_method")  # all other keys name layers


class MlxConfig(msgspec.Struct):
    """``quantization_config`` without a method, and what it says of a layer."""

    bits: Bits
    group_size: int
    mode: Literal["affine"] = "affine"


@dataclass(frozen=True)
class Mlx:
    """See :class:`lbq.quantizer.foreign.layout.Layout`."""

    settings: tuple[Setting, ...]
    notes: tuple[str, ...] = ()
    tool: str = "MLX"
    marker: str = "scales"

    def locate(self, checkpoint: Checkpoint, module: str, n: int, k: int) -> Stored:
        """See :class:`Layout`."""
        _, words = matrix_shape(checkpoint, f"{module}.weight")
        _, groups = matrix_shape(checkpoint, f"{module}.scales")
        setting = choose(
            checkpoint, module, k, self.settings, lambda s: (packed_words(k, s.bits), s.groups_in(k)) == (words, groups)
        )
        tensors = (
            expect(checkpoint, f"{module}.weight", (torch.uint32, torch.int32), (n, words)),
            expect(checkpoint, f"{module}.scales", SCALES, (n, groups)),
            expect(checkpoint, f"{module}.biases", SCALES, (n, groups)),
        )
        return Stored(module, n, k, setting, tensors)

    def read(self, checkpoint: Checkpoint, stored: Stored) -> Coded:
        """See :class:`Layout`."""
        words, *floats = stored.tensors
        scales, biases = (finite(checkpoint, name) for name in floats)
        bits = stored.setting.bits
        symmetric = torch.equal(biases.double(), -(1 << (bits - 1)) * scales.double())
        return Coded(
            codes=unpack_stream(checkpoint.tensor(words).view(torch.int32), bits, stored.k),
            scales=scales,
            zeros=None,
            bits=bits,
            group=stored.setting.group_in(stored.k),
            biases=None if symmetric else biases,
        )

    def settle(self, checkpoint: Checkpoint, layers: Iterable[Stored]) -> Mlx:
        """Nothing lies here."""
        del checkpoint, layers
        return self


def parse_mlx(data: bytes, where: str) -> Mlx:
    """The layout of a ``quantization_config``. Raises DataError for a value without a meaning here."""
    fields = json_file.decode(data, dict[str, msgspec.Raw], where)
    layers = [bytes(value) for name, value in fields.items() if name not in SETTINGS]
    configs = [data, *(value for value in layers if value.strip() not in (b"false", b"true"))]
    try:
        parsed = [json_file.decode(each, MlxConfig, where) for each in configs]
        return Mlx(tuple(dict.fromkeys(Setting.of(c.bits, c.group_size, False) for c in parsed)))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
