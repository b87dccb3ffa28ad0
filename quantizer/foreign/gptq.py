"""GPTQ checkpoints: AutoGPTQ, GPTQModel, and AutoRound's export of the same tensors.

``qweight`` int32 [⌈K·b/32⌉, N]: a little-endian stream of codes along K; ``scales`` [G, N]; ``qzeros`` int32
[G, ⌈N·b/32⌉], a stream along N, of zero points less one (v1) or as they are (v2); ``g_idx`` int32 [K], each input's
group, which may be left out. Read in AutoGPTQ's and GPTQModel's ``qlinear`` modules.

Labels lie: files of one version are about that carry the other's name, and are read one step off. Where the config says
that zero points are symmetric, they say themselves which version they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

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

Bits = Literal[2, 3, 4, 8]
Version = Literal["gptq", "gptq_v2"]
ZERO_OFFSETS: dict[Version, int] = {"gptq": 1, "gptq_v2": 0}
NAMES = {offset: version for version, offset in ZERO_OFFSETS.items()}
HARMLESS = frozenset(
    (
        *("act_group_aware", "autoround_version", "batch_size", "block_name_to_quantize", "cache_block_outputs"),
        *("damp_auto_increment", "damp_percent", "data_type", "dataset", "desc_act", "enable_quanted_input"),
        *("exllama_config", "iters", "lm_head", "low_gpu_mem_usage", "lr", "max_input_length", "meta", "method"),
        *(
            "minmax_lr",
            "model_file_base_name",
            "model_name_or_path",
            "model_seqlen",
            "module_name_preceding_first_block",
        ),
        *("modules_in_block_to_quantize", "mse", "nsamples", "pad_token_id", "provider", "seqlen", "static_groups"),
        *("module_name_preceding_first_block", "true_sequential", "use_cuda_fp16", "use_exllama"),
    )
)


class _Override(msgspec.Struct):
    """What ``dynamic`` says of the layers that a pattern names; a key that begins with −: leaves them in 16 bits."""

    bits: Bits | None = None
    group_size: int | None = None
    sym: bool | None = None


class GptqConfig(msgspec.Struct):
    """``quantization_config`` of method gptq."""

    bits: Bits
    group_size: int = 128
    sym: bool = True
    checkpoint_format: Version | None = None
    format: Version | None = None  # GPTQModel's newer name
    pack_dtype: Literal["int32"] = "int32"
    dynamic: dict[str, _Override] | None = None
    rotation: None = None  # weights whose activations must be rotated too
    activation: None = None  # quantised activations


@dataclass(frozen=True)
class Gptq:
    """See :class:`lbq.quantizer.foreign.layout.Layout`."""

    settings: tuple[Setting, ...]
    zero_offset: int  # zero points less what the file holds
    tool: str
    notes: tuple[str, ...] = ()
    marker: str = "qweight"

    def locate(self, checkpoint: Checkpoint, module: str, n: int, k: int) -> Stored:
        """See :class:`Layout`."""
        rows, _ = matrix_shape(checkpoint, f"{module}.qweight")
        groups, _ = matrix_shape(checkpoint, f"{module}.scales")
        setting = choose(
            checkpoint,
            module,
            k,
            self.settings,
            lambda s: (packed_words(k, s.bits), s.groups_in(k)) == (rows, groups),
        )
        tensors: tuple[str, ...] = (
            expect(checkpoint, f"{module}.qweight", (torch.int32,), (rows, n)),
            expect(checkpoint, f"{module}.qzeros", (torch.int32,), (groups, packed_words(n, setting.bits))),
            expect(checkpoint, f"{module}.scales", SCALES, (groups, n)),
        )
        index = f"{module}.g_idx"
        if index in checkpoint:
            tensors += (expect(checkpoint, index, (torch.int32, torch.int64), (k,)),)
        return Stored(module, n, k, setting, tensors)

    def read(self, checkpoint: Checkpoint, stored: Stored) -> Coded:
        """See :class:`Layout`."""
        bits = stored.setting.bits
        words, _, scales, *index = stored.tensors
        return Coded(
            codes=unpack_stream(checkpoint.tensor(words).t(), bits, stored.k),
            scales=finite(checkpoint, scales).t(),
            zeros=self._zeros(checkpoint, stored),
            bits=bits,
            group=stored.setting.group_in(stored.k),
            columns=group_index(checkpoint, index[0], stored.setting.groups_in(stored.k)) if index else None,
        )

    def settle(self, checkpoint: Checkpoint, layers: Iterable[Stored]) -> Gptq:
        """See :class:`Layout`: the version is that of the first layer with symmetric zero points."""
        for stored in layers:
            if not stored.setting.symmetric:
                continue
            found = _stored_zeros(checkpoint, stored).unique().tolist()
            offset = (1 << (stored.setting.bits - 1)) - found[0]
            if len(found) == 1 and offset in NAMES:
                if offset == self.zero_offset:
                    break
                lie = f"labelled {NAMES[self.zero_offset]}, but its zero points are those of {NAMES[offset]}"
                return replace(self, zero_offset=offset, notes=(*self.notes, f"{lie}: read as such"))
        return self

    def _zeros(self, checkpoint: Checkpoint, stored: Stored) -> torch.Tensor:
        """Zero points, int16 [N, G]."""
        bits = stored.setting.bits
        zeros = _stored_zeros(checkpoint, stored).to(torch.int16).add_(self.zero_offset)
        if bool((zeros >= 1 << bits).any()):
            raise DataError(
                f"{checkpoint.folder}: {shown(stored.tensors[1])} has a zero point of {1 << bits}, which some tools "
                "read as 0; lbq reads neither"
            )
        return zeros


def parse_gptq(data: bytes, where: str) -> Gptq:
    """The layout of a ``quantization_config``. Raises DataError for a value without a meaning here."""
    config, notes = read_config(data, GptqConfig, HARMLESS, where)
    versions = {version for version in (config.checkpoint_format, config.format) if version is not None} or {"gptq"}
    if len(versions) != 1:
        raise DataError(f"{where}: checkpoint_format and format differ")
    overrides = [o for pattern, o in (config.dynamic or {}).items() if not pattern.startswith("-:")]
    try:
        settings = [Setting.of(config.bits, config.group_size, config.sym)]
        for o in overrides:
            group = config.group_size if o.group_size is None else o.group_size
            settings.append(Setting.of(o.bits or config.bits, group, config.sym if o.sym is None else o.sym))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    return Gptq(tuple(dict.fromkeys(settings)), ZERO_OFFSETS[versions.pop()], "GPTQ", notes)


def _stored_zeros(checkpoint: Checkpoint, stored: Stored) -> torch.Tensor:
    """What the file holds for zero points, uint8 [N, G]."""
    return unpack_stream(checkpoint.tensor(stored.tensors[1]), stored.setting.bits, stored.n).t()
