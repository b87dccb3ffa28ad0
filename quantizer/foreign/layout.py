"""What the layouts of other tools share: the settings a config allows, and headers that must fit one of them.

Configs say by patterns which layers have which bits and group. lbq does not match patterns: the tensors that are there
say which layers are quantised, their shapes say the bits and the group, and these must be ones that the config names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Protocol, TypeVar

import msgspec
import torch

from lbq.formats import json_file
from lbq.formats.disk import shown
from lbq.formats.errors import DataError
from lbq.formats.safetensors_file import Checkpoint
from lbq.quantizer.foreign.coded import Coded

T = TypeVar("T", bound=msgspec.Struct)

SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Setting:
    """Bits and group as a config says them; ``group`` None is one scale a row."""

    bits: int
    group: int | None
    symmetric: bool

    @staticmethod
    def of(bits: int, group: int, symmetric: bool) -> Setting:
        """From a config, where −1 is a row. ValueError for a group that is none."""
        if group != -1 and group < 1:
            raise ValueError(f"group size {group}")
        return Setting(bits, None if group == -1 else group, symmetric)

    def group_in(self, k: int) -> int:
        """The group of a matrix with ``k`` inputs."""
        return k if self.group is None else min(self.group, k)

    def groups_in(self, k: int) -> int:
        """Scales a row; the last group may be shorter."""
        return -(-k // self.group_in(k))

    def __str__(self) -> str:
        return f"{self.bits} bits " + ("a scale a row" if self.group is None else f"in groups of {self.group}")


@dataclass(frozen=True)
class Stored:
    """A quantised layer W [n, k] of a checkpoint whose headers fit: nothing of it has been read."""

    module: str
    n: int
    k: int
    setting: Setting
    tensors: tuple[str, ...]


class Layout(Protocol):
    """How a tool stores quantised layers."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs from what one would expect."""
        ...

    @property
    def tool(self) -> str:
        """Its name, and what there is to say about the kind: ``GPTQ v2``."""
        ...

    @property
    def marker(self) -> str:
        """The suffix of the tensor that a quantised layer has."""
        ...

    def locate(self, checkpoint: Checkpoint, module: str, n: int, k: int) -> Stored:
        """The layer by its headers. DataError names the tensor that does not fit."""
        ...

    def read(self, checkpoint: Checkpoint, stored: Stored) -> Coded:
        """Its codes, scales and zero points. DataError for values that mean nothing."""
        ...

    def settle(self, checkpoint: Checkpoint, layers: Iterable[Stored]) -> Layout:
        """This layout after a look at the values, where configs are known to lie."""
        ...


def read_config(data: bytes, kind: type[T], harmless: Set[str], where: str) -> tuple[T, tuple[str, ...]]:
    """A ``quantization_config``, and a note on keys that are not understood. Raises DataError for values that are not.

    ``harmless`` keys say nothing about what the stored tensors mean.
    """
    config = json_file.decode(data, kind, where)
    keys = json_file.decode(data, dict[str, msgspec.Raw], where).keys()
    unknown = sorted(keys - harmless - {"quant_method"} - {f.encode_name for f in msgspec.structs.fields(kind)})
    return config, (f"quantization_config: unknown keys are ignored: {', '.join(unknown)}",) if unknown else ()


def choose(
    checkpoint: Checkpoint, module: str, k: int, settings: Iterable[Setting], fits: Callable[[Setting], bool]
) -> Setting:
    """The setting that fits the headers of a layer with ``k`` inputs. Raises DataError where none does, or several
    that mean different things."""
    settings = tuple(settings)
    found = [setting for setting in settings if fits(setting)]
    if len({(s.bits, s.group_in(k)) for s in found}) == 1:
        return found[0]
    named = "; ".join(dict.fromkeys(map(str, settings)))
    problem = "are ambiguous between the settings" if found else "fit none of the settings"
    raise DataError(f"{checkpoint.folder}: {module}: its tensors' shapes {problem} of quantization_config: {named}")


def expect(checkpoint: Checkpoint, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> str:
    """``name``, if its header is as it must be; else DataError."""
    info = checkpoint.info(name)
    if info.dtype not in dtypes or info.shape != shape:
        raise DataError(
            f"{checkpoint.folder}: {shown(name)} is {info.dtype} {list(info.shape)}, "
            f"not {' or '.join(map(str, dtypes))} {list(shape)}"
        )
    return name


def matrix_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """The shape of a tensor that must have two dimensions."""
    shape = checkpoint.info(name).shape
    if len(shape) != 2:
        raise DataError(f"{checkpoint.folder}: {shown(name)} has {len(shape)} dimensions, not 2")
    return shape[0], shape[1]


def finite(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor of scales. Raises DataError for NaN and infinity."""
    scales = checkpoint.tensor(name)
    good = torch.isfinite(scales)
    if not bool(good.all()):
        at = [int(i) for i in (~good).nonzero()[0]]
        raise DataError(f"{checkpoint.folder}: {shown(name)} has {float(scales[tuple(at)])} at {at}; fetch it again")
    return scales


def group_index(checkpoint: Checkpoint, name: str, groups: int) -> torch.Tensor:
    """Each input's group, int64 [K]. Raises DataError for one that there is not."""
    columns = checkpoint.tensor(name).to(torch.int64)
    if bool((columns < 0).any()) or bool((columns >= groups).any()):
        raise DataError(f"{checkpoint.folder}: {shown(name)} names groups outside 0 to {groups - 1}")
    return columns
