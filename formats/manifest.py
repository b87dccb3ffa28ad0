"""``lbq.json``, the manifest: what an artifact is, how it was made and what it cost. It is written last."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from lbq.formats import json_file
from lbq.formats.disk import FileEntry, check_plain_name
from lbq.formats.errors import DataError, StorageError
from lbq.formats.scheme import Scheme
from lbq.formats.spec import Bounded, Count, ModelSpec, Name, Part, Positive

MANIFEST = "lbq.json"
REPORT = "report.json"
PAGE = "report.html"  # the report to look at; not every artifact has it
VERSION = 1
CHECKPOINT = "a checkpoint is made into one by lbq convert, or quantized at load by lbq run --bits 4"


class QuantizedModule(Part, frozen=True):
    """One linear layer: ``NAME.weight_packed``, ``NAME.weight_scale``, ``NAME.weight_shape``."""

    n: Count
    k: Count
    bits: int
    group: Count  # codes that share a scale; k: one scale a row
    layout: Literal["compressed-tensors pack-quantized, dense"] = "compressed-tensors pack-quantized, dense"

    def __post_init__(self) -> None:
        if self.k % self.group:
            raise ValueError(f"group {self.group} does not divide {self.k}")
        _ = self.scheme  # its own checks

    @property
    def scheme(self) -> Scheme:
        """Bits and group, None standing for a row."""
        return Scheme(self.bits, None if self.group == self.k else self.group)


class DenseTensor(Part, frozen=True):
    """A tensor that stays BF16."""

    shape: tuple[Count, ...]
    dtype: Literal["bfloat16"] = "bfloat16"


class Method(Part, frozen=True, tag_field="name", tag="rtn"):
    """How codes were found, and the settings asked for. By itself: round to nearest."""

    scale_rules: dict[str, str]  # by bits
    bits: int | None  # None: chosen unit by unit for target_bpw
    group: Count | None
    lm_head: int | None  # likewise
    keep: tuple[str, ...] = ()
    set: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    target_bpw: Positive | None = None  # the most bits a quantised weight, codes and scales

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.target_bpw is None):
            raise ValueError("either bits or target_bpw")

    @property
    def name(self) -> str:
        """``rtn``, ``autoround`` or ``import``, the tag in the file."""
        return str(self.__struct_config__.tag)


class Calibration(Part, frozen=True):
    """The text that a method was calibrated on."""

    name: str  # of the file, or of the Hub dataset
    sha256: str  # of the file, or of the dataset's texts
    samples: Count
    tokens: Count  # of each sample
    tokens_sha256: str  # of all token ids, int64 and little-endian, sample after sample


class AutoRound(Method, frozen=True, kw_only=True, tag="autoround"):
    """Rounding tuned block by block with the auto-round package; ``scale_rules`` are of what it left to RTN."""

    iterations: int  # 0: auto-round's round to nearest, without calibration
    batch: Count
    seed: int
    device: Literal["cpu", "cuda"]
    products: Literal["bfloat16", "float32"] = "float32"  # dtype of matrix products while tuning
    calibration: Calibration | None


class Import(Method, frozen=True, kw_only=True, tag="import"):
    """Codes of another tool. ``bits``, ``group`` and ``lm_head`` (16: BF16) are those of most layers and of the head;
    ``scale_rules`` are of what was rounded to nearest."""

    origin: Name  # the tool that the tensors are laid out after, and the layout's name where it has one
    requantized: int = 0  # layers that are not weight by weight the source's


class License(Part, frozen=True):
    """What a model card says of the licence, in the Hub's words: ``other`` has a name and a link."""

    id: str
    name: str | None = None
    link: str | None = None


class Source(Part, frozen=True):
    """The checkpoint that was read: its name (a Hub id where there is a revision), its files by hash, its licence."""

    name: str
    revision: str | None
    files: dict[str, FileEntry]
    license: License | None = None


class Summary(Part, frozen=True):
    """The report's totals over quantised weights, each weight counted once."""

    weights: int
    bits_per_weight: Bounded  # codes and scales
    cosine: Bounded
    worst_cosine: Bounded
    relative_error: Bounded
    kl: Bounded | None = None  # mean divergence from the source's distributions in nats, where the report measured it
    same_top1: Bounded | None = None  # likewise, the share of positions with the source's most probable token


class Manifest(Part, frozen=True):
    """All of ``lbq.json``. ``notes`` are the things that differ from what was asked for, as they were said."""

    lbq_format: int
    spec: ModelSpec
    quantized: dict[Name, QuantizedModule]
    dense: dict[Name, DenseTensor]
    method: Method | AutoRound | Import
    source: Source
    tools: dict[str, str]
    summary: Summary
    notes: tuple[str, ...]
    files: dict[Name, FileEntry]


class _Version(msgspec.Struct):
    lbq_format: int


class _Files(msgspec.Struct):
    files: dict[str, msgspec.Raw]


def file_names(folder: Path) -> frozenset[str]:
    """The files that ``folder/lbq.json``, of any version, says the artifact has, and itself.

    Raises DataError for one that does not say, StorageError where it cannot be read.
    """
    path = folder / MANIFEST
    return frozenset(json_file.read(path, _Files).files) | {MANIFEST}


def read_manifest(folder: Path) -> Manifest:
    """Read ``folder/lbq.json``.

    Raises StorageError where there is none, DataError for a version this lbq does not know or a field that is wrong;
    every name in ``files`` is that of a file in the folder.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise StorageError(f"{folder}: no such folder; {CHECKPOINT}")
    if not path.is_file():
        raise DataError(f"{folder}: not an lbq artifact (no {MANIFEST}); {CHECKPOINT}")
    data = json_file.read_bytes(path)
    version = json_file.decode(data, _Version, path).lbq_format
    if version != VERSION:
        raise DataError(f"{path}: format version {version}; this lbq reads version {VERSION}: upgrade lbq")
    manifest = json_file.decode(data, Manifest, path)
    for name in manifest.files:
        check_plain_name(name, str(path))
    return manifest
